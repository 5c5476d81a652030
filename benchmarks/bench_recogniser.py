"""Real-time factors of the recognisers with our classes beside SpeechBrain's, in rounds.

    python benchmarks/bench_recogniser.py                  # every case that this machine can run
    python benchmarks/bench_recogniser.py --cases ctc-gpu beam-8-gpu --rounds 3
    python benchmarks/bench_recogniser.py --cases test-clean-gpu test-other-gpu dev-clean-gpu

Cases of utterances of 12.3 s, one or 16 (-x16); on a CPU with 2 threads, on a GPU (-gpu appended)
in TF32, to which SpeechBrain sets PyTorch:

    ctc       librispeech_ctc.yaml, greedy decoding
    greedy    librispeech_seq2seq.yaml, greedy search
    beam-8    likewise, beam search with CTC and coverage scores; beam-80 on a GPU

What is timed is all from waveforms to token IDs, both on the host, with the models of the YAML
files at random weights. A search has 65 tokens in 12.3 s: eos is impossible. Contenders: ours, as
the recipe's test does it (each utterance encoded alone, one search); SpeechBrain's CRDNN, SLi-GRU,
decoder, search and scorer (stock-eager), encoding the batch at once, as no utterance is padded.

Cases of whole splits, ours, on a GPU:

    test-clean-gpu, test-other-gpu    the test of librispeech_seq2seq.yaml, by beam search
    dev-clean-gpu                     its validation, by greedy search

What is timed is the recipe's evaluation, losses and error rates included, of a sample of a split's
batches, one of each 24th of them by duration; "whole split" is the mean of these times the number
of all batches. Utterances have LibriSpeech's lengths (simulated.py) and 65 tokens in 12.3 s;
batches are as the recipe makes them. Files are not read: the recipe's loaders do it meanwhile.

How it is measured, and the result files (DIR/<name of the GPU or CPU>-recogniser.{json,md}), are
bench_rounds.py's.
"""

import copy
import dataclasses
import sys
import tempfile

import bench_rounds
import torch
from speechbrain import Stage
from speechbrain.dataio.batch import PaddedBatch

sys.path.insert(0, str(bench_rounds.ROOT / "recipes/LibriSpeech"))

from sligru_recipes.corpora import simulated
from sligru_recipes.inference.batches import decode_each, encode_each, search_each
from sligru_recipes.inference.frames import count_frames
from sligru_recipes.training.brain import make_brain
from sligru_recipes.training.ctc import CTC
from sligru_recipes.training.experiment import load_hparams, parse_arguments
from sligru_recipes.training.seq2seq import Seq2Seq

SECONDS, TOKENS = 12.3, 65
RATE = simulated.SAMPLE_RATE
HPARAMS = bench_rounds.ROOT / "hparams"
BRAINS = {"ctc": CTC, "seq2seq": Seq2Seq}
STOCK = {
    "crdnn_class": "speechbrain.lobes.models.CRDNN.CRDNN",
    "rnn_class": "speechbrain.nnet.RNN.SLiGRU",
    "decoder_class": "speechbrain.nnet.RNN.AttentionalRNNDecoder",
    "valid_search_class": "speechbrain.decoders.S2SRNNGreedySearcher",
    "test_search_class": "speechbrain.decoders.S2SRNNBeamSearcher",
    "ctc_scorer_class": "speechbrain.decoders.scorer.CTCScorer",
}
OF_CTC = ("crdnn_class", "rnn_class")
CONTENDERS = ("ours", "stock-eager")
DEVICES = {"cpu": "cpu", "cuda": "cuda:0"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Which YAML's recogniser hears what, and the precisions measured by default."""

    name: str
    recogniser: str
    beam: int = 0  # 0: greedy
    batch: int = 1
    split: str = ""
    seconds: float = SECONDS
    sample: int = 24  # batches of a split
    mini: bool = False  # the model of the embedded corpus
    device: str = "cpu"
    threads: int | None = 2
    precisions: tuple = ("fp32",)
    contenders: tuple = CONTENDERS


GPU = {"device": "cuda", "threads": None, "precisions": ("tf32",)}


def _split(name, beam, batch):
    options = {"split": name, "contenders": ("ours",), **GPU}
    return Case(f"{name}-gpu", "seq2seq", beam=beam, batch=batch, **options)


CASES = {
    case.name: case
    for case in (
        Case("ctc", "ctc"),
        Case("greedy", "seq2seq"),
        Case("beam-8", "seq2seq", beam=8),
        Case("ctc-gpu", "ctc", **GPU),
        Case("ctc-x16-gpu", "ctc", batch=16, **GPU),
        Case("greedy-gpu", "seq2seq", **GPU),
        Case("greedy-x16-gpu", "seq2seq", batch=16, **GPU),
        Case("beam-8-gpu", "seq2seq", beam=8, **GPU),
        Case("beam-80-gpu", "seq2seq", beam=80, **GPU),
        _split("dev-clean", 0, 24),
        _split("test-clean", 80, 16),
        _split("test-other", 80, 16),
        Case("beam-8-x16-gpu", "seq2seq", beam=8, batch=16, **GPU),
        Case("beam-80-x16-gpu", "seq2seq", beam=80, batch=16, **GPU),
    )
}
TINY = {"seconds": 1.0, "sample": 2, "mini": True, "threads": 1}


class Words:
    """In place of a tokenizer: a word of six letters is two tokens."""

    def __call__(self, hypotheses, task):
        """The words of lists of token IDs; `task` is the tokenizer's."""
        letters = ["".join(f"{token:03d}" for token in tokens) for tokens in hypotheses]
        return [[text[at : at + 6] for at in range(0, len(text), 6)] for text in letters]


class Contender(bench_rounds.Contender):
    """A recogniser with the utterances that it hears."""

    def __init__(self, name, case, precision):
        self.name, self.device, self.precision, self.case = name, case.device, precision, case
        self.brain = brain = load(case, stock=name != "ours")
        brain.modules.to(precision.dtype).eval()
        waveform = torch.from_numpy(simulated.make_waveform(case.seconds + case.batch, 0))
        samples = round(case.seconds * RATE)
        self.signals = [waveform[n * RATE :][:samples] for n in range(case.batch)]
        with torch.no_grad():  # statistics, which a trained model has
            brain.modules.normalize.train()
            feats = brain.hparams.compute_features(self.signals[0][None].to(brain.device))
            brain.modules.normalize(feats, torch.ones(1, device=brain.device), epoch=0)
            brain.modules.normalize.eval()
        self.facts = {"audio_seconds": case.batch * case.seconds}
        if case.recogniser == "seq2seq":
            brain.modules.seq_lin.w.bias.data[brain.hparams.eos_index] = -1e4
            _, frames = count_frames(brain.hparams, round(SECONDS * RATE))
            self.search = brain.test_search if case.beam else brain.hparams.valid_search
            self.search.max_decode_ratio = (TOKENS + 0.5) / frames
        if case.split:
            self.batches = self._draw_batches()

    def _draw_batches(self):
        """The sample of a split's batches, in their order."""
        case, hparams = self.case, self.brain.hparams
        options = hparams.test_dataloader_opts if case.beam else hparams.valid_dataloader_opts
        if case.batch != options["batch_size"]:
            raise ValueError(f"the YAML has batches of {options['batch_size']}, not {case.batch}")
        data, _ = simulated.make_dataset(case.split, vars(hparams), self.brain.targets)
        data = data.filtered_sorted(sort_key="duration")
        count = -(-len(data) // case.batch)
        sample = min(case.sample, count)
        firsts = [case.batch * ((2 * n + 1) * count // (2 * sample)) for n in range(sample)]
        indices = [range(first, min(first + case.batch, len(data))) for first in firsts]
        batches = [PaddedBatch([data[index] for index in batch]) for batch in indices]
        durations = [data.data[data.data_ids[index]]["duration"] for b in indices for index in b]
        self.facts = {"audio_seconds": sum(durations), "batches": count, "sample": sample}
        if self.device == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return batches

    @property
    def backend(self):
        """What runs the search and its CTC scores."""
        if self.name != "ours" or self.case.recogniser == "ctc":
            return None
        name, reason = self.search.choose_backend()
        if not self.case.beam:
            return f"{name} ({reason})"
        scorer = self.search.scorer.partial_scorers["ctc"]
        return f"{name} ({reason}), CTC {scorer.choose_backend(self.device)[0]}"

    def forward(self):
        """Token IDs of the utterances; of a split, its loss."""
        with self.precision.casting(self.device), torch.no_grad():
            if self.case.split:
                return self._evaluate()
            return self._recognise()

    def _recognise(self):
        modules, hparams, device = self.brain.modules, self.brain.hparams, self.brain.device

        def encode(wavs):
            wavs = wavs.to(device, self.precision.dtype)
            feats = hparams.compute_features(wavs)
            states = modules.enc(modules.normalize(feats, torch.ones(len(wavs), device=device)))
            if self.case.recogniser == "ctc":
                return hparams.log_softmax(modules.ctc_lin(states).float())
            return states

        if self.name == "ours":
            states, frames = encode_each(encode, self.signals)
            if self.case.recogniser == "ctc":
                return decode_each(hparams.decoding_function, states, frames)
            found = search_each(self.search, states, frames)
        else:
            states = encode(torch.stack(self.signals))
            lengths = torch.ones(len(states), device=device)
            if self.case.recogniser == "ctc":
                return hparams.decoding_function(states, lengths)
            found = self.search(states, lengths)[0]
        most = round(TOKENS * self.case.seconds / SECONDS)
        if not all(most - 2 <= len(tokens) <= most + 1 for tokens in found):
            raise RuntimeError(f"{[*map(len, found)]} tokens, expected {most}")
        return found

    def _evaluate(self):
        brain = self.brain
        brain.wer_metric, brain.cer_metric = (
            make() for make in (brain.hparams.error_rate_computer, brain.hparams.cer_computer)
        )
        stage = Stage.TEST if self.case.beam else Stage.VALID
        # Copies, as the Brain moves what a batch has.
        losses = [brain.evaluate_batch(copy.copy(batch), stage) for batch in self.batches]
        if not torch.stack(losses).isfinite().all():
            raise RuntimeError(f"losses {losses}")
        return losses


def load(case, stock):
    """The Brain of a case's YAML, at the seed's weights."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            str(HPARAMS / f"librispeech_{case.recogniser}.yaml"),
            f"--device={DEVICES[case.device]}",
        ]
        if case.mini:
            argv += [f"--overrides={HPARAMS / f'librispeech_{case.recogniser}_mini.yaml'}"]
        argv += [f"--data_folder={folder}", f"--output_folder={folder}", "--noprogressbar"]
        if case.recogniser == "seq2seq":
            argv += ["--max_attn_shift=100000"]  # random weights attend anywhere
        if case.beam and not case.mini:
            argv += [f"--test_beam_size={case.beam}"]
        if stock:
            keys = OF_CTC if case.recogniser == "ctc" else STOCK
            argv += [f"--{key}=!name:{STOCK[key]}" for key in keys]
        hparams_file, run_opts, overrides, _ = parse_arguments(argv)
        hparams = load_hparams(hparams_file, overrides)
        return make_brain(BRAINS[case.recogniser], hparams, run_opts, Words())


def real_time_factor(row):
    """Seconds that a second of audio takes."""
    return bench_rounds.number(row["least_ms"] / 1e3 / row["audio_seconds"])


def speed(row):
    """Seconds of audio that a second hears."""
    return bench_rounds.number(1e3 * row["audio_seconds"] / row["least_ms"])


def whole_split(row):
    """Seconds of all batches."""
    if not row["split"]:
        return ""
    return f"{row['least_ms'] / 1e3 / row['sample'] * row['batches']:.1f} s"


BENCH = bench_rounds.Bench(
    script="bench_recogniser.py",
    description=__doc__,
    part="recogniser",
    title="Recognisers, from waveforms to tokens",
    sizes="librispeech_{recogniser}.yaml, beam {beam}, B={batch}",
    cases=CASES,
    tiny=TINY,
    contenders=CONTENDERS,
    make=Contender,
    passes=("forward",),
    columns={
        "real-time factor": real_time_factor,
        "s of audio a s": speed,
        "whole split": whole_split,
    },
    legend=f"Utterances have {SECONDS} s, those of a split LibriSpeech's lengths. Real-time "
    "factors and speeds are those of the least.",
)


def main(arguments=None):
    return bench_rounds.main(BENCH, arguments)


if __name__ == "__main__":
    sys.exit(main())
