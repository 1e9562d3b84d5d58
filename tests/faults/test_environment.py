"""Words in the environment: a wrong one is an error that names its variable, at the first call and not at the import.

An import that fails for a variable nobody thinks of any more would take down programs that never call.
"""

import platform
import sys

import pytest
from faults.fresh import python
from isas import MACHINES, why_not

pytest.importorskip("tilefold._core", reason="the words are the native core's")

CALLS = """
def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"
print("imported")
for call in (
    lambda: tf.attention(q, k, v),
    lambda: tf.attention(q, k, v, causal=True, return_lse=True),
    lambda: tf.explain(q, k, v),
):
    print(outcome(call))
"""


def first_words(**environ):
    """What the first calls of a fresh process say."""
    imported, *said = python(CALLS, **environ).splitlines()
    assert imported == "imported"
    return said


def test_without_a_word_all_is_well():
    assert first_words() == ["done"] * 3


@pytest.mark.parametrize(
    "word", ["many", "0", "-1", "4097", "2.5", "2,3", "99999999999999999999", "0x10", "two 2"]
)
def test_threads_that_are_no_number(word):
    for said in first_words(TILEFOLD_NUM_THREADS=word):
        assert said == (
            f"ValueError: TILEFOLD_NUM_THREADS={word} is not a number of threads; "
            "expected an integer from 1 to 4096"
        )


def test_the_callers_word_wins_over_a_wrong_one():
    assert python("tf.set_num_threads(2); check()", TILEFOLD_NUM_THREADS="many") == ""


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({"TILEFOLD_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"TILEFOLD_NUM_THREADS": " 3 "}, 3),
        ({"TILEFOLD_NUM_THREADS": "4096", "OMP_NUM_THREADS": "many"}, 4096),
        ({"TILEFOLD_NUM_THREADS": "", "OMP_NUM_THREADS": "5,4"}, 5),
    ],
    ids=str,
)
def test_threads(environ, count):
    assert python("print(tf.get_num_threads()); check()", **environ) == f"{count}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processors a process may use")
@pytest.mark.parametrize("word", ["", "many"])
def test_threads_are_the_processors_of_the_process(word):
    """A word of OpenMP's that means nothing is OpenMP's affair."""
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(tf.get_num_threads())
check()
"""
    assert python(code, OMP_NUM_THREADS=word) == "1\n"


def test_a_machine_that_does_not_exist():
    for said in first_words(TILEFOLD_ISA="pentium"):
        assert said.startswith("ValueError: TILEFOLD_ISA=pentium is not a machine; expected one of: ")
        assert set(MACHINES) <= set(said.partition(" of: ")[2].split())


@pytest.mark.parametrize("isa", MACHINES)
def test_machines_that_exist(isa):
    reason = why_not(isa)
    for said in first_words(TILEFOLD_ISA=isa):
        if reason:
            assert said.startswith(
                f"ValueError: TILEFOLD_ISA={isa} is not supported by this CPU, which has: "
            )
        else:
            assert said == "done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="rounding is set through libm.so.6")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the numbers of modes are x86's")
def test_the_callers_mode_of_rounding_changes_no_bit():
    """A worker has its own mode: with the caller's, bits would depend on who computes them. It is given back, too."""
    said = python(
        """
import ctypes
libm = ctypes.CDLL("libm.so.6")
x = np.random.default_rng(0).standard_normal((4, 2, 300, 32)).astype(np.float32)
def results():
    out, lse = tf.attention(*x[:3], scale=0.25, return_lse=True)
    return out, lse, *tf.attention_grad(*x[:3], out, lse, x[3], scale=0.25)[:3]
expected = results()
for mode in (0x400, 0x800, 0xc00):  # downward, upward, toward zero
    libm.fesetround(mode)
    got = results()
    print(libm.fegetround() == mode)
    libm.fesetround(0)
    print(all(np.array_equal(a, b) for a, b in zip(got, expected)))
        """,
        TILEFOLD_NUM_THREADS="1",
    )
    assert said == "True\n" * 6


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86's mode is torch's to set")
def test_the_callers_flushing_of_subnormals_changes_no_bit():
    """torch.set_flush_denormal, or any library built with -ffast-math, lets small numbers of the caller be 0."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    said = python(
        """
x = np.random.default_rng(0).standard_normal((4, 2, 300, 32)).astype(np.float32)
x[2] *= np.float32(1e-39)
def results():
    out, lse = tf.attention(*x[:3], scale=2.0, return_lse=True)
    return out, lse, *tf.attention_grad(*x[:3], out, lse, x[3], scale=2.0)[:3]
def below():
    return bool((torch.tensor([1e-30]) * torch.tensor([1e-10]) > 0).all())
expected = results()
print(below())
torch.set_flush_denormal(True)
got = results()
print(below(), all(a.tobytes() == b.tobytes() for a, b in zip(got, expected)))
        """,
        torch="yes",
        TILEFOLD_NUM_THREADS="1",
    )
    assert said == "True\nFalse True\n"
