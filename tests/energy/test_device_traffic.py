"""Work on a GPU, shown without one: on tensors without numbers, which have a device and a layout
(benchmarks/counting.py).

That each of these tests fails where it should was shown by hand: with a `.cpu()`, a `.clone()` and
an NCHW tensor put into a step in turn."""

import collections
import contextlib

import pytest
import torch
from conftest import MODELS, criterion_of, grads, rule
from counting import Counting, moved, on_pretended_gpu

import baselines
import model_utils as mu
from ART_Timesteps_Addition.gradients import by_equilibrium_propagation
from ART_Timesteps_Addition.settings import GradientMethod
from data_utils import TASKS, Batches
from energy import fast
from energy.poolings import MaxPool
from energy.precision import _current, _set, set_precision
from experiment import command_line, inference, training
from experiment.command_line import MAIN_FLAGS
from experiment.diagnostics import Diagnostics, report_precision
from experiment.timing import Stopwatch
from experiment.training import Trainer
from experiment.workers import Workers


@contextlib.contextmanager
def pretended(*models):
    """A device that need not be there, with models on it, and a mini-batch for them: x, y."""
    with on_pretended_gpu() as device:
        for model in models:
            moved(model, device)
        shape = models[0].connections[0].pre_shape
        yield torch.rand(4, *shape, device=device), torch.zeros(4, dtype=torch.int64, device=device)


def everything(model, x, y, twin):
    """What every rule of learning gives that needs no backward pass, predictions, and EP's gradient
    of images."""
    criterion = criterion_of(model)
    masks = training.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), len(x))
    for drop, moving, more in ((None, None, {}), (masks, twin, {"thirdphase": True})):
        yield from mu.ep_gradients(model, x, y, rule(4, 2, criterion, **more), drop, moving)
        yield from (p.grad for p in model.parameters())
    yield from mu.cep_updates(
        model, x, y, rule(2, 2, criterion, thirdphase=True), masks, change=lambda share: None
    )
    count = inference.Convergence(model, 8)
    for predicting in (twin, model):
        yield from inference.predicting_neurons(
            predicting, x, rule(8, 2, criterion), convergence=count
        )
    yield count.converged
    out, pullback = by_equilibrium_propagation(
        model, x, mu.loss_name(criterion), 7, GradientMethod("ep", 2)
    )
    yield from (out, pullback(out))


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_stays_on_the_device(name, schedule):
    model = MODELS[name](mu.my_hard_sig if "CNN" in name else mu.my_sigmoid)
    model.schedule = schedule
    twin = mu.lowered(model, torch.bfloat16)
    with pretended(model, twin) as (x, y), Counting() as counted:
        assert all(t.device == x.device for t in everything(model, x, y, twin))
    assert not counted.names(lambda o: o.waits)


def published(dtype=torch.float32):
    """The CIFAR-10 network of the published recipe."""
    model = mu.P_CNN(
        32,
        [3, 128, 256, 512, 512],
        [3] * 4,
        [1] * 4,
        [10],
        mu.make_pools("mmmm"),
        [1, 1, 1, 0],
        mu.my_hard_sig,
        softmax=True,
    )
    return model.to(dtype)


def one_more_step(model, x, y, beta, schedule="sync"):
    """The operations of a step, as those of 10 without those of 9."""
    model.schedule, found = schedule, []
    with torch.no_grad():
        chain = model.chain("cel")
        phase = model.phase(chain.input_drive(x), y, beta, "cel")
        neurons = fast.relax(chain, phase, None, 3)
        for T in (9, 10):
            with Counting() as counted:
                fast.relax(chain, phase, neurons, T)
            found.append(counted.operations)
    return list((collections.Counter(found[1]) - collections.Counter(found[0])).elements())


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_published_network_moves_little_and_copies_nothing(dtype, schedule):
    model = published(dtype=dtype)
    with pretended(model) as (x, _):
        x, y = x[:1].expand(128, -1, -1, -1), torch.zeros(128, dtype=torch.int64, device=x.device)
        for beta, most in ((0.0, 26), (0.5, 32)):
            step = one_more_step(model, x, y, beta, schedule)
            assert 10 < len(step) <= most
            assert not [o.name for o in step if o.copies or o.waits]
            if (
                dtype == torch.float32
            ):  # of bf16 PyTorch knows a GPU's layouts only where there is one
                assert not [o.name for o in step if o.relaid]
            assert sum(o.bytes for o in step) <= (560e6 if dtype == torch.float32 else 350e6)


def test_a_training_waits_for_the_device_once_in_many_mini_batches(monkeypatch):
    words = (
        "--model CNN --task CIFAR10 --channels 4 4 --kernels 3 3 --strides 1 1 --pools mm --paddings 1 1 --fc 10 "
        "--loss cel --softmax --T1 4 --T2 2 --thirdphase --random-sign --data-aug"
    )
    args = command_line.resolve(command_line.parse(words.split(), MAIN_FLAGS))
    args = args.replace(dropouts=(0.9, 0.9, 0.9))
    model = mu.make_model(args)
    images, labels = (
        torch.zeros(26, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(26, dtype=torch.int64),
    )
    starts, gradients = [], Trainer.gradients

    def noted(self, *rest):
        starts.append(len(counted.names(lambda o: o.waits)))
        return gradients(self, *rest)

    monkeypatch.setattr(Trainer, "gradients", noted)
    with pretended(model) as (x, _):
        optimizer, _ = mu.make_optimizer(model, args)
        for group in optimizer.param_groups:
            group.update(
                fused=False, foreach=True
            )  # the fused step is a kernel without a description
        trainer = mu.make_trainer(model, optimizer, args)
        batches = Batches(
            images, labels, 2, TASKS["CIFAR10"], x.device, torch.Generator(), augment=True
        )
        with Counting(read=0) as counted:
            trainer.diagnostics.begin(1)
            before = len(counted.names(lambda o: o.waits))
            trainer.train_epoch(batches, 1, Stopwatch())
    waits = [b - a for a, b in zip(starts, [*starts[1:], len(counted.names(lambda o: o.waits))])]
    assert before == 0 and waits == [0] * 9 + [1] + [0] * 2 + [1]


def by_masks(model, masks=True):
    for pool in model.pools:
        if pool.routed:
            pool.masks = masks
    return model


@pytest.mark.parametrize("size", [(8, 8), (13, 13), (6, 9), (2, 2), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_the_route_of_the_same_winners(dtype, size):
    torch.manual_seed(0)
    index, mask = MaxPool(masks=False), MaxPool(masks=True)
    for tied in (False, True):
        for prepared in (False, True):
            u = torch.randn(3, 5, *size).to(dtype).contiguous(memory_format=torch.channels_last)
            u = u.clamp(-0.3, 0.3) if tied else u
            if prepared:
                mask.prepare(size)
            (post, route), (same, masked_route) = index.pool(u), mask.pool(u)
            assert (
                torch.equal(post, same)
                and masked_route.is_contiguous()
                and masked_route.dtype == torch.bool
            )
            back, again = index.adjoint(post, route, size), mask.adjoint(post, masked_route, size)
            assert torch.equal(back, again) and again.is_contiguous(
                memory_format=torch.channels_last
            )
            assert torch.equal(index.follow(u, route), mask.follow(u, masked_route))


def test_golden_cases_by_masks(case, golden_model):
    """Of equal entries the winner is the same: neurons at the ends of a hard activation are often
    equal."""
    c, found = case["case"], []
    if "m" not in c.get("pools", ""):
        return
    betas, criterion = c["betas"], mu.make_criterion(c["loss"])
    for masks in (False, True):
        by_masks(golden_model, masks)
        torch.use_deterministic_algorithms(masks)  # which forbid what has no order
        try:
            learns = rule(c["T1"], c["T2"], criterion, betas[1])
            found.append(mu.ep_gradients(golden_model, case["x"], case["y"], learns))
            found[-1] += grads(golden_model).values()
            mu.bptt_gradients(golden_model, case["x"], case["y"], learns)
            found[-1] += grads(golden_model).values()
        finally:
            torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_with_tol_the_host_waits_at_every_twentieth_step():
    model = MODELS["CNN max"](mu.my_hard_sig)
    with pretended(model) as (x, _), Counting(read=len(x)) as counted:  # as if none had settled
        inference.predicting_neurons(
            model, x, rule(100, 2, criterion_of(model), tol=1e-3), Stopwatch()
        )
    assert (
        len(counted.names(lambda o: o.waits)) == 100 // 20 - 1
    )  # the last steps end without a look


@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_precision_is_the_same_to_whoever_asks(name):
    """torch.compile asks in PyTorch's older way, which raises where only the newer one was told."""

    def asked():
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
            torch.backends.mkldnn.matmul.fp32_precision,
        )

    before = _current()
    try:
        set_precision(name)
        low, told = name == "tf32", asked()
        assert told[:5] == (
            (True, True, "high", "tf32", "tf32")
            if low
            else (False, False, "highest", "ieee", "ieee")
        )
        assert told[5] == before["cpu"]  # a GPU's setting is not to change a CPU's products
        with mu.exactly():
            assert asked()[:5] == (False, False, "highest", "ieee", "ieee")
        assert asked() == told
    finally:
        _set(before)


def test_attacking_a_mini_batch_does_not_wait_for_the_device():
    words = "--task digits --adv-train 0.5 --adv-norm inf --adv-iters 3 --adv-step 3 --adv-grad ep --thirdphase --T1 6"
    args = command_line.resolve(
        command_line.parse([*words.split(), "--archi", "784", "8", "10"], MAIN_FLAGS)
    )
    model = mu.make_model(args)
    with pretended(model) as (x, y):
        adversary = mu.make_adversary(model, args)
        start = adversary.draw((4, 1, 28, 28))
        with Counting() as counted:
            adversary.perturb(model, x.view(4, 1, 28, 28), y, start)
    assert not counted.names(lambda o: o.waits)


@pytest.mark.parametrize("kind", ["twin", "tf32"])
def test_the_noise_is_measured_without_waiting_for_the_device(kind):
    model = mu.P_MLP([784, 8, 10], torch.tanh)
    twin = mu.lowered(model, torch.bfloat16) if kind == "twin" else None
    rule = mu.Rule(T1=6, T2=3, betas=(0.0, 0.1))
    with pretended(model, *([twin] if twin else [])) as (x, y), Counting(read=0.0) as counted:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        diagnostics = Diagnostics(model, rule, optimizer, twin, "fp32" if twin else "tf32")
        diagnostics.examine(x[:2], y[:2])
        assert diagnostics.contrast.device == x.device
    assert not counted.names(lambda o: o.waits)


def test_a_shared_normalisation_stays_on_the_device():
    class Two(Workers):
        def sum(self, value):
            return value.clone()

    norm = baselines.BatchNorm(4).train()
    with on_pretended_gpu() as device, torch.no_grad(), Counting() as counted:
        moved(norm, device)
        x = torch.rand(3, 4, 6, 6, device=device).contiguous(memory_format=torch.channels_last)
        with Two(0, 2).sharing_statistics(norm, 3, 5):
            out = norm(x)
        assert out.device == device and out.is_contiguous(memory_format=torch.channels_last)
    assert not counted.names(lambda o: o.waits)


def test_a_direction_of_rounding_alone_is_not_compared(capsys, monkeypatch):
    """A bias in front of a normalisation has no gradient but rounding."""
    words = "--model FFCNN --alg BP --task digits --channels 4 4 --precision tf32"
    args = command_line.resolve(command_line.parse(words.split(), MAIN_FLAGS))
    model = mu.make_model(args)
    trainer = mu.make_trainer(model, mu.make_optimizer(model, args)[0], args)
    images, labels = torch.randint(0, 255, (8, 1, 28, 28), dtype=torch.uint8), torch.arange(8)
    gradients, calls = Trainer.gradients, []

    def rounded(self, x, y, *more):
        calls.append(x)
        return gradients(self, x if len(calls) < 2 else x * (1 + 1e-3), y, *more)

    monkeypatch.setattr(Trainer, "gradients", rounded)
    report_precision(
        trainer,
        Batches(images, labels, 8, TASKS["digits"], torch.device("cpu"), torch.Generator()),
        "tf32",
    )
    set_precision("fp32")
    said = capsys.readouterr().out
    assert "beta" not in said and float(said.split("at least ")[1].split()[0]) > 0.9, said


def test_comparing_precisions_leaves_the_statistics_of_a_batch_normalisation():
    words = "--model FFCNN --alg BP --task digits --channels 4 4 --precision tf32"
    args = command_line.resolve(command_line.parse(words.split(), MAIN_FLAGS))
    model = mu.make_model(args)
    trainer = mu.make_trainer(model, mu.make_optimizer(model, args)[0], args)
    images, labels = (
        torch.randint(0, 255, (8, 1, 28, 28), dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
    )
    batches = Batches(images, labels, 4, TASKS["digits"], torch.device("cpu"), torch.Generator())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report_precision(trainer, batches, "tf32")
    set_precision("fp32")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
