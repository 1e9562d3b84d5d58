"""Every command, as a user runs it: a process, a pipe or a terminal, an exit code.

Commands run in processes of their own, because what matters here is what reaches stdout, stderr and the shell.
"""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

import tilefold

pytest.importorskip("typer")
pytest.importorskip("rich")

ENVIRON = {
    k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONWARNINGS")
}
ENVIRON |= {"TERM": "xterm-256color"}
COMMAND = [sys.executable, "-W", "ignore", "-m", "tilefold"]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ANY_FRAME = re.compile("[\u2500-\u257f]")


def tilefold_command(*args, cwd=None, **environ):
    return subprocess.run(
        [*COMMAND, *map(str, args)], env=ENVIRON | environ, cwd=cwd, capture_output=True, text=True
    )


def on_terminal(*args, **environ):
    """What the command writes to a terminal 120 columns wide."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        child = subprocess.Popen(
            [*COMMAND, *args],
            env=ENVIRON | {"COLUMNS": "120"} | environ,
            stdout=theirs,
            stderr=theirs,
            stdin=theirs,
        )
        os.close(theirs)
        written = b""
        while chunk := _read(screen):
            written += chunk
        assert child.wait() == 0
    return written.decode()


def _read(screen):
    try:
        return screen.read(4096)
    except OSError:  # the other end is closed
        return b""


def test_version():
    assert tilefold_command("--version").stdout == f"tilefold {tilefold.__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_names_every_command(args):
    answer = tilefold_command(*args)
    assert answer.returncode == 0
    for name in ("bench", "run", "view", "explain", "doctor", "verify", "case"):
        assert re.search(rf"^ +{name} .*[.]$", answer.stdout, re.M), name


def test_a_pipe_gets_plain_text():
    for args in (["--help"], ["run", "--help"], ["doctor"], ["case", "h1 q3 k3 d2"]):
        answer = tilefold_command(*args, FORCE_COLOR="")
        assert answer.returncode == 0
        assert not COLOUR.search(answer.stdout), args
        assert not ANY_FRAME.search(answer.stdout), args
        assert answer.stderr == ""


def test_a_terminal_gets_colour_unless_it_asks_for_none():
    assert COLOUR.search(on_terminal("doctor"))
    colours = set(COLOUR.findall(on_terminal("doctor", NO_COLOR="1"))) - {"\x1b[0m"}
    assert not any(re.search(r"\b(3|4|9|10)\d", c) for c in colours), colours


def test_doctor():
    lines = tilefold_command("doctor", TILEFOLD_NUM_THREADS="3").stdout.splitlines()
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines)
    assert facts["tilefold"] == tilefold.__version__
    assert re.match("present|missing: .", facts["native core"])
    assert "numpy" in facts["backends"]
    assert facts["TILEFOLD_NUM_THREADS"] == "3"


def test_the_warning_of_a_missing_core_is_said_once():
    answer = subprocess.run(
        [sys.executable, "-m", "tilefold", "doctor"], env=ENVIRON, capture_output=True, text=True
    )
    assert answer.stderr.count("runs without its native core") == int("missing:" in answer.stdout)


def test_verify():
    answer = tilefold_command("verify")
    assert answer.returncode == 0, answer.stdout
    assert re.search(r"all \d+ cases are right", answer.stdout)
    assert "float16 " in answer.stdout


def test_case():
    answer = tilefold_command("case", "float32 h4/2 q37 k53 d8 v5 causal softcap=20 seed=7")
    assert answer.returncode == 0
    assert "problem  float32 b1 h4/2 q37 k53 d8 v5 band=-,0,16 softcap=20" in answer.stdout
    assert re.findall(r"^(\w+) +error", answer.stdout, re.M) == ["out", "lse", "dq", "dk", "dv"]


@pytest.mark.parametrize(
    ("command", "says"), [("case", "out of budget"), ("verify", "2 of 2 cases are WRONG")]
)
def test_wrong_results_are_exit_1(command, says):
    code = f"""
from tilefold.bench import budgets
from tilefold.cli import verify
budgets.FACTOR = -1e9
verify.DTYPES, verify.FEATURES = ("float32", "float64"), ["h2 q9 k9 d4"]
from tilefold.cli import main
main(["{command}", *(["h1 q3 k3 d2"] if "{command}" == "case" else [])])
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=ENVIRON, capture_output=True, text=True
    )
    assert answer.returncode == 1, answer.stderr
    assert says in answer.stdout


def test_explain_a_shape():
    answer = tilefold_command("explain", "--shape", "b1 h8/2 q4096 k4096 d64 float16", "--causal")
    assert answer.returncode == 0
    assert "float16 b1 h8/2 q4096 k4096 d64 band=-,0,0" in answer.stdout
    assert re.search(r"^backend +\w", answer.stdout, re.M)
    assert "GFLOP" in answer.stdout


def test_explain_needs_no_memory_for_its_shape():
    answer = tilefold_command("explain", "--shape", "h64 n1000000 d128", "--window", "1023,0")
    assert answer.returncode == 0, answer.stderr
    assert "TiB" in answer.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run", "--nonsense"], "No such option"),
        (["run"], "Missing"),
        (["explain"], "either files"),
        (["explain", "--shape", "h8 q4 k4 d2 causal"], "'causal' is an option of its own"),
        (["explain", "--shape", "h8 q4 k4 d2", "--window", "5"], "--window must be LEFT,RIGHT"),
        (["explain", "--shape", "h3/2 q4 k4 d2"], "multiple of the number of key heads"),
        (["explain", "--shape", "h2 q4 k4 d2", "--prefix", "3"], "--prefix widens"),
        (["explain", "--shape", "h2 q4 k4 d2", "--anchors", "3"], "--anchors stay"),
        (["explain", "--shape", "h2 q4 k4 d2", "--backend", "abacus"], "backend must be"),
        (["explain", "--shape", "h2 q4 k4 d2", "--backend", "numpy", "--invariant"], "refuses"),
        (["case", "h1 q3 elephants"], "'elephants' is not a word"),
        (["bench", "--shapes", "h1"], "nothing to compute"),
        (["bench", "--dtype", "int8"], "dtype must be"),
        (["bench", "--rounds", "0"], "--rounds must be at least 1"),
        (["bench", "--plot", "x.gif"], ".svg"),
        (["bench", "--json", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_a_wrong_question_is_one_sentence(args, says):
    answer = tilefold_command(*args)
    assert answer.returncode == 2
    assert answer.stderr.startswith("tilefold: ")
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not ANY_FRAME.search(answer.stderr)


def test_bench(tmp_path):
    args = ["--shapes", "h2,n64,d8 h4/2,q9,k70,d8,causal h1,n64,d8,causal,window=9,0", "--rounds", "2"]
    answer = tilefold_command("bench", *args, "--json", "all.json", "--plot", "all.svg", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "matrix product" in answer.stdout
    rows = re.findall(r"^(\S+) +(naive|tilefold) .* x$", answer.stdout, re.M)
    assert len(rows) == 6
    everything = json.loads((tmp_path / "all.json").read_text())
    ours = [r for r in everything["results"] if r["by"] in ("naive", "tilefold")]
    assert all(len(r["seconds"]) == 2 and r["error"]["ok"] and r["bytes"] > 0 for r in ours)
    assert everything["machine"]["cpu"]
    assert everything["command"].startswith("tilefold bench --shapes")
    assert everything["peak"]["gflops"] > 0
    assert "<svg" in (tmp_path / "all.svg").read_text()


def test_bench_states_no_speedup_for_a_wrong_result():
    code = """
import dataclasses
from tilefold.bench import peers, report, scenarios, timing
wrong = dataclasses.replace(peers.FLASH, to_numpy=lambda out, dtype: out + 1e-3)
cases = scenarios.parse_all("h1,n40,d8", "float32")
run = timing.measure(cases, "float32", 1, lambda words: None, [peers.NAIVE, wrong])
print("\\n".join([*report.table(run).plain(), *report.notes(run)]))
assert [run.speedup(m) for m in run.measured] == [1.0, None]
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=ENVIRON, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert re.search("tilefold.*WRONG$", answer.stdout, re.M)
    assert "1 results are out of their error budget" in answer.stdout


def test_bench_survives_another_library_that_fails():
    from tilefold.bench import peers, scenarios, timing

    def build(scenario, inputs):
        raise RuntimeError("no such kernel\nat line 1")

    broken = peers.Peer("broken", lambda: None, lambda s: None, build, lambda out, dtype: out, foreign=True)
    measured = timing.measure(
        scenarios.parse_all("h1,n8,d4", "float32"), "float32", 1, lambda words: None, [broken]
    )
    assert [m.refusal for m in measured.measured] == ["failed: no such kernel"]


def test_scenarios_count_visible_cells_and_check_rows():
    from tilefold.bench.scenarios import Scenario

    assert Scenario.parse("h2,q3,k5,d4,causal").gflop * 1e9 == 2 * (3 + 4 + 5) * 2 * 8
    long = Scenario.parse("h1,n400,d4,causal,window=7,0")
    inputs = long.inputs()
    out = tilefold.attention(*inputs, window=(7, 0))
    assert long.check(inputs, out).ok
    out[0, 399] += 1e-3
    assert not long.check(inputs, out).ok


def test_ctrl_c_is_130():
    child = subprocess.Popen(
        [*COMMAND, "bench", "--rounds", "1000000"],
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it has begun
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert errors == "tilefold: interrupted\n"


def test_without_typer_it_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(name='typer')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    answer = tilefold_command("doctor", PYTHONPATH=path)
    assert answer.returncode == 2
    assert answer.stderr == "tilefold: the command line needs typer and rich: pip install 'tilefold[cli]'\n"


def test_run_and_doctor_import_nothing_heavy(tmp_path):
    code = """
import sys
from tilefold.cli import main
try:
    main(["doctor"])
finally:
    print("HEAVY", sorted({"matplotlib", "torch", "jax", "safetensors"} & set(sys.modules)))
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=ENVIRON, capture_output=True, text=True
    )
    assert "HEAVY []" in answer.stdout


def test_the_founding_benchmark_needs_numpy_alone():
    code = """
import sys
from tilefold import benchmark_flash_attention
from tilefold.bench import founding
founding.LENGTHS, founding.BUDGET = (64, 128), 0
benchmark_flash_attention()
assert not {"rich", "typer"} & set(sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=ENVIRON, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert "projection, not measured" in answer.stdout
    assert re.search(r"^1,048,576 .*TiB", answer.stdout, re.M)
