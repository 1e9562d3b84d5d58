"""A case: one line of text that makes a problem with its arrays, so that any failure can be replayed by its line.

`float32 b2 h8/2 q130 k130 d64 causal softcap=20 seed=7` is 2 batch items, 8 query heads on 2 key heads, 130 queries and
keys of dimension 64. Words may come in any order. Tests, benchmarks, `tilefold verify` and bug reports all speak it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import masks
from ..api import attention, attention_grad
from ..call import Options, understand
from ..dtypes import ROWS
from ..naive import naive, naive_grad, naive_weights
from ..replay import Grads
from .budgets import FEW, Error, coarser, judge, nudged, reference_type, rounds_weights

WORDS = """\
float32 | float64 | float16 | bfloat16       type of q, k, v
b2, b2x3                                     leading dimensions; none: (heads, length, dim); 2d: (length, dim)
h8, h8/2                                     query heads / key heads
q130 k130 d64 v32                            queries, keys, dim, value dim
causal, causal=top-left                      masks, combined by &
window=40,0  band=3,2,-5  prefix=21  chunked=16  anchors=4,9
documents=11,30,12  dense=0.5  predicate=3   sizes; share of visible cells; (i + 2 j) mod 3 != 0
tree=2                                       queries as a tree, so many follow from each
q_lengths=5,130  kv_lengths=7,130            lengths of padded sequences
packed=3,0,9/5,2,7                           packed sequences: query sizes / key sizes
scale=0.3 softcap=20 sinks alibi alibi=b     score options; alibi=b: slopes per batch item
bias=bhqk, bias=1h1k                         bias of that shape, 1 where it broadcasts
hide=0.3                                     share of bias cells that are -inf
logits=peaked | rising | falling | huge      how scores are distributed
order=bshd | fortran | reversed | strided    memory order of q, k, v
nan                                          NaN and inf in every key and value that nobody sees
seed=7"""


@dataclass(slots=True)
class Built:
    """The arrays of a case and the options of its call."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]
    dout: np.ndarray
    dlse: np.ndarray

    def moved(self, acc_dtype: str, numbers: int) -> list[Built]:
        """With every input moved by one rounding: more than once where a result is so few numbers."""
        return [self.nudged(acc_dtype, seed) for seed in range(FEW if numbers < FEW else 1)]

    def nudged(self, acc_dtype: str, seed: int = 0) -> Built:
        """The same with every number moved by up to one rounding of the accumulate type."""
        rng = np.random.default_rng(seed)
        q, k, v, dout, dlse = (
            nudged(x, acc_dtype, rng) for x in (self.q, self.k, self.v, self.dout, self.dlse)
        )
        options = {
            name: nudged(x, acc_dtype, rng) if name in ("bias", "sinks", "alibi") else x
            for name, x in self.options.items()
        }
        return Built(q, k, v, options, dout, dlse)


@dataclass(slots=True)
class Report:
    """What a replay found."""

    text: str
    errors: list[Error] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.errors)

    @property
    def lines(self) -> list[str]:
        return [str(e) for e in self.errors]


@dataclass(frozen=True, slots=True)
class Case:
    """A parsed case: sizes by letter, everything else by word."""

    text: str
    dtype: str
    lead: tuple[int, ...] | None  # None is 2-D
    heads: int
    kv_heads: int
    size: dict[str, int]
    words: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read a case string; ValueError names the word that is not understood."""
        dtype, heads, kv_heads, flat = "float32", 1, 1, False
        lead: tuple[int, ...] = ()
        size = {"q": 0, "k": 0, "d": 8, "v": -1}
        words: dict[str, str] = {}
        for word in text.split():
            if word in ROWS:
                dtype = word
            elif m := re.fullmatch(r"b(\d+(?:x\d+)*)", word):
                lead = tuple(int(n) for n in m[1].split("x"))
            elif m := re.fullmatch(r"h(\d+)(?:/(\d+))?", word):
                heads, kv_heads = int(m[1]), int(m[2] or m[1])
            elif m := re.fullmatch(r"([qkdv])(\d+)", word):
                size[m[1]] = int(m[2])
            elif word == "2d":
                flat = True
            elif (name := word.partition("=")[0]) in KNOWN:
                words[name] = word.partition("=")[2]
            else:
                raise ValueError(f"case: {word!r} is not a word of a case; the words are\n{WORDS}")
        if "packed" in words:
            q_sizes, k_sizes = _packed(words["packed"])
            size["q"], size["k"] = sum(q_sizes), sum(k_sizes)
        if size["v"] < 0:
            size["v"] = size["d"]
        return cls(text, dtype, None if flat else lead, heads, kv_heads, size, words)

    def build(self) -> Built:
        """Make the arrays. The same text makes the same arrays, on any machine."""
        rng = np.random.default_rng(int(self.words.get("seed", "0")))
        lead, n = self.lead or (), self.size
        q = rng.standard_normal((*lead, self.heads, n["q"], n["d"]))
        k = rng.standard_normal((*lead, self.kv_heads, n["k"], n["d"]))
        v = rng.standard_normal((*lead, self.kv_heads, n["k"], n["v"]))
        self._shape_logits(q, k)
        options = self._options(rng, lead)
        dtype, order = _numpy(self.dtype), self.words.get("order", "")
        if "nan" in self.words:
            self._poison(q, k, v, options)
        q, k, v = (_ordered(x.astype(dtype), order) for x in (q, k, v))
        dout = rng.standard_normal((*q.shape[:-1], n["v"])).astype(dtype)
        dlse = rng.standard_normal(q.shape[:-1]).astype(ROWS[self.dtype].accumulate)
        if self.lead is None:
            q, k, v, dout, dlse = q[0], k[0], v[0], dout[0], dlse[0]
        return Built(q, k, v, options, dout, dlse)

    def _shape_logits(self, q: np.ndarray, k: np.ndarray) -> None:
        kind = self.words.get("logits", "")
        ramp = np.linspace(-1, 1, k.shape[-2])[:, None]
        if kind == "peaked":
            q *= 8
        elif kind in ("rising", "falling"):
            q[...] = np.abs(q)
            k += (30 if kind == "rising" else -30) * ramp
        elif kind == "huge":
            q *= 1e15 if self.dtype in ("float32", "float64", "bfloat16") else 100
            k *= 1e15 if self.dtype in ("float32", "float64", "bfloat16") else 100
        elif kind:
            raise ValueError(f"case: logits must be peaked, rising, falling or huge, got {kind!r}")

    def _options(self, rng: np.random.Generator, lead: tuple[int, ...]) -> dict[str, Any]:
        w, n = self.words, self.size
        options: dict[str, Any] = {"mask": self._mask(rng, lead)}
        if w.get("causal") == "":
            options["causal"] = True
        for name in ("scale", "softcap"):
            if name in w:
                options[name] = float(w[name])
        for name in ("q_lengths", "kv_lengths"):
            if name in w:
                options[name] = np.array(_ints(w[name])).reshape(lead)
        if "packed" in w:
            q_sizes, k_sizes = _packed(w["packed"])
            options["cu_seqlens_q"] = np.cumsum([0, *q_sizes], dtype=np.int32)
            options["cu_seqlens_k"] = np.cumsum([0, *k_sizes], dtype=np.int64)
        if "sinks" in w:
            options["sinks"] = rng.standard_normal(self.heads)
        if "alibi" in w:
            options["alibi"] = rng.random((*lead, self.heads) if w["alibi"] == "b" else self.heads) / 8
        if "bias" in w:
            b, h, s, t = list(w["bias"])
            full = {"h": self.heads, "q": n["q"], "k": n["k"], "1": 1}
            shape = (lead if b == "b" else (1,) * len(lead)) + tuple(full[x] for x in (h, s, t))
            bias = rng.standard_normal(shape)
            bias[rng.random(shape) < float(w.get("hide", "0"))] = -np.inf
            options["bias"] = bias.astype(ROWS[self.dtype].accumulate)
        return options

    def _mask(self, rng: np.random.Generator, lead: tuple[int, ...]) -> masks.Mask | None:
        w, n = self.words, self.size
        parts = []
        if w.get("causal") == "top-left":
            parts.append(masks.causal(align="top-left"))
        if "window" in w:
            left, right = _limits(w["window"])
            parts.append(masks.window(left, right))
        if "band" in w:
            left, right, offset = _limits(w["band"])
            parts.append(masks.band(left, right, "bottom-right" if offset is None else offset))
        if "prefix" in w:
            parts.append(masks.prefix(int(w["prefix"])))
        if "chunked" in w:
            parts.append(masks.chunked(int(w["chunked"])))
        if "anchors" in w:
            parts.append(masks.anchors(*_ints(w["anchors"])))
        if "documents" in w:
            parts.append(masks.documents(cu_seqlens=np.cumsum([0, *_ints(w["documents"])])))
        if "tree" in w:
            parts.append(masks.tree([(i - 1) // int(w["tree"]) for i in range(n["q"])]))
        if "dense" in w:
            parts.append(masks.dense(rng.random((*lead, self.heads, n["q"], n["k"])) < float(w["dense"])))
        if "predicate" in w:
            modulus = int(w["predicate"])
            parts.append(masks.from_predicate(lambda i, j: (i + 2 * j) % modulus != 0))
        whole: masks.Mask | None = None
        for part in parts:
            whole = part if whole is None else whole & part
        return whole

    def _poison(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, options: dict[str, Any]) -> None:
        """Put NaN and inf into every key and value row that no query of any head sees."""
        seen = np.asarray(naive_weights(np.zeros_like(q), np.zeros_like(k), **options) > 0)
        by_key_head = (*seen.shape[:-3], self.kv_heads, self.heads // self.kv_heads, self.size["k"])
        anyone = np.asarray(seen.any(axis=-2)).reshape(by_key_head).any(axis=-2)
        k[~anyone] = np.nan
        v[~anyone] = np.inf

    def replay(self, backend: str = "auto", gradients: bool = True) -> Report:
        """Run the case forward, and backward unless told otherwise, against the oracle."""
        a, report = self.build(), Report(self.text)
        acc = ROWS[self.dtype].accumulate
        wide = reference_type(acc)
        out, lse = attention(a.q, a.k, a.v, **a.options, return_lse=True, backend=backend)
        right = naive(a.q, a.k, a.v, **a.options, dtype=wide)
        plain = naive(a.q, a.k, a.v, **a.options, dtype=acc)
        moved = [naive(b.q, b.k, b.v, **b.options, dtype=wide) for b in a.moved(acc, lse.size)]
        narrow = rounds_weights(self.dtype)
        rounded = naive(a.q, a.k, a.v, **a.options, dtype=acc, weights_dtype=narrow) if narrow else None
        for i, (name, mine, dtype) in enumerate((("out", out, self.dtype), ("lse", lse, acc))):
            weights = rounded[0] if rounded is not None and name == "out" else None
            report.errors.append(judge(name, mine, [x[i] for x in (plain, *moved)], right[i], dtype, weights))
        if not gradients:
            return report
        got = attention_grad(a.q, a.k, a.v, out, lse, a.dout, a.dlse, **a.options, backend=backend)
        report.errors += self.judge_gradients(a, got, (out, lse))
        return report

    def judge_gradients(self, a: Built, got: Grads, saved: tuple[np.ndarray, np.ndarray]) -> list[Error]:
        """The errors of gradients that come from ``saved = (out, lse)``, each with its budget."""
        acc = ROWS[self.dtype].accumulate
        wide = reference_type(acc)
        right = naive_grad(a.q, a.k, a.v, a.dout, a.dlse, **a.options, dtype=wide)
        honest = [naive_grad(a.q, a.k, a.v, a.dout, a.dlse, **a.options, dtype=acc, saved=saved)]
        for b in a.moved(acc, min(g.size for g in right if g is not None)):
            honest.append(naive_grad(b.q, b.k, b.v, b.dout, b.dlse, **b.options, dtype=wide))
            # Few rows may all be sure of one key. Then a gradient is the difference of two sums that are one, and how
            # exact it can be shows beside what was saved.
            if saved[1].size < FEW:
                honest.append(naive_grad(b.q, b.k, b.v, b.dout, b.dlse, **b.options, dtype=wide, saved=saved))
        errors = []
        for n, (name, mine, expected) in enumerate(zip(got._fields, got, right, strict=True)):
            if mine is not None and expected is not None:
                others = [x for h in honest if (x := h[n]) is not None]
                errors.append(judge(name, mine, others, expected, coarser(mine.dtype.name, acc)))
        return errors

    def describe(self) -> str:
        """The problem as the library sees it."""
        a = self.build()
        return str(understand(a.q, a.k, a.v, Options(**a.options)).problem)


KNOWN = frozenset(
    {"causal", "window", "band", "prefix", "chunked", "anchors", "documents", "dense", "predicate", "tree"}
    | {"q_lengths", "kv_lengths", "packed", "scale", "softcap", "sinks", "alibi", "bias", "hide"}
    | {"logits", "order", "nan", "seed"}
)


def replay(text: str) -> Report:
    """Replay a case string: ``.ok``, and ``.lines`` with each error and its budget.

    >>> replay("float64 h2/1 q9 k13 d4 causal seed=3").ok
    True
    """
    return Case.parse(text).replay()


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _limits(text: str) -> list[int | None]:
    return [None if x == "-" else int(x) for x in text.split(",")]


def _packed(text: str) -> tuple[list[int], list[int]]:
    q, _, k = text.partition("/")
    return _ints(q), _ints(k)


def _numpy(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  (registers the name)

        return np.dtype(name)
    return np.dtype(name)


def _ordered(x: np.ndarray, order: str) -> np.ndarray:
    """The same values in another memory order."""
    if order == "bshd" and x.ndim > 2:
        return np.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)
    if order == "fortran":
        return np.asfortranarray(x)
    if order == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if order == "strided":
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if order not in ("", "bshd"):
        raise ValueError(f"case: order must be bshd, fortran, reversed or strided, got {order!r}")
    return x
