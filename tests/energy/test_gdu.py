import csv

import numpy as np
import pytest
import torch
from autodiff import separate_backpropagations
from conftest import criterion_of, only_run, rule, sample, tiers
from shared import assert_close

import model_utils as mu
from energy import gdu
from energy.gdu import compare_gdu


def test_golden(case, golden_model):
    c = case["case"]
    BPTT, EP = mu.check_gdu(
        golden_model,
        case["x"][:3],
        case["y"][:3],
        c["T1"],
        c["T2"],
        c["betas"],
        mu.make_criterion(c["loss"]),
    )
    assert_close(BPTT, case["gdu_bptt"], 5e-2)
    assert_close(EP, case["gdu_ep"], 5e-2)


def test_one_backward_pass_equals_one_per_step(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    ours = gdu.bptt_contributions(model, x, y, 9, 5, 0.0, criterion)
    theirs = separate_backpropagations(model, x, y, 9, 5, criterion)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_sum_of_the_contributions_is_the_gradient(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    BPTT = gdu.bptt_contributions(model, x, y, 9, 5, 0.0, criterion)
    mu.bptt_gradients(model, x, y, rule(9, 5, criterion))
    EP = gdu.ep_contributions(model, x, y, 9, 5, (0.0, 0.1), criterion)
    for name, p in model.named_parameters():
        torch.testing.assert_close(BPTT[name].sum(0), p.grad, rtol=1e-9, atol=1e-12)
    if not len(model.B_syn):  # with separate weights the pairing of states does not telescope
        mu.ep_gradients(model, x, y, rule(9, 5, criterion, 0.1))
        # the read-out's first state is nudged here
        for name, p in list(model.named_parameters())[: -2 if model.softmax else None]:
            torch.testing.assert_close(EP[name].sum(0), p.grad, rtol=1e-7, atol=1e-12)


def test_the_theorem():
    """On a converged network the relative error of summed EP falls with beta, one-sided, and with
    beta squared, symmetric."""
    torch.manual_seed(0)
    model = mu.P_MLP([30, 24, 12, 5], torch.tanh).double()
    x, y, criterion = (
        torch.randn(6, 30, dtype=torch.float64),
        torch.randint(0, 5, (6,)),
        mu.make_criterion("mse"),
    )
    betas, T1, T2 = (0.02, 0.01, 0.005), 1500, 300
    truth = gdu.bptt_contributions(model, x, y, T1, T2, 0.0, criterion)
    names = [name for name, _ in model.named_parameters()]

    def total(runs):
        return torch.cat(
            [sum(run[name].sum(0) for run in runs).flatten() / len(runs) for name in names]
        )

    exact = total([truth])
    errors = []
    for beta in betas:
        plus, minus = (
            gdu.ep_contributions(model, x, y, T1, T2, (0.0, b), criterion) for b in (beta, -beta)
        )
        errors.append(
            [
                ((total(runs) - exact).norm() / exact.norm()).item()
                for runs in ([plus], [plus, minus])
            ]
        )
    slopes = np.polyfit(np.log(betas), np.log(errors), 1)[0]
    assert slopes == pytest.approx([1, 2], abs=0.1), (errors, slopes)


def test_gducheck_leaves_gradients_and_random_numbers_alone(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    mu.ep_gradients(model, x, y, rule(4, 2, criterion, 0.1))
    before, random = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    mu.check_gdu(model, x, y, 4, 2, (0.0, 0.1), criterion)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters())) and torch.equal(
        random, torch.get_rng_state()
    )


def test_comparison_of_known_numbers():
    bptt = {"w": torch.tensor([[1.0, 2.0], [3.0, -2.0]])}
    ep = {"w": torch.tensor([[1.0, -2.0], [3.0, -2.0]])}
    (row,) = compare_gdu(bptt, ep, "one-sided")
    rms = (16 / 2) ** 0.5 / 2
    assert row["rmse"] == pytest.approx(rms / 2) and row["sign_error"] == 0.25
    assert row["distance"] == pytest.approx(4 / 4) and row["cosine"] == pytest.approx(
        16 / (4 * 32**0.5)
    )


QUICK = "--task digits --device -1 --T1 12 --T2 4 --betas 0 0.1 --seed 0"


@pytest.mark.parametrize(
    "words",
    tiers(
        [
            "--model MLP",
            "--model VFMLP --archi 784 20 12 10",
            "--model CNN --channels 3 4 --loss cel --softmax",
            "--model VFCNN --channels 3 4 --thirdphase",
        ],
        "--model MLP",
        "--model VFCNN --channels 3 4 --thirdphase",
    ),
)
def test_on_fresh_models(ok, tmp_path, words):
    out = ok("--todo gducheck --save", QUICK, words)
    assert "RMSE" in out and "neurons_0" in out and ("symmetric" in out) == ("thirdphase" in words)
    run = only_run(tmp_path)
    BPTT, EP = (torch.load(run / name, weights_only=True) for name in ("BPTT.tar", "EP.tar"))
    assert set(BPTT) == set(EP) and all(v.shape[0] == 4 for v in BPTT.values())
    assert {f"gdu_{name}.png" for name in BPTT} | {"gdu_overview.png", "gducheck.csv"} <= {
        p.name for p in run.iterdir()
    }
    assert (run / "EP_minus.tar").exists() == ("thirdphase" in words)


def test_on_a_saved_run(ok, tmp_path):
    ok(QUICK, "--model CNN --channels 3 4 --train-size 60 --test-size 20 --save")
    run = only_run(tmp_path)
    ok(f"--todo gducheck --device -1 --load-path {run}/ --thirdphase --betas 0 0.1 --save")
    rows = list(csv.DictReader(open(run / "gducheck.csv")))
    assert {r["estimate"] for r in rows} == {"one-sided", "symmetric"} and all(
        0 <= float(r["rmse"]) <= 2 for r in rows
    )


def test_check_thm_changes_no_bit_of_training(ok, tmp_path):
    line = QUICK + (
        " --model CNN --channels 3 4 --train-size 200 --test-size 20 --mbs 10 --random-sign --epochs 2 "
        "--save"
    )
    weights, outs = [], []
    for words in ("", "--check-thm"):
        folder = tmp_path / f"run{len(weights)}"
        folder.mkdir()
        import os

        os.chdir(folder)
        outs.append(ok(line, words))
        weights.append(
            torch.load(only_run(folder) / "final_model.pt", weights_only=True)["model_state_dict"]
        )
    assert all(torch.equal(weights[0][name], w) for name, w in weights[1].items())
    rows = list(csv.DictReader(open(only_run(folder) / "gducheck.csv")))
    assert (
        len({(r["epoch"], r["batch"]) for r in rows}) == 20
        and outs[1].count("EP (one-sided) against BPTT") == 20
    )


@pytest.mark.parametrize(
    "words, what",
    [
        ("--T1 3 --T2 4", "--T2: got 4"),
        ("--betas 0 0", "--betas"),
        ("--alg BPTT --betas 0.1 0.1", "--betas"),
    ],
)
def test_bad_input(cli, words, what):
    code, _, err = cli("--todo gducheck", QUICK, words)
    assert code == 2 and what in err and err.count("\n") == 1
