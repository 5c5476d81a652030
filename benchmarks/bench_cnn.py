"""Times and memory of our CRDNN's CNN beside SpeechBrain's, in alternating rounds.

    python benchmarks/bench_cnn.py                   # every case that this machine can run
    python benchmarks/bench_cnn.py --cases default --precisions bf16-autocast --rounds 3

Cases (B utterances, T frames of F features, channels of the blocks, time pooling):

    mini      B=8, T=400, F=40, [16], 2; librispeech_seq2seq_mini.yaml; CPU, 2 threads
    two       B=4, T=400, F=40, [32, 64], 4; CPU, 2 threads
    default   B=24, T=1501, F=40, [128, 256], 4; librispeech_seq2seq.yaml; one GPU
    large     the same with B=96

What is timed is the call of a CRDNN without RNN and DNN on random input, in training mode with the
recipe's dropout of 0.15:

    forward    the call while autograd records
    training   the forward, then the gradients of all parameters for a fixed random upstream
               gradient of the output; features need none, as in the recipes

Contenders: ours (whose backend stands beside it) and SpeechBrain's (stock-eager), and on a GPU both
with cuDNN's search for the fastest convolution (ours-search, stock-search), which the recipes leave
off: it searches anew for each length.

How it is measured, and the result files (DIR/<name of the GPU or CPU>-cnn.{json,md}), are
bench_rounds.py's.
"""

import contextlib
import dataclasses
import sys

import bench_rounds
import torch
from speechbrain.lobes.models.CRDNN import CRDNN

import sb_fast_sligru

DROPOUT = 0.15


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the device, and the precisions measured by default."""

    name: str
    batch: int
    frames: int
    features: int
    channels: tuple
    time_pooling: int
    device: str
    precisions: tuple
    threads: int | None = None


MINI = Case("mini", 8, 400, 40, (16,), 2, "cpu", ("fp32",), 2)
GPU_PRECISIONS = ("fp32", "tf32", "bf16-autocast", "fp16-autocast")
DEFAULT = Case("default", 24, 1501, 40, (128, 256), 4, "cuda", GPU_PRECISIONS)
CASES = {
    case.name: case
    for case in (
        MINI,
        dataclasses.replace(MINI, name="two", batch=4, channels=(32, 64), time_pooling=4),
        DEFAULT,
        dataclasses.replace(DEFAULT, name="large", batch=96),
    )
}
TINY = {"batch": 2, "frames": 9, "features": 8, "channels": (4, 4), "threads": 1}
CONTENDERS = {
    "ours": sb_fast_sligru.CRDNN,
    "stock-eager": CRDNN,
    "ours-search": sb_fast_sligru.CRDNN,
    "stock-search": CRDNN,
}


@contextlib.contextmanager
def searching(on):
    """cuDNN's search for the fastest convolution, on or off."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Contender(bench_rounds.Contender):
    """A CNN with its input, one function a pass."""

    def __init__(self, name, case, precision):
        torch.manual_seed(0)
        self.name, self.device, self.precision = name, case.device, precision
        options = {"device": case.device, "dtype": precision.dtype}
        self.net = CONTENDERS[name](
            input_shape=[None, None, case.features],
            cnn_blocks=len(case.channels),
            cnn_channels=case.channels,
            inter_layer_pooling_size=[2] * len(case.channels),
            time_pooling=True,
            time_pooling_size=case.time_pooling,
            dropout=DROPOUT,
            rnn_layers=0,
            dnn_blocks=0,
        ).to(**options)
        self.x = torch.randn(case.batch, case.frames, case.features, **options)
        with torch.no_grad():
            shape = self.net(self.x[:1]).shape
        self.upstream = torch.randn(case.batch, *shape[1:], **options)

    @property
    def backend(self):
        """What runs it, and why."""
        if not self.name.startswith("ours"):
            return None
        return "{} ({})".format(*self.net.choose_backend(self.device, self.x.dtype))

    def forward(self):
        with self.precision.casting(self.device), searching(self.name.endswith("-search")):
            return self.net(self.x)

    def training(self):
        output = self.forward()
        with searching(self.name.endswith("-search")):
            return torch.autograd.grad(
                output, list(self.net.parameters()), self.upstream.to(output.dtype)
            )


BENCH = bench_rounds.Bench(
    script="bench_cnn.py",
    description=__doc__,
    part="cnn",
    title="CNN of the CRDNN",
    sizes="B={batch}, T={frames}, F={features}, channels {channels}, time pooling {time_pooling}",
    cases=CASES,
    tiny=TINY,
    contenders=tuple(CONTENDERS),
    make=Contender,
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
