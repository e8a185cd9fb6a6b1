"""main.py with --dropouts: the probability of keeping a neuron, for each connection.

Dropout masks are drawn for each image and mini-batch, and are the same in all phases of it."""

import sys

import main
from experiment import config

FLAGS = config.FLAGS

if __name__ == "__main__":
    sys.exit(main.main(flags=FLAGS, name="main_dropout.py"))
