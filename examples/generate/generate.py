"""A real language model reads a long text and answers, once with each attention: the same words, side by side.

It decides what is measured: a batch of two prompts of very different length, as servers have them, so the short one
is padded. Every attention runs in a process of its own, because a peak of memory is one of a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model import convert, load, prompts

ATTENTIONS = ("tilefold", "sdpa", "eager")


def resident(what):
    """What /proc says of this process: "VmRSS", the memory that it has, or "VmHWM", the most that it had; in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) * 1024


def forget_peak():
    """Let the peak count from now on: loading took more than generating will."""
    Path("/proc/self/clear_refs").write_text("5")


class Clock:
    """Notes when words come. A logits processor that changes nothing: it is called once for each row of new tokens."""

    def __init__(self, new):
        self.new, self.times = new, []

    def __call__(self, tokens, scores):
        self.times.append(time.perf_counter())
        if sys.stderr.isatty():
            line = f"\r{'':<9}writes {len(self.times)} of {self.new} tokens"
            print(line, end="", file=sys.stderr, flush=True)
        return scores


def run(attention, folder, length, new):
    """Load, generate greedily, and write down what came and what it took."""
    tokenizer, model = load(folder, attention)
    inputs = prompts(tokenizer, length)
    rows, n = inputs["input_ids"].shape
    settings = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    short = {name: x[:, -64:] for name, x in inputs.items()}
    model.generate(**short, max_new_tokens=2, **settings)  # what a first call costs once
    print(f"{attention:<9}reads {rows} prompts of up to {n} tokens", file=sys.stderr, flush=True)
    clock = Clock(new)
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=new, logits_processor=[clock], **settings)[:, n:]
    took = resident("VmHWM") - before
    if sys.stderr.isatty():
        print(file=sys.stderr)
    first, last = clock.times[0], clock.times[-1]
    found = {
        "tokens": tokens.tolist(),
        "words": tokenizer.batch_decode(tokens, skip_special_tokens=True),
        "prompt": n,
        "read": first - start,
        "rate": rows * (len(clock.times) - 1) / max(last - first, 1e-9),
        "memory": took,
    }
    (Path(folder) / f"{attention}.json").write_text(json.dumps(found))


def apart(*options):
    """This program with other options, in a process of its own."""
    command = [__file__, *map(str, options)]
    quiet = {} if sys.stderr.isatty() else {"TQDM_DISABLE": "1"}
    if subprocess.run([sys.executable, *command], env=os.environ | quiet).returncode:
        raise SystemExit(f"This step failed: python {' '.join(command)}")


def show(rows):
    """A table, its first row the head: with rich where a person looks at it, else plain text."""
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
            print("   ".join(cells).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", style="bold" if i == 0 else "")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)  # honours NO_COLOR


def main():
    options = argparse.ArgumentParser(description="Generate with a real model, once with each attention.")
    options.add_argument("--tokens", type=int, default=4096, help="of the long prompt's text, at most 7900")
    options.add_argument("--new", type=int, default=32, help="tokens to write")
    options.add_argument("--attention", nargs="+", default=ATTENTIONS, choices=ATTENTIONS)
    options.add_argument("--quick", action="store_true", help="--tokens 300 --new 8")
    options.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # "convert" or an attention, and a folder
    args = options.parse_args()
    if args.quick:
        args.tokens, args.new = 300, 8
    if not 1 <= args.tokens <= 7900 or not 2 <= args.new <= 256:
        raise SystemExit(f"--tokens must be 1 to 7900 and --new 2 to 256, got {args.tokens} and {args.new}.")
    if args.step:
        step, folder = args.step
        return convert(folder) if step == "convert" else run(step, folder, args.tokens, args.new)
    if not os.path.exists("/proc/self/clear_refs"):
        raise SystemExit("This example measures memory by /proc, which this system does not have.")

    print("the model goes from 4 bits to float32, once", file=sys.stderr, flush=True)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        apart("--step", "convert", folder)
        for name in args.attention:
            apart("--step", name, folder, "--tokens", args.tokens, "--new", args.new)
            found[name] = json.loads((Path(folder) / f"{name}.json").read_text())
    first = next(iter(found.values()))
    for words in first["words"]:
        print(f"\n> {words.strip()}")
    print()
    table = [("attention", "reads", "writes", "memory beyond the model")]
    for name, got in found.items():
        read, rate, memory = got["read"], got["rate"], got["memory"] / 1e6
        table.append((name, f"{read:.1f} s", f"{rate:.1f} tokens/s", f"{memory:.0f} MB"))
    show(table)
    print(f"""
reads    {len(first["words"])} prompts, the longer of {first["prompt"]} tokens, the other padded to it; measured once
memory   how much the peak of the process grew, keys and values of {first["prompt"]} tokens included""")
    different = [name for name, got in found.items() if got["tokens"] != first["tokens"]]
    if different:
        raise SystemExit(f"FAILED: {', '.join(different)} wrote other tokens than {next(iter(found))}.")
    print(f"words    all the same {len(first['tokens'])} x {len(first['tokens'][0])} tokens")


if __name__ == "__main__":
    main()
