"""Every script of check/ runs, with SMOKE=1, from anywhere, and leaves nothing behind."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile

import gpu_report
import pytest
import smoke
from conftest import ROOT, context  # which makes benchmarks/ known

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "check").glob("*.sh")
    if path.stem not in ("setup", "test", "common")
)


def listing(tmp):
    return [sorted(os.listdir(folder)) for folder in (ROOT, ROOT / "results", tmp)]


def bash(script, tmp, small, *words, **options):
    environment = {**os.environ, "TMPDIR": str(tmp), **options.pop("env", {})}
    environment.pop("SMOKE", None)
    return subprocess.run(
        ["bash", str(script), *words],
        cwd=tempfile.gettempdir(),
        text=True,
        env={**environment, **({"SMOKE": "1"} if small else {})},
        timeout=400,
        **(options or {"capture_output": True}),
    )


@pytest.fixture
def server(tmp_path_factory):
    """A folder with the pipes of a `smoke` process that has loaded the libraries already, and what
    it says, `out` and `err`."""
    folder = tmp_path_factory.mktemp("server")
    for name in ("commands", "codes"):
        os.mkfifo(folder / name)
    process = context.Process(target=smoke.serve_pipes, args=(str(folder),))
    process.start()
    yield folder
    process.kill()  # it waits, where a script has not come as far as to its pipes
    process.join()


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(tmp_path, server, name):
    before, said = listing(tmp_path), [server / "out", server / "err"]
    with open(said[0], "a") as out, open(said[1], "a") as err:
        done = bash(
            ROOT / f"check/{name}.sh",
            tmp_path,
            True,
            env={"SMOKE_SERVER": str(server)},
            stdout=out,
            stderr=err,
        )
    assert done.returncode == 0, said[0].read_text() + said[1].read_text()
    assert said[0].read_text() and listing(tmp_path) == before


def test_without_a_gpu_its_report_says_what_would_run(tmp_path):
    done = bash(ROOT / "check/gpu.sh", tmp_path, False)
    assert done.returncode == 0 and "recipe.py" in done.stdout and not os.listdir(tmp_path)


def test_what_the_roofline_predicts_stands_beside_what_was_measured():
    roofline = (
        "| bf16, sync | 250, 30 | 7000 | 25.6 | 107 | 28 | 32 | 51 | 34 | memory | 11.4 | 3.7 |"
    )
    recipe = "| bf16 | 60.5 (60.1 to 61.0) | 700 | **11.00** | 0.99999 | 0.99900 | 250 |"
    assert gpu_report.against_measured(roofline, recipe)[2:] == ["| bf16 | 51 | 60.5 | 1.19 |"]


def test_the_first_failure_ends_a_script(tmp_path):
    done = bash(ROOT / "check/train_mnist.sh", tmp_path, True, "--act", "relu")
    assert done.returncode == 2 and done.stderr.count("--act") == 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("train_cifar10", "ep-symmetric-cel\n"),
        ("evaluate", "RUN"),
        ("corruptions", "2.9 GB"),
        ("attack_sweep", "RUN"),
        ("audit", "RUN"),
    ],
)
def test_without_arguments_scripts_say_what_they_need(tmp_path, name, said):
    """Also in a copy without .venv: before they set anything up."""
    shutil.copytree(ROOT / "check", tmp_path / "check")
    done = bash(tmp_path / f"check/{name}.sh", tmp_path, False)
    assert (
        done.returncode == 2
        and said in done.stdout
        and not done.stderr
        and os.listdir(tmp_path) == ["check"]
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_lines_say_what_it_needs(name):
    assert any(
        "Needs: " in line for line in (ROOT / f"check/{name}.sh").read_text().splitlines()[1:5]
    )


def test_side_by_side_a_command_that_fails_stops_no_other(tmp_path):
    """What each says begins with its number; words in quotes are one; the whole fails where one
    has."""
    lines = "--task digits --archi 784 4 10 --data-dir 'a b' \n--act relu\n--task digits --archi 784 5 10\n"
    script = f'source {ROOT}/check/common.sh mnist; cd "$1"; GPUS=0 processes=2; printf %s "$2" | side_by_side'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(tmp_path), lines], capture_output=True, text=True
    )
    assert done.returncode == 123 and "[2] main.py: error: argument --act" in done.stdout
    assert (
        all(f"[{n}] epoch 1/1: train" in done.stdout for n in (1, 3))
        and "[1] main.py --task digits" in done.stdout
    )


@pytest.mark.parametrize(
    "environment, words, said",
    [
        ({"GPUS": "two"}, (), "GPUS=two: expected a number"),
        ({"ONLY": "trian"}, (), "ONLY=trian: unknown stage; choose from train"),
        ({"ONLY": "attack"}, (), "no complete training in"),
        ({"DATA": "it's"}, (), "quotes, backslashes"),
        (
            {"ONLY": "attack", "before": "--seed 1"},
            ("--precision", "tf32"),
            "started with the further flags '--seed 1'",
        ),
        ({"ONLY": "attack", "locked": "1"}, (), "another copy"),
    ],
)
def test_the_paper_refuses_what_would_spoil_it(tmp_path, environment, words, said):
    if "before" in environment:
        (tmp_path / ".flags").write_text(environment["before"] + "\n")
    with open(tmp_path / ".lock", "w") as lock:
        if "locked" in environment:
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["bash", ROOT / "check/paper_cifar10.sh", *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PAPER": str(tmp_path), **environment},
        )
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


# ---- setup.sh, with an interpreter and installers that only write down what they are asked for

INTERPRETER = """#!/bin/bash
case "$1 $2" in
    "-m venv") echo venv >>"$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo install >>"$LOG"; sleep 0.3 ;;
    *) exec "$REAL" "$@" ;;
esac
"""
UV = """#!/bin/bash
case "$1" in
    venv) "$4" -m venv "$5" ;;
    pip) echo install >>"$LOG" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Starts check/setup.sh of a copy of the project, `tmp_path`/copy; `tmp_path`/log has what it
    has built."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cmp", "cp", "dirname", "find", "flock", "mkdir", "sleep"):
        os.symlink(shutil.which(name), tmp_path / "bin" / name)
    for folder in (tmp_path / "bin", tmp_path / "with-uv"):
        folder.mkdir(exist_ok=True)
        (folder / "python3").write_text(INTERPRETER)
    (tmp_path / "with-uv/uv").write_text(UV)
    for path in (*tmp_path.glob("*/python3"), tmp_path / "with-uv/uv"):
        path.chmod(0o755)
    shutil.copytree(ROOT / "check", tmp_path / "copy/check")
    shutil.copy(ROOT / "requirements.txt", tmp_path / "copy")

    def start(uv=False):
        path = f"{tmp_path / 'with-uv'}:{tmp_path / 'bin'}" if uv else str(tmp_path / "bin")
        environment = {"PATH": path, "LOG": str(tmp_path / "log"), "REAL": sys.executable}
        return subprocess.Popen(
            ["bash", tmp_path / "copy/check/setup.sh"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_set_ups_that_start_together_build_once(setup, tmp_path):
    started = [setup() for _ in range(3)]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert (tmp_path / "log").read_text().split() == ["venv", "install"]
    assert sum("waiting for another process" in text for text in said) == 2
    again = setup()
    assert again.communicate(timeout=60)[1] == "" and again.returncode == 0
    assert sorted(os.listdir(tmp_path / "copy")) == [".venv", "check", "requirements.txt"]


@pytest.mark.parametrize(
    "uv, state",
    [(True, "gone"), (True, "does not start"), (True, "another version"), (False, "gone")],
)
def test_an_environment_whose_interpreter_is_gone_is_built_again(setup, tmp_path, uv, state):
    environment = tmp_path / "copy/.venv"
    assert setup(uv).wait(60) == 0
    (environment / "stale").touch()
    interpreter = environment / "bin/python"
    interpreter.unlink()
    if state == "gone":
        interpreter.symlink_to(tmp_path / "python3.9")
    elif state == "does not start":
        interpreter.write_text("#!/bin/bash\nexit 127\n")
        interpreter.chmod(0o755)
    else:  # packages of the version before
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        library = next(environment.glob("lib/python3.*"))
        library.rename(library.with_name("python3.9"))
    assert setup(uv).wait(60) == 0
    assert (tmp_path / "log").read_text().split() == 2 * ["venv", "install"]
    assert not (environment / "stale").exists()


def test_a_script_does_not_empty_the_file_that_a_lock_leads_to(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/.lock").symlink_to(tmp_path / "precious")
    script = f'source {ROOT}/check/common.sh mnist; enter "$1" ""'
    subprocess.run(["bash", "-c", script, "bash", str(tmp_path / "folder")], check=True, timeout=60)
    assert (tmp_path / "precious").read_text() == "precious"
