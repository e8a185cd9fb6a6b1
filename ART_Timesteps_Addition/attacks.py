"""ART's attacks by the names of the command line, one mini-batch attacked, and the watch over its gradients."""
import contextlib
import math
import random

import numpy as np
import torch
from art.attacks import evasion

from ART_Timesteps_Addition.pytorch import PyTorchClassifier

NAMES = ("pgd", "fgsm", "apgd-ce", "apgd-dlr", "square", "hopskipjump", "autoattack")
WITHOUT_GRADIENT = ("square", "hopskipjump")  # they only ask for predictions
MINIMAL = ("hopskipjump",)  # they look for the smallest perturbation instead of the worst within a bound


def build(name, classifier, norm, eps, iters, batch_size):
    """ART's attack `name` within the L2 or L-infinity ball of radius `eps` (`norm`: "2" or "inf"), with `iters`
    iterations: PGD from the image itself in steps of 2.5 eps / iters; FGSM in one step; Auto-PGD from one random start;
    Square and HopSkipJump with that many rounds of queries; AutoAttack as Auto-PGD with both losses, then Square, on
    what is left."""
    order = np.inf if norm == "inf" else 2
    shared = {"norm": order, "batch_size": batch_size, "verbose": False}
    auto = {**shared, "eps": eps, "eps_step": 2 * eps, "max_iter": iters, "nb_random_init": 1}
    if name == "pgd":
        step = 2.5 * eps / iters
        return evasion.ProjectedGradientDescent(classifier, eps=eps, eps_step=step, max_iter=iters, **shared)
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
    """x_adv, brought back into the ball around x (against rounding; ART's attacks should not leave it) and, with
    `clip`, [0, 1]."""
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


def norms(delta, norm):
    """The norm of each image's perturbation, (n,)."""
    flat = np.abs(delta.reshape(len(delta), math.prod(delta.shape[1:])))
    return flat.max(1) if norm == "inf" else np.sqrt((flat.astype(np.float64) ** 2).sum(1))


class GradientMonitor:
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


@contextlib.contextmanager
def seeded(*numbers):
    """A block in which all random draws follow from these whole numbers, of at least 0: those of Python, NumPy and
    PyTorch, and of generators that NumPy would seed from the system, as ART's HopSkipJump makes them. Afterwards all
    are as they were before."""
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


def make_classifier(model, criterion, args, eps, grad, task, predict=None):
    """The classifier that an attack with bound `eps` by the gradient `grad` sees: images in [0, 1], normalised as
    `task` says.

    criterion: the loss that the model was trained with; predict: x -> neurons, see `pytorch.Options`.
    args: loss, attack, attack_step, attack_start, predict_step, T1, no_clip.
    """
    # The squared error of hard output neurons is exactly zero, and flat, where they are right; cross-entropy never is.
    loss = torch.nn.MSELoss() if args.loss == "mse" and grad == "bptt" else torch.nn.CrossEntropyLoss()
    clip = (0.0, 1.0)
    if args.no_clip:  # Square takes the range of its noise from the clip values: as wide as anything within eps
        clip = (-eps, 1.0 + eps) if args.attack in ("square", "autoattack", "hopskipjump") else None
    shape, steps = (task.channels, task.size, task.size), (args.predict_step or args.T1, args.attack_step)
    mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (task.mean, task.std))
    return PyTorchClassifier(
        model, loss, shape, task.classes, *steps, criterion=criterion, grad=grad, start=args.attack_start,
        predict=predict, watch=GradientMonitor(), clip_values=clip, preprocessing=(mean, std),
        gain=10.0 if args.loss == "mse" and not isinstance(loss, torch.nn.MSELoss) else 1.0,
        shift=1.0 if args.loss == "mse" and args.attack in ("apgd-ce", "apgd-dlr", "autoattack") else 0.0,
        device_type="cpu" if next(model.parameters()).device.type == "cpu" else "gpu")


def attack_batch(classifier, x, y, args, eps, seed):
    """One attack on the images x, (n, C, H, W) in [0, 1], with true labels y, (n,): {x_adv, adversarial prediction,
    masked count}.

    classifier: see `make_classifier`. args: attack, attack_norm, attack_iters, no_clip. seed: whole numbers, see
    `seeded`.
    """
    watch, norm = classifier.model.options.watch, args.attack_norm
    watch.start(len(x))
    x_adv = x.copy()
    with seeded(*seed):  # of predictions as well, whose data loader draws a number
        if eps and len(x):
            labels = np.eye(classifier.nb_classes, dtype=np.float32)[y]
            with np.errstate(divide="ignore", invalid="ignore"):
                x_adv = build(args.attack, classifier, norm, eps, args.attack_iters, len(x)).generate(x_adv, labels)
            if args.attack in MINIMAL:  # what takes more than eps is no success within eps
                x_adv = np.where((norms(x_adv - x, norm) <= eps).reshape(-1, 1, 1, 1), x_adv, x)
            x_adv = within(x_adv.astype(np.float32), x, norm, eps, not args.no_clip)
        prediction = classifier.predict(x_adv, batch_size=max(len(x), 1)).argmax(1)
    return {"x_adv": x_adv, "prediction": prediction, "masked": watch.count()}


def summary(parts, x, y, norm):
    """The result of an attack on the images x, (n, C, H, W), with labels y, (n,), from those of its mini-batches:
    `correct` (n,) bool, `x_adv`, `prediction`, the shares `masked` (gradient exactly zero or not finite at some
    iteration) and `unmoved` (perturbation zero), and `mean_norm`."""
    n = max(len(x), 1)
    result = {key: np.concatenate([part[key] for part in parts]) for key in ("x_adv", "prediction")}
    moved = norms(result["x_adv"] - x, norm)
    return {**result, "correct": result["prediction"] == y, "masked": sum(part["masked"] for part in parts) / n,
            "unmoved": int((moved == 0).sum()) / n, "mean_norm": float(moved.mean()) if len(x) else 0.0}


def worst_of(results, x, y, norm):
    """The strongest attack on each image, of several results of `summary`: the first one that changes the prediction
    from its label in y, or the first of all. masked: the smallest share."""
    worst = {key: results[0][key].copy() for key in ("x_adv", "prediction")}
    for result in results[1:]:
        better = (worst["prediction"] == y) & (result["prediction"] != y)
        for key in worst:
            worst[key][better] = result[key][better]
    return {**summary([{**worst, "masked": 0}], x, y, norm), "masked": min(result["masked"] for result in results)}
