"""What the folder of a run, or a published table, says of its accuracies; where it says nothing there is a gap."""
import csv
import dataclasses
import json
import re
from typing import NamedTuple

from data_utils import CORRUPTIONS, PUBLISHED, UserError
from experiment import checkpoints
from experiment.arguments import named, shown
from experiment.files import TEXT
from experiment.flags import ALL
from experiment.report import settings_of
from experiment.run_folder import RunFolder

PLACES = ("seed", "data_dir", "corruptions_dir", "deterministic")  # arguments that runs of one group may differ in
NOT_OF_TRAINING = {"attack", "audit"}  # of --todo: flags of these alone say nothing of how a run was trained


def of_training(args):
    """{dest: value} of the arguments that say how a run was trained, but for its seed. args: {dest: value}."""
    return {flag.dest: args.get(flag.dest, flag.default) for flag in ALL
            if flag.scope != "session" and flag.dest not in PLACES
            and not (flag.todos and set(flag.todos) <= NOT_OF_TRAINING)}


class Key(NamedTuple):
    """Which number: what is measured, and of attacks how. steps: time steps that gradients go through; detail: budget
    and other settings, in words."""

    measure: str
    attack: str = ""
    norm: str = ""
    grad: str = ""
    steps: str = ""
    eps: float = 0.0
    detail: str = ""


@dataclasses.dataclass
class Measured:
    """The numbers of one run: args, {dest: value}; values: {Key: in %, of `seconds` in s}; epochs: [(epoch, test
    accuracy in %)]; settling: accuracy in % after 1, 2, ... free steps."""

    args: dict
    values: dict = dataclasses.field(default_factory=dict)
    epochs: list = dataclasses.field(default_factory=list)
    settling: list = dataclasses.field(default_factory=list)


def read_run(path):
    """The `Measured` of a run folder, or of a file in one. Raises UserError where there is no run."""
    saved = checkpoints.open_saved(path, "evaluate")
    run, found = RunFolder(saved.path.parent), Measured(saved.args)
    if saved.story.history:
        found.values[Key("clean")] = saved.story.history[-1]["test_acc"]
    rows = [(_number(row.get("epoch")), _number(row.get("test_acc")), _number(row.get("seconds")))
            for row in run.read_csv("metrics.csv")]
    found.epochs = [(int(epoch), accuracy) for epoch, accuracy, _ in rows if None not in (epoch, accuracy)]
    if rows:
        found.values[Key("seconds")] = sum(seconds or 0.0 for *_, seconds in rows)
    for text in sorted(run.folder.glob("Adversarial_Accuracy*.txt"), key=lambda path: (len(path.name), path.name)):
        for key, value in _sweep(run, text, saved.args.get("T1")).items():
            found.values.setdefault(key, value)
    for path in sorted(run.folder.glob("Audit_*.json")):
        found.values.update(_audit(path, saved.args.get("T1")))
    found.values.update(_corruptions(run.folder / "Corruption_Accuracy.txt", saved.args.get("T1")))
    found.settling = _column(run.folder / "Characteristic_Time.txt")
    return found


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _of_images(told):
    """On how many images a number is, in words; nothing where that is not told."""
    return f", {told['images']} images" if "images" in told else ""


def _computed(told, T1):
    """How a number was computed, in words: what differs from the T1 steps of the run in fp32."""
    steps, precision, tol = told.get("predict_step"), told.get("precision"), told.get("tol")
    steps = steps or told.get("T1")
    return (f", predicted after {steps} steps" * (bool(steps and T1) and steps != T1)
            + f", tol {tol}" * bool(tol) + f", {precision}" * (precision not in (None, "fp32"))
            + ", compiled" * bool(told.get("compile")))


def _sweep(run, path, T1):
    """The rows of one attack sweep. T1: of the run."""
    told, found = settings_of(path) or {}, {}
    steps, several = told.get("attack_step", ""), isinstance(told.get("attack_step"), list)
    restarts = told.get("attack_restarts")
    budget = str(told.get("budget") or f"{told.get('attack_iters', '?')} iterations"
                 + f"; {restarts} restarts" * bool(restarts))
    if told.get("attack_start", "zero") != "zero":
        budget += f", from {told['attack_start']}"
    detail = (budget + _of_images(told) + ", not clipped" * bool(told.get("no_clip"))
              + _computed(told, T1))
    for row in run.read_csv(f"{path.stem}.csv"):
        eps, adversarial = _number(row.get("eps")), _number(row.get("adversarial"))
        if None not in (eps, adversarial):
            grad, _, through = row.get("grad", "").partition("@")
            own = through or shown(steps if several else [steps])
            found[Key("adversarial", str(told.get("attack", "")), str(told.get("attack_norm", "")), grad, own, eps,
                      detail)] = 100 * adversarial
    return found


def _audit(path, T1):
    """The result of one audit. T1: of the run."""
    try:
        result = json.loads(path.read_text(**TEXT))
        _, norm, eps = path.stem.split("_")
        told = result["settings"]
        detail = told["budget"] + _of_images(result) + _computed(told, T1)
        key = Key("audit", "audit", norm, eps=float(eps), detail=detail)
        return {key: 100 * float(result["robust"]),
                key._replace(measure="audit trusted"): 100.0 * bool(result["trusted"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _corruptions(path, T1):
    """The rows of a table of corruptions: at each severity the mean over the first 15 corruptions,
    and that over all, where the table has them, else over those that it has; and the means of these
    over the severities. T1: of the run."""
    shares = {name: [100 * share for share in map(_number, words) if share is not None]
              for name, *words in _rows(path)}
    most = max(map(len, shares.values()), default=0)
    shares, found = {name: row for name, row in shares.items() if row and len(row) == most}, {}
    sets = {f"first {len(PUBLISHED)}": PUBLISHED, f"all {len(CORRUPTIONS)}": CORRUPTIONS}
    sets = {words: names for words, names in sets.items() if set(names) <= set(shares)}
    for words, names in (sets or {f"{len(shares)} of {len(CORRUPTIONS)}": shares}).items():
        detail = f"{words} corruptions{_computed(settings_of(path) or {}, T1)}"
        means = [sum(column) / len(column) for column in zip(*(shares[name] for name in names))]
        found |= {Key("corruptions", eps=severity, detail=detail): mean
                  for severity, mean in enumerate(means, 1)}
        found |= {Key("corruptions", detail=detail): sum(means) / len(means)} if means else {}
    return found


def _rows(path):
    """The words of each line of a table that is no comment."""
    try:
        return [line.split() for line in path.read_text(**TEXT).splitlines() if line.strip() and line[:1] != "#"]
    except OSError:
        return []


def _column(path):
    return [100 * value for row in _rows(path) for value in [_number(row[1] if len(row) > 1 else None)]
            if value is not None]


# -------------------------------------------------------------------------------------------------- published tables


def read_published(path, tasks):
    """{label: [Measured, one for each seed]} of a table in the columns of check/published, those of the `tasks`. Raises
    UserError."""
    try:
        with open(path, newline="", **TEXT) as file:
            rows = [row for row in csv.DictReader(file) if not tasks or row.get("task") in tasks]
    except (OSError, csv.Error) as e:
        raise UserError(f"argument --published: {named(path)} cannot be read: {e}") from None
    groups = {}
    for row in rows:
        label = f"published: {row.get('model') or 'EP-CNN'}"
        run = groups.setdefault(label, {}).setdefault(row.get("seed"), Measured({"task": row.get("task")}))
        _published_row(row, run)
    if not any(run.values or run.settling for group in groups.values() for run in group.values()):
        known = "task, model, attack, norm, attack_step, eps, adversarial; t, accuracy; row, severity_1 ..."
        raise UserError(f"argument --published: {named(path)} has nothing of {', '.join(sorted(tasks)) or 'any task'} "
                        f"in the columns {known}")
    return {label: [_with_mean(run) for run in seeds.values()] for label, seeds in groups.items()}


def _published_row(row, run):
    if row.get("attack"):
        eps, adversarial = _number(row.get("eps")), _number(row.get("adversarial"))
        if None not in (eps, adversarial):
            run.values[Key("adversarial", re.sub(r"-\d+$", "", row["attack"]), str(row.get("norm")),
                           steps=row.get("attack_step") or "", eps=eps)] = 100 * adversarial
    elif row.get("t"):
        value = _number(row.get("accuracy"))
        run.settling += [] if value is None else [100 * value]
    else:
        for severity in range(1, 6):
            value = _number(row.get(f"severity_{severity}"))
            if value is not None:
                run.values.setdefault(Key("corruptions", eps=severity), []).append(100 * value)


def _with_mean(run):
    """The run whose lists of corruptions are means."""
    run.values = {key: sum(value) / len(value) if isinstance(value, list) else value
                  for key, value in run.values.items()}
    return run
