"""The figures: each is drawn and saved in both formats, and shows what it is about."""

import math

import numpy as np
import pytest
import torch

import metrics
from experiment.config import Config
from experiment.plots import attacks, training
from experiment.plots import gdu as gdu_plots
from experiment.results.attacks import Sweep
from experiment.runs.folder import RunFolder, Setup

pytestmark = pytest.mark.usefixtures("full_figures")
ROWS = [
    {"epoch": n, "train_acc": 50.0 + n, "test_acc": 49.0 + n, "val_acc": 48.0 + n}
    for n in range(1, 6)
]
SETTINGS = {"attack": "pgd", "attack_norm": "inf", "images": 40, "task": "digits"}
SWEEP = [
    {"eps": repr(eps), "grad": grad, "adversarial": f"{share}", "masked": "0.5"}
    for eps, share in ((0.0, 0.9), (0.01, 0.8), (8 / 255, 0.4), (0.1, 0.0))
    for grad in ("bptt", "ep", "worst")
]
AUDITED = {
    "robust": 0.25,
    "clean": 0.75,
    "images": 4,
    "trusted": False,
    "interval": [0.05, 0.7],
    "curve": [(0.0, 1.0), (0.5, 0.6), (1.0, 0.3)],
    "sample": 3,
    "settings": {"eps": 1.0, "attack_norm": "2"},
    "attacks": [
        {"name": "pgd", "stage": "b", "standing": 2},
        {"name": "fab", "stage": "c", "standing": 1},
    ],
}


def gdu():
    torch.manual_seed(0)
    shapes = {
        "synapses.0.weight": (6, 4, 3),
        "synapses.1.bias": (1, 4),
        "neurons_0": (6, 2, 3, 2, 2),
    }
    return [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]


def attacked(channels=1, wrong=(1, 3)):
    images = np.random.default_rng(0).random((8, channels, 6, 6), dtype=np.float32)
    correct = ~np.isin(np.arange(8), wrong)
    result = {"x_adv": np.clip(images + 0.1, 0, 1), "prediction": np.arange(8), "correct": correct}
    return images, np.arange(8), np.arange(8) != 7, result, "Attacked images"


def all_figures():
    bptt, ep = gdu()
    gdu_rows = [
        {"name": name, "estimate": estimate, "distance": distance}
        for estimate in ("one-sided", "symmetric")
        for name, distance in zip(bptt, (0.1, math.nan, 0.01))
    ]
    seed = torch.Generator().manual_seed(0)
    return {
        "accuracy": training.accuracy(ROWS, 3, {2: "--T1 30 (until now 20)", 4: ""}, 10),
        "accuracy of one epoch": training.accuracy(
            [{"epoch": 1, "train_acc": 1.0, "test_acc": 2.0}]
        ),
        "activity": training.activity(
            [torch.rand(4, 7, 3, 3), torch.zeros(4, 5), torch.randn(4, 5)], (0.0, 1.0), True
        ),
        "characteristic": training.characteristic([0.1, 0.5, 0.6], [0.0, 0.2, 1.0], 2, 10),
        "relaxation": training.relaxation([1.0, 0.1, 0.01], [3.0, 4.0, 4.5], 2),
        "relaxation, no energy": training.relaxation([0.0, 0.0], None, 20),
        "confusion": training.confusion(np.eye(10, dtype=int) * 7),
        "confusion of many": training.confusion(np.eye(100, dtype=int)),
        "corruptions": attacks.corruptions(
            np.full((19, 5), 70.0), [f"kind_{n}" for n in range(19)], (0.7, 0.7), 7
        ),
        "gdu_entries": gdu_plots.gdu_entries("neurons_0", bptt["neurons_0"], ep["neurons_0"], seed),
        "gdu_layers": gdu_plots.gdu_layers(bptt, ep, seed),
        "gdu_overview": gdu_plots.gdu_overview(list(bptt), gdu_rows),
        "sweep": attacks.sweep(SWEEP, SETTINGS, 0.9, 0.1),
        "audit": attacks.audit(AUDITED, "Audit, 2-norm, eps 1"),
        "sweep at 0": attacks.sweep(SWEEP[:1], SETTINGS, 0.9),
        "adversarial_examples": attacks.adversarial_examples(*attacked()),
        "adversarial_examples, one in colour": attacks.adversarial_examples(
            *[part[:1] if isinstance(part, np.ndarray) else part for part in attacked(3)[:3]],
            {key: part[:1] for key, part in attacked(3)[3].items()},
            "Attacked images",
        ),
    }


def labels(figure):
    return [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]


@pytest.fixture(scope="module")
def drawn():
    return all_figures()


@pytest.mark.parametrize(
    "form, magic", [("png", b"\x89PNG"), pytest.param("pdf", b"%PDF", marks=pytest.mark.slow)]
)
def test_every_figure_is_saved_in_both_formats(tmp_path, drawn, form, magic):
    folder = tmp_path / "results" / "EP" / "mse" / "day" / "time_cpu"
    folder.mkdir(parents=True)
    run = RunFolder(folder, form, "MLP on digits")
    chosen = {
        name: figure for name, figure in drawn.items() if form == "png" or name.isidentifier()
    }
    for name, figure in chosen.items():
        title = figure.get_suptitle()
        assert title and "\n" not in title
        run.save_figure(f"a.{name}.png", lambda figure=figure: figure)
        assert (folder / f"a.{name}.{form}").read_bytes().startswith(magic)
        assert figure.get_suptitle() == f"{title}\nMLP on digits, EP/mse/day/time_cpu"
        figure.suptitle(title)
    assert len(list(folder.iterdir())) == len(chosen) >= 11


def test_a_png_has_200_dots_an_inch(tmp_path):
    from matplotlib.image import imread

    RunFolder(tmp_path).save_figure("a.png", training.accuracy, ROWS)
    height, width, _ = imread(tmp_path / "a.png").shape
    assert (width, height) == (1200, 760)


def test_the_style_leaves_no_trace():
    import matplotlib

    before = dict(matplotlib.rcParams)
    training.accuracy(ROWS)
    assert dict(matplotlib.rcParams) == before


def test_curves_differ_in_colour_marker_and_line():
    lines = training.accuracy(ROWS).axes[0].get_lines()[:3]
    for look in (lambda c: c.get_color(), lambda c: c.get_marker(), lambda c: c.get_linestyle()):
        assert len({look(line) for line in lines}) == 3
    assert lines[0].get_color() == "#0072B2"


def test_the_training_plot_marks_the_picked_model_resumptions_and_chance(drawn):
    axes, found = drawn["accuracy"].axes[0], labels(drawn["accuracy"])
    (star,) = (line for line in axes.get_lines() if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == (
        [3],
        [51.0],
    )  # chosen on the validation images
    assert (
        "resumed before epoch 2: --T1 30 (until now 20)" in found
        and "resumed before epoch 4" in found
    )
    assert any(label.startswith("validation") for label in found) and "chance (10 %)" in found
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"][
        -2:
    ] == [1.5, 3.5]


def test_many_resumptions_leave_room_for_the_curves():
    found = labels(training.accuracy(ROWS, None, {n: "x" * 2000 for n in range(1, 40)}))
    resumed = [label for label in found if label.startswith("resumed")]
    assert len(resumed) == 5 and "39" in resumed[-1] and max(map(len, resumed)) <= 90


def test_saturation_is_counted_at_both_ends(drawn):
    assert training.saturation(torch.tensor([0.0, 0.005, 0.5, 1.0]), (0.0, 1.0)) == (0.5, 0.25)
    titles = [axes.get_title() for axes in drawn["activity"].axes]
    assert "at 0: 100.0 %, at 1: 0.0 %" in titles[1] and "no activation" in titles[2]
    assert all(axes.get_ylim()[0] == 0 for axes in drawn["activity"].axes)


def test_the_characteristic_plot_has_two_ranges_and_the_training_s_T1(drawn):
    above, below = drawn["characteristic"].axes
    assert above.get_ylim() != below.get_ylim() and below.get_ylim()[1] > 100
    assert all(
        "T1 = 2 of the training" in axes.get_legend_handles_labels()[1] for axes in (above, below)
    )


def test_the_window_of_convergence_is_never_longer_than_the_phase(drawn):
    below = drawn["characteristic"].axes[1]
    assert len(below.get_lines()[0].get_xdata()) == 3
    assert "last min(5, t) steps" in below.get_xlabel()


def test_only_the_linear_output_has_no_activation():
    figure = training.activity([torch.rand(4, 5), torch.randn(4, 5)], None, True)
    titles = [axes.get_title() for axes in figure.axes]
    assert ["no activation" in title for title in titles] == [False, True]


def test_titles_count_one_image_in_the_singular():
    title = attacks.sweep(SWEEP, {**SETTINGS, "images": 1}, 1.0).get_suptitle()
    assert title == "Accuracy under attack: pgd, L-infinity norm, 1 image"
    assert "of 1 test image," in training.confusion(np.eye(1, dtype=int)).get_suptitle()


def test_a_sweep_has_its_eps_as_ticks_intervals_clean_and_chance(drawn):
    axes = drawn["sweep"].axes[0]
    assert list(axes.get_xticks()) == [0.01, 8 / 255, 0.1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.01", "8/255", "0.1"]
    assert len(axes.containers) == 3 and {"clean (90.00 %)", "chance (10 %)"} <= set(
        labels(drawn["sweep"])
    )
    assert "an upper bound" in " ".join(labels(drawn["sweep"]))


def test_dense_eps_are_not_written_over_each_other():
    rows = [{**SWEEP[0], "eps": repr(e)} for e in (*np.linspace(0.1, 0.2, 90).tolist(), 0.20001)]
    ticks = attacks.sweep(rows, SETTINGS, 0.9).axes[0].get_xticklabels()
    assert len(ticks) == 91 and 10 < sum(bool(text.get_text()) for text in ticks) <= 29


def test_wilson():
    assert metrics.wilson(0.5, 100) == pytest.approx(
        (0.4038, 0.5962), abs=1e-4
    )  # Newcombe 1998, of 50 in 100
    assert metrics.wilson(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4) and metrics.wilson(
        0.3, 0
    ) == (0, 1)


def test_gdu_panels_are_named_and_solid_and_dashed_are_explained(drawn):
    for name in ("gdu_layers", "gdu_entries"):
        legend = drawn[name].legends[0]
        assert [text.get_text() for text in legend.get_texts()][:2] == ["BPTT", "EP"]
        assert [line.get_linestyle() for line in legend.get_lines()][:2] == ["-", "--"]
    assert [axes.get_title().split("\n")[0] for axes in drawn["gdu_layers"].axes] == list(gdu()[0])


def test_attacked_images_have_named_rows_one_scale_and_say_how_they_were_chosen(drawn):
    figure = drawn["adversarial_examples"]
    panels = figure.axes[:18]
    assert [panels[6 * row].get_ylabel() for row in range(3)] == [
        "image",
        "change",
        "adversarial\nexample",
    ]
    assert [axes.get_title().split("\n")[0] for axes in panels[:2]] == [
        "true 1",
        "true 3",
    ]  # those that became wrong
    scales = {axes.get_images()[0].get_clim() for axes in panels[6:12]}
    assert (
        len(scales) == 1
        and sum(*scales) == 0
        and {axes.get_images()[0].get_cmap().name for axes in panels[6:12]} == {"PuOr"}
    )
    assert "all 2 test images misclassified only under attack" in figure.get_supxlabel()


def test_a_sweep_that_is_moved_aside_takes_its_pdf_along(tmp_path):
    settings = {**SETTINGS, "attack_norm": "2"}
    sweep = Sweep(RunFolder(tmp_path, "pdf"), settings, 0.9, "model.pt")
    sweep.rows = SWEEP
    sweep.plot()
    assert (tmp_path / "Adversarial_Accuracy.pdf").exists()
    sweep.run.release()
    Sweep(RunFolder(tmp_path, "pdf"), {**settings, "images": 41}, 0.9, "model.pt")
    assert (tmp_path / "Adversarial_Accuracy_1.pdf").exists() and not (
        tmp_path / "Adversarial_Accuracy.pdf"
    ).exists()


def test_a_new_run_knows_its_format(tmp_path):
    config = Config().replace(figures="pdf", model="CNN", task="digits")
    setup = Setup("main.py", config, None, torch.device("cpu"))
    run = RunFolder.create(setup, {}, tmp_path)
    run.release()
    assert run.figures == "pdf" and run.about == "CNN on digits"
