"""What the choices of all operators share: the forced backend, and the properties of a GPU."""

import contextlib
import functools
import warnings
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "cpu", "stepwise", "persistent")

_forced = "auto"


@contextlib.contextmanager
def backend(name):
    """Force every operator call inside the `with` block onto one backend.

    Arguments
    ---------
    name : str
        "reference" (PyTorch loop: any device, differentiable twice), "cpu" (compiled, CPU tensors),
        "stepwise" (CUDA: the time loop in C++), "persistent" (CUDA, sm_90 and newer: the whole
        sequence in one kernel) or "auto". The setting is process-wide.

    Raises
    ------
    ValueError
        For an unknown name. A known backend that cannot serve a call raises in that call.

    Example
    -------
    >>> from sb_fast_sligru.ops import light_gru
    >>> with backend("reference"):
    ...     h = light_gru(torch.rand(2, 5, 8), torch.rand(8, 4), layer_norm=True)
    >>> h.shape
    torch.Size([2, 5, 4])
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced_backend():
    """The name that `backend` has set, "auto" outside of it."""
    return _forced


def choose(device, obstacles):
    """The first backend that nothing keeps from serving a call, and why.

    Arguments
    ---------
    device : torch.device
    obstacles : dict
        Of each compiled backend of the device, the fastest first: what keeps it from serving the
        call, "" if nothing does.

    Returns
    -------
    name : str
    reason : str
        One clause, for people.

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve the call.
    """
    if _forced == "reference":
        return "reference", "forced"
    if _forced != "auto":
        obstacle = obstacles.get(_forced, f"it does not serve {device.type} tensors")
        if obstacle:
            raise RuntimeError(f'backend("{_forced}") is forced, but {obstacle}')
        return _forced, "forced"
    for name, obstacle in obstacles.items():
        if not obstacle:
            rejected = [f"not {other}: {why}" for other, why in obstacles.items() if why]
            return name, "; ".join(rejected) or "the fastest"
    return "reference", next(iter(obstacles.values()), f"no kernels for {device.type} tensors")


class Gpu(NamedTuple):
    """What of a GPU decides which kernels run on it (cuda_ops/common/gpu.h)."""

    capability: int
    """Compute capability, 90 for 9.0."""
    has_cluster_code: bool
    """The library holds code with thread-block clusters for it."""
    has_warpgroup_code: bool
    """The library holds code with warpgroup products for it, which 9.0a alone has."""
    shared_bytes: int
    """Shared memory that a block may have."""
    clusters_of_4: int
    """Clusters of 4 blocks that run at once, each block with a multiprocessor to itself."""
    clusters_of_8: int
    clusters_of_16: int


@functools.cache
def gpu(device_index):
    """The properties of a CUDA device, as a `Gpu`; the driver is asked once.

    Arguments
    ---------
    device_index : int

    Raises
    ------
    RuntimeError
        If the environment variable SB_FAST_SLIGRU_MAX_CLUSTER is not a number from 1 to 16.
    """
    return Gpu(*torch.ops.sb_fast_sligru.gpu(device_index))


_warned = set()


def warn_once(reason):
    """Say that the slow loop runs; each reason once in a process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"sb_fast_sligru runs its slow PyTorch loop (same results): {reason}",
            stacklevel=4,
        )
