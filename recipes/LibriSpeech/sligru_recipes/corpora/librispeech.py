"""CSV manifests of LibriSpeech, or of any corpus in its layout, with every file checked.

Columns are those of SpeechBrain's own preparation (ID, duration, wav, spk_id, wrd), to be read
with `DynamicItemDataset.from_csv`, and what tells whether a file is still the one that was checked:
its size and time of modification; if these changed, whether its samples did (crc32).
Expected in a corpus's folder, whose splits may have any names:

    SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac         or .wav; mono
    SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt         one "ID TEXT" a line

Where an utterance has both, its FLAC file is taken. Hidden files, such as the "._" ones that macOS
leaves in archives, are ignored.
"""

import contextlib
import csv
import io
import json
import logging
import math
import multiprocessing
import os
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from speechbrain.utils.parallel import get_available_cpu_count, parallel_map

from ..files import write_text
from ..libsndfile import find_cut
from ..processes import end_with_parent
from ..progress import MINUTES, Progress

SAMPLE_RATE = 16000  # of LibriSpeech, Hz
COLUMNS = ("ID", "duration", "wav", "spk_id", "wrd", "sample_rate", "crc32", "size", "mtime_ns")
ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ' ")
EXTENSIONS = (".flac", ".wav")  # the first is preferred
# SPLIT.csv of a split of such a name would be another file of `save_folder`.
TAKEN_NAMES = ("train", "noise")
CHUNK = 64  # files that a process checks at a time
BLOCK = 2**20  # samples that are decoded at a time
# From where on the size in a WAV file's header means that the writer, to a pipe, did not know it.
UNKNOWN_SIZE = 0x7FFFF000  # bytes

logger = logging.getLogger(__name__)


class File(NamedTuple):
    """An audio file and its state."""

    path: str
    size: int  # bytes
    mtime_ns: int


def prepare_librispeech(
    data_folder,
    save_folder,
    train_splits,
    dev_splits=(),
    test_splits=(),
    skip_bad_files=False,
    num_workers=None,
    sample_rate=SAMPLE_RATE,
):
    """Write a manifest for every split, and train.csv for all train splits together.

    Files that an earlier manifest in `save_folder` has, and whose size and time of modification
    are still those, are not checked again; an interrupted preparation goes on with the first
    unfinished split. `prepare.json` in `save_folder` lists what was left out.

    Arguments
    ---------
    data_folder : str or Path
        Holds one folder a split.
    save_folder : str or Path
        Where the manifests go (see `manifest_path`); made if absent.
    train_splits, dev_splits, test_splits : sequence of str, or str
        Names of folders in `data_folder`.
    skip_bad_files : bool
        False: a bad file is an error. True: it is left out, counted in a warning and listed in
        `prepare.json`. Bad is an utterance without audio, without words or with other characters
        than LibriSpeech's (`ALPHABET`), and audio that is unreadable, empty, truncated, damaged,
        not finite, not at `sample_rate` or not mono.
    num_workers : int or None
        Processes that check files, 0 for this one alone, None for one per CPU. Does not change
        the result.
    sample_rate : int or None
        Hz; None: any.

    Raises
    ------
    FileNotFoundError
        If `data_folder` or a split's folder does not exist.
    ValueError
        If a split is given twice, but for validation and test, or is empty, a transcript file is
        malformed, an utterance ID occurs twice, or a file is bad: the message names the split and
        the file. Or if a number is impossible.
    OSError
        If a manifest cannot be written. The message names `save_folder` and the reason.

    Example
    -------
    >>> prepare_librispeech(
    ...     "LibriSpeech", "manifests", ["train-clean-100"], ["dev-clean"]
    ... )  # doctest: +SKIP
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if sample_rate is not None and sample_rate <= 0:
        raise ValueError(f"sample_rate must be above 0, got {sample_rate}")
    data_folder, save_folder = Path(data_folder).resolve(), Path(save_folder)
    train_splits, dev_splits = as_list(train_splits), as_list(dev_splits)
    # One may be there for validation and for test.
    splits = list(dict.fromkeys([*train_splits, *dev_splits, *as_list(test_splits)]))
    _check_splits(data_folder, train_splits, dev_splits, as_list(test_splits))
    _check_writable(save_folder)
    record_path = save_folder / "prepare.json"
    record = _read_record(record_path)
    manifests, ids = {}, {"train": {}, "dev": {}}

    for split in splits:
        folder, manifest = data_folder / split, manifest_path(save_folder, split)
        rows, bad = _check_split(folder, _read_checked(manifest), sample_rate, num_workers)
        if bad and not (skip_bad_files and rows):
            path, reason = next(iter(bad.items()))
            more = f" (and {len(bad) - 1} more bad files)" if len(bad) > 1 else ""
            hint = "no usable utterance" if skip_bad_files else "repair it or set skip_bad_files"
            raise ValueError(f"{split}: {path}: {reason}{more}; {hint}")
        if not rows:
            raise ValueError(
                f"{split}: no usable utterance in {folder}, which should hold "
                "SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt"
            )
        group = "train" if split in train_splits else "dev" if split in dev_splits else split
        _check_ids(split, rows, ids.setdefault(group, {}))
        if bad:
            logger.warning(f"{split}: {len(bad)} bad files left out, listed in {record_path}")
        manifests[split] = _manifest(rows)
        if _holds(manifest, manifests[split]):
            logger.info(f"{split}: prepared before, {manifest} is kept")
        else:
            _write(manifest, manifests[split])
            hours = sum(row[1] for row in rows) / 3600
            logger.info(f"{split}: {len(rows)} utterances, {hours:.2f} h in {manifest}")
        if record.get(split) != (found := {"utterances": len(rows), "left_out": bad}):
            record[split] = found
            _write(record_path, json.dumps(record, indent=1) + "\n")
    header = _manifest([])
    merged = header + "".join(manifests[split][len(header) :] for split in train_splits)
    if not _holds(save_folder / "train.csv", merged):
        _write(save_folder / "train.csv", merged)


def as_list(names):
    """A key of the YAML that takes one name or several, as a list of strings."""
    if names is None:
        return []
    return [str(name) for name in (names if isinstance(names, list | tuple) else [names])]


def manifest_path(save_folder, split):
    """The manifest of a split: SPLIT.csv, or SPLIT-split.csv where that is another file."""
    return Path(save_folder, f"{split}-split.csv" if split in TAKEN_NAMES else f"{split}.csv")


def _check_splits(data_folder, train_splits, dev_splits, test_splits):
    if not train_splits:
        raise ValueError("train_splits is empty: name at least one split")
    splits = [*train_splits, *dev_splits, *test_splits]
    for split in splits:
        if Path(split).name != split or split in ("", ".."):
            raise ValueError(f"a split is the name of a folder in data_folder, got {split!r}")
        others = [group.count(split) for group in (train_splits, dev_splits, test_splits)]
        if max(others) > 1 or (split in train_splits and sum(others) > 1):
            raise ValueError(f"split {split!r} is given more than once")
    if not data_folder.is_dir():
        raise FileNotFoundError(f"data_folder {data_folder} does not exist or is no folder")
    for split in splits:
        if not (data_folder / split).is_dir():
            found = [entry.name for entry in _entries(data_folder) if entry.is_dir()]
            more = ", ..." if len(found) > 20 else ""
            raise FileNotFoundError(
                f"data_folder {data_folder} has no folder {split!r}; "
                f"it holds: {', '.join(found[:20]) or 'none'}{more}"
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


def _write(path, text):
    try:
        write_text(path, text)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _holds(path, text):
    return path.is_file() and path.read_bytes() == text.encode()


def _read_record(path):
    """What is known of other splits; nothing where the file is damaged, as it is written anew."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    return {}


def _read_checked(manifest):
    """File -> (seconds, Hz, checksum), of all that an earlier preparation found good."""
    try:
        with open(manifest, newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            if tuple(next(rows)) != COLUMNS:
                raise ValueError("other columns")
            return {
                File(path, int(size), int(mtime)): (float(seconds), int(rate), checksum)
                for _, seconds, path, _, _, rate, checksum, size, mtime in rows
            }
    except FileNotFoundError:
        return {}
    except (StopIteration, ValueError, csv.Error):  # damaged, or of an earlier version
        logger.warning(f"{manifest} does not tell what was checked: all its files are checked")
        return {}


def _entries(folder):
    """The entries of a folder by their names, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = (entry for entry in entries if not entry.name.startswith("."))
        return sorted(visible, key=lambda entry: entry.name)


def _find(folder):
    """The files of a split: a list of transcripts, and audio files by their paths without suffix.

    A few system calls a file, since it is done at every start of a run.
    """
    transcripts, audio = [], {}
    for speaker in filter(os.DirEntry.is_dir, _entries(folder)):
        for chapter in filter(os.DirEntry.is_dir, _entries(speaker)):
            for entry in _entries(chapter):
                stem, suffix = os.path.splitext(entry.path)
                if entry.name.endswith(".trans.txt"):
                    transcripts.append(Path(entry.path))
                elif suffix.lower() in EXTENSIONS and entry.is_file():
                    status = entry.stat()
                    file = File(entry.path, status.st_size, status.st_mtime_ns)
                    if stem not in audio or suffix.lower() == EXTENSIONS[0]:
                        audio[stem] = file
    return transcripts, audio


def _read_transcripts(split, transcripts):
    """Audio path without suffix -> words, for every line of the transcripts."""
    words = {}
    for path in transcripts:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{split}: {path} is not UTF-8 text: {error}") from error
        chapter = path.name.removesuffix(".trans.txt") + "-"
        folder = f"{path.parent}{os.sep}"
        for number, line in enumerate(lines, 1):
            identifier, _, text = line.strip().partition(" ")
            if not identifier.startswith(chapter):
                raise ValueError(
                    f"{split}: {path}, line {number}: expected an utterance ID of this chapter "
                    f"and its words, found {line[:60]!r}"
                )
            stem = folder + identifier
            if stem in words:
                raise ValueError(f"{split}: {path}, line {number}: {identifier} occurs twice")
            words[stem] = " ".join(text.split())
    return words


def _check_split(folder, checked, sample_rate, num_workers):
    """Sort a split's utterances into manifest rows and {path: reason} of bad ones."""
    transcripts, audio = _find(folder)
    words = _read_transcripts(folder.name, transcripts)
    new = [file for file in audio.values() if file not in checked]
    found = check_files(folder.name, [file.path for file in new], num_workers)
    results = dict(zip(new, found, strict=True))
    rows, bad = [], {}
    for stem, file in audio.items():
        seconds, rate, checksum, reason = results.get(file) or (*checked[file], None)
        if not reason and sample_rate and rate != sample_rate:
            reason = f"{rate} Hz, expected {sample_rate} Hz (sample_rate)"
        reason = _check_words(words.get(stem)) or reason
        if reason:
            bad[file.path] = reason
        else:
            name = os.path.basename(stem)
            # The reader's chapter is the "speaker" of SpeechBrain's manifests.
            chapter = name.rpartition("-")[0]
            state = (rate, checksum, file.size, file.mtime_ns)
            rows.append((name, seconds, file.path, chapter, words[stem], *state))
    for stem in words.keys() - audio.keys():
        bad[stem + EXTENSIONS[0]] = "the transcript names it, but there is no such file"
    return rows, dict(sorted(bad.items()))


def _check_words(text):
    """Say what is wrong with the transcript, if anything is."""
    if not text:
        return "no words for it in its chapter's .trans.txt"
    if not ALPHABET.issuperset(text):
        return (
            f"its transcript has {', '.join(map(repr, sorted(set(text) - ALPHABET)))}, "
            f"expected A to Z, apostrophe and space alone: {text[:60]!r}"
        )
    return None


def _check_ids(split, rows, taken):
    """Note in `taken`, ID -> path, the utterances of splits that are read together."""
    for name, _, path, *_ in rows:
        if name in taken:
            raise ValueError(f"{split}: {path} has the utterance ID of {taken[name]}")
        taken[name] = path


def check_files(name, paths, num_workers):
    """A list of the results of `check_audio`, in the order of the paths.

    `name` is for the progress report; for `num_workers` see `prepare_librispeech`.
    """
    title, results = f"checking {name}", []
    with contextlib.ExitStack() as stack:
        progress = Progress(title, len(paths), "file", MINUTES, logger.info)
        stack.callback(progress.close)
        done = map(check_audio, paths)
        if num_workers != 0 and paths:
            # Python's default from 3.14 on is a server, which would be the workers' parent.
            method = "fork" if sys.platform.startswith("linux") else None
            context = multiprocessing.get_context(method)
            # All of them start at once; more than there is work for would be in the way.
            workers = min(num_workers or get_available_cpu_count(), math.ceil(len(paths) / CHUNK))
            executor = ProcessPoolExecutor(workers, context, initializer=end_with_parent)
            stack.enter_context(executor)
            done = parallel_map(
                check_audio, paths, chunk_size=CHUNK, executor=executor, progress_bar=False
            )
        for result in done:
            results.append(result)
            progress.update()
    return results


def check_audio(path):
    """Decode a file and say what is wrong with it.

    Arguments
    ---------
    path : str or Path

    Returns
    -------
    seconds : float or None
    sample_rate : int or None
        Hz.
    checksum : str or None
        CRC-32 of its samples, hexadecimal; None: something is wrong.
    reason : str or None
        What is wrong; None: nothing.
    """
    try:
        with soundfile.SoundFile(path) as audio:
            checksum, reason = _check_content(audio)
            return audio.frames / audio.samplerate, audio.samplerate, checksum, reason
    except soundfile.LibsndfileError as error:
        reason = error.error_string or f"error {error.code}"
        return None, None, None, f"unreadable, {os.path.getsize(path)} bytes: {reason}"
    except OSError as error:
        return None, None, None, f"unreadable: {error.strerror or error}"


def _check_content(audio):
    """Checksum of the samples and None, or None and what is wrong."""
    if audio.channels != 1:
        return None, f"{audio.channels} channels, expected 1"
    if audio.frames == 0:
        return None, "it has no samples"
    promised, found = find_cut(audio.extra_info)
    if found < promised < UNKNOWN_SIZE:
        return None, f"truncated: its header promises {promised} bytes of audio, it has {found}"
    truncated = f"truncated: its header promises {audio.frames} samples"
    try:
        audio.seek(audio.frames - 1)
    except soundfile.LibsndfileError:
        return None, truncated
    audio.seek(0)
    decoded = checksum = 0
    try:
        while len(block := audio.read(BLOCK, dtype="float32")):
            with np.errstate(over="ignore", invalid="ignore"):
                energy = np.dot(block, block)
            if not np.isfinite(energy):
                return None, "it has samples that are not finite, or far too large"
            decoded += len(block)
            checksum = zlib.crc32(block, checksum)
    except soundfile.LibsndfileError:
        seconds = decoded / audio.samplerate
        return None, f"damaged: its audio cannot be decoded after {seconds:.0f} s"
    return (f"{checksum:08x}", None) if decoded == audio.frames else (None, truncated)


def _manifest(rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()
