"""Compare runs: groups that differ in the seed alone, one table, and figures."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import io
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_utils import UserError
from experiment.config import FINGERPRINTS, training_name
from experiment.plots import compare as plots
from experiment.plots.style import norm_name
from experiment.results.published import read_published
from experiment.results.read import read_run
from experiment.results.values import (
    MINUS,
    RECORDED,
    STRONGEST,
    Difference,
    Group,
    Key,
    RunResults,
    difference,
    method_order,
)
from experiment.runs.files import WriteFailed, csv_cell, markdown_cell, printable, why, write_text
from experiment.runs.folder import RunFolder
from experiment.text import count, format_eps, format_value, listed

LONGEST_LABEL = 300
LONGEST_IN_HEADER = 40  # characters of a label in another column's header
COLUMNS = (
    *("group", "measure", "attack", "norm", "grad", "steps", "eps", "detail", "mean", "std", "n"),
    *("task", "split", "images", "data", "gradients", "masked", "converged", "chosen_on", "epochs"),
    *("difference", "difference_low", "difference_high", "difference_n"),
)
ORDER = ("clean", "adversarial", "audit", "audit trusted", "corruptions", "seconds")
CHOSEN = {
    "test": "the best on the test images",
    "validation": "the best on validation images",
    "last": "the last epoch",
}

Identity = Mapping[str, Any]


# ---------------------------------------------------------------------------------------- grouping


def _same_group(identity: Identity, other: Identity) -> bool:
    """Whether two runs belong to one group. Fingerprints that a run of an earlier version does not
    record match any."""
    return all(
        other[name] == value or name in FINGERPRINTS and None in (value, other[name])
        for name, value in identity.items()
    )


def group_runs(
    runs: Sequence[RunResults], labels: Sequence[str] | None = None
) -> tuple[list[Group], list[str]]:
    """(the groups of some runs, in the order of their first runs; notes on runs that do not count).
    A model counts once, and so does a seed of a group. labels: one for each group. Raises
    UserError."""
    identities: list[dict[str, Any]] = []
    groups: list[Group] = []
    notes = []
    counted: set[tuple[str, str]] = set()
    for run in runs:
        if (run.folder, run.weights) in counted:
            notes.append(f"{printable(run.folder)} is given several times; it counts once")
            continue
        counted.add((run.folder, run.weights))
        place = next((n for n, i in enumerate(identities) if _same_group(i, run.identity)), None)
        if place is None:
            identities.append(dict(run.identity))
            groups.append(Group("", [run]))
            continue
        group = groups[place]
        seed = run.args.get("seed")
        same_seed = [other for other in group.runs if other.args.get("seed") == seed]
        if seed is not None and same_seed:
            notes.append(
                f"left out: {printable(run.folder)}, which repeats seed {seed} of "
                f"{printable(same_seed[0].folder)}"
            )
            continue
        group.runs.append(run)
        known = identities[place]
        known.update({name: known[name] or run.identity[name] for name in FINGERPRINTS})
    if labels and len(set(labels)) < len(labels):
        raise UserError("argument --labels: two labels are the same; give each group its own")
    if labels and len(labels) != len(groups):
        raise UserError(
            f"argument --labels: got {len(labels)}, expected {len(groups)}: one for each group of "
            "runs whose arguments differ in the seed alone"
        )
    for group, label in zip(groups, labels or _labels(identities)):
        group.label = label
    return groups, list(dict.fromkeys(notes))


def _labels(identities: Sequence[Identity]) -> list[str]:
    """A label for each group: model and rule, the task if there are several, and what differs
    between groups with the same of these."""
    several_tasks = len({identity["task"] for identity in identities}) > 1
    names = []
    for identity in identities:
        name = training_name(identity)
        names.append(f"{name} on {identity['task']}" if several_tasks else name)
    labels = []
    for name, identity in zip(names, identities):
        same = [other for other, other_name in zip(identities, names) if other_name == name]
        differing = {
            dest for dest, value in identity.items() if any(o[dest] != value for o in same)
        }
        # other sizes, and other tasks, are other data
        differing -= {data for data, (_, size) in FINGERPRINTS.items() if size in differing}
        own = [_describe_setting(dest, identity[dest]) for dest in identity if dest in differing]
        labels.append(printable(", ".join([name, *own]))[:LONGEST_LABEL])
    return labels


def _describe_setting(dest: str, value: Any) -> str:
    """A setting of a training, for a label."""
    name = dest.replace("_", "-")
    for data, (images, size) in FINGERPRINTS.items():
        if dest == size:
            return f"{'all' if value is None else value} {images} images"
        if dest == data:
            return f"{images} images {str(value)[:8]}"
    if dest == "adv_train" and value:
        return f"{name} {format_eps(value)}"
    if value is None or value is False:
        return f"no {name}"
    return name if value is True else f"{name} {format_value(value)}"


# ------------------------------------------------------------------------------------------- tables


def _table_keys(groups: Sequence[Group]) -> list[Key]:
    """The keys of the tables, in their order: what most groups have, on the most images, comes
    first; before the attacks on some images, the clean accuracy of the same images."""
    found = {key for group in groups for key in group.cells if key.measure in ORDER}
    of_block: dict[Any, set[int]] = {}  # the groups that have one of its values
    of_curve: dict[Any, set[int]] = {}
    for n, group in enumerate(groups):
        for key in found & group.cells.keys():
            of_block.setdefault(_block(key), set()).add(n)
            of_curve.setdefault(_curve(key), set()).add(n)

    def order(key: Key) -> tuple:
        aside = ("corruptions", "seconds").index(key.measure) + 1 if _is_aside(key) else 0
        block = (-len(of_block[_block(key)]), -key.images.number, key.predicted != "{}")
        curve = _curve(key)
        row = (key.measure != "clean", -len(of_curve[curve]), ORDER.index(curve.measure), curve)
        method = (
            key.grad != STRONGEST,
            *method_order(key.grad),
            int(key.steps) if key.steps.isdecimal() else 0,
        )
        is_trusted = key.measure == "audit trusted"
        return (
            aside,
            not _was_recorded(key),
            *block,
            _block(key),
            *row,
            *method,
            key.eps,
            is_trusted,
        )

    return sorted(found, key=order)


def _was_recorded(key: Key) -> bool:
    """Whether it is the key of an accuracy that a training measured."""
    return key.measure == "clean" and key.detail.startswith(RECORDED)


def _is_aside(key: Key) -> bool:
    return key.measure in ("corruptions", "seconds")


def _block(key: Key) -> tuple:
    """What the rows of one block of the table have in common."""
    return key.images, key.predicted


def _curve(key: Key) -> Key:
    """What the rows of one attack have in common, over eps and gradient methods."""
    measure = "audit" if key.measure == "audit trusted" else key.measure
    return _without_steps(key)._replace(measure=measure, grad="", eps=0.0)


def _is_of_one_method(key: Key) -> bool:
    """Whether a key is of one gradient method, and not of the strongest per image."""
    return key.grad not in ("", STRONGEST)


def table_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The rows of comparison.csv, dicts of COLUMNS; accuracies in %, seconds in s."""
    rows = []
    for key in _table_keys(groups):
        for group in groups:
            cell = group.cells.get(key)
            if cell is None:
                continue
            mean, std, n = cell.statistics
            identity = group.runs[0].identity
            is_attack = key.measure == "adversarial"
            change = _difference(groups[0], group, key)
            rows.append(
                {
                    "group": group.label,
                    **{name: value for name, value in key._asdict().items() if name in COLUMNS},
                    "eps": _eps(key),
                    "mean": f"{mean:.4f}",
                    "std": _number(std),
                    "n": n,
                    "task": key.images.task,
                    "split": key.images.split,
                    "images": key.images.number or "",
                    "data": "" if key.measure == "corruptions" else key.images.fingerprint,
                    "gradients": " ".join(cell.methods) if is_attack else "",
                    "masked": f"{cell.masked:.4f}" if is_attack and cell.methods else "",
                    "converged": _number(cell.converged),
                    "chosen_on": identity.get("chosen_on", ""),
                    "epochs": identity.get("epochs", ""),
                    "difference": _number(change and change.mean),
                    "difference_low": _number(change and change.low),
                    "difference_high": _number(change and change.high),
                    "difference_n": change.n if change else "",
                }
            )
    return rows


def _eps(key: Key) -> str:
    """The exact eps, or the severity of corruptions; "" for measures without."""
    if not (key.eps or key.norm):
        return ""
    return repr(float(key.eps)).removesuffix(".0")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


@functools.cache  # the table and the .csv contain it, and the bootstrap takes time
def _difference(reference: Group, group: Group, key: Key) -> Difference | None:
    """The difference of a group to the first one; None where there is nothing to pair."""
    first = reference.cells.get(key)
    second = group.cells.get(key)
    if group is reference or first is None or second is None:
        return None
    return difference(first, second)


def _describe(key: Key) -> str:
    """The label of a row."""
    attack = f"{key.attack} {norm_name(key.norm)} {format_eps(key.eps)}"
    if key.measure == "clean":
        return f"clean accuracy, {key.detail} (%)"
    if key.measure == "seconds":
        return "training (s)"
    if key.measure == "corruptions":
        severity = f"severity {key.eps:g}" if key.eps else "mean over severities"
        return f"{key.attack}, {severity}, {key.detail} (%)"
    if key.measure == "audit trusted":
        return f"{attack}, {key.detail}: runs trusted (%)"
    if _is_of_one_method(key):
        gradient = f"{key.grad}@{key.steps}" if key.steps else key.grad
        return f"{attack}, {gradient}, {key.detail} (%)"
    return f"{attack}, {key.detail} (%)"


def _row_labels(keys: Sequence[Key]) -> dict[Key, str]:
    """The label of each row. Rows whose labels would be equal name what differs: the data set, or
    settings such as the version of an attack."""
    by_label: dict[str, list[Key]] = {}
    for key in keys:
        by_label.setdefault(_describe(key), []).append(key)
    labels = {}
    for label, same in by_label.items():
        settings = {
            key: {**json.loads(key.rest), "data": key.images.fingerprint, "task": key.images.task}
            for key in same
        }
        names = sorted({name for own in settings.values() for name in own})
        differing = [n for n in names if len({repr(own.get(n)) for own in settings.values()}) > 1]
        for key, own in settings.items():
            parts = [f"{name} {format_value(own.get(name))}"[:100] for name in differing]
            labels[key] = ", ".join([label, *parts])
    return labels


Table = list[list[str]]  # rows of cells, the first one the header


def comparison_table(groups: Sequence[Group], keys: Sequence[Key]) -> Table:
    """One row per key; one column per group and, from the second group on, one of the difference to
    the first."""
    header = [""]
    for group in groups:
        header.append(group.label)
        if group is not groups[0]:
            first = groups[0].label
            header.append(
                f"difference to {first if len(first) <= LONGEST_IN_HEADER else 'the first group'}"
            )
    table = [header]
    for key, label in _row_labels(keys).items():
        row = [label]
        for group in groups:
            cell = group.cells.get(key)
            row.append("" if cell is None else str(cell))
            if group is not groups[0]:
                change = _difference(groups[0], group, key)
                row.append("" if change is None else str(change))
        table.append(row)
    return table


def group_table(groups: Sequence[Group]) -> Table:
    """What the groups are: one row each."""
    table = [["group", "seeds", "data", "model", "converged (%)", "gradients"]]
    for group in groups:
        run = group.runs[0]
        seeds = [run.args.get("seed") for run in group.runs]
        chosen = CHOSEN.get(run.identity["chosen_on"], "")
        epochs = count(run.identity["epochs"], "epoch")
        table.append(
            [
                group.label,
                ", ".join("unknown" if seed is None else str(seed) for seed in seeds),
                str(run.args.get("task")),
                f"{chosen}, of {epochs}",
                _converged(group),
                _gradients(group),
            ]
        )
    return table


def _converged(group: Group) -> str:
    """The share of converged images in predictions on the most images, in %."""
    known = [
        (key.images.number, cell.converged)
        for key, cell in group.cells.items()
        if cell.converged is not None and key.predicted == "{}"
    ]
    return f"{100 * max(known)[1]:.2f}" if known else ""


def _gradients(group: Group) -> str:
    """The gradient methods of a group's attacks, the strongest of which counts per image."""
    attacks: dict[str, list[str]] = {}
    for key, cell in group.cells.items():
        if key.measure == "adversarial" and key.grad == STRONGEST:
            methods = ", ".join(cell.methods)
            several = len(cell.methods) > 1
            names = attacks.setdefault(f"strongest of {methods}" if several else methods, [])
            if key.attack not in names:
                names.append(key.attack)
    if len(attacks) == 1:
        return next(iter(attacks))
    return "; ".join(f"{', '.join(names)}: {methods}" for methods, names in attacks.items())


def _effort(groups: Sequence[Group]) -> list[str]:
    """A line that says by which gradient methods each group was attacked; none without attacks."""
    gradients = {group.label: _gradients(group) for group in groups}
    attacked = [f"{label}: {text}" for label, text in gradients.items() if text]
    return [f"Gradient methods of the attacks: {'; '.join(attacked)}."] if attacked else []


def _with_one_row_per_method(groups: Sequence[Group]) -> list[Group]:
    """The groups without the steps of gradient methods of which each has one number of steps at
    most: energy models and networks without time steps stand in one row."""
    steps = [
        Counter(_without_steps(key) for key in group.cells if _is_of_one_method(key))
        for group in groups
    ]
    several = {key for numbers in steps for key, number in numbers.items() if number > 1}

    def renamed(run: RunResults) -> RunResults:
        values = {}
        for key, own in run.values.items():
            is_single = _is_of_one_method(key) and _without_steps(key) not in several
            values[_without_steps(key) if is_single else key] = own
        return dataclasses.replace(run, values=values)

    return [dataclasses.replace(group, runs=[renamed(r) for r in group.runs]) for group in groups]


def _without_steps(key: Key) -> Key:
    """A key without what only models with time steps have: their number, and the usual start."""
    rest = json.loads(key.rest)
    if rest.get("start") == "zero":
        rest["start"] = None
    return key._replace(steps="", rest=json.dumps(rest, sort_keys=True))


def markdown(table: Table) -> list[str]:
    """The lines of a Markdown table."""
    header, *rows = [[markdown_cell(cell) for cell in row] for row in table]
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    MINUS: "$-$",
    "≤": r"$\leq$",
}


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in printable(text))


def latex(table: Table) -> list[str]:
    """The lines of a LaTeX table for the package booktabs."""
    header, *rows = [[_latex_text(cell) for cell in row] for row in table]
    return [
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        r"\toprule",
        f"{' & '.join(header)} \\\\",
        r"\midrule",
        *(f"{' & '.join(row)} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _write_csv(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_text(path, table.getvalue())


# -------------------------------------------------------------------------------------- entry point

EXPLANATION = (
    "Mean ± standard deviation over seeds (number of seeds). Adversarial accuracies are those of "
    "the strongest gradient method per image. ≤: an upper bound only, because the gradients of "
    "more than 1 % of the images are zero. Differences are to the first group, in percentage "
    'points, with their 95 % interval, paired by seed and image (bootstrap over both). "seed 1 '
    'alone": only this seed is paired, whatever the means are of; the interval of a single seed '
    "covers its images, not the spread between trainings."
)


def _notes(groups: Sequence[Group], keys: Sequence[Key]) -> list[str]:
    """Notes on what the groups left out, one per line."""
    notes = [note for group in groups for run in group.runs for note in run.notes]
    for group in groups:
        partial: dict[str, list[str]] = {}
        for key in keys:
            cell = group.cells.get(key)
            if cell and cell.left_out:
                seeds = ", ".join(map(str, cell.left_out))
                partial.setdefault(f"seed {seeds}", []).append(_describe(key))
        for seeds, rows in partial.items():
            notes.append(
                f"left out of {printable(group.label)}: {seeds}, attacked by other gradient "
                f"methods, in {count(len(rows), 'row')}: {printable(rows[0])}"
                + (" ..." if len(rows) > 1 else "")
            )
    return list(dict.fromkeys(notes))


def _main_keys(groups: Sequence[Group]) -> list[Key]:
    """The keys of the main table: without single gradient methods and, where all groups were
    evaluated, without the accuracy that a training recorded."""
    evaluated = [
        any(key.measure == "clean" and not _was_recorded(key) for key in group.cells)
        for group in groups
    ]
    return [
        key
        for key in _table_keys(groups)
        if not _is_of_one_method(key) and not (all(evaluated) and _was_recorded(key))
    ]


def compare(
    paths: Sequence[str],
    labels: Sequence[str] | None,
    published: Sequence[str] | None,
    figures: str,
    command: str,
    root: str = "results",
) -> pathlib.Path:
    """Compare runs in a new folder below root/compare: comparison.md, .csv and .tex, and the
    figures that the runs have results for. Returns the folder.

    paths: of runs; labels: one for each group, None for generated ones; published: paths of tables;
    figures: png, pdf or svg; command: the command line. Raises UserError."""
    groups, notes = group_runs([read_run(path) for path in paths], labels)
    tasks = {run.args.get("task") for group in groups for run in group.runs}
    published_groups = read_published(published or (), tasks)
    main_keys = _main_keys(groups)
    effort = _effort(groups)
    notes += _notes([*groups, *published_groups], main_keys)
    main_table = comparison_table(groups, main_keys)
    lines = [
        f"# Comparison of {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        "",
        f"    {printable(command).replace('<', '&lt;')}",
        "",
        EXPLANATION,
        "",
        *markdown(main_table),
        *("", *(markdown_cell(line) for line in effort)),
        "",
        "## Groups",
        "",
        *markdown(group_table(groups)),
    ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {markdown_cell(note)}" for note in notes)]
    by_method = _with_one_row_per_method(groups)
    method_keys = [key for key in _table_keys(by_method) if _is_of_one_method(key)]
    if method_keys:
        table = comparison_table(by_method, method_keys)
        lines += ["", "## Each gradient method", "", *markdown(table)]
    folder = _new_folder(pathlib.Path(root, "compare"))
    _write_csv(folder / "comparison.csv", table_rows(groups))
    comments = [f"% {_latex_text(line)}" for line in [EXPLANATION, *effort]]
    write_text(folder / "comparison.tex", "\n".join([*comments, *latex(main_table)]) + "\n")
    write_text(folder / "comparison.md", "\n".join(lines) + "\n")
    print("\n".join([*markdown(main_table), *map(markdown_cell, effort)]))
    for note in notes:
        print(f"note: {note}")
    runs = sum(len(group.runs) for group in groups)
    drawings = dict(plots.all_figures([*groups, *published_groups]))
    names = [pathlib.Path(name).with_suffix(f".{figures}").name for name in drawings]
    beside = f", with {listed(names)} beside it" if names else ""
    print(
        f"{count(runs, 'run')} in {count(len(groups), 'group')}; results are in "
        f"{folder / 'comparison.md'}{beside}",
        flush=True,
    )
    run = RunFolder(folder, figures, "comparison")
    for name, draw in drawings.items():
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
