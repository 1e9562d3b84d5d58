"""What every test shares: memory that is poisoned where asked, and Hypothesis that repeats itself in CI."""

import os

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fresh array is full of NaN (or of ones, where it holds booleans or integers)."""
    empty = np.empty

    def poison(*args: object, **kwargs: object) -> np.ndarray:
        x = empty(*args, **kwargs)
        x[...] = np.nan if x.dtype.kind not in "biu" else 1
        return x

    monkeypatch.setattr(np, "empty", poison)
