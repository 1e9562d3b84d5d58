"""What a peer is. Inputs are handed over before the clock starts, in the order of memory that it likes best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..scenarios import Inputs, Scenario


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute attention. `available` and `why_not` return None for yes, or one sentence."""

    name: str
    available: Callable[[], str | None]
    why_not: Callable[[Scenario], str | None]
    build: Callable[[Scenario, Inputs], Callable[[], Any]]
    to_numpy: Callable[[Any, str], np.ndarray]  # the result of a call, and the type it stands for
    foreign: bool  # it may fail without failing the run, and tracemalloc does not see its memory
    apart: str = ""  # `module:NAME` of this row if it runs in a process of its own
    package: str = ""  # whose version counts
    note: str = ""  # how it is called, where that is a choice
    unseen: Callable[[Scenario, Inputs], int] | None = None  # bytes of a call that tracemalloc does not see
    backward: bool = False  # `build` also knows gradients: dq, dk and dv as a tuple

    def refusal(self, scenario: Scenario) -> str | None:
        """Why this scenario is not measured, or None."""
        if scenario.grad and not self.backward:
            return "its gradients are not measured"
        return self.why_not(scenario)

    def numpy(self, result: Any, scenario: Scenario) -> np.ndarray | tuple[np.ndarray, ...]:
        """The result of a call, or each of its gradients."""
        if scenario.grad:
            return tuple(self.to_numpy(x, scenario.dtype) for x in result)
        return self.to_numpy(result, scenario.dtype)

    @property
    def version(self) -> str | None:
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None


def installed(*modules: str) -> Callable[[], str | None]:
    """`available` of a peer that needs these modules; they are looked for, not imported.

    >>> installed("numpy")(), installed("numpy", "abacus")()
    (None, 'abacus is not installed')
    """

    def answer() -> str | None:
        missing = [name for name in modules if find_spec(name) is None]
        return f"{missing[0]} is not installed" if missing else None

    return answer


def four(x: np.ndarray) -> np.ndarray:
    """With leading dimensions as one, which every library wants."""
    return x.reshape(-1, *x.shape[-3:])


def heads_as_rows(scenario: Scenario, q: np.ndarray) -> np.ndarray:
    """Queries (batch, heads, length, dim), those of the heads that share a key head as rows of one head.

    Where every query sees every key this is the same attention, of fewer and taller heads, and nobody has to copy
    keys for it. It is a view; so is the way back, a reshape.
    """
    return q.reshape(q.shape[0], scenario.case.kv_heads, -1, q.shape[-1])
