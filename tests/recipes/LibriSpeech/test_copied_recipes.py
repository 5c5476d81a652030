"""The recipes in another project: copies of their folder and of hparams/ run there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from tiny_corpora import make_noise

import sb_fast_sligru

# Runs a script as Python does, then tells what of the package is imported and from where.
RUN = """
import json, runpy, sys
from pathlib import Path
script, files, *_ = sys.argv[1:]
sys.argv = sys.argv[1:2] + sys.argv[3:]
sys.path[0] = str(Path(script).parent)

def imported():
    return [m.__file__ for name, m in sys.modules.items() if name.startswith("sligru_recipes")]

runpy.run_path(script, run_name="__main__")
trained = imported()
from sligru_recipes.epoch_time import comparison
Path(files).write_text(json.dumps({"training": trained, "all": imported(), "path": sys.path}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with copies of recipe and YAMLs, in which a training has run."""
    folder = tmp_path_factory.mktemp("another project")
    shutil.copytree(
        ROOT / "recipes/LibriSpeech",
        folder / "asr/recipe",
        ignore=shutil.ignore_patterns("__pycache__", "results", "data"),
    )
    shutil.copytree(ROOT / "hparams", folder / "hparams")
    make_noise(folder / "corpus", [0.8] * 4)
    command = [
        *(sys.executable, "-c", RUN, "asr/recipe/train_ctc.py", "files.json"),
        "hparams/librispeech_ctc.yaml",
        "--overrides=hparams/librispeech_ctc_mini.yaml",
        "--data_folder=corpus",
        "--output_folder=results",
        *("--debug", "--debug_epochs=1", "--device=cpu", "--noprogressbar"),
        *("--rnn_layers=1", "--rnn_neurons=8", "--dnn_neurons=16"),
        "--token_type=char",
    ]
    # Where sb_fast_sligru is imported from, installed or not.
    environment = {**os.environ, "PYTHONPATH": str(Path(sb_fast_sligru.__file__).parents[1])}
    environment["OMP_NUM_THREADS"] = "1"
    run = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def told(project):
    return json.loads((project / "files.json").read_text())


def test_copy_runs_without_the_repository_s_recipes(project, told):
    assert [path for path in told["path"] if Path(path).is_relative_to(ROOT / "recipes")] == []
    assert "epoch_time/comparison.py" in " ".join(told["all"])
    for file in told["all"]:
        assert Path(project, file).is_relative_to(project / "asr/recipe/sligru_recipes")
    assert "test WER" in (project / "results/train_log.txt").read_text()


def test_run_saves_what_was_run(project, told):
    """The script, all it imported of the package, and the YAML of overrides: nothing else."""
    recipe, results = project / "asr/recipe", project / "results"
    expected = {Path(project, file).relative_to(recipe) for file in told["training"]}
    assert Path("sligru_recipes/training/checkpoints.py") in expected  # imported by the YAML
    assert Path("sligru_recipes/epoch_time/runs.py") not in expected
    expected.add(Path("train_ctc.py"))
    saved = {path.relative_to(results) for path in results.rglob("*.py")}
    assert saved == expected
    for path in saved:
        assert (results / path).read_bytes() == (recipe / path).read_bytes(), path
    overrides = project / "hparams/librispeech_ctc_mini.yaml"
    assert (results / "overrides.yaml").read_bytes() == overrides.read_bytes()
    assert {path.name for path in results.glob("*.yaml")} == {"overrides.yaml", "hyperparams.yaml"}
