"""The CRDNN's `use_lengths`: what it makes of each sequence of a padded batch."""

import copy
import math

import pytest
import torch
from speechbrain.lobes.models import CRDNN as stock
from speechbrain.nnet import RNN
from speechbrain.nnet.containers import LengthsCapableSequential

import sb_fast_sligru
from sb_fast_sligru import crdnn, reference

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "input_shape": [None, None, 12],
    "cnn_channels": [4, 5],
    "time_pooling": True,
    "time_pooling_size": 4,
    "rnn_class": sb_fast_sligru.SLiGRU,
    "rnn_layers": 2,
    "rnn_neurons": 6,
    "dnn_neurons": 7,
    "dropout": 0.0,
    "use_lengths": True,
}
FRAMES = torch.tensor([22, 4, 27, 9, 26])
# Arguments of the constructor.
CASES = {
    "recipe": {},
    "no-time-pooling": {"time_pooling": False},
    "one-direction": {"rnn_bidirectional": False},
    "Li-GRU": {"rnn_class": sb_fast_sligru.LiGRU, "time_pooling_size": 2},
    "pooling-in-time-too": {"using_2d_pooling": True, "time_pooling": False},
    "one-block": {"cnn_blocks": 1, "dnn_blocks": 1, "inter_layer_pooling_size": [1]},
    "channels-of-the-input": {"input_shape": [None, None, 12, 2]},
}
each_case = pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
# Of other layers, for which there is no oracle but the sequences alone.
OTHERS = {
    "GRU": {"rnn_class": RNN.GRU},
    "LSTM-without-DNN": {"rnn_class": RNN.LSTM, "dnn_blocks": 0},
    "projection": {"projection_dim": 9},
    "linear-between": {"use_rnnp": True, "dnn_blocks": 0},
    "wide-kernel": {"cnn_kernelsize": (3, 5)},
    "high-kernel": {"cnn_kernelsize": (5, 1)},
    "Tanh": {"activation": torch.nn.Tanh},
    "no-CNN": {"cnn_blocks": 0, "time_pooling": False},
    "CNN-alone": {"rnn_layers": 0, "dnn_blocks": 0},
}
either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def build(dtype=torch.float64, device="cpu", seed=0, **arguments):
    """A CRDNN whose norms have random weights and statistics."""
    torch.manual_seed(seed)
    net = sb_fast_sligru.CRDNN(**(SIZES | arguments))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return net.to(device, dtype)


def make_input(net, frames=FRAMES, time=None, seed=3):
    """Features [B, T, ...] whose padding is NaN, and relative lengths."""
    time = int(frames.max()) if time is None else time
    x = torch.full((len(frames), time, *net.input_shape[2:]), math.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for each, count in zip(x, frames.tolist(), strict=True):
        each[:count] = torch.randn(each[:count].shape, generator=generator, dtype=x.dtype)
    parameter = next(net.parameters())
    return x.to(parameter), (frames / time).to(parameter.device)


def gradients(net, x, states, seed=5):
    """Of x and the parameters, by name; the upstream gradient follows from the seed."""
    upstream = torch.randn(
        states.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    tensors = {"x": x} | dict(net.named_parameters())
    found = torch.autograd.grad(states, tensors.values(), upstream.to(states))
    return dict(zip(tensors, found, strict=True))


def run(net, x, lengths, frames):
    """States that count, one sequence after the other, and all that training could see."""
    x.requires_grad_()
    output = net(x, lengths)
    assert not output.isnan().any()
    states = []
    for each, count in zip(output, frames.tolist(), strict=True):
        own = count // pooling(net)
        states.append(each[:own])
        assert not each[own:].any()
    states = torch.cat(states)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return {"states": states.detach()} | gradients(net, x, states) | statistics


def pooling(net):
    """Frames of a state."""
    with torch.no_grad():
        x = torch.zeros(1, 240, *net.input_shape[2:]).to(next(net.parameters()))
        return 240 // copy.deepcopy(net).eval()(x).shape[1]


def expected(net, x, frames):
    """The same as `run`, of SpeechBrain's layers and PyTorch's loop.

    All but BatchNorm are called for each sequence, without its padding.
    """
    x.requires_grad_()
    parts = []
    for each, count in zip(x, frames.tolist(), strict=True):
        y = net.CNN(each[None, :count])
        y = net.time_pooling(y) if "time_pooling" in net else y
        parts.append(y.flatten(2)[0])
    counts = [len(part) for part in parts]
    for layer in net.RNN.rnn:
        rows = layer.w(torch.cat(parts))
        directions = 2 if layer.bidirectional else 1  # for each of which SpeechBrain has the rows
        wx = layer.norm(rows.repeat(directions, 1))[: len(rows)].split(counts)
        norm = getattr(layer, "layer_norm", None)
        options = {"layer_norm": norm is not None, "bidirectional": layer.bidirectional}
        if norm is not None:
            options |= {"ln_weight": norm.weight, "ln_bias": norm.bias}
        parts = [reference.light_gru(one[None], layer.u.weight, **options).squeeze(0) for one in wx]
    states = net.DNN(torch.cat(parts)[None]).squeeze(0)
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return {"states": states.detach()} | gradients(net, x, states) | statistics


def assert_same(actual, expected, tolerance=1e-10, nothing=1e-3):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        # What is zero in exact arithmetic is rounding alone.
        scale = max(float(torch.linalg.vector_norm(tensor.double())), nothing)
        error = float(torch.linalg.vector_norm(actual[name].double() - tensor.double())) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def hooked(net):
    """The CNN then runs SpeechBrain's layers."""
    if "CNN" in net:
        net.CNN.block_0.conv_1.register_forward_hook(lambda *_: None)
    return net


# What is computed -----------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("path", ["cpu", "reference", "layers", "as-on-a-gpu"])
def test_sequences_are_encoded_alone(arguments, training, path, monkeypatch):
    """States, gradients and, in training, the statistics of all BatchNorms."""
    if path == "as-on-a-gpu":  # frames of memory rounded up, another first convolution
        monkeypatch.setattr(crdnn, "_is_on_gpu", lambda x: True)
        monkeypatch.setattr(crdnn, "FRAMES_STEP", 8)
    net = build(**arguments).train(training)
    frames = FRAMES.clone()
    frames[1] = max(2, pooling(net))  # a convolution mirrors a frame beside the last one
    x, lengths = make_input(net, frames)
    correct = expected(copy.deepcopy(net), x, frames)
    if path == "layers":
        actual = run(hooked(net), x, lengths, frames)
    else:
        with sb_fast_sligru.backend("reference" if path == "reference" else "cpu"):
            actual = run(net, x, lengths, frames)
    assert_same(actual, correct)


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hooked"])
def test_other_layers(arguments, hook):
    """Against the call for each sequence alone, without lengths."""
    net = build(**arguments).eval()
    net = hooked(net) if hook else net
    x, lengths = make_input(net)
    x.requires_grad_()
    parts = [
        net(each[None, :count]).squeeze(0) for each, count in zip(x, FRAMES.tolist(), strict=True)
    ]
    states = torch.cat(parts)
    for module in net.modules():  # cuDNN has no backward pass otherwise
        if isinstance(module, torch.nn.RNNBase):
            module.train()
    correct = {"states": states.detach()} | gradients(net, x, states)
    actual = run(net, x, lengths, FRAMES)
    assert_same({name: actual[name] for name in correct}, correct)


@pytest.mark.parametrize("rnn_class", [sb_fast_sligru.SLiGRU, RNN.GRU])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_more_padding_changes_nothing(rnn_class, training):
    """Also where no sequence is as long as the batch, and for lengths in float64."""
    results = []
    for time in (27, 45):
        net = build(rnn_class=rnn_class).train(training)
        x, lengths = make_input(net, time=time)
        results.append(run(net, x, lengths.double(), FRAMES))
        assert not results[-1]["x"][:, 27:].any()
        results[-1]["x"] = results[-1]["x"][:, :27]
    assert_same(*results)


def test_dropout_is_drawn_for_each_sequence():
    net = build(dropout=0.5).train()
    x, lengths = make_input(net)
    x[1:3], lengths[1:3] = x[0], lengths[0]
    states = net(x, lengths)
    assert not torch.equal(states[1], states[2])
    assert not states[0, 22 // 4 :].any()


def test_every_number_of_frames_is_met():
    """Relative lengths of float32 are rounded, also after pooling."""
    net = build(cnn_blocks=1, cnn_channels=[2], rnn_layers=1, time_pooling_size=3).eval()
    for time in (100, 333, 1000):
        frames = torch.arange(3 + time % 7, time + 1, time // 50)
        states = net(torch.randn(len(frames), time, 12).double(), frames / time)
        assert torch.equal(states.any(2).sum(1), frames // 3)


@either_device
def test_precisions(device):
    """Sequences alone, as close as rounding allows, under autocast too."""
    net = build(torch.float32, device, cnn_channels=[8, 8]).eval()
    x, lengths = make_input(net)
    for autocast, bound in ((None, 1e-5), (torch.bfloat16, 2e-2)):
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            together = net(x, lengths)
            for i, count in enumerate(FRAMES.tolist()):
                alone = net(x[i : i + 1, :count])
                error = reference.relative_error(together[i : i + 1, : count // 4], alone)
                assert error < bound, (autocast, i)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_on_a_gpu(training):
    """The states of the same network on a CPU; lengths that are wrong are clamped."""
    net = build(torch.float32).train(training)
    x, lengths = make_input(net)
    correct = run(copy.deepcopy(net).double(), x.double(), lengths, FRAMES)
    lengths[FRAMES.argmax()] = 1.5
    lengths[FRAMES.argmin()] = 0.0
    actual = run(net.cuda(), x.cuda(), lengths.cuda(), FRAMES)
    assert_same({name: value.cpu() for name, value in actual.items()}, correct, 1e-3, 0.1)


def test_compiled():
    """One graph, for all lengths."""
    net = build().eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for time in (27, 31):
            x, lengths = make_input(net, time=time)
            assert_same({"states": compiled(x, lengths)}, {"states": net(x, lengths)})


# Where nothing changes ------------------------------------------------------------------------


def test_without_use_lengths_they_are_not_looked_at():
    net, plain = build(use_lengths=False).eval(), build(use_lengths=False).eval()
    x, lengths = make_input(net)
    x = x.nan_to_num()
    for pipeline in (net, LengthsCapableSequential(enc=net)):
        assert torch.equal(pipeline(x, lengths), plain(x))
    assert torch.equal(net(x, "no lengths"), plain(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_lengths_every_frame_counts(training):
    nets = [build(use_lengths=use).train(training) for use in (True, False)]
    x = make_input(nets[0])[0].nan_to_num()
    assert torch.equal(nets[0](x), nets[1](x))
    states = LengthsCapableSequential(enc=nets[0])(x, None)
    assert torch.equal(states, nets[1](x))


def test_a_pipeline_passes_them_on():
    """SpeechBrain's, as its inference classes call it."""
    net = build().eval()
    x, lengths = make_input(net)
    assert torch.equal(LengthsCapableSequential(enc=net)(x, lengths), net(x, lengths))


def test_weights_are_speechbrains():
    net = build()
    theirs = stock.CRDNN(**{key: SIZES[key] for key in SIZES if key != "use_lengths"})
    theirs.load_state_dict(net.state_dict(), strict=True)
    sb_fast_sligru.accelerate(theirs)
    assert type(theirs) is sb_fast_sligru.CRDNN and not theirs.use_lengths
    x, lengths = make_input(net)
    theirs = theirs.double().eval()
    assert torch.equal(theirs(x.nan_to_num(), lengths), theirs(x.nan_to_num()))
    theirs.use_lengths = True  # now its layers are ours
    with torch.no_grad():
        assert_same({"": theirs(x, lengths)}, {"": net.eval()(x, lengths)})


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rnn_class", [RNN.SLiGRU, RNN.LiGRU])
def test_rnns_without_lengths_are_refused(rnn_class):
    reason = rf"^use_lengths: RNN of the CRDNN is speechbrain.*\.{rnn_class.__name__}, .*rnn_class"
    with pytest.raises(ValueError, match=reason):
        build(rnn_class=rnn_class)


def block_hook(net):
    net.CNN.block_0.register_forward_hook(lambda *_: None)


def replace_rnn(net):
    net.RNN = torch.nn.Sequential(net.RNN)


def hook_u(net):
    net.RNN.rnn[0].u.register_forward_hook(lambda *_: None)


def replace_norm(net):
    net.CNN.block_1.norm_2 = torch.nn.Identity()


def replace_conv(net):
    net.CNN.block_1.conv_2 = torch.nn.Sequential(net.CNN.block_1.conv_2)


def pad_zeros(net):
    net.CNN.block_0.conv_2.padding_mode = "constant"


def average(net):
    net.time_pooling.pool_layer = torch.nn.AvgPool2d((1, 4))


CHANGES = {
    block_hook: "use_lengths: CNN.block_0 of the CRDNN is .*CNN_Block, .* without hooks",
    replace_rnn: "use_lengths: RNN of the CRDNN is torch.*Sequential, which takes no lengths",
    hook_u: "lengths: SpeechBrain's loop, needed here, has none: u of a layer",
    replace_norm: "use_lengths: CNN.block_1.norm_2 of the CRDNN is no LayerNorm",
    replace_conv: "use_lengths: CNN.block_1.conv_2 of the CRDNN is no Conv2d",
    pad_zeros: "use_lengths: CNN.block_0.conv_2 .* with padding_mode constant, not reflect",
    average: "use_lengths: time_pooling of the CRDNN is no max-pooling",
}


@pytest.mark.parametrize("change, reason", CHANGES.items(), ids=lambda value: str(value)[:20])
def test_changed_layers_are_refused(change, reason):
    net = build().eval()
    x, lengths = make_input(net)
    change(net)
    with pytest.raises(ValueError, match="^" + reason):
        net(x, lengths)


@pytest.mark.parametrize(
    "lengths, reason",
    [
        (torch.tensor([1.0, 0.1]), "lengths: a sequence has 1 of 12 frames, .* at least 4"),
        (torch.tensor([1.0, 0.0]), "lengths must be above 0"),
        (torch.tensor([1.0, 1.1]), "lengths must be above 0 and at most 1"),
        (torch.tensor([12, 8]), "lengths must be a tensor of relative lengths, floats"),
        (torch.tensor([1.0]), r"lengths must be \[2\]"),
        ([1.0, 0.5], "lengths must be a tensor"),
        (torch.ones(2, device="meta"), "lengths are on meta, but x is on cpu"),
    ],
    ids=str,
)
def test_bad_lengths_are_refused(lengths, reason):
    with pytest.raises(ValueError, match=reason):
        build()(torch.randn(2, 12, 12).double(), lengths)


def test_too_few_frames_are_refused():
    for net in (build(), hooked(build())):
        with pytest.raises(ValueError, match=r"x must have at least 4 frames, .* \[2, 3, 12\]"):
            net(torch.randn(2, 3, 12).double(), torch.ones(2))


def test_a_yaml_s_class_must_take_them():
    arguments = {key: SIZES[key] for key in ("input_shape", "cnn_channels", "rnn_neurons")}
    for kind in (stock.CRDNN, sb_fast_sligru.CRDNN):
        assert type(crdnn.build(kind, use_lengths=False, **arguments)) is kind
    rnn = {"rnn_class": sb_fast_sligru.SLiGRU}
    assert crdnn.build(sb_fast_sligru.CRDNN, use_lengths=True, **arguments, **rnn).use_lengths
    for kind in (stock.CRDNN, "sb_fast_sligru.CRDNN"):
        with pytest.raises(ValueError, match=r"^use_lengths: crdnn_class must be sb_fast_sligru"):
            crdnn.build(kind, use_lengths=True, **arguments)
