"""Whether images have converged: one meaning, over all images that count, in every place that
reports it."""

import csv
import pathlib
import re
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import ZOO, criterion_of, only_run, sample

import model_utils as mu
from ART_Timesteps_Addition.pgd import Adversary
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from data_utils import TASKS, Batches, load_split
from energy.dynamics import WINDOW
from experiment import inference
from experiment.results.evaluation import describe_characteristic
from experiment.results.record import Record
from experiment.runs.folder import RunFolder

TINY = ZOO["converging"]
CNN = " --model CNN --channels 4 6 --act my_hard_sig --T1 13"
ADVICE = "EP and predictions assume convergence; increase --T1"


def column(run):
    return [row["converged"] for row in csv.DictReader(open(run / "metrics.csv"))]


def batches(n=50, train=False, last=None):
    images, labels = load_split("digits", "", train, n)
    part = slice(None) if last is None else slice(-last, None)
    return Batches(images[part], labels[part], 20, TASKS["digits"], torch.device("cpu"))


def share(model, T1, data, loss="mse"):
    """The share of images in % whose every layer the last min(5, T1) of T1 steps change by less
    than 1e-4 of its norm, from two free phases."""
    found = []
    for x, _ in data:
        before, after = (model(x, T=T, criterion=loss) for T in (T1 - min(5, T1), T1))
        found += [
            all((b[i] - a[i]).norm() < 1e-4 * b[i].norm() for a, b in zip(before, after))
            for i in range(len(x))
        ]
    return 100 * np.mean(found)


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    """A run folder to look at, of a network some of whose test images have converged."""
    return zoo.copy("converging", tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--T1 3",
        "--tol 0.5",
        CNN,
        "--val-size 30",
        "--schedule async --T1 14",
        "--alg BPTT --T1 22",
    ],
)
def test_an_epoch_reports_the_network_after_it_on_all_images_that_choose_the_model(
    ok, tmp_path, words
):
    out = ok(TINY, words, "--epochs 2")
    run = only_run(tmp_path)
    last = mu.load_run(run / "final_model.pt", "cpu")
    data = batches(60, True, 30) if "val" in words else batches()
    expected = share(last.model, last.args.T1, data)
    assert float(column(run)[-1]) == pytest.approx(expected, abs=1e-3)
    (line,) = (line for line in out.splitlines() if line.startswith("epoch 2/2"))
    assert f", {expected:.2f} % converged" in line


def test_what_counts_is_the_network_after_the_epoch(ok, tmp_path):
    """Whose only epoch takes it far away from the first one."""
    shares = {}
    for lrs in ("0 0 0", "2 2 2"):
        out = ok(TINY, CNN, "--lrs", lrs)
        run = pathlib.Path(re.search("results go to (.*)", out)[1])
        (shares[lrs],) = column(run)
        model = mu.load_run(run / "final_model.pt", "cpu").model
        assert float(shares[lrs]) == pytest.approx(share(model, 13, batches()), abs=1e-3)
        assert ("not converged" in out) == (float(shares[lrs]) < 95)
    assert len(set(shares.values())) == 2


def test_a_warning_counts_the_images_and_is_printed_once(ok):
    out = ok(TINY, "--T1 2 --epochs 2")
    assert (
        out.count(f"  warning: not converged after T1 = 2 steps: 50 of 50 images. {ADVICE}\n") == 1
    )
    assert out.count("0.00 % converged") == 3  # of both epochs, and of the best model
    out = ok(TINY, "--T1 200")
    assert "100.00 % converged" in out and "not converged" not in out and "settled" not in out


def test_every_command_reports_the_same_share_of_the_same_images(ok, trained):
    model = mu.load_run(trained, "cpu").model
    for T1 in (2, 19, 200):
        expected, load = share(model, T1, batches()), f"--device -1 --load-path {trained} --T1 {T1}"
        evaluated = ok("--todo evaluate", load)
        assert f", {expected:.2f} % of 50 test images converged" in evaluated
        characteristic = ok("--todo characteristic", load)
        assert f"; {expected:.2f} % converged" in characteristic
        attacked = ok("--todo attack --eps-list 0.1 --attack-iters 1 --attack-step 2", load)
        assert f"after {T1} steps ({expected:.2f} % of 50 images converged)" in attacked
        assert f"{expected:.2f} % of 50 test images converged" in ok(
            "--todo evaluate --tol 0.5 --save", load
        )
        moving = round(50 - expected / 2)
        for out in (evaluated, attacked):
            warning = (
                f"warning: not converged after T1 = {T1} steps: {moving} of 50 images. {ADVICE}"
            )
            assert (warning in out) == (expected < 95)
    assert 0 < share(model, 19, batches()) < 95
    x = torch.cat([x for x, _ in batches(20, True)])
    for T1 in (2, 200):
        here = share(model, T1, [(x, None)])
        assert f"{round(here / 5)} of them have converged" in ok(
            f"--todo gducheck --device -1 --T1 {T1} --load-path", trained
        )


def test_the_warning_of_an_attack_names_the_flag_that_gave_its_steps(ok, trained):
    out = ok(
        "--todo attack --eps-list 0.1 --attack-iters 1 --attack-step 2 --predict-step 2 --device -1 --load-path",
        trained,
    )
    assert (
        "not converged after predict-step = 2 steps: 50 of 50 images" in out
        and "increase --predict-step" in out
    )


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("T1", [1, 4, 5, 6, 20])
def test_counting_converged_images_changes_no_prediction(model, schedule, T1):
    """Bit for bit, in float32 as predictions are made."""
    model.float().schedule = schedule
    (x, _), rule = sample(model, 7), mu.Rule(T1=T1, loss=mu.loss_name(criterion_of(model)))
    count = inference.Convergence(model, T1)
    outputs = [
        model.readout(inference.predicting_neurons(model, x, rule, convergence=c))
        for c in (None, count)
    ]
    assert torch.equal(*outputs) and count.images == 7
    assert count.percent == pytest.approx(share(model, T1, [(x, None)], rule.loss))


def test_in_bf16_convergence_is_that_of_the_fp32_network(ok, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "experiment.devices.validate_device", lambda *_: None
    )  # a CPU computes in bf16 as well
    ok(TINY, "--precision bf16 --epochs 2")
    run = only_run(tmp_path)
    expected = share(mu.load_run(run / "final_model.pt", "cpu").model, 20, batches())
    assert float(column(run)[-1]) == pytest.approx(expected, abs=1e-3) and 0 < expected < 100
    load = f"--precision bf16 --device -1 --load-path {run / 'final_model.pt'}"
    assert f"{expected:.2f} % of 50 test images converged" in ok("--todo evaluate", load)
    assert f"{expected:.2f} % converged" in ok("--todo characteristic", load)


def test_a_history_without_the_column_resumes(ok, tmp_path):
    ok(TINY, "--T1 200")
    run = only_run(tmp_path)
    for name in ("checkpoint.tar", "model.pt"):
        state = torch.load(run / name, weights_only=True)
        for part in (state, state.get("best_model") or state):
            for row in part["history"]:
                row.pop("converged", None)
        torch.save(state, run / name)
    ok(f"--device -1 --load-path {run}")
    assert column(run) == ["", "100.0"]
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,train_acc,test_acc,seconds,converged"


def test_attacks_in_training_end_early_by_the_same_five_steps():
    torch.manual_seed(0)
    model, (x, y) = (
        mu.P_MLP([784, 20, 10], mu.my_sigmoid),
        (torch.rand(6, 1, 28, 28), torch.randint(10, (6,))),
    )
    unit = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    found = [
        Adversary(
            Attack("pgd", "2", 2.0, 2), GradientMethod("ep", 4, tol=tol), "mse", T1, *unit
        ).perturb(model, x, y, torch.zeros_like(x))
        for T1, tol in ((30, 1e9), (5, 0.0), (2, 0.0))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


# ---- characteristic


def table(run):
    return np.loadtxt(run / "Characteristic_Time.txt")


def test_characteristic_counts_by_the_last_five_steps_whatever_tol_is(cli, trained):
    code, _, err = cli(f"--todo characteristic --device -1 --tol 10 --T1 25 --load-path {trained}")
    assert code == 0 and "--tol has no effect on characteristic" in err
    model = mu.load_run(trained, "cpu").model
    assert table(trained)[:, 2] * 100 == pytest.approx(
        [share(model, t, batches()) for t in range(1, 26)], abs=1e-3
    )
    assert (
        "last min(5, t) steps is below 0.0001" in (trained / "Characteristic_Time.txt").read_text()
    )


def test_characteristic_keeps_no_more_states_than_convergence_needs(monkeypatch):
    alive, most = weakref.WeakSet(), []
    trajectory = inference.trajectory

    def counted(*args):
        for neurons in trajectory(*args):
            alive.update(neurons)
            most.append(len(alive) / len(neurons))
            yield neurons

    monkeypatch.setattr(inference, "trajectory", counted)
    model = mu.P_MLP([20, 8, 5], torch.tanh)
    x, y = sample(model)
    data = types.SimpleNamespace(labels=y, samples=len(y))
    monkeypatch.setattr(inference, "progress", lambda *_: [(x, y)])
    inference.characteristic(model, data, mu.Rule(T1=60))
    assert max(most) <= WINDOW + 3


@pytest.mark.parametrize(
    "accuracy, step",
    [
        ([0.1, 0.58, 0.63, 0.61, 0.58, 0.5805, 0.5795, 0.58], 5),
        ([0.58, 0.5805, 0.5795], 1),
        ([0.1, 0.2, 0.3], 3),
        ([0.3], 1),
    ],
)
def test_characteristic_reports_the_step_from_which_the_accuracy_stays(tmp_path, accuracy, step):
    value = {"accuracy": accuracy, "converged": [1.0] * len(accuracy)}
    record = Record("characteristic", {}, {"images": 50}, {}, value)
    text = describe_characteristic(RunFolder(tmp_path), "model.pt", record)
    assert f"within 0.1 points of it from step {step} on" in text
