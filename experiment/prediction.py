"""What a model says of a data set: predictions after free steps, and the loops that count them.

`model` is an energy model; `rule` its `model_utils.Rule`, of which T1, tol and loss count here.
"""

import collections
import dataclasses
import math
from typing import Any, NamedTuple

import torch

from energy import fast
from energy.dynamics import CONVERGED, WINDOW, Phase, has_converged, relative_change
from experiment.timing import Stopwatch, progress
from experiment.workers import Workers


def free_phase(chain, phase, T, tol=0.0, stopwatch=None, output_in=None):
    """The neurons after T steps from zero; with `tol` after at most T, see `relax_until_settled`.
    output_in: see `energy.fast`."""
    stopwatch = stopwatch or Stopwatch()
    with torch.no_grad(), stopwatch.part("free"):
        neurons, settling = fast.from_zero(chain, phase, T, tol, output_in)
        if settling:
            stopwatch.settling.add(*settling)
        return neurons


@dataclasses.dataclass
class Convergence:
    """How many images of a data set have converged after T1 free steps, see
    `energy.dynamics.has_converged`.

    model: the one that it is measured on, in fp32 where predictions are made by a bf16 copy;
    images: how many were measured; converged: how many of them have converged. That --tol ends the
    phases of predictions early plays no part."""

    model: Any
    T1: int
    images: int = 0
    converged: int | torch.Tensor = 0

    OF_COPY = 1000  # images after which no more are measured besides the predictions of a bf16 copy
    TOLERATED = 0.05  # share of images that may not have converged without a warning

    def add(self, converged):
        """Count a mini-batch. converged: (mbs,) bool."""
        self.images, self.converged = self.images + len(converged), self.converged + converged.sum()

    def measure(self, x, rule):
        """Count the mini-batch x, (mbs, ...), in a free phase of its own."""
        chain = self.model.chain(rule.loss)
        phase = Phase(chain.input_drive(x))
        self.add(fast.relax_and_check(chain, phase, self.T1, ends_early=True)[1])

    def gather(self, workers):
        """Make the count of each worker that of all workers."""
        self.images, self.converged = (
            int(workers.sum(count)) for count in (self.images, self.converged)
        )

    @property
    def percent(self):
        """The share of the images that have converged, in %."""
        return 100 * int(self.converged) / self.images if self.images else math.nan

    def __str__(self):
        return f"{self.percent:.2f} % of {self.images} images converged"

    def warning(self, flag="T1"):
        """The warning, one line, where too many images have not converged; None where they have.
        flag: that gave the number of steps."""
        moving = self.images - int(self.converged)
        if moving <= self.TOLERATED * self.images:
            return None
        return (
            f"not converged after {flag} = {self.T1} steps: {moving} of {self.images} images. EP and predictions "
            f"assume convergence; increase --{flag}"
        )


@torch.no_grad()
def correct(chain, neurons, y):
    """How many of the mini-batch the neurons classify as `y`, a tensor without dimensions."""
    return (chain.read(neurons).argmax(1) == y).sum()


@torch.no_grad()
def predicting_neurons(model, x, rule, stopwatch=None, convergence=None):
    """The neurons whose read-out is the prediction after rule.T1 free steps; with rule.tol after at
    most so many, see `relax_until_settled`. rule: also its loss counts, which decides whether
    output neurons have an activation. convergence: a `Convergence` that counts the mini-batch."""
    stopwatch, chain = stopwatch or Stopwatch(), model.chain(rule.loss)
    phase = Phase(chain.input_drive(x))
    if convergence is None or rule.tol or convergence.model is not model:
        neurons = free_phase(chain, phase, rule.T1, rule.tol, stopwatch, output_in=0)
        # in fp32 a free phase takes several times as long as that of a bf16 copy
        of_copy = convergence is not None and convergence.model is not model
        if convergence is not None and not (of_copy and convergence.images >= convergence.OF_COPY):
            convergence.measure(x, rule)
        return neurons
    with stopwatch.part("free"):  # one free phase gives both
        neurons, converged = fast.relax_and_check(chain, phase, rule.T1)
        convergence.add(converged)
        return neurons


@torch.no_grad()
def evaluate(
    model,
    batches,
    rule,
    description="evaluating",
    stopwatch=None,
    workers=Workers(),
    convergence=None,
):
    """The share of images that are classified correctly, see `predicting_neurons`; nan of none.
    `workers` take whole mini-batches in turn, so that each rounds as it does for one. convergence:
    an empty `Convergence` to count in, over all workers; it changes no prediction."""
    hits, chain = 0, model.chain(rule.loss)
    for x, y in workers.strided(progress(batches, description)):
        hits += correct(chain, predicting_neurons(model, x, rule, stopwatch, convergence), y)
    if convergence is not None:
        convergence.gather(workers)
    return int(workers.sum(hits)) / batches.samples if batches.samples else math.nan


@torch.no_grad()
def predictions(model, batches, rule, workers=Workers(), convergence=None):
    """The predicted class of every image, (n,), on the CPU; `workers` take whole mini-batches in
    turn, and all get all. convergence: as `evaluate` takes it."""
    chain = model.chain(rule.loss)
    own = [
        chain.read(predicting_neurons(model, x, rule, None, convergence)).argmax(1).cpu()
        for x, _ in workers.strided(batches)
    ]
    if convergence is not None:
        convergence.gather(workers)
    return torch.cat(workers.gather_strided(own))


@torch.no_grad()
def characteristic(model, batches, rule, eps=CONVERGED, exact=None):
    """After t = 1 ... rule.T1 free steps from zero: the share of images classified correctly, as
    `evaluate` gives it for that t, and the share that has converged to `eps` by then, see
    `energy.dynamics.has_converged`. Two lists of T1. exact: the model to measure convergence on,
    where that is another, see `Convergence`."""
    hits, converged = torch.zeros(2, rule.T1, dtype=torch.int64, device=batches.labels.device)
    for x, y in progress(batches, "characteristic"):
        chain, recent = model.chain(rule.loss), collections.deque(maxlen=WINDOW + 1)
        measured = trajectory(model if exact is None else exact, x, rule)
        others = None if exact is None or exact is model else trajectory(model, x, rule)
        for t, neurons in enumerate(measured):
            recent.append(neurons)
            predicting = next(others) if others else neurons
            if t:
                hits[t - 1] += correct(chain, predicting, y)
                converged[t - 1] += has_converged(recent[0], neurons, eps).sum()
    return [[int(count) / batches.samples for count in counts] for counts in (hits, converged)]


def trajectory(model, x, rule):
    """The neurons of rule.T1 free steps from zero, one after another, those before the first step
    included; rounded as `evaluate` does."""
    chain = model.chain(rule.loss)
    chain, phase, *_ = fast.rewritten(fast.Steps(chain, Phase(chain.input_drive(x)), None, rule.T1))
    neurons = chain.zeros(phase.drive)
    yield neurons
    for t in range(rule.T1):
        neurons = fast.relax(chain, phase, neurons if t else None, 1)
        yield neurons


class Judgements(NamedTuple):
    """What a model says of every image of a data set, tensors (n,) on the CPU.

    labels, classes   true and predicted class
    confidence        of the prediction: with the loss `cel` the softmax probability of the read-out, with `mse` the
                      value of the output neuron
    steps             free steps that were taken
    """

    labels: torch.Tensor
    classes: torch.Tensor
    confidence: torch.Tensor
    steps: torch.Tensor

    @property
    def accuracy(self):
        """The share of images classified correctly; nan of none."""
        return (
            int((self.labels == self.classes).sum()) / len(self.labels)
            if len(self.labels)
            else math.nan
        )


@torch.no_grad()
def judgements(
    model,
    batches,
    rule,
    description="evaluating",
    stopwatch=None,
    workers=Workers(),
    convergence=None,
):
    """The `Judgements` of a data set, predicted as `evaluate` does; `workers` take whole
    mini-batches in turn, and all get all. convergence: as `evaluate` takes it."""
    stopwatch, own, chain = stopwatch or Stopwatch(), [], model.chain(rule.loss)
    for x, y in workers.strided(progress(batches, description)):
        if rule.tol:
            neurons, settling = fast.from_zero(
                chain, Phase(chain.input_drive(x)), rule.T1, rule.tol
            )
            stopwatch.settling.add(*settling)
            steps = settling.steps.cpu()
            if convergence is not None:
                convergence.measure(x, rule)
        else:
            neurons, steps = (
                predicting_neurons(model, x, rule, None, convergence),
                torch.full((len(y),), rule.T1),
            )
        out = chain.read(neurons)
        certain = out.float().softmax(1) if rule.loss == "cel" else out.float()
        classes = out.argmax(1)
        own.append((y.cpu(), classes.cpu(), certain.gather(1, classes[:, None])[:, 0].cpu(), steps))
    if convergence is not None:
        convergence.gather(workers)
    return Judgements(*map(torch.cat, zip(*workers.gather_strided(own), strict=True)))


@torch.no_grad()
def relaxation(model, x, rule):
    """(residual, energy) of one mini-batch over rule.T1 free steps from zero neurons, each a list
    with an entry per step: the relative change in that step, see `relative_change`, and Phi, means
    over the images. energy is None of a vector-field model, which has none."""
    chain, residual, energy = model.chain(rule.loss), [], []
    phase = Phase(chain.input_drive(x))
    neurons = chain.zeros(phase.drive)
    for _ in range(rule.T1):
        before, neurons = neurons, fast.relax(chain, phase, neurons, 1)
        residual.append(relative_change(before, neurons).float().mean().item())
        if not len(model.B_syn):
            energy.append(model.Phi(x, None, neurons, 0.0, rule.loss).float().mean().item())
    return residual, energy or None
