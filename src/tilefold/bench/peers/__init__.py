"""Who is measured: one file per library, one row here. Frameworks are imported only inside these files' functions."""

from .drop_in import DROP_IN
from .jax import JAX
from .onnxruntime import ONNXRUNTIME
from .openvino import OPENVINO
from .ours import FLASH, NAIVE
from .row import Peer
from .torch import TORCH
from .vllm import VLLM
from .zentorch import ZENTORCH

PEERS = (NAIVE, FLASH, TORCH, JAX, ONNXRUNTIME, OPENVINO, ZENTORCH, VLLM)
NAMED = (*PEERS, DROP_IN)  # the last takes part only where it is named, or the set is about it

__all__ = ["FLASH", "NAIVE", "NAMED", "PEERS", "Peer", "chosen"]


def chosen(names: str | None) -> tuple[Peer, ...]:
    """The peers of a text like `naive,tilefold,torch`; for None all that take part without being named.

    >>> [peer.name for peer in chosen("tilefold,naive")]
    ['naive', 'tilefold']
    """
    if names is None:
        return PEERS
    known = {peer.name: peer for peer in NAMED}
    wanted = {name.strip() for name in names.split(",")}
    if strange := sorted(wanted - set(known)):
        raise ValueError(f"--peers must be some of {', '.join(known)}; got {strange[0]!r}")
    return tuple(peer for peer in NAMED if peer.name in wanted)
