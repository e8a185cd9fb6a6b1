"""The measurements of a run: results.jsonl in its folder, one record per line.

Every table, text and figure of a run is written from records and never read back. A record contains
all that identifies a measurement, so that "has this been measured?" is a look-up. Several processes
may add records at once; a kill leaves whole records only."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_files import open_regular, refusing_links
from data_utils import UserError, one_line
from experiment.devices import computed_on
from experiment.runs.files import TEXT, Busy, Lock, WriteFailed, number, parse_json, why
from experiment.runs.folder import versions

FILE = "results.jsonl"
KINDS = ("evaluate", "attack", "audit", "corruption", "characteristic", "gducheck")
LONGEST_WAIT = 60.0  # seconds for other processes to write their records
PARTS = ("model", "data", "settings", "value", "versions")
ATTACK_LIBRARIES = ("adversarial-robustness-toolbox", "torchattacks")


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement.

    kind      one of KINDS
    model     weights (fingerprint), file, epoch, chosen_on, converged (share of images, or None)
    data      task, split, images (number), fingerprint, clean (accuracy without perturbation)
    settings  everything else that the value depends on, {name: value}. None, in tables of earlier
              versions, is a setting that they did not record
    value     what was measured
    when, computed_on, versions   time, machine and libraries; they do not identify it
    """

    kind: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    value: Mapping[str, Any]
    when: str = ""
    computed_on: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def now(
        cls,
        kind: str,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        settings: Mapping[str, Any],
        value: Mapping[str, Any],
    ) -> Record:
        """A record of a measurement that has just been made."""
        when = datetime.datetime.now().isoformat(" ", "seconds")
        return cls(kind, model, data, settings, value, when, computed_on(), _versions())

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record in a line of results.jsonl. Raises ValueError."""
        content = parse_json(line)
        if not isinstance(content, dict) or content.get("kind") not in KINDS:
            raise ValueError("it is no record of this version")
        parts = {name: content.get(name, {}) for name in PARTS}
        record = cls(
            content["kind"],
            **parts,
            when=str(content.get("when", "")),
            computed_on=str(content.get("computed_on", "")),
        )
        if not all(isinstance(part, dict) for part in parts.values()) or not record._is_valid():
            raise ValueError("it is no record of this version")
        return record

    def _is_valid(self) -> bool:
        """Whether the values that every reader relies on are there and in range."""
        texts = []
        numbers = [self.data.get("images")]
        if self.kind in ("attack", "audit"):
            texts.append(self.settings.get("norm"))
            numbers.append(self.settings.get("eps"))
        if self.kind == "attack":
            texts += [self.settings.get("attack"), self.settings.get("gradient")]
            numbers += [self.value.get("adversarial"), self.value.get("masked")]
        return all(isinstance(text, str) and len(text) < 100 for text in texts) and all(
            number(value, 0, 1e9) is not None for value in numbers
        )

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(_plain(dataclasses.asdict(self)), allow_nan=False)

    @functools.cached_property
    def identity(self) -> str:
        """Everything that identifies the measurement, as text: equal for equal measurements."""
        return json.dumps(self._identifying, sort_keys=True)

    @property
    def _identifying(self) -> dict[str, Any]:
        data = {name: self.data.get(name) for name in ("task", "split", "images", "fingerprint")}
        return {
            "kind": self.kind,
            "weights": self.model.get("weights"),
            **{f"data {name}": value for name, value in data.items()},
            **{f"settings {name}": value for name, value in self.settings.items()},
        }

    def answers(self, wanted: Record) -> bool:
        """Whether this is the measurement `wanted`. A value that this record, of an earlier
        version, contains as None matches any."""
        if self.identity == wanted.identity:
            return True
        own = self._identifying
        others = json.loads(wanted.identity)
        return own.keys() == others.keys() and all(
            value is None or json.loads(json.dumps(value)) == others[name]
            for name, value in own.items()
        )


class Store:
    """The records of one run folder, in the order in which they were added.

    New ones of other processes are read by `refresh`. The tables of earlier versions are read once:
    when a folder without results.jsonl gets its first record."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises UserError if the file cannot be read."""
        self.path = pathlib.Path(folder, FILE)
        self.records: list[Record] = []
        self._identities: dict[str, Record] = {}
        self._incomplete: list[Record] = []  # with settings that were not recorded
        self._end = 0  # of the lines that have been read, in bytes
        self.refresh()

    def refresh(self) -> None:
        """Read the records that were added since. Damaged lines are left out, with a note."""
        try:
            with open_regular(self.path) as file:
                if os.fstat(file.fileno()).st_size < self._end:  # another file of that name
                    self._forget()
                file.seek(self._end)
                lines = file.read()
        except FileNotFoundError:
            if self._end or not self.records:
                self._forget()
                for record in self._of_earlier_versions():
                    self._take(record)
            return
        except OSError as e:
            raise UserError(f"{self.path} cannot be read: {why(e)}") from None
        except ValueError as e:
            raise UserError(f"{self.path} cannot be read: {one_line(e)}") from None
        if lines and not self._end:
            self._forget()  # the tables of earlier versions are among the lines
        whole = lines[: lines.rfind(b"\n") + 1]
        self._end += len(whole)
        damaged = 0
        for line in whole.splitlines():
            try:
                self._take(Record.from_json(line.decode(**TEXT)))
            except (ValueError, TypeError):
                damaged += bool(line.strip())
        if damaged:
            print(
                f"note: {damaged} damaged lines of {self.path} are left out",
                file=sys.stderr,
                flush=True,
            )

    def find(self, wanted: Record) -> Record | None:
        """The record of the same measurement; None without one."""
        found = self._identities.get(wanted.identity)
        if found is None:
            found = next((record for record in self._incomplete if record.answers(wanted)), None)
        return found

    def add(self, *records: Record) -> None:
        """Append those records that are not in the file yet, in one write. Raises WriteFailed."""
        with self.locked():
            self.refresh()
            new = [record for record in records if self.find(record) is None]
            if not self.path.exists():
                new = [*self.records, *new]  # those of earlier versions first
            if new:
                self._append("".join(record.to_json() + "\n" for record in new))
                self.refresh()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A block in which no other process writes records, or files made from them. Waits for the
        others. Raises Busy after a minute."""
        lock = None
        start = time.monotonic()
        while lock is None:
            try:
                lock = Lock(self.path.parent, "results")
            except Busy:
                if time.monotonic() - start > LONGEST_WAIT:
                    raise
                time.sleep(0.02)
        try:
            yield
        finally:
            lock.release()

    # ---- inside

    def _append(self, text: str) -> None:
        """Append lines. A line without an end is what a full disk or a crash of the machine left of
        a record: it is removed."""
        try:
            with open(self.path, "ab", opener=refusing_links) as file:
                file.truncate(self._end)
                try:
                    file.write(text.encode(**TEXT))
                    file.flush()
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(self._end)
                    raise
        except OSError as e:
            raise WriteFailed(f"cannot write {self.path}: {why(e)}") from None

    def _forget(self) -> None:
        self.records = []
        self._identities = {}
        self._incomplete = []
        self._end = 0

    def _take(self, record: Record) -> None:
        self.records.append(record)
        self._identities.setdefault(record.identity, record)
        unknown = record.data.get("fingerprint") is None or None in record.settings.values()
        if unknown or record.model.get("weights") is None:
            self._incomplete.append(record)

    def _of_earlier_versions(self) -> list[Record]:
        from experiment.results.legacy import read_tables

        return read_tables(self.path.parent)


def _plain(value: Any) -> Any:
    """The value as JSON has it: None instead of nan and infinities."""
    if isinstance(value, dict):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- outcomes of single images


def pack(outcomes: np.ndarray) -> str:
    """Booleans, (n,), as text: their bits in base64, the first image in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(outcomes, dtype=bool)).tobytes()).decode()


def unpack(text: Any, n: int) -> np.ndarray | None:
    """The booleans of `pack`, (n,); None for anything else."""
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (TypeError, ValueError):
        return None
    return np.unpackbits(bits, count=n).astype(bool) if len(bits) == -(-n // 8) else None


def attack_libraries() -> dict[str, str]:
    """{name: version} of the libraries whose attacks a result depends on."""
    return {name: importlib.metadata.version(name) for name in ATTACK_LIBRARIES}


@functools.cache
def _versions() -> dict[str, str]:
    return {**versions(), **attack_libraries()}
