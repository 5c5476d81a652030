"""Encoders that hear speech as it is spoken: chunks give what one pass over the whole gives.

An encoder of SpeechBrain is a sequence of layers. What each of them must remember of a stream:

==================  ============================================================================
layer               from one chunk to the next
==================  ============================================================================
``StreamingFbank``  samples that windows to come reach back to
convolution         frames that the kernel reaches back to, and those whose right neighbours are
                    not there yet; the border is mirrored at both ends of the stream alone
pooling in time     frames of a window that is not full
SLi-GRU, Li-GRU     the hidden state of each layer
others              nothing: they see one frame at a time
==================  ============================================================================

SpeechBrain's :class:`~speechbrain.lobes.features.StreamingFeatureWrapper` computes frames before a
stream's first sample and one more with each chunk, so that the layers after it see other numbers
than those that they were trained on.
"""

import dataclasses
import functools

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import rnn
from ._parts import is_plain
from ._replay import Replay
from ._stock import (
    CNN,
    RNN,
    InputNormalization,
    activations,
    containers,
    dropout,
    linear,
    normalization,
    pooling,
)
from ._stock import CRDNN as stock
from .crdnn import CRDNN, Step, block_steps, pool_windows
from .features import StreamingFbank
from .ops import few_rows_linear
from .ops._backends import forced_backend

__all__ = ["StreamingEncoder", "StreamingEncoderContext"]


@dataclasses.dataclass
class StreamingEncoderContext:
    """What a stream, or a batch of streams in step, has left behind so far."""

    states: list
    """Of each layer: a tensor, or None if it has nothing to remember."""
    batch: int | None = None
    """Streams; the first chunk tells."""
    samples: int = 0
    """Heard of each stream."""
    is_over: bool = False
    """Whether the last chunk was heard."""


class StreamingEncoder(nn.Module):
    """An encoder from waveforms on, chunk by chunk.

    On a GPU chunks of one size are one CUDA graph, after the first few. It may have any number of
    contexts, but one thread at a time calls it. Weights may change in place; an encoder whose
    layers were replaced, or moved without it, needs a new StreamingEncoder.

    Arguments
    ---------
    encoder : speechbrain.nnet.containers.Sequential
        In evaluation mode: :class:`StreamingFbank`, then layers such as ``InputNormalization`` of
        global statistics, a CRDNN with a unidirectional SLi-GRU or Li-GRU, ``Linear``, ``Softmax``.
        ``EncoderASR.mods.encoder`` is one.

    Attributes
    ----------
    stride : int
        Samples from one state to the next.
    lookahead : int
        Samples after a state's own `stride` samples that must be heard before it can be computed.
    lookahead_ms : float
        The same in milliseconds. A state comes with the chunk that has the last of these.
    shortest : int
        Samples that a whole stream must have.

    Raises
    ------
    ValueError
        If the encoder is in training mode, does not begin with a StreamingFbank, or has hooks or a
        layer that needs a whole utterance or is not known here.

    Example
    -------
    >>> from sb_fast_sligru import CRDNN, SLiGRU
    >>> crdnn = CRDNN(input_size=40, rnn_class=SLiGRU, rnn_bidirectional=False, rnn_neurons=16)
    >>> encoder = StreamingEncoder(containers.Sequential(StreamingFbank(), crdnn).eval())
    >>> encoder.stride, encoder.lookahead_ms
    (160, 42.5)
    >>> context = encoder.make_streaming_context()
    >>> states = [encoder(chunk, context) for chunk in torch.rand(1, 3200).split(640, 1)]
    >>> states.append(encoder(torch.rand(1, 0), context, is_last=True))
    >>> torch.cat(states, 1).shape
    torch.Size([1, 21, 512])
    """

    def __init__(self, encoder):
        super().__init__()
        _check_encoder(encoder)
        self.encoder = encoder
        layers = [each for each in _layers("", encoder) if _kind(each[1]) not in OF_TRAINING]
        self._steps = [_step_of(name, layer) for name, layer in layers]
        if not self._steps or not isinstance(self._steps[0], _Features):
            raise ValueError("encoder must begin with a StreamingFbank")
        self._replays = {}
        self.eval()
        self.stride, last, fewest = 1, 0, 1
        for step in reversed(self._steps):
            self.stride *= step.stride
            last, fewest = step.last_input(last), step.fewest_inputs(fewest)
        self.lookahead = last + 1 - self.stride
        self.lookahead_ms = 1e3 * self.lookahead / self._steps[0].layer.compute_STFT.sample_rate
        self.shortest = fewest
        with torch.no_grad():
            silence = self._window().new_zeros(1, fewest)
            states, _ = self._run(silence, [None] * len(self._steps), is_last=True)
        self._width = states.shape[2]

    def make_streaming_context(self):
        """A context for new streams.

        Returns
        -------
        StreamingEncoderContext
        """
        return StreamingEncoderContext([None] * len(self._steps))

    @torch.no_grad()
    def forward(self, chunk, context, is_last=False):
        """Encode what has been heard since the call before.

        Arguments
        ---------
        chunk : torch.Tensor
            [B, samples], any number of samples, also none; of the encoder's dtype. Chunks of one
            size, a multiple of `stride`, are the fastest.
        context : StreamingEncoderContext
            Of the same streams; it is changed.
        is_last : bool
            Whether the streams end with this chunk.

        Returns
        -------
        torch.Tensor
            [B, T, features], the states that can be told now and were not before; T may be 0. Those
            of all chunks are the states of one pass over the whole, but for the rounding of
            products.

        Raises
        ------
        ValueError
            If the shape of `chunk` does not fit, or the streams are over, or end with fewer samples
            than `shortest`.
        """
        self._check(chunk, context, is_last)
        context.batch = chunk.shape[0]
        context.samples += chunk.shape[1]
        context.is_over = is_last
        if _is_on_gpu(chunk):
            run = self._run if is_last else self._replay
            states, context.states = run(chunk, context.states, is_last)
        else:
            with torch.inference_mode():  # operators are called in half of the time
                states, context.states = self._run(chunk, context.states, is_last)
            states = None if states is None else states.clone()  # which autograd may see
        return chunk.new_empty(chunk.shape[0], 0, self._width) if states is None else states

    def _check(self, chunk, context, is_last):
        if self.training or self.encoder.training:
            raise ValueError("encoder is in training mode: call its eval() first")
        dtype = self._window().dtype
        if chunk.ndim != 2 or chunk.dtype != dtype:
            raise ValueError(
                f"chunk must be [batch, samples] of {dtype}, but is {list(chunk.shape)} of "
                f"{chunk.dtype}"
            )
        if context.is_over:
            raise ValueError("context: its streams are over; new ones need a new context")
        if context.batch not in (None, chunk.shape[0]):
            raise ValueError(
                f"chunk has {chunk.shape[0]} streams, but those before had {context.batch}"
            )
        heard = context.samples + chunk.shape[1]
        if is_last and heard < self.shortest:
            raise ValueError(
                f"chunk: the streams end after {heard} samples, but need at least {self.shortest}"
            )

    def _window(self):
        return self._steps[0].layer.compute_STFT.window

    def _run(self, x, states, is_last=False):
        """The next states, or None, and what the layers remember afterwards."""
        states = list(states)
        for index, step in enumerate(self._steps):
            x, states[index] = step(x, states[index], is_last)
            if x is None and not is_last:  # nothing comes to the layers after it
                break
        return x, states

    def _replay(self, chunk, states, is_last):
        """`_run` as a CUDA graph, once the shapes of states stay as they are."""
        if torch.is_autocast_enabled("cuda"):  # which keeps weights for itself, until its end
            return self._run(chunk, states)
        present = [index for index, state in enumerate(states) if state is not None]
        mode = forced_backend(), torch.is_inference_mode_enabled()
        key = (*mode, chunk.device, chunk.dtype, chunk.shape, _shapes(states))
        if key not in self._replays:
            x, following = self._run(chunk, states)
            if x is not None and _shapes(following) == _shapes(states):
                self._replays[key] = Replay(functools.partial(self._run_present, present))
            return x, following
        # The next call, perhaps of another context, overwrites what this one returns.
        found = self._replays[key](chunk, *(states[index] for index in present))
        x, *following = (tensor.clone() for tensor in found)
        return x, self._scattered(present, following)

    def _run_present(self, present, chunk, *states):
        x, following = self._run(chunk, self._scattered(present, states))
        return (x, *(following[index] for index in present))

    def _scattered(self, present, states):
        scattered = [None] * len(self._steps)
        for index, state in zip(present, states, strict=True):
            scattered[index] = state
        return scattered

    def _apply(self, fn, recurse=True):
        """For `to` and the like, which give weights another place."""
        self._replays.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self):
        """For copies: graphs have none."""
        return self.__dict__ | {"_replays": {}}


class _EachFrame:
    """A layer that sees one frame at a time. Other kinds of layers are made of it.

    A step is called with frames, or None if there are none, the layer's state, and whether these
    are the stream's last; it returns frames, or None, and the state.
    """

    stride = 1
    """Inputs from one output to the next."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, state, is_last):
        return (None if x is None else self.layer(x)), state

    def last_input(self, output):
        """Place of the last input that the output at a place needs."""
        return output

    def fewest_inputs(self, outputs):
        """Inputs that a whole stream must have to have so many outputs."""
        return outputs


class _Features(_EachFrame):
    """Frames are centred on 0, stride, 2 stride, ...; there are zeros outside of the stream."""

    def __init__(self, layer):
        super().__init__(layer)
        stft = layer.compute_STFT
        self.stride = stft.hop_length
        self.right = stft.n_fft - stft.n_fft // 2  # samples of a window from its centre on
        # As many frames before the first that is wanted as its window reaches back to.
        self.frames_before = -(-(stft.n_fft // 2) // self.stride)

    def __call__(self, x, state, is_last):
        before = self.frames_before * self.stride  # place of the first centre that is wanted
        if state is None:
            state = x.new_zeros(x.shape[0], before)
        x = torch.cat([state, x], 1)
        reach = 0 if is_last else self.right
        count = (x.shape[1] - before - reach) // self.stride + 1
        if count <= 0:
            return None, x
        frames = self.layer(x)[:, self.frames_before :][:, :count]
        return frames, x[:, count * self.stride :]

    def last_input(self, output):
        return output * self.stride + self.right - 1

    def fewest_inputs(self, outputs):
        return max(1, (outputs - 1) * self.stride)


class _Convolution(_EachFrame):
    """The layer itself mirrors the border: what it makes of a border that is none is left out."""

    def __init__(self, layer):
        super().__init__(layer)
        self.reach = layer.kernel_size[-1] // 2 * layer.dilation[-1]  # to either side, in frames

    def __call__(self, x, state, is_last):
        # The state has `reach` frames whose outputs are not there yet, after as many whose are.
        done = 0 if state is None else max(0, state.shape[1] - self.reach)
        x = torch.cat([part for part in (state, x) if part is not None], 1)
        end = x.shape[1] - (0 if is_last else self.reach)
        if end <= done:
            return None, x
        return self.outputs(x, done, end), x[:, max(0, end - self.reach) :]

    def outputs(self, x, first, end):
        """Outputs from `first` on, before `end`, of all inputs that they need."""
        return self.layer(x)[:, first:end]

    def last_input(self, output):
        return output + self.reach

    def fewest_inputs(self, outputs):
        return max(outputs, self.reach + 1)


class _OurConvolution(_Convolution):
    """A convolution of our CRDNN and what follows until the next, on its kernels."""

    reach = 1

    def __init__(self, step):
        self.layer = step

    def outputs(self, x, first, end):
        before, after = first == 0, end == x.shape[1]
        x = x[:, max(0, first - 1) : end + 1]
        x = _mirror_border(x, 1, before, after)
        x = _mirror_border(x.unsqueeze(3) if x.ndim == 3 else x, 2)
        return self.layer.norm_pool(self.layer.convolve(x))


class _TimePooling(_EachFrame):
    """Windows lie side by side; one that is not full at the end of the stream is left out."""

    def __init__(self, layer, frames, frequencies):
        super().__init__(layer)
        self.stride, self.frequencies = frames, frequencies

    def __call__(self, x, state, is_last):
        parts = [part for part in (state, x) if part is not None]
        if not parts:
            return None, None
        x = torch.cat(parts, 1)
        end = x.shape[1] // self.stride * self.stride
        return (self.pool(x[:, :end]) if end else None), x[:, end:]

    def pool(self, x):
        """What the layer does, without its transpositions."""
        x = x[:, :, : x.shape[2] // self.frequencies * self.frequencies]
        windows = x.unflatten(2, (-1, self.frequencies)).unflatten(1, (-1, self.stride))
        return windows.amax((2, 4))

    def last_input(self, output):
        return (output + 1) * self.stride - 1

    def fewest_inputs(self, outputs):
        return outputs * self.stride


class _Linear(_EachFrame):
    """A chunk has few rows."""

    def __call__(self, x, state, is_last):
        if x is None:
            return None, state
        w = self.layer.w
        return few_rows_linear(x.flatten(0, 1), w.weight, w.bias).unflatten(0, x.shape[:2]), state


class _Recurrence(_EachFrame):
    def __call__(self, x, state, is_last):
        return (None, state) if x is None else self.layer(x, hx=state)


CONTAINERS = (
    CRDNN,
    containers.LengthsCapableSequential,
    containers.Sequential,
    nn.Sequential,
    stock.CNN_Block,
    stock.CRDNN,
    stock.DNN_Block,
)
RECURRENT = (RNN.LiGRU, RNN.SLiGRU, rnn.LiGRU, rnn.SLiGRU)
OF_TRAINING = (dropout.Dropout2d, nn.Dropout)  # which do nothing here
OF_EACH_FRAME = (
    activations.Softmax,
    activations.Swish,
    linear.Linear,
    nn.ELU,
    nn.GELU,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Tanh,
    normalization.BatchNorm1d,
    normalization.LayerNorm,
)


def _check_encoder(encoder):
    for name, module in encoder.named_modules():
        if module.training:
            raise ValueError("encoder is in training mode: call its eval() first")
        if not is_plain(module, _kind(module)):
            raise ValueError(
                f"encoder: {name or 'it'} has hooks or quantised weights, which a stream "
                "may not call"
            )


def _layers(name, module):
    """Names and layers in the order in which they are called."""
    kind = _kind(module)
    if kind not in CONTAINERS:
        yield name, module
        return
    for key, child in module.named_children():
        if kind is CRDNN and key == "CNN" and _is_ours(module):
            yield from ((name, step) for block in child.values() for step in block_steps(block))
            continue
        yield from _layers(f"{name}.{key}" if name else key, child)


def _is_ours(crdnn):
    """Whether the CNN of our CRDNN runs on our kernels, frame by frame."""
    parameter = next(crdnn.parameters())
    if crdnn.choose_backend(parameter.device, parameter.dtype)[0] == "reference":
        return False
    return all(pool_windows(block.pooling)[0] == 1 for block in crdnn.CNN.values())


def _kind(module):
    return parametrize.type_before_parametrizations(module)


def _step_of(name, layer):
    """How a stream calls a layer; ValueError if it cannot."""
    kind = _kind(layer)
    if kind is Step:
        return _OurConvolution(layer)
    if kind is StreamingFbank:
        return _Features(layer)
    if kind is CNN.Conv2d:
        is_known = layer.padding == "same" and tuple(layer.stride) == (1, 1)
        if is_known and not layer.swap and not layer.skip_transpose:
            return _Convolution(layer)
    if kind in (pooling.Pooling1d, pooling.Pooling2d) and is_plain(layer.pool_layer, nn.MaxPool2d):
        windows = pool_windows(layer)
        if windows is not None:
            return _EachFrame(layer) if windows[0] == 1 else _TimePooling(layer, *windows)
    if kind in RECURRENT:
        if layer.bidirectional:
            raise ValueError(f"encoder: {name} is bidirectional: it begins at a stream's end")
        return _Recurrence(layer)
    if kind is InputNormalization:
        if layer.norm_type != "global":
            raise ValueError(
                f"encoder: {name} takes its statistics of a whole {layer.norm_type}, which a "
                'stream does not have: its norm_type must be "global"'
            )
        if layer.glob_mean.numel() == 0:
            raise ValueError(f"encoder: {name} has no statistics: it was never trained")
        return _EachFrame(layer)
    if kind is linear.Linear and layer.max_norm is None and not layer.combine_dims:
        return _Linear(layer)
    if kind in OF_EACH_FRAME:
        return _EachFrame(layer)
    why = ", whose floor is that of a whole utterance: take StreamingFbank"
    raise ValueError(
        f"encoder: {name} is a {kind.__module__}.{kind.__qualname__}"
        f"{why if kind.__name__ == 'Fbank' else ', which a stream cannot call'}"
    )


def _mirror_border(x, axis, before=True, after=True):
    """With a place more at either end; F.pad wakes threads for so few."""
    parts = [x.narrow(axis, 1, 1)] if before else []
    parts += [x, x.narrow(axis, -2, 1)] if after else [x]
    return torch.cat(parts, axis) if len(parts) > 1 else x


def _is_on_gpu(x):
    return x.is_cuda


def _shapes(states):
    return tuple(None if state is None else state.shape for state in states)
