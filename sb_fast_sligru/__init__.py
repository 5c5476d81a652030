"""SLi-GRU and Li-GRU encoders for SpeechBrain on compiled CPU and CUDA kernels.

Importing this package, `sb_fast_sligru.ops` included, needs torch alone. `SLiGRU` and `LiGRU`
subclass SpeechBrain's modules and import SpeechBrain when they are first asked for.
"""

from . import ops
from .ops import backend

__version__ = "0.2.0"
__all__ = ["LiGRU", "SLiGRU", "backend", "ops"]


def __getattr__(name):
    if name in ("SLiGRU", "LiGRU"):
        try:
            from . import rnn
        except AttributeError as error:  # which would read as "cannot import name"
            raise ImportError(f"sb_fast_sligru.rnn does not import: {error}") from error
        return getattr(rnn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
