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
from collections.abc import Collection, Iterator

from data_files import open_regular, refusing_links
from data_utils import UserError, one_line
from experiment.results.legacy import read_tables
from experiment.results.record import Record
from experiment.runs.files import TEXT, Busy, Lock, WriteFailed, why

FILE = "results.jsonl"
LARGEST = 2**30  # bytes of a file that is read
LONGEST_WAIT = 60.0  # seconds for other processes to write their records


class Store:
    """The records of one run folder, in the order in which they were added.

    New ones of other processes are read by `refresh`. In a folder without results.jsonl they are
    those of the tables of earlier versions; the first block of `locked` writes them to the file."""

    def __init__(self, folder: str | os.PathLike) -> None:
        """Raises UserError if the file cannot be read."""
        self.path = pathlib.Path(folder, FILE)
        self.records: list[Record] = []
        self._identities: dict[str, Record] = {}
        self._incomplete: list[Record] = []  # with settings that were not recorded
        self._end = 0  # of the lines that have been read, in bytes
        self._last = b""  # of these lines
        self.refresh()

    def refresh(self) -> None:
        """Read the records that were added since. Damaged lines are left out, with a note. Raises
        UserError if the file cannot be read."""
        lines = self._new_lines()
        if not self._end and (lines or not self.records):
            self._forget()
            if not lines:
                for record in read_tables(self.path.parent):
                    self._take(record)
        damaged = 0
        for line in lines:
            self._end += len(line)
            self._last = line
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
            latest_first = reversed(self._incomplete)
            found = next((record for record in latest_first if record.answers(wanted)), None)
        return found

    def add(self, *records: Record) -> None:
        """Append those records that are not in the file yet, in one write. Raises WriteFailed."""
        with self.locked():
            new = {record.identity: record for record in records if self.find(record) is None}
            self._append(new.values())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """A block in which no other process writes records, or files made from them. Waits for the
        others. Raises Busy after a minute.

        It begins with all records of other processes. Those of earlier versions are in the file
        then, because their tables may be replaced in the block. Raises WriteFailed."""
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
            self.refresh()
            if not self._end:
                self._append(self.records)
            yield
        finally:
            lock.release()

    # ---- inside

    def _new_lines(self) -> list[bytes]:
        """The whole lines behind those that have been read; all lines of a file that does not
        contain these any more, because another process has replaced it."""
        try:
            with open_regular(self.path) as file:
                if os.fstat(file.fileno()).st_size > LARGEST:
                    raise ValueError(f"it has more than {LARGEST:,} bytes")
                file.seek(self._end - len(self._last))
                text = file.read()
                if not text.startswith(self._last):
                    self._forget()
                    file.seek(0)
                    text = file.read()
        except FileNotFoundError:
            if self._end:
                self._forget()
            return []
        except OSError as e:
            raise UserError(f"{self.path} cannot be read: {why(e)}") from None
        except ValueError as e:
            raise UserError(f"{self.path} cannot be read: {one_line(e)}") from None
        return [line + b"\n" for line in text[len(self._last) :].split(b"\n")[:-1]]

    def _append(self, records: Collection[Record]) -> None:
        """Append records and read them. A line without an end is what a full disk or a crash of the
        machine left of a record: it is removed. So is what a failed write leaves."""
        unwritten = "".join(record.to_json() + "\n" for record in records).encode(**TEXT)
        if not unwritten:
            return
        try:
            with open(self.path, "ab", buffering=0, opener=refusing_links) as file:
                file.truncate(self._end)
                try:
                    while unwritten:
                        unwritten = unwritten[file.write(unwritten) :]
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(self._end)
                    raise
        except OSError as e:
            raise WriteFailed(f"cannot write {self.path}: {why(e)}") from None
        self.refresh()

    def _forget(self) -> None:
        self.records = []
        self._identities = {}
        self._incomplete = []
        self._end = 0
        self._last = b""

    def _take(self, record: Record) -> None:
        self.records.append(record)
        self._identities.setdefault(record.identity, record)
        unknown = record.data.get("fingerprint") is None or None in record.settings.values()
        if unknown or record.model.get("weights") is None:
            self._incomplete.append(record)
