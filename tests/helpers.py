"""What tests of several files use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository


def relative_error(actual, expected):
    """||actual - expected|| / ||expected|| in float64 on the CPU; NaN never passes a comparison."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
