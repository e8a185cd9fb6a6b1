"""The dynamics of an energy model: one time step, and the loop over it.

A model has layers s_0 = x (the image, fixed), s_1 ... s_N and, per sample, the primitive function

    Phi = sum_n s_n . up_n(s_{n-1}) - beta * L(read-out of s_N, y).

Its neurons follow s_n(t+1) = act(dPhi/ds_n at t): the bottom-up drive up_n(s_{n-1}), plus the
top-down drive, the adjoint of up_{n+1} applied to s_{n+1}, both written out in `connections`, and
minus beta dL/ds_N at the top. No step needs automatic differentiation.

Neurons are a list of N tensors (mbs, *shape of the layer), and `neurons[n - 1]` is s_n. Faster
implementations of the same steps are in `fast`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from energy.activations import Activation
from energy.connections import Connection, Dense, take_samples

Neurons = list[Tensor]
Criterion = nn.Module | str  # a loss of PyTorch, or its name: `mse` or `cel`


def loss_name(criterion: Criterion) -> str:
    """`mse` or `cel`, of a loss of PyTorch or of its name."""
    if isinstance(criterion, str):
        return criterion
    return "mse" if isinstance(criterion, nn.MSELoss) else "cel"


def readout_loss(readout: Tensor, y: Tensor, loss: str) -> Tensor:
    """L of each sample, (mbs,): 0.5 * ||read-out - onehot(y)||^2 for `mse`, the cross-entropy for
    `cel`. readout: (mbs, classes); y: class indices (mbs,)."""
    if loss == "mse":
        target = F.one_hot(y, readout.size(1)).to(readout.dtype)
        return 0.5 * (readout - target).square().sum(1)
    return F.cross_entropy(readout, y, reduction="none")


@dataclasses.dataclass(frozen=True)
class Chain:
    """The part of a model that its time steps need.

    connections     one per layer of neurons: into s_1, ..., s_N
    activation      of the neurons
    readout         the connection that reads logits out of s_N, whose other end is no neuron;
                    None: the read-out is s_N itself
    linear_output   whether s_N takes dPhi/ds_N without activation: logits under the cross-entropy,
                    where there is no `readout`
    schedule        `sync`: all layers step at once; `async`: odd and even ones in turn, each from
                    the other's new state
    compiled        whether steps without a graph go through torch.compile
    """

    connections: tuple[Connection, ...]
    activation: Activation
    readout: Dense | None = None
    linear_output: bool = False
    schedule: str = "sync"
    compiled: bool = False

    def __len__(self) -> int:
        return len(self.connections)

    def input_drive(self, x: Tensor) -> Tensor:
        """up_1(x), (mbs, *shape of s_1), of x, (mbs, ...). It does not change in time: all steps of
        all phases on x share it."""
        return self.connections[0].up(x.to(self.dtype))[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.connections[0].synapse.weight.dtype

    def zeros(self, drive: Tensor) -> Neurons:
        """Zero neurons for the mini-batch of `drive`."""
        zeros = [drive.new_zeros(len(drive), *c.post_shape) for c in self.connections]
        return [
            z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z for z in zeros
        ]

    def read(self, neurons: Sequence[Tensor]) -> Tensor:
        """The read-out, (mbs, classes)."""
        return neurons[-1] if self.readout is None else self.readout.up(neurons[-1])[0]

    def activate(self, n: int, drive: Tensor) -> Tensor:
        """The new state of neurons[n] under `drive`."""
        if self.linear_output and n == len(self) - 1:
            return drive
        return self.activation(drive)

    def nudge(self, drive: Tensor, phase: "Phase", neurons: Sequence[Tensor]) -> Tensor:
        """`drive` on s_N minus beta dL/ds_N."""
        if phase.target is None:
            return drive
        slope = phase.slope(self.read(neurons))  # (mbs, classes)
        if self.readout is not None:
            return self.readout.down(-phase.beta * slope, None, drive)
        if torch.is_tensor(phase.beta):
            return drive - phase.beta * slope
        return torch.sub(drive, slope, alpha=phase.beta)

    def masked(self, masks: Sequence[Tensor | None]) -> "Chain":
        """The chain with a dropout mask (or None) for each connection, the read-out's last, see
        `Connection.mask`."""
        readout = self.readout
        if readout is not None:
            readout = dataclasses.replace(readout, mask=masks[-1])
            masks = masks[:-1]
        connections = tuple(
            dataclasses.replace(c, mask=mask) for c, mask in zip(self.connections, masks)
        )
        return dataclasses.replace(self, connections=connections, readout=readout)

    def take(self, chosen: Tensor) -> "Chain":
        """The chain for some samples of the mini-batch, by their indices: with their dropout
        masks, if it has any."""
        connections = tuple(c.take(chosen) for c in self.connections)
        readout = self.readout and self.readout.take(chosen)
        return dataclasses.replace(self, connections=connections, readout=readout)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What stays fixed during the steps of a mini-batch.

    drive    of the image on s_1, (mbs, *shape of s_1)
    target   one-hot labels, (mbs, classes); None in a free phase
    beta     nudging strength: a number, or one per sample, (mbs, 1)
    loss     `mse`: L = 0.5 ||read-out - target||^2; `cel`: the cross-entropy;
             `linear`: L = read-out . target
    """

    drive: Tensor
    target: Tensor | None = None
    beta: Any = 0.0  # float, or Tensor (mbs, 1)
    loss: str = "mse"

    def slope(self, readout: Tensor) -> Tensor:
        """dL/d(read-out), (mbs, classes), of a nudged phase."""
        assert self.target is not None
        if self.loss == "linear":
            return self.target
        return (readout.softmax(1) if self.loss == "cel" else readout) - self.target

    def take(self, chosen: Tensor) -> "Phase":
        """The phase of some samples, by their indices."""
        target = self.target if self.target is None else take_samples(self.target, chosen)
        beta = self.beta[chosen] if torch.is_tensor(self.beta) else self.beta
        drive = take_samples(self.drive, chosen)
        return dataclasses.replace(self, drive=drive, target=target, beta=beta)


def step(chain: Chain, phase: Phase, neurons: Sequence[Tensor]) -> Neurons:
    """One synchronous step: s_n <- act(dPhi/ds_n) for all n at once."""
    drives = [phase.drive]
    for n, connection in enumerate(chain.connections[1:], 1):
        up, route = connection.up(neurons[n - 1])  # (mbs, *shape of s_{n+1})
        drives[n - 1] = connection.down(neurons[n], route, drives[n - 1])  # (mbs, *shape of s_n)
        drives.append(up)
    drives[-1] = chain.nudge(drives[-1], phase, neurons)  # (mbs, *shape of s_N)
    return [chain.activate(n, drive) for n, drive in enumerate(drives)]


def half_step(chain: Chain, phase: Phase, neurons: Sequence[Tensor], parity: int) -> Neurons:
    """Every second layer, from neurons[parity] on, from its neighbours; the others stay."""
    state = list(neurons)
    for n in range(parity, len(chain), 2):
        drive = phase.drive if n == 0 else chain.connections[n].up(state[n - 1])[0]
        if n + 1 < len(chain):
            above = chain.connections[n + 1]
            route = above.route(state[n])
            drive = above.down(state[n + 1], route, drive)  # (mbs, *shape of s_{n+1})
        else:
            drive = chain.nudge(drive, phase, state)
        state[n] = chain.activate(n, drive)  # (mbs, *shape of s_{n+1})
    return state


def async_step(chain: Chain, phase: Phase, neurons: Sequence[Tensor]) -> Neurons:
    """One asynchronous step: s_1, s_3, ... from their neighbours, then s_2, s_4, ... from the new
    ones. A fixed point that keeps its max-pooling winners is one of the synchronous step too, but
    from zero the two can reach different ones."""
    return half_step(chain, phase, half_step(chain, phase, neurons, 0), 1)


Step = Callable[[Chain, Phase, Sequence[Tensor]], Neurons]
STEPS: dict[str, Step] = {"sync": step, "async": async_step}


def relax(chain: Chain, phase: Phase, neurons: Sequence[Tensor] | None, T: int) -> Neurons:
    """The neurons after T steps from `neurons` (from zero if None), which stay unchanged."""
    state = chain.zeros(phase.drive) if neurons is None else list(neurons)
    for _ in range(T):
        state = STEPS[chain.schedule](chain, phase, state)
    return state


# An image has converged once WINDOW steps together change none of its layers by this share of the
# layer's norm. One step is not enough: near a saddle neurons move slowly before they leave it.
CONVERGED = 1e-4
WINDOW = 5


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How far each image moved, (mbs,): the largest over the layers of ||after - before|| /
    ||after||. before, after: neurons."""
    changes = []
    for b, a in zip(before, after):
        length = a.flatten(1).norm(dim=1).clamp(min=1e-12)  # (mbs,)
        changes.append((a - b).flatten(1).norm(dim=1) / length)
    return torch.stack(changes).amax(0)


def window(T: int) -> int:
    """How many of T steps, the last ones, decide whether an image has converged by then."""
    return min(WINDOW, T)


def has_converged(
    before: Sequence[Tensor], after: Sequence[Tensor], tol: float = CONVERGED
) -> Tensor:
    """Whether each image has converged, (mbs,) bool: the criterion of the whole program, except for
    audits. before, after: neurons `window(T)` steps before the end of the T-th step, and at its
    end. tol: another threshold, of --tol."""
    return relative_change(before, after) < tol


class EarlyStop(NamedTuple):
    """Where each image stopped. steps: that it took, (mbs,) int64; converged: whether it had
    converged to the tolerance by then, (mbs,) bool."""

    steps: Tensor
    converged: Tensor


class Leaving(NamedTuple):
    """When images that have converged leave the batch: at every `tests`-th test of convergence, if
    they are more than `share` of it. Only then does the host wait for the device."""

    tests: int
    share: float

    @property
    def at_once(self) -> bool:
        """Whether images leave as soon as they have converged."""
        return self.tests == 1 and not self.share

    @classmethod
    def of(cls, device: torch.device) -> "Leaving":
        """On a CPU at every test; on a GPU rarely, because waiting for it costs more than computing
        a few images."""
        return cls(4, 0.25) if device.type == "cuda" else cls(1, 0.0)


@dataclasses.dataclass
class _Active:
    """The part of a mini-batch that still takes steps, n images.

    chain, phase   for these images
    images         their indices in the mini-batch, (n,)
    state          their neurons now
    before         their neurons at the last test of convergence
    stopped        the neurons to return: at convergence, or at the last test
    active         whether they have not converged yet, (n,) bool: images leave together, see
                   `Leaving`
    """

    chain: Chain
    phase: Phase
    images: Tensor
    state: Neurons
    before: Neurons
    stopped: Neurons
    active: Tensor

    @classmethod
    def from_zero(cls, chain: Chain, phase: Phase) -> "_Active":
        """All images of a mini-batch, at zero neurons."""
        mbs = len(phase.drive)
        device = phase.drive.device
        zeros = chain.zeros(phase.drive)
        return cls(
            chain,
            phase,
            torch.arange(mbs, device=device),
            zeros,
            zeros,
            zeros,
            torch.ones(mbs, dtype=torch.bool, device=device),
        )

    def without_stopped(self, result: Neurons) -> "_Active":
        """The images that have not converged; the neurons of the others are written to
        `result`."""
        left = self.active.nonzero().flatten()
        gone = (~self.active).nonzero().flatten()
        _put(result, self.images[gone], [s[gone] for s in self.stopped])
        state = [take_samples(s, left) for s in self.state]
        return _Active(
            self.chain.take(left),
            self.phase.take(left),
            self.images[left],
            state,
            state,
            state,
            self.active[left],
        )


@torch.no_grad()
def relax_until_converged(
    chain: Chain,
    phase: Phase,
    T: int,
    tol: float,
    every: int = WINDOW,
    advance: Step | None = None,
    leaving: Leaving | None = None,
) -> tuple[Neurons, EarlyStop]:
    """`relax` from zero neurons for at most T steps; an image stops once it has converged, that is
    once `every` steps together change none of its layers by `tol` of the layer's norm.

    leaving: when converged images leave the batch, by default as suits the device; it changes
    neither neurons nor numbers of steps. advance: takes a step, by default the chain's own. Returns
    (neurons, EarlyStop)."""
    advance = advance or STEPS[chain.schedule]
    leaving = leaving or Leaving.of(phase.drive.device)
    result = chain.zeros(phase.drive)
    batch = _Active.from_zero(chain, phase)
    tests = 0
    steps = torch.full_like(batch.images, T)  # (mbs,)
    converged = torch.zeros_like(batch.active)  # (mbs,)
    for done in range(1, T + 1):
        batch.state = advance(batch.chain, batch.phase, batch.state)
        if done % every and done < T:
            continue
        tests += 1
        batch.stopped = (
            batch.state if leaving.at_once else _where(batch.active, batch.state, batch.stopped)
        )
        if done % every == 0:  # otherwise T is no multiple of `every`
            now = batch.active & has_converged(batch.before, batch.state, tol)  # (n,)
            steps[batch.images] = torch.where(now, done, steps[batch.images])
            converged[batch.images] |= now
            batch.active = batch.active & ~now
        batch.before = batch.state
        if tests % leaving.tests or done == T:
            continue
        count = int(batch.active.sum())
        if count < len(batch.images) * (1 - leaving.share) or not count:
            batch = batch.without_stopped(result)
        if not count:
            return result, EarlyStop(steps, converged)
    _put(result, batch.images, batch.stopped)
    return result, EarlyStop(steps, converged)


def _where(chosen: Tensor, ours: Neurons, theirs: Neurons) -> Neurons:
    """The neurons `ours` of the chosen samples, (mbs,) bool, `theirs` of the others."""
    return [torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(ours, theirs)]


def _put(result: Neurons, images: Tensor, neurons: Neurons) -> None:
    """Write the neurons of some images to those of all."""
    for all_images, some in zip(result, neurons):
        all_images[images] = some
