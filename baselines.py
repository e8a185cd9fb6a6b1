"""Feed-forward networks to compare energy models with: dense, convolutional, and a vision
transformer.

To everything else a network is a model whose `Chain` has one connection: the whole network drives
the logits bottom-up, and nothing drives top-down. One time step reaches the fixed point. Code that
predicts with an energy model, trains, attacks or audits it therefore works with a network as well;
if time steps matter, it reads `has_dynamics`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from energy import activations
from energy.connections import Connection, Shape, Slopes
from energy.dynamics import Chain, Neurons
from energy.poolings import POOLS

if TYPE_CHECKING:
    from data_utils import Task
    from experiment.config import Architecture

Layers = list[list[nn.Module]]


def _identity(drive: Tensor) -> Tensor:
    """The activation of a chain whose only layer is a linear output, which takes none."""
    return drive


@dataclasses.dataclass(frozen=True, eq=False)
class Network(Connection):
    """From an image to its logits. synapse: a `FeedForward`.

    slopes: see `with_slopes`; None for the network as it is."""

    classes: int = 10
    slopes: Slopes | None = None

    @property
    def post_shape(self) -> Shape:
        return (self.classes,)

    def _up(self, pre: Tensor) -> tuple[Tensor, None]:
        if self.slopes is None:
            return self.synapse.net(pre), None
        for module in self.synapse.net:
            is_activation = isinstance(module, Activation)
            pre = self.slopes(module.function)(pre) if is_activation else module(pre)
        return pre, None

    def with_slopes(self, slopes: Slopes) -> "Network":
        net = self.synapse.net
        is_sequence = isinstance(net, nn.Sequential)
        if is_sequence and any(isinstance(module, Activation) for module in net):
            return dataclasses.replace(self, slopes=slopes)
        return self


class FeedForward(nn.Module):
    """A network with the interface of an energy model.

    net: a module from (mbs, *in_shape) to logits, (mbs, classes); layers: lists of its modules,
    each list a layer with a learning rate of its own. BatchNorm uses the statistics of a mini-batch
    while the learning rule computes its gradient, see `model_utils.bp_gradients`, and those of the
    training anywhere else."""

    has_dynamics = False
    softmax = False
    same_update = False
    compiled = False
    activation = None
    schedule = "sync"
    B_syn: tuple[nn.Module, ...] = ()

    def __init__(self, net: nn.Module, layers: Layers, in_shape: Shape, classes: int) -> None:
        super().__init__()
        self.net = net
        self.nc = classes
        self._layers = layers
        self.connections = (Network(self, in_shape, classes=classes),)
        self.eval()

    @property
    def synapses(self) -> list[nn.Module]:
        """The modules with weights that connect layers."""
        return [m for m in self.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    @property
    def weight(self) -> Tensor:
        """One of the weights, in the type and on the device of all."""
        return next(self.parameters())

    def parameter_layers(self) -> list[tuple[int, list[nn.Parameter]]]:
        """[(layer of the learning rate, parameters)], see `model_utils.make_optimizer`."""
        return [
            (n, [p for m in modules for p in m.parameters()])
            for n, modules in enumerate(self._layers)
        ]

    def chain(self, loss: str = "mse", masks: Any = None) -> Chain:
        """See `energy.dynamics.Chain`."""
        return Chain(self.connections, _identity, linear_output=True)

    def forward(
        self,
        x: Tensor,
        y: Any = None,
        neurons: Any = None,
        T: Any = None,
        beta: Any = 0.0,
        criterion: Any = None,
        check_thm: bool = False,
        output_in: Any = None,
    ) -> Neurons:
        """[logits], as `EnergyModel.forward` returns neurons; check_thm keeps the graph, all other
        arguments have no effect."""
        with torch.set_grad_enabled(check_thm):
            return [self.net(x)]

    def angles(self) -> list[float]:
        """Empty: there are no feedback weights."""
        return []


def _joined(layers: Layers, task: "Task") -> FeedForward:
    """The network of some layers, one after another."""
    net = nn.Sequential(*(m for layer in layers for m in layer))
    return FeedForward(net, layers, (task.channels, task.size, task.size), task.classes)


class Activation(nn.Module):
    """An activation of energy models as a module. function: one of `energy.activations`."""

    def __init__(self, function: activations.Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, drive: Tensor) -> Tensor:
        return self.function(drive)

    def extra_repr(self) -> str:
        return self.function.__name__


def _dense(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> Layers:
    """Linear layers with activations between them."""
    layers: Layers = [[nn.Linear(a, b), activation()] for a, b in zip(sizes, sizes[1:])]
    layers[-1].pop()
    return layers


def ff_mlp(model: "Architecture", task: "Task") -> FeedForward:
    """Linear layers of the sizes model.archi with ReLU between them."""
    first, *layers = _dense(model.archi)
    return _joined([[nn.Flatten(), *first], *layers], task)


def ff_cnn(model: "Architecture", task: "Task") -> FeedForward:
    """Convolutions, each with batch normalisation, ReLU and pooling, then linear layers with ReLU
    between them. With model.no_norm the layers of `model_utils.P_CNN` instead: convolutions, each
    with pooling and the activation model.act, which is also between the linear layers. Raises
    ValueError, naming the layer, if nothing is left of a map."""

    def activation() -> nn.Module:
        return Activation(activations.ACTIVATIONS[model.act]) if model.no_norm else nn.ReLU()

    layers: Layers = []
    channels = task.channels
    size = task.size
    geometries = zip(model.channels, model.kernels, model.strides, model.paddings, model.pools)
    for n, (out, kernel, stride, padding, pool) in enumerate(geometries, 1):
        pooling = [] if pool == "i" else [POOLS[pool]()]
        size = (size + 2 * padding - kernel) // stride + 1
        size = size // 2 if pooling else size
        if size < 1:
            raise ValueError(f"layer {n}: nothing is left of the map")
        conv = nn.Conv2d(channels, out, kernel, stride, padding)
        if model.no_norm:
            layers.append([conv, *pooling, activation()])
        else:
            layers.append([conv, BatchNorm(out), activation(), *pooling])
        channels = out
    first, *rest = _dense([channels * size * size, *model.fc], activation)
    return _joined([*layers, [nn.Flatten(), *first], *rest], task)


class _Mean(torch.autograd.Function):
    """The mean over a mini-batch, from the mean over each worker's fraction of it. As each worker's
    loss is a mean over its fraction as well, gradients average as values do."""

    @staticmethod
    def forward(ctx: Any, whole: Any, value: Tensor) -> Tensor:
        ctx.whole = whole
        return whole.workers.sum(value * whole.fraction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.whole.workers.sum(grad * ctx.whole.fraction)


class BatchNorm(nn.BatchNorm2d):
    """PyTorch's batch normalisation, but a mini-batch with a single value per map, which has no
    variance, is normalised by the statistics of the training, and a worker's part of a mini-batch
    by those of the whole.

    whole: the `experiment.workers.Shared` of a mini-batch, set by `Workers.sharing_statistics`;
    None for one process"""

    whole: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        whole = self.whole
        values = (whole.samples if whole else len(x)) * x[0, 0].numel()
        if values == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return self._by_whole(x, whole, values) if whole else super().forward(x)

    def _by_whole(self, x: Tensor, whole: Any, values: int) -> Tensor:
        """Normalise a worker's part. values: of a map in the whole mini-batch."""
        mean = _Mean.apply(whole, x.mean((0, 2, 3)))
        centred = x - mean.view(-1, 1, 1)
        variance = _Mean.apply(whole, centred.square().mean((0, 2, 3)))
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (values / (values - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(-1, 1, 1), centred, scale.view(-1, 1, 1))


def vit(model: "Architecture", task: "Task") -> FeedForward:
    """torchvision's VisionTransformer for images of any number of channels."""
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        task.size,
        model.patch,
        model.depth,
        model.heads,
        model.width,
        model.mlp_width,
        num_classes=task.classes,
    )
    if task.channels != 3:  # its first layer is for three; this one is initialised in the same way
        net.conv_proj = nn.Conv2d(task.channels, model.width, model.patch, model.patch)
        nn.init.trunc_normal_(
            net.conv_proj.weight, std=math.sqrt(1 / (task.channels * model.patch**2))
        )
        nn.init.zeros_(net.conv_proj.bias)
    return FeedForward(net, [[net]], (task.channels, task.size, task.size), task.classes)


KINDS: dict[str, Callable[["Architecture", "Task"], FeedForward]] = {
    "FFMLP": ff_mlp,
    "FFCNN": ff_cnn,
    "ViT": vit,
}


def make_network(model: "Architecture", task: "Task") -> FeedForward:
    """The `FeedForward` of an architecture. Raises ValueError if its maps get too small."""
    return KINDS[model.kind](model, task)
