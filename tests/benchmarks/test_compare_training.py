"""benchmarks/compare_training.py on a corpus of a few utterances."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, alive, wait_until

import train_ctc
from sligru_recipes.corpora.embedded import make_corpus

FOLDER = ROOT / "benchmarks"
SPLITS = {"train-clean-100": (2, 8), "dev-clean": (1, 2), "test-clean": (1, 2)}
VARIANTS = ("ours", "reference", "stock")
PATIENCE = 300  # seconds, for a busy machine


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Let the scripts be imported."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def compare_training():
    return importlib.import_module("compare_training")


@pytest.fixture
def training_report():
    return importlib.import_module("training_report")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, SPLITS)
    return folder


def start(corpus, output, *arguments):
    """The command, on the CPU; two seeds of an epoch."""
    command = [sys.executable, FOLDER / "compare_training.py", output, f"--data_folder={corpus}"]
    command += ["--seeds=2", "--epochs=1", "--at_once=2", "--commit=abc", *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment["TMPDIR"] = str(output)  # a killed process leaves its files there
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def children(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """The output of a study that was killed after its first run and continued."""
    output = tmp_path_factory.mktemp("study")
    results = output / "results.jsonl"
    process = start(corpus, output)
    wait_until(lambda: process.poll() is not None or results.is_file(), PATIENCE)
    workers = children(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(workers) >= 2
    wait_until(lambda: not any(map(alive, workers)), PATIENCE)
    before = results.read_text()
    with open(results, "a") as file:
        file.write('{"variant": "our')
    process = start(corpus, output)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert results.read_text().startswith(before) and len(before.splitlines()) < 6
    return output, printed


@pytest.fixture
def results(finished):
    return [json.loads(line) for line in (finished[0] / "results.jsonl").open()]


@pytest.mark.slow
def test_killed_study_is_continued_with_each_run_once(results):
    runs = [(run["variant"], run["seed"], run["tf32"]) for run in results]
    assert sorted(runs) == [(v, seed, False) for v in VARIANTS for seed in (2602, 3602)]


@pytest.mark.slow
def test_runs_of_a_seed_begin_with_the_same_weights_and_hear_the_same(results):
    for key in ("initial_weights", "utterances"):
        by_seed = {seed: {r[key] for r in results if r["seed"] == seed} for seed in (2602, 3602)}
        assert [len(values) for values in by_seed.values()] == [1, 1]
    assert len({run["initial_weights"] for run in results}) == 2
    # The same computation but for the dropout mask and rounding.
    losses = {r["variant"]: r["epochs"][0]["train loss"] for r in results if r["seed"] == 2602}
    assert losses["ours"] == pytest.approx(losses["stock"], rel=0.1)
    assert len(set(losses.values())) > 1
    assert {(r["variant"], r["backend"]) for r in results} == {
        ("ours", "cpu"),
        ("reference", "reference"),
        ("stock", None),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "environment_described_once")
def test_a_run_is_that_of_the_recipe(results, corpus, tmp_path):
    (run,) = [r for r in results if (r["variant"], r["seed"]) == ("stock", 3602)]
    test = train_ctc.main(
        [
            str(ROOT / "hparams/librispeech_ctc.yaml"),
            f"--overrides={ROOT / 'hparams/librispeech_ctc_mini.yaml'}",
            f"--data_folder={corpus}",
            f"--output_folder={tmp_path}",
            "--rnn_class=!name:speechbrain.nnet.RNN.SLiGRU",
            "--number_of_epochs=1",
            "--export_inference=False",
            "--device=cpu",
            "--seed=3602",
        ]
    )
    assert run["unknown_speakers"] == test["test-clean"]


@pytest.mark.slow
def test_report_has_all_metrics_of_all_pairs(finished):
    output, printed = finished
    report = json.loads((output / "report.json").read_text())
    assert report["number_of_runs"] == 6 and report["commit"] == ["abc"]
    assert [row["metric"] for row in report["summary"]] == [
        "training loss, epoch 1",
        "dev loss, epoch 1",
        "dev WER, %, epoch 1",
        "test loss, known speakers",
        "test WER, %, known speakers",
        "test loss, unknown speakers",
        "test WER, %, unknown speakers",
    ]
    for row in report["summary"]:
        assert {name: value["n"] for name, value in row["variants"].items()} == dict.fromkeys(
            VARIANTS, 2
        )
        assert list(row["differences"]) == ["ours - stock", "reference - stock"]
    text = (output / "report.md").read_text()
    assert text in printed and "test loss, known speakers" in text


@pytest.mark.slow
def test_results_of_other_settings_are_refused(finished, corpus, compare_training, capsys):
    arguments = [str(finished[0]), f"--data_folder={corpus}", "--epochs=2", "--time_limit=0"]
    assert compare_training.main(arguments) == 2
    assert "number_of_epochs 1, asked for: 2" in capsys.readouterr().err


def test_time_limit_keeps_what_is_finished(compare_training, monkeypatch):
    monkeypatch.setattr(compare_training, "train_run", time.sleep)
    monkeypatch.setattr(compare_training, "start_worker", print)
    begin, kept = time.monotonic(), []
    failures = compare_training.train_all(
        [(0,), (PATIENCE,), (PATIENCE,)], None, ["cpu", "cpu"], begin + 5, kept.append
    )
    assert (failures, kept) == ([], [None])
    assert time.monotonic() - begin < PATIENCE / 2


def test_a_run_that_fails_is_reported_and_the_others_go_on(compare_training, monkeypatch):
    monkeypatch.setattr(compare_training, "train_run", math.sqrt)
    monkeypatch.setattr(compare_training, "start_worker", print)
    kept = []
    failures = compare_training.train_all(
        [(-1,), (4,)], None, ["cpu"], deadline=None, keep=kept.append
    )
    assert kept == [2]
    ((job, error),) = failures
    assert job == (-1,) and isinstance(error, ValueError)


@pytest.mark.usefixtures("one_thread")
def test_a_run_has_all_its_epochs_if_the_first_is_tested(
    compare_training, corpus, tmp_path, monkeypatch
):
    """The test loads that epoch's checkpoint, which knows of no later ones."""
    wer = iter([10.0, 20.0])  # of two epochs
    studied = compare_training.StudiedCTC
    monkeypatch.setattr(studied, "collect_stats", lambda *_: {"WER": next(wer, 0.0)})
    study = compare_training.prepare(corpus, tmp_path, {"number_of_epochs": 2, "cpu": "a CPU"})
    hparams, _ = compare_training.load_recipe(study, "cpu", tmp_path)
    tokenizer = compare_training.load_tokenizer(hparams)
    data = compare_training.dataio_prepare(hparams, tokenizer, studied.targets)
    worker = compare_training.Worker(study, "cpu", tokenizer, *data)
    monkeypatch.setattr(compare_training, "_worker", worker)
    run = compare_training.train_run("ours", 2602, False)
    assert run["tested_epoch"] == 1
    assert [epoch["valid WER"] for epoch in run["epochs"]] == [10.0, 20.0]


def made_up(variant, seed, loss, tf32=False, weights="w"):
    return {
        "variant": variant,
        "seed": seed,
        "tf32": tf32,
        "number_of_epochs": 5,
        "initial_weights": weights,
        "utterances": "u",
        "epochs": [{"train loss": loss + e, "valid loss": loss, "valid WER": 50} for e in range(5)],
        "known_speakers": {"loss": loss, "WER": 10},
        "unknown_speakers": {"loss": loss, "WER": 20},
    }


def test_statistics_are_of_pairs(training_report):
    runs = [made_up("ours", seed, 10 * seed + seed) for seed in (1, 2, 3)]
    runs += [made_up("stock", seed, 10 * seed) for seed in (3, 2, 1, 4)]
    runs += [made_up("stock", 1, 10, tf32=True)]
    rows = {(r["tf32"], r["metric"]): r for r in training_report.summarise(runs)}
    row = rows[False, "training loss, epoch 4"]
    assert row["variants"]["stock"] == {
        "n": 4,
        "mean": pytest.approx(28),
        "standard_deviation": pytest.approx(math.sqrt(500 / 3)),
        "standard_error": pytest.approx(math.sqrt(500 / 12)),
    }
    assert row["differences"]["ours - stock"] == {
        "n": 3,
        "mean": pytest.approx(2),
        "standard_deviation": pytest.approx(1),
        "standard_error": pytest.approx(3**-0.5),
        "t": pytest.approx(12**0.5),
        "p": pytest.approx(1 - (12 / 14) ** 0.5),  # with two degrees of freedom
    }
    assert rows[False, "test WER, %, known speakers"]["differences"]["ours - stock"]["p"] is None
    assert rows[True, "dev loss, epoch 5"]["differences"] == {}
    assert (False, "training loss, epoch 2") in rows and (False, "training loss, epoch 5") in rows


def test_pairs_that_are_none_are_refused(training_report):
    runs = [made_up("ours", 1, 1.0), made_up("stock", 1, 1.0, weights="others")]
    with pytest.raises(ValueError, match="seed 1: stock and ours had other initial weights"):
        training_report.check_pairs(runs)


def test_bad_arguments_end_in_one_line(compare_training, tmp_path, capsys, monkeypatch):
    assert compare_training.main([str(tmp_path / "out"), f"--data_folder={tmp_path}"]) == 2
    assert "--data_folder" in capsys.readouterr().err
    (tmp_path / "settings.json").write_text("{")
    assert compare_training.main([str(tmp_path / "out"), f"--data_folder={tmp_path}"]) == 2
    assert f"{tmp_path}/settings.json is damaged" in capsys.readouterr().err
    monkeypatch.setattr(compare_training.torch.cuda, "device_count", lambda: 0)
    for argument in ("--seeds=0", "--gpus=1", "--tf32=on"):
        with pytest.raises(SystemExit):
            compare_training.parse([str(tmp_path), f"--data_folder={tmp_path}", argument])
        assert argument[:6] in capsys.readouterr().err.splitlines()[-1]
