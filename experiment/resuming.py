"""How a training goes on: from which file it may, and the command that does."""
import pathlib
import shlex

from data_utils import UserError
from experiment.checkpoints import open_saved
from experiment.files import exists
from experiment.flags import ALL, typed


def refuse_to_undo(saved):
    """Raises UserError where going on from a file would undo epochs that its run has."""
    latest = saved.path.with_name("checkpoint.tar")
    if saved.path.name != latest.name and exists(latest):
        epochs = [len(run.story.history) for run in (saved, open_saved(latest, "train"))]
        if epochs[0] != epochs[1]:
            raise UserError(f"{saved.path} has {epochs[0]} epochs, {latest} {epochs[1]}, which going on would undo: "
                            "copy the file to a folder of its own")


def epochs_left(saved):
    """How many epochs a run lacks of those that it was asked for; 0 where it has them all."""
    return max(0, saved.story.asked - len(saved.story.history))


def how_to_go_on(job, folder, first):
    """What is saved of a training that began after `first` epochs, and the shortest command that goes on with it.

    job: its args, given (the flags of its command line, judged), saved (the run that it goes on with, or None) and
    program (the words in front of the flags) count; folder: of the run, None without one."""
    if not folder:
        return "nothing was saved, for want of --save"
    if not exists(pathlib.Path(folder, "checkpoint.tar")):
        return f"nothing is left to resume in {folder}"
    done = len(open_saved(folder, "train").story.history)  # an epoch may just be written
    if done - first >= job.args.epochs:
        return f"all {done} epochs are saved in {folder}"
    words = list(job.program)
    for flag in ALL:
        # what this session changes is in the run only once it has an epoch
        new = flag.scope == "session" or job.saved and done == first
        if flag.dest in job.given and new and flag.name not in ("todo", "load-path", "save", "epochs"):
            words += typed(flag, job.given[flag.dest])
    settings = {"load_path": folder, "epochs": job.args.epochs - (done - first)}
    words += [word for flag in ALL if flag.dest in settings for word in typed(flag, settings[flag.dest])]
    return f"{done} epochs are saved in {folder}, resume with\n  {shlex.join(words)}"
