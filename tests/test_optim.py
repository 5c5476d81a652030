"""`Adadelta` against PyTorch's. Runs without SpeechBrain."""

import copy
import pickle
import warnings
from unittest import mock

import pytest
import torch

import sb_fast_sligru
from sb_fast_sligru import _library, backend
from sb_fast_sligru.ops import _adadelta, _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small

on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
SHAPES = [(), (0,), (1,), (7,), (4097,), (3, 5, 3, 3), (41, 107)]
OPTIONS = {"rho": 0.95, "eps": 1e-8}
GROUPS = [{}, {"lr": 0.1, "weight_decay": 0.1}, {"maximize": True, "rho": 0.5, "eps": 1e-3}]


class Trained:
    """Parameters in three groups, updated by gradients that do not depend on them."""

    def __init__(self, optimizer_class, device="cpu", dtype=torch.float32, **options):
        draw = torch.Generator().manual_seed(1)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype))
            for _ in GROUPS
            for shape in SHAPES
        ]
        count = len(SHAPES)
        groups = [
            {"params": self.params[i * count : (i + 1) * count], **group}
            for i, group in enumerate(GROUPS)
        ]
        self.optimizer = optimizer_class(groups, **OPTIONS, **options)
        self.updates = 0

    def set_gradients(self):
        draw = torch.Generator().manual_seed(2 + self.updates)
        for i, param in enumerate(self.params):
            grad = torch.randn(param.shape, generator=draw)
            # Some have none, another each time.
            param.grad = None if (i + self.updates) % 5 == 0 else grad.to(param)

    def train(self, updates):
        for _ in range(updates):
            self.set_gradients()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                self.optimizer.step()
            self.updates += 1
        return self

    def values(self):
        """Name -> all numbers of that name, float64 on the host."""
        state = self.optimizer.state
        found = {"param": self.params}
        for name in ("square_avg", "acc_delta", "step"):
            found[name] = [state[p][name] for p in self.params if p in state]
        return {
            name: torch.cat([t.detach().flatten().cpu().double() for t in tensors])
            for name, tensors in found.items()
        }


def compiled_updates():
    """Counts the calls of the operator."""
    return mock.patch.object(_adadelta, "update", side_effect=_adadelta.update)


@on_each_device
def test_error_is_no_worse_than_pytorchs(device):
    with compiled_updates() as updates:
        ours = Trained(sb_fast_sligru.Adadelta, device).train(6).values()
    assert updates.call_count == 6 * len(GROUPS)
    theirs = Trained(torch.optim.Adadelta, device, foreach=False).train(6).values()
    exact = Trained(torch.optim.Adadelta, dtype=torch.float64, foreach=False).train(6).values()
    assert torch.equal(ours.pop("step"), exact["step"])
    for name, value in ours.items():
        allowed = 1.1 * relative_error(theirs[name], exact[name])
        assert relative_error(value, exact[name]) <= allowed < 1e-6, name


@on_each_device
def test_it_is_pytorchs(device):
    """Of its class, with the state on its devices."""
    ours, theirs = (
        Trained(c, device).train(2) for c in (sb_fast_sligru.Adadelta, torch.optim.Adadelta)
    )
    assert isinstance(ours.optimizer, torch.optim.Adadelta)
    assert ours.optimizer.defaults == theirs.optimizer.defaults
    for param, other in zip(ours.params, theirs.params, strict=True):
        state, expected = ours.optimizer.state[param], theirs.optimizer.state[other]
        assert list(state) == list(expected) == ["step", "square_avg", "acc_delta"]
        for name, value in state.items():
            assert value.device == expected[name].device and value.dtype == expected[name].dtype
            assert value.stride() == expected[name].stride()
        assert state["step"].is_cpu and param._version > 0


@on_each_device
@pytest.mark.parametrize("before, after", [(0, 1), (1, 0)], ids=["from ours", "to ours"])
def test_the_state_goes_on_in_the_other(device, before, after):
    classes = (sb_fast_sligru.Adadelta, torch.optim.Adadelta)
    expected = Trained(torch.optim.Adadelta, device).train(6).values()
    first = Trained(classes[before], device).train(3)
    second = Trained(classes[after], device)
    second.updates = 3
    for param, value in zip(second.params, first.params, strict=True):
        param.data.copy_(value.data)
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for name, value in second.train(3).values().items():
        assert relative_error(value, expected[name]) < 1e-6, name


def test_same_bits_after_a_stop():
    expected = Trained(sb_fast_sligru.Adadelta).train(4).values()
    first = Trained(sb_fast_sligru.Adadelta).train(2)
    second = pickle.loads(pickle.dumps(first)).train(2)
    assert all(torch.equal(value, expected[name]) for name, value in second.values().items())


def test_not_finite_as_pytorchs():
    values = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), 1e30])
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    for optimizer_class, param in zip(
        (sb_fast_sligru.Adadelta, torch.optim.Adadelta), params, strict=True
    ):
        optimizer = optimizer_class([param])
        for grad in (values, torch.ones(5)):
            param.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*params, equal_nan=True)


def test_closure_hooks_and_schedulers():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = sb_fast_sligru.Adadelta([param], lr=1.0)
    torch.optim.Adadelta([param])  # whose class is patched when it is first built
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *args: called.append("before"))
    optimizer.register_step_post_hook(lambda *args: called.append("after"))

    def closure():
        called.append("closure")
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    scheduler.step()
    assert called == ["before", "closure", "after"]
    assert (param < 1).all() and optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[param]["step"] == 1


@on_each_device
def test_axes_in_another_order_of_memory(device):
    weight = torch.randn(4, 3, 5, 2).to(device, memory_format=torch.channels_last)
    params = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
    with compiled_updates() as updates:
        for optimizer_class, param in zip(
            (sb_fast_sligru.Adadelta, torch.optim.Adadelta), params, strict=True
        ):
            param.grad = torch.ones_like(param)
            optimizer_class([param]).step()
    assert updates.call_count == 1 and params[0].stride() == weight.stride()
    torch.testing.assert_close(*params)


class Subclass(torch.Tensor):
    pass


def transposed(param):
    param.grad = torch.rand(5, 4).t().to(param)


def of_a_subclass(param):
    param.grad = torch.rand(4, 5).as_subclass(Subclass)


@pytest.mark.parametrize(
    "options, dtype, prepare",
    [
        ({"foreach": True}, torch.float32, None),
        ({"foreach": False}, torch.float32, None),
        ({"differentiable": True}, torch.float32, None),
        ({"lr": torch.tensor(0.5)}, torch.float32, None),
        ({}, torch.float64, None),
        ({}, torch.bfloat16, None),
        ({}, torch.complex64, None),
        ({}, torch.float32, transposed),
        ({}, torch.float32, of_a_subclass),
    ],
    ids=str,
)
def test_what_the_operator_cannot_serve_is_pytorchs(options, dtype, prepare):
    """Without a word: the results are the same, to the bit."""
    results = []
    with compiled_updates() as updates:
        for optimizer_class in (sb_fast_sligru.Adadelta, torch.optim.Adadelta):
            torch.manual_seed(5)
            param = torch.rand(4, 5, dtype=dtype)
            optimizer = optimizer_class([param], **options)
            for _ in range(2):
                param.grad = torch.rand(4, 5, dtype=dtype)
                if prepare:
                    prepare(param)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    optimizer.step()
            results.append(param.detach())
    assert not updates.called
    assert torch.equal(*results)


def test_sparse_gradients_are_refused_as_pytorch_does():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        sb_fast_sligru.Adadelta([param]).step()


def test_a_group_that_the_operator_cannot_serve_leaves_the_others_to_it():
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64)]
    optimizer = sb_fast_sligru.Adadelta([{"params": [param]} for param in params])
    for param in params:
        param.grad = torch.ones_like(param)
    with compiled_updates() as updates:
        optimizer.step()
    assert updates.call_count == 1
    torch.testing.assert_close(params[0].double(), params[1])
    assert [optimizer.state[param]["step"] for param in params] == [1, 1]


def test_nothing_to_update():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = sb_fast_sligru.Adadelta([param])
    optimizer.step()
    assert param not in optimizer.state and torch.equal(param, torch.ones(3))


def test_the_reference_and_a_missing_library_are_pytorchs(monkeypatch):
    expected = Trained(torch.optim.Adadelta).train(2).values()
    with compiled_updates() as updates, backend("reference"):
        forced = Trained(sb_fast_sligru.Adadelta).train(2).values()
    monkeypatch.setattr(_backends, "_warned", set())
    monkeypatch.setattr(_library, "cpu_error", "it is not built, says this test")
    missing = Trained(sb_fast_sligru.Adadelta)
    missing.set_gradients()
    with pytest.warns(UserWarning, match="PyTorch's Adadelta.*not built, says this test"):
        missing.optimizer.step()
    missing.updates = 1
    assert not updates.called
    for values in (forced, missing.train(1).values()):
        assert all(torch.equal(value, expected[name]) for name, value in values.items())


def test_torch_compile_has_pytorchs():
    """Inductor makes passes of its own; with the update outside of its graph there were none."""
    ours, theirs = Trained(sb_fast_sligru.Adadelta), Trained(torch.optim.Adadelta).train(2)
    step = torch.compile(ours.optimizer.step, backend="aot_eager")
    with compiled_updates() as updates:
        for _ in range(2):
            ours.set_gradients()
            step()
            ours.updates += 1
    assert not updates.called
    for name, value in ours.values().items():
        torch.testing.assert_close(value, theirs.values()[name], rtol=1e-5, atol=1e-7)


# ---- CUDA


@pytest.mark.gpu
def test_the_host_does_not_wait():
    trained = Trained(sb_fast_sligru.Adadelta, "cuda").train(2)
    trained.set_gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_device
def test_gradient_scaler(device):
    """fp16: gradients are scaled, and an update with an infinity is left out."""
    results = []
    for optimizer_class in (sb_fast_sligru.Adadelta, torch.optim.Adadelta):
        param = torch.nn.Parameter(torch.ones(5, device=device))
        optimizer = optimizer_class([param], lr=0.5)
        scaler = torch.amp.GradScaler(device, init_scale=8.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale((param * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[param]["step"] == 2 and scaler.get_scale() == 4.0
        results.append(param.detach())
    torch.testing.assert_close(*results)
    assert (results[0] < 1).all()


@pytest.mark.gpu
def test_a_capturable_group_is_pytorchs():
    param = torch.nn.Parameter(torch.ones(5, device="cuda"))
    optimizer = sb_fast_sligru.Adadelta([param], capturable=True)
    param.grad = torch.ones_like(param)
    with compiled_updates() as updates:
        optimizer.step()
    assert not updates.called and optimizer.state[param]["step"].is_cuda
    plain = sb_fast_sligru.Adadelta([param])
    with pytest.raises(RuntimeError, match="capturable is False"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            plain.step()
