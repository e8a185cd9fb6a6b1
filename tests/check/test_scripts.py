"""The scripts of check/: every command line in them is one that the suite accepts, three run for
real, and what they need is said before anything is set up."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

import gpu_report
import pytest
import smoke
from conftest import ROOT, context  # which makes benchmarks/ known

import main
import main_dropout
from experiment import command_line, study, validate

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "check").glob("*.sh")
    if path.stem not in ("setup", "test", "common")
)
# Between them they train every model but the ViT by every rule, and use every --todo but gducheck
# and corruptions, which the tests of main.py run; gpu runs the benchmarks.
RUN_FOR_REAL = [
    "quickstart",
    pytest.param("study_mnist", marks=pytest.mark.slow),
    pytest.param("gpu", marks=pytest.mark.slow),
]
PROGRAMS = {"main.py": main.FLAGS, "main_dropout.py": main_dropout.FLAGS}


def bash(script, tmp, *words, **options):
    """Runs a script from another folder; options: env, added to this process's; those of
    subprocess."""
    environment = {**os.environ, "TMPDIR": str(tmp), **options.pop("env", {})}
    return subprocess.run(
        ["bash", str(script), *words],
        cwd=tempfile.gettempdir(),
        text=True,
        env=environment,
        timeout=400,
        **(options or {"capture_output": True}),
    )


# ------------------------------------------------------------------------------ read as data

RECORDER = """#!/bin/bash
line=$(printf '%q ' "$@")
echo "$line" >>"$LOG"
echo "epoch 1/1: train"
case " $* " in *" --act relu "*) echo "main.py: error: argument --act" >&2; exit 2 ;; esac
"""


class Copy:
    """A copy of check/ whose interpreter only writes down the command lines that it gets."""

    def __init__(self, folder):
        self.folder, self.log = folder / "copy", folder / "log"
        shutil.copytree(ROOT / "check", self.folder / "check")
        (self.folder / "check/setup.sh").write_text("exit 0\n")
        (self.folder / ".venv/bin").mkdir(parents=True)
        (self.folder / ".venv/bin/python").write_text(RECORDER)
        (self.folder / ".venv/bin/python").chmod(0o755)

    def run(self, name, *words, **environment):
        """(the finished script, the command lines that it started: a list of words each)"""
        self.log.write_text("")
        environment = {"LOG": str(self.log), **environment}
        done = bash(self.folder / f"check/{name}.sh", self.folder.parent, *words, env=environment)
        return done, [shlex.split(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


def program_and_words(command):
    """The program of the suite that a recorded command line starts, also through torchrun, and its
    own words."""
    n = next(n for n, word in enumerate(command) if pathlib.Path(word).name in PROGRAMS)
    return pathlib.Path(command[n]).name, command[n + 1 :]


def trained(command):
    """The arguments that a run of this training records."""
    program, words = program_and_words(command)
    given = command_line.parse(words, PROGRAMS[program])
    given.pop("seeds", None)
    return command_line.resolve(given).flat()


@pytest.fixture
def accepted(tmp_path, monkeypatch, capsys):
    """Asserts that the suite accepts a command line: `accepted(command, saved)` goes through all
    that main.py does before it loads a model. saved: the arguments of the run of --load-path."""
    monkeypatch.chdir(tmp_path)

    def check(command, saved=None):
        program, words = program_and_words(command)

        def work(given, *_, **__):
            if "load_path" in given and given["todo"] != "compare":
                validate.validate(command_line.resolve(given, saved))
            return 0

        monkeypatch.setattr(main, "work", work)
        monkeypatch.setattr(study.Study, "do", lambda *_: 0)
        code = main.main(words, PROGRAMS[program], program)
        err = capsys.readouterr().err
        assert code == 0, (words, err)
        assert not err, (words, err)

    return check


@pytest.mark.parametrize("name", [*SCRIPTS, "setup", "test", "common"])
def test_bash_can_parse_it(name):
    done = subprocess.run(
        ["bash", "-n", ROOT / f"check/{name}.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert not done.stderr


@pytest.mark.parametrize(
    "name, lines",
    [
        ("quickstart", 1),
        ("train_mnist", 5),
        ("train_mnist_cep", 2),
        ("train_mnist_cnn", 6),
        ("gdu_check_mnist", 3),
        ("gdu_check_cifar10", 1),
        ("train_cifar10_parallel", 1),
    ],
)
def test_every_training_of_a_script_is_accepted(copy, accepted, name, lines):
    done, commands = copy.run(name, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert len(commands) == lines
    for command in commands:
        assert command[-2:] == ["--epochs", "3"]
        accepted(command)


def test_every_cifar10_recipe_is_accepted(copy, accepted):
    names = copy.run("train_cifar10")[0].stdout.split()
    assert len(names) == 12
    for name in names:
        done, commands = copy.run("train_cifar10", name, "--epochs", "3")
        assert done.returncode == 0, done.stderr
        assert len(commands) == 1
        assert ("dropout" in name) == commands[0][0].endswith("main_dropout.py")
        accepted(commands[0])


def test_recipes_in_parallel_start_by_torchrun(copy, accepted):
    done, (command,) = copy.run("train_cifar10_parallel", GPUS="3")
    assert done.returncode == 0
    assert command[:2] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc_per_node") + 1] == "3"


@pytest.mark.parametrize(
    "name, lines",
    [
        ("evaluate", 1),
        ("characteristic", 1),
        ("corruptions", 1),
        ("audit", 2),
        ("attack_sweep", 14),
        ("gdu_check_cifar10", 1),
    ],
)
def test_every_command_on_a_run_is_accepted(copy, accepted, name, lines):
    (training,) = copy.run("train_cifar10", "ep-symmetric-cel")[1]
    done, commands = copy.run(name, "RUN", "--test-size", "40")
    assert done.returncode == 0, done.stderr
    assert len(commands) == lines
    for command in commands:
        assert command[command.index("--load-path") + 1] == "RUN"
        assert "--test-size 40" in " ".join(command)
        accepted(command, trained(training))


@pytest.mark.parametrize(
    "name, folder, processes, models, seeds, todos",
    [
        ("study_mnist", "STUDY", {"PROCESSES": "3"}, 5, 3, "study audit characteristic compare"),
        (
            "paper_cifar10",
            "PAPER",
            {"GPUS": "3"},
            7,
            5,
            "study attack audit corruptions characteristic compare",
        ),
    ],
)
def test_every_command_of_a_study_is_accepted(
    copy, accepted, tmp_path, name, folder, processes, models, seeds, todos
):
    """Those of folders of runs, by each model in them."""
    data = tmp_path / "data"
    (data / "CIFAR-10-C").mkdir(parents=True)
    environment = {folder: str(tmp_path / "study"), "DATA": str(data), **processes}
    done, commands = copy.run(name, **environment)
    assert done.returncode == 0, done.stderr
    given = [command_line.parse(program_and_words(command)[1]) for command in commands]
    assert list(dict.fromkeys(flags["todo"] for flags in given)) == todos.split()
    shared = [command for command, flags in zip(commands, given) if flags["todo"] == "study"]
    studies = {tuple(words[: words.index("--device")]) for words in shared}
    assert len(shared) == 3 * len(studies) and len({words[-1] for words in shared}) == (
        1 if name == "study_mnist" else 3
    )
    own = study.Study(next(flags for flags in given if flags["todo"] == "study"), [])
    assert len(own.models) == models and len(own.runs) * len(own.seeds) == models * seeds
    for command, flags in zip(commands, given):
        folders = flags.get("load_path", [])
        assert folders == [] or flags["todo"] != "study"
        rules = {path.removeprefix("results").lstrip("/") for path in folders}
        of_folders = [
            model.config.flat()
            for model in own.models
            if rules & {"", model.config.learning.alg} and flags["todo"] != "compare"
        ]
        for saved in of_folders or [None]:
            if flags["todo"] == "characteristic":
                assert saved["alg"] != "BP"
            accepted(command, saved)


def test_every_command_of_the_gpu_report_is_accepted(copy, accepted):
    done, commands = copy.run("gpu", "--minutes", "3")
    assert done.returncode == 0
    assert commands == [["benchmarks/gpu_report.py", "--minutes", "3"]]
    for part in gpu_report.PARTS:
        for words in (part.words, part.small):
            if words.startswith("main.py"):
                accepted(shlex.split(words))


# ------------------------------------------------------------------------------------ for real


def listing(tmp):
    return [sorted(os.listdir(folder)) for folder in (ROOT, ROOT / "results", tmp)]


@pytest.fixture
def server(tmp_path_factory):
    """A folder with the pipes of a `smoke` process that has loaded the libraries already, and what
    it prints, `out` and `err`."""
    folder = tmp_path_factory.mktemp("server")
    for name in ("commands", "codes"):
        os.mkfifo(folder / name)
    process = context.Process(target=smoke.serve_pipes, args=(str(folder),))
    process.start()
    yield folder
    process.kill()  # it waits, where a script has not come as far as to its pipes
    process.join()


@pytest.mark.parametrize("name", RUN_FOR_REAL)
def test_it_runs_and_leaves_nothing_behind(tmp_path, server, name):
    before, printed = listing(tmp_path), [server / "out", server / "err"]
    with open(printed[0], "a") as out, open(printed[1], "a") as err:
        done = bash(
            ROOT / f"check/{name}.sh",
            tmp_path,
            env={"SMOKE": "1", "SMOKE_SERVER": str(server)},
            stdout=out,
            stderr=err,
        )
    assert done.returncode == 0, printed[0].read_text() + printed[1].read_text()
    assert printed[0].read_text()
    assert listing(tmp_path) == before


def test_without_a_gpu_its_report_says_what_would_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_report.main() == 0
    assert "recipe.py" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


def test_what_the_roofline_predicts_stands_beside_what_was_measured():
    roofline = (
        "| bf16, sync | 250, 30 | 7000 | 25.6 | 107 | 28 | 32 | 51 | 34 | memory | 11.4 | 3.7 |"
    )
    recipe = "| bf16 | 60.5 (60.1 to 61.0) | 700 | **11.00** | 0.99999 | 0.99900 | 250 |"
    assert gpu_report.against_measured(roofline, recipe)[2:] == ["| bf16 | 51 | 60.5 | 1.19 |"]


def test_the_first_failure_ends_a_script(copy):
    done, commands = copy.run("train_mnist", "--act", "relu")
    assert done.returncode == 2
    assert done.stderr.count("--act") == 1
    assert len(commands) == 1


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
    done = bash(tmp_path / f"check/{name}.sh", tmp_path)
    assert done.returncode == 2
    assert said in done.stdout
    assert not done.stderr
    assert os.listdir(tmp_path) == ["check"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_lines_say_what_it_needs(name):
    assert any(
        "Needs: " in line for line in (ROOT / f"check/{name}.sh").read_text().splitlines()[1:9]
    )


def test_side_by_side_a_command_that_fails_stops_no_other(copy):
    """The lines of each command begin with its number; words in quotes are one; the whole fails
    where one has."""
    lines = "--task digits --archi 784 4 10 --data-dir 'a b' \n--act relu\n--task digits --archi 784 5 10\n"
    script = copy.folder / "check/three.sh"
    script.write_text(
        f'source {copy.folder}/check/common.sh mnist\nGPUS=0 processes=2\nprintf %s "$1" | side_by_side\n'
    )
    done, commands = copy.run("three", lines)
    assert done.returncode == 123
    assert "[2] main.py: error: argument --act" in done.stdout
    assert "[1] main.py --task digits" in done.stdout
    for n in (1, 3):
        assert f"[{n}] epoch 1/1: train" in done.stdout
    program = str(copy.folder / "main.py")
    device = ["--device", "-1"]
    assert sorted(commands) == [
        [program, "--act", "relu", *device],
        [program, *"--task digits --archi 784 4 10 --data-dir".split(), "a b", *device],
        [program, *"--task digits --archi 784 5 10".split(), *device],
    ]


@pytest.mark.parametrize(
    "environment, words, said",
    [
        ({"GPUS": "two"}, (), "GPUS=two: expected a number"),
        ({"ONLY": "trian"}, (), "ONLY=trian: unknown stage; choose from study"),
        ({"DATA": "it's"}, (), "quotes, backslashes"),
        ({}, ("--data-dir", "it's"), "quotes, backslashes"),
    ],
)
def test_the_paper_refuses_what_would_spoil_it(tmp_path, environment, words, said):
    done = subprocess.run(
        ["bash", ROOT / "check/paper_cifar10.sh", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PAPER": str(tmp_path), **environment},
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# ---- setup.sh, with an interpreter and installers that only write down what they are asked for

INTERPRETER = """#!/bin/bash
case "$1 $2" in
    "-m venv") echo venv >>"$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo install >>"$LOG"; case " $* " in *quiet*) ;; *) echo Collecting torch ;; esac; sleep 0.3 ;;
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
    steps = ["building .venv", "step 1 of 2: creating .venv", "step 2 of 2: installing", "done"]
    (builder,) = [text for text in said if "waiting" not in text]
    lines = [line for line in builder.splitlines() if line.startswith("setup: ")]
    assert [line.startswith(f"setup: {step}") for line, step in zip(lines, steps, strict=True)]
    assert "Collecting" in builder  # pip's own progress
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
