"""Watching a training for what it would not say of itself."""

import torch

from data_utils import RunFailed
from energy import fast
from energy.activations import RANGES
from energy.gdu import cosine, gdu_report
from energy.precision import exactly, set_precision
from experiment.timing import write


class Health:
    """Watches an epoch for numbers that are no longer finite, weights that do not change, a nudge
    that drowns in rounding, and layers that are stuck at the ends of their activation.

    model: an EnergyModel; rule: the `Rule` that it learns by; optimizer: its parameter groups are
    the model's; twin: of the model, which takes the time steps in a lower precision, or None;
    precision: as `--precision` has it."""

    def __init__(self, model, rule, optimizer, epoch, twin=None, precision="fp32"):
        self.model, self.rule, self.epoch, self.twin, self.precision = (
            model,
            rule,
            epoch,
            twin,
            precision,
        )
        moving = {
            id(p) for group in optimizer.param_groups for p in group["params"] if group["lr"] > 0
        }
        weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
        self.weights = {name: p for name, p in weights.items() if id(p) in moving} or weights
        self.first_bad, self.contrast, self.before = None, None, self._checksums()

    def _checksums(self):
        """Of the bits of each weight, as whole numbers."""
        kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
        return torch.stack(
            [
                p.detach().view(kinds[p.element_size()]).sum(dtype=torch.int64)
                for p in self.weights.values()
            ]
        )

    @torch.no_grad()
    def examine(self, x, y):
        """Measures on one mini-batch how far the nudge moves the top layer, in rounding errors of
        its norm, in the precision that steps are taken in. Changes nothing; without a nudge there
        is nothing to measure."""
        if not self.model.moves or self.rule.alg == "BPTT":
            return
        rule, chain = self.rule, (self.twin or self.model).chain(self.rule.loss)
        drive = chain.input_drive(x)
        free = fast.relax(
            chain, self.model.phase(drive, y, rule.betas[0], rule.loss), None, rule.T1
        )
        with_nudge, without = (
            fast.relax(chain, self.model.phase(drive, y, beta, rule.loss), free, rule.T2)[-1]
            for beta in rule.betas[::-1]
        )
        counted = torch.promote_types(without.dtype, torch.float32)
        rounding = 2**-10 if self.precision == "tf32" else torch.finfo(without.dtype).eps
        size = without.to(counted).norm().clamp(min=1e-30) * rounding
        self.contrast = (with_nudge.to(counted) - without.to(counted)).norm() / size

    def watch(self, neurons, batch):
        """Remembers the first mini-batch after which something was not finite, without waiting for
        the device."""
        norm = torch.nn.utils.get_total_norm([*self.model.parameters(), *neurons])
        bad = torch.where(norm.isfinite(), 0, batch)
        self.first_bad = (
            bad if self.first_bad is None else torch.where(self.first_bad > 0, self.first_bad, bad)
        )

    def check(self, neurons, count):
        """The number in `count`, a tensor without dimensions. Raises RunFailed, naming epoch, batch
        and layers, if something was not finite. Waits for the device once."""
        if self.first_bad is None:
            return int(count)
        first_bad, count = map(int, torch.stack([self.first_bad, count]).cpu())
        if not first_bad:
            return count
        tensors = [
            *self.model.named_parameters(),
            *((f"neurons of layer {n}", s) for n, s in enumerate(neurons, 1)),
        ]
        broken = [name for name, tensor in tensors if not tensor.isfinite().all()]
        if broken:
            tiny = (
                self.rule.alg not in ("BPTT", "BP")
                and abs(self.rule.betas[1] - self.rule.betas[0]) < 1e-5
            )
            advice = (
                "EP divides by the difference of the --betas: a larger beta usually helps, 0.01 to 1"
                if tiny
                else "smaller --lrs usually help, or a smaller --scale"
                + " or beta" * self.model.moves
            )
            raise RunFailed(
                f"training diverged in epoch {self.epoch}, batch {first_bad}: no longer finite "
                f"are {', '.join(broken)}; {advice}"
            )
        self.first_bad = None  # the norm alone overflowed
        return count

    def report(self, neurons, said, convergence=None):
        """Prints the warnings at the end of an epoch, each kind once a run. said: the kinds until
        now, which it adds to; convergence: a `Convergence`, None of a model without time steps."""
        for kind, warning in self.warnings(neurons, convergence):
            if kind not in said:
                print(f"  warning: {warning}", flush=True)
                said.add(kind)

    def warnings(self, neurons, convergence=None):
        """(kind, line) of what to say at the end of an epoch. neurons: those of its last
        mini-batch."""
        if convergence is not None and convergence.warning():
            yield "converged", convergence.warning()
        same = [
            name
            for name, kept in zip(self.weights, (self.before == self._checksums()).tolist())
            if kept
        ]
        if same:
            which = (
                "no weight has changed"
                if len(same) == len(self.weights)
                else f"{', '.join(same)} did not change"
            )
            yield "unchanged", f"{which}: {self._why_nothing_moves()}"
        elif self.contrast is not None and self.contrast < 4:
            yield (
                "noise",
                (
                    f"the nudge moves the output by {float(self.contrast):.1f} times the rounding error of its "
                    "numbers, updates are mostly noise: "
                    "a larger beta (--betas) helps"
                ),
            )
        copies = [
            name
            for name, p in self.weights.items()
            if len(p) > 1 and p.any() and (p == p[:1]).all()
        ]
        if copies:
            yield (
                "copies",
                (
                    f"all neurons have the same weights in {', '.join(copies)}, and learn the same: they "
                    "started alike, with --scale 0"
                ),
            )
        stuck = [
            n
            for n, state in enumerate(neurons[:-1] or neurons, 1)
            if self.model.moves and self._is_stuck(state)
        ]
        if stuck:
            yield (
                "stuck",
                (
                    f"all neurons of layer {', '.join(map(str, stuck))} sit at an end of their activation, for "
                    "all images: nothing is learnt below; smaller --lrs, or a smaller --scale"
                ),
            )

    def _why_nothing_moves(self):
        if not any(p.any() for p in self.weights.values()):
            return (
                "all weights are zero, and no layer can tell another what to learn; --scale above 0"
            )
        if self.contrast is not None and self.contrast < 1:
            return (
                "the contrast of the two phases drowns in rounding; a larger beta (--betas) helps"
            )
        if self.rule.T2 < len(self.model.connections):
            return f"the {self.rule.T2} steps of --T2 do not reach below; as many as layers do"
        return "the gradient is zero, or the --lrs are; neurons at the end of their activation pass nothing on"

    def _is_stuck(self, state):
        """Whether every neuron of a layer is at an end of the activation, to a ten-thousandth of
        its range."""
        low, high = RANGES[self.model.activation]
        margin = 1e-4 * (high - low)
        return bool(((state <= low + margin) | (state >= high - margin)).all())


def log_theorem(trainer, x, y, epoch, batch):
    """gducheck on a few images while training: a line in the log, and rows of gducheck.csv. Changes
    nothing that training uses."""
    with exactly():
        rows = gdu_report(trainer.model, x, y, trainer.rule).rows
    best = [
        row
        for row in rows
        if row["estimate"] == rows[-1]["estimate"] and not row["name"].startswith("neurons_")
    ]
    worst = min(
        best, key=lambda row: row["cosine"] if row["cosine"] == row["cosine"] else 2
    )  # nan: not reached
    rmse = sum(row["rmse"] for row in best) / len(best)
    write(
        f"epoch {epoch}, batch {batch}: EP ({worst['estimate']}) against BPTT: cosine at least "
        f"{worst['cosine']:.3f} ({worst['name']}), RMSE on average {rmse:.3f}"
    )
    if trainer.run:
        trainer.run.append_csv(
            "gducheck.csv", [{"epoch": epoch, "batch": batch, **row} for row in rows]
        )


def report_precision(trainer, batches):
    """Prints how far the gradients of a mini-batch in args.precision are from those in fp32. Leaves
    random numbers and the statistics of a batch normalisation as they are."""
    images, labels = (t[: batches.mbs] for t in (batches.images, batches.labels))
    x, found, twin, precision = (
        batches.normalise(images.float() / 255),
        [],
        trainer.twin,
        trainer.args.precision,
    )
    state, buffers = (
        torch.get_rng_state(),
        [(buffer, buffer.clone()) for buffer in trainer.model.buffers()],
    )
    for name, trainer.twin in (("fp32", None), (precision, twin)):
        set_precision(name)
        torch.set_rng_state(state)
        trainer.gradients(x, labels)
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    torch.set_rng_state(state)
    for buffer, before in buffers:
        buffer.copy_(before)
    # Some are zero but for rounding, as of a bias that a normalisation takes away again, and have
    # no direction.
    least = 1e-4 * max(a.norm() for a in found[0].values())
    cosines = {name: cosine(a, found[1][name]) for name, a in found[0].items() if a.norm() >= least}
    worst, beta = (
        min(cosines, key=cosines.get),
        f" at beta {trainer.rule.betas[1]:g}" * trainer.model.moves,
    )
    print(
        f"{precision} against fp32{beta}: gradient cosine at least {cosines[worst]:.4f} ({worst})",
        flush=True,
    )
