"""docs/extending.md: its code runs, and a copy of the project with the changes that it lists trains
with each new part from the command line."""

import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from ART_Timesteps_Addition import attacks
from energy import activations, poolings

TEXT = (ROOT / "docs/extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
# section: (module that gets the code, line that registers it, [(file, table of names, name)])
PARTS = {
    "An activation": (
        "energy/activations.py",
        'register("arctan", arctan, low=-1, high=1, centre=0, slope=1)',
        [("energy/names.py", "ACTIVATIONS", '"arctan"')],
    ),
    "A pooling": (
        "energy/poolings.py",
        'POOLS["c"] = Corner',
        [("energy/names.py", "POOLINGS", '"c": "corner"')],
    ),
    "A model": (
        "model_utils.py",
        'MODELS["DividedMLP"] = DividedMLP',
        [
            ("experiment/config.py", "ENERGY_MODELS", '"DividedMLP"'),
            ("experiment/config.py", "DENSE", '"DividedMLP"'),
        ],
    ),
    "A learning rule": (
        "model_utils.py",
        'LEARN["sign-EP"] = sign_gradients',
        [("energy/rule.py", "ALGORITHMS", '"sign-EP"')],
    ),
    "An attack": (
        "ART_Timesteps_Addition/attacks.py",
        'BUILDERS["noise"] = Noise',
        [("ART_Timesteps_Addition/names.py", "ATTACKS", '"noise"')],
    ),
}


def code(text):
    """The code blocks of a text, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S))


@pytest.fixture
def unchanged_tables():
    """The tables that the code adds to get their entries back."""
    tables = (activations.ACTIVATIONS, activations.CURVES, poolings.POOLS, attacks.BUILDERS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("title", PARTS)
def test_the_code_runs(title, zoo, unchanged_tables, capsys):
    program = code(TEXT.partition("\n## ")[0]) + "\n" + code(SECTIONS[title])
    program = program.replace('"RUN"', repr(str(zoo("few digits"))))
    exec(compile(program, title, "exec"), {"__name__": "extending"})


def definitions(title):
    """The functions and classes of a section, with its imports, as source."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    nodes = ast.parse(code(SECTIONS[title])).body
    return "\n\n".join(ast.unparse(node) for node in nodes if isinstance(node, kinds))


def extend(folder, title):
    """Add the part of a section to a copy of the project, at the places that the section lists."""
    file, line, names = PARTS[title]
    listed = re.findall(r"^\| ([^|]*) \|", SECTIONS[title], re.M)
    for name in {file, *(place for place, *_ in names)}:
        assert any(f"`{name}`" in place for place in listed), name
    module = folder / file
    lines = [
        part
        for part in definitions(title).splitlines()
        if module.stem not in part or "import" not in part  # from the module itself
    ]
    module.write_text("\n\n".join([module.read_text(), *["\n".join(lines)], line]) + "\n")
    for place, table, name in names:
        text = (folder / place).read_text()
        changed = re.sub(
            rf"^({table} = [({{].*?),?\n?([)}}])",
            rf"\1, {name}\2",
            text,
            count=1,
            flags=re.M | re.S,
        )
        assert changed != text, table
        (folder / place).write_text(changed)


@pytest.mark.slow
def test_the_places_are_complete(tmp_path):
    for path in [
        *ROOT.glob("*.py"),
        ROOT / "energy",
        ROOT / "experiment",
        ROOT / "ART_Timesteps_Addition",
    ]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for title in PARTS:
        extend(tmp_path, title)
    small = "--task digits --device -1 --train-size 40 --test-size 10 --mbs 10 --T1 4 --T2 2"
    for line in (
        f"{small} --model DividedMLP --archi 784 8 10 --act arctan --alg sign-EP --run-dir run",
        "--todo attack --load-path run --device -1 --attack noise --eps-list 1 --attack-iters 2",
        f"{small} --model CNN --channels 4 --kernels 5 --strides 1 --paddings 0 --pools c",
        "--todo gducheck --task digits --device -1 --model DividedMLP --archi 784 8 10 --act arctan",
    ):
        done = subprocess.run(
            [sys.executable, "main.py", *line.split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stderr)
