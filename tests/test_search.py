"""Beam search and greedy search against SpeechBrain's own, with the same weights and scorers."""

import concurrent.futures
import contextlib
import copy
import itertools
import math

import pytest
import torch
from fuzz import draw_cases
from speechbrain.decoders import seq2seq as stock
from speechbrain.decoders.scorer import (
    CoverageScorer,
    CTCScorer,
    LengthScorer,
    RNNLMScorer,
    ScorerBuilder,
)
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.nnet import RNN
from speechbrain.nnet.linear import Linear
from torch.utils._python_dispatch import TorchDispatchMode

import sb_fast_sligru
from sb_fast_sligru._replay import Replay
from sb_fast_sligru.ops import _backends, _few_rows
from sb_fast_sligru.search import _replayed as replayed
from sb_fast_sligru.search import build

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, ENCODER, BLANK, BOS, EOS = 11, 9, 0, 1, 2
SIZES = {
    "rnn_type": "gru",
    "attn_type": "location",
    "hidden_size": 12,
    "attn_dim": 10,
    "num_layers": 1,
    "enc_dim": ENCODER,
    "input_size": 7,
    "channels": 3,
    "kernel_size": 4,
}
ENDS = {"bos_index": BOS, "eos_index": EOS, "min_decode_ratio": 0.0, "max_decode_ratio": 1.0}
FRAMES = (21, 17, 9)
BEAM, GREEDY = "S2SRNNBeamSearcher", "S2SRNNGreedySearcher"


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """The weights are small; larger ones run the operator."""
    monkeypatch.setattr(_few_rows, "MIN_WEIGHTS", 0)


@pytest.fixture
def warned(monkeypatch):
    """The reasons for SpeechBrain's search, each of which is told once in a process."""
    reasons = set()
    monkeypatch.setattr(_backends, "_warned", reasons)
    return reasons


class Model:
    """Random weights, of which hypotheses differ in score and length."""

    def __init__(
        self, seed=0, vocabulary=VOCABULARY, cls=sb_fast_sligru.AttentionalRNNDecoder, **sizes
    ):
        torch.manual_seed(seed)
        sizes = SIZES | sizes
        self.vocabulary = vocabulary
        self.parts = {
            "embedding": torch.nn.Embedding(vocabulary, 7),
            "decoder": cls(**sizes).eval(),
            "linear": Linear(input_size=12, n_neurons=vocabulary),
        }
        with torch.no_grad():
            for part in self.parts.values():
                for name, parameter in part.named_parameters():
                    if parameter.ndim == 1:
                        parameter.normal_(std=0.3)
                    elif "mlp_attn" in name or "conv_loc" in name:
                        parameter.normal_()
            self.parts["linear"].w.weight.mul_(4)
            self.parts["linear"].w.bias[EOS] += 2
        self.ctc = Linear(input_size=ENCODER, n_neurons=vocabulary)
        self.lm = RNNLM(
            output_neurons=vocabulary, embedding_dim=5, rnn_neurons=6, dnn_neurons=6, dropout=0.0,
            return_hidden=True,
        )  # fmt: skip

    def scorer(self, full=(), partial=(), **options):
        kinds = {
            "coverage": (0.7, lambda: CoverageScorer(self.vocabulary)),
            "ctc": (0.4, lambda: CTCScorer(self.ctc, BLANK, EOS)),
            "rnnlm": (0.5, lambda: RNNLMScorer(self.lm, temperature=1.2)),
            "length": (0.3, lambda: LengthScorer(self.vocabulary)),
        }
        return ScorerBuilder(
            {name: kinds[name][0] for name in (*full, *partial)},
            [kinds[name][1]() for name in full],
            [kinds[name][1]() for name in partial],
            **options,
        )

    def search(self, cls, full=(), partial=(), **options):
        if full or partial:
            options["scorer"] = self.scorer(full, partial)
        return cls(**self.parts, **(ENDS | options)).eval()

    def pair(self, name=BEAM, **options):
        """SpeechBrain's search and ours."""
        return tuple(
            self.search(getattr(package, name), **options) for package in (stock, sb_fast_sligru)
        )


def make_states(frames=FRAMES, seed=5, device="cpu"):
    """Encoder states [B, T, ENCODER], padded by noise, and relative lengths."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(frames), max(frames), ENCODER, generator=generator)
    return states.to(device), (torch.tensor(frames) / max(frames)).to(device)


def alone(search, states, wav_len):
    """The outputs of SpeechBrain's search for each utterance without padding."""
    frames = torch.round(states.shape[1] * wav_len).int().tolist()
    return [
        search(states[row : row + 1, :count], torch.ones(1)) for row, count in enumerate(frames)
    ]


def assert_same(ours, theirs):
    """Outputs of two searches: hypotheses are equal, numbers close."""
    hyps, lengths, scores, log_probs = ours
    their_hyps, *theirs = theirs
    if isinstance(hyps, torch.Tensor):
        assert torch.equal(hyps, their_hyps)
    else:
        assert hyps == their_hyps
    for found, expected in zip((lengths, scores, log_probs), theirs, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_same_as_alone(ours, alone):
    """The outputs for a batch and those for each utterance, whose padding is less."""
    hyps, lengths, scores, log_probs = ours
    tokens = log_probs.shape[-1]
    for row, (their_hyps, their_lengths, their_scores, their_log_probs) in enumerate(alone):
        longest = their_log_probs.shape[-1]
        if isinstance(hyps, torch.Tensor):
            assert torch.equal(hyps[row, :, :longest], their_hyps[0])
            assert not hyps[row, :, longest:].any()
        else:
            assert hyps[row] == their_hyps[0]
        pairs = (
            (lengths[row] * tokens, their_lengths[0] * longest),
            (scores[row], their_scores[0]),
            (log_probs[row, ..., :longest], their_log_probs[0]),
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# SpeechBrain's searcher -------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "coverage": {"full": ("coverage",)},
    "ctc": {"partial": ("ctc",)},
    "full-ctc": {"full": ("ctc",)},
    "rnnlm": {"full": ("rnnlm",)},
    "all": {"full": ("coverage", "rnnlm"), "partial": ("ctc",)},
    "length": {"full": ("length",), "length_normalization": False},
    "no-length-normalization": {"length_normalization": False, "full": ("coverage",)},
    "temperature": {"temperature": 1.7},
    "no-eos-threshold": {"using_eos_threshold": False},
    "eos-threshold": {"eos_threshold": 1.05},
    "max-attn-shift": {"using_max_attn_shift": True, "max_attn_shift": 3},
    "min-decode-ratio": {"min_decode_ratio": 0.4},
    "max-decode-ratio": {"max_decode_ratio": 0.3},
    "one-token": {"max_decode_ratio": 0.12},
    "minus-inf": {"minus_inf": -50.0, "min_decode_ratio": 0.3},
    "bos-is-eos": {"bos_index": EOS},
    "recipe": {
        "full": ("coverage",),
        "partial": ("ctc",),
        "temperature": 1.25,
        "using_max_attn_shift": True,
        "max_attn_shift": 8,
    },
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@each_option
@pytest.mark.parametrize("beam", [1, 4, 11])
def test_an_utterance(options, beam):
    for seed in range(3):
        theirs, ours = Model(seed).pair(beam_size=beam, **options)
        states, wav_len = make_states((16,), seed)
        assert ours.choose_backend() == ("shared", "the fastest")
        assert_same(ours(states, wav_len), theirs(states, wav_len))


@each_option
def test_a_batch(options):
    for beam, topk, seed in ((1, 1, 0), (4, 3, 1), (8, 8, 2)):
        options = options | {"beam_size": beam, "return_topk": topk > 1, "topk": topk}
        theirs, ours = Model(seed).pair(**options)
        states, wav_len = make_states()
        assert_same_as_alone(ours(states, wav_len), alone(theirs, states, wav_len))
        states, wav_len = make_states((13, 13))
        assert_same(ours(states, wav_len), theirs(states, wav_len))


@pytest.mark.parametrize("length_normalization", [True, False])
def test_who_ends_in_the_last_step_is_there_twice(length_normalization):
    """In SpeechBrain's lists, once without its score where lengths are not normalised."""
    twice = 0
    for seed in range(4):
        model = Model(seed)
        with torch.no_grad():
            model.parts["linear"].w.bias[EOS] += 4
        theirs, ours = model.pair(
            beam_size=5,
            topk=5,
            return_topk=True,
            using_eos_threshold=False,
            length_normalization=length_normalization,
            max_decode_ratio=0.07,
        )
        states, wav_len = make_states((16,), seed)
        found = ours(states, wav_len)
        assert_same(found, theirs(states, wav_len))
        twice += 5 - len({tuple(hyp) for hyp in found[0][0].tolist()})
    assert twice > 0


def test_hypotheses_end_where_they_should():
    """What the tests above compare is not the same for all, and not the limit's."""
    lengths = set()
    for seed in range(3):
        _, ours = Model(seed).pair(beam_size=4)
        for hyp in ours(*make_states())[0]:
            lengths.add(len(hyp))
    assert len(lengths) > 2 and min(lengths) < 6, lengths


def test_a_batch_that_needs_no_limit_is_speechbrains():
    """Of different lengths: all end before the shortest's limit."""
    for seed in range(3):
        model = Model(seed)
        with torch.no_grad():
            model.parts["linear"].w.bias[EOS] += 4
        theirs, ours = model.pair(beam_size=4, full=("coverage",), partial=("ctc",))
        assert_same(ours(*make_states()), theirs(*make_states()))


@pytest.mark.parametrize("scaling", [0.6, 1.9])
def test_speechbrains_decoder_and_scaling(scaling):
    theirs, ours = Model(1, cls=RNN.AttentionalRNNDecoder, scaling=scaling).pair(beam_size=5)
    assert ours.choose_backend()[0] == "shared"
    assert_same_as_alone(ours(*make_states()), alone(theirs, *make_states()))


def test_large_beam():
    theirs, ours = Model(3, vocabulary=90).pair(
        beam_size=80, full=("coverage",), partial=("ctc",), topk=5, return_topk=True
    )
    states, wav_len = make_states((12,))
    assert_same(ours(states, wav_len), theirs(states, wav_len))


def test_searches_do_not_see_each_other():
    _, ours = Model().pair(beam_size=4, full=("coverage", "rnnlm"), partial=("ctc",))
    first = ours(*make_states())
    ours(*make_states((30,)))
    assert_same(ours(*make_states()), first)
    assert ours.dec.attn.precomputed_enc_h is None


def test_inputs_are_left_as_they_are():
    _, ours = Model().pair(beam_size=4, full=("coverage",), partial=("ctc",))
    states, wav_len = make_states()
    before = states.clone(), wav_len.clone()
    found = ours(states, wav_len)
    assert torch.equal(states, before[0]) and torch.equal(wav_len, before[1])
    assert not any(x.requires_grad for x in found[1:])


def test_autocast():
    """In bfloat16 the scores are those of float32 to its precision."""
    theirs, ours = Model().pair(beam_size=4, full=("coverage",))
    states, wav_len = make_states((16,))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(states, wav_len), theirs(states, wav_len)
    assert found[2].dtype == expected[2].dtype
    torch.testing.assert_close(found[2], expected[2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    """Which SpeechBrain's attention does not take."""
    _, ours = Model().pair(beam_size=4, full=("coverage",))
    states, wav_len = make_states((16,))
    expected = ours(states, wav_len)
    found = ours.to(dtype)(states.to(dtype), wav_len)
    assert dtype == torch.bfloat16 or found[0] == expected[0]
    rtol = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found[2].float(), expected[2], rtol=rtol, atol=rtol)


def test_random_searches(capsys, double):
    """Sizes, options, scorers and lengths drawn anew in every run; in float64 nothing is a tie."""
    for random in draw_cases(capsys, "searches", 60):
        vocabulary = random.choice([5, 11, 40])
        beam = random.choice([beam for beam in (1, 2, 5, 8, 30) if beam <= vocabulary])
        options = {
            "beam_size": beam,
            "temperature": random.choice([0.7, 1.0, 1.25, 2.0]),
            "using_eos_threshold": random.random() < 0.5,
            "eos_threshold": random.choice([1.0, 1.5, 3.0]),
            "length_normalization": random.random() < 0.6,
            "using_max_attn_shift": random.random() < 0.5,
            "max_attn_shift": random.choice([1, 2, 5, 60]),
            "min_decode_ratio": random.choice([0.0, 0.0, 0.2, 0.6]),
            "max_decode_ratio": random.choice([0.4, 0.7, 1.0]),
            "return_topk": random.random() < 0.5,
            "topk": random.randint(1, beam),
            "full": [name for name in ("coverage", "rnnlm") if random.random() < 0.4],
            "partial": [],
        }
        if random.random() < 0.5:
            options[random.choice(["full", "partial"])].append("ctc")
        if not options["length_normalization"] and random.random() < 0.3:
            options["full"].append("length")
        sizes = {
            "attn_dim": random.randint(1, 16),
            "channels": random.randint(1, 4),
            "kernel_size": random.randint(0, 12),
        }
        frames = sorted((random.randint(3, 25) for _ in range(random.randint(1, 4))), reverse=True)
        print(vocabulary, options, sizes, frames)
        model = Model(random.randrange(1000), vocabulary=vocabulary, **sizes)
        with torch.no_grad():
            model.parts["linear"].w.bias[EOS] += random.choice([-2, 0, 2, 5])
        theirs, ours = model.pair(**options)
        states, wav_len = make_states(frames, random.randrange(1000))
        assert_same_as_alone(ours(states, wav_len), alone(theirs, states, wav_len))


# Greedy search ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"max_decode_ratio": 0.3}, {"min_decode_ratio": 0.4}, {"temperature": 1.4}],
    ids=["plain", "max-decode-ratio", "min-decode-ratio", "temperature"],
)
def test_greedy_search(options):
    lengths = set()
    for seed in range(6):
        theirs, ours = Model(seed).pair(GREEDY, **options)
        assert ours.choose_backend() == ("shared", "the fastest")
        for frames in ((13,), (13, 13)):
            results = []
            for search in (ours, theirs):
                torch.manual_seed(seed)
                results.append(search(*make_states(frames, seed)))
            assert_same(*results)
            lengths.update(map(len, results[0][0]))
        if "temperature" not in options:  # whose random numbers are the batch's
            compare_greedy(ours, theirs, make_states())
    assert len(lengths) > 1


def compare_greedy(ours, theirs, inputs):
    """A batch with each of its utterances alone."""
    hyps, lengths, scores, log_probs = ours(*inputs)
    for row, expected in enumerate(alone(theirs, *inputs)):
        tokens = expected[3].shape[2]
        assert hyps[row] == expected[0][0]
        assert lengths[row].item() * scores.shape[2] == pytest.approx(len(hyps[row]))
        torch.testing.assert_close(scores[row, :, :tokens], expected[2][0], rtol=1e-4, atol=1e-4)
        assert not scores[row, :, tokens:].any()
        torch.testing.assert_close(log_probs[row, :, :tokens], expected[3][0], rtol=1e-4, atol=1e-4)
        assert (log_probs[row, :, tokens:] == -torch.inf).all()


def test_greedy_search_without_frames():
    _, ours = Model().pair(GREEDY)
    states, wav_len = make_states()
    kept = ours(states[[0, 2]], wav_len[[0, 2]])[0]
    wav_len[1] = 0.02
    assert ours(states, wav_len)[0] == [kept[0], [], kept[1]]
    hyps, lengths, scores, log_probs = ours(states, torch.zeros(3))
    assert hyps == [[], [], []] and lengths.tolist() == [[0], [0], [0]]
    assert scores.shape == (3, 1, 0) and log_probs.shape == (3, 1, 0, VOCABULARY)
    hyps, *others = ours(torch.zeros(0, 5, ENCODER), torch.zeros(0))
    assert hyps == [] and [len(x) for x in others] == [0, 0, 0]
    with pytest.raises(ValueError, match="wav_len must be from 0 to 1"):
        ours(states, wav_len + 1)


def test_greedy_search_of_another_decoder_is_speechbrains(warned):
    theirs, ours = Model(attn_type="content").pair(GREEDY)
    with pytest.warns(UserWarning, match="search .same results.: attn_type of the decoder is"):
        found = ours(*make_states((13, 13)))
    assert_same(found, theirs(*make_states((13, 13))))


# The batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(0.0, 1.0), (0.35, 0.5)])
def test_results_are_those_of_each_utterance_alone(ratios):
    """Whatever else is in the batch, in whatever padding."""
    options = {"min_decode_ratio": ratios[0], "max_decode_ratio": ratios[1], "beam_size": 4}
    _, ours = Model(2).pair(full=("coverage", "rnnlm"), partial=("ctc",), **options)
    states, wav_len = make_states((21, 17, 9, 2))
    expected = alone(ours, states, wav_len)
    assert_same_as_alone(ours(states, wav_len), expected)
    order = [2, 0, 3, 1]
    assert_same_as_alone(ours(states[order], wav_len[order]), [expected[i] for i in order])
    padded = torch.nn.functional.pad(states, (0, 0, 0, 19), value=7.0)
    assert_same_as_alone(ours(padded, wav_len * 21 / 40), expected)


# What it costs ----------------------------------------------------------------------------------


NO_KERNEL = {"empty", "_local_scalar_dense", "detach", "unsafe_split", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts operators that compute, and how often the host reads a tensor."""

    def __init__(self):
        super().__init__()
        self.count = self.waits = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        self.waits += name in ("_local_scalar_dense", "nonzero", "is_nonzero")
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        self.count += not is_view and name not in NO_KERNEL
        if isinstance(result, torch.Tensor) and not is_view:
            self.largest = max(self.largest, result.numel())
        return result


def launches_of_a_token(search, batch, device="cpu"):
    """Operators, and reads, that one more token costs."""
    found = []
    for tokens in (4, 14):
        search.max_decode_ratio = tokens / 20 + 1e-6
        states, wav_len = make_states((20,) * batch, device=device)
        with Launches() as seen:
            search(states, wav_len)
        found.append(seen)
    return ((getattr(found[1], k) - getattr(found[0], k)) / 10 for k in ("count", "waits"))


@pytest.mark.parametrize("batch", [1, 3])
def test_operators_of_a_token(batch):
    """The GRU is seven of them on a CPU, three on a GPU.

    The host waits once more, for the copy of the candidates or of what has ended.
    """
    model = Model()
    with torch.no_grad():
        model.parts["linear"].w.bias[EOS] = -1e4
    most = {
        BEAM: (48, {"beam_size": 4, "using_max_attn_shift": True, "temperature": 1.25}),
        GREEDY: (31, {}),
    }
    for name, (limit, options) in most.items():
        theirs, ours = model.pair(name, **options)
        count, waits = launches_of_a_token(ours, batch)
        stock_count, stock_waits = launches_of_a_token(theirs, batch)
        assert count <= limit < stock_count and waits <= 1


def test_keys_are_one_an_utterance():
    """No tensor has a hypothesis' keys, nor a number for each of them."""
    sizes = {"attn_dim": 64, "hidden_size": 12}
    _, ours = Model(**sizes).pair(beam_size=10)
    with Launches() as seen:
        ours(*make_states((40,)))
    assert seen.largest <= 64 * 40


# On a GPU ---------------------------------------------------------------------------------------


def on_gpu(name, seed=0, **options):
    """Our search on a GPU."""
    model = Model(seed)
    for part in (*model.parts.values(), model.ctc, model.lm):
        part.cuda()
    return model.search(getattr(sb_fast_sligru, name), **options)


def to_host(outputs):
    return tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in outputs)


@pytest.fixture
def without_graphs():
    """Steps run as they are while the fixture's function is on."""

    @contextlib.contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replay, "__call__", lambda self, *inputs: self.function(*inputs))
            yield

    return patched


@pytest.mark.gpu
@each_option
def test_beam_search_on_a_gpu(options):
    compared = 0
    for beam, frames in ((1, (16,)), (4, FRAMES), (11, (40, 13))):
        _, ours = Model(beam).pair(beam_size=beam, **options)
        found = on_gpu(BEAM, beam, beam_size=beam, **options)(*make_states(frames, device="cuda"))
        # Where all tokens are forbidden, which of them is taken is the device's own choice.
        hyps, _, scores, log_probs = to_host(found)
        expected = ours(*make_states(frames))
        for row in (expected[2] > -1e10).nonzero().flatten().tolist():
            count = len(hyps[row])
            assert hyps[row] == expected[0][row]
            for actual, theirs in ((scores, expected[2]), (log_probs, expected[3])):
                pair = (x[row, :count] if x.ndim > 1 else x[row] for x in (actual, theirs))
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_decode_ratio": 0.3}], ids=["plain", "short"])
def test_greedy_search_on_a_gpu(options):
    for seed in range(3):
        _, ours = Model(seed).pair(GREEDY, **options)
        found = on_gpu(GREEDY, seed, **options)(*make_states(device="cuda"))
        assert_same(to_host(found), ours(*make_states()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [BEAM, GREEDY])
def test_graphs_give_the_same_bits(name, dtype, without_graphs):
    options = OPTIONS["recipe"] | {"beam_size": 6} if name == BEAM else {}
    search = on_gpu(name, seed=1, **options)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        graphed = search(*make_states(device="cuda"))
        with without_graphs():
            plain = search(*make_states(device="cuda"))
    assert graphed[0] == plain[0] and max(map(len, graphed[0])) > 3
    for ours, theirs in zip(graphed[1:], plain[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_a_token_is_few_launches_on_a_gpu():
    """The decoder's are in one graph; the rest is the choice of hypotheses."""
    model = Model()
    with torch.no_grad():
        model.parts["linear"].w.bias[EOS] = -1e4
    for part in model.parts.values():
        part.cuda()
    options = {"beam_size": 4, "using_max_attn_shift": True, "temperature": 1.25}
    search = model.search(sb_fast_sligru.S2SRNNBeamSearcher, **options)
    count, waits = launches_of_a_token(search, 2, "cuda")
    assert count <= 14 and waits <= 1


@pytest.mark.gpu
def test_memory_of_a_gpu_does_not_grow():
    search = on_gpu(BEAM, beam_size=6, **OPTIONS["recipe"])
    reserved = []
    for frames in (60, *range(20, 50)):
        search(*make_states((frames,), device="cuda"))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[2]


@pytest.mark.gpu
def test_searches_on_streams_and_threads_of_their_own():
    search = on_gpu(BEAM, beam_size=6, full=("coverage",))
    inputs = [make_states((frames,), frames, "cuda") for frames in (20, 33, 27, 41)]
    expected = [search(*pair) for pair in inputs]

    # Scorers keep what belongs to a search.
    searches = [on_gpu(BEAM, beam_size=6, full=("coverage",)) for _ in inputs]

    def run(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            return [searches[number](*inputs[number]) for _ in range(4)]

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(len(inputs)) as pool:
        for results, theirs in zip(pool.map(run, range(len(inputs))), expected, strict=True):
            for ours in results:
                assert_same(ours, theirs)


@pytest.mark.parametrize("change", ["hook", "max_norm", "own"])
def test_parts_that_are_not_plain_stay_out_of_graphs(change):
    _, ours = Model().pair(beam_size=4)
    linear = ours.fc
    if change == "hook":
        linear.w.register_forward_hook(lambda *_: None)
    elif change == "max_norm":
        linear.max_norm = 0.1
    else:
        ours.fc = torch.nn.Sequential(linear)
    assert not isinstance(replayed(ours, len), Replay)


# Output layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "no-bias", "max-norm", "hook", "inner-hook", "subclass"])
def test_output_layers(kind):
    """What is nobody's but SpeechBrain's may run as one operator; others see their calls."""

    class Doubled(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    calls = []
    model = Model(1)
    layer = model.parts["linear"]
    if kind == "no-bias":
        layer.w.bias = None
    elif kind == "max-norm":
        layer.max_norm = 0.8
    elif kind == "hook":
        layer.register_forward_hook(lambda module, inputs, out: calls.append(1) or 3 * out)
    elif kind == "inner-hook":
        layer.w.register_forward_hook(lambda module, inputs, out: calls.append(1) or 3 * out)
    elif kind == "subclass":
        layer.__class__ = Doubled
    theirs, ours = model.pair(beam_size=4)
    found = ours(*make_states((16,)))
    assert (len(calls) > 0) == ("hook" in kind)
    assert_same(found, theirs(*make_states((16,))))


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_normalization", [True, False])
def test_beam_larger_than_the_vocabulary(length_normalization):
    """A beam that holds all hypotheses finds the best of all; SpeechBrain counts others."""
    for seed in range(4):
        model = Model(seed, vocabulary=4)
        search = model.search(
            sb_fast_sligru.S2SRNNBeamSearcher,
            beam_size=300,
            topk=6,
            return_topk=True,
            using_eos_threshold=False,
            length_normalization=length_normalization,
            max_decode_ratio=0.5,
        )
        states, wav_len = make_states((8,), seed)
        hyps, _, scores, log_probs = search(states, wav_len)
        expected = every_hypothesis(model, states, 4, length_normalization)
        expected = sorted(((score, hyp) for hyp, score in expected.items()), reverse=True)
        found = []  # once each: SpeechBrain's algorithm takes twice who ends in the last step
        for hyp, score, each in zip(hyps[0].tolist(), scores[0], log_probs[0], strict=True):
            tokens = count_tokens(hyp)
            total = each.sum() / (tokens if length_normalization else 1)
            torch.testing.assert_close(total, score, rtol=1e-4, atol=1e-4)
            if (score.item(), tuple(hyp[:tokens])) not in found:
                found.append((score.item(), tuple(hyp[:tokens])))
        assert len(found) >= 3
        assert [hyp for _, hyp in found] == [hyp for _, hyp in expected[: len(found)]]
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in expected[: len(found)]], abs=1e-4
        )


def count_tokens(hyp):
    """Up to eos, included; all four if there is none."""
    return hyp.index(EOS) + 1 if EOS in hyp else 4


def every_hypothesis(model, states, limit, length_normalization):
    """Tokens of each hypothesis, up to eos or the limit -> score."""
    dec, emb, lin = (model.parts[name] for name in ("decoder", "embedding", "linear"))
    others = [token for token in range(model.vocabulary) if token != EOS]
    scores = {}
    for count in range(limit + 1):
        for start in itertools.product(others, repeat=count):
            hyp = start if count == limit else (*start, EOS)
            with torch.no_grad():
                inputs = emb(torch.tensor([[BOS, *hyp[:-1]]]))
                log_probs = lin(dec(inputs, states, torch.ones(1))[0]).log_softmax(-1)[0]
            score = sum(log_probs[i, token].item() for i, token in enumerate(hyp))
            scores[hyp] = score / len(hyp) if length_normalization else score
    return scores


def test_fewer_hypotheses_than_asked_for():
    """All have ended, or are at the limit, and the beam is not full (which takes eos twice)."""
    search = Model(vocabulary=4).search(
        sb_fast_sligru.S2SRNNBeamSearcher, beam_size=9, topk=9, return_topk=True,
        using_eos_threshold=False, max_decode_ratio=0.13,
    )  # fmt: skip
    hyps, lengths, scores, log_probs = search(*make_states((8,)))
    assert sorted(hyps[0, :5, 0].tolist()) == [0, 1, EOS, EOS, 3]
    assert torch.isfinite(scores[0, :5]).all()
    empty = scores[0] == -torch.inf
    assert empty[5:].all() and not hyps[0][empty].any() and not lengths[0][empty].any()
    assert log_probs.shape == (1, 9, 1)


@pytest.mark.parametrize("beam", [1, 3])
def test_all_hypotheses_end_at_once(beam):
    model = Model()
    with torch.no_grad():
        model.parts["linear"].w.weight.zero_()
        model.parts["linear"].w.bias.fill_(-30).index_fill_(0, torch.tensor([EOS]), 30)
    theirs, ours = model.pair(beam_size=beam, min_decode_ratio=0.2, using_eos_threshold=False)
    found = ours(*make_states())
    assert_same_as_alone(found, alone(theirs, *make_states()))
    assert [len(hyp) for hyp in found[0]] == [4, 3, 1]


@pytest.mark.parametrize("scorers", [{}, {"full": ("coverage",), "partial": ("ctc",)}])
def test_lengths_below_one_frame(scorers):
    """Such an utterance has no tokens; SpeechBrain gives NaN, or what it makes of padding."""
    theirs, ours = Model().pair(beam_size=4, **scorers)
    states, wav_len = make_states((21, 17, 9))
    wav_len[1] = 0.02
    hyps, lengths, scores, log_probs = ours(states, wav_len)
    assert hyps[1] == [] and lengths[1] == 0 and scores[1] == 0 and not log_probs[1].any()
    kept = [0, 2]
    assert_same_as_alone(
        ([hyps[i] for i in kept], lengths[kept], scores[kept], log_probs[kept]),
        alone(theirs, states[kept], wav_len[kept]),
    )


@pytest.mark.parametrize(
    "shape, share", [((2, 20, ENCODER), 0.0), ((2, 0, ENCODER), 1.0), ((2, 2, ENCODER), 1.0)]
)
@pytest.mark.parametrize("return_topk", [False, True])
def test_nothing_to_hear(shape, share, return_topk):
    """No utterance has a frame, or frames enough for a token."""
    _, ours = Model().pair(
        beam_size=4, max_decode_ratio=0.3, topk=2, return_topk=return_topk, partial=("ctc",)
    )
    hyps, lengths, scores, log_probs = ours(torch.randn(shape), torch.full((2,), share))
    if return_topk:
        assert hyps.shape == log_probs.shape == (2, 2, 0)
        assert scores.tolist() == [[0, -math.inf]] * 2 and lengths.tolist() == [[0, 0]] * 2
    else:
        assert hyps == [[], []] and log_probs.shape == (2, 0)
        assert scores.tolist() == lengths.tolist() == [0, 0]


def test_no_utterances():
    _, ours = Model().pair(beam_size=4, full=("coverage",), partial=("ctc",))
    hyps, *others = ours(torch.zeros(0, 5, ENCODER), torch.zeros(0))
    assert hyps == [] and [x.shape for x in others] == [(0,), (0,), (0, 0)]


@pytest.mark.parametrize("scorers", [{}, {"full": ("ctc",)}, {"partial": ("ctc",)}])
def test_longest_utterance_not_of_full_length(scorers):
    """SpeechBrain's CTC scores fail there, and its limits are those of the padding."""
    theirs, ours = Model().pair(beam_size=4, **scorers)
    states, _ = make_states((20, 20))
    for share in (0.7, 0.1):
        wav_len = torch.tensor([share, 0.5 * share])
        assert_same_as_alone(ours(states, wav_len), alone(theirs, states, wav_len))
        assert ours(states[:1], wav_len[:1])[0] == ours(states, wav_len)[0][:1]


GOOD = {"enc_states": (3, 11, ENCODER), "wav_len": (3,)}
REFUSED = {
    "2-D states": ({"enc_states": (3, ENCODER)}, r"enc_states must be \[batch, .*\[3, 9\]"),
    "other features": ({"enc_states": (3, 11, 8)}, r"enc_states must be .*, 9\].*\[3, 11, 8\]"),
    "lengths of another batch": ({"wav_len": (4,)}, r"wav_len must be \[3\].*\[4\]"),
    "2-D lengths": ({"wav_len": (3, 1)}, r"wav_len must be \[3\].*\[3, 1\]"),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=REFUSED)
def test_bad_shapes(changed, message):
    _, ours = Model().pair(beam_size=4)
    with pytest.raises(ValueError, match=message):
        ours(*(torch.ones(shape) for shape in (GOOD | changed).values()))


@pytest.mark.parametrize("value", [1.2, -0.2, math.nan, math.inf])
def test_bad_lengths(value):
    _, ours = Model().pair(beam_size=4)
    states, wav_len = make_states()
    wav_len[1] = value
    with pytest.raises(ValueError, match="wav_len must be from 0 to 1, but is"):
        ours(states, wav_len)


@pytest.mark.parametrize("topk", [0, 5])
def test_bad_topk(topk):
    _, ours = Model().pair(beam_size=4, topk=topk)
    with pytest.raises(ValueError, match=f"topk must be from 1 to beam_size, 4, but is {topk}"):
        ours(*make_states())


# What runs SpeechBrain's code ---------------------------------------------------------------------


def hooked(model, search):
    model.parts["decoder"].attn.register_forward_hook(lambda *_: None)


def replaced(model, search):
    model.parts["decoder"].proj = torch.nn.Sequential(model.parts["decoder"].proj)


def patched(model, search):
    search.forward_step = copy.copy(search.forward_step)


OTHERS = {
    "content": ({"attn_type": "content"}, None, "attn_type of the decoder is content"),
    "keyvalue": ({"attn_type": "keyvalue"}, None, "attn_type of the decoder is keyvalue"),
    "lstm": ({"rnn_type": "lstm"}, None, "rnn_type of the decoder is lstm"),
    "two-layers": ({"num_layers": 2}, None, "num_layers of the decoder is 2"),
    "hook": ({}, hooked, "attn of the decoder is .*LocationAwareAttention"),
    "replaced": ({}, replaced, "proj of the decoder is .*Sequential"),
    "patched": ({}, patched, "forward_step of the search is not SpeechBrain's"),
}


@pytest.mark.parametrize("sizes, change, reason", OTHERS.values(), ids=OTHERS)
def test_others_run_speechbrains_search_and_say_why(warned, sizes, change, reason):
    model = Model(**sizes)
    theirs, ours = model.pair(beam_size=3, full=("coverage",))
    if change:
        change(model, ours)
    with pytest.warns(UserWarning, match=f"SpeechBrain's search .same results.: {reason}"):
        found = ours(*make_states())
    assert_same(found, theirs(*make_states()))
    assert ours.choose_backend()[0] == "reference"


def test_subclasses_run_speechbrains_search(warned):
    class Mine(sb_fast_sligru.S2SRNNBeamSearcher):
        def forward_step(self, *arguments):
            log_probs, memory, attn = super().forward_step(*arguments)
            return log_probs.roll(1, -1), memory, attn

    class Theirs(stock.S2SRNNBeamSearcher):
        def forward_step(self, *arguments):
            log_probs, memory, attn = super().forward_step(*arguments)
            return log_probs.roll(1, -1), memory, attn

    model = Model()
    ours = model.search(Mine, beam_size=3)
    with pytest.warns(UserWarning, match="forward_step of the search is not SpeechBrain's"):
        found = ours(*make_states())
    assert_same(found, model.search(Theirs, beam_size=3)(*make_states()))
    assert found[0] != model.pair(beam_size=3)[1](*make_states())[0]


def test_subclasses_that_leave_the_methods_alone_are_ours():
    class Mine(sb_fast_sligru.S2SRNNBeamSearcher):
        def spell(self):
            return "abc"

    assert Model().search(Mine, beam_size=3).choose_backend()[0] == "shared"


def test_pure_ctc_is_speechbrains(warned):
    model = Model()
    options = {"weights": {"ctc": 1.0}, "full_scorers": [CTCScorer(model.ctc, BLANK, EOS)]}
    theirs, ours = (
        model.search(cls, beam_size=3, scorer=ScorerBuilder(**options))
        for cls in (stock.S2SRNNBeamSearcher, sb_fast_sligru.S2SRNNBeamSearcher)
    )
    with pytest.warns(UserWarning, match="without the decoder's scores"):
        found = ours(*make_states((13, 13)))
    assert_same(found, theirs(*make_states((13, 13))))


def test_speechbrains_search_can_be_forced():
    _, ours = Model().pair(beam_size=3)
    with sb_fast_sligru.backend("reference"):
        assert ours.choose_backend() == ("reference", "forced")
        ours(*make_states())
    assert ours.dec.attn.precomputed_enc_h is not None  # SpeechBrain's has run


def test_build():
    model = Model()
    for package, name in itertools.product((stock, sb_fast_sligru), (BEAM, GREEDY)):
        options = {"beam_size": 3} if name == BEAM else {}
        cls = getattr(package, name)
        found = build(cls, **model.parts, **ENDS, **options)
        assert type(found) is cls and found.dec is model.parts["decoder"]
    for other in (print, BEAM, dict):
        with pytest.raises(ValueError, match="search_class must be a class of modules, but is"):
            build(other)
