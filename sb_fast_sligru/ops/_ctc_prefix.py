"""CTC prefix scores for a beam search, a token at a time.

`ctc_prefix_start` makes the state of the empty hypotheses; then, token by token,
`ctc_prefix_scores` scores what may come next and `ctc_prefix_extend` makes the state of what the
search goes on with.
The last two check their arguments and call the operator of the same name
(`torch.ops.sb_fast_sligru`, schema in cuda_ops/ctc_prefix/operator.cpp) or, for the backend
"reference", plain PyTorch. They have no gradient: a search needs none. Below them: fake kernels for
torch.compile.
"""

import torch

from .. import _library, reference
from ._autograd import register_autograd
from ._backends import choose_kernels, warn_once

DTYPES = (torch.float64, torch.float32)


# ---- the choice of backend


def choose_ctc_prefix_backend(device, dtype=torch.float32):
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
    >>> choose_ctc_prefix_backend("cpu")[0]
    'cpu'
    """

    def kernels_obstacle():
        if dtype != torch.float32:
            return f"the kernels of CTC prefix scores do not take {str(dtype)[6:]}"
        return ""

    return choose_kernels(torch.device(device), kernels_obstacle)


# ---- the functions


def ctc_prefix_start(log_probs, blank_index, beam):
    """The state of empty hypotheses: the same on every device, a sum over frames.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, V, T], CTC's log-probabilities: utterances, tokens, frames. float64 or float32.
    blank_index : int
    beam : int
        Hypotheses of an utterance.

    Returns
    -------
    state : torch.Tensor
        [N, 2, T + 1], N = B beam: for t = 0 .. T the log-probability that the first t frames spell
        the hypothesis, and that they do and end in a blank.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    """
    _check_log_probs(log_probs)
    _check_token("blank_index", blank_index, log_probs)
    if not isinstance(beam, int) or beam < 1:
        raise ValueError(f"beam: got {beam!r}, expected an int from 1 on")
    return reference.ctc_prefix_start(log_probs, blank_index, beam)


def ctc_prefix_scores(
    log_probs, lengths, state, last_tokens, candidates=None, window=None, *, blank_index, eos_index
):
    """The log-probabilities of all that begins with a hypothesis and one more token.

    Arguments
    ---------
    log_probs : torch.Tensor
        [B, V, T], CTC's log-probabilities: utterances, tokens, frames. float64 or float32.
    lengths : torch.Tensor
        [B], int64: the frames of each utterance that count, from 0 to T; what is beyond that is
        taken for 0 or T.
    state : torch.Tensor
        [N, 2, T + 1], of `ctc_prefix_start` or `ctc_prefix_extend`: N hypotheses, N / B in a row
        for each utterance.
    last_tokens : torch.Tensor
        [N], int64: the last token of each. Of empty ones it does not matter.
    candidates : torch.Tensor, optional
        [N, C], int64: the tokens to score; all by default. Out of range they are an error on a CPU;
        on a GPU they are not scored.
    window : torch.Tensor, optional
        [2], int64: the first frame that counts for all hypotheses and the one after the last. Frame
        0 counts if frame 1 does.
    blank_index, eos_index : int

    Returns
    -------
    psi : torch.Tensor
        [N, V]. For `eos_index`, that the utterance is the hypothesis; for tokens that are no
        candidates, and for `blank_index` if it is another, -1e20, which is log 0 here.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed. Also for a tensor that requires a
        gradient while gradients are enabled: there is none.
    RuntimeError
        If a forced backend cannot serve the call, or a CPU finds an index out of range.

    Example
    -------
    >>> log_probs, lengths = torch.rand(2, 4, 5).log_softmax(1), torch.tensor([5, 3])
    >>> state = ctc_prefix_start(log_probs, 0, beam=3)
    >>> bos = torch.full((6,), 1)
    >>> psi = ctc_prefix_scores(log_probs, lengths, state, bos, blank_index=0, eos_index=2)
    >>> psi.shape
    torch.Size([6, 4])
    """
    _check(log_probs, state, {"lengths": lengths, "last_tokens": last_tokens}, window)
    _check_token("blank_index", blank_index, log_probs)
    _check_token("eos_index", eos_index, log_probs)
    if candidates is not None:
        _check_indices("candidates", candidates, (state.shape[0], None), log_probs)
    tensors = (log_probs, lengths, state, last_tokens, candidates, window)
    return _run("ctc_prefix_scores", *tensors, blank_index=blank_index, eos_index=eos_index)


def ctc_prefix_extend(
    log_probs, lengths, state, last_tokens, parents, tokens, window=None, *, blank_index
):
    """The state of hypotheses of one more token.

    Arguments
    ---------
    log_probs, lengths, state, last_tokens, window, blank_index
        As of `ctc_prefix_scores`. Frame 0 counts in every window here.
    parents : torch.Tensor
        [M], int64: the number of the hypothesis, from 0 to N - 1, that each new one extends. Those
        of an utterance must be in a row for `ctc_prefix_scores`.
    tokens : torch.Tensor
        [M], int64: by which token. Parents and tokens out of range are an error on a CPU; on a GPU
        they give hypotheses of probability 0.

    Returns
    -------
    state : torch.Tensor
        [M, 2, T + 1].

    Raises
    ------
    ValueError, RuntimeError
        As of `ctc_prefix_scores`.

    Example
    -------
    >>> log_probs, lengths = torch.rand(1, 4, 5).log_softmax(1), torch.tensor([5])
    >>> state = ctc_prefix_start(log_probs, 0, beam=2)
    >>> parents, tokens, bos = torch.tensor([0, 0]), torch.tensor([3, 1]), torch.full((2,), 1)
    >>> state = ctc_prefix_extend(
    ...     log_probs, lengths, state, bos, parents, tokens, blank_index=0
    ... )
    >>> state.shape
    torch.Size([2, 2, 6])
    """
    _check(log_probs, state, {"lengths": lengths, "last_tokens": last_tokens}, window)
    _check_token("blank_index", blank_index, log_probs)
    _check_indices("parents", parents, (None,), log_probs)
    _check_indices("tokens", tokens, tuple(parents.shape), log_probs)
    tensors = (log_probs, lengths, state, last_tokens, parents, tokens, window)
    return _run("ctc_prefix_extend", *tensors, blank_index=blank_index)


def _run(function, log_probs, *tensors, **indices):
    name, reason = choose_ctc_prefix_backend(log_probs.device, log_probs.dtype)
    if name == "reference":
        if reason != "forced":
            warn_once(reason, "plain PyTorch (same results)")
        return getattr(reference, function)(log_probs, *tensors, **indices)
    operator = getattr(torch.ops.sb_fast_sligru, function)
    return operator(log_probs, *tensors, *indices.values())


def _check(log_probs, state, indices, window):
    """Raise ValueError for a bad argument."""
    _check_log_probs(log_probs)
    batch, _, frames = log_probs.shape
    if not isinstance(state, torch.Tensor):
        raise ValueError(f"state: got {type(state).__name__}, expected a torch.Tensor")
    if state.dtype != log_probs.dtype or state.device != log_probs.device:
        raise ValueError(
            f"state: got {state.dtype} on {state.device}, expected those of log_probs, "
            f"{log_probs.dtype} on {log_probs.device}"
        )
    if state.ndim != 3 or state.shape[1:] != (2, frames + 1) or state.shape[0] % max(batch, 1):
        raise ValueError(
            f"state: got shape {tuple(state.shape)}, expected [N, 2, {frames + 1}], "
            f"N a multiple of {batch}"
        )
    _check_no_gradient("state", state)
    _check_indices("lengths", indices["lengths"], (batch,), log_probs)
    _check_indices("last_tokens", indices["last_tokens"], (state.shape[0],), log_probs)
    if window is not None:
        _check_indices("window", window, (2,), log_probs)


def _check_log_probs(log_probs):
    if not isinstance(log_probs, torch.Tensor):
        raise ValueError(f"log_probs: got {type(log_probs).__name__}, expected a torch.Tensor")
    if log_probs.dtype not in DTYPES:
        raise ValueError(f"log_probs: got {log_probs.dtype}, expected float64 or float32")
    if log_probs.ndim != 3 or log_probs.shape[1] == 0:
        raise ValueError(f"log_probs: got shape {tuple(log_probs.shape)}, expected [B, V, T]")
    _check_no_gradient("log_probs", log_probs)


def _check_no_gradient(name, tensor):
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires a gradient, and none is computed for it (use torch.no_grad)"
        )


def _check_indices(name, tensor, shape, log_probs):
    """`shape` has None for what may have any size."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name}: got {tensor.dtype}, expected int64")
    if tensor.device != log_probs.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {log_probs.device}, that of log_probs"
        )
    fits = tensor.ndim == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {_shown(shape)}")


def _shown(shape):
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def _check_token(name, index, log_probs):
    vocabulary = log_probs.shape[1]
    if not isinstance(index, int) or not 0 <= index < vocabulary:
        raise ValueError(f"{name}: got {index!r}, expected an int from 0 to {vocabulary - 1}")


# ---- fake kernels (torch.compile), and no autograd


def _scores_fake(log_probs, lengths, state, *others):
    return log_probs.new_empty(state.shape[0], log_probs.shape[1])


def _extend_fake(log_probs, lengths, state, last_tokens, parents, *others):
    return log_probs.new_empty(parents.shape[0], 2, state.shape[2])


def _no_gradient(ctx, *grads):
    raise RuntimeError("sb_fast_sligru's CTC prefix scores have no gradient")


if _library.cpu_error is None:
    for _name, _fake in (("ctc_prefix_scores", _scores_fake), ("ctc_prefix_extend", _extend_fake)):
        torch.library.register_fake(f"sb_fast_sligru::{_name}")(_fake)
        register_autograd(_name, _no_gradient)
