"""The operators as plain PyTorch: what compiled kernels are tested against, and the fallback."""

from ._adadelta import adadelta_
from ._attention_decoder import attention_decoder
from ._ctc_loss import ctc_loss
from ._ctc_prefix import LOG_ZERO, ctc_prefix_extend, ctc_prefix_scores, ctc_prefix_start
from ._error import relative_error
from ._light_gru import ACTIVATIONS, light_gru
from ._location_energies import location_energies
from ._norm_pool import norm_pool

__all__ = [
    "ACTIVATIONS",
    "LOG_ZERO",
    "adadelta_",
    "attention_decoder",
    "ctc_loss",
    "ctc_prefix_extend",
    "ctc_prefix_scores",
    "ctc_prefix_start",
    "light_gru",
    "location_energies",
    "norm_pool",
    "relative_error",
]
