"""Words of the command line: negative numbers, flags of another --todo, switches turned off."""

import json
import re
import shlex
import signal

import pytest
from conftest import ROOT, only_run

import main
import model_utils
from experiment import command_line
from experiment.command_line import MAIN_FLAGS, words_of
from experiment.config import FLAGS as ALL

TINY = (
    "--task digits --device -1 --archi 784 12 10 --T1 6 --T2 3 --train-size 40 --test-size 20 "
    "--seed 0"
)
BETAS = next(flag for flag in ALL if flag.name == "betas")
SWITCHES = [flag for flag in ALL if flag.kind is bool]


# ---- negative numbers


@pytest.mark.parametrize(
    "word, value",
    [
        ("-1e-3", -1e-3),
        ("-1.", -1.0),
        ("-.5", -0.5),
        ("-1/2", -0.5),
        ("-1E+0", -1.0),
        ("-1e-05", -1e-5),
        ("-1_0.5", -10.5),
        ("-8/255", -8 / 255),
        ("-1/-2", 0.5),
        ("-.1e1", -1.0),
        ("-0.01", -0.01),
        ("-3", -3.0),
    ],
)
def test_a_number_with_a_minus_sign_is_a_value(word, value):
    assert command_line.parse(["--betas", "0", word, "--T1", "5"], MAIN_FLAGS) == {
        "betas": [0.0, value],
        "T1": 5,
    }
    assert command_line.parse(["--betas", word, "0"], MAIN_FLAGS) == {"betas": [value, 0.0]}


@pytest.mark.parametrize(
    "words, said",
    [
        ("--betas 0 -inf", "argument --betas: got '-inf', expected a number"),
        ("--betas 0 -nan", "argument --betas: got '-nan', expected a number"),
        ("--betas 0 -Infinity", "argument --betas: got '-Infinity'"),
        ("--betas 0 -1/0", "argument --betas: got '-1/0', expected a number"),
        ("--betas 0 -1e", "argument --betas: got '-1e', expected a number"),
        ("--T1 -1e3", "argument --T1: got '-1e3', expected a whole number of at least 1"),
        ("--T1 -5", "argument --T1: got '-5', expected a whole number of at least 1"),
        ("--lrs -1e-3 0.1", "argument --lrs: got '-1e-3', expected a number of at least 0"),
        ("--mmt -.5", "argument --mmt: got '-.5', expected a number of at least 0 and at most 1"),
        ("--seeds 1 -2", "argument --seeds: got '-2'"),
        ("--device -1e0", "argument --device: got '-1e0', expected a whole number"),
        ("--act -1", "argument --act: got '-1', expected one of mysig"),
        ("-1e-3", "unrecognized arguments: -1e-3"),
        ("--betas 0 -x", "unrecognized arguments: -x"),
    ],
)
def test_a_negative_number_that_a_flag_does_not_take_is_named(cli, words, said):
    code, _, err = cli(words)
    assert code == 2 and err.count("\n") == 1 and said in err, err


def test_whatever_a_flag_takes_is_typed_so_that_it_is_read_again():
    values = {
        "betas": [-1e-05, -1e300],
        "lrs": [5e-324, 1e-07],
        "data_dir": "-x y",
        "eps": [8 / 255],
        "device": -1,
        "save": True,
        "check_thm": False,
        "no_clip": False,
        "T1": 7,
        "corruptions_dir": "-1",
    }
    words = [
        word for flag in ALL if flag.dest in values for word in words_of(flag, values[flag.dest])
    ]
    assert command_line.parse(words, MAIN_FLAGS) == values


@pytest.mark.parametrize("flag", SWITCHES, ids=lambda flag: flag.name)
def test_a_switch_that_is_off_is_typed_so_that_it_is_read_again(flag):
    for value in (True, False):
        assert command_line.parse(words_of(flag, value), MAIN_FLAGS) == {flag.dest: value}


@pytest.mark.parametrize("beta", ["-0.00001", "-1/3"])
def test_the_resume_line_works_as_printed(cli, ok, tmp_path, monkeypatch, beta):
    ok(TINY, "--betas 0 0.2 --save --check-thm")
    run = only_run(tmp_path).rename(tmp_path / "-run")
    with monkeypatch.context() as patch:
        patch.setattr(model_utils, "train", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        code, _, err = cli(f"--device -1 --load-path ./-run --betas 0 {beta} --no-check-thm")
    words = shlex.split(err.splitlines()[-1])
    assert code == 143 and words[:2] == ["python", "main.py"] and "--no-check-thm" in words
    assert command_line.parse(words[2:], MAIN_FLAGS)["betas"] == [
        0.0,
        command_line.convert(BETAS, beta),
    ]
    assert "from epoch 2 on" in ok(*words[2:]) and (run / "final_model.pt").exists()


# ---- flags of another --todo


OTHERS = [flag for flag in ALL if flag.todos and "train" not in flag.todos]


@pytest.mark.parametrize("flag", OTHERS, ids=lambda flag: flag.name)
def test_a_flag_of_another_todo_is_refused_where_no_todo_is_given(cli, flag):
    value = [] if flag.kind is bool else [flag.choices[0] if flag.choices else "1"]
    for rest in ("", "--load-path nowhere", "--save"):
        code, out, err = cli(TINY, rest, f"--{flag.name}", *value)
        assert code == 2 and not out and err.count("\n") == 1, err
        assert f"--{flag.name}" in err and any(f"--todo {todo}" in err for todo in flag.todos), err


def test_of_several_flags_the_todo_is_named_that_takes_them_all(cli):
    code, _, err = cli("--load-path RUN --attack-norm inf --eps 8/255")
    assert code == 2 and "--attack-norm" in err and "--eps" in err and "--todo audit" in err, err
    assert "--todo attack" not in err


def test_with_todo_train_they_have_no_effect_as_ever(cli):
    code, _, err = cli(TINY, "--todo train --attack pgd --eps-list 0.1 --labels x")
    assert code == 0, err
    assert all(
        f"note: --{name} has no effect on train" in err for name in ("attack", "eps-list", "labels")
    ), err


def test_every_command_of_the_documents_names_its_todo(cli):
    """As the program is started: what it says is that there is no such run, if anything."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "check").glob("*.sh")]:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(
            r"(?:main(?:_dropout)?\.py|^audit=\"\S+ \S+) ([^\n#\"]*)", text, re.M
        ):
            words = [word for word in line.split() if not re.search(r"[$({})<>`;|&]|\.\.\.", word)]
            used = {flag.name for flag in OTHERS if f"--{flag.name}" in words}
            assert not used or "--todo" in words, (path.name, line)


# ---- switches


def test_a_run_resumes_without_a_switch_that_it_was_trained_with(ok, tmp_path):
    ok(TINY, "--save --check-thm --thirdphase --deterministic --betas 0 0.2")
    run = only_run(tmp_path)
    out = ok(f"--device -1 --load-path {run} --no-check-thm --no-deterministic")
    assert "note: --no-check-thm (until now --check-thm)" in out
    assert "note: --no-deterministic (until now --deterministic)" in out and "thirdphase" not in out
    config = json.loads((run / "config.json").read_text())
    assert not config["check_thm"] and not config["deterministic"] and config["thirdphase"]
    out = ok(f"--device -1 --load-path {run}")  # what is not given is as it was
    assert not json.loads((run / "config.json").read_text())["check_thm"] and "check-thm" not in out


def test_of_a_switch_and_its_opposite_the_last_counts():
    def parsed(line):
        return command_line.parse(line.split(), MAIN_FLAGS)

    assert parsed("--check-thm --no-check-thm") == {"check_thm": False}
    assert parsed("--no-check-thm --check-thm") == {"check_thm": True}
    assert parsed("--no-clip --clip") == {"no_clip": False} and parsed("--clip --no-clip") == {
        "no_clip": True
    }
    assert parsed("--save --no-save") == {"save": False}


def test_what_the_saved_run_decides_is_said_in_words_that_can_be_typed(cli, ok, tmp_path):
    ok(TINY, "--save --loss cel --softmax --lr-decay")
    code, _, err = cli(f"--device -1 --load-path {only_run(tmp_path)} --no-softmax --no-lr-decay")
    assert (
        code == 0
        and "the saved run determines --softmax (not --no-softmax), --lr-decay (not --no-lr-decay)"
        in err
    )


def test_a_switch_without_effect_is_named_as_it_was_given(cli, ok, tmp_path):
    ok(TINY, "--save")
    code, _, err = cli(
        f"--todo evaluate --device -1 --load-path {only_run(tmp_path)} --no-check-thm --clip"
    )
    assert code == 0 and "note: --no-check-thm has no effect on evaluate" in err
    assert "note: --clip has no effect on evaluate" in err


def test_help_names_the_opposite_of_every_switch(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--no-check-thm" in text and "--no-softmax" in text and "--clip" in text
