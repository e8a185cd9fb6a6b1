"""Compare runs: groups that differ in the seed alone, one table, and figures."""

import csv
import datetime
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_utils import UserError
from experiment.config import FINGERPRINTS, training_identity
from experiment.plots import compare as plots
from experiment.plots.style import norm_name
from experiment.results.published import read_published
from experiment.results.read import read_run
from experiment.results.values import Group, Key, RunResults, Statistics
from experiment.runs.files import WriteFailed, csv_cell, markdown_cell, printable, why, write_text
from experiment.runs.folder import RunFolder
from experiment.text import count, format_value

LONGEST_LABEL = 300
COLUMNS = ("group", *Key._fields, "mean", "std", "n")
ORDER = ("clean", "adversarial", "audit", "audit trusted", "corruptions", "seconds")

Identity = dict[str, Any]


# ---------------------------------------------------------------------------------------- grouping


def _identity(run: RunResults) -> Identity:
    """The settings and data that all runs of a group share."""
    fingerprints = {name: run.args.get(name) for name in FINGERPRINTS}
    return {**training_identity(run.args), "epochs": len(run.epochs), **fingerprints}


def _same_group(identity: Identity, other: Identity) -> bool:
    """Whether two runs belong to one group. Fingerprints that a run of an earlier version does not
    record match any."""
    return all(
        other[name] == value or name in FINGERPRINTS and None in (value, other[name])
        for name, value in identity.items()
    )


def group_runs(runs: Sequence[RunResults], labels: Sequence[str] | None = None) -> list[Group]:
    """The groups of some runs, in the order of their first runs. labels: one for each group.
    Raises UserError."""
    identities: list[Identity] = []
    groups: list[Group] = []
    for run in runs:
        identity = _identity(run)
        for known, group in zip(identities, groups):
            if _same_group(known, identity):
                group.runs.append(run)
                known.update({name: known[name] or identity[name] for name in FINGERPRINTS})
                break
        else:
            identities.append(identity)
            groups.append(Group("", [run]))
    if labels and len(labels) != len(groups):
        raise UserError(
            f"argument --labels: got {len(labels)}, expected {len(groups)}: one for each group of "
            "runs whose arguments differ in the seed alone"
        )
    for group, label in zip(groups, labels or _labels(identities)):
        group.label = label
    return groups


def _labels(identities: Sequence[Identity]) -> list[str]:
    """A label for each group: model and rule, and the arguments that differ between groups with
    the same model and rule."""
    names = []
    for identity in identities:
        name = f"{identity['model']} {identity['alg']}"
        if identity.get("adv_train"):
            name += f", adversarial {identity['adv_train']:g} by {identity['adv_grad']}"
        names.append(name)
    labels = []
    for name, identity in zip(names, identities):
        same = [other for other, other_name in zip(identities, names) if other_name == name]
        differing = [
            f"{dest.replace('_', '-')} {format_value(value)}"
            for dest, value in identity.items()
            if any(other[dest] != value for other in same)
        ]
        labels.append(printable(", ".join([name, *differing]))[:LONGEST_LABEL])
    return labels


# ------------------------------------------------------------------------------------------- tables


def _keys(groups: Sequence[Group]) -> list[Key]:
    """The keys that any group has, in the order of the tables."""
    return sorted({key for group in groups for key in group.keys()}, key=_order)


def _order(key: Key) -> tuple:
    return (
        ORDER.index(key.measure),
        key.attack,
        key.norm,
        key.detail,
        key.grad == "worst",
        key.grad,
        key.steps,
        key.eps,
    )


def table_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The rows of comparison.csv, dicts of COLUMNS; accuracies in %, seconds in s."""
    rows = []
    for key in _keys(groups):
        for group in groups:
            values = group.values(key)
            if values:
                mean, std, n = Statistics.of(values)
                row = {
                    "group": group.label,
                    **key._asdict(),
                    "eps": f"{key.eps:g}" if key.eps else "",
                    "mean": f"{mean:.4f}",
                    "std": "" if std is None else f"{std:.4f}",
                    "n": n,
                }
                rows.append(row)
    return rows


def _describe(key: Key) -> str:
    """The label of a row of the Markdown table."""
    if key.measure == "clean":
        return "clean accuracy (%)"
    if key.measure == "seconds":
        return "training (s)"
    if key.measure == "corruptions":
        severity = f"severity {key.eps:g}" if key.eps else "mean over severities"
        return f"{key.detail}, {severity} (%)"
    eps = f"{norm_name(key.norm)} {key.eps:g}"
    if key.measure == "audit":
        return f"audit, robust at {eps}, {key.detail} (%)"
    if key.measure == "audit trusted":
        return f"audit at {eps}, {key.detail}: runs trusted (%)"
    gradient = "" if key.grad in ("", key.attack) else f"{plots.gradient_name(key)}, "
    return f"{key.attack} {eps}, {gradient}{key.detail} (%)"


def markdown_table(groups: Sequence[Group]) -> list[str]:
    """The lines of a Markdown table: one row per value, one column per group."""
    lines = [
        "| | " + " | ".join(markdown_cell(group.label) for group in groups) + " |",
        "| --- |" + " --- |" * len(groups),
    ]
    for key in _keys(groups):
        values = [group.values(key) for group in groups]
        cells = [str(Statistics.of(v)) if v else "" for v in values]
        lines.append(f"| {markdown_cell(_describe(key))} | " + " | ".join(cells) + " |")
    return lines


def _write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_text(path, table.getvalue())


# -------------------------------------------------------------------------------------- entry point


def compare(
    paths: Sequence[str],
    labels: Sequence[str] | None,
    published: Sequence[str] | None,
    figures: str,
    command: str,
    root: str = "results",
) -> pathlib.Path:
    """Compare runs in a new folder below root/compare: comparison.md, comparison.csv, and the
    figures that the runs have results for. Returns the folder.

    paths: of runs; labels: one for each group, None for generated ones; published: paths of tables;
    figures: png or pdf; command: the command line. Raises UserError."""
    groups = group_runs([read_run(path) for path in paths], labels)
    tasks = {run.args.get("task") for group in groups for run in group.runs}
    published_groups = read_published(published or (), tasks)
    folder = _new_folder(pathlib.Path(root, "compare"))
    table = markdown_table(groups)
    lines = [
        f"# Comparison of {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        "",
        f"    {printable(command).replace('<', '&lt;')}",
        "",
        "Mean ± standard deviation over seeds (number of runs). Rows with different images or "
        "budgets are not comparable.",
        "",
        *table,
    ]
    _write_csv(folder / "comparison.csv", table_rows(groups))
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")
    print("\n".join(table))
    print(
        f"{count(len(paths), 'run')} in {count(len(groups), 'group')}; results are in {folder}",
        flush=True,
    )
    run = RunFolder(folder, figures, "comparison")
    for name, draw in plots.all_figures([*groups, *published_groups]):
        run.save_figure(name, draw)
    return folder


def _new_folder(root: pathlib.Path) -> pathlib.Path:
    """A new folder root/yyyy-mm-dd/hh-mm-ss; with _2, _3, ... appended if that exists."""
    now = datetime.datetime.now()
    first = folder = root / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    attempt = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            attempt += 1
            folder = first.with_name(f"{first.name}_{attempt}")
        except OSError as e:
            raise WriteFailed(f"cannot create a folder below {root}: {why(e)}") from None
