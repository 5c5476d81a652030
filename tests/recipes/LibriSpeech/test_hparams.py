"""The YAML files: they and the Python files name the same keys, also in the README."""

import ast
import re

import pytest
import ruamel.yaml
from helpers import ROOT
from speechbrain.utils.run_opts import RunOptions

HPARAMS = ROOT / "hparams"
RECIPES = ROOT / "recipes/LibriSpeech"
TRAINING = RECIPES / "sligru_recipes/training"
README = RECIPES / "README.md"
FOR_ALL = ("brain.py", "experiment.py")
FOR_ASR = (*FOR_ALL, "data.py", "tokenizer.py", "recogniser.py")
# YAML -> the files that use its keys, and those that use some of them
YAMLS = {
    "librispeech_ctc.yaml": ((*FOR_ASR, "ctc.py"), ()),
    "librispeech_ctc_streaming.yaml": ((*FOR_ASR, "ctc.py"), ()),
    "librispeech_seq2seq.yaml": ((*FOR_ASR, "seq2seq.py"), ()),
    "librispeech_lm.yaml": ((*FOR_ALL, "language_model.py"), ("data.py", "tokenizer.py")),
}
RUN_OPTIONS = set(RunOptions().keys())
# What the recognisers' YAMLs have both, but not alike.
MEANT_TO_DIFFER = {
    "output_folder": "each recipe has its own",
    "modules": "seq2seq has a decoder too",
    "model": "seq2seq has a decoder too",
    "wav_augment": "seq2seq adds to a batch, as SpeechBrain's configuration does; CTC replaces it",
}
STREAMING = {
    "output_folder": "each recipe has its own",
    "compute_features": "a stream does not know its loudest frame",
    "rnn_bidirectional": "nor its end",
    "cnn_channels": "a chunk must not take a CPU longer than it lasts",
    "rnn_neurons": "likewise",
}


def yaml_keys(name):
    return set(ruamel.yaml.YAML().load((HPARAMS / name).read_text(encoding="utf-8")))


def values(name):
    """Key -> the text of its value, without comments."""
    text = (HPARAMS / name).read_text(encoding="utf-8")
    text = re.sub(r"^\s*(#.*)?\n|\s+#.*$", "", text, flags=re.MULTILINE)
    return dict(re.findall(r"^(\w+):(.*\n(?:[ -].*\n)*)", text, re.MULTILINE))


def test_recognisers_share_their_values():
    ctc, seq2seq = map(values, ("librispeech_ctc.yaml", "librispeech_seq2seq.yaml"))
    assert ctc.keys() == yaml_keys("librispeech_ctc.yaml")
    assert seq2seq.keys() == yaml_keys("librispeech_seq2seq.yaml")
    different = {key for key in ctc.keys() & seq2seq.keys() if ctc[key] != seq2seq[key]}
    assert different == MEANT_TO_DIFFER.keys()


def test_the_streaming_recogniser_is_the_other_but_for_what_streams_need():
    names = ("librispeech_ctc.yaml", "librispeech_ctc_streaming.yaml")
    ctc, streaming = map(values, names)
    assert ctc.keys() == streaming.keys() == yaml_keys(names[1])
    assert {key for key in ctc if ctc[key] != streaming[key]} == STREAMING.keys()


@pytest.mark.parametrize("recipe", ["ctc", "seq2seq"])
@pytest.mark.parametrize("size", ["mini", "medium"])
def test_override_files_override_what_there_is(recipe, size):
    name = f"librispeech_{recipe}.yaml"
    assert yaml_keys(f"librispeech_{recipe}_{size}.yaml") <= yaml_keys(name)


def used_names(files):
    """What Python files can name a key by."""
    for file in files:
        for node in ast.walk(ast.parse((TRAINING / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Attribute):
                yield node.attr


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_key_is_used(name):
    references = set(re.findall(r"<(\w+)>", (HPARAMS / name).read_text(encoding="utf-8")))
    whole, partly = YAMLS[name]
    used = references | set(used_names(whole + partly)) | RUN_OPTIONS | {"__set_seed"}
    assert yaml_keys(name) - used == set()


@pytest.mark.parametrize("name", YAMLS)
def test_every_used_key_is_in_the_yaml(name):
    used = set()
    for file in YAMLS[name][0]:
        source = (TRAINING / file).read_text(encoding="utf-8")
        for pair in re.findall(r'hparams\["(\w+)"\]|hparams\.(?!get\b)(\w+)', source):
            used.update(filter(None, pair))
    assert len(used) > 15
    if "bos_index" not in yaml_keys(name):  # data.py then does without
        used -= {"bos_index", "eos_index"}
    if "dynamic_batching" not in yaml_keys(name):  # nor are they checked
        used -= {"dynamic_batch_sampler"}
    if "ctc_cost" not in yaml_keys(name):
        used -= {"blank_index"}
    assert used - yaml_keys(name) == set()


# The README


def test_readme_names_what_exists():
    text = README.read_text(encoding="utf-8")
    paths = set(re.findall(r"\b(?:hparams|recipes/LibriSpeech)/[\w./-]+\.(?:yaml|py)", text))
    assert {"hparams/librispeech_ctc.yaml", "recipes/LibriSpeech/train_ctc.py"} <= paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    links = re.findall(r"\]\(([^):]+)\)", text)
    assert [link for link in links if not (RECIPES / link).exists()] == []
    torchrun = {"standalone", "nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port"}
    known = RUN_OPTIONS | torchrun | {"overrides"}
    known = known.union(*map(yaml_keys, YAMLS))
    for script in RECIPES.glob("*.py"):
        known.update(re.findall(r'"--([\w-]+)"', script.read_text(encoding="utf-8")))
    assert set(re.findall(r"--(\w[\w-]*)", text)) - known == set()
