"""One training after another that differ in the seed alone. What an earlier call of the same command has finished is
left, what it began goes on, and what another process trains just now is left to it: on several GPUs the same command is
started once for each."""
import contextlib
import hashlib
import json
import pathlib
import shutil
import sys

from data_utils import UserError
from experiment import arguments, checkpoints, checks, compare, measured
from experiment.files import Lock
from experiment.flags import ALL, typed
from experiment.workers import Workers

SESSION = [flag for flag in ALL if flag.scope == "session"]


def train_each(given, words, start, root="results"):
    """Trains with each of --seeds; returns the exit code of the first that fails, or 0. given: of `arguments.parse`;
    words: the command line; start(given, words): trains once and returns its exit code. Raises UserError."""
    if "seed" in given or "load_path" in given:
        raise UserError("argument --seeds: it says which seeds there are and finds what they have left: give neither "
                        "--seed nor --load-path with it")
    if not given.get("save"):
        raise UserError("argument --seeds: it needs --save, as runs are found again by their folders")
    if Workers.launched().size > 1:
        raise UserError("argument --seeds: it is for single processes: start it with python instead of torchrun, on "
                        "several GPUs once for each")
    done, shared = [], {name: value for name, value in given.items() if name != "seeds"}
    for seed in dict.fromkeys(given["seeds"]):
        one = {**shared, "seed": seed}
        args = arguments.resolve(one)
        checks.check(args)
        with _claimed(args, root) as mine:
            folder, epochs = _found(args, root)
            if mine and epochs < args.epochs:
                code = start(*_command(one, words, folder, args.epochs - epochs))
                if code:
                    return code
                folder, epochs = _found(args, root)
            elif mine:
                print(f"seed {seed}: {epochs} epochs are in {folder} already")
        done += [folder] if folder and epochs >= args.epochs else []
    _say(done, len(set(given["seeds"])))
    return 0


@contextlib.contextmanager
def _claimed(args, root):
    """A block in which no other process takes the training of `args` up; gives False where one has."""
    digest = hashlib.sha256(json.dumps(measured.of_training(vars(args)), sort_keys=True).encode()).hexdigest()[:12]
    folder, lock = pathlib.Path(root, args.alg, args.loss, f".seed_{args.seed}_{digest}"), None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(folder)
    except UserError:
        print(f"note: seed {args.seed} is left to another process, which trains it", file=sys.stderr)
    try:
        yield lock is not None
    finally:
        if lock:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)


def _found(args, root):
    """(the folder of the run of these arguments with the most epochs, how many these are); (None, 0) of none."""
    best, wanted = (None, 0), {**measured.of_training(vars(args)), "seed": args.seed}
    for path in sorted(pathlib.Path(root, args.alg, args.loss).glob("*/*/config.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if {**measured.of_training(config), "seed": config.get("seed")} != wanted:
                continue
            epochs = len(checkpoints.open_saved(path.parent, "train").story.history)
        except (OSError, ValueError, AttributeError, UserError):  # of another program, or damaged
            continue
        if best[0] is None or epochs > best[1]:
            best = path.parent, epochs
    return best


def _command(one, words, folder, epochs):
    """(given, words) of a training: a new one, or, with `folder`, one that goes on for so many epochs."""
    if folder is None:
        return one, [*_without(words, "--seeds"), "--seed", str(one["seed"])]
    kept = {flag.dest: one[flag.dest] for flag in SESSION if flag.dest in one and flag.dest != "epochs"}
    options = [word for flag in SESSION if flag.dest in kept for word in typed(flag, kept[flag.dest])]
    return ({**kept, "load_path": str(folder), "epochs": epochs},
            ["--load-path", str(folder), "--epochs", str(epochs), *options])


def _without(words, name):
    """The words of a command line without those of a flag that takes several numbers."""
    kept, inside = [], False
    for word in words:
        inside = word == name or inside and not word.startswith("--")
        kept += [] if inside else [word]
    return kept


def _say(folders, wanted):
    """Prints mean and standard deviation over the runs that are done."""
    values = [measured.read_run(folder).values[measured.Key("clean")] for folder in folders]
    if values:
        print(f"{len(values)} of {wanted} seeds are done: test accuracy {compare.said(*compare.pooled(values))} %, of "
              "the model that each keeps: " + ", ".join(f"{value:.2f}" for value in values))
