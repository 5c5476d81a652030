"""PyTorch's Adadelta on one compiled operator, ``ops.adadelta_``.

PyTorch goes over the memory about a dozen times for an update, each time for one operation of it;
the operator goes once, over all tensors of a group.
"""

import torch
from torch.optim.adadelta import adadelta
from torch.optim.optimizer import _use_grad_for_differentiable

from .ops import _adadelta
from .ops._backends import warn_once

__all__ = ["Adadelta"]

NUMBERS = ("lr", "rho", "eps", "weight_decay")


class Adadelta(torch.optim.Adadelta):
    """Adadelta, a replacement of :class:`torch.optim.Adadelta`.

    Arguments, parameter groups and ``state_dict`` are PyTorch's, and either loads the other's. The
    numbers are PyTorch's but for rounding. The host does not wait for a GPU.

    A group runs PyTorch's own update if the operator cannot serve it: unless all parameters are
    plain float32 tensors of the CPU or of one CUDA device without gaps in their memory, whose
    gradients have their strides; with ``foreach``, ``capturable`` or ``differentiable``, with a
    tensor as ``lr``, within ``torch.compile``, and with ``backend("reference")``.

    Arguments
    ---------
    *args, **kwargs
        As of :class:`torch.optim.Adadelta`.

    Source: Zeiler, *ADADELTA: an adaptive learning rate method*, arXiv 1212.5701.

    Example
    -------
    >>> net = torch.nn.Linear(3, 2)
    >>> optimizer = Adadelta(net.parameters(), rho=0.95, eps=1e-8)
    >>> net(torch.rand(4, 3)).sum().backward()
    >>> optimizer.step()
    """

    @_use_grad_for_differentiable
    def step(self, closure=None):
        """Update the parameters that have a gradient.

        Arguments
        ---------
        closure : callable, optional
            Computes the gradients and returns the loss.

        Returns
        -------
        loss : torch.Tensor or None
            The closure's.
        """
        _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            *tensors, steps = [], [], [], [], []
            has_complex = self._init_group(group, *tensors, steps)
            options = {name: group[name] for name in (*NUMBERS, "maximize")}
            if _suits(group, tensors):
                _adadelta.update(*tensors, **options)
                torch._foreach_add_(steps, 1)  # while a GPU computes
            else:
                for name in ("foreach", "differentiable", "capturable"):
                    options[name] = group[name]
                adadelta(*tensors, steps, **options, has_complex=has_complex)
        return loss


def _check_capture(optimizer):
    """PyTorch's check that a step is not captured in a CUDA graph unless it may be."""
    names = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))()


def _suits(group, tensors):
    """Tell whether the operator serves a group; say why not if that costs speed unasked."""
    if torch.compiler.is_compiling() or not tensors[0]:
        return False
    if group["foreach"] is not None or group["capturable"] or group["differentiable"]:
        return False
    first = tensors[0][0]
    if first.dtype != torch.float32 or first.device.type not in ("cpu", "cuda"):
        return False
    if _adadelta.obstacle(*tensors, **{name: group[name] for name in NUMBERS}):
        return False
    name, reason = _adadelta.choose_adadelta_backend(first.device)
    if name == "reference" and reason != "forced":
        warn_once(reason, "PyTorch's Adadelta (same results)")
    return name != "reference"
