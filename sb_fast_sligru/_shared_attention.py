"""Location-aware attention of many hypotheses over one utterance, which share its keys.

SpeechBrain's module has a row of encoder states, and of keys, for each hypothesis. Here both are
[utterances, T, ...] and queries are [utterances * beam, ...]; the equations are the same (Chorowski
et al. 2015, arXiv 1506.07503):

    e_t = v . tanh(K x_t + Q s + L f_t + b)      f = filters * last weights
    w   = softmax(scaling e), 0 where t is padding
    c   = O (sum_t w_t x_t) + b_o

tanh(z) is 2 sigmoid(2 z) - 1, and the softmax does not see the 1. On a CPU PyTorch's sigmoid is the
faster one, but in 16 bits it would have fewer digits near 0.
"""

import torch
import torch.nn.functional as F

from .ops import few_rows_linear

# Values of all hypotheses, frames and attention features at once: caches of a CPU, memory of a GPU.
MAX_VALUES = {"cpu": 1 << 22, "cuda": 1 << 26}


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
        self.attn, self.states, self.beam = attn, states, beam
        self.keys = F.linear(
            states, attn.mlp_enc.weight, attn.mlp_enc.bias + attn.mlp_dec.bias + attn.mlp_loc.bias
        )
        self.activate_, factor = torch.sigmoid_, 2
        if self.keys.dtype.itemsize == 2:
            self.activate_, factor = torch.tanh_, 1
        self.keys *= factor
        self.w_query = factor * attn.mlp_dec.weight
        self.w_location = factor * attn.mlp_loc.weight.t().to(self.keys.dtype)
        self.v = factor * attn.mlp_attn.weight[0].to(self.keys.dtype)
        batch, longest, _ = states.shape
        lengths = torch.tensor(frames, device=states.device)
        is_frame = torch.arange(longest, device=states.device) < lengths[:, None]
        self.padding = None if min(frames) == longest else ~is_frame[:, None, :]
        uniform = is_frame.to(attn.conv_loc.weight.dtype) / lengths[:, None]
        self.weights = uniform.repeat_interleave(beam, 0)
        self.chunks = _chunks(len(states), beam, self.keys[0].numel(), states.device.type)

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
            [B * beam, T], which the next call overwrites.
        """
        attn, batch, last = self.attn, len(self.states), self.weights
        if predecessors is not None:
            last = last.index_select(0, predecessors)
        energies = self._energies(few_rows_linear(queries, self.w_query), last)
        if self.padding is not None:
            energies = energies.masked_fill_(self.padding, -torch.inf)
        if attn.scaling != 1:
            energies = energies * attn.scaling
        weights = torch.softmax(energies, -1)
        self.weights.copy_(weights.flatten(0, 1))
        context = torch.bmm(weights.to(self.states.dtype), self.states)
        context = context.view(batch * self.beam, -1)
        context = few_rows_linear(context, attn.mlp_out.weight, attn.mlp_out.bias)
        return context, self.weights

    def _energies(self, queries, last):
        """What the softmax takes, [B, beam, T], without padding and scaling."""
        keys, location = self.keys, self.attn.conv_loc(last.unsqueeze(1)).transpose(1, 2)
        queries, location = (
            x.to(keys.dtype).unflatten(0, (len(keys), self.beam)) for x in (queries, location)
        )
        if len(self.chunks) == 1:
            return self._of(keys, queries, location)
        energies = keys.new_empty(len(keys), self.beam, keys.shape[1])
        for part in self.chunks:
            energies[part] = self._of(keys[part[0]], queries[part], location[part])
        return energies

    def _of(self, keys, queries, location):
        """Of some utterances and some hypotheses of each."""
        values = keys.unsqueeze(1) + queries.unsqueeze(2)
        flat = values.view(-1, values.shape[3])
        self.activate_(flat.addmm_(location.reshape(len(flat), -1), self.w_location))
        return torch.mv(flat, self.v).view(values.shape[:3])


def _chunks(batch, beam, values, device):
    """Slices of utterances and of their hypotheses, of `values` numbers each."""
    most = max(1, MAX_VALUES.get(device, MAX_VALUES["cuda"]) // values)
    rows, parts = max(1, most // beam), -(-beam // most)
    columns = -(-beam // parts)
    return [
        (slice(row, row + rows), slice(column, column + columns))
        for row in range(0, batch, rows)
        for column in range(0, beam, columns)
    ]
