"""Read the tables of earlier versions, which had no results.jsonl, as records.

Such a table contains the settings of its rows, in a header `# settings: {...}`, an audit in its
JSON. A table with other settings was renamed to NAME_1, NAME_2 ... before the next one was written.

The settings of a record are those that the same command has today, so that it finds the result. A
setting that a table does not contain is None, which matches any value, see `Record.answers`. Files
can come from anywhere: what they contain is validated."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_utils import CORRUPTIONS, UserError, one_line
from experiment.command_line import validate_saved
from experiment.config import FLAGS, LARGEST, MOST_EPS, Config
from experiment.results import settings
from experiment.results.record import Record
from experiment.results.tables import HEADER, read_eps, read_share
from experiment.runs import checkpoint
from experiment.runs.contents import LARGEST_FLOAT, is_number
from experiment.runs.files import number, parse_json, printable, read_text
from experiment.runs.history import chosen_by
from experiment.text import describe

LONGEST_TABLE = 2**22  # characters
LONGEST_HEADER = 10_000  # characters
MOST_ROWS = 10_000  # that are read of a table
MOST_GRADIENTS = 100  # gradient methods times numbers of time steps

# Settings that not all tables contain: the names that each is recorded by
RECORDED_AS = {
    "mbs": ("mbs",),
    "compile": ("compile",),
    "predict_step": ("predict_step", "T1"),
    "clip": ("no_clip",),
    "start": ("attack_start",),
    "seed": ("seed",),
    "ends_early": ("ends_early",),
    "version": (),
    "libraries": (),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of an earlier version.

    text: of its file; recorded: the settings in it, not validated; args: {dest: value} of the run's
    arguments"""

    path: pathlib.Path
    text: str
    recorded: Mapping[str, Any]
    args: Mapping[str, Any]

    def config(self, *ignored: str) -> Config:
        """The configuration with the recorded settings, for the run's model and task. ignored:
        settings that are no flags. Raises UserError."""
        values = {
            flag.dest: validate_saved(flag, self.recorded[flag.dest], self.path)
            for flag in FLAGS
            if flag.dest in self.recorded and flag.dest not in ignored
        }
        of_run = {name: self.args[name] for name in ("model", "task") if name in self.args}
        return Config.from_flat({**of_run, **values})

    def only_recorded(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a record, None where the table does not contain them."""
        return {name: value if self._contains(name) else None for name, value in own.items()}

    def _contains(self, name: str) -> bool:
        names = RECORDED_AS.get(name)
        return names is None or not self.recorded.keys().isdisjoint(names)

    def model(self, source: str) -> dict[str, Any]:
        """The model that was examined. source: a text with its file and epoch."""
        found = re.search(r"([\w.-]{1,100}\.(?:pt|tar))(?: \(epoch (\d{1,9})\b)?", source)
        file, epoch = found.groups() if found else (None, None)
        return {
            "weights": _text(self.recorded, "weights"),
            "file": file,
            "epoch": int(epoch) if epoch else None,
            "chosen_on": chosen_by(file, dict(self.args)) if file else None,
            "converged": None,
        }

    def data(self, task: str, images: Any, fingerprint: Any) -> dict[str, Any]:
        """The images that it was examined on. images: their number; fingerprint: None if it is not
        recorded. Raises ValueError."""
        if not is_number(images, 1, LARGEST, whole=True):
            raise ValueError(f"images is {describe(images)}")
        if fingerprint is not None:
            fingerprint = _text({"data": fingerprint}, "data")
        return {"task": task, "split": "test", "images": images, "fingerprint": fingerprint}

    def comment(self, start: str) -> str:
        """The first line that begins like this; "" without one."""
        return next((line for line in self.text.splitlines() if line.startswith(start)), "")

    @property
    def rows(self) -> Iterator[list[str]]:
        """The words of each line that is no comment."""
        lines = (line for line in self.text.splitlines() if line.strip() and line[0] != "#")
        return map(str.split, itertools.islice(lines, MOST_ROWS))


def read_tables(folder: pathlib.Path) -> list[Record]:
    """The records of all tables of a run folder, oldest first. A table that cannot be read is left
    out, with a note."""
    records: list[Record] = []
    args = None
    for pattern, read in READERS.items():
        for path in _by_age(folder.glob(pattern)):
            try:
                text = read_text(path)
                recorded = _recorded(path, text)
                if recorded is None:
                    continue
                if args is None:
                    args = checkpoint.open_saved(folder, "evaluate").args
                found = list(read(Table(path, text, recorded, args)))
                if not all(record.is_valid for record in found):
                    raise ValueError("it contains something that no result is")
                records += found
            except (OSError, ValueError, UserError) as e:
                print(
                    f"note: {path} of an earlier version is left out: {printable(one_line(e))}",
                    file=sys.stderr,
                    flush=True,
                )
    return records


def _by_age(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Tables in the order in which they were written: NAME_1, NAME_2, ..., NAME."""
    all_paths = set(paths)

    def age(path: pathlib.Path) -> tuple[bool, int, str]:
        latest = path.with_name(path.stem.rpartition("_")[0] + path.suffix)
        return latest not in all_paths, len(path.name), path.name

    return sorted(all_paths, key=age)


def _recorded(path: pathlib.Path, text: str) -> dict[str, Any] | None:
    """The settings in a table; None if it is none of an earlier version. Raises ValueError."""
    if len(text) > LONGEST_TABLE:
        raise ValueError(f"it has more than {LONGEST_TABLE:,} characters")
    if path.suffix == ".json":
        result = parse_json(text)
        recorded = result.get("settings") if isinstance(result, dict) else None
        if isinstance(recorded, dict) and "version" in recorded:  # of this version
            return None
    else:
        header = next((line for line in text.splitlines() if line.startswith(HEADER)), None)
        if header is None:
            return None
        if len(header) > LONGEST_HEADER:
            raise ValueError(f"its settings have more than {LONGEST_HEADER:,} characters")
        recorded = parse_json(header.removeprefix(HEADER))
    if not isinstance(recorded, dict):
        raise ValueError("its settings are damaged")
    return recorded


def _text(values: Mapping[str, Any], name: str) -> str:
    """The text called `name`. Raises ValueError for anything else."""
    value = values.get(name)
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{name} is {describe(value)}")
    return value


# ---- attacks


def _read_sweep(table: Table) -> Iterator[Record]:
    """The measurements of an attack, of the .csv beside a table."""
    config = table.config("budget", "eps_list")
    if len(config.attack.grads) * len(config.attack_steps) > MOST_GRADIENTS:
        raise ValueError("it has too many gradient methods")
    smooth = "smooth" in config.attack.grads
    described = _text(table.recorded, "smooth") if smooth else ""
    known = {
        label: table.only_recorded(own)
        for label, own in settings.attack(config, 1.0, described).items()
    }
    model = table.model(table.comment("# examined: "))
    recorded = table.recorded
    data = table.data(config.data.task, recorded.get("images"), recorded.get("data"))
    for row in _rows(table.path.with_suffix(".csv")):
        eps = read_eps(row.get("eps"))
        clean = read_share(row.get("clean"))
        shares = {name: read_share(row.get(name)) for name in ("adversarial", "masked", "unmoved")}
        mean_norm = number(row.get("mean_norm"), 0, MOST_EPS**2)
        own = known.get(row.get("grad", ""))
        if own is None or None in (eps, clean, mean_norm, *shares.values()):
            raise ValueError(f"the row {describe(row)} of its .csv is damaged")
        yield Record(
            "attack",
            model,
            {**data, "clean": clean},
            {**own, "eps": eps},
            {**shares, "mean_norm": mean_norm},
            computed_on=printable(row.get("computed_on", "")),
        )


def _rows(path: pathlib.Path) -> Iterator[dict[str, str]]:
    """The rows of a .csv one after another, without missing cells; none without the file."""
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""))
        names = next(reader, [])
        for cells in itertools.islice(filter(None, reader), MOST_ROWS):
            yield dict(zip(names, cells))
    except FileNotFoundError:
        return
    except csv.Error as e:
        raise ValueError(one_line(e)) from None


# ---- audits, corruptions, accuracy over the time steps


def _read_audit(table: Table) -> Iterator[Record]:
    """The measurement of an audit. table: its .json."""
    recorded = table.recorded
    config = table.config("surrogate")
    if not config.audit.eps:
        raise ValueError(f"eps is {describe(recorded.get('eps'))}")
    surrogate = recorded.get("surrogate")
    if surrogate is not None and not isinstance(surrogate, list):
        raise ValueError(f"surrogate is {describe(surrogate)}")
    own = settings.audit(config, number(recorded.get("ends_early"), 0, 1) or 0.0, surrogate)
    value = {name: part for name, part in parse_json(table.text).items() if name != "settings"}
    data = table.data(config.data.task, value.get("images"), recorded.get("data"))
    places = value.get("computed_on")
    yield Record(
        "audit",
        table.model(str(value.get("model"))),
        {**data, "clean": value.get("clean")},
        table.only_recorded(own),
        value,
        computed_on=printable("; ".join(map(str, places))) if isinstance(places, list) else "",
    )


def _read_corruptions(table: Table) -> Iterator[Record]:
    """The measurements of a table, one per corruption."""
    recorded = table.recorded
    config = table.config()
    source, _, places = table.comment("# corruption, ").partition("; computed on: ")
    fingerprints = recorded.get("data", {})
    if not isinstance(fingerprints, dict):
        raise ValueError(f"data is {describe(fingerprints)}")
    for name, *texts in table.rows:
        shares = [read_share(text) for text in texts]
        if name not in CORRUPTIONS or None in shares:
            raise ValueError(f"the row {describe(name)} is damaged")
        yield Record(
            "corruption",
            table.model(source),
            table.data(config.data.task, recorded.get("images"), fingerprints.get(name)),
            table.only_recorded(settings.corruption(config, name)),
            {"accuracy": shares},
            computed_on=printable(places),
        )


def _read_characteristic(table: Table) -> Iterator[Record]:
    """The measurement of a table with a row per time step."""
    recorded = table.recorded
    config = table.config()
    heading = table.comment("# ")
    if "relative change over the last" not in heading:
        raise ValueError("its column `settled` has another meaning than `converged` has now")
    rows = list(table.rows)
    names = table.comment("# t ").split()[2:]
    if len(rows) != config.learning.T1 or any(len(row) != len(names) + 1 for row in rows):
        raise ValueError("it is not complete")
    columns = {
        name: [number(row[n], -LARGEST_FLOAT, LARGEST_FLOAT) for row in rows]
        for n, name in enumerate(names, 1)
    }
    relaxed = re.match(r"# of the first (\d{1,9}) ", table.comment("# of the first "))
    converged = columns.pop("settled", [])
    last = converged[-1] if converged else None
    own = table.only_recorded(settings.characteristic(config))
    yield Record(
        "characteristic",
        {**table.model(heading), "converged": last},
        table.data(config.data.task, recorded.get("images"), recorded.get("data")),
        own,
        {
            **columns,
            "energy": columns.get("energy"),
            "converged": converged,
            "relaxed_images": int(relaxed[1]) if relaxed else None,
        },
        computed_on=printable(heading.partition("; computed on: ")[2]),
    )


READERS: dict[str, Callable[[Table], Iterator[Record]]] = {
    "Adversarial_Accuracy*.txt": _read_sweep,
    "Audit_*.json": _read_audit,
    "Corruption_Accuracy*.txt": _read_corruptions,
    "Characteristic_Time*.txt": _read_characteristic,
}
