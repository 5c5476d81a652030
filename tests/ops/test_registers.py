"""The kernels without clusters keep U in registers and shared memory: none of it spills."""

from pathlib import Path

import pytest
from helpers import stacks_of_l2

from sb_fast_sligru import _library


@pytest.mark.skipif(bool(_library.cuda_error), reason="there is no CUDA library")
def test_no_kernel_without_clusters_has_a_stack():
    """Those of the architectures that were built; `make registers` looks at all."""
    stacks = stacks_of_l2(Path(_library.library_folder, "_C_cuda.abi3.so"))
    assert {arch for arch, _ in stacks} == {
        name for name in _library.build_info["code"] if name.startswith("sm_")
    }
    assert not any(stacks.values()), stacks
