"""benchmarks/bench_recogniser.py on sizes that only show that everything runs."""

import dataclasses
import json

import pytest
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_recogniser():
    """The script as a module."""
    with benchmark("bench_recogniser") as module:
        yield module


def make(bench_recogniser, case, name="ours"):
    """A contender in a tiny case, on the CPU."""
    tiny = bench_recogniser.TINY | {"device": "cpu"}
    case = dataclasses.replace(bench_recogniser.CASES[case], **tiny)
    fp32 = bench_recogniser.bench_rounds.PRECISIONS["fp32"]
    return bench_recogniser.Contender(name, case, fp32)


def test_a_run_writes_real_time_factors(bench_recogniser, tmp_path):
    options = ["--tiny", "--commit", "abc", "--output", str(tmp_path), "--rounds", "1"]
    assert bench_recogniser.main([*options, "--cases", "ctc", "beam-8"]) == 0
    (path,) = tmp_path.glob("*-recogniser-tiny.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["contender"]) for row in rows] == [
        (case, contender) for case in ("ctc", "beam-8") for contender in ("ours", "stock-eager")
    ]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "whole split" not in text
    for row in rows:
        assert row["status"] == "measured" and row["audio_seconds"] == row["seconds"] == 1.0
        factor = bench_recogniser.bench_rounds.number(row["least_ms"] / 1000)
        assert f"| {factor} " in text
        assert f"| {bench_recogniser.bench_rounds.number(1000 / row['least_ms'])} " in text


@pytest.mark.parametrize("case", ["ctc-x16-gpu", "greedy", "beam-8", "beam-8-x16-gpu"])
def test_both_contenders_find_the_same(bench_recogniser, case):
    contenders = [make(bench_recogniser, case, name) for name in bench_recogniser.CONTENDERS]
    ours, stock = (each.brain.modules for each in contenders)
    kinds = [type(modules.enc.RNN).__module__.split(".")[0] for modules in (ours, stock)]
    assert kinds == ["sb_fast_sligru", "speechbrain"]
    stock.load_state_dict(ours.state_dict())
    found, expected = (each.forward() for each in contenders)
    assert found == expected
    assert len(found) == contenders[0].case.batch and all(found)


@pytest.mark.parametrize(("split", "beam"), [("dev-clean", 0), ("test-other", 80)])
def test_a_split_is_told_from_a_sample_of_its_batches(bench_recogniser, monkeypatch, split, beam):
    simulated = bench_recogniser.simulated
    lengths = (100, *(1.0 + 0.4 * quantile for quantile in simulated.TEST_QUANTILES))
    monkeypatch.setitem(simulated.SPLITS, split, lengths)
    contender = make(bench_recogniser, f"{split}-gpu")
    size, count = (16, 7) if beam else (24, 5)
    assert [len(batch.id) for batch in contender.batches] == [size] * 2
    longest = [batch.sig.data.shape[1] for batch in contender.batches]
    assert 16000 < longest[0] < longest[1] < 1.4 * 16000  # neither the first nor the last
    seconds = sum(
        wavs.shape[1] * float(lengths.sum()) for wavs, lengths in (b.sig for b in contender.batches)
    )
    assert contender.facts == {
        "audio_seconds": pytest.approx(seconds / 16000),
        "batches": count,
        "sample": 2,
    }
    for _ in range(2):  # a pass leaves the batches as they are
        losses = contender.forward()
        assert len(losses) == 2
        assert len(contender.brain.wer_metric.scores) == 2 * size
    row = {"least_ms": 500.0, "split": split, **contender.facts}
    assert bench_recogniser.whole_split(row) == f"{0.25 * count:.1f} s"


def test_searches_have_their_tokens(bench_recogniser):
    contender = make(bench_recogniser, "greedy")
    contender.search.max_decode_ratio /= 3
    with pytest.raises(RuntimeError, match="tokens, expected 5"):
        contender.forward()
