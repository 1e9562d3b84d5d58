"""What a person sees while requests run: a table that lives, or plain lines where nobody looks at a terminal.

It decides when words are shown. Tokens are pieces of words and even of letters, so a text is decoded as a whole, and an
end that is not a letter yet waits for the next token.
"""

import sys
import time

EVERY = 8  # tokens of a request from one plain line to the next
PAUSE = 0.1  # seconds from one picture to the next


class Lines:
    """Some new words of one request a line. After a restart those that were not done begin again with their first."""

    def __init__(self, engine, decode):
        self.engine, self.decode = engine, decode
        self.shown = {n: 0 for n, r in enumerate(engine.requests) if not r.done}  # letters, of those not done

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        for n, r in enumerate(self.engine.requests):
            if n in self.shown and (r.done or (r.ids and len(r.written) % EVERY == 0)):
                self._say(n, r)

    def _say(self, n, r):
        text = settled(self.decode(r.written))
        if len(text) > self.shown[n]:
            print(f"{n:4d}  {one_line(text[self.shown[n] :])}", flush=True)
        self.shown[n] = len(text)
        if r.done:
            del self.shown[n]


class Table:
    """All requests while they run, with rich; at the end what each wrote."""

    def __init__(self, engine, decode, console=None):
        from rich.console import Console
        from rich.live import Live

        self.engine, self.decode = engine, decode
        self.console = console or Console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.due = 0.0

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *error):
        self.live.stop()
        for n, r in enumerate(self.engine.requests):
            self.console.print(f"{n:4d}  {one_line(self.decode(r.written))}", markup=False, highlight=False)

    def update(self):
        if (now := time.monotonic()) >= self.due:
            self.due = now + PAUSE
            self.live.update(self.drawn(), refresh=True)

    def drawn(self):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        e = self.engine
        done = f"{sum(r.done for r in e.requests)} of {len(e.requests)} done"
        pages = f"{e.cache.pages_used} of {e.pages} pages, {e.saved} saved"
        table = Table(box=box.SIMPLE_HEAD, expand=True, caption=f"{done}   {rate(e.totals)}   {pages}")
        for name, settings in {
            "request": {"justify": "right"},
            "": {"width": 6},
            "tokens": {"justify": "right"},
            "last words": {"no_wrap": True, "ratio": 1},
        }.items():
            table.add_column(name, **settings)
        for n, r in self._rows():
            text = one_line(settled(self.decode(r.written[-40:])))
            table.add_row(str(n), state(r), str(len(r.written)), Text(text[-(self.console.width - 32) :]))
        return table

    def _rows(self):
        """Those that run, then those that wait, then those that are done, as many as there is room for; by number."""
        order = sorted(enumerate(self.engine.requests), key=lambda x: (x[1].done, not x[1].ids, x[0]))
        return sorted(order[: max(self.console.height - 6, 1)], key=lambda x: x[0])


def shown(engine, decode):
    """The table where a person looks at it, else lines."""
    if sys.stdout.isatty():
        try:
            return Table(engine, decode)
        except ImportError:
            pass
    return Lines(engine, decode)


def state(r):
    return "done" if r.done else "waits" if not r.ids else "reads" if r.left > 1 else "writes"


def rate(totals):
    return f"{totals.written / max(totals.seconds, 1e-9):.1f} tokens/s"


def settled(text):
    """Without an end that is half a letter."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def one_line(text):
    """Without line ends, and without what would move a terminal's cursor."""
    return "".join(x if x.isprintable() else " " for x in " ".join(text.split()))


def summary(engine):
    """What it all took, as lines of (name, sentence)."""
    t, e, cache = engine.totals, engine, engine.cache
    each = cache.nbytes // e.pages
    firsts = sorted(r.first for r in e.requests if r.first is not None)
    rows = [
        ("requests", f"{sum(r.done for r in e.requests)} of {len(e.requests)}, {e.most} at once at most"),
        (
            "tokens",
            f"{t.written} written and {t.read} read in {t.steps} steps of {t.seconds:.2f} s: {rate(t)}",
        ),
    ]
    if firsts:
        rows.append(
            ("first token", f"after {firsts[len(firsts) // 2]:.2f} s (median) to {firsts[-1]:.2f} s (last)")
        )
    rows += [
        (
            "cache",
            f"{megabytes(each * cache.pages_used)} in use, {megabytes(each * t.most_pages)} at most, "
            f"of {megabytes(cache.nbytes)}",
        ),
        (
            "shared",
            f"{t.most_saved} pages of {e.page} tokens saved at most, {megabytes(each * t.most_saved)}",
        ),
    ]
    if t.sent_back:
        rows.append(("sent back", f"{t.sent_back} times a request gave its pages to an older one"))
    return rows


def megabytes(n):
    return f"{n / 1e6:.1f} MB"
