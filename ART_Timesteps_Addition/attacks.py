"""Attacks by the names of the command line, one mini-batch at a time, and the monitor of their
gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor

from ART_Timesteps_Addition import gradients, torch_attacks
from ART_Timesteps_Addition.names import WITHOUT_GRADIENT
from ART_Timesteps_Addition.pytorch import PyTorchClassifier
from ART_Timesteps_Addition.scaling import SATURATED, SQUARED_ERROR_GAIN, model_gain
from ART_Timesteps_Addition.seeding import seeded
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from data_utils import Task
from energy.dynamics import Neurons
from metrics import margins, norms, project, random_in_ball

STANDARD_ENSEMBLE = ("apgd-ce", "apgd-t", "fab")  # then Square
# These search for the smallest perturbation instead of one within eps.
MINIMAL = ("hopskipjump", "deepfool", "cw")
# These start from the image or, on request, from random points in the ball.
FROM_IMAGE = (evasion.ProjectedGradientDescent, evasion.FastGradientMethod)
# These follow the loss of their classifier; the others have their own.
WITH_LOSS = ("pgd", "fgsm")

# -------------------------------------------------------------------------- attacks by their names
# Each function takes a classifier, an Attack and the size of a mini-batch, and returns an object
# with ART's generate(x, labels): images (n, C, H, W) and one-hot labels -> images.

Builder = Callable[[PyTorchClassifier, Attack, int], Any]


def _ball(attack: Attack, mbs: int) -> dict[str, Any]:
    """The arguments that ART's attacks within eps share."""
    order = np.inf if attack.norm == "inf" else 2
    return {"norm": order, "eps": attack.eps, "batch_size": mbs}


def _pgd(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """From the image itself, in steps of 2.5 eps / iters."""
    return evasion.ProjectedGradientDescent(
        classifier,
        eps_step=2.5 * attack.eps / attack.iters,
        max_iter=attack.iters,
        verbose=False,
        **_ball(attack, mbs),
    )


def _fgsm(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    return evasion.FastGradientMethod(classifier, eps_step=attack.eps, **_ball(attack, mbs))


def _auto_pgd(loss_type: str) -> Builder:
    """Auto-PGD on a loss of ART, from one random start."""

    def build(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
        return evasion.AutoProjectedGradientDescent(
            classifier,
            loss_type=loss_type,
            eps_step=2 * attack.eps,
            max_iter=attack.iters,
            nb_random_init=1,
            verbose=False,
            **_ball(attack, mbs),
        )

    return build


def _square(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """ART's, with `queries` rounds."""
    iterations = attack.queries or attack.iters
    return evasion.SquareAttack(
        classifier, max_iter=iterations, verbose=False, **_ball(attack, mbs)
    )


class HopSkipJump(evasion.HopSkipJump):
    """ART's HopSkipJump. Without a starting image it searches for one in noise, which depends only
    on `start_seed`, not on the other images of the mini-batch."""

    start_seed = 0

    def _init_sample(self, *args: Any) -> Any:
        with seeded(self.start_seed):
            return super()._init_sample(*args)


def _hopskipjump(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """From an image of another class; the number of iterations corresponds to `queries`."""
    return HopSkipJump(
        classifier,
        norm=np.inf if attack.norm == "inf" else 2,
        max_iter=rounds(attack.queries) if attack.queries else attack.iters,
        max_eval=1000,
        init_eval=100,
        batch_size=mbs,
        verbose=False,
    )


def rounds(queries: int) -> int:
    """The number of iterations of HopSkipJump for so many predictions: the n-th needs 100 sqrt(n)
    for its gradient and about 25 for its searches."""
    total = 0.0
    n = 0
    while total < queries:
        n += 1
        total += 100 * math.sqrt(n) + 25
    return max(1, n - 1)


def _deepfool(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    return evasion.DeepFool(classifier, max_iter=attack.iters, batch_size=mbs, verbose=False)


def _carlini_wagner(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """ART's in the 2-norm; in the infinity norm PGD on the same loss, the margin."""
    if attack.norm == "inf":
        return _pgd(_with_margin_loss(classifier), attack, mbs)
    return evasion.CarliniL2Method(classifier, max_iter=attack.iters, batch_size=mbs, verbose=False)


class Margin(torch.nn.Module):
    """The largest other logit minus that of the true class, (mbs,) or reduced: the loss of Carlini
    and Wagner. Labels are one-hot or class indices."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() == 1:
            own = torch.nn.functional.one_hot(labels, logits.size(1)).bool()
        else:
            own = labels > 0.5
        others = logits.masked_fill(own, -math.inf).amax(1)
        margin = others - logits.masked_fill(~own, -math.inf).amax(1)
        if self.reduction == "none":
            return margin
        return margin.sum() if self.reduction == "sum" else margin.mean()


def _with_margin_loss(classifier: PyTorchClassifier) -> PyTorchClassifier:
    return PyTorchClassifier(
        classifier.model,
        Margin(),
        classifier.input_shape,
        classifier.nb_classes,
        classifier.T1,
        classifier.T2,
        clip_values=classifier.clip_values,
        preprocessing=classifier.preprocessing,
        device_type=classifier.device.type,
    )


def _standard_ensemble(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """The standard ensemble of Croce and Hein (2020), by torchattacks and ART."""
    parts = [BUILDERS[name](classifier, attack, mbs) for name in STANDARD_ENSEMBLE]
    return torch_attacks.Ensemble(
        [*parts, torch_attacks.square(classifier, attack, mbs)], classifier, attack
    )


def _arts_ensemble(classifier: PyTorchClassifier, attack: Attack, mbs: int) -> Any:
    """ART's AutoAttack at its defaults, but for iterations and queries."""
    ensemble = evasion.AutoAttack(classifier, **_ball(attack, mbs))
    for part in ensemble.attacks:
        is_square = isinstance(part, evasion.SquareAttack)
        iterations = (attack.queries or 50 * attack.iters) if is_square else attack.iters
        part.set_params(max_iter=iterations, verbose=False)
    return ensemble


BUILDERS: dict[str, Builder] = {
    "pgd": _pgd,
    "fgsm": _fgsm,
    "apgd-ce": _auto_pgd("cross_entropy"),
    "apgd-dlr": _auto_pgd("difference_logits_ratio"),
    "apgd-t": torch_attacks.targeted_apgd,
    "fab": torch_attacks.targeted_fab,
    "square": _square,
    "hopskipjump": _hopskipjump,
    "deepfool": _deepfool,
    "cw": _carlini_wagner,
    "autoattack": _standard_ensemble,
    "art-autoattack": _arts_ensemble,
}

# ------------------------------------------------------------------------------ the attacked model


@dataclasses.dataclass(frozen=True)
class Target:
    """The attacked model.

    loss     that it was trained with
    task     its images, which attacks see in [0, 1], and their normalisation
    T1       time steps of a prediction
    predict  x -> neurons, see `pytorch.Options`
    """

    model: Any
    loss: str
    task: Task
    T1: int
    predict: Callable[[Tensor], Neurons] | None = None

    def classifier(
        self, attack: Attack, method: GradientMethod = GradientMethod()
    ) -> PyTorchClassifier:
        """The classifier that `attack` sees, differentiated by `method`."""
        task = self.task
        # The squared error of correct, saturated output neurons is zero and flat; the
        # cross-entropy never is.
        squared = (
            self.loss == "mse"
            and method.grad == "bptt"
            and method.states == "last"
            and attack.name in WITH_LOSS
        )
        loss: torch.nn.Module = torch.nn.CrossEntropyLoss()
        if squared:
            loss = torch.nn.MSELoss()
        elif method.states == "all":
            loss = torch.nn.NLLLoss()
        if self.loss == "mse" and not squared:
            method = dataclasses.replace(method, gain=SQUARED_ERROR_GAIN * method.gain)
        options = dataclasses.asdict(method)
        steps = options.pop("steps")
        criterion = torch.nn.MSELoss if self.loss == "mse" else torch.nn.CrossEntropyLoss
        mean, std = (
            np.array(value, dtype=np.float32).reshape(-1, 1, 1) for value in (task.mean, task.std)
        )
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return PyTorchClassifier(
            self.model,
            loss,
            (task.channels, task.size, task.size),
            task.classes,
            self.T1,
            steps,
            criterion=criterion(reduction="none"),
            predict=self.predict,
            watch=GradientMonitor(),
            clip_values=_clip_values(attack),
            preprocessing=(mean, std),
            device_type="cpu" if on_cpu else "gpu",
            **options,
        )

    def calibrated(self, attack: Attack, method: GradientMethod, x: np.ndarray) -> GradientMethod:
        """The method with the gain and softness that suit the model, from some images x, (n, C, H,
        W) in [0, 1]."""
        classifier = self.classifier(attack, method)
        chain = self.model.chain(self.loss)
        softness: tuple[float, ...] = ()
        gain = 1.0
        if method.grad == "soft":
            seen = torch.from_numpy(classifier.preprocessed(x))
            seen = seen.to(classifier.device, chain.dtype)
            softness = gradients.softness(chain, seen, self.T1)
        if self.loss == "cel" and len(x):  # outputs of the squared error have a known range
            gain = model_gain(classifier.predict(x))
        return dataclasses.replace(method, gain=gain, softness=softness)

    def classifiers(
        self, attack: Attack, grads: Sequence[str], steps: Sequence[int], start: str, x: np.ndarray
    ) -> dict[str, PyTorchClassifier]:
        """{label: classifier} of every gradient method of `grads`, unrolled through each number of
        `steps`; of an attack without gradients one, under the attack's name. x: the images, (n, C,
        H, W) in [0, 1], that will be attacked."""
        if attack.name in WITHOUT_GRADIENT:
            return {attack.name: self.classifier(attack)}
        found = {}
        for grad in grads:
            method = GradientMethod(grad, start=start)
            if grad in ("smooth", "soft"):
                method = self.calibrated(attack, method, x[:100])
            for count in steps:
                label = grad if len(steps) == 1 else f"{grad}@{count}"
                found[label] = self.classifier(attack, dataclasses.replace(method, steps=count))
        return found


def _clip_values(attack: Attack) -> tuple[float, float] | None:
    if attack.clip:
        return 0.0, 1.0
    if attack.name in ("pgd", "fgsm", "apgd-ce", "apgd-dlr"):
        return None
    # Square takes the range of its noise from the clip values: all that eps allows
    return -attack.eps, 1.0 + attack.eps


def describe_smooth(loss: str) -> str:
    """The gradient method `smooth` of a model trained with `loss`, one line.

    Tables record it among their settings: another wording would start another table."""
    if loss == "mse":
        logits = "ten times the outputs"
    else:
        logits = (
            "the logits, where a softmax saturates scaled to a median gap of about 8 between the "
            f"first two, and of no image above {SATURATED:g}"
        )
    return (
        "the forward pass as it is; backwards, outside of an activation's corners, at least the "
        "slope of an arctangent; no gradient shorter than 1e-5; the cross-entropy of " + logits
    )


class GradientMonitor:
    """Records the images of a mini-batch whose gradient was exactly zero or not finite at any
    iteration.

    Attacks continue with some of the images and do not report which. A gradient is assigned to the
    nearest image of the mini-batch."""

    def __init__(self) -> None:
        self.start(torch.zeros(0, 1))

    def start(self, x: Tensor) -> None:
        """Begin a mini-batch: x, (n, ...), as the model sees it."""
        self.images = x.flatten(1)
        self.masked = np.zeros(len(x), dtype=bool)

    def __call__(self, grad: Tensor, x: Tensor) -> None:
        if not len(self.masked):  # outside of an attack: `start` was not called
            return
        flat = grad.detach().flatten(1)
        bad = ((flat == 0).all(1) | ~torch.isfinite(flat).all(1)).cpu()
        if len(bad) == len(self.masked):
            self.masked |= bad.numpy()
        elif bad.any():
            images = self.images.to(x.device, torch.float32)
            affected = torch.nan_to_num(x[bad.to(x.device)].flatten(1).float())
            self.masked[torch.cdist(affected, images).argmin(1).cpu().numpy()] = True


# ---------------------------------------------------------------------------------------- attacking


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Starting images of HopSkipJump: all attacked images, not only those of one mini-batch.

    images: (n, C, H, W) in [0, 1]; classes: their predicted classes, (n,)."""

    images: np.ndarray
    classes: np.ndarray

    MBS = 100  # independent of --mbs: rounding must not change the starting image

    @classmethod
    def of(cls, classifier: PyTorchClassifier, x: np.ndarray) -> Candidates:
        """All of the images x, (n, C, H, W) in [0, 1]."""
        classes = [np.zeros(0, dtype=np.int64)]
        for i in range(0, len(x), cls.MBS):
            classes.append(classifier.read_out(x[i : i + cls.MBS]).argmax(1))
        return cls(x, np.concatenate(classes))

    def nearest(self, x: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """The starting images for x, (mbs, C, H, W), whose predicted classes are `classes`, (mbs,).

        For each image it is the nearest one (2-norm) with another predicted class, or the image
        itself if there is none. ART starts from noise, which is further away and can have the
        predicted class of the image."""
        flat = torch.from_numpy(self.images).flatten(1)
        starts = x.copy()
        for i, own in enumerate(classes):
            others = np.flatnonzero(self.classes != own)
            if len(others):
                # image by image and without matrix products: the same distances in any mini-batch
                distances = torch.cdist(
                    torch.from_numpy(x[i]).reshape(1, -1),
                    flat,
                    compute_mode="donot_use_mm_for_euclid_dist",
                )[0]
                starts[i] = self.images[others[distances[others].argmin()]]
        return starts


def attack_batch(
    classifier: PyTorchClassifier,
    x: np.ndarray,
    y: np.ndarray,
    attack: Attack,
    seed: Sequence[int],
    candidates: Candidates | None = None,
) -> dict[str, np.ndarray]:
    """Attack the images x, (n, C, H, W) in [0, 1], with true labels y, (n,).

    classifier: of a `Target`. seed: whole numbers, see `seeded`; the first is that of the whole
    attack. candidates: starting images of HopSkipJump, by default the images x.

    Returns for each image x_adv, prediction, margin (see `metrics.margins`) and masked_images
    (whether its gradient was exactly zero or not finite at some iteration).

    Predictions and margins are those of the model's own read-out of the whole mini-batch, as in
    `evaluate`. An image that is misclassified without an attack stays misclassified: if the attack
    corrects its prediction, it is returned unchanged. A restart attacks the images that are still
    classified correctly, and replaces those whose margin it lowers."""

    def read_out(images: np.ndarray) -> np.ndarray:
        with seeded(*seed):  # a model may draw random numbers
            return classifier.read_out(images)

    monitor = classifier.model.options.watch
    n = len(x)
    seen = torch.from_numpy(classifier.preprocessed(x))
    x_adv = x.copy()
    logits = read_out(x)
    masked = np.zeros(n, dtype=bool)
    margin = margins(logits, y)
    right = margin > 0
    starts = x
    if attack.name == "hopskipjump" and attack.eps:
        starts = (candidates or Candidates.of(classifier, x)).nearest(x, logits.argmax(1))
    for run in range(attack.restarts + 1 if attack.eps else 0):
        attacked = margin > 0 if run else np.ones(n, dtype=bool)
        if not attacked.any():
            break
        monitor.start(seen[attacked])
        found = x_adv.copy()
        found[attacked] = _run(
            classifier,
            x[attacked],
            y[attacked],
            attack,
            (*seed, run) if run else seed,
            run > 0,
            starts[attacked],
        )
        found_logits = read_out(found)
        found_margin = margins(found_logits, y)
        if run:
            taken = attacked & (found_margin < margin)
            masked[taken] = monitor.masked[taken[attacked]]
        else:
            taken = right | (found_margin <= 0)
            masked = monitor.masked
        x_adv[taken] = found[taken]
        logits[taken] = found_logits[taken]
        margin[taken] = found_margin[taken]
    return {
        "x_adv": x_adv,
        "prediction": logits.argmax(1) if n else np.zeros(0, dtype=np.int64),
        "margin": margin,
        "masked_images": masked,
    }


def _run(
    classifier: PyTorchClassifier,
    x: np.ndarray,
    y: np.ndarray,
    attack: Attack,
    seed: Sequence[int],
    from_random_point: bool,
    starts: np.ndarray,
) -> np.ndarray:
    """The adversarial examples of one run, (n, C, H, W). starts: starting images of HopSkipJump."""
    norm = attack.norm
    eps = attack.eps
    x_adv = x.copy()
    more = {}
    with seeded(*seed):  # predictions draw random numbers too: ART's data loader does
        labels = np.eye(classifier.nb_classes, dtype=np.float32)[y]
        built = BUILDERS[attack.name](classifier, attack, len(x))
        if from_random_point and isinstance(built, FROM_IMAGE):
            built.set_params(num_random_init=1)
        elif from_random_point and isinstance(built, (evasion.DeepFool, evasion.CarliniL2Method)):
            x_adv = project(x + random_in_ball(x.shape, norm, eps), x, norm, eps, attack.clip)
        if isinstance(built, HopSkipJump):
            built.start_seed = seed[0]
            more["x_adv_init"] = starts
        with np.errstate(divide="ignore", invalid="ignore"):
            x_adv = built.generate(x_adv, labels, **more)
    if attack.name in MINIMAL:  # a perturbation larger than eps is a failure
        within = norms(x_adv - x, norm) <= eps
        x_adv = np.where(within.reshape(-1, 1, 1, 1), x_adv, x)
    return project(x_adv, x, norm, eps, attack.clip)


def summary(parts: Sequence[dict[str, np.ndarray]], x: np.ndarray, norm: str) -> dict[str, Any]:
    """The result of an attack on the images x, (n, C, H, W), from those of its mini-batches.

    For each image `x_adv`, `prediction`, `correct`, `margin`, `masked_images` (gradient exactly
    zero or not finite at some iteration) and `norm` (of the perturbation); over all images the
    shares `masked` and `unmoved` (norm zero), and `mean_norm`, over those that moved."""
    result = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    length = norms(result["x_adv"] - x, norm)
    moved = length > 0
    n = max(len(x), 1)
    return {
        **result,
        "correct": result["margin"] > 0,
        "norm": length,
        "masked": int(result["masked_images"].sum()) / n,
        "unmoved": int((~moved).sum()) / n,
        "mean_norm": float(length[moved].mean()) if moved.any() else 0.0,
    }


def worst_of(results: Sequence[dict[str, Any]], x: np.ndarray, norm: str) -> dict[str, Any]:
    """The `summary` of the strongest attack per image: the first that makes it misclassified or,
    if none does, the one that leaves it the smallest margin.

    An image counts as masked only if its gradient was masked in every attack: one attack with
    usable gradients is enough for the number to be no mere upper bound."""
    margin = [np.where(result["correct"], result["margin"], -np.inf) for result in results]
    strongest = np.argmin(margin, axis=0)
    rows = np.arange(len(x))
    worst = {
        key: np.stack([result[key] for result in results])[strongest, rows]
        for key in ("x_adv", "prediction", "margin")
    }
    worst["masked_images"] = np.all([result["masked_images"] for result in results], axis=0)
    return summary([worst], x, norm)
