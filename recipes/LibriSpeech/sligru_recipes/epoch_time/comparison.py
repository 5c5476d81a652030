"""The comparison of compare_epoch_time.py: what is compared with what, and when it refuses to.

A recipe has parts that are SpeechBrain's or ours, by keys of its YAML: the RNN and those of PARTS.
"stock" has SpeechBrain's of all; "ours: RNN only" our RNN; then comes a variant for each further
part, which has it and all before it, so that the gain of each can be read off; the CTC loss and
Adadelta come with the CNN. PyTorch's RNNs stand in stock. Everything else is the same for all
variants of a precision: initial weights (one state_dict copied into all), batches, their order, the
seed of every step, so also augmentation and the dropout outside these parts. The variants of an RNN
and a precision take turns on blocks of batches, each block beginning with another one (`--isolate`:
one after the other, each in a process of its own). A step is timed from the request for its batch
to the end of `fit_batch`, where the GPU may have its update still to do; the last step of a block
waits for that. The first steps, on the longest batch, are reported apart.
Where the loader has processes of its own, they start before and may be some batches ahead when a
variant's turn comes; the report's loader_utilisation tells if they could keep it up, loader_wait
how long a step waited for its batch.

`--batches=N` takes N of the epoch's own batches, evenly spaced from the shortest to the longest,
and estimates the epoch from them; `--full` takes all. At a batch whose number of utterances and
length PyTorch has not met before, its libraries choose their kernels, which takes long. Most of an
epoch's batches share theirs with others, so a sample is timed at its second time and later, and the
estimate has the epoch's shapes times what a step takes longer at a new one; that is measured last,
with new batches for each variant, since all of a process share what was chosen.

No ratio is printed, and the exit status is 1, unless

- every variant saw the same batches, utterance by utterance;
- without dropout and augmentation, in fp32 without TF32, the first 20 losses, on the shorter half
  of the batches, of the variant with every part ours agree with stock's within 1e-3 relative (at
  0.01 of the learning rate, see AGREEMENT_LR in runs.py; the report tells how far stock departs
  from itself when its weights are moved by 1e-7);
- in the timed run the losses of each variant of ours differ from stock's on average no more than
  those of a second stock run with another seed do, but for chance (SEED_CHANCE).

After the timing, a few more steps are taken with hooks that mark the phases (phases.py). The
peak memory is that of training on the longest batch: on a GPU what PyTorch's allocator handed out
at most, on a CPU how far the peak resident memory of a process of its own grew (Linux only).

The report (report.py tells what is in it) is written anew after every RNN and precision, so
one that was interrupted is valid; `--resume` continues it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import statistics
import sys

import scipy.stats
import torch
from speechbrain.utils.autocast import AMPConfig

import sb_fast_sligru
from sb_fast_sligru import machine

from ..progress import Progress
from ..training.experiment import check_precision
from ..training.loading import loader_options
from . import report as epoch_report
from . import runs as epoch_runs
from .checks import Refused, check_agreement, check_same_batches, check_seed_spread
from .recipe import choose_batches, load_recipe
from .runs import OTHER_SEED, Variant
from .texts import is_ours

CELLS = {
    "SLi-GRU": {"ours": "sb_fast_sligru.SLiGRU", "stock": "speechbrain.nnet.RNN.SLiGRU"},
    "Li-GRU": {"ours": "sb_fast_sligru.LiGRU", "stock": "speechbrain.nnet.RNN.LiGRU"},
    # PyTorch's, so cuDNN's on a GPU: another model, for the time alone.
    "LSTM": {"torch": "speechbrain.nnet.RNN.LSTM"},
    "GRU": {"torch": "speechbrain.nnet.RNN.GRU"},
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What can be ours beside the RNN: a class or a function."""

    variant: str  # that has it, and all parts before it
    ours: str
    stock: str


# Key of the YAML -> part, in the order of being switched on; a YAML may have some of them.
PARTS = {
    "decoder_class": Part(
        "ours: RNN + decoder",
        "sb_fast_sligru.AttentionalRNNDecoder",
        "speechbrain.nnet.RNN.AttentionalRNNDecoder",
    ),
    "crdnn_class": Part(
        "ours: all", "sb_fast_sligru.CRDNN", "speechbrain.lobes.models.CRDNN.CRDNN"
    ),
    "ctc_cost": Part("ours: all", "sb_fast_sligru.ctc_loss", "speechbrain.nnet.losses.ctc_loss"),
    "opt_class": Part("ours: all", "sb_fast_sligru.Adadelta", "torch.optim.Adadelta"),
}
RNN_ONLY = "ours: RNN only"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AGREEMENT_STEPS = 20
SEED_DISTANCE = 10**6  # of the other seed from the recipe's


def epoch_seconds(seconds, passes, padded, padded_in_epoch):
    """Seconds of a whole epoch from those of the steps.

    Arguments
    ---------
    seconds : list of float
        Of every step, pass after pass.
    passes : int
    padded : list of float
        Padded seconds of audio of the batches taken.
    padded_in_epoch : list of float
        The same of all batches of the epoch.

    Returns
    -------
    estimate : float
        Of a sample: its seconds a padded second, times the epoch's padded seconds.
    interval : tuple of float
        All batches were taken: the fastest and the slowest pass. A sample: the 95 % confidence
        interval of the ratio estimator under sampling without replacement.
    """
    count, total = len(padded), len(padded_in_epoch)
    passes_seconds = [sum(seconds[i * count : (i + 1) * count]) for i in range(passes)]
    if count == total:
        return statistics.fmean(passes_seconds), (min(passes_seconds), max(passes_seconds))
    per_batch = [statistics.fmean(seconds[i::count]) for i in range(count)]
    rate = sum(per_batch) / sum(padded)
    estimate = rate * sum(padded_in_epoch)
    residuals = [t - rate * p for t, p in zip(per_batch, padded, strict=True)]
    deviation = math.sqrt(sum(r * r for r in residuals) / (count - 1))
    quantile = scipy.stats.t.ppf(0.975, count - 1).item()
    half = quantile * total * deviation * math.sqrt((1 - count / total) / count)
    return estimate, (estimate - half, estimate + half)


def parts_of(recipe):
    """Those of PARTS that a recipe has."""
    parts = {key: part for key, part in PARTS.items() if key in recipe.keys}
    if recipe.optimiser not in (sb_fast_sligru.Adadelta, torch.optim.Adadelta):
        del parts["opt_class"]  # all variants have that of the YAML
    return parts


def implementations(recipe, options, cell):
    """Name -> classes, by their keys in the YAML, of an RNN's variants, in the order of turns."""
    parts = parts_of(recipe)
    stock_parts = {key: part.stock for key, part in parts.items()}
    rnns = CELLS[cell]
    if "torch" in rnns:
        return {"torch": {"rnn_class": rnns["torch"], **stock_parts}}
    stock = {"rnn_class": rnns["stock"], **stock_parts}
    ours = stock | {"rnn_class": rnns["ours"]}
    classes = {"stock": stock, RNN_ONLY: ours}
    for key, part in parts.items():
        ours = ours | {key: part.ours}
        classes[part.variant] = ours
    classes[OTHER_SEED] = stock
    if options.stock_jit:
        classes["stock, jit"] = stock
    if options.stock_compile:
        classes["stock, compile"] = stock
    return classes


def compare_losses(recipe, options, cell, chosen, progress):
    """Train ours, stock, and stock from weights moved a little, without dropout for a few steps.

    Ours is the variant with every part ours. Returns the entry of report.json.
    """
    classes = implementations(recipe, options, cell)
    every_part = next(name for name in reversed(classes) if is_ours(name))
    shorter = sorted(chosen, key=recipe.padded_seconds)[: math.ceil(len(chosen) / 2)]
    batches = [shorter[step % len(shorter)] for step in range(AGREEMENT_STEPS)]
    runs, losses, weights = [], {}, None
    with machine.tf32(False):
        for name in ("ours", "stock", "stock_moved"):
            implementation = every_part if name == "ours" else "stock"
            seed = recipe.hparams["seed"]
            variant = Variant(cell, "fp32", implementation, classes[implementation], seed)
            start = epoch_runs.moved(weights) if name == "stock_moved" else weights
            run = epoch_runs.start_run(recipe, variant, batches, start, for_agreement=True)
            weights = weights or epoch_runs.initial_weights(run)
            _, losses[name], _ = epoch_runs.train(run, len(batches), progress)
            run.brain = None
            runs.append(run)
    check_same_batches(runs)
    return check_agreement(cell, **losses)


def compare(arguments, options):
    """Run the whole comparison and write its report.

    Arguments
    ---------
    arguments : list of str
        Command line of the recipe.
    options : Options

    Returns
    -------
    report : dict
        As in report.json; see report.py.
    folder : Path
        Where it was written.
    """
    if options.passes < 1:
        raise ValueError(f"passes must be at least 1, got {options.passes}")
    with load_recipe(arguments, options, hold=True) as recipe:
        if not options.precisions:
            options = dataclasses.replace(options, precisions=(recipe.hparams["precision"],))
        for key in ("rnn_class", *parts_of(recipe)):
            given = recipe.overrides.get(key, {})
            if not isinstance(given, dict):  # a class, not its arguments
                raise ValueError(f"{key}: the comparison takes ours and SpeechBrain's in turn")
        if "tf32" in options.precisions and "cuda" not in recipe.device:
            raise ValueError(f"precision tf32 needs a CUDA device, got {recipe.device}")
        for precision in options.precisions:
            check_precision(recipe.run_opts, precision)
        chosen = choose_batches(recipe, options)
        report = describe(recipe, arguments, options, chosen)
        if options.resume:
            report = epoch_report.resume(report, recipe.output_folder)
        if report["refused"] is None:
            try:
                with epoch_runs.quiet():
                    measure(report, recipe, arguments, options, chosen)
            except Refused as error:
                report["refused"] = str(error)
            except KeyboardInterrupt:
                report["interrupted"] = True
            if something_done(report):
                epoch_report.write(report, recipe.output_folder)
        return report, recipe.output_folder


def something_done(report):
    """Whether the report is worth to take the place of an earlier one."""
    return bool(report["variants"] or report["checks"]["agreement"] or report["refused"])


def measure(report, recipe, arguments, options, chosen):
    """Fill the report's checks, variants and ratios, group by group; Refused ends it early."""
    done = {(variant["cell"], variant["precision"]) for variant in report["variants"]}
    groups = [
        make_variants(recipe, options, cell, precision)
        for cell in options.cells
        for precision in options.precisions
        if (cell, precision) not in done
    ]
    agreement = report["checks"]["agreement"]
    to_agree = {v.cell for group in groups for v in group if is_ours(v.implementation)}
    to_agree -= agreement.keys()
    total = 3 * AGREEMENT_STEPS * len(to_agree) + sum(
        steps_of(recipe, options, group, chosen, turn)
        for group in groups
        for turn in range(len(group))
    )
    if report["loader"] is None:
        report["loader"] = {
            "processes": loader_options(recipe.loader_options, recipe.device)["num_workers"],
            "seconds_per_batch": epoch_runs.loading_seconds(recipe, chosen),
        }
    # Not by the log, which `quiet` silences.
    say = functools.partial(print, file=sys.stderr, flush=True)
    minutes = recipe.hparams["log_interval_minutes"]
    with contextlib.closing(Progress("comparison", total, "step", minutes, say)) as progress:
        for variants in groups:
            cell, precision = variants[0].cell, variants[0].precision
            if cell in to_agree - agreement.keys():
                progress.set_title(f"{cell}: agreement without dropout")
                agreement[cell] = compare_losses(recipe, options, cell, chosen, progress)
            progress.set_title(f"{cell} {precision}")
            if options.isolate:
                runs = []
                for turn, variant in enumerate(variants):
                    run = epoch_runs.in_own_process(
                        epoch_runs.time_alone, arguments, options, variant, variants[0]
                    )
                    runs.append(run)
                    progress.update(steps_of(recipe, options, variants, chosen, turn))
            else:
                runs = epoch_runs.time_variants(recipe, options, variants, chosen, progress)
            if "cuda" not in recipe.device:
                for run in runs:
                    if not run.variant.for_spread:
                        run.peak_memory = epoch_runs.in_own_process(
                            epoch_runs.peak_resident_memory, arguments, options, run.variant
                        )
            add_group(report, recipe, options, chosen, runs)
            epoch_report.write(report, recipe.output_folder)


def steps_of(recipe, options, variants, chosen, turn):
    """How many steps one of the variants takes."""
    variant, turns = variants[turn], len(variants)
    return len(epoch_runs.plan_of_run(recipe, options, variant, chosen, turn, turns))


def make_variants(recipe, options, cell, precision):
    """The variants of one RNN and precision, in the order of taking turns."""
    seed = recipe.hparams["seed"]
    seeds = {OTHER_SEED: seed + SEED_DISTANCE}
    return [
        Variant(cell, precision, name, classes, seeds.get(name, seed))
        for name, classes in implementations(recipe, options, cell).items()
    ]


def add_group(report, recipe, options, chosen, runs):
    """Add the runs of one RNN and precision to the report, or refuse to compare them."""
    check_same_batches(runs)
    padded, padded_in_epoch = (
        [recipe.padded_seconds(batch) for batch in plan] for plan in (chosen, recipe.plan)
    )
    digest = hashlib.sha256(json.dumps(runs[0].batches).encode()).hexdigest()
    if report["variants"] and report["variants"][0]["batches_sha256"] != digest:
        raise Refused(f"{runs[0].variant.name} did not see the batches of the variants before it")
    loader, curves, seconds = report["loader"], {}, {}
    for run in runs:
        variant = run.variant
        estimate, interval = epoch_seconds(run.seconds, options.passes, padded, padded_in_epoch)
        if run.new_shape is not None:
            first_times = recipe.count_shapes() * run.new_shape
            estimate += first_times
            interval = tuple(bound + first_times for bound in interval)
        curves[variant.implementation] = run.losses
        seconds[variant.implementation] = estimate
        report["variants"].append(
            {
                **dataclasses.asdict(variant),
                "backends": _backends(recipe, run),
                "epoch_seconds": estimate,
                "interval": interval,
                "step_seconds": run.seconds,
                "losses": run.losses,
                "batches_sha256": digest,
                "warm_up_seconds": run.warm_up,
                "new_shape_seconds": run.new_shape,
                "peak_memory_bytes": run.peak_memory,
                "joules": run.joules,
                "loader_wait": sum(run.waits) / sum(run.seconds),
                "loader_utilisation": loader["seconds_per_batch"]
                * len(run.seconds)
                / (max(1, loader["processes"]) * sum(run.seconds)),
                "breakdown_ms": run.breakdown,
                "breakdown_overhead": run.overhead,
            }
        )
    report["checks"]["same_batches"] = True
    ours = {name: losses for name, losses in curves.items() if is_ours(name)}
    if ours:
        group = f"{runs[0].variant.cell} {runs[0].variant.precision}"
        report["checks"]["seed_spread"][group] = check_seed_spread(
            group, ours, curves["stock"], curves[OTHER_SEED]
        )
        peers = [
            value for name, value in seconds.items() if name in ("stock", *epoch_runs.COMPILERS)
        ]
        report["ratios"][group] = {name: min(peers) / seconds[name] for name in ours}


def _backends(recipe, run):
    variant = run.variant
    if not is_ours(variant.implementation):
        return {}
    dtype = AMPConfig.from_name("fp32" if variant.precision == "tf32" else variant.precision).dtype
    hidden = recipe.hparams["rnn_neurons"]
    rnn, _ = sb_fast_sligru.ops.choose_backend(recipe.device, hidden, dtype)
    return {"RNN": rnn, **run.backends}


def describe(recipe, arguments, options, chosen):
    """The part of the report that says what was run on what."""
    own = dataclasses.asdict(options)
    del own["resume"], own["commit"]
    hparams = recipe.hparams
    augmentations = [
        name.removeprefix("enable_")
        for name, value in hparams.items()
        if name.startswith("enable_") and value
    ]
    return epoch_report.environment(recipe.device, options.commit) | {
        "settings": {
            "arguments": list(arguments),
            "options": own,
            "recipe": recipe.brain_class.__name__,
            "batch": f"{hparams['max_batch_length']} s"
            if hparams["dynamic_batching"]
            else f"{hparams['batch_size']} utterances",
            "augmentations": augmentations,
            "seed": hparams["seed"],
        },
        "data": {
            "source": recipe.source,
            "io": recipe.io,
            "batches_in_epoch": len(recipe.plan),
            "shapes_in_epoch": recipe.count_shapes(),
            "audio_seconds_in_epoch": sum(map(recipe.audio_seconds, recipe.plan)),
            "batches": len(chosen),
            "passes": options.passes,
            "audio_seconds": sum(map(recipe.audio_seconds, chosen)),
            "padded_seconds": sum(map(recipe.padded_seconds, chosen)),
            "longest_utterances": [recipe.longest(batch) for batch in chosen],
        },
        "loader": None,
        "checks": {"same_batches": False, "agreement": {}, "seed_spread": {}},
        "variants": [],
        "ratios": {},
        "refused": None,
        "interrupted": False,
    }
