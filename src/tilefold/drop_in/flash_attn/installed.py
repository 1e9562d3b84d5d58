"""``import flash_attn`` without flash-attn: the modules under their own names, as long as no real one is there.

A finder stands last in ``sys.meta_path``, so a package that is installed later wins. Nothing pretends to be installed:
``importlib.metadata.version("flash_attn")`` still raises, and libraries that ask it (transformers does, and asks for a
CUDA device as well) go on without flash-attn. The version is that of the interface with a local label of our own, so
that ``Version(flash_attn.__version__) >= Version("2.8")`` is true and a bug report shows whose code it was.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from . import bert_padding, fa2, fa3, fa4

VERSION = "2.8.3+tilefold"
TOPS = ("flash_attn", "flash_attn_interface")

# Each module of the original that is here: the file of this folder that has its names, and those names.
_FA2 = (
    *("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func"),
    *("flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"),
)
_FA3 = (
    *("flash_attn_combine", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func"),
    "flash_attn_with_kvcache",
)
_FA4 = ("flash_attn_func", "flash_attn_varlen_func")
_PADDING = ("index_first_axis", "index_put_first_axis", "pad_input", "unpad_input")
MODULES = {
    "flash_attn": (fa2, _FA2),
    "flash_attn.flash_attn_interface": (fa2, _FA2),
    "flash_attn.bert_padding": (bert_padding, _PADDING),
    "flash_attn.cute": (fa4, _FA4),
    "flash_attn.cute.interface": (fa4, ("flash_attn_combine", *_FA4)),
    "flash_attn_interface": (fa3, _FA3),
}
PACKAGES = ("flash_attn", "flash_attn.cute")


class _Finder(Loader):
    """Finder and loader of those modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in MODULES:
            source, package = MODULES[name][0], name in PACKAGES
            return ModuleSpec(name, self, origin=source.__name__, is_package=package)
        if name.partition(".")[0] in TOPS:
            there = ", ".join(sorted(MODULES))
            raise ModuleNotFoundError(
                f"{name} is not here: this flash_attn is tilefold's, for the CPU, and has {there}; the rest needs "
                "the flash-attn package and a CUDA device",
                name=name,
            )
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        source, names = MODULES[name]
        found = {key: getattr(source, key) for key in names}
        module.__dict__.update(found, __version__=VERSION, __all__=list(names), __doc__=source.__doc__)
        module.__dict__["__getattr__"] = lambda key: _lacks(name, key)


_finder = _Finder()


def _lacks(module: str, name: str) -> Any:
    raise AttributeError(
        f"module {module!r} is tilefold's, for the CPU, and has no {name!r}; its names are "
        f"{', '.join(sys.modules[module].__all__)}"
    )


def install() -> None:
    """Let ``import flash_attn``, ``flash_attn.bert_padding``, ``flash_attn.cute`` and ``flash_attn_interface`` find
    the functions of this package.

    Again is no error. RuntimeError, and no change, where one of these is already there.

    >>> install()
    >>> from flash_attn import flash_attn_func
    >>> uninstall()
    """
    if _finder in sys.meta_path:
        return
    for top in TOPS:
        where = _real(top)
        if where is not None:
            raise RuntimeError(f"{top} is there already ({where}), and install() never replaces it")
    sys.meta_path.append(_finder)


def uninstall() -> None:
    """Undo `install`: the names are forgotten; functions that were imported go on working."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in MODULES:
        module = sys.modules.get(name)
        if module is not None and getattr(module.__spec__, "loader", None) is _finder:
            del sys.modules[name]


def _real(top: str) -> str | None:
    """Where a module of that name would come from, if from anywhere."""
    if top in sys.modules:
        return str(getattr(sys.modules[top], "__file__", None) or "in sys.modules")
    spec = find_spec(top)
    return None if spec is None else str(spec.origin or spec.submodule_search_locations)
