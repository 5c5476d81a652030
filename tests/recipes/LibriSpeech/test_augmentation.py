"""Augmentation, features and their normalisation are SpeechBrain's, but for the waits."""

import random
from unittest import mock

import pytest
import speechbrain.augment.augmenter
import speechbrain.augment.time_domain as stock
import torch
from speechbrain.lobes.features import Fbank
from speechbrain.processing.features import InputNormalization

from sligru_recipes.training.augmentation import Augmenter, DropChunk, DropFreq
from sligru_recipes.training.features import move_constants, normalise

RATE = 16000


def both(ours, theirs, *arguments):
    """What two callables return from the same random state."""
    results = []
    for function in (ours, theirs):
        torch.manual_seed(7)
        results.append(function(*arguments))
    return results


@pytest.mark.parametrize("shape", [(3, 4000), (2, 3000, 2)])
def test_drop_freq_is_speechbrains(shape):
    options = {"drop_freq_low": 0, "drop_freq_count_high": 3, "drop_freq_width": 0.05}
    waveforms = torch.randn(shape)
    for _ in range(5):
        ours, theirs = both(DropFreq(**options), stock.DropFreq(**options), waveforms)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert not torch.allclose(ours, waveforms, atol=0.1)


def chunks(dropper, lengths, samples, draws):
    """Of many utterances of ones: the silenced share at each sample, and of silent utterances."""
    torch.manual_seed(3)
    waveforms = torch.ones(len(lengths), samples)
    silent = torch.zeros(len(lengths), samples)
    totals = []
    for _ in range(draws):
        dropped = dropper(waveforms, lengths)
        assert set(dropped.unique().tolist()) <= {0.0, 1.0}
        silent += 1 - dropped
        totals.append((1 - dropped).sum(1))
    return silent / draws, torch.stack(totals)


def test_chunks_are_drawn_as_speechbrains():
    """Where, how often and how long, also in utterances that are shorter than a chunk."""
    options = {"drop_length_low": 20, "drop_length_high": 60}
    options |= {"drop_count_low": 1, "drop_count_high": 4}
    lengths, samples, draws = torch.tensor([1.0, 0.55, 0.1]).repeat(20), 400, 100
    ours, theirs = (
        chunks(kind(**options), lengths, samples, draws) for kind in (DropChunk, stock.DropChunk)
    )
    for row in range(3):
        at = [shares[row::3].mean(0) for shares, _ in (ours, theirs)]
        # A share p of 2000 draws has the deviation sqrt(p (1 - p) / 2000) < 0.0112.
        assert (at[0] - at[1]).abs().max() < 5 * 0.0112 * 2**0.5
        found, expected = (totals[:, row::3].flatten() for _, totals in (ours, theirs))
        deviation = expected.std() * (2 / len(expected)) ** 0.5
        assert (found.mean() - expected.mean()).abs() < 4 * deviation
        assert 0.9 < found.std() / expected.std() < 1.1
        assert found.min() >= 20 and found.max() <= 240


@pytest.mark.parametrize(
    "options",
    [
        {"drop_count_low": 0, "drop_count_high": 0},
        {"noise_factor": 1.0},
        {"drop_start": 50, "drop_end": 350},
        {"drop_end": -10},
    ],
)
def test_what_chunks_leave_to_speechbrain(options):
    arguments = torch.randn(4, 2000), torch.ones(4)
    ours, theirs = both(DropChunk(**options), stock.DropChunk(**options), *arguments)
    assert torch.equal(ours, theirs)


def test_chunks_of_several_channels_are_the_same_in_all():
    dropped = DropChunk()(torch.ones(2, 3000, 3), torch.ones(2))
    assert 0 < (dropped == 0).sum() and (dropped == dropped[..., :1]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"concat_original": True, "min_augmentations": 2},
        {"concat_original": False, "shuffle_augmentations": True},
        {"parallel_augment": True, "concat_original": True, "min_augmentations": 2},
        {"repeat_augment": 2, "augment_start_index": 1},
        {"augment_prob": 0.0},
    ],
    ids=str,
)
def test_augmenter_is_speechbrains(options):
    """The same waveforms, lengths and labels; on the CPU both draw the number from one state."""
    waveforms, lengths = torch.randn(3, RATE), torch.tensor([1.0, 0.9, 0.4])
    results = []
    for kind in (Augmenter, speechbrain.augment.augmenter.Augmenter):
        torch.manual_seed(11)
        augmentations = [stock.SpeedPerturb(RATE, speeds=[95, 105]), stock.DropFreq()]
        augmenter = kind(**{"min_augmentations": 2, "augmentations": augmentations} | options)
        # Ours draws twice: SpeechBrain's number, which is not looked at, and its own.
        torch.manual_seed(11)
        random.seed(11)
        if kind is not Augmenter and options.get("augment_prob") != 0.0:
            torch.randint(1, 3, (1,))
        results.append((*augmenter(waveforms, lengths), augmenter.replicate_labels(lengths)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_augmenter_without_augmentations_leaves_the_batch():
    arguments = torch.randn(2, 100), torch.ones(2)
    augmented = Augmenter(augmentations=[], concat_original=True)(*arguments)
    assert all(map(torch.equal, augmented, arguments))


def test_number_of_augmentations_is_drawn_from_its_range():
    augmenter = Augmenter(augmentations=[stock.DropFreq() for _ in range(3)], min_augmentations=1)
    counts = []
    for _ in range(60):
        augmenter(torch.randn(1, 500), torch.ones(1))
        counts.append(augmenter.N_augment)
    assert set(counts) == {1, 2, 3} and type(counts[0]) is int


@pytest.mark.parametrize("norm_type", ["global", "batch", "sentence"])
def test_normalisation_is_speechbrains(norm_type):
    ours, theirs = (InputNormalization(norm_type=norm_type, update_until_epoch=3) for _ in range(2))
    for epoch, batch in ((1, 3), (1, 1), (2, 4), (3, 2)):  # from epoch 3 on nothing is updated
        feats, lengths = 5 + 3 * torch.randn(batch, 50, 6), torch.linspace(0.3, 1, batch)
        results = normalise(ours, feats, lengths, epoch), theirs(feats, lengths, epoch=epoch)
        torch.testing.assert_close(*results)
    assert int(ours.count) == int(theirs.count)
    torch.testing.assert_close(ours.glob_std, theirs.glob_std)
    for norm in (ours, theirs):
        norm.eval()
    torch.testing.assert_close(ours(feats, lengths), theirs(feats, lengths))


def test_statistics_go_on_in_speechbrains_class(tmp_path):
    """And those that it saved go on in ours."""
    feats, lengths = torch.randn(3, 20, 5), torch.ones(3)
    first, second = InputNormalization(), InputNormalization()
    for norm in (first, second):
        norm(feats, lengths, epoch=1)
    normalise(first, 2 * feats, lengths, 1)
    first._save(tmp_path / "ckpt")
    third = InputNormalization()
    third._load(tmp_path / "ckpt")
    second(2 * feats, lengths, epoch=1)
    torch.testing.assert_close(*(norm(feats, lengths, epoch=1) for norm in (third, second)))


def test_statistics_of_two_processes_are_those_of_one(tmp_path):
    torch.multiprocessing.spawn(compare_statistics, (tmp_path / "store",), nprocs=2)


def compare_statistics(rank, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    parts, whole = InputNormalization(), InputNormalization()
    for size in (1, 2):
        feats, lengths = torch.randn(3, 30, 4), torch.tensor([1.0, 0.5, 0.8])
        mine = slice(0, size) if rank == 0 else slice(size, 3)
        found = normalise(parts, feats[mine], lengths[mine], 1)
        torch.testing.assert_close(parts.count, _alone(whole, feats, lengths))
        expected = (feats[mine] - whole.glob_mean) / whole.glob_std
        torch.testing.assert_close(found, expected)
    torch.distributed.destroy_process_group()


def _alone(norm, feats, lengths):
    """SpeechBrain's would add up what both processes see."""
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        normalise(norm, feats, lengths, 1)
    return norm.count


def test_features_do_not_change_when_constants_are_moved():
    waveforms = torch.randn(2, RATE)
    features = Fbank(n_mels=20)
    expected = features(waveforms)
    move_constants(features, torch.device("cpu"))
    assert torch.equal(features(waveforms), expected)
    move_constants(features, torch.device("meta"))
    assert features.compute_STFT.window.is_meta and features.compute_fbanks.all_freqs_mat.is_meta
