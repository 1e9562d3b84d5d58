"""Without a compiler tilefold still installs, works on NumPy, and says what is missing.

The interpreters below run with -S: an editable installation hooks into the import of tilefold through a .pth file,
and would answer in place of the wheel under test.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is not installed")
pytest.importorskip("nanobind", reason="the build backend needs nanobind")

ROOT = Path(__file__).parents[2]
ENVIRON = {k: v for k, v in os.environ.items() if not k.startswith("TILEFOLD_")}
ENVIRON |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def pip(*args: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, args)],
        cwd=ROOT,
        env=ENVIRON | environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Arguments of a build without a compiler. Its own folder, because CMake remembers a compiler once found."""
    folder = tmp_path_factory.mktemp("no_compiler")
    settings = ["--no-build-isolation", "--no-deps", "--config-settings", f"build-dir={folder}/build"]
    return folder, ["wheel", ".", *settings, "--wheel-dir", folder]


@pytest.fixture(scope="module")
def python(build):
    """Run Python with nothing but the wheel and its dependencies in sight."""
    folder, wheel = build
    built = pip(*wheel, CC="/bin/false", CXX="/bin/false")
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("tilefold-*.whl")
    assert file.name.endswith("-none-any.whl")
    installed = pip("install", "--no-deps", "--no-index", "--target", folder / "site", file)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    path = os.pathsep.join([f"{folder}/site", sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])

    def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", *args],
            cwd=folder,
            env=ENVIRON | {"PYTHONPATH": path} | environ,
            capture_output=True,
            text=True,
        )

    return run


def test_build_fails_where_the_native_core_is_asked_for(build):
    _, wheel = build
    assert pip(*wheel, CC="/bin/false", CXX="/bin/false", TILEFOLD_BACKEND="native").returncode != 0


def test_import_warns_once(python):
    code = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import tilefold, tilefold.api
(warning,) = [w for w in seen if "native core" in str(w.message)]
assert issubclass(warning.category, RuntimeWarning), warning.category
"""
    answer = python("-c", code)
    assert answer.returncode == 0, answer.stderr


def test_attention_works(python):
    code = """
import numpy as np
import tilefold
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
weights = np.exp(q @ k.mT / 2)
np.testing.assert_allclose(tilefold.attention(q, k, v), weights / weights.sum(-1, keepdims=True) @ v)
"""
    answer = python("-W", "ignore", "-c", code)
    assert answer.returncode == 0, answer.stderr


def test_doctor_says_what_is_missing(python):
    answer = python("-m", "tilefold", "doctor")
    lines = answer.stdout.lower().splitlines()
    assert any("native core" in line and "missing" in line for line in lines), answer


def test_native_backend_is_an_import_error(python):
    answer = python("-c", "import tilefold", TILEFOLD_BACKEND="native")
    assert answer.returncode != 0
    assert "ImportError" in answer.stderr
