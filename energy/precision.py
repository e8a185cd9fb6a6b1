"""How exactly products of float32 numbers are computed."""
import contextlib

import torch
from torch import backends


def set_precision(name):
    """How float32 products are computed on a CUDA device: `tf32` in that format, of 10 bits, otherwise exactly.

    PyTorch has an older and a newer way to say so, and whoever asks by the one for what was said by the other alone,
    as torch.compile does, gets an error: both are told the same."""
    low = name == "tf32"
    _tell({"matmul": "high" if low else "highest", "cudnn": low, **dict.fromkeys(_newer(), "tf32" if low else "ieee"),
           "cpu": backends.mkldnn.matmul.fp32_precision})


def _newer():
    return {"cuda.matmul": backends.cuda.matmul, "cudnn.conv": backends.cudnn.conv, "cudnn.rnn": backends.cudnn.rnn}


def _tell(settings):
    torch.set_float32_matmul_precision(settings["matmul"])  # the older ways first: they change the newer ones
    backends.cudnn.allow_tf32 = settings["cudnn"]
    for name, setting in _newer().items():
        setting.fp32_precision = settings[name]
    backends.mkldnn.matmul.fp32_precision = settings["cpu"]


def _told():
    newer = {name: setting.fp32_precision for name, setting in _newer().items()}
    try:
        older = {"matmul": torch.get_float32_matmul_precision(), "cudnn": backends.cudnn.allow_tf32}
    except RuntimeError:  # someone has told only one of the two
        older = {"matmul": "high" if newer["cuda.matmul"] == "tf32" else "highest",
                 "cudnn": newer["cudnn.conv"] == "tf32"}
    return {**older, **newer, "cpu": backends.mkldnn.matmul.fp32_precision}


@contextlib.contextmanager
def exactly():
    """A block whose float32 products are exact: EP's contrast is a small difference of large ones."""
    if all(setting.fp32_precision == "ieee" for setting in _newer().values()):
        yield
        return
    before = _told()
    set_precision("fp32")
    try:
        yield
    finally:
        _tell(before)
