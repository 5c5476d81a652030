"""benchmarks/bench_search.py on sizes that only show that everything runs."""

import json

import pytest
import torch
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_search():
    """The script as a module."""
    with benchmark("bench_search") as module:
        yield module


def test_a_run_writes_milliseconds_a_token(bench_search, tmp_path):
    options = ["--tiny", "--commit", "abc", "--output", str(tmp_path), "--rounds", "1"]
    assert bench_search.main([*options, "--cases", "greedy", "beam-8"]) == 0
    (path,) = tmp_path.glob("*-search-tiny.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["contender"], row["pass"]) for row in rows] == [
        (case, contender, "forward")
        for case in ("greedy", "beam-8")
        for contender in ("ours", "stock-eager")
    ]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "over the number of tokens" in text
    for row in rows:
        assert row["status"] == "measured"
        assert bench_search.bench_rounds.number(row["least_ms"] / row["tokens"]) in text


@pytest.mark.parametrize("beam", [0, 3])
def test_both_contenders_find_the_same(bench_search, beam):
    sizes = bench_search.TINY | {"beam": beam}
    case = bench_search.dataclasses.replace(bench_search.BEAM_8, **sizes)
    found = []
    for name in bench_search.CONTENDERS:
        contender = bench_search.Contender(name, case, bench_search.bench_rounds.PRECISIONS["fp32"])
        found.append(contender.forward())
    (ours, _, scores, _), (stock, _, expected, _) = found
    assert ours == stock
    # SpeechBrain's beam search takes the last token for eos.
    assert {len(tokens) for tokens in ours} == {case.tokens - (beam > 0)}
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
