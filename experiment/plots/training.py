"""The figures of a run: functions from numbers to a Matplotlib figure. Those of checks and attacks
are in `attacks`."""

import numpy as np

from energy.dynamics import CONVERGED, WINDOW
from experiment.plots.style import (
    curve_options,
    grid,
    legend_below,
    new_figure,
    plain,
    style,
    vertical,
    whole_ticks,
)

LABELLED = 5  # resumptions that are described in the legend, the latest ones
SATURATED = 0.01  # of the range of an activation: neurons so near an end are counted as saturated


@style()
def accuracy(rows, picked=None, resumptions=None, chance=None):
    """Accuracies over the epochs.

    rows: those of metrics.csv, as dicts; picked: the epoch of the model that is kept; resumptions:
    {epoch: what changed before it, in words}; chance: the accuracy of guessing, in %."""
    resumptions = sorted((resumptions or {}).items())
    figure = new_figure(
        "Accuracy of the free phase", height=3.8 + 0.16 * min(len(resumptions), LABELLED)
    )
    axes, epochs = (
        figure.add_subplot(xlabel="epoch", ylabel="accuracy (%)"),
        [row["epoch"] for row in rows],
    )
    for n, (key, label) in enumerate(
        (
            ("train_acc", "train, during the epoch"),
            ("test_acc", "test, after the epoch"),
            ("val_acc", "validation, after the epoch"),
        )
    ):
        if any(key in row for row in rows):
            values = [row.get(key, np.nan) for row in rows]
            axes.plot(
                epochs,
                values,
                label=f"{label} (last {values[-1]:.2f})",
                **curve_options(n, len(rows)),
            )
    chosen_on = "val_acc" if any("val_acc" in row for row in rows) else "test_acc"
    for row in rows:
        if row["epoch"] == picked and chosen_on in row:
            axes.plot(
                picked,
                row[chosen_on],
                "*",
                color="black",
                fillstyle="none",
                markersize=12,
                zorder=5,
                label=f"model.pt: epoch {picked} ({row[chosen_on]:.2f})",
            )
    for n, (epoch, text) in enumerate(resumptions, LABELLED - len(resumptions)):
        label = f"resumed before epoch {epoch}" + (f": {plain(text)}" if text else "")
        vertical(
            axes,
            epoch - 0.5,
            (label if len(label) <= 90 else label[:87] + "...") if n >= 0 else None,
            ":",
        )
    if chance is not None:
        axes.axhline(
            chance,
            color="0.5",
            linewidth=1,
            linestyle=(0, (1, 3)),
            marker="",
            label=f"chance ({chance:g})",
        )
    if len(rows) == 1:
        axes.set_xticks(epochs)
    else:
        whole_ticks(axes.xaxis)
    legend_below(figure, 1 if resumptions else 2)
    return figure


def saturation(state, ends):
    """(share of a layer's neurons at the low end of the activation's range, share at its high
    end)"""
    low, high = ends
    margin = SATURATED * (high - low)
    return (state <= low + margin).float().mean().item(), (
        state >= high - margin
    ).float().mean().item()


@style()
def activity(neurons, ends=None, linear_output=False):
    """Histogram of each layer's neurons at the end of a free phase, with the share at either end.

    neurons: list of tensors, one per layer; ends: of the activation's range; linear_output: whether
    the last layer has no activation."""
    figure = new_figure(
        "Neurons at the end of the free phase, last training batch",
        2.6 * min(len(neurons), 4) + 0.4,
        0.9 + 2.5 * -(-len(neurons) // 4),
    )
    panels = grid(figure, len(neurons), 4)
    for n, (axes, state) in enumerate(zip(panels, neurons), 1):
        values = state.detach().float().flatten().cpu()
        own = None if linear_output and n == len(neurons) else ends
        low, high = own or (float(values.min()), float(values.max()))
        margin = (
            0.02 * (high - low) if high - low > 1e-3 else 0.5
        )  # saturated layers can hold one value only
        shares = np.full(len(values), 100 / max(len(values), 1))
        axes.hist(
            values.numpy(),
            bins=52,
            range=(low - margin, high + margin),
            weights=shares,
            histtype="stepfilled",
        )
        # zero is the foot of every bar, and yet a peak at an end does not hide the rest
        axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=5)
        text = f"s_{n} ({' x '.join(map(str, state.shape[1:]))})"
        if own:
            at_low, at_high = saturation(values, own)
            text += f"\nat {low:g}: {100 * at_low:.1f} %, at {high:g}: {100 * at_high:.1f} %"
        axes.set_title(text + ("\nno activation" if not own and linear_output else ""))
        axes.set_xlabel("activation")
    panels[0].set_ylabel("share of the neurons (%),\nsquare-root scale")
    if ends:
        figure.supxlabel(
            f"at an end: within {100 * SATURATED:g} % of the range of the activation", fontsize=8
        )
    return figure


@style()
def characteristic(accuracy, converged, trained_T1=None, chance=None):
    """The shares of images classified correctly and converged over the free steps.

    accuracy, converged: lists with an entry per step; trained_T1: the T1 of the training; chance:
    the accuracy of guessing, in %."""
    figure = new_figure("Accuracy over the number of free steps", height=4.8)
    panels, steps = figure.subplots(2, 1, sharex=True), np.arange(1, len(accuracy) + 1)
    for n, (axes, shares, label) in enumerate(
        zip(panels, (accuracy, converged), ("classified correctly", "converged"))
    ):
        axes.plot(
            steps,
            100 * np.array(shares),
            f"C{n}" + "o^"[n] + ("-", "--")[n],
            label=f"{label} (last {100 * shares[-1]:.2f} %)",
            **curve_options(n, len(steps)),
        )
        if trained_T1 and trained_T1 <= len(steps):
            vertical(axes, trained_T1, f"T1 = {trained_T1} of the training")
    if chance is not None:
        panels[0].axhline(
            chance,
            color="0.5",
            linewidth=1,
            linestyle=(0, (1, 3)),
            marker="",
            label=f"chance ({chance:g} %)",
        )
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].set_ylabel("converged images (%)")
    panels[1].set_ylim(-3, 103)
    panels[1].set_xlabel(
        "time steps of the free phase\n(converged: relative change over the last "
        f"{WINDOW} steps below {CONVERGED:g} in every layer)"
    )
    whole_ticks(panels[1].xaxis)
    legend_below(figure)
    return figure


@style()
def relaxation(residual, energy, trained_T1=None):
    """The residual and, of a model that has one, the energy over the free steps, of one mini-batch.

    residual, energy: lists with an entry per step; energy: None where there is none; trained_T1:
    the T1 of the training."""
    figure = new_figure(
        "Residual"
        + ("" if energy is None else " and energy")
        + " over the free steps, one mini-batch",
        height=2.9 if energy is None else 4.8,
    )
    steps, curves = (
        np.arange(1, len(residual) + 1),
        [(residual, "relative change in the step", "residual")],
    )
    if energy is not None:
        curves.append((energy, "Phi, mean over the images", "energy"))
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for n, (axes, (values, label, name)) in enumerate(zip(panels, curves)):
        axes.plot(
            steps,
            values,
            f"C{n}" + "o^"[n] + ("-", "--")[n],
            label=f"{name} (last {values[-1]:.3g})",
            **curve_options(n, len(steps)),
        )
        axes.set_ylabel(label)
        if trained_T1 and trained_T1 <= len(steps):
            vertical(axes, trained_T1, f"T1 = {trained_T1} of the training")
    if any(value > 0 for value in residual):
        panels[0].set_yscale("log")
    panels[-1].set_xlabel("time steps of the free phase")
    whole_ticks(panels[-1].xaxis)
    legend_below(figure, 3)
    return figure


@style()
def confusion(counts):
    """How many test images of each class were taken for which. counts: (classes, classes), rows the
    true ones."""
    counts, classes = np.asarray(counts), len(counts)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(
        f"Confusion of {counts.sum()} test images, {100 * np.trace(counts) / max(counts.sum(), 1):.2f} "
        "% correct",
        5.6,
        5.2,
    )
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    picture = axes.imshow(shares, vmin=0, vmax=100, cmap="cividis")
    axes.grid(False)
    if classes <= 20:
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column,
                    row,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="black" if shares[row, column] > 55 else "white",
                )
    figure.colorbar(picture, label="share of the true class (%)", shrink=0.8)
    return figure


@style()
def corruptions(shares, names, means, images):
    """A heat map of the accuracy under each corruption and severity. shares: (corruptions,
    severities), in %; means: over all and over the first 15, fractions, the first None where some
    are missing."""
    figure = new_figure(f"Accuracy under corruption, {images} images each", height=6.8)
    everything = "" if means[0] is None else f"{100 * means[0]:.1f} %, "
    axes = figure.add_subplot(
        xlabel=f"severity\nmean accuracy {everything}over the first 15 "
        f"corruptions {100 * means[1]:.1f} %"
    )
    picture = axes.imshow(shares, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    axes.grid(False)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{share:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if share > 55 else "white",
        )
    axes.set_xticks(range(shares.shape[1]), range(1, shares.shape[1] + 1))
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    if len(names) > 15:  # the others are below a line
        axes.axhline(14.5, color="white", linewidth=3, linestyle="-", marker="")
    figure.colorbar(picture, label="accuracy (%)", shrink=0.6)
    return figure
