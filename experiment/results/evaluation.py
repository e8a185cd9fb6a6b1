"""Results of `--todo evaluate` and `characteristic`: tables and figures of a trained model."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

import torch

from data_utils import TASKS
from energy.dynamics import CONVERGED, WINDOW
from experiment.devices import computed_on
from experiment.inference import Predictions
from experiment.plots import training as plots
from experiment.results.tables import header, read_settings, same_settings
from experiment.runs.folder import RunFolder
from experiment.text import count

PREDICTIONS = "predictions.csv"


def write_predictions(run: RunFolder, predictions: Predictions, classes: int, model: str) -> None:
    """Write predictions.csv, one row per test image in their order, and the confusion matrix.

    classes: of the task; model: names the weights, in the last column."""
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
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.index_put_((predictions.labels, predictions.classes), torch.tensor(1), accumulate=True)
    run.save_figure("confusion.png", plots.confusion, counts.numpy())


def describe_predictions(run: RunFolder, loss: str) -> str:
    """The message that names predictions.csv and what its confidence is."""
    confidence = "softmax probability" if loss == "cel" else "value of the output neuron"
    return (
        f"predictions are in {run.folder / PREDICTIONS} (confidence: the {confidence} of the "
        "predicted class)"
    )


@dataclasses.dataclass(frozen=True)
class Characteristic:
    """Results after 1, 2, ..., T1 free steps, one list entry each.

    accuracy, converged: shares of the test images; residual, energy: means over one mini-batch of
    `relaxed_images` images; energy: None for vector-field models."""

    accuracy: list[float]
    converged: list[float]
    residual: list[float]
    energy: list[float] | None
    relaxed_images: int


def write_characteristic(
    run: RunFolder, source: str, results: Characteristic, settings: Mapping[str, Any]
) -> None:
    """Write Characteristic_Time.txt; a table with other settings is moved aside.

    source: the evaluated model, as text; settings: what the results depend on, with `images`."""
    recorded = read_settings(run.folder / "Characteristic_Time.txt")
    if recorded and not same_settings(recorded, settings):
        run.move_aside("Characteristic_Time", (".png", ".pdf", ".txt"), ["Characteristic_Energy"])
    columns = [
        ("accuracy", results.accuracy, ".6f"),
        ("settled", results.converged, ".6f"),
        ("residual", results.residual, ".6e"),
    ]
    means = "residual, the relative change in the step"
    if results.energy is not None:
        columns.append(("energy", results.energy, ".6e"))
        means += "; energy, Phi"
    T1 = len(results.accuracy)
    rows = [
        [str(t), *(format(values[t - 1], digits) for _, values, digits in columns)]
        for t in range(1, T1 + 1)
    ]
    lines = [
        f"# {source}, T1 = {T1}, {count(settings['images'], 'test image')}, "
        f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}, settled: share of images that have "
        f"converged, whose relative change over the last min({WINDOW}, t) steps is below "
        f"{CONVERGED:g} in every layer; computed on: {computed_on()}",
        header(settings),
        f"# of the first {results.relaxed_images} of them, means: {means}",
        "# t " + " ".join(name for name, *_ in columns),
        *(" ".join(row) for row in rows),
    ]
    run.write_lines("Characteristic_Time.txt", lines)


def draw_characteristic(
    run: RunFolder, results: Characteristic, task: str | None, trained_T1: int | None
) -> None:
    """Draw the results over the free steps. trained_T1: T1 of the training."""
    chance = 100 / TASKS[task].classes if task else None
    run.save_figure(
        "Characteristic_Time.png",
        plots.characteristic,
        results.accuracy,
        results.converged,
        trained_T1,
        chance,
    )
    run.save_figure(
        "Characteristic_Energy.png",
        plots.relaxation,
        results.residual,
        results.energy,
        trained_T1,
    )
