"""Data files as they come: of any version of NumPy, damaged, crafted, compressed, half there,
downloaded twice."""

import gzip
import http.client
import io
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import struct
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
import torchvision
from make_cifar import write_cifar
from shared import RAW, idx, write_mnist

import data_files
from data_utils import TASKS, UserError, load_split

ARCHIVED = "cifar-10-batches-py"


def write_cifar100(root):
    folder, rng = pathlib.Path(root, "cifar-100-python"), np.random.default_rng(3)
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        entry = {
            "data": rng.integers(0, 256, (30, 3072), dtype=np.uint8),
            "fine_labels": rng.integers(0, 100, 30).tolist(),
            "coarse_labels": [0] * 30,
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(
        pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})
    )
    return folder


@pytest.fixture
def cifar10(cifar, tmp_path):
    """A data folder of the test's own with the files of CIFAR-10."""
    root = tmp_path / "own"
    shutil.copytree(cifar, root)
    return root


@pytest.fixture
def no_download(monkeypatch):
    """Whoever asks for a download is told that it fails, and how often that was is returned."""
    asked = []

    def fail(url, *args, **kwargs):
        asked.append(url)
        raise OSError("no route to host")

    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fail)
    return asked


def refused(name, root, train=True):
    """The one line that loading a split ends with."""
    with pytest.raises(UserError) as e:
        load_split(name, root, train)
    assert "\n" not in str(e.value)
    return str(e.value)


def replaced(root, file, **changes):
    """Replaces entries of a file of CIFAR-10."""
    path = root / ARCHIVED / file
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}))


def listing(root):
    return {str(p.relative_to(root)): p.lstat().st_size for p in root.rglob("*")}


# ---- what a pickle may hold


class Runs:
    """Pickled, a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", (0, 2, 5))
@pytest.mark.parametrize(
    "name, file, train",
    [
        ("CIFAR10", f"{ARCHIVED}/data_batch_1", True),
        ("CIFAR10", f"{ARCHIVED}/test_batch", False),
        ("CIFAR10", f"{ARCHIVED}/batches.meta", True),
        ("CIFAR100", "cifar-100-python/train", True),
        ("CIFAR100", "cifar-100-python/test", False),
        ("CIFAR100", "cifar-100-python/meta", False),
    ],
)
def test_a_crafted_file_runs_nothing(name, file, train, protocol, cifar10, tmp_path):
    write_cifar100(cifar10)
    path, proof = cifar10 / file, tmp_path / "proof"
    path.write_bytes(
        pickle.dumps({**pickle.loads(path.read_bytes()), "data": Runs(proof)}, protocol)
    )
    text = refused(name, cifar10, train)
    assert not proof.exists()
    assert (
        str(path) in text
        and "posix.mkdir" in text
        and "could run code; nothing of it was run" in text
    )


GADGETS = {  # each would be a call without a word of os.mkdir(PROOF), or change an object of this interpreter
    "inst": b"(VPROOF\niposix\nmkdir\n.",
    "obj": b"(cposix\nmkdir\nVPROOF\no.",
    "through an attribute": b"\x80\x04\x8c\x05numpy\x8c\x0etesting.os.mkdir\x93\x8c\x05PROOF\x85R.",
    "a name with a blank": b"cnumpy dtype\n\nVPROOF\n\x85R.",
    "extension": b"\x80\x02\x82\x01VPROOF\n\x85R.",
    "persistent": b"\x80\x02VPROOF\nQ.",
    "newobj": b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.",
    "numpy's own loader": b"cnumpy\nload\nVPROOF\n\x85R.",
    "numpy, of another module": b"cnumpy.core.multiarray\nfromfile\nVPROOF\n\x85R.",
    "attributes of what may be named": b"cnumpy.core.multiarray\n_reconstruct\n}VPROOF\nK\x01sb.",
    "builtins": b"c__builtin__\neval\nV__import__('os').mkdir('PROOF')\n\x85R.",
}


@pytest.mark.parametrize("kind", GADGETS)
def test_no_way_of_calling_leads_anywhere(kind, cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = cifar10 / ARCHIVED / "data_batch_3"
    path.write_bytes(GADGETS[kind])
    assert str(path) in refused("CIFAR10", cifar10)
    assert not pathlib.Path("PROOF").exists()


def described(shape=(20, 3072), dtype="u1", data=b"\0" * 61440, size=b"\xff\xff\xff\xff"):
    """An array as Python 2 and NumPy 1 pickled it, of any shape, dtype, content, and size of an
    element."""
    numbers = b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01("
        + numbers
        + b"tcnumpy\ndtype\nq\x08U"
        + bytes([len(dtype)])
        + dtype.encode()
        + b"K\x00K\x01\x87Rq\x09"
        + b"(K\x03U\x01|NNNJ"
        + size
        + b"J"
        + size
        + b"K\x00tb\x89T"
        + struct.pack("<i", len(data))
        + data
        + b"tb"
    )


def python2(array=None, labels=b"](" + b"K\x07" * 20 + b"e", key=b"labels"):
    """A batch file as those that can be downloaded are."""
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U"
        + bytes([len(key)])
        + key
        + b"q\x04"
        + labels
        + b"U\x04dataq\x0a"
        + (array or described())
        + b"U\tfilenamesq\x0b](U\x05a.pngq\x0cU\x05b.pngeu."
    )


def forms():
    rng = np.random.default_rng(4)
    images, labels = rng.integers(0, 256, (20, 3072), dtype=np.uint8), rng.integers(0, 10, 20)
    entry = {
        "data": images,
        "labels": labels.tolist(),
        "filenames": ["a.png"] * 20,
        "batch_label": "batch 1 of 5",
        "version": 1.5,
        "none": None,
        "true": True,
        "bytes": b"\xff\0",
        "pair": (1, -(2**40)),
        "triple": (1, 2, 3),
        "one": ({},),
        "none of it": (),
    }
    for protocol in range(6):
        yield f"protocol {protocol}", pickle.dumps(entry, protocol), images, labels
    yield "python's own", pickle._dumps(entry, 1), images, labels
    old = pickle.dumps(entry, 2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old and b"_core" not in old
    yield "numpy 1", old, images, labels
    in_fortran = np.asfortranarray(images)
    for protocol in (2, 5):
        yield (
            f"in Fortran's order, {protocol}",
            pickle.dumps({**entry, "data": in_fortran}, protocol),
            images,
            labels,
        )
    with_array = {**entry, "labels": labels.astype(">i2")}
    for protocol in (2, 5):
        yield f"labels an array, {protocol}", pickle.dumps(with_array, protocol), images, labels
    yield (
        "labels numpy's numbers",
        pickle.dumps({**entry, "labels": list(labels.astype(">i4"))}),
        images,
        labels,
    )
    listed = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    yield "python 2", python2(described(data=images.tobytes()), listed), images, labels


@pytest.mark.parametrize(
    "form, content, images, labels", [pytest.param(*form, id=form[0]) for form in forms()]
)
def test_every_way_of_writing_an_array_is_read(form, content, images, labels, cifar10):
    (cifar10 / ARCHIVED / "test_batch").write_bytes(content)
    x, y = load_split("CIFAR10", cifar10, False)
    assert (
        x.dtype == torch.uint8
        and x.shape == (20, 3, 32, 32)
        and x.is_contiguous()
        and y.dtype == torch.int64
    )
    assert np.array_equal(x.flatten(1).numpy(), images) and y.tolist() == labels.tolist()
    x += 1  # nobody else's memory, and not read-only


def test_the_hundred_classes_are_the_fine_ones(tmp_path):
    entry = pickle.loads((write_cifar100(tmp_path) / "test").read_bytes())
    images, labels = load_split("CIFAR100", tmp_path, False)
    assert labels.tolist() == entry["fine_labels"] and np.array_equal(
        images.flatten(1).numpy(), entry["data"]
    )
    (tmp_path / "cifar-100-python" / "test").write_bytes(python2(key=b"fine_labels"))
    assert load_split("CIFAR100", tmp_path, False)[1].tolist() == [7] * 20


DEEP = b"\x85" * 300_000  # tuples in tuples: python's own hash of it ends the interpreter
HOSTILE = {
    "deep tuple as a key": b"\x80\x02})" + DEEP + b"Ns.",
    "deep tuple as labels": python2(labels=b")" + DEEP),
    "deep list as labels": python2(labels=b"]" * 200_000 + b"a" * 199_999),
    "memo of 16 GB": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "bytes of 2 ** 62": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
    "frame of 2 ** 62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "shape of 2 ** 40": python2(described((2**40, 3072))),
    "shape below zero": python2(described((-5, 3072))),
    "shape that overflows": python2(described((2**62, 2**62))),
    "objects": python2(described(dtype="O8")),
    "objects by another name": python2(described(dtype="object")),
    "structure": python2(described(dtype="V3072", shape=(20,))),
    "wide numbers": python2(described(dtype="V2000000000")),
    "dtype that lies about its size": python2(described(size=b"\xff\xff\xff\x7f"), b"]K\x07a"),
    "list that holds itself": python2(labels=b"]q\x63(h\x63h\x63e"),
    "an array of too few bytes": python2(described(data=b"12")),
    "no array": python2(b"]"),
    "text for an array": python2(b"U\x03abc"),
    "a name for an array": python2(b"cnumpy\nndarray\n"),
    "text for labels": python2(labels=b"U\x03abc"),
    "labels beyond all numbers": python2(
        labels=b"](" + b"\x8a\x09" + b"\xff" * 8 + b"\x7f" + b"K\x07" * 19 + b"e"
    ),
    "a list": b"\x80\x02].",
    "nothing": b"",
    "no pickle": b"<html>404</html>",
    "no stop": b"\x80\x02}",
    "out of nothing": b"\x80\x02st.",
    "unknown memo": b"\x80\x02h\x05.",
    "attributes of a list": b"\x80\x02]}U\x01aK\x01sb.",
    "items of a number": b"\x80\x02K\x01U\x01aK\x01s.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_gives_one_line(kind, cifar10):
    path = cifar10 / ARCHIVED / "data_batch_2"
    path.write_bytes(HOSTILE[kind])
    start = time.monotonic()
    text = refused("CIFAR10", cifar10)
    assert str(path) in text and len(text) < 1000 and time.monotonic() - start < 10


def test_a_pickle_of_endlessly_many_things_is_not_read_to_its_end(cifar10, monkeypatch):
    monkeypatch.setattr(data_files, "MOST", 10_000)
    beyond = b"\xff"  # an error
    (cifar10 / ARCHIVED / "data_batch_2").write_bytes(b"\x80\x02(" + b"}" * 10_000 + beyond)
    assert "10000 parts" in refused("CIFAR10", cifar10)


def test_reading_holds_no_more_than_twice_the_data(tmp_path):
    rng, folder = np.random.default_rng(5), write_cifar100(tmp_path)
    images = rng.integers(0, 256, (1500, 3072), dtype=np.uint8)
    array, labels = described((1500, 3072), data=images.tobytes()), b"](" + b"K\x07" * 1500 + b"e"
    (folder / "train").write_bytes(python2(array, labels, b"fine_labels"))
    write_cifar(tmp_path)
    for i in range(1, 6):
        replaced(tmp_path, f"data_batch_{i}", data=images[:300], labels=[3] * 300)
    raw = write_mnist(tmp_path, n=6000)
    for file in RAW:
        path = raw / file
        path.with_name(file + ".gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    load_split("digits", tmp_path, True)  # modules
    for name in ("CIFAR100", "CIFAR10", "MNIST", "MNIST"):
        tracemalloc.start()
        try:
            data = load_split(name, tmp_path, True)[0]
            assert tracemalloc.get_traced_memory()[1] < 2.2 * data.numel()
        finally:
            tracemalloc.stop()
        for file in RAW:
            if name == "MNIST":
                (raw / file).unlink(missing_ok=True)  # the second time from the compressed ones


# ---- one check, for every task


WRONG = {
    "label too large": ({"labels": [0, 10] * 10}, "labels from 0 to 10"),
    "label below zero": ({"labels": [-1, 9] * 10}, "labels from -1 to 9"),
    "labels with fractions": ({"labels": [0.0, 0.5] * 10}, "float64"),
    "labels in words": ({"labels": ["cat"] * 20}, "labels"),
    "labels too few": ({"labels": [1] * 5}, "5 labels"),
    "labels in rows": ({"labels": np.zeros((20, 1), dtype=np.int64)}, "20x1 labels"),
    "images in floating point": ({"data": np.zeros((20, 3072), dtype=np.float32)}, "float32"),
    "images of another size": ({"data": np.zeros((20, 784), dtype=np.uint8)}, "(20, 784)"),
    "images as one row": ({"data": np.zeros(20 * 3072, dtype=np.uint8)}, "(61440,)"),
    "no images": ({"data": np.zeros((0, 3072), dtype=np.uint8), "labels": []}, "no images"),
    "images signed": ({"data": np.zeros((20, 3072), dtype=np.int8)}, "int8"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("file, train", [("data_batch_2", True), ("test_batch", False)])
def test_what_does_not_fit_the_task_is_told(kind, file, train, cifar10):
    changes, found = WRONG[kind]
    if file == "test_batch":
        changes = {
            **changes,
            **({} if "data" in changes else {"data": np.zeros((20, 3072), dtype=np.uint8)}),
        }
        changes = {"labels": [0] * 20, **changes}
    replaced(cifar10, file, **changes)
    text = refused("CIFAR10", cifar10, train)
    assert (
        "CIFAR10" in text
        and str(cifar10) in text
        and file in text
        and found in text
        and "expected" in text
    )


def test_labels_are_held_against_the_images_of_their_own_file(cifar10):
    replaced(cifar10, "data_batch_2", labels=[1] * 5)
    replaced(cifar10, "data_batch_4", labels=[1] * 35)
    assert "data_batch_2" in refused("CIFAR10", cifar10)


@pytest.mark.parametrize("name", ("MNIST", "FashionMNIST"))
@pytest.mark.parametrize(
    "file, content, found",
    [
        ("train-images-idx3-ubyte", idx(np.zeros((20, 56, 14), dtype=np.uint8)), "(20, 1, 56, 14)"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 28, 28), dtype=">f4"), 13), "float32"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 784), dtype=np.uint8)), "(20, 784)"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 28, 28), dtype=np.uint8)), "no images"),
        ("train-labels-idx1-ubyte", idx(np.full(20, 10, dtype=np.uint8)), "labels from 10 to 10"),
        ("train-labels-idx1-ubyte", idx(np.zeros(19, dtype=np.uint8)), "19 labels"),
        ("train-labels-idx1-ubyte", idx(np.zeros(20, dtype=">f8"), 14), "float64"),
    ],
)
def test_mnist_is_held_against_its_task(name, file, content, found, tmp_path, no_download):
    path = write_mnist(tmp_path, name) / file
    path.write_bytes(content)
    text = refused(name, tmp_path)
    assert (
        name in text
        and str(path.parent) in text
        and found in text
        and "expected" in text
        and not no_download
    )
    load_split(name, tmp_path, False)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_passes_the_same_check(name, monkeypatch):
    task = TASKS[name]
    images = np.zeros((6, task.channels, task.size, task.size), dtype=np.uint8)
    parts = [("here", images, np.arange(6)), ("there", images, np.arange(6) + task.classes - 5)]
    monkeypatch.setattr(task, "read", lambda data_dir, train: parts)
    assert (
        f"there does not fit --task {name}: it contains labels from {task.classes - 5} to"
        in refused(name, "data")
    )
    parts[1] = ("there", images, np.arange(6))
    assert load_split(name, "data", True)[1].tolist() == [*range(6), *range(6)]


def test_a_command_says_it_in_one_line(cifar10, cli):
    replaced(cifar10, "test_batch", labels=[200] * 40)
    code, out, err = cli(
        f"--task CIFAR10 --model MLP --archi 3072 8 10 --device -1 --data-dir {cifar10}"
    )
    assert (
        code == 2
        and err.count("\n") == 1
        and "labels from 200 to 200" in err
        and "Traceback" not in err
    )


# ---- damaged is not missing


CUTS = {
    "nothing left": lambda b: b"",
    "header alone": lambda b: b[:8],
    "half": lambda b: b[: len(b) // 2],
    "one byte short": lambda b: b[:-1],
    "another format": lambda b: b"<html>404</html>" + b,
    "zeros": lambda b: bytes(len(b)),
    "too long": lambda b: b + b"\0",
}


@pytest.mark.parametrize(
    "kind, compressed",
    [(kind, False) for kind in CUTS] + [(kind, True) for kind in CUTS if kind != "too long"],
)  # zeros may follow what is compressed
@pytest.mark.parametrize("file", RAW[:2])
def test_damaged_mnist_is_not_missing_mnist(file, kind, compressed, tmp_path, no_download):
    path = write_mnist(tmp_path) / file
    content = path.read_bytes()
    if compressed:
        path.unlink()
        path, content = path.with_name(file + ".gz"), gzip.compress(content)
    path.write_bytes(CUTS[kind](content))
    before = listing(tmp_path)
    text = refused("MNIST", tmp_path)
    assert str(path) in text and "damaged" in text and "delete it" in text and "missing" not in text
    assert not no_download and listing(tmp_path) == before


@pytest.mark.parametrize(
    "kind", [kind for kind in CUTS if kind != "too long"]
)  # nobody reads on behind a pickle
@pytest.mark.parametrize("file", ("data_batch_5", "batches.meta"))
def test_damaged_cifar_is_not_missing_cifar(file, kind, cifar10, no_download):
    path = cifar10 / ARCHIVED / file
    path.write_bytes(CUTS[kind](path.read_bytes()))
    text = refused("CIFAR10", cifar10)
    assert (
        str(path) in text
        and "damaged" in text
        and "delete it" in text
        and "missing" not in text
        and not no_download
    )


def test_a_header_that_claims_too_much_is_not_believed(tmp_path, no_download):
    folder = write_mnist(tmp_path)
    for shape in ((2**32 - 1,) * 3, (10**6, 28, 28)):
        content = struct.pack(">IIII", 0x803, *shape) + b"abc"
        (folder / RAW[0]).write_bytes(content)
        assert "fewer follow" in refused("MNIST", tmp_path)
        (folder / RAW[0]).unlink()
        (folder / f"{RAW[0]}.gz").write_bytes(gzip.compress(content))
        assert "fewer follow" in refused("MNIST", tmp_path)


def test_what_cannot_be_opened_is_not_missing(tmp_path, no_download):
    folder = write_mnist(tmp_path)
    (folder / RAW[0]).unlink()
    (folder / RAW[0]).mkdir()
    assert str(folder / RAW[0]) in refused("MNIST", tmp_path)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("MNIST", tmp_path / "file")
    os.mkfifo(tmp_path / "MNIST" / "pipe")
    (folder / RAW[0]).rmdir()
    (folder / RAW[0]).symlink_to(tmp_path / "MNIST" / "pipe")
    assert str(folder / RAW[0]) in refused("MNIST", tmp_path) and not no_download


# ---- compressed and left over files


def test_compressed_mnist_is_read_where_it_is(tmp_path):
    folder = write_mnist(tmp_path)
    expected = [load_split("MNIST", tmp_path, train) for train in (True, False)]
    for file in RAW:
        path = folder / file
        path.with_name(file + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        before = listing(tmp_path)
        for train, (images, labels) in zip((True, False), expected):
            x, y = load_split("MNIST", tmp_path, train)
            assert torch.equal(x, images) and torch.equal(y, labels)
        assert listing(tmp_path) == before


def dotted(name):
    return name.replace("-idx", ".idx")


FORMS = {  # what somebody has made of a file of MNIST
    "Kaggle's name": lambda path: path.rename(path.with_name(dotted(path.name))),
    "Kaggle's name, compressed": lambda path: compress(
        path, path.with_name(dotted(path.name) + ".gz")
    ),
    "in a folder of its name": lambda path: inside(path, path, path.name),
    "in a folder of Kaggle's name": lambda path: inside(
        path, path.with_name(dotted(path.name)), dotted(path.name)
    ),
    "Kaggle's folder": lambda path: inside(path, path, dotted(path.name)),
    "unpacked under the old name": lambda path: path.rename(path.with_name(path.name + ".gz")),
    "compressed under the new name": lambda path: compress(path, path),
}


def compress(path, target):
    content = path.read_bytes()
    path.unlink()
    target.write_bytes(gzip.compress(content))


def inside(path, folder, name):
    content = path.read_bytes()
    path.unlink()
    folder.mkdir()
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_mnist_in_its_place_is_read_in_any_form(form, tmp_path, no_download):
    folder = write_mnist(tmp_path)
    expected = [load_split("MNIST", tmp_path, train) for train in (True, False)]
    for file in RAW:
        FORMS[form](folder / file)
    before = listing(tmp_path)
    for train, (images, labels) in zip((True, False), expected):
        x, y = load_split("MNIST", tmp_path, train)
        assert torch.equal(x, images) and torch.equal(y, labels)
    assert listing(tmp_path) == before and not no_download


MISPLACED = {  # where the files are, below the test's folder; and the --data-dir that was given
    "flat": ("data", "data"),
    "without raw": ("data/MNIST", "data"),
    "without MNIST": ("data/raw", "data"),
    "small letters": ("data/mnist/raw", "data"),
    "a folder too high": ("data/mine/MNIST/raw", "data"),
    "a folder too deep": ("data/MNIST/raw", "data/MNIST"),
    "two folders too deep": ("data/MNIST/raw", "data/MNIST/raw"),
}


@pytest.mark.parametrize(
    "form", [None, "Kaggle's name", "Kaggle's folder", "unpacked under the old name"]
)
@pytest.mark.parametrize("place", MISPLACED)
def test_misplaced_mnist_is_found_and_not_downloaded(place, form, tmp_path, no_download):
    write_mnist(tmp_path / "made")
    where, data = (tmp_path / name for name in MISPLACED[place])
    where.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "made/MNIST/raw").rename(where)
    for file in RAW if form else ():
        FORMS[form](where / file)
    before = listing(tmp_path)
    text = refused("MNIST", data)
    wanted, found = re.search(r"missing: (\S+) does not exist; found (\S+), which", text).groups()
    assert wanted == str(data / "MNIST/raw" / RAW[0]) and pathlib.Path(found).is_file()
    assert listing(tmp_path) == before and not no_download
    root = re.search(r"give --data-dir (\S+)$", text)  # doing as it says leads to the data
    if root:
        data = pathlib.Path(root[1])
    else:
        assert text.endswith(f"move it, and the others like it, to {wanted}")
        moved = [
            next(
                path
                for path in where.rglob("*")
                if path.is_file() and path.name in (file, dotted(file), f"{file}.gz")
            ).read_bytes()
            for file in RAW
        ]
        shutil.rmtree(where)
        (data / "MNIST/raw").mkdir(parents=True)
        for file, content in zip(RAW, moved):
            (data / "MNIST/raw" / file).write_bytes(content)
    assert len(load_split("MNIST", data, True)[1]) == 20 and not no_download


@pytest.mark.parametrize(
    "name", [f"{RAW[0]} (1).gz", f"{RAW[0]}(2)", RAW[0].upper(), "train_images_idx3_ubyte.gz"]
)
def test_what_a_browser_made_of_a_name_is_found(name, tmp_path, no_download):
    folder = write_mnist(tmp_path)
    (folder / RAW[0]).rename(folder / name)
    assert str(folder / name) in refused("MNIST", tmp_path) and not no_download


def test_files_of_another_data_set_of_the_same_names_are_not_taken(tmp_path, no_download):
    write_mnist(tmp_path, "FashionMNIST")
    for data in (tmp_path, tmp_path / "FashionMNIST", tmp_path / "FashionMNIST/raw"):
        text = refused("MNIST", data)
        assert "found" not in text.replace("not found", "") and f"{RAW[0]} not found in" in text
    assert no_download


def test_misplaced_cifar_is_found_and_not_downloaded(cifar10, tmp_path, no_download):
    assert f"give --data-dir {cifar10}" in refused("CIFAR10", cifar10 / ARCHIVED)
    assert f"give --data-dir {cifar10}" in refused("CIFAR10", tmp_path)
    (cifar10 / ARCHIVED).rename(cifar10 / "CIFAR10")
    text = refused("CIFAR10", cifar10)
    assert f"found {cifar10 / 'CIFAR10'}" in text and f"move it to {cifar10 / ARCHIVED}" in text
    (cifar10 / "CIFAR10").rename(cifar10 / ARCHIVED)
    packed(cifar10)
    shutil.rmtree(cifar10 / ARCHIVED)
    assert f"give --data-dir {cifar10}" in refused("CIFAR10", tmp_path)
    archive = cifar10 / "cifar-10-python.tar.gz"
    for name in ("cifar-10-python.tar", "cifar-10-python.tar (1).gz"):
        archive.rename(cifar10 / name)
        text = refused("CIFAR10", cifar10)
        assert f"found {cifar10 / name}" in text and f"move it to {archive}" in text
        (cifar10 / name).rename(archive)
    assert not no_download
    archive.write_bytes(gzip.decompress(archive.read_bytes()))  # unpacked under the old name
    assert len(load_split("CIFAR10", cifar10, True)[1]) == 100 and not no_download


def test_a_download_does_not_go_before_what_is_there_in_another_form(tmp_path, monkeypatch):
    source, data = tmp_path / "source", tmp_path / "data"
    write_mnist(source, n=20)
    kept = write_mnist(data, n=30)
    for file in RAW[:2]:
        FORMS["Kaggle's name"](kept / file)
    for file in RAW[2:]:
        (kept / file).unlink()
    downloading(source, monkeypatch)
    assert (
        len(load_split("MNIST", data, False)[1]) == 20
        and len(load_split("MNIST", data, True)[1]) == 30
    )
    assert not (kept / RAW[0]).exists()


def packed(root, name="cifar-10-python.tar.gz", **changes):
    with tarfile.open(root / name, "w:gz") as tar:
        tar.add(root / ARCHIVED, ARCHIVED)


def test_packed_cifar_is_read_where_it_is(cifar10, no_download):
    expected = [load_split("CIFAR10", cifar10, train) for train in (True, False)]
    packed(cifar10)
    (cifar10 / ARCHIVED / "data_batch_1").unlink()  # as if unpacking had been killed
    before = listing(cifar10)
    for _ in range(2):
        for train, (images, labels) in zip((True, False), expected):
            x, y = load_split("CIFAR10", cifar10, train)
            assert torch.equal(x, images) and torch.equal(y, labels)
        assert listing(cifar10) == before
        shutil.rmtree(cifar10 / ARCHIVED, ignore_errors=True)
        before = listing(cifar10)
    content = (cifar10 / "cifar-10-python.tar.gz").read_bytes()
    for cut in (content[: len(content) // 2], content[:50], b"", b"<html>404</html>"):
        (cifar10 / "cifar-10-python.tar.gz").write_bytes(cut)
        text = refused("CIFAR10", cifar10)
        assert (
            "cifar-10-python.tar.gz" in text
            and "damaged" in text
            and "missing" not in text
            and not no_download
        )


def test_a_crafted_archive_writes_and_runs_nothing(cifar10, tmp_path, no_download):
    for file in ("data_batch_1", "../../escaped", "link"):
        shutil.rmtree(cifar10 / ARCHIVED, ignore_errors=True)
        with tarfile.open(cifar10 / "cifar-10-python.tar.gz", "w:gz") as tar:
            content = pickle.dumps(Runs(tmp_path / "proof"))
            member = tarfile.TarInfo(f"{ARCHIVED}/{file}")
            member.size = len(content)
            if file == "link":
                member.name, member.type, member.linkname = (
                    f"{ARCHIVED}/data_batch_1",
                    tarfile.SYMTYPE,
                    "/etc/passwd",
                )
                member.size, content = 0, b""
            tar.addfile(member, io.BytesIO(content))
        before = listing(tmp_path)
        assert "cifar-10-python.tar.gz" in refused("CIFAR10", cifar10)
        assert listing(tmp_path) == before and not no_download


def test_what_an_old_torchvision_left_is_not_preferred(tmp_path, no_download):
    folder = write_mnist(tmp_path)
    images, labels = load_split("MNIST", tmp_path, True)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)),
            processed / file,
        )
    x, y = load_split("MNIST", tmp_path, True)
    assert torch.equal(x, images) and torch.equal(y, labels) and not no_download
    shutil.rmtree(folder)
    text = refused("MNIST", tmp_path)
    assert "missing" in text and "processed" in text and len(no_download) > 0


# ---- downloads


def downloading(root, monkeypatch, during=lambda folder: None):
    """From now on a download of MNIST or CIFAR-10 brings the files below `root`; `during` sees its
    folder."""

    def mnist(url, download_root, filename=None, md5=None, **kwargs):
        path = pathlib.Path(download_root, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress((root / "MNIST" / "raw" / path.stem).read_bytes()))
        path.with_suffix("").write_bytes((root / "MNIST" / "raw" / path.stem).read_bytes())
        during(path.parent)

    def cifar(url, download_root, filename=None, md5=None, **kwargs):
        shutil.copytree(root / ARCHIVED, pathlib.Path(download_root, ARCHIVED))
        pathlib.Path(download_root, filename).write_bytes(b"archive")
        during(pathlib.Path(download_root))

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", mnist)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", cifar)


def test_a_download_appears_whole(tmp_path, cifar10, monkeypatch):
    raw = write_mnist(cifar10)
    data = tmp_path / "new" / "data"
    left = data / ".download-killed"
    left.mkdir(parents=True)
    (left / "half").write_text("half")

    def watch(folder):
        assert data in folder.parents or data == folder.parent
        assert (
            not (data / "MNIST").exists() and not (data / ARCHIVED).exists() and not left.exists()
        )

    downloading(cifar10, monkeypatch, watch)
    for train in (True, False):
        assert torch.equal(
            load_split("MNIST", data, train)[0], load_split("MNIST", cifar10, train)[0]
        )
    assert set(listing(data)) == {"MNIST", "MNIST/raw", *(f"MNIST/raw/{file}" for file in RAW)}
    shutil.rmtree(data / "MNIST")
    assert torch.equal(
        load_split("CIFAR10", data, True)[0], load_split("CIFAR10", cifar10, True)[0]
    )
    assert {p.name for p in (data / ARCHIVED).iterdir()} == {
        p.name for p in (cifar10 / ARCHIVED).iterdir()
    }
    assert [p.name for p in data.iterdir()] == [ARCHIVED]
    assert (data / ARCHIVED / "test_batch").stat().st_mode == (
        cifar10 / ARCHIVED / "test_batch"
    ).stat().st_mode
    assert raw.exists()


def test_a_download_replaces_nothing(tmp_path, monkeypatch):
    source, data = tmp_path / "source", tmp_path / "data"
    write_mnist(source, n=20)
    kept = write_mnist(data, n=30)
    (kept / RAW[0]).with_name(RAW[0] + ".gz").write_bytes(
        gzip.compress((kept / RAW[0]).read_bytes())
    )
    for file in (RAW[0], *RAW[2:]):
        (kept / file).unlink()
    downloading(source, monkeypatch)
    assert len(load_split("MNIST", data, False)[1]) == 20
    assert len(load_split("MNIST", data, True)[1]) == 30
    assert not (kept / RAW[0]).exists() and sorted(p.name for p in data.iterdir()) == ["MNIST"]


@pytest.mark.parametrize(
    "failure",
    (
        OSError("no route\nto host"),
        RuntimeError("File not found or corrupted."),
        EOFError(),
        KeyboardInterrupt(),
        tarfile.ReadError("not a gzip file"),
        http.client.IncompleteRead(b"abc"),
    ),
)
@pytest.mark.parametrize("name", ("MNIST", "CIFAR10"))
def test_a_failed_download_leaves_nothing(name, failure, tmp_path, monkeypatch, cifar10):
    write_mnist(cifar10)

    def fail(folder):
        raise failure

    downloading(cifar10, monkeypatch, fail)
    before = listing(tmp_path)
    assert "missing" in refused(
        name, tmp_path / "new" / ("x" * 300)
    )  # of which only the first could be made
    with pytest.raises(
        KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError
    ) as e:
        load_split(name, tmp_path / "new" / "data", True)
    assert listing(tmp_path) == before
    if isinstance(e.value, UserError):
        text, place = str(e.value), str(tmp_path / "new" / "data")
        assert all(word in text for word in (name, "missing", place, "--data-dir", "--task digits"))
        assert "\n" not in text
    (tmp_path / "empty").mkdir()
    with pytest.raises((UserError, KeyboardInterrupt)):
        load_split(name, tmp_path / "empty", True)
    assert not listing(tmp_path / "empty") and (tmp_path / "empty").is_dir()


def test_without_locks_a_download_goes_on(tmp_path, cifar10, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    others = tmp_path / "data" / ".download-another"  # may be at work: nobody knows
    others.mkdir(parents=True)
    downloading(cifar10, monkeypatch)
    assert len(load_split("CIFAR10", tmp_path / "data", True)[1]) == 100
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [".download-another", ARCHIVED]


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe"])
def test_the_lock_of_a_download_follows_no_link(tmp_path, cifar10, monkeypatch, kind):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "data").mkdir()
    lock = tmp_path / "data" / ".download.lock"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        (lock.symlink_to if kind == "symbolic link" else lock.hardlink_to)(tmp_path / "precious")
    downloading(cifar10, monkeypatch)
    text = refused("CIFAR10", tmp_path / "data")
    assert "missing" in text and "it is a link or no regular file" in text
    assert (tmp_path / "precious").read_text() == "precious"


def test_where_nothing_can_be_written_the_files_are_missing(tmp_path, no_download):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for place in ("/proc", tmp_path / "link" / "data"):
        before = listing(tmp_path)
        text = refused("CIFAR10", place)
        assert "missing" in text and str(place) in text and listing(tmp_path) == before


def child(source, data, log, fate):
    """A run that loads CIFAR-10 from `data`, whose download takes a while and ends as `fate` says;
    see `log`."""

    def say(what):
        with open(log, "a") as file:
            file.write(f"{what}\n")

    def download(url, download_root, filename=None, md5=None, **kwargs):
        say("asked")
        folder = pathlib.Path(download_root, ARCHIVED)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted((source / ARCHIVED).iterdir()):
            time.sleep(0.03)
            (folder / path.name).write_bytes(path.read_bytes())
        if fate == "fail":
            raise OSError("no route to host")
        if fate == "hang":
            say("hangs")
            time.sleep(100)

    torchvision.datasets.cifar.download_and_extract_archive = download
    try:
        say(f"{len(load_split('CIFAR10', data, True)[1])} images")
    except UserError as e:
        say(e)
    except BaseException as e:
        say(f"traceback: {e!r}")


@pytest.fixture
def runs(cifar10, tmp_path):
    """Starts a run at once for each of the fates given; all are ended with the test."""
    started = []

    def start(*fates):
        data, log, process = (
            tmp_path / "new" / "data",
            tmp_path / "log",
            multiprocessing.get_context("fork").Process,
        )
        begun = [process(target=child, args=(cifar10, data, log, fate)) for fate in fates]
        for process in begun:
            process.start()
        started.extend(begun)
        return begun

    yield start
    for process in started:
        process.kill()
        process.join()


def test_two_runs_at_once_download_once_and_a_killed_one_is_cleaned_up(runs, tmp_path):
    data, log = tmp_path / "new" / "data", tmp_path / "log"
    (killed,) = runs("hang")
    while not log.exists() or "hangs" not in log.read_text():
        time.sleep(0.01)
    (waiting,) = runs("work")
    time.sleep(0.2)
    assert log.read_text() == "asked\nhangs\n"  # one at a time
    killed.kill()
    killed.join()
    for process in (waiting, *runs("work")):
        process.join(60)
    assert log.read_text() == "asked\nhangs\nasked\n100 images\n100 images\n"
    assert [p.name for p in data.iterdir()] == [ARCHIVED]


def test_many_runs_at_once_download_once(runs, tmp_path):
    for process in runs(*["work"] * 6):
        process.join(60)
    assert sorted((tmp_path / "log").read_text().split("\n")[:-1]) == ["100 images"] * 6 + ["asked"]
    assert [p.name for p in (tmp_path / "new" / "data").iterdir()] == [ARCHIVED]


def test_runs_whose_downloads_fail_leave_nothing(runs, tmp_path):
    for process in runs(*["fail"] * 4):
        process.join(60)
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line != "asked"]
    assert len(lines) == 4 and all(
        "CIFAR10 are missing" in line and "no route to host" in line for line in lines
    )
    assert not (tmp_path / "new").exists()


def test_a_damaged_pickle_is_to_be_downloaded_again(cifar, tmp_path):
    root = pathlib.Path(shutil.copytree(cifar, tmp_path / "data"))
    (batch,) = root.rglob("test_batch")
    batch.write_bytes(b"hello world")
    with pytest.raises(UserError, match="is damaged .*; delete it to download it again"):
        load_split("CIFAR10", str(root), False)
