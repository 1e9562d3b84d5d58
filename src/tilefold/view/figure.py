"""The same as a figure for a paper, by matplotlib: .png, .svg or .pdf of an exact size.

Of one head: its map, with the mass of keys above and the entropy of queries beside it. Of one layer: the maps of its
heads in one scale of colours. Of several layers: layers by heads.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .colours import ramp
from .files import complete
from .model import Layer, is_a, layers, named_tokens, table

KINDS = (".png", ".svg", ".pdf")
DPI = 200
DECADES = 4  # shown below the largest weight
NAMED = 48  # tokens at most that are written along an axis
MOST = 64  # heads in one figure
INK, FAINT = "#2a2c33", "#c9cbd1"


def picture(
    seen: Any, path: Any, *, layer: str | int | None = None, head: int | None = None, sequence: int = 0,
    tokens: Any = None, title: str | None = None, q_lengths: Any = None, kv_lengths: Any = None, width: float = 6.5,
) -> Path:  # fmt: skip
    """Draw what was seen, and return where it is.

    Args:
        seen, tokens, title, q_lengths, kv_lengths: as of `tilefold.view.page`.
        path: ends in .png, .svg or .pdf.
        layer: name or number; needed for heads where there are several layers, of which else an overview is drawn.
        head, sequence: numbers; without a head all heads of the layer are drawn, at most 64.
        width: inches; a PNG has 200 pixels to each.

    >>> import numpy as np, tempfile, tilefold as tf
    >>> from tilefold.view import picture
    >>> q, k = np.random.default_rng(0).normal(size=(2, 4, 100, 16))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     drawn = picture(tf.probe(q, k, tf.heatmap(50, 50), causal=True), folder + "/map.png", head=1)
    ...     print(drawn.name)
    map.png
    """
    path = Path(path)
    check_picture(path)
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 1 <= width <= 100:
        raise ValueError(f"picture: width must be 1 to 100 inches, got {width!r}")
    found = layers(seen, q_lengths, kv_lengths)
    words = named_tokens(tokens, found)
    one = _one(found, layer, head, sequence)
    matplotlib = _matplotlib()
    style = {
        "font.size": 8, "axes.edgecolor": FAINT, "axes.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 2, "ytick.major.size": 2, "svg.fonttype": "none",
        "svg.hashsalt": "tilefold", "axes.titlesize": 8,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        if one is None:
            figure = _overview(found, float(width))
        elif head is None and one.heads > 1:
            figure = _heads(one, sequence, float(width))
        else:
            some = None if words is None else words[sequence if len(words) > 1 else 0]
            figure = _head(one, sequence, head or 0, some, float(width))
        if title is not None:
            figure.suptitle(title, fontweight="bold", fontsize=10)
        kind, drawn = path.suffix.lower()[1:], BytesIO()
        plain = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
        figure.savefig(drawn, format=kind, dpi=DPI, metadata=plain)
    return complete(path, lambda file: file.write(drawn.getvalue()))


def check_picture(path: Path) -> None:
    """ValueError for a file that no figure can be written to, before anything is computed."""
    if path.suffix.lower() not in KINDS:
        raise ValueError(
            f"picture: path must end in {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {str(path)!r}"
        )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        from .page import NEEDS

        raise ModuleNotFoundError(NEEDS.format("the picture", "matplotlib"), name=error.name) from error
    return matplotlib


def _one(found: list[Layer], layer: str | int | None, head: int | None, sequence: int) -> Layer | None:
    """The layer that was asked for; None for an overview of several."""
    names = [some.name for some in found]
    if layer is None:
        if len(found) > 1 and head is None:
            return None
        if len(found) > 1:
            raise ValueError(f"picture: head {head} of which layer? There are {', '.join(map(repr, names))}")
        at = 0
    elif layer in names:
        at = names.index(str(layer))
    elif isinstance(layer, int) and 0 <= layer < len(found):
        at = layer
    else:
        raise ValueError(f"picture: there is no layer {layer!r}; there are {', '.join(map(repr, names))}")
    one = found[at]
    for what, number, there in (("head", head, one.heads), ("sequence", sequence, one.sequences)):
        if number is not None and not 0 <= number < there:
            raise ValueError(f"picture: there is no {what} {number}; there are {there}, counted from 0")
    if not one.maps:
        raise ValueError("picture: seen has no map; probe for tilefold.heatmap(64, 64) too")
    return one


def _new(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(ramp()), name="tilefold").with_extremes(bad=(1, 1, 1, 0))


def _scale(numbers: np.ndarray) -> Any:
    from matplotlib.colors import LogNorm

    there = numbers[numbers > 0]
    high = float(there.max(initial=1e-30))
    low = max(float(there.min(initial=high)), high * 10**-DECADES)
    return LogNorm(low if low < high else high * 10**-DECADES, high, clip=True)


def _draw_map(axes: Any, ends: tuple[int, int], numbers: np.ndarray, norm: Any) -> Any:
    """One map, its bins where their cells lie; what was hidden stays white."""
    rows, cols = (np.arange(n + 1) * length // n for n, length in zip(numbers.shape, ends, strict=True))
    hidden = np.ma.masked_less_equal(numbers, 0)
    mesh = axes.pcolormesh(cols, rows, hidden, norm=norm, cmap=_colours(), rasterized=True)
    axes.set_xlim(0, ends[1])
    axes.set_ylim(ends[0], 0)
    return mesh


def _head(layer: Layer, sequence: int, head: int, tokens: list[str] | None, width: float) -> Any:
    numbers, (queries, keys) = layer.maps[-1][sequence, head], layer.ends[sequence]
    figure = _new(width, width)
    across = next((name for name in layer.keys if is_a(name, ("key_mass",))), None)
    down = next((name for name in layer.rows if is_a(name, ("entropy",))), None)
    grid = figure.add_gridspec(2, 2, width_ratios=(7, 1), height_ratios=(1, 7))
    axes = figure.add_subplot(grid[1, 0])
    mesh = _draw_map(axes, (queries, keys), numbers, _scale(numbers))
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    if across is not None:
        top = figure.add_subplot(grid[0, 0], sharex=axes)
        top.stairs(
            layer.keys[across][sequence, head, :keys], np.arange(keys + 1), fill=True, color=ramp()[30]
        )
        top.set_ylabel(across.replace("_", " "))
        top.tick_params(labelbottom=False)
    if down is not None:
        side = figure.add_subplot(grid[1, 1], sharey=axes)
        side.stairs(
            layer.rows[down][sequence, head, :queries], np.arange(queries + 1), orientation="horizontal", fill=True,
            color=ramp()[30],
        )  # fmt: skip
        side.set_xlabel(f"{down.replace('_', ' ')}, nats")
        side.tick_params(labelleft=False)
    for some in figure.axes[1:]:
        some.spines[["top", "right"]].set_visible(False)
    if tokens is not None:
        _name_ticks(axes, queries, keys, tokens)
    figure.colorbar(
        mesh, ax=figure.axes, shrink=0.6, aspect=40, label="weight", location="bottom"
    ).outline.set_visible(False)
    return figure


def _name_ticks(axes: Any, queries: int, keys: int, tokens: list[str]) -> None:
    """Tokens along the axes where they have room. A dollar sign is a dollar sign."""
    shift = keys - queries
    plain = [token.replace("$", r"\$").replace("\n", "⏎").strip() for token in tokens]
    if keys <= NAMED:
        axes.set_xticks(np.arange(keys) + 0.5, plain[:keys], rotation=90, fontsize=6)
    if queries <= NAMED and shift >= 0:
        axes.set_yticks(np.arange(queries) + 0.5, plain[shift:keys], fontsize=6)


def _heads(layer: Layer, sequence: int, width: float) -> Any:
    if layer.heads > MOST:
        raise ValueError(f"picture: {layer.heads} heads are too many for one figure; give a head")
    numbers = layer.maps[-1][sequence]
    cols = min(layer.heads, max(2, int(np.ceil(np.sqrt(layer.heads * 1.5)))))
    rows = -(-layer.heads // cols)
    figure = _new(width, width * rows / cols + 0.75)
    norm, grid = _scale(numbers), figure.subplots(rows, cols, squeeze=False, sharex=True, sharey=True)
    entropy = next((x for name, x in layer.rows.items() if is_a(name, ("entropy",))), None)
    live, mesh = layer.live(), None
    for h, axes in enumerate(grid.flat):
        if h >= layer.heads:
            axes.set_visible(False)
            continue
        mesh = _draw_map(axes, layer.ends[sequence], numbers[h], norm)
        words = f"head {h}"
        if entropy is not None:
            some = entropy[sequence, h][slice(None) if live is None else live[sequence, h]]
            words += f" · {some.mean() if some.size else 0:.2f} nats"
        axes.set_title(words)
        if h >= layer.heads - cols:
            axes.set_xlabel("key")
        if h % cols == 0:
            axes.set_ylabel("query")
    figure.colorbar(
        mesh, ax=grid, shrink=0.5, aspect=40, label="weight", location="bottom"
    ).outline.set_visible(False)
    return figure


def _overview(found: list[Layer], width: float) -> Any:
    numbers = table(found)
    measure = next((n for n in numbers.header[3:] if n.endswith("mean")), numbers.header[-1])
    column, most = numbers.header.index(measure), max(layer.heads for layer in found)
    grid, line = np.full((len(found), most), np.nan), 0
    for at, layer in enumerate(found):
        every = [numbers.lines[line + n][column] for n in range(layer.sequences * layer.heads)]
        line += len(every)
        some = np.array([np.nan if x is None else x for x in every], float).reshape(
            layer.sequences, layer.heads
        )
        grid[at, : layer.heads] = some.mean(axis=0)
    figure = _new(width, max(2.0, width * len(found) / max(most, 1) * 0.8 + 1.2))
    axes = figure.subplots()
    edges = np.arange(most + 1) - 0.5, np.arange(len(found) + 1) - 0.5
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_invalid(grid), cmap=_colours(), edgecolors="white", linewidth=1.5
    )
    axes.set_yticks(range(len(found)), [layer.name for layer in found])
    axes.set_xticks(range(0, most, max(1, most // 16)))
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("head")
    label = measure.replace("_", " ") + (", nats" if measure.startswith("entropy") else "")
    figure.colorbar(mesh, ax=axes, shrink=0.7, aspect=40, label=label, location="bottom").outline.set_visible(
        False
    )
    return figure
