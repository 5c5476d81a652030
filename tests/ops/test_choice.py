"""The tables that choose kernels, asked for GPUs that are pretended, and on one that is there.

Its rules are in cuda_ops/light_gru/choice.h.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from helpers import ROOT, run_limited

from sb_fast_sligru import _library, info, ops
from sb_fast_sligru.cards import CARDS
from sb_fast_sligru.ops import (
    _attention_decoder,
    _backends,
    _light_gru,
    _location_energies,
    _norm_pool,
)

T4, A100, RTX3090, RTX4090, H200, B200, RTX5090 = (
    CARDS[name] for name in ("T4", "A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090")
)
WITHOUT_9_0A = H200._replace(
    has_cluster_code=False,
    has_warpgroup_code=False,
    clusters_of_4=0,
    clusters_of_8=0,
    clusters_of_16=0,
)
BF16, HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "gpu, dtype, hidden, rows, kernel, group, units, group_rows",
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
def test_entries(gpu, dtype, hidden, rows, kernel, group, units, group_rows):
    choice = ops.choose_kernel(gpu, hidden, rows, dtype, "forward")
    assert choice[:4] == (kernel, group, units, group_rows)
    assert choice.reason


BOTH, FORWARD, BACKWARD = ("forward", "backward"), ("forward",), ("backward",)


@pytest.mark.parametrize(
    "gpu, dtype, hidden, rows, directions, group, units, group_rows, waves",
    [
        (A100, BF16, 16, 1, BOTH, 1, 32, 1, 1),
        (A100, HALF, 256, 500, BOTH, 8, 32, 13, 3),
        # Forward, blocks of 64 units where they may have 160 KB of shared memory.
        (A100, BF16, 264, 16, FORWARD, 5, 64, 1, 1),
        (A100, BF16, 264, 16, BACKWARD, 9, 32, 2, 1),
        (A100, HALF, 512, 240, FORWARD, 8, 64, 7, 3),
        (A100, HALF, 512, 240, BACKWARD, 16, 32, 14, 3),
        (WITHOUT_9_0A, BF16, 512, 17, FORWARD, 8, 64, 2, 1),
        (WITHOUT_9_0A, BF16, 512, 17, BACKWARD, 16, 32, 3, 1),
        (RTX3090, BF16, 512, 16, BOTH, 16, 32, 4, 1),
        (T4, HALF, 512, 240, BOTH, 16, 32, 15, 8),
        # Above, in both passes where 128 KB of U and a row fit.
        (A100, BF16, 520, 17, BOTH, 9, 64, 2, 1),
        (A100, BF16, 1000, 16, BOTH, 16, 64, 3, 1),
        (A100._replace(shared_bytes=140 * 1024), BF16, 1024, 240, BOTH, 16, 64, 2, 20),
        (RTX3090, BF16, 1000, 17, BOTH, 32, 32, 9, 1),
        (RTX5090, BF16, 1024, 240, BOTH, 32, 32, 16, 3),
        (T4, HALF, 1000, 16, BOTH, 32, 32, 16, 1),
        (A100, BF16, 1032, 1, BOTH, 33, 32, 1, 1),
        (A100, BF16, 2048, 240, BOTH, 64, 32, 16, 15),
        (H200, HALF, 1032, 1, BOTH, 33, 32, 1, 1),
        (H200, BF16, 2048, 48, BOTH, 64, 32, 12, 2),
        (RTX4090, BF16, 1032, 16, BOTH, 65, 16, 16, 1),
        (RTX4090, BF16, 2048, 17, BOTH, 128, 16, 9, 2),
        (RTX5090, HALF, 2048, 240, BOTH, 128, 16, 16, 15),
        # Of 64 KB, 32 KB hold a part of U and 32 KB 15 rows.
        (T4, FLOAT, 264, 1, BOTH, 9, 32, 1, 1),
        (T4, FLOAT, 512, 31, BOTH, 16, 32, 8, 2),
        (RTX3090, FLOAT, 512, 16, BOTH, 16, 32, 4, 1),
        (RTX5090, FLOAT, 512, 16, BOTH, 16, 32, 2, 1),
        (A100, FLOAT, 520, 17, BOTH, 17, 32, 3, 1),
        (A100, FLOAT, 1000, 240, BOTH, 32, 32, 16, 5),
        (WITHOUT_9_0A, FLOAT, 1000, 240, BOTH, 32, 32, 15, 4),
        (RTX3090, FLOAT, 1000, 17, BOTH, 63, 16, 9, 2),
        (T4, FLOAT, 520, 16, BOTH, 33, 16, 16, 1),
    ],
    ids=str,
)
def test_entries_of_l2(gpu, dtype, hidden, rows, directions, group, units, group_rows, waves):
    for direction in directions:
        choice = ops.choose_kernel(gpu, hidden, rows, dtype, direction)
        assert choice[:4] == ("l2", group, units, group_rows)
        assert choice.waves(gpu, rows) == waves


@pytest.mark.parametrize(
    "gpu, hidden, reason",
    [
        (A100, 512, "no thread-block clusters on this GPU"),
        (WITHOUT_9_0A, 512, "library without cluster code"),
        (RTX5090, 1024, "no clusters of the size needed"),
        (H200, 1032, "H above 1024"),
        (A100, 1032, "H above 1024"),
    ],
    ids=str,
)
def test_why_no_kernel_with_clusters_runs(gpu, hidden, reason):
    choice = ops.choose_kernel(gpu, hidden, 16, BF16, "forward")
    assert choice.kernel == "l2"
    assert reason in choice.reason and "the blocks exchange through the L2 cache" in choice.reason


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
        (H200, BF16, 2056, "above 2048"),
        (H200, FLOAT, 1032, "above 1024: the recurrent weight in float32"),
        (H200._replace(capability=70), HALF, 2048, "older than compute capability 7.5"),
        (T4, BF16, 512, "bfloat16 needs compute capability 8.0"),
        (A100._replace(has_tensor_code=False), BF16, 512, "and code for it in the library"),
        (RTX3090, HALF, 2048, "SB_FAST_SLIGRU_MAX_MULTIPROCESSORS"),
        (T4, FLOAT, 1024, "SB_FAST_SLIGRU_MAX_SHARED_KB, has too few multiprocessors"),
        (A100._replace(multiprocessors=7), BF16, 512, "has too few multiprocessors"),
        (A100._replace(shared_bytes=2048), HALF, 512, "has too little shared memory"),
    ],
    ids=str,
)
def test_what_no_persistent_kernel_takes(gpu, dtype, hidden, reason):
    for direction in ("forward", "backward"):
        choice = ops.choose_kernel(gpu, hidden, 16, dtype, direction)
        assert choice.kernel == "stepwise" and choice[1:4] == (0, 0, 0)
        assert reason in choice.reason


def most_rows_of_l2(gpu, hidden, dtype, direction, units):
    """Rows of a group of blocks of so many units: 0 without such a kernel, or room for it."""
    weights = 2 * units * hidden * dtype.itemsize
    if weights > 128 * 1024:  # that the registers may hold
        shared = 128 * 1024
    else:
        shared = 32 * 1024 if dtype == FLOAT else 0
    fits = weights - shared <= 128 * 1024 and -(-hidden // units) <= gpu.multiprocessors
    if units == 64:
        fast = direction == "forward" and gpu.shared_bytes >= 160 * 1024
        fits = fits and dtype != FLOAT and hidden > (256 if fast else 512)
    if units == 16:  # for GPUs without so much shared memory
        fits = fits and shared < 128 * 1024
    of_a_warp = 4 * (2 * units + 1)  # candidates and gates, and one for their norm
    most = min(8 if units == 64 else 16, (gpu.shared_bytes - shared) // (8 * of_a_warp))
    return max(0, most) if fits else 0


@pytest.mark.parametrize("gpu", [*{*CARDS.values(), WITHOUT_9_0A}], ids=str)
def test_every_choice_holds_the_layer(gpu):
    low = BF16 if gpu.has_tensor_code else HALF
    hidden_sizes, row_counts = range(16, 2049, 8), (1, 5, 28, 29, 57, 240, 281)
    for hidden, rows, dtype, direction in itertools.product(
        hidden_sizes, row_counts, (low, FLOAT), ("forward", "backward")
    ):
        choice = ops.choose_kernel(gpu, hidden, rows, dtype, direction)
        kernel, group, units, group_rows, _ = choice
        padded = group * units
        if kernel in ("stepwise", "l2"):
            of_l2 = {
                each: most
                for each in (64, 32, 16)
                if (most := most_rows_of_l2(gpu, hidden, dtype, direction, each))
            }
            # The largest blocks that fit.
            assert units == next(iter(of_l2), 0)
            if kernel == "stepwise":
                continue
            assert hidden <= padded < hidden + units
            most, at_once = of_l2[units], gpu.multiprocessors // group
            assert 1 <= group_rows <= most
        else:
            assert hidden <= padded and (padded == 128 or 2 * hidden > padded)
            at_once = getattr(gpu, f"clusters_of_{group}")
            most = {"wide": 8, "wide_float": 8, "many": 40}.get(kernel, 4)
            assert at_once > 0 and 1 <= group_rows <= most
        assert choice.groups(rows) * group_rows >= rows
        assert choice.waves(gpu, rows) == -(-rows // (at_once * most))


def test_bad_direction():
    with pytest.raises(ValueError, match="direction: got 'sideways', expected 'forward' or"):
        ops.choose_kernel(H200, 512, 16, BF16, "sideways")


def test_info_prints_the_kernels_of_a_gpu(monkeypatch):
    monkeypatch.setattr(ops, "gpu", lambda index: H200)
    monkeypatch.setattr(ops, "choose_backend", lambda *layer: ("persistent", "the fastest"))
    text = "\n".join(info.report(hidden=512, rows=16))
    assert "forward  narrow, 4 x 16 blocks of 32 units, up to 4 rows each (16 blocks" in text
    assert "backward narrow_float, 6 x 16 blocks of 32 units, up to 3 rows each (16" in text


@pytest.mark.parametrize(
    "gpu, hidden, rows, line",
    [
        (A100, 512, 16, "6 x 16 blocks of 32 units, up to 3 rows each (no thread-block clusters"),
        (A100, 512, 240, "18 x 16 blocks of 32 units, up to 14 rows each, in 3 waves (no thread"),
        (H200, 2048, 16, "2 x 64 blocks of 32 units, up to 8 rows each (H above 1024: the blocks"),
    ],
    ids=str,
)
def test_info_prints_the_kernels_without_clusters(pretend, gpu, hidden, rows, line):
    pretend(gpu, "8.0;9.0a", ["sm_80", "sm_90a"])
    text = "\n".join(info.report(hidden, rows))
    for direction in ("forward ", "backward"):
        assert f"    {direction} l2, {line}" in text


@pytest.mark.parametrize(
    "built, capability, code",
    [
        (["sm_90a"], 90, "sm_90a"),
        (["sm_90a"], 80, None),
        (["sm_90a"], 100, None),
        (["sm_80"], 86, "sm_80"),
        (["sm_86"], 80, None),
        (["sm_80"], 90, None),
        (["sm_80", "compute_80"], 90, "compute_80"),
        (["compute_90a"], 100, None),
        (["sm_100f"], 103, "sm_100f"),
        (["sm_100f"], 120, None),
        (["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"], 89, "sm_86"),
        (["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"], 121, "sm_120"),
        (["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"], 130, "compute_120"),
        (None, 90, "unknown"),
    ],
    ids=str,
)
def test_code_that_a_gpu_would_run(monkeypatch, built, capability, code):
    monkeypatch.setattr(_library, "build_info", {} if built is None else {"code": built})
    assert _library.gpu_code(capability) == code


@pytest.fixture
def pretend(monkeypatch):
    """One GPU of a compute capability, and a library that was built for some architectures."""

    def pretend(gpu, archs, code):
        Properties = namedtuple("Properties", "name major minor total_memory")
        properties = Properties("a pretended GPU", *divmod(gpu.capability, 10), 80 * 2**30)
        monkeypatch.setattr(_library, "cuda_error", None)
        built = _library.build_info | {"cuda": "13.0", "archs": archs, "code": code}
        monkeypatch.setattr(_library, "build_info", built)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: properties[1:3])
        monkeypatch.setattr(ops, "gpu", lambda index: gpu)
        for module in (_attention_decoder, _light_gru, _location_energies, _norm_pool):
            monkeypatch.setattr(module, "gpu", lambda index: gpu)
        for query in (_backends._query_missing_code, _light_gru._query_persistent):
            module = sys.modules[query.__module__]
            monkeypatch.setattr(module, query.__name__, query.__wrapped__)

    return pretend


def test_a_library_without_code_for_the_gpu(pretend):
    """It would fail at the first launch: the loop runs, or who forces a backend is told."""
    pretend(A100, "9.0a", ["sm_90a"])
    name, reason = ops.choose_backend("cuda:0", 512, BF16)
    assert name == "reference"
    assert (
        "no code for compute capability 8.0, but for 9.0a (run: TORCH_CUDA_ARCH_LIST=8.0" in reason
    )
    for forced in ("stepwise", "persistent"):
        with (
            ops.backend(forced),
            pytest.raises(RuntimeError, match="no code for compute capability"),
        ):
            ops.choose_backend("cuda:0", 512, BF16)
    assert "  its code      none in the library" in info.report()


def test_a_gpu_with_room_for_the_forward_pass_alone(pretend):
    """A part of an A100: eight blocks hold U forward, the backward would need 16."""
    part = A100._replace(multiprocessors=14)
    assert ops.choose_kernel(part, 512, 16, BF16, "forward").kernel == "l2"
    pretend(part, "8.0", ["sm_80"])
    name, reason = ops.choose_backend("cuda:0", 512, BF16)
    assert name == "stepwise" and "has too few multiprocessors" in reason


@pytest.mark.parametrize(
    "gpu, code, line, kernel",
    [
        (H200, ["sm_90a"], "sm_90a, with the kernels of clusters", "narrow"),
        (A100, ["sm_80"], "sm_80, without the kernels of clusters", "l2"),
        (
            WITHOUT_9_0A,
            ["sm_80", "compute_80"],
            "compute_80, compiled at the first call, without the kernels of clusters",
            "l2",
        ),
    ],
    ids=str,
)
def test_info_tells_the_code_of_a_gpu(pretend, gpu, code, line, kernel):
    pretend(gpu, "some", code)
    report = info.report()
    assert f"  its code      {line}" in report
    assert ops.choose_backend("cuda:0", 512, BF16) == ("persistent", "the fastest")
    assert any(text.startswith(f"    forward  {kernel}, ") for text in report)


@pytest.mark.skipif(bool(_library.cuda_error), reason="no CUDA library reads the variables")
@pytest.mark.parametrize(
    "name, value, largest",
    [
        ("CLUSTER", "", 16),
        ("CLUSTER", "x", 16),
        ("CLUSTER", "17", 16),
        ("CLUSTER", "8 ", 16),
        ("MULTIPROCESSORS", "0", 1024),
        ("MULTIPROCESSORS", "1025", 1024),
        ("SHARED_KB", "-1", 1024),
        ("SHARED_KB", "99999999999", 1024),
    ],
)
def test_bad_limits_are_named(name, value, largest):
    """Before any device is asked: also where there is none."""
    process = run_limited({name: value}, "-c", "from sb_fast_sligru import ops; ops.gpu(0)")
    message = f'SB_FAST_SLIGRU_MAX_{name}: got "{value}", expected a number from 1 to {largest}'
    assert process.returncode != 0 and message in process.stderr


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


SIZES = ((64, 3), (256, 20), (512, 16), (512, 40), (1024, 48), (1024, 240), (2048, 20))
AS_3090 = {"CLUSTER": 1, "MULTIPROCESSORS": 82, "SHARED_KB": 99}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "limits",
    [{}, {"CLUSTER": 8}, {"CLUSTER": 1}, {"MULTIPROCESSORS": 40}, {"SHARED_KB": 64}, AS_3090],
    ids=str,
)
def test_the_chosen_kernels_run(limits):
    layers = [
        (hidden, rows, dtype)
        for dtype in ("bfloat16", "float16", "float32")
        for hidden, rows in SIZES
    ]
    process = run_limited(limits, "-c", KERNEL_NAMES, json.dumps(layers))
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
    assert gpu.multiprocessors == properties.multi_processor_count
    if gpu.capability == 90:
        assert gpu.has_cluster_code and gpu.has_warpgroup_code
        blocks = properties.multi_processor_count
        assert blocks // 2 <= 16 * gpu.clusters_of_16 <= 8 * gpu.clusters_of_8 <= blocks


SHOW_GPU = """
import json
from sb_fast_sligru import ops
print(json.dumps(ops.gpu(0)))
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "limits", [{}, {"MULTIPROCESSORS": 40}, {"SHARED_KB": 64}, {"CLUSTER": 8}, AS_3090], ids=str
)
def test_limited_properties_of_the_gpu(limits):
    gpu = ops.gpu(0)
    process = run_limited(limits, "-c", SHOW_GPU)
    assert process.returncode == 0, process.stderr
    multiprocessors = min(gpu.multiprocessors, limits.get("MULTIPROCESSORS", 1024))
    clusters = {
        f"clusters_of_{size}": min(getattr(gpu, f"clusters_of_{size}"), multiprocessors // size)
        if size <= limits.get("CLUSTER", 16)
        else 0
        for size in (4, 8, 16)
    }
    expected = gpu._replace(
        multiprocessors=multiprocessors,
        shared_bytes=min(gpu.shared_bytes, 1024 * limits.get("SHARED_KB", 1024)),
        **clusters,
    )
    assert json.loads(process.stdout) == list(expected)


SHOW_LIBRARY = """
import json, warnings
import torch
from sb_fast_sligru import _library, info, ops
from sb_fast_sligru.reference import relative_error
assert _library.__file__.startswith(sys.argv[1]) and _library.cuda_error is None

def gradients(name, dtype):
    torch.manual_seed(1)
    wx = torch.randn(6, 40, 256).to("cuda", dtype).requires_grad_()
    u = torch.randn(256, 128).to("cuda", dtype).requires_grad_()
    with ops.backend(name):
        h = ops.light_gru(wx, u, layer_norm=True, activation="tanh", bidirectional=True)
    return h, *torch.autograd.grad(h.square().sum(), [wx, u])

with ops.backend("persistent"):
    try:
        ops.choose_backend("cuda", 512, torch.bfloat16)
        forced = ""
    except RuntimeError as error:
        forced = str(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    errors = [
        max(map(relative_error, gradients("auto", dtype), gradients("reference", torch.float64)))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
print(json.dumps({
    "code": _library.gpu_code(ops.gpu(0).capability),
    "gpu": ops.gpu(0)._asdict(),
    "choice": ops.choose_backend("cuda", 512, torch.bfloat16),
    "kernel": ops.choose_kernel(ops.gpu(0), 512, 16, torch.bfloat16, "forward"),
    "forced": forced,
    "errors": errors,
    "warnings": [str(w.message) for w in caught if "sb_fast_sligru" in str(w.message)],
    "info": info.report(),
}))
"""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("archs", ["8.0+PTX", "8.0"])
def test_a_library_that_was_built_for_older_gpus(tmp_path, archs):
    """Of 8.0 alone: its PTX has no clusters, and without PTX a GPU of 9.0 can run none of it."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no clusters that could be missing")
    for name in ("cuda_ops", "sb_fast_sligru"):
        ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": archs, "PYTHONPATH": str(tmp_path)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    build = subprocess.run(command, **options)
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]

    script = "import sys\n" + SHOW_LIBRARY
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], **options)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout.splitlines()[-1])
    print(json.dumps(seen, indent=1))
    assert not seen["gpu"]["has_cluster_code"] and not seen["gpu"]["has_warpgroup_code"]
    name, reason = seen["choice"]
    if archs == "8.0+PTX":
        assert seen["code"] == "compute_80" and name == "persistent" and not seen["warnings"]
        kernel, *_, reason = seen["kernel"]
        assert kernel == "l2" and "library without cluster code" in reason
        assert seen["forced"] == ""
    else:
        assert seen["code"] is None and name == "reference"
        expected = "the library holds no code for compute capability 9.0, but for 8.0"
        assert reason.startswith(expected) and expected in " ".join(seen["warnings"])
        assert seen["forced"].startswith(f'backend("persistent") is forced, but {expected}')
    for error, bound in zip(seen["errors"], (1e-11, 1e-4, 0.1), strict=True):
        assert error < bound
