"""For torchrun: runs main.py in each folder of a JSON file {folder: words}, one after the other, to
import libraries only once."""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import main  # noqa: E402
import main_dropout  # noqa: E402

for n, (folder, words) in enumerate(json.loads(pathlib.Path(sys.argv[1]).read_text()).items()):
    os.chdir(folder)
    # by which torchrun keeps the meetings of successive workers apart
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(n)
    if main.main(words, main_dropout.FLAGS):
        sys.exit(f"{folder} failed")
