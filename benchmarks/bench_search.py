"""Times and memory of a search with our classes beside SpeechBrain's, in alternating rounds.

    python benchmarks/bench_search.py                   # every case that this machine can run
    python benchmarks/bench_search.py --cases beam-8 --rounds 3

Cases (beam, 0 for greedy search; -xB: B utterances instead of one), T=375 encoder frames, sizes of
librispeech_seq2seq.yaml; on a CPU 8 tokens and 2 threads, on a GPU (-gpu appended) 40 tokens:

    greedy, -x8, -x16      0     greedy-gpu, -x8-gpu, -x16-gpu, -x24-gpu      0
    beam-8, -x8, -x16      8     beam-8-gpu, -x8-gpu, -x16-gpu                8
    beam-8-lm              8     with scores of its language model too
    beam-80               80     beam-80-gpu, -x8-gpu, -x16-gpu              80
                                 beam-80-lm-gpu                              80, likewise
                                 beam-80-long-gpu                            80, x16, T=875

What is timed is a whole search for random encoder states with random weights, in which eos is
impossible, so that all hypotheses have all tokens; the tables have milliseconds a token. Beam
searches score with CTC and coverage as the recipe does.

Contenders: ours (searcher, scorer and decoder), and SpeechBrain's (stock-eager).

How it is measured, and the result files (DIR/<name of the GPU or CPU>-search.{json,md}), are
bench_rounds.py's.
"""

import dataclasses
import sys

import bench_rounds
import torch
from speechbrain.decoders import scorer, seq2seq
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.RNN import AttentionalRNNDecoder

import sb_fast_sligru

BOS, EOS, BLANK = 1, 2, 0
VOCABULARY, ENCODER, EMBEDDING = 1000, 512, 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, the device, and the precisions measured by default."""

    name: str
    beam: int
    batch: int
    frames: int = 375
    tokens: int = 8
    neurons: int = 1024
    language_model: bool = False
    device: str = "cpu"
    threads: int | None = 2
    precisions: tuple = ("fp32",)


GPU = {"device": "cuda", "threads": None, "tokens": 40}


def _cases(name, beam, batches, suffix="", **sizes):
    for batch in batches:
        several = f"-x{batch}" if batch > 1 else ""
        yield Case(f"{name}{several}{suffix}", beam, batch, **sizes)


CASES = {
    case.name: case
    for case in (
        *_cases("greedy", 0, (1, 8, 16)),
        *_cases("beam-8", 8, (1, 8, 16)),
        Case("beam-8-lm", 8, 1, language_model=True),
        Case("beam-80", 80, 1),
        *_cases("greedy", 0, (1, 8, 16, 24), "-gpu", **GPU),
        *_cases("beam-8", 8, (1, 8, 16), "-gpu", **GPU),
        *_cases("beam-80", 80, (1, 8, 16), "-gpu", **GPU),
        Case("beam-80-lm-gpu", 80, 1, language_model=True, **GPU),
        Case("beam-80-long-gpu", 80, 16, frames=875, **GPU),
    )
}
TINY = {"beam": 2, "batch": 2, "frames": 9, "tokens": 3, "neurons": 8, "threads": 1}
CONTENDERS = ("ours", "stock-eager")


class Contender(bench_rounds.Contender):
    """A search with its input."""

    def __init__(self, name, case, precision):
        torch.manual_seed(0)
        self.name, self.device, self.precision = name, case.device, precision
        ours = name == "ours"
        decoder = sb_fast_sligru.AttentionalRNNDecoder if ours else AttentionalRNNDecoder
        self.decoder = decoder(
            enc_dim=ENCODER,
            input_size=EMBEDDING,
            rnn_type="gru",
            attn_type="location",
            hidden_size=case.neurons,
            attn_dim=case.neurons,
            num_layers=1,
            scaling=1.0,
            channels=10,
            kernel_size=100,
            re_init=True,
        )
        embedding = torch.nn.Embedding(VOCABULARY, EMBEDDING)
        linear = Linear(input_size=case.neurons, n_neurons=VOCABULARY)
        linear.w.bias.data[EOS] = -1e4
        ctc_linear = Linear(input_size=ENCODER, n_neurons=VOCABULARY)
        self.parts = torch.nn.ModuleList([self.decoder, embedding, linear, ctc_linear])
        self.parts.to(case.device, precision.dtype).eval()
        options = {
            "embedding": embedding,
            "decoder": self.decoder,
            "linear": linear,
            "bos_index": BOS,
            "eos_index": EOS,
            "min_decode_ratio": 0.0,
            "max_decode_ratio": case.tokens / case.frames,
        }
        classes = sb_fast_sligru if ours else seq2seq
        if case.beam:
            ctc = (sb_fast_sligru if ours else scorer).CTCScorer(
                ctc_fc=ctc_linear, blank_index=BLANK, eos_index=EOS
            )
            weights = {"coverage": 1.5, "ctc": 0.4}
            full_scorers = [scorer.CoverageScorer(vocab_size=VOCABULARY)]
            if case.language_model:
                weights["rnnlm"] = 0.5
                full_scorers.append(scorer.RNNLMScorer(self._language_model(case), 1.25))
            scorers = scorer.ScorerBuilder(weights, full_scorers, partial_scorers=[ctc])
            self.search = classes.S2SRNNBeamSearcher(
                **options,
                beam_size=case.beam,
                eos_threshold=1.5,
                using_max_attn_shift=True,
                max_attn_shift=240,
                temperature=1.25,
                scorer=scorers,
            )
        else:
            self.search = classes.S2SRNNGreedySearcher(**options)
        self.states = torch.randn(
            case.batch, case.frames, ENCODER, device=case.device, dtype=precision.dtype
        )
        self.lengths = torch.ones(case.batch, device=case.device)

    def _language_model(self, case):
        return RNNLM(
            output_neurons=VOCABULARY,
            embedding_dim=EMBEDDING,
            rnn_layers=2,
            rnn_neurons=2 * case.neurons,
            dnn_blocks=1,
            dnn_neurons=case.neurons // 2,
            dropout=0.0,
            return_hidden=True,
        ).to(case.device, self.precision.dtype)

    @property
    def backend(self):
        """What runs it, and why."""
        return "{} ({})".format(*self.search.choose_backend()) if self.name == "ours" else None

    def forward(self):
        with self.precision.casting(self.device), torch.no_grad():
            return self.search(self.states, self.lengths)


BENCH = bench_rounds.Bench(
    script="bench_search.py",
    description=__doc__,
    part="search",
    title="Search with the attention decoder",
    sizes="beam {beam}, B={batch}, T={frames}, {tokens} tokens, {neurons} neurons",
    cases=CASES,
    tiny=TINY,
    contenders=CONTENDERS,
    make=Contender,
    passes=("forward",),
    per="tokens",
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
