"""The monoid's laws, on any split of any scores: empty is neutral to the bit, merge associates, any order will do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilefold import OnlineStats, merge

ROWS, V = 3, 2
NEG = -np.inf
scores = st.integers(0, 6).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, (ROWS, n), elements=st.one_of(st.floats(-40, 40), st.just(NEG))),
        arrays(np.float64, (n, V), elements=st.floats(-5, 5)),
    )
)


def empty() -> OnlineStats:
    return OnlineStats.init((ROWS,), V)


def folded(tile: tuple[np.ndarray, np.ndarray]) -> OnlineStats:
    return empty().update(*tile)


def same_bits(a: OnlineStats, b: OnlineStats) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("max_val", "sum_exp", "output"))


def close(a: OnlineStats, b: OnlineStats) -> None:
    for x, y in zip(a.finalize(), b.finalize(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@given(scores)
def test_empty_is_neutral_to_the_bit(tile):
    s = folded(tile)
    assert same_bits(empty().merge(s), s)
    assert same_bits(s.merge(empty()), s)


def test_empty_with_empty_is_empty():
    assert same_bits(empty().merge(empty()), empty())
    out, lse = empty().merge(empty()).finalize()
    assert (out == 0).all() and np.isneginf(lse).all()


@given(scores, scores, scores)
def test_merge_associates(a, b, c):
    x, y, z = folded(a), folded(b), folded(c)
    close(x.merge(y).merge(z), x.merge(y.merge(z)))


@given(st.lists(scores, min_size=1, max_size=5), st.randoms())
def test_any_order_and_any_split_is_the_whole(tiles, random):
    whole = folded((np.hstack([s for s, _ in tiles]), np.vstack([v for _, v in tiles])))
    random.shuffle(tiles)
    merged, updated = empty(), empty()
    for tile in tiles:
        merged = merged.merge(folded(tile))
        updated.update(*tile)
    close(merged, whole)
    close(updated, whole)


@given(scores, scores)
def test_out_and_lse_are_a_closed_form(a, b):
    with np.errstate(all="ignore"):
        closed = [OnlineStats.closed(*folded(tile).finalize()) for tile in (a, b)]
    close(closed[0].merge(closed[1]), folded(a).merge(folded(b)))
    out, lse = merge(*(folded(tile).finalize() for tile in (a, b)))
    np.testing.assert_allclose(out, folded(a).merge(folded(b)).finalize()[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, folded(a).merge(folded(b)).finalize()[1], rtol=1e-12, atol=1e-12)


@given(scores)
def test_the_state_is_what_it_says(tile):
    s, v = tile
    with np.errstate(all="ignore"):
        p = np.where(np.isneginf(s), 0, np.exp(s))
    out, lse = folded(tile).finalize()
    live = p.sum(axis=1) > 0
    np.testing.assert_allclose(np.exp(lse), p.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(out[live], (p @ v)[live] / p.sum(axis=1)[live, None], rtol=1e-9, atol=1e-12)
    assert (out[~live] == 0).all()


def test_sinks_seed_rows_that_saw_one_key_without_value():
    s, v = np.array([[0.5, -1.0]]), np.array([[1.0], [2.0]])
    out, lse = OnlineStats.init((1,), 1, sinks=np.array([0.25])).update(s, v).finalize()
    total = np.exp(0.5) + np.exp(-1.0) + np.exp(0.25)
    np.testing.assert_allclose(out, [[(np.exp(0.5) + 2 * np.exp(-1.0)) / total]], rtol=1e-15)
    np.testing.assert_allclose(lse, [np.log(total)], rtol=1e-15)


def test_update_keeps_its_inputs_unless_given_a_buffer():
    s, v = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    before = s.copy()
    OnlineStats.init((2,), 2).update(s, v)
    assert (s == before).all()
    OnlineStats.init((2,), 2).update(s, v, work=np.empty((2, 2)))
    assert not (s == before).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_nan_behind_the_mask_stays_there(dtype):
    s = np.array([[0.0, NEG], [NEG, 0.0]], dtype)
    v = np.array([[1.0], [np.nan]], dtype)
    out, _ = OnlineStats.init((2,), 1, dtype).update(s, v, seen=~np.isneginf(s)).finalize()
    assert out[0, 0] == 1
    assert np.isnan(out[1, 0])


def test_a_live_nan_survives_merge():
    """A state that saw a NaN keeps it, however small its weight; only a state that saw nothing is neutral."""
    bad = OnlineStats(np.array([-1000.0]), np.array([1.0]), np.array([[np.nan]]))
    good = OnlineStats(np.array([0.0]), np.array([1.0]), np.array([[2.0]]))
    assert np.isnan(bad.merge(good).finalize()[0]).all()
    nothing = OnlineStats(np.array([NEG]), np.array([0.0]), np.array([[np.nan]]))
    assert nothing.merge(good).finalize()[0] == 2
