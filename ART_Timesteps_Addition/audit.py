"""An audit: attacks on one model within one bound, cheapest first, each on the images that still
stand, and what their numbers are to be judged by (see `audit_checks`)."""

import dataclasses
import json
import time

import numpy as np

from ART_Timesteps_Addition import attacks, audit_sanity, torch_attacks
from ART_Timesteps_Addition.audit_subject import STILL, State
from ART_Timesteps_Addition.measures import margins, random_in_ball, seeded, within


class Audit:
    """The stages of an audit of one `Subject`. report: takes a line of text for whom it
    concerns."""

    def __init__(self, subject, report=print):
        self.subject, self.report, self.state = subject, report, None
        self.budget, self.eps, self.norm = (
            subject.budget,
            subject.args.eps,
            subject.args.attack_norm,
        )

    def run(self, store):
        """All stages; those that the store has of a run that was stopped are taken from there.
        store: load(stage) -> (arrays, record) or None, save(stage, arrays, record). Returns the
        last `State`."""
        stopped = False
        for number, (name, stage) in enumerate(STAGES.items()):
            found = None if stopped else self._restored(store.load(name))
            if found is not None:
                self.state = found
                continue
            stopped, start, self.number = True, time.perf_counter(), number
            if self.state is None:
                self.state = State(self.subject.x, np.zeros(len(self.subject.x)))
            stage(self)
            seconds = self.state.facts.setdefault("seconds", {})
            seconds[name] = round(time.perf_counter() - start, 1)
            arrays, record = self.state.arrays()
            store.save(name, arrays, json.loads(json.dumps(record)))
            self.report(
                f"stage {name}: {int(self.state.standing.sum())} of {len(self.subject.y)} images stand, "
                f"{seconds[name]:.1f} s"
            )
        return self.state

    def _restored(self, found):
        """The `State` of a stored stage; None without one, or if it is not of these images."""
        if found is None:
            return None
        try:
            state = State.of(*found)
            shapes = state.x_adv.shape, state.margin.shape
            kinds = state.x_adv.dtype.kind + state.margin.dtype.kind
        except (KeyError, TypeError, ValueError):
            return None
        fits = shapes == (self.subject.x.shape, self.subject.y.shape) and kinds == "ff"
        return state if fits else None

    # ---- one attack

    def attempt(self, name, settings, generate):
        """One attack on the images that stand: generate(x, y, seed) -> (x_adv, masked (n,) bool), a
        mini-batch at a time. Whether an image falls says the prediction that counts. Returns the
        margins it reached, (n,), nan of images that had fallen before."""
        subject, state, start = self.subject, self.state, time.perf_counter()
        left, reached = np.flatnonzero(state.standing), np.full(len(subject.y), np.nan)
        masked = 0
        for i in range(0, len(left), subject.args.mbs):
            rows = left[i : i + subject.args.mbs]
            x, y = subject.x[rows], subject.y[rows]
            found, bad = generate(
                x.copy(), y, (subject.args.seed, self.number, len(state.attacks), int(rows[0]))
            )
            found = within(found, x, self.norm, self.eps, not subject.args.no_clip)
            reached[rows] = margins(subject.logits(found), y)
            nearer = reached[rows] < state.margin[rows]
            state.x_adv[rows[nearer]], state.margin[rows[nearer]] = (
                found[nearer],
                reached[rows][nearer],
            )
            masked += int(np.sum(bad))
        broken, standing = int((reached[left] <= 0).sum()), int(state.standing.sum())
        state.attacks.append(
            {
                "name": name,
                "settings": settings,
                "stage": "abcdef"[self.number],
                "broken": broken,
                "standing": standing,
                "masked": masked / max(len(left), 1),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        self.report(
            f"  {name}: broke {broken} of {len(left)}, {state.attacks[-1]['seconds']:.1f} s"
        )
        return reached

    def by(self, way, attack="pgd", eps=None, candidates=None, **plan):
        """generate, see `attempt`, of an attack by its name (of `attacks.NAMES`). candidates: see
        `attacks.attack_batch`; plan: of `attacks.Plan`."""
        classifier = self.subject.classifier(way, attack, eps)
        plan = attacks.Plan(
            attack, self.norm, eps or self.eps, clip=not self.subject.args.no_clip, **plan
        )

        def generate(x, y, seed):
            result = attacks.attack_batch(classifier, x, y, plan, seed, candidates)
            return result["x_adv"], result["masked_images"]

        return generate

    # ---- a: without an attack

    def clean(self):
        """Accuracy, twice, at T1 and at 2 T1; which images have settled."""
        subject, state = self.subject, self.state
        logits, again = (subject.logits(subject.x, salt=salt) for salt in (0, 1))
        state.margin = margins(logits, subject.y)
        classes, moved = subject.trajectory(subject.x)
        later = subject.logits(subject.x, 2 * subject.T1).argmax(1)
        predicted = logits.argmax(1)
        state.facts |= {
            "clean": float((predicted == subject.y).mean()),
            "changed_again": int((predicted != again.argmax(1)).sum()),
            "clean_later": float((later == subject.y).mean()),
            "changed_later": int((predicted != later).sum()),
            "settled": float((moved < STILL).mean()),
            "responds": subject.responds(),
            "layers": len(subject.model.synapses),
            "moves": subject.model.has_dynamics,
        }

    # ---- b: projected gradient descent

    def descend(self):
        """PGD by every gradient; then the strongest with restarts, and with twice the
        iterations."""
        subject, state, reached, found = self.subject, self.state, {}, {}
        for steps in subject.steps:
            for start in ("zero", "equilibrium"):
                for grad in subject.grads:
                    if start == "equilibrium" and (grad == "ep" or steps >= subject.T1):
                        continue  # where it is the same again
                    way = subject.calibrated(attacks.Way(grad, steps=steps, start=start))
                    name = f"pgd {grad}@{steps} from {start}"
                    found[name] = way
                    reached[name] = self.attempt(
                        name,
                        {"iters": self.budget.iters, **_told(way)},
                        self.by(way, iters=self.budget.iters),
                    )
        name = _strongest(reached, state)
        way, count = found[name], int(state.standing.sum())
        state.facts |= {"strongest": name, "way": dataclasses.asdict(way)}
        for words, plan in (
            (f"with {self.budget.restarts} restarts", {"restarts": self.budget.restarts}),
            ("with twice the iterations", {"iters": 2 * self.budget.iters}),
        ):
            plan = {"iters": self.budget.iters, **plan}
            self.attempt(f"{name} {words}", {**plan, **_told(way)}, self.by(way, **plan))
        state.facts |= {
            "more_breaks": count - int(state.standing.sum()),
            "masked": self._masked(way),
        }

    def _masked(self, way):
        """The share of all images whose gradient by that way is exactly zero or not finite."""
        subject, bad = self.subject, 0
        for i in range(0, len(subject.y), subject.args.mbs):
            rows = slice(i, i + subject.args.mbs)
            bad += int(self.by(way, "fgsm")(subject.x[rows].copy(), subject.y[rows], (0,))[1].sum())
        return bad / max(len(subject.y), 1)

    @property
    def way(self):
        """The strongest gradient of stage b."""
        way = self.state.facts["way"]
        return attacks.Way(**{**way, "softness": tuple(way["softness"])})

    # ---- c: the standard ensemble (its Square is the first attack of the next stage)

    def ensemble(self):
        """APGD-CE, targeted APGD and targeted FAB by the strongest gradient."""
        for name in attacks.ENSEMBLE:
            self.attempt(
                f"{name}",
                {"iters": self.budget.ensemble, **_told(self.way)},
                self.by(self.way, name, iters=self.budget.ensemble),
            )

    # ---- d: without gradients of this model

    def blindly(self):
        """Square, HopSkipJump, random draws, and images that break a surrogate."""
        subject, budget, before = self.subject, self.budget, int(self.state.standing.sum())
        classifier = subject.classifier(attack="square")

        def square(x, y, seed):
            attack = torch_attacks.square(classifier, self.norm, self.eps, budget.queries)
            with seeded(*seed):
                return attack.generate(
                    x, np.eye(subject.task.classes, dtype=np.float32)[y]
                ), np.zeros(len(x))

        self.attempt("square", {"queries": budget.queries}, square)
        candidates = attacks.Candidates.of(classifier, subject.x)
        self.attempt(
            "hopskipjump",
            {"queries": budget.hops},
            self.by(attacks.Way(), "hopskipjump", candidates=candidates, queries=budget.hops),
        )
        self.attempt("random draws", {"draws": budget.draws}, self._draws)
        if subject.surrogate:
            self._transfer(subject.surrogate)
        self.state.facts["blind_breaks"] = before - int(self.state.standing.sum())

    def _draws(self, x, y, seed):
        classifier, best = self.subject.classifier(attack="square"), x.copy()
        margin, clip = margins(classifier.read_out(x), y), not self.subject.args.no_clip
        left = self.budget.draws
        with seeded(*seed):
            while left and (margin > 0).any():
                rows = np.flatnonzero(margin > 0)
                several = min(
                    left, max(1, self.subject.args.mbs // len(rows))
                )  # small mini-batches are slow
                left, each = left - several, np.tile(rows, several)
                found = within(
                    x[each] + random_in_ball(x[each].shape, self.norm, self.eps),
                    x[each],
                    self.norm,
                    self.eps,
                    clip,
                )
                reached = margins(classifier.read_out(found), y[each]).reshape(several, -1)
                place = reached.argmin(0)
                nearest = reached[place, np.arange(len(rows))]
                found = found.reshape(several, len(rows), *x.shape[1:])[place, np.arange(len(rows))]
                nearer = nearest < margin[rows]
                best[rows[nearer]], margin[rows[nearer]] = found[nearer], nearest[nearer]
        return best, np.zeros(len(x))

    def _transfer(self, surrogate):
        for grad in ("bptt", "smooth"):
            way = surrogate.calibrated(attacks.Way(grad, steps=surrogate.steps[-1]))
            plan = attacks.Plan(
                "pgd", self.norm, self.eps, self.budget.iters, clip=not self.subject.args.no_clip
            )
            classifier = surrogate.classifier(way)

            def generate(x, y, seed, classifier=classifier, plan=plan):
                return attacks.attack_batch(classifier, x, y, plan, seed)["x_adv"], np.zeros(len(x))

            self.attempt(f"transfer of pgd {grad}", {"iters": plan.iters}, generate)

    # ---- e: the dynamics itself

    def dynamics(self):
        """Gradients of the loss averaged over intermediate states; adversarial images judged at
        every step."""
        subject, state = self.subject, self.state
        for grad in ("bptt", "smooth") if subject.model.has_dynamics else ():
            way = subject.calibrated(
                attacks.Way(grad, steps=min(subject.steps[-1], subject.T1), states="all")
            )
            self.attempt(
                f"pgd {grad} over all states",
                {"iters": self.budget.iters, **_told(way)},
                self.by(way, iters=self.budget.iters),
            )
        classes, _ = subject.trajectory(state.x_adv)
        shares = (classes == subject.y).mean(1)
        state.facts["early"] = {
            "t": int(shares.argmax()) + 1,
            "robust": float(shares.max()),
            "over_time": [round(float(share), 6) for share in shares],
        }


STAGES = {
    "a": Audit.clean,
    "b": Audit.descend,
    "c": Audit.ensemble,
    "d": Audit.blindly,
    "e": Audit.dynamics,
    "f": audit_sanity.sanity,
}


def _told(way):
    """What is said of a gradient among an attack's settings."""
    told = {"grad": way.grad, "steps": way.steps, "start": way.start}
    return {
        **told,
        **({"gain": way.gain} if way.gain != 1 else {}),
        **({"softness": [round(factor, 6) for factor in way.softness]} if way.softness else {}),
    }


def _strongest(reached, state):
    """The name of the attack that brought the images that all of them were tried on nearest to
    another class; where none stands, of the one that broke most."""
    if state.standing.any():
        return min(
            reached,
            key=lambda name: np.nan_to_num(reached[name][state.standing], posinf=1e30).mean(),
        )
    return max(reached, key=lambda name: int((reached[name] <= 0).sum()))
