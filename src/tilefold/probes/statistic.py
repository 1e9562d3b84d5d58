"""What a statistic is: a name, the taps it needs, and how their arrays become what the caller gets.

Heads are reduced here, after the sweep: "each" leaves one result per query head, "group" gives one per key head (whose
cache its query heads share), "all" one for all of them. Averages and masses are averaged, maxima are maximised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..problem import Layout, Operands, Problem
from ..taps import Keys, Map, Shown, Tapped

Heads = Literal["each", "group", "all"]
HEADS = ("each", "group", "all")


@dataclass(frozen=True)
class Filled:
    """What the sweeps of one call filled, in the accumulate type."""

    problem: Problem
    operands: Operands

    def __getitem__(self, tap: Tapped) -> Any:
        found = self.operands.seen[tap]
        return found.astype(self.problem.accumulate, copy=False) if isinstance(tap, (Keys, Map)) else found

    @property
    def lse(self) -> np.ndarray:
        assert self.operands.lse is not None
        return self.operands.lse

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """``e^(score - lse)`` of scores ``(*lead, Hq, Sq, ...)``; 0 where nothing was seen."""
        lse = np.where(np.isneginf(self.lse), self.lse.dtype.type(0), self.lse)
        found = scores - lse.reshape(lse.shape + (1,) * (scores.ndim - lse.ndim))
        np.exp(found, out=found)
        return found


@dataclass(frozen=True, slots=True)
class Statistic:
    """A statistic of the weights; made by the constructors `entropy`, `topk`, `key_mass` and so on."""

    name: str
    taps: tuple[Tapped, ...]
    finish: Callable[[Filled], Any]
    heads: Heads = "each"
    pool: Literal["mean", "max", "none"] = "mean"
    smooth: bool = False  # whether what its taps found, as it is, has a derivative

    def __post_init__(self) -> None:
        if self.heads not in HEADS:
            raise ValueError(f"{self.name}: heads must be 'each', 'group' or 'all', got {self.heads!r}")

    def named(self, name: str) -> Statistic:
        """The same under another name: two of a kind in one call need it.

        >>> import numpy as np, tilefold as tf
        >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
        >>> seen = tf.probe(q, k, tf.key_mass(), tf.key_mass(last=16).named("recent"), causal=True)
        >>> seen.recent.sum(axis=1).round(9)
        array([16., 16., 16., 16.])
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{self.name}: a name must be an identifier, got {name!r}")
        return replace(self, name=name)

    def result(self, filled: Filled, squeeze: bool) -> Any:
        """What the caller gets, over the heads that were asked for; `squeeze` takes the head axis of 2-D calls off."""
        return self._over_heads(self.finish(filled), filled, squeeze)

    def _over_heads(self, found: Any, filled: Filled, squeeze: bool) -> Any:
        if isinstance(found, Regions):
            return Regions(**{name: self._over_heads(x, filled, squeeze) for name, x in vars(found).items()})
        if isinstance(found, TopK):
            return TopK(*(self._over_heads(x, filled, squeeze) for x in found))
        p = filled.problem
        axis = (
            1 if p.layout is Layout.VARLEN and isinstance(found, PerSequence) else len(filled.operands.lead)
        )
        found = found.array if isinstance(found, PerSequence) else found
        if self.heads != "each":
            groups = p.kv_heads if self.heads == "group" else 1
            split = found.reshape(*found.shape[:axis], groups, p.heads // groups, *found.shape[axis + 1 :])
            found = split.max(axis=axis + 1) if self.pool == "max" else split.mean(axis=axis + 1)
        return found.squeeze(axis) if squeeze or self.heads == "all" else found


@dataclass(frozen=True, slots=True)
class PerSequence:
    """An array whose first axis counts packed sequences, where they are packed."""

    array: np.ndarray


class TopK(NamedTuple):
    """The largest weights of each row, largest first, and the keys they are on; 0 and -1 beyond what a row sees."""

    weights: Any
    keys: Any


class Regions(SimpleNamespace):
    """The mass of each row on each region, by its name."""


class Seen(SimpleNamespace):
    """What was seen: one attribute per statistic, by its name."""

    def __repr__(self) -> str:
        return f"Seen({', '.join(f'{name}: {_shape(x)}' for name, x in vars(self).items())})"


def _shape(x: Any) -> str:
    if isinstance(x, (Regions, TopK)):
        parts = vars(x) if isinstance(x, Regions) else x._asdict()
        return "{" + ", ".join(f"{name}: {_shape(part)}" for name, part in parts.items()) + "}"
    return str(tuple(getattr(x, "shape", ())))


def check(statistics: Any, name: str) -> tuple[Any, ...]:
    """The statistics of one call, after a look at each: ours, or objects with ``start(problem, lead)``."""
    if not isinstance(statistics, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of statistics, got {type(statistics).__name__}")
    for given in statistics:
        if isinstance(given, Statistic):
            continue
        if not hasattr(given, "name") or not callable(getattr(given, "start", None)):
            hint = (
                f"; call it: tilefold.{given.__name__}()"
                if getattr(given, "__module__", "").startswith(__package__)
                else ""
            )
            raise TypeError(
                f"{name} must be statistics such as tilefold.entropy(), or objects with a name and "
                f"start(problem, lead); got {type(given).__name__}{hint}"
            )
    names = [given.name for given in statistics]
    if len(set(names)) < len(names):
        raise ValueError(f"{name} must have different names, got {names}; .named(...) gives another one")
    return tuple(
        given
        if isinstance(given, Statistic)
        else Statistic(given.name, (Shown(given),), _Given(Shown(given)))
        for given in statistics
    )


@dataclass(frozen=True, slots=True)
class _Given:
    """What a tap of the caller's own found, as it is."""

    tap: Shown

    def __call__(self, filled: Filled) -> Any:
        return filled[self.tap]


def taps_of(statistics: Sequence[Statistic]) -> tuple[Tapped, ...]:
    """Each tap once."""
    return tuple(dict.fromkeys(tap for s in statistics for tap in s.taps))


def results(statistics: Sequence[Statistic], filled: Filled, squeeze: bool) -> Mapping[str, Any]:
    """What each found, by name."""
    return {
        s.name: s.finish(filled) if isinstance(s.finish, _Given) else s.result(filled, squeeze)
        for s in statistics
    }
