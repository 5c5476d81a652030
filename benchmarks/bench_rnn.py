"""Times, memory and errors of our recurrent networks beside SpeechBrain's and cuDNN's.

    python benchmarks/bench_rnn.py                         # everything that this machine can run
    python benchmarks/bench_rnn.py --cases A-1000 B --precisions bf16 --contenders ours cudnn-gru
    python benchmarks/bench_rnn.py --accuracy              # errors against float64, no times
    python benchmarks/bench_rnn.py --check OLD.json NEW.json

Cases (B batch, L steps, I features, H hidden units):

    A     B=16, L=100 to 3000, I=1024, H=512, 4 layers, unidirectional; one GPU
    B     B=24, L=400, I=2560, H=1024, 4 layers, bidirectional; one GPU
    C     B with 120 sequences
    D     B=32, L=400, I=1024, H=2048, 1 layer, unidirectional; one GPU
    cpu   B=16, L=500 to 2000, I=80, H=512, 1 layer, 2 threads, fp32

What is timed is a whole network in training mode on random input, without dropout: projections,
BatchNorm (in cuDNN's networks: biases) and recurrence of all layers.

    forward    the call of the network while autograd records
    training   the forward, then the gradients of the input and of all parameters for a fixed random
               upstream gradient

On a GPU each pass lies between two CUDA events, and passes are queued without waiting, as a
training loop does. Warm-up passes come first. As many passes follow as fit in half a second, 2 to
50; all their times are in the JSON file, median and quartiles in the tables. A row predicted to
take longer than `--cap` seconds (warm-up and two passes, extrapolated from the shorter lengths) is
not measured and says so, like every row that comes up after `--budget` seconds.

Precisions: fp64, fp32 (TF32 off), tf32 (fp32 tensors, TF32 on in cuBLAS and cuDNN), bf16 and fp16
(modules and input converted), bf16-autocast and fp16-autocast (fp32 modules under torch.autocast).
Contenders: ours by backend, `ours-l2` (without clusters, as on GPUs that have none: in a process of
its own, limited by SB_FAST_SLIGRU_MAX_CLUSTER=1), ours and SpeechBrain's replayed from a CUDA
graph, SpeechBrain's eager and by torch.jit.script (its `--jit`), cuDNN's multi-layer GRU and LSTM
on time-major input, and `cudnn-lstm-static`: single unidirectional fp16 LSTM layers stacked here,
since PyTorch takes cuDNN's fastest kernel for these only (two a layer where bidirectional, one on
the flipped input).
Without `--precisions` each contender has its own list, so that the default run ends in time.

Peak memory is what PyTorch's allocator handed out at most: parameters, input, upstream gradient
and all that a pass makes. A step is time / (L x layers). The hop floor is the time in which the
thread blocks that share a layer can merely exchange a message as often as the recurrence forces
them to; a fraction of 1 would mean that a step costs nothing else.

Results go to DIR/<name of the GPU or CPU>.{json,md,png}. Rows that an existing file has and this
run does not measure stay, so a file can be filled by several runs; each row names its own. Exit
status 1: a row of ours failed. Keys of the JSON file:

    runs       list of: date (UTC), commit ("+" appended: modified), command, machine, versions,
               seconds, interrupted (null, or by what)
    rows       list of: run (index), case, sizes, contender, cell, precision, pass,
               status (measured, skipped, failed), reason, and if measured times_ms, median_ms,
               quartiles_ms, us_per_step, floor_fraction, peak_bytes, setup_seconds (CUDA graph),
               tf32 (matmul, cudnn: as set), backend
    accuracy   list of: run, contender, precision, sizes, status, reason, errors (h, dwx, du:
               ||x - exact|| / ||exact|| against the float64 loop; one SLi-GRU layer without W)
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench_report
import speechbrain
import torch
from bench_report import PASSES
from speechbrain.nnet import RNN as stock
from torch import nn

import sb_fast_sligru
from sb_fast_sligru import _library, machine, ops, reference

ROOT = Path(__file__).resolve().parents[1]
SECONDS_OF_PASSES, SECONDS_OF_WARM_UP = 0.5, 0.1
FEWEST_PASSES, MOST_PASSES = 2, 50
SLOW_PASS_MS = 1000  # one warm-up pass is enough

# One all-to-all of 4 bytes among the 16 blocks of a cluster through distributed shared memory,
# in us; measured on an H200 in November 2026 (CUDA 13.0).
HOP_US = 0.16
# Exchanges a step that cannot be avoided, (forward, backward): the new hidden state, and for the
# recurrent LayerNorm its statistics before it. The backward needs one for either.
HOPS = {"sligru": (2, 1), "ligru": (1, 1), "gru": (1, 1), "lstm": (1, 1)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a network and its input."""

    name: str
    batch: int
    lengths: tuple
    features: int
    hidden: int
    layers: int
    bidirectional: bool = False
    device: str = "cuda"
    threads: int | None = None  # of a CPU case

    @property
    def directions(self):
        return 2 if self.bidirectional else 1


CASES = {
    case.name: case
    for case in (
        Case("A", 16, (100, 500, 1000, 2000, 3000), 1024, 512, 4),
        Case("B", 24, (400,), 2560, 1024, 4, bidirectional=True),
        Case("C", 120, (400,), 2560, 1024, 4, bidirectional=True),
        Case("D", 32, (400,), 1024, 2048, 1),
        Case("cpu", 16, (500, 1000, 2000), 80, 512, 1, device="cpu", threads=2),
    )
}
ACCURACY_SIZES, ACCURACY_LENGTHS = {"batch": 16, "hidden": 512}, (100, 1000, 3000)
TINY = {"batch": 2, "features": 6, "hidden": 8, "threads": 1}
TINY_LENGTHS = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Of the tensors, of the matrix operands under autocast, and torch's TF32 switches."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def operands(self):
        return self.autocast or self.dtype

    def casting(self, device):
        return torch.autocast(device, self.autocast) if self.autocast else contextlib.nullcontext()


PRECISIONS = {
    "fp64": Precision(torch.float64),
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "bf16-autocast": Precision(torch.float32, autocast=torch.bfloat16),
    "fp16-autocast": Precision(torch.float32, autocast=torch.float16),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """An implementation: its cells, each with its precisions where `--precisions` is not given."""

    name: str
    cells: dict
    device: str | None = "cuda"  # None: any
    backend: str | None = None  # of our operator
    graphed: bool = False
    scripted: bool = False
    only: tuple = tuple(PRECISIONS)
    # Variables of the environment, which the library reads once: see `Bench.run_apart`.
    variables: dict = dataclasses.field(default_factory=dict)

    @property
    def apart(self):
        """Whether it needs a process of its own."""
        return not self.variables.items() <= os.environ.items()

    @property
    def warm_up(self):
        """Passes before the timed ones; TorchScript profiles, compiles, then runs."""
        return 3 if self.scripted else 1


SINGLE = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = ("bf16-autocast", "fp16-autocast")
# In order of importance: what `--budget` cuts off is at the end.
CONTENDERS = (
    Contender(
        "ours-persistent",
        {"sligru": SINGLE + AUTOCAST, "ligru": ("fp32", "bf16")},
        backend="persistent",
    ),
    Contender(
        "ours-l2",
        {"sligru": ("fp32", "bf16", "fp16"), "ligru": ()},
        backend="persistent",
        variables={"SB_FAST_SLIGRU_MAX_CLUSTER": "1"},
    ),
    Contender("cudnn-lstm-static", {"lstm": ("fp16",)}, only=("fp16",)),
    Contender("cudnn-gru", {"gru": SINGLE}),
    Contender("cudnn-lstm", {"lstm": SINGLE}),
    Contender("ours-cpu", {"sligru": ("fp32",), "ligru": ("fp32",)}, device="cpu", backend="cpu"),
    Contender("stock-eager", {"sligru": ("fp32", "bf16"), "ligru": ("fp32",)}, device=None),
    Contender(
        "ours-persistent-graph",
        {"sligru": ("fp32", "bf16"), "ligru": ()},
        backend="persistent",
        graphed=True,
    ),
    Contender(
        "ours-stepwise", {"sligru": SINGLE + ("fp64",), "ligru": ("fp32",)}, backend="stepwise"
    ),
    Contender("stock-graph", {"sligru": ("fp32", "bf16"), "ligru": ()}, graphed=True),
    Contender("stock-jit", {"sligru": ("fp32",), "ligru": ()}, scripted=True),
    Contender(
        "ours-stepwise-graph", {"sligru": ("fp32",), "ligru": ()}, backend="stepwise", graphed=True
    ),
)


class LSTMStack(nn.Module):
    """Unidirectional single-layer LSTMs, stacked by hand: see `cudnn-lstm-static` above."""

    def __init__(self, features, hidden, layers, bidirectional):
        super().__init__()
        directions = 2 if bidirectional else 1
        widths = [features] + [directions * hidden] * (layers - 1)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.LSTM(width, hidden) for _ in range(directions)) for width in widths
        )

    def forward(self, x):
        for first, *second in self.layers:
            outputs = [first(x)[0]] + [lstm(x.flip(0))[0].flip(0) for lstm in second]
            x = torch.cat(outputs, 2) if second else outputs[0]
        return x, None


def make_network(contender, cell, case):
    """The network of a case, fp32 on the CPU, in training mode."""
    torch.manual_seed(0)
    if contender.name == "cudnn-lstm-static":
        return LSTMStack(case.features, case.hidden, case.layers, case.bidirectional)
    if cell in ("gru", "lstm"):
        cls = {"gru": nn.GRU, "lstm": nn.LSTM}[cell]
        return cls(case.features, case.hidden, case.layers, bidirectional=case.bidirectional)
    name = {"sligru": "SLiGRU", "ligru": "LiGRU"}[cell]
    return getattr(sb_fast_sligru if contender.backend else stock, name)(
        hidden_size=case.hidden,
        input_shape=(case.batch, None, case.features),
        num_layers=case.layers,
        bidirectional=case.bidirectional,
    )


# ---- times


def make_pass(which, network, x, upstream, precision):
    """The function that is timed; see `forward` and `training` above."""
    wanted = [x, *network.parameters()]

    def forward():
        with precision.casting(x.device.type):
            return network(x)[0]

    def training():
        return torch.autograd.grad(forward(), wanted, upstream)

    return {"forward": forward, "training": training}[which]


def capture(function):
    """Record `function` in a CUDA graph; return the graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_passes(function, count, device):
    """Milliseconds of each of `count` calls in a row."""
    if device == "cpu":
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
        return times
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def measure(contender, case, function, effort=1.0):
    """Prepare, warm up and time one pass; return the times in ms and the seconds of preparation.

    `effort` scales the time spent on passes.
    """
    begin = time.perf_counter()
    if contender.graphed:
        function = capture(function)
        torch.cuda.synchronize()
    setup = time.perf_counter() - begin
    last = time_passes(function, contender.warm_up, case.device)[-1]
    if last < SLOW_PASS_MS:  # the first pass loaded libraries; a short one leaves clocks low
        again = int(1e3 * effort * SECONDS_OF_WARM_UP / last)
        time_passes(function, max(1, min(20, again)), case.device)
    times = time_passes(function, FEWEST_PASSES, case.device)
    more = min(MOST_PASSES, int(1e3 * effort * SECONDS_OF_PASSES / times[-1])) - FEWEST_PASSES
    times += time_passes(function, max(0, more), case.device)
    return times, setup if contender.graphed else None


def predict_seconds(contender, length, before):
    """What a row of `length` steps takes at least, by the rows `before` it of fewer steps."""
    last = before[-1]
    exponent = 1.0
    if len(before) > 1:
        slope = math.log(last["median_ms"] / before[-2]["median_ms"])
        exponent = max(1.0, slope / math.log(last["time"] / before[-2]["time"]))
    ratio = length / last["time"]
    passes = (contender.warm_up + FEWEST_PASSES) * last["median_ms"] / 1e3 * ratio**exponent
    return (last["setup_seconds"] or 0) * ratio + passes


def summary(row, times, setup, peak):
    """What a row gains once it is measured."""
    median = statistics.median(times)
    step = 1e3 * median / (row["time"] * row["layers"])
    forward, backward = HOPS[row["cell"]]
    floor = HOP_US * (forward if row["pass"] == "forward" else forward + backward)
    return {
        "status": "measured",
        "times_ms": times,
        "median_ms": median,
        "quartiles_ms": statistics.quantiles(times, n=4, method="inclusive")[::2],
        "us_per_step": step,
        "floor_fraction": floor / step if row["device"] == "cuda" else None,
        "peak_bytes": peak,
        "setup_seconds": setup,
        "tf32": {
            "matmul": torch.backends.cuda.matmul.allow_tf32,
            "cudnn": torch.backends.cudnn.allow_tf32,
        },
    }


class Bench:
    """A run: what was asked for, what is measured so far."""

    def __init__(self, cap, budget, effort, save):
        self.cap = cap
        self.effort = effort
        self.deadline = time.monotonic() + budget
        self.budget = budget
        self.save = save
        self.rows = []
        self.accuracy = []

    def over_budget(self):
        return f"--budget {self.budget:g} s is spent" if time.monotonic() > self.deadline else None

    def network_rows(self, contender, cell, precision_name, case, lengths, passes):
        """Measure one network over all lengths and passes."""
        precision = PRECISIONS[precision_name]
        base = {
            "case": case.name,
            "contender": contender.name,
            "cell": cell,
            "precision": precision_name,
            "backend": contender.backend,
            **{key: value for key, value in dataclasses.asdict(case).items() if key != "lengths"},
        }
        del base["name"]
        refused = self.over_budget() or obstacle(contender, case.device, case.hidden, precision)
        network = None
        baseline = allocated(case.device)
        before = {which: [] for which in passes}
        for length in lengths:
            for which in passes:
                row = {**base, "time": length, "pass": which}
                reason = refused or self.over_budget() or self.too_slow(contender, row, before)
                if reason:
                    self.add(row | {"status": "skipped", "reason": reason})
                    continue
                try:
                    if network is None:
                        network = make_network(contender, cell, case)
                        network.to(case.device, precision.dtype)
                        if contender.scripted:
                            network = torch.jit.script(network)
                    with machine.tf32(precision.tf32), our_backend(contender):
                        measured = self.measure_row(contender, case, row, network, baseline)
                except Exception as error:  # a contender that fails is a result
                    self.add(row | {"status": "failed", "reason": first_line(error)})
                    check_gpu(case.device)
                    continue
                before[which].append(measured)
                self.add(measured)
        self.save(self)

    def too_slow(self, contender, row, before):
        if not before[row["pass"]]:
            return None
        seconds = predict_seconds(contender, row["time"], before[row["pass"]])
        cap = self.cap[row["device"]]
        return f"predicted {seconds:.0f} s, --cap is {cap:g} s" if seconds > cap else None

    def measure_row(self, contender, case, row, network, baseline):
        precision = PRECISIONS[row["precision"]]
        options = {"device": case.device, "dtype": precision.dtype}
        # cuDNN's own layout is time first, SpeechBrain's is batch first.
        lead = (case.batch, row["time"])
        lead = lead[::-1] if row["cell"] in ("gru", "lstm") else lead
        torch.manual_seed(1)
        x = torch.randn(*lead, case.features, **options, requires_grad=True)
        upstream = torch.randn(*lead, case.directions * case.hidden, **options)
        if case.device == "cuda":
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        function = make_pass(row["pass"], network, x, upstream, precision)
        times, setup = measure(contender, case, function, self.effort)
        peak = torch.cuda.max_memory_allocated() - baseline if case.device == "cuda" else None
        return row | summary(row, times, setup, peak)

    def run_apart(self, contender, options):
        """The same run of one contender, in a process that has its variables."""
        with tempfile.TemporaryDirectory() as folder:
            left = max(0.0, self.deadline - time.monotonic())
            changes = {"contenders": [contender.name], "budget": left}
            same = arguments_of(argparse.Namespace(**vars(options) | changes))
            command = [sys.executable, __file__, *same, "--output", folder]
            try:
                process = subprocess.run(
                    command, env=os.environ | contender.variables, stdout=subprocess.DEVNULL
                )
            finally:  # what it had measured when either was interrupted
                for path in Path(folder).glob("*.json"):
                    results = bench_report.read_results(path)
                    self.rows += results["rows"]
                    self.accuracy += results["accuracy"]
        if process.returncode not in (0, 1):  # 1: a row failed, which is among the results
            raise ChildProcessError(f"{contender.name}: exit status {process.returncode}")
        self.save(self)

    def measure_accuracy(self, names, precisions, device, sizes):
        """Errors of h, dwx and du, one SLi-GRU layer, ReLU; inputs are exact in all precisions."""
        torch.manual_seed(2)
        batch, steps, hidden = sizes["batch"], sizes["time"], sizes["hidden"]
        shapes = (batch, steps, 2 * hidden), (2 * hidden, hidden), (batch, steps, hidden)
        wx, u, upstream = (torch.randn(shape).bfloat16().half().to(device) for shape in shapes)
        u /= 16  # a power of two: any scale will do under a LayerNorm
        exact = gradients(
            lambda wx, u: reference.light_gru(wx, u, layer_norm=True),
            *(t.double() for t in (wx, u, upstream)),
        )
        for contender in CONTENDERS:
            if contender.name not in names:
                continue
            for name in precisions or SINGLE + AUTOCAST + ("fp64",):
                precision = PRECISIONS[name]
                row = {"contender": contender.name, "precision": name, **sizes}
                reason = self.over_budget() or obstacle(contender, device, hidden, precision)
                if reason:
                    self.add(row | {"status": "skipped", "reason": reason}, self.accuracy)
                    continue
                inputs = [t.to(precision.dtype) for t in (wx, u, upstream)]
                try:
                    with machine.tf32(precision.tf32), our_backend(contender):
                        casting = precision.casting(device)
                        results = gradients(recurrence(contender), *inputs, casting)
                except Exception as error:
                    self.add(row | {"status": "failed", "reason": first_line(error)}, self.accuracy)
                    check_gpu(device)
                    continue
                errors = {key: reference.relative_error(results[key], exact[key]) for key in exact}
                outcome = {"status": "measured", "errors": errors}
                if not all(map(math.isfinite, errors.values())):
                    outcome = {"status": "failed", "reason": f"not finite: {errors}"}
                self.add(row | outcome, self.accuracy)
        self.save(self)

    def add(self, row, rows=None):
        (self.rows if rows is None else rows).append(row | {"run": 0})
        names = ("case", "time", "cell", "contender", "precision", "pass")
        label = " ".join(str(row[key]) for key in names if key in row)
        if row["status"] != "measured":
            outcome = f"{row['status']}: {row['reason']}"
        elif "errors" in row:
            outcome = ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items())
        else:
            outcome = f"{bench_report.number(row['median_ms'])} ms ({len(row['times_ms'])} passes)"
        left = self.deadline - time.monotonic()
        print(f"[{left:4.0f} s left] {label}: {outcome}", file=sys.stderr, flush=True)


def obstacle(contender, device, hidden, precision):
    """Why our backend cannot serve a layer, or None."""
    if contender.backend is None:
        return None
    try:
        with machine.tf32(precision.tf32), our_backend(contender):
            ops.choose_backend(device, hidden, precision.operands)
    except RuntimeError as error:
        return first_line(error)
    return None


def our_backend(contender):
    return sb_fast_sligru.backend(contender.backend or "auto")


def allocated(device):
    """Bytes in use on the GPU before a network is made."""
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


class GPULost(Exception):
    """The CUDA context is broken: nothing more can be measured in this process."""


def check_gpu(device):
    """Raise GPULost if an error has broken the CUDA context."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise GPULost(first_line(error)) from error


def first_line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


# ---- errors


def recurrence(contender):
    """h of wx [B, T, 2H] and u [2H, H] as the contender computes it."""
    if contender.backend:
        return lambda wx, u: ops.light_gru(wx, u, layer_norm=True)

    def stock_loop(wx, u):
        # The layer's own forward would add W and BatchNorm, whose errors are not the question.
        layer = stock.SLiGRU_Layer(1, u.shape[1], 1, wx.shape[0]).to(u.device, u.dtype)
        del layer.u.weight
        layer.u.weight = u
        return layer._sligru_cell(wx, wx.new_zeros(wx.shape[0], u.shape[1]))

    return stock_loop


def gradients(function, wx, u, upstream, casting=None):
    wx, u = wx.detach().requires_grad_(), u.detach().requires_grad_()
    with casting or contextlib.nullcontext():
        h = function(wx, u)
    dwx, du = torch.autograd.grad(h, [wx, u], upstream.to(h.dtype))
    return {"h": h.detach(), "dwx": dwx, "du": du}


# ---- where and with what


def describe_machine():
    """GPU, driver and CPU."""
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": machine.gpu_driver() if on_gpu else None,
        "cpu": machine.processor_name(),
        "cores": os.cpu_count(),
    }


def file_stem(here, on_gpu):
    """What the files of results are called: after the GPU or the CPU."""
    name = here["gpu"] if on_gpu else "cpu " + re.sub(r"\((R|TM)\)", "", here["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "speechbrain": speechbrain.__version__,
        "sb_fast_sligru": sb_fast_sligru.__version__,
        "build": _library.build_info,
    }


# ---- command line


def select_cases(names, tiny):
    """[(case, lengths)] of names like A or A-1000."""
    chosen = []
    for name in names:
        base, _, length = name.partition("-")
        if base not in CASES:
            raise ValueError(f"--cases: got {name}, expected {', '.join(CASES)} or CASE-LENGTH")
        case = CASES[base]
        if case.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--cases: {name} needs an NVIDIA GPU, and torch sees none")
        if length and not (length.isdigit() and int(length) in case.lengths):
            allowed = ", ".join(f"{base}-{n}" for n in case.lengths)
            raise ValueError(f"--cases: got {name}, expected {base} or one of {allowed}")
        if tiny:
            chosen.append((dataclasses.replace(case, **TINY), TINY_LENGTHS))
        else:
            chosen.append((case, (int(length),) if length else case.lengths))
    return chosen


def select_contenders(names):
    """Full names of contenders; "ours" stands for all whose names begin with "ours-"."""
    known = [contender.name for contender in CONTENDERS]
    chosen = set()
    for name in names or known:
        found = [name] if name in known else [full for full in known if full.startswith(name + "-")]
        if not found:
            raise ValueError(f"--contenders: got {name}, expected {', '.join(known)}")
        chosen.update(found)
    return chosen


def add_result_options(parser):
    """The options of all benchmarks: where results go, of which commit, and whether they count."""
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


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="A, A-1000, B, C, cpu")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="or the first part of it")
    parser.add_argument("--cells", nargs="+", choices=HOPS, default=list(HOPS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument(
        "--accuracy", action="store_true", help="measure errors; times only with --cases"
    )
    parser.add_argument(
        "--cap", type=float, help="seconds a row may take (default: 8 on a GPU, 120 on a CPU)"
    )
    parser.add_argument(
        "--budget", type=float, default=530, help="seconds after which no row begins"
    )
    add_result_options(parser)
    parser.add_argument("--check", nargs=2, metavar=("OLD", "NEW"), help="exit status 1 if worse")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="of --check, relative (default: %(default)s)"
    )
    return parser


def arguments_of(options):
    """The words of a command line: without the paths of this machine."""
    words = []
    for name in ("cases", "contenders", "cells", "precisions", "passes", "cap", "budget"):
        value = getattr(options, name)
        if value != make_parser().get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words + [f"--{name}" for name in ("accuracy", "tiny") if vars(options)[name]]


def run(options):
    """Measure and write; return the exit status."""
    on_gpu = torch.cuda.is_available()
    default = [name for name, case in CASES.items() if case.device == ("cuda" if on_gpu else "cpu")]
    names = options.cases or ([] if options.accuracy else default)
    cases = select_cases(names, options.tiny)
    contenders = select_contenders(options.contenders)

    here = describe_machine()
    gpu_file = any(case.device == "cuda" for case, _ in cases) or (options.accuracy and on_gpu)
    stem = file_stem(here, gpu_file) + ("-tiny" if options.tiny else "")
    json_path = options.output / f"{stem}.json"
    options.output.mkdir(parents=True, exist_ok=True)
    empty = {"runs": [], "rows": [], "accuracy": []}
    earlier = bench_report.read_results(json_path) if json_path.exists() else empty
    begin = time.monotonic()
    this_run = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": options.commit or machine.commit_of(ROOT),
        "command": " ".join(["bench_rnn.py", *arguments_of(options)]),
        "machine": here,
        "versions": versions(),
        "interrupted": None,
    }

    def save(bench):
        this_run["seconds"] = time.monotonic() - begin
        new = {"runs": [this_run], "rows": bench.rows, "accuracy": bench.accuracy}
        results = bench_report.merged(earlier, new)
        bench_report.write_text(json_path, bench_report.as_json(results))
        return results

    cap = {"cuda": options.cap or 8, "cpu": options.cap or 120}
    bench = Bench(cap, options.budget, 0.02 if options.tiny else 1.0, save)
    try:
        measure_all(bench, options, cases, contenders, "cuda" if on_gpu else "cpu")
    except (KeyboardInterrupt, GPULost, ChildProcessError) as reason:
        this_run["interrupted"] = type(reason).__name__
        print(f"stopped; what was measured is kept. {reason}", file=sys.stderr)
    if not bench.rows and not bench.accuracy and not this_run["interrupted"]:
        raise ValueError("nothing to measure: no contender has these cells, cases and precisions")
    results = save(bench)
    text = bench_report.markdown(results)
    bench_report.write_text(options.output / f"{stem}.md", text)
    bench_report.plot(results["rows"], options.output / f"{stem}.png")
    print(text)
    print(f"written: {options.output / stem}.*", file=sys.stderr)
    if this_run["interrupted"]:
        return 130 if this_run["interrupted"] == "KeyboardInterrupt" else 1
    failed = [row for row in bench.rows + bench.accuracy if row["status"] == "failed"]
    return 1 if any(row["contender"].startswith("ours") for row in failed) else 0


def measure_all(bench, options, cases, contenders, device):
    if device == "cuda":
        # Raises the clocks; and cuBLAS takes its workspace here, not in the first peak memory.
        operands = torch.randn(2, 4096, 4096, dtype=torch.bfloat16, device=device)
        time_passes(lambda: torch.mm(*operands), 2000, device)
        del operands
    if options.accuracy:
        sizes = ACCURACY_SIZES | ({"batch": 2, "hidden": 8} if options.tiny else {})
        here = {c.name for c in CONTENDERS if has_accuracy(c, device) and not c.apart}
        for length in TINY_LENGTHS if options.tiny else ACCURACY_LENGTHS:
            lengthened = sizes | {"time": length}
            bench.measure_accuracy(contenders & here, options.precisions, device, lengthened)
    for contender in CONTENDERS:
        if contender.name not in contenders:
            continue
        networks = list(networks_of(contender, options, cases))
        if contender.apart:
            if networks or (options.accuracy and has_accuracy(contender, device)):
                bench.run_apart(contender, options)
            continue
        for cell, case, lengths, precision in networks:
            if case.threads:
                torch.set_num_threads(case.threads)
            bench.network_rows(contender, cell, precision, case, lengths, options.passes)


def has_accuracy(contender, device):
    """Whether `--accuracy` is about a contender."""
    return (
        contender.device in (None, device)
        and "sligru" in contender.cells
        and not (contender.graphed or contender.scripted)
    )


def networks_of(contender, options, cases):
    """Yield cell, case, lengths and precision of a contender's networks."""
    for cell, usual in contender.cells.items():
        for case, lengths in cases:
            if cell not in options.cells or contender.device not in (None, case.device):
                continue
            usual_here = ("fp32",) if case.device == "cpu" else usual
            for precision in options.precisions or usual_here:
                if precision in contender.only:
                    yield cell, case, lengths, precision


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    try:
        if options.check:
            return bench_report.check(*options.check, options.tolerance)
        return run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # A time limit ends a program by SIGTERM: keep what is measured then, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
