"""The attention decoder as a plain PyTorch loop: the oracle for every compiled kernel.

One token, with zeros for h_{-1} and c_{-1}, and a_{-1} even over the frames of a sequence (Bahdanau
et al. 2015, arXiv 1409.0473; Cho et al. 2014, arXiv 1406.1078, with the reset gate where torch's
GRUCell has it; Chorowski et al. 2015, arXiv 1506.07503; SpeechBrain's `AttentionalRNNDecoder` with
`GRUCell` and `LocationAwareAttention`):

    i      = wx_t + W_c (mask_t * c_{t-1});  g = U h_{t-1} + b
    r, z   = sigmoid(i_r + g_r), sigmoid(i_z + g_z)
    n      = tanh(i_n + r * g_n)
    h_t    = n + z * (h_{t-1} - n)
    e_l    = v . tanh(key_l + W_q h_t + W_f (filters * a_{t-1})_l)
    a_t    = softmax(scaling e) over the frames of the sequence
    c_t    = W_o sum_l a_{t,l} value_l + b_o

SpeechBrain detaches a_{t-1} where the filters read it.
"""

import math

import torch
import torch.nn.functional as F


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
    """Run the loop over tokens, on any device and dtype, differentiable any number of times.

    Arguments, results and layouts are those of `sb_fast_sligru.ops.attention_decoder`, which checks
    them.
    """
    (batch, tokens), frames = wx.shape[:2], keys.shape[1]
    if batch == 0 or tokens == 0:
        # Nothing to scan; the empty results still belong to the graph of their inputs.
        given = [wx, keys, values, w_context, u, w_query, filters, w_location, v, w_out, b_out]
        given += [] if u_bias is None else [u_bias]
        zero = sum((t * 0).sum() for t in given)
        widths = (u.shape[1], w_out.shape[0], frames)
        return tuple((wx.new_empty(batch, tokens, w) + zero).to(u.dtype) for w in widths)

    inside = torch.arange(frames, device=keys.device) < lengths.unsqueeze(1)
    previous = inside * (1 / lengths.to(u.dtype)).unsqueeze(1)
    h, context = u.new_zeros(batch, u.shape[1]), u.new_zeros(batch, w_out.shape[0])
    results = []
    for t, wx_t in enumerate(wx.unbind(1)):
        masked = context if context_mask is None else context * context_mask[:, t]
        i_r, i_z, i_n = (wx_t + F.linear(masked, w_context)).chunk(3, 1)
        g_r, g_z, g_n = F.linear(h, u, u_bias).chunk(3, 1)
        n = torch.tanh(i_n + torch.sigmoid(i_r + g_r) * g_n)
        h = n + torch.sigmoid(i_z + g_z) * (h - n)
        features = F.conv1d(
            previous.unsqueeze(1), filters.unsqueeze(1), padding=filters.shape[1] // 2
        )
        s = keys + F.linear(h, w_query).unsqueeze(1)
        s = s + F.linear(features.transpose(1, 2), w_location)
        energies = F.linear(torch.tanh(s), v.unsqueeze(0)).squeeze(2)
        energies = energies.masked_fill(~inside, -math.inf)
        attention = torch.softmax(energies * scaling, 1)
        previous = attention.detach()
        context = F.linear(torch.bmm(attention.unsqueeze(1), values).squeeze(1), w_out, b_out)
        results.append((h, context, attention))
    return tuple(torch.stack(parts, 1).to(u.dtype) for parts in zip(*results, strict=True))
