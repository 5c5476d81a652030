"""Make one ONNX file of a CTC recogniser that export_inference.py made.

    python recipes/LibriSpeech/export_onnx.py FOLDER out.onnx

The file takes waveforms [batch, samples] and gives log-probabilities [batch, frames, tokens]; its
metadata have the tokens, the blank's index and the sample rate. Any runtime of opset 18 or newer
runs it, without PyTorch or SpeechBrain: docs/export.md has a decoder of twenty lines. Needs
`pip install ".[onnx]"`.
"""

import argparse
import logging
import sys

from sligru_recipes.inference.recogniser import load_recogniser


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="made by export_inference.py")
    parser.add_argument("file", help="to write, such as out.onnx")
    parser.add_argument(
        "--trust", action="store_true", help="load the folder's YAML even if it can run any code"
    )
    options = parser.parse_args(arguments)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names libraries of no use here
    try:
        from sligru_recipes.inference.onnx import export_onnx

        export_onnx(load_recogniser(options.folder, "cpu", options.trust), options.file)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"export_onnx: {error}")
    print(options.file)


if __name__ == "__main__":
    main()
