"""SLi-GRU and Li-GRU encoders, and an attention decoder, for SpeechBrain on compiled kernels.

Importing this package, `sb_fast_sligru.ops` included, needs torch alone. `SLiGRU`, `LiGRU` and
`AttentionalRNNDecoder` subclass SpeechBrain's modules and import SpeechBrain when they are first
asked for.
"""

from . import ops
from .ops import backend

__version__ = "0.1.0"
__all__ = ["AttentionalRNNDecoder", "LiGRU", "SLiGRU", "backend", "ops"]


def __getattr__(name):
    if name in ("SLiGRU", "LiGRU"):
        from . import rnn

        return getattr(rnn, name)
    if name == "AttentionalRNNDecoder":
        from . import decoder

        return decoder.AttentionalRNNDecoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
