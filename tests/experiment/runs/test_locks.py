"""Locks of run folders with and without locks of the file system, planted links, and hidden files
that killed processes leave."""

import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess

import pytest
import torch
from conftest import context, only_run
from shared import MLP

import main
import model_utils as mu
from experiment.runs.files import replacing
from experiment.runs.folder import RunFolder

TINY = MLP + " --train-size 30"


def contents(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


def epochs(run):
    return torch.load(run / "checkpoint.tar", weights_only=True)["epoch"]


def flock_fails(monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fails)


# ---- what an error of a lock means


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EACCES, ""),
        (errno.EPERM, ""),
        (errno.EIO, ""),
        (
            errno.EACCES,
            "--todo attack --test-size 4 --eps-list 0.5 --attack-iters 1 --attack-step 2",
        ),
    ],
)
def test_a_lock_that_fails_is_not_a_file_system_without_locks(
    cli, zoo, tmp_path, monkeypatch, number, words
):
    run = zoo.copy("MLP", tmp_path)
    before = contents(run)
    flock_fails(monkeypatch, number)
    code, _, err = cli(f"{words} --device -1 --load-path {run}")
    assert code == 2 and err.count("\n") == 1 and os.strerror(number) in err and str(run) in err
    assert contents(run) == before
    code, _, err = cli(TINY)
    assert code == 2 and err.count("\n") == 1 and os.strerror(number) in err
    assert [path for path in run.parent.iterdir()] == [run]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_the_lock_of_another_user_is_a_lock(cli, zoo, tmp_path):
    run = zoo.copy("MLP", tmp_path)
    for folder in (run, *run.parents[: run.parts.index("results") - len(run.parts)], tmp_path):
        folder.chmod(0o777)
    (run / ".lock").write_text("process 1 on elsewhere")
    before = contents(run)
    run = run.relative_to(tmp_path)
    os.seteuid(65534)
    try:
        code, _, err = cli(f"--device -1 --load-path {run}")
    finally:
        os.seteuid(0)
    assert code == 2 and err.count("\n") == 1 and "Permission denied" in err
    assert (
        "if no process is at work there, delete that file" in err
        and contents(tmp_path / run) == before
    )


# ---- file systems without locks


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_no_two_processes_share_a_run(cli, tmp_path, monkeypatch, number):
    flock_fails(monkeypatch, number)
    train, second = mu.train, []

    def while_training(*args, **more):
        lock = only_run(tmp_path) / ".lock"
        second.append((cli(f"--device -1 --load-path {lock.parent}"), lock.read_text()))
        train(*args, **more)

    monkeypatch.setattr(mu, "train", while_training)
    assert cli(TINY)[0] == 0
    run = only_run(tmp_path)
    assert epochs(run) == 1 and not (run / ".lock").exists()
    (code, _, err), text = second.pop()
    notes, error = err.splitlines()
    assert code == 2 and notes.startswith("note:") and error.startswith("main.py: error:")
    assert (
        f"process {os.getpid()} on {socket.gethostname()}" in err
        and f"delete {run / '.lock'}" in err
    )

    monkeypatch.setattr(mu, "train", train)
    (run / ".lock").write_text(text)  # after a kill
    code, _, err = cli(f"--device -1 --load-path {run}")
    assert code == 2 and f"delete {run / '.lock'}" in err and epochs(run) == 1
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(f"--device -1 --load-path {run}")  # on a machine that has locks there
    assert code == 2 and f"delete {run / '.lock'}" in err and epochs(run) == 1
    (run / ".lock").unlink()
    flock_fails(monkeypatch, number)
    code, _, err = cli(f"--device -1 --load-path {run}")
    assert code == 0 and err.count("\n") == 1 and "note:" in err and os.strerror(number) in err
    assert epochs(run) == 2 and not (run / ".lock").exists()


# ---- planted links


def plant(path, victim, kind):
    """Puts a link to `victim` at `path`, or a pipe."""
    path.unlink(missing_ok=True)
    victim.write_text("precious")
    if kind == "symbolic link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(victim.with_name("not-there"))
    elif kind == "hard link":
        path.hardlink_to(victim)
    else:
        os.mkfifo(path)


KINDS = ["symbolic link", "dangling link", "hard link", "pipe"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_lock_follows_a_link(cli, zoo, tmp_path, kind):
    run, victim = zoo.copy("MLP", tmp_path), tmp_path / "victim"
    for name, words in [
        (".lock", "--epochs 1"),
        (".Audit_2_0.5.lock", "--todo audit --eps 0.5"),
        (".results.lock", "--todo attack --eps-list 0.5 --attack-step 2"),
    ]:
        plant(run / name, victim, kind)
        code, _, err = cli(f"{words} --device -1 --load-path {run}")
        assert (
            code == 2
            and err.count("\n") == 1
            and f"{run / name}: it is a link or no regular file" in err
        )
        assert (
            victim.read_text() == "precious"
            and not (tmp_path / "not-there").exists()
            and epochs(run) == 1
        )
        (run / name).unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_that_is_written_follows_a_link(ok, zoo, tmp_path, kind):
    """Neither one that is replaced, nor one that is appended to, nor those that are written to
    first."""
    run, victim = zoo.copy("MLP", tmp_path), tmp_path / "victim"
    host, pid = socket.gethostname(), os.getpid()
    names = [path.name for path in run.iterdir()]
    for name in [
        *names,
        *(f".{name}.tmp-{host}-{pid}" for name in (*names, "probe", "predictions.csv")),
    ]:
        if name != "checkpoint.tar" and (
            kind != "pipe" or name.startswith(".") or name == "hyperparameters.txt"
        ):
            plant(run / name, victim, kind)
    ok(f"--device -1 --load-path {run}")
    ok(f"--todo evaluate --save --device -1 --load-path {run}")
    assert victim.read_text() == "precious" and not (tmp_path / "not-there").exists()
    text = (run / "hyperparameters.txt").read_text()
    assert "resumed from epoch 2 on" in text and text.splitlines()[-1].startswith(
        "evaluated model.pt"
    )
    assert text.startswith("precious") == (kind in ("symbolic link", "hard link"))
    assert not [name for name in names if (run / name).is_symlink()]


def test_files_and_folders_get_the_usual_permissions(ok, tmp_path):
    mask = os.umask(0o027)
    try:
        ok(TINY)
    finally:
        os.umask(mask)
    run = only_run(tmp_path)
    assert stat.S_IMODE(run.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.iterdir()} == {0o640}


# ---- hidden files and folders


def test_two_trainings_of_one_host_name_process_and_second_are_two_runs(cli, tmp_path, monkeypatch):
    """As in two containers that share a file system."""
    write, inner = RunFolder.write_hyperparameters, []

    def write_and_start_another(self, *args):
        if not inner:
            inner.append(None)
            inner[0] = cli(TINY)
        write(self, *args)

    monkeypatch.setattr(RunFolder, "write_hyperparameters", write_and_start_another)
    code, _, err = cli(TINY)
    assert code == 0 and inner[0][0] == 0, (err, inner)
    runs = [path.parent for path in tmp_path.rglob("final_checkpoint.tar")]
    assert (
        len(runs) == 2
        and len(os.listdir(runs[0].parent)) == 2
        and [epochs(run) for run in runs] == [1, 1]
    )


def test_what_another_container_writes_is_not_cleaned_up(ok, zoo, tmp_path):
    """Where its process has a number that no process has here, or this process."""
    run = zoo.copy("MLP", tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with replacing(run / "model.pt") as own:
        pass
    paths = [
        own.with_name(own.name.replace(str(os.getpid()), str(pid)))
        for pid in (dead.pid, os.getpid())
    ]
    files = [open(path, "xb") for path in paths]
    for file in files:
        fcntl.flock(file, fcntl.LOCK_EX)
    ok(f"--device -1 --load-path {run}")
    assert all(path.exists() for path in paths)
    for file in files:
        file.close()
    ok(f"--device -1 --load-path {run}")
    assert not any(path.exists() for path in paths)


def killed_at(name, folder, words):
    """main.py that is killed when it calls the method `name` of RunFolder."""
    os.chdir(folder)
    setattr(RunFolder, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    main.main(words)


@pytest.mark.parametrize("name", ["lock", "save", "_move"])
def test_seeds_clean_up_what_killed_starts_have_left(ok, tmp_path, name):
    words = (TINY.replace("--seed 5", "") + " --seeds 5").split()
    process = context.Process(target=killed_at, args=(name, str(tmp_path), words))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    old = (
        tmp_path / "results/EP/mse/2026-01-31/.10-11-12_cpu.999999999"
    )  # as versions before have left it
    old.mkdir(parents=True)
    (old / "config.json").write_text("{}")
    (tmp_path / "results/EP/mse/.seed_5_0123456789ab").mkdir()
    ok(*words)
    assert epochs(only_run(tmp_path)) == 1 and not list(tmp_path.rglob(".*"))
