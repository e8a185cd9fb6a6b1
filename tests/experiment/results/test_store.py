"""Records, and the file that keeps them: many processes, kills, full disks, damaged files."""

import base64
import errno
import io
import json
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from conftest import context

from data_utils import UserError
from experiment.results import store as stores
from experiment.results.record import Record, pack, unpack
from experiment.results.store import FILE, Store
from experiment.runs.files import Busy, Lock, WriteFailed

SETTINGS = {
    "attack": "pgd", "norm": "inf", "eps": 0.1, "gradient": "bptt", "steps": 5, "version": 1,
    "libraries": {"art": "1"},
}  # fmt: skip
VALUE = {"adversarial": 0.5, "masked": 0.0, "unmoved": 0.0, "mean_norm": 0.1}
DATA = {"task": "digits", "split": "test", "images": 8, "fingerprint": "d"}


def record(eps=0.1, value=VALUE, weights="w", data=DATA, **settings):
    return Record("attack", {"weights": weights}, data, {**SETTINGS, "eps": eps, **settings}, value)


def all_eps(folder):
    return [found.settings["eps"] for found in Store(folder).records]


# ---- what identifies a measurement


def test_a_record_is_read_as_it_was_written(tmp_path):
    new = Record.now("attack", {"weights": "w", "converged": 0.5}, DATA, SETTINGS, VALUE)
    assert new.when and new.computed_on and "torchattacks" in new.versions
    Store(tmp_path).add(new)
    (read,) = Store(tmp_path).records
    assert read == new and read.identity == new.identity


def test_time_machine_and_value_do_not_identify_a_measurement():
    new = Record.now("attack", {"weights": "w", "file": "model.pt"}, DATA, SETTINGS, {})
    assert new.identity == record().identity and record().answers(new)
    assert record(data={**DATA, "clean": 0.5}).identity == record().identity


@pytest.mark.parametrize(
    "other",
    [
        record(eps=0.2),
        record(weights="v"),
        record(gradient="ep"),
        record(steps=[5]),
        record(version=2),
        record(libraries={"art": "2"}),
        record(smooth="somehow"),
        record(data={**DATA, "task": "MNIST"}),
        record(data={**DATA, "split": "train"}),
        record(data={**DATA, "images": 9}),
        record(data={**DATA, "fingerprint": "e"}),
    ],
)
def test_everything_else_identifies_a_measurement(tmp_path, other):
    assert not record().answers(other) and not other.answers(record())
    store = Store(tmp_path)
    store.add(record())
    assert store.find(other) is None
    store.add(other)
    assert store.find(other) == other and store.find(record()) == record()


def test_what_an_earlier_version_did_not_record_matches_any_value(tmp_path):
    old = record(data={**DATA, "fingerprint": None}, version=None, libraries=None)
    for wanted in (record(), record(version=2), record(data={**DATA, "fingerprint": "e"})):
        assert old.answers(wanted) and not wanted.answers(old)
    for other in (record(0.2), record(weights="v"), record(smooth="somehow")):
        assert not old.answers(other)
    store = Store(tmp_path)
    store.add(old)
    store.add(record())
    assert len(store.records) == 1 and Store(tmp_path).find(record()) == old


def test_the_latest_incomplete_record_answers(tmp_path):
    store = Store(tmp_path)
    store.add(record(version=None, clip=True), record(version=None, clip=None))
    assert store.find(record(clip=True)).settings["clip"] is None
    assert store.find(record(clip=True, version=None)).settings["clip"] is True  # the same


def test_a_value_that_is_no_number_is_null(tmp_path):
    value = {**VALUE, "energy": [np.float32(1.5), float("nan")], "low": -float("inf")}
    Store(tmp_path).add(record(value={**value, "count": np.int64(3)}))
    (line,) = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(line)["value"] == {**VALUE, "energy": [1.5, None], "low": None, "count": 3}


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_outcomes_are_unpacked_as_they_were_packed(n):
    outcomes = np.random.default_rng(n).random(n) < 0.5
    text = pack(outcomes)
    unpacked = unpack(text, n)
    assert unpacked.dtype == bool and np.array_equal(unpacked, outcomes)
    assert unpack(text, n + 8) is None and len(text) <= 4 * (n // 24 + 1)


@pytest.mark.parametrize("text", [None, 3, "", "a", "?", "é", [], base64.b64encode(b"ab").decode()])
def test_what_is_no_packed_outcome_is_none(text):
    assert unpack(text, 5) is None


# ---- one file


def test_a_record_is_added_once(tmp_path):
    store = Store(tmp_path)
    store.add(record(), record())
    store.add(record(), record(0.2))
    store.add(record(value={**VALUE, "adversarial": 0.25}))
    assert all_eps(tmp_path) == [0.1, 0.2] and store.find(record()).value == VALUE
    size = (tmp_path / FILE).stat().st_size
    store.add()
    assert (tmp_path / FILE).stat().st_size == size


def test_records_of_others_are_found(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.add(record())
    assert second.find(record()) is None
    second.refresh()
    assert second.find(record()) == record()
    second.add(record(0.2))
    first.add(record(0.2), record(0.3))
    assert [r.settings["eps"] for r in first.records] == all_eps(tmp_path) == [0.1, 0.2, 0.3]


def _damaged():
    good = json.loads(record().to_json())
    yield from ("{", "[]", "null", "1", '"attack"', "\0\0\0", "\ud800", "[" * 10**5, "9" * 10**4)
    for parts in (
        {"kind": "other"}, {"kind": ["attack"]}, {"model": []}, {"settings": None}, {"value": {}},
        {"data": {"images": -1}}, {"data": {"images": "x"}}, {"data": {"images": 10**400}},
        {"versions": "1"},
    ):  # fmt: skip
        yield json.dumps({**good, **parts})
    for name, values in {
        "eps": (None, "0.1", True, -1, [0.1]), "norm": (None, 2, "2" * 100, "\n"),
        "attack": (None, {}, "\x1b[2J"), "gradient": (None, 0),
    }.items():  # fmt: skip
        for value in values:
            yield json.dumps({**good, "settings": {**SETTINGS, name: value}})
    for name, values in {
        "adversarial": (None, "0.5", 1.5, -0.1, True), "masked": (None, [], 2), "unmoved": ("0",),
        "mean_norm": ("0.1", True, [0.1]),
    }.items():  # fmt: skip
        for value in values:
            yield json.dumps({**good, "value": {**VALUE, name: value}})
    deep = "[" * 900 + "]" * 900
    yield record().to_json().replace('"d"', deep)


@pytest.mark.parametrize("line", _damaged(), ids=range(len(list(_damaged()))))
def test_a_damaged_line_is_left_out_with_a_note(tmp_path, capsys, line):
    store = Store(tmp_path)
    store.add(record())
    with open(tmp_path / FILE, "a", errors="surrogatepass") as file:
        file.write(line + "\n\n")
    store.add(record(0.2))
    assert capsys.readouterr().err == f"note: 1 damaged line of {tmp_path / FILE} left out\n"
    assert all_eps(tmp_path) == [0.1, 0.2]
    assert [r.settings["eps"] for r in store.records] == [0.1, 0.2]


def test_texts_of_a_record_are_one_line(tmp_path):
    content = json.loads(record().to_json())
    text = json.dumps({**content, "computed_on": "a\nb\x1b", "when": {"a": "\r"}})
    (tmp_path / FILE).write_text(text + "\n")
    (found,) = Store(tmp_path).records
    assert found.computed_on == "a?b?" and found.when.isprintable()


def test_a_begun_line_is_no_record_and_is_removed(tmp_path, capsys):
    store = Store(tmp_path)
    store.add(record(), record(0.2))
    path = tmp_path / FILE
    whole = path.read_bytes()
    for end in (whole.index(b"\n") + 1, whole.index(b"\n") + 9, len(whole) - 2):
        path.write_bytes(whole[:end])
        assert all_eps(tmp_path) == [0.1]
        store.add(record(0.3))
        assert all_eps(tmp_path) == [0.1, 0.3]
    for end in (0, 9):  # of the first record
        path.write_bytes(whole[:end])
        assert all_eps(tmp_path) == []
        store.add(record(0.3))
        assert all_eps(tmp_path) == [0.3]
    assert capsys.readouterr().err == ""


def test_another_file_of_that_name_is_read_anew(tmp_path):
    path = tmp_path / FILE
    store = Store(tmp_path)
    store.add(record(), record(0.2))
    for lines in ([0.3], [0.1, 0.3], [0.3, 0.2, 0.1, 0.4], [], [0.5]):
        path.write_text("".join(record(eps).to_json() + "\n" for eps in lines))
        store.refresh()
        assert [r.settings["eps"] for r in store.records] == lines
        assert store.find(record(0.6)) is None and (store.find(record(0.3)) is None) != (
            0.3 in lines
        )
    path.unlink()
    store.refresh()
    assert store.records == []
    store.add(record())
    assert all_eps(tmp_path) == [0.1]


class FullDisk(io.FileIO):
    """A file of which only the first bytes of a write reach the disk."""

    space = 100

    def write(self, text):
        if self.space <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(bytes(text)[: self.space])
        self.space -= written
        return written


def _full(path, mode, buffering, opener):
    assert (mode, buffering) == ("ab+", 0)
    return FullDisk(path, "ab+", opener=opener)


@pytest.mark.parametrize("before", [[], [0.1, 0.2]])
def test_a_full_disk_leaves_the_records_as_they_were(tmp_path, monkeypatch, before):
    store = Store(tmp_path)
    store.add(*map(record, before))
    with monkeypatch.context() as patch:
        patch.setattr(stores, "open", _full, raising=False)
        with pytest.raises(WriteFailed, match="cannot write .*: no space left$"):
            store.add(record(0.3), record(0.4))
    assert all_eps(tmp_path) == before
    content = (tmp_path / FILE).read_bytes()
    assert content.count(b"\n") == len(before) and content[-1:] in (b"\n", b"")
    store.add(record(0.3), record(0.4))
    assert all_eps(tmp_path) == [*before, 0.3, 0.4]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link"])
def test_no_record_is_written_through_a_link(tmp_path, kind):
    outside = tmp_path / "precious"
    run = tmp_path / "run"
    run.mkdir()
    if kind != "dangling link":
        outside.write_text(record().to_json() + "\n")
    if kind == "hard link":
        (run / FILE).hardlink_to(outside)
    else:
        (run / FILE).symlink_to(outside)
    Store(run).add(record(0.2))
    assert all_eps(run) == [0.1, 0.2] if kind != "dangling link" else [0.2]
    assert not (run / FILE).is_symlink()
    assert kind == "dangling link" or outside.read_text() == record().to_json() + "\n"
    assert outside.exists() == (kind != "dangling link")


@pytest.mark.parametrize("kind", ["folder", "pipe", "unreadable", "too large"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, kind):
    path = tmp_path / FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "too large":
        monkeypatch.setattr(stores, "LARGEST", 10)
        path.write_text("a" * 11)
    else:
        refused = PermissionError(errno.EACCES, "Permission denied")

        def refuse(path):
            raise refused

        monkeypatch.setattr(stores, "open_regular", refuse)
    with pytest.raises(UserError) as error:
        Store(tmp_path)
    assert str(error.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(error.value) and error.value.__cause__ is None


# ---- several processes


def _wait_for(path):
    while not path.exists():
        time.sleep(0.001)


def add_each(folder, numbers):
    """Adds records one after another, once the file `go` is there."""
    store = Store(folder)
    _wait_for(folder.parent / "go")
    for n in numbers:
        store.add(record(n), record(n + 0.5))


def test_pairs_of_processes_add_every_record_once(tmp_path):
    pairs = []
    for pair in range(8):
        folder = tmp_path / str(pair)
        folder.mkdir()
        for numbers in (range(8), range(4, 12)):
            pairs.append(context.Process(target=add_each, args=(folder, numbers)))
            pairs[-1].start()
    (tmp_path / "go").touch()
    for process in pairs:
        process.join(60)
        assert process.exitcode == 0
    for pair in range(8):
        found = all_eps(tmp_path / str(pair))
        assert sorted(found) == [n / 2 for n in range(24)]
        assert not list((tmp_path / str(pair)).glob(".*"))


def add_without_end(folder):
    store = Store(folder)
    n = 0
    while True:
        n += 1
        store.add(record(n), record(n + 0.5, value={**VALUE, "outcomes": "a" * 10**5}))


def test_a_kill_leaves_whole_records(tmp_path, capsys):
    moments = random.Random(0)
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = context.Process(target=add_without_end, args=(folder,))
        process.start()
        _wait_for(folder / FILE)
        time.sleep(0.05 * moments.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed = all_eps(folder)
        expected = [n / 2 for n in range(2, 2 + len(killed))]
        assert killed == expected
        store = Store(folder)
        store.add(record(0.25), record(1))
        assert all_eps(folder) == [*expected, 0.25] + [1] * (not killed)
        assert (folder / FILE).read_bytes().endswith(b"\n")
    assert capsys.readouterr().err == ""


def test_a_process_waits_for_the_others(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path)
    for name in ("NOTED_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(stores, name, 0.05)
    other = Lock(tmp_path, "results")
    timer = threading.Timer(0.5, other.release)
    timer.start()
    store.add(record())
    timer.join()
    assert all_eps(tmp_path) == [0.1]
    err = capsys.readouterr().err
    assert err.startswith("note: waiting to write ") and f"process {os.getpid()} on" in err
    assert err.count("\n") == 1


def test_a_lock_file_that_a_kill_left_loses_no_record(tmp_path, monkeypatch, capsys):
    def busy(*_):
        raise Busy("locked", "process 1 on elsewhere", "; if it has ended, delete the file")

    store = Store(tmp_path)
    monkeypatch.setattr(stores, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(stores, "Lock", busy)
    store.add(record())
    assert all_eps(tmp_path) == [0.1]
    assert (
        "is written without its lock; if it has ended, delete the file" in capsys.readouterr().err
    )


def test_a_whole_record_without_an_end_is_kept(tmp_path):
    """As an editor may save it."""
    (tmp_path / FILE).write_text(f"{record(0.1).to_json()}\n{record(0.2).to_json()}")
    store = Store(tmp_path)
    assert [own.settings["eps"] for own in store.records] == [0.1, 0.2]
    store.add(record(0.2), record(0.3))
    assert all_eps(tmp_path) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("foreign", ['{"my": "own results"}', "\0binary" * 500])
def test_what_another_program_wrote_stays(tmp_path, foreign, capsys):
    (tmp_path / FILE).write_text(foreign)
    Store(tmp_path).add(record(0.1))
    assert (tmp_path / FILE).read_text() == f"{foreign}\n{record(0.1).to_json()}\n"
    assert "1 damaged line" in capsys.readouterr().err


def test_no_record_is_lost_to_a_machine_with_locks_of_its_own(tmp_path, monkeypatch):
    first, second = Store(tmp_path), Store(tmp_path)
    first.add(record(0.1))
    monkeypatch.setattr(second, "refresh", lambda: None)  # it has not seen the record yet
    second._append([record(0.2)])
    assert all_eps(tmp_path) == [0.1, 0.2]
