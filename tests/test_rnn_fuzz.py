"""Random networks and inputs against SpeechBrain's own, under the same weights and masks."""

import math

import pytest
import torch
from fuzz import draw_cases
from speechbrain.nnet.RNN import LiGRU_Layer, SLiGRU_Layer
from test_rnn import build_pair, run, share_masks

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {"cpu": 250, "cuda": 500}
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])]


def draw_network(random):
    """A cell, arguments of its constructor, and the number of input features."""
    cell = random.choice(["SLiGRU", "LiGRU"])
    norm = "ff_normalization" if cell == "SLiGRU" else "normalization"
    arguments = {
        "hidden_size": random.randint(2, 24),
        "nonlinearity": random.choice(["relu", "tanh", "sin", "leaky_relu", "none of them"]),
        norm: random.choice(["batchnorm", "batchnorm", "layernorm", "none of them"]),
        "num_layers": random.randint(1, 3),
        "bias": random.random() < 0.7,
        "dropout": random.choice([0.0, 0.0, 0.3, 0.5]),
        "re_init": random.random() < 0.5,
        "bidirectional": random.random() < 0.5,
    }
    if cell == "SLiGRU":
        arguments["recurrent_elementwise_affine"] = random.random() < 0.5
    shape = [random.randint(1, 6), random.randint(1, 12), random.randint(1, 10)]
    if random.random() < 0.2:
        shape.append(random.randint(1, 3))
    return cell, arguments | {"shape": tuple(shape)}


def draw_state(random, arguments):
    """An initial state, or none; SpeechBrain's layers broadcast one row to all."""
    batch = arguments["shape"][0]
    directions = 2 if arguments["bidirectional"] else 1
    if random.random() < 0.5:
        return None
    rows = batch if directions == 2 else random.choice([1, batch])
    return torch.randn(
        arguments["num_layers"] * directions, rows, arguments["hidden_size"], dtype=torch.float64
    )


def steps_of(net, inputs, states, rate):
    """Every tensor of a few steps of training, then of one of evaluation."""
    results = {}
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    for step, (x, hx) in enumerate(zip(inputs, states, strict=True)):
        net.train(step < len(inputs) - 1)
        for layer in net.rnn:  # SpeechBrain's next call takes the same rows of its table
            layer.drop_mask_cnt = 0
        for name, tensor in run(net, x, hx).items():
            results[f"step {step}, {name}"] = tensor
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # a Li-GRU's may be very large
        optimizer.step()
    return results


@pytest.mark.parametrize("device", DEVICES)
def test_random_networks(capsys, device):
    """As near as SpeechBrain's network is to itself when the input moves by rounding errors.

    BatchNorm of two rows, or a LayerNorm of four values, amplifies those without bound.
    """
    layers = 0
    for random in draw_cases(capsys, f"networks on {device}", CASES[device]):
        cell, arguments = draw_network(random)
        print(cell, arguments)
        shape = arguments["shape"]
        batch_norm = "batchnorm" in arguments.values()
        if batch_norm and shape[0] * shape[1] == 1 and not arguments["bidirectional"]:
            continue  # BatchNorm refuses a single row
        seed, rate = random.randrange(1000), random.choice([0.0, 0.03])
        torch.manual_seed(seed)
        inputs = [torch.randn(shape, dtype=torch.float64).to(device) for _ in range(3)]
        state = draw_state(random, arguments)
        states = [None, None if state is None else state.to(device), None]
        rows = shape[0] * (2 if arguments["bidirectional"] else 1)
        results = []
        for which, moved in ((0, 0.0), (0, 1e-15), (1, 0.0)):
            pair = build_pair(cell, device, seed=seed, **arguments)
            share_masks(*pair, rows)
            assert isinstance(pair[1].rnn[0], SLiGRU_Layer if cell == "SLiGRU" else LiGRU_Layer)
            given = [x * (1 + moved * torch.randn_like(x)) for x in inputs]
            results.append(steps_of(pair[which], given, states, rate))
        expected, perturbed, ours = results
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype, name
            scale, error, sensitivity = (
                float((a - b).double().norm())
                for a, b in ((tensor, 0), (ours[name], tensor), (perturbed[name], tensor))
            )
            bound = 1e-11 * max(scale, 1.0) + 1000 * sensitivity
            assert error <= bound or math.isnan(scale), f"{name}: {error:.1e} > {bound:.1e}"
        layers += arguments["num_layers"]
    assert layers > CASES[device] / 2
