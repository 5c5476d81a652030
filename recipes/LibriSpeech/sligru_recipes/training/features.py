"""Features and their normalisation without waits for the GPU."""

import math

import torch
from speechbrain.processing.features import combine_gaussian_statistics, make_padding_mask
from torch import distributed


def move_constants(features, device):
    """Move the window and the filters of features, which SpeechBrain keeps on the host.

    Its own are plain attributes, which it would copy to the device for each batch.

    Arguments
    ---------
    features : torch.nn.Module
        Such as `speechbrain.lobes.features.Fbank`.
    device : str or torch.device
    """
    features.to(device)
    for module in features.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to(device))
        if hasattr(module, "device_inp"):  # where a Filterbank puts what it makes
            module.device_inp = torch.device(device)


def normalise(normalize, feats, lengths, epoch):
    """What `normalize` does in training, its global statistics updated without leaving the device.

    SpeechBrain's counts the frames on the host.

    Arguments
    ---------
    normalize : speechbrain.processing.features.InputNormalization
        Its `count` becomes a tensor on the device.
    feats : torch.Tensor
        [B, T, features].
    lengths : torch.Tensor
        [B] relative ones, on the same device.
    epoch : int

    Returns
    -------
    torch.Tensor
        [B, T, features].
    """
    if normalize.norm_type == "global" and epoch < normalize.update_until_epoch:
        _update_statistics(normalize, feats, lengths)
        epoch = math.inf  # it is done
    return normalize(feats, lengths, epoch=epoch)


@torch.no_grad()
def _update_statistics(normalize, feats, lengths):
    mask = make_padding_mask(feats, lengths)
    count = mask.sum().double()  # float32 would count to 2^24
    mean = (feats * mask).sum((0, 1)) / count
    variance = ((feats - mean).square() * mask).sum((0, 1)) / count
    if distributed.is_available() and distributed.is_initialized():
        count, mean, variance = _over_processes(count, mean, variance)
    if isinstance(normalize.count, torch.Tensor) or normalize.count > 0:
        so_far = (normalize.count, normalize.glob_mean, normalize.glob_std.square())
        count, mean, variance = combine_gaussian_statistics(so_far, (count, mean, variance))
    normalize.count, normalize.glob_mean, normalize.glob_std = count, mean, variance.sqrt()


def _over_processes(count, mean, variance):
    """Statistics of the frames of all processes from those of each."""

    def total(value):
        distributed.all_reduce(value)
        return value

    share = count / total(count.clone())
    mean_of_all = total(share * mean)
    variance_of_all = total(share * (variance + (mean - mean_of_all).square()))
    return total(count.clone()), mean_of_all, variance_of_all
