"""EP against BPTT, time step by time step (Ernoult et al., 2019): the update between successive steps of the nudged
phase is to be the gradient through the same step of BPTT, counted from the end. `model` is an energy model of
`model_utils`."""
import torch
import torch.nn as nn
import torch.nn.functional as F


def bptt_contributions(model, x, y, T1, T2, beta, criterion):
    """What each of the last T2 of T1 free steps contributes to the gradient of the loss, by one backward pass.

    Every step gets parameters of its own, that share the model's memory, so that one pass keeps their gradients apart.
    Returns a dict: each parameter's name -> (T2, *shape), the gradient of the mean loss through the k-th step from the
    end; `neurons_i` -> (T2, mbs, *shape of the layer), minus the gradient of each sample's loss with respect to that
    layer k steps before the end. Time T2 forward and backward steps; memory the graph of T2 steps and the result, T2
    times parameters and neurons.
    """
    neurons = model(x, y, None, T1 - T2, beta, criterion)
    steps, states = [], []
    for _ in range(T2):
        steps.append({name: p.detach().requires_grad_() for name, p in model.named_parameters()})
        neurons = torch.func.functional_call(model, steps[-1], (x, y, neurons, 1, beta, criterion, True))
        states.append(neurons)
    with torch.enable_grad():  # the read-out is part of the loss and counts as the last step's
        last = {f"model.{name}": p for name, p in steps[-1].items()}
        loss = torch.func.functional_call(_Loss(model), last, (neurons, y, criterion))
    wanted = [*(p for step in steps for p in step.values()), *(s for state in states for s in state)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    names = [name for step in steps for name in step] + [f"neurons_{i}" for i in range(len(neurons))] * T2
    result, filled = {}, dict.fromkeys(names, T2)
    for name, like, grad in zip(names, wanted, grads):
        if name not in result:
            result[name] = like.new_empty(T2, *like.shape, requires_grad=False)
        filled[name] -= 1  # from the last step back
        entry = result[name][filled[name]]
        if grad is None:
            entry.zero_()
        elif name.startswith("neurons_"):
            torch.mul(grad, -x.size(0), out=entry)
        else:
            entry.copy_(grad)
    return result


class _Loss(nn.Module):
    """The mean loss of given neurons, as a module, for `functional_call`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, neurons, y, criterion):
        return self.model.loss(neurons, y, criterion).mean()


def ep_contributions(model, x, y, T1, T2, betas, criterion):
    """The EP update between successive steps of the nudged phase, in the form of `bptt_contributions`: entry k is that
    of the k-th nudged step, which the theorem holds against the k-th free step from the end. p.grad is left as it is.

    For the neurons it is (s(k+1) - s(k)) / (beta_2 - beta_1), which tends to minus the gradient times the activation's
    slope.
    """
    kept = [p.grad for p in model.parameters()]
    state = model(x, y, None, T1, betas[0], criterion)
    result = {name: [] for name in [*dict(model.named_parameters()), *(f"neurons_{i}" for i in range(len(state)))]}
    for _ in range(T2):
        before, state = state, model(x, y, state, 1, betas[1], criterion)
        model.compute_syn_grads(x, y, before, state, betas, criterion, check_thm=True)
        for name, p in model.named_parameters():
            result[name].append(p.grad.clone())
        for i, (a, b) in enumerate(zip(before, state)):
            result[f"neurons_{i}"].append((b - a) / (betas[1] - betas[0]))
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    return {name: torch.stack(values) for name, values in result.items()}


def check_gdu(model, x, y, T1, T2, betas, criterion, alg="EP"):
    """EP's updates step by step, and what BPTT says they should be (Ernoult et al., 2019).

    Returns (BPTT, EP), dicts over parameter names and `neurons_i`, time first: see `bptt_contributions` for shapes,
    time and memory, and `ep_contributions`. The model and its p.grad are left as they are. `alg`: EP is all there is to
    compare.
    """
    if alg != "EP":
        raise ValueError(f"gducheck compares EP with BPTT, not {alg}")
    if not len(x):
        raise ValueError("the mini-batch is empty: it has no gradient")
    if T2 > T1:
        raise ValueError(f"BPTT goes back through at most T1 = {T1} steps, got T2 = {T2}")
    return bptt_contributions(model, x, y, T1, T2, betas[0], criterion), ep_contributions(model, x, y, T1, T2, betas,
            criterion)


def cosine(a, b):
    """The cosine similarity of two tensors of any one shape."""
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0, eps=1e-30).item()


def compare_gdu(BPTT, EP, estimate):
    """How far an EP estimate is from BPTT: a list of dicts, one per parameter and layer, with

    rmse        root mean square over time of their difference, divided by the larger of their own, mean over the
                entries
    sign_error  share of entries and times where their signs differ
    cosine, distance    between the sums over time: cosine similarity, and ||EP - BPTT|| / ||BPTT||; nan where T2 steps
    of
                        BPTT do not reach the parameter or layer
    """
    def rms(values):
        return values.pow(2).mean(0).sqrt()

    rows = []
    for name, bptt in BPTT.items():
        ep, bptt = EP[name].double(), bptt.double()
        larger = torch.maximum(rms(ep), rms(bptt))
        total_ep, total_bptt = ep.sum(0).flatten(), bptt.sum(0).flatten()
        reached = bool(total_bptt.any())
        rows.append({"name": name, "estimate": estimate,
                     "rmse": (rms(ep - bptt) / (larger + 1e-30)).mean().item(),
                     "sign_error": (ep * bptt < 0).double().mean().item(),
                     "cosine": cosine(total_ep, total_bptt) if reached else float("nan"),
                     "distance": ((total_ep - total_bptt).norm() / total_bptt.norm()).item() if reached
                     else float("nan")})
    return rows


def gdu_report(model, x, y, rule, criterion):
    """Both sides of gducheck for the rule's T1, T2, betas and thirdphase. Returns (rows of `compare_gdu`, BPTT, [EP at
    beta_2, and with thirdphase EP at -beta_2])."""
    beta_1, beta_2 = rule.betas
    BPTT, EP = check_gdu(model, x, y, rule.T1, rule.T2, (beta_1, beta_2), criterion)
    runs, rows = [EP], compare_gdu(BPTT, EP, "one-sided")
    if rule.thirdphase:
        runs.append(ep_contributions(model, x, y, rule.T1, rule.T2, (beta_1, -beta_2), criterion))
        rows += compare_gdu(BPTT, {name: (EP[name] + runs[1][name]) / 2 for name in EP}, "symmetric")
    return rows, BPTT, runs
