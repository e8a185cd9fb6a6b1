"""Ours against automatic differentiation of Phi (benchmarks/autodiff.py): time per mini-batch and peak memory.

Usage, from the project's root:  python benchmarks/bench.py [--device -1] [--only mlp cnn] [--repeats 7] [--write]

Both sides run in turn, A B A B ..., in one process, so that a drift of the machine's speed meets both; the ratio is the
median of the ratios of neighbours. Memory is what a process of its own needed at most above what it held before the
update: resident memory on a CPU, allocated memory on a GPU. `--write` appends the table to benchmarks/RESULTS.md.
"""
import argparse
import datetime
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time

import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import autodiff  # noqa: E402
import model_utils  # noqa: E402

MSE, CEL = (model_utils.make_criterion(name) for name in ("mse", "cel"))


def mlp(device):
    model = model_utils.P_MLP([784, 512, 10], model_utils.my_sigmoid).to(device)
    return model, torch.rand(50, 1, 28, 28, device=device), torch.randint(0, 10, (50,), device=device)


def cnn(device, mbs=None):
    """The CIFAR-10 network of the published recipe."""
    mbs = mbs or (16 if device.type == "cpu" else 128)
    pools = model_utils.make_pools("mmmm")
    model = model_utils.P_CNN(32, [3, 128, 256, 512, 512], [3] * 4, [1] * 4, [10], pools, [1, 1, 1, 0], model_utils.my_hard_sig,
                              softmax=True).to(device)
    return model, torch.randn(mbs, 3, 32, 32, device=device), torch.randint(0, 10, (mbs,), device=device)


def cases(device):
    """name -> (network, function of (side, model, x, y)); the same function serves both sides."""
    quick = device.type == "cpu"
    t_ep, t_bptt = ((30, 10), (10, 10)) if quick else ((250, 30), (30, 30))
    return {
        "mlp EP update, T1 30, T2 10": (mlp, lambda side, m, x, y: side.ep_gradients(m, x, y, 30, 10, (0.0, 0.1), MSE)),
        "mlp BPTT update, T1 30, T2 10": (mlp, lambda side, m, x, y: side.bptt_gradients(m, x, y, 30, 10, MSE)),
        f"cnn EP update, T1 {t_ep[0]}, T2 {t_ep[1]}":
            (cnn, lambda side, m, x, y: side.ep_gradients(m, x, y, *t_ep, (0.0, 1.0), CEL)),
        f"cnn BPTT update, T1 {t_bptt[0]}, T2 {t_bptt[1]}":
            (cnn, lambda side, m, x, y: side.bptt_gradients(m, x, y, *t_bptt, CEL)),
        "attack gradient, 40 images, 29 steps": (attacked_cnn, lambda side, m, x, y: attack_gradient(side, m, x, y)),
        "mlp gducheck, T1 60, T2 30, against 31 back-propagations": (mlp, lambda side, m, x, y: gducheck(side, m, x[:20], y[:20], MSE)),
        "small cnn gducheck, T1 60, T2 30, against 31 back-propagations": (small_cnn, lambda side, m, x, y: gducheck(side, m, x, y, CEL)),
    }


def small_cnn(device):
    pools = model_utils.make_pools("mm")
    model = model_utils.P_CNN(28, [1, 16, 32], [5, 5], [1, 1], [10], pools, [0, 0], model_utils.my_sigmoid, softmax=True).to(device)
    return model, torch.rand(20, 1, 28, 28, device=device), torch.randint(0, 10, (20,), device=device)


def attacked_cnn(device):
    """The network of the published attack figures, at a quarter of its width or less."""
    pools = model_utils.make_pools("mmmm")
    model = model_utils.P_CNN(32, [3, 16, 32, 32, 32], [3] * 4, [1] * 4, [10], pools, [1, 1, 1, 0], model_utils.my_sigmoid, softmax=True).to(device)
    return model, torch.randn(40, 3, 32, 32, device=device), torch.randint(0, 10, (40,), device=device)


def attack_gradient(side, model, x, y):
    x = x.clone().requires_grad_()
    if side is model_utils:
        from ART_Timesteps_Addition.pytorch import Unrolled
        logits = Unrolled(model, 60, 29, CEL)(x)
    else:  # as the original code: gradients of the parameters come along
        logits = model.readout(autodiff.relax(model, x, None, autodiff.zeros(model, x), 29, 0.0, CEL, check_thm=True))
    torch.nn.functional.cross_entropy(logits, y).backward()
    return x.grad


def gducheck(side, model, x, y, criterion):
    if side is model_utils:
        return model_utils.bptt_contributions(model, x, y, 60, 30, 0.0, criterion)
    return autodiff.separate_backpropagations(model, x, y, 60, 30, criterion)


def sides(name, device):
    """Two calls without arguments that do the same work: ours and automatic differentiation."""
    torch.manual_seed(0)
    network, work = cases(device)[name]
    model, x, y = network(device)
    textbook = autodiff.textbook(model)
    return lambda: work(model_utils, model, x, y), lambda: work(autodiff, textbook, x, y)


def clock(call, device):
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def peak_memory(name, side, device):
    """Bytes that one update needs at most above what was held before it, in this process."""
    call = sides(name, device)[side]
    if device.type == "cuda":
        call()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
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


def measure(name, device, repeats):
    ours, theirs = sides(name, device)
    for _ in range(2):
        ours(), theirs()
    pairs = [(clock(ours, device), clock(theirs, device)) for _ in range(repeats)]
    memory = [int(subprocess.run([sys.executable, __file__, "--device", str(device_index(device)), "--memory-of", name, str(side)],
                                 check=True, capture_output=True, text=True).stdout) for side in (0, 1)]
    cells = [name]
    for times in zip(*pairs):
        cells.append(f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f} to {1e3 * max(times):.1f})")
    cells.append(f"**{statistics.median(b / a for a, b in pairs):.2f}**")
    cells += [f"{m / 2 ** 20:.0f}" for m in memory] + [f"{memory[0] / memory[1]:.2f}" if memory[1] else ""]
    return cells


def device_index(device):
    return -1 if device.type == "cpu" else device.index


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=-1)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names contain one of these words")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cpu") if args.device < 0 else torch.device("cuda", args.device)
    if args.memory_of:
        print(peak_memory(args.memory_of[0], int(args.memory_of[1]), device))
        return
    command = "python benchmarks/bench.py" + "".join(f" {shlex.quote(a)}" for a in sys.argv[1:] if a != "--write")
    lines = [f"## {datetime.date.today()}, {machine(device)}, torch {torch.__version__}", "", f"`{command}`", "",
             "| case | ours, ms (range) | automatic differentiation, ms (range) | ratio | ours, MiB | theirs, MiB | share |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    for name in cases(device):
        if any(word in name for word in args.only):
            lines.append("| " + " | ".join(measure(name, device, args.repeats)) + " |")
            print(lines[-1], flush=True)
    if args.write:
        with open(HERE / "RESULTS.md", "a") as file:
            file.write("\n".join(["", *lines, ""]))


if __name__ == "__main__":
    main()
