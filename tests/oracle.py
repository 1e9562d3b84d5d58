"""What a case string should give forward, computed once however many backends and machines are held against it."""

from functools import lru_cache

import numpy as np
from budgets import Error, judge, reference_type, rounds_weights

from tilefold.bench.case import Case
from tilefold.dtypes import ROWS
from tilefold.naive import naive

Results = tuple[np.ndarray, np.ndarray]


@lru_cache(maxsize=256)  # the zoo fits
def expected(text: str) -> tuple[Results, Results, list[Results], Results | tuple[None, None]]:
    """(out, lse) in a type wider than the accumulator; then the honest evaluations that set the budget, the last with
    weights rounded where kernels may."""
    case = Case.parse(text)
    acc = ROWS[case.dtype].accumulate
    a, wide = case.build(), reference_type(acc)
    right = naive(a.q, a.k, a.v, **a.options, dtype=wide)
    narrow = rounds_weights(case.dtype)
    return (
        right,
        naive(a.q, a.k, a.v, **a.options, dtype=acc),
        [naive(b.q, b.k, b.v, **b.options, dtype=wide) for b in a.moved(acc, right[1].size)],
        (naive(a.q, a.k, a.v, **a.options, dtype=acc, weights_dtype=narrow)[0], None)
        if narrow
        else (None, None),
    )


def judged(text: str, out: np.ndarray, lse: np.ndarray) -> list[Error]:
    """The errors of a forward result, each with its budget, by the rule of `Case.replay`."""
    dtype = Case.parse(text).dtype
    right, plain, moved, rounded = expected(text)
    return [
        judge(name, got, [x[i] for x in (plain, *moved)], right[i], to, rounded[i])
        for i, (name, got, to) in enumerate((("out", out, dtype), ("lse", lse, ROWS[dtype].accumulate)))
    ]


def complaint(text: str, errors: list[Error]) -> str:
    """What to say of a case that is wrong; empty where it is right."""
    if all(e.ok for e in errors):
        return ""
    return "\n".join([f'tilefold case "{text}"', *map(str, errors)])
