"""Figures of a comparison. A curve is the mean over seeds, its band the standard deviation;
published curves are dashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiment.plots.style import (
    ACCURACY,
    curve_style,
    eps_axis,
    grid,
    integer_ticks,
    legend_below,
    literal,
    new_figure,
    norm_name,
    style,
)
from experiment.results.values import Group, Key, Statistics, own_keys
from experiment.text import format_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS = "mean and standard deviation over runs (hollow: fewer runs)"
Curve = list[tuple[float, Statistics]]  # (x, accuracies in %)


class Variant(NamedTuple):
    """The fields of a `Key` in which values of one attack at one eps differ."""

    grad: str
    steps: str
    detail: str

    def describe(self, attack: str) -> str:
        gradient = "" if self.grad in ("", attack) else gradient_name(self)
        return ", ".join(filter(None, (gradient, self.detail)))


class AttackAtEps(NamedTuple):
    """The fields of a `Key` of one attack whose steps differ."""

    attack: str
    norm: str
    grad: str
    eps: float


def gradient_name(key: Key | Variant) -> str:
    """`bptt@29`: the gradient method and the time steps that it is unrolled through."""
    return f"{key.grad}@{key.steps}" if key.steps else key.grad


def all_figures(groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(file name, function that draws it) of each figure that the groups have values for."""
    own = own_keys(groups)
    for norm in sorted({key.norm for key in own if key.norm}):
        yield f"robustness_{norm}.png", partial(robustness, groups, norm)
    trainings = [_mean_curve([[acc for _, acc in run.epochs] for run in g.runs]) for g in groups]
    if any(trainings):
        caption = "Test accuracy over the training"
        yield "training.png", partial(accuracy_curves, groups, trainings, caption, "epoch")
    over_steps = [_mean_curve([run.characteristic for run in group.runs]) for group in groups]
    if any(curve for group, curve in zip(groups, over_steps) if not group.published):
        caption = "Accuracy over the free steps"
        xlabel = "time steps of the free phase"
        draw = partial(accuracy_curves, groups, over_steps, caption, xlabel)
        yield "characteristic.png", draw
    if any(key.measure == "corruptions" for key in own):
        yield "corruptions.png", partial(corruptions, groups)
    chosen = _attack_with_most_steps(own)
    if chosen:
        yield "attack_steps.png", partial(attack_steps, groups, chosen)


# ---- curves


def _mean_curve(series: Sequence[Sequence[float]]) -> Curve:
    """Statistics of the first, second, ... elements of lists that can differ in length."""
    longest = max(map(len, series), default=0)
    columns = [[values[n] for values in series if n < len(values)] for n in range(longest)]
    return [(n, Statistics.of(column)) for n, column in enumerate(columns, 1)]


def _curve(group: Group, keys: Sequence[Key], x: Callable[[Key], float]) -> Curve:
    """Statistics of the values under some keys over x(key)."""
    points = [(x(key), Statistics.of(group.values(key))) for key in keys]
    return sorted(points, key=lambda point: point[0])


def _eps(key: Key) -> float:
    return key.eps


def _steps(key: Key | Variant) -> int:
    """The largest number of time steps that gradients are unrolled through; 0 if there is none."""
    return max((int(steps) for steps in key.steps.split() if steps.isdigit()), default=0)


def _draw_band(axes: Axes, n: int, curve: Curve, group: Group, label: str = "") -> None:
    """Draw a curve in the n-th colour and marker. Points of fewer runs than others are hollow and
    unconnected: a line to them would mix different sets of runs."""
    look = curve_style(n)
    look["linestyle"] = "--" if group.published else "-"
    most = max(values.n for _, values in curve)
    complete = [(x, values.mean, values.std or 0.0) for x, values in curve if values.n == most]
    partial = [(x, values.mean) for x, values in curve if values.n < most]
    x, mean, std = np.array(complete, dtype=float).T
    spacing = max(1, len(x) // 12)
    axes.plot(
        x,
        mean,
        **look,
        markevery=(n % spacing, spacing),
        linewidth=0.8 if group.published else None,
        fillstyle="none" if group.published else None,
        label=literal(label or group.label),
    )
    axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)
    if partial:
        axes.plot(*zip(*partial), **{**look, "linestyle": ""}, fillstyle="none")


@style()
def accuracy_curves(
    groups: Sequence[Group], curves: Sequence[Curve], caption: str, xlabel: str
) -> Figure:
    """Test accuracy, one curve per group; empty curves are left out."""
    figure = new_figure(f"{caption}: {BANDS}.")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=f"test {ACCURACY}")
    for n, (group, curve) in enumerate(zip(groups, curves)):
        if curve:
            _draw_band(axes, n, curve, group)
    integer_ticks(axes.xaxis)
    legend_below(figure)
    return figure


# ---- attacks


def _variants(group: Group, attack: str, norm: str) -> dict[Variant, list[Key]]:
    """The keys of each variant of one attack, or of the audit, that a group has."""
    measure = "audit" if attack == "audit" else "adversarial"
    found: dict[Variant, list[Key]] = {}
    for key in group.keys():
        if (key.measure, key.attack, key.norm) == (measure, attack, norm) and key.eps > 0:
            found.setdefault(Variant(key.grad, key.steps, key.detail), []).append(key)
    return found


def _comparable_variants(
    groups: Sequence[Group], attack: str, norm: str
) -> list[tuple[Variant | None, list[Key]]]:
    """(variant of the attack to draw, its keys) of each group: a variant that all groups have, if
    there is one. With several: the worst over gradients, then most eps, then most steps."""
    found = [_variants(group, attack, norm) for group in groups]
    own = [set(variants) for g, variants in zip(groups, found) if variants and not g.published]
    shared = set.intersection(*own) if own else set()
    chosen: list[tuple[Variant | None, list[Key]]] = []
    for variants in found:
        candidates = {v: keys for v, keys in variants.items() if v in shared} or variants
        best = max(
            candidates,
            key=lambda v: (v.grad == "worst", len(candidates[v]), _steps(v)),
            default=None,
        )
        chosen.append((best, candidates[best] if best else []))
    return chosen


@style()
def robustness(groups: Sequence[Group], norm: str) -> Figure:
    """Accuracy over eps: one panel per attack, and one for audits."""
    own = [key for key in own_keys(groups) if key.norm == norm]
    attacks = sorted({key.attack for key in own if key.measure == "adversarial"})
    if any(key.measure == "audit" for key in own):
        attacks.append("audit")
    rows = -(-len(attacks) // 2)
    caption = f"Accuracy under attack, {norm_name(norm)} norm: {BANDS}."
    figure = new_figure(caption, columns=1 if len(attacks) == 1 else 2, height=2.4 * rows)
    for axes, attack in zip(grid(figure, len(attacks), 2, sharey=True), attacks):
        own_variants = []
        all_eps: set[float] = set()
        chosen = _comparable_variants(groups, attack, norm)
        for n, (group, (variant, keys)) in enumerate(zip(groups, chosen)):
            if not variant:
                continue
            _draw_band(axes, n, _curve(group, keys, _eps), group)
            all_eps.update(key.eps for key in keys)
            if not group.published:
                own_variants.append(variant.describe(attack))
        descriptions = list(dict.fromkeys(own_variants))
        lines = [attack, *filter(None, descriptions)]
        if len(descriptions) > 1:
            lines.insert(1, "not the same for all:")
        axes.set_title(literal("\n".join(lines)))
        axes.set(ylabel=ACCURACY, ylim=(-2, 102))
        eps_axis(axes, all_eps, norm)
    legend_below(figure)
    return figure


def _attack_with_most_steps(own: Sequence[Key]) -> AttackAtEps | None:
    """The attack that was unrolled through the most different numbers of steps; None if each has
    only one. own: keys of groups that are not published."""
    steps: dict[AttackAtEps, set[str]] = {}
    for key in own:
        if key.measure == "adversarial" and key.steps.isdigit() and key.grad != "worst":
            attacked = AttackAtEps(key.attack, key.norm, key.grad, key.eps)
            steps.setdefault(attacked, set()).add(key.steps)
    best = max(steps, key=lambda attacked: len(steps[attacked]), default=None)
    return best if best and len(steps[best]) > 1 else None


@style()
def attack_steps(groups: Sequence[Group], chosen: AttackAtEps) -> Figure:
    """Accuracy over the time steps that the attack's gradient is unrolled through."""
    attack, norm, grad, eps = chosen
    figure = new_figure(
        f"Accuracy over the unrolled time steps, {attack}, {grad}, {norm_name(norm)} eps "
        f"{format_eps(eps)}: {BANDS}."
    )
    axes = figure.add_subplot(xlabel="time steps of the attack's gradient", ylabel=ACCURACY)
    for n, group in enumerate(groups):
        keys = [
            key
            for key in group.keys()
            if key.measure == "adversarial"
            and (key.attack, key.norm, key.eps) == (attack, norm, eps)
            and key.grad in (grad, "")
            and key.steps.isdigit()
        ]
        if keys:
            _draw_band(axes, n, _curve(group, keys, _steps), group)
    integer_ticks(axes.xaxis)
    legend_below(figure)
    return figure


# ---- corruptions


@style()
def corruptions(groups: Sequence[Group]) -> Figure:
    """Accuracy over the severity of corruptions: the mean over the set that most groups have. The
    label of a group with another set names it; published means are over the rows of their table."""
    sets = [
        list(dict.fromkeys(key.detail for key in group.keys() if key.measure == "corruptions"))
        for group in groups
    ]
    own = [detail for group, found in zip(groups, sets) if not group.published for detail in found]
    chosen = max(own, key=lambda detail: (own.count(detail), detail.startswith("all")))
    figure = new_figure(f"Accuracy under corruption, mean over {chosen}: {BANDS}.")
    axes = figure.add_subplot(xlabel="severity", ylabel=ACCURACY)
    for n, (group, found) in enumerate(zip(groups, sets)):
        detail = chosen if chosen in found else next(iter(found), None)
        keys = [
            key
            for key in group.keys()
            if (key.measure, key.detail) == ("corruptions", detail) and key.eps
        ]
        if keys:
            label = group.label if detail in ("", chosen) else f"{group.label}: {detail}"
            _draw_band(axes, n, _curve(group, keys, _eps), group, label)
    axes.set_xticks(range(1, 6))
    legend_below(figure)
    return figure
