"""ART's attacks by the names of the command line, and the watch over their gradients."""
import numpy as np
import torch
from art.attacks import evasion

NAMES = ("pgd", "fgsm", "apgd-ce", "apgd-dlr", "square", "hopskipjump", "autoattack")
WITHOUT_GRADIENT = ("square", "hopskipjump")  # they only ask for predictions
MINIMAL = ("hopskipjump",)  # they look for the smallest perturbation instead of the worst within a bound


def build(name, classifier, norm, eps, iters, batch_size):
    """ART's attack `name` within the L2 or L-infinity ball of radius `eps` (`norm`: "2" or "inf"), with `iters` iterations: PGD from
    the image itself in steps of 2.5 eps / iters; FGSM in one step; Auto-PGD from one random start; Square and HopSkipJump with
    that many rounds of queries; AutoAttack as Auto-PGD with both losses, then Square, on what is left."""
    order = np.inf if norm == "inf" else 2
    shared = {"norm": order, "batch_size": batch_size, "verbose": False}
    auto = {**shared, "eps": eps, "eps_step": 2 * eps, "max_iter": iters, "nb_random_init": 1}
    if name == "pgd":
        return evasion.ProjectedGradientDescent(classifier, eps=eps, eps_step=2.5 * eps / iters, max_iter=iters, **shared)
    if name == "fgsm":
        return evasion.FastGradientMethod(classifier, norm=order, eps=eps, eps_step=eps, batch_size=batch_size)
    if name in ("apgd-ce", "apgd-dlr"):
        loss = "cross_entropy" if name == "apgd-ce" else "difference_logits_ratio"
        return evasion.AutoProjectedGradientDescent(classifier, loss_type=loss, **auto)
    if name == "square":
        return evasion.SquareAttack(classifier, eps=eps, max_iter=iters, **shared)
    if name == "hopskipjump":
        return evasion.HopSkipJump(classifier, max_iter=iters, max_eval=1000, init_eval=100, **shared)
    attacks = [build(part, classifier, norm, eps, iters, batch_size) for part in ("apgd-ce", "apgd-dlr", "square")]
    return evasion.AutoAttack(classifier, norm=order, eps=eps, eps_step=2 * eps, attacks=attacks, batch_size=batch_size)


def within(x_adv, x, norm, eps, clip):
    """x_adv, brought back into the ball around x (against rounding; ART's attacks should not leave it) and, with `clip`, [0, 1]."""
    delta = (x_adv - x).astype(np.float64)
    delta[~np.isfinite(delta.reshape(len(delta), -1)).all(1)] = 0  # ART's Square can divide by zero: such an attack has failed
    if norm == "inf":
        delta = np.clip(delta, -eps, eps)
    else:
        length = norms(delta, "2").reshape(-1, *[1] * (x.ndim - 1))
        delta = delta * np.minimum(1, eps / np.maximum(length, 1e-30))
    result = (x + delta).astype(np.float32)
    return np.clip(result, 0, 1) if clip else result


def norms(delta, norm):
    """The norm of each image's perturbation, (n,)."""
    flat = np.abs(delta.reshape(len(delta), -1))
    return flat.max(1) if norm == "inf" else np.sqrt((flat.astype(np.float64) ** 2).sum(1))


class Watch:
    """Remembers which images of a batch of n had, at any iteration, a gradient that was exactly zero or not finite."""

    def __init__(self):
        self.start(0)

    def start(self, n):
        self.masked, self.partial = np.zeros(n, dtype=bool), 0

    def __call__(self, grad):
        flat = grad.detach().flatten(1)
        bad = ((flat == 0).all(1) | ~torch.isfinite(flat).all(1)).cpu().numpy()
        if len(bad) == len(self.masked):
            self.masked |= bad
        else:  # an attack went on with some of the images, and does not say which
            self.partial = max(self.partial, int(bad.sum()))

    def count(self):
        return max(int(self.masked.sum()), self.partial)
