"""Train an RNN language model for the beam search of train_seq2seq.py.

    python recipes/LibriSpeech/train_lm.py hparams/librispeech_lm.yaml --data_folder=LIBRISPEECH \
        [--text_file=SENTENCES.txt] [--tokenizer_file=TOKENIZER.model]

It learns from the train transcripts, or from a text file with a sentence a line, in the letters of
the transcripts. The output folder then holds lm.ckpt (the epoch of lowest validation loss) and
tokenizer.ckpt, which train_seq2seq.py takes by `--lm_folder=FOLDER
--tokenizer_file=FOLDER/tokenizer.ckpt`. The command line is that of train_ctc.py.
"""

from sligru_recipes.training import language_model
from sligru_recipes.training.experiment import run_script


def main(argv=None):
    """Prepare, train and test; see `language_model.run`."""
    return language_model.run(argv, __file__)


if __name__ == "__main__":
    run_script(main)
