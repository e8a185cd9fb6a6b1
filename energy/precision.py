"""Precision: of float32 products on a CUDA device, and copies of a model in another type."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import backends

Model = TypeVar("Model", bound=nn.Module)

_mkldnn: Any = backends.mkldnn  # their stubs lack the newer settings
_cudnn: Any = backends.cudnn


def set_precision(name: str) -> None:
    """Compute float32 products on a CUDA device in the format `tf32` (10 bits), or exactly.

    PyTorch has an older and a newer setting for this. Code that reads the one after only the other
    was set, as torch.compile does, gets an error: both are set alike."""
    low = name == "tf32"
    _set(
        {
            "matmul": "high" if low else "highest",
            "cudnn": low,
            **dict.fromkeys(_newer(), "tf32" if low else "ieee"),
            "cpu": _mkldnn.matmul.fp32_precision,
        }
    )


def _newer() -> dict[str, Any]:
    return {"cuda.matmul": backends.cuda.matmul, "cudnn.conv": _cudnn.conv, "cudnn.rnn": _cudnn.rnn}


def _set(settings: dict[str, Any]) -> None:
    # the older settings first: they change the newer ones
    torch.set_float32_matmul_precision(settings["matmul"])
    backends.cudnn.allow_tf32 = settings["cudnn"]
    for name, setting in _newer().items():
        setting.fp32_precision = settings[name]
    _mkldnn.matmul.fp32_precision = settings["cpu"]


def _current() -> dict[str, Any]:
    newer = {name: setting.fp32_precision for name, setting in _newer().items()}
    older: dict[str, Any]
    try:
        older = {"matmul": torch.get_float32_matmul_precision(), "cudnn": backends.cudnn.allow_tf32}
    except RuntimeError:  # the caller has set only one of the two
        older = {
            "matmul": "high" if newer["cuda.matmul"] == "tf32" else "highest",
            "cudnn": newer["cudnn.conv"] == "tf32",
        }
    return {**older, **newer, "cpu": _mkldnn.matmul.fp32_precision}


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Within the block float32 products are exact: EP's contrast is a small difference of large
    numbers."""
    if all(setting.fp32_precision == "ieee" for setting in _newer().values()):
        yield
        return
    before = _current()
    set_precision("fp32")
    try:
        yield
    finally:
        _set(before)


def lowered(model: Model, dtype: torch.dtype) -> Model:
    """A copy of the model in another type, which takes its time steps: the bf16 copy."""
    return copy.deepcopy(model).to(dtype)


@torch.no_grad()
def refresh(lower: nn.Module, model: nn.Module) -> None:
    """Copy the model's weights to its copy of `lowered`."""
    torch._foreach_copy_(list(lower.parameters()), list(model.parameters()))
