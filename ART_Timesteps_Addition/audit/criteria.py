"""Whether an audit's robust accuracy is reliable: criteria, result and verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ART_Timesteps_Addition.audit.model import AuditedModel, AuditState
from metrics import wilson

Measure = Callable[[Mapping[str, Any]], float]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A measurement that must not exceed its limit or, unless `at_most`, not fall below it.

    value, limit  from the measurements of an `AuditState` and images, steps, T1
    why           what the value is, and what a failure means
    advice        what to try after a failure
    of_dynamics   whether it is about time steps, which feed-forward networks lack
    """

    value: Measure
    limit: Measure
    why: str
    advice: str
    at_most: bool = True
    of_dynamics: bool = False


FEW_IMAGES = 50  # with so many, the 95 % interval of an accuracy of 50 % is 37 to 63 %


def _constant(limit: float) -> Measure:
    return lambda m: limit


def _few(m: Mapping[str, Any]) -> int:
    """2 % of the images, at least one."""
    return max(1, math.ceil(0.02 * m["images"]))


def _more(m: Mapping[str, Any]) -> int:
    """5 % of the images, at least two."""
    return max(2, math.ceil(0.05 * m["images"]))


OTHER_GRADIENTS = "a --surrogate or, of a model with time steps, other numbers of --attack-step"
CRITERIA = {
    "deterministic": Criterion(
        lambda m: m["changed_again"],
        _constant(0),
        "images whose predicted class differs between two predictions: attacks assume a "
        "deterministic model",
        "average the attack's gradient over the noise, or remove the noise",
    ),
    "responds": Criterion(
        lambda m: m["responds"],
        _constant(0.9),
        "share of images whose first layer responds when every pixel changes by 1e-4: the gradient "
        "of a rounded input is meaningless",
        "attacks on the model without its rounding",
        at_most=False,
    ),
    "settled": Criterion(
        lambda m: m["settled"],
        _constant(0.9),
        "share of images that the step at T1 changes by less than 5 % in every layer: attacks "
        "assume that the prediction has converged",
        "a larger --T1",
        at_most=False,
        of_dynamics=True,
    ),
    "time_steps": Criterion(
        lambda m: m["changed_later"],
        _few,
        "images whose predicted class changes between T1 and 2 T1",
        "a larger --T1",
        of_dynamics=True,
    ),
    "attack_steps": Criterion(
        lambda m: m["steps"],
        lambda m: min(m["T1"], 2 * m["layers"]),
        "time steps that the gradients are unrolled through: a gradient must reach the image and "
        "depend on the dynamics",
        "more and larger numbers of --attack-step",
        at_most=False,
        of_dynamics=True,
    ),
    "gradients": Criterion(
        lambda m: m["masked"],
        _constant(0.05),
        "share of images whose gradient is exactly zero or not finite, by the strongest gradient "
        "method",
        OTHER_GRADIENTS,
    ),
    "blind_attacks": Criterion(
        lambda m: m["blind_breaks"],
        _few,
        "images that only attacks without gradients of this model misclassified: gradient masking",
        "--budget standard, and a --surrogate",
    ),
    "budget": Criterion(
        lambda m: m["more_breaks"],
        _more,
        "images that only more restarts and iterations of the strongest attack misclassified: it "
        "has not converged",
        f"--budget standard, {OTHER_GRADIENTS}",
    ),
    "unbounded": Criterion(
        lambda m: m["unbounded"],
        _constant(0),
        "images still classified correctly although the attack may change them into any other: "
        "gradient masking",
        OTHER_GRADIENTS,
    ),
    "more_eps": Criterion(
        lambda m: m["rise"],
        _few,
        "images by which accuracy rises with eps: a larger ball contains the smaller one",
        f"--budget standard, {OTHER_GRADIENTS}",
    ),
    "iterations": Criterion(
        lambda m: m["iterative"] - m["single"],
        _constant(1),
        "images by which a single step is stronger than many: gradient masking",
        OTHER_GRADIENTS,
    ),
    "loss_rises": Criterion(
        lambda m: m["loss_rises"],
        _constant(0.9),
        "share of images whose margin the attack lowers",
        OTHER_GRADIENTS,
        at_most=False,
    ),
    "attacked_settled": Criterion(
        lambda m: m["attacked_settled"],
        _constant(0.75),
        "share of adversarial examples that the step at T1 changes by less than 5 % in every layer",
        "a larger --T1",
        at_most=False,
        of_dynamics=True,
    ),
    "attacked_later": Criterion(
        lambda m: m["recovered"] / max(m["fallen"], 1),
        _constant(0.1),
        "share of misclassified adversarial examples that are classified correctly at 2 T1",
        "a larger --T1",
        of_dynamics=True,
    ),
}


def evaluate(
    measurements: Mapping[str, Any], images: int, steps: Sequence[int], T1: int
) -> dict[str, dict[str, Any]]:
    """{name: {passed, value, limit, why}} from the measurements of an `AuditState`.

    steps: the numbers of time steps that gradients were unrolled through."""
    m = {**measurements, "images": images, "steps": max(steps), "T1": T1}
    found = {}
    for name, criterion in CRITERIA.items():
        if criterion.of_dynamics and not m.get("moves", True):
            continue
        value = criterion.value(m)
        limit = criterion.limit(m)
        found[name] = {
            "passed": bool(value <= limit if criterion.at_most else value >= limit),
            "value": value,
            "limit": limit,
            "why": criterion.why,
        }
    return found


def result_of(state: AuditState, audited: AuditedModel, source: str = "") -> dict[str, Any]:
    """The result of an audit, for JSON. state: the last of `stages.Audit`; source: the audited
    checkpoint, one line.

    strongest: the gradient method whose PGD reached the smallest mean margin; curve: accuracy over
    eps of PGD by it alone, on the first `sample` correctly classified images."""
    n = len(audited.y)
    m = state.measurements
    checks = evaluate(m, n, audited.steps, audited.T1)
    robust = int(state.robust.sum()) / max(n, 1)
    return {
        "clean": m["clean"],
        "robust": robust,
        "interval": list(wilson(robust, n)),
        "images": n,
        "trusted": all(check["passed"] for check in checks.values()),
        "checks": checks,
        "attacks": state.attacks,
        "strongest": m["strongest"],
        "curve": m["curve"],
        "sample": m["sample"],
        "early": m["early"],
        "seconds": m["seconds"],
        "model": source,
    }


def verdict(result: Mapping[str, Any], norm: str, eps: str) -> list[str]:
    """The result as text, a list of lines. eps: as text."""
    low, high = (100 * share for share in result["interval"])
    robust = 100 * result["robust"]
    failed = [name for name, check in result["checks"].items() if not check["passed"]]
    if failed:
        first = (
            f"NOT TRUSTED: {robust:.1f} % is only an upper bound of the robust accuracy; failed: "
            f"{', '.join(failed)}"
        )
        if failed[0] in CRITERIA:
            first += f"; try {CRITERIA[failed[0]].advice}"
    else:
        first = (
            f"TRUSTED: robust accuracy {robust:.1f} % ({low:.1f} to {high:.1f} % with 95 % "
            "confidence)"
        )
    images = result["images"]
    few = (
        f"warning: {images} images prove little: the 95 % interval of the accuracy under these "
        f"attacks is {low:.1f} to {high:.1f} %; increase --test-size"
    )
    lines = [
        first,
        *([few] if images < FEW_IMAGES else ()),
        f"{'L-infinity' if norm == 'inf' else 'L2'} eps {eps}, {images} images; clean "
        f"accuracy {100 * result['clean']:.1f} %",
        f"strongest gradient: {result['strongest']} (its PGD reached the smallest mean margin)",
        f"model: {result['model']}",
        *(f"computed on: {place}" for place in result.get("computed_on", ())),
        "",
        "checks (value, limit):",
    ]
    for name, check in result["checks"].items():
        passed = "passed" if check["passed"] else "FAILED"
        line = f"  {passed} {name:17} {check['value']:7.4g} {check['limit']:6.4g}"
        lines.append(line if check["passed"] else f"{line}  {check['why']}")
    lines += ["", "attacks (misclassified, still correct after it, masked, time):"]
    for attack in result["attacks"]:
        lines.append(
            f"  {attack['stage']} {attack['name']:52} {attack['broken']:5} "
            f"{attack['standing']:5} {100 * attack['masked']:5.1f} % {attack['seconds']:7.1f} s"
        )
    curve = ", ".join(f"{eps:.3g}: {100 * share:.0f} %" for eps, share in result["curve"])
    seconds = ", ".join(f"{stage} {count:.1f} s" for stage, count in result["seconds"].items())
    lines += [
        "",
        f"accuracy over eps (PGD by the strongest gradient alone, first {result['sample']} "
        f"correctly classified images): {curve}",
    ]
    known = [CRITERIA[name] for name in result["checks"] if name in CRITERIA]
    if any(criterion.of_dynamics for criterion in known):
        early = result["early"]
        lines.append(
            f"read out early, at t = {early['t']}: {100 * early['robust']:.1f} % of the "
            "adversarial examples classified correctly"
        )
    return [*lines, f"time by stage: {seconds}"]
