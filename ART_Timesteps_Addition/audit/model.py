"""The audited model, and the state of its audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ART_Timesteps_Addition.attacks import Target
from ART_Timesteps_Addition.names import GRADIENTS
from ART_Timesteps_Addition.pytorch import PyTorchClassifier
from ART_Timesteps_Addition.seeding import seeded
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from data_utils import Task
from energy import fast
from energy.dynamics import Chain, Neurons, Phase, relative_change

CALIBRATED = ("smooth", "ep", "soft")
# Tolerance at which predictions within attacks stop, unless the run has its own.
ENDS_EARLY = 1e-3
# Change of a pixel that the first layer must respond to.
TINY = 1e-4
# Relative change per step below which an image counts as converged in an audit.
CONVERGED = 0.05


@dataclasses.dataclass(frozen=True)
class AuditedModel:
    """A model, the attacked images, and how it predicts.

    loss      that it was trained with
    task      its images
    T1        time steps of a prediction
    steps     numbers of time steps that gradients are unrolled through, ascending
    attack    norm, eps and clip of all attacks
    x, y      images, (n, C, H, W) in [0, 1], and labels, (n,)
    tol       tolerance of the predictions that decide whether an image is misclassified; 0: none
    fast_tol  tolerance of predictions within attacks
    """

    model: Any
    loss: str
    task: Task
    T1: int
    steps: Sequence[int]
    attack: Attack
    x: np.ndarray
    y: np.ndarray
    mbs: int = 20
    seed: int = 0
    tol: float = 0.0
    fast_tol: float = ENDS_EARLY

    @property
    def grads(self) -> Sequence[str]:
        """Gradient methods that the model has."""
        return GRADIENTS if self.model.has_dynamics else ("bptt", "smooth")

    def batches(self) -> Iterator[slice]:
        """The rows of each mini-batch of the images."""
        for i in range(0, len(self.y), self.mbs):
            yield slice(i, i + self.mbs)

    @torch.no_grad()
    def predict(self, x: Tensor, T: int, tol: float) -> Neurons:
        """The neurons of a prediction of x, (mbs, ...) and normalised, after T steps; with `tol`
        after at most T."""
        chain = self.model.chain(self.loss)
        return fast.from_zero(chain, Phase(chain.input_drive(x)), T, tol, output_in=0)[0]

    def target(self, T: int | None = None, tol: float | None = None) -> Target:
        """The model as attacks see it: predictions after T steps (T1), by default with fast_tol."""
        steps = T or self.T1
        tolerance = self.fast_tol if tol is None else tol

        def predict(x: Tensor) -> Neurons:
            return self.predict(x, steps, tolerance)

        return Target(self.model, self.loss, self.task, self.T1, predict)

    def classifier(
        self, attack: Attack | None = None, method: GradientMethod = GradientMethod()
    ) -> PyTorchClassifier:
        """The classifier that an attack sees, by default one without a name."""
        return self.target().classifier(attack or self.attack, method)

    def logits(self, x: np.ndarray, T: int | None = None, salt: int = 0) -> np.ndarray:
        """The logits, (n, classes), that decide whether an image is misclassified: after T steps
        (T1), which end early only by the run's own tol."""
        classifier = self.target(T, self.tol).classifier(self.attack)
        parts = [np.zeros((0, self.task.classes), dtype=np.float32)]
        with seeded(self.seed, salt):
            for i in range(0, len(x), self.mbs):
                parts.append(classifier.read_out(x[i : i + self.mbs]))
        return np.concatenate(parts)

    def _drive(self, chain: Chain, x: np.ndarray) -> Tensor:
        """The drive of images, (mbs, ...) in [0, 1], on the first layer."""
        seen = torch.from_numpy(self.classifier().preprocessed(x))
        return chain.input_drive(seen.to(next(self.model.parameters()).device))

    @torch.no_grad()
    def trajectory(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions after 1 ... T1 steps, (T1, n); relative change of each image in the last
        step, (n,))."""
        classes = []
        changes = []
        chain = self.model.chain(self.loss)
        for i in range(0, len(x), self.mbs):
            phase = Phase(self._drive(chain, x[i : i + self.mbs]))
            last = chain.zeros(phase.drive)
            predicted = []
            for neurons in fast.trajectory(chain, phase, self.T1):
                before, last = last, neurons
                predicted.append(chain.read(neurons).argmax(1).cpu().numpy())
            classes.append(np.stack(predicted))
            changes.append(relative_change(before, last).float().cpu().numpy())
        return np.concatenate(classes, 1), np.concatenate(changes)

    @torch.no_grad()
    def responds(self) -> float:
        """The share of images whose drive on the first layer responds to a change of every pixel
        by about TINY.

        A rounded input does not respond, and its gradient is meaningless. Drives are compared, not
        neurons, which may be saturated."""
        responds = []
        chain = self.model.chain(self.loss)
        tiny = 100 * TINY if chain.dtype == torch.bfloat16 else TINY
        noise = np.random.default_rng(0).uniform(tiny / 2, tiny, self.x.shape).astype(np.float32)
        with seeded(self.seed):
            for rows in self.batches():
                x = self.x[rows]
                changed = np.where(x > 0.5, -1, 1) * noise[rows] + x
                before, after = (
                    self._drive(chain, images.astype(np.float32)).flatten(1)
                    for images in (x, changed)
                )
                responds += (before != after).any(1).tolist()
        return float(np.mean(responds))

    def calibrated(self, method: GradientMethod, eps: float | None = None) -> GradientMethod:
        """The method with the gain and softness that suit the model."""
        if method.grad not in CALIBRATED:
            return method
        attack = dataclasses.replace(self.attack, eps=eps or self.attack.eps)
        return self.target().calibrated(attack, method, self.x[:100])


class AuditState:
    """The results of an audit so far.

    x_adv         the strongest adversarial example of each image
    margin        of its logits, above 0 where the image is still classified correctly
    attacks       the attacks that ran, as the result lists them
    measurements  {name: value} that criteria and figures need
    """

    def __init__(
        self,
        x_adv: np.ndarray,
        margin: np.ndarray,
        attacks: Sequence[dict[str, Any]] = (),
        measurements: Mapping[str, Any] | None = None,
    ):
        self.x_adv = x_adv.copy()
        self.margin = margin.copy()
        self.attacks = list(attacks)
        self.measurements = dict(measurements or {})

    @property
    def robust(self) -> np.ndarray:
        """Whether no attack has misclassified each image, (n,) bool."""
        return self.margin > 0

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, a record for JSON), as the file of a stage contains them, for `of`."""
        arrays = {"x_adv": self.x_adv, "margin": self.margin}
        return arrays, {"attacks": self.attacks, "facts": self.measurements}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> AuditState:
        """The state that `arrays` returned."""
        return cls(arrays["x_adv"], arrays["margin"], record["attacks"], record["facts"])
