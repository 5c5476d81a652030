"""The table that chooses kernels, asked for GPUs that are pretended, and on one that is there.

Its rules are in cuda_ops/light_gru/choice.h.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from sb_fast_sligru import info, ops
from sb_fast_sligru.ops import Gpu

H200 = Gpu(
    capability=90,
    has_cluster_code=True,
    has_warpgroup_code=True,
    shared_bytes=227 * 1024,
    clusters_of_4=32,
    clusters_of_8=15,
    clusters_of_16=7,
)
B200 = H200._replace(capability=100, has_warpgroup_code=False)
RTX5090 = B200._replace(capability=120, shared_bytes=99 * 1024, clusters_of_16=0)
A100 = Gpu(80, False, False, 163 * 1024, 0, 0, 0)
WITHOUT_9_0A = Gpu(90, False, False, 227 * 1024, 0, 0, 0)
BF16, HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "gpu, dtype, hidden, rows, kernel, cluster, units, cluster_rows",
    [
        (H200, BF16, 16, 1, "narrow", 4, 32, 4),
        (H200, BF16, 128, 500, "narrow", 4, 32, 4),
        (H200, HALF, 136, 16, "narrow", 8, 32, 4),
        (H200, HALF, 512, 28, "narrow", 16, 32, 4),
        # The 29th row would wait, or share multiprocessors.
        (H200, HALF, 512, 29, "narrow", 8, 64, 4),
        (RTX5090, HALF, 512, 16, "narrow", 8, 64, 4),
        (H200, FLOAT, 512, 7, "narrow_float", 16, 32, 1),
        (H200, FLOAT, 512, 8, "narrow_float", 16, 32, 2),
        (H200, FLOAT, 512, 28, "narrow_float", 16, 32, 4),
        (RTX5090, FLOAT, 256, 16, "narrow_float", 8, 32, 2),
        (H200, BF16, 520, 48, "wide", 16, 64, 8),
        (H200, BF16, 1024, 48, "wide", 16, 64, 8),
        (H200, BF16, 1024, 240, "many", 16, 64, 35),
        (H200, BF16, 1024, 281, "many", 16, 64, 21),
        (B200, BF16, 1024, 240, "wide", 16, 64, 8),
        (H200, FLOAT, 1024, 240, "wide_float", 16, 64, 8),
    ],
    ids=str,
)
def test_entries(gpu, dtype, hidden, rows, kernel, cluster, units, cluster_rows):
    choice = ops.choose_kernel(gpu, hidden, rows, dtype, "forward")
    assert choice[:4] == (kernel, cluster, units, cluster_rows)
    assert choice.reason


@pytest.mark.parametrize("rows, forward, backward", [(112, "wide", "wide"), (168, "many", "wide")])
def test_the_passes_differ_in_when_many_rows_pay(rows, forward, backward):
    for direction, kernel in (("forward", forward), ("backward", backward)):
        assert ops.choose_kernel(H200, 1024, rows, BF16, direction).kernel == kernel


@pytest.mark.parametrize(
    "gpu, dtype, hidden, reason",
    [
        (H200, DOUBLE, 512, "float32, bfloat16 and float16 operands only"),
        (H200, BF16, 12, "not a multiple of 8"),
        (H200, BF16, 8, "from 16 on"),
        (H200, BF16, 1032, "above 1024"),
        (A100, BF16, 512, "older than compute capability 9.0"),
        (WITHOUT_9_0A, BF16, 512, "built without code for 9.0a"),
        (RTX5090, FLOAT, 512, "thread-block clusters of the size needed"),
        (RTX5090, BF16, 1024, "thread-block clusters of the size needed"),
    ],
    ids=str,
)
def test_what_no_persistent_kernel_takes(gpu, dtype, hidden, reason):
    for direction in ("forward", "backward"):
        choice = ops.choose_kernel(gpu, hidden, 16, dtype, direction)
        assert choice.kernel == "stepwise" and choice[1:4] == (0, 0, 0)
        assert reason in choice.reason


def test_every_choice_holds_the_layer():
    gpus = (H200, B200, RTX5090)
    hidden_sizes, row_counts = range(16, 1025, 8), (1, 5, 28, 29, 57, 240, 281)
    for gpu, hidden, rows, dtype, direction in itertools.product(
        gpus, hidden_sizes, row_counts, (BF16, FLOAT), ("forward", "backward")
    ):
        choice = ops.choose_kernel(gpu, hidden, rows, dtype, direction)
        kernel, cluster, units, cluster_rows, _ = choice
        if kernel == "stepwise":
            assert gpu is RTX5090 and hidden > 256
            continue
        padded = cluster * units
        assert hidden <= padded and (padded == 128 or 2 * hidden > padded)
        assert getattr(gpu, f"clusters_of_{cluster}") > 0
        assert 1 <= cluster_rows <= {"wide": 8, "wide_float": 8, "many": 40}.get(kernel, 4)


def test_bad_direction():
    with pytest.raises(ValueError, match="direction: got 'sideways', expected 'forward' or"):
        ops.choose_kernel(H200, 512, 16, BF16, "sideways")


def test_info_prints_the_kernels_of_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "gpu", lambda index: H200)
    monkeypatch.setattr(ops, "choose_backend", lambda *layer: ("persistent", "the fastest"))
    text = "\n".join(info.report(hidden=512, rows=16))
    assert "forward  narrow, 4 x 16 blocks of 32 units, up to 4 rows each (16 blocks" in text
    assert "backward narrow_float, 6 x 16 blocks of 32 units, up to 3 rows each" in text


# ---- on a GPU

KERNEL_NAMES = """
import json, sys
import torch
from sb_fast_sligru import ops
results = []
for hidden, rows, dtype in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    wx = torch.randn(rows, 5, 2 * hidden, device="cuda", dtype=dtype, requires_grad=True)
    u = torch.randn(2 * hidden, hidden, device="cuda", dtype=dtype) / hidden**0.5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.light_gru(wx, u, layer_norm=True).sum().backward()
        torch.cuda.synchronize()
    chosen = [
        ops.choose_kernel(ops.gpu(0), hidden, rows, dtype, direction).kernel
        for direction in ("forward", "backward")
    ]
    results.append([chosen, [event.key for event in profile.key_averages()]])
print(json.dumps(results))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("limit", ["16", "8", "1"])
def test_the_chosen_kernels_run(limit):
    layers = [
        (hidden, rows, dtype)
        for dtype in ("bfloat16", "float16", "float32")
        for hidden, rows in ((64, 3), (256, 20), (512, 16), (512, 40), (1024, 48), (1024, 240))
    ]
    process = subprocess.run(
        [sys.executable, "-c", KERNEL_NAMES, json.dumps(layers)],
        env=os.environ | {"SB_FAST_SLIGRU_MAX_CLUSTER": limit},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for layer, (chosen, names) in zip(layers, json.loads(process.stdout), strict=True):
        for direction, kernel in zip(("forward", "backward"), chosen, strict=True):
            expected = f"{direction}_{kernel}_kernel"
            if kernel == "stepwise":
                expected = f"stepwise::(anonymous namespace)::{direction}_kernel"
            ran = [n for n in names if f"::{direction}_" in n and "sb_fast_sligru" in n]
            assert ran and all(expected in name for name in ran), (layer, expected, names)


@pytest.mark.gpu
def test_properties_of_the_gpu():
    gpu = ops.gpu(torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    assert gpu.capability == 10 * properties.major + properties.minor
    assert gpu.shared_bytes == properties.shared_memory_per_block_optin
    if gpu.capability == 90:
        assert gpu.has_cluster_code and gpu.has_warpgroup_code
        blocks = properties.multi_processor_count
        assert blocks // 2 <= 16 * gpu.clusters_of_16 <= 8 * gpu.clusters_of_8 <= blocks
