"""The records of an attack, and the tables made of them."""

import csv
import math

import numpy as np
import pytest
from conftest import context
from shared import enter

from experiment.config import Config
from experiment.results.attacks import Sweep, describe_result
from experiment.results.store import Store
from experiment.runs.folder import RunFolder

CONFIG = Config().replace(task="digits", seed=0)
MODEL = {"weights": "w", "file": "model.pt"}
DATA = {"task": "digits", "split": "test", "images": 4, "fingerprint": "d", "clean": 0.75}


def sweep(folder, config=CONFIG, data=DATA):
    return Sweep(RunFolder(folder), Store(folder), config, MODEL, data, "model.pt", "")


def result(correct=2):
    return {
        "correct": np.arange(4) < correct,
        "masked": 0.0,
        "unmoved": 0.0,
        "mean_norm": 1.0,
        "masked_images": np.zeros(4, dtype=bool),
    }


def test_a_norm_that_is_not_finite_is_shown(tmp_path):
    one = sweep(tmp_path)
    one.add(0.1, {"bptt": {**result(), "mean_norm": math.nan}})
    again = sweep(tmp_path)
    again.write()
    assert [row["mean_norm"] for row in again.rows] == ["nan"]
    (record,) = again.results(0.1).values()
    assert "mean norm nan" in describe_result(CONFIG, 0.1, "bptt", record.value)


def test_two_sweeps_write_one_table(tmp_path):
    first = sweep(tmp_path)
    second = sweep(tmp_path)
    first.add(0.1, {"bptt": result(1)})
    second.add(0.2, {"bptt": result(2)})
    second.add(0.1, {"bptt": result(3)})  # which the first has measured
    other = sweep(tmp_path, data={**DATA, "images": 3})
    other.add(0.1, {"bptt": result(0)})
    fgsm = sweep(tmp_path, CONFIG.replace(attack="fgsm"))
    fgsm.add(0.1, {"bptt": result(0)})
    first.write()
    rows = list(csv.DictReader(open(tmp_path / "Adversarial_Accuracy.csv")))
    found = [(row["eps"], row["images"], float(row["adversarial"])) for row in rows]
    assert found == [("0.1", "4", 0.25), ("0.2", "4", 0.5), ("0.1", "3", 0)]
    text = (tmp_path / "Adversarial_Accuracy.txt").read_text().splitlines()
    assert [line for line in text if line[0] != "#"] == [
        "0.1 0.750000 0.250000",
        "0.2 0.750000 0.500000",
    ]
    assert len(list(csv.DictReader(open(tmp_path / "Adversarial_Accuracy_fgsm_2.csv")))) == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_two_attacks_on_one_run_at_once_lose_no_record(zoo, tmp_path, times):
    run = zoo.copy("tiny seed 3", tmp_path)
    line = f"--todo attack --device -1 --test-size 4 --attack-iters 1 --load-path {run}"
    for attempt in range(1, times + 1):
        processes = []
        for eps_list in ("1 2 3", "2 3 4"):
            words = f"{line} --attack-step 2 --seed {attempt} --eps-list {eps_list}"
            processes.append(context.Process(target=enter, args=(tmp_path, words.split())))
            processes[-1].start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        records = [record for record in Store(run).records if record.kind == "attack"]
        assert len(records) == 4 * attempt
        own = {r.settings["eps"] for r in records if r.settings["seed"] == attempt}
        assert own == {1, 2, 3, 4} and len({r.identity for r in records}) == len(records)
        rows = list(csv.DictReader(open(run / "Adversarial_Accuracy.csv")))
        assert len(rows) == len(records)
        assert [float(row["eps"]) for row in rows[:4]] == [1, 2, 3, 4]
        assert {row["seed"] for row in rows[:4]} == {str(attempt)}
    assert len([record for record in Store(run).records if record.kind == "evaluate"]) == 1
