"""Activations: the state of a neuron as a function of its drive."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def affine(x: Tensor, gain: float, offset: Tensor) -> Tensor:
    """gain * x + offset in one pass over memory. x: any shape; offset: a scalar tensor."""
    return torch.add(offset, x, alpha=gain)


_MINUS_TWO = torch.tensor(-2.0)


def my_sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-4 (x - 1/2))): the logistic function of slope 1 at 1/2."""
    return affine(x, 4, _MINUS_TWO).sigmoid_()


# The hard functions use hardtanh, not clamp: its slope at both corners is 0, as in the published
# models.
def hard_sigmoid(x: Tensor) -> Tensor:
    """(1 + hardtanh(2x - 1)) / 2, which is x clipped to [0, 1]."""
    return F.hardtanh(x, 0.0, 1.0)


def my_hard_sig(x: Tensor) -> Tensor:
    """(1 + hardtanh(x - 1)) / 2, which is x / 2 clipped to [0, 1]."""
    return F.hardtanh(x, 0.0, 2.0).mul_(0.5)


def ctrd_hard_sig(x: Tensor) -> Tensor:
    """hardtanh(2x) / 2, which is x clipped to [-1/2, 1/2]."""
    return F.hardtanh(x, -0.5, 0.5)


ACTIVATIONS: dict[str, Activation] = {
    "mysig": my_sigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hard_sigmoid": hard_sigmoid,
    "my_hard_sig": my_hard_sig,
    "ctrd_hard_sig": ctrd_hard_sig,
}


class Rescaled(NamedTuple):
    """An activation as another one of an affine drive: activation(x) = base(gain * x + offset)."""

    base: Activation
    gain: float
    offset: Tensor


RESCALED: dict[Activation, Rescaled] = {
    my_sigmoid: Rescaled(torch.sigmoid, 4.0, _MINUS_TWO),
    my_hard_sig: Rescaled(hard_sigmoid, 0.5, torch.tensor(0.0)),
}

# activation: (smallest, largest value)
RANGES: dict[Activation, tuple[float, float]] = {
    my_sigmoid: (0.0, 1.0),
    torch.sigmoid: (0.0, 1.0),
    torch.tanh: (-1.0, 1.0),
    hard_sigmoid: (0.0, 1.0),
    my_hard_sig: (0.0, 1.0),
    ctrd_hard_sig: (-0.5, 0.5),
}
