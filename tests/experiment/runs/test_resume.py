"""Runs that are interrupted, killed, or given files that are not what they should be."""

import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, ZOO, context, only_run, tiers
from shared import MLP, final_weights, start

import main
import model_utils as mu
from experiment import command_line
from experiment.runs import checkpoint, legacy

CNN = ZOO["CNN"]
BP = "--task digits --device -1 --train-size 60 --test-size 20 --mbs 15 --seed 5 --save --loss cel"
FFCNN = BP + " --model FFCNN --channels 3 4 --mmt 0.9"
EXACT = {
    "MLP EP random sign, momentum, decay": MLP
    + " --random-sign --mmt 0.9 --lr-decay --lrs 0.1 0.1",
    "MLP BPTT Adam": MLP + " --alg BPTT --optim adam --lr-decay",
    "CNN EP random sign Adam": CNN + " --random-sign --optim adam",
    "CNN BPTT momentum": CNN + " --alg BPTT --mmt 0.9 --lr-decay",
    "VFCNN EP symmetric, augmented": CNN
    + " --task CIFAR10 --data-aug --model VFCNN --thirdphase --optim adam "
    "--lr-decay",
    "FFMLP attacked": BP
    + " --model FFMLP --archi 784 12 10 --mmt 0.9 --lr-step 2 0.5 --adv-train 0.5 --adv-iters 2",
    "FFCNN momentum": FFCNN + " --lr-decay",
    "ViT Adam": BP
    + " --model ViT --patch 7 --depth 1 --heads 2 --width 8 --mlp-width 12 --optim adam --lr-decay",
}


def assert_same_run(run, other):
    for name, weight in final_weights(other).items():
        assert torch.equal(final_weights(run)[name], weight), name
    rows = [
        [
            line.rsplit(",", 1)[0] if "angle" not in line else ""
            for line in (r / "metrics.csv").read_text().splitlines()
        ]
        for r in (run, other)
    ]
    strip = [[",".join(line.split(",")[:3]) for line in r] for r in rows]
    assert strip[0] == strip[1]


@pytest.mark.parametrize(
    "name", tiers(EXACT, "MLP BPTT Adam", "CNN EP random sign Adam", "FFMLP attacked")
)
def test_two_and_two_epochs_are_four(ok, tmp_path, cifar, name):
    line = EXACT[name] + f" --data-dir {cifar}"
    folders = [tmp_path / "once", tmp_path / "twice"]
    for folder in folders:
        folder.mkdir()
    os.chdir(folders[0])
    ok(line, "--epochs 4")
    os.chdir(folders[1])
    ok(line, "--epochs 2")
    run = only_run(folders[1])
    assert "from epoch 3 on" in ok(line, f"--epochs 2 --load-path {run}/")
    assert_same_run(run, only_run(folders[0]))
    ok(f"--device -1 --load-path {run}")  # one epoch beyond the end, everything else from the run
    assert torch.load(run / "checkpoint.tar", weights_only=True)["epoch"] == 5


@pytest.mark.slow
def test_a_training_that_is_killed_at_random_ends_as_one_that_is_not(ok, tmp_path):
    line, epochs, rng = CNN + " --random-sign --mmt 0.9", 8, random.Random(0)
    once, folder = tmp_path / "once", tmp_path / "killed"
    for path in (once, folder):
        path.mkdir()
    os.chdir(once)
    ok(line, f"--epochs {epochs}")
    for kills_left in (3, 2, 1, 0):
        runs = list(folder.glob("results/*/*/*/[!.]*"))
        done = torch.load(runs[0] / "checkpoint.tar", weights_only=True)["epoch"] if runs else 0
        if done == epochs:
            break
        resume = f" --load-path {runs[0]}" if runs else ""
        process = start(folder, f"{line} --epochs {epochs - done}{resume}")
        process.join(rng.uniform(0.1, 1.2) if kills_left else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert_same_run(only_run(folder), only_run(once))


def killed_after(tmp_path, line, least):
    """(its run, how many epochs it has) of a training that was killed after at least so many."""
    process, done = start(tmp_path, line), 0
    while done < least:
        time.sleep(0.01)
        for path in tmp_path.glob("results/*/*/*/[!.]*/checkpoint.tar"):
            done = torch.load(path, weights_only=True)["epoch"]
    process.kill()
    process.join()
    run = only_run(tmp_path)
    return run, torch.load(run / "checkpoint.tar", weights_only=True)["epoch"]


def test_after_a_kill_the_run_says_how_many_epochs_are_left(ok, tmp_path):
    run, done = killed_after(tmp_path, MLP + " --epochs 100", 1)
    assert f"{100 - done} of the requested epochs remain (--epochs {100 - done})" in ok(
        f"--device -1 --load-path {run}"
    )
    out = ok(f"--device -1 --load-path {run} --epochs {99 - done}")
    assert "epoch 100/100" in out and "remain" not in out
    assert "remain" not in ok(f"--device -1 --load-path {run}")  # nothing is left


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_interrupts_say_how_to_go_on(tmp_path, number, code):
    words = (MLP + " --train-size 1437 --T1 200 --epochs 500").split()
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "main.py", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "results go to" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    run = only_run(tmp_path)
    done = torch.load(run / "checkpoint.tar", weights_only=True)["epoch"]
    again = next(text for text in err.splitlines() if "--load-path" in text).split()
    # as it was started, and nothing that the run remembers
    assert again[:5] == [sys.executable, "-u", str(ROOT / "main.py"), "--device", "-1"]
    assert len(again) == 9 and again[5:] == [
        "--load-path",
        str(run.relative_to(tmp_path)),
        "--epochs",
        str(500 - done),
    ]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch breached",)


@pytest.fixture
def trained(zoo, tmp_path, cli):
    return zoo.copy("CNN", tmp_path)


def digest(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


BROKEN = {
    "code": lambda path: torch.save(Malicious(), path),
    "code in a dict": lambda path: torch.save({"model_state_dict": {}, "opt": Malicious()}, path),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:2000]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "no checkpoint": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "other weights": lambda path: torch.save(
        {
            **torch.load(path, weights_only=True),
            "model_state_dict": mu.P_MLP([784, 9, 10], torch.tanh).state_dict(),
        },
        path,
    ),
    "senseless arguments": lambda path: torch.save(
        {**torch.load(path, weights_only=True), "config": {"channels": "many"}}, path
    ),
    "absent": lambda path: path.unlink(),
}


def assert_refused(cli, run, how, todo, tmp_path):
    for name in ("model.pt", "checkpoint.tar"):
        BROKEN[how](run / name)
    before = digest(run)
    code, out, err = cli(f"--todo {todo} --device -1 --load-path {run}")
    assert code == 2 and err.count("\n") == 1 and str(run) in err and "Traceback" not in err, err
    assert digest(run) == before
    assert not list(tmp_path.rglob("breached")) and not os.path.exists("breached")


@pytest.mark.parametrize("todo", ["train", "evaluate", "attack", "gducheck"])
@pytest.mark.parametrize("how", BROKEN)
def test_files_that_are_no_checkpoints_are_refused(cli, trained, how, todo, tmp_path):
    assert_refused(cli, trained, how, todo, tmp_path)


@pytest.mark.parametrize("name", [name for name, line in EXACT.items() if line.startswith(BP)])
def test_files_that_are_no_networks_are_refused(ok, cli, name, tmp_path):
    ok(EXACT[name])
    for how in BROKEN:
        for todo in ("train", "evaluate"):
            run = shutil.copytree(
                only_run(tmp_path), tmp_path / "copies" / f"{how} {todo}".replace(" ", "-")
            )
            assert_refused(cli, run, how, todo, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [{"opt": {"state": 3}}, {"random_states": {"python": None}}, {"history": [3]}, {"asked": -1}],
)
def test_a_checkpoint_with_damaged_parts_is_refused(cli, trained, damage):
    path = trained / "checkpoint.tar"
    torch.save({**torch.load(path, weights_only=True), **damage}, path)
    before = digest(trained)
    code, _, err = cli(f"--device -1 --load-path {trained}")
    assert (
        code == 2 and err.count("\n") == 1 and "checkpoint.tar" in err and digest(trained) == before
    )


def test_contradicting_flags_are_reported_and_the_run_wins(cli, trained):
    code, out, err = cli(
        f"--load-path {trained} --device -1 --channels 9 9 --loss cel --task MNIST --lrs 1 1 1 --T1 5"
    )
    assert (
        code == 0
        and all(flag in err for flag in ("--channels 3 4", "--loss mse", "--task digits", "--lrs"))
        and "--T1" not in err
    )
    assert torch.load(trained / "checkpoint.tar", weights_only=True)["config"]["channels"] == [3, 4]


def test_a_run_is_recreated_from_its_hyperparameters_alone(ok, trained, tmp_path):
    values = legacy.read_arguments(trained)
    assert {"python", "torch", "torchvision", "cuda", "device", "seed", "channels", "T1"} <= set(
        values
    ) and "git revision:" in (trained / "hyperparameters.txt").read_text()
    line = next(
        text
        for text in (trained / "hyperparameters.txt").read_text().splitlines()
        if text.startswith("command line: python main.py")
    )
    shutil.move(trained, tmp_path / "first")
    ok(line.removeprefix("command line: python main.py "), f"--seed {values['seed']}")
    assert_same_run(only_run(tmp_path), tmp_path / "first")


def test_runs_that_start_in_the_same_second_get_two_folders(tmp_path):
    processes = [start(tmp_path, MLP) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (
        len([p for p in tmp_path.glob("results/*/*/*/*") if (p / "final_model.pt").exists()]) == 3
    )


def limited(folder, words, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
    os.chdir(folder)
    sys.stderr, sys.stdout = open(folder + "/err", "w", buffering=1), open(os.devnull, "w")
    code = main.main(words)
    sys.stderr.flush()
    sys.exit(code)


def test_a_full_disk_leaves_the_previous_checkpoint(trained, tmp_path):
    before = (trained / "checkpoint.tar").read_bytes()
    limit = (trained / "checkpoint.tar").stat().st_size - 1000
    process = context.Process(
        target=limited, args=(str(tmp_path), f"--load-path {trained} --device -1".split(), limit)
    )
    process.start()
    process.join()
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 1 and "cannot write" in err and err.count("\n") == 1, err
    assert (trained / "checkpoint.tar").read_bytes() == before
    assert not [p for p in trained.iterdir() if p.name.startswith(".")]


# ---- files of the original code, rebuilt from throw-away classes of the same names

OLD = '''
import sys, types, torch
sys.path.insert(0, {root!r})
import model_utils as ours
for kind in sys.argv[2:]:
    folder = sys.argv[1] + "/" + kind
    torch.manual_seed(0)
    act = ours.my_hard_sig if "CNN" in kind else torch.tanh
    geometry = (28, [1, 3, 4], [5, 5], [1, 1], [6, 10], ours.make_pools("ma"), [0, 1])
    new = {{"P_MLP": lambda: ours.P_MLP([784, 12, 10], act), "VF_MLP": lambda: ours.VF_MLP([784, 12, 10, 10], act),
            "P_CNN": lambda: ours.P_CNN(*geometry, act, softmax=True),
            "VF_CNN": lambda: ours.VF_CNN(*geometry, act, softmax=True)}}[kind]()
    x = torch.rand(5, 1, 28, 28)
    out = new.readout(new(x, None, None, 6))
    old_module = types.ModuleType("model_utils")
    exec("""
import torch
def my_hard_sig(x): return x
class %s(torch.nn.Module):
    pass
""" % kind, old_module.__dict__)
    sys.modules["model_utils"] = old_module
    for value in old_module.__dict__.values():
        if callable(value): value.__module__ = "model_utils"
    old = getattr(old_module, kind)()
    plain = lambda layer: layer
    old.synapses = torch.nn.ModuleList(new.synapses)
    if len(new.B_syn): old.B_syn = torch.nn.ModuleList(new.B_syn)
    if "CNN" in kind:
        old.pools = [torch.nn.MaxPool2d(2, stride=2), torch.nn.AvgPool2d(2, stride=2)]
        old.softmax, old.same_update = True, False
    old.activation = old_module.my_hard_sig if "CNN" in kind else torch.tanh
    old.nc = 10
    torch.save(old, folder + "/model.pt")
    groups = [{{"params": m.parameters(), "lr": 0.01}} for m in [*new.synapses, *new.B_syn]]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    torch.save({{"model_state_dict": new.state_dict(), "opt": optimizer.state_dict(), "scheduler": None, "best": 49.0,
                "train_acc": [40.0, 50.0], "test_acc": [41.0, 49.0], "epoch": 1, "angles": [90.0]}},
               folder + "/checkpoint.tar")
    torch.save((x, out), folder + "/expected")
'''


KINDS = ("P_MLP", "VF_MLP", "P_CNN", "VF_CNN")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder for each of KINDS, with files of the original code."""
    root = tmp_path_factory.mktemp("originals")
    for kind in KINDS:
        (root / kind).mkdir()
    program = OLD.format(root=str(ROOT))
    subprocess.run([sys.executable, "-c", program, str(root), *KINDS], check=True)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_the_original_code_load(ok, originals, tmp_path, kind):
    folder = pathlib.Path(shutil.copytree(originals / kind, tmp_path / "old"))
    x, out = torch.load(folder / "expected", weights_only=True)

    # the pickled module tells its architecture itself
    saved = checkpoint.open_saved(folder, "evaluate")
    args = command_line.resolve(
        {"todo": "evaluate"}, {**saved.args, "loss": "cel" if "CNN" in kind else "mse"}
    )
    model = mu.make_model(args)
    checkpoint.load_weights(model, saved)
    torch.testing.assert_close(model.readout(model(x, None, None, 6)), out)

    # the state dict takes it from hyperparameters.txt, as the original code writes it, or from the
    # flags
    flags = {
        "P_MLP": "--model MLP --archi 784 12 10 --act tanh",
        "VF_MLP": "--model VFMLP --archi 784 12 10 10 --act tanh",
    }.get(
        kind,
        f"--model {kind.replace('P_', '').replace('_', '')} --channels 3 4 --kernels 5 5 --pools ma --paddings 0 1 "
        "--fc 6 10 --act my_hard_sig --loss cel --softmax",
    )
    common = "--task digits --device -1 --test-size 20 --train-size 40"
    assert "test accuracy" in ok(
        f"--todo evaluate --load-path {folder} {common}",
        "--loss cel --softmax" if "CNN" in kind else "",
    )
    (folder / "hyperparameters.txt").unlink()
    if kind == "P_CNN":
        (folder / "hyperparameters.txt").write_text(
            "- task: digits\n- model: CNN\n  channels: [3, 4]\n  kernels : "
            "[5, 5]\n  pools: ma\n  paddings: [0, 1]\n"
            "  fc: [6, 10]\n  act: my_hard_sig\n  loss: cel\n  softmax: True\n"
        )
        flags = ""
    out = ok(f"--load-path {folder} {common} --mmt 0.9", flags)
    assert "from epoch 3 on" in out and "epoch 3/3" in out
    assert checkpoint.read_checkpoint(folder / "checkpoint.tar")["epoch"] == 3


def test_resuming_from_a_model_does_not_call_it_damaged(cli, zoo, tmp_path):
    run = zoo.copy("MLP", tmp_path)
    (run / "checkpoint.tar").write_bytes(b"")
    code, _, err = cli(f"--device -1 --load-path {run / 'model.pt'}")
    assert (
        code == 2 and err.count("\n") == 1 and "damaged" not in err and "name the run folder" in err
    )
