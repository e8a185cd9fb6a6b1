"""Figures of a training and of its evaluation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from energy.dynamics import CONVERGED, WINDOW
from experiment.plots.style import (
    ACCURACY,
    chance_line,
    grid,
    heat_map,
    integer_ticks,
    legend_below,
    literal,
    marker_spacing,
    new_figure,
    style,
    vertical_line,
)
from experiment.text import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACIES = {
    "train_acc": "train, during the epoch",
    "test_acc": "test, after the epoch",
    "val_acc": "validation, after the epoch",
}
LABELLED_RESUMPTIONS = 5  # the latest ones, which the legend describes
SATURATED = 0.01  # of the activation's range: a neuron this close to an end is saturated
FREE_STEPS = "time steps of the free phase"


@style()
def accuracy(
    rows: Sequence[Mapping[str, float]],
    best_epoch: int | None = None,
    resumptions: Mapping[int, str] | None = None,
    chance: float | None = None,
) -> Figure:
    """Accuracies over the epochs.

    rows: of metrics.csv; best_epoch: of the model in model.pt; resumptions: {epoch: the arguments
    that changed before it}; chance: accuracy of guessing, in %."""
    resumed = sorted((resumptions or {}).items())
    labelled = resumed[-LABELLED_RESUMPTIONS:]
    figure = new_figure("Accuracy over the epochs", height=3.8 + 0.16 * len(labelled))
    axes = figure.add_subplot(xlabel="epoch", ylabel=ACCURACY)
    epochs = [row["epoch"] for row in rows]
    recorded = {column for row in rows for column in row}
    for n, (column, label) in enumerate(ACCURACIES.items()):
        if column in recorded:
            values = [row.get(column, np.nan) for row in rows]
            label = f"{label} (last {values[-1]:.2f} %)"
            axes.plot(epochs, values, label=label, **marker_spacing(n, len(rows)))
    chosen_on = "val_acc" if "val_acc" in recorded else "test_acc"
    for row in rows:
        if row["epoch"] == best_epoch and chosen_on in row:
            axes.plot(
                best_epoch,
                row[chosen_on],
                "*",
                color="black",
                fillstyle="none",
                markersize=12,
                zorder=5,
                label=f"model.pt: epoch {best_epoch} ({row[chosen_on]:.2f} %)",
            )
    for epoch, changes in resumed:
        label = f"resumed before epoch {epoch}" + (f": {literal(changes)}" if changes else "")
        label = textwrap.shorten(label, 90, placeholder="...")
        vertical_line(axes, epoch - 0.5, label if (epoch, changes) in labelled else None, ":")
    chance_line(axes, chance)
    if len(rows) == 1:
        axes.set_xticks(epochs)
    else:
        integer_ticks(axes.xaxis)
    legend_below(figure, 1 if resumed else 2)
    return figure


def saturation(state: torch.Tensor, ends: tuple[float, float]) -> tuple[float, float]:
    """The shares of neurons at the low and at the high end of the activation's range."""
    low, high = ends
    margin = SATURATED * (high - low)
    at_low = (state <= low + margin).float().mean().item()
    at_high = (state >= high - margin).float().mean().item()
    return at_low, at_high


@style()
def activity(
    neurons: Sequence[torch.Tensor],
    ends: tuple[float, float] | None = None,
    linear_output: bool = False,
    has_dynamics: bool = True,
) -> Figure:
    """Histogram of each layer's neurons after the last training batch, with the saturated shares.

    neurons: one tensor (mbs, ...) per layer; ends: of the activation's range, None if it has none;
    linear_output: whether the last layer has no activation; has_dynamics: whether the neurons are
    those at the end of a free phase."""
    columns = min(len(neurons), 4)
    rows = -(-len(neurons) // 4)
    phase = " at the end of the free phase" if has_dynamics else ""
    title = f"Neurons{phase}, last training batch"
    figure = new_figure(title, 2.6 * columns + 0.4, 0.9 + 2.5 * rows)
    panels = grid(figure, len(neurons), columns)
    for n, (axes, state) in enumerate(zip(panels, neurons), 1):
        linear = linear_output and n == len(neurons)
        values = state.detach().float().flatten().cpu()
        low = float(values.min())
        high = float(values.max())
        shape = " x ".join(map(str, state.shape[1:]))
        title = f"s_{n} ({shape})"
        if linear:
            title += "\nno activation"
        elif ends:
            low, high = ends
            at_low, at_high = saturation(values, ends)
            title += f"\nat {low:g}: {100 * at_low:.1f} %, at {high:g}: {100 * at_high:.1f} %"
        axes.set_title(title)
        axes.set_xlabel("activation")
        _histogram(axes, values.numpy(), low, high)
    panels[0].set_ylabel("share of the neurons (%),\nsquare-root scale")
    if ends:
        text = f"at an end: within {100 * SATURATED:g} % of the range of the activation"
        figure.supxlabel(text, fontsize=8)
    return figure


def _histogram(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    """Draw shares in % on a square-root scale, on which a peak at one end does not hide the
    rest."""
    margin = 0.02 * (high - low) if high - low > 1e-3 else 0.5  # all values can be the same
    shares = np.full(len(values), 100 / max(len(values), 1))
    limits = (low - margin, high + margin)
    axes.hist(values, bins=52, range=limits, weights=shares, histtype="stepfilled")
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=5)


def _draw_over_steps(
    panels: Sequence[Axes] | np.ndarray,
    curves: Sequence[tuple[Sequence[float] | np.ndarray, str]],
    trained_T1: int | None,
) -> None:
    """Draw one curve (values, label) per panel over the free steps 1, 2, ..., and mark the T1 of
    the training."""
    for n, (axes, (values, label)) in enumerate(zip(panels, curves)):
        steps = range(1, len(values) + 1)
        line = ("C0o-", "C1^--")[n]
        axes.plot(steps, values, line, label=label, **marker_spacing(n, len(steps)))
        if trained_T1 and trained_T1 <= len(steps):
            vertical_line(axes, trained_T1, f"T1 = {trained_T1} of the training")
    integer_ticks(panels[-1].xaxis)


@style()
def characteristic(
    accuracy: Sequence[float],
    converged: Sequence[float],
    trained_T1: int | None = None,
    chance: float | None = None,
) -> Figure:
    """Accuracy and share of converged images over the number of free steps.

    accuracy, converged: shares after 1, 2, ... steps; trained_T1: T1 of the training; chance:
    accuracy of guessing, in %."""
    figure = new_figure("Accuracy over the number of free steps", height=4.8)
    panels = figure.subplots(2, 1, sharex=True)
    curves = [
        (100 * np.array(shares), f"{name} (last {100 * shares[-1]:.2f} %)")
        for shares, name in ((accuracy, "classified correctly"), (converged, "converged"))
    ]
    _draw_over_steps(panels, curves, trained_T1)
    chance_line(panels[0], chance)
    panels[0].set_ylabel("test accuracy (%)")
    panels[1].set_ylabel("converged images (%)")
    panels[1].set_ylim(-3, 103)
    panels[1].set_xlabel(
        f"t, {FREE_STEPS}\n(converged: relative change over the last min({WINDOW}, t) steps "
        f"below {CONVERGED:g} in every layer)"
    )
    legend_below(figure)
    return figure


@style()
def relaxation(
    residual: Sequence[float], energy: Sequence[float] | None, trained_T1: int | None = None
) -> Figure:
    """Residual and energy of one mini-batch over the free steps.

    residual, energy: values after 1, 2, ... steps; energy: None for vector-field models;
    trained_T1: T1 of the training."""
    curves = [(residual, f"residual (last {residual[-1]:.3g})")]
    ylabels = ["relative change in the step"]
    if energy is not None:
        curves.append((energy, f"energy (last {energy[-1]:.3g})"))
        ylabels.append("Phi, mean over the images")
    names = "Residual" if energy is None else "Residual and energy"
    title = f"{names} over the free steps, one mini-batch"
    figure = new_figure(title, height=1.0 + 1.9 * len(curves))
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    _draw_over_steps(panels, curves, trained_T1)
    for axes, ylabel in zip(panels, ylabels):
        axes.set_ylabel(ylabel)
    if any(value > 0 for value in residual):
        panels[0].set_yscale("log")
    panels[-1].set_xlabel(FREE_STEPS)
    legend_below(figure, 3)
    return figure


@style()
def confusion(counts: np.ndarray) -> Figure:
    """Confusion matrix of the test images. counts: (true classes, predicted classes)."""
    classes = len(counts)
    total = int(counts.sum())
    correct = 100 * np.trace(counts) / max(total, 1)
    title = f"Confusion matrix of {count(total, 'test image')}, {correct:.2f} % correct"
    figure = new_figure(title, 5.6, 5.2)
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = None
    if classes <= 20:
        texts = np.where(counts > 0, counts.astype(str), "")
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
    image = heat_map(axes, shares, texts, fontsize=7)
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    return figure
