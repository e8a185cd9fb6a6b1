"""Energy models, the rules they learn by, and the loops over a data set.

A model is a chain of connections (`energy.connections`) with one dynamics (`energy.dynamics`) and
one local update; the four public classes only assemble it. The rules are in `learning`,
feed-forward networks in `baselines`."""

import copy
import dataclasses
import functools
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
from ART_Timesteps_Addition.adversary import Adversary
from data_utils import TASKS, UserError, one_line, to_device
from energy import fast
from energy.activations import ACTIVATIONS, ctrd_hard_sig, hard_sigmoid, my_hard_sig, my_sigmoid  # noqa: F401
from energy.connections import Dense, convolution, set_grad
from energy.dynamics import Chain, Phase, relative_change  # noqa: F401
from energy.gdu import check_gdu, compare_gdu, gdu_report  # noqa: F401
from energy.poolings import POOLS, make_pools  # noqa: F401
from energy.precision import exactly, set_precision  # noqa: F401
from experiment import records
from experiment.arguments import resolve
from experiment.checks import check
from experiment.console import memory_limit
from experiment.flags import ATTACK_STEP
from experiment.health import Health, log_theorem, report_precision
from experiment.prediction import (  # noqa: F401
    Convergence,
    characteristic,
    correct,
    evaluate,
    free_phase,
    judgements,
    predicting_neurons,
    predictions,
    relaxation,
)
from experiment.report import epoch_line, epoch_row
from experiment.runs.checkpoint import load_weights, open_saved
from experiment.runs.history import History, resumable_state, snapshot
from experiment.timing import Stopwatch, progress
from experiment.workers import Workers
from learning import (  # noqa: F401
    EMPTY,
    LEARN,
    Rule,
    bp_gradients,
    bptt_gradients,
    cep_updates,
    ep_gradients,
    gradient_step,
    loss_name,
    readout_loss,
)

# ------------------------------------------------------------------------------------------- models


class EnergyModel(nn.Module):
    """A chain of connections with one dynamics and one local update.

    synapses      ModuleList of every forward Conv2d and Linear, the read-out last where `softmax`
    B_syn         ModuleList of the separate backward weights (vector-field models; empty otherwise)
    connections   one per layer of neurons s_1 ... s_N
    output        the connection that reads out s_N, where `softmax`: its other end is no neuron
    softmax       whether the output is read out of s_N by a linear layer, with the cross-entropy acting on its logits
    same_update   vector-field models: whether both weights of a connection take the mean of their two gradients
    schedule, compiled   see `energy.dynamics.Chain`
    moves         that there are time steps: a feed-forward network of `baselines` has none
    """

    moves = True

    def __init__(
        self,
        synapses,
        B_syn,
        connections,
        activation,
        *,
        softmax=False,
        same_update=False,
        pools=(),
        schedule="sync",
    ):
        super().__init__()
        self.synapses, self.B_syn, self.pools = (
            nn.ModuleList(synapses),
            nn.ModuleList(B_syn),
            nn.ModuleList(pools),
        )
        self.connections, self.activation = tuple(connections), activation
        self.output = Dense(self.synapses[-1], connections[-1].post_shape) if softmax else None
        self.softmax, self.same_update, self.schedule, self.compiled = (
            softmax,
            same_update,
            schedule,
            False,
        )
        self.nc = self.synapses[-1].out_features
        # Convolutions and poolings run faster in this layout, on CPU and GPU alike; it changes no
        # value.
        self.to(memory_format=torch.channels_last)

    # ---- the state, and the loss that nudges

    def chain(self, loss="mse", masks=None):
        """What moves under that loss: the `Chain` of this model. masks: of dropout, see
        `draw_masks`."""
        chain = Chain(
            self.connections,
            self.activation,
            self.output,
            not self.softmax and loss != "mse",
            self.schedule,
            self.compiled,
        )
        return (
            chain
            if masks is None
            else chain.masked([m if m is None else m.to(chain.dtype) for m in masks])
        )

    def phase(self, drive, y, beta, loss):
        """The `Phase` of a mini-batch: drive of its images; y: class indices (mbs,), may be None at
        beta 0. Raises ValueError."""
        if not torch.is_tensor(beta) and beta == 0:
            return Phase(drive)
        if y is None:
            raise ValueError("labels are needed to nudge: y is None but beta is not 0")
        return Phase(drive, F.one_hot(y, self.nc).to(drive.dtype), beta, loss)

    def init_neurons(self, mbs, device):
        """Zero neurons: a list of N tensors (mbs, *shape of the layer)."""
        return self.chain().zeros(
            torch.empty(mbs, 0, device=device, dtype=self.synapses[0].weight.dtype)
        )

    def readout(self, neurons):
        """(mbs, classes): the logits where `softmax`, the output neurons otherwise."""
        return self.chain().read(neurons)

    def loss(self, neurons, y, criterion):
        """L of each sample, (mbs,): see `readout_loss`. `criterion`: a loss of PyTorch, or its name
        here, `mse` or `cel`."""
        return readout_loss(self.readout(neurons), y, loss_name(criterion))

    def Phi(self, x, y, neurons, beta, criterion):
        """The primitive function of each sample, (mbs,); for vector-field models a list of one
        (mbs,) per layer, whose entry n holds the terms that drive s_n. Differentiable; for reading
        and testing, no step or update needs it."""
        layers, phis = [x.to(neurons[0].dtype), *neurons], []
        for n, c in enumerate(self.connections):
            forward, *backward = c.terms(layers[n], neurons[n])
            phis.append(forward)
            if backward:
                phis[n - 1] = phis[n - 1] + backward[0]
        if beta != 0:
            phis[-1] = phis[-1] - beta * self.loss(neurons, y, criterion)
        return phis if len(self.B_syn) else sum(phis)

    def forward(
        self,
        x,
        y=None,
        neurons=None,
        T=None,
        beta=0.0,
        criterion=nn.MSELoss(reduction="none"),
        check_thm=False,
        output_in=None,
    ):
        """The neurons after T steps from `neurons` (from zero if None): a list of N tensors.

        x: (mbs, ...); y: class indices (mbs,), may be None at beta 0. `check_thm` keeps the graph
        through the T steps (for BPTT, attacks and gducheck); without it nothing is recorded,
        whatever the caller's grad mode is. output_in: k where only s_N is wanted, k steps after
        these: layers that do not reach it are left as of an earlier step. Raises ValueError without
        T."""
        if T is None:
            raise ValueError("T, the number of time steps, is needed: model(x, T=20)")
        loss = loss_name(criterion)
        chain = self.chain(loss)
        with torch.set_grad_enabled(check_thm):
            return fast.relax(
                chain, self.phase(chain.input_drive(x), y, beta, loss), neurons, T, output_in
            )

    # ---- the local update

    @torch.no_grad()
    def compute_syn_grads(
        self,
        x,
        y,
        neurons_1,
        neurons_2,
        betas,
        criterion,
        check_thm=False,
        neurons_3=None,
        masks=None,
    ):
        """The EP update, into p.grad of every parameter (what was there is replaced):

            p.grad = [dPhi(s_2, beta_2)/dp - dPhi(s_1, beta_1)/dp] / (beta_1 - beta_2),   Phi averaged over the batch,

        the estimate of dL/dp. One-sided: neurons (free, nudged), betas (0, beta). Symmetric:
        (nudged at +beta, nudged at -beta), betas (beta, -beta); vector-field models without
        `same_update` also need the free state then: (free, +beta, -beta) as neurons 1, 2 and 3.
        There layer n's term pairs s_n, nudged, with the free state of its neighbours. `check_thm`:
        the two states are successive ones of a nudged phase, so that both Phi are taken at beta_2,
        and the update is that step's share of the whole (gducheck). masks: of dropout. Raises
        ValueError for an empty mini-batch."""
        if not len(x):
            raise ValueError(EMPTY)
        loss, (beta_1, beta_2) = loss_name(criterion), betas
        chain, scale = (
            fast.suited(self.chain(loss, masks), len(x)),
            1.0 / ((beta_1 - beta_2) * len(x)),
        )
        x = x.to(chain.dtype)
        first, second = (neurons_2, neurons_3) if neurons_3 is not None else (neurons_1, neurons_2)
        free, one, two = [x, *neurons_1], [x, *first], [x, *second]
        paired = (
            not len(self.B_syn) or self.same_update
        )  # both ends of a connection in the same state
        for n, c in enumerate(chain.connections):
            below = (one[n], two[n]) if paired else (free[n], free[n])
            weight, bias = _contrast(c.learn, below, (one[n + 1], two[n + 1]), scale)
            if c.feedback is not None:
                above = (one[n + 1], two[n + 1]) if paired else (free[n + 1], free[n + 1])
                (feedback,) = _contrast(c.learn_feedback, (one[n], two[n]), above, scale)
                if self.same_update:
                    weight = (weight + feedback) / 2
                    feedback = weight.clone()
                c.set_feedback_grad(feedback)
            set_grad(c.synapse.weight, weight)
            set_grad(c.synapse.bias, bias)
        if self.softmax:
            states = ((one, beta_2 if check_thm else beta_1), (two, -beta_2))
            self._readout_update(
                chain, y, [(state[1:], beta * scale) for state, beta in states if beta != 0]
            )

    def _readout_update(self, chain, y, states):
        """The update of the read-out, which L reaches at once. states: [(neurons, factor of
        dL/d(read-out))], those that nudge."""
        grads = []
        for neurons, factor in states:
            phase = self.phase(neurons[0], y, 1.0, "cel")
            grads.append(
                chain.readout.learn(neurons[-1], factor * phase.slope(chain.read(neurons)))
            )
        for p, grad in zip((chain.readout.synapse.weight, chain.readout.synapse.bias), zip(*grads)):
            set_grad(p, sum(grad))

    # ---- reading

    def rated(self):
        """[(the number of the layer whose rates count, parameters)], see `make_optimizer`."""
        modules = [*enumerate(self.synapses), *enumerate(self.B_syn, 1)]
        return [(n, list(module.parameters())) for n, module in modules]

    @torch.no_grad()
    def angles(self):
        """Degrees between the forward and the backward weights of each connection that has both."""
        pairs = [
            (c.synapse.weight, c.down_weight()) for c in self.connections if c.feedback is not None
        ]
        cosines = [
            F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1) for a, b in pairs
        ]
        return [torch.rad2deg(torch.acos(c)).item() for c in cosines]


def _contrast(learn, below, above, scale):
    """scale * (what is learnt in the second state less what is in the first), which is linear in
    the layer above."""
    if below[0] is below[1]:
        return learn(below[0], (above[1] - above[0]) * scale)
    minus, plus = learn(below[0], above[0] * -scale), learn(below[1], above[1] * scale)
    return [a.add_(b) for a, b in zip(plus, minus)]


def _dense_chain(archi, feedback):
    if len(archi) < 2:
        raise ValueError("an MLP needs at least an input and an output size")
    synapses = [nn.Linear(a, b) for a, b in zip(archi, archi[1:])]
    B_syn = [nn.Linear(b, a, bias=False) for a, b in zip(archi[1:], archi[2:])] if feedback else []
    return synapses, B_syn


class P_MLP(EnergyModel):
    """Dense layers with tied weights. archi: sizes of all layers, the input's first."""

    def __init__(self, archi, activation, softmax=False, schedule="sync"):
        synapses, _ = _dense_chain(archi, False)
        connections = [Dense(s, (a,)) for s, a in zip(synapses, archi)]
        super().__init__(
            synapses,
            [],
            connections[:-1] if softmax else connections,
            activation,
            softmax=softmax,
            schedule=schedule,
        )


class VF_MLP(EnergyModel):
    """Dense layers with separate backward weights `B_syn`, of shape (pre, post)."""

    def __init__(self, archi, activation, softmax=False, same_update=False, schedule="sync"):
        synapses, B_syn = _dense_chain(archi, True)
        if softmax:
            B_syn.pop()
        connections = [
            Dense(s, (a,), b, transposed=True)
            for s, a, b in zip(synapses, archi, [None, *B_syn, None])
        ]
        super().__init__(
            synapses,
            B_syn,
            connections[:-1] if softmax else connections,
            activation,
            softmax=softmax,
            same_update=same_update,
            schedule=schedule,
        )


class _CNN(EnergyModel):
    """Convolutions, each followed by a pooling, then dense layers. separate: with backward weights
    of their own."""

    separate = False

    def __init__(
        self,
        in_size,
        channels,
        kernels,
        strides,
        fc,
        pools,
        paddings,
        activation,
        softmax=False,
        same_update=False,
        schedule="sync",
    ):
        if (
            not len(channels) - 1 == len(kernels) == len(strides) == len(pools) == len(paddings) > 0
            or not fc
        ):
            raise ValueError(
                "kernels, strides, pools and paddings need one entry per convolution, channels one more, "
                "fc at least one"
            )
        synapses, B_syn, connections, shape = [], [], [], (channels[0], in_size, in_size)
        for i, out in enumerate(channels[1:]):
            geometry = (channels[i], out, kernels[i], strides[i], paddings[i])
            synapses.append(nn.Conv2d(*geometry))
            if self.separate and i > 0:
                B_syn.append(nn.Conv2d(*geometry, bias=False))
            try:
                feedback = B_syn[-1] if self.separate and i > 0 else None
                connections.append(convolution(synapses[-1], pools[i], shape, feedback))
            except ValueError as e:
                raise ValueError(f"layer {i + 1}: {e}") from None
            shape = connections[-1].post_shape
        for i, out in enumerate(fc):
            synapses.append(nn.Linear(math.prod(shape), out))
            if softmax and i == len(fc) - 1:
                break
            if self.separate:
                B_syn.append(nn.Linear(math.prod(shape), out, bias=False))
            connections.append(Dense(synapses[-1], shape, B_syn[-1] if self.separate else None))
            shape = connections[-1].post_shape
        super().__init__(
            synapses,
            B_syn,
            connections,
            activation,
            softmax=softmax,
            same_update=same_update,
            pools=pools,
            schedule=schedule,
        )


class P_CNN(_CNN):
    """Convolutions, each followed by a pooling, then dense layers, with tied weights (`same_update`
    has no effect).

    in_size: height and width of the (square) images; channels: of all maps, the input's first; fc:
    sizes of the dense layers, the last one the number of classes; pools: see `make_pools`. Raises
    ValueError, naming the layer, where nothing is left of a map."""


class VF_CNN(_CNN):
    """As P_CNN, with separate backward weights `B_syn` for every connection but the first (and the
    read-out)."""

    separate = True


# ---------------------------------------------------------------------------- models from arguments


def make_model(args):
    """The model that the command line's arguments describe, with initial weights scaled by
    args.scale."""
    task, act, options = (
        TASKS[args.task],
        ACTIVATIONS[args.act],
        {"softmax": args.softmax, "schedule": args.schedule},
    )
    if args.model.startswith("VF"):
        options["same_update"] = args.same_update
    if args.model in baselines.KINDS:
        model = baselines.make_network(args)
    elif args.model in ("MLP", "VFMLP"):
        model = {"MLP": P_MLP, "VFMLP": VF_MLP}[args.model](args.archi, act, **options)
    else:
        geometry = (
            task.size,
            [task.channels, *args.channels],
            args.kernels,
            args.strides,
            args.fc,
            make_pools(args.pools),
            args.paddings,
        )
        model = {"CNN": P_CNN, "VFCNN": VF_CNN}[args.model](*geometry, act, **options)
    if args.scale is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(args.scale)
    return model


def build(args):
    """`make_model`, once its weights are known to fit into memory. Raises UserError where it cannot
    be built."""
    try:
        with torch.device("meta"):
            weights = sum(p.numel() for p in make_model(args).parameters())
    except (
        ValueError,
        RuntimeError,
        OverflowError,
        TypeError,
    ) as e:  # TypeError: a size beyond 64 bits
        raise UserError(f"the model cannot be built: {one_line(e)[:300]}") from None
    memory = memory_limit()
    if 4 * weights > memory:
        sizes = [f"{size / 2**30:,.1f} GiB" for size in (4 * weights, memory)]
        raise UserError(
            f"the model cannot be built: {weights:,} weights take {sizes[0]}, this machine or container "
            f"has {sizes[1]}; fewer or smaller layers (--archi, --channels, --fc) need less"
        )
    return make_model(args)


def make_criterion(loss):
    """PyTorch's loss of that name (`mse` or `cel`), one value per sample and entry."""
    return {"mse": nn.MSELoss, "cel": nn.CrossEntropyLoss}[loss](reduction="none")


def make_optimizer(model, args):
    """The optimizer, with a parameter group per layer (backward weights take the rates of their
    forward twin), and the scheduler, or None. args: optim, lrs, wds, mmt, lr_decay, lr_step."""
    layers = model.rated()
    lrs = args.lrs or [0.01 if args.optim == "sgd" else 5e-4] * len(layers)
    wds = args.wds or [0.0] * len(layers)
    groups = [
        {"params": parameters, "lr": lrs[n], "weight_decay": wds[n]} for n, parameters in layers
    ]
    if args.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lrs[0], momentum=args.mmt, fused=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=lrs[0], fused=True)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-5)
        if args.lr_decay
        else None
    )
    if getattr(args, "lr_step", None):
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer, int(args.lr_step[0]), args.lr_step[1]
        )
    return optimizer, scheduler


def draw_masks(model, keep, mbs, part=slice(None)):
    """Masks of dropout, drawn anew for each of mbs samples: 0 with probability 1 - keep, else 1 /
    keep. Drawn on the CPU, for the whole mini-batch, so that they are the same on every device and
    for any number of workers, which keep their own `part` of it. keep: a number in (0, 1] for each
    connection, the read-out being the last."""
    weight, connections = (
        model.synapses[0].weight,
        [*model.connections, *([model.output] if model.softmax else [])],
    )
    masks = [
        None if p == 1 else (torch.rand(mbs, *c.pre_shape)[part] < p) / p
        for c, p in zip(connections, keep)
    ]
    masks = [m if m is None else to_device(m.to(weight.dtype), weight.device) for m in masks]
    return [
        m.contiguous(memory_format=torch.channels_last) if m is not None and m.dim() == 4 else m
        for m in masks
    ]


def lowered(model, dtype):
    """A copy of the model in another precision, for the time steps."""
    return copy.deepcopy(model).to(dtype)


@torch.no_grad()
def refresh(twin, model):
    """Gives the twin of `lowered` the model's present weights."""
    torch._foreach_copy_(list(twin.parameters()), list(model.parameters()))


# ----------------------------------------------------------------------------------------- training


@dataclasses.dataclass
class Trainer:
    """Trains a model: what stays the same from mini-batch to mini-batch and from epoch to epoch.

    args: of the command line, to be written down; run: the `RunFolder` to write to after every
    epoch, or None; story: of the epochs until now; workers: those that share every mini-batch,
    whose updates are those of one; last: the number of the last epoch, None for args.epochs after
    those of the story."""

    model: EnergyModel
    optimizer: torch.optim.Optimizer
    args: object
    scheduler: object = None
    run: object = None
    story: History = dataclasses.field(default_factory=History)
    workers: Workers = dataclasses.field(default_factory=Workers)
    last: int | None = None

    EVERY = 10  # mini-batches between two looks at what the device has computed, which wait for it
    DRAW = (
        5  # seconds between two drawings of the figures, which can take longer than a short epoch
    )

    def __post_init__(self):
        self.rule, self.total, self.drawn, self.said = (
            Rule.of(self.args),
            Stopwatch(),
            time.monotonic(),
            set(),
        )
        self.adversary = Adversary.of(self.args, next(self.model.parameters()).device)
        self.twin = lowered(self.model, torch.bfloat16) if self.args.precision == "bf16" else None

    def fit(self, train_batches, test_batches, val_batches=None):
        """Trains up to the last epoch. The best model is chosen on `val_batches`, or without
        them on the test images. Raises RunFailed when something is not finite."""
        if self.story.best_accuracy is None:
            self.story.best_accuracy = _accuracy_of_best(self, val_batches or test_batches)
        if self.adversary:
            print(self.adversary.words(self.model.moves), flush=True)
        if self.args.precision != "fp32":
            report_precision(self, train_batches)
        history = self.story.epochs
        last = self.last or len(history) + self.args.epochs
        while len(history) < last:
            epoch, start = len(history) + 1, time.perf_counter()
            stopwatch = Stopwatch(next(self.model.parameters()).device)
            health = Health(
                self.model, self.rule, self.optimizer, epoch, self.twin, self.args.precision
            )
            train_acc, neurons = self._epoch(train_batches, epoch, stopwatch, health)
            if self.scheduler is not None and self.scheduler.last_epoch < getattr(
                self.scheduler, "T_max", math.inf
            ):
                self.scheduler.step()  # beyond T_max the rates would rise again
            spent = time.perf_counter() - start
            with stopwatch.part("evaluation"):
                accuracies, convergence = self._evaluated(test_batches, val_batches)
            stopwatch.settling.gather(self.workers)
            row = epoch_row(
                epoch,
                {"train_acc": train_acc, **accuracies},
                time.perf_counter() - start,
                convergence,
                stopwatch.settling,
                self.model.angles(),
            )
            self._commit(row, epoch == last, train_batches.generator)
            self.total.add(stopwatch)
            line = epoch_line(row, train_batches.samples / spent, stopwatch.settling)
            print(f"epoch {epoch}/{last}: {line}", flush=True)
            health.report(neurons, self.said, convergence)
            self._draw(neurons, epoch == last)
        print(f"time: {self.total.shares()}", flush=True)

    def _epoch(self, batches, epoch, stopwatch, health):
        """One pass over the data. Returns the accuracy (a share) of the free phases on the way, and
        the last batch's neurons, of several workers those of this one's share."""
        hits, seen, tenth = 0, 0, -(-len(batches) // 10)
        bar = progress(stopwatch.iterate(batches, "data"), f"epoch {epoch}", len(batches))
        for batch, (x, y) in enumerate(bar, 1):
            if (
                self.workers.rank == 0
                and self.args.check_thm
                and self.rule.alg == "EP"
                and (batch - 1) % tenth == 0
            ):
                log_theorem(self, x[:5], y[:5], epoch, batch)
            if batch == 1:
                health.examine(x, y)
            neurons, right, n_local = self.gradients(x, y, stopwatch)
            with torch.no_grad(), stopwatch.part("update"):
                hits, seen = hits + right * min(n_local, 1), seen + n_local
                self.optimizer.step()
                if self.twin:
                    refresh(self.twin, self.model)
                health.watch(neurons, batch)
                if batch == len(batches):
                    hits, seen = self.workers.sum(hits), batches.samples
                if batch % self.EVERY == 0 or batch == len(batches):
                    right = health.check(neurons, hits)
                    bar.set_postfix_str(f"train {100 * right / max(seen, 1):.2f} %", refresh=False)
        return right / batches.samples, neurons

    def gradients(self, x, y, stopwatch=None):
        """Fills p.grad from one mini-batch by the rule; CEP changes the weights as well. Of several
        workers each takes a share, and p.grad becomes the mean. Returns the neurons of the free
        phase, how many samples they classify correctly (a tensor without dimensions), both of this
        worker's share, and how many samples that is."""
        n, (part, n_local) = len(y), self.workers.shard(len(y))
        start = (
            self.adversary and self.adversary.draw(x.shape)[part]
        )  # for any number of workers the same
        x, y, rule, stopwatch = (
            x[part],
            y[part],
            self.rule,
            (stopwatch if n_local else None) or Stopwatch(),
        )
        if self.adversary:
            with stopwatch.part("attack"):
                x = self.adversary.attack(self.model, x, y, start)
        masks = draw_masks(self.model, rule.dropouts, n, part) if rule.dropouts else None
        if rule.random_sign and torch.rand(()) < 0.5:
            rule = dataclasses.replace(rule, betas=(rule.betas[0], -rule.betas[1]))
        average = functools.partial(self.workers.average_gradients, self.model, n_local, n)

        def change(share):
            average()
            gradient_step(self.optimizer, share)

        if rule.alg == "CEP":
            neurons = cep_updates(self.model, x, y, rule, change, masks, stopwatch)
        else:
            with self.workers.sharing_statistics(self.model, n_local, n):
                neurons = LEARN[rule.alg](self.model, x, y, rule, masks, self.twin, stopwatch)
            with stopwatch.part("update"):
                average()
        return neurons, correct(self.model.chain(rule.loss, masks), neurons, y), n_local

    def _evaluated(self, test_batches, val_batches):
        """({column of metrics.csv: accuracy, a share}, the `Convergence` on the images that the
        model is chosen on; None of a model without time steps)"""
        accuracies, chosen_on = {}, val_batches or test_batches
        convergence = Convergence(self.model, self.rule.T1) if self.model.moves else None
        for name, batches in (("test_acc", test_batches), ("val_acc", val_batches)):
            if batches:
                accuracies[name] = evaluate(
                    self.twin or self.model,
                    batches,
                    self.rule,
                    workers=self.workers,
                    convergence=convergence if batches is chosen_on else None,
                )
        return accuracies, convergence

    def _commit(self, row, final, generator):
        """Appends an epoch to the history, and writes it to the run folder."""
        story, accuracy = self.story, row.get("val_acc", row["test_acc"])
        improved, committed = accuracy > story.best_accuracy, [*story.epochs, row]
        story.best_accuracy = max(story.best_accuracy, accuracy)
        if self.run:
            state = snapshot(self.model, self.args, dataclasses.replace(story, epochs=committed))
            story.best = copy.deepcopy(state) if improved else story.best
            resumable = resumable_state(story, self.optimizer, self.scheduler, generator)
            self.run.commit(state, resumable, improved, final)
        story.epochs.append(row)

    def _draw(self, neurons, final):
        """Draws the figures of the run, of a long training now and then. neurons: of the last
        mini-batch."""
        if self.run and (final or time.monotonic() - self.drawn > self.DRAW):
            records.draw_training(self.run, self.model, self.args, self.story, neurons)
            self.drawn = time.monotonic()


def _accuracy_of_best(trainer, batches):
    """That of the best model until now, in %, on other images than it was chosen on; -1 where it is
    not known."""
    if trainer.story.best is None:
        return -1.0
    best = copy.deepcopy(trainer.model)
    best.load_state_dict(trainer.story.best["model_state_dict"])
    return round(100 * evaluate(best, batches, trainer.rule, workers=trainer.workers), 4)


def train(model, optimizer, train_batches, test_batches, args, val_batches=None, **more):
    """Trains for args.epochs epochs. args: those of the command line (alg, T1, T2, betas, ...,
    loss, precision, epochs); val_batches: to choose the best model on; more: see `Trainer`. Raises
    RunFailed when neurons or weights stop being finite."""
    Trainer(model, optimizer, args, **more).fit(train_batches, test_batches, val_batches)


def attack(model, images, labels, args, eps, description="", workers=Workers()):
    """Attacks every image (uint8 (n, C, H, W) and labels, tensors) at one eps, with each of
    args.attack_grad through each of args.attack_step.

    Returns {gradient: result, ..., "worst": result}, see `ART_Timesteps_Addition.attacks.summary`;
    `worst`, which takes for each image the strongest of all, is left out where there is one
    gradient. An attack that asks for none has one result, by its own name. args: task, loss, T1,
    predict_step, tol, mbs, seed and those of the attack. Memory is that of one mini-batch. Each of
    `workers` takes a whole mini-batch whenever it is free, and all get the results. What an attack
    draws follows from args.seed and the place of the mini-batch: it is the same for every eps and
    gradient, for any number of workers, and wherever a sweep goes on."""
    from ART_Timesteps_Addition import attacks

    x, labels, results, plan = (
        (images.float() / 255).cpu().numpy(),
        labels.cpu(),
        {},
        attacks.Plan.of(args, eps),
    )
    rule = Rule(T1=args.predict_step or args.T1, loss=args.loss, tol=args.tol)
    for label, classifier in attacks.classifiers(
        model,
        args,
        eps,
        TASKS[args.task],
        x,
        functools.partial(predicting_neurons, model, rule=rule),
    ).items():
        hops = plan.name == "hopskipjump" and eps
        candidates = attacks.Candidates.of(classifier, x) if hops else None
        starts = workers.deal(
            progress(range(0, max(len(x), 1), args.mbs), f"{description}, {label}")
        )
        parts = [
            (
                place,
                attacks.attack_batch(
                    classifier,
                    x[i : i + args.mbs],
                    labels[i : i + args.mbs].numpy(),
                    plan,
                    (args.seed, i),
                    candidates,
                ),
            )
            for place, i in starts
        ]
        results[label] = attacks.summary(workers.gather_dealt(parts), x, plan.norm)
    if len(results) > 1:
        results["worst"] = attacks.worst_of(list(results.values()), x, plan.norm)
    return results


class Run:
    """A saved run, to use from Python. model: on `device`; args: all its arguments, a namespace;
    source: what was loaded and how that model was chosen, in words."""

    def __init__(self, saved, device):
        self.args, self.source, self.device = (
            resolve({"todo": "evaluate"}, saved.args),
            saved.source,
            device,
        )
        check(self.args)
        self.model = build(self.args)
        load_weights(self.model, saved)
        self.model.to(device)
        task = TASKS[self.args.task]
        self._shape, self._classes = (task.channels, task.size, task.size), task.classes
        self._mean, self._std = (torch.tensor(v).view(-1, 1, 1) for v in (task.mean, task.std))

    def predict(self, images):
        """The class of each image, int64 (n,), on the CPU, after the run's T1 steps. images: (n, C,
        H, W), a tensor or an array, uint8 or numbers in [0, 1]; the normalisation is part of this.
        Raises ValueError for others."""
        images = torch.as_tensor(images).cpu()
        if images.shape[1:] != self._shape:
            raise ValueError(
                f"images are {tuple(images.shape)}, expected (n, {str(self._shape)[1:]}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, expected uint8, or numbers in [0, 1]")
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        if len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images range from {images.min():g} to {images.max():g}, expected numbers in [0, 1]"
            )
        rule, chain = Rule.of(self.args), self.model.chain(self.args.loss)
        parts = [
            ((x - self._mean) / self._std).to(self.device) for x in images.split(self.args.mbs)
        ]
        return torch.cat(
            [chain.read(predicting_neurons(self.model, x, rule)).argmax(1).cpu() for x in parts]
        )

    def classifier(self, **overrides):
        """ART's classifier of the model: images in [0, 1], normalised inside; predictions after T1
        steps, gradients through T2, by default the smaller of 29 and T1. overrides: arguments of
        `ART_Timesteps_Addition.pytorch.PyTorchClassifier` that take the place of the run's, T1, T2
        and grad say."""
        from ART_Timesteps_Addition.pytorch import PyTorchClassifier

        T1 = overrides.get("T1", self.args.T1)
        options = {
            "loss": nn.CrossEntropyLoss(),
            "criterion": make_criterion(self.args.loss),
            "T1": T1,
            "T2": min(ATTACK_STEP, T1),
            "input_shape": self._shape,
            "nb_classes": self._classes,
            "clip_values": (0.0, 1.0),
            "preprocessing": (self._mean.numpy(), self._std.numpy()),
            "device_type": "cpu" if self.device.type == "cpu" else "gpu",
        }
        with torch.cuda.device_of(
            next(self.model.parameters())
        ):  # or else ART moves the model to the current GPU
            return PyTorchClassifier(self.model, **{**options, **overrides})


def load_run(path, device=None):
    """The `Run` in a run folder, its best model, or in one of its files. device: the GPU where
    there is one, if None. Raises UserError where nothing can be loaded."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Run(open_saved(path, "evaluate"), torch.device(device))
