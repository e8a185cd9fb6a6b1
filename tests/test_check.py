"""Every script of check/ runs, with SMOKE=1, from anywhere, and leaves nothing behind."""
import os
import shutil
import subprocess
import tempfile

import gpu_report
import pytest
from conftest import ROOT  # which makes benchmarks/ known

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


def test_without_a_gpu_its_report_says_what_would_run(tmp_path):
    done = bash(ROOT / "check/gpu.sh", tmp_path, False)
    assert done.returncode == 0 and "recipe.py" in done.stdout and not os.listdir(tmp_path)


def test_what_the_roofline_predicts_stands_beside_what_was_measured():
    roofline = "| bf16, sync | 250, 30 | 7000 | 25.6 | 107 | 28 | 32 | 51 | 34 | memory | 11.4 | 3.7 |"
    recipe = "| bf16 | 60.5 (60.1 to 61.0) | 700 | **11.00** | 0.99999 | 0.99900 | 250 |"
    assert gpu_report.against_measured(roofline, recipe)[2:] == ["| bf16 | 51 | 60.5 | 1.19 |"]


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
