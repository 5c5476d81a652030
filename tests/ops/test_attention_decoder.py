"""The attention decoder's operator against the float64 PyTorch loop. Runs without SpeechBrain."""

import contextlib
import itertools
import math
import statistics
import warnings
from typing import NamedTuple

import pytest
import torch
from fuzz import draw_cases
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sb_fast_sligru import _library, backend, ops
from sb_fast_sligru.ops import _attention_decoder, _backends
from sb_fast_sligru.ops._autograd import dtype_name
from sb_fast_sligru.reference import relative_error

# B, N, L, H, A, V, C, G, W; C is the width of the context. Odd sizes, ones, chunks of frames that
# are full and not, and filters wider than the frames.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1, 1),
    (3, 5, 7, 6, 5, 4, 3, 2, 3),
    (2, 1, 9, 4, 8, 3, 8, 3, 5),
    (1, 4, 1, 5, 7, 6, 7, 2, 41),
    (2, 3, 64, 16, 16, 8, 16, 10, 33),
    (5, 7, 150, 12, 20, 10, 11, 4, 201),
    (3, 2, 129, 33, 40, 17, 9, 5, 1),
]
NAMES = _attention_decoder._NAMES
GIVEN = tuple(_attention_decoder._NEEDS)  # what has a gradient
OUTPUTS = ("h", "context", "attention")
FLAGS = _attention_decoder._FLAGS


class Kernel(NamedTuple):
    """A backend, where it runs, its widest dtype, and its distance from the float64 loop then."""

    name: str
    device: str
    dtype: torch.dtype
    bound: float


each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(Kernel("cpu", "cpu", torch.float64, 1e-12), id="cpu"),
        pytest.param(
            Kernel("persistent", "cuda", torch.float32, 1e-4),
            id="persistent",
            marks=pytest.mark.gpu,
        ),
    ],
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
SMALL = (3, 4, 7, 6, 5, 4, 3, 2, 3)


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_small_tensors(one_thread):
    """Threads only wait for each other there."""


def make_inputs(shape, bias=True, mask=True, lengths=None, scaling=1.0):
    """Random float64 arguments on the CPU."""
    B, N, L, H, A, V, C, G, W = shape

    def randn(*sizes, scale=1.0):
        return scale * torch.randn(*sizes, dtype=torch.float64)

    return {
        "wx": randn(B, N, 3 * H),
        "keys": randn(B, L, A),
        "values": randn(B, L, V),
        "lengths": torch.randint(1, L + 1, (B,)) if lengths is None else torch.tensor(lengths),
        "context_mask": (torch.rand(B, N, C) < 0.8).double() / 0.8 if mask else None,
        "w_context": randn(3 * H, C, scale=C**-0.5),
        "u": randn(3 * H, H, scale=H**-0.5),
        "u_bias": randn(3 * H, scale=0.3) if bias else None,
        "w_query": randn(A, H, scale=H**-0.5),
        "filters": randn(G, W),
        "w_location": randn(A, G, scale=G**-0.5),
        "v": randn(A),
        "w_out": randn(C, V, scale=V**-0.5),
        "b_out": randn(C, scale=0.3),
        "scaling": scaling,
    }


def make_upstream(shape):
    B, N, L, H, _, _, C, _, _ = shape
    return [torch.randn(B, N, width, dtype=torch.float64) for width in (H, C, L)]


def converted(arguments, dtype=torch.float64, trains=GIVEN, device="cpu"):
    def convert(key, value):
        if not isinstance(value, torch.Tensor):
            return value
        if key == "lengths":
            return value.to(device)
        return value.detach().to(device, dtype).requires_grad_(key in trains)

    return {key: convert(key, value) for key, value in arguments.items()}


def run(name, arguments, upstream=None, dtype=torch.float64, autocast=None, device="cpu"):
    """Outputs and, given the gradients `upstream` of them, every gradient, by name."""
    inputs = converted(arguments, dtype, () if upstream is None else GIVEN, device)
    casting = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with backend(name), casting:
        outputs = ops.attention_decoder(**inputs)
    results = dict(zip(OUTPUTS, outputs, strict=True))
    if upstream is not None:
        wanted = [key for key in GIVEN if inputs[key] is not None]
        upstream = [g.to(o) for o, g in zip(outputs, upstream, strict=True)]
        gradients = torch.autograd.grad(outputs, [inputs[key] for key in wanted], upstream)
        results.update(zip((f"grad of {key}" for key in wanted), gradients, strict=True))
    return results


def run_kernel(kernel, arguments, upstream=None):
    return run(kernel.name, arguments, upstream, kernel.dtype, device=kernel.device)


def assert_close(results, expected, bounds):
    assert results.keys() == expected.keys()
    for key, value in results.items():
        bound = bounds[key] if isinstance(bounds, dict) else bounds
        # Gradients that are zero in exact arithmetic (one frame: its weight is 1) are rounding.
        scale = max(expected[key].double().norm().item(), 1e-3)
        error = (value.cpu().double() - expected[key].cpu().double()).norm().item() / scale
        assert error <= bound, f"{key}: relative error {error:.2e}, allowed {bound:.2e}"


# ---- values


# Wide enough for several blocks of every phase, more rows than a product takes at once.
WIDE = [(24, 12, 375, 128, 160, 96, 128, 10, 201), (70, 6, 100, 320, 64, 64, 96, 16, 77)]


@each_kernel
@each_shape
@pytest.mark.parametrize("bias, mask, scaling", [(True, True, 1.0), (False, False, 1.7)])
def test_matches_the_loop(kernel, shape, bias, mask, scaling):
    arguments = make_inputs(shape, bias, mask, scaling=scaling)
    upstream = make_upstream(shape)
    expected = run("reference", arguments, upstream)
    assert_close(run_kernel(kernel, arguments, upstream), expected, kernel.bound)


@each_kernel
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_from_some_outputs(kernel, which):
    """Training uses h and context; attention alone may have a loss of its own."""
    arguments = make_inputs(SMALL)
    upstream = make_upstream(SMALL)

    def gradients(name, dtype, device):
        inputs = converted(arguments, dtype, device=device)
        with backend(name):
            outputs = ops.attention_decoder(**inputs)
        wanted = [inputs[key] for key in GIVEN]
        chosen = [outputs[i] for i in which], wanted, [upstream[i].to(outputs[i]) for i in which]
        return dict(enumerate(torch.autograd.grad(*chosen)))

    expected = gradients("reference", torch.float64, "cpu")
    assert_close(gradients(kernel.name, kernel.dtype, kernel.device), expected, kernel.bound)


@each_kernel
def test_lengths_end_rows_early(kernel):
    """What lies beyond a length has no weight and changes nothing."""
    shape = (3, 4, 70, 6, 5, 4, 3, 2, 7)
    arguments = make_inputs(shape, lengths=[70, 65, 3])
    upstream = make_upstream(shape)
    results = run_kernel(kernel, arguments, upstream)
    for row, length in enumerate(arguments["lengths"]):
        assert not results["attention"][row, :, length:].any()
        arguments["keys"][row, length:] = 9.0
        arguments["values"][row, length:] = -9.0
    again = run_kernel(kernel, arguments, upstream)
    assert all(torch.equal(again[key], results[key]) for key in results if "values" not in key)


# dtype of the tensors, autocast dtype
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
}


def assert_no_worse_than_the_loop(name, device, precision, arguments, upstream, factor=2):
    """Every error against float64 is at most `factor` that of the loop in the same precision.

    2 covers the luck of rounding and of the order of sums. Returns how many times the loop's error
    ours is, of each result that both have one of.
    """
    dtype, autocast = PRECISIONS[precision]
    # What the low precision is given is exact in it, so that only the computation is compared.
    arguments = {
        key: value.to(dtype).double()
        if isinstance(value, torch.Tensor) and key != "lengths"
        else value
        for key, value in arguments.items()
    }
    upstream = [g.to(dtype).double() for g in upstream]
    exact = run("reference", arguments, upstream, device=device)
    eager = run("reference", arguments, upstream, dtype, autocast, device)
    results = run(name, arguments, upstream, dtype, autocast, device)
    # A result of few values can be right by luck: allow two units in the last place besides, of
    # float32 on a GPU those of a number that was split for tensor cores into two of 11 bits.
    split = device == "cuda" and (autocast or dtype) == torch.float32
    last_place = 2.0**-22 if split else torch.finfo(autocast or dtype).eps
    bounds = {
        key: factor
        * (value.double() - exact[key]).norm().item()
        / max(exact[key].norm().item(), 1e-3)
        + 2 * last_place
        for key, value in eager.items()
    }
    assert all(results[key].dtype == eager[key].dtype for key in eager)
    assert_close(results, exact, bounds)
    errors = {
        key: [(values[key].double() - exact[key]).norm().item() for values in (results, eager)]
        for key in exact
    }
    return [ours / loops for ours, loops in errors.values() if ours and loops]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_is_no_worse_than_the_loop(precision):
    shape = (4, 20, 90, 24, 32, 16, 20, 4, 21)
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    assert_no_worse_than_the_loop("cpu", "cpu", precision, arguments, upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float32"])
def test_error_on_a_gpu_is_no_worse_than_the_loop(shape, precision):
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    assert_no_worse_than_the_loop("persistent", "cuda", precision, arguments, upstream)


@pytest.mark.gpu
def test_error_of_float32_on_a_gpu_is_no_worse_than_the_loop():
    """In the mean at most twice the loop's: products of split numbers leave more to luck."""
    ratios = []
    for shape in SHAPES + WIDE:
        arguments, upstream = make_inputs(shape), make_upstream(shape)
        ratios += assert_no_worse_than_the_loop(
            "persistent", "cuda", "float32", arguments, upstream, factor=4
        )
    assert math.exp(statistics.fmean(map(math.log, ratios))) <= 2


@pytest.mark.parametrize("scale", [1e-2, 1e-4])
def test_small_numbers_keep_their_digits(scale):
    """A tanh of 1 - 2 / (1 + e^2x) would lose those of a small x."""
    arguments = make_inputs((4, 5, 30, 16, 16, 8, 8, 3, 5), bias=False)
    for key in ("wx", "keys", "w_query", "filters", "w_context"):
        arguments[key] *= scale
    arguments = {
        key: value.float().double()
        if isinstance(value, torch.Tensor) and key != "lengths"
        else value
        for key, value in arguments.items()
    }
    upstream = [torch.zeros_like(g) for g in make_upstream((4, 5, 30, 16, 16, 8, 8, 3, 5))]
    upstream[2] += torch.randn_like(upstream[2])  # of the attention: keys' gradients are v's
    exact = run("reference", arguments, upstream)
    results = run("cpu", arguments, upstream, torch.float32)
    for key in ("h", "grad of v", "grad of keys"):
        assert relative_error(results[key], exact[key]) < 3e-6, key


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sharp_attention(scale):
    """Energies so far apart that the softmax underflows, and tanh at its limits."""
    shape = (3, 6, 80, 8, 12, 6, 6, 2, 9)
    arguments = make_inputs(shape, scaling=scale)
    arguments["keys"] *= scale**0.5
    results = run("cpu", arguments, dtype=torch.float32)
    exact = run("reference", arguments)
    eager = run("reference", arguments, dtype=torch.float32)
    for key, value in exact.items():
        bound = 2 * relative_error(eager[key], value) + 1e-6
        assert relative_error(results[key], value) <= bound, key


def largest_error_to_expect(eager, expected, arguments, upstream, precision, device="cpu"):
    """Of all results: the loop's own, or what inputs moved by a last place change, if that is more.

    Over the tokens errors can grow a hundredfold, sums may nearly vanish, and in a single case the
    loop can be right by luck; so it is multiplied by 30. Other tests look at the last digits.
    """
    dtype, autocast = precision
    last_place = torch.finfo(autocast or dtype).eps
    moved = {
        key: value * (1 + last_place * torch.randn_like(value))
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in arguments.items()
    }
    moved = run("reference", moved, upstream, device=device)
    return 30 * max(
        relative_error(results[key], value)
        for results in (eager, moved)
        for key, value in expected.items()
    )


def test_random_calls(capsys):
    """Sizes, lengths, layouts, missing tensors and precisions drawn anew in every run."""
    for random in draw_cases(capsys, "attention decoder", 500):
        low = [random.choice(list(PRECISIONS))] if random.random() < 0.3 else []
        tops = (4, 8, 140, 20, 30, 20, 20, 11, 12)
        shape = [random.randint(1, top) for top in tops]
        shape[-1] = 2 * shape[-1] - 1
        print(shape)
        arguments = make_inputs(
            shape,
            bias=random.random() < 0.5,
            mask=random.random() < 0.5,
            scaling=random.choice([1.0, 0.3, 2.5]),
        )
        upstream = make_upstream(shape)
        for key in random.sample(NAMES, 4):  # other strides
            t = arguments[key]
            if t is not None and t.ndim > 1:
                arguments[key] = t.transpose(0, -1).contiguous().transpose(0, -1)
        expected = run("reference", arguments, upstream)
        assert_close(run("cpu", arguments, upstream), expected, 1e-9)
        for precision in low:
            precision = PRECISIONS[precision]
            eager, results = (
                run(name, arguments, upstream, *precision) for name in ("reference", "cpu")
            )
            error = largest_error_to_expect(eager, expected, arguments, upstream, precision)
            assert_close(results, expected, error + 300 * torch.finfo(precision[0]).eps)


@each_kernel
@pytest.mark.parametrize("scaling", [0.0, -1.0, math.inf, math.nan])
def test_odd_scalings_give_what_the_loop_gives(kernel, scaling):
    arguments = make_inputs(SMALL, lengths=[7, 5, 1], scaling=scaling)
    results, expected = run_kernel(kernel, arguments), run("reference", arguments)
    for key, value in results.items():
        torch.testing.assert_close(
            value.cpu(), expected[key].to(value.dtype), equal_nan=True, rtol=1e-4, atol=1e-5
        )


@each_kernel
def test_a_length_of_zero_is_nan_as_in_the_loop(kernel):
    arguments = make_inputs(SMALL, lengths=[7, 0, 3])
    results, expected = run_kernel(kernel, arguments), run("reference", arguments)
    for key, value in results.items():
        assert torch.equal(value.isnan().cpu(), expected[key].isnan()), key
    assert results["attention"][1].isnan().all() and not results["attention"][0].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", GIVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_reaches_the_output(place, value, dtype):
    """Also from a value beyond the length, whose weight of 0 does not hide it."""
    if place == "filters" and value == math.inf:
        pytest.skip("torch's convolutions differ in whether they multiply the zeros of the padding")
    arguments = make_inputs(SMALL, lengths=[7, 5, 6])
    arguments[place].flatten()[-1] = value
    results = run("cpu", arguments, dtype=dtype)
    expected = run("reference", arguments, dtype=dtype)
    if value != value:
        assert expected["context"].isnan().any() or place == "keys"
    for key, result in results.items():
        assert torch.equal(result.isnan(), expected[key].isnan()), key


def test_strided_inputs():
    arguments = make_inputs((4, 5, 9, 6, 5, 4, 3, 2, 3))
    upstream = make_upstream((4, 5, 9, 6, 5, 4, 3, 2, 3))
    expected = run("reference", arguments, upstream)
    for key, t in arguments.items():
        if isinstance(t, torch.Tensor):
            wide = torch.full([2 * size for size in t.shape], 7, dtype=t.dtype)
            view = wide[tuple(slice(0, 2 * size, 2) for size in t.shape)]
            view.copy_(t)
            arguments[key] = view
    with backend("cpu"):
        inputs = {
            key: t.detach().requires_grad_(key in GIVEN) if isinstance(t, torch.Tensor) else t
            for key, t in arguments.items()
        }
        assert not inputs["u"].is_contiguous()
        outputs = ops.attention_decoder(**inputs)
        gradients = torch.autograd.grad(
            outputs, [inputs[key] for key in GIVEN], [g.mT.contiguous().mT for g in upstream]
        )
    results = dict(zip(OUTPUTS, outputs, strict=True))
    results |= {f"grad of {key}": g for key, g in zip(GIVEN, gradients, strict=True)}
    assert_close(results, expected, 1e-12)


@each_kernel
@pytest.mark.parametrize("axis", [0, 1], ids=["no-batch", "no-tokens"])
def test_empty_input_gives_empty_output_and_zero_gradients(kernel, axis):
    shape = [0 if i == axis else size for i, size in enumerate(SMALL)]
    arguments = make_inputs(shape)
    results = run_kernel(kernel, arguments, make_upstream(shape))
    for key, upstream in zip(OUTPUTS, make_upstream(shape), strict=True):
        assert results[key].shape == upstream.shape
    for key in GIVEN:
        gradient = results[f"grad of {key}"]
        assert gradient.shape == arguments[key].shape and not gradient.any(), key


def test_same_input_same_bits_whatever_the_threads():
    """The element kernels' work of a step is dealt out to threads from 4096 elements on."""
    shape = (5, 6, 300, 40, 48, 24, 40, 10, 41)
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    first = run("cpu", arguments, upstream, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run("cpu", arguments, upstream, torch.float32)
            assert all(torch.equal(first[key], again[key]) for key in first)
    finally:
        torch.set_num_threads(threads)


# ---- autograd


def operator_arguments(arguments, kernel):
    """Positional arguments of the operator itself."""
    inputs = converted(arguments, kernel.dtype, (), kernel.device)
    return [inputs[key] for key in NAMES], (
        arguments["scaling"],
        dtype_name(kernel.dtype),
        kernel.name,
    )


@pytest.mark.parametrize("bias, mask", [(True, True), (False, False)])
def test_gradcheck(bias, mask):
    """Of one token: beyond, the detached attention is no constant to a finite difference."""
    arguments = make_inputs((2, 1, 3, 2, 3, 2, 2, 2, 3), bias, mask, lengths=[3, 2])
    wanted = [key for key in GIVEN if arguments[key] is not None]
    fixed = {key: value for key, value in arguments.items() if key not in wanted}

    def function(*values):
        with backend("cpu"):
            return ops.attention_decoder(**dict(zip(wanted, values, strict=True)), **fixed)

    assert torch.autograd.gradcheck(function, [arguments[key].requires_grad_() for key in wanted])


@each_kernel
def test_gradients_nobody_wants_are_not_computed(kernel):
    arguments = make_inputs(SMALL)
    tensors, options = operator_arguments(arguments, kernel)
    outputs = torch.ops.sb_fast_sligru.attention_decoder(*tensors, *options)

    def backward(*needs):
        return torch.ops.sb_fast_sligru.attention_decoder_backward(
            *(g.to(tensors[0]) for g in make_upstream(SMALL)), *tensors, *options, *outputs, *needs
        )

    torch.manual_seed(1)
    full = dict(zip(GIVEN, backward(*[True] * len(FLAGS)), strict=True))
    assert [full[key].shape for key in GIVEN] == [arguments[key].shape for key in GIVEN]
    for needs in itertools.product([False, True], repeat=len(FLAGS)):
        torch.manual_seed(1)
        needed = dict(zip(FLAGS, needs, strict=True))
        for key, gradient in zip(GIVEN, backward(*needs), strict=True):
            if needed[_attention_decoder._NEEDS[key]]:
                assert torch.equal(gradient, full[key]), key
            else:
                assert gradient.numel() == 0


@each_kernel
@pytest.mark.parametrize("key", GIVEN)
def test_one_tensor_alone_trains(kernel, key):
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)
    expected = run("reference", arguments, upstream)[f"grad of {key}"]
    inputs = converted(arguments, kernel.dtype, (key,), kernel.device)
    with backend(kernel.name):
        outputs = ops.attention_decoder(**inputs)
        torch.autograd.backward(outputs, [g.to(inputs["wx"]) for g in upstream])
    assert relative_error(inputs[key].grad.cpu(), expected) < kernel.bound
    assert all(inputs[other].grad is None for other in GIVEN if other != key)


def test_saves_inputs_and_outputs_only_and_nothing_without_grad():
    arguments = make_inputs(SMALL)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = ops.attention_decoder(**converted(arguments))
        inputs = [tuple(arguments[key].shape) for key in NAMES]
        assert sorted(saved) == sorted(inputs + [tuple(o.shape) for o in outputs])
        saved.clear()
        with torch.no_grad():
            outputs = ops.attention_decoder(**converted(arguments))
    assert not saved and outputs[0].grad_fn is None


def test_second_derivative_is_refused_and_the_reference_has_it():
    arguments = make_inputs(SMALL)

    def first_gradient(name):
        inputs = converted(arguments)
        with backend(name):
            h, context, _ = ops.attention_decoder(**inputs)
        return torch.autograd.grad(
            h.square().sum() + context.square().sum(), inputs["wx"], create_graph=True
        )[0]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        first_gradient("cpu").sum().backward()
    first_gradient("reference").sum().backward()


def test_derivatives_that_kernels_lack_are_the_loops(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    arguments = make_inputs((2, 3, 4, 3, 3, 2, 2, 2, 3))
    wx = arguments.pop("wx")

    def function(wx):
        return ops.attention_decoder(wx, **arguments)[1]

    def derivatives():
        results = {
            "jvp": torch.func.jvp(function, (wx,), (torch.ones_like(wx),))[1],
            "grad": torch.func.grad(lambda wx: function(wx).square().sum())(wx),
        }
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(wx, torch.ones_like(wx))
            results["dual"] = forward_ad.unpack_dual(function(dual)).tangent
        return results

    with pytest.warns(UserWarning, match=r"slow PyTorch loop.*backend\(.reference.\) has"):
        ours = derivatives()
    with backend("reference"):
        assert_close(ours, derivatives(), 1e-14)
    with backend("cpu"), pytest.raises(RuntimeError, match=r"no gradient for torch.func"):
        torch.func.grad(lambda wx: function(wx).sum())(wx)


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")
def test_vmap():
    arguments = make_inputs(SMALL)
    wx = torch.stack([arguments.pop("wx"), torch.randn(3, 4, 18, dtype=torch.float64)])
    with backend("cpu"):
        h = torch.vmap(lambda wx: ops.attention_decoder(wx, **arguments)[0])(wx)
        for ours, each in zip(h, wx, strict=True):
            assert relative_error(ours, ops.attention_decoder(each, **arguments)[0]) < 1e-14


CHANGES = {
    "scaled": lambda t: t.mul_(2),
    "masked": lambda t: t.masked_fill_(t > 0.1, 0),
    "view": lambda t: t[:, :2].mul_(2),
    "no_grad": torch.no_grad()(lambda t: t.mul_(2)),
}


@each_kernel
@pytest.mark.parametrize("which", range(3), ids=OUTPUTS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_output_changed_in_place(kernel, change, which):
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)

    def gradients(name, dtype, device):
        inputs = converted(arguments, dtype, device=device)
        with backend(name):
            outputs = ops.attention_decoder(**inputs)
        change(outputs[which])
        results = torch.autograd.grad(
            outputs,
            [inputs[key] for key in GIVEN],
            [g.to(inputs["wx"]) for g in upstream],
        )
        return dict(enumerate([*outputs, *results]))

    expected = gradients("reference", torch.float64, "cpu")
    assert_close(gradients(kernel.name, kernel.dtype, kernel.device), expected, kernel.bound)


def test_an_unchanged_output_is_not_computed_again():
    forwards = []
    for change in (lambda h: h * 2, lambda h: h.mul_(2)):
        with backend("cpu"):
            h = change(ops.attention_decoder(**converted(make_inputs(SMALL)))[0])
        with torch.profiler.profile() as profile:
            h.sum().backward()
        names = [event.name for event in profile.events()]
        forwards.append(names.count("sb_fast_sligru::attention_decoder"))
    assert forwards == [0, 1]


@each_kernel
@pytest.mark.parametrize("bias, mask", [(True, True), (False, False)])
def test_opcheck(kernel, bias, mask):
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    arguments = make_inputs(SMALL, bias, mask)
    tensors, options = operator_arguments(arguments, kernel)
    outputs = torch.ops.sb_fast_sligru.attention_decoder(*tensors, *options)
    upstream = [g.to(outputs[0]) for g in make_upstream(SMALL)]
    for grads in (upstream, [torch.randn_like(outputs[0]), None, None]):
        for needs in ([True] * len(FLAGS), [False] * len(FLAGS)):
            torch.library.opcheck(
                torch.ops.sb_fast_sligru.attention_decoder_backward,
                (*grads, *tensors, *options, *outputs, *needs),
                test_utils=("test_schema", "test_faketensor"),
            )
    for key, tensor in zip(NAMES, tensors, strict=True):
        if tensor is not None and key in GIVEN:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.sb_fast_sligru.attention_decoder, (*tensors, *options))


@each_kernel
def test_compiles_in_one_graph_for_any_batch_tokens_and_frames(kernel):
    def function(**arguments):
        h, context, attention = ops.attention_decoder(**arguments)
        return h.sum() + context.square().sum() + attention.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with backend(kernel.name):
        for batch, tokens, frames in ((3, 5, 8), (4, 9, 11), (2, 17, 70)):
            arguments = make_inputs((batch, tokens, frames, *SMALL[3:]))
            results = []
            for call in (compiled, function):
                inputs = converted(arguments, kernel.dtype, device=kernel.device)
                call(**inputs).backward()
                results.append({key: inputs[key].grad for key in GIVEN})
            assert_close(results[0], results[1], 1e-14 if kernel.device == "cpu" else 1e-6)


# ---- counted operations


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("trains", [GIVEN, GIVEN[:-2], ("wx",), ()], ids=["all", "most", "wx", ""])
def test_flops_are_those_of_the_loop(tokens, trains):
    inputs = converted(make_inputs((3, tokens, *SMALL[2:])), trains=trains)

    def count(name):
        with backend(name), FlopCounterMode(display=False) as counter:
            outputs = ops.attention_decoder(**inputs)
            if trains:
                sum(output.sum() for output in outputs).backward()
        return counter.get_total_flops()

    assert count("cpu") == count("reference") > 0


# ---- arguments


def zeros(**changed):
    good = {
        "wx": torch.zeros(2, 3, 12),
        "keys": torch.zeros(2, 5, 6),
        "values": torch.zeros(2, 5, 7),
        "lengths": torch.tensor([5, 2]),
        "w_context": torch.zeros(12, 8),
        "u": torch.zeros(12, 4),
        "w_query": torch.zeros(6, 4),
        "filters": torch.zeros(2, 3),
        "w_location": torch.zeros(6, 2),
        "v": torch.zeros(6),
        "w_out": torch.zeros(8, 7),
        "b_out": torch.zeros(8),
    }
    return good | changed


BAD_ARGUMENTS = {
    "rank": ({"wx": torch.zeros(3, 12)}, r"wx: got shape \(3, 12\), expected \[B, N, 3H\]"),
    "wx-width": ({"wx": torch.zeros(2, 3, 8)}, r"wx: got shape \(2, 3, 8\), .*\(2, 3, 12\)"),
    "keys-batch": ({"keys": torch.zeros(1, 5, 6)}, r"keys: got shape .*expected \(2, 5, 6\)"),
    "no-frames": ({"keys": torch.zeros(2, 0, 6)}, r"keys: got .* at least one frame"),
    "values-frames": ({"values": torch.zeros(2, 4, 7)}, r"values: got .*expected \(2, 5, 7\)"),
    "lengths-dtype": ({"lengths": torch.tensor([1.0, 0.4])}, r"lengths: got torch.float32.*int64"),
    "lengths-batch": ({"lengths": torch.tensor([5])}, r"lengths: got shape \(1,\), .*\(2,\)"),
    "even-taps": ({"filters": torch.zeros(2, 4)}, r"filters: got shape \(2, 4\), .* odd number"),
    "channels": ({"w_location": torch.zeros(6, 3)}, r"w_location: got shape \(6, 3\)"),
    "mask": ({"context_mask": torch.ones(2, 8)}, r"context_mask: got .*\(2, 3, 8\)"),
    "mask-grad": (
        {"context_mask": torch.ones(2, 3, 8, requires_grad=True)},
        r"context_mask: requires a gradient",
    ),
    "u-shape": ({"u": torch.zeros(12, 5)}, r"wx: got shape|u: got shape \(12, 5\)"),
    "u-bias": ({"u_bias": torch.zeros(4)}, r"u_bias: got shape \(4,\), expected \(12,\)"),
    "integer": ({"v": torch.zeros(6).long()}, r"v: got torch.int64"),
    "mixed-dtypes": ({"keys": torch.zeros(2, 5, 6).double()}, r"keys: got torch.float64 beside u"),
    "list": ({"b_out": [0.0]}, r"b_out: got list, expected a torch.Tensor"),
    "device": ({"v": torch.zeros(6, device="meta")}, r"v: got device meta, expected cpu"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    with backend(name), pytest.raises(ValueError, match=message):
        ops.attention_decoder(**zeros(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"wx": torch.zeros(3, 12)}, r"wx: got Float \[3, 12\], expected \[B, N, 3H\]"),
        ({"keys": torch.zeros(2, 0, 6)}, r"keys: .*at least one frame"),
        ({"values": torch.zeros(1, 5, 7)}, r"values: got Float \[1, 5, 7\], .*Float \[2, 5, 7\]"),
        ({"lengths": torch.tensor([5, 2, 1])}, r"lengths: got Long \[3\], expected Long \[2\]"),
        ({"lengths": torch.tensor([5, 6])}, r"lengths: got 6 in row 1, expected 0 to L = 5"),
        ({"lengths": torch.tensor([-1, 5])}, r"lengths: got -1 in row 0"),
        ({"filters": torch.zeros(2, 4)}, r"filters: .*odd number of taps"),
        ({"v": torch.zeros(6).double()}, r"v: got Double"),
        ({"operand_dtype": "float64"}, r"u: got Float beside operands of Double"),
        ({"operand_dtype": "int64"}, r'operand_dtype: got "int64", expected float64, float32'),
        ({"backend": "stepwise"}, r'backend: got "stepwise", expected "cpu"'),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    given = zeros(context_mask=None, u_bias=None, scaling=1.0, operand_dtype="float32")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.attention_decoder(**(given | {"backend": "cpu"} | changed))


# ---- choice of backend


RECIPE = torch.float32, 10, 201
H200 = ops.Gpu(90, True, True, True, 227 * 1024, 132, 32, 15, 7)
A100 = ops.Gpu(80, True, False, False, 163 * 1024, 108, 0, 0, 0)
TURING = ops.Gpu(75, False, False, False, 64 * 1024, 40, 0, 0, 0)


def test_backend_choice():
    assert ops.choose_decoder_backend("cpu", *RECIPE)[0] == "cpu"
    assert ops.choose_decoder_backend("meta", *RECIPE)[0] == "reference"
    with backend("reference"):
        assert ops.choose_decoder_backend("cpu", *RECIPE) == ("reference", "forced")
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        ops.attention_decoder(**zeros())


@pytest.mark.parametrize(
    "gpu, dtype, channels, taps, obstacle",
    [
        (H200, torch.float32, 10, 201, ""),
        (A100, torch.bfloat16, 16, 495, ""),
        (H200, torch.float64, 10, 201, "no float64 CUDA kernels"),
        (TURING, torch.float16, 10, 201, "need compute capability 8.0 or newer"),
        (H200, torch.float16, 17, 201, "17 location channels, the kernels take 16"),
        (H200, torch.float16, 16, 497, "497 taps, the kernels take 495"),
    ],
)
def test_choice_on_pretended_gpus(monkeypatch, gpu, dtype, channels, taps, obstacle):
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    monkeypatch.setattr(_attention_decoder, "gpu", lambda device: gpu)
    name, reason = ops.choose_decoder_backend("cuda:0", dtype, channels, taps)
    assert name == ("reference" if obstacle else "persistent") and obstacle in reason
    with backend("stepwise"), pytest.raises(RuntimeError, match="has no such kernels"):
        ops.choose_decoder_backend("cuda:0", dtype, channels, taps)
    if obstacle:
        with backend("persistent"), pytest.raises(RuntimeError, match=obstacle):
            ops.choose_decoder_backend("cuda:0", dtype, channels, taps)


def test_a_library_that_does_not_load(monkeypatch):
    monkeypatch.setattr(_library, "cuda_error", "it was built for another torch, says this test")
    name, reason = ops.choose_decoder_backend("cuda:0", *RECIPE)
    assert name == "reference" and "says this test" in reason


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    arguments = make_inputs(SMALL)
    expected = run("reference", arguments)
    with pytest.warns(UserWarning, match="slow PyTorch loop.*not built, says this test"):
        results = run("auto", arguments)
    assert all(torch.equal(results[key], expected[key]) for key in OUTPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("auto", arguments)
    with pytest.raises(RuntimeError, match='backend\\("cpu"\\) is forced, but it is not built'):
        run("cpu", arguments)


def test_the_backward_runs_where_the_forward_did():
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)
    expected = run("cpu", arguments, upstream)
    inputs = converted(arguments)
    with backend("cpu"):
        outputs = ops.attention_decoder(**inputs)
    with backend("reference"):
        torch.autograd.backward(outputs, upstream)
    assert all(torch.equal(inputs[key].grad, expected[f"grad of {key}"]) for key in GIVEN)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_input_same_bits_on_a_gpu(precision):
    shape = WIDE[0]
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    first, *others = (
        run("persistent", arguments, upstream, *PRECISIONS[precision], "cuda") for _ in range(3)
    )
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("place", GIVEN)
def test_nan_reaches_the_output_on_a_gpu(place, precision):
    arguments = make_inputs(SMALL, lengths=[7, 5, 6])
    arguments[place].flatten()[-1] = math.nan
    results, expected = (
        run(name, arguments, None, *PRECISIONS[precision], "cuda")
        for name in ("persistent", "reference")
    )
    for key, result in results.items():
        assert torch.equal(result.isnan(), expected[key].isnan()), key


@pytest.mark.gpu
def test_a_score_buffer_smaller_than_a_row():
    """Tokens of one row are then taken in turn: 3 of 5 at a time."""
    shape = (2, 5, 6000, 8, 3584, 8, 8, 3, 9)
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    expected = run("reference", arguments, upstream, device="cuda")
    results = run("persistent", arguments, upstream, torch.float32, device="cuda")
    assert_close(results, expected, 1e-4)


@pytest.mark.gpu
def test_other_strides_and_misaligned_tensors():
    arguments, upstream = make_inputs(WIDE[1]), make_upstream(WIDE[1])
    expected = run("persistent", arguments, upstream, torch.float32, device="cuda")
    inputs = converted(arguments, torch.float32, device="cuda")
    for key, t in inputs.items():
        if isinstance(t, torch.Tensor) and key != "lengths":
            apart = torch.empty(t.numel() + 1, device="cuda")[1:].view(t.shape)
            inputs[key] = apart.copy_(t.detach()).mT.contiguous().mT if t.ndim > 1 else t.detach()
            inputs[key].requires_grad_(key in GIVEN)
    with backend("persistent"):
        outputs = ops.attention_decoder(**inputs)
    gradients = torch.autograd.grad(
        outputs, [inputs[key] for key in GIVEN], [g.to(outputs[0]) for g in upstream]
    )
    results = dict(zip(OUTPUTS, outputs, strict=True))
    results |= {f"grad of {key}": g for key, g in zip(GIVEN, gradients, strict=True)}
    assert_close(results, expected, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_graph_replays_the_training_step(precision):
    dtype = PRECISIONS[precision][0]
    arguments, upstream = make_inputs(WIDE[0]), make_upstream(WIDE[0])
    inputs = converted(arguments, dtype, device="cuda")
    upstream = [g.to(inputs["wx"]) for g in upstream]

    def step():
        with backend("persistent"):
            outputs = ops.attention_decoder(**inputs)
        return *outputs, *torch.autograd.grad(outputs, [inputs[k] for k in GIVEN], upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs["keys"].copy_(torch.randn_like(inputs["keys"]))
    for _ in range(2):
        graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """What the stream still has to compute is what the kernels read."""
    arguments = converted(make_inputs(WIDE[0]), torch.float32, (), "cuda")
    with backend("persistent"):
        expected = ops.attention_decoder(**arguments)
        keys = torch.zeros_like(arguments["keys"])
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            keys.copy_(arguments["keys"])
            results = ops.attention_decoder(**(arguments | {"keys": keys}))
        side.synchronize()
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_lengths_out_of_range_are_the_nearest_on_a_gpu():
    """A look at them would wait for the GPU."""
    arguments = make_inputs(SMALL, lengths=[9, -2, 5])
    results = run("persistent", arguments, None, torch.float32, device="cuda")
    arguments["lengths"] = torch.tensor([7, 0, 5])
    expected = run("persistent", arguments, None, torch.float32, device="cuda")
    for key, value in results.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_random_calls_on_a_gpu(capsys):
    for random in draw_cases(capsys, "attention decoder on a GPU", 300):
        shape = [random.randint(1, top) for top in (40, 8, 200, 70, 70, 70, 70, 16, 60)]
        shape[-1] = 2 * shape[-1] - 1
        precision = random.choice(list(PRECISIONS))
        print(shape, precision)
        arguments = make_inputs(
            shape,
            bias=random.random() < 0.5,
            mask=random.random() < 0.5,
            scaling=random.choice([1.0, 0.3, 2.5]),
        )
        upstream = make_upstream(shape)
        expected = run("reference", arguments, upstream, device="cuda")
        precision = PRECISIONS[precision]
        eager, results = (
            run(name, arguments, upstream, *precision, "cuda")
            for name in ("reference", "persistent")
        )
        error = largest_error_to_expect(eager, expected, arguments, upstream, precision, "cuda")
        assert_close(results, expected, error + 300 * torch.finfo(precision[0]).eps)
