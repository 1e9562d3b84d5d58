"""What a model of transformers gives for a layer's attention weights, which are never formed: statistics, pieces.

It decides what is found at once and what is kept. Statistics that were chosen are found beside the call, where somebody
collects them. Beside them a summary keeps, by reference, whatever takes less memory: the layer's queries and keys, or,
as in decoding, the weights. The fact to know: keys that lie in a static cache are written over by later steps, and a
summary that is asked too late says so instead of answering from them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .. import api
from ..probes import block, entropy, heatmap, key_mass, topk
from ..probes.statistic import Seen, Statistic, TopK, check
from ..taps import Cells, Entropy, Top

LIMIT = 2**28  # bytes of weights that nobody asks for by mistake
TOP = 8  # keys of each row that are listed
MAP = 64  # bins a side
AXES = ("batch", "heads", "queries", "keys")

Tensor = Any


@dataclass(frozen=True, slots=True)
class Choice:
    """What summaries find at once, None for the four that every summary has; and whether they keep anything."""

    statistics: tuple[Any, ...] | None = None
    keep: bool = True


_default = Choice()
_chosen: ContextVar[Choice | None] = ContextVar("tilefold_summaries", default=None)


def choose(statistics: Sequence[Any] | None, keep: bool) -> None:
    """For the whole process, where no `summaries` is open."""
    global _default
    _default = _choice(statistics, keep)


def chosen() -> Choice:
    """What holds here."""
    return _chosen.get() or _default


@contextmanager
def summaries(*statistics: Any, keep: bool = True) -> Iterator[None]:
    """A block in which ``output_attentions=True`` finds these statistics of each layer, and no others.

    Args:
        statistics: as of `tilefold.probe`; each becomes an attribute of the summary by its name. Without any, the four
            that every summary has.
        keep: whether a summary keeps what it needs to answer more: `to_dense`, pieces, other statistics. Without,
            a summary of a step in `generate` takes a few numbers per head.

    >>> import tilefold as tf
    >>> with summaries(tf.entropy(), tf.key_mass(last=1).named("newest"), keep=False):
    ...     pass  # model(ids, output_attentions=True).attentions[0].newest
    """
    token = _chosen.set(_choice(statistics or None, keep))
    try:
        yield
    finally:
        _chosen.reset(token)


def _choice(statistics: Sequence[Any] | None, keep: bool) -> Choice:
    if not isinstance(keep, bool):
        raise TypeError(f"summaries: keep must be True or False, got {type(keep).__name__}")
    if statistics is None:
        return Choice(None, keep)
    found = check(statistics, "summaries: statistics")
    for s in found:
        if s.name.startswith("_") or s.name in _NAMES:
            raise ValueError(f"summaries: a statistic cannot be called {s.name!r}; .named(...) gives another")
    return Choice(found, keep)


def _usual(shape: tuple[int, ...]) -> dict[str, Statistic]:
    """The four that every summary has."""
    rows, cols = (max(1, min(MAP, n)) for n in shape[2:])
    four = entropy(), topk(max(1, min(TOP, shape[3]))), key_mass(), heatmap(rows, cols).named("map")
    return {s.name: s for s in four}


class Asked:
    """A layer's call: its queries and keys, by reference, and the options under which `probe` answers for it.

    `share` is what a sink of each query's own left to its keys, (batch, heads, q_len), which `probe` does not know.
    """

    def __init__(
        self, q: Tensor, k: Tensor, options: Callable[[], dict[str, Any]], share: Tensor | None = None
    ) -> None:
        self.q, self.k, self.options = q.detach(), k.detach(), options
        self.share = None if share is None else share.detach()
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        """How often each was written to, as far as torch counts."""
        return [x._version for x in (self.q, self.k) if not x.is_inference()]

    def secure(self) -> None:
        """Copy what torch does not count the changes of."""
        self.q, self.k = (x.clone() if x.is_inference() else x for x in (self.q, self.k))

    @property
    def nbytes(self) -> int:
        return int(self.q.nbytes + self.k.nbytes)

    def probe(self, statistics: Sequence[Any]) -> dict[str, Any]:
        """What the statistics find, by name."""
        if self.versions != self._versions():
            raise RuntimeError(
                "this layer's queries or keys were written over since it was called, as a static cache does; "
                "statistics that summaries(...) names are found at once, and a dynamic cache writes over nothing"
            )
        with torch.no_grad():
            found = vars(api.probe(self.q, self.k, *statistics, **self.options()))
        if self.share is not None:
            found = {s.name: _shared(s, found[s.name], self.share) for s in statistics}
        return found


def _shared(s: Any, found: Any, share: Tensor) -> Any:
    """What a statistic found of weights that sum to 1, where they sum to `share`."""
    tap = s.taps[0] if isinstance(s, Statistic) and s.heads == "each" else None
    if isinstance(tap, Cells) and tap.ranged:
        return found * share[:, :, slice(*tap.asked), None]
    if isinstance(tap, Top):
        return TopK(found.weights * share[..., None], found.keys)
    if isinstance(tap, Entropy) and s.name == "entropy":
        rest = 1 - share
        return share * found - torch.xlogy(share, share) - torch.xlogy(rest, rest)
    raise NotImplementedError(
        f"{s.name}: where each query has a sink of its own, entropy, topk and weights are offered"
    )


class AttentionSummary:
    """What ``output_attentions=True`` gives for a layer in place of its weights ``(batch, heads, q_len, kv_len)``.

    Attributes, whose numbers are in the type that scores are summed in:
        entropy: of each row in nats, ``(batch, heads, q_len)``.
        topk: the 8 largest weights of each row and their keys, ``.weights`` and ``.keys``, both
            ``(batch, heads, q_len, 8)``; 0 and -1 beyond what a row sees, and fewer where there are fewer keys.
        key_mass: the weight that each key received from all queries, ``(batch, heads, kv_len)``.
        map: the matrix of weights pooled by mean to at most 64 x 64 bins, ``(batch, heads, rows, cols)``.
        lse: the log-sum-exp of each row's scores, ``(batch, heads, q_len)``; any weight is ``exp(score - lse)``. It
            alone has a gradient.
        shape: that of the weights.

    Others as `summaries` names them. They were found with the call. Beside them a summary keeps the layer's queries and
    keys, from which it finds more when it is read, or the weights where those take less; nothing is copied, but under
    inference_mode, where torch does not count who writes. An index gives weights: ``summary[..., -1, :]`` is the last
    row of every head. See `to_dense`, `probe`.
    """

    def __init__(
        self,
        lse: Tensor,
        shape: tuple[int, ...],
        asked: Asked | None,
        why_not: str = "",
        wanted: bool = False,
    ) -> None:
        self.lse, self.shape = lse, torch.Size(shape)
        self._asked, self._why_not = asked, why_not
        self._found: dict[str, Any] = {}
        self._weights: Tensor | None = None
        if wanted and asked is not None:
            self._settle(asked)

    def _settle(self, asked: Asked) -> None:
        """Find what was chosen, and keep what takes less."""
        choice = chosen()
        usual = _usual(self.shape)
        now = list(usual.values() if choice.statistics is None else choice.statistics)
        size = math.prod(self.shape) * self.lse.element_size()
        whole = choice.keep and size <= asked.nbytes
        if asked.share is not None and choice.statistics is None:
            now = [usual["entropy"], usual["topk"]]
        if whole:
            now.append(_WHOLE)
        if now:
            self._found = self._answers(now)
            self._weights = self._found.pop(_WHOLE.name, None)
        if not choice.keep:
            self._asked, self._why_not = None, "nothing was kept to find it from: keep=False"
        elif whole:
            self._asked, self._why_not = None, _WEIGHTS_ALONE
        else:
            asked.secure()

    # ---- statistics ------------------------------------------------------------------------------------------

    @property
    def entropy(self) -> Tensor:
        return self._one("entropy")

    @property
    def topk(self) -> TopK:
        found: TopK = self._one("topk")
        return found

    @property
    def key_mass(self) -> Tensor:
        return self._one("key_mass")

    @property
    def map(self) -> Tensor:
        return self._one("map")

    def probe(self, *statistics: Any) -> Seen:
        """Other statistics of the same weights, as `tilefold.probe` gives them."""
        return Seen(**self._answers(check(statistics, "probe: statistics")))

    def _one(self, name: str) -> Any:
        if name not in self._found:
            self._found |= self._answers([_usual(self.shape)[name]])
        return self._found[name]

    def _answers(self, statistics: Sequence[Any]) -> dict[str, Any]:
        if self._asked is None:
            names = ", ".join(s.name for s in statistics)
            raise RuntimeError(f"{names}: not found with the call, and {self._why_not}")
        return self._asked.probe(statistics)

    # ---- the weights themselves ------------------------------------------------------------------------------

    def to_dense(self, *, limit: int = LIMIT) -> Tensor:
        """All weights, ``(batch, heads, q_len, kv_len)``, where they take at most `limit` bytes, 256 MiB by default.

        Raises:
            ValueError: they would take more; the message says how much.
            RuntimeError: nothing was kept to find them from, or it was written over.
        """
        size = math.prod(self.shape) * self.lse.element_size()
        if size > limit:
            raise ValueError(
                f"to_dense: weights of shape {tuple(self.shape)} would take {api.size(size)}, more than "
                f"limit={limit:,} bytes; summary[..., first:last, :] gives some rows, summary.map a picture"
            )
        return self._piece(slice(None), slice(None), limit)

    def __getitem__(self, where: Any) -> Tensor:
        parts = where if isinstance(where, tuple) else (where,)
        if sum(part is Ellipsis for part in parts) > 1 or len(parts) > 5 - (Ellipsis not in parts):
            raise IndexError(f"an AttentionSummary has the axes {', '.join(AXES)}, got the index {where!r}")
        at = next((n for n, part in enumerate(parts) if part is Ellipsis), len(parts))
        after = parts[at + 1 :]
        parts = (*parts[:at], *(slice(None),) * (4 - at - len(after)), *after)
        spans, within = zip(*map(_span, parts, self.shape, AXES), strict=True)
        piece = self._piece(spans[2], spans[3], LIMIT)
        return piece[(*parts[:2], *within[2:])]

    def _piece(self, rows: slice, keys: slice, limit: int) -> Tensor:
        if self._weights is not None:
            return self._weights[:, :, rows, keys]
        return self._answers([block(rows, keys, limit=limit).named("weights")])["weights"]

    # ---- where a tensor is expected --------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__.get("_found", {})
        if name in found:
            return found[name]
        raise AttributeError(
            f"an AttentionSummary has no {name!r}: the weights were not formed; .to_dense() makes the tensor, "
            "[..., rows, :] some rows of it"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what was found; queries, keys and masks stay behind."""
        state = {**self.__dict__, "lse": self.lse.detach()}
        if self._asked is not None:
            state |= {"_asked": None, "_why_not": "a copy of a summary holds only what was found before"}
        return state

    def __repr__(self) -> str:
        found = ", ".join(("lse", *self._found))
        return f"AttentionSummary({found}, for weights of shape {tuple(self.shape)})"


_WEIGHTS_ALONE = (
    "only the weights were kept, which take less than queries and keys: to_dense() gives them, and what "
    "summaries(...) names is found with the call"
)
_WHOLE = block(slice(None), slice(None), limit=2**63).named("whole")
_NAMES = {*vars(AttentionSummary), "lse", "shape"} - {"entropy", "topk", "key_mass", "map"}


def _span(part: Any, length: int, axis: str) -> tuple[slice, Any]:
    """A range that holds what an index asks of an axis, and where in that range it lies."""
    if isinstance(part, slice):
        start, stop, step = part.indices(length)
        if step < 1:
            raise ValueError(f"{axis} can be taken forwards only, got {part!r}")
        return slice(start, max(start, stop)), slice(None, None, step)
    if isinstance(part, bool) or not hasattr(part, "__index__"):
        raise TypeError(f"{axis} are taken by a number or a slice, got {type(part).__name__}")
    n = operator.index(part)
    if not -length <= n < length:
        raise IndexError(f"{axis} are {length}, got {n}")
    return slice(n % length, n % length + 1), 0
