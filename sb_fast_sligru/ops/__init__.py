"""The compiled operators: one function each, differentiable, with their choice of backend.

A file holds an operator: its function, fake kernels, autograd, and what chooses its backend and
kernel. `backend` forces that choice for all of them.
"""

from ._adadelta import adadelta_, choose_adadelta_backend
from ._attention_decoder import attention_decoder, choose_decoder_backend
from ._backends import BACKENDS, Gpu, backend, gpu
from ._ctc_loss import choose_ctc_loss_backend, ctc_loss
from ._ctc_prefix import (
    choose_ctc_prefix_backend,
    ctc_prefix_extend,
    ctc_prefix_scores,
    ctc_prefix_start,
)
from ._few_rows import few_rows_linear
from ._light_gru import Choice, choose_backend, choose_kernel, light_gru
from ._location_energies import choose_location_energies_backend, location_energies
from ._norm_pool import choose_norm_pool_backend, norm_pool

__all__ = [
    "BACKENDS",
    "Choice",
    "Gpu",
    "adadelta_",
    "attention_decoder",
    "backend",
    "choose_adadelta_backend",
    "choose_backend",
    "choose_ctc_loss_backend",
    "choose_ctc_prefix_backend",
    "choose_decoder_backend",
    "choose_kernel",
    "choose_location_energies_backend",
    "choose_norm_pool_backend",
    "ctc_loss",
    "ctc_prefix_extend",
    "ctc_prefix_scores",
    "ctc_prefix_start",
    "few_rows_linear",
    "gpu",
    "light_gru",
    "location_energies",
    "norm_pool",
]
