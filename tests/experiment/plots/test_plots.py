"""The figures: each is drawn for print and saved with its caption, and shows what it is about."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch

import data_utils
import metrics
from experiment.config import Config
from experiment.plots import attacks, style, training
from experiment.plots import gdu as gdu_plots
from experiment.runs.folder import RunFolder, Setup

pytestmark = pytest.mark.usefixtures("full_figures")
ROWS = [
    {"epoch": n, "train_acc": 50.0 + n, "test_acc": 49.0 + n, "val_acc": 48.0 + n}
    for n in range(1, 6)
]
SWEEP = [
    {"eps": repr(eps), "grad": grad, "adversarial": f"{share}", "masked": "0.5"}
    for eps, share in ((0.0, 0.9), (0.01, 0.8), (8 / 255, 0.4), (0.1, 0.0))
    for grad in ("bptt", "ep", "worst")
]
ATTACKED = ("pgd", "inf", 40)  # attack, norm, images
MANY = [
    {**row, "grad": label}
    for label in ["W" * 60, "one", *(f"{n} {'long label, ' * 8}" for n in range(7))]
    for row in SWEEP[::3]
]
AUDITED = {
    "robust": 0.25,
    "clean": 0.75,
    "images": 4,
    "trusted": False,
    "interval": [0.05, 0.7],
    "curve": [(0.0, 1.0), (0.5, 0.6), (1.0, 0.3)],
    "sample": 3,
    "settings": {"eps": 1.0, "attack_norm": "inf"},
    "attacks": [
        {"name": "pgd", "stage": "b", "standing": 2},
        {"name": "fab", "stage": "c", "standing": 1},
    ],
}


NAMES = data_utils.TASKS["CIFAR10"].names


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
    return images, np.arange(8), np.arange(8) != 7, result, "Attacked images", NAMES


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
        "confusion": training.confusion(np.eye(10, dtype=int) * 7, NAMES),
        "confusion of many": training.confusion(
            np.eye(100, dtype=int), data_utils.TASKS["CIFAR100"].names
        ),
        "corruptions": attacks.corruptions(
            np.full((19, 5), 70.0), [f"kind_{n}" for n in range(19)], (0.7, 0.7), 7
        ),
        "gdu_entries": gdu_plots.gdu_entries("neurons_0", bptt["neurons_0"], ep["neurons_0"], seed),
        "gdu_layers": gdu_plots.gdu_layers(bptt, ep, seed),
        "gdu_overview": gdu_plots.gdu_overview(list(bptt), gdu_rows),
        "sweep": attacks.sweep(SWEEP, *ATTACKED, 0.9, 0.1),
        "audit": attacks.audit(AUDITED, "quick"),
        "sweep at 0": attacks.sweep(SWEEP[:1], *ATTACKED, 0.9),
        "adversarial_examples": attacks.adversarial_examples(*attacked()),
        "adversarial_examples, one in colour": attacks.adversarial_examples(
            *[part[:1] if isinstance(part, np.ndarray) else part for part in attacked(3)[:3]],
            {key: part[:1] for key, part in attacked(3)[3].items()},
            "Attacked images",
            NAMES,
        ),
        "many curves with long labels": attacks.sweep(MANY, *ATTACKED, 0.9),
    }


def labels(figure):
    return [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]


@pytest.fixture(scope="module")
def drawn():
    return all_figures()


FIGURES = (
    "accuracy",
    "accuracy of one epoch",
    "activity",
    "characteristic",
    "relaxation",
    "relaxation, no energy",
    "confusion",
    "confusion of many",
    "corruptions",
    "gdu_entries",
    "gdu_layers",
    "gdu_overview",
    "sweep",
    "audit",
    "sweep at 0",
    "adversarial_examples",
    "adversarial_examples, one in colour",
    "many curves with long labels",
)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_for_print(drawn, name):
    figure = drawn[name]
    assert figure.get_suptitle() == "" and figure.get_label().endswith(".")
    assert figure.get_figwidth() in (3.3, 6.9)
    for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize")):
        assert 7 <= text.get_fontsize() <= 8


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(drawn, name):
    figure = drawn[name]
    with style.style():
        figure.draw_without_rendering()
    bounds = figure.get_tightbbox()  # in inches
    assert bounds.x0 >= 0 and bounds.x1 <= figure.get_figwidth()
    assert bounds.y0 >= 0 and bounds.y1 <= figure.get_figheight()
    for axes in figure.axes:  # a figure that is too full has none
        assert min(axes.get_position().size) > 0.005


def test_all_figures_are_tested(drawn):
    assert set(drawn) == set(FIGURES)


@pytest.mark.parametrize("form, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_figure_is_saved_with_its_caption(tmp_path, form, magic):
    folder = tmp_path / "results" / "EP" / "mse" / "day" / "time_cpu"
    folder.mkdir(parents=True)
    run = RunFolder(folder, form, "MLP on digits")
    run.save_figure("a.name.png", training.accuracy, ROWS)
    written = (folder / f"a.name.{form}").read_bytes()
    assert written.startswith(magic)
    for text in (b"Accuracy over the epochs;", b"MLP on digits, EP/mse/day/time_cpu", b"torch "):
        assert text in written
    caption, source = (folder / "a.name.txt").read_text().splitlines()
    assert caption == training.accuracy(ROWS).get_label()
    assert source == "MLP on digits, EP/mse/day/time_cpu"
    run.save_figure("a.name.png", training.accuracy, ROWS)
    assert (folder / f"a.name.{form}").read_bytes() == written
    assert len(list(folder.iterdir())) == 2


def test_the_caption_of_a_table_is_a_comment_of_its_head(tmp_path):
    table = tmp_path / "Adversarial_Accuracy.txt"
    table.write_text("# eps, clean\n0.1 0.9\n")
    run = RunFolder(tmp_path)
    for images in (40, 41):
        arguments = ([], "pgd", "2", images, 0.9)
        unlocked = contextlib.nullcontext
        run.save_figure("Adversarial_Accuracy.png", attacks.sweep, *arguments, table=unlocked)
        first, caption, row = table.read_text().splitlines()
        assert (first, row) == ("# eps, clean", "0.1 0.9")
        assert caption.startswith("# figure: ") and f"{images} test images" in caption


def test_a_png_has_300_dots_an_inch(tmp_path):
    from matplotlib.image import imread

    RunFolder(tmp_path).save_figure("a.png", training.accuracy, ROWS)
    assert imread(tmp_path / "a.png").shape[1] == 990


def test_the_style_leaves_no_trace():
    import matplotlib

    before = dict(matplotlib.rcParams)
    training.accuracy(ROWS)
    assert dict(matplotlib.rcParams) == before


def test_curves_differ_in_colour_marker_and_line():
    from matplotlib.colors import to_hex

    lines = training.accuracy(ROWS).axes[0].get_lines()[:3]
    for look in (lambda c: c.get_color(), lambda c: c.get_marker(), lambda c: c.get_linestyle()):
        assert len({look(line) for line in lines}) == 3
    with style.style():
        assert to_hex(lines[0].get_color()) == "#0072b2"


def test_the_training_plot_marks_the_picked_model_resumptions_and_chance(drawn):
    figure = drawn["accuracy"]
    axes, found = figure.axes[0], labels(figure)
    (star,) = (line for line in axes.get_lines() if line.get_marker() == "*")
    assert list(star.get_xdata()) == [3]
    assert list(star.get_ydata()) == [51.0]  # chosen on the validation images
    assert "resumed before epoch 2: --T1 30 (until now 20)." in figure.get_label()
    assert "resumed before epoch 4." in figure.get_label()
    assert found.count("resumed") == 1
    assert any(label.startswith("validation") for label in found)
    assert "chance 10 %" in found
    dotted = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label() != "resumed"]
    (resumed,) = (line for line in axes.get_lines() if line.get_label() == "resumed")
    assert resumed.get_xdata()[0] == 1.5
    assert 3.5 in dotted


def test_train_accuracies_of_adversarial_training_say_so(drawn):
    figure = training.accuracy(ROWS, adversarial=True)
    assert "Train accuracies are those on adversarial examples." in figure.get_label()
    assert labels(figure)[:2] == ["train (adversarial) 55.00 %", "test 54.00 %"]
    assert "adversarial" not in drawn["accuracy"].get_label()


def test_what_is_resumed_and_chance_look_different(drawn):
    axes = drawn["accuracy"].axes[0]
    looks = {line.get_linestyle() for line in axes.get_lines()[-2:]}
    assert len(looks) == 2


def test_many_resumptions_leave_a_readable_caption():
    figure = training.accuracy(ROWS, None, {n: "x" * 2000 for n in range(1, 40)})
    assert figure.get_label().count("resumed before") == 5
    assert "epoch 39" in figure.get_label()
    assert len(figure.get_label()) < 700


def test_saturation_is_counted_at_both_ends(drawn):
    assert training.saturation(torch.tensor([0.0, 0.005, 0.5, 1.0]), (0.0, 1.0)) == (0.5, 0.25)
    titles = [axes.get_title() for axes in drawn["activity"].axes]
    assert titles[0].startswith("$s_{1}$ (7×3×3)")
    assert "100.0 % at 0, 0.0 % at 1" in titles[1]
    assert "no activation" in titles[2]
    assert all(axes.get_ylim()[0] == 0 for axes in drawn["activity"].axes)


def test_the_bins_of_a_histogram_end_at_the_range_of_the_activation(drawn):
    for axes in drawn["activity"].axes[:2]:
        (shape,) = axes.patches
        assert (shape.get_xy()[:, 0].min(), shape.get_xy()[:, 0].max()) == (0.0, 1.0)


def test_the_characteristic_plot_has_two_ranges_and_the_training_s_T1(drawn):
    above, below = drawn["characteristic"].axes
    assert above.get_ylim() != below.get_ylim() and below.get_ylim()[1] > 100
    assert all(
        "T1 = 2 (training)" in axes.get_legend_handles_labels()[1] for axes in (above, below)
    )


def test_the_window_of_convergence_is_never_longer_than_the_phase(drawn):
    below = drawn["characteristic"].axes[1]
    assert len(below.get_lines()[0].get_xdata()) == 3
    assert "last min(5, t) steps" in drawn["characteristic"].get_label()


def test_only_the_linear_output_has_no_activation():
    figure = training.activity([torch.rand(4, 5), torch.randn(4, 5)], None, True)
    titles = [axes.get_title() for axes in figure.axes]
    assert ["no activation" in title for title in titles] == [False, True]


def test_captions_count_one_image_in_the_singular():
    caption = attacks.sweep(SWEEP, "pgd", "inf", 1, 1.0).get_label()
    assert caption.startswith("Adversarial accuracy over eps: pgd, L-infinity norm, 1 test image,")
    caption = training.confusion(np.eye(1, dtype=int), ["0"]).get_label()
    assert "of 1 test image," in caption


def test_a_sweep_has_0_and_its_eps_as_ticks_intervals_and_chance(drawn):
    figure = drawn["sweep"]
    (axes,) = figure.axes
    assert list(axes.get_xticks()) == [0.0, 0.01, 8 / 255, 0.1]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.01", "8/255", "0.1"]
    assert len(axes.containers) == 3
    for curve in axes.containers:
        points = curve.lines[0].get_xydata().tolist()
        assert points[0] == [0.0, 90.0]  # the clean accuracy
        assert points[-1] == [0.1, 0.0]
    assert "clean accuracy 90.00 %" in figure.get_label()
    assert "chance 10 %" in labels(figure)
    assert "bptt (upper bound)" in labels(figure)
    assert "an upper bound" in figure.get_label()


def test_curves_that_coincide_are_drawn_side_by_side(drawn):
    (axes,) = drawn["sweep"].axes
    places = [curve.lines[0].get_transform().transform((0.1, 50))[0] for curve in axes.containers]
    assert places[0] < places[1] < places[2]


def test_dense_eps_are_not_written_over_each_other():
    rows = [{**SWEEP[0], "eps": repr(e)} for e in (*np.linspace(0.1, 0.2, 90).tolist(), 0.20001)]
    figure = attacks.sweep(rows, *ATTACKED, 0.9)
    ticks = figure.axes[0].get_xticklabels()
    assert len(ticks) == 92
    with style.style():
        figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in ticks if text.get_text()]
    assert len(extents) > 3
    for left, right in itertools.pairwise(extents):
        assert left.x1 <= right.x0


@pytest.mark.parametrize("distances", [(0.3, 0.4), (1e-9, 1.0)])
def test_a_logarithmic_axis_is_labelled_at_powers_of_ten(distances):
    rows = [
        {"name": name, "estimate": "one-sided", "distance": distance}
        for name, distance in zip("ab", distances)
    ]
    figure = gdu_plots.gdu_overview(["a", "b"], rows)
    with style.style():
        figure.draw_without_rendering()
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    assert low < distances[0] and distances[1] < high
    shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(shown) >= 2
    assert not any(tick.label1.get_visible() for tick in axis.get_minor_ticks())


def test_eps_of_an_audit_are_fractions_of_255():
    curve = [(0.0, 1.0), *((2**n / 255, 0.5) for n in range(8))]
    figure = attacks.audit({**AUDITED, "curve": curve}, "quick")
    texts = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert len(texts) == 9
    assert all(text in ("", "0") or text.endswith("/255") for text in texts)
    assert sum(map(bool, texts)) >= 3


def test_the_rows_of_a_legend_are_equally_long():
    rows = [{**SWEEP[0], "eps": "0.1", "grad": f"gradient {n}"} for n in range(7)]
    legend = attacks.sweep(rows, *ATTACKED, 0.9).legends[0]
    with style.style():
        legend.figure.draw_without_rendering()
    heights = [text.get_window_extent().y0 for text in legend.get_texts()]
    counts = [heights.count(height) for height in dict.fromkeys(heights)]
    assert counts == [4, 3]


def test_four_gradient_methods_have_two_columns_of_a_page(drawn):
    assert drawn["sweep"].get_figwidth() == 3.3
    rows = [{**SWEEP[0], "eps": "0.1", "grad": grad} for grad in ("bptt", "smooth", "ep", "worst")]
    assert attacks.sweep(rows, *ATTACKED, 0.9).get_figwidth() == 6.9


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
    titles = [axes.get_title() for axes in drawn["gdu_layers"].axes]
    assert titles == ["synapses.0.weight", "synapses.1.bias", "$s_{1}$"]
    assert "s_1 is neurons_0" in drawn["gdu_layers"].get_label()


def test_adversarial_examples_have_classes_and_one_scale_and_say_how_they_were_chosen(drawn):
    figure = drawn["adversarial_examples"]
    rows = np.array(figure.axes[:21]).reshape(3, 7)
    names = [axes.get_ylabel() for axes in rows[:, 0]]
    assert names == ["image", "change", "adversarial\nexample"]
    above = [axes.get_title() for axes in rows[0]]
    assert above[:2] == ["automobile", "cat"]  # those that the attack misclassified
    assert rows[2, 0].get_xlabel() == "automobile"
    changes = [axes.get_images()[0] for axes in rows[1]]
    (scale,) = {image.get_clim() for image in changes}
    assert sum(scale) == 0
    assert {image.get_cmap().name for image in changes} == {"PuOr"}
    assert "All 2 test images misclassified only under attack" in figure.get_label()


def test_a_confusion_matrix_has_the_names_of_the_classes(drawn):
    (axes,) = drawn["confusion"].axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [text.get_text() for text in ticks] == list(NAMES)
    assert {text.get_text() for text in axes.texts} == {"", "100"}


def test_every_task_has_a_name_for_each_class():
    for task in data_utils.TASKS.values():
        assert len(set(task.names)) == task.classes


def test_an_audit_shows_accuracies_of_all_images_and_names_its_stages(drawn):
    figure = drawn["audit"]
    bars, curve = figure.axes
    assert [bar.get_width() for bar in bars.patches] == [75, 50, 25]
    assert labels(figure)[:3] == ["clean", "PGD", "standard ensemble"]
    assert curve.get_lines()[0].get_xydata().tolist() == [[0, 75], [0.5, 45], [1, 22.5]]
    assert "first 3 images" in figure.get_label()


def test_a_new_run_knows_its_format(tmp_path):
    config = Config().replace(figures="pdf", model="CNN", task="digits")
    setup = Setup("main.py", config, None, torch.device("cpu"))
    run = RunFolder.create(setup, {}, tmp_path)
    run.release()
    assert run.figures == "pdf" and run.about == "CNN on digits"
