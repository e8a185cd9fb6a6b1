"""The measurements of a run: results.jsonl in its folder, one record per line.

Every table, text and figure of a run is written from records and never read back. A record contains
all that identifies a measurement, so that "has this been measured?" is a look-up. Several processes
may add records at once; a kill leaves whole records only."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator

from data_files import open_regular, refusing_links
from data_utils import UserError, one_line
from experiment.results.legacy import read_tables
from experiment.results.record import Record
from experiment.runs.files import TEXT, Busy, Lock, WriteFailed, why

FILE = "results.jsonl"
LONGEST_WAIT = 60.0  # seconds for other processes to write their records


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
                for record in read_tables(self.path.parent):
                    if record.is_valid:
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
