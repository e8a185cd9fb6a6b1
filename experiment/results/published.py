"""Read published accuracies, in the columns of the tables in check/published."""

import pathlib
import re
from collections.abc import Collection, Mapping

from ART_Timesteps_Addition.names import WITHOUT_GRADIENT
from data_utils import SEVERITIES, TASKS, UserError
from experiment.config import LEAST_EPS, MOST_EPS
from experiment.results.read import CORRUPTION_SETS
from experiment.results.values import STRONGEST, Group, Images, Key, RunResults, Value
from experiment.runs.files import number, printable, read_table, read_text, why
from experiment.text import name_path

COLUMNS = (
    "task, model, attack, norm, attack_step, eps, adversarial; t, accuracy; row, severity_1 ..."
)
LONGEST_TEXT = 100
LONGEST_CAVEAT = 1000

Rows = list[dict[str, str]]


def read_published(paths: Collection[str], tasks: Collection[str | None]) -> list[Group]:
    """The published results on these tasks, one group per model and task. Raises UserError."""
    groups: dict[str, Group] = {}
    for path in paths:
        caveat = _caveat(path)
        table = _read_table(path)
        rows = [row for row in table if not tasks or row.get("task") in tasks]
        several = len(tasks) > 1
        runs = _runs(rows, several)
        if not any(run.values for found in runs.values() for run in found):
            wanted = ", ".join(sorted(filter(None, tasks))) or "any task"
            problem = f"argument --published: {name_path(path)} has no results of {wanted}"
            others = sorted({row["task"] for row in table if row.get("task") in TASKS} - {*tasks})
            if others:
                raise UserError(f"{problem} (it has {', '.join(others)})")
            raise UserError(f"{problem} in the columns {COLUMNS}")
        for label, found in runs.items():
            group = groups.setdefault(label, Group(label, [], published=True))
            group.runs.extend(found)
            measures = sorted({key.measure for run in found for key in run.values})
            group.caveats += [(measure, caveat) for measure in measures if caveat]
    return list(groups.values())


def _read_table(path: str) -> Rows:
    try:
        return read_table(path)
    except (OSError, ValueError) as e:
        reason = why(e) if isinstance(e, OSError) else e
        raise UserError(
            f"argument --published: {name_path(path)} cannot be read: {reason}"
        ) from None


def _caveat(path: str) -> str:
    """How the results of TABLE.csv were measured, for captions: the text of TABLE.txt beside it."""
    try:
        text = read_text(pathlib.Path(path).with_suffix(".txt"))
    except (OSError, ValueError):
        return ""
    return printable(" ".join(text.split()))[:LONGEST_CAVEAT]


def _runs(rows: Rows, several_tasks: bool) -> dict[str, list[RunResults]]:
    """{label of model and task: results, one for each seed}."""
    of_seeds: dict[str, dict[str | None, Rows]] = {}
    for row in rows:
        label = f"published: {row.get('model') or 'EP-CNN'}"
        if several_tasks:
            label += f" on {row.get('task')}"
        seeds = of_seeds.setdefault(printable(label)[:LONGEST_TEXT], {})
        seeds.setdefault(row.get("seed"), []).append(row)
    return {
        label: [_results(label, seed, own) for seed, own in seeds.items()]
        for label, seeds in of_seeds.items()
    }


def _results(label: str, seed: str | None, rows: Rows) -> RunResults:
    """The results of one seed."""
    run = RunResults({"seed": seed})
    severities: list[list[float]] = []
    for row in rows:
        if row.get("attack"):
            _add_attack(run, row)
        elif row.get("t"):
            t = number(row["t"], 1, 1e9)
            accuracy = number(row.get("accuracy"), 0, 1)
            if t is not None and accuracy is not None:
                run.add(Key("characteristic", eps=t), Value(100 * accuracy))
        else:
            shares = [number(row.get(f"severity_{n}"), 0, 1) for n in range(1, SEVERITIES + 1)]
            known = [100 * share for share in shares if share is not None]
            if len(known) == SEVERITIES:
                severities.append(known)
    sets = {len(names): name for name, names in CORRUPTION_SETS.items()}
    if len(severities) in sets:
        for severity, column in enumerate(zip(*severities), 1):
            mean = sum(column) / len(column)
            run.add(Key("corruptions", sets[len(severities)], eps=severity), Value(mean))
    elif severities:
        run.notes.append(
            f"left out of {label}: {len(severities)} corruptions, which is no set of "
            f"{' or '.join(map(str, sets))}"
        )
    return run


def _add_attack(run: RunResults, row: Mapping[str, str]) -> None:
    eps = number(row.get("eps"), 0, MOST_EPS)
    accuracy = number(row.get("adversarial"), 0, 1)
    if eps is None or 0 < eps < LEAST_EPS or accuracy is None:
        return
    name = printable(row["attack"])[:LONGEST_TEXT]
    steps = row.get("attack_step") or ""
    steps = steps if re.fullmatch(r"[0-9]{1,9}", steps) else ""
    predicted = number(row.get("predict_step"), 1, 1e9)
    images = number(row.get("images"), 1, 1e9)
    parts = [name] if re.search(r"-\d+$", name) else []
    parts += [f"{images:.0f} images"] if images else []
    parts += [f"predicted after {predicted:.0f} steps"] if predicted else []
    key = Key(
        "adversarial",
        attack=re.sub(r"-\d+$", "", name),
        norm=printable(row.get("norm"))[:LONGEST_TEXT],
        grad=STRONGEST,
        steps=steps,
        eps=eps,
        detail=", ".join(parts),
        images=Images(printable(row.get("task"))[:LONGEST_TEXT]),
    )
    run.add(key, Value(100 * accuracy, _methods(key, has_steps=bool(predicted))))


def _methods(key: Key, has_steps: bool) -> frozenset[str]:
    """The gradient method of a published attack. has_steps: whether the model takes time steps."""
    if key.attack in WITHOUT_GRADIENT:
        return frozenset()
    if has_steps or key.steps:
        return frozenset({f"bptt@{key.steps or '?'}"})
    return frozenset({"bptt"})
