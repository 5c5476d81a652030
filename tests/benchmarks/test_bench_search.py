"""benchmarks/bench_search.py on sizes that only show that everything runs."""

import json
from types import SimpleNamespace

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
    assert bench_search.main([*options, "--cases", "greedy", "beam-8-lm"]) == 0
    (path,) = tmp_path.glob("*-search-tiny.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["contender"], row["pass"]) for row in rows] == [
        (case, contender, "forward")
        for case in ("greedy", "beam-8-lm")
        for contender in ("ours", "stock-eager")
    ]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "over the number of tokens" in text
    for row in rows:
        assert row["status"] == "measured"
        assert bench_search.bench_rounds.number(row["least_ms"] / row["tokens"]) in text


@pytest.mark.parametrize(("name", "beam"), [("greedy", 0), ("beam-8", 3), ("beam-8-lm", 3)])
def test_both_contenders_find_the_same(bench_search, name, beam):
    sizes = bench_search.TINY | {"beam": beam}
    case = bench_search.dataclasses.replace(bench_search.CASES[name], **sizes)
    found = []
    fp32 = bench_search.bench_rounds.PRECISIONS["fp32"]
    for contender_name in bench_search.CONTENDERS:
        contender = bench_search.Contender(contender_name, case, fp32)
        found.append(contender.forward())
        if beam:
            has_lm = "rnnlm" in contender.search.scorer.full_scorers
            assert has_lm == name.endswith("-lm")
    (ours, _, scores, _), (stock, _, expected, _) = found
    assert ours == stock
    # SpeechBrain's beam search takes the last token for eos.
    assert {len(tokens) for tokens in ours} == {case.tokens - (beam > 0)}
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_stopped_run_keeps_the_cases_that_are_done(bench_search, tmp_path, monkeypatch):
    measure = bench_search.bench_rounds.measure

    def stop(make, case, *arguments):
        if case.name == "beam-8":
            raise KeyboardInterrupt
        return measure(make, case, *arguments)

    monkeypatch.setattr(bench_search.bench_rounds, "measure", stop)
    options = ["--tiny", "--commit", "abc", "--output", str(tmp_path), "--rounds", "1"]
    assert bench_search.main([*options, "--cases", "greedy", "beam-8"]) == 130
    (path,) = tmp_path.glob("*-search-tiny.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {row["case"] for row in results["rows"]} == {"greedy"}
    assert results["runs"][0]["interrupted"] == "KeyboardInterrupt"
    assert "greedy" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_no_case_and_no_further_round_begins_after_the_budget(
    bench_search, tmp_path, monkeypatch, capsys
):
    options = ["--tiny", "--commit", "abc", "--output", str(tmp_path), "--rounds", "9"]
    options += ["--cases", "greedy", "beam-8", "--budget=50"]
    rounds, clock = bench_search.bench_rounds, SimpleNamespace(now=0.0)
    measure = rounds.measure

    def slow(*arguments):
        clock.now += 100
        return measure(*arguments)

    passes = {}
    for name in ("slow", "quick"):
        with monkeypatch.context() as patch:
            if name == "slow":
                patch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock.now))
                patch.setattr(rounds, "measure", slow)
            assert bench_search.main(options) == 0
        (path,) = tmp_path.glob("*-search-tiny.json")
        results = json.loads(path.read_text(encoding="utf-8"))
        assert results["runs"][0]["interrupted"] == ("budget" if name == "slow" else None)
        cases = ["greedy"] if name == "slow" else ["greedy", "beam-8"]
        assert list(dict.fromkeys(row["case"] for row in results["rows"])) == cases
        passes[name] = min(len(row["times_ms"]) for row in results["rows"])
    assert "--budget is spent before case beam-8" in capsys.readouterr().err
    assert passes["quick"] >= 9 * rounds.FEWEST_PASSES > passes["slow"]
