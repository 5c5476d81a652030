"""One run at a time in an output folder."""

import contextlib
import errno
import fcntl
import os
import socket

from speechbrain.utils.logger import get_logger

from .files import make_folder

logger = get_logger(__name__)

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock_folder(folder, key="output_folder", name=LOCK_FILE, wait=False):
    """Hold a folder, which is made if absent, against other processes, on other hosts too.

    The system releases it when the process ends, also by a kill. Workers that the process forks do
    not hold it, so it is not kept by one that lives a moment longer.

    Arguments
    ---------
    folder : str or Path
    key : str
        What messages call it.
    name : str
        Of the file that is locked in it.
    wait : bool
        Wait for a run that holds it, instead of raising an error.

    Raises
    ------
    OSError
        If it cannot be made.
    ValueError
        If another run holds it; names that run's host and process.
    """
    make_folder(folder, key)
    # Not truncated: it may be another's. Opened by nobody else in this process, whose lock the
    # closing of any other handle would release.
    with open(os.path.join(folder, name), "a+", encoding="utf-8") as file:
        try:
            _lock(file, f"{key} {folder}", wait)
        except OSError as error:
            logger.warning(
                f"{key} {folder} cannot be locked ({error.strerror}): nothing keeps a second run "
                "out of it"
            )
        else:
            file.truncate(0)
            file.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
            file.flush()
        yield


def _lock(file, folder, wait):
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        file.seek(0)
        used = f"{folder} is in use by another run ({file.read().strip()})"
        if not wait:
            raise ValueError(f"{used}: wait for its end, or choose another folder") from error
        logger.info(f"{used}: waiting for it")
        fcntl.lockf(file, fcntl.LOCK_EX)
