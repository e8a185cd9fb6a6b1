"""Faster implementations of the steps of `dynamics`. All are optional: with an empty TABLE every
number is the same, to rounding.

A row of the table applies under a condition. It either rewrites the chain and the phase so that
their steps cost less, or takes the steps itself. Rows are tried once per phase, in order: all that
rewrite, then the first that takes steps, which may pass some of them on to the later rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy import dynamics
from energy.activations import RESCALED, affine, my_hard_sig
from energy.connections import Connection, Convolution, Dense
from energy.dynamics import CONVERGED, Chain, EarlyStop, Neurons, Phase, half_step, step

# Neurons in a mini-batch up to which two phases, or two trajectories, are faster as one mini-batch
# of twice the size.
PAIRED = 2**20


class Steps(NamedTuple):
    """T steps of `chain` in `phase` from `neurons` (from zero if None). output_in: None where all
    neurons are wanted; a number k where only the read-out is, k steps after these."""

    chain: Chain
    phase: Phase
    neurons: Sequence[Tensor] | None = None
    T: int = 1
    output_in: int | None = None

    @property
    def mbs(self) -> int:
        return len(self.phase.drive)

    @property
    def size(self) -> int:
        """Neurons in the mini-batch."""
        return self.mbs * sum(math.prod(c.post_shape) for c in self.chain.connections)

    @property
    def routed(self) -> bool:
        """Whether there is a max-pooling above the first connection, which only drives."""
        return any(c.routed for c in self.chain.connections[1:])


class Row(NamedTuple):
    """A faster implementation: applies(steps) -> bool, and either rewrite(steps) -> Steps or
    relax(steps) -> neurons; neither for a row that one function of this module looks up."""

    applies: Callable[[Steps], bool]
    rewrite: Callable[[Steps], Steps] | None = None
    relax: Callable[[Steps], Neurons] | None = None


def relax(
    chain: Chain,
    phase: Phase,
    neurons: Sequence[Tensor] | None,
    T: int,
    output_in: int | None = None,
) -> Neurons:
    """`dynamics.relax` by the rows that apply. With `output_in`, layers that no longer reach the
    output may be those of an earlier step."""
    return _taken(rewritten(Steps(chain, phase, neurons, T, output_in)))


def _taken(steps: Steps) -> Neurons:
    for row in TABLE.values():
        if row.relax and row.applies(steps):
            return row.relax(steps)
    return dynamics.relax(steps.chain, steps.phase, steps.neurons, steps.T)


def rewritten(steps: Steps) -> Steps:
    """The same steps at less cost, by all rows that rewrite: the same numbers, to rounding."""
    for row in TABLE.values():
        if row.rewrite and row.applies(steps):
            steps = row.rewrite(steps)
    return steps


def trajectory(
    chain: Chain, phase: Phase, T: int, neurons: Sequence[Tensor] | None = None
) -> Iterator[Neurons]:
    """The neurons after each of T steps, one after another, from `neurons` (from zero if None).

    Steps are taken one by one. To round as `relax` does over all T steps, pass the `rewritten`
    chain and phase. Gradients flow through the steps if the caller records them."""
    for _ in range(T):
        neurons = relax(chain, phase, neurons, 1)
        yield neurons


def relax_until_converged(
    chain: Chain, phase: Phase, T: int, tol: float, every: int = dynamics.WINDOW
) -> tuple[Neurons, EarlyStop]:
    """`dynamics.relax_until_converged`, of the rewritten chain, and compiled where requested."""
    steps = rewritten(Steps(chain, phase, None, T))
    advance = _compiled_step if "compiled" in TABLE and _compiles(steps) else None
    return dynamics.relax_until_converged(steps.chain, steps.phase, T, tol, every, advance)


def from_zero(
    chain: Chain, phase: Phase, T: int, tol: float = 0.0, output_in: int | None = None
) -> tuple[Neurons, EarlyStop | None]:
    """(the neurons after T steps from zero, None); with `tol` what `relax_until_converged` returns,
    after at most T steps; `output_in`, see `relax`, then has no effect."""
    if tol:
        return relax_until_converged(chain, phase, T, tol)
    return relax(chain, phase, None, T, output_in), None


# An image that five steps change by less than this is taken as fixed, see `relax_and_check`.
FIXED = CONVERGED / 100


@torch.no_grad()
def relax_and_check(
    chain: Chain, phase: Phase, T: int, ends_early: bool = False
) -> tuple[Neurons, Tensor]:
    """(the neurons after T free steps from zero; whether each image has converged by then, (mbs,)
    bool, see `dynamics.has_converged`). The read-out is bit for bit that of `relax` from zero with
    output_in 0.

    ends_early: where only convergence is wanted: leave out the steps between those that change an
    image by less than FIXED and the last five."""
    steps = rewritten(Steps(chain, phase, None, T))
    last = dynamics.window(T)
    before = None
    if T > last and ends_early:
        before = relax_until_converged(chain, phase, T - last, FIXED)[0]
    elif T > last:
        before = _every_layer(steps._replace(T=T - last))
    after = _every_layer(steps._replace(neurons=before, T=last))
    return after, dynamics.has_converged(before or chain.zeros(phase.drive), after)


def _every_layer(steps: Steps) -> Neurons:
    """The steps without the rows that leave out layers, and without those that enlarge the
    mini-batch, which can round differently."""
    if "first step" in TABLE and _starts_from_zero(steps):
        steps = steps._replace(neurons=_first_step(steps), T=steps.T - 1)
    if "compiled" in TABLE and _compiles(steps):
        return _compiled_relax(steps)
    return dynamics.relax(steps.chain, steps.phase, steps.neurons, steps.T)


def relax_both_signs(
    chain: Chain, phase: Phase, neurons: Sequence[Tensor], T: int
) -> tuple[Neurons, Neurons]:
    """The neurons after T steps nudged by phase.beta, and after T steps nudged by -phase.beta, each
    from `neurons`."""
    if "both signs" in TABLE and TABLE["both signs"].applies(Steps(chain, phase)):
        twice, both = _twice(chain, phase)
        beta = both.drive.new_full((len(both.drive), 1), phase.beta)  # (2 mbs, 1)
        beta[len(phase.drive) :] *= -1
        both = dataclasses.replace(both, beta=beta)
        states = relax(twice, both, [torch.cat([s, s]) for s in neurons], T)
        halves = [s.chunk(2) for s in states]
        return [plus for plus, _ in halves], [minus for _, minus in halves]
    opposite = dataclasses.replace(phase, beta=-phase.beta)
    return relax(chain, phase, neurons, T), relax(chain, opposite, neurons, T)


def suited(chain: Chain, mbs: int) -> Chain:
    """The chain with the convolutions that are fastest for mini-batches of mbs samples."""
    return _with_windows(chain, mbs) if "window products" in TABLE else chain


def _twice(chain: Chain, phase: Phase) -> tuple[Chain, Phase]:
    """Chain and phase for a mini-batch of twice the size: the batch, and the batch again."""
    n = len(phase.drive)
    chosen = torch.arange(2 * n, device=phase.drive.device) % n
    return chain.take(chosen), phase.take(chosen)


def _small(steps: Steps) -> bool:
    return steps.size <= PAIRED


# ---- convolutions of small maps as products over their windows: faster on a CPU if there are more
# weights than pixels


def _pays_as_product(connection: Connection, mbs: int) -> bool:
    if type(connection) is not Convolution:
        return False
    weight = connection.synapse.weight
    return (
        weight.device.type == "cpu"
        and 2 * mbs * connection.size[0] ** 2 <= weight.size(0)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _with_windows(chain: Chain, mbs: int) -> Chain:
    connections = tuple(
        c.windowed() if isinstance(c, Convolution) and _pays_as_product(c, mbs) else c
        for c in chain.connections
    )
    if connections == chain.connections:
        return chain
    return dataclasses.replace(chain, connections=connections)


# ---- the affine part of an activation folded into the weights: faster if the steps save more
# passes over memory than the weights take


def _folds(steps: Steps) -> bool:
    chain = steps.chain
    if torch.is_grad_enabled() and steps.routed:
        # rounding decides between equal winners of a max-pooling, and published attacks depend on
        # it
        return False
    # in bfloat16 only the gain 1/2 of my_hard_sig rounds nothing
    exact = steps.phase.drive.dtype != torch.bfloat16 or chain.activation is my_hard_sig
    weights = sum(c.synapse.weight.numel() for c in chain.connections[1:])
    return (
        steps.T > 1
        and chain.activation in RESCALED
        and not chain.linear_output
        and not chain.compiled
        and exact
        and steps.T * steps.size >= 2 * weights
    )


def _folded(steps: Steps) -> Steps:
    base, gain, offset = RESCALED[steps.chain.activation]
    first, *upper = steps.chain.connections  # of the first only its drive is used
    connections = (first, *(c.scaled(gain, offset) for c in upper))
    chain = dataclasses.replace(steps.chain, activation=base, connections=connections)
    phase = dataclasses.replace(
        steps.phase, drive=affine(steps.phase.drive, gain, offset), beta=gain * steps.phase.beta
    )
    return steps._replace(chain=chain, phase=phase)


# ---- the first step from zero neurons: no top-down drive, and bottom-up the bias alone


def _starts_from_zero(steps: Steps) -> bool:
    return steps.neurons is None and steps.T > 0 and steps.chain.schedule == "sync"


def _from_zero(steps: Steps) -> Neurons:
    return _taken(steps._replace(neurons=_first_step(steps), T=steps.T - 1))


def _first_step(steps: Steps) -> Neurons:
    chain = steps.chain
    phase = steps.phase
    drives = [phase.drive, *(c.bias_drive(steps.mbs) for c in chain.connections[1:])]
    if chain.linear_output:
        drives[-1] = drives[-1].clone()  # no state shares memory with a bias
    if phase.target is not None:
        drives[-1] = chain.nudge(drives[-1], phase, chain.zeros(phase.drive))
    return [chain.activate(n, drive) for n, drive in enumerate(drives)]


# ---- two trajectories: if the next state of a layer depends only on its neighbours, the odd layers
# at odd times and the even ones at even times are independent of the others. A nudge, which reads
# the top layer itself, and a max-pooling, whose winners depend on the layer itself, couple the two.


def _has_two_trajectories(steps: Steps) -> bool:
    free = steps.phase.target is None and steps.neurons is not None
    return free and steps.chain.schedule == "sync" and not steps.routed


def _one_trajectory(steps: Steps) -> Neurons:
    """Only the trajectory that ends in the output: half of the work."""
    assert steps.neurons is not None and steps.output_in is not None
    top = len(steps.chain) - 1
    neurons = list(steps.neurons)
    for to_go in reversed(range(steps.output_in, steps.output_in + steps.T)):
        # to_go: steps left until the output is read
        lowest = max(0, top - to_go)
        parity = (top - to_go % 2 - lowest) % 2
        neurons = _upper(steps, neurons, lowest, functools.partial(half_step, parity=parity))
    return neurons


def _both_trajectories(steps: Steps) -> Neurons:
    """Both in one mini-batch of twice the size, one a step ahead: half of the calls."""
    assert steps.neurons is not None
    chain = steps.chain
    phase = steps.phase
    T = steps.T
    first = half_step(chain, phase, steps.neurons, 1)
    twice, both = _twice(chain, phase)
    states = [torch.cat(pair) for pair in zip(first, steps.neurons)]  # (2 mbs, ...)
    for t in range(T - 1):
        states = half_step(twice, both, states, t % 2)
    halves = [s.chunk(2) for s in states]
    ahead = [a for a, _ in halves]
    behind = half_step(chain, phase, [b for _, b in halves], (T - 1) % 2)
    return [ahead[n] if n % 2 == T % 2 else behind[n] for n in range(len(chain))]


# ---- only the layers that still reach the output


def _output_cone(steps: Steps) -> Neurons:
    assert steps.neurons is not None and steps.output_in is not None
    neurons = list(steps.neurons)
    for to_go in reversed(range(steps.output_in, steps.output_in + steps.T)):
        neurons = _upper(steps, neurons, max(0, len(steps.chain) - 1 - to_go), step)
    return neurons


def _upper(steps: Steps, neurons: Neurons, lowest: int, advance: dynamics.Step) -> Neurons:
    """`advance` of the layers from neurons[lowest] on; those below stay as they are."""
    if lowest == 0:
        return advance(steps.chain, steps.phase, neurons)
    drive = steps.chain.connections[lowest].up(neurons[lowest - 1])[0]
    upper = dataclasses.replace(steps.chain, connections=steps.chain.connections[lowest:])
    phase = dataclasses.replace(steps.phase, drive=drive)
    return [*neurons[:lowest], *advance(upper, phase, neurons[lowest:])]


# ---- asynchronous steps: a layer does not change between its connection's bottom-up drive and the
# next top-down one


class _Remembering:
    """A connection that keeps the route of its last bottom-up drive, so that no route is computed
    twice."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pre: Tensor | None = None
        self._route: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def up(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        drive, route = self._connection.up(pre)
        self._pre = pre
        self._route = route
        return drive, route

    def route(self, pre: Tensor) -> Tensor | None:
        return self._route if pre is self._pre else self._connection.route(pre)

    def take(self, chosen: Tensor) -> "_Remembering":
        return _Remembering(self._connection.take(chosen))


def _remembers(steps: Steps) -> bool:
    return steps.chain.schedule == "async" and steps.routed and not steps.chain.compiled


def _with_remembered_routes(steps: Steps) -> Steps:
    connections: Any = tuple(_Remembering(c) if c.routed else c for c in steps.chain.connections)
    return steps._replace(chain=dataclasses.replace(steps.chain, connections=connections))


# ---- steps through torch.compile


def _compiles(steps: Steps) -> bool:
    return steps.chain.compiled and not torch.is_grad_enabled()


@functools.cache
def _compiled(function: dynamics.Step) -> dynamics.Step:
    # beyond the limit, steps would silently run uncompiled; a training compiles far fewer
    config: Any = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)
    return torch.compile(function)


def _with_beta_as_tensor(phase: Phase) -> Phase:
    if phase.target is None or torch.is_tensor(phase.beta):
        return phase
    return dataclasses.replace(phase, beta=phase.drive.new_full((len(phase.drive), 1), phase.beta))


def _in_step_layout(chain: Chain, phase: Phase, neurons: Sequence[Tensor]) -> Neurons:
    """The neurons in the memory layout that a step returns: a map below a dense layer is one row
    per image; the strides of a map of a single pixel are arbitrary."""
    above = [*chain.connections[1:], None if phase.target is None else chain.readout]
    found = []
    for n, c in zip(neurons, above):
        if n.dim() == 2:
            found.append(n)
        elif isinstance(c, Dense) or n.shape[2:] == (1, 1):
            found.append(n.flatten(1).view(n.shape))
        else:
            found.append(n.contiguous(memory_format=torch.channels_last))
    return found


def _compiled_step(chain: Chain, phase: Phase, neurons: Sequence[Tensor]) -> Neurons:
    """A step that is compiled once for each kind of phase (nudged or not, with dropout masks or
    without), for any number of images and any beta."""
    if len(phase.drive) == 1:  # the compiler would specialise on it
        return dynamics.STEPS[chain.schedule](chain, phase, neurons)
    phase = _with_beta_as_tensor(phase)
    neurons = _in_step_layout(chain, phase, neurons)
    masks = [c.mask for c in (*chain.connections, chain.readout) if c is not None]
    for tensor in (phase.drive, phase.target, phase.beta, *masks, *neurons):
        if torch.is_tensor(tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(dynamics.STEPS[chain.schedule])(chain, phase, neurons)


def _compiled_relax(steps: Steps) -> Neurons:
    chain = steps.chain
    phase = _with_beta_as_tensor(steps.phase)
    neurons = chain.zeros(phase.drive) if steps.neurons is None else list(steps.neurons)
    for _ in range(steps.T):
        neurons = _compiled_step(chain, phase, neurons)
    return neurons


TABLE: dict[str, Row] = {
    "window products": Row(
        lambda s: any(_pays_as_product(c, s.mbs) for c in s.chain.connections),
        rewrite=lambda s: s._replace(chain=_with_windows(s.chain, s.mbs)),
    ),
    "folded activation": Row(_folds, rewrite=_folded),
    "remembered routes": Row(_remembers, rewrite=_with_remembered_routes),
    "both signs": Row(_small),
    "first step": Row(_starts_from_zero, relax=_from_zero),
    "compiled": Row(_compiles, relax=_compiled_relax),
    "one trajectory": Row(
        lambda s: s.output_in is not None and _has_two_trajectories(s), relax=_one_trajectory
    ),
    "both trajectories": Row(
        lambda s: s.T >= 7 and _has_two_trajectories(s) and _small(s), relax=_both_trajectories
    ),
    "output cone": Row(
        lambda s: s.output_in is not None and s.neurons is not None and s.chain.schedule == "sync",
        relax=_output_cone,
    ),
}
