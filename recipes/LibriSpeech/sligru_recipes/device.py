"""Whether a device can be used, before anything is done for it."""

import torch


def check_device(name):
    """Raise ValueError if PyTorch does not know a device, or cannot compute on it here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device={name}: it must be such as cpu or cuda:0") from error
    if device.type == "cuda":  # not tried: each process of a run would take memory of the first GPU
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device={name}: {torch.cuda.device_count()} CUDA GPUs are visible")
        return
    try:
        torch.ones(1, device=device).add(1).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # by kind of device
        raise ValueError(f"--device={name}: PyTorch cannot compute on it here") from error
