"""Activations: the state of a neuron as a function of its drive.

`register` is the one place where the project learns about an activation: every module that needs
more than its values (saturation, gradients of attacks, figures) reads `CURVES`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Curve:
    """The range of an activation and its steepest point.

    low, high   smallest and largest value
    centre      drive where the slope is largest and the value in the middle of the range
    slope       the slope there
    """

    low: float
    high: float
    centre: float
    slope: float

    @property
    def corners(self) -> tuple[float, float]:
        """The interval of drives in which the tangent at the centre stays within the range."""
        reach = (self.high - self.low) / self.slope / 2
        return self.centre - reach, self.centre + reach


ACTIVATIONS: dict[str, Activation] = {}
CURVES: dict[Activation, Curve] = {}


def register(
    name: str, activation: Activation, *, low: float, high: float, centre: float, slope: float
) -> None:
    """Add an activation under the name of the command line. low to slope: see `Curve`.

    The command line accepts the names of `energy.names`, which it reads without torch. Raises
    ValueError for an empty range and for a slope that is not positive."""
    if not (low < high and slope > 0):
        raise ValueError(
            f"activation {name}: expected low < high and slope > 0, got low {low:g}, high "
            f"{high:g}, slope {slope:g}"
        )
    ACTIVATIONS[name] = activation
    CURVES[activation] = Curve(low, high, centre, slope)


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


register("mysig", my_sigmoid, low=0, high=1, centre=0.5, slope=1)
register("sigmoid", torch.sigmoid, low=0, high=1, centre=0, slope=0.25)
register("tanh", torch.tanh, low=-1, high=1, centre=0, slope=1)
register("hard_sigmoid", hard_sigmoid, low=0, high=1, centre=0.5, slope=1)
register("my_hard_sig", my_hard_sig, low=0, high=1, centre=1, slope=0.5)
register("ctrd_hard_sig", ctrd_hard_sig, low=-0.5, high=0.5, centre=0, slope=1)


class Rescaled(NamedTuple):
    """An activation as another one of an affine drive: activation(x) = base(gain * x + offset)."""

    base: Activation
    gain: float
    offset: Tensor


# Optional: `energy.fast` folds gain and offset into the weights, which saves a pass over memory.
RESCALED: dict[Activation, Rescaled] = {
    my_sigmoid: Rescaled(torch.sigmoid, 4.0, _MINUS_TWO),
    my_hard_sig: Rescaled(hard_sigmoid, 0.5, torch.tensor(0.0)),
}
