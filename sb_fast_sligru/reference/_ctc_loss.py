"""The CTC loss as plain PyTorch: the oracle and the fallback.

Graves et al., *Connectionist temporal classification: labelling unsegmented sequence data with
recurrent neural networks*, ICML 2006. A path through the frames goes through the positions blank,
y_0, blank, y_1, ..., y_{L-1}, blank: from frame to frame it stays, goes to the next one, or from a
token to the next token if that is another one. Of a position s, y(s) its token,

    alpha_t(s) = log(exp alpha_{t-1}(s) + exp alpha_{t-1}(s - 1) + exp alpha_{t-1}(s - 2) where it
                 may be skipped) + log p_t(y(s)),         alpha_{-1} = 0 at the first position
    loss       = -log(exp alpha_{n-1}(last) + exp alpha_{n-1}(last but one))

and log 0 is -infinity.
"""

import math

import torch
import torch.nn.functional as F


def ctc_loss(log_probs, targets, input_lengths, target_lengths, *, blank_index):
    """Compute it on any device and dtype, differentiable any number of times.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.ctc_loss`, which checks them.
    """
    frames, vocabulary = log_probs.shape[1:]
    numbers = torch.arange(targets.shape[1], device=targets.device)
    counts = numbers < target_lengths[:, None]
    known = (targets >= 0) & (targets < vocabulary)
    wrong = (counts & ~known).any(1)
    for lengths, most in ((input_lengths, frames), (target_lengths, targets.shape[1])):
        wrong = wrong | (lengths < 0) | (lengths > most)

    # The blank wherever nothing counts: what can be looked up.
    tokens = torch.where(counts & known, targets, blank_index)
    labels = torch.stack([torch.full_like(tokens, blank_index), tokens], 2).flatten(1)
    labels = F.pad(labels, (0, 1), value=blank_index)  # [B, 2 S + 1]
    skips = F.pad(labels[:, 2:] != labels[:, :-2], (2, 0))[:, : labels.shape[1]]
    in_time = torch.arange(frames, device=log_probs.device) < input_lengths[:, None]
    log_probs = torch.where(in_time[:, :, None], log_probs, 0.0)
    emitted = log_probs.gather(2, labels[:, None].expand(-1, frames, -1))
    first = torch.arange(labels.shape[1], device=labels.device) == 0
    alpha = torch.where(first, 0.0, -math.inf).to(log_probs.dtype).expand(labels.shape)
    for t in range(frames):
        before = F.pad(alpha, (2, 0), value=-math.inf)
        skipping = torch.where(skips, before[:, :-2], -math.inf)
        after = _log_sum(alpha, before[:, 1:-1], skipping) + emitted[:, t]
        alpha = torch.where(in_time[:, t, None], after, alpha)

    last = (2 * target_lengths).clamp(0, labels.shape[1] - 1)[:, None]
    token = alpha.gather(1, (last - 1).clamp(min=0))
    token = torch.where(last > 0, token, -math.inf)
    loss = -_log_sum(alpha.gather(1, last), token)[:, 0]
    # PyTorch's gradient has p_t(c) in it, that of log sum_c p_t(c) = 0.
    mass = log_probs.exp()
    loss = loss + (mass - mass.detach()).nan_to_num().sum((1, 2))
    loss = torch.where(loss == math.inf, 0.0, loss)
    return loss * torch.where(wrong, math.nan, 1.0).to(loss.dtype)


def _log_sum(*terms):
    """log sum exp, whose gradient has no NaN where all terms are log 0."""
    terms = torch.stack(terms)
    largest = terms.detach().amax(0)
    nothing = largest == -math.inf
    start = torch.where(nothing, 0.0, largest)
    total = (terms - start).exp().sum(0)
    return torch.where(nothing, -math.inf, torch.where(nothing, 1.0, total).log() + start)
