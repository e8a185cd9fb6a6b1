"""Names of activations and poolings, for the command line, which reads them before torch is loaded.

The implementations are in `activations.ACTIVATIONS` and `poolings.POOLS`; a test compares the
names."""

ACTIVATIONS = ("mysig", "sigmoid", "tanh", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig")
POOLINGS = ("m", "a", "i")  # max, average, none
