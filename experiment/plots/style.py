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
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Transform

STYLE_FILE = pathlib.Path(__file__).with_name("paper.mplstyle")
WIDTHS = {1: 3.3, 2: 6.9}  # inches of one and of two columns of a page
ACCURACY = "accuracy (%)"
# (columns of a legend, most characters in a line of its labels for each inch of the figure's
# width): the first that fits is drawn; the last does with the widest letters
LEGENDS = ((6, 14), (5, 14), (4, 14), (3, 14), (2, 14), (1, 14), (1, 7))
CHARACTER = 4.6  # width of a character of a tick label, in points


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
    columns = -(-panels // rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for unused in axes[panels:]:
        unused.remove()
    return axes[:panels]


def label_outer(panels: Sequence[Axes], xlabel: str, ylabel: str) -> None:
    """Label the x axes of the lowest panels of a `grid`, and the y axes of the leftmost ones."""
    specification = panels[0].get_subplotspec()
    assert specification is not None
    columns = specification.get_gridspec().ncols
    for axes in panels[-columns:]:
        axes.set_xlabel(xlabel)
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel)


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


def log_axis(axes: Axes, name: Literal["x", "y"]) -> None:
    """Make an axis with its curves logarithmic, from one power of ten to another. These alone are
    labelled."""
    axes.set(**{f"{name}scale": "log"})
    low, high = getattr(axes, f"get_{name}lim")()
    ends = (10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high)))
    axes.set(**{f"{name}lim": ends})
    axes.tick_params(axis=name, which="minor", labelbottom=False, labelleft=False)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _eps_label(eps: float) -> str:
    text = format_eps(eps)
    return text if len(text) <= len("128/255") else f"{eps:.2g}"


def eps_axis(axes: Axes, values: Collection[float], norm: str, width: float | None = None) -> None:
    """Make the x axis one of eps, with 0 and the given values as its ticks: logarithmic from the
    smallest positive value on, linear below. A tick whose label does not fit beside the one on its
    left has none.

    width: of the axes in points, roughly; by default that of a panel with short labels."""
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

    if width is None:
        width = 72 * axes.get_position().width * _figure(axes).get_figwidth()
    points = (places - places[0]) * width / max(places[-1] - places[0], 1e-9)
    labels = [_eps_label(value) for value in ticks]
    end = -math.inf  # of the last label that is written
    for n, (point, label) in enumerate(zip(points, labels)):
        half = CHARACTER * len(label) / 2
        if point - half < end + 2:
            labels[n] = ""
        else:
            end = point + half
    axes.set_xticks(ticks, labels)
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


def beside(axes: Axes, n: int, curves: int) -> Transform:
    """The transform that draws the n-th of some curves beside the others, as values often coincide:
    shifted along x by some points, whatever the scale."""
    from matplotlib.transforms import ScaledTranslation

    distance = min(4, 14 / curves)  # a marker is 3.5 points wide
    points = distance * (n - (curves - 1) / 2)
    return axes.transData + ScaledTranslation(points / 72, 0, _figure(axes).dpi_scale_trans)


def marker_spacing(n: int, points: int, dense: int = 20) -> dict[str, Any]:
    """Options of `plot` for the n-th curve: a marker at every point or, on curves of more than
    `dense` points, at a tenth of them, different ones for each curve."""
    spacing = max(points // 10, 1)
    return {"markevery": 1 if points <= dense else (n * spacing // 4 % spacing, spacing)}


def vertical_line(axes: Axes, x: float, label: str | None) -> None:
    """Draw a vertical line with an entry in the legend."""
    axes.axvline(x, color="0.35", linewidth=0.8, label=label)


def chance_line(axes: Axes, chance: float | None) -> list[Line2D]:
    """Draw the accuracy of guessing, in %, if it is known. Returns what was drawn."""
    if chance is None:
        return []
    label = f"chance {chance:g} %"
    line = axes.axhline(chance, color="0.5", linewidth=0.8, linestyle=(0, (1, 3)), label=label)
    return [line]


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


def legend_below(figure: Figure, handles: Sequence[Any] = ()) -> None:
    """Add one legend below the panels, where it hides no curve, and make the figure higher by it.

    It has as few rows as fit the width of the figure, equally long ones, and long labels are
    wrapped. handles: those of all panels by default, each label once."""
    entries: dict[str, Any] = {handle.get_label(): handle for handle in handles}
    if not handles:
        for axes in figure.axes:
            for handle, label in zip(*axes.get_legend_handles_labels()):
                entries.setdefault(label, handle)
    if not entries:
        return
    for most_columns, characters in LEGENDS:
        rows = -(-len(entries) // most_columns)
        legend = figure.legend(
            list(entries.values()),
            [textwrap.fill(label, int(characters * figure.get_figwidth())) for label in entries],
            loc="outside lower center",
            ncols=-(-len(entries) // rows),
        )
        extent = legend.get_window_extent()
        if extent.width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)
