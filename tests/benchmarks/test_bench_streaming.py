"""benchmarks/bench_streaming.py on sizes that only show that everything runs."""

import dataclasses
import json

import pytest
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_streaming():
    """The script as a module."""
    with benchmark("bench_streaming") as module:
        yield module


def run(bench_streaming, folder, *arguments):
    options = ["--tiny", "--commit", "abc", "--output", str(folder), "--rounds", "1", *arguments]
    assert bench_streaming.main(options) == 0
    (path,) = folder.glob("*-streaming-tiny.json")
    return path, json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_a_run_writes_shares_of_a_chunk(bench_streaming, tmp_path):
    path, rows = run(bench_streaming, tmp_path, "--cases", "rnn-x16", "encoder")
    assert [(row["case"], row["contender"]) for row in rows] == [
        (case, contender) for case in ("rnn-x16", "encoder") for contender in ("ours", "stock")
    ]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    for row in rows:
        assert row["status"] == "measured" and row["chunk_ms"] == 40
        assert f"| {row['least_ms'] / 0.4:.1f} % " in text
        assert row.get("lookahead_ms") == (32.5 if row["case"] == "encoder" else None)
    assert "| 32.5 " in text


@pytest.mark.parametrize("name", ["rnn", "rnn-x16", "encoder", "encoder-x16"])
def test_both_contenders_hear_the_same(bench_streaming, name):
    case = dataclasses.replace(bench_streaming.CASES[name], **bench_streaming.TINY)
    fp32 = bench_streaming.bench_rounds.PRECISIONS["fp32"]
    ours, stock = (
        bench_streaming.Contender(each, case, fp32) for each in bench_streaming.CONTENDERS
    )
    if case.part == "RNN":
        stock.rnn.load_state_dict(ours.rnn.state_dict())
        stock.hx, stock.chunks = ours.hx, ours.chunks
        bench_streaming.torch.testing.assert_close(ours.forward(), stock.forward())
    else:
        stock.stream.load_state_dict(ours.stream.state_dict())
        for each in (ours, stock):
            each.context = each.stream.make_streaming_context()
        tokens = [[each.forward() for _ in range(20)] for each in (ours, stock)]
        assert tokens[0] == tokens[1]
        assert {len(states) for states in tokens[0][-1]} == {1}  # a state a chunk
        assert len(tokens[0][-1]) == case.streams


@pytest.mark.gpu
def test_every_case_runs_on_a_gpu(bench_streaming, tmp_path):
    _, rows = run(bench_streaming, tmp_path)
    assert [row for row in rows if row["status"] != "measured"] == []
    assert {row["case"] for row in rows} == {"encoder-gpu", "encoder-x16-gpu"}
