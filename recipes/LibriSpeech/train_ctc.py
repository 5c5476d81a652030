"""Train a CTC speech recogniser on LibriSpeech or on the embedded corpus.

    python recipes/LibriSpeech/train_ctc.py hparams/librispeech_ctc.yaml --data_folder=LIBRISPEECH

The encoder is a CRDNN with the RNN of the `rnn_class` key. `--KEY=VALUE` overrides a
key of the YAML, `--overrides=FILE.yaml` all keys of a second YAML (those on the command line win),
and SpeechBrain's run options (`--device`, `--precision`, `--debug`, ...) work as everywhere.
Stopped, the same command resumes from the last checkpoint. See README.md beside this file.
"""

from sligru_recipes.training.ctc import CTC
from sligru_recipes.training.experiment import run_script
from sligru_recipes.training.recogniser import run


def main(argv=None):
    """Prepare, train and test; see `run`."""
    return run(CTC, argv, __file__)


if __name__ == "__main__":
    run_script(main)
