"""Adadelta's update of many tensors in one pass over the memory, `adadelta_`.

It checks its arguments and calls the operator of the same name (`torch.ops.sb_fast_sligru`, schema
in cuda_ops/adadelta/operator.cpp) or, for the backend "reference", plain PyTorch. It changes its
arguments in place and has no gradient. Below it: the fake kernel for torch.compile.
"""

import torch

from .. import _library, reference
from ._backends import choose, choose_kernels, library_obstacle, warn_once

DTYPES = (torch.float64, torch.float32)
LISTS = ("params", "grads", "square_avgs", "acc_deltas")
PLAIN = (torch.Tensor, torch.nn.Parameter)  # of a subclass the numbers can be elsewhere


def choose_adadelta_backend(device, dtype=torch.float32):
    """The backend that serves a call now, and why.

    Arguments
    ---------
    device : torch.device or str
    dtype : torch.dtype
        Of the parameters.

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
    >>> choose_adadelta_backend("cpu")[0]
    'cpu'
    """
    device = torch.device(device)
    wrong = "" if dtype == torch.float32 else f"Adadelta's kernels do not take {str(dtype)[6:]}"
    if device.type == "cpu":
        return choose(device, {"cpu": library_obstacle(device) or wrong})
    return choose_kernels(device, lambda: wrong)


def adadelta_(
    params, grads, square_avgs, acc_deltas, *, lr, rho, eps, weight_decay=0.0, maximize=False
):
    """Update parameters as `torch.optim.Adadelta` does, and the averages that it keeps.

    Arguments
    ---------
    params : list of torch.Tensor
        Of any shapes, without gaps in their memory, on one device. Changed in place. float32 or
        float64.
    grads, square_avgs, acc_deltas : list of torch.Tensor
        Each like the parameter at its place, with the axes in the same order of memory. The last
        two are changed in place.
    lr, rho, eps, weight_decay : float
    maximize : bool
        Climb the gradients.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed. Also if a parameter requires a
        gradient while gradients are enabled: the update has none.
    RuntimeError
        If a forced backend cannot serve the call.

    Source: Zeiler, *ADADELTA: an adaptive learning rate method*, arXiv 1212.5701.

    Example
    -------
    >>> x = torch.ones(3)
    >>> adadelta_([x], [x.clone()], [torch.zeros(3)], [torch.zeros(3)], lr=1.0, rho=0.9, eps=1e-6)
    >>> bool((x < 1).all())
    True
    """
    lists = (params, grads, square_avgs, acc_deltas)
    options = {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    message = obstacle(*lists, **options)
    if message:
        raise ValueError(message)
    if not params:
        return
    name, reason = choose_adadelta_backend(params[0].device, params[0].dtype)
    if name != "reference":
        update(*lists, **options, maximize=maximize)
        return
    if reason != "forced":
        warn_once(reason, "plain PyTorch (same results)")
    reference.adadelta_(*lists, **options, maximize=maximize)


def update(params, grads, square_avgs, acc_deltas, *, lr, rho, eps, weight_decay, maximize):
    """Call the compiled operator, for arguments that `obstacle` finds nothing in."""
    torch.ops.sb_fast_sligru.adadelta_(
        params, grads, square_avgs, acc_deltas, lr, rho, eps, weight_decay, maximize
    )
    if not torch.compiler.is_compiling():  # a graph has versions of its own
        # So that a backward that needs what was there before fails, as after PyTorch's own.
        changed = (t for tensors in (params, square_avgs, acc_deltas) for t in tensors)
        torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def obstacle(params, grads, square_avgs, acc_deltas, **numbers):
    """What keeps `adadelta_` from its arguments, "" if nothing does.

    Returns
    -------
    message : str
        Names the argument, what was given and what is allowed.
    """
    for name, value in numbers.items():
        if not isinstance(value, int | float):
            return f"{name}: got {type(value).__name__}, expected a number"
    lists = (params, grads, square_avgs, acc_deltas)
    for name, tensors in zip(LISTS, lists, strict=True):
        if len(tensors) != len(params):
            return f"{name}: got {len(tensors)} tensors, expected {len(params)}, as many as params"
    if not params:
        return ""
    if len({id(param) for param in params}) < len(params):
        return "params: got a tensor twice, which would be updated in any order"
    for i, param in enumerate(params):
        if type(param) not in PLAIN:
            return f"params[{i}]: got {type(param).__name__}, expected a torch.Tensor"
    dtype, device, shapes = params[0].dtype, params[0].device, [param.shape for param in params]
    if dtype not in DTYPES:
        return f"params[0]: got {dtype}, expected float32 or float64"
    grad_enabled, contiguous = torch.is_grad_enabled(), True
    for name, tensors in zip(LISTS, lists, strict=True):
        for i, (t, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if type(t) not in PLAIN:
                return f"{name}[{i}]: got {type(t).__name__}, expected a torch.Tensor"
            if t.layout != torch.strided:
                return f"{name}[{i}]: got {t.layout}, expected torch.strided"
            if t.dtype != dtype:
                return f"{name}[{i}]: got {t.dtype}, expected {dtype}"
            if t.device != device:
                return f"{name}[{i}]: got device {t.device}, expected {device}"
            if t.shape != shape:
                return f"{name}[{i}]: got shape {tuple(t.shape)}, expected {tuple(shape)}"
            if grad_enabled and t.requires_grad:
                return f"{name}[{i}]: requires a gradient, and the update has none"
            contiguous = contiguous and t.is_contiguous()
    return "" if contiguous else _order_obstacle(lists)


def _order_obstacle(lists):
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if all(t.is_contiguous() for t in tensors):
            continue
        stride = tensors[0].stride()
        if not _fills_its_memory(tensors[0]):
            return f"params[{i}]: got strides {stride}, expected no gaps in its memory"
        for name, t in zip(LISTS, tensors, strict=True):
            if t.stride() != stride:
                return f"{name}[{i}]: got strides {t.stride()}, expected {stride}"
    return ""


def _fills_its_memory(t):
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# ---- fake kernel (torch.compile)


def _fake(*arguments):
    return None


if _library.cpu_error is None:
    torch.library.register_fake("sb_fast_sligru::adadelta_")(_fake)
