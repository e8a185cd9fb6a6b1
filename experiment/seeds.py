"""`--seeds`: one training after another that differ in the seed alone.

Finished trainings of an earlier call are kept, unfinished ones are resumed, and those that another
process trains at the moment are left to it: on several GPUs, start the same command once for each.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from data_utils import UserError, fingerprint, load_split
from experiment.command_line import resolve, words_of
from experiment.config import FINGERPRINTS, FLAGS, SESSION, Config, training_identity
from experiment.results.values import Statistics
from experiment.runs import checkpoint, resume
from experiment.runs.files import Busy, Lock, WriteFailed, parse_json, read_text, why
from experiment.runs.folder import remove_half_made
from experiment.runs.history import History, other_data
from experiment.text import count, listed
from experiment.validate import validate
from experiment.workers import Workers

Given = dict[str, Any]  # {dest: value} of the flags of a command line
Start = Callable[[Given, list[str]], int]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that trains or resumes. words: of its command line, after the program."""

    given: Given
    words: list[str]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run folder and the number of its epochs."""

    folder: pathlib.Path
    epochs: int


@dataclasses.dataclass(frozen=True)
class Training:
    """What became of the training with one seed.

    run   the run with all its epochs; None without one
    code  the exit code of the command that trained, 0 if nothing was left to train
    busy  which other process trains; "" if none does
    """

    run: TrainedRun | None = None
    code: int = 0
    busy: str = ""


# Flags that a resumed run takes from the command line: data, for example, may have moved.
OF_THIS_CALL = [
    flag
    for flag in FLAGS
    if flag.scope == SESSION or flag.place or (flag.repeats and flag.dest != "seed")
]


class Runs(Protocol):
    """The place of the runs of all seeds."""

    @property
    def wanted(self) -> int | None:
        """The epochs that each run is to have; None if the first run decides."""

    def claimed(self, seed: int) -> contextlib.AbstractContextManager[None]:
        """A block in which no other process with --seeds trains with this seed. Raises Busy if
        another process does, and UserError."""

    def command(self, seed: int) -> Command | TrainedRun:
        """The command that trains or resumes; the run itself if nothing is left to train."""

    def result(self, seed: int) -> TrainedRun | None:
        """The run after the training; None if it is gone."""


def train_each(given: Given, words: Sequence[str], start: Start, root: str = "results") -> int:
    """Train with each of --seeds; return the exit code of the first that fails, or 0.

    given, words: of the command line, see `Command`; start(given, words): trains once and returns
    its exit code. Raises UserError."""
    if "seed" in given or "load_path" in given:
        raise UserError(
            "argument --seeds: it finds and resumes the runs of its seeds; give neither --seed nor "
            "--load-path with it"
        )
    if not given.get("save"):
        raise UserError("argument --seeds: it needs --save, to find its runs again")
    if Workers.launched().size > 1:
        raise UserError(
            "argument --seeds: it is for single processes: start it with python instead of "
            "torchrun, on several GPUs once for each"
        )
    seeds = distinct_seeds(given)
    shared = {name: value for name, value in given.items() if name != "seeds"}
    words = _without(words, "--seeds")
    in_run_dir = "run_dir" in given
    runs: Runs = _RunsBelow(shared, words) if in_run_dir else SearchedRuns(shared, words, root)
    done = []
    for seed in seeds:
        training = train_seed(runs, seed, start)
        if training.busy:
            print(
                f"note: seed {seed} is left to another process, which trains it: {training.busy}",
                file=sys.stderr,
            )
        if training.code:
            return training.code
        if training.run:
            done.append(training.run.folder)
    _print_mean(done, len(seeds))
    return 0


def distinct_seeds(given: Given) -> list[int]:
    """The --seeds of a command line, each once. Prints a note if one is repeated."""
    seeds = list(dict.fromkeys(given["seeds"]))
    repeated = [str(seed) for seed in seeds if given["seeds"].count(seed) > 1]
    if repeated:
        print(f"note: --seeds repeats {listed(repeated)}; each counts once", file=sys.stderr)
    return seeds


def train_seed(runs: Runs, seed: int, start: Start, heading: str = "") -> Training:
    """Train with one seed what is left to train. start: see `train_each`; heading: a line to print
    unless another process trains. Raises UserError."""
    try:
        with runs.claimed(seed):
            if heading:
                print(heading, flush=True)
            command = runs.command(seed)
            run: TrainedRun | None
            if isinstance(command, Command):
                code = start(command.given, command.words)
                if code:
                    return Training(code=code)
                run = runs.result(seed)
            else:
                run = command
    except Busy as e:  # the run may have any number of epochs at this moment
        return Training(busy=f"{e.holder}{e.delete}")
    if run is None:
        return Training()
    if run.epochs != runs.wanted:
        print(
            f"seed {seed}: {run.folder} has {count(run.epochs, 'epoch')}, not {runs.wanted}; it is "
            "left out"
        )
        return Training()
    if run is command:
        print(f"seed {seed}: {run.folder} has {count(run.epochs, 'epoch')} already")
    return Training(run)


# -------------------------------------------------------------------------------- below --run-dir


class _RunsBelow:
    """Runs in the folders seed_N below --run-dir."""

    def __init__(self, shared: Given, words: Sequence[str]) -> None:
        self.shared = shared
        self.words = _without(words, "--run-dir")
        self.root = pathlib.Path(shared["run_dir"])
        self.wanted: int | None = shared.get("epochs")  # without it those of the first run

    def _folder(self, seed: int) -> pathlib.Path:
        return self.root / f"seed_{seed}"

    @contextlib.contextmanager
    def claimed(self, seed: int) -> Iterator[None]:
        folder = self._folder(seed)
        resume.make_folder(folder)
        lock = Lock(self.root, folder.name)
        try:
            Lock(folder).release()  # taken again by the training itself
            yield
        finally:
            lock.release()

    def command(self, seed: int) -> Command:
        folder = str(self._folder(seed))
        given = {**self.shared, "seed": seed, "run_dir": folder}
        return Command(given, [*self.words, "--run-dir", folder, "--seed", str(seed)])

    def result(self, seed: int) -> TrainedRun:
        folder = self._folder(seed)
        run = TrainedRun(folder, len(_history(folder, self.wanted).epochs))
        self.wanted = self.wanted or run.epochs
        return run


# ------------------------------------------------------------------------------ searched in results


class SearchedRuns:
    """Runs below root/ALG/LOSS, found by their config.json."""

    def __init__(self, shared: Given, words: Sequence[str], root: str) -> None:
        self.shared = shared
        self.words = words
        self.config = resolve(shared)
        self.folder = pathlib.Path(root, self.config.learning.alg, self.config.model.loss)
        self.wanted = self.config.optimizer.epochs
        self.finished: dict[int, TrainedRun] = {}  # found by seed, so that no file is read twice
        self.noted: set[pathlib.Path] = set()  # runs that a note has named

    def _of_seed(self, seed: int) -> Config:
        config = self.config.replace(seed=seed)
        validate(config)
        return config

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """{name: fingerprint} of the data of the training; {} if they cannot be read."""
        data = self.config.data
        try:
            train = load_split(data.task, data.data_dir, True, data.train_size)
            test = load_split(data.task, data.data_dir, False, data.test_size)
        except UserError:
            return {}
        return {"train_data": fingerprint(train), "test_data": fingerprint(test)}

    @contextlib.contextmanager
    def claimed(self, seed: int) -> Iterator[None]:
        identity = json.dumps(training_identity(self._of_seed(seed).flat()), sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise WriteFailed(f"cannot create the folder {self.folder}: {why(e)}") from None
        remove_half_made(self.folder)
        lock = Lock(self.folder, f"seed_{seed}_{digest}")
        try:
            yield
        finally:
            lock.release()

    def command(self, seed: int) -> Command | TrainedRun:
        run = self.finished.get(seed) or self._find(seed)
        if run is None:
            return Command({**self.shared, "seed": seed}, [*self.words, "--seed", str(seed)])
        remaining = self.wanted - run.epochs
        if remaining <= 0:
            self.finished[seed] = run
            return run
        flags = [f for f in OF_THIS_CALL if f.dest in self.shared and f.dest != "epochs"]
        kept = {flag.dest: self.shared[flag.dest] for flag in flags}
        words = ["--load-path", str(run.folder), "--epochs", str(remaining)]
        for flag in flags:
            words += words_of(flag, kept[flag.dest])
        return Command({**kept, "load_path": str(run.folder), "epochs": remaining}, words)

    def result(self, seed: int) -> TrainedRun | None:
        return self._find(seed)

    def _find(self, seed: int) -> TrainedRun | None:
        """The training with a seed on the same data: the longest run of at most the wanted epochs;
        None without one. Prints a note once for each run that cannot be read or, without another,
        has more epochs or was trained with other settings before a resumption."""
        now = self._of_seed(seed).flat()
        identity = {**training_identity(now), "seed": seed}
        found = []
        others = {}  # {folder: why it is another training}
        for path in sorted(self.folder.glob("[!.]*/[!.]*/config.json")):
            folder = path.parent
            try:
                saved = parse_json(read_text(path))
                if {**training_identity(saved), "seed": saved.get("seed")} != identity:
                    continue
                knows_data = not FINGERPRINTS.keys().isdisjoint(saved)
                if knows_data and other_data(saved, {**now, **self.fingerprints}):
                    continue
                history = _history(folder, self.wanted)
                epochs = len(history.epochs)
                if changed := history.changed_training(epochs):
                    others[folder] = f"its training changed {changed}"
                elif epochs > self.wanted:
                    others[folder] = f"it has {count(epochs, 'epoch')}, not {self.wanted}"
                else:
                    found.append(TrainedRun(folder, epochs))
            except (UserError, OSError, ValueError, AttributeError, RecursionError) as e:
                self._note(folder, str(e) if isinstance(e, UserError) else f"{path} cannot be read")
        if not found:
            for folder, reason in others.items():
                self._note(folder, reason)
        return max(found, key=lambda run: run.epochs, default=None)  # the first of equal ones

    def _note(self, folder: pathlib.Path, reason: str) -> None:
        """Print once that a run is left out."""
        if folder not in self.noted:
            print(f"note: {folder} is left out: {reason}", file=sys.stderr)
        self.noted.add(folder)


# ------------------------------------------------------------------------------------------ helpers


def _history(run: pathlib.Path, wanted: int | None) -> History:
    """The history of a run. If checkpoint.tar cannot be read, final_checkpoint.tar is enough for a
    run with all `wanted` epochs. Raises UserError."""
    try:
        return checkpoint.open_saved(run / "checkpoint.tar", "train").history
    except UserError:
        with contextlib.suppress(UserError):
            final = checkpoint.open_saved(run / "final_checkpoint.tar", "train").history
            if len(final.epochs) == wanted:
                return final
        raise


def _without(words: Sequence[str], name: str) -> list[str]:
    """The words of a command line without those of a flag and its values."""
    kept = []
    inside = False
    for word in words:
        inside = word.partition("=")[0] == name or (inside and not word.startswith("--"))
        if not inside:
            kept.append(word)
    return kept


def _print_mean(folders: Sequence[pathlib.Path], wanted: int) -> None:
    """Print mean and standard deviation of the test accuracies of finished runs, and their folders
    in words for the next command."""
    accuracies = []
    for folder in folders:
        try:
            epochs = checkpoint.open_saved(folder / "model.pt", "evaluate").history.epochs
            if not epochs:
                raise UserError(f"{folder / 'model.pt'} has no epochs")
            accuracies.append(epochs[-1]["test_acc"])
        except UserError as e:
            print(f"note: {folder} is left out of the mean: {e}", file=sys.stderr)
    if accuracies:
        values = ", ".join(f"{value:.2f}" for value in accuracies)
        statistics = Statistics.of(accuracies)
        deviation = "" if statistics.std is None else f" ± {statistics.std:.2f}"
        mean = f"{statistics.mean:.2f}{deviation} % ({count(statistics.n, 'seed')})"
        print(
            f"{len(accuracies)} of {wanted} seeds are done: test accuracy {mean}, of the best "
            f"model of each run: {values}"
        )
    if folders:
        words = shlex.join(["--load-path", *map(str, folders)])
        print(f"to evaluate, attack, audit or compare them: {words}")
