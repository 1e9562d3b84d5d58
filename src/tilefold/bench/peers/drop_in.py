"""tilefold in torch's place: `tilefold.drop_in.sdpa` on tensors, with torch's autograd around it.

What it takes beyond `tilefold` on arrays is the price of the door; beside `torch` it is what a model would gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..scenarios import Inputs, Scenario
from .row import Peer, installed
from .tensors import array
from .torch import called, refuses


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    from ...drop_in.sdpa import scaled_dot_product_attention

    return called(scaled_dot_product_attention, scenario, inputs, rows=False)


DROP_IN = Peer(
    "drop-in",
    installed("torch"),
    refuses,
    _build,
    array,
    foreign=False,
    apart=f"{__name__}:DROP_IN",
    package="tilefold",
    note="tilefold.drop_in.sdpa.scaled_dot_product_attention on tensors",
    backward=True,
)
