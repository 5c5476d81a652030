"""The operator between convolutions against plain PyTorch in float64. Runs without SpeechBrain."""

import math
import warnings

import pytest
import torch
from fuzz import draw_cases
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from sb_fast_sligru import _library, backend, info, ops
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

# B, T, F, C, pool_time, pool_frequency, halo. Vectors of channels and single ones, sizes that fill
# no window, and the smallest that have a halo.
SHAPES = [
    (1, 1, 1, 2, 1, 1, False),
    (2, 5, 6, 4, 1, 1, True),
    (2, 5, 7, 5, 1, 2, True),
    (3, 11, 10, 8, 4, 2, False),
    (2, 9, 7, 16, 2, 2, True),
    (1, 2, 2, 3, 1, 1, True),
    (2, 3, 6, 8, 1, 2, True),
    (2, 7, 4, 9, 3, 1, False),
    (1, 6, 9, 24, 2, 3, True),
    (1, 5, 40, 128, 1, 1, True),
    (2, 9, 20, 256, 4, 2, False),
    (1, 2, 80, 128, 1, 2, True),
]
SMALL = (3, 5, 6, 8, 2, 2, True)
GIVEN = ("x", "bias", "ln_weight", "ln_bias")
# Of the tensors and, if any, of the output.
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "bfloat16-to-float32": (torch.bfloat16, torch.float32),
    "float16-to-float32": (torch.float16, torch.float32),
}

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
# Of a frame of few values luck decides how it is rounded; CUDA kernels pool 1 or 2 frequencies.
each_shape_and_device = pytest.mark.parametrize(
    "shape, device",
    [
        pytest.param(shape, device, id=f"{'-'.join(map(str, shape))}-{device}", marks=marks)
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
        for shape in SHAPES
        if shape[2] * shape[3] >= 20 and (device == "cpu" or shape[5] <= 2)
    ],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread_for_small_tensors(one_thread):
    """Threads only wait for each other there."""


def make_inputs(shape, mask=True, **options):
    """Random float64 arguments on the CPU."""
    B, T, F, C, pool_time, pool_frequency, halo = shape

    def randn(*sizes):
        return torch.randn(*sizes, dtype=torch.float64)

    keep = (torch.rand(B, F // pool_frequency) < 0.7).double() / 0.7
    return {
        "x": randn(B, T, F, C),
        "bias": randn(C) / 2,
        "ln_weight": 1 + randn(F, C) / 3,
        "ln_bias": randn(F, C) / 3,
        "drop_mask": keep if mask else None,
        "pool_time": pool_time,
        "pool_frequency": pool_frequency,
        "halo": halo,
    } | options


def make_upstream(shape):
    B, T, F, C, pool_time, pool_frequency, halo = shape
    sizes = B, T // pool_time + 2 * halo, F // pool_frequency + 2 * halo, C
    return torch.randn(sizes, dtype=torch.float64)


def converted(arguments, dtype=torch.float64, device="cpu", trains=GIVEN):
    return {
        key: value.detach().to(device, dtype).requires_grad_(key in trains)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arguments.items()
    }


def run(arguments, upstream=None, precision=(torch.float64, None), device="cpu", name="auto"):
    """The output and, given its gradient `upstream`, every gradient, by name."""
    dtype, out_dtype = precision
    inputs = converted(arguments, dtype, device, GIVEN if upstream is not None else ())
    if out_dtype is not None:  # as under autocast: 16-bit x beside float32 parameters
        for key in set(GIVEN) - {"x"}:
            inputs[key] = inputs[key].detach().to(out_dtype).requires_grad_(upstream is not None)
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = ops.norm_pool(**inputs, out_dtype=out_dtype)
    results = {"out": out}
    if upstream is not None:
        wanted = [inputs[key] for key in GIVEN]
        gradients = torch.autograd.grad(out, wanted, upstream.to(out))
        results |= {f"grad of {key}": g for key, g in zip(GIVEN, gradients, strict=True)}
    return results


def assert_close(results, expected, bounds):
    assert results.keys() == expected.keys()
    for key, value in results.items():
        assert value.shape == expected[key].shape, key
        bound = bounds[key] if isinstance(bounds, dict) else bounds
        # Gradients that nearly vanish in exact arithmetic are rounding.
        scale = max(expected[key].double().norm().item(), 1e-3)
        error = (value.double().cpu() - expected[key].double().cpu()).norm().item() / scale
        assert error <= bound, f"{key}: relative error {error:.2e}, allowed {bound:.2e}"


def with_frames_that_do_not_count(arguments, upstream, frames, out_frames):
    """The same problem, x and the output longer by so many frames; what is in them is NaN."""

    def longer(t, more):
        return torch.nn.functional.pad(t, (0, 0, 0, 0, 0, more), value=math.nan)

    lengths = {"frames": arguments["x"].shape[1], "out_frames": upstream.shape[1] + out_frames}
    arguments = arguments | lengths | {"x": longer(arguments["x"], frames)}
    return arguments, longer(upstream, out_frames)


def without_those_frames(results, arguments):
    """The results of the shorter problem; the others must be zeros."""
    own = arguments["frames"] // arguments["pool_time"] + 2 * arguments["halo"]
    results = dict(results)
    for key, frames in (("out", own), ("grad of x", arguments["frames"])):
        assert not results[key][:, frames:].any()
        results[key] = results[key][:, :frames]
    return results


# ---- values


@each_shape
@pytest.mark.parametrize("mask, slope", [(True, 0.01), (False, 0.3), (True, -0.5), (False, 0.0)])
def test_float64_matches_plain_pytorch(shape, mask, slope):
    arguments = make_inputs(shape, mask, negative_slope=slope, eps=1e-3)
    upstream = make_upstream(shape)
    expected = run(arguments, upstream, name="reference")
    assert_close(run(arguments, upstream, name="cpu"), expected, 1e-12)


@each_shape_and_device
@each_precision
def test_error_is_no_worse_than_plain_pytorchs(shape, precision, device):
    """Every error against float64 is at most twice that of PyTorch in the same precision."""
    dtype, _ = PRECISIONS[precision]
    # What the low precision is given is exact in it, so that only the computation is compared.
    arguments = {
        key: value.to(dtype).double() if isinstance(value, torch.Tensor) else value
        for key, value in make_inputs(shape).items()
    }
    upstream = make_upstream(shape).to(dtype).double()
    exact = run(arguments, upstream, name="reference")
    eager = run(arguments, upstream, PRECISIONS[precision], device, name="reference")
    results = run(arguments, upstream, PRECISIONS[precision], device)
    last_place = torch.finfo(dtype).eps
    bounds = {
        key: 2 * (eager[key].double().cpu() - value).norm().item() / max(value.norm().item(), 1e-3)
        + 2 * last_place
        for key, value in exact.items()
    }
    assert all(results[key].dtype == eager[key].dtype for key in eager)
    assert_close(results, exact, bounds)


@each_device
def test_random_calls(capsys, device):
    """Sizes, layouts, masks and precisions drawn anew in every run."""
    for random in draw_cases(capsys, f"norm_pool on {device}", 150):
        halo = random.random() < 0.6
        pools = (
            random.choice([1, 1, 2, 3, 4]),
            random.choice([1, 2] if device == "cuda" else [1, 2, 3]),
        )
        sizes = [random.randint(pool * (1 + halo), 9 + 2 * pool) for pool in pools]
        shape = (
            random.randint(1, 4),
            *sizes,
            random.choice([2, 3, 4, 8, 12, 16, 33]),
            *pools,
            halo,
        )
        precision = "float32" if device == "cuda" else random.choice(["float64", "float32"])
        print(shape, precision)
        arguments = make_inputs(shape, mask=random.random() < 0.5)
        if random.random() < 0.3:  # other strides
            arguments["x"] = arguments["x"].transpose(1, 3).contiguous().transpose(1, 3)
        arguments = {
            key: value.float().double() if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        upstream = make_upstream(shape).float().double()
        expected = run(arguments, upstream, name="reference")
        longer, upstream = with_frames_that_do_not_count(
            arguments, upstream, random.choice([0, 0, 1, 5]), random.choice([0, 0, 1, 40])
        )
        exact = precision == "float64"
        dtypes = (torch.float64, None) if exact else PRECISIONS[precision]
        # Two values that are almost equal keep few digits of their difference.
        bound = 1e-9 if exact else 1e-3
        results = run(longer, upstream, dtypes, device)
        assert_close(without_those_frames(results, longer), expected, bound)


@each_shape_and_device
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_frames_that_do_not_count(shape, device, name):
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    expected = run(arguments, upstream, name="reference")
    arguments, upstream = with_frames_that_do_not_count(arguments, upstream, 3, 5)
    results = run(arguments, upstream, (torch.float32, None), device, name)
    assert_close(without_those_frames(results, arguments), expected, 1e-5)


@each_device
@pytest.mark.parametrize("frames", [700, 4000])
def test_many_frames(frames, device):
    """Blocks and parts have several groups each; sums over them keep their digits."""
    shape = (3, frames, 10, 16, 1, 2, True)
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    arguments = converted(converted(arguments, torch.float32, trains=()), trains=())
    upstream = upstream.float().double()
    expected = run(arguments, upstream, name="reference")
    assert_close(run(arguments, upstream, (torch.float32, None), device), expected, 2e-6)


@each_device
def test_a_mean_far_from_zero_keeps_the_digits(device):
    """A mean of squares less the square of the mean would not."""
    arguments = make_inputs(SMALL)
    arguments["x"] = (arguments["x"] + 1000).float().double()
    exact = run(arguments, name="reference")
    assert_close(run(arguments, None, (torch.float32, None), device), exact, 3e-4)


@each_shape_and_device
def test_the_first_of_equal_values_gets_the_gradient(shape, device):
    """As of torch's max-pooling: with constant frames all values of a window are equal."""
    arguments = make_inputs(shape)
    arguments["x"] = torch.ones_like(arguments["x"])
    arguments |= {key: torch.ones_like(arguments[key]) for key in ("bias", "ln_weight", "ln_bias")}
    upstream = make_upstream(shape)
    expected = run(arguments, upstream, name="reference")
    results = run(arguments, upstream, (torch.float32, None), device)
    assert_close(results, expected, 1e-5)
    winners = [(values["grad of ln_bias"] != 0).cpu() for values in (results, expected)]
    assert torch.equal(*winners)


@each_device
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [*GIVEN, "drop_mask"])
@pytest.mark.parametrize("shape", [SMALL, (2, 5, 6, 8, 1, 1, False)], ids=["pooled", "plain"])
def test_nan_reaches_the_output(shape, place, value, device):
    arguments = make_inputs(shape)
    arguments[place].flatten()[1] = value
    results = run(arguments, None, (torch.float32, None), device)["out"].cpu()
    expected = run(arguments, None, (torch.float32, None), name="reference")["out"]
    assert not expected.isfinite().all()
    assert torch.equal(results.isnan(), expected.isnan())


@each_device
def test_a_mask_of_zeros_gives_zeros(device):
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)
    arguments["drop_mask"] = torch.zeros_like(arguments["drop_mask"])
    results = run(arguments, upstream, (torch.float32, None), device)
    assert all(not value.any() for value in results.values())


@each_device
def test_strided_inputs(device):
    """Transposed x, parameters that start off a 16-byte border, an upstream of other strides."""
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)
    exact = run(arguments, upstream, name="reference")
    inputs = converted(arguments, torch.float32, device, ())
    strided = {}
    for key in (*GIVEN, "drop_mask"):
        wide = torch.zeros(inputs[key].numel() + 1, device=device)
        strided[key] = wide[1:].view(inputs[key].shape).copy_(inputs[key])
    strided["x"] = inputs["x"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided["x"].is_contiguous()
    for x in (strided["x"], torch.zeros(1 + inputs["x"].numel(), device=device)[1:]):
        if x.ndim == 1:
            x = x.view(inputs["x"].shape).copy_(inputs["x"])
        tensors = [t.detach().requires_grad_() for t in (x, *(strided[key] for key in GIVEN[1:]))]
        options = {
            key: value for key, value in arguments.items() if key.startswith(("pool", "halo"))
        }
        out = ops.norm_pool(*tensors, strided["drop_mask"], **options)
        turned = upstream.float().to(device).transpose(0, 3).contiguous().transpose(0, 3)
        results = {"out": out}
        gradients = torch.autograd.grad(out, tensors, turned)
        results |= {f"grad of {key}": g for key, g in zip(GIVEN, gradients, strict=True)}
        assert_close(results, exact, 1e-5)


@each_device
def test_an_empty_batch(device):
    shape = (0, *SMALL[1:])
    results = run(make_inputs(shape), make_upstream(shape), (torch.float32, None), device)
    assert results["out"].shape == make_upstream(shape).shape
    for key in GIVEN[1:]:
        assert not results[f"grad of {key}"].any()


@each_device
@each_precision
def test_same_input_same_bits(precision, device):
    shape = (4, 301, 10, 16, 2, 2, False)
    arguments, upstream = make_inputs(shape), make_upstream(shape)
    first = run(arguments, upstream, PRECISIONS[precision], device)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(arguments, upstream, PRECISIONS[precision], device)
            assert all(torch.equal(first[key], again[key]) for key in first)
    finally:
        torch.set_num_threads(threads)


# ---- autograd


def operator_arguments(arguments, out_dtype="float64"):
    """Positional arguments of the operator itself."""
    tensors = [arguments[key] for key in (*GIVEN, "drop_mask")]
    options = [arguments[key] for key in ("pool_time", "pool_frequency", "halo")]
    lengths = arguments.get("frames", arguments["x"].shape[1]), arguments.get("out_frames", 0)
    return tensors, (1e-5, 0.01, *options, out_dtype, *lengths)


@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 1, 2, True), (1, 5, 2, 2, 2, 1, False)])
def test_gradcheck(shape):
    arguments = make_inputs(shape)

    def function(*values):
        with backend("cpu"):
            return ops.norm_pool(**(arguments | dict(zip(GIVEN, values, strict=True))))

    values = [arguments[key].requires_grad_() for key in GIVEN]
    assert torch.autograd.gradcheck(function, values)


@each_device
@pytest.mark.parametrize("trains", [("x",), ("bias",), ("ln_weight", "ln_bias"), GIVEN])
def test_gradients_nobody_wants_are_not_computed(trains, device):
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)
    expected = run(arguments, upstream, name="reference")
    inputs = converted(arguments, torch.float32, device, trains)
    ops.norm_pool(**inputs).backward(upstream.float().to(device))
    for key in GIVEN:
        assert (inputs[key].grad is not None) == (key in trains)
        if key in trains:
            assert relative_error(inputs[key].grad, expected[f"grad of {key}"]) < 1e-5
    arguments = converted(arguments, torch.float32, device, ())
    tensors, options = operator_arguments(arguments, "float32")
    out, statistics = torch.ops.sb_fast_sligru.norm_pool(*tensors, *options)
    wanted = "x" in trains, any(key in trains for key in GIVEN[1:])
    gradients = torch.ops.sb_fast_sligru.norm_pool_backward(
        torch.ones_like(out), *tensors, *options, statistics, *wanted
    )
    assert [g.numel() > 0 for g in gradients] == [wanted[0]] + 3 * [wanted[1]]


def test_saves_inputs_and_statistics_only_and_nothing_without_grad():
    arguments = make_inputs(SMALL)
    saved = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.norm_pool(**converted(arguments))
        inputs = [tuple(arguments[key].shape) for key in (*GIVEN, "drop_mask")]
        assert sorted(saved) == sorted([*inputs, (3, 2, 2, 2)])
        saved.clear()
        with torch.no_grad():
            out = ops.norm_pool(**converted(arguments))
    assert not saved and out.grad_fn is None


def test_second_derivative_is_refused_and_the_reference_has_it():
    arguments = make_inputs(SMALL)

    def first_gradient(name):
        inputs = converted(arguments)
        with backend(name):
            out = ops.norm_pool(**inputs)
        return torch.autograd.grad(out.square().sum(), inputs["x"], create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        first_gradient("cpu").sum().backward()
    first_gradient("reference").sum().backward()


def test_derivatives_that_kernels_lack_are_pytorchs(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    arguments = make_inputs(SMALL)
    x = arguments.pop("x")

    def function(x):
        return ops.norm_pool(x, **arguments)

    def derivatives():
        results = {
            "jvp": torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
            "grad": torch.func.grad(lambda x: function(x).square().sum())(x),
        }
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            results["dual"] = forward_ad.unpack_dual(function(dual)).tangent
        return results

    with pytest.warns(UserWarning, match=r"plain PyTorch.*backend\(.reference.\) has"):
        ours = derivatives()
    with backend("reference"):
        assert_close(ours, derivatives(), 1e-14)
    with backend("cpu"), pytest.raises(RuntimeError, match=r"no gradient for torch.func"):
        torch.func.grad(lambda x: function(x).sum())(x)


def test_output_changed_in_place():
    """The backward reads nothing of it."""
    arguments, upstream = make_inputs(SMALL), make_upstream(SMALL)

    def gradient(name):
        inputs = converted(arguments)
        with backend(name):
            out = ops.norm_pool(**inputs)
        out.mul_(2)
        return torch.autograd.grad(out, inputs["x"], upstream)[0]

    assert relative_error(gradient("cpu"), gradient("reference")) < 1e-12


@each_device
@pytest.mark.parametrize("mask, longer", [(True, {}), (False, {"frames": 4, "out_frames": 7})])
def test_opcheck(mask, longer, device):
    """Schema, fake kernel, autograd registration and tracing with dynamic shapes."""
    arguments = converted(make_inputs(SMALL, mask, **longer), torch.float32, device, ())
    tensors, options = operator_arguments(arguments, "float32")
    out, statistics = torch.ops.sb_fast_sligru.norm_pool(*tensors, *options)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.sb_fast_sligru.norm_pool_backward,
            (torch.randn_like(out), *tensors, *options, statistics, *needs),
            test_utils=("test_schema", "test_faketensor"),
        )
    for tensor in tensors[:4]:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.sb_fast_sligru.norm_pool, (*tensors, *options))


@each_device
def test_compiles_in_one_graph_for_any_batch_and_length(device):
    def function(**arguments):
        time = arguments["x"].shape[1]
        longer = {"frames": time - 1, "out_frames": time // 8 * 8}
        return ops.norm_pool(**arguments, **longer).square().sum()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, time in ((11, 25), (14, 29), (13, 37)):
        arguments = make_inputs((batch, time, *SMALL[2:]))
        results = []
        for call in (compiled, function):
            inputs = converted(arguments, torch.float32, device)
            call(**inputs).backward()
            results.append({key: inputs[key].grad for key in GIVEN})
        assert_close(*results, 1e-6)
    assert counters["stats"]["unique_graphs"] == 1


# ---- arguments


def zeros(**changed):
    good = {
        "x": torch.zeros(2, 5, 6, 4),
        "bias": torch.zeros(4),
        "ln_weight": torch.zeros(6, 4),
        "ln_bias": torch.zeros(6, 4),
        "drop_mask": torch.zeros(2, 3),
        "pool_frequency": 2,
    }
    return good | changed


BAD_ARGUMENTS = {
    "rank": ({"x": torch.zeros(5, 6, 4)}, r"x: got shape \(5, 6, 4\), expected \[B, T, F, C\]"),
    "no-frames": ({"x": torch.zeros(2, 0, 6, 4)}, r"x: got shape .*expected \[B, T, F, C\]"),
    "bias": ({"bias": torch.zeros(5)}, r"bias: got shape \(5,\), expected \(4,\)"),
    "ln_weight": ({"ln_weight": torch.zeros(4, 6)}, r"ln_weight: got .*expected \(6, 4\)"),
    "ln_bias": ({"ln_bias": torch.zeros(24)}, r"ln_bias: got shape \(24,\), expected \(6, 4\)"),
    "mask": ({"drop_mask": torch.zeros(2, 6)}, r"drop_mask: got shape .*expected \(2, 3\)"),
    "mask-grad": (
        {"drop_mask": torch.zeros(2, 3, requires_grad=True)},
        r"drop_mask: requires a gradient",
    ),
    "pool_time": ({"pool_time": 0}, r"pool_time: got 0, expected an int from 1 on"),
    "pool_frequency": ({"pool_frequency": 1.5}, r"pool_frequency: got 1.5, expected an int"),
    "few-frames": ({"pool_time": 6}, r"x: got .* at least 6 frames for pool_time=6$"),
    "halo": ({"pool_time": 3, "halo": True}, r"at least 6 frames for pool_time=3 and a halo"),
    "frequencies": (
        {"pool_frequency": 4, "drop_mask": None, "halo": True},
        r"at least 8 frequencies for pool_frequency=4 and a halo",
    ),
    "integer": ({"bias": torch.zeros(4).long()}, r"bias: got torch.int64"),
    "mixed": ({"bias": torch.zeros(4).double()}, r"bias: got torch.float64 beside x of .*float32"),
    "list": ({"bias": [0.0] * 4}, r"bias: got list, expected a torch.Tensor"),
    "device": ({"bias": torch.zeros(4, device="meta")}, r"bias: got device meta, expected cpu"),
    "out_dtype": ({"out_dtype": torch.float16}, r"out_dtype: got torch.float16, expected"),
    "frames": ({"frames": 6}, r"frames: got 6, expected an int from 1 to 5, those of x"),
    "too-few-frames": ({"frames": 2, "pool_time": 3}, r"at least 3 frames for pool_time=3"),
    "out_frames": ({"out_frames": 1.5}, r"out_frames: got 1.5, expected an int from 0 on"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    with backend(name), pytest.raises(ValueError, match=message):
        ops.norm_pool(**zeros(**changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"x": torch.zeros(5, 6, 4)}, r"x: got Float \[5, 6, 4\], expected \[B, T, F, C\]"),
        ({"bias": torch.zeros(3)}, r"bias: got Float \[3\], expected Float \[4\]"),
        ({"ln_bias": torch.zeros(6, 4).double()}, r"ln_bias: got Double .*expected Float \[6, 4\]"),
        ({"drop_mask": torch.zeros(1, 3)}, r"drop_mask: got Float \[1, 3\], .*Float \[2, 3\]"),
        ({"pool_time": 0}, r"pool_time: got 0, expected 1 or more"),
        ({"pool_time": 3, "halo": True}, r"x: .* too small for pool_time = 3 and a halo"),
        ({"out_dtype": "float16"}, r"out_dtype: got Half beside x of Float"),
        ({"out_dtype": "int64"}, r'out_dtype: got "int64", expected float64, float32'),
        ({"frames": 6}, r"frames: got 6, expected 1 to 5, those of x"),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    given = zeros(eps=1e-5, negative_slope=0.1, pool_time=1, halo=False, out_dtype="float32")
    given |= {"frames": 5, "out_frames": 0}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.norm_pool(**(given | changed))


# ---- choice of backend


def test_backend_choice(monkeypatch):
    sizes = (torch.float32, 40, 128)
    assert ops.choose_norm_pool_backend("cpu", *sizes) == ("cpu", "the fastest")
    assert ops.choose_norm_pool_backend("meta", *sizes)[0] == "reference"
    with backend("reference"):
        assert ops.choose_norm_pool_backend("cuda:0", *sizes) == ("reference", "forced")
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        ops.norm_pool(**zeros())

    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    monkeypatch.setattr(ops._norm_pool, "gpu", lambda index: a100)
    a100 = ops.Gpu(80, True, False, False, 163 * 1024, 108, 0, 0, 0)
    assert ops.choose_norm_pool_backend("cuda:0", *sizes) == ("cuda", "the fastest")
    for name in ("stepwise", "persistent"):
        with backend(name):
            assert ops.choose_norm_pool_backend("cuda:0", *sizes) == (name, "forced")
    for refused, reason in (
        ((torch.float64, 40, 128), "do not take float64"),
        ((torch.float32, 40, 128, 3), "pool 1 or 2 frequencies, not 3"),
        ((torch.float16, 80, 256), "a frame of 80 x 256 values is too large"),
    ):
        name, why = ops.choose_norm_pool_backend("cuda:0", *refused)
        assert name == "reference" and reason in why
    a100 = a100._replace(shared_bytes=64 * 1024)  # compute capability 7.5
    assert "too large" in ops.choose_norm_pool_backend("cuda:0", torch.float16, 80, 128)[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_call_is_plain_pytorch_for_any_length():
    def function(x):
        return ops.norm_pool(**zeros(x=x, ln_weight=torch.ones(6, 4)), halo=True)

    with pytest.warns(UserWarning, match="plain PyTorch .*torch.jit.trace would keep"):
        traced = torch.jit.trace(function, torch.randn(2, 5, 6, 4))
    for frames in (5, 3, 9):
        x = torch.randn(2, frames, 6, 4)
        assert relative_error(traced(x), function(x).double()) < 1e-6
    with backend("cpu"), pytest.raises(RuntimeError, match="is forced, but torch.jit.trace would"):
        torch.jit.trace(function, torch.randn(2, 5, 6, 4))


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    expected = run(make_inputs(SMALL), name="reference")["out"]
    torch.manual_seed(20231)
    inputs = make_inputs(SMALL)
    with pytest.warns(UserWarning, match="plain PyTorch.*not built, says this test"):
        out = ops.norm_pool(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.norm_pool(**inputs), out)
    assert out.shape == expected.shape
    with (
        backend("cpu"),
        pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it is not built'),
    ):
        ops.norm_pool(**inputs)


def test_info_tells_the_backend():
    assert "Backend for the CNN:\n  cpu                cpu (the fastest)" in "\n".join(
        info.report()
    )


# ---- CUDA


def float32_step(x, arguments):
    inputs = converted(arguments | {"x": x}, torch.float32, "cuda")
    out = ops.norm_pool(**inputs)
    return (out, *torch.autograd.grad(out.square().sum(), [inputs[key] for key in GIVEN]))


@pytest.mark.gpu
def test_cuda_graph_replays_the_training_step():
    arguments = converted(make_inputs((4, 12, 6, 8, 2, 2, True)), torch.float32, "cuda")
    x = arguments["x"]

    def step():
        out = ops.norm_pool(**arguments)
        return (out, *torch.autograd.grad(out.square().sum(), [arguments[key] for key in GIVEN]))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    arguments = make_inputs(SMALL)
    value = arguments["x"].float().cuda()
    expected = float32_step(value, arguments)
    x = torch.zeros_like(value)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        x.copy_(value)
        results = float32_step(x, arguments)
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    """x and its gradient have more than 2 ** 31 elements; the last row must equal a small run."""
    batch, time, frequencies, channels = 230, 2000, 40, 128
    small = converted(make_inputs((1, time, frequencies, channels, 1, 2, True)), trains=())
    small = converted(small, torch.bfloat16, "cuda", ())

    def last(rows):
        inputs = small | {
            "x": small["x"].expand(rows, -1, -1, -1).contiguous().requires_grad_(),
            "drop_mask": small["drop_mask"].expand(rows, -1),
        }
        out = ops.norm_pool(**inputs)
        upstream = torch.linspace(-1, 1, out[0].numel(), device="cuda").to(out.dtype)
        upstream = upstream.view(out[:1].shape).expand(rows, -1, -1, -1)
        (gradient,) = torch.autograd.grad(out, inputs["x"], upstream)
        return out[-1].clone(), gradient[-1].clone()

    assert batch * time * frequencies * channels > 2**31
    for large, alone in zip(last(batch), last(1), strict=True):
        assert torch.equal(large, alone)
