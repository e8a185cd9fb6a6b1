"""Feed-forward networks to hold energy models against: dense, convolutional, and a vision
transformer.

To everything else a network is a model whose `Chain` has one connection: its way up is the whole
network, the layer that it drives are the logits, and nothing drives down. One time step reaches the
fixed point. What predicts with an energy model, trains, attacks or audits it, therefore does so
with a network as well, and where time steps matter it asks a model whether it `moves`."""

import dataclasses
import math

import torch
import torch.nn as nn

from data_utils import TASKS
from energy.connections import Connection
from energy.dynamics import Chain


@dataclasses.dataclass(frozen=True, eq=False)
class Network(Connection):
    """From an image to its logits. synapse: a `FeedForward`."""

    classes: int = 10

    @property
    def post_shape(self):
        return (self.classes,)

    def _up(self, pre):
        return self.synapse.logits(pre), None


class FeedForward(nn.Module):
    """A network with what an energy model has for the rest of the program.

    net: a module from (mbs, *in_shape) to logits, (mbs, classes); layers: lists of its modules,
    those of one list being a layer with a learning rate of its own. BatchNorm follows the
    statistics of a mini-batch while the learning rule computes its gradient, see
    `learning.bp_gradients`, and those of the training anywhere else."""

    moves = softmax = same_update = compiled = False
    activation, schedule, B_syn = None, "sync", ()

    def __init__(self, net, layers, in_shape, classes):
        super().__init__()
        self.net, self.nc, self._layers = net, classes, layers
        self.connections = (Network(self, in_shape, classes=classes),)
        self.eval()

    @property
    def synapses(self):
        """The modules with weights that connect layers."""
        return [m for m in self.net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    @property
    def weight(self):
        """One of the weights, in the type and on the device of all."""
        return next(self.parameters())

    def rated(self):
        """[(the number of a layer, its parameters)], see `model_utils.make_optimizer`."""
        return [
            (n, [p for m in modules for p in m.parameters()])
            for n, modules in enumerate(self._layers)
        ]

    def logits(self, x):
        """(mbs, classes) of images (mbs, ...)."""
        return self.net(x)

    def chain(self, loss="mse", masks=None):
        """See `energy.dynamics.Chain`."""
        return Chain(self.connections, None, linear_output=True)

    def forward(
        self,
        x,
        y=None,
        neurons=None,
        T=None,
        beta=0.0,
        criterion=None,
        check_thm=False,
        output_in=None,
    ):
        """[logits], as `EnergyModel.forward` gives neurons; only x and check_thm, whether a graph
        is kept, matter."""
        with torch.set_grad_enabled(check_thm):
            return [self.logits(x)]

    def angles(self):
        """None: there are no backward weights."""
        return []


def _joined(layers, in_shape, classes):
    """The network of some layers, lists of modules, one after another."""
    return FeedForward(
        nn.Sequential(*(m for layer in layers for m in layer)), layers, in_shape, classes
    )


def _dense(sizes):
    """Linear layers with ReLU between them."""
    last = len(sizes) - 2
    return [
        [nn.Linear(a, b), *([nn.ReLU()] if n < last else [])]
        for n, (a, b) in enumerate(zip(sizes, sizes[1:]))
    ]


def ff_mlp(args, task):
    """Linear layers of the sizes args.archi with ReLU between them."""
    first, *layers = _dense(args.archi)
    return _joined(
        [[nn.Flatten(), *first], *layers], (task.channels, task.size, task.size), task.classes
    )


POOLINGS = {"m": nn.MaxPool2d, "a": nn.AvgPool2d}


def ff_cnn(args, task):
    """Convolutions, each with batch normalisation, ReLU and pooling, then linear layers with ReLU
    between them. Raises ValueError, naming the layer, where nothing is left of a map."""
    layers, channels, size = [], task.channels, task.size
    for n, out in enumerate(args.channels):
        kernel, stride, padding, pool = (
            args.kernels[n],
            args.strides[n],
            args.paddings[n],
            args.pools[n],
        )
        size = (size + 2 * padding - kernel) // stride + 1
        size = size // 2 if pool in POOLINGS else size
        if size < 1:
            raise ValueError(f"layer {n + 1}: nothing is left of the map")
        layers.append(
            [
                nn.Conv2d(channels, out, kernel, stride, padding),
                BatchNorm(out),
                nn.ReLU(),
                *([POOLINGS[pool](2)] if pool in POOLINGS else []),
            ]
        )
        channels = out
    first, *rest = _dense([channels * size * size, *args.fc])
    return _joined(
        [*layers, [nn.Flatten(), *first], *rest],
        (task.channels, task.size, task.size),
        task.classes,
    )


class _Mean(torch.autograd.Function):
    """The mean over a mini-batch, from the mean over each worker's share of it, a number of 0 to 1.
    As each worker's loss is a mean over its share as well, slopes average as values do."""

    @staticmethod
    def forward(ctx, share, workers, value):
        ctx.share, ctx.workers = share, workers
        return workers.sum(value * share)

    @staticmethod
    def backward(ctx, slope):
        return None, None, ctx.workers.sum(slope * ctx.share)


class BatchNorm(nn.BatchNorm2d):
    """PyTorch's, which of a single value a map, that has no variance, takes the statistics of the
    training; and which normalises a share of a mini-batch by the statistics of the whole.

    whole: None, or where a mini-batch is a share of one: (workers, share, samples of the whole),
    see `experiment.workers.Workers.sharing_statistics`."""

    whole = None

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = (self.whole[2] if self.whole else len(x)) * x[0, 0].numel()
        if values == 1:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return self._of_whole(x, *self.whole[:2], values) if self.whole else super().forward(x)

    def _of_whole(self, x, workers, share, values):
        """The same on a share. values: how many of the whole a map has."""
        mean = _Mean.apply(share, workers, x.mean((0, 2, 3)))
        centred = x - mean.view(-1, 1, 1)
        variance = _Mean.apply(share, workers, centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (values / (values - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(-1, 1, 1), centred, scale.view(-1, 1, 1))


def vit(args, task):
    """torchvision's VisionTransformer for images of any number of channels."""
    from torchvision.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        task.size,
        args.patch,
        args.depth,
        args.heads,
        args.width,
        args.mlp_width,
        num_classes=task.classes,
    )
    if task.channels != 3:  # what it begins with is for three; it starts as that does
        net.conv_proj = nn.Conv2d(task.channels, args.width, args.patch, args.patch)
        nn.init.trunc_normal_(
            net.conv_proj.weight, std=math.sqrt(1 / (task.channels * args.patch**2))
        )
        nn.init.zeros_(net.conv_proj.bias)
    return FeedForward(net, [[net]], (task.channels, task.size, task.size), task.classes)


KINDS = {"FFMLP": ff_mlp, "FFCNN": ff_cnn, "ViT": vit}


def make_network(args):
    """The `FeedForward` that the command line's arguments describe. Raises ValueError where there
    is none."""
    return KINDS[args.model](args, TASKS[args.task])
