"""What works where, found out by doing it: docs/support.md is made of these results and nothing else.

    python tests/support.py docs/support.md            write the page
    python tests/support.py --row BACKEND              one column's results, as JSON; TILEFOLD_ISA chooses the machine

A feature is a case string; it works where the results are within their budgets, forward and backward, and a probe sees
what the whole matrix says. A cell says which types do, or refers to the reason that the library itself gives.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from isas import MACHINES, python, why_not

FEATURES = {
    "full": "h2 q40 k90 d16",
    "causal": "h2 q40 k90 d16 causal",
    "window": "h2 q60 k150 d16 window=20,4",
    "anchors and a window": "h2 q60 k150 d16 anchors=4,50",
    "documents": "h2 q90 k90 d16 documents=40,20,30 causal",
    "boolean array": "b2 h2 q40 k90 d16 dense=0.3",
    "predicate": "h2 q40 k90 d16 predicate=3",
    "softcap": "h2 q40 k90 d16 softcap=5",
    "bias": "b2 h2 q40 k90 d16 bias=1hqk hide=0.2",
    "ALiBi": "h2 q40 k90 d16 alibi causal",
    "sinks": "h2 q40 k90 d16 sinks causal",
    "grouped heads": "h6/2 q40 k90 d16 causal",
    "values of another width": "h2 q40 k90 d16 v33",
    "padded batches": "b3 h2 q40 k90 d16 q_lengths=40,3,0 kv_lengths=90,7,9",
    "packed batches": "h2 d16 packed=30,0,40/50,9,80 causal",
    "any strides": "b2 h2 q40 k90 d16 order=strided causal",
    "NaN behind masks": "h2 q60 k150 d16 window=20,4 nan",
    "decoding": "h8/2 q1 k1300 d32",
}
PASSES = ("forward", "backward", "probe")
TYPES = ("float32", "float64", "bfloat16", "float16")
BEGIN = "<!-- made by tests/support.py -->"

Row = dict[str, dict[str, dict[str, str]]]  # pass -> feature -> type -> "" where it works, else why not


def attempt(which: str, text: str, backend: str) -> str:
    """ "" where the case works; the reason of a refusal; or what is wrong."""
    import numpy as np

    import tilefold as tf
    from tilefold.bench.case import Case
    from tilefold.naive import naive_weights

    case = Case.parse(text)
    try:
        if which != "probe":
            report = case.replay(backend=backend, gradients=which == "backward")
            return "" if report.ok else "WRONG: " + "; ".join(report.lines)
        a = case.build()
        what = [tf.max_weight(), tf.mass_in(first=tf.prefix(5)), tf.key_mass()]
        *_, seen = tf.attention(a.q, a.k, a.v, **a.options, probes=what, backend=backend)
        w = naive_weights(a.q, a.k, **a.options, dtype=np.float64)
        found = (seen.max_weight, seen.mass_in.first, seen.key_mass)
        right = (w.max(axis=-1), w[..., :5].sum(axis=-1), w.sum(axis=-2))
        if a.options.get("cu_seqlens_k") is not None:  # the first keys of each sequence are others
            found, right = found[::2], right[::2]
        same = all(np.allclose(x, y, atol=0.02) for x, y in zip(found, right, strict=True))
        return "" if same else "WRONG: other statistics"
    except tf.BackendRefused as refused:
        return str(refused).partition(": ")[2]


def row(backend: str) -> Row:
    return {
        which: {
            feature: {dtype: attempt(which, f"{dtype} {words}", backend) for dtype in TYPES}
            for feature, words in FEATURES.items()
        }
        for which in PASSES
    }


def columns() -> dict[str, tuple[str, str]]:
    """The page's columns: title -> (backend, machine)."""
    return {"numpy": ("numpy", "")} | {name: ("native", name) for name in MACHINES}


def found(title: str) -> Row | None:
    """A column's results on this machine; None where it cannot run."""
    backend, isa = columns()[title]
    if isa and why_not(isa):
        return None
    answer = python(isa, "-W", "ignore", __file__, "--row", backend)
    if answer.returncode:
        raise RuntimeError(f"{title}: {answer.stdout}{answer.stderr}")
    results: Row = json.loads(answer.stdout)
    return results


def cell(types: dict[str, str]) -> str:
    """What a reader needs to know of one feature in one column."""
    works = [dtype for dtype, why in types.items() if not why]
    wrong = any(why.startswith("WRONG") for why in types.values())
    if wrong:
        return "**wrong**"
    return "yes" if len(works) == len(types) else " ".join(works) or "–"


def cells(results: Row) -> dict[tuple[str, str], str]:
    return {
        (which, feature): cell(types)
        for which, features in results.items()
        for feature, types in features.items()
    }


def reasons(results: Row, which: str) -> list[str]:
    every = (why for types in results[which].values() for why in types.values() if why)
    return list(dict.fromkeys(every))


def read(page: str) -> dict[str, dict[tuple[str, str], str]]:
    """The cells of a page, by column."""
    known: dict[str, dict[tuple[str, str], str]] = {}
    which, titles = "", []
    for line in page.splitlines():
        parts = [x.strip().strip("`") for x in line.strip("|").split("|")]
        if line.startswith("## "):
            which = line[3:].lower()
        elif line.startswith("| |"):
            titles = parts[1:]
        elif line.startswith("|") and not line.startswith("|---"):
            for title, text in zip(titles, parts[1:], strict=True):
                known.setdefault(title, {})[which, parts[0]] = text
    return known


def reasons_of(page: str) -> dict[str, list[str]]:
    """The reasons that a page gives, by pass and backend."""
    given: dict[str, list[str]] = {}
    which = ""
    for line in page.splitlines():
        which = line[3:].lower() if line.startswith("## ") else which
        if match := re.match(r"- (\w+): (.*)", line):
            given.setdefault(f"{which} {match[1]}", []).append(match[2])
    return given


def render(by_column: dict[str, dict[tuple[str, str], str]], why: dict[str, list[str]]) -> str:
    return "\n".join(_page(by_column, why)) + "\n"


def _page(by_column: dict[str, dict[tuple[str, str], str]], why: dict[str, list[str]]) -> Iterator[str]:
    titles = list(by_column)
    yield "# What works where"
    yield ""
    yield (
        "Found out by doing it: every cell was computed and compared with the plain method in a wider type, within its "
        "budget. *yes* stands for float32, float64, bfloat16 and float16. `numpy` is the NumPy backend, the other "
        "columns are machines of the native core. `make support` makes this page, and a test holds it against what "
        "happens today."
    )
    yield ""
    yield BEGIN
    for which in PASSES:
        yield ""
        yield f"## {which.capitalize()}"
        yield ""
        yield f"| | {' | '.join(f'`{title}`' for title in titles)} |"
        yield "|---" * (len(titles) + 1) + "|"
        for feature in FEATURES:
            found_here = [by_column[title].get((which, feature), "?") for title in titles]
            yield f"| {feature} | {' | '.join(found_here)} |"
        lines = [f"- {b}: {x}" for b in ("numpy", "native") for x in why.get(f"{which} {b}", [])]
        if lines:
            yield ""
            yield from lines


def today(page: str) -> str:
    """The page as it should be; columns that this CPU cannot run stay as they are."""
    by_column, why = read(page), reasons_of(page)
    for title, (backend, _) in columns().items():
        if (results := found(title)) is None:
            continue
        by_column[title] = cells(results)
        for which in PASSES:
            why[f"{which} {backend}"] = reasons(results, which)
    order = [*columns(), *(title for title in by_column if title not in columns())]
    return render({title: by_column[title] for title in order if title in by_column}, why)


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        print(json.dumps(row(sys.argv[2])))
    else:
        path = Path(sys.argv[1])
        path.write_text(today(path.read_text() if path.exists() else ""))
