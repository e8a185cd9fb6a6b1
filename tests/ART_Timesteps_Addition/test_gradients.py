"""What an attack's gradient does to the model it is taken of (nothing), and in which precision it
is taken."""

import ast
import copy

import numpy as np
import pytest
import torch
from conftest import MODELS, ROOT, criterion_of, rule, sample
from shared import convolutional

import model_utils as mu
from ART_Timesteps_Addition import attacks, gradients
from ART_Timesteps_Addition.pytorch import PyTorchClassifier, Unrolled
from ART_Timesteps_Addition.settings import Attack, GradientMethod
from data_utils import load_split
from energy.activations import CURVES
from energy.precision import set_precision

WAYS = [(grad, start) for grad in ("bptt", "smooth", "ep") for start in ("zero", "equilibrium")]


def classifier_of(model, grad="bptt", start="zero", T1=8, T2=5, classes=5):
    shape = model.connections[0].pre_shape
    return PyTorchClassifier(
        model,
        torch.nn.CrossEntropyLoss(),
        shape,
        classes,
        T1,
        T2,
        criterion=criterion_of(model),
        grad=grad,
        start=start,
        device_type="cpu",
        clip_values=(0.0, 1.0),
    )


def built(name, act=mu.my_hard_sig):
    torch.manual_seed(0)
    return MODELS[name](act)


def belongings(model):
    """All that training needs to find as it was."""
    return [
        model.training,
        *(
            (name, id(p), p.stride(), p.requires_grad, type(p), id(p.grad))
            for name, p in model.named_parameters()
        ),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_an_attack_leaves_the_model_as_it_was(name):
    model = built(name)
    x, y = sample(model)
    images, labels = x.numpy(), np.eye(5, dtype=np.float32)[y]
    criterion = criterion_of(model)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    untouched = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, untouched)]
    for grad, start in WAYS:
        classifier = classifier_of(model, grad, start)
        before, kept = belongings(model), [(p.clone(), p.grad.clone()) for p in model.parameters()]
        predicted = classifier.predict(images)
        classifier.loss_gradient(images, labels)
        classifier.class_gradient(images, label=1)
        if images.ndim == 4:  # with classifiers that ART builds of this one
            attack = Attack("apgd-dlr", "2", 0.5, 2)
            attacks.BUILDERS[attack.name](classifier, attack, len(images)).generate(
                images.copy(), labels
            )
        assert belongings(model) == before
        assert all(
            torch.equal(p, a) and torch.equal(p.grad, b)
            for p, (a, b) in zip(model.parameters(), kept)
        )
        assert np.array_equal(classifier.predict(images), predicted)
    for learn in (
        lambda m: mu.ep_gradients(m, x, y, rule(8, 4, criterion, 0.5)),
        lambda m: mu.bptt_gradients(m, x, y, rule(8, 4, criterion)),
    ):
        for m, optimizer in zip((model, untouched), optimizers):
            learn(m)
            optimizer.step()
        assert any(not torch.equal(p, a) for p, (a, _) in zip(model.parameters(), kept))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters()))


def test_saving_through_art_writes_the_weights(tmp_path):
    model = built("CNN max")
    classifier_of(model).save("attacked", path=str(tmp_path))
    saved, state = torch.load(tmp_path / "attacked.model", weights_only=True), model.state_dict()
    assert saved.keys() == state.keys() and all(
        torch.equal(saved[key], state[key]) for key in state
    )


@pytest.mark.parametrize("name", ["CNN max", "VFMLP"])
def test_training_through_art_is_refused(name):
    classifier, x = classifier_of(built(name)), sample(built(name))[0].numpy()
    y = np.eye(5, dtype=np.float32)[np.zeros(len(x), dtype=int)]
    for call in (
        lambda: classifier.fit(x, y),
        lambda: classifier.fit_generator(None),
        lambda: classifier.reset(),
        lambda: classifier.clone_for_refitting(),
    ):
        with pytest.raises(NotImplementedError, match="model_utils.train.*main.py"):
            call()
    with pytest.raises(NotImplementedError, match="model\\(x"):
        classifier.get_activations(x, 0)


# ---- precision


def cosines(model, exact, x, y, grad, start):
    """Of the loss gradients of two models, for each image for which the second one's is not
    zero."""
    found = [classifier_of(m, grad, start, 20, 10, 10).loss_gradient(x, y) for m in (model, exact)]
    found = [g.reshape(len(x), -1).astype(np.float64) for g in found]
    found = [g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-300) for g in found]
    return (found[0] * found[1]).sum(1)[found[1].any(1)]


@pytest.mark.parametrize("grad, start", [way for way in WAYS if way != ("ep", "equilibrium")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [1, 12])
def test_gradients_are_those_of_fp32_in_lower_precision(gain, dtype, grad, start):
    model = convolutional(gain).to(dtype)
    x = (load_split("digits", "", False, 20)[0].float() / 255).numpy()
    wrong = (
        classifier_of(model, classes=10).predict(x).argmax(1) + 1
    ) % 10  # so that no loss is zero
    y = np.eye(10, dtype=np.float32)[wrong]
    found = cosines(model, copy.deepcopy(model).double(), x, y, grad, start)
    assert len(found) >= 12 and np.median(found) > 0.99, np.sort(found)
    assert all(p.dtype == dtype for p in model.parameters())


def settings():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


class _Recording(torch.autograd.Function):
    """tanh that writes down how products are computed while it and its backward pass run."""

    seen = []

    @staticmethod
    def forward(ctx, x):
        _Recording.seen.append(("forward", settings()))
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        _Recording.seen.append(("backward", settings()))
        return grad * (1 - ctx.saved_tensors[0] ** 2)


@pytest.fixture
def tf32():
    before = settings()
    set_precision("tf32")
    yield settings()
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("grad", ["bptt", "smooth", "ep"])
def test_gradients_are_exact_where_predictions_are_not(grad, tf32, monkeypatch):
    act = _Recording.apply
    monkeypatch.setitem(CURVES, act, CURVES[torch.tanh])
    model = built("CNN max", act)
    x, y = sample(model)
    x, y = x.numpy(), np.eye(5, dtype=np.float32)[y]
    ours = classifier_of(model, grad, "equilibrium")
    arts = attacks.BUILDERS["apgd-ce"](
        ours, Attack("apgd-ce", "2", 0.5, 2), len(x)
    ).estimator  # not of our class
    assert type(arts) is not type(ours)
    for classifier in (ours, arts):
        _Recording.seen.clear()
        classifier.predict(x)
        assert {how for _, how in _Recording.seen} == {("tf32", "tf32")}
        _Recording.seen.clear()
        classifier.loss_gradient(x, y)
        assert {how for _, how in _Recording.seen} == {("ieee", "ieee")}
        assert {when for when, _ in _Recording.seen} == (
            {"forward"} if grad == "ep" else {"forward", "backward"}
        )
        assert settings() == tf32


def test_a_sweep_says_in_which_precision_predictions_ran(ok, tmp_path, monkeypatch):
    ok(
        "--task digits --device -1 --archi 784 12 10 --T1 6 --T2 3 --train-size 40 --test-size 8 --mbs 8 --save"
    )
    (run,) = tmp_path.rglob("model.pt")
    attack = (
        f"--todo attack --device -1 --load-path {run.parent} --eps-list 1 --attack-iters 2 --attack-step 3 "
        "--attack-grad bptt ep"
    )
    assert "bf16" not in ok(attack)
    assert '"precision": "fp32"' in (run.parent / "Adversarial_Accuracy.txt").read_text()
    # which wants a CUDA device; bf16 is the same on a CPU
    monkeypatch.setattr("experiment.devices.validate_device", lambda *_: None)
    assert "in bf16, gradients unrolled through 3 steps in fp32" in ok(attack, "--precision bf16")
    header = (run.parent / "Adversarial_Accuracy.txt").read_text()
    assert '"precision": "bf16"' in header


def test_the_layout_of_published_images_is_for_cpus_alone(monkeypatch):
    cases = (
        ("cpu", "AVX2", False),
        ("cpu", "AVX512", True),
        ("meta", "AVX2", True),
        ("meta", "AVX512", True),
    )
    for device, capability, same in cases:
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        weight = torch.empty(4, 3, 3, 3, device=device).contiguous(
            memory_format=torch.channels_last
        )
        strides = gradients.published_layout({"weight": weight})["weight"].stride()
        assert strides == (weight.stride() if same else (27, 9, 3, 1))


def test_the_attack_room_knows_no_room_above_it():
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    for room, below in (
        ("ART_Timesteps_Addition", {"energy", "data_utils", "metrics"}),
        ("energy", {"data_utils"}),
    ):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or room]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
                used = {name.split(".")[0] for name in names} & ours
                assert used <= {room, *below}, (path, used)


def test_unknown_ways_are_named():
    for wrong in ({"grad": "bptt "}, {"start": "near"}):
        with pytest.raises(ValueError, match="bptt, smooth, ep|zero, equilibrium"):
            Unrolled(built("MLP"), 4, 3, mu.make_criterion("mse"), **wrong)


@pytest.mark.parametrize("grad", ["smooth", "soft"])
def test_an_activation_that_is_not_registered_is_refused_by_name(grad):
    model = built("MLP", torch.relu)
    x, _ = sample(model)
    method = GradientMethod(grad, steps=4)
    with pytest.raises(ValueError, match="relu: register it"):
        gradients.through_time(model, x, "mse", 6, method)
    if grad == "soft":
        with pytest.raises(ValueError, match="relu: register it"):
            gradients.softness(model.chain(), x, 6)
