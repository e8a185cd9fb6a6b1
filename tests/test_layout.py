"""The layers of the code, read with `ast`: what may import what."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

import model_utils
from ART_Timesteps_Addition import attacks, gradients
from ART_Timesteps_Addition import names as attack_names
from ART_Timesteps_Addition.audit import stages
from energy import activations, names, poolings, rule
from experiment import config, flag_table
from experiment.config import FLAGS as ALL

# The layer of each module or package; single files may be below their package. A module imports
# only modules of lower layers, and of its own package.
LAYERS = {
    "main_dropout": 5,
    "main": 4,
    "model_utils": 3,
    "baselines": 2,
    "experiment": 2,
    "ART_Timesteps_Addition": 2,
    "experiment.config": 1.5,  # typed sections, which both packages take
    "experiment.text": 1,
    "data_utils": 1,
    "energy": 1,
    "metrics": 0,
    "energy.names": 0,
    "energy.rule": 0,
    "ART_Timesteps_Addition.names": 0,
    "ART_Timesteps_Addition.settings": 0.5,
    "data_files": 0,
}
TOPS = {name.partition(".")[0] for name in LAYERS}
FILES = sorted(
    path
    for top in TOPS
    for path in (
        [ROOT / f"{top}.py"] if (ROOT / f"{top}.py").exists() else (ROOT / top).rglob("*.py")
    )
)


def module_of(path):
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def layer_of(module):
    """The layer of a dotted name: that of its longest prefix in LAYERS."""
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def imports(path):
    """The names of our own modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            within = [f"{node.module}.{a.name}" for a in node.names]
            modules = [name for name in within if is_module(name)]
            names = modules if len(modules) == len(within) else [node.module, *modules]
        yield from (name for name in names if name and name.split(".")[0] in TOPS)


def is_module(name):
    """Whether a dotted name is one of our files or packages."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_lower_layers(path):
    own = module_of(path)
    for name in imports(path):
        same_package = name.split(".")[0] == own.split(".")[0] and layer_of(name) == layer_of(own)
        if not same_package:
            assert layer_of(name) < layer_of(own), name


def test_there_are_no_circles():
    graph = {}
    for path in FILES:
        graph[module_of(path)] = set(imports(path))
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


def test_the_models_and_rules_need_torch_and_energy_alone():
    heavy = (
        "experiment ART_Timesteps_Addition art data_utils data_files baselines torchvision matplotlib "
        "sklearn scipy"
    ).split()
    code = (
        "import sys, model_utils as m; m.LEARN['EP'], m.P_CNN, m.Rule, m.check_gdu; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


def test_no_model_is_copied_and_no_private_kernel_called():
    for path in FILES:
        text = path.read_text()
        assert "copy.copy" not in text and "torch.ops.mkldnn" not in text, path.name


def test_names_are_those_of_the_implementations():
    """`energy.names` is read by the command line before torch is loaded."""
    assert names.ACTIVATIONS == tuple(activations.ACTIVATIONS)
    assert set(activations.CURVES) == set(activations.ACTIVATIONS.values())
    assert tuple(names.POOLINGS) == tuple(poolings.POOLS)


def test_names_of_models_and_rules_are_those_of_the_implementations():
    assert config.ENERGY_MODELS == tuple(model_utils.MODELS)
    assert rule.ALGORITHMS == tuple(model_utils.LEARN)


def test_names_of_attacks_are_those_of_the_implementations():
    """The command line reads them without torch."""
    assert attack_names.ATTACKS == tuple(attacks.BUILDERS)
    assert attack_names.GRADIENTS == tuple(gradients.METHODS)
    assert attack_names.BUDGETS == tuple(stages.BUDGETS)
    known = set(attack_names.ATTACKS)
    assert {*attack_names.WITH_QUERIES, *attacks.MINIMAL, *attacks.STANDARD_ENSEMBLE} <= known


def test_every_module_has_a_layer():
    """A new file or folder of code gets a layer here."""
    tops = {
        path.stem
        for path in ROOT.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert tops == TOPS


def test_public_functions_say_what_they_do():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_table_of_flags_is_that_of_the_code():
    """Made by `python -m experiment.flag_table > docs/flags.md`."""
    assert (ROOT / "docs" / "flags.md").read_text() == flag_table.text()
    assert all(f"| `--{flag.name}` |" in flag_table.text() for flag in ALL)
