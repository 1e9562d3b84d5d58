"""`tilefold.watch` records what each layer looked at, under its name, and changes nothing.

What it records is held against the weights that transformers' eager attention returns, and against `probe` of the same
arrays; outputs and gradients are compared bit by bit with an unwatched run. Models are those of transformers, of torch
with its attention exchanged in each of the ways that there are, and modules that call `tilefold.attention`.
"""

import asyncio
import copy
import threading

import numpy as np
import pytest

import tilefold as tf
from tilefold import witnesses

torch = pytest.importorskip("torch", reason="needs torch")

from torch import nn  # noqa: E402

from tilefold.drop_in import sdpa  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def families():
    pytest.importorskip("transformers", reason="needs transformers")
    import families

    return families


class Attention(nn.Module):
    """A layer that calls tilefold itself; heads of queries share those of keys."""

    def __init__(self, width=16, heads=4, kv_heads=2):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, n * 8) for n in (heads, kv_heads, kv_heads))
        self.out = nn.Linear(heads * 8, width)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.last = q.detach(), k.detach()
        return self.out(tf.attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.fixture(scope="module")
def stack():
    return seeded(Stack)


@pytest.fixture(scope="module")
def x():
    return seeded(lambda: torch.randn(2, 30, 16))


# ---- what is recorded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2", "gpt_oss", "llama4", "gpt2", "bert", "t5", "vit"]
)
def test_layers_of_transformers(family, families):
    """Each under its name, in batches whatever the call made of them."""
    given = families.plain(family)
    eager, *others = (
        families.attentions(model, given)
        for model in (
            families.implemented(family, "eager"),
            families.moved(family, 0),
            families.moved(family, 1),
        )
    )
    model = families.implemented(family, "tilefold")
    with torch.no_grad(), tf.watch(model, statistics=[tf.max_weight(), tf.key_mass(), tf.topk(3)]) as seen:
        given.of(model)
    modules = dict(model.named_modules())
    assert all("Attention" in type(modules[name]).__name__ for name in seen)
    assert len(seen) == len(eager)
    order = [*seen.values()] if family != "t5" else [seen[name] for name in _as_t5_lists_them(seen)]
    for (only,), weights, *moves in zip(order, eager, *others, strict=True):
        families.same("max_weight", only.max_weight, weights.amax(-1), [m.amax(-1) for m in moves])
        families.same("key_mass", only.key_mass, weights.sum(-2), [m.sum(-2) for m in moves])
        top = [m.sort(descending=True).values[..., :3] for m in (weights, *moves)]
        families.same("topk", only.topk.weights, top[0], top[1:])


def _as_t5_lists_them(seen):
    """Its answer has the decoder's attentions, then the crossing ones, then the encoder's."""
    kinds = "decoder.*SelfAttention", "decoder.*EncDecAttention", "encoder.*"
    from fnmatch import fnmatch

    return [name for kind in kinds for name in seen if fnmatch(name, kind)]


def test_transformers_through_torchs_function(families):
    """Which they call themselves under another attn_implementation."""
    given, model = families.padded("llama"), families.implemented("llama", "sdpa")
    with torch.no_grad(), sdpa.use():
        plainly = given.of(model)
        with tf.watch(model) as seen:
            assert torch.equal(given.of(model), plainly)
    assert list(seen) == LLAMA


def test_each_step_of_generate(families):
    with tf.watch(families.implemented("llama", "tilefold"), statistics=[tf.key_mass()]) as seen:
        families.written("llama", "tilefold", max_new_tokens=4)
    assert list(seen) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    n = families.LENGTH
    for calls in seen.values():
        assert [call.key_mass.shape[-1] for call in calls] == [n, n + 1, n + 2, n + 3]


def test_packed_sequences(families):
    """Laid end to end for the call, recorded as the layer has them."""
    given, model = families.packed("llama"), families.implemented("llama", "tilefold")
    eager = families.attentions(families.implemented("llama", "eager"), given)
    others = [families.attentions(families.moved("llama", seed), given) for seed in (0, 1)]
    model = families.implemented("llama", "tilefold")
    with torch.no_grad(), tf.watch(model, statistics=[tf.key_mass(), tf.heatmap(2, 2)]) as seen:
        given.of(model)
    for (only,), weights, *moves in zip(seen.values(), eager, *others, strict=True):
        families.same("key_mass", only.key_mass, weights.sum(-2), [m.sum(-2) for m in moves])
        assert only.heatmap.shape == (families.BATCH, 4, 2, 2)


def test_modules_that_call_tilefold(stack, x):
    with tf.watch(stack, statistics=[tf.entropy(), tf.key_mass()]) as seen:
        stack(x)
    assert list(seen) == ["layers.0", "layers.1", "layers.2"]
    for layer, (only,) in zip(stack.layers, seen.values(), strict=True):
        probed = tf.probe(*layer.last, tf.entropy(), tf.key_mass(), causal=True)
        assert torch.equal(only.entropy, probed.entropy)
        assert torch.equal(only.key_mass, probed.key_mass)
        assert only.entropy.shape == (2, 4, 30)


def encoder(**options):
    made = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(made, 2, enable_nested_tensor=False)


@pytest.fixture
def installed():
    sdpa.register()
    torch.nn.attention.activate_flash_attention_impl("tilefold")
    yield
    torch.nn.attention.restore_flash_attention_impl()


def weights_of(model, x):
    """What nn.MultiheadAttention itself says, layer by layer."""
    found = []
    for layer in model.layers:
        found.append(layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)[1])
        x = layer(x)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_layers(training):
    model = seeded(encoder).train(training)
    x = seeded(lambda: torch.randn(2, 20, 32))
    exact = weights_of(model, x)
    with sdpa.use(), tf.watch(model, statistics=[tf.entropy(), tf.rows([3])]) as seen:
        watched = model(x)
    with sdpa.use():
        assert torch.equal(watched, model(x))
    assert list(seen) == ["layers.0.self_attn", "layers.1.self_attn"]
    for (only,), weights in zip(seen.values(), exact, strict=True):
        assert only.entropy.shape == (2, 4, 20)
        error = (only.rows[..., 0, :] - weights[..., 3, :]).abs().max().item()
        assert error <= 64 * torch.finfo(torch.float32).eps * weights.max().item()


def test_torchs_kernels_exchanged(installed):
    model = seeded(encoder).train()
    x = seeded(lambda: torch.randn(2, 20, 32))
    plainly = model(x)
    with tf.watch(model) as seen:
        assert torch.equal(model(x), plainly)
    assert list(seen) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_watching_makes_no_fused_layer_another(installed):
    """In evaluation torch runs its layers as one kernel each, which is not tilefold: nothing is seen, nothing changed.
    A hook of a module's own would have torch compute them in another way."""
    model = seeded(encoder).eval()
    x = seeded(lambda: torch.randn(2, 20, 32))
    with torch.no_grad():
        plainly = model(x)
        with tf.watch(model) as seen:
            assert torch.equal(model(x), plainly)
    assert not seen
    assert repr(seen) == "nothing seen: no attention of the model ran on tilefold in this block"


def test_calls_without_a_model():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 4, 50, 8))
    with tf.watch(statistics=[tf.entropy(), tf.topk(2)]) as seen:
        tf.attention(q, k, v, causal=True)
        tf.attention(q[:, :7], k, v, window=(9, 0), scale=0.3, softcap=5.0, sinks=np.zeros(4))
        tf.attention(torch.as_tensor(q), torch.as_tensor(k), torch.as_tensor(v))
        tf.attention(q[0], k[0], v[0])
    assert list(seen) == [0, 1, 2, 3]
    for n, (arrays, options) in enumerate(
        [
            ((q, k), {"causal": True}),
            ((q[:, :7], k), {"window": (9, 0), "scale": 0.3, "softcap": 5.0, "sinks": np.zeros(4)}),
        ]
    ):
        assert np.array_equal(seen[n][0].entropy, tf.probe(*arrays, tf.entropy(), **options).entropy)
    assert isinstance(seen[0][0].entropy, np.ndarray) and isinstance(seen[2][0].entropy, torch.Tensor)
    assert seen[3][0].topk.keys.shape == (50, 2)


def test_every_option_of_a_call_reaches_the_probe():
    """By what each does to the numbers."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 2, 20, 8))
    flat = [x.swapaxes(0, 1).reshape(2, 40, 8) for x in (q, k, v)]
    ends = np.array([0, 13, 40])
    calls = [
        ((q, k, v), {}),
        ((q, k, v), {"causal": True}),
        ((q, k, v), {"mask": tf.prefix(5)}),
        ((q, k, v), {"window": (2, 3)}),
        ((q, k, v), {"scale": 0.9}),
        ((q, k, v), {"softcap": 1.0}),
        ((q, k, v), {"bias": rng.normal(size=(20, 20))}),
        ((q, k, v), {"alibi": [0.5, 0.25]}),
        ((q, k, v), {"sinks": [1.0, 2.0]}),
        ((q, k, v), {"kv_lengths": np.array([9, 20]), "q_lengths": np.array([9, 20])}),
        (flat, {"cu_seqlens_q": ends, "cu_seqlens_k": ends}),
    ]
    with tf.watch(statistics=[tf.entropy()]) as seen:
        for arrays, options in calls:
            tf.attention(*arrays, **options)
    for n, ((q, k, _), options) in enumerate(calls):
        assert np.array_equal(seen[n][0].entropy, tf.probe(q, k, tf.entropy(), **options).entropy)
    assert all(not np.array_equal(seen[0][0].entropy, seen[n][0].entropy) for n in range(1, 10))


def test_caches():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 2, 12, 8)).astype(np.float32)
    cache = tf.KVCache(1, 2, 8, capacity=32)
    cache.append(k, v)
    with tf.watch(statistics=[tf.entropy()]) as seen:
        tf.attention(q[:, :, -3:], cache, causal=True)
    assert np.array_equal(
        seen[0][0].entropy, tf.probe(q[:, :, -3:], cache, tf.entropy(), causal=True).entropy
    )
    assert "3 x 12" in repr(seen)


def test_autocast_is_seen_through(x):
    layer = seeded(Attention)
    with torch.autocast("cpu", torch.bfloat16), tf.watch(layer, statistics=[tf.entropy()]) as seen:
        q = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
        layer(x)
    with torch.autocast("cpu", torch.bfloat16), tf.watch(statistics=[tf.entropy()]) as calls:
        tf.attention(q, q, q)
    assert list(seen) == ["Attention"]
    narrow = tf.probe(q.bfloat16(), q.bfloat16(), tf.entropy()).entropy
    assert torch.equal(calls[0][0].entropy, narrow)
    assert not torch.equal(narrow, tf.probe(q, q, tf.entropy()).entropy)


# ---- nothing else changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4", "t5", "bert"])
@pytest.mark.parametrize("ask", ["plain", "padded", "packed"])
def test_outputs_keep_their_bits(family, ask, families):
    if ask == "packed" and family not in families.DECODERS:
        ask = "padded"
    given, model = getattr(families, ask)(family), families.implemented(family, "tilefold")
    with torch.no_grad():
        plainly = given.of(model)
        with tf.watch(model, statistics=[tf.entropy(), tf.key_mass()]) as seen:
            assert torch.equal(given.of(model), plainly)
        assert seen
        assert torch.equal(given.of(model), plainly)


def test_gradients_keep_their_bits(stack, x):
    def gradients():
        stack.zero_grad()
        stack(x).square().sum().backward()
        return [p.grad.clone() for p in stack.parameters()]

    plainly = gradients()
    with tf.watch(stack) as seen:
        watched = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plainly, watched, strict=True))
    assert [len(calls) for calls in seen.values()] == [1, 1, 1]
    assert not any(call.entropy.requires_grad for calls in seen.values() for call in calls)


def test_checkpoints_are_called_twice(families):
    model = copy.deepcopy(families.made("llama")).train()
    model.set_attn_implementation("tilefold")
    model.activation_checkpointing_enable({"use_reentrant": False})
    given = families.plain("llama")
    given.inputs["use_cache"] = False
    with tf.watch(model) as seen:
        given.of(model).sum().backward()
    assert [len(calls) for calls in seen.values()] == [2, 2]
    first, again = seen["model.layers.0.self_attn"]
    assert torch.equal(first.entropy, again.entropy)


def test_the_model_is_left_as_it_was(stack, x):
    hooks = nn.modules.module._has_any_global_hook
    before = [dict(m.__dict__) for m in stack.modules()]
    with tf.watch(stack):
        assert [dict(m.__dict__) for m in stack.modules()] == before
        assert not hooks() and not any(m._forward_hooks or m._forward_pre_hooks for m in stack.modules())
        stack(x)
    assert witnesses.there == []


def test_forward_called_by_name(stack, x):
    with tf.watch(stack) as seen:
        stack.forward(x)
        stack.layers[1].forward(x)
    assert [len(calls) for calls in seen.values()] == [1, 2, 1]


def test_what_raises_leaves_nothing_behind(stack, x):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = seeded(Attention)

        def forward(self, x):
            self.inner(x)
            raise RuntimeError("broken")

    model = nn.ModuleDict({"first": Broken(), "second": seeded(Attention)})
    with tf.watch(model) as seen:
        with pytest.raises(RuntimeError, match="broken"):
            model["first"](x)
        model["second"](x)
        tf.attention(*torch.randn(3, 1, 5, 8))  # outside of the model
    assert list(seen) == ["first.inner", "second"]
    with pytest.raises(ZeroDivisionError), tf.watch(model):
        1 / 0  # noqa: B018
    assert witnesses.there == []


def test_compiled_models_run_uncompiled_meanwhile(stack, x):
    torch._dynamo.reset()
    model = copy.deepcopy(stack)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with tf.watch(compiled) as seen:
            compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x)
    assert list(seen) == ["layers.0", "layers.1", "layers.2"]
    with torch.no_grad(), tf.watch(model) as seen:
        compiled(x)
    assert len(seen) == 3


def test_calls_without_numbers_pass_by():
    q = torch.randn(2, 4, 9, 8)
    with tf.watch() as seen:
        torch.func.vmap(lambda x: tf.attention(x, x, x))(q)
        torch.func.grad(lambda x: tf.attention(x, x, x).sum())(q)
        tf.attention(q, q, q)
        tf.attention(*(torch.empty(1, 2, 9, 8, device="meta") for _ in "qkv"))
    assert list(seen) == [0]
    with tf.watch() as seen:
        pass
    assert repr(seen) == "nothing seen: no attention ran on tilefold in this block"


def test_other_threads_and_tasks_are_not_watched(stack, x):
    other = copy.deepcopy(stack)

    async def one(model, watch):
        if watch:
            with tf.watch() as seen:
                await asyncio.sleep(0)
                model(x)
                await asyncio.sleep(0)
            return seen
        for _ in range(4):
            model(x)
            await asyncio.sleep(0)
        return None

    async def both():
        return await asyncio.gather(one(other, False), one(stack, True))

    assert len(asyncio.run(both())[1]) == 3
    with tf.watch(stack) as seen:
        thread = threading.Thread(target=stack, args=(x,))
        thread.start()
        thread.join()
        assert not seen
        stack(x)
    assert len(seen) == 3


def test_watches_nest(stack, x):
    with tf.watch(stack) as outer:
        stack(x)
        with tf.watch(stack, 1, statistics=[tf.topk(2)]) as inner:
            stack(x)
        stack(x)
    assert [len(calls) for calls in outer.values()] == [3, 3, 3]
    assert [len(calls) for calls in inner.values()] == [1]


# ---- which layers and heads ----------------------------------------------------------------------------------

LLAMA = [f"model.layers.{n}.self_attn" for n in range(2)]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (0, LLAMA[:1]), ([0, 1], LLAMA), (range(1, 2), LLAMA[1:]), ("model.layers.1", LLAMA[1:]),
        ("model.layers.1.self_attn", LLAMA[1:]), ("*.self_attn", LLAMA), ("model", LLAMA), ([0, "*.1.*"], LLAMA),
        ("model.layers.?.mlp", []),
    ],
    ids=str,
)  # fmt: skip
def test_layers_are_chosen(layers, found, families):
    model = families.implemented("llama", "tilefold")
    with torch.no_grad(), tf.watch(model, layers) as seen:
        families.plain("llama").of(model)
    assert list(seen) == found


def test_a_number_is_the_first_of_a_name(families):
    """T5's layers have parts that are numbered too."""
    model = families.implemented("t5", "tilefold")
    with torch.no_grad(), tf.watch(model, layers=1) as seen:
        families.plain("t5").of(model)
    assert len(seen) == 3
    assert all(".block.1." in name for name in seen)


STATISTICS = [
    tf.entropy(), tf.topk(2), tf.key_mass(), tf.heatmap(3, 3), tf.mass_in(first=slice(0, 2)), tf.rows([0, 1]),
    tf.block_mass(4),
]  # fmt: skip


def leaves(seen):
    for s in STATISTICS:
        found = getattr(seen, s.name)
        parts = (
            found if isinstance(found, tuple) else vars(found).values() if s.name == "mass_in" else [found]
        )
        yield from parts


@pytest.mark.parametrize("kind", ["batch", "flat", "packed", "tensors"])
def test_heads_are_chosen(kind):
    rng = np.random.default_rng(0)
    shape = {"batch": (2, 4, 9, 8), "tensors": (2, 4, 9, 8)}.get(kind, (4, 9, 8))
    q, k, v = rng.normal(size=(3, *shape))
    if kind == "tensors":
        q, k, v = map(torch.as_tensor, (q, k, v))
    ends = np.array([0, 5, 9])
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends} if kind == "packed" else {"causal": True}
    with tf.watch(heads=[2, -4], statistics=STATISTICS) as some, tf.watch(statistics=STATISTICS) as every:
        tf.attention(q, k, v, **options)
    for n, (part, whole) in enumerate(zip(leaves(some[0][0]), leaves(every[0][0]), strict=True)):
        per_sequence = kind == "packed" and n in (4, 7)
        axis = 1 if per_sequence or len(shape) == 4 else 0
        assert whole.shape[axis] == 4
        assert np.array_equal(np.asarray(part), np.take(np.asarray(whole), [2, 0], axis))


def test_the_latest_call_alone(stack, x):
    with tf.watch(stack, latest=True) as seen:
        stack(x)
        stack(x[:, :7])
    assert [call.entropy.shape for calls in seen.values() for call in calls] == [(2, 4, 7)] * 3
    assert repr(seen).splitlines()[1].split()[1] == "2"


# ---- the table and errors ------------------------------------------------------------------------------------


def test_the_table():
    q, k = np.zeros((4, 8, 8)), np.ones((4, 8, 8))
    statistics = [
        tf.effective_keys(),
        tf.max_weight(),
        tf.topk(2),
        tf.key_mass(),
        tf.mass_in(first=slice(0, 1)),
    ]
    with tf.watch(statistics=statistics) as seen:
        tf.attention(q, k, k)
        tf.attention(q, k[:, :4], k[:, :4])
        tf.attention(q[:, :0], k, k)
    assert str(seen).splitlines() == [
        "call  heads  queries x keys  effective_keys  max_weight  topk  mass_in.first",
        "0         4           8 x 8               8       0.125  0.25          0.125",
        "1         4           8 x 4               4        0.25   0.5           0.25",
        "2         4           0 x 8                                                 ",
    ]


class Sums:
    """A statistic of the caller's own."""

    name = "sums"

    def start(self, problem, lead):
        class Tap(tf.replay.Tap):
            total = 0.0

            def take(self, w):
                self.total += float(w.by_head.sum())

            def result(self):
                return {"total": self.total}

        return Tap()


def test_statistics_of_the_callers_own():
    q = np.ones((4, 8, 8))
    with tf.watch(statistics=[Sums(), tf.max_weight()]) as seen:
        tf.attention(q, q, q)
    assert seen[0][0].sums == tf.probe(q, q, Sums()).sums
    assert str(seen).splitlines()[0] == "call  heads  queries x keys  max_weight"
    with pytest.raises(ValueError, match=r"watch: heads chooses .* and sums has none"):
        tf.watch(heads=[0], statistics=[Sums()])


def test_the_table_of_a_model(stack, x):
    with tf.watch(stack, statistics=[tf.max_weight(), tf.entropy()]) as seen:
        stack(x)
        stack(x[:, :7])
    head, first, *_ = str(seen).splitlines()
    assert head.split() == ["layer", "calls", "heads", "queries", "x", "keys", "max_weight", "entropy"]
    assert first.split()[:6] == ["layers.0", "2", "4", "7", "x", "7"]
    calls = seen["layers.0"]
    largest, mean = max(c.max_weight.max() for c in calls), np.mean([c.entropy.mean() for c in calls])
    assert first.split()[6:] == [f"{largest:.4g}", f"{mean:.4g}"]
    with pytest.raises(
        KeyError, match=r"'layers.9' was not seen; seen were 'layers.0', 'layers.1', 'layers.2'"
    ):
        seen["layers.9"]
    assert "layers.9" not in seen and seen.get("layers.9") is None


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"model": [1]}, TypeError, "model must be a torch.nn.Module or None, got list"),
        ({"layers": 3}, TypeError, "layers are those of a model, and none was given"),
        ({"statistics": []}, TypeError, "statistics must hold at least one"),
        ({"statistics": tf.entropy()}, TypeError, "watch: statistics must be a list or tuple"),
        ({"statistics": [tf.entropy]}, TypeError, "watch: statistics must be statistics such as"),
        ({"latest": 1}, TypeError, "watch: latest must be True or False, got int"),
        ({"heads": 3}, TypeError, "heads must be a list of numbers, got 3"),
        ({"heads": [0.5]}, TypeError, "heads: a head must be an integer"),
        ({"heads": [1], "statistics": [tf.entropy(heads="all")]}, ValueError, "and entropy has none"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, kind, says):
    with pytest.raises(kind, match=says):
        tf.watch(**arguments)


@pytest.mark.parametrize(
    ("layers", "kind", "says"),
    [
        (
            "layers.7",
            ValueError,
            r"'layers.7', which no module has; 'Stack', 'layers', 'layers.0', .* and 9 more",
        ),
        ([0, 5], ValueError, "layers has 5, which no module has"),
        ([True], TypeError, "layers must be names, patterns or numbers"),
        (1.5, TypeError, "layers must be names, patterns or numbers, or a list of them, got 1.5"),
    ],
)
def test_wrong_layers(stack, layers, kind, says):
    with pytest.raises(kind, match=says):
        tf.watch(stack, layers)


def test_heads_that_a_layer_does_not_have(stack, x):
    with (
        pytest.raises(ValueError, match="heads: this call has 4 heads, got 4"),
        tf.watch(stack, heads=[0, 4]),
    ):
        stack(x)
