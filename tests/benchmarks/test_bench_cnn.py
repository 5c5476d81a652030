"""benchmarks/bench_cnn.py on sizes that only show that everything runs."""

import json

import pytest
import torch
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_cnn():
    """The script as a module."""
    with benchmark("bench_cnn") as module:
        yield module


def run(bench_cnn, folder, *arguments):
    options = ["--tiny", "--commit", "abc", "--output", str(folder), *arguments]
    assert bench_cnn.main(options) == 0
    (path,) = folder.glob("*-cnn-tiny.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_every_row_with_its_raw_times(bench_cnn, tmp_path):
    results = run(bench_cnn, tmp_path, "--cases", "mini", "--rounds", "3")
    (this_run,) = results["runs"]
    assert this_run["command"] == "bench_cnn.py --cases mini --rounds 3 --tiny"
    measured = {(row["contender"], row["pass"]) for row in results["rows"]}
    assert measured == {(c, p) for c in ("ours", "stock-eager") for p in ("forward", "training")}
    for row in results["rows"]:
        assert row["status"] == "measured" and len(row["times_ms"]) >= 6
        assert 0 < row["least_ms"] == min(row["times_ms"]) <= row["median_ms"]
        assert row["backend"] == ("cpu (the fastest)" if row["contender"] == "ours" else None)
    (table,) = tmp_path.glob("*.md")
    text = table.read_text(encoding="utf-8")
    for row in results["rows"]:
        assert bench_cnn.bench_rounds.number(row["least_ms"]) in text


def test_both_contenders_compute_the_same(bench_cnn, monkeypatch):
    monkeypatch.setattr(bench_cnn, "DROPOUT", 0.0)
    case = bench_cnn.dataclasses.replace(bench_cnn.MINI, **bench_cnn.TINY)
    ours, stock = (
        bench_cnn.Contender(name, case, bench_cnn.bench_rounds.PRECISIONS["fp32"])
        for name in ("ours", "stock-eager")
    )
    for actual, expected in zip(ours.training(), stock.training(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_every_contender_runs_on_a_gpu(bench_cnn, tmp_path):
    results = run(bench_cnn, tmp_path, "--cases", "default", "--rounds", "1")
    assert [row for row in results["rows"] if row["status"] != "measured"] == []
    assert {row["contender"] for row in results["rows"]} == set(bench_cnn.CONTENDERS)
