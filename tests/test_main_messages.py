"""What a researcher meets first: which model is examined, how a run goes on, flags that do nothing,
start-up, and a run used from Python."""

import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, ZOO, only_run

import main
import model_utils as mu
from data_utils import UserError, load_split
from experiment import command_line, console, devices, launch, timing, validate
from experiment.config import FLAGS as ALL
from experiment.config import TODOS
from experiment.results.training import describe_best
from experiment.runs.history import History

TINY = ZOO["tiny"]


def rows(run):
    return run.joinpath("metrics.csv").read_text().splitlines()


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    """A run folder to look at."""
    return zoo.copy("tiny", tmp_path_factory.mktemp("run"))


# ---- which model is examined


def test_the_best_model_is_chosen_on_images_held_out(ok, cli, tmp_path):
    ok(TINY, "--val-size 10 --epochs 4")
    run = only_run(tmp_path)
    header, *table = rows(run)
    assert header.startswith("epoch,train_acc,test_acc,seconds,val_acc")
    val = [float(row.split(",")[4]) for row in table]
    saved = torch.load(run / "model.pt", weights_only=True)
    assert saved["epoch"] == 1 + val.index(max(val)) and saved["best"] == max(val)
    out = ok(f"--todo evaluate --device -1 --load-path {run}")
    assert f"validation accuracy {max(val):.2f} % (10 images)" in out and "(50 images)" in out
    assert "the best on 10 validation images" in out
    code, _, err = cli(TINY, "--val-size 60")
    assert code == 2 and "--val-size: got 60, expected fewer than the 60 training images" in err


def test_images_held_out_are_the_last_ones_and_not_trained_on(ok, monkeypatch):
    found = {}

    def train(model, optimizer, train, test, args, val_batches, history, **_):
        found.update(train=train, val=val_batches)
        history.epochs.append({"epoch": 1, "test_acc": 0.0, "val_acc": 0.0})

    monkeypatch.setattr(mu, "train", train)
    ok(TINY, "--val-size 10")
    images = load_split("digits", "", True, 60)[0]
    assert torch.equal(found["train"].images, images[:50]) and torch.equal(
        found["val"].images, images[50:]
    )


def test_any_file_of_a_run_can_be_examined(ok, cli, trained):
    for name, chosen in (
        ("model.pt", "the best on the test images"),
        ("final_model.pt", "the last of its training"),
        ("checkpoint.tar", "the latest"),
    ):
        out = ok(f"--todo evaluate --device -1 --load-path {trained / name}")
        assert f"evaluated {trained / name} (epoch 1, {chosen})" in out
    code, _, err = cli(f"--todo evaluate --device -1 --load-path {trained / 'metrics.csv'}")
    assert code == 2 and err.count("\n") == 1


def test_every_result_says_what_was_examined(ok, trained):
    ok(
        f"--todo attack --device -1 --load-path {trained} --eps-list 0.1 --attack-iters 1 --attack-step 2"
    )
    ok(f"--todo characteristic --device -1 --load-path {trained}")
    for file in ("Adversarial_Accuracy.txt", "Characteristic_Time.txt"):
        assert "model.pt (epoch 1, the best on the test images)" in (trained / file).read_text()


# ---- a resumed run


def test_arguments_that_differ_are_told_one_by_one(ok, tmp_path):
    ok(TINY)
    run = only_run(tmp_path)
    out = ok(f"--device -1 --load-path {run} --T1 9 --mbs 30")
    assert "note: --T1 9 (until now 8)" in out and "note: --mbs 30 (until now 20)" in out
    for name in ("checkpoint.tar", "final_model.pt"):
        assert torch.load(run / name, weights_only=True)["resumptions"] == {
            2: "--mbs 30 (until now 20); --T1 9 (until now 8)"
        }


def test_accuracies_on_other_images_do_not_replace_the_best_model(ok, tmp_path, monkeypatch):
    """Of four images all may be right by chance: that is no better model."""
    ok(TINY, "--epochs 3")
    run = only_run(tmp_path)
    best = torch.load(run / "model.pt", weights_only=True)["model_state_dict"]
    model = mu.load_run(run / "model.pt", "cpu")
    images, labels = load_split("digits", "", False, 4)
    right = 100 * (model.predict(images) == labels).double().mean().item()
    ok(f"--device -1 --load-path {run} --test-size 4 --lrs 0 0")
    after = torch.load(run / "checkpoint.tar", weights_only=True)
    assert after["best"] == max(right, after["history"][-1]["test_acc"])
    kept = torch.load(run / "model.pt", weights_only=True)
    assert (kept["epoch"] == 4) == (after["history"][-1]["test_acc"] > right)
    if kept["epoch"] < 4:
        assert all(
            torch.equal(best[name], weight) for name, weight in kept["model_state_dict"].items()
        )


def test_without_save_a_line_says_that_nothing_is_kept(ok):
    assert "this run is not saved (use --save)" in ok(TINY.replace("--save", ""))


# ---- the end of a command


def test_a_training_ends_with_its_best_model_and_the_next_command(ok, tmp_path):
    out = ok(TINY, "--epochs 3")
    run = only_run(tmp_path)
    *_, time, best, following = out.splitlines()
    saved = torch.load(run / "model.pt", weights_only=True)
    row = saved["history"][-1]
    assert time.startswith("time: ")
    assert best == (
        f"best model: epoch {saved['epoch']} of 3, chosen on the test images: test accuracy "
        f"{row['test_acc']:.2f} %, {row['converged']:.2f} % converged; "
        f"{run.relative_to(tmp_path)}/model.pt"
    )
    words = shlex.split(following.removeprefix("next: "))
    assert words[:2] == ["python", "main.py"] and words[-2:] == ["--device", "-1"]
    assert words[4:10] == [
        *("--load-path", str(run.relative_to(tmp_path))),
        *("--attack-norm", "inf", "--eps-list", "8/255"),
    ]
    assert "eps 8/255" in ok(*words[2:], "--attack-iters 1 --attack-step 2 --test-size 4")


def test_adversarial_training_proposes_the_attack_that_it_trained_against(ok):
    out = ok(TINY, "--adv-train 1/2 --adv-norm 2 --adv-iters 1 --adv-step 1")
    assert "--attack-norm 2 --eps-list 0.5" in out.splitlines()[-1]


def test_an_attack_prints_what_it_measures_and_what_was_recorded(ok, trained):
    line = (
        f"--todo attack --device -1 --load-path {trained} --attack-norm inf --eps-list 1/2 "
        "--attack-grad bptt ep --attack-step 1 2 --attack-iters 1 --test-size"
    )

    def lines(images):
        out = ok(line, images).splitlines()
        return [line for line in out if not line.lstrip().startswith("warning: ")]

    first, *rows, result, following = lines("8")
    assert first.startswith(f"{trained}/model.pt (epoch ")
    assert "unrolled through 1 and 2 steps" in first
    assert [row.split(", ")[1].split(":")[0] for row in rows] == [
        *("bptt@1", "bptt@2", "ep@1", "ep@2", "worst")
    ]
    assert result.endswith(f"results are in {trained}/Adversarial_Accuracy_pgd_inf.txt")
    assert following.split()[-6:-2] == ["--eps", "0.5", "--test-size", "8"]
    assert lines("8")[1:] == [
        *(f"{row} (recorded)" for row in rows),
        *(result, following),
    ]
    *_, note, _, _ = lines("4")
    assert note == (
        "note: Adversarial_Accuracy_pgd_inf.txt shows these settings alone; "
        "Adversarial_Accuracy_pgd_inf.csv and results.jsonl have those of other settings too"
    )


def test_an_interrupted_attack_reports_what_is_complete(cli, trained, monkeypatch):
    line = (
        f"--todo attack --device -1 --load-path {trained} --eps-list 0.5 1 --attack fgsm "
        "--attack-norm 2 --attack-step 2 --attack-grad ep --test-size 4"
    )
    attack = mu.attack
    for most, complete in ((0, "no eps is complete"), (0.5, "1 of 2 eps are complete")):

        def interrupted(*args, most=most):
            return attack(*args) if args[4] <= most else signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(mu, "attack", interrupted)
        code, _, err = cli(line)
        assert code == 143
        assert err.endswith(f"interrupted; {complete}; the same command resumes\n")


def test_the_best_model_of_a_training_is_described_as_it_was_chosen():
    rows = [
        {"epoch": 1, "test_acc": 80.0, "val_acc": 90.0, "converged": 99.5},
        {"epoch": 2, "test_acc": 85.0, "val_acc": 90.0, "converged": ""},
    ]
    assert describe_best(History(rows, best_accuracy=90.0), {"val_size": 10}, None) == (
        "best model: epoch 1 of 2, chosen on 10 validation images: validation accuracy 90.00 %, "
        "test accuracy 80.00 %, 99.50 % converged; this run is not saved (use --save)"
    )
    # on the test images of a resumption it has another accuracy than on those of its epoch
    resumed = History(rows, best={"history": rows[:1]}, best_accuracy=70.0)
    assert describe_best(resumed, {"val_size": None}, "run") == (
        "best model: epoch 1 of 2, chosen on the test images: test accuracy 70.00 %, 99.50 % "
        "converged; run/model.pt"
    )


def test_the_next_command_is_started_as_its_task_needs(monkeypatch):
    program = ["torchrun", "--standalone", "--nproc_per_node", "2", "main.py"]
    environment = dict.fromkeys(launch.TORCHRUN, "1") | {"WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = "torchrun --standalone --nproc_per_node 2 main.py"
    found = console.next_line(program, {}, "attack", "a run", "--eps-list", "8/255")
    assert found == f"next: {started} --todo attack --load-path 'a run' --eps-list 8/255"
    found = console.next_line(program, {"device": -1}, "characteristic", "-run")
    assert found == "next: python main.py --todo characteristic --load-path=-run --device -1"


# ---- flags that do nothing


def given(flag):
    """Words that give a flag another value than its default."""
    value = (
        flag.choices[-1]
        if flag.choices
        else {int: "2", float: "0.5", str: "i", bool: ""}[flag.kind]
    )
    value = (
        f"0 {value}" if flag.many and flag.kind is float else value
    )  # as many as the run has layers
    value = {"lr-step": "1 0.5", "alg": "BPTT"}.get(flag.name, value)
    return f"--{flag.name} {value}"


@pytest.mark.parametrize("todo", [t for t in TODOS if t not in ("corruptions", "compare", "study")])
def test_a_flag_without_effect_changes_nothing_and_says_so(cli, trained, todo):
    idle = [
        flag
        for flag in ALL
        if flag.todos
        and todo not in flag.todos
        # another program's; a GPU's; refused
        and flag.name not in ("dropouts", "compile", "precision", "eps", "eps-list")
    ]
    start = (
        f"--todo {todo} --device -1 --load-path {trained} --test-size 20"
        if todo != "train"
        else TINY.replace("--save", "--todo train")
    )
    small = {
        "attack": "--eps-list 0.1 --attack-iters 1 --attack-step 2 --seed 1",
        "gducheck": "",
        "audit": "--eps 0.5 --budget quick --test-size 2 --attack-step 2 --seed 1",
    }.get(todo, "")
    plain = cli(start, small)
    for file in [*trained.glob("results.jsonl"), *trained.glob("Audit_*")]:
        file.unlink()
    code, out, err = cli(start, small, *map(given, idle))
    assert code == plain[0] == 0, err
    for flag in idle:
        assert f"--{flag.name} has no effect on {todo}" in err, flag.name
    timeless = [
        re.sub(r"[\d.]+ s|[\d.]+ images/s|\(\d+ %\)|_\d+", "", text) for text in (plain[1], out)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "model, other", [("MLP", "CNN"), ("VFMLP", "VFCNN"), ("CNN", "MLP"), ("VFCNN", "VFMLP")]
)
def test_flags_of_another_model_say_so(model, other):
    words = ["--task", "digits", "--model", model, "--save"]
    for flag in ALL:
        if flag.models and flag.name != "dropouts":
            values = command_line.parse([*words, *given(flag).split()], main.FLAGS)
            notes = list(validate.notes(command_line.resolve(values), values))
            said = any(f"--{flag.name} has no effect on {model}" in note for note in notes)
            assert said == (model not in flag.models)


def test_no_flag_that_has_an_effect_is_said_to_have_none():
    for todo in TODOS:
        for flag in ALL:
            if (
                (not flag.todos or todo in flag.todos)
                and not flag.models
                and flag.name not in ("dropouts", "load-path", "todo", "random-sign", "thirdphase")
            ):
                words = ["--todo", todo, "--save", *given(flag).split()]
                words += (
                    ["--adv-train", "0.5"]
                    if flag.name.startswith("adv-") and flag.name != "adv-train"
                    else []
                )
                values = {
                    **command_line.parse(words[:2], main.FLAGS),
                    **command_line.parse(words[2:], main.FLAGS),
                }
                args = command_line.resolve(values)
                args = args.replace(
                    alg="EP", optim="sgd", schedule="sync", attack="pgd", task="CIFAR10"
                )
                values.pop("save", None) if flag.name != "save" else None
                assert not [
                    note for note in validate.notes(args, values) if f"--{flag.name} " in note
                ], (todo, flag.name)


@pytest.mark.parametrize(
    "words, meant",
    [
        ("--epoch 3", "--epochs"),
        ("--learning-rate 0.1", "--lrs"),
        ("-lr 0.1", "--lrs"),
        ("--learning_rates 1 --epoch 3", "--lrs and --epochs"),
        ("--batch-size 20", "--mbs"),
        ("--momentum 0.9", "--mmt"),
        ("--weight_decay 0", "--wds"),
        ("--epsilon 8/255", "--eps-list"),
        ("--output-dir runs", "--run-dir"),
        ("--t1 20", "--T1"),
        ("--load_path run", "--load-path"),
        ("--nosave", "--no-save"),
        ("attack --load-path run", "--todo attack"),
    ],
)
def test_an_unknown_flag_names_the_one_that_is_meant(cli, words, meant):
    code, _, err = cli(words)
    unknown = words.removesuffix(" --load-path run")
    assert code == 2
    assert err.endswith(f"unrecognized arguments: {unknown}; did you mean {meant}?\n")


@pytest.mark.parametrize(
    "words, meant",
    [
        ("--model cnn", "CNN"),
        ("--model VF-CNN", "VFCNN"),
        ("--task cifar-10", "CIFAR10"),
        ("--task fashion_mnist", "FashionMNIST"),
        ("--todo atack", "attack"),
        ("--todo test", "evaluate"),
        ("--attack PGD", "pgd"),
        ("--attack-norm linf", "inf"),
        ("--loss cross_entropy", "cel"),
        ("--alg bp", "BP"),
        ("--attack AA", "autoattack"),
    ],
)
def test_an_unknown_value_names_the_one_that_is_meant(cli, words, meant):
    code, _, err = cli(words)
    assert code == 2 and "expected one of " in err and err.endswith(f"; did you mean {meant}?\n")


def test_nothing_is_suggested_for_what_is_like_no_flag(cli):
    for words in ("--zzzzzz", "--task zzzzzz"):
        code, _, err = cli(words)
        assert code == 2 and "did you mean" not in err


def test_every_synonym_is_of_a_flag_or_a_value():
    assert set(command_line.SYNONYMS.values()) <= {flag.name for flag in ALL}
    choices = {choice for flag in ALL for choice in flag.choices or ()}
    assert set(command_line.VALUE_SYNONYMS.values()) <= choices
    assert not choices & command_line.VALUE_SYNONYMS.keys()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "--model CNN --lrs 0.1 0.2",
            "--lrs: got 2 values (0.1 0.2), expected 3: conv 1, conv 2, dense 1",
        ),
        (
            "--model VFCNN --fc 20 10 --wds 0 --loss cel --softmax",
            "--wds: got 1 value (0.0), expected 4: conv 1, conv 2, dense 1, dense 2",
        ),
        ("--lrs 0.1", "--lrs: got 1 value (0.1), expected 2: dense 1, dense 2"),
        ("--model ViT --lrs 1 2", "--lrs: got 2 values (1.0 2.0), expected 1: one for all layers"),
    ],
)
def test_a_list_of_the_wrong_length_names_the_layer_of_each_number(cli, words, said):
    code, _, err = cli("--task digits --alg BP" if "ViT" in words else "--task digits", words)
    assert code == 2 and err.endswith(f"argument {said}\n")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--todo attack --attack-norm inf --eps-list 8", "--eps-list 8/255?"),
        ("--todo attack --attack-norm inf --eps-list 0 0.01 2 8", "--eps-list 0 0.01 2/255 8/255?"),
        ("--todo audit --attack-norm inf --eps 8", "--eps 8/255?"),
        ("--todo train --adv-norm inf --adv-train 4.5", "--adv-train 4.5/255?"),
    ],
)
def test_an_eps_of_grey_values_asks_for_the_fraction(cli, words, said):
    code, _, err = cli("--load-path nowhere", words)
    assert code == 2 and "expected at most 1 with --" in err
    assert err.endswith(f"norm inf: images are in [0, 1]; did you mean {said}\n")


def test_a_large_eps_of_the_2_norm_is_accepted(cli):
    assert "expected at most" not in cli("--todo attack --load-path nowhere --eps-list 8")[2]
    err = cli("--todo attack --load-path nowhere --attack-norm inf --eps-list 1 1000")[2]
    assert "expected at most 1" in err and "did you mean" not in err
    assert "no folder" in cli("--todo attack --load-path x --attack-norm inf --eps-list 1")[2]


@pytest.mark.parametrize("words", ["--todo attack --attack-grad smooth", "--adv-grad smooth"])
def test_smooth_is_noted_as_bptt_on_a_network_without_saturation(words):
    for model in ("FFMLP", "MLP"):
        values = command_line.parse([*words.split(), "--model", model], main.FLAGS)
        notes = list(validate.notes(command_line.resolve(values), values))
        noted = [note for note in notes if "differs from bptt in its loss alone" in note]
        assert len(noted) == (model == "FFMLP")


@pytest.mark.parametrize("text, value", [("8/255", 8 / 255), ("1/2", 0.5), ("0.25", 0.25)])
def test_eps_can_be_fractions(text, value):
    assert command_line.parse(["--eps-list", text], main.FLAGS) == {"eps_list": [value]}


@pytest.mark.parametrize("text", ["8/0", "1/2/3", "/2", "a/b"])
def test_what_is_no_fraction_is_refused(cli, text):
    code, _, err = cli("--eps-list", text)
    assert code == 2 and f"--eps-list: got '{text}'" in err


@pytest.mark.parametrize(
    "task, first, last", [("CIFAR10", 3072, 10), ("CIFAR100", 3072, 100), ("MNIST", 784, 10)]
)
def test_sizes_come_from_the_task_where_no_flag_says_them(task, first, last):
    args = command_line.resolve({"task": task})
    assert args.model.archi == (first, 512, last)
    assert args.model.fc == (last,)
    validate.validate(args)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--version"])
    out = capsys.readouterr().out
    assert not end.value.code and re.search(r" 0\.\d+\.\d+, git revision \S+\n$", out)


@pytest.mark.parametrize(
    "device, meant", [("cpu", "-1"), ("gpu", "0"), ("cuda", "0"), ("cuda:1", "1")]
)
def test_a_device_as_pytorch_names_it_is_explained(cli, device, meant):
    code, _, err = cli("--device", device)
    assert code == 2 and err.endswith(f"; did you mean --device {meant}?\n")


def test_a_missing_gpu_is_noted_once(cli, trained, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    devices._note_missing_gpu.cache_clear()
    line = f"--todo evaluate --load-path {trained} {trained / 'final_model.pt'}"
    code, out, err = cli(line)
    assert code == 0 and out.count("evaluated ") == 2 and err.count("no CUDA device found") == 1


def test_a_path_that_does_not_exist_suggests_the_nearest(cli, trained):
    wrong = trained.with_name(trained.name + "x")
    code, _, err = cli(f"--todo evaluate --device -1 --load-path {wrong}")
    assert code == 2 and err.endswith(f"is no folder and no file; did you mean {trained}?\n")
    code, _, err = cli(f"--todo evaluate --device -1 --load-path {trained.parent}x/y")
    assert code == 2 and f"did you mean {trained.parent}?" in err


def test_a_wrong_surrogate_is_named_before_the_first_audit(cli, trained, tmp_path):
    line = f"--todo audit --device -1 --eps 1 --load-path {trained} {trained / 'final_model.pt'}"
    code, out, err = cli(line, "--surrogate nope")
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert "argument --surrogate: nope is no folder and no file" in err
    code, _, err = cli(line, f"--surrogate {tmp_path}")
    assert code == 2 and f"argument --surrogate: {tmp_path} has no model.pt" in err
    assert "--load-path" not in err


@pytest.mark.parametrize("name", ["square", "hopskipjump"])
def test_attacks_without_a_gradient_have_no_gradient_in_their_rows(ok, trained, name):
    out = ok(
        f"--todo attack --device -1 --load-path {trained} --attack {name} --eps-list 0.5 --attack-iters 1 "
        "--test-size 4 --attack-grad bptt ep"
    )
    assert "bptt" not in out and "gradients" not in out
    table = (trained / f"Adversarial_Accuracy_{name}_2.csv").read_text()
    assert table.splitlines()[1].split(",")[1] == name and len(table.splitlines()) == 2


def test_bars_leave_no_fragments_in_a_log_file(monkeypatch, capsys):
    monkeypatch.setattr(timing, "LOG_SECONDS", 0.0)
    for _ in timing.progress(range(3), "evaluating"):
        pass
    text = capsys.readouterr().err
    assert "\r" not in text and all(line.startswith("evaluating") for line in text.splitlines())
    assert text.count("\n") >= 1 and text.endswith("\n")


# ---- start-up


COUNT = """
import sys
sys.path.insert(0, {root!r})
import main
try:
    code = main.main({words!r})
except SystemExit as e:
    code = e.code
slow = {{"torch", "torchvision", "matplotlib", "art", "sklearn"}}
print(*sorted({{name.split(".")[0] for name in sys.modules}} & slow), code)
"""


@pytest.mark.parametrize(
    "words, loaded",
    [
        (["--help"], "0"),
        (["--epoch", "3"], "2"),
        (["--T1", "x"], "2"),
        (["--lrs", "1"], "2"),
        (["--todo", "evaluate"], "2"),
        (["--load-path", "missing", "--device", "-1"], "torch 2"),
    ],
)
def test_what_a_command_loads(tmp_path, words, loaded):
    code = COUNT.format(root=str(ROOT), words=words)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == loaded, done.stderr


@pytest.mark.slow
def test_a_training_on_digits_without_save_loads_no_figures(tmp_path):
    words = TINY.replace("--save", "").split()
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(root=str(ROOT), words=words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "sklearn torch 0", done.stderr


# ---- from Python


def test_runs_can_be_kept_in_a_set(trained):
    run = mu.load_run(trained, "cpu")
    assert run in {run}


def test_a_run_predicts_from_python(ok, trained):
    run = mu.load_run(trained, "cpu")
    images, labels = load_split("digits", "", False, 20)
    accuracy = float(
        re.search(
            r"test accuracy (\S+) %", ok(f"--todo evaluate --device -1 --load-path {trained}")
        )[1]
    )
    found = run.predict(images)
    assert found.dtype == torch.int64 and 100 * (
        found == labels
    ).double().mean().item() == pytest.approx(accuracy)
    for same in (images.float() / 255, images.numpy(), images.numpy() / 255):
        assert torch.equal(run.predict(same), found)
    assert run.predict(images[:0]).shape == (0,) and run.args.T1 == 8 and "model.pt" in run.source
    for wrong, word in (
        (images.float(), "0, 1"),
        (images[:, 0], "expected"),
        (images.int(), "uint8"),
    ):
        with pytest.raises(ValueError, match=word):
            run.predict(wrong)


def test_a_run_gives_arts_classifier(trained):
    from art.attacks.evasion import DeepFool

    run = mu.load_run(trained, "cpu")
    images, _ = load_split("digits", "", False, 6)
    x = (images.float() / 255).numpy()
    classifier = run.classifier()
    assert (
        classifier.predict(x).argmax(1) == run.predict(images).numpy()
    ).all() and classifier.T1 == 8
    assert run.classifier(T1=3, grad="smooth").T1 == 3
    moved = DeepFool(classifier, max_iter=5, verbose=False).generate(x)
    assert moved.shape == x.shape and 0 <= moved.min() and moved.max() <= 1 and (moved != x).any()


def test_a_model_asks_for_its_number_of_steps(trained):
    with pytest.raises(ValueError, match="T, the number of time steps, is needed"):
        mu.load_run(trained, "cpu").model(torch.zeros(1, 1, 28, 28))


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "--todo attack --load-path x --eps 8/255",
            "--eps: not used by --todo attack; use --eps-list 8/255",
        ),
        (
            "--todo audit --load-path x --eps-list 0.5 1",
            "--eps-list: not used by --todo audit; use --eps 0.5",
        ),
        ("--todo audit --load-path x", "--todo audit needs --eps 8/255, for example"),
        ("--dropouts 1 1", "a flag of main_dropout.py"),
    ],
)
def test_slips_are_answered_before_any_work(cli, words, said):
    code, _, err = cli(words)
    assert code == 2 and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    "words, exceeding",
    [
        ("--todo attack --attack-step 10 40 --T1 20", ["--attack-step 40 exceeds the 20 steps"]),
        (
            "--todo attack --attack-step 40 --predict-step 1",
            ["--attack-step 40 exceeds the 1 step"],
        ),
        ("--todo audit --attack-step 40", ["--attack-step 40 exceeds the 20 steps"]),
        ("--todo attack --attack-step 20 --T1 20", []),
        ("--todo attack --T1 4", []),
        ("--todo attack --attack-step 40 --attack square", []),
        ("--todo attack --attack-step 40 --attack-grad ep", []),
        ("--todo attack --attack-step 40 --model FFMLP", []),
        ("--todo evaluate --attack-step 40", []),
    ],
)
def test_more_attack_steps_than_a_prediction_takes_are_noted(words, exceeding):
    values = command_line.parse(words.split(), main.FLAGS)
    notes = validate.notes(command_line.resolve(values), values)
    found = [note for note in notes if "of a prediction" in note]
    assert [note.partition(" of a prediction")[0] for note in found] == exceeding


def test_models_of_a_note_are_listed_as_in_a_sentence():
    values = command_line.parse("--task digits --model FFMLP --T1 3".split(), main.FLAGS)
    (note,) = validate.notes(command_line.resolve(values), values)
    assert note == "--T1 has no effect on FFMLP, only on MLP, VFMLP, CNN and VFCNN"


def test_what_is_no_run_is_refused_from_python():
    for path in (None, 3):
        with pytest.raises(UserError, match=f"path is {path}, expected a run folder"):
            mu.load_run(path)


def test_an_error_about_a_folder_of_runs_names_them(cli, tmp_path):
    runs = tmp_path / "runs"
    (runs / "empty").mkdir(parents=True)
    (runs / "empty/model.pt").symlink_to("nowhere")
    code, _, err = cli("--todo evaluate --load-path runs")
    assert code == 2 and err.endswith("runs has no model.pt or checkpoint.tar\n")
    for name in ("ff", "EP/mse/day"):
        (runs / name).mkdir(parents=True)
        (runs / name / "model.pt").touch()
    named = "; name one of its runs: runs/EP/mse/day, runs/ff$"
    with pytest.raises(UserError, match="runs has no model.pt or checkpoint.tar" + named):
        mu.load_run("runs")
    assert cli("--load-path runs")[2].endswith("runs has no checkpoint.tar\n")
    for name in "abcdef":
        (runs / name).mkdir()
        (runs / name / "checkpoint.tar").touch()
    code, _, err = cli("--load-path runs")
    named = "; name one of its runs: runs/a, runs/b, runs/c, runs/d, runs/e ...\n"
    assert code == 2 and err.endswith("runs has no checkpoint.tar" + named)
