"""How: a backend, a tile, a number of bytes. A plan is a value: printable, comparable, cached by its problem.

Decoding is no operation of its own, only a plan with a small `q_len`. `workspace_bytes` is what the backend predicts;
the workspace counts what it hands out, and the two must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .masks import integer
from .problem import Operands, Problem

if TYPE_CHECKING:
    from .replay import Grads
    from .taps import Tapped


MOST = 2**31  # of any number in a plan: more rows than a tile can have, and few enough to be multiplied


class BackendRefused(ValueError):
    """The backend that was asked for, or every one of them, cannot do this problem; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which backend folds `problem`, in which tiles, within how many bytes beyond inputs and output."""

    problem: Problem
    backend: str
    isa: str
    block_q: int
    block_k: int
    splits: int = 1
    workers: int = 1
    workspace_bytes: int = 0
    note: str = ""


class Backend(Protocol):
    """How a machine folds."""

    name: str

    def why_not(self, p: Problem) -> str | None:
        """None if this backend can do `p`, else one sentence a user understands."""

    def plan(self, p: Problem, threads: int) -> Plan:
        """How to fold `p` with at most so many threads."""

    def resize(self, plan: Plan, block_q: int, block_k: int) -> Plan:
        """The same plan with tiles of another size."""

    def fold(self, plan: Plan, x: Operands, rows: slice | None = None) -> int:
        """Sweep one: fill ``x.out`` and ``x.lse``, only for the query rows `rows` if given; the bytes it allocated. Of
        ``x.taps`` those over rows may be filled on the way."""

    def replay(self, plan: Plan, x: Operands, taps: Sequence[Tapped]) -> int:
        """Sweep two over ``x.lse``: fill `taps`; the bytes it allocated."""

    def gradient(self, plan: Plan, x: Operands, dout: np.ndarray, dlse: np.ndarray | None) -> Grads:
        """Sweep two with the backward pass as its tap."""


def choose(p: Problem, backend: str = "auto") -> tuple[Plan, tuple[tuple[str, str], ...]]:
    """The plan, and each backend passed over with its reason. An explicit backend never falls back."""
    from .threads import get_num_threads

    return _choose(p, backend, get_num_threads())


@lru_cache(maxsize=1024)
def _choose(p: Problem, backend: str, threads: int) -> tuple[Plan, tuple[tuple[str, str], ...]]:
    from .backends import BACKENDS

    if backend != "auto":
        by_name = {b.name: b for b in BACKENDS}
        if backend not in by_name:
            raise ValueError(f"backend must be 'auto', {', '.join(map(repr, by_name))}; got {backend!r}")
        if (why := by_name[backend].why_not(p)) is not None:
            raise BackendRefused(f"backend {backend!r} refuses: {why}")
        return by_name[backend].plan(p, threads), ()
    refusals: list[tuple[str, str]] = []
    for candidate in BACKENDS:
        if (why := candidate.why_not(p)) is None:
            return candidate.plan(p, threads), tuple(refusals)
        refusals.append((candidate.name, why))
    raise BackendRefused("no backend can do this: " + "; ".join(f"{name}: {why}" for name, why in refusals))


def pinned(plan: Plan, p: Problem) -> Plan:
    """A plan that the caller passed back, after checking that it is for this problem."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a tilefold Plan, got {type(plan).__name__}")
    free = replace(p, want=plan.problem.want)
    if plan.problem != free:
        raise ValueError(f"plan was made for another problem: it is for '{plan.problem}', the call is '{p}'")
    block_q, block_k, splits, workers = (
        min(integer(f"plan: {name}", getattr(plan, name), 1), MOST)
        for name in ("block_q", "block_k", "splits", "workers")
    )
    if (why := backend_of(plan).why_not(p)) is not None:
        raise BackendRefused(f"plan is for the backend {plan.backend!r}, which refuses: {why}")
    return replace(plan, problem=p, block_q=block_q, block_k=block_k, splits=splits, workers=workers)


def backend_of(plan: Plan) -> Backend:
    from .backends import BACKENDS

    for backend in BACKENDS:
        if backend.name == plan.backend:
            return backend
    raise ValueError(f"plan is for the backend {plan.backend!r}, which does not exist")
