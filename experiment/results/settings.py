"""What identifies a measurement besides the weights and the data: the settings of each kind of
record, see `results.record`. Records with the same settings are one measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ART_Timesteps_Addition.names import ATTACK_VERSION
from experiment.config import Config
from experiment.results.record import attack_libraries

WORST = (
    "worst"  # the gradient of a record of the strongest attack per image, over several gradients
)
NO_GRADIENT = "none"  # the gradient of attacks that use predictions only


def prediction(config: Config, steps: int) -> dict[str, Any]:
    """The settings of a prediction after `steps` time steps."""
    settings: dict[str, Any] = {"mbs": config.data.mbs, "precision": config.session.precision}
    if config.model.has_dynamics:
        settings |= {
            "predict_step": steps,
            "tol": config.learning.tol,
            "compile": config.session.compile,
        }
    return settings


def code() -> dict[str, Any]:
    """The code that attacks depend on."""
    return {"version": ATTACK_VERSION, "libraries": attack_libraries()}


def attack(config: Config, eps: float, smooth: str) -> dict[str, dict[str, Any]]:
    """{label: settings} of the measurements of an attack at one eps, with the labels of
    `model_utils.attack`. smooth: how the gradient method `smooth` works, as text."""
    budget = config.attack.at(eps)
    shared = {
        "attack": budget.name,
        "norm": budget.norm,
        "eps": float(eps),
        "iters": 0 if budget.ignores_iters else budget.iters,
        "queries": budget.queries or 0,
        "restarts": budget.restarts,
        "clip": budget.clip,
        "seed": config.session.seed or 0,
        **prediction(config, config.predict_steps),
        **code(),
    }
    if not config.attack.uses_gradient:
        return {budget.name: {**shared, "gradient": NO_GRADIENT}}
    grads = config.attack.grads
    if not config.model.has_dynamics:
        unrolled: tuple[int, ...] = (0,)
    else:
        shared["start"] = config.attack.start
        unrolled = config.attack_steps
    found: dict[str, dict[str, Any]] = {}
    for grad in grads:
        for steps in unrolled:
            label = grad if len(unrolled) == 1 else f"{grad}@{steps}"
            found[label] = {**shared, "gradient": grad, "steps": steps}
    if len(found) > 1:
        several = {"gradients": sorted(grads), "steps": sorted(unrolled)}
        found[WORST] = {**shared, "gradient": WORST, **several}
    for settings in found.values():
        if "smooth" in (settings["gradient"], *settings.get("gradients", ())):
            settings["smooth"] = smooth
    return found


def audit(
    config: Config, ends_early: float, surrogate: Sequence[Any] | None = None
) -> dict[str, Any]:
    """The settings of an audit.

    ends_early: tolerance of the predictions within its attacks; surrogate: what identifies the
    surrogate and its predictions, None without one."""
    attack = config.audit_attack
    settings = {
        "norm": attack.norm,
        "eps": float(attack.eps),
        "budget": config.audit.budget,
        "clip": attack.clip,
        "seed": config.session.seed or 0,
        **prediction(config, config.predict_steps),
        **code(),
    }
    if config.model.has_dynamics:
        settings |= {"steps": sorted(set(config.attack_steps)), "ends_early": ends_early}
    if surrogate:
        settings["surrogate"] = list(surrogate)
    return settings


def corruption(config: Config, name: str) -> dict[str, Any]:
    """The settings of the accuracies under one corruption."""
    return {"corruption": name, **prediction(config, config.learning.T1)}


def characteristic(config: Config) -> dict[str, Any]:
    """The settings of a measurement after each of T1 free steps."""
    settings = prediction(config, config.learning.T1)
    settings.pop("tol")  # every step is taken
    return {"T1": settings.pop("predict_step"), **settings}


def gducheck(config: Config) -> dict[str, Any]:
    """The settings of a comparison of EP with BPTT, which computes in fp32."""
    rule = config.rule
    return {
        "alg": rule.alg,
        "T1": rule.T1,
        "T2": rule.T2,
        "betas": list(rule.betas),
        "thirdphase": rule.thirdphase,
        "precision": "fp32",
        "compile": config.session.compile,
    }
