"""What the recipes add to SpeechBrain's Brain: counted skips, progress, pictures, DDP on a CPU."""

import os
import shutil
import statistics
import sys
import time
from functools import partial

import speechbrain as sb
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import ddp_broadcast, if_main_process, main_process_only
from speechbrain.utils.logger import get_logger
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

logger = get_logger(__name__)

# Parameters, and the optimiser's two values for each (Adadelta, Adam).
CHECKPOINT_BYTES_PER_PARAMETER = 3 * 4
# The best, the last, one within an epoch, and the one that is being written.
CHECKPOINTS_AT_ONCE = 4
# How many epochs are averaged to tell when the run ends: the first may be slower.
EPOCHS_FOR_ETA = 3


@register_checkpoint_hooks
class RecipeBrain(sb.Brain):
    """Brain of the recipes; subclasses compute the loss and collect errors.

    lr_annealing follows the validation loss; the best checkpoint is the one of lowest `best_by`,
    a class attribute that names a validation statistic. Takes the tokenizer and what Brain does.

    An update with a NaN or an infinity in its gradients is left out, in any precision, and
    counted; the count outlives a stop within an epoch. SpeechBrain itself counts losses only.
    """

    best_by = "loss"

    def __init__(self, tokenizer, **kwargs):
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        # --debug gives each process a folder of its own for checkpoints; those that do not write
        # would wait for ever for what they cannot see.
        self.checkpointer.checkpoints_dir = ddp_broadcast(self.checkpointer.checkpoints_dir)
        self.history = []  # one dict of numbers per epoch
        self.skipped_updates = 0  # since the first epoch
        self.epoch = 0
        self.epoch_start = time.monotonic()
        self.epoch_seconds = 0.0  # spent in the current epoch before a stop
        self.batches_in = {}  # stage -> number of batches
        self.batches = 0  # in this stage
        self.bar = tqdm(disable=True)
        self.report_by_lines = False
        if self.hparams.use_tensorboard:
            try:
                self.tensorboard = self.hparams.tensorboard_logger()
            except ImportError as error:
                raise ValueError(
                    f"use_tensorboard needs a package: pip install tensorboard ({error})"
                ) from error

    def collect_stats(self, loss):
        """A dict of the statistics, beside the loss, of the validation or test that ends now."""
        raise NotImplementedError

    # Training

    def fit(self, *args, **kwargs):
        """SpeechBrain's, but with this class's own progress report."""
        if if_main_process():
            self._check_disk_space()
        super().fit(*args, progressbar=False, **kwargs)

    def evaluate(self, *args, **kwargs):
        """SpeechBrain's, but with this class's own progress report."""
        return super().evaluate(*args, progressbar=False, **kwargs)

    def make_dataloader(self, dataset, stage, *args, **kwargs):
        """SpeechBrain's; also notes the number of batches."""
        loader = super().make_dataloader(dataset, stage, *args, **kwargs)
        self.batches_in[stage] = len(loader)
        return loader

    def optimizers_step(self):
        """Update the weights, or count an update that is impossible and leave it out."""
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            self.skipped_updates += 1
            if not self.scaler.is_enabled():  # in fp16 the scaler skips, and lowers its scale
                self.zero_grad(set_to_none=True)
                return
        super().optimizers_step()

    def _should_save_intra_epoch_ckpt(self, *args):
        # Checkpoints do not hold the gradients that are accumulated between updates.
        updated = self.step % self.grad_accumulation_factor == 0
        return updated and super()._should_save_intra_epoch_ckpt(*args)

    def _wrap_distributed(self):
        if not (self.distributed_launch and self.device_type == "cpu"):
            super()._wrap_distributed()
            return
        # SpeechBrain would make every BatchNorm a SyncBatchNorm, which runs on GPUs only.
        if any(isinstance(module, _BatchNorm) for module in self.modules.modules()):
            logger.warning(
                "On CPUs BatchNorm is not synchronised: each process normalises with the "
                "statistics of its own batch, and those of the first process are kept."
            )
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    module, find_unused_parameters=self.find_unused_parameters
                )

    def _check_disk_space(self):
        folder = self.hparams.output_folder
        parameters = sum(p.numel() for p in self.modules.parameters())
        needed = parameters * CHECKPOINT_BYTES_PER_PARAMETER * CHECKPOINTS_AT_ONCE
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"output_folder {folder} has {free / 2**20:.0f} MiB free, "
                f"but checkpoints take up to {needed / 2**20:.0f} MiB"
            )

    # Stages

    def on_stage_start(self, stage, epoch=None):
        """Start the progress report."""
        if stage == sb.Stage.TRAIN:
            self.epoch = epoch
            self.epoch_start = time.monotonic() - self.epoch_seconds
        limit = self.hparams.epoch_counter.limit
        self.title = "test" if epoch is None else f"epoch {epoch}/{limit} {stage.name.lower()}"
        self.batches = self.batches_in[stage]
        if self.debug:
            self.batches = min(self.batches, self.debug_batches)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(  # a disabled one keeps nothing of this
            total=self.batches,
            initial=self.step,
            desc=self.title,
            unit="batch",
            dynamic_ncols=True,
            disable=self.noprogressbar or not terminal or not if_main_process(),
        )
        self.report_by_lines = not terminal and if_main_process()
        self.last_line = time.monotonic()

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Report the progress of the epoch and of the run."""
        self._report(f"loss {loss.item():.3g}, run ends in {self._time_left()}")

    def evaluate_batch(self, batch, stage):
        """SpeechBrain's, with a progress report."""
        loss = super().evaluate_batch(batch, stage)
        self._report("")
        return loss

    def _report(self, postfix):
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update()
        interval = 60 * self.hparams.log_interval_minutes
        if self.report_by_lines and time.monotonic() - self.last_line >= interval:
            self.last_line = time.monotonic()
            done = f"{self.title}: batch {self.step} of {self.batches}"
            logger.info(f"{done}, {postfix}" if postfix else done)

    def _time_left(self):
        """Time to the end of the run, as h:mm:ss."""
        elapsed = time.monotonic() - self.epoch_start
        training = elapsed / max(self.step, 1) * self.batches
        recent = [epoch["seconds"] for epoch in self.history[-EPOCHS_FOR_ETA:]]
        whole_epoch = statistics.fmean(recent) if recent else training
        epochs_left = self.hparams.epoch_counter.limit - self.epoch
        seconds = max(0, max(training, whole_epoch) - elapsed) + epochs_left * whole_epoch
        return tqdm.format_interval(seconds)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the stage; after validation anneal the learning rate and save a checkpoint."""
        self.bar.close()
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            before = sum(epoch["skipped updates"] for epoch in self.history)
            stats["skipped updates"] = self.skipped_updates - before
            self.train_stats = stats
            return
        stats |= self.collect_stats(stage_loss)
        if stage == sb.Stage.TEST:
            self.test_stats = stats
            return
        old_lr, new_lr = self.hparams.lr_annealing(stage_loss)
        sb.nnet.schedulers.update_learning_rate(self.optimizer, new_lr)
        meta = {
            "epoch": epoch,
            "lr": old_lr,
            "seconds": round(time.monotonic() - self.epoch_start),
        }
        self.epoch_seconds = 0.0
        self.history.append(
            meta
            | {"train loss": self.train_stats["loss"]}
            | {"skipped updates": self.train_stats["skipped updates"]}
            | {f"valid {name}": value for name, value in stats.items()}
        )
        self._log_epoch(meta, stats)
        self.checkpointer.save_and_keep_only(
            meta={self.best_by: stats[self.best_by], "epoch": epoch}, min_keys=[self.best_by]
        )

    @main_process_only
    def _log_epoch(self, meta, stats):
        logs = {"stats_meta": meta, "train_stats": self.train_stats, "valid_stats": stats}
        self.hparams.train_logger.log_stats(**logs)
        if self.hparams.use_tensorboard:
            # Its own step counters start at 0 in every process, also in one that resumes.
            done = meta["epoch"] - 1
            self.tensorboard.global_step = {
                "meta": done,
                "train": dict.fromkeys(self.train_stats, done),
                "valid": dict.fromkeys(stats, done),
            }
            self.tensorboard.log_stats(**logs)
        draw_progress(self.history, os.path.join(self.hparams.output_folder, "progress.png"))

    def test(self, split, dataset):
        """Evaluate the best checkpoint on one split.

        Writes a line in train_log.txt and returns {"loss": ...} and what `collect_stats` has.
        """
        self.evaluate(
            dataset,
            min_key=self.best_by,
            test_loader_kwargs=dict(self.hparams.test_dataloader_opts),
        )
        self.hparams.train_logger.log_stats(
            stats_meta={"split": split, "epoch loaded": self.hparams.epoch_counter.current},
            test_stats=self.test_stats,
        )
        return self.test_stats

    # Checkpoints

    @mark_as_saver
    def _save(self, path):
        super()._save(path)
        in_epoch = time.monotonic() - self.epoch_start if self.step else 0.0
        state = {
            "history": self.history,
            "skipped_updates": self.skipped_updates,
            "epoch_seconds": in_epoch,
        }
        with open(path, "a", encoding="utf-8") as file:
            yaml.safe_dump(state, file)

    @mark_as_loader
    def _recover(self, path, end_of_epoch):
        super()._recover(path, end_of_epoch)
        with open(path, encoding="utf-8") as file:
            state = yaml.safe_load(file)
        self.history = state["history"]
        self.skipped_updates = state["skipped_updates"]
        self.epoch_seconds = state["epoch_seconds"]


def make_brain(brain_class, hparams, run_opts, tokenizer):
    """Build the Brain from a YAML whose `vocab_size` is the tokenizer's."""
    return brain_class(
        tokenizer,
        modules=hparams["modules"],
        opt_class=partial(hparams["opt_class"], lr=hparams["lr"]),
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )


def draw_progress(history, path):
    """Draw losses, error rates, learning rate and seconds of every epoch.

    Arguments
    ---------
    history : list of dict
        One per epoch: "epoch", "lr", "seconds", "train loss", "valid loss" and, where there are
        any, "valid WER" and "valid CER" in %.
    path : str
        Of the PNG file; replaced as a whole.
    """
    epochs = [epoch["epoch"] for epoch in history]
    figure = Figure(figsize=(12, 7))
    figure.subplots_adjust(0.06, 0.08, 0.98, 0.95, wspace=0.15, hspace=0.35)
    for axes, (title, names) in zip(
        figure.subplots(2, 2).flat,
        (
            ("Loss", ("train loss", "valid loss")),
            ("Errors in validation, %", ("valid WER", "valid CER")),
            ("Learning rate", ("lr",)),
            ("Seconds per epoch", ("seconds",)),
        ),
        strict=True,
    ):
        for name in names:
            if name in history[0]:
                axes.plot(epochs, [epoch[name] for epoch in history], "o-", ms=3, label=name)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
    partial = f"{path}.partial"
    figure.savefig(partial, format="png", dpi=100)
    os.replace(partial, path)
