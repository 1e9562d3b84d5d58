"""The options of `attention` as options of a command: one noun, `Asked`, that `run` and `explain` share.

Arrays come from files, short ones may be written out (`--kv-lengths 100,37`). Masks are combined here in one order:
causal and window, widened by anchors and prefix, then narrowed by chunks, documents and the mask file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Annotated, Any, get_type_hints

import numpy as np
import typer

from .. import masks
from ..call import Options
from .files import read

NUMBERS = re.compile(r"[-+]?\d[\d.eE+-]*(,[-+]?\d[\d.eE+-]*)*")


def _option(panel: str, words: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=words, rich_help_panel=panel, metavar=metavar)


def _hides(words: str, *names: str, metavar: str | None = None) -> Any:
    return _option("Masks", words, *names, metavar=metavar)


def _score(words: str, metavar: str | None = None) -> Any:
    return _option("Scores", words, metavar=metavar)


def _ends(words: str, metavar: str) -> Any:
    return _option("Lengths", words, metavar=metavar)


Text = str | None
Count = int | None
Number = float | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says about a call, files not yet read."""

    causal: Annotated[
        bool, _hides("No query sees a later key; the last query stands at the last key.", "--causal")
    ] = False
    top_left: Annotated[
        bool, _hides("Causal with the first query at the first key.", "--causal-top-left")
    ] = False
    window: Annotated[
        Text, _hides("Other keys on each side, '-' for no limit: 127,0.", metavar="LEFT,RIGHT")
    ] = None
    anchors: Annotated[Count, _hides("The first N keys stay visible behind --window.", metavar="N")] = None
    prefix: Annotated[
        Count, _hides("The first N keys are visible despite --causal and --window.", metavar="N")
    ] = None
    chunked: Annotated[Count, _hides("Only keys of the query's own chunk of N.", metavar="N")] = None
    documents: Annotated[
        Text, _hides("Only keys of the query's own document, an id per key.", metavar="FILE|1,1,2")
    ] = None
    mask: Annotated[Text, _hides("Booleans (..., heads, queries, keys), True = visible.", metavar="FILE")] = (
        None
    )
    scale: Annotated[Number, _score("Factor of the scores; 1/sqrt(d) if not given.")] = None
    softcap: Annotated[Number, _score("cap * tanh(score / cap), after the scale.")] = None
    bias: Annotated[Text, _score("Added to scores (..., heads, queries, keys); -inf hides.", "FILE")] = None
    alibi: Annotated[Text, _score("Slope of each head, times the distance.", "FILE|0.5,0.25")] = None
    sinks: Annotated[Text, _score("Sink logit of each head.", "FILE|0.1,0.2")] = None
    q_lengths: Annotated[
        Text, _ends("Where each padded sequence of queries ends, or all of them.", "FILE|5,7")
    ] = None
    kv_lengths: Annotated[Text, _ends("The same for keys and values.", "FILE|5,7")] = None
    cu_seqlens_q: Annotated[Text, _ends("Boundaries of packed sequences of queries.", "FILE|0,5,12")] = None
    cu_seqlens_k: Annotated[Text, _ends("The same for keys and values.", "FILE|0,5,12")] = None
    backend: Annotated[str, _option("How", "native, numpy, or auto: the best that can.")] = "auto"
    invariant: Annotated[
        bool, _option("How", "Demand the same bits whatever stands around a row.", "--invariant")
    ] = False

    def read(self) -> Options:
        """The options of the call, with the files opened."""
        return Options(
            mask=self._visible(),
            scale=self.scale,
            softcap=self.softcap,
            bias=None if self.bias is None else read(self.bias, "bias"),
            alibi=_array("alibi", self.alibi, float),
            sinks=_array("sinks", self.sinks, float),
            q_lengths=_lengths("q_lengths", self.q_lengths),
            kv_lengths=_lengths("kv_lengths", self.kv_lengths),
            cu_seqlens_q=_array("cu_seqlens_q", self.cu_seqlens_q, int),
            cu_seqlens_k=_array("cu_seqlens_k", self.cu_seqlens_k, int),
            invariant=self.invariant,
        )

    def as_keywords(self) -> dict[str, Any]:
        """The same as keyword arguments of the library's verbs."""
        read = self.read()
        return {f.name: getattr(read, f.name) for f in fields(Options)}

    def _visible(self) -> masks.Mask | None:
        parts = self._positions()
        if self.prefix is not None:
            if not parts:
                raise ValueError("--prefix widens --causal or --window, and neither was given")
            parts = [_all(parts) | masks.prefix(self.prefix)]
        if self.chunked is not None:
            parts.append(masks.chunked(self.chunked))
        if self.documents is not None:
            parts.append(masks.documents(_array("documents", self.documents, int)))
        if self.mask is not None:
            parts.append(masks.dense(read(self.mask, "mask")))
        return _all(parts) if parts else None

    def _positions(self) -> list[masks.Mask]:
        parts = []
        if self.causal:
            parts.append(masks.causal())
        if self.top_left:
            parts.append(masks.causal(align="top-left"))
        if self.window is not None:
            left, right = _limits(self.window)
            window = masks.window(left, right)
            if self.anchors is not None:
                window = window | (masks.prefix(self.anchors) & masks.window(None, right))
            parts.append(window)
        elif self.anchors is not None:
            raise ValueError("--anchors stay visible behind --window, which was not given")
        return parts


def takes_options(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command whose first parameter is an `Asked`, as one that has all its options."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(Asked, include_extras=True)
    shared = {f.name: hints[f.name] for f in fields(Asked)}
    defaults = {f.name: f.default for f in fields(Asked)}

    def wrapped(**given: Any) -> int | None:
        return command(Asked(**{name: given.pop(name) for name in shared}), **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(n, keyword, annotation=t, default=defaults[n]) for n, t in shared.items()]
    parameters = [p.replace(kind=keyword) for p in own] + added
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _all(parts: list[masks.Mask]) -> masks.Mask:
    return reduce(lambda a, b: a & b, parts)


def _limits(text: str) -> tuple[int | None, int | None]:
    words = text.split(",")
    if len(words) != 2 or not all(re.fullmatch(r"\d+|-|none", w.strip().lower()) for w in words):
        raise ValueError(f"--window must be LEFT,RIGHT, two numbers >= 0 or '-' for no limit; got {text!r}")
    left, right = (int(w) if w.strip().isdigit() else None for w in words)
    return left, right


def _array(name: str, given: str | None, written: type[float] | type[int]) -> np.ndarray | None:
    """An array from a file, or written out as numbers."""
    if given is None:
        return None
    if not NUMBERS.fullmatch(given):
        return read(given, name)
    try:
        return np.array([written(x) for x in given.split(",")])
    except ValueError:
        raise ValueError(f"{name}: {given!r} is neither a file nor {written.__name__} numbers") from None


def _lengths(name: str, given: str | None) -> np.ndarray | None:
    """One number is the length of every sequence."""
    array = _array(name, given, int)
    return array if array is None or array.shape != (1,) else array.reshape(())
