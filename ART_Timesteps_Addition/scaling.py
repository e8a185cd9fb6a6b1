"""Scales that keep the gradients of attacks within float32.

The cross-entropy of saturated logits has no slope in float32, and slopes that are multiplied over
time steps underflow. A factor on the logits changes neither the predicted class nor the direction
of an attack. There are two:

- `model_gain`, one power of two for the whole model, brings the logits of a typical image into the
  range of a softmax. Predictions are scaled by it too, so that attacks without gradients, which
  compare losses of different images and iterations, see one scale.
- `limit_gaps`, a factor for each image, keeps the slope of the few images that are still
  saturated. Only the loss whose gradient is taken sees it.

`normalized` scales the backward pass: each image's dL/d(read-out) enters with a size near 1, and
the length of the result, by which attacks divide, never falls below the constant that they add.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Gap between the two largest logits beyond which a softmax in float32 is nearly one-hot.
SATURATED = 14.0
# Outputs of the squared error lie in [0, 1]: as logits of a softmax they hardly differ.
SQUARED_ERROR_GAIN = 10.0
# Least norm of a gradient: ART's attacks add 1e-7 to it before they divide by it.
SMALLEST = 1e-5

Pullback = Callable[[Tensor], Tensor]  # dL/d(read-out), (mbs, classes) -> dL/dx, (mbs, ...)


def _gaps(logits: Tensor) -> Tensor:
    """The largest logit minus the second, (n,)."""
    first, second = logits.topk(2, 1).values.unbind(1)
    return first - second


def model_gain(logits: np.ndarray) -> float:
    """Power-of-two scale for logits whose float32 softmax is saturated, or cannot tell them apart.

    With it the median gap between the two largest of the logits, (n, classes), is between 4 and 8;
    1 where the median is between 1e-3 and SATURATED, not finite, or zero."""
    gap = _gaps(torch.as_tensor(logits).double()).median().item() if len(logits) else 1.0
    if not math.isfinite(gap) or gap == 0 or 1e-3 <= gap <= SATURATED:
        return 1.0
    return 2.0 ** math.floor(math.log2(8 / gap))


def limit_gaps(logits: Tensor) -> Tensor:
    """Logits, (mbs, classes), scaled for each image so that the largest exceeds the second by at
    most SATURATED. The factors are constants to autograd."""
    factor = SATURATED / _gaps(logits.detach()).clamp(min=SATURATED)
    return logits * factor.unsqueeze(1)


def scaled_readout(out: Tensor, loss: str, gain: float) -> Tensor:
    """The read-out of a model trained with `loss`, (mbs, classes), as the logits that attacks see.

    The largest output of each image is subtracted first from outputs of the squared error: if all
    are close to one number, its rounding would hide their differences."""
    if loss == "mse" and gain != 1:
        out = out - out.detach().amax(1, keepdim=True)
    return gain * out


def cross_entropy_slope(out: Tensor, y: Tensor, loss: str) -> Tensor:
    """d cross-entropy / d(read-out), (mbs, classes), scaled to length 1 for each image.

    The slope is computed in float64, from the probabilities of the other classes, so that an image
    with a saturated softmax has a direction too."""
    gain = SQUARED_ERROR_GAIN if loss == "mse" else 1.0
    probabilities = (gain * out.double()).softmax(1)
    own = F.one_hot(y, out.size(1)).bool()
    others = probabilities.masked_fill(own, 0)
    slope = torch.where(own, -others.sum(1, keepdim=True), others)
    return (slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-300)).to(out.dtype)


def normalized(pullback: Pullback) -> Pullback:
    """The pullback within float32, where slopes and dL/d(read-out) are tiny.

    dL/d(read-out) is divided by a power of two, which rounds nothing, and the result multiplied by
    it; no image's gradient is shorter than SMALLEST."""

    def scaled(grad: Tensor) -> Tensor:
        size = grad.abs().amax(1)  # (mbs,)
        size = torch.where(size > 0, torch.frexp(size).exponent.clamp(min=-100), 0).double().exp2()
        result = pullback((grad / size[:, None]).to(grad.dtype)).double()  # (mbs, ...)
        length = result.flatten(1).norm(dim=1).clamp(min=1e-300)
        factor = torch.maximum(size, SMALLEST / length).view(-1, *[1] * (result.dim() - 1))
        return (result * factor).to(grad.dtype)

    return scaled


def belonging_to(predicted: Tensor, out: Tensor, pullback: Pullback) -> Pullback:
    """The pullback of a softened copy, scaled for each image to the prediction.

    The factor is the ratio of the spreads over the classes of the prediction and of the copy's
    read-out `out`, both (mbs, classes)."""
    spread, of_copy = ((o - o.mean(1, keepdim=True)).norm(dim=1) for o in (predicted, out))
    factor = torch.where(of_copy > 0, spread / of_copy, 1.0).unsqueeze(1)
    return lambda grad: pullback(grad * factor)
