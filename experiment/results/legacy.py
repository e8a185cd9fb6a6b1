"""Read the tables of earlier versions, which had no results.jsonl, as records.

Such a table contains the settings of its rows, in a header `# settings: {...}`. A table with other
settings was renamed to NAME_1, NAME_2 ... before the next one was written.

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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_utils import UserError, one_line
from experiment.command_line import validate_saved
from experiment.config import FLAGS, LARGEST, MOST_EPS, Config
from experiment.results import settings
from experiment.results.record import Record
from experiment.results.tables import HEADER, read_eps, read_share
from experiment.runs import checkpoint
from experiment.runs.files import number, parse_json, printable, read_text
from experiment.runs.history import chosen_by
from experiment.text import describe

LONGEST_HEADER = 10_000  # characters
MOST_ROWS = 10_000  # that are read of a table
MOST_GRADIENTS = 100  # gradient methods times numbers of time steps

# Settings that not all tables contain: the flag that each is recorded as
RECORDED_AS = {
    "mbs": "mbs",
    "compile": "compile",
    "predict_step": "predict_step",
    "clip": "no_clip",
    "start": "attack_start",
    "seed": "seed",
    "version": "version",
    "libraries": "libraries",
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
        """The configuration with the recorded settings. ignored: those that are no flags. Raises
        UserError."""
        values = {
            flag.dest: validate_saved(flag, self.recorded[flag.dest], self.path)
            for flag in FLAGS
            if flag.dest in self.recorded and flag.dest not in ignored
        }
        return Config.from_flat({"model": self.args.get("model", "MLP"), **values})

    def only_recorded(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a record, None where the table does not contain them."""
        return {
            name: value if RECORDED_AS.get(name) in (None, *self.recorded) else None
            for name, value in own.items()
        }

    def model(self, source: str) -> dict[str, Any]:
        """The model that was examined. source: its file and epoch, as text in the table."""
        found = re.search(r"([\w.-]{1,100}\.(?:pt|tar))(?: \(epoch (\d{1,9})\b)?", source)
        file, epoch = found.groups() if found else (None, None)
        return {
            "weights": _text(self.recorded, "weights"),
            "file": file,
            "epoch": int(epoch) if epoch else None,
            "chosen_on": chosen_by(file, dict(self.args)) if file else None,
            "converged": None,
        }

    def data(self, task: str, fingerprint: Any) -> dict[str, Any]:
        """The images that it was examined on. fingerprint: None if it is not recorded."""
        images = number(self.recorded.get("images"), 1, LARGEST)
        if images is None:
            raise ValueError(f"images is {describe(self.recorded.get('images'))}")
        if fingerprint is not None:
            fingerprint = _text({"data": fingerprint}, "data")
        return {"task": task, "split": "test", "images": int(images), "fingerprint": fingerprint}

    @property
    def comments(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("#")]


def read_tables(folder: pathlib.Path) -> list[Record]:
    """The records of all tables of a run folder, oldest first. A table that cannot be read is left
    out, with a note."""
    records: list[Record] = []
    args = None
    for pattern, read in READERS.items():
        for path in _by_age(folder.glob(pattern)):
            try:
                text = read_text(path)
                recorded = _recorded(text)
                if recorded is None:
                    continue
                if args is None:
                    args = checkpoint.open_saved(folder, "evaluate").args
                records += list(read(Table(path, text, recorded, args)))
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


def _recorded(text: str) -> dict[str, Any] | None:
    """The settings in the header of a table; None if it is none of an earlier version. Raises
    ValueError."""
    header = next((line for line in text.splitlines() if line.startswith(HEADER)), None)
    if header is None:
        return None
    if len(header) > LONGEST_HEADER:
        raise ValueError(f"its settings have more than {LONGEST_HEADER} characters")
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
    model = table.model(next((s for s in table.comments if s.startswith("# examined: ")), ""))
    data = table.data(config.data.task, table.recorded.get("data"))
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


READERS = {"Adversarial_Accuracy*.txt": _read_sweep}
