"""`tilefold view`, as a user runs it: files in, pictures out, one sentence where something is wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest

import tilefold as tf
from tilefold.view import page, statistics

pytest.importorskip("typer")
pytest.importorskip("plotly", reason="plotly is not installed")


@pytest.fixture
def view(tmp_path):
    q, k = np.random.default_rng(0).normal(size=(2, 2, 30, 8)).astype(np.float32)
    np.savez(tmp_path / "qk.npz", q=q, k=k)
    np.save(tmp_path / "q.npy", q)
    np.save(tmp_path / "k.npy", k)

    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "tilefold", "view", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    run.q, run.k, run.folder = q, k, tmp_path
    return run


def files(view):
    return {path.name for path in view.folder.iterdir()} - {"qk.npz", "q.npy", "k.npy"}


def test_files_become_the_page_of_their_probe(view):
    said = view("qk.npz", "--causal", "--scale", "0.25", "--top", "3", "--title", "Mine")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("view.html: ")
    seen = tf.probe(view.q, view.k, *statistics(30, 30, top=3), causal=True, scale=0.25)
    assert (view.folder / "view.html").read_text() == page(seen, title="Mine")
    assert (
        view(
            "q.npy",
            "k.npy",
            "--causal",
            "--scale",
            "0.25",
            "--top",
            "3",
            "--title",
            "Mine",
            "--html",
            "b.html",
        ).returncode
        == 0
    )
    assert (view.folder / "b.html").read_bytes() == (view.folder / "view.html").read_bytes()
    assert files(view) == {"view.html", "b.html"}


def test_what_was_saved_is_shown(view):
    seen = tf.probe(view.q, view.k, *statistics(30, 30), causal=True)
    seen.save(view.folder / "seen.npz")
    words = [f"w{i}" for i in range(30)]
    (view.folder / "words.txt").write_text("\n".join(words) + "\n")
    (view.folder / "words.json").write_text(json.dumps(words))
    for name in ("words.txt", "words.json"):
        said = view("seen.npz", "--tokens", name, "--html", "p.html")
        assert said.returncode == 0, said.stderr
        assert (view.folder / "p.html").read_text() == page(seen, tokens=words)


def test_figures_are_written_where_asked(view):
    said = view("qk.npz", "--png", "a.png", "--svg", "a.svg", "--head", "1", "--width", "3")
    assert said.returncode == 0, said.stderr
    assert files(view) == {"a.png", "a.svg"}
    assert (view.folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (view.folder / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("q.npy",),
            "give two files, Q K, or one .npz or .safetensors that holds arrays named q and k, or a saved Seen",
        ),
        (("qk.npz", "--html", "qk.npz"), "a result would replace one of the inputs"),
        (("qk.npz", "--html", "no/a.html"), "no/a.html: there is no folder 'no'"),
        (("qk.npz", "--png", "a.svg"), "--png must end in .png, got 'a.svg'"),
        (
            ("qk.npz", "--png", "a.png", "--head", "2"),
            "picture: there is no head 2; there are 2, counted from 0",
        ),
        (("none.npz",), "none.npz: No such file or directory"),
        (("qk.npz", "--tokens", "q.npy"), "--tokens: q.npy: 'utf-8' codec can't decode"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(view, arguments, says):
    said = view(*arguments)
    assert said.returncode == 2
    assert said.stderr.startswith(f"tilefold: {says}") and said.stderr.count("\n") == 1
    assert files(view) == set()


def test_options_of_a_call_do_not_fit_what_was_seen(view):
    tf.probe(view.q, view.k, tf.entropy()).save(view.folder / "seen.npz")
    said = view("seen.npz", "--causal")
    assert (said.returncode, said.stdout) == (2, "")
    assert "seen.npz holds statistics, to which masks and scores have been applied" in said.stderr
