"""The README's table, made from the files that `tilefold bench --json` wrote: nobody types a number.

    python -m tilefold.bench.readme README.md FILE.json... [--check]

It stands between two markers, with every row that was measured, those that are lost too. --check writes nothing and
exits 1 where the text is not what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..api import size
from .case import Case
from .report import BEYOND, rate, seconds, share

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
FIRST = ("naive", "tilefold")  # then whoever else took part, in the order of the file

File = dict[str, Any]
Row = tuple[str, bool]  # a case, and whether its gradients were measured


def render(files: Sequence[File]) -> str:
    """Markdown: a table for each file and type, and under each file's how it was measured."""
    parts = [part for file in files for part in (*_tables(file), _caption(file))]
    return "\n\n".join(parts)


def replaced(text: str, table: str) -> str:
    """`text` with the table between its markers.

    >>> replaced("a <!-- bench -->old<!-- /bench --> b", "new")
    'a <!-- bench -->\\nnew\\n<!-- /bench --> b'
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must hold {BEGIN} once and then {END} once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _tables(file: File) -> Iterator[str]:
    by_type: dict[str, dict[Row, dict[str, Any]]] = {}
    for row in file["results"]:
        scenarios = by_type.setdefault(Case.parse(row["case"]).dtype, {})
        scenarios.setdefault((row["case"], row.get("grad", False)), {})[row["by"]] = row
    for dtype, scenarios in by_type.items():
        yield "\n".join(_table(file, dtype, scenarios))


def _table(file: File, dtype: str, scenarios: dict[Row, dict[str, Any]]) -> Iterator[str]:
    took_part = dict.fromkeys(
        who for rows in scenarios.values() for who, row in rows.items() if "seconds" in row
    )
    who = [*(name for name in FIRST if name in took_part), *(name for name in took_part if name not in FIRST)]
    ours = "tilefold" in took_part
    header = [f"{dtype}, {_threads(file)}", *(_titled(file, name) for name in who)]
    header += ["of peak", "memory, naive → tilefold"] if ours else []
    yield _line(header)
    yield "|---" * len(header) + "|"
    for (case, grad), rows in scenarios.items():
        cells = [
            in_words(case) + (", forward and backward" if grad else ""),
            *_times([rows.get(name, {}) for name in who]),
        ]
        yield _line(
            [*cells, *([share(rows["tilefold"].get("share_of_peak")), _memory(rows)] if ours else [])]
        )


def _times(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The fastest in bold; a wrong result has no time."""
    right = [row["median_seconds"] for row in rows if "seconds" in row and row["error"]["ok"]]
    for row in rows:
        if "seconds" not in row:
            yield "–"
        elif not row["error"]["ok"]:
            yield "*wrong*"
        else:
            time = seconds(row["median_seconds"])
            yield f"**{time}**" if row["median_seconds"] == min(right) else time


def _memory(rows: dict[str, Any]) -> str:
    naive, ours = (rows.get(name, {}).get("bytes") for name in FIRST)
    return "–" if naive is None or ours is None else f"{size(naive)} → {size(ours)}"


def _caption(file: File) -> str:
    machine = file["machine"]
    roofs = dict.fromkeys(row["roof"] for row in file["results"] if row.get("roof"))
    shares = "; ".join(f"{_rate(file, roof)} of {file['peaks'][roof]['what']}" for roof in roofs)
    return (
        f"Medians of {file['rounds']} interleaved rounds on {_threads(file)} of {machine['cpu']}, by "
        f"`{file['command']}`. **Bold** is fastest, – cannot, *wrong* is out of its error budget. Memory is what was "
        f"allocated beyond the inputs, output included. Shares of peak are tilefold's, of what was measured beside it: "
        f"{shares}.{_beyond(file)}"
    )


def _beyond(file: File) -> str:
    """How a share may be more than all, where one is."""
    ours = (row for row in file["results"] if row["by"] == "tilefold")
    if all((row.get("share_of_peak") or 0) <= 1 for row in ours):
        return ""
    return f" More than 100%: {BEYOND}."


def _rate(file: File, roof: str) -> str:
    return rate(file["peaks"][roof]["per_second"], roof.startswith("read"))


def _threads(file: File) -> str:
    return "1 thread" if file["threads"] == 1 else f"{file['threads']} threads"


def _titled(file: File, name: str) -> str:
    """With its version, as far as anyone cares: `torch 2.13`."""
    version = file["peers"][name]["version"]
    short = re.match(r"\d+(\.\d+)?", version or "")
    return name if name in FIRST or short is None else f"{name} {short[0]}"


def in_words(case: str) -> str:
    """A case as a reader says it.

    >>> in_words("float32 h8 q2048 k2048 d64 causal"), in_words("float32 h32/8 q1 k4096 d128")
    ('8 heads, n 2048, d 64, causal', 'decoding, 32/8 heads, 4096 keys, d 128')
    """
    c = Case.parse(case)
    n, heads = c.size, f"{c.heads}/{c.kv_heads}" if c.heads != c.kv_heads else str(c.heads)
    many = "head" if heads == "1" else "heads"
    said = [f"batch {'x'.join(map(str, c.lead))}"] if c.lead else []
    if n["q"] == 1:
        said = ["decoding", *said, f"{heads} {many}", f"{n['k']} keys"]
    else:
        lengths = f"n {n['q']}" if n["q"] == n["k"] else f"{n['q']} queries, {n['k']} keys"
        said += [f"{heads} {many}", lengths]
    said.append(f"d {n['d']}" if n["d"] == n["v"] else f"d {n['d']} and {n['v']}")
    if "window" in c.words:
        left, _, right = c.words["window"].partition(",")
        one_sided = right == "0" or "causal" in c.words
        said.append(f"window {int(left) + 1}" if one_sided and left.isdigit() else f"window {left},{right}")
    elif "causal" in c.words:
        said.append("causal")
    return ", ".join([*said, *(["bias"] if "bias" in c.words else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tilefold.bench.readme", description="The README's table."
    )
    parser.add_argument("readme", type=Path, help=f"a text that holds {BEGIN} and {END}")
    parser.add_argument("files", type=Path, nargs="+", help="what `tilefold bench --json` wrote")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where the text is another"
    )
    given = parser.parse_args(arguments)
    text = given.readme.read_text()
    try:
        right = replaced(text, render([json.loads(file.read_text()) for file in given.files]))
    except ValueError as error:
        parser.error(f"{given.readme}: {error}")
    if text == right:
        return 0
    if given.check:
        print(
            f"{given.readme}: the table is not what the files say; run this without --check", file=sys.stderr
        )
        return 1
    given.readme.write_text(right)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
