"""Measurements as a picture: share of peak per scenario and peer, bars with their numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .machine import fingerprint
from .report import rate, seconds
from .timing import Run

COLOURS = {
    "naive": "#b8b4ac",
    "tilefold": "#0f6fb5",
    "torch": "#e07b39",
    "jax": "#6a9f58",
    "onnxruntime": "#8d6cab",
    "openvino": "#3f9ea3",
    "zentorch": "#c4607f",
    "vllm": "#a08a3c",
}


def check_picture(path: Path) -> None:
    """ValueError for a file that no picture can be written to, before anything is measured."""
    if path.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise ValueError(f"--plot must end in .svg, .png or .pdf, got {str(path)!r}")


def plot(run: Run, path: Path) -> None:
    """Draw the run; rows whose roof nothing measured have no bar."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [m for m in run.measured if m.error is not None]
    names = list(dict.fromkeys(m.scenario.name for m in rows))
    peers = list(dict.fromkeys(m.peer.name for m in rows))
    with pyplot.rc_context({"font.family": "sans-serif", "svg.fonttype": "none", "font.size": 9}):
        thick = 0.8 / len(peers)
        figure, axes = pyplot.subplots(figsize=(8, 1.3 + 0.28 * len(names) * (len(peers) + 0.6)))
        for m in rows:
            at = names.index(m.scenario.name) + (peers.index(m.peer.name) - (len(peers) - 1) / 2) * thick
            share = 100 * (run.share(m) or 0.0)
            axes.barh(at, share, thick * 0.88, color=COLOURS.get(m.peer.name, "#888888"))
            label = f"{seconds(m.median)}" if m.ok else "wrong result"
            axes.text(share, at, f"  {share:.0f}%  {label}", va="center", color="#444444", fontsize=7.5)
        _dress(axes, names, run)
        shown = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS.get(p, "#888888")) for p in peers]
        columns = min(len(peers), 5)
        figure.legend(
            shown, peers, frameon=False, ncols=columns, loc="upper right", bbox_to_anchor=(0.98, 0.985)
        )
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _dress(axes: Any, names: list[str], run: Run) -> None:
    machine = fingerprint()
    axes.set_yticks(range(len(names)), [re.sub(r",(?=[a-z])", "  ", name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16, y=0.02)
    axes.xaxis.set_major_formatter("{x:.0f}%")
    axes.set_xlabel(
        f"share of the measured peak, {_roofs(run)}\n{machine['cpu']}, threads: {run.peaks.threads}",
        color="#444444",
    )
    axes.set_title(f"Attention, {run.dtype}", loc="left", fontweight="bold")
    axes.tick_params(length=0)
    axes.grid(axis="x", color="#e8e6e1", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#999999")


def _roofs(run: Run) -> str:
    names = dict.fromkeys(name for m in run.measured if (name := run.peaks.roof(m.scenario)) is not None)
    return ", ".join(rate(run.peaks.best(name) or 0.0, name.startswith("read")) for name in names)
