"""Location-aware attention of many hypotheses over one utterance, which share its keys.

SpeechBrain's module has a row of encoder states, and of keys, for each hypothesis. Here both are
[utterances, T, ...] and queries are [utterances * beam, ...]; the equations are the same (Chorowski
et al. 2015, arXiv 1506.07503):

    e_t = v . tanh(K x_t + Q s + L f_t + b)      f = filters * last weights
    w   = softmax(scaling e), 0 where t is padding
    c   = O (sum_t w_t x_t) + b_o
"""

import torch
import torch.nn.functional as F

from . import ops
from .ops import _location_energies as kernels


class SharedAttention:
    """The attention of a search.

    Arguments
    ---------
    attn : speechbrain.nnet.attention.LocationAwareAttention
        Whose weights it takes.
    states : torch.Tensor
        Encoder states, [B, T, enc_dim].
    frames : list of int
        Of each utterance, from 1 to T.
    beam : int
        Hypotheses of an utterance, which are neighbours in all tensors of [B * beam, ...].
    """

    def __init__(self, attn, states, frames, beam):
        self.attn, self.states = attn, states
        # Units and channels of zeros, which change nothing, are what CUDA kernels take.
        units = channels = 0
        if states.is_cuda:
            units = -attn.mlp_enc.out_features % kernels.UNITS_MULTIPLE
            channels = max(0, kernels.CHANNELS - attn.conv_loc.out_channels)
        bias = attn.mlp_enc.bias + attn.mlp_dec.bias + attn.mlp_loc.bias
        self.keys = F.linear(
            states, F.pad(attn.mlp_enc.weight, (0, 0, 0, units)), F.pad(bias, (0, units))
        )
        self.wide = torch.float64 if self.keys.dtype == torch.float64 else torch.float32
        self.w_query = F.pad(attn.mlp_dec.weight, (0, 0, 0, units))
        self.w_location = F.pad(attn.mlp_loc.weight, (0, channels, 0, units)).to(self.keys.dtype)
        self.filters = F.pad(attn.conv_loc.weight[:, 0], (0, 0, 0, channels)).to(self.wide)
        self.v = F.pad(attn.mlp_attn.weight[0], (0, units)).to(self.wide)
        batch, longest, _ = states.shape
        lengths = torch.tensor(frames, device=states.device)
        is_frame = torch.arange(longest, device=states.device) < lengths[:, None]
        self.padding = None
        if min(frames) < longest:
            self.padding = ~is_frame.repeat_interleave(beam, 0)
        uniform = is_frame.to(self.wide) / lengths[:, None]
        self.weights = uniform.repeat_interleave(beam, 0)

    def __call__(self, queries, predecessors=None):
        """One token.

        Arguments
        ---------
        queries : torch.Tensor
            Hidden states of the decoder, [B * beam, dec_dim].
        predecessors : torch.Tensor, optional
            Which row of the call before each row goes on from, of the same utterance, [B * beam].

        Returns
        -------
        context : torch.Tensor
            [B * beam, output_dim].
        weights : torch.Tensor
            [B * beam, T] float32 or float64, which the next call overwrites.
        """
        attn, last = self.attn, self.weights
        if predecessors is not None:
            last = last.index_select(0, predecessors)
        query = ops.few_rows_linear(queries, self.w_query).to(self.wide)
        energies = ops.location_energies(
            query, last, self.keys, self.filters, self.w_location, self.v
        )
        if self.padding is not None:
            energies = energies.masked_fill_(self.padding, -torch.inf)
        if attn.scaling != 1:
            energies = energies * attn.scaling
        weights = torch.softmax(energies, -1)
        self.weights.copy_(weights)
        batch = len(self.states)
        context = torch.bmm(weights.view(batch, -1, weights.shape[1]).to(self.states), self.states)
        out = attn.mlp_out
        return ops.few_rows_linear(context.flatten(0, 1), out.weight, out.bias), self.weights
