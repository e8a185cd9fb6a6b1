"""From the words of a command line to checked arguments. Words stay text until all are known, and
are judged then, so that of a flag given twice only the last counts, and a saved run can fill in
what was not given."""

import argparse
import difflib
import math
import re
import reprlib
import shlex
import sys
import unicodedata

from data_utils import TASKS, UserError
from experiment.flags import (
    ALL,
    ATTACK_STEP,
    CONVOLUTIONAL,
    FEED_FORWARD,
    LARGEST,
    NO_STEPS,
    OF_STEPS,
    typed,
)

# Arguments of convolutions that the shapes of weights do not determine
GEOMETRY = ("pools", "paddings", "strides")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = " ".join(message.split())
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [word for word in self._option_string_actions if word.startswith("--")]
            other = [flag.name for flag in ALL if f"--{flag.name}" == unknown[1]]
            message += " (a flag of main_dropout.py)" if other else ""
            near = difflib.get_close_matches(unknown[1], known, 1)
            message += f" (nearest: {near[0]})" if near and not other else ""
        raise UserError(message)


def parse(argv, flags, description=None):
    """The flags that were given, judged: {dest: value}. Raises UserError; SystemExit(0) after
    --help.

    argv: the words; flags: {title of a group: list of Flag}."""
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    known = {}
    for title, group in flags.items():
        arguments = parser.add_argument_group(title)
        for flag in group:
            known[flag.dest] = flag
            default = "" if flag.default in (None, False) else f" (default: {shown(flag.default)})"
            if flag.kind is bool:
                _add_switch(arguments, flag, {other.name for other in ALL})
            else:
                metavar = (
                    "{" + ",".join(flag.choices) + "}"
                    if flag.choices
                    else {int: "N", float: "X", str: "TEXT"}[flag.kind]
                )
                arguments.add_argument(
                    f"--{flag.name}",
                    nargs="+" if flag.many else None,
                    metavar=metavar,
                    help=(flag.help + default).replace("%", "%%"),
                )
    given = vars(
        parser.parse_args([_SHIELD + word if _like_a_number(word) else word for word in argv])
    )
    return {dest: _judge_given(known[dest], value) for dest, value in given.items()}


def _add_switch(arguments, flag, names):
    """Adds a switch and its negative, unless that is among `names`, those of all flags."""
    off = "" if flag.negative in names else f" (off: --{flag.negative})"
    arguments.add_argument(
        f"--{flag.name}", action="store_true", help=(flag.help + off).replace("%", "%%")
    )
    if off:
        arguments.add_argument(
            f"--{flag.negative}", action="store_false", dest=flag.dest, help=argparse.SUPPRESS
        )


# Put in front of negative numbers, because argparse takes -1e-3, -1., -1/2 and -inf for flags.
_SHIELD = " "


def _like_a_number(word):
    """Whether a word is a number with a minus sign (also a fraction, infinite or nan), or begins
    like one."""
    if not word.startswith("-"):
        return False
    try:
        return bool(word[1:2].isdigit() or [float(part) for part in word.split("/")])
    except ValueError:
        return word[1:2] == "." and word[2:3].isdigit()


def parse_leniently(line: str) -> dict:
    """Parse a command line of another version of this program: {dest: value} of the known flags.

    Unknown words are skipped; with a flag given twice the last counts, as in argparse. A value
    that is not valid for its flag stays text.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # a quotation mark too few
        words = line.split()
    flags, texts, last = {flag.name: flag for flag in ALL}, {}, None
    for word in words:
        if re.match("--?[A-Za-z]", word):
            name, _, value = word.lstrip("-").partition("=")
            last = flags.get(name.replace("_", "-")) if word.startswith("--") else None
            if last:
                texts[last.dest] = last, [value] if value else []
        elif last:
            texts[last.dest][1].append(word)
    values = {}
    for dest, (flag, given) in texts.items():
        if flag.kind is bool:
            values[dest] = True
        elif given:
            value = given if flag.many else given[0]
            try:
                values[dest] = _judge_given(flag, value)
            except UserError:
                values[dest] = value
    return values


def implied() -> dict:
    """{dest: default} of the arguments that a complete command line defines by omitting them."""
    return {flag.dest: flag.default for flag in ALL if flag.kind is bool or flag.dest in GEOMETRY}


def _judge_given(flag, value):
    if flag.kind is bool:
        return value
    if flag.many:
        return [judge(flag, _unshielded(text)) for text in value]
    return judge(flag, _unshielded(value))


def _unshielded(text):
    """A word as it was given."""
    word = text.removeprefix(_SHIELD)
    return word if _like_a_number(word) else text


def shown(value):
    """A value as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def contrast(flag, value, word, other):
    """Two values of a flag as one would type them: `--T1 9 (until now 8)`, of a switch `--no-save
    (until now --save)`. word: the `until now`."""
    if flag.kind is bool:
        return f"{typed(flag, value)[0]} ({word} {typed(flag, other)[0]})"
    return f"--{flag.name} {shown(value)} ({word} {shown(other)})"


def judge(flag, text):
    """The value of one word for `flag`; UserError, naming the flag, what was given and what is
    allowed, if it has none."""
    low, high = flag.low, flag.high
    if flag.kind is int and high is None:
        high = LARGEST
    allowed = (
        "one of " + ", ".join(flag.choices)
        if flag.choices
        else {int: "a whole number", float: "a number", str: "a text without control characters"}[
            flag.kind
        ]
    )
    if low is not None:
        allowed += f" of at least {low}"
    if high is not None and (flag.high is not None or _beyond(text, high)):
        allowed += f"{' and' if low is not None else ' of'} at most {high}"
    if flag.least:
        allowed = f"0, or a number from {flag.least:g} to {high:g}"
    try:
        value = _fraction(text) if flag.kind is float and "/" in text else flag.kind(text)
    except (ValueError, ZeroDivisionError):
        value = None
    if (
        value is None
        or flag.choices
        and value not in flag.choices
        or flag.kind is str
        and _has_control_characters(value)
        or flag.kind is float
        and not math.isfinite(value)
        or low is not None
        and value < low
        or high is not None
        and value > high
        or flag.least
        and 0 < value < flag.least
    ):
        given = repr(text) if len(text) <= 200 else f"{text[:40]!r}..., {len(text)} characters"
        raise UserError(f"argument --{flag.name}: got {given}, expected {allowed}")
    return value


def _fraction(text):
    """The number that a fraction such as 8/255 is."""
    numerator, denominator = map(float, text.split("/"))
    return numerator / denominator


def _has_control_characters(text):
    """No path can have a NUL, and an error that names a text has one line."""
    return any(unicodedata.category(character) == "Cc" for character in text)


def _beyond(text, high):
    """Whether a word is a number, and too large a one."""
    digits = text.strip().lstrip("+")
    return digits.isdecimal() and (
        len(digits) > 4000 or int(digits) > high
    )  # int() takes no longer ones


def described(value):
    """Any value in a few words, on one line: what a file holds may be large, nested deeply, or
    impossible to print."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 2, 60, 60, 60
    try:
        return " ".join(short.repr(value).split())
    except ValueError:  # a number of more digits than Python writes
        return (
            f"a number of {value.bit_length()} bits"
            if isinstance(value, int)
            else f"a {type(value).__name__}"
        )


def named(path):
    """A path as an error names it: on one line, and not at any length."""
    path = str(path)
    return path if len(path) <= 300 and path.isprintable() else described(path)


def judge_saved(flag, value, path):
    """The value of one flag as a saved run has it, held to the same rules; None where the flag may
    be unset. Raises UserError."""
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
            except (
                UserError,
                ValueError,
            ):  # ValueError: a number of more digits than Python writes
                pass
    raise UserError(f"{path} has no sensible --{flag.name}: {described(value)}")


def resolve(given, saved=None):
    """Every argument's value: as given, else as in the saved run, else the default. Returns a
    Namespace.

    given: of `parse`; saved: the arguments of the run that it knows, judged; None where there is no
    run. Says on standard error which given ones the run overrules, and what neither says of the
    model."""
    # a run that does not say --val-size has held nothing out
    args, overruled, known = (
        argparse.Namespace(),
        [],
        {} if saved is None else {"val_size": None, **saved},
    )
    resumes = given.get("todo", "train") == "train"
    fixed = {"architecture", "training"} if resumes else {"architecture"}
    forgotten = {"session"} if resumes else {"session", "resumed"}
    for flag in ALL:
        value = given.get(flag.dest, flag.default)
        remembered = flag.dest in known and flag.scope not in forgotten
        if remembered and (flag.dest not in given or flag.scope in fixed):
            kept = known[flag.dest]
            if flag.dest in given and value != kept:
                overruled.append(contrast(flag, kept, "not", value))
            value = kept
        setattr(args, flag.dest, value)
    if args.attack_step is None:
        args.attack_step = [min(ATTACK_STEP, args.predict_step or args.T1)]
    if saved is None:
        _fit_to_task(args, given)
    elif args.model in CONVOLUTIONAL:
        _fit_to_weights(args, {**known, **given})
    if args.model in FEED_FORWARD:
        _without_steps(args, given, known)
    if overruled:
        print(f"note: the saved run decides {', '.join(overruled)}", file=sys.stderr)
    guessed = [
        flag for flag in ALL if flag.dest not in {**known, **given} and _describes_model(flag, args)
    ]
    if saved is not None and guessed:
        print(
            "note: the saved run does not say "
            + ", ".join(f"--{flag.name}" for flag in guessed)
            + "; taken: "
            + ", ".join(f"{flag.name} {shown(getattr(args, flag.dest))}" for flag in guessed),
            file=sys.stderr,
        )
    return args


def _fit_to_task(args, given):
    """Gives the sizes of the first and last layer, where no flag does, the values that the task
    has."""
    task = TASKS[args.task]
    if "archi" not in given:
        args.archi = [task.inputs, *args.archi[1:-1], task.classes]
    if "fc" not in given:
        args.fc = [*args.fc[:-1], task.classes]


def _fit_to_weights(args, known):
    """Sets unknown strides to 1. Raises UserError if poolings or paddings are unknown: weights of
    the same shapes fit several of them. known: {dest: value} of the saved run and the flags."""
    unknown = [name for name in GEOMETRY if name not in known]
    if "pools" in unknown or "paddings" in unknown:
        raise UserError(
            f"the saved run does not record --{', --'.join(unknown)} and its weights "
            "do not determine them; give these flags as in the training"
        )
    if unknown:
        args.strides = [1] * len(args.channels)


def _without_steps(args, given, known):
    """Gives the flags of time steps what stands for them in a model that has none, and --alg, where
    no one says it, its rule."""
    for name, value in NO_STEPS.items():
        setattr(args, name, value)
    args.attack_grad = [grad for grad in args.attack_grad if grad not in OF_STEPS] or ["bptt"]
    if "alg" not in {**known, **given}:
        args.alg = "BP"


def _describes_model(flag, args):
    """Whether a flag says something about the model of `args` that every run has known, the
    original code's too."""
    return (
        flag.scope == "architecture"
        and flag.dest != "schedule"
        and (flag.models is None or args.model in flag.models)
    )
