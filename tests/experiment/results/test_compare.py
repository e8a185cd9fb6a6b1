"""--todo compare: groups of seeds, numbers as computed by hand, figures, published tables."""

import csv
import json
import math
import os
import pathlib
import shutil
import statistics
import sys

import pytest
from conftest import ROOT, context

import main
from data_utils import CORRUPTIONS
from experiment.plots import compare as plots
from experiment.results.compare import group_runs
from experiment.results.published import read_published
from experiment.results.read import read_run
from experiment.results.values import Group, Key, RunResults, Statistics
from experiment.runs.folder import RunFolder

TINY = (
    "--task digits --device -1 --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 --archi 784 8 10 "
    "--epochs 2 --save"
)


def dress(run, clean, seed):
    """Writes the tables of attacks and other commands into a run folder, with numbers that follow
    from the seed."""
    for attack, name, steps, grads in (
        ("pgd", "Adversarial_Accuracy", [4, 8], ("bptt@4", "bptt@8", "worst")),
        ("square", "Adversarial_Accuracy_square_inf", [4], ("square",)),
    ):
        told = {
            "attack": attack,
            "attack_norm": "inf" if attack == "square" else "2",
            "attack_step": steps,
            "attack_iters": 3,
            "seed": seed,
            "weights": f"{seed}",
        }
        (run / f"{name}.txt").write_text("# settings: " + json.dumps(told) + "\n")
        rows = [
            f"{eps},{grad},{clean},{(0.9 - 0.1 * seed) / (1 + n) / eps * 0.5:.6f},0,0,0.1"
            for eps in (0.5, 1.0)
            for n, grad in enumerate(grads)
        ]
        head = "eps,grad,clean,adversarial,masked,unmoved,mean_norm"
        (run / f"{name}.csv").write_text("\n".join([head, *rows, ""]))
    (run / "Audit_2_0.5.json").write_text(
        json.dumps(
            {
                "robust": 0.4 + 0.01 * seed,
                "trusted": seed != 2,
                "images": 50,
                "settings": {"budget": "quick"},
            }
        )
    )
    (run / "Corruption_Accuracy.txt").write_text(
        "# settings: {}\n"
        + "\n".join(
            f"{name} " + " ".join(f"{0.9 - 0.1 * s - 0.01 * seed:.6f}" for s in range(5))
            for name in ("fog", "snow")
        )
    )
    (run / "Characteristic_Time.txt").write_text(
        "# t accuracy\n" + "".join(f"{t} {0.1 * t:.6f} 0.5 1e-3 1\n" for t in range(1, 9))
    )


@pytest.fixture(scope="module")
def runs(zoo, tmp_path_factory):
    """Six run folders: two groups of three seeds, the last of the second without any attack, made
    of two trainings."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for name in ("EP", "BPTT"):
        first, found[name] = zoo(f"compared {name}"), []
        for seed in (1, 2, 3):
            run = root / f"{name}_{seed}"
            shutil.copytree(first, run)
            reseed(run, seed)
            if (name, seed) != ("BPTT", 3):
                dress(run, 0.9, seed)
            found[name].append(run)
    return found


def reseed(run, seed):
    """Makes the copy of a run one of another seed, with other accuracies."""
    import torch

    for name in ("model.pt", "checkpoint.tar"):
        if (run / name).exists():
            state = torch.load(run / name, weights_only=True)
            state["config"]["seed"] = seed
            for row in state["history"]:
                row["test_acc"] = 10.0 * seed + row["epoch"]
            torch.save(state, run / name)
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().split()]
    for row in rows[1:]:
        row[2:4] = [str(10.0 * seed + int(row[0])), str(seed)]
    (run / "metrics.csv").write_text("\n".join(",".join(row) for row in rows) + "\n")


@pytest.fixture
def comparison(ok, runs, tmp_path):
    out = ok(
        "--todo compare --labels EP BPTT --published",
        ROOT / "tests/published_digits.csv",
        "--load-path",
        *runs["EP"],
        *runs["BPTT"],
    )
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    assert str(folder.relative_to(tmp_path)) in out
    return folder


def test_the_numbers_are_those_computed_by_hand(comparison):
    with open(comparison / "comparison.csv") as file:
        rows = list(csv.DictReader(file))

    def numbers(group, **wanted):
        (row,) = (
            row
            for row in rows
            if row["group"] == group and all(row[k] == v for k, v in wanted.items())
        )
        return float(row["mean"]), float(row["std"]), int(row["n"])

    def by_hand(values):
        return pytest.approx(statistics.fmean(values), abs=1e-3), pytest.approx(
            statistics.stdev(values), abs=1e-3
        )

    last = numbers("EP", measure="clean")
    assert last[1:] == (pytest.approx(10.0), 3) and last[0] in (21.0, 22.0)
    assert numbers("EP", measure="seconds") == (4.0, 2.0, 3)
    worst = [100 * (0.9 - 0.1 * seed) / 3 * 0.5 for seed in (1, 2, 3)]
    assert numbers("EP", measure="adversarial", grad="worst", eps="1", norm="2") == (
        *by_hand(worst),
        3,
    )
    assert numbers("BPTT", measure="adversarial", grad="worst", eps="1", norm="2") == (
        *by_hand(worst[:2]),
        2,
    )
    first = [100 * (0.9 - 0.1 * seed) / 0.5 * 0.5 for seed in (1, 2, 3)]
    assert numbers("EP", measure="adversarial", steps="4", attack="pgd", eps="0.5") == (
        *by_hand(first),
        3,
    )
    assert numbers("EP", measure="audit") == (*by_hand([41, 42, 43]), 3)
    assert numbers("EP", measure="audit trusted")[0] == pytest.approx(66.6667, abs=1e-3)
    assert numbers("EP", measure="corruptions", eps="2") == (*by_hand([79, 78, 77]), 3)
    assert numbers("EP", measure="corruptions", eps="") == (*by_hand([69, 68, 67]), 3)
    text = (comparison / "comparison.md").read_text()
    assert (
        "| audit, robust at L2 0.5, quick, 50 images (%) | 42.00 ± 1.00 (3) | 41.50 ± 0.71 (2) |"
        in text
    )


@pytest.mark.usefixtures("full_figures")
def test_a_figure_for_all_that_runs_have(comparison):
    names = {path.name for path in comparison.iterdir() if path.suffix != ".txt"}
    assert names == {
        "comparison.md",
        "comparison.csv",
        "robustness_2.png",
        "robustness_inf.png",
        "training.png",
        "characteristic.png",
        "corruptions.png",
        "attack_steps.png",
    }
    for path in comparison.glob("*.png"):
        assert path.stat().st_size > 5000
        assert path.with_suffix(".txt").exists()  # its caption


def test_tables_of_15_and_of_19_corruptions_are_compared_by_the_15(ok, runs, tmp_path, monkeypatch):
    titles = []

    def save_figure(self, name, draw, *data):
        figure = draw(*data)
        lines = [line.get_label() for line in figure.axes[0].get_lines()]
        titles.append((name, figure.get_label(), lines))

    monkeypatch.setattr(RunFolder, "save_figure", save_figure)
    copies = []
    for n, (name, count) in enumerate((("EP", 15), ("EP", 19), ("BPTT", 15))):
        copies.append(shutil.copytree(runs[name][n], tmp_path / f"run{n}"))
        rows = [
            f"{kind} " + " ".join([f"{0.5 + (row >= 15) / 4 + n / 10:.6f}"] * 5)
            for row, kind in enumerate(CORRUPTIONS[:count])
        ]
        (copies[-1] / "Corruption_Accuracy.txt").write_text("\n".join(["# settings: {}", *rows]))
    ok("--todo compare --load-path", *copies)
    (table,) = (tmp_path / "results" / "compare").glob("*/*/comparison.csv")
    rows = [row for row in csv.DictReader(open(table)) if row["measure"] == "corruptions"]
    means = {
        (row["group"], row["detail"]): (float(row["mean"]), int(row["n"]))
        for row in rows
        if not row["eps"]
    }
    assert means == {
        ("MLP EP", "first 15 corruptions"): (55, 2),
        ("MLP BPTT", "first 15 corruptions"): (70, 1),
        ("MLP EP", "all 19 corruptions"): (pytest.approx(60 + 25 * 4 / 19, abs=1e-3), 1),
    }
    (figure,) = (told for told in titles if told[0] == "corruptions.png")
    assert "mean over first 15 corruptions" in figure[1] and {"MLP EP", "MLP BPTT"} <= set(
        figure[2]
    )


def test_runs_without_anything_leave_gaps(ok, runs, tmp_path):
    ok(
        "--todo compare --figures pdf --load-path",
        runs["BPTT"][2],
        runs["BPTT"][1] / "checkpoint.tar",
    )
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    assert (folder / "training.pdf").exists() and "MLP BPTT" in (
        folder / "comparison.csv"
    ).read_text()


def attacked(label, rows):
    """A group of as many runs as there are lists of rows, (gradient, eps, accuracy)."""
    keys = [
        [Key("adversarial", "pgd", "2", grad, "29", eps, "20 iterations") for grad, eps, _ in row]
        for row in rows
    ]
    return Group(
        label,
        [RunResults({}, dict(zip(k, (value for *_, value in row)))) for k, row in zip(keys, rows)],
    )


def test_curves_are_of_one_attack_and_of_all_runs():
    """A mean of fewer runs is no part of the curve, and what was attacked otherwise is compared by
    what all have."""
    both = attacked(
        "both",
        [
            [("smooth", 1, 60), ("worst", 1, 50), ("smooth", 2, 30)],
            [("smooth", 1, 70), ("worst", 1, 40)],
        ],
    )
    one = attacked("one", [[("smooth", 1, 65)]])
    (axes,) = plots.robustness([both, one], "2").axes
    lines = {
        (line.get_linestyle(), line.get_fillstyle()): line.get_xydata().tolist()
        for line in axes.get_lines()
        if line.get_color() == "C0"
    }
    assert lines == {("-", "full"): [[1, 65]], ("None", "none"): [[2, 30]]}
    assert axes.get_title() == "pgd\nsmooth@29, 20 iterations"
    (axes,) = plots.robustness([attacked("other", [[("bptt", 1, 65)]]), one], "2").axes
    assert "not the same for all" in axes.get_title() and "bptt@29" in axes.get_title()


def test_labels_say_what_differs(runs):
    groups = group_runs([read_run(run) for run in (*runs["EP"], *runs["BPTT"])])
    assert [(group.label, len(group.runs)) for group in groups] == [("MLP EP", 3), ("MLP BPTT", 3)]
    other = read_run(runs["EP"][0])
    other.args["T1"] = 9
    groups = group_runs([read_run(runs["EP"][0]), other])
    assert [group.label for group in groups] == ["MLP EP, T1 4", "MLP EP, T1 9"]


def test_the_published_tables_are_read():
    groups = read_published([*(ROOT / "check/published").glob("*.csv")], {"CIFAR10"})
    labels = [group.label for group in groups]
    ep = next(group for group in groups if group.label == "published: EP-CNN")
    assert any(len(run.characteristic) > 50 for run in ep.runs)
    key = next(key for key in ep.keys() if key.attack == "pgd" and key.norm == "2")
    pgd = Statistics.of(ep.values(key))
    assert pgd.n == 5 and 0 <= pgd.mean <= 100
    assert any("adversarially trained" in label for label in labels) and "published: ViT" in labels
    assert len(ep.values(Key("corruptions", eps=3))) >= 5


@pytest.mark.parametrize(
    "words, message",
    [
        ("--todo compare", "needs runs"),
        ("--todo compare --load-path nowhere", "is no folder"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(cli, words, message):
    code, _, err = cli(words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
    assert not pathlib.Path("results").exists()


def test_flags_without_an_effect_are_noted(cli, runs):
    code, _, err = cli("--todo compare --epochs 3 --eps 1 --load-path", *runs["EP"])
    assert (
        code == 0
        and "--epochs has no effect on compare" in err
        and "--eps has no effect on compare" in err
    )


def test_wrong_labels_and_tables_are_refused(cli, runs, tmp_path):
    code, _, err = cli("--todo compare --labels a b --load-path", *runs["EP"])
    assert code == 2 and "expected 1" in err
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    code, _, err = cli("--todo compare --published table.csv --load-path", *runs["EP"])
    assert code == 2 and "has no results of digits" in err and len(err.splitlines()) == 1
    code, _, err = cli("--todo compare --published none.csv --load-path", *runs["EP"])
    assert code == 2 and "none.csv cannot be read" in err


EVIL = "<script>alert(1)</script>|\x1b[31m"
FORMULA = "=HYPERLINK(0)"


SWEEP, EPOCHS = "eps,grad,adversarial\n", "epoch,train_acc,test_acc,seconds\n"


def settings(**more):
    told = {"attack": "pgd", "attack_norm": "2", "images": 20, **more}
    return f"# settings: {json.dumps(told)}\n"


def audit(robust=0.5, **more):
    return json.dumps({"robust": robust, "trusted": True, "settings": {"budget": "quick"}, **more})


ODD = {  # name: {file: content}, whose values must not be used
    "deep JSON": {
        "Audit_2_0.5.json": "[" * 10**5,
        "Adversarial_Accuracy.txt": "# settings: " + "[" * 10**5,
    },
    "deep settings": {
        "Adversarial_Accuracy.txt": settings(attack_step=json.loads("[" * 90 + "]" * 90))
    },
    "no numbers": {
        "Audit_2_0.5.json": audit(math.nan, images=math.inf),
        "metrics.csv": EPOCHS + "nan,1,1,1\n1,1,Infinity,-Infinity\n1e400,1,1,1\n",
        "Characteristic_Time.txt": "1 nan\n2 inf\n3 1e300\n",
        "Corruption_Accuracy.txt": "fog nan inf\n",
    },
    "numbers out of range": {
        "Audit_2_0.5.json": audit(10**400),
        "Audit_2_1.json": audit(1e308, images=10**40),
        "Adversarial_Accuracy.csv": SWEEP + "1e-320,bptt,0.5\n0.5,bptt,-1\n",
        "metrics.csv": EPOCHS + "1,1,1e308,1e308\n2,1,1e308,1e308\n",
    },
    "many steps": {
        "Adversarial_Accuracy.txt": settings(attack_step=10**400),
        "Adversarial_Accuracy.csv": SWEEP + f"0.5,a@{'9' * 5000},1\n0.5,a@\u00b2,1\n",
    },
    "an audit of nothing": {
        "Audit_2_0.5.json": "[1]",
        "Audit_2_1e-320.json": audit(),
        "Audit_x.json": "{}",
    },
    "missing columns": {
        "Adversarial_Accuracy.csv": "eps,adversarial,grad\n0.5,0.5\n0.5\n",
        "Adversarial_Accuracy.txt": settings(),
        "metrics.csv": "a,b\n1,2,3\n",
    },
    "no text": {
        name: bytes(range(256)) * 40
        for name in (
            "metrics.csv",
            "Corruption_Accuracy.txt",
            "Characteristic_Time.txt",
            "Audit_2_0.5.json",
        )
    },
    "a long cell": {"metrics.csv": "epoch,test_acc\n1," + "5" * 10**6 + "\n"},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tables_of_a_run_are_gaps_or_one_line(cli, runs, tmp_path, name):
    run = shutil.copytree(runs["EP"][0], tmp_path / "run")
    for file, content in ODD[name].items():
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = cli("--todo compare --load-path", run)
    assert code == 0 or code == 2 and err.count("\n") == 1 and str(run) in err, err
    for path in (tmp_path / "results").rglob("comparison.*"):
        assert not any(word in path.read_text() for word in ("nan", "e-320", "e+", "999"))


def enter(folder, words, log):
    os.chdir(folder)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(log, "w", buffering=1)
    sys.exit(main.main(words))


@pytest.mark.parametrize("todo", ["compare", "evaluate", "attack"])
def test_no_pipe_is_waited_for(runs, tmp_path, todo):
    run = shutil.copytree(runs["EP"][0], tmp_path / "run")
    for path in run.iterdir():
        if path.suffix in (".txt", ".csv", ".json", ".npz"):
            path.unlink()
            os.mkfifo(path)
    words = {
        "compare": "--todo compare",
        "evaluate": "--todo evaluate --device -1",
        "attack": "--todo attack --eps-list 0.5 --attack-iters 1 --device -1",
    }[todo]
    words = [*words.split(), "--load-path", str(run)]
    process = context.Process(target=enter, args=(tmp_path, words, tmp_path / "err"))
    process.start()
    process.join(60)
    ended, err = process.exitcode, (tmp_path / "err").read_text()
    process.kill()
    assert ended in (0, 1, 2) and "Traceback" not in err, err
    assert err.count("error:") == (ended != 0)
    assert ended == 0 or str(run) in err


def test_what_is_shown_of_a_run_is_text(ok, runs, tmp_path):
    """No HTML, formula, cell of its own or order to a terminal, whichever table it is from."""
    run = shutil.copytree(runs["EP"][0], tmp_path / "run")
    (run / "Adversarial_Accuracy.txt").write_text(
        settings(attack=EVIL, budget=FORMULA + EVIL, attack_start=EVIL)
    )
    (run / "Adversarial_Accuracy.csv").write_text(
        SWEEP + f"0.5,{FORMULA},0.5\n0.5,$\\foo$@{EVIL},0.5\n"
    )
    (run / "Audit_2_0.5.json").write_text(audit(settings={"budget": "+" + EVIL}))
    (tmp_path / "published.csv").write_text(
        "task,model,attack,norm,eps,adversarial\n"
        f"digits,{EVIL},@pgd,2,0.5,0.5\ndigits,x,pgd,{FORMULA},0.5,0.5\n"
    )
    out = ok(
        "--todo compare --published published.csv --labels",
        "=<script>alert(1)</script>|$\\foo$",
        "--load-path",
        run,
    )
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    markdown, table = ((folder / f"comparison.{end}").read_text() for end in ("md", "csv"))
    assert "\x1b" not in out + markdown + table and "<" not in out + markdown
    assert "&lt;script>alert(1)&lt;/script>\\|" in markdown and "&lt;script>" in out
    rows = list(csv.reader(table.splitlines()))
    assert len({len(row) for row in rows}) == 1
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for row in rows for cell in row)
    assert any(cell == "'" + FORMULA for row in rows for cell in row)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_damaged_tables_of_a_run_are_gaps(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["EP"][0], run)
    (run / "Audit_2_0.5.json").write_text("{")
    (run / "Adversarial_Accuracy.csv").write_text("eps,grad,adversarial\nx,bptt,1\n,,\n1\n")
    (run / "Characteristic_Time.txt").write_text("1\nnan x\n")
    (run / "Corruption_Accuracy.txt").write_bytes(b"fog \xff 0.5\n")
    found = read_run(run)
    assert not any(key.measure.startswith("audit") or key.attack == "pgd" for key in found.values)
    assert found.characteristic == []
