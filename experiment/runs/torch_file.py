"""A restricted reader of torch.save files: it runs no code and allocates no more than the file has.

torch.load(weights_only=True) is not enough. A deep tuple as a dict key crashes the interpreter, 400
bytes that call bytearray allocate gigabytes, and tensors in the format before PyTorch 1.6 can
contain memory that was never written.
"""

import io
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch

from data_files import NUMBER_NAMES, RestrictedUnpickler, expect
from experiment.runs.legacy import OLD_GLOBALS

LARGEST_PICKLE = 2**23  # bytes of a checkpoint without its tensors; 10,000 epochs have 2 ** 21
# Of the format before PyTorch 1.6
MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001

Storage = Callable[[str, torch.dtype, int], torch.Tensor]  # (key, dtype, number of values) -> 1-d


def load(file: io.BufferedReader, size: int) -> Any:
    """Load a torch.save file of `size` bytes: dicts, lists, tuples, text, numbers, tensors on the
    CPU and `Pickled`. Raises any exception if it contains something else or is damaged."""
    start = file.read(4)
    file.seek(0)
    if start == b"PK\3\4":
        return _load_archive(file, size)
    if start[:1] != pickle.PROTO:
        raise ValueError("it is not a file of torch.save")
    return _load_old(file, size)


def _load_archive(file: io.BufferedReader, size: int) -> Any:
    """Load the format since PyTorch 1.6: an uncompressed zip archive with a pickle, data.pkl, and a
    record for each storage. Reading a record compares its checksum."""
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    storages: dict[str, bytearray] = {}
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("it is compressed, as torch.save leaves no file")  # to expand to any size
    if sum(record.file_size for record in records) > size:
        raise ValueError("its parts are larger than the file")
    pickles = [r for r in records if re.fullmatch(r"[^/]*/data\.pkl", r.filename)]
    if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
        raise ValueError("it is not an archive of torch.save")
    root = pickles[0].filename.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist():
        _check_byteorder(archive.read(f"{root}byteorder").decode())

    def storage(key: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        if key not in storages:
            storages[key] = bytearray(archive.read(f"{root}data/{key}"))
        return _values(storages[key], dtype, numel)

    return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _load_old(file: io.BufferedReader, size: int) -> Any:
    """Load the format before PyTorch 1.6: pickles of a magic number, the version, the machine, the
    state and the keys of its storages; then for each storage the number of values and the
    values."""
    pickles = io.BytesIO(file.read(min(size, LARGEST_PICKLE)))
    storages: dict[str, bytearray] = {}
    left = size  # bytes that no storage has claimed yet

    def storage(key: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        nonlocal left
        if key not in storages:
            left -= numel * dtype.itemsize
            if left < 0:
                raise ValueError(f"storage {key} has {numel:,} values, more than the file")
            storages[key] = bytearray(numel * dtype.itemsize)
        return _values(storages[key], dtype, numel)

    magic, version, machine, state, keys = (_Unpickler(pickles, storage).load() for _ in range(5))
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError("it is not a file of torch.save")
    _check_byteorder("little" if machine["little_endian"] else "big")
    file.seek(pickles.tell())
    for key in keys:
        content = storages.pop(key)
        file.read(8)  # the number of values again
        if file.readinto(content) != len(content):
            raise ValueError(f"it ends within storage {key}")
    if storages:
        raise ValueError(f"it lacks the values of storage {next(iter(storages))}")
    return state


def _check_byteorder(found: str) -> None:
    if found != sys.byteorder:
        raise ValueError(f"it is {found}-endian, this machine is {sys.byteorder}-endian")


def _values(content: bytearray, dtype: torch.dtype, numel: int) -> torch.Tensor:
    """The bytes of a storage as a 1-d tensor."""
    if len(content) != numel * dtype.itemsize:
        raise ValueError(f"a storage of {numel:,} {dtype} has {len(content):,} bytes")
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


class _Unpickler(RestrictedUnpickler):
    def __init__(self, content: IO[bytes], storage: Storage) -> None:
        super().__init__(content)
        self.storage = storage
        self.names = NAMES

    def refusal(self, name: str) -> str:
        if name.partition(".")[0] == "torch":
            return f"it has weights or other parts that are not plain tensors: {name}"
        return super().refusal(name)

    def persistent_load(self, saved: Any) -> torch.Tensor:
        """The storage that ("storage", type, key, device, number of values) names."""
        expect(isinstance(saved, tuple) and len(saved) in (5, 6))
        kind, dtype, key, _, numel, *view = saved
        expect(
            kind == "storage"
            and isinstance(dtype, torch.dtype)
            and isinstance(key, str)
            and isinstance(numel, int)
            and numel >= 0
            and not any(view)
        )
        return self.storage(key, dtype, numel)


# ---- functions and types for the names in a file


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    """The view of a storage; raises RuntimeError beyond its end. metadata: negated, for example."""
    expect(not metadata and isinstance(size, tuple) and len(size) <= 8)
    return storage.as_strided(size, stride, offset)


def _dict(*pairs: Any) -> dict:
    """An empty OrderedDict; its items follow in the pickle."""
    expect(not pairs)
    return {}


TYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
NAMES: dict[str, Any] = {
    **NUMBER_NAMES,
    **OLD_GLOBALS,
    **{f"torch.{name}Storage": dtype for name, dtype in TYPES.items()},
    "collections.OrderedDict": _dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
}
