"""Figures of gducheck: EP updates compared with BPTT gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiment.plots.style import grid, integer_ticks, legend_below, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

CUMULATIVE = "cumulative estimate"
TIME = "time steps of the nudged phase, and of BPTT from the end"
STYLES: dict[str, dict[str, Any]] = {
    "BPTT": {"linestyle": "-", "marker": "o", "markersize": 3},
    "EP": {"linestyle": "--", "marker": "x", "markersize": 6},
}


@style()
def gdu_entries(
    name: str, bptt: torch.Tensor, ep: torch.Tensor, generator: torch.Generator, shown: int = 5
) -> Figure:
    """Cumulative EP (dashed) and BPTT (solid) over time for random entries of one parameter or
    layer.

    bptt, ep: (T2, *shape), as `energy.gdu.comparable` returns them."""
    figure = new_figure(f"EP compared with BPTT: {_title(name)}", height=4.2)
    xlabel = TIME if len(bptt) > 1 else "sum over the nudged phase"
    axes = figure.add_subplot(xlabel=xlabel, ylabel=CUMULATIVE)
    indices = _draw_entries(axes, bptt, ep, generator, shown)
    entries = [
        _legend_line(f"[{index}]", color=f"C{n}", linestyle="-") for n, index in enumerate(indices)
    ]
    handles = [*_legend_of_methods(), *entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@style()
def gdu_layers(
    bptt: Mapping[str, torch.Tensor],
    ep: Mapping[str, torch.Tensor],
    generator: torch.Generator,
    shown: int = 5,
) -> Figure:
    """`gdu_entries` of all parameters and layers, one panel each. bptt, ep: {name: tensor}."""
    columns = min(3, len(bptt))
    rows = -(-len(bptt) // columns)
    title = "EP compared with BPTT, random entries of each parameter and layer (one colour each)"
    figure = new_figure(title, 2.9 * columns, 1.0 + 2.0 * rows)
    for axes, name in zip(grid(figure, len(bptt), columns), bptt):
        _draw_entries(axes, bptt[name], ep[name], generator, shown)
        axes.set_title(_title(name).replace(" (", "\n("))
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    figure.supylabel(CUMULATIVE)
    handles = _legend_of_methods()
    figure.legend(handles=handles, loc="outside lower center", ncols=2, title=f"over {TIME}")
    return figure


@style()
def gdu_overview(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Relative distance between the summed EP updates and the BPTT gradient, of all parameters and
    layers. rows: of `energy.gdu.compare_gdu`."""
    title = "Distance of the summed EP updates to the BPTT gradient"
    figure = new_figure(title, height=1.6 + 0.28 * len(names))
    xlabel = "||sum of EP - sum of BPTT|| / ||sum of BPTT||, 0.01 is 1 %"
    axes = figure.add_subplot(xlabel=xlabel, xscale="log")
    for n, estimate in enumerate(dict.fromkeys(row["estimate"] for row in rows)):
        distances = {row["name"]: row["distance"] for row in rows if row["estimate"] == estimate}
        axes.plot(
            [distances[name] for name in names],
            range(len(names)),
            "os"[n],
            linestyle="",
            label=estimate,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
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
    axes.axhline(0, color="black", linewidth=0.5, linestyle="-", marker="")
    if len(bptt) == 1:
        axes.set_xticks([1], ["complete"])
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


def _title(name: str) -> str:
    """The name of a parameter, or of `neurons_N` with its layer."""
    if not name.startswith("neurons_"):
        return name
    layer = int(name.removeprefix("neurons_")) + 1
    return f"{name} (layer s_{layer}, BPTT times activation slope)"
