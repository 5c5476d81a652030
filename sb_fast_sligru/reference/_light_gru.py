"""The light-GRU recurrence as a plain PyTorch loop: the oracle for every compiled kernel.

One step, with r_t = U h_{t-1} (Moumen and Parcollet 2023, arXiv 2302.10144; Ravanelli et al. 2018,
arXiv 1803.10225; SpeechBrain's `SLiGRU_Layer` and `LiGRU_Layer`):

    y_t   = LayerNorm(r_t)                    SLi-GRU      y_t = r_t   Li-GRU
    a, s  = halves of wx_t + y_t              candidate first, update gate second
    z     = sigmoid(s)
    c     = act(a) * drop_mask
    h_t   = z * h_{t-1} + (1 - z) * c

Both directions of a sequence of L steps run over those alone; what follows is padding.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .._packing import frame_mask, pack, unpack, valid_frames

# By the names that the operator knows them by (cuda_ops/common/activation.h): the modules and the
# function that SpeechBrain's layers hold as `act`.
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sin": torch.sin,
    "leaky_relu": nn.LeakyReLU(),
}


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
    """Run the recurrence step by step, on any device and dtype, differentiable any number of times.

    Arguments, result and layouts are those of `sb_fast_sligru.ops.light_gru`, which checks them.
    """
    if time is not None:  # packed
        frames = valid_frames(lengths, time)
        out = light_gru(
            unpack(wx, frames, len(lengths), time),
            u,
            h0,
            drop_mask,
            ln_weight,
            ln_bias,
            lengths,
            layer_norm=layer_norm,
            activation=activation,
            bidirectional=bidirectional,
            eps=eps,
        )
        return pack(out, frames)
    act = ACTIVATIONS[activation]
    hidden = u.shape[1]
    directions = 2 if bidirectional else 1
    steps = valid = None
    if lengths is not None:
        steps = lengths.repeat(directions)[:, None]
        valid = frame_mask(lengths, wx.shape[1])
        wx = torch.where(valid[..., None], wx, 0)  # padding may hold anything
    if bidirectional:
        wx = torch.cat([wx, _reverse(wx, lengths)])
    rows, time = wx.shape[:2]
    h = u.new_zeros(1, hidden) if h0 is None else h0
    h = h.expand(rows, hidden)

    outputs = []
    # unbind, not wx[:, t]: each slice would back-propagate a zero tensor of the whole sequence.
    for t, wx_t in enumerate(wx.unbind(1)):
        previous = h
        y = F.linear(h, u)
        if layer_norm:
            y = F.layer_norm(y, (2 * hidden,), ln_weight, ln_bias, eps)
        a, s = (wx_t + y).chunk(2, 1)
        z = torch.sigmoid(s)
        c = act(a)
        if drop_mask is not None:
            c = c * drop_mask
        h = z * h + (1 - z) * c
        if steps is not None:
            h = torch.where(t < steps, h, previous)
        outputs.append(h)

    if time == 0 or rows == 0:
        # Nothing to scan; the empty result still belongs to the graph of its inputs.
        given = [t for t in (u, h0, ln_weight, ln_bias) if t is not None]
        out = (wx[..., :hidden] + sum(t.sum() * 0 for t in given)).to(u.dtype)
    else:
        out = torch.stack(outputs, 1)
    if bidirectional:
        forward, backward = out.chunk(2)
        out = torch.cat([forward, _reverse(backward, lengths)], 2)
    return out if valid is None else torch.where(valid[..., None], out, 0)


def _reverse(x, lengths):
    """Each sequence of `x` [B, T, n] back to front, its padding left where it is."""
    if lengths is None:
        return x.flip(1)
    time = torch.arange(x.shape[1], device=x.device)
    index = lengths[:, None] - 1 - time
    index = torch.where(index < 0, time, index)
    return x.take_along_dim(index[..., None], 1)
