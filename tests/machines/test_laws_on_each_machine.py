"""The laws of the native core on every other instruction set that this CPU has: the same tests, in a process each.

The machine that runs unasked has them from `tests/laws`. What is compiled once for all machines, as the sharing of work
among threads, is left to it too.
"""

from pathlib import Path

import pytest
from isas import MACHINES, chosen, python, why_not

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

LAWS = Path(__file__).parents[1] / "laws"
CHECKED = (
    "test_same_bits.py",
    "test_cached_bits.py",
    "test_hidden_numbers.py",
    "test_quantised.py",
    "test_probes.py",
)
FILES = [LAWS / name for name in CHECKED]
SHARED = "threads or any_time or batch or packed or invariant or options or any_group"


@pytest.mark.parametrize("isa", MACHINES)
def test_laws(isa):
    if reason := why_not(isa):
        pytest.skip(reason)
    if chosen().stdout.strip() == isa:
        pytest.skip("this machine runs unasked")
    answer = python(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not ({SHARED})", *FILES)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-1000:]
