"""The benchmark's own machinery: peers in processes, scenario sets, roofs, the README's table.

Peers are made up here, in a module that the worker processes import; what real ones compute is checked by every run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import numpy as np
import pytest

from tilefold.backends.cpu import CORE
from tilefold.bench import apart, peaks, quiet, readme, report, sets, threads, timing
from tilefold.bench.peers import FLASH, NAIVE, NAMED, chosen
from tilefold.bench.peers.row import heads_as_rows
from tilefold.bench.scenarios import Scenario, parse_all
from tilefold.naive import naive

MADE_UP = '''
"""Peers that work, fail, end, hang and shout."""
import os, sys, time
import tilefold
from tilefold.bench.peers.row import Peer

def peer(name, build):
    return Peer(name, lambda: None, lambda s: None, build, lambda out, dtype: out, True, f"made_up:{name.upper()}")

def good(scenario, inputs):
    q, k, v, *bias = inputs
    option = {"bias": bias[0]} if bias else {}
    return lambda: tilefold.attention(q, k, v, causal=scenario.is_causal, **option)

def fails(scenario, inputs):
    raise RuntimeError("no such kernel\\nat line 1")

def ends(scenario, inputs):
    print("out of luck", file=sys.stderr)
    os._exit(7)

def hangs(scenario, inputs):
    if scenario.case.heads == 1:
        time.sleep(600)
    return good(scenario, inputs)

def shouts(scenario, inputs):
    print('{"seconds": 1}')
    os.write(1, b"from C\\n")
    return good(scenario, inputs)

def wrong(scenario, inputs):
    return lambda: good(scenario, inputs)() + 1

def counts(scenario, inputs):
    """Its result says how many threads it was given."""
    from tilefold.bench.threads import given
    return lambda: good(scenario, inputs)() * 0 + given()

def tires(scenario, inputs):
    """Fails when it is timed."""
    calls = []
    def call():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("tired")
        return good(scenario, inputs)()
    return call

GOOD, FAILS, ENDS, HANGS = peer("good", good), peer("fails", fails), peer("ends", ends), peer("hangs", hangs)
SHOUTS, WRONG, COUNTS = peer("shouts", shouts), peer("wrong", wrong), peer("counts", counts)
TIRES = peer("tires", tires)
'''


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """The module of peers, here and in every process that is started from here."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delitem(sys.modules, "made_up", raising=False)
    import made_up

    return made_up


def run_of(shapes, peers, rounds=1, **options):
    scenarios = parse_all(shapes, None)
    return timing.measure(scenarios, "float32", rounds, lambda words: None, peers, **options)


def test_a_peer_in_a_process_gives_its_result_and_its_time(made_up):
    pytest.importorskip("ml_dtypes")
    shapes = "b2,h4/2,n9,d4,causal bfloat16,h2,n9,d4 float64,h2,n9,d4,bias=1hqk"
    run = run_of(shapes, [NAIVE, made_up.GOOD, made_up.SHOUTS], rounds=2)
    assert [m.refusal for m in run.measured] == [""] * 9
    assert all(m.ok and len(m.seconds) == 2 and min(m.seconds) > 0 for m in run.measured)
    assert all((m.bytes is None) == (m.peer is not NAIVE) for m in run.measured)


def test_a_peer_that_fails_is_a_sentence(made_up):
    names = ("FAILS", "ENDS", "TIRES", "WRONG")
    run = run_of("h2,n9,d4", [NAIVE, *(getattr(made_up, name) for name in names)])
    refused = {m.peer.name: m.refusal for m in run.measured if m.refusal}
    assert refused == {
        "fails": "failed: no such kernel",
        "ends": "its process ended with code 7: out of luck",
        "tires": "failed: tired",
    }
    assert [m.peer.name for m in run.wrong] == ["wrong"]
    assert run.speedup(run.wrong[0]) is None


def test_a_peer_that_hangs_is_ended_and_may_come_back(made_up, tmp_path):
    stuck, fine = Scenario.parse("h1,n9,d4"), Scenario.parse("h2,n9,d4")
    with apart.Company(1, patience=1.0) as company:
        apart.exchange.put_inputs(tmp_path, stuck.inputs())
        with pytest.raises(apart.Refused, match="no answer within 1 s"):
            company.invite(made_up.HANGS, tmp_path, stuck)
        process = company.processes["hangs"]
        assert process.child is None
        process.patience = 60.0
        apart.exchange.put_inputs(tmp_path, fine.inputs())
        timed = company.invite(made_up.HANGS, tmp_path, fine)
        assert fine.check(fine.inputs(), timed.result).ok
        child = process.child
    assert child.poll() is not None


def test_everyone_gets_as_many_threads(made_up):
    pytest.importorskip("threadpoolctl")
    run = run_of("h1,n4,d4", [made_up.COUNTS], threads=1)
    assert run.peaks.threads == 1
    scenario = run.measured[0].scenario
    right, _ = naive(*scenario.inputs(), dtype=np.float64)
    assert run.measured[0].error.error == pytest.approx(np.abs(1 - right).max())


def test_too_many_threads_are_refused_and_nothing_is_left_behind(monkeypatch):
    monkeypatch.delenv("TILEFOLD_NUM_THREADS", raising=False)
    with pytest.raises(ValueError, match="--threads must be 1 to"), threads.limited(10**6):
        pass
    with threads.limited(None) as count:
        assert os.environ["TILEFOLD_NUM_THREADS"] == str(count) == str(threads.given())
    assert "TILEFOLD_NUM_THREADS" not in os.environ


def test_quiet_waits_for_threads_that_spin_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(quiet, "PATIENCE", 0.2)
    monkeypatch.setattr(quiet, "LOOK", 0.05)  # long enough for the thread to run on a busy machine too
    stop = Event()

    def spin():
        while not stop.is_set():
            pass

    thread = Thread(target=spin)
    thread.start()
    start = perf_counter()
    quiet.quiet()
    waited = perf_counter() - start
    stop.set()
    thread.join()
    assert waited >= 0.2
    monkeypatch.setattr(quiet, "PATIENCE", 60.0)
    quiet.quiet()
    assert perf_counter() - start < 30


@pytest.mark.parametrize("name", [*sets.SETS, "all"])
def test_every_row_of_a_set_can_be_measured(name):
    scenarios = parse_all(None, None, name)
    assert len({s.name for s in scenarios}) == len(scenarios) > 0
    for scenario in scenarios:
        assert scenario.gflop > 0
        assert scenario.is_decode == (name == "decode") or name in ("default", "all")
        for peer in NAMED:
            why = peer.why_not(scenario)
            assert why is None or why.strip() == why != ""
    assert {s.dtype for s in parse_all(None, "float16", name)} == {"float16"}


def test_the_drop_in_takes_part_where_it_is_named():
    assert "drop-in" not in [peer.name for peer in chosen(None)]
    assert [peer.name for peer in chosen("drop-in,torch")] == ["torch", "drop-in"]
    assert [peer.name for peer in chosen(sets.SETS["torch"].peers)] == ["tilefold", "torch", "drop-in"]


def test_the_drop_in_is_right():
    """In its own process, on tensors: outputs and gradients within the budget of arrays."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    run = run_of("h4/2,n40,d8,causal h4,q3,k40,d8,bias=1hqk bfloat16,h2,n40,d8,grad", chosen("drop-in"))
    assert [m.refusal for m in run.measured] == [""] * 3
    assert all(m.ok for m in run.measured)


def test_a_set_or_peer_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match="--set must be default, forward, grad, decode, small, torch or all, got 'large'"
    ):
        parse_all(None, None, "large")
    with pytest.raises(ValueError, match=r"--peers must be some of naive, tilefold, .*; got 'abacus'"):
        chosen("naive,abacus")


def test_scenarios_know_what_they_ask_for():
    decode = Scenario.parse("h32/8,q1,k4096,d128,causal,bfloat16")
    assert decode.dtype == "bfloat16"
    assert decode.sees_all and decode.is_causal and decode.is_decode
    assert decode.kv_bytes == 2 * 8 * 4096 * 128 * 2
    assert Scenario.parse("h8,q1,k4096,d8,window=99,0").kv_bytes == 2 * 8 * 100 * 8 * 4
    assert not Scenario.parse("h1,n4,d4,causal").sees_all


def test_a_bias_is_part_of_what_is_checked():
    scenario = Scenario.parse("h2,n400,d4,bias=1hqk,causal")
    q, k, v, bias = scenario.inputs()
    right = FLASH.build(scenario, (q, k, v, bias))()
    assert scenario.check((q, k, v, bias), right).ok
    without = FLASH.build(Scenario.parse("h2,n400,d4,causal"), (q, k, v))()
    assert not scenario.check((q, k, v, bias), without).ok


def test_heads_that_share_keys_may_be_rows():
    scenario = Scenario.parse("b2,h6/2,q5,k7,d4")
    q, k, v = scenario.inputs()
    as_rows, _ = naive(heads_as_rows(scenario, q), k, v)
    np.testing.assert_allclose(as_rows.reshape(q.shape), naive(q, k, v)[0], rtol=1e-5)


def test_importing_the_rows_imports_no_framework():
    code = "import sys, tilefold.bench.peers, tilefold.bench.worker; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    loaded = set(answer.stdout.split())
    assert "tilefold.bench.worker" in loaded
    assert not {"torch", "jax", "onnx", "onnxruntime", "openvino", "zentorch", "vllm"} & loaded


def test_peaks():
    if not peaks.has_core():
        pytest.skip("the native core, which measures them, is not there")
    rates = {name: CORE.peak(name, 1, 0.01) for name in ("f32", "f64", "bf16_dot", "amx")}
    assert rates["f32"] >= rates["f64"] > 1e8
    assert min(rates.values()) >= 0
    assert CORE.peak("read", 1, 0.01, 2**20) > 1e8
    with pytest.raises(ValueError, match="abacus"):
        CORE.peak("abacus", 1, 0.01)


def test_without_a_core_the_matrix_product_is_the_peak(monkeypatch):
    monkeypatch.setattr(peaks, "CORE", None)
    run = run_of("h1,n40,d8 h1,q1,k40,d8", [NAIVE, FLASH])
    assert [run.peaks.roof(m.scenario) for m in run.measured] == ["blas float32"] * 2 + [None] * 2
    assert run.share(run.measured[0]) > 0
    assert run.share(run.measured[2]) is None
    assert (
        "float32 matrix product of 1024 x 1024 (NumPy's BLAS): what shares refer to" in report.notes(run)[0]
    )


@pytest.fixture
def measured(made_up):
    """A file as `tilefold bench --json` writes it, with a row that is wrong and one that is refused."""
    run = run_of("h2,n9,d4,causal h4/2,q1,k9,d4", [NAIVE, FLASH, made_up.WRONG, made_up.FAILS])
    run.measured[1].seconds[:] = [1.0]  # tilefold loses the first row and wins the second
    run.measured[5].seconds[:] = [1e-6]
    return json.loads(json.dumps(report.as_json(run, ["tilefold", "bench"])))


def test_the_file_has_everything(measured):
    assert measured["threads"] >= 1
    assert measured["peers"]["naive"]["version"] == np.__version__
    first, wrong, refused = (measured["results"][i] for i in (0, 2, 3))
    assert len(first["seconds"]) == 1 and first["error"]["ok"]
    assert measured["peaks"][first["roof"]]["samples"] if first["roof"] else True
    assert not wrong["error"]["ok"] and wrong["times_faster_than_naive"] is None
    assert refused["refusal"] == "failed: no such kernel"


def test_readme_table(measured, tmp_path, capsys):
    text, file = tmp_path / "README.md", tmp_path / "all.json"
    text.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    file.write_text(json.dumps(measured))
    arguments = [str(text), str(file)]
    assert readme.main([*arguments, "--check"]) == 1
    assert "is not what the files say" in capsys.readouterr().err
    assert "old" in text.read_text()
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    made = text.read_text()
    assert made.startswith("before\n<!-- bench -->\n| float32, ")
    assert made.endswith("<!-- /bench -->\nafter\n")
    lost, won = (line for line in made.splitlines() if line.startswith(("| 2 heads", "| decoding")))
    assert lost.startswith("| 2 heads, n 9, d 4, causal | **") and "| 1 s | *wrong* |" in lost
    assert won.startswith("| decoding, 4/2 heads, 9 keys, d 4 | ") and "| **1 µs** | *wrong* |" in won
    assert "fails" not in made.splitlines()[2]
    file.write_text(json.dumps(measured | {"rounds": 99}))
    assert readme.main([*arguments, "--check"]) == 1


def test_a_text_without_markers_is_refused(measured, tmp_path, capsys):
    text, file = tmp_path / "README.md", tmp_path / "all.json"
    text.write_text("no table here\n")
    file.write_text(json.dumps(measured))
    with pytest.raises(SystemExit) as ended:
        readme.main([str(text), str(file)])
    assert ended.value.code == 2
    assert "<!-- bench -->" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("float32 h1 q8192 k8192 d128", "1 head, n 8192, d 128"),
        ("float32 h2 q8 k8 d4 causal window=255,0", "2 heads, n 8, d 4, window 256"),
        ("float32 h2 q8 k8 d4 window=5,5", "2 heads, n 8, d 4, window 5,5"),
        ("float32 b2 h2 q8 k9 d4 v5 bias=1hqk", "batch 2, 2 heads, 8 queries, 9 keys, d 4 and 5, bias"),
    ],
)
def test_a_case_in_words(case, words):
    assert readme.in_words(case) == words


def test_the_readmes_table_is_what_was_measured():
    root = Path(__file__).parents[2]
    assert readme.main([str(root / "README.md"), str(root / "docs" / "bench.json"), "--check"]) == 0
