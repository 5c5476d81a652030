"""Builds the compiled ops: sb_fast_sligru/_C (CPU, links no CUDA library) and, with nvcc, _C_cuda.

Switches, all from the environment: FORCE_CUDA=1 (fail rather than build without CUDA), NO_CUDA=1
(never build it), TORCH_CUDA_ARCH_LIST, MAX_JOBS. Both libraries use torch's stable ABI: they need
torch >= 2.10 at run time, and no particular Python. docs/install.md has the rest.
"""

import glob
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py


def fail(message):
    sys.exit(f"sb_fast_sligru: {message}")


try:
    import torch
    from torch.utils import cpp_extension
except (ImportError, OSError) as error:  # OSError: torch lacks a library
    # pip builds in an environment of its own, which has no torch.
    fail(
        "it is compiled against the torch that will run it, which cannot be imported here "
        f"({' '.join(str(error).split())}). Type:\n"
        "    pip install torch setuptools wheel ninja\n"
        "    pip install --no-build-isolation ."
    )

PACKAGE = "sb_fast_sligru"
OLDEST_TORCH = (2, 10)
OLDEST_CAPABILITY = 75
DEFAULT_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # what torch 2.10 offers, and no more
# A folder of cuda_ops/ is an operator: its *_cuda.cpp and *.cu make _C_cuda, its other *.cpp _C.
CPP_SOURCES = sorted(glob.glob("cuda_ops/**/*.cpp", recursive=True))
CPU_SOURCES = [path for path in CPP_SOURCES if not path.endswith("_cuda.cpp")]
CUDA_SOURCES = [path for path in CPP_SOURCES if path.endswith("_cuda.cpp")]
CUDA_SOURCES += sorted(glob.glob("cuda_ops/**/*.cu", recursive=True))
INCLUDE = [os.path.abspath("cuda_ops")]


# ---- what is there to build with


def switch(name):
    """A variable of the environment that is 0 or 1, as a bool."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        fail(f"{name}: got {value!r}, expected 0 or 1")
    return value == "1"


def output_of(*command, stdin=""):
    """What a program prints, a str, and whether it succeeded."""
    try:
        run = subprocess.run(command, input=stdin, capture_output=True, text=True)
    except OSError as error:
        return str(error), False
    return run.stdout + run.stderr, run.returncode == 0


def check_torch():
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        fail(f"torch {torch.__version__} is too old (run: pip install 'torch>={oldest}')")


def check_packaging():
    """Before 70.1, setuptools left the making of wheels to the package wheel."""
    makes_wheel = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
    if makes_wheel and not any(
        importlib.util.find_spec(name) for name in ("wheel", "setuptools.command.bdist_wheel")
    ):
        fail(
            f"setuptools {setuptools.__version__} makes wheels with the package wheel, which is "
            "missing (run: pip install wheel)"
        )


def check_compiler():
    """Compile next to nothing: a compiler that is missing or does not work says so in one line."""
    compiler = cpp_extension.get_cxx_compiler()
    command = [*shlex.split(compiler), "-x", "c++", "-std=c++17", "-fsyntax-only", "-"]
    output, works = output_of(*command, stdin="#include <charconv>\n")
    if not works:
        fail(f"{compiler} is no C++17 compiler: {_complaint(output)} (install g++, or set CXX)")


def check_nvcc(nvcc):
    """The same for nvcc, which may refuse the compiler; it takes seconds."""
    output, works = output_of(nvcc, "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    if not works:
        fail(f"{nvcc} does not work: {_complaint(output)} (NO_CUDA=1 builds without it)")


def _complaint(output):
    """The first line of a compiler's output that tells of an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])


def find_cuda():
    """The toolkit that fits this torch.

    CUDA code is built where nvcc is found: a GPU visible here says nothing about the user's.

    Returns
    -------
    nvcc : str or None
    why_not : str or None
        Without one: the reason, one clause.
    """
    if switch("NO_CUDA"):
        return None, "NO_CUDA=1"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    if not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and shutil.which("nvcc"):
        # Ask nvcc itself: the one on the PATH may be a script or a link that hides the toolkit.
        report, _ = output_of(shutil.which("nvcc"), "--dryrun", "-c", "-x", "cu", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", report, re.MULTILINE)
        cpp_extension.CUDA_HOME = os.path.realpath(top[1]) if top else cpp_extension.CUDA_HOME
    home = cpp_extension.CUDA_HOME
    if not home:
        return None, "nvcc was not found"
    nvcc = os.path.join(home, "bin", "nvcc")
    output, _ = output_of(nvcc, "--version")
    release = re.search(r"release (\d+)\.\d+", output)
    if release is None:
        return None, f"{nvcc} cannot be run: {_complaint(output)}"
    if release[1] != torch.version.cuda.split(".")[0]:
        return None, (
            f"nvcc is of CUDA {release[0].split()[1]}, torch of CUDA {torch.version.cuda}: the "
            "major versions must agree"
        )
    return nvcc, None


def architectures(nvcc):
    """What to build for: TORCH_CUDA_ARCH_LIST, else all that this nvcc knows of the default.

    Returns
    -------
    archs : str
        As torch takes them.
    code : list of str
        What torch makes of them, and of names such as "Hopper": sm_* is code for GPUs, compute_*
        PTX.
    """
    known = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")[0]))
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;")
    if not archs:
        some = [arch for arch in DEFAULT_ARCHS if re.sub(r"\D", "", arch) in known]
        archs = ";".join(some if some[-1].endswith("PTX") else [*some, "9.0+PTX"])
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    try:
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError) as error:  # IndexError: "native" without a GPU
        fail(f"TORCH_CUDA_ARCH_LIST: got {archs!r}: {error}; expected such as {DEFAULT_ARCHS[3]}")
    code = re.findall(r",code=(\w+)", flags)
    for name in code:
        number = re.search(r"\d+", name)[0]
        arch = f"{number[:-1]}.{number[-1]}"
        if int(number) < OLDEST_CAPABILITY:
            fail(f"TORCH_CUDA_ARCH_LIST: got {arch} in {archs!r}, expected 7.5 or newer")
        if number not in known:
            fail(f"TORCH_CUDA_ARCH_LIST: got {arch} in {archs!r}, which {nvcc} does not know")
    return archs, code


# ---- how many compilers may run at once


def memory_limit(groups="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """Bytes that this process may use: the least of the machine's and its control groups'.

    Version 2 has memory.max in each group below `root`, version 1 memory.limit_in_bytes below
    memory/ there. Within a container the path of `groups` can be the host's, which is not there.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        lines = Path(groups).read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = Path(root), "memory.max"
        elif "memory" in controllers.split(","):
            top, name = Path(root, "memory"), "memory.limit_in_bytes"
        else:
            continue
        path = top / group.lstrip("/")
        for folder in (path, *path.parents):
            if folder.is_relative_to(top):
                try:
                    limits.append(int((folder / name).read_text()))
                except (OSError, ValueError):  # ValueError: "max"
                    pass
    return min(limits)


def limit_jobs():
    """One nvcc or g++ job needs up to 3 GB: more jobs than memory get killed."""
    jobs = min(len(os.sched_getaffinity(0)), memory_limit() // (3 * 2**30))
    os.environ.setdefault("MAX_JOBS", str(max(1, jobs)))


# ---- the build


class BuildPackage(build_py):
    def run(self):
        # What an earlier build left there would get into the wheel. build_ext comes afterwards.
        shutil.rmtree(os.path.join(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


class BuildExtension(cpp_extension.BuildExtension):
    info = None  # what `main` found
    nvcc = None

    def run(self):
        if self.nvcc:
            check_nvcc(self.nvcc)
        directory = PACKAGE if self.inplace else os.path.join(self.build_lib, PACKAGE)
        for path in glob.glob(os.path.join(directory, "_C*.so")):
            os.remove(path)  # of an earlier build
        super().run()
        # The package reads this to say what it was built for; see sb_fast_sligru/_library.py.
        with open(os.path.join(directory, "_build_info.json"), "w", encoding="utf-8") as file:
            json.dump(self.info, file, indent=1)


def extensions(with_cuda):
    # An enumerator that a switch forgets is an error: kernels must not run as another.
    exhaustive = "-Werror=switch"
    host = ["-O3", "-g0", "-fvisibility=hidden", "-include", "common/old_glibc.h", exhaustive]
    host += STABLE_ABI
    device = ["-O3", f"-Xcompiler={exhaustive}", *STABLE_ABI]
    vectorise = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    options = {"include_dirs": INCLUDE, "extra_link_args": ["-Wl,-s"], "py_limited_api": True}
    yield cpp_extension.CppExtension(
        f"{PACKAGE}._C", CPU_SOURCES, extra_compile_args={"cxx": host + vectorise}, **options
    )
    if with_cuda:
        yield cpp_extension.CUDAExtension(
            f"{PACKAGE}._C_cuda",
            CUDA_SOURCES,
            extra_compile_args={"cxx": [*host, "-DUSE_CUDA"], "nvcc": device},
            **options,
        )


def main():
    check_torch()
    check_packaging()
    if "sdist" not in sys.argv:
        check_compiler()
    limit_jobs()
    nvcc, why_not = find_cuda()
    if nvcc is None and switch("FORCE_CUDA"):
        fail(f"FORCE_CUDA=1, but {why_not}")
    if nvcc is None:
        print(f"sb_fast_sligru: building for the CPU alone: {why_not}", file=sys.stderr)
    archs, code = architectures(nvcc) if nvcc else ("", [])
    text = Path(PACKAGE, "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', text, re.MULTILINE)[1]
    BuildExtension.nvcc = nvcc
    BuildExtension.info = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda if nvcc else None,
        "without_cuda": why_not,
        "archs": archs,
        "code": code,
        "sources": runpy.run_path(f"{PACKAGE}/_sources.py")["digest"]("cuda_ops"),
    }
    # Wheels of different content have different versions. The source has one alone.
    local = f"+cu{torch.version.cuda.split('.')[0]}" if nvcc else "+cpu"
    setuptools.setup(
        version=version if "sdist" in sys.argv else version + local,
        ext_modules=list(extensions(with_cuda=nvcc is not None)),
        cmdclass={"build_py": BuildPackage, "build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
