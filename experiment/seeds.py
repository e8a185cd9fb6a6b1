"""One training after another that differ in the seed alone. What an earlier call of the same
command has finished is left, what it began goes on, and what another process trains just now is
left to it: on several GPUs the same command is started once for each."""

import contextlib
import functools
import hashlib
import json
import pathlib
import sys

from data_utils import UserError, fingerprint, load_split
from experiment import arguments, checks, compare, measured
from experiment.flags import ALL, DATA, typed
from experiment.runs import checkpoint, resume
from experiment.runs.files import Busy, Lock, WriteFailed, parse_json, read_text, why
from experiment.runs.folder import remove_half_made
from experiment.runs.history import other_data
from experiment.workers import Workers

# Flags that a resumed run takes from the command line: data, for example, may have moved meanwhile.
OF_THIS_CALL = [
    flag
    for flag in ALL
    if flag.scope == "session" or flag.dest in measured.PLACES and flag.dest != "seed"
]


def train_each(given, words, start, root="results"):
    """Trains with each of --seeds; returns the exit code of the first that fails, or 0. given: of
    `arguments.parse`; words: the command line; start(given, words): trains once and returns its
    exit code. Raises UserError."""
    if "seed" in given or "load_path" in given:
        raise UserError(
            "argument --seeds: it says which seeds there are and finds what they have left: give neither "
            "--seed nor --load-path with it"
        )
    if not given.get("save"):
        raise UserError(
            "argument --seeds: it needs --save, as runs are found again by their folders"
        )
    if Workers.launched().size > 1:
        raise UserError(
            "argument --seeds: it is for single processes: start it with python instead of torchrun, on "
            "several GPUs once for each"
        )
    if "run_dir" in given:
        return _train_each_below(given, words, start)
    done, unreadable = [], set()
    shared = {name: value for name, value in given.items() if name != "seeds"}
    data = functools.cache(functools.partial(_fingerprints, arguments.resolve(shared)))
    for seed in dict.fromkeys(given["seeds"]):
        one = {**shared, "seed": seed}
        args = arguments.resolve(one)
        checks.check(args)
        runs = pathlib.Path(root, args.alg, args.loss)
        with _claimed(args, runs) as mine:
            folder, epochs = _found(args, runs, data, unreadable)
            if mine and epochs < args.epochs:
                code = start(*_command(one, words, folder, args.epochs - epochs))
                if code:
                    return code
                folder, epochs = _found(args, runs, data, unreadable)
            elif mine and epochs == args.epochs:
                print(f"seed {seed}: {epochs} epochs are in {folder} already")
        if not mine:
            continue  # it may have any number of epochs at this moment
        if epochs == args.epochs:
            done.append(folder)
        elif epochs > args.epochs:
            print(
                f"seed {seed}: {folder} has {epochs} epochs, not the {args.epochs} of --epochs; "
                "it is left out of the mean"
            )
    _say(done, len(set(given["seeds"])))
    return 0


def _train_each_below(given, words, start):
    """Train each of --seeds in the folder seed_N below --run-dir. Returns as `train_each`."""
    done, root = [], pathlib.Path(given["run_dir"])
    shared = {name: value for name, value in given.items() if name != "seeds"}
    words = _without(_without(words, "--seeds"), "--run-dir")
    wanted = given.get("epochs")  # without it those of the first run
    for seed in dict.fromkeys(given["seeds"]):
        folder = root / f"seed_{seed}"
        with _claimed_folder(folder, seed) as mine:
            if mine:
                one = {**shared, "seed": seed, "run_dir": str(folder)}
                code = start(one, [*words, "--run-dir", str(folder), "--seed", str(seed)])
                if code:
                    return code
                epochs = _epochs(folder, wanted)
                wanted = wanted or epochs
                if epochs == wanted:
                    done.append(folder)
                else:
                    print(
                        f"seed {seed}: {folder} has {epochs} epochs, not {wanted}; it is left "
                        "out of the mean"
                    )
    _say(done, len(set(given["seeds"])))
    return 0


def _lock(seed, folder, name=""):
    """The Lock of a seed's training; None, with a note, if another process holds it. Raises
    UserError."""
    try:
        return Lock(folder, name)
    except Busy as e:
        print(
            f"note: seed {seed} is left to another process, which trains it: {e.holder}{e.delete}",
            file=sys.stderr,
        )
        return None


@contextlib.contextmanager
def _claimed_folder(folder, seed):
    """A block in which no other process with --seeds trains in `folder`; gives False if any process
    does. Raises UserError."""
    resume.make_folder(folder)
    lock = _lock(seed, folder.parent, folder.name)
    try:
        training = lock and _lock(seed, folder)
        if training:
            training.release()  # taken again by the training itself
        yield training is not None
    finally:
        if lock:
            lock.release()


@contextlib.contextmanager
def _claimed(args, runs):
    """A block in which no other process trains with `args`; gives False if another one does. runs:
    the folder of the runs with this --alg and --loss. Raises UserError."""
    training = json.dumps(measured.of_training(vars(args)), sort_keys=True)
    digest = hashlib.sha256(training.encode()).hexdigest()[:12]
    try:
        runs.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise WriteFailed(f"cannot create the folder {runs}: {why(e)}") from None
    remove_half_made(runs)
    lock = _lock(args.seed, runs, f"seed_{args.seed}_{digest}")
    try:
        yield lock is not None
    finally:
        if lock:
            lock.release()


def _fingerprints(args):
    """{name of flags.DATA: fingerprint} of what a training would read; {} where it cannot."""
    try:
        splits = {
            "train_data": load_split(args.task, args.data_dir, True, args.train_size),
            "test_data": load_split(args.task, args.data_dir, False, args.test_size),
        }
    except UserError:
        return {}
    return {name: fingerprint(arrays) for name, arrays in splits.items()}


def _found(args, runs, data, unreadable):
    """(run folder, its epochs) of the training with `args` on the same data: a run of args.epochs,
    else the longest that is shorter, else the shortest that is longer; (None, 0) without one.
    data(): the fingerprints of the data; unreadable: the runs that a note has named already; adds
    those that cannot be read."""
    best, wanted = (None, 0), {**measured.of_training(vars(args)), "seed": args.seed}
    for path in sorted(runs.glob("[!.]*/[!.]*/config.json")):
        run = path.parent
        try:
            config = parse_json(read_text(path))
            if {**measured.of_training(config), "seed": config.get("seed")} != wanted:
                continue
            if not DATA.keys().isdisjoint(config) and other_data(config, {**vars(args), **data()}):
                continue
            epochs = _epochs(run, args.epochs)
        except (UserError, OSError, ValueError, AttributeError, RecursionError) as e:
            if run not in unreadable:
                reason = e if isinstance(e, UserError) else f"{path} cannot be read"
                print(f"note: {run} is left out: {reason}", file=sys.stderr)
            unreadable.add(run)
            continue
        if best[0] is None or _rank(epochs, args.epochs) > _rank(best[1], args.epochs):
            best = run, epochs
    return best


def _epochs(run, wanted):
    """The epochs of a run. Where checkpoint.tar cannot be read, final_checkpoint.tar is enough for
    a run that has all `wanted` ones. Raises UserError."""
    try:
        return len(checkpoint.open_saved(run / "checkpoint.tar", "train").history.epochs)
    except UserError:
        with contextlib.suppress(UserError):
            final = checkpoint.open_saved(run / "final_checkpoint.tar", "train")
            if len(final.history.epochs) == wanted:
                return wanted
        raise


def _rank(epochs, wanted):
    return epochs <= wanted, -abs(wanted - epochs)


def _command(one, words, folder, epochs):
    """(given, words) of a training: a new one, or, with `folder`, one that goes on for so many
    epochs."""
    if folder is None:
        return one, [*_without(words, "--seeds"), "--seed", str(one["seed"])]
    now = [flag for flag in OF_THIS_CALL if flag.dest in one and flag.dest != "epochs"]
    kept = {flag.dest: one[flag.dest] for flag in now}
    options = [word for flag in now for word in typed(flag, kept[flag.dest])]
    return (
        {**kept, "load_path": str(folder), "epochs": epochs},
        ["--load-path", str(folder), "--epochs", str(epochs), *options],
    )


def _without(words, name):
    """The words of a command line without those of a flag and its values."""
    kept, inside = [], False
    for word in words:
        inside = word.partition("=")[0] == name or inside and not word.startswith("--")
        kept += [] if inside else [word]
    return kept


def _say(folders, wanted):
    """Prints mean and standard deviation over the runs that are done."""
    values = []
    for folder in folders:
        try:
            history = checkpoint.open_saved(folder / "model.pt", "evaluate").history.epochs
            if not history:
                raise UserError(f"{folder / 'model.pt'} has no epochs")
            values.append(history[-1]["test_acc"])
        except UserError as e:
            print(f"note: {folder} is left out of the mean: {e}", file=sys.stderr)
    if values:
        print(
            f"{len(values)} of {wanted} seeds are done: test accuracy {compare.said(*compare.pooled(values))} %, of "
            "the model that each keeps: " + ", ".join(f"{value:.2f}" for value in values)
        )
