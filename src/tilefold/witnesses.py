"""Who is shown the calls of attention: `attention` asks this file once per call, and nobody is there by default.

A witness belongs to the context that called it: other threads and tasks are shown nothing. The fact to know: a call is
shown before it runs, so what a witness refuses never starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .frameworks import is_traced

Witness = Callable[[Any, Any, dict[str, Any]], None]  # of q, k and the masks and score options of a call

there: list[Witness] = []  # of all contexts: while it is empty, a call has nothing to ask
_here: ContextVar[tuple[Witness, ...]] = ContextVar("tilefold_witnesses", default=())


@contextmanager
def called(witness: Witness) -> Iterator[None]:
    """A block whose calls `witness` is shown."""
    there.append(witness)
    token = _here.set((*_here.get(), witness))
    try:
        yield
    finally:
        _here.reset(token)
        there.remove(witness)


@contextmanager
def aside() -> Iterator[None]:
    """A block whose calls nobody is shown: they were, in another form."""
    token = _here.set(())
    try:
        yield
    finally:
        _here.reset(token)


def show(q: Any, k: Any, **options: Any) -> None:
    """Show a call to whoever is here; one without numbers to look at is shown to nobody."""
    if not is_traced(q):
        for witness in _here.get():
            witness(q, k, options)
