"""The dynamics of an energy model: what a neuron does with its drive, how layers are connected, how
time steps are taken."""
