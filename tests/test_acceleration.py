"""SpeechBrain's models made ours in place, and back."""

import copy
import io
import warnings

import pytest
import torch
from speechbrain.decoders import scorer, seq2seq
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet import RNN, containers
from speechbrain.nnet.linear import Linear
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import sb_fast_sligru
from sb_fast_sligru import accelerate, restore, rnn
from sb_fast_sligru.ops import _backends
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [RNN.SLiGRU, RNN.LiGRU]


def make_recogniser(rnn_class=RNN.SLiGRU):
    """A whole recogniser of SpeechBrain's classes: encoder, decoder, and a search with CTC."""
    torch.manual_seed(0)
    encoder = CRDNN(
        input_shape=[None, None, 8], cnn_channels=[4, 4], rnn_class=rnn_class, rnn_layers=2,
        rnn_neurons=6, rnn_bidirectional=True, rnn_re_init=True, dnn_blocks=1, dnn_neurons=10,
        cnn_blocks=2,
    )  # fmt: skip
    decoder = RNN.AttentionalRNNDecoder(
        "gru", "location", hidden_size=7, attn_dim=5, num_layers=1, enc_dim=10, input_size=6,
        channels=2, kernel_size=3,
    )  # fmt: skip
    ctc = scorer.CTCScorer(Linear(input_size=10, n_neurons=9), blank_index=0, eos_index=2)
    builder = scorer.ScorerBuilder({"ctc": 0.4}, partial_scorers=[ctc])
    options = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.0, "max_decode_ratio": 1.0}
    options |= {"embedding": nn.Embedding(9, 6), "decoder": decoder}
    options |= {"linear": Linear(input_size=7, n_neurons=9)}
    return nn.ModuleDict(
        {
            "encoder": encoder,
            "beam": seq2seq.S2SRNNBeamSearcher(**options, beam_size=3, scorer=builder),
            "greedy": seq2seq.S2SRNNGreedySearcher(**options),
        }
    )


def make_net(rnn_class=RNN.SLiGRU, **arguments):
    """One network in float64, whose results the loop and the operator give to the last digits."""
    torch.manual_seed(0)
    arguments = {"hidden_size": 5, "input_shape": [3, None, 5], "num_layers": 2} | arguments
    return rnn_class(**arguments).double()


def random_input():
    return torch.randn(3, 7, 5, dtype=torch.float64)


def calls_operator(graph_module):
    return any("light_gru" in str(node.target) for node in graph_module.graph.nodes)


def recognise(model, x):
    states = model.encoder(x)
    wav_len = torch.ones(len(x))
    return states, [model[name](states, wav_len)[0] for name in ("beam", "greedy")]


EXPECTED = {
    "encoder": "CRDNN",
    "encoder.RNN": "SLiGRU",
    "encoder.RNN.rnn.0": "SLiGRU_Layer",
    "encoder.RNN.rnn.1": "SLiGRU_Layer",
    "beam": "S2SRNNBeamSearcher",
    "beam.scorer.partial_scorers.ctc": "CTCScorer",
    "beam.dec": "AttentionalRNNDecoder",
    "greedy": "S2SRNNGreedySearcher",
}


def test_a_recogniser_is_ours_and_gives_the_same():
    model = make_recogniser().eval()
    x = torch.randn(2, 30, 8)
    states, hyps = recognise(model, x)
    before = model.state_dict()
    parameters = list(model.parameters())
    parts = accelerate(model)
    assert {part.name: part.kind for part in parts} == EXPECTED
    assert all(part.is_ours and not part.reason for part in parts), "\n".join(map(str, parts))
    assert type(model.encoder) is sb_fast_sligru.CRDNN
    assert type(model.beam.scorer.partial_scorers["ctc"]) is sb_fast_sligru.CTCScorer
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    after = model.state_dict()
    assert list(after) == list(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        our_states, our_hyps = recognise(model, x)
    assert relative_error(our_states, states) < 1e-5 and our_hyps == hyps


@pytest.mark.parametrize("rnn_class", CELLS)
def test_restored_it_is_as_it_was(rnn_class):
    model = make_recogniser(rnn_class)
    kinds = [type(part) for part in model.modules()]
    names = [set(vars(part)) for part in model.modules()]
    parts = accelerate(model)
    assert sorted(restore(model)) == sorted(part.name for part in parts)
    assert [type(part) for part in model.modules()] == kinds
    assert [set(vars(part)) for part in model.modules()] == names
    assert type(model.beam.scorer.partial_scorers["ctc"]) is scorer.CTCScorer
    assert restore(model) == []
    model.eval()
    recognise(model, torch.randn(2, 30, 8))


def test_a_second_call_changes_nothing():
    model = make_recogniser()
    first = accelerate(model)
    before = [dict(vars(part)) for part in model.modules()]
    assert accelerate(model) == first
    assert [dict(vars(part)) for part in model.modules()] == before
    assert len(restore(model)) == len(first)


@pytest.mark.parametrize("rnn_class", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_training_goes_on_with_the_same_optimiser(rnn_class, bidirectional):
    """Two updates as SpeechBrain's, two as ours, and all four as SpeechBrain's."""
    torch.manual_seed(0)
    theirs = rnn_class(
        hidden_size=5, input_shape=[3, None, 4], num_layers=2, bidirectional=bidirectional
    ).double()
    ours = copy.deepcopy(theirs)
    inputs = [torch.randn(3, 7, 4, dtype=torch.float64) for _ in range(4)]
    for net in (theirs, ours):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        seen = []
        net.rnn[0].w.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        for index, x in enumerate(inputs):
            if net is ours and index == 2:
                assert all(part.is_ours for part in accelerate(net))
            optimizer.zero_grad()
            net(x)[0].square().mean().backward()
            optimizer.step()
        assert len(seen) == len(inputs)
    for actual, expected in zip(
        ours.state_dict().values(), theirs.state_dict().values(), strict=True
    ):
        assert relative_error(actual.double(), expected.double()) < 1e-9


# Where models come from ------------------------------------------------------------------------


class Tokens:
    """A tokenizer of numbers."""

    def decode_ids(self, tokens):
        return " ".join(map(str, tokens))


PRETRAINED = """
enc: !new:speechbrain.lobes.models.CRDNN.CRDNN
    input_shape: [null, null, 20]
    cnn_channels: [4, 4]
    rnn_class: !name:speechbrain.nnet.RNN.{cell}
    rnn_layers: 2
    rnn_neurons: 6
    rnn_bidirectional: True
    dnn_blocks: 1
    dnn_neurons: 10
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !new:speechbrain.lobes.features.Fbank
        n_mels: 20
    enc: !ref <enc>
    head: !ref <{head}>
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 10
    n_neurons: 9
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
log_probs: !new:speechbrain.nnet.containers.Sequential
    lin: !ref <ctc_lin>
    softmax: !ref <log_softmax>
nothing: !new:torch.nn.Identity
emb: !new:torch.nn.Embedding
    num_embeddings: 9
    embedding_dim: 6
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: 7
    n_neurons: 9
dec: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    rnn_type: gru
    attn_type: location
    hidden_size: 7
    attn_dim: 5
    num_layers: 1
    enc_dim: 10
    input_size: 6
    channels: 2
    kernel_size: 3
search: !new:speechbrain.decoders.seq2seq.S2SRNNBeamSearcher
    embedding: !ref <emb>
    decoder: !ref <dec>
    linear: !ref <seq_lin>
    bos_index: 1
    eos_index: 2
    min_decode_ratio: 0.0
    max_decode_ratio: 1.0
    beam_size: 3
    scorer: !new:speechbrain.decoders.scorer.ScorerBuilder
        weights:
            ctc: 0.4
        partial_scorers:
            - !new:speechbrain.decoders.scorer.CTCScorer
                ctc_fc: !ref <ctc_lin>
                blank_index: 0
                eos_index: 2
model: !new:torch.nn.ModuleList
    - [!ref <enc>, !ref <ctc_lin>, !ref <emb>, !ref <dec>, !ref <seq_lin>]
blank_index: 0
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: !ref <blank_index>
tokenizer: !new:test_acceleration.Tokens
modules:
    encoder: !ref <encoder>
    decoder: !ref <search>
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        model: !ref <model>
"""


@pytest.mark.parametrize("kind", [EncoderASR, EncoderDecoderASR])
@pytest.mark.parametrize("cell", ["SLiGRU", "LiGRU"])
def test_pretrained_recognisers(kind, cell, tmp_path):
    """From a folder, as SpeechBrain's are loaded; its checkpoint of today loads into either."""
    head = "log_probs" if kind is EncoderASR else "nothing"
    (tmp_path / "hyperparams.yaml").write_text(PRETRAINED.format(cell=cell, head=head))
    recogniser = make_recogniser(getattr(RNN, cell))
    crdnn = CRDNN(
        input_shape=[None, None, 20], cnn_channels=[4, 4], rnn_class=getattr(RNN, cell),
        rnn_layers=2, rnn_neurons=6, rnn_bidirectional=True, dnn_blocks=1, dnn_neurons=10,
    )  # fmt: skip
    search = recogniser.beam
    ctc_lin = search.scorer.partial_scorers["ctc"].ctc_fc
    trained = nn.ModuleList([crdnn, ctc_lin, search.emb, search.dec, search.fc])
    torch.save(trained.state_dict(), tmp_path / "model.ckpt")
    asr = kind.from_hparams(source=str(tmp_path), run_opts={"device": "cpu"})
    wavs, lens = 0.1 * torch.randn(2, 9000), torch.tensor([1.0, 0.7])
    states, texts = asr.encode_batch(wavs, lens), asr.transcribe_batch(wavs, lens)
    before = asr.state_dict()
    parts = accelerate(asr)
    assert all(part.is_ours and not part.reason for part in parts), "\n".join(map(str, parts))
    kinds = {part.kind for part in parts}
    assert kinds == {
        "CRDNN", cell, f"{cell}_Layer", "S2SRNNBeamSearcher", "CTCScorer", "AttentionalRNNDecoder",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sb_fast_sligru runs")
        assert relative_error(asr.encode_batch(wavs, lens), states) < 1e-4
        assert asr.transcribe_batch(wavs, lens) == texts
    assert any(texts[0])
    assert list(asr.state_dict()) == list(before)
    trained.load_state_dict(asr.hparams.model.state_dict(), strict=True)
    assert len(restore(asr)) == len(parts)
    assert torch.equal(asr.encode_batch(wavs, lens), states)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_data_parallel_models(when, one_process):
    nets = [DistributedDataParallel(make_net(bidirectional=True)) for _ in range(2)]
    if when == "before":
        nets[1] = make_net(bidirectional=True)
    assert all(part.is_ours for part in accelerate(nets[1]))
    if when == "before":
        nets[1] = DistributedDataParallel(nets[1])
    x = random_input()
    for net in nets:
        net(x)[0].square().mean().backward()
    theirs, ours = (net.module for net in nets)
    assert type(ours.rnn[0]) is rnn.SLiGRU_Layer
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) < 1e-9, name


def test_a_model_from_a_file():
    """Of torch.save, as SpeechBrain's objects; its checkpoint is SpeechBrain's afterwards too."""
    theirs, buffer = make_net(), io.BytesIO()
    torch.save(theirs, buffer)
    buffer.seek(0)
    ours = torch.load(buffer, weights_only=False)
    accelerate(ours)
    x = random_input()
    assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-12
    checkpoint = io.BytesIO()
    torch.save(ours.state_dict(), checkpoint)
    checkpoint.seek(0)
    stock = make_net()
    stock.load_state_dict(torch.load(checkpoint, weights_only=True), strict=True)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_models_without_memory_yet(monkeypatch):
    """On the meta device, as large models are built, and then with the weights of a file."""
    monkeypatch.setattr(_backends, "_warned", set())
    theirs = make_net().float()  # the dtype that autocast is about
    ours = copy.deepcopy(theirs).to("meta")
    assert all(part.is_ours for part in accelerate(ours))
    with pytest.warns(UserWarning, match="no kernels for meta tensors"):
        assert ours(random_input().to("meta", torch.float32))[0].shape == (3, 7, 5)
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    x = random_input().float()
    assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_modes(dtype):
    """What was set before stays: dtype, training or evaluation of each part, frozen parameters."""
    net = make_net(bidirectional=True).to(dtype)
    net.rnn[0].norm.eval()
    net.rnn[1].eval().requires_grad_(False)
    before = [(part.training, *(p.requires_grad for p in part.parameters(False)))
              for part in net.modules()]  # fmt: skip
    twin = copy.deepcopy(net)
    accelerate(net)
    after = [(part.training, *(p.requires_grad for p in part.parameters(False)))
             for part in net.modules()]  # fmt: skip
    assert after == before
    x = random_input().to(dtype)
    actual, expected = net(x)[0], twin(x)[0]
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (1e-12 if dtype == torch.float64 else 0.02)


# How they are built ----------------------------------------------------------------------------


def test_containers_and_parts_in_several_places():
    shared = make_net().float()
    sequence = containers.Sequential(input_shape=[3, None, 5])
    sequence.append(shared, layer_name="first")
    sequence.append(RNN.LiGRU, hidden_size=4, layer_name="second")
    model = nn.ModuleDict(
        {"a": sequence, "b": nn.ModuleList([shared, nn.Sequential(shared.rnn[0])])}
    ).double()
    x = random_input()
    expected = model["a"](x)
    parts = accelerate(model)
    names = ["a.first", "a.first.rnn.0", "a.first.rnn.1", "a.second", "a.second.rnn.0"]
    assert [part.name for part in parts] == names and all(part.is_ours for part in parts)
    assert model["b"][0] is shared and type(model["b"][1][0]) is rnn.SLiGRU_Layer
    assert relative_error(model["a"](x), expected) < 1e-12
    assert restore(model) == names


def test_a_scorer_of_several_searches_is_told_once():
    model = make_recogniser()
    model.greedy.scorer = model.beam.scorer
    parts = accelerate(model)
    assert {part.name: part.kind for part in parts} == EXPECTED and len(parts) == len(EXPECTED)
    assert sorted(restore(model)) == sorted(EXPECTED)


def test_tied_parameters_stay_tied():
    nets = [make_net() for _ in range(2)]
    for net in nets:
        net.rnn[1].u, net.rnn[1].w.weight = net.rnn[0].u, net.rnn[0].w.weight
    theirs, ours = nets
    accelerate(ours)
    assert ours.rnn[1].u is ours.rnn[0].u and ours.rnn[1].w.weight is ours.rnn[0].w.weight
    x = random_input()
    for net in nets:
        net(x)[0].square().mean().backward()
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert relative_error(actual.grad, expected.grad) < 1e-9, name


class PlusOne(nn.Module):
    def forward(self, tensor):
        return tensor + 1


def test_parametrised_parts():
    """Of a Linear inside a layer nothing is seen; a layer's own buffer gives it another class."""
    nets = [make_net() for _ in range(2)]
    for net in nets:
        parametrize.register_parametrization(net.rnn[0].u, "weight", PlusOne())
        parametrize.register_parametrization(net.rnn[1], "h_init", PlusOne())
    theirs, ours = nets
    parts = accelerate(ours)
    assert [part.is_ours for part in parts] == [True, True, False] and not parts[1].reason
    assert parts[2].reason.endswith("ParametrizedSLiGRU_Layer is a class of its own")
    x = random_input()
    assert relative_error(ours(x)[0], theirs(x)[0]) < 1e-12


def test_what_has_another_class_since_is_not_restored():
    net = make_net()
    accelerate(net)
    parametrize.register_parametrization(net.rnn[1], "h_init", PlusOne())
    parts = accelerate(net)
    assert all(part.is_ours for part in parts)
    x = random_input()
    expected = net(x)[0]
    assert restore(net) == ["", "rnn.0"]
    assert relative_error(net(x)[0], expected) < 1e-12
    parametrize.remove_parametrizations(net.rnn[1], "h_init")
    assert restore(net) == ["rnn.1"] and type(net.rnn[1]) is RNN.SLiGRU_Layer


def test_hooks_are_called():
    net, calls = make_net(num_layers=1), []
    layer = net.rnn[0]
    for name, part in {"net": net, "layer": layer, "w": layer.w, "norm": layer.norm}.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(f"before {name}"))
        part.register_forward_hook(lambda *_, name=name: calls.append(f"after {name}"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    net.register_state_dict_post_hook(lambda *_: calls.append("state"))

    def use():
        calls.clear()
        net(random_input().requires_grad_())[0].sum().backward()
        net.state_dict()
        return list(calls)

    expected = use()
    assert not any(part.reason for part in accelerate(net))
    assert use() == expected and len(expected) == 10


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
def test_compiled_models_are_compiled_anew(in_place):
    graphs = []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    net, x = make_net().eval(), random_input()
    compiled = net if in_place else torch.compile(net, backend=backend)
    if in_place:
        net.compile(backend=backend)
    with torch.no_grad():
        expected = compiled(x)[0]
        assert not any(map(calls_operator, graphs))
        graphs.clear()
        assert all(part.is_ours for part in accelerate(compiled))
        assert relative_error(compiled(x)[0], expected) < 1e-12
    assert any(map(calls_operator, graphs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_what_torch_jit_has_compiled_is_told(method):
    def compile_net(net):
        return torch.jit.script(net) if method == "script" else torch.jit.trace(net, x)

    net, x = make_net(num_layers=1).eval(), random_input()
    expected = net(x)[0]
    parts = accelerate(nn.Sequential(compile_net(net)))
    assert [(part.name, part.kind) for part in parts] == [
        ("0", "SLiGRU"),
        ("0.rnn.0", "SLiGRU_Layer"),
    ]
    assert {str(part.is_ours) + part.reason for part in parts} == {
        "Falsetorch.jit has compiled it: accelerate before"
    }
    accelerate(net)
    ours = compile_net(net)
    assert accelerate(ours) == []
    assert relative_error(ours(x)[0], expected) < 1e-12


# Copies, and what is told ----------------------------------------------------------------------


def test_copied_and_pickled_models_stay_ours():
    model = make_recogniser()
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other.encoder.RNN) is sb_fast_sligru.SLiGRU
        restore(other)
        assert type(other.encoder.RNN) is RNN.SLiGRU
    assert type(model.encoder.RNN) is sb_fast_sligru.SLiGRU


class Own(RNN.SLiGRU):
    def forward(self, x, hx=None):
        return super().forward(2 * x, hx)


def test_what_is_left_alone_is_told():
    own = Own(hidden_size=5, input_shape=[None, None, 4])
    parts = accelerate(nn.Sequential(own))
    assert type(own) is Own
    assert parts[0].name == "0" and not parts[0].is_ours
    assert parts[0].reason == f"{__name__}.Own is a class of its own"
    assert str(parts[0]) == f"0: Own, SpeechBrain's ({__name__}.Own is a class of its own)"
    assert parts[1].is_ours  # its layer is SpeechBrain's, and is faster as ours
    x = torch.randn(2, 6, 4)
    found = own(x)[0]
    restore(own)
    assert relative_error(found, own(x)[0]) < 1e-5


class OwnOfOurs(sb_fast_sligru.LiGRU):
    pass


def test_a_subclass_of_ours_is_ours():
    part = accelerate(OwnOfOurs(hidden_size=5, input_shape=[None, None, 4]))[0]
    assert part.is_ours and not part.reason


@pytest.mark.parametrize("method", ["forward", "_sligru_cell"])
def test_an_object_with_a_method_of_its_own_is_left_alone(method):
    """Mixed-precision wrappers, for one, put a forward into an object."""
    net = make_net(num_layers=1)
    layer = net.rnn[0]
    original = getattr(layer, method)
    setattr(layer, method, lambda *args, **options: 2 * original(*args, **options))
    x = random_input()
    expected = net(x)[0]
    part = accelerate(net)[1]
    assert not part.is_ours and part.reason == f"{method} of it was replaced"
    assert relative_error(net(x)[0], expected) < 1e-12


def test_an_activation_that_no_kernel_has_is_told():
    net = RNN.LiGRU(hidden_size=5, input_shape=[None, None, 4])
    net.rnn[0].act = nn.GELU()
    parts = accelerate(net)
    assert [part.is_ours for part in parts] == [True, False]
    assert "the operator has no activation like GELU" in parts[1].reason
    assert "activation" not in vars(net.rnn[0])


def test_parts_that_run_speechbrains_code_all_the_same_are_told():
    net = RNN.LiGRU(hidden_size=5, input_shape=[None, None, 4])
    net.rnn[0].u.register_forward_hook(lambda *_: None)
    part = accelerate(net)[1]
    assert part.is_ours and part.reason.startswith("u of a layer is ")


def test_decoders_and_searches_that_run_speechbrains_code_are_told():
    model = make_recogniser()
    for search in (model.beam, model.greedy):
        search.dec.num_layers = 2
    reasons = {part.name: part.reason for part in accelerate(model) if part.reason}
    expected = "num_layers of the decoder is 2, the kernels need 1"
    assert reasons == dict.fromkeys(("beam", "beam.dec", "greedy"), expected)


def test_what_was_built_as_ours_stays_so():
    net = nn.ModuleList(
        kind(hidden_size=5, input_shape=[None, None, 4])
        for kind in (sb_fast_sligru.SLiGRU, RNN.SLiGRU)
    )
    assert all(part.is_ours for part in accelerate(net))
    assert restore(net) == ["1", "1.rnn.0"]
    assert type(net[0]) is sb_fast_sligru.SLiGRU


def test_models_without_any_part():
    assert accelerate(nn.Linear(2, 2)) == [] and restore(nn.Linear(2, 2)) == []
    for function in (accelerate, restore):
        for model, name in (("model", "str"), (RNN.SLiGRU, "type"), (None, "NoneType")):
            with pytest.raises(ValueError, match=f"must be a torch.nn.Module, but is {name}"):
                function(model)
