"""Training on images that are attacked on the way."""

import re

import numpy as np
import pytest
import torch
from conftest import only_run
from shared import final_weights

import metrics
import model_utils as mu
from ART_Timesteps_Addition.pgd import Adversary
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from experiment import inference

TINY = (
    "--task digits --device -1 --seed 5 --train-size 40 --test-size 20 --mbs 16 --loss cel --save"
)
MLP = f"{TINY} --archi 784 12 10 --T1 8 --T2 3 --betas 0 0.5 --lrs 0.1 0.1"
ATTACK = "--adv-train 2 --adv-iters 3 --adv-step 4"
MODELS = {
    "MLP by EP": f"{MLP} --thirdphase --adv-grad ep",
    "MLP by EP, attacked through time": f"{MLP} --adv-grad bptt",
    "MLP by BPTT": f"{MLP} --alg BPTT --adv-grad smooth",
    "MLP by CEP": f"{MLP} --alg CEP --adv-grad ep --adv-norm inf",
    "VFCNN with a read-out": f"{TINY} --model VFCNN --channels 3 4 --softmax --fc 8 10 --T1 8 --T2 3 --adv-grad ep",
    "MLP, squared error": MLP.replace("--loss cel", "--loss mse") + " --adv-grad ep",
    "FFCNN": f"{TINY} --model FFCNN --channels 3 4 --adv-grad bptt",
    "ViT": f"{TINY} --model ViT --patch 7 --depth 1 --heads 2 --width 16 --mlp-width 24 --adv-norm inf",
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_rule_trains_on_attacked_images(ok, tmp_path, name, monkeypatch):
    seen = []
    perturb = Adversary.perturb

    def watched(self, model, x, y, start):
        found = perturb(self, model, x, y, start)
        mean, std = self.mean, self.std
        images, attacked = x * std + mean, found * std + mean
        assert attacked.min() >= 0 and attacked.max() <= 1 and torch.isfinite(attacked).all()
        delta = (attacked - images).flatten(1)
        length = delta.abs().amax(1) if self.attack.norm == "inf" else delta.norm(dim=1)
        assert length.max() <= self.attack.eps + 1e-5 and length.min() > 0
        seen.append(len(x))
        return found

    monkeypatch.setattr(Adversary, "perturb", watched)
    line = MODELS[name].replace("--adv-norm inf", "--adv-norm inf --adv-train 0.1")
    out = ok(ATTACK, line)
    assert (
        seen == [16, 16, 8]
        and "adversarial training: PGD" in out
        and re.search("^time: .*attack", out, re.M)
    )
    assert only_run(tmp_path)


def test_by_ep_alone_no_graph_is_ever_recorded(ok, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was to be differentiated automatically")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        ok(ATTACK, MODELS["MLP by EP"])
        ok(
            ATTACK,
            f"{TINY} --model CNN --channels 3 4 --softmax --fc 8 10 --T1 8 --T2 3 --adv-grad ep",
        )
        with pytest.raises(AssertionError, match="differentiated"):
            ok(ATTACK, MODELS["MLP by EP, attacked through time"])


def test_the_attack_raises_the_loss_as_any_gradient_of_it_does():
    torch.manual_seed(0)
    model = mu.P_MLP([784, 20, 10], torch.tanh)
    x, y = torch.rand(12, 1, 28, 28), torch.randint(10, (12,))
    unit = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    losses = {}
    for grad in ("bptt", "ep", None):
        attack = Attack("pgd", "2", 2.0, 5)
        adversary = Adversary(attack, GradientMethod(grad or "bptt", 10), "cel", 30, *unit)
        torch.manual_seed(1)
        start = adversary.draw(x.shape)
        found = adversary.perturb(model, x, y, start) if grad else (x + start).clamp(0, 1)
        rule = mu.Rule(T1=30, loss="cel")
        losses[grad] = (
            mu.readout_loss(
                model.readout(inference.predicting_neurons(model, found, rule)), y, "cel"
            )
            .mean()
            .item()
        )
    assert losses["bptt"] > losses[None] + 0.3 and losses["ep"] == pytest.approx(
        losses["bptt"], rel=0.05
    )


def test_random_starts_are_uniform_in_the_ball():
    torch.manual_seed(0)
    plane = metrics.random_in_ball_torch((4000, 1, 1, 2), "2", 2.0).flatten(1)
    assert plane.norm(dim=1).max() <= 2 and (plane.norm(dim=1) < 1).float().mean() == pytest.approx(
        0.25, abs=0.03
    )
    cube = metrics.random_in_ball_torch((4000, 1, 1, 2), "inf", 0.5)
    assert cube.abs().max() <= 0.5 and cube.abs().mean().item() == pytest.approx(0.25, abs=0.02)


def test_resumed_it_is_as_if_it_had_not_stopped(ok, tmp_path, monkeypatch):
    for name, epochs in (("whole", 3), ("parts", 1)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ok(ATTACK, MODELS["MLP by EP"], f"--epochs {epochs}")
    ok("--device -1 --epochs 2 --load-path", only_run(tmp_path / "parts"))
    whole, parts = (final_weights(only_run(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.slow
def test_it_makes_robust(ok, tmp_path, monkeypatch):
    accuracy = {}
    for name, more in (("plain", ""), ("trained", "--adv-train 2 --adv-iters 4")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ok(
            "--task digits --device -1 --seed 1 --train-size 800 --test-size 200 --mbs 20 --loss cel --model FFMLP "
            "--archi 784 60 10 --optim adam --lrs 3e-3 3e-3 --epochs 8 --save",
            more,
        )
        ok("--todo attack --device -1 --attack-iters 10 --eps-list 2 --load-path", only_run("."))
        accuracy[name] = np.loadtxt(only_run(".") / "Adversarial_Accuracy.txt").reshape(-1, 3)[
            -1, 1:
        ]
    assert accuracy["trained"][0] > 0.6 and accuracy["trained"][1] > accuracy["plain"][1] + 0.1, (
        accuracy
    )


@pytest.mark.parametrize(
    "line, message",
    [
        ("--adv-train 0", "argument --adv-train"),
        ("--adv-train 2 --adv-grad soft", "argument --adv-grad"),
        ("--adv-train 2 --model FFMLP --adv-grad ep", "use bptt with FFMLP"),
    ],
)
def test_what_makes_no_sense_is_refused(cli, line, message):
    code, _, err = cli("--task digits --device -1", line)
    assert code == 2 and message in err and len(err.splitlines()) == 1


def test_flags_without_an_attack_are_noted(cli):
    code, _, err = cli(MLP, "--adv-iters 3")
    assert code == 0 and "--adv-iters has no effect without --adv-train" in err
