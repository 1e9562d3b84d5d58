"""What every interface asks of its tensors, before anything is computed or written.

Index tensors (cumulative lengths, used lengths, tables) are copied once and only the copy is looked at and used, so
that a caller who changes his own meanwhile cannot send a call to memory that was not checked. In a program that is
being compiled they have no numbers yet; the operator that it becomes checks those of packed sequences when it runs.
"""

from __future__ import annotations

from typing import Any

from ...call import DROPOUT
from ...frameworks import is_traced

Tensor = Any  # torch is imported where it is needed


def floats(**given: Any) -> None:
    """TypeError or ValueError unless all tensors that are given share one dtype that attention has, on the CPU."""
    import torch

    taken = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    first = None
    for name, x in given.items():
        if x is None:
            continue
        tensor(name, x)
        if x.dtype not in taken:
            more = "; 8-bit floats and their descale factors are not offered" if x.element_size() == 1 else ""
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}{more}")
        if first is None:
            first = name, x.dtype
        elif x.dtype != first[1]:
            raise TypeError(f"{first[0]} and {name} must have one dtype, got {first[1]} and {x.dtype}")


def tensor(name: str, x: Any) -> None:
    """TypeError unless `x` is a tensor, ValueError unless it is on the CPU."""
    import torch

    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.device.type != "cpu":
        raise ValueError(
            f"{name} is on {x.device}, and this is flash-attn's interface for the CPU: pass {name}.cpu(), or use "
            "the flash-attn package, which computes on CUDA devices"
        )


def batches(q: Tensor, k: Tensor, v: Tensor) -> None:
    """All of this for batches (batch, length, heads, dim); what is right is seen in one look."""
    try:
        right = (
            q.dtype is k.dtype is v.dtype
            and q.is_cpu and k.is_cpu and v.is_cpu
            and q.is_floating_point() and q.element_size() > 1
            and q.ndim == k.ndim == v.ndim == 4
            and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3] and k.shape[:3] == v.shape[:3]
            and k.shape[2] and q.shape[2] % k.shape[2] == 0
        )  # fmt: skip
    except AttributeError:  # no tensors
        right = False
    if not right:
        floats(q=q, k=k, v=v)
        shape("q", q, "batch", "q_len", "heads", "dim")
        shape("k", k, q.shape[0], "kv_len", "kv_heads", q.shape[3])
        heads(q, k, v)


def shape(name: str, x: Tensor, *sizes: int | str) -> None:
    """ValueError unless `x` has these sizes; a word stands for any size."""
    fits = x.ndim == len(sizes) and all(
        isinstance(n, str) or n == m for n, m in zip(sizes, x.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, sizes))
        raise ValueError(f"{name} must have shape ({wanted}{',' * (len(sizes) == 1)}), got {tuple(x.shape)}")


def heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless heads and head sizes of queries, keys and values fit; their last two axes are (heads, dim)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            raise ValueError(f"{name} must have shape (..., heads, dim), got {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q and k must have one head size, got {q.shape[-1]} and {k.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"k and v must differ in their head size only, got {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (k.shape[-2] == 0) != (q.shape[-2] == 0) or (k.shape[-2] and q.shape[-2] % k.shape[-2]):
        raise ValueError(
            f"the heads of q must be a multiple of those of k and v, got {q.shape[-2]} and {k.shape[-2]}"
        )


def integers(name: str, x: Any, *sizes: int | str) -> Tensor:
    """A private int64 copy of an int32 or int64 tensor of these sizes."""
    import torch

    tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {x.dtype}")
    shape(name, x, *sizes)
    return x.detach().to(torch.int64, copy=True)


def within(name: str, x: Tensor, least: int, most: int) -> None:
    """ValueError unless all integers of `x` lie between `least` and `most`, both included."""
    if is_traced(x) or not x.numel():
        return
    numbers = x.numpy()
    low, high = int(numbers.min()), int(numbers.max())
    if low < least or high > most:
        raise ValueError(f"{name} must lie within {least} and {most}, got {low if low < least else high}")


def cumulative(name: str, x: Any, total: int, batch: int | None = None) -> Tensor:
    """Cumulative lengths [0, ..., at most `total`] as a private copy."""
    ends = integers(name, x, "batch + 1" if batch is None else batch + 1)
    if not len(ends):
        raise ValueError(f"{name} must hold at least the 0 it starts with")
    if is_traced(x):
        return ends
    numbers = ends.numpy()
    if numbers[0] != 0:
        raise ValueError(f"{name} must start at 0, got {numbers[0]}")
    if (numbers[1:] < numbers[:-1]).any():
        raise ValueError(f"{name} must not decrease, got {numbers.tolist()}")
    if numbers[-1] > total:
        raise ValueError(f"{name} must not go beyond the {total} packed rows, got {numbers[-1]}")
    return ends


def used(name: str, x: Any, most: Tensor) -> Tensor:
    """How many rows of each sequence are used, as a private copy: none below 0 or above `most`."""
    counts = integers(name, x, len(most))
    if not is_traced(x) and bool(((counts < 0) | (counts > most)).any()):
        raise ValueError(f"{name} must lie between 0 and the lengths {most.tolist()}, got {counts.tolist()}")
    return counts


def maximum(name: str, x: Any, lengths: Tensor) -> int:
    """`x`, the caller's maximum, or the longest of `lengths`; ValueError if rows would be left out."""
    if is_traced(lengths):
        if x is None:
            raise TypeError(f"{name} must be given in a compiled program, got None")
        return int(x)
    longest = int(lengths.numpy().max(initial=0))
    if x is None:
        return longest
    if int(x) < longest:
        raise ValueError(f"{name} must be at least {longest}, the longest sequence; got {int(x)}")
    return int(x)


def slopes(x: Any, batch: int, heads: int) -> Tensor | None:
    """ALiBi slopes (heads,) or (batch, heads), which have no gradient; TypeError or ValueError for anything else."""
    if x is None:
        return None
    tensor("alibi_slopes", x)
    if not x.is_floating_point():
        raise TypeError(f"alibi_slopes must be float32, got {x.dtype}")
    if tuple(x.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(x.shape)}"
        )
    return x.detach()


def no_dropout(p: float) -> None:
    if p != 0:
        raise ValueError(f"dropout_p must be 0, got {p}: {DROPOUT}")


def absent(why: str, **given: Any) -> None:
    """NotImplementedError for options of the original that this library does not have."""
    for name, x in given.items():
        if x is not None:
            raise NotImplementedError(f"{name} must be None: {why}")
