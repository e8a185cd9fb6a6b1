"""Tasks and their mini-batches, files of corrupted images, and the two kinds of errors that a user hears of."""
import contextlib
import io
import os
import pathlib
import re
import socket

import numpy as np
import torch
import torch.nn.functional as F
import torchvision


class UserError(Exception):
    """Something the user can put right: `main.py` prints it as one line and exits with `code`."""

    code = 2


class RunFailed(UserError):
    """A run that began well and cannot go on. resumable: whether going on from what is saved is the advice."""

    code, resumable = 1, False


def one_line(error):
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------------------ tasks
# A task is its name, the geometry of its images, and a function that reads one split: (images uint8 (n, C, H, W), labels (n,)).

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), tuple(3 * s for s in (0.2023, 0.1994, 0.2010))


class Task:
    def __init__(self, read, channels, size, classes, mean=(0.0,), std=(1.0,), augments=False):
        self.read, self.channels, self.size, self.classes = read, channels, size, classes
        self.mean, self.std = mean, std  # of the normalisation (image / 255 - mean) / std, per channel
        self.augments = augments  # whether flips and shifts keep the meaning of its images

    @property
    def inputs(self):
        return self.channels * self.size * self.size


def _digits(data_dir, train):
    """scikit-learn's 1797 handwritten digits, 8x8 with 17 grey values, enlarged to 28x28; 360 of them are for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    images, labels = (split[0], split[2]) if train else (split[1], split[3])
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = F.interpolate(images * (255 / 16), size=(28, 28), mode="bilinear").round().to(torch.uint8)
    return images, torch.tensor(labels, dtype=torch.int64)


def _without_checksums(dataset):
    """The torchvision class of a CIFAR data set, reading any files of its format: only a download is held to the checksums."""
    unchecked = {name: [(file, None) for file, _ in getattr(dataset, name)] for name in ("train_list", "test_list")}
    return type(dataset.__name__, (dataset,), {**unchecked, "meta": {**dataset.meta, "md5": None}})


def _torchvision(name):
    def read(data_dir, train):
        dataset = getattr(torchvision.datasets, name)
        if hasattr(dataset, "train_list"):
            dataset = _without_checksums(dataset)
        try:
            data = dataset(data_dir, train=train)
        except RuntimeError:  # torchvision's way to say that the files are not there
            data = _download(dataset, name, data_dir, train)
        except Exception as e:  # damaged files fail in any way
            raise UserError(f"the files of {name} in {data_dir} cannot be read: {one_line(e)}") from None
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.as_tensor(data.targets, dtype=torch.int64)
    return read


def _download(dataset, name, data_dir, train):
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return dataset(data_dir, train=train, download=True)
    except (RuntimeError, OSError) as e:
        reason = re.search(r"<urlopen error (.*?)>", str(e))
        raise UserError(f"the files of {name} are missing: not found in {os.path.abspath(data_dir)} (--data-dir), and the download "
                        f"failed ({reason[1] if reason else one_line(e)}); --task digits needs no files and no network") from None
    finally:
        socket.setdefaulttimeout(timeout)


TASKS = {"digits": Task(_digits, 1, 28, 10),
         "MNIST": Task(_torchvision("MNIST"), 1, 28, 10),
         "FashionMNIST": Task(_torchvision("FashionMNIST"), 1, 28, 10),
         "CIFAR10": Task(_torchvision("CIFAR10"), 3, 32, 10, CIFAR_MEAN, CIFAR_STD, augments=True),
         "CIFAR100": Task(_torchvision("CIFAR100"), 3, 32, 100, CIFAR_MEAN, CIFAR_STD, augments=True)}


class Batches:
    """Mini-batches of a data set that sits in memory (on the GPU where there is one) as uint8; one iteration is an epoch.

    images: uint8 (n, C, H, W); labels: (n,). Yields x, float32 (mbs, C, H, W) normalised, and y, (mbs,); the last batch may be
    smaller. With `generator`, order and augmentation are drawn from it, on the CPU, so that they are the same on every device.
    """

    def __init__(self, images, labels, mbs, task, device, generator=None, augment=False):
        self.images, self.labels, self.mbs = images.to(device), labels.to(device), mbs
        self.generator, self.augment = generator, augment
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (task.mean, task.std))

    def __len__(self):
        return -(-len(self.labels) // self.mbs)

    @property
    def samples(self):
        return len(self.labels)

    def __iter__(self):
        n = self.samples
        order = torch.arange(n) if self.generator is None else torch.randperm(n, generator=self.generator)
        for chosen in order.to(self.labels.device).split(self.mbs):
            images = self.images[chosen]
            if self.augment:
                images = flip_and_shift(images, self.generator)
            yield self.normalise(images.float() / 255), self.labels[chosen]

    def normalise(self, images):
        return (images - self.mean) / self.std


def flip_and_shift(images, generator, reach=4):
    """Each image mirrored with probability 1/2, then cut to its size at a random place after `reach` pixels of edge padding.

    images: (mbs, C, H, W), H = W. Both are one look-up: row and column of the source pixel, held at the edge.
    """
    mbs, channels, size, _ = images.shape
    shift = torch.randint(0, 2 * reach + 1, (mbs, 2), generator=generator) - reach
    mirrored = torch.rand(mbs, 1, generator=generator) < 0.5
    place = torch.arange(size)
    rows, columns = ((place + shift[:, i:i + 1]).clamp(0, size - 1).to(images.device) for i in (0, 1))
    columns = torch.where(mirrored.to(images.device), size - 1 - columns, columns)
    sample = torch.arange(mbs, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return images[sample, channel, rows.view(mbs, 1, size, 1), columns.view(mbs, 1, 1, size)]


def load_split(name, data_dir, train, size=None):
    """The first `size` (default: all) images and labels of one split. Raises UserError where the files are missing or too few."""
    images, labels = TASKS[name].read(data_dir, train)
    if size is not None and size > len(labels):
        raise UserError(f"argument --{'train' if train else 'test'}-size: got {size}, {name} has {len(labels)} such images")
    return images[:size], labels[:size]


# CIFAR-10-C and its like: a file per corruption, uint8 (5 n, 32, 32, 3), the n test images at severity 1, then at severity 2 and so on.
CORRUPTIONS = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog",
               "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",  # the 15 that published means are over
               "speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = 5


def open_corruptions(folder, task, size=None):
    """Every corruption of the test images of `task`, none of it in memory: {name: five arrays, one per severity, uint8 (n, 32, 32, 3),
    memory-mapped}, and the labels, (5, n); of the n images of a severity the first `size`. Raises UserError, naming the file, where one
    is not as it should be."""
    def opened(name):
        path = pathlib.Path(folder, f"{name}.npy")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{path.absolute()} is missing: --corruptions-dir names the folder of the corrupted images") from None
        except Exception as e:  # a damaged file can fail in any way
            raise UserError(f"{path.absolute()} cannot be read: {one_line(e)}") from None
        return path, array

    def wrong(path, array, expected):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        return UserError(f"{path.absolute()} holds {found}, expected {expected}")

    path, labels = opened("labels")
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or len(labels) % SEVERITIES:
        raise wrong(path, labels, f"whole numbers, as many for each of {SEVERITIES} severities")
    if labels.min() < 0 or labels.max() >= task.classes:
        raise UserError(f"{path.absolute()} holds labels from {labels.min()} to {labels.max()}, the task has {task.classes} classes")
    shape, arrays = (len(labels), task.size, task.size, task.channels), {}
    for name in CORRUPTIONS:
        path, array = opened(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
            raise wrong(path, array, f"uint8 {shape}, as many images as there are labels")
        arrays[name] = [part[:size] for part in np.split(array, SEVERITIES)]
    labels = torch.from_numpy(labels.reshape(SEVERITIES, -1).astype(np.int64))
    if size is not None and size > labels.size(1):
        raise UserError(f"argument --test-size: got {size}, {pathlib.Path(folder).absolute()} has {labels.size(1)} images of each severity")
    return arrays, labels[:, :size]
