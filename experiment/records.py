"""What a run leaves behind besides its models and tables: figures of its training, TensorBoard,
predictions, relaxations."""

import datetime
import json

import torch

from data_utils import TASKS
from energy.dynamics import CONVERGED, WINDOW
from experiment.devices import computed_on
from experiment.plots import attacks, training
from experiment.report import HEADER, same_settings, settings_of
from experiment.runs.files import WriteFailed, why

PREDICTIONS, CONFUSION = "predictions.csv", "confusion.png"


def draw_training(run, model, args, story, neurons):
    """Draws the figures of a training. args: of the command line; story: of all its epochs;
    neurons: of the last mini-batch."""
    from energy.activations import RANGES

    best = story.best
    run.save_figure(
        "train-test_acc.png",
        training.accuracy,
        story.epochs,
        best and best["epoch"],
        story.resumptions,
        100 / TASKS[args.task].classes,
    )
    run.save_figure(
        "neural_activity.png",
        training.activity,
        neurons,
        RANGES.get(model.activation),
        model.chain(args.loss).linear_output,
    )


# ---- TensorBoard


def write_scalars(writer, folder, row):
    """Writes a row of metrics.csv for TensorBoard, under the names of its columns. Returns the
    writer.

    writer: of the epoch before; None: a new one, to folder/tensorboard, for which what a killed
    process wrote of this epoch and later ones does not count. Raises WriteFailed."""
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


# ---- evaluate


def write_predictions(run, found, classes, model):
    """Writes predictions.csv, a row per test image in their order, and the confusion matrix. found:
    `Predictions`; classes: how many there are; model: which model's they are, in a word."""
    columns = ("label", "prediction", "confidence", "steps")
    rows = zip(*(values.tolist() for values in found), strict=True)
    run.write_csv(
        PREDICTIONS,
        [
            {
                "image": n,
                **dict(zip(columns, row, strict=True)),
                "confidence": f"{row[2]:.6f}",
                "model": model,
            }
            for n, row in enumerate(rows)
        ],
    )
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.index_put_((found.labels, found.classes), torch.tensor(1), accumulate=True)
    run.save_figure(CONFUSION, training.confusion, counts.numpy())


def where_predictions(run, loss):
    """Where the predictions are, and what their confidence is, in words."""
    confidence = "the softmax probability" if loss == "cel" else "the value of the output neuron"
    return f"predictions are in {run.folder / PREDICTIONS} (confidence: {confidence} of the predicted class)"


# ---- characteristic


def write_characteristic(run, saved, counted, moving, settings):
    """Writes Characteristic_Time.txt; that of other settings is moved aside.

    saved: the `SavedRun`; counted: (accuracy, converged), of `characteristic`; moving: (residual,
    energy or None, how many images), of `relaxation`; settings: what the numbers depend on,
    `images` among them."""
    (accuracy, converged), (residual, energy, few) = counted, moving
    columns = [("accuracy", accuracy), ("settled", converged), ("residual", residual)]
    columns += [] if energy is None else [("energy", energy)]
    lines = [
        " ".join(
            [
                str(t),
                *(f"{value:.6f}" for value in values[:2]),
                *(f"{value:.6e}" for value in values[2:]),
            ]
        )
        for t, values in enumerate(zip(*(values for _, values in columns), strict=True), 1)
    ]
    before = settings_of(run.folder / "Characteristic_Time.txt")
    if before and not same_settings(before, settings):
        run.move_aside("Characteristic_Time", (".png", ".pdf", ".txt"), ["Characteristic_Energy"])
    run.write_lines(
        "Characteristic_Time.txt",
        [
            f"# {saved.source}, T1 = {len(accuracy)}, {settings['images']} test images, "
            f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}, settled: share of images that have "
            f"converged, whose relative change over the last min({WINDOW}, t) steps is below "
            f"{CONVERGED:g} in every layer; computed on: {computed_on()}",
            HEADER + json.dumps(settings, sort_keys=True),
            f"# of the first {few} of them, means: residual, the relative change in the step"
            + ("" if energy is None else "; energy, Phi"),
            "# t " + " ".join(name for name, _ in columns),
            *lines,
        ],
    )


def draw_characteristic(run, saved, counted, moving):
    """Draws what `write_characteristic` writes, of the same arguments."""
    (accuracy, converged), (residual, energy, _), trained = counted, moving, saved.args.get("T1")
    chance = 100 / TASKS[saved.args["task"]].classes if saved.args.get("task") else None
    run.save_figure(
        "Characteristic_Time.png", training.characteristic, accuracy, converged, trained, chance
    )
    run.save_figure("Characteristic_Energy.png", training.relaxation, residual, energy, trained)


# ---- gducheck


def save_gdu(run, comparison):
    """The raw contributions, the table, and the figures of a comparison."""
    for file, value in zip(
        ("BPTT.tar", "EP.tar", "EP_minus.tar"), (comparison.BPTT, *comparison.runs)
    ):
        run.save(file, {name: tensor.cpu() for name, tensor in value.items()})
    run.append_csv("gducheck.csv", [{"epoch": "", "batch": "", **row} for row in comparison.rows])
    generator = torch.Generator().manual_seed(0)
    for name, bptt in comparison.bptt.items():
        run.save_figure(
            f"gdu_{name}.png",
            attacks.gdu_entries,
            name,
            bptt,
            comparison.ep[name],
            generator,
        )
    run.save_figure("gdu_layers.png", attacks.gdu_layers, comparison.bptt, comparison.ep, generator)
    run.save_figure(
        "gdu_overview.png", attacks.gdu_overview, list(comparison.bptt), comparison.rows
    )
