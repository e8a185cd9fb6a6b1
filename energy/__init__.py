"""The dynamics of an energy model: what a neuron does with its drive, how layers are connected, how steps are taken."""
