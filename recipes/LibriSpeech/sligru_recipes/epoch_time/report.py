"""Reports of compare_epoch_time.py: the files and what is in them.

Keys of report.json:

    date, commit        UTC, ISO 8601; commit of this repository ("+" appended: modified) or null
    versions            python, torch, cuda, cudnn, speechbrain, sb_fast_sligru
    machine             device, cpu, threads, gpu and its driver (null on a CPU)
    settings            arguments (of the recipe), options (of the comparison), recipe, batch,
                        augmentations, seed
    data                source, io (how audio is read), batches_in_epoch, shapes_in_epoch (numbers
                        of utterances and frames that differ; of perturbed speeds an upper bound),
                        audio_seconds_in_epoch,
                        batches (taken of them), passes; of the batches taken: audio_seconds,
                        padded_seconds, longest_utterances (seconds, one a batch)
    loader              processes (0: batches are loaded between the steps), seconds_per_batch (in
                        which one process loads a batch)
    checks              same_batches (bool)
                        agreement: cell -> largest_relative_difference, bound,
                        stock_moved_difference (of stock from weights moved by 1e-7), losses
                        seed_spread: group -> ours_and_stock (implementation of ours -> mean
                        absolute difference of the losses), stock_and_other_seed (the same of these
                        two), bound (of the former)
    variants            list of: cell, precision, implementation, classes (key of the YAML ->
                        class), seed, backends (part of ours -> backend of its operator),
                        epoch_seconds (of a whole epoch), interval (95 %
                        confidence interval of epoch_seconds where the epoch was sampled; lowest and
                        highest pass where it was not), step_seconds, losses (both one a step),
                        batches_sha256 (of utterance IDs and samples), warm_up_seconds (of steps
                        on the longest batch, before), new_shape_seconds (that a step takes longer
                        at a new shape; in epoch_seconds once for each; null where all batches were
                        taken), peak_memory_bytes, joules (of the timed
                        steps; both null: not measured), loader_wait (share of the timed steps'
                        seconds in which they waited for their batches), loader_utilisation (1: its
                        processes could just keep it up), breakdown_ms (phase -> ms a step),
                        breakdown_overhead (of measuring it, relative to the same steps without);
                        both are not measured for the second seed
    ratios              group -> implementation of ours -> epoch_seconds of the fastest stock
                        variant / its own; a group is "CELL PRECISION"
    refused             null, or why there are no ratios
    interrupted         whether it was stopped before all groups were done
"""

import base64
import datetime
import json
import platform
from pathlib import Path

import speechbrain
import torch

import sb_fast_sligru
from sb_fast_sligru import machine

from ..files import replacing
from .pictures import draw
from .texts import TITLE, as_html, paragraphs


def files(report):
    """Names of the files that `write` writes."""
    names = ("report.json", "report.md", "report.html")
    return (*names, "report.png") if report["variants"] else names


def write(report, folder):
    """Write report.json, report.md, report.html and, if anything was timed, report.png.

    They take the place of an earlier report's.
    """
    replace(folder / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    picture = "![Epoch times, phases and losses](report.png)" if report["variants"] else ""
    parts = [f"# {TITLE}", *paragraphs(report, "pipe"), picture]
    replace(folder / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())
    if report["variants"]:
        with replacing(folder / "report.png") as partial:
            draw(report, partial)
        data = base64.b64encode((folder / "report.png").read_bytes()).decode()
        picture = f'<img alt="Epoch times, phases and losses" src="data:image/png;base64,{data}">'
    else:
        (folder / "report.png").unlink(missing_ok=True)  # an earlier report's
    replace(folder / "report.html", as_html(report, picture).encode())


def replace(path, content):
    """Write a file of some bytes as a whole, so that an interruption leaves the old or the new."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def resume(report, folder):
    """The unfinished report in `folder`, if it is of the comparison that `report` begins.

    Raises
    ------
    ValueError
        If there is none, or it is of another commit, machine, data or other settings.
    """
    path = folder / "report.json"
    report = json.loads(json.dumps(report))  # with lists for tuples, as the file has
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict) or old.keys() != report.keys():
            raise ValueError("its keys are not those of a report")
    except (OSError, ValueError) as error:
        raise ValueError(f"--resume: {path} is no report to go on with ({error})") from error
    different = next((key for key in _IDENTITY if old[key] != report[key]), None)
    if different:
        raise ValueError(f"--resume: {path} has other {different}: {old[different]}")
    return old | {"interrupted": False}


_IDENTITY = ("commit", "versions", "machine", "settings", "data")


def environment(device, commit=None):
    """The part of a report that says when and where it was made; `commit` as git tells it."""
    gpu = driver = None
    if "cuda" in device:
        gpu = torch.cuda.get_device_name(device)
        driver = machine.gpu_driver() or "unknown"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or machine.commit_of(Path(__file__).parent),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if gpu else None,
            "cudnn": torch.backends.cudnn.version() if gpu else None,
            "speechbrain": speechbrain.__version__,
            "sb_fast_sligru": sb_fast_sligru.__version__,
        },
        "machine": {
            "device": device,
            "cpu": machine.processor_name(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "driver": driver,
        },
    }
