"""Train an attention speech recogniser with a CTC branch, on LibriSpeech or the embedded corpus.

    python recipes/LibriSpeech/train_seq2seq.py hparams/librispeech_seq2seq.yaml \
        --data_folder=LIBRISPEECH

The encoder is a CRDNN with the RNN of the `rnn_class` key, the decoder a GRU with
location-aware attention. The test splits are decoded by a beam search that weighs attention, CTC
and, if `lm_folder` is given, a language model of train_lm.py. The command line is that of
train_ctc.py. See README.md beside this file.
"""

from sligru_recipes.training.experiment import run_script
from sligru_recipes.training.recogniser import run
from sligru_recipes.training.seq2seq import Seq2Seq


def main(argv=None):
    """Prepare, train and test; see `run`."""
    return run(Seq2Seq, argv, __file__)


if __name__ == "__main__":
    run_script(main)
