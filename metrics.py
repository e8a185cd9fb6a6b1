"""Norms, balls, projections, margins and confidence intervals of robustness measurements.

Batches are (n, ...), one image a row. norm: "2" or "inf"; eps: largest norm of a perturbation, the
size of the ball around an image. The NumPy functions are for images outside of the model; they
compute norms in float64. Functions with names in `_torch` stay on the device and in the dtype of
their batch, and do not wait for the device.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MASKED = 0.01  # share of masked images above which an accuracy is only an upper bound

# ------------------------------------------------------------------------------------------- NumPy


def norms(delta: np.ndarray, norm: str) -> np.ndarray:
    """The norm of each image's perturbation, (n,)."""
    flat = delta.reshape(len(delta), math.prod(delta.shape[1:]))
    if norm == "inf":
        return np.abs(flat).max(1)
    return np.linalg.norm(flat.astype(np.float64), axis=1)


def random_in_ball(shape: Sequence[int], norm: str, eps: float) -> np.ndarray:
    """Perturbations of that shape, (n, ...), uniform in the ball, by NumPy's global generator."""
    if norm == "inf":
        return np.random.uniform(-eps, eps, shape).astype(np.float32)
    direction = np.random.normal(size=shape)
    length = eps * np.random.uniform(size=shape[0]) ** (1 / math.prod(shape[1:]))
    factor = length / np.maximum(norms(direction, "2"), 1e-30)
    return (direction * _per_image(factor, direction)).astype(np.float32)


def project(x_adv: np.ndarray, x: np.ndarray, norm: str, eps: float, clip: bool) -> np.ndarray:
    """x_adv projected onto the ball around x and, with `clip`, onto [0, 1].

    An image with a value that is not finite becomes x: ART's Square can divide by zero."""
    delta = (x_adv.astype(np.float32) - x).astype(np.float64)
    finite = np.isfinite(delta.reshape(len(delta), -1)).all(1)
    delta[~finite] = 0
    if norm == "inf":
        delta = np.clip(delta, -eps, eps)
    else:
        factor = np.minimum(1, eps / np.maximum(norms(delta, "2"), 1e-30))
        delta = delta * _per_image(factor, delta)
    result = (x + delta).astype(np.float32)
    return np.clip(result, 0, 1) if clip else result


def _per_image(values: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(n,) values in a shape that broadcasts over (n, ...) images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def margins(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logit of the true class minus the largest other one, (n,), from logits (n, classes).

    Positive exactly where `argmax` gives the label, also where logits tie or are not finite."""
    rows = np.arange(len(y))
    tiny = np.finfo(np.float64).tiny
    right = logits.argmax(1) == y
    others = np.nan_to_num(logits.astype(np.float64))
    own = others[rows, y]
    others[rows, y] = -np.inf
    margin = own - others.max(1)
    return np.where(right, np.maximum(margin, tiny), np.minimum(margin, -tiny))


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share of n images: (low, high)."""
    from scipy.stats import binomtest

    if not n:
        return 0.0, 1.0
    interval = binomtest(min(round(share * n), n), n).proportion_ci(method="wilson")
    return min(float(interval.low), share), max(float(interval.high), share)


# ------------------------------------------------------------------------------------------- torch


def random_in_ball_torch(shape: Sequence[int], norm: str, eps: float) -> Tensor:
    """Perturbations of that shape, (mbs, C, H, W), uniform in the ball, by torch's generator of
    the CPU: the same on every device."""
    if norm == "inf":
        return (2 * torch.rand(shape) - 1) * eps
    direction = torch.randn(shape)
    length = eps * torch.rand(shape[0]) ** (1 / math.prod(shape[1:]))  # (mbs,)
    return _unit(direction) * length.view(-1, 1, 1, 1)


def steepest_torch(gradient: Tensor, norm: str) -> Tensor:
    """The direction of norm 1, for each image, in which a loss with this gradient rises most."""
    return gradient.sign() if norm == "inf" else _unit(gradient)


def project_torch(x_adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """x_adv, (mbs, C, H, W), projected onto the ball around x, and onto [0, 1]."""
    delta = x_adv - x
    if norm == "inf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp(max=eps)
        delta = _unit(delta) * length.view(-1, 1, 1, 1)
    return (x + delta).clamp(0, 1)


def _unit(delta: Tensor) -> Tensor:
    """Each perturbation, of (mbs, C, H, W), at length 1; zero stays zero."""
    length = delta.flatten(1).norm(dim=1).clamp(min=1e-30)
    return delta / length.view(-1, 1, 1, 1)
