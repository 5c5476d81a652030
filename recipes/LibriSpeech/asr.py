"""What the recognisers share: command line, data, tokenizer, batches, error rates, the run itself.

`run(BRAIN_CLASS, argv)` is a whole recipe; the scripts train_*.py define the classes.
"""

import copy
import csv
import inspect
import os
import re
import shutil
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import ruamel.yaml
import sentencepiece
import shards
import soundfile
import speechbrain as sb
import torch
from brain import RecipeBrain
from export_inference import export
from hyperpyyaml import load_hyperpyyaml
from prepare import SAMPLE_RATE, prepare_librispeech
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.tokenizers.SentencePiece import SentencePiece
from speechbrain.utils.distributed import ddp_init_group, main_process_only, run_on_main
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)

# A few transcripts with too many tokens for their audio are wrong data, more are a wrong setting.
MAX_UNALIGNABLE = 0.01


class ASR(RecipeBrain):
    """Features, encoder and error rates.

    A subclass says in `targets` which token sequences of `dataio_prepare` its batches have.
    """

    best_by = "WER"
    targets = ("tokens",)

    def __init__(self, tokenizer, **kwargs):
        super().__init__(tokenizer, **kwargs)
        # It resamples on the CPU unless it is told otherwise.
        self.hparams.speed_perturb.device = self.device

    def encode(self, batch, stage):
        """Map a batch's waveforms, augmented in training, to encoder states.

        Returns
        -------
        states : torch.Tensor
            [B, T, features], T in encoder frames; B is larger than the batch where augmentation
            adds copies (`augment_targets` follows).
        wav_lens : torch.Tensor
            [B] length of each utterance relative to the longest.
        """
        wavs, wav_lens = batch.sig
        if stage == sb.Stage.TRAIN:
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
        feats = self.hparams.compute_features(wavs)
        feats = self.modules.normalize(feats, wav_lens, epoch=self.hparams.epoch_counter.current)
        return self.modules.enc(feats), wav_lens

    def augment_targets(self, stage, *targets):
        """Repeat token sequences and lengths as augmentation did the waveforms."""
        if stage == sb.Stage.TRAIN:
            return self.hparams.wav_augment.replicate_multiple_labels(*targets)
        return targets

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

    def collect_stats(self, loss):
        """WER and CER in %."""
        return {
            "WER": self.wer_metric.summarize("error_rate"),
            "CER": self.cer_metric.summarize("error_rate"),
        }

    def test(self, split, dataset):
        """Evaluate one split as `RecipeBrain.test` does, and write wer_SPLIT.txt, cer_SPLIT.txt."""
        stats = super().test(split, dataset)
        run_on_main(self._write_errors, [split])
        return stats

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
        For `load_hparams`: the keys of the file, then those of the command line.

    Raises
    ------
    ValueError
        If a key is given twice, or its value is not YAML.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    yaml = ruamel.yaml.YAML()  # keeps tags such as !name: as they are
    try:
        overrides = yaml.load(overrides) or {}
    except ruamel.yaml.error.MarkedYAMLError as error:
        raise ValueError(f"keys on the command line: {error.problem}") from error
    if "overrides" in overrides:
        with open(overrides.pop("overrides"), encoding="utf-8") as file:
            overrides = {**yaml.load(file), **overrides}
    return hparams_file, run_opts, overrides


def load_hparams(hparams_file, overrides):
    """Load a YAML and build what it describes.

    Raises
    ------
    ValueError
        If an override names no key of the YAML.
    """
    with open(hparams_file, encoding="utf-8") as file:
        keys = ruamel.yaml.YAML().load(file)
        for key in overrides:
            if key not in keys:
                raise ValueError(f"{key} is neither a key of {hparams_file} nor a run option")
        file.seek(0)
        return load_hyperpyyaml(file, copy.deepcopy(overrides))


def prepare_data(hparams):
    """Write the manifests that the YAML names, unless `skip_prep` says that they are there.

    Shards and the manifest of noises are written too, if the YAML has folders for them.
    """
    if not hparams["skip_prep"]:
        arguments = (
            "data_folder",
            "save_folder",
            "train_splits",
            "dev_splits",
            "test_splits",
            "skip_bad_files",
            "num_workers",
        )
        run_on_main(prepare_librispeech, kwargs={name: hparams[name] for name in arguments})
    if hparams.get("shard_folder"):
        for manifest in (hparams["train_csv"], hparams["valid_csv"], *hparams["test_csv"]):
            run_on_main(shards.pack, [manifest, hparams["shard_folder"]])
    if hparams.get("noise_folder"):
        run_on_main(prepare_noise, [hparams["noise_folder"], hparams["noise_csv"]])


def prepare_noise(folder, manifest):
    """Write the manifest of a folder of noises, in the form that AddNoise reads.

    Raises
    ------
    FileNotFoundError
        If `folder` holds no WAV or FLAC file, at any depth.
    ValueError
        If one of them is not at 16 kHz or not mono.
    """
    paths = sorted(path for ext in ("wav", "flac") for path in Path(folder).rglob(f"*.{ext}"))
    if not paths:
        raise FileNotFoundError(f"noise_folder {folder} holds no .wav or .flac file")
    with open(manifest, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("ID", "duration", "wav", "wav_format", "wav_opts"))
        for number, path in enumerate(paths):
            audio = soundfile.info(path)
            if (audio.samplerate, audio.channels) != (SAMPLE_RATE, 1):
                raise ValueError(
                    f"noise_folder: {path} has {audio.samplerate} Hz and {audio.channels} "
                    f"channel(s), expected {SAMPLE_RATE} Hz and 1"
                )
            rows.writerow((number, audio.duration, path.resolve(), path.suffix[1:], ""))


def load_tokenizer(hparams, text_file=None):
    """Train the tokenizer, or load it if that was done before or `tokenizer_file` is given.

    A YAML that has `bos_index` and `eos_index` gets a tokenizer with these two tokens.

    Arguments
    ---------
    hparams : dict
    text_file : str, optional
        To train on, a sentence a line; the transcripts of `train_csv` by default.

    Returns
    -------
    speechbrain.tokenizers.SentencePiece.SentencePiece
        Of at most `vocab_size` tokens: as many as the text can fill. A given one has its own size.

    Raises
    ------
    ValueError
        If `vocab_size` is smaller than the number of characters, or the given tokenizer's bos and
        eos are not those of the YAML.
    """
    folder, token_type = hparams["save_folder"], hparams["token_type"]

    def name(size):
        return os.path.join(folder, f"{size}_{token_type}.model")

    def adopt(path):
        size = sentencepiece.SentencePieceProcessor(model_file=path).vocab_size()
        shutil.copyfile(path, name(size))
        return size

    def train(size):
        if os.path.isfile(name(size)):
            return size
        # SentencePiece takes no spaces in its paths, which save_folder may have.
        with tempfile.TemporaryDirectory() as scratch:
            source = {"annotation_train": hparams["train_csv"], "annotation_read": "wrd"}
            if text_file is not None:
                source = {"text_file": os.path.join(scratch, "train.txt")}
                os.symlink(os.path.abspath(text_file), source["text_file"])
            try:
                SentencePiece(
                    model_dir=scratch,
                    vocab_size=size,
                    model_type=token_type,
                    character_coverage=hparams["character_coverage"],
                    bos_id=hparams.get("bos_index", -1),
                    eos_id=hparams.get("eos_index", -1),
                    **source,
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
            shutil.move(os.path.join(scratch, os.path.basename(name(size))), name(size))
        return size

    given = hparams["tokenizer_file"]
    size = main_process_only(adopt if given else train)(given or hparams["vocab_size"])
    tokenizer = SentencePiece(model_dir=folder, vocab_size=size, model_type=token_type)
    found = {"bos_index": tokenizer.sp.bos_id(), "eos_index": tokenizer.sp.eos_id()}
    for key, index in found.items():
        if hparams.get(key, index) != index:
            raise ValueError(
                f"tokenizer_file {given} has {key} {index}, the YAML has {key} {hparams[key]}: "
                "take the tokenizer of a seq2seq recogniser or of a language model"
            )
    return tokenizer


def check_characters(source, sentences, tokenizer):
    """Check that the tokenizer knows all characters of some sentences.

    Arguments
    ---------
    source : str
        The file that they are from.
    sentences : iterable of (str, str)
        Name of the sentence (in the message) and its text.
    tokenizer : SentencePiece

    Raises
    ------
    ValueError
        If it does not.
    """
    known, unknown = set(), tokenizer.sp.unk_id()
    for name, text in sentences:
        for character in sorted(set(text) - known):
            if unknown in tokenizer.sp.encode_as_ids(character):
                raise ValueError(
                    f"{source}: {name} has the character {character!r}, "
                    "which the tokenizer does not know"
                )
            known.add(character)


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


def dataio_prepare(hparams, tokenizer, targets=("tokens",)):
    """Build the datasets from the manifests.

    Arguments
    ---------
    hparams : dict
    tokenizer : SentencePiece
    targets : tuple of str
        Of "tokens", "tokens_bos" (`bos_index` before them) and "tokens_eos" (`eos_index` after).

    Returns
    -------
    train_data, valid_data : DynamicItemDataset
    test_data : dict
        Split name -> DynamicItemDataset.

    Raises
    ------
    ValueError
        If a transcript has characters that the tokenizer does not know, or too many train
        transcripts have more tokens than encoder frames.
    """

    shard_folder = hparams["shard_folder"]
    read_audio = shards.read_audio if shard_folder else sb.dataio.dataio.read_audio

    @sb.utils.data_pipeline.takes("wav")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav):
        try:
            return read_audio(wav)
        except RuntimeError as error:
            raise OSError(str(error)) from error  # it names the file

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens", "tokens_bos", "tokens_eos")
    def text_pipeline(wrd):  # run only as far as its outputs are asked for
        tokens = tokenizer.sp.encode_as_ids(wrd)
        yield torch.LongTensor(tokens)
        yield torch.LongTensor([hparams["bos_index"], *tokens])
        yield torch.LongTensor([*tokens, hparams["eos_index"]])

    def load(csv_path):
        if shard_folder:
            csv_path = os.path.join(shard_folder, os.path.basename(csv_path))
        rows = sb.dataio.dataio.load_data_csv(csv_path)
        if not rows:
            raise ValueError(f"{csv_path} has no utterance")
        transcripts = ((name, row["wrd"]) for name, row in rows.items())
        check_characters(csv_path, transcripts, tokenizer)
        return sb.dataio.dataset.DynamicItemDataset(
            rows,
            dynamic_items=[audio_pipeline, text_pipeline],
            output_keys=["id", "sig", "wrd", *targets],
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
    return train_data, valid_data, test_data


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


def make_brain(brain_class, hparams, run_opts, tokenizer):
    """Build the Brain from a YAML whose `vocab_size` is the tokenizer's."""
    return brain_class(
        tokenizer,
        modules=hparams["modules"],
        opt_class=partial(hparams["opt_class"], lr=hparams["lr"]),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )


def start_experiment(argv, script):
    """Load the YAML of a command line and make its output folder, with logs and `script` in it.

    Returns
    -------
    hparams : dict
    run_opts : speechbrain.utils.run_opts.RunOptions
    hparams_file : str
    overrides : dict
    """
    hparams_file, run_opts, overrides = parse_arguments(argv)
    ddp_init_group(run_opts)
    hparams = load_hparams(hparams_file, overrides)
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
    run_on_main(shutil.copy, [script, hparams["output_folder"]])
    return hparams, run_opts, hparams_file, overrides


def fit_to_tokenizer(hparams, hparams_file, overrides, tokenizer):
    """The YAML loaded anew, if its `vocab_size` is not the tokenizer's.

    The model then has the tokenizer's size, and hyperparams.yaml says so.
    """
    size = tokenizer.sp.vocab_size()
    if size == hparams["vocab_size"]:
        return hparams
    overrides = {**overrides, "vocab_size": size}
    hparams = load_hparams(hparams_file, overrides)
    sb.create_experiment_directory(hparams["output_folder"], hparams_file, overrides)
    return hparams


def run(brain_class, argv=None):
    """Prepare, train, test and, by the key `export_inference`, make the folder for inference.

    Arguments
    ---------
    brain_class : type
        Subclass of `ASR`.
    argv : list of str, optional
        Command line; that of the process by default.

    Returns
    -------
    dict
        Test split -> {"loss": ..., "WER": ..., "CER": ...}, both rates in %.
    """
    hparams, run_opts, *yaml = start_experiment(argv, inspect.getfile(brain_class))
    prepare_data(hparams)
    tokenizer = load_tokenizer(hparams)
    hparams = fit_to_tokenizer(hparams, *yaml, tokenizer)
    train_data, valid_data, test_data = dataio_prepare(hparams, tokenizer, brain_class.targets)
    brain = make_brain(brain_class, hparams, run_opts, tokenizer)
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
    results = {split: brain.test(split, dataset) for split, dataset in test_data.items()}
    if hparams["export_inference"] and not brain.debug:  # which keeps no checkpoint
        run_on_main(export, [hparams["output_folder"]])
    return results


def run_script(main):
    """Run a script's `main`; what is wrong with its arguments or files ends it in one line.

    Its traceback is in log.txt.
    """
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        logger.debug("Stopped by:", exc_info=True)
        # One from a loader's process has that process's traceback before it.
        sys.exit(f"{os.path.basename(sys.argv[0])}: {str(error).strip().splitlines()[-1]}")
