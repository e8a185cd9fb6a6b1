"""Figures of gducheck: EP updates compared with BPTT gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiment.plots.style import (
    curve_style,
    grid,
    integer_ticks,
    label_outer,
    legend_below,
    log_axis,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

NEURONS = "neurons_"  # begins the names of layers
CUMULATIVE = "cumulative estimate"
TIME = "time step"
SUM = "sum over all time steps"  # of the read-out, whose updates have no steps
SOLID_AND_DASHED = (
    "EP (dashed) and BPTT (solid): cumulative estimates of random entries, one colour each, over "
    "the time steps of the nudged phase, and of BPTT from the end"
)
STYLES: dict[str, dict[str, Any]] = {
    "BPTT": {"linestyle": "-", "marker": "o", "markersize": 2.5},
    "EP": {"linestyle": "--", "marker": "x", "markersize": 5},
}


@style()
def gdu_entries(
    name: str, bptt: torch.Tensor, ep: torch.Tensor, generator: torch.Generator, shown: int = 5
) -> Figure:
    """Cumulative EP (dashed) and BPTT (solid) over time for random entries of one parameter or
    layer.

    bptt, ep: (T2, *shape), as `energy.gdu.comparable` returns them."""
    figure = new_figure(f"{SOLID_AND_DASHED}; {_describe(name)}.")
    axes = figure.add_subplot(
        title=_symbol(name), xlabel=TIME if len(bptt) > 1 else SUM, ylabel=CUMULATIVE
    )
    indices = _draw_entries(axes, bptt, ep, generator, shown)
    entries = [
        _legend_line(f"[{index}]", color=f"C{n}", linestyle="-") for n, index in enumerate(indices)
    ]
    legend_below(figure, [*_legend_of_methods(), *entries])
    return figure


@style()
def gdu_layers(
    bptt: Mapping[str, torch.Tensor],
    ep: Mapping[str, torch.Tensor],
    generator: torch.Generator,
    shown: int = 5,
) -> Figure:
    """`gdu_entries` of all parameters and layers, one panel each. bptt, ep: {name: tensor}."""
    rows = -(-len(bptt) // 4)
    layers = "; ".join(_describe(name) for name in bptt if name.startswith(NEURONS))
    caption = f"{SOLID_AND_DASHED}; {layers}." if layers else f"{SOLID_AND_DASHED}."
    figure = new_figure(caption, columns=2, height=0.3 + 1.3 * rows)
    panels = grid(figure, len(bptt), 4)
    for axes, name in zip(panels, bptt):
        _draw_entries(axes, bptt[name], ep[name], generator, shown)
        axes.set_title(_symbol(name), y=1, pad=11)  # above the power of ten of the y axis
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    label_outer(panels, TIME, CUMULATIVE)
    for axes, estimate in zip(panels, bptt.values()):
        if len(estimate) == 1:
            axes.set_xlabel(SUM)
    legend_below(figure, _legend_of_methods())
    return figure


@style()
def gdu_overview(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative distance between the summed EP updates and the BPTT gradient, of all parameters and
    layers. rows: of `energy.gdu.compare_gdu`."""
    figure = new_figure(
        "Relative distance of the summed EP updates to the BPTT gradient, "
        "||sum of EP - sum of BPTT|| / ||sum of BPTT||; 0.01 is 1 %.",
        height=0.4 + 0.16 * len(names),
    )
    axes = figure.add_subplot(xlabel="relative distance")
    for n, estimate in enumerate(dict.fromkeys(row["estimate"] for row in rows)):
        distances = {row["name"]: row["distance"] for row in rows if row["estimate"] == estimate}
        axes.plot(
            [distances[name] for name in names],
            range(len(names)),
            label=estimate,
            **{**curve_style(n), "linestyle": ""},
        )
    log_axis(axes, "x")
    axes.set_yticks(range(len(names)), list(map(_symbol, names)))
    axes.set_ylim(len(names) - 0.5, -0.5)
    legend_below(figure)
    return figure


def _draw_entries(
    axes: Axes, bptt: torch.Tensor, ep: torch.Tensor, generator: torch.Generator, shown: int
) -> list[str]:
    """Draw up to `shown` random entries of the cumulative estimates, one colour each. Returns their
    indices as text."""
    bptt = bptt.cpu()
    ep = ep.cpu()
    nonzero = bptt.flatten(1).abs().sum(0).nonzero().flatten()
    candidates = nonzero if len(nonzero) else torch.arange(bptt[0].numel())
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:shown]].tolist()
    time = range(1, len(bptt) + 1)
    for n, entry in enumerate(chosen):
        for method, estimate in (("BPTT", bptt), ("EP", ep)):
            options = dict(STYLES[method])
            if len(bptt) > 20:
                options["marker"] = ""
            axes.plot(time, estimate.flatten(1)[:, entry].cumsum(0), color=f"C{n}", **options)
    axes.axhline(0, color="black", linewidth=0.5)
    if len(bptt) == 1:
        axes.set_xticks([])
    else:
        integer_ticks(axes.xaxis)
    shape = bptt.shape[1:]
    return [", ".join(map(str, np.unravel_index(entry, shape))) for entry in chosen]


def _legend_line(label: str, **options: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"marker": "", **options})


def _legend_of_methods() -> list[Line2D]:
    return [
        _legend_line(method, color="black", linestyle=style["linestyle"], marker=style["marker"])
        for method, style in STYLES.items()
    ]


def _symbol(name: str) -> str:
    """The name of a parameter; s_1, s_2 ... for the layers neurons_0, neurons_1 ..."""
    if not name.startswith(NEURONS):
        return name
    return f"$s_{{{int(name.removeprefix(NEURONS)) + 1}}}$"


def _describe(name: str) -> str:
    """A parameter or layer, for a caption."""
    if not name.startswith(NEURONS):
        return name
    layer = int(name.removeprefix(NEURONS)) + 1
    return f"s_{layer} is {name}, BPTT times the slope of the activation"
