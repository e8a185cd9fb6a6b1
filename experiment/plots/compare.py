"""Figures of a comparison. A curve is the mean over the seeds of a group; published curves are
dotted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from data_utils import TASKS
from experiment.plots.style import (
    ACCURACY,
    beside,
    chance_line,
    curve_style,
    eps_axis,
    grid,
    integer_ticks,
    legend_below,
    literal,
    marker_spacing,
    new_figure,
    norm_name,
    style,
)
from experiment.results.values import STRONGEST, Cell, Group, Key, own_keys
from experiment.text import format_eps, listed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSE = 20  # points from which on a curve has a band instead of error bars
LINES = ("-", "--", "-.")  # of curves next to each other, which colours do not tell apart in grey


class Point(NamedTuple):
    """The values of a group at one x."""

    x: float
    cell: Cell


Curve = list[Point]


def all_figures(groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """(file name, function that draws it) of each figure that the groups have values for."""
    own = own_keys(groups)
    for norm in sorted({key.norm for key in own if key.norm}):
        yield f"robustness_{norm}.png", partial(robustness, groups, norm)
    measures = {key.measure for key in own}
    if "training" in measures:
        yield "training.png", partial(training, groups)
    if "characteristic" in measures:
        yield "characteristic.png", partial(characteristic, groups)
    if "corruptions" in measures:
        yield "corruptions.png", partial(corruptions, groups)
    unrolled = _most_common(groups, _of_single_steps(own), "steps")
    if unrolled and max(len(_points(group, unrolled, "steps")) for group in groups) > 1:
        yield "attack_steps.png", partial(attack_steps, groups, unrolled)


# ---- curves


def _without(key: Key, field: str) -> Key:
    """The key of a whole curve over `field`, "eps" or "steps"."""
    return key._replace(eps=0.0) if field == "eps" else key._replace(steps="")


def _most_common(groups: Sequence[Group], keys: Iterable[Key], field: str) -> Key | None:
    """The curve over `field` that the most groups have, of the most points; None without keys."""
    curves = {_without(key, field) for key in keys}
    own = [group for group in groups if not group.published]

    def size(curve: Key) -> tuple[int, int, bool]:
        lengths = [len(_points(group, curve, field)) for group in own]
        return sum(map(bool, lengths)), max(lengths), curve.attack == "pgd"

    return max(sorted(curves), key=size, default=None)


def _points(group: Group, curve: Key, field: str) -> Curve:
    """The values of a group on one curve over `field`: all other settings are the same."""
    points = [
        Point(float(getattr(key, field)), cell)
        for key, cell in group.cells.items()
        if _without(key, field) == curve and getattr(key, field) != ""
    ]
    return sorted(points, key=lambda point: point.x)


def _published(group: Group, curve: Key, steps: str | None) -> Curve:
    """The published values of the same measure, attack and norm. steps: that the gradient is
    unrolled through, None for any."""
    return sorted(
        (
            Point(key.eps, cell)
            for key, cell in group.cells.items()
            if group.published
            and (key.measure, key.attack, key.norm) == (curve.measure, curve.attack, curve.norm)
            and key.eps
            and steps in (None, key.steps)
        ),
        key=lambda point: point.x,
    )


def _draw(axes: Axes, n: int, groups: Sequence[Group], curve: Curve) -> None:
    """Draw the curve of the n-th group, if it has points.

    Hollow markers are upper bounds. Points of fewer seeds than others are not connected: a line to
    them would mix different sets of seeds."""
    if not curve:
        return
    group = groups[n]
    look = {**curve_style(n), "linestyle": ":" if group.published else LINES[n % len(LINES)]}
    if group.published:
        look |= {"linewidth": 0.8, "markersize": 2.5}
    most = max(len(point.cell.values) for point in curve)
    complete = [point for point in curve if len(point.cell.values) == most]
    x = np.array([point.x for point in complete])
    mean = np.array([point.cell.statistics.mean for point in complete])
    std = np.array([point.cell.statistics.std or 0.0 for point in complete])
    label = literal(group.label)
    if len(complete) > DENSE:
        axes.plot(x, mean, **look, **marker_spacing(n, len(x)), label=label)
        axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)
        return
    place = beside(axes, n, len(groups))
    errors = std if std.any() else None
    axes.errorbar(x, mean, errors, **look, elinewidth=0.8, transform=place, label=label)
    axes.update_datalim([*zip(x, mean - std), *zip(x, mean + std)])  # which ignores shifted points
    axes.autoscale_view()
    look["linestyle"] = ""
    for point in curve:
        if point not in complete:
            axes.plot(point.x, point.cell.statistics.mean, **look, transform=place)
        if point.cell.is_upper_bound:
            hollow = {**look, "markerfacecolor": "white", "zorder": 3}
            axes.plot(point.x, point.cell.statistics.mean, **hollow, transform=place)


def _caption(
    about: str, groups: Sequence[Group], panels: Sequence[tuple[Key, Sequence[Curve]]]
) -> str:
    """The caption of a figure. panels: what the points of each have in common, and their curves,
    one for each group."""
    sentences = [about]
    drawn = [curve for _, curves in panels for curve in curves if curve]
    seeds = {len(point.cell.values) for curve in drawn for point in curve}
    if max(seeds) > 1:
        bars = "bands" if all(len(curve) > DENSE for curve in drawn) else "bars"
        sentences.append(f"Means over up to {max(seeds)} seeds; {bars}: standard deviation.")
    else:
        sentences.append("One seed each.")
    if any(len({len(point.cell.values) for point in curve}) > 1 for curve in drawn):
        sentences.append("Points that are not connected: fewer seeds.")
    if any(point.cell.is_upper_bound for curve in drawn for point in curve):
        sentences.append("Hollow: an upper bound, as gradients are zero for some images.")
    published = []
    missing = []
    for n, group in enumerate(groups):
        lacking = [
            key.attack
            for key, curves in panels
            if not curves[n] and (not group.published or _published(group, key, None))
        ]
        if any(curves[n] for _, curves in panels):
            published += [group] if group.published else []
            missing += [f"{group.label} (panel {listed(lacking)})"] if lacking else []
        elif lacking:
            missing.append(group.label)
    if published:
        measures = {key.measure for key, _ in panels}
        caveats = [text for group in published for m, text in group.caveats if m in measures]
        sentences += [
            "Thin and dotted: published results, not measured here.",
            *dict.fromkeys(caveats),
        ]
    if missing:
        sentences.append(f"Not drawn, without comparable results: {listed(missing)}.")
    return " ".join(sentences)


def _one_panel(
    groups: Sequence[Group],
    chosen: Key,
    curves: Sequence[Curve],
    about: str,
    xlabel: str,
    ylabel: str = ACCURACY,
) -> Figure:
    """A figure of one column, one curve per group; empty curves are left out. chosen: what all
    points have in common."""
    figure = new_figure(_caption(about, groups, [(chosen, curves)]))
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for n, curve in enumerate(curves):
        _draw(axes, n, groups, curve)
    integer_ticks(axes.xaxis)
    legend_below(figure)
    return figure


def _of_measure(groups: Sequence[Group], measure: str) -> tuple[Key, list[Curve]]:
    """(the curve of a measure that most groups have, its points of each group)."""
    keys = [key for key in own_keys(groups) if key.measure == measure]
    chosen = _most_common(groups, [key for key in keys if key.eps], "eps")
    assert chosen is not None
    curves = [
        _published(group, chosen, None) if group.published else _points(group, chosen, "eps")
        for group in groups
    ]
    return chosen, [[point for point in curve if point.x] for curve in curves]


def _test_images(groups: Sequence[Group]) -> str:
    """How many images trainings are tested on. All of a data set are counted by an evaluation."""
    numbers = set()
    for run in [run for group in groups if not group.published for run in group.runs]:
        data = run.args.get("test_data")
        same = [key.images.number for key in run.values if data == key.images.fingerprint]
        numbers.add(str(run.args.get("test_size") or max(same, default=0) or "all"))
    return " / ".join(sorted(numbers))


@style()
def training(groups: Sequence[Group]) -> Figure:
    """Test accuracy over the epochs."""
    chosen, curves = _of_measure(groups, "training")
    about = f"Accuracy on {_test_images(groups)} test images over the training."
    return _one_panel(groups, chosen, curves, about, "epoch", f"test {ACCURACY}")


@style()
def characteristic(groups: Sequence[Group]) -> Figure:
    """Test accuracy over the free steps."""
    chosen, curves = _of_measure(groups, "characteristic")
    about = f"Test accuracy over the time steps of the free phase ({chosen.detail})."
    xlabel = "time steps of the free phase"
    return _one_panel(groups, chosen, curves, about, xlabel, f"test {ACCURACY}")


@style()
def corruptions(groups: Sequence[Group]) -> Figure:
    """Accuracy over the severity of corruptions: the mean over the set that most groups have."""
    chosen, curves = _of_measure(groups, "corruptions")
    about = f"Accuracy under corruption, mean over {chosen.attack} ({chosen.detail})."
    return _one_panel(groups, chosen, curves, about, "severity")


# ---- attacks


def _clean(group: Group, curve: Curve, key: Key) -> Curve:
    """The point at eps 0: the clean accuracy on the images of a curve, of its seeds. key: of the
    curve."""
    seeds = max((point.cell.values for point in curve), key=len, default={}).keys()
    for other, cell in group.cells.items():
        same = (other.images, other.predicted) == (key.images, key.predicted)
        if other.measure == "clean" and same and seeds and seeds <= cell.values.keys():
            return [Point(0.0, Cell({seed: cell.values[seed] for seed in seeds}))]
    return []


def _under_attack(groups: Sequence[Group], attack: Key) -> list[Curve]:
    """The curves over eps of one attack. Published ones are unrolled through the same steps as one
    of the groups, or of networks without time steps."""
    curves = {n: _points(group, attack, "eps") for n, group in enumerate(groups)}
    methods = {tuple(point.cell.methods) for curve in curves.values() for point in curve}
    for n, group in enumerate(groups):
        if group.published:
            steps = sorted({key.steps for key in group.cells}, reverse=True)
            candidates = [_published(group, attack, number) for number in steps]
            curves[n] = max(
                (
                    points
                    for points in candidates
                    if points and _is_comparable(points[0].cell.methods, methods)
                ),
                key=len,
                default=[],
            )
        elif not any(point.x == 0 for point in curves[n]):
            curves[n] = _clean(group, curves[n], attack) + curves[n]
    return [curves[n] for n in range(len(groups))]


def _is_comparable(published: Sequence[str], own: Collection[tuple[str, ...]]) -> bool:
    return published in ([], ["bptt"]) or tuple(published) in own


@style()
def robustness(groups: Sequence[Group], norm: str) -> Figure:
    """Accuracy over eps: one panel per attack, and one for audits."""
    own = [
        key
        for key in own_keys(groups)
        if key.measure in ("adversarial", "audit")
        and key.norm == norm
        and key.grad in ("", STRONGEST)
    ]
    panels = []
    for attack in sorted({(key.measure, key.attack) for key in own}):
        keys = [key for key in own if (key.measure, key.attack) == attack]
        chosen = _most_common(groups, keys, "eps")
        assert chosen is not None
        panels.append((chosen, _under_attack(groups, chosen)))
    details = [_describe(groups, key, curves) for key, curves in panels]
    about = f"Accuracy under attack, {norm_name(norm)} norm. {'; '.join(details)}."
    if any(len({point.x for curve in curves for point in curve} - {0}) > 1 for _, curves in panels):
        about += " The x axis is linear up to the smallest eps and logarithmic beyond."
    columns: Literal[1, 2] = 1 if len(panels) == 1 else 2
    caption = _caption(about, groups, panels)
    figure = new_figure(caption, columns, 2.2 * -(-len(panels) // 2))
    for axes, (key, curves) in zip(grid(figure, len(panels), 2, sharey=True), panels):
        for n, curve in enumerate(curves):
            _draw(axes, n, groups, curve)
        chance_line(axes, _chance(groups))
        axes.set(ylabel=ACCURACY, ylim=(-2, 102))
        axes.set_title(literal(key.attack))
        eps_axis(axes, {point.x for curve in curves for point in curve}, norm)
    legend_below(figure)
    return figure


def _chance(groups: Sequence[Group]) -> float | None:
    """The accuracy of guessing, in %; None for groups of different or unknown tasks."""
    tasks = {run.args.get("task") for group in groups if not group.published for run in group.runs}
    (task,) = tasks if len(tasks) == 1 else (None,)
    return 100 / TASKS[task].classes if task in TASKS else None


def _describe(groups: Sequence[Group], key: Key, curves: Sequence[Curve]) -> str:
    """The settings of a panel: its budget and images, and the gradient methods of its curves."""
    text = f"{key.attack}: {key.detail}"
    own = [curve for group, curve in zip(groups, curves) if not group.published]
    methods = [", ".join(point.cell.methods) for curve in own for point in curve]
    named = [name for name in dict.fromkeys(methods) if name]
    if key.measure == "audit" or not named:
        return text
    return f"{text}, {'gradient' if len(named) == 1 else 'gradients'} {' / '.join(named)}"


def _of_single_steps(keys: Iterable[Key]) -> list[Key]:
    """The keys of attacks whose gradient is unrolled through one number of steps."""
    return [
        key
        for key in keys
        if key.measure == "adversarial" and key.steps.isdecimal() and key.grad != STRONGEST
    ]


@style()
def attack_steps(groups: Sequence[Group], chosen: Key) -> Figure:
    """Accuracy over the time steps that the attack's gradient is unrolled through. chosen: what all
    points have in common."""
    curves = []
    for group in groups:
        curve = _points(group, chosen, "steps")
        if group.published and chosen.grad == "bptt":
            curve = [
                Point(float(key.steps), cell)
                for key, cell in group.cells.items()
                if (key.measure, key.attack, key.norm, key.eps)
                == (chosen.measure, chosen.attack, chosen.norm, chosen.eps)
                and key.steps
            ]
            curve.sort(key=lambda point: point.x)
        curves.append(curve)
    about = (
        f"Accuracy over the time steps that the gradient {chosen.grad} is unrolled through: "
        f"{chosen.attack}, {norm_name(chosen.norm)} eps {format_eps(chosen.eps)}, {chosen.detail}."
    )
    xlabel = "time steps of the attack's gradient"
    figure = _one_panel(groups, chosen, curves, about, xlabel)
    figure.axes[0].set_ylim(-2, 102)
    return figure
