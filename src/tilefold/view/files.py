"""What was seen, in a file: an .npz with one array per statistic, `layer/statistic`, a list as two of them.

Numbers come back as NumPy arrays with the bits that they had; whatever can read .npz can read them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

from ..arrays import enter
from ..probes.statistic import Regions, Seen, TopK
from .model import each


def save(seen: Any, path: str | os.PathLike[str]) -> Path:
    """Write a `Seen`, or a mapping from layers to such, to `path`, which ends in .npz.

    >>> import numpy as np, tempfile, tilefold as tf
    >>> from tilefold.view import load, save
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(load(save(tf.probe(q, k, tf.entropy(), tf.topk(2)), folder + "/seen.npz")))
    Seen(entropy: (4, 100), topk: {weights: (4, 100, 2), keys: (4, 100, 2)})
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise ValueError(f"save: path must end in .npz, got {str(path)!r}")
    arrays: dict[str, np.ndarray] = {}
    for layer, one in each(seen):
        prefix = f"{layer}/" if layer else ""
        for name, found in vars(one).items():
            parts = {name: found}
            if isinstance(found, (TopK, Regions)):
                inside = found._asdict() if isinstance(found, TopK) else vars(found)
                parts = {f"{name}.{part}": x for part, x in inside.items()}
            arrays |= {prefix + part: enter(f"save: {part}", x) for part, x in parts.items()}
    return complete(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def load(path: str | os.PathLike[str]) -> Any:
    """What `save` wrote: a `Seen`, or a dict of such by layer."""
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, BadZipFile, AttributeError) as error:
        raise ValueError(f"{path}: is no .npz of statistics ({error or 'it is empty'})") from error
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        layer, _, statistic = name.rpartition("/")
        found.setdefault(layer, {})[statistic] = array
    if not found:
        raise ValueError(f"{path}: holds nothing")
    seen = {layer: _seen(statistics) for layer, statistics in found.items()}
    return seen[""] if list(seen) == [""] else seen


def _seen(arrays: dict[str, np.ndarray]) -> Seen:
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        statistic, _, part = name.partition(".")
        if part:
            parts.setdefault(statistic, {})[part] = array
        else:
            parts[statistic] = array
    return Seen(**{name: _joined(x) if isinstance(x, dict) else x for name, x in parts.items()})


def _joined(parts: dict[str, np.ndarray]) -> TopK | Regions:
    return TopK(**parts) if set(parts) == set(TopK._fields) else Regions(**parts)


def complete(path: Path, write: Any) -> Path:
    """The file `path`, made by `write(file)`: beside its place, and moved there when it is whole."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {str(path.parent)!r}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file: BinaryIO
        with part.open("xb") as file:
            write(file)
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path
