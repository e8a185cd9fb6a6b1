"""README and docs: links lead somewhere, every command is one that the suite accepts without a
note, and those of the README run."""

import re
import shlex
import textwrap

import pytest
import torch
from conftest import ROOT
from shared import AUDIT_BUDGET

import main
import main_dropout
from ART_Timesteps_Addition.audit import stages
from experiment import command_line, validate
from experiment.results import record, store

README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "results/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = {"main.py": main.FLAGS, "main_dropout.py": main_dropout.FLAGS}


def name_of(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------- links


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), (target, anchor)
    for word in re.findall(r"(?:check/[\w.]+\.sh|benchmarks/[\w.]+|tests/[\w./]+\.py)", text):
        assert (ROOT / word).exists(), word


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


# ---------------------------------------------------------------------------------------- commands


def code_of(text):
    """The lines of code blocks, indented or fenced, and the commands between backticks."""
    fences = re.compile(r"^```\w+\n(.*?)^```$", re.M | re.S)
    yield from "".join(fences.findall(text)).splitlines()
    rest = fences.sub("", text)
    yield from (line.strip() for line in rest.splitlines() if line.startswith("    "))
    yield from re.findall(r"`((?:python|torchrun) [^`]*)`", rest)


def commands_of(path):
    """[(program, words)] of the command lines of a page, with the variables that it assigns."""
    variables = {"seed": "1"}  # of the tasks of a batch system
    found = []
    text = path.read_text().replace("\\\n", " ").replace('"${eps[SLURM_ARRAY_TASK_ID]}"', "1")
    for line in code_of(text):
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        assigned = re.fullmatch(r'(\w+)="(.*)"', line)
        command = re.search(r"\b(main(?:_dropout)?\.py) (-.*)", line)
        if assigned:
            variables[assigned[1]] = assigned[2]
        elif command and "--help" not in line:
            words = re.sub(r'"\$@"|\.\.\.| &$', "", command[2])
            found.append((command[1], shlex.split(words, comments=True)))
    return found


COMMANDS = [(path, *command) for path in PAGES for command in commands_of(path)]
SAVED = "--task CIFAR10 --model CNN --data-aug"  # what runs of --load-path were trained with


@pytest.fixture
def accepted(tmp_path, monkeypatch, capsys):
    """Asserts that the suite accepts a command line, without a note: goes through all that main.py
    does before it loads a model."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "results/EP/mse/day/time_cpu"
    run.mkdir(parents=True)
    (run / "model.pt").touch()

    def work(given, *_, **options):
        if given.get("todo") != "compare":
            trained = command_line.parse(SAVED.split())
            saved = command_line.resolve(trained).flat() if "load_path" in given else None
            config = command_line.resolve(given, saved)
            validate.validate(config)
            assert not list(validate.notes(config, given))
        return 0

    monkeypatch.setattr(main, "work", work)
    monkeypatch.setattr("experiment.seeds.train_each", lambda given, words, start: start(given, []))
    monkeypatch.setattr("experiment.study.Study.do", lambda study, start: 0)

    def check(program, words):
        code = main.main(words, PROGRAMS[program], program)
        err = capsys.readouterr().err
        assert (code, err) == (0, "")

    return check


@pytest.mark.parametrize(
    "path, program, words",
    COMMANDS,
    ids=[f"{name_of(p)} {n}" for n, (p, *_) in enumerate(COMMANDS)],
)
def test_every_command_is_accepted(accepted, path, program, words):
    accepted(program, words)


def test_pages_have_commands():
    """That `commands_of` finds them."""
    counts = {name_of(path): len(commands_of(path)) for path in PAGES}
    assert counts["README.md"] >= 10
    assert counts["docs/recipes.md"] >= 10
    assert counts["docs/clusters.md"] >= 5
    assert counts["docs/learning_rules.md"] >= 8


TINY = "--device -1 --test-size 10 --mbs 10"
STEPS = "--T1 4 --T2 2"
TRAINING = f"{TINY} {STEPS} --task digits --train-size 40 --epochs 1"
SMALLER = {  # what makes a command small, by its --todo
    "train": TRAINING,
    "study": f"{TRAINING} --val-size 10 --seeds 1 --eps 1 --attack-iters 2",
    "attack": f"{TINY} --attack-iters 2 --attack-step 2",
    "audit": f"{TINY} --attack-step 2",
    "gducheck": f"--device -1 --task digits --mbs 10 {STEPS}",
    "compare": "",
}


def test_the_record_of_the_documentation_is_one(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "results/README.md").read_text(), re.M)
    example, program = (
        next(textwrap.dedent(block) for block in blocks if word in block)
        for word in ('"kind": "attack",', "import Store")
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    store.Store("RUN").add(record.Record.from_json(example))
    exec(program, {})
    assert "'attack': 'pgd'" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_the_readme_run(cli, tmp_path, monkeypatch):
    """One after another, with tiny settings: RUN is the first run."""
    monkeypatch.setitem(stages.BUDGETS, "quick", AUDIT_BUDGET)
    for program, words in commands_of(README):
        given = command_line.parse(words, PROGRAMS[program])
        smaller = SMALLER[given.get("todo", "train")]
        if "load_path" in given and "todo" not in given:
            smaller = "--device -1 --epochs 1"  # the run's own settings
        if "RUN" in words:
            run = min(
                tmp_path.glob("results/*/*/*/*/model.pt"), key=lambda file: file.stat().st_mtime
            )
            words = [str(run.parent) if word == "RUN" else word for word in words]
        code, _, err = cli(*words, *smaller.split(), flags=PROGRAMS[program], name=program)
        assert code == 0, (words, err)


def test_the_python_of_the_readme_runs():
    code = re.findall(r"^    (from model_utils import .*?)^\n", README.read_text(), re.M | re.S)
    (lines,) = ("\n".join(line.strip() for line in part.splitlines()) for part in code)
    names = {"x": torch.rand(4, 1, 28, 28), "y": torch.randint(10, (4,))}
    exec(lines, names)
    assert all(p.grad is not None for p in names["model"].parameters())


@pytest.mark.parametrize("begin", ["import torch", "import model_utils"])
def test_the_python_of_the_recipes_runs(begin, zoo, monkeypatch):
    blocks = re.findall(r"(?:^    .*\n)+", (ROOT / "docs/recipes.md").read_text(), re.M)
    (code,) = (block for block in map(textwrap.dedent, blocks) if block.startswith(begin))
    run = repr(str(zoo("few digits")))
    exec(re.sub(r'load_run\(".*?"\)', lambda _: f"load_run({run})", code), {})
