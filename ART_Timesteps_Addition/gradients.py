"""Ways to the gradient of an attack: back through the time steps, the same with slopes that do not
vanish, by Equilibrium Propagation, and through a twin whose neurons do not saturate.

Nothing here changes the energy model. Gradients are taken in fp32, with exact products, whatever
predictions are made in: attacks add up small differences, of images here and, for EP, of states.
"""

import dataclasses

import torch

from energy import dynamics, fast
from energy.activations import RESCALED, ctrd_hard_sig, hard_sigmoid, my_hard_sig, my_sigmoid
from energy.dynamics import Chain, Phase

# ---------------------------------------------------------------------- other weights, other slopes


class _Holder(torch.nn.Module):
    """A model and a function to call on it. `torch.func.functional_call` puts the parameters of a
    module that it finds in two places back as plain tensors, so that the model must be in no other
    attribute of what is called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(self.model, *args)


def with_parameters(model, parameters, function, *args):
    """function(model, *args) with other tensors, {name: tensor}, in place of the model's parameters
    meanwhile."""
    inside = {f"model.{name}": tensor for name, tensor in parameters.items()}
    return torch.func.functional_call(_Holder(model), inside, (function, *args), tie_weights=False)


def fp32_parameters(model):
    """The model's parameters without a graph, {name: tensor}: copies in fp32, or, in fp32 and fp64,
    the same memory."""
    return {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32))
        for name, p in model.named_parameters()
    }


def published_layout(parameters):
    """The parameters in the layout in which gradients come out as in the published attacks, bit by
    bit.

    Perturbations are multiples of one step, so that exact ties in a max-pooling are common, and the
    rounding of the convolution decides who wins. A CPU's kernels for AVX-512 sum in the same order
    everywhere, whatever the layout; those for AVX2 do not, and the published images, made with them
    in PyTorch's default layout, are got again only in it. It costs a few per cent. Other devices do
    not give the published bits in any layout: their weights stay."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return parameters
    return {name: p.contiguous() if p.device.type == "cpu" else p for name, p in parameters.items()}


# The interval around an activation's steepest point in which the tangent there stays within its
# range, and that slope.
CORNERS = {
    hard_sigmoid: (0.0, 1.0, 1.0),
    my_hard_sig: (0.0, 2.0, 0.5),
    ctrd_hard_sig: (-0.5, 0.5, 1.0),
    my_sigmoid: (0.0, 1.0, 1.0),
    torch.sigmoid: (-2.0, 2.0, 0.25),
    torch.tanh: (-1.0, 1.0, 1.0),
}


class _Smooth(torch.autograd.Function):
    """An activation whose backward pass has, outside of its corners, at least the slope of an
    arctangent that leaves the corner with the steepest slope: it falls with the distance but,
    unlike those of a hard activation and of a sigmoid, never underflows to zero."""

    @staticmethod
    def forward(ctx, drive, activation):
        with torch.enable_grad():
            leaf = drive.detach().requires_grad_()
            out = activation(leaf)
            (slope,) = torch.autograd.grad(out.sum(), leaf)
        low, high, steepest = CORNERS[activation]
        outside = torch.maximum(low - drive, drive - high).clamp(min=0)
        tail = steepest / (1 + (16 * outside / (high - low)) ** 2)
        ctx.save_for_backward(
            torch.where((outside > 0) | (slope == 0), torch.maximum(slope, tail), slope)
        )
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def _smooth(activation):
    return lambda drive: _Smooth.apply(drive, activation)


SMOOTH = {activation: _smooth(activation) for activation in CORNERS}
# folded into the weights wherever its twin is, so that both round alike
RESCALED[SMOOTH[my_sigmoid]] = (SMOOTH[torch.sigmoid], *RESCALED[my_sigmoid][1:])


def smoothed(chain):
    """The chain with the same states, and with backward slopes that do not vanish (see
    `_Smooth`)."""
    return dataclasses.replace(chain, activation=SMOOTH.get(chain.activation, chain.activation))


@dataclasses.dataclass(frozen=True)
class SoftChain(Chain):
    """A chain whose neurons feel their drive, counted from the middle of the activation, times a
    factor: one for each layer, the top one's last (a chain may lack its lowest layers)."""

    factors: tuple = ()

    def activate(self, n, drive):
        factor = self.factors[n - len(self)]
        if factor < 1 and not (self.linear_output and n == len(self) - 1):
            drive = factor * drive + (1 - factor) * MIDDLE[self.activation]
        return super().activate(n, drive)


MIDDLE = {
    function: sum(CORNERS[activation][:2]) / 2
    for activation, smooth in SMOOTH.items()
    for function in (activation, smooth)
}
DRIVEN = 1.0  # how far the drives of a soft chain are from the middle: root mean square, in units of half its width


def softened(chain, factors):
    """The smoothed chain as a `SoftChain`: a twin that computes much the same where neurons are
    driven far beyond what saturates them, and has a slope there. factors: see `softness`."""
    fields = {field.name: getattr(chain, field.name) for field in dataclasses.fields(Chain)}
    return SoftChain(
        **{**fields, "activation": SMOOTH.get(chain.activation, chain.activation)},
        factors=tuple(factors) or (1.0,) * len(chain),
    )


@torch.no_grad()
def softness(chain, x, T, rounds=4):
    """The factors, at most 1, with which the neurons of each layer are driven DRIVEN half-widths
    from the middle, on the mini-batch x after T steps. Softening one layer changes the drives of
    others: it takes a few rounds."""
    if chain.activation not in CORNERS:
        return (1.0,) * len(chain)
    low, high, _ = CORNERS[chain.activation]
    phase, factors = Phase(chain.input_drive(x)), (1.0,) * len(chain)
    for _ in range(rounds):
        soft = softened(chain, factors)
        neurons = fast.relax(soft, phase, None, T)
        drives = dynamics.step(
            dataclasses.replace(chain, activation=lambda drive: drive), phase, neurons
        )
        driven = [
            (drive - (low + high) / 2).double().square().mean().sqrt().item() / ((high - low) / 2)
            for drive in drives
        ]
        factors = tuple(min(1.0, DRIVEN / max(d, 1e-30)) for d in driven)
    return factors


SMALLEST = (
    1e-5  # norm of a gradient by `smooth`: ART's attacks add 1e-7 to it before they divide by it
)


def without_underflow(pullback):
    """The pullback, dL/d(read-out) -> dL/dx, kept within fp32 where slopes and dL/d(read-out) are
    tiny: the latter goes in at the size of 1 (by powers of two, which round nothing), and what
    comes out is for no image shorter than SMALLEST. Attacks divide it by its length."""

    def scaled(grad):
        size = grad.abs().amax(1)
        size = torch.where(size > 0, torch.frexp(size).exponent.clamp(min=-100), 0).double().exp2()
        result = pullback((grad / size[:, None]).to(grad.dtype)).double()
        length = result.flatten(1).norm(dim=1).clamp(min=1e-300)
        factor = torch.maximum(size, SMALLEST / length).view(-1, *[1] * (result.dim() - 1))
        return (result * factor).to(grad.dtype)

    return scaled


# ------------------------------------------------------------------------------- ways to a gradient
# Each takes (unrolled, x) and gives the read-out, (mbs, classes), and its pullback: dL/d(read-out) -> dL/dx.


def through_time(unrolled, x):
    """The read-out after T2 steps; back through them. With `smooth` by slopes that do not vanish,
    with `soft` those of a softened twin."""
    model, u, grad = unrolled.model, unrolled, unrolled.options.grad
    parameters = fp32_parameters(model)

    def chain_of(model):
        chain = model.chain(u.loss)
        if grad == "soft":
            return softened(chain, u.options.softness)
        return smoothed(chain) if grad == "smooth" else chain

    def before(model, x):
        chain = chain_of(model)
        return _free(chain, Phase(chain.input_drive(x)), u.T1 - u.T2, u.options.tol, u.T2)

    def steps(model, x, neurons):
        chain = chain_of(model)
        phase = Phase(chain.input_drive(x))
        if u.options.states == "last":
            return u.output(chain, fast.relax(chain, phase, neurons, u.T2, 0))
        losses = []
        for _ in range(u.T2):
            neurons = fast.relax(chain, phase, neurons, 1)
            losses.append((u.options.gain * u.output(chain, neurons)).log_softmax(1))
        return torch.stack(losses).mean(0)

    neurons = None
    if u.options.start == "equilibrium" and u.T1 > u.T2:
        with torch.no_grad():
            neurons = with_parameters(model, parameters, before, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = with_parameters(model, published_layout(parameters), steps, leaf, neurons)

    def pullback(grad):
        if not out.requires_grad:  # fewer steps than layers: x has no effect
            return torch.zeros_like(leaf)
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)[
            0
        ]  # ART asks for a gradient per class

    rescaled = grad != "bptt" and u.options.rescale
    return out.detach(), without_underflow(pullback) if rescaled else pullback


def _free(chain, phase, T, tol, output_in=None):
    """The neurons after T free steps from zero; with `tol` after at most T, see
    `relax_until_converged`."""
    if tol:
        return fast.relax_until_converged(chain, phase, T, tol)[0]
    return fast.relax(chain, phase, None, T, output_in)


def by_equilibrium_propagation(unrolled, x):
    """The read-out at the free equilibrium, and dL/dx by EP for any loss L on it: with g =
    dL/d(read-out), the states nudged by +beta and -beta along g give dL/dx ~ -[dPhi/dx(s_+) -
    dPhi/dx(s_-)] / (2 beta). Nothing is kept of the time steps."""
    model, u, beta = unrolled.model, unrolled, unrolled.options.beta
    parameters = fp32_parameters(model)

    def relaxed(m):
        chain = m.chain(u.loss)
        drive = chain.input_drive(x)
        free = _free(chain, Phase(drive), u.T1, u.options.tol)
        return drive, free, chain.read(free).clone()

    with torch.no_grad():
        drive, free, out = with_parameters(model, parameters, relaxed)

    @torch.no_grad()
    def contrast(m, direction):
        chain = m.chain(u.loss)
        plus, minus = fast.relax_both_signs(
            chain, Phase(drive, direction, beta, "linear"), free, u.T2
        )
        first = chain.connections[0]
        return first.down(minus[0] - plus[0], first.route(x), torch.zeros_like(x))

    def pullback(grad):
        norm = grad.norm(
            dim=1, keepdim=True
        )  # every image is nudged alike, however confident it is
        direction = grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
        scale = (norm / (2 * beta)).view(-1, *[1] * (x.dim() - 1))
        return with_parameters(model, parameters, contrast, direction) * scale

    return out, pullback


WAYS = {
    "bptt": through_time,
    "smooth": through_time,
    "ep": by_equilibrium_propagation,
    "soft": through_time,
}
GRADIENTS, STARTS, STATES = tuple(WAYS), ("zero", "equilibrium"), ("last", "all")
