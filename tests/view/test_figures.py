"""Figures have the size that was asked for and hold the numbers; colours are even; files give back what they got."""

import re
import struct
import sys

import numpy as np
import pytest

import tilefold as tf
from tilefold.probes import Seen, Statistic
from tilefold.view import colours, load, page, picture, save, statistics
from tilefold.view.notebook import _image, _png

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def drawn(*shape, seed=0):
    """Queries and keys."""
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def seen():
    q, k = drawn(4, 70, 8)
    return tf.probe(q, k, *statistics(70, 70, top=3), causal=True)


def size_of(path):
    """Width and height that a PNG's header says."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def pixels(path):
    from matplotlib import image

    return image.imread(path)[..., :3]


@pytest.mark.parametrize("width", [3, 6.5])
def test_a_head_is_drawn_as_wide_as_asked(seen, tmp_path, width):
    path = picture(seen, tmp_path / "head.png", head=2, width=width)
    assert size_of(path) == (200 * width, 200 * width)


def test_heads_and_layers_are_drawn_as_wide_as_asked(seen, tmp_path):
    assert size_of(picture(seen, tmp_path / "heads.png", width=5))[0] == 1000
    assert size_of(picture({"a": seen, "b": seen}, tmp_path / "all.png", width=4))[0] == 800


def test_the_map_has_its_colours(seen, tmp_path):
    """One weight of 1 among weights of 0: dark where the cell is, white all around."""
    one = np.zeros((1, 4, 4))
    one[0, 3, 0] = 1
    found = pixels(picture(Seen(map_4=one), tmp_path / "one.png", head=0))
    above = found[: found.shape[0] * 3 // 4]  # of the legend
    dark = np.array([int(colours.ramp()[-1][i : i + 2], 16) for i in (1, 3, 5)]) / 255
    rows, cols = np.nonzero(np.abs(above - dark).max(axis=-1) < 0.01)
    height, width = np.ptp(rows) + 1, np.ptp(cols) + 1
    assert rows.size == height * width > 10_000, "a rectangle without a gap"
    assert cols.min() < above.shape[1] / 4 and rows.max() > above.shape[0] * 0.9
    assert (above[: rows.min() - 20, cols.min() + 20 : cols.max() - 20].min(axis=-1) > 0.7).all()


def test_svg_has_words_and_a_fixed_text(seen, tmp_path):
    words = [f"t{i}" for i in range(70)]
    first = picture(seen, tmp_path / "a.svg", head=1, tokens=words, title="A $title$ of <mine>").read_text()
    again = picture(seen, tmp_path / "b.svg", head=1, tokens=words, title="A $title$ of <mine>").read_text()
    assert first == again
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', first).groups()
    assert float(width) == float(height) == 6.5 * 72
    for word in ("query", "key mass", "entropy, nats"):
        assert f">{word}<" in first


def test_tokens_stand_along_a_small_map(tmp_path):
    q, k = drawn(1, 6, 4)
    one = tf.probe(q, k, *statistics(6, 6, top=2), causal=True)
    words = ["a", "$5", "c_1", "x^2", "e$f$", "g"]
    text = picture(one, tmp_path / "a.svg", tokens=words).read_text()
    for word in words:
        assert text.count(f">{word}<") == 2, word


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"path": "a.gif"}, "path must end in .png, .svg or .pdf, got '"),
        ({"head": 4}, "there is no head 4; there are 4, counted from 0"),
        ({"sequence": 1}, "there is no sequence 1; there are 1, counted from 0"),
        ({"layer": "x"}, "there is no layer 'x'; there are ''"),
        ({"width": 0}, "width must be 1 to 100 inches, got 0"),
        ({"tokens": ["a"]}, "tokens are 1, keys are 70: give one token per key"),
        ({"path": "none/a.png"}, "there is no folder"),
        ({"kv_lengths": [71]}, "kv_lengths must be 0 to 70, got [71]"),
        ({"q_lengths": [1, 2]}, "q_lengths must be integers, one for each of 1 sequences, got [1, 2]"),
    ],
)
def test_a_wrong_question_gets_a_sentence(seen, tmp_path, asked, says):
    asked = {"path": "a.png"} | asked
    with pytest.raises(ValueError, match=re.escape(says)):
        picture(seen, tmp_path / asked.pop("path"), **asked)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(
        TypeError, match=r"give a Seen, as tilefold.probe returns it, or a mapping .*; got list"
    ):
        page([1])
    with pytest.raises(TypeError, match="layer 'a' holds a int"):
        page({"a": 1})
    with pytest.raises(ValueError, match="seen holds no statistic that can be shown; it is empty"):
        page(Seen())
    with pytest.raises(ValueError, match="rows is not shown: no statistic of a page begins with that name"):
        page(Seen(rows=np.zeros((1, 2, 3))))
    with pytest.raises(
        ValueError, match=r"statistics are of \[3\] queries and \[\] keys|of \[2, 3\] queries"
    ):
        page(Seen(entropy=np.zeros((1, 2)), max_weight=np.zeros((1, 3))))
    with pytest.raises(ValueError, match=r"has leading axes \(2, 4\), others have \(4,\)|leading axes"):
        page(Seen(entropy=np.zeros((4, 9)), map_2=np.zeros((2, 4, 2, 2))))
    with pytest.raises(ValueError, match=r"there is no head to show, its leading axes are \(0, 4\)"):
        page(Seen(entropy=np.zeros((0, 4, 9))))
    with pytest.raises(TypeError, match="tokens must be a list of strings, one per key, got str"):
        page(Seen(entropy=np.zeros((1, 2))), tokens="ab")


def test_a_page_has_its_limit(seen):
    """The finest maps go first; what is left out is named."""
    pytest.importorskip("plotly", reason="plotly is not installed")
    whole, small = page(seen), page(seen, limit=4 * 4 * 70 * 70)
    assert "Maps of 70 × 70 were left out" in small and "left out" not in whole
    assert '"rows":64,"cols":64' in small and '"rows":70' not in small
    with pytest.raises(
        ValueError, match="the page would hold 0 MiB of numbers, the limit is 0 MiB: show fewer"
    ):
        page(seen, limit=100)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 500), (63, 65), (64, 64), (300, 70), (5000, 5000)])
def test_maps_get_finer_in_whole_bins(sizes):
    """Bins of one level are whole bins of the next, but where that is of single cells; the last is, if it can be."""
    maps = [s for s in statistics(*sizes) if s.name.startswith("map")]
    assert all(isinstance(s, Statistic) for s in maps)
    sides = [(tap.rows, tap.cols) for s in maps for tap in s.taps]
    assert sides == sorted(sides) and len(set(sides)) == len(sides)
    assert sides[-1] == tuple(min(n, 1024) for n in sizes)
    for (r, c), (fine_r, fine_c) in zip(sides, sides[1:-1], strict=False):
        assert fine_r % r == 0 or fine_r == sizes[0]
        assert fine_c % c == 0 or fine_c == sizes[1]


def test_one_sweep_fills_all_maps(seen):
    """Maps of single cells, added up, are the coarser ones."""
    fine = seen.map_70.astype(np.float64)
    ends = np.arange(65) * 70 // 64
    sums = np.add.reduceat(np.add.reduceat(fine, ends[:-1], axis=1), ends[:-1], axis=2)
    cells = np.diff(ends)[:, None] * np.diff(ends)
    assert np.allclose(seen.map_64, sums / cells, rtol=1e-5, atol=1e-8)


def test_colours_are_even_and_read_in_grey():
    lab = colours._even()
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() / steps.min() < 1.01
    assert (np.diff(lab[:, 0]) < 0).all()
    exact = colours.to_srgb(lab)
    assert exact.min() >= 0 and exact.max() <= 1, "none was clipped"


def test_colours_stay_apart_for_any_vision():
    """For protanopia, deuteranopia and tritanopia (Machado et al. 2009, severity 1) each step is still a step down in
    lightness, so that no two colours become one."""
    simulated = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }  # fmt: skip
    srgb = colours.to_srgb(colours._even())
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for name, matrix in simulated.items():
        luminance = np.clip(linear @ np.array(matrix).T, 0, 1) @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(luminance[::4]) < 0).all(), name


def test_a_file_gives_back_what_was_saved(tmp_path):
    q, k = drawn(2, 3, 40, 8)
    what = (*statistics(40, 40), tf.mass_in(first=slice(0, 4), near=tf.window(3, 0)))
    one = tf.probe(q, k, *what, causal=True)
    again = load(one.save(tmp_path / "one.npz"))
    assert repr(again) == repr(one)
    assert np.array_equal(again.mass_in.near, one.mass_in.near)
    assert np.array_equal(again.topk.keys, one.topk.keys)
    many = load(save({"layers.0/self": one, "b": [one, one]}, tmp_path / "many.npz"))
    assert list(many) == ["layers.0/self", "b [0]", "b [1]"]
    assert np.array_equal(many["b [1]"].entropy, one.entropy)


def test_a_wrong_file_is_refused(tmp_path, seen):
    with pytest.raises(ValueError, match=r"path must end in \.npz"):
        seen.save(tmp_path / "a.npy")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"bad\.npz: is no .npz of statistics"):
        load(tmp_path / "bad.npz")


def test_a_statistic_takes_no_method_away():
    with pytest.raises(ValueError, match="the name 'view' is taken by a method of Seen"):
        tf.entropy().named("view")


def test_a_notebook_gets_kilobytes(seen):
    text = seen._repr_html_()
    assert len(text) < 50_000
    assert text.count("<img") == 4 and text.count("alt=") == 4
    assert f"{seen.entropy[2].astype(np.float64).mean():.4g}" in text
    assert "<script" not in text
    assert Seen(mine=3)._repr_html_() is None


def test_the_pictures_of_a_notebook_are_their_maps(seen, tmp_path):
    from matplotlib import image

    (tmp_path / "map.png").write_bytes(_png(_image(seen.map_64[0])))
    found = image.imread(tmp_path / "map.png")
    assert found.shape == (64, 64, 4)
    assert np.array_equal(found[..., 3] > 0, seen.map_64[0] > 0)
    grey = found[..., :3].mean(axis=-1)
    shown = seen.map_64[0] > seen.map_64[0].max() * 1e-3
    order = np.argsort(seen.map_64[0][shown])
    assert (np.diff(grey[shown][order]) <= 1e-6).all(), "more weight is darker"


@pytest.mark.parametrize(("name", "does"), [("plotly.offline", page), ("matplotlib", picture)])
def test_a_missing_package_is_named(seen, tmp_path, monkeypatch, name, does):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"which is not installed: pip install 'tilefold\[view\]'"):
        does(seen) if does is page else does(seen, tmp_path / "a.png")
