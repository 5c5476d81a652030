"""What benchmarks of one part share: alternating rounds, result files, the command line.

In each round every contender runs in turn, warmed up, so that what else the machine does meets all
alike. The tables have the median of all passes and the least one; gains are ratios of the least,
which other programs disturb the least. Precisions are those of bench_rnn.py. Peak memory is what
PyTorch's allocator handed out at most above inputs and parameters.

Results go to DIR/<name of the GPU or CPU>-<part>.{json,md}, after each case; a later run replaces
the rows that it measures. Ctrl-C and `--budget` end a run with the cases that are done. Keys of the
JSON file:

    runs       as in bench_rnn.py
    rows       list of: run (index), case, sizes, contender, precision, pass, status (measured or
               failed), reason, and if measured times_ms (all rounds), median_ms, least_ms, backend,
               peak_bytes
    accuracy   empty
"""

import argparse
import dataclasses
import datetime
import math
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import bench_report
import torch
from bench_report import PASSES, number
from bench_rnn import (
    PRECISIONS,
    add_result_options,
    capture,
    describe_machine,
    file_stem,
    first_line,
    time_passes,
    versions,
)
from tabulate import tabulate

from sb_fast_sligru import machine

ROOT = Path(__file__).resolve().parents[1]
GPU_ALONE = ("-graph", "-search")  # ends of names of contenders that a CPU does not have
SECONDS_OF_PASSES, FEWEST_PASSES, MOST_PASSES = 0.4, 2, 20  # of a row, in each round


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a script measures.

    A case is a dataclass: name, sizes, device, threads, the precisions measured by default and, if
    not all are, the contenders.
    """

    script: str
    description: str
    part: str  # of the model, in names of files
    title: str  # of the tables
    sizes: str  # of a case in the tables, a format of its fields
    cases: dict  # name -> case
    tiny: dict  # fields of a case that only shows that everything runs
    contenders: tuple
    make: Callable  # (name, case, precision) -> a Contender
    passes: tuple = PASSES
    per: str | None = None  # field of a case: the tables have the time of a pass over it
    columns: dict = dataclasses.field(default_factory=dict)  # head -> what it tells of a row
    legend: str = ""  # what else is to be said of the tables


class Contender:
    """A network with its inputs, one function a pass: `forward` and `training`."""

    name: str
    device: str
    backend: str | None = None  # what runs it, and why
    facts = types.MappingProxyType({})  # what else its rows tell

    def function(self, which):
        """What is timed, warmed up."""
        function = getattr(self, which)
        if self.name.endswith("-graph"):
            function = capture(function)
        time_passes(function, 2, self.device)
        return function


def measure(make, case, precision_name, contenders, passes, rounds, effort, deadline=math.inf):
    """Rows of a case in one precision; no round but the first begins after the deadline."""
    precision = PRECISIONS[precision_name]
    sizes = dataclasses.asdict(case)
    for key in ("name", "precisions", "contenders"):
        sizes.pop(key, None)
    rows = {}
    with machine.tf32(precision.tf32):
        for which in passes:
            functions = {}
            for name in contenders:
                row = {"case": case.name, **sizes, "contender": name, "precision": precision_name}
                row |= {"pass": which, "run": 0}
                rows[name, which] = row
                try:
                    contender = make(name, case, precision)
                    before = reset_peak(case.device)
                    functions[name] = contender.function(which)
                except Exception as error:
                    row |= {"status": "failed", "reason": first_line(error)}
                    continue
                peak = torch.cuda.max_memory_allocated() - before if before is not None else None
                row |= {"status": "measured", "times_ms": [], "backend": contender.backend}
                row |= {"peak_bytes": peak, **contender.facts}
            for number_of_round in range(rounds):
                if number_of_round and time.monotonic() > deadline:
                    break
                for name, function in functions.items():
                    times = time_passes(function, FEWEST_PASSES, case.device)
                    more = int(1e3 * effort * SECONDS_OF_PASSES / min(times))
                    more = min(MOST_PASSES, more) - FEWEST_PASSES
                    times += time_passes(function, max(0, more), case.device)
                    rows[name, which]["times_ms"] += times
    for row in rows.values():
        if row["status"] == "measured":
            row["median_ms"] = statistics.median(row["times_ms"])
            row["least_ms"] = min(row["times_ms"])
    return list(rows.values())


def reset_peak(device):
    """Bytes in use on the GPU, from which the peak counts."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def markdown(bench, results):
    """Machine and times."""
    parts = [f"# {bench.title}: times and memory", bench_report.describe_runs(results["runs"])]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        parts.append(f"## Case {case}: {bench.sizes.format(**rows[0])}\n\n{table(rows, bench)}")
    over = f" over the number of {bench.per}" if bench.per else ""
    legend = f" {bench.legend}" if bench.legend else ""
    parts.append(
        f"Milliseconds of a pass{over}, median / least of all rounds, in which the contenders take "
        f"turns; the gain is the ratio of a contender's least to that of ours.{legend}"
    )
    return "\n\n".join(parts) + "\n"


def table(rows, bench):
    measured = [row for row in rows if row["status"] == "measured"]
    columns = {
        head: tell for head, tell in bench.columns.items() if any(tell(row) for row in measured)
    }
    body = []
    for row in rows:
        cells = [row["contender"], row["precision"], row["pass"]]
        if row["status"] != "measured":
            body.append([*cells, f"{row['status']}: {row['reason']}"])
            continue
        gain = ""
        for other in rows:
            same = all(other[key] == row[key] for key in ("precision", "pass"))
            if same and other["contender"] == "ours" and other["status"] == "measured":
                gain = number(row["least_ms"] / other["least_ms"])
        peak = row["peak_bytes"]
        count = row[bench.per] if bench.per else 1
        times = f"{number(row['median_ms'] / count)} / {number(row['least_ms'] / count)}"
        memory = "" if peak is None else number(peak / 2**20)
        more = [tell(row) for tell in columns.values()]
        body.append([*cells, times, *more, gain, memory, row["backend"] or ""])
    headers = [
        "contender",
        "precision",
        "pass",
        "median / least, ms",
        *columns,
        "gain",
        "peak, MiB",
        "backend",
    ]
    return tabulate(body, headers, "github", disable_numparse=True)


def make_parser(bench):
    parser = argparse.ArgumentParser(
        description=bench.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=bench.cases)
    parser.add_argument(
        "--contenders", nargs="+", choices=bench.contenders, default=list(bench.contenders)
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--passes", nargs="+", choices=bench.passes, default=list(bench.passes))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no case begins, nor a round of one that has one",
    )
    add_result_options(parser)
    return parser


def command(bench, options):
    """The command line of what was measured: without the paths of this machine."""
    words = [bench.script]
    for name in ("cases", "contenders", "precisions", "passes", "rounds", "budget"):
        value = getattr(options, name)
        if value != make_parser(bench).get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words + (["--tiny"] if options.tiny else []))


def run(bench, options):
    """Measure and write; return the exit status."""
    if options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, expected at least 1")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    cases = options.cases or [name for name, case in bench.cases.items() if case.device == device]
    for name in cases:
        if bench.cases[name].device == "cuda" and not on_gpu:
            raise ValueError(f"--cases: {name} needs an NVIDIA GPU, and torch sees none")
    here = describe_machine()
    gpu_file = any(bench.cases[name].device == "cuda" for name in cases)
    stem = f"{file_stem(here, gpu_file)}-{bench.part}{'-tiny' if options.tiny else ''}"
    path = options.output / f"{stem}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    empty = {"runs": [], "rows": [], "accuracy": []}
    earlier = bench_report.read_results(path) if path.exists() else empty

    begin = time.monotonic()
    this_run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit_of(ROOT),
        "command": command(bench, options),
        "machine": here,
        "versions": versions(),
        "interrupted": None,
    }
    rows = []

    def save():
        this_run["seconds"] = time.monotonic() - begin
        results = bench_report.merged(earlier, {"runs": [this_run], "rows": rows, "accuracy": []})
        bench_report.write_text(path, bench_report.as_json(results))
        text = markdown(bench, results)
        bench_report.write_text(path.with_suffix(".md"), text)
        return text

    try:
        for case, precision in planned(bench, options, cases):
            if time.monotonic() > begin + options.budget:
                print(f"--budget is spent before case {case.name}", file=sys.stderr)
                this_run["interrupted"] = "budget"
                break
            print(f"case {case.name}, {precision}", file=sys.stderr, flush=True)
            rows += measure(
                bench.make,
                case,
                precision,
                contenders_of(case, options.contenders),
                options.passes,
                options.rounds,
                0.02 if options.tiny else 1.0,
                begin + options.budget,
            )
            save()
    except KeyboardInterrupt:
        print("stopped; the cases that are done are kept", file=sys.stderr)
        this_run["interrupted"] = "KeyboardInterrupt"
    if rows:
        print(save())
        print(f"written: {options.output / stem}.*", file=sys.stderr)
    if this_run["interrupted"] == "KeyboardInterrupt":
        return 130
    return 1 if any(row["status"] == "failed" and row["contender"] == "ours" for row in rows) else 0


def planned(bench, options, names):
    """Each case with each precision, the number of threads set."""
    for name in names:
        case = dataclasses.replace(bench.cases[name], **(bench.tiny if options.tiny else {}))
        if case.device == "cpu":
            torch.set_num_threads(case.threads)
        for precision in options.precisions or case.precisions:
            yield case, precision


def contenders_of(case, names):
    """Those of `names` that a case has."""
    has = getattr(case, "contenders", names)
    return [
        name
        for name in names
        if name in has and not (case.device == "cpu" and name.endswith(GPU_ALONE))
    ]


def main(bench, arguments=None):
    try:
        return run(bench, make_parser(bench).parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
