"""How many threads everyone gets: one number for a whole run, in force before anything is measured.

Here it is set for NumPy's BLAS and for tilefold; a process of its own is confined to that many processors, which every
thread pool respects, those without a setting too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..backends.cpu import CORE
from .machine import cores

OURS = "TILEFOLD_NUM_THREADS"
THEIRS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def limited(wanted: int | None) -> Iterator[int]:
    """Hold tilefold and NumPy's BLAS in this process to `wanted` threads; None is one for each processor."""
    usable = cores()[0]
    count = usable if wanted is None else wanted
    if not 1 <= count <= usable:
        raise ValueError(
            f"--threads must be 1 to {usable}, as many as this process has processors; got {wanted}"
        )
    before = os.environ.get(OURS)
    os.environ[OURS] = str(count)
    _tell_core(count)
    try:
        with _blas(count, usable):
            yield count
    finally:
        _tell_core(0)
        if before is None:
            del os.environ[OURS]
        else:
            os.environ[OURS] = before


def given() -> int:
    """How many threads are in force."""
    return int(os.environ.get(OURS, cores()[0]))


def environment(count: int) -> dict[str, str]:
    """The environment of a process that has `count` threads."""
    return os.environ | dict.fromkeys((OURS, *THEIRS), str(count))


def confine(count: int) -> None:
    """Hold this process, and every thread that it will start, to `count` processors, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _tell_core(count: int) -> None:
    """The core reads its environment only once."""
    if CORE is not None and hasattr(CORE, "set_threads"):
        CORE.set_threads(count)


def _blas(count: int, usable: int) -> Any:
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        if count != usable:
            raise ValueError(
                "--threads needs threadpoolctl, or NumPy's BLAS would use more: pip install threadpoolctl"
            ) from None
        return nullcontext()
    with _interrupts_wait():
        return threadpool_limits(count, user_api="blas")


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect afterwards: libraries are looked for in a callback of C's, where an exception is lost."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        signal.raise_signal(signal.SIGINT)
