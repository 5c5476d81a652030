"""The operators in terms of ONNX: what ``torch.onnx.export`` needs to export the modules.

``TRANSLATIONS`` is its `custom_translation_table`. Each function there takes an operator's
arguments, with values of the ONNX graph in place of tensors, and adds nodes of opset 18 that
compute the same for any batch and length. An export is for inference: what an operator returns for
its backward alone is left out.

Example
-------
>>> from sb_fast_sligru import SLiGRU
>>> net = SLiGRU(hidden_size=5, input_shape=[4, 10, 20]).eval()
>>> program = torch.onnx.export(
...     net,
...     (torch.rand(4, 10, 20),),
...     dynamo=True,
...     dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
...     custom_translation_table=TRANSLATIONS,
...     verbose=False,
... )
>>> [node.op_type for node in program.model.graph if node.op_type == "Scan"]
['Scan']
"""

import torch

from . import _library

try:
    import onnx_ir as ir
    from onnxscript import opset18 as op
except ImportError as error:
    raise ImportError(f'{error} (run: pip install "sb_fast_sligru[onnx]")') from error
if _library.cpu_error is not None:
    raise ImportError(f"without the operators there is nothing to translate: {_library.cpu_error}")

__all__ = ["TRANSLATIONS"]

DTYPES = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "float16": ir.DataType.FLOAT16,
}
# By the names of reference.ACTIVATIONS: the node and its attributes.
ACTIVATIONS = {
    "relu": ("Relu", {}),
    "tanh": ("Tanh", {}),
    "sin": ("Sin", {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}),
}


def _accumulation_type(dtype):
    return ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _light_gru(
    wx,
    u,
    h0,
    drop_mask,
    ln_weight,
    ln_bias,
    lengths,
    packed_time,
    layer_norm,
    eps,
    activation,
    bidirectional,
    operand_dtype,
    backend,
):
    """One Scan over time with the rows of both directions; h0 and drop_mask have them all."""
    if lengths is not None:
        raise ValueError("torch.onnx.export: lengths have no translation, export without them")
    hidden = u.shape[1]
    directions = 2 if bidirectional else 1
    acc_type, operand_type = _accumulation_type(u.dtype), DTYPES[operand_dtype]
    if h0 is None:
        rows = op.Mul(op.Shape(wx, start=0, end=1), op.Constant(value_ints=[directions]))
        shape = op.Concat(rows, op.Constant(value_ints=[hidden]), axis=0)
        h0 = op.Expand(op.Cast(op.Constant(value_float=0.0), to=acc_type), shape)
    if layer_norm and ln_weight is None:
        ln_weight = op.Cast(op.Constant(value_floats=[1.0] * (2 * hidden)), to=acc_type)
    u_transposed = op.Cast(op.Transpose(u, perm=[1, 0]), to=operand_type)

    step = ir.tape.Tape()
    h = ir.val("h", acc_type, [None, hidden])
    slices = [ir.val(f"wx_{i}", wx.dtype, [None, 2 * hidden]) for i in range(directions)]
    wx_t = step.op("Cast", [step.op("Concat", slices, {"axis": 0})], {"to": acc_type})
    y = step.op("MatMul", [step.op("Cast", [h], {"to": operand_type}), u_transposed])
    y = step.op("Cast", [y], {"to": acc_type})
    if layer_norm:
        y = step.op("LayerNormalization", [y, ln_weight, ln_bias], {"axis": -1, "epsilon": eps})
    a, s = step.op_multi_out(
        "Split", [step.op("Add", [wx_t, y])], {"axis": 1, "num_outputs": 2}, num_outputs=2
    )
    z = step.op("Sigmoid", [s])
    node, attributes = ACTIVATIONS[activation]
    c = step.op(node, [a], attributes)
    if drop_mask is not None:
        c = step.op("Mul", [c, drop_mask])
    # c + z (h - c) is z h + (1 - z) c
    h_t = step.op("Add", [c, step.op("Mul", [z, step.op("Sub", [h, c])])])
    outputs = step.op_multi_out(
        "Split",
        [step.op("Cast", [h_t], {"to": u.dtype})],
        {"axis": 0, "num_outputs": directions},
        num_outputs=directions,
    )

    reversed_ = [0, 1][:directions]
    last = op.Scan(
        h0,
        *[wx] * directions,
        body=ir.Graph([h, *slices], [h_t, *outputs], nodes=step.nodes, name="light_gru_step"),
        num_scan_inputs=directions,
        scan_input_axes=[1] * directions,
        scan_input_directions=reversed_,
        scan_output_axes=[1] * directions,
        scan_output_directions=reversed_,
    )
    scan = last.producer()
    scan.resize_outputs(1 + directions)  # the exporter takes a variadic output for one
    return (op.Concat(*scan.outputs[1:], axis=2),)


def _norm_pool(
    x,
    bias,
    ln_weight,
    ln_bias,
    drop_mask,
    eps,
    negative_slope,
    pool_time,
    pool_frequency,
    halo,
    out_dtype,
    frames,
    out_frames,
):
    """Operators on [B, T, F, C], but for the pooling and the halo, which want frames last."""
    if out_frames != 0:
        raise ValueError("torch.onnx.export: on a GPU the CRDNN pads frames, export model.cpu()")
    acc_type = _accumulation_type(x.dtype)
    end = op.Reshape(frames, op.Constant(value_ints=[-1]))
    x = op.Slice(x, op.Constant(value_ints=[0]), end, op.Constant(value_ints=[1]))
    x = op.Add(op.Cast(x, to=acc_type), bias)
    x, *_ = op.LayerNormalization(x, ln_weight, ln_bias, axis=2, epsilon=eps)
    x = op.Transpose(op.LeakyRelu(x, alpha=negative_slope), perm=[0, 3, 1, 2])
    window = [pool_time, pool_frequency]
    x, *_ = op.MaxPool(x, kernel_shape=window, strides=window)
    if drop_mask is not None:
        x = op.Mul(x, op.Unsqueeze(drop_mask, op.Constant(value_ints=[1, 2])))
    if halo:
        x = op.Pad(x, op.Constant(value_ints=[0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")
    return (op.Cast(op.Transpose(x, perm=[0, 2, 3, 1]), to=DTYPES[out_dtype]),)


def _stft(
    signal,
    n_fft,
    hop_length,
    win_length,
    window,
    normalized,
    onesided,
    return_complex,
    align_to_window=None,
):
    """A convolution with windowed waves; complex numbers are pairs on a last axis."""
    hop_length, win_length = hop_length or n_fft // 4, win_length or n_fft
    if window is None or normalized or onesided is False:
        raise ValueError("torch.stft: exported only with a window, one-sided and not normalised")
    bins = n_fft // 2 + 1
    samples = torch.arange(n_fft, dtype=torch.float64)
    angles = torch.outer(samples[:bins], samples) % n_fft * (2 * torch.pi / n_fft)
    waves = torch.cat([angles.cos(), -angles.sin()]).unsqueeze(1).float()
    before = (n_fft - win_length) // 2
    window = op.Pad(window, op.Constant(value_ints=[before, n_fft - win_length - before]))
    kernels = op.Mul(op.Constant(value=ir.tensor(waves.numpy())), window)
    x = op.Conv(op.Unsqueeze(signal, op.Constant(value_ints=[1])), kernels, strides=[hop_length])
    x = op.Reshape(x, op.Constant(value_ints=[0, 2, bins, -1]))
    return op.Transpose(x, perm=[0, 2, 3, 1])


TRANSLATIONS = {
    torch.ops.sb_fast_sligru.light_gru.default: _light_gru,
    torch.ops.sb_fast_sligru.norm_pool.default: _norm_pool,
    # onnxruntime's STFT, of frames that are no power of two, errs some hundred times more.
    torch.ops.aten.stft.default: _stft,
}
