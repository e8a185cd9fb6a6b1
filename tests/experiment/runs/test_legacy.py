"""Checkpoints of other programs: the original code, wrappers of torch, NumPy numbers. What is
unambiguous loads; anything else is one line that names the flags to give."""

import numpy as np
import pytest
import torch

import model_utils as mu

COMMAND = (
    "main.py --model MLP --task digits --archi 784 16 10 --optim adam --lrs 1e-3 2e-3 "
    "--epochs 3 --act tanh --todo train --T1 7 --T2 4 --betas 0.0 0.2 --mbs 50 --loss mse "
    "--seed 5 --save"
)
LINES = """
- task: digits
- data augmentation (if CIFAR10): False
- learning rate decay: {decay}
- scale for weight init: None
- activation: tanh
- learning rates: [0.001, 0.002]
- weight decays: None
- momentum (if sgd): 0.0
- optimizer: adam
- loss: mse
- alg: EP
- minibatch size: 50
- T1: 7
- T2: 4
- betas: [0.0, 0.2]
- random beta_2 sign: False
- thirdphase: False
- softmax: False
- same update VFCNN: False
- epochs: 3
- seed: 5
- device: 0

Poolings : []
P_MLP(
  (synapses): ModuleList(
    (0): Linear(in_features=784, out_features=16, bias=True)
"""
SIZES = "--device -1 --train-size 20 --test-size 20"


def original(folder, text=COMMAND + LINES, decay=False, name="checkpoint.tar", **more):
    """A run folder of three epochs as the original code writes it, and its model: `best` is the
    number of correct test images, the lists of accuracies begin with 10.0 before the first epoch.
    """
    torch.manual_seed(0)
    model = mu.P_MLP([784, 16, 10], torch.tanh)
    layers = zip(model.synapses, (1e-3, 2e-3))
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in layers]
    optimizer, scheduler = torch.optim.Adam(groups, lr=1e-3), None
    if decay:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-5)
    x, y = torch.rand(50, 784), torch.randint(10, (50,))
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(model(x, T=7, check_thm=True), y, "mse").mean().backward()
        optimizer.step()
        if decay:
            scheduler.step()
    folder.mkdir()
    (folder / "hyperparameters.txt").write_text(text.format(decay=decay))
    torch.save(
        {
            "model_state_dict": model.state_dict(),
            "opt": optimizer.state_dict(),
            "train_acc": [10.0, 50.0, 60.0, 70.0],
            "test_acc": [10.0, 52.0, 72.5, 61.0],
            "best": 7250,
            "epoch": 3,
            "angles": [90.0],
            "scheduler": scheduler.state_dict() if decay else None,
            **more,
        },
        folder / name,
    )
    return model


TEST = (10.0, 52.0, 72.5, 61.0)
FORMS = {
    "a count": {},
    "with a scheduler": {"decay": True},
    "a count in a tensor": {"best": torch.tensor(7250)},
    "a count below 100": {"best": 29},
    "a percentage": {"best": 72.5, "decay": True},
    "numbers of NumPy": {
        "best": np.int64(7250),
        "test_acc": [*map(np.float64, TEST)],
        "train_acc": [np.float32(10), 50.0, np.float64(60), np.float16(70)],
    },
    "tensors": {"best": torch.tensor(72.5), "test_acc": [*map(torch.tensor, TEST)]},
    "another number of epochs": {"epoch": 1},
}  # final_checkpoint.tar has that of its session


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_the_original_code_resumes_where_it_was(cli, tmp_path, form):
    original(tmp_path / "run", **FORMS[form])
    code, out, err = cli("--todo evaluate --load-path run", SIZES)
    assert code == 0 and not err and "(epoch 3, the latest) with T1 = 7" in out, (out, err)
    assert mu.load_run("run").args.act == "tanh"
    code, out, err = cli("--device -1 --train-size 20 --load-path run")
    assert code == 0 and "from epoch 4 on" in out, err
    state = torch.load("run/checkpoint.tar", weights_only=True)
    assert state["epoch"] == 4 and state["test_acc"][:3] == [52.0, 72.5, 61.0]
    assert state["best"] == 72.5 and not (tmp_path / "run" / "model.pt").exists()
    assert (state["scheduler"] or {"last_epoch": 4})["last_epoch"] == 4
    assert state["config"]["optim"] == "adam" and state["config"]["lrs"] == [1e-3, 2e-3]


def test_no_first_epoch_is_dropped_that_was_one(cli, tmp_path):
    original(tmp_path / "run", train_acc=[10.0, 50.0, 60.0], test_acc=[10.0, 52.0, 72.5])
    assert "(epoch 3," in cli("--todo evaluate --load-path run", SIZES)[1]


TEXTS = {  # name: (hyperparameters.txt, words of standard error)
    "a command line alone": (COMMAND + "\n", None),
    "with an interpreter, quotation marks and another program's flags": (
        "/usr/bin/python3 -u " + COMMAND.replace("tanh", "'tanh'") + " --fork 3 4 --debug",
        None,
    ),
    "a flag given twice": (COMMAND.replace("--act tanh", "--act mysig") + " --act tanh", None),
    "underscores, equality signs": (COMMAND.replace("--act tanh", "--act=tanh --lr_decay"), None),
    "lines alone": (LINES + "- model: MLP\n- archi: [784, 16, 10]\n", None),
    "two activations": (
        COMMAND + LINES.replace("activation: tanh", "activation: mysig"),
        "differ in --act",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_command_line_is_read_and_then_the_lines_below_it(cli, tmp_path, name):
    text, words = TEXTS[name]
    original(tmp_path / "run", text)
    code, _, err = cli("--todo evaluate --load-path run", SIZES)
    args = mu.load_run("run").args
    assert code == 0 and (words in err if words else not err), err
    assert (args.act, args.T1, args.mbs, args.optim) == ("tanh", 7, 50, "adam")
    assert args.lrs == [1e-3, 2e-3]


def test_an_activation_that_is_unknown_is_no_other_one(cli, tmp_path):
    original(tmp_path / "run", (COMMAND + LINES).replace("tanh", "swish"))
    code, _, err = cli("--todo evaluate --load-path run", SIZES)
    assert code == 2 and err.count("\n") == 1 and "no valid --act" in err and "swish" in err


# ---- state dicts of other tools


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_of_wrapped_models_are_those_of_the_model(tmp_path, prefix):
    model = original(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint.tar", weights_only=True)
    weights = state["model_state_dict"].items()
    state["model_state_dict"] = {prefix + name: weight for name, weight in weights}
    torch.save(state, tmp_path / "run" / "checkpoint.tar")
    loaded = mu.load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.state_dict().items())


def test_two_names_of_one_weight_are_refused(cli, tmp_path):
    weights = mu.P_MLP([784, 16, 10], torch.tanh).state_dict()
    weights["module.synapses.0.bias"] = weights["synapses.0.bias"]
    torch.save(weights, tmp_path / "model.pt")
    code, _, err = cli("--todo evaluate --task digits --load-path model.pt", SIZES)
    assert code == 2 and err.count("\n") == 1 and "with two of one name" in err


@pytest.mark.parametrize(
    "kind, model, softmax",
    [("MLP", mu.P_MLP, False), ("VFMLP", mu.VF_MLP, False), ("VFMLP", mu.VF_MLP, True)],
)
@pytest.mark.parametrize("bare", [True, False])
def test_sizes_that_weights_determine_need_no_flag(cli, tmp_path, kind, model, softmax, bare):
    weights = model([784, 9, 8, 10], torch.tanh, softmax=softmax).state_dict()
    torch.save(weights if bare else {"model_state_dict": weights}, tmp_path / "weights.pt")
    code, out, err = cli(
        "--todo evaluate --task digits --loss cel --act tanh", SIZES, "--load-path weights.pt"
    )
    assert code == 0 and "test accuracy" in out, err
    assert ("softmax" in err) == (kind == "MLP")  # whose weights are the same
    code, _, err = cli("--todo evaluate --task digits --loss cel --load-path weights.pt", SIZES)
    assert code == 0 and "does not record --act" in err and "assumed: act mysig" in err
    args = mu.load_run("weights.pt").args
    assert (args.model, args.archi) == (kind, [784, 9, 8, 10])


def test_what_weights_do_not_determine_is_asked_for(cli, tmp_path):
    model = mu.P_CNN(
        28, [1, 3, 4, 5], [5, 3, 3], [1, 1, 1], [10], mu.make_pools("mai"), [1, 0, 0], torch.tanh
    )
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    line = "--todo evaluate --task digits --act tanh --load-path weights.pt"
    code, _, err = cli(line, SIZES)
    assert code == 2 and err.count("\n") == 1 and "--pools, --paddings, --strides" in err
    code, _, err = cli(line, SIZES, "--pools mai")
    assert code == 2 and err.count("\n") == 1 and "--paddings, --strides" in err
    code, _, err = cli(line, SIZES, "--pools iii --paddings 0 0 0")
    assert code == 2 and "do not fit the model" in err
    assert "does not record --strides, --paddings, --pools" in err
    code, out, err = cli(line, SIZES, "--pools mai --paddings 1 0 0")
    assert code == 0 and "test accuracy" in out, err


def test_numbers_of_numpy_and_tensors_are_numbers(ok, tmp_path):
    ok("--task digits --archi 784 4 10 --T1 3 --T2 1 --betas 0 0.5 --seed 3 --save", SIZES)
    run = next(tmp_path.glob("results/*/*/*/*"))
    state = torch.load(run / "checkpoint.tar", weights_only=True)
    state["config"] |= {
        "T1": np.int64(3),
        "betas": [np.float64(0), torch.tensor(0.5)],
        "thirdphase": np.bool_(False),
        "seed": torch.tensor(3),
    }
    for row in state["history"]:
        row |= {name: np.float64(row[name]) for name in ("train_acc", "test_acc", "seconds")}
    state |= {"epoch": torch.tensor(1), "best": np.float64(state["best"]), "asked": np.int32(1)}
    state["opt"]["param_groups"][0]["lr"] = torch.tensor(0.01)
    torch.save(state, run / "checkpoint.tar")
    assert "from epoch 2 on" in ok(f"--device -1 --load-path {run}")
    config = torch.load(run / "checkpoint.tar", weights_only=True)["config"]
    assert config["T1"] == 3 and config["betas"] == [0.0, 0.5] and config["thirdphase"] is False


@pytest.mark.parametrize(
    "value", [np.datetime64("2026-01-01"), np.str_("a"), np.array([1.0]), np.complex64(1j)]
)
def test_other_values_of_numpy_are_one_line(cli, tmp_path, value):
    original(tmp_path / "run", best=value)
    code, _, err = cli("--todo evaluate --load-path run", SIZES)
    assert code == 2 and err.count("\n") == 1, err
