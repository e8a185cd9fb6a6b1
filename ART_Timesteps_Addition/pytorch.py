"""ART's PyTorchClassifier for energy models: predictions after T1 free steps, gradients through T2 steps.

ART calls a model as `model(x)`. `Unrolled` gives it such a model: it passes (x, y, neurons, T, beta, criterion,
check_thm) on to the energy model and chooses T, by whether ART asks for a gradient. All that ART builds from
`classifier.model` (the loss variants of Auto-PGD, AutoAttack) therefore keeps T1 and T2, and no file of ART is changed.

Nothing here changes the energy model. Gradients are taken in fp32, with exact products, whatever predictions are made
in: attacks add up small differences, of images here and, for EP, of states.
"""
import dataclasses
import functools
import typing

import torch
from art.estimators.classification import PyTorchClassifier as ArtClassifier

from energy import fast
from energy.activations import ctrd_hard_sig, hard_sigmoid, my_hard_sig
from energy.dynamics import Phase
from energy.precision import exactly

GRADIENTS = ("bptt", "smooth", "ep")
STARTS = ("zero", "equilibrium")

# ----------------------------------------------------------------------------------------- other weights, other slopes


class _Holder(torch.nn.Module):
    """A model and a function to call on it. `torch.func.functional_call` puts the parameters of a module that it finds
    in two places back as plain tensors, so that the model must be in no other attribute of what is called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(self.model, *args)


def with_parameters(model, parameters, function, *args):
    """function(model, *args) with other tensors, {name: tensor}, in place of the model's parameters meanwhile."""
    inside = {f"model.{name}": tensor for name, tensor in parameters.items()}
    return torch.func.functional_call(_Holder(model), inside, (function, *args), tie_weights=False)


def fp32_parameters(model):
    """The model's parameters without a graph, {name: tensor}: copies in fp32, or, in fp32 and fp64, the same memory."""
    return {name: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for name, p in model.named_parameters()}


def published_layout(parameters):
    """The parameters in the layout in which gradients come out as in the published attacks, bit by bit.

    Perturbations are multiples of one step, so that exact ties in a max-pooling are common, and the rounding of the
    convolution decides who wins. A CPU's kernels for AVX-512 sum in the same order everywhere, whatever the layout;
    those for AVX2 do not, and the published images, made with them in PyTorch's default layout, are got again only in
    it. It costs a few per cent. Other devices do not give the published bits in any layout: their weights stay."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return parameters
    return {name: p.contiguous() if p.device.type == "cpu" else p for name, p in parameters.items()}


# The interval in which a hard activation has a slope, and its steepest slope there.
CORNERS = {hard_sigmoid: (0.0, 1.0, 1.0), my_hard_sig: (0.0, 2.0, 0.5), ctrd_hard_sig: (-0.5, 0.5, 1.0)}


class _Smooth(torch.autograd.Function):
    """A hard activation whose backward pass has, on the flat parts, the slope of an arctangent that leaves the corner
    with the activation's own slope: it falls with the distance but, unlike a sigmoid's, never underflows to zero."""

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


def smoothed(chain):
    """The chain with the same states, and with backward slopes that do not vanish (see `_Smooth`)."""
    hard = chain.activation
    if hard not in CORNERS:
        return chain
    return dataclasses.replace(chain, activation=lambda drive: _Smooth.apply(drive, hard))


# -------------------------------------------------------------------------------------------------- ways to a gradient
# Each takes (unrolled, x) and gives the read-out, (mbs, classes), and its pullback: dL/d(read-out) -> dL/dx.


def through_time(unrolled, x):
    """The read-out after T2 steps; back through them. With `smooth` by slopes that do not vanish."""
    model, u = unrolled.model, unrolled
    parameters, neurons = fp32_parameters(model), None

    def steps(model, x, neurons, T, output_in):
        chain = smoothed(model.chain(u.loss)) if u.options.grad == "smooth" else model.chain(u.loss)
        neurons = fast.relax(chain, Phase(chain.input_drive(x)), neurons, T, output_in)
        return neurons if output_in else u.output(chain, neurons)

    if u.options.start == "equilibrium" and u.T1 > u.T2:
        with torch.no_grad():
            neurons = with_parameters(model, parameters, steps, x, None, u.T1 - u.T2, u.T2)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        out = with_parameters(model, published_layout(parameters), steps, leaf, neurons, u.T2, 0)

    def pullback(grad):
        if not out.requires_grad:  # fewer steps than layers: x has no effect
            return torch.zeros_like(leaf)
        return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]  # ART asks for a gradient per class

    return out.detach(), pullback


def by_equilibrium_propagation(unrolled, x):
    """The read-out at the free equilibrium, and dL/dx by EP for any loss L on it: with g = dL/d(read-out), the states
    nudged by +beta and -beta along g give dL/dx ~ -[dPhi/dx(s_+) - dPhi/dx(s_-)] / (2 beta). Nothing is kept of the
    time steps."""
    model, u, beta = unrolled.model, unrolled, unrolled.options.beta
    parameters = fp32_parameters(model)

    def relaxed(m):
        chain = m.chain(u.loss)
        drive = chain.input_drive(x)
        free = fast.relax(chain, Phase(drive), None, u.T1)
        return drive, free, chain.read(free).clone()

    with torch.no_grad():
        drive, free, out = with_parameters(model, parameters, relaxed)

    @torch.no_grad()
    def contrast(m, direction):
        chain = m.chain(u.loss)
        plus, minus = fast.relax_both_signs(chain, Phase(drive, direction, beta, "linear"), free, u.T2)
        first = chain.connections[0]
        return first.down(minus[0] - plus[0], first.route(x), torch.zeros_like(x))

    def pullback(grad):
        norm = grad.norm(dim=1, keepdim=True)  # every image is nudged alike, however confident it is
        direction = grad / norm.clamp(min=torch.finfo(grad.dtype).tiny)
        scale = (norm / (2 * beta)).view(-1, *[1] * (x.dim() - 1))
        return with_parameters(model, parameters, contrast, direction) * scale

    return out, pullback


WAYS = {"bptt": through_time, "smooth": through_time, "ep": by_equilibrium_propagation}


class _Differentiable(torch.autograd.Function):
    """The read-out for x by one of the ways above. The pullback runs whenever ART's own code goes backwards, and makes
    products exact by itself: no block around a call of ours would reach it."""

    @staticmethod
    def forward(ctx, x, way, watch):
        ctx.watch = watch
        with exactly():
            out, ctx.pullback = way(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with exactly():
            grad = ctx.pullback(grad)
        if ctx.watch is not None:
            ctx.watch(grad)
        return grad, None, None


# --------------------------------------------------------------------------------------------------- what ART is given


@dataclasses.dataclass(frozen=True)
class Options:
    """How `Unrolled` answers, and how its gradients are got.

    grad        `bptt` through the time steps, `smooth` the same with slopes that do not vanish, `ep` by Equilibrium
                Propagation
    start       whether the T2 steps begin from `zero` neurons or, with `equilibrium`, after T1 - T2 steps without a
                graph
    beta        how far `ep` nudges
    gain, shift     what attacks see is gain * read-out + shift; output neurons within [0, 1] are neither logits (a gap
                of 1 is little to a softmax, which then attends to every class alike) nor, though they look it,
                probabilities
    predict     x -> the neurons that a prediction is read out of, where not those after T1 steps from zero
    watch       called with the gradient with respect to x whenever one is computed
    """

    grad: str = "bptt"
    start: str = "zero"
    beta: float = 0.1
    gain: float = 1.0
    shift: float = 0.0
    predict: typing.Callable | None = None
    watch: typing.Callable | None = None

    def __post_init__(self):
        for name, allowed in (("grad", GRADIENTS), ("start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")


class Unrolled(torch.nn.Module):
    """x -> read-out of an energy model, (mbs, classes): after T1 free steps, or, where a gradient with respect to x is
    asked for, T2.

    criterion: the loss that the model was trained with (it decides whether output neurons have an activation).
    last_layer: 1 reads out logits, 0 gives the neurons of the last layer. options: see `Options`. Raises ValueError for
    an option that does not exist or fit.
    """

    def __init__(self, model, T1, T2, criterion, last_layer=1, **options):
        super().__init__()
        self.options = Options(**options)
        if self.options.grad == "ep" and model.softmax and not last_layer:
            raise ValueError("the gradient by EP is that of a loss on the read-out: it needs last_layer=1")
        # No submodule: ART sets p.grad of all that it finds to None, changes its mode and, asked to, its weights.
        self._out_of_sight = (model,)
        self.T1, self.T2, self.criterion, self.last_layer = T1, T2, criterion, last_layer
        self.loss = "mse" if isinstance(criterion, torch.nn.MSELoss) else "cel"

    @property
    def model(self):
        return self._out_of_sight[0]

    def state_dict(self, *args, **kwargs):
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.model.load_state_dict(*args, **kwargs)

    def forward(self, x):
        dtype = torch.promote_types(next(self.model.parameters()).dtype, torch.float32)
        if torch.is_grad_enabled() and x.requires_grad:
            way = functools.partial(WAYS[self.options.grad], self)
            out = _Differentiable.apply(x.to(dtype), way, self.options.watch)  # some attacks count in float64
        else:
            with torch.no_grad():
                out = self.output(self.model.chain(self.loss), self.predict(x)).to(dtype)
        return self.options.gain * out + self.options.shift

    def predict(self, x):
        if self.options.predict is not None:
            return self.options.predict(x)
        return self.model(x, None, None, self.T1, 0.0, self.criterion, output_in=0)

    def output(self, chain, neurons):
        """What is read out of the neurons, (mbs, classes)."""
        return chain.read(neurons) if self.last_layer else neurons[-1].flatten(1)


class PyTorchClassifier(ArtClassifier):
    """ART's PyTorchClassifier for an energy model.

    model: one of `model_utils`; loss: as ART takes it, and, with its reduction set aside, the loss of the model unless
    `criterion` names another; T1: free steps of a prediction; T2: steps that a loss or class gradient goes through,
    from zero neurons; last_layer: 1 reads out logits. grad, start, beta, gain, shift, predict, watch: see `Options`.
    All other arguments are ART's own.
    """

    estimator_params = ArtClassifier.estimator_params

    def __init__(self, model, loss, input_shape, nb_classes, T1, T2, last_layer=1, *, criterion=None, **more):
        options = {field.name: more.pop(field.name) for field in dataclasses.fields(Options) if field.name in more}
        if not isinstance(model, Unrolled):
            kind = torch.nn.MSELoss if isinstance(loss, torch.nn.MSELoss) else torch.nn.CrossEntropyLoss
            model = Unrolled(model, T1, T2, criterion or kind(reduction="none"), last_layer, **options)
        super().__init__(model=model, loss=loss, input_shape=input_shape, nb_classes=nb_classes, **more)
        model.model.to(self.device)
        self.T1, self.T2, self.last_layer = T1, T2, last_layer

    def predict(self, x, batch_size=128, training_mode=False, **kwargs):
        """As ART's, and (0, classes) for no image."""
        if len(x) == 0:
            return torch.zeros(0, self.nb_classes).numpy()
        return super().predict(x, batch_size, training_mode, **kwargs)

    def _refuse(self, *args, **kwargs):
        """Raises NotImplementedError: ART would follow a gradient that an energy model does not learn by."""
        raise NotImplementedError("an energy model has its own learning rule: use model_utils.train or main.py")

    fit = fit_generator = reset = clone_for_refitting = _refuse

    def get_activations(self, *args, **kwargs):
        """Raises NotImplementedError: ART looks for modules that are called once, not for neurons that take steps."""
        raise NotImplementedError("the layers of an energy model are its neurons after T steps: use "
                                  "model(x, None, None, T), which gives a tensor for each")
