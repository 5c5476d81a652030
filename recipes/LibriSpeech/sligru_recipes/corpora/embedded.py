"""The embedded corpus of mini_librispeech.py: who says what, the voices, the files.

The same settings give the same bytes, whatever the number of workers: the engine's output depends
on what it has said before, so every speaker is spoken in order by a fresh process with a seeded
engine.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

from ..files import partial_path, write_text
from ..processes import end_with_parent
from ..progress import MINUTES, Progress
from .sentences import LargeGrammar, SmallGrammar

SAMPLE_RATE = 16000
ENGINE_RATE = 22050
UTTERANCES_PER_CHAPTER = 20
FIRST_SPEAKER = 101
# Changes whenever the generator would write other bytes for the same settings.
GENERATOR_VERSION = 1

GRAMMARS = {"small": SmallGrammar, "large": LargeGrammar}
# vocabulary -> split -> (speakers, utterances of each)
DEFAULT_SPLITS = {
    "small": {"train-clean-100": (20, 25), "dev-clean": (4, 15), "test-clean": (8, 15)},
    "large": {"train-clean-100": (167, 25), "dev-clean": (6, 20), "test-clean": (12, 25)},
}
SECONDS_PER_UTTERANCE = {"small": 4.0, "large": 4.3}  # means of the default corpora
MAX_TRAIN_SPEAKERS = 250  # as many as LibriSpeech's train-clean-100 has

ACCENTS = (
    "en",
    "en-US",
    "en-US-nyc",
    "en-GB-scotland",
    "en-GB-x-rp",
    "en-GB-x-gbclan",
    "en-GB-x-gbcwmd",
    "en-029",
)
VARIANTS = ("f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8")


@dataclass(frozen=True)
class Speaker:
    """One synthetic voice and what it says.

    `pitch` and `pitch_range` are espeak-ng's 0 to 100, `rate` its words per minute.
    """

    identifier: int
    split: str
    voice: str
    pitch: int
    pitch_range: int
    rate: int
    sentences: tuple

    @property
    def utterances(self):
        """Yield (chapter, utterance ID, sentence) in the order of speaking."""
        for index, sentence in enumerate(self.sentences):
            chapter = 1000 * self.identifier + index // UTTERANCES_PER_CHAPTER
            number = index % UTTERANCES_PER_CHAPTER
            yield chapter, f"{self.identifier}-{chapter}-{number:04d}", sentence


def draw_sentences(count, grammar):
    """Draw `count` different sentences, lower case.

    Raises
    ------
    ValueError
        If the grammar gives too many sentences again to be likely to have as many.
    """
    sentences = {}  # a dict keeps the order of drawing
    for _ in range(10 * count):
        if len(sentences) == count:
            return list(sentences)
        sentences[grammar.sentence()] = None
    raise ValueError(f"the grammar is too small for {count} different sentences")


def plan_speakers(splits, seed, vocabulary="small"):
    """Decide who says what.

    The small splits are drawn before the train splits, so that a larger train split leaves them
    unchanged, and their voices (accent and variant) are theirs alone.

    Arguments
    ---------
    splits : dict
        Split name -> (number of speakers, utterances of each).
    seed : int
    vocabulary : str
        Of `GRAMMARS`.

    Returns
    -------
    list of Speaker
    """
    order = sorted(splits, key=lambda split: (split.startswith("train"), split))
    count = sum(speakers * each for speakers, each in splits.values())
    grammar = GRAMMARS[vocabulary](random.Random(f"sentences {seed}"))
    sentences = iter(draw_sentences(count, grammar))
    rng = random.Random(f"voices {seed}")
    voices = [f"gmw/{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
    rng.shuffle(voices)
    reserved = sum(splits[split][0] for split in order if not split.startswith("train"))
    if reserved >= len(voices):
        raise ValueError(f"splits: {reserved} dev and test speakers, at most {len(voices) - 1}")
    voices = itertools.chain(voices[:reserved], itertools.cycle(voices[reserved:]))
    identifiers = itertools.count(FIRST_SPEAKER)
    return [
        Speaker(
            identifier=next(identifiers),
            split=split,
            voice=next(voices),
            pitch=rng.randint(30, 70),
            pitch_range=rng.randint(35, 65),
            rate=rng.randint(125, 155),
            sentences=tuple(itertools.islice(sentences, splits[split][1])),
        )
        for split in order
        for _ in range(splits[split][0])
    ]


def splits_for_hours(hours, vocabulary="small"):
    """The default splits with about `hours` of audio in train: more speakers, then more each."""
    if not 0 < hours <= 1000:
        raise ValueError(f"hours must be above 0 and at most 1000, got {hours}")
    utterances = hours * 3600 / SECONDS_PER_UTTERANCE[vocabulary]
    per_speaker = DEFAULT_SPLITS[vocabulary]["train-clean-100"][1]
    speakers = min(max(1, round(utterances / per_speaker)), MAX_TRAIN_SPEAKERS)
    train = {"train-clean-100": (speakers, round(utterances / speakers))}
    return DEFAULT_SPLITS[vocabulary] | train


class Engine:
    """espeak-ng by ctypes, for one speaker: the engine is global to the process.

    Arguments
    ---------
    voice : str
        Such as "gmw/en-US+f2": voice file and variant.
    pitch, pitch_range, rate : int
    seed : int
        Of the engine's own noise (breathy variants use it).
    """

    _SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: the callback runs inside espeak_Synth
    _DONT_EXIT = 0x8000  # return an error where the engine would end the process
    _UTF8 = 1
    _RATE, _PITCH, _RANGE = 1, 3, 4

    def __init__(self, voice, pitch, pitch_range, rate, seed):
        import espeakng_loader

        c_int, c_uint = ctypes.c_int, ctypes.c_uint
        callback_type = ctypes.CFUNCTYPE(
            c_int, ctypes.POINTER(ctypes.c_short), c_int, ctypes.c_void_p
        )
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        # Without argument types ctypes cuts 64-bit arguments to 32 bits.
        for name, result, *arguments in (
            ("espeak_Initialize", c_int, c_int, c_int, ctypes.c_char_p, c_int),
            ("espeak_ng_SetRandSeed", c_int, ctypes.c_long),
            ("espeak_SetSynthCallback", None, callback_type),
            ("espeak_SetVoiceByName", c_int, ctypes.c_char_p),
            ("espeak_SetParameter", c_int, c_int, c_int, c_int),
            (
                "espeak_Synth",
                c_int,
                ctypes.c_char_p,
                ctypes.c_size_t,
                c_uint,
                c_int,
                c_uint,
                c_uint,
                ctypes.POINTER(c_uint),
                ctypes.c_void_p,
            ),
            ("espeak_Synchronize", c_int),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

        data = espeakng_loader.get_data_path().encode()
        rate_found = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, self._DONT_EXIT)
        if rate_found != ENGINE_RATE:
            raise RuntimeError(f"espeak_Initialize returned {rate_found}, expected {ENGINE_RATE}")
        self._check("espeak_ng_SetRandSeed", seed)
        self._chunks = []
        self._callback = callback_type(self._collect)  # must outlive the engine's use of it
        self._library.espeak_SetSynthCallback(self._callback)
        self._check("espeak_SetVoiceByName", voice.encode())
        for parameter, value in (
            (self._RATE, rate),
            (self._PITCH, pitch),
            (self._RANGE, pitch_range),
        ):
            self._check("espeak_SetParameter", parameter, value, 0)

    def _check(self, name, *arguments):
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}{arguments} returned error {status}")

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text):
        """Synthesise lower-case `text`; returns int16 samples at 22050 Hz."""
        self._chunks.clear()
        encoded = text.encode()
        self._check("espeak_Synth", encoded, len(encoded) + 1, 0, 1, 0, self._UTF8, None, None)
        self._check("espeak_Synchronize")
        if not self._chunks:
            raise RuntimeError(f"espeak-ng returned no audio for {text!r}")
        return np.concatenate(self._chunks)


def resample(samples):
    """22050 Hz to 16000 Hz by cutting the spectrum.

    numpy alone: importing scipy.signal costs each speaker's process more time than its speech.
    """
    samples = np.pad(samples, (0, -len(samples) % 441))
    length = len(samples) * 320 // 441
    return np.fft.irfft(np.fft.rfft(samples)[: length // 2 + 1], length) * length / len(samples)


def speak(folder, speaker, seed):
    """Write one speaker's files; runs in a process of its own.

    Returns
    -------
    float
        Seconds of audio.
    """
    engine = Engine(speaker.voice, speaker.pitch, speaker.pitch_range, speaker.rate, seed)
    noise = np.random.default_rng([seed, speaker.identifier])
    total = 0
    for chapter, identifier, sentence in speaker.utterances:
        path = _chapter_folder(folder, speaker, chapter) / f"{identifier}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0.7 keeps the resampling filter's overshoot inside 16 bits; noise at -60 dB full scale
        # covers the engine's exact zeros, which log filter banks would show as a floor.
        audio = 0.7 / 32768 * resample(engine.say(sentence))
        audio += 1e-3 * noise.standard_normal(len(audio))
        samples = np.clip(np.round(32767 * audio), -32768, 32767).astype(np.int16)
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        total += len(samples)
    # The transcripts come last: a speaker who has them is complete.
    for path, text in _transcripts(folder, speaker).items():
        write_text(path, text)
    return total / SAMPLE_RATE


def _in_fresh_process(function, *arguments):
    # Python 3.10 has no max_tasks_per_child, and multiprocessing.Pool waits for ever for a worker
    # that died.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:
        return pool.submit(function, *arguments).result()


def _chapter_folder(folder, speaker, chapter):
    return Path(folder) / speaker.split / str(speaker.identifier) / str(chapter)


def _transcripts(folder, speaker):
    """Path -> content of a speaker's transcript files."""
    lines = {}
    for chapter, identifier, sentence in speaker.utterances:
        name = f"{speaker.identifier}-{chapter}.trans.txt"
        path = _chapter_folder(folder, speaker, chapter) / name
        lines.setdefault(path, []).append(f"{identifier} {sentence.upper()}\n")
    return {path: "".join(content) for path, content in lines.items()}


def _seconds_on_disk(folder, speaker):
    """Seconds of a speaker's finished audio; None if the speaker has to be spoken (again)."""
    for path, text in _transcripts(folder, speaker).items():
        if not path.is_file() or path.read_bytes() != text.encode():
            return None
    try:
        samples = sum(
            soundfile.info(_chapter_folder(folder, speaker, chapter) / f"{name}.flac").frames
            for chapter, name, _ in speaker.utterances
        )
    except soundfile.LibsndfileError:
        return None
    return samples / SAMPLE_RATE


def _claim_folder(folder, settings):
    """Record the settings in a new folder, or check them in one that this script wrote."""
    path = folder / "settings.json"
    if path.is_file():
        # Versions before 0.2 had one vocabulary, the small one.
        found = {"vocabulary": "small"} | read_settings(path)
        changed = [key for key in settings if found.get(key) != settings[key]]
        if changed:
            differences = ", ".join(
                f"{key} {found.get(key)} (asked for: {settings[key]})" for key in changed
            )
            raise ValueError(
                f"{folder} holds a corpus of other settings: {differences}; "
                "delete it or choose another folder"
            )
    elif folder.exists() and set(folder.iterdir()) - {partial_path(path)}:
        raise ValueError(
            f"{folder} is not empty and was not written by this script (it has no settings.json); "
            "choose another folder"
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")


def read_settings(path):
    """The settings.json of a corpus, a dict; a ValueError names it if it is damaged."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it has no keys")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete the corpus, or the file") from error
    return settings


def make_corpus(folder, splits=None, seed=0, workers=None, vocabulary="small"):
    """Write the corpus, or what is still missing of it.

    Arguments
    ---------
    folder : str or Path
        New, empty, or holding a corpus of the same settings. A complete corpus is left untouched;
        in an incomplete one the missing speakers are spoken.
    splits : dict or None
        Split name -> (number of speakers, utterances of each); None for those of `DEFAULT_SPLITS`.
    seed : int
    workers : int or None
        Processes at a time; None for one per CPU. Does not change the result.
    vocabulary : str
        Of `GRAMMARS`.

    Returns
    -------
    dict
        Split name -> seconds of audio.

    Raises
    ------
    ModuleNotFoundError
        If `espeakng-loader` is not installed.
    ValueError
        If `folder` holds something else, or a size in `splits` or `workers` is impossible.

    Example
    -------
    >>> make_corpus("corpus", {"train-clean-100": (2, 3)})  # doctest: +SKIP
    {'train-clean-100': 20.5}
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    engine = _engine_version()
    splits = splits or DEFAULT_SPLITS[vocabulary]
    for split, sizes in splits.items():
        if min(sizes) < 1:
            raise ValueError(f"splits[{split!r}]: sizes must be positive, got {sizes}")
    folder = Path(folder)
    speakers = plan_speakers(splits, seed, vocabulary)
    _claim_folder(
        folder,
        {
            "generator": GENERATOR_VERSION,
            "espeakng_loader": engine,
            "seed": seed,
            "vocabulary": vocabulary,
            "splits": {split: list(sizes) for split, sizes in splits.items()},
        },
    )
    seconds, missing = _speak_missing(folder, speakers, seed, workers)
    if missing or not (folder / "SPEAKERS.TXT").is_file():
        write_text(folder / "SPEAKERS.TXT", _speaker_table(seconds))
    return {
        split: sum(seconds[speaker] for speaker in speakers if speaker.split == split)
        for split in splits
    }


def _engine_version():
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ModuleNotFoundError(
            "the corpus generator needs espeakng-loader (a GPL speech synthesiser): "
            "pip install espeakng-loader, or the package's extra [corpus]"
        )
    return importlib.metadata.version("espeakng-loader")


def _speak_missing(folder, speakers, seed, workers):
    """Seconds of every speaker's audio, and the speakers that had to be spoken for it."""
    seconds = {speaker: _seconds_on_disk(folder, speaker) for speaker in speakers}
    missing = [speaker for speaker in speakers if seconds[speaker] is None]
    if missing:
        with (
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            contextlib.closing(
                Progress(
                    "synthesising speech",
                    sum(len(speaker.sentences) for speaker in missing),
                    "utterance",
                    MINUTES,
                    functools.partial(print, file=sys.stderr, flush=True),
                )
            ) as progress,
        ):
            tasks = {
                pool.submit(_in_fresh_process, speak, folder, speaker, seed): speaker
                for speaker in missing
            }
            try:
                for task in as_completed(tasks):
                    seconds[tasks[task]] = task.result()
                    progress.update(len(tasks[task].sentences))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return seconds, missing


def speak_known_speakers(folder, corpus, split, utterances, workers=None):
    """Write a split of a corpus' train speakers, who say sentences that none of its splits has.

    Arguments
    ---------
    folder : str or Path
        Where the split goes.
    corpus : str or Path
        Folder that `make_corpus` has written.
    split : str
    utterances : int
        Of each speaker.
    workers : int or None
        As for `make_corpus`.

    Raises
    ------
    ModuleNotFoundError
        If `espeakng-loader` is not installed.
    ValueError
        If `corpus` is none of `make_corpus`, or other versions of it or of the engine wrote it.
    """
    path = Path(corpus, "settings.json")
    if not path.is_file():
        raise ValueError(f"{corpus} is no corpus of mini_librispeech.py: it has no settings.json")
    settings = read_settings(path)
    for key, here in (("generator", GENERATOR_VERSION), ("espeakng_loader", _engine_version())):
        if settings[key] != here:
            raise ValueError(f"{corpus} was made by {key} {settings[key]}, here it is {here}")
    splits, seed, vocabulary = (settings[key] for key in ("splits", "seed", "vocabulary"))
    speakers = [
        speaker
        for speaker in plan_speakers(splits, seed, vocabulary)
        if speaker.split.startswith("train")
    ]
    grammar = GRAMMARS[vocabulary](random.Random(f"sentences {seed}"))
    taken = sum(count * each for count, each in splits.values())
    # The corpus took the first ones of the same grammar.
    sentences = iter(draw_sentences(taken + utterances * len(speakers), grammar)[taken:])
    speakers = [
        replace(speaker, split=split, sentences=tuple(itertools.islice(sentences, utterances)))
        for speaker in speakers
    ]
    _speak_missing(Path(folder), speakers, seed + 1, workers)  # with other noise than in training


def _speaker_table(seconds):
    rows = [";ID  |SEX| SUBSET           |MINUTES| NAME\n"]
    for speaker, length in seconds.items():
        sex = speaker.voice.split("+")[1][0].upper()
        name = f"{speaker.voice} pitch {speaker.pitch} rate {speaker.rate}"
        rows.append(
            f"{speaker.identifier:<5}| {sex} | {speaker.split:<17}| {length / 60:<6.2f}| {name}\n"
        )
    return "".join(rows)
