"""Read the results of a run folder. Files can be damaged or from other programs: values that cannot
be read are left out."""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data_utils import CORRUPTIONS, PUBLISHED, SEVERITIES
from experiment.config import LARGEST
from experiment.results.tables import read_eps, read_rows, read_settings, read_share
from experiment.results.values import Key, RunResults
from experiment.runs import checkpoint
from experiment.runs.files import number, parse_json, printable, read_text
from experiment.runs.folder import RunFolder
from experiment.text import format_value

NORMS = ("2", "inf")


def read_run(path: str | pathlib.Path) -> RunResults:
    """The results of a run folder, or of a file in one. Raises UserError if there is no run."""
    saved = checkpoint.open_saved(path, "evaluate")
    run = RunFolder(saved.path.parent)
    results = RunResults(saved.args)
    if saved.history.epochs:
        results.values[Key("clean")] = saved.history.epochs[-1]["test_acc"]
    _read_metrics(run, results)
    T1 = saved.args.get("T1")
    tables = sorted(
        run.folder.glob("Adversarial_Accuracy*.txt"), key=lambda path: (len(path.name), path.name)
    )
    for table in tables:
        for key, value in _read_sweep(run, table, T1).items():
            results.values.setdefault(key, value)
    for audit in sorted(run.folder.glob("Audit_*.json")):
        results.values |= _read_audit(audit, T1)
    results.values |= _read_corruptions(run.folder / "Corruption_Accuracy.txt", T1)
    results.characteristic = _read_characteristic(run.folder / "Characteristic_Time.txt")
    return results


def _read_metrics(run: RunFolder, results: RunResults) -> None:
    rows = run.read_csv("metrics.csv")
    epochs = []
    for row in rows:
        epoch = number(row.get("epoch"), 1, LARGEST)
        accuracy = number(row.get("test_acc"), 0, 100)
        if epoch is not None and accuracy is not None:
            epochs.append((int(epoch), accuracy))
    if len(epochs) == len(rows):
        results.epochs = epochs
    if rows:
        seconds = [number(row.get("seconds"), 0, LARGEST) for row in rows]
        results.values[Key("seconds")] = sum(filter(None, seconds), 0.0)


def _read_characteristic(path: pathlib.Path) -> list[float]:
    """Accuracies in % after 1, 2, ... free steps; [] if one of them cannot be read."""
    rows = read_rows(path)
    shares = [read_share(row[1]) for row in rows if len(row) > 1]
    accuracies = [100 * share for share in shares if share is not None]
    return accuracies if len(accuracies) == len(rows) else []


# ---- what a value depends on, as parts of the detail of a `Key`


def _join(parts: Iterable[str]) -> str:
    return printable(", ".join(parts))


def _plain(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that are numbers, short texts or lists of them."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, str):
            return len(value) <= 100
        return value is None or isinstance(value, (int, float))

    return {
        name: value
        for name, value in (settings or {}).items()
        if all(map(is_plain, value if isinstance(value, list) else [value]))
    }


def _images(settings: Mapping[str, Any]) -> list[str]:
    images = settings.get("images")
    return [f"{images} images"] if isinstance(images, int) else []


def _predictions(settings: Mapping[str, Any], T1: int | None) -> list[str]:
    """How predictions differ from T1 steps in fp32. T1: of the run."""
    parts = []
    steps = settings.get("predict_step") or settings.get("T1")
    if steps and T1 and steps != T1:
        parts.append(f"predicted after {steps} steps")
    if settings.get("tol"):
        parts.append(f"tol {settings['tol']}")
    if settings.get("precision") not in (None, "fp32"):
        parts.append(str(settings["precision"]))
    if settings.get("compile"):
        parts.append("compiled")
    return parts


def _budget(settings: Mapping[str, Any]) -> list[str]:
    """Iterations or queries of an attack, its restarts and its start."""
    budget = settings.get("budget")
    if not budget:
        budget = f"{settings.get('attack_iters', '?')} iterations"
        if settings.get("attack_restarts"):
            budget += f"; {settings['attack_restarts']} restarts"
    start = settings.get("attack_start", "zero")
    return [str(budget)] if start == "zero" else [str(budget), f"from {start}"]


def safe_name(text: Any) -> str:
    """The name of an attack or a gradient method, printable and of limited length."""
    return printable(text)[:100]


def safe_steps(text: str) -> str:
    """Numbers of time steps as text; "" for any other text."""
    return text if re.fullmatch(r"[0-9]{1,9}( [0-9]{1,9}){,19}", text) else ""


# ---- tables


def _read_sweep(run: RunFolder, path: pathlib.Path, T1: int | None) -> dict[Key, float]:
    """The accuracies of one attack sweep. path: of its .txt; T1: of the run."""
    settings = _plain(read_settings(path))
    norm = str(settings.get("attack_norm", ""))
    if norm not in NORMS:
        return {}
    all_steps = settings.get("attack_step", "")
    clipping = ["not clipped"] if settings.get("no_clip") else []
    detail = [*_budget(settings), *_images(settings), *clipping, *_predictions(settings, T1)]
    values: dict[Key, float] = {}
    for row in run.read_csv(f"{path.stem}.csv"):
        eps = read_eps(row.get("eps"))
        accuracy = read_share(row.get("adversarial"))
        if eps is None or accuracy is None:
            continue
        grad, _, steps = row.get("grad", "").partition("@")
        key = Key(
            "adversarial",
            safe_name(settings.get("attack", "")),
            norm,
            safe_name(grad),
            safe_steps(steps or format_value(all_steps)),
            eps,
            _join(detail),
        )
        values[key] = 100 * accuracy
    return values


def _read_audit(path: pathlib.Path, T1: int | None) -> dict[Key, float]:
    """The robust accuracy of one audit, and whether it is trusted. T1: of the run."""
    try:
        result = parse_json(read_text(path))
        _, norm, eps_text = path.stem.split("_")
        settings = _plain(result["settings"])
        eps = read_eps(eps_text)
        robust = read_share(result["robust"])
        if norm not in NORMS or not eps or robust is None:
            return {}
        detail = [str(settings["budget"]), *_images(result), *_predictions(settings, T1)]
        trusted = 100.0 * (result["trusted"] is True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    key = Key("audit", "audit", norm, eps=eps, detail=_join(detail))
    return {key: 100 * robust, key._replace(measure="audit trusted"): trusted}


def _read_corruptions(path: pathlib.Path, T1: int | None) -> dict[Key, float]:
    """Mean accuracies over sets of corruptions, at each severity and over severities. The sets are
    the first 15 and all 19, if complete, otherwise the rows of the table. T1: of the run."""
    rows = {name: list(map(read_share, shares[:SEVERITIES])) for name, *shares in read_rows(path)}
    rows = {name: shares for name, shares in rows.items() if shares and None not in shares}
    severities = max(map(len, rows.values()), default=0)
    rows = {name: shares for name, shares in rows.items() if len(shares) == severities}
    known = {f"first {len(PUBLISHED)}": PUBLISHED, f"all {len(CORRUPTIONS)}": CORRUPTIONS}
    sets = {name: names for name, names in known.items() if set(names) <= set(rows)}
    sets = sets or {f"{len(rows)} of {len(CORRUPTIONS)}": tuple(rows)}
    predictions = _predictions(_plain(read_settings(path)), T1)
    values: dict[Key, float] = {}
    for name, names in sets.items():
        detail = _join([f"{name} corruptions", *predictions])
        columns = zip(*(rows[corruption] for corruption in names))
        means = [100 * sum(column) / len(column) for column in columns]
        for severity, mean in enumerate(means, 1):
            values[Key("corruptions", eps=severity, detail=detail)] = mean
        if means:
            values[Key("corruptions", detail=detail)] = sum(means) / len(means)
    return values
