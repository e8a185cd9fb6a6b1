"""Roofline model: lower bound on the time of an EP update on a GPU, from its floating-point
operations and memory traffic. It needs no GPU.

Usage, from the project's root:  python benchmarks/roofline.py [--batch 128] [--steps 250 30]
[--async-steps 60 20] [--tflops fp32=67 tf32=495 bf16=990] [--bandwidth 3.35] [--launch 4] [--write]
[flags of main.py that describe a model]

Without flags of main.py the model is that of the published CIFAR-10 recipe: symmetric EP, T1 250,
T2 30, batch 128. Operations are counted on fake tensors (benchmarks/counting.py). The lower bound
of an operation is the larger of two times: its arithmetic at the peak rate, and its bytes at the
peak bandwidth. The lower bound of an update is the sum over operations: nothing overlaps, every
operation reads its inputs from memory and writes its outputs there. The host needs --launch
microseconds per operation. The defaults are those of an H100 SXM. The table also contains the
textbook baseline (benchmarks/autodiff.py), counted in PyTorch's default layout, in exact float32
and in PyTorch's default, whose convolutions use tf32. `fused`: operations other than products and
convolutions cost nothing, as if a compiler fused them; the largest possible gain from fusion."""

import argparse
import collections
import datetime
import pathlib
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import autodiff  # noqa: E402
from bench import command_of, publish  # noqa: E402
from counting import Counting, moved, on_pretended_gpu  # noqa: E402

import data_utils  # noqa: E402
import model_utils  # noqa: E402
from experiment.command_line import parse, resolve  # noqa: E402

PUBLISHED = (
    "--task CIFAR10 --model CNN --channels 128 256 512 512 --kernels 3 3 3 3 --strides 1 1 1 1 --paddings 1 1 "
    "1 0 --pools mmmm --fc 10 --act my_hard_sig --loss cel --softmax"
)
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class Update:
    """The operations of an EP update, {operation: number}: `free` and `nudged` per step, and `rest`.

    count(T1, T2): returns {operation: number} of an update with these numbers of steps."""

    def __init__(self, count):
        base, one_free, one_nudged = count(9, 4), count(10, 4), count(9, 5)
        self.free, self.nudged = one_free - base, one_nudged - base
        self.rest = base - times(self.free, 9) - times(self.nudged, 4)

    def parts(self, T1, T2):
        """(operations of the steps, other operations)."""
        return times(self.free, T1) + times(self.nudged, T2), self.rest


def times(counter, n):
    return collections.Counter({operation: n * count for operation, count in counter.items()})


def total(counter, value):
    return sum(value(operation) * count for operation, count in counter.items())


class Device:
    """Speed of a GPU: operations per second for each precision, bytes per second, seconds to launch
    an operation."""

    def __init__(self, tflops, bandwidth, launch):
        self.rates = {precision: 1e12 * rate for precision, rate in tflops.items()}
        self.bandwidth, self.launch = 1e12 * bandwidth, 1e-6 * launch

    def seconds(self, parts, precisions, fused=False):
        """Lower bounds in seconds: `arithmetic`, `memory`, `both` (the larger per operation), `host`.

        parts: from `Update.parts`; precisions: a name of `rates` for each part; fused: count only
        products and convolutions."""
        found = dict.fromkeys(("arithmetic", "memory", "both", "host"), 0.0)
        for counter, precision in zip(parts, precisions):
            rate = self.rates[precision]
            counted = {o: n for o, n in counter.items() if o.flops or not fused}
            found["arithmetic"] += total(counted, lambda o: o.flops / rate)
            found["memory"] += total(counted, lambda o: o.bytes / self.bandwidth)
            found["both"] += total(counted, lambda o: max(o.flops / rate, o.bytes / self.bandwidth))
            found["host"] += self.launch * sum(counted.values())
        return found


def ours(config, batch, precision, schedule):
    """The `Update` of symmetric EP on a GPU by `model_utils.ep_gradients`."""
    model = model_utils.make_model(config.replace(schedule=schedule))
    bf16_copy = model_utils.lowered(model, PRECISIONS[precision]) if precision == "bf16" else None

    def count(T1, T2):
        rule = model_utils.Rule(
            T1=T1, T2=T2, betas=(0.0, 0.5), loss=config.model.loss, thirdphase=True
        )
        with on_pretended_gpu() as device:
            for m in (model, bf16_copy) if bf16_copy else (model,):
                moved(m, device)
            x, y = sample(config, batch, device)
            with Counting() as counted:
                model_utils.ep_gradients(model, x, y, rule, None, bf16_copy)
        return collections.Counter(counted.operations)

    return Update(count)


def textbook(config, batch):
    """The `Update` of the same rule by automatic differentiation of Phi."""
    model = autodiff.textbook(model_utils.make_model(config.replace(schedule="sync")))

    def count(T1, T2):
        rule = model_utils.Rule(
            T1=T1, T2=T2, betas=(0.0, 0.5), loss=config.model.loss, thirdphase=True
        )
        with FakeTensorMode(allow_non_fake_inputs=True):
            moved(model, "cpu")
            with Counting() as counted:
                autodiff.ep_gradients(model, *sample(config, batch, "cpu"), rule)
        return collections.Counter(counted.operations)

    return Update(count)


def sample(config, batch, device):
    task = data_utils.TASKS[config.data.task]
    return (
        torch.rand(batch, task.channels, task.size, task.size, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )


def bound(found):
    """The largest of the lower bounds, by name."""
    if found["host"] > found["both"]:
        return "the host"
    return "arithmetic" if found["arithmetic"] > found["memory"] else "memory"


def table(config, options, device):
    """The prediction as lines of Markdown tables."""
    steps = [
        "| step | free: operations | GFLOP | MB read and written | nudged: operations | MB |",
        "|" + " --- |" * 6,
    ]
    lines = [
        "| setting | T1, T2 | operations | TFLOP | GB | arithmetic, ms | memory, ms | both, ms | host, ms "
        "| bound by | over textbook fp32 | over textbook default |",
        "|" + " --- |" * 12,
    ]
    book = textbook(config, options.batch)
    parts = book.parts(options.steps[0], 2 * options.steps[1])
    baselines = [device.seconds(parts, ("fp32", "fp32")), device.seconds(parts, ("tf32", "tf32"))]

    def row(name, T, parts, found):
        both, whole = max(found["both"], found["host"]), parts[0] + parts[1]
        ratios = [f"{max(y['both'], y['host']) / both:.1f}" for y in baselines]
        cells = [
            name,
            f"{T[0]}, {T[1]}",
            sum(whole.values()),
            f"{total(whole, lambda o: o.flops) / 1e12:.1f}",
            f"{total(whole, lambda o: o.bytes) / 1e9:.0f}",
            *(f"{1e3 * found[key]:.0f}" for key in ("arithmetic", "memory", "both", "host")),
            bound(found),
            *ratios,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")

    for name, found in zip(("textbook, fp32", "textbook, PyTorch's default"), baselines):
        row(name, options.steps, parts, found)
    for schedule, T in (("sync", options.steps), ("async", options.async_steps)):
        for precision in PRECISIONS:
            update = ours(config, options.batch, precision, schedule)
            # both signs are one phase of twice the size if this is small, otherwise two phases
            phases = 1 if sum(update.nudged.values()) < 1.5 * sum(update.free.values()) else 2
            parts = update.parts(*T)
            steps.append(
                f"| {precision}, {schedule} | {sum(update.free.values())} | "
                f"{total(update.free, lambda o: o.flops) / 1e9:.1f} | "
                f"{total(update.free, lambda o: o.bytes) / 1e6:.1f} | "
                f"{sum(update.nudged.values()) // phases} | "
                f"{total(update.nudged, lambda o: o.bytes) / phases / 1e6:.1f} |"
            )
            for fused in (False, True):
                name = f"{precision}, {schedule}"
                row(
                    f"{name}, fused" if fused else name,
                    T,
                    parts,
                    device.seconds(parts, (precision, "fp32"), fused),
                )
    return [*steps, "", *lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs=2, default=(250, 30), help="T1 and T2")
    parser.add_argument(
        "--async-steps", type=int, nargs=2, default=(60, 20), help="T1 and T2 of asynchronous steps"
    )
    parser.add_argument("--tflops", nargs="+", default=["fp32=67", "tf32=495", "bf16=990"])
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s")
    parser.add_argument(
        "--launch", type=float, default=4.0, help="microseconds per operation on the host"
    )
    parser.add_argument("--write", action="store_true")
    options, words = parser.parse_known_args()
    try:
        config = resolve(parse(words or PUBLISHED.split()))
        device = Device(
            {k: float(v) for k, v in (word.split("=") for word in options.tflops)},
            options.bandwidth,
            options.launch,
        )
        rows = table(config, options, device)
    except (data_utils.UserError, ValueError, KeyError) as e:
        sys.exit(str(e))
    lines = [
        f"## {datetime.date.today()}, prediction, torch {torch.__version__}",
        "",
        f"`{command_of(sys.argv)}`",
        "",
        f"EP symmetric, batch {options.batch}; {', '.join(options.tflops)} TFLOP/s, {options.bandwidth:g} TB/s, "
        f"{options.launch:g} us an operation; a kernel for each operation; the contrast of the phases in fp32",
        "",
        *rows,
    ]
    print("\n".join(lines))
    if options.write:
        publish(lines)


if __name__ == "__main__":
    main()
