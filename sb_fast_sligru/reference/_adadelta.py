"""Adadelta's update as plain PyTorch: the oracle and the fallback.

Zeiler 2012, arXiv 1212.5701, Algorithm 1, with the options of `torch.optim.Adadelta`.
"""


def adadelta_(
    params, grads, square_avgs, acc_deltas, *, lr, rho, eps, weight_decay=0.0, maximize=False
):
    """Arguments are those of `sb_fast_sligru.ops.adadelta_`."""
    for x, grad, square_avg, acc_delta in zip(params, grads, square_avgs, acc_deltas, strict=True):
        g = -grad if maximize else grad
        if weight_decay != 0:
            g = g + weight_decay * x
        square_avg.mul_(rho).addcmul_(g, g, value=1 - rho)
        step = (acc_delta + eps).sqrt_() / (square_avg + eps).sqrt_() * g
        acc_delta.mul_(rho).addcmul_(step, step, value=1 - rho)
        x.sub_(step, alpha=lr)
