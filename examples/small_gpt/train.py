"""Train the same small GPT three times, with each attention from the same seed, and draw what came of it.

It decides when loss curves count as equal. Training is chaotic: two correct attentions that round differently drift
apart. How far is measured, between torch's attention and the whole matrix; tilefold may stray from torch's by a small
multiple of that, at every step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from gpt import ATTEND, GPT
from text import documentation

from tilefold.bench.budgets import FACTOR

HERE = Path(__file__).resolve().parent
SEED = 0


def resident(what):
    """What /proc says of this process: "VmRSS", the memory that it has, or "VmHWM", the most that it had; in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) * 1024


def batches(text, context, batch, rng):
    """Random pieces of the text, without end: (batch, context + 1)."""
    while True:
        starts = torch.randint(0, len(text) - context - 1, (batch, 1), generator=rng)
        yield text[starts + torch.arange(context + 1)].long()


def train(name, steps, context, batch, report):
    """The loss of every step, the seconds that each took, and how much memory came on top."""
    torch.manual_seed(SEED)
    text = torch.frombuffer(bytearray(documentation()), dtype=torch.uint8)
    model = GPT(ATTEND[name], context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
    draw = batches(text, context, batch, torch.Generator().manual_seed(SEED))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    losses, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        loss = model.loss(next(draw))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        report(step + 1, losses[-1])
    return {"losses": losses, "seconds": seconds, "memory": resident("VmHWM") - before}


def reporter(name, steps):
    """Tells how far it is: one line that is written over where a person looks at it, else a few lines."""
    live = sys.stderr.isatty()

    def report(step, loss):
        last = step == steps
        if live or last or step % max(steps // 4, 1) == 0:
            end = "\n" if last or not live else ""
            back = "\r" if live else ""
            line = f"{back}{name:<9} step {step:>4} of {steps}   loss {loss:.4f}"
            print(line, end=end, file=sys.stderr, flush=True)

    return report


def apart(name, args, folder):
    """`train` in a process of its own: a peak of memory is one of a process."""
    out = Path(folder) / f"{name}.json"
    command = [sys.executable, __file__, "--run", name, "--out", str(out)]
    for option in ("steps", "context", "batch"):
        command += [f"--{option}", str(getattr(args, option))]
    if subprocess.run(command).returncode:
        raise SystemExit(f"This step failed: {' '.join(command)}")
    return json.loads(out.read_text())


def drawn(found, drift, allowed, path):
    """One picture: the curves, how far they are apart, and what each took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"tilefold": "#d1495b", "torch": "#00798c", "matrix": "#8d96a3"}
    figure, (curves, apart, times, sizes) = pyplot.subplots(
        1, 4, figsize=(13, 3.4), width_ratios=(3, 3, 1.4, 1.4), layout="constrained"
    )
    for name, width in (("matrix", 6), ("torch", 3), ("tilefold", 1)):  # one upon the other
        curves.plot(found[name]["losses"], color=colors[name], label=name, linewidth=width)
    curves.set(title="loss, nats a byte", xlabel="step")
    curves.legend()
    drift = {name: np.maximum.accumulate(far) for name, far in drift.items()}
    tiny = 1e-9  # what a logarithmic axis shows of a difference of 0
    apart.semilogy(np.maximum(allowed, tiny), color="#cccccc", label="allowed")
    apart.semilogy(np.maximum(drift["matrix"], tiny), color=colors["matrix"], label="|matrix − torch|")
    apart.semilogy(np.maximum(drift["tilefold"], tiny), color=colors["tilefold"], label="|tilefold − torch|")
    apart.set(title="how far the curves were ever apart", xlabel="step")
    apart.legend()
    names = list(ATTEND)
    for axes, title, heights in (
        (times, "ms a step", [1000 * np.median(found[name]["seconds"]) for name in names]),
        (sizes, "MB beyond the model", [found[name]["memory"] / 1e6 for name in names]),
    ):
        bars = axes.bar(names, heights, color=[colors[name] for name in names])
        axes.bar_label(bars, fmt="%.0f")
        axes.set(title=title, yticks=[])
        axes.spines[["left", "right", "top"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    options = argparse.ArgumentParser(description="Train a small GPT with each attention from the same seed.")
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--context", type=int, default=1024, help="bytes that the model sees at once")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--picture", type=Path, default=HERE.parents[1] / "docs" / "small_gpt.png")
    options.add_argument("--quick", action="store_true", help="--steps 8 --context 128")
    options.add_argument("--run", choices=ATTEND, help=argparse.SUPPRESS)
    options.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.quick:
        args.steps, args.context = 8, 128
    for name in ("steps", "context", "batch"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.run:
        found = train(args.run, args.steps, args.context, args.batch, reporter(args.run, args.steps))
        return args.out.write_text(json.dumps(found))
    if not os.path.exists("/proc/self/clear_refs"):
        raise SystemExit("This example measures memory by /proc, which this system does not have.")

    with tempfile.TemporaryDirectory() as folder:
        found = {name: apart(name, args, folder) for name in ATTEND}
    losses = {name: np.array(got["losses"]) for name, got in found.items()}
    drift = {name: np.abs(losses[name] - losses["torch"]) for name in ("tilefold", "matrix")}
    rounding = np.finfo(np.float32).eps * losses["torch"]
    allowed = FACTOR * np.maximum.accumulate(drift["matrix"]) + rounding
    drawn(found, drift, allowed, args.picture)

    print(f"\n{'':<9}{'last loss':>12}{'a step':>12}{'memory':>12}{'from torch by at most':>24}")
    for name, got in found.items():
        far = f"{drift[name].max():.1e}" if name in drift else ""
        time_of = f"{1000 * np.median(got['seconds']):.0f} ms"
        print(f"{name:<9}{got['losses'][-1]:>12.4f}{time_of:>12}{got['memory'] / 1e6:>9.0f} MB{far:>24}")
    print(f"picture  {args.picture}")
    wrong = np.flatnonzero(drift["tilefold"] > allowed)
    if len(wrong):
        raise SystemExit(f"FAILED: at step {wrong[0] + 1} losses are further apart than rounding explains.")
    if not losses["tilefold"][-1] < losses["tilefold"][0]:
        raise SystemExit("FAILED: the model learned nothing.")


if __name__ == "__main__":
    main()
