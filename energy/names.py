"""Names of activations and poolings, for the command line, which reads them before torch is loaded.

The implementations are in `activations` and `poolings`; a test compares the names."""

ACTIVATIONS = ("mysig", "sigmoid", "tanh", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig")
POOLINGS = {"m": "max", "a": "average", "i": "none"}  # {letter: meaning}, all 2x2 with stride 2
