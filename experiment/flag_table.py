"""docs/flags.md, the table of all flags:
python -m experiment.flag_table > docs/flags.md"""

from experiment.command_line import DROPOUTS, allowed, default_text, has_negative
from experiment.config import (
    ARCHITECTURE,
    ENERGY_MODELS,
    FLAGS,
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
    RESUMED: "the saved value counts when the training resumes, unless the flag is given; "
    "not taken from the saved run otherwise",
    SESSION: "not taken from the saved run",
    SAVED: "",
}
HEAD = """# Every flag

`python main.py --help` prints the flags with meaning and default, but not `--dropouts`, which only
`main_dropout.py` has. If a flag is given twice, the last value counts, also with a switch and its
negative. With a saved run (`--load-path`, or `--run-dir` if it contains one), a value that is not
given comes from the run, unless the last column states otherwise. A note names each flag that has
no effect on the task. Without `--todo`, flags that training does not use are refused. A study takes
the flags of train, evaluate, attack, audit and compare, and gives each to the commands and models
that it has an effect on; its runs are below `results/`.
This file is made by `python -m experiment.flag_table > docs/flags.md`."""
COLUMNS = ("flag", "meaning", "values", "default", "has an effect on", "with a saved run")


def allowed_values(flag: Flag) -> str:
    """The values that a flag takes."""
    if flag.kind is bool:
        return f"off: `--{flag.negative}`" if has_negative(flag) else ""
    if flag.choices:
        text = ", ".join(f"`{choice}`" for choice in flag.choices)
    else:
        text = allowed(flag).removeprefix("a ")
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
