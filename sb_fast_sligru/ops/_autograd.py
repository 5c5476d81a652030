"""What the autograd of all operators shares."""

import torch


def accumulation_dtype(dtype):
    """The dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def no_second_derivative(ctx, *grads):
    """The gradient of an operator's backward: without it, a silently wrong one would come."""
    raise RuntimeError(
        "sb_fast_sligru's compiled kernels are differentiable once. For second derivatives run the "
        'forward under sb_fast_sligru.backend("reference").'
    )
