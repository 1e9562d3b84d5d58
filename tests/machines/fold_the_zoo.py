"""Fold every case in this process and write down what came out; run once per machine.

Arrays end right before a page that nobody may touch, so that reading or writing beyond one ends the process; each case
is named before it is folded, so that the last name is the culprit's. What is to be filled is full of NaN.
"""

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases import FORWARD, ZOO

import tilefold as tf
from tilefold.bench.case import Case


def fenced(x: np.ndarray) -> np.ndarray:
    """A copy of `x` in the same memory order whose last byte is the last one of its page, with a fence behind it.

    An array with gaps between its elements is returned as it is.
    """
    flips = tuple(slice(None, None, -1 if step < 0 else 1) for step in x.strides)
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    base = x[flips].transpose(order)
    if not x.nbytes or not base.flags.c_contiguous:
        return x
    page = mmap.PAGESIZE
    room = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    moved = np.frombuffer(memory, np.uint8, x.nbytes, room - x.nbytes).view(x.dtype).reshape(base.shape)
    moved[...] = base
    return moved.transpose(np.argsort(order))[flips]


def poisoned(*args: object, **kwargs: object) -> np.ndarray:
    x = empty(*args, **kwargs)
    x[...] = np.nan if x.dtype.kind not in "biu" else 1
    return x


def fold(text: str) -> tuple[str, np.ndarray, np.ndarray]:
    """(machine, out, lse) of a case."""
    a = Case.parse(text).build()
    fence = fenced if sys.platform.startswith(("linux", "darwin")) else np.copy
    q, k, v = (fence(x) for x in (a.q, a.k, a.v))
    options = a.options
    if "bias" in options:
        options["bias"] = fence(options["bias"])
    out = fence(np.full_like(a.dout, np.nan))
    isa = tf.explain(q, k, v, **options, backend="native").plan.isa
    _, lse = tf.attention(q, k, v, **options, out=out, return_lse=True, backend="native")
    return isa, out, lse


if __name__ == "__main__":
    empty, np.empty = np.empty, poisoned
    results = {}
    for n, text in enumerate([*ZOO, *FORWARD]):
        print(text, flush=True)
        isa, out, lse = fold(text)
        results |= {f"isa{n}": np.array(isa), f"out{n}": out.astype(np.float64), f"lse{n}": lse}
    np.savez(sys.argv[1], **results)
