"""Write q.npy, k.npy and v.npy: what one layer of the model computes for Python's own documentation.

The text is `pydoc_data.topics` (what `help("lambda")` shows), its topics in alphabetical order, so every
Python has it. Its words change a little from one Python to the next, and with them the numbers of the demo.
"""

import argparse
import platform
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from model import MiniLM

SAME = "How do I read a file line by line?", "Iterating over the lines of a text file."
OTHER = "My grandmother grows tomatoes behind the house."


def text():
    return "\n\n".join(topics[name] for name in sorted(topics))


def main():
    options = argparse.ArgumentParser(description="Write q.npy, k.npy, v.npy of a layer of all-MiniLM-L6-v2.")
    options.add_argument("folder", type=Path)
    options.add_argument("--tokens", type=int, default=16384)
    options.add_argument("--layer", type=int, default=-1, help="from 0 (default: the last)")
    args = options.parse_args()

    model = MiniLM()
    if not -model.n_layers <= args.layer < model.n_layers:
        raise SystemExit(f"The model has {model.n_layers} layers, so there is no layer {args.layer}.")
    a, b, c = (model.sentence(s) for s in (*SAME, OTHER))
    if not a @ b > a @ c:
        raise SystemExit(f"The model is wrong: {SAME[0]!r} is closer to {OTHER!r} than to {SAME[1]!r}.")

    ids = model.tokens(text())
    if not 0 < args.tokens <= len(ids):
        raise SystemExit(f"--tokens must be 1 to {len(ids)}, all the text has; it was {args.tokens}.")
    ids = ids[: args.tokens]
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip("qkv", model.vectors(ids, args.layer), strict=True):
        np.save(args.folder / f"{name}.npy", np.ascontiguousarray(array))

    layer = range(model.n_layers)[args.layer] + 1
    print(f"model    all-MiniLM-L6-v2; similar sentences score {a @ b:.2f}, unlike ones {a @ c:.2f}")
    print(f"text     the documentation inside Python {platform.python_version()}, first {len(ids)} tokens")
    print(f"vectors  layer {layer} of {model.n_layers}; q, k and v are each {array.shape} {array.dtype}")


if __name__ == "__main__":
    main()
