"""The RNN language model of train_lm.py: its text, its training, its files."""

import os
import shutil

import numpy as np
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.utils.distributed import run_on_main

from ..files import replacing, write_text
from .brain import RecipeBrain, make_brain
from .data import find_manifests, load_manifest, prepare_data
from .experiment import start_experiment
from .tokenizer import check_characters, encode, load_tokenizer


class LanguageModel(RecipeBrain):
    """Negative log-likelihood of each next token."""

    def make_dataloader(self, dataset, stage, *args, **kwargs):
        """SpeechBrain's, with the batches that it makes of its own datasets."""
        return super().make_dataloader(dataset, stage, *args, collate_fn=PaddedBatch, **kwargs)

    def compute_forward(self, batch, stage):
        """Map the tokens so far to log-probabilities, [B, U + 1, tokens] float32."""
        tokens_bos, _ = batch.to(self.device, non_blocking=True).tokens_bos
        return self.hparams.log_softmax(self.modules.model(tokens_bos).float())

    def compute_objectives(self, predictions, batch, stage):
        """Return the mean negative log-likelihood of a token."""
        tokens_eos, lengths = batch.tokens_eos
        return self.hparams.seq_cost(predictions, tokens_eos, length=lengths)

    def collect_stats(self, loss):
        """Perplexity of a token."""
        return {"perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}  # or infinite


class Sentences(torch.utils.data.Dataset):
    """The lines of a text file as token sequences; empty lines are left out.

    Only the lines' positions are held in memory.

    Arguments
    ---------
    path : str
    tokenizer : SentencePiece
    bos_index, eos_index : int
    strict : bool
        Whether the tokenizer should know all characters; otherwise a warning names those that it
        does not.

    Raises
    ------
    ValueError
        If there is no line, or one is not UTF-8 or has characters that the tokenizer should know.
    """

    def __init__(self, path, tokenizer, bos_index, eos_index, strict=True):
        self.path, self.tokenizer = path, tokenizer
        self.bos_index, self.eos_index = bos_index, eos_index
        positions = []

        def lines():
            position = 0
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        positions.append(position)
                        try:
                            yield f"line {number}", line.decode().strip()
                        except UnicodeDecodeError as error:
                            raise ValueError(f"{path}: line {number} is not UTF-8") from error
                    position += len(line)

        check_characters(path, lines(), tokenizer, strict)
        if not positions:
            raise ValueError(f"{path} has no sentence")
        # Named as the IDs of SpeechBrain's own datasets.
        self.data_ids = np.array(positions, dtype=np.int64)

    def __len__(self):
        return len(self.data_ids)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.data_ids[index])
            tokens = encode(self.tokenizer, file.readline().decode().strip())
        return {
            "tokens_bos": torch.LongTensor([self.bos_index, *tokens]),
            "tokens_eos": torch.LongTensor([*tokens, self.eos_index]),
        }


def write_transcripts(manifests, path):
    """Write the transcripts of manifests to a text file, a line each; returns its path."""
    rows = [row for manifest in manifests for row in load_manifest(manifest).values()]
    write_text(path, "".join(f"{row['wrd']}\n" for row in rows))
    return path


def run(argv, script):
    """Prepare, train and test.

    Arguments
    ---------
    argv : list of str or None
        Command line; None: that of the process.
    script : str
        The file of the command, which is saved with the run.

    Returns
    -------
    dict
        Test split -> {"loss": ..., "perplexity": ...}.
    """
    with start_experiment(argv, script) as experiment:
        hparams = experiment.hparams
        prepare_data(hparams)
        train, valid, test = find_manifests(hparams)

        def transcripts(name, *manifests):
            path = os.path.join(hparams["save_folder"], f"{name}.txt")
            return run_on_main(write_transcripts, [manifests, path])

        train_text = hparams["text_file"] or transcripts("train", train)
        tokenizer = load_tokenizer(hparams, train_text)
        experiment.fit_to_tokenizer(tokenizer)
        hparams = experiment.hparams

        def load(text, strict=False):
            indices = (hparams["bos_index"], hparams["eos_index"])
            return Sentences(text, tokenizer, *indices, strict)

        train_data = load(train_text, strict=hparams["character_coverage"] == 1)
        valid_data = load(transcripts("valid", *valid))
        test_data = {name: load(transcripts(f"test-{name}", path)) for name, path in test.items()}
        brain = make_brain(LanguageModel, hparams, experiment.run_opts, tokenizer)
        brain.fit(
            hparams["epoch_counter"],
            train_data,
            valid_data,
            train_loader_kwargs=hparams["train_dataloader_opts"],
            valid_loader_kwargs=hparams["valid_dataloader_opts"],
            when_ready=experiment.save,
        )
        if not brain.debug:  # which keeps no checkpoint
            brain.on_evaluate_start(min_key="loss")  # loads the best checkpoint
            run_on_main(save_for_search, [hparams, tokenizer])
        return {split: brain.test(split, dataset) for split, dataset in test_data.items()}


def save_for_search(hparams, tokenizer):
    """Write lm.ckpt and tokenizer.ckpt, which train_seq2seq.py reads, to the output folder."""
    folder = hparams["output_folder"]
    with replacing(os.path.join(folder, "lm.ckpt")) as partial:
        torch.save(hparams["model"].state_dict(), partial)
    with replacing(os.path.join(folder, "tokenizer.ckpt")) as partial:
        shutil.copyfile(f"{tokenizer.prefix_model_file}.model", partial)
