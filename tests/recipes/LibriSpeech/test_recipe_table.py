"""Every row of tests/recipes/LibriSpeech.csv, the table of recipes as SpeechBrain keeps it.

A row names a script, a YAML, what to add to the command line, and what must hold afterwards:
`file_exists=[FILE,...]` in the output folder, `performance_check=[FILE, VARIABLE, COMPARISON,
epoch: N]` for the value in the line of that epoch, N = -1 for the last line. Either a few
utterances of the embedded corpus are learnt by heart, or `--debug` runs all that a YAML has. The
audio is synthesised here, so data and output folder are not in the table.
"""

import csv
import importlib
import operator
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT

from sligru_recipes.corpora.embedded import make_corpus

pytestmark = pytest.mark.usefixtures("environment_described_once", "one_thread")

with open(ROOT / "tests/recipes/LibriSpeech.csv", newline="", encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table))
COMPARISONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


def overrides(row):
    return re.findall(r"--overrides=(\S+)", row["test_debug_flags"])


def row_name(row):
    yaml = Path(*(overrides(row) or [row["Hparam_file"]])).stem
    return f"{yaml}{'-debug' * ('--debug' in row['test_debug_flags'])}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four utterances: dev and test split have each once, the train split four times.

    Fewer epochs are then enough, and what takes place once in an epoch takes less time.
    """
    folder = tmp_path_factory.mktemp("corpus with spaces")
    train, dev, test = (folder / split for split in ("train-clean-100", "dev-clean", "test-clean"))
    make_corpus(folder, {train.name: (1, 4)})
    shutil.copytree(train, dev)
    shutil.copytree(train, test)
    (spoken,) = dev.iterdir()
    for speaker in ("1", "2", "3"):
        for path in spoken.glob("*/*"):
            copy = train / speaker / path.parent.name / path.name.replace(spoken.name, speaker, 1)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            if path.suffix == ".txt":
                content = re.sub(rb"(?m)^%b" % spoken.name.encode(), speaker.encode(), content)
            copy.write_bytes(content)
    return folder


def test_table_has_all_recipes():
    """Each script is run to learn something, and each YAML with --debug."""
    scripts = {path.name for path in (ROOT / "recipes/LibriSpeech").glob("train_*.py")}
    yamls = {f"hparams/{path.name}" for path in (ROOT / "hparams").glob("*.yaml")}
    debug = [row for row in ROWS if "--debug" in row["test_debug_flags"]]
    learn = [row for row in ROWS if "performance_check" in row["test_debug_checks"]]
    assert {Path(row["Script_file"]).name for row in learn} == scripts
    assert {yaml for row in debug for yaml in overrides(row) or [row["Hparam_file"]]} == yamls
    assert len(debug) + len(learn) == len(ROWS)
    for row in ROWS:
        for column in ("Script_file", "Hparam_file", "Data_prep_file", "Readme_file"):
            assert (ROOT / row[column]).is_file(), row[column]


@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_recipe(row, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "output with spaces"
    folders = (f"--data_folder={corpus}", f"--output_folder={output}")
    flags = shlex.split(row["test_debug_flags"])
    script = importlib.import_module(Path(row["Script_file"]).stem)
    script.main([row["Hparam_file"], *folders, "--device=cpu", "--noprogressbar", *flags])
    checks = row["test_debug_checks"]
    for name in re.search(r"file_exists=\[(.*?)\]", checks)[1].split(","):
        assert (output / name).stat().st_size > 0, name
    for check in re.findall(r"performance_check=\[(.*?)\]", checks):
        file, variable, comparison, epoch = check.split(", ")
        *_, last = lines = (output / file).read_text().splitlines()
        line = last if epoch == "epoch: -1" else next(x for x in lines if x.startswith(f"{epoch},"))
        value = float(re.search(rf"{variable}: ([\d.e+-]+)", line)[1])
        assert COMPARISONS[comparison[:2]](value, float(comparison[2:])), f"{check}: {value}"
