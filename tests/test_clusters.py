"""Runs on clusters: signals of batch systems, commands that are started again, workers on several machines."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, context
from test_resume import MLP

import main
from experiment.console import SIGNALS

LONG = MLP + " --train-size 1437 --T1 100 --epochs 500"


def enter(folder, words, ignored):
    """main.py in this process, standard output and error in the files `out` and `err` of the folder."""
    os.chdir(folder)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout, sys.stderr = (open(name, "a", buffering=1) for name in ("out", "err"))
    sys.exit(main.main(words))


def start(folder, line, ignored=()):
    """A process that runs main.py in the folder; libraries are loaded already, so that it begins at once."""
    process = context.Process(target=enter, args=(str(folder), line.split(), ignored))
    process.start()
    return process


def wait_for(path, text):
    """Returns when the file contains the text."""
    began = time.monotonic()
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() - began < 60, (path, text)
        time.sleep(0.01)


# ---- signals


@pytest.mark.parametrize("number", [n for n in SIGNALS if n not in (signal.SIGINT, signal.SIGTERM)])
def test_signals_of_batch_systems_end_a_run_in_order(tmp_path, number):
    process = start(tmp_path, LONG)
    wait_for(tmp_path / "out", "results go to")
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert "epochs are saved in" in (tmp_path / "err").read_text()


def test_signals_that_were_ignored_at_the_start_stay_ignored(tmp_path):
    """As with nohup, or of a command that a script started in the background."""
    process = start(tmp_path, MLP + " --epochs 60", ignored=SIGNALS)
    wait_for(tmp_path / "out", "epoch 1/60")
    for number in SIGNALS:
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0 and "epoch 60/60" in (tmp_path / "out").read_text()


def test_an_ignored_interrupt_stays_ignored_while_libraries_load():
    program = ("import runpy, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = ['main.py', "
               f"'--help']\ntry: runpy.run_path({str(ROOT / 'main.py')!r}, run_name='__main__')\n"
               "except SystemExit: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "True", done.stderr


STUB = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
    signal.signal(number, lambda number, frame: (print("got", number), time.sleep(0.3), sys.exit(128 + number)))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number, to_all", [(signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_script_of_check_passes_signals_on_and_ends(tmp_path, number, to_all):
    """SIGINT as a terminal sends it, to the script and to its command."""
    (tmp_path / "stub.py").write_text(STUB)
    script = (f'source {ROOT}/check/common.sh mnist; launcher=("$python" {tmp_path}/stub.py); suite main.py; '
              "echo went on")
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_all else os.kill)(process.pid, number)
    out, _ = process.communicate(timeout=30)
    assert out == f"got {int(number)}\n" and process.returncode == 128 + number
