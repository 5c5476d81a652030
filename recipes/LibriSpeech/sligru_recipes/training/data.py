"""Manifests, datasets and batches of a recipe, by the keys of its YAML."""

import csv
from pathlib import Path

import soundfile
import speechbrain as sb
import torch
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from ..corpora import shards
from ..corpora.librispeech import as_list, manifest_path, prepare_librispeech
from ..files import replacing
from .loading import limit_processes
from .tokenizer import check_alignable, check_characters, encode

logger = get_logger(__name__)

# By how much a file's length may differ from that in its manifest, which may be rounded.
LENGTH_TOLERANCE = 0.05
# Of the encoder. One is too few for BatchNorm in training, if the utterance is a batch of its own.
MIN_FRAMES = 2


def prepare_data(hparams):
    """Write the manifests of the splits, unless `skip_prep` says that they are there.

    Shards and the manifest of noises are written too, if the YAML has folders for them.

    Raises
    ------
    ValueError
        If the features are impossible at `sample_rate`; else see what is called.
    """
    stft = getattr(hparams.get("compute_features"), "compute_STFT", None)
    if stft and stft.n_fft < stft.win_length:
        raise ValueError(
            f"n_fft is {stft.n_fft} samples, but a window has {stft.win_length} at a sample_rate "
            f"of {hparams['sample_rate']} Hz: n_fft must be at least that"
        )
    if not hparams["skip_prep"]:
        find_manifests(hparams)  # refuses what cannot be, before any work
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
    if hparams.get("noise_folder"):
        arguments = (hparams["noise_folder"], hparams["noise_csv"], hparams["sample_rate"])
        run_on_main(prepare_noise, arguments)


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


def prepare_noise(folder, manifest, sample_rate):
    """Write the manifest of a folder of noises, in the form that AddNoise reads.

    Raises
    ------
    FileNotFoundError
        If `folder` holds no WAV or FLAC file, at any depth. Hidden ones do not count.
    ValueError
        If one of them cannot be read, is not at `sample_rate` (Hz) or not mono.
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
        for number, path in enumerate(paths):
            try:
                audio = soundfile.info(path)
            except soundfile.LibsndfileError as error:
                raise ValueError(f"noise_folder: {path}: {error.error_string}") from error
            if (audio.samplerate, audio.channels) != (sample_rate, 1):
                raise ValueError(
                    f"noise_folder: {path} has {audio.samplerate} Hz and {audio.channels} "
                    f"channel(s), expected {sample_rate} Hz (sample_rate) and 1"
                )
            rows.writerow((number, audio.duration, path.resolve(), path.suffix[1:], ""))


def load_manifest(path):
    """ID -> row of a manifest, as SpeechBrain's `load_data_csv` has them.

    Raises
    ------
    ValueError
        If it is none, or has no utterance. The message names it.
    """
    try:
        rows = sb.dataio.dataio.load_data_csv(path)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no manifest, or damaged: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no utterance")
    for name, row in rows.items():
        missing = [column for column in ("duration", "wav", "wrd") if row.get(column) is None]
        if missing:
            raise ValueError(f"{path} is no manifest, or damaged: {name} has no {missing[0]}")
    return rows


def leave_out_short(path, rows, seconds, skip_bad_files):
    """The rows of a manifest without utterances that are shorter than MIN_FRAMES.

    Raises
    ------
    ValueError
        If there are such, and not `skip_bad_files`; or no others.
    """
    short = [name for name, row in rows.items() if row["duration"] < seconds]
    if not short:
        return rows
    message = (
        f"{path}: {len(short)} utterances (such as {short[0]}, {rows[short[0]]['duration']:g} s) "
        f"are shorter than {MIN_FRAMES} encoder frames ({seconds:g} s)"
    )
    if not skip_bad_files:
        raise ValueError(f"{message}; remove them or set skip_bad_files")
    if len(short) == len(rows):
        raise ValueError(message)
    logger.warning(f"{message}: left out")
    return {name: row for name, row in rows.items() if name not in set(short)}


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
            found = leave_out_short(path, found, shortest, hparams["skip_bad_files"])
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
