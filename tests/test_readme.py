"""What the README tells the reader to run or to look at is there and works."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# `name` in backquotes that looks like a path: it has a slash, or ends as our files do.
PATHS = sorted(
    {
        name
        for name in re.findall(r"`([\w./-]+)`", README)
        if re.search(r"^[\w.-]+/[\w./-]*$|^\w+\.(md|txt|py|cpp)$|^LICENSE$", name)
    }
)
# Files that the text names by their bare name lie in one of these.
FOLDERS = ["", "cuda_ops", "recipes/LibriSpeech"]


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippets_run_in_order():
    names = {}
    blocks = code_blocks("python")
    for block in blocks:
        exec(block, names)
    assert list(names["output"].shape) == [8, 100, 512]
    assert list(names["hidden"].shape) == [4, 8, 256]
    assert names["net"].rnn[0].u.weight.grad.abs().sum() > 0


def test_yaml_line():
    from hyperpyyaml import load_hyperpyyaml

    import sb_fast_sligru

    (block,) = code_blocks("yaml")
    assert load_hyperpyyaml(block)["rnn_class"] is sb_fast_sligru.SLiGRU


@pytest.mark.parametrize("path", PATHS)
def test_named_file_exists(path):
    assert any((ROOT / folder / path).exists() for folder in FOLDERS)


def test_named_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", README))
    assert {"demo", "test", "test-gpu", "lint"} <= named
    assert named <= targets
