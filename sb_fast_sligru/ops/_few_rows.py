"""A linear layer of few rows, as a search has them: on a CPU the weights are read once, in order.

`few_rows_linear` calls the operator of the same name (`torch.ops.sb_fast_sligru`, schema in
cuda_ops/few_rows/operator.cpp) where it is faster than `torch.nn.functional.linear`, and that
everywhere else. Below it: fake kernel for torch.compile, and no autograd.
"""

import torch
import torch.nn.functional as F

from .. import _library
from ._autograd import register_autograd
from ._backends import choose, derivative_obstacle, warn_once

# MKL is as fast for some 100 rows on a processor with AVX-512, for some 50 with AVX2, and may be
# sooner on others than those that were measured; and for weights that stay in the caches.
MAX_ROWS = 32
MIN_WEIGHTS = 1 << 18


def few_rows_linear(x, weight, bias=None):
    """`torch.nn.functional.linear`, faster for a few rows in float32 on a CPU.

    There each sum has one order, so that a row's results do not depend on the number of threads or
    on other rows. The operator has no gradient: where one is wanted PyTorch's runs, as it does on
    other devices, in other dtypes, within autocast, for more rows than `MAX_ROWS` or fewer weights
    than `MIN_WEIGHTS`, and with ``backend("reference")``.

    Arguments
    ---------
    x : torch.Tensor
        [N, K].
    weight : torch.Tensor
        [M, K].
    bias : torch.Tensor, optional
        [M].

    Returns
    -------
    torch.Tensor
        [N, M].

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        If a backend is forced that cannot serve the call.

    Example
    -------
    >>> with torch.no_grad():
    ...     few_rows_linear(torch.rand(8, 5), torch.rand(3, 5), torch.rand(3)).shape
    torch.Size([8, 3])
    """
    _check(x, weight, bias)
    if not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    name, reason = choose(x.device, {"cpu": _library.cpu_error})
    if name == "reference":
        if reason != "forced":
            warn_once(reason, "PyTorch's linear layers (same results)")
        return F.linear(x, weight, bias)
    return torch.ops.sb_fast_sligru.few_rows_linear(x, weight, bias)


def _suits(x, weight, bias):
    """Tell whether the operator computes what is asked for, and faster."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and 1 <= x.shape[0] <= MAX_ROWS
        and all(t.dtype == torch.float32 for t in tensors)
        and weight.numel() >= MIN_WEIGHTS
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.overrides.has_torch_function(tensors)
        and not derivative_obstacle()
        and _has_wide_vectors()
    )


@torch.compiler.assume_constant_result
def _has_wide_vectors():
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _check(x, weight, bias):
    """Raise ValueError for a bad argument."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected {x.device}, that of x")
        if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name}: got {t.dtype}, expected {x.dtype}, that of x")
    if x.ndim != 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [N, K]")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected [M, {x.shape[1]}], K of x"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected [{weight.shape[0]}], M of weight"
        )


# ---- fake kernel (torch.compile), and no autograd


def _fake(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _no_gradient(ctx, grad):
    raise RuntimeError("sb_fast_sligru::few_rows_linear has no gradient")


if _library.cpu_error is None:
    torch.library.register_fake("sb_fast_sligru::few_rows_linear")(_fake)
    register_autograd("few_rows_linear", _no_gradient)
