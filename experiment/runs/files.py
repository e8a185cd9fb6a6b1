"""Files of run folders: reading files that can come from anywhere, making their text safe to print,
replacing files atomically, and locks on folders."""

import contextlib
import csv
import errno
import functools
import io
import json
import math
import os
import pathlib
import re
import secrets
import socket
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from data_files import is_current, open_regular, refusing_links
from data_utils import RunFailed, UserError, one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

# Of every text file, for any locale; paths need not be text
TEXT: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
LARGEST_TEXT = 2**26  # bytes of a text file that is read; metrics.csv of 100,000 epochs has 2 ** 23
# Bytes of the arrays in a .npz file that is read; 10,000 images of CIFAR-10 in float32 have 2 ** 27
LARGEST_ARRAYS = 2**29

# Errors of flock that mean that the file system has no locks. After any other error another process
# may have the lock.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
WITHOUT_LOCKS = ", without locks"  # the end of a lock file whose existence is the lock


class WriteFailed(RunFailed):
    """A file of a run could not be written."""

    resumable = True


class Busy(UserError):
    """Another process has locked the folder or the table.

    holder: the process; delete: advice if it may have ended, "" on file systems with locks."""

    def __init__(self, message: str, holder: str, delete: str):
        super().__init__(message)
        self.holder = holder
        self.delete = delete


def why(error: OSError) -> str:
    """The reason of an OSError, for a message."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left"
    return error.strerror or one_line(error)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is a file or folder `path`; False for impossible paths, such as long ones."""
    try:
        return pathlib.Path(path).exists()
    except (OSError, ValueError):
        return False


# ---- reading


def read_text(path: os.PathLike | str) -> str:
    """The text in a file. Raises OSError, or ValueError if it has more than LARGEST_TEXT bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
            raise ValueError(f"it has more than {LARGEST_TEXT:,} bytes")
        return file.read().decode(**TEXT)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def number(text: Any, low: float, high: float) -> float | None:
    """The number that a text, or a value of a JSON file, contains, if it is from low to high; None
    otherwise."""
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if low <= value <= high else None


def read_table(path: os.PathLike | str) -> list[dict[str, str]]:
    """The rows of a CSV file with a header; missing cells are "". Raises OSError or ValueError."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    try:
        return [{name: cell for name, cell in row.items() if name is not None} for row in reader]
    except csv.Error as e:
        raise ValueError(one_line(e)) from None


def read_arrays(
    path: os.PathLike | str, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays in a .npz file, those of `names` alone if given. Raises ValueError if it is
    damaged, and before it allocates more than LARGEST_ARRAYS bytes."""
    try:
        with open_regular(path) as file:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                if sum(record.file_size for record in records) > LARGEST_ARRAYS:
                    raise ValueError("its arrays are too large")
                for record in records:
                    with archive.open(record) as part:
                        _check_array_header(part, record.file_size)
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names or arrays.files}
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(one_line(e)) from None


def _check_array_header(file: IO[bytes], size: int) -> None:
    """Raise ValueError if the header of a .npy file of `size` bytes does not match its size."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header announces {dtype} {shape}, which is not what follows")


# ---- showing text from files


def printable(text: object) -> str:
    """The text with "?" for control characters: one line, no terminal escape sequences."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets a quote in front;
    numbers stay as they are."""
    if not isinstance(value, str) or number(value, -math.inf, math.inf) is not None:
        return value
    value = printable(value)
    return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@")) else value


def markdown_cell(text: str) -> str:
    """A text for a cell of a Markdown table, with HTML, links and the cell separator escaped."""
    for letter, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\[")):
        text = text.replace(letter, escaped)
    return printable(text)


# ---- writing


def hidden_name(path: str | os.PathLike) -> pathlib.Path:
    """A new hidden path beside `path`, for a file or folder that is renamed once it is complete.

    It contains host and process id, see `owner_is_gone`, and a random part, because containers can
    share both."""
    path = pathlib.Path(path)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    return path.with_name(f".{path.name}.tmp-{owner}-{secrets.token_hex(4)}")


def owner_is_gone(path: pathlib.Path) -> bool:
    """Whether the process in a hidden path's name, also of earlier versions, has ended here.

    A process of another container on the same host can have the same id."""
    owner = rf"(?:{re.escape(socket.gethostname())}-)?(\d{{1,9}})(?:-[0-9a-f]{{8}})?"
    found = re.fullmatch(rf".*\.(?:tmp-)?{owner}", path.name)
    if not found or not fcntl:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        return False
    return int(found[1]) == os.getpid()  # left by a process that had our id before


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Give the path of a new file, which replaces `path` atomically when the block succeeds.

    No reader sees half a file, and a failure, for example a full disk, keeps the old file. The new
    file is locked until it is renamed, see `left_behind`. Raises WriteFailed."""
    path = pathlib.Path(path)
    beside = hidden_name(path)
    file = None
    try:
        with open(beside, "xb") as file:
            if fcntl:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield beside
            os.fsync(file.fileno())
            if not is_current(file, beside):
                raise OSError(errno.EEXIST, "another process has replaced the new file")
        os.replace(beside, path)
    except OSError as e:
        if not exists(path.parent):
            raise WriteFailed(f"cannot write {path}: the folder is gone") from None
        kept = "; what was there before is unchanged" if exists(path) else ""
        raise WriteFailed(f"cannot write {path}: {why(e)}{kept}") from None
    finally:
        if file:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the file `path` by one that contains `text`. Raises WriteFailed."""
    with replacing(path) as beside:
        beside.write_text(text, **TEXT)


def append(path: pathlib.Path, text: str) -> None:
    """Append `text` in one write, so that processes that append at the same time lose nothing.

    It begins on a new line. A link is first replaced by a copy of the file that it leads to, which
    does not change. Raises WriteFailed."""
    try:
        try:
            _append(path, text)
        except OSError as e:
            if e.errno != errno.EMLINK:
                raise
            replace_link(path)
            _append(path, text)
    except OSError as e:
        raise WriteFailed(f"cannot write {path}: {why(e)}") from None


def replace_link(path: pathlib.Path) -> None:
    """Replace a symbolic or hard link by a copy of the file that it leads to: other folders, such
    as a snapshot of this one, keep theirs. Raises WriteFailed, OSError."""
    with replacing(path) as beside:
        beside.write_bytes(path.read_bytes() if path.is_file() else b"")


def _append(path: pathlib.Path, text: str) -> None:
    with open(path, "ab+", opener=refusing_links) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        within_a_line = file.read(1) not in (b"", b"\n")
        if within_a_line:
            text = "\n" + text
        file.write(text.encode(**TEXT))


def left_behind(path: pathlib.Path) -> bool:
    """Whether the writer of a file of `replacing` has ended.

    Its process is gone or, on another machine, has not written for a day; and no process, for
    example of another container, has locked it. False if the file system has no locks."""
    try:
        if not owner_is_gone(path) and time.time() - path.stat().st_mtime < 24 * 3600:
            return False
        with open(path, "r+b", opener=refusing_links) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Lock:
    """Lock on a folder for one training, or on one table in it.

    It is a lock on the file .lock, or .TABLE.lock, which the system releases when the process ends
    in any way. On a file system without locks the existence of the file is the lock; after a kill
    the user has to delete it, as a note explains.

    The library `filelock` would not make this shorter: it follows hard links, leaves the file
    behind, names no holder, and takes EACCES for a lock of somebody else."""

    def __init__(self, folder: str | os.PathLike, table: str = ""):
        """Raises Busy if another process has the lock, UserError if the folder cannot be locked."""
        self.path = pathlib.Path(folder, f".{table}.lock" if table else ".lock")
        if table:
            self._busy = f"{table} in {folder} is being written already"
            self._alone = "this table takes one process at a time"
        else:
            self._busy = f"{folder} is being trained already"
            self._alone = "a run takes one training at a time"
        try:
            self._file = self._acquire()
            while self._file is None:
                self._file = self._acquire()
        except OSError as e:
            left = os.path.lexists(self.path)
            delete = "; if no process is at work there, delete that file" if left else ""
            raise UserError(f"{folder} cannot be locked: {self.path}: {why(e)}{delete}") from None

    def _acquire(self) -> IO[bytes] | None:
        """The locked file; None if its holder has just removed it. Raises Busy, OSError."""
        try:
            file = open(self.path, "x+b")
            created = True
        except FileExistsError:
            try:
                file = open(self.path, "r+b", opener=refusing_links)
                created = False
            except FileNotFoundError:
                return None
        try:
            locked = self._flock(file, created)
            if locked and not is_current(file, self.path):
                file.close()
                return None
            if _content(file).endswith(WITHOUT_LOCKS):  # of a machine that has no locks here
                raise self._busy_error(file, may_have_ended=True)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            file.seek(0)
            file.truncate()
            file.write((holder if locked else holder + WITHOUT_LOCKS).encode(**TEXT))
            file.flush()
        except BaseException as e:
            if created and not isinstance(e, Busy):
                self.path.unlink(missing_ok=True)
            file.close()
            raise
        return file

    def _flock(self, file: IO[bytes], created: bool) -> bool:
        """Lock the file; False if there are no locks, and the file is new. Raises Busy, OSError."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "not on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise self._busy_error(file) from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            if not created:
                raise self._busy_error(file, may_have_ended=True) from None
            _note_without_locks(self.path, why(e))
            return False

    def _busy_error(self, file: IO[bytes], may_have_ended: bool = False) -> Busy:
        """The error that names the process in a lock file."""
        holder = _content(file) or "another process"
        delete = ""
        if may_have_ended:
            delete = f"; there are no locks here: if it has ended, delete {self.path}"
        return Busy(f"{self._busy}, by {holder}; {self._alone}{delete}", holder, delete)

    def release(self) -> None:
        """Unlock the folder and remove the file. Does nothing the second time."""
        if self._file:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None


@functools.cache  # once for each file: results are locked again and again
def _note_without_locks(path: pathlib.Path, reason: str) -> None:
    print(
        f"note: this file system has no locks ({reason}); if this process is killed, delete "
        f"{path.name} in its folder before you resume",
        file=sys.stderr,
    )


def _content(file: IO[bytes]) -> str:
    """The text of a lock file, on one line."""
    file.seek(0)
    return printable(file.read(200).decode("utf-8", "replace").strip())
