"""Files that are replaced whole, and a lock on a folder that dies with its process."""
import contextlib
import errno
import os
import pathlib
import socket
import sys

from data_utils import RunFailed, UserError, one_line

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

# of every text file, whatever the locale; paths need not be text
TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}


class WriteFailed(RunFailed):
    """A file of a run could not be written."""

    resumable = True


def why(error):
    """The reason of an OSError, in words."""
    return "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or one_line(error)


def exists(path):
    """Whether there is a file or folder `path`; there is none where the path cannot be one, being too long, say."""
    try:
        return pathlib.Path(path).exists()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(path):
    """A path beside `path` to write to; renamed to `path` when the block ends well, so that no reader ever sees half a
    file and a failure, a full disk say, leaves the old one. Raises WriteFailed if it cannot be written."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        if not exists(path.parent):
            raise WriteFailed(f"cannot write {path}: the folder is gone") from None
        kept = "; what was there before is unchanged" if exists(path) else ""
        raise WriteFailed(f"cannot write {path}: {why(e)}{kept}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path, text):
    """Replaces the file `path` by one that holds `text`. Raises WriteFailed."""
    with replacing(path) as beside:
        beside.write_text(text, **TEXT)


def left_behind(path):
    """Whether a file that `replacing` writes to belongs to no living process of this machine any more."""
    host, _, pid = path.name.rpartition(".tmp-")[2].rpartition("-")
    if host not in ("", socket.gethostname()) or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return int(pid) == os.getpid()  # ours: one who had the number before was writing


class Lock:
    """Holds a folder for one training, or one table in it: a lock on its file .lock, or .TABLE.lock, that the system
    takes back when the process ends, however it does."""

    def __init__(self, folder, table=""):
        """Raises UserError where another process has it. On a file system without locks there is a note instead."""
        self.path, self._file = pathlib.Path(folder, f".{table}.lock" if table else ".lock"), None
        busy, alone = (f"{table} in {folder} is being written", "this table takes one process") if table else (
            f"{folder} is being trained", "a run takes one training")
        try:
            while not self._acquired():
                pass
        except BlockingIOError:
            holder = ""
            with contextlib.suppress(OSError):  # it may end just now
                holder = self.path.read_text(**TEXT).strip()
            raise UserError(f"{busy} already, by {holder or 'another process'}; {alone} at a time") from None
        except OSError as e:
            print(f"note: {folder} cannot be locked ({why(e)}): let no second process write there", file=sys.stderr)

    def _acquired(self):
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no locks")
        file = open(self.path, "a+", **TEXT)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (exists(self.path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))):
                file.close()  # who had it before removed it in the meantime
                return False
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return True

    def release(self):
        """Gives the folder back, and removes the file."""
        if self._file:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._file.close()
            self._file = None
