"""Benchmark of this version against another one, for each case of bench.py: time per call in one
process, and peak memory in separate processes.

Usage, from the project's root:  git worktree add /tmp/before COMMIT; python benchmarks/versions.py
/tmp/before [--only cnn] [--repeats 9] [--write]

Both versions are loaded and run in turn, A B A B ..., so that a drift of the machine's speed affects
both. The ratio is the other version's time divided by the time of this version, as the median over
neighbouring runs. Each version's own bench.py defines its cases. `--write` appends to
benchmarks/RESULTS.md."""

import argparse
import datetime
import importlib
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent


def load_bench(root):
    """The module bench.py of the checkout `root`, which imports the modules of this checkout."""
    paths, before = [str(root), str(root / "benchmarks")], set(sys.modules)
    sys.path[:0] = paths
    try:
        return importlib.import_module("bench")
    finally:
        del sys.path[:2]
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if pathlib.Path(file).is_relative_to(root) and "site-packages" not in file:
                del sys.modules[name]  # so that the modules of the other checkout are found


def memory_of(name, root, device):
    """Peak memory of one case of a checkout in a separate process, see `bench.peak_of`."""
    command = [sys.executable, __file__, str(root), "--device", str(device), "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="a checkout of the other version")
    parser.add_argument("--device", type=int, default=-1)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose names contain one of these words"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    other, own = args.other.resolve(), HERE.parent
    theirs = load_bench(other) if other != own else None
    ours = load_bench(own)
    device = ours.chosen(args.device)
    if args.memory_of:  # measured by this version's `peak_of` for both
        print(ours.peak_of((theirs or ours).sides(args.memory_of, device)[0], device))
        return
    if theirs is None:
        parser.error("OTHER is this checkout; give another one")
    lines = [
        f"## {datetime.date.today()}, this version against the one before, {ours.machine(device)}",
        "",
        f"`{ours.command_of(sys.argv)}`",
        "",
        "| case | before, ms (range) | now, ms (range) | ratio | before, MiB | now, MiB | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for name in ours.cases(device):
        if name in theirs.cases(device) and any(word in name for word in args.only):
            calls = [bench.sides(name, device)[0] for bench in (theirs, ours)]
            for call in calls * 2:
                call()
            pairs = [
                [bench.clock(call, device) for bench, call in zip((theirs, ours), calls)]
                for _ in range(args.repeats)
            ]
            memory = [memory_of(name, root, args.device) / 2**20 for root in (other, own)]
            cells = [
                f"{1e3 * statistics.median(times):.2f} ({1e3 * min(times):.2f} to {1e3 * max(times):.2f})"
                for times in zip(*pairs)
            ]
            ratio = statistics.median(before / now for before, now in pairs)
            lines.append(
                f"| {name} | {cells[0]} | {cells[1]} | **{ratio:.2f}** | {memory[0]:.1f} | {memory[1]:.1f} | "
                f"{memory[1] / memory[0]:.2f} |"
            )
            print(lines[-1], flush=True)
    if args.write:
        ours.publish(lines)


if __name__ == "__main__":
    main()
