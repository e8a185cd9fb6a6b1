"""What only a GPU can show: the same numbers as on a CPU, nothing waits, a run goes on bit by bit.
Skipped without one; GPU_TESTS_ON_CPU=1 runs them on the CPU, which shows that they run."""

import contextlib
import json
import os
import re

import pytest
import torch
from conftest import MODELS, criterion_of, grads, only_run, rule, sample

import model_utils as mu
from ART_Timesteps_Addition.audit import stages
from energy.precision import set_precision
from experiment import inference
from experiment.devices import pick_device
from experiment.workers import Workers

ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason="there is no CUDA device"),
]
INDEX = -1 if ON_CPU else 0
TRAIN = (
    f"--task digits --device {INDEX} --seed 3 --deterministic --train-size 80 --test-size 40 --T1 8 --T2 3 "
    "--thirdphase --random-sign --model CNN --channels 4 6 --kernels 3 3 --pools mm --act my_hard_sig --loss cel "
    "--softmax"
)


@pytest.fixture(scope="module")
def device():
    set_precision("fp32")
    return pick_device(INDEX, Workers())


@contextlib.contextmanager
def no_waiting(device):
    """Within the block whatever makes the host wait for the GPU raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def close(ours, golden, tolerance):
    floor = 0.01 * max(g.norm() for g in golden.values())
    for name, g in golden.items():
        assert (ours[name].cpu() - g).norm() <= tolerance * max(g.norm(), floor), name


def test_golden_cases(case, golden_model, device):
    c, model = case["case"], golden_model.to(device)
    x, y, betas = case["x"].to(device), case["y"].to(device), c["betas"]
    free = model(x, y, None, c["T1"], betas[0], c["loss"])
    close(dict(enumerate(free)), dict(enumerate(case["free"])), 1e-4)
    nudged = model(x, y, [s.to(device) for s in case["free"]], c["T2"], betas[1], c["loss"])
    close(dict(enumerate(nudged)), dict(enumerate(case["nudged"])), 1e-4)
    states = ([s.to(device) for s in case[name]] for name in ("free", "nudged"))
    model.compute_syn_grads(x, y, *states, betas, c["loss"])
    close(grads(model), case["grad_one_sided"], 1e-2)
    mu.bptt_gradients(model, x, y, mu.Rule(T1=c["T1"], T2=c["T2"], loss=c["loss"]))
    close(grads(model), case["grad_bptt"], 1e-3)


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_cpus(name, schedule, device):
    torch.manual_seed(0)
    model, found = MODELS[name](mu.my_hard_sig if "CNN" in name else mu.my_sigmoid).double(), []
    x, y = sample(model)
    model.schedule, criterion = schedule, criterion_of(model)
    for place in (torch.device("cpu"), device):
        model.to(place)
        x, y, learns = x.to(place), y.to(place), rule(9, 4, criterion, thirdphase=True)
        with no_waiting(place):
            mu.ep_gradients(model, x, y, learns)
        found.append(list(grads(model).values()))
        mu.bptt_gradients(model, x, y, learns)
        found[-1] += grads(model).values()
        found[-1] += inference.predicting_neurons(model, x, rule(40, 4, criterion, tol=1e-4))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["MLP", "CNN max"])
def test_compiled_steps_are_the_plain_ones(name, device):
    if device.type == "cpu":
        pytest.skip("compiling takes long on a CPU, and is refused there")
    model = MODELS[name](mu.my_sigmoid).to(device)
    x, y = (t.to(device) for t in sample(model))
    for precision in ("fp32", "tf32"):  # whose products inductor asks about
        set_precision(precision)
        found = []
        for model.compiled in (False, True):
            mu.ep_gradients(model, x, y, rule(9, 4, criterion_of(model), thirdphase=True))
            found.append(grads(model))
        set_precision("fp32")
        for key, grad in found[0].items():
            torch.testing.assert_close(
                found[1][key], grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item()
            )


def test_a_run_goes_on_bit_by_bit_and_is_attacked_and_audited_as_on_a_cpu(
    ok, tmp_path, monkeypatch
):
    weights = []
    for name, parts in (("whole", ["--epochs 2"]), ("parts", ["--epochs 1", "--epochs 1"])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ok(TRAIN, parts[0], "--save")
        run = only_run(tmp_path / name)
        for part in parts[1:]:
            ok(f"--load-path {run} --device {INDEX} {part}")
        weights.append(torch.load(run / "checkpoint.tar", weights_only=True)["model_state_dict"])
    assert all(torch.equal(a, weights[1][key]) for key, a in weights[0].items())
    rows = []
    for seed, index in enumerate((INDEX, -1)):
        out = ok(
            f"--todo attack --load-path {run} --device {index} --test-size 40 --eps-list 0.5 --attack-iters 3 "
            f"--attack-step 4 --seed {seed}"
        )
        rows.append(float(re.search(r"adversarial accuracy (\S+) %", out).group(1)))
    assert abs(rows[0] - rows[1]) <= 5
    line = f"--todo audit --load-path {run} --attack-norm 2 --eps 0.5 --budget quick --test-size 12 --attack-step 4"
    monkeypatch.setitem(stages.BUDGETS, "quick", stages.Budget(5, 2, 20, 30, 5, 1, 4))
    audits = [
        ok(line, f"--device {index} --seed {seed}")
        and json.loads((run / "Audit_2_0.5.json").read_text())
        for seed, index in enumerate((INDEX, -1))
    ]  # of one seed the second would be the first's
    assert (
        abs(audits[0]["robust"] - audits[1]["robust"]) <= 1.01 / 12
        and audits[0]["clean"] == audits[1]["clean"]
    )
