"""--todo study: what it does, which flags each command gets, and how it resumes."""

import csv
import json
import os
import pathlib
import random
import signal
import time

import pytest
from shared import start

import main
import model_utils
from data_utils import UserError
from experiment import command_line, study
from experiment.launch import Launch
from experiment.runs.files import Lock
from experiment.runs.find import find_runs
from experiment.seeds import TrainedRun, Training

TINY = (
    "--todo study --task digits --device -1 --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 "
    "--archi 784 8 10 --lrs 0.1 0.1 --models EP BPTT --seeds 1 2 --eps 0.1 --attack-norm inf "
    "--attack-iters 2"
)
JOBS = ["training", "evaluation", "attack"]


def parsed(*words):
    line = [w for word in words for w in (word.split() if isinstance(word, str) else word)]
    return command_line.parse(line)


def study_of(*words):
    return study.Study(parsed(*words), [])


def comparisons(folder="results"):
    return sorted(pathlib.Path(folder).glob("compare/*/*/comparison.csv"))


def table(folder="results"):
    """The rows of the latest comparison, without times."""
    rows = list(csv.DictReader(open(comparisons(folder)[-1])))
    return [row for row in rows if row["measure"] != "seconds"]


def records(folder="results"):
    return [
        json.loads(line)
        for run in find_runs([folder])
        if (run / "results.jsonl").exists()
        for line in (run / "results.jsonl").read_text().splitlines()
    ]


def headings(out):
    return [line for line in out.splitlines() if line.startswith("[")]


# ---- as a whole


def test_a_study_trains_attacks_and_compares_what_is_missing(ok):
    ok(TINY.replace("--todo study", "--save").split(" --models")[0], "--seed 7")
    out = ok(TINY)
    assert out.startswith(
        "study of MLP EP, MLP BPTT: 4 trainings, 4 evaluations, 4 attacks, then the comparison\n"
    )
    names = [f"MLP {rule} seed {seed}" for seed in (1, 2) for rule in ("EP", "BPTT")]
    jobs = [f"{job}, {name}" for job in JOBS for name in names]
    assert headings(out) == [f"[{n} of 12] {job}" for n, job in enumerate(jobs, 1)]
    assert "4 runs in 2 groups" in out
    written = f"{comparisons()[0].with_suffix('.md')}, with robustness_inf.png and training.png"
    assert written in out and out.count("time of the attack: ") == 4
    *_, total, following = out.splitlines()
    assert total.startswith("time of the study: ")
    assert following == f"next: python main.py {TINY} --audit"
    assert len(comparisons()) == 1 and len(find_runs(["results"])) == 5
    assert {row["group"] for row in table()} == {"MLP EP", "MLP BPTT"}
    assert {row["n"] for row in table()} == {"2"}
    before = table()
    attacks = [record for record in records() if record["kind"] == "attack"]
    methods = {record["settings"]["gradient"] for record in attacks}
    assert methods == {"bptt", "smooth", "ep", "worst"} and len(attacks) == 16
    again = ok(TINY)
    assert "4 trainings (4 finished already)" in again
    assert table() == before and len(comparisons()) == 2
    assert len([record for record in records() if record["kind"] == "attack"]) == 16


def test_a_study_trains_a_run_anew_that_was_trained_further(cli, ok):
    line = TINY.replace("EP BPTT", "EP").replace("--seeds 1 2", "--seeds 1")
    ok(line)
    (longer,) = find_runs(["results"])
    ok("--device -1 --epochs 2 --load-path", longer)
    code, _, err = cli(line)
    assert code == 0 and f"note: {longer} is left out: it has 3 epochs, not 1" in err
    assert len(find_runs(["results"])) == 2 and len(comparisons()) == 2
    code, out, _ = cli(line)
    assert code == 0 and "(1 finished already)" in out and len(find_runs(["results"])) == 2


def test_a_study_audits_at_each_eps(ok):
    line = TINY.replace("--eps 0.1", "--eps 0 8/255 0.1").replace("--seeds 1 2", "--seeds 1")
    out = ok(line.replace("EP BPTT", "EP"), "--audit --budget quick")
    assert "1 attack, 2 audits, then" in out
    assert [line.partition("] ")[2] for line in headings(out)[3:]] == [
        "audit at eps 8/255, MLP EP seed 1",
        "audit at eps 0.1, MLP EP seed 1",
    ]
    (run,) = find_runs(["results"])
    assert len(list(run.glob("Audit_inf_*.txt"))) == 2


def test_killed_at_any_moment_it_resumes_to_the_same_table(ok, tmp_path, monkeypatch):
    line = TINY.replace("--seeds 1 2", "--seeds 1") + " --epochs 2 --audit --budget quick"
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    ok(line)
    whole = table()
    monkeypatch.chdir(tmp_path / "parts")
    for pattern in ("*/*/*/*/checkpoint.tar", "*/*/*/*/results.jsonl", "*/*/*/*/Audit_*.npz"):
        process = start(tmp_path / "parts", line)
        while process.is_alive() and not list(pathlib.Path("results").glob(pattern)):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.join()
    out = ok(line)
    assert "finished already" in out
    assert table() == whole
    assert len(find_runs(["results"])) == 2
    identities = [
        json.dumps([record[part] for part in ("kind", "model", "data", "settings")])
        for record in records()
    ]
    assert len(identities) == len(set(identities))


def test_two_processes_share_a_study(tmp_path):
    line = TINY + " --epochs 2"
    processes = [start(tmp_path, line) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(find_runs([tmp_path / "results"])) == 4
    assert comparisons(tmp_path / "results")
    assert {row["n"] for row in table(tmp_path / "results")} == {"2"}
    found = [record for record in records(tmp_path / "results") if record["kind"] == "attack"]
    assert len(found) == 16
    assert not list(tmp_path.rglob(".*lock"))


def test_what_another_process_does_is_waited_for(cli, ok, monkeypatch):
    line = TINY.replace("--seeds 1 2", "--seeds 1")
    ok(line)
    (run,) = find_runs(["results/BPTT"])
    locks = [Lock(run, "study_attack")]
    monkeypatch.setattr(study.time, "sleep", lambda _: locks.pop().release())
    before = len(comparisons())
    out = ok(line)
    note = f"waiting for another process: attack, MLP BPTT seed 1: process {os.getpid()} on "
    after = out.partition(note)[2].splitlines()
    assert after[1] == "[6 of 6] attack, MLP BPTT seed 1" and len(comparisons()) == before + 1
    lock = Lock(run, "study_attack")
    monkeypatch.setattr(study.time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    code, _, err = cli(line)
    lock.release()
    assert code == 128 + signal.SIGINT and err.endswith("the same command resumes the study\n")


def test_an_interrupted_study_advises_to_resume(cli, monkeypatch):
    monkeypatch.setattr(model_utils, "attack", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    code, out, err = cli(TINY)
    assert code == 128 + signal.SIGTERM and err.endswith("the same command resumes the study\n")
    assert not comparisons()
    monkeypatch.setattr(study, "train_seed", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, out, err = cli(TINY)  # between two commands
    assert code == 128 + signal.SIGTERM
    assert err.endswith("interrupted; the same command resumes the study\n")


# ---- jobs, without their commands


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trainings end at once, with a folder each; `trained[seed]` is what comes instead."""
    outcomes = {}

    def train(runs, seed, start, heading):
        folder = tmp_path / runs.config.learning.alg / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        return outcomes.get(seed, Training(TrainedRun(folder, 1)))

    monkeypatch.setattr(study, "train_seed", train)
    monkeypatch.chdir(tmp_path)
    return outcomes


def test_claimed_trainings_are_waited_for_and_named_once(trained, capsys, monkeypatch):
    trained |= {1: Training(busy="process 7"), 2: Training(busy="process 8")}
    done = []

    def sleep(seconds):
        done.append(seconds)
        if done.count(seconds) > 1:
            del trained[min(trained)]

    monkeypatch.setattr(study.time, "sleep", sleep)
    assert study_of(TINY).do(lambda given, _: done.append(given["todo"]) or 0) == 0
    assert done == [1, 1, *["evaluate", "evaluate", "attack", "attack"], 1] + (
        ["evaluate", "evaluate", "attack", "attack", "compare"]
    )
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "waiting" in line]
    assert line == "waiting for another process: " + "; ".join(
        f"training, MLP {rule} seed {seed}: process {6 + seed}"
        for seed in (1, 2)
        for rule in ("EP", "BPTT")
    )


def test_after_a_failure_nothing_is_waited_for(trained, capsys):
    trained |= {1: Training(code=2), 2: Training(busy="process 8")}
    assert study_of(TINY).do(lambda *_: pytest.fail("there is nothing to do")) == 2
    out = capsys.readouterr().out
    assert "not done: " in out and "the same command repeats what is missing\n" in out


def test_a_failure_keeps_no_other_job_waiting(trained, capsys):
    done = []

    def start(given, words):
        done.append((given["todo"], given["load_path"]))
        return 1 if given["todo"] == "attack" and given["load_path"].endswith("EP/1") else 0

    assert study_of(TINY).do(start) == 1
    assert len(done) == 8 and "compare" not in dict(done)
    assert "failed: attack, MLP EP seed 1\nnothing is compared" in capsys.readouterr().out
    trained[2] = Training()  # the run is gone
    done.clear()
    assert study_of(TINY).do(start) == 2 and len(done) == 4


def test_groups_are_in_the_order_of_the_models(trained, tmp_path):
    compared = []
    assert study_of(TINY).do(lambda given, _: compared.append(given) or 0) == 0
    given = compared[-1]
    assert given["todo"] == "compare" and "labels" not in given  # those of the comparison
    assert given["load_path"] == [f"{tmp_path}/{rule}/{n}" for rule in ("EP", "BPTT") for n in "12"]


# ---- which flags each command gets


MIXED = (
    "--todo study --task digits --model CNN --channels 4 4 --act my_hard_sig --T1 9 --loss cel "
    "--softmax --thirdphase --betas 0 1 --lrs 1e-3 1e-3 1e-3 --seeds 1 --eps 8/255 1/2 --test-size "
    "30 --data-dir d --attack-iters 7 --attack-norm inf --audit --budget quick --device -1 --models"
)


def commands(*words):
    """{label: {todo: flags of the first command}}"""
    own = study_of(MIXED, *words)
    found = {}
    for job in own.jobs:
        found.setdefault(own.labels[job.index], {}).setdefault(job.todo, job.given)
    trainings = {label: runs.shared for label, runs in zip(own.labels, own.runs)}
    return {label: {**given, "train": trainings[label]} for label, given in found.items()}


ADVERSARIAL = "FFCNN BP, adversarial 8/255 by bptt"


def test_each_command_gets_the_flags_that_it_uses():
    found = commands("EP BPTT", ["FFCNN:BP --lrs 0.1 0.1 0.1 --adv-train 8/255"])
    assert list(found) == ["CNN EP", "CNN BPTT", ADVERSARIAL]
    everywhere = {"data_dir": "d", "test_size": 30, "device": -1}
    assert found["CNN EP"]["train"] == {
        **everywhere,
        **{"task": "digits", "model": "CNN", "alg": "EP", "channels": [4, 4], "T1": 9},
        **{"act": "my_hard_sig", "loss": "cel", "softmax": True, "thirdphase": True},
        **{"betas": [0, 1], "lrs": [1e-3] * 3, "save": True},
    }
    assert "thirdphase" not in found["CNN BPTT"]["train"]
    forward = found[ADVERSARIAL]["train"]
    assert not forward.keys() & {"T1", "act", "softmax", "thirdphase", "betas"}
    assert forward["lrs"] == [0.1] * 3 and forward["adv_train"] == 8 / 255
    robustness = {**everywhere, "attack_norm": "inf"}
    assert found["CNN EP"]["attack"] == {
        **robustness,
        **{"todo": "attack", "T1": 9, "attack_iters": 7, "eps_list": [8 / 255, 0.5]},
        "attack_grad": ["bptt", "smooth", "ep"],
    }
    assert found[ADVERSARIAL]["attack"] == {
        **robustness,
        **{"todo": "attack", "attack_iters": 7, "eps_list": [8 / 255, 0.5]},
    }
    audit = {**robustness, "todo": "audit", "budget": "quick", "eps": 8 / 255}
    assert found[ADVERSARIAL]["audit"] == audit
    assert found["CNN EP"]["evaluate"] == {**everywhere, "todo": "evaluate", "T1": 9}


def test_a_matched_control_has_the_activation_of_the_others():
    found = commands("EP", ["FFCNN:BP --no-norm"], ["FFCNN:BP"])
    assert list(found) == ["CNN EP", "FFCNN BP, no norm", "FFCNN BP"]
    matched = found["FFCNN BP, no norm"]["train"]
    assert matched["act"] == "my_hard_sig" and matched["no_norm"]
    assert "act" not in found["FFCNN BP"]["train"]


def test_gradient_methods_can_be_given():
    found = commands("EP FFCNN:BP --attack-grad ep")
    assert found["CNN EP"]["attack"]["attack_grad"] == ["ep"]
    assert "attack_grad" not in commands("EP FFCNN:BP --attack square")["CNN EP"]["attack"]
    forward = commands("FFCNN:BP --attack-grad smooth ep")["FFCNN BP"]["attack"]
    assert forward["attack_grad"] == ["smooth"]


def test_flags_without_an_effect_are_noted():
    words = "EP --patch 4 --no-norm --corruptions-dir c --check-thm"
    notes = list(study_of(MIXED.replace(" --audit", ""), words).notes())
    assert notes == [
        "--corruptions-dir has no effect on a study",
        "--patch has no effect on CNN EP",
        "--no-norm has no effect on CNN EP",
        "--budget has no effect without --audit",
    ]
    notes = list(study_of(MIXED, "EP", ["FFCNN:BP --T1 3"]).notes())
    assert notes == ["--T1 has no effect on FFCNN BP"]
    assert not list(study_of(MIXED, "EP BPTT FFCNN:BP").notes())


def test_labels_can_be_given():
    assert list(commands("EP BPTT --labels a b")) == ["a", "b"]
    with pytest.raises(UserError, match="argument --labels: got 1, expected 2"):
        study_of(MIXED, "EP BPTT --labels a")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("--models EP BPTT", "", "--todo study needs --models EP BPTT FFCNN:BP, for example"),
        ("--seeds 1 2", "", "--todo study needs --seeds 1 2 3, for example"),
        (
            "--models EP BPTT --seeds 1 2",
            "",
            "--models EP BPTT FFCNN:BP --seeds 1 2 3, for example",
        ),
        ("--eps 0.1", "", "--todo study needs --eps"),
        ("--eps 0.1", "--eps 0", "--todo study needs an eps above 0"),
        ("--eps 0.1", "--eps-list 0.1 1", "not used by --todo study; use --eps 0.1 1"),
        ("--eps 0.1", "--eps 0.1 --eps-list 1", "argument --eps-list: a study takes --eps"),
        ("--seeds 1 2", "--seeds 1 --seed 2", "argument --seed: a study takes --seeds"),
        ("BPTT", "BPTT --alg EP", "argument --alg: the words of --models name the rules"),
        ("BPTT", "BPTT --load-path x", "argument --load-path: a study finds its runs"),
        ("BPTT", "BPTT --run-dir x", "argument --run-dir: a study keeps its runs below results"),
        ("BPTT", "BPTT --no-save", "argument --no-save: a study keeps its runs"),
        ("BPTT", "SGD", "argument --models: SGD: argument --alg: got 'SGD'"),
        ("BPTT", "RNN:EP", "argument --models: RNN:EP: argument --model: got 'RNN'"),
        ("BPTT", "FFMLP:EP", "argument --models: FFMLP:EP: argument --alg: got EP"),
        ("BPTT", "CNN:EP", "argument --models: CNN:EP: argument --lrs: got 2"),
        ("BPTT", "EP", "argument --models: EP and EP are the same training"),
        ("BPTT", "BPTT:MLP", "argument --models: BPTT:MLP: expected MODEL:RULE; did you mean MLP:"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(cli, old, new, message):
    code, out, err = cli(TINY.replace(old, new))
    assert code == 2 and not out and message in err and len(err.splitlines()) == 1, err
    assert not pathlib.Path("results").exists()


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "expected RULE or MODEL:RULE"),
        ("EP 'x", "expected RULE or MODEL:RULE"),
        ("CNN", "CNN: a model needs a rule; expected MODEL:RULE"),
        ("EP --lrs", "expected at least one argument"),
        ("EP --seeds 1", "--seeds is no flag of one model"),
        ("EP --model CNN", "--model is no flag of one model"),
        ("EP --nothing", "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_model_is_refused_in_a_line(spec, message):
    with pytest.raises(UserError, match=f"argument --models: .*{message}"):
        study_of(TINY.partition("--models")[0], "--seeds 1 --eps 1 --models", [spec])


def test_workers_of_torchrun_share_no_study(cli, monkeypatch):
    monkeypatch.setattr(main, "launched", lambda: Launch(torchrun=True, size=2))
    code, _, err = cli(TINY)
    assert code == 2 and "start it with python instead of torchrun" in err
    assert len(err.splitlines()) == 1


def test_an_audit_takes_one_eps(cli):
    code, _, err = cli("--todo audit --load-path x --eps 1 2")
    assert code == 2 and "argument --eps: got 2 values, an audit takes one" in err
    assert len(err.splitlines()) == 1
