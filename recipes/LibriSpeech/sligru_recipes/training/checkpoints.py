"""Checkpoints that neither a kill nor a full disk leaves half-written."""

import logging
import os
import shutil

from speechbrain.utils.checkpoints import Checkpoint, Checkpointer
from speechbrain.utils.distributed import ddp_barrier, if_main_process
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

UNFINISHED = "unfinished-"


class AtomicCheckpointer(Checkpointer):
    """SpeechBrain's, but a checkpoint is one only when it is complete.

    SpeechBrain recognises a checkpoint by its metadata, which it writes first. A run that is
    killed while it saves then has a newest checkpoint that lacks files, and cannot resume. Here
    the folder gets its name last.
    """

    def _new_checkpoint_dirpath(self):
        path = super()._new_checkpoint_dirpath()
        return path.with_name(UNFINISHED + path.name)

    def save_checkpoint(self, *args, verbosity=logging.INFO, **kwargs):
        """Save a checkpoint; arguments and result are SpeechBrain's.

        Raises
        ------
        OSError
            If a file cannot be written, such as on a full disk. Earlier checkpoints stay.
        """
        if if_main_process():
            for leftover in self.checkpoints_dir.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover)
        try:
            checkpoint = super().save_checkpoint(*args, verbosity=logging.DEBUG, **kwargs)
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
