"""Feed-forward networks: the same commands as for energy models, and the same numbers as plain
PyTorch."""

import concurrent.futures
import csv
import json
import re
import threading

import numpy as np
import pytest
import torch
from conftest import only_run
from make_cifar import write_corruptions
from shared import final_weights

import baselines
import model_utils as mu
from ART_Timesteps_Addition.gradients import through_time
from ART_Timesteps_Addition.settings import GradientMethod
from data_utils import CORRUPTIONS
from experiment import command_line, inference
from experiment.command_line import MAIN_FLAGS
from experiment.runs import contents
from experiment.workers import Workers

TINY = (
    "--task digits --device -1 --seed 5 --train-size 60 --test-size 40 --mbs 16 --loss cel --save"
)
NETWORKS = {
    "FFMLP": "--model FFMLP --archi 784 12 10 --lrs 0.05 0.05 --mmt 0.9",
    "FFCNN": "--model FFCNN --channels 3 4 --kernels 5 3 --pools ma --lrs 0.03 0.03 0.03 --mmt 0.9",
    "ViT": "--model ViT --patch 7 --depth 2 --heads 2 --width 16 --mlp-width 24 --optim adam --lrs 0.002",
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return f"{TINY} {NETWORKS[request.param]}"


def args_of(line):
    return command_line.resolve(command_line.parse(line.split(), MAIN_FLAGS))


def plain_cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 5),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(100, 10),
    )


def test_a_convolutional_network_is_a_plain_module_bit_by_bit():
    args = args_of(f"{TINY} {NETWORKS['FFCNN']} --lr-step 1 0.3")
    torch.manual_seed(3)
    model = mu.build(args)
    torch.manual_seed(3)
    mu.build(args)  # `build` draws nothing besides the weights
    torch.manual_seed(3)
    plain = plain_cnn()
    ours, _ = mu.make_optimizer(model, args)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.03, momentum=0.9, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x, y = (
            torch.rand(16, 1, 28, 28, generator=generator),
            torch.randint(10, (16,), generator=generator),
        )
        neurons = mu.bp_gradients(model, x, y, args.rule)
        ours.step()
        theirs.zero_grad()
        logits = plain(x)
        torch.nn.functional.cross_entropy(logits, y).backward()
        theirs.step()
        assert torch.equal(neurons[-1], logits)
    for ours, theirs in zip(
        model.net.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    plain.eval()
    assert torch.equal(inference.predicting_neurons(model, x, args.rule)[-1], plain(x))


GEOMETRY = (
    "--channels 3 4 5 --kernels 5 3 2 --strides 1 2 1 --paddings 0 1 0 --pools mai --fc 9 10 "
    "--act my_hard_sig --loss cel"
)
MATCHED = f"--model FFCNN --no-norm {GEOMETRY}"


@pytest.mark.parametrize("task", ["digits", "CIFAR10"])
def test_a_matched_control_has_the_layers_of_the_energy_model(task):
    energy = mu.build(args_of(f"--task {task} --model CNN {GEOMETRY}"))
    network = mu.build(args_of(f"--task {task} {MATCHED}"))
    x = torch.rand(2, *energy.connections[0].pre_shape)
    shapes = [tuple(state.shape[1:]) for state in energy(x, T=1)]
    assert len(shapes) == len(energy.synapses) == len(network.synapses) == 5
    for ours, theirs in zip(network.synapses, energy.synapses):
        assert repr(ours) == repr(theirs) and ours.weight.shape == theirs.weight.shape
    found = []
    for modules in network._layers:
        for module in modules:
            x = module(x)
        found.append(tuple(x.shape[1:]))
    assert found == shapes
    modules = [type(module).__name__ for module in network.net]
    assert modules == [
        *("Conv2d", "MaxPool", "Activation"),
        *("Conv2d", "AvgPool", "Activation"),
        *("Conv2d", "Activation"),
        *("Flatten", "Linear", "Activation", "Linear"),
    ]


def test_a_matched_control_computes_what_the_energy_model_drives_up():
    """A layer of it is the activation of the bottom-up drive alone."""
    energy = mu.build(args_of(f"--task digits --model CNN {GEOMETRY}"))
    network = mu.build(args_of(f"--task digits {MATCHED}"))
    for ours, theirs in zip(network.synapses, energy.synapses):
        ours.load_state_dict(theirs.state_dict())
    x = drive = torch.rand(2, 1, 28, 28)
    for n, connection in enumerate(energy.connections):
        drive = connection.up(drive if n == 0 else mu.my_hard_sig(drive))[0]
    torch.testing.assert_close(network(x)[0], drive)


def test_activations_count_for_a_matched_control_alone(ok, cli, tmp_path):
    """Saved feed-forward models have ReLU, whatever --act their config.json has."""
    line = f"{TINY} {NETWORKS['FFCNN']}"
    assert "--act has no effect on FFCNN without --no-norm" in cli(line, "--act tanh")[2]
    run = only_run(tmp_path)
    for name in ("model.pt", "checkpoint.tar"):
        state = torch.load(run / name, weights_only=True)
        del state["config"]["no_norm"]  # as an earlier version saved it
        torch.save(state, run / name)
    model = mu.load_run(run).model
    assert [type(m) for m in model.net[1:3]] == [baselines.BatchNorm, torch.nn.ReLU]
    code, _, err = cli("--todo evaluate --device -1 --load-path", run)
    assert code == 0 and not err
    code, _, err = cli("--task digits --device -1 --train-size 20 --test-size 10 --no-norm --T1 2")
    assert code == 0 and "--no-norm has no effect on MLP, only on FFCNN" in err


def test_a_matched_control_is_saved_and_loaded(ok, tmp_path):
    ok(TINY, MATCHED, "--lrs 0.1 0.1 0.1 0.1 0.1")
    run = mu.load_run(only_run(tmp_path), "cpu")
    assert run.args.no_norm and not any("norm" in type(m).__name__.lower() for m in run.model.net)
    assert [m.function for m in run.model.net if isinstance(m, baselines.Activation)] == (
        [mu.my_hard_sig] * 4
    )


def test_every_command_works_with_a_network(ok, tmp_path, network):
    out = ok(network, "--epochs 2")
    assert "converged" not in out and "warning" not in out
    run = only_run(tmp_path)
    assert [row["converged"] for row in csv.DictReader(open(run / "metrics.csv"))] == ["", ""]
    assert run.relative_to(tmp_path).parts[:3] == ("results", "BP", "cel")
    load = f"--device -1 --load-path {run}"
    out = ok(load, "--todo evaluate --save")
    assert "T1" not in out and "converged" not in out and (run / "predictions.csv").exists()
    out = ok(
        load,
        "--todo attack --attack-grad bptt smooth --eps-list 0.5 --attack-iters 3 --test-size 12",
    )
    assert "steps" not in out and "worst" in out
    for attack in ("square", "apgd-ce"):
        ok(load, f"--todo attack --attack {attack} --attack-iters 3 --eps-list 0.5 --test-size 8")


def test_a_network_is_audited_without_the_checks_of_time_steps(ok, tmp_path):
    out = ok(TINY, NETWORKS["FFMLP"])
    time = re.search("time: .*", out)[0]
    assert "backward " in time and "BP" not in time
    run = only_run(tmp_path)
    out = ok(
        "--todo audit --budget quick --eps 0.5 --attack-norm 2 --test-size 8 --device -1 --load-path",
        run,
    )
    assert "results go to" in out and "accuracy over eps" in out
    assert "predictions after" not in out and "read out early" not in out
    result = json.loads((run / "Audit_2_0.5.json").read_text())
    assert "settled" not in result["checks"] and "blind_attacks" in result["checks"]
    assert not any(
        " ep@" in a["name"] or " soft@" in a["name"] or "all states" in a["name"]
        for a in result["attacks"]
    )


def test_a_resumed_network_is_as_if_it_had_not_stopped(ok, tmp_path, network, monkeypatch):
    lines = [network + " --lr-step 2 0.5"] * 2
    for name, line, epochs in zip(("whole", "parts"), lines, (3, 1)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        ok(line, f"--epochs {epochs}")
    ok("--device -1 --epochs 2 --load-path", only_run(tmp_path / "parts"))
    whole, parts = (final_weights(only_run(tmp_path / name)) for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_corruptions_of_a_network(ok, tmp_path, cifar):
    write_corruptions(tmp_path / "data", CORRUPTIONS)
    ok(
        f"--task CIFAR10 --data-dir {cifar} --device -1 --train-size 20 --test-size 8 --save --loss cel",
        NETWORKS["FFCNN"],
    )
    ok(
        "--todo corruptions --corruptions-dir",
        next((tmp_path / "data").glob("*-C")),
        "--device -1 --test-size 4 --load-path",
        only_run(tmp_path),
    )
    assert "mean over all" in (only_run(tmp_path) / "Corruption_Accuracy.txt").read_text()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--model FFMLP --alg EP", "FFMLP is trained by BP"),
        ("--model MLP --alg BP", "use EP, CEP or BPTT with MLP"),
        ("--model FFMLP --todo gducheck", "needs a model with time steps"),
        ("--model ViT --patch 5", "expected a divisor of 28"),
        ("--model ViT --heads 3", "a multiple of --heads 3"),
        ("--model ViT --lrs 0.1 0.2", "expected 1"),
        (
            "--model FFCNN --channels 4 --kernels 40 --pools m --strides 1 --paddings 0",
            "nothing is left",
        ),
        ("--lr-step 0 0.3", "argument --lr-step"),
        ("--lr-step 8", "argument --lr-step"),
        ("--lr-step 8 0.3 --lr-decay", "cannot be combined with --lr-decay"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(cli, line, message):
    code, _, err = cli(f"--task digits --device -1 {line}")
    assert code == 2 and message in err and len(err.splitlines()) == 1 + err.count("note:")


def shares_of_one_process(counts):
    """Workers, as threads of this process, that meet in every mean; each has so many samples of the
    whole."""
    meeting, values = threading.Barrier(len(counts)), {}

    class Shared(Workers):
        def sum(self, value):
            values[self.rank] = value
            meeting.wait(20)
            total = sum(values[rank] for rank in range(self.size))
            meeting.wait(20)
            return total

    return [Shared(rank, len(counts)) for rank in range(len(counts))]


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("counts", [(3, 2), (1, 0), (1, 1), (2, 1), (4, 4, 3)])
def test_shares_are_normalised_by_the_statistics_of_the_whole(counts, size):
    """Outputs, gradients and running statistics are those of the whole mini-batch at once, whose
    share of no sample computes along on another's. A single value a map, which has no variance, is
    one of the whole."""
    torch.manual_seed(0)
    n, slope = sum(counts), torch.randn(3, size, size).double()
    x = torch.randn(n, 3, size, size, dtype=torch.float64, requires_grad=True)
    whole, norms = baselines.BatchNorm(3).double().train(), []
    out = whole(x)
    (out * slope).sum((1, 2, 3)).square().mean().backward()
    parts = [
        slice(sum(counts[:r]), sum(counts[: r + 1])) if count else slice(0, 1)
        for r, count in enumerate(counts)
    ]

    def work(workers, part, count):
        norm = baselines.BatchNorm(3).double().train()
        norms.append((norm, count))
        own = x[part].detach().requires_grad_()
        with workers.sharing_statistics(norm, count, n):
            found = norm(own)
            (found * slope).sum((1, 2, 3)).square().mean().backward()
        assert norm.whole is None
        torch.testing.assert_close(found.detach(), out[part].detach())
        if count:
            torch.testing.assert_close(own.grad * count / n, x.grad[part])

    with concurrent.futures.ThreadPoolExecutor(len(counts)) as pool:
        for done in [
            pool.submit(work, *job) for job in zip(shares_of_one_process(counts), parts, counts)
        ]:
            done.result()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(
            sum(dict(norm.named_parameters())[name].grad * count / n for norm, count in norms),
            p.grad,
        )
    for norm, _ in norms:
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(dict(norm.named_buffers())[name], buffer)


def test_flags_without_an_effect_are_noted(cli, tmp_path):
    code, _, err = cli(TINY, NETWORKS["FFMLP"], "--T1 30 --betas 0 1 --act tanh")
    assert code == 0 and all(
        f"--{name} has no effect on FFMLP" in err for name in ("T1", "betas", "act")
    ), err
    code, out, err = cli(
        "--todo attack --device -1 --attack-grad ep --eps-list 0.5 --attack-iters 2 --test-size 4 "
        "--load-path",
        only_run(tmp_path),
    )
    assert code == 0 and "--attack-grad ep has no effect on FFMLP" in err and "bptt" in out
    code, _, err = cli("--todo characteristic --device -1 --load-path", only_run(tmp_path))
    assert code == 2 and "needs a model with time steps" in err


def test_lr_step_lowers_the_rates_every_n_epochs(ok, tmp_path):
    ok(TINY, NETWORKS["FFMLP"], "--lr-step 2 0.5 --epochs 5")
    state = torch.load(only_run(tmp_path) / "checkpoint.tar", weights_only=True)
    assert [group["lr"] for group in state["opt"]["param_groups"]] == pytest.approx([0.0125] * 2)


@pytest.mark.parametrize(
    "name, value",
    [
        ("net.1.num_batches_tracked", torch.tensor(-1)),
        ("net.1.num_batches_tracked", torch.tensor([1, 2])),
        ("net.1.running_var", -torch.ones(3)),
    ],
)
def test_a_damaged_batch_normalisation_is_refused(ok, cli, tmp_path, name, value):
    ok(TINY, NETWORKS["FFCNN"])
    path = only_run(tmp_path) / "checkpoint.tar"
    state = torch.load(path, weights_only=True)
    state["model_state_dict"][name] = value
    torch.save(state, path)
    code, _, err = cli("--device -1 --load-path", only_run(tmp_path))
    assert code == 2 and name in err and len(err.splitlines()) == 1


def test_a_network_is_used_from_python(ok, tmp_path):
    ok(TINY, NETWORKS["FFCNN"])
    run = mu.load_run(only_run(tmp_path), "cpu")
    images = np.random.default_rng(0).random((3, 1, 28, 28), dtype=np.float32)
    assert run.classifier().predict(images).argmax(1).tolist() == run.predict(images).tolist()


def test_a_map_of_one_value_has_no_variance():
    norm = baselines.BatchNorm(3).train()
    assert torch.isfinite(norm(torch.rand(1, 3, 1, 1))).all() and norm.num_batches_tracked == 0


def test_safe_loading_takes_counts_alone_for_whole_numbers():
    loaded = contents.weights(mu.make_model(args_of(f"{TINY} {NETWORKS['FFCNN']}")).state_dict())
    assert loaded["net.1.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(contents.Damaged):
        contents.weights({"net.0.weight": torch.zeros(2, dtype=torch.int64)})


def test_a_saturated_matched_control_has_a_smooth_gradient():
    """Its slopes vanish as those of energy models do: without `smooth` it would seem robust."""
    line = f"{TINY} --model FFCNN --no-norm --act my_hard_sig --channels 4 --kernels 5 --pools m"
    network = mu.build(args_of(f"{line} --strides 1 --paddings 0"))
    with torch.no_grad():
        network.synapses[0].bias += 100  # beyond the corner of the activation
    x = torch.rand(2, 1, 28, 28)
    gradients = {}
    for grad in ("bptt", "smooth"):
        method = GradientMethod(grad, steps=1, rescale=False)
        out, pullback = through_time(network, x, "cel", 1, method)
        assert torch.equal(out, network(x)[0])
        gradients[grad] = pullback(torch.ones_like(out))
    assert gradients["bptt"].abs().max() == 0
    assert gradients["smooth"].abs().amax((1, 2, 3)).min() > 0
