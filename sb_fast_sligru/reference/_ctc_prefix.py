"""CTC prefix scores as plain PyTorch: the oracle and the fallback.

Watanabe et al., *Hybrid CTC/attention architecture for end-to-end speech recognition*, IEEE Journal
of Selected Topics in Signal Processing 2017, Algorithm 2. With log p_t(c), t = 0 .. T - 1, CTC's
log-probability of token c at frame t, the state of a hypothesis g has

    blank_t = log P(the first t frames spell g, the last of them is a blank)
    total_t = log P(the first t frames spell g)

With from_t = blank_t if g ends in c, else total_t, that of g followed by c is

    token'_{t+1} = log(exp token'_t + exp from_t) + log p_t(c)
    blank'_{t+1} = total'_t + log p_t(blank)
    total'_t     = log(exp token'_t + exp blank'_t)

and the probability of everything that begins so is psi(c) = log sum_t exp(from_t + log p_t(c)).
"""

import torch

LOG_ZERO = -1e20  # SpeechBrain's


def ctc_prefix_start(log_probs, blank_index, beam):
    """The state of the empty hypothesis, on any device and in any dtype.

    Arguments and results are those of `sb_fast_sligru.ops.ctc_prefix_start`.
    """
    batch, frames, _ = log_probs.shape
    # The sum, too: frames beyond an utterance may have any log-probabilities.
    blank = log_probs[:, :, blank_index].cumsum(1).clamp(min=LOG_ZERO)
    state = log_probs.new_zeros(frames + 1, 2, batch, beam)
    state[1:] = blank.t()[:, None, :, None]
    return state.flatten(2)


def ctc_prefix_scores(
    log_probs, lengths, state, last_tokens, candidates=None, window=None, *, blank_index, eos_index
):
    """Compute psi on any device and in any dtype.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.ctc_prefix_scores`, which checks
    them.
    """
    batch, frames, vocabulary = log_probs.shape
    hypotheses = state.shape[2]
    utterances = _utterances(hypotheses, batch, log_probs.device)
    tokens = torch.arange(vocabulary, device=log_probs.device).expand(hypotheses, -1)
    tokens = tokens if candidates is None else candidates
    first, last = _limits(window, lengths, frames)
    counts = torch.arange(frames, device=log_probs.device)
    counts = (counts >= torch.where(first <= 1, 0, first)) & (counts < last[:, None])  # [B, T]
    before = _before(state[:-1], tokens == last_tokens[:, None])  # [T, N, C]
    terms = before + log_probs[utterances[:, None], :, tokens].permute(2, 0, 1)
    terms = terms.masked_fill(~counts[utterances].t()[:, :, None], LOG_ZERO).clamp(min=LOG_ZERO)
    zero = terms.new_full((1, *terms.shape[1:]), LOG_ZERO)
    scores = torch.logsumexp(torch.cat([zero, terms]), 0)
    psi = scores.new_full((hypotheses, vocabulary), LOG_ZERO).scatter(1, tokens, scores)
    psi[:, blank_index] = LOG_ZERO
    lengths = lengths.clamp(0, frames)[utterances]
    psi[:, eos_index] = state[:, 0].gather(0, lengths[None])[0]
    return psi


def ctc_prefix_extend(
    log_probs, lengths, state, last_tokens, parents, tokens, window=None, *, blank_index
):
    """Compute the state of longer hypotheses on any device and in any dtype.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.ctc_prefix_extend`, which checks
    them.
    """
    batch, frames, _ = log_probs.shape
    utterances = _utterances(state.shape[2], batch, log_probs.device)[parents]
    first, last = _limits(window, lengths, frames)
    own, last = lengths[utterances], last[utterances]
    before = _before(state[:, :, parents], (tokens == last_tokens[parents])[:, None])[:, :, 0]
    log_prob, log_blank = log_probs[utterances, :, tokens], log_probs[utterances, :, blank_index]
    token = blank = total = log_probs.new_full(tokens.shape, LOG_ZERO)
    states = [torch.stack([total, blank])]
    for t in range(frames):
        counts = (first <= t) & (t < last) if t else own > 0
        token = torch.logaddexp(token, before[t]) + log_prob[:, t]
        blank = total + log_blank[:, t]
        token, blank = (
            torch.where(counts, value, LOG_ZERO).clamp(min=LOG_ZERO) for value in (token, blank)
        )
        total = torch.logaddexp(token, blank)
        states.append(torch.stack([total, blank]))
    return torch.stack(states)


def _utterances(hypotheses, batch, device):
    """Of each hypothesis: its utterance."""
    return torch.arange(hypotheses, device=device) // max(1, hypotheses // max(1, batch))


def _limits(window, lengths, frames):
    """The first frame that counts, and [B] the ones after the last."""
    last = lengths.clamp(max=frames)
    if window is None:
        return lengths.new_zeros(()), last
    return window[0], torch.minimum(last, window[1])


def _before(state, repeats):
    """What may stand before each token, [T, N, C]; `repeats` [N, C] tells those that end it."""
    total, blank = state[:, 0, :, None], state[:, 1, :, None]
    return torch.where(repeats, blank, total)
