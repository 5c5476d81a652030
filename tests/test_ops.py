"""The operator and its backends against the float64 PyTorch loop. Runs without SpeechBrain."""

import contextlib
import itertools
import math
import warnings

import pytest
import torch
from conftest import relative_error

from sb_fast_sligru import _library, backend, ops, reference

# Backend -> device. Every test of a kernel runs over this table.
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("stepwise", "cuda", id="stepwise", marks=pytest.mark.gpu),
]
each_backend = pytest.mark.parametrize("name, device", BACKENDS)

# Odd B, T and H; T = 1, B = 1, H = 1.
SHAPES = [(1, 1, 1), (3, 7, 12), (5, 2, 33), (1, 31, 64), (4, 9, 130)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-H{}".format(*s))

# Name -> (layer_norm, affine, with h0, with mask). Every option is on in one and off in another.
OPTIONS = {
    "sligru": (True, False, False, False),
    "sligru-h0-mask": (True, False, True, True),
    "sligru-affine-h0": (True, True, True, False),
    "ligru-mask": (False, False, False, True),
    "ligru-h0": (False, False, True, False),
}
each_option = pytest.mark.parametrize("option", OPTIONS)
each_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])

NAMES = ("wx", "u", "h0", "ln_weight", "ln_bias")


@pytest.fixture(autouse=True, scope="module")
def exact_products_on_one_thread():
    """Without TF32; on tensors this small CPU threads only wait for each other."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = tf32


def make_inputs(shape, option, bidirectional=False):
    """Random float64 arguments on the CPU; the tensors among them want gradients, the mask not."""
    (batch, time, hidden), (layer_norm, affine, with_h0, with_mask) = shape, OPTIONS[option]
    rows = batch * (2 if bidirectional else 1)

    def randn(*sizes, scale=1.0):
        return scale * torch.randn(*sizes, dtype=torch.float64)

    return {
        "wx": randn(batch, time, 2 * hidden),
        # Li-GRU has no norm that bounds it: keep its recurrence contracting.
        "u": randn(2 * hidden, hidden, scale=(1.0 if layer_norm else 0.5) / math.sqrt(hidden)),
        "h0": randn(rows, hidden) if with_h0 else None,
        "drop_mask": (torch.rand(rows, hidden) < 0.8).double() / 0.8 if with_mask else None,
        "ln_weight": 1 + randn(2 * hidden, scale=0.2) if affine else None,
        "ln_bias": randn(2 * hidden, scale=0.2) if affine else None,
        "layer_norm": layer_norm,
        "bidirectional": bidirectional,
    }


def run(name, arguments, upstream=None, device="cpu", dtype=torch.float64, autocast=None):
    """The output and, given the gradient `upstream` of it, every gradient, by name."""
    inputs = {
        key: value.to(device, dtype).requires_grad_(upstream is not None and key != "drop_mask")
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arguments.items()
    }
    casting = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with backend(name), casting:
        h = ops.light_gru(**inputs)
    results = {"h": h}
    if upstream is not None:
        wanted = [key for key in NAMES if inputs[key] is not None]
        gradients = torch.autograd.grad(
            h, [inputs[key] for key in wanted], upstream.to(device, h.dtype)
        )
        results.update(zip(wanted, gradients, strict=True))
    return results


def upstream_for(arguments):
    batch, time, width = arguments["wx"].shape
    directions = 2 if arguments["bidirectional"] else 1
    return torch.randn(batch, time, directions * width // 2, dtype=torch.float64)


def assert_close(results, expected, bounds):
    assert results.keys() == expected.keys()
    for key, value in results.items():
        bound = bounds[key] if isinstance(bounds, dict) else bounds
        error = relative_error(value, expected[key])
        assert error <= bound, f"{key}: relative error {error:.2e}, allowed {bound:.2e}"


# ---- values


@each_backend
@each_shape
@each_option
@each_direction
def test_float64_matches_the_loop(name, device, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    # H = 1: a LayerNorm over two values has a gradient near zero, a difference of large ones.
    bound = 1e-9 if shape[2] == 1 else 1e-12
    assert_close(run(name, arguments, upstream, device), expected, bound)


@each_backend
@each_activation
@each_direction
@pytest.mark.parametrize("option", ["sligru-affine-h0", "ligru-mask"])
def test_activations(name, device, activation, bidirectional, option):
    arguments = make_inputs((3, 6, 20), option, bidirectional) | {"activation": activation}
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    assert_close(run(name, arguments, upstream, device), expected, 1e-12)


# dtype of the tensors, autocast dtype
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
}


@each_backend
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("option", ["sligru-h0-mask", "sligru-affine-h0", "ligru-h0"])
@each_direction
def test_error_is_no_worse_than_the_loop_in_the_same_precision(
    name, device, precision, option, bidirectional
):
    """Against float64, with tanh: ReLU's kink would make either gradient a matter of luck.

    1.5 covers the luck of rounding. It is needed in float32 by dU, which is one long product here
    and a sum of one product a step in the loop: 2.2e-7 against 1.9e-7.
    """
    dtype, autocast = PRECISIONS[precision]
    arguments = make_inputs((6, 60, 96), option, bidirectional) | {"activation": "tanh"}
    # What the low precision sees is exact in it, so that only the computation is compared.
    arguments = {
        key: value.to(autocast or dtype).double() if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    upstream = upstream_for(arguments)
    exact = run("reference", arguments, upstream)
    eager = run("reference", arguments, upstream, device, dtype, autocast)
    bounds = {key: 1.5 * relative_error(value, exact[key]) for key, value in eager.items()}
    results = run(name, arguments, upstream, device, dtype, autocast)
    assert results["h"].dtype == eager["h"].dtype == dtype
    assert_close(results, exact, bounds)


@each_backend
def test_autocast_takes_16_bit_wx(name, device):
    """A BatchNorm under autocast hands on 16-bit wx, beside float32 weights."""
    arguments = make_inputs((3, 9, 32), "sligru")
    wx = arguments["wx"].to(device, torch.bfloat16).requires_grad_()
    u = arguments["u"].to(device, torch.float32).requires_grad_()
    with backend(name), torch.autocast(device, torch.bfloat16):
        h = ops.light_gru(wx, u, layer_norm=True)
    assert h.dtype == torch.float32
    h.sum().backward()
    assert wx.grad.dtype == torch.bfloat16 and u.grad.dtype == torch.float32
    exact = run("reference", arguments)
    assert relative_error(h, exact["h"]) < 1e-2


@each_backend
@each_direction
def test_several_chunks_of_time(name, device, bidirectional):
    """The backward goes through time in chunks: of 8 MiB on the CPU, of 64 MiB on a GPU."""
    arguments = make_inputs((32, 301, 256), "sligru-affine-h0", bidirectional)
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    assert_close(run(name, arguments, upstream, device), expected, 1e-11)


@each_backend
def test_strided_inputs(name, device):
    """Slices of wider tensors, a transposed one, an upstream gradient without memory of its own."""
    torch.manual_seed(7)
    wide = torch.randn(4, 12, 50, dtype=torch.float64, device=device)
    for wx in (wide[:, 1:8, 3:43], wide[::2, ::3, :40], wide.permute(1, 0, 2)[..., ::2][..., :20]):
        hidden = wx.shape[2] // 2
        u = torch.randn(hidden, 2 * hidden, dtype=torch.float64, device=device).t() / 4
        wx, u = wx.detach().requires_grad_(), u.detach().requires_grad_()
        assert not wx.is_contiguous()
        gradients = []
        for backend_name in (name, "reference"):
            with backend(backend_name):
                h = ops.light_gru(wx, u, layer_norm=True)
            gradients.append(torch.autograd.grad(h.sum(), [wx, u]))
        for ours, expected in zip(*gradients, strict=True):
            assert relative_error(ours, expected) < 1e-12


@each_backend
def test_one_row_of_h0_and_mask_serves_every_sequence(name, device):
    arguments = make_inputs((5, 4, 6), "sligru-h0-mask")
    arguments["h0"], arguments["drop_mask"] = arguments["h0"][:1], arguments["drop_mask"][:1]
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    results = run(name, arguments, upstream, device)
    assert results["h0"].shape == (1, 6)
    assert_close(results, expected, 1e-12)


@each_backend
def test_backward_direction_is_the_forward_one_on_flipped_time(name, device):
    arguments = make_inputs((2, 9, 16), "sligru")
    both = run(name, arguments | {"bidirectional": True}, device=device)["h"]
    flipped = run(name, arguments | {"wx": arguments["wx"].flip(1)}, device=device)["h"].flip(1)
    assert relative_error(both[..., :16], run(name, arguments, device=device)["h"]) < 1e-14
    assert relative_error(both[..., 16:], flipped) < 1e-14


@each_backend
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)], ids=["no-batch", "no-time"])
@each_direction
def test_empty_input_gives_empty_output_and_zero_gradients(name, device, shape, bidirectional):
    arguments = make_inputs(shape, "sligru-affine-h0", bidirectional)
    upstream = upstream_for(arguments)
    results = run(name, arguments, upstream, device)
    assert results["h"].shape == upstream.shape
    assert results["wx"].shape == arguments["wx"].shape
    assert not results["u"].any()


@each_backend
@each_activation
@pytest.mark.parametrize("place", ["wx", "h0", "u"])
def test_nan_reaches_the_output(name, device, activation, place):
    """fmax(NaN, 0) is 0, and torch.relu(NaN) is NaN: as in torch, here too."""
    arguments = make_inputs((2, 4, 8), "sligru-affine-h0") | {"activation": activation}
    arguments[place][0, 0] = math.nan
    h = run(name, arguments, device=device)["h"].cpu()
    expected = run("reference", arguments)["h"]
    assert expected.isnan().any()
    assert torch.equal(h.isnan(), expected.isnan())


@each_backend
def test_same_input_same_bits(name, device):
    arguments = make_inputs((7, 50, 40), "sligru-affine-h0", bidirectional=True)
    upstream = upstream_for(arguments)
    first = run(name, arguments, upstream, device, torch.float32)
    for _ in range(3):
        again = run(name, arguments, upstream, device, torch.float32)
        assert all(torch.equal(first[key], again[key]) for key in first)


# ---- autograd


@each_backend
@each_option
@each_direction
def test_gradcheck(name, device, option, bidirectional):
    arguments = make_inputs((2, 4, 3), option, bidirectional) | {"activation": "tanh"}
    tensors = [key for key in NAMES if arguments[key] is not None]
    values = [arguments[key].to(device).requires_grad_() for key in tensors]
    fixed = {key: value for key, value in arguments.items() if key not in tensors}
    if fixed["drop_mask"] is not None:
        fixed["drop_mask"] = fixed["drop_mask"].to(device)

    def function(*values):
        with backend(name):
            return ops.light_gru(**dict(zip(tensors, values, strict=True)), **fixed)

    assert torch.autograd.gradcheck(function, values)


@each_backend
def test_gradients_nobody_wants_are_not_computed(name, device):
    arguments = make_inputs((2, 5, 8), "sligru-affine-h0")
    tensors = [
        arguments[key].to(device) if arguments[key] is not None else None
        for key in ("wx", "u", "h0", "drop_mask", "ln_weight", "ln_bias")
    ]
    options = (True, 1e-5, "relu", False, torch.float64, name)
    h, rho = torch.ops.sb_fast_sligru.light_gru(*tensors, *options)
    full = torch.ops.sb_fast_sligru.light_gru_backward(
        torch.randn_like(h), *tensors, *options, h, rho, True, True, True, True
    )
    assert [tuple(g.shape) for g in full] == [(2, 5, 16), (16, 8), (2, 8), (16,), (16,)]
    for i, wanted in enumerate(itertools.product([False, True], repeat=4)):
        torch.manual_seed(i)
        grad_h = torch.randn_like(h)
        some = torch.ops.sb_fast_sligru.light_gru_backward(
            grad_h, *tensors, *options, h, rho, *wanted
        )
        full = torch.ops.sb_fast_sligru.light_gru_backward(
            grad_h, *tensors, *options, h, rho, True, True, True, True
        )
        for need, ours, expected in zip((*wanted, wanted[3]), some, full, strict=True):
            assert torch.equal(ours, expected) if need else ours.numel() == 0


@each_backend
def test_saves_inputs_h_and_rho_only_and_nothing_without_grad(name, device):
    arguments = make_inputs((3, 11, 10), "sligru-affine-h0")
    wx, u, h0, weight, bias = (arguments[key].to(device).requires_grad_() for key in NAMES)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.light_gru(wx, u, h0, None, weight, bias, layer_norm=True)
        assert sorted(saved) == sorted(
            [(3, 11, 20), (20, 10), (3, 10), (20,), (20,), (3, 11, 10), (3, 11)]
        )
        saved.clear()
        with torch.no_grad():
            h = ops.light_gru(wx, u, h0, None, weight, bias, layer_norm=True)
    assert not saved and h.grad_fn is None


@each_backend
def test_second_derivative_is_refused_and_the_reference_has_it(name, device):
    def first_gradient(backend_name):
        torch.manual_seed(3)
        wx = torch.randn(2, 4, 8, dtype=torch.float64, device=device, requires_grad=True)
        u = torch.randn(8, 4, dtype=torch.float64, device=device, requires_grad=True)
        with backend(backend_name):
            h = ops.light_gru(wx, u, layer_norm=True, activation="tanh")
            return torch.autograd.grad(h.square().sum(), wx, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        first_gradient(name).sum().backward()
    first_gradient("reference").sum().backward()


@each_backend
@each_option
@each_direction
def test_opcheck(name, device, option, bidirectional):
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    arguments = make_inputs((2, 3, 4), option, bidirectional)
    tensors = [
        arguments[key] if arguments[key] is None else arguments[key].to(device)
        for key in ("wx", "u", "h0", "drop_mask", "ln_weight", "ln_bias")
    ]
    options = (arguments["layer_norm"], 1e-5, "relu", bidirectional, torch.float64, name)
    h, rho = torch.ops.sb_fast_sligru.light_gru(*tensors, *options)
    torch.library.opcheck(
        torch.ops.sb_fast_sligru.light_gru_backward,
        (torch.randn_like(h), *tensors, *options, h, rho, True, True, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    for key, tensor in zip(
        ("wx", "u", "h0", "drop_mask", "ln_weight", "ln_bias"), tensors, strict=True
    ):
        if tensor is not None and key != "drop_mask":
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.sb_fast_sligru.light_gru, (*tensors, *options))


@each_backend
def test_compiles_in_one_graph_for_any_batch_and_length(name, device):
    compiled = torch.compile(
        lambda wx, u: ops.light_gru(wx, u, layer_norm=True) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    torch._dynamo.reset()
    for batch, time in ((3, 5), (4, 9), (2, 17)):
        wx = torch.randn(batch, time, 16, device=device, requires_grad=True)
        u = torch.randn(16, 8, device=device, requires_grad=True)
        with backend(name):
            compiled(wx, u).sum().backward()
            ours = wx.grad, u.grad
            wx.grad = u.grad = None
            (ops.light_gru(wx, u, layer_norm=True) * 2).sum().backward()
        assert torch.equal(ours[0], wx.grad) and torch.equal(ours[1], u.grad)


# ---- arguments


BAD_ARGUMENTS = {
    "rank": ({"wx": torch.zeros(4, 8)}, r"wx: got shape \(4, 8\), expected \[B, T, 2H\]"),
    "width": ({"wx": torch.zeros(2, 3, 10)}, r"wx: got shape \(2, 3, 10\).*2H = 8"),
    "u-shape": ({"u": torch.zeros(8, 8)}, r"u: got shape \(8, 8\), expected \[2H, H\]"),
    "integer": ({"wx": torch.zeros(2, 3, 8, dtype=torch.int64)}, r"wx: got torch.int64"),
    "mixed-dtypes": ({"wx": torch.zeros(2, 3, 8).double()}, r"wx: got torch.float64 beside u"),
    "list": ({"u": [[0.0]]}, r"u: got list, expected a torch.Tensor"),
    "device": ({"u": torch.zeros(8, 4, device="meta")}, r"u: got device meta, expected cpu"),
    "h0-rows": ({"h0": torch.zeros(3, 4)}, r"h0: got shape \(3, 4\), expected \[2, 4\]"),
    "mask-width": ({"drop_mask": torch.zeros(2, 5)}, r"drop_mask: got shape \(2, 5\)"),
    "mask-grad": (
        {"drop_mask": torch.zeros(2, 4, requires_grad=True)},
        r"drop_mask: requires a gradient",
    ),
    "bidirectional-h0": (
        {"h0": torch.zeros(2, 4), "bidirectional": True},
        r"h0: .*expected \[4, 4\] \(2B rows\)",
    ),
    "ln-weight": ({"ln_weight": torch.zeros(4)}, r"ln_weight: got shape \(4,\), expected \[8\]"),
    "ln-without-norm": (
        {"ln_bias": torch.zeros(8), "layer_norm": False},
        r"ln_bias: given, but layer_norm is False",
    ),
    "activation": ({"activation": "gelu"}, r"activation: got 'gelu', expected one of relu, tanh"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    good = {"wx": torch.zeros(2, 3, 8), "u": torch.zeros(8, 4), "layer_norm": True}
    with backend(name), pytest.raises(ValueError, match=message):
        ops.light_gru(**(good | changed))


def call_op(**changed):
    arguments = {
        "wx": torch.zeros(2, 3, 8),
        "u": torch.zeros(8, 4),
        "h0": None,
        "drop_mask": None,
        "ln_weight": None,
        "ln_bias": None,
        "layer_norm": True,
        "eps": 1e-5,
        "activation": "relu",
        "bidirectional": False,
        "operand_dtype": torch.float32,
        "backend": "cpu",
    }
    return torch.ops.sb_fast_sligru.light_gru(**(arguments | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"wx": torch.zeros(3, 8)}, r"wx: got Float \[3, 8\], expected \[B, T, 2H\]"),
        ({"wx": torch.zeros(2, 3, 6)}, r"wx: its last axis is 6, expected 2H = 8"),
        ({"u": torch.zeros(8, 5)}, r"u: got Float \[8, 5\], expected \[2H, H\]"),
        ({"h0": torch.zeros(1, 4)}, r"h0: got Float \[1, 4\], expected Float \[2, 4\]"),
        ({"drop_mask": torch.zeros(2, 4).double()}, r"drop_mask: got Double"),
        ({"ln_bias": torch.zeros(8), "layer_norm": False}, r"ln_weight, ln_bias: given although"),
        ({"operand_dtype": torch.float64}, r"dtypes: got wx Float, u Float, operands Double"),
        ({"operand_dtype": torch.int64}, r"operand_dtype: got Long"),
        ({"activation": "gelu"}, r'activation: got "gelu"'),
        ({"backend": "stepwise"}, r'backend: got "stepwise", expected "cpu"'),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    with pytest.raises(RuntimeError, match=message):
        call_op(**changed)


# ---- choice of backend


def test_backend_choice():
    assert ops.choose_backend("cpu", 8, torch.float32)[0] == "cpu"
    assert ops.choose_backend("meta", 8, torch.float32)[0] == "reference"
    with backend("reference"):
        assert ops.choose_backend("cpu", 8, torch.float32) == ("reference", "forced")
        with backend("auto"):
            assert ops.choose_backend("cpu", 8, torch.float32)[0] == "cpu"
        assert ops.choose_backend("cpu", 8, torch.float32) == ("reference", "forced")
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of auto, reference"):
        with backend("fast"):
            pass
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        ops.light_gru(torch.zeros(2, 3, 8), torch.zeros(8, 4), layer_norm=True)


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    arguments = make_inputs((2, 3, 4), "sligru")
    expected = run("reference", arguments)["h"]
    with pytest.warns(UserWarning, match="slow PyTorch loop.*not built, says this test"):
        h = run("auto", arguments)["h"]
    assert torch.equal(h, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("auto", arguments)
    with pytest.raises(RuntimeError, match='backend\\("cpu"\\) is forced, but it is not built'):
        run("cpu", arguments)


# ---- CUDA alone


@pytest.mark.gpu
def test_cuda_graph_replays_the_training_step():
    arguments = make_inputs((4, 12, 32), "sligru")
    wx = arguments["wx"].float().cuda().requires_grad_()
    u = arguments["u"].float().cuda().requires_grad_()

    def step():
        h = ops.light_gru(wx, u, layer_norm=True, bidirectional=True)
        return (h, *torch.autograd.grad(h.square().sum(), [wx, u]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        wx.copy_(torch.randn_like(wx))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    side = torch.cuda.Stream()
    u = torch.randn(64, 32, device="cuda")
    wx = torch.zeros(4, 6, 64, device="cuda")
    value = torch.randn(4, 6, 64, device="cuda")
    expected = ops.light_gru(value, u, layer_norm=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        wx.copy_(value)
        h = ops.light_gru(wx, u, layer_norm=True)
    side.synchronize()
    assert torch.equal(h, expected)


@pytest.mark.gpu
def test_memory_of_the_backward_is_bounded_in_time():
    """Beyond inputs, h and gradients, the temporaries of the chunks must not grow with T."""
    extra = []
    for time in (2000, 8000):
        wx = torch.randn(8, time, 512, device="cuda", requires_grad=True)
        u = torch.randn(512, 256, device="cuda", requires_grad=True)
        h = ops.light_gru(wx, u, layer_norm=True)
        upstream = torch.randn_like(h)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(h, [wx, u], upstream)
        extra.append(torch.cuda.max_memory_allocated() - before - wx.numel() * 4)
    assert extra[1] < 1.1 * extra[0]
