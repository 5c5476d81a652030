"""What stands between two convolutions of a CRDNN, as plain PyTorch: the oracle and the fallback.

For each frame of F frequencies and C channels (SpeechBrain's `CNN_Block`: its LayerNorm, LeakyReLU,
pooling and Dropout2d, whose masks drop whole frequencies):

    z   = LayerNorm(x + bias) over the F C values of the frame
    a   = z if z > 0, else negative_slope z
    out = max of a over windows of pool_time frames and pool_frequency frequencies, times the mask

With a halo, a row and a column more on each side that mirror those next to the border: the
convolution that follows needs no padding of its own. Only the first `frames` of x count, and the
output has frames of zeros at its end until it has `out_frames`.
"""

import torch
import torch.nn.functional as F


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
    """Compute it on any device and dtype, differentiable any number of times.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.norm_pool`, which checks them.
    """
    x = x[:, :frames]
    dtype = ln_weight.dtype  # float32 beside a 16-bit x: the norm is computed in it
    z = F.layer_norm(x.to(dtype) + bias.to(dtype), ln_weight.shape, ln_weight, ln_bias, eps)
    out = F.leaky_relu(z, negative_slope).permute(0, 3, 1, 2)
    if pool_time > 1 or pool_frequency > 1:
        out = F.max_pool2d(out, (pool_time, pool_frequency))
    if drop_mask is not None:
        out = out * drop_mask.to(dtype)[:, None, None, :]
    if halo:
        out = F.pad(out, (1, 1, 1, 1), mode="reflect")
    if out_frames > 0:
        out = F.pad(out, (0, 0, 0, torch.sym_max(0, out_frames - out.shape[2])))
    return out.permute(0, 2, 3, 1).contiguous().to(x.dtype if out_dtype is None else out_dtype)
