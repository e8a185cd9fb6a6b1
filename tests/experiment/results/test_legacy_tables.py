"""Tables of earlier versions, made by hand as these versions wrote them."""

import csv
import dataclasses
import json
import types

import pytest

import data_utils
import model_utils
from ART_Timesteps_Addition.audit import stages
from experiment.config import Config
from experiment.results import legacy, settings
from experiment.results.legacy import read_tables
from experiment.results.record import Record
from experiment.results.store import Store
from experiment.runs import checkpoint
from experiment.runs.folder import fingerprint

ATTACK = "--todo attack --device -1 --test-size 8 --attack-step 2"
COLUMNS = ["eps", "grad", "clean", "adversarial", "masked", "unmoved", "mean_norm", "computed_on"]
SMOOTH = (
    "the forward pass as it is; backwards, outside of an activation's corners, at least the slope "
    "of an arctangent; no gradient shorter than 1e-5; the cross-entropy of ten times the outputs"
)
BASE = {
    "attack": "pgd", "attack_grad": ["bptt"], "attack_iters": 20, "attack_norm": "2",
    "attack_start": "zero", "attack_step": 2, "compile": False, "images": 8, "mbs": 20,
    "no_clip": False, "predict_step": 4, "seed": 3, "task": "digits",
}  # fmt: skip


def write_sweep(run, rows, stem="Adversarial_Accuracy", without=(), **own):
    """A sweep as version 0.3.0 wrote it. rows: [(eps, gradient, adversarial accuracy), ...];
    without: settings or columns that earlier versions did not know."""
    recorded = {name: value for name, value in {**BASE, **own}.items() if name not in without}
    columns = [name for name in COLUMNS if name not in without]
    with open(run / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for eps, grad, accuracy in rows:
            values = [eps, grad, "0.250000", f"{accuracy:.6f}", "0.000000", "0.000000", "0.5"]
            writer.writerow(dict(zip(COLUMNS, [*values, "old, 4 threads"])))
    lines = [
        f"# settings: {json.dumps(recorded, sort_keys=True)}",
        "# examined: model.pt (epoch 1, the best on the test images); computed on: old, 4 threads",
        "# eps, clean accuracy, adversarial accuracy (of the strongest gradient, per image)",
        *(f"{eps} 0.250000 {accuracy:.6f}" for eps, _, accuracy in rows),
    ]
    (run / f"{stem}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def run(zoo, tmp_path):
    return zoo.copy("tiny seed 3", tmp_path)


@pytest.fixture
def measured(run):
    """The weights and the data that the tables are about."""
    images = data_utils.load_split("digits", "data", False, 8)
    saved = checkpoint.open_saved(run, "evaluate")
    return {"weights": fingerprint(saved.weights), "data": data_utils.fingerprint(images)}


@pytest.fixture
def attacked(monkeypatch):
    """The eps at which an attack is computed."""
    computed = []
    attack = model_utils.attack

    def counted(model, images, labels, config, eps, *rest):
        computed.append(eps)
        return attack(model, images, labels, config, eps, *rest)

    monkeypatch.setattr(model_utils, "attack", counted)
    return computed


WORST = [(grad, 0.125) for grad in ("bptt@2", "bptt@3", "smooth@2", "smooth@3", "worst")]
EARLIEST = ("data", "compile", "computed_on")


@pytest.mark.parametrize(
    "words, own, rows, without",
    [
        ("", {}, [("bptt", 0.125)], ()),
        ("", {"eps_list": [1.0, 2.0]}, [("bptt", 0.125)], EARLIEST),
        ("--attack-iters 2 --attack-restarts 1", {"attack_iters": 2, "attack_restarts": 1},
         [("bptt", 0.125)], ()),
        ("--attack fgsm", {"attack": "fgsm", "budget": "fgsm 20 iterations"}, [("bptt", 0.125)],
         EARLIEST),
        ("--attack square --attack-queries 3",
         {"attack": "square", "attack_queries": 3, "budget": "square 3 queries"},
         [("square", 0.125)], ()),
        ("--attack-step 2 3 --attack-grad bptt smooth",
         {"attack_step": [2, 3], "attack_grad": ["bptt", "smooth"], "smooth": SMOOTH}, WORST, ()),
        ("--tol 0.01 --mbs 7 --seed 5 --predict-step 3 --no-clip --attack-start equilibrium",
         {"tol": 0.01, "mbs": 7, "seed": 5, "predict_step": 3, "no_clip": True,
          "attack_start": "equilibrium"}, [("bptt", 0.125)], ()),
    ],
)  # fmt: skip
def test_a_sweep_of_an_earlier_version_is_continued(
    ok, run, measured, attacked, words, own, rows, without
):
    name = own.get("attack", "pgd")
    stem = "Adversarial_Accuracy" + ("" if name == "pgd" else f"_{name}_2")
    write_sweep(run, [(1.0, *row) for row in rows], stem, without, **measured, **own)
    line = f"{ATTACK} --load-path {run} {words}"
    ok(line, "--eps-list 1")
    assert attacked == []
    ok(line, "--eps-list 1 2")
    assert attacked == [2.0]
    table = list(csv.DictReader(open(run / f"{stem}.csv")))
    assert [row["grad"] for row in table] == [grad for grad, _ in rows] * 2
    assert [float(row["adversarial"]) for row in table][: len(rows)] == [0.125] * len(rows)
    old = "" if "computed_on" in without else "old, 4 threads"
    assert {row["computed_on"] for row in table[: len(rows)]} == {old}
    assert not list(run.glob("*_1.*"))
    assert len([r for r in Store(run).records if r.kind == "attack"]) == 2 * len(rows)


@pytest.mark.parametrize(
    "words, own",
    [
        ("", {"data": "0" * 16}),
        ("", {"weights": "0" * 16}),
        ("", {"tol": 0.01}),
        ("", {"precision": "bf16", "gradient_precision": "fp32"}),
        ("", {"compile": True}),
        ("", {"no_clip": True}),
        ("", {"images": 9}),
        ("", {"predict_step": 3}),
        ("", {"attack_iters": 19}),
        ("", {"attack_restarts": 1}),
        ("", {"attack_step": 3}),
        ("", {"attack_grad": ["ep"]}),
        ("", {"seed": 4}),
        ("", {"mbs": 19}),
        ("--attack-grad smooth", {"attack_grad": ["smooth"], "smooth": "in another way"}),
    ],
)
def test_a_sweep_with_another_setting_is_not_continued(ok, run, measured, attacked, words, own):
    grad = own.get("attack_grad", ["bptt"])[0]
    write_sweep(run, [(1.0, grad, 0.125)], **{**measured, **own})
    ok(f"{ATTACK} --load-path {run} {words} --attack-iters 20 --eps-list 1")
    assert attacked == [1.0]
    rows = list(csv.DictReader(open(run / "Adversarial_Accuracy.csv")))
    assert len(rows) == 2 and rows[1]["computed_on"] == "old, 4 threads"


def test_tables_that_were_renamed_are_found_and_stay(ok, run, measured, attacked):
    write_sweep(run, [(1.0, "bptt", 0.125)], "Adversarial_Accuracy_1", **measured)
    write_sweep(run, [(1.0, "bptt", 0.25)], seed=4, **measured)
    renamed = {path: path.read_bytes() for path in run.glob("*_1.*")}
    ok(f"{ATTACK} --load-path {run} --eps-list 1")
    assert attacked == []
    shown = (run / "Adversarial_Accuracy.txt").read_text().splitlines()
    assert shown[-1] == "1 0.250000 0.125000" and shown[0].startswith("# measured with: ")
    ok(f"{ATTACK} --load-path {run} --eps-list 1 --seed 4")
    assert attacked == []
    assert (run / "Adversarial_Accuracy.txt").read_text().endswith("1 0.250000 0.250000\n")
    assert len(renamed) == 2 and all(path.read_bytes() == old for path, old in renamed.items())


def test_the_records_of_a_table(run, measured):
    write_sweep(run, [(0.5, "bptt", 0.125)], "Adversarial_Accuracy_square_inf", **measured)
    (record,) = read_tables(run)
    assert record.data == {
        "task": "digits", "split": "test", "images": 8, "fingerprint": measured["data"],
        "clean": 0.25,
    }  # fmt: skip
    assert record.model == {
        "weights": measured["weights"], "file": "model.pt", "epoch": 1, "chosen_on": "test",
        "converged": None,
    }  # fmt: skip
    assert record.value == {"adversarial": 0.125, "masked": 0, "unmoved": 0, "mean_norm": 0.5}
    assert record.settings == {
        "attack": "pgd", "norm": "2", "eps": 0.5, "iters": 20, "queries": 0, "restarts": 0,
        "clip": True, "seed": 3, "mbs": 20, "precision": "fp32", "predict_step": 4, "tol": 0.0,
        "compile": False, "start": "zero", "gradient": "bptt", "steps": 2, "version": None,
        "libraries": None,
    }  # fmt: skip
    assert record.computed_on == "old, 4 threads"
    assert Record.from_json(record.to_json()) == record


def test_a_feed_forward_network_has_no_settings_of_time_steps(run, measured, monkeypatch):
    saved = types.SimpleNamespace(args={"model": "FFMLP", "val_size": 10})
    monkeypatch.setattr(legacy.checkpoint, "open_saved", lambda *_: saved)
    write_sweep(run, [(0.5, "bptt", 0.125)], attack_step=20, **measured)
    (record,) = read_tables(run)
    assert not {"predict_step", "tol", "compile", "start"} & set(record.settings)
    assert record.settings["steps"] == 0 and record.model["chosen_on"] == "validation"


def test_tables_are_read_oldest_first_and_the_latest_answers(run, measured):
    for accuracy, stem in enumerate(["_1", "_2", "_10", ""]):
        without = ("data",) if stem != "_10" else ()
        write_sweep(
            run, [(1.0, "bptt", accuracy / 8)], f"Adversarial_Accuracy{stem}", without, **measured
        )
    store = Store(run)
    assert [8 * record.value["adversarial"] for record in store.records] == [0, 1, 2, 3]
    known = {"version": 1, "libraries": {}, "compile": False}
    for data, accuracy in ((measured["data"], 3), ("0" * 16, 3)):
        latest = store.records[-1]
        wanted = Record(
            "attack",
            latest.model,
            {**latest.data, "fingerprint": data},
            {**latest.settings, **known},
            {},
        )
        assert 8 * store.find(wanted).value["adversarial"] == accuracy


def test_tables_are_read_only_without_records(run, measured, capsys):
    write_sweep(run, [(1.0, "bptt", 0.125)], **measured)
    store = Store(run)
    assert len(store.records) == 1
    new = Record("evaluate", {"weights": "a"}, {"images": 8}, {}, {"accuracy": 0.5})
    store.add(new)
    write_sweep(run, [(1.0, "bptt", 0.5), (2.0, "bptt", 0.5)], **measured)
    assert [r.kind for r in store.records] == [r.kind for r in Store(run).records]
    assert [r.kind for r in Store(run).records] == ["attack", "evaluate"]
    assert Store(run).records[0].value["adversarial"] == 0.125
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    [
        "0.1 0.9 0.5\n0.2 0.9 0.3\n",  # as the original code writes it
        "# measured with: {}\n1 0.25 0.125\n",  # of this version
        "",
    ],
)
def test_what_is_no_table_of_an_earlier_version_gives_nothing(run, measured, capsys, text):
    write_sweep(run, [(1.0, "bptt", 0.125)], **measured)
    (run / "Adversarial_Accuracy.txt").write_text(text)
    assert read_tables(run) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "own, rows, without",
    [
        ({"attack": "no attack"}, [], ()),
        ({"attack_norm": "1"}, [], ()),
        ({"attack_step": list(range(1, 1000))}, [], ()),
        ({"attack_step": ["2"]}, [], ()),
        ({"attack_grad": {}}, [], ()),
        ({"attack_grad": ["smooth"]}, [(1.0, "smooth", 0.5)], ()),
        ({"images": -1}, [], ()),
        ({"weights": ["a"]}, [], ()),
        ({"weights": "\x1b"}, [], ()),
        ({"data": {}}, [], ()),
        ({"seed": 10**30}, [], ()),
        ({}, [(1.0, "ep", 0.5)], ()),
        ({}, [(1.0, "bptt", 1.5)], ()),
        ({}, [(float("nan"), "bptt", 0.5)], ()),
        ({}, [(-1.0, "bptt", 0.5)], ()),
        ({}, [("0.1x", "bptt", 0.5)], ()),
        ({}, [(1e-320, "bptt", 0.5)], ()),
        ({}, [(1e300, "bptt", 0.5)], ()),
        ({}, [(1.0, "", 0.5)], ()),
        ({}, [(1.0, "bptt", float("nan"))], ()),
        ({}, [(1.0, "bptt", 0.5)], ("adversarial",)),
        ({}, [(1.0, "bptt", 0.5)], ("mean_norm",)),
        ({"x": "x" * 10_000}, [], ()),
    ],
)
def test_a_damaged_sweep_is_left_out_with_a_note(run, measured, capsys, own, rows, without):
    write_sweep(run, [(1.0, "bptt", 0.125)], "Adversarial_Accuracy_fgsm_2", **measured)
    capsys.readouterr()
    write_sweep(run, rows, without=without, **{**measured, **own})
    assert [record.value["adversarial"] for record in read_tables(run)] == [0.125]
    err = capsys.readouterr().err
    assert err.startswith(f"note: {run / 'Adversarial_Accuracy.txt'}") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["[" * 9000, "[]", "{", '{"weights": "' + "\\u0000" * 9, "1e999"])
def test_a_damaged_header_is_left_out_with_a_note(run, capsys, text):
    (run / "Adversarial_Accuracy.txt").write_text(f"# settings: {text}\n1 0.25 0.125\n")
    assert read_tables(run) == []
    err = capsys.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1


def test_a_csv_with_many_columns_and_rows_takes_little_memory(run, measured):
    write_sweep(run, [(1.0, "bptt", 0.125)], **measured)
    table = run / "Adversarial_Accuracy.csv"
    names, row = table.read_text().splitlines()
    more = ",".join(map(str, range(10**5)))
    table.write_text(f"{names},{more}\n" + f"{row}\n" * 20_000)
    assert len(read_tables(run)) == legacy.MOST_ROWS


# ---- audits, corruptions, accuracy over the time steps

CHECK = {"passed": False, "value": 2, "limit": 4, "why": "time steps"}
AUDIT = {
    "clean": 0.25, "robust": 0.125, "interval": [0.0, 0.5], "images": 8, "trusted": False,
    "checks": {"attack_steps": CHECK},
    "attacks": [
        {"stage": "b", "name": "pgd bptt@2 from zero", "broken": 1, "standing": 1, "masked": 0.0,
         "seconds": 0.1, "settings": {}},
    ],
    "strongest": "pgd bptt@2 from zero", "curve": [[0.0, 1.0], [1.0, 0.5]], "sample": 2,
    "early": {"t": 1, "robust": 0.25, "over_time": [0.25, 0.0]}, "seconds": {"a": 0.0},
    "model": "model.pt (epoch 1, the best on the test images)", "computed_on": ["old, 4 threads"],
}  # fmt: skip
AUDITED = {
    "precision": "fp32", "compile": False, "seed": 3, "task": "digits", "test_size": 8, "mbs": 20,
    "T1": 4, "tol": 0.0, "attack_norm": "2", "attack_step": [2], "predict_step": None,
    "no_clip": False, "eps": 1.0, "budget": "quick", "surrogate": None, "ends_early": 0.001,
}  # fmt: skip


def write_audit(run, stem="Audit_2_1", without=(), result=AUDIT, **own):
    recorded = {name: value for name, value in {**AUDITED, **own}.items() if name not in without}
    result = {name: value for name, value in result.items() if name not in without}
    (run / f"{stem}.json").write_text(json.dumps({**result, "settings": recorded}, indent=1))


@pytest.mark.parametrize("without", [(), ("data", "compile", "computed_on")])
def test_an_audit_of_an_earlier_version_is_found(ok, run, measured, monkeypatch, without):
    monkeypatch.setattr(stages.Audit, "run", lambda *_: pytest.fail("the audit ran again"))
    write_audit(run, without=without, **measured)
    ok(f"--todo audit --device -1 --load-path {run} --test-size 8 --eps 1 --budget quick "
       "--attack-step 2")  # fmt: skip
    (record,) = [record for record in Store(run).records if record.kind == "audit"]
    assert record.value == {name: part for name, part in AUDIT.items() if name not in without}
    result = json.loads((run / "Audit_2_1.json").read_text())
    assert result["robust"] == 0.125 and result["settings"]["weights"] == measured["weights"]
    assert "NOT TRUSTED: 12.5 %" in (run / "Audit_2_1.txt").read_text()
    (run / "results.jsonl").unlink()
    assert read_tables(run) == []  # the result is one of this version now


@pytest.mark.parametrize(
    "own",
    [
        {"data": "0" * 16}, {"weights": "0" * 16}, {"tol": 0.01}, {"precision": "tf32"},
        {"compile": True}, {"no_clip": True}, {"predict_step": 3}, {"attack_step": [2, 3]},
        {"seed": 4}, {"mbs": 19}, {"budget": "standard"}, {"eps": 1.5}, {"attack_norm": "inf"},
        {"surrogate": ["a", 4, "mse"]}, {"ends_early": 0.0}, {"T1": 5},
    ],
)  # fmt: skip
def test_an_audit_with_another_setting_is_not_found(run, measured, own):
    write_audit(run, "Audit_2_1_1", **measured)
    write_audit(run, "Audit_2_1", **{**measured, **own})
    before, after = read_tables(run)
    assert not before.answers(after) and not after.answers(before)
    assert before.answers(dataclasses.replace(before, value={}))


def test_an_audit_of_all_attack_steps_and_predictions_is_found(run, measured):
    write_audit(run, predict_step=3, attack_step=[3, 2], **measured)
    (record,) = read_tables(run)
    config = Config().replace(
        model="MLP", seed=3, predict_step=3, attack_step=[2, 3], eps=1.0, budget="quick"
    )
    wanted = settings.audit(config, 0.001)
    assert record.answers(dataclasses.replace(record, settings=wanted))


def write_corruptions(run, rows, stem="Corruption_Accuracy", **own):
    recorded = {
        "T1": 4, "compile": False, "images": 8, "precision": "fp32", "tol": 0.0, "weights": "w",
        "data": {"gaussian_noise": "a", "fog": "b"}, **own,
    }  # fmt: skip
    lines = [
        f"# settings: {json.dumps(recorded, sort_keys=True)}",
        "# corruption, accuracy at severity 1 to 5, of model.pt (epoch 1, the best on the test "
        "images); computed on: old, 4 threads",
        *rows,
        "# mean over the first 15: 0.5",
    ]
    (run / f"{stem}.txt").write_text("\n".join(lines) + "\n")


ROWS = ["gaussian_noise 0.5 0.4 0.3 0.2 0.1", "fog 0.5 0.5 0.5 0.5 0.5"]


def test_corruptions_of_an_earlier_version_are_records(run):
    write_corruptions(run, ROWS[1:], "Corruption_Accuracy_1", data={}, tol=0.01)
    write_corruptions(run, ROWS)
    old, noise, fog = read_tables(run)
    assert noise.value == {"accuracy": [0.5, 0.4, 0.3, 0.2, 0.1]}
    assert (noise.data["fingerprint"], fog.data["fingerprint"]) == ("a", "b")
    assert (noise.data["images"], noise.data["task"], noise.model["epoch"]) == (8, "digits", 1)
    assert noise.computed_on == "old, 4 threads"
    wanted = settings.corruption(Config().replace(model="MLP", T1=4, mbs=7), "fog")
    wanted = dataclasses.replace(fog, settings=wanted)
    assert fog.answers(wanted) and not noise.answers(wanted) and not old.answers(wanted)
    assert old.data["fingerprint"] is None and old.settings["tol"] == 0.01


def write_characteristic(run, rows, settled="relative change over the last min(5, t) steps", **own):
    recorded = {"T1": 4, "compile": False, "images": 8, "precision": "fp32", **own}
    lines = [
        "# model.pt (epoch 1, the best on the test images), T1 = 4, 8 test images, settled: share "
        f"of images that have converged, whose {settled} is below 0.0001; computed on: old",
        f"# settings: {json.dumps(recorded, sort_keys=True)}",
        "# of the first 5 of them, means: residual, the relative change in the step; energy, Phi",
        "# t accuracy settled residual energy",
        *rows,
    ]
    (run / "Characteristic_Time.txt").write_text("\n".join(lines) + "\n")


STEPS = [f"{t} 0.{t} 0.0{t} 1e-{t} {'nan' if t == 3 else -t}" for t in range(1, 5)]


def test_accuracies_over_time_steps_of_an_earlier_version_are_found(ok, run, measured, monkeypatch):
    again = "experiment.inference.characteristic"
    monkeypatch.setattr(again, lambda *_, **__: pytest.fail("it was computed again"))
    write_characteristic(run, STEPS, **measured)
    out = ok(f"--todo characteristic --device -1 --load-path {run} --test-size 8")
    assert "test accuracy 40.00 %" in out and "4.00 % converged" in out
    (record,) = [record for record in Store(run).records if record.kind == "characteristic"]
    assert record.value == {
        "accuracy": [0.1, 0.2, 0.3, 0.4], "converged": [0.01, 0.02, 0.03, 0.04],
        "residual": [0.1, 0.01, 0.001, 0.0001], "energy": [-1, -2, None, -4], "relaxed_images": 5,
    }  # fmt: skip
    assert record.computed_on == "old" and record.model["converged"] == 0.04


@pytest.mark.parametrize(
    "write",
    [
        lambda run: write_audit(run, without=("robust",), weights="w"),
        lambda run: write_audit(run, weights="w", eps=0),
        lambda run: write_audit(run, weights="w", surrogate="x"),
        lambda run: write_audit(run, weights="w", result={**AUDIT, "checks": {"a": None}}),
        lambda run: write_audit(run, weights="w", result={**AUDIT, "clean": "0.5"}),
        lambda run: write_audit(run, weights="w", result={**AUDIT, "images": 10**400}),
        lambda run: write_audit(run, weights="w", result={**AUDIT, "attacks": [{}]}),
        lambda run: (run / "Audit_2_1.json").write_text("{"),
        lambda run: (run / "Audit_2_1.json").write_text("[]"),
        lambda run: (run / "Audit_2_1.json").write_text(" " * (legacy.LONGEST_TABLE + 1)),
        lambda run: (run / "Audit_2_1.json").mkdir(),
        lambda run: write_corruptions(run, ["fog 0.5 0.5 0.5 0.5"]),
        lambda run: write_corruptions(run, ["fog 0.5 0.5 0.5 0.5 1.5"]),
        lambda run: write_corruptions(run, ["unknown 0.5 0.5 0.5 0.5 0.5"]),
        lambda run: write_corruptions(run, ROWS, data=["a"]),
        lambda run: write_corruptions(run, ROWS, T1="4"),
        lambda run: write_characteristic(run, STEPS[:3], weights="w"),
        lambda run: write_characteristic(run, ["1 0.1 0.1 0.1"] * 4, weights="w"),
        lambda run: write_characteristic(run, ["1 x 0.1 0.1 1"] * 4, weights="w"),
        lambda run: write_characteristic(run, STEPS, "step is small", weights="w"),
    ],
)
def test_another_damaged_table_is_left_out_with_a_note(run, capsys, write):
    write(run)
    assert read_tables(run) == []
    err = capsys.readouterr().err
    assert err.startswith(f"note: {run}") and "is left out: " in err and err.count("\n") == 1


def test_a_folder_without_a_model_gives_nothing(tmp_path, capsys):
    write_corruptions(tmp_path, ROWS)
    assert read_tables(tmp_path) == []
    err = capsys.readouterr().err
    assert "has no model.pt or checkpoint.tar" in err and err.count("\n") == 1
