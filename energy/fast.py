"""Faster ways to take the steps of `dynamics`. All of it is optional: with TABLE emptied every number stays, to
rounding.

A row of the table says when it applies and what it does then: it rewrites the chain and the phase into ones whose steps
cost less, or takes the steps its own way. Rows are asked once a phase, in their order: every row that rewrites does,
then the first way that applies is taken, and may leave part of the steps to the others.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from energy import dynamics
from energy.activations import RESCALED, affine, my_hard_sig
from energy.connections import Convolution, Dense
from energy.dynamics import CONVERGED, Chain, Phase, half_step, step

# Neurons in a mini-batch up to which two phases, or two trajectories, are faster as one of twice the size.
PAIRED = 2 ** 20


class Steps(NamedTuple):
    """What is to be done: T steps of `chain` in `phase` from `neurons` (from zero if None). output_in: None where all
    neurons are wanted; a number k where only the read-out is, k steps after these."""

    chain: Chain
    phase: Phase
    neurons: Any = None
    T: int = 1
    output_in: int | None = None

    @property
    def mbs(self):
        return len(self.phase.drive)

    @property
    def size(self):
        """Neurons in the mini-batch."""
        return self.mbs * sum(math.prod(c.post_shape) for c in self.chain.connections)

    @property
    def routed(self):
        """Whether there is a max-pooling above the first connection, which only drives."""
        return any(c.routed for c in self.chain.connections[1:])


class Row(NamedTuple):
    """applies(steps) -> bool, and either of rewrite(steps) -> Steps and way(steps) -> neurons; neither where a function
    of its own asks for the row."""

    applies: Callable
    rewrite: Callable | None = None
    way: Callable | None = None


def relax(chain, phase, neurons, T, output_in=None):
    """`dynamics.relax` by the first way that applies. With `output_in` layers that do not reach the output may be as of
    an earlier step."""
    return _taken(rewritten(Steps(chain, phase, neurons, T, output_in)))


def _taken(steps):
    for row in TABLE.values():
        if row.way and row.applies(steps):
            return row.way(steps)
    return dynamics.relax(*steps[:4])


def rewritten(steps):
    """The same steps by the rows that rewrite them: to rounding the same numbers, at less cost."""
    for row in TABLE.values():
        if row.rewrite and row.applies(steps):
            steps = row.rewrite(steps)
    return steps


def relax_until_settled(chain, phase, T, tol, every=dynamics.WINDOW):
    """`dynamics.relax_until_settled`, of the rewritten chain, and compiled where that was asked for."""
    steps = rewritten(Steps(chain, phase, None, T))
    advance = _compiled_step if "compiled" in TABLE and _compiles(steps) else None
    return dynamics.relax_until_settled(steps.chain, steps.phase, T, tol, every, advance)


def from_zero(chain, phase, T, tol=0.0, output_in=None):
    """(the neurons after T steps from zero, None); with `tol` what `relax_until_settled` gives, after at most T. Then
    output_in, see `relax`, plays no part."""
    if tol:
        return relax_until_settled(chain, phase, T, tol)
    return relax(chain, phase, None, T, output_in), None


FIXED = CONVERGED / 100  # what five steps change by less than this is not followed further, see `relax_and_check`


@torch.no_grad()
def relax_and_check(chain, phase, T, ends_early=False):
    """(the neurons after T free steps from zero; whether each image has converged by then, (mbs,) bool, see
    `dynamics.has_converged`). The read-out is bit for bit that of `relax` from zero with output_in 0.

    ends_early: leave out the steps between those that change an image by less than FIXED and the last five, where only
    the convergence is wanted."""
    steps, last, before = rewritten(Steps(chain, phase, None, T)), dynamics.window(T), None
    if T > last:
        before = (relax_until_settled(chain, phase, T - last, FIXED)[0] if ends_early
                  else _every_layer(steps._replace(T=T - last)))
    after = _every_layer(steps._replace(neurons=before, T=last))
    return after, dynamics.has_converged(before or chain.zeros(phase.drive), after)


def _every_layer(steps):
    """The steps without the ways that leave out layers, and without those that take more images at once, which can
    round in another way."""
    if "first step" in TABLE and _starts_from_zero(steps):
        steps = steps._replace(neurons=_first_step(steps), T=steps.T - 1)
    if "compiled" in TABLE and _compiles(steps):
        return _compiled_relax(steps)
    return dynamics.relax(*steps[:4])


def relax_both_signs(chain, phase, neurons, T):
    """The neurons after T steps nudged by phase.beta, and after T steps nudged by -phase.beta, each from `neurons`."""
    if "both signs" in TABLE and TABLE["both signs"].applies(Steps(chain, phase)):
        twice, both = _twice(chain, phase)
        beta = both.drive.new_full((len(both.drive), 1), phase.beta)
        beta[len(phase.drive):] *= -1
        states = relax(twice, dataclasses.replace(both, beta=beta), [torch.cat([s, s]) for s in neurons], T)
        return [list(state) for state in zip(*(s.chunk(2) for s in states))]
    return [relax(chain, dataclasses.replace(phase, beta=beta), neurons, T) for beta in (phase.beta, -phase.beta)]


def suited(chain, mbs):
    """The chain whose convolutions go the way that is fastest for mini-batches of mbs samples."""
    return _with_windows(chain, mbs) if "window products" in TABLE else chain


def _twice(chain, phase):
    """Chain and phase for a mini-batch that holds every sample twice, the whole batch behind itself."""
    n = len(phase.drive)
    chosen = torch.arange(2 * n, device=phase.drive.device) % n
    return chain.take(chosen), phase.take(chosen)


def _small(steps):
    return steps.size <= PAIRED


# ---- convolutions of small maps as products over their windows: pays on a CPU where weights outnumber the pixels


def _pays_as_product(connection, mbs):
    if type(connection) is not Convolution:
        return False
    weight = connection.synapse.weight
    return (weight.device.type == "cpu" and 2 * mbs * connection.size[0] ** 2 <= weight.size(0)
            and weight.is_contiguous(memory_format=torch.channels_last))


def _with_windows(chain, mbs):
    pays = [_pays_as_product(c, mbs) for c in chain.connections]
    if not any(pays):
        return chain
    connections = tuple(c.windowed() if product else c for c, product in zip(chain.connections, pays))
    return dataclasses.replace(chain, connections=connections)


# ---- the affine part of an activation in the weights: pays where the steps save more passes than the weights take


def _folds(steps):
    chain = steps.chain
    if torch.is_grad_enabled() and steps.routed:
        return False  # rounding decides between equal winners of a max-pooling, and published attacks depend on it
    return (steps.T > 1 and chain.activation in RESCALED and not chain.linear_output and not chain.compiled
            and (steps.phase.drive.dtype != torch.bfloat16 or chain.activation is my_hard_sig)  # half is exact
            and steps.T * steps.size >= 2 * sum(c.synapse.weight.numel() for c in chain.connections[1:]))


def _folded(steps):
    activation, gain, offset = RESCALED[steps.chain.activation]
    first, *upper = steps.chain.connections  # of the first only the drive is left
    chain = dataclasses.replace(steps.chain, activation=activation,
                                connections=(first, *(c.scaled(gain, offset) for c in upper)))
    phase = dataclasses.replace(steps.phase, drive=affine(steps.phase.drive, gain, offset),
                                beta=gain * steps.phase.beta)
    return steps._replace(chain=chain, phase=phase)


# ---- the first step from zero neurons: there is no drive from above, and the bias from below


def _starts_from_zero(steps):
    return steps.neurons is None and steps.T > 0 and steps.chain.schedule == "sync"


def _from_zero(steps):
    return _taken(steps._replace(neurons=_first_step(steps), T=steps.T - 1))


def _first_step(steps):
    chain, phase = steps.chain, steps.phase
    drives = [phase.drive, *(c.bias_drive(steps.mbs) for c in chain.connections[1:])]
    if chain.linear_output:
        drives[-1] = drives[-1].clone()  # no state shares memory with a bias
    if phase.target is not None:
        drives[-1] = chain.nudge(drives[-1], phase, chain.zeros(phase.drive))
    return [chain.activate(n, drive) for n, drive in enumerate(drives)]


# ---- two trajectories: where a layer's next state depends on its neighbours alone, the odd layers at odd times with
# the even ones at even times never meet the others. They do where a nudge reads the top layer itself, and where the
# winners of a max-pooling are its own.


def _has_two_trajectories(steps):
    free = steps.phase.target is None and steps.neurons is not None
    return free and steps.chain.schedule == "sync" and not steps.routed


def _one_trajectory(steps):
    """Only the trajectory that ends in the output: half of the work."""
    top, neurons = len(steps.chain) - 1, steps.neurons
    for to_go in reversed(range(steps.output_in, steps.output_in + steps.T)):  # steps left until the output is read
        lowest = max(0, top - to_go)
        neurons = _upper(steps, neurons, lowest, functools.partial(half_step, parity=(top - to_go % 2 - lowest) % 2))
    return list(neurons)


def _both_trajectories(steps):
    """Both in one mini-batch of twice the size, one a step ahead: half of the calls."""
    chain, phase, neurons, T, _ = steps
    ahead = half_step(chain, phase, neurons, 1)
    twice, both = _twice(chain, phase)
    states = [torch.cat(pair) for pair in zip(ahead, neurons)]
    for t in range(T - 1):
        states = half_step(twice, both, states, t % 2)
    ahead, behind = zip(*(s.chunk(2) for s in states))
    behind = half_step(chain, phase, behind, (T - 1) % 2)
    return [(ahead if n % 2 == T % 2 else behind)[n] for n in range(len(chain))]


# ---- only what still reaches the output


def _output_cone(steps):
    neurons = steps.neurons
    for to_go in reversed(range(steps.output_in, steps.output_in + steps.T)):
        neurons = _upper(steps, neurons, max(0, len(steps.chain) - 1 - to_go), step)
    return list(neurons)


def _upper(steps, neurons, lowest, advance):
    """`advance` of the layers from neurons[lowest] on; those below stay as they are."""
    if lowest == 0:
        return advance(steps.chain, steps.phase, neurons)
    drive = steps.chain.connections[lowest].up(neurons[lowest - 1])[0]
    upper = dataclasses.replace(steps.chain, connections=steps.chain.connections[lowest:])
    return [*neurons[:lowest], *advance(upper, dataclasses.replace(steps.phase, drive=drive), neurons[lowest:])]


# ---- asynchronous steps: a layer does not change between its connection's way up and the next way down


class _Remembering:
    """A connection that remembers the route of the state it last drove up, so that none is found twice."""

    def __init__(self, connection):
        self._connection, self._pre, self._route = connection, None, None

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def up(self, pre):
        drive, route = self._connection.up(pre)
        self._pre, self._route = pre, route
        return drive, route

    def route(self, pre):
        return self._route if pre is self._pre else self._connection.route(pre)

    def take(self, chosen):
        return _Remembering(self._connection.take(chosen))


def _remembers(steps):
    return steps.chain.schedule == "async" and steps.routed and not steps.chain.compiled


def _with_remembered_routes(steps):
    connections = tuple(_Remembering(c) if c.routed else c for c in steps.chain.connections)
    return steps._replace(chain=dataclasses.replace(steps.chain, connections=connections))


# ---- steps through torch.compile


def _compiles(steps):
    return steps.chain.compiled and not torch.is_grad_enabled()


@functools.cache
def _compiled(function):
    # of a training these are far fewer; what is beyond the limit would run uncompiled without a word
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function)


def _with_beta_as_tensor(phase):
    if phase.target is None or torch.is_tensor(phase.beta):
        return phase
    return dataclasses.replace(phase, beta=phase.drive.new_full((len(phase.drive), 1), phase.beta))


def _laid_out(chain, phase, neurons):
    """The neurons as a step leaves them: a map that a dense layer above has driven lies as one row an image, and one of
    a single pixel has strides that say nothing."""
    above = [*chain.connections[1:], None if phase.target is None else chain.readout]
    return [n if n.dim() == 2 else n.flatten(1).view(n.shape) if isinstance(c, Dense) or n.shape[2:] == (1, 1)
            else n.contiguous(memory_format=torch.channels_last) for n, c in zip(neurons, above)]


def _compiled_step(chain, phase, neurons):
    """A step that is compiled once for each kind of phase (nudged or not, with masks or without), for any number of
    images and any beta."""
    if len(phase.drive) == 1:  # to the compiler a number of its own
        return dynamics.STEPS[chain.schedule](chain, phase, neurons)
    phase, neurons = _with_beta_as_tensor(phase), _laid_out(chain, phase, neurons)
    masks = [c.mask for c in (*chain.connections, chain.readout) if c is not None]
    for tensor in (phase.drive, phase.target, phase.beta, *masks, *neurons):
        if torch.is_tensor(tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(dynamics.STEPS[chain.schedule])(chain, phase, neurons)


def _compiled_relax(steps):
    chain, phase, neurons = steps[:3]
    neurons = chain.zeros(phase.drive) if neurons is None else list(neurons)
    phase = _with_beta_as_tensor(phase)
    for _ in range(steps.T):
        neurons = _compiled_step(chain, phase, neurons)
    return neurons


TABLE = {
    "window products": Row(lambda s: any(_pays_as_product(c, s.mbs) for c in s.chain.connections),
                           rewrite=lambda s: s._replace(chain=_with_windows(s.chain, s.mbs))),
    "folded activation": Row(_folds, rewrite=_folded),
    "remembered routes": Row(_remembers, rewrite=_with_remembered_routes),
    "both signs": Row(_small),
    "first step": Row(_starts_from_zero, way=_from_zero),
    "compiled": Row(_compiles, way=_compiled_relax),
    "one trajectory": Row(lambda s: s.output_in is not None and _has_two_trajectories(s), way=_one_trajectory),
    "both trajectories": Row(lambda s: s.T >= 7 and _has_two_trajectories(s) and _small(s), way=_both_trajectories),
    "output cone": Row(lambda s: s.output_in is not None and s.neurons is not None and s.chain.schedule == "sync",
                       way=_output_cone),
}
