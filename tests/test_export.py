"""The whole CRDNN encoder: torch.compile, CUDA graphs, torch.export, AOTInductor, TorchScript."""

import io
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim

import sb_fast_sligru
from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 20
LENGTHS = [17, 22, 31, 40, 100, 41]
BATCHES = [3, 4, 1, 8, 16, 2]
DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
each_cell = pytest.mark.parametrize("rnn_class", [sb_fast_sligru.SLiGRU, sb_fast_sligru.LiGRU])


def build(dtype=torch.float32, device="cpu", rnn_class=sb_fast_sligru.SLiGRU, **arguments):
    """A small encoder with the layers of the recipes'; BatchNorm has seen some batches."""
    net = sb_fast_sligru.CRDNN(
        input_shape=[None, None, FEATURES],
        cnn_channels=[4, 8],
        time_pooling=True,
        time_pooling_size=4,
        rnn_class=rnn_class,
        rnn_layers=2,
        rnn_neurons=32,
        rnn_bidirectional=True,
        dnn_neurons=9,
        **({"dropout": 0.0} | arguments),
    ).to(device, dtype)
    with torch.no_grad():
        for _ in range(3):
            net(features(4, 50, dtype, device))
    return net


def features(batch, frames, dtype=torch.float32, device="cpu"):
    return torch.randn(batch, frames, FEATURES, dtype=dtype, device=device)


def run(net, x):
    """Output and, where gradients are recorded, those of the parameters, by name."""
    output = net(x)
    if not output.requires_grad:
        return {"output": output}
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, parameters, upstream.to(output))
    names = (name.removeprefix("_orig_mod.") for name in names)
    return {"output": output} | dict(zip(names, gradients, strict=True))


def error(actual, expected):
    """Relative, but where the exact value is zero: the gradient of a bias before BatchNorm."""
    scale = max(float(torch.linalg.vector_norm(expected.double())), 1e-3)
    return float(torch.linalg.vector_norm(actual.double() - expected.double())) / scale


# Forward-mode derivatives --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:sb_fast_sligru runs")
@pytest.mark.parametrize("compiler", ["export", "trace", "compile"])
@pytest.mark.parametrize("of_rnn", [True, False], ids=["RNN", "CRDNN"])
def test_programs_refuse_forward_mode(of_rnn, compiler):
    """Of frozen weights: an operator none of whose tensors requires a gradient loses tangents."""
    net, x = build(torch.float64).eval().requires_grad_(False), features(2, 40, torch.float64)
    if of_rnn:
        net, x = net.RNN, torch.randn(2, 9, int(net.RNN.fea_dim), dtype=torch.float64)
    if compiler == "export":
        program = torch.export.export(net, (x,)).module()
    elif compiler == "trace":
        program = torch.jit.trace(net, x)
    else:
        torch._dynamo.reset()
        program = torch.compile(net, backend="eager")
        program(x)

    def first(output):
        return output[0] if of_rnn else output

    with forward_ad.dual_level():
        assert first(program(x)).shape == first(net(x)).shape  # without a tangent
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward.*mode|forward AD"):
            program(dual)
        assert forward_ad.unpack_dual(first(net(dual))).tangent.any()


# torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_cell
def test_one_graph_for_every_length(rnn_class, training):
    net = build(torch.float64, rnn_class=rnn_class, dropout=0.3).train(training)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for frames in LENGTHS:
        compiled(features(3, frames, torch.float64))
    assert counter.frame_count == 1


def test_left_to_itself_torch_compile_compiles_twice():
    """Once for the first length, once for all."""
    net = build().train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for frames in LENGTHS:
        compiled(features(3, frames))
    assert counter.frame_count == 2


def test_batch_sizes_share_a_graph():
    """But for 1, and those for which PyTorch's convolution takes another memory layout."""
    net = build().eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 8, 6, 4, 2, 12, 10):
        compiled(features(batch, 20 + batch))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inductor_computes_what_eager_mode_does(training):
    """Its layout optimisation fails in training for any convolution with dynamic lengths."""
    net, exact = build().train(training), build(torch.float64).train(training)
    exact.load_state_dict(net.state_dict())
    torch._dynamo.reset()
    options = {"layout_optimization": False} if training else {}
    compiled = torch.compile(net, fullgraph=True, dynamic=True, options=options)
    for frames in LENGTHS[:3]:
        x = features(3, frames)
        with torch.set_grad_enabled(training):
            expected, eager, actual = run(exact, x.double()), run(net, x), run(compiled, x)
        for name, tensor in expected.items():
            assert error(actual[name], tensor) <= 3 * error(eager[name], tensor) + 1e-6, name


# CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_make_graphed_callables():
    """Training steps of the graph equal those of eager mode, the running statistics included."""
    eager, graphed = build(device="cuda"), build(device="cuda")
    graphed = torch.cuda.make_graphed_callables(graphed, (features(4, 48, device="cuda"),))
    graphed.load_state_dict(eager.state_dict())  # its warm-up has moved the statistics
    batches = [features(4, 48).cuda() for _ in range(3)]
    for net in (eager, graphed):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for x in batches:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for name, tensor in eager.state_dict().items():
        assert error(graphed.state_dict()[name], tensor) < 1e-3, name


# torch.export and AOTInductor ----------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 4])
@each_cell
def test_exported_program(rnn_class, batch):
    """Whatever the example's sizes were, which divide others or do not."""
    net = build(torch.float64, rnn_class=rnn_class).eval()
    program = torch.export.export(
        net, (features(batch, 40, torch.float64),), dynamic_shapes=DYNAMIC, strict=False
    )
    names = {str(node.target) for node in program.graph.nodes}
    assert {"sb_fast_sligru.light_gru.default", "sb_fast_sligru.norm_pool.default"} <= names
    for frames, batch in zip(LENGTHS, BATCHES, strict=True):
        x = features(batch, frames, torch.float64)
        assert relative_error(program.module()(x), net(x)) < 1e-14


# Loads what is on the command line, without SpeechBrain and this package, with its library alone.
ALONE = """
import sys, torch
sys.modules["speechbrain"] = None
library, exported, package, inputs, results = sys.argv[1:]
torch.ops.load_library(library)
programs = torch.export.load(exported).module(), torch._inductor.aoti_load_package(package)
with torch.no_grad():
    torch.save([[program(x) for x in torch.load(inputs)] for program in programs], results)
assert "sb_fast_sligru" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.inductor
def test_programs_run_without_speechbrain(tmp_path):
    """What torch.export saves, and what AOTInductor makes of it."""
    net = build().eval()
    exported, package, inputs, results = (str(tmp_path / n) for n in ("a.pt2", "b.pt2", "c", "d"))
    program = torch.export.export(net, (features(2, 40),), dynamic_shapes=DYNAMIC)
    torch.export.save(program, exported)
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    batches = [features(*sizes) for sizes in zip(BATCHES, LENGTHS, strict=True)]
    torch.save(batches, inputs)
    library = str(ROOT / "sb_fast_sligru/_C.abi3.so")
    subprocess.run(
        [sys.executable, "-c", ALONE, library, exported, package, inputs, results],
        cwd=tmp_path,
        check=True,
    )
    for outputs in torch.load(results):
        for x, output in zip(batches, outputs, strict=True):
            assert relative_error(output, net(x)) < 1e-6


# TorchScript ---------------------------------------------------------------------------------


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:sb_fast_sligru runs SpeechBrain's CNN.*torch.jit.trace")
@each_cell
def test_traced_encoder_takes_any_length_and_can_be_saved(rnn_class):
    """SpeechBrain's loop, traced, has the length of the example."""
    net = build(torch.float64, rnn_class=rnn_class).eval()
    traced = saved_and_loaded(torch.jit.trace(net, features(2, 40, torch.float64)))
    for batch, frames in zip(BATCHES, LENGTHS, strict=True):
        x = features(batch, frames, torch.float64)
        assert relative_error(traced(x), net(x)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@each_cell
def test_scripted_encoder(rnn_class):
    net = build(torch.float64, rnn_class=rnn_class)
    scripted = torch.jit.script(net)
    for training in (True, False):
        net.train(training)
        scripted.train(training)
        x = features(2, 40, torch.float64)
        expected = run(net, x)
        for name, tensor in run(scripted, x).items():
            # TorchScript's derivatives of SpeechBrain's own layers differ by some 1e-9.
            assert error(tensor, expected[name]) < 1e-8, name
