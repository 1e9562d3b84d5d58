"""Which heads are local, which rest on the anchors, where entropy collapses: of a real model and of one in training.

It decides what is printed. Every sentence is made from the numbers of this run, so a sentence that is not true is not
there; where nothing of a kind was found it says so.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from heads import NEAR, listed, name
from picture import COLLAPSED, drawn

HERE = Path(__file__).resolve().parent
COLUMNS = {
    "entropy": ("entropy", "{:.2f}"),
    "uniform": ("of uniform", "{:.2f}"),
    "distance": ("distance", "{:.0f}"),
    "anchors": ("anchors", "{:.3f}"),
    "neighbours": ("neighbours", "{:.3f}"),
    "itself": ("itself", "{:.3f}"),
    "first": ("anchor first", "{:.2f}"),
}


def table(heads):
    """Means over each layer's heads, and how many heads of each kind it has."""
    kinds = ("local", "anchors", "broad")
    print(f"layer  {''.join(f'{title:>13}' for title, _ in COLUMNS.values())}   {'  '.join(kinds)}")
    for layer, words in enumerate(heads.kinds):
        cells = (form.format(vars(heads)[at][layer].mean()) for at, (_, form) in COLUMNS.items())
        counts = "  ".join(f"{(words == kind).sum():>{len(kind)}}" for kind in kinds)
        print(f"{layer + 1:<7}{''.join(f'{cell:>13}' for cell in cells)}   {counts}")


def said_of(heads, n):
    """Sentences about some heads that see n keys."""
    kinds, local = heads.kinds, heads.neighbours + heads.itself
    for kind, meaning in (
        ("local", f"more than half of the attention on itself and {NEAR} keys to either side"),
        ("anchors", "an anchor is the heaviest key of most rows, and more than twice an even share"),
    ):
        some = kinds == kind
        print(f"{kind:<9}{some.sum()} of {some.size}: {meaning}; {listed(some)}")
    near, on, low = (at(x) for at, x in ((most, local), (most, heads.anchors), (least, heads.entropy)))
    print(f"nearest  head {name(near)}: {local[near]:.0%} of its attention lies within {NEAR} positions")
    print(
        f"anchored head {name(on)}: {heads.anchors[on]:.0%} on the anchors, first in {heads.first[on]:.0%} of rows"
    )
    alike = np.exp(heads.entropy[low])
    print(
        f"sharpest head {name(low)}: {heads.entropy[low]:.2f} nats, as if {alike:.1f} of {n} keys were alike"
    )


def most(x):
    return np.unravel_index(np.argmax(x), x.shape)


def least(x):
    return np.unravel_index(np.argmin(x), x.shape)


def said_of_reading(reading):
    heads = reading.heads
    print(f"\nall-MiniLM-L6-v2 on {reading.tokens} tokens of Python's documentation, windows of {reading.n}")
    table(heads)
    said_of(heads, reading.n)
    sep = heads.anchors - reading.cls
    print(
        f"anchors  [CLS] gets {reading.cls.mean():.1%} of all attention and [SEP] {sep.mean():.1%}; "
        f"{1 / reading.n:.1%} each would be even"
    )


def said_of_training(runs):
    calm = runs[0]
    print(f"\nA small GPT before it is trained, {calm.context} bytes of text that it never reads")
    table(calm.before)
    print(
        f"\nThe same after {len(calm.losses)} steps at a learning rate of {calm.rate:g}, loss {calm.losses[-1]:.2f}"
    )
    table(calm.after)
    said_of(calm.after, calm.context)
    near = np.stack(calm.near)
    gained = near[-1] - near[0]
    print(
        f"learned  attention within {NEAR} positions: {gained.mean():+.1%} on average, {gained.max():+.1%} at most"
    )
    if (local := near > 0.5).any():
        at = int(local.any(axis=(1, 2)).argmax())
        print(f"while    the first head is local at step {calm.steps[at]}: {listed(local[at])}")
    kept, prompt = calm.kept
    print(
        f"\nEviction: what keeping {kept} of a prompt's {prompt} keys loses of the attention of the queries after it"
    )
    local = calm.after.kinds == "local"
    for choice, lost in calm.lost.items():
        parts = (("local heads", lost[local]), ("the others", lost[~local]))
        means = "".join(f"   {whose} {x.mean():>6.1%}" for whose, x in parts if x.size)
        print(f"{choice:<21}{means}   head {name(most(lost))} {lost.max():>6.1%} at worst")
    print("\nEntropy while training")
    for run in runs:
        said_of_entropy(run)


def said_of_entropy(run):
    """Where it was lowest, and which heads fell below that of two keys."""
    entropy, logits = np.stack(run.entropy), np.stack(run.logits)
    at = least(entropy)
    fell = (entropy < COLLAPSED).any(axis=0)
    losses = f"loss {run.losses[0]:.2f} to {run.losses[-1]:.2f}, at best {min(run.losses):.2f}"
    print(f"rate {run.rate:g}: {losses}; scores up to {logits.max():.0f}")
    where = f"{entropy[at]:.2f} nats, head {name(at[1:])} at step {run.steps[at[0]]}"
    print(f"  lowest    {where}; it began at {entropy[(0, *at[1:])]:.2f}")
    if not fell.any():
        print(f"  collapse  none: no head ever looks at fewer than two keys ({COLLAPSED:.2f} nats)")
        return
    when = run.steps[int((entropy < COLLAPSED).any(axis=(1, 2)).argmax())]
    still = entropy[-1] < COLLAPSED
    print(
        f"  collapse  {fell.sum()} of {fell.size} heads below {COLLAPSED:.2f} nats, from step {when}: {listed(fell)}"
    )
    print(f"            at the end still {still.sum()}: {listed(still)}")


def reporter(what, of):
    """Tells how far it is: one line that is written over where a person looks at it, else a few lines."""
    live = sys.stderr.isatty()

    def report(at, loss=None):
        if live or at == of or at % max(of // 4, 1) == 0:
            number = "" if loss is None else f"   loss {loss:.4f}"
            line = f"{what:<22} {at:>5} of {of}{number}"
            print(
                f"\r{line}" if live else line,
                end="" if live and at < of else "\n",
                file=sys.stderr,
                flush=True,
            )

    return report


def main():
    options = argparse.ArgumentParser(description="What the heads of two models do, and a picture of it.")
    options.add_argument("--models", nargs="+", choices=("minilm", "gpt"), default=["minilm", "gpt"])
    options.add_argument("--windows", type=int, default=32, help="of 510 tokens that MiniLM reads")
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--context", type=int, default=256, help="bytes that the GPT sees at once")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--rate", type=float, default=2e-3, help="the learning rate, warmed up for 20 steps")
    options.add_argument("--fast", type=float, default=2e-2, help="one that is too high, and not warmed up")
    options.add_argument("--every", type=int, default=20, help="steps from one look at entropies to the next")
    options.add_argument("--picture", type=Path, default=HERE.parents[1] / "docs" / "study.png")
    options.add_argument("--quick", action="store_true", help="one window, 12 steps, --context 128 --every 2")
    args = options.parse_args()
    if args.quick:
        args.windows, args.steps, args.context, args.every = 1, 12, 128, 2
    for option, low in (("windows", 1), ("steps", 1), ("context", 64), ("batch", 1), ("every", 1)):
        if getattr(args, option) < low:
            raise SystemExit(f"--{option} must be at least {low}, got {getattr(args, option)}.")

    reading, runs = None, []
    if "minilm" in args.models:
        import minilm_study

        reading = minilm_study.read(args.windows, reporter("MiniLM, window", args.windows))
    if "gpt" in args.models:
        import gpt_study

        for rate, warm in ((args.rate, 20), (args.fast, 1)):
            report = reporter(f"GPT at {rate:g}, step", args.steps)
            runs.append(gpt_study.train(rate, warm, args.steps, args.context, args.batch, args.every, report))
    if reading:
        said_of_reading(reading)
    if runs:
        said_of_training(runs)
    drawn(reading, runs, args.picture)
    print(f"\npicture  {args.picture}")


if __name__ == "__main__":
    main()
