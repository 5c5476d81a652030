"""docs/export.md: every block runs. The recogniser's decoder runs in the tests of the recipes."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from sb_fast_sligru.reference import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.(jit|ao.quantization):DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_blocks("python"):
        if "cuda" not in block and "out.onnx" not in block:
            exec(block, names)
    with torch.no_grad():
        expected = names["encoder"](names["features"])
    for name in ("states", "same_states", "onnx_states"):
        assert relative_error(torch.as_tensor(names[name]), expected) < 1e-5, name
    assert relative_error(names["quantised"](names["features"]), expected) < 0.1

    (source,), (build, _) = code_blocks("cpp"), code_blocks("sh")
    (tmp_path / "encode.cpp").write_text(source)
    run = subprocess.run(
        ["bash", "-e"],
        input=build.replace("$(python ", f"$({sys.executable} "),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, f"{list(expected.shape)}\n"), run.stderr


@pytest.mark.gpu
def test_blocks_for_a_gpu_run():
    names = {}
    first, *others = code_blocks("python")
    (graphs,) = (block for block in others if "cuda" in block)
    exec(first, names)
    exec(graphs, names)
    assert names["encoder"].RNN.rnn[0].u.weight.grad.abs().sum() > 0


def test_the_other_command_is_there():
    _, command = code_blocks("sh")
    python, script, *_ = command.split()
    assert python == "python" and (ROOT / script).exists()


def test_links_lead_somewhere():
    for path in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).exists()
