"""SLi-GRU and Li-GRU encoders, the CRDNN around them, an attention decoder, and its searches.

For SpeechBrain, on compiled kernels. Importing this package, `sb_fast_sligru.ops` included, needs
torch alone. The classes subclass SpeechBrain's modules and import SpeechBrain when they are first
asked for.
"""

import importlib

from . import ops
from .ops import backend

__version__ = "0.2.0"
__all__ = [
    "CRDNN",
    "AttentionalRNNDecoder",
    "LiGRU",
    "S2SRNNBeamSearcher",
    "S2SRNNGreedySearcher",
    "SLiGRU",
    "backend",
    "ops",
]


def __getattr__(name):
    modules = {
        "SLiGRU": "rnn",
        "LiGRU": "rnn",
        "CRDNN": "crdnn",
        "AttentionalRNNDecoder": "decoder",
        "S2SRNNBeamSearcher": "search",
        "S2SRNNGreedySearcher": "search",
    }
    module = modules.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except AttributeError as error:  # which would read as "cannot import name"
        raise ImportError(f"{__name__}.{module} does not import: {error}") from error
