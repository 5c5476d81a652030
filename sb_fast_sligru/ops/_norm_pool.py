"""What stands between two convolutions of a CRDNN as one differentiable function, `norm_pool`.

`norm_pool` checks its arguments, settles the dtypes and calls the operator of the same name
(`torch.ops.sb_fast_sligru`, schema in cuda_ops/norm_pool/operator.cpp) or, for the backend
"reference", plain PyTorch. Below it: fake kernels for torch.compile, then autograd.
"""

import operator

import torch

from .. import _library, reference
from ._autograd import accumulation_dtype, dtype_name, no_second_derivative, register_autograd
from ._backends import BACKENDS, choose, choose_kernels, gpu, index_of, warn_once

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- the choice of backend


def choose_norm_pool_backend(device, dtype, frequencies, channels, pool_frequency=1):
    """The backend that serves a call now, and why.

    Arguments
    ---------
    device : torch.device or str
    dtype : torch.dtype
        Of x: that of the convolution's output.
    frequencies, channels : int
        Of x.
    pool_frequency : int

    Returns
    -------
    name : str
        "reference", "cpu" or "cuda"; on a GPU, "stepwise" or "persistent" if one is forced, which
        are the same kernels here.
    reason : str
        One clause, for people.

    Raises
    ------
    RuntimeError
        If a backend is forced that cannot serve it.

    Example
    -------
    >>> choose_norm_pool_backend("cpu", torch.float32, 40, 128)[0]
    'cpu'
    """
    device = torch.device(device)
    if torch.jit.is_tracing():
        # It traces sizes between PyTorch's own operators alone.
        obstacle = "torch.jit.trace would keep the example's number of frames"
        return choose(device, dict.fromkeys(BACKENDS, obstacle))

    def kernels_obstacle():
        # index() makes constants, with guards, of sizes that torch.compile holds as symbols.
        sizes = map(operator.index, (frequencies, channels, pool_frequency))
        return _size_obstacle(index_of(device), dtype, *sizes)

    return choose_kernels(device, kernels_obstacle)


@torch.compiler.assume_constant_result
def _size_obstacle(device_index, dtype, frequencies, channels, pool_frequency):
    if dtype == torch.float64:
        return "the CNN's kernels do not take float64"
    if pool_frequency > 2:
        return f"the CNN's kernels pool 1 or 2 frequencies, not {pool_frequency}"
    needed = torch.ops.sb_fast_sligru.norm_pool_shared_bytes(
        dtype, frequencies, channels, pool_frequency
    )
    if 0 < needed <= gpu(device_index).shared_bytes:
        return ""
    return f"a frame of {frequencies} x {channels} values is too large for the CNN's kernels"


# ---- the function


def norm_pool(
    x,
    bias,
    ln_weight,
    ln_bias,
    drop_mask=None,
    *,
    eps=1e-5,
    negative_slope=0.01,
    pool_time=1,
    pool_frequency=1,
    halo=False,
    out_dtype=None,
    frames=None,
    out_frames=0,
):
    """LayerNorm, LeakyReLU, max-pooling and dropout of a convolution's output.

    For each frame (SpeechBrain's `CNN_Block`):

        z   = LayerNorm(x + bias) over the F C values of the frame
        a   = z if z > 0, else negative_slope z
        out = max of a over pool_time frames and pool_frequency frequencies, times drop_mask

    Arguments
    ---------
    x : torch.Tensor
        [B, T, F, C]: frames, frequencies, channels. float64, float32, bfloat16 or float16; any
        strides.
    bias : torch.Tensor
        [C], the convolution's. Of x's dtype or float32, as the next two.
    ln_weight, ln_bias : torch.Tensor
        [F, C].
    drop_mask : torch.Tensor, optional
        [B, F'], factors of the frequencies after pooling. Gets no gradient.
    eps : float
        Of the LayerNorm.
    negative_slope : float
    pool_time, pool_frequency : int
        Sizes of the windows, which do not overlap; what fills none at the end is left out:
        T' = T // pool_time, F' = F // pool_frequency.
    halo : bool
        Whether the output has a row and a column more on each side, which mirror those next to the
        border. T' and F' must then be at least 2.
    out_dtype : torch.dtype, optional
        x's, which is the default, or float32.
    frames : int, optional
        T, where x has more frames than count: the others are not read, and their gradient is 0.
    out_frames : int
        How many frames the output has at least, its halo included; those beyond its own are 0.

    Returns
    -------
    out : torch.Tensor
        [B, T', F', C], or [B, T' + 2, F' + 2, C] with a halo; more frames by `out_frames`.

    Raises
    ------
    ValueError
        Naming the argument, what was given and what is allowed.
    RuntimeError
        If a forced backend cannot serve the call, or at a second derivative of a compiled backend.
        Forward-mode derivatives and torch.func's gradients run plain PyTorch, unless one is forced.

    Example
    -------
    >>> x = torch.rand(2, 9, 6, 4)
    >>> out = norm_pool(x, torch.rand(4), torch.ones(6, 4), torch.zeros(6, 4), pool_frequency=2)
    >>> out.shape
    torch.Size([2, 9, 3, 4])
    """
    tensors = {
        "x": x,
        "bias": bias,
        "ln_weight": ln_weight,
        "ln_bias": ln_bias,
        "drop_mask": drop_mask,
    }
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(tensors, pool_time, pool_frequency, halo, out_dtype, frames, out_frames)
    options = {
        "eps": float(eps),
        "negative_slope": float(negative_slope),
        "pool_time": pool_time,
        "pool_frequency": pool_frequency,
        "halo": halo,
        "out_dtype": out_dtype,
        "frames": x.shape[1] if frames is None else frames,
        "out_frames": out_frames,
    }
    name, reason = choose_norm_pool_backend(x.device, x.dtype, *x.shape[2:], pool_frequency)
    if name == "reference":
        if reason != "forced":
            warn_once(reason, "plain PyTorch (same results)")
        return reference.norm_pool(**tensors, **options)
    dtype = accumulation_dtype(x.dtype)
    parameters = (None if t is None else t.to(dtype) for t in (bias, ln_weight, ln_bias, drop_mask))
    options["out_dtype"] = dtype_name(out_dtype)
    return torch.ops.sb_fast_sligru.norm_pool(x, *parameters, *options.values())[0]


def _check(tensors, pool_time, pool_frequency, halo, out_dtype, frames, out_frames):
    """Raise ValueError for a bad argument."""
    x, drop_mask = tensors["x"], tensors["drop_mask"]
    for name, t in tensors.items():
        if t is None and name == "drop_mask":
            continue
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name}: got {type(t).__name__}, expected a torch.Tensor")
        if t.dtype not in DTYPES:
            raise ValueError(
                f"{name}: got {t.dtype}, expected float64, float32, bfloat16 or float16"
            )
        allowed = {x.dtype, accumulation_dtype(x.dtype)}
        if t.dtype not in allowed and name != "drop_mask":
            raise ValueError(
                f"{name}: got {t.dtype} beside x of {x.dtype}, "
                f"expected {' or '.join(sorted(map(str, allowed)))}"
            )
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected {x.device}, that of x")
    if out_dtype not in allowed:
        raise ValueError(
            f"out_dtype: got {out_dtype}, expected {' or '.join(sorted(map(str, allowed)))}"
        )
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, T, F, C]")
    batch, time, frequencies, channels = x.shape
    whole = (int, torch.SymInt)
    if frames is not None and not (isinstance(frames, whole) and 1 <= frames <= time):
        raise ValueError(f"frames: got {frames!r}, expected an int from 1 to {time}, those of x")
    if not (isinstance(out_frames, whole) and out_frames >= 0):
        raise ValueError(f"out_frames: got {out_frames!r}, expected an int from 0 on")
    for name, pool, size in (
        ("pool_time", pool_time, time if frames is None else frames),
        ("pool_frequency", pool_frequency, frequencies),
    ):
        if not isinstance(pool, int) or pool < 1:
            raise ValueError(f"{name}: got {pool!r}, expected an int from 1 on")
        least = 2 * pool if halo else pool
        if size < least:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected at least {least} "
                f"{'frames' if name == 'pool_time' else 'frequencies'} "
                f"for {name}={pool}{' and a halo' if halo else ''}"
            )
    shapes = {
        "bias": (channels,),
        "ln_weight": (frequencies, channels),
        "ln_bias": (frequencies, channels),
        "drop_mask": (batch, frequencies // pool_frequency),
    }
    for name, shape in shapes.items():
        t = tensors[name]
        if t is not None and t.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected {tuple(map(int, shape))}"
            )
    if drop_mask is not None and drop_mask.requires_grad:
        raise ValueError("drop_mask: requires a gradient, and none is computed for it")


# ---- fake kernels (torch.compile) and autograd

# Of the schemas in cuda_ops/norm_pool/operator.cpp: tensors, then options.
_TENSORS, _OPTIONS = 5, 8


def _norm_pool_fake(
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
    batch, _, frequencies, channels = x.shape
    time, frequencies, border = frames // pool_time, frequencies // pool_frequency, 2 * halo
    out_time = torch.sym_max(time + border, out_frames)
    sizes = batch, out_time, frequencies + border, channels
    out = x.new_empty(sizes, dtype=getattr(torch, out_dtype))
    return out, ln_weight.new_empty(batch, time, pool_time, 2)


def _norm_pool_backward_fake(grad_out, x, bias, ln_weight, ln_bias, *others):
    need_x, need_parameters = others[-2:]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        *(t.new_empty(t.shape if need_parameters else (0,)) for t in (bias, ln_weight, ln_bias)),
    )


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.set_materialize_grads(False)


def _norm_pool_backward(ctx, grad_out, _):
    if grad_out is None:
        return (None,) * (_TENSORS + _OPTIONS)
    *tensors, statistics = ctx.saved_tensors
    wanted = ctx.needs_input_grad[: _TENSORS - 1]
    gradients = torch.ops.sb_fast_sligru.norm_pool_backward(
        grad_out, *tensors, *ctx.options, statistics, wanted[0], any(wanted[1:])
    )
    gradients = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return (*gradients, *(None,) * (1 + _OPTIONS))


if _library.cpu_error is None:
    # Shapes and dtypes without data: what torch.compile and torch.export trace through.
    torch.library.register_fake("sb_fast_sligru::norm_pool")(_norm_pool_fake)
    torch.library.register_fake("sb_fast_sligru::norm_pool_backward")(_norm_pool_backward_fake)
    register_autograd("norm_pool", _norm_pool_backward, setup_context=_setup_context)
    register_autograd("norm_pool_backward", no_second_derivative)
