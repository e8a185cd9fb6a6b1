"""How exactly products of float32 numbers are computed."""
import contextlib

import torch


def set_precision(name):
    """How float32 products are computed on a CUDA device: `tf32` in that format, of 10 bits, otherwise exactly."""
    for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        setting.fp32_precision = "tf32" if name == "tf32" else "ieee"


@contextlib.contextmanager
def exactly():
    """A block whose float32 products are exact: EP's contrast is a small difference of large ones."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    set_precision("fp32")
    try:
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value
