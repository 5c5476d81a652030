"""StreamingFbank against SpeechBrain's Fbank, and what a stream needs of it."""

import pytest
import torch
from speechbrain.lobes.features import Fbank

from sb_fast_sligru import StreamingFbank

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "defaults": {},
    "sizes": {"n_fft": 512, "n_mels": 23, "win_length": 20, "hop_length": 12.5},
    "range": {"f_min": 100, "f_max": 4000},
    "rate": {"sample_rate": 8000, "n_fft": 200},
    "gaussian": {"filter_shape": "gaussian"},
    "rectangular": {"filter_shape": "rectangular"},
}
either_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


@either_device
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loud_speech_has_speechbrains_features(options, device):
    """All of it is above both floors."""
    wavs = torch.randn(2, 5000)
    expected = Fbank(**options)(wavs)
    assert expected.min() > max(expected.max() - 79, -49)
    actual = StreamingFbank(**options).to(device)(wavs.to(device)).cpu()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_a_frame_does_not_depend_on_what_comes_later():
    quiet = 1e-4 * torch.randn(1, 8000)
    loud = torch.cat([quiet, 100 * torch.randn(1, 8000)], 1)
    theirs, ours = (
        [fbank(wavs)[:, :48] for wavs in (quiet, loud)] for fbank in (Fbank(), StreamingFbank())
    )
    assert not torch.allclose(*theirs, atol=1.0)
    torch.testing.assert_close(*ours, rtol=0, atol=1e-3)


@pytest.mark.parametrize("floor", [-50.0, -20.0])
def test_silence_is_at_the_floor(floor):
    fbank = StreamingFbank(**({} if floor == -50.0 else {"floor": floor}))
    features = fbank(torch.zeros(1, 1000))
    torch.testing.assert_close(features, torch.full_like(features, floor))


def test_a_cast_module_computes_in_its_dtype():
    wavs = torch.randn(1, 3000, dtype=torch.float64)
    features = StreamingFbank().double()(wavs)
    assert features.dtype == torch.float64
    torch.testing.assert_close(
        features.float(), StreamingFbank()(wavs.float()), rtol=1e-4, atol=1e-3
    )


def test_state_dict_is_speechbrains():
    ours, theirs = StreamingFbank(), Fbank()
    assert list(theirs.state_dict()) == ["compute_deltas.kernel"]  # which neither uses
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
