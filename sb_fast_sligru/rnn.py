"""SpeechBrain's SLi-GRU and Li-GRU with the time loop replaced by one compiled operator.

The classes are SpeechBrain's, subclassed: constructor, parameters, initialisation, hidden-state
layouts and ``state_dict`` are inherited. Replaced is what a layer computes between its input and
its output, where its parts are those that SpeechBrain built:

===================  =======================================  ===================================
step                 SpeechBrain                              here
===================  =======================================  ===================================
bidirectional input  the batch concatenated with its          the batch; the operator reads W x
                     time-flipped copy, W x on both           forwards and backwards in time
time loop            a Python loop of about ten operators     ``ops.light_gru``
dropout mask         rows of a table of 16000 masks, drawn    drawn at each call
                     again when the batch size changes
===================  =======================================  ===================================

Besides, ``forward`` takes ``lengths``, as SpeechBrain's GRU and LSTM do.

A layer whose ``u``, ``act`` or ``layer_norm`` was replaced (an adapter, a quantised or FSDP-wrapped
``Linear``) or has hooks (the old ``spectral_norm``) runs SpeechBrain's own loop, which calls them,
and says so once. ``torch.nn.utils.parametrize``, and FSDP around whole layers, leave it fast.

Two habits that SpeechBrain's documentation does not tell are kept, since trained weights depend
on them: a feed-forward normalisation other than "batchnorm" and "layernorm" is a LayerNorm, not
none, and an unknown ``nonlinearity`` is a ReLU.

Sources: Ravanelli et al. 2018, arXiv 1803.10225 (Li-GRU); Moumen and Parcollet 2023,
arXiv 2302.10144 (SLi-GRU).
"""

import torch
from torch import distributed, nn

from . import ops, reference
from ._packing import pack, unpack, valid_frames
from ._parts import is_plain, not_plain
from ._stock import RNN as stock
from .ops._backends import choose, warn_once
from .sync_batch_norm import SyncBatchNorm, count_processes

__all__ = ["LiGRU", "LiGRU_Layer", "SLiGRU", "SLiGRU_Layer"]


class _LightGRULayer:
    """The forward pass of both kinds of layer, mixed into SpeechBrain's layer classes.

    Its methods stay within what torch.jit.script compiles, for SpeechBrain's `jit` options; the
    functions marked ignore are called as Python from there.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The operator takes a name where SpeechBrain's loop calls `act`.
        self.activation = _activation_name(self.act)

    def forward(
        self,
        x: torch.Tensor,
        hx: torch.Tensor | None = None,
        steps: torch.Tensor | None = None,
        time: int | None = None,
    ) -> torch.Tensor:
        """Run the layer over whole sequences.

        Arguments
        ---------
        x : torch.Tensor
            Input, [B, T, F] or, packed, [frames, F]: the sequences one after the other, without
            padding.
        hx : torch.Tensor
            Initial hidden state, [R, H], [1, H] or [H], where R is B, or 2B if bidirectional, the
            rows of the forward direction first. The buffer ``h_init`` (zeros) if not given.
        steps : torch.Tensor
            Steps of each sequence, integers, [B]; T if not given. What follows is padding.
        time : int
            Of packed sequences: T, which no sequence exceeds. The norm then sees no padding.

        Returns
        -------
        h : torch.Tensor
            Hidden states, [B, T, H], or [B, T, 2H] if bidirectional: those of the forward
            direction, then those of the backward one, both in the input's order of time. Zero in
            padding. Packed as `x` is.

        Raises
        ------
        ValueError
            If the shape of `x`, `hx` or `steps` is not one of those above, or `steps` are given and
            a part of the layer was replaced or has hooks.
        RuntimeError
            If a compiled backend is forced and a part of the layer was replaced or has hooks.
        """
        rows = _check_shapes(
            x, hx, steps, time, self.input_size, self.hidden_size, self.bidirectional
        )
        if not torch.jit.is_scripting():
            obstacle = self._obstacle()
            if obstacle and steps is not None:
                raise ValueError(f"lengths: SpeechBrain's loop, needed here, has none: {obstacle}")
            if obstacle:
                return self._run_loop(x, hx, obstacle)
        h0 = self.h_init if hx is None else hx.reshape(-1, self.hidden_size)
        wx = self.w(x) if torch.jit.is_scripting() else self._project(x)
        wx = self._normalise(wx)
        ln_weight, ln_bias, layer_norm, eps = self._recurrent_norm()
        return _light_gru(
            wx,
            self.u.weight,
            h0,
            self._draw_drop_mask(rows),
            ln_weight,
            ln_bias,
            steps,
            layer_norm,
            eps,
            self.activation,
            self.bidirectional,
            time,
        )

    @torch.jit.unused
    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """W x of all steps, [..., 2H]; a chunk of a stream has few."""
        if not is_plain(self.w, nn.Linear) or x.dtype != self.w.weight.dtype:
            return self.w(x)  # or tells what is wrong
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.w(x)  # few rows or many would make two graphs of one
        wx = ops.few_rows_linear(x.flatten(0, -2), self.w.weight, self.w.bias)
        return wx.unflatten(0, x.shape[:-1])

    @torch.jit.unused
    def _obstacle(self) -> str:
        """Tell which part the operator cannot stand in for, "" if there is none."""
        if not is_plain(self.u, nn.Linear) or self.u.bias is not None:
            return not_plain("u of a layer", self.u, "a bias-free nn.Linear")
        if not _is_activation(self.act, self.activation):
            return not_plain(
                "act of a layer", self.act, f"the {self.activation} of its construction"
            )
        norm = getattr(self, "layer_norm", None)  # SLi-GRU's
        if norm is not None and not is_plain(norm, nn.LayerNorm):
            return not_plain("layer_norm of a layer", norm, "an nn.LayerNorm")
        return ""

    @torch.jit.unused
    def _run_loop(self, x: torch.Tensor, hx: torch.Tensor | None, obstacle: str) -> torch.Tensor:
        """Run SpeechBrain's forward, or raise if a compiled backend is forced."""
        _, reason = choose(x.device, dict.fromkeys(ops.BACKENDS, obstacle))
        if reason != "forced":
            warn_once(reason)
        return super().forward(x, hx)

    def __prepare_scriptable__(self):
        """Refuse, for torch.jit.script, what its code could not tell from the usual parts."""
        if self._obstacle():
            raise ValueError(f"torch.jit.script: {self._obstacle()}")
        return self

    def _normalise(self, wx: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward norm to `wx` [..., 2H], with SpeechBrain's running statistics.

        SpeechBrain's bidirectional layer sees each of the n rows twice. That leaves mean and
        variance as they are, but the unbiased variance that BatchNorm tracks is then
        var 2n / (2n - 1), where the rows seen once give var n / (n - 1).
        """
        rows = wx.flatten(0, -2)
        if not hasattr(self.norm, "running_var"):  # LayerNorm
            return self.norm(rows).view_as(wx)
        elif not (self.bidirectional and self.norm.training):
            return self.norm(rows).view_as(wx)
        else:
            is_alone = True
            if not torch.jit.is_scripting():
                is_alone = _is_alone(self.norm)
            # BatchNorm refuses one row, not the same row twice. Several processes have several.
            if rows.shape[0] < 2 and is_alone:
                return self.norm(rows.repeat(2, 1))[: rows.shape[0]].view_as(wx)
            if self.norm.running_var is None or not self.norm.track_running_stats:
                return self.norm(rows).view_as(wx)
            before = self.norm.running_var.clone()
            out = self.norm(rows).view_as(wx)
            n = rows.shape[0]
            if not torch.jit.is_scripting():
                if not is_alone:
                    n = _count_over_processes(self.norm, rows)
            if self.norm.momentum is None:  # the average of all batches so far
                before -= before / self.norm.num_batches_tracked
            else:
                before *= 1 - self.norm.momentum
            # running_var is now (1 - momentum) before + momentum var n / (n - 1). Autograd has
            # saved it for the gradient of evaluation mode; `data` keeps that from being an error.
            added = self.norm.running_var - before
            self.norm.running_var.data.sub_(added / (2 * n - 1))
            return out

    def _draw_drop_mask(self, rows: int) -> torch.Tensor | None:
        """Draw a recurrent dropout mask [rows, H]: one per sequence, the same at all steps."""
        if not self.training or self.dropout == 0:
            return None
        return self.drop(torch.ones_like(self.h_init.expand(rows, -1)))

    def _sample_drop_mask(self, w):
        """Give SpeechBrain's loop a mask, which takes rows of a table there."""
        mask = self._draw_drop_mask(w.shape[0])
        return self.drop_mask_te if mask is None else mask

    def _change_batch_size(self, x):
        """Leave the table alone that SpeechBrain draws again here."""


class SLiGRU_Layer(_LightGRULayer, stock.SLiGRU_Layer):
    """One SLi-GRU layer; arguments as in :class:`speechbrain.nnet.RNN.SLiGRU_Layer`."""

    def _init_drop(self):
        """Delete the table of masks once drawn: it is not used, and not part of ``state_dict``.

        Drawing it keeps the initial weights that a seed gives this network equal to SpeechBrain's.
        A CRDNN with dropout calls it before it builds its last layers: those start elsewhere.
        """
        super()._init_drop()
        del self.drop_masks

    def _recurrent_norm(self) -> tuple[torch.Tensor | None, torch.Tensor | None, bool, float]:
        """Weight and bias of the norm of U h, whether there is one, and its eps."""
        return self.layer_norm.weight, self.layer_norm.bias, True, self.layer_norm.eps


class LiGRU_Layer(_LightGRULayer, stock.LiGRU_Layer):
    """One Li-GRU layer; arguments as in :class:`speechbrain.nnet.RNN.LiGRU_Layer`.

    The table ``drop_masks`` is kept, unused: it is part of SpeechBrain's ``state_dict``.
    """

    def _recurrent_norm(self) -> tuple[torch.Tensor | None, torch.Tensor | None, bool, float]:
        """As of an SLi-GRU, which this is without the norm."""
        return None, None, False, 1e-5


class _LightGRU:
    """The loop over the layers of both kinds of network, mixed into SpeechBrain's classes."""

    def forward(
        self,
        x: torch.Tensor,
        hx: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
    ):
        """Run all layers over whole sequences.

        Arguments
        ---------
        x : torch.Tensor
            Input, [B, T, F], or [B, T, C, F], whose last two axes are taken as one.
        hx : torch.Tensor
            Initial hidden states, [layers, R, H], where R is B, or 2B if bidirectional. Zeros if
            not given.
        lengths : torch.Tensor
            Lengths of the sequences relative to T, [B], above 0 and at most 1, as SpeechBrain's GRU
            takes them, but rounded to whole steps. What follows a sequence's end is padding: it
            changes nothing, not even the statistics of BatchNorm, and the output is zero there; the
            backward direction starts at the end. On a GPU the values are not checked but clamped.
            In training mode the host waits for them, once a call. Every sequence has T steps if
            not given, as in SpeechBrain's light GRUs.

        Returns
        -------
        output : torch.Tensor
            Of the last layer, [B, T, H], or [B, T, 2H] if bidirectional.
        hidden : torch.Tensor
            Of each layer the output at the last step of each sequence, [layers, B, H], or
            [2 layers, B, H], as SpeechBrain lays them out.

        Raises
        ------
        ValueError
            If an argument's shape or a length is not one of those above, or `lengths` are given and
            a part of a layer was replaced or has hooks.
        """
        if self.reshape and x.ndim == 4:
            x = x.flatten(2)
        steps: torch.Tensor | None = None
        ends: torch.Tensor | None = None  # of each sequence the last frame
        frames: torch.Tensor | None = None
        time: int | None = None
        batch, padded_time = 0, 0
        if lengths is not None:
            if x.ndim != 3:
                raise ValueError("x must be [batch, time, features]")
            batch, padded_time = x.shape[0], x.shape[1]
            steps = count_steps(lengths, batch, padded_time)
            packed = self.training
            if not torch.jit.is_scripting():
                _check_layers(self.rnn)
                packed = packed or _packs_freely(x)
            if packed:  # nothing is computed of padding
                frames = valid_frames(steps, padded_time)
                x = pack(x, frames)
                time = padded_time
                ends = steps.cumsum(0) - 1
            else:
                ends = torch.arange(batch, device=x.device) * padded_time + steps - 1
        # SpeechBrain's own loop reshapes a matrix of hidden states, which gives torch.compile and
        # torch.export a condition on the batch; and the batch of a bidirectional `hx` is that of
        # `input_shape`.
        if hx is not None and self.bidirectional:
            hx = hx.reshape(self.num_layers, -1, self.hidden_size)
        last = []
        for i, layer in enumerate(self.rnn):
            h0 = None if hx is None else hx[i]
            # Layers of SpeechBrain's own, which `accelerate` may leave, take no more than these.
            if steps is None:
                x = layer(x, h0)
            else:
                x = layer(x, h0, steps, time)
            if ends is None:
                last.append(x[:, -1])
            else:
                last.append(x.flatten(0, -2).index_select(0, ends))
        if frames is not None:
            x = unpack(x, frames, batch, padded_time)
        h = torch.stack(last, dim=1)
        if self.bidirectional:
            return x, h.flatten().view(2 * h.shape[1], h.shape[0], self.hidden_size)
        return x, h.transpose(0, 1)


class SLiGRU(_LightGRU, stock.SLiGRU):
    """Stabilised light GRU, a replacement of :class:`speechbrain.nnet.RNN.SLiGRU`.

    Arguments, defaults, inputs and outputs are SpeechBrain's.

    Example
    -------
    >>> inputs = torch.rand([4, 10, 20])
    >>> net = SLiGRU(hidden_size=5, input_shape=inputs.shape)
    >>> output, hidden = net(inputs)
    >>> output.shape, hidden.shape
    (torch.Size([4, 10, 5]), torch.Size([1, 4, 5]))
    """

    def _init_layers(self):
        return nn.ModuleList(
            SLiGRU_Layer(
                width,
                self.hidden_size,
                self.num_layers,
                self.batch_size,
                dropout=self.dropout,
                nonlinearity=self.nonlinearity,
                ff_normalization=self.ff_normalization,
                recurrent_elementwise_affine=self.recurrent_elementwise_affine,
                bias=self.bias,
                bidirectional=self.bidirectional,
            )
            for width in _input_widths(self)
        )


class LiGRU(_LightGRU, stock.LiGRU):
    """Light GRU, a replacement of :class:`speechbrain.nnet.RNN.LiGRU`.

    Arguments, defaults, inputs and outputs are SpeechBrain's.

    Example
    -------
    >>> inputs = torch.rand([4, 10, 20])
    >>> net = LiGRU(hidden_size=5, input_shape=inputs.shape, bidirectional=True)
    >>> output, hidden = net(inputs)
    >>> output.shape, hidden.shape
    (torch.Size([4, 10, 10]), torch.Size([2, 4, 5]))
    """

    def _init_layers(self):
        return nn.ModuleList(
            LiGRU_Layer(
                width,
                self.hidden_size,
                self.num_layers,
                self.batch_size,
                dropout=self.dropout,
                nonlinearity=self.nonlinearity,
                normalization=self.normalization,
                bias=self.bias,
                bidirectional=self.bidirectional,
            )
            for width in _input_widths(self)
        )


@torch.jit.ignore
def count_steps(lengths: torch.Tensor, batch: int, time: int) -> torch.Tensor:
    """Whole steps of sequences whose lengths are relative.

    Arguments
    ---------
    lengths : torch.Tensor
        Relative to `time`, [B].
    batch, time : int
        Sequences B of the padded batch, and its steps.

    Returns
    -------
    torch.Tensor
        Between 1 and `time`, int64, [B].

    Raises
    ------
    ValueError
        If `lengths` is no floating-point tensor of B values or, on a CPU, one is not above 0 and at
        most 1.

    Example
    -------
    >>> count_steps(torch.tensor([1.0, 0.5]), 2, 7)
    tensor([7, 4])
    """
    if time < 1:
        raise ValueError("x must have at least one time step")
    if not isinstance(lengths, torch.Tensor) or not lengths.is_floating_point():
        found = lengths.dtype if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be a tensor of relative lengths, floats, but got {found}")
    if list(lengths.shape) != [batch]:
        raise ValueError(f"lengths must be [{batch}], but their shape is {list(lengths.shape)}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = lengths[~((lengths > 0) & (lengths <= 1))]
        if wrong.numel() > 0:
            raise ValueError(
                f"lengths must be above 0 and at most 1, relative to the longest, but one is "
                f"{wrong[0].item():g}"
            )
    return (lengths * time).round().long().clamp(1, time)


def _check_layers(layers):
    """Raise ValueError if one is SpeechBrain's own, which takes no lengths."""
    for i, layer in enumerate(layers):
        own = isinstance(layer, (stock.SLiGRU_Layer, stock.LiGRU_Layer))
        if own and not isinstance(layer, _LightGRULayer):
            raise ValueError(f"lengths: layer {i} is SpeechBrain's own, whose loop takes none")


def _packs_freely(x):
    """Tell whether packing needs no wait and makes no graph of data-dependent shapes."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


@torch.jit.ignore
def _check_shapes(
    x: torch.Tensor,
    hx: torch.Tensor | None,
    steps: torch.Tensor | None,
    time: int | None,
    features: int,
    hidden: int,
    bidirectional: bool,
) -> int:
    """Return the number of recurrent rows R, or raise ValueError."""
    batch = x.shape[0]
    if time is None:
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != features:
            raise ValueError(
                f"x must be [batch, time, {features}] with at least one time step, "
                f"but its shape is {list(x.shape)}"
            )
    else:
        if x.ndim != 2 or x.shape[1] != features:
            raise ValueError(
                f"x must be [frames, {features}], since time is given, "
                f"but its shape is {list(x.shape)}"
            )
        if steps is None:
            raise ValueError("steps must be given where time is")
        batch = steps.shape[0]
    rows = batch * (2 if bidirectional else 1)
    if hx is None:
        return rows
    # One by one, since torch.compile tells whether lists of symbols are equal by their names.
    fits = hx.ndim in (1, 2) and hx.shape[-1] == hidden
    if not fits or (hx.ndim == 2 and hx.shape[0] != rows and hx.shape[0] != 1):
        raise ValueError(
            f"hx must be [{rows}, {hidden}] for each layer, or [1, {hidden}] or [{hidden}] for all "
            f"rows to share, but its shape is {list(hx.shape)}"
        )
    return rows


@torch.jit.ignore
def _light_gru(
    wx: torch.Tensor,
    u: torch.Tensor,
    h0: torch.Tensor,
    drop_mask: torch.Tensor | None,
    ln_weight: torch.Tensor | None,
    ln_bias: torch.Tensor | None,
    steps: torch.Tensor | None,
    layer_norm: bool,
    eps: float,
    activation: str,
    bidirectional: bool,
    time: int | None,
) -> torch.Tensor:
    """Call the operator. From torch.jit.script this works with types and without keywords only."""
    return ops.light_gru(
        wx,
        u,
        h0,
        drop_mask,
        ln_weight,
        ln_bias,
        steps,
        layer_norm=layer_norm,
        activation=activation,
        bidirectional=bidirectional,
        eps=eps,
        time=time,
    )


def _is_alone(norm):
    """Tell whether `norm` takes its statistics of this process's rows alone."""
    synchronised = isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm))
    return not synchronised or count_processes(norm) == 1


def _count_over_processes(norm, rows):
    """Count the rows of all processes, on the device: nobody has to wait for it."""
    if isinstance(norm, SyncBatchNorm):
        return norm.rows.sum()
    count = torch.full((), rows.shape[0], device=rows.device)
    distributed.all_reduce(count, group=norm.process_group)
    return count


def _activation_name(act):
    """Return the operator's name for the activation that SpeechBrain's layer has chosen."""
    for name in reference.ACTIVATIONS:
        if _is_activation(act, name):
            return name
    raise ValueError(f"nonlinearity: the operator has no activation like {act!r}")


def _is_activation(act, name):
    """Tell whether calling `act` computes the operator's activation of that name."""
    known = reference.ACTIVATIONS[name]
    if not isinstance(known, nn.Module):
        return act is known
    slope = getattr(known, "negative_slope", None)
    return is_plain(act, type(known)) and getattr(act, "negative_slope", None) == slope


def _input_widths(rnn):
    """List the number of input features of each layer of `rnn`."""
    output_width = rnn.hidden_size * (2 if rnn.bidirectional else 1)
    return [rnn.fea_dim] + [output_width] * (rnn.num_layers - 1)
