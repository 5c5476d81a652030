"""SpeechBrain's models made ours in place, and back."""

import copy
import io
import warnings

import pytest
import torch
from speechbrain.decoders import scorer, seq2seq
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet import RNN
from speechbrain.nnet.linear import Linear
from torch import nn

import sb_fast_sligru
from sb_fast_sligru import accelerate, restore
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
        with pytest.raises(ValueError, match="module must be a torch.nn.Module, but is str"):
            function("model")
