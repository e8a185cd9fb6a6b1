"""Runs on clusters: signals of batch systems, commands that are started again, workers on several
machines."""

import contextlib
import csv
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, context
from shared import MLP, final_weights

import main
from experiment import command_line, validate
from experiment.command_line import MAIN_FLAGS
from experiment.console import SIGNALS

LONG = MLP + " --train-size 1437 --T1 100 --epochs 500"
RUN = MLP.replace(" --save", " --random-sign --mmt 0.9 --lr-decay --lrs 0.1 0.1 --run-dir d")


def enter(folder, words, ignored, environment):
    """main.py in this process, standard output and error in the files `out` and `err` of the
    folder. environment: of the process; HOST: its machine."""
    os.chdir(folder)
    os.environ.update(environment)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    if "HOST" in environment:
        socket.gethostname = lambda: environment["HOST"]
    sys.stdout, sys.stderr = (open(name, "a", buffering=1) for name in ("out", "err"))
    sys.exit(main.main(words))


def start(folder, line, ignored=(), environment=()):
    """A process that runs main.py in the folder; libraries are loaded already, so that it begins at
    once."""
    process = context.Process(
        target=enter, args=(str(folder), line.split(), ignored, dict(environment))
    )
    process.start()
    return process


def wait_for(path, text):
    """Returns when the file contains the text."""
    began = time.monotonic()
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() - began < 60, (path, text)
        time.sleep(0.01)


def rows(run):
    """The rows of metrics.csv without what differs from machine to machine."""
    with open(run / "metrics.csv") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def assert_same(run, other):
    """The two runs are the same, bit for bit."""
    weights, others = final_weights(run), final_weights(other)
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert rows(run) == rows(other)
    assert torch.load(run / "final_model.pt", weights_only=True)["epoch"] == len(rows(other))
    names = [{path.name for path in folder.iterdir()} - {"slurm-1.out"} for folder in (run, other)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of RUN with six epochs that nothing has interrupted."""
    folder, before = tmp_path_factory.mktemp("whole"), os.getcwd()
    os.chdir(folder)
    assert main.main(f"{RUN} --epochs 6".split()) == 0
    os.chdir(before)
    return folder / "d"


# ---- signals


@pytest.mark.parametrize("number", [n for n in SIGNALS if n not in (signal.SIGINT, signal.SIGTERM)])
def test_signals_of_batch_systems_end_a_run_in_order(tmp_path, number):
    process = start(tmp_path, LONG)
    wait_for(tmp_path / "out", "results go to")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert re.search("epochs? (is|are) saved in", (tmp_path / "err").read_text())


def test_signals_that_were_ignored_at_the_start_stay_ignored(tmp_path):
    """As with nohup, or of a command that a script started in the background."""
    process = start(tmp_path, MLP + " --epochs 60", ignored=SIGNALS)
    wait_for(tmp_path / "out", "epoch 1/60")
    for number in SIGNALS:
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0 and "epoch 60/60" in (tmp_path / "out").read_text()


def test_an_ignored_interrupt_stays_ignored_while_libraries_load():
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "sys.argv = ['main.py', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')\n"
        "except SystemExit: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


STUB = """
import signal, sys, time
def end(number, frame):
    print("got", number)
    time.sleep(0.3)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
    signal.signal(number, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "number, to_all", [(signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGINT, True)]
)
def test_a_script_of_check_passes_signals_on_and_ends(tmp_path, number, to_all):
    """SIGINT as a terminal sends it, to the script and to its command."""
    (tmp_path / "stub.py").write_text(STUB)
    script = (
        f'source {ROOT}/check/common.sh mnist; launcher=("$python" {tmp_path}/stub.py); '
        "suite main.py; echo next"
    )
    process = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=30)
    assert out == f"got {int(number)}\n" and process.returncode == 128 + number


# ---- --run-dir


def test_the_same_command_resumes_and_then_trains_nothing(ok, tmp_path, whole):
    run = tmp_path / "d"
    run.mkdir()
    (run / "slurm-1.out").write_text("a log")
    assert "results go to d\n" in ok(RUN, "--epochs 2")
    assert "results go to d, from epoch 3 on" in ok(RUN, "--epochs 6")
    assert_same(run, whole)
    before = contents(run)
    out = ok(RUN, "--epochs 6")
    nothing, best, following = out.splitlines()
    assert nothing == "nothing to train: d has 6 epochs, --epochs is 6"
    assert re.fullmatch(r"best model: epoch \d of 6, .*; d/model.pt", best)
    assert following.startswith("next: python main.py --todo attack --load-path d ")
    assert contents(run) == before and before["slurm-1.out"] == b"a log"
    assert "nothing to train" in ok("--run-dir d --device -1")


def test_what_is_not_given_is_that_of_the_run(ok, tmp_path):
    """The seed, for example, which was drawn."""
    line = RUN.replace("--seed 5", "")
    ok(line, "--epochs 2")
    first = torch.load("d/checkpoint.tar", weights_only=True)["config"]
    ok("--device -1 --run-dir d --epochs 3 --data-dir elsewhere")
    state = torch.load("d/checkpoint.tar", weights_only=True)
    assert state["epoch"] == 3 and state["config"]["data_dir"] == "elsewhere"
    same = ("seed", "archi", "T1", "lrs", "mmt")
    assert all(state["config"][name] == first[name] for name in same)
    ok(line, f"--epochs 4 --seed {first['seed']}")
    assert len(rows(tmp_path / "d")) == 4


def test_fewer_epochs_than_the_run_has_are_complete(ok, tmp_path):
    ok(RUN, "--epochs 3")
    for name in ("final_model.pt", "final_checkpoint.tar"):
        (tmp_path / "d" / name).unlink()
    assert "nothing to train: d has 3 epochs" in ok(RUN, "--epochs 2")
    for name in ("final_model.pt", "final_checkpoint.tar"):
        assert torch.load(tmp_path / "d" / name, weights_only=True)["epoch"] == 3


def test_a_complete_run_draws_figures_of_another_format(ok, tmp_path):
    ok(RUN, "--epochs 1")
    assert "nothing to train" in ok(RUN, "--epochs 1 --figures pdf")
    assert (tmp_path / "d" / "train-test_acc.pdf").exists()
    assert (tmp_path / "d" / "neural_activity.pdf").exists()


def test_a_run_resumes_in_another_precision(ok, cli, tmp_path):
    """On a machine without the GPU that the first job had."""
    ok(RUN, "--epochs 1")
    path = tmp_path / "d" / "checkpoint.tar"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "config": {**state["config"], "precision": "tf32"}}, path)
    code, _, err = cli(RUN, "--epochs 2")
    assert code == 2 and "give --precision fp32" in err
    assert "note: --precision fp32 (until now tf32)" in ok(RUN, "--epochs 2 --precision fp32")


@pytest.mark.parametrize("todo", ["evaluate", "attack", "audit --eps 1"])
def test_a_run_to_examine_is_named_by_load_path(ok, cli, todo):
    ok(RUN, "--epochs 1")
    code, _, err = cli("--todo", todo, "--run-dir d --device -1")
    assert code == 2 and err.count("\n") == 1 and "--load-path instead of --run-dir" in err


@pytest.mark.parametrize(
    "words, named",
    [
        ("--T1 9", "--T1 (saved: 4, given: 9)"),
        ("--archi 784 8 10", "--archi (saved: 784 12 10, given: 784 8 10)"),
        (
            "--seed 6 --lrs 1 1",
            "--seed (saved: 5, given: 6), --lrs (saved: 0.1 0.1, given: 1.0 1.0)",
        ),
        ("--betas 0 1", "--betas (saved: 0.0 0.5"),
        ("--thirdphase", "--thirdphase"),
        ("--alg BPTT", "--alg (saved: EP"),
        ("--train-size 59", "--train-size"),
        ("--mbs 5", "--mbs"),
        ("--optim adam --mmt 0", "--optim (saved: sgd"),
        ("--model VFMLP", "--model (saved: MLP"),
        ("--deterministic", "--deterministic"),
        ("--scale 2", "--scale"),
        ("--tol 1e-3", "--tol"),
        ("--adv-train 1", "--adv-train"),
        ("--val-size 5", "--val-size"),
    ],
)
def test_other_arguments_than_those_of_the_run_are_refused(cli, tmp_path, whole, words, named):
    run = pathlib.Path(shutil.copytree(whole, tmp_path / "d"))
    before = contents(run)
    code, out, err = cli(RUN, "--epochs 7", words)
    assert code == 2 and not out and err.count("\n") == 1 and named in err, err
    assert contents(run) == before and not list(run.glob(".*"))


def test_a_flag_without_effect_does_not_keep_a_command_from_resuming(ok):
    line = (
        "--todo train --task digits --device -1 --train-size 20 --test-size 20 --model FFMLP "
        "--archi 784 8 10 --T1 7 --attack-norm inf --scale 0.5 --run-dir d"
    )
    ok(line, "--epochs 1")
    assert "from epoch 2 on" in ok(line, "--epochs 2")


FOREIGN = {
    "empty": lambda d: (d / "checkpoint.tar").write_bytes(b""),
    "a real tar": lambda d: shutil.move(
        shutil.make_archive(str(d.parent / "x"), "tar", d), d / "checkpoint.tar"
    ),
    "of another program": lambda d: torch.save(
        {"model_state_dict": {"a": torch.zeros(3)}}, d / "checkpoint.tar"
    ),
    "truncated": lambda d: (d / "checkpoint.tar").write_bytes(
        (d.parent / "good").read_bytes()[:3000]
    ),
    "a folder": lambda d: (d / "checkpoint.tar").mkdir(),
    "a link to nowhere": lambda d: (d / "checkpoint.tar").symlink_to("nowhere"),
    "a model": lambda d: (d / "model.pt").write_bytes(b"weights"),
    "a configuration": lambda d: (d / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_another_program_left_is_not_overwritten(cli, tmp_path, whole, what):
    run = tmp_path / "d"
    run.mkdir()
    shutil.copy(whole / "checkpoint.tar", tmp_path / "good")
    FOREIGN[what](run)
    before, names = contents(run), sorted(path.name for path in run.iterdir())
    code, out, err = cli(RUN)
    assert code == 2 and not out and err.count("\n") == 1 and names[0] in err, err
    assert contents(run) == before and sorted(path.name for path in run.iterdir()) == names


@pytest.mark.parametrize(
    "words, message",
    [
        ("--load-path d", "give no --load-path"),
        ("--seeds 1 --load-path d", "--load-path"),
        ("--run-dir file", "file is no folder"),
        ("--run-dir file/d", "cannot make file/d"),
        ("--no-save", "give no --no-save"),
        ("--lrs 1", "--lrs"),
    ],
)
def test_what_makes_no_sense_is_one_line(cli, tmp_path, words, message):
    (tmp_path / "file").write_text("")
    code, out, err = cli(RUN, words)
    assert code == 2 and not out and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "d").exists()


def test_an_unset_variable_is_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*RUN.split(), "--run-dir", ""]) == 2
    assert "argument --run-dir: got ''" in capsys.readouterr().err and not list(tmp_path.iterdir())


class Killed(BaseException):
    pass


def test_killed_at_any_file_the_same_command_completes_the_run(ok, tmp_path, monkeypatch):
    """Also before the first epoch; every file that is written is renamed to its name."""
    replace, left = os.replace, [0]

    def counting(*paths):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(*paths)

    for folder in (tmp_path / "once", tmp_path / "killed"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if folder.name == "once":
            ok(RUN, "--epochs 2")
    pathlib.Path("d").mkdir()
    pathlib.Path("d", "slurm-1.out").write_text("a log")
    for kill in range(1, 100):  # the first file that a call writes, the second of the next call ...
        left[0] = kill
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, "replace", counting)
            ok(RUN, "--epochs 2")
        if left[0] > 0:
            break
    assert_same(tmp_path / "killed" / "d", tmp_path / "once" / "d")
    assert kill > 6


def test_of_two_processes_one_trains(cli, tmp_path):
    line = RUN + " --train-size 600 --epochs 10"
    processes = [start(tmp_path, line) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [0, 2]
    err = (tmp_path / "err").read_text()
    assert err.count("\n") == 1 and "d is being trained already, by process" in err
    assert len(rows(tmp_path / "d")) == 10


def test_an_interrupted_run_reports_that_the_same_command_resumes(tmp_path):
    line = RUN + " --train-size 1437 --T1 50 --epochs 500"
    process = start(tmp_path, line)
    wait_for(tmp_path / "out", "epoch 1/500")
    os.kill(process.pid, signal.SIGUSR1)
    process.join(60)
    done, err = len(rows(tmp_path / "d")), (tmp_path / "err").read_text()
    assert process.exitcode == 138
    saved = "1 epoch is saved" if done == 1 else f"{done} epochs are saved"
    assert f"{saved} in d; the same command resumes\n" in err


def test_each_seed_has_a_folder_of_its_own(ok, tmp_path, monkeypatch):
    line = RUN.replace("--seed 5", "--seeds 5 6")
    out = ok(line, "--epochs 2")
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"seed_5", "seed_6"}
    assert "2 of 2 seeds" in out
    text = (tmp_path / "d" / "seed_5" / "hyperparameters.txt").read_text()
    assert "--seeds" not in text.splitlines()[0]
    (tmp_path / "once").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "once")
        ok(RUN, "--epochs 3")
    out = ok(line, "--epochs 3")
    assert_same(tmp_path / "d" / "seed_5", tmp_path / "once" / "d")
    assert out.splitlines()[-1] == ok(line, "--epochs 3").splitlines()[-1]
    ok("--todo compare --load-path d/seed_5 d/seed_6")
    table = next(tmp_path.glob("results/compare/*/*/comparison.md")).read_text()
    assert "(2)" in table


def test_seeds_of_other_epochs_are_left_out_of_the_mean(ok, tmp_path):
    line = RUN.replace("--seed 5 ", "").replace("--run-dir d", "--run-dir=d")
    ok(line, "--epochs 3 --seeds=5")
    first = (tmp_path / "d/seed_5/hyperparameters.txt").read_text().splitlines()[0]
    assert "--seeds" not in first and first.count("--run-dir") == 1
    out = ok(line, "--epochs 2 --seeds 5 6")
    assert "d/seed_5 has 3 epochs, not 2; it is left out" in out
    assert "1 of 2 seeds are done" in out


def test_a_seed_that_another_process_trains_is_left_to_it(cli, tmp_path):
    line = RUN.replace("--run-dir d", "--run-dir d/seed_5")
    process = start(tmp_path, f"{line} --train-size 1437 --epochs 500")
    wait_for(tmp_path / "out", "results go to")
    code, out, err = cli(RUN.replace("--seed 5", "--seeds 5 6"))
    process.kill()
    process.join()
    assert code == 0 and "1 of 2 seeds" in out and "seed 5 is left to another process" in err
    assert len(rows(tmp_path / "d" / "seed_6")) == 1


ATTACK = (
    "--todo attack --device -1 --load-path d --attack-iters 2 --attack-step 4 --test-size 20 "
    "--mbs 10 --eps-list 0.1 0.2 0.4 0.8 1"
)


def requeued(folder, line, rng, kills, longest):
    """Starts a command line `kills` times and kills it after at most `longest` seconds, and then
    once more until it ends by itself."""
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]
    for number in range(kills):
        process = start(folder, line)
        process.join(rng.uniform(0, longest))
        if process.exitcode is None:
            os.kill(process.pid, numbers[number % len(numbers)])
        process.join(60)
        assert process.exitcode in (0, -9, -15, -10, 143, 138)
    process = start(folder, line)
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_requeued_after_random_kills_results_are_those_of_one_go(ok, tmp_path, monkeypatch, whole):
    rng = random.Random(1)
    requeued(tmp_path, f"{RUN} --epochs 6", rng, 3, 0.8)
    assert_same(tmp_path / "d", whole)
    requeued(tmp_path, ATTACK, rng, 3, 0.8)
    (tmp_path / "once").mkdir()
    shutil.copytree(whole, tmp_path / "once" / "d")
    monkeypatch.chdir(tmp_path / "once")
    ok(ATTACK)
    for name in ("Adversarial_Accuracy.csv", "Adversarial_Accuracy.txt"):
        assert (tmp_path / "d" / name).read_text() == (tmp_path / "once" / "d" / name).read_text()


# ---- torchrun


@pytest.fixture
def store():
    """What torchrun keeps for its workers, also for those that it starts in place of lost ones."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def on_nodes(store, folders, line, attempts=(0, 0), wait=True):
    """Workers as torchrun starts them, one in each folder, which is all that its machine has.
    attempts: how often torchrun has restarted each, by its own count."""
    processes = []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        environment = {
            "TORCHELASTIC_RUN_ID": "x",
            "TORCHELASTIC_RESTART_COUNT": attempts[rank],
            "RANK": rank,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": len(folders),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "HOST": folder.name,
            "OMP_NUM_THREADS": 1,
        }
        texts = {name: str(value) for name, value in environment.items()}
        processes.append(start(folder, line, environment=texts))
    for process in processes if wait else ():
        process.join(60)
    return processes


def codes(processes):
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_workers_without_a_shared_file_system(tmp_path, whole, store):
    """Only the first one's machine has the run."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    lines = [
        f"{RUN} --epochs 2",
        f"{RUN} --epochs 6",
        "--todo evaluate --device -1 --load-path d --save",
        ATTACK,
        "--device -1 --load-path d --epochs 1",
    ]
    for n, line in enumerate(lines):
        assert codes(on_nodes(store, nodes, line, (n, n))) == [0, 0], (nodes[0] / "err").read_text()
        if n == 1:
            assert rows(nodes[0] / "d") == rows(whole)
            for name, weight in final_weights(whole).items():
                torch.testing.assert_close(
                    final_weights(nodes[0] / "d")[name], weight, rtol=0, atol=1e-6
                )
    err = (nodes[0] / "err").read_text()
    assert "the workers are on node0, node1; node0 reads and writes" in err
    assert len(rows(nodes[0] / "d")) == 7 and (nodes[0] / "d/Adversarial_Accuracy.txt").exists()
    assert codes(on_nodes(store, nodes[::-1], f"{RUN} --epochs 8", (9, 9))) == [2, 2]
    errs = "".join((node / "err").read_text() for node in nodes)
    assert "d/checkpoint.tar is on node0, but node1 reads and writes" in errs
    assert {path.name for path in nodes[1].iterdir()} == {"out", "err"}
    shutil.copytree(nodes[0] / "d", nodes[1] / "d")
    assert codes(on_nodes(store, nodes, f"{RUN} --epochs 8", (10, 10))) == [0, 0]
    assert codes(on_nodes(store, nodes[::-1], f"{RUN} --epochs 9", (11, 11))) == [2, 2]
    errs = "".join((node / "err").read_text() for node in nodes)
    assert "d/checkpoint.tar is on node0 with 8 epochs, not 7, but node1" in errs


def test_a_lost_worker_names_the_machine_with_the_run_and_restarted_workers_resume(tmp_path, store):
    """After a restart torchrun's counts of two machines differ, if only one noticed the loss."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    processes = on_nodes(store, nodes, f"{RUN} --epochs 12", wait=False)
    wait_for(nodes[0] / "out", "epoch 1/12")
    processes[0].kill()
    processes[1].join(60)
    err = (nodes[1] / "err").read_text()
    assert processes[1].exitcode == 1 and "Traceback" not in err
    assert "the epochs are saved in d on node0; the same command resumes" in err
    assert codes(on_nodes(store, nodes, f"{RUN} --epochs 12", (1, 0))) == [0, 0]
    assert len(rows(nodes[0] / "d")) == 12 and "from epoch" in (nodes[0] / "out").read_text()


def test_a_worker_without_the_run_names_a_command_that_resumes(tmp_path, store):
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    processes = on_nodes(store, nodes, f"{MLP} --epochs 80", wait=False)
    wait_for(nodes[0] / "out", "epoch 2/80")
    processes[0].kill()
    processes[1].join(60)
    command = (nodes[1] / "err").read_text().splitlines()[-1].split()
    assert command[0] == "torchrun"
    given = command_line.parse(command[command.index("main.py") + 1 :], MAIN_FLAGS)
    assert given["epochs"] == 80 and (nodes[0] / given["run_dir"] / "checkpoint.tar").exists()


# ---- the scripts of docs/clusters.md

SCRIPTS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.S)
STUBS = {  # of the commands of a cluster
    "srun": 'exec "$@"',
    "scontrol": '[ "$1" = show ] && echo node0 && echo node1 || echo "scontrol $*" >>"$RECORD"',
    "program": 'trap "exit 138" USR1 TERM; printf "%s\\n" "$@" >"$RECORD.words"; sleep 0.3\n'
    'touch "$RECORD"; for _ in $(seq 600); do sleep 0.05; done; exit 3',
}


@pytest.fixture
def cluster(tmp_path):
    """Starts a script as sbatch does: a copy, in a folder of its own; with a .venv in the project's
    folder, tmp_path, whose commands are those of the real one, or stubs."""

    def submit(script, *words, stubs=("srun", "scontrol")):
        (tmp_path / "bin").mkdir()
        for name in stubs:
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/bash\n{STUBS.get(name, STUBS['program'])}\n")
            path.chmod(0o755)
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        activate = f"PATH={tmp_path / 'bin'}:{pathlib.Path(sys.executable).parent}:$PATH"
        (tmp_path / ".venv" / "bin" / "activate").write_text(activate)
        (tmp_path / "main.py").symlink_to(ROOT / "main.py")
        (tmp_path / "spool").mkdir()
        (tmp_path / "spool" / "slurm_script").write_text(script)
        environment = {
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "2",
            "SLURM_ARRAY_JOB_ID": "6",
            "SLURM_ARRAY_TASK_ID": "3",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "RECORD": str(tmp_path / "record"),
        }
        return subprocess.Popen(
            ["bash", "slurm_script", *words],
            cwd=tmp_path / "spool",
            text=True,
            stdout=open(tmp_path / "out", "w"),
            env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        )

    return submit


@pytest.mark.parametrize("script", SCRIPTS, ids=["train", "seeds", "eps", "nodes"])
def test_a_script_of_the_docs_runs_a_command_that_is_one(tmp_path, cluster, script):
    """It is stopped by the signal that SLURM sends, and puts its job back into the queue."""
    process = cluster(script, "--figures", "pdf", stubs=("srun", "scontrol", "python", "torchrun"))
    wait_for(tmp_path / "record", "")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 138
    words = (tmp_path / "record.words").read_text().splitlines()
    given = command_line.parse(words[words.index("main.py") + 1 :], MAIN_FLAGS)
    assert given["figures"] == "pdf"
    if "load_path" in given:
        assert given["eps_list"] == [2]
        return
    validate.validate(command_line.resolve(given))
    array = given["run_dir"].startswith("runs/mlp/seed")
    assert not array or given["run_dir"] == "runs/mlp/seed_3" and given["seed"] == 3
    requeued = (tmp_path / "record").read_text()
    assert requeued == f"scontrol requeue {'6_3' if array else 7}\n"
    assert "nnodes" not in words or words[words.index("--rdzv_endpoint") + 1] == "node0:29500"


@pytest.mark.slow
def test_the_script_of_one_training_trains(tmp_path, cluster):
    process = cluster(SCRIPTS[0], *LONG.split(), "--run-dir", "d", stubs=("scontrol",))
    wait_for(tmp_path / "out", "epoch 1/500")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 138 and len(rows(tmp_path / "d")) >= 1
    assert (tmp_path / "record").read_text() == "scontrol requeue 7\n"
