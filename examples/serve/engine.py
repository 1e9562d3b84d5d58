"""The scheduler: which requests run, what each reads or writes in the next step, and who gives way where pages run out.

It decides by counts and by the order of requests alone, never by time, so the same requests take the same steps
again, and an engine that is restored takes those that it would have taken. One cache serves all layers: a request has a
sequence of its own in each, and pages come from one memory. The fact to know: a step happens wholly or not at all, so
between two steps what requests have read is what the cache holds.
"""

from collections import deque
from dataclasses import asdict, dataclass, field
from time import perf_counter

from ragged import Row

import tilefold as tf


@dataclass
class Request:
    """Tokens to read, and how many to write after them; a prefix, which many may share, writes none."""

    prompt: list[int]
    new: int = 0
    prefix: int | None = None  # of Engine.prefixes
    written: list[int] = field(default_factory=list)
    done: bool = False
    ids: list[int] = field(
        default_factory=list
    )  # sequences in the cache, one for each layer; none while it waits
    read: int = 0  # tokens in the cache
    first: float | None = None  # seconds of steps until its first token

    @property
    def tokens(self):
        return self.prompt + self.written

    @property
    def left(self):
        """How many tokens it has to read before it can write the next one."""
        return len(self.prompt) + len(self.written) - self.read


@dataclass
class Totals:
    """What was done so far."""

    steps: int = 0
    seconds: float = 0.0  # in steps, so without what is shown or saved between them
    read: int = 0
    written: int = 0
    sent_back: int = 0
    most_pages: int = 0
    most_saved: int = 0  # pages that sharing saved, where that was most


class Engine:
    """Requests for one model, many at once.

    Args:
        model: a `Ragged`.
        pages: how many pages of keys and values there are, for all layers together.
        page: tokens of a page.
        most: how many requests run at once.
        chunk: how many tokens of prompts are read in one step, besides one for each request that writes.
    """

    def __init__(self, model, *, pages, page=16, most=8, chunk=256):
        for name, n in {"pages": pages, "page": page, "most": most, "chunk": chunk}.items():
            if n < 1:
                raise ValueError(f"{name} must be >= 1, got {n}")
        self.model, self.pages, self.page, self.most, self.chunk = model, pages, page, most, chunk
        self.cache = tf.PagedKVCache(model.kv_heads, model.dim, page=page, pages=pages, like=model.like)
        self.requests, self.prefixes = [], []
        self.waiting, self.running = deque(), []
        self.totals = Totals()

    # ---- what is asked ---------------------------------------------------------------------------------------

    def share(self, tokens):
        """A prefix that requests may have in common: its number."""
        self._check(tokens)
        self.prefixes.append(Request(list(tokens)))
        return len(self.prefixes) - 1

    def submit(self, prompt, new, prefix=None):
        """A request for up to `new` tokens after `prompt`, which begins with the tokens of `prefix`: its number."""
        if new < 1:
            raise ValueError(f"new must be >= 1, got {new}")
        self._check(prompt, new)
        request = Request(list(prompt), new, prefix)
        alone = 0
        if prefix is not None:
            shared = self.prefixes[prefix].prompt
            if len(prompt) <= len(shared) or prompt[: len(shared)] != shared:
                raise ValueError(
                    f"prompt must begin with prefix {prefix} and go on, got {len(prompt)} tokens"
                )
            alone = self._pages(len(shared))
        if (needed := alone + self._beyond(request, len(prompt) + new)) > self.pages:
            raise ValueError(
                f"pages must be at least {needed} for a prompt of {len(prompt)} tokens and {new} more, got {self.pages}"
            )
        self.requests.append(request)
        self.waiting.append(request)
        return len(self.requests) - 1

    def _check(self, tokens, new=0):
        if not 1 <= len(tokens) <= self.model.longest - new:
            raise ValueError(
                f"a prompt and what is written must have 1 to {self.model.longest} tokens, got {len(tokens)} + {new}"
            )

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    # ---- a step ----------------------------------------------------------------------------------------------

    def step(self):
        """One forward call. The requests that wrote a token; after an error everything is as it was before."""
        start = perf_counter()
        self._admit()
        while self._needed(plan := self._plan()) > self.cache.pages_free:
            self._give_way()
        rows = [
            Row(r.ids, r.tokens[r.read : r.read + n], r.read, bool(r.new) and n == r.left) for r, n in plan
        ]
        try:
            said = iter(self.model.next_tokens(self.cache, rows))
        except BaseException:
            for r, _ in plan:
                self.cache.truncate(r.ids, r.read)
            raise
        wrote = []
        for (r, n), row in zip(plan, rows, strict=True):
            r.read += n
            if row.asked:
                r.written.append(next(said))
                wrote.append(r)
        self._count(plan, wrote, perf_counter() - start)
        self._finish(wrote)
        return wrote

    def _plan(self):
        """(request, how many of its tokens) for the next step: those that write first, then prompts in order."""
        everyone = [*(p for p in self.prefixes if p.ids), *self.running]
        plan = [(r, 1) for r in everyone if r.left == 1]
        budget = self.chunk
        for r in everyone:
            if r.left > 1 and budget:
                plan.append((r, min(r.left, budget)))
                budget -= plan[-1][1]
        return plan

    def _needed(self, plan):
        ids = [id for r, _ in plan for id in r.ids]
        return self.cache.pages_needed(ids, [n for r, n in plan for _ in r.ids])

    def _count(self, plan, wrote, seconds):
        t = self.totals
        t.steps += 1
        t.seconds += seconds
        t.read += sum(n for _, n in plan)
        t.written += len(wrote)
        t.most_pages = max(t.most_pages, self.cache.pages_used)
        t.most_saved = max(t.most_saved, self.saved)
        for r in wrote:
            r.first = t.seconds if r.first is None else r.first

    def _finish(self, wrote):
        for r in wrote:
            if len(r.written) == r.new or r.written[-1] in self.model.stop:
                r.done = True
                self._drop(r)
                self.running.remove(r)
        named = {r.prefix for r in (*self.waiting, *self.running)}
        for n, p in enumerate(self.prefixes):
            if p.ids and n not in named:
                self._drop(p)

    # ---- pages -----------------------------------------------------------------------------------------------

    @property
    def saved(self):
        """How many pages more the running requests would have, each for itself."""
        return max(0, sum(self._pages(r.read) for r in self.running) - self.cache.pages_used)

    def _pages(self, length):
        return -(-length // self.page) * self.model.layers

    def _beyond(self, r, length):
        """The pages of a request's first so many tokens that it does not share with its prefix."""
        shared = 0 if r.prefix is None else len(self.prefixes[r.prefix].prompt)
        return 0 if length <= shared else self._pages(length) - shared // self.page * self.model.layers

    def _admit(self):
        """Let requests in, in order, as long as there is room for all that they have to read, and one token more.

        The first one's prefix is read before it; it waits until that is done.
        """
        while self.waiting and len(self.running) < self.most:
            r = self.waiting[0]
            p = None if r.prefix is None else self.prefixes[r.prefix]
            if p is not None and not p.ids:
                if self._room(self._pages(len(p.prompt)), p):
                    p.ids = [self.cache.open() for _ in range(self.model.layers)]
                return
            if (p is not None and p.left) or not self._room(self._beyond(r, len(r.tokens) + 1), p):
                return
            r.ids = (
                [self.cache.open() for _ in range(self.model.layers)]
                if p is None
                else [*map(self.cache.fork, p.ids)]
            )
            r.read = 0 if p is None else p.read
            self.running.append(self.waiting.popleft())

    def _room(self, pages, keep):
        """Whether so many pages are free and promised to nobody. Prefixes without users make room, but for `keep`."""
        while True:
            promised = sum(self._beyond(r, len(r.tokens) + 1) - self._beyond(r, r.read) for r in self.running)
            promised += sum(self._pages(len(p.prompt)) - self._pages(p.read) for p in self.prefixes if p.ids)
            if pages + promised <= self.cache.pages_free:
                return True
            if (idle := self._idle(keep)) is None:
                return False
            self._drop(idle)

    def _idle(self, keep=None):
        """A prefix in the cache that no running request has."""
        used = {r.prefix for r in self.running}
        return next(
            (p for n, p in enumerate(self.prefixes) if p.ids and p is not keep and n not in used), None
        )

    def _give_way(self):
        """Free the pages of a prefix that nobody uses, or send the youngest request back: it is read again later."""
        idle = self._idle()
        if idle is None:
            idle = self.running.pop()
            self.waiting.appendleft(idle)
            self.totals.sent_back += 1
        self._drop(idle)

    def _drop(self, r):
        self.cache.free(r.ids)
        r.ids, r.read = [], 0

    # ---- what a file keeps -----------------------------------------------------------------------------------

    def state(self):
        """All but the cache and the model, as JSON has it."""
        number = {id(r): n for n, r in enumerate(self.requests)}
        return {
            "settings": {"pages": self.pages, "page": self.page, "most": self.most, "chunk": self.chunk},
            "requests": [asdict(r) for r in self.requests],
            "prefixes": [asdict(r) for r in self.prefixes],
            "waiting": [number[id(r)] for r in self.waiting],
            "running": [number[id(r)] for r in self.running],
            "totals": asdict(self.totals),
        }

    @classmethod
    def restored(cls, model, state, cache):
        """The engine that had this state and this cache."""
        engine = cls(model, **state["settings"])
        engine.requests = [Request(**r) for r in state["requests"]]
        engine.prefixes = [Request(**r) for r in state["prefixes"]]
        engine.waiting = deque(engine.requests[n] for n in state["waiting"])
        engine.running = [engine.requests[n] for n in state["running"]]
        engine.totals = Totals(**state["totals"])
        engine.cache = cache
        for r in (*engine.requests, *engine.prefixes):
            if r.ids and set(cache.lengths(r.ids).tolist()) != {r.read}:
                raise ValueError(f"a request has read {r.read} tokens, its cache has {cache.lengths(r.ids)}")
        return engine
