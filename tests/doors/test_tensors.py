"""PyTorch's tensors: the same bits as arrays give, by each way that torch can take, and what each way must refuse."""

import copy
import sys
import threading

import numpy as np
import pytest
from cases import FORWARD, ZOO

import tilefold as tf
from tilefold.bench.case import Case
from tilefold.dtypes import ROWS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("ml_dtypes", reason="bfloat16 tensors need ml_dtypes")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tilefold.arrays.torch import calls, operators, tensors  # noqa: E402

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensor(x):
    return tensors.leave(x if x.flags.writeable else x.copy())


def array(x):
    return tensors.enter("x", x)


def qkv(*lead, heads=4, kv_heads=2, q_len=9, kv_len=13, dim=8, dtype=torch.float32, grad=False):
    shapes = (heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*lead, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for shape in shapes
    ]


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the whole zoo, by each way --------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Sees every operator, so that each call must be one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", ()), str(func)]
        return func(*args, **(kwargs or {}))


def by_autograd(call, inputs, cotangents):
    inputs = [x.detach().requires_grad_() for x in inputs]
    results = call(*inputs)
    return results, torch.autograd.grad(results, inputs, cotangents)


def by_operators(call, inputs, cotangents):
    with Watching() as watching:
        got = by_autograd(call, inputs, cotangents)
    assert {"tilefold.fwd.default", "tilefold.bwd.default"} <= set(watching.seen)
    return got


def by_transforms(call, inputs, cotangents):
    results, pull = torch.func.vjp(call, *inputs)
    return results, pull(tuple(cotangents))


def agree(got, expected):
    """The same bits; NaN has many."""
    for x, y in zip(got, expected, strict=True):
        x = array(x.detach())
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        integers = f"u{x.dtype.itemsize}"
        assert np.array_equal(x.view(integers), y.view(integers)) or np.array_equal(
            x.astype(float), y.astype(float), equal_nan=True
        )


def tensors_of(text):
    a = Case.parse(text).build()
    if any(step < 0 for x in (a.q, a.k, a.v) for step in x.strides):
        pytest.skip("torch has no negative strides")
    options = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in a.options.items()}
    return a, [tensor(x) for x in (a.q, a.k, a.v)], options


@pytest.mark.parametrize("text", ZOO + FORWARD)
def test_tensors_give_what_arrays_give(text):
    a, (q, k, v), options = tensors_of(text)
    expected = tf.attention(a.q, a.k, a.v, **a.options, return_lse=True)
    for _ in range(2):  # the second time it may be known
        agree(tf.attention(q, k, v, **options, return_lse=True), expected)
    agree([tf.attention(q, k, v, **options)], expected[:1])


@pytest.mark.parametrize("way", [by_autograd, by_operators, by_transforms])
@pytest.mark.parametrize("text", ZOO)
def test_gradients_are_those_of_arrays(text, way):
    if way is by_operators and "predicate" in text:
        pytest.skip("a predicate is no operator's argument")
    a, inputs, options = tensors_of(text)
    results = tf.attention(a.q, a.k, a.v, **a.options, return_lse=True)
    grads = tf.attention_grad(a.q, a.k, a.v, *results, a.dout, a.dlse, **a.options)
    learned = [name for name in ("bias", "sinks") if name in options]
    inputs += [options.pop(name) for name in learned]

    def call(q, k, v, *rest):
        return tf.attention(q, k, v, **options, **dict(zip(learned, rest, strict=True)), return_lse=True)

    got = way(call, inputs, [tensor(a.dout), tensor(a.dlse)])
    agree(got[0], results)
    agree(got[1], [g for g in grads if g is not None])


# ---- what autograd may ask -------------------------------------------------------------------------------------


def test_gradcheck():
    inputs = qkv(2, q_len=3, kv_len=4, dim=3, dtype=torch.float64, grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks):
        return tf.attention(q, k, v, causal=True, softcap=2.0, bias=bias, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(call, (*inputs, bias, sinks))


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
def test_either_result_may_be_what_counts(which):
    q, k, v = qkv(2, grad=True)
    results = tf.attention(q, k, v, causal=True, return_lse=True)
    cotangents = [torch.ones_like(results[n]) if n in which else torch.zeros_like(results[n]) for n in (0, 1)]
    chosen = [results[n] for n in which]
    got = torch.autograd.grad(chosen, (q, k, v), [cotangents[n] for n in which], retain_graph=True)
    grads = tf.attention_grad(*(x.detach() for x in (q, k, v, *results)), *cotangents, causal=True)
    assert same(got, grads[:3])


def test_only_what_is_asked_for_needs_to_require_a_gradient():
    q, k, v = qkv(2)
    k.requires_grad_()
    tf.attention(q, k, v).sum().backward()
    assert k.grad is not None
    assert q.grad is None
    assert v.grad is None


def test_what_is_changed_before_its_gradient_is_noticed():
    q, k, v = qkv(2, grad=True)
    slopes = torch.ones(4)
    out = tf.attention(q, k, v, alibi=slopes)
    slopes += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("way", ["autograd", "transforms"])
def test_a_second_derivative_is_refused(way):
    q, k, v = qkv(2, grad=True)

    def energy(q):
        return tf.attention(q, k, v).square().sum() + q.square().sum()

    def twice():
        if way == "transforms":
            return torch.func.grad(lambda q: torch.func.grad(energy)(q).sum())(q)
        (first,) = torch.autograd.grad(energy(q), q, create_graph=True)
        return torch.autograd.grad(first.sum(), q)

    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        twice()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on first use
def test_a_forward_derivative_is_refused():
    q, k, v = qkv(2)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: tf.attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            tf.attention(dual, k, v)
        assert torch.equal(tf.attention(q, k, v), tf.attention(q.clone(), k, v))


def test_gradient_checkpointing():
    inputs = qkv(2, grad=True)

    def call(q, k, v):
        return tf.attention(q, k, v, causal=True).square().sum()

    plain = torch.autograd.grad(call(*inputs), inputs)
    for reentrant in (False, True):
        again = torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=reentrant)
        leaves = torch.autograd.backward(again) or [x.grad for x in inputs]
        assert same(leaves, plain)
        for x in inputs:
            x.grad = None


def test_vmap():
    q, k, v = qkv(3, 2)
    bias = torch.randn(3, 9, 13)
    got = torch.vmap(lambda q, v, bias: tf.attention(q, k[0], v, causal=True, bias=bias))(q, v, bias)
    assert torch.equal(
        got, torch.stack([tf.attention(q[n], k[0], v[n], causal=True, bias=bias[n]) for n in range(3)])
    )
    per_item = torch.vmap(torch.func.grad(lambda q, v: tf.attention(q, k[0], v).sum()), in_dims=(0, 0))(q, v)
    of_all = torch.func.grad(lambda q: torch.vmap(lambda q, v: tf.attention(q, k[0], v))(q, v).sum())(q)
    assert torch.equal(per_item, of_all)


def test_autocast():
    q, k, v = qkv(2, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = tf.attention(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, tf.attention(*(x.to(torch.bfloat16) for x in (q, k, v)), causal=True))
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    wide = [x.detach().double() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        assert tf.attention(*wide).dtype == torch.float64


# ---- compiled and exported programs ----------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """Compile for the rest of the test, without a compiler of C++."""
    torch._dynamo.reset()
    yield lambda f, **options: torch.compile(f, fullgraph=True, backend="aot_eager", **options)
    torch._dynamo.reset()


def test_a_compiled_program_computes_the_same(compiled):
    inputs = qkv(2, grad=True)

    def call(q, k, v):
        out, lse = tf.attention(q, k, v, causal=True, window=(5, None), softcap=3.0, return_lse=True)
        return out.square().sum() + lse.sum()

    plain, program = call(*inputs), compiled(call)(*inputs)
    assert torch.equal(plain, program)
    assert same(torch.autograd.grad(program, inputs), torch.autograd.grad(plain, inputs))


def test_one_compiled_program_takes_any_length(compiled):
    def call(q, k, v, bias):
        mask = tf.causal() & tf.window(q.shape[-2] // 2, 0) | tf.prefix(2)
        return tf.attention(q, k, v, mask, bias=bias) * 2

    program = compiled(call, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for n in (5, 17, 40):
        inputs = *qkv(1, q_len=n, kv_len=n), torch.randn(n, n)
        assert torch.equal(program(*inputs), call(*inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


MASKS = {
    "documents": lambda: tf.documents(np.arange(13) // 4) & tf.causal(),
    "dense": lambda: tf.dense(np.arange(9 * 13).reshape(9, 13) % 3 > 0),
    "lengths": lambda: tf.lengths([3, 5]) | tf.causal(),
    "not": lambda: ~tf.prefix(2),
    "spans": lambda: tf.spans(np.zeros(9, int), np.arange(9)),
    "bound": lambda: tf.causal().bind(20, 20)[5:14, :13],
    "anchors": lambda: tf.anchors(2, 3) & tf.chunked(6),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_go_into_compiled_programs(mask, compiled):
    q, k, v = qkv(2)
    made = mask()
    expected = tf.attention(q, k, v, made)
    assert torch.equal(compiled(lambda q: tf.attention(q, k, v, made))(q), expected)
    with Watching():
        assert torch.equal(tf.attention(q, k, v, made), expected)


def test_masks_are_made_in_compiled_programs(compiled):
    def call(q, k, v, lengths, ids, cells):
        packed = tf.documents(ids) & tf.causal() | tf.lengths(lengths)
        return tf.attention(q, k, v, packed) + tf.attention(q, k, v, cells)

    inputs = *qkv(2), torch.tensor([3, 5]), torch.arange(13) // 4, torch.arange(9 * 13).reshape(9, 13) % 3 > 0
    assert torch.equal(compiled(call)(*inputs), call(*inputs))


def test_lengths_go_into_compiled_programs(compiled):
    def padded(q, k, v, lengths):
        return tf.attention(q, k, v, causal=True, kv_lengths=lengths)

    def packed(q, k, v, ends):
        return tf.attention(q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)

    inputs = *qkv(2), torch.tensor([9, 13])
    assert torch.equal(compiled(padded)(*inputs), padded(*inputs))
    inputs = *qkv(kv_len=9), torch.tensor([0, 3, 9], dtype=torch.int32)
    assert torch.equal(compiled(packed)(*inputs), packed(*inputs))


def test_a_predicate_does_not_compile(compiled):
    q, k, v = qkv(2)
    mask = tf.from_predicate(lambda i, j: (i + j) % 2 == 0)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(lambda q: tf.attention(q, k, v, mask))(q)
    with Watching(), pytest.raises(TypeError, match="made of Python code"):
        tf.attention(q, k, v, mask)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_takes_any_length(strict):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return tf.attention(q, k, v, causal=True)

    n = torch.export.Dim("n", min=2, max=4096)
    inputs = tuple(qkv(2, kv_len=9))
    program = torch.export.export(Layer(), inputs, dynamic_shapes=({2: n}, {2: n}, {2: n}), strict=strict)
    assert torch.ops.tilefold.fwd.default in [node.target for node in program.graph.nodes]
    longer = qkv(2, q_len=50, kv_len=50)
    assert torch.equal(program.module()(*longer), tf.attention(*longer, causal=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_operators_keep_torchs_rules(dtype, order):
    q, k, v = qkv(2, dtype=dtype)
    if order == "bshd":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    bias, sinks = torch.randn(9, 13), torch.randn(4)
    out, lse = tf.attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
    rest = (
        bias,
        sinks,
        *[None] * 5,
        *operators.write(tf.dense(bias > 0) & tf.causal()),
        0.3,
        2.0,
        False,
        "auto",
    )
    for operator, arguments in (
        (torch.ops.tilefold.fwd.default, (*(x.requires_grad_() for x in (q, k, v)), *rest)),
        (torch.ops.tilefold.bwd.default, (out, None, out, lse, *(x.detach() for x in (q, k, v)), *rest)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_shapes_alone():
    q, k, v = (x.to("meta") for x in qkv(2))
    out, lse = tf.attention(q, k, v, causal=True, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 4, 9, 8), (2, 4, 9))
    with FakeTensorMode() as mode:
        assert tf.attention(*(mode.from_tensor(x) for x in qkv(2))).shape == (2, 4, 9, 8)


# ---- tensors that are not what they seem -----------------------------------------------------------------------


def test_a_negated_view_is_read_as_what_it_is():
    q, k, v = qkv(2)
    assert torch.equal(tf.attention(q, torch._neg_view(k), v), tf.attention(q, -k, v))
    assert torch.equal(
        tf.attention(torch._neg_view(q), k, v, window=(3, 0)), tf.attention(-q, k, v, window=(3, 0))
    )
    cotangent = torch._neg_view(torch.ones(2, 4, 9, 8))
    inputs = qkv(2, grad=True)
    for _ in range(2):
        got = torch.autograd.grad(tf.attention(*inputs), inputs, cotangent)
        assert same(got, torch.autograd.grad(tf.attention(*inputs), inputs, cotangent.resolve_neg()))


@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_expanded_tensors_are_not_copied_and_give_dense_results(expanded):
    inputs = [x[:1].expand(3, -1, -1, -1) if n == expanded else x for n, x in enumerate(qkv(3))]
    out = tf.attention(*inputs)
    assert torch.equal(out, tf.attention(*(x.contiguous() for x in inputs)))
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x.to("meta"), "stands for another tensor"),
        (lambda x: FakeTensorMode().from_tensor(x), "stands for another tensor"),
        (lambda x: x.to_sparse(), "is a sparse_coo tensor"),
        (lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged), "stands for another tensor"),
        (lambda x: x.to(torch.int32), "must be float16, bfloat16, float32 or float64, got int32"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: torch.complex(x, x).conj(), "is a conjugated view"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "is a quantised tensor"),
        (lambda x: x.to(torch.bfloat16), "q, k and v must have one dtype"),
        (lambda x: x.tolist(), "k must be an array"),
    ],
    ids=[
        "meta",
        "fake",
        "sparse",
        "nested",
        "integers",
        "complex",
        "conjugate",
        "quantised",
        "another dtype",
        "list",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # some of these kinds are on their way in or out of torch
def test_tensors_that_cannot_be_read_are_refused(make, says):
    q, k, v = qkv(2)
    with pytest.raises(TypeError, match=says):
        tf.attention(q, make(k), v)


def test_a_subclass_without_rules_of_its_own_is_a_tensor():
    class Mine(torch.Tensor):
        pass

    q, k, v = qkv(2)
    assert torch.equal(tf.attention(q.as_subclass(Mine), k, v), tf.attention(q, k, v))


def test_arrays_may_come_with_tensors():
    q, k, v = qkv(2)
    assert torch.equal(tf.attention(q, k.numpy(), v), tf.attention(q, k, v))
    assert torch.equal(tf.attention(q, k, v, alibi=np.ones(4)), tf.attention(q, k, v, alibi=torch.ones(4)))


def test_out_is_written_where_no_gradient_is_asked_for():
    q, k, v = qkv(2, grad=True)
    out = torch.full((2, 4, 9, 8), torch.nan)
    with torch.no_grad():
        assert tf.attention(q, k, v, out=out) is out
        assert torch.equal(out, tf.attention(q, k, v))
    with pytest.raises(ValueError, match="out must not be given where a gradient may be asked for"):
        tf.attention(q, k, v, out=out)


def test_slopes_have_no_gradient():
    q, k, v = qkv(2)
    with pytest.raises(ValueError, match="alibi must not require a gradient"):
        tf.attention(q, k, v, alibi=torch.ones(4, requires_grad=True))


def test_the_default_device_is_not_asked():
    q, k, v = qkv(2, grad=True)
    expected = tf.attention(q, k, v)
    with torch.device("meta"):
        for _ in range(2):
            out = tf.attention(q, k, v)
            assert torch.equal(out, expected)
            assert torch.autograd.grad(out, q, expected)[0].device.type == "cpu"


def test_inference_mode():
    q, k, v = qkv(2, grad=True)
    with torch.inference_mode():
        out = tf.attention(q, k, v, causal=True)
    assert out.is_inference()
    assert torch.equal(out, tf.attention(q, k, v, causal=True).detach())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_merge_is_differentiable(dtype):
    inputs = qkv(2, q_len=9, kv_len=7, dtype=dtype, grad=True)

    def whole(q, k, v):
        return tf.attention(q, k, v, causal=True, return_lse=True)

    def merged(q, k, v):
        """Of three parts; the first two rows see nothing in any, more rows nothing in the second."""
        edges = (0, 3, 6, 7)
        return tf.merge(
            *(
                tf.attention(
                    q, k[..., a:b, :], v[..., a:b, :], tf.band(None, 0, offset=-2 - a), return_lse=True
                )
                for a, b in zip(edges, edges[1:], strict=False)
            )
        )

    (one, one_grads), (many, many_grads) = (
        by_autograd(call, inputs, [torch.ones_like(x) for x in whole(*inputs)]) for call in (whole, merged)
    )
    roundoff = 64 * ROWS[str(dtype).removeprefix("torch.")].roundoff
    for a, b in zip((*one, *one_grads), (*many, *many_grads), strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=roundoff, atol=roundoff)
    assert torch.equal(many[1][..., :2], torch.full((2, 4, 2), -torch.inf, dtype=many[1].dtype))


def test_merge_gives_tensors_what_it_gives_arrays():
    q, k, v = qkv(2)
    parts = [
        tf.attention(q, k[..., s, :], v[..., s, :], return_lse=True) for s in (slice(0, 5), slice(5, 13))
    ]
    for got, expected in zip(
        tf.merge(*parts), tf.merge(*([x.numpy() for x in part] for part in parts)), strict=True
    ):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-6)
    swapped = [(out.transpose(1, 2).contiguous().transpose(1, 2), lse) for out, lse in parts]
    assert tf.merge(*swapped)[0].stride() == swapped[0][0].stride()
    with pytest.raises(ValueError, match=r"merge: part 1 is float64 \(2, 4, 9, 8\), the first is float32"):
        tf.merge(parts[0], (parts[1][0].double(), parts[1][1]))


# ---- calls that are known --------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known yet."""
    if calls._known is None:
        pytest.skip("no native core")
    known = type(calls._known)(*calls.MADE_OF)
    monkeypatch.setattr(calls, "_known", known)
    return known


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_the_second_call_gives_the_first_result(dtype, options, order, fresh):
    inputs = qkv(2, dtype=dtype, grad=True)
    if order == "bshd":
        inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]

    def results():
        out, lse = tf.attention(*inputs, **options, return_lse=True)
        return out, lse, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    first = results()
    assert len(fresh) == 2
    again = results()
    assert len(fresh) == 2
    assert same(first, again)
    assert [x.stride() for x in first] == [x.stride() for x in again]
    assert torch.equal(tf.attention(*(x.detach() for x in inputs), **options), first[0])
    agree([first[0]], [tf.attention(*(array(x) for x in inputs), **options)])


def test_one_head_alone_is_not_known(fresh):
    """Its two dimensions are given a third, which the core must see."""
    inputs = [x[0].detach().requires_grad_() for x in qkv()]
    results = [tf.attention(*inputs, causal=True) for _ in range(3)]
    grads = [torch.autograd.grad(out.sum(), inputs) for out in results]
    assert len(fresh) == 0
    assert all(same(grads[0], other) for other in grads)


def test_gradients_of_arrays_without_autograd_are_known_too(fresh):
    inputs = [x.detach() for x in qkv(2)]
    out, lse = tf.attention(*inputs, causal=True, return_lse=True)
    first = tf.attention_grad(*inputs, out, lse, out, causal=True)
    count = len(fresh)
    assert count == 2
    assert same(first[:3], tf.attention_grad(*inputs, out, lse, out, causal=True)[:3])
    assert len(fresh) == count
    agree(first[:3], tf.attention_grad(*(x.numpy() for x in (*inputs, out, lse, out)), causal=True)[:3])
    for wrong in ({"causal": 1}, {"scale": True}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            tf.attention_grad(*inputs, out, lse, out, **wrong)


def test_equal_is_not_the_same(fresh):
    """1 == True, but what is refused the first time is refused the second time too."""
    q, k, v = qkv(2)
    for right, wrong in (
        ({"causal": True}, {"causal": 1}),
        ({"scale": 1.0}, {"scale": True}),
        ({"softcap": 1.0}, {"softcap": True}),
        ({"return_lse": True}, {"return_lse": 1}),
    ):
        tf.attention(q, k, v, **right)
        with pytest.raises(TypeError, match=next(iter(wrong))):
            tf.attention(q, k, v, **wrong)


def test_what_is_known_tells_apart_what_differs(fresh):
    """Each changes one thing about the call before it, and is looked at anew."""
    q, k, v = qkv(2, 2)
    calls = [
        (q, k, v, {}),
        (q, k, v, {"causal": True}),
        (q, k, v, {"scale": 0.5}),
        (q, k, v, {"softcap": 0.5}),
        (q.double(), k.double(), v.double(), {}),
        (q[:, :, :, :5], k, v, {}),
        (q, k[:, :, :, :7], v[:, :, :, :7], {}),
        (q, k, v[..., :3], {}),
        (q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, {}),
        (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), {}),
    ]
    for n, (*inputs, options) in enumerate(calls, 1):
        got = tf.attention(*inputs, **options), tf.attention(*inputs, **options)
        assert len(fresh) == n
        agree(got, [tf.attention(*(x.numpy() for x in inputs), **options)] * 2)


def test_what_is_known_is_bounded(fresh):
    for n in range(1100):
        q = torch.ones(1, n + 1, 1)
        tf.attention(q, q[:, :1], q[:, :1])
    assert 0 < len(fresh) <= 1024


def test_threads_follow_torch(fresh):
    q, k, v = qkv(2)
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert tf.get_num_threads() == n
            tf.attention(q, k, v)
            assert len(fresh) == n
    finally:
        torch.set_num_threads(before)


def test_many_threads_call_at_once(fresh):
    inputs = [qkv(2, q_len=n) for n in range(20, 28)]
    expected = [tf.attention(*(x.numpy() for x in each), causal=True) for each in inputs]
    wrong = []

    def call(n):
        for _ in range(50):
            if not np.array_equal(tf.attention(*inputs[n], causal=True).numpy(), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- without a package -----------------------------------------------------------------------------------------


def test_bfloat16_without_ml_dtypes_names_what_to_install(monkeypatch):
    q, k, v = qkv(2, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"tilefold\[torch\]"):
        tf.attention(q, k, v, window=(3, 0))


def test_a_model_that_holds_tensors_can_be_copied():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(8, 24)

        def forward(self, x):
            q, k, v = self.project(x).chunk(3, dim=-1)
            return tf.attention(q, k, v, causal=True)

    layer, x = Layer(), torch.randn(2, 9, 8)
    layer(x).sum().backward()
    other = copy.deepcopy(layer)
    other(x).sum().backward()
    assert torch.equal(layer(x), other(x))
