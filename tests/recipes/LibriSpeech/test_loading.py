"""Loaders: as many processes as there are CPUs at most, deep and pinned for a GPU."""

import pytest

from sligru_recipes.processes import available_cpus
from sligru_recipes.training import loading
from sligru_recipes.training.loading import limit_processes, loader_options


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setenv("SB_NUM_PROC", "8")  # what SpeechBrain counts


@pytest.mark.parametrize(
    ("files", "groups", "count"),
    [
        ({}, None, 8),
        ({}, "0::/", 8),
        ({"cpu.max": "max 100000"}, "0::/", 8),
        ({"cpu.max": "250000 100000"}, "0::/", 3),
        ({"cpu.max": "50000 100000"}, "0::/", 1),
        ({"cpu.max": "1600000 100000"}, "0::/", 8),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 4),
        ({"cpu.max": "200000 100000"}, "0::/of/the/host", 2),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu,x:/", 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu,x:/", 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "2:memory:/", 8),
    ],
)
def test_cpus_of_a_control_group(eight_cpus, tmp_path, files, groups, count):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    listed = tmp_path / "groups"
    if groups is not None:
        listed.write_text(f"{groups}\n")
    assert available_cpus(listed, tmp_path) == count


def test_processes_that_train_share_the_cpus(monkeypatch):
    monkeypatch.setattr(loading, "available_cpus", lambda: 8)
    assert [limit_processes(count) for count in (0, 3, 20)] == [0, 3, 8]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [limit_processes(count) for count in (0, 1, 20)] == [0, 1, 2]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert [limit_processes(count) for count in (0, 20)] == [0, 1]


def test_loader_options(monkeypatch):
    monkeypatch.setattr(loading, "available_cpus", lambda: 2)
    given = {"num_workers": 8, "batch_size": 3}
    expected = {"num_workers": 2, "batch_size": 3, "prefetch_factor": loading.PREFETCHED}
    assert loader_options(given, "cpu") == expected | {"pin_memory": False}
    assert loader_options(given, "cuda:1") == expected | {"pin_memory": True}
    own = {"num_workers": 1, "prefetch_factor": 9, "pin_memory": False}
    assert loader_options(own, "cuda") == own
    for none in ({}, {"num_workers": 0}):
        assert loader_options(none, "cuda") == {"num_workers": 0}
    assert given == {"num_workers": 8, "batch_size": 3}
