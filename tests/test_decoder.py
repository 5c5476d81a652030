"""The decoder against SpeechBrain's own, under the same weights, masks and upstream gradients."""

import copy
import pickle
import warnings

import pytest
import torch
from fuzz import draw_cases
from speechbrain.decoders import S2SRNNBeamSearcher, S2SRNNGreedySearcher
from speechbrain.nnet import RNN as stock
from speechbrain.nnet.adapters import AdaptedModel, LoRA
from speechbrain.nnet.embedding import Embedding
from speechbrain.nnet.linear import Linear
from torch.nn.utils import parametrizations

import sb_fast_sligru
from sb_fast_sligru import decoder
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "rnn_type": "gru",
    "attn_type": "location",
    "hidden_size": 12,
    "attn_dim": 10,
    "num_layers": 1,
    "enc_dim": 9,
    "input_size": 7,
    "channels": 3,
    "kernel_size": 4,
}
BATCH, TOKENS, FRAMES = 3, 5, 11

# Arguments of the constructor -> B, N, L.
CASES = {
    "defaults": ({}, (BATCH, TOKENS, FRAMES)),
    "one-token": ({}, (2, 1, 6)),
    "one-frame": ({}, (3, 4, 1)),
    "one-row": ({}, (1, 7, 13)),
    "several-chunks": ({}, (2, 3, 150)),
    "kernel-larger-than-frames": ({"kernel_size": 20}, (3, 4, 7)),
    "kernel-of-one": ({"kernel_size": 0}, (3, 4, 7)),
    "scaling": ({"scaling": 1.7}, (BATCH, TOKENS, FRAMES)),
    "scaling-below-one": ({"scaling": 0.3}, (BATCH, TOKENS, FRAMES)),
    "no-bias": ({"bias": False}, (BATCH, TOKENS, FRAMES)),
    "no-re_init": ({"re_init": False}, (BATCH, TOKENS, FRAMES)),
    "dropout": ({"dropout": 0.3}, (BATCH, TOKENS, FRAMES)),
    "dropout-one": ({"dropout": 1.0}, (BATCH, TOKENS, FRAMES)),
    "other-sizes": (
        {"hidden_size": 33, "attn_dim": 17, "enc_dim": 20, "input_size": 1, "channels": 10},
        (5, 9, 31),
    ),
}
each_case = pytest.mark.parametrize("arguments, shape", CASES.values(), ids=CASES)

# What runs SpeechBrain's code by construction -> the reason given.
OTHERS = {
    "content": ({"attn_type": "content"}, "attn_type of the decoder is content"),
    "keyvalue": ({"attn_type": "keyvalue"}, "attn_type of the decoder is keyvalue"),
    "lstm": ({"rnn_type": "lstm"}, "rnn_type of the decoder is lstm"),
    "rnn": ({"rnn_type": "rnn"}, "rnn_type of the decoder is rnn"),
    "two-layers": ({"num_layers": 2, "dropout": 0.0}, "num_layers of the decoder is 2"),
}


@pytest.fixture
def warned(monkeypatch):
    """The reasons for the slow loop, each of which is told once in a process."""
    reasons = set()
    monkeypatch.setattr(_backends, "_warned", reasons)
    return reasons


def build_pair(seed=0, **arguments):
    """SpeechBrain's decoder and ours with equal weights, biases included."""
    torch.manual_seed(seed)
    arguments = SIZES | arguments
    theirs = stock.AttentionalRNNDecoder(**arguments)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("bias", "bias_ih", "bias_hh")):
                parameter.normal_(std=0.3)
            elif "mlp_attn" in name or "conv_loc" in name:
                parameter.normal_()
    ours = sb_fast_sligru.AttentionalRNNDecoder(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def make_inputs(shape=(BATCH, TOKENS, FRAMES), seed=3, features=7, enc_dim=9):
    """inp_tensor, enc_states, wav_len: some rows end early."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, frames = shape
    wav_len = torch.linspace(1, 0.4, batch) if batch > 1 else torch.ones(1)
    return (
        torch.randn(batch, tokens, features, generator=generator),
        torch.randn(batch, frames, enc_dim, generator=generator),
        wav_len.clamp_min(1 / frames),
    )


class Masks(torch.nn.Dropout):
    """In SpeechBrain's decoder: masks given for each token, one after the other."""

    def __init__(self, masks):
        super().__init__(0.5)
        self.masks = list(masks.unbind(1))

    def forward(self, x):
        return x * self.masks.pop(0)


def share_masks(theirs, ours, inputs, seed=7):
    """Give both the same masks of all tokens, if there is dropout."""
    p = ours.drop.p
    if p == 0:
        return
    batch, tokens, features = inputs[0].shape
    width = features + ours.attn_dim
    generator = torch.Generator().manual_seed(seed)
    masks = torch.bernoulli(torch.full((batch, tokens, width), 1 - p), generator=generator)
    masks = (masks / (1 - p) if p < 1 else masks).to(inputs[0])
    theirs.drop = Masks(masks)
    ours._draw_mask = lambda inp_tensor: masks


def run(net, inputs, seed=11):
    """Run `net` forwards and backwards; return every tensor that training could see."""
    net.zero_grad()
    inp_tensor, enc_states, wav_len = inputs
    inp_tensor, enc_states = (t.detach().clone().requires_grad_() for t in (inp_tensor, enc_states))
    outputs, attn = net(inp_tensor, enc_states, wav_len)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (outputs, attn)]
    torch.autograd.backward([outputs, attn], upstream)
    tensors = {"outputs": outputs, "attn": attn}
    tensors |= {"grad of inp_tensor": inp_tensor.grad, "grad of enc_states": enc_states.grad}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            tensors[f"grad of {name}"] = parameter.grad
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual, expected, tolerance=1e-12):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape and actual[name].dtype == tensor.dtype, name
        # Gradients that are zero in exact arithmetic (of energies of one frame) are rounding alone.
        scale = max(float(torch.linalg.vector_norm(tensor.double())), 1e-3)
        error = float(torch.linalg.vector_norm(actual[name].double() - tensor.double())) / scale
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


def inputs_of(net, shape, seed=3):
    features = net.rnn.rnn_cells[0].weight_ih.shape[1] - net.attn_dim
    return make_inputs(shape, seed, features, net.attn.mlp_enc.in_features)


# Parity ---------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_equals_speechbrain(arguments, shape, training, name, double):
    theirs, ours = build_pair(**arguments)
    inputs = inputs_of(theirs, shape)
    if training:
        share_masks(theirs, ours, inputs)
    theirs.train(training)
    ours.train(training)
    with sb_fast_sligru.backend(name):
        actual = run(ours, inputs)
    assert_same(actual, run(theirs, inputs))


def test_random_decoders(capsys, double):
    """Sizes, lengths, masks and frozen parameters drawn anew in every run."""
    for random in draw_cases(capsys, "decoders", 250):
        arguments = {
            "hidden_size": random.randint(1, 30),
            "attn_dim": random.randint(1, 40),
            "enc_dim": random.randint(1, 20),
            "input_size": random.randint(1, 9),
            "channels": random.randint(1, 11),
            "kernel_size": random.randint(0, 40),
            "scaling": random.choice([1.0, 1.0, 0.4, 2.0]),
            "bias": random.random() < 0.7,
            "dropout": random.choice([0.0, 0.3]),
        }
        shape = random.randint(1, 5), random.randint(1, 9), random.randint(1, 140)
        print(arguments, shape)
        theirs, ours = build_pair(seed=random.randrange(1000), **arguments)
        inputs = inputs_of(theirs, shape, seed=random.randrange(1000))
        if random.random() < 0.5:
            inputs = (*inputs[:2], torch.rand(shape[0]).clamp_min(1 / shape[2]))
        share_masks(theirs, ours, inputs)
        for pair in zip(theirs.parameters(), ours.parameters(), strict=True):
            trains = random.random() < 0.8
            for parameter in pair:
                parameter.requires_grad_(trains)
        assert_same(run(ours, inputs), run(theirs, inputs), 1e-11)


def test_training_steps(double):
    """Weights after steps with batches of changing size."""
    theirs, ours = build_pair(dropout=0.2)
    for net in (theirs, ours):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(4):
            inputs = make_inputs((1 + step, 2 + step, 9 - step), seed=step)
            share_masks(theirs, ours, inputs)
            optimizer.zero_grad()
            net(*inputs)[0].square().mean().backward()
            optimizer.step()
    assert_same(*(dict(net.named_parameters()) for net in (ours, theirs)), 1e-11)


def test_empty_batch_is_speechbrains():
    theirs, ours = build_pair()
    inputs = [t[:0] for t in make_inputs()]
    for actual, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype


def test_a_length_that_rounds_to_no_frame_is_nan_as_speechbrains():
    theirs, ours = build_pair()
    inputs = (*make_inputs()[:2], torch.tensor([1.0, 0.01, 0.7]))
    for actual, expected in zip(ours(*inputs), theirs(*inputs), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual[1].isnan().all() and not actual[0].isnan().any()


@pytest.mark.parametrize("which", [0, 1])
def test_nan_spreads_as_speechbrains(which):
    theirs, ours = build_pair()
    inputs = make_inputs()
    inputs[which][1, -1, 0] = float("nan")  # in the padding of enc_states
    actual, expected = run(ours, inputs), run(theirs, inputs)
    for name in ("outputs", "attn", "grad of proj.weight"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name
        assert expected[name].isnan().any() or name == "attn"


@pytest.mark.parametrize("which", [0, 1])
def test_outputs_changed_in_place(which, double):
    """SpeechBrain's are copies of what its loop saves."""
    results = []
    for net in build_pair():
        inputs = make_inputs()
        outputs = net(*inputs)
        outputs[which].mul_(2)
        (outputs[0].sum() + outputs[1].square().sum()).backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert_same(results[1], results[0])


# Precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_error_is_no_larger_than_speechbrains(autocast, monkeypatch):
    """Root mean square over a few decoders, for each tensor; dtypes as SpeechBrain's.

    The factor is for the scatter of so few samples.
    """
    sizes = {"hidden_size": 24, "attn_dim": 32, "enc_dim": 20, "kernel_size": 9}
    sums = {}
    for seed in range(8):
        inputs = make_inputs((4, 12, 50), seed, enc_dim=20)
        results = []
        for net in build_pair(seed, **sizes):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                results.append(run(net, inputs))
        exact = build_pair(seed, **sizes)[1].double()
        expected = run(exact, [t.double() for t in inputs])
        for name, tensor in expected.items():
            assert results[1][name].dtype == results[0][name].dtype, name
            total = sums.setdefault(name, [0.0, 0.0])
            for i in range(2):
                total[i] += relative_error(results[i][name], tensor) ** 2
    for name, total in sums.items():
        theirs, ours = ((value / 8) ** 0.5 for value in total)
        print(f"{name:40} SpeechBrain {theirs:.1e}  ours {ours:.1e}")
        assert ours <= 1.5 * theirs, f"{name}: {ours:.1e}, SpeechBrain's {theirs:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_than_speechbrain_takes(dtype):
    """SpeechBrain's decoder takes float32 alone, without autocast."""
    _, ours = build_pair()
    expected = run(ours, make_inputs())
    actual = run(ours.to(dtype), [t.to(dtype) for t in make_inputs()[:2]] + [make_inputs()[2]])
    bound = {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for name, tensor in actual.items():
        assert tensor.dtype == dtype and relative_error(tensor, expected[name]) < bound, name


# What runs SpeechBrain's code -------------------------------------------------------------------


@pytest.mark.parametrize("arguments, reason", OTHERS.values(), ids=OTHERS)
def test_other_decoders_are_speechbrains(arguments, reason, warned):
    theirs, ours = build_pair(**arguments)
    inputs = make_inputs()
    name, why = ours.choose_backend("cpu")
    assert name == "reference" and why.startswith(reason)
    with pytest.warns(UserWarning, match=f"slow PyTorch loop.*{reason}"):
        actual = run(ours, inputs)
    assert_same(actual, run(theirs, inputs), 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*slow PyTorch loop")
        run(ours, inputs)
        with sb_fast_sligru.backend("reference"):
            run(ours, inputs)
    with sb_fast_sligru.backend("cpu"), pytest.raises(RuntimeError, match=f"forced, but {reason}"):
        ours(*inputs)


class Scaled(torch.nn.Linear):
    def forward(self, x):
        return 1.1 * super().forward(x)


def scaled(linear):
    replacement = Scaled(linear.in_features, linear.out_features, bias=linear.bias is not None)
    replacement.load_state_dict(linear.state_dict())
    return replacement


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 1.1 * output)
    return module


def without_bias(linear):
    linear.bias = None
    return linear


PARTS = ["proj", *(f"attn.{name}" for name in ("mlp_enc", "mlp_dec", "mlp_attn", "mlp_loc"))]
REPLACED = {
    **{f"{part}-subclass": (part, scaled) for part in [*PARTS, "attn.mlp_out"]},
    "softmax-hook": ("attn.softmax", hooked),
    "conv-hook": ("attn.conv_loc", hooked),
    "drop-hook": ("drop", hooked),
    "linear-without-bias": ("attn.mlp_loc", without_bias),
    "spectral-norm": ("attn.mlp_dec", torch.nn.utils.spectral_norm),
}


@pytest.mark.parametrize("part, change", REPLACED.values(), ids=REPLACED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_replaced_part_is_called(part, change, warned):
    pair = build_pair()
    for net in pair:
        torch.manual_seed(3)
        owner, _, name = part.rpartition(".")
        owner = net.get_submodule(owner)
        setattr(owner, name, change(getattr(owner, name)))
    theirs, ours = pair
    with pytest.warns(UserWarning, match=f"slow PyTorch loop.*{part} of the decoder"):
        assert_same(run(ours, make_inputs()), run(theirs, make_inputs()), 0)
    with sb_fast_sligru.backend("cpu"), pytest.raises(RuntimeError, match=f"forced, but {part} of"):
        ours(*make_inputs())


def hooked_attention(net):
    hooked_module = net.attn
    hooked_module.register_forward_hook(lambda module, inputs, output: (1.1 * output[0], output[1]))


def hooked_cell(net):
    net.rnn.register_forward_hook(lambda module, inputs, output: (1.1 * output[0], output[1]))


def hooked_inner_cell(net):
    net.rnn.rnn_cells[0].register_forward_hook(lambda module, inputs, output: 1.1 * output)


def own_step(net):
    step = net.forward_step
    net.forward_step = lambda *inputs: (lambda out, *rest: (2 * out, *rest))(*step(*inputs))


@pytest.mark.parametrize("change", [hooked_attention, hooked_cell, hooked_inner_cell, own_step])
def test_hooks_and_another_step_are_called(change, warned):
    pair = build_pair()
    for net in pair:
        change(net)
    theirs, ours = pair
    assert_same(run(ours, make_inputs()), run(theirs, make_inputs()), 0)
    assert len(warned) == 1


def test_a_subclass_with_its_own_step_is_called(warned):
    class Doubled(sb_fast_sligru.AttentionalRNNDecoder):
        def forward_step(self, *inputs):
            out, *rest = super().forward_step(*inputs)
            return 2 * out, *rest

    theirs, ours = build_pair()
    twin = Doubled(**SIZES)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin(*make_inputs())[0], 2 * theirs(*make_inputs())[0])


@pytest.mark.parametrize("name", ["mlp_enc", "mlp_dec", "mlp_out"])
def test_a_parametrised_part_stays_with_the_kernels(name, double):
    pair = build_pair()
    for net in pair:
        parametrizations.weight_norm(getattr(net.attn, name))
        parametrizations.weight_norm(net.rnn.rnn_cells[0], "weight_hh")
    with sb_fast_sligru.backend("cpu"):
        assert_same(run(pair[1], make_inputs()), run(pair[0], make_inputs()))


def test_speechbrains_adapters(warned):
    results = []
    for net in build_pair():
        torch.manual_seed(4)
        net = AdaptedModel(net, LoRA, all_linear=True, adapter_kwargs={"rank": 2})
        for name, parameter in net.named_parameters():
            if "adapter" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        results.append(run(net, make_inputs()))
    assert len(warned) == 1 and any("adapter" in name for name in results[0])
    assert_same(results[1], results[0], 0)


def test_forward_mode_and_torch_func(warned):
    inp_tensor, enc_states, wav_len = make_inputs()
    results = []
    for net in build_pair():
        net.requires_grad_(False)

        def function(x, net=net):
            return net(x, enc_states, wav_len)[0]

        results.append(
            {
                "jvp": torch.func.jvp(function, (inp_tensor,), (torch.ones_like(inp_tensor),))[1],
                "grad": torch.func.grad(lambda x, f=function: f(x).square().sum())(inp_tensor),
            }
        )
    assert_same(results[1], results[0], 0)
    assert results[1]["jvp"].any() and len(warned) == 2


def test_second_derivative_is_the_references(double):
    theirs, ours = build_pair()
    results = []
    for net, name in ((theirs, "reference"), (ours, "reference"), (ours, "cpu")):
        inp_tensor, enc_states, wav_len = make_inputs()
        inp_tensor.requires_grad_()
        with sb_fast_sligru.backend(name):
            out = net(inp_tensor, enc_states, wav_len)[0].square().sum()
        (gradient,) = torch.autograd.grad(out, inp_tensor, create_graph=True)
        if name == "cpu":
            with pytest.raises(RuntimeError, match="differentiable once"):
                gradient.square().sum().backward()
        else:
            results.append({"": torch.autograd.grad(gradient.square().sum(), inp_tensor)[0]})
    assert_same(*results)


def test_scripting_fails_as_speechbrains():
    for net in build_pair():
        with pytest.raises(Exception, match="(?s)torch|aten|forward"):
            torch.jit.script(net)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_speechbrains_results(case, warned):
    arguments, shape = CASES[case]
    theirs, ours = (net.cuda() for net in build_pair(**arguments))
    inputs = [t.cuda() for t in inputs_of(ours, shape)]
    share_masks(theirs, ours, inputs)
    assert ours.choose_backend("cuda")[0] == "persistent"
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-4)
    assert not warned


@pytest.mark.gpu
def test_cuda_takes_what_the_kernels_cannot(warned):
    theirs, ours = (net.cuda() for net in build_pair(channels=17))
    inputs = [t.cuda() for t in make_inputs()]
    assert ours.choose_backend("cuda")[0] == "reference"
    assert_same(run(ours, inputs), run(theirs, inputs), 1e-6)
    assert warned == {"the attention has 17 location channels, the kernels take 16"}


@pytest.mark.gpu
def test_cuda_does_not_wait_for_the_gpu():
    _, net = build_pair()
    net.cuda()
    inputs = [t.cuda() for t in make_inputs()]
    net(*inputs)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        net(*inputs)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_wait_for_the_gpu():
    _, ours = build_pair()
    ours.cuda()
    inputs = [t.cuda() for t in make_inputs()]
    for mode in ("default", "error"):  # first without, for what is done once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            outputs, attn = ours(*inputs)
            (outputs.sum() + attn.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [case[0] for case in (*CASES.values(), *OTHERS.values())])
def test_state_dict_is_interchangeable(arguments):
    theirs, ours = build_pair(**arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    back = stock.AttentionalRNNDecoder(**(SIZES | arguments))
    back.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(5)
    states = [stock.AttentionalRNNDecoder(**(SIZES | arguments)).state_dict()]
    torch.manual_seed(5)
    states.append(sb_fast_sligru.AttentionalRNNDecoder(**(SIZES | arguments)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["copy", "pickle"],
)
def test_copies(duplicate):
    _, ours = build_pair()
    expected = run(ours, make_inputs())  # a used decoder copies too
    assert_same(run(duplicate(ours), make_inputs()), expected, 0)


def test_the_state_of_the_attention_after_forward():
    """A search, or steps by hand, begin anew: not with the last attention of the training."""
    theirs, ours = build_pair()
    for net in (theirs, ours):
        net.eval()
    _, enc_states, wav_len = make_inputs(seed=4)
    length = torch.round(FRAMES * wav_len).long()

    def steps(net):
        hidden, context, results = None, torch.zeros(BATCH, SIZES["attn_dim"]), []
        for t in range(3):
            out, hidden, context, attention = net.forward_step(
                make_inputs()[0][:, t], hidden, context, enc_states, length
            )
            results += [out, attention]
        return dict(enumerate(results))

    run(ours, make_inputs())
    assert ours.attn.prev_attn is None and ours.attn.precomputed_enc_h is None
    theirs.attn.reset()
    assert_same(steps(ours), steps(theirs), 0)
    assert_same(run(ours, make_inputs()), run(theirs, make_inputs()), 1e-5)


# Dropout ---------------------------------------------------------------------------------------


def test_dropout_masks_are_distributed_as_speechbrains():
    """Values, keep rate, and independence between rows, tokens, units and calls."""
    p, batch, tokens, width = 0.3, 40, 50, 60
    _, ours = build_pair(dropout=p, input_size=20, attn_dim=40)
    drawn = [ours._draw_mask(torch.zeros(batch, tokens, 20)) for _ in range(2)]
    theirs = torch.nn.Dropout(p)(torch.ones(1000))
    assert drawn[0].shape == (batch, tokens, width)
    assert set(drawn[0].unique().tolist()) == set(theirs.unique().tolist())
    kept = torch.stack(drawn).gt(0).double()
    # Five standard deviations of the mean of that many independent draws.
    bound = 5 * (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) < bound / kept.numel() ** 0.5
    for axis in range(1, 4):
        others = [a for a in range(4) if a != axis]
        count = kept.numel() / kept.shape[axis]
        assert (kept.mean(others) - (1 - p)).abs().max() < bound / count**0.5
        pairs = kept.narrow(axis, 1, kept.shape[axis] - 1) == kept.narrow(
            axis, 0, kept.shape[axis] - 1
        )
        agreement = p**2 + (1 - p) ** 2
        assert abs(pairs.double().mean() - agreement) < 5 * 0.5 / pairs.numel() ** 0.5
    assert abs((kept[0] == kept[1]).double().mean() - agreement) < 5 * 0.5 / kept[0].numel() ** 0.5
    ours.eval()
    assert ours._draw_mask(torch.zeros(1, 1, 20)) is None


def test_dropout_is_reproducible():
    _, ours = build_pair(dropout=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(ours(*make_inputs())[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# In use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torch_compile(dropout):
    """One graph, for any number of rows, tokens and frames."""
    _, ours = build_pair(dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in [(3, 5, 11), (4, 7, 13), (2, 9, 70)]:
        inputs = make_inputs(shape)
        results = []
        for net in (compiled, ours):
            torch.manual_seed(1)
            results.append({n.replace("_orig_mod.", ""): t for n, t in run(net, inputs).items()})
        assert_same(results[0], results[1], 1e-6)


def test_no_grad_and_inference_mode():
    theirs, ours = build_pair()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert relative_error(ours(*make_inputs())[0], theirs(*make_inputs())[0]) < 1e-6


def test_data_parallel_copies():
    """SpeechBrain's `data_parallel_backend` keeps the module as it is on a CPU."""
    theirs, ours = build_pair()
    inputs = make_inputs()
    assert_same(run(torch.nn.DataParallel(ours).module, inputs), run(theirs, inputs), 1e-5)


def make_searchers(dec, emb, lin):
    ends = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 1.0}
    parts = {"embedding": emb, "decoder": dec, "linear": lin}
    return (
        S2SRNNGreedySearcher(**parts, **ends),
        S2SRNNBeamSearcher(
            **parts, **ends, beam_size=4, max_attn_shift=5, using_max_attn_shift=True
        ),
    )


def test_searchers_after_training():
    """Training steps, then greedy and beam search: hypotheses and scores are SpeechBrain's."""
    results = []
    for net in build_pair(seed=2):
        torch.manual_seed(1)
        emb, lin = (
            Embedding(num_embeddings=12, embedding_dim=7),
            Linear(input_size=12, n_neurons=12),
        )
        _, enc_states, wav_len = make_inputs((3, 6, 20))
        tokens = torch.randint(3, 12, (3, 6))
        parameters = [*net.parameters(), *emb.parameters(), *lin.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            outputs, _ = net(emb(tokens), enc_states, wav_len)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                lin(outputs).flatten(0, 1), tokens.flatten()
            ).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            found = [search(enc_states, wav_len) for search in make_searchers(net, emb, lin)]
        results.append(found)
    for (theirs, _, their_scores, _), (ours, _, our_scores, _) in zip(*results, strict=True):
        assert ours == theirs and any(len(tokens) for tokens in theirs)
        torch.testing.assert_close(our_scores, their_scores, rtol=1e-4, atol=1e-5)


def test_build():
    for cls in (stock.AttentionalRNNDecoder, sb_fast_sligru.AttentionalRNNDecoder):
        assert type(decoder.build(cls, **SIZES)) is cls
    for other in (print, "AttentionalRNNDecoder", dict):
        with pytest.raises(ValueError, match="decoder_class must be a class of modules, but is"):
            decoder.build(other)


# Bad input -------------------------------------------------------------------------------------

GOOD = {"inp_tensor": (3, 5, 7), "enc_states": (3, 11, 9), "wav_len": (3,)}
REFUSED = {
    "2-D input": ({"inp_tensor": (3, 7)}, r"inp_tensor must be \[batch, tokens, .*\[3, 7\]"),
    "no tokens": ({"inp_tensor": (3, 0, 7)}, r"inp_tensor must be .*at least one token"),
    "another batch": ({"enc_states": (2, 11, 9)}, r"enc_states must be \[3, .*\[2, 11, 9\]"),
    "no frames": ({"enc_states": (3, 0, 9)}, r"enc_states must be .*at least one frame"),
    "4-D states": ({"enc_states": (3, 11, 3, 3)}, r"enc_states must be \[3, frames, features\]"),
    "lengths of another batch": ({"wav_len": (4,)}, r"wav_len must be \[3\].*\[4\]"),
    "lengths of one": ({"wav_len": (1,)}, r"wav_len must be \[3\].*\[1\]"),
    "2-D lengths": ({"wav_len": (3, 1)}, r"wav_len must be \[3\].*\[3, 1\]"),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("attn_type", ["location", "content"])
def test_bad_shapes(changed, message, attn_type):
    _, ours = build_pair(attn_type=attn_type)
    with pytest.raises(ValueError, match=message):
        ours(*(torch.ones(shape) for shape in (GOOD | changed).values()))


@pytest.mark.parametrize("length", [1.2, -0.5, float("nan"), float("inf")])
def test_bad_lengths(length):
    _, ours = build_pair()
    inp_tensor, enc_states, wav_len = make_inputs()
    wav_len[1] = length
    with pytest.raises(ValueError, match=r"wav_len must be from 0 to 1, but is \[1"):
        ours(inp_tensor, enc_states, wav_len)


def test_bad_widths_and_dtypes():
    _, ours = build_pair()
    inp_tensor, enc_states, wav_len = make_inputs()
    with pytest.raises(ValueError, match=r"inp_tensor must have 7 features, but has 6"):
        ours(inp_tensor[..., :6], enc_states, wav_len)
    with pytest.raises(RuntimeError, match="mat1 and mat2|shapes cannot be multiplied"):
        ours(inp_tensor, enc_states[..., :6], wav_len)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(inp_tensor.double(), enc_states, wav_len)
