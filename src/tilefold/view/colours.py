"""One ramp of colours for every picture: even steps to the eye, told apart with any kind of colour vision.

A path through Oklab (Björn Ottosson 2020) from nearly white over green and blue to nearly black, cut into pieces of
equal length: lightness falls all the way, so it also reads in grey. On a dark page the same ramp runs backwards, and
little weight is always what the page's own colour is closest to.
"""

from __future__ import annotations

from functools import cache

import numpy as np

STEPS = 64
_LIGHTNESS = (0.972, 0.21)
_HUE = (168.0, 288.0)  # degrees: green to violet
_CHROMA = 0.112  # what sRGB has all along this path


def _path(t: np.ndarray) -> np.ndarray:
    """Oklab coordinates (n, 3) at places 0 to 1."""
    lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * t
    hue = np.deg2rad(_HUE[0] + (_HUE[1] - _HUE[0]) * t)
    chroma = _CHROMA * np.sin(np.pi * (0.06 + 0.86 * t)) ** 0.9
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)


def to_srgb(lab: np.ndarray) -> np.ndarray:
    """Oklab (n, 3) as sRGB from 0 to 1, not yet clipped."""
    long, medium, short = (lab @ np.array([[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775],
                               [0.2158037573, -0.0638541728, -1.2914855480]])).T ** 3  # fmt: skip
    linear = np.stack([
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    ], axis=1)  # fmt: skip
    low = np.maximum(linear, 0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * low ** (1 / 2.4) - 0.055)


@cache
def _even() -> np.ndarray:
    """The path at places an equal distance apart."""
    t = np.linspace(0, 1, 4097)
    there = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(_path(t), axis=0), axis=1))])
    return _path(np.interp(np.linspace(0, there[-1], STEPS), there, t))


@cache
def ramp() -> tuple[str, ...]:
    """`STEPS` colours as ``#rrggbb``, from little to much on a white page."""
    levels = np.rint(np.clip(to_srgb(_even()), 0, 1) * 255).astype(int)
    return tuple("#" + "".join(f"{c:02x}" for c in colour) for colour in levels)
