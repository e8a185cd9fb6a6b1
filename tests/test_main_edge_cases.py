"""What an enemy's reading found: resumed sessions, tables that two processes write, files that are
not what they say."""

import itertools
import shutil
import types

import pytest
import torch
from conftest import ZOO, only_run

import model_utils as mu
from data_utils import UserError
from experiment.config import Config
from experiment.plots import attacks, style
from experiment.results.audit import surrogate_identity
from experiment.results.settings import audit
from experiment.runs import resume

TINY = ZOO["tiny"]


def test_the_resume_line_has_what_no_epoch_has_yet(zoo, tmp_path):
    run = zoo.copy("tiny", tmp_path)
    given = {"device": -1, "T1": 9, "betas": [0.0, 0.5], "epochs": 3, "precision": "fp32"}
    job = types.SimpleNamespace(
        config=Config().replace(epochs=3), given=given, saved=True, program=["main.py"]
    )
    line = resume.how_to_resume(job, str(run), 1)
    for words in ("--T1 9", "--betas 0.0 0.5", "--device -1", "--precision fp32", "--epochs 3"):
        assert words in line
    line = resume.how_to_resume(job, str(run), 0)  # one epoch of the session is there
    assert "--T1" not in line and "--device -1" in line and "--epochs 2" in line
    job.config = Config().replace(epochs=1)
    assert "resume with" not in resume.how_to_resume(job, str(run), 0)


def test_a_resumption_without_an_epoch_leaves_no_trace(ok, cli, zoo, tmp_path, monkeypatch):
    run = zoo.copy("tiny", tmp_path)
    before = [(run / name).read_text() for name in ("hyperparameters.txt", "config.json")]
    with monkeypatch.context() as patch:
        patch.setattr(mu, "train", lambda *_, **__: None)
        ok(f"--device -1 --load-path {run} --T1 9")
    assert before == [(run / name).read_text() for name in ("hyperparameters.txt", "config.json")]
    ok(f"--device -1 --load-path {run} --T1 9")
    assert "T1: 9  # before: 8" in (run / "hyperparameters.txt").read_text()
    assert '"T1": 9' in (run / "config.json").read_text()


@pytest.mark.parametrize("eps", ["1e-320", "1e-30", "1e300", "1e-300/3", "-1"])
def test_no_attack_has_a_bound_that_is_no_number_of_float32(ok, cli, tmp_path, eps):
    for words in ("--todo attack --eps-list 0.5", "--todo audit --eps", "--adv-train"):
        code, _, err = cli(words, eps, "--load-path nowhere")
        assert code == 2 and err.count("\n") == 1
        assert f"got '{eps}', expected 0, or a number from 1e-09 to 1e+09" in err
        assert "(or a fraction such as 8/255)" in err


def test_audits_with_another_surrogate_or_end_are_other_audits():
    config = Config().replace(eps=0.1)
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    surrogates = [surrogate_identity(model, config.replace(T1=3)) for model in models]
    surrogates.append(surrogate_identity(models[0], config.replace(T1=4)))
    found = [audit(config, 1e-3, surrogate) for surrogate in (None, *surrogates)]
    found.append(audit(config, 0.0))
    assert all(one != other for one, other in itertools.combinations(found, 2))
    assert None not in [value for one in found for value in one.values()]


def test_what_a_run_held_out_stays_held_out(ok, cli, zoo, tmp_path):
    run = zoo.copy("tiny", tmp_path)
    _, out, err = cli(f"--todo evaluate --device -1 --load-path {run} --val-size 20")
    assert "validation" not in out and "the saved run determines --val-size" in err
    ok(f"--device -1 --load-path {run} --val-size 20")
    assert "val_acc" not in (run / "metrics.csv").read_text()
    shutil.rmtree(tmp_path / "results")
    ok(TINY, "--val-size 20")
    run = only_run(tmp_path)
    for todo in ("train", "evaluate"):
        code, _, err = cli(f"--todo {todo} --device -1 --load-path {run} --train-size 40")
        assert code == 2 and "--train-size: got 40, this run holds out the last 20 of 60" in err


@pytest.mark.parametrize("value", ["abc", float("nan"), 101.0, None])
def test_a_crafted_validation_accuracy_is_one_line(ok, cli, tmp_path, value):
    ok(TINY, "--val-size 20")
    run = only_run(tmp_path)
    state = torch.load(run / "checkpoint.tar", weights_only=True)
    state["history"][0]["val_acc"] = value
    torch.save(state, run / "checkpoint.tar")
    for words in (f"--load-path {run}", f"--todo evaluate --load-path {run / 'checkpoint.tar'}"):
        code, _, err = cli("--device -1", words)
        assert code == 2 and err.count("\n") == 1 and "val_acc of epoch 1" in err


def test_no_file_undoes_the_epochs_of_its_run(ok, cli, zoo, tmp_path):
    run = zoo.copy("tiny", tmp_path)
    shutil.copy(run / "checkpoint.tar", run / "early.tar")
    ok(f"--device -1 --load-path {run}")
    kept = (run / "checkpoint.tar").read_bytes()
    code, _, err = cli(f"--device -1 --load-path {run / 'early.tar'}")
    assert (
        code == 2
        and "which would be overwritten" in err
        and (run / "checkpoint.tar").read_bytes() == kept
    )
    assert not list(run.glob(".*lock"))
    ok(f"--device -1 --load-path {run / 'final_checkpoint.tar'}")  # which is the latest


def test_a_crafted_run_is_refused_from_python(zoo, tmp_path):
    run = zoo.copy("tiny", tmp_path)
    state = torch.load(run / "model.pt", weights_only=True)
    state["config"]["archi"] = [100, 8, 10]
    torch.save(state, run / "model.pt")
    with pytest.raises(UserError, match="--archi"):
        mu.load_run(run)


def test_no_text_from_outside_is_a_formula(tmp_path):
    row = {"eps": "0.1", "grad": "$\\foo$", "adversarial": "0.5", "masked": "0"}
    figure = attacks.sweep([row], "pgd", "2", 10, 0.9)
    with style.style():
        figure.savefig(tmp_path / "a.png")
