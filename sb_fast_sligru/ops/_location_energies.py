"""The energies of location-aware attention for many hypotheses of a search, `location_energies`.

It checks its arguments and calls the operator of the same name (`torch.ops.sb_fast_sligru`, schema
in cuda_ops/location_energies/operator.cpp) or, for the backend "reference", plain PyTorch. It has
no gradient: a search needs none. Below it: the fake kernel for torch.compile.
"""

import torch

from .. import _library, reference
from ._autograd import register_autograd
from ._backends import choose, choose_kernels, gpu, index_of, warn_once

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What the CUDA kernels take (cuda_ops/common/location_attention.h).
UNITS_MULTIPLE, CHANNELS, MOST_TAPS = 32, 16, 495


def choose_location_energies_backend(device, dtype, units, channels, taps):
    """The backend that serves a call now, and why.

    Arguments
    ---------
    device : torch.device or str
    dtype : torch.dtype
        Of the keys.
    units, channels, taps : int
        A, G and W of `location_energies`.

    Returns
    -------
    name : str
        "reference", "cpu" or "cuda"; on a GPU, "stepwise" or "persistent" if one is forced, which
        are the same kernel here.
    reason : str
        One clause, for people.

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve it.

    Example
    -------
    >>> choose_location_energies_backend("cpu", torch.float32, 1024, 10, 201)[0]
    'cpu'
    """
    device = torch.device(device)
    if device.type == "cpu" and dtype.itemsize == 2:
        obstacle = f"the kernels of attention energies do not take {str(dtype)[6:]} on a CPU"
        return choose(device, {"cpu": obstacle})

    def kernels_obstacle():
        if dtype == torch.float64:
            return "the kernels of attention energies do not take float64 on a GPU"
        if not gpu(index_of(device)).has_tensor_code:
            return (
                "the kernels of attention energies need compute capability 8.0 or newer, and code "
                "for it in the library"
            )
        if units % UNITS_MULTIPLE or channels != CHANNELS or taps > MOST_TAPS:
            return (
                f"the kernels of attention energies take multiples of {UNITS_MULTIPLE} units, "
                f"{CHANNELS} channels and up to {MOST_TAPS} taps, "
                f"not {units}, {channels} and {taps}"
            )
        return ""

    return choose_kernels(device, kernels_obstacle)


def location_energies(query, last, keys, filters, w_location, v):
    """What the softmax of location-aware attention takes, of hypotheses that share their keys.

    Of hypothesis n of utterance b, e[t] = v . tanh(keys[b, t] + query[n] + W f[t]), where f are the
    hypothesis' last weights convolved with the filters (zeros beyond their ends).

    Arguments
    ---------
    query : torch.Tensor
        [N, A], N hypotheses, N / B in a row for each utterance. float32; float64 if the keys are.
    last : torch.Tensor
        [N, T], the weights of the frames at the token before. As query.
    keys : torch.Tensor
        [B, T, A], utterances, frames and units, all biases included. float64, float32, bfloat16 or
        float16.
    filters : torch.Tensor
        [G, W], channels and taps, of which there is an odd number. As query.
    w_location : torch.Tensor
        [A, G]. As keys.
    v : torch.Tensor
        [A]. As query.

    Returns
    -------
    energies : torch.Tensor
        [N, T]. As query.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed. Also for a tensor that requires a
        gradient while gradients are enabled: there is none.
    RuntimeError
        If a forced backend cannot serve the call.

    Example
    -------
    >>> rand = torch.rand
    >>> energies = location_energies(
    ...     rand(6, 8), rand(6, 10), rand(2, 10, 8), rand(3, 5), rand(8, 3), rand(8)
    ... )
    >>> energies.shape
    torch.Size([6, 10])
    """
    arguments = {
        "query": query, "last": last, "keys": keys, "filters": filters, "w_location": w_location,
        "v": v,
    }  # fmt: skip
    _check(arguments)
    name, reason = choose_location_energies_backend(
        keys.device, keys.dtype, keys.shape[2], *filters.shape
    )
    if name != "reference":
        return torch.ops.sb_fast_sligru.location_energies(*arguments.values())
    if reason != "forced":
        warn_once(reason, "plain PyTorch (same results)")
    return reference.location_energies(**arguments)


def _check(arguments):
    """Raise ValueError for a bad argument."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: requires a gradient, and none is computed for it (use torch.no_grad)"
            )
    keys, query, filters = (arguments[name] for name in ("keys", "query", "filters"))
    if keys.ndim != 3:
        raise ValueError(f"keys: got shape {tuple(keys.shape)}, expected [B, T, A]")
    if keys.dtype not in DTYPES:
        raise ValueError(f"keys: got {keys.dtype}, expected a floating dtype")
    batch, frames, units = keys.shape
    if query.ndim != 2 or (len(query) % batch if batch else len(query)):
        raise ValueError(
            f"query: got shape {tuple(query.shape)}, expected [N, {units}], N a multiple of {batch}"
        )
    if filters.ndim != 2 or filters.shape[1] % 2 == 0:
        raise ValueError(f"filters: got shape {tuple(filters.shape)}, expected [G, W], W odd")
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    channels = len(filters)
    expected = {
        "query": ((len(query), units), wide),
        "last": ((len(query), frames), wide),
        "filters": (tuple(filters.shape), wide),
        "w_location": ((units, channels), keys.dtype),
        "v": ((units,), wide),
    }
    for name, (shape, dtype) in expected.items():
        tensor = arguments[name]
        if tensor.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: got {tensor.dtype}, expected {dtype}")
        if tensor.device != keys.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {keys.device}, that of keys"
            )


# ---- fake kernel (torch.compile), and no gradient


def _fake(query, last, *others):
    return query.new_empty(last.shape)


def _no_gradient(ctx, *grads):
    raise RuntimeError("sb_fast_sligru's attention energies have no gradient")


if _library.cpu_error is None:
    torch.library.register_fake("sb_fast_sligru::location_energies")(_fake)
    register_autograd("location_energies", _no_gradient)
