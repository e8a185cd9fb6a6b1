"""Benchmark against automatic differentiation of Phi (benchmarks/autodiff.py): time per mini-batch,
peak memory, and the lower bound on time from the number of floating-point operations.

Usage, from the project's root:  python benchmarks/bench.py [--device -1] [--only mlp cnn]
[--repeats 7] [--write]

Both sides run in turn, A B A B ..., in one process, so that a drift of the machine's speed affects
both. The ratio is the median of the ratios of neighbouring runs. Memory is measured in a separate
process: its peak above the memory before the update (resident memory on a CPU, allocated memory on
a GPU). `floor` is the time for the floating-point operations of our side, as counted by PyTorch's
FlopCounterMode, at the rate of a large matrix product just before and after. `of the floor` is our
time divided by it. The second table contains our side alone: cost over batch size, T1 and depth.
`--write` appends the tables to benchmarks/RESULTS.md."""

import argparse
import ctypes
import datetime
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier as ArtClassifier
from torch.utils.flop_counter import FlopCounterMode

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import autodiff  # noqa: E402

import model_utils  # noqa: E402
from ART_Timesteps_Addition.pytorch import PyTorchClassifier, Unrolled  # noqa: E402
from energy import gdu  # noqa: E402
from energy.precision import set_precision  # noqa: E402
from experiment import inference  # noqa: E402
from model_utils import Rule  # noqa: E402

MSE, CEL = (model_utils.make_criterion(name) for name in ("mse", "cel"))


def mlp(device):
    model = model_utils.P_MLP([784, 512, 10], model_utils.my_sigmoid).to(device)
    return (
        model,
        torch.rand(50, 1, 28, 28, device=device),
        torch.randint(0, 10, (50,), device=device),
    )


def cnn(device, mbs=None):
    """The CIFAR-10 network of the published recipe."""
    mbs = mbs or (16 if device.type == "cpu" else 128)
    pools = model_utils.make_pools("mmmm")
    model = model_utils.P_CNN(
        32,
        [3, 128, 256, 512, 512],
        [3] * 4,
        [1] * 4,
        [10],
        pools,
        [1, 1, 1, 0],
        model_utils.my_hard_sig,
        softmax=True,
    ).to(device)
    return (
        model,
        torch.randn(mbs, 3, 32, 32, device=device),
        torch.randint(0, 10, (mbs,), device=device),
    )


def cases(device):
    """name -> (network, function of (side, model, x, y)); both sides use the same function."""
    small = device.type == "cpu"
    ep, bptt, gdu, attacked = (
        ((30, 10), (10, 10), (10, 5, 2), (10, 4))
        if small
        else ((250, 30), (30, 30), (60, 15, 20), (29, 128))
    )
    batches = {"": cnn, ", batch 8": lambda device: cnn(device, 8)} if small else {"": cnn}
    recipe = (
        {}
        if small
        else {
            "cnn symmetric EP update, T1 250, T2 30, the published recipe": (
                cnn,
                lambda side, m, x, y: side.ep_gradients(
                    m, x, y, Rule(T1=250, T2=30, betas=(0.0, 1.0), loss="cel", thirdphase=True)
                ),
            )
        }
    )
    return {
        "mlp EP update, T1 30, T2 10": (
            mlp,
            lambda side, m, x, y: side.ep_gradients(m, x, y, Rule(T1=30, T2=10, betas=(0.0, 0.1))),
        ),
        "mlp BPTT update, T1 30, T2 10": (
            mlp,
            lambda side, m, x, y: side.bptt_gradients(m, x, y, Rule(T1=30, T2=10)),
        ),
        "mlp free phase, T1 30": (mlp, lambda side, m, x, y: free_phase(side, m, x, 30, MSE)),
        "mlp gducheck, T1 60, T2 30": (
            mlp,
            lambda side, m, x, y: gducheck(side, m, x[:20], y[:20], 60, 30, MSE),
        ),
        "mlp attack gradient, 29 steps": (
            mlp,
            lambda side, m, x, y: attack_gradient(side, m, x, y, 29, MSE),
        ),
        **{
            f"cnn EP update, T1 {ep[0]}, T2 {ep[1]}{batch}": (
                network,
                lambda side, m, x, y: side.ep_gradients(
                    m, x, y, Rule(T1=ep[0], T2=ep[1], betas=(0.0, 1.0), loss="cel")
                ),
            )
            for batch, network in batches.items()
        },
        **recipe,
        f"cnn BPTT update, T1 {bptt[0]}, T2 {bptt[1]}": (
            cnn,
            lambda side, m, x, y: side.bptt_gradients(
                m, x, y, Rule(T1=bptt[0], T2=bptt[1], loss="cel")
            ),
        ),
        **{
            f"cnn free phase, T1 {ep[0]}{batch}": (
                network,
                lambda side, m, x, y: free_phase(side, m, x, ep[0], CEL),
            )
            for batch, network in batches.items()
        },
        f"cnn gducheck, T1 {gdu[0]}, T2 {gdu[1]}, {gdu[2]} images": (
            lambda device: cnn(device, gdu[2]),
            lambda side, m, x, y: gducheck(side, m, x, y, gdu[0], gdu[1], CEL),
        ),
        f"cnn attack gradient, {attacked[0]} steps, {attacked[1]} images": (
            lambda device: cnn(device, attacked[1]),
            lambda side, m, x, y: attack_gradient(side, m, x, y, attacked[0], CEL),
        ),
        "small cnn gducheck, T1 60, T2 30": (
            small_cnn,
            lambda side, m, x, y: gducheck(side, m, x, y, 60, 30, CEL),
        ),
        "small cnn attack gradient, 29 steps, 40 images": (
            attacked_cnn,
            lambda side, m, x, y: attack_gradient(side, m, x, y, 29, CEL),
        ),
        "average-pooling small cnn attack gradient, 29 steps, 40 images": (
            averaging_cnn,
            lambda side, m, x, y: attack_gradient(side, m, x, y, 29, CEL),
        ),
        "average-pooling small cnn predictions, T1 60, 40 images": (
            averaging_cnn,
            lambda side, m, x, y: predictions(side, m, x, 60),
        ),
        "small cnn attack per eps, PGD, 20 iterations, 40 images": (
            attacked_cnn,
            lambda side, m, x, y: attack(side, m, x, y, 60, 29),
        ),
    }


def predictions(side, model, x, T):
    if side is model_utils:
        return inference.predicting_neurons(model, x, Rule(T1=T, loss="cel"))
    return free_phase(side, model, x, T, CEL)


def free_phase(side, model, x, T, criterion):
    if side is model_utils:
        return model(x, None, None, T, criterion=criterion)
    return autodiff.relax(model, x, None, autodiff.zeros(model, x), T, 0.0, criterion)


def small_cnn(device):
    pools = model_utils.make_pools("mm")
    model = model_utils.P_CNN(
        28, [1, 16, 32], [5, 5], [1, 1], [10], pools, [0, 0], model_utils.my_sigmoid, softmax=True
    ).to(device)
    return (
        model,
        torch.rand(20, 1, 28, 28, device=device),
        torch.randint(0, 10, (20,), device=device),
    )


def averaging_cnn(device):
    return attacked_cnn(device, "aaaa")


def attacked_cnn(device, pools="mmmm"):
    """The network of the published attack results, at a quarter of its width or less."""
    pools = model_utils.make_pools(pools)
    model = model_utils.P_CNN(
        32,
        [3, 16, 32, 32, 32],
        [3] * 4,
        [1] * 4,
        [10],
        pools,
        [1, 1, 1, 0],
        model_utils.my_sigmoid,
        softmax=True,
    ).to(device)
    return (
        model,
        torch.randn(40, 3, 32, 32, device=device),
        torch.randint(0, 10, (40,), device=device),
    )


def attack_gradient(side, model, x, y, T, criterion):
    x = x.clone().requires_grad_()
    if side is model_utils:
        out = Unrolled(model, 60, T, criterion)(x)
    else:  # as in the original code, gradients of the parameters are computed as well
        out = model.readout(
            autodiff.relax(
                model, x, None, autodiff.zeros(model, x), T, 0.0, criterion, check_thm=True
            )
        )
    torch.nn.functional.cross_entropy(out, y).backward()
    return x.grad


class Textbook(torch.nn.Module):
    """The module that the original code passes to ART: T1 steps for a prediction, T2 unrolled
    steps for a gradient."""

    def __init__(self, model, T1, T2):
        super().__init__()
        self.model, self.T1, self.T2 = model, T1, T2

    def forward(self, x):
        gradient = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():  # the steps themselves differentiate
            neurons = autodiff.relax(
                self.model,
                x,
                None,
                autodiff.zeros(self.model, x),
                self.T2 if gradient else self.T1,
                0.0,
                CEL,
                gradient,
            )
            return self.model.readout(neurons)


def attack(side, model, x, y, T1, T2, iterations=20, eps=0.03):
    """L-infinity PGD on normalised images, and the predictions for the adversarial examples."""
    common = {
        "input_shape": x.shape[1:],
        "nb_classes": 10,
        "device_type": x.device.type.replace("cuda", "gpu"),
    }
    if side is model_utils:
        classifier = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), T1=T1, T2=T2, **common)
    else:
        classifier = ArtClassifier(Textbook(model, T1, T2), torch.nn.CrossEntropyLoss(), **common)
    pgd = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=eps,
        eps_step=2.5 * eps / iterations,
        max_iter=iterations,
        batch_size=len(x),
        verbose=False,
    )
    adversarial = pgd.generate(x.cpu().numpy(), np.eye(10, dtype=np.float32)[y.cpu()])
    return classifier.predict(adversarial, batch_size=len(x))


def gducheck(side, model, x, y, T1, T2, criterion):
    if side is model_utils:
        return gdu.bptt_contributions(model, x, y, T1, T2, 0.0, criterion)
    return autodiff.separate_backpropagations(model, x, y, T1, T2, criterion)


def growth(device):
    """name -> call without arguments, for the cost over batch size, T1 and depth."""
    T = 10
    calls = {}
    for mbs in (4, 8, 16, 32) if device.type == "cpu" else (32, 64, 128, 256):
        model, x, y = cnn(device, mbs)
        calls[f"cnn free phase, {T} steps, batch {mbs}"] = lambda model=model, x=x: model(
            x, None, None, T, criterion=CEL
        )
    model, x, y = mlp(device)
    for T1 in (10, 50, 250):
        calls[f"mlp EP update, T1 {T1}, T2 10"] = lambda T1=T1, model=model, x=x, y=y: (
            model_utils.ep_gradients(model, x, y, Rule(T1=T1, T2=10, betas=(0.0, 0.1)))
        )
    for depth in (1, 2, 3, 4):
        torch.manual_seed(0)
        model = model_utils.P_CNN(
            32,
            [3, 64, 64, 64, 64][: depth + 1],
            [3] * depth,
            [1] * depth,
            [10],
            model_utils.make_pools("m" * depth),
            [1] * depth,
            model_utils.my_hard_sig,
            softmax=True,
        ).to(device)
        x = torch.randn(16, 3, 32, 32, device=device)
        calls[f"free phase, {T} steps, {depth} convolutions of 64 maps, batch 16"] = (
            lambda model=model, x=x: model(x, None, None, T, criterion=CEL)
        )
    return calls


def matrix_rates(device, size=2048):
    """Floating-point operations per second of large float32 matrix products, one value each."""
    a, b = torch.randn(2, size, size, device=device)
    return [2 * size**3 / clock(lambda: a @ b, device) for _ in range(12)]


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def sides(name, device):
    """Two calls without arguments that do the same work: ours and automatic differentiation."""
    torch.manual_seed(0)
    network, work = cases(device).get(name) or lengths(name)
    model, x, y = network(device)
    textbook = autodiff.textbook(model)
    return lambda: work(model_utils, model, x, y), lambda: work(autodiff, textbook, x, y)


def lengths(name):
    """The case `NETWORK T`: an EP update with T1 = T2 = T."""
    network, T = name.split()
    rule = Rule(T1=int(T), T2=int(T), betas=(0.0, 0.1), loss="mse" if network == "mlp" else "cel")
    return globals()[network], lambda side, m, x, y: side.ep_gradients(m, x, y, rule)


def chosen(index):
    """The device with this index, as the current device; -1: the CPU."""
    if index < 0:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def clock(call, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def memory_of(name, side, device):
    """`peak_of` one side of a case, measured in a separate process."""
    command = [
        sys.executable,
        __file__,
        "--device",
        str(device_index(device)),
        "--memory-of",
        name,
        str(side),
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_of(call, device):
    """Peak bytes of a call above the memory before it. A first call is not measured, because the
    process loads code in it that stays in memory."""
    call()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(
            0
        )  # otherwise the second call reuses memory that the first has freed
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.0005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(peak[0], resident()) - before


def measure(name, device, repeats, size=2048):
    ours, theirs = sides(name, device)
    rates = matrix_rates(device, size)
    for _ in range(2):
        ours(), theirs()
    pairs = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    floor = operations(ours) / statistics.median(rates + matrix_rates(device, size))
    memory = [memory_of(name, side, device) for side in (0, 1)]
    cells = [name]
    for times in zip(*pairs):
        cells.append(
            f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})"
        )
    cells.append(f"**{statistics.median(b / a for a, b in pairs):.2f}**")
    cells += [f"{1e3 * floor:.1f}", f"{statistics.median(a for a, _ in pairs) / floor:.2f}"]
    cells += [f"{m / 2**20:.0f}" for m in memory] + [
        f"{memory[0] / memory[1]:.2f}" if memory[1] else ""
    ]
    return cells


def device_index(device):
    return -1 if device.type == "cpu" else device.index


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next(
        (
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def command_of(argv):
    """The command line as RESULTS.md records it."""
    return f"python benchmarks/{pathlib.Path(argv[0]).name}" + "".join(
        f" {shlex.quote(a)}" for a in argv[1:] if a != "--write"
    )


def publish(lines):
    with open(HERE / "RESULTS.md", "a") as file:
        file.write("\n".join(["", *lines, ""]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=-1)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose names contain one of these words"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--matrix", type=int, default=2048, help="size of the matrix product that is timed"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "tf32"), help="of both sides, on a GPU"
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = chosen(args.device)
    if args.memory_of:
        print(peak_of(sides(args.memory_of[0], device)[int(args.memory_of[1])], device))
        return
    set_precision(args.precision)
    rate = statistics.median(matrix_rates(device, args.matrix))
    lines = [
        f"## {datetime.date.today()}, {machine(device)}, torch {torch.__version__}, {rate / 1e9:.0f} GFLOP/s in "
        "a matrix product",
        "",
        f"`{command_of(sys.argv)}`",
        "",
        "| case | ours, ms (range) | automatic differentiation, ms (range) | ratio | floor, ms | of the floor | "
        "ours, MiB | theirs, MiB | share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)

    def report(line):
        lines.append(line)
        print(line, flush=True)

    for name in cases(device):
        if any(word in name for word in args.only):
            report("| " + " | ".join(measure(name, device, args.repeats, args.matrix)) + " |")
    if args.only == [""] or "growth" in args.only:
        report("\n| ours alone | ms (range) |\n| --- | --- |")
        for name, call in growth(device).items():
            times = sorted(clock(call, device) for _ in range(args.repeats + 1))[
                :-1
            ]  # the first is the slowest
            report(
                f"| {name} | {1e3 * statistics.median(times):.1f} ({1e3 * times[0]:.1f} to {1e3 * times[-1]:.1f}) |"
            )
        report(
            "\n| memory of an EP update, MiB | T1 10, T2 10 | T1 250, T2 250 |\n| --- | --- | --- |"
        )
        for network in ("mlp", "small_cnn"):
            report(
                f"| {network} | "
                + " | ".join(
                    f"{memory_of(f'{network} {T}', 0, device) / 2**20:.1f}" for T in (10, 250)
                )
                + " |"
            )
    if args.write:
        publish(lines)


if __name__ == "__main__":
    main()
