"""The CTC loss against plain PyTorch, PyTorch's own, all alignments. Runs without SpeechBrain."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from fuzz import draw_cases
from torch.autograd import forward_ad

from sb_fast_sligru import _library, backend, info, ops
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

# B, T, V, S, blank
SHAPES = [
    (1, 1, 2, 1, 0),
    (1, 9, 3, 2, 2),
    (2, 17, 40, 7, 1),
    (3, 40, 7, 15, 0),
    (2, 100, 300, 40, 0),
    (5, 70, 11, 31, 4),  # a warp of positions, and a token more
]
SMALL = (3, 12, 6, 4, 0)
# More positions than a block has threads; more than shared memory holds.
LONG = [(2, 700, 30, 600, 0), (1, 3500, 200, 3200, 0)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
each_name = pytest.mark.parametrize("name", ["auto", "reference"])

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small


def make_inputs(shape, peaky=1.0):
    """log_probs (float64), targets, input_lengths, target_lengths and blank_index, on the CPU.

    The first utterance is full; frames are enough for tokens, but for chance.
    """
    B, T, V, S, blank = shape
    log_probs = (peaky * torch.randn(B, T, V, dtype=torch.float64)).log_softmax(2)
    targets = torch.randint(0, V - 1, (B, S))
    targets += targets >= blank
    target_lengths = torch.randint(0, S + 1, (B,))
    input_lengths = torch.randint(1, T + 1, (B,))
    target_lengths[0], input_lengths[0] = S, T
    return log_probs, targets, input_lengths, target_lengths, blank


def run(inputs, upstream=None, dtype=torch.float64, device="cpu", name="auto", function=None):
    """The loss of each utterance and the gradient of the log-probabilities."""
    log_probs, *integers, blank = inputs
    log_probs = log_probs.detach().to(device, dtype).requires_grad_()
    integers = [t.to(device) for t in integers]
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = (function or ops.ctc_loss)(log_probs, *integers, blank_index=blank)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    return loss.detach(), torch.autograd.grad(loss, log_probs, upstream)[0]


def pytorchs(log_probs, *integers, blank_index):
    log_probs = log_probs.transpose(0, 1)
    options = {"blank": blank_index, "reduction": "none", "zero_infinity": True}
    return F.ctc_loss(log_probs, *integers, **options)


def make_upstream(inputs):
    return torch.randn(len(inputs[0]), dtype=torch.float64)


def assert_close(results, expected, bound):
    for value, exact in zip(results, expected, strict=True):
        assert value.shape == exact.shape
        value, exact = value.double().cpu(), exact.double().cpu()
        error = (value - exact).abs() / exact.abs().clamp(min=1)
        error = F.pad(error.flatten(), (0, 1)).max().item()  # NaN if there is one
        assert error <= bound, f"error {error:.2e}, allowed {bound:.0e}"


# ---- values


def spelled(alignment):
    """The tokens that a sequence of frames spells; the blank is 0."""
    return tuple(token for token, _ in itertools.groupby(alignment) if token != 0)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_against_all_alignments(name):
    """Few frames: every sequence of a token a frame, and what it spells, can be listed."""
    V, T = 4, 5
    log_probs = torch.randn(1, T, V, dtype=torch.float64).log_softmax(2)
    probabilities = {}
    for alignment in itertools.product(range(V), repeat=T):
        p = math.exp(sum(log_probs[0, t, token] for t, token in enumerate(alignment)))
        text = spelled(alignment)
        probabilities[text] = probabilities.get(text, 0) + p
    for tokens in [(), (3,), (3, 3), (1, 2, 1), (2, 2, 2), (3, 2, 1, 3)]:
        integers = torch.tensor([[*tokens, 1]]), torch.tensor([T]), torch.tensor([len(tokens)])
        loss, _ = run((log_probs, *integers, 0), name=name)
        assert math.exp(-loss) == pytest.approx(probabilities[tokens])


@each_shape
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("peaky", [1.0, 10.0])
def test_float64_matches_pytorchs(shape, name, peaky):
    inputs = make_inputs(shape, peaky)
    upstream = make_upstream(inputs)
    expected = run(inputs, upstream, function=pytorchs)
    assert_close(run(inputs, upstream, name=name), expected, 1e-11)


@each_device
@each_shape
@pytest.mark.parametrize("peaky", [1.0, 10.0])
def test_float32(shape, peaky, device):
    """The errors are not larger than those of PyTorch's own, on the CPU."""
    inputs = make_inputs(shape, peaky)
    inputs = (inputs[0].float().double(), *inputs[1:])
    upstream = make_upstream(inputs).float().double()
    exact = run(inputs, upstream, name="reference")
    theirs = run(inputs, upstream, torch.float32, function=pytorchs)
    ours = run(inputs, upstream, torch.float32, device)
    for value, their, expected in zip(ours, theirs, exact, strict=True):
        assert relative_error(value, expected) <= 2 * relative_error(their, expected) + 2e-6


@each_device
def test_random_calls(capsys, device):
    """Sizes, lengths and tokens, the blank among them, drawn anew in every run."""
    for random in draw_cases(capsys, f"ctc_loss on {device}", 100):
        V = random.randint(1, 30)
        shape = (random.randint(1, 4), random.randint(0, 40), V, random.randint(0, 70))
        exact = device == "cpu" and random.random() < 0.5
        print(shape, exact)
        B, T, V, S = shape
        log_probs = (random.choice([0.1, 1, 10]) * torch.randn(B, T, V)).log_softmax(2).double()
        targets = torch.randint(0, V, (B, S))
        input_lengths = torch.randint(0, T + 1, (B,))
        target_lengths = torch.randint(0, min(S, random.choice([S, T // 2])) + 1, (B,))
        for row, length in zip(targets, target_lengths, strict=True):
            row[length:] = random.choice([0, -1, V, 10**12])  # what is not read may be anything
        inputs = log_probs, targets, input_lengths, target_lengths, random.randrange(V)
        upstream = make_upstream(inputs)
        expected = run(inputs, upstream, name="reference")
        dtype, bound = (torch.float64, 1e-11) if exact else (torch.float32, 2e-4)
        assert_close(run(inputs, upstream, dtype, device), expected, bound)


@each_device
@pytest.mark.parametrize("shape", LONG, ids=lambda s: "-".join(map(str, s)))
def test_long_targets(shape, device):
    if device == "cpu":
        shape = (1, *LONG[0][1:])
    inputs = make_inputs(shape)
    inputs = (inputs[0].float().double(), *inputs[1:])
    exact, theirs = (
        run(inputs, dtype=dtype, function=pytorchs) for dtype in (torch.float64, torch.float32)
    )
    assert exact[0][0] > 0
    for value, their, expected in zip(
        run(inputs, dtype=torch.float32, device=device), theirs, exact, strict=True
    ):
        assert relative_error(value, expected) <= 2 * relative_error(their, expected) + 2e-6


@each_device
@each_name
def test_what_is_beyond_the_lengths_does_not_count(name, device):
    log_probs, targets, input_lengths, target_lengths, blank = make_inputs(SMALL)
    input_lengths[:], target_lengths[:] = 7, torch.tensor([3, 2, 0])
    integers = input_lengths, target_lengths, blank
    loss, gradient = run(
        (log_probs[:, :7], targets[:, :3], *integers), None, torch.float32, device, name
    )
    for garbage in (5.0, -math.inf, math.nan):
        longer, tokens = log_probs.clone(), targets.clone()
        longer[:, 7:] = garbage
        for i, length in enumerate(target_lengths):
            tokens[i, length:] = 10**9
        result = run((longer, tokens, *integers), None, torch.float32, device, name)
        assert torch.equal(result[0], loss)
        assert torch.equal(result[1][:, :7], gradient) and (result[1][:, 7:] == 0).all()


@each_device
@each_name
def test_no_tokens_no_frames_and_too_few_frames(name, device):
    """No tokens: all frames are blank. Too few frames for the tokens: nothing to learn from."""
    log_probs, targets, input_lengths, target_lengths, blank = make_inputs((5, 6, 5, 3, 0))
    targets[:] = torch.tensor([1, 2, 2])
    input_lengths[:] = torch.tensor([6, 0, 0, 3, 4])
    target_lengths[:] = torch.tensor([0, 0, 2, 3, 3])
    inputs = log_probs, targets, input_lengths, target_lengths, blank
    loss, gradient = (t.cpu() for t in run(inputs, None, torch.float32, device, name))
    assert loss[0].item() == pytest.approx(-log_probs[0, :, blank].sum().item(), rel=1e-5)
    assert (loss[1:4] == 0).all() and (gradient[1:4] == 0).all()
    path = -log_probs[4, range(4), [1, 2, blank, 2]].sum()
    assert loss[4].item() == pytest.approx(path.item(), rel=1e-5)
    probabilities = log_probs[0].exp()
    probabilities[:, blank] -= 1
    assert_close([gradient[0]], [probabilities], 1e-5)


@each_device
@each_name
def test_impossible_tokens_give_no_nan(name, device):
    """Where a path remains it is taken; where none does, the loss is 0."""
    inputs = make_inputs((3, 9, 5, 2, 0))
    log_probs, targets, input_lengths, target_lengths, _ = inputs
    targets[:], input_lengths[:], target_lengths[:] = torch.tensor([1, 2]), 9, 2
    log_probs[0, 3:, 1] = -math.inf
    log_probs[0, 5, 3:] = -math.inf
    log_probs[1, :, 2] = -math.inf
    log_probs[2, 4] = -math.inf
    loss, gradient = run(inputs, None, torch.float32, device, name)
    assert loss[0] > 0 and (loss[1:] == 0).all() and (gradient[1:] == 0).all()
    assert gradient.isfinite().all() and (gradient[0] != 0).any()
    finite = inputs[0].clamp(min=-1e4), *inputs[1:]
    assert_close([loss[:1], gradient[:1]], (t[:1] for t in run(finite)), 1e-5)


@each_device
@each_name
def test_nan_reaches_loss_and_gradient_of_its_utterance(name, device):
    inputs = make_inputs(SMALL)
    inputs[0][1, 0, inputs[4]] = math.nan
    loss, gradient = run(inputs, None, torch.float32, device, name)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().flatten(1).any(1).tolist() == [False, True, False]
    if name == "auto":
        assert (
            gradient[1, : inputs[2][1]].isnan().all() and (gradient[1, inputs[2][1] :] == 0).all()
        )


@each_device
def test_repeated_tokens(device):
    """A token's gradient is the sum of all its places in the target."""
    log_probs = torch.randn(2, 50, 4, dtype=torch.float64).log_softmax(2)
    targets = torch.tensor([[1, 2, 1, 2, 2, 1, 3, 1, 1, 1], [3] * 10])
    integers = targets, torch.tensor([50, 40]), torch.tensor([10, 9])
    inputs = log_probs, *integers, 0
    expected = run(inputs, function=pytorchs)
    assert_close(run(inputs, None, torch.float32, device), expected, 2e-5)


@each_device
def test_strided_inputs(device):
    """Log-probabilities as PyTorch's loss wants them, [T, B, V]; every other index."""
    inputs = make_inputs(SMALL)
    upstream = make_upstream(inputs)
    expected = run(inputs, upstream, torch.float32, device)
    turned = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs[1:4]]
    assert not turned.is_contiguous() and not strided[0].is_contiguous()
    results = run((turned, *strided, inputs[4]), upstream[:1].expand(3), torch.float32, device)
    assert torch.equal(results[0], expected[0])
    for i in range(3):
        scaled = expected[1][i] * (upstream[0] / upstream[i]).item()
        assert_close([results[1][i]], [scaled], 1e-6)


@each_device
@each_name
@pytest.mark.parametrize("shape", [(0, 5, 4, 3, 0), (2, 0, 4, 3, 0), (2, 5, 4, 0, 0)])
def test_empty_inputs(shape, device, name):
    B, T, V, S, blank = shape
    log_probs = torch.zeros(B, T, V).log_softmax(2)
    integers = torch.ones(B, S, dtype=torch.int64), torch.full((B,), T), torch.full((B,), S)
    loss, gradient = run((log_probs, *integers, blank), None, torch.float32, device, name)
    expected = -log_probs[:, :, blank].sum(1) if T and not S else torch.zeros(B)
    assert_close([loss], [expected], 1e-6)
    assert gradient.shape == log_probs.shape and gradient.isfinite().all()


@each_device
def test_same_input_same_bits(device):
    inputs = make_inputs((5, 300, 200, 60, 0))
    first = run(inputs, None, torch.float32, device)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(inputs, None, torch.float32, device)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


# ---- autograd and the dispatcher


def losses_of(inputs, name):
    """The loss as a function of what a log-softmax takes."""

    def function(logits):
        with backend(name):
            return ops.ctc_loss(logits.log_softmax(2), *inputs[1:4], blank_index=inputs[4])

    return function


def test_gradcheck():
    inputs = make_inputs((3, 7, 4, 3, 1))
    inputs[2][:], inputs[3][:] = torch.tensor([7, 5, 4]), torch.tensor([3, 2, 0])
    logits = inputs[0].requires_grad_()
    assert torch.autograd.gradcheck(losses_of(inputs, "cpu"), logits)
    assert torch.autograd.gradcheck(losses_of(inputs, "reference"), logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(losses_of(inputs, "reference"), logits)


def test_saves_no_more_than_alpha_and_nothing_without_grad():
    inputs = make_inputs(SMALL)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    log_probs = inputs[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.ctc_loss(log_probs, *inputs[1:4], blank_index=0)
        assert sorted(saved) == sorted([(3, 12, 6), (3, 4), (3,), (3,), (3, 12, 9)])
        saved.clear()
        with torch.no_grad():
            loss = ops.ctc_loss(log_probs, *inputs[1:4], blank_index=0)
    assert not saved and loss.grad_fn is None


def test_second_derivative_is_refused_and_the_reference_has_it():
    inputs = make_inputs(SMALL)

    def first_gradient(name):
        logits = inputs[0].detach().requires_grad_()
        loss = losses_of(inputs, name)(logits)
        return torch.autograd.grad(loss.square().sum(), logits, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        first_gradient("cpu").square().sum().backward()
    first_gradient("reference").square().sum().backward()


def test_derivatives_that_kernels_lack_are_pytorchs(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    inputs = make_inputs(SMALL)
    logits = inputs[0]

    def derivatives(name):
        function = losses_of(inputs, name)
        results = [
            torch.func.jvp(function, (logits,), (logits.sin(),))[1],
            torch.func.grad(lambda x: function(x).square().sum())(logits),
        ]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(logits, logits.sin())
            results.append(forward_ad.unpack_dual(function(dual)).tangent)
        return results

    with pytest.warns(UserWarning, match=r"plain PyTorch.*backend\(.reference.\) has"):
        ours = derivatives("auto")
    assert_close(ours, derivatives("reference"), 1e-14)
    with backend("cpu"), pytest.raises(RuntimeError, match=r"no gradient for torch.func"):
        torch.func.grad(lambda x: losses_of(inputs, "cpu")(x).sum())(logits)


def test_output_changed_in_place():
    """The backward reads nothing of it."""
    inputs = make_inputs(SMALL)

    def gradient(name):
        logits = inputs[0].detach().requires_grad_()
        loss = losses_of(inputs, name)(logits)
        loss.mul_(2)
        return torch.autograd.grad(loss.sum(), logits)[0]

    assert relative_error(gradient("cpu"), gradient("reference")) < 1e-12


@each_device
def test_opcheck(device):
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    log_probs, *integers, blank = make_inputs(SMALL)
    log_probs = log_probs.float().to(device)
    integers = [t.to(device) for t in integers]
    operators = torch.ops.sb_fast_sligru
    loss, log_alpha = operators.ctc_loss(log_probs, *integers, blank)
    torch.library.opcheck(
        operators.ctc_loss_backward,
        (torch.randn_like(loss), log_probs, *integers, log_alpha, blank),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(operators.ctc_loss, (log_probs.requires_grad_(), *integers, blank))


@each_device
def test_compiles_in_one_graph_for_any_batch_and_length(device):
    def function(logits, targets, input_lengths, target_lengths):
        log_probs = logits.log_softmax(2)
        return ops.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank_index=0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, frames, tokens in ((2, 9, 3), (3, 17, 5), (4, 33, 9)):
        log_probs, *integers, _ = make_inputs((batch, frames, 6, tokens, 0))
        integers = [t.to(device) for t in integers]
        results = []
        for call in (compiled, function):
            logits = log_probs.detach().float().to(device).requires_grad_()
            loss = call(logits, *integers)
            loss.backward()
            results.append((loss.detach()[None], logits.grad))
        assert_close(*results, 1e-6)


# ---- arguments


def zeros(**changed):
    """Good arguments."""
    return {
        "log_probs": torch.zeros(2, 5, 6),
        "targets": torch.ones(2, 3, dtype=torch.int64),
        "input_lengths": torch.tensor([5, 3]),
        "target_lengths": torch.tensor([2, 3]),
        "blank_index": 0,
    } | changed


BAD_ARGUMENTS = {
    "list": ({"log_probs": [0.0]}, r"log_probs: got list, expected a torch.Tensor"),
    "rank": ({"log_probs": torch.zeros(6, 5)}, r"log_probs: got shape \(6, 5\).*\[B, T, V\]"),
    "no-tokens": ({"log_probs": torch.zeros(2, 5, 0)}, r"log_probs: got shape .*\[B, T, V\]"),
    "half": ({"log_probs": torch.zeros(2, 5, 6).half()}, r"log_probs: got torch.float16, expected"),
    "targets": ({"targets": torch.ones(6, dtype=torch.int64)}, r"targets: got shape .*\[2, S\]"),
    "target-batch": ({"targets": torch.ones(3, 3, dtype=torch.int64)}, r"targets: got .*\[2, S\]"),
    "float-targets": ({"targets": torch.ones(2, 3)}, r"targets: got torch.float32, expected int64"),
    "frames": ({"input_lengths": torch.tensor([5])}, r"input_lengths: got shape \(1,\).*\[2\]"),
    "relative": ({"input_lengths": torch.ones(2)}, r"input_lengths: got torch.float32"),
    "lengths": ({"target_lengths": [2, 3]}, r"target_lengths: got list, expected a torch.Tensor"),
    "int32": ({"target_lengths": torch.ones(2).int()}, r"target_lengths: got torch.int32"),
    "device": (
        {"targets": torch.ones(2, 3, dtype=torch.int64, device="meta")},
        r"targets: got device meta, expected cpu, that of log_probs",
    ),
    "blank": ({"blank_index": 6}, r"blank_index: got 6, expected an int from 0 to 5"),
    "blank-type": ({"blank_index": 0.0}, r"blank_index: got 0.0, expected an int"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    with backend(name), pytest.raises(ValueError, match=message):
        ops.ctc_loss(**zeros(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"log_probs": torch.zeros(6, 5)}, r"log_probs: got Float \[6, 5\], expected \[B, T, V\]"),
        ({"log_probs": torch.zeros(2, 5, 6).half()}, r"log_probs: got Half .*float64 or float32"),
        (
            {"targets": torch.ones(2, dtype=torch.int64)},
            r"targets: got Long \[2\], expected \[2, S\]",
        ),
        (
            {"targets": torch.ones(3, 3, dtype=torch.int64)},
            r"targets: got .*expected Long \[2, 3\]",
        ),
        ({"targets": torch.ones(2, 3)}, r"targets: got Float \[2, 3\], expected Long"),
        ({"input_lengths": torch.ones(2)}, r"input_lengths: got Float .*expected Long \[2\]"),
        ({"target_lengths": torch.tensor([2])}, r"target_lengths: got Long \[1\], expected Long"),
        ({"blank_index": -1}, r"blank_index: got -1, expected 0 to 5"),
        ({"input_lengths": torch.tensor([5, 6])}, r"input_lengths: got 6, expected 0 to 5"),
        ({"input_lengths": torch.tensor([-1, 5])}, r"input_lengths: got -1, expected 0 to 5"),
        ({"target_lengths": torch.tensor([2, 4])}, r"target_lengths: got 4, expected 0 to 3"),
        ({"targets": torch.full((2, 3), 6)}, r"targets: got 6, expected 0 to 5"),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.ctc_loss(*zeros(**changed).values())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grad_loss": torch.zeros(3)}, r"grad_loss: got Float \[3\], expected Float \[2\]"),
        ({"log_alpha": torch.zeros(2, 5, 6)}, r"log_alpha: got .*expected Float \[2, 5, 7\]"),
    ],
)
def test_the_backward_checks_what_it_is_given(changed, message):
    *tensors, blank = zeros().values()
    given = {"grad_loss": torch.ones(2), "log_alpha": torch.zeros(2, 5, 7)} | changed
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.ctc_loss_backward(
            given["grad_loss"], *tensors, given["log_alpha"], blank
        )


OUT_OF_RANGE = {
    "input_lengths": (6, -1, -(2**63)),
    "target_lengths": (4, -1, 10**12),
    "targets": (6, -1, 10**12),
}


@pytest.mark.parametrize(
    "device, name",
    [("cpu", "reference")]
    + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("auto", "reference")],
)
@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_where_no_host_looks_what_is_out_of_range_is_nan(key, device, name):
    """Of its utterance; nothing is read or written by it."""
    arguments = zeros(log_probs=torch.randn(2, 5, 6).log_softmax(2))
    arguments["input_lengths"][:] = 5
    *inputs, blank = arguments.values()
    expected = run((*inputs, blank), None, torch.float32, device, name)
    for value in OUT_OF_RANGE[key]:
        changed = {name: t.clone() for name, t in zip(arguments, inputs, strict=False)}
        changed[key][1] = value
        loss, gradient = run((*changed.values(), blank), None, torch.float32, device, name)
        assert loss[1].isnan() and torch.equal(loss[0], expected[0][0])
        assert torch.equal(gradient[0], expected[1][0])
        if name == "auto":
            assert gradient[1].isnan().all()


# ---- choice of backend


def test_backend_choice(monkeypatch):
    choose = ops.choose_ctc_loss_backend
    assert choose("cpu") == choose("cpu", torch.float64) == ("cpu", "the fastest")
    assert choose("meta")[0] == "reference"
    with backend("reference"):
        assert choose("cuda:0") == ("reference", "forced")
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        ops.ctc_loss(**zeros())

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
    arguments = zeros(log_probs=torch.randn(2, 5, 6).log_softmax(2))
    expected = ops.ctc_loss(**arguments)
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    with pytest.warns(UserWarning, match="plain PyTorch.*not built, says this test"):
        loss = ops.ctc_loss(**arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.ctc_loss(**arguments), loss)
    assert_close([loss], [expected], 1e-6)
    with backend("cpu"), pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it'):
        ops.ctc_loss(**arguments)


def test_info_tells_the_backend():
    line = "Backend for the CTC loss:\n  cpu                cpu (the fastest)"
    assert line in "\n".join(info.report())


# ---- CUDA


def gpu_step(log_probs, integers, blank):
    """The training step's part of it, float32."""
    log_probs = log_probs.detach().requires_grad_()
    loss = ops.ctc_loss(log_probs, *integers, blank_index=blank)
    upstream = torch.linspace(-1, 1, len(loss), device="cuda")
    return loss.detach(), torch.autograd.grad(loss, log_probs, upstream)[0]


def gpu_arguments(shape=(4, 60, 50, 20, 0)):
    log_probs, *integers, blank = make_inputs(shape)
    return log_probs.float().cuda(), [t.cuda() for t in integers], blank


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 60, 50, 20, 0), LONG[1]], ids=str)
def test_the_host_waits_nowhere(shape):
    arguments = gpu_arguments(shape)
    expected = gpu_step(*arguments)  # also what is set up at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = gpu_step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph_replays_the_training_step():
    log_probs, integers, blank = gpu_arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gpu_step(log_probs, integers, blank)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_step(log_probs, integers, blank)
    log_probs.copy_(torch.randn_like(log_probs).log_softmax(2))
    integers[1].copy_(integers[1].flip(0))  # lengths are read anew, too
    graph.replay()
    for ours, expected in zip(captured, gpu_step(log_probs, integers, blank), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    value, integers, blank = gpu_arguments()
    expected = gpu_step(value, integers, blank)
    log_probs = torch.zeros_like(value)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        log_probs.copy_(value)
        results = gpu_step(log_probs, integers, blank)
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2200, 1000, 1000, 20), (200, 4000, 10, 1500)], ids=str)
def test_offsets_past_two_to_the_31(shape):
    """The log-probabilities, or alpha, have more; the last row must equal a small run."""
    batch, frames, vocabulary, tokens = shape
    assert batch * frames * max(vocabulary, 2 * tokens + 1) > 2**31
    small = torch.randn(1, frames, vocabulary, device="cuda").log_softmax(2)
    target = torch.randint(1, vocabulary, (1, tokens), device="cuda")

    def last(rows):
        log_probs = small.expand(rows, -1, -1).contiguous().requires_grad_()
        integers = (
            target.expand(rows, -1),
            torch.full((rows,), frames, device="cuda"),
            torch.full((rows,), tokens, device="cuda"),
        )
        loss = ops.ctc_loss(log_probs, *integers, blank_index=0)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        return loss[-1].detach().clone(), gradient[-1].clone()

    for large, alone in zip(last(batch), last(1), strict=True):
        assert torch.equal(large, alone)
