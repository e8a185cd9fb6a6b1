"""Which images an attack counts as misclassified, where it begins, and how many time steps its
gradient is unrolled through: the same for every mini-batch, gradient method and number of
restarts."""

import argparse
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from art.attacks import evasion
from shared import OneOfTwo, Stopped

import metrics
import model_utils as mu
from ART_Timesteps_Addition import names
from ART_Timesteps_Addition.audit import stages
from ART_Timesteps_Addition.pytorch import Unrolled
from data_utils import load_split

T1 = 12
ATTACK = "--todo attack --device -1 --seed 0"
FEW = stages.Budget(2, 1, 4, 130, 2, 3, 2)


@pytest.fixture
def trained(zoo):
    """name -> the run folder of a small MLP that has learnt some of the digits."""
    return lambda name: zoo({"mse": "few digits", "softmax": "few digits, softmax"}[name])


def changed(run, folder, weights=None, config=None):
    """A copy of a run folder whose best model has other weights, {name: function of a tensor}, and
    other arguments."""
    run = shutil.copytree(run, folder)
    state = torch.load(run / "model.pt", weights_only=True)
    for name, change in (weights or {}).items():
        state["model_state_dict"][name] = change(state["model_state_dict"][name])
    state["config"].update(config or {})
    torch.save(state, run / "model.pt")
    (run / "config.json").write_text(json.dumps(state["config"]))
    return run


def table(run, stem="Adversarial_Accuracy"):
    """(settings, rows) of a sweep."""
    header = (run / f"{stem}.txt").read_text().splitlines()[0]
    settings = json.loads(header.removeprefix("# measured with: "))
    return settings, list(csv.DictReader(open(run / f"{stem}.csv")))


def digits(n):
    """(images, labels), tensors."""
    return load_split("digits", "", False, n)


def attacked(run, images, labels, eps, workers=None, **changes):
    """The results of `model_utils.attack` on a saved run."""
    loaded = mu.load_run(run, "cpu")
    args = argparse.Namespace(
        **{**vars(loaded.args), "attack_iters": 2, "attack_queries": 20, "seed": 0, **changes}
    )
    return mu.attack(
        loaded.model, images, labels, args, eps, **({"workers": workers} if workers else {})
    )


# ----------------------------------------------------------------------------------------- restarts


def test_several_restarts_of_a_sweep(ok, trained, tmp_path):
    found = {}
    for restarts in (0, 3):
        run = shutil.copytree(trained("mse"), tmp_path / str(restarts))
        ok(
            f"{ATTACK} --load-path {run} --attack-iters 2 --test-size 20 --mbs 12 --eps-list 1 "
            f"--save --attack-restarts {restarts}"
        )
        _, (row,) = table(run)
        found[restarts] = float(row["adversarial"])
        assert (
            0 <= float(row["masked"]) <= 1
            and len(np.load(run / "Adversarial_Accuracy_images.npz")["x_adv"]) == 20
        )
    assert found[3] <= found[0]


@pytest.mark.parametrize("attack", names.ATTACKS)
def test_several_restarts_of_every_attack(trained, attack):
    images, labels = digits(12)
    found = [
        attacked(
            trained("softmax"),
            images,
            labels,
            1.0,
            attack=attack,
            attack_restarts=restarts,
            mbs=12,
            attack_iters=1,
            attack_step=[5],
        )
        for restarts in (0, 2)
    ]
    once, again = (next(iter(results.values()))["correct"] for results in found)
    assert not (again & ~once).any()  # what the first run broke stays broken


# ------------------------------------------------------------------------------- which class counts

# output neurons near zero: their differences are lost where a number of the size of 1 is added
NEAR_ZERO = {"synapses.1.bias": lambda bias: bias - 6}


def test_at_eps_0_adversarial_accuracy_is_clean_accuracy(ok, trained, tmp_path):
    run, (images, labels) = changed(trained("mse"), tmp_path / "run", NEAR_ZERO), digits(50)
    ok(f"{ATTACK} --load-path {run} --attack deepfool --test-size 50 --mbs 20 --eps-list 0")
    _, (row,) = table(run, "Adversarial_Accuracy_deepfool_2")
    assert row["adversarial"] == row["clean"] and float(row["clean"]) > 0.3
    for name, grad in [("mse", "bptt"), ("mse", "smooth"), ("softmax", "soft")]:
        run = tmp_path / "run" if name == "mse" else trained(name)
        classes = mu.load_run(run, "cpu").predict(images)
        for attack in names.ATTACKS:
            for result in attacked(
                run, images, labels, 0.0, attack=attack, attack_grad=[grad]
            ).values():
                assert np.array_equal(result["prediction"], classes)
                assert np.array_equal(result["correct"], classes == labels)


@pytest.mark.parametrize("attack", ["pgd", "apgd-ce", "apgd-dlr", "square", "autoattack"])
def test_what_counts_is_the_prediction_of_the_model(trained, tmp_path, attack):
    run, (images, labels) = changed(trained("mse"), tmp_path / "run", NEAR_ZERO), digits(20)
    (result,) = attacked(run, images, labels, 1.0, attack=attack, attack_grad=["smooth"]).values()
    predict, x = mu.load_run(run, "cpu").predict, images.numpy() / np.float32(255)
    right = (predict(images) == labels).numpy()
    assert np.array_equal(result["prediction"], predict(result["x_adv"]))
    assert np.array_equal(result["correct"], right & (result["prediction"] == labels.numpy()))
    # and the attack sees that prediction too: it gives no image up for misclassified that is not
    assert (metrics.norms(result["x_adv"] - x, "2") > 0)[right].all() or attack in (
        "square",
        "autoattack",
    )
    assert result["correct"].sum() < right.sum()


@pytest.mark.parametrize("attack", names.ATTACKS)
def test_no_attack_makes_a_misclassified_image_right(attack):
    """Large weights, and a gradient unrolled through too few steps: attacks go astray, also towards
    the label of an image."""
    torch.manual_seed(0)
    model, (images, _) = mu.P_MLP([784, 16, 10], torch.tanh, softmax=True), digits(16)
    with torch.no_grad():
        for synapse, factor in zip(model.synapses, (30, 3)):
            synapse.weight.mul_(factor)
    read = model.readout(
        model(images.float() / 255, None, None, 10, criterion=mu.make_criterion("cel"))
    )
    labels = read.topk(3, 1).indices[:, 2]
    args = argparse.Namespace(
        task="digits",
        attack=attack,
        attack_norm="inf",
        attack_iters=2,
        attack_queries=20,
        mbs=16,
        attack_step=[3],
        attack_start="zero",
        T1=10,
        predict_step=None,
        no_clip=False,
        tol=0.0,
        loss="cel",
        seed=0,
        attack_grad=["bptt"],
        attack_restarts=0,
    )
    for eps in (0.5, 1.0):
        for result in mu.attack(model, images, labels, args, eps).values():
            assert not result["correct"].any() and (result["prediction"] != labels.numpy()).all()


# ---------------------------------------------------------------------------------- class gradients


def enlarged(run, folder):
    """A copy with 64 times the logits, and 64 times their gradients."""
    return changed(
        run, folder, {f"synapses.1.{name}": lambda w: 64 * w for name in ("weight", "bias")}
    )


@pytest.mark.parametrize("grad", ["bptt", "smooth", "soft"])
def test_class_gradients_belong_to_predictions(trained, tmp_path, grad):
    runs, (images, y) = (
        (trained("softmax"), enlarged(trained("softmax"), tmp_path / "run")),
        digits(12),
    )
    x, y = (images.float() / 255).numpy(), np.eye(10, dtype=np.float32)[y]
    plain, scaled = (mu.load_run(run, "cpu").classifier(grad=grad) for run in runs)
    np.testing.assert_allclose(scaled.predict(x), 64 * plain.predict(x), rtol=1e-4)
    np.testing.assert_allclose(
        scaled.class_gradient(x), 64 * plain.class_gradient(x), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        scaled.class_gradient(x, 3), 64 * plain.class_gradient(x, 3), rtol=1e-3, atol=1e-5
    )
    if grad != "bptt":  # the loss of saturated logits keeps its slope
        assert np.linalg.norm(scaled.loss_gradient(x, y).reshape(12, -1), axis=1).min() > 1e-6
    found = [
        evasion.DeepFool(c, max_iter=10, batch_size=12, verbose=False).generate(x, y)
        for c in (plain, scaled)
    ]
    np.testing.assert_allclose(
        *(metrics.norms(x_adv - x, "2") for x_adv in found), rtol=0.05, atol=0.02
    )


@pytest.mark.parametrize("attack", ["deepfool", "fab"])
def test_large_logits_make_no_attack_overstep(trained, tmp_path, attack):
    (images, labels), broken = digits(16), {}
    for run in (trained("softmax"), enlarged(trained("softmax"), tmp_path / "run")):
        found = attacked(
            run,
            images,
            labels,
            1.0,
            attack=attack,
            attack_iters=6,
            attack_grad=["bptt", "smooth", "soft"],
        )
        broken[run.name] = {grad: int((~result["correct"]).sum()) for grad, result in found.items()}
    plain, large = broken.values()
    for grad in plain:
        assert large[grad] >= plain[grad] - 2 and large[grad] >= large["bptt"] - 4, broken


# ------------------------------------------------------------------------- where HopSkipJump begins


@pytest.fixture
def starts(monkeypatch):
    """[(image, where HopSkipJump begins, whether that was given to it)], in order."""
    drawn, original = [], evasion.HopSkipJump._init_sample

    def recording(self, x, y, y_p, init_pred, adv_init, *more):
        found = original(self, x, y, y_p, init_pred, adv_init, *more)
        drawn.append((x.copy(), None if found is None else found[0].copy(), init_pred != y_p))
        return found

    monkeypatch.setattr(evasion.HopSkipJump, "_init_sample", recording)
    return drawn


def hop(run, images, labels, mbs, workers=None):
    attacked(run, images, labels, 1.0, workers, attack="hopskipjump", attack_queries=130, mbs=mbs)


def by_image(starts):
    found = {image.tobytes(): start for image, start, _ in starts}
    starts.clear()
    return found


def test_where_hopskipjump_begins_does_not_depend_on_the_mini_batch(trained, starts):
    (images, labels), run = digits(8), trained("mse")
    hop(run, images, labels, 8)
    assert all(given for *_, given in starts)
    predict = mu.load_run(run, "cpu").predict
    assert all(predict(image[None]) != predict(start[None]) for image, start, _ in starts)
    together = by_image(starts)
    assert len(together) == 8
    for mbs in (1, 3):
        hop(run, images, labels, mbs)
        alone = by_image(starts)
        assert alone.keys() == together.keys()
        assert all(np.array_equal(alone[key], together[key]) for key in alone)
    with pytest.raises(Stopped):
        hop(run, images, labels, 2, OneOfTwo(1))
    one = by_image(starts)
    assert len(one) == 4 and all(np.array_equal(one[key], together[key]) for key in one)


def test_where_hopskipjump_begins_without_an_image_of_another_class(trained, starts):
    run, (images, labels) = trained("mse"), digits(100)
    right = mu.load_run(run, "cpu").predict(images) == labels
    of_one = right & (labels == labels[right].mode().values)
    images, labels, found = images[of_one][:3], labels[of_one][:3], []
    for mbs in (3, 1, 2):
        hop(run, images, labels, mbs)
        assert not any(given for *_, given in starts)
        found.append(by_image(starts))
    assert len(found[0]) > 1 and all(start is not None for start in found[0].values())
    assert all(
        np.array_equal(again[key], start) for again in found[1:] for key, start in found[0].items()
    )


# ---------------------------------------------------------------------------------------- the audit


def test_standard_audits(ok, trained, tmp_path, monkeypatch, starts):
    """Three restarts; HopSkipJump begins where it does for every --mbs; a surrogate has its own
    --attack-step."""
    monkeypatch.setitem(stages.BUDGETS, "standard", FEW)
    other = changed(trained("mse"), tmp_path / "other", config={"T1": 5, "attack_step": [29]})
    steps, original, found = set(), Unrolled.__init__, []

    def recording(self, model, T1, T2, *args, **options):
        steps.add((T1, T2))
        original(self, model, T1, T2, *args, **options)

    monkeypatch.setattr(Unrolled, "__init__", recording)
    for mbs, words, eps in (
        (8, f"--surrogate {other}", 0.4),
        (3, "--attack-step 4", 0.4),
        (8, "--attack-step 4", 0.8),
    ):
        run = shutil.copytree(trained("mse"), tmp_path / f"{mbs}_{eps}")
        ok(
            f"--todo audit --device -1 --seed 0 --test-size 8 --mbs {mbs} --eps {eps} "
            f"--load-path {run} {words}"
        )
        result = json.loads((run / f"Audit_2_{eps}.json").read_text())
        assert (
            any("3 restarts" in a["name"] for a in result["attacks"])
            and result["robust"] <= result["clean"]
        )
        assert all(given for *_, given in starts)
        found.append(by_image(starts))
    first, second, _ = found
    common = first.keys() & second.keys()
    assert common and all(np.array_equal(first[key], second[key]) for key in common)
    assert (5, 5) in steps and (T1, T1) in steps and (5, T1) not in steps and (5, 29) not in steps


# --------------------------------------------------------------- time steps of an attack's gradient


@pytest.mark.parametrize(
    "words, steps", [("", T1), ("--predict-step 5", 5), ("--T1 35", 29), ("--attack-step 17", 17)]
)
def test_the_default_of_attack_step(ok, trained, tmp_path, words, steps):
    # a training writes down a flag that has no effect on it: that says nothing of an attack
    for saved in [[29], [15]] if not words else [[29]]:
        run = changed(trained("mse"), tmp_path / str(saved), config={"attack_step": saved})
        ok(f"{ATTACK} --load-path {run} --attack-iters 1 --test-size 2 --eps-list 0 {words}")
        settings, (row,) = table(run)
        assert settings["steps"] == steps and row["steps"] == str(steps)


def test_a_sweep_of_29_steps_is_not_continued_with_another_number(ok, trained, tmp_path):
    run = changed(trained("mse"), tmp_path / "run", config={"attack_step": [29]})
    line = f"{ATTACK} --load-path {run} --attack-iters 1 --test-size 4"
    ok(line, "--attack-step 29 --eps-list 0.5")
    _, (before,) = table(run)
    ok(line, "--eps-list 0.5 1")
    settings, rows = table(run)
    assert settings["steps"] == T1 and rows[2] == {**before, "grad": "bptt@29"}
    assert [(row["steps"], float(row["eps"])) for row in rows[:2]] == [("12", 0.5), ("12", 1)]
    ok(line, "--attack-step 29 --eps-list 1")
    settings, others = table(run)
    assert settings["steps"] == 29 and others[0] == before
    assert [(row["steps"], float(row["eps"])) for row in others[:2]] == [("29", 0.5), ("29", 1)]
    assert [{**row, "grad": "bptt"} for row in others[2:]] == rows[:2]


def test_a_loaded_run_gives_a_classifier_of_as_many_steps(trained, tmp_path):
    loaded = mu.load_run(
        changed(trained("mse"), tmp_path / "run", config={"attack_step": [29]}), "cpu"
    )
    steps = [
        (c.T1, c.T2)
        for c in (
            loaded.classifier(),
            loaded.classifier(T1=7),
            loaded.classifier(T1=50),
            loaded.classifier(T2=3),
        )
    ]
    assert steps == [(T1, T1), (7, 7), (50, 29), (T1, 3)]


def test_a_margin_is_the_lead_of_the_own_class_over_the_best_other_one():
    logits = np.array([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    leads, trails, first_of_tie, second_of_tie = metrics.margins(logits, np.array([1, 0, 0, 1]))
    assert leads == 2
    assert trails == -2
    assert 0 < first_of_tie < 1e-300
    assert -1e-300 < second_of_tie < 0
