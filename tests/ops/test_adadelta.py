"""Adadelta's update of many tensors against the equations. Runs without SpeechBrain."""

import warnings

import pytest
import torch

from sb_fast_sligru import _library, backend, info, ops, reference
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
# More tensors than a launch of the CUDA kernel has, and more numbers than a block.
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (4097,), (5, 33, 2), (40, 411), *[(11, 3)] * 100]
LISTS = ("params", "grads", "square_avgs", "acc_deltas")
OPTIONS = {"lr": 0.7, "rho": 0.95, "eps": 1e-8}
EACH_OPTION = [
    OPTIONS,
    OPTIONS | {"weight_decay": 0.1},
    OPTIONS | {"maximize": True},
    {"lr": 1.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.2, "maximize": True},
    OPTIONS | {"rho": 1.0},
]


def make_arguments(shapes, device="cpu", dtype=torch.float32):
    """Lists of tensors by their names, averages above 0."""
    draw = {name: torch.rand if name in LISTS[2:] else torch.randn for name in LISTS}
    return {name: [draw[name](shape, dtype=dtype).to(device) for shape in shapes] for name in LISTS}


def copy(arguments, device=None, dtype=None):
    return {
        name: [t.clone().to(device or t.device, dtype or t.dtype) for t in tensors]
        for name, tensors in arguments.items()
    }


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).cpu()


def assert_equal(first, second):
    for name in LISTS:
        for one, other in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def run(arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.adadelta_(**arguments, **options) is None


@on_each_device
@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_error_is_no_worse_than_pytorchs(device, options):
    """After three updates, of all that is changed."""
    ours = make_arguments(SHAPES, device)
    theirs, exact = copy(ours), copy(ours, "cpu", torch.float64)
    before = flat(exact["params"])
    for _ in range(3):
        run(ours, **options)
        for arguments in (theirs, exact):
            reference.adadelta_(**arguments, **options)
    for name in ("params", "square_avgs", "acc_deltas"):
        error, allowed = (
            relative_error(flat(arguments[name]), flat(exact[name])) for arguments in (ours, theirs)
        )
        assert error <= 1.1 * allowed, name
    moved = flat(exact["params"]) - before
    assert moved.norm() > 0.1
    assert relative_error(flat(ours["params"]) - before, moved) < 1e-6


@on_each_device
def test_gradients_are_left_alone(device):
    arguments = make_arguments(SHAPES, device)
    before = copy(arguments)
    run(arguments, **OPTIONS, weight_decay=0.1, maximize=True)
    assert torch.equal(flat(arguments["grads"]), flat(before["grads"]))


def test_reference_in_float64_is_pytorchs():
    for options in EACH_OPTION:
        arguments = make_arguments([(5,), (2, 3)], dtype=torch.float64)
        params = [p.clone() for p in arguments["params"]]
        optimizer = torch.optim.Adadelta(params, foreach=False, **options)
        for i, param in enumerate(params):
            param.grad = arguments["grads"][i]
            names = {"square_avg": "square_avgs", "acc_delta": "acc_deltas"}
            optimizer.state[param] = {
                key: arguments[name][i].clone() for key, name in names.items()
            }
            optimizer.state[param]["step"] = torch.zeros(())
        optimizer.step()
        reference.adadelta_(**arguments, **options)
        assert relative_error(flat(arguments["params"]), flat(params)) < 1e-15


@on_each_device
@pytest.mark.parametrize("options", [*EACH_OPTION, OPTIONS | {"eps": 0.0}], ids=str)
def test_what_is_not_finite_goes_where_pytorchs_does(device, options):
    """PyTorch's on a CPU: on a GPU a share of 0 of what overflows is NaN."""
    averages = torch.tensor([0.0, 1e-30, 1.0, 1e30, float("inf"), float("nan")])
    numbers = torch.cat([averages, -averages])
    grid = torch.cartesian_prod(numbers, numbers, averages, averages)
    theirs = {name: [grid[:, i].clone()] for i, name in enumerate(LISTS)}
    ours = {name: [tensors[0].to(device)] for name, tensors in copy(theirs).items()}
    run(ours, **options)
    reference.adadelta_(**theirs, **options)
    for name in LISTS:
        torch.testing.assert_close(
            ours[name][0].cpu(), theirs[name][0], rtol=1e-5, atol=0, equal_nan=True
        )


@on_each_device
def test_same_input_same_bits(device):
    arguments = make_arguments(SHAPES, device)
    expected = copy(arguments)
    run(expected, **OPTIONS)
    for _ in range(3):
        again = copy(arguments)
        run(again, **OPTIONS)
        assert_equal(again, expected)


def test_threads_change_no_bit():
    arguments = make_arguments([(100_003,), (7,)])
    expected, threads = copy(arguments), torch.get_num_threads()
    run(expected, **OPTIONS)
    torch.set_num_threads(3)
    try:
        run(arguments, **OPTIONS)
    finally:
        torch.set_num_threads(threads)
    assert_equal(arguments, expected)


@on_each_device
@pytest.mark.parametrize("name", LISTS)
def test_memory_at_any_address(device, name):
    """Not on 16 bytes, as the gradients of DistributedDataParallel can lie."""
    arguments = make_arguments([(4097,), (3,)], device)
    expected = copy(arguments)
    run(expected, **OPTIONS)
    for offset in (1, 2, 3):
        moved = copy(arguments)
        moved[name] = [torch.cat([t[:1].expand(offset), t])[offset:] for t in moved[name]]
        assert moved[name][0].data_ptr() % 16 == 4 * offset
        run(moved, **OPTIONS)
        assert_equal(moved, expected)


@on_each_device
def test_axes_in_another_order_of_memory(device):
    arguments = make_arguments([(4, 3, 5, 2)], device)
    expected = copy(arguments)
    run(expected, **OPTIONS)
    for order in ((0, 2, 3, 1), (3, 2, 1, 0)):
        back = sorted(range(4), key=order.__getitem__)
        other = {
            name: [t.permute(order).contiguous().permute(back) for t in tensors]
            for name, tensors in arguments.items()
        }
        assert not other["params"][0].is_contiguous()
        run(other, **OPTIONS)
        assert_equal(other, expected)


@on_each_device
def test_nothing_gives_nothing(device):
    ops.adadelta_([], [], [], [], **OPTIONS)
    run(make_arguments([(0,), (2, 0)], device), **OPTIONS)


def test_versions_tell_of_the_change():
    """So a backward pass that needs what was there before fails, as after PyTorch's updates."""
    arguments = make_arguments([(3,), (2, 2)])
    run(arguments, **OPTIONS)
    for name in LISTS:
        assert {t._version for t in arguments[name]} == {0 if name == "grads" else 1}
    x = torch.ones(3, requires_grad=True)
    loss = (x * x).sum()
    with torch.no_grad():
        ops.adadelta_([x], [torch.ones(3)], [torch.zeros(3)], [torch.zeros(3)], **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_within_inference_mode():
    arguments = make_arguments([(3,)])
    expected = copy(arguments)
    run(expected, **OPTIONS)
    with torch.inference_mode():
        inference = copy(arguments)
        run(inference, **OPTIONS)
        assert_equal(inference, expected)


def test_opcheck():
    for shapes in ([(3, 4), (5,)], [(0,)]):
        torch.library.opcheck(
            torch.ops.sb_fast_sligru.adadelta_.default,
            (*make_arguments(shapes).values(), 1.0, 0.9, 1e-6, 0.1, True),
        )


def test_torch_compile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(arguments):
        ops.adadelta_(**arguments, **OPTIONS)
        return arguments["params"][0] + 1

    for shapes in ([(3, 4), (5,)], [(7, 4), (5,)]):
        arguments = make_arguments(shapes)
        expected = copy(arguments)
        run(expected, **OPTIONS)
        assert torch.equal(update(arguments), expected["params"][0] + 1)
        assert_equal(arguments, expected)


# ---- bad arguments


def changed(name, tensor):
    """Arguments of which the second tensor of a list is another."""
    arguments = make_arguments([(3,), (4, 2)])
    arguments[name][1] = tensor
    return arguments


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("params", [1.0], r"params\[1\]: got list, expected a torch.Tensor"),
        ("grads", torch.ones(4, 2).as_subclass(Subclass), r"grads\[1\]: got Subclass, expected a"),
        ("grads", torch.ones(4, 2).to_sparse(), r"grads\[1\]: got torch.sparse_coo, expected"),
        ("params", torch.ones(4, 2).half(), r"params\[1\]: got torch.float16, expected torch.fl"),
        ("grads", torch.ones(4, 2).double(), r"grads\[1\]: got torch.float64, expected torch.fl"),
        ("square_avgs", torch.ones(4), r"square_avgs\[1\]: got shape \(4,\), expected \(4, 2\)"),
        ("acc_deltas", torch.ones(4, 2, device="meta"), r"acc_deltas\[1\]: got device meta, exp"),
        ("grads", torch.ones(2, 4).t(), r"grads\[1\]: got strides \(1, 4\), expected \(2, 1\)"),
        ("params", torch.ones(4, 3)[:, :2], r"params\[1\]: got strides \(3, 1\), expected no gaps"),
        ("params", torch.ones(4, 1).expand(4, 2), r"params\[1\]: got strides \(1, 0\), expected "),
        ("params", torch.ones(4, 2).requires_grad_(), r"params\[1\]: requires a gradient, and"),
    ],
)
def test_bad_tensors_are_named(name, tensor, message):
    with pytest.raises(ValueError, match=message):
        ops.adadelta_(**changed(name, tensor), **OPTIONS)


def test_other_bad_arguments_are_named():
    arguments = make_arguments([(3,), (4,)])
    with pytest.raises(ValueError, match="grads: got 1 tensors, expected 2, as many as params"):
        ops.adadelta_(**arguments | {"grads": arguments["grads"][:1]}, **OPTIONS)
    with pytest.raises(ValueError, match="lr: got Tensor, expected a number"):
        ops.adadelta_(**arguments, **OPTIONS | {"lr": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="params: got a tensor twice"):
        ops.adadelta_(**{name: tensors[:1] * 2 for name, tensors in arguments.items()}, **OPTIONS)
    with pytest.raises(ValueError, match=r"params\[0\]: got torch.float16, expected float32 or"):
        ops.adadelta_(**make_arguments([(3,)], dtype=torch.float16), **OPTIONS)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("params", torch.ones(4, 2).double(), r"params\[1\]: got Double \[4, 2\], expected Float"),
        ("grads", torch.ones(4, 2).half(), r"grads\[1\]: got Half \[4, 2\], expected Float"),
        ("square_avgs", torch.ones(4), r"square_avgs\[1\]: got Float \[4\], expected .*\[4, 2\]"),
        ("grads", torch.ones(2, 4).t(), r"grads\[1\]: expected memory without gaps, in the order"),
        ("params", torch.ones(4, 3)[:, :2], r"params\[1\]: expected memory without gaps"),
    ],
)
def test_the_operator_itself_checks_its_arguments(name, tensor, message):
    arguments = changed(name, tensor)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sb_fast_sligru.adadelta_(*arguments.values(), 1.0, 0.9, 1e-6, 0.0, False)
    arguments["grads"].pop()
    with pytest.raises(RuntimeError, match="grads: got 1 tensors, expected 2, as many as params"):
        torch.ops.sb_fast_sligru.adadelta_(*arguments.values(), 1.0, 0.9, 1e-6, 0.0, False)


# ---- choice of backend


def test_backend_choice(monkeypatch):
    choose = ops.choose_adadelta_backend
    assert choose("cpu") == ("cpu", "the fastest")
    assert choose("cpu", torch.float64)[0] == choose("meta")[0] == "reference"
    with backend("cpu"):
        assert choose("cpu") == ("cpu", "forced")
        with pytest.raises(RuntimeError, match="Adadelta's kernels do not take float64"):
            choose("cpu", torch.float64)
    monkeypatch.setattr(_library, "cuda_error", None)
    monkeypatch.setattr(_backends, "_query_missing_code", lambda device: "")
    assert choose("cuda:0") == ("cuda", "the fastest")
    name, why = choose("cuda:0", torch.float64)
    assert name == "reference" and "do not take float64" in why
    with backend("persistent"):
        assert choose("cuda:0") == ("persistent", "forced")


def test_a_missing_library_costs_speed_and_says_so_once(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    arguments = make_arguments([(50,)])
    expected = copy(arguments)
    run(expected, **OPTIONS)
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    with pytest.warns(UserWarning, match="plain PyTorch.*not built, says this test"):
        ops.adadelta_(**arguments, **OPTIONS)
    for name in LISTS:
        assert relative_error(flat(arguments[name]), flat(expected[name])) < 1e-6
    with backend("cpu"), pytest.raises(RuntimeError, match=r'backend\("cpu"\) is forced, but it'):
        ops.adadelta_(**arguments, **OPTIONS)


def test_info_tells_the_backend():
    line = "Backend for Adadelta:\n  cpu                cpu (the fastest)"
    assert line in "\n".join(info.report())


# ---- CUDA


@pytest.mark.gpu
def test_cuda_graph_replays_an_update():
    """So nothing waits for the GPU, and no memory is copied to it."""
    arguments = make_arguments(SHAPES, "cuda")
    expected = copy(arguments)
    run(copy(arguments), **OPTIONS)  # the first call loads the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(arguments, **OPTIONS)
    for _ in range(2):
        for ours, other in zip(arguments["grads"], expected["grads"], strict=True):
            other.copy_(ours.normal_())
        graph.replay()
        run(expected, **OPTIONS)
    assert_equal(arguments, expected)


@pytest.mark.gpu
def test_runs_on_the_callers_stream():
    """Work queued behind a long kernel on a side stream must wait for it."""
    arguments = make_arguments([(4097,), (5,)], "cuda")
    expected = copy(arguments)
    run(expected, **OPTIONS)
    value = arguments["grads"][0].clone()
    arguments["grads"][0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        arguments["grads"][0].copy_(value)
        run(arguments, **OPTIONS)
    torch.cuda.synchronize()
    assert_equal(arguments, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31():
    """The last numbers of a tensor of more than 2 ** 31, and the tensor after it."""
    small = make_arguments([(5000,)], "cuda")
    large = {
        name: [torch.ones(2**31 + 5000, device="cuda"), tensors[0].clone()]
        for name, tensors in small.items()
    }
    for name, (tensor, _) in large.items():
        tensor[-5000:] = small[name][0]
    run(small, **OPTIONS)
    run(large, **OPTIONS)
    for name, (tensor, after) in large.items():
        assert torch.equal(tensor[-5000:], small[name][0])
        assert torch.equal(after, small[name][0])
