"""Which module of a model is running: what a watch names the calls of attention by.

Hooks that hold for all modules see them come and go, and the model itself is left as it is: torch's fused layers look
for hooks of a module's own, and would compute in another way. The fact to know: a compiled program calls no hooks, so
while somebody watches, programs run uncompiled.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


class Modules:
    """The modules of a model by name, and which of them are running in this thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model  # kept, so that no other module gets the identity of one of its own
        self.names = {id(part): _name(name, part) for name, part in model.named_modules()}
        self._threads = threading.local()

    @property
    def _running(self) -> list[Any]:
        if not hasattr(self._threads, "running"):
            self._threads.running = []
        running: list[Any] = self._threads.running
        return running

    def innermost(self) -> str | None:
        """The name of the module whose forward pass is running; None outside the model."""
        running = self._running
        return self.names[id(running[-1])] if running else None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """A block in which `innermost` knows."""
        hooks = [
            register_module_forward_pre_hook(self._enters),
            register_module_forward_hook(self._leaves, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()

    def _enters(self, module: nn.Module, _: Any) -> None:
        if id(module) in self.names:
            self._running.append(module)

    def _leaves(self, module: nn.Module, *_: Any) -> None:
        running = self._running
        while any(module is other for other in running):
            if running.pop() is module:
                break


def _name(name: str, module: nn.Module) -> str:
    return f"{name}.".replace(COMPILED, "").removesuffix(".") or type(module).__name__


def uncompiled() -> Any:
    """A block in which torch.compile's programs run as they are written; where nothing was compiled, any block."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def as_attended(q: Any, k: Any) -> tuple[Any, Any] | None:
    """q and k as attention takes them, in autocast's type under autocast; None where they have no numbers."""
    from . import _autocast

    if q.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return None
    if not torch.is_autocast_enabled("cpu"):
        return q, k
    return _autocast(q), _autocast(k) if isinstance(k, Tensor) else k
