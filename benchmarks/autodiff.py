"""Textbook baseline of all benchmarks: EP and BPTT by automatic differentiation of Phi.

A step differentiates Phi with respect to the neurons, an EP update differentiates it with respect
to the parameters, and BPTT differentiates through these derivatives a second time. Nothing is
cached between steps. The memory layout is PyTorch's default."""

import copy

import torch


def textbook(model):
    """A copy of `model` in PyTorch's default layout."""
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def relax(model, x, y, neurons, T, beta, criterion, check_thm=False):
    """Neurons after T steps. check_thm: keep the graph through the steps (unrolled)."""
    linear_output = not model.softmax and not isinstance(criterion, torch.nn.MSELoss)
    neurons = [n if check_thm and n.requires_grad else n.detach().requires_grad_() for n in neurons]
    for _ in range(T):
        phi = model.Phi(x, y, neurons, beta, criterion)
        if torch.is_tensor(phi):
            drives = torch.autograd.grad(phi.sum(), neurons, create_graph=check_thm)
        else:
            drives = [
                torch.autograd.grad(p.sum(), n, create_graph=check_thm, retain_graph=True)[0]
                for p, n in zip(phi, neurons)
            ]
        neurons = [
            d if linear_output and n == len(drives) - 1 else model.activation(d)
            for n, d in enumerate(drives)
        ]
        if not check_thm:
            neurons = [n.detach().requires_grad_() for n in neurons]
    return neurons


def zeros(model, x):
    return [n.contiguous() for n in model.init_neurons(x.size(0), x.device)]


def criterion_of(rule):
    return (torch.nn.MSELoss if rule.loss == "mse" else torch.nn.CrossEntropyLoss)(reduction="none")


def ep_gradients(model, x, y, rule):
    criterion = criterion_of(rule)
    beta_1, beta_2 = rule.betas
    free = relax(model, x, y, zeros(model, x), rule.T1, beta_1, criterion)
    first = free
    second = relax(model, x, y, free, rule.T2, beta_2, criterion)
    if rule.thirdphase:
        first = second
        second = relax(model, x, y, free, rule.T2, -beta_2, criterion)
        beta_1, beta_2 = beta_2, -beta_2
    model.zero_grad()
    before = model.Phi(x, y, first, beta_1, criterion).mean()
    after = model.Phi(x, y, second, beta_2, criterion).mean()
    ((after - before) / (beta_1 - beta_2)).backward()
    return free


def bptt_gradients(model, x, y, rule):
    criterion = criterion_of(rule)
    neurons = relax(model, x, y, zeros(model, x), rule.T1 - rule.T2, 0.0, criterion)
    neurons = relax(model, x, y, neurons, rule.T2, 0.0, criterion, check_thm=True)
    model.zero_grad()
    model.loss(neurons, y, criterion).mean().backward()
    return neurons


def separate_backpropagations(model, x, y, T1, T2, criterion):
    """BPTT contributions per step, by T2 + 1 separate back-propagations.

    The gradient through the last K steps minus the gradient through the last K - 1 is the
    contribution of the K-th step from the end. Returns the same numbers as
    `energy.gdu.bptt_contributions`; the cost is quadratic in T2."""
    names = [name for name, _ in model.named_parameters()]
    result = {name: [] for name in names}
    before = None
    for K in range(T2 + 1):
        neurons = [
            n.detach().requires_grad_() for n in model(x, None, None, T1 - K, criterion=criterion)
        ]
        last = model(x, None, neurons, K, criterion=criterion, check_thm=True)
        wanted = [*model.parameters(), *neurons]
        grads = torch.autograd.grad(
            model.loss(last, y, criterion).mean(), wanted, allow_unused=True
        )
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted)]
        if K > 0:
            for n, name in enumerate(names):
                readout = (
                    K == 1
                    and model.softmax
                    and name.startswith(f"synapses.{len(model.synapses) - 1}.")
                )
                result[name].append(grads[n] if readout else grads[n] - before[n])
        if K < T2:
            for i, grad in enumerate(grads[len(names) :]):
                result.setdefault(f"neurons_{i}", []).append(-grad * x.size(0))
        before = grads
    return {name: torch.stack(values) for name, values in result.items()}
