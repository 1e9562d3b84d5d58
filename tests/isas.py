"""Which instruction sets the native core knows, which of them this CPU runs, and how to ask for one.

A machine is forced by the environment and read once per plan, so asking for one means a process of its own.
"""

import os
import platform
import subprocess
import sys
from functools import cache

X86 = ("avx512_amx", "avx512_bf16", "avx512", "avx2") if platform.machine() in ("x86_64", "AMD64") else ()
ARM = ("neon",) if platform.machine() in ("aarch64", "arm64", "ARM64") else ()
MACHINES = (*X86, *ARM, "scalar")  # best first


def python(isa: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an interpreter whose native core is this machine's; the empty name leaves the choice to it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"TILEFOLD_ISA": isa},
        capture_output=True,
        text=True,
    )


@cache
def chosen(isa: str = "") -> subprocess.CompletedProcess[str]:
    """What the core answers when it is asked for a machine: the name of the one that runs, or an error."""
    return python(isa, "-c", "from tilefold import _core; print(_core.isa())")


def why_not(isa: str) -> str:
    """Why this CPU does not run a machine; empty where it does."""
    answer = chosen(isa)
    return "" if answer.returncode == 0 else answer.stderr.strip().rpartition("\n")[2]
