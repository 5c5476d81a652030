"""Corpora of a few utterances, in LibriSpeech's layout."""

import shutil

import numpy as np
import soundfile

from sligru_recipes.corpora.embedded import make_corpus

SPLITS = ("train-clean-100", "dev-clean", "test-clean")


def make_speech(folder, utterances):
    """Write the same few synthetic utterances of one speaker as train, dev and test split."""
    make_corpus(folder / "spoken", {SPLITS[0]: (1, utterances)})
    for split in SPLITS:
        shutil.copytree(folder / "spoken" / SPLITS[0], folder / "LibriSpeech" / split)
    return folder / "LibriSpeech"


def make_noise(folder, seconds, rate=16000):
    """Write a corpus of noise: a train utterance for each of `seconds`, few others."""
    for speaker, (split, durations) in enumerate(
        zip(SPLITS, (seconds, seconds[:2], seconds[:1]), strict=True), 1
    ):
        chapter = folder / split / str(speaker) / "10"
        chapter.mkdir(parents=True)
        random = np.random.default_rng(speaker)
        transcripts = []
        for number, duration in enumerate(durations):
            name = f"{speaker}-10-{number:04d}"
            noise = 0.1 * random.standard_normal(round(rate * duration))
            soundfile.write(chapter / f"{name}.flac", noise, rate)
            words = random.choice(("NODE", "DONE"), 2)  # the same letters in all splits
            transcripts.append(f"{name} {' '.join(words)}\n")
        (chapter / f"{speaker}-10.trans.txt").write_text("".join(transcripts))
    return folder
