"""What the texts show is true: the Python of README and docs runs as it stands, and so do docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import tilefold

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {
    "torch",
    "jax",
    "transformers",
    "ml_dtypes",
    "typer",
    "rich",
    "matplotlib",
    "plotly",
    "safetensors",
    "tokenizers",
}


def blocks(text: str) -> list[tuple[int, str]]:
    """(line number, source) of each fenced block of Python."""
    fences = re.finditer(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [
        (text.count("\n", 0, m.start(2)) + 1, re.sub(f"^{m[1]}", "", m[2], flags=re.MULTILINE))
        for m in fences
    ]


def execute(text: str, name: str) -> int:
    """Run every block as a reader would, one after the other in one session; how many there were."""
    session: dict[str, object] = {"__name__": "__main__"}
    found = blocks(text)
    for line, source in found:
        exec(compile("\n" * (line - 1) + source, name, "exec"), session)
    return len(found)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)
def test_texts_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    try:
        shown = execute(text.read_text(), str(text))
        assert shown or text != README
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{text.name} shows {missing.name}, which is not installed")


def test_blocks_are_found_and_can_fail():
    text = "a\n```python\nx = 1\n```\nb\n```bash\nexit 1\n```\n  ```python\n  assert x == 2\n  ```\n"
    assert [line for line, _ in blocks(text)] == [3, 10]
    with pytest.raises(AssertionError) as failed:
        execute(text, "text")
    assert failed.traceback[-1].lineno == 9
    assert execute(text.replace("2", "1"), "text") == 2


def modules() -> list[str]:
    """Every module of the library; the compiled core has no docstrings to run, and a __main__ would run itself."""
    found = pkgutil.walk_packages(tilefold.__path__, "tilefold.", onerror=lambda name: None)
    return ["tilefold", *(m.name for m in found if not m.name.endswith(("._core", ".__main__")))]


@pytest.mark.parametrize("name", modules())
def test_docstrings_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {missing.name}, which is not installed")
    names = vars(tilefold) | vars(module) | {"np": np, "tf": tilefold, "tilefold": tilefold}
    runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs=names):
        runner.run(example, out=report.append)
    failed = runner.summarize(verbose=False).failed
    missing = re.findall(r"ModuleNotFoundError: No module named '(\w+)'", "".join(report))
    if failed and missing and set(missing) <= OPTIONAL:
        pytest.skip(f"{name} shows {missing[0]}, which is not installed")
    assert not failed, "".join(report)


def test_the_public_surface_is_documented_by_example():
    """Each function at the door shows a call that was run above."""
    silent = {"benchmark_flash_attention"}  # prints measurements, different each time
    for name in tilefold.__all__:
        thing = getattr(tilefold, name)
        if callable(thing) and not isinstance(thing, type) and name not in silent:
            assert ">>>" in (thing.__doc__ or ""), f"{name} shows no example"
