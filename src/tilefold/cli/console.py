"""How things look. A terminal gets colour and tables from Rich; a pipe gets aligned plain text, the same words.

Progress is shown on stderr, and only where that is a terminal, so that stdout can always be piped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from ..bench.report import Table, aligned

STYLES = {"": "", "good": "green", "bad": "bold red", "faint": "dim"}


class Steps(Protocol):
    """Told after each step, with a few words about it."""

    def __call__(self, words: str, amount: float = 1) -> None: ...


def on_terminal() -> bool:
    return sys.stdout.isatty()


def show_table(table: Table) -> None:
    if not on_terminal():
        print("\n".join(table.plain()))
        return
    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if i in table.right else "left", no_wrap=True)
    for cells, mood in table.rows:
        drawn.add_row(*(Text(cell) for cell in cells), style=STYLES[mood])
    console = Console(highlight=False)
    if (
        console.measure(drawn).maximum > console.width
    ):  # a cut number is a wrong number: rather let lines wrap
        print("\n".join(table.plain()))
        return
    console.print(drawn)


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and what is to be said about them; on a terminal names are coloured, `missing` is yellow."""
    lines = aligned(facts, frozenset())
    if not on_terminal():
        print("\n".join(lines))
        return
    width = max(len(name) for name, _ in facts)
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        text = Text(line)
        text.stylize("cyan", 0, width)
        if line[width:].strip().startswith("missing"):
            text.stylize("yellow", width)
        console.print(text)


def show(sentence: str, mood: str = "") -> None:
    if not on_terminal():
        print(sentence)
        return
    Console(highlight=False, soft_wrap=True).print(Text(sentence, style=STYLES[mood]))


@contextmanager
def progress(what: str, total: float) -> Iterator[Steps]:
    """A bar on stderr that goes away when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.fields[what]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, what=what)

        def step(words: str, amount: float = 1) -> None:
            bar.update(task, advance=amount, description=words)

        yield step
