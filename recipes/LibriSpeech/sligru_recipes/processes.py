"""Worker processes that do not outlive the process that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent():
    """Let the system kill this worker when its parent ends, however that happens.

    For a worker of `multiprocessing` to call first, as the initializer of an executor for
    instance. A parent that ends by SIGTERM or SIGKILL tells its workers nothing, and one that is
    computing, or waits for a task, would go on for ever. Systems other than Linux do not offer
    this; nothing happens there.

    Raises
    ------
    OSError
        If the system refuses.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl: {os.strerror(error)}")
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)
