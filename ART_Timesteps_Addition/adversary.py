"""Attacked mini-batches to train on: projected gradient descent from a random start, all of it on
the device of the model. The loss is the cross-entropy of the read-out, whose slope is written out,
so that with the gradient by Equilibrium Propagation nothing is ever differentiated
automatically."""

import dataclasses
import typing

import torch
import torch.nn.functional as F

from ART_Timesteps_Addition.gradients import WAYS
from data_utils import TASKS, to_device
from energy.precision import exactly


@dataclasses.dataclass(frozen=True)
class _Way:
    """What `gradients` asks for of a gradient; it is its own options, see `pytorch.Options`."""

    model: typing.Any
    loss: str
    T1: int
    T2: int
    grad: str
    tol: float = 0.0
    beta: float = 0.1
    gain: float = 1.0
    rescale: bool = True
    softness: tuple = ()
    start: str = "zero"
    states: str = "last"

    @property
    def options(self):
        return self

    def output(self, chain, neurons):
        """The read-out, (mbs, classes)."""
        return chain.read(neurons)


@dataclasses.dataclass(frozen=True)
class Adversary:
    """An attack on mini-batches, within eps of images in [0, 1] by the norm, "2" or "inf", in steps
    of 2.5 eps / iters.

    grad: of `gradients.WAYS`, through so many `steps`; T1, tol, loss: of the model's rule; mean,
    std: of the normalisation of images, (C, 1, 1)."""

    eps: float
    norm: str
    iters: int
    steps: int
    grad: str
    T1: int
    tol: float
    loss: str
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, args, device=None):
        """That of the command line's arguments, for mini-batches on that device; None where they
        ask for none."""
        if not getattr(args, "adv_train", None):
            return None
        task = TASKS[args.task]
        mean, std = (
            torch.tensor(value, dtype=torch.float32, device=device).view(-1, 1, 1)
            for value in (task.mean, task.std)
        )
        return cls(
            args.adv_train,
            args.adv_norm,
            args.adv_iters,
            args.adv_step,
            args.adv_grad,
            args.T1,
            args.tol,
            args.loss,
            mean,
            std,
        )

    def words(self, moves=True):
        """What it does, for the log. moves: whether the model has time steps."""
        through = f", gradient {self.grad}" + f" through {self.steps} steps" * moves
        return (
            f"the training images are attacked: PGD, {self.norm}-norm, eps {self.eps:g}, {self.iters} iterations"
            f"{through}; train accuracies are of the attacked images"
        )

    def draw(self, shape):
        """Random starts for a mini-batch of that shape, (mbs, C, H, W), uniform in the ball, on the
        CPU: the same on every device."""
        if self.norm == "inf":
            return (2 * torch.rand(shape) - 1) * self.eps
        direction, size = torch.randn(shape), torch.Size(shape[1:]).numel()
        radius = self.eps * torch.rand(shape[0]) ** (1 / size)
        return _scaled(direction, radius.view(-1, 1, 1, 1))

    @torch.no_grad()
    def attack(self, model, x, y, start):
        """The attacked images of x, (mbs, C, H, W), normalised as the model sees them, with labels
        y, (mbs,); start: of `draw`."""
        mean, std, start = self.mean.to(x), self.std.to(x), to_device(start, x.device).to(x)
        way = _Way(model, self.loss, self.T1, self.steps, self.grad, self.tol)
        images = (x * std + mean).clamp(0, 1)
        found = (images + start).clamp(0, 1)
        for _ in range(self.iters):
            gradient = self._gradient(way, (found - mean) / std, y) / std
            step = gradient.sign() if self.norm == "inf" else _scaled(gradient, 1.0)
            found = self._within(found + 2.5 * self.eps / self.iters * step, images)
        return (found - mean) / std

    def _gradient(self, way, x, y):
        """That of the loss with respect to x. With its end the graph is gone, before the next one
        is made."""
        with exactly():
            out, pullback = WAYS[self.grad](way, x)
            return pullback(self._slope(out, y))

    def _slope(self, out, y):
        """d cross-entropy / d(read-out), at length 1: an image that is classified with certainty is
        attacked alike."""
        # outputs of the squared error range over [0, 1]: too little for a softmax to tell classes
        # apart
        shares = ((10.0 if self.loss == "mse" else 1.0) * out.double()).softmax(1)
        own = F.one_hot(y, out.size(1)).bool()
        others = shares.masked_fill(own, 0)
        slope = torch.where(own, -others.sum(1, keepdim=True), others)
        return (slope / slope.norm(dim=1, keepdim=True).clamp(min=1e-300)).to(out.dtype)

    def _within(self, found, images):
        delta = found - images
        if self.norm == "inf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = _scaled(
                delta, delta.flatten(1).norm(dim=1).clamp(max=self.eps).view(-1, 1, 1, 1)
            )
        return (images + delta).clamp(0, 1)


def _scaled(delta, length):
    """Each sample of delta at that length; zero stays zero."""
    norm = delta.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
    return delta / norm * length
