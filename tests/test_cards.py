"""docs/dispatch.md is what the library prints, and what its cells say holds for both passes."""

import re
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


def cells_of(name):
    """The cells of a card's table, by H, rows and operands."""
    section = next(
        part for part in PAGE.split("\n## ")[1:] if name in part.splitlines()[0].split(", ")
    )
    head, _, *lines = (
        line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")
    )
    columns = [title.strip().removesuffix(" rows").split(", ") for title in head[1:]]
    return {
        (int(hidden), int(rows), dtype): cell.strip()
        for hidden, *cells in lines
        for (dtype, rows), cell in zip(columns, cells, strict=True)
    }


@pytest.mark.parametrize("name", cards.CARDS)
def test_a_cell_tells_of_both_passes(name):
    cells = cells_of(name)
    assert len(cells) == len(cards.HIDDEN_SIZES) * len(cards.ROWS) * 2
    for (hidden, rows, dtype), cell in cells.items():
        said = cell.split("; backward ")
        for direction, text in zip(("forward", "backward"), (said[0], said[-1]), strict=True):
            choice = ops.choose_kernel(
                cards.CARDS[name], hidden, rows, getattr(torch, dtype), direction
            )
            kernel, groups, group, group_rows = re.match(
                r"(?:forward )?`(\w+)`(?: (\d+) x (\d+), (\d+) rows?)?", text
            ).groups(0)
            if kernel != "stepwise":
                assert int(groups) == choice.groups(rows)
            assert kernel == choice.kernel
            assert (int(group), int(group_rows)) == (choice.group, choice.rows)


def test_the_example_is_a_cell():
    """The page's example is explained in words: they are the library's numbers."""
    assert '"`l2` 3 x 128, 16 rows, 3 waves"' in PAGE
    gpu = cards.CARDS["RTX 4090"]
    choice = ops.choose_kernel(gpu, 2048, 48, torch.bfloat16, "forward")
    assert (choice.kernel, choice.groups(48), choice.group, choice.rows) == ("l2", 3, 128, 16)
    assert choice.waves(gpu, 48) == 3 and gpu.multiprocessors // choice.group == 1
