"""What all figures share: one style, axes, labels. Matplotlib is imported when something is
drawn."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from experiment.text import format_eps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Transform

STYLE_FILE = pathlib.Path(__file__).with_name("paper.mplstyle")
WIDTHS = {1: 3.3, 2: 6.9}  # inches of one and of two columns of a page
ACCURACY = "accuracy (%)"
CHARACTERS = 14  # of a label of the legend, for each inch of the figure's width
TICK_WIDTH = 26  # of the label of an eps, in points
TICK_HEIGHT = 9


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save in the style of all figures, as a block or a decorator: Matplotlib's defaults
    and paper.mplstyle, whatever the user's own settings are."""
    import_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_settings()):
        yield


def import_matplotlib() -> None:
    """Import Matplotlib without the user's matplotlibrc and MPLBACKEND.

    Matplotlib reads both while it is imported, and either can make the import fail. It looks for a
    matplotlibrc in the current folder first."""
    if "matplotlib" in sys.modules:
        return
    folder = os.getcwd()
    environment = {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=str(STYLE_FILE))
    try:
        os.chdir(STYLE_FILE.parent)
        import matplotlib  # noqa: F401
    finally:
        for name, value in environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        os.chdir(folder)


@functools.cache
def _settings() -> Any:  # a dict, whose keys Matplotlib's stubs enumerate
    """Every setting of Matplotlib that a figure can depend on."""
    import matplotlib

    ours = matplotlib.rc_params_from_file(STYLE_FILE, use_default_template=False)
    settings = {**matplotlib.rcParamsDefault, **ours}
    del settings["backend"]
    return settings


# ---- figures and panels


def new_figure(caption: str, columns: Literal[1, 2] = 1, height: float = 2.3) -> Figure:
    """An empty figure, as wide as one or two columns of a page; height: in inches, without the
    legend of `legend_below`. It has no title: `save_figure` writes the caption beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTHS[columns], height), layout="constrained")
    figure.set_label(caption)
    return figure


# ---- files


@style()
def save_figure(figure: Figure, path: pathlib.Path, form: str, source: str, creator: str) -> None:
    """Write a figure of `new_figure`, with its caption in the metadata. The same figure is the same
    bytes.

    form: png, pdf or svg; source: what it was measured on; creator: the program, with versions."""
    caption = figure.get_label()
    metadata = {
        "png": {"Title": source, "Description": caption, "Software": creator},
        "pdf": {"Title": source, "Subject": caption, "Creator": creator, "CreationDate": None},
        "svg": {"Title": source, "Description": caption, "Creator": creator, "Date": None},
    }
    figure.savefig(path, format=form, metadata=metadata[form])


def grid(figure: Figure, panels: int, columns: int, **options: Any) -> Sequence[Axes]:
    """Axes for `panels` panels, at most `columns` in a row."""
    rows = -(-panels // columns)
    axes = figure.subplots(rows, min(columns, panels), squeeze=False, **options).flatten()
    for unused in axes[panels:]:
        unused.remove()
    return axes[:panels]


# ---- texts


def literal(text: str) -> str:
    """A text from outside, with `$` escaped, which would start a formula."""
    return text.replace("$", r"\$")


def norm_name(norm: str) -> str:
    """`L-infinity` for "inf", `L2` for "2"."""
    return "L-infinity" if norm == "inf" else f"L{norm}"


# ---- axes


def integer_ticks(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    locator: Any = axis.get_major_locator()  # a MaxNLocator, by default
    locator.set_params(integer=True)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def eps_axis(axes: Axes, values: Collection[float], norm: str) -> None:
    """Make the x axis one of eps, with 0 and the given values as its ticks: logarithmic from the
    smallest positive value on, linear below. Ticks too close to another one have no label."""
    ticks = sorted({0.0, *values})
    high = ticks[-1] or 1.0
    low = ticks[1] if len(ticks) > 1 else high
    decades = math.log10(high / low)
    axes.set_xscale("symlog", linthresh=low, linscale=max(0.3, 0.15 * decades))
    scale = axes.xaxis.get_transform()
    places = scale.transform(ticks)
    margin = 0.04 * (scale.transform([high])[0] or 1)
    left, right = scale.inverted().transform([-margin, places[-1] + margin])
    axes.set_xlim(left, right)

    width = 72 * axes.get_position().width * _figure(axes).get_figwidth()  # roughly
    points = (places - places[0]) * width / max(places[-1] - places[0], 1e-9)
    crowded = bool((np.diff(points) < TICK_WIDTH).any())
    labels = []
    last_labelled = -math.inf
    for value, point in zip(ticks, points):
        fits = point - last_labelled >= TICK_HEIGHT
        labels.append(format_eps(value) if fits else "")
        if fits:
            last_labelled = point
    axes.set_xticks(ticks, labels, rotation=90 if crowded else 0)
    axes.minorticks_off()
    axes.set_xlabel(f"{norm_name(norm)} eps (images in [0, 1])")


# ---- what is drawn


def curve_style(n: int) -> dict[str, Any]:
    """Colour, marker and line style of the n-th curve. Two of the first 63 differ in the first
    two."""
    return {
        "color": f"C{n % 7}",
        "marker": "os^DvPX<>"[n % 9],
        "linestyle": ("-", "--", "-.", ":")[n % 4],
    }


def beside(axes: Axes, n: int, curves: int, distance: float = 2.5) -> Transform:
    """The transform that draws the n-th of some curves beside the others: shifted along x by
    `distance` points from one to the next, whatever the scale, as values often coincide."""
    from matplotlib.transforms import ScaledTranslation

    points = distance * (n - (curves - 1) / 2)
    return axes.transData + ScaledTranslation(points / 72, 0, _figure(axes).dpi_scale_trans)


def marker_spacing(n: int, points: int, dense: int = 20) -> dict[str, Any]:
    """Options of `plot` for the n-th curve: a marker at every point or, on curves of more than
    `dense` points, at a tenth of them, different ones for each curve."""
    spacing = max(points // 10, 1)
    return {"markevery": 1 if points <= dense else (n * spacing // 4 % spacing, spacing)}


def vertical_line(axes: Axes, x: float, label: str | None, linestyle: str = "-") -> None:
    """Draw a vertical line with an entry in the legend."""
    axes.axvline(x, color="0.35", linewidth=0.8, linestyle=linestyle, label=label)


def chance_line(axes: Axes, chance: float | None) -> None:
    """Draw the accuracy of guessing, in %, if it is known."""
    if chance is None:
        return
    label = f"chance ({chance:g} %)"
    axes.axhline(chance, color="0.5", linewidth=0.8, linestyle=(0, (1, 3)), label=label)


def heat_map(
    axes: Axes,
    shares: np.ndarray,
    texts: np.ndarray | None = None,
    aspect: Literal["equal", "auto"] = "equal",
) -> AxesImage:
    """Draw shares in %, (rows, columns), as colours, with the texts of the same shape in the
    cells."""
    image = axes.imshow(shares, vmin=0, vmax=100, aspect=aspect)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if texts is not None:
        for (row, column), text in np.ndenumerate(texts):
            color = "white" if shares[row, column] > 60 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return image


def legend_below(figure: Figure, handles: Sequence[Any] = (), title: str = "") -> None:
    """Add one legend below the panels, where it hides no curve, and make the figure higher by it.

    It has as many columns as fit the width of the figure, and long labels are wrapped. handles:
    those of all panels by default, each label once."""
    entries: dict[str, Any] = {handle.get_label(): handle for handle in handles}
    if not handles:
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                entries.setdefault(label, handle)
    widest = int(CHARACTERS * figure.get_figwidth())
    labels = [textwrap.fill(label, widest) for label in entries]
    for columns in range(min(len(labels), 4), 0, -1):
        legend = figure.legend(
            list(entries.values()),
            labels,
            loc="outside lower center",
            ncols=columns,
            title=title or None,
        )
        extent = legend.get_window_extent()
        if extent.width < 0.98 * figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)
