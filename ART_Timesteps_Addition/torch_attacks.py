"""Attacks of torchattacks that ART lacks, and ensembles of attacks.

All have the `generate(x, y)` of ART's attacks: images (n, C, H, W) and one-hot labels, NumPy
arrays; returns images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchattacks
from torch import Tensor

from ART_Timesteps_Addition.pytorch import PyTorchClassifier
from ART_Timesteps_Addition.settings import Attack
from metrics import margins, project

MOST_CLASSES = 10  # the standard ensemble targets the nine classes nearest to the image's own


class _UnitCube(torch.nn.Module):
    """A classifier as torchattacks takes it: a module from images in [0, 1] to logits.

    low, width: the range of values that [0, 1] is to the classifier; rescale: see
    `settings.GradientMethod`."""

    def __init__(self, classifier: PyTorchClassifier, low: float, width: float, rescale: bool):
        super().__init__()
        self.place = torch.nn.Parameter(
            torch.empty(0, device=classifier.device), requires_grad=False
        )
        # `exact`: torchattacks tests success on the value that comes with a gradient
        unrolled = classifier.model.with_options(exact=True, rescale=rescale)
        # A tuple hides both from torchattacks, which changes the mode of submodules.
        self._hidden = (classifier, unrolled)
        self.low = low
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        classifier, unrolled = self._hidden
        x = images * self.width + self.low
        for operation in classifier.preprocessing_operations:
            x, _ = operation.forward(x)
        return unrolled(x)


class FromTorch:
    """An attack of torchattacks on a `PyTorchClassifier`, seeded from torch's generator.

    kind: the class in torchattacks; rescale: see `settings.GradientMethod`, False for an attack
    that divides logits by their gradients; options: of the attack."""

    def __init__(
        self,
        kind: Any,
        classifier: PyTorchClassifier,
        attack: Attack,
        rescale: bool = True,
        **options: Any,
    ):
        self.kind = kind
        self.classifier = classifier
        self.attack = attack
        self.rescale = rescale
        self.options = options

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        low, high = (float(value) for value in self.classifier.clip_values)
        width = high - low
        device = self.classifier.device
        attack = self.kind(
            _UnitCube(self.classifier, low, width, self.rescale),
            norm={"2": "L2", "inf": "Linf"}[self.attack.norm],
            eps=self.attack.eps / width,
            seed=int(torch.randint(2**31, ())),
            **self.options,
        )
        images = torch.from_numpy(np.clip((x - low) / width, 0, 1).astype(np.float32)).to(device)
        found = attack(images, torch.from_numpy(y.argmax(1)).to(device))
        return found.detach().cpu().numpy() * width + low


# Builders as those of `attacks`. All images are one mini-batch to torchattacks.


def targeted_apgd(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> FromTorch:
    """Auto-PGD towards each other class in turn, on the difference of logits ratio."""
    return FromTorch(
        torchattacks.APGDT,
        classifier,
        attack,
        steps=attack.iters,
        n_classes=min(classifier.nb_classes, MOST_CLASSES),
    )


def targeted_fab(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> FromTorch:
    """Fast Adaptive Boundary attack towards each other class in turn."""
    return FromTorch(
        torchattacks.FAB,
        classifier,
        attack,
        rescale=False,
        steps=attack.iters,
        n_classes=min(classifier.nb_classes, MOST_CLASSES),
        multi_targeted=True,
    )


def square(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> FromTorch:
    """Square with one prediction per query, where ART's takes three."""
    queries = attack.queries or 50 * attack.iters
    return FromTorch(torchattacks.Square, classifier, attack, n_queries=queries)


class Ensemble:
    """Attacks one after another, each on the images that are still classified correctly. An image
    that none misclassifies is returned with the smallest margin reached."""

    def __init__(self, attacks: Sequence[Any], classifier: PyTorchClassifier, attack: Attack):
        self.attacks = attacks
        self.classifier = classifier
        self.attack = attack

    def generate(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x_adv = x.copy()
        margin = self._margins(x, y)
        for attack in self.attacks:
            left = np.flatnonzero(margin > 0)
            if not len(left):
                break
            found = attack.generate(x[left].copy(), y[left])
            ball = self.attack
            found = project(found, x[left], ball.norm, ball.eps, ball.clip)
            reached = self._margins(found, y[left])
            lower = reached < margin[left]
            x_adv[left[lower]] = found[lower]
            margin[left[lower]] = reached[lower]
        return x_adv

    def _margins(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return margins(self.classifier.read_out(x), y.argmax(1))
