"""What an attack sweep is made with, and what it says of itself."""

import numpy as np

from experiment.arguments import shown
from experiment.flags import FEED_FORWARD, WITHOUT_GRADIENT


def default_eps(norm):
    """The bounds that --eps-list stands for where it is not given: a geometric grid, and the
    customary one."""
    if norm == "2":
        return [*(round(float(e), 4) for e in np.geomspace(0.05, 3, 10)), 1.0]
    return [*(float(f"{e:.4g}") for e in np.geomspace(1e-4, 0.1, 10)), round(8 / 255, 6)]


def settings(args, plan, smooth, facts):
    """What a sweep's rows depend on: rows of the same settings are one sweep. args: of the command
    line; plan: a `settings.Attack`; smooth: what that gradient does, in words; facts: further
    settings."""
    names = (
        "task",
        "attack",
        "attack_norm",
        "attack_step",
        "attack_grad",
        "attack_start",
        "no_clip",
        "seed",
        "mbs",
        "compile",
    )
    found = {**{name: getattr(args, name) for name in names}, "attack_iters": plan.iters}
    if len(args.attack_step) == 1:
        (found["attack_step"],) = args.attack_step
    found.update(
        {
            f"attack_{name}": getattr(plan, name)
            for name in ("queries", "restarts")
            if getattr(plan, name)
        }
    )
    found.update({"budget": plan.describe()} if args.attack != "pgd" else {})
    found.update({"smooth": smooth} if "smooth" in args.attack_grad else {})
    found.update({"tol": args.tol} if args.tol else {})
    found.update(
        {"precision": args.precision, "gradient_precision": "fp32"}
        if args.precision != "fp32"
        else {}
    )
    return {**found, **facts}


def heading(args, images, steps, converged):
    """What a sweep does, in words. steps: of a prediction; converged: how many images have
    converged after them, in words."""
    precision = (f" in {args.precision}", " in fp32") if args.precision != "fp32" else ("", "")
    what = f"{args.attack}, {args.attack_norm}-norm, {images} images"
    if args.model in FEED_FORWARD:
        return what + precision[0]
    gradients = f", gradients through {shown(args.attack_step)}{precision[1]}" * (
        args.attack not in WITHOUT_GRADIENT
    )
    return f"{what}, predictions after {steps} steps{converged}{precision[0]}{gradients}"


def line(args, eps, grad, result):
    """A row of a sweep as the log says it. result: see `ART_Timesteps_Addition.attacks.summary`."""
    through = "" if grad == args.attack else f"{grad}: "
    text = (
        f"eps {eps:g}, {through}adversarial accuracy {100 * result['correct'].mean():.2f} %, mean norm "
        f"{result['mean_norm']:.3g}"
    )
    if result["masked"] > 0.01 and args.attack not in WITHOUT_GRADIENT:
        text += (
            f"\n  warning: the gradient of {100 * result['masked']:.1f} % of the images was exactly zero or not "
            "finite: this number is only an upper bound of the robust accuracy; try --attack-grad smooth ep, "
            "--attack-start equilibrium, --attack square"
        )
    return text
