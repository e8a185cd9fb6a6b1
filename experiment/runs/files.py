"""Files of run folders: reading files that can come from anywhere, making their text safe to show,
replacing files whole, and a lock on a folder that dies with its process."""

import contextlib
import csv
import errno
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

import numpy as np

from data_files import open_regular, refusing_links
from data_utils import RunFailed, UserError, one_line

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

# of every text file, whatever the locale; paths need not be text
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
# Bytes of a text file (metrics.csv of 100,000 epochs has 2 ** 23), and of the arrays in a .npz file
# (10,000 images of CIFAR-10 in float32 have 2 ** 27), that are read
LARGEST_TEXT, LARGEST_ARRAYS = 2**26, 2**29


# Errors of flock that mean that the file system has no locks. Any other error leaves open whether
# another process holds the lock.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
WITHOUT_LOCKS = ", without locks"  # the end of a lock file whose existence is the lock


class WriteFailed(RunFailed):
    """A file of a run could not be written."""

    resumable = True


class Busy(UserError):
    """Another process holds the folder or the table. holder: which one; delete: what to do where
    that cannot be found out, "" with locks."""

    def __init__(self, message, holder, delete):
        super().__init__(message)
        self.holder = holder
        self.delete = delete


def why(error):
    """The reason of an OSError, in words."""
    return (
        "no space left"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else error.strerror or one_line(error)
    )


def exists(path):
    """Whether there is a file or folder `path`; there is none where the path cannot be one, being
    too long, say."""
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


def parse_json(text: str):
    """The value of a JSON text. Raises ValueError, also if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def number(text, low: float, high: float) -> float | None:
    """The number that a text contains, if it is from low to high; None otherwise. text: or a
    number, as JSON has it."""
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


def read_arrays(path: os.PathLike | str) -> dict[str, np.ndarray]:
    """The arrays in a .npz file. Raises ValueError if it is damaged, and before it allocates more
    than LARGEST_ARRAYS bytes."""
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
                return {name: arrays[name] for name in arrays.files}
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(one_line(e)) from None


def _check_array_header(file, size):
    """Raises ValueError if the header of a .npy file of `size` bytes does not match its size."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its header announces {dtype} {shape}, which is not what follows")


# ---- showing text from files


def printable(text) -> str:
    """The text with "?" for control characters: one line, no terminal escape sequences."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def csv_cell(value):
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


def hidden_name(path):
    """A new hidden path beside `path`, for a file or folder that is renamed to `path` once it is
    complete. It contains host and process id, see `owner_is_gone`; a random part makes it unique
    among containers that share both."""
    path = pathlib.Path(path)
    owner = f"{socket.gethostname()}-{os.getpid()}"
    return path.with_name(f".{path.name}.tmp-{owner}-{secrets.token_hex(4)}")


def owner_is_gone(path):
    """Whether the process in a hidden path's name (of `hidden_name`, or of earlier versions) has
    ended on this machine. Process ids of several containers on one host cannot be told apart."""
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
def replacing(path):
    """A new file beside `path` to write to, which is renamed to `path` when the block succeeds.

    No reader ever sees half a file, and a failure, for example a full disk, keeps the old file. The
    new file is locked until it is renamed, see `left_behind`. Raises WriteFailed."""
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
            if not os.path.samestat(os.fstat(file.fileno()), os.lstat(beside)):
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


def write_text(path, text):
    """Replaces the file `path` by one that holds `text`. Raises WriteFailed."""
    with replacing(path) as beside:
        beside.write_text(text, **TEXT)


def append(path, text):
    """Append `text` in one write, so that two processes that append lose nothing; on a new line,
    where the file ends within one. A link is first replaced by a copy, so that the file it leads to
    does not change. Raises WriteFailed."""

    def line_end(file):
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        return b"" if file.read(1) in (b"", b"\n") else b"\n"

    content = text.encode(**TEXT)
    try:
        with open(path, "ab+", opener=refusing_links) as file:
            file.write(line_end(file) + content)
    except OSError as e:
        if e.errno != errno.EMLINK:
            raise WriteFailed(f"cannot write {path}: {why(e)}") from None
        with replacing(path) as beside:
            beside.write_bytes(path.read_bytes() if path.is_file() else b"")
            with open(beside, "ab+") as file:
                file.write(line_end(file) + content)


def left_behind(path):
    """Whether the writer of a file of `replacing` has ended: its process is gone, or, on another
    machine, has not written for a day, and no process, for example of another container, holds its
    lock. False where the file system has no locks."""
    try:
        if not owner_is_gone(path) and time.time() - path.stat().st_mtime < 24 * 3600:
            return False
        with open(path, "r+b", opener=refusing_links) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Lock:
    """Holds a folder for one training, or one table in it: a lock on its file .lock, or
    .TABLE.lock, that the system releases when the process ends, however it ends.

    On a file system without locks the existence of the file is the lock: the process that creates
    it holds the folder. After a kill the user has to delete it; a note reports this."""

    def __init__(self, folder, table=""):
        """Raises Busy if another process holds the lock, UserError if that cannot be found out."""
        self.path = pathlib.Path(folder, f".{table}.lock" if table else ".lock")
        self._file = None
        if table:
            self._busy = f"{table} in {folder} is being written already"
            self._alone = "this table takes one process at a time"
        else:
            self._busy = f"{folder} is being trained already"
            self._alone = "a run takes one training at a time"
        try:
            while not self._acquired():
                pass
        except OSError as e:
            left = os.path.lexists(self.path)
            delete = "; if no process is at work there, delete that file" if left else ""
            raise UserError(f"{folder} cannot be locked: {self.path}: {why(e)}{delete}") from None

    def _acquired(self):
        """Whether this process holds the lock now; False if the file was removed meanwhile, to try
        again. Raises Busy, OSError."""
        try:
            file = open(self.path, "x+b")
            created = True
        except FileExistsError:
            try:
                file = open(self.path, "r+b", opener=refusing_links)
                created = False
            except FileNotFoundError:
                return False
        try:
            locked = self._flock(file, created)
            if locked and not self._is_current(file):
                file.close()
                return False
            if _content(file).endswith(WITHOUT_LOCKS):  # of a machine that has no locks here
                raise self._held(file, by_hand=True)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            file.truncate(0)
            file.seek(0)
            file.write((holder + ("" if locked else WITHOUT_LOCKS)).encode(**TEXT))
            file.flush()
        except BaseException as e:
            if created and not isinstance(e, Busy):
                self.path.unlink(missing_ok=True)
            file.close()
            raise
        self._file = file
        return True

    def _flock(self, file, created):
        """Lock the file; False if there are no locks, and the file is new. Raises Busy, OSError."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, "not on this system")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise self._held(file) from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            if not created:
                raise self._held(file, by_hand=True) from None
            print(
                f"note: this file system has no locks ({why(e)}); if this process is killed, "
                f"delete {self.path.name} in its folder before you resume",
                file=sys.stderr,
            )
            return False

    def _is_current(self, file):
        """Whether `file` is the one at the path: its last holder removes it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _held(self, file, by_hand=False):
        """The Busy that names the process in a lock file. by_hand: that process may have ended."""
        holder = _content(file) or "another process"
        delete = f"; there are no locks here: if it has ended, delete {self.path}" * by_hand
        return Busy(f"{self._busy}, by {holder}; {self._alone}{delete}", holder, delete)

    def release(self):
        """Gives the folder back, and removes the file."""
        if self._file:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None


def _content(file):
    """The text of a lock file, on one line."""
    file.seek(0)
    text = file.read(200).decode("utf-8", "replace").strip()
    return printable(text)
