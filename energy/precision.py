"""How exactly products of float32 numbers are computed."""
import contextlib

import torch


def set_precision(name):
    """How float32 products are computed on a CUDA device: `tf32` in that format, with 10 bits of mantissa, otherwise exactly."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32" if name == "tf32" else "ieee"


@contextlib.contextmanager
def exactly():
    """A block whose float32 products are exact: EP's contrast, of weights or of an image, is a small difference of large ones."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    set_precision("fp32")
    try:
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value
