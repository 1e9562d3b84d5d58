"""The far end of a peer that runs in a process of its own: `python -m tilefold.bench.worker MODULE:NAME THREADS`.

Requests come in and answers go out as lines of JSON. With a folder a request means: read a scenario's arrays there, and
leave the result of one call. Else: repeat that call. What libraries print goes to stderr, lest it look like an answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from time import perf_counter
from typing import Any

import numpy as np

from . import exchange, threads
from .peers.row import Peer
from .quiet import quiet
from .scenarios import Scenario


def seconds(call: Callable[[], Any], times: int) -> float:
    """How long one call takes when it is repeated."""
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


def sentence(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Worker:
    """One peer and the call that is measured at the moment."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.call: Callable[[], Any] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """A refusal where the peer fails, whatever it fails with."""
        try:
            return self._build(request) if "folder" in request else self._time(request["times"])
        except Exception as error:
            self.call = None
            return {"refusal": f"failed: {sentence(error)}"}

    def _build(self, request: dict[str, Any]) -> dict[str, Any]:
        self.call = None  # the last scenario's arrays go first
        folder, scenario = Path(request["folder"]), Scenario.parse(request["scenario"], request["dtype"])
        inputs = exchange.get_inputs(folder)
        call = self.peer.build(scenario, inputs)
        out = scenario.result(self.peer.numpy(call(), scenario), inputs)
        exchange.put(folder, request["result"], np.ascontiguousarray(out))
        self.call = call
        return self._time(1)

    def _time(self, times: int) -> dict[str, Any]:
        assert self.call is not None
        took = seconds(self.call, times)
        quiet()
        return {"seconds": took}


def main(reference: str, count: str) -> None:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threads.confine(int(count))
    worker = Worker(resolve_name(reference))
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
