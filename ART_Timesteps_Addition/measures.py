"""What is measured of attacked images: norms, margins, which gradients were masked; and what an
attack draws."""

import contextlib
import math
import random

import numpy as np
import torch


def within(x_adv, x, norm, eps, clip):
    """x_adv, brought back into the ball around x (against rounding; ART's attacks should not leave
    it) and, with `clip`, [0, 1]."""
    delta = (x_adv - x).astype(np.float64)
    failed = ~np.isfinite(delta.reshape(len(delta), -1)).all(1)  # ART's Square can divide by zero
    delta[failed] = 0
    if norm == "inf":
        delta = np.clip(delta, -eps, eps)
    else:
        length = norms(delta, "2").reshape(-1, *[1] * (x.ndim - 1))
        delta = delta * np.minimum(1, eps / np.maximum(length, 1e-30))
    result = (x + delta).astype(np.float32)
    return np.clip(result, 0, 1) if clip else result


def random_in_ball(shape, norm, eps):
    """Perturbations of that shape, (n, ...), drawn uniformly from the ball by NumPy's generator."""
    if norm == "inf":
        return np.random.uniform(-eps, eps, shape).astype(np.float32)
    direction, size = np.random.normal(size=shape), math.prod(shape[1:])
    radius = (
        eps
        * np.random.uniform(size=shape[0]) ** (1 / size)
        / np.maximum(norms(direction, "2"), 1e-30)
    )
    return (direction * radius.reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


def norms(delta, norm):
    """The norm of each image's perturbation, (n,)."""
    flat = np.abs(delta.reshape(len(delta), math.prod(delta.shape[1:])))
    return flat.max(1) if norm == "inf" else np.sqrt((flat.astype(np.float64) ** 2).sum(1))


def margins(logits, y):
    """By how much the logit of each image's own class is above the best other one, (n,): above 0
    exactly where the image is classified as its label, also where logits tie."""
    rows, tiny = np.arange(len(y)), np.finfo(np.float64).tiny
    right = logits.argmax(1) == y  # of what the model computed, nan included
    logits = np.nan_to_num(logits.astype(np.float64))
    own, others = logits[rows, y], logits.copy()
    others[rows, y] = -np.inf
    margin = own - others.max(1)
    return np.where(right, np.maximum(margin, tiny), np.minimum(margin, -tiny))


class GradientMonitor:
    """Remembers which images of a mini-batch had, at any iteration, a gradient that was exactly
    zero or not finite.

    Attacks go on with some of the images and do not say which: those are the nearest ones of the
    mini-batch."""

    def __init__(self):
        self.start(torch.zeros(0, 1))

    def start(self, x):
        """A mini-batch begins: x, (n, ...), as the model sees it."""
        self.images, self.masked = x.flatten(1), np.zeros(len(x), dtype=bool)

    def __call__(self, grad, x):
        if not len(self.masked):  # no mini-batch was announced: a gradient that no attack asks for
            return
        flat = grad.detach().flatten(1)
        bad = ((flat == 0).all(1) | ~torch.isfinite(flat).all(1)).cpu()
        if len(bad) == len(self.masked):
            self.masked |= bad.numpy()
        elif bad.any():
            images = self.images.to(x.device, torch.float32)
            nearest = torch.cdist(
                torch.nan_to_num(x[bad.to(x.device)].flatten(1).float()), images
            ).argmin(1)
            self.masked[nearest.cpu().numpy()] = True


@contextlib.contextmanager
def seeded(*numbers):
    """A block in which all random draws follow from these whole numbers, of at least 0: those of
    Python, NumPy and PyTorch, and of generators that NumPy would seed from the system, as ART's
    HopSkipJump makes them. Afterwards all are as they were before."""
    sequence = np.random.SeedSequence(numbers)
    system_seeded, default_rng = np.random.RandomState, np.random.default_rng

    def next_seed():
        return sequence.spawn(1)[0].generate_state(4)

    class RandomState(system_seeded):
        def __init__(self, seed=None):
            super().__init__(next_seed() if seed is None else seed)

    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(int(next_seed()[0])), np.random.seed(next_seed())
        torch.default_generator.manual_seed(int(next_seed()[0]))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(int(next_seed()[0]))
        np.random.RandomState = RandomState
        np.random.default_rng = lambda seed=None: default_rng(next_seed() if seed is None else seed)
        try:
            yield
        finally:
            np.random.RandomState, np.random.default_rng = system_seeded, default_rng
            random.setstate(states[0]), np.random.set_state(states[1])
