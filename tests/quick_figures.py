"""Importing this makes figures of the process coarse and without a layout: as users get them they
take nine tenths of a tiny training. What they show is tested in plots/test_plots.py, which draws
them in full."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

IN_FULL = Figure.savefig


def savefig(figure, path, **options):
    figure.set_layout_engine("none")
    if options.get("format") == "png":  # without the drawing beforehand that finds out what fits
        figure.set_dpi(20)
        return FigureCanvasAgg(figure).print_png(path)
    return IN_FULL(figure, path, **{**options, "dpi": 20})


Figure.savefig = savefig
