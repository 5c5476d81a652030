"""docs/questions.md: its threads have their names, its claims of speed are the results'."""

import re

import pytest
from helpers import ROOT, load

RESULTS = ROOT / "benchmarks/results"
PAGE = (ROOT / "docs/questions.md").read_text(encoding="utf-8")

bench_report = load(ROOT / "benchmarks/bench_report.py")


def times(name, case, which):
    """Milliseconds by length, of (contender, precision)."""
    found = {}
    for row in bench_report.read_results(RESULTS / f"{name}.json")["rows"]:
        if (row["case"], row["pass"], row["status"]) == (case, which, "measured"):
            if row["cell"] != "ligru":
                key = row["contender"], row["precision"]
                found.setdefault(row["time"], {})[key] = row["median_ms"]
    return found


def test_threads_have_their_names():
    before = None
    threads = re.findall(r"\[([\w-]*)#(\d+)\]\((https:[^)]+)\)", PAGE)
    assert threads
    for name, number, address in threads:
        before = name or before
        assert re.fullmatch(
            rf"https://github.com/[\w-]+/{before}/(issues|pull)/{number}", address
        ), address


@pytest.mark.parametrize("which", ["forward", "training"])
def test_ours_and_cudnns(which):
    lengths = times("nvidia-h200", "A", which)
    for length, found in lengths.items():
        cudnn = {key: ms for key, ms in found.items() if key[0].startswith("cudnn")}
        ours = [ms for (name, _), ms in found.items() if name == "ours-persistent"]
        if length >= 500:
            assert max(ours) < min(cudnn.values())
        else:
            fastest = min(cudnn, key=cudnn.get)
            assert fastest == ("cudnn-lstm-static", "fp16") and cudnn[fastest] < min(ours)
            assert found["ours-persistent-graph", "bf16"] < cudnn[fastest]


def test_without_clusters():
    ratios = []
    for case in ("A", "B"):
        for found in times("nvidia-h200-without-clusters", case, "training").values():
            for precision in ("bf16", "fp16", "fp32"):
                ratios.append(found["ours-l2", precision] / found["ours-persistent", precision])
    said = f"[{min(ratios):.1f} to {max(ratios):.1f} times as long]"
    assert said in " ".join(PAGE.split())
