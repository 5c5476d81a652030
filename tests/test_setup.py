"""setup.py and pyproject.toml: what is built, what is required, and one line for each obstacle."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT, load
from torch.utils import cpp_extension

import sb_fast_sligru

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
GIB = 2**30


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, in its folder, without the switches of this shell."""
    monkeypatch.chdir(ROOT)
    for name in ("NO_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    return load(ROOT / "setup.py")


@pytest.fixture
def toolkit(setup, tmp_path, monkeypatch):
    """Makes a CUDA folder with an nvcc of a version, that knows some architectures."""

    def make(version, known=("75", "80", "86", "89", "90", "100", "120")):
        (tmp_path / "bin").mkdir()
        nvcc = tmp_path / "bin/nvcc"
        lines = "\n".join(f"compute_{number}" for number in known)
        nvcc.write_text(f"#!/bin/sh\necho 'release {version}, V{version}.1\n{lines}'\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        return str(nvcc)

    return make


def message_of(function, *arguments):
    """The one line with which a function ends the program."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


# ---- metadata


def test_torch_and_speechbrain_are_all_that_is_required():
    assert PROJECT["dependencies"] == ["torch>=2.10", "speechbrain>=1.1"]


def test_the_extra_has_what_the_recipes_import():
    """All that is neither required nor optional in the recipes themselves."""
    extra = " ".join(PROJECT["optional-dependencies"]["recipes"])
    names = {re.split("[.-]", name)[0] for name in re.findall(r"[a-z][\w.-]+", extra)}
    files = [path for top in ("recipes", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    imported = set()
    for path in files:
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    imported -= {path.stem for path in files} | {path.parent.name for path in files}
    imported -= {"torch", "speechbrain", "numpy", "sb_fast_sligru", *sys.stdlib_module_names}
    assert {"pyyaml" if name == "yaml" else name for name in imported} <= names
    assert "torchaudio" in names  # SpeechBrain's


def test_setuptools_before_77_reads_the_project_table():
    """They refuse a license that is a string, and license-files."""
    assert not {"license", "license-files"} & PROJECT.keys()
    assert "License :: OSI Approved :: Apache Software License" in PROJECT["classifiers"]


def test_the_version_is_in_one_place():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    newest = re.search(r"^## \[(\d[\d.]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert sb_fast_sligru.__version__ == newest
    places = [
        path
        for path in [*ROOT.glob("*.*"), *(ROOT / "sb_fast_sligru").rglob("*.py")]
        if path.is_file() and f'"{newest}"' in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert places == [ROOT / "sb_fast_sligru/__init__.py"]


def test_versions_of_wheels_differ_with_their_content(setup, toolkit, monkeypatch):
    built = []
    monkeypatch.setattr(setup.setuptools, "setup", lambda **options: built.append(options))
    toolkit("13.0")

    def version(command, **environment):
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        setup.main()
        return built[-1]["version"], len(built[-1]["ext_modules"])

    release = sb_fast_sligru.__version__
    assert version("bdist_wheel") == (f"{release}+cu13", 2)
    assert version("sdist")[0] == release
    assert version("bdist_wheel", NO_CUDA="1") == (f"{release}+cpu", 1)


def test_the_source_distribution_has_every_tracked_file(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    # setuptools writes its lists beside the sources: those of this copy.
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--formats=tar"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (archive,) = (tmp_path / "dist").iterdir()
    assert archive.name == f"sb_fast_sligru-{sb_fast_sligru.__version__}.tar"
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert set(tracked) - names == set()
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


# ---- obstacles


@pytest.mark.parametrize("name", ["NO_CUDA", "FORCE_CUDA"])
def test_switches_are_0_or_1(setup, monkeypatch, name):
    assert not setup.switch(name)
    monkeypatch.setenv(name, "1")
    assert setup.switch(name)
    monkeypatch.setenv(name, "yes")
    assert message_of(setup.switch, name).endswith(f"{name}: got 'yes', expected 0 or 1")


@pytest.mark.parametrize("version, old", [("2.9.1", True), ("2.10.0+cpu", False), ("3.0", False)])
def test_an_old_torch(setup, monkeypatch, version, old):
    monkeypatch.setattr(torch, "__version__", version)
    if old:
        assert "torch 2.9.1 is too old (run: pip install" in message_of(setup.check_torch)
    else:
        setup.check_torch()


def test_setuptools_without_the_package_wheel(setup, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    setup.check_packaging()
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert message_of(setup.check_packaging).endswith("(run: pip install wheel)")
    monkeypatch.setattr(sys, "argv", ["setup.py", "build_ext", "--inplace"])
    setup.check_packaging()


def test_no_compiler(setup, monkeypatch):
    setup.check_compiler()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "/no/such/compiler is no C++17 compiler" in message_of(setup.check_compiler)


def test_a_compiler_that_knows_no_cpp17(setup, monkeypatch, tmp_path):
    compiler = tmp_path / "old"
    compiler.write_text("#!/bin/sh\necho 'In file a.h' >&2\necho 'a.h:1: error: no' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "is no C++17 compiler: a.h:1: error: no (install" in message_of(setup.check_compiler)


def test_an_nvcc_that_does_not_work(setup):
    line = message_of(setup.check_nvcc, "/no/such/nvcc")
    assert line.startswith("sb_fast_sligru: /no/such/nvcc does not work")


def test_a_toolkit_that_fits(setup, toolkit):
    nvcc = toolkit("13.2")
    assert setup.find_cuda() == (nvcc, None)


def test_no_cuda(setup, toolkit, monkeypatch):
    toolkit("13.0")
    monkeypatch.setenv("NO_CUDA", "1")
    assert setup.find_cuda() == (None, "NO_CUDA=1")


def test_another_major_version(setup, toolkit):
    toolkit("12.4")
    assert setup.find_cuda() == (
        None,
        "nvcc is of CUDA 12.4, torch of CUDA 13.0: the major versions must agree",
    )


def test_a_cuda_folder_without_nvcc(setup, toolkit):
    Path(toolkit("13.0")).unlink()
    nvcc, why_not = setup.find_cuda()
    assert nvcc is None and "nvcc cannot be run: " in why_not and "No such file" in why_not


def test_no_toolkit(setup, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup.find_cuda() == (None, "nvcc was not found")


def test_a_torch_without_cuda(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.find_cuda()[1].endswith("is built without CUDA")


def test_cuda_that_is_forced_and_not_there(setup, toolkit, monkeypatch, capsys):
    toolkit("12.4")
    monkeypatch.setattr(setup.setuptools, "setup", lambda **options: None)
    setup.main()
    said = capsys.readouterr().err.splitlines()
    reason = "nvcc is of CUDA 12.4, torch of CUDA 13.0: the major versions must agree"
    assert f"sb_fast_sligru: building for the CPU alone: {reason}" in said
    assert setup.BuildExtension.info["without_cuda"] == reason
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert message_of(setup.main) == f"sb_fast_sligru: FORCE_CUDA=1, but {reason}"


@pytest.mark.parametrize("asked", [None, "", " "])
def test_default_architectures(setup, toolkit, monkeypatch, asked):
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    archs, code = setup.architectures(toolkit("13.0"))
    assert archs == ";".join(setup.DEFAULT_ARCHS)
    assert {"sm_75", "sm_90a", "sm_120", "compute_120"} <= set(code)


def test_an_older_toolkit_builds_what_it_knows(setup, toolkit):
    archs, code = setup.architectures(toolkit("13.0", known=("75", "80", "86", "89", "90")))
    assert archs == "7.5;8.0;8.6;8.9;9.0a;9.0+PTX" and "compute_90" in code


@pytest.mark.parametrize(
    "asked, said",
    [
        ("7.0;9.0a", "got 7.0 in '7.0;9.0a', expected 7.5 or newer"),
        ("Volta", "got 7.0 in 'Volta', expected 7.5 or newer"),
        ("9,0", "got '9,0': Unknown CUDA arch (9,0)"),
        ("hopper", "got 'hopper': Unknown CUDA arch (hopper)"),
        ("12.1", "got 12.1 in '12.1', which"),
        ("native", "got 'native'"),
    ],
)
def test_bad_architectures(setup, toolkit, monkeypatch, asked, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert f"TORCH_CUDA_ARCH_LIST: {said}" in message_of(setup.architectures, toolkit("13.0"))


def test_torch_that_cannot_be_imported(tmp_path):
    """As in pip's isolated build."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    run = subprocess.run(
        [sys.executable, "setup.py", "egg_info"],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    first, *commands = run.stderr.splitlines()
    assert run.returncode == 1 and "No module named 'torch'" in first
    assert [line.strip() for line in commands] == [
        "pip install torch setuptools wheel ninja",
        "pip install --no-build-isolation .",
    ]


# ---- compilers at once


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/a/b\n", {"a/b/memory.max": f"{7 * GIB}\n"}, 7),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{4 * GIB}\n"}, 4),
        ("0::/of/the/host\n", {"memory.max": f"{6 * GIB}\n"}, 6),  # seen within a container
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": f"{5 * GIB}\n"}, 5),
        ("4:cpu,memory:/host\n", {"memory/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 100),
        ("2:cpu:/x\n", {}, 100),
    ],
)
def test_memory_that_a_container_may_use(setup, monkeypatch, tmp_path, groups, files, expected):
    monkeypatch.setattr(setup.os, "sysconf", {"SC_PAGE_SIZE": GIB, "SC_PHYS_PAGES": 100}.get)
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert setup.memory_limit(tmp_path / "groups", tmp_path / "fs") == expected * GIB


@pytest.mark.parametrize("gib, cores, jobs", [(100, 8, "8"), (10, 8, "3"), (1, 8, "1")])
def test_jobs_fit_into_memory(setup, monkeypatch, gib, cores, jobs):
    monkeypatch.setenv("MAX_JOBS", "")  # so that what is set is undone
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(setup, "memory_limit", lambda: gib * GIB)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda _: set(range(cores)))
    setup.limit_jobs()
    assert setup.os.environ["MAX_JOBS"] == jobs
    setup.os.environ["MAX_JOBS"] = "5"
    setup.limit_jobs()
    assert setup.os.environ["MAX_JOBS"] == "5"
