"""Figures of robustness: attacks, audits, corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.plots.style import (
    ACCURACY,
    beside,
    chance_line,
    curve_style,
    eps_axis,
    heat_map,
    legend_below,
    literal,
    new_figure,
    norm_name,
    style,
)
from experiment.text import count, format_eps
from metrics import MASKED, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {  # of an audit
    "b": "PGD",
    "c": "standard ensemble",
    "d": "without gradients",
    "e": "dynamics",
    "f": "sanity",
}


@style()
def sweep(
    rows: Sequence[Mapping[str, Any]],
    attack: str,
    norm: str,
    images: int,
    clean: float,
    chance: float | None = None,
) -> Figure:
    """Accuracy under attack over eps, one curve per gradient method, with 95 % intervals (Wilson).

    rows: of a `results.attacks.Sweep`; clean, chance: clean accuracy and accuracy of guessing, as
    shares."""
    caption = (
        f"Adversarial accuracy over eps: {attack}, {norm_name(norm)} norm, "
        f"{count(images, 'test image')}, clean accuracy {100 * clean:.2f} % at eps = 0. Bars: 95 % "
        "intervals (Wilson); curves are offset sideways."
    )
    rows = [row for row in rows if float(row["eps"]) > 0]
    grads = list(dict.fromkeys(row["grad"] for row in rows))
    figure = new_figure(caption, columns=2 if len(grads) > 3 else 1, height=2.1)
    axes = figure.add_subplot(ylabel=ACCURACY, ylim=(-3, 103))
    eps_axis(axes, {float(row["eps"]) for row in rows}, norm)
    masked = {row["grad"] for row in rows if float(row["masked"]) > MASKED}
    handles: list[Any] = []
    for n, grad in enumerate(grads):
        own = [row for row in rows if row["grad"] == grad]
        shares = np.array([clean, *(float(row["adversarial"]) for row in own)])
        intervals = np.array([wilson(share, images) for share in shares])
        curve = axes.errorbar(
            [0.0, *(float(row["eps"]) for row in own)],
            100 * shares,
            100 * np.abs(intervals.T - shares),
            transform=beside(axes, n, len(grads)),
            elinewidth=0.7,
            fillstyle="none" if grad in masked else "full",
            label=literal(f"{grad} (upper bound)" if grad in masked else grad),
            **curve_style(n),
        )
        handles.append(curve)
    if not rows:
        handles += axes.plot([0.0], [100 * clean], "o", color="black", label="clean")
    handles += chance_line(axes, None if chance is None else 100 * chance)
    if masked:
        figure.set_label(
            f"{caption} Hollow: an upper bound, as the gradient of more than {100 * MASKED:g} % of "
            "the images vanished."
        )
    legend_below(figure, handles)
    return figure


@style()
def adversarial_examples(
    images: np.ndarray,
    labels: np.ndarray,
    clean: np.ndarray,
    result: Mapping[str, Any],
    caption: str,
    names: Sequence[str],
    shown: int = 7,
) -> Figure:
    """Some adversarial examples, misclassified ones first; rows: image, change, adversarial
    example.

    images: (n, C, H, W) in [0, 1]; labels: (n,); clean: (n,) bool, whether the image is classified
    correctly; result: of `model_utils.attack`; names: of the classes. The change is the mean over
    the channels, on one scale for all images."""
    chosen, selection = _choose_examples(clean & ~result["correct"], shown)
    changes = (result["x_adv"] - images)[chosen].mean(1)
    scale = np.abs(changes).max(initial=0.0) or 1.0
    over = " The change is the mean over the colours." if images.shape[1] > 1 else ""
    figure = new_figure(
        f"{caption}. {selection} Above each image its class, below its adversarial example the "
        f"predicted one (*: misclassified without the attack).{over}",
        columns=2,
        height=3.1,
    )
    panels = figure.subplots(3, shown, squeeze=False)
    for (above, middle, below), i, change in zip(panels.T, chosen, changes):
        _show_image(above, images[i])
        above.set_title(names[labels[i]] + ("" if clean[i] else "*"))
        drawn = middle.imshow(change, cmap="PuOr", vmin=-scale, vmax=scale)
        _show_image(below, result["x_adv"][i])
        below.set_xlabel(names[result["prediction"][i]])
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for axes in panels[:, len(chosen) :].flat:
        axes.remove()
    for axes, name in zip(panels[:, 0], ("image", "change", "adversarial\nexample")):
        axes.set_ylabel(name)
    figure.colorbar(drawn, ax=list(panels[1, : len(chosen)]), pad=0.01, aspect=12)
    return figure


def _choose_examples(fooled: np.ndarray, shown: int) -> tuple[np.ndarray, str]:
    """The indices of the images to show, and how they were chosen. fooled: (n,) bool, whether the
    attack changed a correct prediction."""
    chosen = np.argsort(~fooled, kind="stable")[:shown]
    examples = f"{count(int(fooled[chosen].sum()), 'test image')} misclassified only under attack"
    if fooled[chosen].all():
        return chosen, f"The first {examples}."
    return chosen, f"All {examples}, then the first others."


def _show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image (C, H, W) with values in [0, 1], grey or in colour."""
    pixels = np.clip(image, 0, 1).transpose(1, 2, 0).squeeze()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)


@style()
def audit(result: Mapping[str, Any], budget: str) -> Figure:
    """Robust accuracy after each attack of an audit, and accuracy over eps. result: the audit's
    JSON."""
    images = result["images"]
    clean = 100 * result["clean"]
    robust = 100 * result["robust"]
    low, high = (100 * share for share in result["interval"])
    norm = result["settings"]["attack_norm"]
    eps = float(result["settings"]["eps"])
    verdict = "trusted" if result["trusted"] else "not trusted, an upper bound"
    sample = count(result["sample"], "image")
    figure = new_figure(
        f"Audit ({budget}), {norm_name(norm)} eps {format_eps(eps)}, {count(images, 'image')}: "
        f"robust accuracy {robust:.1f} % ({verdict}; 95 % interval {low:.1f} to {high:.1f} %). "
        "Left: accuracy after each attack, which tries the images that the ones above it left. "
        f"Right: accuracy over eps under PGD with the strongest gradient alone, of the first "
        f"{sample} that are classified correctly, times the clean accuracy.",
        columns=2,
        height=max(2.1, 0.7 + 0.125 * (1 + len(result["attacks"]))),
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
    _draw_attacks(left, result["attacks"], images, clean)

    eps_axis(right, {value for value, _ in result["curve"]}, norm, width=110)
    right.plot(
        [value for value, _ in result["curve"]],
        [clean * share for _, share in result["curve"]],
        label="PGD, strongest gradient",
        transform=beside(right, 0, 2),
        **curve_style(0),
    )
    right.errorbar(
        eps,
        robust,
        [[robust - low], [high - robust]],
        label="all attacks, 95 % interval",
        transform=beside(right, 1, 2),
        **{**curve_style(3), "linestyle": ""},
    )
    right.set(xlabel=f"{norm_name(norm)} eps\n(images in [0, 1])", ylabel=ACCURACY, ylim=(-3, 103))
    legend_below(figure)
    return figure


def _draw_attacks(
    axes: Axes, attacks: Sequence[Mapping[str, Any]], images: int, clean: float
) -> None:
    """Draw the accuracy in % after each attack as bars, in a colour for each stage."""
    accuracies = [clean, *(100 * attack["standing"] / max(images, 1) for attack in attacks)]
    stages = ["clean", *(STAGES.get(attack["stage"], "") for attack in attacks)]
    names = ["clean", *(literal(attack["name"]) for attack in attacks)]
    for n, stage in enumerate(dict.fromkeys(stages)):
        rows = [row for row, own in enumerate(stages) if own == stage]
        bars = axes.barh(
            rows,
            [accuracies[row] for row in rows],
            height=0.75,
            color="0.5" if stage == "clean" else f"C{n - 1}",
            label=stage,
        )
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlim=(0, 112), xlabel=f"{ACCURACY} after the attack", xticks=range(0, 101, 20))
    axes.grid(False, axis="y")


@style()
def corruptions(
    shares: np.ndarray, names: Sequence[str], means: tuple[float | None, float], images: int
) -> Figure:
    """Heat map of the accuracy under each corruption and severity.

    shares: (corruptions, severities), in %; means: over all corruptions, None if some are missing,
    and over the first 15, as shares; images: per corruption and severity."""
    over_all, over_first = means
    caption = f"Accuracy in % under corruption, {count(images, 'test image')} each. Mean"
    if over_all is not None:
        caption += f" over all {len(names)}: {100 * over_all:.2f} %,"
    caption += f" over the first 15: {100 * over_first:.2f} %."
    figure = new_figure(caption, height=0.6 + 0.155 * len(names))
    axes = figure.add_subplot(xlabel="severity")
    heat_map(axes, shares, np.char.mod("%.1f", shares), aspect="auto")
    axes.set_xticks(range(shares.shape[1]), [str(n + 1) for n in range(shares.shape[1])])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    if len(names) > 15:
        axes.axhline(14.5, color="white", linewidth=3)
    return figure
