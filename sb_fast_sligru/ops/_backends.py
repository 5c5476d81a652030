"""What the choices of all operators share: the forced backend, and the properties of a GPU."""

import contextlib
import contextvars
import functools
import warnings
from typing import NamedTuple

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

from .. import _library

BACKENDS = ("auto", "reference", "cpu", "stepwise", "persistent")

_blocks = contextvars.ContextVar(
    "sb_fast_sligru_blocks", default=()
)  # the open ones, outermost first
_forced = contextvars.ContextVar("sb_fast_sligru_backend")


class _Setting:
    """The forced backend, where torch.compile can see and guard it.

    It cannot trace a context variable's methods, but reads an attribute whose getter is written in
    C when it traces, and again before each call of what it has compiled.
    """

    name = property(_forced.get)  # called with the instance, which is thus the value if none is set
    traced = None  # set by `backend` within a compiled function


_setting = _Setting()


@contextlib.contextmanager
def backend(name):
    """Force every operator call inside the `with` block onto one backend.

    Arguments
    ---------
    name : str
        "reference" (PyTorch loop: any device, differentiable any number of times, forwards too),
        "cpu" (compiled, CPU tensors), "stepwise" (CUDA: the time loop in C++), "persistent" (CUDA:
        the whole sequence in one kernel) or "auto".

    It holds in this thread or asyncio task and in tasks that it starts, not in other threads. A
    backward pass is that of its forward pass, wherever it runs. torch's checkpointing runs the
    forward again, on a GPU in a thread of its own: give it a `context_fn` that returns
    `(backend(name), backend(name))`.

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
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    if torch.compiler.is_compiling():
        before, _setting.traced = _setting.traced, name
        try:
            yield
        finally:
            _setting.traced = before
    else:
        block = [name]  # a list, which is equal to others but not the same
        _hold((*_blocks.get(), block))
        try:
            yield
        finally:
            # Not the token of `ContextVar.set`: blocks of generators may end in any order.
            _hold(tuple(other for other in _blocks.get() if other is not block))


def _hold(blocks):
    _blocks.set(blocks)
    _forced.set(blocks[-1][0] if blocks else _setting)


def forced_backend():
    """The name that `backend` has set, "auto" outside of it."""
    name = _setting.traced or _setting.name
    return "auto" if name is _setting else name


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
    forced = forced_backend()
    if forced == "reference":
        return "reference", "forced"
    if forced != "auto":
        obstacle = obstacles.get(forced, f"it does not serve {device.type} tensors")
        if obstacle:
            raise RuntimeError(f'backend("{forced}") is forced, but {obstacle}')
        return forced, "forced"
    rejected = []
    for name, obstacle in obstacles.items():
        if not obstacle:
            return name, "; ".join(rejected) or "the fastest"
        rejected.append(f"not {name}: {obstacle}")
    return "reference", next(iter(obstacles.values()), f"no kernels for {device.type} tensors")


@torch.compiler.assume_constant_result  # torch.compile guards both states itself
def derivative_obstacle():
    """What keeps compiled kernels from serving a call of this thread now, "" if nothing does.

    They have the derivative that autograd's backward takes. Forward-mode derivatives would be lost
    without a word, and the gradients of torch.func fail.
    """
    if forward_ad._current_level >= 0:
        return 'compiled kernels have no forward-mode derivative; backend("reference") has'
    gradients = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
    if any(level.key() in gradients for level in _functorch.get_interpreter_stack() or ()):
        return 'compiled kernels have no gradient for torch.func; backend("reference") has'
    return ""


def library_obstacle(device):
    """What keeps every compiled backend of a CPU or CUDA device from serving a call now.

    Returns
    -------
    obstacle : str
        "" if nothing does.
    """
    if device.type == "cpu":
        return _library.cpu_error or derivative_obstacle()
    return _library.cuda_error or _missing_code(index_of(device)) or derivative_obstacle()


def choose_kernels(device, kernels_obstacle):
    """`choose` for an operator with one implementation on GPUs, whatever backend is forced there.

    Arguments
    ---------
    device : torch.device
    kernels_obstacle : callable
        Returns what keeps the CUDA kernels from the call, "" if nothing does; called if there are
        any.
    """
    if device.type == "cpu":
        return choose(device, {"cpu": library_obstacle(device)})
    if device.type != "cuda" or forced_backend() == "reference":
        return choose(device, {})
    obstacle = library_obstacle(device) or kernels_obstacle()
    return choose(device, dict.fromkeys(("cuda", "stepwise", "persistent"), obstacle))


def index_of(device):
    """The index of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


@torch.compiler.assume_constant_result
def _missing_code(device_index):
    return _query_missing_code(device_index)


@functools.cache
def _query_missing_code(device_index):
    major, minor = torch.cuda.get_device_capability(device_index)
    if _library.gpu_code(10 * major + minor):
        return ""
    return (
        f"the library holds no code for compute capability {major}.{minor}, but for "
        f"{_library.build_info['archs']} (run: TORCH_CUDA_ARCH_LIST={major}.{minor} "
        f"{_library.BUILD_COMMAND})"
    )


class Gpu(NamedTuple):
    """What of a GPU decides which kernels run on it (cuda_ops/common/gpu.h)."""

    capability: int
    """Compute capability, 90 for 9.0."""
    has_tensor_code: bool
    """The library holds code with bfloat16 and TF32 products for it."""
    has_cluster_code: bool
    """The library holds code with thread-block clusters for it."""
    has_warpgroup_code: bool
    """The library holds code with warpgroup products for it, which 9.0a alone has."""
    shared_bytes: int
    """Shared memory that a block may have."""
    multiprocessors: int
    clusters_of_4: int
    """Clusters of 4 blocks that run at once, each block with a multiprocessor to itself."""
    clusters_of_8: int
    clusters_of_16: int


@functools.cache
def gpu(device_index):
    """The properties of a CUDA device, as a `Gpu`; the driver is asked once.

    For trying what another GPU would run, environment variables limit what is told: the blocks of a
    cluster SB_FAST_SLIGRU_MAX_CLUSTER, the multiprocessors SB_FAST_SLIGRU_MAX_MULTIPROCESSORS, the
    KiB of shared memory that a block may have SB_FAST_SLIGRU_MAX_SHARED_KB.

    Arguments
    ---------
    device_index : int

    Raises
    ------
    RuntimeError
        If one of those variables is not a number from 1 to 16, 1024 and 1024.
    """
    return Gpu(*torch.ops.sb_fast_sligru.gpu(device_index))


_warned = set()


def warn_once(reason, what="its slow PyTorch loop (same results)"):
    """Say what slow code runs, and why; each reason once in a process, but not while compiling."""
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"sb_fast_sligru runs {what}: {reason}",
            stacklevel=4,
        )
