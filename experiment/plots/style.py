"""What all figures share: one style, sizes, intervals, marks. Matplotlib is imported where
something is drawn."""

import contextlib
import functools
import os
import pathlib
import sys

STYLE = pathlib.Path(__file__).with_name("paper.mplstyle")
FORMATS = ("png", "pdf")
COLUMN = 6.0  # inches: the width of a figure with one panel in a row


@contextlib.contextmanager
def style():
    """The style of all figures, in a block or as a decorator: of what draws, and of what saves. It
    is Matplotlib's defaults and paper.mplstyle, whatever the user's own settings are."""
    import_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_settings()):
        yield


def import_matplotlib():
    """Import Matplotlib without the user's matplotlibrc and MPLBACKEND, which it reads while it is
    imported, and which can make that fail. The first matplotlibrc it looks for is that of the
    current folder."""
    if "matplotlib" in sys.modules:
        return
    folder, environment = (
        os.getcwd(),
        {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")},
    )
    os.environ.update(MPLBACKEND="agg", MATPLOTLIBRC=str(STYLE))
    try:
        os.chdir(STYLE.parent)
        import matplotlib  # noqa: F401
    finally:
        for name, value in environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        os.chdir(folder)


@functools.cache
def _settings():
    """{name: value} of every setting of Matplotlib that a figure can depend on."""
    import matplotlib

    ours = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    return {
        name: value
        for name, value in {**matplotlib.rcParamsDefault, **ours}.items()
        if name != "backend"
    }


def new_figure(title, width=COLUMN, height=3.8):
    """An empty figure of that many inches. title: what it shows; `RunFolder.save_figure` adds of
    which run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def plain(text):
    """A text from outside, in which Matplotlib sees no formula."""
    return text.replace("$", r"\$")


def run_title(folder, about):
    """The title line with a figure's run: model and task (about), and the part of its path (folder)
    below results/, or of a --run-dir the last two names."""
    parts = folder.resolve().parts
    name = "/".join(parts[parts.index("results") + 1 :] if "results" in parts else parts[-2:])
    return plain(f"{about}, {name}" if about else name)


def grid(figure, panels, columns, **options):
    """The axes of so many panels, in rows of at most `columns`."""
    rows = -(-panels // columns)
    axes = figure.subplots(rows, min(columns, panels), squeeze=False, **options).flatten()
    for unused in axes[panels:]:
        unused.remove()
    return axes[:panels]


def curve_options(n, points, dense=40):
    """How to mark the n-th curve of so many points: all of few, of many some that fall elsewhere
    for each curve."""
    return {"markevery": 1 if points <= dense else (n * points // 40, max(points // 10, 1))}


def whole_ticks(axis):
    """Only whole numbers at the ticks of an axis."""
    axis.get_major_locator().set_params(integer=True)


def legend_below(figure, columns=2, **options):
    """A legend of all curves under the panels, where it hides none."""
    handles, labels = [], []
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)


def vertical(axes, x, label, line="-"):
    """A labelled vertical line at x."""
    axes.axvline(x, color="0.35", linewidth=1, linestyle=line, marker="", label=label)


def eps_name(eps, norm):
    """A bound as a tick says it; in the maximum norm as a fraction of the 255 grey values, where it
    is one."""
    steps = 255 * eps
    if norm == "inf" and abs(steps - round(steps)) < 1e-3 and 1 <= round(steps) <= 128:
        return f"{round(steps)}/255"
    return f"{eps:.3g}"


def ticks_at(axes, values, names):
    """Ticks of a logarithmic x axis at those values alone; where they are too dense, some stay
    without a name."""
    low, high = min(values), max(values)
    room = (high / low) ** (1 / 28)  # as many names stand side by side
    shown, last = [], 0.0
    for value, name in sorted(zip(values, names)):
        shown.append(name if value >= last * room else "")
        last = value if shown[-1] else last
    axes.set_xticks(sorted(values), shown, rotation=90 if len(values) > 8 else 0)
    axes.minorticks_off()
    axes.set_xlim(low / max(room, 1.1), high * max(room, 1.1))
