"""Run training scripts and record what each process trained on, and its weights at the end.

    python tests/recipes/LibriSpeech/recorded_run.py RUNS.json

RUNS.json holds a list of dicts, the keyword arguments of `record_run`; they run one after the
other. Under torchrun every process runs them all. The scripts know nothing of it.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from speechbrain.utils.checkpoints import Checkpointer

import sb_fast_sligru

RECIPES = Path(__file__).parents[3] / "recipes/LibriSpeech"


class LayerNormSLiGRU(sb_fast_sligru.SLiGRU):
    """Treats each utterance alone, for `--rnn_class=!name:recorded_run.LayerNormSLiGRU`."""

    def __init__(self, hidden_size, input_shape, **kwargs):
        super().__init__(hidden_size, input_shape, ff_normalization="layernorm", **kwargs)


def record_run(record, script, argv, kill_after_batch=None, kill_in_checkpoint=None):
    """Call `main(argv)` of the recipe `script`, "train_ctc" for instance, and return its result.

    Writes, for the process of rank R, RECORD.R.jsonl with a line for each batch, appended, and
    RECORD.R.pt with the model's state_dict after training.

    Arguments
    ---------
    record : str or Path
        Start of the names of the files.
    script : str
    argv : list of str
    kill_after_batch : int, optional
        The process kills itself by SIGKILL when it has trained on that many batches.
    kill_in_checkpoint : int, optional
        Likewise when it has written the metadata of that many checkpoints, the last of which
        then has nothing else.
    """
    from sligru_recipes.training.brain import RecipeBrain

    record = f"{record}.{os.environ.get('RANK', 0)}"

    def note_batch(self, batch, outputs, loss, should_step):
        line = {"epoch": self.epoch, "ids": batch.id, "loss": loss.item()}
        with open(f"{record}.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(line), file=file)

    def keep_weights(self, *args, **kwargs):
        torch.save(self.hparams.model.state_dict(), f"{record}.pt")

    with (
        then(RecipeBrain, "on_fit_batch_end", note_batch),
        then(RecipeBrain, "on_fit_batch_end", kill_at(kill_after_batch)),
        then(Checkpointer, "_save_checkpoint_metafile", kill_at(kill_in_checkpoint)),
        then(RecipeBrain, "fit", keep_weights),
    ):
        return importlib.import_module(script).main([str(argument) for argument in argv])


def then(owner, name, action):
    """Patch a method to call `action` after itself, with the same arguments."""
    method = getattr(owner, name)

    def both(*args, **kwargs):
        result = method(*args, **kwargs)
        action(*args, **kwargs)
        return result

    return mock.patch.object(owner, name, both)


def kill_at(count):
    """An action that kills the process by SIGKILL when it is called for the `count`-th time."""
    calls = 0

    def action(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def main():
    sys.path.insert(0, str(RECIPES))
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    first, *others = runs
    record_run(**first)
    # A process joins a group once.
    with mock.patch("sligru_recipes.training.experiment.ddp_init_group"):
        for run in others:
            record_run(**run)


if __name__ == "__main__":
    main()
