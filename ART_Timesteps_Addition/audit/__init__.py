"""How robust is the model, and is the number reliable?

An audit attacks one model within one eps, the cheapest attacks first, each on the images that are
still classified correctly (`stages`). The robust accuracy is trusted if the measurements meet all
`criteria`."""

from __future__ import annotations

import functools
from typing import Any

from ART_Timesteps_Addition.audit import stages
from ART_Timesteps_Addition.audit.criteria import result_of, verdict
from ART_Timesteps_Addition.audit.model import AuditedModel


def audit(
    audited: AuditedModel,
    files: Any,
    budget: str = "standard",
    surrogate: AuditedModel | None = None,
) -> dict[str, Any]:
    """Audit a model, unless its result is known, write the result and print the verdict.

    files: `experiment.results.audit.AuditFiles`; budget: of `stages.BUDGETS`; surrogate: a model
    whose adversarial examples are tried too. Returns the result, see `criteria.result_of`, with its
    settings."""
    eps = files.eps
    norm = audited.attack.norm
    line = f"audit, {norm}-norm, eps {eps}, {len(audited.y)} images, budget {budget}"
    if audited.model.has_dynamics:
        line += (
            f", predictions after {audited.T1} steps, gradients unrolled through "
            f"{' and '.join(map(str, audited.steps))} steps"
        )
    result = files.result()
    recorded = "" if result is None else " (recorded)"
    print(f"{line}; results go to {files.text}{recorded}", flush=True)
    if result is None:
        report = functools.partial(print, flush=True)
        state = stages.Audit(audited, stages.BUDGETS[budget], surrogate, report).run(files)
        value = result_of(state, audited, files.source)
        result = files.add(value, state.robust, state.x_adv, audited.y)
    lines = verdict(result, norm, eps)
    files.write(result, lines)
    print("\n".join(lines), flush=True)
    files.plot(result)
    return result
