"""The tables of a run folder that fill row by row and go on after a kill: attack sweeps and
corruptions."""

import itertools
import json

import numpy as np

from data_utils import CORRUPTIONS, PUBLISHED, SEVERITIES, TASKS, UserError
from experiment.arguments import described
from experiment.devices import computed_on
from experiment.flags import LEAST_EPS, MOST_EPS
from experiment.plots import attacks, training
from experiment.runs.files import number, parse_json, read_text, replacing

HEADER = "# settings: "


def epoch_row(epoch, accuracies, seconds, convergence, settling, angles):
    """A row of metrics.csv. accuracies: {column: share}; convergence: a `Convergence`, None of a
    model without time steps, whose column stays empty; settling: a `StepCount`; angles: of
    `EnergyModel.angles`, in degrees."""
    percent = {name: round(100 * share, 4) for name, share in accuracies.items()}
    return {
        "epoch": epoch,
        "train_acc": percent.pop("train_acc"),
        "test_acc": percent.pop("test_acc"),
        "seconds": round(seconds, 2),
        **percent,
        "converged": "" if convergence is None else round(convergence.percent, 4),
        **settling.columns(),
        **{f"angle_{n}": round(angle, 3) for n, angle in enumerate(angles, 2)},
    }


def epoch_line(row, rate, settling):
    """A row of metrics.csv as a line of the log. rate: training images a second; settling: a
    `StepCount`."""
    validation = f"validation {row['val_acc']:.2f} %, " if "val_acc" in row else ""
    line = (
        f"train {row['train_acc']:.2f} %, {validation}test {row['test_acc']:.2f} %, {row['seconds']:.1f} s, "
        f"{rate:.0f} images/s"
        + (f", {settling}" if settling.images else "")
        + (f", {row['converged']:.2f} % converged" if row["converged"] != "" else "")
    )
    angles = " ".join(f"{value:.1f}" for name, value in row.items() if name.startswith("angle_"))
    return line + (f", angles {angles}" if angles else "")


def settings_of(path):
    """The settings that a table was made with, as its first lines say; None where there is no such
    table."""
    try:
        for line in read_text(path).splitlines():
            if line.startswith(HEADER):
                found = parse_json(line.removeprefix(HEADER))
                return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        pass
    return None


# Settings that earlier versions did not record: where one is missing it may have been anything.
LATER = ("data", "compile")


def same_settings(found, settings):
    """Whether a table with the settings `found`, as a file has them, is continued with `settings`.
    Of `data`, a fingerprint or {name: fingerprint}, counts what both have."""
    if not isinstance(found, dict):
        return False
    found, settings = _flat(found), _flat(json.loads(json.dumps(settings)))
    both = found.keys() & settings.keys()
    return all(found[name] == settings[name] for name in both) and all(
        name.split(" ")[0] in LATER for name in found.keys() ^ settings.keys()
    )


def _flat(settings):
    """The settings with an entry for each fingerprint of `data`."""
    flat, data = {**settings}, settings.get("data")
    if isinstance(data, dict) or data is None:
        flat.pop("data", None)
        flat.update({f"data {name}": value for name, value in (data or {}).items()})
    return flat


def read_eps(text: str | None) -> float | None:
    """The eps of an attack from a table, 0 or in the range of --eps; None for any other text."""
    value = number(text, 0, MOST_EPS)
    return value if value == 0 or value is not None and value >= LEAST_EPS else None


def gdu_table(rows):
    """The rows of a comparison of EP with BPTT, see `energy.gdu.compare_gdu`, as lines of text."""
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'':{width}}  estimate      RMSE  sign errors   cosine  distance  cosine by image: median, worst"
    ]
    for row in rows:
        images = "".join(
            f"{row[key]:10.4f}" for key in ("cosine_median", "cosine_worst") if key in row
        )
        lines.append(
            f"{row['name']:{width}}  {row['estimate']:10} {row['rmse']:7.4f}  {100 * row['sign_error']:9.2f} %"
            f"  {row['cosine']:7.4f}  {row['distance']:8.2e}{images}"
        )
    return lines


class Sweep:
    """The files of an attack sweep in a run folder: Adversarial_Accuracy.csv, and derived from its
    rows .txt and .png (other attacks and norms than PGD in the 2-norm have them in their names). A
    sweep of the same settings is found again, and keeps its rows, whatever eps were asked for then;
    before a sweep of other settings starts, the file of that name is moved aside to NAME_1 and so
    on.

    source: what is attacked, in words; text: the path of the table; rows: list of dicts, by eps;
    clean: accuracy without an attack."""

    # the .txt, which says whose files these are, moves last
    ENDS = (".csv", ".png", ".pdf", "_images.png", "_images.pdf", "_images.npz", ".txt")

    def __init__(self, run, settings, clean, source):
        self.run, self.settings, self.clean, self.source = run, settings, clean, source
        name = (settings["attack"], settings["attack_norm"])
        plain = "Adversarial_Accuracy" + ("" if name == ("pgd", "2") else "_{}_{}".format(*name))
        run.lock(plain)
        run.finish_move(plain, self.ENDS)
        found, self.rows = self._found(plain), []
        self.stem = found or plain
        if found:
            self.rows = self._judged(run.read_csv(f"{self.stem}.csv"))
        elif self.text.exists():
            run.move_aside(plain, self.ENDS)
        self.write()

    @property
    def text(self):
        return self.run.folder / f"{self.stem}.txt"

    def _judged(self, rows):
        """The rows of the table as it was found. Raises UserError where they are not as `add`
        writes them."""
        shares = ("clean", "adversarial", "masked", "unmoved")
        for row in rows:
            numbers = [number(row.get(name), 0, 1) for name in shares]
            numbers += [read_eps(row.get("eps")), number(row.get("mean_norm"), 0, MOST_EPS**2)]
            if not row.get("grad") or None in numbers:
                raise UserError(
                    f"{self.run.folder / self.stem}.csv is damaged: a row says {described(row)}; move it "
                    "away to begin anew"
                )
        return rows

    def _found(self, plain):
        """The name of the sweep that was made with these settings, or else with what is recorded of
        them; None if there is none."""
        found = {}
        for stem in (plain, *(f"{plain}_{n}" for n in range(1, self.run.next_number(plain)))):
            told = settings_of(self.run.folder / f"{stem}.txt")
            told = told and {key: value for key, value in told.items() if key != "eps_list"}
            if same_settings(told, self.settings):
                found.setdefault(told == self.settings, stem)
        return found.get(True, found.get(False))

    def has(self, eps):
        return any(float(row["eps"]) == eps for row in self.rows)

    def add(self, eps, results):
        """The rows of one eps: results as `model_utils.attack` returns them."""
        for grad, result in results.items():
            self.rows.append(
                {
                    "eps": repr(eps),
                    "grad": grad,
                    "clean": f"{self.clean:.6f}",
                    "adversarial": f"{result['correct'].mean():.6f}",
                    "masked": f"{result['masked']:.6f}",
                    "unmoved": f"{result['unmoved']:.6f}",
                    "mean_norm": f"{result['mean_norm']:.6g}",
                    "computed_on": computed_on(),
                }
            )
        self.rows.sort(key=lambda row: float(row["eps"]))
        self.run.write_csv(f"{self.stem}.csv", self.rows)
        self.write()

    def write(self):
        """Derives the text from the rows."""
        places = [row["computed_on"] for row in self.rows if row.get("computed_on")]
        places = "; ".join(dict.fromkeys(places))
        lines = [
            HEADER + json.dumps(self.settings, sort_keys=True),
            f"# examined: {self.source}" + f"; computed on: {places}" * bool(places),
            "# masked: share of images whose gradient was exactly zero or not finite at "
            "some iteration; unmoved: whose perturbation is zero",
            "# eps, clean accuracy, adversarial accuracy (of the strongest gradient, per image)",
        ]
        for _, group in itertools.groupby(self.rows, key=lambda row: row["eps"]):
            group = list(group)
            lines += [
                f"# {r['grad']}: adversarial {r['adversarial']}, masked {r['masked']}, unmoved {r['unmoved']}, "
                f"mean norm {r['mean_norm']}"
                + (", an upper bound only" if float(r["masked"]) > 0.01 else "")
                for r in group
            ]
            lines.append(
                f"{float(group[-1]['eps']):g} {group[-1]['clean']} {group[-1]['adversarial']}"
            )
        self.run.write_lines(self.text.name, lines)

    def plot(self):
        self.run.save_figure(
            f"{self.stem}.png",
            attacks.sweep,
            self.rows,
            self.settings,
            self.clean,
            1 / TASKS[self.settings["task"]].classes,
        )

    def save_images(self, images, labels, clean, eps, result):
        """All attacked images as .npz, and a picture of some, those that changed class first."""
        with (
            replacing(self.run.folder / f"{self.stem}_images.npz") as path,
            open(path, "wb") as file,
        ):
            np.savez_compressed(
                file,
                x_adv=result["x_adv"],
                labels=labels.numpy(),
                prediction=result["prediction"],
                eps=eps,
            )
        title = f"Attacked images: {self.settings['attack']}, {self.settings['attack_norm']}-norm, eps = {eps:g}"
        self.run.save_figure(
            f"{self.stem}_images.png",
            lambda: attacks.attacked_images(
                (images.float() / 255).numpy(), labels, clean.numpy(), result, title
            ),
        )


class CorruptionTable:
    """Corruption_Accuracy.txt and .png of a run folder: a row per corruption, its accuracy at each
    severity. The rows of the same settings are kept, so that a killed run goes on; a file of other
    settings is moved aside to Corruption_Accuracy_1.txt and so on.

    settings: what the rows depend on, of `data` {corruption: fingerprint}; names: the corruptions
    that there are, in their order; source: what is examined, in words; text: the path of the table;
    rows: {corruption: its accuracies as written, one per severity}; places: where they were
    computed.
    """

    PLACES = "; computed on: "

    def __init__(self, run, settings, names, source):
        self.run, self.settings, self.text = run, settings, run.folder / "Corruption_Accuracy.txt"
        run.lock("Corruption_Accuracy")
        self.rows, self.source, self.places = {}, source, []
        before = settings_of(self.text)
        if same_settings(before, settings):
            known = before.get("data")
            known = known if isinstance(known, dict) else {}
            self.settings = {**settings, "data": {**known, **settings["data"]}}
            lines = read_text(self.text).splitlines()
            self.rows = {
                name: shares
                for name, *shares in filter(None, map(str.split, lines))
                if name in CORRUPTIONS
                and len(shares) == SEVERITIES
                and all(number(share, 0, 1) is not None for share in shares)
            }
            places = [line.partition(self.PLACES)[2].split("; ") for line in lines[:2]]
            self.places = [place for line in places for place in line if place]
        elif self.text.exists():
            run.move_aside("Corruption_Accuracy", (".png", ".pdf", ".txt"))
        self.names = [name for name in CORRUPTIONS if name in names or name in self.rows]

    def add(self, name, accuracies):
        self.rows[name] = [f"{accuracy:.6f}" for accuracy in accuracies]
        self.places = list(dict.fromkeys([*self.places, computed_on()]))
        self.write()

    def _mean(self, names):
        """The mean accuracy over some corruptions and all severities; None where one is missing."""
        shares = [self.rows.get(name) for name in names]
        return None if None in shares else float(np.mean(np.array(shares, dtype=float)))

    def means(self):
        """(over all corruptions, over those that published means are over), None where one is
        missing."""
        return self._mean(CORRUPTIONS), self._mean(PUBLISHED)

    def write(self):
        lines = [
            HEADER + json.dumps(self.settings, sort_keys=True),
            f"# corruption, accuracy at severity 1 to 5, of {self.source}"
            f"{self.PLACES}{'; '.join(self.places)}",
        ]
        lines += [f"{name} {' '.join(self.rows[name])}" for name in self.names if name in self.rows]
        if len(self.rows) == len(self.names):
            everything, first = self.means()
            over = f"over all {len(CORRUPTIONS)}: {everything or 0:.6f}, " * (
                everything is not None
            )
            lines.append(f"# mean {over}over the first {len(PUBLISHED)}: {first:.6f}")
        self.run.write_lines(self.text.name, lines)

    def plot(self):
        shares = np.array(
            [[100 * float(share) for share in self.rows[name]] for name in self.names]
        )
        self.run.save_figure(
            "Corruption_Accuracy.png",
            training.corruptions,
            shares,
            self.names,
            self.means(),
            self.settings["images"],
        )
