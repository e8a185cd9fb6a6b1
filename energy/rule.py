"""Settings of a learning rule (the rules are in `model_utils`), and its observer.

Without torch: the command line builds a `Rule` before torch is loaded."""

import contextlib
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


ALGORITHMS = ("EP", "CEP", "BPTT", "BP")
LOSSES = ("mse", "cel")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a model predicts (T1, tol, loss) and learns (all of them). Raises ValueError.

    alg          learning rule: `EP`, `CEP`, `BPTT` or `BP`
    T1           steps of the free phase
    T2           steps of a nudged phase; of BPTT: steps that gradients go back through
    betas        nudging strength in the free and in the nudged phase
    loss         `mse` or `cel` (cross-entropy)
    thirdphase   EP: a second nudged phase at -betas[1], which makes the estimate symmetric
    random_sign  draw the sign of betas[1] anew for every mini-batch
    tol          stop an image once it has converged to this; 0: take all T1 steps
    dropouts     probability of keeping a neuron, for each connection, the read-out's last; or None

    Only `experiment.training.Trainer` applies random_sign and dropouts: the functions of
    `model_utils.LEARN` take betas as they are, and dropout as masks.
    """

    alg: str = "EP"
    T1: int = 20
    T2: int = 4
    betas: tuple[float, float] = (0.0, 0.01)
    loss: str = "mse"
    thirdphase: bool = False
    random_sign: bool = False
    tol: float = 0.0
    dropouts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("alg", self.alg, ALGORITHMS), ("loss", self.loss, LOSSES)):
            if value not in allowed:
                expected = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        for name, steps in (("T1", self.T1), ("T2", self.T2)):
            if steps < 1:
                raise ValueError(f"{name} is {steps}, expected at least 1")
        if len(self.betas) != 2:
            raise ValueError(
                f"betas are {self.betas}, expected two: of the free and of the nudged phase"
            )


class Observer:
    """Observes a learning rule or a prediction at work; this one does nothing.

    `experiment.timing.Stopwatch` measures times and counts steps."""

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The block that follows is the part `name`: `free`, `nudged`, `update`, `BPTT` ..."""
        return contextlib.nullcontext()

    def count_steps(self, steps: "Tensor", converged: "Tensor") -> None:
        """A free phase ended early: steps of each image, (mbs,), and whether it has converged,
        (mbs,) bool."""


UNOBSERVED = Observer()
