"""SyncBatchNorm in two processes against BatchNorm of all rows in one."""

import contextlib
import copy

import pytest
import torch
from torch import distributed, nn

from sb_fast_sligru import SyncBatchNorm
from sb_fast_sligru.reference import relative_error

# Rows of each process, then what comes after the channels; uneven, one row, and more axes.
SHAPES = [((3, 5), ()), ((1, 1), ()), ((1, 6), (4,)), ((2, 3), (2, 3))]
OPTIONS = [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}]
CHANNELS = 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_are_one(device, tmp_path):
    torch.multiprocessing.spawn(compare, (tmp_path / "store", device), nprocs=2)


@contextlib.contextmanager
def process_group(rank, store):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    yield
    distributed.destroy_process_group()


def compare(rank, store, device):
    with process_group(rank, store):
        for rows, rest in SHAPES:
            for options in OPTIONS:
                compare_one(rank, device, rows, rest, options, torch.float64, 1e-12)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
            compare_one(rank, device, (40, 20), (), {}, dtype, bound)


def compare_one(rank, device, rows, rest, options, dtype, bound):
    """In the processes' own dtype against float64 of one process."""
    torch.manual_seed(0)
    whole = nn.BatchNorm1d(CHANNELS, **options) if not rest[1:] else nn.BatchNorm2d(4, **options)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, 1.0)
    parts = nn.Sequential(copy.deepcopy(whole))
    SyncBatchNorm.take_over(parts)
    assert type(parts[0]) is SyncBatchNorm
    assert nn.SyncBatchNorm.convert_sync_batchnorm(parts)[0] is parts[0]
    whole, parts = whole.double().to(device), parts.to(device)
    if dtype == torch.float64:
        parts.double()
    mine = slice(0, rows[0]) if rank == 0 else slice(rows[0], None)
    for _ in range(2):  # running statistics of more than one batch
        x = (3 + torch.randn(sum(rows), CHANNELS, *rest)).to(device, dtype).double()
        upstream = torch.randn(x.shape).to(device, dtype).double()
        x.requires_grad_()
        expected = whole(x)
        expected.backward(upstream)
        own = x.detach()[mine].to(dtype).requires_grad_()
        actual = parts(own)
        actual.backward(upstream[mine].to(dtype))
        assert actual.dtype == own.grad.dtype == dtype
        assert relative_error(actual, expected[mine]) < bound
        # Of two rows the gradient is nearly zero in exact arithmetic.
        error = (own.grad.double() - x.grad[mine]).norm()
        assert error < bound * (x.grad.norm() + 1)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        distributed.all_reduce(ours.grad)
        assert relative_error(ours.grad, theirs.grad) < bound
    for ours, theirs in zip(parts.buffers(), whole.buffers(), strict=True):
        assert relative_error(ours.double(), theirs.double()) < bound
    whole.eval()
    parts.eval()
    x = x.detach()
    assert relative_error(parts(x.to(dtype)), whole(x)) < bound


def test_a_process_without_rows_is_refused(tmp_path):
    torch.multiprocessing.spawn(refuse, (tmp_path / "store",), nprocs=2)


def refuse(rank, store):
    with process_group(rank, store):
        with pytest.raises(ValueError, match=r"x: got shape \(0, 4\), expected rows in every"):
            SyncBatchNorm(CHANNELS)(torch.zeros(0, CHANNELS))


def test_one_process_is_plain_batch_norm():
    x = torch.randn(5, CHANNELS)
    ours, theirs = SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
