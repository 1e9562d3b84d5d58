"""What a notebook shows of a `Seen`: the table of its heads and a small map of each, without any package or program.

The maps are PNG images that are written here, so that an output takes kilobytes; hidden cells are transparent, and so
fit a dark notebook.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from typing import Any

import numpy as np

from .colours import ramp
from .model import Layer, Table, layers, table

HEADS = 16  # maps, and lines of the table, at most
SIDE = 96  # pixels
DECADES = 4


def short_page(seen: Any) -> str:
    """A piece of HTML of a few kilobytes."""
    found = layers(seen)
    whole = "<p><code>.view(tokens=...)</code> makes the whole page.</p>"
    return f"<div>{''.join(_maps(layer, len(found)) for layer in found)}{_rows(table(found))}{whole}</div>"


def _maps(layer: Layer, several: int) -> str:
    if not layer.maps:
        return ""
    coarsest, pictures = layer.maps[0], []
    for h in range(min(layer.heads, max(1, HEADS // several))):
        where = f"{layer.name} " if layer.name else ""
        words = html.escape(f"Map of {where}head {h}: queries down, keys across, dark is much weight")
        data = base64.b64encode(_png(_image(coarsest[0, h]))).decode()
        pictures.append(
            f'<figure style="margin:0"><img width="{SIDE}" height="{SIDE}" style="image-rendering:pixelated;'
            f'border:1px solid #8886" src="data:image/png;base64,{data}" alt="{words}">'
            f"<figcaption>{html.escape(where)}{h}</figcaption></figure>"
        )
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px;margin:6px 0">{"".join(pictures)}</div>'


def _rows(numbers: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in numbers.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_short(x))}</td>" for x in line) + "</tr>"
        for line in numbers.lines[:HEADS]
    )
    more = len(numbers.lines) - HEADS
    rest = f"<p>and {more} more</p>" if more > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}"


def _short(x: Any) -> str:
    return "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def _image(numbers: np.ndarray) -> np.ndarray:
    """Colours (rows, cols, 4) of a map on a logarithmic scale; what is 0 is transparent."""
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in ramp()], np.uint8)
    high = float(numbers.max(initial=0)) or 1.0
    with np.errstate(divide="ignore"):
        share = 1 + np.log10(numbers / high) / DECADES
    place = np.rint(np.clip(np.nan_to_num(share, neginf=0), 0, 1) * (len(colours) - 1)).astype(int)
    alpha = np.where(numbers > 0, 255, 0).astype(np.uint8)
    return np.concatenate([colours[place], alpha[..., None]], axis=-1)


def _png(image: np.ndarray) -> bytes:
    """An image (rows, cols, 4) of bytes as a PNG file (ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, cols, _ = image.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), image.reshape(rows, -1)], axis=1)
    header = struct.pack(">IIBBBBB", cols, rows, 8, 6, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
