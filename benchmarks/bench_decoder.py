"""Times and memory of our attention decoder beside SpeechBrain's, in alternating rounds.

    python benchmarks/bench_decoder.py                   # every case that this machine can run
    python benchmarks/bench_decoder.py --cases default --precisions bf16-autocast --rounds 3

Cases (B utterances, L encoder frames, N tokens; sizes of the seq2seq recipe):

    mini      B=8, L=200, N=40; librispeech_seq2seq_mini.yaml; CPU, 2 threads
    default   B=24, L=375, N=60; librispeech_seq2seq.yaml; one GPU
    large     the same with B=96

What is timed is the decoder's call under teacher forcing on random input, in training mode with the
recipe's dropout of 0.15:

    forward    the call while autograd records
    training   the forward, then the gradients of both inputs and of all parameters for a fixed
               random upstream gradient of the decoder's outputs

Contenders: ours (whose backend stands beside it), SpeechBrain's as it is (stock-eager), and on a
GPU SpeechBrain's replayed from a CUDA graph (stock-graph). In each round every contender runs in
turn, warmed up, so that what else the machine does meets all alike. The tables have the median of
all passes and the least one; gains are ratios of the least, which other programs disturb the least.
Precisions are those of bench_rnn.py. Peak memory is what PyTorch's allocator handed out at most
above inputs and parameters.

Results go to DIR/<name of the GPU or CPU>-decoder.{json,md}; a later run replaces the rows that it
measures. Keys of the JSON file:

    runs       as in bench_rnn.py
    rows       list of: run (index), case, sizes, contender, precision, pass, status (measured or
               failed), reason, and if measured times_ms (all rounds), median_ms, least_ms, backend,
               peak_bytes
    accuracy   empty
"""

import argparse
import dataclasses
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

import bench_report
import torch
from bench_report import PASSES, number
from bench_rnn import (
    PRECISIONS,
    capture,
    describe_machine,
    file_stem,
    first_line,
    time_passes,
    versions,
)
from speechbrain.nnet import RNN as stock
from tabulate import tabulate

import sb_fast_sligru
from sb_fast_sligru import machine

ROOT = Path(__file__).resolve().parents[1]
DROPOUT = 0.15
SECONDS_OF_PASSES, FEWEST_PASSES, MOST_PASSES = 0.4, 2, 20  # of a row, in each round


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the device, and the precisions measured by default."""

    name: str
    batch: int
    frames: int
    tokens: int
    features: int  # of an embedded token
    hidden: int
    attention: int
    encoder: int
    kernel: int
    device: str
    precisions: tuple
    threads: int | None = None


MINI = Case("mini", 8, 200, 40, 32, 128, 128, 128, 20, "cpu", ("fp32",), 2)
GPU_PRECISIONS = ("fp32", "tf32", "bf16-autocast", "fp16-autocast")
DEFAULT = Case("default", 24, 375, 60, 128, 1024, 1024, 512, 100, "cuda", GPU_PRECISIONS)
CASES = {
    case.name: case
    for case in (MINI, DEFAULT, dataclasses.replace(DEFAULT, name="large", batch=96))
}
TINY = {"batch": 2, "frames": 9, "tokens": 3, "features": 4, "hidden": 8, "attention": 8}
TINY |= {"encoder": 6, "kernel": 2, "threads": 1}
CONTENDERS = {
    "ours": sb_fast_sligru.AttentionalRNNDecoder,
    "stock-eager": stock.AttentionalRNNDecoder,
    "stock-graph": stock.AttentionalRNNDecoder,
}


class Contender:
    """A decoder with its inputs, one function a pass."""

    def __init__(self, name, case, precision):
        torch.manual_seed(0)
        self.name, self.device, self.precision = name, case.device, precision
        options = {"device": case.device, "dtype": precision.dtype}
        self.net = CONTENDERS[name](
            rnn_type="gru",
            attn_type="location",
            hidden_size=case.hidden,
            attn_dim=case.attention,
            num_layers=1,
            enc_dim=case.encoder,
            input_size=case.features,
            channels=10,
            kernel_size=case.kernel,
            dropout=DROPOUT,
        ).to(**options)
        self.inputs = [
            torch.randn(case.batch, case.tokens, case.features, **options, requires_grad=True),
            torch.randn(case.batch, case.frames, case.encoder, **options, requires_grad=True),
            torch.ones(case.batch, device=case.device),
        ]
        self.upstream = torch.randn(case.batch, case.tokens, case.hidden, **options)
        self.passes = {"forward": self.forward, "training": self.training}

    @property
    def backend(self):
        """What runs it, and why."""
        if self.name != "ours":
            return None
        return "{} ({})".format(*self.net.choose_backend(self.device))

    def forward(self):
        with self.precision.casting(self.device):
            return self.net(*self.inputs)[0]

    def training(self):
        outputs = self.forward()
        wanted = [*self.inputs[:2], *self.net.parameters()]
        return torch.autograd.grad(outputs, wanted, self.upstream.to(outputs.dtype))

    def function(self, which):
        """What is timed, warmed up."""
        function = self.passes[which]
        if self.name == "stock-graph":
            function = capture(function)
        time_passes(function, 2, self.device)
        return function


def measure(case, precision_name, contenders, passes, rounds, effort):
    """Rows of a case in one precision."""
    precision = PRECISIONS[precision_name]
    sizes = {key: value for key, value in dataclasses.asdict(case).items() if key != "precisions"}
    del sizes["name"]
    rows = {}
    with machine.tf32(precision.tf32):
        for which in passes:
            functions = {}
            for name in contenders:
                row = {"case": case.name, **sizes, "contender": name, "precision": precision_name}
                row |= {"pass": which, "run": 0}
                rows[name, which] = row
                try:
                    contender = Contender(name, case, precision)
                    before = reset_peak(case.device)
                    functions[name] = contender.function(which)
                except Exception as error:
                    row |= {"status": "failed", "reason": first_line(error)}
                    continue
                peak = torch.cuda.max_memory_allocated() - before if before is not None else None
                row |= {"status": "measured", "times_ms": [], "backend": contender.backend}
                row |= {"peak_bytes": peak}
            for _ in range(rounds):
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


def markdown(results):
    """Machine and times."""
    parts = ["# Attention decoder: times and memory", bench_report.describe_runs(results["runs"])]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        first = rows[0]
        title = "B={batch}, L={frames}, N={tokens}, H={hidden}, A={attention}".format(**first)
        parts.append(f"## Case {case}: {title}\n\n" + table(rows))
    parts.append(
        "Milliseconds of a pass, median / least of all rounds, in which the contenders take turns; "
        "the gain is the ratio of SpeechBrain's least to ours."
    )
    return "\n\n".join(parts) + "\n"


def table(rows):
    body = []
    for row in rows:
        cells = [row["contender"], row["precision"], row["pass"]]
        if row["status"] != "measured":
            body.append([*cells, f"{row['status']}: {row['reason']}", "", "", ""])
            continue
        gain = ""
        for other in rows:
            same = all(other[key] == row[key] for key in ("precision", "pass"))
            if same and other["contender"] == "ours" and other["status"] == "measured":
                gain = number(row["least_ms"] / other["least_ms"])
        peak = row["peak_bytes"]
        times = f"{number(row['median_ms'])} / {number(row['least_ms'])}"
        memory = "" if peak is None else number(peak / 2**20)
        body.append([*cells, times, gain, memory, row["backend"] or ""])
    headers = [
        "contender",
        "precision",
        "pass",
        "median / least, ms",
        "gain",
        "peak, MiB",
        "backend",
    ]
    return tabulate(body, headers, "github", disable_numparse=True)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=ROOT / "benchmarks" / "results"
    )
    parser.add_argument(
        "--commit",
        default=os.environ.get("BENCH_COMMIT"),
        help="for a machine without git (or set BENCH_COMMIT)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="sizes that only show that everything runs"
    )
    return parser


def command(options):
    """The command line of what was measured: without the paths of this machine."""
    words = ["bench_decoder.py"]
    for name in ("cases", "contenders", "precisions", "passes", "rounds"):
        value = getattr(options, name)
        if value != make_parser().get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words + (["--tiny"] if options.tiny else []))


def run(options):
    """Measure and write; return the exit status."""
    if options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, expected at least 1")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    cases = options.cases or [name for name, case in CASES.items() if case.device == device]
    for name in cases:
        if CASES[name].device == "cuda" and not on_gpu:
            raise ValueError(f"--cases: {name} needs an NVIDIA GPU, and torch sees none")
    here = describe_machine()
    gpu_file = any(CASES[name].device == "cuda" for name in cases)
    stem = f"{file_stem(here, gpu_file)}-decoder{'-tiny' if options.tiny else ''}"
    path = options.output / f"{stem}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    empty = {"runs": [], "rows": [], "accuracy": []}
    earlier = bench_report.read_results(path) if path.exists() else empty

    begin = time.monotonic()
    rows = []
    for name in cases:
        case = dataclasses.replace(CASES[name], **(TINY if options.tiny else {}))
        contenders = options.contenders
        if case.device == "cpu":
            torch.set_num_threads(case.threads)
            contenders = [name for name in contenders if name != "stock-graph"]
        for precision in options.precisions or case.precisions:
            effort = 0.02 if options.tiny else 1.0
            rows += measure(case, precision, contenders, options.passes, options.rounds, effort)
    this_run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit_of(ROOT),
        "command": command(options),
        "machine": here,
        "versions": versions(),
        "interrupted": None,
        "seconds": time.monotonic() - begin,
    }
    results = bench_report.merged(earlier, {"runs": [this_run], "rows": rows, "accuracy": []})
    bench_report.write_text(path, bench_report.as_json(results))
    text = markdown(results)
    bench_report.write_text(path.with_suffix(".md"), text)
    print(text)
    print(f"written: {options.output / stem}.*", file=sys.stderr)
    return 1 if any(row["status"] == "failed" and row["contender"] == "ours" for row in rows) else 0


def main(arguments=None):
    try:
        return run(make_parser().parse_args(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
