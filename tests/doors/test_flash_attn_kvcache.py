"""`flash_attn_with_kvcache` of versions 2 and 3: what is written where, what is rotated how, and what attends to what.

Unused rows of every cache hold NaN, so reading one shows; unused entries of tables lie far outside. Results are held
against the loops of `flash_oracle`, and what is written against a rotation written out pair by pair.
"""

import inspect
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from flash_oracle import by_position, near, sequence, signed, slanted  # noqa: E402

import tilefold as tf  # noqa: E402
from tilefold.drop_in.flash_attn import calls as calls_of  # noqa: E402
from tilefold.drop_in.flash_attn import fa2, fa3  # noqa: E402

INF, NAN = float("inf"), float("nan")
TYPES = {x: getattr(torch, x) for x in ("float16", "bfloat16", "float32", "float64")}
HEADS, KV_HEADS, DIM = 4, 2, 20
VERSIONS = {"2": fa2, "3": fa3}


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def ints(*x):
    return torch.tensor(x, dtype=torch.int32)


def cache(lengths, capacity, sequences=None, dtype=torch.float32, rows=None):
    """k_cache and v_cache with NaN after each length; `rows` says which sequence of the cache has which length."""
    shape = (len(lengths) if sequences is None else sequences, capacity, KV_HEADS, DIM)
    both = tensors(shape, shape, dtype=dtype, seed=7)
    filled = [torch.full_like(x, NAN) for x in both]
    for b, n in enumerate(lengths):
        at = b if rows is None else rows[b]
        for x, y in zip(filled, both, strict=True):
            x[at, :n] = y[at, :n]
    return filled


def turned(x, cos, sin, at, interleaved):
    """One row (heads, dim) rotated to position `at`, pair by pair; in float32 or wider, as the kernels do."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, kind, half = x.to(wide), x.dtype, cos.shape[1]
    y = x.clone()
    for p in range(half):
        i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + half)
        c, s = cos[at, p].to(wide), sin[at, p].to(wide)
        y[:, i], y[:, j] = x[:, i] * c - x[:, j] * s, x[:, i] * s + x[:, j] * c
    return y.to(kind)


def held(q_rows, k_rows, v_rows, o, version):
    """The oracle's answer for a batch of sequences, each a list of rows of q, k and v."""

    def expected(a):
        parts = []
        for b, (q, k, v) in enumerate(zip(q_rows, k_rows, v_rows, strict=True)):
            left, right = signed(o.get("causal", False), o.get("window_size", (-1, -1)))
            added = None
            if o.get("alibi_slopes") is not None:
                slopes = a.array(o["alibi_slopes"])
                slopes = slopes if slopes.ndim == 1 else slopes[b]
                added = slanted(slopes, len(q), len(k), left is None and right == 0)
            sees = by_position(len(q), len(k), left, right, o.get("attention_chunk", 0))
            options = {"scale": o.get("softmax_scale"), "softcap": o.get("softcap", 0.0), "added": added}
            empty = INF if version == "2" else -INF
            parts.append(sequence(a, *(a.array(x) for x in (q, k, v)), sees, **options, empty=empty))
        return {
            "out": np.stack([p["out"] for p in parts]),
            "lse": np.stack([p["lse"] for p in parts]),
        }

    return expected


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 0)},
    "window both": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.0, "causal": True},
    "scale": {"softmax_scale": 0.4},
    "splits": {"num_splits": 3, "causal": True},
}
ALIBI = {
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "alibi, causal": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]), "causal": True},
    "alibi by item": {"alibi_slopes": torch.linspace(0.1, 1.2, 12).view(3, 4), "causal": True},
}
LENGTHS = [5, 0, 9]


@pytest.mark.parametrize("new", [0, 1, 4])
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("key", [*OPTIONS, *ALIBI])
@pytest.mark.parametrize("version", VERSIONS)
def test_append_and_attend(version, key, q_len, new):
    if version == "2" or key not in ALIBI:  # version 3 has no ALiBi
        appended(version, key, q_len, new, torch.float32)


def appended(version, key, q_len, new, dtype):
    """A call that appends `new` rows, or none, held against the oracle, and the cache after it."""
    o = {**OPTIONS, **ALIBI}[key]
    k_cache, v_cache = cache(LENGTHS, 13, dtype=dtype)
    before = k_cache.clone(), v_cache.clone()
    q, k, v = tensors((3, q_len, HEADS, DIM), *[(3, new, KV_HEADS, DIM)] * 2, dtype=dtype)
    more = {"k": k, "v": v} if new else {}
    lengths = ints(*LENGTHS)
    out, lse, *_ = VERSIONS[version].flash_attn_with_kvcache(
        q, k_cache, v_cache, **more, cache_seqlens=lengths, **o, return_softmax_lse=True
    )
    assert lengths.tolist() == LENGTHS
    k_rows, v_rows = [], []
    for b, n in enumerate(LENGTHS):
        for x, old, added, rows in ((k_cache, before[0], k, k_rows), (v_cache, before[1], v, v_rows)):
            assert torch.equal(x[b, :n], old[b, :n])
            assert torch.equal(x[b, n : n + new], added[b])
            assert bool(x[b, n + new :].isnan().all())
            rows.append(torch.cat([old[b, :n], added[b]]))
    near({"out": out, "lse": lse}, held(q, k_rows, v_rows, o, version), dtype)


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    appended("2", "causal", 4, 4, TYPES[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_full_to_the_last_row(version):
    call = VERSIONS[version].flash_attn_with_kvcache
    k_cache, v_cache = cache([6, 6], 8)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    call(q, k_cache, v_cache, k, v, cache_seqlens=6, causal=True)
    assert torch.equal(k_cache[:, 6:], k)
    whole = call(q, k_cache, v_cache, causal=True)
    assert torch.equal(whole, call(q, k_cache, v_cache, cache_seqlens=8, causal=True))
    for used in (7, ints(6, 7)):
        kept = k_cache.clone(), v_cache.clone()
        with pytest.raises(ValueError, match="must be at most the 8 rows of a sequence's cache, got"):
            call(q, k_cache, v_cache, -k, -v, cache_seqlens=used)
        assert torch.equal(k_cache, kept[0])
        assert torch.equal(v_cache, kept[1])


@pytest.mark.parametrize("call", [fa2.flash_attn_with_kvcache, fa3.flash_attn_with_kvcache], ids=VERSIONS)
def test_an_error_leaves_the_cache_as_it_was(call):
    k_cache, v_cache = cache([3, 5], 8)
    kept = k_cache.clone(), v_cache.clone()
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    with pytest.raises(ValueError, match="scale must be finite"):  # found out after the append
        call(q, k_cache, v_cache, k, v, cache_seqlens=ints(3, 5), softmax_scale=INF)
    for x, y in zip((k_cache, v_cache), kept, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
        assert torch.equal(x.isnan(), y.isnan())


def test_a_row_that_sees_no_key():
    k_cache, v_cache = cache([0, 2], 8)
    (q,) = tensors((2, 3, HEADS, DIM))
    for version, empty in (("2", INF), ("3", -INF)):
        out, lse, *rest = VERSIONS[version].flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=ints(0, 2), causal=True, return_softmax_lse=True
        )
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert bool((lse[0] == empty).all())
        assert bool((lse[1, :, 0] == empty).all())
        assert bool(lse[1, :, 1:].isfinite().all())
        assert [x.numel() for x in rest] == ([0, 0] if version == "3" else [])


# ---- which sequence, from which row --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[2, 0], [1, 2], [3, 1], [2, 2]], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_cache_batch_idx(version, rows):
    call, lengths = VERSIONS[version].flash_attn_with_kvcache, [5, 3]
    if rows[0] == rows[1]:
        lengths = [5, 5]
    k_cache, v_cache = cache(lengths, 9, sequences=4, rows=rows)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    more = {"cache_seqlens": ints(*lengths), "cache_batch_idx": ints(*rows), "causal": True}
    out, lse, *_ = call(q, k_cache, v_cache, k, v, **more, return_softmax_lse=True)
    written = [[x[row, : n + 2] for row, n in zip(rows, lengths, strict=True)] for x in (k_cache, v_cache)]
    if rows[0] != rows[1]:
        for b, row in enumerate(rows):
            assert torch.equal(k_cache[row, lengths[b] : lengths[b] + 2], k[b])
    for row in set(range(4)) - set(rows):
        assert bool(k_cache[row].isnan().all())
    near({"out": out, "lse": lse}, held(q, *written, {"causal": True}, version), q.dtype)


@pytest.mark.parametrize("key", ["causal", "window", "plain", "alibi, causal"])
@pytest.mark.parametrize("version", VERSIONS)
def test_cache_leftpad(version, key):
    """Keys begin at leftpad, and positions count from the end: rows before it are as if they were not there."""
    o, pads = {**OPTIONS, **ALIBI}[key], [2, 0, 5]
    if version == "3" and key in ALIBI:
        return
    lengths = [6, 3, 5]
    k_cache, v_cache = cache(lengths, 9)
    for x in (k_cache, v_cache):
        for b, pad in enumerate(pads):
            x[b, :pad] = NAN
    q, k, v = tensors((3, 2, HEADS, DIM), *[(3, 2, KV_HEADS, DIM)] * 2)
    out, lse, *_ = VERSIONS[version].flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=ints(*lengths), cache_leftpad=ints(*pads), **o,
        return_softmax_lse=True,
    )  # fmt: skip
    rows = [
        [x[b, pad : n + 2] for b, (pad, n) in enumerate(zip(pads, lengths, strict=True))]
        for x in (k_cache, v_cache)
    ]
    near({"out": out, "lse": lse}, held(q, *rows, o, version), q.dtype)


def test_chunks_and_left_padding():
    k_cache, v_cache = cache([7, 4], 9)
    k_cache[0, :3] = v_cache[0, :3] = NAN
    o = {"attention_chunk": 3, "causal": True}
    (q,) = tensors((2, 3, HEADS, DIM))
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=ints(7, 4), cache_leftpad=ints(3, 0), **o, return_softmax_lse=True
    )
    rows = [[x[0, 3:7], x[1, :4]] for x in (k_cache, v_cache)]
    near({"out": out, "lse": lse}, held(q, *rows, o, "3"), q.dtype)


# ---- pages ---------------------------------------------------------------------------------------------------


def in_pages(lengths, spare, page_len, dtype=torch.float32):
    """Pages in a random order with room for `spare` more rows a sequence, NaN where nothing is; their table."""
    counts = [-(-(n + spare) // page_len) for n in lengths]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(5)).tolist()
    shape = (len(order), page_len, KV_HEADS, DIM)
    pages = [torch.full(shape, NAN, dtype=dtype) for _ in "kv"]
    table = torch.full((len(lengths), max(counts) + 1), -(10**9), dtype=torch.int32)
    full = cache(lengths, max(lengths) + 1, dtype=dtype)
    for b, n in enumerate(lengths):
        for p in range(counts[b]):
            table[b, p] = order.pop()
        for j in range(n):
            for there, x in zip(pages, full, strict=True):
                there[table[b, j // page_len], j % page_len] = x[b, j]
    return (*pages, table, full)


@pytest.mark.parametrize("page_len", [1, 3, 256])
@pytest.mark.parametrize("new", [0, 4])
@pytest.mark.parametrize("key", ["causal", "window both", "alibi by item"])
@pytest.mark.parametrize("version", VERSIONS)
def test_pages(version, key, new, page_len):
    o = {**OPTIONS, **ALIBI}[key]
    if version == "3" and key in ALIBI:
        return
    k_pages, v_pages, table, full = in_pages(LENGTHS, new, page_len)
    q, k, v = tensors((3, 4, HEADS, DIM), *[(3, new, KV_HEADS, DIM)] * 2)
    more = {"k": k, "v": v} if new else {}
    name = "block_table" if version == "2" else "page_table"
    out, lse, *_ = VERSIONS[version].flash_attn_with_kvcache(
        q,
        k_pages,
        v_pages,
        **more,
        cache_seqlens=ints(*LENGTHS),
        **{name: table},
        **o,
        return_softmax_lse=True,
    )
    rows = [
        [torch.cat([x[b, :n], y[b]]) for b, n in enumerate(LENGTHS)]
        for x, y in zip(full, (k, v), strict=True)
    ]
    near({"out": out, "lse": lse}, held(q, *rows, o, version), q.dtype)
    filled = int((~k_pages.isnan()).any(-1).any(-1).sum())
    assert filled == sum(LENGTHS) + 3 * new
    for b, n in enumerate(LENGTHS):
        for j in range(n, n + new):
            assert torch.equal(k_pages[table[b, j // page_len], j % page_len], k[b, j - n])
            assert torch.equal(v_pages[table[b, j // page_len], j % page_len], v[b, j - n])


def test_wrong_tables():
    k_pages, v_pages, table, _ = in_pages(LENGTHS, 4, 3)
    q, k, v = tensors((3, 4, HEADS, DIM), *[(3, 4, KV_HEADS, DIM)] * 2)
    kept = k_pages.clone()

    def call(table, **more):
        given = {"cache_seqlens": ints(*LENGTHS), "block_table": table, **more}
        fa2.flash_attn_with_kvcache(q, k_pages, v_pages, k, v, **given)

    for at, entry in (((2, 4), len(k_pages)), ((0, 0), -1), ((1, 1), 2**31 - 1)):
        bad = table.clone()
        bad[at] = entry
        with pytest.raises(
            ValueError, match=f"block_table's entries in use must lie within 0 and .*, got {entry}"
        ):
            call(bad)
    with pytest.raises(ValueError, match="must be at most the 18 rows"):
        call(table, cache_seqlens=ints(5, 0, 15))
    with pytest.raises(ValueError, match="block_table excludes cache_batch_idx and cache_leftpad"):
        call(table, cache_batch_idx=ints(0, 1, 2))
    with pytest.raises(TypeError, match="block_table must be int32"):
        call(table.double())
    assert torch.equal(k_pages.nan_to_num(), kept.nan_to_num())


# ---- rotation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["plain", "causal", "window", "(-1, 0)", "too wide to be one", "barely"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("rotary_dim", [16, 20, 2])
@pytest.mark.parametrize("version", VERSIONS)
def test_rotation(version, rotary_dim, interleaved, key):
    """q is rotated row by row only if the call is causal or has a window that hides something of the cache."""
    rotated(version, rotary_dim, interleaved, key, torch.float32)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_types_of_a_rotation(name):
    rotated("2", 16, False, "causal", TYPES[name])


def rotated(version, rotary_dim, interleaved, key, dtype):
    o = {
        **OPTIONS, "(-1, 0)": {"window_size": (-1, 0)}, "too wide to be one": {"window_size": (14, 50)},
        "barely": {"window_size": (12, 3)},
    }[key]  # fmt: skip
    # 12 of 13 rows, 3 of 4 queries: version 3 finds that nothing is left to hide, version 2 does not
    steady = key in ("plain", "too wide to be one") or (key == "barely" and version == "3")
    k_cache, v_cache = cache(LENGTHS, 13, dtype=dtype)
    old = k_cache.clone()
    q, k, v = tensors((3, 4, HEADS, DIM), *[(3, 4, KV_HEADS, DIM)] * 2, dtype=dtype)
    angles = torch.randn(15, rotary_dim // 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    kept = q.clone(), k.clone()
    out, lse, *_ = VERSIONS[version].flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=ints(*LENGTHS), rotary_interleaved=interleaved, **o,
        return_softmax_lse=True,
    ) if version == "2" else fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, None, cos, sin, cache_seqlens=ints(*LENGTHS), rotary_interleaved=interleaved, **o,
        return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])
    q_rows, k_rows = [], []
    for b, n in enumerate(LENGTHS):
        q_at = [n if steady else n + i for i in range(4)]
        q_rows.append(torch.stack([turned(q[b, i], cos, sin, at, interleaved) for i, at in enumerate(q_at)]))
        new = torch.stack([turned(k[b, i], cos, sin, n + i, interleaved) for i in range(4)])
        wide = {"out": k_cache[b, n : n + 4]}
        near(wide, lambda a, new=new: {"out": a.array(new)}, dtype)
        k_rows.append(torch.cat([old[b, :n], k_cache[b, n : n + 4]]))
    v_rows = [v_cache[b, : n + 4] for b, n in enumerate(LENGTHS)]
    near({"out": out, "lse": lse}, held(q_rows, k_rows, v_rows, o, version), dtype)


def test_positions_of_a_rotation_include_left_padding():
    lengths, pads = [6, 3], [4, 1]
    angles = torch.linspace(0, 3, 9 * 8, dtype=torch.float64).view(9, 8)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    for rotary_start in (None, ints(1, 5)):
        k_cache, v_cache = cache(lengths, 8)
        more = {"cache_seqlens": ints(*lengths), "cache_leftpad": ints(*pads), "causal": True}
        fa3.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, None, angles.cos().float(), angles.sin().float(), **more,
            rotary_seqlens=rotary_start,
        )  # fmt: skip
        for b, n in enumerate(lengths):
            start = n if rotary_start is None else int(rotary_start[b])
            rows = [
                turned(k[b, i], angles.cos().float(), angles.sin().float(), start + i, True) for i in range(2)
            ]
            torch.testing.assert_close(k_cache[b, n : n + 2], torch.stack(rows))


def test_wrong_rotations():
    k_cache, v_cache = cache([3, 5], 8)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    cos = torch.ones(8, 8)

    def wrong(says, *args, error=ValueError, **options):
        kept = k_cache.clone()
        with pytest.raises(error, match=says):
            fa2.flash_attn_with_kvcache(
                q, k_cache, v_cache, *args, **{"cache_seqlens": ints(3, 5), **options}
            )
        assert torch.equal(k_cache.nan_to_num(), kept.nan_to_num())

    wrong("rotary_cos and rotary_sin come together", k, v, cos, error=TypeError)
    wrong("rotary_cos rotates what is appended: give k and v", None, None, cos, cos)
    wrong("rotary_cos must reach position 6, got 6 positions", k, v, cos[:6], cos[:6])
    wrong(
        "rotary_cos must have at most 10 columns, half of dim; got 11",
        k,
        v,
        torch.ones(8, 11),
        torch.ones(8, 11),
    )
    wrong(r"rotary_sin must have shape \(8, 8\), got \(8, 4\)", k, v, cos, cos[:, :4])
    wrong("q and rotary_cos must have one dtype", k, v, cos.half(), cos.half(), error=TypeError)


# ---- version 3's packed queries ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "index", "leftpad", "pages"])
def test_packed_queries_and_keys(form):
    q_sizes, new = [2, 0, 3], [1, 2, 0]
    q, k, v = tensors((5, HEADS, DIM), *[(3, KV_HEADS, DIM)] * 2)
    o, pads = {"causal": True}, [0, 0, 0]
    more = {"cache_seqlens": ints(*LENGTHS), "cu_seqlens_q": ints(0, 2, 2, 5), "max_seqlen_q": 3}
    more["cu_seqlens_k_new"] = ints(0, 1, 3, 3)
    if form == "pages":
        k_cache, v_cache, more["page_table"], full = in_pages(LENGTHS, 2, 3)
    else:
        rows = [2, 0, 1] if form == "index" else [0, 1, 2]
        k_cache, v_cache = cache(LENGTHS, 12, rows=rows)
        full = [x[rows].clone() for x in (k_cache, v_cache)]
        if form == "index":
            more["cache_batch_idx"] = ints(*rows)
        if form == "leftpad":
            pads = [2, 0, 4]
            more["cache_leftpad"] = ints(*pads)
            k_cache[2, :4] = NAN
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, **more, **o, return_softmax_lse=True
    )
    starts, k_starts = [0, 2, 2], [0, 1, 3]
    q_rows = [q[s : s + n] for s, n in zip(starts, q_sizes, strict=True)]
    kv_rows = [
        [torch.cat([x[b, pads[b] : n], y[k_starts[b] : k_starts[b] + new[b]]]) for b, n in enumerate(LENGTHS)]
        for x, y in zip(full, (k, v), strict=True)
    ]

    def expected(a):
        parts = [held([q_], [k_], [v_], o, "3")(a) for q_, k_, v_ in zip(q_rows, *kv_rows, strict=True)]
        return {
            "out": np.concatenate([p["out"][0] for p in parts]),
            "lse": np.concatenate([p["lse"][0] for p in parts], 1),
        }

    near({"out": out, "lse": lse}, expected, q.dtype)


# ---- wrong use -----------------------------------------------------------------------------------------------


def test_wrong_caches():
    k_cache, v_cache = cache([3, 5], 8)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)

    def wrong(says, *args, error=ValueError, **options):
        kept = k_cache.clone()
        with pytest.raises(error, match=says):
            fa2.flash_attn_with_kvcache(*args, **{"cache_seqlens": ints(3, 5), **options})
        assert torch.equal(k_cache.nan_to_num(), kept.nan_to_num())

    given = q, k_cache, v_cache
    wrong("k and v come together", *given, k, error=TypeError)
    wrong(
        "cache_seqlens must say where k and v are appended", *given, k, v, cache_seqlens=None, error=TypeError
    )
    wrong("cache_seqlens must lie within 0 and 8, got 9", *given, cache_seqlens=9)
    wrong("cache_seqlens must lie within 0 and 8, got -1", *given, cache_seqlens=ints(-1, 3))
    wrong(r"cache_seqlens must have shape \(2,\), got \(3,\)", *given, cache_seqlens=ints(1, 2, 3))
    wrong("cache_seqlens must be int32", *given, cache_seqlens=torch.ones(2), error=TypeError)
    wrong("cache_batch_idx must lie within 0 and 1, got 2", *given, cache_batch_idx=ints(0, 2))
    wrong("cache_leftpad must lie between 0 and cache_seqlens", *given, cache_leftpad=ints(4, 0))
    wrong(r"k must have shape \(2, new, 2, 20\)", *given, k[:1], v[:1])
    wrong("q and k must have one dtype", *given, k.half(), v.half(), error=TypeError)
    wrong("k_cache has 1 sequences, q 2", q, k_cache[:1], v_cache[:1])
    strided = torch.stack([k_cache] * 2, -1).flatten(-2)[..., ::2]
    wrong("k_cache must have a contiguous last dimension", q, strided, v_cache)
    wrong(r"alibi_slopes must have shape \(4,\) or \(2, 4\)", *given, alibi_slopes=torch.ones(2))
    wrong("k_cache is on meta", q, k_cache.to("meta"), v_cache)
    with pytest.raises(TypeError, match="cu_seqlens_k_new says how k is packed"):
        fa3.flash_attn_with_kvcache(*given, cache_seqlens=3, cu_seqlens_k_new=ints(0, 1, 2))
    with pytest.raises(NotImplementedError, match="qv must be None: attention with a second query"):
        fa3.flash_attn_with_kvcache(*given, qv=q)
    with pytest.raises(NotImplementedError, match="k_descale must be None: 8-bit floats"):
        fa3.flash_attn_with_kvcache(*given, k_descale=torch.ones(1))


def test_no_gradient_and_none_needed():
    k_cache, v_cache = cache([3, 5], 8)
    q, k, v = (x.requires_grad_() for x in tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2))
    out = fa2.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=ints(3, 5))
    assert not out.requires_grad
    assert not k_cache.requires_grad


def test_steps_reproduce_a_whole_sequence():
    """Token by token over a cache, the bits of one causal call; also from pages."""
    q, k, v = tensors((1, 12, HEADS, DIM), *[(1, 12, KV_HEADS, DIM)] * 2)
    whole = fa2.flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = cache([0], 12)
    k_pages, v_pages, table, _ = in_pages([0], 12, 5)
    for t in range(12):
        now = slice(t, t + 1)
        step = q[:, now], k[:, now], v[:, now]
        for got in (
            fa2.flash_attn_with_kvcache(step[0], k_cache, v_cache, *step[1:], cache_seqlens=t),
            fa2.flash_attn_with_kvcache(
                step[0], k_pages, v_pages, *step[1:], cache_seqlens=t, block_table=table
            ),
        ):
            assert torch.equal(got, whole[:, now])


def test_a_default_device_elsewhere_changes_nothing(monkeypatch):
    """Index tensors that these functions make for themselves are on the CPU, as their arguments are."""

    def at_home(*args, **options):
        with torch.device("cpu"):
            return tf.attention(*args, **options)

    monkeypatch.setattr(calls_of, "attention", at_home)
    q, k, v = tensors((2, 2, HEADS, DIM), *[(2, 2, KV_HEADS, DIM)] * 2)
    slopes, sizes, angles = torch.ones(HEADS), ints(0, 2, 4), torch.ones(8, 8)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    k_pages, v_pages, table, _ = in_pages([3, 1], 4, 2)
    k_cache, v_cache = cache([3, 1], 8)

    def calls():
        more = {"alibi_slopes": slopes, "causal": True, "return_attn_probs": True}
        yield fa2.flash_attn_varlen_func(*rows, sizes, sizes, 2, 2, **more)
        more = {"cache_seqlens": ints_, "causal": True, "return_softmax_lse": True}
        yield fa2.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, angles, angles, **more, alibi_slopes=slopes
        )
        yield fa3.flash_attn_with_kvcache(q, k_pages, v_pages, k, v, page_table=table, **more)
        yield fa3.flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True)
        yield fa3.flash_attn_varlen_func(q, k, v, None, None, 2, 2, ints_, ints_, return_attn_probs=True)

    ints_ = ints(1, 1)
    expected = list(calls())
    with torch.device("meta"):
        got = list(calls())
    for some, others in zip(got, expected, strict=True):
        for x, y in zip(some, others, strict=True):
            assert x.device.type == "cpu"
            assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_signature_of_version_3():
    parameters = inspect.signature(fa3.flash_attn_with_kvcache).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    )


MEASURE = """
import sys, torch
from tilefold.drop_in.flash_attn import flash_attn_with_kvcache

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

form, rows, length = sys.argv[1], 2**20, 1000
k_cache, v_cache = (torch.empty(4, rows, 2, 64) for _ in "kv")  # memory that nothing has touched yet
more = {"cache_seqlens": torch.tensor([length, 7, 0, length], dtype=torch.int32)}
if form == "pages":
    k_cache, v_cache = (x.view(-1, 256, 2, 64) for x in (k_cache, v_cache))
    more["block_table"] = torch.arange(4 * 8, dtype=torch.int32).view(4, 8) * 500
if form == "index":
    more["cache_batch_idx"] = torch.tensor([3, 0, 2, 1], dtype=torch.int32)
if form == "leftpad":
    more["cache_leftpad"] = torch.tensor([5, 7, 0, 0], dtype=torch.int32)
q, k, v = torch.randn(4, 3, 8, 64), *torch.randn(2, 4, 3, 2, 64)
flash_attn_with_kvcache(q, k[:, :1].repeat(1, 8, 1, 1), v[:, :1].repeat(1, 8, 1, 1))  # what a first call loads
before = peak()
if form == "packed":
    import tilefold.drop_in.flash_attn.fa3 as fa3
    ends = torch.arange(5, dtype=torch.int32) * 3
    k_cache, v_cache = (x.view(-1, 256, 2, 64) for x in (k_cache, v_cache))
    more["page_table"] = torch.arange(4 * 8, dtype=torch.int32).view(4, 8) * 500
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    fa3.flash_attn_with_kvcache(rows[0], k_cache, v_cache, *rows[1:], **more, causal=True, cu_seqlens_q=ends,
                                cu_seqlens_k_new=ends)
else:
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **more, causal=True)
print(peak() - before, 2 * k_cache.nbytes, 4 * (length + 3) * 2 * 2 * 64 * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from /proc")
@pytest.mark.parametrize("form", ["plain", "pages", "packed", "index", "leftpad"])
def test_only_rows_in_use_take_memory(form):
    """A cache of 4 GiB, of which about 4 MiB are in use: those are touched, and copied once where they lie apart."""
    ran = subprocess.run([sys.executable, "-c", MEASURE, form], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    grown, whole, used = map(int, ran.stdout.split())
    indices = 8 * 8 * 4 * 1003  # what says where rows are, as 64-bit numbers
    buffers = 2**22  # workspace, results, allocators
    assert grown < 2 * used + indices + buffers < whole / 100
