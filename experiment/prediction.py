"""What a model says of a data set: predictions after free steps, and the loops that count them.

`model` is an energy model; `rule` its `model_utils.Rule`, of which T1, tol and loss count here.
"""
import math
from typing import NamedTuple

import torch

from energy import fast
from energy.dynamics import SETTLED, Phase, relative_change
from experiment.timing import Stopwatch, progress
from experiment.workers import Workers


def free_phase(chain, phase, T, tol=0.0, stopwatch=None, output_in=None):
    """The neurons after T steps from zero; with `tol` after at most T, see `relax_until_settled`. output_in: see
    `energy.fast`."""
    stopwatch = stopwatch or Stopwatch()
    with torch.no_grad(), stopwatch.part("free"):
        neurons, settling = fast.from_zero(chain, phase, T, tol, output_in)
        if settling:
            stopwatch.settling.add(*settling)
        return neurons


@torch.no_grad()
def correct(chain, neurons, y):
    """How many of the mini-batch the neurons classify as `y`, a tensor without dimensions."""
    return (chain.read(neurons).argmax(1) == y).sum()


@torch.no_grad()
def predicting_neurons(model, x, rule, stopwatch=None):
    """The neurons whose read-out is the prediction after rule.T1 free steps; with rule.tol after at most so many, see
    `relax_until_settled`. rule: also its loss counts, which decides whether output neurons have an activation."""
    chain = model.chain(rule.loss)
    return free_phase(chain, Phase(chain.input_drive(x)), rule.T1, rule.tol, stopwatch, output_in=0)


@torch.no_grad()
def evaluate(model, batches, rule, description="evaluating", stopwatch=None, workers=Workers()):
    """The share of images that are classified correctly, see `predicting_neurons`; nan of none. `workers` take whole
    mini-batches in turn, so that each rounds as it does for one."""
    hits, chain = 0, model.chain(rule.loss)
    for x, y in workers.strided(progress(batches, description)):
        hits += correct(chain, predicting_neurons(model, x, rule, stopwatch), y)
    return int(workers.sum(hits)) / batches.samples if batches.samples else math.nan


@torch.no_grad()
def predictions(model, batches, rule, workers=Workers()):
    """The predicted class of every image, (n,), on the CPU; `workers` take whole mini-batches in turn, and all get
    all."""
    chain = model.chain(rule.loss)
    own = [chain.read(predicting_neurons(model, x, rule)).argmax(1).cpu() for x, _ in workers.strided(batches)]
    return torch.cat(workers.gather_strided(own))


@torch.no_grad()
def characteristic(model, batches, rule, eps=SETTLED):
    """After t = 1 ... rule.T1 free steps from zero: the share of images classified correctly, as `evaluate` says it for
    that t, and the share that has settled by then, having moved by less than `eps` in some step (see
    `relative_change`). Two lists of T1."""
    hits, settled = torch.zeros(2, rule.T1, dtype=torch.int64, device=batches.labels.device)
    for x, y in progress(batches, "characteristic"):
        chain = model.chain(rule.loss)
        steps = fast.Steps(chain, Phase(chain.input_drive(x)), None, rule.T1)
        chain, phase, *_ = fast.rewritten(steps)  # to round as `evaluate` does
        neurons, still = chain.zeros(phase.drive), torch.zeros(len(y), dtype=torch.bool, device=x.device)
        for t in range(rule.T1):
            before, neurons = neurons, fast.relax(chain, phase, neurons if t else None, 1)
            still |= relative_change(before, neurons) < eps
            hits[t] += correct(chain, neurons, y)
            settled[t] += still.sum()
    return [[int(count) / batches.samples for count in counts] for counts in (hits, settled)]


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
        return int((self.labels == self.classes).sum()) / len(self.labels) if len(self.labels) else math.nan


@torch.no_grad()
def judgements(model, batches, rule, description="evaluating", stopwatch=None, workers=Workers()):
    """The `Judgements` of a data set, predicted as `evaluate` does; `workers` take whole mini-batches in turn, and all
    get all."""
    stopwatch, own, chain = stopwatch or Stopwatch(), [], model.chain(rule.loss)
    for x, y in workers.strided(progress(batches, description)):
        neurons, settling = fast.from_zero(chain, Phase(chain.input_drive(x)), rule.T1, rule.tol, output_in=0)
        if settling:
            stopwatch.settling.add(*settling)
        steps = settling.steps.cpu() if settling else torch.full((len(y),), rule.T1)
        out = chain.read(neurons)
        certain = out.float().softmax(1) if rule.loss == "cel" else out.float()
        classes = out.argmax(1)
        own.append((y.cpu(), classes.cpu(), certain.gather(1, classes[:, None])[:, 0].cpu(), steps))
    return Judgements(*map(torch.cat, zip(*workers.gather_strided(own), strict=True)))


@torch.no_grad()
def relaxation(model, x, rule):
    """(residual, energy) of one mini-batch over rule.T1 free steps from zero neurons, each a list with an entry per
    step: the relative change in that step, see `relative_change`, and Phi, means over the images. energy is None of a
    vector-field model, which has none."""
    chain, residual, energy = model.chain(rule.loss), [], []
    phase = Phase(chain.input_drive(x))
    neurons = chain.zeros(phase.drive)
    for _ in range(rule.T1):
        before, neurons = neurons, fast.relax(chain, phase, neurons, 1)
        residual.append(relative_change(before, neurons).float().mean().item())
        if not len(model.B_syn):
            energy.append(model.Phi(x, None, neurons, 0.0, rule.loss).float().mean().item())
    return residual, energy or None
