"""Audio files to texts, one at a time or in batches of like durations."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from speechbrain.inference.ASR import EncoderDecoderASR
from speechbrain.utils.logger import get_logger
from torch.nn.functional import pad

from .audio import UNREADABLE, cut_at_pauses, printable, read_audio, read_duration, reason
from .batches import (
    decode_each,
    encode_each,
    encode_together,
    encodes_utterances_alone,
    search_each,
)
from .frames import shortest_signal

logger = get_logger(__name__)


class Transcript(NamedTuple):
    """What became of a file."""

    file: Path
    text: str | Iterator[str] | None = None  # of a stream, its pieces as they come
    error: str | None = None  # why it could not be read
    seconds: float = 0.0  # of audio


def transcribe(recogniser, files, max_batch_length=0.0, max_segment_length=float("inf")):
    """Transcribe audio files one at a time or in batches, to the same texts (see `batches.py`).

    Arguments
    ---------
    recogniser : EncoderASR or EncoderDecoderASR
    files : list of Path
    max_batch_length : float
        Seconds of audio in a batch, padding included; a longer file is a batch of its own, and the
        longest come first: memory runs out early or never. 0: each file is, in the order given.
    max_segment_length : float
        Seconds; longer recordings are cut at pauses, and the texts of their parts joined.

    Yields
    ------
    Transcript
        Of each file as soon as it is done.
    """
    batches = [[number] for number in range(len(files))]
    if max_batch_length:
        seconds = {}
        for number, file in enumerate(files):
            try:
                seconds[number] = read_duration(file)
            except UNREADABLE as error:
                yield Transcript(file, error=reason(error))
        batches = _batches(seconds, max_batch_length)
    rate = recogniser.audio_normalizer.sample_rate
    for batch in batches:
        parts, lengths = {}, {}
        for number in batch:
            try:
                signal = read_audio(files[number], recogniser.audio_normalizer)
            except UNREADABLE as error:
                yield Transcript(files[number], error=reason(error))
            else:
                lengths[number] = len(signal) / rate
                parts[number] = cut_at_pauses(signal, rate, max_segment_length)
                if len(parts[number]) > 1:
                    logger.warning(
                        "%s: %.1f s, cut at pauses into %d parts of at most %g s",
                        *(printable(files[number]), lengths[number]),
                        *(len(parts[number]), max_segment_length),
                    )
        signals = [signal for cut in parts.values() for signal in cut]
        durations = {number: len(signal) / rate for number, signal in enumerate(signals)}
        texts = {}
        for group in _batches(durations, max_batch_length):
            found = _recognise(recogniser, [signals[number] for number in group])
            texts |= zip(group, found, strict=True)
        in_order = (texts[number] for number in range(len(signals)))
        for number, cut in parts.items():
            text = " ".join(filter(None, islice(in_order, len(cut))))
            yield Transcript(files[number], text, seconds=lengths[number])


def longest_recording(recogniser):
    """Seconds that a recogniser can hear in one piece, None if its folder does not tell.

    An attention decoder loses its place beyond what it was trained on. CTC has none to lose, and
    cuts within speech would cost it words.
    """
    if isinstance(recogniser, EncoderDecoderASR):
        return getattr(recogniser.hparams, "longest_train_utterance", None)
    return math.inf


def _recognise(recogniser, signals):
    """The texts of signals [T], which are those that each has alone."""
    shortest = shortest_signal(recogniser)
    signals = [pad(signal, (0, max(0, shortest - len(signal)))) for signal in signals]

    def encode(wav):
        return recogniser.encode_batch(wav, torch.ones(1))

    with torch.no_grad():
        if encodes_utterances_alone(recogniser.mods.encoder):
            encoder = recogniser.mods.encoder
            states, frames = encode_together(recogniser.encode_batch, signals, encoder)
        else:
            states, frames = encode_each(encode, signals)
        if isinstance(recogniser, EncoderDecoderASR):
            tokens = search_each(recogniser.mods.decoder, states, frames)
        else:
            tokens = decode_each(recogniser.decoding_function, states, frames)
    return [recogniser.tokenizer.decode_ids(ids) for ids in tokens]


def _batches(seconds, max_batch_length):
    """Lists of keys of like durations, the longest first."""
    batch, longest = [], 0.0
    for key in sorted(seconds, key=seconds.get, reverse=True):
        if batch and (len(batch) + 1) * longest > max_batch_length:
            yield batch
            batch = []
        if not batch:
            longest = seconds[key]
        batch.append(key)
    if batch:
        yield batch
