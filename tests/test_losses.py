"""The CTC loss is SpeechBrain's: arguments, reductions, gradients."""

import pytest
import torch
from speechbrain.nnet import losses as stock

import sb_fast_sligru
from sb_fast_sligru import backend
from sb_fast_sligru.losses import REDUCTIONS

pytestmark = pytest.mark.usefixtures("one_thread")  # tensors are small

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)
BLANK = 1


def make_inputs(dtype=torch.float32, device="cpu"):
    """Five utterances: a full one, others shorter, one without tokens, one with too many."""
    log_probs = torch.randn(5, 40, 9).double().log_softmax(2).to(device, dtype)
    targets = torch.randint(2, 9, (5, 11), device=device)
    input_lens = torch.tensor([1.0, 0.51, 0.74, 0.3, 0.1])
    target_lens = torch.tensor([1.0, 0.6, 0.32, 0.0, 1.0])
    return log_probs, targets, input_lens, target_lens


def run(function, inputs, reduction):
    log_probs = inputs[0].detach().requires_grad_()
    loss = function(
        log_probs, *inputs[1:], BLANK, **({"reduction": reduction} if reduction else {})
    )
    return loss.detach().cpu(), torch.autograd.grad(loss.sum(), log_probs)[0].cpu()


@each_device
@pytest.mark.parametrize("reduction", [None, *REDUCTIONS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_speechbrains(reduction, dtype, device):
    inputs = make_inputs(dtype)
    if reduction == "batch":
        inputs[3][3] = 0.1  # of no tokens it is infinite, and its gradient too
    expected = run(stock.ctc_loss, inputs, reduction)
    there = [t.to(device) for t in inputs[:2]]
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    for lens in (inputs[2:], [t.to(device) for t in inputs[2:]]):  # on the host, and there
        with backend("reference" if (dtype, device) == (torch.float64, "cuda") else "auto"):
            results = run(sb_fast_sligru.ctc_loss, (*there, *lens), reduction)
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_no_tokens_have_an_infinite_loss_a_token_as_speechbrains():
    inputs = make_inputs()
    loss = sb_fast_sligru.ctc_loss(*inputs, BLANK, reduction="batch")
    expected = stock.ctc_loss(*inputs, BLANK, reduction="batch")
    assert torch.equal(loss.isinf(), expected.isinf()) and loss.isinf().tolist()[3]


def test_lengths_are_rounded_as_speechbrains():
    """Halves to the even number; integers that are 0 or 1."""
    log_probs, targets, *_ = make_inputs(torch.float64)
    for lens in (torch.tensor([0.5, 1.5, 2.5, 38.5, 39.5]) / 40, torch.tensor([1, 0, 1, 1, 0])):
        inputs = log_probs, targets, lens, torch.full((5,), 1.0 / 11)
        expected = run(stock.ctc_loss, inputs, "none")
        assert (expected[0] > 0).any()
        for ours, theirs in zip(
            run(sb_fast_sligru.ctc_loss, inputs, "none"), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_device
def test_16_bits_within_autocast(device):
    """They are taken as float32, as in PyTorch, which refuses them elsewhere."""
    inputs = [t.to(device) for t in make_inputs(torch.bfloat16)]
    with torch.autocast(device, torch.bfloat16):
        loss, gradient = run(sb_fast_sligru.ctc_loss, inputs, "none")
    wide = inputs[0].float(), *inputs[1:]
    expected = run(sb_fast_sligru.ctc_loss, wide, "none")
    assert torch.equal(loss, expected[0]) and loss.dtype == torch.float32
    assert torch.equal(gradient, expected[1].bfloat16())
    with pytest.raises(ValueError, match="log_probs: got torch.bfloat16, expected float64 or flo"):
        sb_fast_sligru.ctc_loss(*inputs, BLANK)


def test_targets_of_other_integers():
    log_probs, targets, *lens = make_inputs()
    expected = sb_fast_sligru.ctc_loss(log_probs, targets, *lens, BLANK)
    assert torch.equal(sb_fast_sligru.ctc_loss(log_probs, targets.int(), *lens, BLANK), expected)


@each_device
def test_compiles_in_one_graph(device):
    inputs = [t.to(device) for t in make_inputs()]
    torch._dynamo.reset()
    compiled = torch.compile(sb_fast_sligru.ctc_loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        run(compiled, inputs, "mean"), run(sb_fast_sligru.ctc_loss, inputs, "mean"), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


BAD_ARGUMENTS = {
    "reduction": ({"reduction": "max"}, "reduction: got 'max', expected one of mean, sum, batch"),
    "list": ({"log_probs": [0.0]}, "log_probs: got list, expected a torch.Tensor"),
    "rank": ({"log_probs": torch.zeros(5, 9)}, r"log_probs: got shape \(5, 9\).*\[B, T, V\]"),
    "targets": ({"targets": torch.ones(5)}, r"targets: got shape \(5,\), expected \[B, S\]"),
    "batch": ({"targets": torch.ones(4, 11)}, r"target_lens: got shape \(5,\), expected \[4\]"),
    "blank": ({"blank_index": 9}, "blank_index: got 9, expected an int from 0 to 8"),
    "lens-list": ({"input_lens": [1.0] * 5}, "input_lens: got list, expected a torch.Tensor"),
    "lens-shape": ({"input_lens": torch.ones(4)}, r"input_lens: got shape \(4,\).*\[5\]"),
    "lens-device": (
        {"target_lens": torch.ones(5, device="meta")},
        "target_lens: got device meta, expected cpu",
    ),
    "above": ({"input_lens": torch.full((5,), 1.02)}, r"input_lens: got \[1.01.*from 0 to 1"),
    "below": ({"target_lens": torch.full((5,), -0.5)}, r"target_lens: got \[-0.5.*from 0 to 1"),
    "nan": ({"target_lens": torch.full((5,), torch.nan)}, r"target_lens: got \[nan.*from 0 to 1"),
}


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name, case):
    changed, message = BAD_ARGUMENTS[case]
    keys = "log_probs", "targets", "input_lens", "target_lens"
    arguments = dict(zip(keys, make_inputs(), strict=True)) | {"blank_index": BLANK} | changed
    with backend(name), pytest.raises(ValueError, match=message):
        sb_fast_sligru.ctc_loss(**arguments)


def test_tokens_out_of_range_are_named():
    log_probs, targets, *lens = make_inputs()
    targets[0, 2] = 9
    with pytest.raises(RuntimeError, match="targets: got 9, expected 0 to 8"):
        sb_fast_sligru.ctc_loss(log_probs, targets, *lens, BLANK)


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [True, False])
def test_the_host_waits_nowhere(on_host):
    *tensors, input_lens, target_lens = make_inputs()
    tensors = [t.cuda() for t in tensors]
    lens = [t if on_host else t.cuda() for t in (input_lens, target_lens)]
    log_probs = tensors[0].requires_grad_()

    def step():
        log_probs.grad = None
        for reduction in REDUCTIONS:
            loss = sb_fast_sligru.ctc_loss(log_probs, tensors[1], *lens, BLANK, reduction=reduction)
            loss.sum().backward()

    step()  # also what is set up at the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_lengths_of_the_host_may_change_after_the_call():
    """They are copied before it returns, whatever the GPU has still to do."""
    *tensors, input_lens, target_lens = make_inputs()
    tensors = [t.cuda() for t in tensors]
    expected = sb_fast_sligru.ctc_loss(*tensors, input_lens, target_lens, BLANK)
    torch.cuda._sleep(50_000_000)
    losses = []
    for _ in range(3):
        lens = input_lens.clone(), target_lens.clone()
        losses.append(sb_fast_sligru.ctc_loss(*tensors, *lens, BLANK))
        for t in lens:
            t.zero_()
    assert all(torch.equal(loss, expected) for loss in losses)
