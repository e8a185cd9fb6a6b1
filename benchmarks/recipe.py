"""Benchmark of a training step of the published CIFAR-10 recipe (symmetric EP, T1 250, T2 30, batch
128) for each setting, with a profile of the fastest.

Usage, from the project's root:  python benchmarks/recipe.py [--device 0] [--load-path RUN] [--only
bf16 ...] [--repeats 3] [--write]

Each setting (precision, torch.compile, --tol, asynchronous steps) runs in turn with automatic
differentiation of Phi in exact float32, in one process; the ratio is the median of the ratios of
neighbouring runs. Its gradient is compared with the gradient of exact float32 steps: the cosine
similarity of the whole gradient, and the smallest of a layer. Then the fastest setting whose
smallest cosine is above 0.99 is profiled. Without `--load-path` weights and images are random:
times are representative, but cosines need a trained network. On a CPU only some settings exist, and
the network and the numbers of steps are small, only to test that the script runs. `--write` appends
to benchmarks/RESULTS.md."""

import argparse
import datetime
import pathlib
import statistics
import sys

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import autodiff  # noqa: E402
from bench import attacked_cnn, chosen, clock, cnn, command_of, machine, publish  # noqa: E402
from early_stopping import trained  # noqa: E402

import data_utils  # noqa: E402
import model_utils  # noqa: E402
from energy.gdu import cosine  # noqa: E402
from energy.precision import refresh, set_precision  # noqa: E402
from experiment.timing import Stopwatch  # noqa: E402

# precision, torch.compile, tol, schedule
SETTINGS = {
    "fp32": ("fp32", False, 0.0, "sync"),
    "fp32, compiled": ("fp32", True, 0.0, "sync"),
    "tf32": ("tf32", False, 0.0, "sync"),
    "tf32, compiled": ("tf32", True, 0.0, "sync"),
    "bf16": ("bf16", False, 0.0, "sync"),
    "bf16, compiled": ("bf16", True, 0.0, "sync"),
    "fp32, tol 1e-4": ("fp32", False, 1e-4, "sync"),
    "tf32, compiled, tol 1e-4": ("tf32", True, 1e-4, "sync"),
    "fp32, async, a quarter of the steps": ("fp32", False, 0.0, "async"),
    "tf32, compiled, async, a quarter of the steps": ("tf32", True, 0.0, "async"),
    "bf16, compiled, async, a quarter of the steps": ("bf16", True, 0.0, "async"),
}


def rule_of(T1, T2, betas, loss, tol, schedule):
    T1, T2 = (T1, T2) if schedule == "sync" else (-(-T1 // 4), -(-T2 // 4))
    return model_utils.Rule(T1=T1, T2=T2, betas=tuple(betas), loss=loss, thirdphase=True, tol=tol)


def training_step(model, x, y, T1, T2, betas, loss, setting):
    """A call that takes one training step and returns its gradient. The learning rate is zero, so
    that all calls take the same step."""
    precision, compiled, tol, schedule = setting
    rule, bf16_copy = (
        rule_of(T1, T2, betas, loss, tol, schedule),
        model_utils.lowered(model, torch.bfloat16) if precision == "bf16" else None,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
    stopwatch = Stopwatch()

    def step():
        set_precision(precision)
        for moving in (model, bf16_copy) if bf16_copy else (model,):
            moving.compiled, moving.schedule = compiled, schedule
        model_utils.ep_gradients(model, x, y, rule, None, bf16_copy, stopwatch)
        optimizer.step()
        if bf16_copy:
            refresh(bf16_copy, model)
        return [p.grad for p in model.parameters()]

    return step, stopwatch.steps


def textbook_step(model, x, y, T1, T2, betas, loss):
    model, rule = autodiff.textbook(model), rule_of(T1, T2, betas, loss, 0.0, "sync")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)

    def step():
        set_precision("fp32")
        autodiff.ep_gradients(model, x, y, rule)
        optimizer.step()

    return step


def cosines(grads, exact):
    """Cosine similarities: (all gradients as one vector, the smallest of a parameter)."""
    whole = [torch.cat([g.flatten() for g in side]) for side in (grads, exact)]
    return cosine(*whole), min(cosine(a, b) for a, b in zip(grads, exact))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=-1)
    parser.add_argument("--load-path", help="a run folder, for its weights and test images")
    parser.add_argument("--data-dir", default=None, help="default: the data folder of the run")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="settings whose names contain one of these words"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        help="exclude settings whose names contain one of these words",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    device = chosen(options.device)
    T1, T2, mbs = (250, 30, 128) if device.type == "cuda" else (40, 8, 8)
    betas, loss = (0.0, 1.0), "cel"
    torch.manual_seed(0)
    try:
        if options.load_path:
            model, config, batches, _ = trained(
                options.load_path, options.data_dir, T1, mbs, mbs, device
            )
            if len(model.B_syn):
                raise data_utils.UserError(
                    f"{options.load_path} has untied feedback weights; the textbook baseline "
                    "supports only tied weights"
                )
            betas, loss = config.rule.betas, config.rule.loss
            x, y = next(iter(batches))
        else:
            model, x, y = (cnn if device.type == "cuda" else attacked_cnn)(device)
            x, y = x[:mbs], y[:mbs]
    except data_utils.UserError as e:
        sys.exit(str(e))
    settings = {
        name: setting
        for name, setting in SETTINGS.items()
        if any(word in name for word in options.only)
        and not any(word in name for word in options.without)
        and (device.type == "cuda" or setting[0] == "fp32")
    }
    lines = [
        f"## {datetime.date.today()}, {machine(device)}, torch {torch.__version__}",
        "",
        f"`{command_of(sys.argv)}`",
        "",
        f"EP symmetric, T1 {T1}, T2 {T2}, betas {betas[0]:g} {betas[1]:g}, batch {len(y)}, weights and images "
        f"{'of a run' if options.load_path else 'at random'}",
        "",
        "| setting | training step, ms (range) | automatic differentiation, ms | ratio | gradient cosine, whole "
        "| smallest of a layer | free steps, mean |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    common = (model, x, y, T1, T2, betas, loss)
    theirs = textbook_step(*common)
    exact = [g.clone() for g in training_step(*common, SETTINGS["fp32"])[0]()]
    best = None
    theirs()
    for name, setting in settings.items():
        torch._dynamo.reset()  # so that compiled steps of other settings do not count towards the limit
        ours, step_count = training_step(*common, setting)
        whole, smallest = cosines(ours(), exact)
        ours(), ours()  # torch.compile may compile new shapes twice
        times = [(clock(ours, device), clock(theirs, device)) for _ in range(options.repeats)]
        own, other = ([1e3 * t for t in side] for side in zip(*times))
        ratio = statistics.median(b / a for a, b in times)
        steps = (
            f"{int(step_count.steps) / step_count.images:.1f}"
            if step_count.images
            else rule_of(T1, T2, betas, loss, *setting[2:]).T1
        )
        lines.append(
            f"| {name} | {statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f}) | "
            f"{statistics.median(other):.0f} | **{ratio:.2f}** "
            f"| {whole:.5f} | {smallest:.5f} | {steps} |"
        )
        print(lines[-1], flush=True)
        if smallest > 0.99 and (best is None or ratio > best[0]):
            best = ratio, name, ours
    if best:
        lines += (profile_of_best := ["", *profiled(best[1], best[2], device)])
        print("\n".join(profile_of_best), flush=True)
    if options.write:
        publish(lines)


def profiled(name, step, device):
    """A profile of one training step, as lines."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(3):  # compiled steps of other settings ran in between
        step()
    with profile(activities=activities) as found:
        wall = clock(step, device)
    events, own = found.key_averages(), lambda e: e.self_cpu_time_total
    if (
        device.type == "cuda"
    ):  # kernels only: the operators that launch them contain their times again
        events = [
            e
            for e in events
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
        ]
        own = lambda e: e.self_device_time_total  # noqa: E731
    busy = sum(own(e) for e in events) / 1e6
    first = sorted(events, key=own, reverse=True)[:12]
    return [
        f"Profile of `{name}`: {1e3 * wall:.1f} ms with the profiler, {device.type} busy for "
        f"{100 * busy / wall:.0f} % of it, "
        f"{sum(e.count for e in events if own(e))} calls.",
        "",
        "| what | share of the busy time | calls |\n| --- | --- | --- |",
        *(f"| `{e.key[:90]}` | {100 * own(e) / 1e6 / busy:.1f} % | {e.count} |" for e in first),
    ]


if __name__ == "__main__":
    main()
