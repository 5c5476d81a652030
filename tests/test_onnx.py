"""The translations to ONNX against the modules in float64, run by onnxruntime.

The packages of ONNX are imported where they are used: machines for GPU tests need not have them.
"""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import sb_fast_sligru
from sb_fast_sligru import crdnn, ops
from sb_fast_sligru.reference import relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]

SIZES = [(1, 1), (3, 7), (2, 40), (5, 9)]  # B, T
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8, torch.float16: 2e-3}
either_direction = pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])


def translate(module, *example, path, opset_version=18):
    """Export with a dynamic batch and time, check the file and return a function that runs it."""
    import onnx
    import onnxruntime

    from sb_fast_sligru.onnx import TRANSLATIONS

    torch.onnx.export(
        module,
        example,
        path,
        dynamic_shapes=tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in example),
        custom_translation_table=TRANSLATIONS,
        opset_version=opset_version,
        dynamo=True,
        verbose=False,
    )
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*tensors):
        outputs = session.run(None, dict(zip(names, (t.numpy() for t in tensors), strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return run


def assert_equal(module, run, *tensors):
    """The file's outputs are those of the module in float64."""
    dtype = tensors[0].dtype
    with torch.no_grad(), sb_fast_sligru.backend("reference"):
        expected = module.double()(*(t.double() for t in tensors))
        module.to(dtype)
    if isinstance(expected, torch.Tensor):
        expected = (expected,)
    for output, tensor in zip(run(*tensors), expected, strict=True):
        assert output.dtype == dtype and output.shape == tensor.shape
        assert relative_error(output, tensor) < TOLERANCE[dtype]


# The operators -------------------------------------------------------------------------------


class Recurrence(torch.nn.Module):
    """`ops.light_gru` with parameters of its own."""

    def __init__(self, hidden, affine, **options):
        super().__init__()
        self.u = torch.nn.Parameter(torch.randn(2 * hidden, hidden) / hidden**0.5)
        self.weight = torch.nn.Parameter(1 + 0.2 * torch.randn(2 * hidden)) if affine else None
        self.bias = torch.nn.Parameter(0.2 * torch.randn(2 * hidden)) if affine else None
        self.options = options

    def forward(self, wx, h0=None, drop_mask=None):
        return ops.light_gru(wx, self.u, h0, drop_mask, self.weight, self.bias, **self.options)


# LayerNorm, affine, with h0, with a mask, activation.
RECURRENCES = {
    "sligru": (True, False, False, False, "relu"),
    "sligru-affine-h0-mask": (True, True, True, True, "tanh"),
    "ligru": (False, False, False, False, "sin"),
    "ligru-h0-mask": (False, False, True, True, "leaky_relu"),
}


def check_recurrence(path, recurrence, bidirectional, dtype):
    layer_norm, affine, with_h0, with_mask, activation = RECURRENCES[recurrence]
    options = {"layer_norm": layer_norm, "activation": activation, "bidirectional": bidirectional}
    net = Recurrence(12, affine, **options).to(dtype)

    def inputs(batch, time):
        rows = batch * (1 + bidirectional)
        tensors = [torch.randn(batch, time, 24)]
        if with_h0:
            tensors.append(torch.randn(rows, 12))
        if with_mask:
            tensors.append((torch.rand(rows, 12) < 0.8) / 0.8)
        return [tensor.to(dtype) for tensor in tensors]

    run = translate(net, *inputs(2, 5), path=path)
    for sizes in SIZES:
        assert_equal(net, run, *inputs(*sizes))


@either_direction
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_recurrence(recurrence, bidirectional, tmp_path):
    check_recurrence(tmp_path / "net.onnx", recurrence, bidirectional, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_recurrence_in_other_dtypes(dtype, tmp_path):
    check_recurrence(tmp_path / "net.onnx", "sligru-affine-h0-mask", True, dtype)


class Spectrum(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.window = torch.hamming_window(320)
        self.options = options

    def forward(self, x):
        window = self.window.to(x)
        spectrum = torch.stft(x, 400, 160, 320, window, return_complex=True, **self.options)
        return torch.view_as_real(spectrum)


def test_short_time_fourier_transform(tmp_path):
    """Of frames that are no power of two, with a window shorter than they are."""
    net = Spectrum()
    run = translate(net, torch.randn(2, 2000), path=tmp_path / "net.onnx")
    for sizes in ((1, 400), (3, 3333)):
        x = torch.randn(sizes)
        assert relative_error(run(x)[0], net(x.double())) < 1e-6


# The modules ---------------------------------------------------------------------------------


def trained_a_little(net, shape):
    """BatchNorm has seen batches: its statistics are not those of a new one."""
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(shape))
    return net.eval()


@either_direction
@pytest.mark.parametrize("cell", ["SLiGRU", "LiGRU"])
@pytest.mark.parametrize("features", [(5,), (2, 3)], ids=["3-D", "4-D"])
def test_networks(cell, bidirectional, features, tmp_path):
    net = getattr(sb_fast_sligru, cell)(
        hidden_size=6,
        input_shape=(4, 20, *features),
        num_layers=2,
        bidirectional=bidirectional,
        dropout=0.2,
    )
    net = trained_a_little(net, (4, 20, *features))
    run = translate(net, torch.randn(2, 5, *features), path=tmp_path / "net.onnx")
    for sizes in SIZES:
        assert_equal(net, run, torch.randn(*sizes, *features))


class WithState(torch.nn.Module):
    """A network whose initial state is an input, [B, L, H] here."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, hx):
        output, hidden = self.net(x, hx=hx.transpose(0, 1))
        return output, hidden.transpose(0, 1)


@pytest.mark.parametrize("cell", ["SLiGRU", "LiGRU"])
def test_chunks_with_a_carried_state(cell, tmp_path):
    net = getattr(sb_fast_sligru, cell)(hidden_size=6, input_shape=(4, 20, 5), num_layers=2)
    net = WithState(trained_a_little(net, (4, 20, 5)))
    run = translate(net, torch.randn(2, 5, 5), torch.randn(2, 2, 6), path=tmp_path / "net.onnx")
    x, hidden = torch.randn(3, 12, 5), torch.zeros(3, 2, 6)
    outputs = []
    for chunk in x.split(4, 1):
        output, hidden = run(chunk, hidden)
        outputs.append(output)
    whole = net.double()(x.double(), torch.zeros(3, 2, 6).double())
    assert relative_error(torch.cat(outputs, 1), whole[0]) < 1e-5
    assert relative_error(hidden, whole[1]) < 1e-5


CRDNNS = {
    "recipe": {"rnn_bidirectional": True},
    "pooling-in-time-too": {"using_2d_pooling": True, "rnn_class": sb_fast_sligru.LiGRU},
    "one-block": {"cnn_blocks": 1, "cnn_channels": [4], "time_pooling": False},
}


@pytest.mark.parametrize("arguments", CRDNNS.values(), ids=CRDNNS)
def test_crdnn(arguments, tmp_path):
    net = sb_fast_sligru.CRDNN(
        **{
            "input_shape": [None, None, 20],
            "cnn_channels": [4, 8],
            "time_pooling": True,
            "time_pooling_size": 2,
            "rnn_class": sb_fast_sligru.SLiGRU,
            "rnn_layers": 2,
            "rnn_neurons": 6,
            "dnn_neurons": 9,
        }
        | arguments
    )
    net = trained_a_little(net, (4, 50, 20))
    # None: the exporter's own choice.
    run = translate(net, torch.randn(2, 40, 20), path=tmp_path / "net.onnx", opset_version=None)
    for sizes in ((1, 16), (3, 41), (5, 77)):
        assert_equal(net, run, torch.randn(*sizes, 20))


# What is refused -----------------------------------------------------------------------------


def test_frames_that_a_gpu_pads_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(crdnn, "_is_on_gpu", lambda x: True)
    net = sb_fast_sligru.CRDNN(
        input_shape=[None, None, 20], cnn_channels=[4, 8], rnn_layers=0, dnn_blocks=0
    )
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"export model.cpu\(\)"):
        translate(net.eval(), torch.randn(2, 40, 20), path=tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_transforms_that_are_not_translated(tmp_path):
    for options in ({"onesided": False}, {"normalized": True}):
        with pytest.raises(torch.onnx.errors.OnnxExporterError, match="one-sided and not norm"):
            translate(Spectrum(**options), torch.randn(2, 2000), path=tmp_path / "net.onnx")


def test_missing_packages_are_named():
    code = "import sys; sys.modules['onnxscript'] = None; import sb_fast_sligru.onnx"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: import of onnxscript halted" in run.stderr
    assert '(run: pip install "sb_fast_sligru[onnx]")' in run.stderr
