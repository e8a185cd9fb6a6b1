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
    """Audit a model, write the result and print the verdict; returns `criteria.result_of`.

    files: the store of `stages.Audit.run`, and source, settings, computed_on, text, write and plot;
    budget: of `stages.BUDGETS`; surrogate: a model whose adversarial examples are tried too."""
    eps = audited.attack.eps
    norm = audited.attack.norm
    line = f"audit, {norm}-norm, eps {eps:g}, {len(audited.y)} images, budget {budget}"
    if audited.model.has_dynamics:
        line += (
            f", predictions after {audited.T1} steps, gradients through "
            f"{' '.join(map(str, audited.steps))}"
        )
    print(f"{line}; results go to {files.text}", flush=True)
    report = functools.partial(print, flush=True)
    state = stages.Audit(audited, stages.BUDGETS[budget], surrogate, report).run(files)
    result = result_of(state, audited, files.settings, files.source)
    result["computed_on"] = files.computed_on
    lines = verdict(result, norm, eps)
    files.write(result, lines, state.x_adv, audited.y)
    print("\n".join(lines), flush=True)
    files.plot(result)
    return result
