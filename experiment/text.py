"""Values and paths for messages: on one line, and of limited length."""

import os
import reprlib
from collections.abc import Sequence
from typing import Any


def format_value(value: Any) -> str:
    """Format a value as a user would type it: `784 512 10`."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def describe(value: Any) -> str:
    """Describe any value briefly: values from files may be large, nested deeply, or unprintable."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(value.shape)} and type {dtype}"
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # more digits than Python prints
        if isinstance(value, int):
            return f"a number of {value.bit_length()} bits"
        return f"a {type(value).__name__}"


def count(n: int, noun: str) -> str:
    """Count a noun: `1 image`, `2 images`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def format_seconds(seconds: float) -> str:
    """Format a duration: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence: `A, B and C`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def name_path(path: str | os.PathLike) -> str:
    """Format a path for an error message: a long or unprintable one is shortened."""
    text = str(path)
    return text if len(text) <= 300 and text.isprintable() else describe(text)


def format_eps(eps: float) -> str:
    """Format an eps as papers write it: `8/255` if it is k of the 255 grey values and not shorter
    as a decimal number, such as 0.2."""
    text = f"{eps:.6g}"
    grey_values = round(255 * eps)
    if len(text) > 4 and 1 <= grey_values <= 255 and float(eps) == grey_values / 255:
        return f"{grey_values}/255"
    return text
