"""`--todo study`: train several models with several seeds, attack and audit them, compare them.

A study is a list of jobs, each of them a command of its own that resumes what an earlier call has
begun. Its runs are below results/, where they are found by their configuration and seed. Several
processes may work on one study, on several GPUs: each job is locked, and what another process does
is left to it. A process that finds nothing else to do waits for it, and each ends with the
comparison.
"""

import collections
import dataclasses
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ART_Timesteps_Addition.names import WITHOUT_GRADIENT
from data_utils import UserError
from experiment import command_line
from experiment.command_line import resolve, words_of
from experiment.config import (
    ARCHITECTURE,
    BY_DEST,
    ENERGY_MODELS,
    FLAGS,
    GRADIENTS_OF_STEPS,
    Config,
    Flag,
    training_identity,
    training_name,
)
from experiment.runs.files import Busy, Lock
from experiment.seeds import (
    Given,
    SearchedRuns,
    Start,
    TrainedRun,
    distinct_seeds,
    train_seed,
)
from experiment.text import count, format_eps, format_seconds, listed
from experiment.validate import name_as_given, validate

# Gradient methods of attacks without --attack-grad: on energy models, and on feed-forward networks
# with activations that saturate
GRADIENTS = ["bptt", "smooth", "ep"]
GRADIENTS_FORWARD = ["bptt", "smooth"]

# Flags that the study sets itself in its commands
OF_THE_STUDY = ("todo", "models", "seeds", "eps", "audit", "labels", "published", "save")
# Flags of a single run, and what to give instead
REFUSED = {
    "load_path": "a study finds its runs by their configuration; give no --load-path with it",
    "run_dir": "a study keeps its runs below results; give no --run-dir with it",
    "alg": "the words of --models name the rules of a study; leave the flag out",
    "seed": "a study takes --seeds",
    "eps_list": "a study takes --eps",
}
WAIT = 1.0  # seconds between two looks at what another process does
NAMES = {"train": "training", "evaluate": "evaluation", "attack": "attack", "audit": "audit"}


# ------------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class Model:
    """One of --models.

    spec    as it was given
    config  of its training, but for the seed
    given   the flags that have an effect on it, its own among them: {dest: value}
    own     its own flags
    """

    spec: str
    config: Config
    given: Given
    own: Given

    @classmethod
    def parse(cls, spec: str, shared: Given) -> "Model":
        """A model from a word of --models and the flags of the command line. Raises UserError."""
        try:
            name, own = _split(spec)
            kind, colon, rule = name.rpartition(":")
            if kind in (BY_DEST["alg"].choices or ()):
                raise UserError(f"expected MODEL:RULE; did you mean {rule}:{kind}?")
            if not colon and rule in (BY_DEST["model"].choices or ()):
                raise UserError(
                    "a model needs a rule; expected MODEL:RULE, such as MLP:EP or FFCNN:BP"
                )
            kind = kind if colon else shared.get("model", BY_DEST["model"].default)
            command_line.convert(BY_DEST["model"], kind)
            command_line.convert(BY_DEST["alg"], rule)
            given = {**shared, **own, "model": kind, "alg": rule}
            given = {
                dest: value
                for dest, value in given.items()
                if dest not in OF_THE_STUDY and _affects(BY_DEST[dest], given)
            }
            config = resolve({**given, "save": True})
            validate(config)
        except UserError as e:
            raise UserError(f"argument --models: {spec}: {e}") from None
        return cls(spec, config, given, own)

    @property
    def name(self) -> str:
        """See `config.training_name`."""
        return training_name(self.config.flat())

    def command(self, todo: str) -> Given:
        """The flags that have an effect on a task with a run of this model."""
        return {
            "todo": todo,
            **{
                dest: value
                for dest, value in self.given.items()
                if BY_DEST[dest].affects(todo) and BY_DEST[dest].scope != ARCHITECTURE
            },
        }

    def runs(self) -> SearchedRuns:
        """The place of its trainings."""
        given = {dest: v for dest, v in self.given.items() if BY_DEST[dest].affects("train")}
        given["save"] = True
        words = [word for dest, value in given.items() for word in words_of(BY_DEST[dest], value)]
        return SearchedRuns(given, words, "results")

    def gradients(self) -> list[str] | None:
        """The gradient methods of its attacks; None for those of `--todo attack`."""
        if self.config.attack.name in WITHOUT_GRADIENT:
            return None
        if "attack_grad" not in self.given:
            if self.config.model.has_dynamics:
                return GRADIENTS
            return GRADIENTS_FORWARD if self.config.model.no_norm else None
        known = self.given["attack_grad"]
        if self.config.model.has_dynamics:
            return known
        return [grad for grad in known if grad not in GRADIENTS_OF_STEPS] or None


def _split(spec: str) -> tuple[str, Given]:
    """(MODEL:RULE, {dest: value} of the flags behind it). Raises UserError."""
    try:
        name, *words = shlex.split(spec)
    except ValueError:  # nothing, or an unbalanced quotation mark
        raise UserError('expected RULE or MODEL:RULE, such as "FFCNN:BP --lrs 1e-3"') from None
    own = command_line.parse(words)
    refused = [dest for dest in own if dest in (*OF_THE_STUDY, *REFUSED, "model")]
    if refused:
        raise UserError(f"--{BY_DEST[refused[0]].name} is no flag of one model")
    return name, own


def _affects(flag: Flag, given: Mapping[str, Any]) -> bool:
    """Whether a flag has an effect on the model and the rule in `given`."""
    kind = given["model"]
    if flag.dest == "act" and kind not in ENERGY_MODELS and not given.get("no_norm"):
        return False
    return (not flag.models or kind in flag.models) and (
        not flag.rules or given["alg"] in flag.rules
    )


def _labels(models: Sequence[Model]) -> list[str]:
    """The name of each model, and those of its own flags that other models of that name lack."""
    labels = []
    for model in models:
        others = [other for other in models if other.name == model.name]
        words = [
            " ".join(words_of(BY_DEST[dest], value)).removeprefix("--")
            for dest, value in model.own.items()
            if any(other.own.get(dest) != value for other in others)
        ]
        labels.append(", ".join([model.name, *words]))
    return labels


# --------------------------------------------------------------------------------------- the study


@dataclasses.dataclass(frozen=True)
class Job:
    """One command of a study. index: of its model; given: its flags but for --load-path."""

    todo: str
    index: int
    seed: int
    given: Given
    name: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job. code: its exit code; busy: which other process does it; left: whether
    it is still to be done."""

    code: int = 0
    busy: str = ""
    left: bool = False


class Study:
    """A study of the command line. Raises UserError.

    models, labels, runs  one for each of --models
    jobs                  in their order: a job needs the training with its model and seed
    compared              whether all jobs are done and the comparison is written
    """

    def __init__(self, given: Given, words: Sequence[str]) -> None:
        """given: the flags, {dest: value}; words: of the command line."""
        for dest, instead in REFUSED.items():
            if dest in given:
                raise UserError(f"argument --{BY_DEST[dest].name}: {instead}")
        if given.get("save") is False:
            raise UserError("argument --no-save: a study keeps its runs; leave the flag out")
        self.given = given
        self.words = list(words)
        self.seeds = distinct_seeds(given)
        self.eps = sorted(set(given["eps"]))
        self.models = [Model.parse(spec, given) for spec in given["models"]]
        self.labels = given.get("labels") or _labels(self.models)
        if len(self.labels) != len(self.models):
            raise UserError(
                f"argument --labels: got {len(self.labels)}, expected {len(self.models)}: one for "
                "each of --models"
            )
        self._refuse_twins()
        self.jobs = list(self._jobs())
        self.runs = [model.runs() for model in self.models]
        self.folders: dict[tuple[int, int], pathlib.Path] = {}  # of finished trainings
        self.compared = False

    def _refuse_twins(self) -> None:
        identities = [training_identity(model.config.flat()) for model in self.models]
        for n, identity in enumerate(identities):
            first = identities.index(identity)
            if first < n:
                raise UserError(
                    f"argument --models: {self.models[first].spec} and {self.models[n].spec} are "
                    "the same training"
                )

    def _jobs(self) -> Iterator[Job]:
        places = [(seed, index) for seed in self.seeds for index in range(len(self.models))]

        def jobs(todo: str, what: str, **more: Any) -> Iterator[Job]:
            for seed, index in places:
                model = self.models[index]
                given = {**model.command(todo), **more}
                if todo == "attack" and (gradients := model.gradients()):
                    given["attack_grad"] = gradients
                yield Job(todo, index, seed, given, f"{what}, {self.labels[index]} seed {seed}")

        yield from jobs("train", "training")
        yield from jobs("evaluate", "evaluation")
        yield from jobs("attack", "attack", eps_list=self.eps)
        if self.given.get("audit"):
            for eps in filter(None, self.eps):
                yield from jobs("audit", f"audit at eps {format_eps(eps)}", eps=eps)

    def notes(self) -> Iterator[str]:
        """Notes on flags without an effect on any of the models."""
        given = [(flag, self.given) for flag in FLAGS if flag.dest in self.given]
        yield from _notes(given, self.models, "audit" in self.given)
        for model in self.models:
            own = [(flag, model.own) for flag in FLAGS if flag.dest in model.own]
            yield from _notes(own, [model], "audit" in self.given)

    def describe(self) -> str:
        """What the study does."""
        finished = sum(
            isinstance(runs.command(seed), TrainedRun) for runs in self.runs for seed in self.seeds
        )
        counts = collections.Counter(job.todo for job in self.jobs)
        parts = [count(counts[todo], name) for todo, name in NAMES.items() if counts[todo]]
        if finished:
            parts[0] += f" ({finished} finished already)"
        return f"study of {', '.join(self.labels)}: {', '.join(parts)}, then the comparison"

    def do(self, start: Start) -> int:
        """Do all jobs and compare; return the exit code of the first failure, or 0. start: does one
        command, see `seeds.train_each`. Raises UserError."""
        print(self.describe(), flush=True)
        begun = time.monotonic()
        code = self._do_all(start)
        print(f"time of the study: {format_seconds(time.monotonic() - begun)}", flush=True)
        return code

    def _do_all(self, start: Start) -> int:
        failure = 0
        failed: list[Job] = []
        pending = self.jobs
        noted: set[str] = set()
        while pending:
            left = []
            busy = []
            for job in pending:
                begun = time.monotonic()
                outcome = self._do(job, start)
                if not outcome.left:
                    seconds = format_seconds(time.monotonic() - begun)
                    print(f"time of the {NAMES[job.todo]}: {seconds}", flush=True)
                if outcome.code > 128:
                    print("the same command resumes the study", file=sys.stderr)
                    return outcome.code
                if outcome.code:
                    failure = failure or outcome.code
                    failed.append(job)
                elif outcome.left:
                    left.append(job)
                if outcome.busy:
                    busy.append(f"{job.name}: {outcome.busy}")
            if len(left) == len(pending):
                if failed:
                    break
                if new := [line for line in busy if line not in noted]:
                    print(f"waiting for another process: {'; '.join(new)}", flush=True)
                noted.update(busy)
                time.sleep(WAIT)
            pending = left
        if not failed:
            return self._compare(start)
        _print_jobs("failed", failed)
        _print_jobs("not done", pending)
        print("nothing is compared; the same command repeats what is missing", flush=True)
        return failure

    def _do(self, job: Job, start: Start) -> Outcome:
        """Do a job, unless another process does it or its training is not finished."""
        place = (job.index, job.seed)
        heading = f"[{self.jobs.index(job) + 1} of {len(self.jobs)}] {job.name}"
        if job.todo == "train":
            training = train_seed(self.runs[job.index], job.seed, start, heading)
            if training.run:
                self.folders[place] = training.run.folder
                return Outcome()
            if training.busy:
                return Outcome(busy=training.busy, left=True)
            return Outcome(training.code or 2)
        if place not in self.folders:
            return Outcome(left=True)
        folder = self.folders[place]
        try:
            lock = Lock(folder, f"study_{job.todo}_{job.given.get('eps', '')}".rstrip("_"))
        except Busy as e:
            return Outcome(busy=f"{e.holder}{e.delete}", left=True)
        try:
            print(heading, flush=True)
            return Outcome(start({**job.given, "load_path": str(folder)}, self.words))
        finally:
            lock.release()

    def _compare(self, start: Start) -> int:
        """Compare the runs of this study: the groups are its models, in their order."""
        places = [(index, seed) for index in range(len(self.models)) for seed in self.seeds]
        paths = [str(self.folders[place]) for place in places]
        given: Given = {"todo": "compare", "load_path": paths}
        for dest in ("labels", "published", "figures"):
            if dest in self.given:
                given[dest] = self.given[dest]
        code = start(given, self.words)
        self.compared = code == 0
        return code


def _notes(
    given: Sequence[tuple[Flag, Given]], models: Sequence[Model], audits: bool
) -> Iterator[str]:
    """Notes on flags, each with the values of all, that have no effect on some models."""
    for flag, values in given:
        name = name_as_given(flag, values)
        if not flag.affects("study"):
            yield f"{name} has no effect on a study"
        elif flag.todos == ("audit",) and not audits:
            yield f"{name} has no effect without --audit"
        elif flag.dest not in (*OF_THE_STUDY, "model"):
            if not any(flag.dest in model.given for model in models):
                yield f"{name} has no effect on {listed([model.name for model in models])}"


def _print_jobs(what: str, jobs: Sequence[Job]) -> None:
    if jobs:
        print(f"{what}: {'; '.join(job.name for job in jobs)}", flush=True)


def study(given: Given, program: Sequence[str], words: Sequence[str], start: Start) -> int:
    """Do the study of a command line, and return its exit code: of the first failure, or 0. given:
    the flags, {dest: value}; program, words: of the command line; start: see `seeds.train_each`.
    Raises UserError."""
    own = Study(given, words)
    for note in own.notes():
        print(f"note: {note}", file=sys.stderr)
    code = own.do(start)
    if own.compared and "audit" not in given:
        print(f"next: {shlex.join([*program, *words, '--audit'])}", flush=True)
    return code
