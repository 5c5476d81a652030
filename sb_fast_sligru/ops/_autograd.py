"""What the autograd of all operators shares."""

import torch
from torch.autograd import forward_ad


def accumulation_dtype(dtype):
    """The dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(dtype, device_type):
    """The dtype of the operands of products of a dtype: autocast's for float32, else the same."""
    # torch refuses the question whether autocast is on for "meta".
    if dtype == torch.float32 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def dtype_name(dtype):
    """A dtype as the operators take it in an argument, a str: "float32"."""
    return str(dtype).removeprefix("torch.")


class Changes:
    """Whether a tensor has been changed in place since, without holding its memory.

    SpeechBrain's output is a copy of what its loop saves, so its users may change it. A copy of h
    would cost time and memory in every call: the backward computes h again where it was changed.
    """

    def __init__(self, tensor):
        self.counter = tensor.detach()  # shares the count of changes
        with torch._C._DisableTorchDispatch():  # modes need not see this, and some refuse it
            self.counter.data = tensor.new_empty(0)
        self.before = tensor._version

    def __bool__(self):
        return self.counter._version != self.before


class _Registry(torch.library.Library):
    """Where torch.library puts its kernels of autograd; these refuse forward-mode derivatives.

    PyTorch's own do so only where a tensor requires a gradient, and else lose the tangents.
    """

    def impl(self, op_name, fn, dispatch_key="", **options):
        def kernel(keyset, *args, **kwargs):
            if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
                raise RuntimeError(
                    f"sb_fast_sligru::{op_name} has no forward-mode derivative. For one, call the "
                    "module, not what was exported, traced or compiled of it, under "
                    'sb_fast_sligru.backend("reference").'
                )
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, kernel, dispatch_key, **options)


_registry = _Registry("sb_fast_sligru", "FRAGMENT")


def _has_tangent(value):
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def register_autograd(name, backward, setup_context=None):
    """Give an operator its derivative.

    Arguments
    ---------
    name : str
        Of the operator.
    backward, setup_context : callable
        As of :func:`torch.library.register_autograd`.
    """
    torch.library.register_autograd(
        f"sb_fast_sligru::{name}", backward, setup_context=setup_context, lib=_registry
    )


def no_second_derivative(ctx, *grads):
    """The gradient of an operator's backward: without it, a silently wrong one would come."""
    raise RuntimeError(
        "sb_fast_sligru's compiled kernels are differentiable once. For second derivatives run the "
        'forward under sb_fast_sligru.backend("reference").'
    )
