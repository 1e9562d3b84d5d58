"""`watch`: what each layer of a model looks at, recorded under its name while the model runs as it always does.

The statistics of a call are found beside it, by a `probe` of the same q and k: outputs and gradients keep their bits,
and the scores of a watched call are swept once or twice more. The fact to know: attention is seen where it runs on
tilefold. A model that computes it in another way is watched in vain, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from . import frameworks, witnesses
from .api import probe
from .arrays import door_of
from .call import flag
from .masks import integer
from .probes import entropy, max_logit, mean_distance
from .probes.statistic import Regions, Seen, Statistic, TopK, check
from .taps import Map, RowTap, Shown

CHEAP = (entropy(), max_logit(), mean_distance())  # each rides in the forward sweep, one number per row
NAMES = 8  # of modules that an error lists


@dataclass(frozen=True, slots=True)
class _Call:
    seen: Seen
    shape: tuple[int, int, int]  # heads, queries, keys


class Watched(Mapping[Any, list[Seen]]):
    """What was seen: for each layer by its name, or for each call by its number, a list of `Seen`, one per call.

    Prints as a table. Its columns are means over rows, heads and calls; of maxima the largest; of `topk` the mean
    weight of the whole list. A row that sees no key, such as padding, counts as 0. Statistics over keys have no column.
    """

    def __init__(self, statistics: Sequence[Statistic], latest: bool, of_model: bool) -> None:
        self._statistics, self._latest, self._of_model = statistics, latest, of_model
        self._calls: dict[Any, list[_Call]] = {}
        self._counts: dict[Any, int] = {}

    def __getitem__(self, layer: Any) -> list[Seen]:
        if layer not in self._calls:
            raise KeyError(f"{layer!r} was not seen; seen were {_some(map(str, self._calls))}")
        return [call.seen for call in self._calls[layer]]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def _record(self, layer: Any, seen: Seen, shape: tuple[int, int, int]) -> None:
        calls = self._calls.setdefault(layer, [])
        if self._latest:
            calls.clear()
        calls.append(_Call(seen, shape))
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def __repr__(self) -> str:
        if not self._calls:
            whose = "of the model " if self._of_model else ""
            return f"nothing seen: no attention {whose}ran on tilefold in this block"
        rows = [self._row(layer) for layer in self._calls]
        figures = list(dict.fromkeys(name for row in rows for name in row))
        lines = [figures, *([row.get(name, "") for name in figures] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
        )

    def _row(self, layer: Any) -> dict[str, str]:
        calls = self._calls[layer]
        heads, q_len, kv_len = calls[-1].shape
        row = {"layer" if self._of_model else "call": str(layer)}
        if self._of_model:
            row["calls"] = str(self._counts[layer])
        row |= {"heads": str(heads), "queries x keys": f"{q_len} x {kv_len}"}
        for s in self._statistics:
            for name, (fold, arrays) in _columns(s, [getattr(call.seen, s.name) for call in calls]).items():
                figures = [float(fold(x)) for x in arrays if np.size(x)]
                row[name] = f"{float(fold(np.array(figures))):.4g}" if figures else ""
        return row


def _columns(s: Statistic, found: list[Any]) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
    """The columns that a statistic has in a table: how each folds numbers to one, and the numbers of each call."""
    if not all(isinstance(tap, RowTap) for tap in s.taps):
        return {}
    if isinstance(found[0], TopK):
        return {s.name: (np.mean, [_array(x.weights).sum(axis=-1) for x in found])}
    if isinstance(found[0], Regions):
        return {
            f"{s.name}.{name}": (np.mean, [_array(vars(x)[name]) for x in found]) for name in vars(found[0])
        }
    fold = np.max if s.pool == "max" else np.mean
    return {s.name: (fold, [_array(x) for x in found])} if s.pool != "none" else {}


def _array(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else np.asarray(x)


def watch(
    model: Any = None, layers: Any = None, heads: Sequence[int] | None = None,
    statistics: Sequence[Any] = CHEAP, *, latest: bool = False,
) -> AbstractContextManager[Watched]:  # fmt: skip
    """A block in which statistics of the attention weights are recorded, of a model's layers or of every call.

    Args:
        model: a `torch.nn.Module` whose attention runs on tilefold: of transformers under
            ``attn_implementation="tilefold"``, with torch's attention under `tilefold.drop_in.sdpa`, or one that calls
            `tilefold.attention`. A layer is the innermost module whose code makes a call. None records every call of
            the block, on NumPy arrays too, numbered from 0.
        layers: which layers: a name, a pattern (``"*.self_attn"``) or a number, or a list of them. A name stands for
            all below it; a number is the first one in a layer's name, 3 in ``"model.layers.3.self_attn"``. None is all.
        heads: which query heads, a list of numbers; results keep their head axis. None is all.
        statistics: as of `probe`; by default entropy, the largest score and the mean distance, which are cheap.
        latest: keep a layer's last call only.

    Returns:
        A context manager. Its `Watched` maps each layer's name to a list of `Seen`, one per call (each step of
        `generate` is a call), and prints as a table.

    Raises:
        TypeError, ValueError: a wrong argument; within the block, what `probe` raises of a statistic.

    Outputs and gradients have the same bits as without watching. It holds for the context that entered it; programs of
    `torch.compile` run uncompiled meanwhile, exported ones and calls under `torch.func` are not seen. Gradient
    checkpointing calls layers a second time in the backward pass.

    >>> import numpy as np, tilefold as tf
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 4, 100, 16))
    >>> with tf.watch(statistics=[tf.entropy(), tf.topk(3)]) as seen:
    ...     out = tf.attention(q, k, v, causal=True)
    >>> seen[0][0].entropy.shape, seen[0][0].topk.keys.shape
    ((4, 100), (4, 100, 3))
    """
    chosen = check(statistics, "watch: statistics")
    if not chosen:
        raise TypeError("watch: statistics must hold at least one, such as tilefold.entropy()")
    heads = None if heads is None else _heads(heads, chosen)
    latest = flag("watch: latest", latest)
    if model is None:
        if layers is not None:
            raise TypeError("watch: layers are those of a model, and none was given")
        return _watching(None, None, chosen, heads, latest)
    torch = frameworks.torch()
    if torch is None or not isinstance(model, torch.nn.Module):
        raise TypeError(f"watch: model must be a torch.nn.Module or None, got {type(model).__name__}")
    from .arrays.torch.modules import Modules

    modules = Modules(model)
    names = set(modules.names.values())
    return _watching(modules, names if layers is None else _chosen(layers, names), chosen, heads, latest)


@contextmanager
def _watching(
    modules: Any, layers: set[str] | None, statistics: tuple[Any, ...], heads: list[int] | None, latest: bool
) -> Iterator[Watched]:
    watched = Watched(statistics, latest, modules is not None)

    def witness(q: Any, k: Any, options: dict[str, Any]) -> None:
        layer = len(watched) if modules is None else modules.innermost()
        if layers is not None and layer not in layers:
            return
        if door_of(q) is not None:
            from .arrays.torch.modules import as_attended, detached

            attended = as_attended(q, k)
            if attended is None:
                return
            q, k = attended
            options = {name: detached(x) for name, x in options.items()}
        seen = probe(q, k, *statistics, **options)
        if heads is not None:
            seen = _of_heads(seen, statistics, heads, q, options.get("cu_seqlens_q") is not None)
        watched._record(layer, seen, _shape(q, k))

    with ExitStack() as blocks:
        if frameworks.torch() is not None:
            from .arrays.torch.modules import uncompiled

            blocks.enter_context(uncompiled())
        blocks.enter_context(witnesses.called(witness))
        yield watched


def _shape(q: Any, k: Any) -> tuple[int, int, int]:
    """Heads, queries and keys of a call."""
    kv_len = k.shape[-2] if hasattr(k, "shape") else np.max(k.stored().lengths, initial=0)
    return q.shape[-3] if q.ndim > 2 else 1, q.shape[-2], int(kv_len)


# ---- which layers --------------------------------------------------------------------------------------------


def _chosen(layers: Any, names: set[str]) -> set[str]:
    """The names of a model that names, patterns and numbers stand for."""
    chosen: set[str] = set()
    for given in layers if isinstance(layers, (list, tuple, set, range)) else [layers]:
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise TypeError(
                f"watch: layers must be names, patterns or numbers, or a list of them, got {given!r}"
            )
        found = {name for name in names if _stands_for(given, name)}
        if not found:
            raise ValueError(f"watch: layers has {given!r}, which no module has; {_some(sorted(names))}")
        chosen |= found
    return chosen


def _stands_for(given: str | int, name: str) -> bool:
    parts = name.split(".")
    if isinstance(given, int):
        return next((int(part) == given for part in parts if part.isdecimal()), False)
    return any(fnmatchcase(".".join(parts[:n]), given) for n in range(1, len(parts) + 1))


def _some(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - NAMES} more" if len(every) > NAMES else ""
    return f"{', '.join(map(repr, every[:NAMES]))}{more}" if every else "none"


# ---- which heads ---------------------------------------------------------------------------------------------


def _heads(heads: Any, statistics: Sequence[Any]) -> list[int]:
    if not isinstance(heads, (list, tuple, range)):
        raise TypeError(f"watch: heads must be a list of numbers, got {heads!r}")
    for s in statistics:
        if s.heads != "each" or any(isinstance(tap, Shown) for tap in s.taps):
            raise ValueError(f"watch: heads chooses among the heads of each statistic, and {s.name} has none")
    return [integer("watch: heads: a head", head, None) for head in heads]


def _of_heads(seen: Seen, statistics: Sequence[Statistic], heads: list[int], q: Any, packed: bool) -> Seen:
    """The same, of some heads."""
    there, axis = (q.shape[-3], q.ndim - 3) if q.ndim > 2 else (1, None)
    wrong = [head for head in heads if not -there <= head < there]
    if wrong:
        raise ValueError(f"watch: heads: this call has {there} heads, got {wrong[0]}")

    def cut(x: Any, axis: int) -> Any:
        if isinstance(x, TopK):
            return TopK(*(cut(part, axis) for part in x))
        if isinstance(x, Regions):
            return Regions(**{name: cut(part, axis) for name, part in vars(x).items()})
        return x[(*(slice(None),) * axis, heads)]

    if axis is None:  # 2-D arguments have no axis to choose from
        return seen
    return Seen(
        **{
            s.name: cut(getattr(seen, s.name), 1 if packed and isinstance(s.taps[0], Map) else axis)
            for s in statistics
        }
    )
