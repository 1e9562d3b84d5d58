"""`tilefold run` is `attention` on files: the same bits, every option, and nothing left behind when it cannot.

The memory of a process is measured from outside, so that nothing of Python is forgotten.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import tilefold as tf

pytest.importorskip("typer")
pytest.importorskip("rich")

COMMAND = [sys.executable, "-W", "ignore", "-m", "tilefold", "run"]


def run(folder, *args):
    return subprocess.run([*COMMAND, *map(str, args)], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """The command in this process, for its exit code and stderr."""
    import tilefold.cli

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(*args):
        with pytest.raises(SystemExit) as end:
            tilefold.cli.main(["run", *map(str, args)])
        return end.value.code, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGTERM, before)


def arrays(q=(4, 300, 16), k=(2, 340, 16), v=(2, 340, 8), dtype=np.float32):
    rng = np.random.default_rng(5)
    return [rng.standard_normal(shape).astype(dtype) for shape in (q, k, v)]


def saved(folder, **given):
    for name, array in given.items():
        np.save(folder / f"{name}.npy", array)


@pytest.fixture
def qkv(tmp_path):
    q, k, v = arrays()
    saved(tmp_path, q=q, k=k, v=v)
    return q, k, v


FILES = ("q.npy", "k.npy", "v.npy", "-o", "out.npy")
IDS = np.repeat([3, 1, 2], [100, 200, 40])
BIAS = np.random.default_rng(1).standard_normal((4, 1, 340)).astype(np.float32)
CELLS = np.random.default_rng(2).random((300, 340)) < 0.5


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([], {}),
        (["--causal"], {"causal": True}),
        (["--causal-top-left"], {"mask": tf.causal(align="top-left")}),
        (["--window", "27,3"], {"window": (27, 3)}),
        (["--window", "-,3"], {"window": (None, 3)}),
        (["--window", "5,none", "--causal"], {"window": (5, None), "causal": True}),
        (["--window", "20,0", "--anchors", "4"], {"mask": tf.anchors(4, 20)}),
        (["--causal", "--prefix", "50"], {"mask": tf.causal() | tf.prefix(50)}),
        (["--chunked", "64", "--causal"], {"mask": tf.chunked(64) & tf.causal()}),
        (["--documents", "ids.npy"], {"mask": tf.documents(IDS)}),
        (["--mask", "cells.npy"], {"mask": CELLS}),
        (["--scale", "0.5", "--softcap", "4"], {"scale": 0.5, "softcap": 4.0}),
        (["--bias", "bias.npy"], {"bias": BIAS}),
        (["--alibi", "0.5,0.25,0.125,1"], {"alibi": [0.5, 0.25, 0.125, 1.0]}),
        (["--sinks", "sinks.npy"], {"sinks": np.arange(4.0)}),
        (["--kv-lengths", "lengths.npy"], {"kv_lengths": np.array(200)}),
        (
            ["--q-lengths", "250", "--kv-lengths", "200", "--causal"],
            {"q_lengths": np.array(250), "kv_lengths": np.array(200), "causal": True},
        ),
        (
            ["--cu-seqlens-q", "0,5,300", "--cu-seqlens-k", "cu.npy", "--causal"],
            {"cu_seqlens_q": np.array([0, 5, 300]), "cu_seqlens_k": np.array([0, 90, 340]), "causal": True},
        ),
        (["--backend", "numpy"], {"backend": "numpy"}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_mean_what_they_mean_to_attention(main, tmp_path, qkv, args, options):
    saved(tmp_path, ids=IDS, bias=BIAS, cells=CELLS, sinks=np.arange(4.0), cu=np.array([0, 90, 340]))
    saved(tmp_path, lengths=np.array(200))
    code, errors = main(*FILES, "--lse", "lse.npy", *args)
    assert (code, errors) == (0, "")
    out, lse = tf.attention(*qkv, **options, return_lse=True)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), out, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "lse.npy"), lse, rtol=1e-5, atol=1e-6)


def test_panels_are_the_same_bits(main, tmp_path, monkeypatch):
    """Panels begin on the plan's blocks, so even BLAS sees the same products."""
    q, k, v = arrays((2, 3000, 16), (2, 700, 16), (2, 700, 16))
    saved(tmp_path, q=q, k=k, v=v)
    assert main(*FILES, "--causal") == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), tf.attention(q, k, v, causal=True))


def test_flat_arrays_and_nothing_at_all(main, tmp_path):
    for shapes in [
        ((30, 4), (20, 4), (20, 4)),
        ((2, 0, 4), (2, 5, 4), (2, 5, 4)),
        ((2, 5, 4), (2, 0, 4), (2, 0, 4)),
    ]:
        q, k, v = arrays(*shapes)
        saved(tmp_path, q=q, k=k, v=v)
        assert main(*FILES) == (0, "")
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), tf.attention(q, k, v), rtol=1e-6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(main, tmp_path, save):
    q, k, v = arrays()
    save(tmp_path / "all.npz", q=q, k=k, v=v, other=q * 2)
    np.savez(tmp_path / "one.npz", anything=k)
    expected = tf.attention(q, k, v)
    assert main("all.npz", "-o", "a.npy") == (0, "")
    assert main("all.npz:q", "one.npz", "all.npz:v", "-o", "b.npy") == (0, "")
    assert main("all.npz:other", "one.npz", "all.npz:v", "-o", "c.npy") == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), expected)
    np.testing.assert_array_equal(np.load(tmp_path / "c.npy"), tf.attention(q * 2, k, v))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_safetensors(main, tmp_path, dtype):
    pytest.importorskip("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from safetensors import safe_open
    from safetensors.numpy import save_file

    q, k, v = arrays(dtype=ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    save_file({"q": q, "k": k, "v": v, "x": q}, tmp_path / "all.safetensors")
    assert main("all.safetensors", "-o", "out.safetensors", "--lse", "lse.npy") == (0, "")
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        out = file.get_tensor("out")
    assert out.dtype == q.dtype
    np.testing.assert_array_equal(out, tf.attention(q, k, v))
    assert np.load(tmp_path / "lse.npy").shape == (4, 300)


def test_bfloat16_does_not_fit_into_npy(main, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    save_file = pytest.importorskip("safetensors.numpy").save_file
    q, k, v = arrays(dtype=ml_dtypes.bfloat16)
    save_file({"q": q, "k": k, "v": v}, tmp_path / "all.safetensors")
    code, errors = main("all.safetensors", "-o", "out.npy")
    assert code == 2
    assert ".safetensors" in errors
    saved(tmp_path, q=q, k=k, v=v)
    code, errors = main(*FILES)
    assert code == 2
    assert "without a type" in errors


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_npz(folder):
    (folder / "q.npz").write_bytes(b"PK\3\4 but no more")


def spoil_safetensors(folder):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({"q": arrays()[0]}, folder / "q.safetensors")
    cut(folder / "q.safetensors")


@pytest.mark.parametrize(
    ("spoil", "args", "says"),
    [
        (lambda d: (d / "k.npy").unlink(), FILES, "k.npy: No such file"),
        (lambda d: cut(d / "k.npy"), FILES, "k: k.npy: "),
        (lambda d: (d / "v.npy").write_bytes(b""), FILES, "v: v.npy: "),
        (lambda d: (d / "v.npy").write_bytes(b"not an array at all"), FILES, "v: v.npy: "),
        (lambda d: np.save(d / "v.npy", np.array([{}]), allow_pickle=True), FILES, "v: v.npy: "),
        (lambda d: np.save(d / "k.npy", arrays()[1][:, :-1]), FILES, "same heads and length"),
        (lambda d: np.save(d / "q.npy", arrays()[0].astype(int)), FILES, "q must be float16"),
        (lambda d: np.save(d / "k.npy", arrays()[1].astype(float)), FILES, "one dtype"),
        (spoil_npz, ("q.npz", *FILES[1:]), "q: q.npz: "),
        (spoil_safetensors, ("q.safetensors", *FILES[1:]), "q: q.safetensors: is cut short"),
        (lambda d: np.savez(d / "q.npz", a=1, b=2), ("q.npz", *FILES[1:]), "has no array 'q'; it holds a, b"),
        (
            lambda d: np.savez(d / "q.npz", a=1, b=2),
            ("q.npz:c", *FILES[1:]),
            "has no array 'c'; it holds a, b",
        ),
        (lambda d: None, ("q.txt", *FILES[1:]), "'q.txt' is no .npy"),
        (lambda d: None, ("q.npy", "-o", "out.npy"), "give three files"),
        (lambda d: None, ("q.npy", "k.npy", "-o", "out.npy"), "give three files"),
        (lambda d: None, (*FILES[:-1], "out.csv"), "written as .npy or .safetensors"),
        (lambda d: None, (*FILES[:-1], "nowhere/out.npy"), "there is no folder 'nowhere'"),
        (lambda d: None, (*FILES[:-1], "q.npy"), "replace one of the inputs"),
        (lambda d: (d / "out.npy").mkdir(), FILES, "is a folder"),
        (lambda d: None, (*FILES, "--lse", "./out.npy"), "one file"),
        (lambda d: None, (*FILES, "--kv-lengths", "999"), "within 0 and 340"),
        (lambda d: None, (*FILES, "--kv-lengths", "1.5"), "neither a file nor int numbers"),
        (lambda d: None, (*FILES, "--sinks", "1,2"), "sinks must have shape (4,)"),
        (lambda d: None, (*FILES, "--window", "-3,0"), "--window must be LEFT,RIGHT"),
        (lambda d: None, (*FILES, "--backend", "numpy", "--invariant"), "refuses"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_no_file(main, tmp_path, qkv, spoil, args, says):
    spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, errors = main(*args)
    assert code == 2
    assert says in errors
    assert errors.startswith("tilefold: ")
    assert errors.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_an_error_before_any_work(main, tmp_path, qkv, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert main(*FILES) == (2, "tilefold: out.npy: No space left on device\n")
    assert not list(tmp_path.glob("*out*"))


def test_an_error_in_the_middle_leaves_the_old_result(main, tmp_path, qkv, monkeypatch):
    from tilefold.call import Call

    (tmp_path / "out.npy").write_text("old")

    def fails(self, rows=None):
        raise MemoryError("no room for a tile")

    monkeypatch.setattr(Call, "fold", fails)
    assert main(*FILES, "--lse", "lse.npy") == (2, "tilefold: not enough memory: no room for a tile\n")
    assert (tmp_path / "out.npy").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.npy", "out.npy", "q.npy", "v.npy"]


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_killed_in_the_middle(tmp_path, sign, code):
    q = np.zeros((8, 30000, 32), np.float32)
    saved(tmp_path, q=q, k=q, v=q)
    child = subprocess.Popen([*COMMAND, *FILES], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not list(tmp_path.glob(".out.npy.*")) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(sign)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == code
    assert "Traceback" not in errors
    assert not (tmp_path / "out.npy").exists()
    if sign != signal.SIGKILL:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["k.npy", "q.npy", "v.npy"]


def test_a_result_has_the_permissions_of_any_new_file(main, tmp_path, qkv):
    assert main(*FILES)[0] == 0
    (tmp_path / "other").touch()
    assert (tmp_path / "out.npy").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_long_run_stays_small(tmp_path):
    """Twelve heads of 16384 rows: the score matrix would take 12 GiB. The window keeps the test short."""
    q, k, v = arrays(*[(12, 16384, 32)] * 3)
    saved(tmp_path, q=q, k=k, v=v)
    code = """
import sys
from tilefold.cli import main
try:
    main(sys.argv[1:])
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, "run", *FILES, "--window", "100,0"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout.split()[-2]) * 1024 < 200e6
