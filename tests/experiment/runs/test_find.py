"""--load-path: files, folders of runs, the latest run, and several runs in one command."""

import os
import signal
import time

import pytest
from shared import start

import main
from data_utils import UserError
from experiment.launch import Launch
from experiment.runs.find import find_runs


def make_run(folder, name="model.pt", time=1):
    folder.mkdir(parents=True)
    (folder / name).touch()
    os.utime(folder / name, (time, time))
    return folder


def test_a_folder_of_runs_means_every_run_below_it(tmp_path):
    first = make_run(tmp_path / "EP/mse/day/10-00-00_cpu")
    begun = make_run(tmp_path / "BP/cel/day/09-00-00_cpu", "checkpoint.tar")
    make_run(tmp_path / "EP/mse/day/.11-00-00_cpu.tmp-host-1")
    make_run(tmp_path / ".hidden/run")
    (tmp_path / "compare/day").mkdir(parents=True)
    assert find_runs([tmp_path]) == [begun, first]
    assert find_runs([first, tmp_path]) == [first, begun]


def test_files_runs_and_what_is_no_run_stay(tmp_path):
    run = make_run(tmp_path / "run")
    make_run(run / "seed_1")
    paths = [run / "final_model.pt", run, tmp_path / "nowhere"]
    assert find_runs(paths) == paths
    (tmp_path / "empty").mkdir()
    assert find_runs([tmp_path / "empty"]) == [tmp_path / "empty"]


def test_latest_is_the_run_that_was_trained_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run below results"):
        find_runs(["latest"])
    make_run(tmp_path / "results/EP/mse/2026-01-02/run", time=5)
    newest = make_run(tmp_path / "results/BP/cel/2026-01-01/run", time=7)
    assert [run.absolute() for run in find_runs(["latest"])] == [newest]
    own = make_run(tmp_path / "latest")
    assert [run.absolute() for run in find_runs(["latest"])] == [own]


@pytest.fixture
def runs(tmp_path, zoo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.copy("tiny", tmp_path)
    zoo.copy("compared EP", tmp_path / "other")
    (tmp_path / "other/results").rename(tmp_path / "results/second")
    return find_runs(["results"])


def test_each_run_is_evaluated(ok, runs):
    out = ok("--todo evaluate --device -1 --load-path results")
    assert out.count("evaluated ") == 2
    assert [line for line in out.splitlines() if line.startswith("run ")] == [
        f"run {n} of 2: {run}" for n, run in enumerate(runs, 1)
    ]
    following = "next: python main.py --todo compare --load-path results"
    assert out.count("next: ") == 1 and out.splitlines()[-1] == following
    out = ok("--todo evaluate --device -1 --load-path latest")
    latest = max(runs, key=lambda run: (run / "model.pt").stat().st_mtime_ns)
    assert out.count("evaluated") == 1 and "run 1" not in out
    assert f"evaluated {latest}/model.pt (epoch " in out


def test_after_an_error_the_others_follow(cli, runs):
    (runs[0] / "model.pt").write_bytes(b"")
    code, out, err = cli("--todo evaluate --device -1 --load-path nowhere results")
    assert code == 2 and out.count("evaluated ") == 1
    assert err.count("error: ") == 2 and "nowhere is no folder" in err and "it is empty" in err
    assert len([line for line in out.splitlines() if line.startswith("run ")]) == 3


def test_the_code_of_the_first_failure_counts_and_a_signal_ends_all(cli, monkeypatch):
    codes = iter([0, 1, 2, 0])
    monkeypatch.setattr(main, "work", lambda *_, **__: next(codes))
    assert cli("--todo evaluate --load-path a b c d")[0] == 1
    codes = iter([1, 128 + signal.SIGUSR1])
    assert cli("--todo evaluate --load-path a b c d")[0] == 128 + signal.SIGUSR1


def test_an_interrupted_attack_advises_to_resume(tmp_path, runs):
    line = "--todo attack --device -1 --attack-iters 100000 --eps-list 1 --load-path results"
    process = start(tmp_path, line)
    while not any((run / "results.jsonl").exists() for run in runs):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert sum((run / "results.jsonl").exists() for run in runs) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        ("--load-path a b", "got 2 runs, training resumes one"),
        ("--load-path latest", "latest is not for training"),
        ("--todo evaluate --load-path latest", "no run below results"),
        ("--todo compare --load-path latest", "no run below results"),
    ],
)
def test_what_names_no_run_is_refused_in_a_line(cli, words, message):
    code, _, err = cli(words)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_several_workers_take_one_run(cli, monkeypatch):
    monkeypatch.setattr(main, "launched", lambda: Launch(torchrun=True, size=2))
    code, _, err = cli("--todo evaluate --load-path a b")
    assert code == 2 and "torchrun shares the work of one" in err and len(err.splitlines()) == 1


def test_a_folder_of_links_is_a_folder_of_runs(tmp_path):
    run = tmp_path / "results" / "run"
    run.mkdir(parents=True)
    (run / "model.pt").touch()
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "best").symlink_to(run)
    (chosen / "circle").symlink_to(chosen)
    assert find_runs([chosen]) == [chosen / "best"]


def test_a_model_that_was_never_trained_is_not_among_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, files in (
        ("trained", ("checkpoint.tar", "config.json", "metrics.csv")),
        ("foreign", ("checkpoint.tar",)),
        ("untrained", ("checkpoint.tar", "config.json")),
    ):
        (tmp_path / "results" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "results" / name / file).touch()
    runs = [str(run) for run in find_runs(["results"])]
    assert runs == ["results/foreign", "results/trained"]
    assert [str(run) for run in find_runs(["results/untrained"])] == ["results/untrained"]
