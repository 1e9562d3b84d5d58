"""A padded batch of 16k tokens goes through a model of transformers without a matrix, in fresh processes.

Held against what torch's own attention takes for the same batch: transformers makes it a mask of n x n cells.
"""

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

MIB = 2**20
TOKENS = 16384

MEASURE = """
import resource, sys
import torch, transformers
from tilefold.drop_in.transformers import register

register()
name, n = sys.argv[1], int(sys.argv[2])
config = transformers.LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=n, pad_token_id=0,
)
model = transformers.AutoModel.from_config(config, attn_implementation=name).eval()

def resident():
    "The peak of this process; the usual ru_maxrss begins with that of the process that started it."
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def forward(n):
    mask = torch.ones(1, n, dtype=torch.long)
    mask[:, :7] = 0
    with torch.no_grad():
        model(torch.full((1, n), 5), attention_mask=mask, use_cache=False)

forward(256)  # what a first call costs once
before = resident()
forward(n)
print(resident() - before)
"""


def growth(name: str, tokens: int = TOKENS) -> int:
    """How much the peak of a process grows with one forward pass, in bytes."""
    run = [sys.executable, "-W", "ignore", "-c", MEASURE, name, str(tokens)]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


def test_a_padded_forward_takes_an_eighth_of_torchs():
    ours, torchs = growth("tilefold"), growth("sdpa")
    assert torchs > TOKENS * TOKENS, "or there was no mask to avoid"
    assert 8 * ours <= torchs, (ours / MIB, torchs / MIB)


def test_and_grows_with_the_tokens_and_no_faster():
    """Four times the tokens: 4 times the bytes, where a matrix would take 16 times as many."""
    quarter, whole = growth("tilefold", TOKENS // 4), growth("tilefold")
    assert quarter > MIB, "or nothing was measured"
    assert whole < 8 * quarter, (quarter / MIB, whole / MIB)
