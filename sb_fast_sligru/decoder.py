"""SpeechBrain's attention decoder with the loop over tokens replaced by one compiled operator.

The class is SpeechBrain's, subclassed: constructor, parameters, initialisation, ``state_dict`` and
``forward_step``, which its searchers call, are inherited. Replaced is ``forward``, which training
calls with all tokens, for a GRU cell of one layer with location-aware attention:

===========================  ===============================  ===================================
step                         SpeechBrain                      here
===========================  ===============================  ===================================
products with the input and  in the loop, token by token      one product over all tokens
the output layer
loop over tokens             about fifty operators a token,   ``ops.attention_decoder``
                             autograd adds up each weight's
                             gradient token by token
dropout masks                drawn at each token              drawn for all tokens at once,
                                                              distributed alike
===========================  ===============================  ===================================

Other cells and attentions, several layers, and parts that were replaced (an adapter, a quantised
``Linear``) or have hooks run SpeechBrain's own loop, which says so once;
``AttentionalRNNDecoder.choose_backend`` tells why.

Sources: Bahdanau et al. 2015, arXiv 1409.0473 (attention decoders); Chorowski et al. 2015,
arXiv 1506.07503 (location-aware attention).
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from ._parts import build_module, is_plain, not_plain
from ._stock import RNN as stock
from .ops._autograd import autocast_dtype
from .ops._backends import choose, warn_once

__all__ = ["AttentionalRNNDecoder", "build"]


class AttentionalRNNDecoder(stock.AttentionalRNNDecoder):
    """Attention decoder, a replacement of :class:`speechbrain.nnet.RNN.AttentionalRNNDecoder`.

    Arguments, defaults, inputs and outputs are SpeechBrain's.

    Example
    -------
    >>> net = AttentionalRNNDecoder(
    ...     rnn_type="gru",
    ...     attn_type="location",
    ...     hidden_size=7,
    ...     attn_dim=5,
    ...     num_layers=1,
    ...     enc_dim=20,
    ...     input_size=6,
    ...     channels=2,
    ...     kernel_size=3,
    ... )
    >>> outputs, attn = net(torch.rand(4, 5, 6), torch.rand(4, 10, 20), torch.ones(4))
    >>> outputs.shape, attn.shape
    (torch.Size([4, 5, 7]), torch.Size([4, 5, 10]))
    """

    def forward(self, inp_tensor, enc_states, wav_len):
        """Decode under teacher forcing.

        The attention module is left as its ``reset`` leaves it: a search begins anew.

        Arguments
        ---------
        inp_tensor : torch.Tensor
            Embedded tokens, [B, N, input_size].
        enc_states : torch.Tensor
            Encoder states, [B, L, enc_dim].
        wav_len : torch.Tensor
            Lengths of the sequences as fractions of L, [B], from 0 to 1. One that rounds to no
            frame gives NaN.

        Returns
        -------
        outputs : torch.Tensor
            [B, N, hidden_size].
        attn : torch.Tensor
            Attention weights, [B, N, L].

        Raises
        ------
        ValueError
            If a shape is not one of those above, or (on the CPU) a length is not from 0 to 1.
        RuntimeError
            If a compiled backend is forced that cannot serve the call.
        """
        _check(inp_tensor, enc_states, wav_len)
        name, reason = self.choose_backend(enc_states.device)
        if name == "reference" and (reason != "forced" or obstacle_of(self)):
            if reason != "forced":
                warn_once(reason)
            return super().forward(inp_tensor, enc_states, wav_len)

        attn, cell = self.attn, self.rnn.rnn_cells[0]
        attn.reset()
        features = cell.weight_ih.shape[1] - self.attn_dim
        if inp_tensor.shape[2] != features:
            raise ValueError(
                f"inp_tensor must have {features} features, but has {inp_tensor.shape[2]}"
            )
        mask = self._draw_mask(inp_tensor)
        context_mask = None
        if mask is not None:
            inp_tensor, context_mask = inp_tensor * mask[..., :features], mask[..., features:]
        hidden, context, weights = ops.attention_decoder(
            wx=F.linear(inp_tensor, cell.weight_ih[:, :features], cell.bias_ih),
            keys=F.linear(
                enc_states,
                attn.mlp_enc.weight,
                attn.mlp_enc.bias + attn.mlp_dec.bias + attn.mlp_loc.bias,
            ),
            values=enc_states,
            lengths=_frames(enc_states, wav_len),
            w_context=cell.weight_ih[:, features:],
            u=cell.weight_hh,
            w_query=attn.mlp_dec.weight,
            filters=attn.conv_loc.weight.squeeze(1),
            w_location=attn.mlp_loc.weight,
            v=attn.mlp_attn.weight.squeeze(0),
            w_out=attn.mlp_out.weight,
            b_out=attn.mlp_out.bias,
            u_bias=cell.bias_hh,
            context_mask=context_mask,
            scaling=attn.scaling,
        )
        outputs = self.proj(torch.cat([context, hidden], 2))
        if weights.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            weights = weights.to(outputs.dtype)  # autocast's softmax: 16-bit on a CPU alone
        return outputs, weights

    def choose_backend(self, device):
        """The backend that serves `forward` now, and why.

        Arguments
        ---------
        device : torch.device or str
            Of the encoder states.

        Returns
        -------
        name : str
            "cpu", "persistent", or "reference": a PyTorch loop, SpeechBrain's own unless the reason
            is "forced".
        reason : str
            One clause, for people.

        Raises
        ------
        RuntimeError
            If a backend is forced that cannot serve this decoder.
        """
        obstacle = obstacle_of(self)
        if obstacle:
            return choose(torch.device(device), dict.fromkeys(ops.BACKENDS, obstacle))
        device, weight = torch.device(device), self.attn.conv_loc.weight
        dtype = autocast_dtype(weight.dtype, device.type)
        return ops.choose_decoder_backend(device, dtype, weight.shape[0], weight.shape[2])

    def _obstacle(self):
        """Tell what the operator cannot stand in for, "" if there is nothing."""
        return obstacle_of(self)

    def _draw_mask(self, inp_tensor):
        """Draw dropout masks of all inputs of the cell, [B, N, input_size + attn_dim], or None."""
        if not self.drop.training or self.drop.p == 0:
            return None
        batch, tokens, features = inp_tensor.shape
        return self.drop(inp_tensor.new_ones(batch, tokens, features + self.attn_dim))


def obstacle_of(decoder):
    """Tell what our code cannot stand in for in a decoder, "" if there is nothing.

    Arguments
    ---------
    decoder : torch.nn.Module
        SpeechBrain's AttentionalRNNDecoder, or ours.
    """
    if not isinstance(decoder, stock.AttentionalRNNDecoder):
        return f"the decoder is {type(decoder).__module__}.{type(decoder).__qualname__}"
    for name, only in {"rnn_type": "gru", "attn_type": "location", "num_layers": 1}.items():
        value = getattr(decoder, name)
        if value != only:
            return f"{name} of the decoder is {value}, the kernels need {only}"
    step = stock.AttentionalRNNDecoder.forward_step
    if type(decoder).forward_step is not step or "forward_step" in decoder.__dict__:
        return "forward_step of the decoder is not SpeechBrain's"
    parts = {
        "drop": (decoder.drop, nn.Dropout),
        "proj": (decoder.proj, nn.Linear),
        "rnn": (decoder.rnn, stock.GRUCell),
        "attn": (decoder.attn, stock.LocationAwareAttention),
    }
    for name, (part, kind) in parts.items():
        if not is_plain(part, kind):
            return not_plain(f"{name} of the decoder", part, f"a {kind.__name__}")
    attn = decoder.attn
    parts = {f"attn.{name}": (getattr(attn, name), nn.Linear, True) for name in _LINEARS}
    parts["attn.mlp_attn"] = (attn.mlp_attn, nn.Linear, False)
    parts["attn.conv_loc"] = (attn.conv_loc, nn.Conv1d, False)
    parts["attn.softmax"] = (attn.softmax, nn.Softmax, None)
    parts["rnn.rnn_cells.0"] = (decoder.rnn.rnn_cells[0], nn.GRUCell, None)
    for name, (part, kind, has_bias) in parts.items():
        if not is_plain(part, kind):
            return not_plain(f"{name} of the decoder", part, f"a {kind.__name__}")
        if has_bias is not None and (part.bias is not None) != has_bias:
            return f"{name} of the decoder has {'no' if has_bias else 'a'} bias"
    return ""


_LINEARS = ("mlp_enc", "mlp_dec", "mlp_loc", "mlp_out")


def build(decoder_class, **arguments):
    """Build a decoder of a class that a YAML has under a key of its own.

    Arguments
    ---------
    decoder_class : type
        :class:`AttentionalRNNDecoder`, or SpeechBrain's.
    **arguments
        Of its constructor.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If `decoder_class` is not a class of modules.

    Example
    -------
    >>> sizes = {"hidden_size": 7, "attn_dim": 5, "num_layers": 1, "enc_dim": 20, "input_size": 6}
    >>> build(AttentionalRNNDecoder, rnn_type="gru", attn_type="content", **sizes).hidden_size
    7
    """
    return build_module("decoder_class", decoder_class, arguments)


def _frames(enc_states, wav_len):
    """The number of frames of each sequence, rounded as SpeechBrain does."""
    return torch.round(enc_states.shape[1] * wav_len).long()


def _check(inp_tensor, enc_states, wav_len):
    """Raise ValueError for a bad shape or length."""
    if inp_tensor.ndim != 3 or inp_tensor.shape[1] == 0:
        raise ValueError(
            f"inp_tensor must be [batch, tokens, features] with at least one token, "
            f"but its shape is {list(inp_tensor.shape)}"
        )
    batch = inp_tensor.shape[0]
    if enc_states.ndim != 3 or enc_states.shape[0] != batch or enc_states.shape[1] == 0:
        raise ValueError(
            f"enc_states must be [{batch}, frames, features] with at least one frame, "
            f"but its shape is {list(enc_states.shape)}"
        )
    if list(wav_len.shape) != [batch]:
        raise ValueError(f"wav_len must be [{batch}], but its shape is {list(wav_len.shape)}")
    # On a GPU the look would wait for it; in a graph and in a transformation there are no values.
    if type(wav_len) is torch.Tensor and wav_len.is_cpu and not torch.compiler.is_compiling():
        frames = _frames(enc_states, wav_len)
        if bool(((frames < 0) | (frames > enc_states.shape[1])).any()):
            raise ValueError(f"wav_len must be from 0 to 1, but is {wav_len.tolist()}")
