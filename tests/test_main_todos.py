"""--todo characteristic and --todo corruptions."""

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import only_run, tiers
from make_cifar import write_cifar, write_corruptions
from shared import records, start

import data_utils
import main
import model_utils as mu
from data_utils import CORRUPTIONS
from energy.dynamics import relative_change
from experiment import inference
from experiment.results.record import unpack
from experiment.results.store import Store

# --------------------------------------------------------------------------------------------------
# characteristic

MODELS = {
    "MLP": "--archi 784 32 10 --betas 0 0.2 --lrs 1e-3 1e-3",
    "CNN": "--model CNN --channels 4 6 --act my_hard_sig --loss cel --softmax --betas 0 1 --lrs 5e-3 5e-3 5e-3",
    "VFCNN": "--model VFCNN --channels 4 6 --act my_hard_sig --loss cel --betas 0 1 --lrs 5e-3 5e-3 5e-3",
}


def table(path):
    return np.array(
        [line.split() for line in path.read_text().splitlines() if not line.startswith("#")],
        dtype=float,
    )


@pytest.mark.usefixtures("full_figures")
@pytest.mark.parametrize("model", tiers(MODELS, "MLP"))
def test_characteristic_agrees_with_evaluate(ok, tmp_path, model):
    ok(
        "--task digits --device -1 --train-size 600 --T1 12 --T2 4 --thirdphase --optim adam --seed 0 --save",
        MODELS[model],
    )
    run = only_run(tmp_path)
    common = f"--device -1 --load-path {run} --train-size 1 --test-size 237 --mbs 50"
    out = ok("--todo characteristic --T1 40", common)
    rows = table(run / "Characteristic_Time.txt")
    columns = (
        4 if model.startswith("VF") else 5
    )  # the residual is behind those, and the energy where there is one
    assert (
        rows.shape == (40, columns)
        and (rows[:, 0] == range(1, 41)).all()
        and (run / "Characteristic_Time.png").stat().st_size > 5000
    )
    first = (run / "Characteristic_Time.txt").read_text().splitlines()[0]
    assert all(word in first for word in ("# model.pt", "T1 = 40", "237 test images", "0.0001"))
    for T1 in (1, 7, 40):
        said = re.search(r"test accuracy (\S+) %", ok(f"--todo evaluate --T1 {T1}", common))[1]
        assert (
            said == f"{100 * rows[T1 - 1, 1]:.2f}"
        )  # 237 images: no two numbers of them are the same in two decimals
    assert rows[0, 2] == 0 and rows[-1, 2] > 0
    step, away = (
        int(re.search(r"from step (\d+) on", out)[1]),
        np.abs(rows[:, 1] - rows[-1, 1]) > 0.00100001,
    )
    assert not away[step - 1 :].any() and away[step - 2 : step - 1].all()
    assert f"{100 * rows[-1, 2]:.2f} % converged" in out


def test_converged_is_what_the_last_five_steps_move_by_less_than_eps(model):
    """Against the states of free phases of t and t - 5 steps, image by image."""
    from conftest import criterion_of, sample

    x, y = sample(model, 6)
    task = argparse.Namespace(mean=(0.0,), std=(1.0,))
    batches = data_utils.Batches(torch.zeros(6, *x.shape[1:]), y, 4, task, "cpu")
    batches.images, batches.normalise = 255 * x.float(), lambda images: images.double()
    x = x.float().double()
    states = [model(x, T=t, criterion=criterion_of(model)) for t in range(13)]
    moved = torch.stack([relative_change(states[max(0, t - 5)], states[t]) for t in range(1, 13)])
    for n, state in enumerate(states[8]):
        assert (
            moved[7]
            >= (state - states[3][n]).flatten(1).norm(dim=1) / state.flatten(1).norm(dim=1) - 1e-12
        ).all()
    eps = moved.median().item() * (1 + 1e-9)  # not exactly what an image moved by
    accuracy, found = inference.characteristic(
        model, batches, mu.Rule(T1=12, loss=mu.loss_name(criterion_of(model))), eps
    )
    assert found == pytest.approx((moved < eps).double().mean(1).tolist())
    assert accuracy == pytest.approx(
        [(model.readout(s).argmax(1) == y).double().mean().item() for s in states[1:]]
    )


# --------------------------------------------------------------------------------------------------
# corruptions


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A folder with CIFAR-10 and CIFAR-10-C in data/, and a run on them."""
    folder, before = tmp_path_factory.mktemp("corrupted"), os.getcwd()
    os.chdir(folder)
    write_cifar("data")
    write_corruptions("data", CORRUPTIONS)
    line = (
        "--task CIFAR10 --model CNN --channels 4 6 --act my_hard_sig --T1 6 --T2 2 --betas 0 0.5 --device -1 "
        "--seed 0 --save"
    )
    assert main.main(line.split()) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def corrupted(template, tmp_path):
    """A copy of it in the folder that the test runs in: (the run, the folder of corrupted
    images)."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return only_run(tmp_path), tmp_path / "data/CIFAR-10-C"


def line(run, more=""):
    return f"--todo corruptions --device -1 --load-path {run} {more}"


def entries(path):
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: list(map(float, shares)) for name, *shares in rows}


@pytest.mark.usefixtures("full_figures")
def test_corruptions_are_counted_right(ok, corrupted):
    run, folder = corrupted
    # weights with which predictions differ; labels as predicted of one corruption at severity 3
    state = torch.load(run / "model.pt", weights_only=True)
    args = argparse.Namespace(**state["config"])
    model = mu.make_model(args)
    weights = {name: 3 * w if w.dim() > 1 else w for name, w in state["model_state_dict"].items()}
    model.load_state_dict(weights)
    torch.save({**state, "model_state_dict": weights}, run / "model.pt")
    images = torch.from_numpy(np.load(folder / "fog.npy")).permute(0, 3, 1, 2)
    std = 3 * torch.tensor([0.2023, 0.1994, 0.2010])
    x = (images / 255 - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / std.view(3, 1, 1)
    predicted = model.readout(model(x, T=args.T1)).argmax(1).view(5, 8).numpy()
    right = predicted == predicted[2]
    assert len(set(right.mean(1))) > 2
    np.save(folder / "labels.npy", np.tile(predicted[2], 5).astype(np.uint8))

    out = ok(line(run))
    lines = (run / "Corruption_Accuracy.txt").read_text().splitlines()
    assert (
        lines[0].startswith("# measured with: {")
        and lines[2].startswith("# figure: ")
        and lines[-1].startswith("# mean over all 19: ")
    )
    assert [line.split()[0] for line in lines[3:-1]] == list(CORRUPTIONS)
    assert " ".join(["fog", *(f"{share:.6f}" for share in right.mean(1))]) in lines
    rows = entries(run / "Corruption_Accuracy.txt")
    means = np.mean(list(rows.values())), np.mean([rows[name] for name in CORRUPTIONS[:15]])
    assert lines[-1] == f"# mean over all 19: {means[0]:.6f}, over the first 15: {means[1]:.6f}"
    assert (
        f"mean accuracy {100 * means[0]:.2f} %, over the first 15 corruptions {100 * means[1]:.2f} %"
        in out
    )
    assert (run / "Corruption_Accuracy.png").stat().st_size > 20000

    found = next(r for r in records(run, "corruption") if r.settings["corruption"] == "fog")
    assert found.value["accuracy"] == pytest.approx(right.mean(1).tolist())
    assert (np.array([unpack(bits, 8) for bits in found.value["outcomes"]]) == right).all()
    assert found.data["split"] == "test" and found.data["images"] == 8

    ok(line(run, "--test-size 2"))  # the first of every severity
    assert entries(run / "Corruption_Accuracy.txt")["fog"] == right[:, :2].mean(1).tolist()
    ok(line(run, "--T1 2"))
    assert settings(run)["predict_step"] == 2 and len(records(run, "corruption")) == 3 * 19
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "predict", lambda *_: pytest.fail("it was computed again"))
        again = ok(line(run))
    assert again.replace(" (recorded)", "") == out and again.count(" (recorded)") == 19
    assert (run / "Corruption_Accuracy.txt").read_text().splitlines() == lines
    assert not list(run.glob("Corruption_Accuracy_*"))


def test_corruptions_are_counted_where_no_figure_can_be_drawn(cli, corrupted, monkeypatch):
    def savefig(*_, **__):
        raise ValueError("nothing can be drawn")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    run, _ = corrupted
    code, out, err = cli(line(run, "--test-size 1"))
    assert (
        code == 0
        and "over the first 15 corruptions" in out
        and len(entries(run / "Corruption_Accuracy.txt")) == 19
    )
    assert re.fullmatch(
        r"warning: \S+/Corruption_Accuracy.png was not drawn: nothing can be drawn\n", err
    )


def test_a_killed_run_goes_on_at_the_first_missing_corruption(ok, corrupted, monkeypatch):
    run, _ = corrupted
    ok(line(run))
    text, predict, seen = run / "Corruption_Accuracy.txt", inference.predict, []
    whole = text.read_text()
    path = run / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3])[:-40])
    monkeypatch.setattr(inference, "predict", lambda *args: seen.append(args[3]) or predict(*args))
    ok(line(run))
    assert text.read_text() == whole and len(seen) == 20 and seen[0] == "speckle_noise, severity 1"
    text.unlink()  # as after a kill between the last record and its table
    ok(line(run))
    assert text.read_text() == whole and len(seen) == 20 and len(records(run, "corruption")) == 19


def test_rows_are_there_as_soon_as_they_are_known(corrupted, cli, monkeypatch):
    run, _ = corrupted
    predict, seen = inference.predict, []

    def interrupted(*args):
        if len(seen) == 12:  # in the middle of the third corruption
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        seen.append(1)
        return predict(*args)

    monkeypatch.setattr(inference, "predict", interrupted)
    code, _, err = cli(line(run))
    assert code == 143 and "2 corruptions are saved in" in err
    assert list(entries(run / "Corruption_Accuracy.txt")) == list(CORRUPTIONS[:2])
    assert "mean" not in (run / "Corruption_Accuracy.txt").read_text()


def test_a_process_killed_at_any_moment_goes_on(ok, corrupted, tmp_path):
    run, _ = corrupted
    process = start(tmp_path, line(run))
    while not (run / "Corruption_Accuracy.txt").exists() and process.is_alive():
        time.sleep(0.005)
    process.kill()
    process.join()
    first = entries(run / "Corruption_Accuracy.txt")
    assert first
    ok(line(run))
    after = entries(run / "Corruption_Accuracy.txt")
    assert list(after) == list(CORRUPTIONS) and all(
        after[name] == shares for name, shares in first.items()
    )
    assert len(records(run, "corruption")) == 19


def test_two_processes_add_records_at_once(ok, corrupted, tmp_path):
    run, _ = corrupted
    words = [line(run), line(run, "--T1 2"), f"--todo evaluate --device -1 --load-path {run}"]
    processes = [start(tmp_path, text) for text in [words[0], *words]]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    found = Store(run).records
    assert len({record.identity for record in found}) == len(found) == 2 * 19 + 2
    ok(words[0])
    assert len(entries(run / "Corruption_Accuracy.txt")) == 19 and len(Store(run).records) == 40


def test_further_training_leaves_the_records_of_the_earlier_weights(ok, corrupted):
    run, _ = corrupted
    ok(line(run, "--test-size 2"))
    before = settings(run)["weights"]
    state = torch.load(run / "model.pt", weights_only=True)
    state["model_state_dict"]["synapses.0.bias"] += 1
    torch.save(state, run / "model.pt")
    ok(line(run, "--test-size 2"))
    assert settings(run)["weights"] != before
    weights = [record.model["weights"] for record in records(run, "corruption")]
    assert weights == [before] * 19 + [settings(run)["weights"]] * 19


def damage(folder, what):
    images = np.load(folder / "snow.npy")
    if what == "missing":
        (folder / "snow.npy").unlink()
    elif what == "a pipe":
        (folder / "snow.npy").unlink()
        os.mkfifo(folder / "snow.npy")
    elif what == "truncated":
        (folder / "snow.npy").write_bytes((folder / "snow.npy").read_bytes()[:1000])
    elif what == "pickled":
        np.save(folder / "snow.npy", np.array([{}]), allow_pickle=True)
    elif what == "several arrays":
        np.savez(folder / "snow", images)
        (folder / "snow.npz").rename(folder / "snow.npy")
    elif what == "labels":
        np.save(folder / "labels.npy", np.full(40, 0.5))
    elif what == "label":
        np.save(folder / "labels.npy", np.full(40, 10))
    elif what == "other labels at severity 2":
        labels = np.load(folder / "labels.npy")
        labels[8:16] = labels[8:16][::-1]
        np.save(folder / "labels.npy", labels)
    elif what == "one severity":
        for path in folder.glob("*.npy"):
            array = np.load(path)
            np.save(path, np.arange(10) if path.stem == "labels" else array[:10])
    elif what == "most":
        for name in CORRUPTIONS[1:15]:
            (folder / f"{name}.npy").unlink()
    else:
        np.save(
            folder / "snow.npy",
            {
                "dtype": images.astype(np.float32),
                "shape": images[:35],
                "order": images.reshape(40, -1),
                "negative": images / np.float32(128) - 1,
                "nan": np.full(images.shape, np.nan),
            }[what],
        )


DAMAGES = {
    "missing": "snow.npy is missing",
    "a pipe": "snow.npy cannot be read: it is not a regular file",
    "truncated": "snow.npy cannot be read",
    "pickled": "snow.npy cannot be read",
    "several arrays": "snow.npy contains several arrays",
    "dtype": "snow.npy contains float32 (40, 32, 32, 3), expected uint8 (40, 32, 32, 3)",
    "shape": "snow.npy contains uint8 (35, 32, 32, 3)",
    "order": "snow.npy contains uint8 (40, 3072)",
    "negative": "they go from -1 to 0.99",
    "nan": "they go from nan to nan",
    "other labels at severity 2": "do not repeat 5 times",
    "one severity": "one severity alone",
    "most": "shot_noise.npy is missing, and so are 13 others",
    "labels": "labels.npy contains float64 (40,)",
    "label": "labels.npy contains labels from 10 to 10",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_named_before_anything_is_done(cli, corrupted, what):
    run, folder = corrupted
    damage(folder, what)
    code, out, err = cli(line(run))
    assert (
        code == 2
        and err.count("\n") == 1
        and DAMAGES[what] in err
        and not out
        and not (run / "Corruption_Accuracy.txt").exists()
    ), err


# Folders as people have them: what becomes of each file, and a word of what is said of it.
FORMS = {
    "whole": (lambda name, array: array, ""),
    "labels of 64 bits": (
        lambda name, array: array.astype(np.int64) if name == "labels" else array,
        "",
    ),
    "labels of floating point": (
        lambda name, array: array.astype(np.float32) if name == "labels" else array,
        "",
    ),
    "labels in a column": (lambda name, array: array[:, None] if name == "labels" else array, ""),
    "labels of one severity": (
        lambda name, array: array[:8] if name == "labels" else array,
        "taken for each of 5",
    ),
    "a severity each": (lambda name, array: array.reshape(5, 8, *array.shape[1:]), ""),
    "channels first": (
        lambda name, array: array if name == "labels" else array.transpose(0, 3, 1, 2),
        "",
    ),
    "from 0 to 1": (lambda name, array: array if name == "labels" else array / np.float32(255), ""),
    "from 0 to 1 in 64 bits": (lambda name, array: array if name == "labels" else array / 255, ""),
    "from 0 to 1 in 16 bits": (
        lambda name, array: array if name == "labels" else (array / 255).astype("f2"),
        "",
    ),
}


@pytest.mark.slow
def test_other_forms_of_the_same_folder_give_the_same_table(cli, corrupted):
    run, folder = corrupted
    good, tables = {path.stem: np.load(path) for path in folder.glob("*.npy")}, []
    for form, note in FORMS.values():
        for name, array in good.items():
            np.save(folder / f"{name}.npy", form(name, array))
        code, _, err = cli(line(run))
        assert code == 0 and note in err and err.count("note:") == bool(note), err
        tables.append((run / "Corruption_Accuracy.txt").read_text())
        # the same data, and the same fingerprints
        assert len(records(run, "corruption")) == 19
        if note:  # evaluated anew
            (run / "results.jsonl").unlink()
    assert all(table == tables[0] for table in tables)


def test_images_between_the_whole_numbers_are_not_rounded(ok, corrupted):
    run, folder = corrupted
    for name in CORRUPTIONS:
        np.save(folder / f"{name}.npy", np.load(folder / f"{name}.npy") / np.float32(300))
    ok(line(run, "--test-size 2"))
    before = settings(run)["fingerprint"]
    np.save(folder / "fog.npy", np.rint(255 * np.load(folder / "fog.npy")).astype(np.uint8))
    ok(line(run, "--test-size 2"))
    after = settings(run)["fingerprint"]
    assert [name for name, value in after.items() if before[name] != value] == ["fog"]
    assert len(records(run, "corruption")) == 20


def settings(run, name="Corruption_Accuracy.txt"):
    """What the table says that it was measured with."""
    prefix = "# measured with: "
    lines = (run / name).read_text().splitlines()
    return json.loads(next(text for text in lines if text.startswith(prefix))[len(prefix) :])


def test_the_15_corruptions_of_the_published_means_are_enough(cli, ok, corrupted):
    run, folder = corrupted
    extra = {name: np.load(folder / f"{name}.npy") for name in CORRUPTIONS[15:]}
    for name in extra:
        (folder / f"{name}.npy").unlink()
    code, out, err = cli(line(run))
    assert (
        code == 0
        and err.count("\n") == 1
        and "lacks speckle_noise, gaussian_blur, spatter, saturate" in err
    )
    text = run / "Corruption_Accuracy.txt"
    first = entries(text)
    assert list(first) == list(CORRUPTIONS[:15])
    mean = np.mean(list(first.values()))
    assert text.read_text().splitlines()[-1] == f"# mean over the first 15: {mean:.6f}"
    assert out.splitlines()[-1] == (
        f"mean accuracy over the first 15 corruptions {100 * mean:.2f} %; results are in {text}"
    )
    assert (run / "Corruption_Accuracy.png").exists()

    for name, array in extra.items():
        np.save(folder / f"{name}.npy", array)
    ok(line(run))  # the others are added
    after = entries(text)
    assert list(after) == list(CORRUPTIONS) and all(after[name] == first[name] for name in first)
    everything = np.mean(list(after.values()))
    assert text.read_text().splitlines()[-1] == (
        f"# mean over all 19: {everything:.6f}, over the first 15: {mean:.6f}"
    )
    assert len(records(run, "corruption")) == 19


def test_constant_labels_are_five_severities(ok, corrupted):
    run, folder = corrupted
    np.save(folder / "labels.npy", np.full(40, 3))
    ok(line(run))


def test_other_corrupted_images_are_measured_anew(ok, corrupted, monkeypatch):
    run, folder = corrupted
    ok(line(run))
    before = (run / "Corruption_Accuracy.txt").read_text()
    fog = np.load(folder / "fog.npy")
    predict, seen = inference.predict, []
    monkeypatch.setattr(inference, "predict", lambda *args: seen.append(args[3]) or predict(*args))
    np.save(folder / "fog.npy", 255 - fog)
    ok(line(run))
    assert seen == [f"fog, severity {n}" for n in range(1, 6)]
    assert len(records(run, "corruption")) == 20
    np.save(folder / "fog.npy", fog)
    ok(line(run))
    assert len(seen) == 5 and (run / "Corruption_Accuracy.txt").read_text() == before


def test_a_characteristic_of_other_data_is_another_record(ok, corrupted, tmp_path):
    run, _ = corrupted
    words = f"--todo characteristic --device -1 --load-path {run} --T1 3"
    first = ok(words)
    table = run / "Characteristic_Time.txt"
    before = table.read_text()
    assert (
        len(settings(run, "Characteristic_Time.txt")["weights"]) == 16 and "computed on: " in before
    )
    path = tmp_path / "data/cifar-10-batches-py/test_batch"
    original = path.read_bytes()
    entry = pickle.loads(original)
    path.write_bytes(pickle.dumps({**entry, "labels": entry["labels"][::-1]}))
    ok(words)
    assert table.read_text() != before and len(records(run, "characteristic")) == 2
    path.write_bytes(original)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "characteristic", lambda *_: pytest.fail("computed again"))
        assert ok(words) == first
    assert table.read_text() == before and not list(run.glob("Characteristic_*_1.*"))


@pytest.mark.parametrize(
    "more, message",
    [
        ("--corruptions-dir elsewhere", "elsewhere/labels.npy is missing"),
        ("--corruptions-dir data", "give --corruptions-dir"),
        ("--test-size 9", "--test-size: got 9"),
        ("--T1 0", "--T1"),
    ],
)
def test_wrong_arguments_are_one_line(cli, corrupted, more, message):
    code, _, err = cli(line(corrupted[0], more))
    assert code == 2 and err.count("\n") == 1 and message in err


def test_another_folder(ok, corrupted):
    run, folder = corrupted
    folder.rename(folder.with_name("mine"))
    ok(line(run, "--test-size 1 --corruptions-dir data/mine"))
    assert len(entries(run / "Corruption_Accuracy.txt")) == 19


def test_other_tasks_have_no_corruptions(cli, tmp_path):
    cli("--task digits --device -1 --train-size 20 --test-size 20 --archi 784 8 10 --save")
    code, _, err = cli(line(only_run(tmp_path)))
    assert code == 2 and err.count("\n") == 1 and "digits" in err


@pytest.mark.parametrize("todo", ["characteristic", "corruptions"])
def test_they_need_a_run(cli, todo):
    code, _, err = cli(f"--todo {todo}")
    assert code == 2 and err.count("\n") == 1 and "--load-path" in err
