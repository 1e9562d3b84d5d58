"""Files of caches: what was written comes back, and of what was not, nothing is believed.

A snapshot is cut off at every byte, changed in every byte, and killed at each stage of being written.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from bits import assert_same_bits

import tilefold as tf
from tilefold.caches import snapshot
from tilefold.dtypes import ROWS

HEADS, DIM, V_DIM = 2, 4, 3


def numpy_type(name):
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes").bfloat16)
    return np.dtype(name)


def rows(batch, length, dtype=np.float32, seed=0):
    rng = np.random.default_rng([batch, length, seed])
    shapes = (batch, HEADS, length, DIM), (batch, HEADS, length, V_DIM)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def contiguous(dtype=np.float32, capacity=None, **settings):
    cache = tf.KVCache(3, HEADS, DIM, V_DIM, capacity=capacity, dtype=dtype, **settings)
    cache.append(*rows(3, 9, dtype), [9, 0, 4])
    return cache


def paged(dtype=np.float32, **settings):
    """Sequences 0 to 3 of which one is gone, one is a fork and one is empty."""
    cache = tf.PagedKVCache(HEADS, DIM, V_DIM, page=4, dtype=dtype, **settings)
    gone, a = cache.open(), cache.open()
    cache.append([gone, a], *rows(2, 11, dtype))
    cache.append(cache.fork(a), *rows(1, 2, dtype))
    cache.append(a, *rows(1, 1, dtype, seed=1))
    cache.open()
    cache.free(gone)
    return cache


def whole(cache):
    """All sequences of a cache."""
    return cache if isinstance(cache, tf.KVCache) else cache[cache.ids]


def state(cache):
    """Everything that a paged cache says of itself; pages are numbered as they first occur."""
    stored = cache[cache.ids].stored()
    number = {-1: -1}
    shared = [number.setdefault(page, len(number)) for page in stored.table.ravel().tolist()]
    return cache.ids, stored.lengths.tolist(), str(stored.first), stored.kept, shared, cache.pages_used


# ---- what comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("name", list(ROWS))
def test_one_stretch_comes_back(tmp_path, name, capacity):
    cache = contiguous(numpy_type(name), capacity)
    cache.snapshot(tmp_path / "cache")
    again = tf.KVCache.restore(tmp_path / "cache")
    q = np.ones((3, HEADS, 2, DIM), numpy_type(name))
    assert_same_bits(tf.attention(q, again, causal=True), tf.attention(q, cache, causal=True))
    assert again.lengths.tolist() == [9, 0, 4]
    if capacity is not None:
        assert again.capacity == 20
        with pytest.raises(tf.CacheFull):
            again.append(*rows(3, 12, numpy_type(name)))
    again.append(*rows(3, 2, numpy_type(name)))


@pytest.mark.parametrize("settings", [{}, {"pages": 30}, {"window": 5}, {"window": 5, "anchors": 3}], ids=str)
@pytest.mark.parametrize("name", list(ROWS))
def test_pages_come_back(tmp_path, name, settings):
    dtype = numpy_type(name)
    cache = paged(dtype, **settings)
    cache.snapshot(tmp_path / "cache")
    again = tf.PagedKVCache.restore(tmp_path / "cache")
    assert state(again) == state(cache)
    options = {"mask": tf.anchors(settings.get("anchors", 0), 4)}
    q = np.ones((3, HEADS, 1, DIM), dtype)
    for _ in range(3):
        right = tf.attention(q, cache[cache.ids], **options)
        assert_same_bits(tf.attention(q, again[again.ids], **options), right)
        for one in (cache, again):
            one.append(one.ids, *rows(3, 3, dtype))
    assert state(again) == state(cache)
    assert again.open() == cache.open()
    for one in (cache, again):
        one.free(one.ids)
    assert again.pages_used == cache.pages_used == 0
    if "pages" in settings:
        assert again.pages_free == 30


@pytest.mark.parametrize("group", [None, 1])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_codes_come_back(tmp_path, name, kind, group):
    """Codes and scales as they were, and what is appended afterwards becomes what it would have become."""
    pytest.importorskip("ml_dtypes", reason="float8_e4m3fn needs ml_dtypes")
    dtype, way = numpy_type(name), {"quantised": kind, "group": group}
    for cache, batch in (
        (contiguous(dtype, **way), 3),
        (paged(dtype, window=5, anchors=3, pages=12, **way), 3),
    ):
        cache.snapshot(tmp_path / "cache")
        again = type(cache).restore(tmp_path / "cache")
        options = {"mask": tf.anchors(3, 4)}
        q = np.ones((batch, HEADS, 1, DIM), dtype)
        for _ in range(2):
            assert_same_bits(*(tf.attention(q, whole(one), **options) for one in (cache, again)))
            assert repr(again) == repr(cache) and again.k.dtype == cache.k.dtype
            for one in (cache, again):
                ids = [] if isinstance(one, tf.KVCache) else [one.ids]
                one.append(*ids, *rows(batch, 3, dtype))


def test_each_page_in_use_is_written_once(tmp_path):
    cache = tf.PagedKVCache(HEADS, DIM, V_DIM, page=4, pages=10_000)
    a = cache.open()
    cache.append(a, *rows(1, 9))
    for _ in range(5):
        cache.fork(a)
    cache.snapshot(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_size < 9 * HEADS * (DIM + V_DIM) * 4 + 1000
    assert tf.PagedKVCache.restore(tmp_path / "cache").pages_used == 3


def test_rows_of_nobody_are_not_written(tmp_path):
    cache = tf.PagedKVCache(HEADS, DIM, V_DIM, page=4)
    a = cache.open()
    secret = np.full((1, HEADS, 3, DIM), 1234.5, np.float32)
    cache.append(a, secret, secret[..., :V_DIM])
    cache.truncate(a, 1)
    cache.append(a, *rows(1, 1))
    cache.snapshot(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes().count(struct.pack("f", 1234.5)) == HEADS * (DIM + V_DIM)


def test_tensors_come_back_as_such(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    contiguous().snapshot(tmp_path / "one")
    paged().snapshot(tmp_path / "pages")
    like = torch.zeros(1)
    assert isinstance(tf.KVCache.restore(tmp_path / "one", like=like).k, torch.Tensor)
    assert isinstance(tf.PagedKVCache.restore(tmp_path / "pages", like=like).v, torch.Tensor)
    with pytest.raises(TypeError, match=r"like must be float32 as the snapshot .* is, got float64"):
        tf.KVCache.restore(tmp_path / "one", like=like.double())


# ---- what is wrong with a file -------------------------------------------------------------------------------

MADE = {
    "one stretch": (tf.KVCache, contiguous),
    "pages": (tf.PagedKVCache, paged),
    "one stretch of codes": (tf.KVCache, lambda: contiguous(quantised="int8")),
    "pages of codes": (tf.PagedKVCache, lambda: paged(quantised="int8", group=1)),
}
KINDS = pytest.mark.parametrize(("kind", "made"), MADE.values(), ids=MADE)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache"


@KINDS
def test_a_file_that_is_cut_off_anywhere(place, kind, made):
    made().snapshot(place)
    whole = place.read_bytes()
    for size in range(len(whole)):
        place.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cache: is (cut off|damaged or cut off|not a snapshot)"):
            kind.restore(place)


@KINDS
def test_a_file_that_is_changed_anywhere(place, kind, made):
    made().snapshot(place)
    whole = place.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        place.write_bytes(changed)
        with pytest.raises(ValueError, match=r"cache: is (damaged|not a snapshot)"):
            kind.restore(place)


@KINDS
def test_a_file_that_goes_on(place, kind, made):
    made().snapshot(place)
    with place.open("ab") as file:
        file.write(b"xyz")
    with pytest.raises(ValueError, match="is damaged: 3 bytes follow its end"):
        kind.restore(place)


@KINDS
@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00", b"some text that is longer than a header" * 9]
)
def test_a_foreign_file(place, kind, made, content):
    place.write_bytes(content)
    with pytest.raises(ValueError, match="cache: is not a snapshot of a tilefold cache"):
        kind.restore(place)


def test_a_snapshot_of_the_other_kind(place):
    contiguous().snapshot(place)
    with pytest.raises(ValueError, match="is a snapshot of a KVCache, not of a PagedKVCache"):
        tf.PagedKVCache.restore(place)


def test_no_file(place):
    with pytest.raises(FileNotFoundError):
        tf.KVCache.restore(place)


@KINDS
def test_a_later_version(place, kind, made, monkeypatch):
    monkeypatch.setattr(snapshot, "VERSION", 7)
    made().snapshot(place)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="by a later version: its format is 7, this version reads 2"):
        kind.restore(place)


def described(place, change):
    """The file with another description, and the checksum that belongs to it."""
    whole = place.read_bytes()
    start = len(snapshot.MAGIC) + snapshot.FIXED.size
    version, length, size, _ = snapshot.FIXED.unpack(whole[len(snapshot.MAGIC) : start])
    description = json.loads(whole[start : start + length])
    change(description)
    text = json.dumps(description).encode()
    checksum = zlib.crc32(text, zlib.crc32(snapshot.MAGIC + snapshot.FIXED.pack(version, len(text), size, 0)))
    fixed = snapshot.FIXED.pack(version, len(text), size, checksum)
    place.write_bytes(snapshot.MAGIC + fixed + text + whole[start + length :])


@pytest.mark.parametrize(("kind", "made"), list(MADE.values())[:2], ids=list(MADE)[:2])
def test_a_file_of_version_1(place, kind, made, monkeypatch):
    """The format that knew no codes is read as it was."""
    monkeypatch.setattr(snapshot, "VERSION", 1)
    made().snapshot(place)
    described(place, lambda d: [d.pop(name) for name in ("quantised", "group")])
    monkeypatch.undo()
    q = np.ones((3, HEADS, 1, DIM), np.float32)
    assert_same_bits(*(tf.attention(q, whole(one), causal=True) for one in (kind.restore(place), made())))


LIES = {
    "a page that is not there": lambda d: d["sequences"][0][3].__setitem__(0, 99),
    "a page that is no number": lambda d: d["sequences"][0][3].__setitem__(0, "0"),
    "a page too few": lambda d: d["sequences"][0][3].pop(),
    "a page of no sequence": lambda d: d["sequences"].clear(),
    "a page too full": lambda d: d["filled"].__setitem__(0, 5),
    "fewer rows than a sequence has": lambda d: d["filled"].__setitem__(0, 1),
    "an id of the future": lambda d: d.update(next=1),
    "more gone than there was": lambda d: d["sequences"][0].__setitem__(2, 50),
    "a negative length": lambda d: d["sequences"][0].__setitem__(1, -4),
    "a length that is no number": lambda d: d["sequences"][0].__setitem__(1, None),
    "three entries": lambda d: d["sequences"][0].pop(),
    "no list": lambda d: d.update(filled=3),
    "another width": lambda d: d.update(dim=5),
    "no width": lambda d: d.pop("dim"),
    "no type": lambda d: d.update(dtype="int8"),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES)
def test_a_description_that_contradicts_itself(place, change):
    paged().snapshot(place)
    described(place, lambda description: None)
    tf.PagedKVCache.restore(place)  # the checksums are right
    described(place, change)
    with pytest.raises(ValueError, match="its description contradicts itself"):
        tf.PagedKVCache.restore(place)


CODED_LIES = {
    "codes of an unknown type": lambda d: d.update(quantised="int2"),
    "codes of a type that has none": lambda d: d.update(dtype="float64"),
    "codes in halves of a byte": lambda d: d.update(quantised="int4"),
    "other codes": lambda d: d.update(quantised=None),
    "groups that do not divide": lambda d: d.update(group=3),
    "groups of nothing": lambda d: d.update(group=0),
    "no groups": lambda d: d.update(group=None),
}


@pytest.mark.parametrize("change", CODED_LIES.values(), ids=CODED_LIES)
def test_a_description_of_other_codes(place, change):
    paged(quantised="int8", group=1).snapshot(place)
    described(place, lambda description: None)
    tf.PagedKVCache.restore(place)
    described(place, change)
    with pytest.raises(ValueError, match="its description contradicts itself"):
        tf.PagedKVCache.restore(place)


@pytest.mark.parametrize("lengths", [[9, 0], [9, 0, 9], [9, 0, 40]], ids=str)
def test_lengths_that_contradict_the_rest(place, lengths):
    contiguous(capacity=20).snapshot(place)
    described(place, lambda description: description.update(lengths=lengths))
    with pytest.raises(ValueError, match="its description contradicts itself"):
        tf.KVCache.restore(place)


def test_another_byte_order(place):
    contiguous().snapshot(place)
    described(place, lambda d: d.update(byteorder="middle"))
    with pytest.raises(ValueError, match="was written on a middle-endian machine"):
        tf.KVCache.restore(place)


# ---- what goes wrong while it is written ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["os.fsync", "zlib.crc32", "json.dumps"])
def test_an_error_leaves_the_older_file_and_nothing_else(place, monkeypatch, where):
    contiguous().snapshot(place)
    before = place.read_bytes()

    def fail(*_, **__):
        raise OSError("no space left on the device")

    module, _, name = where.partition(".")
    monkeypatch.setattr(getattr(snapshot, module), name, fail)
    with pytest.raises(OSError, match="no space left"):
        paged().snapshot(place)
    monkeypatch.undo()
    assert place.read_bytes() == before
    assert os.listdir(place.parent) == ["cache"]


def test_a_folder_is_no_place(tmp_path):
    with pytest.raises(ValueError, match=r"path must name a file, .* is a folder"):
        contiguous().snapshot(tmp_path)


WRITER = """
import os, sys, time, zlib
import numpy as np, tilefold as tf
from tilefold.caches import snapshot

def stop(module, name, calls):
    real = getattr(module, name)
    def counting(*given):
        nonlocal calls
        calls -= 1
        if not calls:
            print("there", flush=True)
            time.sleep(600)
        return real(*given)
    setattr(module, name, counting)

cache = tf.PagedKVCache(1, 8, page=4)
cache.append(cache.open(), *np.full((2, 1, 1, 4000, 8), 2, np.float32))
stop({module}, {name!r}, {calls})
cache.snapshot({path!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("module", "name", "calls", "new"),
    [
        ("snapshot.zlib", "crc32", 3, False),  # before the first row
        ("snapshot.zlib", "crc32", 1500, False),  # between rows
        ("os", "fsync", 1, False),  # all is written, nothing is sure
        ("snapshot.Path", "replace", 1, False),  # before it gets its name
        ("os", "fsync", 2, True),  # it has its name
    ],
)
def test_a_kill_leaves_one_whole_file(place, module, name, calls, new):
    contiguous().snapshot(place)
    before = place.read_bytes()
    code = WRITER.format(module=module, name=name, calls=calls, path=str(place))
    path = os.pathsep.join(filter(None, sys.path))
    writer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        assert writer.stdout.readline() == b"there\n"
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    if new:
        cache = tf.PagedKVCache.restore(place)
        assert cache.lengths(0).tolist() == [4000] and (cache.k[0] == 2).all()
    else:
        assert place.read_bytes() == before
        assert tf.KVCache.restore(place).lengths.tolist() == [9, 0, 4]
    contiguous().snapshot(place)  # what the kill left behind is in nobody's way
    assert place.read_bytes() == before
