"""Names of attacks, gradient methods and budgets: what the command line needs without torch.

`tests/test_layout.py` compares them with what is implemented."""

ATTACKS = (
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
)
WITHOUT_GRADIENT = ("square", "hopskipjump")  # they use predictions alone
ENSEMBLES = ("autoattack", "art-autoattack")
WITH_QUERIES = WITHOUT_GRADIENT + ENSEMBLES
NORMS = ("2", "inf")
GRADIENTS = ("bptt", "smooth", "ep", "soft")
STARTS = ("zero", "equilibrium")
STATES = ("last", "all")
BUDGETS = ("standard", "quick")  # of an audit
