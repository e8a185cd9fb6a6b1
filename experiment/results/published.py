"""Read published accuracies, in the columns of the tables in check/published."""

import csv
import re
from collections.abc import Collection, Mapping

from data_utils import SEVERITIES, UserError
from experiment.results.read import safe_name, safe_steps
from experiment.results.tables import read_eps, read_share
from experiment.results.values import Group, Key, RunResults
from experiment.runs.files import TEXT, printable
from experiment.text import name_path

COLUMNS = (
    "task, model, attack, norm, attack_step, eps, adversarial; t, accuracy; row, severity_1 ..."
)


def read_published(paths: Collection[str], tasks: Collection[str | None]) -> list[Group]:
    """The published results on these tasks, one group per model. Raises UserError."""
    groups: dict[str, Group] = {}
    for path in paths:
        for label, runs in _read_table(path, tasks).items():
            groups.setdefault(label, Group(label, [], published=True)).runs.extend(runs)
    return list(groups.values())


def _read_table(path: str, tasks: Collection[str | None]) -> dict[str, list[RunResults]]:
    """{label of the model: results, one for each seed} of one table."""
    try:
        with open(path, newline="", **TEXT) as file:
            rows = [row for row in csv.DictReader(file) if not tasks or row.get("task") in tasks]
    except (OSError, csv.Error) as e:
        raise UserError(f"argument --published: {name_path(path)} cannot be read: {e}") from None
    rows_of_seeds: dict[str, dict[str | None, list[Mapping[str, str]]]] = {}
    for row in rows:
        label = printable(f"published: {row.get('model') or 'EP-CNN'}")
        rows_of_seeds.setdefault(label, {}).setdefault(row.get("seed"), []).append(row)
    models = {
        label: [_results(rows) for rows in seeds.values()] for label, seeds in rows_of_seeds.items()
    }
    if not any(run.values or run.characteristic for runs in models.values() for run in runs):
        wanted = ", ".join(sorted(filter(None, tasks))) or "any task"
        raise UserError(
            f"argument --published: {name_path(path)} has no results of {wanted} in the columns "
            f"{COLUMNS}"
        )
    return models


def _results(rows: Collection[Mapping[str, str]]) -> RunResults:
    """The results of one seed. Those under corruptions are means over the rows."""
    run = RunResults({})
    corrupted: dict[Key, list[float]] = {}
    for row in rows:
        if row.get("attack"):
            eps = read_eps(row.get("eps"))
            accuracy = read_share(row.get("adversarial"))
            if eps is not None and accuracy is not None:
                key = Key(
                    "adversarial",
                    attack=safe_name(re.sub(r"-\d+$", "", row["attack"])),
                    norm=safe_name(row.get("norm")),
                    steps=safe_steps(row.get("attack_step") or ""),
                    eps=eps,
                )
                run.values[key] = 100 * accuracy
        elif row.get("t"):
            accuracy = read_share(row.get("accuracy"))
            if accuracy is not None:
                run.characteristic.append(100 * accuracy)
        else:
            for severity in range(1, SEVERITIES + 1):
                accuracy = read_share(row.get(f"severity_{severity}"))
                if accuracy is not None:
                    key = Key("corruptions", eps=severity)
                    corrupted.setdefault(key, []).append(100 * accuracy)
    for key, values in corrupted.items():
        run.values[key] = sum(values) / len(values)
    return run
