"""Batches whose utterances are recognised as each would be alone.

To an encoder the padding of a batch is not nothing: the CNN sees it at an utterance's end, the
backward direction of the RNN begins in it, and statistics of the features may count it. So each
utterance is encoded by itself, and what takes the time, the search, is made for all together.
"""

import torch
from speechbrain.decoders.scorer import CoverageScorer, RNNLMScorer
from torch.nn.utils.rnn import pad_sequence

from sb_fast_sligru import CTCScorer, S2SRNNBeamSearcher, S2SRNNGreedySearcher


def encode_each(encode, signals):
    """Encode signals one by one, and pad their states.

    Arguments
    ---------
    encode : callable
        Maps [1, samples] to encoder states, [1, T, features].
    signals : list of torch.Tensor
        [samples] each.

    Returns
    -------
    states : torch.Tensor
        [B, T, features] with zeros after an utterance's own.
    frames : torch.Tensor
        [B] int64 on the host: states of each utterance.
    """
    states = [encode(signal.unsqueeze(0)).squeeze(0) for signal in signals]
    return pad_sequence(states, batch_first=True), torch.tensor([len(each) for each in states])


def decode_each(decode, states, frames):
    """Decode the states of utterances one by one.

    Arguments
    ---------
    decode : callable
        Maps states [1, T, features] and relative lengths [1] to a list of one utterance's token
        IDs, a list of int.
    states, frames : torch.Tensor
        As `encode_each` returns them.

    Returns
    -------
    list of list of int
        Token IDs of each utterance.
    """
    length = torch.ones(1, device=states.device)
    utterances = zip(states, frames.tolist(), strict=True)
    return [decode(each[None, :count], length)[0] for each, count in utterances]


def search_each(search, states, frames):
    """Search the hypotheses that utterances have alone.

    For all of them together where that changes nothing but the rounding of products, else (as for
    SpeechBrain's searches) one by one.

    Arguments
    ---------
    search : torch.nn.Module
        Such as `speechbrain.decoders.S2SRNNBeamSearcher`; returns a list of the hypotheses first.
    states, frames : torch.Tensor
        As `encode_each` returns them.

    Returns
    -------
    list of list of int
        Token IDs of each utterance.
    """

    def decode(states, lengths):
        return search(states, lengths)[0]

    if treats_utterances_alone(search):
        return decode(states, (frames / states.shape[1]).to(states.device))
    return decode_each(decode, states, frames)


def treats_utterances_alone(search):
    """Whether a search, with its scorers, has the same hypotheses in a batch as for each alone."""
    if not isinstance(search, S2SRNNBeamSearcher | S2SRNNGreedySearcher):
        return False
    if search.choose_backend()[0] == "reference":  # SpeechBrain's loop
        return False
    builder = getattr(search, "scorer", None)
    if builder is None:
        return True
    scorers = [*builder.full_scorers.values(), *builder.partial_scorers.values()]
    return all(
        type(scorer) in (CTCScorer, CoverageScorer, RNNLMScorer)
        # A window lies around the attention of all hypotheses.
        and not getattr(scorer, "ctc_window_size", 0)
        for scorer in scorers
    )
