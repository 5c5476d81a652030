"""The probes of reports: commit, CPU, driver, and the TF32 switches."""

import subprocess

import pytest
import torch

from sb_fast_sligru import machine


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_tells_of_modified_files(tmp_path):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder/file"
    file.write_text("one")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a commit")
    (tmp_path / "untracked").touch()
    head = git(tmp_path, "rev-parse", "HEAD")
    assert machine.commit_of(tmp_path / "folder") == head
    file.write_text("two")
    assert machine.commit_of(tmp_path / "folder") == f"{head}+"


def test_there_is_no_commit_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")  # no git
    assert machine.commit_of(tmp_path) is None


def test_processor_has_a_name_of_one_line():
    name = machine.processor_name()
    assert name and name == name.strip() and "\n" not in name


def test_driver_is_that_of_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu_driver() is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")  # two GPUs
    program.chmod(0o755)
    assert machine.gpu_driver() == "580.65.06"


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_switched_and_switched_back(enabled):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with machine.tf32(False):
        cudnn.allow_tf32 = True
        with pytest.raises(KeyError), machine.tf32(enabled):
            assert matmul.allow_tf32 == cudnn.allow_tf32 == enabled
            raise KeyError
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, True)
