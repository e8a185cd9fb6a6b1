"""The table of all flags in docs/flags.md, made from where they are defined:
python -m experiment.flag_table > docs/flags.md"""

from experiment.arguments import shown
from experiment.flags import ALL, DROPOUTS, ENERGY, FLAGS, LARGEST

SCOPES = {
    "architecture": "the saved run's counts, whatever is given",
    "training": "going on with a training, the saved run's counts",
    "resumed": "resuming a training, the saved run's counts unless it is given",
    "session": "of one call, a run does not remember it",
    "": "",
}
HEAD = """# Every flag

`python main.py --help` says the same. Values are judged after parsing: of a flag given twice the last counts, also of a
switch and its negative. With `--load-path`, what is not given comes from the saved run. A flag that has no effect on
what is done says so in a note; where `--todo` is not given, a flag that training does not use is refused.
This file is made by `python -m experiment.flag_table > docs/flags.md`."""


def values(flag):
    """What a flag takes, in words."""
    if flag.kind is bool:
        return (
            f"off: `--{flag.negative}`"
            if flag.negative not in {other.name for other in ALL}
            else ""
        )
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    name = {int: "whole number", float: "number", str: "text"}[flag.kind]
    low = f" of at least {flag.low:g}" if flag.low is not None else ""
    high = (
        f"{' and' if low else ' of'} at most {flag.high:g}"
        if flag.high is not None and flag.high <= LARGEST
        else ""
    )
    return name + low + high


def row(flag):
    """A line of the table."""
    default = "" if flag.default in (None, False) else f"`{shown(flag.default)}`"
    takes = values(flag) + (", one or several" if flag.many else "")
    where = ", ".join(
        [*(flag.todos or ()), *(["energy models"] if flag.models == ENERGY else flag.models or ())]
    )
    meaning = flag.help + (" (`main_dropout.py`)" if flag is DROPOUTS else "")
    return f"| `--{flag.name}` | {meaning} | {takes} | {default} | {where or 'all'} | {SCOPES[flag.scope]} |"


def text():
    """The whole file."""
    lines = [HEAD]
    for title, group in [*FLAGS.items(), ("dropout", [DROPOUTS])]:
        lines += [
            "",
            f"## {title[0].upper() + title[1:]}",
            "",
            "| flag | meaning | takes | default | has an effect on | with a saved run |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(row, group),
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
