"""Saved runs that are damaged, crafted, or from before: none crashes the interpreter, ends in a
traceback, or passes for another run."""

import contextlib
import copy
import csv
import functools
import io
import os
import pathlib
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, context, only_run

import data_utils
import main
import model_utils as mu
from data_utils import UserError
from experiment import command_line, validate
from experiment.command_line import MAIN_FLAGS
from experiment.runs import checkpoint, folder, legacy

DATA = ROOT / "tests" / "data"
RUN = (
    "--todo train --task digits --device -1 --train-size 20 --test-size 8 --mbs 10 --T1 3 --T2 1 --betas 0 0.5 "
    "--epochs 1 --seed 3 --save --archi 784 4 10 --loss cel --softmax --optim adam --lr-decay "
    "--attack-iters 1 --attack-step 2 --eps-list 0.5"
)
TODOS = {"evaluate": "", "attack": "", "train": "--epochs 1"}
DATA_FLAGS = "--task digits --train-size 20 --test-size 8"


class Folder:
    """A run folder whose files are put back after each use. files: {name: bytes} of the good
    run."""

    def __init__(self, path):
        self.path = path
        self.files = {file.name: file.read_bytes() for file in path.iterdir()}
        self.checkpoint = torch.load(path / "checkpoint.tar", weights_only=True)

    def write(self, checkpoint):
        """Writes another checkpoint.tar, a state or bytes, and returns its bytes."""
        if not isinstance(checkpoint, bytes):
            torch.save(checkpoint, self.path / "checkpoint.tar")
            return (self.path / "checkpoint.tar").read_bytes()
        (self.path / "checkpoint.tar").write_bytes(checkpoint)
        return checkpoint

    def put_back(self):
        for file in self.path.iterdir():
            if file.name not in self.files:
                file.unlink()
        for name, content in self.files.items():
            file = self.path / name
            if not file.exists() or file.read_bytes() != content:
                file.write_bytes(content)

    def content(self):
        return {file.name: file.read_bytes() for file in self.path.iterdir()}


@pytest.fixture(scope="module")
def quick():
    """What takes time and has nothing to do with what a file holds is left out: figures, git, disk,
    the same data."""
    split = functools.cache(data_utils.load_split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.RunFolder, "save_figure", lambda *_: None)
        patch.setattr(folder, "versions", dict)
        patch.setattr("experiment.plots.training.accuracy", lambda *_: None)
        patch.setattr("experiment.plots.training.activity", lambda *_: None)
        patch.setattr("experiment.results.attacks.Sweep.plot", lambda *_: None)
        patch.setattr(data_utils, "load_split", split)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick):
    """A run folder with a checkpoint.tar alone, so that every command reads all of it."""
    folder, before = tmp_path_factory.mktemp("untrusted"), os.getcwd()
    os.chdir(folder)
    assert main.main(RUN.split()) == 0
    os.chdir(before)
    path = only_run(folder)
    for file in path.iterdir():
        if file.name not in ("checkpoint.tar", "hyperparameters.txt", "metrics.csv"):
            file.unlink()
    return Folder(path)


def attempt(folder, todo, words=""):
    """(exit code, standard error) of a command on the folder; fails where the rules of the suite
    are broken."""
    out, err, before = io.StringIO(), io.StringIO(), folder.content()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main(
            f"--todo {todo} --device -1 --load-path {folder.path} {TODOS.get(todo, '')} {words}".split()
        )
    err = err.getvalue()
    assert code in (0, 2) or code == 1 and todo == "train" and "not finite" in err, (code, err)
    assert "Traceback" not in err and err.count("main.py: error:") == (code != 0), err
    known = ("main.py: error: ", "note: ", "\r", "warning: ")  # \r: a progress bar
    assert all(line.startswith(known) or not line.strip() for line in err.split("\n")), err
    if code == 2:
        assert folder.content() == before, "a file has changed"
        assert len(err) < 2000
    return code, err


def restore(folder, todo, words=""):
    """Opens a run as a command does before it works with it. Returns why it is refused, or None.

    Of a run that is resumed, also the optimizer and the scheduler take a step, whose kernels take
    the sizes of their state for granted.
    """
    before = folder.content()
    try:
        given = command_line.parse(words.split(), MAIN_FLAGS)
        saved = checkpoint.open_saved(folder.path, todo)
        args = command_line.resolve({**given, "todo": todo}, saved.args)
        validate.validate(args)
        model = mu.build(args)
        checkpoint.load_weights(model, saved)
        assert all(weight.isfinite().all() for weight in model.parameters())
        if todo == "train":
            optimizer, scheduler = mu.make_optimizer(model, args)
            checkpoint.restore(saved, args.flat(), optimizer, scheduler, torch.Generator())
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            if scheduler:
                scheduler.step()
    except UserError as refusal:
        reason = str(refusal)
        assert reason
        assert "\n" not in reason
        assert len(reason) < 2000
        return reason
    finally:
        assert folder.content() == before, "a file has changed"
    return None


# ---------------------------------------------------------------------------------------- at random


def expanded(shape):
    return torch.zeros(()).expand(shape)


JUNK = [
    lambda rng: None,
    lambda rng: True,
    lambda rng: rng.choice([0, 1, -1, 2, 7, 2**31, 2**63, -(2**64), 10**400]),
    lambda rng: rng.choice([0.5, -1.0, 1e308, float("nan"), float("inf"), -float("inf")]),
    lambda rng: rng.choice(["", "many", "\0\n", "\udcff", "x" * 5000, "nan", "1"]),
    lambda rng: rng.choice(
        [[], [None], [1, 2], ["a"], [[]], [0.5] * 3, (), (1,), [float("nan")] * 2]
    ),
    lambda rng: rng.choice([{}, {1: 2}, {"a": {}}, {None: []}, {"params": 3}, {"step": 1}]),
    lambda rng: torch.zeros(rng.choice([(), (0,), (3,), (4, 784), (1, 1, 1)])),
    lambda rng: torch.zeros(rng.choice([3, 5056])).to(
        rng.choice([torch.bool, torch.uint8, torch.cfloat, torch.int64])
    ),
    lambda rng: expanded(rng.choice([(4, 784), (10**6, 10**6), (10,)])),
    lambda rng: torch.eye(3).to_sparse(),
    lambda rng: torch.zeros(3, device="meta"),
]

TENSOR = [
    lambda t: t.to(torch.float64),
    lambda t: t.to(torch.bfloat16),
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.cfloat),
    lambda t: t.to(torch.int64),
    lambda t: t.double() * 1e300,
    lambda t: t * float("nan"),
    lambda t: -t,
    lambda t: t + 1e30,
    lambda t: torch.full_like(t, float("inf")),
    lambda t: t.flatten()[:-1],
    lambda t: t[None],
    lambda t: t.flatten()[:0],
    lambda t: torch.cat([t.flatten()] * 2),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    lambda t: t.flatten()[0].expand(t.shape),
    lambda t: expanded((10**6, 10**7)),
    lambda t: t.float().to_sparse(),
    lambda t: torch.empty(t.shape, device="meta"),
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch._neg_view(t.float()),
]


def places(container):
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def mutate(state, rng):
    """Changes one thing somewhere in the nested state, and says what."""
    path, place = [], state
    while True:
        key = rng.choice(places(place))
        path.append(key)
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.25:
            break
        place = inner
    kind = rng.choice(["replace", "replace", "tensor", "remove", "add"])
    if kind == "tensor" and isinstance(inner, torch.Tensor):
        how = rng.randrange(len(TENSOR))
        place[key] = TENSOR[how](inner)
        return f"{path} tensor {how}"
    if kind == "remove":
        del place[key]
    elif kind == "add":
        if isinstance(place, dict):
            place[rng.choice([1, "other", None, ("a",), "epoch"])] = rng.choice(JUNK)(rng)
        else:
            place.append(rng.choice(JUNK)(rng))
    else:
        place[key] = rng.choice(JUNK)(rng)
    return f"{path} {kind} {str(place.get(key) if isinstance(place, dict) else '')[:60]}"


def listed(state):
    """The state with lists for tuples, that every part can be changed."""
    if isinstance(state, dict):
        return {key: listed(value) for key, value in state.items()}
    return (
        [listed(value) for value in state]
        if isinstance(state, (list, tuple))
        else copy.deepcopy(state)
    )


def mutated(run, seed, n):
    """n times (the file of a checkpoint with one thing changed, what was changed)."""
    rng = random.Random(seed)
    for _ in range(n):
        state = listed(run.checkpoint)
        change = mutate(state, rng)
        yield run.write(state), change


def flipped_or_truncated(run, n):
    """n times (the checkpoint's file, cut off or with bits flipped, which)."""
    rng, good = random.Random(0), run.files["checkpoint.tar"]
    for number in range(n):
        cut = number % 3 == 0
        damaged = bytearray(good[: rng.randrange(len(good))] if cut else good)
        for _ in range(0 if cut else rng.choice([1, 1, 8])):
            place = rng.randrange(len(damaged)) if number % 2 else rng.randrange(3000)
            damaged[place] ^= 1 << rng.randrange(8)
        yield bytes(damaged), f"file {number}"


def each_with(run, damaged, todos, act):
    """Calls act(run, todo) with each of the damaged files, and says with which it failed."""
    for content, change in damaged:
        for todo in todos:
            run.write(content)
            try:
                act(run, todo)
            except Exception as e:
                raise AssertionError(f"{change}, {todo}") from e
            finally:
                run.put_back()


@pytest.mark.parametrize("seed", range(5))
def test_mutated_checkpoints_are_refused_or_restored(run, seed):
    each_with(run, mutated(run, seed, 20), ("train", "evaluate"), restore)


def test_truncated_files_and_flipped_bytes_are_refused_or_restored(run):
    each_with(run, flipped_or_truncated(run, 48), ("train", "evaluate"), restore)


@pytest.mark.slow
def test_commands_refuse_or_run_mutated_checkpoints(run):
    each_with(run, mutated(run, 5, 10), TODOS, attempt)
    each_with(run, flipped_or_truncated(run, 6), TODOS, attempt)


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()


TEXTS = {
    "20,000 minus signs": "- T1: " + "-" * 20000 + "5\n",
    "1,500 minus signs": "- T1: " + "-" * 1500 + "5\n",
    "brackets": "lrs: " + "[" * 1900,
    "a long line": "a: x" + " " * 10**6 + "x",
    "no text": bytes(range(256)) * 40,
    "NUL": "T1: 5\0\nact: 'ta\0nh'\n",
    "escapes": "act: '\\d'\nT1: 5if 1else 2\n",
    "a huge number": "T1: " + "9" * 5000,
    "nothing": "",
    "other types": "archi: {784: 4}\nsoftmax: None\nlrs: 1j\nbetas: b'a'\nact: ...\n",
    "a word": "channels: many\n",
    "large": "archi: 784 99999999999\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("todo", ["evaluate", "train"])
def test_with_its_config_a_checkpoint_needs_no_text(run, name, todo):
    (run.path / "hyperparameters.txt").write_bytes(as_bytes(TEXTS[name]))
    refusal = restore(run, todo, DATA_FLAGS)
    run.put_back()
    assert refusal is None


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("todo", ["evaluate", "train"])
def test_without_its_config_an_odd_text_is_refused_or_completed(run, capsys, name, todo):
    run.write(without(run.checkpoint, "config"))
    (run.path / "hyperparameters.txt").write_bytes(as_bytes(TEXTS[name]))
    refusal = restore(run, todo, DATA_FLAGS)
    run.put_back()
    assert refusal or "does not record" in capsys.readouterr().err


def test_of_a_text_of_100_mb_the_beginning_is_read(tmp_path):
    with open(tmp_path / "hyperparameters.txt", "wb") as file:
        file.write(b"archi: [784, 4, 10]\n")
        for _ in range(100):
            file.write(b"T1: 5\n" * 170_000)
    assert legacy.read_arguments(tmp_path) == {"archi": [784, 4, 10], "T1": 5}


def test_mutated_texts_of_a_checkpoint_without_arguments(run):
    rng, good = random.Random(1), run.files["hyperparameters.txt"].decode()
    damaged = run.write({key: value for key, value in run.checkpoint.items() if key != "config"})
    words = [
        "None",
        "[]",
        "-1",
        "1e999",
        "'",
        "[[[",
        "True",
        "nan",
        "\0",
        "{}",
        "'mm'",
        "1" * 300,
        "0.5",
        "[1, 'a']",
    ]
    for _ in range(30):
        lines = good.splitlines()
        n = rng.choice([n for n, line in enumerate(lines) if line.startswith("  ") and ":" in line])
        line = lines[n]
        name, cut = line.partition(":")[0], rng.randrange(len(line))
        lines[n] = rng.choice([f"{name}: {rng.choice(words)}", "", line[:cut], line * 3])
        for todo in ("train", "evaluate"):
            run.write(damaged)
            (run.path / "hyperparameters.txt").write_text("\n".join(lines))
            restore(run, todo, "--train-size 20 --test-size 8 --T1 3")
            run.put_back()


# --------------------------------------------------------------------------------------- one by one


def altered(state, *keys, value=None, by=None):
    """A copy of the nested state with another value at `keys`: `value`, or what `by` makes of the
    one there."""
    state = copy.deepcopy(state)
    place = state
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = by(place[keys[-1]]) if by else value
    return state


def without(place, *names):
    return {key: value for key, value in place.items() if key not in names}


WRONG_SIZE = {  # of the optimizer's state, which kernels of torch take for granted
    "exp_avg of one value": ("opt", "state", 0, "exp_avg", lambda t: torch.zeros(1)),
    "exp_avg_sq without values": ("opt", "state", 0, "exp_avg_sq", lambda t: torch.zeros(0)),
    "exp_avg of another layer": ("opt", "state", 0, "exp_avg", lambda t: torch.zeros(4)),
    "exp_avg of one repeated value": (
        "opt",
        "state",
        0,
        "exp_avg",
        lambda t: torch.zeros(1).expand(t.shape),
    ),
}

REFUSED = {  # name: (keys in the checkpoint, what becomes of the value there, words of the error)
    **{name: (*place, "exp_avg") for name, place in WRONG_SIZE.items()},
    "exp_avg of bytes": ("opt", "state", 0, "exp_avg", lambda t: t.to(torch.uint8), "exp_avg"),
    "an infinite moment": (
        "opt",
        "state",
        1,
        "exp_avg",
        lambda t: t + float("inf"),
        "exp_avg of parameter 1 of opt",
    ),
    "a negative exp_avg_sq": ("opt", "state", 1, "exp_avg_sq", lambda t: t - 1, "negative"),
    "a negative step": ("opt", "state", 1, "step", lambda t: -1, "step"),
    "many steps": ("opt", "state", 1, "step", lambda t: t.expand(3), "step"),
    "a moment too few": (
        "opt",
        "state",
        1,
        lambda moments: without(moments, "exp_avg"),
        "parameter 1 of opt lacks exp_avg",
    ),
    "a moment too many": (
        "opt",
        "state",
        1,
        lambda moments: {**moments, "more": moments["exp_avg"]},
        "parameter 1 of opt also has 'more'",
    ),
    "half a layer": ("opt", "state", lambda state: without(state, 1), "group 0"),
    "momentum of SGD": (
        "opt",
        "state",
        1,
        lambda moments: {"momentum_buffer": moments["exp_avg"]},
        "parameter 1 of opt lacks step",
    ),
    "a parameter too many": ("opt", "state", lambda state: {**state, 9: state[0]}, "opt's state"),
    "a group too few": ("opt", "param_groups", lambda groups: groups[:1], "2 groups"),
    "a parameter twice": ("opt", "param_groups", 1, "params", lambda ids: [0, 3], "twice"),
    "another kind of Adam": ("opt", "param_groups", 0, "amsgrad", lambda _: True, "amsgrad"),
    "an unknown key": ("opt", "param_groups", 0, lambda group: {**group, "hook": 1}, "group 0"),
    "a rate that is none": ("opt", "param_groups", 0, "lr", lambda _: float("nan"), "lr"),
    "a rate of text": ("opt", "param_groups", 0, "lr", lambda _: "0.1", "lr"),
    "a scheduler without its place": (
        "scheduler",
        lambda state: without(state, "last_epoch"),
        "last_epoch",
    ),
    "a scheduler with a method": ("scheduler", lambda state: {**state, "step": 1}, "step"),
    "another schedule": ("scheduler", "T_max", lambda _: 0, "T_max"),
    "no scheduler": ("scheduler", lambda _: None, "it lacks scheduler"),
    "no optimizer": (lambda state: without(state, "opt"), "it lacks opt"),
    "numpy's position": ("random_states", "numpy", 2, lambda _: 10**6, "numpy"),
    "torch's position": ("random_states", "torch", lambda t: at(t, 16, 600), "position"),
    "a short state": ("random_states", "data", lambda t: t[:-1], "random_states"),
    "python's state": ("random_states", "python", lambda state: (3, state[1][:-1], None), "python"),
    "an epoch more": ("epoch", lambda epoch: epoch + 1, "epoch"),
    "no history": (lambda state: without(state, "history"), "history"),
    "an accuracy of 101 %": ("history", 0, "test_acc", lambda _: 101.0, "test_acc"),
    "a column with an odd name": ("history", 0, lambda row: {**row, "a,b": 1}, "history"),
    "a best model of another size": (
        "best_model",
        "model_state_dict",
        "synapses.0.bias",
        lambda t: t[:3],
        "best_mod",
    ),
    "a best model of nan": (
        "best_model",
        "model_state_dict",
        "synapses.0.bias",
        lambda t: t * float("nan"),
        "finite",
    ),
    "config a list": ("config", lambda config: list(config.items()), "config"),
    "config None": ("config", lambda _: None, "config"),
    "config with numbers for names": ("config", lambda config: {**config, 1: 2}, "config"),
    "config without softmax": ("config", lambda config: without(config, "softmax"), "--softmax"),
    "softmax None": ("config", "softmax", lambda _: None, "--softmax"),
    "a text for a number": ("config", "T1", lambda _: "3", "--T1"),
    "a number for a text": ("config", "act", lambda _: 1, "--act"),
    "10**400": ("config", "mbs", lambda _: 10**400, "--mbs"),
    "10**400 for a real": ("config", "mmt", lambda _: 10**400, "--mmt"),
    "pools of lines": ("config", "pools", lambda _: "\n\n", "--pools"),
    "nan weights": ("model_state_dict", "synapses.1.weight", lambda t: t * float("nan"), "finite"),
    "complex weights": (
        "model_state_dict",
        "synapses.1.weight",
        lambda t: t.to(torch.cfloat),
        "complex",
    ),
    "whole weights": ("model_state_dict", "synapses.1.weight", lambda t: t.long(), "int64"),
    "sparse weights": ("model_state_dict", "synapses.1.weight", lambda t: t.to_sparse(), "weight"),
    "weights beyond float32": (
        "model_state_dict",
        "synapses.1.weight",
        lambda t: t.double() * 1e300,
        "finite",
    ),
    "weights of 40 TB": (
        "model_state_dict",
        "synapses.1.weight",
        lambda t: expanded((10**6, 10**7)),
        "claims",
    ),
}


def at(state, byte, value):
    """The state of a generator of torch's, with another byte, and the one behind it, in it."""
    state = state.clone()
    state[byte], state[byte + 1] = value % 256, value // 256
    return state


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_writes_is_refused(run, name):
    *keys, change, words = REFUSED[name]
    run.write(altered(run.checkpoint, *keys, by=change) if keys else change(run.checkpoint))
    code, err = attempt(run, "train")
    run.put_back()
    assert code == 2 and str(run.path / "checkpoint.tar") in err and words in err, err


def enter(folders):
    """Goes on with trainings, in a child process, as they may end the interpreter. Exit code 2
    where each is refused."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(
        2
        if {main.main(f"--device -1 --load-path {folder}".split()) for folder in folders} == {2}
        else 1
    )


def test_no_size_in_an_optimizer_state_ends_the_interpreter(tmp_path):
    good = torch.load(DATA / "run_2026-11" / "checkpoint.tar", weights_only=True)
    for n, (*keys, change) in enumerate(WRONG_SIZE.values()):
        (tmp_path / str(n)).mkdir()
        torch.save(altered(good, *keys, by=change), tmp_path / str(n) / "checkpoint.tar")
    process = context.Process(target=enter, args=([str(folder) for folder in tmp_path.iterdir()],))
    process.start()
    process.join()
    assert process.exitcode == 2


# ---- pickles that torch.save does not write: of protocol 2, opcode by opcode


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def whole(number):
    return b"\x8a\x08" + struct.pack("<q", number)


def called(name, *arguments):
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def storage(numel, kind="Float", view=b""):
    return (
        b"("
        + text("storage")
        + f"ctorch\n{kind}Storage\n".encode()
        + text("0")
        + text("cpu")
        + whole(numel)
        + view
        + b"tQ"
    )


def tensor(values, size, stride=1, offset=0):
    return called(
        "torch._utils _rebuild_tensor_v2",
        values,
        whole(offset),
        b"(" + whole(size) + b"t",
        b"(" + whole(stride) + b"t",
        b"\x89",
        called("collections OrderedDict"),
    )


def state(weight):
    """A state dict of one weight; weight: opcodes of its value, and of more names and values."""
    return (
        b"\x80\x02}("
        + text("model_state_dict")
        + b"}("
        + text("synapses.0.weight")
        + weight
        + b"uu."
    )


def archive(content, values=bytes(16)):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        for name, part in (("data.pkl", content), ("byteorder", "little"), ("data/0", values)):
            parts.writestr(f"archive/{name}", part)
    return file.getvalue()


def old_format(content, keys=("0",), values=bytes(16), announced=4):
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine))
    return start + content + pickle.dumps(list(keys), 2) + struct.pack("<q", announced) + values


def oversized(content):
    """The archive, whose directory announces 2 GB of data/0."""
    start = content.index(b"archive/data/0", content.index(b"PK\1\2")) - 46
    sizes = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    return content[: start + 20] + sizes + content[start + 28 :]


BILLION, DEEP = 2**30, b")" + b"\x85" * 200_000
PAIRS = b"](" + DEEP + whole(1) + b"\x86e"
FEW, OLD = storage(4), storage(4, view=b"N")
MANY_NAMES = (
    tensor(storage(2**20, "Half"), 2**20)
    + b"q\1"
    + b"".join(text(str(n)) + b"h\1" for n in range(2000))
)
CRAFTED = {
    "a deep key": archive(b"\x80\x02}(" + DEEP + whole(1) + b"u."),
    "a deep key, one by one": archive(b"\x80\x02}" + DEEP + whole(1) + b"s."),
    "a deep key of an OrderedDict": archive(state(called("collections OrderedDict", PAIRS))),
    "a deep entry of a set": archive(state(called("builtins set", b"](" + DEEP + b"e"))),
    "a deep attribute": archive(state(called("model_utils P_MLP") + PAIRS + b"b")),
    "a deep list": archive(state(b"]" * 200_000 + b"a" * 199_999)),
    "bytes": archive(state(called("builtins bytearray", whole(BILLION)))),
    "bytes of protocol 5": archive(state(b"\x96" + struct.pack("<Q", BILLION))),
    "a tensor by its class": archive(state(called("torch Tensor", whole(BILLION)))),
    "an untyped storage": archive(state(called("torch.storage UntypedStorage", whole(BILLION)))),
    "a tensor beyond its storage": archive(state(tensor(FEW, BILLION))),
    "a tensor behind its storage": archive(state(tensor(FEW, 1, offset=BILLION))),
    "a tensor before its storage": archive(state(tensor(FEW, 2, stride=-1))),
    "a storage beyond its file": archive(state(tensor(storage(BILLION), 4))),
    "a repeated value": archive(state(tensor(FEW, BILLION, stride=0))),
    "a tensor as arguments": archive(
        state(b"ccollections\nOrderedDict\n" + tensor(FEW, 2**40, stride=0) + b"R")
    ),
    "a part beyond its file": oversized(archive(state(tensor(FEW, 4)))),
    "a weight of many names": archive(state(MANY_NAMES), bytes(2**21)),
    "a memo of a billion": archive(state(b"]r" + struct.pack("<I", BILLION))),
    "a long name": archive(state(b"cos\n" + b"x" * 10**6 + b"\n")),
    "an old storage": old_format(state(tensor(storage(BILLION, view=b"N"), BILLION))),
    "an old storage that is never written": old_format(state(tensor(OLD, 4)), (), b""),
    "an old storage that ends": old_format(state(tensor(OLD, 4)), values=bytes(15)),
    "an old tensor beyond its storage": old_format(state(tensor(OLD, BILLION))),
    "an old view": old_format(state(tensor(storage(4, view=b"(" + whole(0) + b"t"), 4))),
    "an old module": old_format(state(b"(" + text("module") + b"]" + text("a.py") + b"NtQ")),
}


def enter_crafted(folder, log):
    """Opens every file with 2 GiB more of address space; logs name, exit code and errors."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, now + 2**31))
    for name in CRAFTED:
        err = sys.stderr = io.StringIO()
        (folder / "model.pt").write_bytes(CRAFTED[name])
        words = f"--todo evaluate --task digits --device -1 --load-path {folder / 'model.pt'}"
        code = main.main(words.split())
        with open(log, "a") as file:
            file.write(f"{name}\t{code}\t{err.getvalue()!r}\n")


def test_no_pickle_ends_the_interpreter_or_takes_memory(tmp_path):
    process = context.Process(target=enter_crafted, args=(tmp_path, tmp_path / "log"))
    process.start()
    process.join(120)
    process.kill()
    lines = [line.split("\t") for line in (tmp_path / "log").read_text().splitlines()]
    assert [name for name, *_ in lines] == list(CRAFTED), f"ended in {list(CRAFTED)[len(lines)]}"
    for _, code, err in lines:
        assert code == "2" and err.count("\\n") == 1 and "alloc" not in err, err


def test_weights_of_another_floating_type_are_converted(run):
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        weights = {
            name: weight.to(kind) for name, weight in run.checkpoint["model_state_dict"].items()
        }
        run.write({**run.checkpoint, "model_state_dict": weights})
        saved = checkpoint.open_saved(run.path, "evaluate").weights
        assert all(torch.equal(saved[name], weight.float()) for name, weight in weights.items())
        assert attempt(run, "evaluate")[0] == 0
        run.put_back()


def test_a_moment_in_another_layout_is_brought_into_its_parameters(run):
    run.write(
        altered(run.checkpoint, "opt", "state", 0, "exp_avg", by=lambda t: t.mT.contiguous().mT)
    )
    assert attempt(run, "train")[0] == 0
    resumed = [torch.load(run.path / "checkpoint.tar", weights_only=True)["model_state_dict"]]
    run.put_back()
    assert attempt(run, "train")[0] == 0
    resumed.append(torch.load(run.path / "checkpoint.tar", weights_only=True)["model_state_dict"])
    run.put_back()
    assert all(torch.equal(weight, resumed[1][name]) for name, weight in resumed[0].items())


def test_a_file_in_the_format_of_old_is_read(run):
    torch.save(run.checkpoint, run.path / "checkpoint.tar", _use_new_zipfile_serialization=False)
    assert attempt(run, "train")[0] == 0
    run.put_back()


def test_a_compressed_archive_is_refused(run):
    with zipfile.ZipFile(run.path / "checkpoint.tar") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(run.path / "checkpoint.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    code, err = attempt(run, "evaluate")
    run.put_back()
    assert code == 2 and "compressed" in err


def test_what_a_run_does_not_say_is_taken_from_the_flags_or_named(run):
    (run.path / "hyperparameters.txt").write_text(
        "- task: digits\n- model: MLP\n- archi: [784, 4, 10]\n"
    )
    state = without(run.checkpoint, "config")
    run.write(state)
    code, err = attempt(run, "evaluate", "--loss cel --test-size 8 --train-size 20")
    assert (
        code == 0
        and "note: the saved run does not record --act, --softmax; assumed: act mysig, softmax False\n"
        in err
    )
    code, err = attempt(
        run, "evaluate", "--loss cel --softmax --act mysig --test-size 8 --train-size 20"
    )
    assert code == 0 and not err
    run.put_back()
    assert "taken" not in attempt(run, "evaluate")[1]


@pytest.mark.parametrize(
    "path", ["x" * 5000, "a/" * 3000, "a\0b", "a\nb", "\udcff", "", "hyperparameters.txt", "loop"]
)
@pytest.mark.parametrize("todo", ["train", "evaluate"])
def test_odd_paths_are_one_line(cli, tmp_path, path, todo):
    (tmp_path / "hyperparameters.txt").write_text("a file, no folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    code, _, err = cli(f"--todo {todo} --device -1 --load-path", [path])
    assert code == 2 and err.count("\n") == 1 and len(err) < 500, err
    assert err.startswith("main.py: error: argument --load-path:")


def test_a_pipe_or_folder_in_place_of_a_file_is_no_file(cli, tmp_path):
    os.mkfifo(tmp_path / "hyperparameters.txt")
    assert legacy.read_arguments(tmp_path) == {}
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "model.pt")
        code, _, err = cli(f"--todo evaluate --device -1 --load-path {tmp_path}")
        assert code == 2 and err.count("\n") == 1 and "model.pt is no file" in err
        (tmp_path / "model.pt").rename(tmp_path / make.__name__)


def enter_as_nobody(words, log):
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(log, "w", buffering=1)
    os.setuid(65534)
    sys.exit(main.main(words))


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root becomes somebody else"
)
def test_a_folder_without_permission_is_one_line(tmp_path):
    run = pathlib.Path(shutil.copytree(DATA / "run_2026-11", tmp_path / "run"))
    (tmp_path / "run").chmod(0)
    words, log = f"--device -1 --load-path {run}".split(), tmp_path / "err"
    process = context.Process(target=enter_as_nobody, args=(words, str(log)))
    process.start()
    process.join()
    err = log.read_text()
    assert (
        process.exitcode == 2
        and err.count("\n") == 1
        and "cannot be read: permission denied" in err
    ), err


# -------------------------------------------------------------- runs of the version before, 795b5bb


def test_a_run_of_the_version_before_is_evaluated_and_resumed(ok, tmp_path):
    """tests/data/run_2026-11 was made by commit 795b5bb: main.py --task digits --device -1
    --train-size 60 --test-size 20 --mbs 15 --T1 8 --T2 3 --betas 0 0.5 --random-sign --loss cel
    --softmax --act tanh --archi 784 4 10 --optim adam --lrs 0.003 0.03 --lr-decay --epochs 2 --seed
    5 --save; and the file beside it holds weights and history when that commit had resumed it for
    two more epochs."""
    expected = torch.load(DATA / "run_2026-11_after_four_epochs.pt", weights_only=True)
    run = pathlib.Path(shutil.copytree(DATA / "run_2026-11", tmp_path / "run"))
    out = ok(f"--todo evaluate --device -1 --load-path {run}")
    assert "train accuracy 31.67 % (60 images), test accuracy 10.00 % (20 images)" in out
    assert "from epoch 3 on" in ok(f"--device -1 --epochs 2 --load-path {run}")
    state = torch.load(run / "final_checkpoint.tar", weights_only=True)
    rows = [
        [without(row, "seconds", "converged") for row in history]
        for history in (state["history"], expected["history"])
    ]
    assert rows[0] == rows[1] and [row.get("converged", "") for row in state["history"]] == [
        "",
        "",
        100.0,
        100.0,
    ]
    for name, weight in expected["model_state_dict"].items():
        # Equal on the machine that made it. Adam divides rounding by rounding where a gradient is
        # tiny, so that on another kind of CPU single weights are off by 1e-5; a forgotten moment,
        # rate or random number moves them by 1e-3.
        assert (state["model_state_dict"][name] - weight).abs().max() < 1e-4, name
        assert (state["model_state_dict"][name] - weight).abs().median() < 1e-6, name
    assert torch.load(run / "model.pt", weights_only=True)["epoch"] == 4


def test_a_run_of_the_version_before_is_compared(ok, tmp_path):
    runs = [shutil.copytree(DATA / "run_2026-11", tmp_path / name) for name in ("a", "b")]
    ok(f"--todo compare --device -1 --load-path {runs[0]} {runs[1]}")
    (table,) = tmp_path.glob("results/compare/*/*/comparison.csv")
    rows = {row["measure"]: row for row in csv.DictReader(io.StringIO(table.read_text()))}
    assert float(rows["clean"]["mean"]) == 10.0 and rows["clean"]["group"] == "MLP EP", rows
