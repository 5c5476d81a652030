"""Runs of the CTC recipe that take a second or two, and a process that is in their way."""

import contextlib
import multiprocessing
import signal
import sys

import pytest
from helpers import ROOT

import train_ctc
from sligru_recipes.lock import lock_folder
from sligru_recipes.training.experiment import run_script

YAML = ROOT / "hparams/librispeech_ctc.yaml"
MINI = ROOT / "hparams/librispeech_ctc_mini.yaml"
# Nothing random, and as small as the model can be.
TINY = (
    YAML,
    f"--overrides={MINI}",
    "--device=cpu",
    "--noprogressbar",
    "--token_type=char",
    "--vocab_size=6",  # as many as the noise's transcripts have: the YAML is not loaded twice
    "--dropout=0.0",
    "--cnn_channels=[2]",
    "--rnn_layers=1",
    "--rnn_neurons=8",
    "--dnn_neurons=16",
    "--export_inference=False",
)


def complaint(argv):
    """Run the recipe as its script does; return what it prints on stderr as it exits with 1."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["train_ctc.py", *map(str, argv)])
        run_script(train_ctc.main)
    message = stop.value.code
    assert isinstance(message, str), message  # printed by Python, with exit status 1
    assert "\n" not in message
    return message


@contextlib.contextmanager
def held_by_another(folder):
    """Yields a process that holds the folder as a run does."""
    fork = multiprocessing.get_context("fork")
    held = fork.Event()

    def hold():
        with lock_folder(folder):
            held.set()
            signal.pause()

    process = fork.Process(target=hold)
    process.start()
    try:
        assert held.wait(10)
        yield process
    finally:
        process.kill()
        process.join()
