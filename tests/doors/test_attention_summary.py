"""What ``output_attentions=True`` gives with `attn_implementation="tilefold"` is true of eager's weights.

Statistics, pieces and whole matrices are held against those of the weights that transformers' own eager attention
returns, for a dozen families, padded and packed batches and every step of `generate`; what may differ is computed, by
eager itself with every weight of the model moved by one rounding. Then: what is found when, what is kept, and errors.
"""

import copy
import io
import tracemalloc
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from families import (  # noqa: E402
    ASKS,
    BATCH,
    LENGTH,
    Layer,
    allowed,
    attentions,
    heads,
    implemented,
    made,
    moved,
    padded,
    padding,
    plain,
    same,
    words,
    written,
)

import tilefold as tf  # noqa: E402
from tilefold.drop_in import attention_summary as module  # noqa: E402
from tilefold.drop_in import transformers as door  # noqa: E402
from tilefold.drop_in.transformers import AttentionSummary, summaries  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = [(family, ask) for family, ask in ASKS if family != "clip"]  # which returns none
every = pytest.mark.parametrize(("family", "ask"), FAMILIES, ids=lambda x: getattr(x, "__name__", x))
FOUR = "entropy", "topk", "key_mass", "map"


def known(weights, pad=None):
    """Eager's weights in float64, 0 in rows that see no key: there eager spreads them over all, padding included."""
    weights = weights.detach().double()
    if pad is None or weights.shape[-1] < LENGTH:
        return weights
    lost = (weights[..., :LENGTH] * (pad == 0)[:, None, None, :]).sum(-1, keepdim=True) > 0
    return weights.masked_fill(lost, 0)


def pooled(w, rows, cols):
    """By the definition: bin r begins at r * length // rows."""
    q, k = w.shape[-2:]
    at = [[n * length // bins for n in range(bins + 1)] for length, bins in ((q, rows), (k, cols))]
    return torch.stack(
        [
            torch.stack(
                [w[..., a:b, c:d].mean((-2, -1)) for c, d in zip(at[1], at[1][1:], strict=False)], dim=-1
            )
            for a, b in zip(at[0], at[0][1:], strict=False)
        ],
        dim=-2,
    )


def statistics(w, sinks):
    """The four of the whole matrix of weights; with `sinks` what is missing in a row is a sink's."""
    rest = (1 - w.sum(-1)).clamp_min(0) * (w.sum(-1) > 0) if sinks else torch.zeros(())
    rows, cols = (min(64, n) for n in w.shape[-2:])
    return {
        "entropy": -torch.xlogy(w, w).sum(-1) - torch.xlogy(rest, rest),
        "topk": w.sort(dim=-1, descending=True).values[..., :8],
        "key_mass": w.sum(-2),
        "map": pooled(w, rows, cols),
        "whole": w,
    }


def found(summary):
    return {
        "entropy": summary.entropy, "topk": summary.topk.weights, "key_mass": summary.key_mass, "map": summary.map,
        "whole": summary.to_dense(),
    }  # fmt: skip


def compared(got, eager, others, pad=None, sinks=False):
    """Summaries against weights, `others` being those of moved models."""
    assert len(got) == len(eager) > 0
    for summary, weights, *moves in zip(got, eager, *others, strict=True):
        assert isinstance(summary, AttentionSummary)
        assert summary.shape == weights.shape
        mine, exact = found(summary), statistics(known(weights, pad), sinks)
        moves = [statistics(known(x, pad), sinks) for x in moves]
        for name in exact:
            same(name, mine[name], exact[name], [x[name] for x in moves])
        keys = summary.topk.keys
        listed = torch.where(keys >= 0, known(weights, pad).gather(-1, keys.clamp_min(0)), 0)
        same("keys", listed, exact["topk"], [x["topk"] for x in moves])


# ---- what they say is so -------------------------------------------------------------------------------------


@every
def test_statistics_are_those_of_eagers_weights(family, ask):
    given = ask(family)
    got = attentions(implemented(family, "tilefold"), given)
    eager = attentions(implemented(family, "eager"), given)
    others = [attentions(moved(family, seed), given) for seed in (0, 1)]
    compared(got, eager, others, given.inputs.get("attention_mask"), sinks=family == "gpt_oss")


def test_the_comparison_sees_a_lost_mask(monkeypatch):
    given = padded("mistral")
    eager = attentions(implemented("mistral", "eager"), given)
    others = [attentions(moved("mistral", 0), given)]
    monkeypatch.setattr(door, "_in_batch", lambda q, mask, options: {"scale": options["scale"]})
    got = attentions(implemented("mistral", "tilefold"), given)
    with pytest.raises(AssertionError, match="TOO LARGE"):
        compared(got, eager, others, given.inputs["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "gpt2", "t5"])
def test_every_step_of_generate(family, cache):
    """Of the prompt and of each word: past the window, past the room of a sliding cache."""
    options = {
        "output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 6, "cache_implementation": cache,
    }  # fmt: skip
    got, eager, *others = (
        written(family, name, **options)
        if model is None
        else model.generate(
            words(), attention_mask=padding(), do_sample=False, disable_compile=True, **options
        )
        for name, model in (
            ("tilefold", None),
            ("eager", None),
            ("", moved(family, 0)),
            ("", moved(family, 1)),
        )
    )
    name = "decoder_attentions" if family == "t5" else "attentions"
    assert len(got[name]) == 6
    for step, (mine, theirs, *moves) in enumerate(
        zip(got[name], eager[name], *(x[name] for x in others), strict=True)
    ):
        for layer, summary in enumerate(mine):
            pad = None if step else padding()  # a word sees itself
            want, *off = (statistics(known(x[layer], pad), family == "gpt_oss") for x in (theirs, *moves))
            kept = summary.shape[2] == 1 or cache == "dynamic"
            for stat in ("entropy", "key_mass", "whole") if kept else ("entropy", "key_mass"):
                value = summary.to_dense() if stat == "whole" else getattr(summary, stat)
                same(f"{stat} of step {step}", value, want[stat], [x[stat] for x in off])


def test_generating_with_an_assistant():
    """There transformers cuts what a step returned into pieces, as tensors are cut."""
    seen = {}
    for name in ("tilefold", "eager"):
        helper = copy.deepcopy(made("llama"))
        helper.set_attn_implementation(name)
        seen[name] = implemented("llama", name).generate(
            words()[:1], assistant_model=helper, do_sample=False, max_new_tokens=8, output_attentions=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert torch.equal(seen["tilefold"].sequences, seen["eager"].sequences)
    for mine, theirs in zip(seen["tilefold"].attentions, seen["eager"].attentions, strict=True):
        for piece, weights in zip(mine, theirs, strict=True):
            assert piece.shape == weights.shape
            assert (piece - weights).abs().max().item() <= allowed(weights)


@pytest.mark.parametrize("name", ["output_attentions", "return_dict"])
def test_answers_as_tuples(name):
    model, given = implemented("llama", "tilefold"), plain("llama")
    with torch.no_grad():
        answer = model(**given.inputs, output_attentions=True, return_dict=name != "return_dict")
    last = answer[-1] if name == "return_dict" else answer.to_tuple()[-1]
    assert [type(x) for x in last] == [AttentionSummary] * 2


def test_outputs_keep_their_bits():
    for family in ("llama", "gpt_oss", "llama4", "t5"):
        given, model = padded(family), implemented(family, "tilefold")
        with torch.no_grad():
            plainly = given.of(model)
            given.inputs["output_attentions"] = True
            assert torch.equal(given.of(model), plainly)


def test_gradients_flow_beside_them():
    given, model = plain("llama"), implemented("llama", "tilefold")
    answers = []
    for collects in (False, True):
        model.zero_grad()
        given.inputs["output_attentions"] = collects
        given.of(model).square().sum().backward()
        answers.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    first = model(**given.inputs).attentions[0]
    assert first.lse.requires_grad and not first.entropy.requires_grad


def test_packed_images_without_a_mask():
    """Where a layer is told where sequences end, and nothing else."""
    q, k, v = heads(LENGTH, LENGTH, batch=1)
    ends = torch.tensor([0, 11, 25, LENGTH], dtype=torch.int32)
    which = torch.repeat_interleave(torch.arange(3), ends.diff().long())
    for causal in (False, True):
        told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "is_causal": causal, "output_attentions": True}
        _, summary = door.attention(Layer(), q, k, v, None, scaling=0.5, **told)
        scores = q.double() @ k.double().repeat_interleave(2, dim=1).mT * 0.5
        hidden = which[:, None] != which
        hidden |= torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else False
        exact = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        assert (summary.to_dense() - exact).abs().max().item() <= allowed(exact)
        assert (summary.key_mass - exact.sum(-2)).abs().max().item() <= allowed(exact.sum(-2))
    told["cu_seq_lens_k"] = torch.tensor([0, 12, 25, LENGTH])
    with pytest.raises(NotImplementedError, match="packed queries and keys of different lengths"):
        door.attention(Layer(), q, k, v, None, **told)


@pytest.mark.parametrize("collected", [True, None])
def test_a_sink_for_each_query(collected):
    q, k, v = heads(6, 9)
    sinks = torch.randn(BATCH, 4, 6, 1, generator=torch.Generator().manual_seed(0))
    options = {"scaling": 0.5, "is_causal": False, "sinks": sinks, "output_attentions": collected}
    _, summary = door.attention(Layer(), q, k, v, None, **options)
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).mT * 0.5
    exact = torch.cat([scores, sinks.double()], dim=-1).softmax(-1)[..., :-1]
    want = statistics(exact, sinks=True)
    for name, got in (
        ("entropy", summary.entropy), ("topk", summary.topk.weights), ("whole", summary.to_dense()),
        ("whole", summary[...]),
    ):  # fmt: skip
        assert (got - want[name]).abs().max().item() <= allowed(want[name])
    assert (summary[:, :, 2:5] - exact[:, :, 2:5]).abs().max().item() <= allowed(exact)
    lse = torch.cat([scores, sinks.double()], dim=-1).logsumexp(-1)
    assert (summary.lse - lse).abs().max().item() <= allowed(lse)
    for name in ("key_mass", "map"):
        says = "only the weights were kept" if collected else "where each query has a sink of its own"
        with pytest.raises(RuntimeError, match=f"{name}: .*{says}"):
            getattr(summary, name)


def test_autocast():
    """Scores are then those of queries and keys in autocast's type."""
    q, k, v = heads(6, 9)
    with torch.autocast("cpu", torch.bfloat16):
        _, summary = door.attention(Layer(), q, k, v, None, is_causal=False)
        _, later = door.attention(Layer(), q, k, v, None, is_causal=False, output_attentions=True)
    _, narrow = door.attention(Layer(), *(x.bfloat16() for x in (q, k, v)), None, is_causal=False)
    assert torch.equal(summary.entropy, narrow.entropy)
    assert torch.equal(later.entropy, narrow.entropy)


# ---- pieces --------------------------------------------------------------------------------------------------


def one(n=40, kv_len=None, collected=None, **options):
    q, k, v = heads(n, kv_len or n, **options)
    _, summary = door.attention(Layer(), q, k, v, None, scaling=0.5, output_attentions=collected)
    return summary


@pytest.mark.parametrize("collected", [True, None], ids=["kept", "found"])
@pytest.mark.parametrize(
    "where",
    [
        ..., 1, (0, 3), (..., -1, slice(None)), (slice(None), slice(1, 3), slice(4, 9), slice(None, 7)),
        (slice(None), slice(None), 2), (0, 1, 2, 3), (..., 5), (..., slice(1, 9, 3), slice(-6, None, 2)), (),
        (0, ..., slice(2, 2), 1), (slice(None, None, 2), -1, ..., slice(3, -3)),
    ],
    ids=str,
)  # fmt: skip
def test_an_index_gives_weights(where, collected):
    summary = one(12, collected=collected)
    dense = summary.to_dense()
    assert torch.equal(summary[where], dense[where])


def test_numbers_of_any_kind():
    summary = one(12)
    dense = summary.to_dense()
    assert torch.equal(summary[np.int64(1), torch.tensor(2), ..., np.int32(-3)], dense[1, 2, :, -3])


def test_iterating_goes_over_the_batch():
    summary = one(12)
    assert torch.equal(torch.stack(list(summary)), summary.to_dense())


@pytest.mark.parametrize(
    ("where", "kind", "says"),
    [
        ((..., 0, ...), IndexError, "has the axes batch, heads, queries, keys"),
        ((0, 0, 0, 0, 0), IndexError, "has the axes"),
        ((0, 4), IndexError, "heads are 4, got 4"),
        ((..., -13, slice(None)), IndexError, "queries are 12, got -13"),
        ((..., slice(None, None, -1)), ValueError, "keys can be taken forwards only"),
        (([0, 1],), TypeError, "batch are taken by a number or a slice, got list"),
        ((True,), TypeError, "batch are taken by a number or a slice, got bool"),
        ((None,), TypeError, "got NoneType"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_indices(where, kind, says):
    with pytest.raises(kind, match=says):
        one(12)[where]


def test_large_matrices_are_refused_and_their_rows_are_not():
    summary = one(4000, batch=2)
    assert module.LIMIT < 2 * 4 * 4000 * 4000 * 4
    with pytest.raises(
        ValueError, match=r"\(2, 4, 4000, 4000\) would take 488.3 MiB, more than limit=268,435,456 "
    ):
        summary.to_dense()
    with pytest.raises(ValueError, match=r"block: .* more than limit=268,435,456"):
        summary[0]
    last = summary[..., -1, :]
    assert last.shape == (2, 4, 4000)
    assert (last.sum(-1) - 1).abs().max().item() <= allowed(torch.ones(1))
    with pytest.raises(ValueError, match="more than limit=100 bytes"):
        one(12).to_dense(limit=100)


def test_statistics_take_no_matrix():
    """NumPy's memory is counted; tensors of results lie in it."""
    q, k, v = heads(2400, 2400, batch=1)
    tracemalloc.start()
    try:
        with summaries(tf.entropy(), tf.key_mass(), tf.heatmap(64, 64)):
            _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    weights = 4 * 2400 * 2400 * 4
    assert summary.entropy.nbytes + summary.key_mass.nbytes < peak < weights / 4


# ---- what is found when, and what is kept --------------------------------------------------------------------


def counted(monkeypatch):
    """The names of what is asked of `probe` from now on."""
    asked, probe = [], tf.probe

    def counting(q, k, *what, **options):
        asked.extend(s.name for s in what)
        return probe(q, k, *what, **options)

    monkeypatch.setattr(module.api, "probe", counting)
    return asked


def test_nothing_is_found_or_kept_where_nobody_collects(monkeypatch):
    asked, returned = counted(monkeypatch), []
    for family in ("gpt2", "llama"):
        model = implemented(family, "tilefold")
        layer = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
        hook = layer.register_forward_hook(lambda module, args, output: returned.append(output[1]))
        with torch.no_grad():
            plain(family).of(model)
        hook.remove()
    assert len(returned) == 2
    for summary in returned:
        assert summary.shape == (BATCH, 4, LENGTH, LENGTH) and summary.lse.shape == summary.shape[:3]
        with pytest.raises(
            RuntimeError, match=r"entropy: .* the model was not called with output_attentions=True"
        ):
            summary.entropy  # noqa: B018
    assert asked == []


def test_where_that_is_not_known_it_is_found_when_it_is_read(monkeypatch):
    asked = counted(monkeypatch)
    summary = one(12, collected=None)
    assert asked == []
    assert summary.entropy is summary.entropy
    assert asked == ["entropy"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_where_somebody_collects_all_is_found_at_once(family, monkeypatch):
    """Also of layers that are not told so."""
    asked = counted(monkeypatch)
    for summary in attentions(implemented(family, "tilefold"), plain(family)):
        before = len(asked)
        for name in FOUR:
            getattr(summary, name)
        assert len(asked) == before > 0


def test_what_takes_less_is_kept():
    """Of a long prompt the queries and keys, of a step in decoding the weights: not all keys again at each step."""
    summary = one(400, collected=True)
    assert summary._weights is None and summary._asked.q.shape == (BATCH, 4, 400, 8)
    step = one(1, 400, collected=True)
    assert step._weights.shape == (BATCH, 4, 1, 400) and step._asked is None
    assert torch.equal(step.to_dense().sum(2), step.key_mass)
    with pytest.raises(
        RuntimeError, match=r"key_max: .* only the weights were kept, .* to_dense\(\) gives them"
    ):
        step.probe(tf.key_max())
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    first, *steps = written("llama", "tilefold", **options).attentions
    assert all(layer._asked is not None and layer._weights is None for layer in first)
    assert all(layer._asked is None and layer._weights is not None for layers in steps for layer in layers)


def test_keys_are_kept_by_reference():
    q, k, v = heads(40, 40)
    _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
    assert summary._asked.k.data_ptr() == k.data_ptr()


def test_keys_that_were_written_over_are_not_read():
    q, k, v = heads(400, 400)
    _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
    mass = summary.key_mass.clone()
    k[:, :, -1] = 0
    assert torch.equal(summary.key_mass, mass)
    with pytest.raises(RuntimeError, match="were written over since it was called, as a static cache does"):
        summary.to_dense()


def test_inference_mode_which_counts_no_writes():
    with torch.inference_mode():
        q, k, v = (x.clone() for x in heads(400, 400))
        _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
        before = summary.to_dense()
        k[:] = 0
        assert torch.equal(summary.to_dense(), before)


def test_the_user_chooses_what_is_found(monkeypatch):
    given, model = plain("llama"), implemented("llama", "tilefold")
    asked = counted(monkeypatch)
    with summaries(tf.max_logit(), tf.topk(3), tf.key_mass(last=4).named("recent")):
        first = attentions(model, given)[0]
    assert set(asked[:3]) == {"max_logit", "topk", "recent"}
    assert first.topk.weights.shape == (BATCH, 4, LENGTH, 3)
    assert first.max_logit.shape == (BATCH, 4, LENGTH)
    weights = first.to_dense()
    assert (first.recent - weights[:, :, -4:].sum(-2)).abs().max().item() <= allowed(weights)
    assert first.entropy.shape == (BATCH, 4, LENGTH)  # found when it is read
    assert (first.probe(tf.key_max()).key_max - weights.amax(-2)).abs().max().item() <= allowed(weights)
    assert attentions(model, given)[0].topk.weights.shape == (
        BATCH,
        4,
        LENGTH,
        8,
    )  # outside, all is as before


def test_nothing_is_kept_where_the_user_says_so():
    q, k, v = heads(40, 40)
    with summaries(tf.entropy(), keep=False):
        _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
    assert summary.entropy.shape == (BATCH, 4, 40)
    for ask in (
        lambda: summary.key_mass,
        summary.to_dense,
        lambda: summary[0],
        lambda: summary.probe(tf.topk(2)),
    ):
        with pytest.raises(
            RuntimeError, match=r"not found with the call, and nothing was kept .* keep=False"
        ):
            ask()
    with summaries(keep=False):
        _, summary = door.attention(Layer(), q, k, v, None, output_attentions=True)
    for name in FOUR:
        getattr(summary, name)
    with pytest.raises(RuntimeError, match="weights: not found"):
        summary.to_dense()


def test_register_chooses_for_the_process():
    try:
        door.register([tf.max_weight()], keep=False)
        _, summary = door.attention(Layer(), *heads(6, 6), None, output_attentions=True)
        assert summary.max_weight.shape == (BATCH, 4, 6)
        with summaries(tf.entropy()):
            _, summary = door.attention(Layer(), *heads(6, 6), None, output_attentions=True)
        assert "max_weight" not in summary._found
    finally:
        door.register()


# ---- copies, errors ------------------------------------------------------------------------------------------


def test_copies_hold_what_was_found():
    summary = one(40, collected=True)
    stream = io.BytesIO()
    torch.save(summary, stream)
    stream.seek(0)
    for other in (copy.deepcopy(summary), torch.load(stream, weights_only=False)):
        assert torch.equal(other.entropy, summary.entropy)
        assert torch.equal(other.map, summary.map)
        assert other.shape == summary.shape
    unread = copy.deepcopy(one(40))
    with pytest.raises(
        RuntimeError, match="entropy: not found with the call, and a copy of a summary holds only"
    ):
        unread.entropy  # noqa: B018


def test_a_summary_is_no_tensor_and_says_so():
    summary = one(12, collected=True)
    assert (summary.ndim, summary.dim(), summary.size(), summary.size(-1)) == (4, 4, (BATCH, 4, 12, 12), 12)
    with pytest.raises(AttributeError, match=r"no 'mean': the weights were not formed; \.to_dense\(\)"):
        summary.mean(dim=1)
    assert (
        repr(summary)
        == "AttentionSummary(lse, entropy, topk, key_mass, map, for weights of shape (3, 4, 12, 12))"
    )


def test_small_inputs_have_small_maps():
    summary = one(12)
    assert summary.map.shape == (BATCH, 4, 12, 12)
    assert torch.equal(summary.map, summary.to_dense())
    assert one(100).map.shape == (BATCH, 4, 64, 64)
    short = one(1, 5)
    assert short.map.shape == (BATCH, 4, 1, 5)
    assert short.topk.weights.shape == (BATCH, 4, 1, 5)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: summaries(tf.entropy), TypeError, "statistics must be statistics such as .* call it"),
        (
            lambda: summaries(tf.entropy(), tf.entropy()),
            ValueError,
            "summaries: statistics must have different names",
        ),
        (lambda: summaries(tf.entropy(), keep=1), TypeError, "keep must be True or False, got int"),
        (lambda: summaries(tf.entropy().named("shape")), ValueError, "cannot be called 'shape'"),
        (lambda: summaries(tf.entropy().named("to_dense")), ValueError, "cannot be called 'to_dense'"),
        (lambda: summaries(tf.entropy().named("_found")), ValueError, "cannot be called '_found'"),
    ],
)
def test_wrong_choices(call, kind, says):
    with pytest.raises(kind, match=says), call():
        pass


def test_compiled_programs_find_the_log_sum_exp_alone():
    torch._dynamo.reset()
    given, model = plain("llama"), implemented("llama", "tilefold")
    plainly = attentions(model, given)
    compiled = torch.compile(model, backend="aot_eager")
    got = attentions(compiled, given)
    for summary, other in zip(got, plainly, strict=True):
        assert summary.shape == other.shape
        assert (summary.lse - other.lse).abs().max().item() <= allowed(other.lse)
        with pytest.raises(RuntimeError, match=r"entropy: .* a compiled program finds lse alone"):
            summary.entropy  # noqa: B018


def test_a_config_cannot_ask_for_them():
    """transformers itself insists on eager there; a call and a generation config may ask."""
    model = implemented("llama", "tilefold")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    settings = transformers.GenerationConfig(
        output_attentions=True,
        return_dict_in_generate=True,
        max_new_tokens=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.generate(words(), generation_config=settings)
    assert len(result.attentions) == 2
    assert isinstance(result.attentions[0][0], AttentionSummary)


def test_numbers_are_in_the_type_of_the_sums():
    given = plain("llama")
    first = attentions(implemented("llama", "tilefold", "bfloat16"), given)[0]
    assert {first.entropy.dtype, first.to_dense().dtype, first.lse.dtype} == {torch.float32}
    assert first.topk.keys.dtype == torch.int64
    assert np.isfinite(first.map.numpy()).all()
