"""`tilefold view`: pictures of what attention looks at, of files of queries and keys, or of what was seen before.

A saved `Seen` is an .npz without arrays named q and k; everything else is probed first. Results appear when complete.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
import typer

from ..api import probe
from ..bench.report import seconds
from ..view import load, page, picture, statistics
from ..view.files import complete
from ..view.page import NEEDS
from .console import progress, show
from .files import CONTAINERS, read, split
from .options import Asked, takes_options

Q = Annotated[
    str,
    typer.Argument(
        metavar="Q", help="Queries: .npy, file.npz:name or file.safetensors:name; or a saved Seen, .npz."
    ),
]
K = Annotated[str | None, typer.Argument(metavar="K", help="Keys; not needed if Q's file holds q and k.")]


def _file(words: str, *names: str) -> Any:
    return typer.Option(*names, help=words, rich_help_panel="Pictures", metavar="FILE")


@takes_options
def view(
    asked: Asked,
    q: Q,
    k: K = None,
    *,
    html: Annotated[Path | None, _file("The page; view.html if no picture is asked for.", "--html")] = None,
    png: Annotated[Path | None, _file("A figure, 200 pixels to the inch.", "--png")] = None,
    svg: Annotated[Path | None, _file("A figure of lines and letters.", "--svg")] = None,
    tokens: Annotated[
        str | None, _file("Text file of one token per key and line, or a JSON list.", "--tokens")
    ] = None,
    title: Annotated[str | None, typer.Option(help="The heading.", rich_help_panel="Pictures")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Figures: which layer of a saved mapping.", rich_help_panel="Pictures")
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            help="Figures: one head; all heads of a layer if not given.", rich_help_panel="Pictures"
        ),
    ] = None,
    width: Annotated[float, typer.Option(help="Figures: inches.", rich_help_panel="Pictures")] = 6.5,
    top: Annotated[int, typer.Option(help="How many keys a query lists.", rich_help_panel="Pictures")] = 8,
    finest: Annotated[
        int, typer.Option(help="Bins a side of the finest map.", rich_help_panel="Pictures")
    ] = 1024,
) -> None:
    """Show what attention looks at: an HTML page, a PNG, an SVG.

    The page needs no network. Sequences that were packed are shown one by one: give files of each.
    """
    began = perf_counter()
    if html is None and png is None and svg is None:
        html = Path("view.html")
    _check_packages(html, png or svg)
    places = [path for path in (html, png, svg) if path is not None]
    _check_places(places, [q, k, tokens])
    for path, suffix in ((png, ".png"), (svg, ".svg")):
        if path is not None and path.suffix.lower() != suffix:
            raise ValueError(f"--{suffix[1:]} must end in {suffix}, got {str(path)!r}")
    words = None if tokens is None else _tokens(Path(tokens))
    with progress("looking", 1 + len(places)) as step:
        step("statistics", 0)
        seen, lengths = _seen(asked, q, k, top, finest)
        step(str(places[0]))
        if html is not None:
            text = page(seen, tokens=words, title=title, **lengths).encode()
            complete(html, lambda file: file.write(text))
            step(str(html))
        for path in (png, svg):
            if path is not None:
                picture(seen, path, tokens=words, title=title, layer=layer, head=head, width=width, **lengths)
                step(str(path))
    for path in places:
        show(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    show(seconds(perf_counter() - began), "faint")


def _check_packages(html: Path | None, figure: Path | None) -> None:
    for path, what, package, name in (
        (html, "the page", "plotly", "Plotly"),
        (figure, "the picture", "matplotlib", "matplotlib"),
    ):
        if path is not None and find_spec(package) is None:
            raise ValueError(NEEDS.format(what, name))


def _check_places(places: list[Path], inputs: list[str | None]) -> None:
    """Before any work: no result in the place of an input or of another, or in a folder that is not there."""
    taken = {split(spec)[0].resolve() for spec in inputs if spec is not None}
    if any(path.resolve() in taken for path in places):
        raise ValueError("a result would replace one of the inputs")
    if len({path.resolve() for path in places}) < len(places):
        raise ValueError("two of --html, --png and --svg are one file")
    for path in places:
        if path.is_dir():
            raise ValueError(f"{path} is a folder")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {str(path.parent)!r}")


def _seen(asked: Asked, q: str, k: str | None, top: int, finest: int) -> tuple[Any, dict[str, Any]]:
    """What is to be shown, and the lengths of its sequences where they are padded."""
    path, member = split(q)
    if k is None and not member and path.suffix.lower() == ".npz" and not {"q", "k"} <= set(_members(path)):
        if asked != Asked():
            raise ValueError(
                f"{q} holds statistics, to which masks and scores have been applied: leave their options out"
            )
        return load(path), {}
    if k is None and (member or path.suffix.lower() not in CONTAINERS):
        raise ValueError(
            "give two files, Q K, or one .npz or .safetensors that holds arrays named q and k, or a saved Seen"
        )
    queries, keys = read(q, "q"), read(k or q, "k")
    for name, array in (("q", queries), ("k", keys)):
        if array.ndim < 2 or not array.shape[-2]:
            raise ValueError(
                f"{name} must have shape (..., heads, length, dim) with a length above 0, got {array.shape}"
            )
    sizes = queries.shape[-2], keys.shape[-2]
    options = asked.as_keywords()
    what = statistics(*sizes, top=min(top, sizes[1]), finest=finest)
    seen = probe(queries, keys, *what, backend=asked.backend, **options)
    return seen, {name: options[name] for name in ("q_lengths", "kv_lengths")}


def _members(path: Path) -> list[str]:
    try:
        with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
            return list(file.files)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path}: {error or 'the file is empty'}") from error


def _tokens(path: Path) -> Any:
    import json

    try:
        text = path.read_text("utf-8")
        return json.loads(text) if path.suffix.lower() == ".json" else text.removesuffix("\n").split("\n")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--tokens: {path}: {error}") from None
