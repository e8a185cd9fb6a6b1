"""--todo audit: what it writes, that it goes on after a kill, and what its checks say."""

import csv
import io
import json
import os
import re
import shutil
import signal
import sys
import zipfile

import numpy as np
import pytest
from conftest import context
from shared import AUDIT_BUDGET

import main
import metrics
from ART_Timesteps_Addition.audit import criteria, stages
from data_utils import load_split
from experiment.config import FLAGS, Config
from experiment.results.audit import AuditFiles
from experiment.results.read import read_run
from experiment.runs.folder import RunFolder

LINE = "--todo audit --device -1 --test-size 6 --eps 1 --budget quick --attack-step 8"


@pytest.fixture(scope="module")
def trained(zoo):
    """The run folder of a small MLP that has learnt the digits."""
    return zoo("digits")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(stages.BUDGETS, "quick", AUDIT_BUDGET)


@pytest.fixture(scope="module")
def audited(trained, tmp_path_factory):
    """The same run folder once it has been audited."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("audit") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stages.BUDGETS, "quick", AUDIT_BUDGET)
        assert main.main(f"{LINE} --load-path {run}".split()) == 0
    return run


def result_of(run, stem="Audit_2_1"):
    """The result without what takes other times each time."""
    result = json.loads((run / f"{stem}.json").read_text())
    del result["seconds"]
    return {
        **result,
        "attacks": [{k: v for k, v in a.items() if k != "seconds"} for a in result["attacks"]],
    }


@pytest.mark.parametrize("norm, eps", [("2", 1), ("inf", 0.1)])
def test_what_an_audit_writes(ok, tiny, trained, tmp_path, norm, eps):
    run = shutil.copytree(trained, tmp_path / "run")
    out = ok(LINE, f"--load-path {run} --attack-norm {norm} --eps {eps} --surrogate {trained}")
    stem = f"Audit_{norm}_{eps}"
    result = result_of(run, stem)
    assert (
        result["images"] == 6 and result["interval"][0] <= result["robust"] <= result["interval"][1]
    )
    assert result["trusted"] == all(check["passed"] for check in result["checks"].values())
    assert all(
        {"passed", "value", "limit", "why"} == set(check) for check in result["checks"].values()
    )
    names = [a["name"] for a in result["attacks"]]
    for part in (
        "pgd bptt@8 from zero",
        "pgd ep@8 from zero",
        "pgd smooth@8 from equilibrium",
        "restarts",
        "twice the iterations",
        "apgd-ce",
        "apgd-t",
        "fab",
        "square",
        "hopskipjump",
        "random draws",
        "transfer",
        "all states",
    ):
        assert any(part in name for name in names), part
    standing = [round(6 * result["clean"]), *(a["standing"] for a in result["attacks"])]
    assert all(
        b == a - attack["broken"] for a, b, attack in zip(standing, standing[1:], result["attacks"])
    )
    assert standing[-1] == round(6 * result["robust"])
    text = (run / f"{stem}.txt").read_text()
    assert text.startswith("TRUSTED" if result["trusted"] else "NOT TRUSTED") and text in out
    with np.load(run / f"{stem}.npz") as file:
        x_adv = file["x_adv"]
    x = (load_split("digits", "", False, 6)[0].float() / 255).numpy()
    assert (
        metrics.norms(x_adv - x, norm).max() <= eps * (1 + 1e-5)
        and 0 <= x_adv.min()
        and x_adv.max() <= 1
    )
    assert (run / f"{stem}.png").stat().st_size


def test_nothing_is_computed_twice(ok, tiny, audited, tmp_path, monkeypatch):
    run = shutil.copytree(audited, tmp_path / "run")
    first = (run / "Audit_2_1.json").read_text()
    monkeypatch.setattr(stages.Audit, "attempt", lambda *_: pytest.fail("an attack ran again"))
    ok(LINE, f"--load-path {run}")
    assert (run / "Audit_2_1.json").read_text() == first


def killed_in(folder, words, stage):
    """main.py in a process that is killed when it has computed a stage, before that is written."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    stages.BUDGETS["quick"], save = AUDIT_BUDGET, AuditFiles.save

    def save_or_die(self, name, arrays, record):
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, name, arrays, record)

    AuditFiles.save = save_or_die
    sys.exit(main.main(words))


@pytest.mark.slow
def test_an_audit_that_is_killed_in_every_stage_goes_on(ok, tiny, trained, audited, tmp_path):
    often = shutil.copytree(trained, tmp_path / "often")
    for stage in "abcdef":
        words = f"{LINE} --load-path {often}".split()
        process = context.Process(target=killed_in, args=(str(tmp_path), words, stage))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (often / f"Audit_2_1_{stage}.npz").exists()
        assert stage == "a" or (often / f"Audit_2_1_{chr(ord(stage) - 1)}.npz").exists()
    ok(LINE, f"--load-path {often}")
    assert result_of(often) == result_of(audited)


def test_stages_of_other_settings_are_not_taken(audited, tmp_path):
    run = RunFolder(shutil.copytree(audited, tmp_path / "run"))

    def files(**changes):
        run.release()
        config = Config().replace(eps=1.0, **changes)
        return AuditFiles(run, config, config.identity("audit"), "model.pt")

    assert files().load("a") is None
    files().save("a", {"x": np.ones(3)}, {"facts": [1]})
    arrays, record = files().load("a")
    assert arrays["x"].tolist() == [1, 1, 1] and record == {"facts": [1]}
    assert files(tol=0.1).load("a") is None and not (run.folder / "Audit_2_1_b.npz").exists()
    (run.folder / "Audit_2_1_a.npz").write_bytes(b"PK half of a file")
    assert files().load("a") is None


def flipped(path):
    """Other bytes in the middle of the compressed data of every array."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            middle = record.header_offset + 30 + len(record.filename) + record.compress_size // 2
            content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)


def announced(path):
    """An array whose header announces more than the file has."""
    header, shape = io.BytesIO(), (10**9,)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_adv.npy", header.getvalue())


def large(path):
    """A directory that announces an array of 1 GB."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2")
    content[start + 24 : start + 28] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)


def of_other_images(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "x_adv": arrays["x_adv"][:2]})


def pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "flipped bytes": flipped,
    "other images": of_other_images,
    "a pipe": pipe,
    "a header": announced,
    "1 GB": large,
    "half a file": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "nothing": lambda path: path.write_bytes(b""),
    "an object": lambda path: np.savez(path, x_adv=np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_stage_is_computed_again(ok, tiny, audited, tmp_path, damage):
    run = shutil.copytree(audited, tmp_path / "run")
    DAMAGE[damage](run / "Audit_2_1_f.npz")
    out = ok(LINE, f"--load-path {run}")
    assert out.count("images still classified correctly,") == 1 and "stage f" in out
    assert result_of(run) == result_of(audited)


def test_the_result_of_other_settings_is_moved_aside(ok, audited, tmp_path):
    run = shutil.copytree(audited, tmp_path / "run")
    before = result_of(run)
    ok(LINE, f"--load-path {run}")
    assert not list(run.glob("Audit_2_1_1.*"))  # the same again
    ok(LINE, f"--load-path {run} --test-size 4")
    assert result_of(run, "Audit_2_1_1") == before and result_of(run)["images"] == 4
    assert {path.suffix for path in run.glob("Audit_2_1_1.*")} == {".json", ".txt", ".png", ".npz"}
    keys = [key for key in read_run(run).values if key.measure == "audit"]
    assert [key.detail for key in keys] == ["quick, 4 images"]


def test_a_kill_while_a_result_moves_aside_leaves_no_half(audited, tmp_path):
    run = RunFolder(shutil.copytree(audited, tmp_path / "run"))
    (run.folder / "Audit_2_1.json").rename(run.folder / "Audit_2_1_1.json")
    AuditFiles(run, Config().replace(eps=1.0), {}, "model.pt")
    assert not [path for path in run.folder.glob("Audit_2_1.*") if path.suffix != ".lock"]
    assert {path.suffix for path in run.folder.glob("Audit_2_1_1.*")} == {
        ".json",
        ".txt",
        ".png",
        ".npz",
    }


def test_an_audit_says_what_was_examined(audited):
    assert result_of(audited)["model"].startswith("model.pt (epoch ")
    assert "model: model.pt (epoch " in (audited / "Audit_2_1.txt").read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "--eps"),
        ("--eps 0", "--eps"),
        ("--eps 1 --budget huge", "--budget"),
        ("--eps 1 --surrogate nowhere", "nowhere"),
    ],
)
def test_wrong_flags(cli, trained, words, said):
    code, _, err = cli(f"--todo audit --device -1 --test-size 3 --load-path {trained} {words}")
    assert code == 2 and said in err and err.count("\n") == 1


def test_an_audit_leaves_no_more_images_than_a_sweep(ok, audited, tmp_path):
    run = shutil.copytree(audited, tmp_path / "run")
    ok(
        "--todo attack --device -1 --test-size 6 --eps-list 1 --attack-step 8 --attack-iters 3 --attack-grad bptt "
        f"smooth ep --load-path {run}"
    )
    rows = list(csv.DictReader(open(run / "Adversarial_Accuracy.csv")))
    assert result_of(run)["robust"] <= min(float(row["adversarial"]) for row in rows)


def test_wilson():
    assert metrics.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert metrics.wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert metrics.wilson(1.0, 20)[1] == 1 and metrics.wilson(0, 0) == (0.0, 1.0)


GOOD = {
    "changed_again": 0,
    "responds": 1.0,
    "settled": 1.0,
    "changed_later": 0,
    "layers": 2,
    "masked": 0.0,
    "blind_breaks": 0,
    "more_breaks": 0,
    "unbounded": 0,
    "rise": 0,
    "iterative": 3,
    "single": 5,
    "loss_rises": 1.0,
    "attacked_settled": 1.0,
    "recovered": 0,
    "fallen": 10,
}


@pytest.mark.parametrize(
    "fact, value, check",
    [
        ("changed_again", 1, "deterministic"),
        ("responds", 0.1, "responds"),
        ("settled", 0.5, "settled"),
        ("changed_later", 9, "time_steps"),
        ("layers", 20, "attack_steps"),
        ("masked", 0.3, "gradients"),
        ("blind_breaks", 9, "blind_attacks"),
        ("more_breaks", 30, "budget"),
        ("unbounded", 1, "unbounded"),
        ("rise", 9, "more_eps"),
        ("single", 0, "iterations"),
        ("loss_rises", 0.2, "loss_rises"),
        ("attacked_settled", 0.1, "attacked_settled"),
        ("recovered", 9, "attacked_later"),
    ],
)
def test_every_check_fails_by_its_fact(fact, value, check):
    assert all(found["passed"] for found in criteria.evaluate(GOOD, 100, [8], 30).values())
    found = criteria.evaluate({**GOOD, fact: value}, 100, [8], 30)
    assert [name for name, result in found.items() if not result["passed"]] == [check]


def test_advice_names_only_flags_that_an_audit_uses():
    used = {f"--{flag.name}" for flag in FLAGS if not flag.todos or "audit" in flag.todos}
    for criterion in criteria.CRITERIA.values():
        assert set(re.findall(r"--[\w-]+", criterion.advice)) <= used, criterion.advice
