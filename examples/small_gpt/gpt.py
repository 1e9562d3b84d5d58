"""A small GPT over bytes, whose attention is one function that may be exchanged.

It decides nothing new: pre-norm blocks, learned positions, the output's weights shared with the embedding (Radford
et al. 2019). Queries, keys and values are views of one projection, so attention must take strides as they come.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import tilefold as tf


def matrix(q, k, v):
    """Attention as it is written in books: the whole n x n matrix."""
    n = q.shape[-2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


ATTEND = {
    "tilefold": lambda q, k, v: tf.attention(q, k, v, causal=True),
    "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "matrix": matrix,
}


class Attention(nn.Module):
    def __init__(self, width, heads, attend):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, x):
        batch, n, width = x.shape
        # (batch, n, 3, heads, dim) to three of (batch, heads, n, dim), nothing moves
        q, k, v = self.inward(x).view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.outward(self.attend(q, k, v).transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    def __init__(self, width, heads, attend):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads, attend)
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mix(self.norms[1](x))


class GPT(nn.Module):
    """Bytes (batch, n) to the logits (batch, n, 256) of what comes next."""

    def __init__(self, attend, context, width=128, layers=4, heads=4):
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attend) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.apply(self._start)
        for block in self.blocks:  # what is added to the residual stream starts small
            for last in (block.attention.outward, block.mix[-1]):
                last.weight.data /= math.sqrt(2 * layers)

    @staticmethod
    def _start(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.bytes(x) + self.places.weight[: x.shape[1]]
        return self.norm(self.blocks(x)) @ self.bytes.weight.T

    def loss(self, text):
        """Mean cross entropy of every next byte of `text` (batch, n + 1), in nats."""
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
