"""ART's PyTorchClassifier for energy models: predictions after T1 free steps, gradients through T2
steps.

ART calls a model as `model(x)`. `Unrolled` is such a model: it calls the energy model with T1 steps
for a prediction and T2 for a gradient. All that ART builds from `classifier.model` (the loss
variants of Auto-PGD, AutoAttack) therefore keeps T1 and T2, and no file of ART is changed.

Nothing here changes the energy model. The gradient methods are in `gradients`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier as ArtClassifier
from torch import Tensor

from ART_Timesteps_Addition.gradients import METHODS
from ART_Timesteps_Addition.scaling import Pullback, belonging_to, limit_gaps, scaled_readout
from ART_Timesteps_Addition.settings import GradientMethod
from energy.dynamics import Chain, Neurons
from energy.precision import exactly


class _Differentiable(torch.autograd.Function):
    """The read-out for x, differentiated by a gradient method.

    ART calls the backward pass outside of any block around our calls: the pullback itself ensures
    exact products."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        method: Callable[[Tensor], tuple[Tensor, Pullback]],
        watch: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        ctx.watch = watch
        ctx.x = x.detach()
        with exactly():
            out, ctx.pullback = method(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with exactly():
            grad = ctx.pullback(grad)
        if ctx.watch is not None:
            ctx.watch(grad, ctx.x)
        return grad, None, None


# --------------------------------------------------------------------------------------- the module


@dataclasses.dataclass(frozen=True)
class Options(GradientMethod):
    """A gradient method, and how `Unrolled` predicts.

    exact       the value that comes with a gradient is the read-out of a prediction, not that of
                the unrolled steps: for attacks that test there whether they succeeded
    predict     x -> the neurons of a prediction; None: those after T1 steps from zero
    watch       called as (gradient with respect to x, x) for each gradient
    """

    exact: bool = False
    predict: Callable[[Tensor], Neurons] | None = None
    watch: Callable[[Tensor, Tensor], None] | None = None


class Unrolled(torch.nn.Module):
    """x -> read-out of an energy model, (mbs, classes): after T1 free steps, or after T2 for a
    gradient with respect to x.

    criterion: the loss that the model was trained with (it decides whether output neurons have an
    activation). last_layer: 1 reads out logits, 0 gives the neurons of the last layer. options: of
    `Options`. Raises ValueError for an option that does not exist or fit."""

    def __init__(
        self,
        model: Any,
        T1: int,
        T2: int,
        criterion: torch.nn.Module,
        last_layer: int = 1,
        **options: Any,
    ):
        super().__init__()
        self.options = Options(steps=T2, **options)
        if self.options.grad == "ep" and model.softmax and not last_layer:
            raise ValueError("grad='ep' differentiates a loss on the read-out: use last_layer=1")
        # A tuple hides the model from ART, which sets p.grad of all submodules to None, changes
        # their mode and, on request, their weights.
        self._hidden = (model,)
        self.T1 = T1
        self.criterion = criterion
        self.last_layer = last_layer
        self.loss = "mse" if isinstance(criterion, torch.nn.MSELoss) else "cel"

    @property
    def model(self) -> Any:
        return self._hidden[0]

    def with_options(self, **changes: Any) -> Unrolled:
        """The same with other options."""
        other = Unrolled(self.model, self.T1, self.options.steps, self.criterion, self.last_layer)
        other.options = dataclasses.replace(self.options, **changes)
        return other

    @contextlib.contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """A block with other options."""
        before = self.options
        self.options = dataclasses.replace(before, **changes)
        try:
            yield
        finally:
            self.options = before

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        options = self.options
        if not (torch.is_grad_enabled() and x.requires_grad):
            with torch.no_grad():
                return scaled_readout(self.predicted(x), self.loss, options.gain)
        x = x.to(self.dtype)  # some attacks compute in float64
        out = _Differentiable.apply(x, self._differentiated, options.watch)
        out = scaled_readout(out, self.loss, options.gain)
        return limit_gaps(out) if options.rescale and options.grad in ("smooth", "soft") else out

    @property
    def dtype(self) -> torch.dtype:
        """The type of the read-out and of gradients: at least float32."""
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    def _differentiated(self, x: Tensor) -> tuple[Tensor, Pullback]:
        """The read-out that attacks see, and its pullback."""
        options = self.options
        method = METHODS[options.grad]
        out, pullback = method(self.model, x, self.loss, self.T1, options, self.output)
        is_prediction = options.grad == "ep" or (
            options.grad != "soft"
            and (
                self.T1 == options.steps
                or (options.start == "equilibrium" and self.T1 > options.steps)
            )
        )
        of_copy = options.grad == "soft" and not options.rescale
        if of_copy or (options.exact and not is_prediction):
            with torch.no_grad():
                predicted = self.predicted(x)
            if of_copy:
                pullback = belonging_to(predicted, out, pullback)
            if options.exact:
                out = predicted
        return out, pullback

    def predicted(self, x: Tensor) -> Tensor:
        """The read-out of a prediction, (mbs, classes)."""
        return self.output(self.model.chain(self.loss), self.predict(x)).to(self.dtype)

    def predict(self, x: Tensor) -> Neurons:
        """The neurons of a prediction."""
        if self.options.predict is not None:
            return self.options.predict(x)
        return self.model(x, None, None, self.T1, 0.0, self.criterion, output_in=0)

    def output(self, chain: Chain, neurons: Neurons) -> Tensor:
        """The read-out of the neurons, (mbs, classes)."""
        return chain.read(neurons) if self.last_layer else neurons[-1].flatten(1)


class PyTorchClassifier(ArtClassifier):
    """ART's PyTorchClassifier for an energy model.

    model       one of `model_utils`
    loss        as ART takes it; without `criterion`, also the loss that the model was trained with
    T1          free steps of a prediction
    T2          steps that a loss or class gradient is unrolled through, from zero neurons
    last_layer  1 reads out logits, 0 gives the neurons of the last layer
    more        fields of `Options` (grad, start, beta, gain, predict, watch ...) and ART's own
                arguments
    """

    estimator_params = ArtClassifier.estimator_params

    def __init__(
        self,
        model: Any,
        loss: torch.nn.Module,
        input_shape: tuple[int, ...],
        nb_classes: int,
        T1: int,
        T2: int,
        last_layer: int = 1,
        *,
        criterion: torch.nn.Module | None = None,
        **more: Any,
    ):
        names = {field.name for field in dataclasses.fields(Options)}
        options = {name: value for name, value in more.items() if name in names}
        arts_own = {name: value for name, value in more.items() if name not in names}
        if not isinstance(model, Unrolled):
            squared = isinstance(loss, torch.nn.MSELoss)
            kind = torch.nn.MSELoss if squared else torch.nn.CrossEntropyLoss
            criterion = criterion or kind(reduction="none")
            model = Unrolled(model, T1, T2, criterion, last_layer, **options)
        super().__init__(
            model=model, loss=loss, input_shape=input_shape, nb_classes=nb_classes, **arts_own
        )
        model.model.to(self.device)
        self.T1 = T1
        self.T2 = T2
        self.last_layer = last_layer

    def predict(
        self, x: np.ndarray, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """As ART's, and (0, classes) for no image."""
        if len(x) == 0:
            return np.zeros((0, self.nb_classes), dtype=np.float32)
        return super().predict(x, batch_size, training_mode, **kwargs)

    def read_out(self, x: np.ndarray) -> np.ndarray:
        """The model's own read-out of the images x, (n, C, H, W), in one mini-batch: (n, classes).

        Its largest entry is the predicted class; `predict` returns what attacks see (`scaling`)."""
        if len(x) == 0:
            return np.zeros((0, self.nb_classes), dtype=np.float32)
        seen = torch.from_numpy(self.preprocessed(x))
        with torch.no_grad():
            return self.model.predicted(seen.to(self.device)).cpu().numpy()

    def preprocessed(self, x: np.ndarray) -> np.ndarray:
        """The images as the model sees them."""
        return self._apply_preprocessing(x, y=None, fit=False)[0]

    def class_gradient(
        self, x: np.ndarray, label: Any = None, training_mode: bool = False, **kwargs: Any
    ) -> np.ndarray:
        """As ART's: the derivative of the values that `predict` returns; attacks divide by it."""
        with self.model.changed(rescale=False):
            return super().class_gradient(x, label, training_mode, **kwargs)

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: ART would train by a gradient that no learning rule uses."""
        raise NotImplementedError(
            "an energy model has its own learning rule: use model_utils.train or main.py"
        )

    fit = fit_generator = reset = clone_for_refitting = _refuse

    def get_activations(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: ART expects modules that are called once."""
        raise NotImplementedError(
            "the layers of an energy model are its neurons after T steps: use "
            "model(x, None, None, T), which gives a tensor for each"
        )
