"""The native core agrees with Python about what a Problem is, and about which machine runs.

The two `Problem`s are compared as text, so both sides must spell an annotation alike.
"""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys

import pytest

from tilefold import problem

core = pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

MACHINES = {"avx512_bf16", "avx512", "avx2", "neon", "scalar"}


def isa(name: str) -> subprocess.CompletedProcess[str]:
    """Ask for a machine in a fresh interpreter, by the environment, as a user does."""
    return subprocess.run(
        [sys.executable, "-c", "from tilefold import _core; print(_core.isa())"],
        env=os.environ | {"TILEFOLD_ISA": name},
        capture_output=True,
        text=True,
    )


def test_version():
    assert core.version() == importlib.metadata.version("tilefold")


def test_problem_fields():
    assert core.problem_fields() == [(f.name, f.type) for f in dataclasses.fields(problem.Problem)]


def test_problem_enums():
    for name, members in core.problem_enums().items():
        assert members == {m.name: m.value for m in getattr(problem, name)}, name
    assert set(core.problem_enums()) == {"Layout", "Has", "Want"}


def test_cpu_features():
    features = core.cpu_features()
    assert all(type(present) is bool for present in features.values())
    if sys.platform == "linux" and "avx2" in features:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next(line for line in cpuinfo if line.startswith("flags")).split()
        assert features == {name: name.replace("512bf", "512_bf") in flags for name in features}


def test_best_machine_is_chosen_unasked(monkeypatch):
    monkeypatch.delenv("TILEFOLD_ISA", raising=False)
    best = core.isa()
    assert best in MACHINES
    assert isa("").stdout.split() == [best]
    if core.cpu_features().get("avx2"):
        assert best != "scalar"


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_forced_machine_runs_or_is_refused(name):
    answer = isa(name)
    if answer.returncode == 0:
        assert answer.stdout.split() == [name]
    else:
        assert f"ValueError: TILEFOLD_ISA={name} is not supported by this CPU" in answer.stderr


def test_scalar_runs_everywhere():
    assert isa("scalar").stdout.split() == ["scalar"]


def test_unknown_machine_is_refused_by_name():
    answer = isa("pentium")
    assert answer.returncode != 0
    assert "ValueError: TILEFOLD_ISA=pentium is not a machine" in answer.stderr
    assert all(name in answer.stderr for name in MACHINES)
