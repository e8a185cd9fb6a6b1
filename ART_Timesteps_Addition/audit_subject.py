"""What an audit looks at, how much it may take, and what it has found so far."""

import argparse
import dataclasses
import typing

import numpy as np
import torch

from ART_Timesteps_Addition import attacks
from ART_Timesteps_Addition.measures import seeded
from data_utils import TASKS
from energy import fast
from energy.dynamics import Phase, relative_change


@dataclasses.dataclass(frozen=True)
class Budget:
    """iters: iterations of PGD; ensemble: of each attack of the standard ensemble; queries:
    predictions for each image, of Square; hops: of HopSkipJump; draws: random points in the ball;
    restarts: of the strongest PGD; sample: images that accuracy over eps is measured on."""

    iters: int = 20
    ensemble: int = 100
    queries: int = 5000
    hops: int = 500
    draws: int = 1000
    restarts: int = 3
    sample: int = 50


BUDGETS = {"standard": Budget(), "quick": Budget(10, 5, 150, 100, 50, 1, 20)}
GRADS, CALIBRATED = ("bptt", "smooth", "ep", "soft"), ("smooth", "ep", "soft")
ENDS_EARLY = 1e-3  # of predictions within attacks, where nothing else is asked for, see `relax_until_converged`
TINY = 1e-4
STILL = 0.05  # an image has settled, here, once a step moves no layer by more than this share of its norm


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is audited: model, its args (task, loss, T1, predict_step, mbs, seed, attack_norm,
    attack_step, eps, no_clip; tol: of the predictions that count), images x, (n, C, H, W) in [0,
    1], and labels y, (n,), NumPy arrays; budget: a `Budget`; fast_tol: where the predictions that
    attacks ask for end early; surrogate: another model's Subject, or None."""

    model: typing.Any
    args: typing.Any
    x: np.ndarray
    y: np.ndarray
    budget: Budget = Budget()
    fast_tol: float = ENDS_EARLY
    surrogate: typing.Any = None

    @property
    def task(self):
        """See `data_utils.TASKS`."""
        return TASKS[self.args.task]

    @torch.no_grad()
    def predict(self, x, T, tol):
        """The neurons that a prediction of x, (mbs, ...) as the model sees it, is read out of,
        after T steps; with `tol` after at most so many."""
        chain = self.model.chain(self.args.loss)
        return fast.from_zero(chain, Phase(chain.input_drive(x)), T, tol, output_in=0)[0]

    @property
    def grads(self):
        """Ways to a gradient that this model has."""
        return GRADS if self.model.has_dynamics else ("bptt", "smooth")

    @property
    def T1(self):
        """Time steps of a prediction."""
        return self.args.predict_step or self.args.T1

    @property
    def steps(self):
        """Numbers of time steps that gradients go through."""
        steps = self.args.attack_step
        return sorted(set(steps if isinstance(steps, (list, tuple)) else [steps]))

    def classifier(self, way=attacks.Way(), attack="pgd", eps=None, T=None, tol=None):
        """See `attacks.make_classifier`; its predictions after T steps (T1)."""
        args = argparse.Namespace(**{**vars(self.args), "attack": attack})
        tol = self.fast_tol if tol is None else tol
        return attacks.make_classifier(
            self.model,
            args,
            eps or args.eps,
            way,
            self.task,
            lambda x: self.predict(x, T or self.T1, tol),
        )

    def logits(self, x, T=None, salt=0):
        """What counts: the logits, (n, classes), after T steps (T1), not ended early but for the
        run's own tol."""
        judge, size = self.classifier(T=T, tol=self.args.tol), self.args.mbs
        with seeded(self.args.seed, salt):
            parts = [judge.read_out(x[i : i + size]) for i in range(0, len(x), size)]
        return (
            np.concatenate(parts) if parts else np.zeros((0, self.task.classes), dtype=np.float32)
        )

    def _drive(self, chain, x):
        """What images, (mbs, ...) in [0, 1], drive the first layer with."""
        seen, _ = self.classifier()._apply_preprocessing(x, y=None, fit=False)
        return chain.input_drive(torch.from_numpy(seen).to(next(self.model.parameters()).device))

    @torch.no_grad()
    def trajectory(self, x):
        """(predictions after 1 ... T1 steps, (T1, n); how far the last step moved each image,
        (n,))."""
        classes, moved, chain = [], [], self.model.chain(self.args.loss)
        for i in range(0, len(x), self.args.mbs):
            phase = Phase(self._drive(chain, x[i : i + self.args.mbs]))
            neurons, found = chain.zeros(phase.drive), []
            for t in range(self.T1):
                before, neurons = neurons, fast.relax(chain, phase, neurons if t else None, 1)
                found.append(chain.read(neurons).argmax(1).cpu().numpy())
            classes.append(np.stack(found))
            moved.append(relative_change(before, neurons).float().cpu().numpy())
        return np.concatenate(classes, 1), np.concatenate(moved)

    @torch.no_grad()
    def responds(self):
        """The share of images of which the first layer's drive notices a change of every pixel by
        about TINY: that of a rounded input does not, and no gradient of it means anything. (Neurons
        may rightly be saturated.)"""
        noticed, chain, dtype = (
            [],
            self.model.chain(self.args.loss),
            next(self.model.parameters()).dtype,
        )
        tiny = TINY if dtype != torch.bfloat16 else 100 * TINY
        with seeded(self.args.seed):
            noise = (
                np.random.default_rng(0).uniform(tiny / 2, tiny, self.x.shape).astype(np.float32)
            )
            for i in range(0, len(self.x), self.args.mbs):
                rows, states = slice(i, i + self.args.mbs), []
                for x in (
                    self.x[rows],
                    np.where(self.x[rows] > 0.5, -1, 1) * noise[rows] + self.x[rows],
                ):
                    states.append(self._drive(chain, x.astype(np.float32)).flatten(1))
                noticed += (states[0] != states[1]).any(1).tolist()
        return float(np.mean(noticed))

    def calibrated(self, way, eps=None):
        """The way with the gain and softness that suit the model."""
        if way.grad not in CALIBRATED:
            return way
        return attacks.calibrated(way, self.classifier(way, eps=eps), self.x[:100])


class State:
    """What an audit has found so far. x_adv: the strongest image of each; margin: of its logits,
    above 0 where the image stands; attacks: what ran, as the result lists it; facts: the numbers
    that checks and figures need."""

    def __init__(self, x, margin, attacks=(), facts=None):
        self.x_adv, self.margin, self.attacks, self.facts = (
            x.copy(),
            margin.copy(),
            list(attacks),
            dict(facts or {}),
        )

    @property
    def standing(self):
        return self.margin > 0

    def arrays(self):
        """(arrays, a dict that JSON can say), for `of`."""
        return {"x_adv": self.x_adv, "margin": self.margin}, {
            "attacks": self.attacks,
            "facts": self.facts,
        }

    @classmethod
    def of(cls, arrays, record):
        """The state that `arrays` gave."""
        return cls(arrays["x_adv"], arrays["margin"], **record)
