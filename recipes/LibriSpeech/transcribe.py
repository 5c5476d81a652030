"""Transcribe audio files with a recogniser that export_inference.py made.

    python recipes/LibriSpeech/transcribe.py FOLDER speech.wav recordings/ [--max_batch_length 120]

prints a line `NAME<TAB>TEXT` for each file as soon as it is done; of a folder all WAV and FLAC
files below it. Any sample rate and number of channels will do. Control characters and backslashes
of a name are printed as in Python's strings. A file that cannot be read is reported on stderr and
makes the exit code 1; the others are transcribed all the same. The last line on stderr tells how
many seconds of audio were transcribed in how many.

A recogniser with attention fails on a recording longer than all that it was trained on: such a one
is cut at its pauses, and the texts of its parts are joined. `--max_segment_length` sets a length,
in seconds, for CTC too, which needs none.

Files are transcribed one at a time, in the order given, or by `--max_batch_length` the longest
first in batches of so many seconds, whose searches are made together: the texts are the same, and
with attention come sooner where there are many.

`--stream` gives a file to the recogniser as if it were being spoken, and prints each piece of its
text as soon as it is known: together the same text. It takes a recogniser that hears no more of the
future than a moment, such as hparams/librispeech_ctc_streaming.yaml trains.
"""

import argparse
import math
import sys
import time

from tqdm import tqdm

from sligru_recipes.inference.audio import find_audio, printable
from sligru_recipes.inference.recogniser import load_recogniser
from sligru_recipes.inference.stream import StreamingTranscriber
from sligru_recipes.inference.transcribe import longest_recording, transcribe


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="made by export_inference.py")
    parser.add_argument("audio", nargs="+", help="WAV or FLAC files, or folders of them")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument(
        "--max_batch_length",
        type=_seconds,
        help="s of audio searched together (default: one file)",
    )
    parser.add_argument(
        "--max_segment_length",
        type=_seconds,
        help="s; longer recordings are cut (default: training's longest utterance; CTC: never)",
    )
    parser.add_argument(
        "--stream", action="store_true", help="print a file's text piece by piece as it is heard"
    )
    parser.add_argument(
        "--trust", action="store_true", help="load the folder's YAML even if it can run any code"
    )
    options = parser.parse_args(arguments)
    if options.stream and (options.max_batch_length or options.max_segment_length):
        parser.error("--stream hears one file at a time, and all of it: it takes no lengths")
    try:
        recogniser = load_recogniser(options.folder, options.device, options.trust)
        transcriber = StreamingTranscriber(recogniser) if options.stream else None
    except (OSError, ValueError) as error:
        sys.exit(f"transcribe: {error}")
    longest = options.max_segment_length or longest_recording(recogniser)
    if longest is None:
        _report(f"{options.folder} does not tell its longest utterance of training: nothing is cut")
        longest = math.inf
    sys.stdout.reconfigure(errors="backslashreplace")  # names need not be text
    files, errors = find_audio(options.audio)
    for path, error in errors.items():
        _report(f"{printable(path)}: {error}")
    if transcriber:
        done = transcriber.transcribe_files(files)
    else:
        done = transcribe(recogniser, files, options.max_batch_length or 0.0, longest)
    failed, heard, start = bool(errors), 0.0, time.monotonic()
    # A bar would be in the way of a line that is not complete.
    bar = tqdm(done, "transcribing", len(files), unit="file", disable=True if transcriber else None)
    for file, text, error, seconds in bar:
        with tqdm.external_write_mode():
            if error is None:
                print(f"{printable(file)}\t", end="", flush=True)
                for piece in [text] if isinstance(text, str) else text:
                    print(piece, end="", flush=True)
                print(flush=True)
                heard += seconds
            else:
                _report(f"{printable(file)}: {error}")
                failed = True
    if heard:
        took = time.monotonic() - start
        _report(f"{heard:.1f} s of audio in {took:.1f} s, {heard / took:.1f} s a second")
    if failed:
        sys.exit(1)


def _seconds(text):
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _report(line):
    print(f"transcribe: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
