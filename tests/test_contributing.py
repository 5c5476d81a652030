"""What CONTRIBUTING.md and cuda_ops/README.md say of folders, files, tests and kernels is so."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from sb_fast_sligru import ops

H200 = ops.Gpu(90, True, True, True, 227 * 1024, 132, 32, 15, 7)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def picture():
    """The paths that the picture of folders shows, relative to the repository."""
    lines = re.search(r"<!-- folders: begin -->\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]
    paths, parents = [], []
    for line in lines.splitlines():
        names = re.match(r" *((?:[\w.*/-]+(?:, )?)+)", line)[1]
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names.split(", "):
            del parents[depth:]
            paths.append("".join(parents) + name)
        if names.endswith("/"):
            parents.append(names)
    return paths


PATHS = picture()


@pytest.mark.parametrize("path", PATHS)
def test_what_the_picture_shows_is_there(path):
    assert list(ROOT.glob(path.rstrip("/")))


def test_the_picture_shows_every_folder():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    tracked = subprocess.run(
        [git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {f"{folder}/" for path in tracked for folder in Path(path).parents[:-1]}
    assert folders - set(PATHS) == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", CONTRIBUTING))))
def test_named_tests_exist(name):
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests/ops").glob("test_*.py")]
    assert any(f"def {name}(" in text for text in tests)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([\w-]+(?:/[\w.-]+)+/?)`", CONTRIBUTING)))
)
def test_named_paths_exist(name):
    if not re.search("NAME", name):  # what a reader would add
        assert any(
            (ROOT / top / name).exists()
            for top in ("", "sb_fast_sligru", "cuda_ops", "cuda_ops/light_gru")
        )


FILES = sorted(set(re.findall(r"`([\w-]+\.(?:py|h|cuh?|cpp|md))`", CONTRIBUTING)))


@pytest.mark.parametrize("name", [name for name in FILES if "NAME" not in name])
def test_files_named_without_their_folder_exist(name):
    folders = [ROOT / top for top in ("cuda_ops", "sb_fast_sligru", "recipes")]
    assert (ROOT / name).exists() or any(any(folder.rglob(name)) for folder in folders)


def test_the_numbers_of_the_batch():
    """They are the choice of a kernel on an H200."""
    clusters, blocks, rows = re.search(
        r"`wide`: (\d+) clusters of (\d+) blocks, (\d+) rows each", CONTRIBUTING
    ).groups()
    choice = ops.choose_kernel(H200, 1024, 48, torch.bfloat16, "forward")
    assert (choice.kernel, choice.group, choice.rows) == ("wide", int(blocks), int(rows))
    assert int(clusters) * choice.rows == 48
    assert ops.choose_kernel(H200, 1024, 48, torch.bfloat16, "backward").kernel == "wide"


def test_the_table_of_kernels_is_that_of_the_library():
    """Each line is taken by a layer of its largest H, with so few rows or so many that it is."""
    readme = (ROOT / "cuda_ops/README.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| `(\w+)` \| (16-bit|float32) \| to (\d+) \| (\d+) \| (\d+) \| (\d+) \|", readme, re.M
    )
    said = {(name, kind, *map(int, numbers)) for name, kind, *numbers in lines}
    taken = set()
    for kind, dtype in (("16-bit", torch.bfloat16), ("float32", torch.float32)):
        for hidden in (128, 256, 512, 1024):
            for rows in (28, 128, 280):  # that fill clusters
                choice = ops.choose_kernel(H200, hidden, rows, dtype, "forward")
                taken.add((choice.kernel, kind, hidden, *choice[1:4]))
    most = {}
    for *key, rows in taken:
        most[tuple(key)] = max(rows, most.get(tuple(key), 0))
    assert said == {(*key, rows) for key, rows in most.items()}


def test_the_table_of_kernels_without_clusters_is_that_of_the_library():
    """With as much shared memory as an H200 has, and with as little as an RTX 3090."""
    readme = (ROOT / "cuda_ops/README.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| `l2`( \*)? \| (16-bit|float32) \| to (\d+) \| H / (\d+) \| (\d+) \| (\d+) "
        r"\| (?:nothing|(\d+) KB) \|$",
        readme,
        re.M,
    )
    of_a_row = re.search(
        r"([\d.]+) KB with 64 units, ([\d.]+) KB with 32, ([\d.]+) KB with 16,", readme
    ).groups()
    of_a_row = dict(zip((64, 32, 16), map(float, of_a_row), strict=True))

    def choose(kind, hidden, rows, kilobytes, direction):
        gpu = H200._replace(has_cluster_code=False, shared_bytes=int(1024 * kilobytes))
        dtype = {"16-bit": torch.bfloat16, "float32": torch.float32}[kind]
        return ops.choose_kernel(gpu, hidden, rows, dtype, direction)

    taken = {}
    sizes = [("16-bit", hidden) for hidden in (256, 512, 1024, 2048)]
    sizes += [("float32", hidden) for hidden in (512, 1024)]
    for (kind, hidden), kilobytes, direction in itertools.product(
        sizes, (227, 99), ("forward", "backward")
    ):
        # Of 132 multiprocessors one wave serves as many rows as fit a group; 1000 rows fill it.
        choice = choose(kind, hidden, 1000, kilobytes, direction)
        assert choice.kernel == "l2" and choice.group == hidden // choice.units
        line = kind, hidden, choice.units, choice.rows
        taken.setdefault(line, set()).add((kilobytes, direction))

    said = set()
    for star, kind, hidden, divisor, units, rows, kept in lines:
        assert divisor == units
        line = kind, *map(int, (hidden, units, rows))
        said.add(line)
        assert (taken[line] == {(227, "forward")}) == bool(star)
        if not star:  # it needs what is kept of U and a row
            _, hidden, units, _ = line
            for part, fits in ((1, True), (0.5, False)):
                kilobytes = int(kept or 0) + part * of_a_row[units]
                assert (choose(kind, hidden, 1, kilobytes, "backward").units == units) == fits
    assert said == taken.keys()
