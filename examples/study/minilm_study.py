"""all-MiniLM-L6-v2 on Python's documentation: what each of its 72 heads does within the windows that it reads.

Attention is that of the model: each window alone, [CLS] and [SEP] included. These two are its anchors: heads of BERT
that have nothing to say look at [SEP] (Clark et al. 2019, arXiv 1906.04341).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from heads import Heads, look

import tilefold as tf

sys.path.append(str(Path(__file__).resolve().parents[1] / "minilm"))
from model import MiniLM
from vectors import text


@dataclass
class Reading:
    """What was seen of so many `tokens` in windows of `n`: the heads with both anchors, and with [CLS] alone."""

    tokens: int
    n: int
    heads: Heads
    cls: np.ndarray  # the attention on [CLS], (layers, heads)


def read(windows, report):
    """The averages over that many whole windows."""
    model = MiniLM()
    ids = model.tokens(text())
    if windows * model.window > len(ids):
        raise SystemExit(f"The text has {len(ids) // model.window} windows, so there are no {windows}.")
    n = model.window + 2
    found, cls = [], []
    for at in range(windows):
        layers = list(model.layers(ids[at * model.window : (at + 1) * model.window]))
        layers = [(q[None], k[None]) for q, k, _ in layers]
        found.append(Heads.stacked([look(q, k, [0, n - 1], causal=False) for q, k in layers]))
        first = [tf.probe(q[0], k[0], tf.mass_in(cls=slice(0, 1))).mass_in.cls for q, k in layers]
        cls.append(np.array(first, np.float64).mean(axis=-1))
        report(at + 1)
    heads = Heads(**{name: np.mean([vars(one)[name] for one in found], axis=0) for name in vars(found[0])})
    return Reading(windows * model.window, n, heads, np.mean(cls, axis=0))
