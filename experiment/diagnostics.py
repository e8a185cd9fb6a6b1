"""Training diagnostics: non-finite values, saturation, unconverged phases."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_utils import Batches, RunFailed
from energy import fast
from energy.activations import CURVES
from energy.dynamics import Neurons
from energy.gdu import cosine, gdu_report
from energy.precision import exactly, set_precision
from energy.rule import Rule
from experiment.inference import Convergence
from experiment.timing import write

if TYPE_CHECKING:
    from experiment.runs.folder import RunFolder

CHECKSUM_TYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by bytes of an element


class Diagnostics:
    """Diagnostics of a training, epoch by epoch: non-finite values, weights that do not change, a
    nudge within the rounding error, saturated layers, unconverged phases.

    optimizer: its parameter groups are the model's; bf16_copy: takes the time steps, or None;
    precision: as of `--precision`."""

    def __init__(
        self,
        model: Any,
        rule: Rule,
        optimizer: torch.optim.Optimizer,
        bf16_copy: Any = None,
        precision: str = "fp32",
    ) -> None:
        self.model = model
        self.rule = rule
        self.bf16_copy = bf16_copy
        self.precision = precision
        self.optimizer = optimizer
        self.reported: set[str] = set()  # kinds of warnings
        self.begin(1)

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.epoch = epoch
        groups = [group for group in self.optimizer.param_groups if group["lr"] > 0]
        learning = {id(p) for group in groups for p in group["params"]}
        weights = {name: p for name, p in self.model.named_parameters() if p.dim() > 1}
        self.weights = {name: p for name, p in weights.items() if id(p) in learning} or weights
        self.first_bad: Tensor | None = None  # mini-batch, 0 for none
        self.contrast: Tensor | None = None  # of the nudge, in rounding errors
        self.before = self._checksums()

    def _checksums(self) -> Tensor:
        """A whole number per weight, from its bits."""
        return torch.stack(
            [
                p.detach().view(CHECKSUM_TYPES[p.element_size()]).sum(dtype=torch.int64)
                for p in self.weights.values()
            ]
        )

    @torch.no_grad()
    def examine(self, x: Tensor, y: Tensor) -> None:
        """Measure on one mini-batch how far the nudge moves the top layer, in rounding errors of
        its norm, in the precision of the steps. Does nothing where no phase is nudged."""
        if not self.model.has_dynamics or self.rule.alg == "BPTT":
            return
        rule = self.rule
        beta_1, beta_2 = rule.betas
        chain = (self.model if self.bf16_copy is None else self.bf16_copy).chain(rule.loss)
        drive = chain.input_drive(x)
        base = self.model.phase(drive, y, beta_1, rule.loss)
        nudge = self.model.phase(drive, y, beta_2, rule.loss)
        free = fast.relax(chain, base, None, rule.T1)
        nudged = fast.relax(chain, nudge, free, rule.T2)[-1]  # (mbs, *shape of s_N)
        unnudged = fast.relax(chain, base, free, rule.T2)[-1]
        dtype = torch.promote_types(unnudged.dtype, torch.float32)
        rounding = 2**-10 if self.precision == "tf32" else torch.finfo(unnudged.dtype).eps
        size = unnudged.to(dtype).norm().clamp(min=1e-30) * rounding
        self.contrast = (nudged.to(dtype) - unnudged.to(dtype)).norm() / size

    def watch(self, neurons: Neurons, batch: int) -> None:
        """Record the first mini-batch after which a value is not finite, without waiting for the
        device."""
        norm = torch.nn.utils.get_total_norm([*self.model.parameters(), *neurons])
        bad = torch.where(norm.isfinite(), 0, batch)
        if self.first_bad is None:
            self.first_bad = bad
        else:
            self.first_bad = torch.where(self.first_bad > 0, self.first_bad, bad)

    def raise_if_diverged(self, neurons: Neurons, count: Tensor) -> int:
        """Raise RunFailed, with epoch, mini-batch and layers, if a value is not finite. Returns the
        number in `count`, a tensor without dimensions, read in the same wait for the device."""
        if self.first_bad is None:
            return int(count)
        first_bad, number = map(int, torch.stack([self.first_bad, count]).cpu())
        if not first_bad:
            return number
        tensors = [
            *self.model.named_parameters(),
            *((f"neurons of layer {n}", s) for n, s in enumerate(neurons, 1)),
        ]
        bad = [name for name, tensor in tensors if not tensor.isfinite().all()]
        if bad:
            raise RunFailed(
                f"training diverged in epoch {self.epoch}, batch {first_bad}: no longer finite: "
                f"{', '.join(bad)}; {self._advice_on_divergence()}"
            )
        self.first_bad = None  # the norm alone overflowed
        return number

    def _advice_on_divergence(self) -> str:
        if self.rule.alg in ("EP", "CEP") and abs(self.rule.betas[1] - self.rule.betas[0]) < 1e-5:
            return "EP divides by the difference of --betas: use a larger beta, 0.01 to 1"
        if self.model.has_dynamics:
            return "use smaller --lrs, or a smaller --scale or beta"
        return "use smaller --lrs, or a smaller --scale"

    def report(self, neurons: Neurons, convergence: Convergence | None = None) -> None:
        """Print the warnings at the end of an epoch, each kind once in a training. neurons: of the
        last mini-batch; convergence: None for a model without dynamics."""
        for kind, warning in self.warnings(neurons, convergence):
            if kind not in self.reported:
                print(f"  warning: {warning}", flush=True)
                self.reported.add(kind)

    def warnings(
        self, neurons: Neurons, convergence: Convergence | None = None
    ) -> Iterator[tuple[str, str]]:
        """(kind, line) of each warning at the end of an epoch."""
        unconverged = convergence and convergence.warning()
        if unconverged:
            yield "converged", unconverged
        same = [
            name
            for name, kept in zip(self.weights, (self.before == self._checksums()).tolist())
            if kept
        ]
        if len(same) == len(self.weights):
            yield "unchanged", f"no weight has changed: {self._why_unchanged()}"
        elif same:
            yield "unchanged", f"{', '.join(same)} did not change: {self._why_unchanged()}"
        elif self.contrast is not None and self.contrast < 4:
            yield (
                "noise",
                f"the nudge moves the output by {float(self.contrast):.1f} times the rounding "
                "error of its values: updates are mostly noise; use a larger beta (--betas)",
            )
        alike = [
            name
            for name, p in self.weights.items()
            if len(p) > 1 and p.any() and (p == p[:1]).all()
        ]
        if alike:
            yield (
                "copies",
                f"all neurons have the same weights in {', '.join(alike)}, and learn the same: use "
                "--scale above 0",
            )
        if not self.model.has_dynamics:
            return
        hidden = neurons[:-1] or neurons
        saturated = [str(n) for n, s in enumerate(hidden, 1) if self._is_saturated(s)]
        if saturated:
            yield (
                "saturated",
                f"all neurons of layer {', '.join(saturated)} are saturated for all images: no "
                "layer below learns; use smaller --lrs or a smaller --scale",
            )

    def _why_unchanged(self) -> str:
        if not any(p.any() for p in self.weights.values()):
            return "all weights are zero, so that no gradient passes; use --scale above 0"
        if self.contrast is not None and self.contrast < 1:
            return (
                "the contrast of the two phases is below the rounding error; use a larger beta "
                "(--betas)"
            )
        if self.rule.T2 < len(self.model.connections):
            return (
                f"--T2 {self.rule.T2} does not reach the lower layers; use at least as many steps "
                "as layers"
            )
        return "the gradient or the learning rate (--lrs) is zero; saturated neurons pass none on"

    def _is_saturated(self, state: Tensor) -> bool:
        """Whether every neuron of a layer is within a ten-thousandth of its activation's range from
        an end. An activation that is not registered has no known range."""
        curve = CURVES.get(self.model.activation)
        if curve is None:
            return False
        margin = 1e-4 * (curve.high - curve.low)
        return bool(((state <= curve.low + margin) | (state >= curve.high - margin)).all())


def log_theorem(
    model: Any, rule: Rule, run: "RunFolder | None", epoch: int, batch: int, x: Tensor, y: Tensor
) -> None:
    """gducheck on a few images during a training (`--check-thm`): a line in the log, and rows of
    gducheck.csv in the run folder. Changes nothing that the training uses."""
    with exactly():
        rows = gdu_report(model, x, y, rule).rows
    best = [
        row
        for row in rows
        if row["estimate"] == rows[-1]["estimate"] and not row["name"].startswith("neurons_")
    ]
    # nan: BPTT does not reach the parameter
    worst = min(best, key=lambda row: 2 if math.isnan(row["cosine"]) else row["cosine"])
    rmse = sum(row["rmse"] for row in best) / len(best)
    write(
        f"epoch {epoch}, batch {batch}: EP ({worst['estimate']}) against BPTT: cosine at least "
        f"{worst['cosine']:.3f} ({worst['name']}), RMSE on average {rmse:.3f}"
    )
    if run:
        run.append_csv("gducheck.csv", [{"epoch": epoch, "batch": batch, **row} for row in rows])


def report_precision(trainer: Any, batches: Batches, precision: str) -> None:
    """Print how far the gradients of a mini-batch in `precision` are from those in fp32. Leaves
    random numbers and the statistics of a batch normalisation unchanged. trainer: an
    `experiment.training.Trainer`."""
    images = batches.images[: batches.mbs]
    labels = batches.labels[: batches.mbs]
    x = batches.normalise(images.float() / 255)
    model = trainer.model
    bf16_copy = trainer.bf16_copy
    random_state = torch.get_rng_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def gradients(name: str, bf16_copy: Any) -> dict[str, Tensor]:
        set_precision(name)
        torch.set_rng_state(random_state)
        trainer.bf16_copy = bf16_copy
        trainer.gradients(x, labels)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    exact = gradients("fp32", None)
    rounded = gradients(precision, bf16_copy)
    torch.set_rng_state(random_state)
    for buffer, before in buffers:
        buffer.copy_(before)
    # Some gradients, such as that of a bias before a normalisation, consist of rounding errors and
    # have no direction.
    least = 1e-4 * max(grad.norm() for grad in exact.values())
    cosines = {
        name: cosine(grad, rounded[name]) for name, grad in exact.items() if grad.norm() >= least
    }
    worst = min(cosines, key=lambda name: cosines[name])
    beta = f" at beta {trainer.rule.betas[1]:g}" if model.has_dynamics else ""
    print(
        f"{precision} against fp32{beta}: gradient cosine at least {cosines[worst]:.4f} ({worst})",
        flush=True,
    )
