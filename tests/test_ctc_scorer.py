"""The CTC scorer against SpeechBrain's own, step by step and in whole searches."""

import pickle

import pytest
import torch
from fuzz import draw_cases
from hyperpyyaml import load_hyperpyyaml
from speechbrain.decoders import S2SRNNBeamSearcher
from speechbrain.decoders import scorer as stock
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.linear import Linear
from speechbrain.nnet.RNN import AttentionalRNNDecoder

import sb_fast_sligru
from sb_fast_sligru.reference import LOG_ZERO

pytestmark = pytest.mark.usefixtures("one_thread")

BLANK, BOS, EOS = 0, 1, 2

either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


# Steps -------------------------------------------------------------------------------------------


def build_pair(logits, lengths, dtype=torch.float32, window=0, blank=BLANK, eos=EOS):
    """SpeechBrain's scorer and ours at the beginning of a search.

    Both compute log-probabilities in float32; for float64 the softmax is replaced, and
    SpeechBrain's state takes torch's default dtype.
    """
    pair = [
        cls(torch.nn.Identity(), blank, eos, window)
        for cls in (stock.CTCScorer, sb_fast_sligru.CTCScorer)
    ]
    for scorer in pair:
        if dtype == torch.float64:
            scorer.softmax = torch.nn.LogSoftmax(-1)
        scorer.reset_mem(logits.to(dtype).clone(), lengths)
    return pair


@pytest.fixture
def default_dtype():
    """To be changed by a test."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def make_step(shape, candidates):
    """What a search gives to the scorers and takes of them, at random.

    Returns
    -------
    candidates : torch.Tensor or None
        [N, C]
    attn : torch.Tensor
        [N, T]
    index : torch.Tensor
        [B, beam]: hypothesis times V, plus token, as of the best of all.
    """
    B, T, V, beam = shape
    N = B * beam
    chosen = torch.stack([torch.randperm(V)[: candidates or V] for _ in range(N)])
    parents = torch.randint(0, beam, (B, beam))
    rows = chosen[(parents + torch.arange(B)[:, None] * beam).flatten()]
    column = torch.randint(0, rows.shape[1], (N, 1))
    tokens = rows.gather(1, column).view(B, beam)
    attn = torch.rand(N, T).softmax(-1)
    return chosen if candidates else None, attn, parents * V + tokens


def run_steps(pair, shape, candidates, steps, device="cpu"):
    """The scores of both, step by step."""
    vocabulary = shape[2]
    tokens = torch.full((shape[0] * shape[3],), BOS, device=device)
    memories = [None, None]
    for _ in range(steps):
        chosen, attn, index = (
            None if t is None else t.to(device) for t in make_step(shape, candidates)
        )
        results = []
        for i, scorer in enumerate(pair):
            scores, memory = scorer.score(tokens, memories[i], chosen, attn)
            memories[i] = scorer.permute_mem(memory, index)
            results.append(scores)
        tokens = (index % vocabulary).flatten()
        yield results


def assert_same_scores(theirs, ours, bound):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    impossible = theirs <= LOG_ZERO / 10
    assert torch.equal(impossible, ours <= LOG_ZERO / 10)
    error = (theirs - ours)[~impossible].abs().max().item() if not impossible.all() else 0
    assert error <= bound, f"error {error:.1e}, allowed {bound:.0e}"


@either_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_equals_speechbrain(capsys, default_dtype, dtype, device):
    """Shapes, lengths, windows, candidates and permutations drawn anew in every run."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("plain PyTorch, as on a CPU")
    default_dtype(dtype)
    for random in draw_cases(capsys, f"CTC scorers in {dtype} on {device}", 60):
        shape = B, T, V, beam = (
            random.randint(1, 4),
            random.randint(2, 30),
            random.randint(4, 30),
            random.randint(1, 6),
        )
        lengths = torch.randint(1, T + 1, (B,)).int()
        lengths[random.randrange(B)] = T
        window = random.choice([0, 0, 1, 3, 10])
        candidates = random.choice([None, random.randint(1, V)])
        print(shape, lengths.tolist(), window, candidates)
        logits = random.choice([0.5, 3.0]) * torch.randn(B, T, V, device=device)
        pair = build_pair(logits, lengths.to(device), dtype, window)
        bound = 1e-9 if dtype == torch.float64 else 1e-4
        steps = min(random.randint(1, 8), T)
        for theirs, ours in run_steps(pair, shape, candidates, steps, device):
            assert_same_scores(theirs, ours, bound)


@pytest.mark.parametrize("candidates", [None, 12])
def test_equals_speechbrain_in_long_utterances(candidates):
    shape = 2, 300, 50, 3
    lengths = torch.tensor([300, 171], dtype=torch.int32)
    pair = build_pair(torch.randn(2, 300, 50), lengths)
    for theirs, ours in run_steps(pair, shape, candidates, 6):
        # Log-probabilities near -1000, of which float32 has 1e-4.
        assert_same_scores(theirs, ours, 2e-3)


@pytest.mark.parametrize("blank, eos", [(-1, 2), (0, -2), (3, 2), (2, 2)])
def test_other_special_tokens(blank, eos):
    """SpeechBrain's are right for them without padding."""
    shape = 2, 12, 9, 3
    logits, lengths = torch.randn(2, 12, 9), torch.tensor([12, 12])
    pair = build_pair(logits, lengths, blank=blank, eos=eos)
    for theirs, ours in run_steps(pair, shape, None, 4):
        assert_same_scores(theirs, ours, 1e-4)


@pytest.mark.parametrize("blank", [0, 3])
@pytest.mark.parametrize("candidates", [None, 5])
def test_padding_does_not_count(blank, candidates):
    """Each utterance as if alone; without a full one SpeechBrain has a shape error."""
    B, T, V, beam = shape = 3, 20, 8, 3
    lengths = torch.tensor([13, 4, 1])
    logits = torch.randn(B, T, V)
    batch = sb_fast_sligru.CTCScorer(torch.nn.Identity(), blank, EOS)
    batch.reset_mem(logits, lengths)
    steps = [make_step(shape, candidates) for _ in range(3)]
    rows, memory, tokens = [], None, torch.full((B * beam,), BOS)
    for chosen, _, index in steps:
        scores, memory = batch.score(tokens, memory, chosen, None)
        memory, tokens = batch.permute_mem(memory, index), (index % V).flatten()
        rows.append(scores.view(B, beam, V))
    for i, length in enumerate(lengths.tolist()):
        alone = stock.CTCScorer(torch.nn.Identity(), blank, EOS)
        alone.reset_mem(logits[i : i + 1, :length].clone(), lengths[i : i + 1])
        memory, tokens = None, torch.full((beam,), BOS)
        for (chosen, _, index), row in zip(steps[:length], rows, strict=False):
            chosen = None if chosen is None else chosen.view(B, beam, -1)[i]
            scores, memory = alone.score(tokens, memory, chosen, None)
            assert_same_scores(scores, row[i], 1e-4)
            memory, tokens = alone.permute_mem(memory, index[i : i + 1]), index[i] % V


def test_a_token_that_was_no_candidate_has_its_own_state():
    """SpeechBrain goes on with the state of the first candidate."""
    logits, lengths = torch.randn(1, 10, 6), torch.tensor([10])
    next_scores = []
    for candidates in (torch.tensor([[3, 4]]), torch.tensor([[4, 3, 5]])):
        scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
        scorer.reset_mem(logits, lengths)
        _, memory = scorer.score(torch.tensor([BOS]), None, candidates, None)
        state, _ = scorer.permute_mem(memory, torch.tensor([[5]]))
        next_scores.append(state)
    assert torch.equal(*next_scores)


@either_device
def test_lengths_below_one_frame_and_more_tokens_than_frames(device):
    """Nothing but the end has a probability there, and no score is infinite or NaN."""
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
    scorer.reset_mem(torch.randn(2, 3, 6, device=device), torch.tensor([0, 1], device=device))
    tokens, memory = torch.full((4,), BOS, device=device), None
    index = torch.tensor([[4, 9], [4, 9]], device=device)
    for step in range(6):
        scores, memory = scorer.score(tokens, memory, None, None)
        assert scores.isfinite().all()
        if step == 0:
            assert (scores[:2, EOS] == 0).all()
            assert (scores[:2, EOS + 1 :] <= LOG_ZERO).all()
            assert (scores[2:, EOS + 1 :] > LOG_ZERO / 10).all()
        memory, tokens = scorer.permute_mem(memory, index), (index % 6).flatten()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_of_other_dtypes(dtype):
    """The scores are float32, as SpeechBrain's softmax is."""
    layer = Linear(input_size=5, n_neurons=6).to(dtype)
    scorer = sb_fast_sligru.CTCScorer(layer, BLANK, EOS)
    x = torch.randn(1, 9, 5).to(dtype)
    scorer.reset_mem(x, torch.tensor([9]))
    scores, _ = scorer.score(torch.tensor([BOS]), None, None, None)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    expected = stock.CTCScorer(layer, BLANK, EOS)
    expected.reset_mem(x, torch.tensor([9]))
    assert_same_scores(expected.score(torch.tensor([BOS]), None, None, None)[0], scores, 1e-4)


def test_the_encoders_states_are_not_changed():
    """SpeechBrain masks in place what it is given."""
    logits = torch.randn(2, 9, 5).log_softmax(-1)
    before = logits.clone()
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
    scorer.softmax = torch.nn.Identity()
    scorer.reset_mem(logits, torch.tensor([9, 4]))
    scorer.score(torch.full((4,), BOS), None, None, None)
    assert torch.equal(logits, before)


def test_what_is_kept():
    """Nothing has the axes frames, hypotheses and candidates at once."""
    B, T, V, beam = 2, 50, 40, 4
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
    scorer.reset_mem(torch.randn(B, T, V), torch.tensor([T, 20]))
    _, memory = scorer.score(torch.full((B * beam,), BOS), None, None, None)
    index = torch.randint(0, beam * V, (B, beam))
    for kept in (memory, scorer.permute_mem(memory, index)):
        sizes = sum(t.numel() for t in kept if isinstance(t, torch.Tensor))
        assert sizes <= B * beam * (2 * (T + 1) + V + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("candidates", [None, 6])
def test_the_host_never_waits(window, candidates):
    B, T, V, beam = 2, 20, 12, 3
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS, window)
    logits, lengths = torch.randn(B, T, V, device="cuda"), torch.tensor([T, 7]).cuda()
    steps = [
        [None if t is None else t.cuda() for t in make_step((B, T, V, beam), candidates)]
        for _ in range(3)
    ]
    tokens, memory = torch.full((B * beam,), BOS, device="cuda"), None
    torch.cuda.set_sync_debug_mode("error")
    try:
        scorer.reset_mem(logits, lengths)
        for chosen, attn, index in steps:
            scores, memory = scorer.score(tokens, memory, chosen, attn)
            memory, tokens = scorer.permute_mem(memory, index), (index % V).flatten()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scores.isfinite().all()


# Whole searches ----------------------------------------------------------------------------------


def build_search(cls, modules, scorer_options, full=False, **options):
    """SpeechBrain's beam search with a CTC scorer of a class, and a coverage scorer."""
    embedding, decoder, linear, ctc_fc, vocabulary = modules
    ctc = cls(ctc_fc, BLANK, EOS, **scorer_options)
    coverage = stock.CoverageScorer(vocabulary)
    scorers = {"full_scorers": [coverage], "partial_scorers": [ctc]}
    if full:
        scorers = {"full_scorers": [ctc, coverage]}
    scorer = stock.ScorerBuilder({"ctc": 0.4, "coverage": 0.5}, **scorers)
    return S2SRNNBeamSearcher(
        embedding=embedding,
        decoder=decoder,
        linear=linear,
        bos_index=BOS,
        eos_index=EOS,
        scorer=scorer,
        **{"min_decode_ratio": 0.0, "max_decode_ratio": 1.0, "using_eos_threshold": False}
        | options,
    )


def build_modules(vocabulary=15, features=6):
    """An attention decoder of random weights, large enough that it prefers some tokens."""
    decoder = AttentionalRNNDecoder(
        rnn_type="gru",
        attn_type="location",
        hidden_size=8,
        attn_dim=8,
        num_layers=1,
        enc_dim=features,
        input_size=5,
        channels=3,
        kernel_size=3,
    )
    linear = Linear(input_size=8, n_neurons=vocabulary)
    ctc_fc = Linear(input_size=features, n_neurons=vocabulary)
    with torch.no_grad():
        for layer in (linear, ctc_fc):
            layer.w.weight.mul_(4)
    modules = Embedding(num_embeddings=vocabulary, embedding_dim=5), decoder, linear, ctc_fc
    for module in modules:
        module.eval()
    return (*modules, vocabulary)


@either_device
def test_whole_searches_find_the_same(capsys, device):
    """Identical hypotheses; scores to 1e-4."""
    for random in draw_cases(capsys, f"searches on {device}", 12):
        modules = build_modules(vocabulary=random.randint(6, 20))
        for module in modules[:4]:
            module.to(device)
        B, T = random.randint(1, 3), random.randint(4, 14)
        encoded = torch.randn(B, T, 6, device=device)
        lengths = torch.rand(B, device=device) * 0.8 + 0.2
        lengths[0] = 1.0
        options = {
            "full": random.random() < 0.4,
            "beam_size": random.choice([1, 4, 8, 30]),
            "topk": 1,
            "length_normalization": random.random() < 0.5,
        }
        window = {"ctc_window_size": random.choice([0, 0, 4])}
        print(B, T, lengths, options, window)
        (hyps, *theirs), (found, *ours) = (
            build_search(cls, modules, window, **options)(encoded, lengths)
            for cls in (stock.CTCScorer, sb_fast_sligru.CTCScorer)
        )
        assert found == hyps
        for value, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "length, ratio, error",
    [(0.7, 0.5, RuntimeError), (0.7, 2.5, RuntimeError), (1.0, 2.5, IndexError)],
    ids=["not-full", "not-full-and-more-tokens", "more-tokens-than-frames"],
)
def test_searches_in_which_speechbrains_fails(length, ratio, error):
    """A batch of one that is not full; more tokens than frames."""
    modules = build_modules()
    encoded, lengths, frames = torch.randn(1, 20, 6), torch.tensor([length]), round(20 * length)
    options = {"beam_size": 4, "min_decode_ratio": ratio - 0.1, "max_decode_ratio": ratio}
    with pytest.raises(error):
        build_search(stock.CTCScorer, modules, {}, **options)(encoded, lengths)
    search = build_search(sb_fast_sligru.CTCScorer, modules, {}, **options)
    hyps, _, scores, _ = search(encoded, lengths)
    assert scores.isfinite().all()
    if ratio < 1:  # as on the frames that count alone, with the same number of steps
        options |= {key: 20 * options[key] / frames for key in options if key.endswith("ratio")}
        alone = build_search(stock.CTCScorer, modules, {}, **options)
        assert alone(encoded[:, :frames], torch.ones(1))[0] == hyps


# The class ---------------------------------------------------------------------------------------


def test_it_is_speechbrains_class():
    assert issubclass(sb_fast_sligru.CTCScorer, stock.CTCScorer)
    scorer = sb_fast_sligru.CTCScorer(Linear(input_size=5, n_neurons=6), BLANK, EOS, 7)
    scorer = pickle.loads(pickle.dumps(scorer))
    assert (scorer.blank_index, scorer.eos_index, scorer.ctc_window_size) == (BLANK, EOS, 7)


def test_choose_backend():
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
    assert scorer.choose_backend("cpu") == ("cpu", "the fastest")
    with sb_fast_sligru.backend("reference"):
        assert scorer.choose_backend("cpu") == ("reference", "forced")
    assert scorer.choose_backend("meta")[0] == "reference"


def test_the_backend_can_be_forced():
    logits, lengths, results = torch.randn(1, 9, 5), torch.tensor([9]), []
    for name in ("cpu", "reference"):
        scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
        with sb_fast_sligru.backend(name):
            scorer.reset_mem(logits, lengths)
            results.append(scorer.score(torch.tensor([BOS]), None, None, None)[0])
    assert_same_scores(*results, 1e-5)


@pytest.mark.parametrize("window", [-1, 1.5])
def test_a_bad_window_is_refused(window):
    with pytest.raises(ValueError, match="ctc_window_size must be an int from 0 on, but is"):
        sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS, window)


@pytest.mark.parametrize(
    "indices, lengths, message",
    [
        ((6, 2), torch.tensor([9]), "blank_index must be an int below 6, but is 6"),
        ((0, -7), torch.tensor([9]), "eos_index must be an int below 6, but is -7"),
        ((0, 2), torch.tensor([1.0]), r"enc_lens must be 1 integers.*float32 of shape \[1\]"),
        ((0, 2), torch.tensor([9, 9]), r"enc_lens must be 1 integers.*int64 of shape \[2\]"),
    ],
)
def test_bad_arguments_are_named(indices, lengths, message):
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), *indices)
    with pytest.raises(ValueError, match=message):
        scorer.reset_mem(torch.randn(1, 9, 6), lengths)


def test_hypotheses_that_do_not_fit_the_batch():
    scorer = sb_fast_sligru.CTCScorer(torch.nn.Identity(), BLANK, EOS)
    scorer.reset_mem(torch.randn(2, 9, 6), torch.tensor([9, 3]))
    with pytest.raises(ValueError, match="inp_tokens must be a multiple of 2"):
        scorer.score(torch.full((3,), BOS), None, None, None)


YAML = """
ctc_scorer_class: !name:{}
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 5
    n_neurons: 6
ctc_scorer: !apply:sb_fast_sligru.ctc_scorer.build
    ctc_scorer_class: !ref <ctc_scorer_class>
    ctc_fc: !ref <ctc_lin>
    blank_index: 0
    eos_index: 2
"""


@pytest.mark.parametrize(
    "name", ["sb_fast_sligru.CTCScorer", "speechbrain.decoders.scorer.CTCScorer"]
)
def test_a_yaml_takes_either_class(name):
    scorer = load_hyperpyyaml(YAML.format(name))["ctc_scorer"]
    assert type(scorer).__name__ == "CTCScorer" and type(scorer).__module__ in (
        "sb_fast_sligru.ctc_scorer",
        "speechbrain.decoders.scorer",
    )
    assert isinstance(scorer, sb_fast_sligru.CTCScorer) == name.startswith("sb_fast")


@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.rand"])
def test_a_yaml_with_another_class_is_refused(name):
    with pytest.raises(ValueError, match="ctc_scorer_class must be a class of scorers, but is"):
        load_hyperpyyaml(YAML.format(name))
