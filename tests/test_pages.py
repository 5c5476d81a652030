"""README.md and docs/*.md: every code block runs or is checked, every link leads somewhere."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from hyperpyyaml import load_hyperpyyaml
from pages import (
    PAGES,
    blocks,
    blocks_of,
    broken_links,
    check_command,
    commands_of,
    read,
    versions_of_yaml,
)

from sb_fast_sligru.reference import relative_error

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.usefixtures("one_thread")

LANGUAGES = {"bash", "cpp", "diff", "python", "text", "toml", "yaml"}
EXPORT = "docs/export.md"  # has C++, and a program to build from it


def pages_with(*languages):
    return [page for page in PAGES if any(blocks(page, language) for language in languages)]


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {page: {block.language for block in blocks_of(read(page))} for page in PAGES}
    assert {page: found - LANGUAGES for page, found in kinds.items() if found - LANGUAGES} == {}
    assert pages_with("cpp") == [EXPORT]


@pytest.mark.parametrize(
    "text, languages",
    [
        ("```python\nx = 1\n```\n", ["python"]),
        ("a\n\n```\nx\n```\n", [""]),
        ("a\n\n    make test\n    make lint\n\nb\n", ["indented"]),
        ("```console\n$ ls\n\n    x\n```\n\n    y\n", ["console", "indented"]),
        ("- a\n  b\n", []),
    ],
)
def test_blocks_are_found(text, languages):
    assert [block.language for block in blocks_of(text)] == languages


@pytest.mark.parametrize("page", pages_with("text"))
def test_drawings_fit_a_page(page):
    for block in blocks(page, "text"):
        assert "\t" not in block
        assert max(map(len, block.splitlines())) <= 100


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


# ---- Python, in order in one namespace a page


def is_run_here(block):
    """GPU code has a test of its own; `out.onnx` is a trained recogniser's, in tests/recipes."""
    return '"cuda"' not in block and "out.onnx" not in block


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=(pytest.mark.slow, pytest.mark.inductor) if page == EXPORT else ())
        for page in pages_with("python")
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.(jit|ao.quantization):DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in filter(is_run_here, blocks(page, "python")):
        exec(block, names)
    if page in RESULTS:
        RESULTS[page](names, capsys.readouterr().out)


def check_front_page(names, printed):
    assert "rnn_class: !name:sb_fast_sligru.SLiGRU " in blocks("README.md", "yaml")[0]
    assert list(names["output"].shape) == [8, 100, 512]
    assert list(names["hidden"].shape) == [4, 8, 256]
    assert names["net"].rnn[0].u.weight.grad.abs().sum() > 0


def check_export(names, printed):
    with torch.no_grad():
        expected = names["encoder"](names["features"])
    for name in ("states", "same_states", "onnx_states"):
        assert relative_error(torch.as_tensor(names[name]), expected) < 1e-5, name
    assert relative_error(names["quantised"](names["features"]), expected) < 0.1

    (source,), (build,) = blocks(EXPORT, "cpp"), filter(is_built, blocks(EXPORT, "bash"))
    with open("encode.cpp", "w") as file:
        file.write(source)
    run = subprocess.run(
        ["bash", "-e"],
        input=build.replace("$(python ", f"$({sys.executable} "),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, f"{list(expected.shape)}\n"), run.stderr


def check_streaming(names, printed):
    said = re.search(r"# (\d+) samples, ([\d.]+) ms", read("docs/streaming.md"))
    assert printed.split() == list(said.groups())
    shapes = [list(states.shape) for states in names["states"]]
    assert shapes[0] == [16, 0, 512] and [16, 1, 512] in shapes


def check_backends(names, printed):
    said = re.findall(r"^ *print\(.*\)  # (.*)$", read("docs/backends.md"), re.MULTILINE)
    assert said and printed.splitlines()[: len(said)] == said
    assert "rnn.0: SLiGRU_Layer, ours (act of a layer is" in printed


def check_numerics(names, printed):
    assert printed in blocks("docs/numerics.md", "text")


RESULTS = {
    "README.md": check_front_page,
    "docs/backends.md": check_backends,
    "docs/numerics.md": check_numerics,
    EXPORT: check_export,
    "docs/streaming.md": check_streaming,
}


@pytest.mark.gpu
def test_python_for_a_gpu_runs():
    names = {}
    first, *others = blocks(EXPORT, "python")
    (graphs,) = (block for block in others if '"cuda"' in block)
    exec(first, names)
    exec(graphs, names)
    assert names["encoder"].RNN.rnn[0].u.weight.grad.abs().sum() > 0


def test_no_other_page_has_python_that_needs_more():
    others = {page for page in PAGES if not all(map(is_run_here, blocks(page, "python")))}
    assert others == {EXPORT}


# ---- commands


def is_built(block):
    """What the test of the page's Python runs after it."""
    return "g++" in block


@pytest.mark.parametrize(
    "page, words",
    [
        pytest.param(page, words, id=f"{page}: {' '.join(words)[:60]}")
        for page in PAGES
        for block in blocks(page, "bash")
        if not is_built(block)
        for words in commands_of(block)
    ],
)
@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")  # pip imports it
def test_command_is_one(page, words, monkeypatch):
    check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command, message",
    [
        ("make tea", "the Makefile has no tea"),
        ("make test-wheel TRIES=1", "the Makefile has no TRIES"),
        ("python benchmarks/nothing.py", "there is no benchmarks/nothing.py"),
        ("python benchmarks/bench_rnn.py --acuracy_", "bench_rnn.py --acuracy_: 2"),
        ("python recipes/LibriSpeech/transcribe.py folder", "transcribe.py folder: 2"),
        (
            "python recipes/LibriSpeech/train_ctc.py hparams/librispeech_ctc.yaml --nothing=1",
            "nothing is neither a key",
        ),
        ("python -m sb_fast_sligru.info --columns 3", "--columns 3: 2"),
        ("python -m pytest", "no test knows python -m pytest"),
        ("python -c 1", "there is no -c"),
        ("pip install --no-such-option .", "--no-such-option .: 2"),
        ("pip install .[tea]", "there is no extra tea"),
        ("pip install torch==1.0.0", "torch==1.0.0 is not tested"),
        ("ls", "no test knows ls"),
    ],
)
def test_a_stale_command_fails(command, message, monkeypatch, capfd):
    with pytest.raises((AssertionError, ValueError), match=re.escape(message)):
        check_command(command.split(), monkeypatch)


def test_a_variable_that_nothing_reads_fails():
    with pytest.raises(AssertionError, match="nothing reads NO_TEA"):
        commands_of("NO_TEA=1 make test\n")


# ---- YAML and TOML


def implementation(value):
    """The class or function that a key of a YAML names, or whose object it is."""
    value = getattr(value, "func", value)  # of a functools.partial
    return value if callable(value) and hasattr(value, "__qualname__") else type(value)


@pytest.mark.parametrize("page", pages_with("yaml", "diff"))
def test_yaml_loads(page):
    """Where a diff names another class, it is ours, and takes the weights of the one before."""
    before, after = map(load_hyperpyyaml, versions_of_yaml(page))
    assert before.keys() == after.keys()
    changed = {
        key for key in after if implementation(after[key]) is not implementation(before[key])
    }
    lines = re.findall(r"^\+(\w+):", "".join(blocks(page, "diff")), re.MULTILINE)
    assert sorted(changed) == sorted(lines)
    for key in changed:
        ours, stock = implementation(after[key]), implementation(before[key])
        assert ours.__module__.startswith("sb_fast_sligru."), key
        if isinstance(ours, type):
            assert issubclass(ours, stock), key
        if isinstance(after[key], torch.nn.Module):
            after[key].load_state_dict(before[key].state_dict())


@pytest.mark.parametrize("page", pages_with("toml"))
def test_toml_is_of_the_tested_versions(page):
    pins = read("requirements.txt").split()
    for block in blocks(page, "toml"):
        tomllib.loads(block)
        pairs = re.findall(r'"([\w-]+==[^"]+)"', block)
        assert pairs and set(pairs) <= set(pins)
