"""One picture of both models: a square per head, and what became of each head's entropy while a model was trained."""

import numpy as np

SHOWN = {
    "uniform": "entropy, of uniform",
    "distance": "mean distance, positions",
    "anchors": "attention on anchors",
    "neighbours": "on neighbours",
    "itself": "on itself",
}
COLORS = 256
COLLAPSED = np.log(2)  # nats: fewer than two keys


def squares(axes, values, title, limit, label):
    """Layers downwards, heads to the right; the number in each square where there is room."""
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=limit, aspect="auto")
    axes.set(xticks=[], yticks=range(len(values)), yticklabels=range(1, len(values) + 1))
    axes.tick_params(length=0, labelsize=7)
    if title:
        axes.set_title(title, fontsize=9)
    if label:
        axes.set_ylabel(label, fontsize=9)
    for (layer, head), x in np.ndenumerate(values):
        text = f"{x:.0f}" if limit > 1 else f"{x:.2f}".removeprefix("0")
        color = "white" if x < 0.6 * limit else "black"
        axes.text(head, layer, text, ha="center", va="center", fontsize=5.5, color=color)
    return image


def curves(axes, run, title):
    """The entropy of each head over the steps, a colour per layer, and the loss."""
    from matplotlib import colormaps

    entropy = np.stack(run.entropy)
    layers, heads = entropy.shape[1:]
    for layer in range(layers):
        color = colormaps["viridis"](layer / max(layers - 0.5, 1))
        for head in range(heads):
            label = f"layer {layer + 1}" if head == 0 else None
            axes.plot(run.steps, entropy[:, layer, head], color=color, linewidth=1, label=label)
    axes.axhline(COLLAPSED, color="#d1495b", linewidth=0.8, linestyle="--")
    axes.text(
        run.steps[-1], COLLAPSED, "two keys alike ", color="#d1495b", fontsize=7, ha="right", va="bottom"
    )
    axes.set(xlabel="step", ylim=(0, 1.25 * entropy.max()))
    axes.set_ylabel("entropy, nats", fontsize=9)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper right", ncols=2)
    loss = axes.twinx()
    loss.plot(range(1, len(run.losses) + 1), run.losses, color="#8d96a3", linewidth=0.7)
    loss.set_ylabel("loss, nats a byte", fontsize=9, color="#6b7480")
    loss.set_ylim(0, 1.25 * run.losses[0])  # what it may leap to in the first steps is cut off


def lost(axes, run):
    """What evictions would lose, a point per head."""
    names = list(run.lost)
    for y, found in enumerate(run.lost.values()):
        axes.plot(found.ravel(), np.full(found.size, y), "o", markersize=3, alpha=0.5, color="#00798c")
        axes.plot(found.mean(), y, "|", markersize=16, markeredgewidth=2, color="#d1495b")
    axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel(f"attention lost by keeping {run.kept[0]} of {run.kept[1]} keys", fontsize=9)
    axes.set_title("evictions: each head, and their mean", fontsize=9)


def drawn(reading, runs, path):
    """Rows of squares for each model, then the curves; what is None or empty is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image  # matplotlib needs it too

    rows = [] if reading is None else [("MiniLM, layers", reading.heads, 6, reading.n)]
    if runs:
        rows.append(("GPT, before", runs[0].before, 3, runs[0].context))
        rows += [(f"at rate {run.rate:g}", run.after, 3, run.context) for run in runs]
    heights = [height for *_, height, _ in rows] + ([9] if runs else [])
    figure = pyplot.figure(figsize=(13, 0.36 * sum(heights) + 1.2), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for n, (part, (label, heads, _, length)) in enumerate(zip(parts, rows, strict=False)):
        each = part.subplots(1, len(SHOWN))
        for axes, (name, title) in zip(each, SHOWN.items(), strict=True):
            limit = length / 2 if name == "distance" else 1
            squares(axes, vars(heads)[name], "" if n else title, limit, label if axes is each[0] else "")
    if runs:
        *each, last = parts[-1].subplots(1, len(runs) + 1)
        for axes, run in zip(each, runs, strict=True):
            curves(axes, run, f"GPT, learning rate {run.rate:g}")
        lost(last, runs[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE)  # a third of the bytes
    small.save(path, optimize=True)
