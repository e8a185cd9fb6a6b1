"""The files of data sets: downloading them, and their formats, the IDX files of MNIST and the
pickles of CIFAR.

A file may come from anywhere: none runs code, ends the interpreter or takes much more memory than
it has bytes. One that is damaged raises an exception of any type."""

import contextlib
import errno
import gzip
import io
import itertools
import math
import os
import pathlib
import pickle
import re
import shutil
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import numpy as np

T = TypeVar("T")

# ---- opening


def open_regular(path: os.PathLike | str) -> io.BufferedReader:
    """Open a regular file for reading bytes. Raises OSError for anything else: opening a pipe would
    block until somebody writes to it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError("it is not a regular file")


def refusing_links(path: str, flags: int) -> int:
    """Opener for `open` that refuses links and special files: other users may write to the folder.

    A symbolic link is not followed, and a FIFO does not block. Not for modes that truncate. Raises
    OSError with errno EMLINK if `path` is a link or no regular file."""
    foreign = OSError(errno.EMLINK, "it is a link or no regular file")
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as e:
        raise (foreign if e.errno in (errno.ELOOP, errno.ENXIO) else e) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise foreign
    return descriptor


def is_current(file: IO[bytes], path: os.PathLike | str) -> bool:
    """Whether an open file is still the one at `path`, not removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


# ---- IDX files

LARGEST = 2**31  # bytes of one file; the largest of these data sets has 2 ** 27.2
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(file: IO[bytes] | gzip.GzipFile) -> np.ndarray:
    """Read the array in an IDX file: two zeros, type, number of dimensions, their sizes, the
    values; all big-endian."""
    zeros, kind, ndim = struct.unpack(">HBB", file.read(4).ljust(4, b"\0"))
    if zeros or kind not in IDX_TYPES or not ndim:
        raise ValueError("it does not begin as an IDX file does")
    shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
    dtype = np.dtype(IDX_TYPES[kind])
    announced = math.prod(shape) * dtype.itemsize
    values = file.read(min(announced, LARGEST) + 1)
    if len(values) != announced:
        found = "fewer" if len(values) < announced else "more"
        raise ValueError(f"its header announces {announced} bytes, and {found} follow")
    return np.frombuffer(values, dtype).reshape(shape)


def unpacked(file: IO[bytes]) -> IO[bytes] | gzip.GzipFile:
    """An open file, decompressed if its first bytes are those of gzip."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file


def forms(path: pathlib.Path) -> list[pathlib.Path]:
    """The paths that are read in place of an IDX file, the first that exists: `path`, Kaggle's name
    with a dot, a folder of either name with the file inside, each also with .gz behind it."""
    dotted = path.with_name(path.name.replace("-idx", ".idx"))
    inside = [outer / inner.name for outer in (path, dotted) for inner in (path, dotted)]
    plain = [path, dotted, *inside]
    return [name.with_name(name.name + end) for name in plain for end in ("", ".gz")]


# ---- files in another place

# Data sets whose files have the same names. A file in a folder of such a name belongs to that one.
SAME_NAMES = {"mnist", "fashionmnist", "kmnist", "emnist", "qmnist"}
DEEPEST = 4  # levels of folders below the data folder that are searched
MOST_ENTRIES = 10_000  # files and folders that are searched in all


def canonical(name: str) -> str:
    """A file's name without what browsers and archives change: case, dots, dashes, .gz, (1)."""
    return re.sub("[^a-z0-9]", "", re.sub(r"(\.gz|\.tgz|\.tar| ?\(\d+\))+$", "", name.lower()))


def nearby(data_dir: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    """Yields (folder, names of its files) for `data_dir` and the folders below it that are not
    hidden, the nearest first."""
    left = [data_dir]
    seen = 0
    while left and seen < MOST_ENTRIES:
        folder = left.pop(0)
        try:
            with os.scandir(folder) as found:
                entries = sorted(itertools.islice(found, MOST_ENTRIES - seen), key=lambda e: e.name)
            files = [entry.name for entry in entries if entry.is_file()]
            folders = [entry.name for entry in entries if entry.is_dir()]
        except OSError:
            continue
        seen += len(entries)
        if len(folder.parts) - len(data_dir.parts) < DEEPEST:
            left += [folder / name for name in folders if not name.startswith(".")]
        yield folder, files


def misplaced_idx(data_dir: pathlib.Path, wanted: pathlib.Path) -> str | None:
    """A text on where the IDX file `wanted`, DATA_DIR/NAME/raw/FILE, is in another place or under
    another name, and what to do; None if it is not."""
    others = SAME_NAMES - {canonical(wanted.parts[-3])}
    for folder, names in nearby(data_dir):
        if others.isdisjoint(map(canonical, folder.parts[-3:])):
            found = [name for name in names if canonical(name) == canonical(wanted.name)]
            for path in (folder / name for name in found):
                for root in path.parents:
                    if path in forms(root.joinpath(*wanted.parts[-3:])):
                        return f"found {path}, which looks like it: give --data-dir {root}"
                return (
                    f"found {path}, which looks like it: move it, and the others like it, to "
                    f"{wanted}"
                )
    return None


def misplaced_archive(
    data_dir: pathlib.Path, folder: pathlib.Path, names: list[str], archive: pathlib.Path
) -> str | None:
    """As `misplaced_idx`, for the folder with the files `names`, or the archive that it comes
    in."""
    for place, files in nearby(data_dir):
        if place != folder and set(names) <= set(files):
            return _how_to_move(place, folder)
        for name in files:
            if canonical(name) == canonical(archive.name):
                return _how_to_move(place / name, archive)
    return None


def _how_to_move(found: pathlib.Path, wanted: pathlib.Path) -> str:
    same_name = found.name == wanted.name
    advice = f"give --data-dir {found.parent}" if same_name else f"move it to {wanted}"
    return f"found {found}, which looks like it: {advice}"


# ---- pickles


def expect(condition: bool) -> None:
    """Raise ValueError unless the condition is true."""
    if not condition:
        raise ValueError("it has parts that such a file never has")


class StandIn:
    """Replaces an object of a pickle, and runs none of its class's code."""

    def set_state(self, state: Any) -> None:
        """Receive the state that the pickle has for the object."""
        raise NotImplementedError


class DType(StandIn):
    """Replaces a NumPy dtype. name: such as "u1"; order: such as ">"."""

    def __init__(self, name: Any, *_: object) -> None:
        self.name = name
        self.order = "="

    def set_state(self, state: Any) -> None:
        self.order = state[1]

    def array(self, content: Any, shape: Any, order: Any = "C") -> np.ndarray:
        """The array of numbers in `content`, whose memory it may share."""
        if not re.fullmatch("[biuf][1248]", self.name):
            raise ValueError(f"it contains an array of {self.name}, which are no numbers")
        # NumPy takes -1 for "as many as there are"
        expect(isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape))
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        dtype = np.dtype(self.name).newbyteorder(self.order)
        return np.frombuffer(content, dtype).reshape(shape, order=order)


class Array(StandIn):
    """Replaces a NumPy array; its numbers are in `values`, None before the state is set."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, in_fortran_order, content = state
        self.values = dtype.array(content, shape, "F" if in_fortran_order else "C")

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> "Array":
        """Construct an array as protocol 5 pickles it."""
        array = cls()
        array.values = dtype.array(content, shape, order)
        return array


def _number(dtype: Any, content: Any) -> bool | int | float:
    """A NumPy number as Python's."""
    return dtype.array(content, ()).item()


def _bytes(text: Any, encoding: Any) -> bytes:
    """Bytes, which protocols below 3 write as text."""
    return text.encode("latin1")


# Names in pickles of numbers and arrays: by Python 2 and 3, NumPy 1 and 2, and every protocol
NUMBER_NAMES: dict[str, Any] = {
    "numpy.dtype": DType,
    "_codecs.encode": _bytes,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
ARRAY_NAMES: dict[str, Any] = {
    **NUMBER_NAMES,
    "numpy.ndarray": Array,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.core.numeric._frombuffer": Array.from_buffer,
    "numpy._core.numeric._frombuffer": Array.from_buffer,
}
OPCODES = [
    getattr(pickle, name)[0]
    for name in """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL BINPERSID
    """.split()
]
MOST = 2**22  # parts of a pickle; the largest of these data sets has 2 ** 21


class _Parts:
    """The reading side of a file, which stops after MOST parts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.readline = file.readline
        self.left = MOST

    def read(self, size: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it has more than {MOST} parts")
        return self.file.read(size)


_Unpickler: Any = pickle._Unpickler  # Python's own, whose methods are not in its stubs


class ForbiddenPickle(pickle.UnpicklingError):
    """A pickle asks for something that could run code."""


class RestrictedUnpickler(_Unpickler):
    """Unpickler that runs no code from the file and takes little more memory than the file has.

    It knows only OPCODES, and calls only the functions in `names`. A restricted `find_class` of
    Python's fast unpickler would not be enough: a deep tuple as a dict key crashes the interpreter,
    and ten bytes make it allocate 34 GB. Raises ForbiddenPickle for a file that asks for other
    names, any exception for one that is damaged."""

    names = ARRAY_NAMES

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(_Parts(file), encoding="latin1")

    def load(self) -> Any:
        try:
            return super().load()
        except EOFError:
            raise ValueError("it ends too early") from None

    def find_class(self, module: str, name: str) -> Any:
        """The function that is called, or the value that is used, for a name in the file."""
        name = f"{module}.{name}"
        if name not in self.names:
            raise ForbiddenPickle(self.refusal(name[:100]))
        return self.names[name]

    def refusal(self, name: str) -> str:
        """The reason why a file that asks for `name` is not read."""
        return f"it asks for {name}, which could run code; nothing of it was run"

    def _call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        expect(isinstance(arguments, tuple) and callable(function))
        self.append(function(*arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.set_state(state)
        else:
            expect(isinstance(target, dict))  # attributes of a dict, metadata, are ignored

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        keys = items[::2]
        target = self.stack[-1]
        expect(isinstance(target, dict) and all(isinstance(k, (str, bytes, int)) for k in keys))
        target.update(zip(keys, items[1::2], strict=True))

    def _bytearray(self) -> None:
        """Bytes; Python's own reader allocates as many as the file announces."""
        (size,) = struct.unpack("<Q", self.read(8))
        content = self.read(size)
        expect(len(content) == size)
        self.append(content)

    dispatch = {
        **dict.fromkeys(range(256), lambda self: expect(False)),
        **{opcode: _Unpickler.dispatch[opcode] for opcode in OPCODES},
        pickle.FRAME[0]: lambda self: self.read(8),  # frames follow each other without a gap
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


def as_array(value: object) -> np.ndarray:
    """The NumPy array of an `Array` from a pickle."""
    if not isinstance(value, Array) or value.values is None:
        raise ValueError("it contains something else in place of an array")
    return value.values


def as_labels(values: Any) -> np.ndarray:
    """The NumPy array of a list of numbers or an `Array`; of dtype object if a label is no
    number."""
    if isinstance(values, Array):
        return as_array(values)
    numbers = all(isinstance(value, (int, float)) for value in values)
    return np.array(values) if numbers else np.empty(len(values), dtype=object)


# ---- downloads


def download(dataset: Any, data_dir: pathlib.Path, read: Callable[[], T]) -> T:
    """Download torchvision's `dataset` into `data_dir` and return `read()`.

    It is downloaded to a new folder inside `data_dir`; only files that are missing are then moved
    to their place. Raises what the download raises, of any type."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with _download_folder(data_dir) as folder:
            with contextlib.suppress(FileNotFoundError):
                return read()  # another run has been faster
            files = dataset.__new__(dataset)  # its constructor would read them, by pickle
            files.root = str(folder)
            with contextlib.redirect_stdout(io.StringIO()):
                files.download()
            for path in sorted(folder.rglob("*")):
                target = data_dir / path.relative_to(folder)
                there = any(form.exists() for form in forms(target))
                if path.is_file() and path.suffix != ".gz" and not there:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, target)
            return read()
    finally:
        socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def _download_folder(data_dir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder inside `data_dir`, for one process at a time if the file system has locks.

    At the end it is removed, with what killed downloads have left and every folder that was made
    for it and is empty."""
    made: list[pathlib.Path] = []  # the innermost first
    lock = None
    try:
        lock, locked = _lock(data_dir / ".download.lock", made)
        if locked:
            for left in data_dir.glob(".download-*"):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as new:
            yield pathlib.Path(new)
    finally:
        if lock:
            with contextlib.suppress(OSError):
                os.unlink(lock.name)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if lock:
            lock.close()


def _lock(path: pathlib.Path, made: list[pathlib.Path]) -> tuple[IO[bytes], bool]:
    """Wait for the lock file `path`: (the open file, whether it is locked). Adds the folders that
    are made for it to `made`."""
    for attempt in itertools.count(1):
        made.extend(folder for folder in path.parents if not folder.exists())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab", opener=refusing_links)
        except FileNotFoundError:  # another run, whose download failed, has removed the folder
            if attempt == 10:
                raise
            continue
        locked = _wait(file, path.parent)
        if is_current(file, path):
            return file, locked
        file.close()  # the run that had the lock has removed it
    raise AssertionError("the loop has no end")


def _wait(file: IO[bytes], data_dir: pathlib.Path) -> bool:
    """Wait until `file` is locked; False if there are no locks here."""
    try:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run's download to {data_dir}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True
