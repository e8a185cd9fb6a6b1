"""What tests of several modules share besides the fixtures of conftest."""

import json
import os
import pathlib
import struct
import sys

import numpy as np
import torch
from conftest import ZOO, context

import main
import model_utils as mu
from ART_Timesteps_Addition.audit import stages
from experiment.results.store import Store
from experiment.workers import Workers

SEED_LINES = (pathlib.Path(__file__).parent / "seed_commands.txt").read_text().splitlines()


SMALL = "--channels 4 4 4 4 --T1 8 --T2 3 --epochs 1 --train-size 60 --test-size 40 --device -1"


MLP = ZOO["MLP"]

AUDIT_BUDGET = stages.Budget(3, 1, 10, 30, 3, 1, 4)


def enter(folder, words):
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(main.main(words))


def start(folder, line):
    """main.py in a process of its own; libraries are loaded already, so that it begins at once."""
    process = context.Process(target=enter, args=(str(folder), line.split()))
    process.start()
    return process


def records(run, kind):
    """The records of one kind in a run folder."""
    return [record for record in Store(run).records if record.kind == kind]


def forget(run, kind):
    """Takes the records of one kind out of results.jsonl."""
    path = run / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["kind"] != kind))


def final_weights(run):
    return torch.load(run / "final_checkpoint.tar", weights_only=True)["model_state_dict"]


def assert_close(ours, golden, tolerance, floor=None):
    """||ours - golden|| <= tolerance * ||golden|| for every tensor, small ones held against a
    hundredth of the largest."""
    if torch.is_tensor(golden):
        ours, golden = {"": ours}, {"": golden}
    elif not isinstance(golden, dict):
        assert len(ours) == len(golden)
        ours, golden = dict(enumerate(ours)), dict(enumerate(golden))
    floor = 0.01 * max(g.norm() for g in golden.values())
    for name, g in golden.items():
        error = (ours[name].detach().reshape(g.shape) - g).norm() / max(g.norm(), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


class Stopped(Exception):
    pass


class OneOfTwo(Workers):
    """One of two workers, with what the other has computed; the one that comes first stops
    there."""

    def __init__(self, rank, others=None):
        super().__init__(rank, 2)
        self.others = others

    def gather(self, item):
        if self.others is None:
            raise Stopped(item)
        return [item, self.others]


RAW = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array, code=8):
    return struct.pack(f">I{array.ndim}I", 256 * code + array.ndim, *array.shape) + array.tobytes()


def write_mnist(root, name="MNIST", shape=(28, 28), n=20):
    """Below `root` the four files of MNIST, with n random images in each split; returns the
    folder."""
    folder, rng = pathlib.Path(root, name, "raw"), np.random.default_rng(2)
    folder.mkdir(parents=True)
    for file in RAW:
        values = rng.integers(0, 256, (n, *shape)) if "images" in file else rng.integers(0, 10, n)
        (folder / file).write_bytes(idx(values.astype(np.uint8)))
    return folder


def convolutional(gain):
    """A network whose weights are `gain` times the initial ones: at 12, nine of ten neurons are
    saturated."""
    torch.manual_seed(0)
    model = mu.P_CNN(
        28,
        [1, 6, 8],
        [5, 5],
        [1, 1],
        [10],
        mu.make_pools("mm"),
        [0, 0],
        mu.my_hard_sig,
        softmax=True,
    )
    with torch.no_grad():
        for synapse in model.synapses[:2]:
            synapse.weight.mul_(gain), synapse.bias.mul_(gain)
    return model
