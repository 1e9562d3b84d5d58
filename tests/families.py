"""Tiny models with random weights, one per family of attention, and what tests ask them.

What may differ between two implementations is computed: eager is run again with every weight moved by one rounding, and
tilefold may be off by `FACTOR` times as much.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import transformers
from budgets import judge, nudged

from tilefold.drop_in import transformers as door

door.register()
transformers.logging.set_verbosity_error()

ANSWERS = "logits", "last_hidden_state", "image_embeds", "text_embeds"
BATCH, LENGTH, PAST = 3, 40, 24
PADDED = (0, 9, 25)  # how many tokens of padding stand before each sequence

WORDS = {"vocab_size": 89, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**WORDS, **WIDTH, "num_key_value_heads": 2, "max_position_embeddings": 512}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
GEMMA = {**DECODER, **ALTERNATING, "head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

CONFIGS = {
    "llama": lambda t: t.LlamaConfig(**DECODER),
    "mistral": lambda t: t.MistralConfig(**DECODER, sliding_window=12),
    "gemma2": lambda t: t.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0),
    "gemma3": lambda t: t.Gemma3TextConfig(**GEMMA),
    "qwen3": lambda t: t.Qwen3Config(**DECODER, head_dim=8),
    "gpt_oss": lambda t: t.GptOssConfig(**{**DECODER, **ALTERNATING, **EXPERTS, "head_dim": 8}),
    "llama4": lambda t: t.Llama4TextConfig(
        **{**DECODER, **EXPERTS}, head_dim=8, attention_chunk_size=12, intermediate_size_mlp=48,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "gpt2": lambda t: t.GPT2Config(
        **WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=512, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "bert": lambda t: t.BertConfig(**{**WORDS, **WIDTH, **NO_DROPOUT}),
    "t5": lambda t: t.T5Config(
        vocab_size=89, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=None,
    ),
    "vit": lambda t: t.ViTConfig(**WIDTH, **NO_DROPOUT, image_size=24, patch_size=4),
    "clip": lambda t: t.CLIPConfig(
        text_config={**WORDS, **WIDTH, "eos_token_id": 2, "max_position_embeddings": 64},
        vision_config={**WIDTH, "image_size": 24, "patch_size": 4},
    ),
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "qwen3", "gpt_oss", "llama4")
WRITERS = (*DECODERS, "gpt2", "t5")
CLASSES = {**dict.fromkeys(("bert", "vit", "clip"), "AutoModel"), "t5": "AutoModelForSeq2SeqLM"}


@lru_cache
def made(family, dtype="float32"):
    """A model of a family; weights large enough that attention is not nearly uniform."""
    config = CONFIGS[family](transformers)
    auto = getattr(transformers, CLASSES.get(family, "AutoModelForCausalLM"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = auto.from_config(config, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "sinks" in name:
                weight.data.normal_(std=weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1)
    return model


@lru_cache
def moved(family, seed, dtype="float32"):
    """The same model with every weight moved by up to one rounding."""
    model = copy.deepcopy(made(family, dtype))
    model.set_attn_implementation("eager")
    rng = np.random.default_rng(seed)
    for weight in model.parameters():
        weight.data.copy_(torch.as_tensor(nudged(weight.data.double().numpy(), dtype, rng)))
    return model


def words(n=LENGTH, seed=0):
    return torch.randint(3, 89, (BATCH, n), generator=torch.Generator().manual_seed(seed))


def padding(n=LENGTH):
    """Left padding, as batches to be continued have it."""
    return (torch.arange(n) >= torch.tensor(PADDED)[:, None]).long()


@dataclass
class Ask:
    """What a model is given, and which rows of its answer mean something."""

    inputs: dict
    rows: object = Ellipsis

    def of(self, model):
        result = model(**self.inputs)
        found = [getattr(result, name, None) for name in ANSWERS]
        return torch.cat([x[self.rows].flatten() for x in found if x is not None])


def plain(family):
    if family == "vit":
        return Ask({"pixel_values": torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))})
    inputs = {"input_ids": words()}
    if family == "clip":
        inputs |= plain("vit").inputs
    if family == "t5":
        inputs |= {"decoder_input_ids": words(17, seed=1)}
    return Ask(inputs)


def padded(family):
    ask = plain(family)
    ask.inputs["attention_mask"] = padding()
    if family == "clip":  # a text's vector stands at its last word
        ask.inputs["attention_mask"] = padding().flip(1)
    elif family != "t5":
        ask.rows = padding().bool()
    return ask


def packed(family):
    """Sequences laid end to end, told by positions that start again."""
    places = [torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (11, 25, 39)]
    return Ask({"input_ids": words(), "position_ids": torch.stack(places), "use_cache": False})


ASKS = [(family, ask) for family in CONFIGS for ask in (plain, padded, packed)]
ASKS = [
    (f, ask) for f, ask in ASKS if (ask is not padded or f != "vit") and (ask is not packed or f in DECODERS)
]


def implemented(family, name, dtype="float32"):
    model = made(family, dtype)
    model.set_attn_implementation(name)
    return model


def same(name, got, eager, others, dtype="float32"):
    """`got` against eager's result, allowed a multiple of what moved weights make of it."""
    got, eager, *others = (x.detach().double().numpy() for x in (got, eager, *others))
    error = judge(name, got, others, eager, dtype)
    assert error.ok, str(error)
    return error


def written(family, name, **options):
    settings = {"max_new_tokens": PAST, "do_sample": False, "disable_compile": True, **options}
    return implemented(family, name).generate(words(), attention_mask=padding(), **settings)


class Layer(torch.nn.Module):
    """What an attention function is asked by."""

    is_causal = True

    def __init__(self, **config):
        super().__init__()
        self.config = transformers.PreTrainedConfig(**config)


def heads(q_len, kv_len, dim=8, batch=BATCH, dtype=torch.float32):
    rng = torch.Generator().manual_seed(q_len + kv_len)
    shapes = (batch, 4, q_len, dim), (batch, 2, kv_len, dim), (batch, 2, kv_len, dim)
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def allowed(exact):
    """Float32 sums of some dozens of terms: the budget of a whole matrix, no less than its own rounding."""
    return 64 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def attentions(model, given):
    """Every layer's, by the names of the model's answer."""
    with torch.no_grad():
        result = model(**{**given.inputs, "output_attentions": True})
    return [x for name in result if "attentions" in name for x in result[name]]
