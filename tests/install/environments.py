"""Environments for packages that are tried: a Python, a torch, and commands that run in them.

One with torch takes gigabytes and is kept, in build/environments. What is tried is installed into a
fresh one on top of it, which sees the packages of the kept one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "build/environments"
# What a shell of a user has not: the switches and paths of `make`, and of this Python.
UNSET = {"PYTHONPATH", "NO_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "VIRTUAL_ENV"}


def run(*command, cwd, succeeds=True, **variables):
    """Run a command; return what it printed.

    Arguments
    ---------
    command : tuple of str or Path
    cwd : Path
    succeeds : bool
        Whether it must. It fails the test if it does otherwise.
    variables : dict
        Added to the environment.
    """
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    process = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = process.stdout
    print(f"$ {' '.join(map(str, command))}\n{output[-4000:]}")
    assert (process.returncode == 0) == succeeds, output[-4000:]
    return output


def interpreter(version):
    """The Python of a version such as "3.10": pyenv's, whose commands may be off, or the PATH's."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    found = str(installed[-1]) if installed else shutil.which(f"python{version}")
    assert found, f"python{version} is not on the PATH"
    return found


class Environment:
    """A virtual environment.

    Arguments
    ---------
    folder : Path
    version : str
        Of Python.
    below : str, optional
        A folder of packages that it has too, by links: all but those that it has or will get.
    builds : bool
        Whether it will get its own setuptools and wheel.
    """

    def __init__(self, folder, version, below=None, builds=False):
        self.folder = folder
        self.python = folder / "bin/python"
        self.site = folder / f"lib/python{version}/site-packages"
        if not self.python.exists():
            run(interpreter(version), "-m", "venv", folder, cwd=ROOT)
        own = "(__editable__.*)?(sb_fast_sligru|uv|pip)"
        if builds or (self.site / "setuptools").exists():
            own += "|setuptools|wheel|pkg_resources|_?distutils"
        for path in Path(below).iterdir() if below else ():
            if not re.match(own, path.name) and not (self.site / path.name).exists():
                (self.site / path.name).symlink_to(path)

    def pip(self, *arguments, cwd=ROOT, **options):
        """Run pip without this machine's own limits on versions; return what it printed."""
        return run(
            *(self.python, "-m", "pip", "--disable-pip-version-check", *arguments),
            cwd=cwd,
            PIP_CONSTRAINT=os.devnull,
            **options,
        )

    def runs(self, *arguments, cwd, **options):
        """Run Python; return what it printed."""
        return run(self.python, *arguments, cwd=cwd, OMP_NUM_THREADS="1", **options)


def kept(version, *packages):
    """The site-packages of an environment of a Python and packages, made if it is not there."""
    name = "-".join([f"py{version}", *(package.replace("==", "") for package in packages)])
    environment = Environment(KEPT / name, version)
    stamp = KEPT / name / "complete"
    if not stamp.exists():
        environment.pip("install", "--quiet", *packages, "numpy", "pytest", "setuptools", "wheel")
        stamp.touch()
    return environment.site
