"""What flash-attn's functions should give, row by row in plain loops: written from its documents, not from tilefold.

One sequence at a time, (length, heads, dim), so that batches, packed sequences and caches are all the same question.
How wrong an answer may be is found out by asking again with rounding: see `budgets`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from budgets import judge, nudged, reference_type, rounds_weights

from tilefold.dtypes import ROWS

Arrays = dict[str, np.ndarray]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class Arithmetic:
    """In which arithmetic a question is answered."""

    dtype: np.dtype
    moved: str = ""  # the type by one rounding of which inputs are moved
    weights: str | None = None  # the type that weights are rounded to
    saved: dict[str, torch.Tensor] = field(default_factory=dict)  # results that a backward pass starts from
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def array(self, x: torch.Tensor) -> np.ndarray:
        exact = x.detach().double().numpy()
        return (nudged(exact, self.moved, self.rng) if self.moved else exact).astype(self.dtype)

    def rounded(self, p: np.ndarray) -> np.ndarray:
        if self.weights is None:
            return p
        return torch.from_numpy(p).to(getattr(torch, self.weights)).to(torch.float64).numpy().astype(p.dtype)


def near(got: dict[str, torch.Tensor], expected: Callable[[Arithmetic], Arrays], dtype: torch.dtype) -> None:
    """Fails unless each result is as near to the exact one as an honest evaluation is."""
    acc = ROWS[name_of(dtype)].accumulate
    wide, narrow = reference_type(acc), rounds_weights(name_of(dtype))
    right = expected(Arithmetic(wide))
    plain = expected(Arithmetic(np.dtype(acc), saved=got))
    moved = expected(Arithmetic(wide, moved=acc, saved=got))
    rounded = expected(Arithmetic(np.dtype(acc), weights=narrow)) if narrow else {}
    assert set(got) == set(right)
    for name, x in got.items():
        assert tuple(x.shape) == right[name].shape, name
        mine = x.detach().double().numpy()
        error = judge(
            name, mine, (plain[name], moved[name]), right[name], name_of(x.dtype), rounded.get(name)
            if name == "out" else None,
        )  # fmt: skip
        assert error.ok, str(error)


def by_position(q_len: int, k_len: int, left: int | None, right: int | None, chunk: int = 0) -> np.ndarray:
    """Which keys each query sees: limits on the distance to its own position, None for none; queries stand last."""
    sees = np.zeros((q_len, k_len), bool)
    for i in range(q_len):
        at = i + k_len - q_len
        for j in range(k_len):
            inside = (left is None or j >= at - left) and (right is None or j <= at + right)
            sees[i, j] = inside and (not chunk or j // chunk == at // chunk)
    return sees


def signed(causal: bool, window: tuple[int, int]) -> tuple[int | None, int | None]:
    """Limits of versions 2 and 3: negative is infinite, causal ends at the diagonal."""
    left, right = (None if x < 0 else x for x in window)
    return left, 0 if causal else right


def slanted(slopes: np.ndarray, q_len: int, k_len: int, causal: bool) -> np.ndarray:
    """ALiBi (heads, q_len, k_len) as version 2's kernels add it: by column if the call is causal."""
    i, j = np.arange(q_len)[:, None], np.arange(k_len)
    distance = -np.abs(i + k_len - q_len - j) if not causal else np.broadcast_to(j, (q_len, k_len))
    return slopes[:, None, None] * distance


def sequence(
    a: Arithmetic, q: np.ndarray, k: np.ndarray, v: np.ndarray, sees: np.ndarray, *,
    scale: float | None = None, softcap: float = 0.0, added: np.ndarray | None = None,
    sink: np.ndarray | None = None, empty: float = -np.inf, dout: np.ndarray | None = None,
    dlse: np.ndarray | None = None, out: np.ndarray | None = None, lse: np.ndarray | None = None,
) -> Arrays:  # fmt: skip
    """Attention of one sequence; with `dout` its gradients too. `empty` is the lse of a row that sees no key; `out`
    and `lse` are results that a backward pass starts from, as one does that keeps no weights."""
    (q_len, heads, dim), kv_heads = q.shape, k.shape[1]
    scale = np.dtype(a.dtype).type(dim**-0.5 if scale is None else scale)
    r = {"out": np.zeros((q_len, heads, v.shape[-1]), a.dtype), "lse": np.zeros((heads, q_len), a.dtype)}
    if dout is not None:
        r |= {"dq": np.zeros_like(q), "dk": np.zeros_like(k), "dv": np.zeros_like(v)}
        if sink is not None:
            r["dsink"] = np.zeros_like(sink)
    for h, i in np.ndindex(heads, q_len):
        g, keys = h // (heads // kv_heads), sees[i]
        kk, vv = k[keys, g], v[keys, g]
        s = kk @ q[i, h] * scale
        slope = np.ones_like(s)
        if softcap > 0:
            capped = np.tanh(s / softcap)
            s, slope = softcap * capped, 1 - capped**2
        if added is not None:
            s = s + added[h, i, keys].astype(a.dtype)
        logits = s if sink is None else np.append(s, sink[h])
        if not len(logits):
            r["lse"][h, i] = empty
            continue
        most = logits.max()
        total = np.exp(logits - most).sum()
        r["lse"][h, i] = most + np.log(total)
        p = np.exp(s - most) / total
        r["out"][i, h] = a.rounded(p) @ vv
        if dout is None:
            continue
        mine = r["out"] if out is None else out
        reach = 0 if dlse is None else dlse[h, i]
        if lse is not None:
            p = np.exp(s - lse[h, i])
        delta = dout[i, h] @ mine[i, h] - reach
        ds = p * (vv @ dout[i, h] - delta) * slope * scale
        r["dq"][i, h] = ds @ kk
        r["dk"][keys, g] += ds[:, None] * q[i, h]
        r["dv"][keys, g] += p[:, None] * dout[i, h]
        if sink is not None:
            r["dsink"][h] -= np.exp(sink[h] - most) / total * delta
    return r
