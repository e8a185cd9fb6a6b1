"""What the folder of a run, or a published table, says of its accuracies; where it says nothing
there is a gap."""

import csv
import dataclasses
import re
from typing import NamedTuple

from data_utils import CORRUPTIONS, PUBLISHED, SEVERITIES, UserError
from experiment.arguments import named, shown
from experiment.flags import ALL, LARGEST
from experiment.report import read_eps, settings_of
from experiment.runs import checkpoint
from experiment.runs.files import TEXT, number, parse_json, printable, read_text
from experiment.runs.folder import RunFolder

NORMS = ("2", "inf")
PLACES = (
    "seed",
    "data_dir",
    "corruptions_dir",
    "deterministic",
)  # arguments that runs of one group may differ in
NOT_OF_TRAINING = {
    "attack",
    "audit",
}  # of --todo: flags of these alone say nothing of how a run was trained


def of_training(args):
    """{dest: value} of the arguments that say how a run was trained, but for its seed. args: {dest:
    value}."""
    return {
        flag.dest: args.get(flag.dest, flag.default)
        for flag in ALL
        if flag.scope != "session"
        and flag.dest not in PLACES
        and not (flag.todos and set(flag.todos) <= NOT_OF_TRAINING)
    }


class Key(NamedTuple):
    """Which number: what is measured, and of attacks how. steps: time steps that gradients go
    through; detail: budget and other settings, in words."""

    measure: str
    attack: str = ""
    norm: str = ""
    grad: str = ""
    steps: str = ""
    eps: float = 0.0
    detail: str = ""


@dataclasses.dataclass
class Measured:
    """The numbers of one run: args, {dest: value}; values: {Key: in %, of `seconds` in s}; epochs:
    [(epoch, test accuracy in %)]; settling: accuracy in % after 1, 2, ... free steps."""

    args: dict
    values: dict = dataclasses.field(default_factory=dict)
    epochs: list = dataclasses.field(default_factory=list)
    settling: list = dataclasses.field(default_factory=list)


def read_run(path):
    """The `Measured` of a run folder, or of a file in one. Raises UserError where there is no
    run."""
    saved = checkpoint.open_saved(path, "evaluate")
    run, found = RunFolder(saved.path.parent), Measured(saved.args)
    if saved.history.epochs:
        found.values[Key("clean")] = saved.history.epochs[-1]["test_acc"]
    rows = [
        (
            number(row.get("epoch"), 1, LARGEST),
            number(row.get("test_acc"), 0, 100),
            number(row.get("seconds"), 0, LARGEST),
        )
        for row in run.read_csv("metrics.csv")
    ]
    if not any(None in (epoch, accuracy) for epoch, accuracy, _ in rows):
        found.epochs = [(int(epoch), accuracy) for epoch, accuracy, _ in rows]
    if rows:
        found.values[Key("seconds")] = sum(seconds or 0.0 for *_, seconds in rows)
    for text in sorted(
        run.folder.glob("Adversarial_Accuracy*.txt"), key=lambda path: (len(path.name), path.name)
    ):
        for key, value in _sweep(run, text, saved.args.get("T1")).items():
            found.values.setdefault(key, value)
    for path in sorted(run.folder.glob("Audit_*.json")):
        found.values.update(_audit(path, saved.args.get("T1")))
    found.values.update(_corruptions(run.folder / "Corruption_Accuracy.txt", saved.args.get("T1")))
    found.settling = _column(run.folder / "Characteristic_Time.txt")
    return found


def _share(text):
    return number(text, 0, 1)


def _of_images(told):
    """On how many images a number is, in words; nothing where that is not told."""
    return f", {told['images']} images" if isinstance(told.get("images"), int) else ""


def _computed(told, T1):
    """How a number was computed, in words: what differs from the T1 steps of the run in fp32."""
    steps, precision, tol = told.get("predict_step"), told.get("precision"), told.get("tol")
    steps = steps or told.get("T1")
    return (
        f", predicted after {steps} steps" * (bool(steps and T1) and steps != T1)
        + f", tol {tol}" * bool(tol)
        + f", {precision}" * (precision not in (None, "fp32"))
        + ", compiled" * bool(told.get("compile"))
    )


def _plain(settings):
    """Those settings of a table that are numbers, short texts or lists of them."""

    def is_plain(value):
        values = value if isinstance(value, list) else [value]
        return all(
            one is None or isinstance(one, (int, float)) or isinstance(one, str) and len(one) <= 100
            for one in values
        )

    return {name: value for name, value in (settings or {}).items() if is_plain(value)}


def _sweep(run, path, T1):
    """The rows of one attack sweep. T1: of the run."""
    told, found = _plain(settings_of(path)), {}
    steps, several = told.get("attack_step", ""), isinstance(told.get("attack_step"), list)
    restarts = told.get("attack_restarts")
    budget = str(
        told.get("budget")
        or f"{told.get('attack_iters', '?')} iterations" + f"; {restarts} restarts" * bool(restarts)
    )
    if told.get("attack_start", "zero") != "zero":
        budget += f", from {told['attack_start']}"
    detail = (
        budget
        + _of_images(told)
        + ", not clipped" * bool(told.get("no_clip"))
        + _computed(told, T1)
    )
    norm = str(told.get("attack_norm", ""))
    for row in run.read_csv(f"{path.stem}.csv"):
        eps, adversarial = read_eps(row.get("eps")), _share(row.get("adversarial"))
        if None not in (eps, adversarial) and norm in NORMS:
            grad, _, through = row.get("grad", "").partition("@")
            own = _steps(through or shown(steps if several else [steps]))
            found[
                Key(
                    "adversarial",
                    _word(told.get("attack", "")),
                    norm,
                    _word(grad),
                    own,
                    eps,
                    printable(detail),
                )
            ] = 100 * adversarial
    return found


def _word(text):
    """The name of an attack or a gradient method, safe to print and of limited length."""
    return printable(text)[:100]


def _steps(text):
    """Numbers of time steps as text; "" for any other text."""
    return text if re.fullmatch(r"[0-9]{1,9}( [0-9]{1,9}){,19}", text) else ""


def _audit(path, T1):
    """The result of one audit. T1: of the run."""
    try:
        result = parse_json(read_text(path))
        _, norm, eps = path.stem.split("_")
        told = _plain(result["settings"])
        eps, robust = read_eps(eps), _share(result["robust"])
        if norm not in NORMS or not eps or robust is None:
            return {}
        detail = str(told["budget"]) + _of_images(result) + _computed(told, T1)
        key = Key("audit", "audit", norm, eps=eps, detail=printable(detail))
        trusted = 100.0 * (result["trusted"] is True)
        return {key: 100 * robust, key._replace(measure="audit trusted"): trusted}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _corruptions(path, T1):
    """The rows of a table of corruptions: at each severity the mean over the first 15 corruptions,
    and that over all, where the table has them, else over those that it has; and the means of these
    over the severities. T1: of the run."""
    shares = {name: [_share(word) for word in words[:SEVERITIES]] for name, *words in _rows(path)}
    shares = {name: row for name, row in shares.items() if row and None not in row}
    most, found = max(map(len, shares.values()), default=0), {}
    shares = {name: row for name, row in shares.items() if len(row) == most}
    sets = {f"first {len(PUBLISHED)}": PUBLISHED, f"all {len(CORRUPTIONS)}": CORRUPTIONS}
    sets = {words: names for words, names in sets.items() if set(names) <= set(shares)}
    told = _computed(_plain(settings_of(path)), T1)
    for words, names in (sets or {f"{len(shares)} of {len(CORRUPTIONS)}": shares}).items():
        detail = printable(f"{words} corruptions{told}")
        columns = zip(*(shares[name] for name in names))
        means = [100 * sum(column) / len(column) for column in columns]
        found |= {
            Key("corruptions", eps=severity, detail=detail): mean
            for severity, mean in enumerate(means, 1)
        }
        found |= {Key("corruptions", detail=detail): sum(means) / len(means)} if means else {}
    return found


def _rows(path):
    """The words of each line of a table that is no comment."""
    try:
        return [
            line.split()
            for line in read_text(path).splitlines()
            if line.strip() and line[:1] != "#"
        ]
    except (OSError, ValueError):
        return []


def _column(path):
    shares = [_share(row[1] if len(row) > 1 else None) for row in _rows(path)]
    return [] if None in shares else [100 * share for share in shares]


# --------------------------------------------------------------------------------- published tables


def read_published(path, tasks):
    """{label: [Measured, one for each seed]} of a table in the columns of check/published, those of
    the `tasks`. Raises UserError."""
    try:
        with open(path, newline="", **TEXT) as file:
            rows = [row for row in csv.DictReader(file) if not tasks or row.get("task") in tasks]
    except (OSError, csv.Error) as e:
        raise UserError(f"argument --published: {named(path)} cannot be read: {e}") from None
    groups = {}
    for row in rows:
        label = printable(f"published: {row.get('model') or 'EP-CNN'}")
        run = groups.setdefault(label, {}).setdefault(
            row.get("seed"), Measured({"task": row.get("task")})
        )
        _published_row(row, run)
    if not any(run.values or run.settling for group in groups.values() for run in group.values()):
        known = "task, model, attack, norm, attack_step, eps, adversarial; t, accuracy; row, severity_1 ..."
        raise UserError(
            f"argument --published: {named(path)} has nothing of {', '.join(sorted(tasks)) or 'any task'} "
            f"in the columns {known}"
        )
    return {label: [_with_mean(run) for run in seeds.values()] for label, seeds in groups.items()}


def _published_row(row, run):
    if row.get("attack"):
        eps, adversarial = read_eps(row.get("eps")), _share(row.get("adversarial"))
        if None not in (eps, adversarial):
            attack = _word(re.sub(r"-\d+$", "", row["attack"]))
            run.values[
                Key(
                    "adversarial",
                    attack,
                    _word(row.get("norm")),
                    eps=eps,
                    steps=_steps(row.get("attack_step") or ""),
                )
            ] = 100 * adversarial
    elif row.get("t"):
        value = _share(row.get("accuracy"))
        run.settling += [] if value is None else [100 * value]
    else:
        for severity in range(1, 6):
            value = _share(row.get(f"severity_{severity}"))
            if value is not None:
                run.values.setdefault(Key("corruptions", eps=severity), []).append(100 * value)


def _with_mean(run):
    """The run whose lists of corruptions are means."""
    run.values = {
        key: sum(value) / len(value) if isinstance(value, list) else value
        for key, value in run.values.items()
    }
    return run
