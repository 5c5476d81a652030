"""SLi-GRU and Li-GRU encoders, the CRDNN around them, an attention decoder, and its search.

For SpeechBrain, on compiled kernels. Importing this package, `sb_fast_sligru.ops` included, needs
torch alone. The classes subclass SpeechBrain's and import SpeechBrain when they are first asked
for; `Adadelta`, `SyncBatchNorm` and `ctc_loss` need none of it.
"""

import importlib

from . import ops
from .losses import ctc_loss
from .ops import backend
from .optim import Adadelta
from .sync_batch_norm import SyncBatchNorm

__version__ = "0.2.0"
__all__ = [
    "CRDNN",
    "Adadelta",
    "AttentionalRNNDecoder",
    "CTCScorer",
    "LiGRU",
    "S2SRNNBeamSearcher",
    "S2SRNNGreedySearcher",
    "SLiGRU",
    "StreamingEncoder",
    "StreamingFbank",
    "SyncBatchNorm",
    "accelerate",
    "backend",
    "ctc_loss",
    "ops",
    "restore",
]


def __getattr__(name):
    module = {
        "SLiGRU": "rnn",
        "LiGRU": "rnn",
        "CRDNN": "crdnn",
        "AttentionalRNNDecoder": "decoder",
        "CTCScorer": "ctc_scorer",
        "StreamingEncoder": "streaming",
        "StreamingFbank": "features",
        "S2SRNNBeamSearcher": "search",
        "S2SRNNGreedySearcher": "search",
        "accelerate": "acceleration",
        "restore": "acceleration",
    }.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except AttributeError as error:  # which would read as "cannot import name"
        raise ImportError(f"{__name__}.{module} does not import: {error}") from error
