"""docs/dispatch.md is what the library prints, and what it says of both passes holds."""

import itertools
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from sb_fast_sligru import cards, ops

PAGE = (ROOT / "docs/dispatch.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_command_prints():
    command = [sys.executable, "-m", "sb_fast_sligru.cards"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert PAGE == process.stdout


@pytest.mark.parametrize("name", cards.CARDS)
def test_both_passes_take_the_kernel_of_the_page(name):
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    layers = itertools.product(cards.HIDDEN_SIZES, cards.ROWS, dtypes)
    for hidden, rows, dtype in layers:
        forward, backward = (
            ops.choose_kernel(cards.CARDS[name], hidden, rows, dtype, direction)
            for direction in ("forward", "backward")
        )
        assert forward == backward


def test_the_example_is_a_cell():
    """The page's example is explained in words: they are the library's numbers."""
    assert '"`l2` 3 x 128, 16 rows, 3 waves"' in PAGE
    gpu = cards.CARDS["RTX 4090"]
    choice = ops.choose_kernel(gpu, 2048, 48, torch.bfloat16, "forward")
    assert (choice.kernel, choice.groups(48), choice.group, choice.rows) == ("l2", 3, 128, 16)
    assert choice.waves(gpu, 48) == 3 and gpu.multiprocessors // choice.group == 1
