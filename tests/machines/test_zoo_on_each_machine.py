"""The whole zoo forward on every instruction set that this CPU has, against the oracle, in one process per machine.

A machine that the CPU lacks is skipped with the reason, so that green never means that nothing ran.
"""

from pathlib import Path

import numpy as np
import pytest
from cases import FORWARD, ZOO
from isas import MACHINES, chosen, python, why_not
from oracle import complaint, judged

pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

CHILD = Path(__file__).with_name("fold_the_zoo.py")


@pytest.mark.parametrize("isa", MACHINES)
def test_zoo(isa, tmp_path):
    if reason := why_not(isa):
        pytest.skip(reason)
    answer = python(isa, "-W", "ignore", CHILD, tmp_path / "results.npz")
    last = (answer.stdout.splitlines() or ["nothing"])[-1]
    assert answer.returncode == 0, f"ended with {answer.returncode} at {last!r}\n{answer.stderr}"
    with np.load(tmp_path / "results.npz") as results:
        assert {str(results[name]) for name in results if name.startswith("isa")} == {isa}
        found = [
            complaint(text, judged(text, results[f"out{n}"], results[f"lse{n}"]))
            for n, text in enumerate([*ZOO, *FORWARD])
        ]
    assert not any(found), "\n".join(filter(None, found))


def test_the_best_machine_was_among_them():
    assert why_not(chosen().stdout.strip()) == ""
