"""The dynamics of an energy model, as on the page of the paper: one step, and a loop over it.

A model has layers s_0 = x (the image, fixed), s_1 ... s_N and, per sample, the primitive function

    Phi = sum_n s_n . up_n(s_{n-1}) - beta * L(read-out of s_N, y).

Its neurons follow s_n(t+1) = act(dPhi/ds_n at t): the drive from below, up_n(s_{n-1}), plus the drive from above, the
adjoint of up_{n+1} applied to s_{n+1}, both written out in `connections`, and minus beta dL/ds_N at the top. No step
needs automatic differentiation.

Neurons are a list of N tensors (mbs, *shape of the layer), and `neurons[n - 1]` is s_n. Other ways to take the same
steps, faster, are in `fast`.
"""
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from energy.connections import Connection, Dense, take_samples


@dataclasses.dataclass(frozen=True)
class Chain:
    """What moves.

    connections     one per layer of neurons: into s_1, ..., s_N
    activation      of the neurons
    readout         the connection that reads logits out of s_N, whose other end is no neuron; None: the read-out is s_N
                    itself
    linear_output   whether s_N takes dPhi/ds_N as it is: logits under the cross-entropy, where there is no `readout`
    schedule        `sync`: all layers step at once; `async`: odd and even ones in turn, each seeing the other's new
                    state
    compiled        whether steps without a graph go through torch.compile
    """

    connections: tuple[Connection, ...]
    activation: Callable
    readout: Dense | None = None
    linear_output: bool = False
    schedule: str = "sync"
    compiled: bool = False

    def __len__(self):
        return len(self.connections)

    def input_drive(self, x):
        """up_1(x), which does not change in time: computed once, it serves every step of every phase on x, (mbs,
        ...)."""
        return self.connections[0].up(x.to(self.dtype))[0]

    @property
    def dtype(self):
        return self.connections[0].synapse.weight.dtype

    def zeros(self, drive):
        """Zero neurons for the mini-batch of `drive`."""
        zeros = [drive.new_zeros(len(drive), *c.post_shape) for c in self.connections]
        return [z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z for z in zeros]

    def read(self, neurons):
        """The read-out, (mbs, classes)."""
        return neurons[-1] if self.readout is None else self.readout.up(neurons[-1])[0]

    def activate(self, n, drive):
        """The new state of neurons[n], driven by `drive`."""
        return drive if self.linear_output and n == len(self) - 1 else self.activation(drive)

    def nudge(self, drive, phase, neurons):
        """`drive` on s_N minus beta dL/ds_N."""
        if phase.target is None:
            return drive
        slope = phase.slope(self.read(neurons))
        if self.readout is not None:
            return self.readout.down(-phase.beta * slope, None, drive)
        return drive - phase.beta * slope if torch.is_tensor(phase.beta) else torch.sub(drive, slope, alpha=phase.beta)

    def masked(self, masks):
        """The chain whose connections, and read-out, see the layers below through masks (or None), see
        `Connection.mask`."""
        *masks, last = [*masks, None] if self.readout is None else masks
        connections = tuple(dataclasses.replace(c, mask=mask) for c, mask in zip(self.connections, masks))
        readout = self.readout and dataclasses.replace(self.readout, mask=last)
        return dataclasses.replace(self, connections=connections, readout=readout)

    def take(self, chosen):
        """The chain for some samples of the mini-batch, by their indices: of its masks, if it has any, those."""
        readout = self.readout and self.readout.take(chosen)
        return dataclasses.replace(self, connections=tuple(c.take(chosen) for c in self.connections), readout=readout)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is fixed while a mini-batch moves.

    drive    of the image on s_1, (mbs, *shape of s_1)
    target   one-hot labels, (mbs, classes); None in a free phase
    beta     how strongly they nudge: a number, or one per sample, (mbs, 1)
    loss     `mse`: L = 0.5 ||read-out - target||^2; `cel`: the cross-entropy; `linear`: L = read-out . target
    """

    drive: torch.Tensor
    target: torch.Tensor | None = None
    beta: float | torch.Tensor = 0.0
    loss: str = "mse"

    def slope(self, readout):
        """dL/d(read-out), (mbs, classes)."""
        if self.loss == "linear":
            return self.target
        return (readout.softmax(1) if self.loss == "cel" else readout) - self.target

    def take(self, chosen):
        """The phase of some samples, by their indices."""
        beta = self.beta[chosen] if torch.is_tensor(self.beta) else self.beta
        drive, target = take_samples(self.drive, chosen), take_samples(self.target, chosen)
        return dataclasses.replace(self, drive=drive, target=target, beta=beta)


def step(chain, phase, neurons):
    """One synchronous step: s_n <- act(dPhi/ds_n) for all n at once."""
    drives = [phase.drive]
    for n, connection in enumerate(chain.connections[1:], 1):
        up, route = connection.up(neurons[n - 1])
        drives[n - 1] = connection.down(neurons[n], route, drives[n - 1])
        drives.append(up)
    drives[-1] = chain.nudge(drives[-1], phase, neurons)
    return [chain.activate(n, drive) for n, drive in enumerate(drives)]


def half_step(chain, phase, neurons, parity):
    """Every second layer, from neurons[parity] on, from its neighbours; the others stay."""
    neurons = list(neurons)
    for n in range(parity, len(chain), 2):
        drive = phase.drive if n == 0 else chain.connections[n].up(neurons[n - 1])[0]
        if n + 1 < len(chain):
            above = chain.connections[n + 1]
            drive = above.down(neurons[n + 1], above.route(neurons[n]), drive)
        else:
            drive = chain.nudge(drive, phase, neurons)
        neurons[n] = chain.activate(n, drive)
    return neurons


def async_step(chain, phase, neurons):
    """One asynchronous step: s_1, s_3, ... from their neighbours, then s_2, s_4, ... from the new ones. A fixed point
    that keeps its max-pooling winners is one of the synchronous step too, but from zero the two can reach different
    ones."""
    return half_step(chain, phase, half_step(chain, phase, neurons, 0), 1)


STEPS = {"sync": step, "async": async_step}


def relax(chain, phase, neurons, T):
    """The neurons after T steps from `neurons` (from zero if None), which stay as they are."""
    neurons = chain.zeros(phase.drive) if neurons is None else list(neurons)
    for _ in range(T):
        neurons = STEPS[chain.schedule](chain, phase, neurons)
    return neurons


# An image has converged once WINDOW steps have together changed no layer of it by this share of the layer's norm. A
# single step is no measure: near a saddle an image can creep, and leave it later.
CONVERGED, WINDOW = 1e-4, 5


def relative_change(before, after):
    """How far each image moved: the largest over the layers of ||after - before|| / ||after||, (mbs,). before, after:
    neurons."""
    changes = [(b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-12) for a,
               b in zip(before, after)]
    return torch.stack(changes).amax(0)


def window(T):
    """How many of T steps, the last ones, decide whether an image has converged by then."""
    return min(WINDOW, T)


def has_converged(before, after, tol=CONVERGED):
    """Whether each image has converged, (mbs,) bool: the one meaning that all the program has of it. before, after:
    its neurons `window(T)` steps before the T-th step, and after it. tol: where --tol asks for another threshold."""
    return relative_change(before, after) < tol


class Settling(NamedTuple):
    """steps: how many each image took, (mbs,) whole numbers; settled: whether it had settled by then, (mbs,) bool."""

    steps: torch.Tensor
    settled: torch.Tensor


class Leaving(NamedTuple):
    """When images that have settled leave the batch: at every `looks`-th look, if they are more than `share` of it. The
    host only then asks the device how many they are, and waits for it."""

    looks: int
    share: float

    @property
    def at_once(self):
        """Whether none that has settled stays."""
        return self.looks == 1 and not self.share

    @classmethod
    def of(cls, device):
        """On a CPU as soon as they can; on a GPU rarely, as waiting for it costs more than a few images do."""
        return cls(4, 0.25) if device.type == "cuda" else cls(1, 0.0)


@torch.no_grad()
def relax_until_settled(chain, phase, T, tol, every=WINDOW, advance=None, leaving=None):
    """As `relax` from zero neurons for at most T steps, but an image stops once it has settled: once `every` steps have
    together changed no layer of it by `tol` of that layer's norm. Images that have settled leave the batch, see
    `Leaving`, by default that of the device; it changes no state and no number of steps. advance: what takes a step,
    the chain's own unless given.

    Returns (neurons, Settling)."""
    advance, device = advance or STEPS[chain.schedule], phase.drive.device
    leaving, mbs, looks = leaving or Leaving.of(device), len(phase.drive), 0
    result, state = chain.zeros(phase.drive), chain.zeros(phase.drive)
    steps, settled = torch.full((mbs,), T, device=device), torch.zeros(mbs, dtype=torch.bool, device=device)
    # of the batch: which images they are, their states at the last look and where they stopped, whether they move
    active, before, stopped, moves = torch.arange(mbs, device=device), state, state, torch.ones_like(settled)
    for done in range(1, T + 1):
        state = advance(chain, phase, state)
        if done % every and done < T:
            continue
        stopped, looks = state if leaving.at_once else _where(moves, state, stopped), looks + 1
        if done % every == 0:  # else the last look came early
            still = moves & has_converged(before, state, tol)
            steps[active] = torch.where(still, done, steps[active])
            settled[active] |= still
            moves = moves & ~still
        before = state
        if looks % leaving.looks or done == T:
            continue
        count = int(moves.sum())
        if count < len(active) * (1 - leaving.share) or not count:
            left, gone = (chosen.nonzero().flatten() for chosen in (moves, ~moves))
            _put(result, active[gone], stopped, gone)
            chain, phase, active, moves = chain.take(left), phase.take(left), active[left], moves[left]
            state = before = [take_samples(s, left) for s in state]
            stopped = state
        if not count:
            return result, Settling(steps, settled)
    _put(result, active, stopped, slice(None))
    return result, Settling(steps, settled)


def _where(chosen, ours, theirs):
    """The neurons `ours` of the chosen samples, (mbs,) bool, `theirs` of the others."""
    return [torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(ours, theirs)]


def _put(result, images, neurons, chosen):
    for all_images, some in zip(result, neurons):
        all_images[images] = some[chosen]
