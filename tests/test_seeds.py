"""--seeds: one run after another, found again when the command is rerun."""
import pathlib
import statistics

import pytest
import torch
from test_resume import final_weights

from experiment.files import Lock

TINY = ("--task digits --device -1 --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 --archi 784 8 10 --lrs 0.1 "
        "0.1 --save")


def folders():
    return sorted(path.parent for path in pathlib.Path("results").rglob("checkpoint.tar"))


def states():
    return {state["config"]["seed"]: state
            for state in (torch.load(path / "checkpoint.tar", weights_only=True) for path in folders())}


def test_each_seed_is_trained_once_and_pooled(ok):
    out = ok(TINY, "--seeds 3 4 --epochs 2")
    assert set(states()) == {3, 4} and len(folders()) == 2
    values = [max(row["test_acc"] for row in state["history"]) for _, state in sorted(states().items())]
    last = out.splitlines()[-1]
    assert "2 of 2 seeds are done" in last
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} (2) %" in last
    text = (folders()[0] / "hyperparameters.txt").read_text()
    assert "--seeds" not in text.splitlines()[0] and "--seed " in text.splitlines()[0]
    again = ok(TINY, "--seeds 3 4 --epochs 2")
    assert again.splitlines()[-1] == last and again.count("already") == 2 and len(folders()) == 2
    ok(TINY, "--seeds 3 4 5 --epochs 2 --T1 5")
    assert len(folders()) == 5, "other arguments are other runs"
    assert not list(pathlib.Path("results").rglob(".seed*"))


def test_what_was_begun_goes_on_as_if_it_had_not_stopped(ok, tmp_path, monkeypatch):
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for epochs in parts:
            out = ok(TINY, f"--seeds 3 --epochs {epochs}")
    assert "from epoch 2 on" in out and [state["epoch"] for state in states().values()] == [3]
    run, = folders()
    whole = final_weights(next((tmp_path / "whole").rglob("final_model.pt")).parent)
    assert all(torch.equal(value, final_weights(run)[key]) for key, value in whole.items())


def test_a_seed_that_another_process_trains_is_left_to_it(cli, monkeypatch):
    from experiment import seeds
    held = []

    class Held(Lock):
        def __init__(self, folder):
            if ".seed_3_" in str(folder):
                held.append(folder)
                from data_utils import UserError
                raise UserError("is being trained already")
            super().__init__(folder)
    monkeypatch.setattr(seeds, "Lock", Held)
    code, out, err = cli(TINY, "--seeds 3 4")
    assert code == 0 and held and set(states()) == {4} and "seed 3 is left to another process" in err
    assert "1 of 2 seeds are done" in out


@pytest.mark.parametrize("words, message", [
    (f"{TINY} --seeds 1 --seed 2", "neither --seed nor --load-path"),
    ((TINY + " --seeds 1").replace("--save", ""), "needs --save"),
    (f"{TINY} --seeds x", "argument --seeds"),
])
def test_what_makes_no_sense_is_refused(cli, words, message):
    code, _, err = cli(words)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_a_failure_ends_the_series(cli):
    code, _, err = cli(TINY, "--seeds 1 2 --data-dir none --task MNIST")
    assert code == 2 and err.count("error") == 1
