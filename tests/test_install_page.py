"""docs/install.md: its commands exist, and its versions are those of the package and its pins."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT

import sb_fast_sligru

PAGE = (ROOT / "docs/install.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_row_is_a_command_that_runs_something():
    files = ["tests/install/try_source.py", "tests/install/try_wheel.py"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    tests = {
        f"make test-{target}": [line for line in run.stdout.splitlines() if line.startswith(file)]
        for target, file in zip(("install", "wheel"), files, strict=True)
    }
    rows = re.findall(r"^\| 3\.\d+ \|.*\| `([^`]*)` \|$", PAGE, re.MULTILINE)
    tried = set()
    for row in rows:
        target, _, chosen = row.partition(" TRY=")
        assert f"\n{target.removeprefix('make ')}: " in MAKEFILE
        if chosen:
            names = {name for name in tests[target] if chosen.strip('"') in name}
            assert names, row
            tried |= names
    assert tried == {name for names in tests.values() for name in names}
    assert len(rows) == PAGE.count("\n| 3.")


def test_versions_are_those_of_the_package():
    named = re.findall(r"sb_fast_sligru-([\d.]+)\+|`([\d.]+)\+c", PAGE + README)
    assert {one or other for one, other in named} == {sb_fast_sligru.__version__}


@pytest.mark.parametrize("file", ["README.md", "docs/install.md", "Dockerfile"])
def test_the_pair_to_install_is_the_tested_one(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    commands = re.findall(r"(torch==\S+) (torchaudio==\S+)", text)
    assert commands
    for pair in commands:
        assert set(pair) <= set(pins.split())


def test_architectures_are_those_of_the_build():
    archs = re.search(r"DEFAULT_ARCHS = \[(.*)\]", (ROOT / "setup.py").read_text())[1]
    *others, last = re.findall(r'"([\d.a]+)', archs)
    assert f"GPUs of {', '.join(others)} and {last}, newer ones by PTX" in PAGE


def test_variables_are_those_of_the_build():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in re.findall(r"^\| `([A-Z_]+)(?:=1)?` \|", PAGE, re.MULTILINE):
        assert name in setup or name == "CXX"
    assert "OLDEST_TORCH = (2, 10)" in setup and "torch 2.10 or newer" in PAGE
