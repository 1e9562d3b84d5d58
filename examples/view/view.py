"""What a language model looks at while it reads: every layer and head of SmolLM2 on one page that needs no network.

It decides what is asked of each call: the statistics of a page, in the sweep that computes attention anyway.
"""

import argparse
import shutil
import sys
from pathlib import Path

import tilefold as tf
from tilefold.view import picture, statistics, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import smollm2

TEXT = """\
A lighthouse keeper kept a diary. Every evening she wrote down the ships that had passed, and the ships that had not.
"The lamp is lit," she wrote, "whether or not anybody sees it." One night no ship passed, and the lamp went out, and
nobody saw it. In the morning the lighthouse keeper wrote down in her diary: no ships. Then she lit the lamp again."""
LAYER, HEAD = "layer 8", "4"  # what the screenshot shows


def read(text):
    """What each layer of the model saw in the text, by its number, and the tokens."""
    tokenizer, model = smollm2.read()
    import torch
    from transformers import AttentionInterface

    seen = {}

    def attention(module, query, key, value, attention_mask, scaling=None, **options):
        n = query.shape[-2]
        out, _, seen[f"layer {module.layer_idx}"] = tf.attention(
            query, key, value, causal=True, scale=scaling, probes=statistics(n, n)
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("looking", attention)
    model.set_attn_implementation("looking")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        model(ids)
    return seen, [tokenizer.decode([i]) for i in ids[0]]


def screenshot(page, path):
    """The first screen of the page as a small PNG, by the Chromium of this system."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=120_000)
        tab = browser.new_page(viewport={"width": 1360, "height": 1010}, color_scheme="light")
        tab.set_default_timeout(120_000)
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-ready]")
        tab.select_option("#layer", label=LAYER)
        tab.select_option("#head", HEAD)
        tab.screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text file to read instead")
    parser.add_argument("--html", type=Path, default=Path("view.html"), help="where the page goes")
    parser.add_argument("--svg", type=Path, help="where a figure of all layers and heads goes")
    parser.add_argument("--screenshot", type=Path, help="where a picture of the page goes; needs playwright")
    parser.add_argument("--quick", action="store_true", help="read the first sentence only")
    given = parser.parse_args()
    text = given.text.read_text() if given.text else TEXT
    seen, tokens = read(text.partition(".")[0] if given.quick else text)
    print(write(seen, given.html, tokens=tokens, title="What SmolLM2 looks at"))
    if given.svg:
        print(picture(seen, given.svg))
    if given.screenshot:
        screenshot(given.html, given.screenshot)
        print(given.screenshot)
