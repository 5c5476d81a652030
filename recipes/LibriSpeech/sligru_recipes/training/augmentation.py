"""SpeechBrain's augmentations of waveforms on a GPU, without waits for the GPU.

Each class draws what SpeechBrain's of the same name does, and returns the same but for the numbers
drawn. SpeechBrain's draw on one side what the other side needs, so that host and GPU wait for each
other, up to a hundred times a batch.
"""

import speechbrain.augment.augmenter
import speechbrain.augment.time_domain
import torch
from speechbrain.processing.signal_processing import convolve1d


class Augmenter(speechbrain.augment.augmenter.Augmenter):
    """SpeechBrain's, for lengths that are on the host whatever the waveforms are on.

    An augmentation that takes lengths gets them where the waveforms are.
    """

    @property
    def N_augment(self):  # noqa: N802
        """How many augmentations a batch gets. SpeechBrain draws it on the GPU, and reads it."""
        return self._augmentations_drawn

    @N_augment.setter
    def N_augment(self, drawn):  # noqa: N802
        span = (self.min_augmentations, self.max_augmentations + 1)
        self._augmentations_drawn = torch.randint(*span, (1,)).item()

    def augment(self, x, lengths, selected_augmentations):
        """Apply some augmentations one after the other, or as SpeechBrain does in parallel.

        Arguments
        ---------
        x : torch.Tensor
            [B, samples] or [B, samples, channels].
        lengths : torch.Tensor
            [B] relative ones, on the host.
        selected_augmentations : list of str

        Returns
        -------
        x, lengths : torch.Tensor
            As the arguments.
        """
        if self.parallel_augment:
            x, there = super().augment(x, lengths.to(x.device), selected_augmentations)
            return x, there.to(lengths.device)
        for name in selected_augmentations:
            augmentation = self.augmentations[name]
            if self.require_lengths[name]:
                x = augmentation(x, lengths=lengths.to(x.device, non_blocking=True))
            else:
                x = augmentation(x)
            if isinstance(x, tuple):
                x, there = x
                lengths = there.to(lengths.device)
        return x, lengths


class DropFreq(speechbrain.augment.time_domain.DropFreq):
    """SpeechBrain's, with one filter that is made on the host and copied once.

    The same draws give the same filter. Several channels are left to SpeechBrain's class.
    """

    FILTER_LENGTH = 101  # of SpeechBrain's

    def forward(self, waveforms):
        """Remove some frequency bands from [B, samples] or [B, samples, channels]."""
        if waveforms.ndim == 3:
            return super().forward(waveforms)
        impulse = torch.zeros(1, self.FILTER_LENGTH)
        impulse[0, self.FILTER_LENGTH // 2] = 1.0
        # The convolution is a correlation, whose response to an impulse is the filter reversed.
        taps = super().forward(impulse).flip(1).view(1, -1, 1)
        taps = taps.to(waveforms.device, non_blocking=True)
        return convolve1d(waveforms.unsqueeze(2), taps, self.FILTER_LENGTH // 2).squeeze(2)


class DropChunk(speechbrain.augment.time_domain.DropChunk):
    """SpeechBrain's, with all chunks of a batch drawn and silenced at once, where the lengths are.

    Chunks that get noise instead of silence (`noise_factor`), or are not drawn from the whole
    utterance (`drop_start`, `drop_end`), are left to SpeechBrain's class.
    """

    def forward(self, waveforms, lengths):
        """Silence some stretches of each utterance.

        Arguments
        ---------
        waveforms : torch.Tensor
            [B, samples] or [B, samples, channels].
        lengths : torch.Tensor
            [B] relative ones, on the same device.
        """
        whole = self.drop_start == 0 and self.drop_end is None
        if self.noise_factor or not whole or self.drop_count_high == 0:
            return super().forward(waveforms, lengths)
        samples, device = waveforms.shape[1], lengths.device
        shape = (len(waveforms), self.drop_count_high)
        counts = torch.randint(
            self.drop_count_low, self.drop_count_high + 1, (len(waveforms), 1), device=device
        )
        wanted = torch.arange(self.drop_count_high, device=device) < counts
        sizes = torch.randint(
            self.drop_length_low, self.drop_length_high + 1, shape, device=device
        ).where(wanted, 0)
        # The longest chunk of an utterance tells how late all of its chunks may start. In float64
        # all starts are as likely.
        last = (lengths * samples).long().unsqueeze(1) - sizes.amax(1, keepdim=True)
        uniform = torch.rand(shape, device=device, dtype=torch.float64)
        starts = (uniform * (last.clamp(min=0) + 1)).long()
        position = torch.arange(samples, device=device)
        silent = torch.zeros(waveforms.shape[:2], dtype=torch.bool, device=device)
        for start, end in zip(starts.unbind(1), (starts + sizes).unbind(1), strict=True):
            silent |= (position >= start.unsqueeze(1)) & (position < end.unsqueeze(1))
        if waveforms.ndim == 3:
            silent = silent.unsqueeze(2)
        return waveforms.masked_fill(silent, 0.0)
