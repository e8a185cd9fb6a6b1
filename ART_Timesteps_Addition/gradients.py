"""Gradient methods of attacks: back-propagation through time, the same with slopes that do not
vanish, Equilibrium Propagation, and a softened copy whose neurons do not saturate.

Nothing here changes the energy model. Gradients are computed in fp32, with exact products, whatever
the precision of predictions: attacks add up small differences, of images here and, for EP, of
neurons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ART_Timesteps_Addition.scaling import Pullback, normalized
from ART_Timesteps_Addition.settings import GradientMethod
from energy import dynamics, fast
from energy.activations import CURVES, RESCALED, Activation, my_sigmoid
from energy.dynamics import Chain, Neurons, Phase

# ---------------------------------------------------------------------- other weights, other slopes


Parameters = dict[str, Tensor]


class _Holder(torch.nn.Module):
    """A model and a function to call on it.

    `torch.func.functional_call` restores the parameters of a module that is in two places as plain
    tensors: no other attribute may contain the model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def with_parameters(
    model: Any, parameters: Parameters, function: Callable[..., Any], *args: Any
) -> Any:
    """function(model, *args) with other parameters in the model."""
    inside = {f"model.{name}": tensor for name, tensor in parameters.items()}
    return torch.func.functional_call(_Holder(model), inside, (function, *args), tie_weights=False)


def fp32_parameters(model: Any) -> Parameters:
    """The model's parameters without a graph: converted to fp32 from lower precisions, otherwise
    in the same memory."""
    return {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters()
    }


def published_layout(parameters: Parameters) -> Parameters:
    """The parameters in the memory layout that reproduces the published attacks bit by bit.

    Perturbations are multiples of one step. Exact ties in a max-pooling are therefore common, and
    the rounding of the convolution decides the winner. AVX-512 kernels of a CPU sum in the same
    order in every layout. AVX2 kernels do not: the published images were computed with them in
    PyTorch's default layout, and only it reproduces them, at a cost of a few per cent. No layout
    reproduces them on other devices, whose weights keep theirs."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return parameters
    return {name: p.contiguous() if p.device.type == "cpu" else p for name, p in parameters.items()}


class _Smooth(torch.autograd.Function):
    """An activation whose backward slope never vanishes.

    Outside of its corners it is at least the slope of an arctangent that leaves the corner with the
    steepest slope. It falls with the distance but, unlike the slope of a hard activation or of a
    sigmoid, never underflows to zero."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, activation: Activation) -> Tensor:
        with torch.enable_grad():
            leaf = drive.detach().requires_grad_()
            out = activation(leaf)
            (slope,) = torch.autograd.grad(out.sum(), leaf)
        curve = CURVES[activation]
        low, high = curve.corners
        outside = torch.maximum(low - drive, drive - high).clamp(min=0)
        tail = curve.slope / (1 + (16 * outside / (high - low)) ** 2)
        ctx.save_for_backward(
            torch.where((outside > 0) | (slope == 0), torch.maximum(slope, tail), slope)
        )
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None


@dataclasses.dataclass(frozen=True)
class Smooth:
    """An activation with the backward slope of `_Smooth`."""

    activation: Activation

    def __call__(self, drive: Tensor) -> Tensor:
        return _Smooth.apply(drive, self.activation)


# folded into the weights whenever the original is, so that both round alike
RESCALED[Smooth(my_sigmoid)] = RESCALED[my_sigmoid]._replace(base=Smooth(torch.sigmoid))


def _has_curve(chain: Chain) -> bool:
    """Whether the chain's activation is registered. A chain without activation, as that of a
    feed-forward network, has none. Raises ValueError for any other activation."""
    if chain.activation in CURVES:
        return True
    if chain.linear_output and len(chain) == 1:
        return False
    name = getattr(chain.activation, "__name__", repr(chain.activation))
    raise ValueError(
        f"the gradient methods smooth and soft do not know the activation {name}: register it, see "
        "energy.activations.register"
    )


def smoothed(chain: Chain) -> Chain:
    """The chain with the same states, and with backward slopes that do not vanish (`_Smooth`).

    In a feed-forward network those of activations of energy models. Raises ValueError for a chain
    whose activation is not registered."""
    if not _has_curve(chain):
        connections = tuple(connection.with_slopes(Smooth) for connection in chain.connections)
        return dataclasses.replace(chain, connections=connections)
    return dataclasses.replace(chain, activation=Smooth(chain.activation))


@dataclasses.dataclass(frozen=True)
class SoftChain(Chain):
    """A chain that scales the drives of its neurons about the middle of the activation.

    factors: one per layer, the top layer's last (a chain may lack its lowest layers)."""

    factors: tuple[float, ...] = ()

    def activate(self, n: int, drive: Tensor) -> Tensor:
        factor = self.factors[n - len(self)]
        if factor < 1 and not (self.linear_output and n == len(self) - 1):
            drive = factor * drive + (1 - factor) * _centre(self.activation)
        return super().activate(n, drive)


def _centre(activation: Activation) -> float:
    original = activation.activation if isinstance(activation, Smooth) else activation
    return CURVES[original].centre


# Root mean square of a soft chain's drives, relative to the middle of the activation, in units of
# half its width.
TARGET_DRIVE = 1.0


def softened(chain: Chain, factors: Sequence[float]) -> SoftChain:
    """The smoothed chain as a `SoftChain` with the factors of `softness`.

    Its states are close to those of a saturated original, with slopes that do not vanish."""
    fields = {field.name: getattr(chain, field.name) for field in dataclasses.fields(Chain)}
    fields["activation"] = smoothed(chain).activation
    return SoftChain(**fields, factors=tuple(factors) or (1.0,) * len(chain))


@torch.no_grad()
def softness(chain: Chain, x: Tensor, T: int, rounds: int = 4) -> tuple[float, ...]:
    """The factors, at most 1, that bring the drives of each layer to TARGET_DRIVE.

    Drives are those of the mini-batch x, (mbs, ...), after T steps.

    Softening one layer changes the drives of the others: this takes a few rounds."""
    factors = (1.0,) * len(chain)
    if not _has_curve(chain):
        return factors
    curve = CURVES[chain.activation]
    low, high = curve.corners
    phase = Phase(chain.input_drive(x))
    for _ in range(rounds):
        neurons = fast.relax(softened(chain, factors), phase, None, T)
        identity = dataclasses.replace(chain, activation=lambda drive: drive)
        drives = []
        for drive in dynamics.step(identity, phase, neurons):
            deviation = (drive - curve.centre).double().square().mean().sqrt().item()
            drives.append(deviation / ((high - low) / 2))
        factors = tuple(min(1.0, TARGET_DRIVE / max(drive, 1e-30)) for drive in drives)
    return factors


# ------------------------------------------------------------------------------- gradient methods

Read = Callable[[Chain, Neurons], Tensor]  # neurons -> read-out, (mbs, classes)


def _logits(chain: Chain, neurons: Neurons) -> Tensor:
    return chain.read(neurons)


def through_time(
    model: Any, x: Tensor, loss: str, T1: int, method: GradientMethod, read: Read = _logits
) -> tuple[Tensor, Pullback]:
    """The read-out after method.steps steps, (mbs, classes), and back-propagation through them.

    `smooth` takes slopes that do not vanish, `soft` those of a softened copy, whose read-out is
    returned. loss: that the model was trained with; T1: steps of a prediction."""
    parameters = fp32_parameters(model)

    def chain_of(model: Any) -> Chain:
        chain = model.chain(loss)
        if method.grad == "soft":
            return softened(chain, method.softness)
        return smoothed(chain) if method.grad == "smooth" else chain

    def before(model: Any, x: Tensor) -> Neurons:
        chain = chain_of(model)
        phase = Phase(chain.input_drive(x))
        return fast.from_zero(chain, phase, T1 - method.steps, method.tol, method.steps)[0]

    def unrolled(model: Any, x: Tensor, neurons: Neurons | None) -> Tensor:
        chain = chain_of(model)
        phase = Phase(chain.input_drive(x))
        if method.states == "last":
            return read(chain, fast.relax(chain, phase, neurons, method.steps, 0))
        log_probabilities = [
            (method.gain * read(chain, state)).log_softmax(1)
            for state in fast.trajectory(chain, phase, method.steps, neurons)
        ]
        return torch.stack(log_probabilities).mean(0)

    neurons = None
    if method.start == "equilibrium" and T1 > method.steps:
        with torch.no_grad():
            neurons = with_parameters(model, parameters, before, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = with_parameters(model, published_layout(parameters), unrolled, leaf, neurons)

    def pullback(grad: Tensor) -> Tensor:
        if not out.requires_grad:  # fewer steps than layers: the read-out does not depend on x
            return torch.zeros_like(leaf)
        # ART requests a gradient per class: the graph is kept
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    rescales = method.grad != "bptt" and method.rescale
    return out.detach(), normalized(pullback) if rescales else pullback


def by_equilibrium_propagation(
    model: Any, x: Tensor, loss: str, T1: int, method: GradientMethod, read: Read = _logits
) -> tuple[Tensor, Pullback]:
    """The read-out of the free equilibrium, (mbs, classes), and dL/dx by EP for any loss L on it.

    With g = dL/d(read-out), the neurons nudged by +beta and -beta along g give
    dL/dx ~ -[dPhi/dx(s_+) - dPhi/dx(s_-)] / (2 beta). No graph of the time steps is kept."""
    parameters = fp32_parameters(model)

    def relaxed(model: Any) -> tuple[Tensor, Neurons, Tensor]:
        chain = model.chain(loss)
        drive = chain.input_drive(x)
        free = fast.from_zero(chain, Phase(drive), T1, method.tol)[0]
        return drive, free, chain.read(free).clone()

    with torch.no_grad():
        drive, free, out = with_parameters(model, parameters, relaxed)

    @torch.no_grad()
    def contrast(model: Any, direction: Tensor) -> Tensor:
        chain = model.chain(loss)
        phase = Phase(drive, direction, method.beta, "linear")
        plus, minus = fast.relax_both_signs(chain, phase, free, method.steps)
        first = chain.connections[0]
        route = first.route(x)
        return first.down(minus[0] - plus[0], route, torch.zeros_like(x))  # (mbs, ...)

    def pullback(grad: Tensor) -> Tensor:
        # all images are nudged by the same length, whatever the confidence of their predictions
        norm = grad.norm(dim=1, keepdim=True)
        direction = grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
        scale = (norm / (2 * method.beta)).view(-1, *[1] * (x.dim() - 1))
        return with_parameters(model, parameters, contrast, direction) * scale

    return out, pullback


METHODS = {
    "bptt": through_time,
    "smooth": through_time,
    "ep": by_equilibrium_propagation,
    "soft": through_time,
}
