"""What the speech recognisers share: encoder, error rates, and the run from data to results."""

import os
import statistics

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedData
from speechbrain.dataio.dataset import FilteredSortedDynamicItemDataset
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from ..inference.batches import encode_each, encodes_utterances_alone, takes_lengths
from ..inference.export import export
from ..inference.frames import count_frames, relative_lengths
from .brain import RecipeBrain, make_brain
from .data import batching, dataio_prepare, prepare_data
from .experiment import start_experiment
from .features import move_constants, normalise
from .tokenizer import load_tokenizer

logger = get_logger(__name__)


class ASR(RecipeBrain):
    """Features, encoder and error rates.

    A subclass says in `targets` which token sequences of `dataio_prepare` its batches have.
    """

    best_by = "WER"
    targets = ("tokens",)

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        # SpeechBrain has these on the CPU unless it is told otherwise.
        self.hparams.speed_perturb.device = self.device
        move_constants(self.hparams.compute_features, self.device)
        self.unread = {}  # utterance ID -> words, of the test split's files that cannot be read
        self.test_losses = []  # of a split's utterances

    def to_device(self, batch):
        """Move a batch's data.

        Its lengths stay on the host, where SpeechBrain's CTC loss wants them.
        """
        for key in ("sig", *self.targets):
            data, lengths = batch[key]
            data = data.to(self.device, non_blocking=True)
            setattr(batch, key, PaddedData(data, lengths))
        return batch

    def encode(self, batch, stage):
        """Map a batch's waveforms, augmented in training, to encoder states.

        In a test each utterance is encoded as if it were a batch of its own: alone, or together
        by an encoder of `use_lengths`.

        Returns
        -------
        states : torch.Tensor
            [B, T, features], T in encoder frames; B is larger than the batch where augmentation
            adds copies (`augment_targets` follows).
        wav_lens : torch.Tensor
            [B] length of each utterance relative to the longest, on the host; in states, but for
            training without `use_lengths`.
        """
        is_told_lengths = takes_lengths(self.hparams)

        def encode(wavs, lengths):
            feats = self.hparams.compute_features(wavs)
            lengths = lengths.to(self.device, non_blocking=True)
            if stage == sb.Stage.TRAIN:
                epoch = self.hparams.epoch_counter.current
                feats = normalise(self.modules.normalize, feats, lengths, epoch)
            else:
                feats = self.modules.normalize(feats, lengths)
            return self.modules.enc(feats, lengths) if is_told_lengths else self.modules.enc(feats)

        wavs, wav_lens = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
        samples = (wav_lens * wavs.shape[1]).round().long()
        if stage == sb.Stage.TEST and not encodes_utterances_alone(self.hparams):
            signals = [wav[:count] for wav, count in zip(wavs, samples.tolist(), strict=True)]
            states, frames = encode_each(lambda wav: encode(wav, torch.ones(1)), signals)
            return states, frames / states.shape[1]
        if is_told_lengths:
            states = encode(wavs, relative_lengths(self.hparams, samples, wavs.shape[1]))
        else:
            states = encode(wavs, wav_lens)
            if stage == sb.Stage.TRAIN:
                return states, wav_lens
        # All states that an utterance has where it is alone.
        return states, count_frames(self.hparams, samples)[1] / states.shape[1]

    def augment_targets(self, stage, *targets):
        """Repeat token sequences and lengths as augmentation did the waveforms."""
        if stage == sb.Stage.TRAIN:
            return self.hparams.wav_augment.replicate_multiple_labels(*targets)
        return targets

    def ctc_loss(self, log_probs, tokens, wav_lens, token_lens):
        """The CTC loss of a batch, both lengths relative and on the host."""
        blank_index = self.hparams.blank_index
        return self.hparams.ctc_cost(
            log_probs, tokens, wav_lens, token_lens, blank_index=blank_index
        )

    def compute_loss(self, stage, cost, log_probs, targets, wav_lens, target_lens):
        """Compute the loss of a batch, in a test that of each utterance by itself.

        Arguments
        ---------
        stage : speechbrain.Stage
        cost : callable
            Maps the others, of one utterance or all, to a loss.
        log_probs, targets : torch.Tensor
            [B, T, tokens] and [B, U].
        wav_lens, target_lens : torch.Tensor
            [B] relative lengths, on the host.

        Returns
        -------
        torch.Tensor
            In a test the mean over the batch's utterances, on the host.
        """
        if stage != sb.Stage.TEST:
            return cost(log_probs, targets, wav_lens, target_lens)
        losses, one = [], torch.ones(1)
        frames = (wav_lens * log_probs.shape[1]).round().long().tolist()
        tokens = (target_lens * targets.shape[1]).round().long().tolist()
        for index, (count, length) in enumerate(zip(frames, tokens, strict=True)):
            which = slice(index, index + 1)
            losses.append(cost(log_probs[which, :count], targets[which, :length], one, one))
        losses = torch.stack(losses).cpu()
        self.test_losses += losses[losses.isfinite()].tolist()
        return losses.mean()

    def count_errors(self, batch, token_ids):
        """Add a batch's hypotheses, lists of token IDs, to the error rates."""
        hypotheses = self.tokenizer(token_ids, task="decode_from_list")
        references = [words.split(" ") for words in batch.wrd]
        self.wer_metric.append(batch.id, hypotheses, references)
        self.cer_metric.append(batch.id, hypotheses, references)

    def on_stage_start(self, stage, epoch=None):
        """Start counting errors anew."""
        super().on_stage_start(stage, epoch)
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.error_rate_computer()
            self.cer_metric = self.hparams.cer_computer()
        if stage == sb.Stage.TEST:
            self.test_losses = []
            references = [words.split(" ") for words in self.unread.values()]
            for metric in (self.wer_metric, self.cer_metric):
                metric.append(list(self.unread), [[] for _ in references], references)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """End the stage; the loss of a test is the mean of its utterances', not of its batches'."""
        if stage == sb.Stage.TEST and self.test_losses:
            stage_loss = statistics.fmean(self.test_losses)
        super().on_stage_end(stage, stage_loss, epoch)

    def collect_stats(self, loss):
        """WER and CER in %."""
        return {
            "WER": self.wer_metric.summarize("error_rate"),
            "CER": self.cer_metric.summarize("error_rate"),
        }

    def test(self, split, dataset):
        """Evaluate one split as `RecipeBrain.test` does, and write wer_SPLIT.txt, cer_SPLIT.txt.

        A file that cannot be read is named, and all its words count as errors.
        """
        self.unread = {}
        with dataset.output_keys_as(["sig"]):
            for index, utterance in enumerate(dataset.data_ids):
                try:
                    dataset[index]
                except OSError as error:
                    logger.warning(f"{split}: {error}: its words count as errors")
                    self.unread[utterance] = dataset.data[utterance]["wrd"]
        # Of like duration side by side: the search of a batch takes as long as its longest one's.
        readable = sorted(
            (name for name in dataset.data_ids if name not in self.unread),
            key=lambda name: dataset.data[name]["duration"],
        )
        stats = super().test(split, FilteredSortedDynamicItemDataset(dataset, readable))
        run_on_main(self._write_errors, [split, dataset.data_ids])
        return stats

    def _write_errors(self, split, utterances):
        order = {name: number for number, name in enumerate(utterances)}
        for name, metric in (("wer", self.wer_metric), ("cer", self.cer_metric)):
            path = os.path.join(self.hparams.output_wer_folder, f"{name}_{split}.txt")
            metric.scores.sort(key=lambda score: order[score["key"]])
            with open(path, "w", encoding="utf-8") as file:
                metric.write_stats(file)


def run(brain_class, argv, script):
    """Prepare, train, test and, by the key `export_inference`, make the folder for inference.

    Arguments
    ---------
    brain_class : type
        Subclass of `ASR`.
    argv : list of str or None
        Command line; None: that of the process.
    script : str
        The file of the command, which is saved with the run.

    Returns
    -------
    dict
        Test split -> {"loss": ..., "WER": ..., "CER": ...}, both rates in %.
    """
    with start_experiment(argv, script) as experiment:
        prepare_data(experiment.hparams)
        tokenizer = load_tokenizer(experiment.hparams)
        experiment.fit_to_tokenizer(tokenizer)
        hparams = experiment.hparams
        train_data, valid_data, test_data = dataio_prepare(hparams, tokenizer, brain_class.targets)
        brain = make_brain(brain_class, hparams, experiment.run_opts, tokenizer)
        train_data, train_loader_kwargs = batching(hparams, train_data)
        # Brain tells this sampler the epoch: else every epoch would have the same batches.
        brain.train_sampler = train_loader_kwargs.get("batch_sampler")
        brain.fit(
            hparams["epoch_counter"],
            train_data,
            valid_data,
            train_loader_kwargs=train_loader_kwargs,
            valid_loader_kwargs=hparams["valid_dataloader_opts"],
            when_ready=experiment.save,
        )
        results = {split: brain.test(split, dataset) for split, dataset in test_data.items()}
        if hparams["export_inference"] and not brain.debug:  # which keeps no checkpoint
            run_on_main(export, [hparams["output_folder"]])
        return results
