"""From the words of a command line to checked arguments. Words stay text until all are known, and are judged then, so
that of a flag given twice only the last counts, and a saved run can fill in what was not given."""
import argparse
import math
import reprlib
import sys
import unicodedata

from data_utils import TASKS, UserError
from experiment.flags import ALL, LARGEST


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(" ".join(message.split()))


def parse(argv, flags, description=None):
    """The flags that were given, judged: {dest: value}. Raises UserError; SystemExit(0) after --help.

    argv: the words; flags: {title of a group: list of Flag}."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS)
    known = {}
    for title, group in flags.items():
        arguments = parser.add_argument_group(title)
        for flag in group:
            known[flag.dest] = flag
            default = "" if flag.default in (None, False) else f" (default: {shown(flag.default)})"
            if flag.kind is bool:
                arguments.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
            else:
                metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else {int: "N", float: "X",
                        str: "TEXT"}[flag.kind]
                arguments.add_argument(f"--{flag.name}", nargs="+" if flag.many else None, metavar=metavar,
                                       help=(flag.help + default).replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    return {dest: _judge_given(known[dest], value) for dest, value in given.items()}


def _judge_given(flag, value):
    if flag.kind is bool:
        return True
    return [judge(flag, text) for text in value] if flag.many else judge(flag, value)


def shown(value):
    """A value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def judge(flag, text):
    """The value of one word for `flag`; UserError, naming the flag, what was given and what is allowed, if it has
    none."""
    low, high = flag.low, flag.high
    if flag.kind is int and high is None:
        high = LARGEST
    allowed = "one of " + ", ".join(flag.choices) if flag.choices else {
        int: "a whole number", float: "a number", str: "a text without control characters"}[flag.kind]
    if low is not None:
        allowed += f" of at least {low}"
    if high is not None and (flag.high is not None or _beyond(text, high)):
        allowed += f"{' and' if low is not None else ' of'} at most {high}"
    try:
        value = flag.kind(text)
    except ValueError:
        value = None
    if (value is None or flag.choices and value not in flag.choices or flag.kind is str
        and _has_control_characters(value)
            or flag.kind is float and not math.isfinite(value)
            or low is not None and value < low or high is not None and value > high):
        given = repr(text) if len(text) <= 200 else f"{text[:40]!r}..., {len(text)} characters"
        raise UserError(f"argument --{flag.name}: got {given}, expected {allowed}")
    return value


def _has_control_characters(text):
    """No path can have a NUL, and an error that names a text has one line."""
    return any(unicodedata.category(character) == "Cc" for character in text)


def _beyond(text, high):
    """Whether a word is a number, and too large a one."""
    digits = text.strip().lstrip("+")
    return digits.isdecimal() and (len(digits) > 4000 or int(digits) > high)  # int() takes no longer ones


def described(value):
    """Any value in a few words, on one line: what a file holds may be large, nested deeply, or impossible to print."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, 60, 60, 60
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # a number of more digits than Python writes
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def judge_saved(flag, value, path):
    """The value of one flag as a saved run has it, held to the same rules; None where the flag may be unset. Raises
    UserError."""
    if flag.kind is bool:
        if isinstance(value, bool):
            return value
    elif value is None:
        if flag.default is None:
            return value
    else:
        kinds = {int: (int,), float: (int, float), str: (str,)}[flag.kind]
        # one, too, of what may be several by now
        values = value if flag.many and isinstance(value, (list, tuple)) else [value]
        if values and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values):
            try:
                values = [judge(flag, str(v)) for v in values]
                return values if flag.many else values[0]
            except (UserError, ValueError):  # ValueError: a number of more digits than Python writes
                pass
    raise UserError(f"{path} has no sensible --{flag.name}: {described(value)}")


def resolve(given, saved=None):
    """Every argument's value: as given, else as in the saved run, else the default. Returns a Namespace.

    given: of `parse`; saved: the arguments of the run that it knows, judged; None where there is no run. Says on
    standard error which given ones the run overrules, and what neither says of the model."""
    args, overruled, known = argparse.Namespace(), [], saved or {}
    fixed = {"architecture", "training"} if given.get("todo", "train") == "train" else {"architecture"}
    for flag in ALL:
        value = given.get(flag.dest, flag.default)
        if flag.dest in known and flag.scope != "session" and (flag.dest not in given or flag.scope in fixed):
            kept = known[flag.dest]
            if flag.dest in given and value != kept:
                overruled.append(f"--{flag.name} {shown(kept)} (not {shown(value)})")
            value = kept
        setattr(args, flag.dest, value)
    if overruled:
        print(f"note: the saved run decides {', '.join(overruled)}", file=sys.stderr)
    guessed = [flag for flag in ALL if flag.dest not in {**known, **given} and _describes_model(flag, args)]
    if saved is not None and guessed:
        print("note: the saved run does not say " + ", ".join(f"--{flag.name}" for flag in guessed) + "; taken: "
              + ", ".join(f"{flag.name} {shown(getattr(args, flag.dest))}" for flag in guessed), file=sys.stderr)
    return args


def _describes_model(flag, args):
    """Whether a flag says something about the model of `args` that every run has known, the original code's too."""
    dense = args.model.endswith("MLP")
    without = ("schedule", *(["channels", "kernels", "strides", "paddings", "pools", "fc"] if dense else ["archi"]),
               *([] if args.model.startswith("VF") else ["same_update"]))
    return flag.scope == "architecture" and flag.dest not in without


def _length_error(name, value, expected, what):
    return UserError(f"argument --{name}: got {len(value)} ({shown(value)}), expected {expected}: {what}")


def check(args):
    """What one argument demands of another. Raises UserError."""
    layers = _check_model(args)
    for name in ("lrs", "wds", "dropouts"):
        if getattr(args, name) is not None and len(getattr(args, name)) != layers:
            raise _length_error(name, getattr(args, name), layers, "one per layer")
    if args.dropouts and 0 in args.dropouts:
        raise UserError(f"argument --dropouts: got {shown(args.dropouts)}, expected numbers above 0 and at most 1")
    if args.todo == "corruptions" and args.task not in ("CIFAR10", "CIFAR100"):
        raise UserError("--todo corruptions: there are corrupted images of CIFAR10 and CIFAR100, this run's task is "
                        f"{args.task}")
    _check_rule(args)


def _check_model(args):
    """Checks what describes the model and returns the number of its layers."""
    task = TASKS[args.task]
    if args.softmax and args.loss != "cel":
        raise UserError(f"argument --softmax: needs --loss cel, got --loss {args.loss}")
    if args.model in ("MLP", "VFMLP"):
        if len(args.archi) < 2 + args.softmax:
            raise _length_error("archi", args.archi, f"at least {2 + args.softmax}",
                                "the input, hidden layers and the classes")
        if args.archi[0] != task.inputs:
            raise UserError(f"argument --archi: its first entry is {args.archi[0]}, an image of {args.task} has "
                            f"{task.inputs} values")
        layers, last = len(args.archi) - 1, "archi"
    else:
        for name in ("kernels", "strides", "paddings", "pools"):
            if len(getattr(args, name)) != len(args.channels):
                raise _length_error(name, getattr(args, name), len(args.channels),
                                    "one per convolution, as many as --channels")
        if set(args.pools) - set("mai"):
            raise UserError(f"argument --pools: got {args.pools!r}, expected the letters m, a and i")
        layers, last = len(args.channels) + len(args.fc), "fc"
    if getattr(args, last)[-1] != task.classes:
        raise UserError(f"argument --{last}: its last entry is {getattr(args, last)[-1]}, {args.task} has "
                        f"{task.classes} classes")
    return layers


def _check_rule(args):
    if args.T2 > args.T1 and (args.alg == "BPTT" or args.check_thm or args.todo == "gducheck"):
        raise UserError(f"argument --T2: got {args.T2}, BPTT goes back through at most the {args.T1} steps of --T1")
    if args.alg == "CEP" and args.todo == "train" and (args.optim != "sgd" or args.mmt):
        raise UserError(f"argument --optim: got {args.optim}" + (f" with --mmt {args.mmt:g}" if args.mmt else "")
                        + ", CEP changes weights by plain gradient steps: it needs sgd without momentum")
    if args.alg == "CEP" and args.precision != "fp32" and args.todo == "train":
        raise UserError(f"argument --precision: {args.precision} is not for CEP, whose weights change at every step")
    if len(args.betas) != 2:
        raise _length_error("betas", args.betas, 2, "of the free and of the nudged phase")
    if (args.alg != "BPTT" or args.todo == "gducheck") and (args.betas[0] == args.betas[1] or args.thirdphase
                                                            and args.betas[1] == 0):
        raise UserError(f"argument --betas: got {shown(args.betas)}, EP needs two different values, the second not 0")
    if args.betas[0] and (args.random_sign or args.thirdphase and args.alg == "CEP") and args.alg != "BPTT":
        raise UserError(f"argument --betas: got {shown(args.betas)}, a second one of either sign is to be held "
                        "against a first of 0")


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
