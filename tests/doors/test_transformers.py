"""Models of transformers give with `attn_implementation="tilefold"` what they give with "eager".

A dozen tiny models with random weights, one per family of attention, forward, backward and generating. What may differ
is computed: eager itself is run again with every weight moved by one rounding, and tilefold may be off by `FACTOR`
times as much. That masks of transformers' own making are never looked at cell by cell is checked by forbidding it.
"""

import copy
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from families import (  # noqa: E402
    ASKS,
    BATCH,
    CONFIGS,
    DECODER,
    LENGTH,
    PADDED,
    PAST,
    WIDTH,
    WRITERS,
    Ask,
    Layer,
    allowed,
    heads,
    implemented,
    made,
    moved,
    packed,
    padded,
    padding,
    plain,
    same,
    words,
    written,
)
from transformers import masking_utils as mu  # noqa: E402

from tilefold.drop_in import transformers as door  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


both = pytest.mark.parametrize(("family", "ask"), ASKS, ids=lambda x: getattr(x, "__name__", x))


@pytest.fixture
def no_cells(monkeypatch):
    """Masks that are understood are never evaluated."""

    def refuse(*_):
        raise AssertionError("a mask was looked at cell by cell")

    monkeypatch.setattr(door.AttentionMask, "_cells", refuse)


# ---- models --------------------------------------------------------------------------------------------------


@both
def test_forward_is_eagers(family, ask, no_cells):
    given = ask(family)
    with torch.no_grad():
        eager = given.of(implemented(family, "eager"))
        got = given.of(implemented(family, "tilefold"))
        same(family, got, eager, [given.of(moved(family, seed)) for seed in (0, 1)])


@pytest.mark.parametrize("family", ["llama", "mistral", "llama4", "t5", "bert"])
def test_the_comparison_sees_a_lost_mask(family, monkeypatch):
    given = padded(family)
    monkeypatch.setattr(door.AttentionMask, "options", lambda self, packable: {})
    with torch.no_grad():
        eager = given.of(implemented(family, "eager"))
        got = given.of(implemented(family, "tilefold"))
        others = [given.of(moved(family, seed)) for seed in (0, 1)]
    with pytest.raises(AssertionError, match="TOO LARGE"):
        same(family, got, eager, others)


def gradients(model, given):
    """The gradient of every weight of a sum of the answer's rows, each with a weight of its own."""
    model.zero_grad()
    answer = given.of(model)
    weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2)).to(answer.dtype)
    (answer * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(family, given, model, name="tilefold"):
    eager = gradients(implemented(family, "eager"), given)
    model.set_attn_implementation(name)
    got = gradients(model, given)
    others = [gradients(moved(family, seed), given) for seed in (0, 1)]
    assert got.keys() == eager.keys()
    for weight in eager:
        same(weight, got[weight], eager[weight], [other[weight] for other in others])


@both
def test_gradients_are_eagers(family, ask, no_cells):
    model = made(family).train()
    try:
        same_gradients(family, ask(family), model)
    finally:
        model.eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "t5"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing(family, reentrant):
    model = copy.deepcopy(made(family)).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    given = padded(family)
    given.inputs["use_cache"] = False
    same_gradients(family, given, model)


@pytest.mark.parametrize("ask", [plain, padded], ids=["plain", "padded"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bert", "t5"])
def test_bfloat16(family, ask):
    """eager rounds weights to bfloat16 before it multiplies; moved weights allow for as much."""
    given = ask(family)
    with torch.no_grad():
        eager = given.of(implemented(family, "eager", "bfloat16"))
        got = given.of(implemented(family, "tilefold", "bfloat16"))
        others = [given.of(moved(family, seed, "bfloat16")) for seed in (0, 1)]
        same(family, got, eager, others, "bfloat16")


# ---- generating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", WRITERS)
def test_generate_writes_the_same_words(family, cache):
    """Past the window and the chunk of 12, and past the room that a static sliding cache has."""
    eager = written(family, "eager", cache_implementation=cache)
    assert eager.shape[1] > PAST
    assert torch.equal(written(family, "tilefold", cache_implementation=cache), eager)


@pytest.mark.parametrize("family", ["llama", "mistral", "t5"])
def test_beam_search(family):
    options = {"num_beams": 3, "num_return_sequences": 3}
    assert torch.equal(written(family, "tilefold", **options), written(family, "eager", **options))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_prompts_in_pieces(family, static):
    """A prompt that enters a cache in three pieces, the second of which no mask argument lines up with."""
    ids, seen = words(), {}
    for name in ("eager", "tilefold"):
        model = implemented(family, name)
        cache = transformers.DynamicCache(config=model.config)
        if static:
            cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 7), (7, 30), (30, LENGTH))]
        seen[name] = torch.cat(parts, dim=1)
    with torch.no_grad():
        others = [moved(family, seed)(ids).logits for seed in (0, 1)]
    same(family, seen["tilefold"], seen["eager"], others)


# ---- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "ask"), [("llama", plain), ("mistral", packed), ("gpt_oss", padded), ("llama4", padded)],
    ids=lambda x: getattr(x, "__name__", x),
)  # fmt: skip
def test_compiles_whole(family, ask):
    """One graph, forward and backward, without a cell looked at."""
    torch._dynamo.reset()
    given = ask(family)
    given.inputs["use_cache"] = False
    model = implemented(family, "tilefold")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = gradients(model, given)
    model.zero_grad()
    answer = given.of(compiled)
    same(family, answer, given.of(model), [given.of(moved(family, seed)) for seed in (0, 1)])
    weights = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2))
    (answer * weights).sum().backward()
    others = [gradients(moved(family, seed), given) for seed in (0, 1)]
    for name, p in model.named_parameters():
        if p.grad is not None:
            same(name, p.grad, eager[name], [other[name] for other in others])


def test_compiles_steps_of_a_static_cache():
    """Where queries stand is then a tensor, which the program may not look at."""
    torch._dynamo.reset()
    model, ids = implemented("llama", "tilefold"), words()
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        parts = [
            step(ids[:, a:b], cache=cache).logits for a, b in ((0, 30), (30, 31), (31, 32), (32, LENGTH))
        ]
        eager = implemented("llama", "eager")(ids).logits
        same("llama", torch.cat(parts, dim=1), eager, [moved("llama", seed)(ids).logits for seed in (0, 1)])


def test_masks_made_before_a_compiled_step():
    """As generate hands them over: a new one for each step, and not a new program for each."""
    torch._dynamo.reset()
    model, ids, pads = implemented("llama", "tilefold"), words(), padding(64)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        parts = [model(ids[:, :28], attention_mask=pads[:, :28], cache=cache).logits]
        for n in range(28, LENGTH):  # more steps than programs that torch.compile would make of one function
            given = {"config": model.config, "inputs_embeds": torch.empty(BATCH, 1, 32), "cache": cache}
            mask = mu.create_masks_for_generate(**given, attention_mask=pads[:, : n + 1])
            place = torch.full((BATCH, 1), n)
            parts.append(step(ids[:, n : n + 1], attention_mask=mask, position_ids=place, cache=cache).logits)
        rows = padding().bool()
        eager = padded("llama").of(implemented("llama", "eager"))
        others = [padded("llama").of(moved("llama", seed)) for seed in (0, 1)]
        same("llama", torch.cat(parts, dim=1)[rows].flatten(), eager, others)


def test_other_attentions_compile_as_before():
    """torch.compile sees twins of transformers' mask factories, which make the same masks."""
    torch._dynamo.reset()
    given = packed("mistral")
    with torch.no_grad():
        model = implemented("mistral", "sdpa")
        plainly = given.of(model)
        compiled = given.of(torch.compile(model, fullgraph=True, backend="aot_eager"))
        same("mistral", compiled, plainly, [given.of(moved("mistral", seed)) for seed in (0, 1)])


# ---- masks ---------------------------------------------------------------------------------------------------


def looped(q, k, v, cells, scale, softcap=None, bias=0.0, sinks=None):
    """Attention with the whole matrix in float64, (batch, q_len, heads, dim); a row without keys is 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~cells, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else torch.exp(sinks.double() - top))
    return (weights / total.clamp_min(1e-300) @ v).transpose(1, 2)


def checked(mask, q, k, v, cells, **options):
    got, _ = door.attention(Layer(), q, k, v, mask, scaling=0.5, **options)
    exact = looped(q, k, v, cells, 0.5, options.get("softcap"))
    assert (got - exact).abs().max().item() <= allowed(exact)


left = torch.tensor(PADDED)
ids = torch.tensor([[0] * 11 + [1] * 29, [0] * 25 + [1] * 15, [0] * 39 + [1]])
steps = torch.cat([torch.cat([torch.arange(int(n)), torch.arange(40 - int(n))])[None] for n in (11, 25, 39)])
window, sides = mu.sliding_window_causal_mask_function, mu.sliding_window_bidirectional_mask_function
none = torch.zeros(BATCH, dtype=torch.long)
remapped, same_sequence = mu.remap_positions_for_packed_sequence, mu.packed_sequence_mask_function
FUNCTIONS = {
    "causal": mu.causal_mask_function,
    "everything": mu.bidirectional_mask_function,
    "window": window(5),
    "window of one": window(1),
    "both sides": sides(5),
    "two windows": mu.and_masks(window(9), mu.sliding_window_overlay(5)),
    "chunks": mu.chunked_causal_mask_function(7, none),
    "chunks after padding": mu.chunked_causal_mask_function(7, left),
    "packed": mu.and_masks(remapped(mu.causal_mask_function, steps), same_sequence(ids)),
    "packed window": mu.and_masks(remapped(window(5), steps), same_sequence(ids)),
    "packed chunks": mu.and_masks(
        remapped(mu.chunked_causal_mask_function(7, none), steps), same_sequence(ids)
    ),
}
UNKNOWN = {
    "or": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(ids - 1)),
    "own": mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q * k + b) % 3 != 0),
    "positions that jump": mu.and_masks(remapped(mu.causal_mask_function, 2 * steps % 7), same_sequence(ids)),
    "positions alone": remapped(mu.causal_mask_function, steps),
    "hidden padding": mu.and_masks(mu.causal_mask_function, mu.padding_mask_function(padding().bool())),
}
PADS = {
    "none": None,
    "left": padding(),
    "right": padding().flip(1),
    "holes": (torch.arange(LENGTH) % 5 != 2).long().expand(BATCH, -1),
    "all": torch.zeros(BATCH, LENGTH, dtype=torch.long),
}


def mask_of(fn, pad, q_len=LENGTH, kv_len=LENGTH, **options):
    """Our mask, and the same as transformers' own function has it."""
    pad = None if pad is None else pad.bool()
    arguments = {"batch_size": BATCH, "q_length": q_len, "kv_length": kv_len, "mask_function": fn, **options}
    cells = mu.sdpa_mask(**arguments, attention_mask=pad, allow_is_causal_skip=False)
    return door.attention_mask(**arguments, attention_mask=pad), cells


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_known_masks_are_understood(name, pad, no_cells):
    mask, cells = mask_of(FUNCTIONS[name], PADS[pad])
    checked(mask, *heads(LENGTH, LENGTH), cells)
    assert mask.shape == cells.shape


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_masks_are_asked_for_rows(name, pad):
    mask, cells = mask_of(UNKNOWN[name], PADS[pad])
    checked(mask, *heads(LENGTH, LENGTH), cells)


@pytest.mark.parametrize("name", {**FUNCTIONS, **UNKNOWN})
def test_masks_with_a_position_bias(name):
    """A bias has a column for every key, so packed sequences stay where they are."""
    mask, cells = mask_of({**FUNCTIONS, **UNKNOWN}[name], PADS["left"])
    q, k, v = heads(LENGTH, LENGTH)
    bias = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    got, _ = door.attention(Layer(), q, k, v, mask, scaling=0.5, position_bias=bias)
    exact = looped(q, k, v, cells, 0.5, bias=bias)
    assert (got - exact).abs().max().item() <= allowed(exact)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "q_offset", "kv_offset"),
    [
        (1, 30, 29, 0),  # a growing cache
        (5, 30, 25, 0),
        (1, 40, 17, 0),  # a cache with room
        (6, 40, 17, 0),
        (6, 40, torch.tensor(17), 0),
        (1, 12, 30, 19),  # a sliding cache
        (6, 17, 30, 19),
        (6, 17, 19, 17),
        (4, 12, 40, 2),  # queries beyond the keys
        (7, 3, 0, 4),  # and before them
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["causal", "window", "both sides", "chunks after padding", "own"])
@pytest.mark.parametrize("pad", ["none", "left", "holes"])
def test_masks_of_caches(name, pad, q_len, kv_len, q_offset, kv_offset):
    fn = {**FUNCTIONS, **UNKNOWN}[name]
    mask, cells = mask_of(fn, PADS[pad], q_len, kv_len, q_offset=q_offset, kv_offset=kv_offset)
    checked(mask, *heads(q_len, kv_len), cells)


def test_a_static_caches_count_is_read_at_once():
    """The tensor that says where queries stand is moved on by the first layer, before its attention is asked."""
    count = torch.tensor(17)
    mask, cells = mask_of(mu.causal_mask_function, None, 6, LENGTH, q_offset=count)
    count += 6
    checked(mask, *heads(6, LENGTH), cells)


def test_functions_that_are_not_of_indices():
    """What a user passes as `or_mask_function` may only work one cell at a time: transformers maps it, and so do we."""
    image = torch.arange(LENGTH) // 8

    def sees(b, h, q, k):
        return torch.where(image[q] == image[k], True, False)

    mask, cells = mask_of(mu.or_masks(mu.causal_mask_function, sees), PADS["left"], use_vmap=True)
    checked(mask, *heads(LENGTH, LENGTH), cells)


def test_rows_are_asked_for_in_blocks():
    """Never the square, and once for all heads."""
    n, asked = 1500, []

    def sees(b, h, q, k):
        asked.append(q.numel() * k.numel())
        return (q + k) % 2 == 0

    mask = door.attention_mask(2, n, n, mask_function=sees)
    checked(mask, *heads(n, n, batch=2), (torch.arange(n)[:, None] + torch.arange(n)) % 2 == 0)
    assert max(asked) < n * n / 4
    assert sum(asked) == 2 * n * n


def test_masks_are_cut_as_models_cut_them():
    mask, cells = mask_of(window(5), PADS["left"], kv_len=44)
    checked(mask[:, :, :, :37], *heads(LENGTH, 37), cells[:, :, :, :37])
    for where in ((0,), (slice(None), 0), (..., slice(3, None)), (slice(None),) * 3 + (slice(2, 9),)):
        with pytest.raises(TypeError, match=r"can be cut as|keeps its first keys"):
            mask[where]


def test_a_mask_is_no_tensor_and_says_so():
    mask, cells = mask_of(window(5), PADS["left"])
    assert mask.to(torch.float16).contiguous() is mask
    assert (mask.ndim, mask.dim(), mask.size(), mask.size(-1)) == (4, 4, (BATCH, 1, LENGTH, LENGTH), LENGTH)
    assert torch.equal(mask.dense(), cells)
    with pytest.raises(AttributeError, match=r"'masked_fill': tilefold's is a rule .* mask\.dense\(\)"):
        mask.masked_fill(0, 1)
    for wrong in (lambda: mask + cells, lambda: cells & mask, lambda: torch.cat([mask, cells])):
        with pytest.raises(TypeError):
            wrong()


def test_masks_that_users_make():
    """Four dimensions: booleans hide, floats are added, both as transformers' own functions have it."""
    q, k, v = heads(LENGTH, LENGTH)
    _, cells = mask_of(UNKNOWN["own"], PADS["left"])
    checked(cells, q, k, v, cells)
    floats = torch.where(cells, 0.25, -torch.inf)
    checked(floats, q, k, v, cells)
    bias = torch.randn(BATCH, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    got, _ = door.attention(Layer(), q, k, v, floats, scaling=0.5, position_bias=bias)
    exact = looped(q, k, v, cells, 0.5, bias=bias + 0.25)
    assert (got - exact).abs().max().item() <= allowed(exact)
    _, cells = mask_of(UNKNOWN["or"], PADS["left"])  # where every word sees itself: eager attends to all else
    with torch.no_grad():
        hides = Ask({"input_ids": words(), "attention_mask": cells}, padding().bool())
        added = Ask({**hides.inputs, "attention_mask": torch.where(cells, 0.0, -1e38)}, hides.rows)
        eager, *others = (
            added.of(m) for m in (implemented("llama", "eager"), moved("llama", 0), moved("llama", 1))
        )
        same("llama", hides.of(implemented("llama", "tilefold")), eager, others)


# ---- what else the function is asked -------------------------------------------------------------------------


def test_without_a_mask_it_is_as_causal_as_its_layer():
    q, k, v = heads(6, 9)
    everything = torch.ones(6, 9, dtype=torch.bool)
    checked(None, q, k, v, everything, is_causal=False)
    checked(None, q, k, v, everything.tril())
    checked(None, q[:, :, :1], k, v, everything[:1])
    square = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(0))
    got, _ = door.attention(Layer(), q, k, v, None, scaling=0.5, position_bias=square)
    exact = looped(q, k, v, everything.tril(), 0.5, bias=square)
    assert (got - exact).abs().max().item() <= allowed(exact)


def test_packed_images_without_a_mask():
    q, k, v = heads(LENGTH, LENGTH, batch=1)
    ends = torch.tensor([0, 11, 25, LENGTH], dtype=torch.int32)
    which = torch.repeat_interleave(torch.arange(3), ends.diff())
    checked(None, q, k, v, which[:, None] == which, is_causal=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_softcap_and_sinks():
    q, k, v = heads(6, 9)
    everything = torch.ones(6, 9, dtype=torch.bool)
    checked(None, q, k, v, everything, is_causal=False, softcap=0.7)
    per_head = torch.randn(4, generator=torch.Generator().manual_seed(0))
    per_query = torch.randn(BATCH, 4, 6, 1, generator=torch.Generator().manual_seed(0))
    for given, sinks in (({"s_aux": per_head}, per_head[:, None, None]), ({"sinks": per_query}, per_query)):
        got, _ = door.attention(Layer(), q, k, v, None, scaling=0.5, is_causal=False, **given)
        exact = looped(q, k, v, everything, 0.5, sinks=sinks)
        assert (got - exact).abs().max().item() <= allowed(exact)


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "clip"])
def test_output_attentions_gives_summaries(family):
    given = plain(family)
    given.inputs["output_attentions"] = True
    with torch.no_grad():
        result = implemented(family, "tilefold")(**given.inputs)
        eager = implemented(family, "eager")(**given.inputs)
    names = [name for name in result if "attentions" in name]
    assert sum(len(result[name]) for name in names) >= 2
    for name in names:
        for summary, weights in zip(result[name], eager[name], strict=True):
            assert isinstance(summary, door.AttentionSummary)
            assert summary.shape == weights.shape
            assert summary.lse.shape == weights.shape[:3]
            assert repr(tuple(weights.shape)) in repr(summary)


def test_summaries_hold_the_log_sum_exp():
    q, k, v = heads(6, 9)
    mask = door.attention_mask(BATCH, 6, 9, q_offset=3)
    _, summary = door.attention(Layer(), q, k, v, mask, scaling=0.5)
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) * 0.5
    exact = scores.masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(3), -torch.inf).logsumexp(-1)
    assert (summary.lse - exact).abs().max().item() <= allowed(exact)


def test_generating_collects_summaries_too():
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 3}
    result = written("llama", "tilefold", **options)
    assert [layers[0].shape for layers in result.attentions] == [
        (BATCH, 4, LENGTH, LENGTH), (BATCH, 4, 1, LENGTH + 1), (BATCH, 4, 1, LENGTH + 2),
    ]  # fmt: skip


def test_registering_again_changes_nothing():
    mappings = transformers.AttentionInterface._global_mapping, mu.AttentionMaskInterface._global_mapping
    before = [dict(mapping) for mapping in mappings]
    door.register()
    assert [dict(mapping) for mapping in mappings] == before
    assert all("tilefold" in mapping for mapping in mappings)


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (partial(transformers.GPT2Config, n_embd=32, n_layer=1, n_head=4), "attn_pdrop"),
        (partial(transformers.BertConfig, **WIDTH), "attention_probs_dropout_prob"),
        (partial(transformers.LlamaConfig, **DECODER, attention_dropout=0.25), "attention_dropout"),
        (partial(transformers.T5Config, d_model=32, d_kv=8, num_layers=1, num_heads=4), "dropout_rate"),
    ],
    ids=["gpt2", "bert", "llama", "t5"],
)
def test_dropout_is_refused_with_the_name_of_its_field(config, field):
    model = transformers.AutoModel.from_config(config(), attn_implementation="tilefold")
    inputs = {"input_ids": words(8)}
    if field == "dropout_rate":
        inputs["decoder_input_ids"] = words(8)
    model.train()
    says = rf"Attention asks for attention dropout 0\.\d+, .* set config\.{field} = 0\.0"
    with pytest.raises(ValueError, match=says):
        model(**inputs)
    model.eval()(**inputs)
    setattr(model.config, field, 0.0)
    model = transformers.AutoModel.from_config(model.config, attn_implementation="tilefold").train()
    model(**inputs)


def test_wrong_masks_are_named():
    q, k, v = heads(6, 9)
    mask = door.attention_mask(BATCH, 6, 8, q_offset=2)
    with pytest.raises(ValueError, match="attention_mask is for 6 queries and 8 keys, the layer has 6 and 9"):
        door.attention(Layer(), q, k, v, mask)
    with pytest.raises(ValueError, match=r"attention_mask must be 2-D .* got 3-D \(3, 6, 9\)"):
        implemented("llama", "tilefold")(words(9), attention_mask=torch.ones(BATCH, 6, 9))
    with pytest.raises(ValueError, match="a causal layer without a mask has 6 queries for 3 keys"):
        door.attention(Layer(), q, k[:, :, :3], v[:, :, :3], None)


def test_packed_sequences_that_positions_do_not_show():
    ends = torch.tensor([0, 11, LENGTH])
    model = implemented("llama", "tilefold")
    with pytest.raises(ValueError, match="cu_seq_lens_q names 2 packed sequences that position_ids do not"):
        model(words()[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)


def test_paged_caches_are_refused():
    cache = object.__new__(mu.PagedAttentionCache)
    with pytest.raises(ValueError, match="tilefold reads no paged cache"):
        door.attention(Layer(), *heads(6, 9), None, cache=cache)
