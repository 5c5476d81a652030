"""LibriSpeech's splits simulated: its utterance lengths, without its audio.

A comparison of epoch times needs as many utterances as LibriSpeech has, of the same durations and
with about as many tokens; what is said in them does not matter. The durations come from the
quantiles below, by linear interpolation, so every seed gives the same total, in another order.

Sources: utterances and hours of the splits, rwth-i6/i6_experiments
(common/datasets/librispeech/constants.py) and, for dev-other and test-other, k2-fsa/icefall;
quantiles of dev and test, icefall (egs/librispeech/ASR/local/display_manifest_statistics.py).
Those of the train splits are computed from icefall's, which are of the splits in three speeds (0.9,
1.0 and 1.1); mixed again, they give each of icefall's within 0.03 s. Characters a second: 99
utterances of dev-clean. Tokens a second: an estimate for 1000 subwords, good to about 20 %.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import speechbrain as sb
import torch

from .librispeech import SAMPLE_RATE

CHARACTERS_PER_SECOND = 15.1
TOKENS_PER_SECOND = 4.4
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ     "  # one of six is a space
TRAIN_QUANTILES = (
    *(0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5),
    *(0.65, 0.75, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999, 1),
)
TEST_QUANTILES = (
    *(0, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5),
    *(0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1),
)
# split -> utterances, durations in seconds at the quantiles
SPLITS = {
    "train-clean-100": (
        28539,
        *(1.4, 2.0, 2.3, 2.5, 4.2, 6.4, 8.5, 12.0, 12.9, 14.1),
        *(14.8, 15.2, 15.6, 15.8, 16.1, 16.3, 16.6, 16.8, 17.0, 24.5),
    ),
    "train-clean-360": (
        104014,
        *(1.1, 1.9, 2.2, 2.6, 4.2, 6.2, 8.3, 11.5, 13.0, 14.0),
        *(14.6, 15.2, 15.6, 15.8, 16.0, 16.3, 16.6, 16.8, 16.9, 29.7),
    ),
    "train-other-500": (
        148688,
        *(0.9, 1.8, 2.1, 2.4, 3.5, 5.0, 6.4, 9.9, 12.3, 13.7),
        *(14.5, 15.0, 15.5, 15.7, 16.0, 16.3, 16.6, 16.8, 17.0, 27.9),
    ),
    "dev-clean": (
        2703,
        *(1.4, 1.6, 1.8, 1.9, 2.4, 2.7, 3.8, 5.9),
        *(9.3, 13.3, 16.4, 23.8, 28.5, 32.3, 32.6),
    ),
    "dev-other": (
        2864,
        *(1.1, 1.3, 1.7, 1.8, 2.2, 2.6, 3.5, 5.3),
        *(7.9, 12.0, 15.0, 22.2, 27.1, 32.4, 35.2),
    ),
    "test-clean": (
        2620,
        *(1.4, 1.6, 1.8, 2.0, 2.3, 2.7, 3.7, 5.8),
        *(9.6, 14.6, 17.8, 25.5, 28.4, 32.8, 35.0),
    ),
    "test-other": (
        2939,
        *(1.2, 1.5, 1.8, 1.9, 2.3, 2.6, 3.4, 5.2),
        *(8.2, 12.6, 15.8, 21.4, 23.8, 33.5, 34.5),
    ),
}
UNIONS = {"train-960": ("train-clean-100", "train-clean-360", "train-other-500")}
NAMES = (*UNIONS, *SPLITS)

BUCKET_SECONDS = 2  # of the pool: a file serves utterances up to so much shorter than it is
FILES_PER_BUCKET = 4


def draw_durations(name, seed):
    """Durations of all utterances.

    Arguments
    ---------
    name : str
        Of `NAMES`.
    seed : int
        Of their order.

    Returns
    -------
    dict
        Utterance ID -> seconds, a whole number of samples.
    """
    rng = np.random.default_rng(seed)
    durations = {}
    for split in UNIONS.get(name, (name,)):
        count, *seconds = SPLITS[split]
        quantiles = TRAIN_QUANTILES if split.startswith("train") else TEST_QUANTILES
        drawn = np.interp((rng.permutation(count) + 0.5) / count, quantiles, seconds)
        drawn = (np.round(drawn * SAMPLE_RATE) / SAMPLE_RATE).tolist()
        durations |= {f"{split}-{number:06d}": value for number, value in enumerate(drawn)}
    return durations


def make_waveform(seconds, seed):
    """Something like a voice: gliding harmonics in syllables, over noise; [samples] float32.

    FLAC stores it in about as many bits as it does LibriSpeech (139 kbit/s: 60 GB for 961 h), so
    it takes about as long to decode.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = 140 + 30 * np.sin(2 * np.pi * 0.3 * time)  # Hz
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voice = sum(np.sin(order * phase) / order for order in range(1, 20))
    syllables = np.sin(np.pi * 4 * time) ** 2
    noise = rng.standard_normal(len(time))
    return (0.12 * voice * syllables + 0.0015 * noise).astype(np.float32)


@dataclass
class Pool:
    """FLAC files of several lengths, of which each utterance reads the beginning of one."""

    folder: Path
    buckets: int
    bytes: int
    seconds: float

    @property
    def description(self):
        """What a report says about input and output."""
        return (
            f"each utterance opens and decodes one of {self.buckets * FILES_PER_BUCKET} FLAC files "
            f"({self.bytes / 1e6:.0f} MB, {8e-3 * self.bytes / self.seconds:.0f} kbit/s), which "
            "were just written and so come from the page cache"
        )

    def path(self, duration, choice):
        """The file for an utterance of so many seconds; `choice` is any integer."""
        bucket = int(np.ceil(duration / BUCKET_SECONDS))
        return self.folder / f"{bucket * BUCKET_SECONDS}-{choice % FILES_PER_BUCKET}.flac"


def write_pool(folder, longest, waveform):
    """Write the files.

    Arguments
    ---------
    folder : str or Path
        An empty folder.
    longest : float
        Seconds of the longest utterance.
    waveform : np.ndarray
        Float32, longer than `longest` by FILES_PER_BUCKET seconds and a bucket.

    Returns
    -------
    Pool
    """
    buckets = int(np.ceil(longest / BUCKET_SECONDS))
    pool = Pool(Path(folder), buckets, 0, 0.0)
    for bucket in range(1, buckets + 1):
        for choice in range(FILES_PER_BUCKET):
            seconds = bucket * BUCKET_SECONDS
            start = choice * SAMPLE_RATE
            path = pool.path(seconds, choice)
            soundfile.write(path, waveform[start : start + seconds * SAMPLE_RATE], SAMPLE_RATE)
            pool.bytes += os.path.getsize(path)
            pool.seconds += seconds
    return pool


def make_dataset(name, hparams, targets, pool_folder=None):
    """A train set like that of `training.data.dataio_prepare`, of simulated utterances.

    Arguments
    ---------
    name : str
        Of `NAMES`.
    hparams : dict
        The recipe's: `seed`, `sample_rate`, `vocab_size`, and `bos_index`, `eos_index` where it
        has them.
    targets : tuple of str
        As for `dataio_prepare`.
    pool_folder : str or Path, optional
        Empty folder for the pool of FLAC files; without it nothing is read.

    Returns
    -------
    dataset : DynamicItemDataset
        Everything in it depends on the seed and the utterance's ID alone.
    description : str
        What a report says about input and output.

    Raises
    ------
    ValueError
        If the recipe's `sample_rate` is not LibriSpeech's.
    """
    if hparams["sample_rate"] != SAMPLE_RATE:
        raise ValueError(
            f"sample_rate is {hparams['sample_rate']} Hz, but simulated audio has {SAMPLE_RATE} Hz"
        )
    seed, vocab_size = hparams["seed"], hparams["vocab_size"]
    bos, eos = hparams.get("bos_index"), hparams.get("eos_index")
    first_token = 1 + max(hparams.get(key, 0) for key in ("blank_index", "bos_index", "eos_index"))
    durations = draw_durations(name, seed)
    longest = max(durations.values())
    waveform = make_waveform(longest + FILES_PER_BUCKET + BUCKET_SECONDS, seed)
    pool = None
    if pool_folder is not None:
        pool = write_pool(pool_folder, longest, waveform)

    @sb.utils.data_pipeline.takes("id", "duration")
    @sb.utils.data_pipeline.provides("sig")
    def audio_pipeline(utterance, duration):
        rng = random.Random(f"{seed} {utterance}")
        choice, samples = rng.randrange(FILES_PER_BUCKET), round(duration * SAMPLE_RATE)
        if pool:
            wav = {"file": str(pool.path(duration, choice)), "start": 0, "stop": samples}
            signal = sb.dataio.dataio.read_audio(wav)
        else:
            start = choice * SAMPLE_RATE
            signal = torch.from_numpy(waveform[start : start + samples])
        return signal * rng.uniform(0.5, 1.0)  # no two utterances are the same

    @sb.utils.data_pipeline.takes("id", "duration")
    @sb.utils.data_pipeline.provides("wrd", "tokens", "tokens_bos", "tokens_eos")
    def text_pipeline(utterance, duration):  # run only as far as its outputs are asked for
        rng = random.Random(f"{seed} {utterance} text")
        yield "".join(rng.choices(LETTERS, k=round(CHARACTERS_PER_SECOND * duration)))
        count = max(1, round(TOKENS_PER_SECOND * duration))
        tokens = rng.choices(range(first_token, vocab_size), k=count)
        yield torch.LongTensor(tokens)
        yield torch.LongTensor([bos, *tokens])
        yield torch.LongTensor([*tokens, eos])

    dataset = sb.dataio.dataset.DynamicItemDataset(
        {utterance: {"duration": seconds} for utterance, seconds in durations.items()},
        dynamic_items=[audio_pipeline, text_pipeline],
        output_keys=["id", "sig", "wrd", *targets],
    )
    return dataset, pool.description if pool else "nothing is read: waveforms come from memory"
