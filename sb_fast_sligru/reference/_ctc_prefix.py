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
    # The sum, too, must not become infinite: an utterance's padding may have any log-probabilities.
    blank = log_probs[:, blank_index].cumsum(1).clamp(min=LOG_ZERO)
    blank = torch.nn.functional.pad(blank, (1, 0))
    return blank[:, None, None].expand(-1, beam, 2, -1).flatten(0, 1)


def ctc_prefix_scores(
    log_probs, lengths, state, last_tokens, candidates=None, window=None, *, blank_index, eos_index
):
    """Compute psi on any device and in any dtype.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.ctc_prefix_scores`, which checks
    them.
    """
    batch, vocabulary, frames = log_probs.shape
    hypotheses = state.shape[0]
    utterances = _utterances(hypotheses, batch, log_probs.device)
    tokens = torch.arange(vocabulary, device=log_probs.device).expand(hypotheses, -1)
    tokens = tokens if candidates is None else candidates
    first, last = _limits(window, lengths, frames)
    t = torch.arange(frames, device=log_probs.device)
    counts = (t >= torch.where(first <= 1, 0, first)) & (t < last[utterances, None])  # [N, T]
    before = _before(state[:, None], tokens == last_tokens[:, None])[..., :-1]  # [N, C, T]
    terms = before + log_probs[utterances[:, None], tokens]
    terms = torch.where(counts[:, None], terms, LOG_ZERO).clamp(min=LOG_ZERO)
    scores = torch.nn.functional.pad(terms, (0, 1), value=LOG_ZERO).logsumexp(-1)
    psi = scores.new_full((hypotheses, vocabulary), LOG_ZERO).scatter(1, tokens, scores)
    psi[:, blank_index] = LOG_ZERO
    lengths = lengths.clamp(0, frames)[utterances]
    psi[:, eos_index] = state[:, 0].gather(1, lengths[:, None])[:, 0]
    return psi


def ctc_prefix_extend(
    log_probs, lengths, state, last_tokens, parents, tokens, window=None, *, blank_index
):
    """Compute the state of longer hypotheses on any device and in any dtype.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.ctc_prefix_extend`, which checks
    them.
    """
    batch, _, frames = log_probs.shape
    utterances = _utterances(state.shape[0], batch, log_probs.device)[parents]
    first, last = _limits(window, lengths, frames)
    own, last = lengths[utterances], last[utterances]
    before = _before(state[parents], tokens == last_tokens[parents])
    log_prob, log_blank = log_probs[utterances, tokens], log_probs[utterances, blank_index]
    token = blank = total = log_probs.new_full(tokens.shape, LOG_ZERO)
    states = [torch.stack([total, blank], 1)]
    for t in range(frames):
        counts = (first <= t) & (t < last) if t else own > 0
        token = torch.logaddexp(token, before[:, t]) + log_prob[:, t]
        blank = total + log_blank[:, t]
        token, blank = (
            torch.where(counts, value, LOG_ZERO).clamp(min=LOG_ZERO) for value in (token, blank)
        )
        total = torch.logaddexp(token, blank)
        states.append(torch.stack([total, blank], 1))
    return torch.stack(states, 2)


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
    """What may stand before tokens; `repeats` tells of each if the hypothesis ends in it."""
    return torch.where(repeats[..., None], state[..., 1, :], state[..., 0, :])
