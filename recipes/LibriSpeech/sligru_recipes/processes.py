"""Worker processes: how many the machine has CPUs for, and that none outlives its parent."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from speechbrain.utils.parallel import get_available_cpu_count

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def available_cpus(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """CPUs that this process may use: SpeechBrain's count, or less where a control group has less.

    Version 2 has cpu.max in each group below `root`, version 1 cpu.cfs_quota_us and
    cpu.cfs_period_us below cpu/ there. Within a container the path of `groups` can be the host's,
    which is not there.

    Returns
    -------
    int
        At least 1; a part of a CPU counts as one.
    """
    counts = [get_available_cpu_count()]
    try:
        lines = Path(groups).read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, names = Path(root), ("cpu.max",)
        elif "cpu" in controllers.split(","):
            top, names = Path(root, "cpu"), ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        path = top / group.lstrip("/")
        for folder in (path, *path.parents):
            if folder.is_relative_to(top):
                try:
                    words = " ".join((folder / name).read_text() for name in names).split()
                    quota, period = map(int, words)
                except (OSError, ValueError):  # ValueError: "max"
                    continue
                if quota > 0:  # -1: no limit
                    counts.append(math.ceil(quota / period))
    return min(counts)


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
