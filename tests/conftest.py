"""Shared by all tests: seeds, and tests of what a machine lacks."""

import functools

import pytest
import torch

from sb_fast_sligru import machine


def pytest_collection_modifyitems(items):
    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "no CUDA GPU is visible"
    if " " in torch.__file__:
        lacking["inductor"] = "PyTorch's Inductor cannot link where the path to torch has a space"
    for item in items:
        for marker in lacking.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=lacking[marker]))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20231)


@pytest.fixture(autouse=True)
def exact_products():
    """Importing SpeechBrain turns TF32 on, which would hide errors of float32."""
    with machine.tf32(False):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost tiny models more than they give, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double(monkeypatch):
    """SpeechBrain's decoder takes float64 only where its literals do: zeros, and 1 / length."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def environment_described_once():
    """SpeechBrain lists the installed packages whenever a recipe starts, for a second or two."""
    from speechbrain.utils import logger  # not installed where the operator alone is tested

    with pytest.MonkeyPatch.context() as patch:
        describe = functools.cache(logger.get_environment_description)
        patch.setattr(logger, "get_environment_description", describe)
        yield
