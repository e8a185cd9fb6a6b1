"""Train energy models with Equilibrium Propagation or back-propagation through time, and examine them.

Typical use:
  python main.py --task digits --save                                     train the default MLP on digits that need no download
  python main.py --model CNN --channels 16 32 --loss cel --softmax ...    train a convolutional model on MNIST
  python main.py --todo evaluate --load-path results/EP/mse/2026-01-31/10-11-12_gpu0

With --load-path, every flag that is not given takes its value from the saved run; the architecture always does.
"""
import signal

if __name__ == "__main__":  # while libraries load there is nothing to save and no one to catch a KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import datetime
import math
import os
import pathlib
import random
import shlex
import sys
import threading
import time

import numpy as np
import torch

import data_utils
import model_utils
from data_utils import TASKS, UserError

# -------------------------------------------------------------------------------------------------------------- the flags
# A flag is defined once, here. Values stay text until all flags are known, and are judged then, so that of a flag given
# twice only the last counts, and a saved run can fill in what was not given. `kind` is float, int, str or bool (a switch);
# `many` makes a list of them; `low` and `high` bound numbers; `choices` bounds words.

Flag = collections.namedtuple("Flag", "name kind default help choices low high many", defaults=(None, None, None, False))

FLAGS = {
    "what to do": [
        Flag("todo", str, "train", "what to do", ("train", "evaluate", "attack", "gducheck", "characteristic", "corruptions")),
        Flag("load-path", str, None, "a run folder: to go on training it, or to examine it"),
        Flag("save", bool, False, "write a run folder results/ALG/LOSS/date/time (a resumed run always writes to its own)"),
        Flag("device", int, 0, "index of the GPU; -1 is the CPU", low=-1),
        Flag("precision", str, "fp32", "of the time steps on a CUDA device; weights, EP's contrast and attack gradients "
             "stay fp32", ("fp32", "tf32", "bf16")),
        Flag("compile", bool, False, "compile the time step with torch.compile (CUDA)"),
        Flag("seed", int, None, "seed of everything random (default: drawn, and written down)", low=0),
    ],
    "data": [
        Flag("task", str, "MNIST", "the data set; digits needs no download", tuple(TASKS)),
        Flag("data-dir", str, "./data", "where the data sets are, or are downloaded to"),
        Flag("corruptions-dir", str, None, "where the corrupted test images are (default: the folder CIFAR-10-C, or CIFAR-100-C, in --data-dir)"),
        Flag("data-aug", bool, False, "random flips and shifts of the CIFAR training images"),
        Flag("train-size", int, None, "use the first N training images", low=1),
        Flag("test-size", int, None, "use the first N test images", low=1),
        Flag("mbs", int, 20, "images in a mini-batch", low=1),
    ],
    "model": [
        Flag("model", str, "MLP", "dense or convolutional, with tied weights or (VF) separate backward weights",
             ("MLP", "VFMLP", "CNN", "VFCNN")),
        Flag("archi", int, [784, 512, 10], "MLP: sizes of all layers, from the input to the classes", low=1, many=True),
        Flag("channels", int, [32, 64], "CNN: feature maps of each convolution", low=1, many=True),
        Flag("kernels", int, [5, 5], "CNN: kernel sizes", low=1, many=True),
        Flag("strides", int, [1, 1], "CNN: strides", low=1, many=True),
        Flag("paddings", int, [0, 0], "CNN: paddings", low=0, many=True),
        Flag("pools", str, "mm", "CNN: a letter per convolution: m max, a average (both 2x2, stride 2), i none"),
        Flag("fc", int, [10], "CNN: sizes of the dense layers, the last one the number of classes", low=1, many=True),
        Flag("act", str, "mysig", "activation of the neurons", tuple(model_utils.ACTIVATIONS)),
        Flag("loss", str, "mse", "what nudges the output: squared error or cross-entropy", ("mse", "cel")),
        Flag("softmax", bool, False, "with cel: the output is a linear read-out of the last hidden layer"),
        Flag("scale", float, None, "factor on the initial weights and biases", low=0),
    ],
    "dynamics and learning rule": [
        Flag("alg", str, "EP", "Equilibrium Propagation, its continual form, or back-propagation through time", ("EP", "CEP", "BPTT")),
        Flag("T1", int, 20, "time steps of the free phase", low=1),
        Flag("T2", int, 4, "time steps of a nudged phase; of BPTT", low=1),
        Flag("betas", float, [0.0, 0.01], "nudging of the free and of the nudged phase", many=True),
        Flag("schedule", str, "sync", "all layers step at once (sync), or odd and even ones in turn (async): half the arithmetic for the same "
             "progress, to a fixed point that can be another", ("sync", "async")),
        Flag("tol", float, 0.0, "free phases and predictions: stop an image once five steps change no layer by more than this share of its norm; "
             "0: always take T1 steps", low=0),
        Flag("random-sign", bool, False, "EP: draw the sign of the second beta anew for each batch"),
        Flag("thirdphase", bool, False, "EP: nudge with beta and -beta (symmetric estimate)"),
        Flag("same-update", bool, False, "VF models: forward and backward weights take the mean of their updates"),
        Flag("check-thm", bool, False, "EP: compare with BPTT ten times an epoch while training"),
    ],
    "optimizer": [
        Flag("optim", str, "sgd", "optimizer", ("sgd", "adam")),
        Flag("lrs", float, None, "learning rate of each layer (default: 0.01 for sgd, 0.0005 for adam)", low=0, many=True),
        Flag("wds", float, None, "weight decay of each layer (default: none)", low=0, many=True),
        Flag("mmt", float, 0.0, "momentum (sgd)", low=0, high=1),
        Flag("lr-decay", bool, False, "cosine annealing of the learning rates to 1e-5 over 100 epochs"),
        Flag("epochs", int, 1, "epochs to train; of a resumed run, the further ones", low=1),
    ],
    "attack": [
        Flag("attack", str, "pgd", "the attack", ("pgd", "fgsm", "apgd-ce", "apgd-dlr", "square", "hopskipjump", "autoattack")),
        Flag("attack-norm", str, "2", "norm that bounds the perturbation", ("2", "inf")),
        Flag("eps-list", float, None, "bounds to attack with, images in [0, 1] (default: a grid for the norm)", low=0, many=True),
        Flag("attack-iters", int, 20, "iterations of the attack", low=1),
        Flag("attack-step", int, 29, "time steps that the attack's gradient goes through", low=1),
        Flag("predict-step", int, None, "time steps of a prediction (default: T1)", low=1),
        Flag("attack-grad", str, ["bptt"], "how gradients are got: through the time steps (bptt), the same with slopes that do not "
             "vanish (smooth), by Equilibrium Propagation (ep); of several, the worst counts", ("bptt", "smooth", "ep"), many=True),
        Flag("attack-start", str, "zero", "where the gradient's time steps begin: at zero neurons, or near the equilibrium",
             ("zero", "equilibrium")),
        Flag("no-clip", bool, False, "let adversarial images leave [0, 1], as the published tables did"),
    ],
}

# A flag of main_dropout.py alone; main.py takes it from a saved run, and so goes on with one.
DROPOUTS = Flag("dropouts", float, None, "probability of keeping a neuron, for each connection on what it sees below (training only)", low=0, high=1,
                many=True)

# Of a saved run, what no flag changes; what none changes when its training goes on; and what is never taken from it.
ARCHITECTURE = ("task", "model", "archi", "channels", "kernels", "strides", "paddings", "pools", "fc", "act", "loss", "softmax", "same_update",
                "schedule")
OPTIMIZER = ("optim", "lrs", "wds", "mmt", "lr_decay", "dropouts", "seed")
NOT_INHERITED = ("todo", "load_path", "save", "device", "epochs", "precision", "compile")


def dest(flag):
    return flag.name.replace("-", "_")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv, flags):
    """The flags that were given, {dest: text, list of texts, or True}."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for title, group in flags.items():
        arguments = parser.add_argument_group(title)
        for flag in group:
            default = "" if flag.default in (None, False) else f" (default: {shown(flag.default)})"
            if flag.kind is bool:
                arguments.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
            else:
                metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else {int: "N", float: "X", str: "TEXT"}[flag.kind]
                arguments.add_argument(f"--{flag.name}", nargs="+" if flag.many else None, metavar=metavar,
                                       help=(flag.help + default).replace("%", "%%"))
    return vars(parser.parse_args(argv))


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def judge(flag, text):
    """The value of one flag; UserError, naming the flag, what was given and what is allowed, if it has none."""
    if flag.kind is bool:
        return True
    allowed = "one of " + ", ".join(flag.choices) if flag.choices else {int: "a whole number", float: "a number", str: "a text"}[flag.kind]
    if flag.low is not None:
        allowed += f" of at least {flag.low}"
    if flag.high is not None:
        allowed += f" and at most {flag.high}"
    try:
        value = flag.kind(text)
    except ValueError:
        value = None
    if (value is None or flag.choices and value not in flag.choices or flag.kind is float and not math.isfinite(value)
            or flag.low is not None and value < flag.low or flag.high is not None and value > flag.high):
        raise UserError(f"argument --{flag.name}: got {text!r}, expected {allowed}")
    return value


def judge_saved(flag, value, path):
    """The value of one flag as a saved run has it, held to the same rules."""
    if value is None or flag.kind is bool and isinstance(value, bool):
        return value
    try:
        if flag.many and isinstance(value, (list, tuple)):
            return [judge(flag, str(v)) for v in value]
        if not flag.many and flag.kind is not bool and isinstance(value, (str, int, float)):
            return judge(flag, str(value))
    except UserError:
        pass
    raise UserError(f"{path} has no sensible --{flag.name}: {value!r}")


def settle(given, flags, saved=None, path=None):
    """Every argument's value: as given, else as in the run saved at `path`, else the default. Returns a Namespace."""
    args, ignored = argparse.Namespace(), []
    fixed = ARCHITECTURE + (OPTIMIZER if given.get("todo", "train") == "train" else ())
    for flag in [*(flag for group in flags.values() for flag in group if flag is not DROPOUTS), DROPOUTS]:
        name, value = dest(flag), flag.default
        if name in given:
            value = [judge(flag, text) for text in given[name]] if flag.many else judge(flag, given[name])
        if saved and name in saved and name not in NOT_INHERITED and (name not in given or name in fixed):
            kept = judge_saved(flag, saved[name], path)
            if name in given and value != kept:
                ignored.append(f"--{flag.name} {shown(kept)} (not {shown(value)})")
            value = kept
        setattr(args, name, value)
    if ignored:
        print(f"note: the saved run decides {', '.join(ignored)}", file=sys.stderr)
    return args


def length_error(name, value, expected, what):
    return UserError(f"argument --{name}: got {len(value)} ({shown(value)}), expected {expected}: {what}")


def check(args):
    """What one argument demands of another. Raises UserError."""
    task, layers = TASKS[args.task], None
    if args.model in ("MLP", "VFMLP"):
        if len(args.archi) < 2 + args.softmax:
            raise length_error("archi", args.archi, f"at least {2 + args.softmax}", "the input, hidden layers and the classes")
        if args.archi[0] != task.inputs:
            raise UserError(f"argument --archi: its first entry is {args.archi[0]}, an image of {args.task} has {task.inputs} values")
        layers, last = len(args.archi) - 1, ("archi", args.archi[-1])
    else:
        for name in ("kernels", "strides", "paddings", "pools"):
            if len(getattr(args, name)) != len(args.channels):
                raise length_error(name, getattr(args, name), len(args.channels), "one per convolution, as many as --channels")
        if set(args.pools) - set(model_utils.POOLS):
            raise UserError(f"argument --pools: got {args.pools!r}, expected the letters m, a and i")
        layers, last = len(args.channels) + len(args.fc), ("fc", args.fc[-1])
    if last[1] != task.classes:
        raise UserError(f"argument --{last[0]}: its last entry is {last[1]}, {args.task} has {task.classes} classes")
    if args.softmax and args.loss != "cel":
        raise UserError(f"argument --softmax: needs --loss cel, got --loss {args.loss}")
    for name in ("lrs", "wds", "dropouts"):
        if getattr(args, name) is not None and len(getattr(args, name)) != layers:
            raise length_error(name, getattr(args, name), layers, "one per layer")
    if args.T2 > args.T1 and (args.alg == "BPTT" or args.check_thm or args.todo == "gducheck"):
        raise UserError(f"argument --T2: got {args.T2}, BPTT goes back through at most the {args.T1} steps of --T1")
    if args.todo == "corruptions" and args.task not in ("CIFAR10", "CIFAR100"):
        raise UserError(f"--todo corruptions: there are corrupted images of CIFAR10 and CIFAR100, this run's task is {args.task}")
    if args.dropouts and 0 in args.dropouts:
        raise UserError(f"argument --dropouts: got {shown(args.dropouts)}, expected numbers above 0 and at most 1")
    if args.alg == "CEP" and args.todo == "train" and (args.optim != "sgd" or args.mmt):
        raise UserError(f"argument --optim: got {args.optim}" + (f" with --mmt {args.mmt:g}" if args.mmt else "")
                        + ", CEP changes weights by plain gradient steps: it needs sgd without momentum")
    if args.alg == "CEP" and args.precision != "fp32" and args.todo == "train":
        raise UserError(f"argument --precision: {args.precision} is not for CEP, whose weights change at every step")
    if len(args.betas) != 2:
        raise length_error("betas", args.betas, 2, "of the free and of the nudged phase")
    if (args.alg != "BPTT" or args.todo == "gducheck") and (args.betas[0] == args.betas[1] or args.thirdphase and args.betas[1] == 0):
        raise UserError(f"argument --betas: got {shown(args.betas)}, EP needs two different values, the second not 0")
    if args.betas[0] and (args.random_sign or args.thirdphase and args.alg == "CEP") and args.alg != "BPTT":
        raise UserError(f"argument --betas: got {shown(args.betas)}, a second one of either sign is to be held against a first of 0")


def notes(args):
    """Flags that have no effect here, in words."""
    if args.data_aug and not TASKS[args.task].augments:
        yield f"--data-aug has no effect on {args.task}: mirrored or shifted, its images mean something else"
    if args.same_update and not args.model.startswith("VF"):
        yield f"--same-update has no effect on {args.model}, whose weights are tied"
    for name in ("random_sign", "thirdphase", "check_thm"):
        if getattr(args, name) and args.alg != "EP" and (args.alg != "CEP" or name == "check_thm"):
            yield f"--{name.replace('_', '-')} has no effect with --alg {args.alg}"
    if args.todo == "gducheck":
        for name in ("tol", "precision"):
            if getattr(args, name) not in (0, "fp32"):
                yield f"--{name} has no effect on gducheck, which takes every step in fp32"
        if args.schedule == "async":
            yield "on the asynchronous schedule EP and BPTT agree in their sums over time, not step by step"
    if args.dropouts and args.todo != "train":
        yield f"--dropouts has no effect on {args.todo}: masks are drawn in training only"
    if args.compile and (args.alg == "BPTT" and args.todo == "train" or args.todo == "gducheck"):
        yield "--compile has no effect on steps that gradients go through"
    if args.mmt and args.optim != "sgd":
        yield f"--mmt has no effect with --optim {args.optim}"


# ------------------------------------------------------------------------------------------------------------ what it does


def pick_device(index, workers):
    if index == -1:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("note: there is no CUDA device here, running on the CPU (--device -1 says so without this note)", file=sys.stderr)
        return torch.device("cpu")
    if workers.size > 1:
        index = workers.local_rank
        if index >= torch.cuda.device_count():
            raise UserError(f"torchrun --nproc_per_node: each process needs a GPU, this machine has {torch.cuda.device_count()} (--device -1: the CPU)")
    if index >= torch.cuda.device_count():
        raise UserError(f"argument --device: got {index}, expected -1 (the CPU) to {torch.cuda.device_count() - 1}")
    torch.cuda.set_device(index)  # events and streams are the current device's
    return torch.device("cuda", index)


def check_device(args, device):
    """What the arguments demand of the device. Raises UserError."""
    if args.compile and device.type != "cuda":
        raise UserError("argument --compile: needs a CUDA device; on a CPU compiled steps are no faster")
    if args.precision != "fp32":
        if device.type != "cuda":
            raise UserError(f"argument --precision: {args.precision} needs a CUDA device, this one computes in fp32")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"argument --precision: {args.precision} needs a GPU of compute capability 8.0, {torch.cuda.get_device_name(device)} "
                            f"has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}")


def seed_everything(args, workers):
    if args.seed is None:
        args.seed = workers.agree(random.SystemRandom().randrange(2 ** 31))
    random.seed(args.seed)
    np.random.seed(args.seed % 2 ** 32)
    torch.manual_seed(args.seed)


def batches(args, device, workers, train, generator=None):
    """The mini-batches of one split; with a generator shuffled and, with --data-aug, augmented."""
    task = TASKS[args.task]
    with workers.ahead():  # as it may have to download them
        images, labels = data_utils.load_split(args.task, args.data_dir, train, args.train_size if train else args.test_size)
    augment = generator is not None and args.data_aug and task.augments
    return data_utils.Batches(images, labels, args.mbs, task, device, generator, augment)


def train(args, model, device, saved, argv, name, interruption, workers):
    command = [*workers.launcher, name, *argv]
    generator = torch.Generator().manual_seed(args.seed)
    train_batches, test_batches = batches(args, device, workers, True, generator), batches(args, device, workers, False)
    optimizer, scheduler = model_utils.make_optimizer(model, args)
    history = restore(saved, optimizer, scheduler, generator, args) if saved else []
    first, run = len(history), None
    if workers.rank > 0:
        pass  # worker 0 writes
    elif saved:
        run = data_utils.Run(args.load_path)
        run.forget_after(first)
    elif args.save:
        run = data_utils.Run.create(args, device, shlex.join(command), model,
                                    model_utils.snapshot(model, args, history, optimizer, scheduler, generator))
    if run:
        print(f"results go to {run.folder}" + (f", from epoch {first + 1} on" if saved else ""), flush=True)
    folder = workers.agree(run and str(run.folder))
    def advice():
        if not folder:
            return "nothing was saved, for want of --save"
        remaining = args.epochs - (len(history) - first)
        again = shlex.join([*command, "--load-path", folder, "--epochs", str(remaining)])
        return f"{len(history)} epochs are saved in {folder}, resume with\n  {again}"

    interruption.advice = advice
    model_utils.train(model, optimizer, train_batches, test_batches, args, scheduler, run, history, workers)


def restore(saved, optimizer, scheduler, generator, args):
    """Puts the rest of a checkpoint back and returns the history. A checkpoint of the original code has no random states, and
    lists of accuracies for a history."""
    try:
        if "opt" in saved:
            optimizer.load_state_dict(saved["opt"])
        if scheduler and saved.get("scheduler"):
            scheduler.load_state_dict(saved["scheduler"])
        if "random_states" in saved:
            data_utils.restore_random_states(saved["random_states"], generator)
        if "history" in saved:
            return [{"epoch": row["epoch"], "train_acc": row["train_acc"], "test_acc": row["test_acc"], **row} for row in saved["history"]]
        accuracies = zip(saved.get("train_acc", []), saved.get("test_acc", []))
        return [{"epoch": epoch, "train_acc": float(a), "test_acc": float(b), "seconds": ""} for epoch, (a, b) in enumerate(accuracies, 1)]
    except Exception as e:  # whatever else such a file may hold
        raise UserError(f"{args.load_path}/checkpoint.tar does not fit this run: {data_utils.one_line(e)}") from None


def evaluate(args, model, device, source, workers):
    criterion = model_utils.make_criterion(args.loss)
    line = f"evaluated {source} with T1 = {args.T1}:"
    for split in ("train", "test"):
        data = batches(args, device, workers, split == "train")
        account = data_utils.Account()
        accuracy = model_utils.evaluate(model, data, args.T1, criterion, f"evaluating, {split}", args.tol, account, workers)
        account.pool(workers)
        line += f" {split} accuracy {100 * accuracy:.2f} % ({data.samples} images{', ' + account.settled() if args.tol else ''})"
        line += "," if split == "train" else ""
    print(line)
    if workers.rank == 0:
        data_utils.Run(args.load_path).append_hyperparameters(line)


def characteristic(args, model, device, source):
    data, eps = batches(args, device, data_utils.Workers(), False), args.tol or model_utils.SETTLED
    accuracy, settled = model_utils.characteristic(model, data, args.T1, model_utils.make_criterion(args.loss), eps)
    reached = next(t for t, share in enumerate(accuracy, 1) if share > accuracy[-1] - 0.001 - 1e-9)  # against rounding
    run = data_utils.Run(args.load_path)
    run.write_lines("Characteristic_Time.txt", [
        f"# {source}, T1 = {args.T1}, {data.samples} test images, {datetime.datetime.now():%Y-%m-%d %H:%M:%S}, "
        f"settled: no layer moved by {eps:g} of its norm in a step",
        "# t accuracy settled", *(f"{t} {share:.6f} {still:.6f}" for t, (share, still) in enumerate(zip(accuracy, settled), 1))])
    run.plot_characteristic(accuracy, settled, eps)
    print(f"{source} after T1 = {args.T1} steps: test accuracy {100 * accuracy[-1]:.2f} % ({data.samples} images), "
          f"first within 0.1 points of it at step {reached}; {100 * settled[-1]:.2f} % settled\n"
          f"results are in {run.folder / 'Characteristic_Time.txt'}")


def corruptions(args, model, device, saved, interruption):
    task, criterion = TASKS[args.task], model_utils.make_criterion(args.loss)
    folder = pathlib.Path(args.corruptions_dir or pathlib.Path(args.data_dir, args.task.replace("CIFAR", "CIFAR-") + "-C"))
    images, labels = data_utils.open_corruptions(folder, task, args.test_size)
    table = data_utils.CorruptionTable(data_utils.Run(args.load_path), {
        "folder": str(folder.resolve()), "images": labels.size(1), "T1": args.T1, "tol": args.tol, "precision": args.precision,
        "weights": data_utils.fingerprint(saved["model_state_dict"])})
    interruption.advice = lambda: f"{len(table.rows)} corruptions are in {table.text}, the same command goes on behind them"
    print(f"{labels.size(1)} images of each severity, T1 = {args.T1}; results go to {table.text}", flush=True)
    for name in data_utils.CORRUPTIONS:
        severities, accuracies = images.pop(name), []  # popped: what was read of a mapped file leaves the memory with it
        if name in table.rows:
            continue
        for severity, (x, y) in enumerate(zip(severities, labels), 1):
            x = torch.from_numpy(x.copy()).permute(0, 3, 1, 2).contiguous()
            data = data_utils.Batches(x, y, args.mbs, task, device)
            accuracies.append(model_utils.evaluate(model, data, args.T1, criterion, f"{name}, severity {severity}", args.tol))
        table.add(name, accuracies)
        print(f"{name}: " + ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies) + " %", flush=True)
    table.plot()
    print(f"mean accuracy {100 * table.mean():.2f} %, over the first 15 corruptions {100 * table.mean(data_utils.CORRUPTIONS[:15]):.2f} %")


EPS = {"2": [*(round(float(e), 4) for e in np.geomspace(0.05, 3, 10)), 1.0],
       "inf": [*(float(f"{e:.4g}") for e in np.geomspace(1e-4, 0.1, 10)), round(8 / 255, 6)]}


def attack(args, model, device, saved, workers):
    task, criterion = TASKS[args.task], model_utils.make_criterion(args.loss)
    data, steps = batches(args, device, workers, False), args.predict_step or args.T1
    images, labels = data.images.cpu(), data.labels.cpu()
    clean = model_utils.predictions(model, data, steps, criterion, args.tol, workers) == labels
    settings = {name: getattr(args, name) for name in ("task", "attack", "attack_norm", "attack_iters", "attack_step", "attack_grad", "attack_start",
                                                       "no_clip", "seed", "mbs")}
    settings.update({"tol": args.tol} if args.tol else {})
    lower = args.precision != "fp32"
    settings.update({"precision": args.precision, "gradient_precision": "fp32"} if lower else {})
    settings.update(predict_step=steps, images=len(labels), eps_list=sorted(args.eps_list or EPS[args.attack_norm]),
                    weights=data_utils.fingerprint(saved["model_state_dict"]))
    sweep = results = None
    if workers.rank == 0:  # which alone reads and writes the run folder
        sweep = data_utils.Sweep(data_utils.Run(args.load_path), args.attack, args.attack_norm, settings, clean.double().mean().item())
        precisions = (f" in {args.precision}", " in fp32") if lower else ("", "")
        print(f"{args.attack}, {args.attack_norm}-norm, {len(labels)} images, predictions after {steps} steps"
              f"{precisions[0]}, gradients through {args.attack_step}{precisions[1]}; "
              f"clean accuracy {100 * sweep.clean:.2f} %\nresults go to {sweep.text}", flush=True)
    for eps in workers.agree(sweep and [eps for eps in settings["eps_list"] if not sweep.has(eps)]):
        results = model_utils.attack(model, images, labels, args, eps, task, f"eps {eps:g}", workers)
        if not sweep:
            continue
        sweep.add(eps, results)
        for grad, result in results.items():
            warning = ""
            if result["masked"] > 0.01 and args.attack not in ("square", "hopskipjump"):
                warning = (f"\n  warning: the gradient of {100 * result['masked']:.1f} % of the images was exactly zero or not finite: this number is only "
                           "an upper bound of the robust accuracy; try --attack-grad smooth ep, --attack-start equilibrium, --attack square")
            data_utils.progress.write(f"eps {eps:g}, {grad}: adversarial accuracy {100 * result['correct'].mean():.2f} %, mean norm {result['mean_norm']:.3g}"
                                      + warning)
    if sweep:
        sweep.plot()
    if sweep and args.save and results:
        sweep.save_images(images, labels, clean, eps, list(results.values())[-1])


def gducheck(args, model, device, saved, argv, name):
    images, labels = data_utils.load_split(args.task, args.data_dir, True, args.train_size)
    x, y = next(iter(data_utils.Batches(images, labels, min(20, len(labels)), TASKS[args.task], device)))
    rows, BPTT, runs = model_utils.gdu_report(model, x, y, args, model_utils.make_criterion(args.loss))
    width = max(len(row["name"]) for row in rows)
    print(f"EP against BPTT on {len(y)} images, T1 = {args.T1}, T2 = {args.T2}, beta = {shown(args.betas)}")
    print(f"{'':{width}}  estimate      RMSE  sign errors   cosine  distance")
    for row in rows:
        print(f"{row['name']:{width}}  {row['estimate']:10} {row['rmse']:7.4f}  {100 * row['sign_error']:9.2f} %  {row['cosine']:7.4f}  {row['distance']:8.2e}")
    if args.save:
        if saved:
            run = data_utils.Run(args.load_path)
        else:
            run = data_utils.Run.create(args, device, shlex.join(["python", name, *argv]), model, model_utils.snapshot(model, args, []))
        for file, value in zip(("BPTT.tar", "EP.tar", "EP_minus.tar"), (BPTT, *runs)):
            run.save(file, {name: tensor.cpu() for name, tensor in value.items()})
        run.append_csv("gducheck.csv", [{"epoch": "", "batch": "", **row} for row in rows])
        EP = runs[0] if len(runs) == 1 else {name: (runs[0][name] + runs[1][name]) / 2 for name in BPTT}
        run.plot_gdu(BPTT, EP, rows)
        print(f"plots and data are in {run.folder}")


def find_saved(path, todo):
    """The checkpoint file that --load-path names: the latest epoch to go on with training, the best model to examine."""
    path = pathlib.Path(path)
    names = ["checkpoint.tar"] if todo == "train" else ["model.pt", "checkpoint.tar"]
    found = next((path / name for name in names if (path / name).exists()), None)
    if found is None:
        where = f"has no {' or '.join(names)}" if path.is_dir() else "is no folder"
        raise UserError(f"argument --load-path: {path} {where}")
    return found


def open_saved(path, todo):
    """(checkpoint file, what it holds, the arguments of its run) of the run folder that --load-path names."""
    path = find_saved(path, todo)
    saved = data_utils.read_checkpoint(path)
    return path, saved, {**data_utils.read_arguments(path.parent), **saved.get("config", {})}


def load_weights(model, saved, path):
    try:
        model.load_state_dict(saved["model_state_dict"])
    except RuntimeError as e:
        raise UserError(f"the weights in {path} do not fit the model: {data_utils.one_line(e).partition(': ')[2]}") from None


PARALLEL = ("train", "evaluate", "attack")  # of --todo, what several workers can share


def run(argv, flags, name, interruption, workers):
    given = parse(argv, flags)
    todo, saved, path, config = given.get("todo", "train"), None, None, None
    if "load_path" in given:
        path, saved, config = open_saved(given["load_path"], todo)
    elif todo in ("evaluate", "attack", "characteristic", "corruptions"):
        raise UserError(f"--todo {todo} needs a trained model: name its run folder with --load-path")
    args = settle(given, flags, config, path)
    if workers.size > 1 and args.todo not in PARALLEL:
        raise UserError(f"--todo {args.todo} is the work of one process: start it with python instead of torchrun")
    check(args)
    for note in notes(args):
        print(f"note: {note}", file=sys.stderr)
    device = pick_device(args.device, workers)
    check_device(args, device)
    workers.meet(device)
    model_utils.set_precision("fp32" if args.todo == "gducheck" else args.precision)
    seed_everything(args, workers)
    try:
        model = model_utils.make_model(args)
    except ValueError as e:
        raise UserError(f"the model cannot be built: {e}") from None
    if saved:
        load_weights(model, saved, path)
    model.to(device)
    model.compiled = args.compile
    if args.precision == "bf16" and args.todo not in ("train", "gducheck"):
        model.to(torch.bfloat16)
    if args.todo == "train":
        train(args, model, device, saved, argv, name, interruption, workers)
    elif args.todo == "evaluate":
        evaluate(args, model, device, path.name, workers)
    elif args.todo == "gducheck":
        gducheck(args, model, device, saved, argv, name)
    elif args.todo == "characteristic":
        characteristic(args, model, device, path.name)
    elif args.todo == "corruptions":
        corruptions(args, model, device, saved, interruption)
    else:
        attack(args, model, device, saved, workers)


class Interruption:
    """SIGINT (Ctrl-C) and SIGTERM (as batch systems send it) raise KeyboardInterrupt within the block. `number`: the signal that
    came, or None; `advice`: a function that says what is saved and how to go on."""

    def __init__(self, workers):
        self.number, self.advice, self.before, self.workers = None, lambda: "nothing was changed", {}, workers

    def _handle(self, number, frame):
        self.number = number
        raise KeyboardInterrupt

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
            if self.workers.size > 1:
                arrivals, wakeup = os.pipe()
                os.set_blocking(wakeup, False)
                signal.set_wakeup_fd(wakeup)
                threading.Thread(target=self._insist, args=(arrivals,), daemon=True).start()
        return self

    def _insist(self, arrivals):
        """For a worker that waits for a lost one inside a library, where no exception reaches it."""
        self.number = os.read(arrivals, 1)[0]
        time.sleep(3)
        self.end()

    def end(self):
        """Says what was interrupted, and returns the exit code. torchrun sends SIGTERM to those that are left when it has lost a worker."""
        lost = " or lost a worker" if self.number == signal.SIGTERM and self.workers.size > 1 else ""
        return self.workers.end(f"\ninterrupted{lost}; {self.advice()}", 128 + self.number)

    def ignore(self):
        for number in self.before:
            signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            signal.set_wakeup_fd(-1)


def main(argv=None, flags=FLAGS, name="main.py"):
    """Runs one command line and returns its exit code: 0, 2 for what the user can put right, 1 for a run that cannot go on,
    130 or 143 when interrupted. Started by torchrun, it is one of several workers."""
    argv = sys.argv[1:] if argv is None else argv
    workers = data_utils.Workers.launched()
    with Interruption(workers) as interruption:
        try:
            with workers.one_voice():
                run(argv, flags, name, interruption, workers)
            workers.part()
        except BaseException as e:
            interruption.ignore()  # torchrun interrupts all others as soon as one has ended
            if interruption.number is not None:  # whatever a library made of the KeyboardInterrupt
                return interruption.end()
            if not isinstance(e, UserError):
                raise
            advice = f"; {interruption.advice()}" if isinstance(e, data_utils.LostWorker) else ""
            return workers.end(f"{name}: error: {e}{advice}", e.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
