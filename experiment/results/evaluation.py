"""Results of `--todo evaluate` and `characteristic`: tables and figures of a trained model."""

import math
from collections.abc import Iterable

import torch

from data_utils import TASKS, Task
from energy.dynamics import CONVERGED, WINDOW
from experiment.inference import Convergence, Predictions
from experiment.plots import training as plots
from experiment.results.record import Record
from experiment.results.store import Store
from experiment.results.tables import measured_with
from experiment.runs.folder import RunFolder
from experiment.text import count
from experiment.timing import describe_steps

PREDICTIONS = "predictions.csv"
CHARACTERISTIC = "Characteristic_Time.txt"


def write_predictions(run: RunFolder, predictions: Predictions, task: Task, model: str) -> None:
    """Write predictions.csv, one row per test image in their order, and the confusion matrix.

    model: names the weights, in the last column."""
    columns = (values.tolist() for values in predictions)
    rows = [
        {
            "image": n,
            "label": label,
            "prediction": predicted,
            "confidence": f"{confidence:.6f}",
            "steps": steps,
            "model": model,
        }
        for n, (label, predicted, confidence, steps) in enumerate(zip(*columns, strict=True))
    ]
    run.write_csv(PREDICTIONS, rows)
    counts = torch.zeros(task.classes, task.classes, dtype=torch.int64)
    counts.index_put_((predictions.labels, predictions.classes), torch.tensor(1), accumulate=True)
    run.save_figure("confusion.png", plots.confusion, counts.numpy(), task.names)


def describe_predictions(run: RunFolder, loss: str) -> str:
    """The message that names predictions.csv and what its confidence is."""
    confidence = "softmax probability" if loss == "cel" else "value of the output neuron"
    return (
        f"predictions are in {run.folder / PREDICTIONS} (confidence: the {confidence} of the "
        "predicted class)"
    )


def describe_accuracy(record: Record) -> str:
    """An `evaluate` record, for the log: `accuracy 97.20 % (1000 images)`."""
    value = record.value
    details = count(record.data["images"], "image")
    if {"steps_mean", "steps_max", "unsettled"} <= value.keys():
        details += f", {describe_steps(value)}"
    return f"accuracy {100 * value['accuracy']:.2f} % ({details})"


def convergence_of(record: Record) -> Convergence | None:
    """The number of converged images in an `evaluate` record; None of models without time steps."""
    share = record.model.get("converged")
    if share is None:
        return None
    images = record.value.get("convergence_images") or record.data["images"]
    return Convergence(None, record.settings["predict_step"], images, round(share * images))


# ---- characteristic


def write_characteristic(run: RunFolder, store: Store, source: str, record: Record) -> None:
    """Write Characteristic_Time.txt. source: the evaluated model, as text."""
    value = record.value
    columns = [
        ("accuracy", value["accuracy"], ".6f"),
        ("settled", value["converged"], ".6f"),
        ("residual", _floats(value["residual"]), ".6e"),
    ]
    means = "residual, the relative change in the step"
    energy = value.get("energy")
    if energy:
        columns.append(("energy", _floats(energy), ".6e"))
        means += "; energy, Phi"
    T1 = len(value["accuracy"])
    rows = [
        [str(t), *(format(values[t - 1], digits) for _, values, digits in columns)]
        for t in range(1, T1 + 1)
    ]
    lines = [
        f"# {source}, T1 = {T1}, {count(record.data['images'], 'test image')}, {record.when}, "
        f"settled: share of images that have converged, whose relative change over the last "
        f"min({WINDOW}, t) steps is below {CONVERGED:g} in every layer; computed on: "
        f"{record.computed_on}",
        measured_with(record),
        f"# of the first {value['relaxed_images']} of them, means: {means}",
        "# t " + " ".join(name for name, *_ in columns),
        *(" ".join(row) for row in rows),
    ]
    with store.locked():
        run.write_lines(CHARACTERISTIC, lines)


def _floats(values: Iterable[float | None]) -> list[float]:
    """The numbers of a record, in which None is one that is not finite."""
    return [math.nan if value is None else value for value in values]


def describe_characteristic(run: RunFolder, source: str, record: Record) -> str:
    """A `characteristic` record, for the log. source: the evaluated model, as text."""
    accuracy = record.value["accuracy"]
    # 1e-9: the accuracies are rounded
    away = [t for t, share in enumerate(accuracy, 1) if abs(share - accuracy[-1]) > 0.001 + 1e-9]
    return (
        f"{source} after T1 = {len(accuracy)} steps: test accuracy {100 * accuracy[-1]:.2f} % "
        f"({record.data['images']} images), within 0.1 points of it from step "
        f"{max(away, default=0) + 1} on; {100 * record.value['converged'][-1]:.2f} % converged\n"
        f"results are in {run.folder / CHARACTERISTIC}"
    )


def draw_characteristic(
    run: RunFolder, store: Store, record: Record, task: str | None, trained_T1: int | None
) -> None:
    """Draw the results over the free steps. trained_T1: T1 of the training."""
    value = record.value
    chance = 100 / TASKS[task].classes if task else None
    run.save_figure(
        "Characteristic_Time.png",
        plots.characteristic,
        value["accuracy"],
        value["converged"],
        trained_T1,
        chance,
        table=store.locked,
    )
    run.save_figure(
        "Characteristic_Energy.png",
        plots.relaxation,
        _floats(value["residual"]),
        _floats(value.get("energy") or ()) or None,
        trained_T1,
    )
