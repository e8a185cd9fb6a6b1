"""Faster ways to take the steps of `dynamics`. All of it is optional: with TABLE emptied every number stays, to rounding.

A row says when it applies and what it does then: it rewrites the chain and the phase into ones whose steps cost less, or takes the steps of a
phase its own way. Rows are asked once a phase, in their order; every row that rewrites does, then the first way that applies is taken.
`output_in`: None where all neurons are wanted; a number k where only the read-out is, k steps after these.
"""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from energy import dynamics
from energy.activations import RESCALED, affine
from energy.connections import Convolution
from energy.dynamics import half_step, step

PAIRED = 2 ** 20  # neurons in a mini-batch up to which two phases, or two trajectories, are faster as one of twice the size


def relax(chain, phase, neurons, T, output_in=None):
    """`dynamics.relax` by the first way that applies. With `output_in` layers that do not reach the output may be as of an earlier step."""
    chain, phase = rewritten(chain, phase, T)
    for row in TABLE.values():
        if row.way and row.applies(chain, phase, neurons, T, output_in):
            return row.way(chain, phase, neurons, T, output_in)
    return dynamics.relax(chain, phase, neurons, T)


def relax_until_settled(chain, phase, T, tol, every=5):
    """`dynamics.relax_until_settled`, of the rewritten chain, and compiled where that was asked for."""
    chain, phase = rewritten(chain, phase, T)
    return dynamics.relax_until_settled(chain, phase, T, tol, every, _compiled_step(chain) if _compiles(chain, phase, None, T, None) else None)


def relax_both_signs(chain, phase, neurons, T):
    """The neurons after T steps nudged by phase.beta, and after T steps nudged by -phase.beta, each from `neurons`."""
    if "both signs" in TABLE and TABLE["both signs"].applies(chain, phase, neurons, T, None):
        signs = torch.tensor([1.0, -1.0], device=phase.drive.device, dtype=phase.drive.dtype).repeat_interleave(len(phase.drive)).view(-1, 1)
        twice, both = _twice(chain, phase)
        states = relax(twice, dataclasses.replace(both, beta=signs * phase.beta), [torch.cat([s, s]) for s in neurons], T)
        return [list(state) for state in zip(*(s.chunk(2) for s in states))]
    return [relax(chain, dataclasses.replace(phase, beta=beta), neurons, T) for beta in (phase.beta, -phase.beta)]


def rewritten(chain, phase, T):
    """(chain, phase) by the rows that rewrite them: the same T steps, to rounding, at less cost."""
    for row in TABLE.values():
        if row.rewrite and row.applies(chain, phase, None, T, None):
            chain, phase = row.rewrite(chain, phase)
    return chain, phase


def suited(chain, mbs):
    """The chain whose convolutions go the way that is fastest for mini-batches of mbs samples."""
    return _with_windows(chain, mbs) if "window products" in TABLE else chain


def _neurons(chain):
    """How many a sample has."""
    return sum(math.prod(c.post_shape) for c in chain.connections)


def _small(chain, phase):
    return len(phase.drive) * _neurons(chain) <= PAIRED


def _twice(chain, phase):
    """Chain and phase for a mini-batch that holds every sample twice, the whole batch behind itself."""
    n = len(phase.drive)
    chosen = torch.arange(2 * n, device=phase.drive.device) % n
    return chain.take(chosen), phase.take(chosen)


# ---- convolutions of small maps as products over their windows: pays on a CPU where the weights outnumber the pixels


def _pays_as_product(connection, mbs):
    if type(connection) is not Convolution:
        return False
    weight = connection.synapse.weight
    return (weight.device.type == "cpu" and 2 * mbs * connection.size[0] ** 2 <= weight.size(0)
            and weight.is_contiguous(memory_format=torch.channels_last))


def _with_windows(chain, mbs):
    if not any(_pays_as_product(c, mbs) for c in chain.connections):
        return chain
    return dataclasses.replace(chain, connections=tuple(c.windowed() if _pays_as_product(c, mbs) else c for c in chain.connections))


# ---- the affine part of an activation in the weights of a phase: pays where its steps save more passes than the weights take


def _folds(chain, phase, neurons, T, output_in):
    upper = chain.connections[1:]  # of the first only the drive is left
    if torch.is_grad_enabled() and any(c.routed for c in upper):
        return False  # rounding decides between equal winners of a max-pooling, and published attacks depend on it
    return (T > 1 and chain.activation in RESCALED and not chain.linear_output and not chain.compiled and phase.drive.dtype != torch.bfloat16
            and T * len(phase.drive) * _neurons(chain) >= 2 * sum(c.synapse.weight.numel() for c in upper))


def _folded(chain, phase):
    activation, gain, offset = RESCALED[chain.activation]
    connections = (chain.connections[0], *(c.scaled(gain, offset) for c in chain.connections[1:]))
    return (dataclasses.replace(chain, activation=activation, connections=connections),
            dataclasses.replace(phase, drive=affine(phase.drive, gain, offset), beta=gain * phase.beta))


# ---- the first step from zero neurons: there is no drive from above, and the bias from below


def _from_zero(chain, phase, neurons, T, output_in):
    drives = [phase.drive, *(c.bias_drive(len(phase.drive)) for c in chain.connections[1:])]
    if chain.linear_output:
        drives[-1] = drives[-1].clone()  # no state shares memory with a bias
    if phase.target is not None:
        drives[-1] = chain.nudge(drives[-1], phase, chain.zeros(phase.drive))
    return relax(chain, phase, [chain.activate(n, drive) for n, drive in enumerate(drives)], T - 1, output_in)


# ---- two trajectories: where a layer's next state depends on its neighbours alone, the odd layers at odd times with the even ones at even
# times never meet the others. They do where a nudge reads the top layer itself, and where the winners of a max-pooling are its own.


def _two_trajectories(chain, phase):
    return chain.schedule == "sync" and phase.target is None and not any(c.routed for c in chain.connections[1:])


def _one_trajectory(chain, phase, neurons, T, output_in):
    """Only the trajectory that ends in the output: half of the work."""
    for to_go in range(output_in + T - 1, output_in - 1, -1):  # steps from the end of this one until the output is read
        highest, lowest = len(chain) - 1 - to_go % 2, max(0, len(chain) - 1 - to_go)
        neurons = _upper(chain, phase, neurons, lowest, lambda *upper: half_step(*upper, (highest - lowest) % 2))
    return list(neurons)


def _both_trajectories(chain, phase, neurons, T, output_in):
    """Both in one mini-batch of twice the size, one a step ahead: half of the calls."""
    ahead = half_step(chain, phase, neurons, 1)
    twice, both = _twice(chain, phase)
    states = [torch.cat(pair) for pair in zip(ahead, neurons)]
    for t in range(T - 1):
        states = half_step(twice, both, states, t % 2)
    ahead, behind = zip(*(s.chunk(2) for s in states))
    behind = half_step(chain, phase, behind, (T - 1) % 2)
    return [(ahead if n % 2 == T % 2 else behind)[n] for n in range(len(chain))]


# ---- only what still reaches the output


def _output_cone(chain, phase, neurons, T, output_in):
    for left in reversed(range(T)):
        neurons = _upper(chain, phase, neurons, max(0, len(chain) - 1 - output_in - left), step)
    return list(neurons)


def _upper(chain, phase, neurons, lowest, advance):
    """`advance` of the layers from neurons[lowest] on; those below stay as they are."""
    if lowest == 0:
        return advance(chain, phase, neurons)
    drive = chain.connections[lowest].up(neurons[lowest - 1])[0]
    upper = dataclasses.replace(chain, connections=chain.connections[lowest:])
    return [*neurons[:lowest], *advance(upper, dataclasses.replace(phase, drive=drive), neurons[lowest:])]


# ---- asynchronous steps: a layer does not change between its connection's way up and the next way down, so that no route is found twice


class _Remembering:
    """A connection that remembers the route of the state it last drove up."""

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


def _with_remembered_routes(chain, phase):
    return dataclasses.replace(chain, connections=tuple(_Remembering(c) if c.routed else c for c in chain.connections)), phase


# ---- steps through torch.compile


def _compiles(chain, phase, neurons, T, output_in):
    return chain.compiled and not torch.is_grad_enabled() and "compiled" in TABLE


@functools.cache
def _compiled(function):
    return torch.compile(function)


def _compiled_step(chain):
    return _compiled(dynamics.STEPS[chain.schedule])


def _compiled_relax(chain, phase, neurons, T, output_in):
    neurons = chain.zeros(phase.drive) if neurons is None else list(neurons)
    for _ in range(T):
        neurons = _compiled_step(chain)(chain, phase, neurons)
    return neurons


class Row(NamedTuple):
    """applies(chain, phase, neurons, T, output_in) -> bool, and either rewrite(chain, phase) -> (chain, phase) or
    way(chain, phase, neurons, T, output_in) -> neurons; neither where a function of its own asks for the row."""

    applies: Callable
    rewrite: Callable | None = None
    way: Callable | None = None


TABLE = {
    "window products": Row(lambda chain, phase, *_: any(_pays_as_product(c, len(phase.drive)) for c in chain.connections),
                           rewrite=lambda chain, phase: (_with_windows(chain, len(phase.drive)), phase)),
    "folded activation": Row(_folds, rewrite=_folded),
    "remembered routes": Row(lambda chain, phase, neurons, T, output_in: chain.schedule == "async" and not chain.compiled
                             and any(c.routed for c in chain.connections[1:]), rewrite=_with_remembered_routes),
    "both signs": Row(lambda chain, phase, *_: _small(chain, phase)),
    "first step": Row(lambda chain, phase, neurons, T, output_in: neurons is None and T > 0 and chain.schedule == "sync", way=_from_zero),
    "compiled": Row(_compiles, way=_compiled_relax),
    "one trajectory": Row(lambda chain, phase, neurons, T, output_in: output_in is not None and neurons is not None
                          and _two_trajectories(chain, phase), way=_one_trajectory),
    "both trajectories": Row(lambda chain, phase, neurons, T, output_in: T >= 7 and neurons is not None and _two_trajectories(chain, phase)
                             and _small(chain, phase), way=_both_trajectories),
    "output cone": Row(lambda chain, phase, neurons, T, output_in: output_in is not None and neurons is not None and chain.schedule == "sync",
                       way=_output_cone),
}
