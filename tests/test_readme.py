"""What the front page says, shows and tells the reader to run is there, works and was measured."""

import json
import re

import pytest
import torch
from helpers import ROOT, load
from pages import broken_links

RESULTS = ROOT / "benchmarks/results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`([\w.-]+/[\w./-]*)`", README)))
MOST_WORDS = 900


bench_report = load(ROOT / "benchmarks/bench_report.py")


def prose():
    """The text without code blocks, comments, targets of links and the generated table."""
    text = README.replace(measured(), "")
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]+\)", "]", text)


def measured():
    return re.search(f"{bench_report.BEGIN}.*{bench_report.END}", README, re.DOTALL)[0]


@pytest.mark.parametrize("path", PATHS)
def test_named_file_exists(path):
    assert (ROOT / path).exists()


def test_named_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", README))
    assert {"demo", "test", "test-gpu", "lint"} <= named
    assert named <= targets


def test_first_screen():
    """Before the first heading: the commands, the YAML line, the table, one picture."""
    front = README.partition("\n## ")[0]
    places = [front.index(what) for what in ("\nmake demo ", "```yaml", measured(), "![")]
    assert places == sorted(places)
    assert README.count("![") == 1


def test_length():
    """Words of prose and tables: what has a letter or digit, outside code and link targets."""
    text = prose() + re.sub(r"\]\([^)]+\)", "]", measured())
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= MOST_WORDS


def test_table_is_that_of_the_committed_results():
    assert measured() == bench_report.readme_block(*bench_report.read_front_page_results())


def test_figures_of_the_prose():
    """Each is computed from what is committed, and there is no other."""
    results, epochs = bench_report.read_front_page_results()
    demo = json.loads((RESULTS / "demo-epoch-time.json").read_text(encoding="utf-8"))
    wer = (RESULTS / "recipes-wer.md").read_text(encoding="utf-8")
    sentences = load(ROOT / "recipes/LibriSpeech/sligru_recipes/corpora/sentences.py")
    words = {word for slot in sentences.SLOTS for entry in slot for word in entry.split()}
    errors = {
        row["contender"]: row["errors"]
        for row in results["accuracy"]
        if row["precision"] == "fp32" and row["contender"] in ("ours-persistent", "stock-eager")
    }
    ours, stock = errors["ours-persistent"], errors["stock-eager"]
    ratios = [ours[name] / stock[name] for name in stock]
    figures = (
        bench_report.change(epochs, "SLi-GRU", "bf16"),
        bench_report.change(demo, "SLi-GRU", "fp32"),
        f"{re.search('^. CTC, by `make demo`.*? . ([0-9.]+) ', wer, re.M)[1]} % word errors",
        f"{len(words)} words",
        f"{min(ratios):.1f} to {max(ratios):.1f} times SpeechBrain's",
    )
    text = " ".join(prose().split())
    for figure in figures:
        assert text.count(figure) == 1, figure
        text = text.replace(figure, "")
    assert re.findall(r"[\d.]+ ?(?:%|x\b|ms\b|s\b|min\b|h\b|words\b|times\b)", text) == []


def test_float32_limit():
    """The least float32 that rounds to an infinite float16."""
    assert "|h| reaches 65520" in " ".join(README.split())
    assert torch.tensor(65520.0).half().isinf()
    assert torch.tensor(65520.0).nextafter(torch.tensor(0.0)).half().isfinite()


# ---- benchmarks/


def test_index_of_results():
    """It names every file, and names no other; a file with a machine in it, that machine."""
    index = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    indexed = {}
    for stem, endings, where in re.findall(
        r"^\| `([\w-]+)\.([^`]+)` \|[^|]*\| ([^|]*) \|", index, re.M
    ):
        for ending in endings.strip("{}").split(","):
            indexed[f"{stem}.{ending}"] = where
    assert set(indexed) == {path.name for path in RESULTS.iterdir()}
    for path in RESULTS.glob("*.json"):
        report = json.loads(path.read_text(encoding="utf-8"))
        for machine in [run["machine"] for run in report.get("runs", [report])]:
            assert (machine["gpu"] or machine["cpu"]) in indexed[path.name]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "benchmarks/NOTEBOOK.md"])
def test_links_lead_somewhere(page):
    assert broken_links(page) == []
