"""A small speech corpus in LibriSpeech's own layout, synthesised on this machine.

    python recipes/LibriSpeech/mini_librispeech.py FOLDER [--vocabulary large] [--hours 5]

Sentences come from one of two grammars, of 51 words (small) or 2,700 (large),
voices from the espeak-ng engine that the `espeakng-loader` wheel carries; nothing is downloaded.
The result reads like LibriSpeech:

    FOLDER/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac      16 kHz, mono, 16 bit
    FOLDER/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt      "ID TEXT", upper case
    FOLDER/SPEAKERS.TXT                                         id, sex, split, minutes, voice

No speaker and no sentence occurs in two splits. The same settings give the same bytes, whatever
the number of workers.

Such speech is far easier to recognise than people's: it shows that a recipe learns, not how good
a model is.
"""

import argparse
import sys

from sligru_recipes.corpora.embedded import (
    DEFAULT_SPLITS,
    GRAMMARS,
    make_corpus,
    splits_for_hours,
)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", help="where to write it; a finished corpus there is reused")
    parser.add_argument(
        "--vocabulary", choices=list(GRAMMARS), default="small", help="of sentences"
    )
    parser.add_argument("--hours", type=float, help="of train audio, about (default: 0.5 or 5)")
    parser.add_argument("--seed", type=int, default=0, help="of sentences, voices and noise")
    parser.add_argument("--workers", type=int, help="processes at a time (default: one per CPU)")
    options = parser.parse_args(arguments)
    try:
        splits = DEFAULT_SPLITS[options.vocabulary]
        if options.hours is not None:
            splits = splits_for_hours(options.hours, options.vocabulary)
        seconds = make_corpus(
            options.folder, splits, options.seed, options.workers, options.vocabulary
        )
    except (ModuleNotFoundError, ValueError, OSError, RuntimeError) as error:
        sys.exit(f"mini_librispeech: {error}")
    for split, length in seconds.items():
        speakers, utterances = splits[split]
        print(
            f"{split}: {speakers} speakers, {speakers * utterances} utterances, "
            f"{length / 60:.1f} minutes"
        )


if __name__ == "__main__":
    main()
