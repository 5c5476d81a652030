"""docs/numerics.md: its tables are the committed reports', its claims what they show."""

import json
import re

import torch
from helpers import ROOT

PAGE = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
PRECISIONS = ("fp64", "fp32", "tf32", "bf16", "fp16", "bf16-autocast", "fp16-autocast")
OURS = ("ours-persistent", "ours-stepwise", "ours-cpu")  # the first that was measured


def errors_of(name):
    """{(contender, length, precision): errors} of a result file."""
    path = ROOT / f"benchmarks/results/{name}.json"
    return {
        (row["contender"], row["time"], row["precision"]): row["errors"]
        for row in json.loads(path.read_text(encoding="utf-8"))["accuracy"]
        if row["status"] == "measured"
    }


def line_of(label, errors, length, precision):
    """A row of the page's tables: ours / SpeechBrain's of h, dwx and dU."""
    ours = next(
        errors[name, length, precision] for name in OURS if (name, length, precision) in errors
    )
    stock = errors.get(("stock-eager", length, precision), {})
    cells = [
        f"{ours[key]:.1e} / {f'{stock[key]:.1e}' if stock.get(key) else '-'}"
        for key in ("h", "dwx", "du")
    ]
    return f"| {label} | {' | '.join(cells)} |"


def lines_by_precision(errors):
    return [line_of(precision, errors, 3000, precision) for precision in PRECISIONS]


def lines_by_length(errors):
    return [
        line_of(f"{precision}, T = {length}", errors, length, precision)
        for precision in ("fp64", "fp32", "bf16", "bf16-autocast")
        for length in (100, 1000, 3000)
    ]


def test_tables_are_the_reports():
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    bodies = [table.splitlines()[2:] for table in tables]
    gpu, cpu = errors_of("nvidia-h200"), errors_of("cpu-amd-epyc")
    assert bodies == [lines_by_precision(gpu), lines_by_length(cpu)]


def test_what_the_page_says_of_them():
    gpu, cpu = errors_of("nvidia-h200"), errors_of("cpu-amd-epyc")

    def ratio(precision, key):
        ours, stock = (
            gpu[name, 3000, precision][key] for name in ("ours-persistent", "stock-eager")
        )
        return ours / stock

    for precision in ("bf16", "fp16"):
        assert 0.4 < ratio(precision, "h") < 0.6  # half
        assert 0.8 < ratio(f"{precision}-autocast", "h") < 1.2  # alike
    persistent = {
        precision: gpu["ours-persistent", 3000, precision] for precision in ("fp32", "tf32")
    }
    assert persistent["fp32"]["h"] == persistent["tf32"]["h"]
    assert persistent["fp32"]["dwx"] < persistent["tf32"]["dwx"] / 10
    for precision in ("fp64", "fp32", "bf16"):  # no growth
        errors = [cpu["ours-cpu", length, precision]["h"] for length in (100, 1000, 3000)]
        assert max(errors) < 1.2 * min(errors)
    for length in (100, 1000, 3000):
        assert cpu["ours-cpu", length, "bf16-autocast"] == cpu["ours-cpu", length, "fp32"]
    for name in ("ours-cpu", "stock-eager"):  # the kink
        assert cpu[name, 1000, "fp32"]["dwx"] < 1e-6 < 1e-4 < cpu[name, 3000, "fp32"]["dwx"]


def test_limits_are_those_of_the_formats():
    assert "|h| reaches 65520" in PAGE and "ends at 65504" in PAGE
    assert torch.tensor(65520.0).half().isinf() and torch.finfo(torch.half).max == 65504
    step = torch.tensor([1], dtype=torch.int16).view(torch.half).item() / 2048
    assert f"multiples of {step:.0e}" in PAGE
