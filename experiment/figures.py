"""The figures of a run folder: functions from numbers to a Matplotlib figure."""
import numpy as np
import torch
from matplotlib.figure import Figure


def accuracy(rows):
    """Accuracies over the epochs. rows: those of metrics.csv, as dicts."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy of the free phase")
    epochs = [row["epoch"] for row in rows]
    for key, label in (("train_acc", "train, during the epoch"), ("test_acc", "test, after the epoch")):
        axes.plot(epochs, [row[key] for row in rows], marker="o", markersize=3,
                  label=f"{label} (last {rows[-1][key]:.2f})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def activity(neurons):
    """Histogram of each layer's neurons at the end of a free phase. neurons: list of tensors, one per layer."""
    figure = Figure(figsize=(3.2 * len(neurons), 3.2), layout="constrained")
    figure.suptitle("Neurons at the end of the free phase, last training batch")
    for n, (axes, state) in enumerate(zip(figure.subplots(1, len(neurons), squeeze=False)[0], neurons), 1):
        values = state.detach().float().flatten().cpu().numpy()
        low, high = float(values.min()), float(values.max())
        margin = 0.0 if high - low > 1e-3 else 0.5  # saturated layers can hold one value only
        axes.hist(values, bins=50, range=(low - margin, high + margin), log=True)
        axes.set_title(f"s_{n}, {' x '.join(map(str, state.shape[1:]))}", fontsize=9)
        axes.set_xlabel("activation")
    figure.axes[0].set_ylabel("neurons")
    return figure


def characteristic(accuracy, settled, eps):
    """The shares of images classified correctly and settled over the free steps; each a list with an entry per step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="time steps of the free phase", ylabel="share of the test images (%)",
                              ylim=(-2, 102),
                              title="Accuracy over the number of free steps")
    for shares, label, style in ((accuracy, f"classified correctly (last {100 * accuracy[-1]:.2f})", "-"),
                                 (settled,
                                  f"settled: no layer moved by {eps:g} of its norm (last {100 * settled[-1]:.2f})",
                                  "--")):
        axes.plot(range(1, len(shares) + 1), [100 * share for share in shares], style, marker="o" if len(shares) <= 50
                  else None,
                  markersize=3, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=9)
    return figure


def gdu_entries(name, bptt, ep, generator, shown=5):
    """Cumulative EP (dashed) and BPTT (solid) over time for some entries of one parameter or layer, drawn with
    `generator`.

    bptt, ep: (T2, *shape)."""
    live = bptt.flatten(1).abs().sum(0).cpu().nonzero().flatten()  # entries that stay 0 have nothing to show
    candidates = live if len(live) else torch.arange(bptt[0].numel())
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:shown]]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="time steps of the nudged phase, and of BPTT from the end",
                              ylabel="cumulative estimate",
                              title=f"{name}: EP (dashed) and BPTT (solid)")
    time = range(1, len(bptt) + 1)
    for n, entry in enumerate(chosen.tolist()):
        place = ", ".join(str(int(i)) for i in np.unravel_index(entry, bptt.shape[1:]))
        for estimate, style in ((bptt, "-"), (ep, "--")):
            axes.plot(time, estimate.flatten(1)[:, entry].cumsum(0).cpu().numpy(), style, color=f"C{n}",
                      label=f"[{place}]" if style == "-" else None)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="entry", title_fontsize=8)
    return figure


def gdu_overview(names, rows):
    """The distance of the summed EP estimates to BPTT, of all parameters and layers. rows: of `compare_gdu`."""
    figure = Figure(figsize=(7, 1.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel="||sum of EP - sum of BPTT|| / ||sum of BPTT||",
                              title="Distance of the summed EP estimates to BPTT")
    for n, estimate in enumerate(dict.fromkeys(row["estimate"] for row in rows)):
        values = {row["name"]: row["distance"] for row in rows if row["estimate"] == estimate}
        axes.plot([values[name] for name in names], range(len(names)), "os"[n], label=estimate)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def sweep(rows, settings, clean):
    """Accuracy under attack over eps, a curve per gradient. rows: those of an attack sweep's table."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=f"eps ({settings['attack_norm']}-norm, images in [0, 1])", ylabel="accuracy (%)",
                              xscale="log",
                              title=f"{settings['attack']}, {settings['images']} images", ylim=(0, 100))
    axes.axhline(100 * clean, color="black", linewidth=1, label="clean")
    for grad in dict.fromkeys(row["grad"] for row in rows):
        own = [row for row in rows if row["grad"] == grad and float(row["eps"]) > 0]
        bound = " (upper bound: gradients vanish)" if any(float(r["masked"]) > 0.01 for r in own) else ""
        axes.plot([float(r["eps"]) for r in own], [100 * float(r["adversarial"]) for r in own], marker="o",
                  markersize=3, label=grad + bound)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def attacked_images(images, labels, clean, result, title, shown=6):
    """Some attacked images, those that changed class first: the image, the change, the attacked image.

    images: (n, C, H, W) in [0, 1]; labels: (n,); clean: (n,) bool, whether classified correctly; result: of
    `model_utils.attack`."""
    chosen = np.argsort(result["correct"] | ~clean, kind="stable")[:shown]
    figure = Figure(figsize=(1.6 * len(chosen) + 0.6, 5.4), layout="constrained")
    figure.suptitle(title)
    for column, i in enumerate(chosen):
        delta = result["x_adv"][i] - images[i]
        scale = np.abs(delta).max() or 1.0
        before = f"{labels[i]}" if clean[i] else f"not {labels[i]}"
        panels = ((images[i], f"predicted {before}"), (0.5 + delta / (2 * scale), f"change, up to {scale:.2g}"),
                  (result["x_adv"][i], f"predicted {result['prediction'][i]}"))
        for row, (panel, caption) in enumerate(panels):
            axes = figure.add_subplot(3, len(chosen), row * len(chosen) + column + 1)
            axes.imshow(np.clip(panel, 0, 1).transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(caption, fontsize=8)
            axes.axis("off")
    return figure


def corruptions(shares, names, means, images):
    """A heat map of the accuracy under each corruption and severity. shares: (corruptions, severities), in %; means:
    fractions."""
    figure = Figure(figsize=(6, 7.5), layout="constrained")
    axes = figure.add_subplot(xlabel="severity", title=f"Accuracy (%) under corruption, {images} images each\n"
                              f"mean {100 * means[0]:.1f}, of the first 15 {100 * means[1]:.1f}")
    picture = axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.1f}", ha="center", va="center", fontsize=9, color="black" if share > 60
                  else "white")
    axes.set_xticks(range(shares.shape[1]), range(1, shares.shape[1] + 1))
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.axhline(14.5, color="white", linewidth=3)  # the four extra ones are below
    figure.colorbar(picture, label="accuracy (%)", shrink=0.6)
    return figure


def audit(result, title):
    """Images that stand after each attack of an audit, and accuracy over eps. result: see `audit_checks.result_of`."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(f"{title}: {100 * result['robust']:.1f} %, " + ("trusted" if result["trusted"]
                                                                     else "not trusted, an upper bound"))
    left, right = figure.subplots(1, 2)
    names = ["clean", *(f"{attack['stage']} {attack['name']}" for attack in result["attacks"])]
    counts = [round(result["clean"] * result["images"]), *(attack["standing"] for attack in result["attacks"])]
    left.step(range(len(names)), counts, where="post", marker="o", markersize=3)
    left.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    left.set(ylabel="images that stand", ylim=(0, None))
    eps, shares = zip(*result["curve"])
    right.plot(eps, [100 * share for share in shares], marker="o", markersize=3, label="strongest gradient alone")
    right.axhline(100 * result["robust"], linestyle="--", color="C1", label="robust, of all attacks")
    right.set_xscale("symlog", linthresh=max(eps[1], 1e-9) if len(eps) > 1 else 1.0)
    right.set(xlabel="eps", ylabel="accuracy (%)", ylim=(-2, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure
