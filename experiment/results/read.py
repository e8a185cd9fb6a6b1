"""Read the results of a run: its training, and its records of the weights that are compared.

Records can be edited by hand: values that cannot be read are left out."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ART_Timesteps_Addition.names import NORMS, WITHOUT_GRADIENT
from data_utils import CORRUPTIONS, PUBLISHED, SEVERITIES
from experiment.config import (
    BY_DEST,
    FINGERPRINTS,
    LARGEST,
    LEAST_EPS,
    MOST_EPS,
    RESUMED,
    Config,
    training_identity,
)
from experiment.results import settings
from experiment.results.record import Record, unpack
from experiment.results.store import Store
from experiment.results.values import RECORDED, STRONGEST, Images, Key, RunResults, Value
from experiment.runs import checkpoint
from experiment.runs.checkpoint import SavedRun
from experiment.runs.files import number, printable
from experiment.runs.folder import fingerprint
from experiment.runs.history import chosen_by
from experiment.text import count, format_value, listed, name_path

LONGEST_TEXT = 100  # characters of a text from a record
MOST_METHODS = 100  # gradient methods of one record

KINDS = {  # of records that are compared: how they are called
    "evaluate": "evaluation",
    "attack": "attack result",
    "audit": "audit",
    "corruption": "corruption result",
    "characteristic": "characteristic",
}

# Settings that have a column of their own in the tables
COLUMNS = ("attack", "norm", "eps", "corruption", "T1")
# Settings of how an attack searches: over these, the strongest result counts
OF_SEARCH = ("gradient", "gradients", "steps", "start", "smooth", "ends_early")
# Settings that every row names, and how
BUDGET = {
    "budget": "{}",
    "iters": "{} iterations",
    "queries": "{} queries",
    "restarts": "{} restarts",
}
# Settings that a row names where they are not the run's own, and how
DEVIATIONS = {
    "predict_step": "predicted after {} steps",
    "tol": "tol {}",
    "mbs": "mini-batches of {}",
    "precision": "{}",
    "compile": "compile {}",
    "clip": "clip {}",
    "seed": "attack seed {}",
}
SWITCHES = {("clip", False): "not clipped", ("compile", True): "compiled"}
CORRUPTION_SETS = {
    f"first {len(PUBLISHED)} corruptions": PUBLISHED,
    f"all {len(CORRUPTIONS)} corruptions": CORRUPTIONS,
}
OF_PREDICTION = ("predict_step", "tol", "mbs", "precision", "compile")


class Corrupted(NamedTuple):
    """The accuracies under a corruption in %, one for each severity. fingerprint: of its images."""

    name: str
    fingerprint: str
    accuracy: list[float]


def read_run(path: str | pathlib.Path) -> RunResults:
    """The results of a run folder, or of a file in one. Raises UserError if there is no run."""
    saved = checkpoint.open_saved(path, "evaluate")
    folder = saved.path.parent
    run = RunResults(saved.args, folder=str(folder.resolve()), weights=fingerprint(saved.weights))
    _add_training(run, saved)
    name = printable(name_path(path))
    records = [record for record in Store(folder).records if record.kind in KINDS]
    own = [record for record in records if record.model.get("weights") == run.weights]
    others = [record for record in records if record.model.get("weights") != run.weights]
    if others:
        left_out = _describe_others(others, len(saved.history.epochs))
        run.notes.append(f"left out of {name}: {left_out}")
    _add_records(run, own)
    measured = {record.settings.get("corruption") for record in own if record.kind == "corruption"}
    is_shown = any(key.measure == "corruptions" for key in run.values)
    if measured and not is_shown and len(measured) < len(CORRUPTIONS):
        run.notes.append(
            f"left out of {name}: {len(measured)} of {len(CORRUPTIONS)} corruptions, whose mean "
            "would be one over another set"
        )
    return run


def _describe_others(records: Sequence[Record], epoch: int) -> str:
    """What is left out because it is of other weights than the compared model, one line."""
    kinds = [record.kind for record in records]
    counts = [count(kinds.count(kind), name) for kind, name in KINDS.items() if kind in kinds]
    epochs = {number(record.model.get("epoch"), 0, LARGEST) for record in records}
    known = sorted(value for value in epochs if value is not None)
    of = f"epoch {', '.join(f'{value:g}' for value in known[:10])}" if known else "epoch unknown"
    return f"{listed(counts)} of other weights ({of}; the model is of epoch {epoch})"


# ---- training


def _add_training(run: RunResults, saved: SavedRun) -> None:
    """Add what a run's training measured, and what identifies it."""
    chosen = chosen_by(saved.path.name, saved.args)
    history = saved.history
    whole = saved.path.with_name("checkpoint.tar")
    if saved.path.name != whole.name and whole.exists():
        history = checkpoint.open_saved(whole, "evaluate").history
    epochs = history.epochs[: len(saved.history.epochs) if chosen == "last" else None]
    run.identity = {
        **training_identity(saved.args),
        "epochs": len(epochs),
        "chosen_on": chosen,
        "resumed": "unknown"
        if history.resumptions is None
        else history.changed_training(len(epochs)) or "never",
        **{name: saved.args.get(name) for name in FINGERPRINTS},
    }
    for row in epochs:
        run.add(Key("training", eps=row["epoch"]), Value(row["test_acc"]))
    seconds = [row["seconds"] for row in epochs if row["seconds"] != ""]
    if seconds:
        run.add(Key("seconds"), Value(sum(seconds)))
    if saved.history.epochs:
        size = saved.args.get("test_size") or 0  # 0: all images of the task
        data = str(saved.args.get("test_data") or "")
        images = Images(str(saved.args.get("task")), "test", size, data)
        detail = f"{RECORDED}, {count(size, 'image')}" if size else RECORDED
        accuracy = Value(saved.history.epochs[-1]["test_acc"])
        run.add(Key("clean", detail=detail, images=images), accuracy)


# ---- settings of records


def _usual(args: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a measurement that names none of them: what a run's training determines.
    args: {dest: value} of the run."""
    identity = {**training_identity(args), "seed": args.get("seed")}
    training = {dest: value for dest, value in identity.items() if BY_DEST[dest].scope != RESUMED}
    config = Config.from_flat(training)
    return {
        **settings.prediction(config, config.learning.T1),
        "seed": config.session.seed or 0,
        "clip": True,
    }


def _text(value: Any) -> str:
    """A value from a record as a text of limited length."""
    return printable(format_value(value))[:LONGEST_TEXT]


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _key(record: Record, usual: Mapping[str, Any], measure: str, **columns: Any) -> Key:
    """The key of a record's value. usual: of `_usual`; columns: further fields.

    A setting that a record of an earlier version does not contain had its usual value: that version
    had no such setting."""
    budget = {name: value for name in BUDGET if (value := record.settings.get(name))}
    deviating = {
        name: value
        for name, value in record.settings.items()
        if name not in (*COLUMNS, *OF_SEARCH, *BUDGET)
        and not (name in usual and value in (usual[name], None))
    }
    attack = record.settings.get("attack")
    if attack == "fgsm" or budget.get("queries") and attack in WITHOUT_GRADIENT:
        budget.pop("iters", None)
    images = _images(record)
    parts = [BUDGET[name].format(_text(value)) for name, value in budget.items()]
    parts = ["1 restart" if part == "1 restarts" else part for part in parts]
    if record.kind == "audit" and record.settings.get("surrogate"):
        parts.append("with a surrogate")
    parts.append(count(images.number, "image"))
    for name, form in DEVIATIONS.items():
        if name in deviating:
            value = deviating[name]
            is_switch = isinstance(value, bool) and (name, value) in SWITCHES
            parts.append(SWITCHES[name, value] if is_switch else form.format(_text(value)))
    predicted = {name: deviating[name] for name in OF_PREDICTION if name in deviating}
    return Key(
        measure,
        detail=", ".join(parts),
        images=images,
        predicted=_json(predicted),
        rest=_json({**budget, **deviating}),
        **columns,
    )


def _images(record: Record) -> Images:
    data = record.data
    n = number(data.get("images"), 0, LARGEST)
    return Images(
        task=_text(data.get("task") or ""),
        split=_text(data.get("split") or ""),
        number=int(n or 0),
        fingerprint=_text(data.get("fingerprint") or ""),
    )


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [_text(value) for value in values[:MOST_METHODS]]


def _methods(record: Record) -> frozenset[str]:
    """The gradient methods of an attack, such as `bptt@29`; none for attacks without gradients."""
    own = record.settings
    gradients = _texts(own.get("gradient", ""))
    if gradients == [settings.NO_GRADIENT]:
        return frozenset()
    if gradients == [settings.WORST]:
        gradients = _texts(own.get("gradients", ""))
    steps = [
        f"@{steps}" if steps not in ("0", "") else "" for steps in _texts(own.get("steps", ""))
    ]
    start = _start(record)
    return frozenset(f"{gradient}{step}{start}" for gradient in gradients for step in steps)


def _start(record: Record) -> str:
    """The start of an attack's time steps, if it is not the usual one, as text."""
    start = record.settings.get("start")
    return "" if start in (None, "zero") else f" from {_text(start)}"


# ---- values of records


def _share(value: Any) -> float | None:
    return number(value, 0, 1)


def _value(
    record: Record, share: float, methods: frozenset[str] = frozenset(), outcomes: Any = None
) -> Value:
    """The value of a record. share: as measured; outcomes: as the record contains them."""
    images = _images(record).number
    return Value(
        100 * share,
        methods,
        unpack(outcomes, images),
        _share(record.value.get("masked")) or 0.0,
        unpack(record.value.get("masked_outcomes"), images),
        _share(record.model.get("converged")),
    )


def _add_records(run: RunResults, records: Sequence[Record]) -> None:
    """Add the values of records of the run's own weights."""
    usual = _usual(run.args)
    corrupted = []
    clean: dict[Key, Value] = {}  # of attacks without an evaluation of the same images
    for record in records:
        value = record.value
        if record.kind == "evaluate" and record.data.get("split") == "test":
            share = _share(value.get("accuracy"))
            if share is not None:
                own = _value(record, share, outcomes=value.get("outcomes"))
                run.add(_key(record, usual, "clean"), own)
        elif record.kind == "attack":
            _add_attack(run, record, usual)
        elif record.kind == "audit":
            _add_audit(run, record, usual)
        elif record.kind == "corruption":
            corrupted.append(record)
        elif record.kind == "characteristic":
            shares = value.get("accuracy")
            for t, share in enumerate(map(_share, shares if isinstance(shares, list) else []), 1):
                if share is not None:
                    run.add(_key(record, usual, "characteristic", eps=t), Value(100 * share))
        if record.kind in ("attack", "audit"):
            share = _share(record.data.get("clean"))
            if share is not None:
                clean[_clean_key(record, usual)] = Value(100 * share)
    for key, accuracy in clean.items():
        if key not in run.values:
            run.add(key, accuracy)
    _add_corruptions(run, corrupted, usual)


def _clean_key(record: Record, usual: Mapping[str, Any]) -> Key:
    """The key of the clean accuracy on the images of an attack, with its predictions."""
    own = {name: record.settings[name] for name in OF_PREDICTION if name in record.settings}
    evaluation = Record("evaluate", record.model, record.data, own, {})
    return _key(evaluation, usual, "clean")


def _norm_and_eps(record: Record) -> dict[str, Any] | None:
    """The columns of norm and eps; None if they are no such values."""
    norm = record.settings.get("norm")
    eps = number(record.settings.get("eps"), 0, MOST_EPS)
    valid = norm in NORMS and eps is not None and (eps == 0 or eps >= LEAST_EPS)
    return {"norm": norm, "eps": eps} if valid else None


def _add_attack(run: RunResults, record: Record, usual: Mapping[str, Any]) -> None:
    share = _share(record.value.get("adversarial"))
    columns = _norm_and_eps(record)
    if share is None or columns is None:
        return
    methods = _methods(record)
    columns["attack"] = _text(record.settings.get("attack"))
    value = _value(record, share, methods, record.value.get("outcomes"))
    key = _key(record, usual, "adversarial", **columns)
    run.add(key._replace(grad=STRONGEST if methods else ""), value)
    gradient = _text(record.settings.get("gradient"))
    if methods and gradient != settings.WORST:
        steps = _text(record.settings.get("steps") or "")
        of_gradient = {name: record.settings.get(name) for name in ("start", "smooth")}
        rest = _json({**json.loads(key.rest), **of_gradient})
        detail = key.detail + (f",{_start(record)}" if _start(record) else "")
        run.add(key._replace(grad=gradient, steps=steps, detail=detail, rest=rest), value)


def _add_audit(run: RunResults, record: Record, usual: Mapping[str, Any]) -> None:
    share = _share(record.value.get("robust"))
    columns = _norm_and_eps(record)
    if share is None or columns is None:
        return
    search = {name: record.settings[name] for name in OF_SEARCH if name in record.settings}
    methods = frozenset({_json(search)[:LONGEST_TEXT]})
    key = _key(record, usual, "audit", attack="audit", **columns)
    run.add(key, _value(record, share, methods, record.value.get("outcomes")))
    trusted = 100.0 * (record.value.get("trusted") is True)
    run.add(key._replace(measure="audit trusted"), Value(trusted, methods))


def _add_corruptions(run: RunResults, records: Sequence[Record], usual: Mapping[str, Any]) -> None:
    """Add the mean accuracies over complete sets of corruptions, at each severity and over all of
    them: the first 15, as published means are, and all 19."""
    measured: dict[Key, list[Corrupted]] = {}
    mixed: set[str] = set()
    for record in records:
        shares = record.value.get("accuracy")
        shares = [_share(share) for share in shares] if isinstance(shares, list) else []
        known = [100 * share for share in shares if share is not None]
        if len(known) == len(shares) == SEVERITIES:
            key = _key(record, usual, "corruptions")
            same_images = key._replace(images=key.images._replace(fingerprint=""))
            name = _text(record.settings.get("corruption"))
            corrupted = Corrupted(name, key.images.fingerprint, known)
            measured.setdefault(same_images, []).append(corrupted)
    for key, rows in measured.items():
        for label, names in CORRUPTION_SETS.items():
            complete, others = _sets_of_corruptions(rows, names)
            mixed |= others
            for found in complete:
                data = _json({name: found[name].fingerprint for name in names})
                data = hashlib.sha256(data.encode()).hexdigest()[:16]
                own = key._replace(attack=label, images=key.images._replace(fingerprint=data))
                columns = zip(*(found[name].accuracy for name in names))
                means = [sum(column) / len(names) for column in columns]
                for severity, mean in enumerate(means, 1):
                    run.add(own._replace(eps=severity), Value(mean))
                run.add(own, Value(sum(means) / len(means)))
    if mixed:
        run.notes.append(
            f"left out of {printable(run.folder)}: means over corruptions with several sets of "
            f"images, one of which is incomplete ({count(len(mixed), 'corruption')}: "
            f"{', '.join(sorted(mixed)[:3])}{' ...' if len(mixed) > 3 else ''})"
        )


def _sets_of_corruptions(
    rows: Sequence[Corrupted], names: Sequence[str]
) -> tuple[list[dict[str, Corrupted]], set[str]]:
    """(the records of all `names` from one folder of corrupted images, for each folder; corruptions
    in a set that is incomplete beside others). rows: in the order in which they were measured.

    Records do not name the folder. Other images of a corruption that is in a set already begin
    another set; where the set before is incomplete, what follows may belong to either."""
    sets: list[dict[str, Corrupted]] = []
    for row in rows:
        if row.name not in names:
            continue
        known = sets[-1].get(row.name) if sets else None
        if not sets or known and known.fingerprint != row.fingerprint:
            if sets and len(sets[-1]) < len(names):
                return sets[:-1], {row.name for row in rows if row.name in names}
            sets.append({})
        sets[-1][row.name] = row
    complete = [found for found in sets if len(found) == len(names)]
    return complete, set(sets[-1]) if len(sets) > len(complete) > 0 else set()
