"""What the attentions are asked: SmolLM2 as a folder that each process loads, and two prompts of very different length.

The folder is written once, because widening the weights takes longer than loading them; `../smollm2.py` reads them.
"""

import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.append(str(Path(__file__).parents[1]))

import smollm2

QUESTION = "\n\nAnswer in one sentence: what is the text above about?"
OTHER = "Write the first ten even numbers, separated by commas."


def convert(folder):
    """Write the model and its tokenizer to `folder` as transformers keeps them, in float32."""
    for part in smollm2.read():
        part.save_pretrained(folder)


def load(folder, attention):
    """The tokenizer, and the model in the given attn_implementation."""
    import transformers

    from tilefold.drop_in.transformers import register

    register()
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    return tokenizer, model.eval()


def prompts(tokenizer, length):
    """A batch of two: a question about some `length` tokens of Python's documentation, and a short one to be padded."""
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))[:length]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for content in (tokenizer.decode(ids) + QUESTION, OTHER)
    ]
    return tokenizer(texts, return_tensors="pt", padding=True)
