"""Train energy models with Equilibrium Propagation or back-propagation through time, and examine them.

Typical use:
  python main.py --task digits --save                                     train the default MLP on digits that need no download
  python main.py --model CNN --channels 16 32 --loss cel --softmax ...    train a convolutional model on MNIST
  python main.py --todo evaluate --load-path results/EP/mse/2026-01-31/10-11-12_gpu0

With --load-path, every flag that is not given takes its value from the saved run; the architecture always does.
"""
import argparse
import collections
import math
import random
import shlex
import sys

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
        Flag("todo", str, "train", "what to do", ("train", "evaluate", "attack", "gducheck")),
        Flag("load-path", str, None, "a run folder: to go on training it, or to examine it"),
        Flag("save", bool, False, "write a run folder results/ALG/LOSS/date/time (a resumed run always writes to its own)"),
        Flag("device", int, 0, "index of the GPU; -1 is the CPU", low=-1),
        Flag("seed", int, None, "seed of everything random (default: drawn, and written down)", low=0),
    ],
    "data": [
        Flag("task", str, "MNIST", "the data set; digits needs no download", tuple(TASKS)),
        Flag("data-dir", str, "./data", "where the data sets are, or are downloaded to"),
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
        Flag("alg", str, "EP", "Equilibrium Propagation or back-propagation through time", ("EP", "BPTT")),
        Flag("T1", int, 20, "time steps of the free phase", low=1),
        Flag("T2", int, 4, "time steps of a nudged phase; of BPTT", low=1),
        Flag("betas", float, [0.0, 0.01], "nudging of the free and of the nudged phase", many=True),
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
    ],
}

ARCHITECTURE = ("task", "model", "archi", "channels", "kernels", "strides", "paddings", "pools", "fc", "act", "loss", "softmax")
NOT_INHERITED = ("todo", "load_path", "save", "device", "epochs")  # of a saved run


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


def settle(given, flags, saved=None):
    """Every argument's value: as given, else as in the saved run, else the default. Returns a Namespace."""
    args = argparse.Namespace()
    for flag in (flag for group in flags.values() for flag in group):
        name, value = dest(flag), flag.default
        if name in given:
            value = [judge(flag, text) for text in given[name]] if flag.many else judge(flag, given[name])
        if saved and name in saved and name not in NOT_INHERITED and (name not in given or name in ARCHITECTURE):
            value = saved[name]
        setattr(args, name, value)
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
    for name in ("lrs", "wds"):
        if getattr(args, name) is not None and len(getattr(args, name)) != layers:
            raise length_error(name, getattr(args, name), layers, "one per layer")
    if args.alg == "BPTT" and args.T2 > args.T1:
        raise UserError(f"argument --T2: got {args.T2}, BPTT goes back through at most the {args.T1} steps of --T1")
    if len(args.betas) != 2:
        raise length_error("betas", args.betas, 2, "of the free and of the nudged phase")
    if args.alg == "EP" and (args.betas[0] == args.betas[1] or args.thirdphase and args.betas[1] == 0):
        raise UserError(f"argument --betas: got {shown(args.betas)}, EP needs two different values, the second not 0")


def notes(args):
    """Flags that have no effect here, in words."""
    if args.data_aug and not TASKS[args.task].augments:
        yield f"--data-aug has no effect on {args.task}: mirrored or shifted, its images mean something else"
    if args.same_update and not args.model.startswith("VF"):
        yield f"--same-update has no effect on {args.model}, whose weights are tied"
    for name in ("random_sign", "thirdphase", "check_thm"):
        if getattr(args, name) and args.alg != "EP":
            yield f"--{name.replace('_', '-')} has no effect with --alg {args.alg}"
    if args.mmt and args.optim != "sgd":
        yield f"--mmt has no effect with --optim {args.optim}"


# ------------------------------------------------------------------------------------------------------------ what it does


def pick_device(index):
    if index == -1:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("note: there is no CUDA device here, running on the CPU (--device -1 says so without this note)", file=sys.stderr)
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise UserError(f"argument --device: got {index}, expected -1 (the CPU) to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def seed_everything(args):
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(2 ** 31)
    random.seed(args.seed)
    np.random.seed(args.seed % 2 ** 32)
    torch.manual_seed(args.seed)


def batches(args, device, train, generator=None):
    """The mini-batches of one split; with a generator shuffled and, with --data-aug, augmented."""
    task = TASKS[args.task]
    images, labels = data_utils.load_split(args.task, args.data_dir, train, args.train_size if train else args.test_size)
    augment = generator is not None and args.data_aug and task.augments
    return data_utils.Batches(images, labels, args.mbs, task, device, generator, augment)


def train(args, model, device, saved, command_line):
    generator = torch.Generator().manual_seed(args.seed)
    train_batches, test_batches = batches(args, device, True, generator), batches(args, device, False)
    optimizer, scheduler = model_utils.make_optimizer(model, args)
    history = []
    if saved:
        optimizer.load_state_dict(saved["opt"])
        run = data_utils.Run(args.load_path)
    else:
        run = data_utils.Run.create(args.alg, args.loss, device) if args.save else None
    if run:
        print(f"results go to {run.folder}")
        if not saved:
            run.write_hyperparameters(command_line, vars(args), model)
    model_utils.train(model, optimizer, train_batches, test_batches, args, scheduler, run, history)


def evaluate(args, model, device, source):
    criterion = model_utils.make_criterion(args.loss)
    line = f"evaluated {source} with T1 = {args.T1}:"
    for split in ("train", "test"):
        data = batches(args, device, split == "train")
        accuracy = model_utils.evaluate(model, data, args.T1, criterion, f"evaluating, {split}")
        line += f" {split} accuracy {100 * accuracy:.2f} % ({data.samples} images)" + ("," if split == "train" else "")
    print(line)
    data_utils.Run(args.load_path).append_hyperparameters(line)


def run(argv, flags, command_line):
    given = parse(argv, flags)
    saved = None
    todo = given.get("todo", "train")
    if "load_path" in given:
        saved = data_utils.read_checkpoint(f"{given['load_path']}/{'checkpoint.tar' if todo == 'train' else 'model.pt'}")
    elif todo in ("evaluate", "attack"):
        raise UserError(f"--todo {todo} needs a trained model: name its run folder with --load-path")
    args = settle(given, flags, saved and saved.get("config"))
    check(args)
    for note in notes(args):
        print(f"note: {note}", file=sys.stderr)
    device = pick_device(args.device)
    seed_everything(args)
    try:
        model = model_utils.make_model(args)
    except ValueError as e:
        raise UserError(f"the model cannot be built: {e}") from None
    model.to(device)
    if saved:
        model.load_state_dict(saved["model_state_dict"])
    if args.todo == "train":
        train(args, model, device, saved, command_line)
    elif args.todo == "evaluate":
        evaluate(args, model, device, "model.pt")
    else:
        raise UserError(f"--todo {args.todo} is not built yet")


def main(argv=None, flags=FLAGS, name="main.py"):
    """Runs one command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run(argv, flags, shlex.join(["python", name, *argv]))
    except UserError as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
