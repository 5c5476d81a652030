"""The epoch-time comparison: a tiny run on the CPU, its report, and the cases without a ratio."""

import json
import re
from pathlib import Path

import compare_epoch_time as compare
import pytest
import speechbrain.nnet.RNN
import torch
from compare_epoch_time import Refused, Run
from mini_librispeech import make_corpus

ROOT = Path(__file__).parents[1]


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
def arguments(corpus, tmp_path, monkeypatch):
    """A model of a few units, two batches of 2 to 3 utterances, one cell, 3 steps of agreement."""
    monkeypatch.setattr(compare, "CELLS", {"SLi-GRU": compare.CELLS["SLi-GRU"]})
    monkeypatch.setattr(compare, "AGREEMENT_STEPS", 3)
    return [
        str(ROOT / "hparams/librispeech_ctc.yaml"),
        f"--overrides={ROOT / 'hparams/mini.yaml'}",
        f"--data_folder={corpus}",
        f"--output_folder={tmp_path / 'report'}",
        "--device=cpu",
        "--max_batch_length=12",
        "--rnn_neurons=8",
        "--dnn_neurons=8",
    ]


def run_main(arguments, *own):
    with pytest.raises(SystemExit) as end:
        compare.main([*arguments, *own])
    return end.value.code


def read_report(tmp_path):
    return json.loads((tmp_path / "report/report.json").read_text())


@pytest.mark.slow
def test_report(arguments, tmp_path, capsys):
    compare.main([*arguments, "--batches=2", "--passes=2"])
    report = read_report(tmp_path)
    documented = re.findall(r"^    (\w+(?:, \w+)*)  ", compare.__doc__, re.M)
    assert list(report) == [name for names in documented for name in names.split(", ")]
    assert report["refused"] is None
    assert report["checks"]["same_batches"]
    agreement = report["checks"]["agreement"]["SLi-GRU"]
    assert agreement["largest_relative_difference"] <= agreement["bound"] == 1e-3
    assert len(agreement["losses"]["ours"]) == 3
    data, settings = report["data"], report["settings"]
    assert (data["batches"], data["passes"]) == (2, 2)
    assert 0 < data["audio_seconds"] <= data["padded_seconds"]
    assert data["batches_in_epoch"] >= 4
    assert settings["precision"] == "fp32" and settings["tf32"].keys() == {"matmul", "cudnn"}
    assert settings["backend"] == "cpu"
    assert report["machine"]["device"] == "cpu"

    ours, stock, other = report["variants"]
    assert ours["rnn_class"] == "sb_fast_sligru.SLiGRU"
    assert stock["rnn_class"] == other["rnn_class"] == "speechbrain.nnet.RNN.SLiGRU"
    assert ours["seed"] == stock["seed"] != other["seed"]
    for variant in report["variants"]:
        assert len(variant["losses"]) == len(variant["step_seconds"]) == 4
        assert variant["interval"][0] <= variant["epoch_seconds"] <= variant["interval"][1]
        assert variant["peak_memory_bytes"] is None or variant["peak_memory_bytes"] > 2**16
    assert report["ratios"]["SLi-GRU"] == stock["epoch_seconds"] / ours["epoch_seconds"]
    assert ours["losses"] != stock["losses"] != other["losses"]  # dropout is on

    markdown = (tmp_path / "report/report.md").read_text()
    ratio = f"{report['ratios']['SLi-GRU']:.2f}x"
    assert len(re.findall(r"^\| SLi-GRU", markdown, re.M)) == 2
    assert ratio in markdown and ratio in capsys.readouterr().out
    picture = (tmp_path / "report/report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_refuses_a_ratio_when_losses_disagree(arguments, tmp_path, monkeypatch, capsys):
    wrong = {"ours": f"{__name__}.WrongSLiGRU", "stock": "speechbrain.nnet.RNN.SLiGRU"}
    monkeypatch.setattr(compare, "CELLS", {"SLi-GRU": wrong})
    assert run_main(arguments) == 1
    printed = capsys.readouterr().out
    assert "No ratio: SLi-GRU: without dropout our first 3 losses differ" in printed
    report = read_report(tmp_path)
    assert report["ratios"] is None and report["variants"] == []
    assert report["refused"] in printed
    assert not (tmp_path / "report/report.png").exists()


def test_refuses_a_ratio_when_batches_differ(arguments, tmp_path, monkeypatch, capsys):
    make_dataloader, calls = compare.make_dataloader, []

    def reverse_the_second(data, batch_sampler, **options):
        calls.append(batch_sampler)
        batches = batch_sampler[::-1] if len(calls) == 2 else batch_sampler
        return make_dataloader(data, batch_sampler=batches, **options)

    monkeypatch.setattr(compare, "make_dataloader", reverse_the_second)
    assert run_main(arguments) == 1
    assert "SLi-GRU stock did not see the batches of SLi-GRU ours" in capsys.readouterr().out
    assert read_report(tmp_path)["ratios"] is None


def test_same_ids_with_other_samples_are_other_batches():
    first = Run("SLi-GRU", "ours", "", 0, None, batches=[(("a", "b"), 1.5), (("c",), 2.0)])
    same = Run("SLi-GRU", "stock", "", 0, None, batches=list(first.batches))
    compare.check_same_batches([first, same])
    other = Run("Li-GRU", "ours", "", 0, None, batches=[(("a", "b"), 1.5), (("c",), 2.1)])
    with pytest.raises(Refused, match=r"Li-GRU ours .* \(from step 2 on\)"):
        compare.check_same_batches([first, same, other])
    shorter = Run("Li-GRU", "ours", "", 0, None, batches=first.batches[:1])
    with pytest.raises(Refused, match=r"\(from step 2 on\)"):
        compare.check_same_batches([first, shorter])


@pytest.mark.parametrize("ours", [[2.0, 1.003], [2.0, 0.997], [2.0, float("nan")]])
def test_disagreement_is_refused_on_both_sides(ours):
    assert compare.check_agreement("SLi-GRU", [2.001, 1.0], [2.0, 1.0])["bound"] == 1e-3
    with pytest.raises(Refused, match="differ from stock's by up to"):
        compare.check_agreement("SLi-GRU", ours, [2.0, 1.0])


def test_losses_beyond_the_seeds_spread_are_refused():
    stock, other = [3.0, 2.0, 1.0], [3.1, 1.9, 1.1]
    entry = compare.check_seed_spread("Li-GRU", [2.9, 2.1, 1.0], stock, other)
    assert entry["stock_and_other_seed"] == pytest.approx(0.1)
    assert entry["bound"] == pytest.approx(0.1 * (1 + 10 / 3**0.5))
    for ours in ([4.0, 3.0, 2.0], [float("nan")] * 3):
        with pytest.raises(Refused, match="Li-GRU: our losses differ from stock's"):
            compare.check_seed_spread("Li-GRU", ours, stock, other)


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
    recipe = compare.load_recipe(arguments)
    lengths = sorted(map(recipe.padded_seconds, recipe.plan))
    half = compare.sample(recipe, len(recipe.plan) // 2)
    positions = [recipe.plan.index(batch) for batch in half]
    assert positions == sorted(set(positions))  # in the plan's order, none twice
    taken = sorted(map(recipe.padded_seconds, half))
    assert taken[0] <= lengths[1] and taken[-1] >= lengths[-3]
    assert compare.sample(recipe, len(recipe.plan)) == recipe.plan


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("--batches=1", "batches must be 2 to"),
        ("--batches=1000", "batches must be 2 to"),
        ("--passes=0", "passes must be at least 1"),
        ("--data_folder=nowhere", "nowhere does not exist"),
        ("--overrides=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, bad, message):
    key = bad.split("=")[0]
    code = run_main([argument for argument in arguments if not argument.startswith(key)], bad)
    assert code.startswith("compare_epoch_time: ") and message in code and "\n" not in code
