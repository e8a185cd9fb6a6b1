"""Names of attacks, gradient methods and budgets, without torch, for the command line.

A test compares them with the implementations."""

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
WITHOUT_GRADIENT = ("square", "hopskipjump")  # these use only predictions
ENSEMBLES = ("autoattack", "art-autoattack")
WITH_QUERIES = WITHOUT_GRADIENT + ENSEMBLES
NORMS = ("2", "inf")
GRADIENTS = ("bptt", "smooth", "ep", "soft")
STARTS = ("zero", "equilibrium")
STATES = ("last", "all")
BUDGETS = ("standard", "quick")  # of an audit

# Recorded with every result of an attack. Raise it when the same settings give other numbers.
ATTACK_VERSION = 1
