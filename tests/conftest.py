import copy
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile

import pytest
import quick_figures
import torch
from filelock import FileLock
from make_cifar import write_cifar

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import main  # noqa: E402
import model_utils as mu  # noqa: E402
from energy import fast  # noqa: E402
from experiment import devices  # noqa: E402


def tiers(cases, *fast):
    """The cases of a parametrized test: those in `fast` for the fast tier, the others marked
    slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


# Processes that have loaded the libraries already, so that what they run begins at once.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "main",
        "model_utils",
        "torchvision",
        "sklearn.datasets",
        "sklearn.model_selection",
        "ART_Timesteps_Addition.audit",
        "matplotlib.backends.backend_agg",
        "experiment.results.evaluation",
        "experiment.training",
        "torch.fx.experimental.symbolic_shapes",
    ]
)

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs a command line of main.py in an empty folder: words -> (exit code, standard output,
    standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **options):
        devices._note_missing_gpu.cache_clear()  # as in a process of its own
        code = main.main(
            [str(w) for word in words for w in (word.split() if isinstance(word, str) else [word])],
            **options,
        )
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def ok(cli):
    """As `cli`, for a command line that must succeed: returns its standard output."""

    def run(*words, **options):
        code, out, err = cli(*words, **options)
        assert code == 0 and "was not drawn" not in err, err
        return out

    return run


@pytest.fixture
def full_figures(monkeypatch):
    """Figures as users get them, see quick_figures."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", quick_figures.IN_FULL)


def only_run(folder):
    """The one run folder below `folder`/results; hidden ones, which a kill can leave, are none."""
    files = pathlib.Path(folder, "results").rglob("hyperparameters.txt")
    runs = [file.parent for file in files if not file.parent.name.startswith(".")]
    assert len(runs) == 1, runs
    return runs[0]


_DIGITS = "--task digits --device -1 --save"
_LEARNT = _DIGITS + " --thirdphase --optim adam --epochs 3 --seed 0"
_MLP = " --archi 784 32 10 --T1 20 --T2 6 --mbs 20"
_RESUMED = (
    _DIGITS + " --train-size 60 --test-size 20 --mbs 15 --T1 4 --T2 2 --betas 0 0.5 --seed 5 "
    "--archi 784 12 10"
)
_FEW = (
    _DIGITS + " --train-size 300 --T1 12 --T2 4 --thirdphase --optim adam --seed 0 --epochs 2 "
    "--archi 784 24 10"
)
_RECORDED = (
    _DIGITS + " --train-size 120 --mbs 30 --seed 3 --epochs 2 --archi 784 16 10 --T1 12 "
    "--lrs 0.1 0.05 --betas 0 0.5"
)
_COMPARED = (
    _DIGITS + " --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 --archi 784 8 10 --epochs 2 "
    "--seed 1"
)
ZOO = {  # small models: the command line that trains each
    # for what needs any run
    "tiny": _DIGITS + " --train-size 60 --test-size 20 --archi 784 8 10 --T1 8 --T2 2 "
    "--betas 0 0.5 --mbs 20 --seed 0",
    "tiny seed 3": _DIGITS + " --train-size 40 --test-size 20 --mbs 20 --T1 4 --T2 2 "
    "--archi 784 8 10 --lrs 0.1 0.1 --betas 0 0.5 --seed 3",
    "MLP": _RESUMED,
    "CNN": _RESUMED + " --model CNN --channels 3 4",
    "recorded MLP": _RECORDED,
    "recorded VFMLP": _RECORDED + " --model VFMLP --loss cel",
    "compared EP": _COMPARED,
    "compared BPTT": _COMPARED + " --alg BPTT",
    # some of whose test images have converged
    "converging": _DIGITS + " --train-size 60 --test-size 50 --archi 784 8 10 --T1 20 --T2 2 "
    "--betas 0 0.5 --seed 0 --mbs 20",
    # that have learnt some of the digits
    "few digits": _FEW + " --betas 0 0.2 --lrs 2e-3 2e-3",
    "few digits, softmax": _FEW + " --loss cel --softmax --betas 0 1 --lrs 5e-3 5e-3",
    # that have learnt the digits
    "digits": _LEARNT + _MLP + " --betas 0 0.2 --lrs 2e-3 2e-3",
    "digits, tanh": _DIGITS + _MLP + " --optim adam --epochs 3 --seed 0 --act tanh --alg BPTT "
    "--lrs 2e-3 2e-3",
    "digits, softmax": _LEARNT + _MLP + " --act my_hard_sig --loss cel --softmax --betas 0 1 "
    "--lrs 5e-3 5e-3",
    "digits, CNN": _LEARNT + " --model CNN --channels 6 8 --T1 16 --T2 6 --act my_hard_sig "
    "--loss cel --softmax --betas 0 1 --lrs 5e-3 5e-3 5e-3",
    "digits, VFCNN": _LEARNT + " --model VFCNN --channels 4 6 --kernels 5 5 --strides 2 2 "
    "--pools ii --paddings 0 0 --T1 20 --T2 6 --mbs 20 --act my_hard_sig --loss cel --softmax "
    "--betas 0 1 --lrs 5e-3 5e-3 5e-3",
}


def train_in(folder, line):
    """Trains in a folder, with what main.py prints in its file `output`."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open("output", "w", buffering=1)
    sys.exit(main.main(line.split()))


class Zoo:
    """The runs of the small models in ZOO, each trained once for all workers of a test session,
    when the first test asks for it: in a process of its own, where nothing is patched."""

    def __init__(self, root):
        self.root = root
        root.mkdir(exist_ok=True)

    def _trained(self, name):
        folder = self.root / name.replace(" ", "_").replace(",", "")
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=self.root) as work:
                    process = context.Process(target=train_in, args=(work, ZOO[name]))
                    process.start()
                    process.join()
                    assert process.exitcode == 0, pathlib.Path(work, "output").read_text()
                    pathlib.Path(work, "results").rename(folder)
        return folder

    def __call__(self, name):
        """The run folder of a model, for tests that only read it."""
        (file,) = self._trained(name).rglob("hyperparameters.txt")
        return file.parent

    def copy(self, name, folder):
        """A copy of that run folder, below `folder`/results as if it had been trained there."""
        shutil.copytree(self._trained(name), pathlib.Path(folder, "results"))
        return only_run(folder)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of all workers
        root = root.parent
    return Zoo(root / "zoo")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """A data folder with files in the format of CIFAR-10: random images, 20 in each training batch,
    40 for testing."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root)
    return root


MODELS = {
    "MLP": lambda act: mu.P_MLP([20, 16, 8, 5], act),
    "MLP softmax": lambda act: mu.P_MLP([20, 16, 8, 5], act, softmax=True),
    "VFMLP": lambda act: mu.VF_MLP([20, 16, 8, 5], act),
    "VFMLP softmax": lambda act: mu.VF_MLP([20, 16, 8, 5], act, softmax=True),
    # odd sizes, stride 2 and windows that miss the last row, every pooling, one to three dense
    # layers
    "CNN max": lambda act: mu.P_CNN(
        13, [2, 4, 5], [3, 3], [1, 1], [5], mu.make_pools("mm"), [1, 0], act
    ),
    "CNN stride": lambda act: mu.P_CNN(
        14, [2, 4, 5], [4, 3], [2, 2], [7, 5], mu.make_pools("im"), [1, 2], act
    ),
    "CNN avg deep softmax": lambda act: mu.P_CNN(
        11,
        [1, 4, 3, 6],
        [3, 3, 2],
        [1, 1, 1],
        [9, 7, 5],
        mu.make_pools("aia"),
        [1, 1, 0],
        act,
        softmax=True,
    ),
    # wide, on maps so small that the convolutions go through matrix products
    "CNN product": lambda act: mu.P_CNN(
        9, [2, 40, 72], [3, 3], [2, 2], [5], mu.make_pools("ma"), [1, 2], act
    ),
    "VFCNN max": lambda act: mu.VF_CNN(
        13, [2, 4, 5], [3, 3], [1, 1], [5], mu.make_pools("mm"), [1, 0], act
    ),
    "VFCNN mixed softmax": lambda act: mu.VF_CNN(
        14,
        [2, 4, 5, 6],
        [4, 3, 2],
        [2, 1, 1],
        [7, 5],
        mu.make_pools("iam"),
        [1, 1, 1],
        act,
        softmax=True,
    ),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param](torch.tanh).double()


def sample(model, mbs=4):
    """x and y of a mini-batch for one of the models above, in its precision."""
    first = model.connections[0]
    return torch.randn(mbs, *first.pre_shape, dtype=model.synapses[0].weight.dtype), torch.randint(
        0, 5, (mbs,)
    )


def masked(model, masks):
    """The model, on the same parameters, seeing the layers below through masks of dropout, as
    `draw_masks` gives them."""
    twin, chain = copy.copy(model), model.chain().masked(masks)
    twin.connections, twin.output = chain.connections, chain.readout
    return twin


def rule(T1, T2, criterion, beta=0.3, **more):
    """A rule of learning with betas 0 and `beta`, and the loss of `criterion`."""
    return mu.Rule(T1=T1, T2=T2, betas=(0.0, beta), loss=mu.loss_name(criterion), **more)


def settle(model, x, y, T, beta, criterion, tol, every=5):
    """(neurons, steps, settled) of a phase from zero neurons that ends early."""
    loss = mu.loss_name(criterion)
    chain = model.chain(loss)
    neurons, settling = fast.relax_until_converged(
        chain, model.phase(chain.input_drive(x), y, beta, loss), T, tol, every
    )
    return neurons, *settling


def criterion_of(model):
    return mu.make_criterion("cel" if model.softmax else "mse")


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


CASES = sorted(p.stem for p in GOLDEN.glob("*.pt") if p.stem != "attack_pgd")


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return torch.load(GOLDEN / f"{request.param}.pt", weights_only=True)


@pytest.fixture
def golden_model(case):
    c = case["case"]
    act = mu.ACTIVATIONS[c["act"]]
    if "archi" in c:
        model = {"MLP": mu.P_MLP, "VFMLP": mu.VF_MLP}[c["model"]](c["archi"], activation=act)
    else:
        geometry = [c[k] for k in ("in_size", "channels", "kernels", "strides", "fc")] + [
            mu.make_pools(c["pools"]),
            c["paddings"],
        ]
        more = {"same_update": c["same_update"]} if c["model"] == "VFCNN" else {}
        model = {"CNN": mu.P_CNN, "VFCNN": mu.VF_CNN}[c["model"]](
            *geometry, activation=act, softmax=c["softmax"], **more
        )
    model.load_state_dict(case["state_dict"])
    return model
