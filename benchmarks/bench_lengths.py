"""What padding costs a light GRU, with lengths and without, beside cuDNN's GRU.

    python benchmarks/bench_lengths.py                     # every case that this machine can run
    python benchmarks/bench_lengths.py --cases random-24 --rounds 3

A case is a batch of utterances of LibriSpeech's lengths, as the encoder sees them after pooling
four frames: drawn at random (random-) or neighbours in the order of their lengths (sorted-). The
network is that of the CTC recipe, four bidirectional layers of 1024 units; on a CPU one of 256.
Contenders:

    ours          with lengths: padding is neither computed nor seen
    ours-padded   without: every sequence is as long as the longest
    ours-none     without, on as many frames of speech in sequences of one length: what the batch
                  would take if none of it were padding
    gru           cuDNN's GRU by SpeechBrain's class, with lengths (packed sequences)
    gru-padded    the same without

How it is measured, and the result files (DIR/<name of the GPU or CPU>-lengths.{json,md}), are
bench_rounds.py's.
"""

import dataclasses
import sys

import bench_recogniser  # noqa: F401 (puts the recipes on the path)
import bench_rounds
import torch
from speechbrain.nnet.RNN import GRU

from sb_fast_sligru import SLiGRU
from sligru_recipes.corpora import simulated

FRAMES_PER_SECOND = 25  # after pooling four of 10 ms
FEATURES = 2560  # what the CTC recipe's CNN hands on


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch, the network, and the precisions by default."""

    name: str
    batch: int
    sorted: bool
    hidden: int = 1024
    layers: int = 4
    device: str = "cuda"
    threads: int | None = None
    precisions: tuple = ("bf16-autocast",)


CPU = {"hidden": 256, "layers": 1, "device": "cpu", "threads": 2, "precisions": ("fp32",)}
CASES = {
    case.name: case
    for case in (
        Case("random-24", 24, sorted=False),
        Case("sorted-24", 24, sorted=True),
        Case("random-96", 96, sorted=False),
        Case("sorted-96", 96, sorted=True),
        Case("random-8-cpu", 8, sorted=False, **CPU),
        Case("sorted-8-cpu", 8, sorted=True, **CPU),
    )
}
TINY = {"batch": 3, "hidden": 8, "layers": 1, "threads": 1}
CONTENDERS = ("ours", "ours-padded", "ours-none", "gru", "gru-padded")


def draw_steps(case):
    """Steps of the utterances of a batch, [B]."""
    seconds = torch.tensor(list(simulated.draw_durations("train-clean-100", 0).values()))
    if case.sorted:  # a batch from the middle, whose lengths are about the mean
        seconds = seconds.sort().values[len(seconds) // 2 :]
    return (seconds[: case.batch] * FRAMES_PER_SECOND).long()


class Contender(bench_rounds.Contender):
    """A network with a batch."""

    def __init__(self, name, case, precision):
        torch.manual_seed(0)
        self.name, self.device, self.precision = name, case.device, precision
        steps = draw_steps(case)
        time = int(steps.max())
        self.facts = {"padding": 1 - steps.sum().item() / (case.batch * time)}
        if name == "ours-none":
            time = round(steps.sum().item() / case.batch)
        options = {"device": case.device, "dtype": precision.dtype}
        network = GRU if name.startswith("gru") else SLiGRU
        self.net = network(
            hidden_size=case.hidden,
            input_shape=(case.batch, time, FEATURES),
            num_layers=case.layers,
            bidirectional=True,
        ).to(**options)
        self.x = torch.randn(case.batch, time, FEATURES, **options)
        self.lengths = None
        if name in ("ours", "gru"):
            self.lengths = (steps / time).to(case.device)

    def run(self):
        with self.precision.casting(self.device):
            return self.net(self.x, lengths=self.lengths)[0]

    def forward(self):
        """In evaluation mode."""
        self.net.eval()
        with torch.no_grad():
            return self.run()

    def training(self):
        """A forward and a backward pass; the gradient is that of a sum."""
        self.net.train()
        self.net.zero_grad()
        self.run().sum().backward()


def padding(row):
    """Share of the batch that is padding."""
    return f"{100 * row['padding']:.0f} %"


BENCH = bench_rounds.Bench(
    script="bench_lengths.py",
    description=__doc__,
    part="lengths",
    title="Padded batches",
    sizes="B={batch}, {layers} bidirectional layers of {hidden} units",
    cases=CASES,
    tiny=TINY,
    contenders=CONTENDERS,
    make=Contender,
    columns={"padding": padding},
    legend="Here ours is that with lengths.",
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
