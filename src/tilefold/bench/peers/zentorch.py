"""AMD's attention for torch. It has an operator of its own, and torch's interface to it.

Importing it registers passes and replaces libraries inside torch, so torch itself must not be measured in its process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..scenarios import Inputs, Scenario
from ..threads import given
from . import torch as plain
from .row import Peer, four, heads_as_rows, installed
from .tensors import array, tensor


def _refuses(scenario: Scenario) -> str | None:
    return plain.refuses(scenario)


def _build(scenario: Scenario, inputs: Inputs) -> Callable[[], Any]:
    import torch
    import zentorch  # noqa: F401  (its import brings the operator)

    torch.set_num_threads(given())
    q, k, v, *bias = (four(x) for x in inputs)
    if scenario.sees_all and not bias:
        q = heads_as_rows(scenario, q)
    x, y, z, *added = (tensor(a) for a in (q, k, v, *bias))
    attn_mask, causal = (added[0] if added else None), scenario.is_causal and not scenario.sees_all
    sdpa = torch.ops.zentorch.zentorch_sdpa
    return lambda: sdpa(x, y, z, 0.0, causal, attn_mask=attn_mask)[0]


def _result(out: Any, dtype: str) -> np.ndarray:
    return array(out.contiguous(), dtype)


ZENTORCH = Peer(
    "zentorch",
    installed("torch", "zentorch"),
    _refuses,
    _build,
    _result,
    foreign=True,
    apart=f"{__name__}:ZENTORCH",
    package="zentorch",
    note="torch.ops.zentorch.zentorch_sdpa",
)
