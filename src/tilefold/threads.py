"""How many threads a call may use, and whose they are.

`set_num_threads` wins; else torch's count where torch is loaded, since the native core then runs on torch's own team;
else TILEFOLD_NUM_THREADS, OMP_NUM_THREADS, or the processors of this process. The NumPy backend's threads are its
BLAS's, which this does not change.
"""

from __future__ import annotations

from . import frameworks
from .backends.cpu import CORE
from .masks import integer

MOST = 4096


def set_num_threads(count: int | None) -> None:
    """Use at most `count` threads per call, in the whole process; None takes it back.

    The result does not depend on it, to the bit.

    Raises:
        TypeError: `count` is no integer. ValueError: it is not within 1 and 4096.

    >>> set_num_threads(2); get_num_threads()
    2
    >>> set_num_threads(None)
    """
    if count is not None and integer("count", count, 1) > MOST:
        raise ValueError(f"count must be at most {MOST}, got {count}")
    if CORE is not None:
        CORE.set_threads(count or 0)


def get_num_threads() -> int:
    """How many threads a call may use now.

    >>> get_num_threads() >= 1
    True
    """
    if CORE is None:
        return 1
    torch = frameworks.torch()
    otherwise = 0 if torch is None else torch.get_num_threads()
    return int(CORE.threads(otherwise))
