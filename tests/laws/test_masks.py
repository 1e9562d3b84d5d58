"""Masks against their definitions cell by cell, their algebra, slicing; panels and tiles that never lose a cell."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tilefold as tf
from tilefold.layouts import Frame
from tilefold.masks import MAX_SPANS, Panel, split
from tilefold.tiles import FULL, tiles

Q, K = 13, 21
ENDS = [0, 4, 4, 11, K]
IDS = np.array([3, 3, 1, 1, 1, 3, 3, 3, 2, 2, 2, 2, 7, 7, 7, 7, 7, 1, 1, 0, 0])
CELLS = np.random.default_rng(5).random((Q, K)) < 0.5
PARENTS = np.array([-1, 0, 0, 1, 1, 2, -1, 6, 3, 8, 9, 7, 0])
LINEAGE = np.eye(Q, dtype=bool)  # whether query j is query i or an ancestor of it
for child, parent in enumerate(PARENTS):
    if parent >= 0:
        LINEAGE[child] |= LINEAGE[parent]
document = np.searchsorted(ENDS, np.arange(K), side="right") - 1

# each mask with what it means: i is the query row, p = i + K - Q its position, j the key
MEANINGS = {
    "causal": (tf.causal(), lambda i, p, j: j <= p),
    "causal top-left": (tf.causal(align="top-left"), lambda i, p, j: j <= i),
    "window": (tf.window(3, 1), lambda i, p, j: (j >= p - 3) & (j <= p + 1)),
    "window open left": (tf.window(None, 2), lambda i, p, j: j <= p + 2),
    "window self": (tf.window(0, 0), lambda i, p, j: j == p),
    "band": (tf.band(2, -1, 5), lambda i, p, j: (j >= i + 5 - 2) & (j <= i + 5 - 1)),
    "empty band": (tf.band(-3, 1, 0), lambda i, p, j: (j >= i + 3) & (j <= i + 1)),
    "prefix": (tf.prefix(6), lambda i, p, j: (j < 6) & (i >= 0)),
    "prefix beyond": (tf.prefix(99), lambda i, p, j: (j < 99) & (i >= 0)),
    "spans": (
        tf.spans(np.arange(Q) // 2, np.arange(Q) // 2 + 5),
        lambda i, p, j: (j >= i // 2) & (j < i // 2 + 5),
    ),
    "chunked": (tf.chunked(4), lambda i, p, j: p // 4 == j // 4),
    "lengths": (tf.lengths(9, q_lengths=5), lambda i, p, j: (j < 9) & (i < 5)),
    "anchors": (tf.anchors(2, 3), lambda i, p, j: (j <= p) & ((j < 2) | (j >= p - 3))),
    "documents": (tf.documents(cu_seqlens=ENDS), lambda i, p, j: document[p] == document[j]),
    "documents in pieces": (tf.documents(IDS), lambda i, p, j: IDS[p] == IDS[j]),
    "documents q_ids": (tf.documents(IDS, q_ids=IDS[:Q]), lambda i, p, j: IDS[i] == IDS[j]),
    "tree": (tf.tree(PARENTS), lambda i, p, j: (j < K - Q) | LINEAGE[i, j - (K - Q)]),
    "dense": (tf.dense(CELLS), lambda i, p, j: CELLS[i, j]),
    "dense column": (tf.dense(CELLS[:, :1]), lambda i, p, j: CELLS[i, 0] & (j >= 0)),
    "predicate": (tf.from_predicate(lambda i, j: (i * j) % 3 == 1), lambda i, p, j: (i * j) % 3 == 1),
}


def meaning(name: str) -> np.ndarray:
    i, j = np.arange(Q)[:, None], np.arange(K)[None]
    return MEANINGS[name][1](i, i + K - Q, j) & np.ones((Q, K), bool)


@pytest.mark.parametrize("name", MEANINGS)
def test_each_mask_is_its_definition(name):
    assert np.array_equal(MEANINGS[name][0].dense(Q, K), meaning(name))


names = st.sampled_from(list(MEANINGS))


@given(names, names, names)
def test_algebra_is_that_of_booleans(a, b, c):
    (x, y, z), (p, q, r) = (MEANINGS[n][0] for n in (a, b, c)), (meaning(n) for n in (a, b, c))
    assert np.array_equal((~x).dense(Q, K), ~p)
    assert np.array_equal((x & y).dense(Q, K), p & q)
    assert np.array_equal((x | y).dense(Q, K), p | q)
    assert np.array_equal(((x | ~y) & z).dense(Q, K), (p | ~q) & r)
    assert np.array_equal((~(x & y) | z).dense(Q, K), ~(p & q) | r)


@given(names, st.data())
def test_a_slice_is_a_slice_of_the_whole(name, data):
    i0, i1 = sorted(data.draw(st.tuples(st.integers(0, Q), st.integers(0, Q))))
    j0, j1 = sorted(data.draw(st.tuples(st.integers(0, K), st.integers(0, K))))
    part = MEANINGS[name][0].bind(Q, K)[i0:i1, j0:j1]
    assert np.array_equal(part.dense(i1 - i0, j1 - j0), meaning(name)[i0:i1, j0:j1])
    again = part[: (i1 - i0) // 2, (j1 - j0) // 2 :]
    expected = meaning(name)[i0:i1, j0:j1][: (i1 - i0) // 2, (j1 - j0) // 2 :]
    assert np.array_equal(again.dense(*expected.shape), expected)


@given(names, names, st.integers(1, 9), st.data())
def test_tiles_cover_every_visible_cell_once(a, b, block_k, data):
    mask, expected = MEANINGS[a][0] | MEANINGS[b][0], meaning(a) | meaning(b)
    i0, i1 = sorted(data.draw(st.tuples(st.integers(0, Q), st.integers(0, Q))))
    panel = mask.panel(Frame.whole(Q, K), slice(i0, i1), slice(0, K))
    found = np.zeros((i1 - i0, K), int)
    for tile in tiles(panel, block_k):
        cells = panel.cells(tile.k0, tile.k1)
        found[:, tile.k0 : tile.k1] += cells
        assert tile.k0 // block_k == (tile.k1 - 1) // block_k
        assert cells[:, tile.full0 - tile.k0 : tile.full1 - tile.k0].all()
        if tile.kind is FULL:
            assert cells.all()
    assert np.array_equal(found, expected[i0:i1])
    assert np.array_equal(panel.visible(), expected[i0:i1].sum(axis=1))


@given(names, names)
def test_split_takes_out_the_affine_part_and_nothing_else(a, b):
    mask = MEANINGS[a][0] & tf.causal() & MEANINGS[b][0]
    band, rest = split(mask, K - Q)
    assert band.right is not None and band.right <= 0
    whole = tf.band(*band) if rest is None else tf.band(*band) & rest
    assert np.array_equal(whole.dense(Q, K), mask.dense(Q, K))


@given(st.data(), st.integers(1, 60), st.integers(0, 40))
def test_a_tree_is_its_lineage(data, q_len, before):
    """Whether rows become spans or bits, and whatever part of the keys is asked for."""
    parents = [data.draw(st.integers(max(-1, i - 40), i - 1)) for i in range(q_len)]
    expected = np.ones((q_len, before + q_len), bool)
    for i, parent in enumerate(parents):
        expected[i, before:] = expected[parent, before:] if parent >= 0 else False
        expected[i, before + i] = True
    mask, frame = tf.tree(parents), Frame.whole(q_len, before + q_len)
    assert np.array_equal(mask.dense(q_len, before + q_len), expected)
    i0, i1 = sorted(data.draw(st.tuples(st.integers(0, q_len), st.integers(0, q_len))))
    j0, j1 = sorted(data.draw(st.tuples(*[st.integers(0, before + q_len)] * 2)))
    panel = mask.panel(frame, slice(i0, i1), slice(j0, j1))
    assert np.array_equal(panel.cells(j0, j1), expected[i0:i1, j0:j1])


def test_a_chain_is_causal_and_one_span():
    panel = tf.tree(np.arange(9) - 1).panel(Frame.whole(9, 30), slice(0, 9), slice(0, 30))
    assert panel.lo.shape == (9, 1) and panel.bits is None
    assert np.array_equal(panel.cells(0, 30), tf.causal().dense(9, 30))


def test_trees_of_sequences():
    """One for each of a batch, or packed: then parents count within their own sequence."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, n, 8)) for n in (4, 11, 11))
    parents = [[-1, 0, 0, 1], [-1, -1, 1, 1]]
    alone = [tf.attention(q[n], k[n], v[n], tf.tree(parents[n])) for n in range(2)]
    np.testing.assert_array_equal(tf.attention(q, k, v, tf.tree(parents)), alone)
    packed = [np.concatenate(list(x), axis=1) for x in (q, k, v)]
    ends = {"cu_seqlens_q": np.array([0, 4, 8]), "cu_seqlens_k": np.array([0, 11, 22])}
    out = tf.attention(*packed, tf.tree(np.concatenate(parents)), **ends)
    np.testing.assert_array_equal(out, np.concatenate(alone, axis=1))
    with pytest.raises(ValueError, match="tree: parents of packed sequences count within their own"):
        tf.attention(*packed, tf.tree([-1, 0, 0, 1, -1, -1, 5, 5]), **ends)
    with pytest.raises(ValueError, match=r"tree: parents must have shape \(4,\) or \(2, 4\), .* got \(3,\)"):
        tf.attention(q, k, v, tf.tree([-1, 0, 1]))


@pytest.mark.parametrize("runs", [1, MAX_SPANS, MAX_SPANS + 1, 60])
@pytest.mark.parametrize("keys", [130, 5000])
def test_dense_rows_become_spans_if_few_else_bits(runs, keys):
    cells = np.zeros((3, keys), bool)
    cells[1, np.arange(runs) * 2 + 1] = True
    cells[2, -1] = True
    panel = tf.dense(cells).panel(Frame.whole(3, keys), slice(0, 3), slice(0, keys))
    assert (panel.bits is None) == (runs <= MAX_SPANS)
    assert np.array_equal(panel.cells(0, keys), cells)
    assert np.array_equal(panel.cells(3, keys - 2), cells[:, 3 : keys - 2])
    assert np.array_equal((~panel).cells(0, keys), ~cells)


def test_panels_of_nothing():
    panel = Panel.nothing(4, 0, 10)
    assert not panel.cells(0, 10).any() and (~panel).full
    assert Panel.everything(4, 0, 10).full
    assert not list(tiles(panel, 4))


def test_an_empty_tile_is_never_scored(monkeypatch):
    """Causal attention computes about half the tiles, a window only those near the diagonal; here on NumPy."""
    from tilefold.backends.numpy import NumpyBackend
    from tilefold.scores import Scores

    cells = []
    scored = Scores.tile
    monkeypatch.setattr(
        Scores,
        "tile",
        lambda self, tile, keep=None: (
            cells.append((tile.k1 - tile.k0) * self.block.count) or scored(self, tile, keep)
        ),
    )
    q = np.zeros((1, 2048, 4), np.float32)
    plan = tf.explain(q, q, q, causal=True, backend="numpy").plan
    tf.attention(q, q, q, causal=True, plan=NumpyBackend().resize(plan, 64, 64))
    assert sum(cells) == 64 * 64 * (32 * 33 // 2)
    cells.clear()
    tf.attention(q, q, q, window=(63, 0), mask=tf.dense(np.ones((1, 1), bool)), backend="numpy")
    assert sum(cells) < 2048 * 2048 / 2
