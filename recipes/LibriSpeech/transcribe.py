"""Transcribe audio files with a recogniser that export_inference.py made.

    python recipes/LibriSpeech/transcribe.py FOLDER speech.wav recordings/ [--max_batch_length 120]

prints a line `NAME<TAB>TEXT` for each file, in the order given; of a folder all WAV and FLAC files
below it. Any sample rate and number of channels will do. A file that cannot be read is reported on
stderr and makes the exit code 1; the others are transcribed all the same.

Files are transcribed one at a time, or in batches of up to `--max_batch_length` seconds: quicker
where there are many, but the padding of the shorter ones may change a letter here and there.
"""

import argparse
import sys

from sligru_recipes.inference.transcribe import find_audio, load_recogniser, transcribe


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="made by export_inference.py")
    parser.add_argument("audio", nargs="+", help="WAV or FLAC files, or folders of them")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument(
        "--max_batch_length", type=float, default=0.0, help="s of audio in a batch; 0: no batches"
    )
    options = parser.parse_args(arguments)
    try:
        files = find_audio(options.audio)
        recogniser = load_recogniser(options.folder, options.device)
    except (OSError, RuntimeError) as error:
        sys.exit(f"transcribe: {error}")
    texts, errors = transcribe(recogniser, files, options.max_batch_length)
    for file in files:
        if file in texts:
            print(f"{file}\t{texts[file]}")
    for file, reason in errors.items():
        print(f"transcribe: {file}: {reason}", file=sys.stderr)
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
