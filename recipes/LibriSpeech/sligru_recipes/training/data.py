"""Manifests, datasets and batches of a recipe, by the keys of its YAML."""

import csv
import os
from pathlib import Path

import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from ..corpora import shards
from ..corpora.librispeech import SAMPLE_RATE, prepare_librispeech
from .tokenizer import check_alignable, check_characters


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
            csv_path = str(shards.packed_manifest(csv_path, shard_folder))
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
