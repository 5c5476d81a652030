"""Reports of compare_epoch_time.py: their files, tables and pictures, and the README's sentence.

    python recipes/LibriSpeech/epoch_report.py REPORT.json [REPORT.json ...] README.md

renews the sentences between the README's marks, one for each report.

Keys of report.json:

    date, commit        UTC, ISO 8601; commit of this repository ("+" appended: modified) or null
    versions            python, torch, cuda, cudnn, speechbrain, sb_fast_sligru
    machine             device, cpu, threads, gpu and its driver (null on a CPU)
    settings            arguments (of the recipe), options (of the comparison), recipe, batch,
                        augmentations, seed
    data                source, io (how audio is read), batches_in_epoch, audio_seconds_in_epoch,
                        batches (taken of them), passes; of the batches taken: audio_seconds,
                        padded_seconds, longest_utterances (seconds, one a batch)
    loader              processes (0: batches are loaded between the steps), seconds_per_batch (in
                        which one process loads a batch)
    checks              same_batches (bool)
                        agreement: cell -> largest_relative_difference, bound,
                        stock_moved_difference (of stock from weights moved by 1e-7), losses
                        seed_spread: group -> ours_and_stock, stock_and_other_seed (mean absolute
                        differences of the losses), bound (of the former)
    variants            list of: cell, precision, implementation, rnn_class, seed, backend (of our
                        operator, else null), epoch_seconds (of a whole epoch), interval (95 %
                        confidence interval of epoch_seconds where the epoch was sampled; lowest and
                        highest pass where it was not), step_seconds, losses (both one a step),
                        batches_sha256 (of utterance IDs and samples), warm_up_seconds (of steps
                        on the longest batch, before), peak_memory_bytes, joules (of the timed
                        steps; both null: not measured), loader_utilisation (1: its processes could
                        just keep it up), breakdown_ms (phase -> ms a step), breakdown_overhead
                        (of measuring it, relative to the same steps without); both are not measured
                        for the second seed
    ratios              group -> epoch_seconds of the fastest stock variant / ours; a group is
                        "CELL PRECISION"
    refused             null, or why there are no ratios
    interrupted         whether it was stopped before all groups were done
"""

import base64
import contextlib
import datetime
import html
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import speechbrain
import torch
from matplotlib.figure import Figure
from step_phases import FORWARD, PHASES
from tabulate import tabulate

import sb_fast_sligru

TITLE = "Epoch time with our RNNs and SpeechBrain's"
COLOURS = {
    "ours": "#0072b2",
    "stock": "#e69f00",
    "stock, other seed": "#bbbbbb",
    "stock, jit": "#d55e00",
    "stock, compile": "#cc79a7",
    "torch": "#009e73",
}
OTHERS = {"data wait": "#999999", "augmentation": "#ddcc77", "optimiser": "#555555"}
PHASE_COLOURS = dict(zip(FORWARD, ("C1", "C2", "C0", "C4", "C3", "C5"), strict=True)) | OTHERS
BEGIN, END = "<!-- epoch times: begin -->", "<!-- epoch times: end -->"


# ---- files


def files(report):
    """Names of the files that `write` writes."""
    names = ("report.json", "report.md", "report.html")
    return (*names, "report.png") if report["variants"] else names


def remove(folder):
    """Remove the files of an earlier report."""
    for name in ("report.json", "report.md", "report.html", "report.png"):
        (folder / name).unlink(missing_ok=True)


def write(report, folder):
    """Write report.json, report.md, report.html and, if anything was timed, report.png."""
    _replace(folder / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    picture = "![Epoch times, phases and losses](report.png)" if report["variants"] else ""
    parts = [f"# {TITLE}", *_parts(report, "pipe"), picture]
    _replace(folder / "report.md", ("\n\n".join(filter(None, parts)) + "\n").encode())
    if report["variants"]:
        draw(report, folder / "report.png")
        data = base64.b64encode((folder / "report.png").read_bytes()).decode()
        picture = f'<img alt="Epoch times, phases and losses" src="data:image/png;base64,{data}">'
    _replace(folder / "report.html", as_html(report, picture).encode())


def _replace(path, content):
    """Write a file as a whole, so that an interruption leaves the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


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
        different = next((key for key in _IDENTITY if old[key] != report[key]), None)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--resume: {path} is no report to go on with ({error})") from error
    if different:
        raise ValueError(f"--resume: {path} has other {different}: {old[different]}")
    return old | {"interrupted": False}


_IDENTITY = ("commit", "versions", "machine", "settings", "data")


def environment(device, commit=None):
    """The part of a report that says when and where it was made; `commit` as git tells it."""
    gpu = driver = None
    if "cuda" in device:
        gpu = torch.cuda.get_device_name(device)
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = (_output_of(*query) or "unknown").splitlines()[0]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
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
            "cpu": _cpu_model(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "driver": driver,
        },
    }


def _output_of(*command):
    """What a command prints, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _commit():
    git = ("git", "-C", str(Path(__file__).parent))
    head = _output_of(*git, "rev-parse", "HEAD")
    changes = _output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changes else "")


def _cpu_model():
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


# ---- texts


def duration(seconds):
    """For people: 7h19, 2 min 05 s, 10.4 s."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours}h{minutes:02d}"
    if seconds >= 100:
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes} min {seconds:02d} s"
    return f"{seconds:.3g} s"


def headline(report):
    """One sentence: an epoch with SpeechBrain's RNN and with ours.

    Raises
    ------
    ValueError
        If the report has no ratio: refused, or stopped too early.
    """
    if report["refused"] or not report["ratios"]:
        raise ValueError(f"the report has no ratio ({report['refused'] or 'nothing compared'})")
    settings, data = report["settings"], report["data"]
    pairs = []
    for group, ratio in report["ratios"].items():
        ours = _variants(report, group)["ours"]["epoch_seconds"]
        pairs.append(f"{group} {duration(ratio * ours)} -> {duration(ours)} ({ratio:.1f}x)")
    sampled = data["batches"] < data["batches_in_epoch"]
    extent = f", from {data['batches']} of {data['batches_in_epoch']} batches" if sampled else ""
    return (
        f"SpeechBrain's -> ours for one epoch of {data['source']} "
        f"({data['audio_seconds_in_epoch'] / 3600:.1f} h) on {_device(report)}: "
        f"{', '.join(pairs)}; {settings['recipe']} recipe, batches of {settings['batch']}, "
        f"{_augmentations(report)}{extent}."
    )


def _device(report):
    machine = report["machine"]
    if machine["gpu"]:
        return f"one {machine['gpu']}"
    return f"{machine['cpu']} ({machine['threads']} thread{'s' if machine['threads'] > 1 else ''})"


def _augmentations(report):
    names = report["settings"]["augmentations"]
    return f"augmented by {', '.join(names)}" if names else "no augmentation"


def _variants(report, group):
    return {
        variant["implementation"]: variant
        for variant in report["variants"]
        if f"{variant['cell']} {variant['precision']}" == group
    }


def as_text(report):
    """The report for a terminal."""
    return "\n\n".join(_parts(report, "simple"))


def as_html(report, picture):
    """One page that needs nothing but itself."""
    body = [
        part if part.startswith("<table") else f"<p>{html.escape(part)}</p>"
        for part in _parts(report, "html")
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>\n'
        "<style>body{font-family:sans-serif;margin:2em;max-width:90em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc}"
        f"</style></head>\n<body><h1>{TITLE}</h1>\n" + "\n".join(body) + f"\n{picture}\n"
        f"<details><summary>report.json</summary><pre>{html.escape(json.dumps(report, indent=1))}"
        "</pre></details></body></html>\n"
    )


def _parts(report, style):
    """Paragraphs and tables (of `tabulate`'s style)."""
    parts = [conditions(report)]
    if report["ratios"] and not report["refused"]:
        parts.insert(0, headline(report))
    if report["variants"]:
        parts += [_times_table(report, style), _phases_text(report), _phases_table(report, style)]
        late = [v for v in report["variants"] if v["loader_utilisation"] > 1]
        if late and report["loader"]["processes"]:
            names = ", ".join(f"{v['cell']} {v['precision']} {v['implementation']}" for v in late)
            parts.append(
                f"More loader processes are needed for {names}: batches were loaded in advance, "
                "but these processes cannot keep it up, so a whole epoch would take longer."
            )
    if report["interrupted"]:
        parts.append("Stopped before all RNNs and precisions were done; --resume goes on.")
    return [*parts, verdict(report)]


def conditions(report):
    """One paragraph: what was measured on what."""
    settings, data, loader = report["settings"], report["data"], report["loader"]
    versions = ", ".join(
        f"{name} {version}" for name, version in report["versions"].items() if version
    )
    extent = f"all {data['batches']} batches of an epoch"
    if data["batches"] < data["batches_in_epoch"]:
        extent = (
            f"{data['batches']} of an epoch's {data['batches_in_epoch']} batches, short to long"
        )
    passes = f"{data['passes']} pass{'es' if data['passes'] > 1 else ''}"
    loading = ""
    if loader:
        loading = (
            f", by {loader['processes'] or 'the training'} process(es); one loads a batch in "
            f"{1000 * loader['seconds_per_batch']:.0f} ms"
        )
    driver = f" (driver {report['machine']['driver']})" if report["machine"]["driver"] else ""
    turns = (
        "each variant alone in a process"
        if settings["options"]["isolate"]
        else ("variants in turn")
    )
    return (
        f"{_device(report)}{driver}; {settings['recipe']} recipe, batches of {settings['batch']}, "
        f"{_augmentations(report)}, seed {settings['seed']}. Data: {data['source']}, {extent} "
        f"({data['audio_seconds'] / 60:.1f} min of audio, {data['padded_seconds'] / 60:.1f} min "
        f"with padding), {passes}, {turns}; {data['io']}{loading}. fp32 is without TF32. "
        f"{versions}; commit {report['commit'] or 'unknown'}; {report['date']}."
    )


def _timed(report):
    """The variants to show times of: stock's second seed is there for its losses."""
    return [v for v in report["variants"] if v["implementation"] != "stock, other seed"]


def _name(variant):
    backend = f" ({variant['backend']})" if variant["backend"] else ""
    return f"{variant['implementation']}{backend}"


def _times_table(report, style):
    data = report["data"]
    sampled = data["batches"] < data["batches_in_epoch"]
    rows = []
    for variant in _timed(report):
        seconds, steps = variant["epoch_seconds"], len(variant["step_seconds"])
        peak, joules, losses = (variant[key] for key in ("peak_memory_bytes", "joules", "losses"))
        ours = _variants(report, f"{variant['cell']} {variant['precision']}").get("ours")
        comparable = ours and not report["refused"]
        rows.append(
            [
                variant["cell"],
                variant["precision"],
                _name(variant),
                duration(seconds),
                " to ".join(map(duration, variant["interval"])),
                f"{seconds / ours['epoch_seconds']:.2f}x" if comparable else "-",
                f"{1000 * statistics.median(variant['step_seconds']):.0f}",
                f"{data['batches_in_epoch'] / seconds:.2f}",
                f"{data['audio_seconds_in_epoch'] / seconds:.0f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
                "-" if joules is None else f"{joules / steps:.0f}",
                f"{100 * variant['loader_utilisation']:.0f}",
                f"{statistics.fmean(variant['warm_up_seconds']):.2f}",
                f"{statistics.fmean(losses[-max(1, len(losses) // 8) :]):.3f}",
            ]
        )
    headers = [
        *("RNN", "precision", "implementation", "epoch"),
        "95 % interval" if sampled else "fastest to slowest",
        *("over ours", "ms/step (median)", "steps/s", "audio h/h", "peak MiB", "J/step"),
        *("loader, %", "warm-up s/step", "last losses"),
    ]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def _phases_text(report):
    overheads = [100 * variant["breakdown_overhead"] for variant in _timed(report)]
    return (
        "Where a step's time goes: ms (share), in steps taken after the timed ones with marks "
        f"between the phases, which made them {min(overheads):+.1f} to {max(overheads):+.1f} % "
        "slower than the same steps without."
    )


def _phases_table(report, style):
    timed = _timed(report)
    totals = [sum(variant["breakdown_ms"].values()) for variant in timed]
    rows = []
    for phase in PHASES:
        values = [variant["breakdown_ms"].get(phase) for variant in timed]
        if any(value is not None for value in values):
            rows.append(
                [phase]
                + [
                    "-" if value is None else f"{value:.1f} ({100 * value / total:.1f} %)"
                    for value, total in zip(values, totals, strict=True)
                ]
            )
    rows.append(["step", *(f"{total:.1f}" for total in totals)])
    headers = ["phase", *(f"{v['cell']} {v['precision']} {v['implementation']}" for v in timed)]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def verdict(report):
    """What was checked, or why there is no ratio."""
    if report["refused"]:
        return f"No ratio: {report['refused']}."
    checks = report["checks"]
    texts = ["Same batches for all." if checks["same_batches"] else "Nothing was timed."]
    for cell, entry in checks["agreement"].items():
        texts.append(
            f"{cell}: without dropout the first {len(entry['losses']['ours'])} fp32 losses of ours "
            f"and stock agree within {entry['largest_relative_difference']:.1g} relative (bound "
            f"{entry['bound']:g}; stock itself, from weights moved by 1e-7, and stock: "
            f"{entry['stock_moved_difference']:.1g})."
        )
    for group, entry in checks["seed_spread"].items():
        texts.append(
            f"{group}: in the timed steps they differ by {entry['ours_and_stock']:.3g} on average "
            f"(two stock seeds: {entry['stock_and_other_seed']:.3g})."
        )
    return " ".join(texts)


# ---- pictures


def draw(report, path):
    """Epoch times, where a step's time goes, losses, and step time against utterance length."""
    timed = _timed(report)
    groups = list(report["checks"]["seed_spread"])  # those with losses to compare
    height = 1.5 + 0.35 * len(timed)
    figure = Figure(figsize=(14, height + 4), layout="constrained")
    figure.suptitle(f"{_device(report)}; {report['data']['source']}", fontsize="medium")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 4])
    epochs, steps = upper.subplots(1, 2, sharey=True)
    _draw_epochs(report, epochs, timed)
    _draw_phases(steps, timed)
    *curves, lengths = lower.subplots(1, len(groups) + 1, squeeze=False)[0]
    for axes, group in zip(curves, groups, strict=True):
        _draw_losses(axes, group, _variants(report, group))
    for variant in timed:
        seconds = report["data"]["longest_utterances"] * report["data"]["passes"]
        lengths.plot(
            seconds,
            [1000 * value for value in variant["step_seconds"]],
            {"SLi-GRU": "o", "Li-GRU": "s"}.get(variant["cell"], "^"),
            color=COLOURS[variant["implementation"]],
            markersize=4,
            fillstyle="full" if variant["precision"] == timed[0]["precision"] else "none",
            label=f"{variant['cell']} {variant['precision']} {variant['implementation']}",
        )
    lengths.set_title("Step time", fontsize="medium")
    lengths.set_xlabel("longest utterance of the batch, s")
    lengths.set_ylabel("ms")
    lengths.set_ylim(bottom=0)
    lengths.legend(frameon=False, fontsize="x-small")
    for axes in (epochs, steps, *curves, lengths):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _draw_epochs(report, axes, timed):
    hours = any(variant["epoch_seconds"] >= 3600 for variant in timed)
    unit = 3600 if hours else 1
    for position, variant in enumerate(timed):
        seconds = variant["epoch_seconds"]
        low, high = variant["interval"]
        axes.barh(
            position,
            seconds / unit,
            color=COLOURS[variant["implementation"]],
            xerr=[[max(0, seconds - low) / unit], [max(0, high - seconds) / unit]],
            error_kw={"elinewidth": 1, "capsize": 3},
        )
        label = f" {duration(seconds)}"
        ratio = report["ratios"].get(f"{variant['cell']} {variant['precision']}")
        if variant["implementation"] == "ours" and ratio and not report["refused"]:
            label += f", {ratio:.1f}x faster"
        where = (max(seconds, high) / unit, position)
        axes.annotate(label, where, (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(timed)), [f"{v['cell']} {v['precision']}, {_name(v)}" for v in timed])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(v["interval"][1] for v in timed) / unit)
    axes.set_xlabel("hours" if hours else "seconds")
    axes.set_title("One epoch", fontsize="medium")


def _draw_phases(axes, timed):
    for phase in PHASES:
        backward = phase.endswith(" backward")
        starts = [
            sum(v["breakdown_ms"].get(earlier, 0) for earlier in PHASES[: PHASES.index(phase)])
            for v in timed
        ]
        axes.barh(
            range(len(timed)),
            [variant["breakdown_ms"].get(phase, 0) for variant in timed],
            left=starts,
            color=PHASE_COLOURS[phase.removesuffix(" backward")],
            alpha=0.6 if backward else 1,
            hatch="///" if backward else None,
            label=None if backward else phase,
        )
    axes.set_xlabel("ms (hatched: backward)")
    axes.set_title("Where a step's time goes", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_losses(axes, group, variants):
    for name, variant in reversed(variants.items()):
        axes.plot(
            range(1, len(variant["losses"]) + 1),
            variant["losses"],
            color=COLOURS[name],
            linewidth=3.5 if name == "stock" else 1.2,
            label=name,
        )
    axes.set_xlabel("step")
    axes.set_title(f"Training loss, {group}", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")


# ---- the README's sentence


def readme_block(report_paths, folder):
    """What stands between the README's marks.

    Arguments
    ---------
    report_paths : list of str or Path
    folder : Path
        Of the README: the text names the reports from there.
    """
    lines = []
    for path in report_paths:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        name = os.path.relpath(path, folder)
        lines.append(f"- {headline(report)} (`{name}`)")
    return "\n".join([BEGIN, *lines, END])


def renew_readme(report_paths, readme):
    """Replace the text between the marks in `readme`; ValueError if they are not there."""
    readme = Path(readme)
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    block = readme_block(report_paths, readme.parent)
    _replace(readme, (before + block + rest.partition(END)[2]).encode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__.split("\n\nKeys")[0])
    try:
        renew_readme(sys.argv[1:-1], sys.argv[-1])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"epoch_report: {error}")
