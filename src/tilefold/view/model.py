"""What a picture is made of: the layers that were seen, each statistic as an array (sequences, heads, ...).

A `Seen` says nothing about itself but names and shapes. So a statistic is known by its name, or by a name that begins
with it and an underscore (`key_mass_recent`; `map_...` is a heat map), what has another name is told and not shown, and
lengths are read off the shapes. Statistics of groups of heads are shown at each head of the group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import enter
from ..probes.statistic import Regions, Seen, TopK

ROWS = ("entropy", "effective_keys", "max_logit", "max_weight", "mean_distance")
KEYS = ("key_mass", "key_max")
MAPS = ("heatmap", "map")
UNITS = {"entropy": "nats", "effective_keys": "keys", "mean_distance": "positions"}
WANTS = "give a Seen, as tilefold.probe returns it, or a mapping from names of layers to such"


@dataclass(slots=True)
class Layer:
    """One call's statistics.

    Attributes:
        rows: (sequences, heads, q_len) each; `keys`: (sequences, heads, kv_len); `maps`: (sequences, heads, R, C),
            coarse ones first; `top`: weights and keys (sequences, heads, q_len, k), or None.
        skipped: what is not shown, a sentence each.
        guessed: whether nothing tells how many keys there are.
        ends: queries and keys of each sequence; below q_len and kv_len where a batch is padded.
    """

    name: str
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    maps: list[np.ndarray] = field(default_factory=list)
    top: TopK | None = None
    skipped: list[str] = field(default_factory=list)
    sequences: int = 1
    heads: int = 1
    q_len: int = 0
    kv_len: int = 0
    guessed: bool = False
    ends: list[tuple[int, int]] = field(default_factory=list)

    def arrays(self) -> list[np.ndarray]:
        """Everything there is, row and key statistics first."""
        lists = [] if self.top is None else list(self.top)
        return [*self.rows.values(), *self.keys.values(), *lists, *self.maps]

    def live(self) -> np.ndarray | None:
        """Which rows see a key (sequences, heads, q_len), where a statistic or a length can tell."""
        if self.top is not None:
            return np.asarray(self.top.keys[..., 0] >= 0)
        peak = next((x for name, x in self.rows.items() if is_a(name, ("max_logit",))), None)
        if peak is not None:
            return np.asarray(~np.isneginf(peak))
        if all(queries == self.q_len for queries, _ in self.ends):
            return None
        within = np.arange(self.q_len) < np.array(self.ends)[:, None, :1]
        return np.broadcast_to(within, (self.sequences, self.heads, self.q_len))


def is_a(name: str, kinds: Sequence[str]) -> bool:
    """Whether a statistic of that name is one of `kinds`."""
    return any(name == kind or name.startswith(kind + "_") for kind in kinds)


def unit(name: str) -> str:
    """What its numbers count, '' for weights and scores."""
    return next((unit for kind, unit in UNITS.items() if is_a(name, (kind,))), "")


def layers(seen: Any, q_lengths: Any = None, kv_lengths: Any = None) -> list[Layer]:
    """The layers of what was seen; TypeError or ValueError where it is nothing that can be shown."""
    found = [_layer(name, one) for name, one in each(seen)]
    if not any(layer.arrays() for layer in found):
        skipped = " ".join(sentence for layer in found for sentence in layer.skipped)
        raise ValueError(f"seen holds no statistic that can be shown; {skipped or 'it is empty'}".rstrip("."))
    for layer in found:
        sizes = layer.q_len, layer.kv_len
        lengths = [
            _lengths(layer, name, given, size)
            for name, given, size in zip(
                ("q_lengths", "kv_lengths"), (q_lengths, kv_lengths), sizes, strict=True
            )
        ]
        layer.ends = list(zip(*lengths, strict=True))
    return found


def _lengths(layer: Layer, name: str, given: Any, size: int) -> list[int]:
    """How long each sequence of a layer is."""
    if given is None:
        return [size] * layer.sequences
    ends = np.asarray(given)
    if ends.dtype.kind not in "iu" or ends.ndim > 1 or ends.size not in (1, layer.sequences):
        raise ValueError(
            f"{name} must be integers, one for each of {layer.sequences} sequences, got {given!r}"
        )
    if ends.min() < 0 or ends.max() > size:
        raise ValueError(f"{name} must be 0 to {size}, got {given!r}")
    return [int(n) for n in np.broadcast_to(ends.reshape(-1), (layer.sequences,))]


def each(seen: Any) -> Iterator[tuple[str, Seen]]:
    """Every `Seen` and what it is called; several calls of one layer are numbered."""
    if isinstance(seen, Seen):
        yield "", seen
        return
    if not isinstance(seen, Mapping):
        raise TypeError(f"{WANTS}; got {type(seen).__name__}")
    for name, given in seen.items():
        calls = list(given) if isinstance(given, (list, tuple)) else [given]
        for n, call in enumerate(calls):
            if not isinstance(call, Seen):
                raise TypeError(f"{WANTS}; layer {name!r} holds a {type(call).__name__}")
            yield (str(name) if len(calls) == 1 else f"{name} [{n}]"), call


def flat(seen: Seen) -> Iterator[tuple[str, Any]]:
    """Each statistic as a NumPy array or a `TopK` of them, regions by name: ``mass_in.near``."""
    for name, found in vars(seen).items():
        if isinstance(found, Regions):
            for region, mass in vars(found).items():
                yield f"{name}.{region}", enter(f"{name}.{region}", mass)
        elif isinstance(found, TopK):
            yield name, TopK(*(enter(f"{name}.{part}", x) for part, x in found._asdict().items()))
        elif hasattr(found, "shape"):
            yield name, enter(name, found)
        else:
            yield name, found


def _layer(name: str, seen: Seen) -> Layer:
    layer, maps = Layer(name), []
    for statistic, found in flat(seen):
        kind = statistic.partition(".")[0]
        if isinstance(found, TopK) and layer.top is None:
            layer.top = found
        elif (
            not isinstance(found, np.ndarray) or found.dtype.kind != "f" or found.ndim < 1 + is_a(kind, MAPS)
        ):
            layer.skipped.append(f"{statistic} is no array of numbers that a page knows.")
        elif is_a(kind, ROWS) or "." in statistic:
            layer.rows[statistic] = found
        elif is_a(kind, KEYS):
            layer.keys[statistic] = found
        elif is_a(kind, MAPS):
            maps.append(found)
        else:
            layer.skipped.append(f"{statistic} is not shown: no statistic of a page begins with that name.")
    layer.maps = sorted(maps, key=lambda x: x.shape[-1] * x.shape[-2])
    _shape(layer)
    return layer


def _shape(layer: Layer) -> None:
    """Give all arrays of a layer the axes (sequences, heads, ...)."""
    lists = [] if layer.top is None else list(layer.top)
    inner = {id(x): 2 for x in (*layer.maps, *lists)}
    everything = layer.arrays()
    if not everything:
        return
    leads = [x.shape[: x.ndim - inner.get(id(x), 1)] for x in everything]
    lead = max(leads, key=lambda shape: (len(shape), shape))
    heads = max(shape[-1] if shape else 1 for shape in leads)
    batch = lead[:-1]
    layer.heads, layer.sequences = heads, int(np.prod(batch, dtype=int))
    if not layer.heads * layer.sequences:
        raise ValueError(f"layer {layer.name!r}: there is no head to show, its leading axes are {lead}")

    def fit(what: str, x: np.ndarray) -> np.ndarray:
        own = x.shape[: x.ndim - inner.get(id(x), 1)]
        there = own[-1] if own else 1
        if own[:-1] != batch or heads % there:
            raise ValueError(
                f"layer {layer.name!r}: {what} has leading axes {own}, others have {lead}; show statistics of "
                "packed sequences, or with other `heads`, one by one"
            )
        spread = x.reshape(layer.sequences, there, *x.shape[len(own) :])
        return spread if there == heads else np.repeat(spread, heads // there, axis=1)

    layer.rows = {name: fit(name, x) for name, x in layer.rows.items()}
    layer.keys = {name: fit(name, x) for name, x in layer.keys.items()}
    layer.maps = [fit("a map", x) for x in layer.maps]
    if layer.top is not None:
        layer.top = TopK(*(fit("topk", x) for x in layer.top))
    q_lens = {x.shape[2] for x in (*layer.rows.values(), *lists_of(layer))}
    kv_lens = {x.shape[2] for x in layer.keys.values()}
    if len(q_lens) > 1 or len(kv_lens) > 1:
        raise ValueError(
            f"layer {layer.name!r}: its statistics are of {sorted(q_lens)} queries and {sorted(kv_lens)} keys; they "
            "must be of one call"
        )
    finest = layer.maps[-1].shape[-2:] if layer.maps else (0, 0)
    layer.q_len = q_lens.pop() if q_lens else finest[0]
    largest = 0 if layer.top is None else int(layer.top.keys.max(initial=-1)) + 1
    layer.guessed = not kv_lens
    layer.kv_len = kv_lens.pop() if kv_lens else max(largest, finest[1], layer.q_len)


def lists_of(layer: Layer) -> tuple[np.ndarray, ...]:
    """The arrays of the largest weights, or none."""
    return () if layer.top is None else tuple(layer.top)


def named_tokens(tokens: Any, found: Sequence[Layer]) -> list[list[str]] | None:
    """Tokens per sequence; one list stands for all sequences. They are those of the keys; a layer that has fewer keys,
    as an earlier step of a generation, has the first of them."""
    if tokens is None:
        return None
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
        raise TypeError(f"tokens must be a list of strings, one per key, got {type(tokens).__name__}")
    lists = [list(tokens)] if all(isinstance(token, str) for token in tokens) else [list(t) for t in tokens]
    if not all(isinstance(token, str) for some in lists for token in some):
        raise TypeError("tokens must be a list of strings, one per key, or such a list per sequence")
    longest = max(map(len, lists))
    known = [layer.kv_len for layer in found if layer.keys]
    if longest != max(known, default=longest) or longest < max(layer.kv_len for layer in found):
        keys = max(known or [layer.kv_len for layer in found])
        raise ValueError(f"tokens are {longest}, keys are {keys}: give one token per key")
    for layer in found:
        if len(lists) not in (1, layer.sequences):
            raise ValueError(
                f"tokens are of {len(lists)} sequences, layer {layer.name!r} has {layer.sequences}"
            )
        if not layer.keys:
            layer.ends = [(q, longest if k == layer.kv_len else k) for q, k in layer.ends]
            layer.kv_len, layer.guessed = longest, False
    return lists


@dataclass(frozen=True, slots=True)
class Table:
    """One line per layer, sequence and head: what heads are compared by."""

    header: tuple[str, ...]
    lines: list[tuple[Any, ...]]


def table(found: Sequence[Layer]) -> Table:
    """Numbers of every head, in float64: averages over the rows that see a key (over all, where nothing tells which
    do), of maxima the largest, of the masses of keys the largest and where it lies."""
    columns: dict[str, None] = {}
    lines = []
    for layer in found:
        live = layer.live()
        for s in range(layer.sequences):
            for h in range(layer.heads):
                numbers = _numbers(layer, s, h, slice(None) if live is None else live[s, h])
                columns |= dict.fromkeys(numbers)
                lines.append((layer.name, s, h, numbers))
    header = ("layer", "sequence", "head", *columns)
    return Table(header, [(*where, *(numbers.get(c) for c in columns)) for *where, numbers in lines])


def _numbers(layer: Layer, s: int, h: int, live: Any) -> dict[str, float | int]:
    numbers: dict[str, float | int] = {}
    for name, x in layer.rows.items():
        some = x[s, h][live].astype(np.float64)
        if is_a(name, ("max_logit", "max_weight")):
            numbers[f"{name} largest"] = float(some.max(initial=-np.inf))
        if not is_a(name, ("max_logit",)):
            numbers[f"{name} mean"] = float(some.mean()) if some.size else 0.0
        if is_a(name, ("entropy",)):
            numbers[f"{name} least"] = float(some.min()) if some.size else 0.0
    if layer.top is not None:
        some = layer.top.weights[s, h][live].astype(np.float64)
        numbers[f"mass of top {some.shape[-1]}"] = float(some.sum(axis=-1).mean()) if some.size else 0.0
    for name, x in layer.keys.items():
        if x.shape[-1]:
            at = int(np.argmax(x[s, h]))
            numbers |= {f"{name} largest": float(x[s, h, at]), f"{name} at key": at}
    return numbers
