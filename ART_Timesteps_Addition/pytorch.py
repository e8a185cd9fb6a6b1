"""ART's PyTorchClassifier for energy models: predictions after T1 free steps, gradients through T2
steps.

ART calls a model as `model(x)`. `Unrolled` gives it such a model: it passes (x, y, neurons, T,
beta, criterion, check_thm) on to the energy model and chooses T, by whether ART asks for a
gradient. All that ART builds from `classifier.model` (the loss variants of Auto-PGD, AutoAttack)
therefore keeps T1 and T2, and no file of ART is changed.

Nothing here changes the energy model. How gradients are got is in `gradients`.
"""

import contextlib
import dataclasses
import typing

import torch
from art.estimators.classification import PyTorchClassifier as ArtClassifier

from ART_Timesteps_Addition.gradients import GRADIENTS, STARTS, STATES, WAYS, published_layout  # noqa: F401
from energy.precision import exactly


class _Differentiable(torch.autograd.Function):
    """The read-out for x by one of the ways above. The pullback runs whenever ART's own code goes
    backwards, and makes products exact by itself: no block around a call of ours would reach it."""

    @staticmethod
    def forward(ctx, x, way, watch):
        ctx.watch, ctx.x = watch, x.detach()
        with exactly():
            out, ctx.pullback = way(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        with exactly():
            grad = ctx.pullback(grad)
        if ctx.watch is not None:
            ctx.watch(grad, ctx.x)
        return grad, None, None


# -------------------------------------------------------------------------------- what ART is given


@dataclasses.dataclass(frozen=True)
class Options:
    """How `Unrolled` answers, and how its gradients are got.

    grad        `bptt` through the time steps, `smooth` the same with slopes that do not vanish, `ep` by Equilibrium
                Propagation, `soft` as `smooth` through a twin whose neurons do not saturate
    softness    how much `soft` softens each layer, see `gradients.softness`
    start       whether the T2 steps begin from `zero` neurons or, with `equilibrium`, after T1 - T2 steps without a
                graph
    states      whether attacks see the read-out after the `last` of the T2 steps, or the mean over `all` of them of the
                logarithm of its softmax, whose negative log-likelihood is the mean cross-entropy of all states
    exact       whether what comes with a gradient is the read-out of a prediction, so that an attack which looks there
                for its success sees what counts, instead of that of the steps that the gradient goes through
    tol         of the steps without a graph: stop an image once it has settled to this, see `relax_until_converged`
    beta        how far `ep` nudges
    gain        attacks see gain * read-out: output neurons within [0, 1] are no logits (a softmax
                hardly distinguishes values that are at most 1 apart)
    centred     subtract the largest value of each image first. No attack takes the result for
                probabilities, and rounding does not change the predicted class
    rescale     whether `smooth` and `soft` may scale the gradient of each image, see `desaturated`
                and `gradients.without_underflow`. That suits the gradient of a loss, whose length
                attacks divide by. Class gradients must belong to the predicted values: False
    predict     x -> the neurons that a prediction is read out of, where not those after T1 steps from zero
    watch       called with the gradient with respect to x, and x, whenever one is computed
    """

    grad: str = "bptt"
    softness: tuple = ()
    start: str = "zero"
    states: str = "last"
    exact: bool = False
    tol: float = 0.0
    beta: float = 0.1
    gain: float = 1.0
    centred: bool = False
    rescale: bool = True
    predict: typing.Callable | None = None
    watch: typing.Callable | None = None

    def __post_init__(self):
        for name, allowed in (("grad", GRADIENTS), ("start", STARTS), ("states", STATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )


SATURATED = (
    14.0  # a gap between two logits beyond which a softmax in fp32 knows little but the first
)


def desaturated(out):
    """Logits, (mbs, classes), scaled for each image so that the first is at most SATURATED above
    the second: the cross-entropy of them has a slope. The factors are constants to a gradient."""
    first, second = out.detach().topk(2, 1).values.unbind(1)
    return out * (SATURATED / (first - second).clamp(min=SATURATED)).unsqueeze(1)


def _belonging_to(predicted, out, pullback):
    """The pullback of a softened copy with the read-out `out`, scaled for each image to the
    prediction: by the ratio of the spreads over the classes. predicted, out: (mbs, classes)."""
    ours, theirs = ((o - o.mean(1, keepdim=True)).norm(dim=1) for o in (predicted, out))
    factor = torch.where(theirs > 0, ours / theirs, 1.0)
    return lambda grad: pullback(grad * factor.unsqueeze(1))


class Unrolled(torch.nn.Module):
    """x -> read-out of an energy model, (mbs, classes): after T1 free steps, or, where a gradient
    with respect to x is asked for, T2.

    criterion: the loss that the model was trained with (it decides whether output neurons have an
    activation). last_layer: 1 reads out logits, 0 gives the neurons of the last layer. options: see
    `Options`. Raises ValueError for an option that does not exist or fit."""

    def __init__(self, model, T1, T2, criterion, last_layer=1, **options):
        super().__init__()
        self.options = Options(**options)
        if self.options.grad == "ep" and model.softmax and not last_layer:
            raise ValueError(
                "the gradient by EP is that of a loss on the read-out: it needs last_layer=1"
            )
        # No submodule: ART sets p.grad of all that it finds to None, changes its mode and, asked
        # to, its weights.
        self._out_of_sight = (model,)
        self.T1, self.T2, self.criterion, self.last_layer = T1, T2, criterion, last_layer
        self.loss = "mse" if isinstance(criterion, torch.nn.MSELoss) else "cel"

    @property
    def model(self):
        return self._out_of_sight[0]

    def with_options(self, **changes):
        """The same with other options."""
        options = {
            field.name: getattr(self.options, field.name) for field in dataclasses.fields(Options)
        }
        return Unrolled(
            self.model, self.T1, self.T2, self.criterion, self.last_layer, **{**options, **changes}
        )

    @contextlib.contextmanager
    def changed(self, **changes):
        """A block in which other options hold."""
        before, self.options = self.options, dataclasses.replace(self.options, **changes)
        try:
            yield
        finally:
            self.options = before

    def state_dict(self, *args, **kwargs):
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.model.load_state_dict(*args, **kwargs)

    def forward(self, x):
        options = self.options
        if not (torch.is_grad_enabled() and x.requires_grad):
            with torch.no_grad():
                return self._stretched(self.predicted(x))
        x = x.to(self.dtype)  # some attacks count in float64
        out = self._stretched(_Differentiable.apply(x, self._way, options.watch))
        return desaturated(out) if options.rescale and options.grad in ("smooth", "soft") else out

    @property
    def dtype(self):
        """Of the read-out and of gradients: at least float32, whatever the model computes in."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def _stretched(self, out):
        """The read-out, (mbs, classes), as attacks see it, see `Options`."""
        if self.options.centred:
            out = out - out.detach().amax(1, keepdim=True)
        return self.options.gain * out

    def _way(self, x):
        """The read-out that attacks see, and its pullback."""
        options = self.options
        out, pullback = WAYS[options.grad](self, x)
        predicts = options.grad != "soft" and (
            options.grad == "ep"
            or self.T1 == self.T2
            or (options.start == "equilibrium" and self.T1 > self.T2)
        )
        of_copy = options.grad == "soft" and not options.rescale
        if of_copy or options.exact and not predicts:
            with torch.no_grad():
                predicted = self.predicted(x)
            if of_copy:
                pullback = _belonging_to(predicted, out, pullback)
            out = predicted if options.exact else out
        return out, pullback

    def predicted(self, x):
        """The read-out of a prediction, (mbs, classes)."""
        return self.output(self.model.chain(self.loss), self.predict(x)).to(self.dtype)

    def predict(self, x):
        """The neurons that a prediction is read out of."""
        if self.options.predict is not None:
            return self.options.predict(x)
        return self.model(x, None, None, self.T1, 0.0, self.criterion, output_in=0)

    def output(self, chain, neurons):
        """What is read out of the neurons, (mbs, classes)."""
        return chain.read(neurons) if self.last_layer else neurons[-1].flatten(1)


class PyTorchClassifier(ArtClassifier):
    """ART's PyTorchClassifier for an energy model.

    model: one of `model_utils`; loss: as ART takes it, and, with its reduction set aside, the loss
    of the model unless `criterion` names another; T1: free steps of a prediction; T2: steps that a
    loss or class gradient goes through, from zero neurons; last_layer: 1 reads out logits. grad,
    start, beta, gain, predict, watch: see `Options`. All other arguments are ART's own."""

    estimator_params = ArtClassifier.estimator_params

    def __init__(
        self, model, loss, input_shape, nb_classes, T1, T2, last_layer=1, *, criterion=None, **more
    ):
        options = {
            field.name: more.pop(field.name)
            for field in dataclasses.fields(Options)
            if field.name in more
        }
        if not isinstance(model, Unrolled):
            kind = (
                torch.nn.MSELoss
                if isinstance(loss, torch.nn.MSELoss)
                else torch.nn.CrossEntropyLoss
            )
            model = Unrolled(
                model, T1, T2, criterion or kind(reduction="none"), last_layer, **options
            )
        super().__init__(
            model=model, loss=loss, input_shape=input_shape, nb_classes=nb_classes, **more
        )
        model.model.to(self.device)
        self.T1, self.T2, self.last_layer = T1, T2, last_layer

    def predict(self, x, batch_size=128, training_mode=False, **kwargs):
        """As ART's, and (0, classes) for no image."""
        if len(x) == 0:
            return torch.zeros(0, self.nb_classes).numpy()
        return super().predict(x, batch_size, training_mode, **kwargs)

    def read_out(self, x):
        """The model's own read-out of the images x, (n, C, H, W), in one mini-batch: (n, classes).
        Its largest entry is the predicted class; `predict` returns what attacks see (`Options`)."""
        if len(x) == 0:
            return torch.zeros(0, self.nb_classes).numpy()
        seen, _ = self._apply_preprocessing(x, y=None, fit=False)
        with torch.no_grad():
            return self.model.predicted(torch.from_numpy(seen).to(self.device)).cpu().numpy()

    def class_gradient(self, x, label=None, training_mode=False, **kwargs):
        """As ART's: the derivative of the values that `predict` returns; attacks divide by it."""
        with self.model.changed(rescale=False):
            return super().class_gradient(x, label, training_mode, **kwargs)

    def _refuse(self, *args, **kwargs):
        """Raises NotImplementedError: ART would follow a gradient that an energy model does not
        learn by."""
        raise NotImplementedError(
            "an energy model has its own learning rule: use model_utils.train or main.py"
        )

    fit = fit_generator = reset = clone_for_refitting = _refuse

    def get_activations(self, *args, **kwargs):
        """Raises NotImplementedError: ART looks for modules that are called once, not for neurons
        that take steps."""
        raise NotImplementedError(
            "the layers of an energy model are its neurons after T steps: use "
            "model(x, None, None, T), which gives a tensor for each"
        )
