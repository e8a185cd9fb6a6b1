"""Tasks, mini-batches, files of corrupted images, and the two errors that are reported to users.

torch and torchvision are imported where they are used: the command line asks for names and sizes of
tasks before it loads them."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import pickle
import re
import tarfile
from collections.abc import Callable

import numpy as np

import data_files


class UserError(Exception):
    """An error that the user can correct: `main.py` prints one line and exits with `code`."""

    code = 2


class RunFailed(UserError):
    """A run that began and cannot continue. resumable: whether the message advises to resume."""

    code = 1
    resumable = False


def one_line(error: BaseException) -> str:
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---- tasks

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = tuple(3 * s for s in (0.2023, 0.1994, 0.2010))


@dataclasses.dataclass
class Task:
    """A data set: how a split is read, the geometry of its images and their normalisation.

    read: (data_dir, train) -> [(where it is, images (n, C, H, W), labels (n,)), ...], NumPy arrays
        as they are in the files; `load_split` validates them
    mean, std: of the normalisation (image / 255 - mean) / std, per channel
    augments: whether flips and shifts keep the meaning of the images"""

    read: Callable
    channels: int
    size: int  # height and width
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augments: bool = False

    @property
    def inputs(self) -> int:
        """Numbers per image."""
        return self.channels * self.size * self.size


def _digits(data_dir, train):
    """scikit-learn's 1797 handwritten digits, 8x8 with 17 grey values, enlarged to 28x28; 360 are
    for testing."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    images, labels = (split[0], split[2]) if train else (split[1], split[3])
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = torch.nn.functional.interpolate(images * (255 / 16), size=(28, 28), mode="bilinear")
    return [("scikit-learn", images.round().to(torch.uint8).numpy(), labels)]


def _torchvision(name, read):
    """A function that reads a split of torchvision's data set `name` by `read(dataset, data_dir,
    train)`, after a download if a file does not exist (FileNotFoundError)."""

    def read_split(data_dir, train):
        import torchvision

        dataset = getattr(torchvision.datasets, name)
        data_dir = pathlib.Path(os.path.abspath(os.path.expanduser(data_dir)))
        try:
            return read(dataset, data_dir, train)
        except FileNotFoundError as e:
            missing = os.path.relpath(e.filename, data_dir)
        try:
            return data_files.download(dataset, data_dir, lambda: read(dataset, data_dir, train))
        except UserError:
            raise
        except Exception as e:  # a download can fail in any way
            reason = re.search(r"<urlopen error (.*?)>", str(e))
            left = data_dir / name / "processed"
            note = f"; {left}, of an old torchvision, is not read" if os.path.exists(left) else ""
            raise UserError(
                f"the files of {name} are missing: {missing} not found in {data_dir} "
                "(--data-dir), and the download failed "
                f"({reason[1] if reason else one_line(e)}){note}; "
                "--task digits needs no files and no network"
            ) from None

    return read_split


@contextlib.contextmanager
def _opened(path):
    """Open the file for a block whose errors become a UserError, except FileNotFoundError: only
    missing files are downloaded."""
    try:
        with data_files.open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged file can fail in any way
        reason = one_line(e)[:300]
        if isinstance(e, pickle.UnpicklingError) or isinstance(e, OSError) and e.errno:
            raise UserError(f"{path} cannot be read: {reason}") from None
        raise UserError(
            f"{path} is damaged and cannot be read: {reason}; delete it to download it again"
        ) from None


def _refuse_misplaced(dataset, path, found):
    """Raise UserError if a file that is missing at `path` was `found` in another place: a download
    would take precedence over the user's file."""
    if found:
        raise UserError(
            f"the files of {dataset.__name__} are missing: {path} does not exist; {found}"
        )


def _read_mnist(dataset, data_dir, train):
    """Read the IDX files, in any of `data_files.forms`."""

    def read(name):
        path = folder / f"{'train' if train else 't10k'}-{name}-ubyte"
        form = next(filter(os.path.isfile, data_files.forms(path)), path)
        if not os.path.exists(form):
            _refuse_misplaced(dataset, path, data_files.misplaced_idx(data_dir, path))
        with _opened(form) as file:
            return data_files.read_idx(data_files.unpacked(file))

    folder = data_dir / dataset.__name__ / "raw"
    images, labels = read("images-idx3"), read("labels-idx1")
    return [(folder, images[:, None] if images.ndim == 3 else images, labels)]


def _read_cifar(dataset, data_dir, train):
    """Read the pickled batches or, if one is missing, the archive with them, which is not
    unpacked."""
    folder = data_dir / dataset.base_folder
    archive = data_dir / dataset.filename
    meta = dataset.meta["filename"]
    names = [name for name, _ in (dataset.train_list if train else dataset.test_list)] + [meta]
    parts = {}

    def read(where, name, file):
        entry = data_files.RestrictedUnpickler(file).load()
        if not isinstance(entry, dict):
            raise ValueError(f"{name} does not hold a dict")
        parts[name] = where
        if name != meta:
            images = data_files.as_array(entry.get("data"))
            if images.shape[1:] == (3072,):
                images = images.reshape(-1, 3, 32, 32)
            labels = data_files.as_labels(entry.get("labels", entry.get("fine_labels", [])))
            parts[name] = (where, images, labels)

    if os.path.exists(archive) and not all(os.path.exists(folder / name) for name in names):
        with _opened(archive) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                place, name = os.path.split(member.name)
                ours = place == dataset.base_folder and name in names
                if ours and member.isfile() and member.size <= data_files.LARGEST:
                    read(archive, name, tar.extractfile(member))
            if len(parts) < len(names):
                raise ValueError(
                    "it lacks " + ", ".join(name for name in names if name not in parts)
                )
    else:
        for name in names:
            if not os.path.exists(folder / name):
                found = data_files.misplaced_archive(data_dir, folder, names, archive)
                _refuse_misplaced(dataset, folder / name, found)
            with _opened(folder / name) as file:
                read(folder / name, name, file)
    return [parts[name] for name in names[:-1]]


TASKS = {
    "digits": Task(_digits, 1, 28, 10),
    "MNIST": Task(_torchvision("MNIST", _read_mnist), 1, 28, 10),
    "FashionMNIST": Task(_torchvision("FashionMNIST", _read_mnist), 1, 28, 10),
    "CIFAR10": Task(
        _torchvision("CIFAR10", _read_cifar), 3, 32, 10, CIFAR_MEAN, CIFAR_STD, augments=True
    ),
    "CIFAR100": Task(
        _torchvision("CIFAR100", _read_cifar), 3, 32, 100, CIFAR_MEAN, CIFAR_STD, augments=True
    ),
}


class Batches:
    """Mini-batches of a data set that sits in memory, on the GPU if there is one, as uint8; one
    iteration is an epoch.

    images: uint8 (n, C, H, W); labels: (n,). Yields x, float32 (mbs, C, H, W) normalised, and y,
    (mbs,); the last batch may be smaller. With `generator`, order and augmentation are drawn from
    it, on the CPU, so that they are the same on every device."""

    def __init__(self, images, labels, mbs, task, device, generator=None, augment=False):
        import torch

        self.images, self.labels, self.mbs = images.to(device), labels.to(device), mbs
        self.generator, self.augment = generator, augment
        self.mean, self.std = (
            torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (task.mean, task.std)
        )

    def __len__(self):
        return -(-len(self.labels) // self.mbs)

    @property
    def samples(self):
        return len(self.labels)

    def __iter__(self):
        import torch

        n = self.samples
        order = (
            torch.arange(n)
            if self.generator is None
            else torch.randperm(n, generator=self.generator)
        )
        for chosen in order.to(self.labels.device).split(self.mbs):
            images = self.images[chosen]
            if self.augment:
                images = flip_and_shift(images, self.generator)
            yield self.normalise(images.float() / 255), self.labels[chosen]

    def normalise(self, images):
        return (images - self.mean) / self.std


def to_device(tensor, device):
    """Copy a tensor from the CPU to a device without waiting for what it computes meanwhile."""
    if device.type == "cuda" and tensor.is_cpu and not hasattr(tensor, "fake_mode"):
        tensor = tensor.pin_memory()  # without it the host waits for the copy
    return tensor.to(device, non_blocking=True)


def flip_and_shift(images, generator, reach=4):
    """Each image, of (mbs, C, H, W), H = W, mirrored with probability 1/2, then cut to its size at
    a random place after edge padding by `reach`. Both are one look-up: row and column of the source
    pixel, held at the edge."""
    import torch

    (mbs, channels, size, _), device = images.shape, images.device
    shift = to_device(
        torch.randint(0, 2 * reach + 1, (mbs, 2), generator=generator) - reach, device
    )
    mirrored = to_device(torch.rand(mbs, 1, generator=generator) < 0.5, device)
    place, sample, channel = (torch.arange(n, device=device) for n in (size, mbs, channels))
    rows, columns = ((place + shift[:, i : i + 1]).clamp(0, size - 1) for i in (0, 1))
    columns = torch.where(mirrored, size - 1 - columns, columns)
    return images[
        sample.view(-1, 1, 1, 1),
        channel.view(-1, 1, 1),
        rows.view(mbs, 1, size, 1),
        columns.view(mbs, 1, 1, size),
    ]


def load_split(name, data_dir, train, size=None):
    """Load the first `size` (default: all) samples of a split: images, uint8 (n, C, H, W), and
    labels, int64 (n,). Raises UserError if files are missing, damaged, too small or do not fit the
    task."""
    import torch

    parts = TASKS[name].read(data_dir, train)
    for part in parts:
        _check(name, *part)
    _, images, labels = zip(*parts)
    images = np.ascontiguousarray(np.concatenate(images))
    labels = np.concatenate(labels).astype(np.int64)
    if size is not None and size > len(labels):
        flag = f"--{'train' if train else 'test'}-size"
        raise UserError(f"argument {flag}: got {size}, {name} has {len(labels)} such images")
    return torch.from_numpy(images)[:size], torch.from_numpy(labels)[:size]


def fingerprint(arrays):
    """A short digest of the types, shapes and values of some arrays, or tensors on the CPU."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array)
    return digest.hexdigest()[:16]


def _check(name, where, images, labels):
    """Raises UserError unless these are images and labels as the task `name` needs them."""
    task = TASKS[name]
    shape, last = (task.channels, task.size, task.size), task.classes - 1
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        found = f"{images.dtype.name} images {images.shape}"
    elif not len(images):
        found = "no images"
    elif labels.shape != (len(images),):
        found = f"{len(images)} images and {'x'.join(map(str, labels.shape))} labels"
    elif labels.dtype.kind not in "iu":
        found = f"labels of type {labels.dtype.name}"
    elif labels.min() < 0 or labels.max() > last:
        found = f"labels from {labels.min()} to {labels.max()}"
    else:
        return
    raise UserError(
        f"{where} does not fit --task {name}: it holds {found}; expected are uint8 images "
        f"(n, {str(shape)[1:]}, at least one, and as many labels, whole numbers from 0 to {last}"
    )


# CIFAR-10-C and its like: a file per corruption, the n test images at severity 1, then at severity
# 2 and so on. Published means are over the first 15.
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "speckle_noise",
    "gaussian_blur",
    "spatter",
    "saturate",
)
PUBLISHED = CORRUPTIONS[:15]
SEVERITIES = 5


@dataclasses.dataclass
class Corruptions:
    """A folder of corrupted test images, none of them in memory. names: the corruptions that it
    has, all of PUBLISHED among them; labels: int64 (SEVERITIES, n), of the images that are used;
    notes: what was not as usual, in words."""

    folder: pathlib.Path
    names: list
    labels: object
    notes: list

    def severities(self, name):
        """Yields images (n, C, H, W), a tensor of numbers from 0 to 255, and labels (n,) at
        severity 1, 2, ... Raises UserError where the file holds something else."""
        import torch

        path, array = _opened_array(self.folder, name)
        for images, labels in zip(_by_severity(array), self.labels):
            yield torch.from_numpy(_pixels(path, array, images[: len(labels)])), labels

    def fingerprint(self, name):
        """A digest of what `severities` yields, all of which is read."""
        return fingerprint(array for pair in self.severities(name) for array in pair)


def open_corruptions(folder, task, size=None):
    """The Corruptions of the test images of `task` in a folder; of a severity `size` images.

    Images are uint8, or floating-point numbers from 0 to 1, with the channels last or first; labels
    those of all images, or of one severity, the same for each. Raises UserError, naming the file,
    where one is not as it should be."""
    import torch

    folder, notes = pathlib.Path(folder).absolute(), []
    path, labels = _labels_in(folder, task)
    missing = [name for name in CORRUPTIONS if not (folder / f"{name}.npy").exists()]
    lacking = [name for name in missing if name in PUBLISHED]
    if lacking:
        more = f", and so are {len(lacking) - 1} others" * (len(lacking) > 1)
        raise UserError(
            f"{folder / lacking[0]}.npy is missing{more}: published means are over "
            f"{len(PUBLISHED)} corruptions, whose files --corruptions-dir must have"
        )
    if missing:
        notes.append(
            f"{folder} lacks {', '.join(missing)}: the mean is over the first "
            f"{len(PUBLISHED)} corruptions, not over all {len(CORRUPTIONS)}"
        )
    names = [name for name in CORRUPTIONS if name not in missing]
    n, counts = len(labels), {name: _images_in(folder, name, task) for name in names}
    if 2 * sum(count == SEVERITIES * n for count in counts.values()) > len(counts):
        notes.append(
            f"{path} has {n} labels for {SEVERITIES * n} images: taken for each of "
            f"{SEVERITIES} severities"
        )
        labels = np.tile(labels, SEVERITIES)
    for name, count in counts.items():
        if count != len(labels):
            shape = len(labels), task.size, task.size, task.channels
            raise _unexpected(
                *_opened_array(folder, name), f"uint8 {shape}, as many images as there are labels"
            )
    by_severity = labels.reshape(SEVERITIES, -1) if len(labels) % SEVERITIES == 0 else None
    if by_severity is None or (by_severity != by_severity[0]).any():
        raise UserError(
            f"{path} holds {n} labels that do not repeat {SEVERITIES} times: one severity alone, "
            "or images in another order; expected are all images at severity 1, then at severity "
            f"2 to {SEVERITIES}, and their labels {SEVERITIES} times or once"
        )
    labels = torch.from_numpy(by_severity.astype(np.int64))
    if size is not None and size > labels.size(1):
        raise UserError(
            f"argument --test-size: got {size}, {folder} has {labels.size(1)} images "
            "of each severity"
        )
    return Corruptions(folder, names, labels[:, :size], notes)


def _opened_array(folder, name):
    """(path, array) of a file of a folder of corrupted images, memory-mapped."""
    path = pathlib.Path(folder, f"{name}.npy")
    try:
        data_files.open_regular(path).close()  # np.load would wait for a writer of a pipe
        return path, np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        near = (
            place
            for place, files in data_files.nearby(path.parent)
            if {f"{name}.npy", f"{CORRUPTIONS[0]}.npy"} <= set(files)
        )
        hint = next((f"; found {place}: give --corruptions-dir {place}" for place in near), "")
        raise UserError(
            f"{path} is missing: --corruptions-dir names the folder of the corrupted images{hint}"
        ) from None
    except Exception as e:  # a damaged file can fail in any way
        raise UserError(f"{path} cannot be read: {one_line(e)}") from None


def _unexpected(path, array, expected):
    found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
    return UserError(f"{path} holds {found}, expected {expected}")


def _labels_in(folder, task):
    """(path, labels (n,)) of the folder: whole numbers of any type that are classes of the task."""
    path, found = _opened_array(folder, "labels")
    labels = np.asarray(found) if isinstance(found, np.ndarray) else np.empty((0, 0, 0))
    # a column, or a row for each severity
    if labels.ndim == 2 and (1 in labels.shape or len(labels) == SEVERITIES):
        labels = labels.reshape(-1)
    kind = labels.dtype.kind
    whole = kind in "iu" or kind == "f" and (labels == np.floor(labels)).all()
    if not whole or labels.ndim != 1 or not len(labels):
        raise _unexpected(
            path, found, f"whole numbers, as many for each of {SEVERITIES} severities"
        )
    if not (labels.min() >= 0 and labels.max() < task.classes):
        raise UserError(
            f"{path} holds labels from {labels.min():g} to {labels.max():g}, the task "
            f"has {task.classes} classes"
        )
    return path, labels


def _images_in(folder, name, task):
    """How many images a file holds, of all severities together."""
    path, array = _opened_array(folder, name)
    shapes = [(task.size, task.size, task.channels), (task.channels, task.size, task.size)]
    good = isinstance(array, np.ndarray) and (array.dtype == np.uint8 or array.dtype.kind == "f")
    if good and array.shape[1:] in shapes:
        return len(array)
    if good and array.shape[2:] in shapes and len(array) == SEVERITIES:
        return SEVERITIES * array.shape[1]
    raise _unexpected(path, array, f"uint8, or numbers from 0 to 1, (n, {str(shapes[0])[1:]}")


def _by_severity(array):
    """The images of each severity, views of what `_images_in` has found to be images."""
    return array if array.ndim == 5 else np.split(array, SEVERITIES)


def _pixels(path, array, images):
    """Images of the file `path`, a part of its `array`, as an array of their own (n, C, H, W), from
    0 to 255: uint8, or float32 where floating-point numbers are between the whole ones."""
    last = images.shape[1] == images.shape[2]  # the channels
    images = np.array(images.transpose(0, 3, 1, 2) if last else images, order="C")
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):
        raise _unexpected(
            path,
            array,
            f"uint8 {array.shape}, or numbers from 0 to 1; they go from {low:g} to {high:g}",
        )
    # the error of a whole number that was divided by 255 in that type, and more
    rounding = 0.1 if images.dtype.itemsize == 2 else 1e-3
    images = 255 * images.astype(np.float32)
    nearest = np.rint(images)
    return nearest.astype(np.uint8) if np.abs(images - nearest).max() < rounding else images
