"""BatchNorm over the rows of all processes, for which no host waits.

PyTorch's own reads, in every call, which processes had rows, and so waits for the GPU; and it runs
on GPUs alone. Here every process has rows, on any device. With n_p rows, mean m_p and (biased)
variance v_p in process p, N = sum n_p, and y of a row x and its normalised value xh:

    mean = sum n_p m_p / N            variance = sum n_p (v_p + (m_p - mean)^2) / N
    xh   = (x - mean) rstd            y = xh w + b
    dx   = w rstd (dy - sum(dy) / N - xh sum(dy xh) / N)      sums over the rows of all processes
"""

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_NormBase):
    """A replacement of :class:`torch.nn.SyncBatchNorm`.

    Arguments and ``state_dict`` are PyTorch's. Evaluation, and training in one process, are
    :class:`torch.nn.BatchNorm1d`'s. It is no subclass of PyTorch's classes, which
    ``convert_sync_batchnorm`` would replace and DistributedDataParallel refuse on CPUs.

    Arguments
    ---------
    *arguments, **options
        Of :class:`torch.nn.BatchNorm1d`.
    process_group : ProcessGroup, optional
        The processes, by default all.

    Example
    -------
    >>> net = nn.Sequential(nn.BatchNorm1d(4))
    >>> SyncBatchNorm.take_over(net)
    >>> net(torch.rand(3, 4)).shape
    torch.Size([3, 4])
    """

    def __init__(self, *arguments, process_group=None, **options):
        super().__init__(*arguments, **options)
        self.process_group = process_group

    @classmethod
    def take_over(cls, module):
        """Make all BatchNorms in `module` ones of this class, in place."""
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.process_group = getattr(part, "process_group", None)
                part.__class__ = cls

    def forward(self, x):
        """Normalise.

        Arguments
        ---------
        x : torch.Tensor
            [rows, channels, ...] of any floating dtype, with a row at least in each process.

        Returns
        -------
        torch.Tensor
            As `x`.

        Raises
        ------
        ValueError
            If `x` has no channels, or no rows while several processes train.
        """
        if not (self.training and count_processes(self) > 1):
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        if x.numel() == 0:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected rows in every process")
        with torch.no_grad():
            mean, variance, count = self._statistics(x)
            if self.running_mean is not None:
                self._track(mean, variance, count)
        return _Normalise.apply(
            x, self.weight, self.bias, mean, variance, count, self.eps, self.process_group
        )

    def _check_input_dim(self, x):
        if x.ndim < 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [rows, channels, ...]")

    def _statistics(self, x):
        """Mean, biased variance and number of the rows of all processes, in float32 or float64."""
        narrow = not x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        # On a GPU the statistics of 16-bit numbers are float32's, on a CPU they would be rounded.
        own_mean, own_variance = torch.batch_norm_update_stats(
            x.float() if narrow else x, None, None, 0.0
        )
        own_count = own_mean.new_full((1,), x.numel() // x.shape[1])
        own = torch.cat([own_mean, own_variance, own_count])
        every = own.new_empty(count_processes(self) * own.numel())
        distributed.all_gather_into_tensor(every, own, group=self.process_group)
        every = every.view(-1, own.numel())
        means, variances, counts = every.split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        shares = counts / count
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        return mean, variance, count

    def _track(self, mean, variance, count):
        """Update the running statistics, of which the variance is unbiased."""
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:  # the average of all batches so far
            momentum = 1 / self.num_batches_tracked
        for running, value in (
            (self.running_mean, mean),
            (self.running_var, variance * (count / (count - 1))),
        ):
            running += momentum * (value - running)


def count_processes(norm):
    """How many processes a SyncBatchNorm takes its statistics of."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(norm.process_group)


class _Normalise(torch.autograd.Function):
    """x normalised by statistics that follow from the x of all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps, group):
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        return nn.functional.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, variance, count = ctx.saved_tensors
        rstd = (variance + ctx.eps).rsqrt()
        # As if the statistics were constants; sum(dy xh) and sum(dy) of this process beside it.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, mean, rstd, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias]).to(mean.dtype)
        distributed.all_reduce(sums, group=ctx.group)
        # What is missing is w rstd (sum(dy) + xh sum(dy xh)) / N = slope x + shift.
        scale = rstd / count if weight is None else weight * rstd / count
        slope = scale * rstd * sums[0]
        shift = scale * sums[1] - slope * mean
        over_channels = (1, -1, *(1,) * (x.ndim - 2))
        grad_x -= torch.addcmul(shift.view(over_channels), x, slope.view(over_channels))
        wanted = ctx.needs_input_grad[1:3]
        grad_weight, grad_bias = (
            g if want else None for g, want in zip((grad_weight, grad_bias), wanted, strict=True)
        )
        return grad_x, grad_weight, grad_bias, *(None,) * 5
