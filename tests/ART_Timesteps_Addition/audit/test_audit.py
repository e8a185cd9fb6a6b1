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
from shared import AUDIT_BUDGET, forget, records

import main
import metrics
from ART_Timesteps_Addition.audit import criteria, stages
from data_utils import load_split
from experiment import inference
from experiment.config import FLAGS, Config
from experiment.results import settings
from experiment.results.audit import AuditFiles
from experiment.results.record import Record, unpack
from experiment.results.store import Store
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
        "1 restart",
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
    text, caption, _ = (run / f"{stem}.txt").read_text().partition("# figure: ")
    assert caption
    assert text.startswith("TRUSTED" if result["trusted"] else "NOT TRUSTED") and text in out
    assert f"strongest gradient: {result['strongest']} (its PGD reached the smallest" in text
    with np.load(run / f"{stem}.npz") as file:
        x_adv = file["x_adv"]
    x = (load_split("digits", "", False, 6)[0].float() / 255).numpy()
    assert (
        metrics.norms(x_adv - x, norm).max() <= eps * (1 + 1e-5)
        and 0 <= x_adv.min()
        and x_adv.max() <= 1
    )
    assert (run / f"{stem}.png").stat().st_size


@pytest.fixture
def idle(monkeypatch):
    """Makes every attack and every prediction of a data set fail the test."""
    monkeypatch.setattr(stages.Audit, "attempt", lambda *_: pytest.fail("an attack ran again"))
    monkeypatch.setattr(inference, "predict", lambda *_: pytest.fail("it predicted again"))


def test_a_repeated_audit_prints_its_record(ok, idle, audited, tmp_path):
    run = shutil.copytree(audited, tmp_path / "run")
    before = {name: (run / name).read_text() for name in ("Audit_2_1.json", "Audit_2_1.txt")}
    for path in run.glob("Audit_2_1*"):
        path.unlink()
    out = ok(LINE, f"--load-path {run}")
    assert out.splitlines()[0].endswith(f"results go to {run / 'Audit_2_1.txt'} (recorded)")
    assert {name: (run / name).read_text() for name in before} == before
    assert (
        before["Audit_2_1.txt"].partition("# figure: ")[0] in out
        and (run / "Audit_2_1.png").exists()
    )
    assert len(records(run, "audit")) == 1 and not (run / ".Audit_2_1.lock").exists()


WRITTEN = ["Audit_2_1.npz", "results.jsonl", "Audit_2_1.txt", "Audit_2_1.json", "Audit_2_1.png"]


@pytest.mark.parametrize("n", range(len(WRITTEN)))
def test_a_kill_between_two_writes_loses_nothing(ok, audited, tmp_path, monkeypatch, n):
    run = shutil.copytree(audited, tmp_path / "run")
    for name in WRITTEN[n:]:
        if name == "results.jsonl":
            forget(run, "audit")
        else:
            (run / name).unlink()
    monkeypatch.setattr(stages.Audit, "attempt", lambda *_: pytest.fail("an attack ran again"))
    ok(LINE, f"--load-path {run}")
    assert all((run / name).exists() for name in WRITTEN)
    assert result_of(run) == result_of(audited)
    (before,) = records(audited, "audit")
    (after,) = records(run, "audit")
    assert before.identity == after.identity and before.value == after.value


def test_outcomes_are_paired_with_the_clean_predictions(audited):
    (record,) = records(audited, "audit")
    (clean,) = records(audited, "evaluate")
    robust = unpack(record.value["outcomes"], 6)
    correct = unpack(clean.value["outcomes"], 6)
    assert robust.mean() == record.value["robust"] and not (robust & ~correct).any()
    assert correct.mean() == clean.value["accuracy"] == record.value["clean"]
    assert record.data["clean"] == clean.value["accuracy"]
    assert {name: record.data[name] for name in clean.data} == clean.data
    assert record.model == clean.model and 0 <= record.model["converged"] <= 1
    with np.load(audited / "Audit_2_1.npz") as file:
        assert str(file["identity"]) == record.identity


def test_the_json_has_the_keys_that_scripts_know(audited):
    result = json.loads((audited / "Audit_2_1.json").read_text())
    assert {"clean", "robust", "interval", "images", "trusted", "checks", "attacks"} <= set(result)
    assert "outcomes" not in result
    own = result["settings"]
    assert own["attack_norm"] == own["norm"] == "2" and own["eps"] == 1 and own["steps"] == [8]
    assert own["budget"] == "quick" and len(own["weights"]) == len(own["data"]) == 16


@pytest.mark.parametrize(
    "place, value",
    [
        (("value", "interval"), [0.1]),
        (("value", "robust"), "high"),
        (("value", "checks"), {"settled": {"passed": True}}),
        (("value", "attacks"), [{"name": "\x1b[2J"}]),
        (("value", "curve"), [[1, 2, 3]]),
        (("settings", "eps"), "many"),
    ],
)
def test_a_damaged_record_is_a_note(cli, tiny, audited, tmp_path, place, value):
    run = shutil.copytree(audited, tmp_path / "run")
    path = run / "results.jsonl"
    *others, last = map(json.loads, path.read_text().splitlines())
    part, name = place
    last[part][name] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in [*others, last]))
    code, out, err = cli(LINE, f"--load-path {run}")
    assert code == 0 and "1 damaged line" in err and "TRUSTED" in out
    assert result_of(run) == result_of(audited)


def test_a_check_of_another_version_is_printed(audited):
    result = json.loads((audited / "Audit_2_1.json").read_text())
    check = {"passed": False, "value": 1, "limit": 2, "why": "a check that was removed"}
    lines = criteria.verdict({**result, "checks": {"removed": check}}, "2", "1")
    assert lines[0].startswith("NOT TRUSTED") and lines[0].endswith("failed: removed")
    assert any("a check that was removed" in line for line in lines)


def test_few_images_are_warned_of(audited):
    result = json.loads((audited / "Audit_2_1.json").read_text())
    assert "warning: 6 images prove little" in criteria.verdict(result, "2", "1")[1]
    many = criteria.verdict({**result, "images": 50}, "2", "1")
    assert not any("warning" in line for line in many)


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
        own = settings.audit(Config().replace(eps=1.0, **changes), 1e-3)
        wanted = Record("audit", {"weights": "0"}, {"fingerprint": "1"}, own, {})
        return AuditFiles(run, Store(run.folder), wanted, "model.pt")

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
    forget(run, "audit")
    out = ok(LINE, f"--load-path {run}")
    assert out.count("images still classified correctly,") == 1 and "stage f" in out
    assert result_of(run) == result_of(audited)


def test_another_audit_replaces_the_files_and_keeps_the_record(cli, audited, tmp_path):
    run = shutil.copytree(audited, tmp_path / "run")
    before = (run / "Audit_2_1.json").read_text()
    code, _, err = cli(LINE, f"--load-path {run} --test-size 4")
    assert code == 0 and "note: Audit_2_1.npz contained the adversarial examples" in err
    assert result_of(run)["images"] == 4 and not list(run.glob("Audit_2_1_1.*"))
    assert [record.data["images"] for record in records(run, "audit")] == [6, 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Audit, "attempt", lambda *_: pytest.fail("an attack ran again"))
        code, _, err = cli(LINE, f"--load-path {run}")
    assert code == 0 and "note: Audit_2_1.npz contains the adversarial examples of another" in err
    assert (run / "Audit_2_1.json").read_text() == before and len(records(run, "audit")) == 2


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
