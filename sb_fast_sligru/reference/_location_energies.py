"""The energies of location-aware attention as plain PyTorch: the oracle and the fallback.

Chorowski et al. 2015, arXiv 1506.07503, eq. 8 and 9.
"""

import torch
import torch.nn.functional as F

MAX_VALUES = 1 << 22  # of all hypotheses, frames and units at once: a CPU's caches


def location_energies(query, last, keys, filters, w_location, v):
    """Arguments and results are those of `sb_fast_sligru.ops.location_energies`."""
    batch, frames, units = keys.shape
    energies = torch.empty_like(last)
    if energies.numel() == 0:
        return energies
    features = F.conv1d(last.unsqueeze(1), filters.unsqueeze(1), padding=filters.shape[1] // 2)
    features = features.transpose(1, 2)  # [N, T, G]
    weights = w_location.t().to(query.dtype)
    beam = len(query) // batch
    most = max(1, MAX_VALUES // (frames * units))
    for row in range(batch):
        for first in range(row * beam, (row + 1) * beam, most):
            part = slice(first, min(first + most, (row + 1) * beam))
            values = keys[row] + query[part].unsqueeze(1)
            energies[part] = torch.tanh_(values.add_(features[part] @ weights)) @ v
    return energies
