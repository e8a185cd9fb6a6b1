"""Figures of robustness: attacks, audits, corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiment.plots.style import (
    ACCURACY,
    IMAGE_EPS,
    chance_line,
    eps_label,
    eps_ticks,
    heat_map,
    integer_ticks,
    legend_below,
    new_figure,
    norm_name,
    style,
)
from experiment.text import count
from metrics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    figure = new_figure(
        f"Accuracy under attack: {attack}, {norm_name(norm)} norm, {count(images, 'image')}"
    )
    axes = figure.add_subplot(
        xlabel=f"{norm_name(norm)} {IMAGE_EPS}", ylabel=ACCURACY, xscale="log", ylim=(-2, 102)
    )
    low, high = (100 * share for share in wilson(clean, images))
    axes.axhspan(low, high, color="0.8", alpha=0.5, linewidth=0)
    label = f"clean ({100 * clean:.2f} %)"
    axes.axhline(100 * clean, color="black", linewidth=1, linestyle="-", marker="", label=label)
    chance_line(axes, None if chance is None else 100 * chance)
    rows = [row for row in rows if float(row["eps"]) > 0]
    grads = list(dict.fromkeys(row["grad"] for row in rows))
    for n, grad in enumerate(grads):
        own = [row for row in rows if row["grad"] == grad]
        masked = any(float(row["masked"]) > 0.01 for row in own)
        eps = np.array([float(row["eps"]) for row in own])
        shares = np.array([float(row["adversarial"]) for row in own])
        intervals = np.array([wilson(share, images) for share in shares])
        axes.errorbar(
            eps * 1.012 ** (n - (len(grads) - 1) / 2),  # side by side, as curves often coincide
            100 * shares,
            100 * np.abs(intervals.T - shares),
            color=f"C{n}",
            marker="os^Dv"[n % 5],
            linestyle=("-", "--", "-.", ":")[n % 4],
            label=f"{grad}, an upper bound: gradients vanish" if masked else grad,
        )
    if rows:
        eps_ticks(axes, list({float(row["eps"]) for row in rows}), norm)
    title = f"bars and band: 95 % intervals (Wilson) for {count(images, 'image')}"
    legend_below(figure, 3, title=title)
    return figure


@style()
def adversarial_examples(
    images: np.ndarray,
    labels: np.ndarray,
    clean: np.ndarray,
    result: Mapping[str, Any],
    title: str,
    shown: int = 6,
) -> Figure:
    """Some adversarial examples, misclassified ones first; rows: image, change, adversarial
    example.

    images: (n, C, H, W) in [0, 1]; labels: (n,); clean: (n,) bool, whether the image is classified
    correctly; result: of `model_utils.attack`. The change is the mean over the channels, on one
    scale for all images."""
    chosen, selection = _choose_examples(clean & ~result["correct"], shown)
    changes = (result["x_adv"] - images)[chosen].mean(1)
    scale = np.abs(changes).max(initial=0.0) or 1.0
    figure = new_figure(title, 1.15 * len(chosen) + 1.6, 4.4)
    panels = figure.subplots(3, len(chosen), squeeze=False)
    for (above, middle, below), i, change in zip(panels.T, chosen, changes):
        _show_image(above, images[i])
        above.set_title(f"true {labels[i]}\n" + ("correct" if clean[i] else "misclassified"))
        drawn = middle.imshow(change, cmap="PuOr", vmin=-scale, vmax=scale)
        _show_image(below, result["x_adv"][i])
        below.set_title(f"predicted {result['prediction'][i]}")
    for axes in panels.flat:
        axes.title.set_fontsize(8)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for axes, name in zip(panels[:, 0], ("image", "change", "adversarial\nexample")):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    label = "change, mean of\nthe colours" if images.shape[1] > 1 else "change"
    figure.colorbar(drawn, ax=list(panels[1]), label=label, shrink=0.9)
    figure.supxlabel(selection, fontsize=8)
    return figure


def _choose_examples(fooled: np.ndarray, shown: int) -> tuple[np.ndarray, str]:
    """The indices of the images to show, and how they were chosen. fooled: (n,) bool, whether the
    attack changed a correct prediction."""
    chosen = np.argsort(~fooled, kind="stable")[:shown]
    examples = f"{count(int(fooled[chosen].sum()), 'test image')} misclassified only under attack"
    if fooled[chosen].all():
        return chosen, f"Shown: the first {examples}."
    return chosen, f"Shown: all {examples}, then the first others."


def _show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw an image (C, H, W) with values in [0, 1], grey or in colour."""
    pixels = np.clip(image, 0, 1).transpose(1, 2, 0).squeeze()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)


@style()
def audit(result: Mapping[str, Any], title: str) -> Figure:
    """Robust images after each attack of an audit, and accuracy over eps. result: the audit's
    JSON."""
    images = result["images"]
    robust = 100 * result["robust"]
    verdict = "trusted" if result["trusted"] else "not trusted, an upper bound"
    height = max(3.8, 1.6 + 0.16 * len(result["attacks"]))
    figure = new_figure(f"{title}: {robust:.1f} %, {verdict}", 9, height)
    left, right = figure.subplots(1, 2)

    names = ["clean", *(f"{attack['stage']} {attack['name']}" for attack in result["attacks"])]
    clean = round(result["clean"] * images)
    counts = [clean, *(attack["standing"] for attack in result["attacks"])]
    left.barh(range(len(names)), counts, height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set_xlabel(f"robust images after the attack, of {images}")
    left.set_xlim(0, max(images, 1))
    integer_ticks(left.xaxis)
    left.invert_yaxis()

    eps, shares = zip(*result["curve"])
    norm = result["settings"]["attack_norm"]
    right.plot(
        eps,
        [100 * share for share in shares],
        clip_on=False,
        label=f"PGD, strongest gradient, {count(result['sample'], 'image')}",
    )
    low, high = (100 * share for share in result["interval"])
    right.errorbar(
        float(result["settings"]["eps"]),
        robust,
        [[robust - low], [high - robust]],
        color="C1",
        linestyle="",
        marker="D",
        capsize=3,
        label=f"all attacks, {count(images, 'image')}, 95 % interval",
    )
    right.set_xscale("symlog", linthresh=max(eps[1], 1e-9) if len(eps) > 1 else 1.0)
    labels = [eps_label(value, norm) if value else "0" for value in eps]
    right.set_xticks(eps, labels, rotation=45)
    right.minorticks_off()
    right.set(xlabel=IMAGE_EPS, ylabel=ACCURACY, ylim=(-2, 104), xlim=(0, None))
    legend_below(figure)
    return figure


@style()
def corruptions(
    shares: np.ndarray, names: Sequence[str], means: tuple[float | None, float], images: int
) -> Figure:
    """Heat map of the accuracy under each corruption and severity.

    shares: (corruptions, severities), in %; means: over all corruptions, None if some are missing,
    and over the first 15, as shares; images: per corruption and severity."""
    title = f"Accuracy under corruption, {count(images, 'image')} each"
    figure = new_figure(title, height=6.8)
    over_all, over_first = means
    mean = "" if over_all is None else f"{100 * over_all:.1f} %, "
    mean += f"over the first 15 corruptions {100 * over_first:.1f} %"
    axes = figure.add_subplot(xlabel=f"severity\nmean accuracy {mean}")
    image = heat_map(axes, shares, np.char.mod("%.1f", shares), aspect="auto")
    axes.set_xticks(range(shares.shape[1]), [str(n + 1) for n in range(shares.shape[1])])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    if len(names) > 15:
        axes.axhline(14.5, color="white", linewidth=3, linestyle="-", marker="")
    figure.colorbar(image, label="accuracy (%)", shrink=0.6)
    return figure
