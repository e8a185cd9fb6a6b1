"""Projected gradient descent in torch (Madry et al., 2018), for adversarial training.

All of it stays on the model's device. The slope of the cross-entropy is explicit, so that the
gradient by Equilibrium Propagation needs no automatic differentiation.

`--attack pgd` is ART's: the published results depend on its rounding and its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ART_Timesteps_Addition.gradients import METHODS
from ART_Timesteps_Addition.scaling import cross_entropy_slope
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from data_utils import to_device
from energy.precision import exactly
from metrics import project_torch, random_in_ball_torch, steepest_torch


def pgd(gradient: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, attack: Attack) -> Tensor:
    """Adversarial examples of the images x, (mbs, C, H, W) in [0, 1], in attack.iters steps of
    2.5 eps / iters.

    gradient: images -> dL/d(image); start: the first perturbation."""
    step = 2.5 * attack.eps / attack.iters
    x_adv = (x + start).clamp(0, 1)
    for _ in range(attack.iters):
        direction = steepest_torch(gradient(x_adv), attack.norm)
        x_adv = project_torch(x_adv + step * direction, x, attack.norm, attack.eps)
    return x_adv


@dataclasses.dataclass(frozen=True)
class Adversary:
    """PGD on the mini-batches of a training.

    attack      norm, eps and iterations
    method      of the gradient
    loss, T1    of the model's learning rule
    mean, std   of the normalisation of images, (C, 1, 1)
    """

    attack: Attack
    method: GradientMethod
    loss: str
    T1: int
    mean: Tensor
    std: Tensor

    def describe(self, has_steps: bool = True) -> str:
        """The attack, for the log. has_steps: whether the model has time steps."""
        steps = f" through {self.method.steps} steps" if has_steps else ""
        return (
            f"adversarial training: PGD, {self.attack.norm}-norm, eps {self.attack.eps:g}, "
            f"{self.attack.iters} iterations, gradient {self.method.grad}{steps}; train accuracies "
            "are those on adversarial examples"
        )

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Random starts of a mini-batch of that shape, (mbs, C, H, W), on the CPU."""
        return random_in_ball_torch(shape, self.attack.norm, self.attack.eps)

    @torch.no_grad()
    def perturb(self, model: Any, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """Adversarial examples of x, (mbs, C, H, W), normalised as the model sees them, with labels
        y, (mbs,). start: of `draw`."""
        mean = self.mean.to(x)
        std = self.std.to(x)
        start = to_device(start, x.device).to(x)

        def gradient(images: Tensor) -> Tensor:
            with exactly():
                method = METHODS[self.method.grad]
                seen = (images - mean) / std
                out, pullback = method(model, seen, self.loss, self.T1, self.method)
                return pullback(cross_entropy_slope(out, y, self.loss)) / std

        images = (x * std + mean).clamp(0, 1)
        return (pgd(gradient, images, start, self.attack) - mean) / std
