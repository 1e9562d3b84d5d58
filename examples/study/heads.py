"""What one head of attention does, in a few numbers, and the word for it: local, on anchors, or broad.

Local: more than half of its attention is on itself and its neighbours. On anchors: of most rows, the heaviest key is an
anchor, and anchors get more than twice what even attention would give them; that may be a third of the whole, for the
rest is spread thinly.
Regions do not overlap. Everything comes out of `tilefold.probe`: no matrix of weights is ever made.
"""

from dataclasses import dataclass

import numpy as np

import tilefold as tf

NEAR = 8  # positions to either side that count as neighbours


@dataclass
class Heads:
    """Averages over all rows of (batch, heads, n, dim), one per head; of layers on top of each other (layers, heads).

    `entropy` in nats, and `uniform`, its share of what a head has that looks at everything alike; `distance` in
    positions; the attention on `anchors`, on up to NEAR `neighbours` to either side and on the row's own position,
    `itself`; `first`: the share of rows whose heaviest key is an anchor; `even`: the attention on anchors that a head
    has that looks at everything alike.
    """

    entropy: np.ndarray
    uniform: np.ndarray
    distance: np.ndarray
    anchors: np.ndarray
    neighbours: np.ndarray
    itself: np.ndarray
    first: np.ndarray
    even: np.ndarray

    @classmethod
    def stacked(cls, layers):
        return cls(**{name: np.stack([vars(layer)[name] for layer in layers]) for name in vars(layers[0])})

    @property
    def kinds(self):
        """The word for each head."""
        local = self.neighbours + self.itself
        on_anchors = (self.first > 0.5) & (self.anchors > 2 * self.even)
        return np.where(local > 0.5, "local", np.where(on_anchors, "anchors", "broad"))


def look(q, k, anchors, causal):
    """The numbers of each head of (batch, heads, n, dim); `anchors` is a list of keys."""
    n = q.shape[-2]
    first = tf.prefix(0)
    for key in anchors:
        first = first | (tf.prefix(key + 1) & ~tf.prefix(key))
    itself, near = tf.window(0, 0), tf.window(NEAR, NEAR)
    seen = tf.probe(
        q, k, tf.entropy(), tf.mean_distance(), tf.topk(1),
        tf.mass_in(anchors=first, neighbours=near & ~itself & ~first, itself=itself & ~first),
        causal=causal,
    )  # fmt: skip
    entropy = _mean(seen.entropy)
    keys = np.arange(1, n + 1) if causal else np.full(n, n)
    even = np.minimum(len(anchors), keys) / keys
    return Heads(
        entropy,
        entropy / np.log(keys).mean(),
        _mean(seen.mean_distance),
        *(_mean(vars(seen.mass_in)[name]) for name in ("anchors", "neighbours", "itself")),
        _mean(np.isin(np.asarray(seen.topk.keys)[..., 0], anchors)),
        np.full(len(entropy), even.mean()),
    )


def _mean(x):
    """Over the batch and over rows, per head, in float64."""
    return np.asarray(x, np.float64).mean(axis=(0, 2))


def name(at):
    """Of a head, (layer, head), counted from 1."""
    return ".".join(str(n + 1) for n in at)


def listed(heads):
    """The names of heads that are True in (layers, heads)."""
    return ", ".join(name(at) for at in np.argwhere(heads).tolist()) or "none"
