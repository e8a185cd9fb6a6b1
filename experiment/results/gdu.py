"""Results of `--todo gducheck`: the table, raw contributions and figures."""

from collections.abc import Sequence

import torch

from energy.gdu import Comparison, Row
from experiment.plots import gdu as plots
from experiment.runs.folder import RunFolder


def format_table(rows: Sequence[Row]) -> str:
    """The rows of `energy.gdu.compare_gdu` as text, one line each below a heading."""
    width = max(len(str(row["name"])) for row in rows)
    lines = [
        f"{'':{width}}  estimate      RMSE  sign errors   cosine  distance  "
        "cosine by image: median, worst"
    ]
    for row in rows:
        by_image = "".join(
            f"{row[key]:10.4f}" for key in ("cosine_median", "cosine_worst") if key in row
        )
        lines.append(
            f"{row['name']:{width}}  {row['estimate']:10} {row['rmse']:7.4f}  "
            f"{100 * row['sign_error']:9.2f} %  {row['cosine']:7.4f}  {row['distance']:8.2e}"
            f"{by_image}"
        )
    return "\n".join(lines)


def save_gdu(run: RunFolder, comparison: Comparison) -> None:
    """Write the raw contributions, gducheck.csv and the figures."""
    names = ("BPTT.tar", "EP.tar", "EP_minus.tar")
    for name, contributions in zip(names, (comparison.BPTT, *comparison.runs)):
        run.save(name, {key: tensor.cpu() for key, tensor in contributions.items()})
    run.append_csv("gducheck.csv", [{"epoch": "", "batch": "", **row} for row in comparison.rows])
    bptt = comparison.bptt
    ep = comparison.ep
    generator = torch.Generator().manual_seed(0)
    for name in bptt:
        figure = f"gdu_{name}.png"
        run.save_figure(figure, plots.gdu_entries, name, bptt[name], ep[name], generator)
    run.save_figure("gdu_layers.png", plots.gdu_layers, bptt, ep, generator)
    run.save_figure("gdu_overview.png", plots.gdu_overview, list(bptt), comparison.rows)
