"""CSV manifests of LibriSpeech, or of any corpus in its layout, with every file checked.

    python recipes/LibriSpeech/prepare.py DATA_FOLDER SAVE_FOLDER \
        --train train-clean-100 --dev dev-clean --test test-clean

The training scripts do this themselves. See `sligru_recipes/corpora/librispeech.py`.
"""

import argparse
import logging
import sys

from sligru_recipes.corpora.librispeech import SAMPLE_RATE, prepare_librispeech


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_folder", help="the corpus: holds one folder a split")
    parser.add_argument("save_folder", help="where the manifests go")
    parser.add_argument("--train", nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--dev", nargs="+", default=[], metavar="SPLIT")
    parser.add_argument("--test", nargs="+", default=[], metavar="SPLIT")
    parser.add_argument("--skip-bad-files", action="store_true", help="leave them out and go on")
    parser.add_argument("--sample-rate", type=int, default=SAMPLE_RATE, help="of the files, in Hz")
    parser.add_argument("--workers", type=int, help="processes that check (default: one per CPU)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        prepare_librispeech(
            options.data_folder,
            options.save_folder,
            options.train,
            options.dev,
            options.test,
            options.skip_bad_files,
            options.workers,
            options.sample_rate,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"prepare: {error}")


if __name__ == "__main__":
    main()
