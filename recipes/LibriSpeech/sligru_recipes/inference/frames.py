"""How many frames the encoder makes of a waveform."""

import math

MIN_SECONDS = 0.1  # shorter audio is padded


def count_frames(encoder, samples):
    """Count the frames of waveforms.

    Arguments
    ---------
    encoder : object
        Has the `compute_features` and `enc` of a recogniser.
    samples : int or torch.Tensor

    Returns
    -------
    features, states : int or torch.Tensor
        Frames of the waveform's features, and of the states that the encoder makes of them.
    """
    hop, pooling = strides(encoder)
    features = samples // hop + 1  # centred on 0, hop, 2 hop, ...
    return features, features // pooling


def relative_lengths(encoder, samples, longest):
    """Lengths of features relative to those of the longest waveform.

    Of the frames that each has, unlike lengths of waveforms, by which one may be missing.

    Arguments
    ---------
    encoder : object
        As of `count_frames`.
    samples : torch.Tensor
        Of each waveform, [B].
    longest : int
        Samples of the padded waveforms.

    Returns
    -------
    torch.Tensor
        [B] float64: in float32 SpeechBrain's masks would have a frame too many.
    """
    return count_frames(encoder, samples)[0].double() / count_frames(encoder, longest)[0]


def strides(encoder):
    """Samples from one frame of features to the next, and frames in one of states."""
    pooling = getattr(encoder.enc, "time_pooling", None)  # CRDNN's key of that name may be False
    return (
        encoder.compute_features.compute_STFT.hop_length,
        1 if pooling is None else pooling.pool_layer.kernel_size[-1],
    )


def shortest_signal(recogniser):
    """Samples that a signal is padded to if it has fewer; `recogniser` is an EncoderASR or such."""
    seconds = int(MIN_SECONDS * recogniser.audio_normalizer.sample_rate)
    return max(seconds, math.prod(strides(recogniser.mods.encoder)))
