"""Validation of arguments against each other, and notes on flags that have no effect.

All functions raise UserError with what is wrong and what to do instead.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_utils import TASKS, UserError
from energy.names import POOLINGS
from experiment.command_line import words_of
from experiment.config import (
    BY_DEST,
    ENERGY_MODELS,
    FEED_FORWARD,
    FLAGS,
    GRADIENTS_OF_STEPS,
    TRANSFORMERS,
    Config,
    Flag,
)
from experiment.text import count, format_eps, format_value, listed


def validate(config: Config) -> None:
    """Validate the arguments of one call against each other."""
    todo = config.session.todo
    layers = _validate_model(config)
    names = ", ".join(layers) if len(layers) > 1 else "one for all layers"
    per_layer = {
        "lrs": config.optimizer.lrs,
        "wds": config.optimizer.wds,
        "dropouts": config.learning.dropouts,
    }
    for name, values in per_layer.items():
        if values is not None and len(values) != len(layers):
            raise _wrong_length(name, values, len(layers), names)
    dropouts = config.learning.dropouts
    if dropouts and 0 in dropouts:
        raise UserError(
            f"argument --dropouts: got {format_value(dropouts)}, expected numbers above 0 and at "
            "most 1"
        )
    if config.adversarial.eps is not None and not config.adversarial.eps:
        raise UserError(
            "argument --adv-train: got 0, expected an eps above 0; omit the flag to train on clean "
            "images"
        )
    if config.optimizer.lr_step and todo == "train":
        _validate_lr_step(config)
    if todo == "corruptions" and config.data.task not in ("CIFAR10", "CIFAR100"):
        raise UserError(
            "--todo corruptions: corrupted images exist for CIFAR10 and CIFAR100, the task of this "
            f"run is {config.data.task}"
        )
    writes = config.session.save or config.session.load_path
    if config.session.tensorboard and todo == "train" and writes:
        if not importlib.util.find_spec("tensorboard"):
            raise UserError(
                "argument --tensorboard: the package tensorboard is not installed; pip install "
                "tensorboard"
            )
    if config.model.has_dynamics:
        _validate_rule(config)
    else:
        _validate_feed_forward(config)


def _wrong_length(name: str, values: tuple, expected: object, what: str) -> UserError:
    got = f"got {count(len(values), 'value')} ({format_value(values)})"
    return UserError(f"argument --{name}: {got}, expected {expected}: {what}")


def _validate_lr_step(config: Config) -> None:
    values = config.optimizer.lr_step or ()
    if len(values) != 2 or values[0] < 1 or values[0] % 1 or not 0 < values[1] <= 1:
        raise UserError(
            f"argument --lr-step: got {format_value(values)}, expected a whole number of epochs of "
            "at least 1 and a factor above 0 and at most 1"
        )
    if config.optimizer.lr_decay:
        raise UserError("argument --lr-step: cannot be combined with --lr-decay; give one schedule")


# ------------------------------------------------------------------------------------------- model


def _validate_model(config: Config) -> list[str]:
    """Validate the architecture and return the names of its layers, in the order of their rates."""
    task = TASKS[config.data.task]
    model = config.model
    if model.softmax and model.loss != "cel":
        raise UserError(f"argument --softmax: needs --loss cel, got --loss {model.loss}")
    if model.kind in TRANSFORMERS:
        return _validate_transformer(config)
    if model.is_dense:
        least = 2 + model.softmax
        if len(model.archi) < least:
            what = "the input, hidden layers and the classes"
            raise _wrong_length("archi", model.archi, f"at least {least}", what)
        if model.archi[0] != task.inputs:
            raise UserError(
                f"argument --archi: its first entry is {model.archi[0]}, an image of "
                f"{config.data.task} has {task.inputs} values"
            )
        convolutions = 0
        dense = len(model.archi) - 1
        last_flag = "archi"
        last_size = model.archi[-1]
    else:
        for name in ("kernels", "strides", "paddings", "pools"):
            values = getattr(model, name)
            if len(values) != len(model.channels):
                what = "one per convolution, as many as --channels"
                raise _wrong_length(name, values, len(model.channels), what)
        if set(model.pools) - set(POOLINGS):
            letters = listed(list(POOLINGS))
            raise UserError(
                f"argument --pools: got {model.pools!r}, expected the letters {letters}"
            )
        convolutions = len(model.channels)
        dense = len(model.fc)
        last_flag = "fc"
        last_size = model.fc[-1]
    if last_size != task.classes:
        raise UserError(
            f"argument --{last_flag}: its last entry is {last_size}, {config.data.task} has "
            f"{task.classes} classes"
        )
    return [
        *(f"conv {n}" for n in range(1, convolutions + 1)),
        *(f"dense {n}" for n in range(1, dense + 1)),
    ]


def _validate_transformer(config: Config) -> list[str]:
    model = config.model
    size = TASKS[config.data.task].size
    if size % model.patch:
        raise UserError(
            f"argument --patch: got {model.patch}, expected a divisor of {size}: images of "
            f"{config.data.task} are {size} x {size}"
        )
    if model.width % model.heads:
        raise UserError(
            f"argument --width: got {model.width}, expected a multiple of --heads {model.heads}"
        )
    return ["transformer"]


def _validate_feed_forward(config: Config) -> None:
    """Refuse what needs time steps."""
    model = config.model.kind
    names = ", ".join(ENERGY_MODELS)
    alg = config.learning.alg
    todo = config.session.todo
    grad = config.adversarial.grad
    if alg != "BP":
        raise UserError(
            f"argument --alg: got {alg}, {model} is trained by BP; {alg} is for {names}"
        )
    if config.adversarial.eps and grad in GRADIENTS_OF_STEPS:
        raise UserError(f"argument --adv-grad: {grad} is only for {names}; use bptt with {model}")
    if todo in ("gducheck", "characteristic"):
        raise UserError(f"--todo {todo}: needs a model with time steps, {model} has none")
    if config.learning.dropouts:
        raise UserError(f"argument --dropouts: only for {names}, got --model {model}")
    if config.session.precision == "bf16":
        raise UserError(
            f"argument --precision: bf16 is only for time steps, {model} has none; use tf32 or fp32"
        )


def _validate_rule(config: Config) -> None:
    """Validate the learning rule of an energy model."""
    rule = config.learning
    optimizer = config.optimizer
    todo = config.session.todo
    if rule.alg == "BP":
        raise UserError(
            f"argument --alg: BP trains {', '.join(FEED_FORWARD)}; use EP, CEP or BPTT with "
            f"{config.model.kind}"
        )
    unrolls = rule.alg == "BPTT" or rule.check_thm or todo == "gducheck"
    if rule.T2 > rule.T1 and unrolls:
        raise UserError(
            f"argument --T2: got {rule.T2}, BPTT is unrolled through at most the {rule.T1} steps "
            "of --T1"
        )
    if rule.alg == "CEP" and todo == "train":
        if optimizer.optim != "sgd" or optimizer.mmt:
            momentum = f" with --mmt {optimizer.mmt:g}" if optimizer.mmt else ""
            raise UserError(
                f"argument --optim: got {optimizer.optim}{momentum}, CEP changes weights by plain "
                "gradient steps: it needs sgd without momentum"
            )
        if config.session.precision != "fp32":
            raise UserError(
                f"argument --precision: {config.session.precision} is not for CEP, whose weights "
                "change at every step; use fp32"
            )
    if len(rule.betas) != 2:
        raise _wrong_length("betas", rule.betas, 2, "of the free and of the nudged phase")
    free_beta, nudged_beta = rule.betas
    got = f"argument --betas: got {format_value(rule.betas)}"
    no_contrast = free_beta == nudged_beta or (rule.thirdphase and nudged_beta == 0)
    if no_contrast and (rule.alg != "BPTT" or todo == "gducheck"):
        raise UserError(f"{got}, EP needs two different values, the second not 0")
    both_signs = rule.random_sign or (rule.thirdphase and rule.alg == "CEP")
    if free_beta and both_signs and rule.alg != "BPTT":
        raise UserError(f"{got}, expected 0 as the first: the second takes both signs")


# ------------------------------------------------------------------------------- given flags alone


def validate_todo(given: Mapping[str, Any]) -> None:
    """Refuse flags that training does not use where --todo is missing: the command would train
    instead of doing what they are for. given: {dest: value}."""
    if "todo" in given:
        return
    unused = [
        flag for flag in FLAGS if flag.dest in given and flag.todos and "train" not in flag.todos
    ]
    if not unused:
        return
    shared = [
        todo
        for todo in unused[0].todos or ()
        if all(flag.todos and todo in flag.todos for flag in unused)
    ]
    names = ", ".join(name_as_given(flag, given) for flag in unused)
    todos = " or ".join(f"--todo {todo}" for todo in shared or unused[0].todos or ())
    plural = "arguments" if len(unused) > 1 else "argument"
    raise UserError(f"{plural} {names}: not used by --todo train, the default; add {todos}")


def name_as_given(flag: Flag, given: Mapping[str, Any]) -> str:
    """`--name`, or the negative of a switch that was turned off."""
    return words_of(flag, given[flag.dest])[0] if flag.kind is bool else f"--{flag.name}"


def validate_eps(given: Mapping[str, Any]) -> None:
    """Refuse the eps flag of the other --todo, an audit or a study without eps, and an eps that is
    meant in grey values. given: {dest: value}."""
    todo = given.get("todo")
    if todo == "attack" and "eps" in given and "eps_list" not in given:
        value = _format_all(given["eps"])
        raise UserError(f"argument --eps: not used by --todo attack; use --eps-list {value}")
    if todo in ("audit", "study"):
        if "eps_list" in given and "eps" not in given:
            value = _format_all(given["eps_list"][: 1 if todo == "audit" else None])
            raise UserError(f"argument --eps-list: not used by --todo {todo}; use --eps {value}")
        _validate_needs(given, todo)
        if todo == "audit" and len(given["eps"]) > 1:
            raise UserError(
                f"argument --eps: got {len(given['eps'])} values, an audit takes one; start it "
                "once for each"
            )
    norm_of = {"eps_list": "attack_norm", "eps": "attack_norm", "adv_train": "adv_norm"}
    for name, norm in norm_of.items():
        if name in given and given.get(norm) == "inf":
            _validate_inf_eps(BY_DEST[name], BY_DEST[norm], given[name])


def _validate_needs(given: Mapping[str, Any], todo: str) -> None:
    """Refuse an audit or a study that lacks flags, naming all of them."""
    needed = {"models": "--models EP BPTT FFCNN:BP", "seeds": "--seeds 1 2 3"}
    needed = {**(needed if todo == "study" else {}), "eps": "--eps 8/255"}
    missing = [words for dest, words in needed.items() if not given.get(dest)]
    if missing:
        raise UserError(f"--todo {todo} needs {' '.join(missing)}, for example")
    if not any(given["eps"]):
        raise UserError(f"--todo {todo} needs an eps above 0: --eps 8/255, for example")


def _format_all(eps: Iterable[float]) -> str:
    return " ".join(map(format_eps, eps))


def _validate_inf_eps(flag: Flag, norm: Flag, value: Any) -> None:
    """Refuse an eps above 1 in the inf norm: it allows any image."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if max(values, default=0) <= 1:
        return
    meant = [f"{eps:g}/255" if 1 <= eps <= 255 else format_eps(eps) for eps in values]
    advice = f"; did you mean --{flag.name} {' '.join(meant)}?" if max(values) <= 255 else ""
    raise UserError(
        f"argument --{flag.name}: got {_format_all(values)}, expected at most 1 with "
        f"--{norm.name} inf: images are in [0, 1]{advice}"
    )


def validate_run_dir(given: Mapping[str, Any]) -> None:
    """Refuse a --run-dir that cannot be trained in. given: {dest: value}."""
    if not given["run_dir"]:
        raise UserError("argument --run-dir: got '', expected a folder")
    if "load_path" in given:
        raise UserError(
            "argument --run-dir: it resumes the run in its folder; give no --load-path with it"
        )
    if given.get("save") is False:
        raise UserError("argument --run-dir: it saves the run; give no --no-save with it")


def validate_held_out(config: Config, saved: Mapping[str, Any]) -> None:
    """Refuse a training set whose held-out images differ from those of the run. saved: the
    arguments that the run records, {dest: value}."""
    size = config.data.train_size
    if config.data.val_size and size != saved.get("train_size"):
        raise UserError(
            f"argument --train-size: got {size}, this run holds out the last "
            f"{config.data.val_size} of {saved.get('train_size') or 'all'} training images"
        )


# ------------------------------------------------------------------------------------------- notes


def notes(config: Config, given: Mapping[str, Any]) -> Iterator[str]:
    """Notes on flags of `given`, {dest: value}, that have no effect or hardly the intended one."""
    todo = config.session.todo
    model = config.model.kind
    learning = config.learning
    trains = todo == "train"
    for flag in FLAGS:
        if flag.dest not in given:
            continue
        name = name_as_given(flag, given)
        if not flag.affects(todo):
            yield f"{name} has no effect on {todo}"
        elif flag.models and model not in flag.models:
            yield f"{name} has no effect on {model}, only on {listed(flag.models)}"
        elif flag.rules and learning.alg not in flag.rules and trains and given[flag.dest]:
            yield f"{name} has no effect with --alg {learning.alg}"
    if given.get("data_aug") and trains and not TASKS[config.data.task].augments:
        yield (
            f"--data-aug has no effect on {config.data.task}: flips and shifts would change the "
            "classes of its images"
        )
    if not config.session.save and not (trains and config.session.load_path):
        written = {
            "train": ("figures", "tensorboard"),
            "evaluate": ("figures",),
            "gducheck": ("figures",),
        }
        for name in written.get(todo, ()):
            if given.get(name):
                yield f"--{name} has no effect without --save"
    unused_grads = [g for g in given.get("attack_grad", ()) if g in GRADIENTS_OF_STEPS]
    if unused_grads and not config.model.has_dynamics:
        grads = format_value(unused_grads)
        yield f"--attack-grad {grads} has no effect on {model}, which has no time steps"
    grad = {"attack": "attack_grad", "train": "adv_grad"}.get(todo, "")
    saturates = config.model.has_dynamics or config.model.no_norm
    if "smooth" in given.get(grad, ()) and not saturates:
        yield (
            f"--{grad.replace('_', '-')} smooth differs from bptt in its loss alone on {model}: it "
            "replaces the slopes of activations that saturate"
        )
    if given.get("compile") and learning.alg == "BPTT" and trains:
        yield "--compile has no effect on steps that are unrolled for gradients"
    if trains and not config.adversarial.eps:
        for name in ("adv_norm", "adv_iters", "adv_step", "adv_grad"):
            if name in given:
                yield f"--{name.replace('_', '-')} has no effect without --adv-train"
    if given.get("mmt") and trains and config.optimizer.optim != "sgd":
        yield f"--mmt has no effect with --optim {config.optimizer.optim}"
    if "act" in given and model == "FFCNN" and not config.model.no_norm:
        yield "--act has no effect on FFCNN without --no-norm: it has ReLU"
    if "scale" in given and "load_path" in given:
        yield "--scale has no effect on a saved run: it scales initial weights"
    if not config.attack.uses_gradient and todo == "attack":
        for name in ("attack_grad", "attack_step", "attack_start"):
            if name in given:
                yield (
                    f"--{name.replace('_', '-')} has no effect on {config.attack.name}, which uses "
                    "no gradient"
                )
    if "attack_step" in given and _unrolls_attacks(config):
        for steps in config.attack_steps:
            if steps > config.predict_steps:
                yield (
                    f"--attack-step {steps} exceeds the {count(config.predict_steps, 'step')} of a "
                    "prediction: the gradient is of another state"
                )
    if todo == "gducheck" and learning.schedule == "async":
        yield "with --schedule async EP and BPTT agree in their sums over time, not step by step"


def _unrolls_attacks(config: Config) -> bool:
    """Whether gradients of an attack or audit are unrolled through the steps of --attack-step."""
    if not config.model.has_dynamics:
        return False
    if config.session.todo == "audit":
        return True
    unrolled = config.attack.uses_gradient and set(config.attack.grads) != {"ep"}
    return config.session.todo == "attack" and unrolled
