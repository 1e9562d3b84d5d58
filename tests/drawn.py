"""Problems as Hypothesis draws them: a case string of any masks, scores, shapes and ways to store sequences."""

import math

from hypothesis import strategies as st

from tilefold.dtypes import ROWS

few = st.integers(0, 9)
lengths = st.one_of(few, st.integers(0, 70))
dims = st.one_of(few, st.sampled_from([16, 17, 31, 33, 64, 80]))
limits = st.one_of(st.just("-"), few, st.integers(0, 80))

MASKS = {
    "causal": st.just("causal"),
    "top-left": st.just("causal=top-left"),
    "window": st.builds("window={},{}".format, limits, limits),
    "band": st.builds("band={},{},{}".format, st.integers(-5, 60), st.integers(-5, 60), st.integers(-9, 60)),
    "prefix": st.builds("prefix={}".format, lengths),
    "chunked": st.builds("chunked={}".format, st.integers(1, 20)),
    "anchors": st.builds("anchors={},{}".format, few, lengths),
    "predicate": st.builds("predicate={}".format, st.integers(2, 5)),
    "dense": st.builds("dense={}".format, st.sampled_from([0, 0.02, 0.5])),
}
SCORES = {
    "scale": st.builds("scale={}".format, st.sampled_from([0, 0.3, -1])),
    "softcap": st.builds("softcap={}".format, st.sampled_from([0.5, 3, 50])),
    "sinks": st.just("sinks"),
    "alibi": st.just("alibi"),
    "logits": st.builds("logits={}".format, st.sampled_from(["peaked", "rising", "falling"])),
    "bias": st.builds(
        "bias={}{}{}{} hide={}".format, *map(st.sampled_from, ("b1", "h1", "q1", "k1", [0, 0.3, 0.95]))
    ),
}


def joined(numbers):
    return ",".join(map(str, numbers))


def parts_of(whole):
    """Sizes of consecutive documents that make the whole."""
    cuts = st.lists(st.integers(0, whole), max_size=4).map(sorted)
    return cuts.map(lambda at: [b - a for a, b in zip([0, *at], [*at, whole], strict=True)])


@st.composite
def shapes(draw):
    """The words for heads, dims, lengths and how sequences are stored."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3, 7]))
    words = [f"h{kv_heads * group}/{kv_heads}", f"d{draw(dims)}", f"v{draw(dims)}"]
    storage = draw(st.sampled_from(["whole", "padded", "packed"]))
    if storage == "packed":
        q_sizes = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
        k_sizes = draw(st.lists(st.integers(0, 40), min_size=len(q_sizes), max_size=len(q_sizes)))
        return [*words, f"packed={joined(q_sizes)}/{joined(k_sizes)}"]
    lead = draw(st.sampled_from([(), (), (1,), (2,), (3,), (2, 2), (0,)]))
    items, q_len, kv_len = math.prod(lead), draw(lengths), draw(st.one_of(lengths, st.just(1030)))
    words += ["b" + "x".join(map(str, lead))] if lead else []
    for name, most in (("q_lengths", q_len), ("kv_lengths", kv_len)):
        if storage == "padded" and lead and items and draw(st.booleans()):
            ends = draw(st.lists(st.integers(0, most), min_size=items, max_size=items))
            words.append(f"{name}={joined(ends)}")
    if storage == "whole" and q_len <= kv_len and draw(st.integers(0, 4)) == 0:
        words.append(f"documents={joined(draw(parts_of(kv_len)))}")
    return [*words, f"q{q_len}", f"k{kv_len}"]


@st.composite
def cases(draw):
    """A case string."""
    words = draw(shapes())
    for name in draw(st.lists(st.sampled_from(list(MASKS)), max_size=2, unique=True)):
        if name != "top-left" or "causal" not in words:  # one word says both
            words.append(draw(MASKS[name]))
    for name in draw(st.lists(st.sampled_from(list(SCORES)), max_size=3, unique=True)):
        words.append(draw(SCORES[name]))
    if draw(st.booleans()):
        words.append("nan")
    return " ".join([draw(st.sampled_from(list(ROWS))), *words, f"seed={draw(st.integers(0, 99))}"])
