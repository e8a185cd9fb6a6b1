"""Train energy models with Equilibrium Propagation or back-propagation through time, and examine
them.

Typical use:
  python main.py --task digits --save                          train the default MLP on digits that need no download
  python main.py --model CNN --channels 16 32 --loss cel --softmax ...         train a convolutional model on MNIST
  python main.py --todo evaluate --load-path results/EP/mse/2026-01-31/10-11-12_gpu0

With --load-path, every flag that is not given takes its value from the saved run; the architecture
always does."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    # while libraries load there is nothing to save and no one to catch a KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
import pathlib
import shlex
import sys
from typing import Any

from data_utils import TASKS, RunFailed, UserError
from experiment import arguments, checks
from experiment.config import Config
from experiment.flags import FLAGS
from experiment.launch import launched, note_on_separate_processes, validate_parallel
from experiment.runs.files import exists

NEED_A_RUN = ("evaluate", "attack", "audit", "characteristic", "corruptions")


@dataclasses.dataclass
class Job:
    """What a --todo works with. saved: the run of --load-path, or None; program: the words of the
    command line in front of the program's own, and command: all of them; given: the flags among
    them, judged; run: the RunFolder of --run-dir, for rank 0; folders: the RunFolders that were
    opened, whose locks `work` gives back; data: fingerprints of the images and labels that
    `batches` has read, see `flags.DATA`."""

    args: Any
    model: Any
    device: Any
    workers: Any
    interruption: Any
    saved: Any
    program: list
    command: list
    given: dict = dataclasses.field(default_factory=dict)
    run: Any = None
    folders: list = dataclasses.field(default_factory=list)
    data: dict = dataclasses.field(default_factory=dict)

    def batches(self, split, generator=None):
        """The mini-batches of a split, `train`, `test`, or `val`: the last args.val_size of the
        training images, which `train` lacks then. With a generator shuffled and, with --data-aug,
        augmented."""
        import data_utils

        args, task = self.args, TASKS[self.args.task]
        with self.workers.rank_zero_first():  # as it may have to download them
            images, labels = data_utils.load_split(
                args.task,
                args.data_dir,
                split != "test",
                args.test_size if split == "test" else args.train_size,
            )
        which = "test_data" if split == "test" else "train_data"
        self.data[which] = self.data.get(which) or data_utils.fingerprint((images, labels))
        if split != "test" and args.val_size:
            if args.val_size >= len(labels):
                raise UserError(
                    f"argument --val-size: got {args.val_size}, there are {len(labels)} training images, "
                    "and at least one is to train on"
                )
            part = slice(-args.val_size, None) if split == "val" else slice(-args.val_size)
            images, labels = images[part], labels[part]
        augment = generator is not None and args.data_aug and task.augments
        return data_utils.Batches(images, labels, args.mbs, task, self.device, generator, augment)

    @property
    def rule(self):
        """How the model learns and predicts."""
        return Config.of(self.args).rule

    @property
    def steps(self):
        """How many time steps a prediction takes, in words."""
        return f" with T1 = {self.args.T1}" if self.model.has_dynamics else ""

    def convergence(self, T1):
        """An empty `Convergence` for free phases of T1 steps; None of a model without time
        steps."""
        import torch

        import model_utils
        from experiment.runs import checkpoint

        if not self.model.has_dynamics:
            return None
        model = self.model
        if self.args.precision == "bf16":  # whose rounding hides what is left of the changes
            with torch.random.fork_rng(devices=[]):
                model = model_utils.build(self.args).to(self.device)
            checkpoint.load_weights(model, self.saved)
            model.compiled = self.args.compile
        return model_utils.Convergence(model, T1)

    def run_folder(self):
        """The folder of --load-path; raises UserError where nothing can be written to it."""
        from experiment.runs.folder import RunFolder

        run = RunFolder(
            self.saved.path.parent, self.args.figures, f"{self.args.model} on {self.args.task}"
        )
        run.check_writable()
        self.folders.append(run)
        return run


# -------------------------------------------------------------------------------------------- train


def train(job):
    """Trains, in a new run folder (--save), in that of --run-dir or --load-path, or in none."""
    import torch

    import model_utils
    from experiment.runs import checkpoint, resume
    from experiment.runs.history import History, changes, resumable_state, snapshot

    args, workers, saved = job.args, job.workers, job.saved
    first = len(saved.history.epochs) if saved else 0
    last = resume.last_epoch(args, job.given, saved)
    if first >= last:
        return _complete(job, first, last)
    if args.run_dir:
        args.epochs = last
    run = _training_folder(job)
    left = resume.epochs_left(saved) if saved and "epochs" not in job.given else 0
    if left > 1 and not args.run_dir:
        print(f"note: this trains one epoch; --epochs {left} those that the run was asked for")
    generator = torch.Generator().manual_seed(args.seed)
    train_batches, test_batches = job.batches("train", generator), job.batches("test")
    vars(args).update(job.data)  # to be written down with the arguments
    optimizer, scheduler = model_utils.make_optimizer(job.model, args)
    history = (
        checkpoint.restore(saved, args, optimizer, scheduler, generator) if saved else History()
    )
    folder = saved and str(saved.path.parent)
    history.requested = max(history.requested, last)
    job.interruption.advice = lambda: _advice(job, folder, first, last)
    for change in changes(saved.args, vars(args)) if saved else ():
        print(f"note: {change}")
    if run and saved:
        if args.run_dir:
            run.complete(shlex.join(job.command), args, job.model, job.device)
        run.restore(history.epochs, history.best)
        run.at_commit = functools.partial(
            run.note_resumption,
            shlex.join(job.command),
            job.device,
            first + 1,
            saved.args,
            vars(args),
        )
    elif workers.rank == 0 and args.save:
        state = snapshot(job.model, vars(args), history)
        run = _new_folder(
            job, {**state, **resumable_state(history, optimizer, scheduler, generator)}
        )
    print(
        (
            f"results go to {run.folder}"
            if run
            else "nothing of this training is kept, for want of --save"
        )
        + (f", from epoch {first + 1} on" if saved else ""),
        flush=True,
    )
    folder = workers.broadcast(run and str(run.folder))
    model_utils.train(
        job.model,
        optimizer,
        train_batches,
        test_batches,
        args,
        val_batches=job.batches("val") if args.val_size else None,
        scheduler=scheduler,
        run=run,
        history=history,
        workers=workers,
        last=last,
    )


def _complete(job, first, last):
    """End a command whose --run-dir has all its epochs. Writes what a kill after the last one kept
    from being written."""
    import model_utils
    from experiment import records
    from experiment.runs import resume

    run, history = job.run, job.saved.history
    if run:
        resume.finish(run, job.saved)
    if job.workers.broadcast(run and resume.figures_are_old(run)):
        x, _ = next(iter(job.batches("train")))
        if run:
            neurons = model_utils.predicting_neurons(job.model, x, job.rule)
            records.draw_training(run, job.model, job.args, history, neurons)
    print(f"nothing to train: {job.args.run_dir} has {first} epochs, --epochs is {last}")


def _advice(job, folder, first, last):
    """What is saved of an interrupted training, and how to resume."""
    from experiment.runs import resume

    if job.args.run_dir:
        return resume.saved_in_run_dir(job.args.run_dir, job.workers)
    if folder and job.workers.elsewhere and not exists(folder):
        return resume.saved_elsewhere(job, folder, last)
    return resume.how_to_resume(job, folder, first)


def _training_folder(job):
    """The folder that a training goes on in, locked; None where it begins, and for workers that do
    not write."""
    if not job.saved or job.args.run_dir:
        return job.run
    from experiment.runs import resume

    run = None
    if job.workers.rank == 0:
        run = job.run_folder()
        run.lock()
        resume.refuse_to_undo(job.saved)
        if not exists(job.saved.path) or job.saved.path.stat().st_mtime_ns != job.saved.stamp:
            raise UserError(
                f"{job.saved.path} has changed while it was read: another training was "
                "at work; start again"
            )
        run.clean_up()
    return run


def _new_folder(job, checkpoint):
    from experiment.runs.folder import RunFolder

    command = shlex.join(job.command)
    if job.run:
        job.run.begin(checkpoint, command, job.args, job.model, job.device)
        return job.run
    run = RunFolder.create(job.args, job.device, command, job.model, checkpoint)
    job.folders.append(run)
    return run


# ------------------------------------------------------------------------------------ examine a run


def evaluate(job):
    """Accuracy on the training and test images, printed and appended to hyperparameters.txt; with
    --save also what is predicted of every test image."""
    import model_utils
    from experiment import records
    from experiment.runs.folder import fingerprint
    from experiment.timing import Stopwatch

    args, parts, names = job.args, [], {"train": "train", "val": "validation", "test": "test"}
    run = job.run_folder() if job.workers.rank == 0 else None
    found = None
    for split in names if args.val_size else ("train", "test"):
        data, stopwatch = job.batches(split), Stopwatch()
        convergence = job.convergence(args.T1) if split == "test" else None
        work = (
            job.model,
            data,
            job.rule,
            f"evaluating, {split}",
            stopwatch,
            job.workers,
            convergence,
        )
        if args.save and split == "test":
            found = model_utils.predict(*work)
            accuracy = found.accuracy
        else:
            accuracy = model_utils.evaluate(*work)
        stopwatch.steps.gather(job.workers)
        parts.append(
            f"{names[split]} accuracy {100 * accuracy:.2f} % ({data.samples} "
            f"images{f', {stopwatch.steps}' if args.tol else ''})"
        )
    if convergence is not None:
        parts.append(f"{convergence.percent:.2f} % of {convergence.images} test images converged")
    line = f"evaluated {job.saved.source}{job.steps}: " + ", ".join(parts)
    _warn(convergence)
    print(line, flush=True)
    if job.workers.rank == 0:
        run.append_hyperparameters(line)
        if found:
            epochs, weights = len(job.saved.history.epochs), fingerprint(job.saved.weights)
            model = f"{job.saved.path.name}@{epochs}:{weights}"
            records.write_predictions(run, found, TASKS[args.task].classes, model)
            print(records.where_predictions(run, args.loss))


def _warn(convergence, flag="T1"):
    """Prints a warning where too many images have not converged. convergence: a `Convergence` or
    None."""
    if convergence is not None and convergence.warning(flag):
        print(f"warning: {convergence.warning(flag)}", flush=True)


def characteristic(job):
    """Test accuracy after every number of free steps up to T1."""
    import model_utils
    from experiment import records
    from experiment.runs.folder import fingerprint

    args, run, data, source = job.args, job.run_folder(), job.batches("test"), job.saved.source
    convergence = job.convergence(args.T1)
    counted = model_utils.characteristic(
        job.model, data, job.rule, exact=convergence and convergence.model
    )
    accuracy, converged = counted
    away = [
        t for t, share in enumerate(accuracy, 1) if abs(share - accuracy[-1]) > 0.001 + 1e-9
    ]  # against rounding
    x = next(iter(data))[0]
    moving = (*model_utils.relaxation(job.model, x, job.rule), len(x))
    settings = {
        "images": data.samples,
        "T1": args.T1,
        "precision": args.precision,
        "compile": args.compile,
        "weights": fingerprint(job.saved.weights),
        "data": job.data["test_data"],
    }
    records.write_characteristic(run, job.saved, counted, moving, settings)
    print(
        f"{source} after T1 = {args.T1} steps: test accuracy {100 * accuracy[-1]:.2f} % ({data.samples} images), "
        f"within 0.1 points of it from step {max(away, default=0) + 1} on; {100 * converged[-1]:.2f} % converged\n"
        f"results are in {run.folder / 'Characteristic_Time.txt'}",
        flush=True,
    )
    records.draw_characteristic(run, job.saved, counted, moving)


def corruptions(job):
    """Accuracy under the corruptions of CIFAR-10-C, a row of a table each."""
    import data_utils
    import model_utils
    from experiment.report import CorruptionTable
    from experiment.runs.folder import fingerprint
    from experiment.timing import progress

    args, task = job.args, TASKS[job.args.task]
    folder = pathlib.Path(
        args.corruptions_dir
        or pathlib.Path(args.data_dir, args.task.replace("CIFAR", "CIFAR-") + "-C")
    )
    data = data_utils.open_corruptions(folder, task, args.test_size)
    run, images = job.run_folder(), data.labels.size(1)
    fingerprints = {name: data.fingerprint(name) for name in progress(data.names, "reading")}
    settings = {
        "folder": str(folder.resolve()),
        "images": images,
        "T1": args.T1,
        "tol": args.tol,
        "precision": args.precision,
        "compile": args.compile,
        "weights": fingerprint(job.saved.weights),
        "data": fingerprints,
    }
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    table = CorruptionTable(run, settings, data.names, job.saved.source)
    job.interruption.advice = lambda: (
        f"{len(table.rows)} corruptions are in {table.text}, the same command goes on behind them"
    )
    print(
        f"{job.saved.source}, {images} images of each severity{job.steps}; results go to "
        f"{table.text}",
        flush=True,
    )
    for name in (name for name in data.names if name not in table.rows):
        accuracies = []
        for severity, (x, y) in enumerate(data.severities(name), 1):
            batches = data_utils.Batches(x, y, args.mbs, task, job.device)
            words = f"{name}, severity {severity}"
            accuracies.append(model_utils.evaluate(job.model, batches, job.rule, words))
        table.add(name, accuracies)
        print(
            f"{name}: " + ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies) + " %",
            flush=True,
        )
    everything, first = table.means()
    print(
        "mean accuracy "
        + f"{100 * (everything or 0):.2f} %, " * (everything is not None)
        + f"over the first 15 corruptions {100 * first:.2f} %",
        flush=True,
    )
    table.plot()


# ------------------------------------------------------------------------------------------ attacks


def attack(job):
    """Accuracy under attack for every eps, a row of a sweep each."""
    import model_utils
    from ART_Timesteps_Addition import attacks
    from experiment import sweeps
    from experiment.report import Sweep
    from experiment.runs.folder import fingerprint
    from experiment.timing import write

    args, workers, data, steps = (
        job.args,
        job.workers,
        job.batches("test"),
        job.args.predict_step or job.args.T1,
    )
    run = job.run_folder() if workers.rank == 0 else None  # which alone reads and writes it
    images, labels = data.images.cpu(), data.labels.cpu()
    convergence, flag = job.convergence(steps), "predict-step" if args.predict_step else "T1"
    clean = (
        model_utils.predictions(
            job.model, data, dataclasses.replace(job.rule, T1=steps), workers, convergence
        )
        == labels
    )
    eps_list, sweep, results = (
        sorted(set(args.eps_list or sweeps.default_eps(args.attack_norm))),
        None,
        None,
    )
    if run:
        plan, smooth = Config.of(args).attack.at(1.0), attacks.describe_smooth(args.loss)
        settings = sweeps.settings(
            args,
            plan,
            smooth,
            {
                "predict_step": steps,
                "images": len(labels),
                "weights": fingerprint(job.saved.weights),
                "data": job.data["test_data"],
            },
        )
        sweep = Sweep(run, settings, clean.double().mean().item(), job.saved.source)
        job.interruption.advice = lambda: (
            f"{len(sweep.rows)} rows are in {sweep.text}, the same command goes on behind them"
        )
        _warn(convergence, flag)
        converged = "" if convergence is None else f" ({convergence})"
        print(
            f"{job.saved.source}: {sweeps.heading(args, len(labels), steps, converged)}; clean accuracy "
            f"{100 * sweep.clean:.2f} %\nresults go to {sweep.text}",
            flush=True,
        )
    for eps in workers.broadcast(sweep and [eps for eps in eps_list if not sweep.has(eps)]):
        results = model_utils.attack(job.model, images, labels, args, eps, f"eps {eps:g}", workers)
        if sweep:
            sweep.add(eps, results)
            for grad, result in results.items():
                write(sweeps.line(args, eps, grad, result))
    if sweep and args.save and results:
        sweep.save_images(images, labels, clean, eps, list(results.values())[-1])
    if sweep:
        sweep.plot()


def audit(job):
    """Robust accuracy within one eps, and whether the number is reliable."""
    import model_utils
    from ART_Timesteps_Addition.audit import audit as audit_model
    from ART_Timesteps_Addition.audit.model import ENDS_EARLY, AuditedModel
    from ART_Timesteps_Addition.settings import Attack
    from experiment.audit import AuditFiles, open_surrogate

    args, data = job.args, job.batches("test")
    ends_early = args.tol if args.tol or "tol" in job.given else ENDS_EARLY
    surrogate = args.surrogate and open_surrogate(
        args, model_utils.build, job.given.get("attack_step")
    )
    files = AuditFiles(
        job.run_folder(), args, job.saved, surrogate, ends_early, job.data["test_data"]
    )
    job.interruption.advice = files.advice
    x, y = (data.images.float() / 255).cpu().numpy(), data.labels.cpu().numpy()

    def audited(model, args, fast_tol=ENDS_EARLY):
        return AuditedModel(
            model.to(job.device),
            args.loss,
            TASKS[args.task],
            args.predict_step or args.T1,
            sorted(set(Config.of(args).attack_steps)),
            Attack(norm=args.attack_norm, eps=args.eps, clip=not args.no_clip),
            x,
            y,
            args.mbs,
            args.seed,
            args.tol,
            fast_tol,
        )

    audit_model(
        audited(job.model, args, ends_early),
        files,
        args.budget,
        surrogate and audited(*surrogate),
    )


# ----------------------------------------------------------------------------------------- gducheck


def gducheck(job):
    """EP against BPTT on one mini-batch: a table and a verdict, and with --save plots and raw
    data."""
    import data_utils
    from energy import gdu
    from experiment import records, report
    from experiment.runs.history import History, snapshot

    args = job.args
    run, source = (
        job.run_folder() if args.save and job.saved else None,
        job.saved.source if job.saved else "untrained",
    )
    images, labels = data_utils.load_split(args.task, args.data_dir, True, args.train_size)
    x, y = next(
        iter(data_utils.Batches(images, labels, min(20, len(labels)), TASKS[args.task], job.device))
    )
    comparison = gdu.gdu_report(job.model, x, y, job.rule, images=True)
    print(
        f"{source}: EP against BPTT on {len(y)} images, T1 = {args.T1}, T2 = {args.T2}, beta = "
        f"{arguments.shown(args.betas)}; {int(comparison.converged.sum())} of them have converged after T1\n"
        "held against each other are, of parameters, the updates between successive steps and, of a read-out, the "
        "complete updates;\nof neurons, their changes and the gradients times the slope of the activation"
    )
    print("\n".join(report.gdu_table(comparison.rows)))
    print(gdu.verdict(comparison, job.rule))
    if args.save:
        run = run or _new_folder(job, snapshot(job.model, vars(args), History()))
        records.save_gdu(run, comparison)
        print(f"plots and data are in {run.folder}")


# ----------------------------------------------------------------------------------------- compare


def compare(given, command):
    """Several runs in one table and figures; without a model, a device or several workers."""
    from experiment.compare import compare as write_comparison

    if not given.get("load_path"):
        raise UserError("--todo compare needs runs: name their folders with --load-path")
    for note in checks.notes(arguments.resolve({"todo": "compare"}), given):
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


def _trains_in_run_dir(given):
    return "run_dir" in given and given.get("todo", "train") == "train"


def _opened(given, workers, folders):
    """(the RunFolder of --run-dir, for rank 0; the SavedRun in it or of --load-path), None for
    none. Rank 0 reads the files: the machines of the others need not have them."""
    from experiment.runs import checkpoint, resume

    run = saved = None
    if _trains_in_run_dir(given):
        resume.refuse_run_elsewhere(given["run_dir"], workers)
        if workers.rank == 0:
            run = resume.enter_run_dir(given["run_dir"])
            folders.append(run)
            saved = resume.read_run_dir(run)
    elif "load_path" in given and workers.rank == 0:
        saved = checkpoint.open_saved(given["load_path"], given.get("todo", "train"))
    saved = workers.broadcast(saved)
    if saved and _trains_in_run_dir(given):
        resume.refuse_changes(saved, given)
    return run, saved


def prepare(given, program, argv, interruption, workers, folders):
    """The Job of a command line: workers connected, arguments completed by those of the run that it
    loads, and checked, model built. folders: gets the RunFolder of --run-dir once it is locked."""
    import torch

    import model_utils
    from experiment.devices import pick_device, seed_everything, validate_device
    from experiment.runs import checkpoint

    device = pick_device(given.get("device", 0), workers)
    workers.connect(device)
    run, saved = _opened(given, workers, folders)
    args = arguments.resolve(given, saved and saved.args)
    checks.check(args)
    if saved and args.todo in ("train", "evaluate"):
        checks.check_held_out(args, saved.args)
    for note in checks.notes(args, given):
        print(f"note: {note}", file=sys.stderr)
    if "compile" not in given and device.type != "cuda":
        args.compile = False  # a compiled training resumes on a CPU as well, with a note
    validate_device(Config.of(args), device)
    model_utils.set_precision("fp32" if args.todo == "gducheck" else args.precision)
    args.seed = seed_everything(Config.of(args), workers).session.seed
    model = model_utils.build(args)
    if saved:
        checkpoint.load_weights(model, saved)
    model.to(device)
    model.compiled = args.compile
    if args.precision == "bf16" and args.todo not in ("train", "gducheck"):
        model.to(torch.bfloat16)
    if run:
        run.figures, run.about = args.figures, f"{args.model} on {args.task}"
    return Job(
        args,
        model,
        device,
        workers,
        interruption,
        saved,
        program,
        [*program, *argv],
        given,
        run,
        folders,
    )


def _one_run(given):
    """Makes the path of --load-path the only one. Raises UserError."""
    if "load_path" not in given:
        return
    if len(given["load_path"]) != 1:
        raise UserError(
            f"argument --load-path: got {len(given['load_path'])} runs, only --todo compare takes several"
        )
    (given["load_path"],) = given["load_path"]


def work(given, program, argv, name):
    """Does what the command line asks for, and returns the exit code."""
    from experiment.console import Interruption, out_of_memory
    from experiment.workers import LostWorker, Workers

    workers, folders = Workers.launched(), []
    with Interruption(workers) as interruption:
        try:
            with workers.only_rank_zero_prints():
                validate_parallel(given.get("todo", "train"), workers.size)
                if given.get("todo") == "compare":
                    compare(given, [*program, *argv])
                else:
                    try:
                        job = prepare(given, program, argv, interruption, workers, folders)
                        TODOS[job.args.todo](job)
                    finally:
                        for run in folders:
                            run.release()
            workers.disconnect()
        except BaseException as e:
            interruption.ignore()  # torchrun interrupts all others as soon as one has ended
            if interruption.number is not None:  # whatever a library made of the KeyboardInterrupt
                return interruption.end()
            e = out_of_memory(e, given) or e
            if not isinstance(e, UserError):
                raise
            advice = (
                f"; {interruption.advice()}" if isinstance(e, RunFailed) and e.resumable else ""
            )
            advice = (
                advice if isinstance(e, LostWorker) else advice.replace("\n", "")
            )  # an error of a file is one line
            return workers.end(f"{name}: error: {e}{advice}", e.code)
    return 0


def main(argv=None, flags=FLAGS, name="main.py"):
    """Run one command line and return its exit code: 0, 2 for what the user can put right, 1 for a
    run that cannot continue, 128 + n when signal n ended it. Started by torchrun, it is one of
    several workers. Wrong flags are answered before torch is loaded."""
    from experiment.console import command_words, lenient_streams

    with lenient_streams():
        launch = None
        try:
            launch = launched()
            program, words = command_words(argv, name), sys.argv[1:] if argv is None else argv
            given = arguments.parse(words, flags, __doc__)
            checks.check_todo(given)
            if given.get("todo") != "compare":
                _one_run(given)
            if _trains_in_run_dir(given):
                checks.check_run_dir(given)
                given["save"] = True
            has_run = "load_path" in given or (
                _trains_in_run_dir(given) and exists(given["run_dir"])
            )
            if not has_run and given.get("todo") != "compare":  # a run would complete them first
                if given.get("todo") in NEED_A_RUN:
                    instead = " instead of --run-dir" if "run_dir" in given else ""
                    raise UserError(
                        f"--todo {given['todo']} needs a trained model: name its run "
                        f"folder with --load-path{instead}"
                    )
                checks.check(arguments.resolve(given))
            checks.check_bounds(given)
            if "seeds" in given and given.get("todo", "train") == "train":
                from experiment.seeds import train_each

                return train_each(given, words, lambda one, argv: work(one, program, argv, name))
            note = note_on_separate_processes(given.get("todo", "train"))
            if note:
                print(f"note: {note}", file=sys.stderr)
        except UserError as e:
            if launch is None or launch.rank == 0:  # of torchrun's workers one says it for all
                print(f"{name}: error: {e}", file=sys.stderr)
            return e.code
        return work(given, program, words, name)


if __name__ == "__main__":
    sys.exit(main())
