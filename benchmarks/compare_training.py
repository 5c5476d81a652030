"""Whether the CTC recipe trains as well with our SLi-GRU as with SpeechBrain's.

    python recipes/LibriSpeech/mini_librispeech.py data/mini
    python benchmarks/compare_training.py results/compare_training --data_folder=data/mini

trains `hparams/librispeech_ctc.yaml` with `hparams/librispeech_ctc_mini.yaml` on the embedded
corpus, by the recipe's own code, many times. Variants:

    ours         sb_fast_sligru.SLiGRU
    reference    the same under backend("reference"), the PyTorch loop that defines the operator
    stock        speechbrain.nnet.RNN.SLiGRU

A seed gives all variants the same initial weights (those that SpeechBrain's class gets) and the
same batches in the same order. As in the recipe, what is tested is the epoch of lowest WER on the
dev split, utterance by utterance: on the corpus' test split (unknown speakers), and on sentences
that nobody said in training, said by the training's speakers (known speakers).

Every run has a process; as many run at once on each GPU as `--at_once` says. With NVIDIA's MPS
(`nvidia-cuda-mps-control -d` before) they share it better: on two H200 twice as many runs ended in
the same time. They go seed by seed, so that what is finished at any time is pairs. OUTPUT_FOLDER
gets

    results.jsonl    a line for each finished run, as it ends
    report.json      of every metric: means, deviations, paired differences to stock
    report.md        the same as a table, and what it was measured on

Stopped (by `--time_limit`, Ctrl-C, SIGTERM or SIGKILL), the same command trains what is missing in
results.jsonl; with `--time_limit=0` it only writes the report.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import ruamel.yaml
import speechbrain
import torch
import training_report

from sb_fast_sligru import backend, machine, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes/LibriSpeech"))

from sligru_recipes.corpora.embedded import read_settings
from sligru_recipes.processes import end_with_parent
from sligru_recipes.training.brain import make_brain
from sligru_recipes.training.ctc import CTC
from sligru_recipes.training.data import batching, dataio_prepare, prepare_data
from sligru_recipes.training.experiment import load_hparams, parse_arguments
from sligru_recipes.training.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "hparams/librispeech_ctc.yaml"
OVERRIDES = ROOT / "hparams/librispeech_ctc_mini.yaml"
# Variant -> RNN class, backend of our operator.
VARIANTS = {
    "ours": ("sb_fast_sligru.SLiGRU", "auto"),
    "reference": ("sb_fast_sligru.SLiGRU", "reference"),
    "stock": ("speechbrain.nnet.RNN.SLiGRU", "auto"),
}
# The recipe's, and far enough apart: the order of batches comes from the sum of seed and epoch.
FIRST_SEED, SEED_DISTANCE = 2602, 1000
# A recipe takes LibriSpeech's names of splits only.
UNKNOWN_SPEAKERS, KNOWN_SPEAKERS = "test-clean", "test-other"
KNOWN_UTTERANCES = 6  # of each speaker; with the default corpus as many as of unknown ones
RUNS_AT_ONCE = 16  # on a GPU: the steps of so small a model wait for the CPU


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs share."""

    folder: str  # of manifests, tokenizer, and the runs' own temporary folders
    keys: dict  # of the YAML, but for those that a run has of its own
    about: dict  # goes into every line of results.jsonl


# ---- a run, in a process of a worker


class StudiedCTC(CTC):
    """The recipe's, without a log and a picture of each epoch, which take as long as the epoch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.utterances = hashlib.sha256()  # as they come

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """The recipe's; notes what was heard."""
        super().on_fit_batch_end(batch, outputs, loss, should_step)
        self.utterances.update(f"{' '.join(batch.id)}\n".encode())

    def _log_epoch(self, meta, stats):
        pass


@dataclasses.dataclass
class Worker:
    """What a process keeps from run to run."""

    study: Study
    device: str
    tokenizer: object
    train_data: object
    valid_data: object
    test_data: dict


_worker = None


def start_worker(study, devices):
    """Prepare a process for its runs: one core, one device of a queue, all audio in memory."""
    global _worker
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    speechbrain.dataio.dataio.read_audio = _in_memory(speechbrain.dataio.dataio.read_audio)
    device = devices.get()
    hparams, _ = load_recipe(study, device, study.folder)
    tokenizer = load_tokenizer(hparams)
    _worker = Worker(study, device, tokenizer, *dataio_prepare(hparams, tokenizer, CTC.targets))


def _in_memory(read):
    once = functools.cache(read)
    return lambda path: once(path).clone()  # a batch of one may be changed in place


def load_recipe(study, device, output_folder, **keys):
    """The YAML with the study's keys and these; returns it and SpeechBrain's run options."""
    arguments = [str(YAML), f"--overrides={OVERRIDES}", f"--device={device}", "--noprogressbar"]
    hparams_file, run_opts, overrides, _ = parse_arguments(arguments)
    overrides |= study.keys | {"output_folder": str(output_folder)} | keys
    return load_hparams(hparams_file, overrides), run_opts


def train_run(variant, seed, tf32):
    """Train and test once; returns the line of results.jsonl, a dict."""
    study, device = _worker.study, _worker.device
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(dir=study.folder) as folder,
        machine.tf32(tf32),
        backend(VARIANTS[variant][1]),
    ):
        for name in dict.fromkeys(("stock", variant)):
            rnn_class = ruamel.yaml.YAML().load(f"!name:{VARIANTS[name][0]}")
            hparams, run_opts = load_recipe(study, device, folder, rnn_class=rnn_class, seed=seed)
            modules = torch.nn.ModuleDict(hparams["modules"])
            if name == "stock":
                weights = modules.state_dict()
        modules.load_state_dict(weights)
        initial_weights = digest(modules.state_dict())
        brain = make_brain(StudiedCTC, hparams, run_opts, _worker.tokenizer)
        train_data, loader_options = batching(hparams, _worker.train_data)
        brain.train_sampler = loader_options.get("batch_sampler")
        brain.fit(
            hparams["epoch_counter"],
            train_data,
            _worker.valid_data,
            train_loader_kwargs=loader_options,
            valid_loader_kwargs=hparams["valid_dataloader_opts"],
        )
        epochs = brain.history  # the test goes back to the best epoch's
        test = {split: brain.test(split, data) for split, data in _worker.test_data.items()}
        used = ops.choose_backend(device, hparams["rnn_neurons"], torch.float32)[0]
    return study.about | {
        "variant": variant,
        "seed": seed,
        "tf32": tf32,
        "backend": None if variant == "stock" else used,
        "device": torch.cuda.get_device_name(device) if "cuda" in device else study.about["cpu"],
        "initial_weights": initial_weights,
        "utterances": brain.utterances.hexdigest(),
        "seconds": round(time.monotonic() - start, 2),
        "tested_epoch": hparams["epoch_counter"].current,
        "epochs": epochs,
        "unknown_speakers": test[UNKNOWN_SPEAKERS],
        "known_speakers": test[KNOWN_SPEAKERS],
    }


def digest(weights):
    """Of a state_dict on the CPU."""
    found = hashlib.sha256()
    for name, value in weights.items():
        found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()


# ---- the pool


def train_all(jobs, study, devices, deadline, keep):
    """Train in as many processes as there are devices, until all is done or time is over.

    Arguments
    ---------
    jobs : list of tuple
        Arguments of `train_run`, in the order of starting.
    study : Study
    devices : list of str
        One for each process.
    deadline : float or None
        Of time.monotonic(); what runs then is given up.
    keep : callable
        Called with the result of each run.

    Returns
    -------
    failures : list of (tuple, Exception)
        Jobs that did not end well.
    """
    failures = []
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    for device in devices:
        queue.put(device)
    pool = concurrent.futures.ProcessPoolExecutor(
        len(devices), context, start_worker, (study, queue)
    )
    futures = {}
    try:
        for job in jobs:
            futures[pool.submit(train_run, *job)] = job
        left = None if deadline is None else max(0, deadline - time.monotonic())
        for future in concurrent.futures.as_completed(futures, timeout=left):
            if future.exception() is None:
                keep(future.result())
            else:
                failures.append((futures[future], future.exception()))
    except concurrent.futures.TimeoutError:
        pass
    finally:
        if not all(future.done() for future in futures):
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
        pool.shutdown()
    return failures


# ---- the command


def speak_known_speakers(folder, corpus):
    """Write the split of known speakers.

    The generator starts a process for each of them, which imports what the script that called the
    generator does: that of this script would take longer than the speech.
    """
    code = (
        "import sys; from sligru_recipes.corpora.embedded import speak_known_speakers as speak; "
        f"speak(*sys.argv[1:], {KNOWN_SPEAKERS!r}, {KNOWN_UTTERANCES})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(corpus)],
        cwd=ROOT / "recipes/LibriSpeech",
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"--data_folder: {done.stderr.strip().splitlines()[-1]}")


def prepare(data_folder, folder, about):
    """Write the split of known speakers, the manifests and the tokenizer; returns the Study."""
    for split in ("train-clean-100", "dev-clean", UNKNOWN_SPEAKERS):
        if not (data_folder / split).is_dir():
            raise ValueError(f"--data_folder: {data_folder} has no folder {split}")
    corpus = folder / "corpus"
    speak_known_speakers(corpus, data_folder.resolve())
    for split in ("train-clean-100", "dev-clean", UNKNOWN_SPEAKERS):
        (corpus / split).symlink_to((data_folder / split).resolve(), target_is_directory=True)
    keys = {
        "data_folder": str(corpus),
        "test_splits": [UNKNOWN_SPEAKERS, KNOWN_SPEAKERS],
        "number_of_epochs": about["number_of_epochs"],
    }
    study = Study(str(folder), keys, about)
    hparams, _ = load_recipe(study, "cpu", folder)
    prepare_data(hparams)
    keys["vocab_size"] = load_tokenizer(hparams).sp.vocab_size()
    return study


def parse(arguments):
    """The command line, as a namespace; it ends the process where it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_folder", type=Path, metavar="OUTPUT_FOLDER")
    parser.add_argument("--data_folder", type=Path, required=True, help="the embedded corpus")
    parser.add_argument("--seeds", type=positive, default=64, help="of each variant (default: 64)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT"
    )
    parser.add_argument(
        "--tf32", nargs="+", choices=("on", "off"), help="(default: both; on a CPU off)"
    )
    parser.add_argument("--epochs", type=positive, default=8, help="(default: 8)")
    parser.add_argument(
        "--at_once",
        type=positive,
        help=f"runs on each GPU (default: {RUNS_AT_ONCE}), or on the CPU (default: one a core)",
    )
    parser.add_argument("--gpus", type=positive, help="(default: all that are visible)")
    parser.add_argument("--time_limit", type=float, help="seconds, from the start to the end")
    parser.add_argument(
        "--commit",
        default=os.environ.get("BENCH_COMMIT"),
        help="for a machine without git (or set BENCH_COMMIT)",
    )
    options = parser.parse_args(arguments)
    visible = torch.cuda.device_count()
    if options.gpus is not None and options.gpus > visible:
        parser.error(f"--gpus {options.gpus}: {visible} are visible")
    options.gpus = options.gpus or visible
    if options.tf32 is None:
        options.tf32 = ["on", "off"] if options.gpus else ["off"]
    if "on" in options.tf32 and not options.gpus:
        parser.error("--tf32 on: only GPUs have it, and none is visible")
    options.at_once = options.at_once or (RUNS_AT_ONCE if options.gpus else os.cpu_count())
    options.variants, options.tf32 = map(dict.fromkeys, (options.variants, options.tf32))
    return options


def positive(text):
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be above 0, got {number}")
    return number


def command(options):
    """The command line for the report, without this machine's paths."""
    return (
        "python benchmarks/compare_training.py OUTPUT_FOLDER --data_folder=CORPUS "
        f"--seeds {options.seeds} --variants {' '.join(options.variants)} "
        f"--tf32 {' '.join(options.tf32)} --epochs {options.epochs} --at_once {options.at_once}"
    )


def compare(options, start):
    """Train what is missing, and write the report; returns the exit status."""
    path = options.data_folder / "settings.json"
    if not path.is_file():
        raise ValueError(
            f"--data_folder: {options.data_folder} is no corpus of mini_librispeech.py: "
            "it has no settings.json"
        )
    about = {
        "corpus": read_settings(path),
        "known_utterances": KNOWN_UTTERANCES,
        "number_of_epochs": options.epochs,
        "commit": options.commit or machine.commit_of(ROOT),
        "cpu": machine.processor_name(),
        "torch": torch.__version__,
        "speechbrain": speechbrain.__version__,
    }
    options.output_folder.mkdir(parents=True, exist_ok=True)
    record = training_report.Record(options.output_folder / "results.jsonl", about)
    jobs = [
        (variant, FIRST_SEED + SEED_DISTANCE * index, tf32 == "on")
        for index in range(options.seeds)
        for tf32 in options.tf32
        for variant in options.variants
    ]
    missing = [job for job in jobs if job not in record.done]
    devices = [f"cuda:{gpu}" for gpu in range(options.gpus)] or ["cpu"]
    devices = (devices * options.at_once)[: len(missing)]
    failures, interrupted = [], False

    def keep(result):
        record.add(result)
        print(
            f"{len(record.results)} runs: {result['variant']}, seed {result['seed']}, "
            f"TF32 {'on' if result['tf32'] else 'off'}, {result['seconds']:.0f} s, "
            f"WER {result['unknown_speakers']['WER']:.2f} %",
            file=sys.stderr,
            flush=True,
        )

    deadline = None if options.time_limit is None else start + options.time_limit
    try:
        if missing and (deadline is None or time.monotonic() < deadline):
            with tempfile.TemporaryDirectory(prefix="compare-training-") as folder:
                study = prepare(options.data_folder, Path(folder), about)
                failures = train_all(missing, study, devices, deadline, keep)
    except KeyboardInterrupt:
        interrupted = True
    for (variant, seed, _), error in failures[:1]:
        traceback.print_exception(error)
        print(f"{len(failures)} runs failed, first {variant}, seed {seed}", file=sys.stderr)
    left = sum(job not in record.done for job in jobs)
    if left:
        print(f"{left} of {len(jobs)} runs are missing: the same command trains them")
    if record.results:
        report = training_report.write(record.results, command(options), options.output_folder)
        print(report)
    return 130 if interrupted else bool(failures)


def main(arguments=None):
    start = time.monotonic()
    options = parse(arguments)
    try:
        return compare(options, start)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"compare_training: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    # A time limit ends a program by SIGTERM: keep what is finished then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
