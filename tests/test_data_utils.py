import csv

import numpy as np
import pytest
import torch
from conftest import only_run

from data_utils import TASKS, Batches, UserError, flip_and_shift, load_split
from experiment.runs.files import replacing


def test_digits_are_a_drop_in_for_mnist():
    images, labels = load_split("digits", "nowhere", True)
    test_images, test_labels = load_split("digits", "nowhere", False)
    assert images.shape == (1437, 1, 28, 28) and test_images.shape == (360, 1, 28, 28)
    assert images.dtype == torch.uint8 and images.max() > 250 and images.min() == 0
    assert sorted(set(labels.tolist())) == sorted(set(test_labels.tolist())) == list(range(10))
    known = {image.numpy().tobytes() for image in images}
    # split, not shared (a few drawings are equal)
    assert sum(image.numpy().tobytes() in known for image in test_images) < 5
    assert torch.equal(load_split("digits", "nowhere", True)[0], images)


def test_cifar_files_and_normalisation(cifar):
    images, labels = load_split("CIFAR10", cifar, True)
    assert images.shape == (100, 3, 32, 32) and labels.shape == (100,)
    x, y = next(iter(Batches(images, labels, 100, TASKS["CIFAR10"], "cpu")))
    red = (images[:, 0].float() / 255 - 0.4914) / (3 * 0.2023)
    torch.testing.assert_close(x[:, 0], red)
    assert torch.equal(y, labels)


def test_batches_cover_an_epoch_and_repeat_with_the_seed():
    images, labels = torch.arange(25, dtype=torch.uint8).view(25, 1, 1, 1), torch.arange(25)
    task = TASKS["MNIST"]
    epochs = []
    for seed in (0, 0, 1):
        batches = Batches(images, labels, 10, task, "cpu", torch.Generator().manual_seed(seed))
        epoch = list(batches)
        assert [len(y) for _, y in epoch] == [10, 10, 5] and len(batches) == 3
        for x, y in epoch:
            torch.testing.assert_close(x.flatten() * 255, y.float())
        epochs.append(torch.cat([y for _, y in epoch]).tolist())
    assert sorted(epochs[0]) == list(range(25)) and epochs[0] == epochs[1] != epochs[2]
    assert torch.cat([y for _, y in Batches(images, labels, 10, task, "cpu")]).tolist() == list(
        range(25)
    )


def test_augmentation_is_a_flip_and_a_crop_of_the_edge_padded_image():
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8)
    augmented = flip_and_shift(images, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, augmented):
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(9)
            for dx in range(9)
            if torch.equal(result, padded(image, flip)[:, dy : dy + 32, dx : dx + 32])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 40  # drawn per image


def padded(image, flip):
    return torch.from_numpy(
        np.pad(image.flip(2) if flip else image, ((0, 0), (4, 4), (4, 4)), "edge")
    )


def test_missing_files_say_where_they_were_looked_for(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    for name in ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"):
        with pytest.raises(UserError) as e:
            load_split(name, tmp_path / "data", True)
        text = str(e.value)
        assert all(
            word in text for word in (name, str(tmp_path / "data"), "--data-dir", "--task digits")
        )
        assert "\n" not in text


def test_damaged_data_files(cifar, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar / "cifar-10-batches-py").iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_split("CIFAR10", tmp_path, True)


def test_sizes():
    assert len(load_split("digits", "", True, 7)[1]) == 7
    with pytest.raises(UserError, match="--test-size: got 361, digits has 360"):
        load_split("digits", "", False, 361)


def test_a_run_folder_holds_what_the_readme_promises(ok, tmp_path):
    ok("--task digits --device -1 --epochs 2 --train-size 200 --test-size 50 --save --seed 3")
    run = only_run(tmp_path)
    assert run.parts[-4:-2] == ("EP", "mse") and run.name.endswith("_cpu")
    names = {
        "hyperparameters.txt",
        "metrics.csv",
        "train-test_acc.png",
        "train-test_acc.txt",
        "neural_activity.png",
        "neural_activity.txt",
        "model.pt",
        "checkpoint.tar",
        "config.json",
        "final_model.pt",
        "final_checkpoint.tar",
    }
    assert {p.name for p in run.iterdir()} == names and all(p.stat().st_size for p in run.iterdir())
    rows = list(csv.DictReader(open(run / "metrics.csv")))
    assert list(rows[0])[:4] == ["epoch", "train_acc", "test_acc", "seconds"] and [
        r["epoch"] for r in rows
    ] == ["1", "2"]
    checkpoint = torch.load(run / "checkpoint.tar", weights_only=True)
    assert {
        "model_state_dict",
        "opt",
        "scheduler",
        "epoch",
        "train_acc",
        "test_acc",
        "best",
    } <= set(checkpoint)
    assert checkpoint["epoch"] == 2 and checkpoint["best"] == max(checkpoint["test_acc"])
    text = (run / "hyperparameters.txt").read_text()
    assert "python main.py --task digits" in text and "seed: 3" in text and "P_MLP(" in text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError):
        with replacing(path) as beside:
            beside.write_text("half")
            raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as beside:
        beside.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
