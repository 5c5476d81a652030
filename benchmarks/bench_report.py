"""Result files of bench_rnn.py: merging, tables, the plot, and the comparison of two of them.

python benchmarks/bench_report.py    # renew the front page's table from the committed results
"""

import json
import math
import re
import statistics
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

PASSES = ("forward", "training")
WITHOUT_CLUSTERS = " `ours-l2`: ours without clusters, as on GPUs that have none."
GROWTH_FROM = 1000  # steps: the longest length is compared with this one


# ---- files


def row_key(row):
    names = ("case", "time", "cell", "contender", "precision", "pass")
    return tuple(row.get(name) for name in names)


def merged(old, new):
    """The rows of two result files; those of `new` replace their like, a skipped one only such."""
    result = {"runs": old["runs"] + new["runs"]}
    for part in ("rows", "accuracy"):
        rows = {row_key(row): row for row in old[part]}
        for row in new[part]:
            key = row_key(row)
            if row["status"] != "skipped" or key not in rows or rows[key]["status"] == "skipped":
                rows[key] = row | {"run": row["run"] + len(old["runs"])}
        result[part] = list(rows.values())
    used = sorted({row["run"] for part in ("rows", "accuracy") for row in result[part]})
    for row in result["rows"] + result["accuracy"]:
        row["run"] = used.index(row["run"])
    result["runs"] = [result["runs"][index] for index in used]
    return result


def read_results(path):
    """A result file, or ValueError."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"runs", "rows", "accuracy"} <= results.keys():
            raise ValueError("it lacks runs, rows or accuracy")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a result file of bench_rnn.py ({error})") from error
    return results


def as_json(results):
    """JSON with one run or row a line."""
    parts = []
    for part, entries in results.items():
        lines = ",\n".join(json.dumps(entry, allow_nan=False) for entry in entries)
        parts.append(f'"{part}": [\n{lines}\n]')
    return "{" + ",\n".join(parts) + "}\n"


def write_text(path, text):
    """Replace a file as a whole, so that an interruption leaves the old or the new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def number(value):
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


def markdown(results):
    """Machine, times by length, growth, errors, and every row."""
    parts = ["# Recurrent networks: times, memory, errors", describe_runs(results["runs"])]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        first = rows[0]
        directions = "bidirectional" if first["bidirectional"] else "unidirectional"
        parts.append(
            f"## Case {case}: B={first['batch']}, I={first['features']}, H={first['hidden']}, "
            f"layers={first['layers']}, {directions}\n\n"
            "Median milliseconds, forward / training (forward and backward)."
            f"{WITHOUT_CLUSTERS if any(row['contender'] == 'ours-l2' for row in rows) else ''}\n\n"
            + times_table(rows)
        )
    if growth := growth_table(results["rows"]):
        parts.append("## Growth with L\n\n" + growth)
    for length in sorted({row["time"] for row in results["accuracy"]}):
        rows = [row for row in results["accuracy"] if row["time"] == length]
        parts.append(
            f"## Relative error against float64: one SLi-GRU layer, B={rows[0]['batch']}, "
            f"T={length}, H={rows[0]['hidden']}\n\n" + accuracy_table(rows)
        )
    if results["rows"]:
        parts.append("## Every row\n\n" + details_table(results["rows"]))
    return "\n\n".join(parts) + "\n"


def describe_runs(runs):
    lines = []
    for index, run in enumerate(runs):
        machine, versions = run["machine"], run["versions"]
        gpu = f"{machine['gpu']} (driver {machine['driver']})" if machine["gpu"] else "no GPU"
        lines.append(
            f"- Run {index}, {run['date']}, commit {run['commit'] or 'unknown'}: {gpu}, "
            f"{machine['cpu']} ({machine['cores']} cores); torch {versions['torch']}, CUDA "
            f"{versions['cuda']}, cuDNN {versions['cudnn']}, SpeechBrain "
            f"{versions['speechbrain']}, Python {versions['python']}"
            f"{'; interrupted' if run['interrupted'] else ''}; `{run['command']}`"
        )
    return "\n".join(lines)


def times_table(rows):
    lengths = sorted({row["time"] for row in rows})
    table = {}
    for row in rows:
        line = table.setdefault((row["contender"], row["cell"], row["precision"]), {})
        shown = number(row["median_ms"]) if row["status"] == "measured" else row["status"]
        line.setdefault(row["time"], {})[row["pass"]] = shown
    body = [
        [*key, *(" / ".join(line.get(n, {}).get(which, "-") for which in PASSES) for n in lengths)]
        for key, line in table.items()
    ]
    headers = ["contender", "cell", "precision", *(f"L={n}" for n in lengths)]
    return tabulate(body, headers, "github", disable_numparse=True, stralign="right")


def growth_table(rows):
    """Time at the longest length over that at GROWTH_FROM steps, beside the ratio of the two."""
    lines = {}
    for row in rows:
        if row["status"] == "measured":
            key = tuple(row[name] for name in ("case", "contender", "cell", "precision", "pass"))
            lines.setdefault(key, {})[row["time"]] = row["median_ms"]
    body = []
    for key, times in lines.items():
        longest = max(times)
        if GROWTH_FROM in times and longest > GROWTH_FROM:
            ratio = times[longest] / times[GROWTH_FROM]
            body.append([*key, longest, f"{ratio:.2f}", f"{longest / GROWTH_FROM:g}"])
    headers = ["case", "contender", "cell", "precision", "pass", "L"]
    headers += [f"time / time at L={GROWTH_FROM}", "if linear"]
    return tabulate(body, headers, "github", disable_numparse=True) if body else ""


def accuracy_table(rows):
    stock_errors = {
        row["precision"]: row["errors"]
        for row in rows
        if row["contender"] == "stock-eager" and row["status"] == "measured"
    }
    body = []
    for row in rows:
        line = [row["contender"], row["precision"]]
        if row["status"] != "measured":
            body.append([*line, *[row["status"]] * 3, row["reason"]])
            continue
        line += [f"{row['errors'][key]:.2e}" for key in ("h", "dwx", "du")]
        base = stock_errors.get(row["precision"], {})
        # In float64 SpeechBrain's loop is the exact result itself: an error of 0.
        ratios = [f"{row['errors'][k] / base[k]:.2f}" if base[k] else "-" for k in base]
        body.append([*line, " / ".join(ratios)])
    headers = ["contender", "precision", "h", "dwx", "dU", "over stock's: h / dwx / dU"]
    return tabulate(body, headers, "github", disable_numparse=True)


def details_table(rows):
    names = ("run", "case", "time", "contender", "cell", "precision", "pass")
    body = []
    for row in rows:
        line = [row[key] for key in names]
        if row["status"] == "measured":
            low, high = row["quartiles_ms"]
            peak = row["peak_bytes"]
            line += [
                number(row["median_ms"]),
                f"{number(low)} to {number(high)}",
                len(row["times_ms"]),
                number(row["us_per_step"]),
                number(row["floor_fraction"]),
                f"{peak / 2**20:.0f}" if peak is not None else "",
                "",
            ]
        else:
            line += [""] * 6 + [f"{row['status']}: {row['reason']}".replace("|", "/")]
        body.append(line)
    headers = ["run", "case", "L", "contender", "cell", "precision", "pass", "median ms"]
    headers += ["quartiles ms", "passes", "us a step", "fraction of hop floor", "peak MiB", "note"]
    return tabulate(body, headers, "github", disable_numparse=True)


def plot(rows, path):
    """Time against length, log-log, for the case with the most lengths: SLi-GRU and cuDNN's."""
    rows = [row for row in rows if row["status"] == "measured" and row["cell"] != "ligru"]
    if not rows:
        return
    lengths = {}
    for row in rows:
        lengths.setdefault(row["case"], set()).add(row["time"])
    case = max(lengths, key=lambda name: len(lengths[name]))
    rows = [row for row in rows if row["case"] == case]
    # cuDNN's static kernel exists in fp16 alone, so it stands among the 16-bit curves.
    panels = {"fp32, TF32 off": [], "bf16 (cudnn-lstm-static: fp16)": []}
    for row in rows:
        if row["precision"] == "fp32":
            panels["fp32, TF32 off"].append(row)
        elif row["precision"] == ("fp16" if row["contender"] == "cudnn-lstm-static" else "bf16"):
            panels["bf16 (cudnn-lstm-static: fp16)"].append(row)
    panels = {title: chosen for title, chosen in panels.items() if chosen}
    if not panels:
        return
    names = dict.fromkeys(row["contender"] for chosen in panels.values() for row in chosen)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    figure = Figure(figsize=(13, 4.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(PASSES), squeeze=False, sharex=True, sharey=True)
    for line, (title, chosen) in zip(axes, panels.items(), strict=True):
        for axis, which in zip(line, PASSES, strict=True):
            for contender in colours:
                points = sorted(
                    (row["time"], row["median_ms"])
                    for row in chosen
                    if (row["contender"], row["pass"]) == (contender, which)
                )
                style = {"marker": "o", "markersize": 4, "color": colours[contender]}
                style |= {"linewidth": 2.5 if contender.startswith("ours") else 1.2}
                style |= {"linestyle": "--" if contender.endswith("-graph") else "-"}
                if points:
                    axis.plot(*zip(*points, strict=True), label=contender, **style)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_title(f"{which}, {title}", fontsize=10)
            axis.grid(which="both", alpha=0.25)
            axis.set_xticks(sorted(lengths[case]), sorted(lengths[case]), minor=False)
            axis.set_xticks([], minor=True)
            axis.set_xlabel("L, steps")
            axis.set_ylabel("ms")
    # One legend for all panels, a colour for each contender.
    handles = {}
    for axis in axes.flat:
        curves, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, curves, strict=True))
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside right upper", fontsize=9)
    first = rows[0]
    figure.suptitle(
        f"Case {case}: B={first['batch']}, I={first['features']}, H={first['hidden']}, "
        f"layers={first['layers']}"
    )
    figure.savefig(path, dpi=130)


# ---- the front page's table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
README_CASE, README_TIME = "A", 1000
# Of the RNN alone: what is named, and contenders of bench_rnn.py, of which the fastest counts.
README_PASSES = {
    "ours": ("ours-persistent",),
    "stock": ("stock-eager",),
    "graph": ("stock-graph",),
    "cudnn": ("cudnn-lstm-static", "cudnn-lstm", "cudnn-gru"),
}
README_VARIANTS = {
    "stock": "SpeechBrain's (*stock*)",
    "ours: RNN only": "our RNN",
    "ours: RNN + decoder": "our RNN and decoder",
    "ours: all": "all ours",
}


def read_front_page_results():
    """The result file of the RNN alone and the epoch report that the front page shows."""
    report = json.loads((RESULTS / "nvidia-h200-epoch-time.json").read_text(encoding="utf-8"))
    return read_results(RESULTS / "nvidia-h200.json"), report


def for_people(seconds):
    """A duration to the minute, or below 100 s with three digits."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def change(report, cell, precision):
    """An epoch with what is ours and without, as in "1 min instead of 2 min"."""
    ours, stock = (
        min(
            variant["epoch_seconds"]
            for variant in report["variants"]
            if (variant["cell"], variant["precision"]) == (cell, precision)
            and _is_of(variant, implementation)
        )
        for implementation in ("ours", "stock")
    )
    return f"{for_people(ours)} instead of {for_people(stock)}"


def _is_of(variant, implementation):
    """Whether a variant is that; of ours there is one for each part of the recipe that is ours."""
    return re.sub("^ours: .*", "ours", variant["implementation"]) == implementation


def readme_block(results, report):
    """What stands between the front page's marks: epochs, then how they were measured."""
    variants = {
        variant["implementation"]: variant
        for variant in report["variants"]
        if (variant["cell"], variant["precision"]) == ("SLi-GRU", "bf16")
    }
    stock = variants["stock"]["epoch_seconds"]
    body = [
        [
            name,
            for_people(variants[implementation]["epoch_seconds"]),
            f"{stock / variants[implementation]['epoch_seconds']:.1f}x",
            f"{1000 * statistics.median(variants[implementation]['step_seconds']):.0f} ms",
            f"{variants[implementation]['peak_memory_bytes'] / 2**30:.1f} GiB",
        ]
        for implementation, name in README_VARIANTS.items()
    ]
    headers = ["attention recipe with", "epoch", "gain", "a step (median)", "peak memory"]
    table = tabulate(body, headers, "github", disable_numparse=True)
    return f"{BEGIN}\n{table}\n\n{_how_measured(results, report)}\n{END}"


def _how_measured(results, report):
    data = report["data"]
    passes = {}
    for name, contenders in README_PASSES.items():
        passes[name] = min(
            (
                row
                for row in results["rows"]
                if (row["case"], row["time"]) == (README_CASE, README_TIME)
                and (row["pass"], row["status"]) == ("training", "measured")
                and (row["contender"] in contenders and row["cell"] != "ligru")
                and row["precision"] in ("bf16", "fp16")
            ),
            key=lambda row: row["median_ms"],
        )
    row, cudnn = passes["ours"], passes["cudnn"]
    times = {name: f"{number(row['median_ms'])} ms" for name, row in passes.items()}
    sentences = (
        f"{data['audio_seconds_in_epoch'] / 3600:.0f} h of simulated speech of LibriSpeech's "
        f"lengths, batches of {report['settings']['batch']}, bf16, without augmentation, on one "
        f"{report['machine']['gpu']}; estimated from {data['batches']} of "
        f"{data['batches_in_epoch']} batches "
        "([report](benchmarks/results/nvidia-h200-epoch-time.md)).",
        f"The RNN alone, {row['layers']} layers of {row['hidden']} units, {row['batch']} sequences "
        f"of {row['time']} steps, forward and backward in bf16: {times['ours']}; stock "
        f"{times['stock']}, replayed as a CUDA graph {times['graph']}; cuDNN's fastest, an "
        f"{cudnn['precision']} {cudnn['cell'].upper()}, {times['cudnn']} "
        "([every row](benchmarks/results/nvidia-h200.md)).",
        "Epochs of others: 2 h 33 min with an SLi-GRU on an A100 "
        "([fast_ligru](https://github.com/Adel-Moumen/fast_ligru)), about 5 h with LSTMs on a V100 "
        "([SpeechBrain](https://github.com/speechbrain/speechbrain/tree/develop/recipes/LibriSpeech"
        "/ASR/seq2seq)), 2.5 to 2.7 GPU-minutes on H100s for a lighter transducer "
        "([MLPerf 3.0](https://github.com/mlcommons/training_results_v3.0)).",
    )
    return "\n\n".join(
        textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
        for text in sentences
    )


def renew_readme(path):
    """Replace the text between the marks in the file `path`; ValueError if they are not there."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: expected one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    block = readme_block(*read_front_page_results())
    write_text(path, before + block + rest.partition(END)[2])


# ---- comparison of two files


def check(old_path, new_path, tolerance):
    """Print what became slower, larger, less accurate or broken; return the exit status."""
    old, new = read_results(old_path), read_results(new_path)
    regressions, compared = [], 0
    for part in ("rows", "accuracy"):
        new_rows = {row_key(row): row for row in new[part]}
        for row in old[part]:
            other = new_rows.get(row_key(row))
            if row["status"] != "measured" or other is None or other["status"] == "skipped":
                continue
            compared += 1
            label = " ".join(str(part) for part in row_key(row) if part is not None)
            if other["status"] == "failed":
                regressions.append([label, "fails", other["reason"], ""])
                continue
            for name, before in metrics(row).items():
                after = metrics(other).get(name)
                if before and after is not None and not after <= before * (1 + tolerance):
                    change = f"{before:.4g} -> {after:.4g}"
                    regressions.append([label, name, change, after / before])
    if not compared:
        raise ValueError(f"{old_path} and {new_path} have no measured row in common")
    measured = sum(row["status"] == "measured" for row in old["rows"] + old["accuracy"])
    print(f"{compared} of {measured} measured rows compared, tolerance {tolerance:.0%}")
    if regressions:
        print(tabulate(regressions, ["row", "what", "old -> new", "ratio"], floatfmt=".2f"))
    print(f"{len(regressions)} regression(s)")
    return 1 if regressions else 0


def metrics(row):
    """What must not grow, by name."""
    if "errors" in row:
        return {f"error of {key}": value for key, value in row["errors"].items()}
    return {"median_ms": row["median_ms"], "peak_bytes": row["peak_bytes"]}


if __name__ == "__main__":
    renew_readme(ROOT / "README.md")
