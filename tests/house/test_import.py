"""A cold `import tilefold` is light: NumPy and the standard library, nothing else, and no time to speak of.

Each measurement is a fresh interpreter. What its start-up already loaded (hooks of an editable installation) does not
count.
"""

import os
import subprocess
import sys

import pytest

SECONDS = 0.15  # beyond what NumPy takes
TRIES = 9


def fresh(code: str) -> str:
    """What the code prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def guests(statement: str) -> set[str]:
    """The packages that a statement loads beyond NumPy, tilefold and the standard library."""
    loaded = fresh(
        f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    ).split()
    return {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"numpy", "tilefold"}


def test_a_cold_import_loads_nothing_but_numpy():
    assert guests("import tilefold") == set()


def test_neither_does_a_call():
    call = "import tilefold, numpy; x = numpy.ones((2, 3, 4)); tilefold.attention(x, x, x, causal=True)"
    assert guests(call) == set()


def test_the_check_can_fail():
    assert "pytest" in guests("import tilefold, pytest")


def test_what_is_needed_seldom_is_not_loaded_at_import():
    loaded = fresh("import sys, tilefold; print(*sys.modules)").split()
    assert not {"tilefold.naive", "tilefold.bench", "tilefold.cli"} & set(loaded)


def test_torchs_drop_in_takes_nothing_along_that_torch_did_not():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    loaded = fresh(
        "import sys, torch; before = set(sys.modules); "
        "import tilefold.drop_in.sdpa; print(*(set(sys.modules) - before))"
    )
    assert {name.partition(".")[0] for name in loaded.split()} == {"tilefold"}


def test_import_takes_no_time_to_speak_of():
    """The least of a few measurements: whatever else the machine does only ever adds."""
    code = (
        "import time, numpy; start = time.perf_counter(); import tilefold; print(time.perf_counter() - start)"
    )
    least = float("inf")
    for _ in range(TRIES):
        least = min(least, float(fresh(code)))
        if least < SECONDS:
            return
    pytest.fail(f"import tilefold takes {least:.3f} s beyond NumPy, more than {SECONDS} s")
