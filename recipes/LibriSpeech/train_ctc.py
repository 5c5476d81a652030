"""Train a CTC speech recogniser on LibriSpeech or on the embedded corpus.

    python recipes/LibriSpeech/train_ctc.py hparams/librispeech_ctc.yaml --data_folder=LIBRISPEECH

The encoder is SpeechBrain's CRDNN with the RNN of the `rnn_class` key. `--KEY=VALUE` overrides a
key of the YAML, `--overrides=FILE.yaml` all keys of a second YAML (those on the command line win),
and SpeechBrain's run options (`--device`, `--precision`, `--debug`, ...) work as everywhere.
Stopped, the same command resumes from the last checkpoint. See README.md beside this file.
"""

import os
import re
import shutil
import sys
import tempfile
from functools import partial
from itertools import pairwise

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from prepare import prepare_librispeech
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.distributed import ddp_init_group, main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

# A few transcripts with too many tokens for their audio are wrong data, more are a wrong setting.
MAX_UNALIGNABLE = 0.01


class CTCBrain(sb.Brain):
    """Encoder, CTC loss and greedy decoding; needs the attribute `tokenizer`."""

    def compute_forward(self, batch, stage):
        """Map waveforms to log-probabilities.

        Returns
        -------
        log_probs : torch.Tensor
            [B, T, tokens] float32, T in encoder frames.
        wav_lens : torch.Tensor
            [B] length of each utterance relative to the longest.
        """
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
        feats = self.hparams.compute_features(wavs)
        feats = self.modules.normalize(feats, wav_lens, epoch=self.hparams.epoch_counter.current)
        logits = self.modules.ctc_lin(self.modules.enc(feats))
        return self.hparams.log_softmax(logits.float()), wav_lens

    def compute_objectives(self, predictions, batch, stage):
        """Return the CTC loss of the batch; out of training, also collect its errors."""
        log_probs, wav_lens = predictions
        tokens, token_lens = batch.tokens
        loss = self.hparams.ctc_cost(log_probs, tokens, wav_lens, token_lens)
        if stage != sb.Stage.TRAIN:
            token_ids = self.hparams.decoding_function(log_probs, wav_lens)
            hypotheses = self.tokenizer(token_ids, task="decode_from_list")
            references = [words.split(" ") for words in batch.wrd]
            self.wer_metric.append(batch.id, hypotheses, references)
            self.cer_metric.append(batch.id, hypotheses, references)
        return loss

    def on_stage_start(self, stage, epoch=None):
        """Start counting errors anew."""
        if stage != sb.Stage.TRAIN:
            self.wer_metric = self.hparams.error_rate_computer()
            self.cer_metric = self.hparams.cer_computer()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the stage; after validation anneal the learning rate and save a checkpoint."""
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            self.train_stats = stats
            return
        stats["WER"] = self.wer_metric.summarize("error_rate")
        stats["CER"] = self.cer_metric.summarize("error_rate")
        if stage == sb.Stage.VALID:
            old_lr, new_lr = self.hparams.lr_annealing(stage_loss)
            sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
            self.hparams.train_logger.log_stats(
                stats_meta={"epoch": epoch, "lr": old_lr},
                train_stats=self.train_stats,
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": stats["WER"], "epoch": epoch}, min_keys=["WER"]
            )
        else:
            self.test_stats = stats

    def test(self, split, dataset):
        """Evaluate the checkpoint of lowest validation WER on one split.

        Writes wer_SPLIT.txt and cer_SPLIT.txt, a line in train_log.txt, and returns
        {"loss": ..., "WER": ..., "CER": ...}, both rates in %.
        """
        self.evaluate(
            dataset, min_key="WER", test_loader_kwargs=dict(self.hparams.test_dataloader_opts)
        )
        self.hparams.train_logger.log_stats(
            stats_meta={"split": split, "epoch loaded": self.hparams.epoch_counter.current},
            test_stats=self.test_stats,
        )
        run_on_main(self._write_errors, [split])
        return self.test_stats

    def _write_errors(self, split):
        for name, metric in (("wer", self.wer_metric), ("cer", self.cer_metric)):
            path = os.path.join(self.hparams.output_wer_folder, f"{name}_{split}.txt")
            with open(path, "w", encoding="utf-8") as file:
                metric.write_stats(file)


def parse_arguments(argv=None):
    """Parse SpeechBrain's command line, `--overrides=FILE.yaml` included.

    Returns
    -------
    hparams_file : str
    run_opts : speechbrain.utils.run_opts.RunOptions
    overrides : dict
        For `load_hyperpyyaml`: the keys of the file, then those of the command line.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    yaml = ruamel.yaml.YAML()  # keeps tags such as !name: as they are
    overrides = yaml.load(overrides) or {}
    if "overrides" in overrides:
        with open(overrides.pop("overrides"), encoding="utf-8") as file:
            overrides = {**yaml.load(file), **overrides}
    return hparams_file, run_opts, overrides


def prepare_data(hparams):
    """Write the manifests that the YAML names, unless `skip_prep` says that they are there."""
    if hparams["skip_prep"]:
        return
    arguments = ("data_folder", "save_folder", "train_splits", "dev_splits", "test_splits")
    run_on_main(
        prepare_librispeech,
        kwargs={name: hparams[name] for name in (*arguments, "skip_bad_files")},
    )


def load_tokenizer(hparams):
    """Train the tokenizer on the train transcripts, or load it if that was done before.

    Returns
    -------
    speechbrain.tokenizers.SentencePiece.SentencePiece
        Of at most `vocab_size` tokens: as many as the transcripts can fill.

    Raises
    ------
    ValueError
        If `vocab_size` is smaller than the number of characters.
    """
    folder, token_type = hparams["save_folder"], hparams["token_type"]

    def train(size):
        if os.path.isfile(os.path.join(folder, f"{size}_{token_type}.model")):
            return size
        # SentencePiece takes no spaces in its paths, which save_folder may have.
        with tempfile.TemporaryDirectory() as scratch:
            try:
                SentencePiece(
                    model_dir=scratch,
                    vocab_size=size,
                    annotation_train=hparams["train_csv"],
                    annotation_read="wrd",
                    model_type=token_type,
                    character_coverage=hparams["character_coverage"],
                )
            except RuntimeError as error:  # the limit is told only in this message
                limit = re.search(r"too high .* value <= (\d+)", str(error))
                if limit is None:
                    raise ValueError(f"vocab_size {size} is impossible: {error}") from error
                logger.warning(
                    f"vocab_size {size} is more than the train transcripts can fill; "
                    f"using the most they can, {limit[1]}"
                )
                return train(int(limit[1]))
            for name in os.listdir(scratch):
                shutil.move(os.path.join(scratch, name), os.path.join(folder, name))
        return size

    size = main_process_only(train)(hparams["vocab_size"])
    return SentencePiece(model_dir=folder, vocab_size=size, model_type=token_type)


def check_alignable(dataset, tokenizer, frames_per_second):
    """Check that CTC can align each transcript with its audio.

    Arguments
    ---------
    dataset : DynamicItemDataset
        With `duration` (s) and `wrd`.
    tokenizer : SentencePiece
    frames_per_second : float
        Of the encoder's output.

    Raises
    ------
    ValueError
        If more than 1 % of the transcripts have more tokens than the encoder has frames: CTC
        would silently learn nothing from them. Fewer are logged.
    """
    impossible = []
    for utterance, row in dataset.data.items():
        tokens = tokenizer.sp.encode_as_ids(row["wrd"])
        # Equal neighbours need a blank between them.
        needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))
        if needed > row["duration"] * frames_per_second:
            impossible.append(utterance)
    if impossible:
        message = (
            f"{len(impossible)} of {len(dataset)} train utterances (such as {impossible[0]}) have "
            f"more tokens than encoder frames ({frames_per_second:g} per second): CTC cannot "
            "learn from them. A smaller time_pooling_size or a larger vocab_size helps."
        )
        if len(impossible) > MAX_UNALIGNABLE * len(dataset):
            raise ValueError(message)
        logger.warning(message)


def dataio_prepare(hparams):
    """Build the datasets from the manifests, and the tokenizer.

    Returns
    -------
    train_data, valid_data : DynamicItemDataset
    test_data : dict
        Split name -> DynamicItemDataset.
    tokenizer : SentencePiece
    """
    tokenizer = load_tokenizer(hparams)

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        return sb.dataio.dataio.read_audio(wav)

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens")
    def text_pipeline(wrd):
        return torch.LongTensor(tokenizer.sp.encode_as_ids(wrd))

    def load(csv_path):
        return sb.dataio.dataset.DynamicItemDataset.from_csv(
            csv_path,
            dynamic_items=[audio_pipeline, text_pipeline],
            output_keys=["id", "sig", "wrd", "tokens"],
        )

    train_data = load(hparams["train_csv"])
    check_alignable(
        train_data, tokenizer, 1000 / hparams["hop_length"] / hparams["time_pooling_size"]
    )
    # Utterances of like duration side by side: little padding in fixed batches.
    valid_data = load(hparams["valid_csv"]).filtered_sorted(sort_key="duration")
    test_data = {
        os.path.splitext(os.path.basename(path))[0]: load(path) for path in hparams["test_csv"]
    }
    return train_data, valid_data, test_data, tokenizer


def make_brain(hparams, run_opts, tokenizer):
    """Build the Brain; its output layer has the size of the tokenizer's vocabulary."""
    ctc_lin = hparams["ctc_lin"](n_neurons=tokenizer.sp.vocab_size())
    hparams["checkpointer"].add_recoverable("ctc_lin", ctc_lin)
    brain = CTCBrain(
        modules={**hparams["modules"], "ctc_lin": ctc_lin},
        opt_class=partial(hparams["opt_class"], lr=hparams["lr"]),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.tokenizer = tokenizer
    return brain


def batching(hparams, train_data):
    """Sort the train set for fixed batches, or plan dynamic ones.

    Returns
    -------
    train_data : DynamicItemDataset
    loader_kwargs : dict
        For `Brain.fit`; dynamic batches come as its `batch_sampler`.

    Raises
    ------
    ValueError
        If `sorting` is not one of ascending, descending and random.
    """
    options = dict(hparams["train_dataloader_opts"])
    if hparams["dynamic_batching"]:
        del options["batch_size"]
        sampler = DynamicBatchSampler(train_data, **hparams["dynamic_batch_sampler"])
        return train_data, {**options, "batch_sampler": sampler}
    sorting = hparams["sorting"]
    if sorting not in ("ascending", "descending", "random"):
        raise ValueError(f"sorting must be ascending, descending or random, got {sorting!r}")
    if sorting == "random":
        return train_data, {**options, "shuffle": True}
    return train_data.filtered_sorted(sort_key="duration", reverse=sorting == "descending"), options


def main(argv=None):
    """Prepare, train and test.

    Arguments
    ---------
    argv : list of str, optional
        Command line; that of the process by default.

    Returns
    -------
    dict
        Test split -> {"loss": ..., "WER": ..., "CER": ...}, both rates in %.
    """
    hparams_file, run_opts, overrides = parse_arguments(argv)
    ddp_init_group(run_opts)
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, overrides)
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
    prepare_data(hparams)
    train_data, valid_data, test_data, tokenizer = dataio_prepare(hparams)
    brain = make_brain(hparams, run_opts, tokenizer)
    train_data, train_loader_kwargs = batching(hparams, train_data)
    # Brain tells this sampler the epoch: else every epoch would have the same batches.
    brain.train_sampler = train_loader_kwargs.get("batch_sampler")
    brain.fit(
        hparams["epoch_counter"],
        train_data,
        valid_data,
        train_loader_kwargs=train_loader_kwargs,
        valid_loader_kwargs=hparams["valid_dataloader_opts"],
    )
    return {split: brain.test(split, dataset) for split, dataset in test_data.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
