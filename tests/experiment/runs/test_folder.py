"""What the surroundings do to a run: who looks at it, who trains beside it, what is killed, full,
closed or missing."""

import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, context, only_run
from shared import MLP, enter, start

import main
import model_utils as mu
from experiment import console, training
from experiment.launch import launched
from experiment.runs import checkpoint, legacy
from experiment.runs.files import WriteFailed, replacing
from experiment.runs.folder import RunFolder
from experiment.training import Trainer

TINY = MLP + " --train-size 30"


def metrics(run):
    return list(csv.DictReader(open(run / "metrics.csv")))


def whole(run):
    """Every file of the folder can be read."""
    for path in run.iterdir():
        if path.suffix in (".pt", ".tar"):
            torch.load(path, weights_only=True)
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def without_figures(folder, words):
    RunFolder.save_figure = lambda *_: None  # most of the time of a short epoch
    enter(folder, words)


@pytest.mark.slow
def test_looking_at_a_run_does_not_kill_it(ok, tmp_path):
    words = (TINY + " --epochs 150").split()
    process = context.Process(target=without_figures, args=(str(tmp_path), words))
    process.start()
    while not list(tmp_path.glob("results/*/*/*/[!.]*/metrics.csv")):
        time.sleep(0.01)
    run, looks = only_run(tmp_path), 0
    while process.is_alive():
        for todo in (
            "evaluate",
            "gducheck --T1 4 --save",
            "attack --test-size 4 --eps-list 0.5 --attack-iters 1 --attack-step 2",
        ):
            ok(f"--todo {todo} --device -1 --load-path {run}")
            looks += 1
    process.join()
    assert process.exitcode == 0 and looks >= 3
    whole(run)
    assert (
        len(metrics(run)) == 150
        and torch.load(run / "final_checkpoint.tar", weights_only=True)["epoch"] == 150
    )
    assert (run / "hyperparameters.txt").read_text().count("evaluated") == -(-looks // 3)


def test_only_what_no_process_owns_is_cleaned_up(ok, zoo, tmp_path):
    run = zoo.copy("MLP", tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with replacing(run / "model.pt") as beside:
        pattern = beside.name
        beside.write_text("being written")
        others = {
            name: run / pattern.replace(str(os.getpid()), str(pid))
            for name, pid in (("dead", dead.pid), ("living", os.getppid()))
        }
        others["elsewhere"] = run / ".model.pt.tmp-another-machine-1"
        others["before"] = run / f".model.pt.tmp-{dead.pid}"  # as versions before named them
        for path in others.values():
            path.write_text("half")
        ok(f"--todo evaluate --device -1 --load-path {run}")
        assert all(path.exists() for path in [beside, *others.values()])
        beside.write_bytes((run / "model.pt").read_bytes())
    ok(f"--device -1 --load-path {run}")
    assert {name for name, path in others.items() if path.exists()} == {"living", "elsewhere"}


def test_one_training_at_a_time(cli, tmp_path):
    process = start(tmp_path, MLP + " --train-size 1437 --T1 100 --epochs 500")
    while not list(tmp_path.glob("results/*/*/*/[!.]*/checkpoint.tar")):
        time.sleep(0.01)
    run = only_run(tmp_path)
    code, out, err = cli(f"--device -1 --load-path {run}")
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and f"process {process.pid} on" in err
        and str(run) in err
    )
    process.kill()
    process.join()
    code, out, err = cli(f"--device -1 --load-path {run}")
    assert code == 0 and "results go to" in out, err
    assert not (run / ".lock").exists()


def test_where_there_are_no_locks_a_note_says_so(cli, tmp_path, monkeypatch):
    cli(TINY)

    def refused(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    code, _, err = cli(f"--device -1 --load-path {only_run(tmp_path)}")
    assert code == 0 and "note:" in err and "No locks available" in err


def test_a_run_that_moved_on_while_it_was_read_is_not_trained(cli, zoo, tmp_path, monkeypatch):
    run, read = zoo.copy("MLP", tmp_path), checkpoint._read

    def slowly(path):
        state = read(path)
        os.utime(path, ns=(1, 1))
        return state

    monkeypatch.setattr(checkpoint, "_read", slowly)
    code, _, err = cli(f"--device -1 --load-path {run}")
    assert code == 2 and "changed while it was read" in err and not (run / ".lock").exists()


def test_a_resumption_is_written_down(ok, zoo, tmp_path):
    run = zoo.copy("MLP", tmp_path)
    ok(f"--device -1 --load-path {run} --T1 6 --mbs 10")
    text = (run / "hyperparameters.txt").read_text()
    block = text[text.index("resumed from epoch 2 on") :].splitlines()
    assert f"command line: python main.py --device -1 --load-path {run} --T1 6 --mbs 10" in block[1]
    assert block[2].startswith("date: 20") and any(line.startswith("torch: ") for line in block)
    assert block[-3:] == [
        "arguments that differ from before:",
        "  T1: 6  # before: 4",
        "  mbs: 10  # before: 15",
    ]
    assert legacy.read_arguments(run)["T1"] == 6
    ok(f"--device -1 --load-path {run}")
    assert (
        (run / "hyperparameters.txt")
        .read_text()
        .endswith("arguments that differ from before:\n  none\n")
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_log_table_and_model_agree_after_a_kill_at_any_write(ok, tmp_path, monkeypatch, after):
    """On a device whose sums differ from run to run: a repeated epoch has another accuracy, here
    always a lower one."""
    ok(TINY + " --epochs 2")
    original, runs = only_run(tmp_path), tmp_path / "runs"
    evaluate, repeated = training.evaluate, [0.0]
    monkeypatch.setattr(
        training,
        "evaluate",
        lambda *args, **more: evaluate(*args, **more) * 1e-3 + 0.9 - repeated[0],
    )
    monkeypatch.setattr(RunFolder, "save_figure", lambda *_: None)
    writes = {
        name: getattr(RunFolder, name) for name in ("save", "write_csv", "append_hyperparameters")
    }
    kill, left = 0, [0]

    def counting(name):
        def write(self, *args):
            if after:
                writes[name](self, *args)
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            if not after:
                writes[name](self, *args)

        return write

    for name in writes:
        monkeypatch.setattr(RunFolder, name, counting(name))
    while True:
        kill += 1
        run = pathlib.Path(shutil.copytree(original, runs / str(kill)))
        left[0], repeated[0] = kill, 0.0
        try:
            ok(f"--device -1 --load-path {run} --epochs 2")
            break
        except Killed:
            done = torch.load(run / "checkpoint.tar", weights_only=True)["epoch"]
        left[0], repeated[0] = -1, 0.3
        if done < 4:
            ok(f"--device -1 --load-path {run} --epochs {4 - done}")
            table, best = metrics(run), torch.load(run / "model.pt", weights_only=True)
            accuracies = [float(row["test_acc"]) for row in table]
            assert (
                len(table) == 4
                and best["test_acc"] == accuracies[: best["epoch"]]
                and best["test_acc"][-1] == max(accuracies)
            )
    assert kill > 10


# ---- streams, disks and folders


def in_a_pipeline(command, tmp_path):
    return subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )


@pytest.mark.slow
def test_training_goes_on_without_a_reader(tmp_path):
    python = f"{sys.executable} -u {ROOT / 'main.py'} {TINY} --epochs 3"
    done = in_a_pipeline(f"{python} | head -1; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert done.stdout.splitlines()[-1] == "0", done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    whole(only_run(tmp_path))
    assert len(metrics(only_run(tmp_path))) == 3


def with_streams(folder, words, out, err):
    """main.py in this process, with standard output and error on the files of those names; None:
    closed."""
    for descriptor, name in ((1, out), (2, err)):
        os.dup2(os.open(name or os.devnull, os.O_WRONLY), descriptor)
    for descriptor, name in ((1, out), (2, err)):
        if not name:
            os.close(descriptor)
    sys.stdout, sys.stderr = (
        name and open(descriptor, "w", closefd=False) for descriptor, name in ((1, out), (2, err))
    )
    os.chdir(folder)
    code = main.main(words)
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()  # as Python does at its end
    os._exit(code)


@pytest.mark.parametrize(
    "out, err", [("/dev/full", "/dev/full"), (None, None), (None, "/dev/full")]
)
def test_training_survives_full_and_closed_streams(tmp_path, out, err):
    process = context.Process(
        target=with_streams, args=(str(tmp_path), (TINY + " --epochs 2").split(), out, err)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    whole(only_run(tmp_path))
    assert len(metrics(only_run(tmp_path))) == 2


def test_a_lenient_stream_writes_until_it_cannot(capsys):
    with console.lenient_streams():
        print("said")
        sys.stderr.write("also")
    assert capsys.readouterr() == ("said\n", "also")


def test_a_full_disk_says_so_and_how_to_go_on(zoo, tmp_path, monkeypatch, cli):
    run = zoo.copy("MLP", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".txt"}
    code, out, err = cli(f"--device -1 --load-path {run} --epochs 2")
    assert (
        code == 1
        and err.count("\n") == 1
        and "no space left" in err
        and "unchanged" in err
        and str(run / "metrics.csv") in err
    ), err
    assert f"resume with  python main.py --device -1 --load-path {run} --epochs 2" in err
    assert {
        path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".txt"
    } == before


def test_a_folder_that_is_gone_is_not_said_to_be_unchanged(cli, tmp_path, monkeypatch):
    commit = Trainer._commit

    def deleted(self, *args):
        shutil.rmtree(self.recorder.run.folder)
        commit(self, *args)

    monkeypatch.setattr(Trainer, "_commit", deleted)
    code, _, err = cli(TINY)
    assert code == 1 and err.count("\n") == 1 and "unchanged" not in err
    assert "the folder is gone" in err and "nothing is left to resume" in err


@pytest.mark.parametrize(
    "todo", ["evaluate", "attack", "characteristic", "gducheck --save", "train"]
)
def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_work(
    cli, zoo, tmp_path, monkeypatch, todo
):
    run, touch = zoo.copy("MLP", tmp_path), pathlib.Path.touch

    def refused(self, *args, **more):
        if self.parent == run:
            raise PermissionError(13, "Permission denied")
        touch(self, *args, **more)

    monkeypatch.setattr(pathlib.Path, "touch", refused)
    monkeypatch.setattr("energy.fast.relax", None)  # no work
    code, _, err = cli(f"--todo {todo} --device -1 --load-path {run}")
    assert code == 2 and err.count("\n") == 1 and str(run) in err and "Permission denied" in err


@pytest.mark.slow
def test_text_files_are_utf8_whatever_the_locale(tmp_path):
    folder = tmp_path / "Übung"
    folder.mkdir()
    program = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); import main; main.TODOS['train'] = lambda job: "
        "(print(job.config.data.data_dir), "
        "main._new_folder(job, {}).release())\nsys.exit(main.main(json.loads(sys.argv[2])))"
    )
    words = json.dumps([*TINY.split(), "--data-dir", "Größe\udcff"])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), words],
        cwd=folder,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = (only_run(folder) / "hyperparameters.txt").read_text(encoding="utf-8")
    assert "Größe\\udcff" in text


@pytest.mark.parametrize("path", ["x/" * 2500, "a\0b", "no\udcfftext", "/dev/null"])
def test_paths_that_cannot_be(cli, path):
    code, _, err = (
        cli("--todo evaluate --device -1 --load-path", path)
        if "/" in path
        else (main.main(["--load-path", path]), "", "")
    )
    assert code == 2 and err.count("\n") <= 1


def test_writing_to_a_folder_that_is_not_there_fails_in_one_line(tmp_path):
    with pytest.raises(WriteFailed, match="the folder is gone"):
        RunFolder(tmp_path / "missing").save("model.pt", {"a": torch.zeros(3)})


# ---- how it was started


@pytest.mark.parametrize(
    "more, words",
    [
        ({}, "--standalone --nproc_per_node 4"),
        (
            {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
            "--nnodes 2 --nproc_per_node 2 --master_addr node0 --master_port 29400 --node_rank 1",
        ),
    ],
)
def test_the_resume_line_starts_as_many_workers_again(monkeypatch, more, words):
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"}
    environment |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "29400", **more}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "launched", lambda: launched(environment))
    assert console.command_words(["--save"], "main.py") == ["torchrun", *words.split(), "main.py"]


def test_the_resume_line_keeps_how_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/code/main.py", "--save", "--lrs", "1"])
    monkeypatch.setattr(
        sys, "orig_argv", ["python3", "-u", "-W", "ignore", "/code/main.py", "--save", "--lrs", "1"]
    )
    assert console.command_words(None, "main.py") == [
        "python3",
        "-u",
        "-W",
        "ignore",
        "/code/main.py",
    ]
    assert console.command_words(["--save"], "main.py") == ["python", "main.py"]
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-c", "import main"])
    assert console.command_words(None, "main.py") == ["python", "/code/main.py"]


# ---- diverged without a word


QUICK = "--task digits --device -1 --train-size 200 --test-size 40 --mbs 20 --T1 6 --T2 3 --seed 0"


@pytest.mark.parametrize(
    "words, said",
    [
        ("--lrs 1e6 1e6 --betas 0 0.5", "layer 1 are saturated for all images"),
        ("--scale 0 --betas 0 0.5 --act tanh", "no weight has changed: all weights are zero"),
        ("--scale 0 --betas 0 0.5", "all neurons have the same weights in synapses.0.weight"),
        ("--betas 0 1e-8", "rounding"),
        (
            "--alg BPTT --T2 1",
            "synapses.0.weight did not change: --T2 1 does not reach the lower layers",
        ),
        ("--betas 0 1e-7 --optim adam", "times the rounding error"),
        ("--lrs 0 0 --betas 0 0.5", "no weight has changed"),
    ],
)
def test_a_training_that_learns_nothing_says_so(cli, words, said):
    code, out, _ = cli(QUICK, words)
    warnings = [
        line for line in out.splitlines() if "warning" in line and "not converged" not in line
    ]
    assert code == 0 and said in warnings[0] and len(warnings) == 1, out


@pytest.mark.parametrize(
    "words",
    [
        "--betas 0 0.2 --optim adam",
        "--model CNN --channels 4 6 --act my_hard_sig --betas 0 0.5 --optim adam",
        "--alg BPTT --optim adam --loss cel --softmax --archi 784 32 10",
    ],
)
def test_a_training_that_learns_says_nothing(cli, words):
    assert "warning" not in cli(QUICK, "--T1 40", words)[1]


def test_the_advice_fits(cli):
    code, _, err = cli(QUICK, "--betas 0 1e-300")
    assert code == 1 and "larger beta" in err and "smaller" not in err


# ---- numbers beyond anything


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "--mbs 99999999999999999999",
            "--mbs: got '99999999999999999999', expected a whole number of at least 1 and at most 1000000000",
        ),
        (
            "--seed 99999999999999999999",
            "--seed: got '99999999999999999999', expected a whole number of at least 0 and at most 9223372036854775807",
        ),
        ("--archi 784 9999999999 10", "--archi: got '9999999999'"),
        ("--archi 784 900000000 10", "--archi"),
        ("--model CNN --paddings 99999999999 0", "--paddings: got '99999999999'"),
        ("--model CNN --paddings 900000000 0", "cannot be built"),
        ("--T1 " + "9" * 5000, "--T1: got '9999"),
        ("--lrs 1e999 1", "--lrs: got '1e999'"),
    ],
)
def test_huge_numbers(cli, words, said):
    code, _, err = cli("--task digits --device -1", words)
    assert code == 2 and err.count("\n") == 1 and said in err and len(err) < 600, err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
            "allocate memory: "
            "you tried to allocate 4011234304 bytes. Error code 12 "
            "(Cannot allocate memory)"
        ),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10 GiB"
        ),
    ],
)
def test_out_of_memory_is_one_line(cli, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mu, "train", fail)
    code, _, err = cli(QUICK, "--mbs 20")
    assert code == 1 and err.count("\n") == 1
    assert "out of memory" in err and "reduce --mbs" in err and "--mbs 20" in err


V1, V2 = "4:memory:/slurm/job_7/step_0\n1:cpu,cpuacct:/\n0::/\n", "0::/slurm/job_7/step_0\n"


@pytest.mark.parametrize(
    "groups, limits, expected",
    [
        (V2, {"": "max", "slurm/job_7/step_0": "max"}, None),
        (V2, {"slurm/job_7/step_0": "1000"}, 1000),
        (V2, {"slurm/job_7": "1000", "slurm/job_7/step_0": "2000"}, 1000),
        (V2, {"": "1000"}, 1000),  # in a container, with the path outside
        ("0::/../../elsewhere\n", {"": "1000"}, 1000),
        (V2, {"slurm/job_7": "no number"}, None),
        (V2, {"slurm/job_7": str(2**62)}, None),
        (V1, {"memory/slurm/job_7": "1000", "memory/slurm/job_7/step_0": str(2**63 - 4096)}, 1000),
        (V1, {"memory": "1000"}, 1000),
        (V1, {"memory": str(2**63 - 4096), "slurm/job_7": "1000"}, None),
        ("nonsense\n\n:::\n", {}, None),
        (None, {}, None),
    ],
)
def test_memory_is_what_machine_and_container_allow(tmp_path, groups, limits, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    if groups:
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for place, limit in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        (
            folder / ("memory.limit_in_bytes" if place.startswith("memory") else "memory.max")
        ).write_text(limit + "\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert console.memory_limit(tmp_path) == (expected or machine)


def test_a_model_beyond_the_memory_of_a_container_is_one_line(cli, monkeypatch):
    monkeypatch.setattr(console, "memory_limit", lambda: 2**20)
    code, _, err = cli("--task digits --device -1")
    assert (
        code == 2
        and err.count("\n") == 1
        and "take 0.0 GiB" in err
        and "container has 0.0 GiB" in err
    )


def test_deterministic_runs_ask_torch_for_it_and_say_so(ok, tmp_path):
    line = TINY + " --model CNN --channels 3 4 --alg"
    for alg in ("EP", "BPTT"):
        weights = []
        for words in ("", "--deterministic"):
            folder = tmp_path / f"{alg}{words}"
            folder.mkdir()
            os.chdir(folder)
            ok(line, alg, words)
            assert torch.are_deterministic_algorithms_enabled() == bool(words)
            saved = torch.load(only_run(folder) / "final_model.pt", weights_only=True)
            assert saved["config"]["deterministic"] == bool(words)
            weights.append(saved["model_state_dict"])
        assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())
    torch.use_deterministic_algorithms(False)
