"""Padded batches and packed ones: the frames of all sequences, one after the other.

The functions stay within what torch.jit.script compiles.
"""

import torch


def frame_mask(steps: torch.Tensor, time: int) -> torch.Tensor:
    """Which frames of a padded batch are a sequence's own.

    Arguments
    ---------
    steps : torch.Tensor
        Of each sequence, integers, [B].
    time : int
        Steps T of the padded batch.

    Returns
    -------
    torch.Tensor
        bool, [B, T].

    Example
    -------
    >>> frame_mask(torch.tensor([2, 1]), 2)
    tensor([[ True,  True],
            [ True, False]])
    """
    return torch.arange(time, device=steps.device) < steps.unsqueeze(1)


def valid_frames(steps: torch.Tensor, time: int) -> torch.Tensor:
    """Where the frames of all sequences lie in their padded batch.

    Arguments
    ---------
    steps : torch.Tensor
        Of each sequence, integers, [B].
    time : int
        Steps T of the padded batch.

    Returns
    -------
    torch.Tensor
        Indices among the BT frames of the batch, int64, [sum of steps]. On a GPU the host waits for
        it, to know how many there are.

    Example
    -------
    >>> valid_frames(torch.tensor([3, 2]), 3)
    tensor([0, 1, 2, 3, 4])
    """
    return frame_mask(steps, time).flatten().nonzero().squeeze(1)


def pack(x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """x [B, T, ...] at the `frames` that `valid_frames` tells, [sum of steps, ...]."""
    return x.flatten(0, 1).index_select(0, frames)


def unpack(x: torch.Tensor, frames: torch.Tensor, batch: int, time: int) -> torch.Tensor:
    """The padded batch [B, T, ...] that x [sum of steps, ...] was packed from; zeros pad it."""
    sizes = list(x.shape[1:])
    flat = x.new_zeros([batch * time] + sizes).index_copy(0, frames, x)
    return flat.view([batch, time] + sizes)
