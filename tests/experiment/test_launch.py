"""How the program was started, and the device that it computes on: what the environment says, and
what it does not."""

import glob
import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT

TINY = "--task digits --archi 784 12 10 --T1 6 --T2 3 --betas 0 0.2 --train-size 40 --test-size 20 --seed 0"
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM", "OMPI", "PMI", "TORCHELASTIC", "MASTER_")


@pytest.fixture
def env(monkeypatch):
    """Sets variables of the environment, without those of any launcher that the tests themselves
    may run under."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


# ---- under torchrun, or not


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "4"},
        {"RANK": "7", "LOCAL_RANK": "3"},
        {"TORCHELASTIC_RUN_ID": "x"},
        {"TORCHELASTIC_RUN_ID": "x", "RANK": "1"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
        {"RANK": "nonsense"},
        {**TORCHRUN, "MASTER_PORT": ""},
        {"MASTER_ADDR": "x", "MASTER_PORT": "1", "RANK": "1", "WORLD_SIZE": "2"},
    ],
)
@pytest.mark.parametrize(
    "words, said",
    [
        ("--T1 0", "--T1: got '0'"),
        ("--todo evaluate", "--load-path"),
        ("--nonsense", "--nonsense"),
        ("--todo evaluate --load-path nowhere", "nowhere is no folder"),
    ],
)
def test_every_error_is_said_without_torchrun(cli, env, variables, words, said):
    env(**variables)
    code, _, err = cli("--device -1", words)
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert code == 2 and len(lines) == 1 and said in lines[0], err


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "1"},
        {"LOCAL_RANK": "1.5"},
        {"MASTER_PORT": "http"},
        {"MASTER_PORT": "70000"},
    ],
)
def test_a_contradiction_is_one_line(cli, env, wrong):
    env(**{**TORCHRUN, **wrong})
    code, out, err = cli(TINY, "--device -1")
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and next(iter(wrong)) in err
        and "torchrun" in err
    ), err


def test_an_early_error_is_said_once_under_torchrun(cli, env):
    env(**{**TORCHRUN, "WORLD_SIZE": "2"})
    assert "--T1" in cli("--T1 0")[2]
    env(RANK="1", LOCAL_RANK="1")
    assert cli("--T1 0") == (2, "", "")


# ---- several processes that know nothing of each other


@pytest.mark.parametrize(
    "variables, count",
    [
        ({"WORLD_SIZE": "4"}, 4),
        ({"RANK": "2", "WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}, 3),
        ({"SLURM_NPROCS": "3", "SLURM_PROCID": "2"}, 3),
        ({**TORCHRUN, "MASTER_ADDR": "", "WORLD_SIZE": "4"}, 4),
        (
            {
                "SLURM_NTASKS": "8",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_ID": "0",
            },
            2,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 2),
    ],
)
def test_processes_on_their_own_are_told_so(cli, env, variables, count):
    env(**variables)
    code, _, err = cli(TINY, "--device -1")
    assert code == 0 and err.count("note:") == err.count("\n") == 1, err
    assert f"{count} processes each train on their own" in err and "torchrun" in err


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"WORLD_SIZE": "many"},
        {"SLURM_NTASKS": "4"},
        TORCHRUN,
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # the script of sbatch --ntasks=4, which runs once
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "17"},
    ],
)
def test_one_process_is_told_nothing(cli, env, variables):
    env(**variables)
    code, _, err = cli(TINY, "--device -1")
    assert code == 0 and not err


def test_what_cannot_be_shared_is_to_be_started_once(cli, env):
    env(SLURM_NTASKS="4", SLURM_PROCID="1")
    code, _, err = cli(TINY, "--device -1 --todo gducheck")
    assert code == 0 and "4 processes" in err and "gducheck" in err and "nproc_per_node" not in err


# ---- devices


@pytest.fixture
def gpus(monkeypatch):
    """gpus(there=, seen=, available=): how many GPUs the machine has, how many of them torch sees,
    and whether it can use any."""

    def pretend(there, seen, available, warning=None):
        def is_available():
            if warning:
                warnings.warn(warning)
            return available

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: there)
        monkeypatch.setattr(glob, "glob", lambda *_, **__: [])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return pretend


def refused(cli, *words):
    code, out, err = cli(TINY, *words)
    assert code == 2 and not out and err.count("\n") == 1 and "--device -1" in err, err
    return err


def test_without_a_gpu_the_default_device_is_the_cpu(cli, gpus):
    gpus(there=-1, seen=0, available=False)
    for words in ("", "--device 0"):
        code, _, err = cli(TINY, words)
        assert code == 0 and err.count("\n") == 1 and "running on the CPU" in err


def test_without_a_gpu_another_device_is_refused(cli, gpus):
    gpus(there=0, seen=0, available=False)
    assert "--device: got 2" in refused(cli, "--device 2")


TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your "
    "GPU driver by downloading and installing a new version from the URL: http://www.nvidia.com (Triggered "
    "internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)


@pytest.mark.parametrize("seen", [0, 1])
def test_a_driver_that_is_too_old_is_named(cli, gpus, seen):
    gpus(there=1, seen=seen, available=False, warning=TOO_OLD)
    err = refused(cli)
    assert "driver on your system is too old (found version 11040)" in err and "http" not in err


def test_a_gpu_of_which_torch_knows_nothing_is_named(cli, gpus, monkeypatch):
    """There is a file of the device, and no library of the driver."""
    gpus(there=0, seen=0, available=False)
    monkeypatch.setattr(
        glob, "glob", lambda pattern, **_: ["/dev/nvidia0"] if pattern.startswith("/dev/nv") else []
    )
    assert "GPU of this machine cannot be used" in refused(cli)


def test_a_torch_without_cuda_is_named(cli, gpus, monkeypatch):
    gpus(there=1, seen=0, available=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in refused(cli)


@pytest.mark.parametrize("there, visible", [(2, "7"), (2, "abc"), (0, "abc"), (2, "NoDevFiles")])
def test_visible_devices_that_are_none_are_named(cli, gpus, monkeypatch, there, visible):
    gpus(there=there, seen=0, available=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"CUDA_VISIBLE_DEVICES={visible}" in refused(cli)


@pytest.mark.parametrize("visible", ["", " ", "-1"])
def test_hiding_all_gpus_asks_for_the_cpu(cli, gpus, monkeypatch, visible):
    gpus(there=2, seen=0, available=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, _, err = cli(TINY)
    assert code == 0 and err.count("\n") == 1 and "running on the CPU" in err


@pytest.mark.parametrize("visible", ["0", "NoDevFiles", "GPU-5d8b"])
def test_visible_devices_hide_nothing_where_there_is_none(cli, gpus, monkeypatch, visible):
    gpus(there=-1, seen=0, available=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cli(TINY)[0] == 0


def test_an_index_beyond_the_last_gpu_is_refused(cli, gpus):
    gpus(there=1, seen=1, available=True)
    assert "--device: got 3" in refused(cli, "--device 3")


@pytest.mark.parametrize("name", ["set_device", "zeros"])
def test_a_gpu_that_is_busy_is_named(cli, gpus, monkeypatch, name):
    gpus(there=1, seen=1, available=True)
    zeros = torch.zeros

    def busy(*sizes, device=None, **options):
        if name == "zeros" and (device is None or torch.device(device).type == "cpu"):
            return zeros(*sizes, device=device, **options)
        raise RuntimeError(
            "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be "
            "asynchronously reported\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
        )

    monkeypatch.setattr(
        torch.cuda, "set_device", busy if name == "set_device" else lambda device: None
    )
    monkeypatch.setattr(torch, "zeros", busy if name == "zeros" else zeros)
    err = refused(cli)
    assert "GPU 0" in err and "busy or unavailable" in err and "LAUNCH_BLOCKING" not in err


def test_training_on_the_cpu_leaves_a_gpu_alone(ok, gpus, monkeypatch):
    """Which may be in exclusive use by another process."""
    gpus(there=1, seen=1, available=True)

    def busy(*_):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "get_rng_state_all", busy)
    ok(TINY, "--device -1 --save")


def test_a_process_without_torchrun_says_its_error(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--T1", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--T1" in done.stderr
