"""Benchmark of --tol, early stopping of converged images, on a trained network: image-steps, time,
predictions, and the EP gradient.

Usage, from the project's root:  python benchmarks/early_stopping.py --load-path RUN [--tol 1e-4] [--T1
250] [--images 2000] [--data-dir DIR] [--write]

For the best model of RUN and its test images: free phases of T1 steps against free phases with
--tol, in turn, for each mini-batch. Then, over 10 mini-batches, the smallest cosine similarity of a
layer's EP gradients from the two. `--write` appends the table to benchmarks/RESULTS.md."""

import argparse
import dataclasses
import datetime
import pathlib
import statistics
import sys

import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from bench import chosen, clock, command_of, machine, publish  # noqa: E402

import data_utils  # noqa: E402
import main as program  # noqa: E402
import model_utils  # noqa: E402
from energy.gdu import cosine  # noqa: E402
from energy.precision import set_precision  # noqa: E402
from energy.rule import UNOBSERVED  # noqa: E402
from experiment import inference  # noqa: E402
from experiment.command_line import resolve  # noqa: E402
from experiment.runs import checkpoint  # noqa: E402
from experiment.text import format_value  # noqa: E402
from experiment.timing import Stopwatch, progress  # noqa: E402
from experiment.validate import validate  # noqa: E402
from experiment.workers import Workers  # noqa: E402


def trained(path, data_dir, T1, images, mbs, device):
    """(model, config, mini-batches of test images, epochs trained) of the run folder `path`."""
    saved = checkpoint.open_saved(path, "evaluate")
    given = {
        "todo": "evaluate",
        "T1": T1,
        "test_size": images,
        "mbs": mbs,
        **({"data_dir": data_dir} if data_dir else {}),
    }
    config = resolve(given, saved.args)
    validate(config)
    model = model_utils.make_model(config)
    checkpoint.load_weights(model, saved)
    batches = program.Job(config, model, device, Workers(), None, saved, [], []).batches("test")
    return model.to(device), config, batches, len(saved.history.epochs)


def compare(model, batches, rule, tol, device):
    """(mean steps per image, share that is not converged, share of identical predictions, median
    ratio of times)."""
    stopwatch = Stopwatch()
    ratios = []
    same = 0
    chain = model.chain(rule.loss)
    for x, _ in progress(batches, "predictions"):
        outputs = []

        def predict(tol):
            neurons = inference.predicting_neurons(
                model, x, dataclasses.replace(rule, tol=tol), stopwatch if tol else UNOBSERVED
            )
            outputs.append(chain.read(neurons))

        times = [clock(lambda: predict(t), device) for t in (0.0, tol)]
        ratios.append(times[0] / times[1])
        same += int((outputs[0].argmax(1) == outputs[1].argmax(1)).sum())
    count = stopwatch.steps
    return (
        int(count.steps) / count.images,
        int(count.unconverged) / count.images,
        same / batches.samples,
        statistics.median(ratios),
    )


def smallest_cosine(model, batches, rule, tol):
    """The smallest cosine similarity of a parameter's gradient with and without `tol`, over 10
    mini-batches."""
    smallest = 1.0
    for _, (x, y) in zip(range(10), batches):
        found = []
        for t in (0.0, tol):
            model_utils.ep_gradients(model, x, y, dataclasses.replace(rule, alg="EP", tol=t))
            found.append([p.grad.clone() for p in model.parameters()])
        smallest = min(smallest, *(cosine(a, b) for a, b in zip(*found)))
    return smallest


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load-path", required=True)
    parser.add_argument("--data-dir", default=None, help="default: the data folder of the run")
    parser.add_argument("--tol", type=float, nargs="+", default=[1e-4], help="above 0")
    parser.add_argument("--T1", type=int, default=250)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--mbs", type=int, default=100)
    parser.add_argument("--device", type=int, default=-1)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if min(options.tol) <= 0:
        parser.error("argument --tol: expected numbers above 0")
    device = chosen(options.device)
    try:
        model, config, batches, epochs = trained(
            options.load_path, options.data_dir, options.T1, options.images, options.mbs, device
        )
    except data_utils.UserError as e:
        sys.exit(str(e))
    set_precision("fp32")
    rule = config.rule
    architecture = config.model
    if architecture.is_convolutional:
        shape = (
            f"--channels {format_value(architecture.channels)} --fc {format_value(architecture.fc)}"
        )
    else:
        shape = f"--archi {format_value(architecture.archi)}"
    symmetric = ", symmetric" if rule.thirdphase else ""
    lines = [
        f"## {datetime.date.today()}, {machine(device)}, torch {torch.__version__}",
        "",
        f"`{command_of(sys.argv)}`",
        "",
        f"{architecture.kind} {shape} --act {architecture.act} on {config.data.task}, {epochs} epochs, "
        f"schedule {config.learning.schedule}; {batches.samples} test images, T1 {rule.T1}, "
        f"T2 {rule.T2}, betas {rule.betas[0]:g} {rule.betas[1]:g}{symmetric}",
        "",
        "| --tol | steps, mean | fewer image-steps | not converged | same predictions | time, ratio | gradient "
        "cosine at least |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for tol in options.tol:
        steps, unconverged, same, ratio = compare(model, batches, rule, tol, device)
        lines.append(
            f"| {tol:g} | {steps:.1f} | **{rule.T1 / steps:.2f}** | {100 * unconverged:.2f} % | "
            f"{100 * same:.2f} % | {ratio:.2f} | "
            f"{smallest_cosine(model, batches, rule, tol):.6f} |"
        )
        print(lines[-1], flush=True)
    if options.write:
        publish(lines)


if __name__ == "__main__":
    main()
