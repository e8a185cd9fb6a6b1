"""What runs and results remember of how they were computed: precision, data, machine, restarts."""

import csv
import json
import pathlib
import shutil
import socket
import types

import pytest
import torch
from conftest import only_run
from shared import AUDIT_BUDGET as BUDGET
from shared import final_weights, forget, records, write_mnist

from ART_Timesteps_Addition.audit import stages
from data_utils import UserError
from experiment.config import Config
from experiment.devices import validate_device
from experiment.results import settings
from experiment.results.compare import group_runs
from experiment.results.read import read_run

TINY = (
    "--device -1 --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 --archi 784 8 10 --lrs 0.1 "
    "0.1 --betas 0 0.5 --save"
)
ATTACK = "--todo attack --device -1 --attack-step 2"
AUDIT = "--todo audit --device -1 --eps 1 --budget quick --attack-step 2 --test-size 4"
DIGITS = TINY + " --task digits --seed 3"


@pytest.fixture
def any_device(monkeypatch):
    """Lets a CPU take what asks for a CUDA device: bf16 is the same there."""
    monkeypatch.setattr("experiment.devices.validate_device", lambda *_: None)


def state(run, name="checkpoint.tar"):
    return torch.load(run / name, weights_only=True)


def rewrite(run, *without, **changes):
    """Gives a run other arguments, or takes them out."""
    for name in ("checkpoint.tar", "model.pt"):
        saved = state(run, name)
        config = {**saved["config"], **changes}
        saved["config"] = {dest: value for dest, value in config.items() if dest not in without}
        torch.save(saved, run / name)
    (run / "config.json").write_text(json.dumps(saved["config"]))


def without_fingerprints(run):
    """Makes it a run of an earlier version, which knows nothing of its data."""
    rewrite(run, "train_data", "test_data")


# ---- precision, compilation, tol, size of mini-batches


def test_a_resumed_training_computes_as_before(ok, tmp_path, monkeypatch, any_device):
    for folder, parts in (("whole", (2,)), ("parts", (1, 1))):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        ok(DIGITS, f"--precision bf16 --tol 0.01 --epochs {parts[0]}")
        for epochs in parts[1:]:
            out = ok(f"--device -1 --load-path {only_run('.')} --epochs {epochs}")
            assert "note:" not in out
    whole, parts = (only_run(tmp_path / folder) for folder in ("whole", "parts"))
    assert state(parts)["config"]["precision"] == "bf16" and state(parts)["config"]["tol"] == 0.01
    assert all(
        torch.equal(value, final_weights(parts)[key]) for key, value in final_weights(whole).items()
    )
    used = []
    monkeypatch.setattr("energy.precision.set_precision", used.append)
    ok(f"--todo evaluate --device -1 --load-path {parts}")
    assert used == ["fp32"]  # a training's precision is no property of its weights


def test_a_change_of_precision_is_noted(ok, cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("experiment.devices.validate_device", lambda *_: None)
        ok(DIGITS, "--precision bf16")
    run = only_run(tmp_path)
    code, _, err = cli(f"--device -1 --load-path {run}")
    assert (
        code == 2
        and err.count("\n") == 1
        and "--precision fp32" in err
        and "bf16 needs a CUDA device" in err
    )
    assert "note: --precision fp32 (until now bf16)" in ok(
        f"--device -1 --load-path {run} --precision fp32"
    )
    assert "--precision fp32 (until now bf16)" in state(run)["resumptions"][2]
    assert "precision: 'fp32'  # before: 'bf16'" in (run / "hyperparameters.txt").read_text()
    assert "note" not in ok(f"--device -1 --load-path {run}")


def test_an_old_gpu_takes_no_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    args = types.SimpleNamespace(compile=False, precision="bf16")
    with pytest.raises(UserError, match="T4 has 7.5; give --precision fp32"):
        validate_device(Config.of(args), torch.device("cuda", 0))


def test_a_compiled_training_resumes_on_a_cpu_with_a_note(ok, zoo, tmp_path):
    run = zoo.copy("tiny seed 3", tmp_path)
    rewrite(run, compile=True)
    assert "note: --no-compile (until now --compile)" in ok(f"--device -1 --load-path {run}")
    assert state(run)["config"]["compile"] is False
    ok(f"--todo evaluate --device -1 --load-path {run}")


def folders():
    return sorted(path.parent for path in pathlib.Path("results").rglob("checkpoint.tar"))


def test_seeds_and_comparisons_pool_one_precision_alone(ok, any_device):
    line = TINY + " --task digits --seeds 3 4"
    ok(line, "--precision bf16")
    assert "already" not in ok(line) and len(folders()) == 4
    assert ok(line, "--precision bf16").count("already") == 2 and len(folders()) == 4
    groups, _ = group_runs([read_run(run) for run in folders()])
    assert sorted(group.label for group in groups) == [
        "MLP EP, precision bf16",
        "MLP EP, precision fp32",
    ]
    assert [len(group.runs) for group in groups] == [2, 2]
    for run in folders()[:2]:
        rewrite(run, precision="fp32", compile=True)
    assert len(group_runs([read_run(run) for run in folders()])[0]) == 2


# ---- the machine


def test_a_run_and_its_results_have_host_and_threads(ok, zoo, tmp_path, monkeypatch):
    monkeypatch.setitem(stages.BUDGETS, "quick", BUDGET)
    run, threads = zoo.copy("tiny seed 3", tmp_path), torch.get_num_threads()
    attack = f"{ATTACK} --load-path {run} --attack-iters 2 --test-size 8"
    audited = f"{AUDIT} --load-path {run}"
    ok(attack, "--eps-list 1")
    kept = shutil.copy(run / "model.pt", tmp_path)
    with monkeypatch.context() as patch:  # another machine continues all of it
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        ok(f"--device -1 --load-path {run}")
        shutil.copy(kept, run / "model.pt")  # which the epoch may have improved
        ok(attack, "--eps-list 1 2")
        ok(audited)
    here, there = (f"{host}, {threads} thread" for host in (socket.gethostname(), "elsewhere"))
    text = (run / "hyperparameters.txt").read_text()
    assert (
        f"host: {socket.gethostname()}\nthreads: {threads}\n" in text
        and f"host: elsewhere\nthreads: {threads}\n" in text
    )
    rows = list(csv.DictReader(open(run / "Adversarial_Accuracy.csv")))
    assert [row["computed_on"].removesuffix("s") for row in rows] == [here, there]
    header = (run / "Adversarial_Accuracy.txt").read_text().splitlines()[1]
    assert f"computed on: {here}" in header and f"; {there}" in header
    assert not (run / "Adversarial_Accuracy_1.txt").exists()
    before = (run / "Adversarial_Accuracy.txt").read_text()
    ok(attack, "--eps-list 1 2")  # where nothing is computed nothing changes
    assert (run / "Adversarial_Accuracy.txt").read_text() == before
    path = run / "Audit_2_1_f.npz"
    path.unlink()
    forget(run, "audit")
    ok(audited)
    result = json.loads((run / "Audit_2_1.json").read_text())
    assert [place.removesuffix("s") for place in result["computed_on"]] == [there, here]
    assert f"computed on: {there}" in (run / "Audit_2_1.txt").read_text()


# ---- the data


@pytest.fixture
def data(tmp_path):
    """Two data folders in the format of MNIST, of which the first is in use as data."""
    for name, shift in (("a", 0), ("b", 3)):
        raw = write_mnist(tmp_path / name, n=60)
        for path in raw.glob("*labels*"):
            content = bytearray(path.read_bytes())
            content[8:] = bytes((value + shift) % 10 for value in content[8:])
            path.write_bytes(content)
    return tmp_path / "a", tmp_path / "b"


MNIST = TINY + " --seed 3"


def test_resuming_on_other_data_is_noted(ok, tmp_path, data):
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    config = json.loads((run / "config.json").read_text())
    assert (
        all(len(config[name]) == 16 for name in ("train_data", "test_data"))
        and state(run)["config"] == config
    )
    assert f"train_data: '{config['train_data']}'" in (run / "hyperparameters.txt").read_text()
    assert "note" not in ok(f"--device -1 --load-path {run}")
    shutil.rmtree(data[0])
    data[1].rename(data[0])  # under the name of the old one
    out = ok(f"--device -1 --load-path {run}")
    assert "note: other training images or labels: train_data " in out
    assert (
        f"note: other test images or labels: test_data {state(run)['config']['test_data']} (until now "
        f"{config['test_data']})"
        in out
        and out.count("note:") == 2
    )
    assert "other training images" in state(run)["resumptions"][3]
    assert f"# before: '{config['train_data']}'" in (run / "hyperparameters.txt").read_text()
    assert "note" not in ok(f"--device -1 --load-path {run}")


def test_the_best_model_is_compared_on_the_data_of_now(ok, tmp_path, data):
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    for name in ("checkpoint.tar", "model.pt"):
        saved = state(run, name)
        saved["history"][0]["test_acc"] = saved["best"] = 99.0
        torch.save(saved, run / name)
    ok(f"--device -1 --load-path {run}")
    assert state(run)["best"] == 99
    ok(f"--device -1 --load-path {run} --data-dir {data[1]}")
    assert state(run)["best"] < 99


def test_another_number_of_images_is_no_other_data(ok, tmp_path, data):
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    out = ok(f"--device -1 --load-path {run} --train-size 30")
    assert "--train-size 30 (until now 40)" in out and out.count("note") == 1


def test_a_run_that_knows_nothing_of_its_data_resumes_without_a_word(ok, tmp_path, data):
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    without_fingerprints(run)
    out = ok(f"--device -1 --load-path {run} --data-dir {data[1]}")
    assert "note: --data-dir" in out and out.count("note") == 1
    assert len(state(run)["config"]["test_data"]) == 16  # from here on it does


@pytest.mark.parametrize("value", ["x" * 100, 5, ["a"], "not hexadecimal\n"])
def test_a_fingerprint_that_is_none_is_refused(ok, cli, zoo, tmp_path, value):
    run = zoo.copy("tiny seed 3", tmp_path)
    saved = state(run)
    saved["config"]["train_data"] = value
    torch.save(saved, run / "checkpoint.tar")
    code, _, err = cli(f"--device -1 --load-path {run}")
    assert code == 2 and err.count("\n") == 1 and "train_data" in err


def test_seeds_take_no_run_of_other_data_as_done(ok, data):
    line = TINY + " --seeds 3 4"
    ok(line, f"--data-dir {data[0]}")
    assert ok(line, f"--data-dir {data[0]}").count("already") == 2 and len(folders()) == 2
    out = ok(line, f"--data-dir {data[1]}")
    assert "already" not in out and "2 of 2 seeds are done" in out and len(folders()) == 4
    groups, _ = group_runs([read_run(run) for run in folders()])
    assert [len(group.runs) for group in groups] == [2, 2] and "training images" in groups[0].label
    for run in folders()[:2]:  # of an earlier version: nobody knows, and it was good enough
        without_fingerprints(run)
    assert ok(line, f"--data-dir {data[1]}").count("already") == 2 and len(folders()) == 4
    assert len(group_runs([read_run(run) for run in folders()])[0]) == 1


def test_a_sweep_of_other_data_is_another_record(ok, tmp_path, data):
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    line = f"{ATTACK} --load-path {run} --attack fgsm --attack-restarts 2"
    text = run / "Adversarial_Accuracy_fgsm_2.txt"
    ok(line, f"--eps-list 1 --data-dir {data[0]}")
    before = text.read_text()
    ok(line, f"--eps-list 1 2 --data-dir {data[1]}")
    assert len(records(run, "attack")) == 3 and text.read_text() != before
    ok(line, f"--eps-list 1 --data-dir {data[0]}")  # is found again
    assert len(records(run, "attack")) == 3 and text.read_text() == before
    rows = list(csv.DictReader(open(text.with_suffix(".csv"))))
    assert [row["eps"] for row in rows] == ["1.0", "1.0", "2.0"]
    assert not list(run.glob("Adversarial_Accuracy*_1.*"))


def test_an_audit_of_other_data_is_another_audit(cli, ok, tmp_path, data, monkeypatch):
    monkeypatch.setitem(stages.BUDGETS, "quick", BUDGET)
    ok(MNIST, f"--data-dir {data[0]}")
    run = only_run(tmp_path)
    line = f"{AUDIT} --load-path {run}"
    ok(line, f"--data-dir {data[0]}")
    old = json.loads((run / "Audit_2_1.json").read_text())
    code, _, err = cli(line, f"--data-dir {data[1]}")
    assert code == 0 and "Audit_2_1.npz contained the adversarial examples of another" in err
    new = json.loads((run / "Audit_2_1.json").read_text())
    assert new["settings"]["data"] != old["settings"]["data"]
    first, second = records(run, "audit")
    assert (
        first.data["fingerprint"] == old["settings"]["data"]
        and first.value["robust"] == old["robust"]
    )
    assert second.data["fingerprint"] == new["settings"]["data"]


# ---- what identifies a measurement


SETTINGS = {
    "evaluate": lambda config: settings.prediction(config, config.learning.T1),
    "audit": lambda config: settings.audit(config.replace(eps=0.5), 1e-3),
    "corruption": lambda config: settings.corruption(config, "fog"),
    "characteristic": settings.characteristic,
    "gducheck": settings.gducheck,
}
CHANGES = {
    "evaluate": ("mbs", "precision", "T1", "tol", "compile"),
    "audit": (
        "attack_norm", "no_clip", "budget", "seed", "mbs", "precision", "T1", "predict_step",
        "attack_step", "tol", "compile",
    ),
    "corruption": ("mbs", "precision", "T1", "tol", "compile"),
    "characteristic": ("mbs", "precision", "T1", "compile"),
    "gducheck": ("T1", "T2", "betas", "thirdphase", "alg", "compile"),
}  # fmt: skip
OTHER = {
    "mbs": 7,
    "precision": "bf16",
    "T1": 9,
    "T2": 3,
    "tol": 0.1,
    "compile": True,
    "attack_norm": "inf",
    "no_clip": True,
    "budget": "quick",
    "seed": 4,
    "predict_step": 3,
    "attack_step": [2],
    "betas": [0.0, 0.3],
    "thirdphase": True,
    "alg": "BPTT",
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_everything_that_changes_a_number_identifies_it(kind):
    of = SETTINGS[kind]
    plain = of(Config())
    for name in CHANGES[kind]:
        assert of(Config().replace(**{name: OTHER[name]})) != plain, name
    assert None not in plain.values()  # which would match any value
    assert plain == of(Config().replace(data_dir="elsewhere", device=3, figures="pdf"))
    assert json.loads(json.dumps(plain)) == plain


def test_an_audit_has_the_version_of_the_attacks(monkeypatch):
    own = SETTINGS["audit"](Config())
    assert own["libraries"].keys() == {"adversarial-robustness-toolbox", "torchattacks"}
    monkeypatch.setattr(settings, "ATTACK_VERSION", own["version"] + 1)
    assert SETTINGS["audit"](Config()) != own


def test_a_feed_forward_network_has_no_steps():
    own = SETTINGS["audit"](Config().replace(model="FFCNN", alg="BP"))
    assert not {"predict_step", "steps", "tol", "ends_early"} & own.keys()


# ---- how an attack was made


def test_a_comparison_tells_attacks_of_other_settings_apart(ok, zoo, tmp_path, any_device):
    run, found = zoo.copy("tiny seed 3", tmp_path), {}
    line = f"{ATTACK} --load-path {run} --test-size 8 --attack-iters 2 --eps-list 1"
    for more, words in (
        ("", ""),
        ("--attack-restarts 2", ", 2 restarts"),
        ("--precision bf16", ", bf16"),
        ("--tol 0.05", ", tol 0.05"),
        ("--predict-step 3", ", predicted after 3 steps"),
    ):
        ok(line, more)
        found[words] = {key.detail for key in read_run(run).values if key.measure == "adversarial"}
        assert any(words in detail for detail in found[words]), (words, found)
    assert len(found[words]) == 5
