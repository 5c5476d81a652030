"""SpeechBrain's Fbank features, each frame of which is told by its own samples alone."""

import torch
from torch import nn

from ._stock import features

__all__ = ["StreamingFbank"]


class StreamingFbank(features.Fbank):
    """Log energies of Mel filters, for recognisers that hear speech as it is spoken.

    :class:`speechbrain.lobes.features.Fbank` raises energies to 80 dB below those of the
    utterance's loudest frame, which may be its last. Here the floor is a level. The filters, which
    SpeechBrain makes anew at each call, are one matrix, and ``.to`` moves them and the window.

    Arguments
    ---------
    sample_rate : int
        In Hz.
    f_min, f_max : int
        Lowest and highest frequency of the filters, in Hz; `f_max` is half of `sample_rate` if not
        given.
    n_fft : int
        Samples of a transform.
    n_mels : int
        Filters F.
    filter_shape : str
        "triangular", "rectangular" or "gaussian".
    win_length, hop_length : float
        Milliseconds of the window, and from one frame to the next.
    floor : float
        Lower energies are raised to this level, in dB. A sine at full scale has some 40 dB.

    Example
    -------
    >>> fbank = StreamingFbank()
    >>> speech = torch.rand(1, 16000)
    >>> fbank(speech).shape
    torch.Size([1, 101, 40])
    """

    def __init__(
        self,
        sample_rate=16000,
        f_min=0,
        f_max=None,
        n_fft=400,
        n_mels=40,
        filter_shape="triangular",
        win_length=25,
        hop_length=10,
        floor=-50.0,
    ):
        super().__init__(
            sample_rate=sample_rate,
            f_min=f_min,
            f_max=f_max,
            n_fft=n_fft,
            n_mels=n_mels,
            filter_shape=filter_shape,
            win_length=win_length,
            hop_length=hop_length,
        )
        window = self.compute_STFT.window
        del self.compute_STFT.window
        self.compute_STFT.register_buffer("window", window, persistent=False)
        self.compute_fbanks = _LogFilters(self.compute_fbanks, floor)


class _LogFilters(nn.Module):
    """In the place of a :class:`speechbrain.processing.features.Filterbank`."""

    def __init__(self, filters, floor):
        super().__init__()
        self.floor = floor
        filters.log_mel = False
        matrix = filters(torch.eye(filters.n_stft).unsqueeze(0)).squeeze(0)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, spectrogram):
        """Levels in dB, [B, T, F], of a power spectrogram, [B, T, n_fft / 2 + 1]."""
        energies = spectrogram @ self.matrix
        return 10 * energies.clamp(min=10 ** (self.floor / 10)).log10()
