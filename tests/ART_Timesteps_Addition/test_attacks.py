import argparse
import csv
import os
import resource
import shlex
import signal
import time

import numpy as np
import pytest
import torch
from conftest import only_run
from shared import SEED_LINES, SMALL, convolutional, start

import metrics
import model_utils as mu
from ART_Timesteps_Addition import attacks, names
from ART_Timesteps_Addition.pytorch import PyTorchClassifier, Unrolled
from data_utils import load_split


@pytest.fixture(
    params=[pytest.param("digits, CNN", marks=pytest.mark.slow), "digits"], ids=["CNN", "MLP"]
)
def trained(request, zoo):
    """A model that has learnt the digits, in a run folder."""
    return zoo(request.param)


def rows(run, stem="Adversarial_Accuracy"):
    return list(csv.DictReader(open(run / f"{stem}.csv")))


def fresh(run, tmp_path):
    import shutil

    return shutil.copytree(run, tmp_path / "run")


# iterations of attacks that take long for each
FEWER = {
    "hopskipjump": "1",
    "cw": "2",
    "fab": "2",
    "apgd-t": "2",
    "art-autoattack": "2 --attack-queries 10",
    "autoattack": "8 --attack-queries 20",
}
COMMON = "--todo attack --device -1 --test-size 20 --mbs 20 --attack-step 10"


@pytest.mark.parametrize(
    "norm, eps", [("2", 2.0), pytest.param("inf", 0.2, marks=pytest.mark.slow)]
)
def test_all_attacks(ok, trained, tmp_path, norm, eps):
    run = fresh(trained, tmp_path)
    images, labels = load_split("digits", "", False, 10)
    x = (images.float() / 255).numpy()
    found = {}
    for attack in names.ATTACKS:
        ok(
            COMMON,
            f"--load-path {run} --attack {attack} --attack-norm {norm} --eps-list {eps} --attack-iters "
            f"{FEWER.get(attack, '10')} --test-size 10 --save",
        )
        stem = "Adversarial_Accuracy" + (
            "" if (attack, norm) == ("pgd", "2") else f"_{attack}_{norm}"
        )
        text = [
            line.split()
            for line in (run / f"{stem}.txt").read_text().splitlines()
            if not line.startswith("#")
        ]
        assert len(text) == 1 and len(text[0]) == 3 and float(text[0][0]) == eps
        found[attack], clean = float(text[0][2]), float(text[0][1])
        x_adv = np.load(run / f"{stem}_images.npz")["x_adv"]
        assert (
            metrics.norms(x_adv - x, norm).max() <= eps * (1 + 1e-5)
            and x_adv.min() >= 0
            and x_adv.max() <= 1
        )
        assert all((run / f"{stem}{end}").stat().st_size for end in (".png", "_images.png", ".csv"))
    assert found["autoattack"] <= found["pgd"] + 1.01 / 10 and found["pgd"] < clean - 0.1
    assert max(found.values()) <= clean + 1e-6


def test_no_clip_lets_images_leave_the_range(ok, trained, tmp_path):
    run = fresh(trained, tmp_path)
    ok(COMMON, f"--load-path {run} --eps-list 3 --attack-iters 5 --no-clip --save")
    assert np.load(run / "Adversarial_Accuracy_images.npz")["x_adv"].min() < -0.01
    ok(COMMON, f"--load-path {run} --eps-list 3 --attack square --attack-iters 5 --no-clip")


def test_a_sweep_goes_on_and_keeps_what_other_settings_gave(ok, trained, tmp_path):
    once, twice = fresh(trained, tmp_path / "a"), fresh(trained, tmp_path / "b")
    line = f"{COMMON} --attack apgd-ce --attack-iters 4 --eps-list 0.5 1 2"
    ok(line, f"--load-path {once}")
    name = "Adversarial_Accuracy_apgd-ce_2"
    process = start(tmp_path, f"{line} --load-path {twice}")
    while process.is_alive() and not (twice / f"{name}.txt").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    ok(line, f"--load-path {twice}/")
    assert (twice / f"{name}.txt").read_text() == (once / f"{name}.txt").read_text()
    assert rows(twice, name) == rows(once, name)
    before = (once / f"{name}.txt").read_text()
    ok(line, f"--load-path {once} --attack-iters 3")
    assert (once / f"{name}.txt").read_text() != before
    assert [row["iters"] for row in rows(once, name)] == ["3"] * 3 + ["4"] * 3
    ok(line, f"--load-path {once}")
    assert (once / f"{name}.txt").read_text() == before


def saturated():
    """A network, and images, whose neurons sit deep in the flat parts of their activation, with
    labels it predicts."""
    model = convolutional(40)
    images = load_split("digits", "", False, 40)[0]
    labels = model.readout(
        model(images.float() / 255, None, None, 20, criterion=mu.make_criterion("cel"))
    ).argmax(1)
    return model, images, labels


def arguments(**changes):
    return argparse.Namespace(
        **{
            "task": "digits",
            "attack": "pgd",
            "attack_norm": "2",
            "attack_iters": 10,
            "attack_step": 10,
            "attack_start": "zero",
            "T1": 20,
            "predict_step": None,
            "loss": "cel",
            "no_clip": False,
            "tol": 0.0,
            "mbs": 20,
            "seed": 0,
            "attack_grad": ["bptt", "smooth"],
            **changes,
        }
    )


def test_vanishing_gradients_are_reported_and_smooth_ones_attack(capsys):
    model, images, labels = saturated()
    for eps in (1.0, 3.0, 6.0):
        results = mu.attack(model, images, labels, arguments(), eps)
        bptt, smooth, worst = (results[name] for name in ("bptt", "smooth", "worst"))
        assert (
            bptt["masked"] > 0.5
            and bptt["unmoved"] > 0.5
            and smooth["masked"] < 0.01
            and smooth["unmoved"] == 0
        )
        assert worst["correct"].mean() <= smooth["correct"].mean() <= bptt["correct"].mean()
    assert smooth["correct"].mean() < bptt["correct"].mean()


def untrained(n):
    """(a network, images of the digits, and what it takes them for)."""
    torch.manual_seed(0)
    model = mu.P_MLP([784, 16, 10], torch.tanh, softmax=True)
    with torch.no_grad():
        model.synapses[0].weight.mul_(8)
    images, _ = load_split("digits", "", False, n)
    read = model.readout(
        model(images.float() / 255, None, None, 10, criterion=mu.make_criterion("cel"))
    )
    return model, images, read


@pytest.mark.parametrize("attack", attacks.MINIMAL)
def test_an_image_that_is_misclassified_is_not_made_right(attack):
    """Attacks for the smallest perturbation go away from the prediction, which can be towards the
    true label."""
    model, images, read = untrained(8)
    second = read.topk(2, 1).indices[:, 1]  # the nearest other class, more or less
    args = arguments(T1=10, attack=attack, attack_iters=2, attack_grad=["bptt"])
    for result in mu.attack(model, images, second, args, 20.0).values():
        assert not result["correct"].any()


def test_every_restart_watches_the_images_that_are_left(monkeypatch):
    """Places among all images of a mini-batch are no places among those of the restart before."""
    model, images, read = untrained(30)
    labels, start, watched = read.argmax(1), attacks.GradientMonitor.start, []
    monkeypatch.setattr(
        attacks.GradientMonitor,
        "start",
        lambda self, x: watched.append([row.tobytes() for row in x.numpy()]) or start(self, x),
    )
    counts, known = [], [row.tobytes() for row in (images.float() / 255).flatten(1).numpy()]
    for restarts in range(4):
        watched.clear()
        args = arguments(
            T1=10, attack_iters=1, attack_grad=["bptt"], attack_restarts=restarts, mbs=30
        )
        (result,) = mu.attack(model, images, labels, args, 0.4).values()
        counts.append(int(result["correct"].sum()))
    assert counts[0] > counts[-1] > 0, "an eps at which a restart finds some of the images"
    assert [len(rows) for rows in watched[-3:]] == counts[:-1]
    left = {known[n] for n in np.flatnonzero(result["correct"])}
    assert all(left <= set(rows) <= set(known) for rows in watched[-3:])


def test_hopskipjump_starts_from_an_image_of_another_class(monkeypatch):
    model, images, read = untrained(8)
    labels, drawn = read.argmax(1), []
    assert len(labels.unique()) > 1
    monkeypatch.setattr(
        attacks.evasion.HopSkipJump,
        "_init_sample",
        lambda self, x, y, y_p, init_pred, adv_init, *more: drawn.append(
            (x, y_p, init_pred, adv_init)
        ),
    )
    mu.attack(model, images, labels, arguments(T1=10, attack="hopskipjump", attack_iters=1), 1.0)
    x = images.float() / 255
    for one, own, other, begin in drawn:
        distances = (x[labels != own] - torch.from_numpy(one)).flatten(1).norm(dim=1)
        assert other != own and np.linalg.norm(begin - one) == pytest.approx(float(distances.min()))
    drawn.clear()
    mu.attack(
        model, images[:1], labels[:1], arguments(T1=10, attack="hopskipjump", attack_iters=1), 1.0
    )
    assert drawn[0][1] == drawn[0][2]  # there is none: ART looks for a start of its own


def test_the_warning(ok, tmp_path, zoo):
    model, images, labels = saturated()
    run = zoo.copy("CNN", tmp_path)
    state = torch.load(run / "model.pt", weights_only=True)
    config = {"channels": [6, 8], "act": "my_hard_sig", "loss": "cel", "softmax": True, "T1": 16}
    state = {
        **state,
        "model_state_dict": model.state_dict(),
        "config": {**state["config"], **config},
    }
    torch.save(state, run / "model.pt")
    out = ok(COMMON, f"--load-path {run} --eps-list 0.5 --attack-iters 3 --attack-grad bptt smooth")
    assert "upper bound" in out and "--attack-grad smooth" in out
    assert [row["grad"] for row in rows(run)] == ["bptt", "smooth", "worst"]
    assert (
        float(rows(run)[0]["masked"]) > 0.01
        and "upper bound" in (run / "Adversarial_Accuracy.txt").read_text()
    )


@pytest.mark.parametrize("act", mu.ACTIVATIONS)
def test_smooth_changes_no_output(act):
    torch.manual_seed(0)
    model = mu.P_MLP([20, 16, 5], mu.ACTIVATIONS[act])
    x = 3 * torch.randn(8, 20)
    outs = [
        Unrolled(model, 12, 12, mu.make_criterion("mse"), grad=grad)(x.clone().requires_grad_())
        for grad in ("bptt", "smooth")
    ]
    assert torch.equal(*outs) and torch.equal(
        outs[0], Unrolled(model, 12, 12, mu.make_criterion("mse"))(x)
    )


@pytest.mark.parametrize("softmax", [False, True])
def test_the_gradient_by_ep_is_that_of_bptt_at_equilibrium(softmax):
    torch.manual_seed(0)
    loss = torch.nn.CrossEntropyLoss() if softmax else torch.nn.MSELoss()
    models = [
        mu.P_MLP([30, 24, 12, 5], torch.tanh, softmax=softmax),
        mu.P_CNN(
            12,
            [2, 4, 5],
            [3, 3],
            [1, 1],
            [5],
            mu.make_pools("aa"),
            [1, 0],
            torch.tanh,
            softmax=softmax,
        ),
    ]
    for model in models:
        model.double()
        x, y = (
            torch.randn(6, *model.connections[0].pre_shape, dtype=torch.float64),
            torch.randint(0, 5, (6,)),
        )
        y = y if softmax else torch.nn.functional.one_hot(y, 5).double()
        gradients = []
        for grad in ("bptt", "ep"):
            leaf = x.clone().requires_grad_()
            unrolled = Unrolled(
                model,
                400,
                200,
                mu.make_criterion("cel" if softmax else "mse"),
                grad=grad,
                start="equilibrium",
                beta=0.01,
            )
            gradients.append(torch.autograd.grad(loss(unrolled(leaf), y), leaf)[0].flatten(1))
        cosine = torch.nn.functional.cosine_similarity(*gradients, dim=1)
        assert cosine.min() > 0.99
        assert (gradients[0].norm() / gradients[1].norm()).item() == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_memory_does_not_grow_with_iterations(trained):
    state = torch.load(trained / "model.pt", weights_only=True)
    model = mu.make_model(argparse.Namespace(**state["config"]))
    images, labels = load_split("digits", "", False, 30)

    def resident(iterations):
        args = arguments(
            loss=state["config"]["loss"], attack_iters=iterations, attack_grad=["bptt"], mbs=10
        )
        mu.attack(model, images, labels, args, 1.0)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    resident(5)
    assert resident(50) < 1.05 * resident(5)


def test_class_gradients_go_through_T2_steps_and_predictions_through_T1(model):
    if model.synapses[0].weight.dim() != 4:
        pytest.skip("ART's images have channels")
    model.float()
    first = model.connections[0]
    x = np.random.default_rng(0).random((3, *first.pre_shape), dtype=np.float32)
    loss = torch.nn.CrossEntropyLoss() if model.softmax else torch.nn.MSELoss()
    classifier = PyTorchClassifier(model, loss, first.pre_shape, 5, 9, 7, device_type="cpu")
    criterion = mu.make_criterion("cel" if model.softmax else "mse")
    tensor = torch.from_numpy(x)
    np.testing.assert_allclose(
        classifier.predict(x),
        model.readout(model(tensor, None, None, 9, criterion=criterion)).detach().numpy(),
        rtol=1e-5,
    )
    leaf = tensor.clone().requires_grad_()
    out = model.readout(model(leaf, None, None, 7, criterion=criterion, check_thm=True))
    np.testing.assert_allclose(
        classifier.class_gradient(x, label=2)[:, 0],
        torch.autograd.grad(out[:, 2].sum(), leaf)[0].numpy(),
        rtol=1e-4,
        atol=1e-7,
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("line", [line for line in SEED_LINES if "--todo attack" in line])
def test_attack_lines_of_the_seed(ok, cli, tmp_path, cifar, line):
    words = shlex.split(line)[2:]
    folder = words[words.index("--load-path") + 1]
    ok(
        *[w if w != "attack" else "train" for w in words if w not in ("--load-path", folder)],
        SMALL,
        "--save",
        "--data-dir",
        str(cifar),
    )
    run = only_run(tmp_path)
    reduced = f"{SMALL} --data-dir {cifar} --test-size 8 --attack-iters 2 --attack-step 3"
    for path in (f"{run}/", str(run)):
        ok(*words, "--load-path", path, reduced)
    assert (
        len(
            [
                text
                for text in (run / "Adversarial_Accuracy.txt").read_text().splitlines()
                if text[0] != "#"
            ]
        )
        == 11
    )
    code, _, err = cli(*words, reduced)
    assert code == 2 and err.count("\n") == 1 and folder.rstrip("/") in err


def listing(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_sweep_is_found_again_by_its_settings(ok, trained, tmp_path, monkeypatch):
    run, stem = fresh(trained, tmp_path), "Adversarial_Accuracy_fgsm_2"
    line = f"{COMMON} --load-path {run} --attack fgsm"
    texts = {}
    for more in ("--no-clip", "", "--attack-start equilibrium"):
        ok(line, more, "--eps-list 0.5 1")
        texts[more] = (run / f"{stem}.txt").read_text()
    assert len(set(texts.values())) == 3
    before, attack, eps_seen = listing(run), mu.attack, []
    assert not [name for name in before if name.startswith(f"{stem}_")]
    monkeypatch.setattr(mu, "attack", lambda *args: eps_seen.append(args[4]) or attack(*args))
    for more in ("", "--no-clip", "--attack-start equilibrium"):
        ok(line, more, "--eps-list 1 0.5 0.5")
        assert (run / f"{stem}.txt").read_text() == texts[more]
    after = listing(run)
    assert not eps_seen and {n: c for n, c in after.items() if n[-3:] != "png"} == {
        n: c for n, c in before.items() if n[-3:] != "png"
    }
    ok(line, "--no-clip --eps-list 2 0.5 2")
    assert eps_seen == [2.0]
    table = [(row["clip"], row["start"], float(row["eps"])) for row in rows(run, stem)]
    assert table[:3] == [("False", "zero", eps) for eps in (0.5, 1, 2)]
    assert sorted(table[3:]) == [
        ("True", start, eps) for start in ("equilibrium", "zero") for eps in (0.5, 1)
    ]
    assert [
        text.split()[0] for text in (run / f"{stem}.txt").read_text().splitlines() if text[0] != "#"
    ] == ["0.5", "1", "2"]


def test_a_row_that_a_kill_kept_from_the_text_is_in_it_when_the_sweep_goes_on(
    ok, trained, tmp_path
):
    run, stem = fresh(trained, tmp_path), "Adversarial_Accuracy_fgsm_2"
    line = f"{COMMON} --load-path {run} --attack fgsm --eps-list 0.5 1"
    ok(line)
    whole = (run / f"{stem}.txt").read_text()
    for text in (
        "".join(whole.splitlines(keepends=True)[:-2]),
        "".join(whole.splitlines(keepends=True)[:1]),
    ):
        (run / f"{stem}.txt").write_text(text)
        ok(line)
        assert (run / f"{stem}.txt").read_text() == whole and len(rows(run, stem)) == 2


def test_tables_are_written_again_from_the_records(ok, trained, tmp_path, monkeypatch):
    run, stem = fresh(trained, tmp_path), "Adversarial_Accuracy_fgsm_2"
    line = f"{COMMON} --load-path {run} --attack fgsm --eps-list 0.5 1"
    ok(line)
    written = {path: path.read_bytes() for path in run.glob(f"{stem}.*") if path.suffix != ".png"}
    monkeypatch.setattr(mu, "attack", lambda *_: pytest.fail("an attack ran again"))
    for path in written:
        path.unlink()
        ok(line)
        assert {path: path.read_bytes() for path in written} == written
    assert len(written) == 2


def test_an_image_is_masked_in_the_worst_if_it_is_in_every_attack():
    """The second image is misclassified without an attack: the first attack decides it."""

    def result(masked, margin):
        margin = np.array(margin)
        return {
            "x_adv": np.zeros((4, 1, 2, 2), dtype=np.float32),
            "prediction": np.zeros(4, dtype=np.int64),
            "margin": margin,
            "masked_images": np.array(masked),
            "correct": margin > 0,
        }

    bptt = result([True, True, False, True], [0.1, -1.0, 0.1, 0.3])
    smooth = result([False, False, False, True], [0.2, -1.0, -0.1, 0.2])
    x = np.zeros((4, 1, 2, 2), dtype=np.float32)
    worst = attacks.worst_of([bptt, smooth], x, "2")
    assert worst["masked_images"].tolist() == [False, False, False, True]
    assert worst["masked"] == 0.25 and worst["correct"].tolist() == [True, False, False, True]
