"""One forward call of a Hugging Face causal model for rows of many sequences: some read their prompts, others write.

It decides how they come together. The new tokens of all sequences lie end to end as one row of the model, so every
matrix product is over the tokens that there are, without padding; only the attention function knows where one sequence
ends, adds the new keys and values to the cache, and asks `tilefold.attention` once for all of them, packed as they are.
The fact to know: positions are given to the model, which rotates before it calls the attention function. The cache
holds rotated keys, and what is in it never changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AttentionInterface

import tilefold as tf

NAME = "tilefold_ragged"


@dataclass(frozen=True)
class Row:
    """The next tokens of one sequence; `ids` are its sequences in the cache, one for each layer."""

    ids: Sequence[int]
    tokens: Sequence[int]
    start: int  # the position of the first of them
    asked: bool  # whether somebody wants to know what comes after them


class Ragged:
    """A model that is asked row by row.

    Args:
        model: a causal language model of transformers with rotary positions. Its attn_implementation is changed.

    Raises:
        ValueError: a model whose layers or positions need what is not here, named by the field of its config.
    """

    def __init__(self, model):
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"config.layer_types must be full or sliding attention, got {sorted(kinds)}")
        rope = getattr(config, "rope_parameters", None)
        if not rope:
            raise ValueError(f"config.rope_parameters must be there, {type(model).__name__} has none")
        settings = [rope, *(x for x in rope.values() if isinstance(x, dict))]
        if {x.get("rope_type") for x in settings} & {
            "dynamic",
            "longrope",
        }:  # depend on the longest of a batch
            raise ValueError(f"config.rope_parameters must not depend on the length, got {rope}")
        AttentionInterface.register(NAME, attention)
        model.set_attn_implementation(NAME)
        self.model = model.eval()
        self.layers = config.num_hidden_layers
        self.kv_heads = config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.like = torch.empty(0, dtype=model.dtype)
        self.longest = config.max_position_embeddings
        stop = model.generation_config.eos_token_id
        self.stop = {stop} if isinstance(stop, int) else set(stop or ())

    @torch.inference_mode()
    def next_tokens(self, cache: tf.PagedKVCache, rows: Sequence[Row]) -> list[int]:
        """Add these rows to the cache; the likeliest next token of each that is `asked`, in order."""
        tokens = torch.tensor([[token for row in rows for token in row.tokens]])
        places = torch.tensor([[row.start + n for row in rows for n in range(len(row.tokens))]])
        ends = torch.tensor([len(row.tokens) for row in rows]).cumsum(0) - 1
        asked = ends[torch.tensor([row.asked for row in rows])]
        logits = self.model(
            input_ids=tokens,
            position_ids=places,
            use_cache=False,
            logits_to_keep=asked,
            rows=rows,
            pages=cache,
        ).logits
        return logits[0].argmax(-1).tolist()


def attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, rows=None, pages=None, **unused,
):  # fmt: skip
    """transformers' attention function for `Ragged`: queries of `rows` end to end, keys and values kept in `pages`."""
    if rows is None or attention_mask is not None or dropout:
        raise ValueError(f"{NAME} is for Ragged.next_tokens, which gives rows, no mask and no dropout")
    window = None if sliding_window is None else (sliding_window - 1, 0)
    options = {"window": window, "scale": scaling, "softcap": softcap, "sinks": s_aux}
    ids = [row.ids[module.layer_idx] for row in rows]
    ends = torch.tensor([0, *(len(row.tokens) for row in rows)]).cumsum(0)
    pages.append(ids, key[0], value[0], cu_seqlens=ends)
    out = tf.attention(query[0], pages[ids], causal=True, cu_seqlens_q=ends, **options)
    return out.transpose(0, 1)[None], None
