"""A call holds its arrays: whoever drops them meanwhile frees nothing, and when the call is over nobody holds them.

Memory that is shrunk by force under a running call is beyond any library; NumPy refuses to do that.
"""

import pytest
from faults.fresh import TORCHS, TWO, python

HELD = """
import gc, weakref

def held(call, make):
    "The result of a call in a thread that alone holds its arguments; whether they lived through it and died after it."
    holder, results = [make()], []
    watched = [weakref.ref(x) for x in holder[0]]
    thread = threading.Thread(target=lambda: results.append(call(*holder.pop())))
    thread.start()
    while holder:
        time.sleep(0.001)
    through = []
    while thread.is_alive():
        time.sleep(0.002)
        alive = all(x() is not None for x in watched)
        noise = [np.full(n, np.nan, np.float32) for n in (1000, 20_000, 500_000)]  # takes what was freed
        if not results:
            through.append(alive)
    thread.join()
    gc.collect()
    lived = len(through) > 2 and all(through[:-1])  # at the last look the call may have been on its way out
    return results[0], lived, all(x() is None for x in watched)

length = 2000
while True:
    x = np.random.default_rng(0).standard_normal((4, 2, length, 64)).astype(np.float32)
    start = time.monotonic()
    out, lse = tf.attention(*x[:3], return_lse=True)
    if time.monotonic() - start > 0.15:
        break
    length *= 2
"""


@pytest.mark.parametrize("team", [TWO, TORCHS])
def test_arrays(team):
    said = python(
        HELD
        + """
got, lived, died = held(tf.attention, lambda: [a.copy() for a in x[:3]])
print(np.array_equal(got, out), lived, died)
got, lived, died = held(tf.attention_grad, lambda: [a.copy() for a in (*x[:3], out, lse, x[3])])
expected = tf.attention_grad(*x[:3], out, lse, x[3])
print(all(np.array_equal(a, b) for a, b in zip(got[:3], expected[:3])), lived, died)
        """,
        **team,
    )
    assert said == "True True True\n" * 2


@pytest.mark.parametrize("team", [TORCHS])
def test_tensors(team):
    said = python(
        HELD
        + """
got, lived, died = held(tf.attention, lambda: [torch.from_numpy(a.copy()) for a in x[:3]])
print(np.array_equal(got.numpy(), out), lived, died)
        """,
        **team,
    )
    assert said == "True True True\n"


def test_memory_is_not_resized_under_a_call():
    said = python(
        HELD
        + """
mine = x[0].copy()
thread = threading.Thread(target=lambda: tf.attention(mine, *x[1:3]))
thread.start()
time.sleep(0.02)
try:
    mine.resize(3)
except ValueError as error:
    print("cannot resize" in str(error), thread.is_alive())
thread.join()
        """,
    )
    assert said == "True True\n"
