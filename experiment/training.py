"""The training loop.

It knows no model and no learning rule: `model_utils.make_trainer` gives it a rule's function, and
`model_utils.train` runs it."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data_utils import Batches, to_device
from energy.dynamics import Neurons
from energy.precision import refresh
from energy.rule import UNOBSERVED, Observer, Rule
from experiment.config import Config
from experiment.diagnostics import Diagnostics
from experiment.inference import Convergence, correct, evaluate
from experiment.results.training import draw_training, epoch_line, epoch_row
from experiment.runs.checkpoint import resumable_state, snapshot
from experiment.runs.history import History
from experiment.timing import Stopwatch, progress
from experiment.workers import Workers

if TYPE_CHECKING:
    from experiment.runs.folder import RunFolder


class Learnt(NamedTuple):
    """The result of a mini-batch, of this worker's share: the neurons of the free phase, the number
    of correctly classified images (a tensor without dimensions), and the number of images."""

    neurons: Neurons
    correct: Tensor
    images: int


@dataclasses.dataclass
class Recorder:
    """Records a training in its run folder: models, metrics and checkpoint after every epoch,
    figures at most every DRAW seconds."""

    run: "RunFolder"
    config: Config
    drawn: float = dataclasses.field(default_factory=time.monotonic)

    DRAW = 5  # drawing can take longer than a short epoch

    def commit(
        self,
        trainer: "Trainer",
        row: dict,
        improved: bool,
        final: bool,
        generator: torch.Generator | None,
    ) -> None:
        """Write an epoch. row: of metrics.csv, not yet in the history; improved: whether this is
        the best model so far; generator: of the training data."""
        assert generator is not None  # mini-batches that a run folder records are shuffled
        history = trainer.history
        committed = dataclasses.replace(history, epochs=[*history.epochs, row])
        state = snapshot(trainer.model, self.config.flat(), committed)
        if improved:
            history.best = copy.deepcopy(state)
        resumable = resumable_state(history, trainer.optimizer, trainer.scheduler, generator)
        self.run.commit(state, resumable, improved, final)

    def draw(self, trainer: "Trainer", neurons: Neurons, final: bool) -> None:
        """Draw the figures, if the last drawing is long enough ago. neurons: of the last
        mini-batch."""
        if final or time.monotonic() - self.drawn > self.DRAW:
            draw_training(self.run, trainer.model, self.config, trainer.history, neurons)
            self.drawn = time.monotonic()


@dataclasses.dataclass
class Trainer:
    """Trains a model, epoch by epoch.

    learn          learning rule, a function of `model_utils.LEARN`: fills p.grad
    diagnostics    detects non-finite values, saturation and unconverged phases
    bf16_copy      of the model, which takes the time steps; or None
    adversary      perturbs the training images (`draw`, `perturb`); or None
    recorder       writes the run folder; None for a training that is not saved
    check_theorem  called as (epoch, batch, x, y) ten times an epoch; or None
    workers        share every mini-batch; their update is that of a single process
    """

    model: Any
    optimizer: torch.optim.Optimizer
    rule: Rule
    learn: Callable[..., Neurons]
    diagnostics: Diagnostics
    scheduler: Any = None
    bf16_copy: Any = None
    adversary: Any = None
    history: History = dataclasses.field(default_factory=History)
    recorder: Recorder | None = None
    check_theorem: Callable[[int, int, Tensor, Tensor], None] | None = None
    workers: Workers = dataclasses.field(default_factory=Workers)

    EVERY = 10  # mini-batches between two checks of computed values, which wait for the device

    def fit(
        self,
        train_batches: Batches,
        test_batches: Batches,
        val_batches: Batches | None,
        last: int,
    ) -> None:
        """Train up to epoch `last`. The best model is chosen on `val_batches`, without them on
        `test_batches`. Raises RunFailed when a value is not finite."""
        if self.history.best_accuracy is None:
            self.history.best_accuracy = self._accuracy_of_best(val_batches or test_batches)
        total = Stopwatch()
        for epoch in range(len(self.history.epochs) + 1, last + 1):
            start = time.perf_counter()
            stopwatch = Stopwatch(next(self.model.parameters()).device)
            self.diagnostics.begin(epoch)
            train_acc, neurons = self.train_epoch(train_batches, epoch, stopwatch)
            self._step_scheduler()
            trained = time.perf_counter() - start
            with stopwatch.part("evaluation"):
                accuracies, convergence = self._evaluate(test_batches, val_batches)
            stopwatch.steps.gather(self.workers)
            row = epoch_row(
                epoch,
                {"train_acc": train_acc, **accuracies},
                time.perf_counter() - start,
                convergence,
                stopwatch.steps,
                self.model.angles(),
            )
            self._commit(row, epoch == last, train_batches.generator)
            total.add(stopwatch)
            line = epoch_line(row, train_batches.samples / trained, stopwatch.steps)
            print(f"epoch {epoch}/{last}: {line}", flush=True)
            self.diagnostics.report(neurons, convergence)
            if self.recorder:
                self.recorder.draw(self, neurons, epoch == last)
        print(f"time: {total.shares()}", flush=True)

    def train_epoch(
        self, batches: Batches, epoch: int, stopwatch: Stopwatch
    ) -> tuple[float, Neurons]:
        """One pass over the training images. Returns the accuracy of the free phases, a share, and
        the last mini-batch's neurons, of this worker's share."""
        last = len(batches)
        tenth = math.ceil(last / 10)
        device = next(self.model.parameters()).device
        hits = torch.zeros((), dtype=torch.int64, device=device)
        seen = 0
        bar = progress(stopwatch.iterate(batches, "data"), f"epoch {epoch}", last)
        for batch, (x, y) in enumerate(bar, 1):
            if self.check_theorem and (batch - 1) % tenth == 0:
                self.check_theorem(epoch, batch, x[:5], y[:5])
            if batch == 1:
                self.diagnostics.examine(x, y)
            learnt = self.gradients(x, y, stopwatch)
            with torch.no_grad(), stopwatch.part("update"):
                self.optimizer.step()
                if self.bf16_copy is not None:
                    refresh(self.bf16_copy, self.model)
                self.diagnostics.watch(learnt.neurons, batch)
                seen += learnt.images
                if learnt.images:
                    hits += learnt.correct
                if batch == last:
                    hits = self.workers.sum(hits)
                    seen = batches.samples
                if batch % self.EVERY == 0 or batch == last:
                    right = self.diagnostics.raise_if_diverged(learnt.neurons, hits)
                    bar.set_postfix_str(f"train {100 * right / max(seen, 1):.2f} %", refresh=False)
        return right / batches.samples, learnt.neurons

    def gradients(self, x: Tensor, y: Tensor, observer: Observer = UNOBSERVED) -> Learnt:
        """Fill p.grad from one mini-batch by the learning rule; CEP changes the weights as well.
        Each of several workers takes a share, and p.grad becomes the mean.

        x: (mbs, ...), y: (mbs,), of all workers."""
        n = len(y)
        share, n_local = self.workers.shard(n)
        if not n_local:  # without images of its own, a worker repeats one of another worker
            observer = UNOBSERVED
        # random numbers are drawn for the whole mini-batch: the same for any number of workers
        start = self.adversary.draw(x.shape)[share] if self.adversary else None
        x = x[share]
        y = y[share]
        if self.adversary:
            with observer.part("attack"):
                x = self.adversary.perturb(self.model, x, y, start)
        rule = self.rule
        masks = draw_masks(self.model, rule.dropouts, n, share) if rule.dropouts else None
        if rule.random_sign and torch.rand(()) < 0.5:
            rule = dataclasses.replace(rule, betas=(rule.betas[0], -rule.betas[1]))

        def average() -> None:
            self.workers.average_gradients(self.model, n_local, n)

        changed = False

        def change(part: float) -> None:
            nonlocal changed
            changed = True
            average()
            gradient_step(self.optimizer, part)

        with self.workers.sharing_statistics(self.model, n_local, n):
            neurons = self.learn(
                self.model, x, y, rule, masks, self.bf16_copy, observer, change=change
            )
        if not changed:  # a rule that changes weights has averaged before each change
            with observer.part("update"):
                average()
        return Learnt(neurons, correct(self.model.chain(rule.loss, masks), neurons, y), n_local)

    def _step_scheduler(self) -> None:
        scheduler = self.scheduler
        # after T_max steps of a cosine the rates would rise again
        if scheduler and scheduler.last_epoch < getattr(scheduler, "T_max", math.inf):
            scheduler.step()

    def _evaluate(
        self, test_batches: Batches, val_batches: Batches | None
    ) -> tuple[dict[str, float], Convergence | None]:
        """({column of metrics.csv: accuracy, a share}, the `Convergence` on the images that the
        model is chosen on; None for a model without dynamics)."""
        chosen_on = val_batches or test_batches
        convergence = Convergence(self.model, self.rule.T1) if self.model.has_dynamics else None
        accuracies = {}
        for name, batches in (("test_acc", test_batches), ("val_acc", val_batches)):
            if batches:
                accuracies[name] = evaluate(
                    self.model if self.bf16_copy is None else self.bf16_copy,
                    batches,
                    self.rule,
                    workers=self.workers,
                    convergence=convergence if batches is chosen_on else None,
                )
        return accuracies, convergence

    def _commit(self, row: dict, final: bool, generator: torch.Generator | None) -> None:
        """Append an epoch to the history, and record it."""
        accuracy = row.get("val_acc", row["test_acc"])
        improved = accuracy > self.history.best_accuracy
        self.history.best_accuracy = max(self.history.best_accuracy, accuracy)
        if self.recorder:
            self.recorder.commit(self, row, improved, final, generator)
        self.history.epochs.append(row)

    def _accuracy_of_best(self, batches: Batches) -> float:
        """The accuracy of the best model so far, in %, on images that it was not chosen on; -1
        without one."""
        if self.history.best is None:
            return -1.0
        best = copy.deepcopy(self.model)
        best.load_state_dict(self.history.best["model_state_dict"])
        return round(100 * evaluate(best, batches, self.rule, workers=self.workers), 4)


def draw_masks(
    model: Any, keep: tuple[float, ...], mbs: int, share: slice = slice(None)
) -> list[Tensor | None]:
    """Dropout masks for a mini-batch, a list of (mbs, *pre_shape) or None, one per connection, the
    read-out's last: 0 with probability 1 - keep, else 1 / keep.

    Drawn on the CPU for all mbs samples, so that they are the same on every device and for any
    number of workers, each of which gets its `share`. keep: in (0, 1], one per connection."""
    weight = model.synapses[0].weight
    connections = [*model.connections, *([model.output] if model.softmax else [])]
    masks: list[Tensor | None] = []
    for connection, p in zip(connections, keep):
        if p == 1:
            masks.append(None)
            continue
        mask = (torch.rand(mbs, *connection.pre_shape)[share] < p) / p
        mask = to_device(mask.to(weight.dtype), weight.device)
        if mask.dim() == 4:
            mask = mask.contiguous(memory_format=torch.channels_last)
        masks.append(mask)
    return masks


@torch.no_grad()
def gradient_step(optimizer: torch.optim.Optimizer, share: float = 1.0) -> None:
    """A share of a plain gradient step along p.grad with the optimizer's learning rates, without
    its momentum and weight decay: the `change` of `model_utils.cep_updates`."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.sub_(p.grad, alpha=group["lr"] * share)
