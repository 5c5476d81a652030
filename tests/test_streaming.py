"""Chunks of a stream against one pass of the same layers, which are SpeechBrain's and ours."""

import copy
import itertools
import pickle

import pytest
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models import CRDNN as stock
from speechbrain.nnet import RNN, activations, containers, linear
from speechbrain.processing.features import InputNormalization
from torch import nn

import sb_fast_sligru
from sb_fast_sligru import CRDNN, LiGRU, SLiGRU, StreamingEncoder, StreamingFbank, streaming
from sb_fast_sligru.reference import relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*sb_fast_sligru runs SpeechBrain's CNN"),
]

SAMPLES = 9999
SIZES = {
    "input_size": 20,
    "cnn_channels": [3, 4],
    "time_pooling": True,
    "time_pooling_size": 4,
    "rnn_class": SLiGRU,
    "rnn_layers": 3,
    "rnn_neurons": 8,
    "rnn_bidirectional": False,
    "dnn_neurons": 6,
}
# Arguments of the CRDNN.
CASES = {
    "recipe": {},
    "mini": {"cnn_blocks": 1, "time_pooling_size": 2, "rnn_layers": 2},
    "Li-GRU": {"rnn_class": LiGRU},
    "no-time-pooling": {"time_pooling": False},
    "pooling-in-time-too": {"using_2d_pooling": True, "time_pooling_size": 3},
    "wide-kernels": {"cnn_kernelsize": (3, 7)},
    "kernels-of-one-frame": {"cnn_kernelsize": (5, 1)},
    "one-channel": {"cnn_channels": [4, 1]},
    "no-CNN": {"cnn_blocks": 0, "time_pooling": False},
    "projections": {"use_rnnp": True, "projection_dim": 7},
    "other-activation": {"activation": nn.ReLU},
}
# Samples of each chunk.
CUTS = {
    "state-by-state": [640] * 15 + [399],
    "odd": [1, 7, 160, 319, 3, 1000, 4321, 0, 2, 4000, 186],
    "sample-by-sample": [1] * 900 + [SAMPLES - 900],
    "at-once": [SAMPLES],
}
either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def build(crdnn_class=CRDNN, dtype=torch.float64, device="cpu", seed=0, **arguments):
    """An encoder none of whose weights and statistics are at a default."""
    torch.manual_seed(seed)
    arguments = SIZES | arguments
    crdnn = crdnn_class(**arguments)
    normalize = InputNormalization()
    normalize.glob_mean = (10 * torch.randn(20)).to(device, dtype)
    normalize.glob_std = (5 + 5 * torch.rand(20)).to(device, dtype)
    encoder = containers.LengthsCapableSequential(
        compute_features=StreamingFbank(n_mels=20),
        normalize=normalize,
        enc=crdnn,
        ctc_lin=linear.Linear(input_size=crdnn.get_output_shape()[-1], n_neurons=5),
    )
    with torch.no_grad():
        for name, tensor in itertools.chain(encoder.named_parameters(), encoder.named_buffers()):
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.3, 3.0)
    return encoder.to(device, dtype).eval()


def random_speech(batch=2, samples=SAMPLES, dtype=torch.float64, device="cpu"):
    return 0.1 * torch.randn(batch, samples, dtype=dtype, device=device)


def hear(encoder, speech, cuts):
    """The states of each chunk."""
    context = encoder.make_streaming_context()
    chunks = speech.split(cuts, 1)
    return [
        encoder(chunk, context, is_last=number == len(chunks))
        for number, chunk in enumerate(chunks, 1)
    ]


# Equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("crdnn_class", [stock.CRDNN, CRDNN], ids=["theirs", "ours"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_chunks_are_one_pass(arguments, cuts, crdnn_class):
    encoder, speech = build(crdnn_class, **arguments), random_speech()
    states = torch.cat(hear(StreamingEncoder(encoder), speech, cuts), 1)
    with torch.no_grad():
        assert relative_error(states, encoder(speech)) < 1e-12


@pytest.mark.parametrize("rnn_class", [RNN.SLiGRU, RNN.LiGRU])
def test_speechbrains_own_layers(rnn_class):
    encoder, speech = build(stock.CRDNN, rnn_class=rnn_class), random_speech()
    states = torch.cat(hear(StreamingEncoder(encoder), speech, CUTS["odd"]), 1)
    with torch.no_grad():
        assert relative_error(states, encoder(speech)) < 1e-12


@either_device
def test_float32_and_log_probabilities(device):
    encoder = build(dtype=torch.float32, device=device)
    encoder.append(activations.Softmax(apply_log=True).eval())
    speech = random_speech(dtype=torch.float32, device=device)
    states = torch.cat(hear(StreamingEncoder(encoder), speech, CUTS["state-by-state"]), 1)
    with torch.no_grad():
        assert relative_error(states, encoder(speech)) < 1e-4


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_streams_of_any_length(arguments):
    encoder = build(**arguments)
    stream = StreamingEncoder(encoder)
    longer = range(stream.shortest, stream.shortest + 3 * stream.stride, 79)
    for samples in (stream.shortest, *longer):
        speech = random_speech(samples=samples)
        states = torch.cat(hear(stream, speech, [samples // 2, samples - samples // 2]), 1)
        with torch.no_grad():
            expected = encoder(speech)
        assert expected.shape[1] >= 1
        assert relative_error(states, expected) < 1e-12


def test_streams_in_step_are_those_alone():
    stream, speech = StreamingEncoder(build()), random_speech(batch=3)
    together = torch.cat(hear(stream, speech, CUTS["odd"]), 1)
    for row in range(3):
        alone = torch.cat(hear(stream, speech[row : row + 1], CUTS["odd"]), 1)
        assert relative_error(together[row : row + 1], alone) < 1e-12


def test_streams_by_turns():
    stream, speech = StreamingEncoder(build()), random_speech()
    contexts = [stream.make_streaming_context() for _ in range(2)]
    states = [[], []]
    for chunk in speech.split(640, 1):
        for number, context in enumerate(contexts):
            own = chunk[number : number + 1]
            states[number].append(stream(own, context, is_last=own.shape[1] < 640))
    for number, (own, context) in enumerate(zip(states, contexts, strict=True)):
        assert context.is_over and context.samples == SAMPLES
        alone = torch.cat(hear(stream, speech[number : number + 1], [SAMPLES]), 1)
        assert relative_error(torch.cat(own, 1), alone) < 1e-12


def test_the_loop_hears_the_same():
    stream, speech = StreamingEncoder(build()), random_speech()
    expected = torch.cat(hear(stream, speech, CUTS["odd"]), 1)
    with sb_fast_sligru.backend("reference"):
        states = torch.cat(hear(stream, speech, CUTS["odd"]), 1)
    assert relative_error(states, expected) < 1e-12


# Lateness -------------------------------------------------------------------------------------


def test_lookahead_of_the_recipes():
    """Windows of 25 ms; four convolutions of 10 ms frames, or two of 20 ms frames."""
    for arguments, hop, lookahead in ((CASES["recipe"], 10, 42.5), (CASES["mini"], 20, 32.5)):
        encoder = build(**arguments)
        encoder["compute_features"] = StreamingFbank(n_mels=20, hop_length=hop).double().eval()
        stream = StreamingEncoder(encoder)
        assert stream.stride == 640
        assert stream.lookahead_ms == lookahead == stream.lookahead / 16


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_state_comes_with_its_last_sample(arguments):
    stream = StreamingEncoder(build(**arguments))
    speech = random_speech(batch=1, samples=6 * stream.stride + stream.lookahead)
    for state in (0, 1, 4):
        needed = (state + 1) * stream.stride + stream.lookahead
        context = stream.make_streaming_context()
        before = stream(speech[:, : needed - 1], context)
        after = stream(speech[:, needed - 1 : needed], context)
        assert (before.shape[1], after.shape[1]) == (state, 1)
        assert before.shape[2] == after.shape[2] == 5


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_a_state_needs_its_last_sample_and_none_after_it(arguments):
    stream = StreamingEncoder(build(**arguments))
    speech = random_speech(batch=1, samples=8 * stream.stride + stream.lookahead)
    expected = torch.cat(hear(stream, speech, speech.shape[1]), 1)
    needed = 4 * stream.stride + stream.lookahead  # of states 0 to 3
    for first, same in ((needed, 4), (needed - 1, 3)):
        changed = speech.clone()
        # So loud that max-pooling does not hide it.
        changed[:, first:] += 1000 * torch.randn_like(changed[:, first:])
        states = torch.cat(hear(stream, changed, changed.shape[1]), 1)
        is_same = (states - expected).abs().amax((0, 2)) < 1e-9
        assert is_same[:same].all() and not is_same[same:].any()


# CUDA graphs ----------------------------------------------------------------------------------


class PretendedReplay:
    """Returns the same tensors at each call, as a graph does."""

    made = 0

    def __init__(self, function):
        self.function, self.outputs = function, None
        PretendedReplay.made += 1

    def __call__(self, *inputs):
        outputs = self.function(*(each.clone() for each in inputs))
        if self.outputs is None:
            self.outputs = [each.clone() for each in outputs]
        for own, new in zip(self.outputs, outputs, strict=True):
            own.copy_(new)
        return self.outputs


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_what_is_done_on_a_gpu_alone(arguments, monkeypatch):
    """Streams by turns, and chunks of two sizes: one graph each."""
    monkeypatch.setattr(streaming, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(streaming, "Replay", PretendedReplay)
    monkeypatch.setattr(PretendedReplay, "made", 0)
    stream = StreamingEncoder(build(**arguments))
    size = 2 * stream.stride
    sizes = [size] * 6 + [3 * size] * 4
    speech = random_speech(batch=4, samples=sum(sizes) + 100)
    contexts, states = [stream.make_streaming_context() for _ in range(2)], [[], []]
    for chunk in speech.split([*sizes, 100], 1):
        for number, context in enumerate(contexts):
            own = chunk[2 * number :][:2]
            states[number].append(stream(own, context, is_last=own.shape[1] == 100))
    assert PretendedReplay.made == 2
    with torch.no_grad():
        expected = stream.encoder(speech)
    assert relative_error(torch.cat([torch.cat(each, 1) for each in states]), expected) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_chunks_are_graphs_on_a_gpu(arguments):
    encoder = build(dtype=torch.float32, device="cuda", **arguments)
    stream = StreamingEncoder(encoder)
    speech = random_speech(samples=30 * stream.stride, dtype=torch.float32, device="cuda")
    states = torch.cat(hear(stream, speech, [2 * stream.stride] * 15), 1)
    (replay,) = stream._replays.values()
    assert replay.graph is not None
    with torch.no_grad():
        assert relative_error(states, encoder(speech)) < 1e-4
        for parameter in encoder.parameters():
            parameter.mul_(0.9)
        states = torch.cat(hear(stream, speech, [2 * stream.stride] * 15), 1)
        assert relative_error(states, encoder(speech)) < 1e-4


@pytest.mark.gpu
def test_autocast_on_a_gpu_is_no_graph():
    encoder = build(dtype=torch.float32, device="cuda")
    stream, speech = StreamingEncoder(encoder), random_speech(dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        states = torch.cat(hear(stream, speech, CUTS["state-by-state"]), 1)
        assert not stream._replays
        assert relative_error(states, encoder(speech)) < 0.1


# State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))]
)
def test_copies(duplicate, monkeypatch):
    monkeypatch.setattr(streaming, "_is_on_gpu", lambda x: True)
    stream, speech = StreamingEncoder(build()), random_speech()
    expected = torch.cat(hear(stream, speech, CUTS["state-by-state"]), 1)
    assert stream._replays
    twin = duplicate(stream)
    assert not twin._replays
    with torch.no_grad():
        for parameter in stream.parameters():
            parameter.zero_()
    assert relative_error(torch.cat(hear(twin, speech, [SAMPLES]), 1), expected) < 1e-12


def test_another_dtype(monkeypatch):
    monkeypatch.setattr(streaming, "_is_on_gpu", lambda x: True)
    encoder = build()
    stream, speech = StreamingEncoder(encoder), random_speech()
    expected = torch.cat(hear(stream, speech, CUTS["state-by-state"]), 1)
    stream.float()
    assert not stream._replays
    encoder.normalize.glob_mean = encoder.normalize.glob_mean.float()
    encoder.normalize.glob_std = encoder.normalize.glob_std.float()
    states = torch.cat(hear(stream, speech.float(), CUTS["state-by-state"]), 1)
    assert states.dtype == torch.float32
    assert relative_error(states, expected) < 1e-4


def test_nothing_is_recorded_for_gradients():
    states = hear(StreamingEncoder(build()), random_speech(), [SAMPLES - 99, 99])
    assert not any(each.requires_grad for each in states)


def test_gradients_of_what_comes_after():
    states = torch.cat(hear(StreamingEncoder(build()), random_speech(), [SAMPLES]), 1)
    weight = torch.randn(3, states.shape[2], dtype=states.dtype, requires_grad=True)
    (states @ weight.t()).sum().backward()
    assert relative_error(weight.grad, states.sum((0, 1)).expand(3, -1)) < 1e-12


# Bad input ------------------------------------------------------------------------------------

REFUSED = {
    "1-D": (torch.zeros(640).double(), "chunk must be .* but is .640. of torch.float64"),
    "dtype": (torch.zeros(2, 640), "chunk must be .* of torch.float64, but is .* torch.float32"),
    "streams": (torch.zeros(3, 640).double(), "chunk has 3 streams, but those before had 2"),
}


@pytest.mark.parametrize("chunk, message", REFUSED.values(), ids=REFUSED)
def test_bad_chunks_are_named_and_change_nothing(chunk, message):
    stream, speech = StreamingEncoder(build()), random_speech()
    context = stream.make_streaming_context()
    states = [stream(speech[:, :2000], context)]
    with pytest.raises(ValueError, match=message):
        stream(chunk, context)
    states.append(stream(speech[:, 2000:], context, is_last=True))
    assert relative_error(torch.cat(states, 1), stream.encoder(speech)) < 1e-12


def test_streams_that_are_over_or_too_short_are_named():
    stream = StreamingEncoder(build())
    context = stream.make_streaming_context()
    stream(random_speech(samples=100), context)
    with pytest.raises(ValueError, match="end after 479 samples, but need at least 480"):
        stream(random_speech(samples=379), context, is_last=True)
    stream(random_speech(samples=380), context, is_last=True)
    with pytest.raises(ValueError, match="context: its streams are over"):
        stream(random_speech(samples=640), context)


def test_training_mode_is_refused():
    encoder = build()
    stream = StreamingEncoder(encoder)
    encoder.train()
    with pytest.raises(ValueError, match="training mode"):
        stream(random_speech(), stream.make_streaming_context())
    encoder.eval()
    encoder.enc.RNN.train()
    with pytest.raises(ValueError, match="training mode"):
        StreamingEncoder(encoder)


def hooked(encoder):
    encoder.enc.RNN.rnn[0].u.register_forward_hook(lambda *_: None)


def replaced(name, layer):
    def change(encoder):
        encoder[name] = layer.eval()

    return change


def rnn(**arguments):
    return lambda encoder: setattr(encoder, "enc", CRDNN(**SIZES | arguments).eval())


def normalised_by(norm_type):
    return replaced("normalize", InputNormalization(norm_type=norm_type))


ENCODERS = {
    "bidirectional": (rnn(rnn_bidirectional=True), "enc.RNN is bidirectional"),
    "another RNN": (rnn(rnn_class=RNN.LSTM), r"enc.RNN is a speechbrain.nnet.RNN.LSTM, which"),
    "Fbank": (replaced("compute_features", Fbank()), "features.Fbank, whose floor .* Streaming"),
    "sentence": (normalised_by("sentence"), "normalize takes its statistics of a whole sentence,"),
    "batch": (normalised_by("batch"), 'of a whole batch, .* its norm_type must be "global"'),
    "no statistics": (normalised_by("global"), "normalize has no statistics"),
    "hooks": (hooked, "enc.RNN.rnn.0.u has hooks"),
    "no features": (lambda encoder: encoder.pop("compute_features"), "begin with a StreamingFbank"),
    "another layer": (replaced("ctc_lin", nn.Softmax(1)), "ctc_lin is a torch.*Softmax, which"),
}


@pytest.mark.parametrize("change, message", ENCODERS.values(), ids=ENCODERS)
def test_encoders_that_cannot_stream_are_named(change, message):
    encoder = build()
    change(encoder)
    with pytest.raises(ValueError, match=f"encoder.*{message}"):
        StreamingEncoder(encoder)
