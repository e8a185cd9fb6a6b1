"""Energy models: activations, poolings, connections between layers, and their dynamics."""
