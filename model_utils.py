"""Energy models, their local EP update, and the rules that they learn by.

A model is a chain of connections (`energy.connections`) with one dynamics (`energy.dynamics`) and
one local update; the four public classes only assemble it. The learning rules are plain functions,
see `LEARN`. All of this needs torch and `energy` alone:

    from model_utils import P_MLP, Rule, ep_gradients, my_sigmoid

    model = P_MLP([784, 512, 10], my_sigmoid)
    free = ep_gradients(model, x, y, Rule(T1=20, T2=4, betas=(0.0, 0.1)))  # fills p.grad

The functions at the end (`build`, `train`, `evaluate`, `attack`, `load_run` ...) load the rest of
the project when they are called."""

import argparse
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from energy import fast
from energy.activations import (  # noqa: F401
    ACTIVATIONS,
    Activation,
    ctrd_hard_sig,
    hard_sigmoid,
    my_hard_sig,
    my_sigmoid,
)
from energy.connections import Connection, Dense, convolution, set_grad
from energy.dynamics import Chain, Criterion, Neurons, Phase, loss_name, readout_loss
from energy.gdu import check_gdu  # noqa: F401
from energy.poolings import make_pools
from energy.precision import exactly, lowered
from energy.rule import UNOBSERVED, Observer, Rule

if TYPE_CHECKING:
    from ART_Timesteps_Addition.pgd import Adversary
    from ART_Timesteps_Addition.pytorch import PyTorchClassifier
    from data_utils import Batches, Task
    from experiment.config import Config
    from experiment.training import Trainer
    from experiment.workers import Workers

Masks = Sequence[Tensor | None]
Change = Callable[[float], None]

EMPTY = "the mini-batch is empty: it has no gradient"
NO_LABELS = "labels are needed to nudge: y is None but beta is not 0"

# ------------------------------------------------------------------------------------------- models


class EnergyModel(nn.Module):
    """A chain of connections with one dynamics and one local update.

    synapses      ModuleList of every forward Conv2d and Linear, the read-out last where `softmax`
    B_syn         ModuleList of the untied feedback weights (vector-field models; empty otherwise)
    connections   one per layer of neurons s_1 ... s_N
    output        the connection that reads logits out of s_N where `softmax`: no neurons above it
    softmax       whether there is such a read-out, with the cross-entropy acting on its logits
    same_update   vector-field models: whether both weights of a connection take the mean of their
                  two gradients
    schedule, compiled   see `energy.dynamics.Chain`
    has_dynamics  whether the model takes time steps: a network of `baselines` does not
    """

    has_dynamics = True

    def __init__(
        self,
        synapses: Sequence[Any],
        B_syn: Sequence[nn.Module],
        connections: Sequence[Connection],
        activation: Activation,
        *,
        softmax: bool = False,
        same_update: bool = False,
        pools: Iterable[nn.Module] = (),
        schedule: str = "sync",
    ) -> None:
        """connections: the read-out's last, where `softmax`. Raises ValueError."""
        if not callable(activation):
            raise ValueError(
                f"activation: expected a function such as ACTIVATIONS['mysig'], got {activation!r}"
            )
        super().__init__()
        self.synapses = nn.ModuleList(synapses)
        self.B_syn = nn.ModuleList(B_syn)
        self.pools = nn.ModuleList(pools)
        self.connections = tuple(connections[:-1] if softmax else connections)
        self.output: Any = connections[-1] if softmax else None
        self.activation = activation
        self.softmax = softmax
        self.same_update = same_update
        self.schedule = schedule
        self.compiled = False
        self.nc: int = synapses[-1].out_features
        # Convolutions and poolings are faster in this layout, on CPU and GPU; it changes no value.
        self.to(memory_format=torch.channels_last)

    # ---- dynamics

    def chain(self, loss: str = "mse", masks: Masks | None = None) -> Chain:
        """The model as its steps see it, under a loss. masks: for dropout, one per connection (or
        None), the read-out's last."""
        linear_output = not self.softmax and loss != "mse"
        chain = Chain(
            self.connections,
            self.activation,
            self.output,
            linear_output,
            self.schedule,
            self.compiled,
        )
        if masks is None:
            return chain
        return chain.masked([m if m is None else m.to(chain.dtype) for m in masks])

    def phase(self, drive: Tensor, y: Tensor | None, beta: float, loss: str) -> Phase:
        """The `Phase` of a mini-batch. drive: of its images, see `Chain.input_drive`; y: class
        indices (mbs,), may be None at beta 0. Raises ValueError."""
        if not torch.is_tensor(beta) and beta == 0:
            return Phase(drive)
        if y is None:
            raise ValueError(NO_LABELS)
        return Phase(drive, F.one_hot(y, self.nc).to(drive.dtype), beta, loss)

    def init_neurons(self, mbs: int, device: torch.device | str) -> Neurons:
        """Zero neurons: a list of N tensors (mbs, *shape of the layer)."""
        chain = self.chain()
        return chain.zeros(torch.empty(mbs, 0, device=device, dtype=chain.dtype))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        neurons: Sequence[Tensor] | None = None,
        T: int | None = None,
        beta: float = 0.0,
        criterion: Criterion = nn.MSELoss(reduction="none"),
        check_thm: bool = False,
        output_in: int | None = None,
    ) -> Neurons:
        """The neurons after T steps from `neurons` (from zero if None): a list of N tensors.

        x: (mbs, ...); y: class indices (mbs,), may be None at beta 0. `check_thm` keeps the graph
        through the T steps (for BPTT, attacks and gducheck); without it nothing is recorded,
        whatever the caller's grad mode is. output_in: k where only s_N is wanted, k steps after
        these: layers that do not reach it are left as of an earlier step. Raises ValueError without
        T."""
        if T is None:
            raise ValueError("T, the number of time steps, is needed: model(x, T=20)")
        loss = loss_name(criterion)
        chain = self.chain(loss)
        with torch.set_grad_enabled(check_thm):
            phase = self.phase(chain.input_drive(x), y, beta, loss)
            return fast.relax(chain, phase, neurons, T, output_in)

    # ---- energy and loss

    def readout(self, neurons: Sequence[Tensor]) -> Tensor:
        """(mbs, classes): the logits where `softmax`, the output neurons otherwise."""
        return self.chain().read(neurons)

    def loss(self, neurons: Sequence[Tensor], y: Tensor, criterion: Criterion) -> Tensor:
        """L of each sample, (mbs,): see `readout_loss`."""
        return readout_loss(self.readout(neurons), y, loss_name(criterion))

    def Phi(
        self, x: Tensor, y: Tensor | None, neurons: Neurons, beta: float, criterion: Criterion
    ) -> Tensor | list[Tensor]:
        """The primitive function of each sample, (mbs,); for vector-field models a list of one
        (mbs,) per layer, whose entry n holds the terms that drive s_n. Differentiable; for reading
        and testing, no step or update needs it."""
        layers = [x.to(neurons[0].dtype), *neurons]
        phis: list[Tensor] = []
        for n, c in enumerate(self.connections):
            forward, *backward = c.terms(layers[n], neurons[n])
            phis.append(forward)
            if backward:
                phis[n - 1] = phis[n - 1] + backward[0]
        if beta != 0:
            if y is None:
                raise ValueError(NO_LABELS)
            phis[-1] = phis[-1] - beta * self.loss(neurons, y, criterion)
        return phis if len(self.B_syn) else functools.reduce(torch.add, phis)

    # ---- the local update

    @torch.no_grad()
    def compute_syn_grads(
        self,
        x: Tensor,
        y: Tensor,
        neurons_1: Neurons,
        neurons_2: Neurons,
        betas: tuple[float, float],
        criterion: Criterion,
        check_thm: bool = False,
        neurons_3: Neurons | None = None,
        masks: Masks | None = None,
    ) -> None:
        """The EP update, into p.grad of every parameter (what was there is replaced):

            p.grad = [dPhi(s_2, beta_2)/dp - dPhi(s_1, beta_1)/dp] / (beta_1 - beta_2),

        Phi averaged over the batch, the estimate of dL/dp. One-sided: neurons (free, nudged), betas
        (0, beta). Symmetric: (nudged at +beta, nudged at -beta), betas (beta, -beta); vector-field
        models without `same_update` also need the free state then: (free, +beta, -beta) as neurons
        1, 2 and 3. There layer n's term pairs s_n, nudged, with the free state of its neighbours.

        `check_thm`: the two states are successive ones of a nudged phase, so that both Phi are
        taken at beta_2, and the update is that step's share of the whole (gducheck). masks: of
        dropout. Raises ValueError for an empty mini-batch, for equal betas, and for a loss other
        than the cross-entropy where `softmax`."""
        if not len(x):
            raise ValueError(EMPTY)
        loss = loss_name(criterion)
        if self.softmax and loss != "cel":
            raise ValueError(f"softmax needs loss cel, got {loss}")
        beta_1, beta_2 = betas
        if beta_1 == beta_2:
            raise ValueError(f"betas are {(beta_1, beta_2)}, EP needs two different values")
        chain = fast.suited(self.chain(loss, masks), len(x))
        scale = 1.0 / ((beta_1 - beta_2) * len(x))
        x = x.to(chain.dtype)
        first = neurons_1 if neurons_3 is None else neurons_2
        second = neurons_2 if neurons_3 is None else neurons_3
        free = [x, *neurons_1]
        one = [x, *first]
        two = [x, *second]
        # whether both ends of a connection are in the same state
        paired = not len(self.B_syn) or self.same_update
        for n, c in enumerate(chain.connections):
            below = (one[n], two[n]) if paired else (free[n], free[n])
            # weight: (post, pre) or (C_post, C_pre, kernel, kernel); bias: (post,) or (C_post,)
            weight, bias = _contrast(c.learn, below, (one[n + 1], two[n + 1]), scale)
            if c.feedback is not None:
                above = (one[n + 1], two[n + 1]) if paired else (free[n + 1], free[n + 1])
                # in the shape of the forward weight
                (feedback,) = _contrast(c.learn_feedback, (one[n], two[n]), above, scale)
                if self.same_update:
                    weight = (weight + feedback) / 2
                    feedback = weight.clone()
                c.set_feedback_grad(feedback)
            set_grad(c.synapse.weight, weight)
            set_grad(c.synapse.bias, bias)
        if self.softmax:
            factors = [(one[1:], beta_2 if check_thm else beta_1), (two[1:], -beta_2)]
            nudged = [(state, beta * scale) for state, beta in factors if beta != 0]
            self._readout_update(chain, y, nudged)

    def _readout_update(
        self, chain: Chain, y: Tensor, nudged: Sequence[tuple[Neurons, float]]
    ) -> None:
        """The update of the read-out, on which L acts directly. nudged: [(neurons, factor of
        dL/d(read-out))]."""
        readout = chain.readout
        assert readout is not None
        grads = []
        for neurons, factor in nudged:
            phase = self.phase(neurons[0], y, 1.0, "cel")
            slope = phase.slope(chain.read(neurons))  # (mbs, classes)
            # [(classes, pre), (classes,)]
            grads.append(readout.learn(neurons[-1], factor * slope))
        for p, grad in zip((readout.synapse.weight, readout.synapse.bias), zip(*grads)):
            set_grad(p, functools.reduce(torch.add, grad))

    # ---- parameters

    def parameter_layers(self) -> list[tuple[int, list[nn.Parameter]]]:
        """[(the layer whose learning rate counts, parameters)], see `make_optimizer`."""
        modules = [*enumerate(self.synapses), *enumerate(self.B_syn, 1)]
        return [(n, list(module.parameters())) for n, module in modules]

    @torch.no_grad()
    def angles(self) -> list[float]:
        """Degrees between the forward and the feedback weight of each connection that has both."""
        degrees = []
        for c in self.connections:
            if c.feedback is not None:
                forward = c.synapse.weight.flatten()
                feedback = c.down_weight().flatten()
                cosine = F.cosine_similarity(forward, feedback, dim=0).clamp(-1, 1)
                degrees.append(torch.rad2deg(torch.acos(cosine)).item())
        return degrees


def _contrast(
    learn: Callable[[Tensor, Tensor], list[Tensor]],
    below: tuple[Tensor, Tensor],
    above: tuple[Tensor, Tensor],
    scale: float,
) -> list[Tensor]:
    """scale * (`learn` in the second state less `learn` in the first), which is linear in the layer
    above."""
    if below[0] is below[1]:
        return learn(below[0], (above[1] - above[0]) * scale)
    minus = learn(below[0], above[0] * -scale)
    plus = learn(below[1], above[1] * scale)
    return [a.add_(b) for a, b in zip(plus, minus)]


class _MLP(EnergyModel):
    """Dense layers. untied: whether they have untied feedback weights."""

    untied = False

    def __init__(
        self,
        archi: Sequence[int],
        activation: Activation,
        softmax: bool = False,
        *,
        same_update: bool = False,
        schedule: str = "sync",
    ) -> None:
        if len(archi) < 2:
            raise ValueError("an MLP needs at least an input and an output size")
        synapses = [nn.Linear(pre, post) for pre, post in zip(archi, archi[1:])]
        B_syn: list[nn.Module] = []
        if self.untied:
            B_syn = [nn.Linear(post, pre, bias=False) for pre, post in zip(archi[1:], archi[2:])]
            if softmax:
                B_syn.pop()  # drawn all the same, so that a seed draws the same numbers after it
        connections = [
            Dense(synapse, (pre,), feedback, transposed=True)
            for synapse, pre, feedback in itertools.zip_longest(
                synapses, archi[:-1], [None, *B_syn]
            )
        ]
        super().__init__(
            synapses,
            B_syn,
            connections,
            activation,
            softmax=softmax,
            same_update=same_update,
            schedule=schedule,
        )


class P_MLP(_MLP):
    """Dense layers with tied weights (`same_update` has no effect). archi: sizes of all layers, the
    input's first."""


class VF_MLP(_MLP):
    """As P_MLP, with untied feedback weights `B_syn`, of shape (pre, post), for every connection
    but the first (and the read-out)."""

    untied = True


class _CNN(EnergyModel):
    """Convolutions, each followed by a pooling, then dense layers. untied: whether they have untied
    feedback weights."""

    untied = False

    def __init__(
        self,
        in_size: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        fc: Sequence[int],
        pools: Any,  # of `make_pools`
        paddings: Sequence[int],
        activation: Activation,
        softmax: bool = False,
        same_update: bool = False,
        schedule: str = "sync",
    ) -> None:
        if isinstance(pools, str):
            raise ValueError(f"pools: use make_pools({pools!r})")
        count = len(channels) - 1
        lists = (kernels, strides, pools, paddings)
        if count < 1 or any(len(values) != count for values in lists) or not fc:
            raise ValueError(
                "kernels, strides, pools and paddings need one entry per convolution, channels one "
                "more, fc at least one"
            )
        synapses: list[nn.Module] = []
        B_syn: list[nn.Module] = []
        connections: list[Connection] = []
        shape: tuple[int, ...] = (channels[0], in_size, in_size)
        for i, out in enumerate(channels[1:]):
            geometry = (channels[i], out, kernels[i], strides[i], paddings[i])
            conv = nn.Conv2d(*geometry)
            back = nn.Conv2d(*geometry, bias=False) if self.untied and i > 0 else None
            try:
                connections.append(convolution(conv, pools[i], shape, back))
            except ValueError as e:
                raise ValueError(f"layer {i + 1}: {e}") from None
            synapses.append(conv)
            B_syn += [back] if back else []
            shape = connections[-1].post_shape
        for i, out in enumerate(fc):
            reads_out = softmax and i == len(fc) - 1
            linear = nn.Linear(math.prod(shape), out)
            feedback = None
            if self.untied and not reads_out:
                feedback = nn.Linear(math.prod(shape), out, bias=False)
                B_syn.append(feedback)
            synapses.append(linear)
            connections.append(Dense(linear, shape, feedback))
            shape = connections[-1].post_shape
        super().__init__(
            synapses,
            B_syn,
            connections,
            activation,
            softmax=softmax,
            same_update=same_update,
            pools=pools,
            schedule=schedule,
        )


class P_CNN(_CNN):
    """Convolutions, each followed by a pooling, then dense layers, with tied weights (`same_update`
    has no effect).

    in_size: height and width of the (square) images; channels: of all maps, the input's first; fc:
    sizes of the dense layers, the last one the number of classes; pools: see `make_pools`. Raises
    ValueError, naming the layer, where nothing is left of a map."""


class VF_CNN(_CNN):
    """As P_CNN, with untied feedback weights `B_syn` for every connection but the first (and the
    read-out)."""

    untied = True


MODELS: dict[str, Any] = {"MLP": P_MLP, "VFMLP": VF_MLP, "CNN": P_CNN, "VFCNN": VF_CNN}


# ----------------------------------------------------------------------------------- learning rules
# (model, x, y, rule, masks, bf16_copy, observer, change) -> neurons of the free phase
#
#   x, y       mini-batch, (mbs, ...), and class indices, (mbs,)
#   rule       how the model learns
#   masks      for dropout, see `EnergyModel.chain`
#   bf16_copy  of the model, see `lowered`: takes the time steps; the update is the model's own
#   observer   records the time of each part and the steps of free phases
#   change     changes the weights, for CEP
#
# They fill p.grad.


def free_phase(
    chain: Chain,
    phase: Phase,
    T: int,
    tol: float = 0.0,
    observer: Observer = UNOBSERVED,
    output_in: int | None = None,
) -> Neurons:
    """The neurons after T steps from zero; with `tol` after at most T, see
    `energy.dynamics.relax_until_converged`. output_in: see `energy.fast.relax`."""
    with torch.no_grad(), observer.part("free"):
        neurons, stop = fast.from_zero(chain, phase, T, tol, output_in)  # [(mbs, *shape of s_n)]
        if stop is not None:
            observer.count_steps(*stop)
        return neurons


@torch.no_grad()
def ep_gradients(
    model: EnergyModel,
    x: Tensor,
    y: Tensor,
    rule: Rule,
    masks: Masks | None = None,
    bf16_copy: EnergyModel | None = None,
    observer: Observer = UNOBSERVED,
    change: Change | None = None,
) -> Neurons:
    """Equilibrium Propagation on one mini-batch: fills p.grad and returns the free neurons.

    A free phase of T1 steps at betas[0] from zero neurons; from there a nudged phase of T2 steps at
    betas[1], and with `thirdphase` a second one at -betas[1], whose contrast has no error of first
    order in beta."""
    stepping = model if bf16_copy is None else bf16_copy
    beta_1, beta_2 = rule.betas
    chain = stepping.chain(rule.loss, masks)
    drive = chain.input_drive(x)  # (mbs, *shape of s_1)
    start = stepping.phase(drive, y, beta_1, rule.loss)
    free = free_phase(chain, start, rule.T1, rule.tol, observer)
    with observer.part("nudged"):
        nudge = stepping.phase(drive, y, beta_2, rule.loss)
        if rule.thirdphase:
            nudged = [*fast.relax_both_signs(chain, nudge, free, rule.T2)]  # at +beta, at -beta
        else:
            nudged = [fast.relax(chain, nudge, free, rule.T2)]
    with observer.part("update"), exactly():
        dtype = next(model.parameters()).dtype
        free = [s.to(dtype) for s in free]
        nudged = [[s.to(dtype) for s in state] for state in nudged]
        if rule.thirdphase:
            plus, minus = nudged
            model.compute_syn_grads(
                x, y, free, plus, (beta_2, -beta_2), rule.loss, neurons_3=minus, masks=masks
            )
        else:
            model.compute_syn_grads(x, y, free, nudged[0], rule.betas, rule.loss, masks=masks)
    return free


@torch.no_grad()
def cep_updates(
    model: EnergyModel,
    x: Tensor,
    y: Tensor,
    rule: Rule,
    masks: Masks | None = None,
    bf16_copy: EnergyModel | None = None,
    observer: Observer = UNOBSERVED,
    change: Change | None = None,
) -> Neurons:
    """Continual Equilibrium Propagation on one mini-batch (Ernoult et al., 2020).

    Every step of the nudged phase immediately changes the weights, by its share of the EP update:
    lr * [dPhi(s(t+1))/dp - dPhi(s(t))/dp] / (beta_2 - beta_1). With `thirdphase` a phase at beta_2
    and one at -beta_2, each from the free neurons and each with half of the rate. As the rates go
    to zero, the sum of the changes converges to the EP update. Returns the free neurons.

    change(share): changes the weights by that share of a gradient step along p.grad, see
    `experiment.training.gradient_step`. Afterwards p.grad is zero, so that the optimizer's step
    (sgd without momentum) only decays the weights. Without `change` the weights stay unchanged, and
    p.grad is the sum of all shares. `bf16_copy` is not used."""
    collected: list[Tensor] = []

    def collect(share: float) -> None:
        shares = [share * p.grad for p in model.parameters() if p.grad is not None]
        if collected:
            torch._foreach_add_(collected, shares)
        else:
            collected.extend(shares)

    beta_1, beta_2 = rule.betas
    chain = model.chain(rule.loss, masks)
    free = free_phase(
        chain, model.phase(chain.input_drive(x), y, beta_1, rule.loss), rule.T1, rule.tol, observer
    )
    betas = (beta_2, -beta_2) if rule.thirdphase else (beta_2,)
    for beta in betas:
        before = free
        for t in range(rule.T2):
            with observer.part("nudged"):
                nudge = model.phase(chain.input_drive(x), y, beta, rule.loss)
                state = fast.relax(chain, nudge, before, 1)
            with observer.part("update"):
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
                (change or collect)(1 / len(betas))
            before = state
    for p, grad in zip(model.parameters(), collected):
        p.grad = grad
    if not collected:
        model.zero_grad(set_to_none=False)
    return free


def bptt_gradients(
    model: EnergyModel,
    x: Tensor,
    y: Tensor,
    rule: Rule,
    masks: Masks | None = None,
    bf16_copy: EnergyModel | None = None,
    observer: Observer = UNOBSERVED,
    change: Change | None = None,
) -> Neurons:
    """Back-propagation through the last T2 of T1 free steps on one mini-batch: fills p.grad and
    returns the neurons: the output after T1 steps, the layers below it as of a few steps earlier
    (see `energy.fast.relax`)."""
    if not len(x):
        raise ValueError(EMPTY)
    stepping = model if bf16_copy is None else bf16_copy
    chain = stepping.chain(rule.loss, masks)
    neurons = None
    if rule.T1 > rule.T2:
        with torch.no_grad():
            start = Phase(chain.input_drive(x))
        before = rule.T1 - rule.T2
        neurons = free_phase(chain, start, before, rule.tol, observer, output_in=rule.T2)
    with observer.part("BPTT" if model.has_dynamics else "backward"):
        neurons = fast.relax(chain, Phase(chain.input_drive(x)), neurons, rule.T2, output_in=0)
        stepping.zero_grad()
        readout_loss(chain.read(neurons), y, rule.loss).mean().backward()
        for p, q in zip(model.parameters(), stepping.parameters()):
            # T2 steps do not reach it; momentum and weight decay do
            grad = torch.zeros_like(q) if q.grad is None else q.grad
            p.grad = grad.to(p.dtype)
    return [s.detach().to(p.dtype) for s in neurons]


def bp_gradients(
    model: Any,
    x: Tensor,
    y: Tensor,
    rule: Rule,
    masks: Masks | None = None,
    bf16_copy: Any = None,
    observer: Observer = UNOBSERVED,
    change: Change | None = None,
) -> Neurons:
    """Back-propagation on one mini-batch through a network of `baselines`: fills p.grad and returns
    [logits]. It is back-propagation through the network's single step, in training mode."""
    model.train()
    try:
        return bptt_gradients(model, x, y, rule, masks, bf16_copy, observer)
    finally:
        model.eval()


LEARN = {"EP": ep_gradients, "CEP": cep_updates, "BPTT": bptt_gradients, "BP": bp_gradients}


# -------------------------------------------------------------------------------- from a config


def make_model(args: Any) -> Any:
    """The model that a configuration describes, an `EnergyModel` or a network of `baselines`, with
    initial weights multiplied by --scale. args: an `experiment.config.Config`, or a namespace of
    the command line's arguments."""
    import baselines
    from data_utils import TASKS
    from experiment.config import Config

    config = Config.of(args)
    task = TASKS[config.data.task]
    model: EnergyModel | baselines.FeedForward
    if config.model.has_dynamics:
        model = _make_energy_model(config, task)
    else:
        model = baselines.make_network(config.model, task)
    if config.model.scale is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(config.model.scale)
    return model


def _make_energy_model(config: "Config", task: "Task") -> EnergyModel:
    model = config.model
    activation = ACTIVATIONS[model.act]
    options: dict[str, Any] = {
        "softmax": model.softmax,
        "same_update": config.learning.same_update,
        "schedule": config.learning.schedule,
    }
    if model.is_dense:
        return MODELS[model.kind](model.archi, activation, **options)
    return MODELS[model.kind](
        task.size,
        [task.channels, *model.channels],
        model.kernels,
        model.strides,
        model.fc,
        make_pools(model.pools),
        model.paddings,
        activation,
        **options,
    )


def build(args: Any) -> Any:
    """`make_model`, if its weights fit into memory. Raises UserError if it cannot be built."""
    from data_utils import UserError, one_line
    from experiment.console import memory_limit

    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in make_model(args).parameters())
    # TypeError: a size beyond 64 bits
    except (ValueError, RuntimeError, OverflowError, TypeError) as e:
        raise UserError(f"the model cannot be built: {one_line(e)[:300]}") from None
    memory = memory_limit()
    if 4 * weights > memory:
        needed, available = (f"{size / 2**30:,.1f} GiB" for size in (4 * weights, memory))
        raise UserError(
            f"the model cannot be built: {weights:,} weights take {needed}, this machine or "
            f"container has {available}; use fewer or smaller layers (--archi, --channels, --fc)"
        )
    return make_model(args)


def make_criterion(loss: str) -> nn.Module:
    """PyTorch's loss of that name (`mse` or `cel`), one value per sample and entry."""
    return {"mse": nn.MSELoss, "cel": nn.CrossEntropyLoss}[loss](reduction="none")


def make_optimizer(model: Any, args: Any) -> tuple[torch.optim.Optimizer, Any]:
    """(the optimizer, the scheduler or None), with a parameter group per layer; feedback weights
    take the rates of their forward weight. args: as `make_model` takes it."""
    from experiment.config import Config

    settings = Config.of(args).optimizer
    layers = model.parameter_layers()
    default_rate = 0.01 if settings.optim == "sgd" else 5e-4
    lrs = settings.lrs or [default_rate] * len(layers)
    wds = settings.wds or [0.0] * len(layers)
    groups = [
        {"params": parameters, "lr": lrs[n], "weight_decay": wds[n]} for n, parameters in layers
    ]
    optimizer: torch.optim.Optimizer
    if settings.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lrs[0], momentum=settings.mmt, fused=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=lrs[0], fused=True)
    if settings.lr_step:
        epochs, gamma = settings.lr_step
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, int(epochs), gamma)
    if settings.lr_decay:
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-5)
        return optimizer, cosine
    return optimizer, None


# ------------------------------------------------------------------------------ train, attack, load


def make_trainer(
    model: Any,
    optimizer: torch.optim.Optimizer,
    args: Any,
    scheduler: Any = None,
    run: Any = None,
    history: Any = None,
    workers: "Workers | None" = None,
) -> "Trainer":
    """The `experiment.training.Trainer` that a configuration describes.

    args: as `make_model` takes it; run: the `RunFolder` to write to after every epoch, or None;
    history: of the epochs so far; workers: share every mini-batch."""
    from experiment.config import Config
    from experiment.diagnostics import Diagnostics, log_theorem
    from experiment.runs.history import History
    from experiment.training import Recorder, Trainer
    from experiment.workers import Workers

    config = Config.of(args)
    rule = config.rule
    workers = workers or Workers()
    precision = config.session.precision
    bf16_copy = lowered(model, torch.bfloat16) if precision == "bf16" else None
    checks = config.learning.check_thm and rule.alg == "EP" and workers.rank == 0
    return Trainer(
        model,
        optimizer,
        rule,
        LEARN[rule.alg],
        Diagnostics(model, rule, optimizer, bf16_copy, precision),
        scheduler=scheduler,
        bf16_copy=bf16_copy,
        adversary=make_adversary(model, config),
        history=history or History(),
        recorder=Recorder(run, config) if run else None,
        check_theorem=functools.partial(log_theorem, model, rule, run) if checks else None,
        workers=workers,
    )


def make_adversary(model: Any, args: Any) -> "Adversary | None":
    """PGD of adversarial training on the device of the model; None without --adv-train. args: as
    `make_model` takes it."""
    from ART_Timesteps_Addition.pgd import Adversary
    from ART_Timesteps_Addition.settings import GradientMethod
    from data_utils import TASKS
    from experiment.config import Config

    config = Config.of(args)
    settings = config.adversarial
    if settings.attack is None:
        return None
    device = next(model.parameters()).device
    task = TASKS[config.data.task]
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device=device).view(-1, 1, 1)
        for value in (task.mean, task.std)
    )
    rule = config.rule
    method = GradientMethod(settings.grad, settings.steps, tol=rule.tol)
    return Adversary(settings.attack, method, rule.loss, rule.T1, mean, std)


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    train_batches: "Batches",
    test_batches: "Batches",
    args: Any,
    val_batches: "Batches | None" = None,
    last: int | None = None,
    **more: Any,
) -> None:
    """Train for --epochs epochs, or up to epoch `last`.

    args: as `make_model` takes it; val_batches: to choose the best model on; more: see
    `make_trainer`. Raises RunFailed if neurons or weights are no longer finite."""
    from experiment.config import Config
    from experiment.diagnostics import report_precision

    config = Config.of(args)
    trainer = make_trainer(model, optimizer, config, **more)
    if trainer.adversary:
        print(trainer.adversary.describe(model.has_dynamics), flush=True)
    if config.session.precision != "fp32":
        report_precision(trainer, train_batches, config.session.precision)
    last = last or len(trainer.history.epochs) + config.optimizer.epochs
    trainer.fit(train_batches, test_batches, val_batches, last)


def evaluate(model: Any, batches: "Batches", rule: Rule, *more: Any, **named: Any) -> float:
    """The share of images that are classified correctly. more, named: see
    `experiment.inference.evaluate`."""
    from experiment import inference

    return inference.evaluate(model, batches, rule, *more, **named)


def attack(
    model: Any,
    images: Tensor,
    labels: Tensor,
    args: Any,
    eps: float,
    description: str = "",
    workers: "Workers | None" = None,
    report: Callable[[str, dict[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Attack every image at one eps, with each gradient method of --attack-grad unrolled through
    each number of --attack-step. images: uint8 (n, C, H, W); labels: (n,); args: as `make_model`
    takes it; report: gets each gradient and its result as soon as it is known.

    Returns {gradient: result, ..., "worst": result}, see `ART_Timesteps_Addition.attacks.summary`;
    `worst`, the strongest attack per image, only with several gradients. An attack without a
    gradient has one result, by its own name. Memory is that of one mini-batch.

    Each of `workers` takes a whole mini-batch whenever it is free, and all get the results. Random
    numbers depend on --seed and the place of the mini-batch alone: they are the same for every eps
    and gradient, for any number of workers, and wherever a sweep resumes."""
    from ART_Timesteps_Addition import attacks
    from data_utils import TASKS
    from experiment.config import Config
    from experiment.inference import predicting_neurons
    from experiment.timing import progress
    from experiment.workers import Workers

    config = Config.of(args)
    workers = workers or Workers()
    mbs = config.data.mbs
    x = (images.float() / 255).cpu().numpy()
    y = labels.cpu().numpy()
    settings = config.attack.at(eps)
    rule = dataclasses.replace(config.rule, T1=config.predict_steps)
    predict = functools.partial(predicting_neurons, model, rule=rule)
    target = attacks.Target(model, rule.loss, TASKS[config.data.task], rule.T1, predict)
    classifiers = target.classifiers(
        settings, config.attack.grads, config.attack_steps, config.attack.start, x
    )
    results = {}
    for label, classifier in classifiers.items():
        hops = settings.name == "hopskipjump" and eps
        candidates = attacks.Candidates.of(classifier, x) if hops else None
        batches = progress(range(0, max(len(x), 1), mbs), f"{description}, {label}")
        own = []
        for place, i in workers.deal(batches):
            batch = slice(i, i + mbs)
            seed = (config.session.seed or 0, i)
            result = attacks.attack_batch(
                classifier, x[batch], y[batch], settings, seed, candidates
            )
            own.append((place, result))
        results[label] = attacks.summary(workers.gather_dealt(own), x, settings.norm)
        report(label, results[label])
    if len(results) > 1:
        results["worst"] = attacks.worst_of(list(results.values()), x, settings.norm)
        report("worst", results["worst"])
    return results


@dataclasses.dataclass(eq=False, repr=False)
class Run:
    """A saved run, to use from Python.

    model    on `device`
    args     all its arguments, a namespace
    source   which checkpoint was loaded and how that model was chosen, as text
    task     its `data_utils.Task`
    """

    model: Any
    args: argparse.Namespace
    source: str
    device: torch.device
    task: "Task"

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.task.channels, self.task.size, self.task.size)

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.task.mean, self.task.std))
        return mean, std

    def predict(self, images: Any) -> Tensor:
        """The class of each image, int64 (n,), on the CPU, after the run's T1 steps. images: (n, C,
        H, W), a tensor or an array, uint8 or floats in [0, 1]; they are normalised here. Raises
        ValueError for others."""
        from experiment.config import Config
        from experiment.inference import predicting_neurons

        images = torch.as_tensor(images).cpu()
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected (n, {str(self._shape)[1:]}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, expected uint8, or numbers in [0, 1]")
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images range from {images.min():g} to {images.max():g}, expected numbers in "
                "[0, 1]"
            )
        mean, std = self._normalisation()
        rule = Config.of(self.args).rule
        chain = self.model.chain(rule.loss)
        classes = []
        for batch in images.split(self.args.mbs):
            x = ((batch - mean) / std).to(self.device)
            classes.append(chain.read(predicting_neurons(self.model, x, rule)).argmax(1).cpu())
        return torch.cat(classes)

    def classifier(self, **overrides: Any) -> "PyTorchClassifier":
        """ART's classifier of the model: images in [0, 1], normalised inside; predictions after T1
        steps, gradients through T2, by default the smaller of 29 and T1. overrides: arguments of
        `ART_Timesteps_Addition.pytorch.PyTorchClassifier`, T1, T2 and grad among them."""
        from ART_Timesteps_Addition.pytorch import PyTorchClassifier
        from experiment.config import ATTACK_STEP

        mean, std = self._normalisation()
        T1 = overrides.get("T1", self.args.T1)
        options = {
            "loss": nn.CrossEntropyLoss(),
            "criterion": make_criterion(self.args.loss),
            "T1": T1,
            "T2": min(ATTACK_STEP, T1),
            "input_shape": self._shape,
            "nb_classes": self.task.classes,
            "clip_values": (0.0, 1.0),
            "preprocessing": (mean.numpy(), std.numpy()),
            "device_type": "cpu" if self.device.type == "cpu" else "gpu",
        }
        # ART moves the model to the current GPU
        with torch.cuda.device_of(next(self.model.parameters())):
            return PyTorchClassifier(self.model, **{**options, **overrides})


def load_run(path: Any, device: torch.device | str | None = None) -> Run:
    """The `Run` in a run folder, its best model, or in one of its files. device: the GPU where
    there is one, if None. Raises UserError where nothing can be loaded."""
    from data_utils import TASKS, UserError
    from experiment.command_line import resolve
    from experiment.runs.checkpoint import load_weights, open_saved
    from experiment.validate import validate

    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"path is {path!r}, expected a run folder or a file in one")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    saved = open_saved(path, "evaluate")
    config = resolve({"todo": "evaluate"}, saved.args)
    validate(config)
    model = build(config)
    load_weights(model, saved)
    args = argparse.Namespace(**config.flat())
    return Run(model.to(device), args, saved.source, device, TASKS[config.data.task])
