"""Results of `--todo gducheck`: the table, raw contributions and figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from energy import gdu
from energy.gdu import Comparison
from energy.rule import Rule
from experiment.plots import gdu as plots
from experiment.results.record import Record
from experiment.runs.files import csv_cell
from experiment.runs.folder import RunFolder
from experiment.text import format_value

TABLE = "gducheck.csv"


def value_of(comparison: Comparison, rule: Rule) -> dict[str, Any]:
    """The value of a record. converged: the number of images that have converged after T1."""
    return {
        "rows": comparison.rows,
        "verdict": gdu.verdict(comparison, rule),
        "converged": int(comparison.converged.sum()),
    }


def describe(record: Record, rule: Rule, source: str) -> str:
    """A `gducheck` record, for the log. rule: of the comparison; source: the model, as text."""
    value = record.value
    return (
        f"{source}: EP against BPTT on {record.data['images']} images, T1 = {rule.T1}, T2 = "
        f"{rule.T2}, beta = {format_value(rule.betas)}; {value['converged']} of them have converged"
        " after T1\n"
        "compared: for parameters, the EP update per nudged step with the BPTT gradient per step; "
        "for the read-out, the total updates;\n"
        "for neurons, their changes with the gradients times the slope of the activation\n"
        f"{format_table(value['rows'])}\n{value['verdict']}"
    )


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `energy.gdu.compare_gdu` as text, one line each below a heading."""
    width = max((len(row["name"]) for row in rows), default=0)
    lines = [
        f"{'':{width}}  estimate      RMSE  sign errors   cosine  distance  "
        "cosine by image: median, worst"
    ]
    for row in rows:
        by_image = "".join(
            f"{_number(row, key):10.4f}" for key in ("cosine_median", "cosine_worst") if key in row
        )
        lines.append(
            f"{row['name']:{width}}  {row['estimate']:10} {_number(row, 'rmse'):7.4f}  "
            f"{100 * _number(row, 'sign_error'):9.2f} %  {_number(row, 'cosine'):7.4f}  "
            f"{_number(row, 'distance'):8.2e}{by_image}"
        )
    return "\n".join(lines)


def _number(row: Mapping[str, Any], key: str) -> float:
    """A number in a row of a record, which has None for one that is not finite."""
    value = row.get(key)
    return math.nan if value is None else value


def save_gdu(run: RunFolder, comparison: Comparison) -> None:
    """Write the raw contributions, gducheck.csv and the figures."""
    names = ("BPTT.tar", "EP.tar", "EP_minus.tar")
    for name, contributions in zip(names, (comparison.BPTT, *comparison.runs)):
        run.save(name, {key: tensor.cpu() for key, tensor in contributions.items()})
    _add_rows(run, comparison)
    bptt = comparison.bptt
    ep = comparison.ep
    generator = torch.Generator().manual_seed(0)
    for name in bptt:
        figure = f"gdu_{name}.png"
        run.save_figure(figure, plots.gdu_entries, name, bptt[name], ep[name], generator)
    run.save_figure("gdu_layers.png", plots.gdu_layers, bptt, ep, generator)
    run.save_figure("gdu_overview.png", plots.gdu_overview, list(bptt), comparison.rows)


def _add_rows(run: RunFolder, comparison: Comparison) -> None:
    """Add the rows to gducheck.csv that it does not contain yet."""
    known = run.read_csv(TABLE)
    rows = [{"epoch": "", "batch": "", **row} for row in comparison.rows]

    def as_text(row: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(csv_cell(cell)) for name, cell in row.items() if cell != ""}

    texts = list(map(as_text, known))
    run.write_csv(TABLE, known + [row for row in rows if as_text(row) not in texts])
