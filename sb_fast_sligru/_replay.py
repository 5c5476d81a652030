"""A step of a loop as one CUDA graph: the host gives one launch for all of its kernels.

Where a step has few rows, its kernels take less time than the host needs to launch them.
"""

import threading

import torch

_local = threading.local()


class Replay:
    """A function whose calls all have the same shapes, replayed from its second call on.

    The first call runs as it is (libraries set themselves up), the second is captured. On other
    devices than CUDA, and while the caller captures a graph, every call runs as it is.

    Arguments
    ---------
    function : callable
        Of tensors; it returns tensors, may change tensors of its own and never reads one on the
        host.
    """

    def __init__(self, function):
        self.function = function
        self.is_warm = False
        self.graph = None

    def __call__(self, *inputs):
        """What the function returns.

        The tensors are those of every call from the second on, so that the next one overwrites
        them; `inputs` are copied.
        """
        if not inputs[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return self.function(*inputs)
        if not self.is_warm:
            self.is_warm = True
            return self.function(*inputs)
        if self.graph is None:
            self._capture(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs

    def _capture(self, inputs):
        self.inputs = [given.clone() for given in inputs]
        stream, pool = _place(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        self.graph, self.outputs = _captured(lambda: self.function(*self.inputs), stream, pool)


def _captured(function, stream, pool=None):
    """The graph of a call of `function`, and what it returns.

    Not by torch.cuda.graph, which empties PyTorch's cache of memory each time.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        # Other threads, which load data, may go on.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            outputs = function()
        finally:
            graph.capture_end()
    return graph, outputs


def _place(device):
    """A stream to capture on, and the pool of memory that a thread's graphs share in turn."""
    places = _local.__dict__.setdefault("places", {})
    if device not in places:
        stream = torch.cuda.Stream(device)
        # A pool lives as long as a graph that has memory in it.
        places[device] = stream, _captured(lambda: torch.zeros(1, device=device), stream)
    stream, (graph, _) = places[device]
    return stream, graph.pool()
