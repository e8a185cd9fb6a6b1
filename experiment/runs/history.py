"""The history of a training, over all its resumptions."""

import dataclasses

from experiment.command_line import describe_change
from experiment.config import FINGERPRINTS, FLAGS, SESSION


@dataclasses.dataclass
class History:
    """A training so far, over all its resumptions.

    epochs: the rows of metrics.csv
    best: the best model so far, of `snapshot`; None if it is not known
    best_accuracy: its accuracy in % on the images that models are chosen on; -1 before the first
        epoch, None if it was computed on other images
    resumptions: {epoch: which arguments changed before it}; None if it is not known, as of a model
        that an earlier version saved
    requested: the most epochs that were requested, 0 if that is not known"""

    epochs: list[dict] = dataclasses.field(default_factory=list)
    best: dict | None = None
    best_accuracy: float | None = -1.0
    resumptions: dict[int, str] | None = dataclasses.field(default_factory=dict)
    requested: int = 0

    def changed_training(self, epochs: int) -> str:
        """The resumptions within the first `epochs` that make it another training, as text; ""
        without one. Data may have moved: like `training_identity`, it ignores their places."""
        ignored = {
            name
            for flag in FLAGS
            if flag.place or flag.repeats
            for name in (flag.name, flag.negative)
        }
        resumptions = []
        for epoch, text in (self.resumptions or {}).items():
            names = {part: part.partition(" ")[0].removeprefix("--") for part in text.split("; ")}
            changed = "; ".join(part for part, name in names.items() if name not in ignored)
            if changed and epoch <= epochs:
                resumptions.append(f"before epoch {epoch}: {changed}")
        return "; ".join(resumptions)


def chosen_on(args: dict) -> str:
    """The name of the images that a run's best model is chosen on. args: {dest: value}."""
    return f"{args['val_size']} validation images" if args.get("val_size") else "the test images"


def chosen_by(name: str, args: dict) -> str:
    """How the model in a checkpoint file of this name was chosen among the epochs: `test` or
    `validation`, the images that it is the best on, or `last`. args: {dest: value}."""
    if name != "model.pt":
        return "last"
    return "validation" if args.get("val_size") else "test"


def other_images(before: dict, now: dict) -> bool:
    """Whether the best model is chosen on other images than before. before, now: {dest: value}."""
    split = "train" if now["val_size"] else "test"
    sizes_differ = any(now[name] != before.get(name) for name in ("val_size", f"{split}_size"))
    return sizes_differ or f"{split}_data" in other_data(before, now)


def other_data(before: dict, now: dict) -> list[str]:
    """The names in config.FINGERPRINTS of data that changed although the number of images, a flag,
    did not. before, now: {dest: value}."""
    return [
        name
        for name, (_, size) in FINGERPRINTS.items()
        if name in before
        and name in now
        and before[name] != now[name]
        and before.get(size) == now.get(size)
    ]


def changes(before: dict, now: dict) -> list[str]:
    """The arguments and data that a resumed training changes, a text for each. before, now: {dest:
    value}."""
    flags = [
        describe_change(flag, now[flag.dest], "until now", before[flag.dest])
        for flag in FLAGS
        if flag.scope != SESSION and flag.dest in before and before[flag.dest] != now[flag.dest]
    ]
    return flags + [
        f"other {FINGERPRINTS[name][0]} images or labels: {name} {now[name]} "
        f"(until now {before[name]})"
        for name in other_data(before, now)
    ]


def best_of(epochs: list[dict]) -> float:
    """The best accuracy of the images that models are chosen on, in %; -1 without epochs."""
    return max((row.get("val_acc", row["test_acc"]) for row in epochs), default=-1.0)
