"""How long 40 ms of speech take a streaming recogniser, with our classes and SpeechBrain's.

    python benchmarks/bench_streaming.py                   # every case that this machine can run
    python benchmarks/bench_streaming.py --cases encoder-gpu encoder-x16-gpu --rounds 3

Cases of one stream and of 16 in step (-x16), with the model of librispeech_ctc_streaming.yaml at
random weights; on a CPU with 2 threads, on a GPU (-gpu appended) in TF32, to which SpeechBrain sets
PyTorch:

    rnn        its 4 layers of 512 units: one step, from the state of the chunk before
    encoder    all of it, through StreamingEncoder: from samples on the host to the most probable
               token on the host; on a GPU one CUDA graph

A pass is the next chunk of a stream that goes on. Contenders: ours, and SpeechBrain's CRDNN and
SLi-GRU (stock) in the same StreamingEncoder. What a state waits for beside this, its lookahead, is
in the tables.

How it is measured, and the result files (DIR/<name of the GPU or CPU>-streaming.{json,md}), are
bench_rounds.py's.
"""

import dataclasses
import itertools
import sys
import tempfile

import bench_rounds
import torch
from bench_recogniser import DEVICES, HPARAMS, OF_CTC, STOCK  # also puts the recipes on the path
from speechbrain.nnet.containers import LengthsCapableSequential

from sb_fast_sligru import StreamingEncoder
from sligru_recipes.corpora import simulated
from sligru_recipes.training.experiment import load_hparams, parse_arguments

YAML = HPARAMS / "librispeech_ctc_streaming.yaml"
OVERRIDES = HPARAMS / "librispeech_ctc_mini.yaml"
LAYERS = ("compute_features", "normalize", "enc", "ctc_lin", "log_softmax")
SECONDS = 10.0  # of speech, again and again
WARM_UP = 10  # chunks: a stream has begun, and a graph is captured


@dataclasses.dataclass(frozen=True)
class Case:
    """Which part of the recogniser hears how many streams, and the precisions by default."""

    name: str
    part: str
    streams: int = 1
    mini: bool = False  # the model of the embedded corpus
    device: str = "cpu"
    threads: int | None = 2
    precisions: tuple = ("fp32",)


GPU = {"device": "cuda", "threads": None, "precisions": ("tf32",)}
CASES = {
    case.name: case
    for case in (
        Case("rnn", "RNN"),
        Case("rnn-x16", "RNN", streams=16),
        Case("encoder", "encoder"),
        Case("encoder-x16", "encoder", streams=16),
        Case("encoder-gpu", "encoder", **GPU),
        Case("encoder-x16-gpu", "encoder", streams=16, **GPU),
    )
}
TINY = {"mini": True, "threads": 1}
CONTENDERS = ("ours", "stock")


class Contender(bench_rounds.Contender):
    """Streams, the next chunk of which is a pass."""

    def __init__(self, name, case, precision):
        self.name, self.device, self.case, self.precision = name, case.device, case, precision
        encoder = load(case, stock=name == "stock", dtype=precision.dtype)
        stream = StreamingEncoder(encoder)
        self.facts = {"chunk_ms": 1e3 * stream.stride / simulated.SAMPLE_RATE}
        if case.part == "RNN":
            self.rnn, self.hx = encoder.enc.RNN, None
            options = {"dtype": precision.dtype, "device": case.device}
            self.chunks = itertools.repeat(
                torch.randn(case.streams, 1, int(self.rnn.fea_dim), **options)
            )
        else:
            self.stream, self.context = stream, stream.make_streaming_context()
            self.facts["lookahead_ms"] = stream.lookahead_ms
            waveform = torch.from_numpy(simulated.make_waveform(SECONDS, 0)).to(precision.dtype)
            speech = torch.stack([waveform.roll(1000 * n) for n in range(case.streams)])
            self.chunks = itertools.cycle(speech.split(stream.stride, 1))
        for _ in range(WARM_UP):
            self.forward()

    def forward(self):
        """What is known after one chunk more."""
        chunk = next(self.chunks)
        with self.precision.casting(self.device), torch.no_grad():
            if self.case.part == "RNN":
                output, self.hx = self.rnn(chunk, hx=self.hx)
                return output
            return self.stream(chunk.to(self.device), self.context).argmax(-1).tolist()


def load(case, stock, dtype):
    """The layers of the YAML, from waveforms to log-probabilities, at the seed's weights."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [str(YAML), f"--data_folder={folder}", f"--output_folder={folder}"]
        argv += [f"--overrides={OVERRIDES}"] if case.mini else []
        argv += [f"--{key}=!name:{STOCK[key]}" for key in OF_CTC] if stock else []
        hparams_file, _, overrides, _ = parse_arguments(argv)
        hparams = load_hparams(hparams_file, overrides)
    layers = {key: hparams[key].to(DEVICES[case.device]) for key in LAYERS}
    encoder = LengthsCapableSequential(**layers).to(dtype)
    waveform = torch.from_numpy(simulated.make_waveform(SECONDS, 0)).to(DEVICES[case.device], dtype)
    with torch.no_grad():  # statistics, which a trained model has
        encoder.normalize(encoder.compute_features(waveform[None]), epoch=0)
    return encoder.eval()


def share(row):
    """Of the time that a chunk lasts."""
    return f"{100 * row['least_ms'] / row['chunk_ms']:.1f} %"


def lookahead(row):
    """Milliseconds of speech that a state waits for."""
    return f"{row['lookahead_ms']:g}" if row["part"] == "encoder" else ""


BENCH = bench_rounds.Bench(
    script="bench_streaming.py",
    description=__doc__,
    part="streaming",
    title="Streams, a chunk",
    sizes="{part} of librispeech_ctc_streaming.yaml, B={streams}",
    cases=CASES,
    tiny=TINY,
    contenders=CONTENDERS,
    make=Contender,
    passes=("forward",),
    columns={"of the chunk's own time": share, "lookahead, ms": lookahead},
    legend="A pass is one chunk of each stream; shares are those of the least.",
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
