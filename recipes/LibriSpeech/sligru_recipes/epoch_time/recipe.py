"""What all variants of a comparison share: options, data and the epoch's batches."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import speechbrain
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.distributed import infer_device
from torch.utils.data import BatchSampler, SequentialSampler

from ..corpora import simulated
from ..lock import lock_folder
from ..training.ctc import CTC
from ..training.data import batching, dataio_prepare, prepare_data, prepare_noises
from ..training.experiment import load_hparams, parse_arguments
from ..training.seq2seq import Seq2Seq
from ..training.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """The comparison's own arguments, see `--help`."""

    batches: int | None = None
    passes: int = 1
    simulate: str | None = None
    io: bool = True
    cells: tuple = ("SLi-GRU", "Li-GRU")
    precisions: tuple = ()  # that of the YAML
    stock_jit: bool = False
    stock_compile: bool = False
    isolate: bool = False
    resume: bool = False
    commit: str | None = None


@dataclasses.dataclass
class Recipe:
    """What all variants share."""

    brain_class: type
    hparams: dict
    keys: frozenset  # of the YAML
    optimiser: type  # without its arguments
    hparams_file: str
    overrides: dict
    run_opts: speechbrain.utils.run_opts.RunOptions
    tokenizer: object  # None: simulated data
    data: object  # train set, in the order that `plan` indexes
    source: str
    io: str
    plan: list  # the epoch's batches: lists of indices into `data`
    loader_options: dict
    speeds: int  # that speed perturbation chooses from
    device: str

    @property
    def output_folder(self):
        """Of the report."""
        return Path(self.hparams["output_folder"])

    def padded_seconds(self, batch):
        """Seconds of a batch with its padding."""
        return len(batch) * self.longest(batch)

    def audio_seconds(self, batch):
        """Seconds of a batch without its padding."""
        return sum(self._durations(batch))

    def longest(self, batch):
        """Seconds of the longest utterance of a batch."""
        return max(self._durations(batch))

    def shape(self, batch):
        """Utterances, and frames of the longest: what PyTorch's libraries choose their kernels by.

        Before augmentation.
        """
        return len(batch), round(1000 * self.longest(batch)) // self.hparams["hop_length"]

    def count_shapes(self):
        """Of the epoch; with speed perturbation as many times that as there are speeds, at most."""
        shapes = len({self.shape(batch) for batch in self.plan})
        return min(len(self.plan), shapes * self.speeds)

    def _durations(self, batch):
        return [self.data.data[self.data.data_ids[index]]["duration"] for index in batch]


@contextlib.contextmanager
def load_recipe(arguments, options, hold=False):
    """Prepare the data and plan the epoch, once for all variants.

    Arguments
    ---------
    arguments : list of str
        Command line of the recipe.
    options : Options
    hold : bool
        Hold the output folder against other processes.

    Yields
    ------
    Recipe
        The files of simulated data are there until the context ends.
    """
    with contextlib.ExitStack() as stack:
        if options.simulate:
            arguments = [*arguments, f"--data_folder={options.simulate}"]
        hparams_file, run_opts, overrides, _ = parse_arguments(arguments)
        hparams = load_hparams(hparams_file, overrides)
        if hold:
            stack.enter_context(lock_folder(hparams["output_folder"]))
        Path(hparams["save_folder"]).mkdir(parents=True, exist_ok=True)
        brain_class = Seq2Seq if "seq_cost" in hparams else CTC
        targets = brain_class.targets
        if options.simulate:
            if hparams["shard_folder"]:
                raise ValueError("shard_folder and --simulate exclude each other")
            prepare_noises(hparams)
            folder = None
            if options.io:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="utterances-"))
            tokenizer = None
            train_data, io = simulated.make_dataset(options.simulate, hparams, targets, folder)
            source = f"{options.simulate}, simulated"
        else:
            prepare_data(hparams)
            tokenizer = load_tokenizer(hparams)
            overrides["vocab_size"] = tokenizer.sp.vocab_size()
            train_data, _, _ = dataio_prepare(hparams, tokenizer, targets)
            source, io = str(hparams["data_folder"]), "files; state of the page cache not known"
        train_data, loader_options = batching(hparams, train_data)
        sampler = loader_options.pop("batch_sampler", None)
        batch_size = loader_options.pop("batch_size", None)
        shuffle = loader_options.pop("shuffle", False)
        if sampler is None:
            order = ReproducibleRandomSampler if shuffle else SequentialSampler
            sampler = BatchSampler(order(train_data), batch_size, drop_last=False)
        yield Recipe(
            brain_class=brain_class,
            # Without the model that comes with them.
            hparams={name: value for name, value in hparams.items() if _is_plain(value)},
            keys=frozenset(hparams),
            optimiser=getattr(hparams["opt_class"], "func", hparams["opt_class"]),
            hparams_file=hparams_file,
            overrides=overrides,
            run_opts=run_opts,
            tokenizer=tokenizer,
            data=train_data,
            source=source,
            io=io,
            plan=[list(batch) for batch in sampler],
            loader_options=loader_options,
            speeds=len(hparams["speed_perturb"].speeds) if hparams["enable_speed_perturb"] else 1,
            device=run_opts.device or infer_device(),
        )


def _is_plain(value):
    return value is None or isinstance(value, bool | int | float | str)


def choose_batches(recipe, options):
    """The epoch's batches that are timed.

    Raises
    ------
    ValueError
        If `batches` is impossible.
    """
    if options.batches is None:
        return recipe.plan
    if not 2 <= options.batches <= len(recipe.plan):
        raise ValueError(
            f"batches must be 2 to {len(recipe.plan)} (an epoch), got {options.batches}"
        )
    return spread(recipe, recipe.plan, options.batches)


def spread(recipe, batches, count):
    """`count` of some batches, evenly spaced from short to long, in the order of `batches`."""
    ranked = sorted(range(len(batches)), key=lambda index: recipe.padded_seconds(batches[index]))
    chosen = {ranked[int((rank + 0.5) * len(batches) / count)] for rank in range(count)}
    return [batches[index] for index in sorted(chosen)]


def longest_batch(recipe):
    """Of the epoch, padding included."""
    return max(recipe.plan, key=recipe.padded_seconds)
