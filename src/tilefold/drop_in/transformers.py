"""Hugging Face transformers: ``attn_implementation="tilefold"`` for every model that asks for its attention by name.

It decides how transformers' masks, which are functions of indices, become what `tilefold.attention` takes, so that
causal, sliding, chunked, packed and padded models never hold an n x n tensor. The fact that is discovered too late: an
attention function that is registered without a mask function of the same name is called with no mask at all, and
causality and padding are lost without a word. So both are registered together.

A mask function is recognised by the code object of transformers' own factories. What is not recognised is asked
for a block of query rows at a time, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from .. import api, masks, witnesses
from ..arrays.torch.modules import as_attended
from .attention_summary import Asked, AttentionSummary, choose, summaries

__all__ = ["AttentionMask", "AttentionSummary", "attention", "attention_mask", "register", "summaries"]

try:
    from transformers.utils.output_capturing import _active_collector as _COLLECTOR
except ImportError:  # a release that collects in another way
    _COLLECTOR = None

NAME = "tilefold"

Tensor = Any
MaskFunction = Callable[..., Any]  # of indices (batch, head, query, key), as transformers writes its masks


def register(statistics: Sequence[Any] | None = None, *, keep: bool = True) -> None:
    """Make ``attn_implementation="tilefold"`` known to transformers; calling it again changes no model.

    `statistics` are what ``output_attentions=True`` finds of each layer at once, and `keep` whether its summaries keep
    what they need to find more; `summaries` says the same for a block.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> register()
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="tilefold")
    >>> model.config._attn_implementation
    'tilefold'
    """
    choose(statistics, keep)
    if NAME not in AttentionMaskInterface().valid_keys():
        for factory in _FACTORIES:
            _remember_in_graphs(factory)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


# ---- what a mask function hides ------------------------------------------------------------------------------

_CAUSAL = masking_utils.causal_mask_function
_EVERYTHING = masking_utils.bidirectional_mask_function
_FACTORIES = (
    masking_utils.and_masks,
    masking_utils.sliding_window_overlay,
    masking_utils.sliding_window_bidirectional_overlay,
    masking_utils.chunked_overlay,
    masking_utils.packed_sequence_mask_function,
    masking_utils.remap_positions_for_packed_sequence,
)


def _code_made_by(factory: Any) -> CodeType:
    """The code of the function of (batch, head, query, key) that a factory defines and returns."""
    (code,) = (x for x in factory.__code__.co_consts if isinstance(x, CodeType) and x.co_argcount == 4)
    return code


_CODES = tuple(map(_code_made_by, _FACTORIES))
_AND, _WINDOW, _BOTH_SIDES, _CHUNKED, _PACKED, _REMAPPED = _CODES


def _remember_in_graphs(factory: Any) -> None:
    """While torch.compile traces, have a factory's functions keep what they were made of.

    Dynamo does not show the closure of a function that was made in the program that it traces. It does show an
    attribute; so there, and nowhere else, the factory is replaced by its twin that leaves one.
    """
    twin = FunctionType(factory.__code__, factory.__globals__, factory.__name__, factory.__defaults__)
    names = tuple(inspect.signature(factory).parameters)
    variadic = factory is masking_utils.and_masks

    def made(*args: Any, **kwargs: Any) -> Any:
        fn = twin(*args, **kwargs)
        fn.tilefold_made_of = {names[0]: args} if variadic else {**dict(zip(names, args)), **kwargs}  # noqa: B905
        return fn

    torch.compiler.substitute_in_graph(factory, skip_signature_check=True)(made)


def _made_of(fn: Any) -> tuple[CodeType | None, dict[str, Any]]:
    """The code by which a factory's function is known and what it holds, by name; (None, {}) for any other."""
    code = getattr(fn, "__code__", None)
    if not any(code is known for known in _CODES):
        return None, {}
    kept = getattr(fn, "tilefold_made_of", None)
    if kept is not None:
        return code, kept
    if torch.compiler.is_dynamo_compiling():
        return None, {}
    cells = (cell.cell_contents for cell in fn.__closure__)
    return code, dict(zip(fn.__code__.co_freevars, cells, strict=True))


def _conjuncts(fn: MaskFunction) -> list[MaskFunction]:
    """The functions whose conjunction `fn` is."""
    code, made = _made_of(fn)
    if code is not _AND:
        return [fn]
    return [part for whole in made["mask_functions"] for part in _conjuncts(whole)]


@dataclass(slots=True)
class _Pattern:
    """A conjunction: a band around a query's own position, segments that see only themselves, and the unknown.

    `left` and `right` count other keys, None is unlimited. A chunk is (size, left padding (batch,), positions
    (batch, n) or None for the plain ones); `packed` is the sequence number of every position, (batch, n).
    """

    left: int | None = None
    right: int | None = None
    chunks: list[tuple[int, Tensor, Tensor | None]] = field(default_factory=list)
    packed: Tensor | None = None
    unknown: bool = False

    @classmethod
    def of(cls, fn: MaskFunction) -> _Pattern:
        pattern = cls()
        parts = _conjuncts(fn)
        for part in parts:
            code, made = _made_of(part)
            if code is _PACKED:
                pattern.unknown |= pattern.packed is not None
                pattern.packed = made["packed_sequence_mask"]
        for part in parts:
            pattern._narrow(part, None)
        return pattern

    def _narrow(self, fn: MaskFunction, positions: Tensor | None) -> None:
        """Take one conjunct in. With `positions` it speaks of positions within packed sequences."""
        code, made = _made_of(fn)
        if fn is _CAUSAL:
            self._band(None, 0)
        elif fn is _EVERYTHING or (code is _PACKED and positions is None):
            pass
        elif code is _WINDOW:
            self._band(made["sliding_window"] - 1, None)
        elif code is _BOTH_SIDES:
            self._band(made["sliding_window"], made["sliding_window"])
        elif code is _CHUNKED:
            self.chunks.append((made["chunk_size"], made["left_padding"], positions))
        elif code is _REMAPPED and positions is None and self._counts(made["position_ids"]):
            for part in _conjuncts(made["mask_function"]):
                self._narrow(part, made["position_ids"])
        else:
            self.unknown = True

    def _band(self, left: int | None, right: int | None) -> None:
        if left is not None:
            self.left = left if self.left is None else min(left, self.left)
        if right is not None:
            self.right = right if self.right is None else min(right, self.right)

    def _counts(self, positions: Tensor) -> bool:
        """Whether positions go up by one within each packed sequence: then a band of positions is one of indices.

        transformers cuts sequences where they do not, so while a graph is traced, and no value is known, they do.
        """
        if self.packed is None:
            return False
        if torch.compiler.is_compiling():
            return True
        same = self.packed[:, 1:] == self.packed[:, :-1]
        return bool((torch.diff(positions, dim=-1) == 1)[same].all())

    @property
    def segmented(self) -> bool:
        return self.packed is not None or bool(self.chunks)

    def ids(self, q_at: Tensor, k_at: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each kind of segment the numbers of the queries' and of the keys', (batch, n), at these positions."""
        if self.packed is not None:
            yield self.packed, self.packed
        for size, padding, positions in self.chunks:
            both = (q_at[None], k_at[None]) if positions is None else (positions, positions)
            q_ids, k_ids = ((at - padding[:, None]) // size for at in both)
            yield q_ids, k_ids


# ---- the mask that reaches every layer -----------------------------------------------------------------------


class AttentionMask:
    """A mask as transformers made it: a function of indices and a 2-D padding mask, O(n) in all.

    It stands where models expect a boolean tensor (batch, 1, q_len, kv_len), and answers what they ask of one on the
    way to the attention function. Whatever else is done to it raises; `dense()` makes the tensor.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(
        self, batch: int, q_len: int, kv_len: int, *, q_offset: Any = 0, kv_offset: int = 0,
        fn: MaskFunction = _CAUSAL, padding: Tensor | None = None, use_vmap: bool = False, device: Any = "cpu",
    ) -> None:  # fmt: skip
        if isinstance(q_offset, torch.Tensor):  # a static cache's own count, which layers move on
            q_offset = q_offset.clone()
        self.batch, self.q_len, self.kv_len = batch, q_len, kv_len
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self.fn, self.use_vmap, self.device = fn, use_vmap, device
        self.pattern = _Pattern.of(fn)
        if padding is not None:
            padding = masking_utils.prepare_padding_mask(padding, kv_len, kv_offset)
            padding = padding[:, kv_offset : kv_offset + kv_len]
            if not torch.compiler.is_compiling() and bool(padding.all()):
                padding = None
        self.padding = padding
        self._options: dict[bool, dict[str, Any]] = {}
        self._seen: dict[tuple[int, ...], Any] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, 1, self.q_len, self.kv_len

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def to(self, *args: Any, **kwargs: Any) -> AttentionMask:
        return self

    def contiguous(self) -> AttentionMask:
        return self

    def __getitem__(self, where: Any) -> AttentionMask:
        """``mask[:, :, :, :n]``, the first n keys, as models cut a mask to the keys that they have."""
        parts = where if isinstance(where, tuple) else (where,)
        keys = parts[-1] if len(parts) == 4 else None
        whole = all(part == slice(None) for part in parts[:3])
        if not whole or not isinstance(keys, slice) or keys.step not in (None, 1):
            raise TypeError(f"attention_mask can be cut as [:, :, :, :n] only, got {where!r}; {_DENSE}")
        start, stop, _ = keys.indices(self.kv_len)
        if start:
            raise TypeError(f"attention_mask keeps its first keys when it is cut, got {keys!r}; {_DENSE}")
        padding = None if self.padding is None else self.padding[:, :stop]
        cut = AttentionMask(
            self.batch, self.q_len, stop, q_offset=self.q_offset, kv_offset=self.kv_offset, fn=self.fn,
            use_vmap=self.use_vmap, device=self.device,
        )  # fmt: skip
        cut.padding = padding
        return cut

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"attention_mask has no {name!r}: tilefold's is a rule and no tensor; {_DENSE}")

    def __repr__(self) -> str:
        return f"AttentionMask(shape={self.shape}, {self.pattern}, padding={'no' if self.padding is None else 'yes'})"

    def dense(self) -> Tensor:
        """The whole mask as booleans (batch, 1, q_len, kv_len), True = visible. O(q_len * kv_len)."""
        items = torch.arange(self.batch, device=self.device)
        return self._cells(items, slice(0, self.q_len), slice(0, self.kv_len))

    def options(self, packable: bool) -> dict[str, Any]:
        """The same as arguments of `tilefold.attention`, found out once for all layers.

        With `cu_seqlens_q` among them queries, keys and values are to be laid end to end as (heads, batch * n, dim),
        which only what is `packable` can be.
        """
        if packable not in self._options:
            self._options[packable] = self._as_options(packable)
        return self._options[packable]

    def _as_options(self, packable: bool) -> dict[str, Any]:
        traced = torch.compiler.is_compiling()
        offset = self.q_offset - self.kv_offset
        if isinstance(offset, torch.Tensor) and not traced:
            offset = int(offset)
        banded = self._band(offset)
        if banded is not None and not self.pattern.unknown:
            if not self.pattern.segmented:
                return {**banded, **self._padded(None)}
            square = not isinstance(offset, torch.Tensor) and offset == 0 and self.q_len == self.kv_len
            if square and packable and not traced:
                return {**banded, **self._packed()}
            if self.q_len > 1:
                return {**banded, **self._padded(self._documents())}
        if traced or self.q_len == 1:
            return {"mask": self.dense()}
        per_head = self.batch > 1
        mask = masks.from_predicate(self._rows_of_item if per_head else self._rows, per_head=per_head)
        return {**(banded or {}), "mask": mask}

    def _band(self, offset: Any) -> dict[str, Any] | None:
        """The band of the pattern where query 0 stands at key `offset`, or None where no argument says that."""
        left, right = self.pattern.left, self.pattern.right
        if left is None and right is None:
            return {}
        options: dict[str, Any] = {"causal": True} if right == 0 else {}
        if left is not None or right != 0:
            options["window"] = left, None if right == 0 else right
        if not isinstance(offset, torch.Tensor) and offset == self.kv_len - self.q_len:
            return options
        if right != 0:
            return None
        end = offset + self.q_len  # a cache with room: nobody sees what lies behind the last query
        if isinstance(end, torch.Tensor):
            return {**options, "kv_lengths": end.reshape(-1).expand(self.batch)}
        if not 0 <= end <= self.kv_len:
            return None
        return options if end == self.kv_len else {**options, "kv_lengths": end}

    def _padded(self, mask: masks.Mask | None) -> dict[str, Any]:
        """`mask` and the padding together."""
        if self.padding is None:
            return {} if mask is None else {"mask": mask}
        cells = self.padding[:, None, None, :]
        return {"mask": cells if mask is None else mask & masks.dense(_array(cells))}

    def _ids(self) -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.arange(max(self.q_len, self.kv_len), device=self.device)
        return self.pattern.ids(places[: self.q_len] + self.q_offset, places[: self.kv_len] + self.kv_offset)

    def _documents(self) -> masks.Mask:
        """Segments as a mask."""
        whole: masks.Mask | None = None
        for q_ids, k_ids in self._ids():
            q_ids, k_ids = (_array(x.expand(self.batch, -1)) for x in (q_ids, k_ids))
            part = masks.documents(k_ids, q_ids=q_ids)
            whole = part if whole is None else whole & part
        assert whole is not None
        return whole

    def _packed(self) -> dict[str, Any]:
        """Segments as sequences: all of the batch end to end, cut wherever one begins."""
        total = self.batch * self.q_len
        cut = torch.zeros(self.batch, self.q_len, dtype=torch.bool, device=self.device)
        cut[:, :1] = True
        for ids, _ in self._ids():
            cut[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        ends = torch.cat([cut.reshape(-1).nonzero()[:, 0], torch.tensor([total], device=self.device)])
        options: dict[str, Any] = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        if self.padding is not None:
            options["mask"] = self.padding.reshape(1, 1, total)
        return options

    def _rows(self, i: Any, j: Any) -> Any:
        return self._rows_of_item((0,), 0, i, j)

    def _rows_of_item(self, index: tuple[int, ...], head: int, i: Any, j: Any) -> Any:
        """What `from_predicate` asks: the cells of query rows i (R, 1) and keys j (1, C) of one batch item.

        It asks once per head, and transformers' masks do not depend on heads: the last rows are kept.
        """
        rows = index[0], int(i[0, 0]), int(i[-1, 0])
        if self._seen and next(iter(self._seen))[:3] != rows:
            self._seen.clear()
        block = *rows, int(j[0, 0]), int(j[0, -1])
        if block not in self._seen:
            item, first, last, least, most = block
            items = torch.tensor([item], device=self.device)
            cells = self._cells(items, slice(first, last + 1), slice(least, most + 1))
            self._seen[block] = cells[0, 0].numpy()
        return self._seen[block]

    def _cells(self, items: Tensor, rows: slice, keys: slice) -> Tensor:
        """Some cells of some batch items, by the function itself: (items, 1, rows, keys)."""
        q = torch.arange(rows.start, rows.stop, device=self.device) + self.q_offset
        k = torch.arange(keys.start, keys.stop, device=self.device) + self.kv_offset
        head = torch.zeros(1, dtype=torch.long, device=self.device)
        if self.use_vmap:
            fn = self.fn
            for axis in (3, 2, 1, 0):
                fn = torch.vmap(fn, in_dims=tuple(0 if n == axis else None for n in range(4)))
            with masking_utils.TransformGetItemToIndex():
                cells = fn(items, head, q, k)
        else:
            cells = self.fn(items[:, None, None, None], head[None, :, None, None], q[:, None], k)
        cells = cells.expand(len(items), 1, len(q), len(k))
        return cells if self.padding is None else cells & self.padding[items][:, None, None, keys]


def _array(x: Tensor) -> Any:
    """What a mask is made of: numbers, or in a program that is being compiled the tensor that will hold them."""
    return x if torch.compiler.is_compiling() else x.numpy()


_DENSE = "mask.dense() makes the tensor, n x n cells"


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: MaskFunction = _CAUSAL, attention_mask: Any = None, use_vmap: bool = False, device: Any = "cpu",
    **unused: Any,
) -> Any:  # fmt: skip
    """transformers' mask function for "tilefold": its own arguments, kept as an `AttentionMask`.

    What it may leave away (`allow_is_causal_skip` and its like) it never does, so that no layer has to guess.
    """
    if isinstance(attention_mask, AttentionMask):  # made before the forward pass, as generate may
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must be 2-D (batch, kv_len) or 4-D (batch, 1, q_len, kv_len), "
            f"got {attention_mask.ndim}-D {tuple(attention_mask.shape)}"
        )
    padding = None if attention_mask is None else attention_mask.bool()
    return AttentionMask(
        batch_size, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, fn=mask_function, padding=padding,
        use_vmap=use_vmap, device=device,
    )  # fmt: skip


# ---- the attention function ----------------------------------------------------------------------------------


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    dropout: float = 0.0, is_causal: bool | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    sinks: Tensor | None = None, position_bias: Tensor | None = None, cache: Any = None, **kwargs: Any,
) -> tuple[Tensor, AttentionSummary | None]:  # fmt: skip
    """transformers' attention function for "tilefold".

    Args:
        module: the attention layer that asks.
        query, key, value: ``(batch, heads, length, dim)``; fewer key heads are shared.
        attention_mask: an `AttentionMask`, or a 4-D tensor: booleans (True = visible) or floats that are added.
        scaling, softcap: as in `tilefold.attention`.
        dropout: must be 0.
        is_causal: without a mask, whether query i sees keys j <= i only; the module's own by default.
        s_aux: learned sinks (heads,), as gpt-oss has them.
        sinks: the same for each query, (batch, heads, q_len, 1).
        position_bias: added to the scores, broadcastable to (batch, heads, q_len, kv_len).

    Returns:
        out ``(batch, q_len, heads, v_dim)``, and an `AttentionSummary`, which ``output_attentions=True`` collects.

    Raises:
        ValueError: dropout, a mask of another length, sequences in `cu_seq_lens_q` that no position id shows.
    """
    if dropout:
        raise ValueError(_no_dropout(module, dropout))
    if isinstance(cache, masking_utils.PagedAttentionCache):
        raise ValueError(
            "tilefold reads no paged cache: continuous batching needs another attn_implementation"
        )
    wanted = _collected(kwargs)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "bias": position_bias}
    # A compiled program returns only what is asked for.
    options["return_lse"] = bool(wanted) or sinks is not None or not torch.compiler.is_compiling()
    if attention_mask is None:
        key, value = _unmasked(module, query, key, value, is_causal, kwargs, options)
    elif isinstance(attention_mask, AttentionMask):
        _check_lengths(attention_mask, query, key, kwargs)
        options |= attention_mask.options(packable=position_bias is None)
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask
    else:
        options["bias"] = attention_mask if position_bias is None else position_bias + attention_mask
    out, lse = _witnessed(query, key, value, attention_mask, sinks, options)
    share = None
    if sinks is not None and lse is not None:
        share = torch.sigmoid(lse - sinks[..., 0])
        out = out * share[..., None].to(out.dtype)
        lse = torch.logaddexp(lse, sinks[..., 0])
    summary: AttentionSummary | None = None
    if torch.compiler.is_compiling():
        if wanted:
            summary = AttentionSummary(lse, (*query.shape[:3], key.shape[2]), None, _COMPILED)
    else:
        summary = _summary(query, key, attention_mask, options, lse, share, wanted)
    return out.transpose(1, 2).contiguous(), summary


def _collected(kwargs: dict[str, Any]) -> bool | None:
    """Whether somebody collects summaries; None where that is not known. Some layers are told; of others transformers
    knows itself."""
    told = kwargs.get("output_attentions")
    if told or torch.compiler.is_compiling():
        return bool(told)
    collects = None if _COLLECTOR is None else _COLLECTOR.get()
    if collects is not None:
        return any("attentions" in key for key in collects)
    return None if told is None else False


def _summary(
    q: Tensor, k: Tensor, mask: Any, options: dict[str, Any], lse: Tensor, share: Tensor | None, wanted: bool | None
) -> AttentionSummary:  # fmt: skip
    """What the layer returns beside its result. Only where it may be collected does it keep anything alive."""
    shape = (*q.shape[:3], k.shape[2])
    if wanted is False:
        return AttentionSummary(lse, shape, None, "the model was not called with output_attentions=True")
    attended = as_attended(q, k)
    if attended is None:
        return AttentionSummary(lse, shape, None, "under torch.func there are no numbers to find it from")
    asked = Asked(*attended, partial(_in_batch, q, mask, options), share)
    return AttentionSummary(lse, shape, asked, wanted=bool(wanted))


_COMPILED = (
    "a compiled program finds lse alone: call the model uncompiled, "
    "as under torch.compiler.set_stance('force_eager')"
)


def _unmasked(
    module: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool | None, kwargs: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `options` where no mask was made; the keys and values that are left.

    As transformers' own functions have it: causal from the first key on, and a single query sees everything.
    """
    causal = q.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if kwargs.get("cu_seq_lens_q") is not None:
        ends = {"cu_seqlens_q": kwargs["cu_seq_lens_q"], "cu_seqlens_k": kwargs["cu_seq_lens_k"]}
        options |= {"causal": causal, **ends}
        return k, v
    if causal:
        if k.shape[2] < q.shape[2]:
            raise ValueError(f"a causal layer without a mask has {q.shape[2]} queries for {k.shape[2]} keys")
        options["causal"] = True
        if options["bias"] is not None:
            options["bias"] = options["bias"][..., : q.shape[2]]
        return k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    return k, v


def _check_lengths(mask: AttentionMask, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
    if (mask.q_len, mask.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"attention_mask is for {mask.q_len} queries and {mask.kv_len} keys, "
            f"the layer has {q.shape[2]} and {k.shape[2]}"
        )
    ends = kwargs.get("cu_seq_lens_q")
    if ends is not None and len(ends) > 2 and mask.pattern.packed is None:
        raise ValueError(
            f"cu_seq_lens_q names {len(ends) - 1} packed sequences that position_ids do not show; "
            "give position_ids that start again at 0 with each, and no attention_mask"
        )


def _witnessed(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`_run`; where somebody watches, what is laid end to end is shown as the layer has it. What a sink of each query's
    own will take from the weights is not known there, so such a call is shown to nobody."""
    if not witnesses.there or (sinks is None and options.get("cu_seqlens_q") is None):
        return _run(q, k, v, options)
    if sinks is None:
        witnesses.show(q, k, **_in_batch(q, mask, options))
    with witnesses.aside():
        return _run(q, k, v, options)


def _in_batch(q: Tensor, mask: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The same options for (batch, heads, length, dim), however the call lays its sequences."""
    ends = [options.get("cu_seqlens_q"), options.get("cu_seqlens_k")]
    same = {
        name: x for name, x in options.items() if name not in ("return_lse", "cu_seqlens_q", "cu_seqlens_k")
    }
    if ends[0] is None:
        return same
    if isinstance(mask, AttentionMask):
        scores = {name: same[name] for name in ("scale", "softcap", "sinks", "bias")}
        return {**scores, **mask.options(packable=False)}
    if same["causal"] and not torch.equal(*ends):
        raise NotImplementedError("packed queries and keys of different lengths, causal, have no summary")
    q_ids, k_ids = (torch.repeat_interleave(torch.diff(x).long()).reshape(len(q), -1) for x in ends)
    return {**same, "mask": masks.documents(k_ids.numpy(), q_ids=q_ids.numpy())}


def _run(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """`tilefold.attention` on (batch, heads, length, dim), end to end where it is asked for cumulative lengths."""
    packed = options.get("cu_seqlens_q") is not None
    if packed:
        batch, n = q.shape[0], q.shape[2]
        q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
    result = api.attention(q, k, v, **options)
    out, lse = result if options["return_lse"] else (result, None)
    if packed:
        out = out.unflatten(1, (batch, n)).transpose(0, 1)
        lse = None if lse is None else lse.unflatten(1, (batch, n)).transpose(0, 1)
    return out, lse


def _no_dropout(module: Any, dropout: float) -> str:
    config = vars(module.config) if hasattr(module, "config") else {}
    fields = [name for name in sorted(config) if "drop" in name and config[name] == dropout]
    of_attention = [name for name in fields if "att" in name] or fields
    how = f"set config.{of_attention[0]} = 0.0" if of_attention else "set its attention dropout to 0.0"
    return (
        f"{type(module).__name__} asks for attention dropout {dropout}, and exact attention has no random part: "
        f"{how} before the model is made, or call model.eval()"
    )
