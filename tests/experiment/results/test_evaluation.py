"""What a run leaves behind besides its models: config.json, predictions.csv, relaxations, their
records, TensorBoard."""

import csv
import importlib.util
import json
import math
import re
import sys
import types

import pytest
import torch
from conftest import only_run
from shared import records

import model_utils as mu
from energy import gdu
from experiment import inference
from experiment.plots.training import accuracy
from experiment.results.record import unpack
from experiment.results.store import Store
from experiment.runs.folder import RunFolder, fingerprint

DIGITS = "--task digits --device -1 --train-size 120 --mbs 30 --seed 3 "
MLP = DIGITS + "--archi 784 16 10 --T1 12 --lrs 0.1 0.05 --betas 0 0.5"


@pytest.fixture(scope="module", params=["MLP", "VFMLP"])
def trained(request, zoo, tmp_path_factory):
    """The run folder of a short training, in a folder of its own."""
    return zoo.copy(f"recorded {request.param}", tmp_path_factory.mktemp("run"))


def config(run):
    return json.loads((run / "config.json").read_text())


def saved_config(run):
    return torch.load(run / "checkpoint.tar", weights_only=True)["config"]


def columns(path):
    """{column: list of numbers} of a table with a comment `# t ...` that names its columns."""
    lines = path.read_text().splitlines()
    (names,) = [line.split()[1:] for line in lines if line.startswith("# t ")]
    rows = [list(map(float, line.split())) for line in lines if not line.startswith("#")]
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_config_json_is_every_argument_also_after_a_resumption(ok, tmp_path):
    ok(MLP, "--save --figures pdf")
    run = only_run(tmp_path)
    assert (
        config(run) == saved_config(run)
        and config(run)["T1"] == 12
        and config(run)["figures"] == "pdf"
    )
    assert (run / "train-test_acc.pdf").exists() and not list(run.glob("*.png"))
    ok(f"--device -1 --load-path {run} --T1 15 --epochs 2")
    assert (
        config(run) == saved_config(run) and config(run)["T1"] == 15 and config(run)["epochs"] == 2
    )
    assert config(run)["figures"] == "png" and (run / "train-test_acc.png").exists()


def test_the_training_plot_is_told_of_the_model_and_the_resumptions(ok, tmp_path, monkeypatch):
    told = []
    ok(MLP, "--save --val-size 20 --epochs 2")
    monkeypatch.setattr(
        RunFolder,
        "save_figure",
        lambda run, name, draw, *given: draw is accuracy and told.append(given),
    )
    ok(f"--device -1 --load-path {only_run(tmp_path)} --mbs 40")
    rows, picked, resumptions, chance, _ = told[-1]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and chance == 10
    assert picked == max(rows, key=lambda row: row["val_acc"])["epoch"]
    assert list(resumptions) == [3] and "--mbs 40 (until now 30)" in resumptions[3]


@pytest.mark.usefixtures("full_figures")
@pytest.mark.parametrize("more", ["", "--tol 0.001"])
def test_predictions_agree_with_the_printed_accuracy(ok, trained, more):
    out = ok(f"--todo evaluate --device -1 --save --load-path {trained} --test-size 90", more)
    rows = list(csv.DictReader(open(trained / "predictions.csv")))
    assert list(rows[0]) == ["image", "label", "prediction", "confidence", "steps", "model"]
    best = torch.load(trained / "model.pt", weights_only=True)
    assert {row["model"] for row in rows} == {
        f"model.pt@{best['epoch']}:{fingerprint(best['model_state_dict'])}"
    }
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert f"test accuracy {100 * right / 90:.2f} % (90 images" in out
    assert [int(row["image"]) for row in rows] == list(range(90))
    steps = [int(row["steps"]) for row in rows]
    if more:
        assert (
            f"{sum(steps) / 90:.1f} steps on average, {max(steps)} at most"
            in out.split("test accuracy")[1]
        )
    else:
        assert set(steps) == {12}
    cel = saved_config(trained)["loss"] == "cel"
    assert ("softmax probability" in out) == cel and ("value of the output neuron" in out) != cel
    assert all((0.1 if cel else 0) <= float(row["confidence"]) <= 1 for row in rows)
    assert (trained / "confusion.png").stat().st_size > 5000


def test_without_save_evaluate_keeps_no_predictions(ok, trained):
    (trained / "predictions.csv").unlink(missing_ok=True)
    ok(f"--todo evaluate --device -1 --load-path {trained} --test-size 20")
    assert not (trained / "predictions.csv").exists()


# ---- records


@pytest.fixture
def idle(monkeypatch):
    """Makes every computation of these commands fail the test."""
    for name in ("evaluate", "predict", "characteristic", "relaxation"):
        monkeypatch.setattr(inference, name, lambda *_: pytest.fail("it was computed again"))
    monkeypatch.setattr(gdu, "gdu_report", lambda *_, **__: pytest.fail("it was computed again"))


@pytest.mark.parametrize("more", ["", "--tol 0.001", "--T1 5"])
def test_evaluate_prints_again_what_it_measured(ok, request, zoo, tmp_path, more):
    run = zoo.copy("recorded MLP", tmp_path)
    words = f"--todo evaluate --device -1 --load-path {run} --test-size 90 {more}"
    first = ok(words)
    request.getfixturevalue("idle")
    when = records(run, "evaluate")[-1].when
    again = ok(words)
    assert again.replace(f" (recorded {when})", "") == first and again != first
    assert f"evaluated {run}/model.pt (epoch " in first
    assert len(records(run, "evaluate")) == 2
    assert (run / "hyperparameters.txt").read_text().count("evaluated model.pt") == 1


def test_evaluate_has_a_record_for_each_split(ok, tmp_path):
    ok(MLP, "--save --val-size 30")
    run = only_run(tmp_path)
    words = f"--todo evaluate --device -1 --load-path {run} --test-size 90"
    out = ok(words)
    found = {record.data["split"]: record for record in records(run, "evaluate")}
    assert {name: record.data["images"] for name, record in found.items()} == {
        "train": 90,
        "validation": 30,
        "test": 90,
    }
    for name, record in found.items():
        assert f"{name} accuracy {100 * record.value['accuracy']:.2f} %" in out
        assert record.model["chosen_on"] == "validation" and record.model["epoch"] == 1
    test = found["test"]
    assert unpack(test.value["outcomes"], 90).mean() == pytest.approx(test.value["accuracy"])
    assert f"{100 * test.model['converged']:.2f} % of 90 test images converged" in out
    ok(words, "--tol 0.01 --T1 7")
    *_, last = records(run, "evaluate")
    assert last.settings["tol"] == 0.01 and last.settings["predict_step"] == 7
    assert 1 <= last.value["steps_mean"] <= last.value["steps_max"] <= 7
    assert len(records(run, "evaluate")) == 6


def test_further_training_leaves_the_records_of_the_earlier_weights(ok, zoo, tmp_path):
    run = zoo.copy("recorded MLP", tmp_path)
    words = f"--device -1 --load-path {run / 'checkpoint.tar'} --test-size 40"
    for todo in ("evaluate", "characteristic", "gducheck --save"):
        ok(f"--todo {todo} {words}")
    before = Store(run).records
    ok(f"--device -1 --load-path {run}")
    for todo in ("evaluate", "characteristic", "gducheck --save"):
        ok(f"--todo {todo} {words}")
    after = Store(run).records
    assert after[: len(before)] == before and len(after) == 2 * len(before) == 8
    assert [record.model["epoch"] for record in after] == [2] * 4 + [3] * 4
    assert len({record.model["weights"] for record in after}) == 2


@pytest.mark.parametrize("name", ["recorded MLP", "recorded VFMLP"])
def test_characteristic_prints_again_what_it_measured(ok, request, zoo, tmp_path, name):
    run = zoo.copy(name, tmp_path)
    words = f"--todo characteristic --device -1 --load-path {run} --test-size 40"
    first = ok(words)
    table = (run / "Characteristic_Time.txt").read_text()
    ok(words, "--T1 5")
    assert (run / "Characteristic_Time.txt").read_text() != table
    (record, other) = records(run, "characteristic")
    assert record.settings["T1"] == 12 and other.settings["T1"] == 5
    assert record.model["converged"] == record.value["converged"][-1]
    assert (record.value["energy"] is None) == ("VF" in name)
    request.getfixturevalue("idle")
    assert ok(words) == first and (run / "Characteristic_Time.txt").read_text() == table


def test_values_that_are_not_finite_are_printed_again(ok, zoo, tmp_path, monkeypatch):
    run = zoo.copy("recorded MLP", tmp_path)
    words = f"--todo characteristic --device -1 --load-path {run} --test-size 40 --T1 2"
    with monkeypatch.context() as patch:
        patch.setattr(inference, "relaxation", lambda *_: ([math.inf, 0.5], [math.nan, 1.0]))
        first = ok(words)
    assert ok(words) == first
    assert columns(run / "Characteristic_Time.txt")["energy"][1] == 1


def test_gducheck_prints_again_what_it_measured(ok, request, zoo, tmp_path):
    run = zoo.copy("recorded MLP", tmp_path)
    words = f"--todo gducheck --device -1 --load-path {run} --thirdphase"
    without = ok(words)
    assert not records(run, "gducheck") and not (run / "gducheck.csv").exists()
    first = ok(words, "--save")
    assert without in first
    rows = (run / "gducheck.csv").read_text()
    assert ok(words, "--save") == first and (run / "gducheck.csv").read_text() == rows
    ok(words, "--save --betas 0 0.3")
    record, other = records(run, "gducheck")
    assert record.settings["betas"] == [0, 0.5] and other.settings["betas"] == [0, 0.3]
    assert record.data["images"] == 20 and record.value["verdict"] in first
    assert len(list(csv.DictReader(open(run / "gducheck.csv")))) == 2 * len(record.value["rows"])
    request.getfixturevalue("idle")
    assert ok(words) == without


def test_gducheck_of_a_new_model_has_a_record(ok, tmp_path):
    ok("--todo gducheck --save", MLP)
    (record,) = records(only_run(tmp_path), "gducheck")
    assert record.model["epoch"] == 0 and record.model["file"] == "checkpoint.tar"


@pytest.mark.usefixtures("full_figures")
def test_characteristic_has_the_residual_and_where_there_is_one_the_energy(ok, trained):
    ok(f"--todo characteristic --device -1 --load-path {trained} --test-size 40 --mbs 30 --T1 60")
    found, model = columns(trained / "Characteristic_Time.txt"), saved_config(trained)["model"]
    assert list(found) == ["t", "accuracy", "settled", "residual"] + ["energy"] * (model == "MLP")
    assert (
        found["residual"][0] == pytest.approx(1) and found["residual"][-1] < 1e-3
    )  # all of it is new, then settled
    assert (trained / "Characteristic_Energy.png").stat().st_size > 5000
    assert "of the first 30 of them" in (trained / "Characteristic_Time.txt").read_text()


def test_the_energy_is_phi_after_each_step_and_the_residual_its_change():
    torch.manual_seed(0)
    model, x = mu.P_MLP([20, 16, 5], mu.my_sigmoid).double(), torch.rand(4, 20).double()
    residual, energy = inference.relaxation(model, x, mu.Rule(T1=5))
    states = [model(x, T=t) for t in range(6)]
    criterion = mu.make_criterion("mse")
    assert energy == pytest.approx(
        [model.Phi(x, None, s, 0.0, criterion).mean().item() for s in states[1:]]
    )
    moved = [
        torch.stack([(b - a).norm(dim=1) / b.norm(dim=1) for a, b in zip(*pair)])
        .amax(0)
        .mean()
        .item()
        for pair in zip(states, states[1:])
    ]
    assert residual == pytest.approx(moved)
    assert inference.relaxation(mu.VF_MLP([20, 16, 5], mu.my_sigmoid), x, mu.Rule(T1=5))[1] is None


# ---- TensorBoard


@pytest.fixture
def writers(monkeypatch):
    """The package in a small copy that remembers what is asked of it: [writer, ...]."""
    made, find_spec = [], importlib.util.find_spec

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.flushed, self.closed = (
                folder,
                purge_step,
                [],
                0,
                False,
            )
            made.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def flush(self):
            self.flushed = len(self.scalars)

        def close(self):
            self.closed = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "tensorboard" or find_spec(name)
    )
    return made


def test_tensorboard_gets_the_numbers_of_every_epoch(ok, tmp_path, writers):
    ok(MLP, "--save --epochs 2 --tensorboard")
    run = only_run(tmp_path)
    ok(f"--device -1 --load-path {run} --tensorboard")
    ok(f"--device -1 --load-path {run}")  # each call for itself
    first, second = writers
    assert [w.folder.resolve() for w in writers] == [run / "tensorboard"] * 2
    assert (first.purge_step, second.purge_step) == (1, 3) and all(
        w.closed and w.flushed == len(w.scalars) for w in writers
    )
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    assert [s for s in first.scalars + second.scalars if s[0] == "test_acc"] == [
        ("test_acc", float(row["test_acc"]), int(row["epoch"])) for row in rows[:3]
    ]
    assert {s[0] for s in first.scalars} == set(rows[0]) - {"epoch"}


def test_without_the_package_tensorboard_is_refused_before_the_work(cli, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    code, out, err = cli(MLP, "--save --tensorboard")
    assert code == 2 and not out and not list(tmp_path.iterdir())
    assert re.fullmatch(r"main.py: error: argument --tensorboard: .* not installed.*\n", err)


def test_a_tensorboard_that_cannot_be_written_is_one_line(cli, writers, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["torch.utils.tensorboard"].SummaryWriter, "flush", full)
    code, _, err = cli(MLP, "--save --tensorboard")
    assert code == 1 and "tensorboard: no space left" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        DIGITS + "--figures pdf --tensorboard",
        "--todo gducheck " + DIGITS + "--figures pdf --archi 784 8 10 --T1 8",
    ],
)
def test_flags_of_what_is_not_written_say_so(cli, words):
    code, _, err = cli(words, "--archi 784 8 10 --T1 8")
    assert code == 0 and "--figures has no effect without --save" in err
    assert ("--tensorboard has no effect without --save" in err) == ("--tensorboard" in words)
