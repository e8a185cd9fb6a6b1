"""Gradient-descending updates (GDU): EP compared with BPTT, time step by time step.

The EP update between successive steps of the nudged phase should equal the BPTT gradient through
the same step, counted from the end (Ernoult et al., 2019).

`model` is an energy model of `model_utils`.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from energy import fast
from energy.dynamics import Criterion, Neurons, Phase, loss_name, step
from energy.rule import Rule

Contributions = dict[str, Tensor]  # name of a parameter, or `neurons_i`: time first
Row = dict[str, Any]


def bptt_contributions(
    model: Any, x: Tensor, y: Tensor, T1: int, T2: int, beta: float, criterion: Criterion
) -> Contributions:
    """The contribution of each of the last T2 of T1 free steps to the gradient of the loss, by one
    backward pass.

    Every step gets its own parameters, which share the model's memory, so that one pass separates
    their gradients. Returns a dict: each parameter's name -> (T2, *shape), the gradient of
    the mean loss through the k-th step from the end; `neurons_i` -> (T2, mbs, *shape of the layer),
    minus the gradient of each sample's loss with respect to that layer k steps before the end. Time
    T2 forward and backward steps; memory the graph of T2 steps and the result, T2 times parameters
    and neurons.
    """
    neurons = model(x, y, None, T1 - T2, beta, criterion)
    steps = []
    states = []
    for _ in range(T2):
        steps.append({name: p.detach().requires_grad_() for name, p in model.named_parameters()})
        arguments = (x, y, neurons, 1, beta, criterion, True)
        neurons = torch.func.functional_call(model, steps[-1], arguments)
        states.append(neurons)
    with torch.enable_grad():  # the read-out, a part of the loss, counts for the last step
        last = {f"model.{name}": p for name, p in steps[-1].items()}
        loss = torch.func.functional_call(_Loss(model), last, (neurons, y, criterion))
    wanted = [
        *(p for step in steps for p in step.values()),
        *(s for state in states for s in state),
    ]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    names = [name for step in steps for name in step]
    names += [f"neurons_{i}" for i in range(len(neurons))] * T2
    result: Contributions = {}
    filled = dict.fromkeys(names, T2)
    for name, like, grad in zip(names, wanted, grads):
        if name not in result:
            result[name] = like.new_empty(T2, *like.shape, requires_grad=False)
        filled[name] -= 1  # from the last step back
        entry = result[name][filled[name]]
        if grad is None:
            entry.zero_()
        elif name.startswith("neurons_"):
            torch.mul(grad, -x.size(0), out=entry)
        else:
            entry.copy_(grad)
    return result


class _Loss(nn.Module):
    """The mean loss of given neurons, as a module, for `functional_call`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, neurons: Neurons, y: Tensor, criterion: Criterion) -> Tensor:
        return self.model.loss(neurons, y, criterion).mean()


def ep_contributions(
    model: Any, x: Tensor, y: Tensor, T1: int, T2: int, betas: Sequence[float], criterion: Criterion
) -> Contributions:
    """The EP update between successive steps of the nudged phase, in the form of
    `bptt_contributions`: entry k is that of the k-th nudged step, which the theorem compares with
    the k-th free step from the end. p.grad is left unchanged.

    For the neurons it is (s(k+1) - s(k)) / (beta_2 - beta_1), which tends to minus the gradient
    times the activation's slope.
    """
    kept = [p.grad for p in model.parameters()]
    beta_1, beta_2 = betas
    loss = loss_name(criterion)
    chain = model.chain(loss)
    result: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    result |= {f"neurons_{i}": [] for i in range(len(chain))}
    with torch.no_grad():
        drive = chain.input_drive(x)
        before = fast.relax(chain, model.phase(drive, y, beta_1, loss), None, T1)
        nudged = model.phase(drive, y, beta_2, loss)
        for state in fast.trajectory(chain, nudged, T2, before):
            model.compute_syn_grads(x, y, before, state, betas, criterion, check_thm=True)
            for name, p in model.named_parameters():
                result[name].append(p.grad.clone())
            for i, (a, b) in enumerate(zip(before, state)):
                result[f"neurons_{i}"].append((b - a) / (beta_2 - beta_1))
            before = state
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    return {name: torch.stack(values) for name, values in result.items()}


def check_gdu(
    model: Any,
    x: Tensor,
    y: Tensor,
    T1: int,
    T2: int,
    betas: Sequence[float],
    criterion: Criterion,
    alg: str = "EP",
) -> tuple[Contributions, Contributions]:
    """EP updates and BPTT gradients, step by step, which should be equal (Ernoult et al., 2019).

    Returns (BPTT, EP), dicts over parameter names and `neurons_i`, time first: see
    `bptt_contributions` for shapes, time and memory, and `ep_contributions`. The model and its
    p.grad are left unchanged. Raises ValueError for an empty mini-batch, T2 above T1, and any
    `alg` but EP.
    """
    if alg != "EP":
        raise ValueError(f"gducheck compares EP with BPTT, not {alg}")
    if not len(x):
        raise ValueError("the mini-batch is empty: it has no gradient")
    if T2 > T1:
        raise ValueError(f"BPTT goes back through at most T1 = {T1} steps, got T2 = {T2}")
    return (
        bptt_contributions(model, x, y, T1, T2, betas[0], criterion),
        ep_contributions(model, x, y, T1, T2, betas, criterion),
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine similarity of two tensors of any one shape."""
    a = a.flatten().double()
    b = b.flatten().double()
    return F.cosine_similarity(a, b, dim=0, eps=1e-30).item()


# ---- comparison


class Comparison(NamedTuple):
    """EP compared with BPTT on one mini-batch.

    rows        of `compare_gdu`, for the estimate `one-sided` and, with `thirdphase`, `symmetric`
    BPTT, runs  of `check_gdu`: the contributions of BPTT, and those of EP at beta_2 and, with
                `thirdphase`, -beta_2
    bptt, ep    the sides of the comparison, of the best estimate, see `comparable`
    converged   which images have converged after T1 free steps, (mbs,) bool, see
                `energy.dynamics.has_converged`
    """

    rows: list[Row]
    BPTT: Contributions
    runs: list[Contributions]
    bptt: Contributions
    ep: Contributions
    converged: Tensor


def activation_slopes(model: Any, x: Tensor, y: Tensor, rule: Rule) -> Neurons:
    """act'(dPhi/ds_n) after T1 free steps: a list of tensors, one per layer, (mbs, *shape of the
    layer)."""
    chain = model.chain(rule.loss)
    with torch.no_grad():
        phase = model.phase(chain.input_drive(x), y, rule.betas[0], rule.loss)
        free = model(x, y, None, rule.T1, rule.betas[0], rule.loss)
        drives = step(dataclasses.replace(chain, activation=lambda drive: drive), phase, free)
    slopes = []
    for n, drive in enumerate(drives):
        leaf = drive.clone().requires_grad_()
        with torch.enable_grad():
            slopes.append(torch.autograd.grad(chain.activate(n, leaf).sum(), leaf)[0])
    return slopes


def complete_ep(model: Any, x: Tensor, y: Tensor, rule: Rule, beta: float) -> dict[str, Tensor]:
    """The EP update {name: gradient} from the whole of a phase nudged by `beta`. p.grad is left
    unchanged."""
    kept = [p.grad for p in model.parameters()]
    free = model(x, y, None, rule.T1, rule.betas[0], rule.loss)
    nudged = model(x, y, free, rule.T2, beta, rule.loss)
    model.compute_syn_grads(x, y, free, nudged, (rule.betas[0], beta), rule.loss)
    found = {name: p.grad for name, p in model.named_parameters()}
    for p, grad in zip(model.parameters(), kept, strict=True):
        p.grad = grad
    return found


def mean(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several dicts of tensors, entry by entry."""
    return {
        name: functools.reduce(torch.add, [d[name] for d in dicts]) / len(dicts)
        for name in dicts[0]
    }


def comparable(
    model: Any, x: Tensor, y: Tensor, rule: Rule, BPTT: Contributions, runs: Sequence[Contributions]
) -> tuple[Contributions, Contributions]:
    """The two sides that the theorem compares, (BPTT, EP): {name: tensor}, time first. runs: of EP,
    nudged by beta_2 and, if there are two, by -beta_2.

    A neuron's change in a step is its gradient times the slope of its activation at the
    equilibrium: the gradients of BPTT are multiplied by it. A `softmax` read-out learns from the
    loss in the same way at every step: its total updates are compared, as one entry in time."""
    bptt = dict(BPTT)
    ep = mean(runs)
    for n, slope in enumerate(activation_slopes(model, x, y, rule)):
        bptt[f"neurons_{n}"] = bptt[f"neurons_{n}"] * slope
    if model.softmax:
        signs = (1, -1)[: len(runs)]
        whole = mean([complete_ep(model, x, y, rule, sign * rule.betas[1]) for sign in signs])
        for name in whole:
            if name.startswith(f"synapses.{len(model.synapses) - 1}."):
                bptt[name] = bptt[name].sum(0, keepdim=True)
                ep[name] = whole[name].unsqueeze(0)
    return bptt, ep


def compare_gdu(bptt: Contributions, ep: Contributions, estimate: str) -> list[Row]:
    """How far an EP estimate is from BPTT: a list of dicts, one per parameter and layer, with

    rmse        root mean square over time of their difference, divided by the larger of their root
                mean squares; mean over the entries
    sign_error  share of entries and times where their signs differ
    cosine, distance    between the sums over time: cosine similarity, and ||EP - BPTT|| / ||BPTT||;
                nan where T2 steps of BPTT do not reach the parameter or layer
    """

    def rms(values: Tensor) -> Tensor:
        return values.pow(2).mean(0).sqrt()

    rows = []
    for name in bptt:
        a = ep[name].double()  # (T2, ...)
        b = bptt[name].double()
        total_a = a.sum(0).flatten()
        total_b = b.sum(0).flatten()
        reached = bool(total_b.any())
        distance = (total_a - total_b).norm() / total_b.norm()
        rows.append(
            {
                "name": name,
                "estimate": estimate,
                "rmse": (rms(a - b) / (torch.maximum(rms(a), rms(b)) + 1e-30)).mean().item(),
                "sign_error": (a * b < 0).double().mean().item(),
                "cosine": cosine(total_a, total_b) if reached else math.nan,
                "distance": distance.item() if reached else math.nan,
            }
        )
    return rows


def image_cosines(model: Any, x: Tensor, y: Tensor, rule: Rule) -> dict[str, list[float]]:
    """{parameter: [cosine of the complete EP and BPTT gradients of each image alone]}, of the
    rule's estimate."""
    found: dict[str, list[float]] = {name: [] for name, _ in model.named_parameters()}
    signs = (1, -1) if rule.thirdphase else (1,)
    for i in range(len(x)):
        one = (x[i : i + 1], y[i : i + 1])
        bptt = bptt_contributions(model, *one, rule.T1, rule.T2, rule.betas[0], rule.loss)
        ep = mean([complete_ep(model, *one, rule, sign * rule.betas[1]) for sign in signs])
        for name, cosines in found.items():
            total = bptt[name].sum(0)
            cosines.append(cosine(ep[name], total) if total.any() else math.nan)
    return found


def gdu_report(model: Any, x: Tensor, y: Tensor, rule: Rule, images: bool = False) -> Comparison:
    """The `Comparison` for the rule's T1, T2, betas, thirdphase and loss.

    images: also report, in the rows of the best estimate, the median cosine and that of the worst
    image for every parameter, which takes as long as each image alone."""
    beta_1, beta_2 = rule.betas
    BPTT, EP = check_gdu(model, x, y, rule.T1, rule.T2, (beta_1, beta_2), rule.loss)
    runs = [EP]
    bptt, ep = comparable(model, x, y, rule, BPTT, runs)
    rows = compare_gdu(bptt, ep, "one-sided")
    if rule.thirdphase:
        opposite = (beta_1, -beta_2)
        runs.append(ep_contributions(model, x, y, rule.T1, rule.T2, opposite, rule.loss))
        bptt, ep = comparable(model, x, y, rule, BPTT, runs)
        rows += compare_gdu(bptt, ep, "symmetric")
    if images:
        best = {row["name"]: row for row in rows if row["estimate"] == rows[-1]["estimate"]}
        for name, cosines in image_cosines(model, x, y, rule).items():
            reached = sorted(c for c in cosines if not math.isnan(c))
            if reached:
                best[name].update(cosine_median=statistics.median(reached), cosine_worst=reached[0])
    chain = model.chain(rule.loss)
    with torch.no_grad():
        drive = chain.input_drive(x)
    _, converged = fast.relax_and_check(chain, Phase(drive), rule.T1)
    return Comparison(rows, BPTT, runs, bptt, ep, converged)


def verdict(comparison: Comparison, rule: Rule, enough: float = 0.99) -> str:
    """One line: whether EP agrees with BPTT (every row's cosine of the best estimate above
    `enough`), or what to change."""
    estimate = comparison.rows[-1]["estimate"]
    best = [row for row in comparison.rows if row["estimate"] == estimate]
    reached = [row for row in best if not math.isnan(row["cosine"])]
    images = len(comparison.converged)
    unconverged = int((~comparison.converged).sum())
    too_many = unconverged > 0.051 * images
    if not reached:
        return "nothing to compare: BPTT reaches no parameter, --T2 is too short"
    worst = min(reached, key=lambda row: row["cosine"])
    found = f"the smallest cosine is {worst['cosine']:.4f} ({worst['name']})"
    increase_T1 = (
        f"not converged after T1 = {rule.T1} steps: {unconverged} of {images} images; increase --T1"
    )
    if worst["cosine"] > enough:
        return f"EP agrees with BPTT: {found}" + (f"; but {increase_T1}" if too_many else "")
    if too_many:
        advice = increase_T1
    elif worst.get("cosine_median", 0) > enough:
        advice = (
            f"most images agree; beta = {rule.betas[1]:g} moves some to another equilibrium (other "
            "winners of a max-pooling, for example); use a smaller beta (--betas)"
        )
    elif not rule.thirdphase:
        advice = (
            "the one-sided estimate has an error of first order in beta; use --thirdphase, or a "
            "smaller beta (--betas)"
        )
    else:
        advice = (
            f"beta = {rule.betas[1]:g} is too large or, below 0.001, within rounding errors; use "
            "another beta (--betas)"
        )
    return f"EP does not agree with BPTT: {found}; {advice}"
