"""docs/flags.md, the table of all flags:
python -m experiment.flag_table > docs/flags.md"""

from experiment.command_line import DROPOUTS, default_text, has_negative
from experiment.config import (
    ARCHITECTURE,
    ENERGY_MODELS,
    FLAGS,
    LARGEST,
    RESUMED,
    SAVED,
    SECTIONS,
    SESSION,
    TRAINING,
    Flag,
)

SCOPES = {
    ARCHITECTURE: "the saved value counts, whatever is given",
    TRAINING: "the saved value counts when the training resumes",
    RESUMED: "the saved value counts when the training resumes, unless the flag is given",
    SESSION: "of one call; a run does not remember it",
    SAVED: "",
}
HEAD = """# Every flag

`python main.py --help` prints the same. Values are converted after parsing: if a flag is given
twice, the last counts, also with a switch and its negative. With `--load-path`, values that are not
given come from the saved run. A note names each flag that has no effect on the task. Without
`--todo`, flags that training does not use are refused.
This file is made by `python -m experiment.flag_table > docs/flags.md`."""
COLUMNS = ("flag", "meaning", "values", "default", "has an effect on", "with a saved run")


def allowed_values(flag: Flag) -> str:
    """The values that a flag takes."""
    if flag.kind is bool:
        return f"off: `--{flag.negative}`" if has_negative(flag) else ""
    if flag.choices:
        text = ", ".join(f"`{choice}`" for choice in flag.choices)
    else:
        text = {int: "whole number", float: "number", str: "text"}[flag.kind]
        if flag.low is not None:
            text += f" of at least {flag.low:g}"
        if flag.high is not None and flag.high <= LARGEST:
            text += f"{' and' if flag.low is not None else ' of'} at most {flag.high:g}"
    return text + (", one or several" if flag.many else "")


def row(flag: Flag) -> str:
    """A line of the table."""
    default = default_text(flag)
    if default and flag.shown_default is None:
        default = f"`{default}`"
    meaning = flag.help + (" (`main_dropout.py`)" if flag is DROPOUTS else "")
    models = ["energy models"] if flag.models == ENERGY_MODELS else list(flag.models or ())
    where = ", ".join([*(flag.todos or ()), *models]) or "all"
    cells = (
        f"`--{flag.name}`",
        meaning,
        allowed_values(flag),
        default,
        where,
        SCOPES[flag.scope],
    )
    return f"| {' | '.join(cells)} |"


def text() -> str:
    """The whole file."""
    lines = [HEAD]
    for name, section in SECTIONS.items():
        title = section.title
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
        lines += [row(flag) for flag in FLAGS if flag.section == name]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
