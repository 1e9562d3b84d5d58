"""The page: one HTML file that holds its numbers, its program and Plotly, and asks the network for nothing.

Numbers are float32 and int32 in one block, compressed; the table is written out in full, so that it can be read without
the program too. Tokens, titles and names come from outside: they enter as text, never as markup.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import re
import tempfile
import webbrowser
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .colours import ramp
from .files import complete
from .model import Layer, Table, layers, lists_of, named_tokens, table, unit

LIMIT = 48 * 2**20
NEEDS = "{0} is made with {1}, which is not installed: pip install 'tilefold[view]'"
SCRIPTS = ("data.js", "heads.js", "map.js", "tokens.js", "profile.js", "table.js", "main.js")
WHOLE = "from tilefold.view import statistics, then tilefold.probe(q, k, *statistics(q_len, kv_len), ...)"


def page(
    seen: Any, *, tokens: Any = None, title: str | None = None, q_lengths: Any = None, kv_lengths: Any = None,
    limit: int = LIMIT,
) -> str:  # fmt: skip
    """What was seen as one HTML page, a text.

    Args:
        seen: what `tilefold.probe` returned, or a mapping from names of layers to such. Statistics are over single
            heads (``heads="each"``) or groups; what is missing is not shown, and the page says what to ask for.
        tokens: one string per key, or a list of such per sequence.
        title: its heading.
        q_lengths, kv_lengths: those that the call was given, where sequences were padded.
        limit: bytes of numbers that a page may hold; the finest maps that go beyond are left out, and the page says so.

    Raises:
        TypeError, ValueError: for what is no `Seen`, holds nothing to show, or is beyond the limit without its maps.
        ModuleNotFoundError: where Plotly is not installed.

    >>> import numpy as np, tilefold as tf
    >>> from tilefold.view import page, statistics
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> page(tf.probe(q, k, *statistics(100, 100), causal=True), title="Noise")[:15]
    '<!doctype html>'
    """
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title must be a string, got {type(title).__name__}")
    found = layers(seen, q_lengths, kv_lengths)
    words = named_tokens(tokens, found)
    notes = _within(found, limit) + _missing(found)
    numbers, block = table(found), _Block()
    facts = {
        "layers": [block.layer(layer) for layer in found],
        "tokens": words,
        "table": {"header": numbers.header, "lines": [[_plain(x) for x in line] for line in numbers.lines]},
        "ramp": ramp(),
    }
    heading = title or "What attention looked at"
    parts = {
        "title": html.escape(heading),
        "facts": html.escape(_facts(found)),
        "style": _asset("page.css"),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in notes),
        "table": _markup(numbers),
        "model": json.dumps(facts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "numbers": _packed(block.bytes()),
        "plotly": _packed(_plotly().encode()),
        "program": "\n".join(_asset(name) for name in SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _asset("page.html"))


def write(
    seen: Any, path: Any = None, *, tokens: Any = None, title: str | None = None, show: bool = False, **how: Any
) -> Path:  # fmt: skip
    """Write the page to `path`, else to a temporary file, and return where it is; `show` opens it in a browser.

    Arguments and errors are those of `page`.

    >>> import numpy as np, tempfile, tilefold as tf
    >>> from tilefold.view import statistics, write
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write(tf.probe(q, k, *statistics(100, 100)), folder + "/noise.html").name)
    noise.html
    """
    text = page(seen, tokens=tokens, title=title, **how).encode()
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="tilefold-")) / "view.html"
    place = complete(Path(path), lambda file: file.write(text))
    if show:
        webbrowser.open(place.resolve().as_uri())
    return place


class _Block:
    """All numbers of a page, one after the other; the page finds them by where they begin."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.count = 0

    def bytes(self) -> bytes:
        return b"".join(part.tobytes() for part in self.parts)

    def place(self, x: np.ndarray) -> int:
        self.parts.append(np.ascontiguousarray(x, "<i4" if x.dtype.kind in "iu" else "<f4"))
        self.count += x.size
        return self.count - x.size

    def layer(self, layer: Layer) -> dict[str, Any]:
        top = None
        if layer.top is not None:
            k = layer.top.keys.shape[-1]
            top = {"k": k, "weights": self.place(layer.top.weights), "keys": self.place(layer.top.keys)}
        return {
            "name": layer.name,
            "sequences": layer.sequences,
            "heads": layer.heads,
            "queries": layer.q_len,
            "keys": layer.kv_len,
            "ends": layer.ends,
            "rows": {name: {"at": self.place(x), "unit": unit(name)} for name, x in layer.rows.items()},
            "columns": {name: {"at": self.place(x), "unit": unit(name)} for name, x in layer.keys.items()},
            "top": top,
            "maps": [{"rows": x.shape[2], "cols": x.shape[3], "at": self.place(x)} for x in layer.maps],
        }


def _within(found: Sequence[Layer], limit: int) -> list[str]:
    """Leave out the finest maps until all is within the limit; what was left out."""
    left: dict[str, int] = {}
    while (total := sum(4 * x.size for layer in found for x in layer.arrays())) > limit:
        finest = max(found, key=lambda layer: layer.maps[-1][0, 0].size if len(layer.maps) else 0)
        if not finest.maps:
            raise ValueError(
                f"the page would hold {total / 2**20:,.0f} MiB of numbers, the limit is {limit / 2**20:,.0f} MiB: "
                "show fewer layers, or give a higher limit"
            )
        gone = finest.maps.pop()
        size = f"{gone.shape[2]} × {gone.shape[3]}"
        left[size] = left.get(size, 0) + 4 * gone.size
    return [
        f"Maps of {size} were left out: they would take {taken / 2**20:,.0f} MiB. Show fewer layers or heads, or give "
        "a higher limit." for size, taken in left.items()
    ]  # fmt: skip


def _missing(found: Sequence[Layer]) -> list[str]:
    """What the page could show if it had been asked for."""
    notes = [f"{f'{x.name}: ' if x.name else ''}{sentence}" for x in found for sentence in x.skipped]
    wanted = []
    if not any("entropy" in name for layer in found for name in layer.rows):
        wanted.append("entropy() to compare heads")
    if not any(layer.maps for layer in found):
        wanted.append("heatmap(64, 64) for the map")
    if not any(layer.keys for layer in found):
        wanted.append("key_mass() to colour tokens")
    if not any(lists_of(layer) for layer in found):
        wanted.append("topk(8) for the keys that a query looks at")
    if wanted:
        notes.append(f"Not asked for: {', '.join(wanted)}. For all of it: {WHOLE}.")
    if any(layer.guessed for layer in found):
        notes.append(
            "How many keys there are is a guess, since key_mass() was not asked for and no tokens were given."
        )
    return notes


def _facts(found: Sequence[Layer]) -> str:
    """The sizes of what is shown, in a line."""
    from .. import __version__

    def span(what: str, numbers: set[int]) -> str:
        least, most = min(numbers), max(numbers)
        count = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        return f"{count} {what}{'' if most == 1 else 's'}"

    words = [span("layer", {len(found)})]
    if any(layer.sequences > 1 for layer in found):
        words.append(span("sequence", {layer.sequences for layer in found}))
    words += [
        span("head", {layer.heads for layer in found}),
        span("query", {layer.q_len for layer in found}).replace("querys", "queries"),
        span("key", {layer.kv_len for layer in found}),
    ]
    return " · ".join([*words, f"tilefold {__version__}"])


def _plain(x: Any) -> Any:
    """A number as JSON has it: those that it lacks become words."""
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _markup(numbers: Table) -> str:
    """Head and body of the table of heads; the first columns name the head."""
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(h)}</button></th>' for h in numbers.header
    )
    lines = []
    for line in numbers.lines:
        cells = "".join(f"<td>{html.escape(_short(x))}</td>" for x in line[1:])
        lines.append(f'<tr><th scope="row">{html.escape(line[0] or "–")}</th>{cells}</tr>')
    return f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"


def _short(x: Any) -> str:
    """Four digits; data.js writes numbers alike."""
    if not isinstance(x, float):
        return "–" if x is None else str(x)
    return f"{x:.0f}" if 1e4 <= abs(x) < 1e9 else re.sub(r"(e[+-])0", r"\1", f"{x:.4g}")


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text("utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDS.format("the page", "Plotly"), name=error.name) from error
    program: str = get_plotlyjs()
    return program
