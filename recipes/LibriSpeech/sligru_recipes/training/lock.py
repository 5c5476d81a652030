"""One run at a time in an output folder."""

import contextlib
import errno
import fcntl
import os
import socket

from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(folder):
    """Hold a folder, which is made if absent, against other processes, on other hosts too.

    The system releases it when the process ends, also by a kill. Workers that the process forks do
    not hold it, so it is not kept by one that lives a moment longer.

    Raises
    ------
    ValueError
        If another run holds it; names that run's host and process.
    """
    os.makedirs(folder, exist_ok=True)
    # Not truncated: it may be another's. Opened by nobody else in this process, whose lock the
    # closing of any other handle would release.
    with open(os.path.join(folder, LOCK_FILE), "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"output_folder {folder} is in use by another run ({file.read().strip()}): "
                    "wait for its end, or choose another folder"
                ) from error
            logger.warning(
                f"output_folder {folder} cannot be locked ({error.strerror}): nothing keeps a "
                "second run out of it"
            )
        else:
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
            file.flush()
        yield
