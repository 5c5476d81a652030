"""The light-GRU recurrence as one differentiable function, `light_gru`, and its choice of backend.

`light_gru` checks its arguments, settles the dtypes and calls the operator of the same name
(`torch.ops.sb_fast_sligru.light_gru`, schema in cuda_ops/light_gru/operator.cpp) or, for the
backend "reference", the plain PyTorch loop. Below it: fake kernels for torch.compile, then
autograd.
"""

import functools
import operator
from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import _library, reference
from ._autograd import (
    Changes,
    accumulation_dtype,
    autocast_dtype,
    dtype_name,
    no_second_derivative,
    register_autograd,
)
from ._backends import (
    choose,
    forced_backend,
    gpu,
    index_of,
    library_obstacle,
    warn_once,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- the choice of backend and kernel


def choose_backend(device, hidden, operand_dtype):
    """The backend that serves a layer now, and why.

    Arguments
    ---------
    device : torch.device or str
    hidden : int
        Hidden units H.
    operand_dtype : torch.dtype
        Of the operands of the matrix products: that of the tensors, or autocast's.

    Returns
    -------
    name : str
        "reference", "cpu", "stepwise" or "persistent".
    reason : str
        One clause, for people. For "stepwise" it says why not "persistent".

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve this layer.

    Example
    -------
    >>> choose_backend("cpu", 512, torch.float32)[0]
    'cpu'
    """
    device = torch.device(device)
    if forced_backend() == "reference":  # whatever the device
        return choose(device, {})
    return choose(device, _obstacles(device, hidden, operand_dtype))


def _obstacles(device, hidden, operand_dtype):
    """What keeps each compiled backend of the device from the layer ("": nothing), best first."""
    if device.type == "cpu":
        return {"cpu": library_obstacle(device)}
    if device.type != "cuda":
        return {}
    obstacle = library_obstacle(device)
    if obstacle:
        return {"persistent": obstacle, "stepwise": obstacle}
    # index() makes a constant, with a guard, of a size that torch.compile holds as a symbol.
    obstacle = _persistent_obstacle(operator.index(hidden), operand_dtype, index_of(device))
    return {"persistent": obstacle, "stepwise": ""}


@functools.cache
def _query_persistent(hidden, operand_dtype, device_index):
    # Whether a pass has a kernel at all does not depend on the rows.
    for direction in ("forward", "backward"):
        choice = choose_kernel(gpu(device_index), hidden, 1, operand_dtype, direction)
        if choice.kernel == "stepwise":
            return choice.reason
    return ""


@torch.compiler.assume_constant_result  # torch.compile asks while it traces and keeps the answer
def _persistent_obstacle(hidden, operand_dtype, device_index):
    return _query_persistent(hidden, operand_dtype, device_index)


class Choice(NamedTuple):
    """A kernel, how its work is laid over the GPU, and why it was taken."""

    kernel: str
    """"stepwise", or a family of the persistent backend, named as its files are."""
    group: int
    """Blocks that share U: a thread-block cluster or, for "l2", blocks of a cooperative launch that
    exchange through the L2 cache. For "stepwise" 0, as the next two."""
    units: int
    """Hidden units of a block."""
    rows: int
    """Rows (sequences of the batch, times directions) that a group serves, at most."""
    reason: str

    def groups(self, rows):
        """Groups that serve so many rows."""
        return -(-rows // self.rows)

    def waves(self, device, rows):
        """How many times a `Gpu` is filled with groups until all rows are served."""
        if self.kernel == "l2":
            at_once = device.multiprocessors // self.group
        else:
            at_once = getattr(device, f"clusters_of_{self.group}")
        return -(-self.groups(rows) // at_once)


def choose_kernel(device, hidden, rows, operand_dtype, direction):
    """The kernel that a pass of a layer runs on a GPU, unless a backend is forced.

    The tables are cuda_ops/light_gru/choice.h's; the launchers read the same.

    Arguments
    ---------
    device : Gpu
        `gpu(index)` for one that is there, or one that is pretended.
    hidden : int
        Hidden units H.
    rows : int
        Sequences of the batch, times 2 if bidirectional.
    operand_dtype : torch.dtype
    direction : str
        "forward" or "backward": the pass.

    Returns
    -------
    choice : Choice

    Raises
    ------
    ValueError
        For an unknown direction.

    Example
    -------
    >>> a100 = Gpu(80, True, False, False, 163 * 1024, 108, 0, 0, 0)
    >>> choose_kernel(a100, 512, 16, torch.float16, "forward").kernel
    'l2'
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction: got {direction!r}, expected 'forward' or 'backward'")
    return Choice(
        *torch.ops.sb_fast_sligru.light_gru_kernel(
            hidden, rows, operand_dtype, direction == "backward", *device
        )
    )


# ---- the function


def light_gru(
    wx,
    u,
    h0=None,
    drop_mask=None,
    ln_weight=None,
    ln_bias=None,
    lengths=None,
    *,
    layer_norm,
    activation="relu",
    bidirectional=False,
    eps=1e-5,
    time=None,
):
    """Hidden states of a light GRU over a whole sequence.

    Per step, with r_t = U h_{t-1} and y_t = LayerNorm(r_t) (SLi-GRU, Moumen and Parcollet 2023) or
    y_t = r_t (Li-GRU, Ravanelli et al. 2018):

        a, s = halves of wx_t + y_t;  z = sigmoid(s);  c = act(a) * drop_mask
        h_t = z h_{t-1} + (1 - z) c

    Arguments
    ---------
    wx : torch.Tensor
        [B, T, 2H], the projected and normalised input: H candidate values, then H update-gate
        values. float64, float32, bfloat16 or float16; any strides. Both directions read it.
    u : torch.Tensor
        [2H, H], recurrent weight, candidate rows first. Of wx's dtype, except under autocast.
    h0 : torch.Tensor, optional
        [R, H] or [1, H], initial hidden state, zeros if absent. R is B, or 2B if bidirectional with
        the forward direction's rows first.
    drop_mask : torch.Tensor, optional
        [R, H] or [1, H], recurrent dropout mask, the same at every step. Gets no gradient.
    ln_weight, ln_bias : torch.Tensor, optional
        [2H], affine part of the recurrent LayerNorm.
    lengths : torch.Tensor, optional
        [B], integers from 0 to T: steps of each sequence, T if absent. What follows is padding: it
        is not read, h is zero there, and the backward direction starts at the sequence's end. On a
        GPU the values are not checked, for which the host would have to wait, but clamped.
        wx may then also be packed: [frames, 2H], the sequences one after the other, without
        padding; h has their frames, too.
    layer_norm : bool
        Normalise U h_{t-1} over its 2H values (SLi-GRU) or not (Li-GRU).
    activation : str
        "relu", "tanh", "sin" or "leaky_relu" (slope 0.01).
    bidirectional : bool
        Also run backwards in time, with the same weights.
    eps : float
        Of the LayerNorm.
    time : int, optional
        Of a packed wx: T, which no length exceeds.

    Returns
    -------
    h : torch.Tensor
        [B, T, H], or [B, T, 2H] if bidirectional (forward half, then backward half, both in true
        time order), of u's dtype. Under `torch.autocast` u stays float32 and only the operands of
        the matrix products are 16-bit, so h is float32, as SpeechBrain's layers return it. The
        backend "persistent" multiplies float32 as pairs of float16: where |h| reaches 65520, or u
        is infinite, it returns NaN, and near 0 a product's h is rounded to multiples of 3e-11.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        If a forced backend cannot serve the call, or at a second derivative of a compiled backend.
        Forward-mode derivatives and torch.func's gradients run the loop, unless one is forced.

    Example
    -------
    >>> h = light_gru(torch.rand(2, 5, 8), torch.rand(8, 4), layer_norm=True, bidirectional=True)
    >>> h.shape
    torch.Size([2, 5, 8])
    """
    tensors = {
        "wx": wx,
        "u": u,
        "h0": h0,
        "drop_mask": drop_mask,
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
    }
    batch, lengths = _check_lengths(lengths, wx, time)
    operand_dtype = _check(tensors, batch, layer_norm, activation, bidirectional)
    name, reason = choose_backend(wx.device, u.shape[1], operand_dtype)
    if name == "reference":
        if reason != "forced":
            warn_once(reason)
        return reference.light_gru(
            **tensors,
            lengths=lengths,
            layer_norm=layer_norm,
            activation=activation,
            bidirectional=bidirectional,
            eps=eps,
            time=time,
        )
    acc_dtype = accumulation_dtype(u.dtype)
    rows = batch * (2 if bidirectional else 1)

    def per_row(t):
        return None if t is None else t.to(acc_dtype).expand(rows, u.shape[1])

    def widened(t):
        return None if t is None else t.to(acc_dtype)

    h, _ = torch.ops.sb_fast_sligru.light_gru(
        wx,
        u,
        per_row(h0),
        per_row(drop_mask),
        widened(ln_weight),
        widened(ln_bias),
        lengths,
        time,
        layer_norm,
        eps,
        activation,
        bidirectional,
        dtype_name(operand_dtype),
        name,
    )
    return h


def _check(tensors, batch, layer_norm, activation, bidirectional):
    """Raise ValueError for a bad argument; return the dtype of the matrix products' operands."""
    wx, u, drop_mask = tensors["wx"], tensors["u"], tensors["drop_mask"]
    for name, t in tensors.items():
        if t is None and name not in ("wx", "u"):
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
        if not t.is_floating_point() or t.dtype not in DTYPES:
            raise ValueError(
                f"{name}: got {t.dtype}, expected float64, float32, bfloat16 or float16"
            )
        if t.device != wx.device:
            raise ValueError(f"{name}: got device {t.device}, expected {wx.device}, that of wx")
    if u.ndim != 2 or u.shape[0] != 2 * u.shape[1] or u.shape[1] == 0:
        raise ValueError(f"u: got shape {tuple(u.shape)}, expected [2H, H]")
    hidden = u.shape[1]
    if wx.shape[-1] != 2 * hidden:
        raise ValueError(
            f"wx: got shape {tuple(wx.shape)}, expected [B, T, 2H] with 2H = {2 * hidden} as in u"
        )
    rows = batch * (2 if bidirectional else 1)
    for name in ("h0", "drop_mask"):
        t = tensors[name]
        if t is not None and (t.ndim != 2 or t.shape[0] not in (1, rows) or t.shape[1] != hidden):
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected [{rows}, {hidden}] "
                f"({'2B' if bidirectional else 'B'} rows) or [1, {hidden}]"
            )
    for name in ("ln_weight", "ln_bias"):
        t = tensors[name]
        if t is not None and not layer_norm:
            raise ValueError(f"{name}: given, but layer_norm is False")
        if t is not None and t.shape != (2 * hidden,):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected [{2 * hidden}]")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}"
        )
    if drop_mask is not None and drop_mask.requires_grad:
        raise ValueError("drop_mask: requires a gradient, and none is computed for it")

    operand_dtype = autocast_dtype(u.dtype, wx.device.type)
    allowed = {operand_dtype, u.dtype}
    if wx.dtype not in allowed:
        raise ValueError(
            f"wx: got {wx.dtype} beside u of {u.dtype}"
            f"{' under autocast to ' + str(operand_dtype) if operand_dtype != u.dtype else ''}, "
            f"expected {' or '.join(sorted(map(str, allowed)))}"
        )
    return operand_dtype


def _check_lengths(lengths, wx, time):
    """Raise ValueError for bad lengths; return B, and the lengths as the operator takes them."""
    if not isinstance(wx, torch.Tensor):
        raise ValueError(f"wx: got {type(wx).__name__}, expected a torch.Tensor")
    packed = time is not None
    if wx.ndim != (2 if packed else 3):
        expected = "[frames, 2H], since time is given" if packed else "[B, T, 2H]"
        raise ValueError(f"wx: got shape {tuple(wx.shape)}, expected {expected}")
    if lengths is None:
        if packed:
            raise ValueError("lengths: absent, expected [B], since time is given")
        return wx.shape[0], None
    if not isinstance(lengths, torch.Tensor):
        raise ValueError(f"lengths: got {type(lengths).__name__}, expected a torch.Tensor")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths: got {lengths.dtype}, expected int32 or int64")
    batch = lengths.numel() if packed else wx.shape[0]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: got shape {tuple(lengths.shape)}, expected [{batch}]")
    if lengths.device != wx.device:
        raise ValueError(f"lengths: got device {lengths.device}, expected {wx.device}, that of wx")
    time = time if packed else wx.shape[1]
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = lengths[(lengths < 0) | (lengths > time)]
        if wrong.numel() > 0:
            raise ValueError(f"lengths: got {wrong[0].item()}, expected 0 to T = {time}")
        if packed and lengths.sum() != wx.shape[0]:
            raise ValueError(
                f"lengths: their sum is {lengths.sum()}, expected {wx.shape[0]}, the frames of wx"
            )
    return batch, lengths.clamp(0, time).int()


# ---- fake kernels (torch.compile) and autograd


# Of the schemas in cuda_ops/light_gru/operator.cpp: the tensors, then the options of the layer.
_TENSORS = 7
_OPTIONS = 7


def _sizes(wx, rest):
    """B, T and D of the operator's arguments after u."""
    lengths, time, _, _, _, bidirectional = rest[_TENSORS - 3 : _TENSORS + 3]
    batch, time = wx.shape[:2] if time is None else (lengths.shape[0], time)
    return batch, time, 2 if bidirectional else 1


def _light_gru_fake(wx, u, *rest):
    layer_norm = rest[_TENSORS - 1]
    batch, time, directions = _sizes(wx, rest)
    h = wx.new_empty(*wx.shape[:-1], directions * u.shape[1], dtype=u.dtype)
    rows = directions * batch if layer_norm else 0
    return h, wx.new_empty(rows, time, dtype=accumulation_dtype(u.dtype))


def _light_gru_backward_fake(grad_h, wx, u, *rest):
    layer_norm = rest[_TENSORS - 1]
    need_wx, need_u, need_h0, need_ln = rest[-4:]
    acc_dtype = accumulation_dtype(u.dtype)
    batch, _, directions = _sizes(wx, rest)
    hidden = u.shape[1]

    def empty(wanted, shape, dtype):
        return wx.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        empty(need_wx, wx.shape, wx.dtype),
        empty(need_u, u.shape, u.dtype),
        empty(need_h0, (directions * batch, hidden), acc_dtype),
        empty(need_ln and layer_norm, (2 * hidden,), acc_dtype),
        empty(need_ln and layer_norm, (2 * hidden,), acc_dtype),
    )


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:_TENSORS], inputs[_TENSORS:]
    h, rho = output
    ctx.changes = None
    if type(h) is torch.Tensor and not torch.compiler.is_compiling():
        ctx.changes = Changes(h)
        h = h.data  # the same memory; its own count of changes, which autograd finds unchanged
    ctx.save_for_backward(*tensors, h, rho)
    ctx.mark_non_differentiable(rho)
    ctx.set_materialize_grads(False)


def _light_gru_backward(ctx, grad_h, _):
    if grad_h is None:
        return (None,) * (_TENSORS + _OPTIONS)
    *tensors, h, rho = ctx.saved_tensors
    if ctx.changes:
        with torch.no_grad():
            h, rho = torch.ops.sb_fast_sligru.light_gru(*tensors, *ctx.options)
    wx, u, h0, _, ln_weight, ln_bias, _ = ctx.needs_input_grad[:_TENSORS]
    grads = torch.ops.sb_fast_sligru.light_gru_backward(
        grad_h, *tensors, *ctx.options, h, rho, wx, u, h0, ln_weight or ln_bias
    )
    grad_wx, grad_u, grad_h0, grad_ln_weight, grad_ln_bias = (
        g if wanted else None
        for g, wanted in zip(grads, (wx, u, h0, ln_weight, ln_bias), strict=True)
    )
    grads = (grad_wx, grad_u, grad_h0, None, grad_ln_weight, grad_ln_bias, None)
    return grads + (None,) * _OPTIONS


# ---- torch.utils.flop_counter: the products with U that the loop computes, whatever a kernel does


def _light_gru_flops(wx_shape, u_shape, *rest, out_shape=None, **_):
    return 2 * _row_steps(wx_shape, rest)[0] * u_shape[0] * u_shape[1]


def _light_gru_backward_flops(grad_h_shape, wx_shape, u_shape, *rest, out_shape=None, **_):
    _, need_u, need_h0, _ = rest[-4:]
    steps, first_steps = _row_steps(wx_shape, rest)
    # One for each step's dU, one for each step's carry to the step before.
    products = (steps if need_u else 0) + (steps if need_h0 else max(steps - first_steps, 0))
    return 2 * products * u_shape[0] * u_shape[1]


def _row_steps(wx_shape, rest):
    """Steps of all rows, padding included, and how many of them are first ones."""
    lengths, time, _, _, _, bidirectional = rest[_TENSORS - 3 : _TENSORS + 3]
    directions = 2 if bidirectional else 1
    batch = wx_shape[0] if time is None else lengths[0]  # here a tensor's shape
    frames = batch * wx_shape[1] if time is None else wx_shape[0]
    return directions * frames, directions * batch


if _library.cpu_error is None:
    register_flop_formula(torch.ops.sb_fast_sligru.light_gru)(_light_gru_flops)
    register_flop_formula(torch.ops.sb_fast_sligru.light_gru_backward)(_light_gru_backward_flops)
    # Shapes and dtypes without data: what torch.compile and torch.export trace through.
    torch.library.register_fake("sb_fast_sligru::light_gru")(_light_gru_fake)
    torch.library.register_fake("sb_fast_sligru::light_gru_backward")(_light_gru_backward_fake)
    register_autograd("light_gru", _light_gru_backward, setup_context=_setup_context)
    register_autograd("light_gru_backward", no_second_derivative)
