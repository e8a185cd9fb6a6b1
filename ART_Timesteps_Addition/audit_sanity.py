"""Whether the numbers of an audit make sense: its last stage."""

import dataclasses
import math

import numpy as np

from ART_Timesteps_Addition.audit_subject import STILL
from ART_Timesteps_Addition.measures import margins, norms


def sanity(audit):
    """The strongest gradient at growing eps, in one step, along its way; what attacked images do at
    2 T1."""
    subject, state, facts = audit.subject, audit.state, audit.state.facts
    rows = np.flatnonzero(margins(subject.logits(subject.x), subject.y) > 0)[: audit.budget.sample]
    x, y = subject.x[rows], subject.y[rows]
    whole = 1.0 if audit.norm == "inf" else math.sqrt(math.prod(x.shape[1:]))
    curve = [(0.0, len(rows))]
    for eps in [audit.eps / 4, audit.eps / 2, *_doubled(audit.eps, whole)]:
        curve.append((eps, int((_margins(audit, audit.way, "pgd", eps, x, y)[0] > 0).sum())))
        if not curve[-1][1]:
            break
    facts |= {
        "curve": [(eps, count / max(len(rows), 1)) for eps, count in curve],
        "rise": max(0, *(b[1] - a[1] for a, b in zip(curve, curve[1:]))),
        "sample": len(rows),
        "unbounded": _unbounded(audit, x, y, whole) if curve[-1][1] else 0,
    }
    start = margins(subject.logits(x), y)
    single, many = (
        _margins(audit, audit.way, name, audit.eps, x, y)[0] for name in ("fgsm", "pgd")
    )
    facts |= {
        "single": int((single > 0).sum()),
        "iterative": int((many > 0).sum()),
        "loss_rises": float((many < start).mean()) if len(rows) else 1.0,
    }
    attacked = norms(state.x_adv - subject.x, audit.norm) > 0
    fallen = np.flatnonzero(~state.standing & attacked)
    later = subject.logits(state.x_adv[fallen], 2 * subject.T1).argmax(1)
    moved = subject.trajectory(state.x_adv)[1]
    facts |= {
        "fallen": len(fallen),
        "recovered": int((later == subject.y[fallen]).sum()),
        "attacked_settled": float((moved < STILL).mean()),
    }


def _margins(audit, way, name, eps, x, y, iters=None):
    """(margins, images) that an attack with another bound reaches."""
    generate, found = audit.by(way, name, eps, iters=iters or audit.budget.iters), []
    for i in range(0, len(y), audit.subject.args.mbs):
        rows = slice(i, i + audit.subject.args.mbs)
        found.append(
            generate(x[rows].copy(), y[rows], (audit.subject.args.seed, audit.number, i))[0]
        )
    found = np.concatenate(found) if found else x
    return margins(audit.subject.logits(found), y), found


def _unbounded(audit, x, y, eps):
    """How many images no gradient breaks within all of [0, 1], with more iterations."""
    for grad in dict.fromkeys((audit.way.grad, *audit.subject.grads)):
        way = audit.subject.calibrated(dataclasses.replace(audit.way, grad=grad), eps)
        left = _margins(audit, way, "pgd", eps, x, y, 4 * audit.budget.iters)[0] > 0
        x, y = x[left], y[left]
        if not len(y):
            break
    return len(y)


def _doubled(eps, whole):
    """eps, 2 eps, 4 eps ... and at last `whole`, which lets an image become any other."""
    while eps < whole:
        yield eps
        eps *= 2
    yield whole
