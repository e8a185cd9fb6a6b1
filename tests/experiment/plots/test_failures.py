"""Figures that cannot be drawn or written: a line on standard error each, and no result is lost."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT, ZOO, only_run

from experiment.plots import training
from experiment.runs.folder import RunFolder
from experiment.training import Recorder

TINY = ZOO["tiny"]
# command: (the results that are there before the first figure is drawn, figures)
TODOS = {
    "evaluate --save": (["predictions.csv"], ["confusion.png"]),
    "attack --eps-list 0.5 --attack-iters 1 --attack-step 2 --save": (
        ["Adversarial_Accuracy.csv", "Adversarial_Accuracy.txt", "Adversarial_Accuracy_images.npz"],
        ["Adversarial_Accuracy.png", "Adversarial_Accuracy_images.png"],
    ),
    "audit --eps 0.5 --budget quick --test-size 2 --attack-step 2 --seed 1": (
        ["Audit_2_0.5.json", "Audit_2_0.5.npz", "Audit_2_0.5.txt"],
        ["Audit_2_0.5.png"],
    ),
    "characteristic": (
        ["Characteristic_Time.txt"],
        ["Characteristic_Energy.png", "Characteristic_Time.png"],
    ),
    "gducheck --save": (
        ["BPTT.tar", "EP.tar", "gducheck.csv"],
        [
            "gdu_layers.png",
            "gdu_neurons_0.png",
            "gdu_neurons_1.png",
            "gdu_overview.png",
            "gdu_synapses.0.bias.png",
            "gdu_synapses.0.weight.png",
            "gdu_synapses.1.bias.png",
            "gdu_synapses.1.weight.png",
        ],
    ),
}
RESULTS = ["checkpoint.tar", "final_checkpoint.tar", "final_model.pt", "metrics.csv", "model.pt"]
WARNING = re.compile(r"warning: (\S+) was not drawn: (.+)")


@pytest.fixture
def run(zoo, tmp_path):
    return zoo.copy("tiny", tmp_path)


@pytest.fixture
def failing(monkeypatch):
    """Makes every figure fail with an exception: returns the files that lay beside each one when it
    was drawn."""
    seen = []

    def fail_with(error):
        def savefig(figure, path, **_):
            seen.append({file.name for file in pathlib.Path(path).parent.iterdir()})
            raise error

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
        return seen

    return fail_with


def undrawn(err):
    """{figure: reason} of standard error, which holds nothing else."""
    lines = [WARNING.fullmatch(line) for line in err.splitlines()]
    assert all(lines), err
    assert len({line[1] for line in lines}) == len(lines)
    return {pathlib.Path(line[1]).name: line[2] for line in lines}


ERRORS = [MemoryError(), RuntimeError("no\n  such\nfont"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_training_goes_on_without_its_figures(cli, tmp_path, monkeypatch, failing, error):
    seen = failing(error)
    monkeypatch.setattr(
        Recorder, "DRAW", 0
    )  # after every epoch, and yet there is one line for each figure
    code, out, err = cli(TINY, "--epochs 3")
    run = only_run(tmp_path)
    assert (
        code == 0 and "epoch 3/3" in out and set(RESULTS) <= {path.name for path in run.iterdir()}
    )
    reason = {MemoryError: "MemoryError", RuntimeError: "no such font", OSError: "no space left"}[
        type(error)
    ]
    assert undrawn(err) == {"neural_activity.png": reason, "train-test_acc.png": reason}
    assert len(seen) == 6 and all({"metrics.csv", "checkpoint.tar"} <= files for files in seen)
    assert not list(run.glob("*.png")) and not list(run.glob(".*"))


@pytest.mark.parametrize("todo", TODOS)
def test_what_examines_a_run_keeps_its_results_without_figures(cli, run, failing, todo):
    seen, (results, names) = failing(ValueError("nothing can be drawn")), TODOS[todo]
    code, out, err = cli(f"--todo {todo} --device -1 --load-path {run}")
    assert code == 0 and out and set(results) <= {path.name for path in run.iterdir()}
    assert undrawn(err) == dict.fromkeys(names, "nothing can be drawn")
    assert set(results) <= seen[0]


def test_a_comparison_keeps_its_table_without_figures(cli, ok, run, tmp_path, failing):
    ok(f"--todo characteristic --device -1 --load-path {run}")
    seen = failing(ValueError("nothing can be drawn"))
    code, out, err = cli("--todo compare --load-path", run)
    assert code == 0 and "clean accuracy" in out
    assert set(undrawn(err)) == {"characteristic.png", "training.png"}
    assert all({"comparison.csv", "comparison.md"} <= files for files in seen)


def test_a_matplotlib_that_cannot_be_imported_is_a_line_for_each_figure(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli(TINY)
    assert code == 0 and set(undrawn(err)) == {"neural_activity.png", "train-test_acc.png"}
    assert (only_run(tmp_path) / "final_model.pt").exists()


@pytest.mark.usefixtures("full_figures")
def test_figures_are_the_same_whatever_settings_matplotlib_has(tmp_path):
    import matplotlib

    rows = [{"epoch": n, "train_acc": 50.0 + n, "test_acc": 49.0 + n} for n in range(1, 6)]
    run = RunFolder(tmp_path)
    run.save_figure("a.png", training.accuracy, rows)
    plain = (tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context(
        {
            "text.usetex": True,
            "lines.linewidth": 20,
            "savefig.facecolor": "black",
            "savefig.bbox": "tight",
            "font.size": 30,
            "axes.formatter.use_mathtext": True,
        }
    ):
        run.save_figure("a.png", training.accuracy, rows)
    assert (tmp_path / "a.png").read_bytes() == plain


@pytest.mark.slow
def test_the_users_own_matplotlibrc_and_backend_have_no_influence(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: True\nno key\n\xff")
    environment = {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *TINY.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert {path.name for path in only_run(tmp_path).glob("*.png")} == {
        "neural_activity.png",
        "train-test_acc.png",
    }
