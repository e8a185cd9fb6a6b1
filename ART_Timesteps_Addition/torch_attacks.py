"""Attacks that the Adversarial Robustness Toolbox has not, from torchattacks; and several attacks
as one. All have the `generate(x, y)` of ART's attacks: images (n, C, H, W) and one-hot labels,
NumPy arrays; returns images."""

import numpy as np
import torch
import torchattacks

MOST_CLASSES = 10  # the standard ensemble goes for the nine classes nearest to the image's own


class _UnitCube(torch.nn.Module):
    """A classifier as torchattacks wants it: a module from images whose values range over [0, 1] to
    logits. low, width: what that range is to the classifier; options: of its `pytorch.Options`,
    changed."""

    def __init__(self, classifier, low, width, **options):
        super().__init__()
        self.place = torch.nn.Parameter(
            torch.empty(0, device=classifier.device), requires_grad=False
        )
        # No submodules: torchattacks changes modes. `exact`, as it stops once it sees its success
        # beside a gradient.
        self._out_of_sight = (classifier, classifier.model.with_options(exact=True, **options))
        self.low, self.width = low, width

    def forward(self, images):
        classifier, unrolled = self._out_of_sight
        x = images * self.width + self.low
        for operation in classifier.preprocessing_operations:
            x, _ = operation.forward(x)
        return unrolled(x)


class FromTorch:
    """An attack of torchattacks on a classifier of ours, reproducible: its seed is drawn from
    torch's generator."""

    def __init__(self, kind, classifier, norm, eps, rescale=True, **options):
        """kind: the class in torchattacks; norm: "2" or "inf"; rescale: see `pytorch.Options`,
        False for an attack that divides logits by their gradients; options: its own."""
        self.kind, self.classifier, self.eps, self.options = kind, classifier, eps, options
        self.rescale = rescale
        self.norm = {"2": "L2", "inf": "Linf"}[norm]

    def generate(self, x, y):
        low, high = (float(value) for value in self.classifier.clip_values)
        width = high - low
        module = _UnitCube(self.classifier, low, width, rescale=self.rescale)
        attack = self.kind(
            module,
            norm=self.norm,
            eps=self.eps / width,
            seed=int(torch.randint(2**31, ())),
            **self.options,
        )
        images = torch.from_numpy(np.clip((x - low) / width, 0, 1).astype(np.float32)).to(
            self.classifier.device
        )
        found = attack(images, torch.from_numpy(y.argmax(1)).to(self.classifier.device))
        return found.detach().cpu().numpy() * width + low


def targeted_apgd(classifier, norm, eps, iters):
    """Auto-PGD towards each other class in turn, with the difference of logits ratio."""
    return FromTorch(
        torchattacks.APGDT, classifier, norm, eps, steps=iters, n_classes=_classes(classifier)
    )


def targeted_fab(classifier, norm, eps, iters):
    """Fast Adaptive Boundary attack towards each other class in turn."""
    classes = _classes(classifier)
    return FromTorch(
        torchattacks.FAB,
        classifier,
        norm,
        eps,
        rescale=False,
        steps=iters,
        n_classes=classes,
        multi_targeted=True,
    )


def square(classifier, norm, eps, queries):
    """Square with so many queries: a prediction each, where ART's takes three."""
    return FromTorch(torchattacks.Square, classifier, norm, eps, n_queries=queries)


def _classes(classifier):
    return min(classifier.nb_classes, MOST_CLASSES)


class Ensemble:
    """Attacks one after another, each on the images that still stand. Of one that none breaks, the
    attempt that came nearest is returned.

    bounded(x_adv, x): brings images back to where they may be; margin(logits, y): how far each
    image is from being misclassified, at most 0 where it is."""

    def __init__(self, attacks, classifier, bounded, margin):
        self.attacks, self.classifier, self.bounded, self.margin = (
            attacks,
            classifier,
            bounded,
            margin,
        )

    def generate(self, x, y):
        x_adv = x.copy()
        margins = self._margins(x, y)
        for attack in self.attacks:
            left = np.flatnonzero(margins > 0)
            if not len(left):
                break
            found = self.bounded(attack.generate(x[left].copy(), y[left]), x[left])
            reached = self._margins(found, y[left])
            nearer = reached < margins[left]
            x_adv[left[nearer]], margins[left[nearer]] = found[nearer], reached[nearer]
        return x_adv

    def _margins(self, x, y):
        return self.margin(self.classifier.read_out(x), y.argmax(1))
