"""The command line: from words to a `Config`, generated from the flags of `experiment.config`.

Values are converted after all words are parsed, so that the last counts if a flag is given twice,
and a saved run supplies the values that are not given.
"""

import argparse
import difflib
import math
import pathlib
import re
import shlex
import sys
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from data_utils import TASKS, UserError
from experiment.config import (
    ARCHITECTURE,
    BY_DEST,
    FLAGS,
    GRADIENTS_OF_STEPS,
    LARGEST,
    RESUMED,
    SECTIONS,
    SESSION,
    TODOS,
    TRAINING,
    Config,
    Flag,
)
from experiment.text import describe, format_value, listed, name_path
from experiment.version import git_revision, version

# Flags of main_dropout.py alone; main.py takes them from a saved run.
DROPOUTS = BY_DEST["dropouts"]
MAIN_FLAGS = tuple(flag for flag in FLAGS if flag is not DROPOUTS)

# Arguments of convolutions that the shapes of weights do not determine
GEOMETRY = ("pools", "paddings", "strides")

# Values of the flags of time steps for a model without dynamics
WITHOUT_DYNAMICS: dict[str, Any] = {
    "T1": 1,
    "T2": 1,
    "tol": 0.0,
    "schedule": "sync",
    "softmax": False,
    "random_sign": False,
    "thirdphase": False,
    "same_update": False,
    "check_thm": False,
    "compile": False,
    "adv_step": 1,
    "attack_step": [1],
    "predict_step": None,
    "attack_start": "zero",
}


# ---------------------------------------------------------------------------------- parse and help


# Names that other programs give to flags and values of flags: {other name: ours}
SYNONYMS = {
    "activation": "act",
    "architecture": "archi",
    "batch-size": "mbs",
    "checkpoint": "load-path",
    "dataset": "task",
    "epsilon": "eps-list",
    "gpu": "device",
    "hidden": "archi",
    "layers": "archi",
    "learning-rate": "lrs",
    "lr": "lrs",
    "momentum": "mmt",
    "num-epochs": "epochs",
    "optimizer": "optim",
    "output": "run-dir",
    "output-dir": "run-dir",
    "resume": "load-path",
    "save-dir": "run-dir",
    "wd": "wds",
    "weight-decay": "wds",
}
VALUE_SYNONYMS = {
    "aa": "autoattack",
    "adamw": "adam",
    "backprop": "BP",
    "ce": "cel",
    "cross-entropy": "cel",
    "l2": "2",
    "linf": "inf",
    "test": "evaluate",
}


def _did_you_mean(word: str, known: Collection[str], synonyms: Mapping[str, str]) -> str | None:
    """The one of the `known` names that a user may mean by a word; None if none is like it."""
    meant = {other: name for other, name in synonyms.items() if name in known}
    meant |= {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(word.lower().replace("_", "-"), meant, 1)
    return meant[nearest[0]] if nearest else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        message = " ".join(message.split())
        name, _, words = message.partition(": ")
        if name == "unrecognized arguments":
            message += self._advice(words.split())
        raise UserError(message)

    def _advice(self, words: Sequence[str]) -> str:
        """What to do about unknown words of the command line."""
        if words[0] in TODOS:
            return f"; did you mean --todo {words[0]}?"
        unknown = [word.lstrip("-") for word in words if re.match("--?[A-Za-z]", word)]
        if DROPOUTS.name in unknown:
            return f"; --{DROPOUTS.name} is a flag of main_dropout.py"
        known = [word[2:] for word in self._option_string_actions if word.startswith("--")]
        meant = [_did_you_mean(name, known, SYNONYMS) for name in unknown]
        flags = [f"--{name}" for name in dict.fromkeys(meant) if name]
        return f"; did you mean {listed(flags)}?" if flags else ""


class _PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"{parser.prog} {version()}, git revision {git_revision()}")
        parser.exit()


def parse(
    argv: Sequence[str], flags: Iterable[Flag] = MAIN_FLAGS, description: str | None = None
) -> dict[str, Any]:
    """The flags that were given, converted: {dest: value}. Raises UserError; SystemExit(0) after
    --help and --version."""
    parser = _Parser(
        usage="%(prog)s [--todo TASK] [--load-path RUN] [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(cls.title) for name, cls in SECTIONS.items()}
    for flag in flags:
        _add_argument(groups[flag.section], flag)
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version")
    words = [_SHIELD + word if _looks_like_a_number(word) else word for word in argv]
    given = vars(parser.parse_args(words))
    return {dest: _convert_given(BY_DEST[dest], value) for dest, value in given.items()}


def _add_argument(group: Any, flag: Flag) -> None:
    help_text = _help(flag).replace("%", "%%")
    if flag.kind is not bool:
        group.add_argument(
            f"--{flag.name}",
            nargs="+" if flag.many else None,
            metavar=flag.metavar,
            help=help_text,
        )
        return
    group.add_argument(f"--{flag.name}", action="store_true", help=help_text)
    if has_negative(flag):
        group.add_argument(
            f"--{flag.negative}", action="store_false", dest=flag.dest, help=argparse.SUPPRESS
        )


def has_negative(flag: Flag) -> bool:
    """Whether a switch can be turned off by `flag.negative`, unless that is another flag."""
    return flag.kind is bool and all(other.name != flag.negative for other in FLAGS)


def default_text(flag: Flag) -> str:
    """The default as users read it; '' where there is none."""
    if flag.shown_default is not None:
        return flag.shown_default
    return "" if flag.default is None or flag.default is False else format_value(flag.default)


def _help(flag: Flag) -> str:
    if has_negative(flag):
        return f"{flag.help} (off: --{flag.negative})"
    default = default_text(flag)
    return f"{flag.help} (default: {default})" if default else flag.help


# Put in front of negative numbers, because argparse takes -1e-3, -1., -1/2 and -inf for flags.
_SHIELD = " "


def _looks_like_a_number(word: str) -> bool:
    """Whether a word is, or begins like, a number with a minus sign (a fraction, inf, nan too)."""
    if not word.startswith("-"):
        return False
    if word[1:2].isdigit() or (word[1:2] == "." and word[2:3].isdigit()):
        return True
    try:
        return bool([float(part) for part in word.split("/")])
    except ValueError:
        return False


def _unshield(text: str) -> str:
    """A word as it was given."""
    word = text.removeprefix(_SHIELD)
    return word if _looks_like_a_number(word) else text


def parse_leniently(line: str) -> dict[str, Any]:
    """Parse a command line of another version of this program: {dest: value} of the known flags.

    Unknown words are skipped; with a flag given twice the last counts, as in argparse. A value
    that is not valid for its flag stays text.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # an unbalanced quotation mark
        words = line.split()
    by_name = {flag.name: flag for flag in FLAGS}
    texts: dict[str, list[str]] = {}
    current = None
    for word in words:
        if re.match("--?[A-Za-z]", word):
            name, _, value = word.lstrip("-").partition("=")
            current = by_name.get(name.replace("_", "-")) if word.startswith("--") else None
            if current:
                texts[current.dest] = [value] if value else []
        elif current:
            texts[current.dest].append(word)
    values: dict[str, Any] = {}
    for dest, given in texts.items():
        flag = BY_DEST[dest]
        if flag.kind is bool:
            values[dest] = True
        elif given:
            words_or_word = given if flag.many else given[0]
            try:
                values[dest] = _convert_given(flag, words_or_word)
            except UserError:
                values[dest] = words_or_word
    return values


def implied() -> dict[str, Any]:
    """{dest: default} of the arguments that a complete command line defines by omitting them."""
    return {flag.dest: flag.default for flag in FLAGS if flag.kind is bool or flag.dest in GEOMETRY}


# ------------------------------------------------------------------------------ values of one flag


def _convert_given(flag: Flag, value: Any) -> Any:
    if flag.kind is bool:
        return value
    if flag.many:
        return [convert(flag, _unshield(text)) for text in value]
    return convert(flag, _unshield(value))


def convert(flag: Flag, text: str) -> Any:
    """The value of one word for `flag`. Raises UserError, naming the flag, what was given and what
    is allowed."""
    low = flag.low
    high = LARGEST if flag.kind is int and flag.high is None else flag.high
    try:
        value: Any = _fraction(text) if flag.kind is float and "/" in text else flag.kind(text)
        valid = (
            (not flag.choices or value in flag.choices)
            and (flag.kind is not str or not _has_control_characters(value))
            and (flag.kind is not float or math.isfinite(value))
            and (low is None or value >= low)
            and (high is None or value <= high)
            and not (flag.least and 0 < value < flag.least)
        )
    except (ValueError, ZeroDivisionError):
        valid = False
    if not valid:
        given = repr(text) if len(text) <= 200 else f"{text[:40]!r}..., {len(text)} characters"
        expected = allowed(flag)
        if flag.high is None and high is not None and _exceeds(text, high):
            expected += f" and at most {high}"
        meant = _did_you_mean(text, flag.choices or (), VALUE_SYNONYMS)
        if flag.dest == "device":
            meant = _device_meant(text)
        advice = f"; did you mean {meant}?" if meant else ""
        raise UserError(f"argument --{flag.name}: got {given}, expected {expected}{advice}")
    return value


def _device_meant(text: str) -> str | None:
    """`--device N` for the name that PyTorch gives to a device; None for other texts."""
    found = re.fullmatch(r"cpu|(?:cuda|gpu):?(\d*)", text.lower())
    if not found:
        return None
    return f"--device {-1 if text.lower() == 'cpu' else found[1] or 0}"


def allowed(flag: Flag) -> str:
    """The values that a flag takes, in words: `a whole number of at least 1`."""
    if flag.choices:
        return "one of " + ", ".join(flag.choices)
    if flag.least:
        return f"0, or a number from {flag.least:g} to {flag.high:g} (or a fraction such as 8/255)"
    text = {int: "a whole number", float: "a number", str: "a text without control characters"}[
        flag.kind
    ]
    bounds = [f"at least {flag.low}"] if flag.low is not None else []
    bounds += [f"at most {flag.high}"] if flag.high is not None else []
    return f"{text} of {' and '.join(bounds)}" if bounds else text


def _fraction(text: str) -> float:
    """The value of a fraction such as 8/255."""
    numerator, denominator = map(float, text.split("/"))
    return numerator / denominator


def _has_control_characters(text: str) -> bool:
    """Whether a text has characters that a path (NUL) or an error message (line feed) cannot."""
    return any(unicodedata.category(character) == "Cc" for character in text)


def _exceeds(text: str, high: float) -> bool:
    """Whether a word is a whole number above `high`."""
    digits = text.strip().lstrip("+")
    # int() refuses longer ones
    return digits.isdecimal() and (len(digits) > 4000 or int(digits) > high)


def validate_saved(flag: Flag, value: Any, path: str | pathlib.Path) -> Any:
    """The value of a flag as a saved run has it, by the rules of the command line. Raises
    UserError."""
    if flag.kind is bool:
        if isinstance(value, bool):
            return value
    elif value is None:
        if flag.default is None:
            return None
    else:
        kinds = {int: (int,), float: (int, float), str: (str,)}[flag.kind]
        # earlier versions saved a single value of some flags that take several now
        is_list = flag.many and isinstance(value, (list, tuple))
        values = value if is_list else [value]
        if values and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values):
            try:
                values = [convert(flag, str(v)) for v in values]
                return values if is_list or flag.many and not flag.or_one else values[0]
            except (UserError, ValueError):  # ValueError: more digits than Python prints
                pass
    raise UserError(f"{name_path(path)} has no valid --{flag.name}: {describe(value)}")


def words_of(flag: Flag, value: Any) -> list[str]:
    """The words of a command line that give a flag this value."""
    if flag.kind is bool:
        return [f"--{flag.name if value else flag.negative}"]
    words = [str(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    if flag.kind is str and len(words) == 1 and words[0].startswith("-"):  # looks like a flag
        return [f"--{flag.name}={words[0]}"]
    return [f"--{flag.name}", *words]


def describe_change(flag: Flag, value: Any, label: str, other: Any) -> str:
    """Two values of a flag: `--T1 9 (until now 8)`, of a switch `--no-save (until now --save)`.
    label: the text before the other value."""
    if flag.kind is bool:
        return f"{words_of(flag, value)[0]} ({label} {words_of(flag, other)[0]})"
    return f"--{flag.name} {format_value(value)} ({label} {format_value(other)})"


# ----------------------------------------------------------------------------- from flags to config


def resolve(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Config:
    """The Config of a call: every value as given, else as in the saved run, else the default.

    given: of `parse`; saved: the validated arguments that the run records, None without one.
    Prints notes on standard error: which given values the run overrides, and which values of the
    model are guessed.
    """
    # a run that does not record --val-size has no held-out images
    recorded = {} if saved is None else {"val_size": None, **saved}
    resumes = given.get("todo", "train") == "train"
    fixed = {ARCHITECTURE, TRAINING} if resumes else {ARCHITECTURE}
    forgotten = {SESSION} if resumes else {SESSION, RESUMED}
    values: dict[str, Any] = {}
    overridden = []
    for flag in FLAGS:
        value = given.get(flag.dest, flag.default)
        remembered = flag.dest in recorded and flag.scope not in forgotten
        if remembered and (flag.dest not in given or flag.scope in fixed):
            kept = recorded[flag.dest]
            if flag.dest in given and value != kept:
                overridden.append(describe_change(flag, kept, "not", value))
            value = kept
        values[flag.dest] = value
    config = Config.from_flat(values)
    known = {**recorded, **given}
    if saved is None:
        config = _fit_to_task(config, known)
    elif config.model.is_convolutional:
        config = _fit_to_weights(config, known)
    if not config.model.has_dynamics:
        config = _without_dynamics(config, known)
    config = config.replace(attack_step=config.attack_steps)
    if overridden:
        print(f"note: the saved run determines {', '.join(overridden)}", file=sys.stderr)
    if saved is not None:
        _note_guesses(config, known)
    return config


def _fit_to_task(config: Config, known: Mapping[str, Any]) -> Config:
    """Set the sizes of the first and last layer, where not given, to those of the task."""
    task = TASKS[config.data.task]
    if "archi" not in known:
        config = config.replace(archi=[task.inputs, *config.model.archi[1:-1], task.classes])
    if "fc" not in known:
        config = config.replace(fc=[*config.model.fc[:-1], task.classes])
    return config


def _fit_to_weights(config: Config, known: Mapping[str, Any]) -> Config:
    """Set unknown strides to 1. Raises UserError if poolings or paddings are unknown: weights of
    the same shapes fit several of them."""
    unknown = [name for name in GEOMETRY if name not in known]
    if "pools" in unknown or "paddings" in unknown:
        raise UserError(
            f"the saved run does not record --{', --'.join(unknown)} and its weights do not "
            "determine them; give these flags as in the training"
        )
    return config.replace(strides=[1] * len(config.model.channels)) if unknown else config


def _without_dynamics(config: Config, known: Mapping[str, Any]) -> Config:
    """Replace the flags of time steps, and --alg where it is unknown, for feed-forward networks."""
    grads = [grad for grad in config.attack.grads if grad not in GRADIENTS_OF_STEPS]
    config = config.replace(**WITHOUT_DYNAMICS, attack_grad=grads or ["bptt"])
    return config if "alg" in known else config.replace(alg="BP")


def _note_guesses(config: Config, known: Mapping[str, Any]) -> None:
    """Print which values of the model are neither recorded nor given."""
    guessed = [
        flag
        for flag in FLAGS
        if flag.dest not in known
        and flag.scope == ARCHITECTURE
        and not flag.recorded_later
        and (flag.models is None or config.model.kind in flag.models)
    ]
    if guessed:
        names = ", ".join(f"--{flag.name}" for flag in guessed)
        values = ", ".join(f"{flag.name} {format_value(config.value(flag))}" for flag in guessed)
        print(f"note: the saved run does not record {names}; assumed: {values}", file=sys.stderr)
