"""Devices and seeds: choose the GPU or CPU of this process, and seed everything random."""

import functools
import glob
import os
import random
import re
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_utils import UserError
from experiment.config import Config
from experiment.text import count
from experiment.workers import Workers

USE_CPU = "--device -1 runs on the CPU"
LEAST_CAPABILITY = (8, 0)  # of a GPU for tf32 and bf16


def pick_device(index: int, workers: Workers) -> torch.device:
    """The device of --device: -1 is the CPU, else that GPU, made the current one; under torchrun
    the GPU of the worker's local rank.

    Without an NVIDIA device, or with CUDA_VISIBLE_DEVICES empty, index 0 is the CPU
    (`validate_device` prints a note). Raises UserError, with the cause, if the GPU exists and
    cannot be used."""
    if index == -1:
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:  # torch warns of the cause
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        cause = _why_unusable(caught)
        if cause:
            raise UserError(f"argument --device: {cause}; {USE_CPU}")
        if index > 0 and not _hides_all_gpus():
            raise UserError(
                f"argument --device: got {index}, there is no CUDA device here; {USE_CPU}"
            )
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if workers.size > 1:
        index = workers.local_rank
        if index >= gpus:
            raise UserError(
                f"torchrun --nproc_per_node: each process needs a GPU, this machine has {gpus} "
                "(--device -1: the CPU)"
            )
    if index >= gpus:
        raise UserError(
            f"argument --device: got {index}, the GPUs of this machine are 0 to {gpus - 1}; "
            f"{USE_CPU}"
        )
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)  # events and streams are the current device's
        torch.zeros(1, device=device).add_(1).item()
    except Exception as e:  # its type depends on the cause: exclusive use, memory, support
        raise UserError(
            f"argument --device: GPU {index} cannot be used: {_first_sentence(e)}; {USE_CPU}"
        ) from None
    return device


def _hides_all_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides every GPU, the usual way to ask for the CPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _why_unusable(caught: Sequence[Any]) -> str | None:
    """The reason why torch cannot use a GPU of this machine; None if there is none, or
    CUDA_VISIBLE_DEVICES hides them all. caught: the warnings of torch.cuda.is_available."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_all_gpus():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visible_count = torch.cuda.device_count()
        try:  # this count includes those that CUDA_VISIBLE_DEVICES hides
            physical_count = torch.cuda._raw_device_count_nvml()
        except (OSError, AttributeError):  # no driver
            physical_count = 0
    exists = max(visible_count, physical_count) > 0 or bool(glob.glob("/dev/nvidia[0-9]*"))
    if visible:
        # indices, UUIDs of GPUs or of MIG instances, and what Slurm writes for none
        name = r"\d+|(GPU|MIG)-[\w/-]+|NoDevFiles"
        well_formed = all(re.fullmatch(name, part.strip()) for part in visible.split(","))
        if not well_formed or (exists and not visible_count):
            return f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine"
    if not exists:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "there is a GPU, but this PyTorch was built without CUDA"
    unusable = "the GPU of this machine cannot be used"
    if caught:
        return f"{unusable}: {_first_sentence(caught[0].message)}"
    try:
        torch.cuda.init()
    except Exception as e:
        return f"{unusable}: {_first_sentence(e)}"
    return f"{unusable}: torch.cuda.is_available() is False"


def _first_sentence(error: object) -> str:
    """The cause in an error or warning of CUDA, without its advice."""
    text = str(error).partition("\n")[0]
    text = re.sub(r"\. (Please|Alternatively)\b.*|\(Triggered internally.*", "", text)
    return text.removeprefix("CUDA initialization: ")[:300].rstrip(" .")


def validate_device(config: Config, device: torch.device) -> None:
    """Validate --compile and --precision for the device. Raises UserError. Prints a note if a GPU
    was requested and there is none."""
    session = config.session
    if device.type == "cpu" and session.device != -1:
        _note_missing_gpu()
    if session.compile and device.type != "cuda":
        raise UserError(
            "argument --compile: needs a CUDA device; on a CPU compiled steps are no faster"
        )
    if session.precision == "fp32":
        return
    got = f"argument --precision: {session.precision} needs"
    if device.type != "cuda":
        raise UserError(f"{got} a CUDA device, this one computes in fp32; give --precision fp32")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        found = ".".join(map(str, capability))
        raise UserError(
            f"{got} a GPU of compute capability {least}, {torch.cuda.get_device_name(device)} has "
            f"{found}; give --precision fp32"
        )


@functools.cache  # once per process, which may do many tasks
def _note_missing_gpu() -> None:
    print(
        "note: no CUDA device found, running on the CPU (use --device -1 to silence this note)",
        file=sys.stderr,
    )


def seed_everything(config: Config, workers: Workers) -> Config:
    """Seed Python, NumPy and torch, and return the config with the seed, drawn if it is None. With
    --deterministic, ask torch for kernels that always sum in the same order."""
    seed = config.session.seed
    if seed is None:
        seed = workers.broadcast(random.SystemRandom().randrange(2**31))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.session.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.session.deterministic)
    return config.replace(seed=seed)


def computed_on() -> str:
    """The host name and the number of torch's threads, recorded with results."""
    return f"{socket.gethostname()}, {count(torch.get_num_threads(), 'thread')}"
