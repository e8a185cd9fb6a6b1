"""Every script of check/ runs, with SMOKE=1, from anywhere, and leaves nothing behind."""
import os
import shutil
import subprocess
import tempfile

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "check").glob("*.sh") if path.stem not in ("setup", "test", "common"))


def listing(tmp):
    return [sorted(os.listdir(folder)) for folder in (ROOT, ROOT / "results", tmp)]


def bash(script, tmp, smoke, *words):
    environment = {**os.environ, "TMPDIR": str(tmp)}
    environment.pop("SMOKE", None)
    return subprocess.run(["bash", str(script), *words], cwd=tempfile.gettempdir(), capture_output=True, text=True,
                          env={**environment, **({"SMOKE": "1"} if smoke else {})})


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(tmp_path, name):
    before = listing(tmp_path)
    done = bash(ROOT / f"check/{name}.sh", tmp_path, True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout and listing(tmp_path) == before


def test_the_first_failure_ends_a_script(tmp_path):
    done = bash(ROOT / "check/train_mnist.sh", tmp_path, True, "--act", "relu")
    assert done.returncode == 2 and done.stderr.count("--act") == 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize("name, said", [("train_cifar10", "ep-symmetric-cel\n"), ("evaluate", "RUN"),
                                        ("corruptions", "2.9 GB"),
                                        ("attack_sweep", "RUN"), ("audit", "RUN")])
def test_without_arguments_scripts_say_what_they_need(tmp_path, name, said):
    """Also in a copy without .venv: before they set anything up."""
    shutil.copytree(ROOT / "check", tmp_path / "check")
    done = bash(tmp_path / f"check/{name}.sh", tmp_path, False)
    assert done.returncode == 2 and said in done.stdout and not done.stderr and os.listdir(tmp_path) == ["check"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_lines_say_what_it_needs(name):
    assert any("Needs: " in line for line in (ROOT / f"check/{name}.sh").read_text().splitlines()[1:5])
