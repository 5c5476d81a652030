"""A training step of the encoder on one GPU and on several, and whether their weights stay equal.

    torchrun --standalone --nproc_per_node=2 benchmarks/bench_distributed.py

The encoder is that of librispeech_seq2seq.yaml, on 24 utterances of 15 s a GPU, each GPU with its
own random ones. A step is forward, backward and Adadelta's update. On several GPUs the encoder is
what a recipe has there: DistributedDataParallel with SyncBatchNorm. The first process's GPU
takes the steps of one GPU while the others wait; both take turns, round after round. Steps are
timed as a recipe takes them, each waited for before its update, where the loss is read.

The result is DIR/<name of the GPU>-distributed.json (CPUs: of the CPU, for a look at whether it
runs): date, commit, command, machine, versions, processes, and rows, one a precision: precision,
times_ms ("one" and "several": all steps, of the slowest process), median_ms, ratio of the medians,
weights_equal (on all processes after the last step, to the bit).
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

import bench_report
import torch
from bench_rnn import PRECISIONS, add_result_options, describe_machine, file_stem, versions
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import sb_fast_sligru
from sb_fast_sligru import machine

ROOT = Path(__file__).resolve().parents[1]
FULL = {"batch": 24, "frames": 1501, "channels": (128, 256), "neurons": 1024, "layers": 4}
TINY = {"batch": 2, "frames": 9, "channels": (4, 4), "neurons": 8, "layers": 1}
STEPS, WARM_UP = 10, 3  # of a round


class Encoder:
    """An encoder with its batch and optimiser."""

    def __init__(self, sizes, device, shared):
        torch.manual_seed(0)
        self.net = sb_fast_sligru.CRDNN(
            input_shape=[None, None, 40],
            cnn_blocks=2,
            cnn_channels=sizes["channels"],
            time_pooling=True,
            time_pooling_size=4,
            rnn_class=sb_fast_sligru.SLiGRU,
            rnn_layers=sizes["layers"],
            rnn_neurons=sizes["neurons"],
            rnn_bidirectional=True,
            rnn_re_init=True,
            dnn_blocks=2,
            dnn_neurons=sizes["neurons"] // 2,
        ).to(device)
        if shared:
            sb_fast_sligru.SyncBatchNorm.take_over(self.net)
            ids = [device] if device.type == "cuda" else None
            self.net = DistributedDataParallel(self.net, device_ids=ids)
        self.optimizer = torch.optim.Adadelta(self.net.parameters(), lr=1.0, rho=0.95, eps=1e-8)
        torch.manual_seed(1 + distributed.get_rank())
        self.x = torch.randn(sizes["batch"], sizes["frames"], 40, device=device)

    def step(self, precision):
        """One update."""
        with precision.casting(self.x.device.type):
            loss = self.net(self.x).float().square().mean()
        loss.backward()
        loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def times_ms(self, precision, count):
        """Of `count` steps, from one update to the next."""
        times = []
        wait(self.x.device)
        for _ in range(count):
            start = time.perf_counter()
            self.step(precision)
            times.append(1000 * (time.perf_counter() - start))
        wait(self.x.device)
        return times

    def weights_equal(self):
        """Whether every process has the first one's, to the bit."""
        weights = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        first = weights.clone()
        distributed.broadcast(first, 0)
        same = (weights == first).all().float()
        distributed.all_reduce(same, distributed.ReduceOp.MIN)
        return bool(same)


def wait(device):
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slowest(times, device):
    """The longest time of each step over the processes."""
    times = torch.tensor(times, device=device)
    distributed.all_reduce(times, distributed.ReduceOp.MAX)
    return times.tolist()


def measure(name, rounds, sizes, device):
    """One row of the result; the same in all processes but for "one"."""
    precision = PRECISIONS[name]
    several = Encoder(sizes, device, shared=True)
    one = Encoder(sizes, device, shared=False) if distributed.get_rank() == 0 else None
    times = {"one": [], "several": []}
    with machine.tf32(precision.tf32):
        for _ in range(rounds):
            if one:
                one.times_ms(precision, WARM_UP)
                times["one"] += one.times_ms(precision, STEPS)
            distributed.barrier()
            several.times_ms(precision, WARM_UP)
            times["several"] += slowest(several.times_ms(precision, STEPS), device)
    medians = {key: statistics.median(values) for key, values in times.items() if values}
    return {
        "precision": name,
        "times_ms": times,
        "median_ms": medians,
        "ratio": medians["several"] / medians["one"] if one else None,
        "weights_equal": several.weights_equal(),
    }


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["bf16-autocast", "tf32"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    add_result_options(parser)
    return parser


def main(arguments=None):
    options = make_parser().parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        print(f"error: not started by torchrun: {__doc__.split(chr(10))[2].strip()}")
        return 2
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    sizes = TINY if options.tiny else FULL
    rows = [measure(name, options.rounds, sizes, device) for name in options.precisions]
    processes, rank = distributed.get_world_size(), distributed.get_rank()
    distributed.destroy_process_group()
    if rank == 0:
        here = describe_machine()
        report = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": options.commit or machine.commit_of(ROOT),
            "command": f"torchrun --standalone --nproc_per_node={processes} "
            f"benchmarks/bench_distributed.py --precisions {' '.join(options.precisions)} "
            f"--rounds {options.rounds}{' --tiny' if options.tiny else ''}",
            "machine": here,
            "versions": versions(),
            "processes": processes,
            "rows": rows,
        }
        tiny = "-tiny" if options.tiny else ""
        path = options.output / f"{file_stem(here, on_gpu)}-distributed{tiny}.json"
        options.output.mkdir(parents=True, exist_ok=True)
        bench_report.write_text(path, json.dumps(report, indent=1) + "\n")
        for row in rows:
            print(
                f"{row['precision']}: one {row['median_ms']['one']:.1f} ms, {processes} "
                f"{row['median_ms']['several']:.1f} ms, ratio {row['ratio']:.3f}, "
                f"weights {'equal' if row['weights_equal'] else 'DIFFER'}"
            )
    return 0 if all(row["weights_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
