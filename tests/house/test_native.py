"""The native core agrees with Python about what a Problem is, and about which machine runs.

The two `Problem`s are compared as text, so both sides must spell an annotation alike.
"""

import dataclasses
import importlib.metadata
import sys

import pytest
from isas import MACHINES, chosen

from tilefold import problem

core = pytest.importorskip("tilefold._core", reason="tilefold was installed without its native core")

# Features as Linux spells them, where that is more than one flag or another word.
FLAGS = {"avx512bf16": ["avx512_bf16"], "amx": ["amx_tile", "amx_bf16", "amx_int8"]}


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
        assert features == {name: set(FLAGS.get(name, [name])) <= set(flags) for name in features}


def test_best_machine_is_chosen_unasked(monkeypatch):
    monkeypatch.delenv("TILEFOLD_ISA", raising=False)
    best = core.isa()
    assert best in MACHINES
    assert chosen().stdout.split() == [best]
    features = core.cpu_features()
    if features.get("avx2") or features.get("neon"):
        assert best != "scalar"


@pytest.mark.parametrize("name", MACHINES)
def test_forced_machine_runs_or_is_refused(name):
    answer = chosen(name)
    if answer.returncode == 0:
        assert answer.stdout.split() == [name]
    else:
        assert f"ValueError: TILEFOLD_ISA={name} is not supported by this CPU" in answer.stderr


def test_scalar_runs_everywhere():
    assert chosen("scalar").stdout.split() == ["scalar"]


def test_unknown_machine_is_refused_by_name():
    answer = chosen("pentium")
    assert answer.returncode != 0
    assert "ValueError: TILEFOLD_ISA=pentium is not a machine" in answer.stderr
    assert all(name in answer.stderr for name in MACHINES)
