"""How long an epoch of a recipe takes with SpeechBrain's parts and with ours, and where it goes.

    python recipes/LibriSpeech/compare_epoch_time.py hparams/librispeech_seq2seq.yaml \
        --data_folder=LIBRISPEECH --output_folder=results/compare_epoch_time --batches=200

compares on LibriSpeech or, with its folder, on the embedded corpus; `--simulate=train-960` instead
of a folder takes utterances of LibriSpeech's lengths. The recipe is that of the YAML,
train_ctc.py or train_seq2seq.py, whose other arguments are taken too (`--overrides`, `--device`,
any key of the YAML); this script's own are in `--help`.

`sligru_recipes/epoch_time/comparison.py` tells what is the same for all variants, and when no ratio
is printed and the exit status is 1.
"""

import argparse
import sys

from sligru_recipes.corpora import simulated
from sligru_recipes.epoch_time.comparison import CELLS, PRECISIONS, compare, something_done
from sligru_recipes.epoch_time.recipe import Options
from sligru_recipes.epoch_time.report import files
from sligru_recipes.epoch_time.texts import as_text
from sligru_recipes.training.experiment import one_line


def parse(arguments=None):
    """Split the command line; returns Options and the recipe's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="All other arguments are those of the recipe: its YAML file comes first.",
        allow_abbrev=False,
    )
    extent = parser.add_mutually_exclusive_group(required=True)
    extent.add_argument("--batches", type=int, help="sample so many of the epoch's batches")
    extent.add_argument("--full", action="store_true", help="take all of them")
    parser.add_argument("--passes", type=int, default=1, help="times through them (default 1)")
    parser.add_argument("--simulate", choices=simulated.NAMES, help="instead of --data_folder")
    parser.add_argument(
        "--no-io", dest="io", action="store_false", help="simulated audio comes from memory"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=CELLS,
        default=Options.cells,
        help="RNNs (default: SLi-GRU Li-GRU)",
    )
    parser.add_argument(
        "--precision",
        dest="precisions",
        nargs="+",
        choices=PRECISIONS,
        default=(),
        help="fp32 is without TF32 (default: that of the YAML)",
    )
    parser.add_argument(
        "--stock-jit", action="store_true", help="also SpeechBrain's by torch.jit.script"
    )
    parser.add_argument(
        "--stock-compile",
        action="store_true",
        help="also SpeechBrain's by torch.compile, minutes for each new length",
    )
    parser.add_argument("--isolate", action="store_true", help="a fresh process per variant")
    parser.add_argument("--resume", action="store_true", help="go on where the report ends")
    parser.add_argument(
        "--commit", metavar="HASH", help="for the report (default: that of the repository)"
    )
    own, recipe_arguments = parser.parse_known_args(arguments)
    own = vars(own)
    del own["full"]
    for name in ("cells", "precisions"):
        own[name] = tuple(dict.fromkeys(own[name]))
    return Options(**own), recipe_arguments


def main(arguments=None):
    options, recipe_arguments = parse(arguments)
    try:
        report, folder = compare(recipe_arguments, options)
    except (OSError, ValueError) as error:
        sys.exit(f"compare_epoch_time: {one_line(error)}")
    if not something_done(report):
        sys.exit("compare_epoch_time: stopped before anything was done; no report was written")
    print(f"\n{as_text(report)}")
    print(f"Written: {', '.join(str(folder / name) for name in files(report))}")
    if report["interrupted"]:
        sys.exit(130)
    if report["refused"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
