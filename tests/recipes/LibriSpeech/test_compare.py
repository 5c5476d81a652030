"""The epoch-time comparison: tiny runs on the CPU, their reports, and the cases without a ratio."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import speechbrain.lobes.models.CRDNN
import speechbrain.nnet.RNN
import torch
from helpers import ROOT, alive, wait_until
from tiny_runs import held_by_another

import compare_epoch_time
import sb_fast_sligru
from sb_fast_sligru import machine
from sligru_recipes.corpora import simulated as simulation
from sligru_recipes.corpora.embedded import make_corpus
from sligru_recipes.epoch_time import comparison as compare
from sligru_recipes.epoch_time import report as epoch_report
from sligru_recipes.epoch_time import runs as epoch_runs
from sligru_recipes.epoch_time import texts
from sligru_recipes.epoch_time.checks import (
    Refused,
    check_agreement,
    check_same_batches,
    check_seed_spread,
)
from sligru_recipes.epoch_time.phases import PHASES
from sligru_recipes.epoch_time.recipe import Options, Recipe, load_recipe, spread
from sligru_recipes.epoch_time.runs import Run, Variant
from sligru_recipes.training.ctc import CTC


class WrongSLiGRU(speechbrain.nnet.RNN.SLiGRU):
    """Of SpeechBrain's weights, but of another output (a mere factor is normalised away later)."""

    def forward(self, x, hx=None):
        output, hh = super().forward(x, hx)
        return output.cumsum(1), hh


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, {"train-clean-100": (2, 8), "dev-clean": (1, 2), "test-clean": (1, 2)})
    return folder


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A model of a few units, 3 steps of agreement, no process of its own for the memory."""
    monkeypatch.setattr(compare, "AGREEMENT_STEPS", 3)
    monkeypatch.setattr(epoch_runs, "in_own_process", lambda function, *arguments: None)
    return [
        f"--output_folder={tmp_path / 'report'}",
        "--device=cpu",
        "--rnn_neurons=8",
        "--dnn_neurons=8",
    ]


@pytest.fixture
def arguments(corpus, settings):
    """CTC on the embedded corpus, batches of 2 to 3 utterances."""
    return [
        str(ROOT / "hparams/librispeech_ctc.yaml"),
        f"--overrides={ROOT / 'hparams/librispeech_ctc_mini.yaml'}",
        f"--data_folder={corpus}",
        "--max_batch_length=12",
        *settings,
    ]


@pytest.fixture
def simulated(settings, monkeypatch):
    """Seq2seq on 40 utterances of 1 to 3 s."""
    monkeypatch.setitem(simulation.SPLITS, "dev-clean", (40, 1.0, *[2.0] * 13, 3.0))
    return [
        str(ROOT / "hparams/librispeech_seq2seq.yaml"),
        f"--overrides={ROOT / 'hparams/librispeech_seq2seq_mini.yaml'}",
        "--dec_neurons=8",
        "--attn_dim=8",
        "--max_batch_length=6",
        "--simulate=dev-clean",
        *settings,
    ]


def run_main(arguments, *own):
    with pytest.raises(SystemExit) as end:
        compare_epoch_time.main([*arguments, *own])
    return end.value.code


def read_report(tmp_path):
    return json.loads((tmp_path / "report/report.json").read_text())


def documented_keys(indent):
    found = re.findall(rf"^ {{{indent}}}(\w+(?:, \w+)*)  ", epoch_report.__doc__, re.M)
    return [name for names in found for name in names.split(", ")]


def a_run(batches, cell="SLi-GRU", implementation=compare.RNN_ONLY):
    return Run(Variant(cell, "fp32", implementation, {}, 0), batches=list(batches))


@pytest.mark.slow
def test_report(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the real process for the memory
    monkeypatch.setattr(compare, "AGREEMENT_STEPS", 3)
    compare_epoch_time.main([*arguments, "--batches=2", "--passes=2", "--cells", "SLi-GRU"])
    report = read_report(tmp_path)
    assert list(report) == documented_keys(4)
    assert report["refused"] is None and not report["interrupted"]
    assert report["checks"]["same_batches"]
    agreement = report["checks"]["agreement"]["SLi-GRU"]
    assert agreement["largest_relative_difference"] <= agreement["bound"] == 1e-3
    assert 0 < agreement["stock_moved_difference"] < 1e-3
    assert {name: len(losses) for name, losses in agreement["losses"].items()} == {
        "ours": 3,
        "stock": 3,
        "stock_moved": 3,
    }
    data = report["data"]
    assert (data["batches"], data["passes"]) == (2, 2)
    assert 0 < data["audio_seconds"] <= data["padded_seconds"]
    assert data["audio_seconds"] < data["audio_seconds_in_epoch"]
    assert data["batches_in_epoch"] >= 4
    assert report["machine"]["device"] == "cpu" and report["machine"]["gpu"] is None
    assert report["settings"]["recipe"] == "CTC"

    stock, rnn_only, ours, other = report["variants"]
    assert [v["implementation"] for v in report["variants"]] == [
        "stock",
        "ours: RNN only",
        "ours: all",
        "stock, other seed",
    ]
    theirs = {
        "rnn_class": "speechbrain.nnet.RNN.SLiGRU",
        "crdnn_class": "speechbrain.lobes.models.CRDNN.CRDNN",
        "ctc_cost": "speechbrain.nnet.losses.ctc_loss",
    }
    assert stock["classes"] == other["classes"] == theirs
    assert rnn_only["classes"] == theirs | {"rnn_class": "sb_fast_sligru.SLiGRU"}
    assert ours["classes"] == rnn_only["classes"] | {
        "crdnn_class": "sb_fast_sligru.CRDNN",
        "ctc_cost": "sb_fast_sligru.ctc_loss",
    }
    assert stock["backends"] == other["backends"] == {}
    assert rnn_only["backends"] == {"RNN": "cpu"}
    assert ours["backends"] == {"RNN": "cpu", "enc": "cpu"}
    assert ours["seed"] == stock["seed"] != other["seed"]
    documentation = " ".join(epoch_report.__doc__.split())
    for variant in report["variants"]:
        assert all(re.search(rf"[:,] {name}[ ,]", documentation) for name in variant)
        assert variant["precision"] == "fp32"
        assert len(variant["losses"]) == len(variant["step_seconds"]) == 4
        assert len(variant["warm_up_seconds"]) == epoch_runs.WARM_UP_STEPS
        assert variant["interval"][0] <= variant["epoch_seconds"] <= variant["interval"][1]
        assert variant["loader_utilisation"] > 0 and 0 < variant["loader_wait"] < 1
    assert 2 < data["shapes_in_epoch"] <= data["batches_in_epoch"]
    assert other["new_shape_seconds"] is None
    for variant in (ours, rnn_only, stock):
        assert variant["new_shape_seconds"] >= 0
        phases = variant["breakdown_ms"]
        assert list(phases) == [name for name in PHASES if not name.startswith("decoder")]
        assert min(phases.values()) > 0
        peak = variant["peak_memory_bytes"]
        assert peak is None or peak > 2**16
    ratios = {
        variant["implementation"]: stock["epoch_seconds"] / variant["epoch_seconds"]
        for variant in (rnn_only, ours)
    }
    assert report["ratios"] == {"SLi-GRU fp32": ratios}
    assert ours["losses"] != stock["losses"] != other["losses"]  # dropout is on

    markdown = (tmp_path / "report/report.md").read_text()
    assert f"The estimates have that {data['shapes_in_epoch']} times" in markdown
    sentence = texts.headline(report)
    for name, ratio in ratios.items():
        assert f"({name.removeprefix('ours: ')}, {ratio:.1f}x)" in sentence
    assert len(re.findall(r"^\| SLi-GRU", markdown, re.M)) == 3
    assert sentence in markdown and sentence in capsys.readouterr().out
    picture = (tmp_path / "report/report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    page = (tmp_path / "report/report.html").read_text()
    assert "data:image/png;base64," in page and page.count("<table") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file


def test_simulated_seq2seq_in_two_precisions(simulated, tmp_path):
    simulated += ["--batches=2", "--cells", "GRU", "--precision", "fp32", "bf16"]
    compare_epoch_time.main(simulated)
    report = read_report(tmp_path)
    assert report["settings"]["recipe"] == "Seq2Seq"
    assert report["data"]["source"] == "dev-clean, simulated"
    assert "FLAC files" in report["data"]["io"] and "page cache" in report["data"]["io"]
    full, half = report["variants"]
    assert (full["precision"], half["precision"]) == ("fp32", "bf16")
    assert full["batches_sha256"] == half["batches_sha256"]
    assert full["losses"] != half["losses"]
    assert full["losses"] == pytest.approx(half["losses"], rel=0.02)
    assert list(full["breakdown_ms"]) == list(PHASES)  # with the decoder's
    assert report["ratios"] == {} and report["checks"]["agreement"] == {}  # of no ours


def test_ctrl_c_leaves_a_report_that_resume_completes(simulated, tmp_path, monkeypatch, capsys):
    simulated += ["--batches=2", "--no-io"]
    timed, time_variants = [], epoch_runs.time_variants

    def stop_at_the_second(recipe, options, variants, *rest):
        timed.append(variants[0].cell)
        if timed == ["GRU", "LSTM"]:
            raise KeyboardInterrupt
        return time_variants(recipe, options, variants, *rest)

    monkeypatch.setattr(epoch_runs, "time_variants", stop_at_the_second)
    monkeypatch.setattr(machine, "commit_of", lambda folder: "the same")
    assert run_main(simulated, "--cells", "GRU", "LSTM") == 130
    report = read_report(tmp_path)
    assert report["interrupted"] and [v["cell"] for v in report["variants"]] == ["GRU"]
    assert "--resume goes on" in capsys.readouterr().out
    assert "--resume goes on" in (tmp_path / "report/report.md").read_text()

    code = run_main(simulated, "--cells", "GRU", "LSTM", "--resume", "--passes=2")
    assert "has other settings" in code
    compare_epoch_time.main([*simulated, "--cells", "GRU", "LSTM", "--resume"])
    assert timed == ["GRU", "LSTM", "LSTM"]
    resumed = read_report(tmp_path)
    assert not resumed["interrupted"]
    assert [v["cell"] for v in resumed["variants"]] == ["GRU", "LSTM"]
    assert resumed["variants"][0] == report["variants"][0]


def test_earlier_report_stays_until_there_is_another(simulated, tmp_path, monkeypatch):
    simulated += ["--batches=2", "--no-io", "--cells", "GRU"]
    compare_epoch_time.main(simulated)
    names = ("report.json", "report.md", "report.html", "report.png")
    before = [(tmp_path / "report" / name).read_bytes() for name in names]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(epoch_runs, "loading_seconds", stop)
        assert "no report was written" in run_main(simulated)
    assert [(tmp_path / "report" / name).read_bytes() for name in names] == before
    with held_by_another(tmp_path / "report"):
        assert "is in use by another run (host " in run_main(simulated)
    assert [(tmp_path / "report" / name).read_bytes() for name in names] == before

    def refuse(*arguments):
        raise Refused("for a reason")

    monkeypatch.setattr(epoch_runs, "time_variants", refuse)
    assert run_main(simulated) == 1
    assert read_report(tmp_path)["refused"] == "for a reason"
    assert not (tmp_path / "report/report.png").exists()  # of the earlier report


@pytest.mark.parametrize("content", ["[]", "3", '{"variants": []}', "", "nothing"])
def test_what_is_no_report_is_not_gone_on_with(simulated, tmp_path, content):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").write_text(content)
    message = run_main(simulated, "--batches=2", "--no-io", "--cells", "GRU", "--resume")
    assert f"{tmp_path}/report/report.json is no report to go on with" in message
    assert (tmp_path / "report/report.json").read_text() == content


def test_progress_in_a_file_is_lines(simulated, capsys):
    simulated += ["--batches=2", "--no-io", "--cells", "GRU"]
    compare_epoch_time.main([*simulated, "--log_interval_minutes=0"])
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = re.findall(r"^GRU fp32: step (\d+) of (\d+)$", printed, re.M)
    total = int(lines[0][1])
    assert [int(done) for done, _ in lines] == list(range(1, total + 1))
    compare_epoch_time.main(simulated)  # ten minutes between two lines
    assert "step" not in capsys.readouterr().err


WORKER = """
import os, pathlib, time
pathlib.Path({note!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import sys
from sligru_recipes.epoch_time.runs import in_own_process
in_own_process(exec, sys.argv[1])
"""


def test_worker_ends_with_its_parent(tmp_path):
    parents = {}
    for sent in (signal.SIGTERM, signal.SIGKILL):
        note = tmp_path / sent.name
        command = [sys.executable, "-c", PARENT, WORKER.format(note=str(note))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        parents[sent, note] = subprocess.Popen(command, env=environment)
    for (sent, note), parent in parents.items():
        wait_until(lambda note=note: note.exists() and note.read_text(), seconds=60)
        worker = int(note.read_text())
        parent.send_signal(sent)
        parent.wait()
        wait_until(lambda worker=worker: not alive(worker), seconds=5)


def test_worker_of_a_parent_already_gone_ends(tmp_path):
    """It asks the system too late to be told."""
    code = (
        "import os, time\n"
        "from unittest import mock\n"
        "from sligru_recipes.processes import end_with_parent\n"
        "gone = mock.Mock(pid=os.getppid() + 1)\n"
        "with mock.patch('multiprocessing.parent_process', return_value=gone):\n"
        "    end_with_parent()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert worker.returncode == -signal.SIGKILL


def test_a_process_of_its_own_trains_the_same(simulated, tmp_path, monkeypatch):
    simulated += ["--batches=2", "--no-io", "--cells", "SLi-GRU"]
    compare_epoch_time.main([*simulated, "--stock-jit"])
    in_turn = read_report(tmp_path)
    seconds = {v["implementation"]: v["epoch_seconds"] for v in in_turn["variants"]}
    fastest = min(seconds["stock"], seconds["stock, jit"])
    ours = ("ours: RNN only", "ours: RNN + decoder", "ours: all")
    assert in_turn["ratios"] == {"SLi-GRU fp32": {name: fastest / seconds[name] for name in ours}}
    assert in_turn["variants"].pop()["breakdown_ms"]["RNN"] > 0  # a scripted module's, too

    def in_this_process(function, *arguments):
        return function(*arguments) if function is epoch_runs.time_alone else None

    monkeypatch.setattr(epoch_runs, "in_own_process", in_this_process)
    compare_epoch_time.main([*simulated, "--isolate"])
    alone = read_report(tmp_path)
    assert len(alone["variants"]) == 5
    for one, other in zip(in_turn["variants"], alone["variants"], strict=True):
        assert one["losses"] == other["losses"]
        assert one["batches_sha256"] == other["batches_sha256"]


def test_each_variant_has_its_classes(simulated):
    """One part after the other is ours; what the YAML itself names counts for none."""
    options, rest = compare_epoch_time.parse([*simulated, "--batches=2", "--no-io"])
    with load_recipe(rest, options) as recipe:
        found = {}
        for variant in compare.make_variants(recipe, options, "SLi-GRU", "fp32"):
            brain = epoch_runs.make_brain(recipe, variant)
            modules = brain.modules
            found[variant.implementation] = [
                part.__module__.partition(".")[0]
                for part in (modules.enc["RNN"], modules.dec, modules.enc, brain.hparams.ctc_cost)
            ]
        (torchs,) = compare.make_variants(recipe, options, "GRU", "fp32")
        brain = epoch_runs.make_brain(recipe, torchs)
        modules = brain.modules
        assert brain.hparams.ctc_cost is speechbrain.nnet.losses.ctc_loss
        assert type(modules.dec) is speechbrain.nnet.RNN.AttentionalRNNDecoder
        assert type(modules.enc) is speechbrain.lobes.models.CRDNN.CRDNN
    assert found == {
        "stock": ["speechbrain"] * 4,
        "ours: RNN only": ["sb_fast_sligru", *["speechbrain"] * 3],
        "ours: RNN + decoder": [*["sb_fast_sligru"] * 2, *["speechbrain"] * 2],
        "ours: all": ["sb_fast_sligru"] * 4,
        "stock, other seed": ["speechbrain"] * 4,
    }


def test_adadelta_is_a_part_where_the_yaml_has_it(simulated):
    """With the YAML's arguments; another optimiser is that of all variants."""
    arguments = [argument for argument in simulated if not argument.startswith("--overrides")]
    arguments += ["--batches=2", "--no-io"]

    def classes_of(*given, build=()):
        """Of the variants, by their names; and the optimisers of those that are built."""
        options, rest = compare_epoch_time.parse([*arguments, *given])
        with load_recipe(rest, options) as recipe:
            variants = [
                variant
                for cell in ("SLi-GRU", "GRU")
                for variant in compare.make_variants(recipe, options, cell, "fp32")
            ]
            optimizers = [
                epoch_runs.make_brain(recipe, variant).optimizer
                for variant in variants
                if variant.implementation in build
            ]
        return {v.implementation: v.classes.get("opt_class") for v in variants}, optimizers

    found, (stock, ours) = classes_of(build=("stock", "ours: all"))
    assert found.pop("ours: all") == "sb_fast_sligru.Adadelta"
    assert len(found) == 5 and set(found.values()) == {"torch.optim.Adadelta"}
    assert type(stock) is torch.optim.Adadelta and type(ours) is sb_fast_sligru.Adadelta
    assert stock.defaults == ours.defaults and ours.defaults["rho"] == 0.95
    _, (ours,) = classes_of("--opt_class={rho: 0.9}", build=("ours: all",))
    assert type(ours) is sb_fast_sligru.Adadelta and ours.defaults["rho"] == 0.9
    found, _ = classes_of("--opt_class=!name:torch.optim.SGD")
    assert set(found.values()) == {None}


def test_agreement_has_every_part_ours(simulated, tmp_path, monkeypatch):
    started, start_run = [], epoch_runs.start_run

    def note(recipe, variant, *rest, for_agreement=False, **options):
        if for_agreement:
            started.append(variant.implementation)
        return start_run(recipe, variant, *rest, for_agreement=for_agreement, **options)

    monkeypatch.setattr(epoch_runs, "start_run", note)
    compare_epoch_time.main([*simulated, "--batches=2", "--no-io", "--cells", "SLi-GRU"])
    assert started == ["ours: all", "stock", "stock"]
    report = read_report(tmp_path)
    ours = ["ours: RNN only", "ours: RNN + decoder", "ours: all"]
    names = [variant["implementation"] for variant in report["variants"]]
    assert names == ["stock", *ours, "stock, other seed"]
    assert list(report["ratios"]["SLi-GRU fp32"]) == ours
    assert list(report["checks"]["seed_spread"]["SLi-GRU fp32"]["ours_and_stock"]) == ours
    assert report["variants"][3]["backends"] == {"RNN": "cpu", "enc": "cpu", "dec": "cpu"}
    markdown = (tmp_path / "report/report.md").read_text()
    assert all(
        len(re.findall(rf"SLi-GRU fp32 {re.escape(name)} +\|", markdown)) == 1 for name in ours
    )
    assert re.search(r"-> \S+ s \(all, [\d.]+x\)", markdown)


def test_sample_and_full_epoch_agree_within_the_interval(arguments, tmp_path, monkeypatch):
    """On the embedded corpus, by a clock on which each batch costs what it would on a GPU."""
    now = 0.0

    def fit_batch(brain, batch):
        nonlocal now
        noise = random.Random(batch.id[0]).uniform(0.9, 1.1)
        now += noise * (0.05 + 0.01 * batch.sig.data.numel() / 16000)
        return torch.tensor(1.0)

    monkeypatch.setattr(epoch_runs, "_now", lambda: now)
    monkeypatch.setattr(epoch_runs, "break_down", lambda run, *rest: None)
    monkeypatch.setattr(epoch_report, "write", lambda report, folder: reports.append(report))
    monkeypatch.setattr(CTC, "fit_batch", fit_batch)
    reports = []
    for extent in ("--batches=4", "--full"):
        options, rest = compare_epoch_time.parse([*arguments, "--cells", "GRU", extent])
        compare.compare(rest, options)
    sample, full = (report["variants"][0] for report in (reports[0], reports[-1]))
    low, high = sample["interval"]
    assert low <= full["epoch_seconds"] <= high
    assert high - low < 0.5 * full["epoch_seconds"]
    assert len(full["step_seconds"]) > len(sample["step_seconds"]) == 4


def test_refuses_a_ratio_when_losses_disagree(arguments, tmp_path, monkeypatch, capsys):
    wrong = {"ours": f"{__name__}.WrongSLiGRU", "stock": "speechbrain.nnet.RNN.SLiGRU"}
    monkeypatch.setattr(compare, "CELLS", {"SLi-GRU": wrong})
    assert run_main(arguments, "--batches=2", "--cells", "SLi-GRU") == 1
    printed = capsys.readouterr().out
    assert "No ratio: SLi-GRU: without dropout our first 3 losses differ" in printed
    report = read_report(tmp_path)
    assert report["ratios"] == {} and report["variants"] == []
    assert report["refused"] in printed
    assert not (tmp_path / "report/report.png").exists()


def test_refuses_a_ratio_when_batches_differ(arguments, tmp_path, monkeypatch, capsys):
    make_dataloader, calls = epoch_runs.make_dataloader, []

    def reverse_stock(data, batch_sampler, **options):
        calls.append(batch_sampler)
        batches = batch_sampler[::-1] if len(calls) == 3 else batch_sampler
        return make_dataloader(data, batch_sampler=batches, **options)

    # The first loader is the one that is timed alone, then come ours and stock.
    monkeypatch.setattr(epoch_runs, "make_dataloader", reverse_stock)
    assert run_main(arguments, "--full", "--cells", "SLi-GRU") == 1
    printed = capsys.readouterr().out
    assert "SLi-GRU fp32 stock did not see the batches of SLi-GRU fp32 ours: all" in printed
    assert read_report(tmp_path)["ratios"] == {}


def test_same_ids_with_other_samples_are_other_batches():
    first = a_run([(("a", "b"), 1.5), (("c",), 2.0)])
    same = a_run(first.batches, implementation="stock")
    check_same_batches([first, same])
    other = a_run([(("a", "b"), 1.5), (("c",), 2.1)], "Li-GRU")
    with pytest.raises(Refused, match=r"Li-GRU fp32 ours: RNN only .* \(from step 2 on\)"):
        check_same_batches([first, same, other])
    shorter = a_run(first.batches[:1], "Li-GRU")
    with pytest.raises(Refused, match=r"\(from step 2 on\)"):
        check_same_batches([first, shorter])


@pytest.mark.parametrize("ours", [[2.0, 1.003], [2.0, 0.997], [2.0, float("nan")]])
def test_disagreement_is_refused_on_both_sides(ours):
    stock, moved = [2.0, 1.0], [2.0, 1.5]
    entry = check_agreement("SLi-GRU", [2.001, 1.0], stock, moved)
    assert entry["bound"] == 1e-3 and entry["stock_moved_difference"] == 0.5
    with pytest.raises(Refused, match="differ from stock's by up to"):
        check_agreement("SLi-GRU", ours, stock, moved)
    with pytest.raises(Refused, match="by up to inf relative"):  # CTC could align nothing
        check_agreement("SLi-GRU", [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])


def test_losses_beyond_the_seeds_spread_are_refused():
    stock, other = [3.0, 2.0, 1.0], [3.1, 1.9, 1.1]
    near = [2.9, 2.1, 1.0]
    entry = check_seed_spread("Li-GRU", {"ours: RNN only": near, "ours: all": stock}, stock, other)
    assert entry["ours_and_stock"] == pytest.approx({"ours: RNN only": 0.2 / 3, "ours: all": 0})
    assert entry["stock_and_other_seed"] == pytest.approx(0.1)
    assert entry["bound"] == pytest.approx(0.1 * (1 + 10 / 3**0.5))
    for ours in ([4.0, 3.0, 2.0], [float("nan")] * 3):
        both = {"ours: RNN only": near, "ours: all": ours}
        with pytest.raises(Refused, match="Li-GRU: the losses of ours: all differ from stock's"):
            check_seed_spread("Li-GRU", both, stock, other)


def test_each_variant_meets_shapes_that_are_new_to_all():
    seconds = [1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9]  # of one utterance, which is a batch
    data = SimpleNamespace(
        data_ids=list(range(len(seconds))), data=[{"duration": value} for value in seconds]
    )
    plan = [[index] for index in range(len(seconds))]
    recipe = Recipe(
        **dict.fromkeys(field.name for field in dataclasses.fields(Recipe))
        | {"data": data, "plan": plan, "hparams": {"hop_length": 10}, "speeds": 1}
    )
    assert recipe.shape([0, 5]) == (2, 300)
    assert recipe.count_shapes() == 9
    assert dataclasses.replace(recipe, speeds=3).count_shapes() == len(plan)
    variants = [a_run([], implementation=name).variant for name in ("stock", compare.RNN_ONLY)]
    chosen, options = [[1], [5]], Options(batches=2)  # 1 and 3 s; the longest has 9 s
    new = [
        epoch_runs.new_shapes(recipe, options, variant, chosen, turn, 2)
        for turn, variant in enumerate(variants)
    ]
    assert new == [[[4], [7]], [[6], [8]]]  # nearest to 1 s: 2 and 4 s; then to 3 s: 5 and 6 s
    other_seed = a_run([], implementation=epoch_runs.OTHER_SEED).variant
    assert epoch_runs.new_shapes(recipe, options, other_seed, chosen, 0, 2) == []
    assert epoch_runs.new_shapes(recipe, Options(), variants[0], chosen, 0, 2) == []


def test_epoch_seconds():
    # All batches: the mean of the passes.
    estimate, interval = compare.epoch_seconds([1, 2, 3, 4], 2, [5, 5], [5, 5])
    assert (estimate, interval) == (5, (3, 7))
    # A sample whose time is proportional to its length leaves no doubt.
    padded = [float(i) for i in range(1, 41)]
    chosen = padded[::4]
    estimate, interval = compare.epoch_seconds([0.1 * p for p in chosen], 1, chosen, padded)
    assert estimate == pytest.approx(82) and interval == pytest.approx((82, 82))
    # Otherwise the interval covers the truth about 95 times of 100.
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        seconds = [0.1 * p + torch.rand((), generator=generator).item() for p in padded]
        chosen = torch.randperm(40, generator=generator)[:20].tolist()
        _, (low, high) = compare.epoch_seconds(
            [seconds[i] for i in chosen], 1, [padded[i] for i in chosen], padded
        )
        covered += low <= sum(seconds) <= high
    assert 350 <= covered <= 395


def test_sample_takes_short_middle_and_long_batches(arguments):
    with load_recipe(arguments, Options()) as recipe:
        lengths = sorted(map(recipe.padded_seconds, recipe.plan))
        half = spread(recipe, recipe.plan, len(recipe.plan) // 2)
        positions = [recipe.plan.index(batch) for batch in half]
        assert positions == sorted(set(positions))  # in the plan's order, none twice
        taken = sorted(map(recipe.padded_seconds, half))
        assert taken[0] <= lengths[1] and taken[-1] >= lengths[-3]
        assert spread(recipe, recipe.plan, len(recipe.plan)) == recipe.plan


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("--batches=1", "batches must be 2 to"),
        ("--batches=1000", "batches must be 2 to"),
        ("--passes=0", "passes must be at least 1"),
        ("--data_folder=nowhere", "nowhere does not exist"),
        ("--overrides=nowhere.yaml", "nowhere.yaml"),
        ("--precision=tf32", "precision tf32 needs a CUDA device, got cpu"),
        ("--simulate=dev-clean", "found duplicate key"),
        ("--resume", "is no report to go on with"),
        ("--rnn_class=!name:sb_fast_sligru.LiGRU", "rnn_class: the comparison takes ours"),
        ("--opt_class=!name:torch.optim.Adadelta", "opt_class: the comparison takes ours"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, bad, message):
    key = bad.split("=")[0]
    extent = [] if key == "--batches" else ["--full"]
    rest = [argument for argument in arguments if not argument.startswith(key)]
    code = run_main(rest, bad, *extent)
    assert code.startswith("compare_epoch_time: ") and message in code and "\n" not in code


# ---- simulated data


def test_simulated_audio_of_another_rate_is_refused(simulated):
    message = run_main([*simulated, "--sample_rate=8000"], "--full")
    assert "sample_rate is 8000 Hz, but simulated audio has 16000 Hz" in message


@pytest.mark.parametrize("name", simulation.NAMES)
def test_simulated_splits_have_librispeechs_size(name):
    utterances, hours = {
        "train-960": (281241, 960.9),
        "train-clean-100": (28539, 100.6),
        "train-clean-360": (104014, 363.6),
        "train-other-500": (148688, 496.7),
        "dev-clean": (2703, 5.4),
        "dev-other": (2864, 5.1),
        "test-clean": (2620, 5.4),
        "test-other": (2939, 5.3),
    }[name]
    durations = simulation.draw_durations(name, 0)
    assert len(durations) == utterances
    assert sum(durations.values()) / 3600 == pytest.approx(hours, rel=0.035)
    if name.startswith("train"):
        assert sum(durations.values()) / 3600 == pytest.approx(hours, rel=0.002)


@pytest.mark.parametrize("io", [True, False])
def test_simulated_utterances_depend_on_the_seed_alone(tmp_path, io):
    hparams = {"seed": 1, "vocab_size": 20, "blank_index": 0, "bos_index": 1, "eos_index": 2}
    hparams["sample_rate"] = 16000
    targets = ("tokens", "tokens_bos", "tokens_eos")

    def make(name, **changed):
        folder = tmp_path / name
        folder.mkdir()
        data = {**hparams, **changed}
        return simulation.make_dataset("dev-clean", data, targets, folder if io else None)

    (first, text), (again, _), (other, _) = make("a"), make("b"), make("c", seed=2)
    assert ("FLAC" in text) == io
    assert len(first) == 2703
    for index in (0, 1, 2702):
        item, same, different = first[index], again[index], other[index]
        seconds = first.data[item["id"]]["duration"]
        assert item["sig"].dtype == torch.float32
        assert item["sig"].shape == (round(seconds * 16000),)
        assert 0.01 < item["sig"].std() < 0.5
        assert len(item["tokens"]) == round(4.4 * seconds)
        assert 3 <= item["tokens"].min() and item["tokens"].max() < 20
        assert item["tokens_bos"].tolist() == [1, *item["tokens"].tolist()]
        assert item["tokens_eos"].tolist() == [*item["tokens"].tolist(), 2]
        assert len(item["wrd"]) == round(15.1 * seconds)
        assert all(
            torch.equal(item[key], same[key])
            if torch.is_tensor(item[key])
            else item[key] == same[key]
            for key in item
        )
        assert item["sig"].shape != different["sig"].shape
    assert first[0]["sig"][:8].tolist() != first[1]["sig"][:8].tolist()


# ---- the README's sentence


def a_report(**changed):
    variants = [
        {"cell": "SLi-GRU", "precision": "bf16", "implementation": name, "epoch_seconds": seconds}
        for name, seconds in (
            ("stock", 26340.0),
            ("ours: RNN only", 18000.0),
            ("ours: RNN + decoder", 9180.0),
        )
    ]
    return {
        "machine": {"gpu": "NVIDIA H200"},
        "settings": {"recipe": "Seq2Seq", "batch": "24 utterances", "augmentations": []},
        "data": {
            "source": "train-960, simulated",
            "audio_seconds_in_epoch": 960.9 * 3600,
            "batches": 8,
            "batches_in_epoch": 11719,
        },
        "variants": variants,
        "ratios": {
            "SLi-GRU bf16": {
                "ours: RNN only": 26340 / 18000,
                "ours: RNN + decoder": 26340 / 9180,
            }
        },
        "refused": None,
    } | changed


def test_headline():
    assert texts.headline(a_report()) == (
        "SpeechBrain's -> ours for one epoch of train-960, simulated (960.9 h) on one NVIDIA H200: "
        "SLi-GRU bf16 7h19 -> 5h00 (RNN only, 1.5x) -> 2h33 (RNN + decoder, 2.9x); Seq2Seq recipe, "
        "batches of 24 utterances, no augmentation, from 8 of 11719 batches."
    )
    for bad in ({"refused": "other batches"}, {"ratios": {}}):
        with pytest.raises(ValueError, match="the report has no ratio"):
            texts.headline(a_report(**bad))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(9.996, "10 s"), (0.1234, "0.123 s"), (125, "2 min 05 s"), (7199.9, "2h00"), (26340, "7h19")],
)
def test_durations_for_people(seconds, shown):
    assert texts.duration(seconds) == shown
