"""Tasks and mini-batches, run folders, checkpoints and plots."""
import ast
import contextlib
import csv
import datetime
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from tqdm import tqdm

import data_files


class UserError(Exception):
    """Something the user can put right: `main.py` prints it as one line and exits with `code`."""

    code = 2


class RunError(UserError):
    """A run that began well and cannot go on."""

    code = 1


def progress(iterable, description, total=None):
    """A tqdm bar on standard error; in a log file it speaks once a minute and only of work that takes longer."""
    interactive = sys.stderr.isatty()
    return tqdm(iterable, desc=description, total=total, leave=False, dynamic_ncols=True, delay=0 if interactive else 60,
                mininterval=0.1 if interactive else 60)


progress.write = tqdm.write  # a line that leaves a bar in one piece


class Account:
    """Where the time of a training goes, in seconds by part, and how many steps the free phases took.

    On a CUDA device work is timed by events and added up only when asked for, so that nothing waits for it meanwhile."""

    def __init__(self, device=None):
        self.cuda = device is not None and device.type == "cuda"
        self.seconds, self.events = {}, []
        self.images = self.steps = self.most = self.unsettled = 0

    @contextlib.contextmanager
    def time(self, part):
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self.events.append((part, *events))
        else:
            start = time.perf_counter()
            yield
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def watch(self, batches, part):
        """Iterates over `batches`, and takes the time that they take to come."""
        iterator = iter(batches)
        while True:
            with self.time(part):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def settling(self, steps, settled):
        """Counts in the free phase of a mini-batch: of each image the steps that it took, and whether it had settled by then."""
        self.images += len(steps)
        self.steps, self.unsettled = self.steps + steps.sum(), self.unsettled + (~settled).sum()
        self.most = torch.maximum(steps.max(), torch.as_tensor(self.most, device=steps.device))

    def pool(self, workers):
        """Counts in the free phases of all workers, in each one's account."""
        counted = workers.gather([int(count) for count in (self.images, self.steps, self.unsettled, self.most)])
        self.images, self.steps, self.unsettled = (sum(row[i] for row in counted) for i in range(3))
        self.most = max(row[3] for row in counted)

    def used(self):
        """Columns of metrics.csv: mean and maximum of the steps, and the share in % of images that did not settle; {} if not counted."""
        if not self.images:
            return {}
        return {"steps_mean": round(int(self.steps) / self.images, 2), "steps_max": int(self.most),
                "unsettled": round(100 * int(self.unsettled) / self.images, 4)}

    def settled(self):
        return "{steps_mean:.1f} steps on average, {steps_max} at most, {unsettled:.2f} % unsettled".format(**self.used())

    def total(self):
        """Seconds by part."""
        for part, start, end in self.events:
            end.synchronize()
            self.seconds[part] = self.seconds.get(part, 0.0) + start.elapsed_time(end) / 1000
        self.events = []
        return self.seconds

    def add(self, other):
        for part, seconds in other.total().items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def shares(self):
        whole = sum(self.total().values()) or 1.0
        return ", ".join(f"{part} {seconds:.1f} s ({100 * seconds / whole:.0f} %)" for part, seconds in self.seconds.items())


# ---------------------------------------------------------------------------------------------------------------- workers


class LostWorker(RunError):
    """Another worker has ended, or was not heard of for too long."""


class Workers:
    """The processes that torchrun started to work on one thing together; one, for which nothing here does anything, without it.

    rank, size: which one this is, of how many; number 0 writes the files. local_rank: which one on its machine. What exchanges
    (`sum`, `average_gradients`, `gather`, `collect`, `agree`, `ahead`) is to be called by all, in the same order, and raises
    LostWorker if one of them does not come.
    """

    PATIENCE = datetime.timedelta(minutes=10)  # longer than a download of a data set, which the others wait for

    def __init__(self, rank=0, size=1, local_rank=0):
        self.rank, self.size, self.local_rank, self.device, self.stderr = rank, size, local_rank, None, sys.stderr

    @classmethod
    def launched(cls):
        """Those that torchrun's environment variables speak of."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    @property
    def launcher(self):
        """The words in front of main.py on the command line."""
        return ["python"] if self.size == 1 else ["torchrun", "--standalone", "--nproc_per_node", str(self.size)]

    def meet(self, device):
        """From here on workers exchange: what is on the CPU by gloo, what is on a CUDA device by nccl."""
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with self._exchange():
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=self._store(self.PATIENCE),
                                        rank=self.rank, world_size=self.size, timeout=self.PATIENCE)

    def part(self):
        if self.size > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self):
        try:
            yield
        except RuntimeError as e:  # all of torch.distributed's errors are
            reason = re.sub(r"^\[\S+:\d+\] ", "", one_line(e)).split(". ")[0]  # without the place in gloo's source
            raise LostWorker(f"a worker was lost ({reason})") from None

    # ---- shares of the work

    def rows(self, n):
        """This worker's part of a mini-batch of n samples: (its rows, how many they are).

        With fewer samples than workers some get none. They compute along on a sample of another's, for a weight of 0: no learning
        rule has to do with empty batches, and all draw the same random numbers."""
        first, last = (-(-n * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(min(first, n - 1), max(first + 1, last)), last - first

    def deal(self, iterable):
        """Every size-th item, from this worker's first on. See `collect`."""
        return itertools.islice(iterable, self.rank, None, self.size)

    # ---- exchange

    @torch.no_grad()
    def average_gradients(self, model, n_local, n_global):
        """Makes every p.grad, this worker's mean over its n_local samples, the mean over all n_global of the mini-batch."""
        if self.size == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([grad.flatten() for grad in grads]).mul_(n_local / n_global)
        with self._exchange():
            dist.all_reduce(together)
        for grad, mean in zip(grads, together.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    def sum(self, value):
        """The sum over the workers of a number or tensor, as a tensor."""
        total = torch.as_tensor(value, device=self.device)
        if self.size > 1:
            total = total.clone()
            with self._exchange():
                dist.all_reduce(total)
        return total

    def gather(self, item):
        """[item of worker 0, of worker 1, ...]."""
        items = [item]
        if self.size > 1:
            items = [None] * self.size
            with self._exchange():
                dist.all_gather_object(items, item)
        return items

    def collect(self, dealt):
        """The list whose items were dealt, from what each worker made of its own."""
        return [item for row in itertools.zip_longest(*self.gather(dealt), fillvalue=Workers) for item in row if item is not Workers]

    def agree(self, item):
        """Worker 0's."""
        return self.gather(item)[0]

    @contextlib.contextmanager
    def ahead(self):
        """Worker 0 goes through the block before all others do."""
        if self.rank > 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    # ---- what the user hears

    @contextlib.contextmanager
    def one_voice(self):
        """Within the block only worker 0 prints and shows progress."""
        with contextlib.ExitStack() as stack:
            if self.rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def end(self, message, code):
        """Says why the run ends, if no other worker has said so before, and returns `code`; of several workers ends this one at once,
        for orderly goodbyes would wait for those that are lost."""
        if self.size == 1 or self._first():
            print(message, file=self.stderr, flush=True)
        if self.size > 1:
            sys.stdout.flush()
            os._exit(code)
        return code

    def _first(self):
        """Whether no other worker has asked before."""
        try:
            return self._store(datetime.timedelta(seconds=5)).add("said why", 1) == 1
        except RuntimeError:  # torchrun is gone as well
            return True

    def _store(self, timeout):
        """What torchrun itself keeps for the workers, whichever of them is lost; empty for those that it starts in place of lost ones."""
        address, port, attempt = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
        return dist.PrefixStore(f"attempt {attempt}", dist.TCPStore(address, int(port), timeout=timeout))


# --------------------------------------------------------------------------------------------------------------- tasks
# A task is its name, the geometry of its images, and a function that reads one split: for each file of images a tuple
# (where it is, images (n, C, H, W), labels (n,)) of NumPy arrays as they were found, which `load_split` checks.

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
    """scikit-learn's 1797 handwritten digits, 8x8 with 17 grey values, enlarged to 28x28; 360 are for testing."""
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
    """Reads the files of torchvision's data set `name` by `read(dataset, data_dir, train)`; where that finds that one
    does not exist (FileNotFoundError), they are downloaded."""
    def read_split(data_dir, train):
        import torchvision
        dataset = getattr(torchvision.datasets, name)
        data_dir = pathlib.Path(os.path.abspath(os.path.expanduser(data_dir)))
        try:
            return read(dataset, data_dir, train)
        except FileNotFoundError:
            pass
        try:
            return data_files.download(dataset, data_dir, lambda: read(dataset, data_dir, train))
        except UserError:
            raise
        except Exception as e:  # a download can fail in any way
            reason, left = re.search(r"<urlopen error (.*?)>", str(e)), data_dir / name / "processed"
            note = f"; {left}, of an old torchvision, is not read" if os.path.exists(left) else ""
            raise UserError(f"the files of {name} are missing: not found in {data_dir} (--data-dir), and the download "
                            f"failed ({reason[1] if reason else one_line(e)}){note}; "
                            "--task digits needs no files and no network") from None
    return read_split


@contextlib.contextmanager
def _opened(path):
    """The file at `path`, to be read in the block, whose errors become a UserError. FileNotFoundError alone stays: only
    what is not there at all is downloaded."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")  # a pipe would be waited for
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged file can fail in any way
        reason = one_line(e)[:300]
        if isinstance(e, pickle.UnpicklingError) or isinstance(e, OSError) and e.errno:
            raise UserError(f"{path} cannot be read: {reason}") from None
        raise UserError(f"{path} is damaged and cannot be read: {reason}; delete it to download it again") from None


def _read_mnist(dataset, data_dir, train):
    """From the files, or where one is not there from the compressed one beside it, which stays as it is."""
    def read(name):
        path = folder / f"{'train' if train else 't10k'}-{name}-ubyte"
        packed = path.with_name(path.name + ".gz")
        if os.path.exists(path) or not os.path.exists(packed):
            with _opened(path) as file:
                return data_files.read_idx(file)
        with _opened(packed) as file, gzip.open(file) as unpacked:
            return data_files.read_idx(unpacked)
    folder = data_dir / dataset.__name__ / "raw"
    images, labels = read("images-idx3"), read("labels-idx1")
    return [(folder, images[:, None] if images.ndim == 3 else images, labels)]


def _read_cifar(dataset, data_dir, train):
    """From the files, or where one is not there from the archive that they come in, which stays as it is."""
    folder, archive, meta = data_dir / dataset.base_folder, data_dir / dataset.filename, dataset.meta["filename"]
    names, parts = [*(name for name, _ in (dataset.train_list if train else dataset.test_list)), meta], {}

    def read(where, name, file):
        entry = data_files.read_pickle(file)
        if not isinstance(entry, dict):
            raise ValueError(f"{name} does not hold a dict")
        parts[name] = where
        if name != meta:
            images = data_files.as_array(entry.get("data"))
            images = images.reshape(-1, 3, 32, 32) if images.shape[1:] == (3072,) else images
            parts[name] = where, images, data_files.as_labels(entry.get("labels", entry.get("fine_labels", [])))

    if os.path.exists(archive) and not all(os.path.exists(folder / name) for name in names):
        with _opened(archive) as file, tarfile.open(fileobj=file, mode="r|gz") as tar:
            for member in tar:
                place, name = os.path.split(member.name)
                ours = place == dataset.base_folder and name in names
                if ours and member.isfile() and member.size <= data_files.LARGEST:
                    read(archive, name, tar.extractfile(member))
            if len(parts) < len(names):
                raise ValueError("it lacks " + ", ".join(name for name in names if name not in parts))
    else:
        for name in names:
            with _opened(folder / name) as file:
                read(folder / name, name, file)
    return [parts[name] for name in names[:-1]]


TASKS = {"digits": Task(_digits, 1, 28, 10),
         "MNIST": Task(_torchvision("MNIST", _read_mnist), 1, 28, 10),
         "FashionMNIST": Task(_torchvision("FashionMNIST", _read_mnist), 1, 28, 10),
         "CIFAR10": Task(_torchvision("CIFAR10", _read_cifar), 3, 32, 10, CIFAR_MEAN, CIFAR_STD, augments=True),
         "CIFAR100": Task(_torchvision("CIFAR100", _read_cifar), 3, 32, 100, CIFAR_MEAN, CIFAR_STD, augments=True)}


class Batches:
    """Mini-batches of a data set that sits in memory, on the GPU if there is one, as uint8; one iteration is an epoch.

    images: uint8 (n, C, H, W); labels: (n,). Yields x, float32 (mbs, C, H, W) normalised, and y, (mbs,); the last batch
    may be smaller. With `generator`, order and augmentation are drawn from it, on the CPU, so that they are the same on
    every device.
    """

    def __init__(self, images, labels, mbs, task, device, generator=None, augment=False):
        import torch
        self.images, self.labels, self.mbs = images.to(device), labels.to(device), mbs
        self.generator, self.augment = generator, augment
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (task.mean, task.std))

    def __len__(self):
        return -(-len(self.labels) // self.mbs)

    @property
    def samples(self):
        return len(self.labels)

    def __iter__(self):
        import torch
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
    """Each image mirrored with probability 1/2, then cut to its size at a random place after edge padding by `reach`.

    images: (mbs, C, H, W), H = W. Both are one look-up: row and column of the source pixel, held at the edge.
    """
    import torch
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
    """The first `size` (default: all) samples of one split: images, uint8 (n, C, H, W), and labels, int64 (n,). Raises
    UserError where the files are missing, damaged, not what the task needs, or too few."""
    import torch
    parts = TASKS[name].read(data_dir, train)
    for part in parts:
        _check(name, *part)
    _, images, labels = zip(*parts)
    images, labels = np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels).astype(np.int64)
    if size is not None and size > len(labels):
        flag = f"--{'train' if train else 'test'}-size"
        raise UserError(f"argument {flag}: got {size}, {name} has {len(labels)} such images")
    return torch.from_numpy(images)[:size], torch.from_numpy(labels)[:size]


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
    raise UserError(f"{where} does not fit --task {name}: it holds {found}; expected are uint8 images "
                    f"(n, {str(shape)[1:]}, at least one, and as many labels, whole numbers from 0 to {last}")


# CIFAR-10-C and its like: a file per corruption, uint8 (5 n, 32, 32, 3), the n test images at severity 1, then at
# severity 2 and so on. Published means are over the first 15.
CORRUPTIONS = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
               "zoom_blur", "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
               "jpeg_compression", "speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = 5


def open_corruptions(folder, task, size=None):
    """Every corruption of the test images of `task`, none of it in memory: {name: five arrays, one per severity, uint8
    (n, 32, 32, 3), memory-mapped}, and the labels, (5, n); of the n images of a severity the first `size`. Raises
    UserError, naming the file, where one is not as it should be."""
    import torch

    def opened(name):
        path = pathlib.Path(folder, f"{name}.npy")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"{path.absolute()} is missing: --corruptions-dir names the folder of the corrupted images"
                            ) from None
        except Exception as e:  # a damaged file can fail in any way
            raise UserError(f"{path.absolute()} cannot be read: {one_line(e)}") from None
        return path, array

    def wrong(path, array, expected):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        return UserError(f"{path.absolute()} holds {found}, expected {expected}")

    path, labels = opened("labels")
    numbers = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.ndim == 1
    if not numbers or not len(labels) or len(labels) % SEVERITIES:
        raise wrong(path, labels, f"whole numbers, as many for each of {SEVERITIES} severities")
    if labels.min() < 0 or labels.max() >= task.classes:
        raise UserError(f"{path.absolute()} holds labels from {labels.min()} to {labels.max()}, the task has "
                        f"{task.classes} classes")
    shape, arrays = (len(labels), task.size, task.size, task.channels), {}
    for name in CORRUPTIONS:
        path, array = opened(name)
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.shape != shape:
            raise wrong(path, array, f"uint8 {shape}, as many images as there are labels")
        arrays[name] = [part[:size] for part in np.split(array, SEVERITIES)]
    labels = torch.from_numpy(labels.reshape(SEVERITIES, -1).astype(np.int64))
    if size is not None and size > labels.size(1):
        raise UserError(f"argument --test-size: got {size}, {pathlib.Path(folder).absolute()} has {labels.size(1)} "
                        "images of each severity")
    return arrays, labels[:, :size]


# ------------------------------------------------------------------------------------------------------------ run folders


def one_line(error):
    """The message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def replacing(path):
    """A path beside `path` to write to; renamed to `path` when the block ends well, so that no reader ever sees half a file
    and a failure, a full disk say, leaves the old one. Raises RunError if it cannot be written."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as e:
        raise RunError(f"cannot write {path}: {one_line(e)}; what was there before is unchanged") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def save_state(path, state):
    """torch.save into a file that is replaced whole."""
    with replacing(path) as beside:
        try:
            torch.save(state, beside)
        except RuntimeError as e:  # torch's way to say that the disk is full
            raise OSError(one_line(e).split(". ")[0]) from None


class Run:
    """The folder of one run. `folder`: its path."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        for half_written in self.folder.glob(".*.tmp-*"):  # by a process that was killed
            half_written.unlink(missing_ok=True)

    @classmethod
    def create(cls, args, device, command_line, model, checkpoint, root="results"):
        """A new folder root/ALG/LOSS/yyyy-mm-dd/hh-mm-ss_gpuN (or _cpu; with _2, _3 ... behind it where that exists). It appears
        with hyperparameters.txt and the checkpoint of epoch 0 inside, so that a run killed at any moment can be resumed."""
        now = datetime.datetime.now()
        place = "cpu" if device.type == "cpu" else f"gpu{device.index or 0}"
        final = pathlib.Path(root, args.alg, args.loss, now.strftime("%Y-%m-%d"), now.strftime("%H-%M-%S") + "_" + place)
        hidden = final.with_name(f".{final.name}.{os.getpid()}")
        try:
            hidden.mkdir(parents=True)
            run = cls(hidden)
            run.write_hyperparameters(command_line, vars(args), model, device)
            run.save("checkpoint.tar", checkpoint)
            for attempt in itertools.count(1):
                run.folder = final if attempt == 1 else final.with_name(f"{final.name}_{attempt}")
                try:
                    os.rename(hidden, run.folder)
                    return run
                except OSError as e:
                    if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # not that another run was first
                        raise
        except OSError as e:
            raise RunError(f"cannot create the run folder {final}: {one_line(e)}") from None
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def write_hyperparameters(self, command_line, args, model, device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        lines = [f"command line: {command_line}", f"date: {datetime.datetime.now():%Y-%m-%d %H:%M:%S}", f"device: {device} ({name})",
                 *(f"{name}: {value}" for name, value in versions().items()), "", "arguments:",
                 *(f"  {name}: {value!r}" for name, value in sorted(args.items())), "", "model:", str(model), ""]
        with replacing(self.folder / "hyperparameters.txt") as path:
            path.write_text("\n".join(lines))

    def append_hyperparameters(self, line):
        file = self.folder / "hyperparameters.txt"
        before = file.read_text() if file.exists() else ""
        with replacing(file) as path:
            path.write_text(before + line + "\n")

    def save(self, name, state):
        save_state(self.folder / name, state)

    def write_csv(self, name, rows):
        """rows: list of dicts; what a row lacks stays empty."""
        with replacing(self.folder / name) as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows(rows)

    def read_csv(self, name):
        try:
            with open(self.folder / name, newline="") as file:
                return list(csv.DictReader(file))
        except OSError:
            return []

    def append_csv(self, name, rows):
        self.write_csv(name, self.read_csv(name) + rows)

    def forget_after(self, epoch):
        """Drops what a killed process wrote of epochs behind the one that the run goes on from."""
        rows = self.read_csv("gducheck.csv")
        if rows:
            self.write_csv("gducheck.csv", [row for row in rows if not (row.get("epoch") or "").isdigit() or int(row["epoch"]) <= epoch])

    def save_figure(self, name, figure):
        with replacing(self.folder / name) as path:
            figure.savefig(path, format="png", dpi=120)

    def plot_accuracy(self, rows):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy of the free phase")
        epochs = [row["epoch"] for row in rows]
        for key, label in (("train_acc", "train, during the epoch"), ("test_acc", "test, after the epoch")):
            axes.plot(epochs, [row[key] for row in rows], marker="o", markersize=3,
                      label=f"{label} (last {rows[-1][key]:.2f})")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        self.save_figure("train-test_acc.png", figure)

    def plot_activity(self, neurons):
        """Histogram of each layer's neurons (a list of tensors) at the end of a free phase."""
        figure = Figure(figsize=(3.2 * len(neurons), 3.2), layout="constrained")
        figure.suptitle("Neurons at the end of the free phase, last training batch")
        for n, (axes, state) in enumerate(zip(figure.subplots(1, len(neurons), squeeze=False)[0], neurons), 1):
            values = state.detach().float().flatten().cpu().numpy()
            low, high = float(values.min()), float(values.max())
            room = 0.0 if high - low > 1e-3 else 0.5  # saturated layers can hold one value only
            axes.hist(values, bins=50, range=(low - room, high + room), log=True)
            axes.set_title(f"s_{n}, {' x '.join(map(str, state.shape[1:]))}", fontsize=9)
            axes.set_xlabel("activation")
        figure.axes[0].set_ylabel("neurons")
        self.save_figure("neural_activity.png", figure)

    def write_lines(self, name, lines):
        with replacing(self.folder / name) as path:
            path.write_text("\n".join(lines) + "\n")

    def move_aside(self, stem, ends):
        """Renames the files STEM + end, those that exist, to STEM_1 + end, or the first number at which there is no .txt yet."""
        number = next(n for n in itertools.count(1) if not (self.folder / f"{stem}_{n}.txt").exists())
        for end in ends:
            old = self.folder / (stem + end)
            if old.exists():
                os.replace(old, self.folder / f"{stem}_{number}{end}")

    def plot_characteristic(self, accuracy, settled, eps):
        """The shares of images classified correctly and settled, over the free steps: Characteristic_Time.png."""
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="time steps of the free phase", ylabel="share of the test images (%)", ylim=(-2, 102),
                                  title="Accuracy over the number of free steps")
        for shares, label, style in ((accuracy, f"classified correctly (last {100 * accuracy[-1]:.2f})", "-"),
                                     (settled, f"settled: no layer moved by {eps:g} of its norm (last {100 * settled[-1]:.2f})", "--")):
            axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], style, marker="o" if len(shares) <= 50 else None, markersize=3,
                      label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", fontsize=9)
        self.save_figure("Characteristic_Time.png", figure)

    def plot_gdu(self, BPTT, EP, rows, drawn=5):
        """Cumulative EP (dashed) and BPTT (solid) over time for some synapses or neurons of each kind, drawn with a fixed seed:
        gdu_NAME.png; and the distance of the summed estimates to BPTT of all: gdu_overview.png. rows: of `compare_gdu`."""
        generator = torch.Generator().manual_seed(0)
        for name, bptt in BPTT.items():
            width = bptt[0].numel()
            live = bptt.flatten(1).abs().sum(0).cpu().nonzero().flatten()  # entries that stay 0 have nothing to show
            pool = live if len(live) else torch.arange(width)
            chosen = pool[torch.randperm(len(pool), generator=generator)[:drawn]]
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.add_subplot(xlabel="time steps of the nudged phase, and of BPTT from the end", ylabel="cumulative estimate",
                                      title=f"{name}: EP (dashed) and BPTT (solid)")
            time = range(1, len(bptt) + 1)
            for n, entry in enumerate(chosen.tolist()):
                place = ", ".join(str(int(i)) for i in np.unravel_index(entry, bptt.shape[1:]))
                for estimate, style in ((bptt, "-"), (EP[name], "--")):
                    axes.plot(time, estimate.flatten(1)[:, entry].cumsum(0).cpu().numpy(), style, color=f"C{n}",
                              label=f"[{place}]" if style == "-" else None)
            axes.axhline(0, color="black", linewidth=0.5)
            axes.grid(alpha=0.3)
            figure.legend(loc="outside right upper", fontsize=8, title="entry", title_fontsize=8)
            self.save_figure(f"gdu_{name}.png", figure)

        names = list(BPTT)
        figure = Figure(figsize=(7, 1.6 + 0.32 * len(names)), layout="constrained")
        axes = figure.add_subplot(xlabel="||sum of EP - sum of BPTT|| / ||sum of BPTT||", title="Distance of the summed EP estimates to BPTT")
        estimates = list(dict.fromkeys(row["estimate"] for row in rows))
        for n, estimate in enumerate(estimates):
            values = {row["name"]: row["distance"] for row in rows if row["estimate"] == estimate}
            axes.plot([values[name] for name in names], range(len(names)), "os"[n], label=estimate)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        self.save_figure("gdu_overview.png", figure)


class Sweep:
    """The files of an attack sweep in a run folder: Adversarial_Accuracy.txt and .csv and .png (other attacks and norms than PGD in
    the 2-norm have them in their names). Rows of the same settings are kept, so that a killed sweep goes on; a file of other settings is
    moved aside to NAME_1 and so on."""

    def __init__(self, run, attack, norm, settings, clean):
        self.run, self.settings, self.clean = run, settings, clean
        self.stem = "Adversarial_Accuracy" + ("" if (attack, norm) == ("pgd", "2") else f"_{attack}_{norm}")
        self.text = run.folder / f"{self.stem}.txt"
        self.header = "# settings: " + json.dumps(settings, sort_keys=True)
        self.rows = []
        if self.text.exists():
            if self.header in self.text.read_text().splitlines():
                self.rows = run.read_csv(f"{self.stem}.csv")
            else:
                run.move_aside(self.stem, (".csv", ".png", "_images.png", "_images.npz", ".txt"))

    def has(self, eps):
        return any(float(row["eps"]) == eps for row in self.rows)

    def add(self, eps, results):
        """The rows of one eps: results as `model_utils.attack` returns them."""
        for grad, result in results.items():
            row = {"eps": f"{eps:g}", "grad": grad, "clean": f"{self.clean:.6f}", "adversarial": f"{result['correct'].mean():.6f}",
                   "masked": f"{result['masked']:.6f}", "unmoved": f"{result['unmoved']:.6f}", "mean_norm": f"{result['mean_norm']:.6g}"}
            self.rows.append({**row, "eps": repr(eps)})
        lines = [self.header, "# masked: share of images whose gradient was exactly zero or not finite at some iteration; unmoved: whose "
                 "perturbation is zero", "# eps, clean accuracy, adversarial accuracy (of the strongest gradient, per image)"]
        for _, group in itertools.groupby(self.rows, key=lambda row: row["eps"]):
            group = list(group)
            lines += [f"# {r['grad']}: adversarial {r['adversarial']}, masked {r['masked']}, unmoved {r['unmoved']}, mean norm {r['mean_norm']}"
                      + (", an upper bound only" if float(r["masked"]) > 0.01 else "") for r in group]
            lines.append(f"{float(group[-1]['eps']):g} {group[-1]['clean']} {group[-1]['adversarial']}")
        self.run.write_csv(f"{self.stem}.csv", self.rows)
        with replacing(self.text) as path:  # last: without it the .csv is not looked at
            path.write_text("\n".join(lines) + "\n")

    def plot(self):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel=f"eps ({self.settings['attack_norm']}-norm, images in [0, 1])", ylabel="accuracy (%)", xscale="log",
                                  title=f"{self.settings['attack']}, {self.settings['images']} images", ylim=(0, 100))
        axes.axhline(100 * self.clean, color="black", linewidth=1, label="clean")
        for grad in dict.fromkeys(row["grad"] for row in self.rows):
            rows = [row for row in self.rows if row["grad"] == grad and float(row["eps"]) > 0]
            bound = " (upper bound: gradients vanish)" if any(float(r["masked"]) > 0.01 for r in rows) else ""
            axes.plot([float(r["eps"]) for r in rows], [100 * float(r["adversarial"]) for r in rows], marker="o", markersize=3, label=grad + bound)
        axes.grid(alpha=0.3)
        axes.legend()
        self.run.save_figure(f"{self.stem}.png", figure)

    def save_images(self, images, labels, clean, eps, result, shown=6):
        """A picture of some attacked images, those that changed class first, and all of them as .npz."""
        with replacing(self.run.folder / f"{self.stem}_images.npz") as path, open(path, "wb") as file:
            np.savez_compressed(file, x_adv=result["x_adv"], labels=labels.numpy(), prediction=result["prediction"], eps=eps)
        x = (images.float() / 255).numpy()
        chosen = np.argsort(result["correct"] | ~clean.numpy(), kind="stable")[:shown]
        figure = Figure(figsize=(1.6 * len(chosen) + 0.6, 5.4), layout="constrained")
        figure.suptitle(f"{self.settings['attack']}, {self.settings['attack_norm']}-norm, eps = {eps:g}")
        for column, i in enumerate(chosen):
            delta = result["x_adv"][i] - x[i]
            scale = np.abs(delta).max() or 1.0
            before = f"{labels[i]}" if clean[i] else f"not {labels[i]}"
            panels = ((x[i], f"predicted {before}"), (0.5 + delta / (2 * scale), f"change, up to {scale:.2g}"),
                      (result["x_adv"][i], f"predicted {result['prediction'][i]}"))
            for row, (panel, title) in enumerate(panels):
                axes = figure.add_subplot(3, len(chosen), row * len(chosen) + column + 1)
                axes.imshow(np.clip(panel, 0, 1).transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
                axes.set_title(title, fontsize=8)
                axes.axis("off")
        self.run.save_figure(f"{self.stem}_images.png", figure)


class CorruptionTable:
    """Corruption_Accuracy.txt and .png of a run folder: a row per corruption, its accuracy at each severity. The rows of the same
    settings are kept, so that a killed run goes on; a file of other settings is moved aside to Corruption_Accuracy_1.txt and so on.

    text: the path of the table; rows: {corruption: its accuracies as written, one per severity}.
    """

    def __init__(self, run, settings):
        self.run, self.settings, self.text = run, settings, run.folder / "Corruption_Accuracy.txt"
        self.header, self.rows = "# settings: " + json.dumps(settings, sort_keys=True), {}
        if self.text.exists():
            lines = self.text.read_text().splitlines()
            if self.header in lines:
                words = [line.split() for line in lines]
                self.rows = {name: shares for name, *shares in filter(None, words) if name in CORRUPTIONS and len(shares) == SEVERITIES}
            else:
                run.move_aside("Corruption_Accuracy", (".png", ".txt"))

    def add(self, name, accuracies):
        self.rows[name] = [f"{accuracy:.6f}" for accuracy in accuracies]
        self.write()

    def mean(self, names=CORRUPTIONS):
        """The mean accuracy over the corruptions `names` and all severities, of what the table says."""
        return float(np.mean([[float(share) for share in self.rows[name]] for name in names]))

    def write(self):
        lines = [self.header, "# corruption, accuracy at severity 1 to 5"]
        lines += [f"{name} {' '.join(self.rows[name])}" for name in CORRUPTIONS if name in self.rows]
        if len(self.rows) == len(CORRUPTIONS):
            lines.append(f"# mean over all {len(CORRUPTIONS)}: {self.mean():.6f}, over the first 15: {self.mean(CORRUPTIONS[:15]):.6f}")
        self.run.write_lines(self.text.name, lines)

    def plot(self):
        shares = np.array([[100 * float(share) for share in self.rows[name]] for name in CORRUPTIONS])
        figure = Figure(figsize=(6, 7.5), layout="constrained")
        axes = figure.add_subplot(xlabel="severity", title=f"Accuracy (%) under corruption, {self.settings['images']} images each\n"
                                  f"mean {100 * self.mean():.1f}, of the first 15 {100 * self.mean(CORRUPTIONS[:15]):.1f}")
        image = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.1f}", ha="center", va="center", fontsize=9, color="black" if share > 60 else "white")
        axes.set_xticks(range(SEVERITIES), range(1, SEVERITIES + 1))
        axes.set_yticks(range(len(CORRUPTIONS)), [name.replace("_", " ") for name in CORRUPTIONS])
        axes.axhline(14.5, color="white", linewidth=3)  # the four extra ones are below
        figure.colorbar(image, label="accuracy (%)", shrink=0.6)
        self.run.save_figure("Corruption_Accuracy.png", figure)


def fingerprint(state):
    """A short digest of a state dict's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions():
    """What a run depends on besides its arguments."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent).stdout.strip()
    except OSError:  # no git
        revision = ""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "cuda": torch.version.cuda or "none", "git revision": revision or "unknown"}


# ------------------------------------------------------------------------------------------------------------ checkpoints


class Pickled:
    """What stands in for an object of a file by the original code: its attributes, and none of its class's code."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state)

    def children(self, name):
        """The members of a ModuleList or list called `name`."""
        value = self.__dict__.get("_modules", {}).get(name, self.__dict__.get(name, []))
        return list(value._modules.values()) if isinstance(value, Pickled) else list(value)


def _named(name):
    return type(name.rpartition(".")[2], (Pickled,), {})


def _activation(name):
    """Stands in for an activation function, which is never called through the file."""
    def named():
        raise TypeError(name)
    named.__name__ = name
    return named


def _getattr(owner, name):
    """torch.tanh is pickled as getattr(torch._C._VariableFunctionsClass, 'tanh'): this getattr knows such names alone."""
    if name not in ("tanh", "sigmoid"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name}")
    return _activation(name)


_LAYERS = ["conv.Conv2d", "linear.Linear", "linear.Identity", "container.ModuleList", "pooling.MaxPool2d", "pooling.AvgPool2d"]
OLD_GLOBALS = [
    *((_named(f"model_utils.{name}"), f"model_utils.{name}") for name in ("P_MLP", "VF_MLP", "P_CNN", "VF_CNN")),
    *((_named(name), f"torch.nn.modules.{name}") for name in _LAYERS),
    *((_activation(name), f"model_utils.{name}") for name in ("my_sigmoid", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig")),
    *((_activation(name), f"torch.{name}") for name in ("tanh", "sigmoid")),
    *((_named("_VariableFunctionsClass"), f"torch._C.{name}") for name in ("_VariableFunctionsClass", "_VariableFunctions")),
    (_getattr, "builtins.getattr"), (_getattr, "__builtin__.getattr"), (set, "builtins.set"), (set, "__builtin__.set"),
]


def _from_pickled_module(module):
    """The checkpoint that a module pickled by the original code amounts to: its parameters, and the arguments of its model."""
    kind = type(module).__name__.replace("P_", "").replace("_", "")  # P_CNN -> CNN, VF_CNN -> VFCNN
    synapses, pools = module.children("synapses"), module.children("pools")
    state = {f"{group}.{i}.{name}": p.detach() for group in ("synapses", "B_syn") for i, layer in enumerate(module.children(group))
             for name, p in layer._parameters.items() if p is not None}
    config = {"model": kind, "act": {"my_sigmoid": "mysig"}.get(module.activation.__name__, module.activation.__name__),
              "softmax": bool(module.__dict__.get("softmax", False)), "same_update": bool(module.__dict__.get("same_update", False))}
    dense = [layer for layer in synapses if type(layer).__name__ == "Linear"]
    if kind in ("MLP", "VFMLP"):
        config["archi"] = [dense[0].in_features, *(layer.out_features for layer in dense)]
    else:
        convolutions = synapses[:len(synapses) - len(dense)]
        square = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
        letters = {"MaxPool2d": "m", "AvgPool2d": "a", "Identity": "i"}
        config.update(channels=[c.out_channels for c in convolutions], kernels=[square(c.kernel_size) for c in convolutions],
                      strides=[square(c.stride) for c in convolutions], paddings=[square(c.padding) for c in convolutions],
                      pools="".join(letters[type(pool).__name__] for pool in pools), fc=[layer.out_features for layer in dense])
    return {"model_state_dict": state, "config": config}


def read_checkpoint(path):
    """The dict in a checkpoint file; a module pickled by the original code is read as one, through stand-ins for the classes and
    functions that such a file names. Raises UserError, one line with the file's name, for anything else; runs no code in it."""
    try:
        with torch.serialization.safe_globals(OLD_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, Pickled):
            state = _from_pickled_module(state)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:  # a damaged file can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = f"it asks for {refused[1]}, which could run code; nothing of it was run" if refused else one_line(e).split(". ")[0]
        raise UserError(f"{path} cannot be loaded: {why or 'it is empty'}") from None
    weights = state.get("model_state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(p, torch.Tensor) for p in weights.values()):
        raise UserError(f"{path} is no checkpoint of a model: it holds no model_state_dict")
    return state


def read_arguments(folder):
    """The arguments written in a run folder's hyperparameters.txt, as text or plain values; {} where there are none.

    Reads lines `name: value` (any indentation, or a dash before them; value a Python literal or a word), as ours are, and as
    the original code's are.
    """
    try:
        lines = pathlib.Path(folder, "hyperparameters.txt").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    arguments = {}
    for line in lines:
        found = re.match(r"[\s-]*([A-Za-z]\w*)\s*:\s*(.+?)\s*$", line)
        if found:
            try:
                arguments[found[1]] = ast.literal_eval(found[2])
            except (ValueError, SyntaxError):
                arguments[found[1]] = found[2]
    return arguments


def random_states(generator):
    """The states of all random numbers that a run draws, in types that a safe load reads."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [], "data": generator.get_state()}


def restore_random_states(states, generator):
    """Sets all that `random_states` read; a CUDA state only where there is such a device."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
    generator.set_state(states["data"])
