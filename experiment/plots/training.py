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
    curve_style,
    grid,
    heat_map,
    integer_ticks,
    label_outer,
    legend_below,
    log_axis,
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
    "train_acc": "train",
    "test_acc": "test",
    "val_acc": "validation",
}
NAMED_RESUMPTIONS = 5  # the latest ones, which the caption describes
SATURATED = 0.01  # of the activation's range: a neuron this close to an end is saturated
MOST_CLASSES = 20  # whose names and shares fit into a confusion matrix


@style()
def accuracy(
    rows: Sequence[Mapping[str, float]],
    best_epoch: int | None = None,
    resumptions: Mapping[int, str] | None = None,
    chance: float | None = None,
    adversarial: bool = False,
) -> Figure:
    """Accuracies over the epochs.

    rows: of metrics.csv; best_epoch: of the model in model.pt; resumptions: {epoch: the arguments
    that changed before it}; chance: accuracy of guessing, in %; adversarial: whether the train
    accuracies are those of adversarial training."""
    resumed = sorted((resumptions or {}).items())
    figure = new_figure(
        "Accuracy over the epochs; train: during the epoch, others: after it. Legend: last values."
        + (" Train accuracies are those on adversarial examples." if adversarial else "")
        + (f" Star: epoch {best_epoch}, of model.pt." if best_epoch else "")
        + _describe_resumptions(resumed)
    )
    axes = figure.add_subplot(xlabel="epoch", ylabel=ACCURACY)
    epochs = [row["epoch"] for row in rows]
    recorded = {column for row in rows for column in row}
    for n, (column, label) in enumerate(ACCURACIES.items()):
        if column in recorded:
            values = [row.get(column, np.nan) for row in rows]
            if adversarial and column == "train_acc":
                label = "train (adversarial)"
            label = f"{label} {values[-1]:.2f} %"
            axes.plot(epochs, values, label=label, **curve_style(n), **marker_spacing(n, len(rows)))
    chosen_on = "val_acc" if "val_acc" in recorded else "test_acc"
    for row in rows:
        if row["epoch"] == best_epoch and chosen_on in row:
            axes.plot(
                best_epoch,
                row[chosen_on],
                "*",
                color="black",
                fillstyle="none",
                markersize=10,
                zorder=5,
                label=f"model.pt {row[chosen_on]:.2f} %",
            )
    for n, (epoch, _) in enumerate(resumed):
        vertical_line(axes, epoch - 0.5, None if n else "resumed")
    chance_line(axes, chance)
    if len(rows) == 1:
        axes.set_xticks(epochs)
    else:
        integer_ticks(axes.xaxis)
    legend_below(figure)
    return figure


def _describe_resumptions(resumed: Sequence[tuple[int, str]]) -> str:
    """Sentences for the caption. resumed: (epoch, the arguments that changed before it)."""
    text = ""
    for epoch, changes in resumed[-NAMED_RESUMPTIONS:]:
        described = f"resumed before epoch {epoch}" + (f": {changes}" if changes else "")
        text += f" Vertical line: {textwrap.shorten(described, 120, placeholder='...')}."
    return text


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
    phase = " at the end of the free phase" if has_dynamics else ""
    caption = f"Neurons of each layer{phase}, last training batch; square-root scale."
    if ends:
        caption += (
            f" Above each layer, the shares of saturated ones: within {100 * SATURATED:g} % of the "
            "activation's range from one of its ends."
        )
    layers = len(neurons)
    rows = -(-layers // 4)
    figure = new_figure(caption, columns=1 if layers < 3 else 2, height=0.2 + 1.6 * rows)
    panels = grid(figure, layers, 4)
    for n, (axes, state) in enumerate(zip(panels, neurons), 1):
        values = state.detach().float().flatten().cpu()
        low = float(values.min())
        high = float(values.max())
        title = f"$s_{{{n}}}$ ({'×'.join(map(str, state.shape[1:]))})"
        if linear_output and n == layers:
            title += "\nno activation"
        elif ends:
            low, high = ends
            at_low, at_high = saturation(values, ends)
            title += f"\n{100 * at_low:.1f} % at {low:g}, {100 * at_high:.1f} % at {high:g}"
        axes.set_title(title)
        _histogram(axes, values.numpy(), low, high)
    label_outer(panels, "activation", "neurons (%)")
    return figure


def _histogram(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    """Draw shares in % on a square-root scale, on which a peak at one end does not hide the rest.
    The bins end at `low` and `high`."""
    if high - low < 1e-3:  # all values can be the same
        low -= 0.5
        high += 0.5
    shares = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(values, bins=40, range=(low, high), weights=shares, histtype="stepfilled")
    margin = 0.02 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=5)


def _draw_over_steps(
    axes: Axes, n: int, values: Sequence[float] | np.ndarray, label: str, trained_T1: int | None
) -> None:
    """Draw the n-th curve over the free steps 1, 2, ..., and mark the T1 of the training."""
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, label=label, **curve_style(n), **marker_spacing(n, len(steps)))
    if trained_T1 and trained_T1 <= len(steps):
        vertical_line(axes, trained_T1, f"T1 = {trained_T1} (training)")
    integer_ticks(axes.xaxis)


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
    figure = new_figure(
        "Test accuracy and share of converged images over the time steps t of the free phase. "
        f"Converged: relative change over the last min({WINDOW}, t) steps below {CONVERGED:g} in "
        "every layer. Legend: last values.",
        height=2.9,
    )
    above, below = figure.subplots(2, 1, sharex=True)
    curves = (("accuracy", accuracy, above), ("converged", converged, below))
    for n, (name, shares, axes) in enumerate(curves):
        label = f"{name} {100 * shares[-1]:.2f} %"
        _draw_over_steps(axes, n, 100 * np.array(shares), label, trained_T1)
    chance_line(above, chance)
    above.set_ylabel(ACCURACY)
    below.set_ylabel("converged (%)")
    below.set_ylim(-4, 104)
    below.set_xlabel("time steps t of the free phase")
    legend_below(figure)
    return figure


@style()
def relaxation(
    residual: Sequence[float], energy: Sequence[float] | None, trained_T1: int | None = None
) -> Figure:
    """Residual and energy of one mini-batch over the free steps.

    residual, energy: values after 1, 2, ... steps; energy: None for vector-field models;
    trained_T1: T1 of the training."""
    curves = [("residual", residual)]
    caption = "Residual (relative change in each step)"
    if energy is not None:
        curves.append(("energy $\\Phi$", energy))
        caption += " and energy Phi (it rises, as the neurons follow its gradient)"
    figure = new_figure(
        f"{caption} over the time steps of the free phase, means over one mini-batch. Legend: "
        "last values.",
        height=0.6 + 1.15 * len(curves),
    )
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for n, (axes, (name, values)) in enumerate(zip(panels, curves)):
        _draw_over_steps(axes, n, values, f"{name} {values[-1]:.4g}", trained_T1)
        axes.set_ylabel(name)
    if any(value > 0 for value in residual):
        log_axis(panels[0], "y")
    panels[-1].set_xlabel("time steps of the free phase")
    legend_below(figure)
    return figure


@style()
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix of the test images. counts: (true classes, predicted classes); names: of the
    classes."""
    classes = len(counts)
    total = int(counts.sum())
    correct = 100 * np.trace(counts) / max(total, 1)
    caption = (
        f"Confusion matrix of {count(total, 'test image')}, {correct:.2f} % correct: predictions "
        "in % of the true class"
    )
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if classes > MOST_CLASSES:
        figure = new_figure(f"{caption}.", height=2.8)
        axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
        image = heat_map(axes, shares)
        figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
        return figure
    figure = new_figure(f"{caption} (below 0.5 %: empty).", height=3.1)
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    texts = np.where(shares >= 0.5, np.char.mod("%.0f", shares), "")
    heat_map(axes, shares, texts)
    rotation = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(classes), names, rotation=rotation)
    axes.set_yticks(range(classes), names)
    return figure
