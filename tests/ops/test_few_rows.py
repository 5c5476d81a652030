"""Linear layers of few rows against float64 and PyTorch's. Runs without SpeechBrain."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sb_fast_sligru import _library, backend
from sb_fast_sligru.ops import _backends, _few_rows, few_rows_linear

operator = torch.ops.sb_fast_sligru.few_rows_linear


@pytest.fixture(autouse=True)
def small_layers(monkeypatch):
    """They run the operator too, on every processor."""
    monkeypatch.setattr(_few_rows, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(_few_rows, "_has_wide_vectors", lambda: True)


def make(n, k, m, bias=True, **options):
    x, weight = torch.randn(n, k, **options), torch.randn(m, k, **options)
    return x, weight, torch.randn(m, **options) if bias else None


def exact(x, weight, bias):
    return F.linear(*(None if t is None else t.double() for t in (x, weight, bias)))


class Operators(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def uses_the_operator(*arguments):
    with Operators() as seen:
        few_rows_linear(*arguments)
    return "sb_fast_sligru::few_rows_linear" in seen.names


@pytest.fixture
def threads():
    """Sets their number; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- values


@pytest.mark.parametrize("n", [*range(1, 10), 15, 16, 17, 31, 40])
def test_against_float64(n):
    for k in (1, 7, 8, 15, 16, 17, 33, 100, 1023, 1024, 1025, 2050):
        for m in (1, 2, 3, 5, 6, 7, 12, 31):
            for bias in (True, False):
                arguments = make(n, k, m, bias)
                error = (operator(*arguments) - exact(*arguments)).abs().max().item()
                assert error <= 3e-6 * math.sqrt(k) + 1e-6, (k, m, bias)


@pytest.mark.parametrize("k", [64, 1024, 2048, 5000])
@pytest.mark.parametrize("n", [1, 2, 8, 30])
def test_error_is_no_larger_than_pytorchs(n, k):
    arguments = make(n, k, 512)
    expected = exact(*arguments)
    ours, theirs = (
        (function(*arguments) - expected).abs().mean().item() for function in (operator, F.linear)
    )
    assert ours <= 1.02 * theirs


def test_same_bits_with_any_number_of_threads_and_other_rows(threads):
    x, weight, bias = make(13, 700, 1030)
    threads(1)
    expected = operator(x, weight, bias)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(operator(x, weight, bias), expected)
        for rows in (1, 2, 3, 6, 8):
            assert torch.equal(operator(x[:rows], weight, bias), expected[:rows])
            assert torch.equal(operator(x[-rows:], weight, bias), expected[-rows:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", [5, 16, 37])
def test_what_is_not_finite_reaches_its_row_and_nothing_else(value, k):
    for column in (0, k - 1):
        x, weight, bias = make(7, k, 11)
        x[2, column] = value
        out = operator(x, weight, bias)
        torch.testing.assert_close(out, F.linear(x, weight, bias), equal_nan=True)
        assert out.isfinite().all(1).tolist() == [row != 2 for row in range(7)]
        x, weight, bias = make(7, k, 11)
        weight[9, column] = value
        out = operator(x, weight, bias)
        torch.testing.assert_close(out, F.linear(x, weight, bias), equal_nan=True)
        assert out.isfinite().all(0).tolist() == [output != 9 for output in range(11)]


@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (5, 0, 9)])
@pytest.mark.parametrize("bias", [True, False])
def test_empty_sizes(sizes, bias):
    arguments = make(*sizes, bias)
    for function in (operator, few_rows_linear):
        assert torch.equal(function(*arguments), F.linear(*arguments))


def test_any_strides():
    x, weight, bias = make(6, 40, 9)
    expected = operator(x, weight, bias)
    wide = torch.full((6, 100), math.nan)
    wide[:, 30:70] = x
    assert torch.equal(operator(wide[:, 30:70], weight, bias), expected)
    assert torch.equal(operator(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(operator(x, weight.t().contiguous().t(), bias), expected)
    assert torch.equal(operator(x, weight, bias.repeat_interleave(2)[::2]), expected)
    same = x[:1].expand(6, -1)
    assert torch.equal(operator(same, weight, bias), expected[:1].expand(6, -1))


# ---- where it runs


def test_choice(monkeypatch):
    arguments = x, weight, bias = make(8, 20, 30)
    assert uses_the_operator(*arguments) and uses_the_operator(x, weight)
    assert uses_the_operator(x[:1], weight)
    many = torch.randn(_few_rows.MAX_ROWS + 1, 20)
    assert uses_the_operator(many[1:], weight) and not uses_the_operator(many, weight)
    assert not uses_the_operator(x[:0], weight)
    assert not uses_the_operator(*(t.double() for t in arguments))
    assert not uses_the_operator(*(t.bfloat16() for t in arguments))
    assert not uses_the_operator(x, weight.t().contiguous().t())
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_the_operator(*arguments)
        assert few_rows_linear(*arguments).dtype == torch.bfloat16
        assert not uses_the_operator(x.bfloat16(), weight, bias)
    with backend("reference"):
        assert not uses_the_operator(*arguments)
    with backend("stepwise"), pytest.raises(RuntimeError, match="does not serve cpu tensors"):
        few_rows_linear(*arguments)
    assert few_rows_linear(*(t.to("meta") for t in arguments)).shape == (8, 30)
    monkeypatch.setattr(_few_rows, "MIN_WEIGHTS", 601)
    assert not uses_the_operator(*arguments)


def test_not_without_wide_vectors(monkeypatch):
    arguments = make(8, 20, 30)
    monkeypatch.undo()
    monkeypatch.setattr(_few_rows, "MIN_WEIGHTS", 0)
    for name, expected in (("DEFAULT", False), ("AVX2", True), ("AVX512", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        assert uses_the_operator(*arguments) == expected


def test_gradients_are_pytorchs():
    for which in range(3):
        arguments = make(4, 20, 30)
        arguments[which].requires_grad_()
        assert not uses_the_operator(*arguments)
        few_rows_linear(*arguments).sum().backward()
        assert arguments[which].grad is not None
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert uses_the_operator(*arguments)
                assert not few_rows_linear(*arguments).requires_grad
    x, weight, bias = make(4, 20, 30)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        out = few_rows_linear(forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, tangent @ weight.t())
    gradient = torch.func.grad(lambda x: few_rows_linear(x, weight, bias).sum())(x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(4, -1))
    arguments = make(4, 20, 30, requires_grad=True)
    with pytest.raises(RuntimeError, match="few_rows_linear has no gradient"):
        operator(*arguments).sum().backward()


def test_who_looks_at_torch_functions_sees_pytorchs():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Other(torch.Tensor):
        pass

    x, weight, bias = make(4, 20, 30)
    with Mode():
        few_rows_linear(x, weight, bias)
    assert F.linear in seen
    assert type(few_rows_linear(x.as_subclass(Other), weight, bias)) is Other
    assert uses_the_operator(x, torch.nn.Parameter(weight, requires_grad=False), bias)


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    arguments = make(4, 20, 30)
    with pytest.warns(UserWarning, match="PyTorch's linear layers.*not built, says this test"):
        out = few_rows_linear(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(few_rows_linear(*arguments), out)
    assert torch.equal(out, F.linear(*arguments))
    with backend("cpu"), pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it'):
        few_rows_linear(*arguments)


# ---- the dispatcher


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(n, bias):
    torch.library.opcheck(operator, make(n, 20, 30, bias))


def test_compiles_in_one_graph_for_any_number_of_rows():
    torch._dynamo.reset()
    calls = []

    def run(module, inputs):
        has_operator = "few_rows_linear" in str([node.target for node in module.graph.nodes])

        def call(*args):
            calls.append(has_operator)
            return module(*args)

        return call

    compiled = torch.compile(few_rows_linear, fullgraph=True, dynamic=True, backend=run)
    x, weight, bias = make(50, 20, 30)
    with torch.no_grad():
        for rows in (3, 8, 1, 50, 20):
            out = compiled(x[:rows], weight, bias)
            assert torch.equal(out, few_rows_linear(x[:rows], weight, bias))
            assert calls.pop() == (rows != 50)
    aot = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(aot(x[:8], weight, bias), few_rows_linear(x[:8], weight, bias))


# ---- arguments

GOOD = {"x": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
BAD_ARGUMENTS = {
    "list": ({"x": [[0.0]]}, r"x: got list, expected a torch.Tensor"),
    "no-weight": ({"weight": None}, r"weight: got NoneType, expected a torch.Tensor"),
    "number": ({"bias": 1.0}, r"bias: got float, expected a torch.Tensor"),
    "vector": ({"x": torch.zeros(4)}, r"x: got shape \(4,\), expected \[N, K\]"),
    "frames": ({"x": torch.zeros(1, 2, 4)}, r"x: got shape \(1, 2, 4\), expected \[N, K\]"),
    "depth": ({"weight": torch.zeros(4, 3)}, r"weight: got shape \(4, 3\), expected \[M, 4\]"),
    "rank": ({"weight": torch.zeros(4)}, r"weight: got shape \(4,\), expected \[M, 4\]"),
    "bias": ({"bias": torch.zeros(4)}, r"bias: got shape \(4,\), expected \[3\]"),
    "scalar": ({"bias": torch.zeros(())}, r"bias: got shape \(\), expected \[3\]"),
    "mixed": ({"weight": torch.zeros(3, 4).double()}, r"weight: got torch.float64, expected .*32"),
    "bias-half": ({"bias": torch.zeros(3).half()}, r"bias: got torch.float16, expected .*float32"),
    "device": ({"bias": torch.zeros(3, device="meta")}, r"bias: got device meta, expected cpu"),
}


@pytest.mark.parametrize("changed, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        few_rows_linear(**(GOOD | changed))


BAD_FOR_THE_OPERATOR = {
    "x-double": ({"x": torch.zeros(2, 4).double()}, r"x: got Double \[2, 4\], expected Float"),
    "x-rank": ({"x": torch.zeros(4)}, r"x: got Float \[4\], expected Float \[N, K\]"),
    "weight": ({"weight": torch.zeros(4, 3)}, r"weight: got Float \[4, 3\], expected Float \[4, 4"),
    "weight-rank": ({"weight": torch.zeros(4)}, r"weight: got Float \[4\], expected \[M, K\]"),
    "bias": ({"bias": torch.zeros(2)}, r"bias: got Float \[2\], expected Float \[3\]"),
    "bias-half": ({"bias": torch.zeros(3).half()}, r"bias: got Half \[3\], expected Float \[3\]"),
}


@pytest.mark.parametrize(
    "changed, message", BAD_FOR_THE_OPERATOR.values(), ids=BAD_FOR_THE_OPERATOR
)
def test_bad_arguments_of_the_operator(changed, message):
    with pytest.raises(RuntimeError, match=message):
        operator(**(GOOD | changed))
