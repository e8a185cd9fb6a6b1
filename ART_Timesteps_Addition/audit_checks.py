"""An audit from end to end, and what its numbers must be for the robust accuracy to be believed."""

import functools
import math

from scipy.stats import binomtest

from ART_Timesteps_Addition.audit import Audit
from ART_Timesteps_Addition.audit_subject import BUDGETS, ENDS_EARLY, Subject


def interval(share, n):
    """The 95 % interval of a share of n images (Wilson)."""
    if not n:
        return [0.0, 1.0]
    return [float(bound) for bound in binomtest(round(share * n), n).proportion_ci(method="wilson")]


# name: (why, what to try)
REASONS = {
    "deterministic": (
        "images whose class differs between two predictions of the same: attacks need a model that "
        "answers alike",
        "average the attack's gradient over the noise, or take the noise out",
    ),
    "responds": (
        "share of images whose first layer notices that every pixel changes by 1e-4: an input that is rounded "
        "hides what a gradient could say",
        "attacks through the model without its rounding",
    ),
    "settled": (
        "share of the images that a step at T1 moves by less than 5 % in every layer: what has not settled is "
        "a state on its way, which attacks do not aim at",
        "a larger --T1",
    ),
    "time_steps": ("images whose class is another at 2 T1", "a larger --T1"),
    "attack_steps": (
        "time steps that the gradients went through: a gradient must reach the image and know the "
        "dynamics",
        "more and larger --attack-step",
    ),
    "gradients": (
        "share of images whose gradient is exactly zero or not finite, of the strongest gradient",
        "other gradients of --attack-grad; a --surrogate",
    ),
    "blind_attacks": (
        "images that only attacks without gradients of this model broke: gradients are masked",
        "--budget standard, and a --surrogate",
    ),
    "budget": (
        "images that fell only to more restarts and iterations of the strongest attack: it has not converged",
        "--budget standard, or more --attack-iters",
    ),
    "unbounded": (
        "images that stand though the attack may change them into any other: gradients lead nowhere",
        "other --attack-step; a --surrogate",
    ),
    "more_eps": (
        "images by which accuracy rises as eps grows: a larger ball holds the smaller one",
        "other --attack-step; --budget standard",
    ),
    "iterations": (
        "images by which a single step is stronger than many: gradients are good for no second step",
        "other --attack-step; a --surrogate",
    ),
    "loss_rises": (
        "share of images that the attack brings nearer to another class",
        "other gradients of --attack-grad; a --surrogate",
    ),
    "attacked_settled": (
        "share of attacked images that a step at T1 moves by less than 5 % in every layer",
        "a larger --T1",
    ),
    "attacked_later": ("share of broken images that come right again at 2 T1", "a larger --T1"),
}


OF_STEPS = (
    "settled",
    "time_steps",
    "attack_steps",
    "attacked_settled",
    "attacked_later",
)  # what a network lacks


def checks(facts, n, steps, T1):
    """{name: {passed, value, limit, why}} from the facts of an `audit.State` of n images. steps:
    the numbers of time steps that gradients went through."""
    few = max(1, math.ceil(0.02 * n))
    rows = {  # name: (value, limit, whether the value is to be at most that)
        "deterministic": (facts["changed_again"], 0, True),
        "responds": (facts["responds"], 0.9, False),
        "settled": (facts["settled"], 0.9, False),
        "time_steps": (facts["changed_later"], few, True),
        "attack_steps": (max(steps), min(T1, 2 * facts["layers"]), False),
        "gradients": (facts["masked"], 0.05, True),
        "blind_attacks": (facts["blind_breaks"], few, True),
        "budget": (facts["more_breaks"], max(2, math.ceil(0.05 * n)), True),
        "unbounded": (facts["unbounded"], 0, True),
        "more_eps": (facts["rise"], few, True),
        "iterations": (facts["iterative"] - facts["single"], 1, True),
        "loss_rises": (facts["loss_rises"], 0.9, False),
        "attacked_settled": (facts["attacked_settled"], 0.75, False),
        "attacked_later": (facts["recovered"] / max(facts["fallen"], 1), 0.1, True),
    }
    return {
        name: {
            "passed": bool(value <= limit if most else value >= limit),
            "value": value,
            "limit": limit,
            "why": REASONS[name][0],
        }
        for name, (value, limit, most) in rows.items()
        if facts.get("moves", True) or name not in OF_STEPS
    }


def result_of(state, subject, settings, source=""):
    """The result of an audit, a dict that JSON can say. state: the last of `audit.Audit`; subject:
    an `audit.Subject`; settings: what it depended on; source: the model that was examined, in
    words."""
    n, facts = len(subject.y), state.facts
    found = checks(facts, n, subject.steps, subject.T1)
    robust = int(state.standing.sum()) / max(n, 1)
    return {
        "clean": facts["clean"],
        "robust": robust,
        "interval": interval(robust, n),
        "images": n,
        "trusted": all(check["passed"] for check in found.values()),
        "checks": found,
        "attacks": state.attacks,
        "strongest": facts["strongest"],
        "curve": facts["curve"],
        "sample": facts["sample"],
        "early": facts["early"],
        "seconds": facts["seconds"],
        "settings": settings,
        "model": source,
    }


def verdict(result, norm, eps):
    """The result as a person reads it: lines of text."""
    low, high = (100 * bound for bound in result["interval"])
    failed = [name for name, check in result["checks"].items() if not check["passed"]]
    ball = f"{'L-infinity' if norm == 'inf' else 'L2'} eps {eps:g}"
    if failed:
        first = (
            f"NOT TRUSTED: {100 * result['robust']:.1f} % is only an upper bound of the robust accuracy; failed: "
            f"{', '.join(failed)}; try {REASONS[failed[0]][1]}"
        )
    else:
        first = (
            f"TRUSTED: robust accuracy {100 * result['robust']:.1f} % ({low:.1f} to {high:.1f} % with 95 % "
            "confidence)"
        )
    lines = [
        first,
        f"{ball}, {result['images']} images; clean accuracy {100 * result['clean']:.1f} %, strongest "
        f"gradient {result['strongest']}",
        f"model: {result['model']}",
        *(f"computed on: {place}" for place in result.get("computed_on", ())),
        "",
        "checks (value, limit):",
    ]
    for name, check in result["checks"].items():
        lines.append(
            f"  {'passed' if check['passed'] else 'FAILED'} {name:17} {check['value']:7.4g} "
            f"{check['limit']:6.4g}" + ("" if check["passed"] else f"  {check['why']}")
        )
    lines += ["", "attacks (broken, standing after it, masked, time):"]
    lines += [
        f"  {a['stage']} {a['name']:52} {a['broken']:5} {a['standing']:5} {100 * a['masked']:5.1f} % "
        f"{a['seconds']:7.1f} s"
        for a in result["attacks"]
    ]
    early, curve = result["early"], result["curve"]
    return lines + [
        "",
        f"over eps, by PGD with the strongest gradient alone, of the first {result['sample']} images that are "
        "classified correctly stand: "
        + ", ".join(f"{e:.3g}: {100 * share:.0f} %" for e, share in curve),
        f"read out early, at t = {early['t']}, {100 * early['robust']:.1f} % of the attacked images are right",
        "time by stage: "
        + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result["seconds"].items()),
    ]


def conduct(model, args, data, files, surrogate=None, ends_early=ENDS_EARLY):
    """Audits a model, writes the result and prints the verdict; returns the result, see
    `result_of`.

    args: see `audit.Subject`, and budget; data: (images uint8 (n, C, H, W), labels), tensors;
    files: what `Audit.run` needs of a store, and source, settings, computed_on, text, write and
    plot; surrogate: (model, args) or None; ends_early: how far images have settled where the
    predictions that attacks ask for stop, see `relax_until_converged`."""
    x, y = (data[0].float() / 255).cpu().numpy(), data[1].cpu().numpy()
    other = (
        Subject(surrogate[0].to(next(model.parameters()).device), surrogate[1], x, y)
        if surrogate
        else None
    )
    subject = Subject(model, args, x, y, BUDGETS[args.budget], ends_early, other)
    print(
        f"audit, {args.attack_norm}-norm, eps {args.eps:g}, {len(y)} images, budget {args.budget}, predictions after "
        f"{subject.T1} steps, gradients through {' '.join(map(str, subject.steps))}; results go to {files.text}",
        flush=True,
    )
    state = Audit(subject, functools.partial(print, flush=True)).run(files)
    result = result_of(state, subject, files.settings, files.source)
    result["computed_on"] = files.computed_on
    lines = verdict(result, args.attack_norm, args.eps)
    files.write(result, lines, state.x_adv, y)
    print("\n".join(lines), flush=True)
    files.plot(result)
    return result
