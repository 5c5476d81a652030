"""Encoder and CTC: the recogniser of train_ctc.py."""

import speechbrain as sb

from ..inference.batches import decode_each
from .recogniser import ASR


class CTC(ASR):
    """Encoder, CTC loss and greedy decoding."""

    def compute_forward(self, batch, stage):
        """Map waveforms to log-probabilities.

        Returns
        -------
        log_probs : torch.Tensor
            [B, T, tokens] float32, T in encoder frames.
        wav_lens : torch.Tensor
            [B] length of each utterance relative to the longest, on the host.
        """
        states, wav_lens = self.encode(self.to_device(batch), stage)
        logits = self.modules.ctc_lin(states)
        return self.hparams.log_softmax(logits.float()), wav_lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the CTC loss of the batch; out of training, also count its errors."""
        log_probs, wav_lens = predictions
        tokens, token_lens = self.augment_targets(stage, *batch.tokens)
        loss = self.compute_loss(stage, self.ctc_loss, log_probs, tokens, wav_lens, token_lens)
        decode = self.hparams.decoding_function
        if stage == sb.Stage.VALID:
            self.count_errors(batch, decode(log_probs, wav_lens))
        elif stage == sb.Stage.TEST:
            frames = (wav_lens * log_probs.shape[1]).round().long()
            self.count_errors(batch, decode_each(decode, log_probs, frames))
        return loss
