"""The flags of the command line: each is defined once, here."""

from typing import Any, NamedTuple

from data_utils import TASKS
from energy.names import ACTIVATIONS

LEAST_EPS, MOST_EPS = 1e-9, 1e9  # range of eps other than 0; images are float32 in [0, 1]
LARGEST = 10**9  # of whole numbers: beyond anything that could run


class Flag(NamedTuple):
    """kind: float, int, str or bool (a switch); many: a list of them; low, high: bounds of numbers;
    choices: of words. least: the lower bound of numbers other than 0.

    scope: what a saved run does to it. `architecture`: it decides, whatever the flag says;
    `training`: it decides where its training goes on; `resumed`: its value counts unless the flag
    is given, where its training resumes and nowhere else; `session`: it has no say, the flag
    belongs to one call; otherwise the run's value counts unless the flag is given. todos, models:
    where it has an effect, everywhere if None; given elsewhere, a note says that it has none."""

    name: str
    kind: type
    default: Any
    help: str
    scope: str = ""
    choices: tuple | None = None
    low: float | None = None
    high: float | None = None
    many: bool = False
    todos: tuple | None = None
    models: tuple | None = None
    least: float = 0

    @property
    def dest(self):
        return self.name.replace("-", "_")

    @property
    def negative(self):
        """The name of the flag that turns a switch off."""
        return self.name.removeprefix("no-") if self.name.startswith("no-") else f"no-{self.name}"


def typed(flag, value):
    """The words of a command line that give a flag this value."""
    if flag.kind is bool:
        return [f"--{flag.name if value else flag.negative}"]
    words = [str(v) for v in (value if isinstance(value, list) else [value])]
    if (
        flag.kind is str and len(words) == 1 and words[0].startswith("-")
    ):  # a path that looks like a flag
        return [f"--{flag.name}={words[0]}"]
    return [f"--{flag.name}", *words]


A, T, R, S = "architecture", "training", "resumed", "session"
TODOS = (
    "train",
    "evaluate",
    "attack",
    "gducheck",
    "characteristic",
    "corruptions",
    "audit",
    "compare",
)
TRAIN, COMPARE, ATTACK, AUDIT, ROBUST = (
    ("train",),
    ("compare",),
    ("attack",),
    ("audit",),
    ("attack", "audit"),
)
LEARN = ("train", "gducheck")  # what takes gradients of the weights
# gducheck takes every step in fp32, of one mini-batch
NOT_GDU = tuple(todo for todo in TODOS if todo not in ("gducheck", "compare"))
ENERGY, FEED_FORWARD = ("MLP", "VFMLP", "CNN", "VFCNN"), ("FFMLP", "FFCNN", "ViT")
DENSE, CONVOLUTIONAL, SEPARATE = (
    ("MLP", "VFMLP", "FFMLP"),
    ("CNN", "VFCNN", "FFCNN"),
    ("VFMLP", "VFCNN"),
)
TRANSFORMER = ("ViT",)

# What stands for the flags of time steps in a model that has none.
NO_STEPS = {
    "T1": 1,
    "T2": 1,
    "tol": 0.0,
    "schedule": "sync",
    "softmax": False,
    "random_sign": False,
    "thirdphase": False,
    "same_update": False,
    "check_thm": False,
    "compile": False,
    "adv_step": 1,
    "attack_step": [1],
    "predict_step": None,
    "attack_start": "zero",
}
OF_STEPS = ("ep", "soft")  # of --attack-grad, what needs them

WITHOUT_GRADIENT = ("square", "hopskipjump")  # of --attack
ATTACK_STEP = 29  # the largest default of --attack-step: that of the published tables

FLAGS = {
    "what to do": [
        Flag("todo", str, "train", "what to do", S, TODOS),
        Flag(
            "load-path",
            str,
            None,
            "a run folder, or a file in one: to go on training it, or to examine it; for "
            "compare several",
            S,
            many=True,
        ),
        Flag(
            "labels",
            str,
            None,
            "a name for each group of runs whose arguments differ in the seed alone",
            S,
            many=True,
            todos=COMPARE,
        ),
        Flag(
            "published",
            str,
            None,
            "tables of published accuracies to draw in, such as those of check/published",
            S,
            many=True,
            todos=COMPARE,
        ),
        Flag(
            "save",
            bool,
            False,
            "train: write a run folder results/ALG/LOSS/date/time (a resumed run always writes to "
            "its own); elsewhere: keep images, predictions or plots",
            S,
            todos=("train", "evaluate", "attack", "gducheck"),
        ),
        Flag(
            "run-dir",
            str,
            None,
            "the folder to train in: it is created if it is missing, and the "
            "run in it is resumed, so that the same command can be started again; --epochs N is then "
            "N in all; implies --save",
            S,
            todos=TRAIN,
        ),
        Flag("figures", str, "png", "file format of figures", S, ("png", "pdf")),
        Flag(
            "tensorboard",
            bool,
            False,
            "write the scalars of every epoch to RUN/tensorboard (needs the package tensorboard)",
            S,
            todos=TRAIN,
        ),
        Flag("device", int, 0, "index of the GPU; -1 is the CPU", S, low=-1),
        Flag(
            "precision",
            str,
            "fp32",
            "of the time steps on a CUDA device; weights, EP's contrast and attacks' "
            "gradients stay fp32",
            R,
            ("fp32", "tf32", "bf16"),
            todos=NOT_GDU,
        ),
        Flag(
            "compile",
            bool,
            False,
            "compile the time step with torch.compile (CUDA)",
            R,
            todos=NOT_GDU,
            models=ENERGY,
        ),
        Flag(
            "seed",
            int,
            None,
            "seed of everything random (default: drawn, and written down)",
            T,
            low=0,
            high=2**63 - 1,
            todos=("train", "attack", "gducheck", "audit"),
        ),
        Flag(
            "seeds",
            int,
            None,
            "train with each of these seeds, one after another; what an earlier call has finished "
            "is left, what it began goes on",
            S,
            low=0,
            high=2**63 - 1,
            many=True,
            todos=TRAIN,
        ),
        Flag(
            "deterministic",
            bool,
            False,
            "ask torch for kernels that always sum in the same order: a run repeats bit for bit",
        ),
    ],
    "data": [
        Flag("task", str, "MNIST", "the data set; digits needs no download", A, tuple(TASKS)),
        Flag("data-dir", str, "./data", "where the data sets are, or are downloaded to"),
        Flag(
            "corruptions-dir",
            str,
            None,
            "where the corrupted test images are (default: the folder CIFAR-10-C, or "
            "CIFAR-100-C, in --data-dir)",
            todos=("corruptions",),
        ),
        Flag(
            "data-aug",
            bool,
            False,
            "random flips and shifts of the CIFAR training images",
            todos=TRAIN,
        ),
        Flag(
            "train-size",
            int,
            None,
            "use the first N training images",
            low=1,
            todos=("train", "evaluate", "gducheck"),
        ),
        Flag(
            "val-size",
            int,
            None,
            "hold out the last N of them, to choose the model that is kept by (default: it is "
            "the best on the test images)",
            A,
            low=1,
            todos=TRAIN,
        ),
        Flag("test-size", int, None, "use the first N test images", low=1, todos=NOT_GDU),
        Flag("mbs", int, 20, "images in a mini-batch", low=1, todos=NOT_GDU),
    ],
    "model": [
        Flag(
            "model",
            str,
            "MLP",
            "energy models: dense or convolutional, with tied weights or (VF) separate backward "
            "weights; networks without time steps to compare with: FFMLP, FFCNN (with batch normalisation and ReLU) "
            "and a vision transformer",
            A,
            (*ENERGY, *FEED_FORWARD),
        ),
        Flag(
            "archi",
            int,
            [784, 512, 10],
            "MLP: sizes of all layers, from the input to the classes (default: one "
            "hidden "
            "layer of 512 between what the task has)",
            A,
            low=1,
            many=True,
            models=DENSE,
        ),
        Flag(
            "channels",
            int,
            [32, 64],
            "CNN: feature maps of each convolution",
            A,
            low=1,
            many=True,
            models=CONVOLUTIONAL,
        ),
        Flag(
            "kernels", int, [5, 5], "CNN: kernel sizes", A, low=1, many=True, models=CONVOLUTIONAL
        ),
        Flag("strides", int, [1, 1], "CNN: strides", A, low=1, many=True, models=CONVOLUTIONAL),
        Flag("paddings", int, [0, 0], "CNN: paddings", A, low=0, many=True, models=CONVOLUTIONAL),
        Flag(
            "pools",
            str,
            "mm",
            "CNN: a letter per convolution: m max, a average (both 2x2, stride 2), i none",
            A,
            models=CONVOLUTIONAL,
        ),
        Flag(
            "fc",
            int,
            [10],
            "CNN: sizes of the dense layers, the last one the number of classes (default: that "
            "alone)",
            A,
            low=1,
            many=True,
            models=CONVOLUTIONAL,
        ),
        Flag(
            "patch",
            int,
            4,
            "ViT: height and width of the patches that an image is cut into",
            A,
            low=1,
            models=TRANSFORMER,
        ),
        Flag("depth", int, 6, "ViT: encoder layers", A, low=1, models=TRANSFORMER),
        Flag("heads", int, 4, "ViT: attention heads", A, low=1, models=TRANSFORMER),
        Flag(
            "width",
            int,
            128,
            "ViT: size of a token, a multiple of --heads",
            A,
            low=1,
            models=TRANSFORMER,
        ),
        Flag(
            "mlp-width",
            int,
            256,
            "ViT: hidden size of the dense part of a layer",
            A,
            low=1,
            models=TRANSFORMER,
        ),
        Flag("act", str, "mysig", "activation of the neurons", A, ACTIVATIONS, models=ENERGY),
        Flag(
            "loss",
            str,
            "mse",
            "what nudges the output: squared error or cross-entropy",
            A,
            ("mse", "cel"),
        ),
        Flag(
            "softmax",
            bool,
            False,
            "with cel: the output is a linear read-out of the last hidden layer",
            A,
            models=ENERGY,
        ),
        Flag("scale", float, None, "factor on the initial weights and biases", low=0, todos=LEARN),
    ],
    "dynamics and learning rule": [
        Flag(
            "alg",
            str,
            "EP",
            "Equilibrium Propagation, its continual form, or back-propagation through time; BP "
            "trains networks without time steps, and is their default",
            choices=("EP", "CEP", "BPTT", "BP"),
            todos=LEARN,
        ),
        Flag("T1", int, 20, "time steps of the free phase", low=1, models=ENERGY),
        Flag(
            "T2", int, 4, "time steps of a nudged phase; of BPTT", low=1, todos=LEARN, models=ENERGY
        ),
        Flag(
            "betas",
            float,
            [0.0, 0.01],
            "nudging of the free and of the nudged phase",
            many=True,
            todos=LEARN,
            models=ENERGY,
        ),
        Flag(
            "schedule",
            str,
            "sync",
            "all layers step at once (sync), or odd and even ones in turn (async): half the "
            "arithmetic for the same progress, to a fixed point that can be another",
            A,
            ("sync", "async"),
            models=ENERGY,
        ),
        Flag(
            "tol",
            float,
            0.0,
            "free phases and predictions: stop an image once five steps change no layer by more "
            "than this share of its norm; 0: always take T1 steps",
            low=0,
            todos=tuple(todo for todo in NOT_GDU if todo != "characteristic"),
            models=ENERGY,
        ),
        Flag(
            "random-sign",
            bool,
            False,
            "EP: draw the sign of the second beta anew for each batch",
            todos=TRAIN,
            models=ENERGY,
        ),
        Flag(
            "thirdphase",
            bool,
            False,
            "EP: nudge with beta and -beta (symmetric estimate)",
            todos=LEARN,
            models=ENERGY,
        ),
        Flag(
            "same-update",
            bool,
            False,
            "VF models: forward and backward weights take the mean of their updates",
            A,
            models=SEPARATE,
        ),
        Flag(
            "check-thm",
            bool,
            False,
            "EP: compare with BPTT ten times an epoch while training",
            todos=TRAIN,
            models=ENERGY,
        ),
    ],
    "optimizer": [
        Flag("optim", str, "sgd", "optimizer", T, ("sgd", "adam"), todos=TRAIN),
        Flag(
            "lrs",
            float,
            None,
            "learning rate of each layer (default: 0.01 for sgd, 0.0005 for adam)",
            T,
            low=0,
            many=True,
            todos=TRAIN,
        ),
        Flag(
            "wds",
            float,
            None,
            "weight decay of each layer (default: none)",
            T,
            low=0,
            many=True,
            todos=TRAIN,
        ),
        Flag("mmt", float, 0.0, "momentum (sgd)", T, low=0, high=1, todos=TRAIN),
        Flag(
            "lr-decay",
            bool,
            False,
            "cosine annealing of the learning rates to 1e-5 over 100 epochs",
            T,
            todos=TRAIN,
        ),
        Flag(
            "lr-step",
            float,
            None,
            "N GAMMA: every N epochs the learning rates become GAMMA times what they were",
            T,
            low=0,
            many=True,
            todos=TRAIN,
        ),
        Flag(
            "epochs",
            int,
            1,
            "epochs to train; of a resumed run the further ones, with --run-dir all of them",
            S,
            low=1,
            todos=TRAIN,
        ),
    ],
    "adversarial training": [
        Flag(
            "adv-train",
            float,
            None,
            "train on images attacked by PGD from a random start, within this bound, images "
            "in [0, 1], also as a fraction such as 8/255",
            T,
            low=0,
            high=MOST_EPS,
            todos=TRAIN,
            least=LEAST_EPS,
        ),
        Flag("adv-norm", str, "2", "norm of that bound", T, ("2", "inf"), todos=TRAIN),
        Flag("adv-iters", int, 20, "iterations of that attack", T, low=1, todos=TRAIN),
        Flag(
            "adv-step",
            int,
            10,
            "time steps that its gradient goes through",
            T,
            low=1,
            todos=TRAIN,
            models=ENERGY,
        ),
        Flag(
            "adv-grad",
            str,
            "bptt",
            "how its gradient is got, see --attack-grad",
            T,
            ("bptt", "smooth", "ep"),
            todos=TRAIN,
        ),
    ],
    "attack": [
        Flag(
            "attack",
            str,
            "pgd",
            "the attack",
            choices=(
                "pgd",
                "fgsm",
                "apgd-ce",
                "apgd-dlr",
                "apgd-t",
                "fab",
                "square",
                "hopskipjump",
                "deepfool",
                "cw",
                "autoattack",
                "art-autoattack",
            ),
            todos=ATTACK,
        ),
        Flag(
            "attack-norm",
            str,
            "2",
            "norm that bounds the perturbation",
            choices=("2", "inf"),
            todos=ROBUST,
        ),
        Flag(
            "eps-list",
            float,
            None,
            "bounds to attack with, images in [0, 1], also as fractions such as 8/255 "
            "(default: a grid for the norm)",
            low=0,
            high=MOST_EPS,
            many=True,
            todos=ATTACK,
            least=LEAST_EPS,
        ),
        Flag(
            "attack-iters",
            int,
            None,
            "iterations of the attack (default: 20; of an ensemble 100)",
            S,
            low=1,
            todos=ATTACK,
        ),
        Flag(
            "attack-queries",
            int,
            None,
            "predictions for each image, of Square and HopSkipJump (default: 5000; with "
            "--attack-iters as many as these, in an ensemble 50 times as many)",
            S,
            low=1,
            todos=ATTACK,
        ),
        Flag(
            "attack-restarts",
            int,
            0,
            "further runs of the attack, from random points in the ball",
            S,
            low=0,
            todos=ATTACK,
        ),
        Flag(
            "attack-step",
            int,
            None,
            "time steps that the attack's gradient is unrolled through; "
            "with several, the strongest attack per image counts (default: the smaller of "
            f"{ATTACK_STEP} and --predict-step or T1)",
            S,
            low=1,
            many=True,
            todos=ROBUST,
            models=ENERGY,
        ),
        Flag(
            "predict-step",
            int,
            None,
            "time steps of a prediction (default: T1)",
            low=1,
            todos=ROBUST,
            models=ENERGY,
        ),
        Flag(
            "attack-grad",
            str,
            ["bptt"],
            "how gradients are got: through the time steps (bptt), the same with slopes "
            "that do not vanish (smooth), by Equilibrium Propagation (ep), as smooth through a twin whose neurons do "
            "not saturate (soft); of several, the worst counts",
            choices=("bptt", "smooth", "ep", "soft"),
            many=True,
            todos=ATTACK,
        ),
        Flag(
            "attack-start",
            str,
            "zero",
            "where the gradient's time steps begin: at zero neurons, or near the equilibrium",
            choices=("zero", "equilibrium"),
            todos=ATTACK,
            models=ENERGY,
        ),
        Flag(
            "no-clip",
            bool,
            False,
            "let adversarial images leave [0, 1], as the published tables did",
            todos=ROBUST,
        ),
        Flag(
            "eps",
            float,
            None,
            "the bound of the audit, images in [0, 1], also as a fraction such as 8/255",
            S,
            low=0,
            high=MOST_EPS,
            least=LEAST_EPS,
            todos=AUDIT,
        ),
        Flag(
            "budget",
            str,
            "standard",
            "how much the attacks of the audit may take",
            S,
            ("standard", "quick"),
            todos=AUDIT,
        ),
        Flag(
            "surrogate",
            str,
            None,
            "a run whose adversarial images are tried on the audited one",
            S,
            todos=AUDIT,
        ),
    ],
}

# A flag of main_dropout.py alone; main.py takes it from a saved run, and so goes on with one.
DROPOUTS = Flag(
    "dropouts",
    float,
    None,
    "probability of keeping a neuron, for each connection on what it sees below (training only)",
    T,
    low=0,
    high=1,
    many=True,
    todos=TRAIN,
    models=ENERGY,
)
ALL = [*(flag for group in FLAGS.values() for flag in group), DROPOUTS]

# What the checkpoints of every version of this program say; later flags may be missing, and stood
# at their defaults.
ALWAYS_SAVED = (
    "task",
    "data_aug",
    "train_size",
    "test_size",
    "mbs",
    "seed",
    "model",
    "archi",
    "channels",
    "kernels",
    "strides",
    "paddings",
    "pools",
    "fc",
    "act",
    "loss",
    "softmax",
    "alg",
    "T1",
    "T2",
    "betas",
    "random_sign",
    "thirdphase",
    "optim",
    "lrs",
    "wds",
    "mmt",
    "lr_decay",
)

# What a config has besides the flags: fingerprints of the images and labels that a run is trained
# and tested on (see `data_utils.fingerprint`), with which these are and the flag that says how
# many.
DATA = {"train_data": ("training", "train_size"), "test_data": ("test", "test_size")}
