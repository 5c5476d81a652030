"""The CRDNN against SpeechBrain's own, under the same weights, masks and upstream gradients."""

import copy
import functools
import pickle
import re
import warnings

import pytest
import torch
from fuzz import draw_cases
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models import CRDNN as stock
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sb_fast_sligru
from sb_fast_sligru import crdnn
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

# The CNN alone; the other layers are SpeechBrain's or have tests of their own.
CNN = {
    "input_shape": [None, None, 20],
    "cnn_channels": [4, 8],
    "time_pooling": True,
    "time_pooling_size": 4,
    "rnn_layers": 0,
    "dnn_blocks": 0,
}
# Arguments of the constructor -> B, T.
CASES = {
    "defaults": ({}, (3, 17)),
    "no-time-pooling": ({"time_pooling": False}, (2, 9)),
    "shortest": ({"time_pooling": False}, (2, 2)),
    "three-frames": ({"time_pooling_size": 2}, (1, 3)),
    "frames-left-over": ({}, (2, 23)),
    "one-block": ({"cnn_blocks": 1, "cnn_channels": [16], "time_pooling_size": 2}, (3, 30)),
    "three-blocks": (
        {"cnn_blocks": 3, "cnn_channels": [3, 5, 6], "inter_layer_pooling_size": [2, 2, 2]},
        (2, 13),
    ),
    "odd-frequencies": ({"input_shape": [None, None, 23]}, (2, 11)),
    "pooling-of-one": ({"inter_layer_pooling_size": [1, 2]}, (2, 11)),
    "pooling-in-time-too": ({"using_2d_pooling": True, "time_pooling_size": 2}, (2, 21)),
    "dropout": ({"dropout": 0.5}, (4, 12)),
    "no-dropout": ({"dropout": 0.0}, (2, 12)),
    "dropout-one": ({"dropout": 1.0}, (2, 12)),
    "slope": ({"activation": functools.partial(torch.nn.LeakyReLU, 0.3)}, (2, 12)),
    "channels-of-the-input": ({"input_shape": [None, None, 20, 3]}, (2, 12, 3)),
    "long": ({"cnn_channels": [2, 3]}, (1, 4000)),
    "recipe": ({"input_shape": [None, None, 40], "cnn_channels": [128, 256]}, (1, 8)),
}
each_case = pytest.mark.parametrize("arguments, sizes", CASES.values(), ids=CASES)
either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)

# What runs SpeechBrain's code by construction -> the reason given.
OTHERS = {
    "relu": ({"activation": torch.nn.ReLU}, "CNN.block_0.act_1 of the CRDNN is .*ReLU"),
    "kernel": ({"cnn_kernelsize": (5, 5)}, r"kernel_size of CNN.block_0.conv_1 .* is \(5, 5\)"),
    "one-channel": ({"cnn_channels": [4, 1]}, "CNN.block_1.conv_1 of the CRDNN has one channel"),
}


@pytest.fixture
def warned(monkeypatch):
    """The reasons for slow code, each of which is told once in a process."""
    reasons = set()
    monkeypatch.setattr(_backends, "_warned", reasons)
    return reasons


def build_pair(seed=0, dtype=torch.float64, device="cpu", **arguments):
    """SpeechBrain's CRDNN and ours with equal weights, those of the norms included."""
    torch.manual_seed(seed)
    theirs = stock.CRDNN(**(CNN | arguments))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    ours = sb_fast_sligru.CRDNN(**(CNN | arguments))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(device, dtype), ours.to(device, dtype)


def make_input(net, sizes=(3, 17), dtype=torch.float64, device="cpu", seed=3):
    """Features; `sizes` are B, T and, of some, the channels."""
    frequencies = net.CNN.block_0.norm_1.norm.normalized_shape[0]
    shape = (*sizes[:2], frequencies, *sizes[2:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, dtype)


def run(net, x, seed=11):
    """Run `net` forwards and backwards; return every tensor that training could see.

    The masks follow from the seed: SpeechBrain's call draws them in both networks.
    """
    net.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    output = net(x)
    upstream = torch.randn(
        output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    output.backward(upstream.to(output))
    tensors = {"output": output, "grad of x": x.grad}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad of {name}"] = parameter.grad
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        if tolerance == 0:
            assert torch.equal(actual[name], tensor), name
            continue
        # What is zero in exact arithmetic is rounding alone.
        scale = max(float(torch.linalg.vector_norm(tensor.double())), 1e-3)
        error = float(torch.linalg.vector_norm(actual[name].double() - tensor.double())) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


# Parity ---------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_equals_speechbrain(arguments, sizes, training, name):
    theirs, ours = build_pair(**arguments)
    theirs.train(training)
    ours.train(training)
    x = make_input(theirs, sizes)
    with sb_fast_sligru.backend(name):
        actual = run(ours, x)
    assert_same(actual, run(theirs, x))


@each_case
def test_what_is_done_on_a_gpu_alone(arguments, sizes, monkeypatch):
    """Lengths rounded up, and a product in place of the first convolution."""
    monkeypatch.setattr(crdnn, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(crdnn, "FRAMES_STEP", 8)
    theirs, ours = build_pair(**arguments)
    x = make_input(theirs, sizes)
    assert_same(run(ours, x), run(theirs, x))


@pytest.mark.gpu
@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_speechbrain_on_a_gpu(arguments, sizes, training):
    exact, _ = build_pair(**arguments)
    theirs, ours = build_pair(dtype=torch.float32, device="cuda", **arguments)
    for net in (exact, theirs, ours):
        net.train(training)
    assert ours.choose_backend("cuda") == ("cuda", "the fastest")
    x = make_input(theirs, sizes).float()
    actual, stocks = run(ours, x.cuda()), run(theirs, x.cuda())
    if not training:  # a CPU draws other masks
        expected = run(exact, x.double())
        for name, tensor in expected.items():
            bound = 3 * relative_error(stocks[name], tensor) + 1e-6
            assert relative_error(actual[name], tensor) <= bound, name
    # Equal maxima may be told apart by rounding: a frame in thousands then differs.
    assert_same(actual, stocks, 1e-3)


def test_random_cnns(capsys):
    """Sizes, lengths, masks and frozen parameters drawn anew in every run."""
    for random in draw_cases(capsys, "CRDNNs", 60):
        blocks = random.randint(1, 2)
        flat = random.random() < 0.7
        arguments = {
            "input_shape": [None, None, random.randint(8, 27)],
            "cnn_blocks": blocks,
            "cnn_channels": [random.randint(2, 12) for _ in range(blocks)],
            "inter_layer_pooling_size": [random.randint(1, 2) for _ in range(blocks)],
            "using_2d_pooling": not flat,
            "time_pooling": random.random() < 0.7,
            "time_pooling_size": random.randint(1, 4),
            "dropout": random.choice([0.0, 0.3]),
        }
        sizes = random.randint(1, 4), random.randint(16, 60)
        print(arguments, sizes)
        theirs, ours = build_pair(seed=random.randrange(1000), **arguments)
        for pair in zip(theirs.parameters(), ours.parameters(), strict=True):
            trains = random.random() < 0.8
            for parameter in pair:
                parameter.requires_grad_(trains)
        x = make_input(theirs, sizes, seed=random.randrange(1000))
        assert_same(run(ours, x), run(theirs, x), 1e-11)


@either_device
@pytest.mark.parametrize("use_rnnp", [True, False])
def test_the_whole_network(use_rnnp, device):
    """RNN, projection and DNN after the CNN are called as they are."""
    more = {"rnn_layers": 2, "rnn_neurons": 6, "dnn_blocks": 1, "dnn_neurons": 9}
    more |= {"use_rnnp": use_rnnp, "projection_dim": 7, "rnn_class": torch_gru}
    dtype = torch.float64 if device == "cpu" else torch.float32
    theirs, ours = build_pair(dtype=dtype, device=device, **more)
    for net in (theirs, ours):
        net.eval()
        for module in net.modules():  # cuDNN has no backward pass otherwise; its dropout is 0
            if isinstance(module, torch.nn.GRU):
                module.train()
    x = make_input(theirs, dtype=dtype, device=device)
    assert_same(run(ours, x), run(theirs, x), 1e-11 if device == "cpu" else 1e-3)


def torch_gru(input_shape, hidden_size, num_layers, bidirectional, re_init, dropout=0.0):
    """A recurrent layer as SpeechBrain's CRDNN builds one."""
    return torch.nn.GRU(
        input_shape[-1] if len(input_shape) == 3 else input_shape[-1] * input_shape[-2],
        hidden_size,
        num_layers,
        batch_first=True,
        dropout=dropout,
        bidirectional=bidirectional,
    )


def test_training_steps():
    """Weights after steps with batches of changing size."""
    theirs, ours = build_pair(dropout=0.2)
    for net in (theirs, ours):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            net(make_input(net, (1 + step, 20 - step), seed=step)).square().mean().backward()
            optimizer.step()
    assert_same(*(net.state_dict() for net in (ours, theirs)), 1e-11)


def test_an_empty_batch_is_speechbrains():
    theirs, ours = build_pair()
    x = make_input(ours)[:0]
    assert ours(x).shape == theirs(x).shape and ours(x).dtype == theirs(x).dtype


def test_nan_spreads_as_speechbrains():
    """On a CPU: how far a NaN gets in cuDNN's convolutions depends on the one that it takes."""
    theirs, ours = build_pair(dtype=torch.float32)
    x = make_input(ours, (3, 30), torch.float32)
    x[1, 12, 3] = float("nan")
    actual, expected = run(ours, x), run(theirs, x)
    assert torch.equal(actual["output"].isnan(), expected["output"].isnan())
    assert expected["output"].isnan().any() and not expected["output"].isnan().all()


@pytest.mark.parametrize("net_index", [0, 1], ids=["theirs", "ours"])
def test_output_changed_in_place(net_index):
    nets = build_pair()
    outputs = []
    for net in (nets[net_index], nets[0]):
        torch.manual_seed(1)
        output = net(make_input(net))
        output.mul_(2)
        net.zero_grad()
        output.square().sum().backward()
        outputs.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert_same(*outputs)


# Precision -------------------------------------------------------------------------------------


# dtype of the network, autocast's
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
    "bfloat16-under-autocast": (torch.bfloat16, torch.bfloat16),
}


@either_device
@pytest.mark.parametrize("dtype, autocast", PRECISIONS.values(), ids=PRECISIONS)
def test_error_is_no_larger_than_speechbrains(dtype, autocast, device):
    """Root mean square over a few networks, for each tensor; dtypes as SpeechBrain's.

    The factor is for the scatter of so few samples.
    """
    sizes = {"input_shape": [None, None, 40], "cnn_channels": [16, 24], "dropout": 0.0}
    sums = {}
    for seed in range(5):
        results = []
        for net in build_pair(seed, dtype, device, **sizes):
            with torch.autocast(device, autocast, enabled=autocast is not None):
                results.append(run(net, make_input(net, (2, 30), dtype, device, seed)))
        # Inputs and weights as the low precision has them.
        exact = build_pair(seed, dtype, **sizes)[0].double()
        expected = run(exact, make_input(exact, (2, 30), dtype, seed=seed).double())
        for name, tensor in expected.items():
            assert results[1][name].dtype == results[0][name].dtype, name
            total = sums.setdefault(name, [0.0, 0.0])
            for i in range(2):
                total[i] += relative_error(results[i][name], tensor) ** 2
    for name, total in sums.items():
        theirs, ours = ((value / 5) ** 0.5 for value in total)
        print(f"{name:40} SpeechBrain {theirs:.1e}  ours {ours:.1e}")
        assert ours <= 2 * theirs, f"{name}: {ours:.1e}, SpeechBrain's {theirs:.1e}"


# What runs SpeechBrain's code -------------------------------------------------------------------


@pytest.mark.parametrize("arguments, reason", OTHERS.values(), ids=OTHERS)
def test_other_cnns_are_speechbrains(arguments, reason, warned):
    theirs, ours = build_pair(**arguments)
    x = make_input(ours)
    name, why = ours.choose_backend("cpu")
    assert name == "reference"
    with pytest.warns(UserWarning, match=f"runs SpeechBrain's CNN .*: {reason}"):
        actual = run(ours, x)
    assert_same(actual, run(theirs, x), 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sb_fast_sligru")
        run(ours, x)
        with sb_fast_sligru.backend("reference"):
            assert_same(run(ours, x), actual, 0)
    with sb_fast_sligru.backend("cpu"), pytest.raises(RuntimeError, match=re.escape(why)):
        ours(x)


def test_without_a_cnn_there_is_nothing_to_tell(warned):
    theirs, ours = build_pair(cnn_blocks=0, time_pooling=False, dnn_blocks=1, dnn_neurons=5)
    theirs.eval()
    ours.eval()
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ours(x), theirs(x))
    assert ours.choose_backend("cpu") == ("reference", "the CRDNN has no CNN")


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 1.1 * output)
    return module


class Scaled(torch.nn.LayerNorm):
    def forward(self, x):
        return 1.1 * super().forward(x)


def scaled(norm):
    replacement = Scaled(norm.normalized_shape).double()
    replacement.load_state_dict(norm.state_dict())
    return replacement


def set_to(**attributes):
    def change(module):
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    return change


REPLACED = {
    "CNN-hook": ("CNN", hooked),
    "block-hook": ("CNN.block_1", hooked),
    "conv-hook": ("CNN.block_0.conv_2", hooked),
    "inner-conv-hook": ("CNN.block_0.conv_2.conv", hooked),
    "norm-hook": ("CNN.block_1.norm_1", hooked),
    "norm-subclass": ("CNN.block_1.norm_1.norm", scaled),
    "activation": ("CNN.block_1.act_2", lambda act: torch.nn.Tanh()),
    "pool-hook": ("CNN.block_1.pooling.pool_layer", hooked),
    "average": ("CNN.block_1.pooling.pool_layer", lambda pool: torch.nn.AvgPool2d((1, 2))),
    "other-stride": (
        "CNN.block_1.pooling.pool_layer",
        lambda pool: torch.nn.MaxPool2d((1, 2), stride=(1, 1)),
    ),
    "drop-hook": ("CNN.block_0.drop", hooked),
    "other-drop": ("CNN.block_0.drop.drop", lambda drop: torch.nn.Identity()),
    "time-pooling-hook": ("time_pooling", hooked),
    "zero-padding": ("CNN.block_0.conv_1", set_to(padding_mode="constant")),
    "max_norm": ("CNN.block_0.conv_1", set_to(max_norm=0.1)),
    "without-bias": ("CNN.block_0.conv_1.conv", set_to(bias=None)),
}


@pytest.mark.parametrize("part, change", REPLACED.values(), ids=REPLACED)
def test_a_replaced_part_is_called(part, change, warned):
    pair = build_pair()
    for net in pair:
        owner, _, name = part.rpartition(".")
        owner = net.get_submodule(owner)
        setattr(owner, name, change(getattr(owner, name)))
    theirs, ours = pair
    outer = ".".join(part.split(".")[:3])
    with pytest.warns(UserWarning, match=f"runs SpeechBrain's CNN .*{outer} of the CRDNN"):
        assert_same(run(ours, make_input(ours)), run(theirs, make_input(ours)), 0)
    with sb_fast_sligru.backend("cpu"), pytest.raises(RuntimeError, match=f"but .*{outer} of the"):
        ours(make_input(ours))


@pytest.mark.filterwarnings("ignore:sb_fast_sligru runs SpeechBrain's CNN")
def test_a_layer_before_the_cnn_is_called(warned):
    pair = build_pair()
    for net in pair:
        layers = list(net.items())
        net.clear()
        net.update({"first": torch.nn.Tanh(), **dict(layers)})
    theirs, ours = pair
    assert_same(run(ours, make_input(ours)), run(theirs, make_input(ours)), 0)
    assert warned == {"the CRDNN does not begin with CNN and time_pooling"}


@pytest.mark.parametrize("part", ["conv_1.conv", "norm_2.norm"])
def test_a_parametrised_part_stays_with_the_kernels(part):
    pair = build_pair()
    for net in pair:
        parametrizations.weight_norm(net.CNN.block_1.get_submodule(part))
    with sb_fast_sligru.backend("cpu"):
        assert_same(run(pair[1], make_input(pair[1])), run(pair[0], make_input(pair[1])))


def test_speechbrains_adapters(warned):
    results = []
    more = {"projection_dim": 7, "dropout": 0.0}
    for net in build_pair(dtype=torch.float32, **more):
        torch.manual_seed(4)
        net = AdaptedModel(net, LoRA, all_linear=True, adapter_kwargs={"rank": 2})
        results.append(run(net, make_input(net.adapted_model, dtype=torch.float32)))
    assert not warned and any("adapter" in name for name in results[0])
    assert_same(results[1], results[0], 1e-4)


@pytest.mark.filterwarnings("ignore:sb_fast_sligru runs SpeechBrain's CNN")
def test_forward_mode_and_torch_func(warned):
    results = []
    for net in build_pair(dropout=0.0):
        net.requires_grad_(False)
        x = make_input(net)
        results.append(
            {
                "jvp": torch.func.jvp(net, (x,), (torch.ones_like(x),))[1],
                "grad": torch.func.grad(lambda x, net=net: net(x).square().sum())(x),
            }
        )
    assert_same(results[1], results[0], 0)
    assert len(warned) == 2


def test_second_derivative_is_the_references():
    theirs, ours = build_pair(dropout=0.0)
    results = []
    for net, name in ((theirs, "reference"), (ours, "reference"), (ours, "cpu")):
        x = make_input(net).requires_grad_()
        with sb_fast_sligru.backend(name):
            out = net(x).square().sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        if name == "cpu":
            with pytest.raises(RuntimeError, match="differentiable once"):
                gradient.square().sum().backward()
        else:
            results.append({"": torch.autograd.grad(gradient.square().sum(), x)[0]})
    assert_same(*results)


@pytest.mark.gpu
def test_float64_on_a_gpu_is_speechbrains(warned):
    theirs, ours = build_pair(device="cuda")
    x = make_input(ours, device="cuda")
    assert_same(run(ours, x), run(theirs, x), 1e-10)
    assert warned == {"the CNN's kernels do not take float64"}


# State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [case[0] for case in (*CASES.values(), *OTHERS.values())])
def test_state_dict_is_interchangeable(arguments):
    theirs, ours = build_pair(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    back = stock.CRDNN(**(CNN | arguments)).double()
    back.load_state_dict(ours.state_dict(), strict=True)


def test_the_constructor_draws_speechbrains_numbers(warned):
    states = []
    for cls in (stock.CRDNN, sb_fast_sligru.CRDNN):
        torch.manual_seed(5)
        net = cls(input_size=20, cnn_channels=[4, 8], rnn_neurons=6, dnn_neurons=9)
        states.append(net.state_dict() | {"next": torch.rand(3)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not warned


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["copy", "pickle"],
)
def test_copies(duplicate):
    _, ours = build_pair()
    expected = run(ours, make_input(ours))
    assert_same(run(duplicate(ours), make_input(ours)), expected, 0)


def test_dropout_masks_are_speechbrains():
    """One value a row and frequency; from the same random numbers, where those are a CPU's."""
    theirs, ours = build_pair(dropout=0.5, cnn_blocks=1, cnn_channels=[3], time_pooling=False)
    outputs = []
    for net in (theirs, ours):
        torch.manual_seed(8)
        outputs.append(net(make_input(net, (6, 12))))
    dropped = [(output == 0).all(3).all(1) for output in outputs]
    assert torch.equal(*dropped) and 0 < dropped[0].sum() < dropped[0].numel()


# In use ----------------------------------------------------------------------------------------


def test_from_yaml():
    """One YAML line exchanges SpeechBrain's CRDNN."""
    yaml = """
model: !new:{}
    input_shape: [null, null, 20]
    cnn_channels: (4, 8)
    rnn_class: !name:sb_fast_sligru.SLiGRU
    rnn_layers: 1
    rnn_neurons: 6
    dnn_neurons: 9
"""
    theirs, ours = (
        load_hyperpyyaml(yaml.format(name))["model"].double().eval()
        for name in ("speechbrain.lobes.models.CRDNN.CRDNN", "sb_fast_sligru.CRDNN")
    )
    assert isinstance(ours, stock.CRDNN)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = make_input(ours)
    with sb_fast_sligru.backend("cpu"):
        assert relative_error(ours(x), theirs(x)) < 1e-12


@either_device
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile(dropout, device):
    """One graph, for any number of rows and frames."""
    _, ours = build_pair(dtype=torch.float32, device=device, dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in [(3, 17), (4, 21), (2, 30)]:
        x = make_input(ours, sizes, torch.float32, device)
        results = []
        for net in (compiled, ours):
            results.append({n.replace("_orig_mod.", ""): t for n, t in run(net, x).items()})
        assert_same(results[0], results[1], 1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_jit_script():
    """SpeechBrain's `jit` options compile SpeechBrain's layers."""
    theirs, ours = build_pair(dropout=0.0)
    scripted = [run(torch.jit.script(net), make_input(net)) for net in (ours, theirs)]
    assert_same(*scripted, 0)
    assert type(ours) is sb_fast_sligru.CRDNN
    with sb_fast_sligru.backend("cpu"):
        assert_same(run(ours, make_input(ours)), run(theirs, make_input(ours)))


def test_no_grad_and_inference_mode():
    theirs, ours = build_pair()
    theirs.eval()
    ours.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(ours(make_input(ours)), theirs(make_input(ours))) < 1e-12


# With what follows the CNN.
WHOLE = {
    "cnn_channels": [4, 8],
    "rnn_class": sb_fast_sligru.SLiGRU,
    "rnn_layers": 2,
    "rnn_neurons": 6,
    "dnn_blocks": 1,
    "dnn_neurons": 9,
    "dropout": 0.0,
}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    theirs, ours = build_pair(**WHOLE)
    x = make_input(ours)
    expected = run(theirs, x)
    forward, ours.forward = (
        ours.forward,
        lambda x: checkpoint(forward, x, use_reentrant=use_reentrant),
    )
    with sb_fast_sligru.backend("cpu"):
        assert_same(run(ours, x), expected, 1e-9)


@either_device
def test_saved_tensors_on_the_host(device):
    _, ours = build_pair(dtype=torch.float32, device=device, **WHOLE)
    x = make_input(ours, dtype=torch.float32, device=device)
    expected = run(ours, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same(run(ours, x), expected, 1e-5)


class Recogniser(torch.nn.Module):
    """What fully_shard takes: it refuses SpeechBrain's containers, which are ModuleDicts."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return self.encoder(x)


def sharded(encoder, mesh):
    net = Recogniser(encoder)
    for part in (*encoder.RNN.rnn, net):
        fully_shard(part, mesh=mesh)
    return net


def test_encoders_of_several_processes(tmp_path):
    torch.multiprocessing.spawn(compare_encoders, (tmp_path / "store",), nprocs=2)


def compare_encoders(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for wrap in (DistributedDataParallel, functools.partial(sharded, mesh=mesh)):
        results = []
        for net, name in zip(build_pair(**WHOLE), ("auto", "cpu"), strict=True):
            x = make_input(net, seed=rank)
            with sb_fast_sligru.backend(name):
                tensors = run(wrap(net), x)
            results.append(
                {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}
            )
        assert_same(results[1], results[0], 1e-9)
    torch.distributed.destroy_process_group()


def test_flops_are_speechbrains():
    def count(net):
        with FlopCounterMode(display=False) as counter:
            run(net, make_input(net))
        return counter.get_total_flops()

    theirs, ours = build_pair()
    assert count(ours) == count(theirs) > 0


@pytest.mark.gpu
def test_cuda_graph_replays_the_training_step():
    _, ours = build_pair(dtype=torch.float32, device="cuda", dropout=0.0)
    x = make_input(ours, (2, 24), torch.float32, "cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            output = ours(x)
        return (output, *torch.autograd.grad(output.square().sum(), list(ours.parameters())))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for ours_, expected in zip(captured, step(), strict=True):
        assert relative_error(ours_, expected) < 0.02


# Bad input -------------------------------------------------------------------------------------


REFUSED = {
    "2-D": ((17, 20), r"x must be \[batch, frames, 20\] .*shape is \[17, 20\]"),
    "other frequencies": ((3, 17, 21), r"x must be \[batch, frames, 20\]"),
    "another axis": ((3, 17, 20, 2), r"x must be \[batch, frames, 20\]"),
    "one frame": ((3, 1, 20), r"x must be .* at least 4 frames, but its shape is \[3, 1, 20\]"),
    "frames that fill no window": ((3, 3, 20), r"at least 4 frames"),
    "no frames": ((3, 0, 20), r"at least 4 frames"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("shape, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_named(shape, message, name):
    _, ours = build_pair()
    with sb_fast_sligru.backend(name), pytest.raises(ValueError, match=message):
        ours(torch.zeros(shape, dtype=torch.float64))


def test_bad_input_with_channels_is_named():
    _, ours = build_pair(input_shape=[None, None, 20, 3], time_pooling=False)
    with pytest.raises(ValueError, match=r"x must be \[batch, frames, 20, 3\] with at least 2"):
        ours(torch.zeros(2, 17, 20, dtype=torch.float64))


def test_build():
    for cls in (stock.CRDNN, sb_fast_sligru.CRDNN):
        assert type(crdnn.build(cls, **CNN)) is cls
    for other in (print, "CRDNN", dict):
        with pytest.raises(ValueError, match="crdnn_class must be a class of modules, but is"):
            crdnn.build(other)


def test_another_dtype_is_refused_as_by_speechbrain():
    theirs, ours = build_pair()
    for net in (theirs, ours):
        with pytest.raises(RuntimeError, match=r"(?i)type|dtype|scalar"):
            net(make_input(net).float())
