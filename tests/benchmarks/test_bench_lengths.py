"""benchmarks/bench_lengths.py on sizes that only show that everything runs."""

import dataclasses
import json

import pytest
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_lengths():
    """The script as a module."""
    with benchmark("bench_lengths") as module:
        yield module


def run(bench_lengths, folder, *arguments):
    options = ["--tiny", "--commit", "abc", "--output", str(folder), "--rounds", "1", *arguments]
    assert bench_lengths.main(options) == 0
    (path,) = folder.glob("*-lengths-tiny.json")
    return path, json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_a_run_tells_the_padding(bench_lengths, tmp_path):
    path, rows = run(bench_lengths, tmp_path, "--cases", "random-8-cpu", "--passes", "training")
    assert [row["contender"] for row in rows] == list(bench_lengths.CONTENDERS)
    case = dataclasses.replace(bench_lengths.CASES["random-8-cpu"], **bench_lengths.TINY)
    steps = bench_lengths.draw_steps(case)
    padding = 1 - steps.double().mean().item() / steps.max().item()
    assert {row["status"] for row in rows} == {"measured"}
    assert all(abs(row["padding"] - padding) < 1e-9 for row in rows)
    assert f"| {100 * padding:.0f} % " in path.with_suffix(".md").read_text(encoding="utf-8")


def test_sorted_batches_have_less_padding(bench_lengths):
    for name, case in bench_lengths.CASES.items():
        steps = bench_lengths.draw_steps(case)
        padding = 1 - steps.double().mean() / steps.max()
        assert (padding < 0.1) == name.startswith("sorted"), name


@pytest.mark.gpu
def test_every_case_runs_on_a_gpu(bench_lengths, tmp_path):
    _, rows = run(bench_lengths, tmp_path)
    assert [row for row in rows if row["status"] != "measured"] == []
    assert {row["case"] for row in rows} == {
        name for name, case in bench_lengths.CASES.items() if case.device == "cuda"
    }
