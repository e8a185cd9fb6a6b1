"""--todo compare: what is pooled and what is not, numbers as computed by hand, figures, published
tables."""

import csv
import dataclasses
import itertools
import os
import pathlib
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, context

import main
from data_utils import CORRUPTIONS
from experiment.config import Config
from experiment.plots import compare as plots
from experiment.results import read, settings
from experiment.results.compare import (
    _notes,
    _table_keys,
    _with_one_row_per_method,
    comparison_table,
    group_runs,
    latex,
    table_rows,
)
from experiment.results.published import read_published
from experiment.results.read import read_run
from experiment.results.record import Record, pack
from experiment.results.store import Store
from experiment.results.values import (
    STRONGEST,
    Cell,
    Group,
    Images,
    Key,
    RunResults,
    Value,
    bootstrap_interval,
    difference,
    pool,
)
from experiment.runs.folder import fingerprint

IMAGES = 20  # that hand-written records are about
PREDICTION = {"mbs": 20, "precision": "fp32", "predict_step": 4, "tol": 0.0, "compile": False}
ATTACK = {
    "attack": "pgd",
    "norm": "2",
    "eps": 0.5,
    "iters": 20,
    "queries": 0,
    "restarts": 0,
    "clip": True,
    "version": 1,
    "libraries": {"torchattacks": "3"},
    "start": "zero",
    "gradient": "bptt",
    "steps": 4,
}


# ------------------------------------------------------------------------------ runs and records


def rewrite(run, change, names=("model.pt", "final_model.pt", "checkpoint.tar")):
    """Changes the content of a run's checkpoints. change: content -> None."""
    for name in names:
        if (run / name).exists():
            content = torch.load(run / name, weights_only=True)
            change(content)
            torch.save(content, run / name)


@pytest.fixture
def make(zoo, tmp_path):
    """Makes copies of a run of the zoo: name, seed -> run folder."""
    numbers = itertools.count()

    def copy(name, seed=1, **config):
        run = shutil.copytree(zoo(f"compared {name}"), tmp_path / f"run_{next(numbers)}")

        def change(content):
            content["config"] |= {"seed": seed, **config}
            for row in content["history"]:
                row["test_acc"] = 10.0 * seed + row["epoch"]
                row["seconds"] = float(seed)

        rewrite(run, change)
        return run

    return copy


def weights(run, file="model.pt"):
    return fingerprint(torch.load(run / file, weights_only=True)["model_state_dict"])


def record(run, kind, own, value, *, model=None, **data):
    """A record of a run. model: entries of its model that are not those of model.pt; data: of its
    data."""
    told = {"weights": weights(run), "file": "model.pt", "epoch": 2, "chosen_on": "test"}
    images = {"task": "digits", "split": "test", "images": IMAGES, "fingerprint": "ab"}
    return Record(kind, told | {"converged": 0.5} | (model or {}), images | data, own, value)


def first(n, of=IMAGES):
    """Outcomes of images, the first n of which are correct."""
    return np.arange(of) < n


UNUSED = {"unmoved": 0.0, "mean_norm": 0.5}  # values of attacks that a comparison does not show


def attacked(run, robust, *, seed=1, masked=0, model=None, outcomes=True, **own):
    """The record of an attack. robust: number of images, or an outcome for each."""
    correct = first(robust) if isinstance(robust, int) else robust
    value = {"adversarial": correct.mean(), "masked": masked / IMAGES, **UNUSED}
    if outcomes:
        value |= {"outcomes": pack(correct), "masked_outcomes": pack(first(masked))}
    told = {**PREDICTION, **ATTACK, "seed": seed, **own}
    told = {name: value for name, value in told.items() if value != "absent"}
    return record(run, "attack", told, value, model=model, clean=0.9)


# Settings that networks without time steps lack
FEED_FORWARD = dict.fromkeys(("predict_step", "tol", "compile", "start"), "absent")


def evaluated(run, correct, **own):
    outcomes = first(correct)
    value = {"accuracy": outcomes.mean(), "outcomes": pack(outcomes)}
    return record(run, "evaluate", {**PREDICTION, **own}, value)


AUDITED = {  # what every result of an audit contains besides the accuracies
    "interval": [0.1, 0.9],
    "images": IMAGES,
    "checks": {},
    "attacks": [],
    "strongest": "pgd",
    "curve": [],
    "sample": 3,
    "early": {"t": 1, "robust": 0.5},
    "seconds": {},
    "model": "model.pt",
}


def audited(run, robust, *, trusted=True, model=None, **own):
    told = {**PREDICTION, "norm": "2", "eps": 0.5, "budget": "quick", "clip": True, **own}
    told = {name: value for name, value in told.items() if value != "absent"}
    value = {
        **AUDITED,
        "clean": 0.9,
        "robust": robust / IMAGES,
        "trusted": trusted,
        "outcomes": pack(first(robust)),
    }
    return record(run, "audit", told, value, model=model)


def corrupted(run, names, accuracy, *, model=None):
    """The records of some corruptions. accuracy: of severity 1; each severity has 0.1 less."""
    value = {"accuracy": [accuracy - 0.1 * severity for severity in range(5)]}
    return [
        record(run, "corruption", {**PREDICTION, "corruption": name}, value, model=model)
        for name in names
    ]


def characteristic(run, accuracy, *, model=None):
    own = {name: value for name, value in PREDICTION.items() if name != "predict_step"}
    value = {"accuracy": accuracy, "converged": accuracy, "residual": accuracy, "relaxed_images": 1}
    return record(run, "characteristic", {**own, "T1": 4}, value, model=model)


def compared(*runs, labels=None):
    """(the groups of runs; their rows of comparison.csv; notes)."""
    groups, notes = group_runs([read_run(run) for run in runs], labels)
    return groups, table_rows(groups), notes + _notes(groups, _table_keys(groups))


def only(rows, **wanted):
    """The one row with these columns."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def strongest_rows(rows):
    return [row for row in rows if row["grad"] == STRONGEST]


# ------------------------------------------------------------------------------- other weights


def test_no_result_of_earlier_weights_is_shown(ok, make, tmp_path):
    """After further training: 40 / 7 / 0 % and 40 / 45 / 0 % beside a clean 94 % have been there."""
    run = make("EP")
    earlier = {"weights": "of epoch 9", "epoch": 9}
    store = Store(run)
    store.add(
        *(attacked(run, 9, eps=eps, model=earlier) for eps in (0.25, 0.5, 1.0)),
        audited(run, 9, model=earlier),
        *corrupted(run, CORRUPTIONS, 0.45, model=earlier),
        characteristic(run, [0.45] * 4, model=earlier),
        evaluated(run, 18),
        attacked(run, 4, eps=0.5),
    )
    out = ok("--todo compare --load-path", run)
    epoch = torch.load(run / "model.pt", weights_only=True)["epoch"]
    note = (
        f"left out of {run}: 3 attack results, 1 audit, 19 corruption results and 1 characteristic "
        f"of other weights (epoch 9; the model is of epoch {epoch})"
    )
    assert f"note: {note}\n" in out
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    assert f"- {note}" in (folder / "comparison.md").read_text()
    assert {path.name for path in folder.glob("*.png")} == {"training.png", "robustness_2.png"}
    rows = list(csv.DictReader((folder / "comparison.csv").open()))
    assert {row["mean"] for row in rows if row["measure"] == "adversarial"} == {"20.0000"}
    assert {row["eps"] for row in rows if row["measure"] == "adversarial"} == {"0.5"}
    assert {row["measure"] for row in rows} == {"clean", "adversarial", "seconds"}
    assert not any("45.00" in path.read_text() for path in folder.glob("comparison.*"))


def test_records_of_unknown_weights_are_other_weights(make):
    run = make("EP")
    Store(run).add(attacked(run, 4, model={"weights": None, "epoch": None}))
    _, rows, notes = compared(run)
    assert not strongest_rows(rows)
    assert "1 attack result of other weights (epoch unknown; the model is of epoch" in notes[0]


# ------------------------------------------------------------------------------- one measurement

DEVIATIONS = {
    "predict_step": (3, "predicted after 3 steps"),
    "restarts": (2, "2 restarts"),
    "iters": (40, "40 iterations"),
    "tol": (0.01, "tol 0.01"),
    "precision": ("bf16", "bf16"),
    "clip": (False, "not clipped"),
    "mbs": (50, "mini-batches of 50"),
    "compile": (True, "compiled"),
    "seed": (7, "attack seed 7"),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_seeds_that_were_measured_otherwise_are_not_pooled(make, name):
    """ "81.00 ± 2.83 (2)" of predictions after 3 and after 20 steps has been there."""
    value, text = DEVIATIONS[name]
    runs = [make("EP", seed) for seed in (1, 2)]
    Store(runs[0]).add(attacked(runs[0], 4, seed=1))
    Store(runs[1]).add(attacked(runs[1], 8, **{"seed": 2, name: value}))
    _, rows, _ = compared(*runs)
    found = {row["detail"]: (row["mean"], row["n"]) for row in strongest_rows(rows)}
    assert sorted(found.values()) == [("20.0000", 1), ("40.0000", 1)]
    (deviating,) = [detail for detail in found if text in detail]
    assert found[deviating] == ("40.0000", 1)


def test_the_run_s_own_settings_are_no_deviation(make):
    """Each seed attacks with its own seed, and predicts after its own T1 steps."""
    runs = [make("EP", seed) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        Store(run).add(attacked(run, 4 * seed, seed=seed))
    _, rows, _ = compared(*runs)
    row = only(rows, measure="adversarial", grad=STRONGEST)
    assert row["detail"] == "20 iterations, 20 images" and row["n"] == 2
    assert (row["mean"], row["std"]) == ("30.0000", f"{statistics.stdev([20, 40]):.4f}")


@pytest.mark.parametrize("other", [{"version": 2}, {"libraries": {"torchattacks": "4"}}])
def test_other_versions_of_an_attack_are_other_rows_and_are_named(make, other):
    runs = [make("EP", seed) for seed in (1, 2)]
    Store(runs[0]).add(attacked(runs[0], 4, seed=1))
    Store(runs[1]).add(attacked(runs[1], 8, seed=2, **other))
    groups, rows, _ = compared(*runs)
    assert [row["n"] for row in strongest_rows(rows)] == [1, 1]
    keys = [key for key in _table_keys(groups) if key.grad == STRONGEST]
    labels = [row[0] for row in comparison_table(groups, keys)[1:]]
    (name,) = other
    assert all(f", {name} " in label for label in labels) and len(set(labels)) == 2


def test_other_images_are_other_rows(make):
    runs = [make("EP", seed) for seed in (1, 2)]
    Store(runs[0]).add(attacked(runs[0], 4, seed=1))
    own = attacked(runs[1], 8, seed=2)
    Store(runs[1]).add(dataclasses.replace(own, data={**own.data, "fingerprint": "cd"}))
    _, rows, _ = compared(*runs)
    assert {(row["data"], row["n"]) for row in strongest_rows(rows)} == {("ab", 1), ("cd", 1)}


# ------------------------------------------------------------------------------- groups


def groups_of(*runs):
    return [len(group.runs) for group in compared(*runs)[0]]


def test_labels_say_what_differs(make):
    groups, *_ = compared(*(make(name, seed) for name in ("EP", "BPTT") for seed in (1, 2, 3)))
    assert [(group.label, len(group.runs)) for group in groups] == [("MLP EP", 3), ("MLP BPTT", 3)]
    groups, *_ = compared(make("EP"), make("EP", T1=9))
    assert [group.label for group in groups] == ["MLP EP, T1 4", "MLP EP, T1 9"]
    groups, *_ = compared(make("EP"), make("BPTT", task="MNIST"))
    assert [group.label for group in groups] == ["MLP EP on digits", "MLP BPTT on MNIST"]


def test_a_resumption_with_other_arguments_is_another_group(make):
    runs = [make("EP", seed) for seed in (1, 2, 3, 4)]

    def resumed(text):
        return lambda content: content.update(resumptions={2: text})

    rewrite(runs[1], resumed("--T1 30 (until now 4)"), ["checkpoint.tar"])
    moved = "--data-dir now (until now ./data); --deterministic (until now --no-deterministic)"
    rewrite(runs[2], resumed(moved), ["checkpoint.tar"])  # the same training
    rewrite(runs[3], resumed(""), ["checkpoint.tar"])  # with the same arguments
    groups, *_ = compared(*runs)
    assert [len(group.runs) for group in groups] == [3, 1]
    assert "resumed before epoch 2: --T1 30 (until now 4)" in groups[1].label


def test_labels_leave_out_what_follows(make):
    """`test-size None, test-data 15acc2992d1bf4ae` was a label."""
    groups, *_ = compared(
        make("EP", test_size=None, test_data="a" * 16), make("EP", test_size=60, test_data="b" * 16)
    )
    assert [g.label for g in groups] == ["MLP EP, all test images", "MLP EP, 60 test images"]
    groups, *_ = compared(make("EP", test_data="a" * 16), make("EP", test_data="b" * 16))
    assert groups[0].label == "MLP EP, test images aaaaaaaa"


def test_rows_of_most_groups_come_first_and_of_an_audit_its_trust(make):
    runs = [make("EP"), make("BPTT")]
    for run in runs:
        Store(run).add(attacked(run, 4), audited(run, 3), audited(run, 2, eps=1.0))
    Store(runs[0]).add(attacked(runs[0], 4, attack="apgd-ce"))
    groups, *_ = compared(*runs)
    rows = [(k.measure, k.attack, k.eps) for k in _table_keys(groups) if k.grad in ("", STRONGEST)]
    assert rows == [
        ("clean", "", 0),  # recorded in training
        ("clean", "", 0),
        ("adversarial", "pgd", 0.5),
        *(("audit", "audit", 0.5), ("audit trusted", "audit", 0.5)),
        *(("audit", "audit", 1), ("audit trusted", "audit", 1)),
        ("adversarial", "apgd-ce", 0.5),
        ("seconds", "", 0),
    ]


def test_a_gradient_method_of_one_number_of_steps_is_one_row(make):
    runs = [make("EP"), make("BPTT", model="FFMLP", alg="BP")]
    Store(runs[0]).add(attacked(runs[0], 4))
    Store(runs[1]).add(attacked(runs[1], 10, steps=0, **FEED_FORWARD))
    groups = _with_one_row_per_method(compared(*runs)[0])
    keys = [key for key in _table_keys(groups) if key.grad == "bptt"]
    (row,) = comparison_table(groups, keys)[1:]
    assert row[:3] == ["pgd L2 0.5, bptt, 20 iterations, 20 images (%)", "20.00 (1)", "50.00 (1)"]


def test_fgsm_has_no_iterations(make):
    run = make("EP")
    Store(run).add(attacked(run, 4, attack="fgsm"))
    assert only(compared(run)[1], grad=STRONGEST)["detail"] == "20 images"


def test_gradient_methods_are_in_the_order_of_their_names():
    methods = ("ep@4", "bptt@29", "bptt@4", "smooth@4 from equilibrium", "bptt")
    expected = ["bptt", "bptt@4", "bptt@29", "smooth@4 from equilibrium", "ep@4"]
    assert Cell({1: value(50, *methods)}).methods == expected


def test_a_model_without_its_checkpoint_knows_whether_it_was_resumed(make):
    """A lone model.pt of a resumed run was pooled with models that never were."""
    runs = [make("EP", seed) for seed in (1, 2, 3)]
    for run in runs:
        (run / "checkpoint.tar").unlink()
    rewrite(runs[1], lambda content: content.update(resumptions={1: "--T1 30 (until now 4)"}))
    rewrite(runs[2], lambda content: content.pop("resumptions"))  # of an earlier version
    groups, *_ = compared(*runs)
    assert [group.label for group in groups] == [
        "MLP EP, resumed never",
        "MLP EP, resumed before epoch 1: --T1 30 (until now 4)",
        "MLP EP, resumed unknown",
    ]


def test_a_shorter_training_is_another_group(make):
    runs = [make("EP", seed) for seed in (1, 2)]

    def shorter(content):
        content["history"] = content["history"][:1]
        content["epoch"] = 1

    rewrite(runs[1], shorter)
    groups, *_ = compared(*runs)
    assert [group.label for group in groups] == ["MLP EP, epochs 2", "MLP EP, epochs 1"]


def test_another_precision_of_the_training_is_another_group(make):
    assert groups_of(make("EP"), make("EP", 2, precision="bf16")) == [1, 1]


def test_a_model_chosen_otherwise_is_another_group(make):
    runs = [make("EP", seed) for seed in (1, 2)]

    def another(content):
        content["model_state_dict"]["synapses.0.bias"] += 1

    rewrite(runs[1], another, ["final_model.pt"])
    groups, *_ = compared(runs[0], runs[1] / "final_model.pt")
    assert [group.label for group in groups] == [
        "MLP EP, chosen-on test",
        "MLP EP, chosen-on last",
    ]


def test_one_model_counts_once(make, monkeypatch):
    """One run has been counted three times."""
    run = make("EP")
    model = (run / "model.pt").read_bytes()
    (run / "final_model.pt").write_bytes(model)
    monkeypatch.chdir(run.parent)
    groups, _, notes = compared(run, pathlib.Path(run.name), run / "final_model.pt")
    assert [len(group.runs) for group in groups] == [1]
    assert notes == [f"{run} is given several times; it counts once"]


def test_one_seed_counts_once(make):
    runs = [make("EP", 1), make("EP", 1), make("EP", 2)]
    groups, rows, notes = compared(*runs)
    assert only(rows, measure="clean")["n"] == 2
    assert notes == [f"left out: {runs[1]}, which repeats seed 1 of {runs[0]}"]


def test_runs_of_unknown_data_are_pooled(make):
    runs = [make("EP", seed) for seed in (1, 2)]
    rewrite(
        runs[1], lambda content: [content["config"].pop(f"{s}_data") for s in ("train", "test")]
    )
    assert groups_of(*runs) == [2]


# ------------------------------------------------------------------------------- the strongest


def test_the_row_of_an_attack_is_the_strongest_gradient_per_image(make):
    run = make("EP")
    even = np.arange(IMAGES) % 2 == 0
    records = [
        evaluated(run, 18),
        attacked(run, even, steps=1),
        attacked(run, 10, steps=4),
        attacked(run, 10, gradient="ep", steps=4, start="equilibrium"),
        attacked(run, even & first(10), gradient="worst", gradients=["bptt"], steps=[1, 4]),
    ]
    Store(run).add(*records)
    _, rows, _ = compared(run)
    row = only(rows, measure="adversarial", grad=STRONGEST)
    assert row["mean"] == "25.0000"  # 5 of 20
    assert row["gradients"] == "bptt@1 bptt@4 ep@4 from equilibrium"
    of_methods = [row for row in rows if row["grad"] in ("bptt", "ep")]
    assert [(r["grad"], r["steps"], r["mean"]) for r in of_methods] == [
        ("bptt", "1", "50.0000"),
        ("bptt", "4", "50.0000"),
        ("ep", "4", "50.0000"),
    ]
    assert of_methods[2]["detail"].endswith("from equilibrium")


def test_without_outcomes_the_smallest_accuracy_counts():
    values = [Value(50.0, frozenset({"a"}), masked=0.5), Value(40.0, frozenset({"b"}), masked=0.2)]
    cell = pool({1: values})
    assert cell.statistics.mean == 40 and cell.masked == 0.2 and cell.methods == ["a", "b"]


def value(accuracy, *methods):
    return Value(accuracy, frozenset(methods))


def test_seeds_are_pooled_over_the_gradients_that_they_share():
    cell = pool({1: [value(50, "a"), value(30, "b")], 2: [value(40, "a")]})
    assert [v.value for v in cell.values.values()] == [50, 40] and cell.methods == ["a"]
    # the strongest of both is no measurement of `a`
    cell = pool({1: [value(30, "a", "b")], 2: [value(40, "a")], 3: [value(50, "a")]})
    assert cell.left_out == (1,) and [v.value for v in cell.values.values()] == [40, 50]


def test_as_many_seeds_as_share_gradients_are_pooled():
    """Seed 1, attacked by both methods, was the only one."""
    cell = pool({1: [value(50, "a"), value(30, "b")], 2: [value(40, "a")], 3: [value(20, "b")]})
    assert cell.left_out == (3,) and [v.value for v in cell.values.values()] == [50, 40]


def test_a_seed_of_other_gradients_is_left_out_and_named(make):
    runs = [make("EP", seed) for seed in (1, 2, 3)]
    for seed, (run, gradient) in enumerate(zip(runs, ("bptt", "ep", "bptt")), 1):
        Store(run).add(attacked(run, 4 * seed, seed=seed, gradient=gradient))
    _, rows, notes = compared(*runs)
    row = only(rows, measure="adversarial", grad=STRONGEST)
    assert (row["mean"], row["n"], row["gradients"]) == ("40.0000", 2, "bptt@4")
    assert notes == [
        "left out of MLP EP: seed 2, attacked by other gradient methods, in 1 row: pgd L2 0.5, "
        "20 iterations, 20 images (%)"
    ]


def test_masked_accuracies_are_upper_bounds(make):
    run = make("EP")
    Store(run).add(
        attacked(run, 8, masked=10),
        attacked(run, 8, masked=2, gradient="ep"),
        attacked(run, 8, masked=10, eps=1.0),
    )
    groups, rows, _ = compared(run)
    found = {row["eps"]: row["masked"] for row in strongest_rows(rows)}
    assert found == {"0.5": "0.1000", "1": "0.5000"}  # masked with all gradient methods
    text = "\n".join("|".join(row) for row in comparison_table(groups, _table_keys(groups)))
    assert text.count("≤ 40.00 (1)") == 5
    figure = plots.robustness(groups, "2")
    hollow = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert sorted(line.get_xdata()[0] for line in hollow) == [0.5, 1.0]
    assert "Hollow: an upper bound" in figure.get_label()


# ------------------------------------------------------------------------------- one table


def test_energy_models_and_feed_forward_networks_stand_in_one_row(make):
    """They never did: worst@29 stood in one row and worst@1 in another."""
    runs = [make("EP"), make("BPTT", model="FFMLP", alg="BP")]
    Store(runs[0]).add(evaluated(runs[0], 18), *(attacked(runs[0], n, steps=n) for n in (1, 4)))
    Store(runs[1]).add(attacked(runs[1], 10, steps=0, **FEED_FORWARD))
    groups, _, _ = compared(*runs)
    keys = _table_keys(groups)
    table = comparison_table(groups, [key for key in keys if key.grad in ("", STRONGEST)])
    assert table[2:-1] == [
        ["clean accuracy, 20 images (%)", "90.00 (1)", "90.00 (1)", ""],
        [
            "pgd L2 0.5, 20 iterations, 20 images (%)",
            "5.00 (1)",
            "50.00 (1)",
            "+45.00 (+20.00 to +65.00; seed 1 alone)",
        ],
    ]
    # a gradient unrolled through one step is none of a network without steps
    table = comparison_table(groups, [key for key in keys if key.grad not in ("", STRONGEST)])
    assert [row[1:] for row in table[1:]] == [
        ["", "50.00 (1)", ""],
        ["5.00 (1)", "", ""],
        ["20.00 (1)", "", ""],
    ]


def test_the_clean_accuracy_before_an_attack_is_of_its_images_and_predictions(make):
    run = make("EP")
    Store(run).add(
        evaluated(run, 18),
        evaluated(run, 12, predict_step=3),
        attacked(run, 4, predict_step=3),
        attacked(run, 6),
    )
    groups, _, _ = compared(run)
    keys = [key for key in _table_keys(groups) if key.grad in ("", STRONGEST)]
    table = comparison_table(groups, keys)
    assert [row[1] for row in table[2:-1]] == ["90.00 (1)", "30.00 (1)", "60.00 (1)", "20.00 (1)"]
    assert "predicted after 3 steps" in table[4][0] and "predicted after 3 steps" in table[5][0]


def test_eps_is_written_as_given(make):
    run = make("EP")
    Store(run).add(attacked(run, 4, eps=8 / 255, norm="inf"))
    groups, rows, _ = compared(run)
    text = "\n".join(row[0] for row in comparison_table(groups, _table_keys(groups)))
    assert "pgd L-infinity 8/255, 20 iterations" in text
    assert only(rows, grad=STRONGEST)["eps"] == repr(8 / 255)


def test_eps_0_of_an_attack_is_written(make):
    run = make("EP")
    Store(run).add(attacked(run, 4, eps=0))
    assert only(compared(run)[1], grad=STRONGEST)["eps"] == "0"


def test_a_mean_with_an_upper_bound_is_one():
    """One of two seeds with 1.9 % of masked images lost its mark."""
    masked = Value(50.0, frozenset({"a"}), masked=0.019)
    assert str(pool({1: [masked], 2: [value(40, "a")]})).startswith("≤ ")


def test_audits_are_rows(make):
    runs = [make("EP", seed) for seed in (1, 2)]
    Store(runs[0]).add(audited(runs[0], 8))
    Store(runs[1]).add(audited(runs[1], 10, trusted=False))
    _, rows, _ = compared(*runs)
    row = only(rows, measure="audit")
    assert (row["norm"], row["eps"], row["detail"]) == ("2", "0.5", "quick, 20 images")
    assert (row["mean"], row["n"]) == ("45.0000", 2)
    assert only(rows, measure="audit trusted")["mean"] == "50.0000"


def test_the_row_of_an_audit_names_its_surrogate(make):
    run = make("EP")
    Store(run).add(audited(run, 8, surrogate=["ab", 4], restarts=1))
    row = only(compared(run)[1], measure="audit")
    assert "with a surrogate" in row["detail"] and "1 restart," in row["detail"]


def test_accuracies_that_trainings_recorded_on_other_images_are_other_rows(make):
    runs = [make("EP", test_size=60), make("BPTT", test_size=100), make("BPTT", task="MNIST")]
    rows = [row for row in compared(*runs)[1] if row["measure"] == "clean"]
    assert len({(row["task"], row["images"], row["detail"]) for row in rows}) == 3
    assert all(row["n"] == 1 for row in rows)


def test_audits_of_energy_models_and_feed_forward_networks_stand_in_one_row(make):
    runs = [make("EP"), make("BPTT", model="FFMLP", alg="BP")]
    Store(runs[0]).add(audited(runs[0], 8, steps=[4], ends_early=0.001))
    Store(runs[1]).add(audited(runs[1], 10, **FEED_FORWARD))
    groups, *_ = compared(*runs)
    (key,) = {key for group in groups for key in group.cells if key.measure == "audit"}
    (row,) = comparison_table(groups, [key])[1:]
    assert row[:3] == ["audit L2 0.5, quick, 20 images (%)", "40.00 (1)", "50.00 (1)"]


def test_latex_is_escaped():
    assert latex([["", "a_b & 5 %"], ["\\x{}", "≤ −4.00 ± 1.00 (2)"]]) == [
        "\\begin{tabular}{lr}",
        "\\toprule",
        " & a\\_b \\& 5 \\% \\\\",
        "\\midrule",
        "\\textbackslash{}x\\{\\} & $\\leq$ $-$4.00 $\\pm$ 1.00 (2) \\\\",
        "\\bottomrule",
        "\\end{tabular}",
    ]


# ------------------------------------------------------------------------------- differences


def cell_of(*outcomes):
    return Cell(
        {n: Value(100 * own.mean(), outcomes=own) for n, own in enumerate(map(np.array, outcomes))}
    )


def test_a_difference_without_spread_has_an_interval_of_width_0():
    """One seed, and all images change alike."""
    found = difference(cell_of([True] * 9), cell_of([False] * 9))
    assert found == (-100, -100, -100, 1, (0,))
    assert difference(cell_of([True, False]), cell_of([True, False])) == (0, 0, 0, 1, (0,))


def test_only_seeds_with_outcomes_of_both_are_paired():
    first_cell = cell_of([True, True], [True, False])
    second = Cell({1: first_cell.values[1], 2: first_cell.values[0]})
    assert difference(first_cell, second) == (0, 0, 0, 1, (1,))
    assert difference(first_cell, Cell({0: Value(50.0)})) is None
    assert difference(first_cell, Cell({5: first_cell.values[0]})) is None


@pytest.mark.parametrize(
    "seeds, others, named",
    [
        ([1], [1, 2], "; seed 1 alone)"),
        ([1], [1], "; seed 1 alone)"),
        ([1, 2, 3], [2, 3], "; seeds 2, 3 alone)"),
        ([1, 2], [1, 2], "to +100.00)"),
    ],
)
def test_a_difference_names_its_seeds_where_they_are_not_those_of_the_means(seeds, others, named):
    """63.00 (1) and 56.50 ± 8.49 (2) stood beside a difference of -12.50, that of seed 1."""
    lower = Value(50.0, outcomes=np.array([True, False]))
    higher = Value(100.0, outcomes=np.array([True, True]))
    found = difference(Cell(dict.fromkeys(seeds, lower)), Cell(dict.fromkeys(others, higher)))
    assert found.mean == 50 and f"{found}".endswith(named)


def test_pairing_by_image_narrows_the_interval():
    generator = np.random.default_rng(1)
    hard = generator.random((1, 400)) < 0.5
    better = hard | (generator.random((1, 400)) < 0.05)
    paired = better.astype(int) - hard
    shuffled = better.astype(int) - generator.permutation(hard, axis=1)
    widths = [np.ptp(bootstrap_interval(values)) for values in (paired, shuffled)]
    assert widths[0] < widths[1] / 2


def test_the_interval_is_that_of_resampled_images():
    """Images that are drawn together are drawn as one by one."""
    generator = np.random.default_rng(2)
    paired = generator.integers(-1, 2, (1, 50))
    means = paired[0][generator.integers(50, size=(20000, 50))].mean(1)
    expected = np.percentile(means, [2.5, 97.5])
    assert bootstrap_interval(paired, 20000) == pytest.approx(expected, abs=0.021)


def test_the_interval_covers_the_true_difference():
    """In about 95 of 100 repetitions, with seeds enough."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        of_seeds = generator.normal(0.7, 0.05, (12, 1))
        low, high = bootstrap_interval(generator.random((12, 150)) < of_seeds, 400)
        covered += low <= 0.7 <= high
    assert 178 <= covered <= 198


# ------------------------------------------------------------------------------- corruptions


def test_an_incomplete_set_of_corruptions_has_no_mean(make):
    """2 of 19 corruptions have been given as the mean."""
    run = make("EP")
    Store(run).add(*corrupted(run, CORRUPTIONS[:2], 0.9))
    groups, rows, notes = compared(run)
    assert not [row for row in rows if row["measure"] == "corruptions"]
    assert notes == [
        f"left out of {run}: 2 of 19 corruptions, whose mean would be one over another set"
    ]
    assert "corruptions.png" not in dict(plots.all_figures(groups))


def test_means_over_15_and_over_19_corruptions_are_not_mixed(make):
    runs = [make("EP", 1), make("EP", 2), make("BPTT", 1)]
    Store(runs[0]).add(*corrupted(runs[0], CORRUPTIONS[:15], 0.8))
    Store(runs[1]).add(
        *corrupted(runs[1], CORRUPTIONS[:15], 0.9), *corrupted(runs[1], CORRUPTIONS[15:], 0.5)
    )
    Store(runs[2]).add(*corrupted(runs[2], CORRUPTIONS[:15], 0.7))
    groups, rows, _ = compared(*runs)
    means = {
        (row["group"], row["attack"]): (float(row["mean"]), row["n"])
        for row in rows
        if row["measure"] == "corruptions" and row["eps"] == ""
    }
    assert means == {
        ("MLP EP", "first 15 corruptions"): (pytest.approx(65), 2),
        ("MLP BPTT", "first 15 corruptions"): (pytest.approx(50), 1),
        ("MLP EP", "all 19 corruptions"): (pytest.approx((15 * 70 + 4 * 30) / 19, abs=1e-3), 1),
    }
    figure = plots.corruptions(groups)
    assert "mean over first 15 corruptions" in figure.get_label()
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert labels == [["MLP EP", "MLP BPTT"]]


def of_folder(records, folder):
    """Records of corruptions in another folder of corrupted images."""
    return [dataclasses.replace(r, data={**r.data, "fingerprint": folder}) for r in records]


@pytest.mark.parametrize(
    "measured, means",
    [
        ([("a", 0, 19, 0.7), ("b", 0, 10, 0.4)], [50]),
        ([("a", 0, 19, 0.7), ("b", 0, 19, 0.4)], [20, 50]),
        ([("a", 0, 5, 0.7), ("b", 0, 5, 0.4), ("a", 5, 19, 0.7)], []),
    ],
)
def test_a_mean_over_corruptions_is_of_one_folder(make, measured, means):
    """23.68 % was the mean over nine corruptions of one folder and ten of another."""
    run = make("EP")
    for folder, start, stop, accuracy in measured:
        names = CORRUPTIONS[start:stop]
        Store(run).add(*of_folder(corrupted(run, names, accuracy), folder))
    groups, rows, notes = compared(run)
    found = [row for row in rows if row["attack"] == "all 19 corruptions" and not row["eps"]]
    assert sorted(round(float(row["mean"])) for row in found) == means
    labels = [row[0] for row in comparison_table(groups, _table_keys(groups))]
    assert len(set(labels)) == len(labels)
    assert any("several sets of images" in note for note in notes) == (len(means) < 2)


# ------------------------------------------------------------------------------- published tables

PUBLISHED = sorted((ROOT / "check/published").glob("*.csv"))


def own_results(task="CIFAR10", methods=("bptt@29",), measure="adversarial"):
    """A group with results that published ones can stand beside."""
    run = RunResults({"seed": 1, "task": task}, {"task": task})
    images = Images(task, "test", 100, "ab")
    for eps in (0.1, 0.5):
        key = Key(measure, "pgd", "2", STRONGEST, eps=eps, detail="100 images", images=images)
        run.add(key, Value(50.0, frozenset(methods)))
    for severity in range(1, 6):
        run.add(Key("corruptions", "all 19 corruptions", eps=severity), Value(50.0))
    return Group("own", [run])


def drawn(figure):
    """{label: number of points} of the curves of a figure."""
    return {
        container.get_label(): len(container.lines[0].get_xdata())
        for axes in figure.axes
        for container in axes.containers
    }


def test_a_published_curve_is_of_the_same_steps():
    """That of 29 steps stood beside the strongest of seven numbers of steps."""
    published = read_published(PUBLISHED, {"CIFAR10"})
    figure = plots.robustness([own_results(), *published], "2")
    assert drawn(figure)["published: EP-CNN"] == 11
    (ep,) = [group for group in published if group.label == "published: EP-CNN"]
    at_29 = {key.eps for key in ep.cells if key.attack == "pgd" and key.steps == "29"}
    lines = [c.lines[0] for c in figure.axes[0].containers if c.get_label() == ep.label]
    assert set(lines[0].get_xdata()) <= at_29
    several = own_results(methods=("bptt@29", "bptt@60"))
    figure = plots.robustness([several, *published], "2")
    assert "published: EP-CNN" not in drawn(figure) and "published: BP-CNN" in drawn(figure)
    assert "Not drawn, without comparable results: published: EP-CNN" in figure.get_label()


def test_the_caveats_of_published_results_are_in_the_caption():
    published = read_published(PUBLISHED, {"CIFAR10"})
    caption = plots.robustness([own_results(), *published], "2").get_label()
    assert "labels from the model's own predictions" in caption and "not clipped" in caption
    assert "corruptions" not in caption
    assert "labels from" not in plots.robustness([own_results()], "2").get_label()


def test_published_tasks_are_not_merged():
    labels = {group.label for group in read_published(PUBLISHED, {"CIFAR10", "CIFAR100"})}
    assert {"published: EP-CNN on CIFAR10", "published: EP-CNN on CIFAR100"} <= labels
    assert all(" on CIFAR" in label for label in labels)


def test_a_published_mean_over_other_corruptions_is_left_out():
    """The EP-CNN has 18 rows."""
    published = read_published(PUBLISHED, {"CIFAR10"})
    labels = drawn(plots.corruptions([own_results(), *published]))
    assert "published: EP-CNN" not in labels and len(labels) == 5
    (ep,) = [group for group in published if group.label == "published: EP-CNN"]
    notes = {note for run in ep.runs for note in run.notes}
    assert notes == {"left out of published: EP-CNN: 18 corruptions, which is no set of 15 or 19"}


def test_the_published_characteristic_is_read():
    (ep,) = [g for g in read_published(PUBLISHED, {"CIFAR10"}) if g.label == "published: EP-CNN"]
    cells = [cell for key, cell in ep.cells.items() if key.measure == "characteristic"]
    assert len(cells) == 250 and all(cell.statistics.n == 5 for cell in cells)


# ------------------------------------------------------------------------------- figures


def group_of(label, curves, **columns):
    """A group with one run per curve, {eps: accuracy}."""
    runs = []
    for seed, curve in enumerate(curves):
        run = RunResults({"seed": seed})
        for eps, accuracy in curve.items():
            key = Key("adversarial", "pgd", "2", STRONGEST, eps=eps, detail="20 iterations")
            run.add(key._replace(**columns), Value(accuracy, frozenset({"bptt@4"})))
        runs.append(run)
    return Group(label, runs)


def test_points_of_fewer_seeds_are_not_connected():
    both = group_of("both", [{1: 50, 2: 30}, {1: 40}])
    figure = plots.robustness([both], "2")
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in lines] == [[[1, 45]], [[2, 30]]]
    assert "fewer seeds" in figure.get_label()


def test_a_panel_joins_only_what_was_measured_alike():
    groups = [
        group_of("a", [{1: 50, 2: 30}]),
        group_of("b", [{1: 40, 2: 20}]),
        group_of("c", [{1: 10, 2: 5, 3: 1}], detail="100 iterations"),
    ]
    figure = plots.robustness(groups, "2")
    assert drawn(figure) == {"a": 2, "b": 2}
    assert "pgd: 20 iterations, gradient bptt@4" in figure.get_label()
    assert "without comparable results: c" in figure.get_label()


def test_a_group_that_one_panel_lacks_is_named():
    """It was named only where no panel had it: an audit of 50 images vanished beside one of 30."""
    groups = [group_of("a", [{1: 50, 2: 30}]), group_of("b", [{1: 40, 2: 20}])]
    audit = Key("audit", "audit", "2", eps=1)
    for group, images in zip(groups, (30, 50)):
        group.runs[0].add(audit._replace(images=Images("digits", "test", images)), Value(20.0))
    caption = plots.robustness(groups, "2").get_label()
    (lacking,) = [name for name in "ab" if f"{name} (panel audit)" in caption]
    assert f"Not drawn, without comparable results: {lacking} (panel audit)." in caption


def test_curves_differ_in_their_lines_and_chance_is_drawn():
    """In grey, colours are alike."""
    groups = [group_of(name, [{1: 50, 2: 30}]) for name in "abc"]
    figure = plots.robustness(groups, "2")
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_linestyle() for line in lines}) == 3
    assert "linear up to the smallest eps and logarithmic beyond" in figure.get_label()
    assert "chance" not in figure.legends[0].get_texts()[-1].get_text()
    for group, task in zip(groups, ("digits", "digits", "CIFAR100")):
        group.runs[0].args["task"] = task
    labels = plots.robustness(groups[:2], "2").axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["a", "b", "chance 10 %"]
    labels = plots.robustness(groups, "2").axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["a", "b", "c"]


def test_the_caption_of_the_training_counts_the_test_images(make):
    groups, *_ = compared(make("EP", test_size=60), make("BPTT", test_size=60))
    assert "Accuracy on 60 test images over" in plots.training(groups).get_label()
    run = make("EP", test_size=None, test_data="ab")
    groups, *_ = compared(run)
    assert "Accuracy on all test images over" in plots.training(groups).get_label()
    Store(run).add(evaluated(run, 18))
    groups, *_ = compared(run)
    assert f"Accuracy on {IMAGES} test images over" in plots.training(groups).get_label()


def test_the_curve_begins_with_the_clean_accuracy():
    (group,) = [group_of("a", [{1: 50, 2: 30}, {1: 40}])]
    for run, clean in zip(group.runs, (90, 80)):
        run.add(Key("clean", detail="100 images"), Value(clean))
    line = plots.robustness([group], "2").axes[0].containers[0].lines[0]
    assert line.get_xydata().tolist() == [[0, 85], [1, 45]]


def over_steps(label, steps, **columns):
    run = RunResults({"seed": 1})
    for number in steps:
        key = Key("adversarial", "pgd", "2", "bptt", str(number), 0.5, "20 iterations")
        run.add(key._replace(**columns), Value(40.0 + number, frozenset({f"bptt@{number}"})))
    return Group(label, [run])


def test_attack_steps_joins_rows_of_equal_settings_alone():
    """Rows of another budget, of other images or without clipping were joined with them."""
    group = over_steps("a", (2, 10, 9))
    others = (
        {"detail": "100 iterations"},
        {"images": Images("digits", "test", 5, "")},
        {"detail": "20 iterations, not clipped", "rest": '{"clip": false}'},
    )
    for columns in others:
        for key, values in over_steps("", (3, 5), **columns).runs[0].values.items():
            group.runs[0].values[key] = values
    figures = dict(plots.all_figures([group]))
    figure = figures["attack_steps.png"]()
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [2, 9, 10]
    assert figure.axes[0].get_ylim() == (-2, 102)
    assert "pgd, L2 eps 0.5, 20 iterations" in figure.get_label()


def test_attack_steps_is_drawn_only_where_steps_vary():
    assert "attack_steps.png" not in dict(plots.all_figures([over_steps("a", (4,))]))
    groups = [over_steps("a", (4,)), over_steps("b", (8,))]
    assert "attack_steps.png" not in dict(plots.all_figures(groups))


@pytest.mark.usefixtures("full_figures")
def test_a_figure_for_all_that_runs_have(ok, make, tmp_path):
    runs = [make("EP", seed) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        Store(run).add(
            evaluated(run, 18),
            *(attacked(run, 4 + n, seed=seed, steps=n) for n in (2, 4)),
            attacked(run, 9, seed=seed, attack="square", norm="inf", gradient="none"),
            audited(run, 3),
            *corrupted(run, CORRUPTIONS, 0.9),
            characteristic(run, [0.1, 0.2, 0.3, 0.4]),
        )
    ok("--todo compare --load-path", *runs)
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    names = {path.name for path in folder.iterdir() if path.suffix != ".txt"}
    assert names == {
        "comparison.md",
        "comparison.csv",
        "comparison.tex",
        "robustness_2.png",
        "robustness_inf.png",
        "training.png",
        "characteristic.png",
        "corruptions.png",
        "attack_steps.png",
    }
    assert all(path.stat().st_size > 5000 for path in folder.glob("*.png"))


# ------------------------------------------------------------------------------- files and messages


def test_the_files_of_a_comparison(ok, make, tmp_path):
    runs = [make(name, seed) for name in ("EP", "BPTT") for seed in (1, 2)]
    for run, seed, robust in zip(runs, (1, 2, 1, 2), (4, 6, 8, 10)):
        Store(run).add(evaluated(run, 18), attacked(run, robust, seed=seed))
    published = ROOT / "tests/published_digits.csv"
    out = ok("--todo compare --labels EP BPTT --published", published, "--load-path", *runs)
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    assert f"4 runs in 2 groups; results are in {folder.relative_to(tmp_path)}" in out
    text = (folder / "comparison.md").read_text()
    row = (
        "| pgd L2 0.5, 20 iterations, 20 images (%) | 25.00 ± 7.07 (2) | 45.00 ± 7.07 (2) | +20.00 "
    )
    assert row in text and row in out
    group = "| EP | 1, 2 | digits | the best on the test images, of 2 epochs | 50.00 | bptt@4 |"
    assert group in text
    assert "## Each gradient method" in text and "pgd L2 0.5, bptt, 20 iterations" in text
    assert "recorded in training" not in text  # as all were evaluated
    effort = "Gradient methods of the attacks: EP: bptt@4; BPTT: bptt@4."
    assert f"\n{effort}\n" in text and effort in out and "difference to EP |" in out
    assert r"25.00 $\pm$ 7.07 (2)" in (folder / "comparison.tex").read_text()
    with open(folder / "comparison.csv") as file:
        table = csv.DictReader(file)
        assert table.fieldnames is not None
        assert table.fieldnames[:11] == (
            "group measure attack norm grad steps eps detail mean std n".split()
        )
        row = only(list(table), group="BPTT", measure="adversarial", grad="worst")
    assert (row["difference"], row["difference_n"], row["converged"]) == ("20.0000", "2", "0.5000")
    assert float(row["difference_low"]) < 20 < float(row["difference_high"])
    assert (row["chosen_on"], row["task"], row["images"]) == ("test", "digits", "20")


def test_runs_without_anything_leave_gaps(ok, make, tmp_path):
    ok("--todo compare --figures pdf --load-path", make("EP"), make("BPTT") / "checkpoint.tar")
    (folder,) = (tmp_path / "results" / "compare").glob("*/*")
    assert (folder / "training.pdf").exists()
    assert "recorded in training" in (folder / "comparison.md").read_text()
    assert "MLP BPTT" in (folder / "comparison.csv").read_text()


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


def test_flags_without_an_effect_are_noted(cli, zoo):
    code, _, err = cli("--todo compare --epochs 3 --eps 1 --load-path", zoo("compared EP"))
    assert code == 0
    assert "--epochs has no effect on compare" in err and "--eps has no effect on compare" in err


def test_wrong_labels_and_tables_are_refused(cli, zoo, tmp_path):
    run = zoo("compared EP")
    code, _, err = cli("--todo compare --labels a b --load-path", run)
    assert code == 2 and "expected 1" in err
    code, _, err = cli("--todo compare --labels a a --load-path", run)
    assert code == 2 and "two labels are the same" in err
    (tmp_path / "table.csv").write_text("x,y\n1,2\n")
    code, _, err = cli("--todo compare --published table.csv --load-path", run)
    assert code == 2 and "has no results of digits" in err and len(err.splitlines()) == 1
    (tmp_path / "table.csv").write_text("task,x\nCIFAR10,1\nCIFAR100,2\n")
    code, _, err = cli("--todo compare --published table.csv --load-path", run)
    assert code == 2 and err.endswith(
        "table.csv has no results of digits (it has CIFAR10, CIFAR100)\n"
    )
    code, _, err = cli("--todo compare --published none.csv --load-path", run)
    assert code == 2 and "none.csv cannot be read: No such file" in err
    os.mkfifo(tmp_path / "pipe.csv")
    code, _, err = cli("--todo compare --published pipe.csv --load-path", run)
    assert code == 2 and "pipe.csv cannot be read" in err and len(err.splitlines()) == 1


EVIL = "<script>alert(1)</script>|\x1b[31m"
FORMULA = "=HYPERLINK(0)"
DEEP = "[" * 400 + "]" * 400
ODD = {  # what hand-edited records can contain: settings of an attack, or of its value
    "another norm": {"norm": EVIL},
    "eps": {"eps": 1e-320},
    "no attack": {"attack": 5},
    "many steps": {"steps": 10**400},
    "steps": {"steps": {"a": ["b"]}, "gradient": "worst", "gradients": {"a": 1}},
    "no steps": {"steps": [None, [], {}], "gradients": 7, "gradient": "worst"},
    "long": {"smooth": "x" * 10**5, "version": "x" * 10**5, "iters": "y" * 10**5},
    "lists": {"tol": [1, [2]], "mbs": {"a": 1}, "seed": [], "clip": {}, "libraries": [[[]]]},
    "deep": {"start": DEEP},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_settings_of_a_record_are_a_row_or_a_gap(ok, make, tmp_path, name):
    run = make("EP")
    told = attacked(run, 4, **ODD[name]).to_json().replace(f'"{DEEP}"', DEEP)
    (run / "results.jsonl").write_text(told + "\n")
    ok("--todo compare --load-path", run)
    for path in (tmp_path / "results").rglob("comparison.*"):
        assert max(map(len, path.read_text().splitlines())) < 2000


@pytest.mark.parametrize(
    "value",
    [
        {"adversarial": -1, "masked": 0},
        {"adversarial": 10**400, "masked": 0},
        {"adversarial": 0.5, "masked": 5, "outcomes": "AAAA", "masked_outcomes": [1]},
        {"adversarial": 0.5, "masked": 0, "outcomes": "é"},
        {"adversarial": "0.5", "masked": True},
        {},
    ],
)
def test_odd_values_of_a_record_are_gaps(ok, make, tmp_path, value):
    run = make("EP")
    own = attacked(run, 4).settings
    value = {**UNUSED, **value}
    data = {"images": 10**9, "clean": "x", "fingerprint": None, "task": {}}
    for kind in ("attack", "audit", "evaluate", "corruption", "characteristic"):
        line = record(run, kind, own, value, **data).to_json()
        with open(run / "results.jsonl", "a") as file:
            file.write(line + "\n{\n[]\n" + line[:50] + "\n")
    ok("--todo compare --load-path", run)
    (table,) = (tmp_path / "results").rglob("comparison.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["mean"] for row in rows if row["measure"] == "adversarial"} <= {"50.0000"}


def test_what_is_shown_of_a_run_is_text(ok, make, tmp_path):
    """No HTML, formula, cell of its own or order to a terminal, whatever a record contains."""
    run = make("EP")
    Store(run).add(
        attacked(run, 4, attack=EVIL, gradient="$\\foo$" + EVIL, start=EVIL),
        attacked(run, 4, attack=FORMULA, gradient=FORMULA, iters=FORMULA, tol=EVIL),
        audited(run, 4, budget="+" + EVIL),
    )
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
    markdown, table, tex = (
        (folder / f"comparison.{end}").read_text() for end in ("md", "csv", "tex")
    )
    assert "\x1b" not in out + markdown + table + tex and "<" not in out + markdown + tex
    assert "&lt;script>alert(1)&lt;/script>\\|" in markdown and "&lt;script>" in out
    rows = list(csv.reader(table.splitlines()))
    assert len({len(row) for row in rows}) == 1
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for row in rows for cell in row)
    assert any(cell == "'" + FORMULA for row in rows for cell in row)
    for part in markdown.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def enter(folder, words, log):
    os.chdir(folder)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(log, "w", buffering=1)
    sys.exit(main.main(words))


@pytest.mark.parametrize("todo", ["compare", "evaluate", "attack"])
def test_no_pipe_is_waited_for(make, tmp_path, todo):
    run = make("EP")
    for path in [*run.iterdir(), run / "results.jsonl"]:
        if path.suffix in (".txt", ".csv", ".json", ".jsonl", ".npz"):
            path.unlink(missing_ok=True)
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


def test_every_setting_has_its_place(zoo):
    """A setting without one is seen only where it distinguishes rows."""
    config = Config.from_flat(read_run(zoo("compared EP")).args)
    config = config.replace(todo="audit", eps=0.5)
    places = {*read.COLUMNS, *read.OF_SEARCH, *read.BUDGET, *read.DEVIATIONS}
    all_settings = [
        *settings.attack(config, 0.5, "x").values(),
        settings.audit(config, 0.1),
        settings.corruption(config, "fog"),
        settings.characteristic(config),
        settings.prediction(config, 4),
    ]
    for own in all_settings:
        assert own.keys() - places <= {"version", "libraries"}
