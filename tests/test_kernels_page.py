"""docs/kernels.md: its kernels are the library's, its figures those of the notebook."""

import re

import torch
from helpers import ROOT

from sb_fast_sligru import ops

H200 = ops.Gpu(90, True, True, True, 227 * 1024, 132, 32, 15, 7)
PAGE = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
NOTEBOOK = (ROOT / "benchmarks/NOTEBOOK.md").read_text(encoding="utf-8")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_drawing_is_of_the_kernel_that_is_chosen():
    numbers = re.search(
        r"`forward_narrow.cu`, H = (\d+), (\d+) rows, 16-bit operands: "
        r"(\d+) clusters x (\d+) blocks x (\d+) warps",
        PAGE,
    ).groups()
    hidden, rows, clusters, blocks, warps = map(int, numbers)
    choice = ops.choose_kernel(H200, hidden, rows, torch.bfloat16, "forward")
    assert (choice.kernel, choice.group) == ("narrow", blocks)
    assert clusters * choice.rows == rows and 8 * warps == choice.units


def test_every_family_is_told_of():
    named = set(re.findall(r"^\| \[`\w+\.cu`\].*", PAGE, re.M))
    files = {name for line in named for name in re.findall(r"`(\w+\.cu)`\]", line)}
    kernels = (ROOT / "cuda_ops/light_gru/persistent").glob("*ward_*.cu")
    assert files == {path.name for path in kernels} | {"stepwise.cu"}


def test_rows_from_which_many_is_chosen():
    said = re.search(r"forward from (\d+) on, backward from (\d+)", PAGE)
    forward, backward = map(int, said.groups())
    for direction, rows in (("forward", forward), ("backward", backward)):
        for count, kernel in ((rows - 1, "wide"), (rows, "many")):
            choice = ops.choose_kernel(H200, 1024, count, torch.bfloat16, direction)
            assert choice.kernel == kernel, (direction, count)


def test_figures_are_the_notebooks():
    rows = re.findall(r"^\| (?:forward|backward), H = .*", PAGE, re.M)
    assert len(rows) == 4
    for row in rows:
        assert any(cells(line)[:6] == cells(row) for line in NOTEBOOK.splitlines())
    said = re.findall(r"([\d.]+(?: to [\d.]+)?) (?:cycles|us|bytes a clock)", PAGE)
    assert said
    for figure in said:
        assert figure in NOTEBOOK, figure
    said = re.search(
        r"([\d.]+) us forward and ([\d.]+) us backward at H = (\d+), (\d+) rows, T = (\d+), and "
        r"([\d.]+) and\s+([\d.]+) us at H = (\d+), (\d+) rows, T = (\d+)",
        PAGE,
    ).groups()
    for forward, backward, hidden, count, steps in (said[:5], said[5:]):
        row = f"| bfloat16 | {count} | {hidden} | {steps} | {forward} | {backward} |"
        assert row in NOTEBOOK
