"""Which module of a model is running: what a watch names the calls of attention by.

The call stack knows: the innermost frame whose first argument is a module of the model. So nothing is hung into the
model, where torch's fused layers would see it and compute in another way. The fact to know: a compiled program has no
such frames, so while somebody watches, programs run uncompiled.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


class Modules:
    """The modules of a model by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model  # kept, so that no other object gets the identity of one of its own
        self.names = {id(part): _name(name, part) for name, part in model.named_modules()}

    def innermost(self) -> str | None:
        """The name of the module whose code is running in this thread; None outside the model."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                name = self.names.get(id(frame.f_locals.get(code.co_varnames[0])))
                if name is not None:
                    return name
            frame = frame.f_back
        return None


def _name(name: str, module: nn.Module) -> str:
    return f"{name}.".replace(COMPILED, "").removesuffix(".") or type(module).__name__


def uncompiled() -> Any:
    """A block in which torch.compile's programs run as they are written; where nothing was compiled, any block."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def as_attended(q: Any, k: Any) -> tuple[Any, Any] | None:
    """q and k as attention takes them, in autocast's type under autocast, detached; None where they have no numbers."""
    from . import entering

    if q.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return None
    return entering(detached(q), detached(k))


def detached(x: Any) -> Any:
    """A tensor without its history, so that what is recorded keeps none alive; anything else as it is."""
    return x.detach() if isinstance(x, Tensor) else x
