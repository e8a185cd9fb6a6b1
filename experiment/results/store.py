"""The measurements of a run: results.jsonl in its folder, one record per line.

Every table, text and figure of a run is written from records and never read back. A record contains
all that identifies a measurement, so that "has this been measured?" is a look-up. Several processes
may add records at once; a kill leaves whole records only."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import sys
import time
from collections.abc import Collection, Iterator

from data_files import open_regular, refusing_links
from data_utils import UserError, one_line
from experiment.results.legacy import read_tables
from experiment.results.record import Record
from experiment.runs.files import TEXT, Busy, Lock, WriteFailed, replace_link, why

FILE = "results.jsonl"
BEGINNING = b'{"kind": "'  # of a line
LARGEST = 2**30  # bytes of a file that is read
NOTED_WAIT = 10.0  # seconds until a note says which process is waited for
LONGEST_WAIT = 60.0  # seconds for a lock file that may be left of a killed process


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
        self._has_read_tables = False  # those of earlier versions
        self.refresh()

    def refresh(self) -> None:
        """Read the records that were added since. Damaged lines are left out, with a note. Raises
        UserError if the file cannot be read."""
        lines = self._new_lines()
        if not self._end and lines:
            self._forget()
        elif not self._end and not self._has_read_tables:
            self._has_read_tables = True
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
            lines_left_out = "1 damaged line" if damaged == 1 else f"{damaged} damaged lines"
            note = f"note: {lines_left_out} of {self.path} left out"
            print(note, file=sys.stderr, flush=True)

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
        others.

        It begins with all records of other processes. Those of earlier versions are in the file
        then, because their tables may be replaced in the block. Raises WriteFailed."""
        lock = self._lock()
        try:
            self.refresh()
            if not self._end:
                self._append(self.records)
            yield
        finally:
            if lock:
                lock.release()

    # ---- inside

    def _lock(self) -> Lock | None:
        """The lock, once no other process has it. What was measured is not lost for it: on a file
        system without locks, where a kill leaves the lock file, None after a minute."""
        start = time.monotonic()
        while True:
            try:
                return Lock(self.path.parent, "results")
            except Busy as e:
                waited = time.monotonic() - start
                if waited > NOTED_WAIT:
                    _note_wait(self.path, e.holder)
                if e.delete and waited > LONGEST_WAIT:
                    print(
                        f"note: {self.path} is written without its lock{e.delete}", file=sys.stderr
                    )
                    return None
                time.sleep(0.02)

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
        *lines, rest = text[len(self._last) :].split(b"\n")
        lines = [line + b"\n" for line in lines]
        return [*lines, rest] if _is_record(rest) else lines

    def _append(self, records: Collection[Record]) -> None:
        """Append records and read them.

        A begun record at the end is what a full disk or a crash of the machine left: it is removed.
        So is what a failed write leaves. Whole lines that were not read, records of a machine with
        locks of its own, stay, as does anything else. A link is replaced by a copy."""
        unwritten = "".join(record.to_json() + "\n" for record in records).encode(**TEXT)
        if not unwritten:
            return
        try:
            if self.path.is_symlink() or self.path.exists() and self.path.stat().st_nlink > 1:
                replace_link(self.path)
            with open(self.path, "ab+", buffering=0, opener=refusing_links) as file:
                file.seek(self._end)
                unread = file.read()
                end = self._end + len(unread)
                begun = (self._last + unread).rpartition(b"\n")[2]
                if begun and _is_begun(begun) and not _is_record(begun):
                    end -= len(begun)
                    file.truncate(end)
                elif begun:
                    unwritten = b"\n" + unwritten
                try:
                    while unwritten:
                        unwritten = unwritten[file.write(unwritten) :]
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(end)
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


def _is_record(line: bytes) -> bool:
    """Whether a line is a whole record."""
    try:
        Record.from_json(line.decode(**TEXT))
    except (ValueError, TypeError):
        return False
    return True


def _is_begun(line: bytes) -> bool:
    """Whether a line begins as a record does."""
    return line.startswith(BEGINNING) or BEGINNING.startswith(line)


@functools.cache  # once for each file and process
def _note_wait(path: pathlib.Path, holder: str) -> None:
    print(f"note: waiting to write {path}, which {holder} is writing", file=sys.stderr, flush=True)
