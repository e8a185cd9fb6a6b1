"""What one argument demands of another, and which flags have no effect."""

import importlib.util

from data_utils import TASKS, UserError
from energy.names import POOLINGS
from experiment.arguments import shown
from experiment.flags import (
    ALL,
    DENSE,
    ENERGY,
    FEED_FORWARD,
    OF_STEPS,
    TRANSFORMER,
    WITHOUT_GRADIENT,
    typed,
)


def _length_error(name, value, expected, what):
    return UserError(
        f"argument --{name}: got {len(value)} ({shown(value)}), expected {expected}: {what}"
    )


def check(args):
    """What one argument demands of another. Raises UserError."""
    layers = _check_model(args)
    for name in ("lrs", "wds", "dropouts"):
        if getattr(args, name) is not None and len(getattr(args, name)) != layers:
            raise _length_error(name, getattr(args, name), layers, "one per layer")
    if args.dropouts and 0 in args.dropouts:
        raise UserError(
            f"argument --dropouts: got {shown(args.dropouts)}, expected numbers above 0 and at most 1"
        )
    if args.adv_train is not None and not args.adv_train:
        raise UserError(
            "argument --adv-train: got 0, expected a bound above 0; without the flag images stay as they "
            "are"
        )
    if args.lr_step and args.todo == "train":
        _check_lr_step(args)
    if args.todo == "corruptions" and args.task not in ("CIFAR10", "CIFAR100"):
        raise UserError(
            "--todo corruptions: there are corrupted images of CIFAR10 and CIFAR100, this run's task is "
            f"{args.task}"
        )
    if (
        args.tensorboard
        and args.todo == "train"
        and (args.save or args.load_path)
        and not importlib.util.find_spec("tensorboard")
    ):
        raise UserError(
            "argument --tensorboard: the package tensorboard is not installed; pip install tensorboard"
        )
    _check_rule(args)


def check_todo(given):
    """Raises UserError where flags that training does not use are given without --todo: the command
    would train instead of what they are for. given: the flags, judged."""
    if "todo" in given:
        return
    foreign = [
        flag for flag in ALL if flag.dest in given and flag.todos and "train" not in flag.todos
    ]
    if foreign:
        shared = [todo for todo in foreign[0].todos if all(todo in flag.todos for flag in foreign)]
        names = ", ".join(_name_as_given(flag, given) for flag in foreign)
        todos = " or ".join(f"--todo {todo}" for todo in shared or foreign[0].todos)
        raise UserError(
            f"{'arguments' if len(foreign) > 1 else 'argument'} {names}: not used by --todo train, the "
            f"default; add {todos}"
        )


def _name_as_given(flag, given):
    """`--name`, for a switch that was turned off its negative."""
    return typed(flag, given[flag.dest])[0] if flag.kind is bool else f"--{flag.name}"


def check_bounds(given):
    """Raises UserError where a bound of attacks is given by the flag of another --todo, or an audit
    has none. given: the flags, judged."""
    todo, takes = given.get("todo"), {"attack": ("eps", "eps_list"), "audit": ("eps_list", "eps")}
    if todo in takes and takes[todo][0] in given and takes[todo][1] not in given:
        wrong, right = (name.replace("_", "-") for name in takes[todo])
        raise UserError(
            f"argument --{wrong}: is not of --todo {todo}, which takes --{right} "
            f"{shown(given[takes[todo][0]])}"
        )
    if todo == "audit" and not given.get("eps"):
        raise UserError("--todo audit needs a bound above 0: --eps 8/255, for example")


def check_run_dir(given):
    """Raises UserError where --run-dir is no folder to train in. given: the flags, judged."""
    if not given["run_dir"]:
        raise UserError("argument --run-dir: got '', expected a folder")
    if "load_path" in given:
        raise UserError(
            "argument --run-dir: it resumes the run in its folder; give no --load-path with it"
        )
    if given.get("save") is False:
        raise UserError("argument --run-dir: it saves the run; give no --no-save with it")


def check_held_out(args, saved):
    """Raises UserError where images that a run held out would not be those that it did. saved: its
    arguments."""
    if args.val_size and args.train_size != saved.get("train_size"):
        raise UserError(
            f"argument --train-size: got {args.train_size}, this run holds out the last {args.val_size} of "
            f"{saved.get('train_size') or 'all'} training images"
        )


def _check_lr_step(args):
    if (
        len(args.lr_step) != 2
        or args.lr_step[0] < 1
        or args.lr_step[0] % 1
        or not 0 < args.lr_step[1] <= 1
    ):
        raise UserError(
            f"argument --lr-step: got {shown(args.lr_step)}, expected a whole number of epochs of at least "
            "1 and a factor above 0 and at most 1"
        )
    if args.lr_decay:
        raise UserError("argument --lr-step: it and --lr-decay are two schedules, give one of them")


def _check_model(args):
    """Checks what describes the model and returns the number of its layers."""
    task = TASKS[args.task]
    if args.softmax and args.loss != "cel":
        raise UserError(f"argument --softmax: needs --loss cel, got --loss {args.loss}")
    if args.model in TRANSFORMER:
        return _check_transformer(args, task)
    if args.model in DENSE:
        if len(args.archi) < 2 + args.softmax:
            raise _length_error(
                "archi",
                args.archi,
                f"at least {2 + args.softmax}",
                "the input, hidden layers and the classes",
            )
        if args.archi[0] != task.inputs:
            raise UserError(
                f"argument --archi: its first entry is {args.archi[0]}, an image of {args.task} has "
                f"{task.inputs} values"
            )
        layers, last = len(args.archi) - 1, "archi"
    else:
        for name in ("kernels", "strides", "paddings", "pools"):
            if len(getattr(args, name)) != len(args.channels):
                raise _length_error(
                    name,
                    getattr(args, name),
                    len(args.channels),
                    "one per convolution, as many as --channels",
                )
        if set(args.pools) - set(POOLINGS):
            raise UserError(
                f"argument --pools: got {args.pools!r}, expected the letters m, a and i"
            )
        layers, last = len(args.channels) + len(args.fc), "fc"
    if getattr(args, last)[-1] != task.classes:
        raise UserError(
            f"argument --{last}: its last entry is {getattr(args, last)[-1]}, {args.task} has "
            f"{task.classes} classes"
        )
    return layers


def _check_transformer(args, task):
    if task.size % args.patch:
        raise UserError(
            f"argument --patch: got {args.patch}, images of {args.task} are {task.size} x {task.size}, "
            "which is no multiple of it"
        )
    if args.width % args.heads:
        raise UserError(
            f"argument --width: got {args.width}, expected a multiple of --heads {args.heads}"
        )
    return 1


def _check_network(args):
    """What makes no sense of a model without time steps."""
    if args.alg != "BP":
        raise UserError(
            f"argument --alg: got {args.alg}, {args.model} is trained by BP; {args.alg} is for "
            + ", ".join(ENERGY)
        )
    if args.adv_train and args.adv_grad in OF_STEPS:
        raise UserError(
            f"argument --adv-grad: {args.adv_grad} is for {', '.join(ENERGY)}; {args.model} has bptt and "
            "smooth"
        )
    if args.todo in ("gducheck", "characteristic"):
        raise UserError(
            f"--todo {args.todo}: {args.model} has no time steps, of which that would say something"
        )
    if args.dropouts:
        raise UserError(
            f"argument --dropouts: it is for {', '.join(ENERGY)}, got --model {args.model}"
        )
    if args.precision == "bf16":
        raise UserError(
            f"argument --precision: bf16 is of time steps, {args.model} has none; tf32 and fp32 are left"
        )


def _check_rule(args):
    if args.model in FEED_FORWARD:
        return _check_network(args)
    if args.alg == "BP":
        raise UserError(
            f"argument --alg: BP trains {', '.join(FEED_FORWARD)}, {args.model} learns by EP, CEP or BPTT"
        )
    if args.T2 > args.T1 and (args.alg == "BPTT" or args.check_thm or args.todo == "gducheck"):
        raise UserError(
            f"argument --T2: got {args.T2}, BPTT goes back through at most the {args.T1} steps of --T1"
        )
    if args.alg == "CEP" and args.todo == "train" and (args.optim != "sgd" or args.mmt):
        raise UserError(
            f"argument --optim: got {args.optim}"
            + (f" with --mmt {args.mmt:g}" if args.mmt else "")
            + ", CEP changes weights by plain gradient steps: it needs sgd without momentum"
        )
    if args.alg == "CEP" and args.precision != "fp32" and args.todo == "train":
        raise UserError(
            f"argument --precision: {args.precision} is not for CEP, whose weights change at every step"
        )
    if len(args.betas) != 2:
        raise _length_error("betas", args.betas, 2, "of the free and of the nudged phase")
    if (args.alg != "BPTT" or args.todo == "gducheck") and (
        args.betas[0] == args.betas[1] or args.thirdphase and args.betas[1] == 0
    ):
        raise UserError(
            f"argument --betas: got {shown(args.betas)}, EP needs two different values, the second not 0"
        )
    if (
        args.betas[0]
        and (args.random_sign or args.thirdphase and args.alg == "CEP")
        and args.alg != "BPTT"
    ):
        raise UserError(
            f"argument --betas: got {shown(args.betas)}, a second one of either sign is to be held "
            "against a first of 0"
        )


def notes(args, given):
    """Flags of `given` that have no effect here, in words."""
    for flag in ALL:
        if flag.dest in given and flag.todos and args.todo not in flag.todos:
            yield f"{_name_as_given(flag, given)} has no effect on {args.todo}"
        elif flag.dest in given and flag.models and args.model not in flag.models:
            yield (
                f"{_name_as_given(flag, given)} has no effect on {args.model}, only on "
                f"{' and '.join(flag.models)}"
            )
    if given.get("data_aug") and args.todo == "train" and not TASKS[args.task].augments:
        yield f"--data-aug has no effect on {args.task}: mirrored or shifted, its images mean something else"
    if not (args.save or args.todo == "train" and args.load_path):
        written = {
            "train": ("figures", "tensorboard"),
            "evaluate": ("figures",),
            "gducheck": ("figures",),
        }
        for name in written.get(args.todo, ()):
            if given.get(name):
                yield f"--{name} has no effect without --save"
    lost = [grad for grad in given.get("attack_grad", ()) if grad in OF_STEPS]
    if lost and args.model in FEED_FORWARD:
        yield f"--attack-grad {shown(lost)} has no effect on {args.model}, which has no time steps"
    for name in ("random_sign", "thirdphase", "check_thm"):
        if (
            given.get(name)
            and args.model in ENERGY
            and args.todo == "train"
            and args.alg != "EP"
            and (args.alg != "CEP" or name == "check_thm")
        ):
            yield f"--{name.replace('_', '-')} has no effect with --alg {args.alg}"
    if given.get("compile") and args.alg == "BPTT" and args.todo == "train":
        yield "--compile has no effect on steps that gradients go through"
    if args.todo == "train" and not args.adv_train:
        for name in ("adv_norm", "adv_iters", "adv_step", "adv_grad"):
            if name in given:
                yield f"--{name.replace('_', '-')} has no effect without --adv-train"
    if given.get("mmt") and args.todo == "train" and args.optim != "sgd":
        yield f"--mmt has no effect with --optim {args.optim}"
    if "scale" in given and "load_path" in given:
        yield "--scale has no effect on a saved run, whose weights are what they are"
    if args.attack in WITHOUT_GRADIENT and args.todo == "attack":
        for name in ("attack_grad", "attack_step", "attack_start"):
            if name in given:
                yield f"--{name.replace('_', '-')} has no effect on {args.attack}, which asks for no gradient"
    if args.todo == "gducheck" and args.schedule == "async":
        yield "on the asynchronous schedule EP and BPTT agree in their sums over time, not step by step"
