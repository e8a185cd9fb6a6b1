"""Which runs `--load-path` means: run folders, files in them, folders of runs, the newest run."""

import difflib
import os
import pathlib
from collections.abc import Iterator, Sequence

from data_utils import UserError
from experiment.runs.files import exists
from experiment.text import name_path

LATEST = "latest"
CHECKPOINTS = ("model.pt", "checkpoint.tar")  # each makes a folder a run


def find_runs(paths: Sequence[str | os.PathLike], root: str = "results") -> list[pathlib.Path]:
    """The runs of --load-path, each once, in the order of the paths.

    A folder without a checkpoint of its own means every run below it that has an epoch, sorted;
    hidden folders are left out. `latest` is the run below `root` that was trained last, unless
    there is a path of that name. A path that names no run stays, for the error of the command that
    opens it. Raises UserError if no run is the latest."""
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        for run in _runs_of(pathlib.Path(path), root):
            found.setdefault(run.absolute(), run)
    return list(found.values())


def means_latest(path: str | os.PathLike) -> bool:
    """Whether a path of --load-path is the word `latest`."""
    return str(path) == LATEST and not exists(path)


def closest(path: str | os.PathLike) -> str:
    """`; did you mean RUN?` with the path of the most similar name, for an error about a path that
    does not exist; '' without one."""
    missing = pathlib.Path(path)
    while missing.name and not exists(missing.parent):
        missing = missing.parent
    try:
        names = [name for name in os.listdir(missing.parent) if not name.startswith(".")]
    except (OSError, ValueError):
        return ""
    nearest = difflib.get_close_matches(missing.name, names, 1)
    return f"; did you mean {name_path(missing.with_name(nearest[0]))}?" if nearest else ""


def _runs_of(path: pathlib.Path, root: str) -> list[pathlib.Path]:
    if means_latest(path):
        runs = list(_runs_below(pathlib.Path(root)))
        if not runs:
            raise UserError(
                f"argument --load-path: there is no run below {root}, so none is the latest; name "
                "a run folder"
            )
        return [max(runs, key=_last_epoch)]
    if _checkpoints(path):
        return [path]
    return sorted(_runs_below(path)) or [path]


def _runs_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    visited = set()  # a link can lead to a folder above itself
    for name, folders, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(name)
        folders[:] = [child for child in folders if not child.startswith(".")]
        if real in visited:
            folders.clear()
        elif _checkpoints(pathlib.Path(name)) and _is_trained(pathlib.Path(name)):
            yield pathlib.Path(name)
        visited.add(real)


def _is_trained(run: pathlib.Path) -> bool:
    """Whether a run has an epoch. gducheck saves models without one, and a training begins so. Runs
    of other programs have no config.json."""
    return any(exists(run / name) for name in ("model.pt", "metrics.csv")) or not exists(
        run / "config.json"
    )


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    return [folder / name for name in CHECKPOINTS if exists(folder / name)]


def _last_epoch(run: pathlib.Path) -> tuple[int, pathlib.Path]:
    """The time of a run's last epoch, in ns; the path decides between equal ones."""
    return max(path.stat().st_mtime_ns for path in _checkpoints(run)), run
