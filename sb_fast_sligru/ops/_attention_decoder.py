"""The attention decoder's loop over tokens as one differentiable function, `attention_decoder`.

`attention_decoder` checks its arguments, settles the dtypes and calls the operator of the same name
(`torch.ops.sb_fast_sligru`, schema in cuda_ops/attention_decoder/operator.cpp) or, for the backend
"reference", the plain PyTorch loop. Below it: fake kernels for torch.compile, then autograd.
"""

import operator

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import _library, reference
from ._autograd import (
    Changes,
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


# ---- the choice of backend


def choose_decoder_backend(device, operand_dtype, channels, taps):
    """The backend that serves an attention decoder now, and why.

    Arguments
    ---------
    device : torch.device or str
    operand_dtype : torch.dtype
        Of the operands of the matrix products: that of the tensors, or autocast's.
    channels, taps : int
        Of the filters over the last attention.

    Returns
    -------
    name : str
        "reference", "cpu" or "persistent".
    reason : str
        One clause, for people.

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve it.

    Example
    -------
    >>> choose_decoder_backend("cpu", torch.float32, 10, 201)[0]
    'cpu'
    """
    device = torch.device(device)
    if forced_backend() == "reference":  # whatever the device
        return choose(device, {})
    return choose(device, _obstacles(device, operand_dtype, channels, taps))


def _obstacles(device, operand_dtype, channels, taps):
    """What keeps each compiled backend of the device from the call ("": nothing), best first."""
    if device.type == "cpu":
        return {"cpu": library_obstacle(device)}
    if device.type != "cuda":
        return {}
    obstacle = library_obstacle(device)
    if not obstacle:
        # index() makes a constant, with a guard, of a size that torch.compile holds as a symbol.
        sizes = operator.index(channels), operator.index(taps)
        obstacle = _persistent_obstacle(operand_dtype, *sizes, index_of(device))
    return {"persistent": obstacle, "stepwise": "the attention decoder has no such kernels"}


@torch.compiler.assume_constant_result  # torch.compile asks while it traces and keeps the answer
def _persistent_obstacle(operand_dtype, channels, taps, device_index):
    return torch.ops.sb_fast_sligru.attention_decoder_obstacle(
        gpu(device_index).has_tensor_code, operand_dtype, channels, taps
    )


# ---- the function


def attention_decoder(
    wx,
    keys,
    values,
    lengths,
    w_context,
    u,
    w_query,
    filters,
    w_location,
    v,
    w_out,
    b_out,
    u_bias=None,
    context_mask=None,
    *,
    scaling=1.0,
):
    """Hidden states, contexts and attention of a GRU decoder with location-aware attention.

    For each token, with zeros before the first one (Chorowski et al. 2015; SpeechBrain's
    `AttentionalRNNDecoder` under teacher forcing):

        h_t = GRU(wx_t + W_c (mask_t * c_{t-1}), h_{t-1})
        e_l = v . tanh(key_l + W_q h_t + W_f (filters * a_{t-1})_l)
        a_t = softmax(scaling e) over the frames of the sequence
        c_t = W_o sum_l a_{t,l} value_l + b_o

    As in SpeechBrain, no gradient flows through a_{t-1} where the filters read it.

    Arguments
    ---------
    wx : torch.Tensor
        [B, N, 3H], the projected input of N tokens with its bias: reset gate, update gate,
        candidate, as in torch.nn.GRUCell. float64, float32, bfloat16 or float16; any strides.
    keys : torch.Tensor
        [B, L, A], projected encoder states, with all biases inside the tanh.
    values : torch.Tensor
        [B, L, V], encoder states.
    lengths : torch.Tensor
        [B], int64: frames of each sequence, 0 to L. A length of 0 gives NaN, as in SpeechBrain.
    w_context : torch.Tensor
        [3H, C], the cell's input weight of the context.
    u : torch.Tensor
        [3H, H], the cell's recurrent weight. All weights have its dtype; wx, keys, values and
        context_mask too, or under autocast the 16-bit one.
    w_query : torch.Tensor
        [A, H].
    filters : torch.Tensor
        [G, W], W odd: the channels of the convolution over the last attention.
    w_location : torch.Tensor
        [A, G].
    v : torch.Tensor
        [A].
    w_out, b_out : torch.Tensor
        [C, V] and [C].
    u_bias : torch.Tensor, optional
        [3H], the cell's recurrent bias.
    context_mask : torch.Tensor, optional
        [B, N, C], dropout mask of the last context. Gets no gradient.
    scaling : float
        Of the energies.

    Returns
    -------
    h : torch.Tensor
        [B, N, H], of u's dtype, as the others.
    context : torch.Tensor
        [B, N, C].
    attention : torch.Tensor
        [B, N, L].

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        If a forced backend cannot serve the call, if a length is not within 0 and L, or at a second
        derivative of a compiled backend. Forward-mode derivatives and torch.func's gradients run
        the loop, unless one is forced.

    Example
    -------
    >>> batch, tokens, frames, width = 2, 5, 7, 4
    >>> h, context, attention = attention_decoder(
    ...     torch.rand(batch, tokens, 3 * width),
    ...     torch.rand(batch, frames, width),
    ...     torch.rand(batch, frames, width),
    ...     torch.tensor([7, 3]),
    ...     *(torch.rand(3 * width, width) for _ in range(2)),
    ...     torch.rand(width, width),
    ...     filters=torch.rand(2, 3),
    ...     w_location=torch.rand(width, 2),
    ...     v=torch.rand(width),
    ...     w_out=torch.rand(width, width),
    ...     b_out=torch.rand(width),
    ... )
    >>> attention.shape
    torch.Size([2, 5, 7])
    """
    tensors = {
        "wx": wx,
        "keys": keys,
        "values": values,
        "lengths": lengths,
        "context_mask": context_mask,
        "w_context": w_context,
        "u": u,
        "u_bias": u_bias,
        "w_query": w_query,
        "filters": filters,
        "w_location": w_location,
        "v": v,
        "w_out": w_out,
        "b_out": b_out,
    }
    operand_dtype = _check(tensors)
    name, reason = choose_decoder_backend(wx.device, operand_dtype, *filters.shape)
    if name == "reference":
        if reason != "forced":
            warn_once(reason)
        return reference.attention_decoder(**tensors, scaling=scaling)
    return torch.ops.sb_fast_sligru.attention_decoder(
        *tensors.values(), float(scaling), dtype_name(operand_dtype), name
    )


def _check(tensors):
    """Raise ValueError for a bad argument; return the dtype of the matrix products' operands."""
    wx, keys, u = tensors["wx"], tensors["keys"], tensors["u"]
    for name, t in tensors.items():
        if t is None and name in ("context_mask", "u_bias"):
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
        if name == "lengths":
            if t.dtype != torch.int64:
                raise ValueError(f"lengths: got {t.dtype}, expected int64")
        elif t.dtype not in DTYPES:
            raise ValueError(
                f"{name}: got {t.dtype}, expected float64, float32, bfloat16 or float16"
            )
        if t.device != wx.device:
            raise ValueError(f"{name}: got device {t.device}, expected {wx.device}, that of wx")
    for name, axes in (
        ("wx", "[B, N, 3H]"),
        ("keys", "[B, L, A]"),
        ("values", "[B, L, V]"),
        ("u", "[3H, H]"),
        ("filters", "[G, W]"),
        ("w_out", "[C, V]"),
    ):
        if tensors[name].ndim != axes.count(",") + 1:
            raise ValueError(f"{name}: got shape {tuple(tensors[name].shape)}, expected {axes}")
    (batch, tokens, _), (frames, attention) = wx.shape, keys.shape[1:]
    hidden, (channels, taps) = u.shape[1], tensors["filters"].shape
    context, value = tensors["w_out"].shape[0], tensors["values"].shape[2]
    if frames == 0:
        raise ValueError(
            f"keys: got shape {tuple(keys.shape)}, expected [B, L, A] with at least one frame"
        )
    if taps % 2 == 0:
        raise ValueError(f"filters: got shape {(channels, taps)}, expected an odd number of taps")
    shapes = {
        "wx": (batch, tokens, 3 * hidden),
        "keys": (batch, frames, attention),
        "values": (batch, frames, value),
        "lengths": (batch,),
        "context_mask": (batch, tokens, context),
        "w_context": (3 * hidden, context),
        "u": (3 * hidden, hidden),
        "u_bias": (3 * hidden,),
        "w_query": (attention, hidden),
        "filters": (channels, taps),
        "w_location": (attention, channels),
        "v": (attention,),
        "w_out": (context, value),
        "b_out": (context,),
    }
    for name, t in tensors.items():
        if t is not None and t.shape != shapes[name]:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected {tuple(map(int, shapes[name]))}"
            )
    mask = tensors["context_mask"]
    if mask is not None and mask.requires_grad:
        raise ValueError("context_mask: requires a gradient, and none is computed for it")

    operand_dtype = autocast_dtype(u.dtype, wx.device.type)
    for name, t in tensors.items():
        data = name in ("wx", "keys", "values", "context_mask")
        allowed = {u.dtype, operand_dtype} if data else {u.dtype}
        if t is not None and name != "lengths" and t.dtype not in allowed:
            raise ValueError(
                f"{name}: got {t.dtype} beside u of {u.dtype}, "
                f"expected {' or '.join(sorted(map(str, allowed)))}"
            )
    return operand_dtype


# ---- fake kernels (torch.compile) and autograd


# Of the schemas in cuda_ops/attention_decoder/operator.cpp.
_NAMES = (
    *("wx", "keys", "values", "lengths", "context_mask", "w_context", "u", "u_bias", "w_query"),
    *("filters", "w_location", "v", "w_out", "b_out"),
)
_TENSORS = len(_NAMES)
_OPTIONS = 3
# Tensor -> the flag of the backward that asks for its gradient; the flags in their order.
_NEEDS = {
    "wx": "wx",
    "keys": "keys",
    "values": "values",
    "w_context": "cell",
    "u": "cell",
    "u_bias": "cell",
    "w_query": "query",
    "filters": "alignment",
    "w_location": "alignment",
    "v": "alignment",
    "w_out": "out",
    "b_out": "out",
}
_FLAGS = tuple(dict.fromkeys(_NEEDS.values()))


def _attention_decoder_fake(*inputs):
    given = dict(zip(_NAMES, inputs, strict=False))
    wx, u = given["wx"], given["u"]
    widths = u.shape[1], given["w_out"].shape[0], given["keys"].shape[1]
    return tuple(wx.new_empty(*wx.shape[:2], width, dtype=u.dtype) for width in widths)


def _attention_decoder_backward_fake(*inputs):
    given = dict(zip(_NAMES, inputs[3 : 3 + _TENSORS], strict=True))
    needs = dict(zip(_FLAGS, inputs[-len(_FLAGS) :], strict=True))

    def gradient(name):
        t = given[name]
        wanted = needs[_NEEDS[name]] and t is not None
        return given["wx"].new_empty(
            t.shape if wanted else (0,), dtype=given["u"].dtype if t is None else t.dtype
        )

    return tuple(gradient(name) for name in _NEEDS)


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.changes = ()
    if all(type(t) is torch.Tensor for t in output) and not torch.compiler.is_compiling():
        ctx.changes = tuple(Changes(t) for t in output)
        # The same memory; its own count of changes, which autograd finds unchanged.
        output = [t.data for t in output]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _attention_decoder_backward(ctx, *grads):
    if all(g is None for g in grads):
        return (None,) * (_TENSORS + _OPTIONS)
    tensors, output = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
    if any(ctx.changes):
        with torch.no_grad():
            output = torch.ops.sb_fast_sligru.attention_decoder(*tensors, *ctx.options)
    wanted = dict(zip(_NAMES, ctx.needs_input_grad[:_TENSORS], strict=True))
    needs = [any(wanted[name] for name in _NEEDS if _NEEDS[name] == flag) for flag in _FLAGS]
    gradients = torch.ops.sb_fast_sligru.attention_decoder_backward(
        *grads, *tensors, *ctx.options, *output, *needs
    )
    gradients = dict(zip(_NEEDS, gradients, strict=True))
    return (
        *(gradients[name] if wanted[name] else None for name in _NAMES),
        *(None,) * _OPTIONS,
    )


# ---- torch.utils.flop_counter: the products that the loop computes, whatever a kernel does


def _sizes(shapes):
    """Multiply-adds of a token's products by what they multiply, and the number of tokens."""
    shape = dict(zip(_NAMES, shapes, strict=False))
    (batch, tokens, gates), (_, frames, attention) = shape["wx"], shape["keys"]
    (context, value), (channels, taps) = shape["w_out"], shape["filters"]
    rows = batch * frames
    return tokens, {
        "w_context": batch * gates * context,
        "u": batch * gates * gates // 3,
        "w_query": batch * attention * gates // 3,
        "filters": rows * channels * taps,
        "w_location": rows * attention * channels,
        "v": rows * attention,
        "values": rows * value,
        "w_out": batch * context * value,
    }


def _attention_decoder_flops(*shapes, out_shape=None, **_):
    tokens, sizes = _sizes(shapes)
    return 2 * tokens * sum(sizes.values())


def _attention_decoder_backward_flops(*shapes, out_shape=None, **_):
    tokens, sizes = _sizes(shapes[3:])
    needs = dict(zip(_FLAGS, shapes[-len(_FLAGS) :], strict=True))
    # Once for each wanted gradient of a weight, and once for what goes on to other gradients: not
    # through the filters, and from the first token to no earlier one.
    total = sum(tokens * size for name, size in sizes.items() if needs[_NEEDS[name]])
    total += tokens * sum(sizes[name] for name in ("w_query", "v", "values", "w_out"))
    total += max(tokens - 1, 0) * (sizes["w_context"] + sizes["u"])
    if needs["alignment"]:
        total += tokens * sizes["w_location"]
    return 2 * total


if _library.cpu_error is None:
    for name, flops in (
        ("attention_decoder", _attention_decoder_flops),
        ("attention_decoder_backward", _attention_decoder_backward_flops),
    ):
        register_flop_formula(getattr(torch.ops.sb_fast_sligru, name))(flops)
    # Shapes and dtypes without data: what torch.compile and torch.export trace through.
    torch.library.register_fake("sb_fast_sligru::attention_decoder")(_attention_decoder_fake)
    torch.library.register_fake("sb_fast_sligru::attention_decoder_backward")(
        _attention_decoder_backward_fake
    )
    register_autograd(
        "attention_decoder",
        _attention_decoder_backward,
        setup_context=_setup_context,
    )
    register_autograd("attention_decoder_backward", no_second_derivative)
