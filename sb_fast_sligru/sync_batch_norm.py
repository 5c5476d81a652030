"""BatchNorm over the rows of all processes, for which no host waits.

PyTorch's own reads, in every call, which processes had rows, and so waits for the GPU; and it runs
on GPUs alone. Here every process has rows, on any device. With n_p rows, mean m_p and (biased)
variance v_p in process p, N = sum n_p, and y of a row x:

    mean = sum n_p m_p / N            variance = sum n_p (v_p + (m_p - mean)^2) / N
    y    = (x - mean) rstd w + b      rstd = 1 / sqrt(variance + eps)
    dx   = w rstd (dy - sum(dy) / N - (x - mean) rstd^2 sum(dy (x - mean)) / N)

with sums over the rows of all processes. On a GPU each line is a kernel that PyTorch has for it.
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

    rows = None  # of each process in the last batch of training, [processes]

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
        return _Normalise.apply(x, self.weight, self.bias, self)

    def _check_input_dim(self, x):
        if x.ndim < 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [rows, channels, ...]")

    def _momentum(self):
        """The new share of the running statistics."""
        if self.running_mean is None:
            return 0.0
        self.num_batches_tracked += 1
        if self.momentum is None:  # the average of all batches so far; here the host does wait
            return 1 / self.num_batches_tracked.item()
        return self.momentum


def count_processes(norm):
    """How many processes a SyncBatchNorm takes its statistics of."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(norm.process_group)


class _Normalise(torch.autograd.Function):
    """x normalised by the statistics of all processes, which `norm` notes."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm):
        x = x.contiguous()
        on = torch if x.is_cuda else _OnCPU
        mean, rstd = on.batch_norm_stats(x, norm.eps)
        rows = mean.new_full((1,), x.numel() // x.shape[1])
        own = torch.cat([mean, rstd, rows])
        every = own.new_empty(count_processes(norm) * own.numel())
        distributed.all_gather_into_tensor(every, own, group=norm.process_group)
        means, rstds, rows = every.view(-1, own.numel()).split([len(mean), len(mean), 1], dim=1)
        norm.rows = rows.flatten()
        mean, rstd = on.batch_norm_gather_stats_with_counts(
            x, means, rstds, norm.running_mean, norm.running_var, norm._momentum(), norm.eps,
            norm.rows,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd, norm.rows)
        ctx.group = norm.process_group
        return on.batch_norm_elemt(x, weight, bias, mean, rstd, norm.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd, rows = ctx.saved_tensors
        grad = grad.contiguous()
        on = torch if x.is_cuda else _OnCPU
        sum_dy, sum_dy_xmu, grad_weight, grad_bias = on.batch_norm_backward_reduce(
            grad, x, mean, rstd, weight, *ctx.needs_input_grad[:3]
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_dy, sum_dy_xmu])
            distributed.all_reduce(sums, group=ctx.group)
            grad_x = on.batch_norm_backward_elemt(
                grad, x, mean, rstd, weight, *sums.chunk(2), rows.to(torch.int32)
            )
        wanted = ctx.needs_input_grad[1:3]  # else PyTorch gives empty ones
        grad_weight, grad_bias = (
            gradient if want else None
            for gradient, want in zip((grad_weight, grad_bias), wanted, strict=True)
        )
        return grad_x, grad_weight, grad_bias, None


class _OnCPU:
    """What PyTorch has for GPUs alone, in float32 where `x` has 16 bits."""

    @staticmethod
    def batch_norm_stats(x, eps):
        mean, variance = torch.batch_norm_update_stats(_wide(x), None, None, 0.0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x, means, rstds, running_mean, running_var, momentum, eps, counts
    ):
        count = counts.sum()
        shares = (counts / count)[:, None]
        mean = (shares * means).sum(0)
        variance = (shares * (rstds**-2 - eps + (means - mean).square())).sum(0)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(x, weight, bias, mean, rstd, eps):
        return nn.functional.batch_norm(x, mean, rstd**-2 - eps, weight, bias, eps=eps)

    @staticmethod
    def batch_norm_backward_reduce(grad, x, mean, rstd, weight, *wanted):
        axes = [axis for axis in range(x.ndim) if axis != 1]
        grad = _wide(grad)
        sum_dy = grad.sum(axes)
        sum_dy_xmu = (grad * (_wide(x) - _over_rows(mean, x))).sum(axes)
        return sum_dy, sum_dy_xmu, sum_dy_xmu * rstd, sum_dy

    @staticmethod
    def batch_norm_backward_elemt(grad, x, mean, rstd, weight, sum_dy, sum_dy_xmu, counts):
        count = counts.sum()
        scale = rstd if weight is None else rstd * weight
        slope = rstd.square() * sum_dy_xmu / count
        shift, slope, mean, scale = (
            _over_rows(values, x) for values in (sum_dy / count, slope, mean, scale)
        )
        return (scale * (_wide(grad) - shift - (_wide(x) - mean) * slope)).to(x.dtype)


def _wide(x):
    return x.float() if x.dtype.itemsize == 2 else x


def _over_rows(values, x):
    """Values of channels beside x [rows, channels, ...]."""
    return values.view(1, -1, *(1,) * (x.ndim - 2))
