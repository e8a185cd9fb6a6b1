"""Learning rules: Equilibrium Propagation, its continual form, back-propagation through time, and
back-propagation.

Of all: model: an energy model of `model_utils` or a network of `baselines`; x: (mbs, ...), y: class
indices (mbs,); masks: of dropout, see `model_utils.draw_masks`; twin: a copy of the model in lower
precision that the time steps are left to; stopwatch: where the time goes, and how many steps free
phases take. They fill p.grad and return the neurons of the free phase."""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from energy import fast
from energy.dynamics import Phase
from energy.precision import exactly
from experiment.prediction import free_phase
from experiment.timing import Stopwatch

EMPTY = "the mini-batch is empty: it has no gradient"


def loss_name(criterion):
    """`mse` or `cel` for a loss of PyTorch (or for such a name)."""
    return (
        criterion
        if isinstance(criterion, str)
        else "mse"
        if isinstance(criterion, nn.MSELoss)
        else "cel"
    )


def readout_loss(out, y, loss):
    """L of each sample, (mbs,): 0.5 * ||read-out - onehot(y)||^2 for `mse`, the cross-entropy of
    the read-out for `cel`. y: (mbs,)."""
    if loss == "mse":
        return 0.5 * (out - F.one_hot(y, out.size(1)).to(out.dtype)).square().sum(1)
    return F.cross_entropy(out, y, reduction="none")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a model learns: the arguments of the same names (see `--help`)."""

    alg: str = "EP"
    T1: int = 20
    T2: int = 4
    betas: tuple = (0.0, 0.01)
    loss: str = "mse"
    thirdphase: bool = False
    random_sign: bool = False
    tol: float = 0.0
    dropouts: tuple | None = None

    @classmethod
    def of(cls, args):
        """That of the command line's arguments."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


@torch.no_grad()
def ep_gradients(model, x, y, rule, masks=None, twin=None, stopwatch=None):
    """Equilibrium Propagation on one mini-batch: fills p.grad and returns the free neurons.

    A free phase of T1 steps at betas[0] from zero neurons; from there a nudged phase of T2 steps at
    betas[1], and with `thirdphase` a second one at -betas[1], whose contrast has no error of first
    order in beta."""
    stopwatch, moving, (beta_1, beta_2) = stopwatch or Stopwatch(), twin or model, rule.betas
    chain = moving.chain(rule.loss, masks)
    drive = chain.input_drive(x)
    free = free_phase(
        chain, moving.phase(drive, y, beta_1, rule.loss), rule.T1, rule.tol, stopwatch
    )
    with stopwatch.part("nudged"):
        nudging = moving.phase(drive, y, beta_2, rule.loss)
        if rule.thirdphase:
            states = [free, *fast.relax_both_signs(chain, nudging, free, rule.T2)]
        else:
            states = [free, fast.relax(chain, nudging, free, rule.T2)]
    with stopwatch.part("update"), exactly():
        dtype = model.synapses[0].weight.dtype
        free, nudged, *opposite = ([s.to(dtype) for s in state] for state in states)
        if rule.thirdphase:
            model.compute_syn_grads(
                x, y, free, nudged, (beta_2, -beta_2), rule.loss, neurons_3=opposite[0], masks=masks
            )
        else:
            model.compute_syn_grads(x, y, free, nudged, rule.betas, rule.loss, masks=masks)
    return free


def bptt_gradients(model, x, y, rule, masks=None, twin=None, stopwatch=None):
    """Back-propagation through the last T2 of T1 free steps on one mini-batch: fills p.grad and
    returns the neurons, of which the output is as of T1 steps (the layers below it as of a few
    steps earlier, see `energy.fast`)."""
    if not len(x):
        raise ValueError(EMPTY)
    stopwatch, moving, neurons = stopwatch or Stopwatch(), twin or model, None
    chain = moving.chain(rule.loss, masks)
    if rule.T1 > rule.T2:
        with torch.no_grad():
            drive = chain.input_drive(x)
        neurons = free_phase(
            chain, Phase(drive), rule.T1 - rule.T2, rule.tol, stopwatch, output_in=rule.T2
        )
    with stopwatch.part("BPTT"):
        neurons = fast.relax(chain, Phase(chain.input_drive(x)), neurons, rule.T2, output_in=0)
        moving.zero_grad()
        readout_loss(chain.read(neurons), y, rule.loss).mean().backward()
        for p, q in zip(model.parameters(), moving.parameters()):
            if q.grad is None:  # T2 steps do not reach it; momentum and weight decay do
                q.grad = torch.zeros_like(q)
            if p is not q:
                p.grad = q.grad.to(p.dtype)
    return [n.detach().to(p.dtype) for n in neurons]


@torch.no_grad()
def cep_updates(model, x, y, rule, change, masks=None, stopwatch=None):
    """Continual Equilibrium Propagation on one mini-batch (Ernoult et al., 2020): in the nudged
    phase every step changes the weights at once, by its own share of the EP update, lr *
    [dPhi(s(t+1))/dp - dPhi(s(t))/dp] / (beta_2 - beta_1). With `thirdphase` a phase at beta_2 and
    one at -beta_2, each from the free neurons and each with half of the rate. As the rates go to
    zero the sum of the changes tends to that of EP. Returns the free neurons.

    change(share): changes the weights by that share of a gradient step along p.grad, see
    `gradient_step`. p.grad is zero in the end: a step of the optimizer (sgd without momentum) that
    follows decays the weights and does no more."""
    stopwatch, (beta_1, beta_2), chain = (
        stopwatch or Stopwatch(),
        rule.betas,
        model.chain(rule.loss, masks),
    )
    free = free_phase(
        chain, model.phase(chain.input_drive(x), y, beta_1, rule.loss), rule.T1, rule.tol, stopwatch
    )
    betas = (beta_2, -beta_2) if rule.thirdphase else (beta_2,)
    for beta in betas:
        state = free
        for t in range(rule.T2):
            with stopwatch.part("nudged"):
                phase = model.phase(chain.input_drive(x), y, beta, rule.loss)
                before, state = state, fast.relax(chain, phase, state, 1)
            with stopwatch.part("update"):
                model.compute_syn_grads(
                    x,
                    y,
                    free,
                    before,
                    (beta_1, beta),
                    rule.loss,
                    check_thm=t > 0,
                    neurons_3=state,
                    masks=masks,
                )
                change(1 / len(betas))
    for p in model.parameters():
        p.grad.zero_()
    return free


@torch.no_grad()
def gradient_step(optimizer, share=1.0):
    """A share of a plain gradient step with the optimizer's rates, whatever else it does."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.sub_(p.grad, alpha=group["lr"] * share)


def bp_gradients(model, x, y, rule, masks=None, twin=None, stopwatch=None):
    """Back-propagation on one mini-batch: fills p.grad and returns [logits]. It is that through
    time of a network whose one step is all, in the mode of training."""
    model.train()
    try:
        return bptt_gradients(model, x, y, rule, masks, twin, stopwatch)
    finally:
        model.eval()


LEARN = {"EP": ep_gradients, "BPTT": bptt_gradients, "BP": bp_gradients}
