"""The arrows between the library's files point one way, from the door down, and frameworks stay at their doors.

Read from the sources with `ast`, so an import inside a function counts too; one under TYPE_CHECKING does not, since it
never runs. A file that has no place in ORDER fails: it must be given one.
"""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "tilefold"

# From the ground up: a file imports only what stands before it. A folder stands for every file in it.
ORDER = [
    *("frameworks", "dtypes", "problem", "layouts", "masks", "tiles"),
    *("scores", "stats", "fold", "replay", "taps", "plan", "backends", "threads", "probes"),
    *("arrays", "caches", "call", "shortcut", "witnesses", "api", "eviction", "watching", "drop_in"),
    *("flash", "naive", "bench", "view", "cli"),
]

# Arrows that point up, each with its reason.
UP = {
    ("plan", "backends"): "choosing walks the table of backends",
    ("plan", "threads"): "a plan is for so many threads",
    ("arrays", "call"): "a framework's own door runs calls, and differentiates them",
    ("probes", "view"): "what was seen shows itself, and keeps itself in a file",
    ("flash", "bench"): "benchmark_flash_attention is one of the founding names",
}

# Packages that nobody needs to have, and where each may be imported: inside a function, so that it stays optional.
ARRAYS = ("arrays/", "backends/triton/", "backends/hopper/", "distributed/", "drop_in/", "bench/peers/")
OPTIONAL = {
    **dict.fromkeys(
        (
            ("torch", "jax", "jaxlib", "tensorflow", "mlx", "cupy", "triton", "transformers")
            + ("onnx", "onnxruntime", "openvino", "zentorch")
        ),
        ARRAYS,
    ),
    **dict.fromkeys(
        ("ml_dtypes", "matplotlib", "threadpoolctl", "psutil"), ("arrays/torch/", "bench/", "view/", "cli/")
    ),
    "plotly": ("view/",),
}
# Files that are themselves imported only when they are needed, inside functions: they import their package at the top.
LAZY = ("arrays/torch/", "drop_in/")
# The command line is an extra as a whole; these it may import as usual.
CLI = {"typer", "rich", "safetensors", "tokenizers"}

NAIVE = ("naive", "bench", "cli")  # the only files that may import the oracle


def arrows(source: str, path: str) -> list[tuple[str, bool]]:
    """(what is imported as a full dotted name, whether inside a function) of a file at `path` below the package."""
    package = ["tilefold", *Path(path).parts[:-1]]
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, inside)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.extend((f"{stem}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
        ):
            name = ast.unparse(node.args[0]).strip("'\"")
            found.append((resolve_name(name, ".".join(package)), inside))
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def idea(dotted: str) -> str | None:
    """The file or folder of the package that a dotted name leads to."""
    parts = dotted.split(".")
    if parts[0] != "tilefold":
        return None
    return parts[1] if len(parts) > 1 else "__init__"


def faults(source: str, path: str) -> list[str]:
    """What is wrong with the imports of one file, in words."""
    here = Path(path).parts[0].removesuffix(".py")
    wrong = []
    if here not in ("__init__", "__main__") and here not in ORDER:
        wrong.append(f"{path} has no place in ORDER")
    for name, inside in arrows(source, path):
        there, top = idea(name), name.split(".")[0]
        if top in OPTIONAL:
            if not path.startswith(OPTIONAL[top]):
                wrong.append(f"{path} imports {top}, which only {', '.join(OPTIONAL[top])} may")
            elif not inside and not path.startswith(LAZY):
                wrong.append(
                    f"{path} imports {top} at its top: an optional package is imported where it is needed"
                )
        elif top in CLI:
            if here != "cli":
                wrong.append(f"{path} imports {top}, which only the command line may")
        elif top not in sys.stdlib_module_names | {"numpy", "tilefold", "__future__"}:
            wrong.append(f"{path} imports {top}, which is not among the packages known here")
        if there is None or there in ("_core", "__version__"):
            if (
                there == "_core"
                and path != "backends/cpu/__init__.py"
                and not path.startswith(("cli", "bench"))
            ):
                wrong.append(f"{path} imports the native core, which only backends/cpu may")
            continue
        lazy = "/".join(name.split(".")[1:3]) + "/"
        if not inside and lazy.startswith(LAZY) and not path.startswith(LAZY):
            wrong.append(f"{path} imports {name} at its top, and with it an optional package")
        if there == "naive" and here not in NAIVE:
            wrong.append(f"{path} imports the oracle, which only {', '.join(NAIVE)} may")
        own = ".".join(["tilefold", *Path(path).parts[:2]]).removesuffix(".py")
        if here == there == "backends" and path != "backends/__init__.py" and not name.startswith(f"{own}."):
            wrong.append(f"{path} imports another backend")
        if (
            here in ORDER
            and there in ORDER
            and ORDER.index(there) > ORDER.index(here)
            and (here, there) not in UP
        ):
            wrong.append(f"{path} imports {there}, which stands above it")
        if here in ORDER and there == "__init__" and ORDER.index(here) < ORDER.index("bench"):
            wrong.append(f"{path} imports the whole package")
    return wrong


FILES = sorted(str(path.relative_to(ROOT).as_posix()) for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_point_down(path):
    assert not faults((ROOT / path).read_text(), path)


def test_every_place_in_the_order_is_taken():
    assert set(ORDER) <= {Path(path).parts[0].removesuffix(".py") for path in FILES}


def test_exceptions_are_still_needed():
    taken = {
        (Path(path).parts[0].removesuffix(".py"), idea(name))
        for path in FILES
        for name, _ in arrows((ROOT / path).read_text(), path)
    }
    assert set(UP) <= taken


@pytest.mark.parametrize(
    ("path", "source", "says"),
    [
        ("fold.py", "import torch", "fold.py imports torch, which only"),
        ("fold.py", "def f():\n    from torch import nn", "fold.py imports torch, which only"),
        (
            "scores.py",
            "import importlib\nimportlib.import_module('jax.numpy')",
            "scores.py imports jax, which only",
        ),
        ("arrays/mlx.py", "import mlx", "at its top"),
        ("arrays/__init__.py", "from . import torch", "at its top"),
        ("api.py", "from .arrays.torch import calls", "at its top"),
        ("cli/app.py", "from ..drop_in.sdpa import use", "at its top"),
        ("bench/case.py", "def f():\n    import torch", "bench/case.py imports torch, which only"),
        ("api.py", "def f():\n    import ml_dtypes", "api.py imports ml_dtypes, which only"),
        ("bench/case.py", "import rich", "which only the command line may"),
        ("call.py", "import scipy.special", "imports scipy, which is not among"),
        ("api.py", "from . import naive", "api.py imports the oracle"),
        ("flash.py", "def f():\n    from .naive import naive", "flash.py imports the oracle"),
        ("backends/numpy.py", "from .cpu import CORE", "imports another backend"),
        ("backends/numpy.py", "from . import cpu", "imports another backend"),
        ("backends/triton/fold.py", "from ..cpu import CORE", "imports another backend"),
        ("fold.py", "from .api import attention", "fold.py imports api, which stands above it"),
        ("dtypes.py", "from . import problem", "dtypes.py imports problem, which stands above it"),
        ("problem.py", "from tilefold.masks import Mask", "problem.py imports masks, which stands above it"),
        ("fold.py", "import tilefold", "fold.py imports the whole package"),
        ("fold.py", "from . import _core", "imports the native core"),
        ("fold.py", "import_module('._core', __package__)", "imports the native core"),
        ("helpers.py", "", "helpers.py has no place in ORDER"),
        ("backends/cpu/taps.py", "from ..numpy import NumpyBackend", "imports another backend"),
    ],
)
def test_the_checker_can_fail(path, source, says):
    assert any(says in fault for fault in faults(source, path))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fold.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan import Plan"),
        ("arrays/mlx.py", "def enter(x):\n    import mlx"),
        ("arrays/torch/calls.py", "import torch"),
        ("api.py", "def f():\n    from .arrays import torch"),
        ("drop_in/sdpa.py", "import torch"),
        ("replay.py", "import numpy as np\nfrom .fold import seeds"),
        ("bench/case.py", "from ..naive import naive"),
        ("backends/cpu/__init__.py", "def load():\n    from ... import _core"),
        ("backends/cpu/__init__.py", "def load():\n    import_module('..._core', __package__)"),
        ("backends/cpu/__init__.py", "from .taps import Told"),
    ],
)
def test_the_checker_can_pass(path, source):
    assert not faults(source, path)
