"""What all figures share: one style, axes, labels. Matplotlib is imported when something is
drawn."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

STYLE_FILE = pathlib.Path(__file__).with_name("paper.mplstyle")
ACCURACY = "accuracy (%)"
IMAGE_EPS = "eps, images in [0, 1]"
MOST_EPS_LABELS = 28  # that fit next to each other on an axis


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


def new_figure(title: str, width: float = 6.0, height: float = 3.8) -> Figure:
    """An empty figure; sizes in inches. `RunFolder.save_figure` adds the run to the title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def run_title(folder: pathlib.Path, about: str) -> str:
    """The line of the title that names the run: `about` (model and task) and the run's path below
    results/, or, of a folder elsewhere, the last two parts of its path."""
    parts = folder.resolve().parts
    shown = parts[parts.index("results") + 1 :] if "results" in parts else parts[-2:]
    name = "/".join(shown)
    return literal(f"{about}, {name}" if about else name)


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


def eps_label(eps: float, norm: str) -> str:
    """An eps as a tick label; for the maximum norm k/255 if it is k of the 255 grey values."""
    grey_values = 255 * eps
    nearest = round(grey_values)
    if norm == "inf" and abs(grey_values - nearest) < 1e-3 and 1 <= nearest <= 128:
        return f"{nearest}/255"
    return f"{eps:.3g}"


# ---- axes


def integer_ticks(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    locator: Any = axis.get_major_locator()  # a MaxNLocator, by default
    locator.set_params(integer=True)


def eps_ticks(axes: Axes, values: Sequence[float], norm: str) -> None:
    """Put the ticks of a logarithmic x axis at the given eps only; dense ticks are labelled in
    part."""
    values = sorted(values)
    low = values[0]
    high = values[-1]
    least_ratio = (high / low) ** (1 / MOST_EPS_LABELS)  # between two labelled ticks
    labels = []
    last_labelled = 0.0
    for value in values:
        if value >= last_labelled * least_ratio:
            labels.append(eps_label(value, norm))
            last_labelled = value
        else:
            labels.append("")
    axes.set_xticks(values, labels, rotation=90 if len(values) > 8 else 0)
    axes.minorticks_off()
    margin = max(least_ratio, 1.1)
    axes.set_xlim(low / margin, high * margin)


# ---- what is drawn


def marker_spacing(n: int, points: int, dense: int = 40) -> dict[str, Any]:
    """Options of `plot` for the n-th curve: a marker at every point or, on curves of more than
    `dense` points, at a tenth of them, different ones for each curve."""
    return {"markevery": 1 if points <= dense else (n * points // 40, max(points // 10, 1))}


def vertical_line(axes: Axes, x: float, label: str | None, linestyle: str = "-") -> None:
    """Draw a vertical line with an entry in the legend."""
    axes.axvline(x, color="0.35", linewidth=1, linestyle=linestyle, marker="", label=label)


def chance_line(axes: Axes, chance: float | None) -> None:
    """Draw the accuracy of guessing, in %, if it is known."""
    if chance is None:
        return
    label = f"chance ({chance:g} %)"
    axes.axhline(chance, color="0.5", linewidth=1, linestyle=(0, (1, 3)), marker="", label=label)


def heat_map(
    axes: Axes,
    shares: np.ndarray,
    texts: np.ndarray | None = None,
    aspect: Literal["equal", "auto"] = "equal",
    fontsize: float = 8,
) -> AxesImage:
    """Draw shares in %, (rows, columns), as colours, with the texts of the same shape in the
    cells."""
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="cividis", aspect=aspect)
    axes.grid(False)
    if texts is not None:
        for (row, column), text in np.ndenumerate(texts):
            if text:
                color = "black" if shares[row, column] > 55 else "white"
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=fontsize, color=color
                )
    return image


def legend_below(figure: Figure, columns: int = 2, **options: Any) -> None:
    """Add one legend of all panels below them, where it hides no curve."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        **options,
    )
