"""Training a recipe's variants side by side, and timing it: the runs of compare_epoch_time.py."""

import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import math
import multiprocessing
import os
import pydoc
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ruamel.yaml
import torch
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.utils.seed import seed_everything
from tqdm import tqdm

from sb_fast_sligru.machine import tf32

from ..processes import end_with_parent
from ..training import brain as recipe_brain
from ..training.augmentation import Augmenter
from ..training.experiment import load_hparams
from ..training.loading import loader_options
from .phases import PhaseClock, watch
from .recipe import choose_batches, load_recipe, longest_batch, spread

# As SpeechBrain's --jit and --compile do it, but of the RNN alone.
COMPILERS = {"stock, jit": torch.jit.script, "stock, compile": torch.compile}
# At full learning rate (AdamW 0.002, Adadelta 1.0) 20 steps are chaotic: stock itself, its weights
# moved by 1e-7 relative, then departs from stock by more than the bound. So the report tells of
# stock's own departure too (benchmarks/NOTEBOOK.md has that of the default model on a GPU).
AGREEMENT_LR = 0.01
WEIGHT_MOVE = 1e-7  # relative: about what rounding does
OTHER_SEED = "stock, other seed"  # an implementation
WARM_UP_STEPS = 2
BREAKDOWN_STEPS = 4
NEW_SHAPES = 4  # batches that a variant meets for the first time, timed
LOADED_BATCHES = 4  # how many are loaded to time that alone
BLOCKS_PER_PASS = 4


@dataclasses.dataclass(frozen=True)
class Variant:
    """A recipe with certain classes, in one precision."""

    cell: str
    precision: str
    implementation: str  # of ours; stock, with another seed, jit or compile; or torch
    classes: dict  # key of the YAML -> class
    seed: int

    @property
    def for_spread(self):
        """Whether it is there to tell how far the losses of two seeds differ."""
        return self.implementation == OTHER_SEED

    @property
    def name(self):
        """For messages."""
        return f"{self.cell} {self.precision} {self.implementation}"


@dataclasses.dataclass
class Run:
    """One variant's training: its model and what was measured."""

    variant: Variant
    brain: object = None
    loader: object = None  # iterator over all its batches
    seconds: list = dataclasses.field(default_factory=list)
    losses: list = dataclasses.field(default_factory=list)
    waits: list = dataclasses.field(default_factory=list)  # seconds for the batch, one a step
    batches: list = dataclasses.field(default_factory=list)  # (utterance IDs, sum of samples)
    backends: dict = dataclasses.field(default_factory=dict)  # module -> backend, if it tells
    warm_up: list = dataclasses.field(default_factory=list)  # seconds
    peak_memory: int | None = None  # bytes
    joules: float | None = None  # of the timed steps
    new_shape: float | None = None  # seconds that a step takes longer at a new shape
    breakdown: dict = dataclasses.field(default_factory=dict)  # phase -> ms a step
    overhead: float | None = None  # of measuring the breakdown, relative


def make_brain(recipe, variant, for_agreement=False):
    """A Brain ready for `fit_batch`, from the recipe's YAML.

    Arguments
    ---------
    recipe : Recipe
    variant : Variant
    for_agreement : bool
        No dropout, no augmentation, and AGREEMENT_LR of the learning rate.
    """
    yaml = ruamel.yaml.YAML()
    classes = {key: yaml.load(f"!name:{name}") for key, name in variant.classes.items()}
    classes.pop("opt_class", None)  # has arguments, which are lost if it is replaced in the YAML
    overrides = {**copy.deepcopy(recipe.overrides), **classes}
    if for_agreement:
        overrides["dropout"] = 0.0
    run_opts = dataclasses.replace(
        recipe.run_opts,
        precision="fp32" if variant.precision == "tf32" else variant.precision,
        overridden_args=recipe.run_opts.overridden_args | {"precision"},
    )
    hparams = load_hparams(recipe.hparams_file, overrides)
    if "opt_class" in variant.classes:
        arguments = getattr(hparams["opt_class"], "keywords", {})
        opt_class = pydoc.locate(variant.classes["opt_class"])
        hparams["opt_class"] = functools.partial(opt_class, **arguments)
    if for_agreement:
        hparams["wav_augment"] = Augmenter(augmentations=[])
    brain = recipe_brain.make_brain(recipe.brain_class, hparams, run_opts, recipe.tokenizer)
    brain.checkpointer = None  # start from the seed's weights, not from the last checkpoint
    brain.on_fit_start()
    if for_agreement:
        for group in brain.optimizer.param_groups:
            group["lr"] *= AGREEMENT_LR
    brain.modules.train()
    brain.hparams.epoch_counter.current = 1
    return brain


def start_run(recipe, variant, batches, weights=None, for_agreement=False):
    """A Run that has trained on nothing yet; `weights` is the state_dict to begin with."""
    brain = make_brain(recipe, variant, for_agreement)
    if weights is not None:
        brain.modules.load_state_dict(weights)
    if variant.implementation in COMPILERS:
        compiled = COMPILERS[variant.implementation](brain.modules.enc["RNN"])
        # A scripted module takes no hooks, a container around it does.
        brain.modules.enc["RNN"] = torch.nn.Sequential(compiled)
    loader = make_loader(recipe, batches)
    backends = {
        name: module.choose_backend(brain.device)[0]
        for name, module in brain.modules.items()
        if hasattr(module, "choose_backend")
    }
    return Run(variant, brain, iter(loader), backends=backends)


def make_loader(recipe, batches, **changed):
    """A loader of some batches, with the recipe's options but for those that are given."""
    options = loader_options({**recipe.loader_options, **changed}, recipe.device)
    return make_dataloader(recipe.data, batch_sampler=batches, **options)


def initial_weights(run):
    """A copy of the weights, for the other variants."""
    return {name: value.clone() for name, value in run.brain.modules.state_dict().items()}


def moved(weights):
    """`weights`, each moved by about WEIGHT_MOVE."""
    generator = torch.Generator().manual_seed(0)

    def move(tensor):
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        return tensor + tensor * (WEIGHT_MOVE * noise) if tensor.is_floating_point() else tensor

    return {name: move(tensor) for name, tensor in weights.items()}


@contextlib.contextmanager
def quiet():
    """Keep the YAML's warnings, shown once, from coming again with every variant."""
    loggers = [
        logging.getLogger(name)
        for name in logging.root.manager.loggerDict
        if name.partition(".")[0] in ("speechbrain", __name__.partition(".")[0])
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def train(run, count, progress, clock=None):
    """Train one variant on its next `count` batches, and note what it saw.

    Returns
    -------
    seconds, losses, waits : list of float
        One a step; the seconds of a wait for the batch are part of the step's.
    """
    brain, seconds, losses, waits, seen = run.brain, [], [], [], []
    _finish(brain)
    for _ in range(count):
        start = _now()
        if clock:
            clock.mark("data wait")
        batch = next(run.loader)
        waits.append(_now() - start)
        seed_everything(run.variant.seed + brain.step, verbose=False)
        brain.step += 1
        losses.append(brain.fit_batch(batch).item())  # the GPU may have the update still to do
        # Every 97th sample: the sum of all takes longer than some of the steps do.
        seen.append((tuple(batch.id), batch.sig.data[:, ::97].double().sum()))
        if len(seen) == count:
            _finish(brain)
        if clock:
            clock.mark(None)
        seconds.append(_now() - start)
        progress.update()
    run.batches += [(ids, total.item()) for ids, total in seen]
    return seconds, losses, waits


def _finish(brain):
    """Wait until the GPU, if it is one, has done all that it was given."""
    if "cuda" in brain.device:
        torch.cuda.synchronize(brain.device)


_now = time.perf_counter


def in_own_process(function, *arguments):
    """Call a function of this module in a fresh process."""
    method = multiprocessing.get_start_method()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:
        return pool.submit(_with_start_method, method, function, *arguments).result()


def _with_start_method(method, function, *arguments):
    # Else a spawned process spawns those of its loaders too, which the recipe's cannot be.
    multiprocessing.set_start_method(method, force=True)
    return function(*arguments)


def peak_resident_memory(arguments, options, variant):
    """Bytes at the peak of training on the longest batch on a CPU; for a fresh process.

    Arguments
    ---------
    arguments : list of str
        Command line of the recipe, whose data is prepared.
    options : Options
    variant : Variant

    Returns
    -------
    int or None
        None under another system than Linux.
    """
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    with quiet(), load_recipe(arguments, options) as recipe:
        gc.collect()  # the model that came with the settings
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of importing
        before = _peak_resident_bytes()
        batches = [longest_batch(recipe)] * WARM_UP_STEPS
        train(start_run(recipe, variant, batches), len(batches), tqdm(disable=True))
    return _peak_resident_bytes() - before


def _peak_resident_bytes():
    with open("/proc/self/status") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes)


def energy_counter(device):
    """A function that returns the joules that the GPU has used so far; None without NVML."""
    if "cuda" not in device:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


# ---- timing


def plan_of_run(recipe, options, variant, chosen, turn=0, turns=1):
    """All batches of a variant: to warm up, to be timed, for the breakdown, and of new shapes."""
    warm_up = [longest_batch(recipe)] * WARM_UP_STEPS
    if options.batches is not None:
        warm_up += chosen
    marked = [] if variant.for_spread else spread(recipe, chosen, BREAKDOWN_STEPS)
    new = new_shapes(recipe, options, variant, chosen, turn, turns)
    return warm_up + chosen * options.passes + marked + 2 * new


def new_shapes(recipe, options, variant, chosen, turn, turns):
    """Batches of shapes that no variant has met before: for each in turn other ones.

    They are nearly those of timed batches. Lengths that lie apart would have more that is new to
    the libraries, such as a multiple of 32 frames, than an epoch's have for the most part.
    """
    if options.batches is None or variant.for_spread:
        return []
    new = {recipe.shape(batch): batch for batch in recipe.plan}
    for batch in [longest_batch(recipe), *chosen]:
        new.pop(recipe.shape(batch), None)
    found = []
    for batch in spread(recipe, chosen, NEW_SHAPES):
        utterances, frames = recipe.shape(batch)
        near = sorted(new, key=lambda s: (abs(s[0] - utterances), abs(s[1] - frames)))[:turns]
        taken = [new.pop(shape) for shape in near]
        found += taken[turn : turn + 1]
    return found


def warm_up(recipe, options, variant, batches, chosen, progress, weights=None):
    """Start a Run and train on the longest batch, which has the peak memory on a GPU.

    Then, where the epoch is sampled, once on all that will be timed: most batches of an epoch have
    the shape of others before them.

    Returns
    -------
    run : Run
    weights : dict
        The state_dict that it began with.
    """
    on_gpu = "cuda" in recipe.device
    before = torch.cuda.memory_allocated(recipe.device) if on_gpu else 0
    run = start_run(recipe, variant, batches, weights)
    weights = weights or initial_weights(run)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(recipe.device)
    run.warm_up, *_ = train(run, WARM_UP_STEPS, progress)
    if on_gpu:
        run.peak_memory = torch.cuda.max_memory_allocated(recipe.device) - before
    if options.batches is not None:
        train(run, len(chosen), progress)
    return run, weights


def take_turns(runs, count, passes, progress):
    """Time the runs on `count` batches, `passes` times: block by block, each in its turn."""
    joules = energy_counter(runs[0].brain.device)
    size = math.ceil(count / BLOCKS_PER_PASS)
    blocks = [min(size, count - start) for start in range(0, count, size)] * passes
    for index, block in enumerate(blocks):
        turn = index % len(runs)
        for run in runs[turn:] + runs[:turn]:
            before = joules() if joules else None
            seconds, losses, waits = train(run, block, progress)
            run.seconds += seconds
            run.losses += losses
            run.waits += waits
            if joules:
                run.joules = (run.joules or 0) + joules() - before


def break_down(run, recipe, chosen, progress):
    """Take the last steps with marks between the phases, if the run has any."""
    if run.variant.for_spread:
        return
    batches = spread(recipe, chosen, BREAKDOWN_STEPS)
    clock, compared = PhaseClock(run.brain.device), len(run.batches)
    with watch(run.brain, clock):
        seconds, *_ = train(run, len(batches), progress, clock)
    del run.batches[compared:]
    run.breakdown = {phase: ms / len(batches) for phase, ms in clock.milliseconds().items()}
    unmarked = sum(
        statistics.fmean(run.seconds[chosen.index(batch) :: len(chosen)]) for batch in batches
    )
    run.overhead = sum(seconds) / unmarked - 1


def meet_new_shapes(run, count, progress):
    """Time `count` batches of new shapes and then the same again."""
    if not count:
        return
    compared = len(run.batches)
    (first, *_), (again, *_) = (train(run, count, progress) for _ in range(2))
    del run.batches[compared:]
    run.new_shape = max(0.0, (sum(first) - sum(again)) / count)


def time_variants(recipe, options, variants, chosen, progress):
    """Time the variants of one RNN and precision in turn; returns the finished Runs."""
    runs, weights = [], None
    with tf32(variants[0].precision == "tf32"):
        for turn, variant in enumerate(variants):
            batches = plan_of_run(recipe, options, variant, chosen, turn, len(variants))
            run, weights = warm_up(recipe, options, variant, batches, chosen, progress, weights)
            runs.append(run)
        take_turns(runs, len(chosen), options.passes, progress)
        for turn, run in enumerate(runs):
            break_down(run, recipe, chosen, progress)
            new = new_shapes(recipe, options, run.variant, chosen, turn, len(runs))
            meet_new_shapes(run, len(new), progress)
    for run in runs:
        run.brain = run.loader = None
    return runs


def time_alone(arguments, options, variant, first):
    """What `time_variants` does, for one variant in a fresh process.

    `first` is the variant whose initial weights all get.
    """
    tf32_on = variant.precision == "tf32"
    with quiet(), load_recipe(arguments, options) as recipe, tf32(tf32_on):
        chosen = choose_batches(recipe, options)
        batches = plan_of_run(recipe, options, variant, chosen)
        progress = tqdm(disable=True)
        weights = initial_weights(start_run(recipe, first, batches))
        run, _ = warm_up(recipe, options, variant, batches, chosen, progress, weights)
        take_turns([run], len(chosen), options.passes, progress)
        break_down(run, recipe, chosen, progress)
        new = new_shapes(recipe, options, variant, chosen, turn=0, turns=1)
        meet_new_shapes(run, len(new), progress)
    run.brain = run.loader = None
    return run


def loading_seconds(recipe, chosen):
    """Seconds in which one process loads a batch, on average."""
    batches = spread(recipe, chosen, LOADED_BATCHES)
    start = _now()
    for _ in make_loader(recipe, batches, num_workers=0):
        pass
    return (_now() - start) / len(batches)
