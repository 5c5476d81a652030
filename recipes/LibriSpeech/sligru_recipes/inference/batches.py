"""Batches whose utterances are recognised as each would be alone.

To an encoder without `use_lengths` the padding of a batch is not nothing: the CNN sees it at an
utterance's end, and the backward direction of the RNN begins in it. So each utterance is encoded by
itself, and what takes the time, the search, is made for all together. With `use_lengths` one call
encodes all: it is told how many frames of features each has.
"""

import torch
from speechbrain.decoders.scorer import CoverageScorer, RNNLMScorer
from torch.nn.utils.rnn import pad_sequence

from sb_fast_sligru import CTCScorer, S2SRNNBeamSearcher, S2SRNNGreedySearcher

from .frames import count_frames, relative_lengths


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


def encode_together(encode, signals, encoder):
    """Encode signals in one call, by an encoder that `encodes_utterances_alone`.

    Arguments
    ---------
    encode : callable
        Maps [B, samples] and relative lengths of their features, [B], to encoder states,
        [B, T, features].
    signals : list of torch.Tensor
        [samples] each.
    encoder : object
        As `count_frames` takes it.

    Returns
    -------
    states, frames : torch.Tensor
        As `encode_each` returns them, whatever the states after an utterance's own are.
    """
    samples = torch.tensor([len(signal) for signal in signals])
    wavs = pad_sequence(signals, batch_first=True)
    states = encode(wavs, relative_lengths(encoder, samples, wavs.shape[1]))
    return states, count_frames(encoder, samples)[1]


def encodes_utterances_alone(encoder):
    """Whether an encoder, told lengths, has the same states of an utterance as for it alone."""
    # "batch" takes one mean of all utterances.
    return takes_lengths(encoder) and encoder.normalize.norm_type != "batch"


def takes_lengths(encoder):
    """Whether the `enc` of an encoder minds lengths: SpeechBrain's takes none."""
    return getattr(encoder.enc, "use_lengths", False)


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
