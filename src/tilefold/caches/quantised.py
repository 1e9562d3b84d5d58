"""Keys and values in a quarter or an eighth of their bytes: numbers become codes, and codes numbers again.

Each row, or group of its neighbouring dims, has one float32 scale, so that its largest number has the largest code; 0
is 0, and nothing is shifted. The fact to know: attention over codes is attention over what `dequantise` gives, to the
bit where a call is `invariant`, so all that quantising costs is decided here. Codes are never dequantised as a whole:
the native core decodes a block of keys when it comes to it, or multiplies codes as they lie.

`KVCache` and `PagedKVCache` do so to what is appended where they are made with ``quantised=``. Any other object whose
method `stored` gives `layouts.Stored` with `k_scale` and `v_scale` is a cache of codes too: it writes ``quantise(rows,
kind)`` where it would write rows, and has room for one scale beside each row and head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import door_of, enter, enter_floats, leave
from ..dtypes import CODES, Code, code_of, known, names
from ..layouts import decoded
from ..masks import integer


def quantise(x: Any, kind: str = "int8", *, group: int | None = None) -> tuple[Any, Any]:
    """Codes and scales of an array or tensor, in its own kind.

    Args:
        x: ``(..., dim)``, finite.
        kind: "int8", "float8_e4m3fn" or "int4", of which two lie in a byte: `dim` and `group` must be even then.
        group: how many neighbouring dims share a scale, a divisor of `dim`; None: all of them.

    Returns:
        (codes, scales): codes ``(..., dim)`` in int8 or float8_e4m3fn, or uint8 ``(..., dim / 2)`` for int4, the first
        of two in the low half; scales float32 ``(...)``, or ``(..., dim / group)`` with a `group`. A number is its code
        times its scale. Codes are rounded to nearest, halves to even. Where all numbers are 0, or so small that the
        products would be subnormal, the scale is 0.

    Raises:
        TypeError: x is no array of a supported type, or `kind` no name.
        ValueError: NaN or infinity in x, another `kind`, or a `group` that does not divide.

    >>> codes, scales = quantise(np.float32([[0.5, -1.0, 0.26, 0.0]]))
    >>> codes, scales * 127
    (array([[  64, -127,   33,    0]], dtype=int8), array([1.], dtype=float32))
    """
    code = named("kind", kind)
    array = enter_floats("x", x)
    if array.ndim < 1:
        raise ValueError("x must have at least one dimension, got a single number")
    codes, scale = coded("x", array, code, group, array_type(code.array, x))
    return leave(x, codes), leave(x, scale)


def coded(
    name: str, x: np.ndarray, code: Code, group: int | None, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """What `quantise` does to the argument `name`; `dtype` is the type of the codes' array."""
    groups, size = groups_of(name, x.shape[-1], code, group)
    with np.errstate(over="ignore"):
        numbers = x.astype(np.float32).reshape(*x.shape[:-1], groups, size)
    top = np.abs(numbers).max(axis=-1, initial=0)
    if not np.isfinite(top).all():
        raise ValueError(f"{name} must be finite in float32, got NaN or infinity")
    scale = top / np.float32(code.largest)
    scale[scale < np.finfo(np.float32).tiny / code.least] = 0
    numbers /= np.where(scale > 0, scale, np.float32(np.inf))[..., None]
    codes = _rounded(numbers, code, dtype).reshape(*x.shape[:-1], x.shape[-1] // code.each)
    return codes, scale[..., 0] if group is None else scale


def dequantise(codes: Any, scales: Any, dtype: Any = "float32") -> Any:
    """The numbers that codes stand for, as attention rounds them where queries have the type `dtype`.

    `codes` and `scales` are as `quantise` gives them; the result has the kind of `codes`. Products are rounded to
    float32 and then to `dtype`, which is float16, bfloat16 or float32.

    >>> codes, scales = quantise(np.float32([[0.6, -1.0, 0.26, 0.0]]), "int4", group=2)
    >>> dequantise(codes, scales)
    array([[ 0.5714286, -1.       ,  0.26     ,  0.       ]], dtype=float32)
    """
    array, scale = enter("codes", codes), enter("scales", scales)
    code = code_of(array.dtype)
    if code is None or array.ndim < 1:
        kinds = ", ".join(sorted({c.array for c in CODES.values()}))
        raise TypeError(f"codes must be an array of {kinds}, got {array.dtype.name} {array.shape}")
    if scale.dtype != np.float32:
        raise TypeError(f"scales must be float32, got {scale.dtype.name}")
    rows, dim = array.shape[:-1], array.shape[-1] * code.each
    if scale.shape == rows:
        scale = scale[..., None]
    elif scale.shape[:-1] != rows or not scale.ndim or not scale.shape[-1] or dim % scale.shape[-1]:
        raise ValueError(
            f"scales must have the shape {rows} of codes' rows, or one more axis that divides {dim} dims; "
            f"got {scale.shape}"
        )
    name = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    to = array_type(name, codes) if isinstance(name, str) else np.dtype(name)
    if not known(to) or to == np.float64:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {to}")
    return leave(codes, decoded(array, scale, to))


def named(name: str, kind: Any) -> Code:
    """The codes that the argument `name` asks for."""
    if not isinstance(kind, str):
        raise TypeError(f"{name} must be the name of a type, got {type(kind).__name__}")
    if kind not in CODES:
        raise ValueError(f"{name} must be {', '.join(map(repr, CODES))}, got {kind!r}")
    return CODES[kind]


def groups_of(name: str, dim: int, code: Code, group: Any) -> tuple[int, int]:
    """How many groups the `dim` dims of the argument `name` fall into, each with a scale, and the dims of a group."""
    size = dim if group is None else integer("group", group, 1)
    if group is not None and dim % size:
        raise ValueError(f"group must divide the {dim} dims of {name}, got {group}")
    if dim % code.each:
        raise ValueError(f"{name} must have an even number of dims for {code.name}, got {dim}")
    if size % code.each:
        raise ValueError(f"group must be even for {code.name}, got {group}")
    return 1 if group is None else dim // size, size


def _rounded(ratios: np.ndarray, code: Code, dtype: np.dtype) -> np.ndarray:
    """Codes ``(..., groups, size / each)`` of numbers within +-`largest`, but for a rounding."""
    np.clip(ratios, -code.largest, code.largest, out=ratios)
    if code.name == "float8_e4m3fn":
        return ratios.astype(dtype)
    codes: np.ndarray = np.rint(ratios, out=ratios).astype(np.int8)
    if code.each == 1:
        return codes
    bits = codes.view(np.uint8)
    packed: np.ndarray = (bits[..., ::2] & 15) | bits[..., 1::2] << 4
    return packed


def array_type(name: str, like: Any) -> np.dtype:
    """A NumPy type from its name; for a tensor `like`, types that NumPy does not have are brought."""
    try:
        own: np.dtype = np.dtype(name)
        return own
    except TypeError:
        if (door := door_of(like)) is not None and name in ("bfloat16", "float8_e4m3fn"):
            foreign: np.dtype = door.tensors.brought(name)
            return foreign
        hint = "; it is known once ml_dtypes is imported" if name in ("bfloat16", "float8_e4m3fn") else ""
        raise TypeError(
            f"there is no type {name!r}{hint}; types are {names()} and codes {', '.join(CODES)}"
        ) from None
