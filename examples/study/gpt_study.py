"""The small GPT before, while and after it is trained: its heads, the entropy of each at many steps, and evictions.

It is trained twice from the same seed, once as in `small_gpt` and once much too fast, because entropy that collapses
is what one watches for. Text that is watched is never trained on.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from heads import NEAR, Heads, look

import tilefold as tf
from tilefold.eviction import anchors_and_window, heaviest, snapkv

sys.path.append(str(Path(__file__).resolve().parents[1] / "small_gpt"))
from gpt import ATTEND, GPT
from text import documentation
from train import SEED, batches

ANCHORS = 4  # first bytes, as Xiao et al. 2023 (arXiv 2309.17453) keep them
HELD_OUT = 0.05  # of the text, at its end
WATCHED = 2  # sequences


@dataclass
class Run:
    """What was seen of one training."""

    rate: float
    context: int
    losses: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    entropy: list = field(default_factory=list)  # (layers, heads) at each of these steps
    near: list = field(default_factory=list)  # the attention on itself and its neighbours, likewise
    logits: list = field(default_factory=list)  # the largest score, likewise
    before: Heads | None = None
    after: Heads | None = None
    kept: tuple = ()  # how many keys of how many
    lost: dict = field(default_factory=dict)  # by choice, (layers, heads)


def inputs(model, text):
    """(q, k) of every layer, as its attention gets them."""
    caught = []

    def attend(q, k, v):
        caught.append((q, k))
        return ATTEND["tilefold"](q, k, v)

    with torch.no_grad():
        for block in model.blocks:
            block.attention.attend = attend
        model(text)
        for block in model.blocks:
            block.attention.attend = ATTEND["tilefold"]
    return caught


def heads_of(model, text):
    return Heads.stacked([look(q, k, list(range(ANCHORS)), causal=True) for q, k in inputs(model, text)])


def glance(model, text, run, step):
    """Entropy, nearness and the largest score of every head, into `run`."""
    what = tf.entropy(), tf.mass_in(near=tf.window(NEAR, 0)), tf.max_logit()
    seen = [tf.probe(q, k, *what, causal=True) for q, k in inputs(model, text)]
    run.steps.append(step)
    run.entropy.append(np.stack([s.entropy.double().mean(dim=(0, 2)).numpy() for s in seen]))
    run.near.append(np.stack([s.mass_in.near.double().mean(dim=(0, 2)).numpy() for s in seen]))
    run.logits.append(np.stack([s.max_logit.amax(dim=(0, 2)).numpy() for s in seen]))


def evictions(model, text):
    """What dropping seven eighths of a prompt would cost: of the attention that the 64 queries after it pay to it.

    Choices are made at the end of the prompt and never see those queries. How many keys of how many, and what is lost.
    """
    n = text.shape[1]
    later = min(64, n // 4)
    prompt = n - later
    keep, window = prompt // 8, min(16, prompt // 16)
    lost = {"the last keys": [], "anchors and the last": [], "heaviest (H2O)": [], "pooled (SnapKV)": []}
    for q, k in inputs(model, text):
        q_past, k_past, q_next = q[:, :, :prompt], k[:, :, :prompt], q[:, :, prompt:]
        mass = tf.probe(q_past, k_past, tf.key_mass(), causal=True).key_mass
        lengths = [prompt] * len(q)
        choices = (
            anchors_and_window(lengths, 0, keep),
            anchors_and_window(lengths, ANCHORS, keep - ANCHORS),
            heaviest(mass, keep, recent=keep // 2),
            snapkv(q_past[:, :, -window:], k_past, keep),
        )
        for found, kept in zip(lost.values(), choices, strict=True):
            found.append(kept.loss(q_next, k_past).double().mean(dim=0).numpy())
    return (keep, prompt), {name: np.stack(found) for name, found in lost.items()}


def train(rate, warm, steps, context, batch, every, report):
    """Train one model, and look at it every so many steps."""
    torch.manual_seed(SEED)
    text = torch.frombuffer(bytearray(documentation()), dtype=torch.uint8)
    cut = int(len(text) * (1 - HELD_OUT))
    watched = next(batches(text[cut:], context, WATCHED, torch.Generator().manual_seed(SEED)))[:, :-1]
    model = GPT(ATTEND["tilefold"], context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    slow = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm))
    draw = batches(text[:cut], context, batch, torch.Generator().manual_seed(SEED))
    run = Run(rate, context)
    run.before = heads_of(model, watched)
    glance(model, watched, run, 0)
    for step in range(1, steps + 1):
        loss = model.loss(next(draw))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slow.step()
        run.losses.append(loss.item())
        if step % every == 0 or step == steps:
            glance(model, watched, run, step)
        report(step, run.losses[-1])
    run.after = heads_of(model, watched)
    run.kept, run.lost = evictions(model, watched)
    return run
