"""The recipes' Brain on a model of one layer: skips, accumulation, progress, pictures, logs."""

import logging
import multiprocessing
import os
import re
import shutil
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import NewBobScheduler
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger

from sligru_recipes.training import brain as recipe_brain
from sligru_recipes.training.brain import RecipeBrain, draw_progress
from sligru_recipes.training.checkpoints import AtomicCheckpointer

BATCHES = 4


class Mean(RecipeBrain):
    """Learns y = x; a batch that is in `bad` gives NaN gradients of a finite loss."""

    bad = ()
    stop_at = None

    def compute_forward(self, batch, stage):
        return self.modules.layer(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        if stage == sb.Stage.TRAIN and (self.epoch, self.step) == self.stop_at:
            raise KeyboardInterrupt
        loss = (predictions - batch[0]).square().mean()
        if stage == sb.Stage.TRAIN and (self.epoch, self.step) in self.bad:
            # sqrt has the derivative infinity at 0, times 0 is NaN.
            loss = loss + (0 * predictions).abs().sqrt().sum()
        return loss

    def collect_stats(self, loss):
        return {"WER": 100 * loss}


@pytest.fixture
def data():
    return torch.utils.data.TensorDataset(torch.randn(2 * BATCHES, 3))


def make_brain(
    folder, epochs=2, lr=0.1, tensorboard=False, avg_checkpoints=1, kind=None, **options
):
    torch.manual_seed(1)
    scheduler, counter = NewBobScheduler(lr), EpochCounter(epochs)
    layer = torch.nn.Linear(3, 3)
    (folder / "save").mkdir(parents=True, exist_ok=True)
    hparams = {
        "output_folder": str(folder),
        "epoch_counter": counter,
        "lr_annealing": scheduler,
        "train_logger": FileTrainLogger(folder / "train_log.txt"),
        "use_tensorboard": tensorboard,
        "tensorboard_logger": partial(TensorboardLogger, save_dir=str(folder / "tensorboard")),
        "log_interval_minutes": 10,
        "test_dataloader_opts": {"batch_size": 2},
        "lr": lr,
        "pretrained_folder": None,
        "avg_checkpoints": avg_checkpoints,
    }
    return (kind or Mean)(
        None,
        modules={"layer": layer},
        opt_class=partial(torch.optim.SGD, lr=lr),
        hparams=hparams,
        run_opts={"device": "cpu", **options},
        checkpointer=AtomicCheckpointer(
            folder / "save",
            {"layer": layer, "scheduler": scheduler, "counter": counter},
        ),
    )


def fit(brain, data, batch_size=2):
    options = {"batch_size": batch_size}
    brain.fit(
        brain.hparams.epoch_counter,
        data,
        data,
        train_loader_kwargs=options,
        valid_loader_kwargs=options,
    )
    return brain


def skips(folder):
    log = (folder / "train_log.txt").read_text().splitlines()
    return [int(line.split("train skipped updates: ")[1].split(" ")[0]) for line in log]


def weight(brain):
    return brain.modules.layer.weight.detach().clone()


def test_updates_with_nonfinite_gradients_are_skipped_and_counted(tmp_path, data):
    brain = make_brain(tmp_path)
    brain.bad = {(1, 2), (1, 3), (2, 4)}
    fit(brain, data)
    assert skips(tmp_path) == [2, 1]
    assert brain.skipped_updates == 3
    assert weight(brain).isfinite().all()
    assert brain.optimizer_step == 2 * BATCHES - 3
    losses = [epoch["train loss"] for epoch in brain.history]
    assert losses[1] < losses[0]


def test_a_skipped_update_leaves_the_weights(tmp_path, data):
    brain = make_brain(tmp_path, epochs=1)
    before = weight(brain)
    brain.bad = {(1, step) for step in range(1, BATCHES + 1)}
    fit(brain, data)
    assert skips(tmp_path) == [BATCHES]
    assert torch.equal(weight(brain), before)


def test_the_scaler_of_fp16_skips_and_is_counted(tmp_path, data):
    """SpeechBrain refuses fp16 on a CPU; its GradScaler alone runs there."""
    brain = make_brain(tmp_path, epochs=1)
    brain.scaler = torch.GradScaler("cpu", init_scale=1024.0)
    brain.bad = {(1, 2)}
    fit(brain, data)
    assert skips(tmp_path) == [1]
    assert brain.scaler.get_scale() == 512
    assert weight(brain).isfinite().all()


def test_the_count_outlives_a_stop_within_an_epoch(tmp_path, data):
    def brain_of(folder):
        brain = make_brain(folder, ckpt_interval_steps=1)
        brain.bad = {(1, 1), (2, 1), (2, 3)}
        return brain

    whole = fit(brain_of(tmp_path / "whole"), data)
    stopped = brain_of(tmp_path / "stopped")
    stopped.stop_at = (2, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, data)
    resumed = fit(brain_of(tmp_path / "stopped"), data)
    assert skips(tmp_path / "stopped") == skips(tmp_path / "whole") == [1, 2]
    assert torch.equal(weight(resumed), weight(whole))
    for mine, theirs in zip(resumed.history, whole.history, strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


def test_validation_losses_of_nan_are_told_and_end_the_run_if_all_are(tmp_path, data, caplog):
    dataset, rows = torch.utils.data.TensorDataset, torch.full((2, 3), torch.nan)
    brain = make_brain(tmp_path)
    brain.fit(range(1, 2), data, dataset(torch.cat([rows, torch.ones(1, 3)])))
    told = re.findall(r"valid batch (\d): the loss is nan; it is left out", caplog.text)
    assert told == ["1", "2"]
    (kept,) = brain.checkpointer.list_checkpoints()
    with pytest.raises(ValueError, match="diverged: no validation loss of epoch 2 is finite"):
        brain.fit(range(2, 3), data, dataset(rows))
    assert [checkpoint.path for checkpoint in brain.checkpointer.list_checkpoints()] == [kept.path]


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path, data):
    small = make_brain(tmp_path / "small", epochs=1, grad_accumulation_factor=2)
    large = make_brain(tmp_path / "large", epochs=1)
    assert not torch.equal(weight(fit(small, data)), weight(make_brain(tmp_path / "new")))
    torch.testing.assert_close(weight(small), weight(fit(large, data, batch_size=4)))


class AsSpeechBrain(Mean):
    fit_batch = sb.Brain.fit_batch


@pytest.mark.parametrize("factor", [1, 2])
def test_updates_are_speechbrains(tmp_path, data, factor):
    """Clipped by the norm that is known, with gradients of one batch or two."""
    options = {"epochs": 3, "max_grad_norm": 0.3, "grad_accumulation_factor": factor}
    ours = fit(make_brain(tmp_path / "ours", **options), data)
    theirs = fit(make_brain(tmp_path / "theirs", kind=AsSpeechBrain, **options), data)
    free = fit(make_brain(tmp_path / "free", **options | {"max_grad_norm": 1e3}), data)
    assert torch.equal(weight(ours), weight(theirs))
    assert not torch.equal(weight(ours), weight(free))
    assert ours.optimizer_step == theirs.optimizer_step == 3 * BATCHES // factor
    for mine, other in zip(ours.history, theirs.history, strict=True):
        assert mine | {"seconds": 0} == other | {"seconds": 0}


def test_gradients_below_the_limit_are_not_multiplied(tmp_path, data, monkeypatch):
    """That would be a pass over all of them, by 1; the weights are the same to the bit."""
    options = {"epochs": 3, "max_grad_norm": 1.0}
    theirs = fit(make_brain(tmp_path / "theirs", kind=AsSpeechBrain, **options), data)
    clip, norms = torch.nn.utils.clip_grads_with_norm_, []

    def note(gradients, limit, norm):
        norms.append(norm.item())
        clip(gradients, limit, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", note)
    ours = fit(make_brain(tmp_path / "ours", **options), data)
    assert torch.equal(weight(ours), weight(theirs))
    assert 0 < len(norms) < 3 * BATCHES and min(norms) > 1.0 - 1e-6


def test_losses_that_are_not_finite_are_borne_a_few_times(tmp_path, data, caplog):
    """Each is told, its update left out; one more than the patience ends the run."""
    rows = data.tensors[0].clone()
    rows[2] = torch.nan
    damaged = torch.utils.data.TensorDataset(rows)
    brain = make_brain(tmp_path / "borne", nonfinite_patience=1)
    brain.fit(range(1, 3), damaged, data, train_loader_kwargs={"batch_size": 2})
    assert brain.skipped_updates == 2 and weight(brain).isfinite().all()
    told = re.findall(r"(epoch \d, batch \d): the loss is nan; its update is left", caplog.text)
    assert told == ["epoch 1, batch 2", "epoch 2, batch 2"]
    brain = make_brain(tmp_path / "ended", nonfinite_patience=0)
    with pytest.raises(ValueError, match="diverged: in epoch 1, batch 2 the loss is nan"):
        brain.fit(range(1, 3), damaged, data, train_loader_kwargs={"batch_size": 2})


def test_processes_seldom_wait_to_agree_on_a_checkpoint(tmp_path, monkeypatch):
    """The clock is the first one's, which all ask at the same steps; the steps all know."""
    asked = []

    def ask(brain, *arguments):
        asked.append(brain.step)
        return True

    monkeypatch.setattr(sb.Brain, "_should_save_intra_epoch_ckpt", ask)

    def due(interval, distributed):
        brain = make_brain(tmp_path, **interval)
        monkeypatch.setattr(recipe_brain, "is_distributed_initialized", lambda: distributed)
        found = []
        for brain.step in range(1, 41):
            if brain._should_save_intra_epoch_ckpt(0.0, brain.step % 10):
                found.append(brain.step)
        return found

    by_clock, by_steps = {"ckpt_interval_minutes": 1e-9}, {"ckpt_interval_steps": 8}
    assert due(by_clock, True) == asked == [20, 40]
    assert due(by_clock, False) == asked[2:] == list(range(1, 41))
    for distributed in (True, False):
        assert due(by_steps, distributed) == [8, 9, 18, 19, 28, 29, 38, 39]
    assert len(asked) == 42


def test_progress_is_logged_where_there_is_no_terminal(tmp_path, data, caplog):
    brain = make_brain(tmp_path)
    brain.hparams.log_interval_minutes = 0
    with caplog.at_level(logging.INFO, logger=recipe_brain.__name__):
        fit(brain, data)
        brain.test("test-clean", data)
    lines = [record.message for record in caplog.records if record.name == recipe_brain.__name__]
    assert lines[0].startswith(f"epoch 1/2 train: batch 1 of {BATCHES}, loss ")
    assert lines[0].endswith("run ends in 00:00")
    assert f"epoch 2/2 valid: batch {BATCHES} of {BATCHES}" in lines
    assert f"test: batch 1 of {BATCHES}" in lines


def test_time_left_counts_this_epoch_and_the_others(tmp_path, monkeypatch):
    brain = make_brain(tmp_path, epochs=5)
    brain.epoch, brain.step, brain.batches, brain.epoch_start = 2, 10, 40, 0.0
    monkeypatch.setattr(recipe_brain, "time", types.SimpleNamespace(monotonic=lambda: 30.0))
    # No epoch is known: 3 s a batch, 30 batches, then 3 epochs of 120 s.
    assert brain._time_left() == "07:30"
    # Epochs took 150 s with their validation: 120 s of this one, then 3 of them.
    brain.history = [{"seconds": 150}]
    assert brain._time_left() == "09:30"


def test_progress_picture(tmp_path, data):
    fit(make_brain(tmp_path, epochs=1), data)
    first = (tmp_path / "progress.png").read_bytes()
    brain = fit(make_brain(tmp_path, epochs=2), data)  # resumes: both epochs are drawn
    second = (tmp_path / "progress.png").read_bytes()
    assert first.startswith(b"\x89PNG") and second.startswith(b"\x89PNG")
    assert len(first) > 10_000 and first != second
    assert [epoch["epoch"] for epoch in brain.history] == [1, 2]
    draw_progress(brain.history, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == second


def test_tensorboard_goes_on_where_it_stopped(tmp_path, data, monkeypatch):
    """SpeechBrain's own logger, with a writer that keeps what it is given."""
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *scalar):
            scalars.append(scalar)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for epochs in (1, 2):
        brain = fit(make_brain(tmp_path, epochs=epochs, tensorboard=True), data)
    found = [(step, value) for name, value, step in scalars if name == "loss/valid"]
    assert found == [(epoch["epoch"], epoch["valid loss"]) for epoch in brain.history]
    assert ("skipped updates/train", 0, 2) in scalars and ("epoch", 2, 2) in scalars


def debug_run(rank, folder):
    """One of two processes; torchrun sets the same variables."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    data = torch.utils.data.TensorDataset(torch.ones(2 * BATCHES, 3))
    brain = make_brain(folder, epochs=3, debug=True, debug_epochs=3, distributed_backend="gloo")
    fit(brain, data)
    brain.test("test-clean", data)
    (folder / f"{rank}.txt").write_text(str(brain.checkpointer.checkpoints_dir))


def test_two_processes_debug_together(tmp_path):
    """Checkpoints are deleted by both or none: each of SpeechBrain's had a folder of its own."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=debug_run, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
        assert process.exitcode == 0
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    assert len((tmp_path / "train_log.txt").read_text().splitlines()) == 4


def test_full_disk_is_found_before_training(tmp_path, data, monkeypatch):
    brain = make_brain(tmp_path)
    # 12 parameters of 12 bytes, four checkpoints.
    free = types.SimpleNamespace(free=575)
    monkeypatch.setattr(shutil, "disk_usage", {str(tmp_path): free}.get)
    with pytest.raises(ValueError, match=f"output_folder {tmp_path} has 0 MiB free"):
        fit(brain, data)
    assert list(Path(tmp_path / "save").iterdir()) == []
    free.free = 576
    assert len(fit(brain, data).history) == 2
