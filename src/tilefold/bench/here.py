"""A peer in this process: its memory can be counted, and an error of ours is an error."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from .peers.row import Peer
from .quiet import quiet
from .scenarios import Inputs, Scenario
from .worker import seconds


class Here:
    """A peer's call, with the result of the first one."""

    def __init__(self, peer: Peer, scenario: Scenario, inputs: Inputs) -> None:
        self.call = peer.build(scenario, inputs)
        self.result = scenario.result(peer.numpy(self.call(), scenario), inputs)
        self.once = seconds(self.call, 1)

    def seconds(self, times: int) -> float:
        took = seconds(self.call, times)
        quiet()
        return took


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that was allocated at once during a call, its output included; untimed, because counting is slow."""
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
