"""PyTorch's scaled_dot_product_attention, meaning what PyTorch means, in memory that grows with the length.

Three ways in: call it; run a block of code under `use()`, where every call of torch's own function is this one; or give
the whole process tilefold's kernels through torch's registry (`register`). The fact to know: is_causal aligns to the
top left here, query i sees key j iff j <= i, while `tilefold.attention(causal=True)` aligns to the bottom right.
"""

from __future__ import annotations

import math
import sys
import warnings
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import Library
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.attention import register_flash_attention_impl
from torch.overrides import TorchFunctionMode

from ..api import attention, attention_grad
from ..call import DROPOUT, flag
from ..masks import Mask, causal

_TORCHS = F.scaled_dot_product_attention
_TOP_LEFT = causal(align="top-left")
_BOTTOM_RIGHT = causal()


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `torch.nn.functional.scaled_dot_product_attention` of PyTorch 2.13 gives, exactly and differentiably.

    Args:
        query: ``(..., H, L, E)``, or ``(L, E)``; any strides.
        key, value: ``(..., H, S, E)`` and ``(..., H, S, Ev)``. Leading dimensions broadcast, without a copy.
        attn_mask: booleans, True = attend, or floats of query's type or float32 that are added to the scores, with a
            gradient where they ask for one; broadcastable to ``(..., H, L, S)`` and never expanded. What
            `torch.nn.attention.bias` makes, `causal_lower_right` and `causal_upper_left`, takes no memory here.
        dropout_p: must be 0.
        is_causal: query i sees key j iff ``j <= i``, whatever the lengths; excludes `attn_mask`.
        scale: factor of the scores, ``1 / sqrt(E)`` by default.
        enable_gqa: key and value may have fewer heads, never copied; query head h reads key head ``h // (H / Hkv)``.

    Returns:
        ``(..., H, L, Ev)`` in query's type and memory order. A row that sees no key is 0. NaN or infinity behind a
        mask reaches no output and no gradient (in PyTorch it may).

    Raises:
        TypeError, ValueError: a wrong kind, value or shape, where PyTorch raises RuntimeError. The message names the
            argument, what it was and what was expected.

    >>> q, k, v = torch.randn(3, 2, 8, 100, 64)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 8, 100, 64])
    """
    if dropout_p:
        _refuse_dropout(dropout_p)
    if is_causal is not True and is_causal is not False:
        is_causal = flag("is_causal", is_causal)
    try:
        q, k, v = query.shape, key.shape, value.shape
        if not (q == k == v or _alike(q, k, v, enable_gqa)):
            query, key, value = _joined(query, key, value, enable_gqa)
        if scale is not None and isinstance(scale, Tensor):
            scale = scale.item()
        if attn_mask is not None:
            mask, bias = _mask_and_bias(attn_mask, query, key, is_causal)
            return attention(query, key, value, mask, scale=scale, bias=bias)
        if is_causal and q[-2] != k[-2]:
            return attention(query, key, value, _TOP_LEFT, scale=scale)
        return attention(query, key, value, causal=is_causal, scale=scale)
    except Exception:
        _complain(query, key, value, attn_mask, enable_gqa)
        if query.shape[-3:-2] == key.shape[-3:-2] == (0,):  # `attention` asks for a head
            return query @ key.mT @ value
        raise


def _alike(q: torch.Size, k: torch.Size, v: torch.Size, enable_gqa: bool) -> bool:
    """Whether leading dimensions are as `attention` takes them."""
    return k[:-2] == v[:-2] and (q[:-3] == k[:-3] if enable_gqa else q[:-2] == k[:-2])


def _joined(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three under common leading dimensions, as views."""
    _complain(query, key, value, None, enable_gqa)
    if enable_gqa:
        key, value = _of_as_many_heads(key, value)
        lead = _broadcast(-3, query=query, key=key, value=value)
        return tuple(x.expand(*lead, *x.shape[-3:]) for x in (query, key, value))
    lead = _broadcast(-2, query=query, key=key, value=value)
    return tuple(x.expand(*lead, *x.shape[-2:]) for x in (query, key, value))


def _of_as_many_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with equally many heads. Only where they differ is one repeated."""
    k_heads, v_heads = key.shape[-3], value.shape[-3]
    common = math.lcm(k_heads, v_heads)
    if k_heads < common:
        key = key.repeat_interleave(common // k_heads, -3)
    if v_heads < common:
        value = value.repeat_interleave(common // v_heads, -3)
    return key, value


def _broadcast(end: int, **tensors: Tensor) -> tuple[int, ...]:
    """What the leading dimensions, up to `end`, broadcast to."""
    try:
        return tuple(torch.broadcast_shapes(*(x.shape[:end] for x in tensors.values())))
    except RuntimeError:
        shapes = ", ".join(f"{name} {_sizes(x)}" for name, x in tensors.items())
        hint = "" if end == -3 else "; enable_gqa=True shares key heads"
        raise ValueError(f"leading dimensions must broadcast, got {shapes}{hint}") from None


def _mask_and_bias(
    attn_mask: Tensor, query: Tensor, key: Tensor, is_causal: bool
) -> tuple[Mask | Tensor | None, Tensor | None]:
    """An attn_mask as what hides and what is added, one of them None."""
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal=True; torch applies one or the other")
    if _is_causal_bias(attn_mask):
        lengths = (query.shape[-2], key.shape[-2])
        if attn_mask.variant.name == "UPPER_LEFT":
            return _TOP_LEFT, None
        if (attn_mask.seq_len_q, attn_mask.seq_len_kv) != lengths:
            raise ValueError(
                f"attn_mask must be made for the lengths of query and key {lengths}, "
                f"got {(attn_mask.seq_len_q, attn_mask.seq_len_kv)}"
            )
        return _BOTTOM_RIGHT, None
    if attn_mask.dtype is torch.bool:
        return attn_mask, None
    if attn_mask.dtype not in (torch.float32, query.dtype) and not torch.is_autocast_enabled("cpu"):
        raise TypeError(
            f"attn_mask must be bool, float32 or {query.dtype} as query is, got {attn_mask.dtype}"
        )
    return None, attn_mask


def _is_causal_bias(x: Any) -> bool:
    """Whether `x` is of torch's module of biases, which is not loaded to ask: it takes torch's compiler along."""
    if type(x) in (Tensor, Parameter):
        return False
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(x, module.CausalBias)


def _complain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> None:
    """What is wrong with the tensors, by the names of this signature. Asked only once something is."""
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    if attn_mask is None:
        del tensors["attn_mask"]
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.device.type != "cpu":
            raise TypeError(f"{name} must be in CPU memory, got a tensor on {x.device}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 2:
            raise ValueError(f"{name} must have shape (..., length, dim), got {_sizes(x)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query is, got {x.dtype}")
        if enable_gqa:
            _complain_of_heads(name, x, query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's last dimension {query.shape[-1]}, got {_sizes(key)}")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have key's length {key.shape[-2]}, got {_sizes(value)}")
    if attn_mask is None or _is_causal_bias(attn_mask) or query.shape[:-3] != key.shape[:-3]:
        return
    shape = (*query.shape[:-1], key.shape[-2])
    try:
        fits = torch.broadcast_shapes(attn_mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {shape}, got {_sizes(attn_mask)}")


def _complain_of_heads(name: str, x: Tensor, query: Tensor) -> None:
    if x.ndim < 3:
        raise ValueError(f"{name} must have shape (..., heads, length, dim) for enable_gqa, got {_sizes(x)}")
    heads, n = query.shape[-3], x.shape[-3]
    if x is not query and (heads % n if n else heads):
        raise ValueError(f"{name} must have heads that divide the {heads} of query, got {n}")


def _sizes(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


# ---- a block of code -----------------------------------------------------------------------------------------


def use() -> TorchFunctionMode:
    """A context in which torch's own scaled_dot_product_attention is the one above, for everything that calls it.

    It holds for the thread that entered it, as `torch.no_grad` does, nests, and ends with the block, also by an
    exception. Code under `torch.compile` is compiled once for inside and once for outside.

    What tilefold does not do, torch goes on doing, so a model in training with dropout runs as before: calls with
    dropout, with attn_mask and is_causal together, with tensors that are not in CPU memory, of other types or of
    subclasses, and calls under `torch.nn.attention.sdpa_kernel` without FLASH_ATTENTION.

    Gradients are tilefold's wherever the backward pass runs; only gradient checkpointing computes forward again, so its
    backward pass belongs into the block too.

    This is no override of torch's kernel, as `register` makes: that holds for all threads, and torch does not ask it
    for 3-D or 5-D inputs, values of another width, masks with a gradient, or rows that are not contiguous.

    >>> q = torch.randn(2, 8, 100, 64)
    >>> with use():
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> bool((out == scaled_dot_product_attention(q, q, q)).all())
    True
    """
    return _Use()


class _Use(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _TORCHS:
            return _either(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and _KINDS.issuperset(types):
            return _MULTI_HEAD(*args, **(kwargs or {}))
        if func in _PULLS and _KINDS.issuperset(types):
            with self:
                return _PULLS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _either(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Ours where it means the same, else torch's."""
    if (
        not dropout_p
        and _plain(query) and _plain(key) and _plain(value)
        and (attn_mask is None or (not is_causal and (_plain(attn_mask) or _is_causal_bias(attn_mask))))
        and torch._C._get_flash_sdp_enabled()
    ):  # fmt: skip
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa)
    return _TORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool})
_KINDS = frozenset(
    {Tensor, Parameter, FakeTensor, FunctionalTensor}
)  # the last two stand in while a program is exported


def _plain(x: Any) -> bool:
    """A tensor in CPU memory, of a type that has no meaning of its own for attention."""
    return type(x) in _KINDS and x.is_cpu and x.dtype in _TYPES and not x.is_nested


def _over(function: Any, **others: Any) -> FunctionType:
    """A function of torch that finds `others` where it looks for those names.

    A mode is off while it handles a call, so attention within a function that torch gives to modes would escape it.
    The code is torch's own, over a module of the names that it uses, because torch.compile looks modules up by name.
    """
    name = f"{__name__}.{function.__qualname__}"
    module = sys.modules[name] = ModuleType(name, "Names that a function of torch uses.")
    uses = {*function.__code__.co_names, "__builtins__"} - {"__name__"}
    vars(module).update({word: x for word, x in function.__globals__.items() if word in uses})
    vars(module).update(others)
    copy = FunctionType(
        function.__code__, vars(module), function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _no(*_: Any) -> bool:
    return False


_MULTI_HEAD = _over(
    F.multi_head_attention_forward, scaled_dot_product_attention=_either, has_torch_function=_no
)

# A backward pass computes checkpoints again: it begins without asking modes, and so with the mode on.
_PULLS = {
    Tensor.backward: _over(Tensor.backward, has_torch_function_unary=_no),
    torch.autograd.backward: _over(torch.autograd.backward, has_torch_function=_no),
    torch.autograd.grad: _over(torch.autograd.grad, has_torch_function=_no),
}


# ---- the whole process ---------------------------------------------------------------------------------------


def register() -> None:
    """Make tilefold known to torch's registry of flash attention; nothing changes before it is activated there.

    ``torch.nn.attention.activate_flash_attention_impl("tilefold")`` then runs every attention that torch gives to its
    flash kernel on CPU: of functions, modules and compiled code, in all threads, forward and backward.
    ``torch.nn.attention.restore_flash_attention_impl()`` gives torch's kernels back. To register twice does no harm.

    Torch keeps to its plain method, as ever, for dropout, for inputs that are not 4-D, values of another width, masks
    with a gradient, and rows that are not contiguous; and in evaluation without gradients it runs its own modules as
    one kernel each, unless ``torch.backends.mha.set_fastpath_enabled(False)``. But for dropout, `use` has all of those.

    >>> register()
    >>> "tilefold" in torch.nn.attention.list_flash_attention_impls()
    True
    """
    register_flash_attention_impl("tilefold", register_fn=_Installed)


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Installed:
    """Torch's flash kernels for CPU replaced, until `remove`.

    Compiled code relies on the memory order that torch's meta kernels announce, so they are asked for it here.
    """

    def __init__(self) -> None:
        q = torch.empty(2, 3, 5, 7, device="meta")
        self.out_as_query = all(
            _FORWARD(x, x, x)[0].stride() == x.stride()
            for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2))
        )
        out, lse = _FORWARD(q, q, q)
        self.out, self.lse = _Order(out), _Order(lse)
        self.grads = [_Order(x) for x in _BACKWARD(out, q, q, q, out, lse, 0.0, False)]
        self.library = Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            for op, kernel in ((_FORWARD, self.forward), (_BACKWARD, self.backward)):
                self.library.impl(op.default, kernel, "CPU", allow_override=True)

    def remove(self) -> None:
        self.library._destroy()

    @torch.no_grad()
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
        *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        _refuse_dropout(dropout_p)
        options = _options(attn_mask, is_causal, query, key)
        out, lse = attention(query, key, value, scale=scale, return_lse=True, **options)
        if attn_mask is not None:
            lse.masked_fill_(lse == -math.inf, 0.0)  # what torch's kernel says of a row without keys
        if not self.out_as_query:
            out = self.out.lay(out)
        elif not query.is_contiguous() and out.stride() != (like := torch.empty_like(query)).stride():
            out = like.copy_(out)
        return out, self.lse.lay(lse)

    @torch.no_grad()
    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
        dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        _refuse_dropout(dropout_p)
        options = _options(attn_mask, is_causal, query, key)
        grads = attention_grad(query, key, value, out, logsumexp, grad_out, scale=scale, **options)
        return tuple(order.lay(x) for order, x in zip(self.grads, grads[:3], strict=True))


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise ValueError(f"dropout_p must be 0, got {dropout_p!r}; {DROPOUT}")


def _options(attn_mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> dict[str, Any]:
    """The mask options of `attention`. Torch's kernel applies attn_mask and is_causal both.

    Booleans arrive here as floats, 0 and -inf; as booleans again they hide whole tiles and have no gradient.
    """
    options: dict[str, Any] = {}
    if is_causal and query.shape[-2] == key.shape[-2]:
        options["causal"] = True
    elif is_causal:
        options["mask"] = _TOP_LEFT
    if attn_mask is None:
        return options
    seen = attn_mask == 0
    if "mask" in options or not bool((seen | (attn_mask == -math.inf)).all()):
        options["bias"] = attn_mask
    else:
        options["mask"] = seen
    return options


class _Order:
    """The axes of a tensor as they lie in memory, farthest steps first."""

    def __init__(self, x: Tensor) -> None:
        self.there = tuple(sorted(range(x.ndim), key=lambda axis: -x.stride(axis)))
        self.back = tuple(self.there.index(axis) for axis in range(x.ndim))

    def lay(self, x: Tensor) -> Tensor:
        """The values of `x` in that order; `x` itself where they are."""
        return x.permute(self.there).contiguous().permute(self.back)
