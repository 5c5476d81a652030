"""Builds from the source in fresh environments, and what is said where they cannot succeed:
`make test-install`, a quarter of an hour. One of them: `make test-install TRY="uv"`.

torch is that of the Python that runs this. Each build is one for CPUs, unless it says otherwise.
"""

import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from environments import ROOT, Environment, run

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = sysconfig.get_path("purelib")
SWITCH = {"NO_CUDA": "1"}
BUILD = ("install", "--no-build-isolation", "--no-deps", ".")


@pytest.fixture
def source(tmp_path):
    """A copy of the tracked files, in a folder whose name has a space and a letter beyond ASCII."""
    folder = tmp_path / "the sourcé"
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path):
    fresh = Environment(tmp_path / "environment", VERSION, PACKAGES, builds=True)
    fresh.pip("install", "--quiet", "--upgrade", "setuptools<82", "wheel")  # as torch wants it
    return fresh


def works(environment, folder, expected="built without CUDA: NO_CUDA=1"):
    report = environment.runs("-m", "sb_fast_sligru.info", cwd=folder)
    assert "CPU library     loaded" in report and f"CUDA library    {expected}" in report
    assert "1.1" in re.search("^speechbrain.*, imports$", report, re.MULTILINE)[0]
    return report


def reason(output):
    """The one line in which the build says why it ends, whatever pip prints around it."""
    (line,) = {line.strip() for line in output.splitlines() if "sb_fast_sligru: " in line}
    return line


# ---- packaging


@pytest.mark.parametrize("setuptools", ["61.0.0", "65.5.0", "77.0.3", ""])
def test_setuptools(environment, source, tmp_path, setuptools):
    """From the oldest that reads pyproject.toml to the newest."""
    version = f"=={setuptools}" if setuptools else ""
    environment.pip("install", "--upgrade", f"setuptools{version}")
    environment.pip(*BUILD, cwd=source, **SWITCH)
    works(environment, tmp_path)


def test_setuptools_without_the_package_wheel(tmp_path, source):
    """A new environment of Python 3.11 has setuptools 65.5 and no wheel."""
    environment = Environment(tmp_path / "bare", VERSION, PACKAGES, builds=True)
    environment.pip("install", "setuptools==65.5.0")
    output = environment.pip(*BUILD, cwd=source, succeeds=False, **SWITCH)
    assert reason(output).endswith("which is missing (run: pip install wheel)")
    environment.pip("install", "wheel")
    environment.pip(*BUILD, cwd=source, **SWITCH)


def test_isolated_build(environment, source):
    """pip builds in an environment of its own, without torch."""
    output = environment.pip("install", "--no-deps", ".", cwd=source, succeeds=False, **SWITCH)
    assert "which cannot be imported here (No module named 'torch'). Type:" in reason(output)
    assert "    pip install --no-build-isolation .\n" in output


def test_editable(environment, source, tmp_path):
    environment.pip(*BUILD[:-1], "--editable", ".", cwd=source, **SWITCH)
    report = works(environment, tmp_path)
    assert f"libraries       {source}/sb_fast_sligru" in report


def test_uninstall(environment, source, tmp_path):
    environment.pip(*BUILD, cwd=source, **SWITCH)
    environment.pip("check")
    environment.pip("uninstall", "--yes", "sb_fast_sligru")
    assert not list(environment.site.glob("sb_fast_sligru*"))


def test_installed_and_run_from_the_checkout(environment, source):
    """Which hides what was installed from it."""
    environment.pip(*BUILD, cwd=source, **SWITCH)
    report = works(environment, source)
    assert f"package         {source}/sb_fast_sligru" in report
    assert f"libraries       {environment.site}/sb_fast_sligru" in report
    with open(source / "cuda_ops/light_gru/cell.h", "a", encoding="utf-8") as file:
        file.write("// changed\n")
    report = environment.runs("-m", "sb_fast_sligru.info", cwd=source)
    assert "which was built from other sources (run in " in report
    environment.pip(*BUILD, cwd=source, **SWITCH)  # the advice cures it
    works(environment, source)


def test_site_packages_that_cannot_be_written(environment, source, tmp_path):
    environment.pip(*BUILD, cwd=source, **SWITCH)
    package = environment.site / "sb_fast_sligru"
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    (package / "__pycache__").touch()  # no folder can be made there, by root either
    works(environment, tmp_path)


def test_source_distribution(environment, source, tmp_path):
    """It builds, its tests run, and pip's cache does not hand out a build of other switches."""
    environment.runs("setup.py", "--quiet", "sdist", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    environment.pip(*BUILD[:-1], archive, **SWITCH)
    works(environment, tmp_path)
    advised = environment.pip(
        *(*BUILD[:-1], "--no-cache-dir", archive), succeeds=False, FORCE_CUDA="1", **SWITCH
    )
    assert reason(advised).endswith("FORCE_CUDA=1, but NO_CUDA=1")
    shutil.unpack_archive(archive, tmp_path)
    (unpacked,) = tmp_path.glob("sb_fast_sligru-*")
    tests = ("tests/test_library.py", "tests/test_rnn.py", "tests/test_contributing.py")
    environment.runs("-m", "pytest", "-q", "-k", "not snippets", *tests, cwd=unpacked)


def test_a_build_for_cpus_after_one_for_gpus(environment, source):
    """Nothing of the earlier one gets into the wheel, nor stays beside the sources."""
    platform = f"{sysconfig.get_platform()}-cpython-{VERSION.replace('.', '')}"
    old = source / f"build/lib.{platform}/sb_fast_sligru/_C_cuda.abi3.so"
    beside = source / "sb_fast_sligru/_C_cuda.abi3.so"
    for path in (old, beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    environment.pip("wheel", *BUILD[1:], cwd=source, **SWITCH)
    (wheel,) = source.glob("*.whl")
    assert "+cpu-cp310-abi3-" in wheel.name
    listed = environment.runs("-m", "zipfile", "-l", wheel, cwd=source)
    assert "_C.abi3.so" in listed and "_C_cuda" not in listed
    environment.runs("setup.py", "--quiet", "build_ext", "--inplace", cwd=source, **SWITCH)
    assert not beside.exists()


def test_uv(environment, source, tmp_path):
    """As docs/install.md writes it."""
    environment.pip("install", "uv")
    uv = environment.folder / "bin/uv"
    run(
        *(uv, "pip", "install", "--no-build-isolation", "--no-deps", "--python"),
        *(environment.python, "."),
        cwd=source,
        **SWITCH,
    )
    works(environment, tmp_path)


# ---- compilers


@pytest.mark.parametrize(
    "compiler", ["g++-9", "g++-10", "g++-11", "g++-12", "g++-13", "g++-14", "clang++-14"]
)
def test_compiler(environment, source, tmp_path, compiler):
    """The library builds, loads, and computes what the plain loop does."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on the PATH")
    environment.pip(*BUILD, cwd=source, CXX=compiler, **SWITCH)
    works(environment, tmp_path)
    for name in ("conftest.py", "fuzz.py", "helpers.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    shutil.copy(ROOT / "tests/ops/test_light_gru.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment.runs(
        *("-m", "pytest", "-q", "test_light_gru.py", "-k", "float64_matches or no_worse"),
        cwd=tmp_path,
    )


def test_no_compiler(environment, source):
    output = environment.pip(*BUILD, cwd=source, succeeds=False, CXX="/no/compiler", **SWITCH)
    assert "/no/compiler is no C++17 compiler: " in reason(output)


# ---- CUDA


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA folder: its nvcc tells a version, and does nothing else."""

    def make(version):
        nvcc = tmp_path / "cuda/bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        if version:
            nvcc.write_text(f"#!/bin/sh\necho release {version}, V{version}.1\n")
            nvcc.chmod(0o755)
        return str(tmp_path / "cuda")

    return make


@pytest.mark.parametrize(
    "version, said",
    [("11.8", "nvcc is of CUDA 11.8, torch of CUDA "), (None, "cuda/bin/nvcc cannot be run: ")],
    ids=["another CUDA", "no nvcc"],
)
def test_toolkit_that_does_not_fit(environment, source, tmp_path, toolkit, version, said):
    home = toolkit(version)
    output = environment.pip(*BUILD, cwd=source, succeeds=False, CUDA_HOME=home, FORCE_CUDA="1")
    assert f"sb_fast_sligru: FORCE_CUDA=1, but {said}" in reason(output).replace(f"{tmp_path}/", "")
    environment.pip(*BUILD, cwd=source, CUDA_HOME=home)
    report = environment.runs("-m", "sb_fast_sligru.info", cwd=tmp_path)
    assert said in report.replace(f"{tmp_path}/", "") and "CPU library     loaded" in report


def needs_nvcc():
    if subprocess.run(["sh", "-c", "command -v nvcc"], stdout=subprocess.DEVNULL).returncode:
        pytest.skip("no nvcc")


@pytest.mark.parametrize("archs", ["7.0", "9,0"])
def test_architectures_that_cannot_be(environment, source, archs):
    needs_nvcc()
    options = {"TORCH_CUDA_ARCH_LIST": archs, "FORCE_CUDA": "1"}
    output = environment.pip(*BUILD, cwd=source, succeeds=False, **options)
    assert "sb_fast_sligru: TORCH_CUDA_ARCH_LIST: got " in reason(output)
    assert repr(archs) in reason(output)


def test_cuda(environment, source, tmp_path):
    """For one architecture; for all it takes several times as long."""
    needs_nvcc()
    environment.pip(*BUILD, cwd=source, TORCH_CUDA_ARCH_LIST="8.0", FORCE_CUDA="1")
    works(environment, tmp_path, expected="loaded")
