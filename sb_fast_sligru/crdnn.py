"""SpeechBrain's CRDNN with a CNN whose tensors are never laid out anew.

The class is SpeechBrain's, subclassed: constructor, parameters, initialisation and ``state_dict``
are inherited, and the layers after the CNN are called as they are. Replaced is what runs the
convolutional blocks and the time pooling:

===========================  ===============================  ===================================
step                         SpeechBrain                      here
===========================  ===============================  ===================================
convolutions                 on transposed tensors, after a   on [B, T, F, C] as it is, whose
                             padding pass                     border the step before has written
bias, LayerNorm, LeakyReLU,  an operator each, most with a    ``ops.norm_pool``
max-pooling, dropout         copy to another layout
===========================  ===============================  ===================================

Blocks of other kernel sizes, activations or poolings, and parts that were replaced (an adapter) or
have hooks run SpeechBrain's own layers, which says so once; ``CRDNN.choose_backend`` tells why.

By ``use_lengths`` padding is nothing: what each layer makes of a sequence is what it makes of it
alone. A convolution mirrors the frames before its border; here each sequence has a border of its
own, so that the frames after its end become their mirror image before each convolution. Pooling
leaves out what fills no window of a sequence, the RNN is given its length, and in training the
BatchNorms of RNN and DNN see the frames of all sequences, one after the other, alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from ._packing import frame_mask, pack, unpack, valid_frames
from ._parts import build_module, is_plain, not_plain
from ._stock import CNN, RNN, containers, dropout, linear, normalization, pooling
from ._stock import CRDNN as stock
from .ops._backends import choose, warn_once
from .rnn import LiGRU, SLiGRU, count_steps

__all__ = ["CRDNN", "build"]

FRAMES_STEP = 32  # lengths on a GPU: cuDNN chooses its kernels anew, for milliseconds, at each
VALUES_OF_WINDOW = 16  # of 3 x 3 features, the rest zeros: what tensor cores take at once


class CRDNN(stock.CRDNN):
    """CNN, RNN and DNN, a replacement of :class:`speechbrain.lobes.models.CRDNN.CRDNN`.

    Arguments, defaults, inputs and outputs are SpeechBrain's, and there are ``use_lengths`` and
    ``lengths``, by which the states of a sequence do not depend on its batch. ``torch.jit.script``
    compiles SpeechBrain's layers, which take no lengths.

    Arguments
    ---------
    *args, **kwargs
        Of SpeechBrain's class.
    use_lengths : bool
        Whether :meth:`forward` minds the lengths that it is given. Weights are the same.

    Raises
    ------
    ValueError
        With `use_lengths`, if a layer mixes frames and cannot be told where sequences end: RNNs but
        ours and SpeechBrain's ``RNN``, ``LSTM`` and ``GRU``; so `rnn_class` must be given.

    Example
    -------
    >>> inputs = torch.rand([10, 15, 60])
    >>> model = CRDNN(input_shape=inputs.shape, cnn_channels=[4, 8], rnn_neurons=16)
    >>> model(inputs).shape
    torch.Size([10, 15, 512])
    >>> model = CRDNN(input_size=60, rnn_class=SLiGRU, rnn_neurons=16, use_lengths=True)
    >>> states = model(inputs[:2], lengths=torch.tensor([1.0, 0.6]))
    >>> states[1].any(dim=1).sum()
    tensor(9)
    """

    use_lengths = False  # of SpeechBrain's that `accelerate` made ours, too

    def __init__(self, *args, use_lengths=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_lengths = use_lengths
        if use_lengths:
            self._check_lengths_are_served()

    def forward(self, x, lengths=None):
        """Encode a batch.

        Arguments
        ---------
        x : torch.Tensor
            Features, [B, T, F], or [B, T, F, channels] if it was built for that.
        lengths : torch.Tensor
            Lengths of the sequences relative to T, [B], above 0 and at most 1, which are rounded to
            whole frames. Not looked at without `use_lengths`. With it, the states of a sequence are
            those that it has alone, but for dropout and, in training, BatchNorm, whose statistics
            are those of all sequences without padding; gradients likewise. What padding holds
            changes nothing. On a GPU the values are not checked but clamped, and in training mode
            the host waits for them. Every sequence has T frames if not given.

            Give n / T for n frames: a length in samples, relative to the longest waveform, can
            be a frame off, as features have one frame more than hops fit into a waveform.

        Returns
        -------
        torch.Tensor
            Of the last layer, [B, T', features]: a state of each window of frames that is pooled.
            What fills no window has none. With `use_lengths`, zeros follow those of a sequence.

        Raises
        ------
        ValueError
            If the shape of `x` does not fit; with `use_lengths`, if a length is not one of those
            above, if a sequence is too short for the CNN, or if a layer, since replaced, cannot be
            told where sequences end.
        RuntimeError
            If a compiled backend is forced that cannot serve the CNN.
        """
        steps = None
        if self.use_lengths and lengths is not None:
            self._check_lengths_are_served()
            steps = self._count_steps(x, lengths)
            x = _without_padding(x, steps)
        if self._runs_on_kernels(x):
            x = self._convolve(x, steps)
        elif steps is None:
            return super().forward(x)
        else:
            x = self._call_convolutions(x, steps)
        layers = [self[name] for name in self if name not in ("CNN", "time_pooling")]
        if steps is not None:
            return _call_layers(layers, x, steps // _pooled(self._windows()))
        for layer in layers:
            x = layer(x)
            if isinstance(x, tuple):
                x = x[0]
        return x

    def get_output_shape(self):
        """Shape of the output for `input_shape`, a torch.Size; SpeechBrain's layers tell it."""
        with torch.no_grad():  # while the constructor adds layers: with its random numbers
            return super().forward(torch.zeros(self.input_shape)).shape

    def __prepare_scriptable__(self):
        """For torch.jit.script: SpeechBrain's class with these layers."""
        twin = stock.CRDNN.__new__(stock.CRDNN)
        twin.__dict__.update(self.__dict__)
        return twin

    def choose_backend(self, device, dtype=torch.float32):
        """The backend that serves the CNN now, and why.

        Arguments
        ---------
        device : torch.device or str
            Of the features.
        dtype : torch.dtype
            Of the features.

        Returns
        -------
        name : str
            "cpu", "cuda" (or what is forced), or "reference": plain PyTorch, namely SpeechBrain's
            own layers unless the reason is "forced".
        reason : str
            One clause, for people.

        Raises
        ------
        RuntimeError
            If a backend is forced that cannot serve this CNN.
        """
        device = torch.device(device)
        obstacle = self._obstacle()
        if obstacle:
            return choose(device, dict.fromkeys(ops.BACKENDS, obstacle))
        for step in self._steps():
            name, reason = ops.choose_norm_pool_backend(
                device, dtype, *step.norm.normalized_shape, step.pool[1]
            )
            if name == "reference":
                break
        return name, reason

    def _runs_on_kernels(self, x):
        """Whether the CNN does; says once why not."""
        if "CNN" not in self:
            return False
        name, reason = self.choose_backend(x.device, x.dtype)
        if name != "reference" or (reason == "forced" and not self._obstacle()):
            return True
        if reason != "forced":
            warn_once(reason, "SpeechBrain's CNN (same results)")
        return False

    def _obstacle(self):
        """Tell what the operator cannot stand in for, "" if there is nothing."""
        if "CNN" not in self:
            return "the CRDNN has no CNN"
        obstacle = self._order_obstacle()
        if obstacle:
            return obstacle
        for block_name, block in self.CNN.items():
            for part_name, kinds in _PARTS.items():
                obstacle = _part_obstacle(
                    f"CNN.{block_name}.{part_name} of the CRDNN", block[part_name], kinds
                )
                if obstacle:
                    return obstacle
        if "time_pooling" in self:
            return _part_obstacle("time_pooling of the CRDNN", self.time_pooling, _TIME_POOLING)
        return ""

    def _order_obstacle(self):
        """Tell why the parts of the CNN are not called as SpeechBrain does, "" if they are."""
        expected = [name for name in ("CNN", "time_pooling") if name in self]
        if list(self)[: len(expected)] != expected:
            return f"the CRDNN does not begin with {' and '.join(expected)}"
        if not is_plain(self.CNN, containers.Sequential):
            return not_plain("CNN of the CRDNN", self.CNN, "a Sequential")
        for block_name, block in self.CNN.items():
            name = f"CNN.{block_name} of the CRDNN"
            if not is_plain(block, stock.CNN_Block):
                return not_plain(name, block, "a CNN_Block")
            if tuple(block) != tuple(_PARTS):
                return f"{name} has other layers than SpeechBrain's"
        return ""

    def _check_lengths_are_served(self):
        """Raise ValueError if a layer would see padding, or its own border in the wrong place."""
        obstacle = self._order_obstacle() if "CNN" in self else ""
        if obstacle:
            raise ValueError(f"use_lengths: {obstacle}")
        for name, layer in self.items():
            if name == "CNN":
                for block_name, block in layer.items():
                    for part_name, part in block.items():
                        _check_part(f"CNN.{block_name}.{part_name}", part_name, part)
            elif name == "time_pooling":
                _check_part(name, "pooling", layer)
            elif not isinstance(layer, (*_TAKE_LENGTHS, *_OF_EACH_FRAME)):
                kind = type(layer)
                raise ValueError(
                    f"use_lengths: {name} of the CRDNN is {kind.__module__}.{kind.__qualname__}, "
                    "which takes no lengths; an rnn_class that does is SLiGRU or LiGRU of "
                    "sb_fast_sligru, or RNN, LSTM or GRU of speechbrain.nnet.RNN"
                )

    def _count_steps(self, x, lengths):
        """Frames of each sequence, int64, [B]; ValueError if there are too few for the CNN."""
        least = 1
        for border, pool in reversed(self._windows()):
            least = max(border + 1, least * pool)
        if x.shape[1] < least:
            raise ValueError(
                f"x must have at least {least} frames, but its shape is {list(x.shape)}"
            )
        steps = count_steps(lengths, x.shape[0], x.shape[1])
        if lengths.device != x.device:
            raise ValueError(f"lengths are on {lengths.device}, but x is on {x.device}")
        if not x.is_cuda and not torch.compiler.is_compiling() and (steps < least).any():
            raise ValueError(
                f"lengths: a sequence has {int(steps.min())} of {x.shape[1]} frames, and the CNN "
                f"needs at least {least}"
            )
        return steps.clamp(min=least)

    def _windows(self):
        """Of each convolution, the frames that it mirrors, and those pooled after it."""
        windows = []
        for block in self.CNN.values() if "CNN" in self else ():
            windows.append((_border(block["conv_1"]), 1))
            windows.append((_border(block["conv_2"]), pool_windows(block.pooling)[0]))
        if "time_pooling" in self:
            windows.append((0, pool_windows(self.time_pooling)[0]))
        return windows

    def _call_convolutions(self, x, steps):
        """The CNN and the time pooling by SpeechBrain's layers, for sequences of `steps` frames."""
        for block in self.CNN.values() if "CNN" in self else ():
            for name, part in block.items():
                if name not in ("conv_1", "conv_2"):
                    x = part(x)
                    continue
                frames, border = x.shape[1], _border(part)
                x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, border))
                x = part(_mirror(x, steps - 1, border))[:, :frames]
            steps = steps // pool_windows(block.pooling)[0]
        return self.time_pooling(x) if "time_pooling" in self else x

    def _steps(self):
        """What the CNN computes: a list of `Step`."""
        steps = [step for block in self.CNN.values() for step in block_steps(block)]
        if "time_pooling" in self:
            time, frequency = steps[-1].pool
            time *= pool_windows(self.time_pooling)[0]
            steps[-1] = steps[-1]._replace(pool=(time, frequency))
        return steps

    def _convolve(self, x, sequence_frames=None):
        """The CNN and the time pooling, of which nothing but the convolutions is SpeechBrain's.

        Frames of each sequence are int64, [B], those of the batch if not given.
        """
        steps = self._steps()
        _check(x, steps)
        x = (x.unsqueeze(3) if x.ndim == 3 else x).permute(0, 3, 1, 2)
        frames = x.shape[2]
        x = F.pad(x, (1, 1, 1, 1), mode="reflect").permute(0, 2, 3, 1)
        x = F.pad(x, (0, 0, 0, 0, 0, _rows(x, frames + 2) - frames - 2)).contiguous()
        for step in steps:
            if sequence_frames is not None:
                x = _mirror(x, sequence_frames, 1)  # the first of its rows is a border
                sequence_frames = sequence_frames // step.pool[0]
            x = step.convolve(x)
            # Under autocast SpeechBrain's LayerNorm returns float32 on a GPU.
            dtype = x.dtype
            if x.is_cuda and dtype != torch.float64 and torch.is_autocast_enabled("cuda"):
                dtype = torch.float32
            last = step is steps[-1]
            padded = _is_on_gpu(x) and not last
            x = step.norm_pool(
                x,
                self._draw_mask(step, x, dtype),
                halo=not last,
                out_dtype=dtype if last else x.dtype,
                frames=frames,
                out_frames=_rows(x, frames // step.pool[0] + 2) if padded else 0,
            )
            frames //= step.pool[0]
        return x

    def _draw_mask(self, step, x, dtype):
        """Draw a dropout mask, [B, frequencies after pooling], or None.

        SpeechBrain's Dropout2d drops whole frequencies of a row. The same call draws it here.
        """
        if step.drop is None or not step.drop.training or step.drop.p == 0:
            return None
        ones = torch.ones(
            x.shape[0], x.shape[2] // step.pool[1], 1, 1, dtype=dtype, device=x.device
        )
        return step.drop(ones).flatten(1)


def _is_on_gpu(x):
    return x.is_cuda


def _rows(x, frames):
    """How many frames a convolution is given where `frames` count."""
    return -(-frames // FRAMES_STEP) * FRAMES_STEP if _is_on_gpu(x) else frames


def _without_padding(x, steps):
    """Zeros after the first `steps` [B] frames of x [B, T, ...]."""
    is_padding = ~frame_mask(steps, x.shape[1])
    return x.masked_fill(is_padding.view(*x.shape[:2], *(1,) * (x.ndim - 2)), 0.0)


def _mirror(x, last, width):
    """Make `width` frames of x [B, T, ...] after each sequence's `last` [B] mirror those before it.

    In place: `x` is nobody else's.
    """
    if width == 0:
        return x
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    offsets = torch.arange(1, width + 1, device=x.device)
    last = last.unsqueeze(1)
    return x.index_put_((rows, last + offsets), x[rows, last - offsets])


def _call_layers(layers, x, steps):
    """Call the layers after the CNN for x [B, T, ...] whose sequences have `steps` [B] frames."""
    batch, time = x.shape[:2]
    # RNNs that round lengths to steps have `steps` by it, and so have those that cut fractions off.
    lengths = ((steps + 0.25) / time).clamp(max=1.0)
    # A layer of each frame would take padding into the statistics of a BatchNorm: in training it
    # has the frames of all sequences as those of one.
    frames = valid_frames(steps, time) if any(layer.training for layer in layers) else None
    for layer in layers:
        if isinstance(layer, _TAKE_LENGTHS):
            x, _ = layer(x, lengths=lengths)
            if x.shape[1] < time:  # SpeechBrain's end with the longest
                x = F.pad(x, (0, 0, 0, time - x.shape[1]))
        elif frames is None:
            x = layer(x)
        else:
            x = unpack(layer(pack(x, frames).unsqueeze(0)).squeeze(0), frames, batch, time)
    return _without_padding(x, steps)


def _convolve_one_channel(x, weight):
    """The convolution of [B, T + 2, F + 2, 1] with [out, 1, 3, 3] as a product over its windows.

    cuDNN's convolutions of one channel take three times as long, with TF32 forty times.
    """
    windows = x[..., 0].unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    zeros = (0, VALUES_OF_WINDOW - windows.shape[3])
    return F.linear(F.pad(windows, zeros), F.pad(weight.flatten(1), zeros))


def build(crdnn_class, use_lengths=False, **arguments):
    """Build a CRDNN of a class that a YAML has under a key of its own.

    Arguments
    ---------
    crdnn_class : type
        :class:`CRDNN`, or SpeechBrain's.
    use_lengths : bool
        Of :class:`CRDNN`; SpeechBrain's has no such argument.
    **arguments
        Of its constructor.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If `crdnn_class` is not a class of modules, or takes no lengths that it shall use.

    Example
    -------
    >>> list(build(CRDNN, input_size=20, cnn_channels=[4, 8], rnn_neurons=6, dnn_blocks=0))
    ['CNN', 'RNN']
    """
    if use_lengths:
        if not (isinstance(crdnn_class, type) and issubclass(crdnn_class, CRDNN)):
            raise ValueError(
                f"use_lengths: crdnn_class must be sb_fast_sligru.CRDNN, but is {crdnn_class!r}"
            )
        arguments["use_lengths"] = use_lengths
    return build_module("crdnn_class", crdnn_class, arguments)


class Step(NamedTuple):
    """A convolution of 3 x 3 and what follows until the next."""

    conv: nn.Conv2d
    norm: nn.LayerNorm
    slope: float
    """Of the LeakyReLU, for negative values."""
    pool: tuple
    """Frames and frequencies of a window."""
    drop: nn.Dropout2d | None

    def convolve(self, x):
        """The convolution alone, without its bias.

        Arguments
        ---------
        x : torch.Tensor
            [B, T + 2, F + 2, C], with a border.

        Returns
        -------
        torch.Tensor
            [B, T, F, channels].
        """
        # Weights are [out, in, F, T], the convolution is over [B, channels, T, F].
        weight = self.conv.weight.transpose(2, 3)
        if _is_on_gpu(x) and x.shape[3] == 1:
            return _convolve_one_channel(x, weight)
        # Both as views of tensors whose channels lie next to each other.
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x.permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1)

    def norm_pool(self, x, drop_mask=None, **options):
        """What follows it, by :func:`ops.norm_pool`, whose arguments these are."""
        return ops.norm_pool(
            x,
            self.conv.bias,
            self.norm.weight,
            self.norm.bias,
            drop_mask,
            eps=self.norm.eps,
            negative_slope=self.slope,
            pool_time=self.pool[0],
            pool_frequency=self.pool[1],
            **options,
        )


def block_steps(block):
    """What a block of convolutions computes.

    Arguments
    ---------
    block : speechbrain.lobes.models.CRDNN.CNN_Block
        Of a CRDNN whose CNN runs on our kernels.

    Returns
    -------
    list of Step
    """
    steps = []
    for i in (1, 2):
        conv, norm, act = (block[f"{part}_{i}"] for part in ("conv", "norm", "act"))
        steps.append(Step(conv.conv, norm.norm, act.negative_slope, (1, 1), None))
    steps[-1] = steps[-1]._replace(pool=pool_windows(block.pooling), drop=block.drop.drop)
    return steps


# The layers of a block -> what each is, outermost first.
_CONV = {"": CNN.Conv2d, "conv": nn.Conv2d}
_NORM = {"": normalization.LayerNorm, "norm": nn.LayerNorm}
_ACT = {"": nn.LeakyReLU}
_POOLING = {"": (pooling.Pooling1d, pooling.Pooling2d), "pool_layer": nn.MaxPool2d}
_DROP = {"": dropout.Dropout2d, "drop": nn.Dropout2d}
_PARTS = {
    "conv_1": _CONV,
    "norm_1": _NORM,
    "act_1": _ACT,
    "conv_2": _CONV,
    "norm_2": _NORM,
    "act_2": _ACT,
    "pooling": _POOLING,
    "drop": _DROP,
}
_TIME_POOLING = {"": pooling.Pooling1d, "pool_layer": nn.MaxPool2d}

# Layers after the CNN: those that can be told where sequences end, and those that need not be.
_TAKE_LENGTHS = (SLiGRU, LiGRU, RNN.RNN, RNN.LSTM, RNN.GRU)
_OF_EACH_FRAME = (containers.Sequential, linear.Linear, nn.Dropout)

# Attributes of a kind -> the value that the operator needs, and of those, what lengths need.
_SAME_PADDING = {
    "padding": "same",
    "padding_mode": "reflect",
    "swap": False,
    "skip_transpose": False,
}
_NEEDED = {
    CNN.Conv2d: _SAME_PADDING | {"max_norm": None},
    nn.Conv2d: {"kernel_size": (3, 3), "stride": (1, 1), "dilation": (1, 1), "groups": 1},
    nn.MaxPool2d: {"ceil_mode": False, "return_indices": False},
}


def _part_obstacle(name, part, kinds):
    """Tell why the operator cannot stand in for a layer made of `kinds`, "" if it can."""
    for attribute, kind in kinds.items():
        inner = part.get_submodule(attribute)
        kind = kind if isinstance(kind, tuple) else (kind,)
        if not any(is_plain(inner, one) for one in kind):
            expected = f"a {' or '.join(one.__name__ for one in kind)}"
            return not_plain(f"{attribute}{' of ' if attribute else ''}{name}", inner, expected)
        for key, value in _NEEDED.get(kind[0], {}).items():
            found = getattr(inner, key)
            if found != value:
                return f"{key} of {name} is {found}, the kernels need {value}"
        if isinstance(inner, (nn.Conv2d, nn.LayerNorm)) and (
            inner.weight is None or inner.bias is None
        ):
            return f"{name} has no {'weight' if inner.weight is None else 'bias'}"
        if isinstance(inner, nn.Conv2d) and inner.out_channels == 1:
            return f"{name} has one channel"  # whose axis SpeechBrain removes
        if isinstance(inner, nn.MaxPool2d) and pool_windows(part) is None:
            return f"the windows of {name} are not those of SpeechBrain's CRDNN"
    return ""


def _check_part(name, kind, part):
    """Raise ValueError if a part of the CNN, of that kind, does not treat sequences alone."""
    obstacle = ""
    if kind in ("conv_1", "conv_2"):
        if not isinstance(part, CNN.Conv2d):
            obstacle = "no Conv2d of speechbrain.nnet.CNN"
        elif part.conv.stride != (1, 1):
            obstacle = f"a convolution of stride {part.conv.stride}"
        else:
            for key, value in _SAME_PADDING.items():
                if getattr(part, key) != value:
                    obstacle = f"a convolution with {key} {getattr(part, key)}, not {value}"
    elif kind in ("norm_1", "norm_2") and not isinstance(part, normalization.LayerNorm):
        obstacle = "no LayerNorm of speechbrain.nnet.normalization"
    elif kind == "pooling":
        is_max = isinstance(getattr(part, "pool_layer", None), nn.MaxPool2d)
        if not is_max or pool_windows(part) is None or part.pool_layer.ceil_mode:
            obstacle = "no max-pooling over windows of SpeechBrain's CRDNN"
    if obstacle:
        raise ValueError(f"use_lengths: {name} of the CRDNN is {obstacle}")


def _border(conv):
    """How many frames a convolution mirrors at each end."""
    return conv.conv.dilation[1] * (conv.conv.kernel_size[1] - 1) // 2


def _pooled(windows):
    """How many frames become one."""
    frames = 1
    for _, pool in windows:
        frames *= pool
    return frames


def pool_windows(part):
    """What a pooling layer takes together.

    Arguments
    ---------
    part : speechbrain.nnet.pooling.Pooling1d or Pooling2d

    Returns
    -------
    tuple of int, or None
        Frames and frequencies; None if its windows are not plain.
    """
    pool = part.pool_layer

    def pair(value):
        return tuple(value) if isinstance(value, (tuple, list)) else (value, value)

    size = pair(pool.kernel_size)
    plain = pair(pool.stride) == size and pair(pool.padding) == (0, 0)
    plain &= pair(pool.dilation) == (1, 1)
    if isinstance(part, pooling.Pooling2d):
        return size if plain and tuple(part.pool_axis) == (1, 2) else None
    if not plain or size[0] != 1 or part.pool_axis not in (1, 2):
        return None
    return (size[1], 1) if part.pool_axis == 1 else (1, size[1])


def _check(x, steps):
    """Raise ValueError for a bad shape."""
    channels, frequencies = steps[0].conv.in_channels, steps[0].norm.normalized_shape[0]
    least = 1
    for step in reversed(steps):  # a border of one frame is mirrored before each convolution
        least = max(2, least * step.pool[0])
    expected = f"[batch, frames, {frequencies}]"
    fits = x.ndim == 3 and channels == 1
    if not fits:
        fits = x.ndim == 4 and x.shape[3] == channels
    if channels > 1:
        expected = f"[batch, frames, {frequencies}, {channels}]"
    if not fits or x.shape[2] != frequencies or x.shape[1] < least:
        raise ValueError(
            f"x must be {expected} with at least {least} frames, but its shape is {list(x.shape)}"
        )
