"""--seeds: one run after another, found again when the command is rerun."""

import errno
import json
import pathlib
import shutil
import statistics
import time

import pytest
import torch
from shared import final_weights, start, write_mnist

TINY = (
    "--task digits --device -1 --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 --archi 784 8 10 --lrs 0.1 "
    "0.1 --save"
)


def folders():
    return sorted(path.parent for path in pathlib.Path("results").rglob("checkpoint.tar"))


def states():
    return {
        state["config"]["seed"]: state
        for state in (torch.load(path / "checkpoint.tar", weights_only=True) for path in folders())
    }


def test_each_seed_is_trained_once_and_pooled(ok):
    out = ok(TINY, "--seeds 3 4 --epochs 2")
    assert set(states()) == {3, 4} and len(folders()) == 2
    values = [
        max(row["test_acc"] for row in state["history"]) for _, state in sorted(states().items())
    ]
    mean, next_words = out.splitlines()[-2:]
    assert "2 of 2 seeds are done" in mean and out.count("best model: ") == 2
    assert f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} % (2 seeds)" in mean
    words = next_words.partition(": ")[2]
    assert words.startswith("--load-path ") and words.split()[1:] == list(map(str, folders()))
    assert ok("--todo evaluate --device -1", words).count("/model.pt (epoch ") == 2
    text = (folders()[0] / "hyperparameters.txt").read_text()
    assert "--seeds" not in text.splitlines()[0] and "--seed " in text.splitlines()[0]
    again = ok(TINY, "--seeds 3 4 --epochs 2")
    assert again.splitlines()[-2:] == [mean, next_words]
    assert again.count("already") == 2 and len(folders()) == 2
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
    (run,) = folders()
    whole = final_weights(next((tmp_path / "whole").rglob("final_model.pt")).parent)
    assert all(torch.equal(value, final_weights(run)[key]) for key, value in whole.items())


def test_a_seed_that_another_process_trains_is_left_to_it(cli, tmp_path):
    process = start(tmp_path, TINY + " --T1 2000 --epochs 500 --seeds 3")
    while not list(tmp_path.glob("results/*/*/*/[!.]*/checkpoint.tar")):
        time.sleep(0.01)
    code, out, err = cli(TINY, "--T1 2000 --seeds 3 4")
    trained = states()
    process.kill()
    process.join()
    assert code == 0 and set(trained) == {3, 4} and trained[4]["epoch"] == 1
    assert f"seed 3 is left to another process, which trains it: process {process.pid} on" in err
    assert "1 of 2 seeds are done" in out
    left = states()[3]["epoch"]  # the killed process may have trained on meanwhile
    assert (
        cli(TINY, f"--T1 2000 --seeds 3 --epochs {left + 1}")[0] == 0
        and states()[3]["epoch"] > left
    )
    assert not list(pathlib.Path("results").rglob(".*"))


def test_a_claim_that_fails_trains_nothing(cli, monkeypatch):
    def refused(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fcntl.flock", refused)
    code, _, err = cli(TINY, "--seeds 3 4")
    assert code == 2 and err.count("\n") == 1 and "Permission denied" in err and not folders()


def test_without_locks_a_claim_that_a_killed_process_left_is_named(cli, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    cli(TINY, "--seeds 3")
    monkeypatch.setattr("fcntl.flock", unsupported)
    code, _, err = cli(TINY, "--seeds 3 4")
    claim = err.split("delete ")[1].split(" in its folder")[0]
    assert code == 0 and set(states()) == {3, 4} and not list(pathlib.Path("results").rglob(".*"))
    claim = pathlib.Path("results/EP/mse", claim)
    claim.write_text("process 1 on elsewhere, without locks")
    code, out, err = cli(TINY, "--seeds 3 4 --epochs 2")
    assert (
        code == 0 and "process 1 on elsewhere" in err and f"if it has ended, delete {claim}" in err
    )
    assert {seed: state["epoch"] for seed, state in states().items()} == {3: 1, 4: 2}
    assert "1 of 2 seeds are done" in out


def test_data_that_have_moved_are_read_where_they_are_now(ok, tmp_path):
    line = (
        TINY.replace("digits", "MNIST").replace("40", "15").replace("--mbs 20", "--mbs 5")
        + " --seeds 3"
    )
    write_mnist(tmp_path / "before")
    ok(line, "--data-dir before")
    (tmp_path / "before").rename(tmp_path / "now")
    ok(line, "--data-dir now --epochs 2")
    (state,) = states().values()
    assert state["epoch"] == 2 and state["config"]["data_dir"] == "now"
    assert (
        "data_dir: 'now'  # before: 'before'" in (folders()[0] / "hyperparameters.txt").read_text()
    )
    ok(line, "--epochs 3")
    assert states()[3]["config"]["data_dir"] == "now"


def test_a_longer_run_is_left_out_and_its_seed_trained_anew(cli, ok):
    ok(TINY, "--seeds 3 --epochs 3")
    (longer,) = folders()
    for note in (f"note: {longer} is left out: it has 3 epochs, not 2\n", ""):
        code, out, err = cli(TINY, "--seeds 3 4 --epochs 2")
        assert code == 0 and err == note and "2 of 2 seeds are done" in out
        assert str(longer) not in out.splitlines()[-1].split() and len(folders()) == 3
    for run in folders():
        shutil.rmtree(run)
    ok(TINY, "--seeds 3 --epochs 1")
    ok(TINY, "--seed 3 --epochs 3")
    out = ok(TINY, "--seeds 3 --epochs 2")
    assert "from epoch 2 on" in out and "1 of 1 seeds are done" in out and "left out" not in out


@pytest.mark.parametrize("name", ["checkpoint.tar", "metrics.csv", "Adversarial_Accuracy.csv"])
def test_a_run_counts_whatever_has_become_of_files_beside_its_model(ok, name):
    before = ok(TINY, "--seeds 3 --epochs 2")
    (run,) = folders()
    if name == "Adversarial_Accuracy.csv":
        (run / name).mkdir()
        (run / "Adversarial_Accuracy.txt").write_text("# settings: {}")
    else:
        (run / name).write_bytes(b"\x80 is no beginning")
    again = ok(TINY, "--seeds 3 --epochs 2")
    assert again.splitlines()[-1] == before.splitlines()[-1] and len(folders()) == 1


def test_a_run_that_cannot_be_read_is_named(cli):
    cli(TINY, "--seeds 3 4")
    of = {json.loads((path / "config.json").read_text())["seed"]: path for path in folders()}
    (of[3] / "checkpoint.tar").write_bytes(b"")
    (of[3] / "final_checkpoint.tar").unlink()
    (of[4] / "model.pt").write_bytes(b"")
    code, out, err = cli(TINY, "--seeds 3 4")
    assert code == 0 and len(folders()) == 3 and "1 of 2 seeds are done" in out
    assert err.splitlines() == [
        f"note: {of[3]} is left out: {of[3] / 'checkpoint.tar'} cannot be loaded: it is empty",
        f"note: {of[4]} is left out of the mean: {of[4] / 'model.pt'} cannot be loaded: it is empty",
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (f"{TINY} --seeds 1 --seed 2", "neither --seed nor --load-path"),
        ((TINY + " --seeds 1").replace("--save", ""), "needs --save"),
        (f"{TINY} --seeds x", "argument --seeds"),
    ],
)
def test_what_makes_no_sense_is_refused(cli, words, message):
    code, _, err = cli(words)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_folders_are_typed_for_a_shell(ok):
    out = ok(TINY, "--seeds 3 --run-dir", pathlib.Path("two words"))
    assert out.splitlines()[-1].endswith("--load-path 'two words/seed_3'")


def test_a_run_that_was_half_trained_with_other_settings_is_left_out(cli, ok):
    ok(TINY, "--seed 3 --T1 3")
    (mixed,) = folders()
    ok("--device -1 --T1 4 --epochs 1 --load-path", mixed)
    changed = "its training changed before epoch 2: --T1 4 (until now 3)"
    for note in (f"note: {mixed} is left out: {changed}\n", ""):
        code, out, err = cli(TINY, "--seeds 3 --epochs 2")
        assert code == 0 and err == note and len(folders()) == 2
        assert str(mixed) not in out.splitlines()[-1].split()


def test_a_failure_ends_the_series(cli):
    code, _, err = cli(TINY, "--seeds 1 2 --data-dir none --task MNIST")
    assert code == 2 and err.count("error") == 1


def test_a_repeated_seed_is_noted(cli):
    code, out, err = cli(TINY, "--seeds 3 3")
    assert code == 0 and err == "note: --seeds repeats 3; each counts once\n"
    assert "1 of 1 seeds are done" in out and "(1 seed)" in out
