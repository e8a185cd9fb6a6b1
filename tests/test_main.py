import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, only_run
from shared import SEED_LINES, SMALL

import main
import main_dropout

QUICK = "--task digits --device -1 --train-size 100 --test-size 40 --seed 0"

BAD = {  # command line: what the message must say
    "--lrs 0.1": "--lrs: got 1 value (0.1), expected 2: dense 1, dense 2",
    "--wds 0 0 0": "--wds: got 3",
    "--model CNN --kernels 3": "--kernels: got 1 value (3), expected 2",
    "--model CNN --strides 1 1 1": "--strides: got 3",
    "--model VFCNN --paddings 0": "--paddings: got 1",
    "--model CNN --pools m": "--pools: got 1",
    "--model CNN --pools mx": "--pools: got 'mx', expected the letters m, a and i",
    "--model CNN --lrs 0.1 0.1": "--lrs: got 2 values (0.1 0.1), expected 3: conv 1, conv 2, dense 1",
    "--archi 28 512 10": "--archi: its first entry is 28, an image of digits has 784 values",
    "--archi 784 512 11": "--archi: its last entry is 11, digits has 10 classes",
    "--archi 784": "--archi: got 1",
    "--model CNN --fc 100": "--fc: its last entry is 100, digits has 10 classes",
    "--model CNN --kernels 29 5": "layer 1: a 29x29 convolution",
    "--model CNN --channels 4 4 4 --kernels 5 5 5 --strides 1 1 1 --paddings 0 0 0 --pools mmm": "layer 3: a 5x5 "
    "convolution",
    "--alg BPTT --T1 3 --T2 4": "--T2: got 4",
    "--device 99": "--device: got 99",
    "--device -2": "--device: got '-2', expected a whole number of at least -1",
    "--model GAN": "--model: got 'GAN', expected one of MLP, VFMLP, CNN, VFCNN",
    "--task SVHN": "--task: got 'SVHN'",
    "--act relu": "--act: got 'relu'",
    "--loss hinge": "--loss: got 'hinge'",
    "--optim rmsprop": "--optim: got 'rmsprop'",
    "--alg RTRL": "--alg: got 'RTRL'",
    "--todo fly": "--todo: got 'fly'",
    "--T1 0": "--T1: got '0', expected a whole number of at least 1",
    "--T1 many": "--T1: got 'many'",
    "--mbs 0": "--mbs",
    "--epochs -1": "--epochs: got '-1'",
    "--betas 0.1": "--betas: got 1 value (0.1), expected 2",
    "--betas 0 0": "--betas: got 0.0 0.0",
    "--betas 0 nan": "--betas: got 'nan'",
    "--mmt 2": "--mmt: got '2', expected a number of at least 0 and at most 1",
    "--softmax": "--softmax: needs --loss cel",
    "--train-size 0": "--train-size",
    "--train-size 9999": "--train-size: got 9999, digits has 1437",
    "--no-such-flag": "--no-such-flag",
    "--archi": "--archi",
    "--seed -1": "--seed",
    "--todo evaluate": "--load-path",
    "--load-path missing/folder": "missing/folder",
    "--todo evaluate --load-path missing/folder/": "missing/folder",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(cli, words, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: True
    )  # a device that does not exist is one among some
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, out, err = cli("--task digits --device -1", words)
    assert (
        code == 2
        and err.count("\n") == 1
        and err.startswith("main.py: error:")
        and BAD[words] in err
    ), err


def test_a_process_ends_the_same_way(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--task", "digits", "--lrs", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and not done.stdout
        and not list(tmp_path.iterdir())
    )


def test_of_a_repeated_flag_only_the_last_counts(ok):
    ok(QUICK, "--act my_hard_sig.9 --T1 none --lrs 1 --T1 3 --lrs 0.1 0.1 --act my_hard_sig")


def test_flags_that_do_nothing_are_named(cli):
    _, _, err = cli(
        QUICK, "--data-aug --same-update --alg BPTT --thirdphase --optim adam --mmt 0.9"
    )
    assert all(flag in err for flag in ("--data-aug", "--same-update", "--thirdphase", "--mmt"))


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        main.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for line in SEED_LINES:
        for flag in re.findall(r"--[\w-]+", line):
            assert flag in text or flag == "--dropouts"


RULES = [
    "--model MLP --archi 784 20 12 10 --act tanh",
    "--model VFMLP --archi 784 20 12 10",
    "--model MLP --loss cel",
    "--model MLP --loss cel --softmax",
    "--model CNN --channels 3 4",
    "--model CNN --channels 3 4 --loss cel --softmax --fc 12 10",
    "--model VFCNN --channels 3 4",
    "--model VFCNN --channels 3 4 --same-update --loss cel --softmax",
    "--model VFMLP --archi 784 20 12 10 --same-update",
    "--model CNN --channels 3 --kernels 5 --strides 2 --paddings 1 --pools a --scale 0.5",
]


@pytest.mark.parametrize(
    "alg", ["--alg EP", "--alg EP --random-sign", "--alg EP --thirdphase", "--alg BPTT"]
)
@pytest.mark.parametrize("model", RULES)
def test_every_model_trains_with_every_rule(ok, model, alg):
    out = ok(QUICK, "--T1 5 --T2 2 --betas 0 0.5 --mbs 30 --epochs 2", model, alg)
    assert len(re.findall("^epoch ", out, re.M)) == 2
    assert ("angles" in out) == ("VF" in model)


def test_learning(ok):
    out = ok(
        "--task digits --device -1 --archi 784 128 10 --T1 20 --T2 6 --betas 0 0.2 --thirdphase --optim adam "
        "--lrs 1e-3 1e-3 --epochs 4 --seed 0"
    )
    assert float(re.findall(r"test (\S+) %", out)[-1]) > 90


def test_the_same_seed_gives_the_same_run(ok, tmp_path):
    line = QUICK + " --model CNN --channels 3 4 --T1 5 --T2 2 --random-sign --epochs 2"
    numbers = [re.findall(r"(?:train|test) \S+", ok(line)) for _ in range(2)]
    assert numbers[0] == numbers[1] != re.findall(r"(?:train|test) \S+", ok(line, "--seed 1"))


def test_angles_go_to_the_metrics(ok, tmp_path):
    ok(QUICK, "--model VFMLP --archi 784 20 12 10 --save")
    header, row = (only_run(tmp_path) / "metrics.csv").read_text().splitlines()
    assert header == "epoch,train_acc,test_acc,seconds,converged,angle_2,angle_3"
    assert all(0 < float(angle) < 180 for angle in row.split(",")[4:])


@pytest.mark.parametrize(
    "words, what",
    [("--lrs 1e30 1e30", "weight"), ("--lrs 1e8 1e8 --loss cel --betas 0 10", "epoch 1, batch")],
)
def test_divergence_stops_the_run_and_says_where(cli, words, what):
    code, out, err = cli(
        QUICK, "--model MLP --T1 4 --T2 2 --epochs 3 --act tanh --wds 1e10 1e10", words
    )
    assert (
        code == 1
        and "epoch 1, batch" in err
        and what in err
        and "--lrs" in err
        and "Traceback" not in err
    )


def test_evaluate_uses_the_saved_run(ok, tmp_path):
    trained = ok(QUICK, "--model CNN --channels 3 4 --loss cel --softmax --T1 6 --T2 2 --save")
    run = only_run(tmp_path)
    # another architecture and loss on the command line change nothing, and T1 comes from the run
    for words in (
        f"--load-path {run}",
        f"--load-path {run}/ --model MLP --archi 784 9 10 --loss mse --channels 7 --T1 6",
    ):
        out = ok("--todo evaluate --device -1", words)
        assert "T1 = 6" in out
        assert (
            re.findall(r"test (\S+) %", trained)[-1] == re.findall(r"test accuracy (\S+) %", out)[0]
        )
    lines = (run / "hyperparameters.txt").read_text().splitlines()
    (written,) = [line for line in lines if line.startswith("evaluated")]  # the first one measured
    printed = out.strip().splitlines()[-1]
    assert printed.startswith(f"evaluated {run}/{written.removeprefix('evaluated ')} (recorded ")
    assert "T1 = 3" in ok(f"--todo evaluate --device -1 --load-path {run} --T1 3")


@pytest.mark.parametrize("line", [line for line in SEED_LINES if "'train'" in line])
def test_training_lines_of_the_seed(ok, tmp_path, cifar, line):
    program = {"main.py": main, "main_dropout.py": main_dropout}[shlex.split(line)[1]]
    out = ok(*shlex.split(line)[2:], SMALL, "--data-dir", str(cifar), flags=program.FLAGS)
    assert "epoch 1/1" in out and (only_run(tmp_path) / "final_model.pt").exists()


@pytest.mark.parametrize(
    "todo, said, file",
    [
        ("evaluate", "test accuracy", "hyperparameters.txt"),
        pytest.param("gducheck", "cosine", "gdu_overview.png", marks=pytest.mark.slow),
    ],
)
def test_the_lines_of_the_seed_that_examine_a_run(ok, tmp_path, cifar, todo, said, file):
    (examine,) = (line for line in SEED_LINES if f"'{todo}'" in line)
    ok(*shlex.split(SEED_LINES[0])[2:], SMALL, "--data-dir", str(cifar))
    only_run(tmp_path).rename(tmp_path / "results/test")
    out = ok(*shlex.split(examine)[2:], SMALL, "--data-dir", str(cifar))
    assert said in out and (tmp_path / "results/test" / file).exists()


def test_no_line_of_the_seed_is_left_out():
    kinds = [
        next(
            word
            for word in ("train", "evaluate", "gducheck", "attack")
            if f"--todo {word}" in line.replace("'", "")
        )
        for line in SEED_LINES
    ]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "train": 12,
        "evaluate": 1,
        "attack": 5,
        "gducheck": 1,
    }
