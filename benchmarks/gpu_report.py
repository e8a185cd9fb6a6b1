"""GPU report in one Markdown file: tests, benchmarks, the published recipe with a profile, the
roofline prediction beside the measured times, and trainings of the quick start.

Usage, from the project's root:  python benchmarks/gpu_report.py [--out gpu_report.md] [--minutes 9]
[--small]

Each part is a separate command. The report records a part that fails or for which no time is left,
and the other parts still run; the exit code is 1 if any part failed. Without a GPU it lists what it
would run. `--small` runs every part on the CPU with small sizes, only to test that it runs."""

import argparse
import datetime
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUICK = (
    "main.py --task digits --model MLP --archi 784 512 10 --act mysig --loss mse --alg EP --thirdphase --T1 30 "
    "--T2 10 --betas 0.0 0.1 --optim adam --lrs 5e-4 5e-4 --mbs 20"
)
PYTEST = "-m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py"


class Part(NamedTuple):
    """A part of the report. words: arguments of the interpreter; seconds: time limit; small:
    arguments with `--small`; a part without them is skipped."""

    title: str
    words: str
    seconds: int
    small: str


PARTS = [
    Part("Tests", PYTEST, 150, PYTEST + " -k 'vfmlp or VFMLP or goes_on'"),
    Part(
        "Roofline",
        "benchmarks/roofline.py",
        60,
        "benchmarks/roofline.py --batch 2 --task digits --archi 784 8 10",
    ),
    Part(
        "Recipe",
        "benchmarks/recipe.py --device 0 --repeats 2 --without compiled",
        150,
        "benchmarks/recipe.py --repeats 1 --only async --without compiled",
    ),
    Part(
        "Quick start, seed 1",
        f"{QUICK} --device 0 --epochs 20 --seed 1",
        60,
        f"{QUICK} --device -1 --epochs 1 --train-size 40 --test-size 20 --seed 1",
    ),
    Part("Quick start, seed 2", f"{QUICK} --device 0 --epochs 20 --seed 2", 60, ""),
    Part(
        "Recipe, compiled", "benchmarks/recipe.py --device 0 --repeats 2 --only compiled", 200, ""
    ),
    Part(
        "Bench",
        "benchmarks/bench.py --device 0 --repeats 3 --only mlp symmetric predictions",
        120,
        "benchmarks/bench.py --repeats 1 --only 'mlp free' --matrix 256",
    ),
]

# setting of recipe.py: setting of roofline.py
SAME = {
    "fp32": "fp32, sync",
    "tf32": "tf32, sync",
    "bf16": "bf16, sync",
    "fp32, compiled": "fp32, sync, fused",
    "tf32, compiled": "tf32, sync, fused",
    "bf16, compiled": "bf16, sync, fused",
}


def rows(text):
    """{first cell: all cells} of the tables in a Markdown text."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells if len(row) > 6}


def against_measured(roofline, recipe):
    """Lines of a table: predicted and measured time of each setting. roofline, recipe: the output
    of the two scripts."""
    predicted, measured = rows(roofline), rows(recipe)
    lines = [
        "| setting | predicted, ms | measured, ms | measured over predicted |",
        "| --- | --- | --- | --- |",
    ]
    for name, same in SAME.items():
        if name in measured and same in predicted:
            ms, least = float(measured[name][1].split()[0]), max(map(float, predicted[same][7:9]))
            lines.append(f"| {name} | {least:.0f} | {ms:.1f} | {ms / max(least, 1e-9):.2f} |")
    return lines


def run(part, small, deadline):
    """(output of the command, None or the reason for its failure)."""
    words = shlex.split(part.small if small else part.words)
    limit = min(part.seconds, deadline - time.monotonic())
    if limit < 5:
        return "", "no time left"
    environment = {**os.environ, **({"GPU_TESTS_ON_CPU": "1"} if small else {})}
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as e:
        return (e.stdout or b"").decode(errors="replace"), f"not finished in {limit:.0f} s"
    failure = (
        None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
    )
    return done.stdout, failure and f"exit code {done.returncode}: {failure}"


def machine(small):
    """GPU, driver and versions, as lines."""
    versions = [
        f"torch {torch.__version__}",
        f"CUDA {torch.version.cuda}",
        f"cuDNN {torch.backends.cudnn.version()}",
        f"Python {sys.version.split()[0]}",
    ]
    if small:
        return ["CPU with small sizes, not a measurement", ", ".join(versions)]
    try:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total,power.limit",
            "--format=csv,noheader",
        ]
        card = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        card = torch.cuda.get_device_name(0)
    return [card, ", ".join(versions)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_report.md"))
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--small", action="store_true", help="on the CPU, with small sizes")
    options = parser.parse_args()
    if not options.small and not torch.cuda.is_available():
        print(
            "no CUDA device found. On a machine with a CUDA device this runs, in at most "
            f"{options.minutes:g} minutes:",
            *(f"  {part.title}: python {part.words}" for part in PARTS),
            sep="\n",
        )
        return 0
    deadline, failed, printed = time.monotonic() + 60 * options.minutes - 10, [], {}
    lines = [f"# GPU report, {datetime.date.today()}", "", *machine(options.small)]
    for part in PARTS if not options.small else filter(lambda part: part.small, PARTS):
        start = time.monotonic()
        out, failure = run(part, options.small, deadline)
        printed[part.title] = out
        failed += [part.title] if failure else []
        result = failure or (out.strip().splitlines() or [""])[-1]
        print(f"{part.title}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
        body = out.strip() if "| ---" in out else f"```\n{out.strip()}\n```"
        command = part.small if options.small else part.words
        lines += [
            "",
            f"## {part.title}",
            "",
            f"`python {command}`" + (f" **{failure}**" if failure else ""),
            "",
            re.sub(r"^## ", "### ", body, flags=re.MULTILINE),
        ]
        recipe = "\n".join(out for title, out in printed.items() if title.startswith("Recipe"))
        compared = [
            "",
            "## Roofline and measured times",
            "",
            *against_measured(printed.get("Roofline", ""), recipe),
        ]
        options.out.write_text(
            "\n".join([*lines, *compared, ""])
        )  # after each part, in case the next one ends the process
    print(f"report written to {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
