"""Arrays between processes: .npy files in one folder, bfloat16 as its bits under a name that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .scenarios import Inputs

BITS = ".bfloat16.npy"


def put(folder: Path, name: str, x: np.ndarray) -> None:
    if x.dtype.name == "bfloat16":
        np.save(folder / f"{name}{BITS}", x.view(np.uint16))
    else:
        np.save(folder / f"{name}.npy", x)


def get(folder: Path, name: str) -> np.ndarray:
    if (bits := folder / f"{name}{BITS}").exists():
        import ml_dtypes

        array: np.ndarray = np.load(bits).view(ml_dtypes.bfloat16)
        return array
    array = np.load(folder / f"{name}.npy")
    return array


def put_inputs(folder: Path, inputs: Inputs) -> None:
    for i, x in enumerate(inputs):
        put(folder, f"input{i}", x)


def get_inputs(folder: Path) -> Inputs:
    count = len(list(folder.glob("input*.npy")))
    return tuple(get(folder, f"input{i}") for i in range(count))
