"""Manifests, datasets and batches of a recipe, by the keys of its YAML."""

import csv
import os
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from ..corpora import shards
from ..corpora.librispeech import as_list, check_files, manifest_path, prepare_librispeech
from ..files import replacing
from .loading import limit_processes
from .tokenizer import check_alignable, check_characters, encode

logger = get_logger(__name__)

# By how much a file's length may differ from that in its manifest, which may be rounded.
LENGTH_TOLERANCE = 0.05
# Of the encoder. One is too few for BatchNorm in training, if the utterance is a batch of its own.
MIN_FRAMES = 2
MISSING = "have no audio file"


def prepare_data(hparams):
    """Write the manifests of the splits, unless `skip_prep` says that they are there.

    Shards and the manifest of noises are written too, if the YAML has folders for them. Manifests
    that are there already are checked before.

    Raises
    ------
    OSError, ValueError
        See what is called.
    """
    run_on_main(check_given_manifests, [hparams])
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
        # A language model's YAML has no rate, as it reads transcripts alone.
        kwargs = {name: hparams[name] for name in arguments}
        kwargs["num_workers"] = limit_processes(hparams["num_workers"])
        kwargs["sample_rate"] = hparams.get("sample_rate")
        run_on_main(prepare_librispeech, kwargs=kwargs)
    if hparams.get("shard_folder"):
        train, valid, test = find_manifests(hparams)
        for manifest in (train, *valid, *test.values()):
            run_on_main(shards.pack, [manifest, hparams["shard_folder"]])
    prepare_noises(hparams)


def prepare_noises(hparams):
    """Write the manifest of noises, if the YAML has a folder of them."""
    if hparams.get("noise_folder"):
        arguments = ("noise_folder", "noise_csv", "sample_rate", "num_workers")
        run_on_main(prepare_noise, [hparams[name] for name in arguments])


def find_manifests(hparams):
    """Paths of the manifests: those of the splits, or those that the YAML names.

    Returns
    -------
    train : str
    valid : list of str
    test : dict
        Name of the split, or of the manifest -> path.

    Raises
    ------
    ValueError
        If there is none for validation, or two for test have one name.
    """

    def find(key, splits):
        given = hparams[key]
        if given is None:
            names = as_list(hparams[splits])
            return names, [str(manifest_path(hparams["save_folder"], name)) for name in names]
        return [Path(path).stem for path in as_list(given)], as_list(given)

    _, valid = find("valid_csv", "dev_splits")
    names, test = find("test_csv", "test_splits")
    if not valid:
        raise ValueError("dev_splits is empty: training needs a split to validate with")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"test_csv has two manifests of the name {name}: their results, too")
    return hparams["train_csv"], valid, dict(zip(names, test, strict=True))


def given_manifests(hparams):
    """Key and path of each manifest that is read and that `prepare_data` does not write."""
    train, valid, test = find_manifests(hparams)
    written = set()
    if not hparams["skip_prep"]:
        save_folder = hparams["save_folder"]
        splits = (as_list(hparams[f"{kind}_splits"]) for kind in ("train", "dev", "test"))
        written = {manifest_path(save_folder, split) for names in splits for split in names}
        written.add(Path(save_folder, "train.csv"))
    needed = [] if hparams.get("text_file") else [train]
    for key, paths in (("train_csv", needed), ("valid_csv", valid), ("test_csv", test.values())):
        for path in map(Path, paths):
            if path not in written:
                yield key, path


def find_given_manifests(hparams):
    """Check that the manifests which `prepare_data` does not write are there.

    Raises
    ------
    FileNotFoundError
        Names the key and the file.
    ValueError
        See `find_manifests`.
    """
    for key, path in given_manifests(hparams):
        if not path.is_file():
            raise FileNotFoundError(f"{key} {path} does not exist or is no file")


def check_given_manifests(hparams):
    """Check the manifests that `prepare_data` does not write, and that their audio files exist.

    Not where shards have the audio, nor for a language model, which needs none; `skip_bad_files`
    leaves out what is missing later on.

    Raises
    ------
    ValueError
        If one is damaged, or files are missing; names the key, the manifest and a file.
    """
    shard_folder = hparams.get("shard_folder")
    for key, path in given_manifests(hparams):
        rows = load_manifest(str(path))
        if hparams["skip_bad_files"] or "sample_rate" not in hparams:
            continue
        if not (shard_folder and shards.is_packed(path, shard_folder)):
            leave_out(f"{key} {path}", rows, find_missing(rows), MISSING, False)


def prepare_noise(folder, manifest, sample_rate, num_workers=None):
    """Write the manifest of a folder of noises, in the form that AddNoise reads.

    `num_workers` processes decode each file, as for `prepare_librispeech`.

    Raises
    ------
    FileNotFoundError
        If `folder` holds no WAV or FLAC file, at any depth. Hidden ones do not count.
    ValueError
        If one of them cannot be decoded, is empty, has samples that are not finite, is not at
        `sample_rate` (Hz) or not mono.
    """
    paths = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix.lower() in (".wav", ".flac") and not path.name.startswith(".")
    )
    if not paths:
        raise FileNotFoundError(f"noise_folder {folder} holds no .wav or .flac file")
    with (
        replacing(manifest) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("ID", "duration", "wav", "wav_format", "wav_opts"))
        results = check_files("noise", paths, num_workers)
        for number, (path, result) in enumerate(zip(paths, results, strict=True)):
            seconds, rate, _, reason = result
            if not reason and rate != sample_rate:
                reason = f"{rate} Hz, expected {sample_rate} Hz (sample_rate)"
            if reason:
                raise ValueError(f"noise_folder: {path}: {reason}")
            rows.writerow((number, seconds, path.resolve(), path.suffix[1:], ""))


class Unchanged:
    """What takes the place of `$NAME` in a manifest: itself, as a path may have it."""

    def __getitem__(self, name):
        return f"${name}"


def load_manifest(path):
    """ID -> row of a manifest, as SpeechBrain's `load_data_csv` has them.

    Raises
    ------
    ValueError
        If it is none, or has no utterance. The message names it.
    """
    try:
        rows = sb.dataio.dataio.load_data_csv(path, Unchanged())
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no manifest, or damaged: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no utterance")
    for name, row in rows.items():
        missing = [column for column in ("duration", "wav", "wrd") if row.get(column) is None]
        if missing:
            raise ValueError(f"{path} is no manifest, or damaged: {name} has no {missing[0]}")
    return rows


def leave_out(source, rows, bad, reason, skip_bad_files):
    """The rows of a manifest without bad ones.

    Arguments
    ---------
    source : str
        What messages call the manifest.
    rows : dict
        As `load_manifest` returns them.
    bad : dict
        ID -> what to tell of the utterance.
    reason : str
        What is wrong with them, a verb first.
    skip_bad_files : bool

    Raises
    ------
    ValueError
        If there are bad ones, and not `skip_bad_files`; or no others.
    """
    if not bad:
        return rows
    name, about = next(iter(bad.items()))
    message = f"{source}: {len(bad)} utterances (such as {name}, {about}) {reason}"
    if not skip_bad_files:
        raise ValueError(f"{message}; remove them or set skip_bad_files")
    if len(bad) == len(rows):
        raise ValueError(message)
    logger.warning(f"{message}: left out")
    return {name: row for name, row in rows.items() if name not in bad}


def find_missing(rows):
    """ID -> path of the audio files of a manifest that do not exist."""
    return {name: row["wav"] for name, row in rows.items() if not os.path.isfile(row["wav"])}


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
        Their items raise OSError where there is no audio as the manifest has it.
    test_data : dict
        Split name -> DynamicItemDataset.

    Raises
    ------
    ValueError
        If a manifest is damaged, an utterance too short, a train transcript has characters that
        the tokenizer should know, or too many of them have more tokens than encoder frames.
    """
    shard_folder, sample_rate = hparams["shard_folder"], hparams["sample_rate"]
    read_audio = shards.read_audio if shard_folder else sb.dataio.dataio.read_audio
    frames_per_second = 1000 / hparams["hop_length"] / hparams["time_pooling_size"]
    shortest = MIN_FRAMES / frames_per_second
    too_short = f"are shorter than {MIN_FRAMES} encoder frames ({shortest:g} s)"
    skip_bad_files = hparams["skip_bad_files"]

    @sb.utils.data_pipeline.takes("wav", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(wav, duration):
        try:
            signal = read_audio(wav)
        except RuntimeError as error:
            raise OSError(str(error)) from error  # it names the file
        expected = duration * sample_rate
        if signal.dim() > 1 or abs(len(signal) - expected) > LENGTH_TOLERANCE * expected + 1:
            raise OSError(
                f"{wav} has samples {list(signal.shape)}, but its manifest has {duration:g} s, "
                f"which at a sample_rate of {sample_rate} Hz are {round(expected)}, of one channel"
            )
        return signal

    @sb.utils.data_pipeline.takes("wrd")
    @sb.utils.data_pipeline.provides("tokens", "tokens_bos", "tokens_eos")
    def text_pipeline(wrd):  # run only as far as its outputs are asked for
        tokens = encode(tokenizer, wrd)
        yield torch.LongTensor(tokens)
        yield torch.LongTensor([hparams["bos_index"], *tokens])
        yield torch.LongTensor([*tokens, hparams["eos_index"]])

    def load(*paths, strict=False):
        rows = {}
        for path in paths:
            if shard_folder:
                path = str(shards.packed_manifest(path, shard_folder))
            found = load_manifest(path)
            bad = {
                name: f"{row['duration']:g} s"
                for name, row in found.items()
                if row["duration"] < shortest
            }
            found = leave_out(path, found, bad, too_short, skip_bad_files)
            if skip_bad_files and not shard_folder:  # else they were looked for before
                found = leave_out(path, found, find_missing(found), MISSING, skip_bad_files)
            for name in found.keys() & rows.keys():
                raise ValueError(f"{path} has the utterance {name}, as another manifest has")
            transcripts = ((name, row["wrd"]) for name, row in found.items())
            check_characters(path, transcripts, tokenizer, strict)
            rows |= found
        return sb.dataio.dataset.DynamicItemDataset(
            rows,
            dynamic_items=[audio_pipeline, text_pipeline],
            output_keys=["id", "sig", "wrd", *targets],
        )

    train, valid, test = find_manifests(hparams)
    train_data = load(train, strict=hparams["character_coverage"] == 1)
    check_alignable(train_data, tokenizer, frames_per_second)
    # Utterances of like duration side by side: little padding in fixed batches.
    valid_data = load(*valid).filtered_sorted(sort_key="duration")
    return train_data, valid_data, {name: load(path) for name, path in test.items()}


def batching(hparams, train_data):
    """Sort the train set for fixed batches, or plan dynamic ones.

    Returns
    -------
    train_data : DynamicItemDataset
    loader_kwargs : dict
        For `Brain.fit`; dynamic batches come as its `batch_sampler`.
    """
    options = dict(hparams["train_dataloader_opts"])
    if hparams["dynamic_batching"]:
        del options["batch_size"]
        sampler = DynamicBatchSampler(train_data, **hparams["dynamic_batch_sampler"])
        return train_data, {**options, "batch_sampler": sampler}
    sorting = hparams["sorting"]
    if sorting == "random":
        return train_data, {**options, "shuffle": True}
    return train_data.filtered_sorted(sort_key="duration", reverse=sorting == "descending"), options
