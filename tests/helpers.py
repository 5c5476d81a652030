"""What tests of several files use."""

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]  # of the repository


def load(path):
    """A Python file of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_limited(limits, *arguments):
    """Python in a process of its own, for which environment variables limit the GPU."""
    limits = {f"SB_FAST_SLIGRU_MAX_{name}": str(value) for name, value in limits.items()}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)


def stacks_of_l2(library):
    """Bytes of stack by architecture and name of the kernels without clusters in a CUDA library."""
    # Triton, which torch for CUDA brings along, has a cuobjdump: a toolkit may lack it.
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=folder)
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump")
    command = [cuobjdump, "-res-usage", str(library)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stacks = {}
    for arch, code in re.findall(r"^arch = (\w+)$(.*?)(?=^arch = |\Z)", report, re.M | re.S):
        kernels = re.findall(r"Function (\w+_l2_kernel\w+):\s+REG:\d+ STACK:(\d+)", code)
        stacks |= {(arch, name): int(stack) for name, stack in kernels}
    return stacks


@contextlib.contextmanager
def benchmark(name):
    """A script of benchmarks/ as the module of that name, which finds those beside it."""
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@contextlib.contextmanager
def small_disk(size):
    """Writing more than `size` bytes to a file fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
