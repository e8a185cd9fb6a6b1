"""The rooms of the code, read with `ast`: what may import what."""

import ast
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from energy import activations, names, poolings
from experiment import arguments, checks, flag_table
from experiment.flags import ALL, DROPOUTS, FLAGS

# The floor of each room. A room imports only rooms on lower floors (files of one folder each
# other).
FLOORS = {
    "main_dropout.py": 5,
    "main.py": 4,
    "model_utils.py": 3,
    "learning.py": 2.5,
    "baselines.py": 2,
    "experiment": 2,
    "ART_Timesteps_Addition": 2,
    "data_utils.py": 1,
    "energy": 1,
    "data_files.py": 0,
}
FILES = sorted(
    path
    for name in FLOORS
    for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).glob("*.py"))
)


def room(path):
    relative = path.relative_to(ROOT)
    return relative.name if len(relative.parts) == 1 else relative.parts[0]


def imports(path):
    """The names of our own modules that a file imports, anywhere in it."""
    own = {name.removesuffix(".py") for name in FLOORS}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        yield from (name for name in names if name and name.split(".")[0] in own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_lower_ones(path):
    floor = FLOORS[room(path)]
    for name in imports(path):
        top = name.split(".")[0]
        other = top if top in FLOORS else f"{top}.py"
        assert other == room(path) or FLOORS[other] < floor, name


def test_there_are_no_circles():
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = set(imports(path))
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " -> ".join([*under_way, module])
        if module in graph and module not in done:
            under_way.append(module)
            for other in graph[module]:
                visit(other)
            under_way.pop()
            done.add(module)

    for module in graph:
        visit(module)


def test_lines_have_at_most_120_columns():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    paths = [ROOT / name for name in tracked] or FILES
    long = [
        f"{path.name}:{n}"
        for path in paths
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


def test_no_model_is_copied_and_no_private_kernel_called():
    for path in FILES:
        text = path.read_text()
        assert "copy.copy" not in text and "torch.ops.mkldnn" not in text, path.name


def test_names_are_those_of_the_implementations():
    """`energy.names` is read by the command line before torch is loaded."""
    assert names.ACTIVATIONS == tuple(activations.ACTIVATIONS) and set(activations.RANGES) == set(
        activations.ACTIVATIONS.values()
    )
    assert names.POOLINGS == tuple(poolings.POOLS)


def test_every_room_is_known():
    """A new file or folder of code gets a floor here."""
    tops = {
        path.name
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert tops == set(FLOORS)


def test_public_functions_say_what_they_do():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_table_of_flags_is_that_of_the_code():
    """Made by `python -m experiment.flag_table > docs/flags.md`."""
    assert (ROOT / "docs" / "flags.md").read_text() == flag_table.text()
    assert all(f"| `--{flag.name}` |" in flag_table.text() for flag in ALL)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (path.parent / target).exists(), (path.name, target)
        for word in re.findall(
            r"(?:bash )?(check/[\w.]+\.sh|benchmarks/[\w.]+|tests/[\w.]+\.py)", text
        ):
            assert (ROOT / word).exists(), (path.name, word)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_command_of_the_readme_is_one():
    """Its flags exist and its arguments fit together."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ +python main(?:_dropout)?\.py ([^\n#]*)", text, re.M):
            words = shlex.split(line.replace("...", "").replace("$", ""))
            given = arguments.parse(words, {**FLAGS, "dropout": [DROPOUTS]})
            if "load_path" not in given:
                checks.check(arguments.resolve(given))
