"""The figures of gducheck and of attacks: functions from numbers to a Matplotlib figure."""

import numpy as np
import torch

from experiment.plots.style import (
    eps_name,
    grid,
    legend_below,
    new_figure,
    style,
    ticks_at,
    whole_ticks,
)
from metrics import wilson

CUMULATIVE = "cumulative estimate"
TIME = "time steps of the nudged phase, and of BPTT from the end"


def _draw_entries(axes, bptt, ep, generator, shown):
    """Cumulative EP and BPTT over time for some entries, in a colour each, drawn with `generator`.
    Returns their places."""
    live = (
        bptt.flatten(1).abs().sum(0).cpu().nonzero().flatten()
    )  # entries that stay 0 have nothing to show
    candidates = live if len(live) else torch.arange(bptt[0].numel())
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:shown]].tolist()
    time = range(1, len(bptt) + 1)
    for n, entry in enumerate(chosen):
        for estimate, look in (
            (bptt, {"linestyle": "-", "marker": "o"}),
            (ep, {"linestyle": "--", "marker": "x", "markersize": 6}),
        ):
            axes.plot(
                time,
                estimate.flatten(1)[:, entry].cumsum(0).cpu().numpy(),
                color=f"C{n}",
                **{"markersize": 3, **look, "marker": look["marker"] if len(bptt) <= 20 else ""},
            )
    axes.axhline(0, color="black", linewidth=0.5, linestyle="-", marker="")
    if len(bptt) == 1:
        axes.set_xticks([1], ["complete"])
    else:
        whole_ticks(axes.xaxis)
    return [
        ", ".join(str(int(i)) for i in np.unravel_index(entry, bptt.shape[1:])) for entry in chosen
    ]


def _line(color, label, linestyle="-", marker=""):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=linestyle, marker=marker, label=label)


def _kinds():
    return [_line("black", "BPTT", "-", "o"), _line("black", "EP", "--", "x")]


def _what(name):
    """A name of `check_gdu` in words: of neurons BPTT's side holds the slope of the activation."""
    layer = name.removeprefix("neurons_")
    return name if layer == name else f"{name} (layer s_{int(layer) + 1}, BPTT times slope)"


@style()
def gdu_entries(name, bptt, ep, generator, shown=5):
    """Cumulative EP (dashed) and BPTT (solid) over time for some entries of one parameter or layer,
    drawn with `generator`.

    bptt, ep: (T2, *shape), what the theorem compares, see `energy.gdu.comparable`."""
    figure = new_figure(f"EP against BPTT: {_what(name)}", height=4.2)
    axes = figure.add_subplot(
        xlabel=TIME if len(bptt) > 1 else "of the whole nudged phase", ylabel=CUMULATIVE
    )
    places = _draw_entries(axes, bptt, ep, generator, shown)
    entries = [_line(f"C{n}", f"[{place}]") for n, place in enumerate(places)]
    figure.legend(handles=[*_kinds(), *entries], loc="outside lower center", ncols=4)
    return figure


@style()
def gdu_layers(bptt, ep, generator, shown=5):
    """`gdu_entries` of all parameters and layers, a named panel each. bptt, ep: {name: tensor},
    time first."""
    columns = min(3, len(bptt))
    figure = new_figure(
        "EP against BPTT, some entries of each parameter and layer (a colour each)",
        2.9 * columns,
        1.0 + 2.0 * -(-len(bptt) // columns),
    )
    for axes, (name, own) in zip(grid(figure, len(bptt), columns), bptt.items()):
        _draw_entries(axes, own, ep[name], generator, shown)
        axes.set_title(_what(name).replace(" (", "\n("))
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    figure.supylabel(CUMULATIVE)
    figure.legend(handles=_kinds(), loc="outside lower center", ncols=2, title=f"over {TIME}")
    return figure


@style()
def gdu_overview(names, rows):
    """The distance of the summed EP estimates to BPTT, of all parameters and layers. rows: of
    `compare_gdu`."""
    figure = new_figure(
        "Distance of the summed EP estimates to BPTT", height=1.6 + 0.28 * len(names)
    )
    axes = figure.add_subplot(
        xlabel="||sum of EP - sum of BPTT|| / ||sum of BPTT||, 0.01 is 1 %", xscale="log"
    )
    for n, estimate in enumerate(dict.fromkeys(row["estimate"] for row in rows)):
        values = {row["name"]: row["distance"] for row in rows if row["estimate"] == estimate}
        axes.plot(
            [values[name] for name in names],
            range(len(names)),
            "os"[n],
            linestyle="",
            label=estimate,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    legend_below(figure)
    return figure


@style()
def sweep(rows, settings, clean, chance=None):
    """Accuracy under attack over eps, a curve per gradient, with 95 % intervals of Wilson.

    rows: those of an attack sweep's table; settings: of the sweep; clean, chance: accuracies as
    fractions."""
    norm, images = settings["attack_norm"], settings["images"]
    figure = new_figure(
        f"Accuracy under attack: {settings['attack']}, {norm}-norm, {images} images"
    )
    axes = figure.add_subplot(
        xlabel=f"eps ({norm}-norm, images in [0, 1])",
        ylabel="accuracy (%)",
        xscale="log",
        ylim=(-2, 102),
    )
    low, high = (100 * share for share in wilson(clean, images))
    axes.axhspan(low, high, color="0.8", alpha=0.5, linewidth=0)
    axes.axhline(
        100 * clean,
        color="black",
        linewidth=1,
        linestyle="-",
        marker="",
        label=f"clean ({100 * clean:.2f})",
    )
    if chance is not None:
        axes.axhline(
            100 * chance,
            color="0.5",
            linewidth=1,
            linestyle=(0, (1, 3)),
            marker="",
            label=f"chance ({100 * chance:g})",
        )
    grads, attacked = list(dict.fromkeys(row["grad"] for row in rows)), set()
    for n, grad in enumerate(grads):
        own = [row for row in rows if row["grad"] == grad and float(row["eps"]) > 0]
        bound = (
            ", an upper bound: gradients vanish"
            if any(float(r["masked"]) > 0.01 for r in own)
            else ""
        )
        share = np.array([float(r["adversarial"]) for r in own])
        bars = np.array([np.abs(np.array(wilson(s, images)) - s) for s in share]).reshape(-1, 2).T
        # side by side, as curves often coincide
        eps = np.array([float(r["eps"]) for r in own])
        axes.errorbar(
            eps * 1.012 ** (n - (len(grads) - 1) / 2),
            100 * share,
            100 * bars,
            color=f"C{n}",
            marker="os^Dv"[n % 5],
            linestyle=("-", "--", "-.", ":")[n % 4],
            label=grad + bound,
        )
        attacked.update(eps.tolist())
    if attacked:
        ticks_at(axes, sorted(attacked), [eps_name(eps, norm) for eps in sorted(attacked)])
    legend_below(figure, 3, title=f"bars and band: 95 % intervals (Wilson) for {images} images")
    return figure


def _chosen(result, clean, shown):
    """(indices of the images to show, how they were chosen, in words)"""
    turned = clean & ~result["correct"]
    chosen = np.argsort(~turned, kind="stable")[:shown]
    count = int(turned[chosen].sum())
    if count == len(chosen):
        return (
            chosen,
            f"Shown are the first {count} test images that the attack turned from right to wrong.",
        )
    return chosen, (
        f"Shown are all {count} test images that the attack turned from right to wrong, then the first of "
        "the others."
    )


@style()
def attacked_images(images, labels, clean, result, title, shown=6):
    """Some attacked images, those that became wrong first: the image, the change, the attacked
    image, a row each.

    images: (n, C, H, W) in [0, 1]; labels: (n,); clean: (n,) bool, whether classified correctly;
    result: of `model_utils.attack`. The change is the mean over the channels, on one scale for
    all."""
    labels, clean = np.asarray(labels), np.asarray(clean)
    chosen, how = _chosen(result, clean, shown)
    changes = (result["x_adv"] - images)[chosen].mean(1)
    scale = np.abs(changes).max(initial=0.0) or 1.0
    figure = new_figure(title, 1.15 * len(chosen) + 1.6, 4.4)
    panels = figure.subplots(3, len(chosen), squeeze=False)
    for column, i in enumerate(chosen):
        true = int(labels[i])
        captions = (
            f"true {true}\n" + ("predicted right" if clean[i] else f"predicted not {true}"),
            "",
            f"predicted {int(result['prediction'][i])}",
        )
        for row, (panel, caption) in enumerate(
            zip((images[i], changes[column], result["x_adv"][i]), captions)
        ):
            axes = panels[row, column]
            if row == 1:
                change = axes.imshow(panel, cmap="PuOr", vmin=-scale, vmax=scale)
            else:
                axes.imshow(
                    np.clip(panel, 0, 1).transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1
                )
            axes.set_title(caption, fontsize=8)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
    for axes, name in zip(panels[:, 0], ("image", "change", "attacked\nimage")):
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.colorbar(
        change,
        ax=list(panels[1]),
        label="change" + (", mean of\nthe colours" if images.shape[1] > 1 else ""),
        shrink=0.9,
    )
    figure.supxlabel(how, fontsize=8)
    return figure


@style()
def audit(result, title):
    """Images that stand after each attack of an audit, and accuracy over eps. result: as
    `audit.AuditFiles` writes it."""
    verdict = "trusted" if result["trusted"] else "not trusted, an upper bound"
    figure = new_figure(
        f"{title}: {100 * result['robust']:.1f} %, {verdict}",
        9,
        max(3.8, 1.6 + 0.16 * len(result["attacks"])),
    )
    left, right = figure.subplots(1, 2)
    names = ["clean", *(f"{attack['stage']} {attack['name']}" for attack in result["attacks"])]
    counts = [
        round(result["clean"] * result["images"]),
        *(attack["standing"] for attack in result["attacks"]),
    ]
    left.barh(range(len(names)), counts, height=0.7)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(
        xlabel=f"of {result['images']} images stand after it", xlim=(0, max(result["images"], 1))
    )
    left.invert_yaxis()
    eps, shares = zip(*result["curve"])
    right.plot(
        eps,
        [100 * share for share in shares],
        clip_on=False,
        label=f"PGD, strongest gradient, {result['sample']} images",
    )
    bound, robust = float(result["settings"]["eps"]), 100 * result["robust"]
    low, high = (100 * share for share in result["interval"])
    right.errorbar(
        bound,
        robust,
        [[robust - low], [high - robust]],
        color="C1",
        linestyle="",
        marker="D",
        capsize=3,
        label=f"all attacks, {result['images']} images, 95 %",
    )
    right.set_xscale("symlog", linthresh=max(eps[1], 1e-9) if len(eps) > 1 else 1.0)
    right.set_xticks(
        eps,
        [eps_name(e, result["settings"]["attack_norm"]) if e else "0" for e in eps],
        rotation=45,
    )
    right.minorticks_off()
    right.set(xlabel="eps, images in [0, 1]", ylabel="accuracy (%)", ylim=(-2, 104), xlim=(0, None))
    legend_below(figure)
    return figure
