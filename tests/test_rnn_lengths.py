"""Padded batches with lengths: the numbers of their sequences one by one."""

import math

import pytest
import torch
from speechbrain.nnet import RNN as stock
from speechbrain.nnet.linear import Linear

import sb_fast_sligru
from sb_fast_sligru import backend, reference
from sb_fast_sligru._packing import valid_frames
from sb_fast_sligru.reference import relative_error
from sb_fast_sligru.rnn import count_steps

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, TIME, FEATURES, HIDDEN = 5, 8, 5, 6
STEPS = torch.tensor([3, 8, 1, 7, 2])
CELLS = ["SLiGRU", "LiGRU"]
OPTIONS = {
    "defaults": {},
    "tanh-three-layers": {"nonlinearity": "tanh", "num_layers": 3},
    "layernorm-two-layers": {"NORM": "layernorm", "num_layers": 2},
    "no-bias-sin": {"bias": False, "nonlinearity": "sin"},
}

either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
either_cell = pytest.mark.parametrize("cell", CELLS)
either_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
each_option = pytest.mark.parametrize("option", OPTIONS)


def build(cell, option, bidirectional, device="cpu", **more):
    """A network none of whose tensors is left at a default, in float64."""
    name = "ff_normalization" if cell == "SLiGRU" else "normalization"
    arguments = {name if key == "NORM" else key: value for key, value in OPTIONS[option].items()}
    net = getattr(sb_fast_sligru, cell)(
        HIDDEN,
        input_shape=(BATCH, TIME, FEATURES),
        bidirectional=bidirectional,
        **arguments,
        **more,
    )
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if "norm" in name and tensor.requires_grad or name.endswith("running_mean"):
                tensor.copy_(torch.randn_like(tensor) * 0.5 + name.endswith("weight"))
            elif name.endswith("running_var"):
                tensor.uniform_(0.3, 3.0)
    return net.to(device, torch.float64)


def draw(net, device="cpu"):
    """A padded batch, initial states, and gradients of the output and of the hidden states."""
    directions = 2 if net.bidirectional else 1

    def randn(*sizes):
        return torch.randn(*sizes, dtype=torch.float64, device=device)

    x = randn(BATCH, TIME, FEATURES)
    hx = randn(net.num_layers, directions * BATCH, HIDDEN)
    grad_output = randn(BATCH, TIME, directions * HIDDEN)
    return x, hx, grad_output, randn(BATCH, net.num_layers, directions * HIDDEN)


def by_sequence(hidden, net):
    """Hidden states as `net` returns them -> [B, layers, directions H], the layers' own outputs.

    SpeechBrain's layout of a bidirectional network is a reshape of these.
    """
    if net.bidirectional:
        return hidden.flatten().view(-1, net.num_layers, 2 * HIDDEN)
    return hidden.transpose(0, 1)


def one_by_one(net, x, hx, grad_output, grad_hidden):
    """SpeechBrain's own network on each sequence alone; the sum of the parameters' gradients."""
    directions = 2 if net.bidirectional else 1
    name = type(net).__name__
    twin = getattr(stock, name)(
        HIDDEN,
        input_shape=(1, TIME, FEATURES),
        bidirectional=net.bidirectional,
        num_layers=net.num_layers,
        nonlinearity=net.nonlinearity,
        bias=net.bias,
        **(
            {"ff_normalization": net.ff_normalization}
            if name == "SLiGRU"
            else {"normalization": net.normalization}
        ),
    ).to(x)
    state = net.state_dict()
    for key in [key for key in state if key.endswith("h_init")]:
        state.pop(key)
    twin.load_state_dict(state, strict=False)
    twin.train(net.training)
    x, hx = x.detach().requires_grad_(), hx.detach().requires_grad_()
    states = hx.view(net.num_layers, directions, BATCH, HIDDEN)
    outputs, hiddens = torch.zeros_like(grad_output), torch.zeros_like(grad_hidden)
    for i, steps in enumerate(STEPS.tolist()):
        output, hidden = twin(x[i : i + 1, :steps], states[:, :, i])
        hidden = by_sequence(hidden, net)
        outputs[i, :steps], hiddens[i] = output[0].detach(), hidden[0].detach()
        torch.autograd.backward(
            [output, hidden], [grad_output[i : i + 1, :steps], grad_hidden[i : i + 1]]
        )
    gradients = {key: p.grad for key, p in twin.named_parameters()}
    return {"output": outputs, "hidden": hiddens, "x": x.grad, "hx": hx.grad} | gradients


def run(net, x, hx, grad_output, grad_hidden, lengths):
    net.zero_grad()
    x, hx = x.detach().requires_grad_(), hx.detach().requires_grad_()
    output, hidden = net(x, hx, lengths)
    hidden = by_sequence(hidden, net)
    torch.autograd.backward([output, hidden], [grad_output, grad_hidden])
    gradients = {key: p.grad for key, p in net.named_parameters()}
    return {"output": output, "hidden": hidden, "x": x.grad, "hx": hx.grad} | gradients


def assert_close(results, expected, bound=1e-11):
    assert results.keys() == expected.keys()
    for key, value in results.items():
        if expected[key] is None:
            assert value is None, key
        else:
            error = relative_error(value, expected[key])
            assert error <= bound, f"{key}: relative error {error:.1e}"


@either_device
@either_direction
@either_cell
@each_option
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_evaluation_gives_each_sequence_its_own_numbers(cell, option, bidirectional, device, name):
    net = build(cell, option, bidirectional, device).eval()
    tensors = draw(net, device)
    expected = one_by_one(net, *tensors)
    with backend(name):
        results = run(net, *tensors, (STEPS / TIME).to(device))
    assert_close(results, expected)


@either_direction
@either_cell
def test_training_with_layernorm_gives_each_sequence_its_own_numbers(cell, bidirectional):
    net = build(cell, "layernorm-two-layers", bidirectional)
    tensors = draw(net)
    assert_close(run(net, *tensors, STEPS / TIME), one_by_one(net, *tensors))


def train_by_hand(net, x, hx):
    """The network layer by layer: its norm on the concatenated frames, then each sequence alone."""
    directions = 2 if net.bidirectional else 1
    hidden = []
    sequences = [x[i, :steps] for i, steps in enumerate(STEPS.tolist())]
    for layer, states in zip(net.rnn, hx, strict=True):
        rows = layer.w(torch.cat(sequences))
        # SpeechBrain's bidirectional layer shows every frame to the norm twice.
        wx = layer.norm(rows.repeat(directions, 1))[: len(rows)].split(STEPS.tolist())
        states = states.view(directions, BATCH, HIDDEN)
        norm = getattr(layer, "layer_norm", None)
        sequences = [
            reference.light_gru(
                piece[None],
                layer.u.weight,
                states[:, i],
                layer_norm=norm is not None,
                bidirectional=net.bidirectional,
                activation=layer.activation,
                eps=1e-5 if norm is None else norm.eps,
            )[0]
            for i, piece in enumerate(wx)
        ]
        hidden.append(torch.stack([sequence[-1] for sequence in sequences]))
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), torch.stack(hidden, 1)


@either_device
@either_direction
@either_cell
@pytest.mark.parametrize("option", ["defaults", "tanh-three-layers", "no-bias-sin"])
def test_batchnorm_sees_valid_frames_alone(cell, option, bidirectional, device):
    torch.manual_seed(5)
    net = build(cell, option, bidirectional, device)
    twin = build(cell, option, bidirectional, device)
    twin.load_state_dict(net.state_dict())
    x, hx, grad_output, grad_hidden = draw(net, device)
    results = run(net, x, hx, grad_output, grad_hidden, (STEPS / TIME).to(device))
    x, hx = x.requires_grad_(), hx.requires_grad_()
    output, hidden = train_by_hand(twin, x, hx)
    torch.autograd.backward([output, hidden], [grad_output, grad_hidden])
    expected = {"output": output, "hidden": hidden, "x": x.grad, "hx": hx.grad}
    assert_close(results, expected | {key: p.grad for key, p in twin.named_parameters()})
    buffers = dict(net.named_buffers())
    assert any(key.endswith("running_var") for key in buffers)
    assert_close(buffers, dict(twin.named_buffers()))


@either_direction
@either_cell
def test_padding_may_hold_anything(cell, bidirectional):
    net = build(cell, "tanh-three-layers", bidirectional)
    x, hx, grad_output, grad_hidden = draw(net)
    padding = torch.arange(TIME) >= STEPS[:, None]
    clean = run(net, x, hx, grad_output, grad_hidden, STEPS / TIME)
    assert not clean["output"][padding].any() and not clean["x"][padding].any()
    x[padding], grad_output[padding] = math.nan, math.nan
    spoilt = run(net, x, hx, grad_output, grad_hidden, STEPS / TIME)
    for key, value in spoilt.items():
        assert torch.equal(value, clean[key]), key


@either_direction
@either_cell
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lengths_of_one_change_nothing(cell, bidirectional, training):
    net = build(cell, "tanh-three-layers", bidirectional).train(training)
    tensors = draw(net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    plain = run(net, *tensors, None)
    buffers = {key: value.clone() for key, value in net.named_buffers()}
    net.load_state_dict(state)
    for key, value in run(net, *tensors, torch.ones(BATCH)).items():
        assert torch.equal(value, plain[key]), key
    for key, value in net.named_buffers():
        assert torch.equal(value, buffers[key]), key


@either_direction
@either_cell
def test_dropout_masks_are_those_of_the_sequences(cell, bidirectional):
    """A mask a sequence, whatever its length."""
    net = build(cell, "layernorm-two-layers", bidirectional, dropout=0.5)
    x, hx, *_ = draw(net)
    torch.manual_seed(1)
    padded, _ = net(x, hx, STEPS / TIME)
    torch.manual_seed(1)
    plain, _ = net(x, hx)
    longest = STEPS.argmax()
    assert relative_error(padded[longest], plain[longest]) < 1e-13
    other, _ = net(x, hx, STEPS / TIME)
    assert relative_error(other, padded) > 0.01


@either_cell
def test_four_axes(cell):
    net = getattr(sb_fast_sligru, cell)(HIDDEN, input_shape=(BATCH, TIME, 2, 3)).eval()
    x = torch.randn(BATCH, TIME, 2, 3)
    output, hidden = net(x, lengths=STEPS / TIME)
    expected, expected_hidden = net(x.flatten(2), lengths=STEPS / TIME)
    assert torch.equal(output, expected) and torch.equal(hidden, expected_hidden)


def test_lengths_are_rounded_to_whole_steps():
    """A relative length in float32 times T may be a little less than its step."""
    for time in range(1, 400):
        steps = torch.arange(1, time + 1)
        assert torch.equal(count_steps(steps / time, time, time), steps)
    assert count_steps(torch.tensor([0.001, 0.1]), 2, 10).tolist() == [1, 1]


def test_frames():
    frames = valid_frames(STEPS, TIME)
    assert frames.tolist() == [
        i * TIME + t for i, steps in enumerate(STEPS.tolist()) for t in range(steps)
    ]


BAD_LENGTHS = {
    "list": ([1.0] * BATCH, "lengths must be a tensor of relative lengths, floats, but got list"),
    "integers": (
        STEPS,
        "lengths must be a tensor of relative lengths, floats, but got torch.int64",
    ),
    "shape": (torch.ones(2), r"lengths must be \[5\], but their shape is \[2\]"),
    "zero": (torch.tensor([1, 1, 0.0, 1, 1]), "lengths must be above 0 and at most 1.* one is 0"),
    "long": (torch.tensor([1, 1, 1.5, 1, 1]), "lengths must be above 0 and at most 1.* is 1.5"),
    "nan": (torch.tensor([1, 1, math.nan, 1, 1]), "lengths must be above 0 .* one is nan"),
}


@either_cell
@pytest.mark.parametrize("lengths, message", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths_are_named(cell, lengths, message):
    net = build(cell, "defaults", False)
    with pytest.raises(ValueError, match=message):
        net(torch.zeros(BATCH, TIME, FEATURES, dtype=torch.float64), lengths=lengths)


@either_cell
@pytest.mark.parametrize("lengths", [None, torch.ones(TIME)], ids=["none", "lengths"])
@pytest.mark.parametrize("shape", [(TIME,), (TIME, FEATURES)], ids=["1-D", "2-D"])
def test_inputs_of_another_rank_are_named(cell, lengths, shape):
    net = build(cell, "defaults", False)
    with pytest.raises(ValueError, match=r"x must be \[batch, time, (features|5)\]"):
        net(torch.zeros(shape, dtype=torch.float64), lengths=lengths)


@either_cell
def test_a_replaced_part_has_no_lengths(cell):
    net = build(cell, "defaults", False)
    net.rnn[0].u = Linear(n_neurons=2 * HIDDEN, input_size=HIDDEN, bias=False).double()
    x = torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="lengths: SpeechBrain's loop, needed here, has none: u of"
    ):
        net(x, lengths=STEPS / TIME)


@either_cell
def test_a_layer_of_speechbrains_own_has_no_lengths(cell):
    """`accelerate` leaves one whose method is replaced; without lengths it serves."""
    net = build(cell, "defaults", False)
    net.rnn[0].__class__ = getattr(stock, f"{cell}_Layer")
    x = torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    assert net.eval()(x)[0].shape == (BATCH, TIME, HIDDEN)
    with pytest.raises(ValueError, match="lengths: layer 0 is SpeechBrain's own"):
        net(x, lengths=STEPS / TIME)


@either_device
@either_direction
@either_cell
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_script_and_compile(cell, bidirectional, device):
    net = build(cell, "tanh-three-layers", bidirectional, device).eval()
    x, hx, *_ = draw(net, device)
    lengths = (STEPS / TIME).to(device)
    expected = net(x, hx, lengths)
    torch._dynamo.reset()
    compiled, any_shape = (
        torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for dynamic in (False, True)
    )
    for function in (torch.jit.script(net), compiled, any_shape):
        results = function(x, hx, lengths)
        for ours, theirs in zip(results, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-13


@pytest.mark.gpu
@either_direction
@either_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_of_an_evaluation(cell, bidirectional, dtype):
    """The lengths stay on the GPU: a captured graph serves any."""
    arguments = {"input_shape": (BATCH, TIME, 32), "bidirectional": bidirectional}
    net = getattr(sb_fast_sligru, cell)(64, **arguments).to("cuda", dtype).eval()
    x = torch.randn(BATCH, TIME, 32, device="cuda", dtype=dtype)
    lengths = torch.ones(BATCH, device="cuda")
    with torch.no_grad():
        net(x, lengths=lengths)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, hidden = net(x, lengths=lengths)
        lengths.copy_(STEPS / TIME)
        graph.replay()
        expected, expected_hidden = net(x, lengths=lengths)
    assert torch.equal(output, expected) and torch.equal(hidden, expected_hidden)
    assert not output[2, 1:].any()
