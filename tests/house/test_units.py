"""What the compiler made of the native core: no unit leaks code that was meant for one machine, and all of it is small.

A weak symbol of a unit that was compiled for AVX-512 may be the one that the linker keeps for everybody, so units have
none. The objects are those of an editable installation, which leaves its build folder behind.
"""

import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

core = pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

ROOT = Path(__file__).parents[2]
UNITS = sorted(path.stem for path in (ROOT / "native" / "isa").glob("*.cpp"))
OBJECTS = {path.name.partition(".")[0]: path for path in ROOT.glob("build/*/CMakeFiles/*.dir/native/isa/*.o")}


def weak_symbols(path: Path) -> list[str]:
    """Functions of which the linker keeps one for all units that have them."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("there is no nm to read object files with")
    lines = subprocess.run([nm, "-C", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if " W " in line]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_has_no_weak_symbols(unit):
    if unit not in OBJECTS:
        pytest.skip("no build folder holds this unit: not an editable installation, or not this CPU's kind")
    assert weak_symbols(OBJECTS[unit]) == []


def test_a_weak_symbol_would_be_seen():
    """The door to Python is full of them."""
    doors = list(ROOT.glob("build/*/CMakeFiles/*.dir/native/module.cpp.o"))
    if not doors:
        pytest.skip("no build folder: not an editable installation")
    assert weak_symbols(doors[0])


def test_the_extension_is_small():
    """In memory and in a wheel."""
    code = Path(core.__file__).read_bytes()
    assert len(code) < 8e6
    assert len(zlib.compress(code, 9)) < 2e6
