"""SpeechBrain's CTC loss on one compiled operator, ``ops.ctc_loss``.

==================  =========================================  =====================================
step                SpeechBrain, on PyTorch                    here
==================  =========================================  =====================================
lengths             wanted by the host; PyTorch copies them    on the GPU or on the host, whence
                    to the GPU, and waits for it, in each      they are copied without waiting
                    direction
gradient            sums in the order in which threads come,   sums in one order: the same bits
                    so other bits in another run               in every run
==================  =========================================  =====================================
"""

import torch

from . import ops

__all__ = ["ctc_loss"]

REDUCTIONS = ("mean", "sum", "batch", "batchmean", "none")


def ctc_loss(log_probs, targets, input_lens, target_lens, blank_index, reduction="mean"):
    """CTC loss, a replacement of :func:`speechbrain.nnet.losses.ctc_loss`.

    Arguments and results are SpeechBrain's, gradients included. An utterance whose frames are too
    few for its tokens has the loss 0.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, T, V], natural logarithms: utterances, frames, tokens. float64 or float32; within
        autocast also 16-bit ones, which are taken as float32.
    targets : torch.Tensor
        [B, S], of an integer dtype: tokens from 0 to V - 1.
    input_lens, target_lens : torch.Tensor
        [B], from 0 to 1: the frames as fractions of T, and the tokens as fractions of S. On the
        device of log_probs, or on the host.
    blank_index : int
    reduction : str
        "none": the loss of each utterance. "sum", "batchmean": their sum; the same by B. "batch":
        each by its number of tokens. "mean": the mean of the latter, where none counts as one.

    Lengths on the host are checked, and tokens by the backend "cpu". Elsewhere what is out of range
    makes the loss and the gradient of its utterance NaN.

    Returns
    -------
    loss : torch.Tensor
        A number, or [B] for "none" and "batch". Of log_probs' dtype.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        As of `sb_fast_sligru.ops.ctc_loss`.

    Source: Graves et al., *Connectionist temporal classification*, ICML 2006.

    Example
    -------
    >>> log_probs = torch.rand(2, 9, 5).log_softmax(2)
    >>> targets = torch.tensor([[1, 3, 3, 2], [4, 4, 0, 0]])
    >>> lens = torch.tensor([1.0, 0.5])
    >>> ctc_loss(log_probs, targets, lens, lens, blank_index=0, reduction="none").shape
    torch.Size([2])
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    for name, tensor, axes in (("log_probs", log_probs, "B, T, V"), ("targets", targets, "B, S")):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.ndim != axes.count(",") + 1:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{axes}]")
    device = log_probs.device
    if log_probs.dtype in (torch.half, torch.bfloat16) and torch.is_autocast_enabled(device.type):
        log_probs = log_probs.float()
    frames = _counts("input_lens", input_lens, log_probs.shape[:2], device)
    tokens = _counts("target_lens", target_lens, targets.shape, device)
    loss = ops.ctc_loss(log_probs, targets.long(), frames, tokens, blank_index=blank_index)
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.sum() / targets.shape[0]
    if reduction == "batch":
        return loss / tokens
    if reduction == "mean":
        return (loss / tokens.clamp(min=1)).mean()
    return loss


def _counts(name, lens, shape, device):
    """Relative lengths as numbers of frames or tokens, [B] int64 on the device.

    `shape` is [B, their largest]. Computed where the lengths are, and rounded as SpeechBrain does.
    """
    batch, most = shape
    if not isinstance(lens, torch.Tensor):
        raise ValueError(f"{name}: got {type(lens).__name__}, expected a torch.Tensor")
    if lens.shape != (batch,):
        raise ValueError(f"{name}: got shape {tuple(lens.shape)}, expected [{int(batch)}]")
    if lens.device not in (device, torch.device("cpu")):
        raise ValueError(f"{name}: got device {lens.device}, expected {device} or cpu")
    counts = (lens * most).round().long()  # a NaN is negative then
    # On a GPU the look would wait for it; in a graph and in a transformation there are no values.
    on_host = type(lens) is torch.Tensor and lens.is_cpu and not torch.compiler.is_compiling()
    if on_host and bool(((counts < 0) | (counts > most)).any()):
        raise ValueError(f"{name}: got {lens.tolist()}, expected numbers from 0 to 1")
    if lens.device == device:
        return counts
    # From memory that is not pinned the copy could wait for the GPU.
    return (counts.pin_memory() if on_host else counts).to(device, non_blocking=True)
