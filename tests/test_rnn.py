"""The modules against SpeechBrain's own, under the same weights, masks and upstream gradients."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet import RNN as stock
from speechbrain.nnet.adapters import AdaptedModel, HoulsbyAdapterLinear, LoRA
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import sb_fast_sligru
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CELLS = ["SLiGRU", "LiGRU"]
BATCH, TIME, FEATURES, HIDDEN = 3, 7, 5, 6
NETWORKS = 20  # over which errors are averaged

# Option of the constructor -> arguments. NORM stands for what the cell calls the argument.
OPTIONS = {
    "defaults": {},
    "tanh": {"nonlinearity": "tanh"},
    "sin": {"nonlinearity": "sin"},
    "leaky_relu": {"nonlinearity": "leaky_relu"},
    "unknown-nonlinearity": {"nonlinearity": "gelu"},
    "layernorm": {"NORM": "layernorm"},
    "third-norm": {"NORM": "none"},
    "no-bias": {"bias": False},
    "no-bias-layernorm": {"bias": False, "NORM": "layernorm"},
    "affine": {"recurrent_elementwise_affine": True},
    "dropout": {"dropout": 0.3},
    "dropout-one": {"dropout": 1.0},
    "no-re_init": {"re_init": False},
    "three-layers": {"num_layers": 3},
    "affine-dropout-tanh-two-layers": {
        "recurrent_elementwise_affine": True,
        "dropout": 0.5,
        "nonlinearity": "tanh",
        "num_layers": 2,
    },
}
CASES = [
    pytest.param(cell, option, id=f"{cell}-{option}")
    for cell in CELLS
    for option, arguments in OPTIONS.items()
    if cell == "SLiGRU" or "recurrent_elementwise_affine" not in arguments
]

either_device = pytest.mark.parametrize("device", DEVICES)
either_cell = pytest.mark.parametrize("cell", CELLS)
either_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])


def arguments_of(cell, option):
    name = "ff_normalization" if cell == "SLiGRU" else "normalization"
    return {name if key == "NORM" else key: value for key, value in OPTIONS[option].items()}


def build_pair(cell, device="cpu", dtype=torch.float64, seed=0, shape=None, **arguments):
    """Build SpeechBrain's network and ours with equal weights, none of them left at a default.

    A fresh network hides errors: its BatchNorm statistics are 0 and 1, its affine maps identities.
    """
    torch.manual_seed(seed)
    arguments = {"hidden_size": HIDDEN, "input_shape": shape or (BATCH, TIME, FEATURES)} | arguments
    theirs = getattr(stock, cell)(**arguments)
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if "norm" in name and tensor.requires_grad or name.endswith("running_mean"):
                tensor.copy_(torch.randn_like(tensor) * 0.5 + name.endswith("weight"))
            elif name.endswith("running_var"):
                tensor.uniform_(0.3, 3.0)
    ours = getattr(sb_fast_sligru, cell)(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(device, dtype), ours.to(device, dtype)


def share_masks(theirs, ours, rows, seed=7):
    """Make each layer of both networks use the same dropout mask [rows, H], a fresh one a layer."""
    generator = torch.Generator().manual_seed(seed)
    for their_layer, our_layer in zip(theirs.rnn, ours.rnn, strict=True):
        p = our_layer.dropout
        keep = torch.full((rows, our_layer.hidden_size), 1 - p)
        mask = torch.bernoulli(keep, generator=generator)
        mask = (mask / (1 - p) if p < 1 else mask).to(their_layer.u.weight)
        # SpeechBrain reads rows from its table, if the batch has the size that it knows.
        their_layer.drop_masks, their_layer.drop_mask_cnt = mask.repeat(10, 1), 0
        their_layer.N_drop_masks, their_layer.batch_size = 10 * rows, rows
        our_layer._draw_drop_mask = partial(draw_drop_mask, our_layer, mask)


def draw_drop_mask(layer, mask, rows):
    return mask[:rows] if layer.training else None


def run(net, x, hx=None, seed=11):
    """Run `net` forwards and backwards; return every tensor that training could see."""
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    hx = None if hx is None else hx.detach().clone().requires_grad_()
    output, hh = net(x, hx=hx)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (output, hh)]
    torch.autograd.backward([output, hh], upstream)
    tensors = {"output": output, "hh": hh, "grad of x": x.grad}
    if hx is not None:
        tensors["grad of hx"] = hx.grad
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad of {name}"] = parameter.grad
    for name, buffer in net.named_buffers():
        if "norm" in name:
            tensors[name] = buffer
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual, expected, tolerance=1e-11):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        # Gradients that are zero in exact arithmetic (of a bias before a norm) are rounding alone.
        scale = max(float(torch.linalg.vector_norm(tensor.double())), 1e-3)
        error = float(torch.linalg.vector_norm(actual[name].double() - tensor.double())) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def random_input(device="cpu", dtype=torch.float64, shape=(BATCH, TIME, FEATURES), seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# Parity ---------------------------------------------------------------------------------------


@either_device
@either_direction
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cell, option", CASES)
def test_equals_speechbrain(cell, option, training, bidirectional, device):
    theirs, ours = build_pair(
        cell, device, bidirectional=bidirectional, **arguments_of(cell, option)
    )
    share_masks(theirs, ours, BATCH * (1 + bidirectional))
    theirs.train(training)
    ours.train(training)
    x = random_input(device)
    layers = len(ours.rnn)
    hx = random_input(device, shape=(layers * (1 + bidirectional), BATCH, HIDDEN), seed=5)
    assert_same(run(ours, x), run(theirs, x))
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@either_device
@either_direction
@either_cell
def test_equals_speechbrain_on_4d_input(cell, bidirectional, device):
    shape = (BATCH, TIME, 2, 4)
    theirs, ours = build_pair(cell, device, shape=shape, bidirectional=bidirectional)
    x = random_input(device, shape=shape)
    assert_same(run(ours, x), run(theirs, x))


@either_direction
@either_cell
@pytest.mark.parametrize(
    "batch, time",
    [(1, 1), (1, 2), (1, 9), (5, 1), (2, 4)],
    ids=["B1-T1", "B1-T2", "B1-T9", "B5-T1", "B2-T4"],
)
def test_other_sizes_than_those_of_construction(cell, bidirectional, batch, time):
    theirs, ours = build_pair(cell, num_layers=2, bidirectional=bidirectional)
    x = random_input(shape=(batch, time, FEATURES))
    if batch * time == 1 and not bidirectional:  # BatchNorm refuses a single row
        for net in (theirs, ours):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                net(x)
        theirs.eval()
        ours.eval()
    assert_same(run(ours, x), run(theirs, x))


@either_cell
@pytest.mark.parametrize("shape", [(2, 1, HIDDEN), (2, HIDDEN)], ids=["L1H", "LH"])
def test_initial_state_that_all_rows_share(cell, shape):
    theirs, ours = build_pair(cell, num_layers=2)
    x, hx = random_input(), random_input(shape=shape, seed=5)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@either_cell
def test_initial_state_of_another_batch_than_that_of_construction(cell):
    """SpeechBrain's bidirectional network takes one for the batch of its `input_shape` alone."""
    _, ours = build_pair(cell, num_layers=2, bidirectional=True)
    shape = (BATCH + 2, TIME, FEATURES)
    theirs, _ = build_pair(cell, num_layers=2, bidirectional=True, shape=shape)
    x, hx = random_input(shape=shape), random_input(shape=(4, BATCH + 2, HIDDEN), seed=5)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@either_direction
@either_cell
def test_frozen_norm_and_frozen_parameter(cell, bidirectional):
    theirs, ours = build_pair(cell, num_layers=2, bidirectional=bidirectional)
    for net in (theirs, ours):
        net.train()
        net.rnn[0].norm.eval()
        net.rnn[1].u.weight.requires_grad_(False)
        net.rnn[0].w.weight.requires_grad_(False)
    x = random_input()
    actual = run(ours, x)
    assert "grad of rnn.1.u.weight" not in actual
    assert_same(actual, run(theirs, x))


@either_device
@either_direction
@either_cell
def test_training_steps(cell, bidirectional, device):
    """Weights and BatchNorm statistics after steps with batches of changing size."""
    theirs, ours = build_pair(cell, device, num_layers=2, bidirectional=bidirectional)
    for net in (theirs, ours):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(5):
            x = random_input(device, shape=(1 + step, 2 + step, FEATURES), seed=step)
            output, _ = net(x)
            optimizer.zero_grad()
            output.pow(2).mean().backward()
            optimizer.step()
    keep = [name for name in ours.state_dict() if "drop_mask" not in name]
    assert_same(*({name: net.state_dict()[name] for name in keep} for net in (ours, theirs)), 1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_two_forwards_before_a_backward(cell):
    """Updating running_var must not invalidate what an earlier forward pass saved."""
    theirs, ours = build_pair(cell, bidirectional=True)
    gradients = []
    for net in (theirs, ours):
        (net(random_input())[0].sum() * net(random_input(seed=4))[0].sum()).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(gradients[1], gradients[0])


@either_device
@either_direction
@either_cell
@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": None},
        {"momentum": 0.5},
        {"momentum": 0.0},
        {"track_running_stats": False},
        {"momentum": None, "track_running_stats": False},
        {"affine": False, "momentum": None},
    ],
    ids=str,
)
def test_batch_norm_of_another_kind(cell, arguments, bidirectional, device):
    """A cumulative average of batches, none at all, and none from now on."""
    pair = build_pair(cell, device, bidirectional=bidirectional)
    for net in pair:
        net.rnn[0].norm = torch.nn.BatchNorm1d(2 * HIDDEN, **arguments).to(device, torch.float64)
    theirs, ours = pair
    for step, shape in enumerate([(1, 1, FEATURES), (3, 7, FEATURES), (2, 3, FEATURES)]):
        if step == 0 and not bidirectional:
            continue  # BatchNorm refuses a single row
        x = random_input(device, shape=shape, seed=step)
        assert_same(run(ours, x), run(theirs, x))
    for net in pair:
        net.rnn[0].norm.track_running_stats = False
    assert_same(run(ours, x), run(theirs, x))
    for net in pair:
        net.eval()
    assert_same(run(ours, x), run(theirs, x))


@either_direction
@either_cell
def test_update_bn(cell, bidirectional):
    """torch's own recomputation of the statistics, of weights that were averaged."""
    pair = build_pair(cell, bidirectional=bidirectional)
    batches = [random_input(shape=(2, 2 + n, FEATURES), seed=n) for n in range(4)]
    for net in pair:
        torch.optim.swa_utils.update_bn(batches, net)
    theirs, ours = pair
    x = random_input()
    assert_same(run(ours.eval(), x), run(theirs.eval(), x))


@either_device
@either_direction
@either_cell
def test_output_changed_in_place(cell, bidirectional, device):
    """SpeechBrain's output is a copy of what its loop saves."""
    pair = build_pair(cell, device, num_layers=2, bidirectional=bidirectional, nonlinearity="tanh")
    x = random_input(device)
    for change in (lambda y: y.mul_(2), lambda y: y.masked_fill_(y > 0.2, 0.0), torch.relu_):
        results = []
        for net in pair:
            hook = net.rnn[0].register_forward_hook(lambda _, inputs, y, change=change: change(y))
            last = net.register_forward_hook(
                lambda _, inputs, y, change=change: (change(y[0]), y[1])
            )
            results.append(run(net, x))
            hook.remove()
            last.remove()
        assert_same(results[1], results[0])


@either_direction
@either_cell
def test_forward_mode_and_torch_func(cell, bidirectional, warned):
    theirs, ours = build_pair(cell, bidirectional=bidirectional, num_layers=2, nonlinearity="tanh")
    x, tangent = random_input(), random_input(seed=4)
    results = []
    for net in (theirs, ours):
        net.eval().requires_grad_(False)
        results.append(
            {
                "jvp": torch.func.jvp(lambda x, net=net: net(x)[0], (x,), (tangent,))[1],
                "grad": torch.func.grad(lambda x, net=net: net(x)[0].square().sum())(x),
            }
        )
    assert_same(results[1], results[0])
    assert results[1]["jvp"].any() and len(warned) == 2


@either_direction
@either_cell
@pytest.mark.filterwarnings("ignore:sb_fast_sligru runs its slow PyTorch loop")
def test_torch_func_over_a_batch(cell, bidirectional):
    """vmap over inputs and over networks, and the gradients of each sample."""

    def output(parameters, x):
        return torch.func.functional_call(net, parameters, (x,))[0]

    def loss(parameters, x):
        return output(parameters, x).square().sum()

    x = random_input(shape=(4, BATCH, TIME, FEATURES))
    results = []
    for net in build_pair(cell, bidirectional=bidirectional, num_layers=2, nonlinearity="tanh"):
        net.eval()
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        stacked = {name: torch.stack([p, 0.9 * p]) for name, p in parameters.items()}
        vmap, grad = torch.vmap, torch.func.grad
        gradients = vmap(grad(loss), (None, 0))(parameters, x)
        results.append(
            {
                "inputs": vmap(output, (None, 0))(parameters, x),
                "networks": vmap(output, (0, None))(stacked, x[0]),
            }
            | {f"gradients of {name}": gradient for name, gradient in gradients.items()}
        )
    assert_same(results[1], results[0])


# Replaced parts --------------------------------------------------------------------------------


class LowRank(torch.nn.Linear):
    """A low-rank adapter as a subclass, which keeps `weight` and adds to what it computes."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.down = torch.nn.Parameter(torch.randn(2, linear.in_features))
        self.up = torch.nn.Parameter(torch.randn(linear.out_features, 2))

    def forward(self, h):
        return super().forward(h) + h @ self.down.t() @ self.up.t()


def with_bias(u):
    linear = torch.nn.Linear(u.in_features, u.out_features)
    linear.weight = u.weight
    return linear


def with_replaced_forward(u):
    u.forward = lambda h: torch.nn.functional.linear(h, 1.1 * u.weight)
    return u


def hooked(register, hook):
    def change(module):
        getattr(module, register)(hook)
        return module

    return change


def scaled_output(module, inputs, output):
    return 1.1 * output


def scaled_input(module, inputs):
    return (1.1 * inputs[0],)


def scaled_gradient(module, grad_inputs, grad_outputs):
    return tuple(g if g is None else 1.1 * g for g in grad_inputs)


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(u):
    parametrize.register_parametrization(u, "weight", Halved())
    return u


# Name of the part, how it is replaced.
REPLACED = {
    "u-subclass": ("u", LowRank),
    "u-bias": ("u", with_bias),
    "u-module": ("u", lambda u: torch.nn.Sequential(u, torch.nn.Dropout(0.0))),
    "u-adapter": ("u", partial(HoulsbyAdapterLinear, projection_size=3)),
    "u-forward": ("u", with_replaced_forward),
    "u-forward-hook": ("u", hooked("register_forward_hook", scaled_output)),
    "u-pre-hook": ("u", hooked("register_forward_pre_hook", scaled_input)),
    "u-backward-hook": ("u", hooked("register_full_backward_hook", scaled_gradient)),
    "u-old-spectral-norm": ("u", torch.nn.utils.spectral_norm),
    "u-pruned": ("u", partial(prune.l1_unstructured, name="weight", amount=0.3)),
    "act-module": ("act", lambda act: torch.nn.GELU()),
    "act-slope": ("act", lambda act: torch.nn.LeakyReLU(0.3)),
    "act-function": ("act", lambda act: torch.sigmoid),
    "act-hook": ("act", hooked("register_forward_hook", scaled_output)),
    "layer_norm-module": ("layer_norm", lambda norm: torch.nn.RMSNorm(2 * HIDDEN)),
    "layer_norm-none": ("layer_norm", lambda norm: torch.nn.Identity()),
    "layer_norm-hook": ("layer_norm", hooked("register_forward_hook", scaled_output)),
}
REPLACED_CASES = [
    pytest.param(cell, *replaced, id=f"{cell}-{name}")
    for name, replaced in REPLACED.items()
    for cell in CELLS
    if cell == "SLiGRU" or not name.startswith("layer_norm")
]


def replace_part(net, name, change):
    torch.manual_seed(3)
    for layer in net.rnn:
        if name == "act":  # a function takes the place of a module only so
            act = change(layer.act)
            del layer.act
            layer.act = act
        else:
            setattr(layer, name, change(getattr(layer, name)))
    net.double()


@pytest.fixture
def warned(monkeypatch):
    """The reasons for the slow loop, each of which is told once in a process."""
    reasons = set()
    monkeypatch.setattr(_backends, "_warned", reasons)
    return reasons


@either_direction
@pytest.mark.parametrize("cell, name, change", REPLACED_CASES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_replaced_part_is_called(cell, name, change, bidirectional, warned):
    """As SpeechBrain's loop calls it; in the second step the old spectral norm has moved on."""
    activation = "leaky_relu" if name == "act" else "tanh"
    pair = build_pair(
        cell, bidirectional=bidirectional, nonlinearity=activation, dropout=0.3, num_layers=2
    )
    share_masks(*pair, BATCH * (1 + bidirectional))
    for net in pair:
        replace_part(net, name, change)
    theirs, ours = pair
    x = random_input()
    hx = random_input(shape=(2 * (1 + bidirectional), BATCH, HIDDEN), seed=5)
    with pytest.warns(UserWarning, match=f"slow PyTorch loop.*{name} of a layer is"):
        assert_same(run(ours, x), run(theirs, x))
    for net in pair:
        for layer in net.rnn:
            if getattr(layer, "drop_masks", None) is not None:
                layer.drop_mask_cnt = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*slow PyTorch loop")
        assert_same(run(ours, x, hx), run(theirs, x, hx))
        for net in pair:
            net.eval()
        with sb_fast_sligru.backend("reference"):
            assert_same(run(ours, x), run(theirs, x))
    with sb_fast_sligru.backend("cpu"):
        with pytest.raises(RuntimeError, match=f'backend."cpu".* is forced, but {name} of a layer'):
            ours(x)
    with pytest.raises(ValueError, match=f"torch.jit.script: {name} of a layer is"):
        torch.jit.script(ours)


def pruned_for_good(u):
    return prune.remove(prune.l1_unstructured(u, "weight", amount=0.3), "weight")


@either_direction
@either_cell
@pytest.mark.parametrize(
    "name, change",
    [
        ("u", halved),
        ("u", parametrizations.weight_norm),
        ("u", pruned_for_good),
        ("w", halved),
        ("w", parametrizations.weight_norm),
        ("w", partial(prune.l1_unstructured, name="weight", amount=0.3)),
    ],
    ids=["u-halved", "u-weight_norm", "u-pruned", "w-halved", "w-weight_norm", "w-pruned"],
)
def test_what_changes_a_weight_alone_stays_with_the_kernels(cell, name, change, bidirectional):
    theirs, ours = build_pair(cell, bidirectional=bidirectional, num_layers=2)
    for net in (theirs, ours):
        replace_part(net, name, change)
    with sb_fast_sligru.backend("cpu"):
        for seed in range(3):
            results = [run(net, random_input(seed=seed)) for net in (ours, theirs)]
            # BatchNorm undoes a factor of w: the gradient of its norm is what rounding leaves.
            assert_same(*results, 1e-9)


@either_direction
@either_cell
@pytest.mark.parametrize(
    "adapter, arguments",
    [(LoRA, {"rank": 2}), (HoulsbyAdapterLinear, {"projection_size": 3})],
    ids=["LoRA", "Houlsby"],
)
def test_speechbrains_adapters(cell, adapter, arguments, bidirectional, warned):
    outputs = []
    pair = build_pair(cell, bidirectional=bidirectional, num_layers=2)
    for net in pair:
        torch.manual_seed(4)
        net = AdaptedModel(net, adapter, all_linear=True, adapter_kwargs=arguments).double()
        for name, parameter in net.named_parameters():
            if "adapter" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        outputs.append(run(net, random_input()))
    assert len(warned) == 1
    assert any("adapter" in name for name in outputs[0])
    assert_same(outputs[1], outputs[0])


@either_direction
@either_cell
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_quantised_network(cell, bidirectional, warned):
    theirs, ours = (
        torch.ao.quantization.quantize_dynamic(net.eval(), {torch.nn.Linear})
        for net in build_pair(cell, dtype=torch.float32, bidirectional=bidirectional)
    )
    x = random_input(dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-6
    assert len(warned) == 1


@either_direction
@either_cell
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_quantised_projections_stay_with_the_kernels(cell, bidirectional):
    """Of W alone, by the names of the layers: U is the kernels'."""
    projections = {f"rnn.{i}.w": torch.ao.quantization.default_dynamic_qconfig for i in range(2)}
    theirs, ours = (
        torch.ao.quantization.quantize_dynamic(net.eval(), projections)
        for net in build_pair(cell, dtype=torch.float32, bidirectional=bidirectional, num_layers=2)
    )
    x = random_input(dtype=torch.float32)
    with torch.no_grad(), sb_fast_sligru.backend("cpu"):
        assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-5
    assert type(ours.rnn[0].w) is not torch.nn.Linear


class Int8(torch.Tensor):
    """A quantised weight as torchao's: a tensor that holds others, and knows one function."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["values"], tensors["scale"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.values * weight.scale, *bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{function} of an Int8")


def quantise_weight(linear):
    scale = linear.weight.detach().abs().amax() / 127
    values = (linear.weight.detach() / scale).round().to(torch.int8)
    linear.weight = torch.nn.Parameter(Int8(values, scale), requires_grad=False)


@either_direction
@either_cell
@pytest.mark.parametrize("part", ["u", "w"])
def test_quantised_weights(cell, part, bidirectional, warned):
    """torchao leaves the Linear and exchanges its weight: those of W stay with the kernels."""
    pair = build_pair(cell, bidirectional=bidirectional, num_layers=2)
    for net in pair:
        for layer in net.eval().rnn:
            quantise_weight(getattr(layer, part))
    theirs, ours = pair
    x = random_input()
    with torch.no_grad():
        expected = theirs(x)[0]
        if part == "w":
            with sb_fast_sligru.backend("cpu"):
                assert relative_error(ours(x)[0], expected) < 1e-12
            assert not warned
        else:
            assert relative_error(ours(x)[0], expected) < 1e-12
            (reason,) = warned
            assert "without hooks or quantised weights" in reason
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        assert relative_error(compiled(x)[0], expected) < 1e-12


# Precision -------------------------------------------------------------------------------------


def squared_errors(cell, device, dtype, autocast, seed, **arguments):
    """Yield name, squared relative error of SpeechBrain's tensor and of ours, against float64."""
    shape = (3, 30, 16)
    arguments |= {"hidden_size": 24, "shape": shape, "seed": seed}
    exact, _ = build_pair(cell, device, **arguments)
    x = random_input(device, shape=shape)
    expected = run(exact, x)
    parameters = torch.float32 if autocast else dtype
    results = []
    for net in build_pair(cell, device, parameters, **arguments):
        with torch.autocast(device, dtype, enabled=autocast):
            results.append(run(net, x.to(parameters)))
    for name, tensor in expected.items():
        assert results[1][name].dtype == results[0][name].dtype, name
        yield name, *(relative_error(result[name], tensor) ** 2 for result in results)


@either_device
@either_direction
@either_cell
@pytest.mark.parametrize(
    "dtype, autocast",
    [
        pytest.param(torch.float32, False, id="float32"),
        pytest.param(torch.bfloat16, True, id="autocast-bfloat16"),
        pytest.param(torch.bfloat16, False, id="bfloat16"),
        pytest.param(torch.float16, False, id="float16"),
    ],
)
def test_error_is_no_larger_than_speechbrains(cell, dtype, autocast, bidirectional, device):
    """Root mean square over a few networks, for each tensor.

    The factor of two is for the scatter of so few samples, whose errors have heavy tails, and for
    running_var, rounded twice where SpeechBrain's is once.
    """
    arguments = {"num_layers": 2, "bidirectional": bidirectional, "nonlinearity": "tanh"}
    sums = {}
    for seed in range(NETWORKS):
        for name, theirs, ours in squared_errors(cell, device, dtype, autocast, seed, **arguments):
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += theirs
            total[1] += ours
    for name, total in sums.items():
        theirs, ours = ((value / NETWORKS) ** 0.5 for value in total)
        print(f"{name:30} SpeechBrain {theirs:.1e}  ours {ours:.1e}")
        assert ours <= 2 * theirs, f"{name}: {ours:.1e}, SpeechBrain's {theirs:.1e}"


# Streams ---------------------------------------------------------------------------------------

CUTS = [1, 4, 1, 2, 9, 13]  # steps of each chunk


def in_chunks(net, x):
    """Output and hidden state of `net`, whose state each chunk hands on to the next."""
    outputs, hx = [], None
    for chunk in x.split(CUTS, 1):
        output, hx = net(chunk, hx=hx)
        outputs.append(output)
    return torch.cat(outputs, 1), hx


@either_device
@either_cell
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "sin", "leaky_relu"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("features", [(FEATURES,), (2, 4)], ids=["3-D", "4-D"])
def test_chunks_are_one_pass(cell, nonlinearity, layers, features, device):
    """SpeechBrain's, over the whole sequence."""
    shape = (BATCH, sum(CUTS), *features)
    arguments = {"nonlinearity": nonlinearity, "num_layers": layers, "shape": shape}
    theirs, ours = (net.eval() for net in build_pair(cell, device, **arguments))
    x = torch.randn(shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        for actual, expected in zip(in_chunks(ours, x), theirs(x), strict=True):
            assert relative_error(actual, expected) < 1e-12


@either_device
@either_cell
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "sin", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("features", [(16,), (4, 4)], ids=["3-D", "4-D"])
def test_chunks_err_no_more_than_one_pass(cell, nonlinearity, dtype, layers, features, device):
    """Root mean square over a few networks; a state that is handed on is rounded once more."""
    shape = (BATCH, sum(CUTS), *features)
    arguments = {"num_layers": layers, "nonlinearity": nonlinearity, "shape": shape}
    arguments |= {"hidden_size": 24}
    squares = torch.zeros(2, 2)  # of output and state, in chunks and in one pass
    for seed in range(5):
        exact, ours = build_pair(cell, device, seed=seed, **arguments)
        ours.to(dtype)
        x = torch.randn(shape, dtype=dtype, device=device)
        with torch.no_grad():
            expected = exact.eval()(x.double())
            for row, results in enumerate((in_chunks(ours.eval(), x), ours(x))):
                for column, (actual, exactly) in enumerate(zip(results, expected, strict=True)):
                    assert actual.dtype == dtype
                    squares[row, column] += relative_error(actual, exactly) ** 2
    chunks, one_pass = squares.sqrt()
    assert (chunks <= 3 * one_pass).all(), f"{chunks} where one pass has {one_pass}"


# State -----------------------------------------------------------------------------------------


@either_direction
@pytest.mark.parametrize("cell, option", CASES)
def test_state_dict_is_interchangeable(cell, option, bidirectional):
    arguments = arguments_of(cell, option) | {"bidirectional": bidirectional}
    theirs, ours = build_pair(cell, **arguments)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    back = getattr(stock, cell)(
        hidden_size=HIDDEN, input_shape=(BATCH, TIME, FEATURES), **arguments
    )
    back.load_state_dict(ours.state_dict(), strict=True)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor)), name


def test_state_dict_names_drop_masks_as_speechbrain_does():
    masks = [
        name
        for cell in CELLS
        for name in build_pair(cell)[1].state_dict()
        if name.endswith("drop_masks")
    ]
    assert masks == ["rnn.0.drop_masks"]  # Li-GRU's
    assert not hasattr(build_pair("SLiGRU")[1].rnn[0], "drop_masks")


@either_direction
@pytest.mark.parametrize("cell, option", CASES)
def test_a_seed_gives_the_initial_weights_that_it_gives_speechbrain(cell, option, bidirectional):
    arguments = {"hidden_size": HIDDEN, "input_shape": (BATCH, TIME, FEATURES)}
    arguments |= {"bidirectional": bidirectional} | arguments_of(cell, option)
    states = []
    for module in (stock, sb_fast_sligru):
        torch.manual_seed(5)
        states.append(getattr(module, cell)(**arguments).state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@either_cell
@pytest.mark.parametrize("nonlinearity", ["relu", "sin"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(cell, nonlinearity, duplicate):
    _, ours = build_pair(cell, bidirectional=True, nonlinearity=nonlinearity)
    x = random_input()
    ours(x)  # a used network copies too
    twin = duplicate(ours)
    assert type(twin) is type(ours)
    assert_same(run(twin, x), run(ours, x), 0)


# Dropout ---------------------------------------------------------------------------------------


@either_device
@either_cell
def test_dropout_masks_are_distributed_as_speechbrains(cell, device):
    """Values, keep rate, and independence between rows, units and calls."""
    p, hidden, rows = 0.3, 200, 500
    arguments = {"hidden_size": hidden, "input_shape": (1, 1, 1), "dropout": p}
    torch.manual_seed(0)
    layer = getattr(sb_fast_sligru, cell)(**arguments).to(device).rnn[0]
    table = getattr(stock, cell)(**arguments).rnn[0].drop_masks
    first, second = layer._draw_drop_mask(rows), layer._draw_drop_mask(rows)
    assert first.shape == (rows, hidden) and first.dtype == layer.u.weight.dtype
    assert set(first.unique().tolist()) == set(table.unique().tolist())
    kept = torch.stack([first, second]).gt(0).double().cpu()
    # Five standard deviations of the mean of that many independent draws.
    bound = 5 * (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < bound / kept.numel() ** 0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < bound / rows**0.5
    assert (kept.mean(2) - (1 - p)).abs().max() < bound / hidden**0.5
    agreement = (kept[0] == kept[1]).double().mean()
    assert abs(agreement - (p**2 + (1 - p) ** 2)) < 5 * 0.5 / kept[0].numel() ** 0.5
    layer.eval()
    assert layer._draw_drop_mask(rows) is None


@either_device
@either_cell
def test_dropout_is_reproducible(cell, device):
    _, ours = build_pair(cell, device, dropout=0.5, num_layers=2, bidirectional=True)
    x = random_input(device)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ours(x)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# In use ----------------------------------------------------------------------------------------


@either_cell
def test_crdnn_from_yaml(cell):
    """One YAML line exchanges the RNN of SpeechBrain's CRDNN."""
    yaml = """
model: !new:speechbrain.lobes.models.CRDNN.CRDNN
    input_shape: [null, null, 40]
    cnn_blocks: 1
    cnn_channels: [4]
    rnn_class: !name:{}.{}
    rnn_layers: 2
    rnn_neurons: 12
    rnn_bidirectional: True
    dnn_neurons: 16
"""
    theirs, ours = (
        load_hyperpyyaml(yaml.format(module, cell))["model"]
        for module in ("speechbrain.nnet.RNN", "sb_fast_sligru")
    )
    assert isinstance(ours, CRDNN) and isinstance(ours.RNN, getattr(sb_fast_sligru, cell))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.double().eval()
    ours.double().eval()
    x = random_input(shape=(2, 12, 40))
    assert relative_error(ours(x), theirs(x)) < 1e-12


@either_device
@either_direction
@either_cell
def test_torch_compile(cell, bidirectional, device):
    """One graph, for every batch size and length, with the statistics of eager training."""
    _, eager = build_pair(cell, device, bidirectional=bidirectional)
    _, compiled = build_pair(cell, device, bidirectional=bidirectional)
    step = torch.compile(compiled, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(3, 7, FEATURES), (4, 9, FEATURES)]:
        x = random_input(device, shape=shape)
        expected = run(eager, x)
        actual = run(step, x)
        assert_same({n.replace("_orig_mod.", ""): t for n, t in actual.items()}, expected)


@either_device
@either_direction
@pytest.mark.parametrize("option", ["defaults", "affine", "layernorm", "sin"])
@either_cell
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_jit_script(cell, option, bidirectional, device):
    """SpeechBrain's `jit` options script the modules; the operator stays in use."""
    if cell == "LiGRU" and option == "affine":
        option = "tanh"
    arguments = arguments_of(cell, option) | {"bidirectional": bidirectional}
    _, ours = build_pair(cell, device, **arguments)
    _, twin = build_pair(cell, device, **arguments)
    scripted = torch.jit.script(twin)
    x = random_input(device)
    hx = random_input(device, shape=(1 + bidirectional, BATCH, HIDDEN), seed=5)
    for training in (True, False):
        ours.train(training)
        scripted.train(training)
        assert_same(run(scripted, x, hx), run(ours, x, hx), 1e-13)


@either_device
@either_cell
def test_no_grad_and_inference_mode(cell, device):
    theirs, ours = build_pair(cell, device, bidirectional=True)
    theirs.eval()
    ours.eval()
    x = random_input(device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-12


class Checkpointed(torch.nn.Module):
    """A network that keeps its input alone, and runs again in the backward pass."""

    def __init__(self, net, use_reentrant):
        super().__init__()
        self.net = net
        self.use_reentrant = use_reentrant

    def forward(self, x, hx=None):
        return checkpoint(self.net, x, hx, use_reentrant=self.use_reentrant)


@either_device
@either_direction
@either_cell
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(cell, use_reentrant, bidirectional, device):
    """BatchNorm sees the batch twice, in SpeechBrain's networks too."""
    pair = build_pair(cell, device, bidirectional=bidirectional, num_layers=2, nonlinearity="tanh")
    theirs, ours = (Checkpointed(net, use_reentrant) for net in pair)
    x = random_input(device)
    hx = random_input(device, shape=(2 * (1 + bidirectional), BATCH, HIDDEN), seed=5)
    assert_same(run(ours, x, hx), run(theirs, x, hx))


@either_device
@either_cell
def test_checkpoint_draws_the_masks_again(cell, device):
    _, net = build_pair(cell, device, bidirectional=True, num_layers=2, dropout=0.5)
    x, results = random_input(device), []
    for wrapped in (net, Checkpointed(net, False)):
        torch.manual_seed(4)
        tensors = {name.replace("net.", ""): tensor for name, tensor in run(wrapped, x).items()}
        results.append({n: t for n, t in tensors.items() if n.startswith(("output", "grad"))})
    assert_same(results[1], results[0])


@either_device
@either_direction
@either_cell
def test_saved_tensors_on_the_host(cell, bidirectional, device):
    theirs, ours = build_pair(cell, device, bidirectional=bidirectional, num_layers=2)
    x = random_input(device)
    expected = run(theirs, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(ours, x), expected)


WRAPPED = ["layer by fully_shard", "u by fully_shard", "layer by FSDP", "u by FSDP"]


def test_sharded_networks(tmp_path):
    """FSDP around layers, which stay fast, and around the Linears inside, whose loop calls them."""
    torch.multiprocessing.spawn(compare_sharded, (tmp_path / "store",), nprocs=2)


def compare_sharded(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    x = random_input(dtype=torch.float32)
    for cell in CELLS:
        for kind in WRAPPED:
            part, wrapper = kind.split(" by ")
            theirs, ours = build_pair(cell, dtype=torch.float32, num_layers=2)
            expected = run(theirs, x)
            _backends._warned.clear()
            for index in range(len(ours.rnn)):
                owner = ours.rnn if part == "layer" else ours.rnn[index]
                name = str(index) if part == "layer" else "u"
                if wrapper == "fully_shard":
                    fully_shard(getattr(owner, name), mesh=mesh)
                else:
                    setattr(owner, name, FSDP(getattr(owner, name), device_id=torch.device("cpu")))
            output, _ = ours(x)
            assert relative_error(output, expected["output"]) < 1e-5, kind
            # The same batch in each process: the mean of their gradients is that of one.
            for net, states in ((theirs, theirs(x)[0]), (ours, output)):
                net.zero_grad()
                states.square().sum().backward()
                torch.optim.SGD(net.parameters(), lr=1e-3).step()
            assert bool(_backends._warned) == (part == "u"), kind
            assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-5, kind
            assert relative_error(theirs(x)[0], expected["output"]) > 1e-4, kind
    torch.distributed.destroy_process_group()


def test_data_parallel_networks(tmp_path):
    torch.multiprocessing.spawn(compare_data_parallel, (tmp_path / "store",), nprocs=2)


def compare_data_parallel(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    for cell in CELLS:
        for bidirectional in (False, True):
            pair = build_pair(cell, num_layers=2, bidirectional=bidirectional)
            theirs, ours = map(DistributedDataParallel, pair)
            with sb_fast_sligru.backend("cpu"):
                for seed in range(2):  # another batch in each process
                    x = random_input(seed=2 * seed + rank)
                    assert_same(run(ours, x), run(theirs, x))
    torch.distributed.destroy_process_group()


def test_sync_batch_norm_counts_the_rows_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(compare_sync_batch_norm, (tmp_path / "store",), nprocs=2)


def compare_sync_batch_norm(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    x = random_input(shape=(1 + 2 * rank, TIME, FEATURES), seed=rank)  # uneven batches
    for cell in CELLS:
        statistics = []
        for net in build_pair(cell, bidirectional=True):
            norm = sb_fast_sligru.SyncBatchNorm(2 * HIDDEN, momentum=0.05).double()
            norm.load_state_dict(net.rnn[0].norm.state_dict())
            net.rnn[0].norm = norm
            net(x)
            statistics.append({"mean": norm.running_mean, "variance": norm.running_var})
        assert_same(statistics[1], statistics[0])
    torch.distributed.destroy_process_group()


# Bad input -------------------------------------------------------------------------------------

REFUSED = {
    "2-D x": ((TIME, FEATURES), None, r"x must be \[batch, time, 5\].*\[7, 5\]"),
    "4-D x": ((BATCH, TIME, 5, 1), None, r"x must be .*\[3, 7, 5, 1\]"),
    "no time step": ((BATCH, 0, FEATURES), None, r"at least one time step.*\[3, 0, 5\]"),
    "features": ((BATCH, TIME, 4), None, r"x must be \[batch, time, 5\].*\[3, 7, 4\]"),
    "hx rows": ((BATCH, TIME, FEATURES), (1, 2, HIDDEN), r"hx must be \[3, 6\].*\[2, 6\]"),
    "hx units": ((BATCH, TIME, FEATURES), (1, BATCH, 5), r"hx must be \[3, 6\].*\[3, 5\]"),
}


@pytest.mark.parametrize("x, hx, message", REFUSED.values(), ids=REFUSED.keys())
@either_cell
def test_bad_shapes(cell, x, hx, message):
    _, ours = build_pair(cell)
    with pytest.raises(ValueError, match=message):
        ours(random_input(shape=x), None if hx is None else random_input(shape=hx))


@either_cell
def test_bad_dtype(cell):
    _, ours = build_pair(cell)
    with pytest.raises(RuntimeError, match="same dtype|dtype"):
        ours(random_input(dtype=torch.float32))
