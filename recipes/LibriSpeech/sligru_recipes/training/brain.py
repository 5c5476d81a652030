"""What the recipes add to SpeechBrain's Brain: counted skips, progress, pictures, DDP on a CPU."""

import hashlib
import itertools
import os
import shutil
import statistics
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
from speechbrain.utils.distributed import (
    ddp_broadcast,
    if_main_process,
    is_distributed_initialized,
    main_process_only,
)
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from sb_fast_sligru import SyncBatchNorm

from ..files import replacing
from ..progress import Progress
from .checkpoints import (
    LOAD_ERRORS,
    average_model,
    checkpoints_to_test,
    reason_of,
    recency_of_finished,
)
from .loading import loader_options
from .resume import changed_keys

logger = get_logger(__name__)

# Parameters, and the optimiser's two values for each (Adadelta, Adam).
CHECKPOINT_BYTES_PER_PARAMETER = 3 * 4
# How many epochs are averaged to tell when the run ends: the first may be slower.
EPOCHS_FOR_ETA = 3
UPDATES_BETWEEN_ASKING = 20  # the first of several processes whether it is time for a checkpoint


@register_checkpoint_hooks
class RecipeBrain(sb.Brain):
    """Brain of the recipes; subclasses compute the loss and collect errors.

    lr_annealing follows the validation loss; the best checkpoint is the one of lowest `best_by`,
    a class attribute that names a validation statistic. It is tested, or by the key
    `avg_checkpoints` the mean of the last ones. Takes the tokenizer and what Brain does.

    A run resumes with the next batch of the epoch that it was stopped in, if the batches before it
    are those that it trained on; else the epoch starts anew.

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
        self.nonfinite_count = 0  # in this epoch
        self.nonfinite_evaluated = 0  # batches of this validation or test
        self.epoch = 0
        self.epoch_start = time.monotonic()
        self.epoch_seconds = 0.0  # spent in the current epoch before a stop
        self.batches_in = {}  # stage -> number of batches
        self.batches = 0  # in this stage
        self.progress = None  # of a stage
        self.train_loader = None
        self.batches_before = None  # digest of those that a checkpoint within an epoch had seen
        if self.hparams.use_tensorboard:
            self.tensorboard = self.hparams.tensorboard_logger()

    def collect_stats(self, loss):
        """A dict of the statistics, beside the loss, of the validation or test that ends now."""
        raise NotImplementedError

    # Training

    def fit(self, *args, when_ready=None, **kwargs):
        """SpeechBrain's, but with this class's own progress report.

        `when_ready` is called before the first batch, when the checkpoint has been loaded.
        """
        self.when_ready = when_ready
        if self.test_only:
            self._ready()
        elif if_main_process():
            self._check_disk_space()
        super().fit(*args, progressbar=False, **kwargs)

    def _ready(self):
        if self.when_ready is not None:
            self.when_ready()

    def evaluate(self, *args, **kwargs):
        """SpeechBrain's, but with this class's own progress report."""
        return super().evaluate(*args, progressbar=False, **kwargs)

    def make_dataloader(self, dataset, stage, *args, **kwargs):
        """SpeechBrain's; also notes the number of batches."""
        kwargs = loader_options(kwargs, self.device)
        loader = super().make_dataloader(dataset, stage, *args, **kwargs)
        self.batches_in[stage] = len(loader)
        if stage == sb.Stage.TRAIN:
            self.train_loader = loader
        return loader

    def init_optimizers(self):
        """SpeechBrain's; also notes the options, for which a checkpoint has its own."""
        super().init_optimizers()
        self.optimizer_options = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]

    def on_fit_start(self):
        """SpeechBrain's; tells what the run goes on with."""
        if self.checkpointer is None:  # nothing to go on with, nothing to keep
            super().on_fit_start()
            return
        checkpoint = self.checkpointer.find_checkpoint()
        if checkpoint is None and self.hparams.pretrained_folder:
            self._load_initial_weights()
        super().on_fit_start()
        if checkpoint is not None:
            self._go_on(checkpoint)
        self._ready()

    def _go_on(self, checkpoint):
        changed = changed_keys(checkpoint.meta.get("settings", {}), self.checkpointer.settings)
        for group, options in zip(self.optimizer.param_groups, self.optimizer_options, strict=True):
            group.update(options)
        if "lr" in changed:
            lr, scheduler = self.hparams.lr, self.hparams.lr_annealing
            logger.info(f"lr is {lr} from here on; it was {scheduler.hyperparam_value:.3g}")
            scheduler.hyperparam_value = lr
            sb.nnet.schedulers.update_learning_rate(self.optimizer, lr)
        counter = self.hparams.epoch_counter
        if counter.current >= counter.limit:
            logger.info(
                f"all {counter.limit} epochs are done, nothing is left to train: "
                "a larger number_of_epochs goes on"
            )
        elif self.step and not ddp_broadcast(self._trained_on_the_same(counter.current + 1)):
            logger.warning(
                f"epoch {counter.current + 1} starts anew: its first {self.step} batches, which "
                f"the run had trained on, are others now (changed: {self._listed(changed)})"
            )
            self.step, self.avg_train_loss, self.epoch_seconds = 0, 0.0, 0.0
            # How SpeechBrain's loader notes where to go on.
            self.train_loader._speechbrain_recovery_skip_to = None

    def _listed(self, changed):
        # Without what is made of other keys.
        plain = (key for key in changed if not self.checkpointer.settings[key].startswith("{"))
        return ", ".join(sorted(plain)) or "no key, but the data or the number of processes"

    def _trained_on_the_same(self, epoch):
        if hasattr(self.train_sampler, "set_epoch"):
            self.train_sampler.set_epoch(epoch)
        return self.batches_before == self._digest_of_batches()

    def _digest_of_batches(self):
        """Of the IDs of this epoch's utterances so far, batch by batch, in the first process."""
        if self.step == 0:
            return None
        loader = self.train_loader
        ids = getattr(loader.dataset, "data_ids", range(len(loader.dataset)))
        processes = int(os.environ.get("WORLD_SIZE", 1))
        digest = hashlib.sha256(f"{processes} processes".encode())
        for batch in itertools.islice(loader.batch_sampler, self.step):
            digest.update(str([str(ids[index]) for index in batch]).encode())
        return digest.hexdigest()

    def _load_initial_weights(self):
        folder, pretrainer = self.hparams.pretrained_folder, self.hparams.initial_weights
        pretrainer.collect_files(default_source=folder)
        try:
            pretrainer.load_collected()
        except LOAD_ERRORS as error:
            raise ValueError(
                f"pretrained_folder {folder} is of another model, or damaged: {reason_of(error)}"
            ) from error

    def check_loss_isfinite(self, loss):
        """Bear a loss that is not finite `nonfinite_patience` times an epoch.

        Raises
        ------
        ValueError
            At the next one.
        """
        if torch.isfinite(loss):
            return
        self.nonfinite_count += 1
        where = f"epoch {self.epoch}, batch {self.step}"
        if self.nonfinite_count > self.nonfinite_patience:
            lr = self.optimizer.param_groups[0]["lr"]
            raise ValueError(
                f"training diverged: in {where} the loss is {loss.item()}, and so it was more than "
                f"{self.nonfinite_patience} times (nonfinite_patience) in this epoch; "
                f"a lower lr than {lr:g} or a lower max_grad_norm may help"
            )
        logger.warning(f"{where}: the loss is {loss.item()}; its update is left out")

    def fit_batch(self, batch):
        """SpeechBrain's, but the host waits for the GPU once only, see `finish_batch`.

        Returns
        -------
        torch.Tensor
            The loss, on the host.
        """
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        loss = self.finish_batch(loss.detach(), should_step)
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return loss

    def finish_batch(self, loss, should_step):
        """Look at the loss and update the weights, or leave an impossible update out and count it.

        Loss and norms of the gradients are read together, as all but the update is queued: that is
        the one time in a step that the host waits for the GPU.

        Arguments
        ---------
        loss : torch.Tensor
            0-dimensional, on any device.
        should_step : bool
            Whether the gradients that are accumulated are complete.

        Returns
        -------
        torch.Tensor
            The loss, on the host.
        """
        groups, norms = [], []
        if should_step:
            self.scaler.unscale_(self.optimizer)
            groups = [group["params"] for group in self.optimizer.param_groups]
            norms = [torch.nn.utils.get_total_norm(_gradients(group)) for group in groups]
        read = torch.stack([loss, *norms]).cpu()
        self.check_loss_isfinite(read[0])
        if should_step:
            finite = read[1:].isfinite().all()
            self.skipped_updates += not finite
            if finite or self.scaler.is_enabled():  # in fp16 the scaler skips, and lowers its scale
                # SpeechBrain clips the first group. PyTorch multiplies all of it, be it by 1.
                if self.max_grad_norm / (read[1] + 1e-6) < 1:
                    torch.nn.utils.clip_grads_with_norm_(groups[0], self.max_grad_norm, norms[0])
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer_step += 1
            self.zero_grad(set_to_none=True)
        return read[0]

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        # Checkpoints do not hold the gradients that are accumulated between updates.
        updates, rest = divmod(self.step, self.grad_accumulation_factor)
        if rest or self.checkpointer is None:
            return False
        # All processes count the same steps, but the clock is the first one's: to ask for that
        # makes all of them wait.
        if self.ckpt_interval_steps > 0:
            return steps_since_ckpt >= self.ckpt_interval_steps
        if is_distributed_initialized() and updates % UPDATES_BETWEEN_ASKING:
            return False
        return super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)

    def _wrap_distributed(self):
        if self.distributed_launch:
            SyncBatchNorm.take_over(self.modules)  # SpeechBrain would take PyTorch's
        super()._wrap_distributed()

    def _check_disk_space(self):
        folder = self.hparams.output_folder
        parameters = sum(p.numel() for p in self.modules.parameters())
        # Those that are kept as the best and as the last, one within an epoch, and the one that is
        # being written.
        checkpoints = 2 * self.hparams.avg_checkpoints + 2
        needed = parameters * CHECKPOINT_BYTES_PER_PARAMETER * checkpoints
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
        title = "test" if epoch is None else f"epoch {epoch}/{limit} {stage.name.lower()}"
        self.batches = self.batches_in[stage]
        if self.debug:
            self.batches = min(self.batches, self.debug_batches)
        self.nonfinite_evaluated = 0
        self.progress = Progress(
            title,
            self.batches,
            "batch",
            self.hparams.log_interval_minutes,
            logger.info,
            initial=self.step,
            bar=not self.noprogressbar,
            quiet=not if_main_process(),
        )

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Report the progress of the epoch and of the run."""
        self._report(f"loss {loss:.3g}, run ends in {self._time_left()}")

    def evaluate_batch(self, batch, stage):
        """SpeechBrain's, with a progress report; a loss that is not finite is told."""
        loss = super().evaluate_batch(batch, stage)
        if not torch.isfinite(loss):  # SpeechBrain leaves it out of the mean
            self.nonfinite_evaluated += 1
            logger.warning(
                f"{stage.name.lower()} batch {self.step}: the loss is {loss.item()}; "
                "it is left out of the mean"
            )
        self._report("")
        return loss

    def _report(self, postfix):
        if self.progress is not None:  # None: fit_batch alone is called
            self.progress.update(postfix=postfix)

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
        self.progress.close()
        stats = {"loss": stage_loss}
        if stage == sb.Stage.TRAIN:
            before = sum(epoch["skipped updates"] for epoch in self.history)
            stats["skipped updates"] = self.skipped_updates - before
            self.train_stats = stats
            return
        if stage == sb.Stage.VALID and self.nonfinite_evaluated == self.batches:
            # Neither the best checkpoint nor the learning rate can follow it.
            raise ValueError(
                f"training diverged: no validation loss of epoch {epoch} is finite; "
                "the checkpoint before it is kept"
            )
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
            meta={self.best_by: stats[self.best_by], "epoch": epoch},
            num_to_keep=self.hparams.avg_checkpoints,
            keep_recent=False,
            importance_keys=[recency_of_finished],
            min_keys=[self.best_by],
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
        """Evaluate the best checkpoint, or the mean of the last ones, on one split.

        Writes a line in train_log.txt and returns {"loss": ...} and what `collect_stats` has.
        """
        self.evaluate(
            dataset,
            min_key=self.best_by,
            test_loader_kwargs=dict(self.hparams.test_dataloader_opts),
        )
        meta = {"split": split, "epoch loaded": self.hparams.epoch_counter.current}
        if len(self.epochs_tested) > 1:
            meta["epochs averaged"] = " ".join(map(str, self.epochs_tested))
        self.hparams.train_logger.log_stats(stats_meta=meta, test_stats=self.test_stats)
        return self.test_stats

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Load what is tested; arguments are SpeechBrain's."""
        count = self.hparams.avg_checkpoints
        if self.checkpointer is None:
            return
        checkpoints = checkpoints_to_test(self.checkpointer, min_key, count)
        self.checkpointer.load_checkpoint(checkpoints[0])
        if count > 1:
            self.hparams.model.load_state_dict(average_model(checkpoints))
        self.epochs_tested = sorted(checkpoint.meta["epoch"] for checkpoint in checkpoints)

    # Checkpoints

    @mark_as_saver
    def _save(self, path):
        super()._save(path)
        in_epoch = time.monotonic() - self.epoch_start if self.step else 0.0
        state = {
            "history": self.history,
            "skipped_updates": self.skipped_updates,
            "epoch_seconds": in_epoch,
            "batches_before": self._digest_of_batches(),
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
        self.batches_before = state.get("batches_before")


def _gradients(parameters):
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


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
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
