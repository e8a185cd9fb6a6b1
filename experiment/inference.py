"""Inference: predictions after free steps, accuracy over a data set, convergence.

`model` is an energy model or a network of `baselines`; a `Rule` contains the settings of its
predictions (T1, tol, loss)."""

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_utils import Batches
from energy import fast
from energy.dynamics import CONVERGED, WINDOW, Chain, Neurons, Phase, has_converged, relative_change
from energy.rule import UNOBSERVED, Observer, Rule
from experiment.timing import progress
from experiment.workers import Workers


@dataclasses.dataclass
class Convergence:
    """The number of images of a data set that have converged after T1 free steps, see
    `energy.dynamics.has_converged`. It does not depend on --tol.

    model      the measured model, in fp32 even if a bf16 copy predicts
    images     number of measured images
    converged  number of them that have converged"""

    model: Any
    T1: int
    images: int = 0
    converged: int | Tensor = 0

    OF_COPY = 1000  # images to measure if a bf16 copy predicts
    TOLERATED = 0.05  # share of unconverged images without a warning

    def add(self, converged: Tensor) -> None:
        """Count a mini-batch. converged: (mbs,) bool."""
        self.images += len(converged)
        self.converged = self.converged + converged.sum()

    def measure(self, x: Tensor, rule: Rule) -> None:
        """Count the mini-batch x, (mbs, ...), in a free phase of its own."""
        chain = self.model.chain(rule.loss)
        phase = Phase(chain.input_drive(x))
        self.add(fast.relax_and_check(chain, phase, self.T1, ends_early=True)[1])

    def has_enough(self, predicting: Any) -> bool:
        """Whether enough images are measured: an fp32 phase takes several times as long as that of
        the bf16 copy that predicts."""
        return predicting is not self.model and self.images >= self.OF_COPY

    def gather(self, workers: Workers) -> None:
        """Sum the counts over all workers."""
        self.images = int(workers.sum(self.images))
        self.converged = int(workers.sum(self.converged))

    @property
    def percent(self) -> float:
        """The share of the images that have converged, in %."""
        return 100 * int(self.converged) / self.images if self.images else math.nan

    def __str__(self) -> str:
        return f"{self.percent:.2f} % of {self.images} images converged"

    def warning(self, flag: str = "T1") -> str | None:
        """The warning, one line, if too many images have not converged; None otherwise. flag: of
        the number of steps."""
        left = self.images - int(self.converged)
        if left <= self.TOLERATED * self.images:
            return None
        return (
            f"not converged after {flag} = {self.T1} steps: {left} of {self.images} images. EP "
            f"and predictions assume convergence; increase --{flag}"
        )


@torch.no_grad()
def correct(chain: Chain, neurons: Neurons, y: Tensor) -> Tensor:
    """How many of the mini-batch are classified as `y`, a tensor without dimensions."""
    return (chain.read(neurons).argmax(1) == y).sum()


@torch.no_grad()
def _predict(
    model: Any, x: Tensor, rule: Rule, observer: Observer, convergence: Convergence | None
) -> tuple[Neurons, fast.EarlyStop | None]:
    """(the neurons of the prediction; with rule.tol, where each image stopped)."""
    chain = model.chain(rule.loss)
    phase = Phase(chain.input_drive(x))
    if convergence is not None and convergence.model is model and not rule.tol:
        with observer.part("free"):  # one free phase gives both
            neurons, converged = fast.relax_and_check(chain, phase, rule.T1)
        convergence.add(converged)
        return neurons, None
    with observer.part("free"):
        neurons, stop = fast.from_zero(chain, phase, rule.T1, rule.tol, output_in=0)
    if stop is not None:
        observer.count_steps(*stop)
    if convergence is not None and not convergence.has_enough(model):
        convergence.measure(x, rule)
    return neurons, stop


def predicting_neurons(
    model: Any,
    x: Tensor,
    rule: Rule,
    observer: Observer = UNOBSERVED,
    convergence: Convergence | None = None,
) -> Neurons:
    """The neurons whose read-out is the prediction of x, (mbs, ...), after rule.T1 free steps; with
    rule.tol after at most so many. rule.loss decides whether output neurons have an activation.
    convergence: counts the mini-batch."""
    return _predict(model, x, rule, observer, convergence)[0]


@torch.no_grad()
def evaluate(
    model: Any,
    batches: Batches,
    rule: Rule,
    description: str = "evaluating",
    observer: Observer = UNOBSERVED,
    workers: Workers = Workers(),
    convergence: Convergence | None = None,
) -> float:
    """The share of images that are classified correctly, see `predicting_neurons`; nan of none.
    `workers` take whole mini-batches in turn, so that each rounds as a single process does.
    convergence: an empty `Convergence` to count in, over all workers; it changes no prediction."""
    hits: Tensor | int = 0
    chain = model.chain(rule.loss)
    for _, (x, y) in workers.deal(progress(batches, description), in_turn=True):
        hits += correct(chain, predicting_neurons(model, x, rule, observer, convergence), y)
    if convergence is not None:
        convergence.gather(workers)
    return int(workers.sum(hits)) / batches.samples if batches.samples else math.nan


class Predictions(NamedTuple):
    """The prediction for every image of a data set, tensors (n,) on the CPU.

    labels, classes   true and predicted class
    confidence        of the prediction: the softmax probability of the read-out with the loss
                      `cel`, the value of the output neuron with `mse`
    steps             free steps that were taken
    """

    labels: Tensor
    classes: Tensor
    confidence: Tensor
    steps: Tensor

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly; nan of none."""
        return (self.labels == self.classes).double().mean().item()


@torch.no_grad()
def predict(
    model: Any,
    batches: Batches,
    rule: Rule,
    description: str = "evaluating",
    observer: Observer = UNOBSERVED,
    workers: Workers = Workers(),
    convergence: Convergence | None = None,
) -> Predictions:
    """The `Predictions` for a data set, as `evaluate` makes them; `workers` take whole mini-batches
    in turn, and all get all. convergence: as `evaluate` takes it."""
    chain = model.chain(rule.loss)
    own = []
    for place, (x, y) in workers.deal(progress(batches, description), in_turn=True):
        neurons, stop = _predict(model, x, rule, observer, convergence)
        steps = torch.full_like(y, rule.T1) if stop is None else stop.steps
        readout = chain.read(neurons)  # (mbs, classes)
        classes = readout.argmax(1)
        scores = readout.float().softmax(1) if rule.loss == "cel" else readout.float()
        confidence = scores.gather(1, classes[:, None])[:, 0]
        own.append((place, [values.cpu() for values in (y, classes, confidence, steps)]))
    if convergence is not None:
        convergence.gather(workers)
    return Predictions(*map(torch.cat, zip(*workers.gather_dealt(own), strict=True)))


def trajectory(model: Any, x: Tensor, rule: Rule) -> Iterator[Neurons]:
    """Zero neurons, then those after each of rule.T1 free steps on x, (mbs, ...), rounded as
    `evaluate` does."""
    chain = model.chain(rule.loss)
    steps = fast.rewritten(fast.Steps(chain, Phase(chain.input_drive(x)), None, rule.T1))
    yield chain.zeros(steps.phase.drive)
    yield from fast.trajectory(steps.chain, steps.phase, rule.T1)


@torch.no_grad()
def characteristic(
    model: Any,
    batches: Batches,
    rule: Rule,
    eps: float = CONVERGED,
    exact: Any = None,
) -> list[list[float]]:
    """Accuracy and convergence over time, two lists of T1 shares.

    After t = 1 ... rule.T1 free steps from zero: the share of images classified correctly, as
    `evaluate` returns it for that t, and the share that has converged to `eps` by then, see
    `energy.dynamics.has_converged`. exact: the model to measure convergence on if it is another
    one, see `Convergence`."""
    hits = torch.zeros(rule.T1, dtype=torch.int64, device=batches.labels.device)
    converged = torch.zeros_like(hits)
    chain = model.chain(rule.loss)
    for x, y in progress(batches, "characteristic"):
        measured = trajectory(model if exact is None else exact, x, rule)
        other = exact is not None and exact is not model
        predicting = trajectory(model, x, rule) if other else None
        window: collections.deque[Neurons] = collections.deque(maxlen=WINDOW + 1)
        for t, neurons in enumerate(measured, -1):  # those before the first step included
            window.append(neurons)
            prediction = neurons if predicting is None else next(predicting)
            if t < 0:
                continue
            hits[t] += correct(chain, prediction, y)
            converged[t] += has_converged(window[0], neurons, eps).sum()
    return [[int(count) / batches.samples for count in counts] for counts in (hits, converged)]


@torch.no_grad()
def relaxation(model: Any, x: Tensor, rule: Rule) -> tuple[list[float], list[float] | None]:
    """(residual, energy) of one mini-batch after each of rule.T1 free steps from zero neurons: the
    relative change in that step, see `relative_change`, and Phi, means over the images. energy is
    None for a vector-field model, which has none."""
    chain = model.chain(rule.loss)
    phase = Phase(chain.input_drive(x))
    before = chain.zeros(phase.drive)
    residual = []
    energy = []
    for neurons in fast.trajectory(chain, phase, rule.T1):
        residual.append(relative_change(before, neurons).float().mean().item())
        if not len(model.B_syn):
            energy.append(model.Phi(x, None, neurons, 0.0, rule.loss).float().mean().item())
        before = neurons
    return residual, energy or None
