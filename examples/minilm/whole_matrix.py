"""The other way: attention with the whole n × n matrix in memory, in plain NumPy.

It decides what tilefold is measured against, and is kind to the matrix: one head at a time and every step in
place, so that exactly one matrix ever exists.
"""

import argparse

import numpy as np


def attend(q, k, v):
    """One head: q, k, v are (n, dim)."""
    s = (q / np.sqrt(np.float32(q.shape[-1]))) @ k.T
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    return s @ v / s.sum(axis=-1, keepdims=True)


def main():
    options = argparse.ArgumentParser(description="Attention with the whole matrix, head by head.")
    options.add_argument("files", nargs=3, metavar=("q.npy", "k.npy", "v.npy"))
    options.add_argument("-o", "--output", required=True)
    args = options.parse_args()
    q, k, v = (np.load(file) for file in args.files)
    np.save(args.output, np.stack([attend(*head) for head in zip(q, k, v, strict=True)]))


if __name__ == "__main__":
    main()
