"""Settings of an attack and of its gradient, without torch."""

from __future__ import annotations

import dataclasses

from ART_Timesteps_Addition.names import (
    ENSEMBLES,
    GRADIENTS,
    STARTS,
    STATES,
    WITH_QUERIES,
    WITHOUT_GRADIENT,
)


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and its budget.

    name        of `names.ATTACKS`
    norm, eps   "2" or "inf", and the largest norm of a perturbation, for images in [0, 1]
    iters       iterations
    queries     predictions per image, of Square, HopSkipJump and the ensembles; None: given by
                the iterations
    restarts    further runs from random points in the ball
    clip        whether images stay in [0, 1]
    """

    name: str = "pgd"
    norm: str = "2"
    eps: float = 1.0
    iters: int = 20
    queries: int | None = None
    restarts: int = 0
    clip: bool = True

    @property
    def ignores_iters(self) -> bool:
        """Whether the attack takes one step, or is bounded by its queries alone."""
        return self.name == "fgsm" or (self.name in WITHOUT_GRADIENT and bool(self.queries))

    @classmethod
    def with_defaults(
        cls,
        name: str,
        norm: str,
        eps: float,
        iters: int | None = None,
        queries: int | None = None,
        restarts: int = 0,
        clip: bool = True,
    ) -> Attack:
        """The attack with the default budget where `iters` or `queries` is None.

        Iterations: 20; 100 for an ensemble. Queries: 50 per iteration for an ensemble; 5000 for
        Square and HopSkipJump, unless `iters` is given."""
        if name not in WITH_QUERIES:
            queries = None
        elif queries is None and name in WITHOUT_GRADIENT and iters is None:
            queries = 5000
        iters = iters or (100 if name in ENSEMBLES else 20)
        if queries is None and name in ENSEMBLES:
            queries = 50 * iters
        return cls(name, norm, eps, iters, queries, restarts, clip)

    def describe(self) -> str:
        """The attack and its budget, one line.

        Tables record it among their settings: another wording would start another table."""
        restarts = f"; {self.restarts} restarts" if self.restarts else ""
        if self.name == "autoattack":
            return (
                f"one after another on the images that stand: APGD-CE {self.iters} iterations, "
                f"APGD-T (DLR) and FAB-T of at most 9 targets {self.iters} each, Square "
                f"{self.queries} queries{restarts}"
            )
        if self.name == "art-autoattack":
            return (
                f"ART's AutoAttack: APGD-CE and APGD-DLR {self.iters} iterations of 5 starts, "
                f"DeepFool {self.iters}, Square {self.queries} rounds of 5 starts{restarts}"
            )
        amount = f"{self.queries} queries" if self.queries else f"{self.iters} iterations"
        return f"{self.name} {amount}{restarts}"


@dataclasses.dataclass(frozen=True)
class GradientMethod:
    """How the gradient of a loss with respect to the image is computed.

    grad        `bptt`: back-propagation through time; `smooth`: the same with slopes that do not
                vanish; `ep`: by Equilibrium Propagation; `soft`: as `smooth`, through a softened
                copy whose neurons do not saturate
    steps       time steps that `bptt`, `smooth` and `soft` are unrolled through; of `ep` those of a
                nudged phase
    start       the unrolled steps begin from `zero` neurons or, with `equilibrium`, after T1 -
                steps free steps without a graph
    states      the read-out is that of the `last` unrolled step; with `all` it is the mean over the
                steps of log softmax, whose negative log-likelihood is the mean cross-entropy
    softness    factor on the drives of each layer in the copy of `soft`, see `gradients.softness`
    gain        factor on the logits that attacks see, see `scaling`
    tol         an image leaves the steps without a graph once it has converged to this; 0: never
    beta        nudging strength of `ep`
    rescale     whether `smooth` and `soft` may scale the gradient of each image, see `scaling`.
                Attacks divide the gradient of a loss by its length; class gradients must belong to
                the predicted values: False
    """

    grad: str = "bptt"
    steps: int = 29
    start: str = "zero"
    states: str = "last"
    softness: tuple[float, ...] = ()
    gain: float = 1.0
    tol: float = 0.0
    beta: float = 0.1
    rescale: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("grad", GRADIENTS), ("start", STARTS), ("states", STATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
