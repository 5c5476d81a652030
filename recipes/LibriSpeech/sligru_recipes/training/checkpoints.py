"""Checkpoints that neither a kill nor a full disk leaves half-written, and which are tested."""

import logging
import os
import pickle
import shutil
from functools import partial

import torch
import yaml
from speechbrain.core import INTRA_EPOCH_CKPT_FLAG
from speechbrain.utils.checkpoints import (
    METAFNAME,
    Checkpoint,
    Checkpointer,
    average_checkpoints,
    ckpt_recency,
)
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

UNFINISHED = "unfinished-"
# What loading a file that is damaged or of something else raises, each in several cases.
LOAD_ERRORS = (
    EOFError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    yaml.YAMLError,
)


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's, but a checkpoint is one only when it is complete.

    SpeechBrain recognises a checkpoint by its metadata, which it writes first. A run that is
    killed while it saves then has a newest checkpoint that lacks files, and cannot resume. Here
    the folder gets its name last.

    The metadata also has `settings`, a dict of strings (see resume.py): what the run was told.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = {}

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def save_checkpoint(self, meta={}, *args, verbosity=logging.INFO, **kwargs):  # noqa: B006
        """Save a checkpoint; arguments and result are SpeechBrain's.

        Raises
        ------
        OSError
            If a file cannot be written, such as on a full disk. Earlier checkpoints stay.
        """
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
        meta = {**meta, "settings": self.settings}
        try:
            checkpoint = super().save_checkpoint(meta, *args, verbosity=logging.DEBUG, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save's is a RuntimeError
            free = shutil.disk_usage(self.checkpoints_dir).free / 2**20
            raise OSError(
                f"no checkpoint could be saved in {self.checkpoints_dir} ({free:.0f} MiB free): "
                f"{str(error).splitlines()[0]}"
            ) from error
        if checkpoint is not None:  # on the main process
            path = checkpoint.path.with_name(checkpoint.path.name.removeprefix(UNFINISHED))
            os.rename(checkpoint.path, path)
            logger.log(verbosity, f"Saved a checkpoint in {path}")
            files = {name: path / file.name for name, file in checkpoint.paramfiles.items()}
            checkpoint = Checkpoint(path, checkpoint.meta, files)
        ddp_barrier()  # all processes list the checkpoints next
        return checkpoint

    def list_checkpoints(self):
        """SpeechBrain's; a ValueError names metadata that cannot be read."""
        for folder in self._list_checkpoint_dirs():
            path = folder / METAFNAME
            try:
                meta = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is damaged: {reason_of(error)}") from error
            if not isinstance(meta, dict) or "unixtime" not in meta:
                raise ValueError(f"{path} is damaged: it has no time; remove {folder}")
        return super().list_checkpoints()

    def _call_load_hooks(self, checkpoint):
        try:
            super()._call_load_hooks(checkpoint)
        except LOAD_ERRORS as error:
            file, reason = self._find_unfit(checkpoint) or (checkpoint.path, error)
            raise ValueError(
                f"{file} is damaged, or of another model: {reason_of(reason)}"
            ) from error

    def _find_unfit(self, checkpoint):
        """The first file that cannot be loaded, and why."""
        recoverables = self.recoverables
        try:
            for name, recoverable in recoverables.items():
                self.recoverables = {name: recoverable}
                try:
                    super()._call_load_hooks(checkpoint)
                except LOAD_ERRORS as error:
                    return checkpoint.path / f"{name}.ckpt", error
        finally:
            self.recoverables = recoverables


def reason_of(error):
    """One of LOAD_ERRORS in a line."""
    if isinstance(error, EOFError | pickle.PickleError):
        return "nothing can be read from it"  # torch's own message is an essay
    # Of several weights that do not fit, the first.
    return " ".join(" ".join(str(error).splitlines()[:2]).split()) or type(error).__name__


def recency_of_finished(checkpoint):
    """SpeechBrain's key of importance by recency, for checkpoints of finished epochs only."""
    return 0 if INTRA_EPOCH_CKPT_FLAG in checkpoint.meta else ckpt_recency(checkpoint)


def checkpoints_to_test(checkpointer, best_by, count):
    """The checkpoint of lowest `best_by`, or the last `count` to be averaged; the newest first.

    Raises
    ------
    FileNotFoundError
        If there is none of a finished epoch.
    """
    folder = checkpointer.checkpoints_dir
    if count == 1:
        found = checkpointer.find_checkpoints(min_key=best_by, max_num_checkpoints=1)
    else:
        found = checkpointer.find_checkpoints(
            ckpt_predicate=lambda checkpoint: best_by in checkpoint.meta, max_num_checkpoints=count
        )
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint of a finished epoch")
    if len(found) < count:
        logger.warning(
            f"avg_checkpoints is {count}, but {folder} has only {len(found)} of finished epochs: "
            "these are averaged"
        )
    return found


def average_model(checkpoints):
    """The mean of the state_dicts in their model.ckpt, on the CPU."""
    return average_checkpoints(
        checkpoints, "model", parameter_loader=partial(torch.load, map_location="cpu")
    )
