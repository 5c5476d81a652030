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
GPU SpeechBrain's replayed from a CUDA graph (stock-graph).

How it is measured, and the result files (DIR/<name of the GPU or CPU>-decoder.{json,md}), are
bench_rounds.py's.
"""

import dataclasses
import sys

import bench_rounds
import torch
from speechbrain.nnet import RNN as stock

import sb_fast_sligru

DROPOUT = 0.15


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


class Contender(bench_rounds.Contender):
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


BENCH = bench_rounds.Bench(
    script="bench_decoder.py",
    description=__doc__,
    part="decoder",
    title="Attention decoder",
    sizes="B={batch}, L={frames}, N={tokens}, H={hidden}, A={attention}",
    cases=CASES,
    tiny=TINY,
    contenders=tuple(CONTENDERS),
    make=Contender,
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
