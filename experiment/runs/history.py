"""The story of a training, from epoch to epoch and over its resumptions, and what checkpoints hold
of it."""

import dataclasses

from experiment.arguments import contrast
from experiment.flags import ALL, DATA
from experiment.runs import training_state


@dataclasses.dataclass
class Story:
    """What a training has gone through. history: the rows of metrics.csv; best: the best model
    until now, as `snapshot` made it, None where it is not known; best_accuracy: its accuracy in %
    on the images that models are chosen on, -1 before the first epoch, None where it was measured
    on others; resumptions: {epoch: which arguments changed before it}; asked: the most epochs that
    it was asked to have, 0 where that is not known."""

    history: list = dataclasses.field(default_factory=list)
    best: dict | None = None
    best_accuracy: float | None = -1.0
    resumptions: dict = dataclasses.field(default_factory=dict)
    asked: int = 0


def chosen_on(args):
    """The images that a run's best model is chosen on, in words. args: {dest: value}."""
    return f"{args['val_size']} validation images" if args.get("val_size") else "the test images"


def other_images(before, now):
    """Whether the best model is chosen on other images than before. before, now: {dest: value}."""
    data, size = ("train_data", "train_size") if now["val_size"] else ("test_data", "test_size")
    others = any(now[name] != before.get(name) for name in ("val_size", size))
    return others or data in other_data(before, now)


def other_data(before, now):
    """The names of flags.DATA whose fingerprint has changed; without those that are not recorded,
    and those of another number of images, which `changes` names by its flag. before, now: {dest:
    value}."""
    return [
        name
        for name, (_, size) in DATA.items()
        if name in before
        and name in now
        and before[name] != now[name]
        and before.get(size) == now.get(size)
    ]


def changes(before, now):
    """What a resumed training does otherwise than until now, a text per argument. before, now:
    {dest: value}."""
    flags = [
        contrast(flag, now[flag.dest], "until now", before[flag.dest])
        for flag in ALL
        if flag.scope != "session" and flag.dest in before and before[flag.dest] != now[flag.dest]
    ]
    return flags + [
        f"other {DATA[name][0]} images or labels: {name} {now[name]} (until now {before[name]})"
        for name in other_data(before, now)
    ]


def snapshot(model, args, story):
    """What is written down of a model after the epochs of `story`."""
    return {
        "model_state_dict": model.state_dict(),
        "config": vars(args),
        **summary(story.history),
        "best": story.best_accuracy,
    }


# The names of what `resumable_state` adds.
RESUMABLE = ("opt", "scheduler", "random_states", "best_model", "resumptions", "asked")


def resumable_state(story, optimizer, scheduler, generator):
    """What a checkpoint holds besides `snapshot`, so that training can go on from it. It carries
    the best model along, so that one file commits all that an epoch changes."""
    return {
        "opt": optimizer.state_dict(),
        "scheduler": scheduler and scheduler.state_dict(),
        "random_states": training_state.random_states(generator),
        "best_model": story.best,
        "resumptions": story.resumptions,
        "asked": story.asked,
    }


def summary(history):
    """What checkpoints say of a history: themselves, and under the names of the original code."""
    return {
        "epoch": len(history),
        "history": history,
        "train_acc": [row["train_acc"] for row in history],
        "test_acc": [row["test_acc"] for row in history],
        "best": best_of(history),
    }


def best_of(history):
    """The best accuracy of a history by which models are chosen, in %; -1 before the first
    epoch."""
    return max((row.get("val_acc", row["test_acc"]) for row in history), default=-1.0)
