"""Importing this makes figures of the process coarse and without a layout: as users get them they take nine tenths of a
tiny training. What they show is tested in test_figures.py, which draws them in full."""
import matplotlib.backends.backend_agg  # noqa: F401
from matplotlib.figure import Figure

IN_FULL = Figure.savefig


def savefig(figure, *args, **options):
    figure.set_layout_engine("none")
    IN_FULL(figure, *args, **{**options, "dpi": 20})


Figure.savefig = savefig
