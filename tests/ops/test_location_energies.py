"""Energies of location-aware attention against the equation. Runs without SpeechBrain."""

import warnings

import pytest
import torch

from sb_fast_sligru import _library, backend, info, ops, reference
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small

# B, hypotheses of an utterance, T, A, G, taps.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 3, 9, 5, 2, 3),
    (2, 2, 64, 33, 3, 201),  # more taps than frames
    (3, 4, 65, 20, 10, 5),
    (2, 3, 130, 300, 4, 41),  # several chunks of frames and of units
    (24, 1, 20, 16, 10, 7),
]
ON_GPU = [
    (1, 1, 1, 32, 16, 1),
    (2, 3, 33, 64, 16, 5),
    (1, 8, 375, 1024, 16, 201),
    (3, 17, 100, 320, 16, 77),  # groups of hypotheses
    (2, 80, 50, 96, 16, 495),
]
NAMES = ("query", "last", "keys", "filters", "w_location", "v")
WIDE = ("query", "last", "filters", "v")


def make_arguments(shape, dtype=torch.float64, device="cpu"):
    """float64 is what the numbers are; another dtype is theirs, rounded."""
    B, beam, T, A, G, taps = shape
    N = B * beam
    arguments = {
        "query": torch.randn(N, A, dtype=torch.float64),
        "last": torch.rand(N, T, dtype=torch.float64),
        "keys": torch.randn(B, T, A, dtype=torch.float64),
        "filters": torch.randn(G, taps, dtype=torch.float64) / taps**0.5,
        "w_location": torch.randn(A, G, dtype=torch.float64),
        "v": torch.randn(A, dtype=torch.float64),
    }
    return cast(arguments, dtype, device)


def cast(arguments, dtype, device="cpu"):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        name: tensor.to(device, wide if name in WIDE else dtype)
        for name, tensor in arguments.items()
    }


def equation(query, last, keys, filters, w_location, v):
    """A frame and a hypothesis at a time."""
    B, T, _ = keys.shape
    beam, K = len(query) // B, filters.shape[1] // 2
    energies = torch.empty_like(last)
    for n in range(len(query)):
        padded = torch.nn.functional.pad(last[n], (K, K))
        for t in range(T):
            f = filters @ padded[t : t + 2 * K + 1]
            energies[n, t] = v @ torch.tanh(keys[n // beam, t] + query[n] + w_location @ f)
    return energies


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
each_on_gpu = pytest.mark.parametrize("shape", ON_GPU, ids=lambda s: "-".join(map(str, s)))


@each_shape
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_matches_the_equation(shape, name):
    arguments = make_arguments(shape)
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        energies = ops.location_energies(**arguments)
    assert relative_error(energies, equation(**arguments)) < 1e-14


def test_reference_in_parts(monkeypatch):
    arguments = make_arguments((2, 3, 10, 8, 2, 3))
    whole = reference.location_energies(**arguments)
    for most in (1, 200):
        monkeypatch.setattr(reference._location_energies, "MAX_VALUES", most)
        assert relative_error(reference.location_energies(**arguments), whole) < 1e-15


def assert_no_worse(arguments, dtype, device):
    """The error of a run in this dtype, and that of plain PyTorch, against float64's."""
    given = cast(arguments, dtype, device)
    exact = reference.location_energies(**cast(given, torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = relative_error(ops.location_energies(**given).cpu(), exact)
    with backend("reference"):
        theirs = relative_error(ops.location_energies(**given).cpu(), exact)
    # In 16 bits the location features and tanh have their digits too, in plain PyTorch float32's.
    allowed = 1.5 * theirs + (1e-7 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert ours <= allowed, f"error {ours:.1e}, plain PyTorch {theirs:.1e}"


@each_shape
def test_error_is_no_worse_than_pytorchs(shape):
    assert_no_worse(make_arguments(shape), torch.float32, "cpu")


@pytest.mark.gpu
@each_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_on_a_gpu_is_no_worse_than_pytorchs(shape, dtype):
    assert_no_worse(make_arguments(shape), dtype, "cuda")


def test_large_and_small_arguments():
    """tanh at its ends, and where it keeps a small argument's digits."""
    arguments = make_arguments((1, 2, 7, 40, 2, 3))
    for factor in (1e-6, 1e-3, 30.0, 1e4):
        scaled = arguments | {
            name: factor * arguments[name] for name in ("query", "keys", "w_location")
        }
        assert_no_worse(scaled, torch.float32, "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_not_a_number_stays_where_it_is(device):
    """NaN, and infinity times 0, reach the hypotheses that they belong to and no other."""
    arguments = make_arguments((2, 2, 40, 32, 16, 3), torch.float32, device)
    expected = ops.location_energies(**arguments)
    for value in (torch.nan, torch.inf):
        for name, index, rows in (("query", (1, 3), [1]), ("keys", (1, 5, 2), [2, 3])):
            changed = arguments | {name: arguments[name].clone()}
            changed[name][index] = value
            found = ops.location_energies(**changed)
            with backend("reference"):
                theirs = ops.location_energies(**changed)
            assert torch.equal(found.isnan(), theirs.isnan())
            others = [n for n in range(4) if n not in rows]
            assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_whatever_the_threads(threads):
    arguments = make_arguments((2, 3, 300, 200, 4, 5), torch.float32)
    expected = ops.location_energies(**arguments)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.location_energies(**arguments), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(0, 1, 5, 4, 2, 3), (2, 3, 0, 4, 2, 3), (2, 0, 5, 4, 2, 3)])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_nothing_gives_nothing(shape, name):
    with backend(name):
        energies = ops.location_energies(**make_arguments(shape))
    assert energies.shape == (shape[0] * shape[1], shape[2])


def test_not_contiguous():
    arguments = make_arguments((2, 3, 10, 8, 2, 3))
    expected = ops.location_energies(**arguments)
    for name, tensor in arguments.items():
        spread = torch.stack([tensor, tensor], -1)[..., 0]
        assert torch.equal(ops.location_energies(**arguments | {name: spread}), expected)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.sb_fast_sligru.location_energies.default,
        tuple(make_arguments((2, 3, 10, 8, 2, 3)).values()),
    )


def test_torch_compile():
    compiled = torch.compile(ops.location_energies, fullgraph=True)
    for shape in ((2, 3, 10, 8, 2, 3), (2, 3, 12, 8, 2, 3), (2, 3, 15, 8, 2, 3)):
        arguments = make_arguments(shape, torch.float32)
        assert torch.equal(compiled(**arguments), ops.location_energies(**arguments))


# ---- bad arguments


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"keys": torch.zeros(5, 4)}, r"keys: got shape \(5, 4\), expected \[B, T, A\]"),
        ({"keys": [1]}, r"keys: got list, expected a torch.Tensor"),
        ({"keys": torch.zeros(2, 5, 4).int()}, r"keys: got torch.int32, expected a floating"),
        ({"query": torch.zeros(3, 4)}, r"query: got shape \(3, 4\), .*N a multiple of 2"),
        ({"query": torch.zeros(4, 3)}, r"query: got shape \(4, 3\), expected \[4, 4\]"),
        (
            {"query": torch.zeros(4, 4).double()},
            r"query: got torch.float64, expected torch.float32",
        ),
        ({"last": torch.zeros(4, 6)}, r"last: got shape \(4, 6\), expected \[4, 5\]"),
        ({"filters": torch.zeros(2, 4)}, r"filters: got shape \(2, 4\), .*W odd"),
        ({"w_location": torch.zeros(2, 4)}, r"w_location: got shape \(2, 4\), expected \[4, 2\]"),
        ({"w_location": torch.zeros(4, 2).half()}, r"w_location: got torch.float16, expected"),
        ({"v": torch.zeros(4, 1)}, r"v: got shape \(4, 1\), expected \[4\]"),
        ({"v": torch.zeros(4, device="meta")}, r"v: got device meta, expected cpu"),
        ({"v": torch.zeros(4, requires_grad=True)}, r"v: requires a gradient"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = make_arguments((2, 2, 5, 4, 2, 3), torch.float32) | changed
    with pytest.raises(ValueError, match=message):
        ops.location_energies(**arguments)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"keys": torch.zeros(5, 4)}, r"keys: got Float \[5, 4\], expected \[B, T, A\]"),
        ({"keys": torch.zeros(2, 5, 4).half()}, r"w_location: got Float"),
        ({"query": torch.zeros(3, 4)}, r"query: got Float \[3, 4\], .*N a multiple of 2"),
        ({"last": torch.zeros(4, 6)}, r"last: got Float \[4, 6\], expected Float \[4, 5\]"),
        ({"filters": torch.zeros(2, 4)}, r"filters: got Float \[2, 4\], .*W odd"),
        ({"v": torch.zeros(4).half()}, r"v: got Half \[4\], expected Float \[4\]"),
    ],
)
def test_the_operator_itself_checks_its_arguments(changed, message):
    arguments = make_arguments((2, 2, 5, 4, 2, 3), torch.float32) | changed
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.location_energies(*(arguments[name] for name in NAMES))


def test_there_is_no_gradient():
    arguments = make_arguments((2, 2, 5, 4, 2, 3), torch.float32)
    arguments["v"].requires_grad_()
    energies = torch.ops.sb_fast_sligru.location_energies(*(arguments[name] for name in NAMES))
    with pytest.raises(RuntimeError, match="attention energies have no gradient"):
        energies.sum().backward()


# ---- choice of backend


def test_backend_choice(monkeypatch):
    def choose(device, dtype=torch.float32, sizes=(64, 16, 201)):
        return ops.choose_location_energies_backend(device, dtype, *sizes)

    assert choose("cpu") == choose("cpu", torch.float64) == ("cpu", "the fastest")
    name, why = choose("cpu", torch.bfloat16)
    assert name == "reference" and "do not take bfloat16 on a CPU" in why
    assert choose("meta")[0] == "reference"

    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    properties = _backends.Gpu(75, False, False, False, 65536, 40, 0, 0, 0)
    energies = ops._location_energies
    monkeypatch.setattr(energies, "gpu", lambda index: properties)
    name, why = choose("cuda:0")
    assert name == "reference" and "need compute capability 8.0" in why
    monkeypatch.setattr(energies, "gpu", lambda index: properties._replace(has_tensor_code=True))
    assert choose("cuda:0") == choose("cuda:0", torch.float16) == ("cuda", "the fastest")
    for sizes in ((65, 16, 3), (64, 15, 3), (64, 16, 497)):
        name, why = choose("cuda:0", sizes=sizes)
        assert name == "reference" and "not {}, {} and {}".format(*sizes) in why
    name, why = choose("cuda:0", torch.float64)
    assert name == "reference" and "do not take float64 on a GPU" in why


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    arguments = make_arguments((2, 3, 10, 8, 2, 3))
    expected = ops.location_energies(**arguments)
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    with pytest.warns(UserWarning, match="plain PyTorch.*not built, says this test"):
        energies = ops.location_energies(**arguments)
    assert relative_error(energies, expected) < 1e-15
    with backend("cpu"), pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it'):
        ops.location_energies(**arguments)


# ---- CUDA


@pytest.mark.gpu
@each_on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(shape, dtype):
    arguments = make_arguments(shape, dtype, "cuda")
    expected = ops.location_energies(**arguments)
    for _ in range(5):
        assert torch.equal(ops.location_energies(**arguments), expected)


@pytest.mark.gpu
def test_cuda_graph_replays_a_step():
    """So nothing waits for the GPU, and the memory is torch's."""
    arguments = make_arguments(ON_GPU[1], torch.float32, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.location_energies(**arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.location_energies(**arguments)
    arguments["query"].normal_()
    graph.replay()
    assert torch.equal(captured, ops.location_energies(**arguments))


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    arguments = make_arguments(ON_GPU[1], torch.float32, "cuda")
    expected = ops.location_energies(**arguments)
    value = arguments["query"].clone()
    arguments["query"].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        arguments["query"].copy_(value)
        energies = ops.location_energies(**arguments)
    torch.cuda.synchronize()
    assert torch.equal(energies, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    """The keys have more than 2 ** 31 elements; the last utterance's energies must be its own."""
    batch, frames, units = 2100, 1000, 1024
    assert batch * frames * units > 2**31
    small = make_arguments((1, 1, frames, units, 16, 3), torch.bfloat16, "cuda")
    large = small | {
        name: small[name].expand(batch, *small[name].shape[1:])
        for name in ("query", "last", "keys")
    }
    assert torch.equal(ops.location_energies(**large)[-1], ops.location_energies(**small)[0])


def test_info_tells_the_backend():
    line = "Backend for attention energies of a search:\n  cpu                cpu (the fastest)"
    assert line in "\n".join(info.report())
