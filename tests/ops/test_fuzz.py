"""Random calls of the operator against the float64 loop. Runs without SpeechBrain."""

import concurrent.futures
import contextlib
import math
import os

import pytest
import torch
from fuzz import draw_cases

from sb_fast_sligru import backend, ops, reference

NAMES = ("wx", "u", "h0", "ln_weight", "ln_bias")  # of what has a gradient
LOW_PRECISIONS = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
LOW_PRECISION_NAMES = ["float32", "bfloat16", "float16", "autocast-bfloat16", "autocast-float16"]


pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small


# ---- drawing


def draw_layer(random, hidden_sizes=None, most_rows=9, activations=tuple(reference.ACTIVATIONS)):
    """Random arguments in float64 on the CPU: sizes, options, and the scale of each tensor."""
    batch, time = random.randint(1, most_rows), random.randint(1, 24)
    if random.random() < 0.05:
        batch, time = random.choice([(0, time), (batch, 0)])
    hidden = random.choice(hidden_sizes) if hidden_sizes else random.randint(2, 70)
    layer_norm, bidirectional = random.random() < 0.6, random.random() < 0.5
    rows = batch * (2 if bidirectional else 1)

    def tensor(*sizes, scale):
        return scale * torch.randn(*sizes, dtype=torch.float64)

    def perhaps(make):
        return make() if random.random() < 0.5 else None

    def rows_or_one():
        return random.choice([1, rows])

    scale = 10 ** random.uniform(-2, 1.5) if layer_norm else random.uniform(0.1, 0.6)
    return {
        "wx": tensor(batch, time, 2 * hidden, scale=10 ** random.uniform(-2, 1)),
        "u": tensor(2 * hidden, hidden, scale=scale / math.sqrt(hidden)),
        "h0": perhaps(lambda: tensor(rows_or_one(), hidden, scale=random.uniform(0.1, 2))),
        "drop_mask": perhaps(lambda: (torch.rand(rows_or_one(), hidden) < 0.7).double() / 0.7),
        "ln_weight": perhaps(lambda: 1 + tensor(2 * hidden, scale=0.3)) if layer_norm else None,
        "ln_bias": perhaps(lambda: tensor(2 * hidden, scale=0.3)) if layer_norm else None,
        "lengths": perhaps(lambda: torch.randint(time + 1, (batch,))),
        "layer_norm": layer_norm,
        "activation": random.choice(activations),
        "bidirectional": bidirectional,
        "eps": 10 ** random.uniform(-7, -3),
    }


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def restride(random, t):
    """The same values in memory of another layout."""
    layout = random.choice(["as it is", "transposed", "slice", "step", "offset"])
    if layout == "transposed" and t.ndim > 1:
        order = random.sample(range(t.ndim), t.ndim)
        inverse = [order.index(axis) for axis in range(t.ndim)]
        return t.permute(order).contiguous().permute(inverse)
    wide = t.new_full([size + 3 for size in t.shape], math.nan)
    if layout == "slice":
        view = wide[tuple(slice(1, 1 + size) for size in t.shape)]
    elif layout == "step":
        wide = t.new_full([*t.shape[:-1], 2 * t.shape[-1]], math.nan)
        view = wide[..., ::2]
    elif layout == "offset":
        view = t.new_full([t.numel() + 1], math.nan)[1:].view(t.shape)
    else:
        return t
    view.copy_(t)
    return view


def describe(arguments, *more):
    shapes = {
        key: tuple(value.shape) if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
        if value is not None
    }
    print(shapes, *more)


# ---- running and comparing


def run(
    name, arguments, upstream, wanted, device="cpu", dtype=torch.float64, autocast=None, lay=None
):
    """h and the wanted gradients, by name, in float64 on the CPU."""
    lay = lay or (lambda t: t)
    inputs = {
        key: lay(value.to(device, dtype)).detach().requires_grad_(key in wanted)
        if is_float(value)
        else value
        for key, value in arguments.items()
    }
    if inputs["lengths"] is not None:
        inputs["lengths"] = inputs["lengths"].to(device)
    casting = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    with backend(name), casting:
        h = ops.light_gru(**inputs)
    assert h.dtype == dtype and h.device.type == device
    results = {"h": h}
    if wanted:
        upstream = lay(upstream.to(device, dtype))
        gradients = torch.autograd.grad(h, [inputs[key] for key in wanted], upstream)
        results |= dict(zip(wanted, gradients, strict=True))
        for key in wanted:
            assert results[key].shape == inputs[key].shape
            assert results[key].dtype == inputs[key].dtype
    return {key: value.detach().double().cpu() for key, value in results.items()}


def draw_gradients(random, arguments):
    """The upstream gradient of h, and the names of the arguments whose gradients are wanted."""
    batch, time, gates = arguments["wx"].shape
    width = gates // 2 * (2 if arguments["bidirectional"] else 1)
    upstream = 10 ** random.uniform(-3, 2) * torch.randn(batch, time, width, dtype=torch.float64)
    given = [key for key in NAMES if arguments[key] is not None]
    return upstream, [key for key in given if random.random() < 0.7]


def distance(results, expected):
    return {key: (results[key] - value).norm().item() for key, value in expected.items()}


def perturbed(arguments, step=1e-15):
    """The arguments, each of their numbers moved by about `step` of itself."""
    return {
        key: value * (1 + step * torch.randn_like(value)) if is_float(value) else value
        for key, value in arguments.items()
    }


def sensitivity(arguments, upstream, wanted, expected, device, step):
    """How far the float64 loop moves when its arguments do; the larger of two moves.

    ReLU's kink and a LayerNorm over few values amplify rounding errors without bound; what a random
    layer does to them is seen from the loop alone.
    """
    moved = [
        distance(run("reference", perturbed(arguments, step), upstream, wanted, device), expected)
        for _ in range(2)
    ]
    return {key: max(move[key] for move in moved) for key in expected}


def assert_exact(results, arguments, upstream, wanted, device="cpu"):
    """As near to the float64 loop as that is to itself when its input moves by rounding errors."""
    expected = run("reference", arguments, upstream, wanted, device)
    moves = sensitivity(arguments, upstream, wanted, expected, device, 1e-15)
    for key, error in distance(results, expected).items():
        bound = 1e-12 * expected[key].norm().item() + 300 * moves[key]
        assert error <= bound, f"{key}: error {error:.1e}, allowed {bound:.1e}"


def assert_float64_layer(random, name, device, **sizes):
    arguments = draw_layer(random, **sizes)
    upstream, wanted = draw_gradients(random, arguments)
    describe(arguments, wanted)
    results = run(name, arguments, upstream, wanted, device, lay=lambda t: restride(random, t))
    assert_exact(results, arguments, upstream, wanted, device)


def assert_low_precision_layer(random, precision, name, device, **sizes):
    """Yield, of each tensor, the logarithm of our error by the loop's in that precision."""
    dtype, autocast = precision
    arguments = draw_layer(random, activations=("tanh", "sin"), **sizes)  # no kink
    if arguments["ln_weight"] is None:  # torch's own LayerNorm fails on a bias alone
        arguments["ln_bias"] = None
    upstream, wanted = draw_gradients(random, arguments)
    describe(arguments, wanted, dtype, autocast)
    arguments = {
        key: value.to(dtype).double() if is_float(value) else value
        for key, value in arguments.items()
    }
    upstream = upstream.to(dtype).double()
    exact = run("reference", arguments, upstream, wanted, device)
    lay = {"lay": lambda t: restride(random, t)}
    eager = distance(run("reference", arguments, upstream, wanted, device, *precision), exact)
    ours = distance(run(name, arguments, upstream, wanted, device, *precision, **lay), exact)
    last_place = torch.finfo(autocast or dtype).eps
    moves = sensitivity(arguments, upstream, wanted, exact, device, last_place)
    for key, error in ours.items():
        norm = exact[key].norm().item()
        # Beyond float16; a batch of none, of which the loop makes NaN.
        if math.isnan(eager[key]) or (norm and not eager[key] < norm / 2):
            continue
        # In one tensor the loop can be right by luck; the means over all cases are compared too.
        bound = 8 * max(eager[key], moves[key]) + 4 * last_place * norm
        assert error <= bound, f"{key}: error {error:.1e}, the loop's {eager[key]:.1e}"
        if eager[key] > 0 and error > 0:
            yield key, math.log(error / eager[key])


def spoil(random, arguments, values, names=NAMES):
    """Put one of `values` into one to three random places; return the names of the tensors."""
    spoiled = []
    for _ in range(random.randint(1, 3)):
        key = random.choice([key for key in names if arguments[key] is not None])
        if arguments[key].numel():
            place = random.randrange(arguments[key].numel())
            arguments[key].view(-1)[place] = random.choice(values)
            spoiled.append(key)
    return spoiled


def assert_spoiled_layer(random, name, device, dtype, only_nan, **sizes):
    """What the loop makes NaN, the kernels do; rows and steps that it leaves finite are the same.

    An infinite state may become NaN: the kernels compute c + z (h - c) for z h + (1 - z) c. So may
    what an infinite weight of `u` reaches, in float32 on a GPU: it is split into two numbers there.
    """
    arguments = draw_layer(random, **sizes)
    if only_nan:
        spoiled = spoil(random, arguments, [math.nan])
    else:
        split = device == "cuda" and dtype == torch.float32
        names = [key for key in NAMES if key != "u" or not split]
        spoiled = spoil(random, arguments, [math.nan, math.inf, -math.inf], names)
    describe(arguments, spoiled, dtype)
    h = run(name, arguments, None, [], device, dtype)["h"]
    expected = run("reference", arguments, None, [], device, dtype)["h"]
    # A 16-bit loop makes more: of infinity times what it has rounded to zero.
    exact = run("reference", arguments, None, [], device)["h"]
    assert h[expected.isnan() & exact.isnan()].isfinite().sum() == 0
    if only_nan:
        assert torch.equal(h.isnan(), expected.isnan())
    bound = {torch.float64: 1e-9, torch.float32: 1e-2}.get(dtype)
    if bound is None:  # 16-bit errors grow in 24 steps of an unlucky layer to any size
        return
    # What of a sequence and direction comes before its first number that is not finite.
    for direction, (actual, loop) in enumerate(
        zip(h.chunk(2, 2), expected.chunk(2, 2), strict=True)
        if arguments["bidirectional"]
        else [(h, expected)]
    ):
        if direction == 1:
            actual, loop = actual.flip(1), loop.flip(1)
        sound = loop.isfinite().all(2).long().cumprod(1).bool()
        error, scale = (actual[sound] - loop[sound]).norm(), loop[sound].norm()
        assert error <= bound * scale + bound, f"error {error:.1e} of {scale:.1e}"


# ---- on the CPU


def test_float64_on_the_cpu(capsys):
    for random in draw_cases(capsys, "operator, float64", 600):
        assert_float64_layer(random, "cpu", "cpu")


def assert_low_precision_layers(randoms, most, *arguments, **sizes):
    """Also the geometric mean over the cases, of each tensor with enough of them."""
    ratios = {}
    for random in randoms:
        for key, logarithm in assert_low_precision_layer(random, *arguments, **sizes):
            ratios.setdefault(key, []).append(logarithm)
    for key, logarithms in ratios.items():
        if len(logarithms) >= 20:
            mean = math.exp(sum(logarithms) / len(logarithms))
            assert mean < most, f"{key}: {mean:.2f} times the loop's error"


@pytest.mark.parametrize("precision", LOW_PRECISIONS, ids=LOW_PRECISION_NAMES)
def test_low_precision_on_the_cpu(capsys, precision):
    randoms = draw_cases(capsys, "operator, 16-bit and float32", 60)
    assert_low_precision_layers(randoms, 1.5, precision, "cpu", "cpu")


@pytest.mark.parametrize("only_nan", [True, False], ids=["NaN", "NaN-Inf"])
def test_not_finite_on_the_cpu(capsys, only_nan):
    for random in draw_cases(capsys, "operator, not finite", 400):
        assert_spoiled_layer(random, "cpu", "cpu", torch.float64, only_nan)


def test_eight_threads(capsys):
    """Each gets the bits that it would get alone."""
    cases = []
    for random in draw_cases(capsys, "operator, by 8 threads", 40):
        arguments = draw_layer(random)
        upstream, wanted = draw_gradients(random, arguments)
        cases.append(("cpu", arguments, upstream, wanted))
    expected = [run(*case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for round in range(3):
            for results, alone in zip(pool.map(lambda c: run(*c), cases), expected, strict=True):
                assert all(torch.equal(results[key], alone[key]) for key in alone), round


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow():
    """Over calls that succeed, fail, drop their graph, or change what they got in place."""
    wx = torch.randn(4, 20, 128, requires_grad=True)
    u = torch.randn(128, 64, requires_grad=True)

    def calls():
        h = ops.light_gru(wx, u, layer_norm=True)
        torch.autograd.grad(h.mul_(2).sum(), [wx, u])
        ops.light_gru(wx, u, layer_norm=True)
        with contextlib.suppress(ValueError):
            ops.light_gru(wx, u[1:], layer_norm=True)

    for _ in range(300):
        calls()
    before = resident_bytes()
    for _ in range(1000):
        calls()
    # 1000 of the smallest tensors here, the rows' statistics, would be 320 kB besides their heads.
    assert resident_bytes() - before < 1000 * 500


def assert_long_sequence(name, device, dtype, bound):
    """Pieces of a sequence of 200,000 steps against the loop over those pieces.

    The loop starts from the state before the piece, and gets the gradient that the steps behind it
    send, which is that of their own initial state.
    """
    time, hidden, length = 200_000, 16, 40
    inputs = torch.randn(1, time, 2 * hidden, dtype=torch.float64).to(device, dtype)
    u = (torch.randn(2 * hidden, hidden, dtype=torch.float64) / 4).to(device, dtype)
    upstream = torch.randn(1, time, hidden, dtype=torch.float64).to(device, dtype)
    options = {"layer_norm": True, "activation": "tanh"}
    wx = inputs.clone().requires_grad_()
    with backend(name):
        h = ops.light_gru(wx, u, **options)
        (gradient,) = torch.autograd.grad(h, wx, upstream)
    h = h.detach()
    for begin in (1, 77_777, 131_050, time - length):
        end = begin + length
        carried = torch.zeros(1, hidden, dtype=torch.float64, device=device)
        if end < time:
            state = h[:, end - 1].clone().requires_grad_()
            with backend(name):
                rest = ops.light_gru(inputs[:, end:], u, state, **options)
            (carried,) = torch.autograd.grad(rest, state, upstream[:, end:])
        piece = inputs[:, begin:end].double().requires_grad_()
        expected = reference.light_gru(piece, u.double(), h[:, begin - 1].double(), **options)
        given = upstream[:, begin:end].double()
        given[:, -1] += carried
        (expected_gradient,) = torch.autograd.grad(expected, piece, given)
        for actual, loop in ((h, expected), (gradient, expected_gradient)):
            actual = actual[:, begin:end].double()
            assert (actual - loop).norm() <= bound * loop.norm(), begin


def test_200_000_steps():
    assert_long_sequence("cpu", "cpu", torch.float64, 1e-10)


# ---- on a GPU

# Beside and between the sizes that the kernels pad to, and some that only "stepwise" takes.
GPU_HIDDEN = [3, 12, 16, 24, 64, 72, 120, 128, 136, 256, 264, 392, 512, 520, 776, 1024, 1032]
GPU_SIZES = {"hidden_sizes": GPU_HIDDEN, "most_rows": 40}


@pytest.mark.gpu
@pytest.mark.slow
def test_float64_on_a_gpu(capsys):
    for random in draw_cases(capsys, "operator, float64 on a GPU", 1000):
        assert_float64_layer(random, "stepwise", "cuda", **GPU_SIZES)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("precision", LOW_PRECISIONS, ids=LOW_PRECISION_NAMES)
@pytest.mark.parametrize("name", ["auto", "stepwise"])
def test_low_precision_on_a_gpu(capsys, name, precision):
    randoms = draw_cases(capsys, f"operator, 16-bit and float32 on a GPU, {name}", 200)
    assert_low_precision_layers(randoms, 2, precision, name, "cuda", **GPU_SIZES)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("only_nan", [True, False], ids=["NaN", "NaN-Inf"])
def test_not_finite_on_a_gpu(capsys, only_nan):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for random in draw_cases(capsys, "operator, not finite on a GPU", 1500):
        dtype = random.choice(dtypes)
        assert_spoiled_layer(random, "auto", "cuda", dtype, only_nan, **GPU_SIZES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["stepwise", "persistent"])
def test_memory_of_a_gpu_does_not_grow(dtype):
    wx = torch.randn(4, 20, 128, dtype=dtype, device="cuda", requires_grad=True)
    u = torch.randn(128, 64, dtype=dtype, device="cuda", requires_grad=True)
    allocated = []
    for _ in range(2000):
        h = ops.light_gru(wx, u, layer_norm=True)
        torch.autograd.grad(h.mul_(2).sum(), [wx, u])
        allocated.append(torch.cuda.memory_allocated())
    # The least of many: autograd's thread may still hold what it has used when its result is there.
    assert min(allocated[-100:]) <= min(allocated[10:110])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype, bound",
    [
        ("stepwise", torch.float64, 1e-10),
        ("persistent", torch.float32, 1e-4),
        ("persistent", torch.bfloat16, 0.1),
    ],
)
def test_200_000_steps_on_a_gpu(name, dtype, bound):
    assert_long_sequence(name, "cuda", dtype, bound)
