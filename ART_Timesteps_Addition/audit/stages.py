"""The stages of an audit: attacks on one model, the cheapest first, each on the images that are
still classified correctly."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ART_Timesteps_Addition import attacks, torch_attacks
from ART_Timesteps_Addition.audit.model import CONVERGED, AuditedModel, AuditState
from ART_Timesteps_Addition.seeding import seeded
from ART_Timesteps_Addition.settings import GradientMethod
from metrics import margins, norms, project, random_in_ball

# (x, y, seed) -> (x_adv, whether the gradient of each image was masked (n,))
Generate = Callable[[np.ndarray, np.ndarray, Sequence[int]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much the attacks of an audit may compute.

    iters     iterations of PGD
    ensemble  iterations of each attack of the standard ensemble
    queries   predictions per image, of Square
    hops      predictions per image, of HopSkipJump
    draws     random points in the ball
    restarts  of the strongest PGD
    sample    images that accuracy over eps is measured on
    """

    iters: int = 20
    ensemble: int = 100
    queries: int = 5000
    hops: int = 500
    draws: int = 1000
    restarts: int = 3
    sample: int = 50


BUDGETS = {"standard": Budget(), "quick": Budget(10, 5, 150, 100, 50, 1, 20)}


class Audit:
    """An audit of one model. surrogate: a model whose adversarial examples are tried too; report:
    prints a line of progress."""

    def __init__(
        self,
        audited: AuditedModel,
        budget: Budget = Budget(),
        surrogate: AuditedModel | None = None,
        report: Callable[[str], None] = print,
    ):
        self.audited = audited
        self.budget = budget
        self.surrogate = surrogate
        self.report = report
        self.attack = audited.attack  # norm, eps and clip
        self.state = AuditState(audited.x, np.zeros(len(audited.x)))
        self.number = 0  # of the stage

    def run(self, store: Any) -> AuditState:
        """Run all stages except those that the store has from an interrupted audit.

        store: load(stage) -> (arrays, record) or None, save(stage, arrays, record). Returns the
        last state."""
        resumes = True
        for number, (name, stage) in enumerate(STAGES.items()):
            self.number = number
            stored = self._restored(store.load(name)) if resumes else None
            if stored is not None:
                self.state = stored
                continue
            resumes = False
            start = time.perf_counter()
            stage(self)
            seconds = self.state.measurements.setdefault("seconds", {})
            seconds[name] = round(time.perf_counter() - start, 1)
            arrays, record = self.state.arrays()
            store.save(name, arrays, json.loads(json.dumps(record)))
            self.report(
                f"stage {name}: {self._count()} of {len(self.audited.y)} images still classified "
                f"correctly, {seconds[name]:.1f} s"
            )
        return self.state

    def _restored(
        self, stored: tuple[Mapping[str, np.ndarray], Mapping[str, Any]] | None
    ) -> AuditState | None:
        """The state of a stored stage; None without one, or if it has other images."""
        if stored is None:
            return None
        try:
            state = AuditState.of(*stored)
            shapes = state.x_adv.shape, state.margin.shape
            kinds = state.x_adv.dtype.kind + state.margin.dtype.kind
        except (KeyError, TypeError, ValueError):
            return None
        fits = shapes == (self.audited.x.shape, self.audited.y.shape) and kinds == "ff"
        return state if fits else None

    def _count(self) -> int:
        """Images that are still classified correctly."""
        return int(self.state.robust.sum())

    # ---- one attack

    def attempt(self, name: str, settings: dict[str, Any], generate: Generate) -> np.ndarray:
        """One attack on the images that are still classified correctly, by mini-batches. Returns
        the margins it reached, (n,), nan of images that were misclassified before.

        An image counts as misclassified by `AuditedModel.logits`, not by what the attack sees."""
        audited = self.audited
        state = self.state
        start = time.perf_counter()
        left = np.flatnonzero(state.robust)
        reached = np.full(len(audited.y), np.nan)
        masked = 0
        for i in range(0, len(left), audited.mbs):
            rows = left[i : i + audited.mbs]
            x = audited.x[rows]
            y = audited.y[rows]
            seed = (audited.seed, self.number, len(state.attacks), int(rows[0]))
            found, bad = generate(x.copy(), y, seed)
            found = project(found, x, self.attack.norm, self.attack.eps, self.attack.clip)
            margin = margins(audited.logits(found), y)
            lower = margin < state.margin[rows]
            state.x_adv[rows[lower]] = found[lower]
            state.margin[rows[lower]] = margin[lower]
            reached[rows] = margin
            masked += int(np.sum(bad))
        broken = int((reached[left] <= 0).sum())
        seconds = round(time.perf_counter() - start, 1)
        state.attacks.append(
            {
                "name": name,
                "settings": settings,
                "stage": list(STAGES)[self.number],
                "broken": broken,
                "standing": self._count(),
                "masked": masked / max(len(left), 1),
                "seconds": seconds,
            }
        )
        self.report(f"  {name}: misclassified {broken} of {len(left)}, {seconds:.1f} s")
        return reached

    def generator(
        self,
        method: GradientMethod,
        name: str = "pgd",
        eps: float | None = None,
        candidates: attacks.Candidates | None = None,
        of: AuditedModel | None = None,
        **budget: Any,
    ) -> Generate:
        """`generate` of `attempt` for an attack by its name.

        candidates: see `attacks.attack_batch`; of: the attacked model, by default the audited one;
        budget: iters, queries, restarts of `settings.Attack`."""
        attack = dataclasses.replace(self.attack, name=name, eps=eps or self.attack.eps, **budget)
        classifier = (of or self.audited).classifier(attack, method)

        def generate(
            x: np.ndarray, y: np.ndarray, seed: Sequence[int]
        ) -> tuple[np.ndarray, np.ndarray]:
            result = attacks.attack_batch(classifier, x, y, attack, seed, candidates)
            return result["x_adv"], result["masked_images"]

        return generate

    def pgd(self, name: str, method: GradientMethod, **budget: Any) -> np.ndarray:
        """An attempt by PGD. budget: iters (by default the audit's) and restarts."""
        budget = {"iters": self.budget.iters, **budget}
        settings = {**budget, **_settings_of(method)}
        return self.attempt(name, settings, self.generator(method, **budget))

    # ---- a: without an attack

    def clean(self) -> None:
        """Accuracy, twice, at T1 and at 2 T1; which images have converged."""
        audited = self.audited
        logits, again = (audited.logits(audited.x, salt=salt) for salt in (0, 1))
        later = audited.logits(audited.x, 2 * audited.T1).argmax(1)
        predicted = logits.argmax(1)
        _, change = audited.trajectory(audited.x)
        self.state.margin = margins(logits, audited.y)
        self.state.measurements |= {
            "clean": float((predicted == audited.y).mean()),
            "changed_again": int((predicted != again.argmax(1)).sum()),
            "clean_later": float((later == audited.y).mean()),
            "changed_later": int((predicted != later).sum()),
            "settled": float((change < CONVERGED).mean()),
            "responds": audited.responds(),
            "layers": len(audited.model.synapses),
            "moves": audited.model.has_dynamics,
        }

    # ---- b: projected gradient descent

    def descend(self) -> None:
        """PGD by every gradient method; then the strongest with restarts, and with twice the
        iterations."""
        audited = self.audited
        reached = {}
        methods = {}
        for steps in audited.steps:
            for start in ("zero", "equilibrium"):
                for grad in audited.grads:
                    if start == "equilibrium" and (grad == "ep" or steps >= audited.T1):
                        continue  # the same as from zero
                    method = GradientMethod(grad, steps=steps, start=start)
                    method = audited.calibrated(method)
                    name = f"pgd {grad}@{steps} from {start}"
                    methods[name] = method
                    reached[name] = self.pgd(name, method)
        name = _strongest(reached, self.state)
        method = methods[name]
        self.state.measurements |= {"strongest": name, "way": dataclasses.asdict(method)}
        count = self._count()
        restarts = self.budget.restarts
        self.pgd(
            f"{name} with {restarts} restart{'' if restarts == 1 else 's'}",
            method,
            restarts=restarts,
        )
        self.pgd(f"{name} with twice the iterations", method, iters=2 * self.budget.iters)
        self.state.measurements |= {
            "more_breaks": count - self._count(),
            "masked": self._masked(method),
        }

    def _masked(self, method: GradientMethod) -> float:
        """The share of all images whose gradient by that method is exactly zero or not finite."""
        audited = self.audited
        masked = 0
        for rows in audited.batches():
            generate = self.generator(method, "fgsm")
            masked += int(generate(audited.x[rows].copy(), audited.y[rows], (0,))[1].sum())
        return masked / max(len(audited.y), 1)

    @property
    def strongest(self) -> GradientMethod:
        """The gradient method of the strongest PGD of stage b."""
        fields = self.state.measurements["way"]
        return GradientMethod(**{**fields, "softness": tuple(fields["softness"])})

    # ---- c: the standard ensemble (its Square is the first attack of the next stage)

    def ensemble(self) -> None:
        """APGD-CE, targeted APGD and targeted FAB by the strongest gradient method."""
        iters = self.budget.ensemble
        for name in attacks.STANDARD_ENSEMBLE:
            settings = {"iters": iters, **_settings_of(self.strongest)}
            self.attempt(name, settings, self.generator(self.strongest, name, iters=iters))

    # ---- d: without gradients of this model

    def without_gradients(self) -> None:
        """Square, HopSkipJump, random points, and adversarial examples of a surrogate."""
        before = self._count()
        budget = self.budget
        attack = dataclasses.replace(self.attack, name="square", queries=budget.queries)
        classifier = self.audited.classifier(attack)

        def square(
            x: np.ndarray, y: np.ndarray, seed: Sequence[int]
        ) -> tuple[np.ndarray, np.ndarray]:
            labels = np.eye(self.audited.task.classes, dtype=np.float32)[y]
            with seeded(*seed):
                found = torch_attacks.square(classifier, attack, len(x)).generate(x, labels)
            return found, np.zeros(len(x))

        self.attempt("square", {"queries": budget.queries}, square)
        hops = self.generator(
            GradientMethod(),
            "hopskipjump",
            candidates=attacks.Candidates.of(classifier, self.audited.x),
            queries=budget.hops,
        )
        self.attempt("hopskipjump", {"queries": budget.hops}, hops)
        self.attempt("random draws", {"draws": budget.draws}, self._random_points)
        if self.surrogate:
            self._transfer(self.surrogate)
        self.state.measurements["blind_breaks"] = before - self._count()

    def _random_points(
        self, x: np.ndarray, y: np.ndarray, seed: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`generate` of random points in the ball, for each image the one of smallest margin."""
        attack = dataclasses.replace(self.attack, name="square")
        classifier = self.audited.classifier(attack)
        best = x.copy()
        margin = margins(classifier.read_out(x), y)
        left = self.budget.draws
        with seeded(*seed):
            while left and (margin > 0).any():
                rows = np.flatnonzero(margin > 0)
                # several points per image at once: small mini-batches are slow
                points = min(left, max(1, self.audited.mbs // len(rows)))
                left -= points
                each = np.tile(rows, points)
                centers = x[each]
                delta = random_in_ball(centers.shape, attack.norm, attack.eps)
                found = project(centers + delta, centers, attack.norm, attack.eps, attack.clip)
                reached = margins(classifier.read_out(found), y[each]).reshape(points, -1)
                smallest = reached.argmin(0), np.arange(len(rows))
                found = found.reshape(points, len(rows), *x.shape[1:])[smallest]
                reached = reached[smallest]
                lower = reached < margin[rows]
                best[rows[lower]] = found[lower]
                margin[rows[lower]] = reached[lower]
        return best, np.zeros(len(x))

    def _transfer(self, surrogate: AuditedModel) -> None:
        """Adversarial examples of the surrogate; its masked gradients are not counted."""
        iters = self.budget.iters
        for grad in ("bptt", "smooth"):
            method = surrogate.calibrated(GradientMethod(grad, steps=surrogate.steps[-1]))
            generate = self.generator(method, of=surrogate, iters=iters)

            def unmasked(
                x: np.ndarray,
                y: np.ndarray,
                seed: Sequence[int],
                generate: Generate = generate,
            ) -> tuple[np.ndarray, np.ndarray]:
                return generate(x, y, seed)[0], np.zeros(len(x))

            self.attempt(f"transfer of pgd {grad}", {"iters": iters}, unmasked)

    # ---- e: attacks on the dynamics

    def dynamics(self) -> None:
        """Gradients of the loss averaged over intermediate states; predictions on adversarial
        examples at every time step."""
        audited = self.audited
        for grad in ("bptt", "smooth") if audited.model.has_dynamics else ():
            steps = min(audited.steps[-1], audited.T1)
            method = audited.calibrated(GradientMethod(grad, steps=steps, states="all"))
            self.pgd(f"pgd {grad} over all states", method)
        classes, _ = audited.trajectory(self.state.x_adv)
        shares = (classes == audited.y).mean(1)
        self.state.measurements["early"] = {
            "t": int(shares.argmax()) + 1,
            "robust": float(shares.max()),
            "over_time": [round(float(share), 6) for share in shares],
        }

    # ---- f: sanity

    def sanity(self) -> None:
        """Accuracy over eps, one step against many iterations, adversarial examples at 2 T1."""
        audited = self.audited
        right = margins(audited.logits(audited.x), audited.y) > 0
        rows = np.flatnonzero(right)[: self.budget.sample]
        x = audited.x[rows]
        y = audited.y[rows]
        self._accuracy_over_eps(x, y)
        self._one_step_against_many(x, y)
        self._after_more_steps()

    def _accuracy_over_eps(self, x: np.ndarray, y: np.ndarray) -> None:
        eps = self.attack.eps
        everything = 1.0 if self.attack.norm == "inf" else math.sqrt(math.prod(x.shape[1:]))
        curve = [(0.0, len(y))]
        for size in [eps / 4, eps / 2, *_doubled(eps, everything)]:
            reached = self._margins("pgd", self.strongest, size, x, y, self.budget.iters)
            curve.append((size, int((reached > 0).sum())))
            if not curve[-1][1]:
                break
        rises = [after - before for (_, before), (_, after) in zip(curve, curve[1:])]
        unbounded = self._robust_to_everything(x, y, everything) if curve[-1][1] else 0
        self.state.measurements |= {
            "curve": [(size, count / max(len(y), 1)) for size, count in curve],
            "rise": max(0, *rises),
            "sample": len(y),
            "unbounded": unbounded,
        }

    def _robust_to_everything(self, x: np.ndarray, y: np.ndarray, eps: float) -> int:
        """How many images no gradient method misclassifies within all of [0, 1], with four times
        the iterations."""
        for grad in dict.fromkeys((self.strongest.grad, *self.audited.grads)):
            method = dataclasses.replace(self.strongest, grad=grad)
            method = self.audited.calibrated(method, eps)
            left = self._margins("pgd", method, eps, x, y, 4 * self.budget.iters) > 0
            x = x[left]
            y = y[left]
            if not len(y):
                break
        return len(y)

    def _one_step_against_many(self, x: np.ndarray, y: np.ndarray) -> None:
        start = margins(self.audited.logits(x), y)
        single, many = (
            self._margins(name, self.strongest, self.attack.eps, x, y, self.budget.iters)
            for name in ("fgsm", "pgd")
        )
        self.state.measurements |= {
            "single": int((single > 0).sum()),
            "iterative": int((many > 0).sum()),
            "loss_rises": float((many < start).mean()) if len(y) else 1.0,
        }

    def _after_more_steps(self) -> None:
        audited = self.audited
        x_adv = self.state.x_adv
        moved = norms(x_adv - audited.x, self.attack.norm) > 0
        misclassified = np.flatnonzero(~self.state.robust & moved)
        later = audited.logits(x_adv[misclassified], 2 * audited.T1).argmax(1)
        _, change = audited.trajectory(x_adv)
        self.state.measurements |= {
            "fallen": len(misclassified),
            "recovered": int((later == audited.y[misclassified]).sum()),
            "attacked_settled": float((change < CONVERGED).mean()),
        }

    def _margins(
        self,
        name: str,
        method: GradientMethod,
        eps: float,
        x: np.ndarray,
        y: np.ndarray,
        iters: int,
    ) -> np.ndarray:
        """The margins, (n,), that an attack reaches on some images within another eps."""
        generate = self.generator(method, name, eps, iters=iters)
        mbs = self.audited.mbs
        found = [x[:0]]
        for i in range(0, len(y), mbs):
            seed = (self.audited.seed, self.number, i)
            found.append(generate(x[i : i + mbs].copy(), y[i : i + mbs], seed)[0])
        return margins(self.audited.logits(np.concatenate(found)), y)


STAGES: dict[str, Callable[[Audit], None]] = {
    "a": Audit.clean,
    "b": Audit.descend,
    "c": Audit.ensemble,
    "d": Audit.without_gradients,
    "e": Audit.dynamics,
    "f": Audit.sanity,
}


def _settings_of(method: GradientMethod) -> dict[str, Any]:
    """The gradient method among an attack's settings in the result."""
    settings: dict[str, Any] = {"grad": method.grad, "steps": method.steps, "start": method.start}
    if method.gain != 1:
        settings["gain"] = method.gain
    if method.softness:
        settings["softness"] = [round(factor, 6) for factor in method.softness]
    return settings


def _strongest(reached: dict[str, np.ndarray], state: AuditState) -> str:
    """The attack with the smallest mean margin on the images that all of them were tried on; if
    none of these is left, the one that misclassified most."""
    if state.robust.any():

        def mean_margin(name: str) -> float:
            return np.nan_to_num(reached[name][state.robust], posinf=1e30).mean()

        return min(reached, key=mean_margin)
    return max(reached, key=lambda name: int((reached[name] <= 0).sum()))


def _doubled(eps: float, everything: float) -> Iterator[float]:
    """eps, 2 eps, 4 eps ... and finally `everything`, the largest distance of two images."""
    while eps < everything:
        yield eps
        eps *= 2
    yield everything
