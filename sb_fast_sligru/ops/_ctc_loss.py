"""The CTC loss of each utterance as one differentiable function, `ctc_loss`.

`ctc_loss` checks its arguments and calls the operator of the same name (`torch.ops.sb_fast_sligru`,
schema in cuda_ops/ctc_loss/operator.cpp) or, for the backend "reference", plain PyTorch. Below it:
fake kernels for torch.compile, then autograd.
"""

import torch

from .. import _library, reference
from ._autograd import no_second_derivative, register_autograd
from ._backends import choose_kernels, warn_once

DTYPES = (torch.float64, torch.float32)


# ---- the choice of backend


def choose_ctc_loss_backend(device, dtype=torch.float32):
    """The backend that serves a call now, and why.

    Arguments
    ---------
    device : torch.device or str
    dtype : torch.dtype
        Of the log-probabilities.

    Returns
    -------
    name : str
        "reference", "cpu" or "cuda"; on a GPU, "stepwise" or "persistent" if one is forced, which
        are the same kernels here.
    reason : str
        One clause, for people.

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve it.

    Example
    -------
    >>> choose_ctc_loss_backend("cpu")[0]
    'cpu'
    """

    def kernels_obstacle():
        if dtype != torch.float32:
            return f"the kernels of the CTC loss do not take {str(dtype)[6:]}"
        return ""

    return choose_kernels(torch.device(device), kernels_obstacle)


# ---- the function


def ctc_loss(log_probs, targets, input_lengths, target_lengths, *, blank_index):
    """-log P(target) of each utterance, over all ways to spread its tokens over the frames.

    Graves et al., *Connectionist temporal classification*, ICML 2006. The gradient is that of
    `torch.nn.functional.ctc_loss`: of log-probabilities that a log-softmax gives.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, T, V], natural logarithms: utterances, frames, tokens. float64 or float32; any strides.
    targets : torch.Tensor
        [B, S], int64: the tokens, from 0 to V - 1. What is beyond an utterance's own is not read.
    input_lengths, target_lengths : torch.Tensor
        [B], int64: the frames, from 0 to T, and the tokens, from 0 to S, that count.
    blank_index : int

    Lengths and tokens out of range are an error of the backend "cpu". Elsewhere the host does not
    look, and they make the loss and the gradient of their utterance NaN; nothing is read by them.

    Returns
    -------
    loss : torch.Tensor
        [B], of log_probs' dtype. 0, with a gradient of 0, where the frames are too few for the
        tokens.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        If a forced backend cannot serve the call, or a CPU finds a length or a token out of range,
        or at a second derivative of a compiled backend.
        Forward-mode derivatives and torch.func's gradients run plain PyTorch, unless one is forced.

    Example
    -------
    >>> log_probs = torch.rand(2, 9, 5).log_softmax(2)
    >>> targets = torch.tensor([[1, 3, 3], [4, 0, 0]])
    >>> frames, tokens = torch.tensor([9, 6]), torch.tensor([3, 1])
    >>> ctc_loss(log_probs, targets, frames, tokens, blank_index=0).shape
    torch.Size([2])
    """
    _check(log_probs, targets, input_lengths, target_lengths, blank_index)
    tensors = (log_probs, targets, input_lengths, target_lengths)
    name, reason = choose_ctc_loss_backend(log_probs.device, log_probs.dtype)
    if name == "reference":
        if reason != "forced":
            warn_once(reason, "plain PyTorch (same results)")
        return reference.ctc_loss(*tensors, blank_index=blank_index)
    return torch.ops.sb_fast_sligru.ctc_loss(*tensors, blank_index)[0]


def _check(log_probs, targets, input_lengths, target_lengths, blank_index):
    """Raise ValueError for a bad argument."""
    if not isinstance(log_probs, torch.Tensor):
        raise ValueError(f"log_probs: got {type(log_probs).__name__}, expected a torch.Tensor")
    if log_probs.dtype not in DTYPES:
        raise ValueError(f"log_probs: got {log_probs.dtype}, expected float64 or float32")
    if log_probs.ndim != 3 or log_probs.shape[2] == 0:
        raise ValueError(f"log_probs: got shape {tuple(log_probs.shape)}, expected [B, T, V]")
    batch, frames, vocabulary = log_probs.shape
    if not isinstance(blank_index, int) or not 0 <= blank_index < vocabulary:
        raise ValueError(
            f"blank_index: got {blank_index!r}, expected an int from 0 to {vocabulary - 1}"
        )
    indices = {
        "targets": targets,
        "input_lengths": input_lengths,
        "target_lengths": target_lengths,
    }
    for name, tensor in indices.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: got {tensor.dtype}, expected int64")
        if tensor.device != log_probs.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected {log_probs.device}, "
                "that of log_probs"
            )
        expected = f"[{int(batch)}, S]" if name == "targets" else f"[{int(batch)}]"
        if tensor.ndim != 1 + (name == "targets") or tensor.shape[0] != batch:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")


# ---- fake kernels (torch.compile) and autograd


def _ctc_loss_fake(log_probs, targets, input_lengths, target_lengths, blank_index):
    batch, frames, _ = log_probs.shape
    return log_probs.new_empty(batch), log_probs.new_empty(batch, frames, 2 * targets.shape[1] + 1)


def _ctc_loss_backward_fake(grad_loss, log_probs, *others):
    return log_probs.new_empty(log_probs.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.blank_index = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _ctc_loss_backward(ctx, grad_loss, _):
    nothing = (None,) * 4
    if grad_loss is None:
        return (None, *nothing)
    backward = torch.ops.sb_fast_sligru.ctc_loss_backward
    return (backward(grad_loss, *ctx.saved_tensors, ctx.blank_index), *nothing)


if _library.cpu_error is None:
    # Shapes and dtypes without data: what torch.compile and torch.export trace through.
    torch.library.register_fake("sb_fast_sligru::ctc_loss")(_ctc_loss_fake)
    torch.library.register_fake("sb_fast_sligru::ctc_loss_backward")(_ctc_loss_backward_fake)
    register_autograd("ctc_loss", _ctc_loss_backward, setup_context=_setup_context)
    register_autograd("ctc_loss_backward", no_second_derivative)
