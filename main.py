r"""Train energy models by Equilibrium Propagation or BPTT, and measure their robustness.

Typical use:
  python main.py --task digits --save            train the default MLP; digits need no download
  python main.py --model CNN --channels 16 32 --act my_hard_sig --loss cel --softmax --thirdphase \
      --betas 0 1 --T1 20 --T2 8 --optim adam --lrs 3e-3 3e-3 3e-3 --mbs 50 --save    a CNN on MNIST
  python main.py --todo evaluate --load-path results/EP/mse/2026-01-31/10-11-12_gpu0

With --load-path, flags that are not given take their values from the saved run, except those of a
single call, such as --device and --epochs. The run always determines the architecture and, when its
training resumes, --seed and the flags of the optimizer and of adversarial training. docs/flags.md
lists this for every flag.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # while libraries load there is nothing to save and no one to catch a KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from data_utils import TASKS, RunFailed, Task, UserError
from experiment import command_line, validate
from experiment.command_line import MAIN_FLAGS
from experiment.config import Config, Flag
from experiment.launch import launched, note_on_separate_processes, validate_parallel
from experiment.runs.files import exists
from experiment.runs.find import LATEST, closest, find_runs, means_latest
from experiment.text import count, format_eps, name_path

if TYPE_CHECKING:
    import torch

    from data_utils import Batches
    from experiment.console import Interruption
    from experiment.inference import Convergence, Predictions
    from experiment.results.attacks import Sweep
    from experiment.results.record import Record
    from experiment.results.store import Store
    from experiment.runs.checkpoint import SavedRun
    from experiment.runs.folder import RunFolder, Setup
    from experiment.runs.history import History
    from experiment.workers import Workers

FLAGS = MAIN_FLAGS
NEED_A_RUN = ("evaluate", "attack", "audit", "characteristic", "corruptions")


@dataclasses.dataclass
class Job:
    """What a task of --todo works with.

    saved         the run of --load-path or --run-dir, or None
    program       the words that start the program; command: the whole command line, as words
    given         the flags of the command line, {dest: value}
    run           the RunFolder of --run-dir, for rank 0
    folders       the RunFolders that were opened, whose locks `work` releases
    fingerprints  of the images and labels that `batches` has read, see `config.FINGERPRINTS`
    is_part       whether the command goes on after this task, as with --seeds
    """

    config: Config
    model: Any
    device: "torch.device"
    workers: "Workers"
    interruption: "Interruption"
    saved: "SavedRun | None"
    program: list[str]
    command: list[str]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: "RunFolder | None" = None
    folders: "list[RunFolder]" = dataclasses.field(default_factory=list)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    is_part: bool = False

    @property
    def task(self) -> Task:
        """The data set."""
        return TASKS[self.config.data.task]

    @property
    def source(self) -> str:
        """The loaded checkpoint, for files in its folder."""
        return self.saved.source if self.saved else "untrained"

    @property
    def examined(self) -> str:
        """The loaded checkpoint with its folder, for messages."""
        return str(self.saved.path.parent / self.source) if self.saved else self.source

    @property
    def steps(self) -> str:
        """The number of time steps of a prediction, for messages."""
        return f" with T1 = {self.config.learning.T1}" if self.model.has_dynamics else ""

    def batches(self, split: str, generator: "torch.Generator | None" = None) -> "Batches":
        """The mini-batches of a split, `train`, `test`, or `val`: the last --val-size training
        images, which `train` then lacks. With a generator shuffled and, with --data-aug,
        augmented."""
        import data_utils

        data = self.config.data
        is_test = split == "test"
        size = data.test_size if is_test else data.train_size
        with self.workers.rank_zero_first():  # it may have to download them
            images, labels = data_utils.load_split(data.task, data.data_dir, not is_test, size)
        name = "test_data" if is_test else "train_data"
        if name not in self.fingerprints:
            self.fingerprints[name] = data_utils.fingerprint((images, labels))
        if data.val_size and not is_test:
            if data.val_size >= len(labels):
                raise UserError(
                    f"argument --val-size: got {data.val_size}, expected fewer than the "
                    f"{len(labels)} training images"
                )
            part = slice(-data.val_size, None) if split == "val" else slice(-data.val_size)
            images = images[part]
            labels = labels[part]
        augment = generator is not None and data.data_aug and self.task.augments
        return data_utils.Batches(
            images, labels, data.mbs, self.task, self.device, generator, augment
        )

    def convergence(self, T1: int) -> "Convergence | None":
        """An empty `Convergence` for free phases of T1 steps; None for a model without dynamics."""
        import torch

        import model_utils
        from experiment.inference import Convergence
        from experiment.runs import checkpoint

        if not self.model.has_dynamics:
            return None
        model = self.model
        # bfloat16 rounding hides small changes: convergence is measured on a copy in float32
        if self.config.session.precision == "bf16":
            assert self.saved is not None
            with torch.random.fork_rng(devices=[]):
                model = model_utils.build(self.config).to(self.device)
            checkpoint.load_weights(model, self.saved)
            model.compiled = self.config.session.compile
        return Convergence(model, T1)

    def setup(self) -> "Setup":
        """What a new or resumed training records about its start."""
        from experiment.runs.folder import Setup

        return Setup(shlex.join(self.command), self.config, self.model, self.device)

    def run_folder(self) -> "RunFolder":
        """The folder of --load-path. Raises UserError if nothing can be written to it."""
        from experiment.runs.folder import RunFolder

        assert self.saved is not None
        run = RunFolder(self.saved.path.parent, self.config.session.figures, self.config.about)
        run.check_writable()
        self.folders.append(run)
        return run

    @functools.cached_property
    def weights(self) -> str:
        """The fingerprint of the loaded weights."""
        from experiment.runs.folder import fingerprint

        assert self.saved is not None
        return fingerprint(self.saved.weights)

    def measured_model(self, convergence: "Convergence | None" = None) -> dict[str, Any]:
        """The loaded model, as records of its measurements contain it. convergence: of its
        predictions."""
        from experiment.runs.history import chosen_by

        saved = self.saved
        assert saved is not None
        return {
            "weights": self.weights,
            "file": saved.path.name,
            "epoch": len(saved.history.epochs),
            "chosen_on": chosen_by(saved.path.name, saved.args),
            "converged": None if convergence is None else convergence.percent / 100,
        }

    def measured_data(self, split: str, images: int) -> dict[str, Any]:
        """The images of a split, as records of measurements on them contain them."""
        fingerprint = self.fingerprints["test_data" if split == "test" else "train_data"]
        task = self.config.data.task
        return {"task": task, "split": split, "images": images, "fingerprint": fingerprint}


# -------------------------------------------------------------------------------------------- train


def train(job: Job) -> None:
    """Train: in a new run folder (--save), in that of --run-dir or --load-path, or in none."""
    import torch

    import model_utils
    from experiment.runs import checkpoint, resume
    from experiment.runs.checkpoint import resumable_state, snapshot
    from experiment.runs.history import History, changes

    saved = job.saved
    first = len(saved.history.epochs) if saved else 0
    last = resume.last_epoch(job.config, job.given, saved)
    run_dir = job.config.session.run_dir
    if first >= last:
        return _complete(job, first, last)
    if run_dir:
        job.config = job.config.replace(epochs=last)
    run = _training_folder(job)
    remaining = resume.epochs_left(saved) if saved and "epochs" not in job.given else 0
    if remaining > 1 and not run_dir:
        print(
            f"note: training 1 epoch; {remaining} of the requested epochs remain "
            f"(--epochs {remaining})"
        )
    generator = torch.Generator().manual_seed(job.config.session.seed or 0)
    train_batches = job.batches("train", generator)
    test_batches = job.batches("test")
    job.config = config = job.config.replace(**job.fingerprints)
    optimizer, scheduler = model_utils.make_optimizer(job.model, config)
    history = History()
    if saved:
        history = checkpoint.restore(saved, config.flat(), optimizer, scheduler, generator)
        for change in changes(saved.args, config.flat()):
            print(f"note: {change}")
    history.requested = max(history.requested, last)
    folder = str(saved.path.parent) if saved else None
    job.interruption.advice = lambda: _advice(job, folder, first, last)
    if run and saved:
        setup = job.setup()
        if run_dir:
            run.complete(setup)
        run.restore(history.epochs, history.best)
        run.at_commit = functools.partial(run.note_resumption, setup, first + 1, saved.args)
    elif job.workers.rank == 0 and config.session.save:
        state = snapshot(job.model, config.flat(), history)
        resumable = resumable_state(history, optimizer, scheduler, generator)
        run = _new_folder(job, {**state, **resumable})
    where = f"results go to {run.folder}" if run else "this run is not saved (use --save)"
    resumption = f", from epoch {first + 1} on" if saved else ""
    folder = job.workers.broadcast(run and str(run.folder))  # which advice after a signal names
    print(f"{where}{resumption}", flush=True)
    model_utils.train(
        job.model,
        optimizer,
        train_batches,
        test_batches,
        config,
        val_batches=job.batches("val") if config.data.val_size else None,
        scheduler=scheduler,
        run=run,
        history=history,
        workers=job.workers,
        last=last,
    )
    _end(job, history, folder)


def _end(job: Job, history: "History", folder: str | None) -> None:
    """Print the result of a training, and the command that attacks its best model."""
    from experiment.results.training import describe_best

    print(describe_best(history, job.config.flat(), folder), flush=True)
    if folder:
        adversarial = job.config.adversarial
        norm = adversarial.norm if adversarial.eps else "inf"
        eps = format_eps(adversarial.eps or 8 / 255)
        _propose(job, folder, "attack", "--attack-norm", norm, "--eps-list", eps)


def _propose(job: Job, run: str, todo: str, *words: str) -> None:
    """Print the command that examines a run next, unless this command itself goes on. words: of
    that command, after --load-path."""
    from experiment.console import next_line

    if not job.is_part:
        print(next_line(job.program, job.given, todo, run, *words), flush=True)


def _complete(job: Job, first: int, last: int) -> None:
    """End a command whose --run-dir has all its epochs, and write the files that are missing if it
    was killed after the last one."""
    from experiment.inference import predicting_neurons
    from experiment.results.training import draw_training
    from experiment.runs import resume

    run = job.run
    assert job.saved is not None
    if run:
        resume.finish(run, job.saved)
    if job.workers.broadcast(run and resume.figures_are_old(run)):
        x, _ = next(iter(job.batches("train")))
        if run:
            neurons = predicting_neurons(job.model, x, job.config.rule)
            draw_training(run, job.model, job.config, job.saved.history, neurons)
    run_dir = job.config.session.run_dir
    print(f"nothing to train: {run_dir} has {count(first, 'epoch')}, --epochs is {last}")
    _end(job, job.saved.history, run_dir)


def _advice(job: Job, folder: str | None, first: int, last: int) -> str:
    """What is saved of an interrupted training, and how to resume."""
    from experiment.runs import resume

    run_dir = job.config.session.run_dir
    if run_dir:
        return resume.saved_in_run_dir(run_dir, job.workers)
    if folder and job.workers.elsewhere and not exists(folder):
        return resume.saved_elsewhere(job, folder, last)
    return resume.how_to_resume(job, folder, first)


def _training_folder(job: Job) -> "RunFolder | None":
    """The locked folder of a training that resumes; None for a new one, and in workers that do not
    write."""
    if not job.saved or job.config.session.run_dir:
        return job.run
    if job.workers.rank > 0:
        return None
    from experiment.runs import resume

    run = job.run_folder()
    run.lock()
    resume.refuse_to_undo(job.saved)
    path = job.saved.path
    if not exists(path) or path.stat().st_mtime_ns != job.saved.stamp:
        raise UserError(
            f"{path} changed while it was read, because another process trained this run; start "
            "again"
        )
    run.clean_up()
    return run


def _new_folder(job: Job, checkpoint: dict[str, Any]) -> "RunFolder":
    from experiment.runs.folder import RunFolder

    if job.run:
        job.run.begin(job.setup(), checkpoint)
        return job.run
    run = RunFolder.create(job.setup(), checkpoint)
    job.folders.append(run)
    return run


# ------------------------------------------------------------------------------------ examine a run


SPLITS = {"train": "train", "val": "validation", "test": "test"}  # of `Job.batches`, in records


def evaluate(job: Job) -> None:
    """Accuracy on the training and test images, printed and appended to hyperparameters.txt; with
    --save also the prediction for every test image."""
    from experiment.results.evaluation import (
        convergence_of,
        describe_accuracy,
        describe_predictions,
        write_predictions,
    )
    from experiment.results.store import Store

    config = job.config
    T1 = config.learning.T1
    run = job.run_folder() if job.workers.rank == 0 else None
    store = Store(run.folder) if run else None
    parts = []
    recorded = True  # all of them, by an earlier command
    for split, name in SPLITS.items():
        if split == "val" and not config.data.val_size:
            continue
        saves = config.session.save and split == "test"
        accuracy = _evaluate(job, store, split, T1, anew=saves)
        record = accuracy.record
        recorded = recorded and accuracy.recorded
        parts.append(f"{name} {describe_accuracy(record)}")
    convergence = convergence_of(record)  # of the test images
    if convergence is not None:
        parts.append(f"{convergence.percent:.2f} % of {convergence.images} test images converged")
        _warn(convergence)
    results = f"{job.steps}: {', '.join(parts)}"
    when = f" (recorded {record.when})" if recorded else ""
    print(f"evaluated {job.examined}{results}{when}", flush=True)
    if run:
        if not recorded:
            run.append_hyperparameters(f"evaluated {job.source}{results}")
        predictions = accuracy.predictions
        if saves and predictions is not None:
            model = record.model
            name = f"{model['file']}@{model['epoch']}:{model['weights']}"
            write_predictions(run, predictions, job.task, name)
            print(describe_predictions(run, config.model.loss))


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The accuracy on a split.

    predictions  for the test images, if they were computed
    recorded     whether the record is of an earlier command"""

    record: "Record"
    predictions: "Predictions | None" = None
    recorded: bool = False


def _evaluate(
    job: Job, store: "Store | None", split: str, steps: int, anew: bool = False
) -> Accuracy:
    """The accuracy on a split of SPLITS after `steps` time steps.

    store: of the run, None in workers that do not write; anew: compute although there is a
    record."""
    from experiment import inference
    from experiment.results import settings
    from experiment.results.record import Record, pack
    from experiment.timing import Stopwatch

    config = job.config
    batches = job.batches(split)
    data = job.measured_data(SPLITS[split], batches.samples)
    own = settings.prediction(config, steps)
    wanted = Record("evaluate", job.measured_model(), data, own, {})
    known = job.workers.broadcast(store.find(wanted) if store else None)
    is_test = split == "test"
    # a record that was edited by hand may lack the outcomes, which attacks need
    lacks_outcomes = is_test and known is not None and known.outcomes is None
    if known is not None and not anew and not lacks_outcomes:
        return Accuracy(known, recorded=True)
    rule = dataclasses.replace(config.rule, T1=steps)
    stopwatch = Stopwatch()
    convergence = job.convergence(steps) if is_test else None
    inputs = (job.model, batches, rule, f"evaluating, {split}", stopwatch, job.workers)
    value: dict[str, Any] = {}
    predictions = None
    if is_test:
        predictions = inference.predict(*inputs, convergence)
        value["accuracy"] = predictions.accuracy
        value["outcomes"] = pack((predictions.labels == predictions.classes).numpy())
    else:
        value["accuracy"] = inference.evaluate(*inputs)
    if convergence is not None:
        value["convergence_images"] = convergence.images
    stopwatch.steps.gather(job.workers)
    value |= stopwatch.steps.columns()
    record = Record.now("evaluate", job.measured_model(convergence), data, own, value)
    if store:
        store.add(record)
    return Accuracy(record, predictions)


def _warn(convergence: "Convergence", flag: str = "T1") -> None:
    """Print a warning if too many images have not converged."""
    warning = convergence.warning(flag)
    if warning:
        print(f"warning: {warning}", flush=True)


def characteristic(job: Job) -> None:
    """Test accuracy after every number of free steps up to T1."""
    from experiment.results.evaluation import (
        describe_characteristic,
        draw_characteristic,
        write_characteristic,
    )
    from experiment.results.store import Store

    run = job.run_folder()
    store = Store(run.folder)
    record = _characteristic(job, store)
    write_characteristic(run, store, job.source, record)
    print(describe_characteristic(run, job.examined, record), flush=True)
    assert job.saved is not None
    draw_characteristic(run, store, record, job.saved.args.get("task"), job.saved.args.get("T1"))


def _characteristic(job: Job, store: "Store") -> "Record":
    """The record of the accuracy after every number of free steps."""
    from experiment import inference
    from experiment.results import settings
    from experiment.results.record import Record

    config = job.config
    batches = job.batches("test")
    model = job.measured_model()
    data = job.measured_data("test", batches.samples)
    own = settings.characteristic(config)
    known = store.find(Record("characteristic", model, data, own, {}))
    if known is not None:
        return known
    convergence = job.convergence(config.learning.T1)
    accuracy, converged = inference.characteristic(
        job.model, batches, config.rule, exact=convergence and convergence.model
    )
    x, _ = next(iter(batches))
    residual, energy = inference.relaxation(job.model, x, config.rule)
    value = {
        "accuracy": accuracy,
        "converged": converged,
        "residual": residual,
        "energy": energy,
        "relaxed_images": len(x),
    }
    model["converged"] = converged[-1]
    record = Record.now("characteristic", model, data, own, value)
    store.add(record)
    return record


def corruptions(job: Job) -> None:
    """Accuracy under the corruptions of CIFAR-10-C, a record each."""
    import data_utils
    from experiment import inference
    from experiment.results.corruptions import CorruptionTable
    from experiment.results.store import Store
    from experiment.timing import progress

    config = job.config
    data = config.data
    default = pathlib.Path(data.data_dir, data.task.replace("CIFAR", "CIFAR-") + "-C")
    folder = pathlib.Path(data.corruptions_dir or default)
    corrupted = data_utils.open_corruptions(folder, job.task, data.test_size)
    run = job.run_folder()
    images = corrupted.labels.size(1)
    measured = {
        name: {
            "task": data.task,
            "split": "test",
            "images": images,
            "fingerprint": corrupted.fingerprint(name),
        }
        for name in progress(corrupted.names, "reading")
    }
    for note in corrupted.notes:
        print(f"note: {note}", file=sys.stderr)
    store = Store(run.folder)
    table = CorruptionTable(run, store, config, job.measured_model(), measured, job.source)
    job.interruption.advice = lambda: (
        f"{len(table.measured())} corruptions are saved in {store.path}; the same command resumes"
    )
    print(
        f"{job.examined}, {images} images of each severity{job.steps}",
        flush=True,
    )
    for name in corrupted.names:
        recorded = name in table.measured()
        if not recorded:
            outcomes = []
            for severity, (x, y) in enumerate(corrupted.severities(name), 1):
                batches = data_utils.Batches(x, y, data.mbs, job.task, job.device)
                description = f"{name}, severity {severity}"
                found = inference.predict(job.model, batches, config.rule, description)
                outcomes.append(found.labels == found.classes)
            table.add(name, outcomes)
        print(table.describe(name) + (" (recorded)" if recorded else ""), flush=True)
    table.write()
    print(f"{table.describe_means()}; results are in {table.text}", flush=True)
    table.plot()


# ------------------------------------------------------------------------------------------ attacks


def attack(job: Job) -> None:
    """Accuracy under attack for every eps and gradient method, a record each."""
    import model_utils
    from experiment.results.attacks import (
        default_eps,
        describe_result,
        describe_sweep_result,
        value_of,
    )
    from experiment.results.store import Store
    from experiment.timing import write

    config = job.config
    data = job.batches("test")
    images = data.images.cpu()
    labels = data.labels.cpu()
    run = job.run_folder() if job.workers.rank == 0 else None  # only rank 0 reads and writes it
    store = Store(run.folder) if run else None
    clean = _evaluate(job, store, "test", config.predict_steps).record
    sweep = _open_sweep(job, run, store, clean) if run and store else None
    all_eps = sorted(set(config.attack.eps_list or default_eps(config.attack.norm)))
    job.interruption.advice = lambda: _advice_on_attack(sweep, all_eps)

    def report(eps: float, label: str, result: dict[str, Any]) -> None:
        write(describe_result(config, eps, label, value_of(result)))

    measured = {}
    for eps in all_eps:
        saves_images = config.session.save and eps == all_eps[-1]
        is_missing = sweep is not None and sweep.is_missing(eps, saves_images)
        if job.workers.broadcast(is_missing):
            results = model_utils.attack(
                job.model,
                images,
                labels,
                config,
                eps,
                f"eps {format_eps(eps)}",
                job.workers,
                functools.partial(report, eps),
            )
            if sweep:
                sweep.add(eps, results)
                if saves_images:
                    correct = clean.outcomes
                    assert correct is not None
                    strongest = list(results.values())[-1]
                    sweep.save_images(images, labels, correct, eps, strongest)
        if sweep:
            measured[eps] = sweep.results(eps) or {}
            for label, record in measured[eps].items() if not is_missing else ():
                write(describe_result(config, eps, label, record.value, recorded=True))
    if sweep:
        sweep.write()
        sweep.plot()
        for note in sweep.notes():
            print(f"note: {note}")
        print(f"{describe_sweep_result(measured)}; results are in {sweep.text}")
        largest = all_eps[-1] or 1 / 255
        words = ["--attack-norm", config.attack.norm, "--eps", format_eps(largest)]
        if "test_size" in job.given:
            words += ["--test-size", str(config.data.test_size)]
        _propose(job, str(sweep.run.folder), "audit", *words)


def _advice_on_attack(sweep: "Sweep | None", all_eps: Sequence[float]) -> str:
    """What is saved of an interrupted attack, and how to resume."""
    complete = sum(sweep.results(eps) is not None for eps in all_eps) if sweep else 0
    kept = f"{complete} of {len(all_eps)} eps are complete" if complete else "no eps is complete"
    return f"{kept}; the same command resumes"


def _open_sweep(job: Job, run: "RunFolder", store: "Store", clean: "Record") -> "Sweep":
    """The Sweep of the loaded run. clean: the record of its predictions."""
    from ART_Timesteps_Addition import attacks
    from experiment.results.attacks import Sweep, describe_sweep
    from experiment.results.evaluation import convergence_of

    config = job.config
    accuracy = clean.value["accuracy"]
    images = clean.data["images"]
    model = {**job.measured_model(), "converged": clean.model.get("converged")}
    data = {**job.measured_data("test", images), "clean": accuracy}
    smooth = attacks.describe_smooth(config.model.loss)
    sweep = Sweep(run, store, config, model, data, job.source, smooth)
    convergence = convergence_of(clean)
    if convergence is not None:
        _warn(convergence, "predict-step" if config.attack.predict_steps else "T1")
    print(
        f"{job.examined}: {describe_sweep(config, images, convergence)}; clean accuracy "
        f"{100 * accuracy:.2f} %",
        flush=True,
    )
    return sweep


def audit(job: Job) -> None:
    """Robust accuracy within one eps, and whether the number is reliable."""
    import model_utils
    from ART_Timesteps_Addition.audit import audit as audit_model
    from ART_Timesteps_Addition.audit.model import ENDS_EARLY, AuditedModel
    from experiment.results import settings
    from experiment.results.audit import AuditFiles, open_surrogate, surrogate_identity
    from experiment.results.record import Record
    from experiment.results.store import Store

    config = job.config
    data = job.batches("test")
    x = (data.images.float() / 255).cpu().numpy()  # (n, C, H, W)
    y = data.labels.cpu().numpy()
    tol = config.learning.tol
    fast_tol = tol if tol or "tol" in job.given else ENDS_EARLY

    def audited(model: Any, own: Config, fast_tol: float) -> AuditedModel:
        return AuditedModel(
            model.to(job.device),
            own.model.loss,
            job.task,
            own.predict_steps,
            sorted(set(own.attack_steps)),
            config.audit_attack,
            x,
            y,
            config.data.mbs,
            own.session.seed or 0,
            own.learning.tol,
            fast_tol,
        )

    surrogate = None
    identity = None
    if config.audit.surrogate:
        surrogate = open_surrogate(config, model_utils.build, job.given.get("attack_step"))
        identity = surrogate_identity(*surrogate)
    run = job.run_folder()
    store = Store(run.folder)
    clean = _evaluate(job, store, "test", config.predict_steps).record
    model = {**job.measured_model(), "converged": clean.model.get("converged")}
    measured = {**job.measured_data("test", len(y)), "clean": clean.value["accuracy"]}
    own = settings.audit(config, fast_tol, identity)
    files = AuditFiles(run, store, Record("audit", model, measured, own, {}), job.source)
    job.interruption.advice = files.advice
    audit_model(
        audited(job.model, config, fast_tol),
        files,
        config.audit.budget,
        audited(*surrogate, ENDS_EARLY) if surrogate else None,
    )


# ----------------------------------------------------------------------------------------- gducheck


def gducheck(job: Job) -> None:
    """Compare EP with BPTT on one mini-batch: a table, a verdict and, with --save, a record, plots
    and raw data."""
    import data_utils
    from energy import gdu
    from experiment.results import settings
    from experiment.results.gdu import describe, save_gdu, value_of
    from experiment.results.record import Record
    from experiment.results.store import Store
    from experiment.runs import checkpoint
    from experiment.runs.history import History

    config = job.config
    data = config.data
    rule = config.rule
    saves = config.session.save
    run = job.run_folder() if saves and job.saved else None
    images, labels = data_utils.load_split(data.task, data.data_dir, True, data.train_size)
    mbs = min(20, len(labels))
    images = images[:mbs]
    labels = labels[:mbs]
    job.fingerprints["train_data"] = data_utils.fingerprint((images, labels))
    measured = job.measured_data("train", mbs)
    own = settings.gducheck(config)
    record = None
    if job.saved:
        wanted = Record("gducheck", job.measured_model(), measured, own, {})
        record = Store(job.saved.path.parent).find(wanted)
    if record is not None and not saves:  # plots and raw data are not in a record
        print(describe(record, rule, job.examined))
        return
    x, y = next(iter(data_utils.Batches(images, labels, mbs, job.task, job.device)))
    comparison = gdu.gdu_report(job.model, x, y, rule, images=True)
    record = Record.now("gducheck", {}, measured, own, value_of(comparison, rule))
    print(describe(record, rule, job.examined))
    if saves:
        if not job.saved:
            run = _new_folder(job, checkpoint.snapshot(job.model, config.flat(), History()))
            job.saved = checkpoint.open_saved(str(run.folder / "checkpoint.tar"), "gducheck")
        assert run is not None
        save_gdu(run, comparison)
        Store(run.folder).add(dataclasses.replace(record, model=job.measured_model()))
        print(f"plots and data are in {run.folder}")


# ------------------------------------------------------------------------------------------ compare


def compare(given: dict[str, Any], command: list[str]) -> None:
    """Compare several runs in one table and in figures. Builds no model and uses no device."""
    from experiment.results.compare import compare as write_comparison

    if not given.get("load_path"):
        raise UserError("--todo compare needs runs: name their folders with --load-path")
    for note in validate.notes(command_line.resolve({"todo": "compare"}), given):
        print(f"note: {note}", file=sys.stderr)
    write_comparison(
        given["load_path"],
        given.get("labels"),
        given.get("published"),
        given.get("figures", "png"),
        shlex.join(command),
    )


# --------------------------------------------------------------------------------- the command line

TODOS = {
    "train": train,
    "evaluate": evaluate,
    "attack": attack,
    "gducheck": gducheck,
    "characteristic": characteristic,
    "corruptions": corruptions,
    "audit": audit,
}


def _task(given: dict[str, Any]) -> str:
    return given.get("todo", "train")


def _trains_in_run_dir(given: dict[str, Any]) -> bool:
    return "run_dir" in given and _task(given) == "train"


def _open(
    given: dict[str, Any], workers: "Workers", folders: "list[RunFolder]"
) -> "tuple[RunFolder | None, SavedRun | None]":
    """(the RunFolder of --run-dir, for rank 0; the SavedRun in it or of --load-path), each None if
    there is none. Rank 0 reads the files: the machines of other workers need not have them."""
    from experiment.runs import checkpoint, resume

    run = saved = None
    if _trains_in_run_dir(given):
        resume.refuse_run_elsewhere(given["run_dir"], workers)
        if workers.rank == 0:
            run = resume.enter_run_dir(given["run_dir"])
            folders.append(run)
            saved = resume.read_run_dir(run)
    elif "load_path" in given and workers.rank == 0:
        saved = checkpoint.open_saved(given["load_path"], _task(given))
    saved = workers.broadcast(saved)
    if saved and _trains_in_run_dir(given):
        resume.refuse_changes(saved, given)
    return run, saved


def prepare(
    given: dict[str, Any],
    program: list[str],
    argv: Sequence[str],
    interruption: "Interruption",
    workers: "Workers",
    folders: "list[RunFolder]",
) -> Job:
    """The Job of a command line: workers connected, arguments completed by those of the loaded run
    and validated, model built. folders: gets the RunFolder of --run-dir once it is locked."""
    import torch

    import model_utils
    from energy.precision import set_precision
    from experiment.devices import pick_device, seed_everything, validate_device
    from experiment.runs import checkpoint

    device = pick_device(given.get("device", 0), workers)
    workers.connect(device)
    run, saved = _open(given, workers, folders)
    config = command_line.resolve(given, saved.args if saved else None)
    todo = config.session.todo
    validate.validate(config)
    if saved and todo in ("train", "evaluate"):
        validate.validate_held_out(config, saved.args)
    for note in validate.notes(config, given):
        print(f"note: {note}", file=sys.stderr)
    if "compile" not in given and device.type != "cuda":
        # a compiled training resumes on a CPU as well, with a note
        config = config.replace(compile=False)
    validate_device(config, device)
    precision = config.session.precision
    set_precision("fp32" if todo == "gducheck" else precision)
    config = seed_everything(config, workers)
    model = model_utils.build(config)
    if saved:
        checkpoint.load_weights(model, saved)
    model.to(device)
    model.compiled = config.session.compile
    if precision == "bf16" and todo not in ("train", "gducheck"):
        model.to(torch.bfloat16)
    if run:
        run.figures = config.session.figures
        run.about = config.about
    command = [*program, *argv]
    return Job(
        config, model, device, workers, interruption, saved, program, command, given, run, folders
    )


def _find_runs(given: dict[str, Any]) -> None:
    """Replace the paths of --load-path by the one run to train, or by the list of the runs to
    examine. Raises UserError."""
    paths = given.get("load_path")
    if paths is None:
        return
    if _task(given) != "train":
        given["load_path"] = [str(run) for run in find_runs(paths)]
        return
    if len(paths) != 1:
        raise UserError(f"argument --load-path: got {len(paths)} runs, training resumes one")
    (given["load_path"],) = paths
    if means_latest(given["load_path"]):
        raise UserError(
            f"argument --load-path: {LATEST} is not for training, which changes the run; name its "
            "folder"
        )


def work(
    given: dict[str, Any],
    program: list[str],
    argv: Sequence[str],
    name: str,
    is_part: bool = False,
) -> int:
    """Do what the command line asks for, and return the exit code. is_part: see `Job`."""
    from experiment.console import Interruption, out_of_memory
    from experiment.workers import LostWorker, Workers

    workers = Workers.launched()
    folders: list[RunFolder] = []
    with Interruption(workers) as interruption:
        try:
            with workers.only_rank_zero_prints():
                validate_parallel(_task(given), workers.size)
                if _task(given) == "compare":
                    compare(given, [*program, *argv])
                else:
                    try:
                        job = prepare(given, program, argv, interruption, workers, folders)
                        job.is_part = is_part
                        TODOS[job.config.session.todo](job)
                    finally:
                        for run in folders:
                            run.release()
            workers.disconnect()
        except BaseException as e:
            interruption.ignore()  # torchrun interrupts all others as soon as one has ended
            if interruption.number is not None:  # a library may have replaced KeyboardInterrupt
                return interruption.end()
            error = out_of_memory(e, given) or e
            if not isinstance(error, UserError):
                raise
            advice = ""
            if isinstance(error, RunFailed) and error.resumable:
                advice = f"; {interruption.advice()}"
                if not isinstance(error, LostWorker):  # an error of a file is one line
                    advice = advice.replace("\n", "")
            return workers.end(f"{name}: error: {error}{advice}", error.code)
    return 0


def main(
    argv: Sequence[str] | None = None, flags: Iterable[Flag] = FLAGS, name: str = "main.py"
) -> int:
    """Run one command line and return its exit code: 0; 2 for errors that the user can correct; 1
    for a run that cannot continue; 128 + n after signal n. Started by torchrun, it is one of
    several workers. Wrong flags are reported before torch is loaded."""
    from experiment.console import command_words, lenient_streams

    with lenient_streams():
        launch = None
        try:
            launch = launched()
            program = command_words(argv, name)
            words = sys.argv[1:] if argv is None else argv
            given = command_line.parse(words, flags, __doc__)
            typed = given.get("load_path", [])
            _validate_given(given)
            _refuse_to_share_runs(given, launch.size)

            def start(one: dict[str, Any], argv: Sequence[str]) -> int:
                return work(one, program, argv, name, is_part=True)

            if _task(given) == "study":
                validate_parallel("study", launch.size)
                return _study(given, program, words, start)
            if "seeds" in given and _task(given) == "train":
                from experiment.seeds import train_each

                return train_each(given, words, start)
            note = note_on_separate_processes(_task(given))
            if note:
                print(f"note: {note}", file=sys.stderr)
        except UserError as e:
            if launch is None or launch.rank == 0:
                print(f"{name}: error: {e}", file=sys.stderr)
            return e.code
        if not isinstance(given.get("load_path"), list) or _task(given) == "compare":
            return work(given, program, words, name)
        return _work_on_each(given, typed, program, words, name)


def _study(
    given: dict[str, Any],
    program: list[str],
    words: Sequence[str],
    start: Callable[[dict[str, Any], list[str]], int],
) -> int:
    """Do the study of a command line, and return its exit code. start: see `seeds.train_each`."""
    from experiment.console import Interruption
    from experiment.study import study
    from experiment.workers import Workers

    with Interruption(Workers()) as interruption:  # between two jobs, which have their own
        interruption.advice = lambda: "the same command resumes the study"
        try:
            return study(given, program, words, start)
        except KeyboardInterrupt:
            interruption.ignore()
            return interruption.end()


def _refuse_to_share_runs(given: dict[str, Any], size: int) -> None:
    """Refuse several runs for several workers. Raises UserError."""
    runs = given.get("load_path")
    if size > 1 and isinstance(runs, list) and len(runs) > 1:
        raise UserError(
            f"argument --load-path: got {len(runs)} runs, torchrun shares the work of one; name "
            "one, or start with python instead"
        )


def _work_on_each(
    given: dict[str, Any],
    typed: Sequence[str],
    program: list[str],
    argv: Sequence[str],
    name: str,
) -> int:
    """Do the task for each run of --load-path, one after another, and return the exit code of the
    first failure. A signal ends all. typed: the words of --load-path."""
    from experiment.console import next_line

    failure = 0
    runs = given["load_path"]
    for n, run in enumerate(runs, 1):
        if len(runs) > 1:
            print(f"run {n} of {len(runs)}: {run}", flush=True)
        code = work({**given, "load_path": run}, program, argv, name, is_part=len(runs) > 1)
        if code > 128:
            return code
        failure = failure or code
    if len(runs) > 1 and not failure:
        print(next_line(program, given, "compare", typed), flush=True)
    return failure


def _validate_given(given: dict[str, Any]) -> None:
    """Validate the flags of the command line as far as possible without a run, and complete them.
    Raises UserError."""
    validate.validate_todo(given)
    todo = _task(given)
    if todo == "study":
        validate.validate_eps(given)
        return
    compares = todo == "compare"
    _find_runs(given)
    if _trains_in_run_dir(given):
        validate.validate_run_dir(given)
        given["save"] = True
    resumes = _trains_in_run_dir(given) and exists(given["run_dir"])
    if not compares and not resumes and "load_path" not in given:
        if todo in NEED_A_RUN:
            instead = " instead of --run-dir" if "run_dir" in given else ""
            raise UserError(
                f"--todo {todo} needs a trained model: name its run folder with "
                f"--load-path{instead}"
            )
        validate.validate(command_line.resolve(given))
    validate.validate_eps(given)
    if todo == "audit":
        (given["eps"],) = given["eps"]
        _validate_surrogate(given)


def _validate_surrogate(given: dict[str, Any]) -> None:
    """Refuse a --surrogate that does not exist, before the first of several audits."""
    path = given.get("surrogate")
    if path is not None and not exists(path):
        problem = f"{name_path(path)} is no folder and no file{closest(path)}"
        raise UserError(f"argument --surrogate: {problem}")


if __name__ == "__main__":
    sys.exit(main())
