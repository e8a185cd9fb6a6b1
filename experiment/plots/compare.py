"""The figures of a comparison: functions from groups of runs to Matplotlib figures. A curve is a
mean over seeds, its band the standard deviation; published ones are dashed."""

import statistics

import numpy as np

from experiment.plots.style import (
    COLUMN,
    eps_name,
    grid,
    legend_below,
    new_figure,
    plain,
    style,
    ticks_at,
    whole_ticks,
)

ACCURACY = "accuracy (%)"


def all_figures(groups):
    """(file name, function, its arguments ...) of each figure for which the groups have data.
    groups: of `compare.Group`."""
    norms = sorted(
        {key.norm for group in groups if not group.published for key in group.keys() if key.norm}
    )
    yield from ((f"robustness_{norm}.png", robustness, groups, norm) for norm in norms)
    trained = [
        (group, _by_place([[accuracy for _, accuracy in run.epochs] for run in group.runs]))
        for group in groups
    ]
    if any(curve for _, curve in trained):
        yield "training.png", _over, trained, "Test accuracy over the training", "epoch"
    settled = [(group, _by_place([run.settling for run in group.runs])) for group in groups]
    if any(curve for group, curve in settled if not group.published):
        yield (
            "characteristic.png",
            _over,
            settled,
            "Accuracy over the free steps",
            "time steps of the free phase",
        )
    if any(
        key.measure == "corruptions"
        for group in groups
        if not group.published
        for key in group.keys()
    ):
        yield "corruptions.png", corruptions, groups
    chosen = _attack_of_most_steps(groups)
    if chosen:
        yield "attack_steps.png", attack_steps, groups, chosen


def _band(axes, n, curve, group, label=None):
    """Draws [(x, mean, standard deviation, number of runs)] in the n-th look; hollow where there
    are fewer runs than elsewhere, without a line to them, which would be a trend of other runs."""
    most, look = max(runs for *_, runs in curve), {"color": f"C{n % 7}", "marker": "os^DvPX"[n % 7]}
    whole = [point[:3] for point in curve if point[3] == most]
    x, mean, std = (np.array(values, dtype=float) for values in zip(*whole))
    every = max(1, len(x) // 12)
    style = (
        {"linestyle": "--", "linewidth": 1, "fillstyle": "none"}
        if group.published
        else {"linestyle": "-"}
    )
    label = plain(label or group.label)
    axes.plot(x, mean, **look, label=label, markevery=(n % every, every), **style)
    axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.15, linewidth=0)
    few = [point[:2] for point in curve if point[3] < most]
    if few:
        axes.plot(*zip(*few), **look, linestyle="", fillstyle="none")


def _by_place(series):
    """[(1, mean, std, number of lists), (2, ...), ...] of lists of numbers."""
    longest = max(map(len, series), default=0)
    columns = [
        [values[place] for values in series if place < len(values)] for place in range(longest)
    ]
    return [
        (
            place,
            statistics.fmean(column),
            statistics.stdev(column) if len(column) > 1 else 0.0,
            len(column),
        )
        for place, column in enumerate(columns, 1)
    ]


def _pooled_curve(group, keys, x):
    """[(x(key), mean, std, number of runs)] of some keys."""
    rows = [(x(key), *group.pooled(key)) for key in keys]
    return sorted((place, mean, std or 0.0, runs) for place, mean, std, runs in rows)


def _steps(key):
    """The largest number of time steps that a gradient went through; 0 of none."""
    return max((int(word) for word in key.steps.split() if word.isdigit()), default=0)


def _variants(group, attack, norm):
    """{(gradient, steps, detail): keys} of the variants of one attack, or of the audit, that a
    group has."""
    found, measure = {}, "audit" if attack == "audit" else "adversarial"
    for key in group.keys():
        if (key.measure, key.attack, key.norm) == (measure, attack, norm) and key.eps > 0:
            found.setdefault((key.grad, key.steps, key.detail), []).append(key)
    return found


def _curves(groups, attack, norm):
    """[(group, variant, accuracy over eps)] under one attack: by the variant that all groups have,
    where there is one, else by each one's own; of several by the worst over gradients, at most eps,
    through the most steps."""
    own = [(group, _variants(group, attack, norm)) for group in groups]
    shared = set.intersection(
        *[set(found) for group, found in own if found and not group.published] or [set()]
    )
    curves = []
    for group, found in own:
        among = {variant: keys for variant, keys in found.items() if variant in shared} or found
        best = max(
            among,
            default=None,
            key=lambda variant: (
                variant[0] == "worst",
                len(among[variant]),
                _steps(among[variant][0]),
            ),
        )
        curves.append(
            (group, best, _pooled_curve(group, among[best], lambda key: key.eps) if best else [])
        )
    return curves


def _said(variant, attack):
    """A variant of an attack in words."""
    grad, steps, detail = variant
    through = f"{grad}{f'@{steps}' if steps else ''}" * (grad not in ("", attack))
    return ", ".join(filter(None, (through, detail)))


@style()
def robustness(groups, norm):
    """Accuracy over eps: a panel for each attack, and one for the audits."""
    own = [
        key for group in groups if not group.published for key in group.keys() if key.norm == norm
    ]
    attacks = sorted({key.attack for key in own if key.measure == "adversarial"})
    panels = [*attacks, *(["audit"] if any(key.measure == "audit" for key in own) else [])]
    figure = new_figure(
        f"Accuracy under attack, {'L-infinity' if norm == 'inf' else 'L2'} norm\nmean and standard "
        "deviation over runs (hollow: of fewer runs)",
        COLUMN,
        3 * -(-len(panels) // 2) + 0.15 * len(groups) + 0.8,
    )
    for axes, attack in zip(grid(figure, len(panels), 2, sharey=True), panels):
        curves = _curves(groups, attack, norm)
        for n, (group, _, curve) in enumerate(curves):
            if curve:
                _band(axes, n, curve, group)
        variants = list(
            dict.fromkeys(
                _said(variant, attack)
                for group, variant, curve in curves
                if curve and not group.published
            )
        )
        axes.set(xlabel="eps, images in [0, 1]", ylabel=ACCURACY, xscale="log", ylim=(-2, 102))
        title = [attack, *["not the same for all:"] * (len(variants) > 1), *filter(None, variants)]
        axes.set_title(plain("\n".join(title)), fontsize=8)
        bounds = sorted({eps for line in axes.get_lines() for eps in line.get_xdata()})
        if bounds:
            ticks_at(axes, bounds, [eps_name(eps, norm) for eps in bounds])
    legend_below(figure, 1 if len(groups) > 6 else 2)
    return figure


@style()
def _over(curves, title, xlabel):
    figure = new_figure(title, height=3.6 + 0.1 * len(curves))
    axes = figure.add_subplot(xlabel=xlabel, ylabel="test " + ACCURACY)
    for n, (group, curve) in enumerate(curves):
        if curve:
            _band(axes, n, curve, group)
    whole_ticks(axes.xaxis)
    legend_below(figure)
    return figure


@style()
def corruptions(groups):
    """Accuracy over the severity of corruptions: means over those that most groups have; where a
    group has others its label names them. Published means are over the rows of their table."""
    found = [
        {key.detail: None for key in group.keys() if key.measure == "corruptions"}
        for group in groups
    ]
    own = [
        detail for group, details in zip(groups, found) if not group.published for detail in details
    ]
    chosen = max(own, key=lambda detail: (own.count(detail), detail.startswith("all")))
    figure = new_figure(
        f"Accuracy under corruption, mean over {chosen}", height=3.6 + 0.1 * len(groups)
    )
    axes = figure.add_subplot(xlabel="severity", ylabel=ACCURACY)
    for n, (group, details) in enumerate(zip(groups, found)):
        detail = chosen if chosen in details else next(iter(details), None)
        keys = [
            key
            for key in group.keys()
            if (key.measure, key.detail) == ("corruptions", detail) and key.eps
        ]
        if keys:
            label = group.label + f": {detail}" * (detail not in ("", chosen))
            _band(axes, n, _pooled_curve(group, keys, lambda key: key.eps), group, label)
    axes.set_xticks(range(1, 6))
    legend_below(figure)
    return figure


def _attack_of_most_steps(groups):
    """(attack, norm, grad, eps) that the groups were attacked with through the most numbers of
    steps; None where it is one number."""
    found = {}
    for group in groups:
        for key in group.keys():
            if (
                key.measure == "adversarial"
                and key.steps.isdigit()
                and not group.published
                and key.grad != "worst"
            ):
                found.setdefault((key.attack, key.norm, key.grad, key.eps), set()).add(key.steps)
    best = max(found, key=lambda name: len(found[name]), default=None)
    return best if best and len(found[best]) > 1 else None


@style()
def attack_steps(groups, chosen):
    """Accuracy over the time steps that the attack's gradient goes through. chosen: (attack, norm,
    grad, eps)."""
    attack, norm, grad, eps = chosen
    attacked = plain(f"{attack}, {grad}")
    figure = new_figure(
        f"Accuracy over the steps attacked through: {attacked}, "
        f"{'L-infinity' if norm == 'inf' else 'L2'} eps {eps:g}",
        height=3.6 + 0.1 * len(groups),
    )
    axes = figure.add_subplot(xlabel="time steps of the attack's gradient", ylabel=ACCURACY)
    for n, group in enumerate(groups):
        keys = [
            key
            for key in group.keys()
            if (key.measure, key.attack, key.norm, key.eps) == ("adversarial", attack, norm, eps)
            and key.steps.isdigit()
            and key.grad in (grad, "")
        ]
        if keys:
            _band(axes, n, _pooled_curve(group, keys, _steps), group)
    whole_ticks(axes.xaxis)
    legend_below(figure)
    return figure
