"""Make a folder from which SpeechBrain's own inference classes transcribe, out of a finished run.

    python recipes/LibriSpeech/export_inference.py RUN_FOLDER [FOLDER]

RUN_FOLDER is the `output_folder` of a recipe, which calls this itself at its end. FOLDER (by
default RUN_FOLDER/inference) gets the checkpoint of lowest validation WER, the tokenizer and an
inference YAML; it can be moved and needs neither the corpus nor the recipe:

    from speechbrain.inference.ASR import EncoderASR  # or EncoderDecoderASR, if trained by seq2seq

    asr = EncoderASR.from_hparams(source="FOLDER")
    print(asr.transcribe_file("speech.wav"))
"""

import argparse
import sys

from sligru_recipes.inference.export import export


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", help="output_folder of a recipe")
    parser.add_argument("folder", nargs="?", help="to write (default: RUN_FOLDER/inference)")
    options = parser.parse_args(arguments)
    try:
        print(export(options.run_folder, options.folder))
    except OSError as error:
        sys.exit(f"export_inference: {error}")


if __name__ == "__main__":
    main()
