"""benchmarks/bench_rnn.py on sizes that only show that everything runs."""

import itertools
import json
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from helpers import benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench_rnn():
    """The script as a module."""
    with benchmark("bench_rnn") as module:
        yield module


@pytest.fixture(scope="module")
def output(bench_rnn, tmp_path_factory):
    """Folder of a run of times and errors on the CPU."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--tiny", "--cases", "cpu", "--accuracy", "--commit", "abc", "--output"]
    assert bench_rnn.main([*arguments, str(folder)]) == 0
    return folder


@pytest.fixture
def results(output):
    (path,) = output.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_writes_every_row_with_its_raw_times(results):
    (run,) = results["runs"]
    assert run["commit"] == "abc" and run["interrupted"] is None
    assert run["command"] == "bench_rnn.py --cases cpu --accuracy --tiny"
    assert run["versions"]["torch"] == torch.__version__ and run["machine"]["cpu"]
    measured = {(r["contender"], r["cell"], r["time"], r["pass"]) for r in results["rows"]}
    assert measured == {
        (contender, cell, length, which)
        for contender in ("ours-cpu", "stock-eager")
        for cell in ("sligru", "ligru")
        for length in (2, 4, 8)
        for which in ("forward", "training")
    }
    for row in results["rows"]:
        assert row["status"] == "measured", row
        low, high = row["quartiles_ms"]
        assert 0 < min(row["times_ms"]) <= low <= row["median_ms"] <= high
        assert len(row["times_ms"]) >= 2
        assert row["us_per_step"] == pytest.approx(1e3 * row["median_ms"] / row["time"])
        assert row["tf32"] == {"matmul": False, "cudnn": False}


def test_errors_are_those_of_the_precision(results):
    errors = {
        (row["contender"], row["time"], row["precision"]): row["errors"]
        for row in results["accuracy"]
        if row["status"] == "measured"
    }
    for contender, length in itertools.product(("ours-cpu", "stock-eager"), (2, 4, 8)):
        for precision, bound in {"fp64": 1e-14, "fp32": 1e-5, "bf16": 0.1, "fp16": 0.02}.items():
            for name, error in errors[contender, length, precision].items():
                assert 0 <= error < bound, (contender, length, precision, name)


def test_table_and_plot(bench_rnn, output, results):
    (table,) = output.glob("*.md")
    text = table.read_text(encoding="utf-8")
    for row in results["rows"]:
        assert bench_rnn.bench_report.number(row["median_ms"]) in text
    assert "## Case cpu: B=2, I=6, H=8" in text and text.count("over stock's") == 3
    (picture,) = output.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_second_run_replaces_its_rows_and_keeps_the_others(bench_rnn, output, results, tmp_path):
    (path,) = output.glob("*.json")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    arguments = ["--tiny", "--cases", "cpu", "--contenders", "ours", "--cells", "ligru"]
    arguments += ["--passes", "forward", "--commit", "def", "--output", str(tmp_path)]
    assert bench_rnn.main(arguments) == 0
    second = json.loads(copy.read_text(encoding="utf-8"))
    assert [run["commit"] for run in second["runs"]] == ["abc", "def"]
    assert len(second["rows"]) == len(results["rows"])
    new = [row for row in second["rows"] if row["run"] == 1]
    assert [(row["contender"], row["cell"], row["time"]) for row in new] == [
        ("ours-cpu", "ligru", length) for length in (2, 4, 8)
    ]
    assert second["accuracy"] == results["accuracy"]
    # What a third run has no time for is not lost.
    assert bench_rnn.main([*arguments, "--budget", "0"]) == 0
    assert json.loads(copy.read_text(encoding="utf-8")) == second


def test_rows_beyond_the_budget_or_the_cap_say_so(bench_rnn, tmp_path):
    arguments = ["--tiny", "--cases", "cpu", "--contenders", "ours", "--cells", "sligru"]
    for option, reason in {"--budget": "--budget 1e-09 s is spent", "--cap": "predicted "}.items():
        folder = tmp_path / option.strip("-")
        assert bench_rnn.main([*arguments, option, "1e-9", "--output", str(folder)]) == 0
        (path,) = folder.glob("*.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert len(rows) == 6
        skipped = rows if option == "--budget" else [row for row in rows if row["time"] > 2]
        for row in skipped:
            assert row["status"] == "skipped" and row["reason"].startswith(reason)
    # A later run's reason takes the place of an earlier one's.
    arguments += ["--output", str(folder)]
    assert bench_rnn.main([*arguments, "--budget", "0"]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["reason"] for row in rows if row["time"] > 2] == ["--budget 0 s is spent"] * 4


def test_prediction_follows_the_growth_of_shorter_lengths(bench_rnn):
    contender = next(c for c in bench_rnn.CONTENDERS if c.name == "stock-eager")
    quadratic = [
        {"time": length, "median_ms": 1e-3 * length**2, "setup_seconds": None}
        for length in (500, 1000)
    ]
    one_pass = bench_rnn.predict_seconds(contender, 2000, quadratic) / 3
    assert one_pass == pytest.approx(4.0)
    assert bench_rnn.predict_seconds(contender, 2000, quadratic[1:]) / 3 == pytest.approx(2.0)


def test_an_interruption_keeps_what_is_measured(bench_rnn, tmp_path, monkeypatch):
    original = bench_rnn.measure
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(bench_rnn, "measure", interrupted)
    arguments = ["--tiny", "--cases", "cpu", "--contenders", "ours", "--output", str(tmp_path)]
    assert bench_rnn.main(arguments) == 130
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert len(results["rows"]) == 2 and results["runs"][0]["interrupted"] == "KeyboardInterrupt"


def test_a_contender_that_fails_is_a_row_and_ours_an_exit_status(bench_rnn, tmp_path, monkeypatch):
    def failing(*_):
        raise RuntimeError("says this test\nat length")

    monkeypatch.setattr(bench_rnn, "measure", failing)
    arguments = ["--tiny", "--cases", "cpu", "--cells", "sligru", "--passes", "forward"]
    for contender, status in {"stock-eager": 0, "ours-cpu": 1}.items():
        folder = tmp_path / contender
        command = [*arguments, "--contenders", contender, "--output", str(folder)]
        assert bench_rnn.main(command) == status
        (path,) = folder.glob("*.json")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert [row["reason"] for row in rows] == ["RuntimeError: says this test"] * 3


# ---- a contender in a process of its own


@pytest.fixture
def apart(bench_rnn, monkeypatch):
    """Ours on the CPU, with a variable that this process lacks."""
    contender = bench_rnn.dataclasses.replace(
        next(c for c in bench_rnn.CONTENDERS if c.name == "ours-cpu"),
        name="ours-limited",
        variables={"SB_FAST_SLIGRU_MAX_CLUSTER": "1"},
    )
    monkeypatch.delenv("SB_FAST_SLIGRU_MAX_CLUSTER", raising=False)
    monkeypatch.setattr(bench_rnn, "CONTENDERS", (*bench_rnn.CONTENDERS, contender))


ARGUMENTS = ["--tiny", "--cases", "cpu", "--cells", "sligru", "--passes", "forward", "--accuracy"]


def test_a_process_with_variables_measures_rows_of_the_same_run(
    bench_rnn, apart, tmp_path, monkeypatch
):
    processes = []

    def run_here(command, env, stdout):
        processes.append(command)
        with monkeypatch.context() as changed:
            changed.setattr(os, "environ", env)
            return subprocess.CompletedProcess(command, bench_rnn.main(command[2:]))

    monkeypatch.setattr(bench_rnn, "subprocess", SimpleNamespace(run=run_here, DEVNULL=None))
    command = [*ARGUMENTS, "--commit", "abc", "--output", str(tmp_path)]
    assert bench_rnn.main([*command, "--contenders", "ours-cpu", "ours-limited"]) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    (run,) = results["runs"]
    assert run["command"].endswith(
        "--contenders ours-cpu ours-limited --cells sligru --passes forward --accuracy --tiny"
    )
    assert [(row["contender"], row["time"], row["status"]) for row in results["rows"]] == [
        (name, length, "measured") for name in ("ours-cpu", "ours-limited") for length in (2, 4, 8)
    ]
    measured = {row["contender"] for row in results["accuracy"] if row["status"] == "measured"}
    assert measured == {"ours-cpu", "ours-limited"}
    # Where the variable is set already, the process is this one.
    monkeypatch.setenv("SB_FAST_SLIGRU_MAX_CLUSTER", "1")
    assert bench_rnn.main([*command, "--contenders", "ours-limited"]) == 0
    assert len(processes) == 1


def test_a_process_that_dies_ends_the_run_and_keeps_its_rows(
    bench_rnn, apart, tmp_path, monkeypatch
):
    def dying(command, **_):
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(bench_rnn, "subprocess", SimpleNamespace(run=dying, DEVNULL=None))
    command = [*ARGUMENTS, "--contenders", "ours-cpu", "ours-limited", "--output", str(tmp_path)]
    assert bench_rnn.main([*command, "--commit", "abc"]) == 1
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["runs"][0]["interrupted"] == "ChildProcessError"
    assert {row["contender"] for row in results["rows"]} == {"ours-cpu"}


def test_ours_without_clusters(bench_rnn):
    assert bench_rnn.select_contenders(["ours-l2"]) == {"ours-l2"}
    (contender,) = (c for c in bench_rnn.CONTENDERS if c.name == "ours-l2")
    assert contender.backend == "persistent"
    rows = {"case": "A", "contender": "ours-l2", "bidirectional": False, "status": "skipped"}
    rows |= {"reason": "", "batch": 1, "features": 1, "hidden": 1, "layers": 1, "time": 1}
    rows |= {"run": 0, "cell": "sligru", "precision": "bf16", "pass": "forward"}
    text = bench_rnn.bench_report.markdown({"runs": [], "rows": [rows], "accuracy": []})
    assert "`ours-l2`: ours without clusters" in text


# ---- --check


def worsened(results, tmp_path, change):
    """Paths of a result file and of one changed by `change`."""
    paths = tmp_path / "old.json", tmp_path / "new.json"
    paths[0].write_text(json.dumps(results), encoding="utf-8")
    change(results)
    paths[1].write_text(json.dumps(results), encoding="utf-8")
    return [str(path) for path in paths]


def slower(results):
    results["rows"][3]["median_ms"] *= 1.2


def larger(results):
    for row in results["rows"]:
        row["peak_bytes"] = 100


def less_accurate(results):
    row = next(row for row in results["accuracy"] if row["status"] == "measured")
    row["errors"]["du"] *= 1.2


def broken(results):
    results["rows"][0] = results["rows"][0] | {"status": "failed", "reason": "it broke"}


def not_a_number(results):
    results["rows"][0]["median_ms"] = float("nan")


@pytest.mark.parametrize("change", [slower, less_accurate, broken, not_a_number])
def test_check_flags_a_regression(bench_rnn, results, tmp_path, capsys, change):
    paths = worsened(results, tmp_path, change)
    assert bench_rnn.main(["--check", *paths]) == 1
    assert "1 regression(s)" in capsys.readouterr().out
    assert bench_rnn.main(["--check", paths[0], paths[0]]) == 0
    assert "0 regression(s)" in capsys.readouterr().out


def test_check_sees_memory_and_takes_a_tolerance(bench_rnn, results, tmp_path, capsys):
    for row in results["rows"]:
        row["peak_bytes"] = 50
    paths = worsened(results, tmp_path, larger)
    assert bench_rnn.main(["--check", *paths]) == 1
    assert "peak_bytes" in capsys.readouterr().out
    assert bench_rnn.main(["--check", *paths, "--tolerance", "1.5"]) == 0


# ---- arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "E"], "--cases: got E, expected A, B, C, D, cpu"),
        (["--cases", "cpu-7"], "--cases: got cpu-7, expected cpu or one of cpu-500"),
        (["--tiny", "--cases", "cpu", "--contenders", "stock-jit"], "nothing to measure"),
        (["--contenders", "theirs"], "--contenders: got theirs, expected ours-persistent"),
        (["--check", "missing.json", "missing.json"], "missing.json: not a result file"),
    ],
)
def test_bad_arguments_are_named(bench_rnn, tmp_path, capsys, arguments, message):
    assert bench_rnn.main([*arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_case_needs_a_gpu(bench_rnn, tmp_path, capsys):
    assert bench_rnn.main(["--cases", "A", "--output", str(tmp_path)]) == 2
    assert "--cases: A needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_contender_runs_on_a_gpu(bench_rnn, tmp_path):
    assert bench_rnn.main(["--tiny", "--cases", "A", "B", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert not [row for row in rows if row["status"] == "failed"]
    assert {row["contender"] for row in rows if row["status"] == "measured"} >= {
        "cudnn-gru",
        "cudnn-lstm",
        "cudnn-lstm-static",
        "ours-stepwise",
        "ours-stepwise-graph",
        "stock-eager",
        "stock-graph",
        "stock-jit",
    }


# ---- the front page


def test_front_page_is_renewed_between_its_marks(bench_rnn, tmp_path):
    report = bench_rnn.bench_report
    readme = tmp_path / "README.md"
    readme.write_text(f"before {report.BEGIN}old{report.END} after", encoding="utf-8")
    report.renew_readme(readme)
    block = report.readme_block(*report.read_front_page_results())
    assert readme.read_text(encoding="utf-8") == f"before {block} after"
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="expected one"):
        report.renew_readme(readme)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (14.27, "14.3 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3571, "1 h 00 min"),
        (12740, "3 h 32 min"),
    ],
)
def test_durations_for_people(bench_rnn, seconds, shown):
    assert bench_rnn.bench_report.for_people(seconds) == shown
