"""Runs held against each other: groups of runs that differ in the seed alone, one table, and
figures."""

import csv
import dataclasses
import datetime
import io
import itertools
import pathlib
import statistics

from data_utils import UserError
from experiment.arguments import shown
from experiment.flags import DATA
from experiment.measured import Key, of_training, read_published, read_run
from experiment.plots import compare as plots
from experiment.runs.files import WriteFailed, csv_cell, markdown_cell, printable, why, write_text
from experiment.runs.folder import RunFolder

LONGEST = 300  # characters of the name of a group
COLUMNS = ("group", *Key._fields, "mean", "std", "n")


@dataclasses.dataclass
class Group:
    """Runs that are one thing with several seeds. label: what it is; runs: their `Measured`;
    published: whether it is drawn dashed, of a table."""

    label: str
    runs: list
    published: bool = False

    def keys(self):
        """All that at least one run has, in a stable order."""
        return list(dict.fromkeys(key for run in self.runs for key in run.values))

    def pooled(self, key):
        """(mean, standard deviation of the sample or None of one, how many) over the runs that have
        it; None of none."""
        values = [run.values[key] for run in self.runs if key in run.values]
        return pooled(values) if values else None


def pooled(values):
    """(mean, standard deviation of the sample or None of one, how many) of some numbers."""
    return (
        statistics.fmean(values),
        statistics.stdev(values) if len(values) > 1 else None,
        len(values),
    )


def _identity(run):
    """What a run shares with those of its group."""
    data = {name: run.args.get(name) for name in DATA}
    return {**of_training(run.args), "epochs": len(run.epochs), **data}


def _same(identity, other):
    """Whether runs are of one group. Data that a run of an earlier version does not record may be
    the same."""
    return all(
        other[name] == value or name in DATA and None in (value, other[name])
        for name, value in identity.items()
    )


def grouped(runs, labels=None):
    """The `Group`s of some runs, in the order of their first ones. labels: one for each, or None.
    Raises UserError."""
    found = []
    for run in runs:
        identity = _identity(run)
        known = next((entry for entry in found if _same(entry[0], identity)), None)
        if known is None:
            found.append((identity, [run]))
        else:
            known[0].update({name: known[0][name] or identity[name] for name in DATA})
            known[1].append(run)
    if labels and len(labels) != len(found):
        raise UserError(
            f"argument --labels: got {len(labels)}, expected {len(found)}: these runs are so many groups, "
            "whose arguments differ in more than the seed"
        )
    labels = labels or _labels([identity for identity, _ in found])
    return [Group(label, group) for label, (_, group) in zip(labels, found)]


def _labels(identities):
    """A name for each group: model and rule, and what else differs between groups of the same."""
    names = [
        f"{i['model']} {i['alg']}"
        + (f", adversarial {i['adv_train']:g} by {i['adv_grad']}" if i.get("adv_train") else "")
        for i in identities
    ]
    result = []
    for name, identity in zip(names, identities):
        same = [other for other, its in zip(identities, names) if its == name]
        differing = [
            dest for dest, value in identity.items() if any(other[dest] != value for other in same)
        ]
        result.append(
            name
            + "".join(f", {dest.replace('_', '-')} {shown(identity[dest])}" for dest in differing)
        )
    return [printable(label)[:LONGEST] for label in result]


# ------------------------------------------------------------------------------------------- tables


def _keys(groups):
    """All that any group has, in the order of the tables."""
    return sorted(dict.fromkeys(key for group in groups for key in group.keys()), key=_order)


def rows_of(groups):
    """The rows of comparison.csv, dicts of COLUMNS; accuracies in %, seconds in s."""
    rows = []
    for key in _keys(groups):
        for group in groups:
            numbers = group.pooled(key)
            if numbers:
                mean, std, n = numbers
                rows.append(
                    {
                        "group": group.label,
                        **key._asdict(),
                        "eps": f"{key.eps:g}" if key.eps else "",
                        "mean": f"{mean:.4f}",
                        "std": "" if std is None else f"{std:.4f}",
                        "n": n,
                    }
                )
    return rows


ORDER = ("clean", "adversarial", "audit", "audit trusted", "corruptions", "seconds")


def _order(key):
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


def _words(key):
    """What is measured, as the table says it."""
    if key.measure in ("clean", "seconds"):
        return {"clean": "clean accuracy (%)", "seconds": "training (s)"}[key.measure]
    if key.measure == "corruptions":
        return (
            f"{key.detail}, "
            + (f"severity {key.eps:g}" if key.eps else "mean over severities")
            + " (%)"
        )
    bound = f"{'L-infinity' if key.norm == 'inf' else 'L' + key.norm} {key.eps:g}"
    if key.measure == "adversarial":
        through = f"{key.grad}{f'@{key.steps}' if key.steps else ''}" * (key.grad != key.attack)
        return f"{key.attack} {bound}, " + f"{through}, " * bool(through) + f"{key.detail} (%)"
    return (
        f"audit, robust at {bound}, {key.detail} (%)"
        if key.measure == "audit"
        else f"audit at {bound}, {key.detail}: runs trusted (%)"
    )


def markdown(groups, command):
    """The table as Markdown: a row for each number, a column for each group."""
    command = printable(command).replace("<", "&lt;")
    lines = [
        f"# Comparison of {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        "",
        f"    {command}",
        "",
        "Mean ± standard deviation over seeds (number of runs). Rows on other images or of another budget do not "
        "compare.",
        "",
        "| | " + " | ".join(markdown_cell(group.label) for group in groups) + " |",
        "| --- |" + " --- |" * len(groups),
    ]
    for key in _keys(groups):
        cells = []
        for group in groups:
            numbers = group.pooled(key)
            cells.append("" if not numbers else said(*numbers))
        lines.append(f"| {markdown_cell(_words(key))} | " + " | ".join(cells) + " |")
    return lines


def said(mean, std, n):
    """Numbers of `pooled` in words."""
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}") + f" ({n})"


# ---------------------------------------------------------------------------------------- the whole


def compare(paths, labels, published, figures, command, root="results"):
    """Writes comparison.md, comparison.csv and the figures for which runs have data into a new
    folder below root/compare, and returns it. paths: of runs; labels: one for each group, or None;
    published: paths of tables; figures: png or pdf. Raises UserError."""
    groups = grouped([read_run(path) for path in paths], labels)
    tasks = {run.args.get("task") for group in groups for run in group.runs}
    tables = [
        (label, runs)
        for path in published or ()
        for label, runs in read_published(path, tasks).items()
    ]
    merged = {
        label: [run for name, runs in tables if name == label for run in runs]
        for label, _ in tables
    }
    everything = [*groups, *(Group(label, runs, True) for label, runs in merged.items())]
    folder = _new_folder(pathlib.Path(root, "compare"))
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows_of(groups):
        writer.writerow({name: csv_cell(value) for name, value in row.items()})
    lines = markdown(groups, command)
    write_text(folder / "comparison.csv", table.getvalue())
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")
    print("\n".join(lines[6:]))
    print(
        f"{_count(len(paths), 'run')} in {_count(len(groups), 'group')}; results are in {folder}",
        flush=True,
    )
    run = RunFolder(folder, figures, "comparison")
    for name, draw, *data in plots.all_figures(everything):
        run.save_figure(name, draw, *data)
    return folder


def _count(n, what):
    return f"{n} {what}" + "s" * (n != 1)


def _new_folder(root):
    now = datetime.datetime.now()
    try:
        for attempt in itertools.count(1):
            folder = (
                root
                / f"{now:%Y-%m-%d}"
                / (f"{now:%H-%M-%S}" + (f"_{attempt}" if attempt > 1 else ""))
            )
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    except OSError as e:
        raise WriteFailed(f"cannot create a folder below {root}: {why(e)}") from None
