"""Is a result right? Its first, middle and last rows against float64, within the computed budget; gradients whole.

What is right is computed once for a scenario, and everyone is held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import ROWS
from ..masks import band, window
from ..naive import naive, naive_grad
from .budgets import Error, judge, reference_type

if TYPE_CHECKING:
    from .scenarios import Inputs, Scenario

CHECKED = 48  # rows of a panel; short problems are compared as a whole


class Parity:
    """The panels of a scenario as they should be, and as the plain method computes them."""

    def __init__(self, scenario: Scenario, inputs: Inputs) -> None:
        self.dtype = scenario.dtype
        self.panels: list[tuple[Any, np.ndarray, np.ndarray]] = (
            list(_differentiated(scenario, inputs))
            if scenario.grad
            else [
                ((..., rows, slice(None)), *_computed(scenario, inputs, rows))
                for rows in _panels(scenario.case.size["q"])
            ]
        )

    def check(self, out: np.ndarray) -> Error:
        errors = [judge("out", out[where], [plain], right, self.dtype) for where, plain, right in self.panels]
        return Error(
            "out",
            max(e.error for e in errors),
            max(e.budget for e in errors),
            all(e.same_specials for e in errors),
        )


def _differentiated(scenario: Scenario, inputs: Inputs) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """dq, dk and dv as they should be, one after the other, and where each of them lies."""
    q, k, v = inputs[:3]
    dout, acc = scenario.dout(inputs), ROWS[scenario.dtype].accumulate
    mask = None if scenario.band.unlimited else window(scenario.band.left, scenario.band.right)
    plain, right = (
        naive_grad(q, k, v, dout, mask=mask, dtype=dtype)[:3] for dtype in (acc, reference_type(acc))
    )
    at = 0
    for a, b in zip(plain, right, strict=True):
        yield slice(at, at + a.size), a.reshape(-1), b.reshape(-1)
        at += a.size


def _computed(scenario: Scenario, inputs: Inputs, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Some rows in the accumulate type, and in a wider one."""
    q, k, v, *rest = inputs
    mask = None
    if not scenario.band.unlimited:
        offset = k.shape[-2] - q.shape[-2] + rows.start
        mask = band(scenario.band.left, scenario.band.right, offset)
    options = {"bias": _some(rest[0], rows)} if rest else {}
    acc = ROWS[scenario.dtype].accumulate
    plain, _ = naive(q[..., rows, :], k, v, mask, dtype=acc, **options)
    right, _ = naive(q[..., rows, :], k, v, mask, dtype=reference_type(acc), **options)
    return plain, right


def _some(bias: np.ndarray, rows: slice) -> np.ndarray:
    return bias if bias.shape[-2] == 1 else bias[..., rows, :]


def _panels(q_len: int) -> Iterator[slice]:
    if q_len <= 3 * CHECKED:
        yield slice(0, q_len)
        return
    for start in (0, (q_len - CHECKED) // 2, q_len - CHECKED):
        yield slice(start, start + CHECKED)
