"""Builds the compiled ops: sb_fast_sligru/_C (CPU, links no CUDA library) and, with nvcc, _C_cuda.

Switches, all from the environment: FORCE_CUDA=1 (fail rather than build without CUDA), NO_CUDA=1
(never build it), TORCH_CUDA_ARCH_LIST, MAX_JOBS. Both libraries use torch's stable ABI: they need
torch >= 2.10 at run time, and no particular Python.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "sb_fast_sligru is compiled against the torch that will run it; none was found. Type:\n"
        "    pip install torch torchaudio setuptools wheel ninja\n"
        "    pip install --no-build-isolation ."
    )

PACKAGE = "sb_fast_sligru"
DEFAULT_ARCHS = "7.5;8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # what torch 2.10 offers, and no more
# A folder of cuda_ops/ is an operator: its *_cuda.cpp and *.cu make _C_cuda, its other *.cpp _C.
CPP_SOURCES = sorted(glob.glob("cuda_ops/**/*.cpp", recursive=True))
CPU_SOURCES = [path for path in CPP_SOURCES if not path.endswith("_cuda.cpp")]
CUDA_SOURCES = [path for path in CPP_SOURCES if path.endswith("_cuda.cpp")]
CUDA_SOURCES += sorted(glob.glob("cuda_ops/**/*.cu", recursive=True))
INCLUDE = [os.path.abspath("cuda_ops")]


def find_toolkit():
    """Ask nvcc itself: the one on the PATH may be a script or a link that hides the toolkit."""
    nvcc = shutil.which("nvcc")
    if nvcc and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys():
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", report, re.MULTILINE)
        cpp_extension.CUDA_HOME = os.path.realpath(top[1]) if top else cpp_extension.CUDA_HOME


def wants_cuda():
    """Build CUDA where nvcc is found: a GPU visible here says nothing about the user's."""
    if os.environ.get("NO_CUDA") == "1":
        return False
    found = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    if not found and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(
            f"FORCE_CUDA=1, but CUDA_HOME is {cpp_extension.CUDA_HOME} "
            f"and torch is built for CUDA {torch.version.cuda}"
        )
    return found


def limit_jobs():
    """One nvcc or g++ job needs up to 3 GB: more jobs than memory get killed."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count(), int(memory_gb / 3)))))


class BuildExtension(cpp_extension.BuildExtension):
    def run(self):
        super().run()
        # The package reads this to say what it was built for; see sb_fast_sligru/_library.py.
        directory = PACKAGE if self.inplace else os.path.join(self.build_lib, PACKAGE)
        with open(os.path.join(directory, "_build_info.json"), "w", encoding="utf-8") as file:
            json.dump(BUILD_INFO, file, indent=1)


def extensions():
    # An enumerator that a switch forgets is an error: kernels must not run as another.
    exhaustive = "-Werror=switch"
    host = ["-O3", "-fvisibility=hidden", exhaustive, *STABLE_ABI]
    device = ["-O3", f"-Xcompiler={exhaustive}", *STABLE_ABI]
    vectorise = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    yield cpp_extension.CppExtension(
        f"{PACKAGE}._C",
        CPU_SOURCES,
        include_dirs=INCLUDE,
        extra_compile_args={"cxx": host + vectorise},
        py_limited_api=True,
    )
    if BUILD_INFO["cuda"]:
        yield cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            CUDA_SOURCES,
            include_dirs=INCLUDE,
            extra_compile_args={"cxx": [*host, "-DUSE_CUDA"], "nvcc": device},
            py_limited_api=True,
        )


limit_jobs()
find_toolkit()
BUILD_INFO = {
    "torch": torch.__version__,
    "cuda": torch.version.cuda if wants_cuda() else None,
    "archs": os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS),
}
if BUILD_INFO["cuda"]:
    # What torch makes of them, and of names such as "Hopper": sm_* is code for GPUs, compute_* PTX.
    os.environ["TORCH_CUDA_ARCH_LIST"] = BUILD_INFO["archs"]
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    BUILD_INFO["code"] = re.findall(r",code=(\w+)", flags)
setup(
    ext_modules=list(extensions()),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
