"""The files of data sets: downloading them, and their formats, the IDX files of MNIST and the
pickles of CIFAR.

A file may come from anywhere: none runs code, ends the interpreter or takes much more memory than
it has bytes. One that is damaged raises an exception of any type."""

import contextlib
import gzip
import io
import itertools
import math
import os
import pathlib
import pickle
import pickletools
import re
import shutil
import socket
import struct
import sys
import tempfile

import numpy as np

LARGEST = 2**31  # bytes of one file; the largest of these data sets has 2 ** 27.2
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(file):
    """The array in an IDX file: two zeros, type, number of dimensions, their sizes, the values; all
    big-endian."""
    header = file.read(4)
    zeros, kind, ndim = struct.unpack(">HBB", header) if len(header) == 4 else (0, 0, 0)
    if zeros or kind not in IDX_TYPES or not ndim:
        raise ValueError("it does not begin as an IDX file does")
    shape, dtype = struct.unpack(f">{ndim}I", file.read(4 * ndim)), np.dtype(IDX_TYPES[kind])
    announced = math.prod(shape) * dtype.itemsize
    values = file.read(min(announced, LARGEST) + 1)
    if len(values) != announced:
        found = "fewer" if len(values) < announced else "more"
        raise ValueError(f"its header announces {announced} bytes, and {found} follow")
    return np.frombuffer(values, dtype).reshape(shape)


def unpacked(file):
    """An open file, or what it holds where gzip has compressed it; its first bytes decide."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.open(file) if packed else file


def forms(path):
    """The paths that are read in place of an IDX file, the first that exists: `path`, Kaggle's name
    with a dot, a folder of either name with the file inside, each also with .gz behind it."""
    dotted = path.with_name(path.name.replace("-idx", ".idx"))
    inside = [outer / inner.name for outer in (path, dotted) for inner in (path, dotted)]
    plain = [path, dotted, *inside]
    return [name.with_name(name.name + end) for name in plain for end in ("", ".gz")]


# ---- files in another place

# Data sets whose files have the same names. What lies in a folder of this name is of that one.
SAME_NAMES = {"mnist", "fashionmnist", "kmnist", "emnist", "qmnist"}
DEEPEST = 4  # folders below the data folder that are looked at
MOST_ENTRIES = 10_000  # files and folders that are looked at in all


def canonical(name):
    """A file's name without what browsers and archives change: case, dots, dashes, .gz, (1)"""
    return re.sub("[^a-z0-9]", "", re.sub(r"(\.gz|\.tgz|\.tar| ?\(\d+\))+$", "", name.lower()))


def nearby(data_dir):
    """(folder, names of its files) of `data_dir` and of the folders below it that are not hidden,
    the nearest first."""
    left, seen = [data_dir], 0
    while left and seen < MOST_ENTRIES:
        folder = left.pop(0)
        try:
            with os.scandir(folder) as found:
                entries = sorted(itertools.islice(found, MOST_ENTRIES - seen), key=lambda e: e.name)
            files = [entry.name for entry in entries if entry.is_file()]
            inner = [
                folder / entry.name for entry in entries if entry.is_dir() and entry.name[:1] != "."
            ]
        except OSError:
            continue
        seen += len(entries)
        left += inner if len(folder.parts) - len(data_dir.parts) < DEEPEST else []
        yield folder, files


def misplaced_idx(data_dir, wanted):
    """Where the IDX file `wanted`, DATA_DIR/NAME/raw/FILE, is in another place or under another
    name, and what to do, in words; None where it is not."""
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


def misplaced_archive(data_dir, folder, names, archive):
    """The same of the folder with the files `names`, or of the archive that it comes in."""
    for place, files in nearby(data_dir):
        if place != folder and set(names) <= set(files):
            advice = f"give --data-dir {place.parent}" * (place.name == folder.name)
            return f"found {place}, which looks like it: {advice or f'move it to {folder}'}"
        for path in (place / name for name in files if canonical(name) == canonical(archive.name)):
            advice = f"give --data-dir {place}" * (path.name == archive.name)
            return f"found {path}, which looks like it: {advice or f'move it to {archive}'}"
    return None


# ---- pickles of arrays

# What arrays are pickled as: by Python 2 and 3, NumPy 1 and 2, and in every protocol.
ARRAY_MAKERS = {
    f"numpy.{core}.{function}"
    for core in ("core", "_core")
    for function in ("multiarray _reconstruct", "multiarray scalar", "numeric _frombuffer")
}
NAMES = {*ARRAY_MAKERS, "numpy ndarray", "numpy dtype", "_codecs encode"}
LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
MARKED = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"}
TAKEN = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "SETITEM": 2,
    "STACK_GLOBAL": 2,
    "REDUCE": 2,
    "BUILD": 1,
}
MOST = 2**21  # opcodes of one file: 40 for each image of the largest


class Call:
    """What a pickle asks to be called, with which arguments, and the state to be set then: noted
    down, never done."""

    def __init__(self, name, args=None):
        self.name, self.args, self.state = name, args, None


def read_pickle(file):
    """What a pickle holds: dicts, lists, tuples, text, bytes, numbers and, for arrays, Calls (see
    `as_array`).

    It interprets the few opcodes that such files need. Nothing is imported or called, and no key is
    hashed but text, bytes and numbers. A pickle.Unpickler that may import little is not enough: a
    deep tuple as a key ends the interpreter, and ten bytes make it take 34 GB. Raises
    UnpicklingError where a file asks for more."""
    stack, marks, memo = [], [], {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if step == MOST:
            raise ValueError(f"it has more than {MOST} parts")
        if opcode.name in LITERALS:
            stack.append(argument)
        elif opcode.name in CONSTANTS:
            stack.append(CONSTANTS[opcode.name])
        elif opcode.name in EMPTY:
            stack.append(EMPTY[opcode.name]())
        elif opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "STOP":
            return stack.pop()
        elif opcode.name not in ("PROTO", "FRAME"):
            _combine(opcode.name, argument, stack, marks)


def _combine(name, argument, stack, marks):
    """Does what takes items off the stack: a number of them, or all above the last mark."""
    start = marks.pop() if name in MARKED else len(stack) - TAKEN.get(name, 0)
    items = stack[start:]
    del stack[start:]
    match name:
        case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(items))
        case "LIST":
            stack.append(items)
        case "APPEND" | "APPENDS":
            list.extend(stack[-1], items)
        case "DICT":
            stack.append(_pairs(items))
        case "SETITEM" | "SETITEMS":
            dict.update(stack[-1], _pairs(items))
        case "GLOBAL" | "STACK_GLOBAL":
            asked = argument or " ".join(items)
            if asked not in NAMES:
                raise _refusal(asked.replace(" ", "."))
            stack.append(Call(asked))
        case "REDUCE":
            stack.append(Call(items[0].name, items[1]))
        case "BUILD" if isinstance(stack[-1], Call):
            (stack[-1].state,) = items
        case _:
            raise _refusal(name if argument is None else f"{name} {argument}")


def _refusal(what):
    return pickle.UnpicklingError(
        f"it asks for {what[:100]}, which could run code; nothing of it was run"
    )


def _pairs(items):
    """A dict of keys and values in turn."""
    keys, values = items[::2], items[1::2]
    if not all(isinstance(key, (str, bytes, int)) for key in keys):
        raise ValueError("it has keys that are neither text nor numbers")
    return dict(zip(keys, values, strict=True))


def as_array(call):
    """The array of numbers that a Call from `read_pickle` means; it may share memory with the bytes
    that were read."""
    if not isinstance(call, Call) or call.name not in ARRAY_MAKERS:
        raise ValueError("it holds something else in place of an array")
    shape, order = (), "C"
    if call.name.endswith("_reconstruct"):
        _, shape, dtype, in_fortran_order, content = call.state
        order = "F" if in_fortran_order else "C"
    elif call.name.endswith("_frombuffer"):
        content, dtype, shape, order = call.args
    else:
        dtype, content = call.args
    if not re.fullmatch("[biuf][1248]", dtype.args[0]):
        raise ValueError(f"it holds an array of {dtype.args[0]}, which are no numbers")
    if any(size < 0 for size in shape):  # which NumPy would take for "as many as there are"
        raise ValueError(f"it holds an array of shape {shape}")
    dtype = np.dtype(dtype.args[0]).newbyteorder(dtype.state[1])
    if isinstance(content, Call):  # of Python 3, in a protocol that knows no bytes
        content = content.args[0]
    if isinstance(content, str):  # of Python 2, or that
        content = content.encode("latin1")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def as_labels(values):
    """The array of a list of numbers, NumPy's among them, or that of an array; of dtype object if
    one is no number."""
    if isinstance(values, Call):
        return as_array(values)
    values = [as_array(value).item() if isinstance(value, Call) else value for value in values]
    numbers = all(isinstance(value, (int, float)) for value in values)
    return np.array(values) if numbers else np.empty(len(values), dtype=object)


# ---- downloads


def download(dataset, data_dir, read):
    """What `read()` returns, once torchvision has downloaded `dataset` to a place of its own inside
    `data_dir`, and those of its files that are not there yet are where they belong. Raises what the
    download does, of any type."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with _download_folder(data_dir) as folder:
            with contextlib.suppress(FileNotFoundError):
                return read()  # another run has been faster
            files = dataset.__new__(dataset)  # whose constructor would read them, by pickle
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
def _download_folder(data_dir):
    """A new folder inside `data_dir`, of one process at a time where the file system has locks. It
    goes in the end, and with it what killed downloads have left, and every folder that was made for
    it and is empty."""
    made, lock, locked = [], None, False
    try:
        lock, locked = _lock(data_dir / ".download.lock", made)
        for left in data_dir.glob(".download-*") if locked else ():
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
            yield pathlib.Path(folder)
    finally:
        with lock or contextlib.nullcontext():
            for remove in ([pathlib.Path(lock.name).unlink] if lock else []) + [
                folder.rmdir for folder in made
            ]:
                with contextlib.suppress(OSError):
                    remove()


def _no_link(path, flags):
    """Opener for `open` that neither follows a symbolic link nor waits for the reader of a FIFO."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.open(path, flags, 0o666)


def _lock(path, made):
    """Waits for the lock file `path`: (the file, to be removed and then closed; whether it is
    locked, for not every file system can). Notes in `made` the folders that are made for it, the
    innermost first."""
    attempts = 0
    while True:
        made.extend(folder for folder in path.parents if not folder.exists())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab", opener=_no_link)
        except FileNotFoundError:
            attempts += 1
            if attempts == 10:
                raise
            continue  # another run, whose download failed, has just removed the folder
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another run's download to {path.parent}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except (ImportError, OSError):
            locked = False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, locked
        file.close()  # the run that had the lock has removed it
