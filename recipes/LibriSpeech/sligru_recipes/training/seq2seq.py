"""Encoder, attention decoder and beam search: the recogniser of train_seq2seq.py."""

import filecmp
import os

import speechbrain as sb
from speechbrain.decoders.scorer import ScorerBuilder
from speechbrain.utils.checkpoints import torch_recovery

from ..inference.batches import search_each
from .checkpoints import LOAD_ERRORS, reason_of
from .recogniser import ASR


class Seq2Seq(ASR):
    """Encoder and attention decoder, the sum of CTC loss and negative log-likelihood."""

    targets = ("tokens", "tokens_bos", "tokens_eos")

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        self.test_search = make_test_search(self.hparams, tokenizer, self.device)

    def compute_forward(self, batch, stage):
        """Map waveforms and the tokens so far to log-probabilities.

        Returns
        -------
        log_probs : torch.Tensor
            [B, U + 1, tokens] float32, of each next token after the true ones.
        ctc_log_probs : torch.Tensor or None
            [B, T, tokens] float32, T in encoder frames; None where there is no CTC loss.
        wav_lens : torch.Tensor
            [B] length of each utterance relative to the longest, on the host.
        token_ids : list of list of int, or None
            What was recognised; None in training.
        """
        states, wav_lens = self.encode(self.to_device(batch), stage)
        lengths = wav_lens.to(self.device, non_blocking=True)
        (tokens_bos,) = self.augment_targets(stage, batch.tokens_bos.data)
        hidden, _ = self.modules.dec(self.modules.emb(tokens_bos), states, lengths)
        log_probs = self.hparams.log_softmax(self.modules.seq_lin(hidden).float())
        ctc_log_probs = token_ids = None
        if stage == sb.Stage.TRAIN:
            if self.hparams.epoch_counter.current <= self.hparams.number_of_ctc_epochs:
                ctc_log_probs = self.hparams.log_softmax(self.modules.ctc_lin(states).float())
        elif stage == sb.Stage.VALID:
            token_ids, *_ = self.hparams.valid_search(states, lengths)
        else:
            frames = (wav_lens * states.shape[1]).round().long()
            token_ids = search_each(self.test_search, states, frames)
        return log_probs, ctc_log_probs, wav_lens, token_ids

    def compute_objectives(self, predictions, batch, stage):
        """Return the loss of the batch; out of training that of the decoder, and count errors."""
        log_probs, ctc_log_probs, wav_lens, token_ids = predictions
        tokens_eos, eos_lens = self.augment_targets(stage, *batch.tokens_eos)

        def cost(log_probs, tokens, _, lengths):
            lengths = lengths.to(self.device, non_blocking=True)
            return self.hparams.seq_cost(log_probs, tokens, length=lengths)

        loss = self.compute_loss(stage, cost, log_probs, tokens_eos, eos_lens, eos_lens)
        if ctc_log_probs is not None:
            tokens, token_lens = self.augment_targets(stage, *batch.tokens)
            ctc_loss = self.ctc_loss(ctc_log_probs, tokens, wav_lens, token_lens)
            weight = self.hparams.ctc_weight
            loss = weight * ctc_loss + (1 - weight) * loss
        if stage != sb.Stage.TRAIN:
            self.count_errors(batch, token_ids)
        return loss


def make_test_search(hparams, tokenizer, device):
    """The beam search of the YAML with its scorers.

    Arguments
    ---------
    hparams : SimpleNamespace
    tokenizer : SentencePiece
    device : str
        Where the language model goes.

    Returns
    -------
    speechbrain.decoders.S2SRNNBeamSearcher
    """
    full_scorers, weights = [hparams.coverage_scorer], {"coverage": hparams.coverage_penalty}
    if hparams.lm_folder:
        language_model = load_language_model(hparams, tokenizer).to(device)
        full_scorers.append(hparams.rnnlm_scorer(language_model=language_model))
        weights["rnnlm"] = hparams.lm_weight
    weights["ctc"] = hparams.ctc_weight_decode
    # CTC scores are costly, so they are computed for the tokens that the others prefer.
    scorer = ScorerBuilder(weights, full_scorers, partial_scorers=[hparams.ctc_scorer])
    return hparams.test_search(scorer=scorer)


def load_language_model(hparams, tokenizer):
    """Load lm.ckpt from `lm_folder`, an output folder of train_lm.py.

    Raises
    ------
    ValueError
        If it belongs to another tokenizer, is damaged or has other sizes than `lm_model`.
    """
    path = os.path.join(hparams.lm_folder, "lm.ckpt")
    their_tokenizer = os.path.join(hparams.lm_folder, "tokenizer.ckpt")
    if not filecmp.cmp(their_tokenizer, f"{tokenizer.prefix_model_file}.model", shallow=False):
        raise ValueError(
            f"lm_folder {hparams.lm_folder} has another tokenizer: "
            f"set tokenizer_file to {their_tokenizer}"
        )
    language_model = hparams.lm_model()
    try:
        # Not by a Pretrainer: it would leave layers that the file lacks at random values.
        torch_recovery(language_model, path, end_of_epoch=True)
    except LOAD_ERRORS as error:
        raise ValueError(
            f"lm_folder {hparams.lm_folder}: its lm.ckpt is damaged, or does not fit lm_model, "
            f"whose sizes are the YAML's keys lm_*: {reason_of(error)}"
        ) from error
    return language_model.requires_grad_(False)
