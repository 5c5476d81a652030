"""CTC prefix scores against plain PyTorch and against all alignments. Runs without SpeechBrain."""

import itertools
import math
import warnings

import pytest
import torch
from fuzz import draw_cases

from sb_fast_sligru import _library, backend, info, ops
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import LOG_ZERO

BLANK, BOS, EOS = 0, 1, 2
# B, T, V, hypotheses of an utterance, candidates (None: all tokens).
SHAPES = [
    (1, 1, 4, 1, None),
    (1, 9, 5, 2, 3),
    (2, 17, 40, 3, 7),
    (3, 33, 7, 5, None),
    (1, 70, 300, 17, 20),  # more hypotheses than lanes
    (2, 100, 130, 8, None),
]
SMALL = (2, 12, 9, 3, 4)

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small


def make_search(shape, steps=4, window=False, peaky=1.0, full=True):
    """The arguments of a search of some tokens, float64 on the CPU: log-probabilities and steps.

    Returns
    -------
    log_probs : torch.Tensor
        [B, V, T]
    lengths : torch.Tensor
        [B]
    steps : list of (candidates, window, parents, tokens)
    """
    B, T, V, beam, C = shape
    log_probs = (peaky * torch.randn(B, V, T, dtype=torch.float64)).log_softmax(1)
    lengths = torch.randint(1, T + 1, (B,))
    if full:
        lengths[0] = T
    N = B * beam
    found = []
    for _ in range(steps):
        candidates = None if C is None else torch.rand(N, V).topk(C).indices
        parents = torch.randint(0, beam, (B, beam)) + torch.arange(B)[:, None] * beam
        tokens = torch.randint(0, V, (N,))
        limits = torch.tensor([1, 1 + T // 2]) + torch.randint(-3, max(1, T // 2), (1,))
        found.append((candidates, limits if window else None, parents.flatten(), tokens))
    return log_probs, lengths, found


def run(search, beam, dtype=torch.float64, device="cpu", name="auto"):
    """What each step gives: psi, then the state."""
    log_probs, lengths, steps = search
    log_probs, lengths = log_probs.to(device, dtype), lengths.to(device)
    last = torch.full((len(lengths) * beam,), BOS, device=device)
    results = []
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        state = ops.ctc_prefix_start(log_probs, BLANK, beam)
        for step in steps:
            candidates, window, parents, tokens = (
                None if t is None else t.to(device) for t in step
            )
            psi = ops.ctc_prefix_scores(
                log_probs,
                lengths,
                state,
                last,
                candidates,
                window,
                blank_index=BLANK,
                eos_index=EOS,
            )
            state = ops.ctc_prefix_extend(
                log_probs, lengths, state, last, parents, tokens, window, blank_index=BLANK
            )
            last = tokens
            results += [psi, state]
    return results


def assert_close(results, expected, bound):
    """Relative where numbers are large: sums of many log-probabilities."""
    for step, (value, exact) in enumerate(zip(results, expected, strict=True)):
        value, exact = value.double().cpu(), exact.double().cpu()
        assert value.shape == exact.shape
        error = ((value - exact).abs() / exact.abs().clamp(min=1)).max().item()
        assert error <= bound, f"result {step}: error {error:.2e}, allowed {bound:.0e}"


# ---- values


def spelled(alignment):
    """The tokens that a sequence of frames spells."""
    return tuple(token for token, _ in itertools.groupby(alignment) if token != BLANK)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_against_all_alignments(name):
    """Few frames: every sequence of a token a frame, and what it spells, can be listed."""
    V, T = 4, 5
    log_probs = torch.randn(1, V, T, dtype=torch.float64).log_softmax(1)
    tokens = [3, 3, 1]  # one of them twice
    probabilities = {}
    for alignment in itertools.product(range(V), repeat=T):
        p = math.exp(sum(log_probs[0, token, t] for t, token in enumerate(alignment)))
        text = spelled(alignment)
        probabilities[text] = probabilities.get(text, 0) + p
    steps = [(None, None, torch.tensor([0]), torch.tensor([token])) for token in tokens]
    results = run((log_probs, torch.tensor([T]), steps), 1, name=name)
    for i in range(len(tokens)):
        prefix, psi = tuple(tokens[:i]), results[2 * i][0]
        assert psi[EOS].exp().item() == pytest.approx(probabilities.get(prefix, 0))
        for token in set(range(V)) - {BLANK, EOS}:
            longer = (*prefix, token)
            p = sum(p for text, p in probabilities.items() if text[: i + 1] == longer)
            assert psi[token].exp().item() == pytest.approx(p)


@each_shape
@pytest.mark.parametrize("window", [False, True])
def test_float64_matches_plain_pytorch(shape, window):
    search = make_search(shape, window=window)
    expected = run(search, shape[3], name="reference")
    assert_close(run(search, shape[3], name="cpu"), expected, 1e-12)


@each_device
@each_shape
@pytest.mark.parametrize("peaky", [1.0, 10.0])
def test_float32(shape, peaky, device):
    search = make_search(shape, peaky=peaky)
    search = (search[0].float().double(), *search[1:])
    expected = run(search, shape[3], name="reference")
    assert_close(run(search, shape[3], torch.float32, device), expected, 2e-6)


@each_device
def test_long_utterances(device):
    """The errors of many frames stay those of float32 in PyTorch."""
    shape = (1, 1500, 50, 4, 10)
    search = make_search(shape, peaky=3.0)
    search = (search[0].float().double(), *search[1:])
    exact = run(search, shape[3], name="reference")
    eager = run(search, shape[3], torch.float32, name="reference")
    ours = run(search, shape[3], torch.float32, device)
    for value, theirs, expected in zip(ours, eager, exact, strict=True):
        scale = expected.abs().clamp(min=1)
        bound = 2 * ((theirs - expected) / scale).abs().max().item() + 1e-6
        assert ((value.double().cpu() - expected) / scale).abs().max().item() <= bound


@each_device
def test_random_calls(capsys, device):
    """Sizes, lengths, windows and candidates drawn anew in every run."""
    for random in draw_cases(capsys, f"ctc_prefix on {device}", 150):
        B, T, V = random.randint(1, 4), random.randint(1, 40), random.randint(3, 40)
        shape = (B, T, V, random.randint(1, 20), random.choice([None, random.randint(1, V)]))
        exact = device == "cpu" and random.random() < 0.5
        print(shape, exact)
        log_probs, lengths, steps = make_search(
            shape,
            steps=random.randint(1, 5),
            window=random.random() < 0.5,
            peaky=random.choice([0.1, 1, 10]),
            full=random.random() < 0.5,
        )
        if random.random() < 0.3:
            lengths[random.randrange(B)] = random.choice([0, -3, T + 5])
        search = log_probs.float().double(), lengths, steps
        expected = run(search, shape[3], name="reference")
        dtype, bound = (torch.float64, 1e-12) if exact else (torch.float32, 3e-6)
        assert_close(run(search, shape[3], dtype, device), expected, bound)


@each_device
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_frames_beyond_the_length_do_not_count(name, device):
    B, T, V, beam, C = SMALL
    log_probs, lengths, steps = make_search(SMALL)
    lengths[:] = torch.tensor([7, 5])
    shorter = run((log_probs[:, :, :7], lengths, steps), beam, torch.float32, device, name)
    for garbage in (5.0, -math.inf, math.nan):
        longer = log_probs.clone()
        longer[0, :, 7:] = longer[1, :, 5:] = garbage
        results = run((longer, lengths, steps), beam, torch.float32, device, name)
        for psi, expected in zip(results[::2], shorter[::2], strict=True):
            assert_close([psi], [expected], 1e-6)


@each_device
@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("frames", [3, 0])
def test_utterances_without_a_frame_and_more_tokens_than_frames(name, device, frames):
    """The empty hypothesis has all of the probability; nothing else has any, or gets infinite."""
    log_probs, lengths, steps = make_search((2, 3, 6, 2, None), steps=6)
    lengths[:] = torch.tensor([0, min(2, frames)])
    results = run((log_probs[:, :, :frames], lengths, steps), 2, torch.float32, device, name)
    assert all(value.isfinite().all() and (value >= LOG_ZERO).all() for value in results)
    for i, psi in enumerate(results[::2]):
        psi = psi.cpu()
        assert (psi[:2, EOS] == (LOG_ZERO if i else 0)).all()
        others = psi[:2, EOS + 1 :]
        assert (others == LOG_ZERO).all()
        if i > 2:
            assert (psi == LOG_ZERO).all()


@each_device
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_impossible_tokens_give_log_zero_and_no_nan(name, device):
    log_probs, lengths, steps = make_search((2, 12, 6, 3, None))
    log_probs[:, 3] = -math.inf
    log_probs[0, BLANK, 4:] = -math.inf
    results = run((log_probs, lengths, steps), 3, torch.float32, device, name)
    assert all(value.isfinite().all() and (value >= LOG_ZERO).all() for value in results)
    assert (results[0][:, 3] == LOG_ZERO).all()
    expected = run((log_probs, lengths, steps), 3, name="reference")
    assert_close(results, expected, 3e-6)


@each_device
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_nan_reaches_the_output(name, device):
    log_probs, lengths, steps = make_search((2, 12, 6, 3, None), steps=2)
    lengths[:] = 12
    log_probs[1, 4, 5] = math.nan
    psi, *_, second, state = run((log_probs, lengths, steps), 3, torch.float32, device, name)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[3:, 4] = True
    assert torch.equal(psi.isnan().cpu(), expected)
    assert second[:3].isfinite().all() and state[:3].isfinite().all()


@each_device
def test_the_two_special_tokens(device):
    """What is no candidate has no probability, except the end; the blank has none, if another."""
    B, T, V, beam, C = SMALL
    log_probs, lengths, _ = make_search(SMALL)
    log_probs, lengths = log_probs.float().to(device), lengths.to(device)
    state = ops.ctc_prefix_start(log_probs, BLANK, beam)
    last = torch.full((B * beam,), BOS, device=device)
    candidates = torch.tensor([[BLANK, 5, 7]], device=device).expand(B * beam, -1)

    def scores(**indices):
        return ops.ctc_prefix_scores(log_probs, lengths, state, last, candidates, **indices).cpu()

    psi = scores(blank_index=BLANK, eos_index=EOS)
    total = state[:, 0].gather(1, lengths.repeat_interleave(beam)[:, None])[:, 0].cpu()
    assert torch.equal(psi[:, EOS], total)
    assert ((psi > LOG_ZERO) == torch.tensor([t in (EOS, 5, 7) for t in range(V)])).all()
    assert torch.equal(scores(blank_index=BLANK, eos_index=BLANK)[:, BLANK], total)


@each_device
def test_strided_inputs(device):
    """Log-probabilities as a softmax over the last axis gives them; every other index."""
    search = make_search(SMALL)
    expected = run(search, SMALL[3], torch.float32, device)
    turned = search[0].transpose(1, 2).contiguous().transpose(1, 2)
    steps = [
        tuple(None if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in step)
        for step in search[2]
    ]
    assert not turned.is_contiguous() and not steps[0][0].is_contiguous()
    results = run((turned, search[1], steps), SMALL[3], torch.float32, device)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@each_device
def test_empty_inputs(device):
    """No utterances; no hypotheses to go on with; no candidates."""
    log_probs = torch.zeros(0, 5, 7, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    state = ops.ctc_prefix_start(log_probs, BLANK, 3)
    indices = {"blank_index": BLANK, "eos_index": EOS}
    assert ops.ctc_prefix_scores(log_probs, none, state, none, **indices).shape == (0, 5)
    one = torch.full((1, 5, 7), math.log(1 / 5), device=device)
    state, length, last = (
        ops.ctc_prefix_start(one, BLANK, 1),
        none.new_tensor([7]),
        none.new_ones(1),
    )
    extended = ops.ctc_prefix_extend(one, length, state, last, none, none, blank_index=BLANK)
    assert extended.shape == (0, 2, 8)
    psi = ops.ctc_prefix_scores(one, length, state, last, none[None], **indices)
    assert (psi > LOG_ZERO).tolist() == [[False, False, True, False, False]]


@each_device
def test_same_input_same_bits(device):
    shape = (2, 200, 300, 40, None)
    search = make_search(shape, steps=2)
    first = run(search, shape[3], torch.float32, device)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(search, shape[3], torch.float32, device)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- the dispatcher


def operator_arguments(device="cpu", window=True):
    """Positional arguments of both operators."""
    log_probs, lengths, steps = make_search(SMALL, steps=1, window=window)
    log_probs = log_probs.float().to(device)
    state = ops.ctc_prefix_start(log_probs, BLANK, SMALL[3])
    last = torch.full((state.shape[0],), BOS, device=device)
    candidates, limits, parents, tokens = (None if t is None else t.to(device) for t in steps[0])
    common = log_probs, lengths.to(device), state, last
    return (*common, candidates, limits, BLANK, EOS), (*common, parents, tokens, limits, BLANK)


@each_device
@pytest.mark.parametrize("window", [False, True])
def test_opcheck(window, device):
    """Schema, fake kernel, registration for autograd and tracing with dynamic shapes."""
    scores, extend = operator_arguments(device, window)
    torch.library.opcheck(torch.ops.sb_fast_sligru.ctc_prefix_scores, scores)
    torch.library.opcheck(torch.ops.sb_fast_sligru.ctc_prefix_extend, extend)


@each_device
def test_compiles_in_one_graph_for_any_batch_and_length(device):
    def function(log_probs, lengths, last, parents, tokens):
        state = ops.ctc_prefix_start(log_probs, BLANK, 3)
        state = ops.ctc_prefix_extend(
            log_probs, lengths, state, last, parents, tokens, blank_index=BLANK
        )
        return ops.ctc_prefix_scores(
            log_probs, lengths, state, tokens, blank_index=BLANK, eos_index=EOS
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, frames in ((2, 5), (3, 9), (4, 17)):
        log_probs, lengths, steps = make_search((batch, frames, 6, 3, None), steps=1)
        last = torch.full((3 * batch,), BOS)
        arguments = [t.to(device) for t in (log_probs.float(), lengths, last, *steps[0][2:])]
        assert torch.equal(compiled(*arguments), function(*arguments))


def test_there_is_no_gradient_and_that_is_said():
    scores, extend = operator_arguments()
    log_probs = scores[0].requires_grad_()
    with pytest.raises(ValueError, match=r"log_probs: requires a gradient.*torch.no_grad"):
        ops.ctc_prefix_scores(log_probs, *scores[1:6], blank_index=BLANK, eos_index=EOS)
    with pytest.raises(ValueError, match=r"log_probs: requires a gradient.*torch.no_grad"):
        ops.ctc_prefix_start(log_probs, BLANK, 3)
    for name, arguments in (("ctc_prefix_scores", scores), ("ctc_prefix_extend", extend)):
        out = getattr(torch.ops.sb_fast_sligru, name)(log_probs, *arguments[1:])
        with pytest.raises(RuntimeError, match="prefix scores have no gradient"):
            out.sum().backward()
    with torch.no_grad():
        psi = ops.ctc_prefix_scores(log_probs, *scores[1:6], blank_index=BLANK, eos_index=EOS)
    assert psi.grad_fn is None


# ---- arguments


def zeros(**changed):
    """Good arguments of both functions."""
    good = {
        "log_probs": torch.zeros(2, 6, 5),
        "lengths": torch.tensor([5, 3]),
        "state": torch.zeros(4, 2, 6),
        "last_tokens": torch.ones(4, dtype=torch.int64),
        "window": torch.tensor([0, 4]),
        "blank_index": 0,
    }
    scores = good | {"candidates": torch.tensor([[1, 5]] * 4), "eos_index": 2}
    extend = good | {"parents": torch.tensor([0, 1, 2]), "tokens": torch.tensor([5, 0, 1])}
    return [
        arguments | {key: value for key, value in changed.items()}
        for arguments in (scores, extend)
        if changed.keys() <= arguments.keys()
    ]


def functions(arguments):
    """The function and the operator that take these arguments."""
    name = "ctc_prefix_scores" if "eos_index" in arguments else "ctc_prefix_extend"
    return getattr(ops, name), getattr(torch.ops.sb_fast_sligru, name)


LONG = torch.int64
BAD_ARGUMENTS = {
    "list": ({"log_probs": [0.0]}, r"log_probs: got list, expected a torch.Tensor"),
    "rank": ({"log_probs": torch.zeros(6, 5)}, r"log_probs: got shape \(6, 5\).*\[B, V, T\]"),
    "no-tokens": ({"log_probs": torch.zeros(2, 0, 5)}, r"log_probs: got shape .*\[B, V, T\]"),
    "half": ({"log_probs": torch.zeros(2, 6, 5).half()}, r"log_probs: got torch.float16"),
    "lengths": ({"lengths": torch.tensor([5])}, r"lengths: got shape \(1,\), expected \[2\]"),
    "relative": ({"lengths": torch.ones(2)}, r"lengths: got torch.float32, expected int64"),
    "state": ({"state": torch.zeros(4, 2, 5)}, r"state: got .*expected \[N, 2, 6\], .* of 2"),
    "beam": ({"state": torch.zeros(3, 2, 6)}, r"state: got .*N a multiple of 2"),
    "mixed": ({"state": torch.zeros(4, 2, 6).double()}, r"state: got torch.float64 on cpu"),
    "state-list": ({"state": [0]}, r"state: got list"),
    "last": ({"last_tokens": torch.ones(3, dtype=LONG)}, r"last_tokens: got .*expected \[4\]"),
    "last-list": ({"last_tokens": [1] * 4}, r"last_tokens: got list"),
    "device": ({"lengths": torch.ones(2, dtype=LONG, device="meta")}, r"lengths: got device meta"),
    "window": ({"window": torch.tensor([1])}, r"window: got shape \(1,\), expected \[2\]"),
    "blank": ({"blank_index": 6}, r"blank_index: got 6, expected an int from 0 to 5"),
    "eos": ({"eos_index": -1}, r"eos_index: got -1, expected an int from 0 to 5"),
    "candidates": (
        {"candidates": torch.ones(3, 2, dtype=LONG)},
        r"candidates: got shape \(3, 2\), expected \[4, any\]",
    ),
    "parents": ({"parents": torch.ones(1, 3, dtype=LONG)}, r"parents: got .*expected \[any\]"),
    "tokens": ({"tokens": torch.ones(2, dtype=LONG)}, r"tokens: got shape \(2,\), expected \[3\]"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    for arguments in zeros(**changed):
        with backend(name), pytest.raises(ValueError, match=message):
            functions(arguments)[0](**arguments)


@pytest.mark.parametrize("beam", [0, 1.5])
def test_a_bad_beam_is_named(beam):
    with pytest.raises(ValueError, match="beam: got .*, expected an int from 1 on"):
        ops.ctc_prefix_start(torch.zeros(2, 6, 5), 0, beam)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"log_probs": torch.zeros(6, 5)}, r"log_probs: got Float \[6, 5\], expected \[B, V, T\]"),
        ({"log_probs": torch.zeros(2, 6, 5).half()}, r"log_probs: got Half .*float64 or float32"),
        ({"lengths": torch.tensor([5])}, r"lengths: got Long \[1\], expected Long \[2\]"),
        ({"state": torch.zeros(3, 2, 6)}, r"state: got Float \[3, 2, 6\], .*N a multiple of 2"),
        ({"state": torch.zeros(4, 2, 5)}, r"state: got .*expected Float \[4, 2, 6\]"),
        ({"last_tokens": torch.ones(4)}, r"last_tokens: got Float \[4\], expected Long \[4\]"),
        ({"window": torch.tensor([1])}, r"window: got Long \[1\], expected Long \[2\]"),
        ({"blank_index": -1}, r"blank_index: got -1, expected 0 to 5"),
        ({"eos_index": 6}, r"eos_index: got 6, expected 0 to 5"),
        ({"candidates": torch.tensor([1])}, r"candidates: got Long \[1\], expected \[N, C\]"),
        ({"candidates": torch.tensor([[6]] * 4)}, r"candidates: got 6, expected 0 to 5"),
        ({"parents": torch.tensor([0, 4, 1])}, r"parents: got 4, expected 0 to 3"),
        ({"parents": torch.tensor([[0]])}, r"parents: got Long \[1, 1\], expected \[M\]"),
        ({"tokens": torch.tensor([0, -1, 1])}, r"tokens: got -1, expected 0 to 5"),
        ({"tokens": torch.tensor([0])}, r"tokens: got Long \[1\], expected Long \[3\]"),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    for arguments in zeros(**changed):
        with pytest.raises(RuntimeError, match=message):
            functions(arguments)[1](**arguments)


# ---- choice of backend


def test_backend_choice(monkeypatch):
    choose = ops.choose_ctc_prefix_backend
    assert choose("cpu") == choose("cpu", torch.float64) == ("cpu", "the fastest")
    assert choose("meta")[0] == "reference"
    with backend("reference"):
        assert choose("cuda:0") == ("reference", "forced")
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        ops.ctc_prefix_scores(**zeros()[0])

    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    assert choose("cuda:0") == ("cuda", "the fastest")
    for name in ("stepwise", "persistent"):
        with backend(name):
            assert choose("cuda:0") == (name, "forced")
    name, why = choose("cuda:0", torch.float64)
    assert name == "reference" and "do not take float64" in why


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    scores = zeros()[0]
    expected = ops.ctc_prefix_scores(**scores)
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    with pytest.warns(UserWarning, match="plain PyTorch.*not built, says this test"):
        psi = ops.ctc_prefix_scores(**scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.ctc_prefix_scores(**scores), psi)
    assert_close([psi], [expected], 1e-6)
    with backend("cpu"), pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it'):
        ops.ctc_prefix_scores(**scores)


def test_info_tells_the_backend():
    line = "Backend for CTC prefix scores:\n  cpu                cpu (the fastest)"
    assert line in "\n".join(info.report())


# ---- CUDA


def step_on_gpu(log_probs, others):
    """Both operators, float32."""
    lengths, last, candidates, parents, tokens = others
    state = ops.ctc_prefix_start(log_probs, BLANK, SMALL[3])
    psi = ops.ctc_prefix_scores(
        log_probs, lengths, state, last, candidates, blank_index=BLANK, eos_index=EOS
    )
    extended = ops.ctc_prefix_extend(
        log_probs, lengths, state, last, parents, tokens, blank_index=BLANK
    )
    return psi, extended


def gpu_arguments():
    log_probs, lengths, steps = make_search(SMALL, steps=1)
    candidates, _, parents, tokens = steps[0]
    last = torch.full((SMALL[0] * SMALL[3],), BOS)
    others = [t.cuda() for t in (lengths, last, candidates, parents, tokens)]
    return log_probs.float().cuda(), others


@pytest.mark.gpu
def test_cuda_graph_replays_a_step():
    """So nothing waits for the GPU, and the memory is torch's."""
    log_probs, others = gpu_arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step_on_gpu(log_probs, others)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step_on_gpu(log_probs, others)
    log_probs.copy_(torch.randn_like(log_probs).log_softmax(1))
    graph.replay()
    for ours, expected in zip(captured, step_on_gpu(log_probs, others), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    value, others = gpu_arguments()
    expected = step_on_gpu(value, others)
    log_probs = torch.zeros_like(value)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        log_probs.copy_(value)
        results = step_on_gpu(log_probs, others)
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_what_is_out_of_range_is_log_zero_on_a_gpu():
    """The host cannot look without waiting; nothing else is read or written."""
    log_probs, (lengths, last, candidates, parents, tokens) = gpu_arguments()
    state = ops.ctc_prefix_start(log_probs, BLANK, SMALL[3])
    expected = ops.ctc_prefix_scores(
        log_probs, lengths, state, last, candidates[:, :2], blank_index=BLANK, eos_index=EOS
    )
    candidates[:, 2], candidates[:, 3] = -5, 10**12
    psi = ops.ctc_prefix_scores(
        log_probs, lengths, state, last, candidates, blank_index=BLANK, eos_index=EOS
    )
    assert torch.equal(psi, expected)
    for which in (parents, tokens):
        changed = which.clone()
        changed[:2] = torch.tensor([-1, 10**12])
        pair = (changed, tokens) if which is parents else (parents, changed)
        extended = ops.ctc_prefix_extend(log_probs, lengths, state, last, *pair, blank_index=BLANK)
        assert (extended[:2] == LOG_ZERO).all() and (extended[2:] > LOG_ZERO).any()


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    """The log-probabilities have more than 2 ** 31 elements; the last must equal a small run."""
    batch, vocabulary, frames = 650, 5000, 700
    assert batch * vocabulary * frames > 2**31
    small = torch.randn(1, vocabulary, frames, device="cuda").log_softmax(1)

    def last(rows):
        log_probs = small.expand(rows, -1, -1).contiguous()
        lengths = torch.full((rows,), frames, device="cuda")
        # PyTorch's sum over frames has other bits for one row.
        state = ops.ctc_prefix_start(small, BLANK, rows)
        bos = torch.full((rows,), BOS, device="cuda")
        tokens, parents = torch.full_like(bos, 4999), torch.arange(rows, device="cuda")
        state = ops.ctc_prefix_extend(
            log_probs, lengths, state, bos, parents, tokens, blank_index=BLANK
        )
        psi = ops.ctc_prefix_scores(
            log_probs, lengths, state, tokens, blank_index=BLANK, eos_index=EOS
        )
        return state[-1].clone(), psi[-1].clone()

    for large, alone in zip(last(batch), last(1), strict=True):
        assert torch.equal(large, alone)
