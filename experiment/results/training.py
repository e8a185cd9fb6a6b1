"""Results of a training: rows of metrics.csv, TensorBoard, figures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from data_utils import TASKS
from energy.activations import CURVES
from experiment.config import Config
from experiment.inference import Convergence
from experiment.plots import training as plots
from experiment.runs.files import WriteFailed, why
from experiment.runs.history import History, chosen_on
from experiment.timing import StepCount

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def epoch_row(
    epoch: int,
    accuracies: Mapping[str, float],
    seconds: float,
    convergence: Convergence | None,
    step_count: StepCount,
    angles: Sequence[float],
) -> dict[str, Any]:
    """A row of metrics.csv.

    accuracies: {column: share}; convergence: None for models without time steps, whose column stays
    empty; angles: of `EnergyModel.angles`, in degrees."""
    percent = {name: round(100 * share, 4) for name, share in accuracies.items()}
    return {
        "epoch": epoch,
        "train_acc": percent.pop("train_acc"),
        "test_acc": percent.pop("test_acc"),
        "seconds": round(seconds, 2),
        **percent,
        "converged": "" if convergence is None else round(convergence.percent, 4),
        **step_count.columns(),
        **{f"angle_{n}": round(angle, 3) for n, angle in enumerate(angles, 2)},
    }


def epoch_line(row: Mapping[str, Any], rate: float, step_count: StepCount) -> str:
    """A row of metrics.csv as a line of the log. rate: training images per second."""
    parts = [f"train {row['train_acc']:.2f} %"]
    if "val_acc" in row:
        parts.append(f"validation {row['val_acc']:.2f} %")
    parts.append(f"test {row['test_acc']:.2f} %")
    parts.append(f"{row['seconds']:.1f} s")
    parts.append(f"{rate:.0f} images/s")
    if step_count.images:
        parts.append(str(step_count))
    if row["converged"] != "":
        parts.append(f"{row['converged']:.2f} % converged")
    angles = [f"{value:.1f}" for name, value in row.items() if name.startswith("angle_")]
    if angles:
        parts.append(f"angles {' '.join(angles)}")
    return ", ".join(parts)


def describe_best(history: History, args: dict, folder: str | None) -> str:
    """The best model of a training with its accuracies, how it was chosen and where it is, one line
    of the log. args: {dest: value}; folder: of the run, None without --save."""

    def accuracy(row: dict) -> float:
        return row.get("val_acc", row["test_acc"])

    own = history.best["history"][-1:] if history.best else []
    row = max(own or history.epochs, key=accuracy)
    chosen = f"validation accuracy {history.best_accuracy:.2f} %, " if args["val_size"] else ""
    test = row["test_acc"] if args["val_size"] else history.best_accuracy
    converged = row.get("converged", "")
    share = "" if converged == "" else f", {converged:.2f} % converged"
    where = f"{folder}/model.pt" if folder else "this run is not saved (use --save)"
    return (
        f"best model: epoch {row['epoch']} of {len(history.epochs)}, chosen on {chosen_on(args)}: "
        f"{chosen}test accuracy {test:.2f} %{share}; {where}"
    )


def write_scalars(
    writer: SummaryWriter | None, folder: pathlib.Path, row: Mapping[str, Any]
) -> SummaryWriter:
    """Write a row of metrics.csv for TensorBoard, under the names of its columns.

    writer: the returned one of the epoch before. None opens a new one in folder/tensorboard, which
    discards what a killed process wrote of this epoch and later ones. Raises WriteFailed."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = writer or SummaryWriter(folder / "tensorboard", purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch" and value != "":
                writer.add_scalar(name, value, row["epoch"])
        writer.flush()
    except OSError as e:
        raise WriteFailed(f"cannot write {folder / 'tensorboard'}: {why(e)}") from None
    return writer


def draw_training(
    run: Any, model: Any, config: Config, history: History, neurons: Sequence[torch.Tensor]
) -> None:
    """Draw the accuracies over all epochs, and the neurons of the last mini-batch. run: the
    `RunFolder`."""
    best_epoch = history.best and history.best["epoch"]
    chance = 100 / TASKS[config.data.task].classes
    run.save_figure(
        "train-test_acc.png",
        plots.accuracy,
        history.epochs,
        best_epoch,
        history.resumptions,
        chance,
        config.adversarial.attack is not None,
    )
    curve = CURVES.get(model.activation)
    ends = curve and (curve.low, curve.high)
    linear_output = model.chain(config.model.loss).linear_output
    run.save_figure(
        "neural_activity.png", plots.activity, neurons, ends, linear_output, model.has_dynamics
    )
