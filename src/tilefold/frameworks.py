"""Which array frameworks are loaded. None is ever imported here: an array of one can only come where it is loaded."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def torch() -> ModuleType | None:
    """PyTorch, if the process has it and its import is over."""
    module = sys.modules.get("torch")
    return module if module is not None and hasattr(module, "get_num_threads") else None


def is_tensor(x: Any) -> bool:
    """Whether `x` is a tensor of PyTorch."""
    module = sys.modules.get("torch")
    return module is not None and isinstance(x, getattr(module, "Tensor", ()))


def is_traced(x: Any) -> bool:
    """Whether `x` is a tensor of a program that is being compiled, or stands for another: no numbers to look at."""
    module = torch()
    if module is None or not isinstance(x, module.Tensor):
        return False
    if module.compiler.is_compiling():
        return True
    return type(x).__torch_dispatch__ is not module.Tensor.__torch_dispatch__
