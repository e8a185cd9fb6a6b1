"""Tasks, mini-batches, files of corrupted images, and the two errors that are reported to users.

torch and torchvision are imported where they are used: the command line needs names and sizes of
tasks before it loads them."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

import data_files

if TYPE_CHECKING:
    import torch


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


class Part(NamedTuple):
    """A part of a split as it is in one file or folder; `load_split` validates it."""

    source: object  # the path, to be printed
    images: np.ndarray  # (n, C, H, W)
    labels: np.ndarray  # (n,)


@dataclasses.dataclass
class Task:
    """A data set: how a split is read, the geometry of its images and their normalisation.

    read: (data_dir, train) -> the parts of a split
    mean, std: of the normalisation (image / 255 - mean) / std, per channel
    augments: whether flips and shifts keep the meaning of the images
    class_names: one per class; none if the classes are digits"""

    read: Callable[[str, bool], list[Part]]
    channels: int
    size: int  # height and width
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augments: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.class_names or tuple(map(str, range(self.classes)))

    @property
    def inputs(self) -> int:
        """Numbers per image."""
        return self.channels * self.size * self.size


def _read_digits(data_dir: str, train: bool) -> list[Part]:
    """Read scikit-learn's 1797 handwritten digits, 8x8 with 17 grey values, enlarged to 28x28; 360
    are for testing."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    pixels = torch.tensor(train_images if train else test_images, dtype=torch.float32)
    enlarged = torch.nn.functional.interpolate(
        pixels.reshape(-1, 1, 8, 8) * (255 / 16), size=(28, 28), mode="bilinear"
    )
    labels = train_labels if train else test_labels
    return [Part("scikit-learn", enlarged.round().to(torch.uint8).numpy(), labels)]


def _torchvision(
    name: str, read: Callable[[Any, pathlib.Path, bool], list[Part]]
) -> Callable[[str, bool], list[Part]]:
    """A function that reads a split of torchvision's data set `name` by `read(dataset, data_dir,
    train)`, after a download if a file does not exist (FileNotFoundError)."""

    def read_split(data_dir: str, train: bool) -> list[Part]:
        import torchvision

        dataset = getattr(torchvision.datasets, name)
        root = pathlib.Path(os.path.abspath(os.path.expanduser(data_dir)))
        try:
            return read(dataset, root, train)
        except FileNotFoundError as e:
            missing = os.path.relpath(e.filename, root)
        try:
            return data_files.download(dataset, root, lambda: read(dataset, root, train))
        except UserError:
            raise
        except Exception as e:  # a download can fail in any way
            reason = re.search(r"<urlopen error (.*?)>", str(e))
            left = root / name / "processed"
            note = f"; {left}, of an old torchvision, is not read" if os.path.exists(left) else ""
            raise UserError(
                f"the files of {name} are missing: {missing} not found in {root} "
                "(--data-dir), and the download failed "
                f"({reason[1] if reason else one_line(e)}){note}; "
                "--task digits needs no files and no network"
            ) from None

    return read_split


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a file for a block whose errors become a UserError, except FileNotFoundError: only
    missing files are downloaded."""
    try:
        with data_files.open_regular(path) as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged file can fail in any way
        reason = one_line(e)[:300]
        if isinstance(e, data_files.ForbiddenPickle) or isinstance(e, OSError) and e.errno:
            raise UserError(f"{path} cannot be read: {reason}") from None
        raise UserError(
            f"{path} is damaged and cannot be read: {reason}; delete it to download it again"
        ) from None


def _refuse_misplaced(dataset: Any, path: pathlib.Path, found: str | None) -> None:
    """Raise UserError if a file that is missing at `path` was `found` in another place: a download
    would take precedence over the user's file."""
    if found:
        raise UserError(
            f"the files of {dataset.__name__} are missing: {path} does not exist; {found}"
        )


def _read_mnist(dataset: Any, data_dir: pathlib.Path, train: bool) -> list[Part]:
    """Read the IDX files, in any of `data_files.forms`."""

    def read(name: str) -> np.ndarray:
        path = folder / f"{'train' if train else 't10k'}-{name}-ubyte"
        form = next(filter(os.path.isfile, data_files.forms(path)), path)
        if not os.path.exists(form):
            _refuse_misplaced(dataset, path, data_files.misplaced_idx(data_dir, path))
        with _opened(form) as file:
            return data_files.read_idx(data_files.unpacked(file))

    folder = data_dir / dataset.__name__ / "raw"
    images = read("images-idx3")
    labels = read("labels-idx1")
    return [Part(folder, images[:, None] if images.ndim == 3 else images, labels)]


def _read_cifar(dataset: Any, data_dir: pathlib.Path, train: bool) -> list[Part]:
    """Read the pickled batches or, if one is missing, the archive with them, which is not
    unpacked. The file of class names is read as well: it is part of a complete copy."""
    folder = data_dir / dataset.base_folder
    archive = data_dir / dataset.filename
    batches = [name for name, _ in (dataset.train_list if train else dataset.test_list)]
    names = [*batches, dataset.meta["filename"]]
    complete = set()  # names of the files that have been read
    parts = {}

    def read(source: pathlib.Path, name: str, file: IO[bytes]) -> None:
        entry = data_files.RestrictedUnpickler(file).load()
        if not isinstance(entry, dict):
            raise ValueError(f"{name} does not contain a dict")
        complete.add(name)
        if name in batches:
            images = data_files.as_array(entry.get("data"))
            if images.shape[1:] == (3072,):
                images = images.reshape(-1, 3, 32, 32)
            labels = data_files.as_labels(entry.get("labels", entry.get("fine_labels", [])))
            parts[name] = Part(source, images, labels)

    if os.path.exists(archive) and not all(os.path.exists(folder / name) for name in names):
        with _opened(archive) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                place, name = os.path.split(member.name)
                wanted = place == dataset.base_folder and name in names
                if wanted and member.isfile() and member.size <= data_files.LARGEST:
                    content = tar.extractfile(member)
                    assert content  # of a regular file
                    read(archive, name, content)
            missing = [name for name in names if name not in complete]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
    else:
        for name in names:
            if not os.path.exists(folder / name):
                found = data_files.misplaced_archive(data_dir, folder, names, archive)
                _refuse_misplaced(dataset, folder / name, found)
            with _opened(folder / name) as file:
                read(folder / name, name, file)
    return [parts[name] for name in batches]


FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
TASKS = {
    "digits": Task(_read_digits, 1, 28, 10),
    "MNIST": Task(_torchvision("MNIST", _read_mnist), 1, 28, 10),
    "FashionMNIST": Task(
        _torchvision("FashionMNIST", _read_mnist), 1, 28, 10, class_names=FASHION_MNIST
    ),
    "CIFAR10": Task(
        _torchvision("CIFAR10", _read_cifar),
        3,
        32,
        10,
        CIFAR_MEAN,
        CIFAR_STD,
        augments=True,
        class_names=CIFAR10,
    ),
    "CIFAR100": Task(
        _torchvision("CIFAR100", _read_cifar),
        3,
        32,
        100,
        CIFAR_MEAN,
        CIFAR_STD,
        augments=True,
        class_names=tuple(name.replace("_", " ") for name in CIFAR100.split()),
    ),
}


class Batches:
    """Mini-batches of a data set that sits in memory, on the GPU if there is one, as uint8; one
    iteration is an epoch.

    images: uint8 (n, C, H, W); labels: (n,). Yields x, float32 (mbs, C, H, W) normalised, and y,
    (mbs,); the last batch may be smaller. With `generator`, order and augmentation are drawn from
    it, on the CPU, so that they are the same on every device."""

    def __init__(
        self,
        images: "torch.Tensor",
        labels: "torch.Tensor",
        mbs: int,
        task: Task,
        device: "torch.device | str",
        generator: "torch.Generator | None" = None,
        augment: bool = False,
    ) -> None:
        import torch

        self.images = images.to(device)
        self.labels = labels.to(device)
        self.mbs = mbs
        self.generator = generator
        self.augment = augment
        self.mean = torch.tensor(task.mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(task.std, device=device).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return -(-self.samples // self.mbs)

    @property
    def samples(self) -> int:
        """The number of images."""
        return len(self.labels)

    def __iter__(self) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
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

    def normalise(self, images: "torch.Tensor") -> "torch.Tensor":
        """Normalise images with values from 0 to 1, (mbs, C, H, W)."""
        return (images - self.mean) / self.std


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a tensor from the CPU to a device without waiting for the work queued there."""
    if device.type == "cuda" and tensor.is_cpu and not hasattr(tensor, "fake_mode"):
        tensor = tensor.pin_memory()  # without it the host waits for the copy
    return tensor.to(device, non_blocking=True)


def flip_and_shift(
    images: "torch.Tensor", generator: "torch.Generator | None", reach: int = 4
) -> "torch.Tensor":
    """Mirror each image, (mbs, C, H, W) with H = W, with probability 1/2, then crop it at a random
    place after edge padding by `reach`. Both are one look-up: row and column of the source pixel,
    clamped to the edge."""
    import torch

    mbs, channels, size, _ = images.shape
    device = images.device
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


def load_split(
    name: str, data_dir: str, train: bool, size: int | None = None
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Load the first `size` (default: all) samples of a split: images, uint8 (n, C, H, W), and
    labels, int64 (n,). Raises UserError if files are missing, damaged, too small or do not fit the
    task."""
    import torch

    parts = [Part(*part) for part in TASKS[name].read(data_dir, train)]
    for part in parts:
        _validate(part, name)
    images = np.ascontiguousarray(np.concatenate([part.images for part in parts]))
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
    if size is not None and size > len(labels):
        flag = f"--{'train' if train else 'test'}-size"
        raise UserError(f"argument {flag}: got {size}, {name} has {len(labels)} such images")
    return torch.from_numpy(images)[:size], torch.from_numpy(labels)[:size]


def fingerprint(arrays: "Iterable[np.ndarray | torch.Tensor]") -> str:
    """A short digest of the types, shapes and values of some arrays, or tensors on the CPU."""
    digest = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def _validate(part: Part, name: str) -> None:
    """Raise UserError unless images and labels are as the task `name` needs them."""
    task = TASKS[name]
    images = part.images
    labels = part.labels
    shape = (task.channels, task.size, task.size)
    last = task.classes - 1
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
        f"{part.source} does not fit --task {name}: it contains {found}; expected are uint8 images "
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
class _ArrayFile:
    """A .npy file of a folder of corrupted images, memory-mapped."""

    path: pathlib.Path
    array: Any  # a np.ndarray, unless the file is an archive of several

    @classmethod
    def open(cls, folder: pathlib.Path, name: str) -> "_ArrayFile":
        """Open folder/NAME.npy. Raises UserError."""
        path = folder / f"{name}.npy"
        try:
            data_files.open_regular(path).close()  # np.load would wait for a writer of a pipe
            return cls(path, np.load(path, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError:
            near = (
                place
                for place, files in data_files.nearby(folder)
                if {f"{name}.npy", f"{CORRUPTIONS[0]}.npy"} <= set(files)
            )
            hint = next((f"; found {place}: give --corruptions-dir {place}" for place in near), "")
            raise UserError(
                f"{path} is missing: --corruptions-dir names the folder of the corrupted images"
                + hint
            ) from None
        except Exception as e:  # a damaged file can fail in any way
            raise UserError(f"{path} cannot be read: {one_line(e)}") from None

    def unexpected(self, expected: str) -> UserError:
        """The error that the file contains something else than `expected`."""
        found = "several arrays"
        if isinstance(self.array, np.ndarray):
            found = f"{self.array.dtype} {self.array.shape}"
        return UserError(f"{self.path} contains {found}, expected {expected}")

    def count_images(self, task: Task) -> int:
        """Return the number of images, of all severities together. Raises UserError for a file of
        anything else: images are uint8 or floating-point, (5 n, ...) or (5, n, ...)."""
        last = (task.size, task.size, task.channels)
        shapes = [last, (task.channels, task.size, task.size)]
        array = self.array
        if isinstance(array, np.ndarray) and (array.dtype == np.uint8 or array.dtype.kind == "f"):
            if array.shape[1:] in shapes:
                return len(array)
            if array.shape[2:] in shapes and len(array) == SEVERITIES:
                return SEVERITIES * array.shape[1]
        raise self.unexpected(f"uint8, or numbers from 0 to 1, (n, {str(last)[1:]}")

    def by_severity(self) -> Sequence[np.ndarray]:
        """The images of each severity, as views."""
        return self.array if self.array.ndim == 5 else np.split(self.array, SEVERITIES)

    def pixels(self, images: np.ndarray) -> np.ndarray:
        """Copy some images of the file to an array (n, C, H, W) of values from 0 to 255: uint8, or
        float32 if the file has floating-point values between whole numbers."""
        channels_last = images.shape[1] == images.shape[2]
        images = np.array(images.transpose(0, 3, 1, 2) if channels_last else images, order="C")
        if images.dtype == np.uint8:
            return images
        low = images.min()
        high = images.max()
        if not (low >= 0 and high <= 1):
            raise self.unexpected(
                f"uint8 {self.array.shape}, or numbers from 0 to 1; they go from {low:g} to "
                f"{high:g}"
            )
        # more than the error of a whole number that was divided by 255 in that type
        rounding = 0.1 if images.dtype.itemsize == 2 else 1e-3
        images = 255 * images.astype(np.float32)
        nearest = np.rint(images)
        return nearest.astype(np.uint8) if np.abs(images - nearest).max() < rounding else images


@dataclasses.dataclass
class Corruptions:
    """A folder of corrupted test images, none of them in memory.

    names: its corruptions, among them all of PUBLISHED
    labels: int64 (SEVERITIES, n), of the images that are used
    notes: lines about what is unusual in the folder"""

    folder: pathlib.Path
    names: list[str]
    labels: "torch.Tensor"
    notes: list[str]

    def severities(self, name: str) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Yields images (n, C, H, W), values from 0 to 255, and labels (n,) of severity 1, 2, ...
        Raises UserError if the file contains something else."""
        import torch

        file = _ArrayFile.open(self.folder, name)
        for images, labels in zip(file.by_severity(), self.labels):
            yield torch.from_numpy(file.pixels(images[: len(labels)])), labels

    def fingerprint(self, name: str) -> str:
        """A digest of everything that `severities` yields."""
        return fingerprint(array for pair in self.severities(name) for array in pair)


def open_corruptions(folder: str | os.PathLike, task: Task, size: int | None = None) -> Corruptions:
    """Open a folder of corrupted test images of `task`, and use `size` images of each severity.

    Images are uint8, or floating-point numbers from 0 to 1, with the channels last or first; labels
    are those of all images, or of one severity, the same for each. Raises UserError, which names
    the file, for anything else."""
    import torch

    folder = pathlib.Path(folder).absolute()
    notes = []
    label_file = _ArrayFile.open(folder, "labels")
    labels = _labels(label_file, task)
    missing = [name for name in CORRUPTIONS if not (folder / f"{name}.npy").exists()]
    lacking = [name for name in missing if name in PUBLISHED]
    if lacking:
        more = f", and so are {len(lacking) - 1} others" if len(lacking) > 1 else ""
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
    counts = {name: _ArrayFile.open(folder, name).count_images(task) for name in names}
    n = len(labels)
    if 2 * sum(count == SEVERITIES * n for count in counts.values()) > len(counts):
        notes.append(
            f"{label_file.path} has {n} labels for {SEVERITIES * n} images: taken for each of "
            f"{SEVERITIES} severities"
        )
        labels = np.tile(labels, SEVERITIES)
    for name, count in counts.items():
        if count != len(labels):
            shape = (len(labels), task.size, task.size, task.channels)
            raise _ArrayFile.open(folder, name).unexpected(
                f"uint8 {shape}, as many images as there are labels"
            )
    by_severity = labels.reshape(SEVERITIES, -1) if len(labels) % SEVERITIES == 0 else None
    if by_severity is None or (by_severity != by_severity[0]).any():
        raise UserError(
            f"{label_file.path} contains {n} labels that do not repeat {SEVERITIES} times: one "
            "severity alone, or images in another order; expected are all images at severity 1, "
            f"then at severity 2 to {SEVERITIES}, and their labels {SEVERITIES} times or once"
        )
    if size is not None and size > by_severity.shape[1]:
        raise UserError(
            f"argument --test-size: got {size}, {folder} has {by_severity.shape[1]} images "
            "of each severity"
        )
    used = torch.from_numpy(by_severity[:, :size].astype(np.int64))
    return Corruptions(folder, names, used, notes)


def _labels(file: _ArrayFile, task: Task) -> np.ndarray:
    """The labels (n,) in a file: whole numbers of any type that are classes of the task."""
    is_array = isinstance(file.array, np.ndarray)
    labels = np.asarray(file.array) if is_array else np.empty((0, 0, 0))
    # a column, or a row for each severity
    if labels.ndim == 2 and (1 in labels.shape or len(labels) == SEVERITIES):
        labels = labels.reshape(-1)
    kind = labels.dtype.kind
    whole = kind in "iu" or kind == "f" and (labels == np.floor(labels)).all()
    if not whole or labels.ndim != 1 or not len(labels):
        raise file.unexpected(f"whole numbers, as many for each of {SEVERITIES} severities")
    if not (labels.min() >= 0 and labels.max() < task.classes):
        raise UserError(
            f"{file.path} contains labels from {labels.min():g} to {labels.max():g}, the task "
            f"has {task.classes} classes"
        )
    return labels
