"""What a measurement was made on, and torch's TF32 switches; needs torch alone."""

import contextlib
import platform
import re
import subprocess
from pathlib import Path

import torch


def processor_name():
    """Name of the CPU, such as "AMD EPYC 9554 64-Core Processor", as the system tells it.

    Returns
    -------
    str
        Of /proc/cpuinfo; where there is none, what Python's `platform` knows.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def gpu_driver():
    """Version of the NVIDIA driver.

    Returns
    -------
    str or None
        None if nvidia-smi cannot be run.
    """
    version = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return version.splitlines()[0] if version else None  # a line for each GPU


def commit_of(folder):
    """HEAD of the git repository that a folder is in.

    Arguments
    ---------
    folder : str or Path

    Returns
    -------
    str or None
        The hash, with "+" appended if tracked files are modified; None outside of git.
    """
    git = ("git", "-C", str(folder))
    head = _output_of(*git, "rev-parse", "HEAD")
    changes = _output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changes else "")


@contextlib.contextmanager
def tf32(enabled):
    """Set whether cuBLAS and cuDNN compute float32 products in TF32; afterwards it is as before.

    Importing SpeechBrain turns it on.

    Arguments
    ---------
    enabled : bool
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _output_of(*command):
    """What a command prints, or None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
