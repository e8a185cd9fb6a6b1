"""ART's PyTorchClassifier for energy models: predictions after T1 free steps, gradients through T2 steps.

ART calls a model as `model(x)`. `Unrolled` gives it such a model: it passes (x, y, neurons, T, beta, criterion, check_thm) on to
the energy model and chooses T, by whether ART asks for a gradient. All that ART builds from `classifier.model` (the loss variants of
Auto-PGD, AutoAttack) therefore keeps T1 and T2, and no file of ART is changed.
"""
import copy

import torch
from art.estimators.classification import PyTorchClassifier as ArtClassifier

import model_utils

GRADIENTS = ("bptt", "smooth", "ep")
STARTS = ("zero", "equilibrium")

# Perturbations are multiples of one step, so that exact ties in a max-pooling are common, and the rounding of the convolution
# decides who wins. Kernels for AVX-512 sum in the same order everywhere, whatever the layout; those for AVX2 do not, and the
# published images, made with them in PyTorch's default layout, are got again only in it. It costs a few per cent.
REPRODUCES_LAYOUT = torch.backends.cpu.get_cpu_capability() != "AVX512"


class _Smooth(torch.autograd.Function):
    """A hard activation whose backward pass has, on the flat parts, the slope of an arctangent that leaves the corner with the
    activation's own slope: it falls with the distance but, unlike that of a sigmoid, never underflows to zero."""

    @staticmethod
    def forward(ctx, drive, activation):
        with torch.enable_grad():
            leaf = drive.detach().requires_grad_()
            out = activation(leaf)
            slope, = torch.autograd.grad(out.sum(), leaf)
        low, high, steepest = CORNERS[activation]
        outside = torch.maximum(low - drive, drive - high).clamp(min=0)
        ctx.save_for_backward(torch.where(slope == 0, steepest / (1 + (16 * outside / (high - low)) ** 2), slope))
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        slope, = ctx.saved_tensors
        return grad * slope, None


CORNERS = {model_utils.hard_sigmoid: (0.0, 1.0, 1.0), model_utils.my_hard_sig: (0.0, 2.0, 0.5), model_utils.ctrd_hard_sig: (-0.5, 0.5, 1.0)}


def smoothed(model):
    """`model` with the same weights and outputs, and with backward slopes that do not vanish (see `_Smooth`)."""
    if model.activation not in CORNERS:
        return model
    twin, hard = copy.copy(model), model.activation
    twin.activation = lambda drive: _Smooth.apply(drive, hard)
    return twin


class _EPGradient(torch.autograd.Function):
    """The read-out at the free equilibrium; backwards, dL/dx by EP for any loss L on it: with g = dL/d(read-out), the states
    nudged by +beta and -beta along g give dL/dx ~ -[dPhi/dx(s_+) - dPhi/dx(s_-)] / (2 beta). Nothing is kept of the time steps."""

    @staticmethod
    def forward(ctx, x, unrolled):
        model = unrolled.model
        ctx.unrolled, ctx.drive = unrolled, model.input_drive(x)
        free = model.relax(ctx.drive, None, None, unrolled.T1, 0.0, unrolled.criterion)
        ctx.save_for_backward(x, *free)
        return model.readout(free).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x, *free), u = ctx.saved_tensors, ctx.unrolled
        norm = grad.norm(dim=1, keepdim=True)  # every image is nudged alike, however confident it is
        direction = grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
        states = [u.model.relax(ctx.drive, None, free, u.T2, sign * u.beta, u.criterion, slope=direction) for sign in (1, -1)]
        first = u.model.connections[0]
        route = first.up(x)[1]
        difference = first.down(states[1][0] - states[0][0], route, torch.zeros_like(x))
        return difference * (norm / (2 * u.beta)).view(-1, *[1] * (x.dim() - 1)), None


class Unrolled(torch.nn.Module):
    """x -> read-out of an energy model: after T1 free steps, or, where a gradient with respect to x is asked for, T2 steps.

    criterion: the loss that the model was trained with (it decides whether output neurons have an activation). grad: how the
    gradient is got, `bptt`, `smooth` (see `smoothed`) or `ep` (see `_EPGradient`, with `beta`). start: whether the T2 steps begin
    from zero neurons or, with `equilibrium`, after T1 - T2 steps without a graph. last_layer: 1 reads out logits, 0 gives the
    neurons of the last layer. gain, shift: what attacks see is gain * read-out + shift; output neurons within [0, 1] are neither
    logits (a gap of 1 is little to a softmax, which then attends to every class alike) nor, though they look it, probabilities.
    tol: lets predictions end early, see `EnergyModel.settle`. watch: called with the gradient with respect to x whenever one is computed.
    """

    def __init__(self, model, T1, T2, criterion, last_layer=1, *, grad="bptt", start="zero", beta=0.1, gain=1.0, shift=0.0, tol=0.0,
                 watch=None):
        super().__init__()
        if grad == "ep" and model.softmax and not last_layer:
            raise ValueError("the gradient by EP is that of a loss on the read-out: it needs last_layer=1")
        self.model, self.T1, self.T2, self.criterion, self.last_layer = model, T1, T2, criterion, last_layer
        self.grad, self.start, self.beta, self.gain, self.shift, self.tol, self.watch = grad, start, beta, gain, shift, tol, watch
        self.differentiated = smoothed(model) if grad == "smooth" else model

    def forward(self, x):
        dtype = self.model.synapses[0].weight.dtype
        out = self.respond(x.to(dtype))  # some attacks count in float64
        return out.float() if dtype == torch.bfloat16 else out

    def respond(self, x):
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.output(model_utils.predicting_neurons(self.model, x, self.T1, self.criterion, self.tol), self.model)
        if self.watch is not None:
            x = x.view_as(x)
            x.register_hook(self.watch)
        if self.grad == "ep":
            return self.gain * _EPGradient.apply(x, self) + self.shift
        neurons = None
        if self.start == "equilibrium" and self.T1 > self.T2:
            neurons = self.model(x, None, None, self.T1 - self.T2, 0.0, self.criterion, output_in=self.T2)
        frozen = {name: p.detach() for name, p in self.differentiated.named_parameters()}  # only x is to get a gradient
        if REPRODUCES_LAYOUT:
            frozen = {name: p.contiguous() for name, p in frozen.items()}
        out = torch.func.functional_call(_Through(self), {f"unrolled.differentiated.{name}": p for name, p in frozen.items()}, (x, neurons))
        return out if out.requires_grad else out + 0 * x.flatten(1).sum(1, keepdim=True)  # fewer steps than layers: x has no effect

    def through(self, x, neurons):
        return self.output(self.differentiated(x, None, neurons, self.T2, 0.0, self.criterion, True, output_in=0), self.differentiated)

    def output(self, neurons, model):
        return self.gain * (model.readout(neurons) if self.last_layer else neurons[-1].flatten(1)) + self.shift


class _Through(torch.nn.Module):
    def __init__(self, unrolled):
        super().__init__()
        self.unrolled = unrolled

    def forward(self, x, neurons):
        return self.unrolled.through(x, neurons)


class PyTorchClassifier(ArtClassifier):
    """ART's PyTorchClassifier for an energy model.

    model: one of `model_utils`; loss: as ART takes it, and, with its reduction set aside, the loss of the model unless `criterion`
    names another; T1: free steps of a prediction; T2: steps that a loss or class gradient goes through, from zero neurons; last_layer:
    1 reads out logits. grad, start, beta, gain, shift, tol, watch: see `Unrolled`. All other arguments are ART's own.
    """

    estimator_params = ArtClassifier.estimator_params

    def __init__(self, model, loss, input_shape, nb_classes, T1, T2, last_layer=1, *, criterion=None, grad="bptt", start="zero", beta=0.1,
                 gain=1.0, shift=0.0, tol=0.0, watch=None, **art):
        if not isinstance(model, Unrolled):
            criterion = criterion or model_utils.make_criterion("mse" if isinstance(loss, torch.nn.MSELoss) else "cel")
            model = Unrolled(model, T1, T2, criterion, last_layer, grad=grad, start=start, beta=beta, gain=gain, shift=shift, tol=tol, watch=watch)
        super().__init__(model=model, loss=loss, input_shape=input_shape, nb_classes=nb_classes, **art)
        self.T1, self.T2, self.last_layer = T1, T2, last_layer
