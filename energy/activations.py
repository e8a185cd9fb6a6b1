"""Activations: what a neuron makes of its drive."""
import torch
import torch.nn.functional as F


def affine(x, gain, offset):
    """gain * x + offset in one pass over memory. x: a tensor of any device and floating type; offset: one without
    dimensions."""
    return torch.add(offset, x, alpha=gain)


_MINUS_TWO = torch.tensor(-2.0)


def my_sigmoid(x):
    """1 / (1 + exp(-4 (x - 1/2))): the logistic function of slope 1 at 1/2."""
    return affine(x, 4, _MINUS_TWO).sigmoid_()


# hardtanh, not clamp, writes the hard functions: its slope at the two corners is 0, as in the published models.
def hard_sigmoid(x):
    """(1 + hardtanh(2x - 1)) / 2, which is x cut to [0, 1]."""
    return F.hardtanh(x, 0.0, 1.0)


def my_hard_sig(x):
    """(1 + hardtanh(x - 1)) / 2, which is x / 2 cut to [0, 1]."""
    return F.hardtanh(x, 0.0, 2.0).mul_(0.5)


def ctrd_hard_sig(x):
    """hardtanh(2x) / 2, which is x cut to [-1/2, 1/2]."""
    return F.hardtanh(x, -0.5, 0.5)


ACTIVATIONS = {"mysig": my_sigmoid, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hard_sigmoid": hard_sigmoid,
               "my_hard_sig": my_hard_sig, "ctrd_hard_sig": ctrd_hard_sig}

# activation: (another one, gain, offset), with activation(x) = another(gain * x + offset)
RESCALED = {my_sigmoid: (torch.sigmoid, 4.0, _MINUS_TWO), my_hard_sig: (hard_sigmoid, 0.5, torch.tensor(0.0))}

# activation: the ends of what it gives
RANGES = {my_sigmoid: (0.0, 1.0), torch.sigmoid: (0.0, 1.0), torch.tanh: (-1.0, 1.0), hard_sigmoid: (0.0, 1.0),
          my_hard_sig: (0.0, 1.0), ctrd_hard_sig: (-0.5, 0.5)}
