"""The named sets of `tilefold bench --set`: which shapes, and in which types. A new row of the benchmark goes here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Set:
    """Shapes, each measured in each type. Where there is but one type, its rows do not name it.

    `peers` are those that the set is about, if not all.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[str, ...]
    peers: str | None = None


DEFAULT = (
    "h1,n512,d64",
    "h1,n512,d64,causal",
    "h8,n512,d64,causal",
    "h8,n2048,d64",
    "h8,n2048,d64,causal",
    "h8,n2048,d128,causal",
    "h1,n4096,d64",
    "h1,n4096,d64,causal",
    "h1,n4096,d128",
    "h2,n4096,d64,causal,window=255,0",
    "h32/8,q1,k4096,d128",
)

FORWARD = (
    *(
        f"h{heads},n{n},d{dim}{mask}"
        for n, heads in ((512, 8), (2048, 4), (8192, 2))
        for dim in (64, 128)
        for mask in ("", ",causal")
    ),
    "h4,n2048,d64,bias=1hqk",
    "h2,n8192,d128,causal,window=1023,0",
)

GRAD = (
    *(
        f"h{heads},n{n},d{dim}{mask},grad"
        for n, heads in ((2048, 4), (8192, 1))
        for dim in (64, 128)
        for mask in ("", ",causal")
    ),
    "h8/2,n8192,d128,causal,window=1023,0,grad",
)

SMALL = tuple(f"h8,n{n},d64{mask}" for n in (16, 32, 64, 128, 256) for mask in ("", ",causal"))

TORCH = tuple(
    f"h{heads},n{n},d64{words}"
    for n, heads in ((64, 8), (1024, 4), (2048, 4))
    for words in ("", ",causal", ",grad", ",causal,grad")
)

SETS = {
    "default": Set(("float32",), DEFAULT),
    "forward": Set(("float32", "bfloat16", "float16", "float64"), FORWARD),
    "grad": Set(("float32", "bfloat16", "float16", "float64"), GRAD),
    "decode": Set(
        ("float32", "bfloat16", "float16"),
        tuple(f"h32/8,q1,k{keys},d128" for keys in (4096, 8192, 16384, 32768)),
    ),
    "small": Set(("float32", "bfloat16"), SMALL),
    "torch": Set(("float32", "bfloat16"), TORCH, peers="tilefold,torch,drop-in"),
}
ALL = ("forward", "grad", "decode", "small")  # what `all` stands for


def rows(chosen: str, dtype: str | None = None) -> Iterator[str]:
    """The shapes of a set as text, in their types or in the one that is asked for.

    >>> next(rows("small")), next(rows("small", "float16"))
    ('float32,h8,n16,d64', 'h8,n16,d64')
    """
    if chosen not in (*SETS, "all"):
        raise ValueError(f"--set must be {', '.join(SETS)} or all, got {chosen!r}")
    for name in ALL if chosen == "all" else (chosen,):
        types = SETS[name].dtypes if dtype is None else (dtype,)
        for each in types:
            for shape in SETS[name].shapes:
                yield shape if len(types) == 1 else f"{each},{shape}"
