"""The results of compare_training.py: the file of finished runs, statistics, and the report."""

import datetime
import json
import math
import statistics

import scipy.stats
from tabulate import tabulate

EPOCHS_SHOWN = (2, 4)  # and the last
# Runs of other values are not compared.
IDENTITY = ("corpus", "known_utterances", "number_of_epochs")
VERSUS = "stock"


class Record:
    """The runs that are finished, in a file of one JSON object a line.

    Arguments
    ---------
    path : Path
        Need not exist. A last line that is not complete is removed.
    about : dict
        What this study is; see IDENTITY.

    Raises
    ------
    ValueError
        If the file is of another study.
    """

    def __init__(self, path, about):
        self.path = path
        self.results = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            for number, line in enumerate(complete.splitlines(), 1):
                try:
                    result = json.loads(line)
                    different = next((k for k in IDENTITY if result[k] != about[k]), None)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: not a result ({error!r})") from error
                if different:
                    raise ValueError(
                        f"{path} is of other runs: {different} {result[different]}, "
                        f"asked for: {about[different]}"
                    )
                self.results.append(result)
            if complete != text:
                path.write_text(complete, encoding="utf-8")

    @property
    def done(self):
        """Set of (variant, seed, TF32)."""
        return {(r["variant"], r["seed"], r["tf32"]) for r in self.results}

    def add(self, result):
        """Append a finished run to the file."""
        self.results.append(result)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def metrics(result):
    """Name -> value of one run, in the order of the report."""
    last = result["number_of_epochs"]
    values = {}
    for name, key in (("training loss", "train loss"), ("dev loss", "valid loss")):
        for epoch in sorted({e for e in EPOCHS_SHOWN if e < last} | {last}):
            values[f"{name}, epoch {epoch}"] = result["epochs"][epoch - 1][key]
    values[f"dev WER, %, epoch {last}"] = result["epochs"][-1]["valid WER"]
    for split in ("known_speakers", "unknown_speakers"):
        speakers = split.replace("_", " ")
        values[f"test loss, {speakers}"] = result[split]["loss"]
        values[f"test WER, %, {speakers}"] = result[split]["WER"]
    return values


def check_pairs(results):
    """Raise ValueError unless the runs of a seed began and went on with the same."""
    first = {}
    for result in results:
        other = first.setdefault(result["seed"], result)
        for key, what in (("initial_weights", "initial weights"), ("utterances", "batches")):
            if result[key] != other[key]:
                raise ValueError(
                    f"seed {result['seed']}: {result['variant']} and {other['variant']} "
                    f"had other {what}"
                )


def describe(values):
    """n, mean, standard deviation and standard error (both null for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "standard_deviation": deviation,
        "standard_error": None if deviation is None else deviation / math.sqrt(len(values)),
    }


def compare(ours, stock):
    """Describe paired differences, and test whether their mean is 0 (Student's t, two-sided)."""
    found = describe([a - b for a, b in zip(ours, stock, strict=True)])
    t = p = None
    if found["standard_deviation"]:  # neither a single pair nor all the same difference
        t, p = map(float, scipy.stats.ttest_rel(ours, stock))
    return found | {"t": t, "p": p}


def summarise(results):
    """List of: tf32, metric, variants (name -> `describe`), differences (name -> `compare`)."""
    groups = {}  # TF32 -> variant -> seed -> metric -> value
    for result in results:
        runs = groups.setdefault(result["tf32"], {}).setdefault(result["variant"], {})
        runs[result["seed"]] = metrics(result)
    rows = []
    for tf32, variants in sorted(groups.items()):
        names = sorted(variants)
        for metric in metrics(results[0]):
            row = {"tf32": tf32, "metric": metric, "differences": {}}
            row["variants"] = {
                name: describe([values[metric] for values in variants[name].values()])
                for name in names
            }
            for name in names:
                pairs = sorted(variants[name].keys() & variants.get(VERSUS, {}).keys())
                if name != VERSUS and pairs:
                    row["differences"][f"{name} - {VERSUS}"] = compare(
                        [variants[name][seed][metric] for seed in pairs],
                        [variants[VERSUS][seed][metric] for seed in pairs],
                    )
            rows.append(row)
    return rows


def write(results, command, folder):
    """Write report.json and report.md; returns the latter's text."""
    check_pairs(results)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "number_of_runs": len(results),
        "corpus": results[0]["corpus"],
        "number_of_epochs": results[0]["number_of_epochs"],
    }
    for key in ("commit", "torch", "speechbrain"):
        report[key] = sorted({result[key] or "unknown" for result in results})
    gpus, cpus = (
        " and ".join(sorted({result[key] or "unknown" for result in results}))
        for key in ("device", "cpu")
    )
    report["machine"] = {"gpu": None if gpus == cpus else gpus, "cpu": cpus}
    report["backends"] = sorted({f"{r['variant']} {r['backend']}" for r in results if r["backend"]})
    report["summary"] = summarise(results)
    text = as_markdown(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def as_markdown(report):
    """The report for people."""
    splits, machine = report["corpus"]["splits"], report["machine"]
    corpus = ", ".join(f"{split} {count} x {each}" for split, (count, each) in splits.items())
    parts = [
        "# Training with our SLi-GRU and with SpeechBrain's",
        f"{report['number_of_runs']} runs of {report['number_of_epochs']} epochs on "
        f"{machine['gpu'] or 'its CPU alone'} (CPU: {machine['cpu']}); torch "
        f"{', '.join(report['torch'])}, SpeechBrain {', '.join(report['speechbrain'])}, commit "
        f"{', '.join(report['commit'])}; backends: {', '.join(report['backends']) or 'none'}; "
        f"{report['date']}.",
        f"`{report['command']}`",
        f"Embedded corpus, speakers x utterances: {corpus}.",
        "Mean ± standard error (standard deviation). Differences are those of runs of one seed, "
        "which begin with the same weights and hear the same batches; p is that of a paired t "
        "test. Without any difference one p in twenty is below 0.05.",
    ]
    for tf32 in (False, True):
        rows = [row for row in report["summary"] if row["tf32"] == tf32]
        if rows:
            parts += [f"## TF32 {'on' if tf32 else 'off'}", _table(rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows):
    first = rows[0]
    headers = ["metric", *(f"{name} (n={v['n']})" for name, v in first["variants"].items())]
    for name, difference in first["differences"].items():
        headers += [f"{name} (n={difference['n']})", "p"]
    body = []
    for row in rows:
        line = [row["metric"]]
        for value in row["variants"].values():
            deviation = value["standard_deviation"]
            line.append(_mean(value) + ("" if deviation is None else f" ({deviation:.3f})"))
        for value in row["differences"].values():
            line += [_mean(value), "-" if value["p"] is None else f"{value['p']:.2g}"]
        body.append(line)
    return tabulate(body, headers, "github", disable_numparse=True)


def _mean(value):
    error = value["standard_error"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")
