"""benchmarks/bench_decoder.py on sizes that only show that everything runs."""

import json

import pytest
import torch
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_decoder():
    """The script as a module."""
    with benchmark("bench_decoder") as module:
        yield module


def run(bench_decoder, folder, *arguments):
    options = ["--tiny", "--commit", "abc", "--output", str(folder), *arguments]
    assert bench_decoder.main(options) == 0
    (path,) = folder.glob("*-decoder-tiny.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_every_row_with_its_raw_times(bench_decoder, tmp_path):
    results = run(bench_decoder, tmp_path, "--cases", "mini", "--rounds", "3")
    (this_run,) = results["runs"]
    assert this_run["command"] == "bench_decoder.py --cases mini --rounds 3 --tiny"
    measured = {(row["contender"], row["pass"]) for row in results["rows"]}
    assert measured == {(c, p) for c in ("ours", "stock-eager") for p in ("forward", "training")}
    for row in results["rows"]:
        assert row["status"] == "measured" and len(row["times_ms"]) >= 6
        assert 0 < row["least_ms"] == min(row["times_ms"]) <= row["median_ms"]
        assert row["backend"] == ("cpu (the fastest)" if row["contender"] == "ours" else None)
    (table,) = tmp_path.glob("*.md")
    text = table.read_text(encoding="utf-8")
    for row in results["rows"]:
        assert bench_decoder.bench_rounds.number(row["least_ms"]) in text

    # A second run replaces its rows and keeps the others.
    arguments = ("--cases", "mini", "--passes", "forward", "--contenders", "ours")
    again = run(bench_decoder, tmp_path, *arguments)
    assert len(again["runs"]) == 2 and len(again["rows"]) == 4
    (new,) = [row for row in again["rows"] if row["run"] == 1]
    assert (new["contender"], new["pass"]) == ("ours", "forward")


def test_both_contenders_compute_the_same(bench_decoder, monkeypatch):
    monkeypatch.setattr(bench_decoder, "DROPOUT", 0.0)
    case = bench_decoder.dataclasses.replace(bench_decoder.MINI, **bench_decoder.TINY)
    ours, stock = (
        bench_decoder.Contender(name, case, bench_decoder.bench_rounds.PRECISIONS["fp32"])
        for name in ("ours", "stock-eager")
    )
    for actual, expected in zip(ours.training(), stock.training(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_contender_that_fails_is_a_row_and_ours_an_exit_status(
    bench_decoder, tmp_path, monkeypatch
):
    def failing(*_):
        raise RuntimeError("says this test\nat length")

    monkeypatch.setattr(bench_decoder.Contender, "forward", failing)
    for contender, status in {"stock-eager": 0, "ours": 1}.items():
        folder = tmp_path / contender
        arguments = ["--tiny", "--cases", "mini", "--contenders", contender]
        assert bench_decoder.main([*arguments, "--output", str(folder)]) == status
        (path,) = folder.glob("*.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert [row["reason"] for row in rows] == ["RuntimeError: says this test"] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds: got 0, expected at least 1"),
        pytest.param(
            ["--cases", "default"],
            "--cases: default needs an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments_are_named(bench_decoder, tmp_path, capsys, arguments, message):
    assert bench_decoder.main([*arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_every_contender_runs_on_a_gpu(bench_decoder, tmp_path):
    results = run(bench_decoder, tmp_path, "--cases", "default", "--rounds", "1")
    assert [row for row in results["rows"] if row["status"] != "measured"] == []
    assert {row["contender"] for row in results["rows"]} == {"ours", "stock-eager", "stock-graph"}
