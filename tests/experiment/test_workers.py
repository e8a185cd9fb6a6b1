"""Several workers under torchrun, two on this machine, against one process."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run
from shared import final_weights

import main
import main_dropout
from experiment.runs.folder import RunFolder

TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--local-addr",
    "127.0.0.1",
    "--nproc_per_node",
    "2",
]
MLP = (
    "--task digits --device -1 --seed 5 --save --test-size 40 --mbs 16 --archi 784 12 10 --T1 6 --T2 3 --betas 0 "
    "0.5 --lrs 0.1 0.1 --mmt 0.9"
)
CNN = MLP + " --model CNN --channels 3 4 --lrs 0.03 0.03 0.03"
BP = "--task digits --device -1 --seed 5 --save --test-size 40 --mbs 16 --loss cel"
TRAINED = {  # 50 images leave two for the last mini-batch, 49 one: nothing for the second worker
    "MLP EP symmetric, account of steps": MLP
    + " --train-size 50 --thirdphase --tol 0.03 --check-thm --epochs 2",
    "MLP EP random sign": MLP + " --train-size 49 --random-sign --lr-decay --epochs 2",
    "MLP CEP with dropout": MLP
    + " --train-size 50 --alg CEP --thirdphase --mmt 0 --dropouts 0.8 0.6",
    "MLP BPTT, mini-batches of one": MLP + " --train-size 5 --mbs 1 --alg BPTT",
    "CNN BPTT": CNN + " --train-size 50 --alg BPTT --loss cel --softmax --epochs 2",
    "VFCNN EP, augmented": CNN
    + " --task CIFAR10 --data-aug --train-size 33 --model VFCNN --thirdphase",
    "FFMLP": BP + " --model FFMLP --archi 784 12 10 --train-size 50 --lr-step 1 0.5 --epochs 2",
    "FFCNN": BP + " --model FFCNN --channels 3 4 --train-size 49 --epochs 2",
    "ViT": BP
    + " --model ViT --patch 7 --depth 1 --heads 2 --width 8 --mlp-width 12 --train-size 50",
}
RESUMED = "MLP EP random sign"
EXAMINED = {
    "evaluate": "--todo evaluate --device -1 --train-size 50 --tol 0.01 --load-path run",
    "attack": "--todo attack --device -1 --attack-grad bptt ep --eps-list 0.5 1 --attack-iters 4 --attack-step 4 "
    "--save --load-path run",
}


pytestmark = pytest.mark.slow  # every test starts processes


@contextlib.contextmanager
def torchrun(*words, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*TORCHRUN, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )
    try:
        yield process
    finally:
        process.terminate()  # and with it, where a test has failed, its workers
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def both(tmp_path_factory, cifar):
    """A folder in which all has been done by one process, in one/NAME, and by two, in two/NAME."""
    root, before, threads = (
        tmp_path_factory.mktemp("parallel"),
        os.getcwd(),
        torch.get_num_threads(),
    )
    lines = {name: f"{line} --data-dir {cifar}" for name, line in TRAINED.items()}
    for name in (*TRAINED, "resumed", *EXAMINED):
        for number in ("one", "two"):
            (root / number / name).mkdir(parents=True)
    torch.set_num_threads(1)
    for name, line in lines.items():
        os.chdir(root / "one" / name)
        assert main.main(line.split(), main_dropout.FLAGS) == 0
    for name in EXAMINED:
        for number in ("one", "two"):
            shutil.copytree(only_run(root / "one" / "CNN BPTT"), root / number / name / "run")
        os.chdir(root / "one" / name)
        assert main.main(EXAMINED[name].split()) == 0
    work = {**lines, "resumed": lines[RESUMED] + " --epochs 1", **EXAMINED}
    (root / "work.json").write_text(
        json.dumps({str(root / "two" / name): line.split() for name, line in work.items()})
    )
    with torchrun(ROOT / "tests" / "share_work.py", root / "work.json") as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 0 and "arning" not in err, err
    os.chdir(root / "two" / "resumed")
    assert main.main(["--device", "-1", "--load-path", str(only_run("."))]) == 0
    os.chdir(before)
    torch.set_num_threads(threads)
    return root


@pytest.mark.parametrize(
    "name, by_two", [*((name, name) for name in TRAINED), (RESUMED, "resumed")]
)
def test_training_is_that_of_one_process(both, name, by_two):
    one, two = only_run(both / "one" / name), only_run(both / "two" / by_two)
    for key, weight in final_weights(one).items():
        torch.testing.assert_close(final_weights(two)[key], weight, rtol=0, atol=1e-6)
    rows = [
        [{**row, "seconds": ""} for row in RunFolder(run).read_csv("metrics.csv")]
        for run in (one, two)
    ]
    assert rows[0] == rows[1]
    assert "command line: torchrun" in (two / "hyperparameters.txt").read_text()


def test_evaluation_and_attacks_are_those_of_one_process(both):
    evaluated, attacked = (
        [both / number / name / "run" for number in ("one", "two")] for name in EXAMINED
    )
    lines = [(run / "hyperparameters.txt").read_text().splitlines()[-1] for run in evaluated]
    assert lines[0] == lines[1] and "test accuracy" in lines[0] and "steps on average" in lines[0]
    texts = [(run / "Adversarial_Accuracy.txt").read_text() for run in attacked]
    assert texts[0] == texts[1] and texts[0].count("worst") == 2
    images = [np.load(run / "Adversarial_Accuracy_images.npz") for run in attacked]
    assert all(np.array_equal(images[0][key], images[1][key]) for key in images[0].files)


def ours(err):
    """What main.py says on standard error, in whichever process; torchrun has a report of its
    own."""
    return [line for line in err.splitlines() if line.startswith(("main.py:", "interrupted"))]


@pytest.mark.parametrize("words", ["gducheck --task digits --device -1", "compare --load-path run"])
def test_what_needs_one_process_is_refused_once(tmp_path, words):
    with torchrun(ROOT / "main.py", "--todo", *words.split(), cwd=tmp_path) as process:
        _, err = process.communicate(timeout=60)
    refusal = f"--todo {words.split()[0]} is the work of one process"
    assert len(ours(err)) == 1 and refusal in ours(err)[0], err
    assert 'main.py", line' not in err
    assert process.returncode == 1 and "exitcode  : 2" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_lost_worker_ends_the_run_and_says_how_to_go_on(tmp_path, number):
    with torchrun(
        ROOT / "main.py", *(MLP + " --T1 100 --epochs 500").split(), cwd=tmp_path
    ) as process:
        assert "results go to" in process.stdout.readline()
        children = (
            pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        time.sleep(1)
        start = time.monotonic()
        os.kill(process.pid if number == signal.SIGINT else int(children[-1]), number)
        _, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 15 and process.returncode
    run = only_run(tmp_path)
    (message,) = ours(err)
    assert (
        "interrupted;" if number == signal.SIGINT else "a worker"
    ) in message and 'main.py", line' not in err, err
    done = torch.load(run / "checkpoint.tar", weights_only=True)["epoch"]
    again = next(line for line in err.splitlines() if "--load-path" in line).split()
    assert again[0] == "torchrun" and again[-4:] == [
        "--load-path",
        str(run.relative_to(tmp_path)),
        "--epochs",
        str(500 - done),
    ]


def test_workers_whose_torchrun_was_killed_end_and_let_go_of_the_run(tmp_path, capsys):
    with torchrun(
        ROOT / "main.py", *(MLP + " --T1 100 --epochs 500").split(), cwd=tmp_path
    ) as process:
        assert "results go to" in process.stdout.readline()
        run = only_run(tmp_path)
        assert main.main(["--device", "-1", "--load-path", str(run)]) == 2
        assert "is being trained already" in capsys.readouterr().err
        children = (
            pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        )
        os.kill(process.pid, signal.SIGKILL)
        start = time.monotonic()
        while any(pathlib.Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() - start < 20
            time.sleep(0.1)
        _, err = process.communicate(timeout=60)
    assert "interrupted or lost a worker;" in err and "Traceback" not in err
    assert main.main(["--device", "-1", "--load-path", str(run)]) == 0


# ---- slow, but not lost


@pytest.fixture(scope="module")
def slowed(tmp_path_factory):
    """A folder with the run `one`, attacked by one process, and its copies `slow` and `frozen`,
    attacked by two, see tests/slow_worker.py; the exit code of torchrun; its standard error."""
    folder, before = tmp_path_factory.mktemp("slowed"), os.getcwd()
    words = (
        "--todo attack --device -1 --eps-list 0.5 1 --attack-iters 2 --attack-step 4 --mbs 5 --load-path"
    ).split()
    os.chdir(folder)
    assert main.main((MLP + " --train-size 20").split()) == 0
    for name in ("slow", "frozen"):
        shutil.copytree(only_run(folder), name)
    only_run(folder).rename("one")
    assert main.main([*words, "one"]) == 0
    os.chdir(before)
    with torchrun(ROOT / "tests" / "slow_worker.py", *words, cwd=folder) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "lost" in line:
                break
        for child in (
            pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ):
            os.kill(int(child), signal.SIGCONT)  # or else torchrun waits long for the frozen one
        _, err = process.communicate(timeout=60)
    return folder, process.returncode, "".join(lines) + err


def test_workers_wait_for_a_slow_one_while_it_lives(slowed):
    folder, _, err = slowed
    texts = [(folder / name / "Adversarial_Accuracy.txt").read_text() for name in ("one", "slow")]
    assert texts[0] == texts[1] and "slow failed" not in err


def test_a_worker_without_heartbeat_is_lost(slowed):
    folder, code, err = slowed
    (message,) = ours(err)
    assert "a worker was lost (rank 1" in message and "the same command resumes" in message
    assert code and 'main.py", line' not in err
