"""An engine as a folder that can be gone back to after any crash: the cache's file, the scheduler's state beside it.

    step-120.cache   what `PagedKVCache.snapshot` wrote, with checksums
    state.json       the requests and what became of them; it names the cache file that belongs to it

The fact to know: two files cannot be replaced at once, so one decides. A new cache file is written whole under a new
name, then state.json is replaced by a renaming; before that moment the folder is the older snapshot, after it the
newer. Only then is the older cache file deleted.
"""

import json
import os
import zlib
from pathlib import Path

import torch
from engine import Engine

import tilefold as tf

VERSION = 1
STATE = "state.json"


def weights_of(model):
    """A number that other weights do not have, in all likelihood: a snapshot continues with its own model only."""
    total = 0
    for weight in model.parameters():
        total = zlib.crc32(weight.detach().contiguous().view(-1).view(torch.uint8).numpy(), total)
    return total


def save(folder, engine, weights):
    """Make `folder` the snapshot of `engine`; at any time it is the older one or this one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{engine.totals.steps}.cache"
    engine.cache.snapshot(folder / name)
    state = {"version": VERSION, "cache": name, "weights": weights, **engine.state()}
    part = folder / f".{STATE}.part"
    with part.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / STATE)
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)  # only then is the renaming there for good
    os.close(handle)
    for other in folder.glob("step-*.cache"):
        if other.name != name:
            other.unlink()


def load(folder, ragged, weights):
    """The engine of a snapshot, for the model that it was made with."""
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no snapshot: it has no {STATE}") from None
    except ValueError as error:
        raise ValueError(f"{folder / STATE} is damaged: {error}") from None
    if state["version"] != VERSION:
        raise ValueError(f"{folder} is of version {state['version']}, this program reads {VERSION}")
    if state["weights"] != weights:
        raise ValueError(f"{folder} was written with another model or other weights than the one given")
    cache = tf.PagedKVCache.restore(folder / state["cache"], like=ragged.like)
    return Engine.restored(ragged, state, cache)
