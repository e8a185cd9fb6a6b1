"""Attacks by the names of the command line, one mini-batch attacked, and the watch over its
gradients."""

import dataclasses
import math

import numpy as np
import torch
from art.attacks import evasion

from ART_Timesteps_Addition import gradients, torch_attacks
from ART_Timesteps_Addition.measures import (
    GradientMonitor,
    margins,
    norms,
    random_in_ball,
    seeded,
    within,
)
from ART_Timesteps_Addition.pytorch import SATURATED, PyTorchClassifier
from ART_Timesteps_Addition.torch_attacks import Ensemble

NAMES = (
    "pgd",
    "fgsm",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "fab",
    "square",
    "hopskipjump",
    "deepfool",
    "cw",
    "autoattack",
    "art-autoattack",
)
WITHOUT_GRADIENT = ("square", "hopskipjump")  # they only ask for predictions
ENSEMBLE = ("apgd-ce", "apgd-t", "fab")  # the standard one, which ends with Square
ENSEMBLES = (
    "autoattack",
    "art-autoattack",
)  # of 100 iterations and 5000 queries, unless told otherwise
WITH_QUERIES = WITHOUT_GRADIENT + ENSEMBLES
MINIMAL = (
    "hopskipjump",
    "deepfool",
    "cw",
)  # they look for the smallest perturbation instead of one within a bound
FROM_IMAGE = (
    evasion.ProjectedGradientDescent,
    evasion.FastGradientMethod,
)  # and, asked to, from random points
WITH_LOSS = ("pgd", "fgsm")  # which follow the loss of their classifier; the others bring their own


@dataclasses.dataclass(frozen=True)
class Plan:
    """An attack and its budget: name (of NAMES), norm ("2" or "inf"), eps; iters: iterations;
    queries: predictions for each image, of Square and HopSkipJump, None: as many as iterations ask
    for; restarts: further runs, from random points in the ball; clip: whether images stay in [0,
    1]."""

    name: str = "pgd"
    norm: str = "2"
    eps: float = 1.0
    iters: int = 20
    queries: int | None = None
    restarts: int = 0
    clip: bool = True

    @classmethod
    def of(cls, args, eps):
        """That of the command line's arguments. Where they state no iterations they are 20, and 100
        in an ensemble. Where they state no queries they are 5000; with iterations stated 50 for
        each in an ensemble, one elsewhere."""
        name, iters = args.attack, args.attack_iters
        queries = getattr(args, "attack_queries", None)
        if queries is None and name in WITHOUT_GRADIENT and iters is None:
            queries = 5000
        iters = iters or (100 if name in ENSEMBLES else 20)
        if queries is None and name in ENSEMBLES:
            queries = 50 * iters
        return cls(
            name,
            args.attack_norm,
            eps,
            iters,
            queries if name in WITH_QUERIES else None,
            getattr(args, "attack_restarts", 0),
            not args.no_clip,
        )

    def words(self):
        """What runs, for the header of a table."""
        starts = f"; {self.restarts} restarts" if self.restarts else ""
        if self.name == "autoattack":
            return (
                f"one after another on the images that stand: APGD-CE {self.iters} iterations, APGD-T (DLR) and "
                f"FAB-T of at most 9 targets {self.iters} each, Square {self.queries} queries{starts}"
            )
        if self.name == "art-autoattack":
            return (
                f"ART's AutoAttack: APGD-CE and APGD-DLR {self.iters} iterations of 5 starts, DeepFool "
                f"{self.iters}, Square {self.queries} rounds of 5 starts{starts}"
            )
        amount = f"{self.queries} queries" if self.queries else f"{self.iters} iterations"
        return f"{self.name} {amount}{starts}"

    def bounded(self, x_adv, x):
        """See `within`."""
        return within(x_adv.astype(np.float32), x, self.norm, self.eps, self.clip)


def build(name, classifier, norm, eps, iters, batch_size, queries=None):
    """The attack `name` within the L2 or L-infinity ball of radius `eps` (`norm`: "2" or "inf"),
    with `iters` iterations: an object whose generate(x, labels) gives images, as ART's attacks have
    it.

    PGD from the image itself in steps of 2.5 eps / iters; FGSM in one step; Auto-PGD from one
    random start. Square with `queries` rounds, HopSkipJump, from an image of another class, with so
    many iterations as take `queries` predictions; both with `iters` where that is None. The attack
    of Carlini and Wagner is ART's in the 2-norm, in the other PGD on its loss, the margin."""
    order = np.inf if norm == "inf" else 2
    shared = {"norm": order, "batch_size": batch_size, "verbose": False}
    auto = {**shared, "eps": eps, "eps_step": 2 * eps, "max_iter": iters, "nb_random_init": 1}
    pgd = {**shared, "eps": eps, "eps_step": 2.5 * eps / iters, "max_iter": iters}
    makers = {
        "pgd": lambda: evasion.ProjectedGradientDescent(classifier, **pgd),
        "fgsm": lambda: evasion.FastGradientMethod(
            classifier, norm=order, eps=eps, eps_step=eps, batch_size=batch_size
        ),
        "apgd-ce": lambda: evasion.AutoProjectedGradientDescent(
            classifier, loss_type="cross_entropy", **auto
        ),
        "apgd-dlr": lambda: evasion.AutoProjectedGradientDescent(
            classifier, loss_type="difference_logits_ratio", **auto
        ),
        "apgd-t": lambda: torch_attacks.targeted_apgd(classifier, norm, eps, iters),
        "fab": lambda: torch_attacks.targeted_fab(classifier, norm, eps, iters),
        "square": lambda: evasion.SquareAttack(
            classifier, eps=eps, max_iter=queries or iters, **shared
        ),
        "hopskipjump": lambda: HopSkipJump(
            classifier,
            max_iter=rounds(queries) if queries else iters,
            max_eval=1000,
            init_eval=100,
            **shared,
        ),
        "deepfool": lambda: evasion.DeepFool(
            classifier, max_iter=iters, batch_size=batch_size, verbose=False
        ),
        "cw": lambda: (
            evasion.CarliniL2Method(
                classifier, max_iter=iters, batch_size=batch_size, verbose=False
            )
            if norm == "2"
            else evasion.ProjectedGradientDescent(with_margin_loss(classifier), **pgd)
        ),
        "art-autoattack": lambda: _arts_ensemble(
            classifier, order, eps, iters, batch_size, queries
        ),
    }
    if name != "autoattack":
        return makers[name]()
    low, high = classifier.clip_values
    plan, parts = (
        Plan(name, norm, eps, clip=(low, high) == (0, 1)),
        [makers[part]() for part in ENSEMBLE],
    )
    square = torch_attacks.square(classifier, norm, eps, queries or 50 * iters)
    return Ensemble([*parts, square], classifier, plan.bounded, margins)


def _arts_ensemble(classifier, order, eps, iters, batch_size, queries):
    """ART's AutoAttack at its defaults, but for iterations and queries."""
    attack = evasion.AutoAttack(classifier, norm=order, eps=eps, batch_size=batch_size)
    for part in attack.attacks:
        iterations = (queries or 50 * iters) if isinstance(part, evasion.SquareAttack) else iters
        part.set_params(max_iter=iterations, verbose=False)
    return attack


def rounds(queries):
    """How many iterations of HopSkipJump take so many predictions: of the gradient 100 sqrt(n) in
    the n-th, of the searches about 25 in each."""
    total, n = 0.0, 0
    while total < queries:
        n += 1
        total += 100 * math.sqrt(n) + 25
    return max(1, n - 1)


class Margin(torch.nn.Module):
    """By how much the best other class is above the image's own, (mbs,) or their mean, from logits
    and one-hot labels or class indices: the loss of Carlini and Wagner."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, labels):
        own = (
            torch.nn.functional.one_hot(labels, logits.size(1)).bool()
            if labels.dim() == 1
            else labels > 0.5
        )
        margin = logits.masked_fill(own, -math.inf).amax(1) - logits.masked_fill(
            ~own, -math.inf
        ).amax(1)
        return {"mean": torch.mean, "sum": torch.sum, "none": lambda m: m}[self.reduction](margin)


def with_margin_loss(classifier):
    """The classifier with another loss, see `Margin`."""
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


# --------------------------------------------------------------------------------- what is attacked


@dataclasses.dataclass(frozen=True)
class Way:
    """How a gradient is got: grad, softness, start, states and tol as in `pytorch.Options`; steps:
    time steps that it goes through; gain: what logits are multiplied by."""

    grad: str = "bptt"
    softness: tuple = ()
    steps: int = 29
    start: str = "zero"
    states: str = "last"
    gain: float = 1.0
    tol: float = 0.0


def classifiers(model, args, eps, task, x, predict):
    """{label: classifier} of every gradient, args.attack_grad, through every number of steps,
    args.attack_step; of an attack that asks for none one, by its own name. x: the images, (n, C, H,
    W) in [0, 1], that will be attacked; others: see `make_classifier`."""
    found, steps = (
        {},
        args.attack_step if isinstance(args.attack_step, (list, tuple)) else [args.attack_step],
    )
    if args.attack in WITHOUT_GRADIENT:
        return {args.attack: make_classifier(model, args, eps, Way(), task, predict)}
    for grad in args.attack_grad:
        way = Way(grad, start=args.attack_start)
        if grad in ("smooth", "soft"):
            way = calibrated(way, make_classifier(model, args, eps, way, task, predict), x[:100])
        for step in steps:
            label = grad if len(steps) == 1 else f"{grad}@{step}"
            found[label] = make_classifier(
                model, args, eps, dataclasses.replace(way, steps=step), task, predict
            )
    return found


def calibrated(way, classifier, x):
    """The way with the gain and softness that suit a model, judged by some images x, (n, C, H, W)
    in [0, 1]."""
    unrolled, softness, gain = classifier.model, (), 1.0
    if way.grad == "soft":
        seen = classifier._apply_preprocessing(x, y=None, fit=False)[0]
        chain = unrolled.model.chain(unrolled.loss)
        softness = gradients.softness(
            chain, torch.from_numpy(seen).to(classifier.device, chain.dtype), unrolled.T1
        )
    if unrolled.loss == "cel" and len(
        x
    ):  # outputs of the squared error have a range: `make_classifier` stretches it
        gain = logit_gain(classifier.predict(x))
    return dataclasses.replace(way, gain=gain, softness=softness)


def logit_gain(logits):
    """A factor, a power of two, on logits (n, classes) that a softmax in fp32 knows nothing of but
    the first, or no differences at all: with it the median gap between the first two is about 8; 1
    where they are as they should be."""
    first, second = torch.as_tensor(logits).double().topk(2, 1).values.unbind(1)
    gap = (first - second).median().item() if len(first) else 1.0
    if not math.isfinite(gap) or gap == 0 or 1e-3 <= gap <= SATURATED:
        return 1.0
    return 2.0 ** math.floor(math.log2(8 / gap))


SMOOTH = (
    "the forward pass as it is; backwards, outside of an activation's corners, at least the slope of an "
    "arctangent; no gradient shorter than 1e-5; the cross-entropy of "
)


def words_for_smooth(loss):
    """What `smooth` does, for the header of a table. loss: that the model was trained with."""
    return SMOOTH + (
        "ten times the outputs"
        if loss == "mse"
        else "the logits, where a softmax saturates scaled to a "
        f"median gap of about 8 between the first two, and of no image above {SATURATED:g}"
    )


def make_classifier(model, args, eps, way, task, predict=None):
    """The classifier that an attack with bound `eps` by the gradient `way` sees: images in [0, 1],
    normalised as `task` says.

    predict: x -> neurons, see `pytorch.Options`. args: loss (which the model was trained with),
    attack, predict_step, T1, no_clip."""
    # The squared error of hard output neurons is exactly zero, and flat, where they are right;
    # cross-entropy never is.
    squared = (
        args.loss == "mse"
        and way.grad == "bptt"
        and way.states == "last"
        and args.attack in WITH_LOSS
    )
    loss = torch.nn.MSELoss() if squared else torch.nn.CrossEntropyLoss()
    if way.states == "all":
        loss = torch.nn.NLLLoss()
    clip = (0.0, 1.0)
    if (
        args.no_clip
    ):  # Square takes the range of its noise from the clip values: as wide as anything within eps
        clip = None if args.attack in ("pgd", "fgsm", "apgd-ce", "apgd-dlr") else (-eps, 1.0 + eps)
    shape, steps = (task.channels, task.size, task.size), (args.predict_step or args.T1, way.steps)
    mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (task.mean, task.std))
    criterion = (torch.nn.MSELoss if args.loss == "mse" else torch.nn.CrossEntropyLoss)(
        reduction="none"
    )
    return PyTorchClassifier(
        model,
        loss,
        shape,
        task.classes,
        *steps,
        criterion=criterion,
        grad=way.grad,
        softness=way.softness,
        start=way.start,
        states=way.states,
        tol=way.tol,
        predict=predict,
        watch=GradientMonitor(),
        clip_values=clip,
        preprocessing=(mean, std),
        gain=10.0 * way.gain if args.loss == "mse" and not squared else way.gain,
        centred=args.loss == "mse" and not squared,
        device_type="cpu" if next(model.parameters()).device.type == "cpu" else "gpu",
    )


# ---------------------------------------------------------------------------------------- attacking


class HopSkipJump(evasion.HopSkipJump):
    """ART's HopSkipJump. Without a starting image it searches for one in noise, which here depends
    on `start_seed` alone and not on the other images of the mini-batch."""

    start_seed = 0

    def _init_sample(self, *args):
        with seeded(self.start_seed):
            return super()._init_sample(*args)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The images where HopSkipJump may begin: all attacked images, not only those of one
    mini-batch. images: (n, C, H, W) in [0, 1]; classes: their predicted classes, (n,)."""

    images: np.ndarray
    classes: np.ndarray

    MBS = 100  # independent of --mbs: rounding must not decide where an attack begins

    @classmethod
    def of(cls, classifier, x):
        """All of the images x, (n, C, H, W) in [0, 1]."""
        parts = [
            classifier.read_out(x[i : i + cls.MBS]).argmax(1) for i in range(0, len(x), cls.MBS)
        ]
        return cls(x, np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))

    def nearest(self, x, classes):
        """The starting images for x, (mbs, C, H, W), whose predicted classes are `classes`, (mbs,):
        for each image the nearest one (2-norm) with another predicted class, or the image itself
        where there is none. Noise, where ART begins, is further away, and a model can take it for
        the class of the image."""
        flat, starts = torch.from_numpy(self.images).flatten(1), x.copy()
        for i, own in enumerate(classes):
            others = np.flatnonzero(self.classes != own)
            if len(others):
                # image by image and without matrix products: the same distances in every mini-batch
                distances = torch.cdist(
                    torch.from_numpy(x[i]).reshape(1, -1),
                    flat,
                    compute_mode="donot_use_mm_for_euclid_dist",
                )[0]
                starts[i] = self.images[others[distances[others].argmin()]]
        return starts


def attack_batch(classifier, x, y, plan, seed, candidates=None):
    """Attack the images x, (n, C, H, W) in [0, 1], with true labels y, (n,). Returns a dict with,
    for each image, x_adv, prediction, margin (see `margins`) and masked_images (whether its
    gradient was exactly zero or not finite at some iteration).

    classifier: see `make_classifier`. seed: whole numbers, see `seeded`; the first one is that of
    the whole attack. candidates: where HopSkipJump may begin, by default the images x.

    Predictions and margins are those of the model's own read-out, of the whole mini-batch as in
    `evaluate`. An image that is misclassified without an attack stays misclassified: where the
    attack would make it right, it is returned unchanged. A restart attacks the images that are
    still classified correctly, and replaces those that it brings nearer to another class.
    """

    def read_out(images):
        with seeded(*seed):  # a model may draw random numbers
            return classifier.read_out(images)

    watch, n = classifier.model.options.watch, len(x)
    seen = torch.from_numpy(classifier._apply_preprocessing(x, y=None, fit=False)[0])
    x_adv, logits, masked = x.copy(), read_out(x), np.zeros(n, dtype=bool)
    margin = margins(logits, y)
    right, starts = margin > 0, x
    if plan.name == "hopskipjump" and plan.eps:
        starts = (candidates or Candidates.of(classifier, x)).nearest(x, logits.argmax(1))
    for run in range(plan.restarts + 1 if plan.eps else 0):
        attacked = margin > 0 if run else np.ones(n, dtype=bool)
        if not attacked.any():
            break
        watch.start(seen[attacked])
        found = x_adv.copy()
        found[attacked] = _attempt(
            classifier,
            x[attacked],
            y[attacked],
            plan,
            (*seed, run) if run else seed,
            run > 0,
            starts[attacked],
        )
        found_logits = read_out(found)
        found_margin = margins(found_logits, y)
        if run:
            taken = attacked & (found_margin < margin)
            masked[taken] = watch.masked[taken[attacked]]
        else:
            taken, masked = right | (found_margin <= 0), watch.masked
        x_adv[taken], logits[taken] = found[taken], found_logits[taken]
        margin[taken] = found_margin[taken]
    return {
        "x_adv": x_adv,
        "prediction": logits.argmax(1) if n else np.zeros(0, dtype=np.int64),
        "margin": margin,
        "masked_images": masked,
    }


def _attempt(classifier, x, y, plan, seed, from_random_point, starts):
    """The adversarial examples of one run, (n, C, H, W). starts: where HopSkipJump begins."""
    x_adv = x.copy()
    with seeded(*seed):  # of predictions as well, whose data loader draws a number
        labels = np.eye(classifier.nb_classes, dtype=np.float32)[y]
        attack = build(plan.name, classifier, plan.norm, plan.eps, plan.iters, len(x), plan.queries)
        if from_random_point and isinstance(attack, FROM_IMAGE):
            attack.set_params(num_random_init=1)
        elif from_random_point and isinstance(attack, (evasion.DeepFool, evasion.CarliniL2Method)):
            x_adv = plan.bounded(x + random_in_ball(x.shape, plan.norm, plan.eps), x)
        more = {}
        if isinstance(attack, HopSkipJump):
            attack.start_seed, more = seed[0], {"x_adv_init": starts}
        with np.errstate(divide="ignore", invalid="ignore"):
            x_adv = attack.generate(x_adv, labels, **more)
        if plan.name in MINIMAL:  # what takes more than eps is no success within eps
            found = norms(x_adv - x, plan.norm) <= plan.eps
            x_adv = np.where(found.reshape(-1, 1, 1, 1), x_adv, x)
        return plan.bounded(x_adv, x)


def summary(parts, x, norm):
    """The result of an attack on the images x, (n, C, H, W), from those of its mini-batches: for
    each image `x_adv`, `prediction`, `correct`, `margin`, `masked_images` (gradient exactly zero or
    not finite at some iteration) and `norm` (of the perturbation); of all the shares `masked` and
    `unmoved` (norm zero) and `mean_norm`, over those that were moved."""
    result = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    length, n = norms(result["x_adv"] - x, norm), max(len(x), 1)
    moved = length > 0
    return {
        **result,
        "correct": result["margin"] > 0,
        "norm": length,
        "masked": int(result["masked_images"].sum()) / n,
        "unmoved": int((~moved).sum()) / n,
        "mean_norm": float(length[moved].mean()) if moved.any() else 0.0,
    }


def worst_of(results, x, norm):
    """The `summary` of several, each image as the attack left it that decided: the first one that
    broke it, or, where it stands, the one that brought it nearest to another class."""
    decided = np.argmin(
        [np.where(result["correct"], result["margin"], -np.inf) for result in results], axis=0
    )
    keys, rows = ("x_adv", "prediction", "margin", "masked_images"), np.arange(len(x))
    return summary(
        [{key: np.stack([result[key] for result in results])[decided, rows] for key in keys}],
        x,
        norm,
    )
