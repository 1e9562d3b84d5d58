"""Statistics of tensors: tensors of the same kind, and derivatives where there are any, against the matrix in torch."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

import tilefold as tf  # noqa: E402
from tilefold.probes.statistic import Seen  # noqa: E402

REGION = tf.prefix(3) | tf.window(2, 0)


def drawn(*shape, kv_heads=None, kv_len=None, dtype=torch.float64):
    torch.manual_seed(len(shape))
    q = torch.randn(*shape, dtype=torch.float64)
    k = torch.randn(*shape[:-3], kv_heads or shape[-3], kv_len or shape[-2], shape[-1], dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (2 * q, k)]


def matrix(q, k, mask, sinks=None, softcap=None, bias=None):
    """(weights, log-sum-exp) by the textbook, in autograd's sight."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    s = q @ k.mT / q.shape[-1] ** 0.5
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    s = s.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    w = torch.softmax(s, dim=-1)
    return w


def visible(mask, q_len, kv_len):
    from tilefold.layouts import Frame

    frame = Frame.whole(q_len, kv_len)
    return torch.from_numpy(mask.panel(frame, slice(0, q_len), slice(0, kv_len)).cells(0, kv_len))


def textbook(name, w, mask_cells, sinks):
    if name == "entropy":
        return -(torch.where(w > 0, w, 1).log() * w).sum(dim=-1)
    w = w[..., :-1] if sinks is not None else w
    if name == "mass_in":
        return torch.where(mask_cells, w, 0).sum(dim=-1)
    if name == "recent":
        return w[..., -5:, :].sum(dim=-2)
    if name == "fading":
        return (w * 0.9 ** torch.arange(w.shape[-2] - 1.0, -1, -1, dtype=w.dtype)[:, None]).sum(dim=-2)
    return w.sum(dim=-2)


WHAT = {
    "entropy": tf.entropy(),
    "mass_in": tf.mass_in(near=REGION),
    "key_mass": tf.key_mass(),
    "recent": tf.key_mass(last=5).named("recent"),
    "fading": tf.key_mass(discount=0.9).named("fading"),
}


def value(seen, name):
    return seen.mass_in.near if name == "mass_in" else getattr(seen, name)


@pytest.mark.parametrize("name", WHAT)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_derivatives_are_those_of_the_matrix(name, causal, with_sinks):
    q, k = drawn(2, 4, 21, 8, kv_heads=2, kv_len=33)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    mask = visible(tf.causal(), 21, 33) if causal else torch.ones(21, 33, dtype=bool)
    seen = tf.probe(q, k, WHAT[name], causal=causal, sinks=sinks)
    got = value(seen, name)
    right = textbook(name, matrix(q, k, mask, sinks), visible(REGION, 21, 33), sinks)
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(right)
    given = [q, k] + ([sinks] if with_sinks else [])
    mine = torch.autograd.grad((got * weights).sum(), given)
    theirs = torch.autograd.grad((right * weights).sum(), given)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mass_in", "key_mass"])
def test_derivatives_pass_softcap_and_bias(name):
    q, k = drawn(3, 17, 8, kv_len=20)
    bias = torch.randn(3, 17, 20, dtype=torch.float64, requires_grad=True)
    got = value(tf.probe(q, k, WHAT[name], softcap=2.0, bias=bias), name)
    w = matrix(q, k, torch.ones(17, 20, dtype=bool), softcap=2.0, bias=bias)
    right = textbook(name, w, visible(REGION, 17, 20), None)
    weights = torch.randn_like(right)
    mine = torch.autograd.grad((got * weights).sum(), [q, k, bias])
    theirs = torch.autograd.grad((right * weights).sum(), [q, k, bias])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rows_that_see_nothing_have_no_derivative():
    q, k = drawn(2, 9, 8, kv_len=4)
    seen = tf.probe(q, k, *WHAT.values(), causal=True)
    for name in WHAT:
        dq, _ = torch.autograd.grad(value(seen, name).sum(), [q, k], retain_graph=True)
        assert not dq[:, :5].any() and torch.isfinite(dq).all()


def test_entropy_under_a_softcap_says_that_it_has_no_derivative():
    q, k = drawn(2, 9, 8)
    with pytest.raises(ValueError, match="entropy has a gradient for scores without softcap"):
        tf.probe(q, k, tf.entropy(), softcap=3.0)
    with torch.no_grad():
        assert tf.probe(q, k, tf.entropy(), softcap=3.0).entropy.shape == (2, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_have_derivatives_of_their_own_type(dtype):
    q, k = drawn(2, 40, 16, dtype=dtype)
    seen = tf.probe(q, k, tf.entropy(), tf.key_mass(), causal=True)
    assert seen.entropy.dtype == torch.float32 and seen.entropy.requires_grad
    wide, plain = (
        [x.detach().to(t).requires_grad_() for x in (q, k)] for t in (torch.float64, torch.float32)
    )
    mask = visible(tf.causal(), 40, 40)
    exact, honest = (matrix(*inputs, mask) for inputs in (wide, plain))
    for name in ("entropy", "key_mass"):
        mine = torch.autograd.grad(value(seen, name).square().sum(), [q, k], retain_graph=True)
        theirs, rounded = (
            torch.autograd.grad(textbook(name, w, None, None).square().sum(), inputs, retain_graph=True)
            for w, inputs in ((exact, wide), (honest, plain))
        )
        for a, b, c in zip(mine, theirs, rounded, strict=True):
            assert a.dtype == dtype
            off = 8 * (c.double() - b).abs().max() + torch.finfo(dtype).eps * b.abs().max()
            assert (a.double() - b).abs().max() <= off


def test_heads_are_reduced_in_sight_of_autograd():
    q, k = drawn(2, 4, 12, 8, kv_heads=2)
    seen = tf.probe(q, k, tf.entropy(heads="group"), tf.key_mass(heads="all"))
    assert seen.entropy.shape == (2, 2, 12) and seen.key_mass.shape == (2, 12)
    (seen.entropy.sum() + seen.key_mass.square().sum()).backward()
    assert torch.isfinite(q.grad).all() and k.grad.abs().sum() > 0


def test_a_step_on_the_entropy_raises_it():
    """What it is for: a penalty on heads that look at one key only."""
    q, k = drawn(2, 30, 8, dtype=torch.float32)
    before = tf.probe(q, k, tf.entropy(), causal=True).entropy.mean()
    before.backward()
    with torch.no_grad():
        after = tf.probe(q + 5 * q.grad, k + 5 * k.grad, tf.entropy(), causal=True).entropy.mean()
    assert after > before


def test_attention_keeps_its_derivative_beside_statistics():
    q, k = drawn(2, 30, 8, dtype=torch.float32)
    v = torch.randn(2, 30, 8, requires_grad=True)
    out, lse, seen = tf.attention(q, k, v, causal=True, probes=[tf.entropy(), tf.topk(2)])
    assert isinstance(seen, Seen)
    plain = tf.attention(q, k, v, causal=True)
    assert torch.equal(out, plain)
    mine = torch.autograd.grad(out.sum() + lse.sum() + seen.entropy.sum(), [q, k, v])
    assert all(torch.isfinite(g).all() for g in mine)
    with torch.no_grad():
        again, _, fused = tf.attention(q, k, v, causal=True, probes=[tf.entropy(), tf.topk(2)])
    assert torch.equal(again, plain) and torch.equal(fused.topk.keys, seen.topk.keys)


def test_autocast_probes_what_it_attends_with():
    q, k = (x.detach() for x in drawn(2, 40, 16, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        seen = tf.probe(q, k, tf.entropy())
    alone = tf.probe(q.bfloat16(), k.bfloat16(), tf.entropy())
    assert torch.equal(seen.entropy, alone.entropy)


def test_2d_tensors_are_one_head():
    torch.manual_seed(0)
    q, k = (torch.randn(12, 8, requires_grad=True) for _ in range(2))
    seen = tf.probe(q, k, tf.entropy(), tf.key_mass(), tf.topk(2), tf.heatmap(2, 3))
    assert seen.entropy.shape == seen.key_mass.shape == (12,)
    assert seen.topk.keys.shape == (12, 2) and seen.heatmap.shape == (2, 3)
    seen.entropy.sum().backward()
    assert q.grad.shape == (12, 8)
