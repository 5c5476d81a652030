"""benchmarks/bench_distributed.py in two processes on the CPU."""

import json
import subprocess
import sys

from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "bench_distributed.py"


def test_two_processes_keep_their_weights_equal(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--tiny", "--rounds=1", "--precisions", "fp32", "--commit=abc"]
    command = [*launch, str(SCRIPT), *options, f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "weights equal" in done.stdout
    (path,) = tmp_path.glob("*-distributed-tiny.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    (row,) = report["rows"]
    assert (report["processes"], report["commit"]) == (2, "abc") and row["weights_equal"]
    assert [len(times) for times in row["times_ms"].values()] == [10, 10]
    assert row["ratio"] == row["median_ms"]["several"] / row["median_ms"]["one"] > 0


def test_without_torchrun_it_says_how(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "not started by torchrun: torchrun --standalone" in done.stdout
