"""main.py with --dropouts: a keep-probability for each connection, masks drawn per image and batch
and held through all phases."""

import sys

import main
from experiment import config

FLAGS = config.FLAGS

if __name__ == "__main__":
    sys.exit(main.main(flags=FLAGS, name="main_dropout.py"))
