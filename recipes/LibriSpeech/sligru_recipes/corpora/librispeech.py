"""CSV manifests of LibriSpeech, or of any corpus in its layout, with every file checked.

Columns are those of SpeechBrain's own preparation (ID, duration, wav, spk_id, wrd), to be read
with `DynamicItemDataset.from_csv`. Expected in a corpus's folder:

    SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac         16 kHz, mono
    SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt         one "ID TEXT" a line
"""

import csv
import hashlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path

import soundfile
from speechbrain.dataio.dataio import merge_csvs
from speechbrain.utils.parallel import parallel_map
from tqdm import tqdm

SAMPLE_RATE = 16000
SPLITS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd")
ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ' ")

logger = logging.getLogger(__name__)


def prepare_librispeech(
    data_folder,
    save_folder,
    train_splits,
    dev_splits=(),
    test_splits=(),
    skip_bad_files=False,
    num_workers=None,
):
    """Write SPLIT.csv for every split, and train.csv for all train splits together.

    A split that was prepared before from the same files with the same options is skipped, so an
    interrupted preparation goes on with the first unfinished split. `prepare.json` in
    `save_folder` records what was done.

    Arguments
    ---------
    data_folder : str or Path
        Holds one folder a split.
    save_folder : str or Path
        Where the manifests go; made if absent.
    train_splits, dev_splits, test_splits : sequence of str
        Names of LibriSpeech's splits (`SPLITS`).
    skip_bad_files : bool
        False: a bad file is an error. True: it is left out, counted in a warning and listed in
        `prepare.json`. Bad is an utterance without audio, without words or with other characters
        than LibriSpeech's (`ALPHABET`), and audio that is unreadable, empty, truncated, not at
        16 kHz or not mono.
    num_workers : int or None
        Processes that check files, 0 for this one alone, None for one per CPU. Does not change
        the result.

    Raises
    ------
    FileNotFoundError
        If `data_folder` or a split's folder does not exist.
    ValueError
        If a split is unknown, given twice or empty, a transcript file is malformed, or a file is
        bad. The message names the split and the file.
    OSError
        If a manifest cannot be written. The message names `save_folder` and the reason.

    Example
    -------
    >>> prepare_librispeech(
    ...     "LibriSpeech", "manifests", ["train-clean-100"], ["dev-clean"]
    ... )  # doctest: +SKIP
    """
    data_folder, save_folder = Path(data_folder).resolve(), Path(save_folder)
    splits = [*train_splits, *dev_splits, *test_splits]
    _check_splits(data_folder, splits, train_splits)
    _check_writable(save_folder)
    record_path = save_folder / "prepare.json"
    record = json.loads(record_path.read_text()) if record_path.is_file() else {}

    for split in splits:
        manifest = save_folder / f"{split}.csv"
        transcripts = sorted((data_folder / split).glob("*/*/*.trans.txt"))
        request = {
            "folder": str(data_folder / split),
            "transcripts": _fingerprint(transcripts),
            "skip_bad_files": bool(skip_bad_files),
        }
        if manifest.is_file() and record.get(split, {}).get("request") == request:
            logger.info(f"{split}: prepared before, {manifest} is kept")
            continue
        rows, bad = _check_utterances(
            data_folder / split, _read_transcripts(split, transcripts), num_workers
        )
        if bad and not skip_bad_files:
            path, reason = next(iter(bad.items()))
            more = f" (and {len(bad) - 1} more bad files)" if len(bad) > 1 else ""
            raise ValueError(
                f"{split}: {path}: {reason}{more}; repair the corpus or set skip_bad_files"
            )
        if not rows:
            raise ValueError(f"{split}: no usable utterance in {data_folder / split}")
        if bad:
            logger.warning(f"{split}: {len(bad)} bad files left out, listed in {record_path}")
        _write_atomically(manifest, _manifest(rows))
        record[split] = {"request": request, "utterances": len(rows), "left_out": bad}
        _write_atomically(record_path, json.dumps(record, indent=1) + "\n")
        hours = sum(row[1] for row in rows) / 3600
        logger.info(f"{split}: {len(rows)} utterances, {hours:.2f} h in {manifest}")
    try:
        merge_csvs(str(save_folder), [f"{split}.csv" for split in train_splits], "train.csv")
    except OSError as error:
        raise _unwritable(save_folder, error) from error


def _check_splits(data_folder, splits, train_splits):
    if not train_splits:
        raise ValueError("train_splits is empty: name at least one split")
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; LibriSpeech has {', '.join(SPLITS)}")
        if splits.count(split) > 1:
            raise ValueError(f"split {split!r} is given more than once")
    if not data_folder.is_dir():
        raise FileNotFoundError(f"data_folder {data_folder} does not exist")
    for split in splits:
        if not (data_folder / split).is_dir():
            found = [name for name in SPLITS if (data_folder / name).is_dir()]
            raise FileNotFoundError(
                f"data_folder {data_folder} has no folder {split!r}; "
                f"of LibriSpeech's splits it holds: {', '.join(found) or 'none'}"
            )


def _check_writable(save_folder):
    """Fail before the files are checked rather than after."""
    try:
        save_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_folder) as file:
            file.write(bytes(2**20))  # a manifest of some thousand utterances
    except OSError as error:
        raise _unwritable(save_folder, error) from error


def _unwritable(save_folder, error):
    return OSError(error.errno, f"cannot write to save_folder: {error.strerror}", str(save_folder))


def _fingerprint(transcripts):
    """Changes when the transcripts of a split do, without reading them."""
    digest = hashlib.sha256()
    for path in transcripts:
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_transcripts(split, transcripts):
    """Audio path -> words, for every line of the transcripts."""
    words = {}
    for path in transcripts:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{split}: {path} is not UTF-8 text: {error}") from error
        for number, line in enumerate(lines, 1):
            identifier, _, text = line.strip().partition(" ")
            audio = path.with_name(f"{identifier}.flac")
            if not identifier.startswith(path.name.removesuffix(".trans.txt") + "-"):
                raise ValueError(
                    f"{split}: {path}, line {number}: expected an utterance ID of this chapter "
                    f"and its words, found {line[:60]!r}"
                )
            if audio in words:
                raise ValueError(f"{split}: {path}, line {number}: {identifier} occurs twice")
            words[audio] = " ".join(text.split())
    return words


def _check_utterances(folder, words, num_workers):
    """Sort a split's utterances into manifest rows and {path: reason} of bad ones."""
    utterances = dict.fromkeys(folder.glob("*/*/*.flac")) | words
    paths = sorted(utterances)
    progress = {"desc": f"checking {folder.name}", "unit": "file", "disable": None}
    if num_workers == 0:
        checked = map(_check_audio, tqdm(paths, **progress))
    else:
        checked = parallel_map(
            _check_audio,
            paths,
            process_count=num_workers,
            chunk_size=64,
            progress_bar_kwargs=progress,
        )
    rows, bad = [], {}
    for path, seconds, reason in checked:
        reason = _check_words(utterances[path]) or reason
        if reason:
            bad[str(path)] = reason
        else:
            # The reader's chapter is the "speaker" of SpeechBrain's manifests.
            chapter = path.stem.rpartition("-")[0]
            rows.append((path.stem, seconds, str(path), chapter, utterances[path]))
    return rows, bad


def _check_words(text):
    """Say what is wrong with the transcript, if anything is."""
    if not text:
        return "no words for it in its chapter's .trans.txt"
    foreign = sorted(set(text) - ALPHABET)
    if foreign:
        return (
            f"its transcript has {', '.join(map(repr, foreign))}, "
            f"expected A to Z, apostrophe and space alone: {text[:60]!r}"
        )
    return None


def _check_audio(path):
    """Return (path, seconds, None), or (path, None, what is wrong with the file)."""
    if not path.is_file():
        return path, None, "the transcript names it, but there is no such file"
    try:
        with soundfile.SoundFile(path) as audio:
            if audio.samplerate != SAMPLE_RATE:
                return path, None, f"{audio.samplerate} Hz, expected {SAMPLE_RATE} Hz"
            if audio.channels != 1:
                return path, None, f"{audio.channels} channels, expected 1"
            try:
                # Found in a truncated file only when its end is looked for; decoding the whole
                # corpus would take a hundred times as long.
                audio.seek(audio.frames - 1)
            except soundfile.LibsndfileError:
                return path, None, f"truncated: its header promises {audio.frames} samples"
            return path, audio.frames / SAMPLE_RATE, None
    except soundfile.LibsndfileError as error:
        return path, None, f"unreadable, {path.stat().st_size} bytes: {error.error_string}"


def _manifest(rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def _write_atomically(path, text):
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
