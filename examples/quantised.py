"""What quantised keys and values cost: the errors of attention over them, on real vectors and on random ones.

    python examples/quantised.py FOLDER [PAGE.md]     FOLDER holds q.npy, k.npy and v.npy of a model

`examples/minilm/vectors.py` writes such a folder. Prints a table, or puts it between the markers of a page. Errors are
of outputs, against attention in double precision over the numbers as they were; random vectors are normal and have the
shape of the real ones. The fact to know: an output is an average of values, so errors of values shrink in it, while
errors of keys move its weights.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

import tilefold as tf

KEYS, QUERIES = 4096, 256  # the last queries over these keys
BEGIN, END = "<!-- made by examples/quantised.py -->", "<!-- /made -->"
WAYS = {
    "float16": None,
    "bfloat16": None,
    "int8": ("int8", None),
    "float8_e4m3fn": ("float8_e4m3fn", None),
    "int4, groups of 16": ("int4", 16),
    "int4": ("int4", None),
}


def cache_of(way, heads, dim, rows):
    """An empty cache that keeps rows in one way."""
    kind, group = WAYS[way]
    return tf.KVCache(1, heads, dim, capacity=rows, quantised=kind, group=group)


def attended(q, k, v, way):
    """Attention over keys and values that are stored in one way."""
    if WAYS[way] is None:
        narrow = np.dtype(getattr(ml_dtypes, way, way))
        return tf.attention(q, k.astype(narrow).astype(q.dtype), v.astype(narrow).astype(q.dtype))
    cache = cache_of(way, len(k), k.shape[-1], k.shape[1])
    cache.append(k[None], v[None])
    return tf.attention(q[None], cache)[0]


def bits(way, dim):
    """Of one number, its share of a scale included."""
    if WAYS[way] is None:
        return 16
    return 8 * cache_of(way, 1, dim, 1).nbytes / (2 * dim)


def errors(q, k, v, way):
    """The root of the mean square of all errors, and the worst of them, as shares of the same of the outputs."""
    exact = tf.attention(*(x.astype(np.float64) for x in (q, k, v)))
    off = np.abs(attended(q, k, v, way).astype(np.float64) - exact)
    return np.sqrt((off**2).mean() / (exact**2).mean()), off.max() / np.abs(exact).max()


def table(real) -> Iterator[str]:
    q, k, v = (np.asarray(x, np.float32)[:, :KEYS] for x in real)
    rng = np.random.default_rng(0)
    sets = {"real": (q, k, v), "random": [rng.standard_normal(x.shape, np.float32) for x in (q, k, v)]}
    yield "| stored as | bits a number | " + " | ".join(f"{name}, mean | worst" for name in sets) + " |"
    yield "|---" * (2 + 2 * len(sets)) + "|"
    for way in WAYS:
        found = [x for q, k, v in sets.values() for x in errors(q[:, -QUERIES:], k, v, way)]
        yield (
            f"| {way} | {bits(way, k.shape[-1]):g} | " + " | ".join(f"{100 * x:.2g} %" for x in found) + " |"
        )


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("page", type=Path, nargs="?")
    args = options.parse_args()
    text = "\n".join(table([np.load(args.folder / f"{name}.npy") for name in "qkv"]))
    if args.page is None:
        print(text)
        return
    page = args.page.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{args.page} must hold {BEGIN} and {END} once each.")
    args.page.write_text(re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
