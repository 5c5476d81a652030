"""The operator and its backends against the float64 PyTorch loop. Runs without SpeechBrain."""

import asyncio
import contextlib
import itertools
import math
import threading
import warnings

import pytest
import torch
from helpers import run_limited
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sb_fast_sligru import _library, backend, info, machine, ops, reference
from sb_fast_sligru.ops import _backends, _light_gru
from sb_fast_sligru.ops._autograd import dtype_name
from sb_fast_sligru.reference import relative_error

# Backend, its device and the dtype that a test of more than rounding uses on it.
CPU = pytest.param("cpu", "cpu", torch.float64, id="cpu")
STEPWISE = pytest.param("stepwise", "cuda", torch.float64, id="stepwise", marks=pytest.mark.gpu)
PERSISTENT = pytest.param(
    "persistent", "cuda", torch.bfloat16, id="persistent", marks=pytest.mark.gpu
)
PERSISTENT_FLOAT32 = pytest.param(
    "persistent", "cuda", torch.float32, id="persistent-float32", marks=pytest.mark.gpu
)
CPU_AND_GPU = [
    pytest.param(name, device, id=name, marks=marks)
    for name, device, marks in (
        ("cpu", "cpu", ()),
        ("stepwise", "cuda", pytest.mark.gpu),
        ("persistent", "cuda", pytest.mark.gpu),
    )
]
each_backend = pytest.mark.parametrize(
    "name, device, dtype", [CPU, STEPWISE, PERSISTENT, PERSISTENT_FLOAT32]
)
each_exact_backend = pytest.mark.parametrize("name, device, dtype", [CPU, STEPWISE])
# Relative error against float64 that those dtypes allow on a few steps, without ReLU's kink.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

# Odd B, T and H; T = 1, B = 1, H = 1.
SHAPES = [(1, 1, 1), (3, 7, 12), (5, 2, 33), (1, 31, 64), (4, 9, 130)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-H{}".format(*s))

# Name -> (layer_norm, affine, with h0, with mask, with lengths or packed by them). Every option is
# on in one and off in another.
OPTIONS = {
    "sligru": (True, False, False, False, None),
    "sligru-h0-mask": (True, False, True, True, None),
    "sligru-affine-h0": (True, True, True, False, None),
    "sligru-affine-h0-mask-lengths": (True, True, True, True, "lengths"),
    "sligru-h0-packed": (True, False, True, False, "packed"),
    "ligru-mask": (False, False, False, True, None),
    "ligru-h0": (False, False, True, False, None),
    "ligru-h0-lengths": (False, False, True, False, "lengths"),
}
LENGTHS = [option for option, (*_, lengths) in OPTIONS.items() if lengths]
each_option = pytest.mark.parametrize("option", OPTIONS)
each_activation = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
each_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])

NAMES = ("wx", "u", "h0", "ln_weight", "ln_bias")


pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small


def make_inputs(shape, option, bidirectional=False):
    """Random float64 arguments on the CPU; the tensors among them want gradients, the mask not."""
    batch, time, hidden = shape
    layer_norm, affine, with_h0, with_mask, with_lengths = OPTIONS[option]
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
        "lengths": torch.randint(time + 1, (batch,)) if with_lengths else None,
        "packed": with_lengths == "packed",
        "layer_norm": layer_norm,
        "bidirectional": bidirectional,
    }


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def call(packed, **inputs):
    """The operator; packed, on the valid frames alone, of which it makes a padded batch again."""
    if not packed:
        return ops.light_gru(**inputs)
    wx = inputs.pop("wx")
    valid = torch.arange(wx.shape[1], device=wx.device) < inputs["lengths"][:, None]
    h = ops.light_gru(wx[valid], **inputs, time=wx.shape[1])
    padded = h.new_zeros(*valid.shape, h.shape[1])
    return padded.masked_scatter(valid[..., None], h)


def run(name, arguments, upstream=None, device="cpu", dtype=torch.float64, autocast=None):
    """The output and, given the gradient `upstream` of it, every gradient, by name."""
    inputs = {
        key: value.to(device, dtype).requires_grad_(upstream is not None and key != "drop_mask")
        if is_float(value)
        else value
        for key, value in arguments.items()
    }
    if inputs["lengths"] is not None:
        inputs["lengths"] = inputs["lengths"].to(device)
    casting = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with backend(name), casting:
        h = call(**inputs)
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


@each_exact_backend
@each_shape
@each_option
@each_direction
def test_float64_matches_the_loop(name, device, dtype, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    # H = 1: a LayerNorm over two values has a gradient near zero, a difference of large ones.
    bound = 1e-9 if shape[2] == 1 else 1e-12
    assert_close(run(name, arguments, upstream, device), expected, bound)


@each_exact_backend
@each_activation
@each_direction
@pytest.mark.parametrize("option", ["sligru-affine-h0", "ligru-mask"])
def test_activations(name, device, dtype, activation, bidirectional, option):
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
PRECISION_CASES = [
    pytest.param(name, device, precision, id=f"{name}-{precision}", marks=marks)
    for name, device, precisions, marks in (
        ("cpu", "cpu", PRECISIONS, ()),
        ("stepwise", "cuda", PRECISIONS, pytest.mark.gpu),
        ("persistent", "cuda", PRECISIONS, pytest.mark.gpu),
    )
    for precision in precisions
]
each_precision = pytest.mark.parametrize("name, device, precision", PRECISION_CASES)


def assert_no_worse_than_the_loop(name, device, precision, *draws):
    """Every error against float64, the mean over the draws, is at most twice the loop's.

    That is the loop in the same precision. With tanh: ReLU's kink would make either gradient a
    matter of luck. 2 covers the luck of rounding and of the order of sums; the persistent kernels'
    split of float32 may take 3. benchmarks/bench_rnn.py --accuracy compares long sequences.
    """
    dtype, autocast = PRECISIONS[precision]
    errors = {"ours": {}, "eager": {}}
    for arguments in draws:
        # What the low precision is given is exact in it, so that only the computation is compared.
        arguments = {
            key: value.to(dtype).double() if is_float(value) else value
            for key, value in arguments.items()
        } | {"activation": "tanh"}
        upstream = upstream_for(arguments).to(dtype).double()
        exact = run("reference", arguments, upstream)
        for who, backend_name in (("ours", name), ("eager", "reference")):
            results = run(backend_name, arguments, upstream, device, dtype, autocast)
            assert results["h"].dtype == dtype and results.keys() == exact.keys()
            for key, value in results.items():
                error = relative_error(value, exact[key]) / len(draws)
                errors[who][key] = errors[who].get(key, 0) + error
    # A result of few values can be right by luck: allow a unit in the last place besides.
    last_place = torch.finfo(autocast or dtype).eps
    factor = 3 if (name, precision) == ("persistent", "float32") else 2
    for key, error in errors["ours"].items():
        bound = factor * errors["eager"][key] + last_place
        assert error <= bound, f"{key}: relative error {error:.2e}, allowed {bound:.2e}"


@each_precision
@pytest.mark.parametrize("option", ["sligru-h0-mask", "sligru-affine-h0", "ligru-h0", *LENGTHS])
@each_direction
def test_error_is_no_worse_than_the_loop(name, device, precision, option, bidirectional):
    draws = [make_inputs((6, 60, 96), option, bidirectional) for _ in range(3)]
    assert_no_worse_than_the_loop(name, device, precision, *draws)


def shape_id(shape):
    return "B{}-T{}-H{}".format(*shape)


# Rows at and beside those for which a CPU takes another product.
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(1, 30, 512), (2, 9, 100), (7, 9, 33), (16, 9, 64), (17, 9, 64)], ids=shape_id
)
@pytest.mark.parametrize("option", ["sligru-h0-mask", "sligru-affine-h0", "ligru-h0"])
@each_direction
def test_few_rows_on_a_cpu(precision, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    assert_no_worse_than_the_loop("cpu", "cpu", precision, arguments)


# H in steps of 8 from 16, at and beside the sizes that kernels pad to; rows that leave clusters
# partly filled, or take several waves of them.
CLUSTER_SHAPES = [
    (1, 1, 16),
    (3, 7, 24),
    (5, 2, 136),
    (1, 31, 256),
    (13, 4, 456),
    (70, 5, 512),
    (130, 3, 264),
    (9, 3, 520),
    (61, 4, 1024),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, precision, shape",
    [
        pytest.param(name, precision, shape, id=f"{name}-{precision}-{shape_id(shape)}")
        for name in ("stepwise", "persistent")
        for precision in PRECISIONS
        for shape in CLUSTER_SHAPES
    ],
)
@each_option
@each_direction
def test_shapes_around_those_of_clusters(name, precision, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    assert_no_worse_than_the_loop(name, "cuda", precision, arguments)


# Rows around and beyond those from which the kernels of up to 40 rows a cluster take over from
# those of 8 (H above 512): full and partly filled tiles of 8 rows, one wave of clusters and more.
MANY_ROWS_SHAPES = [
    (113, 1, 1024),
    (63, 4, 520),
    (120, 3, 1024),
    (127, 2, 776),
    (241, 2, 1024),
    (300, 3, 648),
]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "autocast-float16"])
@pytest.mark.parametrize("shape", MANY_ROWS_SHAPES, ids=shape_id)
@pytest.mark.parametrize("option", ["sligru-affine-h0", *LENGTHS, "ligru-h0"])
@each_direction
def test_many_rows(precision, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    assert_no_worse_than_the_loop("persistent", "cuda", precision, arguments)


# The largest layers, in 16-bit types alone: groups of 33 to 64 blocks, one wave of them and more.
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast-float16"])
@pytest.mark.parametrize("shape", [(3, 5, 1032), (17, 4, 1528), (40, 3, 2048)], ids=shape_id)
@pytest.mark.parametrize("option", ["sligru-affine-h0", *LENGTHS, "ligru-h0"])
@each_direction
def test_layers_above_1024_units(precision, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    assert_no_worse_than_the_loop("persistent", "cuda", precision, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [*range(16, 513, 8), *range(520, 1025, 72)])
def test_every_hidden_size(precision, hidden):
    arguments = make_inputs((3, 5, hidden), "sligru-affine-h0", bidirectional=True)
    assert_no_worse_than_the_loop("persistent", "cuda", precision, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_activation
@each_direction
def test_activations_in_low_precision(dtype, activation, bidirectional):
    """ReLU's kink can turn a gradient's element on or off: the loop shows how often."""
    arguments = make_inputs((5, 20, 64), "sligru-affine-h0", bidirectional)
    arguments["activation"] = activation
    upstream = upstream_for(arguments)
    exact = run("reference", arguments, upstream)
    eager = run("reference", arguments, upstream, "cuda", dtype)
    bounds = {key: 3 * relative_error(value, exact[key]) for key, value in eager.items()}
    for name in ("stepwise", "persistent"):
        assert_close(run(name, arguments, upstream, "cuda", dtype), exact, bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("shape", [(16, 1201, 512), (24, 450, 1024)], ids=["H512", "H1024"])
@pytest.mark.parametrize("option", ["sligru-affine-h0", *LENGTHS[:1]])
@each_direction
def test_chunks_of_time_in_low_precision(autocast, shape, bidirectional, option):
    """Long enough for several chunks of the persistent backward: of 224 MiB, at least 400 steps."""
    arguments = make_inputs(shape, option, bidirectional)
    arguments["activation"] = "tanh"
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream, "cuda")
    results = run("persistent", arguments, upstream, "cuda", torch.float32, autocast)
    eager = run("reference", arguments, upstream, "cuda", torch.float32, autocast)
    factor = 2 if autocast else 3
    bounds = {key: factor * relative_error(value, expected[key]) for key, value in eager.items()}
    assert_close(results, expected, bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e6])
@pytest.mark.parametrize("hidden", [40, 512])
@pytest.mark.parametrize("option", ["sligru-affine-h0", "ligru-mask"])
def test_float32_gradients_of_any_scale(scale, hidden, option):
    """Float16 holds neither 1e6 nor 1e-10: the split of the gradients must scale them, by row."""
    arguments = make_inputs((5, 9, hidden), option) | {"activation": "tanh"}
    upstream = upstream_for(arguments)
    upstream *= scale * torch.tensor([1, 1e-6, 1e-3, 1, 1e3]).view(-1, 1, 1)
    exact = run("reference", arguments, upstream)
    eager = run("reference", arguments, upstream, "cuda", torch.float32)
    results = run("persistent", arguments, upstream, "cuda", torch.float32)
    for row in range(5):
        for values in (exact, eager, results):
            values[f"wx[{row}]"] = values["wx"][row]
    bounds = {key: 3 * relative_error(value, exact[key]) + 1e-7 for key, value in eager.items()}
    assert_close(results, exact, bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_float32_weights_and_states_of_any_scale(scale):
    """The norm undoes a factor of u; a large input makes a large state with a leaky ReLU."""
    arguments = make_inputs((5, 9, 96), "sligru-h0-mask") | {"activation": "leaky_relu"}
    scaled_u = arguments | {"u": arguments["u"] * scale}
    scaled_wx = arguments | {"wx": arguments["wx"] * scale, "h0": arguments["h0"] * scale}
    for case in (scaled_u, scaled_wx):
        exact = run("reference", case)
        eager = run("reference", case, None, "cuda", torch.float32)
        bounds = {key: 3 * relative_error(value, exact[key]) + 1e-7 for key, value in eager.items()}
        assert_close(run("persistent", case, None, "cuda", torch.float32), exact, bounds)


@pytest.mark.parametrize("name, device", CPU_AND_GPU)
@each_activation
@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_small_numbers_keep_their_digits(name, device, activation, scale):
    """A tanh of 1 - 2 / (1 + e^2x) would lose those of a small x."""
    arguments = make_inputs((5, 9, 64), "ligru-mask") | {"activation": activation}
    arguments["wx"] = (arguments["wx"] * scale).float().double()
    exact = run("reference", arguments)
    assert_close(run(name, arguments, None, device, torch.float32), exact, 2e-6)


@pytest.mark.gpu
def test_float32_states_beyond_the_split_become_nan():
    """Documented: from 65520 on, where the high part would overflow float16."""
    arguments = make_inputs((1, 3, 16), "ligru-h0")
    arguments["h0"][0, 0] = 65520
    h = run("persistent", arguments, None, "cuda", torch.float32)["h"]
    assert h[0, -1].isnan().all()


@pytest.mark.gpu
def test_tf32_switch_leaves_the_float32_recurrence_alone():
    """Only the products outside the recurrence, which give gradients, obey torch's switch."""
    arguments = make_inputs((4, 30, 128), "sligru-affine-h0") | {"activation": "tanh"}
    upstream = upstream_for(arguments)
    exact = run("reference", arguments, upstream)
    off = run("persistent", arguments, upstream, "cuda", torch.float32)
    with machine.tf32(True):
        on = run("persistent", arguments, upstream, "cuda", torch.float32)
    assert torch.equal(on["h"], off["h"]) and not torch.equal(on["u"], off["u"])
    assert_close(off, exact, 1e-5)
    assert_close(on, exact, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "autocast",
    [None, torch.float16, torch.bfloat16],
    ids=["float32", "autocast-float16", "autocast-bfloat16"],
)
def test_gradients_survive_a_loss_scale_where_rho_is_largest(autocast):
    """Near h = 0 the norm multiplies by 1 / sqrt(eps) = 316; a GradScaler starts at 2 ** 16."""
    arguments = make_inputs((4, 40, 64), "sligru-h0-mask") | {"activation": "tanh"}
    arguments["h0"] *= 1e-6
    arguments["wx"][..., 64:] += 8  # the gate keeps h near zero for a while
    upstream = upstream_for(arguments) * 1e-5
    exact = run("reference", arguments, upstream, "cuda")

    def unscaled(name, autocast=autocast):
        results = run(name, arguments, upstream * 2**16, "cuda", torch.float32, autocast)
        return {key: value if key == "h" else value / 2**16 for key, value in results.items()}

    # 1 - z, here e^-8, loses digits in float32: the loop itself is off by 1e-4 to 2e-4.
    eager = {key: relative_error(value, exact[key]) for key, value in unscaled("reference").items()}
    for name, factor in {"stepwise": 2, "persistent": 3}.items():  # as for any float32 above
        bounds = {torch.bfloat16: 0.1, torch.float16: 0.02}.get(autocast) or {
            key: factor * error + 1e-7 for key, error in eager.items()
        }
        assert_close(unscaled(name), exact, bounds)


@each_backend
def test_autocast_takes_16_bit_wx(name, device, dtype):
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


@each_exact_backend
@pytest.mark.parametrize("option", ["sligru-affine-h0", *LENGTHS[:1]])
@each_direction
def test_several_chunks_of_time(name, device, dtype, bidirectional, option):
    """The backward goes through time in chunks: of 8 MiB on the CPU, of 64 MiB on a GPU."""
    arguments = make_inputs((32, 301, 256), option, bidirectional)
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    assert_close(run(name, arguments, upstream, device), expected, 1e-11)


@each_backend
def test_strided_inputs(name, device, dtype):
    """Slices of wider tensors, a transposed one, an upstream gradient without memory of its own."""
    torch.manual_seed(7)
    wide = torch.randn(4, 12, 110, dtype=torch.float64).to(device, dtype)
    for wx in (wide[:, 1:8, 3:51], wide[::2, ::3, :48], wide.permute(1, 0, 2)[..., ::2][..., :48]):
        hidden = wx.shape[2] // 2
        u = (torch.randn(hidden, 2 * hidden, dtype=torch.float64) / 4).to(device, dtype).t()
        wx, u = wx.detach().requires_grad_(), u.detach().requires_grad_()
        assert not wx.is_contiguous()
        with backend(name):
            h = ops.light_gru(wx, u, layer_norm=True, activation="tanh")
            ours = torch.autograd.grad(h.sum(), [wx, u])
        exact = [t.detach().double().requires_grad_() for t in (wx, u)]
        h = reference.light_gru(*exact, layer_norm=True, activation="tanh")
        for gradient, expected in zip(ours, torch.autograd.grad(h.sum(), exact), strict=True):
            assert relative_error(gradient, expected) < TOLERANCE[dtype]


@each_backend
def test_one_row_of_h0_and_mask_serves_every_sequence(name, device, dtype):
    arguments = make_inputs((5, 4, 16), "sligru-h0-mask") | {"activation": "tanh"}
    arguments["h0"], arguments["drop_mask"] = arguments["h0"][:1], arguments["drop_mask"][:1]
    upstream = upstream_for(arguments)
    expected = run("reference", arguments, upstream)
    results = run(name, arguments, upstream, device, dtype)
    assert results["h0"].shape == (1, 16)
    assert_close(results, expected, 2 * TOLERANCE[dtype])


@each_backend
def test_backward_direction_is_the_forward_one_on_flipped_time(name, device, dtype):
    arguments = make_inputs((2, 9, 16), "sligru")
    mirrored = arguments | {"wx": arguments["wx"].flip(1)}
    both = run(name, arguments | {"bidirectional": True}, None, device, dtype)["h"]
    forward = run(name, arguments, None, device, dtype)["h"]
    backward = run(name, mirrored, None, device, dtype)["h"].flip(1)
    # Equal but for the order in which a product over more rows adds up.
    bound = torch.finfo(dtype).eps * 8
    assert relative_error(both[..., :16], forward) < bound
    assert relative_error(both[..., 16:], backward) < bound


@each_backend
@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16)], ids=["no-batch", "no-time"])
@each_direction
def test_empty_input_gives_empty_output_and_zero_gradients(
    name, device, dtype, shape, bidirectional
):
    arguments = make_inputs(shape, "sligru-affine-h0", bidirectional)
    upstream = upstream_for(arguments)
    results = run(name, arguments, upstream, device, dtype)
    assert results["h"].shape == upstream.shape
    assert results["wx"].shape == arguments["wx"].shape
    assert not results["u"].any()


@each_backend
@each_activation
@pytest.mark.parametrize("place", ["wx", "h0", "u"])
def test_nan_reaches_the_output(name, device, dtype, activation, place):
    """fmax(NaN, 0) is 0, and torch.relu(NaN) is NaN: as in torch, here too."""
    arguments = make_inputs((2, 4, 16), "sligru-affine-h0") | {"activation": activation}
    arguments[place][0, 0] = math.nan
    h = run(name, arguments, None, device, dtype)["h"].cpu()
    expected = run("reference", arguments)["h"]
    assert expected.isnan().any()
    assert torch.equal(h.isnan(), expected.isnan())


def assert_same_bits(name, shape, option, device, dtype):
    arguments = make_inputs(shape, option, bidirectional=True)
    upstream = upstream_for(arguments)
    first = run(name, arguments, upstream, device, dtype)
    for _ in range(3):
        again = run(name, arguments, upstream, device, dtype)
        assert all(torch.equal(first[key], again[key]) for key in first)


@each_backend
def test_same_input_same_bits(name, device, dtype):
    dtype = torch.float32 if dtype == torch.float64 else dtype
    for option in ("sligru-affine-h0", *LENGTHS):
        assert_same_bits(name, (7, 50, 40), option, device, dtype)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="a BLAS, which promises neither, has the products of a CPU without AVX2",
)
@pytest.mark.parametrize("option", ["sligru-affine-h0", "ligru-h0"])
def test_few_rows_have_the_same_bits_with_any_number_of_threads_and_other_rows(option):
    arguments = make_inputs((11, 20, 512), option, bidirectional=False) | {"h0": None}
    before = torch.get_num_threads()
    tensors, options = operator_arguments(arguments, "cpu", "cpu", torch.float32)
    wx, *others = tensors
    try:
        torch.set_num_threads(1)
        expected = torch.ops.sb_fast_sligru.light_gru(*tensors, *options)[0]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(torch.ops.sb_fast_sligru.light_gru(*tensors, *options)[0], expected)
            for rows in (1, 2, 5):
                part = torch.ops.sb_fast_sligru.light_gru(wx[-rows:], *others, *options)[0]
                assert torch.equal(part, expected[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(5, 200, 256), (7, 200, 512), (30, 200, 512), (9, 200, 1024), (90, 50, 1024)],
    ids=shape_id,
)
@pytest.mark.parametrize("option", ["sligru-h0-mask", "ligru-mask", *LENGTHS])
def test_same_bits_from_every_kernel(dtype, shape, option):
    assert_same_bits("persistent", shape, option, "cuda", dtype)


# ---- lengths


def each_sequence(arguments, upstream):
    """The loop's results for every sequence alone, put together as those of the padded batch."""
    batch, time, gates = arguments["wx"].shape
    directions = 2 if arguments["bidirectional"] else 1
    h0, mask = (
        None if arguments[key] is None else arguments[key].view(directions, batch, -1)
        for key in ("h0", "drop_mask")
    )
    expected = {"h": torch.zeros_like(upstream), "wx": torch.zeros_like(arguments["wx"])}
    if h0 is not None:
        expected["h0"] = torch.zeros_like(h0)
    for i, length in enumerate(arguments["lengths"].tolist()):
        alone = arguments | {"lengths": None, "packed": False}
        alone["wx"] = arguments["wx"][i : i + 1, :length]
        for key, value in (("h0", h0), ("drop_mask", mask)):
            alone[key] = None if value is None else value[:, i]
        results = run("reference", alone, upstream[i : i + 1, :length])
        for key in ("h", "wx"):
            expected[key][i, :length] = results.pop(key)[0]
        if h0 is not None:
            expected["h0"][:, i] = results.pop("h0")
        for key, value in results.items():
            expected[key] = expected.get(key, 0) + value
    if h0 is not None:
        expected["h0"] = expected["h0"].flatten(0, 1)
    return expected


@pytest.mark.parametrize("name", ["reference", "cpu"])
@each_shape
@pytest.mark.parametrize("option", LENGTHS)
@each_direction
def test_a_padded_batch_is_its_sequences_one_by_one(name, shape, option, bidirectional):
    arguments = make_inputs(shape, option, bidirectional)
    upstream = upstream_for(arguments)
    expected = each_sequence(arguments, upstream)
    padding = torch.arange(shape[1]) >= arguments["lengths"][:, None]
    arguments["wx"][padding] = math.nan  # padding may hold anything, and so may its gradient
    upstream[padding] = math.nan
    bound = 1e-9 if shape[2] == 1 else 1e-12
    assert_close(run(name, arguments, upstream), expected, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [16, 256, 512, 1024])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", LENGTHS)
@each_direction
def test_padding_may_hold_anything(hidden, dtype, option, bidirectional):
    """On a GPU; and lengths out of bounds, which nobody can check there, are clamped."""
    arguments = make_inputs((9, 13, hidden), option, bidirectional)
    upstream = upstream_for(arguments)
    padding = torch.arange(13) >= arguments["lengths"][:, None]
    for name in ("stepwise",) if dtype == torch.float64 else ("stepwise", "persistent"):
        clean = run(name, arguments, upstream, "cuda", dtype)
        spoilt = arguments | {"wx": arguments["wx"].clone()}
        spoilt["wx"][padding] = math.nan
        spoilt["lengths"] = arguments["lengths"].clone()
        spoilt["lengths"][spoilt["lengths"] == 13] = 99
        spoilt["lengths"][spoilt["lengths"] == 0] = -1
        for key, value in run(
            name, spoilt, upstream.masked_fill(padding[..., None], math.nan), "cuda", dtype
        ).items():
            assert torch.equal(value, clean[key]), (name, key)


@each_backend
def test_lengths_of_all_steps_change_no_bit(name, device, dtype):
    arguments = make_inputs((5, 6, 32), "sligru-h0-mask", bidirectional=True)
    upstream = upstream_for(arguments)
    plain = run(name, arguments, upstream, device, dtype)
    full = arguments | {"lengths": torch.full((5,), 6)}
    for key, value in run(name, full, upstream, device, dtype).items():
        assert torch.equal(value, plain[key]), key


# ---- autograd


def operator_arguments(arguments, name, device, dtype):
    """Positional arguments of the operator itself: seven tensors, then the options."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {
        "wx": dtype,
        "u": dtype,
        "h0": acc,
        "drop_mask": acc,
        "ln_weight": acc,
        "ln_bias": acc,
        "lengths": torch.int32,
    }
    time = None
    if arguments["packed"]:
        batch, time, _ = arguments["wx"].shape
        valid = torch.arange(time) < arguments["lengths"][:, None]
        arguments = arguments | {"wx": arguments["wx"][valid]}
    tensors = [
        None if arguments[key] is None else arguments[key].to(device, dtypes[key]) for key in dtypes
    ]
    flags = time, arguments["layer_norm"], 1e-5, "relu", arguments["bidirectional"]
    return tensors, (*flags, dtype_name(dtype), name)


@each_exact_backend
@each_option
@each_direction
def test_gradcheck(name, device, dtype, option, bidirectional):
    arguments = make_inputs((2, 4, 3), option, bidirectional) | {"activation": "tanh"}
    tensors = [key for key in NAMES if arguments[key] is not None]
    values = [arguments[key].to(device).requires_grad_() for key in tensors]
    fixed = {key: value for key, value in arguments.items() if key not in tensors}
    for key in ("drop_mask", "lengths"):
        if fixed[key] is not None:
            fixed[key] = fixed[key].to(device)

    def function(*values):
        with backend(name):
            return call(**dict(zip(tensors, values, strict=True)), **fixed)

    assert torch.autograd.gradcheck(function, values)


@each_backend
def test_gradients_nobody_wants_are_not_computed(name, device, dtype):
    arguments = make_inputs((2, 5, 16), "sligru-affine-h0")
    tensors, options = operator_arguments(arguments, name, device, dtype)
    h, rho = torch.ops.sb_fast_sligru.light_gru(*tensors, *options)
    grad_h = torch.randn_like(h)

    def backward(*needs):
        return torch.ops.sb_fast_sligru.light_gru_backward(
            grad_h, *tensors, *options, h, rho, *needs
        )

    full = backward(True, True, True, True)
    assert [tuple(g.shape) for g in full] == [(2, 5, 32), (32, 16), (2, 16), (32,), (32,)]
    for needs in itertools.product([False, True], repeat=4):
        for need, ours, expected in zip((*needs, needs[3]), backward(*needs), full, strict=True):
            assert torch.equal(ours, expected) if need else ours.numel() == 0


@each_backend
def test_saves_inputs_h_and_rho_only_and_nothing_without_grad(name, device, dtype):
    arguments = make_inputs((3, 11, 16), "sligru-affine-h0")
    wx, u, h0, weight, bias = (arguments[key].to(device, dtype).requires_grad_() for key in NAMES)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with backend(name), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.light_gru(wx, u, h0, None, weight, bias, layer_norm=True)
        inputs = [(3, 11, 32), (32, 16), (3, 16), (32,), (32,)]
        assert sorted(saved) == sorted([*inputs, (3, 11, 16), (3, 11)])
        saved.clear()
        with torch.no_grad():
            h = ops.light_gru(wx, u, h0, None, weight, bias, layer_norm=True)
    assert not saved and h.grad_fn is None


@each_backend
def test_second_derivative_is_refused_and_the_reference_has_it(name, device, dtype):
    def first_gradient(backend_name):
        torch.manual_seed(3)
        wx = torch.randn(2, 4, 32, dtype=dtype, device=device, requires_grad=True)
        u = torch.randn(32, 16, dtype=dtype, device=device, requires_grad=True)
        with backend(backend_name):
            h = ops.light_gru(wx, u, layer_norm=True, activation="tanh")
            return torch.autograd.grad(h.square().sum(), wx, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        first_gradient(name).sum().backward()
    first_gradient("reference").sum().backward()


def derivatives_of_torch_func(function, x):
    """What torch.func and forward-mode differentiation give, by name."""
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(x)
    results = {
        "jvp": torch.func.jvp(function, (x,), (tangent,))[1],
        "jacfwd": torch.func.jacfwd(function)(x),
        "linearize": torch.func.linearize(function, x)[1](tangent),
        "grad": torch.func.grad(lambda x: function(x).square().sum())(x),
        "vjp": torch.func.vjp(function, x)[1](function(x))[0],
        "jacrev": torch.func.jacrev(function)(x),
        "hessian": torch.func.hessian(lambda x: function(x).square().sum())(x),
        "strategy": torch.autograd.functional.jacobian(
            function, x, strategy="forward-mode", vectorize=True
        ),
    }
    with forward_ad.dual_level():
        results["dual"] = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    return results


@each_exact_backend
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.filterwarnings("ignore:.*get_attr Node:UserWarning")
def test_derivatives_that_kernels_lack_are_the_loops(name, device, dtype, trains, monkeypatch):
    """Where nobody wants the weight's gradient, a tangent used to be dropped without a word."""
    monkeypatch.setattr(_backends, "_warned", set())
    arguments = make_inputs((2, 3, 4), "sligru", bidirectional=True)
    wx, u = (arguments[key].to(device) for key in ("wx", "u"))
    u.requires_grad_(trains)

    def function(wx):
        return ops.light_gru(wx, u, layer_norm=True, activation="tanh", bidirectional=True)

    with pytest.warns(UserWarning, match=r"slow PyTorch loop.*backend\(.reference.\) has"):
        ours = derivatives_of_torch_func(function, wx)
    with backend("reference"):
        expected = derivatives_of_torch_func(function, wx)
    assert_close(ours, expected, 1e-14)
    assert expected["jvp"].any() and expected["dual"].any()
    dual = forward_ad.dual_level()
    with backend(name):
        with dual, pytest.raises(RuntimeError, match=r"no forward-mode.*backend\(.reference.\)"):
            function(forward_ad.make_dual(wx, wx))
        with pytest.raises(RuntimeError, match=r"no gradient for torch.func; backend\(.reference"):
            torch.func.grad(lambda wx: function(wx).sum())(wx)
        function(wx)  # and afterwards it serves again


@each_exact_backend
@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")
def test_vmap(name, device, dtype):
    """Also over the gradients of an ordinary backward pass."""
    wx = torch.randn(5, 2, 3, 8, dtype=dtype, device=device, requires_grad=True)
    u = torch.randn(8, 4, dtype=dtype, device=device)
    with backend(name):
        h = torch.vmap(lambda wx: ops.light_gru(wx, u, layer_norm=True))(wx)
        for ours, each in zip(h, wx, strict=True):
            assert relative_error(ours, ops.light_gru(each, u, layer_norm=True)) < 1e-14
        single = ops.light_gru(wx[0], u, layer_norm=True)
        upstream = torch.randn(3, *single.shape, dtype=dtype, device=device)
        (batched,) = torch.autograd.grad(
            single, wx, upstream, is_grads_batched=True, retain_graph=True
        )
        for ours, gradient in zip(batched, upstream, strict=True):
            assert relative_error(ours, torch.autograd.grad(single, wx, gradient, True)[0]) < 1e-14


CHANGES = {
    "scaled": lambda h: h.mul_(2),
    "masked": lambda h: h.masked_fill_(h > 0.1, 0),
    "relu": torch.relu_,
    "dropout": lambda h: torch.nn.functional.dropout(h, 0.0, inplace=True).add_(1),
    "view": lambda h: h[:, :2].mul_(2),
    "item": lambda h: h[0, 1].zero_(),
    "no_grad": torch.no_grad()(lambda h: h.mul_(2)),
    "twice": lambda h: h.mul_(2).add_(h.detach()),
}


@each_exact_backend
@each_direction
@pytest.mark.parametrize("option", ["sligru-affine-h0", "ligru-mask"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_output_changed_in_place(name, device, dtype, change, option, bidirectional):
    arguments = make_inputs((3, 5, 6), option, bidirectional) | {"activation": "tanh"}
    upstream = upstream_for(arguments)

    def gradients(backend_name):
        inputs = {
            key: value.to(device).requires_grad_(key != "drop_mask")
            if isinstance(value, torch.Tensor)
            else value
            for key, value in arguments.items()
        }
        wanted = [inputs[key] for key in NAMES if inputs[key] is not None]
        with backend(backend_name):
            h = call(**inputs)
        change(h)
        results = []
        for _ in range(2):  # the graph may be used again, and the output changed between
            results += torch.autograd.grad(h, wanted, upstream.to(device), retain_graph=True)
        return dict(enumerate([h, *results]))

    assert_close(gradients(name), gradients("reference"), 1e-12)


@each_backend
def test_a_changed_input_is_an_error_as_ever(name, device, dtype):
    wx = torch.randn(2, 3, 32, dtype=dtype, device=device, requires_grad=True)
    u = torch.randn(32, 16, dtype=dtype, device=device)
    scaled = wx * 2
    with backend(name):
        h = ops.light_gru(scaled, u, layer_norm=True)
    scaled.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@each_backend
def test_an_unchanged_output_is_not_computed_again(name, device, dtype):
    wx = torch.randn(2, 3, 32, dtype=dtype, device=device, requires_grad=True)
    u = torch.randn(32, 16, dtype=dtype, device=device)
    forwards = []
    with backend(name):
        for change in (lambda h: h * 2, lambda h: h.mul_(2)):
            h = change(ops.light_gru(wx, u, layer_norm=True))
            with torch.profiler.profile() as profile:
                h.sum().backward()
            forwards.append(sum(e.name == "sb_fast_sligru::light_gru" for e in profile.events()))
    assert forwards == [0, 1]


@each_backend
def test_the_record_of_changes_holds_no_memory(name, device, dtype):
    """Else a loss that is kept after its backward would keep h."""
    wx = torch.randn(2, 3, 32, dtype=dtype, device=device, requires_grad=True)
    u = torch.randn(32, 16, dtype=dtype, device=device)
    with backend(name):
        h = ops.light_gru(wx, u, layer_norm=True)
    assert h.grad_fn.changes.counter.untyped_storage().nbytes() == 0


@each_backend
@each_option
@each_direction
def test_opcheck(name, device, dtype, option, bidirectional):
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    arguments = make_inputs((2, 3, 16), option, bidirectional)
    tensors, options = operator_arguments(arguments, name, device, dtype)
    h, rho = torch.ops.sb_fast_sligru.light_gru(*tensors, *options)
    torch.library.opcheck(
        torch.ops.sb_fast_sligru.light_gru_backward,
        (torch.randn_like(h), *tensors, *options, h, rho, True, True, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    for tensor, wanted in zip(tensors, (True, True, True, False, True, True, False), strict=True):
        if tensor is not None:
            tensor.requires_grad_(wanted)
    torch.library.opcheck(torch.ops.sb_fast_sligru.light_gru, (*tensors, *options))


@each_backend
def test_compiles_in_one_graph_for_any_batch_and_length(name, device, dtype):
    compiled = torch.compile(
        lambda wx, u: ops.light_gru(wx, u, layer_norm=True) * 2,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    torch._dynamo.reset()
    counters.clear()
    for batch, time in ((11, 25), (14, 29), (13, 37)):
        wx = torch.randn(batch, time, 32, dtype=dtype, device=device, requires_grad=True)
        u = torch.randn(32, 16, dtype=dtype, device=device, requires_grad=True)
        with backend(name):
            compiled(wx, u).sum().backward()
            ours = wx.grad, u.grad
            wx.grad = u.grad = None
            (ops.light_gru(wx, u, layer_norm=True) * 2).sum().backward()
        assert torch.equal(ours[0], wx.grad) and torch.equal(ours[1], u.grad)
    assert counters["stats"]["unique_graphs"] == 1


# ---- counted operations


@each_exact_backend
@each_direction
@pytest.mark.parametrize("option", [option for option in OPTIONS if "packed" not in option])
@pytest.mark.parametrize("wanted", ["all", "wx", "u", "h0", "wx u", "none"])
@pytest.mark.parametrize("time", [1, 5])
def test_flops_are_those_of_the_loop(name, device, dtype, time, wanted, option, bidirectional):
    arguments = make_inputs((3, time, 8), option, bidirectional)
    inputs = {
        key: value.to(device).requires_grad_(
            key in wanted.split() or wanted == "all" and key in NAMES
        )
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arguments.items()
    }

    def count(backend_name):
        with backend(backend_name), FlopCounterMode(display=False) as counter:
            h = call(**inputs)
            if h.requires_grad:
                h.sum().backward()
        return counter.get_total_flops()

    assert count(name) == count("reference") > 0


@each_exact_backend
def test_flops_of_packed_sequences_are_those_of_their_frames(name, device, dtype):
    arguments = make_inputs((3, 5, 8), "sligru-h0-packed", bidirectional=True)
    tensors, options = operator_arguments(arguments, name, device, dtype)
    with FlopCounterMode(display=False) as counter:
        torch.ops.sb_fast_sligru.light_gru(*tensors, *options)
    assert counter.get_total_flops() == 2 * 2 * arguments["lengths"].sum() * 16 * 8


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
    "lengths-list": ({"lengths": [3, 3]}, "lengths: got list, expected a torch.Tensor"),
    "lengths-dtype": ({"lengths": torch.ones(2)}, "lengths: got torch.float32, expected int32 or"),
    "lengths-shape": (
        {"lengths": torch.ones(3, dtype=torch.int64)},
        r"lengths: got shape \(3,\), expected \[2\]",
    ),
    "lengths-device": (
        {"lengths": torch.ones(2, dtype=torch.int32, device="meta")},
        "lengths: got device meta, expected cpu",
    ),
    "lengths-long": ({"lengths": torch.tensor([3, 4])}, "lengths: got 4, expected 0 to T = 3"),
    "lengths-negative": ({"lengths": torch.tensor([3, -1])}, "lengths: got -1, expected 0 to T"),
    "packed-rank": ({"time": 3}, r"wx: got shape \(2, 3, 8\), expected \[frames, 2H\], since time"),
    "packed-lengths": (
        {"wx": torch.zeros(3, 8), "time": 3},
        r"lengths: absent, expected \[B\], since time is given",
    ),
    "packed-sum": (
        {"wx": torch.zeros(3, 8), "time": 3, "lengths": torch.tensor([2, 2])},
        "lengths: their sum is 4, expected 3, the frames of wx",
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
        "lengths": None,
        "packed_time": None,
        "layer_norm": True,
        "eps": 1e-5,
        "activation": "relu",
        "bidirectional": False,
        "operand_dtype": "float32",
        "backend": "cpu",
    }
    return torch.ops.sb_fast_sligru.light_gru(**(arguments | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"wx": torch.zeros(3, 8)}, r"wx: got Float \[3, 8\], expected \[B, T, 2H\]"),
        ({"wx": torch.zeros(2, 3, 6)}, r"wx: its last axis is 6, expected 2H = 8"),
        ({"u": torch.zeros(8, 5)}, r"u: got Float \[8, 5\], expected \[2H, H\]"),
        ({"lengths": torch.zeros(2)}, r"lengths: got Float \[2\], expected Int \[2\]"),
        ({"lengths": torch.tensor([3, 4]).int()}, "lengths: got 4, expected 0 to T = 3"),
        ({"packed_time": 3}, r"wx: got Float \[2, 3, 8\], expected \[frames, 2H\]"),
        ({"wx": torch.zeros(5, 8), "packed_time": 3}, r"lengths: required, \[B\], of packed"),
        (
            {"wx": torch.zeros(5, 8), "packed_time": 3, "lengths": torch.tensor([1, 3]).int()},
            "lengths: their sum is 4, expected that of the frames of wx, 5",
        ),
        ({"h0": torch.zeros(1, 4)}, r"h0: got Float \[1, 4\], expected Float \[2, 4\]"),
        ({"drop_mask": torch.zeros(2, 4).double()}, r"drop_mask: got Double"),
        ({"ln_bias": torch.zeros(8), "layer_norm": False}, r"ln_weight, ln_bias: given although"),
        ({"operand_dtype": "float64"}, r"dtypes: got wx Float, u Float, operands Double"),
        ({"operand_dtype": "int64"}, r'operand_dtype: got "int64", expected float64, float32'),
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


def forced():
    return ops.choose_backend("cpu", 8, torch.float32)[0]


def test_a_forced_backend_is_that_of_its_thread():
    """Blocks of two threads that overlap, and a thread started within one."""
    first, second = threading.Event(), threading.Event()
    seen = {}

    def run_in_thread():
        first.wait()
        with backend("auto"):
            seen["other, inside"] = forced()
            second.set()
            first_ended.wait()
        seen["other, after"] = forced()

    first_ended = threading.Event()
    other = threading.Thread(target=run_in_thread)
    other.start()
    with backend("reference"):
        first.set()
        second.wait()
        seen["this, inside"] = forced()
    first_ended.set()
    other.join()
    seen["this, after"] = forced()
    assert seen == {
        "other, inside": "cpu",
        "other, after": "cpu",
        "this, inside": "reference",
        "this, after": "cpu",
    }


def test_a_forced_backend_is_that_of_its_task():
    """Tasks that overlap keep their own; one that is started inside a block keeps the block's."""

    async def task(name, wait, expected):
        with backend(name):
            await asyncio.sleep(wait)
            assert forced() == expected
            await asyncio.sleep(wait)
        return forced()

    async def child():
        await asyncio.sleep(0.02)
        return forced()

    async def main():
        with backend("reference"):
            started_inside = asyncio.create_task(child())
        tasks = task("reference", 0.01, "reference"), task("auto", 0.015, "cpu")
        assert await asyncio.gather(*tasks) == ["cpu", "cpu"]
        assert await started_inside == "reference"
        assert forced() == "cpu"

    asyncio.run(main())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_blocks_of_generators_may_end_in_any_order(order):
    def block(name):
        with backend(name):
            yield

    names = "reference", "auto", "reference"
    generators = [block(name) for name in names]
    for generator in generators:
        next(generator)
    opened = list(range(3))
    for index in order:
        generators[index].close()
        opened.remove(index)
        innermost = names[opened[-1]] if opened else "auto"
        assert forced() == {"auto": "cpu"}.get(innermost, innermost)


def test_an_error_ends_the_block():
    with contextlib.suppress(KeyError), backend("reference"):
        raise KeyError
    assert forced() == "cpu"


@each_exact_backend
def test_the_backward_runs_where_the_forward_did(name, device, dtype):
    """Outside of the block, in another thread, even where that one forces another backend."""
    wx = torch.randn(2, 3, 8, dtype=dtype, device=device, requires_grad=True)
    u = torch.randn(8, 4, dtype=dtype, device=device)
    with backend(name):
        h = ops.light_gru(wx, u, layer_norm=True)
        changed = ops.light_gru(wx, u, layer_norm=True).mul_(1)
    (expected,) = torch.autograd.grad(h.sum(), wx, retain_graph=True)
    gradients = []

    def differentiate():
        with backend("reference"):
            gradients.extend(torch.autograd.grad(t.sum(), wx)[0] for t in (h, changed))

    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    assert len(gradients) == 2 and all(torch.equal(g, expected) for g in gradients)


def test_a_compiled_function_follows_the_forced_backend():
    """It is guarded: no graph of one backend serves another, in no thread; and `backend` traces."""
    wx, u = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, 4)
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    def function(wx, u):
        return ops.light_gru(wx, u, layer_norm=True)

    def forcing(wx, u):
        with backend("reference"):
            h = ops.light_gru(wx, u, layer_norm=True)
        return h + ops.light_gru(wx, u, layer_norm=True)

    def call_in_thread():
        thread = threading.Thread(target=compiled, args=(wx, u))
        thread.start()
        thread.join()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=keep)
    compiled(wx, u)
    for _ in range(3):
        with backend("reference"):
            compiled(wx, u)
            call_in_thread()  # which forces nothing
    compiled(wx, u)
    uses = ["sb_fast_sligru.light_gru" in code for code in graphs]
    assert uses[:2] == [True, False] and len(graphs) <= 3
    graphs.clear()
    torch.compile(forcing, fullgraph=True, backend=keep)(wx, u)
    assert len(graphs) == 1 and graphs[0].count("sb_fast_sligru.light_gru") == 1
    assert forced() == "cpu"


def test_reason_why_a_gpu_layer_is_not_persistent(monkeypatch):
    """As choose_backend words it; test_choice_on_a_gpu asks the kernels themselves."""
    reasons = {torch.float32: "", torch.float64: "it takes no float64"}
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    monkeypatch.setattr(_light_gru, "_query_persistent", lambda _, dtype, device: reasons[dtype])
    assert ops.choose_backend("cuda:0", 512, torch.float32) == ("persistent", "the fastest")
    double = ops.choose_backend("cuda:0", 512, torch.float64)
    assert double == ("stepwise", "not persistent: it takes no float64")
    with backend("stepwise"):
        assert ops.choose_backend("cuda:0", 512, torch.float32) == ("stepwise", "forced")
    with backend("persistent"), pytest.raises(RuntimeError, match="but it takes no float64"):
        ops.choose_backend("cuda:0", 512, torch.float64)


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
@pytest.mark.parametrize("name", ["stepwise", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cuda_graph_replays_the_training_step(name, dtype):
    arguments = make_inputs((4, 12, 32), "sligru")
    wx = arguments["wx"].to("cuda", dtype).requires_grad_()
    u = arguments["u"].to("cuda", dtype).requires_grad_()

    def step():
        with backend(name):
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


# Float64 is what the stepwise backend takes when nobody forces a choice.
each_cuda_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16],
    ids=["stepwise-float64", "persistent-float32", "persistent-bfloat16"],
)


@pytest.mark.gpu
@each_cuda_dtype
def test_runs_on_the_callers_stream(dtype):
    """Work queued behind a long kernel on a side stream must wait for it."""
    side = torch.cuda.Stream()
    u = torch.randn(64, 32, device="cuda", dtype=dtype)
    wx = torch.zeros(4, 6, 64, device="cuda", dtype=dtype)
    value = torch.randn(4, 6, 64, device="cuda", dtype=dtype)
    expected = ops.light_gru(value, u, layer_norm=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        wx.copy_(value)
        h = ops.light_gru(wx, u, layer_norm=True)
    side.synchronize()
    assert torch.equal(h, expected)


@pytest.mark.gpu
@each_cuda_dtype
def test_memory_of_the_backward_is_bounded_in_time(dtype):
    """Beyond inputs, h and gradients, the temporaries of the chunks must not grow with T."""
    extra = []
    for time in (4000, 16000):
        wx = torch.randn(8, time, 512, device="cuda", dtype=dtype, requires_grad=True)
        u = torch.randn(512, 256, device="cuda", dtype=dtype, requires_grad=True)
        h = ops.light_gru(wx, u, layer_norm=True)
        upstream = torch.randn_like(h)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(h, [wx, u], upstream)
        extra.append(torch.cuda.max_memory_allocated() - before - wx.nbytes)
    assert extra[1] < 1.1 * extra[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_hundred_thousand_steps(dtype):
    arguments = make_inputs((1, 100_000, 64), "sligru-affine-h0", bidirectional=True)
    arguments["activation"] = "tanh"
    upstream = upstream_for(arguments)
    exact = run("stepwise", arguments, upstream, "cuda")
    stepwise = run("stepwise", arguments, upstream, "cuda", dtype)
    bounds = {key: 3 * relative_error(value, exact[key]) for key, value in stepwise.items()}
    assert_close(run("persistent", arguments, upstream, "cuda", dtype), exact, bounds)


@pytest.mark.gpu
def test_choice_on_a_gpu():
    if torch.cuda.get_device_capability()[0] in (9, 10):  # clusters of 16
        for hidden, dtype in ((1024, torch.bfloat16), (1024, torch.half), (1024, torch.float32)):
            assert ops.choose_backend("cuda", hidden, dtype) == ("persistent", "the fastest")
    for hidden, dtype, reason in ((512, torch.float64, "not persistent"), (12, torch.half, "8")):
        name, why = ops.choose_backend("cuda", hidden, dtype)
        assert name == "stepwise" and reason in why
        with backend("persistent"), pytest.raises(RuntimeError, match="persistent.*is forced, but"):
            ops.choose_backend("cuda", hidden, dtype)


SHOW_KERNELS = """
import torch
from sb_fast_sligru import ops
for dtype in (torch.bfloat16, torch.half, torch.float32):
    print(ops.choose_backend("cuda", 512, dtype)[0], end=" ")
    print(ops.choose_kernel(ops.gpu(0), 512, 16, dtype, "forward").kernel)
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "limit, low, full", [(16, "narrow", "narrow_float"), (8, "narrow", "l2"), (4, "l2", "l2")]
)
def test_choice_without_large_clusters(limit, low, full):
    """At H = 512, 16-bit types need clusters of 8 blocks and float32 of 16."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("this GPU has no clusters of 16")
    process = run_limited({"CLUSTER": limit}, "-c", SHOW_KERNELS)
    expected = [f"persistent {kernel}" for kernel in (low, low, full)]
    assert process.stdout.splitlines() == expected, process.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(
    "limits, layers",
    [
        # Few rows at 256 < H <= 512 in 16-bit types take clusters of 16 where there are any.
        ({"CLUSTER": 8}, "persistent and H456 and (bfloat16 or float16)"),
        ({"CLUSTER": 1}, "persistent"),
        # An RTX 3090's multiprocessors and shared memory: smaller blocks, more waves.
        ({"CLUSTER": 1, "MULTIPROCESSORS": 82, "SHARED_KB": 99}, "persistent"),
    ],
    ids=["clusters-of-8", "no-clusters", "as-a-3090"],
)
def test_layers_without_clusters_of_16(limits, layers):
    where = f"around_those_of_clusters and {layers}"
    process = run_limited(limits, "-m", "pytest", "-q", "-k", where, __file__)
    assert process.returncode == 0, process.stdout


@pytest.mark.gpu
def test_several_streams_at_once():
    """Clusters of two launches may share the GPU: neither waits for the other."""
    u = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16) / 20
    inputs = [torch.randn(28, 200, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [ops.light_gru(wx, u, layer_norm=True) for wx in inputs]
    torch.cuda.synchronize()
    results = []
    for wx in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append(ops.light_gru(wx, u, layer_norm=True))
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("stepwise", torch.bfloat16),
        ("persistent", torch.bfloat16),
        ("persistent", torch.float32),
    ],
)
def test_offsets_past_two_to_the_31(name, dtype):
    """wx and its gradient have more than 2 ** 31 elements; the last row must equal a small run."""
    batch, time, hidden = 2049, 1024, 512
    row = torch.randn(1, time, 2 * hidden, device="cuda", dtype=dtype)
    u = torch.randn(2 * hidden, hidden, device="cuda", dtype=dtype) / 20
    u.requires_grad_()
    upstream = torch.randn(1, time, hidden, device="cuda", dtype=dtype)

    def gradients(rows):
        wx = row.expand(rows, -1, -1).contiguous().requires_grad_()
        with backend(name):
            h = ops.light_gru(wx, u, layer_norm=True)
        (grad_wx,) = torch.autograd.grad(h, [wx], upstream.expand(rows, -1, -1))
        return h[-1], grad_wx[-1]

    assert batch * time * 2 * hidden > 2**31
    for large, small in zip(gradients(batch), gradients(1), strict=True):
        assert relative_error(large, small) < 1e-2


def test_info_reports_every_library_and_backend():
    lines = "\n".join(info.report(hidden=24, rows=3))
    assert f"torch           {torch.__version__}" in lines
    assert "CPU library     loaded" in lines
    assert "Backend for H = 24, 3 rows:" in lines
    assert "cpu      float32   cpu (the fastest)" in lines
    assert "Backend for the attention decoder:\n  cpu                cpu (the fastest)" in lines
