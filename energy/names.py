"""Names of activations and poolings, for the command line, which reads them before torch is loaded.

`activations.ACTIVATIONS` and `poolings.POOLS` hold what they stand for; a test keeps both sides
equal."""

ACTIVATIONS = ("mysig", "sigmoid", "tanh", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig")
POOLINGS = ("m", "a", "i")  # max, average, none
