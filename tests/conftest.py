"""What every test shares: poisoned memory, either backend where asked, and Hypothesis that repeats itself in CI."""

import os
from functools import wraps

import numpy as np
import pytest
from hypothesis import settings

import tilefold as tf

settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def poison(patch: pytest.MonkeyPatch) -> None:
    """From now on every fresh array is full of NaN (or of ones, where it holds booleans or integers)."""
    empty = np.empty

    def full(*args: object, **kwargs: object) -> np.ndarray:
        x = empty(*args, **kwargs)
        x[...] = np.nan if x.dtype.kind not in "biu" else 1
        return x

    patch.setattr(np, "empty", full)


@pytest.fixture(params=["auto", "numpy"])
def either_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Calls that name no backend and no plan run as they would, on the native core; and once more all on NumPy."""
    if request.param == "numpy":
        for name in ("attention", "explain"):
            monkeypatch.setattr(tf, name, on_numpy(getattr(tf, name)))
    return request.param


def on_numpy(call):
    @wraps(call)
    def pinned(*args: object, **options: object) -> object:
        if "plan" not in options:
            options.setdefault("backend", "numpy")
        return call(*args, **options)

    return pinned
