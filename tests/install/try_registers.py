"""The registers of the kernels in dist/'s wheel: `make registers`."""

import json
import zipfile

from helpers import stacks_of_l2
from try_wheel import WHEELS


def test_no_kernel_without_clusters_has_a_stack(tmp_path):
    """On any of the architectures: U is in registers and shared memory."""
    kind = next((kind for kind in WHEELS if kind.startswith("cu")), None)
    assert kind, "dist/ has no wheel for GPUs (run: make wheel, with nvcc)"
    with zipfile.ZipFile(WHEELS[kind]) as wheel:
        library = wheel.extract("sb_fast_sligru/_C_cuda.abi3.so", tmp_path)
        info = json.loads(wheel.read("sb_fast_sligru/_build_info.json"))
    stacks = stacks_of_l2(library)
    assert {arch for arch, _ in stacks} == {name for name in info["code"] if name[:3] == "sm_"}
    assert not any(stacks.values()), stacks
