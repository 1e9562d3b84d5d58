"""How machines fold, best first. Backends never import one another; an automatic choice walks this table."""

from __future__ import annotations

from ..plan import Backend
from .cpu import NativeBackend
from .numpy import NumpyBackend

BACKENDS: tuple[Backend, ...] = (NativeBackend(), NumpyBackend())
