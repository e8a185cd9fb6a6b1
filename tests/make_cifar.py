"""Writes random images in the formats of CIFAR-10 and CIFAR-10-C, small enough for any test."""

import pathlib
import pickle

import numpy as np


def write_cifar(root):
    """Below `root` the files of CIFAR-10, with 20 images in each training batch and 40 for
    testing."""
    folder = pathlib.Path(root, "cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in [*((f"data_batch_{i}", 20) for i in range(1, 6)), ("test_batch", 40)]:
        entry = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, n).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    )


def write_corruptions(root, names, n=8):
    """Below `root` the folder CIFAR-10-C, with a file for each of the corruptions `names` and n
    images at each of its 5 severities."""
    folder = pathlib.Path(root, "CIFAR-10-C")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in names:
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(rng.integers(0, 10, n), 5))
    return folder
