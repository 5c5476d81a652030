"""How long an epoch of the CTC recipe takes with our RNNs and with SpeechBrain's.

    python recipes/LibriSpeech/compare_epoch_time.py hparams/librispeech_ctc.yaml \
        --data_folder=LIBRISPEECH --output_folder=results/compare_epoch_time [--batches=200]

Takes the arguments of train_ctc.py (`--overrides`, `--device`, `--precision`, any key of the
YAML) and its own, see `--help`. Everything but `rnn_class` is the same for all variants: initial
weights (one state_dict copied into both), batches, their order, the seed of every step, so also
augmentation and the dropout outside the RNN. The variants take turns on blocks of batches, each
block beginning with another one. A step is timed from the request for its batch (data loading
included) to the updated weights.

No ratio is printed, and the exit status is 1, unless

- every variant saw the same batches, utterance by utterance;
- without dropout and augmentation, in fp32 without TF32, the first 20 losses agree with stock's
  within 1e-3 relative (at 0.03 of the learning rate, see AGREEMENT_LR);
- in the timed run the losses differ from stock's on average no more than those of a second stock
  run with another seed do, but for chance (SEED_CHANCE).

A model of its own, in a process of its own, trains on the longest batch for the peak memory: on a
GPU what PyTorch's allocator handed out at most, on a CPU how far the process's peak resident
memory grew (Linux only).

Writes report.json, report.md and report.png to the output folder. Keys of report.json:

    date, commit        UTC, ISO 8601; commit of this repository ("+" appended: modified) or null
    versions            python, torch, speechbrain, sb_fast_sligru
    machine             device, cpu, threads, gpu (null on a CPU)
    settings            arguments, precision, tf32 (matmul, cudnn), backend of our operator, seed
    data                folder, batches_in_epoch, batches (taken of them), passes,
                        audio_seconds and padded_seconds of the batches taken
    checks              same_batches (bool)
                        agreement: cell -> largest_relative_difference, bound, losses
                        seed_spread: cell -> ours_and_stock, stock_and_other_seed (mean absolute
                        differences of the losses), bound (of the former)
    variants            list of: cell, implementation, rnn_class, seed, epoch_seconds (of a whole
                        epoch), interval (95 % confidence interval of epoch_seconds where the epoch
                        was sampled; lowest and highest pass where it was not), step_seconds,
                        losses (both one a step), peak_memory_bytes (null: not measured)
    ratios              cell -> stock's epoch_seconds / ours; null if refused
    refused             null, or why there are no ratios
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import gc
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import asr
import ruamel.yaml
import speechbrain
import torch
import train_ctc
from matplotlib.figure import Figure
from speechbrain.augment.augmenter import Augmenter
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.dataio.sampler import ReproducibleRandomSampler
from speechbrain.utils.autocast import AMPConfig
from speechbrain.utils.distributed import infer_device
from speechbrain.utils.seed import seed_everything
from tabulate import tabulate
from torch.utils.data import BatchSampler, SequentialSampler
from tqdm import tqdm

import sb_fast_sligru

CELLS = {
    "SLi-GRU": {"ours": "sb_fast_sligru.SLiGRU", "stock": "speechbrain.nnet.RNN.SLiGRU"},
    "Li-GRU": {"ours": "sb_fast_sligru.LiGRU", "stock": "speechbrain.nnet.RNN.LiGRU"},
}
IMPLEMENTATIONS = ("ours", "stock", "stock, other seed")
REPORT_FILES = ("report.json", "report.md", "report.png")
AGREEMENT_STEPS = 20
AGREEMENT_BOUND = 1e-3  # relative
# At full learning rate (AdamW 0.002, Adadelta 1.0) 20 steps are chaotic: stock itself, its weights
# changed by 1e-7 relative, then departs from stock by more than the bound.
AGREEMENT_LR = 0.03
WARM_UP_STEPS = 2
MEMORY_STEPS = 2
BLOCKS_PER_PASS = 4
# Of three runs of one distribution, how much farther may one be from another than the third is?
# Over a dozen steps, chance alone gives up to four times; it averages out over more of them.
SEED_CHANCE = 10  # the factor is 1 + SEED_CHANCE / sqrt(steps)
OTHER_SEED = 10**6  # added to the recipe's seed


class Refused(Exception):
    """The variants were not comparable: there is no ratio to report."""


@dataclasses.dataclass
class Recipe:
    """What all variants share."""

    hparams_file: str
    overrides: dict
    run_opts: speechbrain.utils.run_opts.RunOptions
    tokenizer: object
    data: object  # train set, in the order that `plan` indexes
    plan: list  # the epoch's batches: lists of indices into `data`
    loader_options: dict
    output_folder: Path
    data_folder: str
    device: str
    precision: str
    hidden: int  # units of the RNN
    seed: int

    def padded_seconds(self, batch):
        """Seconds of a batch with its padding."""
        return len(batch) * max(self._durations(batch))

    def audio_seconds(self, batch):
        """Seconds of a batch without its padding."""
        return sum(self._durations(batch))

    def _durations(self, batch):
        return [self.data.data[self.data.data_ids[index]]["duration"] for index in batch]


@dataclasses.dataclass
class Run:
    """One variant's training: its model and what was measured."""

    cell: str
    implementation: str  # ours, stock, or stock with another seed
    rnn_class: str
    seed: int
    brain: object
    seconds: list = dataclasses.field(default_factory=list)
    losses: list = dataclasses.field(default_factory=list)
    batches: list = dataclasses.field(default_factory=list)  # (utterance IDs, sum of the samples)


def load_recipe(arguments):
    """Prepare the data and plan the epoch, once for all variants.

    Arguments
    ---------
    arguments : list of str
        Command line of train_ctc.py.

    Returns
    -------
    Recipe
    """
    hparams_file, run_opts, overrides = asr.parse_arguments(arguments)
    hparams = asr.load_hparams(hparams_file, overrides)
    output_folder = Path(hparams["output_folder"])
    output_folder.mkdir(parents=True, exist_ok=True)
    asr.prepare_data(hparams)
    tokenizer = asr.load_tokenizer(hparams)
    train_data, _, _ = asr.dataio_prepare(hparams, tokenizer)
    train_data, options = asr.batching(hparams, train_data)
    sampler = options.pop("batch_sampler", None)
    batch_size, shuffle = options.pop("batch_size", None), options.pop("shuffle", False)
    if sampler is None:
        order = ReproducibleRandomSampler if shuffle else SequentialSampler
        sampler = BatchSampler(order(train_data), batch_size, drop_last=False)
    return Recipe(
        hparams_file=hparams_file,
        overrides={**overrides, "vocab_size": tokenizer.sp.vocab_size()},
        run_opts=run_opts,
        tokenizer=tokenizer,
        data=train_data,
        plan=[list(batch) for batch in sampler],
        loader_options=options,
        output_folder=output_folder,
        data_folder=str(hparams["data_folder"]),
        device=run_opts.device or infer_device(),
        # The order in which SpeechBrain's Brain looks for it.
        precision=run_opts.precision
        if "precision" in run_opts.overridden_args
        else hparams["precision"],
        hidden=hparams["rnn_neurons"],
        seed=hparams["seed"],
    )


def make_brain(recipe, rnn_class, for_agreement=False):
    """A Brain ready for `fit_batch`, from the recipe's YAML.

    Arguments
    ---------
    recipe : Recipe
    rnn_class : str
        Dotted name.
    for_agreement : bool
        No dropout, no augmentation, fp32, and AGREEMENT_LR of the learning rate.
    """
    tag = ruamel.yaml.YAML().load(f"!name:{rnn_class}")
    overrides = {**copy.deepcopy(recipe.overrides), "rnn_class": tag}
    run_opts = recipe.run_opts
    if for_agreement:
        overrides["dropout"] = 0.0
        run_opts = dataclasses.replace(
            run_opts,
            precision="fp32",
            overridden_args=run_opts.overridden_args | {"precision"},
        )
    hparams = asr.load_hparams(recipe.hparams_file, overrides)
    if for_agreement:
        hparams["wav_augment"] = Augmenter(augmentations=[])
    brain = asr.make_brain(train_ctc.CTC, hparams, run_opts, recipe.tokenizer)
    brain.checkpointer = None  # start from the seed's weights, not from the last checkpoint
    brain.on_fit_start()
    if for_agreement:
        for group in brain.optimizer.param_groups:
            group["lr"] *= AGREEMENT_LR
    brain.modules.train()
    brain.hparams.epoch_counter.current = 1
    return brain


def make_runs(recipe, cell, for_agreement=False, other_seed=False):
    """Ours and stock of one cell from the same initial weights; optionally stock once more."""
    runs = []
    for implementation in IMPLEMENTATIONS if other_seed else IMPLEMENTATIONS[:2]:
        rnn_class = CELLS[cell][implementation.split(",")[0]]
        brain = make_brain(recipe, rnn_class, for_agreement)
        if runs:
            brain.modules.load_state_dict(runs[0].brain.modules.state_dict())
        seed = recipe.seed + (OTHER_SEED if implementation == "stock, other seed" else 0)
        runs.append(Run(cell, implementation, rnn_class, seed, brain))
    return runs


def quieten():
    """Keep the YAML's warnings, shown once, from coming again with every variant."""
    logging.getLogger("speechbrain").setLevel(logging.ERROR)
    logging.getLogger("asr").setLevel(logging.ERROR)


def train(run, recipe, batches, progress):
    """Train one variant on some batches, and record seconds, losses and what it saw."""
    brain = run.brain
    start = _now(brain.device)
    for batch in make_dataloader(recipe.data, batch_sampler=batches, **recipe.loader_options):
        seed_everything(run.seed + len(run.losses), verbose=False)
        brain.step += 1
        loss = brain.fit_batch(batch)
        run.seconds.append(_now(brain.device) - start)
        run.losses.append(loss.item())
        run.batches.append((tuple(batch.id), batch.sig.data.double().sum().item()))
        progress.update()
        start = _now(brain.device)


def _now(device):
    if "cuda" in device:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sample(recipe, count):
    """`count` batches of the plan that represent it, in the plan's order.

    They are evenly spaced over the plan sorted by padded length: short, middle and long ones.
    """
    total = len(recipe.plan)
    ranked = sorted(range(total), key=lambda index: recipe.padded_seconds(recipe.plan[index]))
    chosen = {ranked[int((rank + 0.5) * total / count)] for rank in range(count)}
    return [recipe.plan[index] for index in sorted(chosen)]


@contextlib.contextmanager
def without_tf32():
    """Full fp32 products on a GPU: importing SpeechBrain turns TF32 on."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def peak_memory(arguments, rnn_class, batch):
    """Bytes at the peak of training on one batch; for a fresh process.

    Arguments
    ---------
    arguments : list of str
        Command line of train_ctc.py, of a recipe whose data is prepared.
    rnn_class : str
    batch : list of int
        Indices into the recipe's train set.

    Returns
    -------
    int or None
        None on a CPU under another system than Linux.
    """
    quieten()
    recipe = load_recipe(arguments)
    gc.collect()  # the recipe's first model
    if "cuda" in recipe.device:
        torch.cuda.reset_peak_memory_stats(recipe.device)
    elif not os.path.exists("/proc/self/clear_refs"):
        return None
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of importing
        before = _peak_resident_bytes()
    brain = make_brain(recipe, rnn_class)
    run = Run("", "", rnn_class, recipe.seed, brain)
    train(run, recipe, [batch] * MEMORY_STEPS, tqdm(disable=True))
    if "cuda" in brain.device:
        return torch.cuda.max_memory_allocated(brain.device)
    return _peak_resident_bytes() - before


def _peak_resident_bytes():
    with open("/proc/self/status") as file:
        kilobytes = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes)


def check_same_batches(runs):
    """Refuse if any run saw other batches, or in another order, than the first."""
    for run in runs[1:]:
        if run.batches != runs[0].batches:
            step = next(
                (
                    index
                    for index, pair in enumerate(zip(runs[0].batches, run.batches, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(run.batches), len(runs[0].batches)),
            )
            raise Refused(
                f"{run.cell} {run.implementation} did not see the batches of {runs[0].cell} "
                f"{runs[0].implementation} (from step {step + 1} on)"
            )


def largest_relative_difference(ours, stock):
    """Of two loss curves; infinite where one is not finite."""
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, stock, strict=True)]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=math.inf)


def check_agreement(cell, ours, stock):
    """Refuse unless the losses without dropout agree; returns the entry of report.json."""
    difference = largest_relative_difference(ours, stock)
    if not difference <= AGREEMENT_BOUND:
        raise Refused(
            f"{cell}: without dropout our first {len(ours)} losses differ from stock's by up to "
            f"{difference:.2g} relative (bound {AGREEMENT_BOUND:g})"
        )
    return {
        "largest_relative_difference": difference,
        "bound": AGREEMENT_BOUND,
        "losses": {"ours": ours, "stock": stock},
    }


def check_seed_spread(cell, ours, stock, other_seed):
    """Refuse unless ours is about as near to stock as stock of another seed; returns the entry."""

    def distance(losses):
        return statistics.fmean(abs(a - b) for a, b in zip(losses, stock, strict=True))

    found, spread = distance(ours), distance(other_seed)
    bound = (1 + SEED_CHANCE / math.sqrt(len(stock))) * spread
    if not found <= bound:
        raise Refused(
            f"{cell}: our losses differ from stock's by {found:.3g} on average, those of stock "
            f"with another seed by {spread:.3g} (bound over {len(stock)} steps: {bound:.3g})"
        )
    return {"ours_and_stock": found, "stock_and_other_seed": spread, "bound": bound}


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
    half = 1.96 * total * deviation * math.sqrt((1 - count / total) / count)
    return estimate, (estimate - half, estimate + half)


def compare(arguments, batches=None, passes=1):
    """Run the whole comparison and write its report.

    Arguments
    ---------
    arguments : list of str
        Command line of train_ctc.py.
    batches : int or None
        How many (at least 2) of the epoch's batches to take, short to long ones; None for all.
    passes : int
        How often to go through them.

    Returns
    -------
    report : dict
        As in report.json; see the head of this file.
    folder : Path
        Where it was written.
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    recipe = load_recipe(arguments)
    quieten()
    if batches is not None and not 2 <= batches <= len(recipe.plan):
        raise ValueError(f"batches must be 2 to {len(recipe.plan)} (an epoch), got {batches}")
    for name in REPORT_FILES:
        (recipe.output_folder / name).unlink(missing_ok=True)
    chosen = recipe.plan if batches is None else sample(recipe, batches)
    report = describe(recipe, arguments, chosen, passes)
    pairs = sum(map(len, CELLS.values()))
    total = pairs * (AGREEMENT_STEPS + WARM_UP_STEPS + MEMORY_STEPS)
    total += (pairs + len(CELLS)) * len(chosen) * passes
    with tqdm(total=total, unit="step", smoothing=0.02) as progress:
        try:
            measure(report, recipe, arguments, chosen, passes, progress)
        except Refused as error:
            report["refused"] = str(error)
    write_report(report, recipe.output_folder)
    return report, recipe.output_folder


def measure(report, recipe, arguments, chosen, passes, progress):
    """Fill the report's checks, variants and ratios; Refused ends it early."""
    longest = max(chosen, key=recipe.padded_seconds)

    progress.set_description("1/4 agreement without dropout")
    first = [chosen[step % len(chosen)] for step in range(AGREEMENT_STEPS)]
    for cell in CELLS:
        with without_tf32():
            runs = make_runs(recipe, cell, for_agreement=True)
            for run in runs:
                train(run, recipe, first, progress)
        check_same_batches(runs)
        losses = {run.implementation: run.losses for run in runs}
        report["checks"]["agreement"][cell] = check_agreement(cell, losses["ours"], losses["stock"])

    progress.set_description("2/4 peak memory")
    memory = {}
    for rnn_class in (name for classes in CELLS.values() for name in classes.values()):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            memory[rnn_class] = pool.submit(peak_memory, arguments, rnn_class, longest).result()
        progress.update(MEMORY_STEPS)

    progress.set_description("3/4 warm-up")
    for cell in CELLS:
        for run in make_runs(recipe, cell):
            train(run, recipe, [longest] * WARM_UP_STEPS, progress)

    progress.set_description("4/4 timing")
    runs = [run for cell in CELLS for run in make_runs(recipe, cell, other_seed=True)]
    size = math.ceil(len(chosen) / BLOCKS_PER_PASS)
    blocks = [chosen[i : i + size] for i in range(0, len(chosen), size)] * passes
    for index, block in enumerate(blocks):
        turn = index % len(runs)
        for run in runs[turn:] + runs[:turn]:
            train(run, recipe, block, progress)

    padded, padded_in_epoch = (
        [recipe.padded_seconds(batch) for batch in plan] for plan in (chosen, recipe.plan)
    )
    for run in runs:
        estimate, interval = epoch_seconds(run.seconds, passes, padded, padded_in_epoch)
        report["variants"].append(
            {
                "cell": run.cell,
                "implementation": run.implementation,
                "rnn_class": run.rnn_class,
                "seed": run.seed,
                "epoch_seconds": estimate,
                "interval": interval,
                "step_seconds": run.seconds,
                "losses": run.losses,
                "peak_memory_bytes": memory[run.rnn_class],
            }
        )
    check_same_batches(runs)
    report["checks"]["same_batches"] = True
    variants = {(v["cell"], v["implementation"]): v for v in report["variants"]}
    for cell in CELLS:
        curves = [variants[cell, name]["losses"] for name in IMPLEMENTATIONS]
        report["checks"]["seed_spread"][cell] = check_seed_spread(cell, *curves)
    report["ratios"] = {
        cell: variants[cell, "stock"]["epoch_seconds"] / variants[cell, "ours"]["epoch_seconds"]
        for cell in CELLS
    }


def describe(recipe, arguments, chosen, passes):
    """The part of the report that says what was run on what."""
    device = recipe.device
    gpu = torch.cuda.get_device_name(device) if "cuda" in device else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "speechbrain": speechbrain.__version__,
            "sb_fast_sligru": sb_fast_sligru.__version__,
        },
        "machine": {
            "device": device,
            "cpu": _cpu_model(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        },
        "settings": {
            "arguments": list(arguments),
            "precision": recipe.precision,
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
            "backend": sb_fast_sligru.ops.choose_backend(
                device, recipe.hidden, AMPConfig.from_name(recipe.precision).dtype
            )[0],
            "seed": recipe.seed,
        },
        "data": {
            "folder": recipe.data_folder,
            "batches_in_epoch": len(recipe.plan),
            "batches": len(chosen),
            "passes": passes,
            "audio_seconds": sum(map(recipe.audio_seconds, chosen)),
            "padded_seconds": sum(map(recipe.padded_seconds, chosen)),
        },
        "checks": {"same_batches": False, "agreement": {}, "seed_spread": {}},
        "variants": [],
        "ratios": None,
        "refused": None,
    }


def _commit():
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout else "")


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_report(report, folder):
    """Write report.json, report.md and, if anything was timed, report.png."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Epoch time of the CTC recipe, ours against SpeechBrain's",
        "",
        conditions(report),
        "",
        table(report, "pipe"),
        "",
        verdict(report),
    ]
    if report["variants"]:
        lines += ["", "![Epoch time and loss](report.png)"]
        draw(report, folder / "report.png")
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def conditions(report):
    """One paragraph: what was measured on what."""
    settings, data = report["settings"], report["data"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{_where(report)}; our operator's backend: {settings['backend']}; "
        f"{data['passes']} pass{'es' if data['passes'] > 1 else ''}; "
        f"{data['audio_seconds'] / 60:.1f} min of audio in them; {versions}; {report['date']}."
    )


def _where(report):
    machine, settings, data = report["machine"], report["settings"], report["data"]
    tf32 = " with TF32" if settings["tf32"]["matmul"] and machine["gpu"] else ""
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    extent = f"all {data['batches']} batches of an epoch"
    if data["batches"] < data["batches_in_epoch"]:
        extent = f"from {data['batches']} of an epoch's {data['batches_in_epoch']} batches"
    return f"{device}; {settings['precision']}{tf32}; {extent}"


def _timed(report):
    """The variants to show times of: stock's second seed is there for its losses."""
    return [v for v in report["variants"] if v["implementation"] != "stock, other seed"]


def table(report, style):
    """The variants as a table of `tabulate`'s style."""
    rows = []
    for variant in _timed(report):
        peak = variant["peak_memory_bytes"]
        cell, losses = variant["cell"], variant["losses"]
        low, high = variant["interval"]
        ratio = (report["ratios"] or {}).get(cell)
        rows.append(
            [
                cell,
                variant["implementation"],
                f"{variant['epoch_seconds']:.2f}",
                f"{low:.2f} to {high:.2f}",
                ""
                if variant["implementation"] == "stock"
                else f"{ratio:.2f}x"
                if ratio
                else "none",
                f"{1000 * statistics.median(variant['step_seconds']):.0f}",
                "not measured" if peak is None else f"{peak / 2**20:.0f}",
                f"{statistics.fmean(losses[-max(1, len(losses) // 8) :]):.3f}",
            ]
        )
    sampled = report["data"]["batches"] < report["data"]["batches_in_epoch"]
    headers = [
        "RNN",
        "implementation",
        "s/epoch",
        "95 % interval" if sampled else "fastest to slowest",
        "stock / ours",
        "ms/step (median)",
        "peak memory (MiB)",
        "last losses",
    ]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def verdict(report):
    """What was checked, or why there is no ratio."""
    if report["refused"]:
        return f"No ratio: {report['refused']}."
    agreement = max(
        entry["largest_relative_difference"] for entry in report["checks"]["agreement"].values()
    )
    spread = "; ".join(
        f"{cell} {entry['ours_and_stock']:.3g} (two stock seeds: "
        f"{entry['stock_and_other_seed']:.3g})"
        for cell, entry in report["checks"]["seed_spread"].items()
    )
    return (
        f"Same batches for all. Without dropout the first {AGREEMENT_STEPS} fp32 losses of ours "
        f"and stock agree within {agreement:.1g} relative (bound {AGREEMENT_BOUND:g}). In the "
        f"timed run they differ on average by: {spread}."
    )


def draw(report, path):
    """Bars of the epoch times and the loss curves, side by side."""
    colours = {"ours": "#0072b2", "stock": "#e69f00", "stock, other seed": "#bbbbbb"}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(_where(report), fontsize="medium")
    bars, *curves = figure.subplots(1, 1 + len(CELLS), width_ratios=[1.3, *[1] * len(CELLS)])
    timed = _timed(report)
    for position, variant in enumerate(timed):
        seconds = variant["epoch_seconds"]
        low, high = variant["interval"]
        bars.barh(
            position,
            seconds,
            color=colours[variant["implementation"]],
            xerr=[[max(0, seconds - low)], [max(0, high - seconds)]],
            error_kw={"elinewidth": 1, "capsize": 3},
        )
        label = f" {seconds:.3g} s"
        if variant["implementation"] == "ours" and report["ratios"]:
            label += f", {report['ratios'][variant['cell']]:.1f}x faster"
        bars.annotate(
            label, (max(seconds, high), position), (4, 0), textcoords="offset points", va="center"
        )
    bars.set_yticks(range(len(timed)), [f"{v['cell']}\n{v['implementation']}" for v in timed])
    bars.invert_yaxis()
    bars.set_xlim(0, 1.5 * max(v["interval"][1] for v in timed))
    bars.set_xlabel("seconds per epoch")
    bars.set_title("Epoch time")
    for axes, cell in zip(curves, CELLS, strict=True):
        for variant in (v for v in reversed(report["variants"]) if v["cell"] == cell):
            name = variant["implementation"]
            axes.plot(
                range(1, len(variant["losses"]) + 1),
                variant["losses"],
                color=colours[name],
                linewidth={"ours": 1.2, "stock": 3.5}.get(name, 1.2),
                label=name,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("CTC loss")
        axes.set_title(f"Training loss, {cell}")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    for axes in (bars, *curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="All other arguments are those of train_ctc.py: its YAML file comes first.",
        allow_abbrev=False,
    )
    parser.add_argument("--batches", type=int, help="sample so many of the epoch's batches")
    parser.add_argument("--passes", type=int, default=1, help="times through them (default 1)")
    options, recipe_arguments = parser.parse_known_args(arguments)
    try:
        report, folder = compare(recipe_arguments, options.batches, options.passes)
    except (OSError, ValueError) as error:
        sys.exit(f"compare_epoch_time: {error}")
    print(f"\n{table(report, 'simple')}\n\n{conditions(report)}\n{verdict(report)}")
    print(f"Written: {', '.join(str(folder / name) for name in REPORT_FILES)}")
    if report["refused"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
