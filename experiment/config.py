"""Typed configuration: every flag is a field of one of these frozen dataclasses.

A field states its flag once: name, type, default, help, range, where it has an effect and what a
saved run does to it. The parser and `--help` (`experiment.command_line`), config.json,
docs/flags.md and the settings that identify a result are generated from the fields.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ART_Timesteps_Addition import settings
from ART_Timesteps_Addition.names import (
    ATTACKS,
    BUDGETS,
    GRADIENTS,
    NORMS,
    STARTS,
    WITHOUT_GRADIENT,
)
from data_utils import TASKS
from energy.names import ACTIVATIONS, POOLINGS
from energy.rule import ALGORITHMS, LOSSES, Rule
from experiment.text import format_eps

# Scopes: what a saved run does to a flag.
SAVED = ""  # the saved value counts unless the flag is given
ARCHITECTURE = "architecture"  # the saved value counts, whatever is given
TRAINING = "training"  # the saved value counts when the training resumes
RESUMED = "resumed"  # as SAVED when the training resumes, otherwise as SESSION
SESSION = "session"  # of one call: never taken from the saved run

TODOS = (
    "train",
    "evaluate",
    "attack",
    "gducheck",
    "characteristic",
    "corruptions",
    "audit",
    "compare",
    "study",
)
STUDY = ("train", "evaluate", "attack", "audit", "compare")  # what a study does
ROBUSTNESS = ("attack", "audit")
GRADIENTS_OF_WEIGHTS = ("train", "gducheck")
# gducheck takes every step in fp32, of one mini-batch
NOT_GDUCHECK = tuple(todo for todo in TODOS if todo not in ("gducheck", "compare", "study"))

ENERGY_MODELS = ("MLP", "VFMLP", "CNN", "VFCNN")
FEED_FORWARD = ("FFMLP", "FFCNN", "ViT")
DENSE = ("MLP", "VFMLP", "FFMLP")
CONVOLUTIONAL = ("CNN", "VFCNN", "FFCNN")
UNTIED = ("VFMLP", "VFCNN")  # with untied feedback weights
TRANSFORMERS = ("ViT",)

# Gradient methods of --attack-grad that need time steps
GRADIENTS_OF_STEPS = ("ep", "soft")
ATTACK_STEP = 29  # the largest default of --attack-step: that of the published tables

LEAST_EPS = 1e-9  # range of eps other than 0; images are float32 in [0, 1]
MOST_EPS = 1e9
LARGEST = 10**9  # of whole numbers: beyond anything that could run


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag, as its field states it.

    kind: bool (a switch), int, float or str; many: whether it takes several values, or_one: and a
    single one stays one; default: as config.json has it (a list where many).
    low, high: range of numbers; least: the smallest number other than 0; choices: allowed words.
    scope: see above. todos, models, rules: where it has an effect, everywhere if None; a study
    takes the flags of what it does.
    place: whether it names a folder of data. repeats: whether runs that differ only in it are
    repetitions of one experiment.
    recorded_later: whether models of versions without the flag are those of its default.
    shown_default: the default as text, if it depends on other flags.
    """

    name: str
    section: str
    field: str
    kind: type
    many: bool
    or_one: bool
    default: Any
    help: str
    metavar: str
    scope: str = SAVED
    choices: tuple[str, ...] | None = None
    low: float | None = None
    high: float | None = None
    least: float = 0.0
    todos: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    rules: tuple[str, ...] | None = None
    place: bool = False
    repeats: bool = False
    recorded_later: bool = False
    shown_default: str | None = None

    @property
    def dest(self) -> str:
        """The key in config.json and in `Config.flat`."""
        return self.name.replace("-", "_")

    @property
    def negative(self) -> str:
        """The name of the flag that turns a switch off."""
        is_negative = self.name.startswith("no-")
        return self.name.removeprefix("no-") if is_negative else f"no-{self.name}"

    def affects(self, todo: str) -> bool:
        """Whether it has an effect on a task, with some model."""
        if self.todos is None or todo in self.todos:
            return True
        return todo == "study" and not set(STUDY).isdisjoint(self.todos)


def _flag(default: Any, help: str, *, name: str | None = None, **options: Any) -> Any:
    """A field with its flag; name: the flag's where it is not the field's; options: of `Flag`."""
    metadata = {"help": help, "name": name, **options}
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------- sections

# What flags of one kind have in common
_session = functools.partial(_flag, scope=SESSION)
_architecture = functools.partial(_flag, scope=ARCHITECTURE)
_convolution = functools.partial(_flag, scope=ARCHITECTURE, models=CONVOLUTIONAL)
_transformer = functools.partial(_flag, scope=ARCHITECTURE, models=TRANSFORMERS, low=1)
_steps = functools.partial(_flag, models=ENERGY_MODELS)
_training = functools.partial(_flag, scope=TRAINING, todos=("train",))
_robustness = functools.partial(_flag, todos=ROBUSTNESS)
_attack = functools.partial(_flag, todos=("attack",))
_audit = functools.partial(_flag, scope=SESSION, todos=("audit",))
EPS_RANGE: dict[str, Any] = {"low": 0, "high": MOST_EPS, "least": LEAST_EPS}


@dataclasses.dataclass(frozen=True)
class Session:
    """What to do in this call, and how it is computed and saved."""

    title = "session"

    todo: str = _session("train", "the task to run", choices=TODOS)
    load_path: str | tuple[str, ...] | None = _session(
        None,
        "the run folder, or a file in one, to resume or to examine; all tasks but train also take "
        "several, a folder of runs, and latest: the newest run below results",
        metavar="RUN",
    )
    labels: tuple[str, ...] | None = _session(
        None,
        "one label per group of runs that differ only in --seed",
        todos=("compare",),
        metavar="NAME",
    )
    published: tuple[str, ...] | None = _session(
        None,
        "tables of published accuracies to draw in, such as those of check/published",
        todos=("compare",),
        metavar="CSV",
    )
    save: bool = _session(
        False,
        "train: write a run folder results/ALG/LOSS/date/time (a resumed run always writes to "
        "its own); other tasks: save images, predictions or plots",
        todos=("train", "evaluate", "attack", "gducheck"),
    )
    run_dir: str | None = _session(
        None,
        "the folder to train in: created if it is missing, resumed if it contains a run, so "
        "that the same command can be started again; --epochs N then counts all epochs; implies"
        " --save",
        todos=("train",),
        metavar="DIR",
    )
    figures: str = _session("png", "file format of figures", choices=("png", "pdf", "svg"))
    tensorboard: bool = _session(
        False,
        "write the scalars of every epoch to RUN/tensorboard (needs the package tensorboard)",
        todos=("train",),
    )
    device: int = _session(0, "index of the GPU; -1 is the CPU", low=-1)
    precision: str = _flag(
        "fp32",
        "precision of the time steps on a CUDA device; weights, the EP update and gradients of "
        "attacks stay fp32",
        scope=RESUMED,
        choices=("fp32", "tf32", "bf16"),
        todos=NOT_GDUCHECK,
    )
    compile: bool = _flag(
        False,
        "compile the time step with torch.compile (CUDA)",
        scope=RESUMED,
        todos=NOT_GDUCHECK,
        models=ENERGY_MODELS,
    )
    seed: int | None = _flag(
        None,
        "seed of everything random",
        shown_default="drawn, and recorded",
        scope=TRAINING,
        low=0,
        high=2**63 - 1,
        todos=("train", "attack", "gducheck", "audit"),
        repeats=True,
    )
    seeds: tuple[int, ...] | None = _session(
        None,
        "train with each of these seeds, one after another; finished trainings of an earlier "
        "call are kept, unfinished ones are resumed",
        low=0,
        high=2**63 - 1,
        todos=("train", "study"),
    )
    deterministic: bool = _flag(
        False,
        "ask torch for kernels that always sum in the same order: a run repeats bit for bit",
        repeats=True,
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """The images and labels, and how they are cut into mini-batches."""

    title = "data"

    task: str = _architecture(
        "MNIST",
        "the data set; digits needs no download",
        choices=tuple(TASKS),
    )
    data_dir: str = _flag(
        "./data", "where the data sets are, or are downloaded to", metavar="DIR", place=True
    )
    corruptions_dir: str | None = _flag(
        None,
        "where the corrupted test images are",
        shown_default="CIFAR-10-C, or CIFAR-100-C, in --data-dir",
        todos=("corruptions",),
        metavar="DIR",
        place=True,
    )
    data_aug: bool = _flag(
        False, "random flips and shifts of the CIFAR training images", todos=("train",)
    )
    train_size: int | None = _flag(
        None, "use the first N training images", low=1, todos=("train", "evaluate", "gducheck")
    )
    val_size: int | None = _architecture(
        None,
        "hold out the last N training images and choose the best model on them",
        shown_default="the best model is chosen on the test images",
        low=1,
        todos=("train",),
    )
    test_size: int | None = _flag(None, "use the first N test images", low=1, todos=NOT_GDUCHECK)
    mbs: int = _flag(20, "images in a mini-batch", low=1, todos=NOT_GDUCHECK)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the model is built from. `channels` is without the channels of the image."""

    title = "model"

    kind: str = _architecture(
        "MLP",
        "energy models: dense or convolutional, with tied or (VF) untied feedback weights; "
        "feed-forward networks for comparison: FFMLP, FFCNN (batch normalisation and ReLU, but "
        "see --no-norm) and a vision transformer",
        name="model",
        choices=(*ENERGY_MODELS, *FEED_FORWARD),
    )
    archi: tuple[int, ...] = _architecture(
        (784, 512, 10),
        "MLP: sizes of all layers, from the input to the classes",
        shown_default="INPUTS 512 CLASSES of the task",
        low=1,
        models=DENSE,
        metavar="SIZE",
    )
    channels: tuple[int, ...] = _convolution(
        (32, 64), "CNN: feature maps of each convolution", low=1, metavar="SIZE"
    )
    kernels: tuple[int, ...] = _convolution((5, 5), "CNN: kernel sizes", low=1, metavar="SIZE")
    strides: tuple[int, ...] = _convolution((1, 1), "CNN: strides", low=1)
    paddings: tuple[int, ...] = _convolution((0, 0), "CNN: paddings", low=0)
    pools: str = _convolution(
        "mm",
        "CNN: a letter per convolution: "
        + ", ".join(f"{letter} {meaning}" for letter, meaning in POOLINGS.items())
        + " (2x2, stride 2)",
        metavar="LETTERS",
    )
    fc: tuple[int, ...] = _convolution(
        (10,),
        "CNN: sizes of the dense layers, the last one the number of classes",
        shown_default="CLASSES of the task",
        low=1,
        metavar="SIZE",
    )
    patch: int = _transformer(4, "ViT: height and width of a patch of the image", metavar="SIZE")
    depth: int = _transformer(6, "ViT: encoder layers")
    heads: int = _transformer(4, "ViT: attention heads")
    width: int = _transformer(128, "ViT: size of a token, a multiple of --heads", metavar="SIZE")
    mlp_width: int = _transformer(
        256, "ViT: hidden size of the dense part of a layer", metavar="SIZE"
    )
    act: str = _architecture(
        "mysig",
        "activation of the neurons; of FFCNN with --no-norm alone, all other feed-forward networks "
        "have ReLU",
        choices=ACTIVATIONS,
        models=(*ENERGY_MODELS, "FFCNN"),
    )
    no_norm: bool = _architecture(
        False,
        "FFCNN with the layers of a CNN of the same flags: without batch normalisation, with the "
        "activation --act",
        models=("FFCNN",),
        recorded_later=True,
    )
    loss: str = _architecture(
        "mse",
        "the loss that nudges the output: squared error or cross-entropy",
        choices=LOSSES,
    )
    softmax: bool = _architecture(
        False,
        "with cel: the output is a linear read-out of the last hidden layer",
        models=ENERGY_MODELS,
    )
    scale: float | None = _flag(
        None, "factor on the initial weights and biases", low=0, todos=GRADIENTS_OF_WEIGHTS
    )

    @property
    def has_dynamics(self) -> bool:
        """Whether the model takes time steps; feed-forward networks do not."""
        return self.kind in ENERGY_MODELS

    @property
    def is_dense(self) -> bool:
        """Whether `archi` describes the model."""
        return self.kind in DENSE

    @property
    def is_convolutional(self) -> bool:
        """Whether `channels`, `kernels`, `strides`, `paddings`, `pools` and `fc` describe it."""
        return self.kind in CONVOLUTIONAL


@dataclasses.dataclass(frozen=True)
class Learning:
    """The dynamics and the learning rule."""

    title = "dynamics and learning rule"

    alg: str = _flag(
        "EP",
        "Equilibrium Propagation, its continual form, back-propagation through time, or, for "
        "feed-forward networks, back-propagation",
        shown_default="EP; BP for feed-forward networks",
        choices=ALGORITHMS,
        todos=GRADIENTS_OF_WEIGHTS,
    )
    T1: int = _steps(
        20,
        "time steps of the free phase",
        low=1,
    )
    T2: int = _steps(
        4,
        "time steps of a nudged phase, or those that BPTT is unrolled through",
        low=1,
        todos=GRADIENTS_OF_WEIGHTS,
    )
    betas: tuple[float, ...] = _steps(
        (0.0, 0.01),
        "nudging of the free and of the nudged phase",
        todos=GRADIENTS_OF_WEIGHTS,
        metavar="BETA",
    )
    schedule: str = _steps(
        "sync",
        "all layers step at once (sync), or odd and even ones in turn (async): half the "
        "arithmetic for the same progress, possibly to another fixed point",
        scope=ARCHITECTURE,
        choices=("sync", "async"),
        recorded_later=True,
    )
    tol: float = _steps(
        0.0,
        "free phases and predictions: stop an image once five steps change no layer by more "
        "than this share of its norm; 0: always take T1 steps",
        low=0,
        todos=tuple(todo for todo in NOT_GDUCHECK if todo != "characteristic"),
    )
    random_sign: bool = _steps(
        False,
        "EP: draw the sign of the second beta anew for each mini-batch",
        todos=("train",),
        rules=("EP", "CEP"),
    )
    thirdphase: bool = _steps(
        False,
        "EP: nudge with beta and -beta (symmetric estimate)",
        todos=GRADIENTS_OF_WEIGHTS,
        rules=("EP", "CEP"),
    )
    same_update: bool = _flag(
        False,
        "VF models: forward and feedback weights take the mean of their updates",
        scope=ARCHITECTURE,
        models=UNTIED,
    )
    check_thm: bool = _steps(
        False,
        "EP: compare with BPTT ten times an epoch while training",
        todos=("train",),
        rules=("EP",),
    )
    dropouts: tuple[float, ...] | None = _steps(
        None,
        "probability of keeping a neuron, for each connection on its bottom-up input (training "
        "only)",
        scope=TRAINING,
        low=0,
        high=1,
        todos=("train",),
        metavar="P",
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and the length of the training. Rates are per layer, in the order of layers."""

    title = "optimizer"

    optim: str = _training("sgd", "optimizer", choices=("sgd", "adam"))
    lrs: tuple[float, ...] | None = _training(
        None,
        "learning rate of each layer",
        shown_default="0.01 for sgd, 0.0005 for adam",
        low=0,
        metavar="RATE",
    )
    wds: tuple[float, ...] | None = _training(
        None, "weight decay of each layer", shown_default="none", low=0, metavar="RATE"
    )
    mmt: float = _training(0.0, "momentum (sgd)", low=0, high=1)
    lr_decay: bool = _training(
        False, "cosine annealing of the learning rates to 1e-5 over 100 epochs"
    )
    lr_step: tuple[float, ...] | None = _training(
        None, "N GAMMA: multiply the learning rates by GAMMA every N epochs", low=0
    )
    epochs: int = _flag(
        1,
        "epochs to train; of a resumed run the further ones, with --run-dir all of them",
        scope=SESSION,
        low=1,
        todos=("train",),
    )


@dataclasses.dataclass(frozen=True)
class AdversarialTraining:
    """PGD from a random start on every training mini-batch. Images range over [0, 1]."""

    title = "adversarial training"

    eps: float | None = _training(
        None,
        "train on adversarial examples of PGD from a random start within this eps, images in "
        "[0, 1], also as a fraction such as 8/255",
        name="adv-train",
        metavar="EPS",
        **EPS_RANGE,
    )
    norm: str = _training("2", "norm of that eps", name="adv-norm", choices=NORMS)
    iters: int = _training(20, "iterations of that PGD", name="adv-iters", low=1)
    steps: int = _training(
        10,
        "time steps that its gradient is unrolled through",
        name="adv-step",
        low=1,
        models=ENERGY_MODELS,
    )
    grad: str = _training(
        "bptt",
        "its gradient method, see --attack-grad",
        name="adv-grad",
        choices=("bptt", "smooth", "ep"),
    )

    @property
    def attack(self) -> settings.Attack | None:
        """The attack on training images; None without --adv-train."""
        return settings.Attack("pgd", self.norm, self.eps, self.iters) if self.eps else None


@dataclasses.dataclass(frozen=True)
class Attack:
    """The attacks of `--todo attack` and the gradients of attack and audit."""

    title = "attack"

    name: str = _attack("pgd", "the attack", name="attack", choices=ATTACKS)
    norm: str = _robustness(
        "2",
        "norm of the perturbation",
        name="attack-norm",
        choices=NORMS,
    )
    eps_list: tuple[float, ...] | None = _attack(
        None,
        "largest norms of the perturbation, images in [0, 1], also as fractions such as 8/255",
        shown_default="11 values, 0.05 to 3 (norm 2), 1e-4 to 0.1 (inf)",
        metavar="EPS",
        **EPS_RANGE,
    )
    iters: int | None = _attack(
        None,
        "iterations of the attack",
        name="attack-iters",
        shown_default="20; of an ensemble 100",
        scope=SESSION,
        low=1,
    )
    queries: int | None = _attack(
        None,
        "predictions for each image, of Square and HopSkipJump",
        name="attack-queries",
        shown_default="5000, or the value of --attack-iters; in an ensemble 50 times "
        "--attack-iters",
        scope=SESSION,
        low=1,
    )
    restarts: int = _attack(
        0,
        "further runs of the attack, from random points within eps",
        name="attack-restarts",
        scope=SESSION,
        low=0,
    )
    steps: tuple[int, ...] | None = _robustness(
        None,
        "time steps that the attack's gradient is unrolled through; with several, the strongest"
        " attack per image counts",
        name="attack-step",
        shown_default=f"the smaller of {ATTACK_STEP} and --predict-step or T1",
        scope=SESSION,
        low=1,
        models=ENERGY_MODELS,
    )
    predict_steps: int | None = _robustness(
        None,
        "time steps of a prediction",
        name="predict-step",
        shown_default="T1",
        low=1,
        models=ENERGY_MODELS,
    )
    grads: tuple[str, ...] = _attack(
        ("bptt",),
        "gradient method: unrolled through the time steps (bptt), the same with slopes that do "
        "not vanish (smooth), Equilibrium Propagation (ep), or smooth on a softened copy whose "
        "neurons do not saturate (soft); with several, the strongest attack per image counts",
        name="attack-grad",
        choices=GRADIENTS,
    )
    start: str = _attack(
        "zero",
        "where the unrolled time steps start: at zero neurons, or near the equilibrium",
        name="attack-start",
        choices=STARTS,
        models=ENERGY_MODELS,
    )
    no_clip: bool = _robustness(
        False,
        "let adversarial examples leave [0, 1], as those of the published tables did",
    )

    @property
    def uses_gradient(self) -> bool:
        """Whether the attack uses gradients, not only predictions."""
        return self.name not in WITHOUT_GRADIENT

    def at(self, eps: float) -> settings.Attack:
        """The attack and its budget at one eps."""
        return settings.Attack.with_defaults(
            self.name, self.norm, eps, self.iters, self.queries, self.restarts, not self.no_clip
        )


@dataclasses.dataclass(frozen=True)
class Audit:
    """The audit of robust accuracy."""

    title = "audit"

    all_eps: float | tuple[float, ...] | None = _flag(
        None,
        "largest norm of the perturbation (--todo attack: --eps-list), images in [0, 1], also as a "
        "fraction such as 8/255; several for a study",
        name="eps",
        scope=SESSION,
        todos=("audit", "study"),
        metavar="EPS",
        **EPS_RANGE,
    )
    budget: str = _audit(
        "standard", "how many iterations and queries the attacks of the audit take", choices=BUDGETS
    )
    surrogate: str | None = _audit(
        None, "a run whose adversarial examples are tried on the audited one", metavar="RUN"
    )

    @property
    def eps(self) -> float | None:
        """The eps of one audit; None without one."""
        return None if isinstance(self.all_eps, tuple) else self.all_eps


@dataclasses.dataclass(frozen=True)
class Study:
    """Models that are trained, attacked and compared in one command."""

    title = "study"

    models: tuple[str, ...] | None = _session(
        None,
        "the models: RULE, of the model --model, or MODEL:RULE; with flags of its own in one word: "
        '"FFCNN:BP --lrs 1e-3 1e-3"',
        todos=("study",),
        metavar="MODEL:RULE",
    )
    audit: bool = _session(False, "audit every model at every --eps", todos=("study",))


# ------------------------------------------------------------------------------------------ config


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of one call. Sections are typed; `flat` is what files contain.

    train_data, test_data: fingerprints of the images and labels that a run is trained and tested
    on, see `data_utils.fingerprint`; None where they have not been read.
    """

    session: Session = Session()
    data: Data = Data()
    model: Architecture = Architecture()
    learning: Learning = Learning()
    optimizer: Optimizer = Optimizer()
    adversarial: AdversarialTraining = AdversarialTraining()
    attack: Attack = Attack()
    audit: Audit = Audit()
    study: Study = Study()
    train_data: str | None = None
    test_data: str | None = None

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration with these values, {dest: value}; the others are defaults, unknown
        keys are ignored."""
        return cls().replace(**{key: value for key, value in values.items() if key in _KEYS})

    @classmethod
    def of(cls, args: Any) -> "Config":
        """The configuration that a namespace, a mapping or a Config describes."""
        if isinstance(args, Config):
            return args
        if isinstance(args, Mapping):
            return cls.from_flat(args)
        return cls.from_flat({key: getattr(args, key) for key in _KEYS if hasattr(args, key)})

    def flat(self) -> dict[str, Any]:
        """{dest: value} as files contain it: lists instead of tuples, fingerprints where known."""
        values = {flag.dest: _listed(self.value(flag)) for flag in FLAGS}
        known = {name: getattr(self, name) for name in FINGERPRINTS}
        return {**values, **{name: value for name, value in known.items() if value is not None}}

    def value(self, flag: Flag) -> Any:
        """The value of a flag."""
        return getattr(getattr(self, flag.section), flag.field)

    def replace(self, **values: Any) -> "Config":
        """The configuration with other values of these flags (or fingerprints), {dest: value}."""
        changes: dict[str, dict[str, Any]] = {}
        own = {}
        for key, value in values.items():
            if key in FINGERPRINTS:
                own[key] = value
            else:
                flag = BY_DEST[key]
                changes.setdefault(flag.section, {})[flag.field] = _frozen(flag, value)
        sections = {
            name: dataclasses.replace(getattr(self, name), **fields)
            for name, fields in changes.items()
        }
        return dataclasses.replace(self, **sections, **own)

    @property
    def rule(self) -> Rule:
        """How the model predicts and learns."""
        learning = self.learning
        free_beta, nudged_beta = learning.betas
        return Rule(
            alg=learning.alg,
            T1=learning.T1,
            T2=learning.T2,
            betas=(free_beta, nudged_beta),
            loss=self.model.loss,
            thirdphase=learning.thirdphase,
            random_sign=learning.random_sign,
            tol=learning.tol,
            dropouts=learning.dropouts,
        )

    @property
    def about(self) -> str:
        """Model and task, for the captions of figures."""
        return f"{self.model.kind} on {self.data.task}"

    @property
    def audit_attack(self) -> settings.Attack:
        """Norm, eps and clipping of the attacks of an audit."""
        assert self.audit.eps is not None
        clip = not self.attack.no_clip
        return settings.Attack(norm=self.attack.norm, eps=self.audit.eps, clip=clip)

    @property
    def predict_steps(self) -> int:
        """Time steps of a prediction of attack and audit."""
        return self.attack.predict_steps or self.learning.T1

    @property
    def attack_steps(self) -> tuple[int, ...]:
        """Time steps that gradients of attacks are unrolled through."""
        return self.attack.steps or (min(ATTACK_STEP, self.predict_steps),)


# Fingerprint in a config: (its split, the flag with the number of images)
FINGERPRINTS = {"train_data": ("training", "train_size"), "test_data": ("test", "test_size")}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _frozen(flag: Flag, value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array of NumPy, or a number
        value = value.tolist()
    if isinstance(value, (list, range)):
        return tuple(value)
    # earlier versions saved a single value of some flags that take several now
    is_single = flag.many and not flag.or_one and not isinstance(value, tuple)
    return (value,) if is_single and value is not None else value


def _flags_of(name: str, section: type) -> Iterable[Flag]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        options = dict(field.metadata)
        hint = hints[field.name]
        alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        tuples = [hint for hint in alternatives if typing.get_origin(hint) is tuple]
        kind = typing.get_args(tuples[0])[0] if tuples else alternatives[0]
        metavar = {bool: "", int: "N", float: "X", str: "TEXT"}[kind]
        if options.get("choices"):
            metavar = "{" + ",".join(options["choices"]) + "}"
        yield Flag(
            name=options.pop("name") or field.name.replace("_", "-"),
            section=name,
            field=field.name,
            kind=kind,
            many=bool(tuples),
            or_one=bool(tuples) and kind in alternatives,
            default=_listed(field.default),
            metavar=options.pop("metavar", metavar),
            **options,
        )


SECTIONS: dict[str, Any] = {  # dataclasses, each with a title
    "session": Session,
    "data": Data,
    "model": Architecture,
    "learning": Learning,
    "optimizer": Optimizer,
    "adversarial": AdversarialTraining,
    "attack": Attack,
    "audit": Audit,
    "study": Study,
}
FLAGS: tuple[Flag, ...] = tuple(
    flag for name, section in SECTIONS.items() for flag in _flags_of(name, section)
)
BY_DEST: dict[str, Flag] = {flag.dest: flag for flag in FLAGS}
_KEYS = {*BY_DEST, *FINGERPRINTS}

# Keys that the config of every version has; later flags may be missing and had their defaults.
ALWAYS_SAVED = (
    "task", "data_aug", "train_size", "test_size", "mbs", "seed",
    "model", "archi", "channels", "kernels", "strides", "paddings", "pools", "fc", "act", "loss",
    "softmax", "alg", "T1", "T2", "betas", "random_sign", "thirdphase", "optim", "lrs", "wds",
    "mmt", "lr_decay",
)  # fmt: skip


@functools.cache
def training_keys() -> tuple[str, ...]:
    """Keys of the settings that identify a training, but for its repetition and places of data."""
    return tuple(
        flag.dest
        for flag in FLAGS
        if flag.scope != SESSION
        and not flag.place
        and not flag.repeats
        and not (flag.todos and set(flag.todos) <= set(ROBUSTNESS))
    )


def training_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """{dest: value} of the settings that identify a training, of a config as a file has it."""
    return {key: values.get(key, BY_DEST[key].default) for key in training_keys()}


def training_name(values: Mapping[str, Any]) -> str:
    """The name of a training in tables and figures, of a config as a file has it: model, rule and
    what else makes it another kind of model."""
    name = f"{values['model']} {values['alg']}"
    if values.get("no_norm"):
        name += ", no norm"
    if values.get("adv_train"):
        name += f", adversarial {format_eps(values['adv_train'])} by {values['adv_grad']}"
    return name
