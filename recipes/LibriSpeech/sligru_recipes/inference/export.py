"""The inference folder of a run: weights, tokenizer, and a YAML derived from the run's own."""

import csv
import io
import os
import re
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.error import YAMLError
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.logger import get_logger

from ..training.checkpoints import average_model, checkpoints_to_test

logger = get_logger(__name__)

HEADER = (
    "# SpeechBrain's inference YAML, made by export_inference.py from the YAML of the training\n"
)
# What joins the run's own description of the model, by the recipe that trained it.
CTC = """
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    enc: !ref <enc>
    ctc_lin: !ref <ctc_lin>
    log_softmax: !ref <log_softmax>

modules:
    encoder: !ref <encoder>
    normalize: !ref <normalize>  # on its own too: else its statistics stay on the CPU
"""
SEQ2SEQ = """
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    enc: !ref <enc>

scorer: !new:speechbrain.decoders.scorer.ScorerBuilder
    full_scorers: [!ref <coverage_scorer>]
    partial_scorers: [!ref <ctc_scorer>]
    weights:
        coverage: !ref <coverage_penalty>
        ctc: !ref <ctc_weight_decode>

modules:
    encoder: !ref <encoder>
    decoder: !ref <test_search>
    normalize: !ref <normalize>  # on its own too: else its statistics stay on the CPU,
    model: !ref <model>  # and so would the scorers' weights
"""
COMMON = """
tokenizer: !new:sentencepiece.SentencePieceProcessor

audio_normalizer: !new:speechbrain.dataio.preprocess.AudioNormalizer
    sample_rate: !ref <sample_rate>

pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:  # KEY.ckpt in this folder
        model: !ref <model>
        normalizer: !ref <normalize>
        tokenizer: !ref <tokenizer>
    custom_hooks:  # SpeechBrain's default would leave what does not fit at random values
        model: !name:speechbrain.utils.checkpoints.torch_recovery
            end_of_epoch: True
"""


def export(run_folder, folder=None):
    """Write the inference folder of a run.

    Arguments
    ---------
    run_folder : str or Path
        `output_folder` of train_ctc.py or train_seq2seq.py, with at least one finished epoch.
    folder : str or Path, optional
        Made if absent; files of an earlier export are replaced. RUN_FOLDER/inference by default.

    Returns
    -------
    Path
        The folder. It has hyperparams.yaml, model.ckpt, normalizer.ckpt, tokenizer.ckpt, and
        lm.ckpt if the run decoded with a language model.

    Raises
    ------
    FileExistsError
        If `folder` is the run's own or among its checkpoints, or files that no export made are in
        the way.
    FileNotFoundError
        If `run_folder` is no run's, or has no finished epoch, or a file is missing.
    """
    run_folder = Path(run_folder)
    folder = run_folder / "inference" if folder is None else Path(folder)
    run_yaml, hparams = _read_yaml(run_folder)
    save_folder = _moved(run_folder, hparams, "save_folder")
    if not save_folder.is_dir():
        raise FileNotFoundError(f"{save_folder} has no checkpoint of a finished epoch")
    count = hparams.get("avg_checkpoints", 1)  # runs of before that key have none
    checkpoints = checkpoints_to_test(Checkpointer(save_folder), "WER", count)
    checkpoint = checkpoints[0]
    files = {
        "model.ckpt": checkpoint.paramfiles["model"],
        "normalizer.ckpt": checkpoint.paramfiles["normalizer"],
        "tokenizer.ckpt": _find_tokenizer(save_folder, hparams),
    }
    entries = _entries(run_yaml)
    if "test_search" in entries:
        inference = YAML().load(SEQ2SEQ + COMMON)
        _build(entries, "test_search", scorer="scorer")
        if hparams["lm_folder"]:
            _add_language_model(inference, entries)
            files["lm.ckpt"] = Path(hparams["lm_folder"], "lm.ckpt")
    else:
        inference = YAML().load(CTC + COMMON)
    text = io.StringIO()
    YAML().dump(inference, text)
    text = HEADER + _needed(entries, text.getvalue()) + "\n" + text.getvalue()
    text += _longest_utterance(_moved(run_folder, hparams, "train_csv"))
    is_export = _check_target(folder, run_folder, save_folder, ["hyperparams.yaml", *files])
    _write(folder, text, files, average_model(checkpoints) if count > 1 else None)
    if is_export and "lm.ckpt" not in files:
        Path(folder, "lm.ckpt").unlink(missing_ok=True)  # of the earlier export
    return folder


def _read_yaml(run_folder):
    """The YAML of a run, as text and as a dict with its references filled in."""
    path = run_folder / "hyperparams.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{run_folder} is not the folder of a run: no hyperparams.yaml")
    text = path.read_text(encoding="utf-8")
    try:
        hparams = YAML().load(resolve_references(text))
    # A reference to nothing, or a YAML without keys, has one of the others.
    except (AttributeError, LookupError, TypeError, ValueError, YAMLError) as error:
        raise FileNotFoundError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(hparams, dict) or "save_folder" not in hparams:
        raise FileNotFoundError(f"{run_folder} is not the folder of a run: no key save_folder")
    return text, hparams


def _moved(run_folder, hparams, key):
    """A path of the run, which may have been moved since."""
    relative = os.path.relpath(hparams[key], hparams["output_folder"])
    path = run_folder / relative
    outside = relative.startswith(os.pardir) and not path.exists()
    return Path(hparams[key]) if outside else path


def _longest_utterance(manifest):
    try:
        with open(manifest, newline="", encoding="utf-8") as file:
            seconds = max(float(row["duration"]) for row in csv.DictReader(file))
    except (KeyError, OSError, ValueError):
        logger.warning(
            "No durations in %s: transcribe.py will not know which recordings are too long",
            manifest,
        )
        return ""
    return f"\nlongest_train_utterance: {seconds}  # s; attention fails beyond it\n"


def _check_target(folder, run_folder, save_folder, names):
    """Refuse folders of something else; tells whether there is an earlier export."""
    target = folder.resolve()
    save_folder = save_folder.resolve()
    if target == run_folder.resolve():
        raise FileExistsError(f"{folder} is the folder of the run itself: choose another")
    if save_folder in (target, *target.parents):
        raise FileExistsError(f"{folder} is for the run's checkpoints: choose another")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{folder} is not a folder")
    yaml = target / "hyperparams.yaml"
    if yaml.is_file() and yaml.read_bytes().startswith(HEADER.encode()):
        return True
    for name in names:
        if os.path.lexists(target / name):
            raise FileExistsError(f"{folder} has a {name} that no export made: choose another")
    return False


def _write(folder, yaml, files, model):
    """Fill a folder beside it first: what a full disk ends has lost nothing."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        path = Path(temporary, "hyperparams.yaml")
        path.write_text(yaml, encoding="utf-8", newline="\n")
        for name, source in files.items():
            shutil.copyfile(source, path.with_name(name))
        if model is not None:
            torch.save(model, path.with_name("model.ckpt"))
        folder.mkdir(exist_ok=True)
        for name in (path.name, *files):  # the YAML tells that the folder is an export
            os.replace(path.with_name(name), folder / name)


def _find_tokenizer(save_folder, hparams):
    # Its name tells the size that was asked for, which can be more than it has.
    for path in save_folder.glob(f"*_{hparams['token_type']}.model"):
        size = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
        if size == hparams["vocab_size"]:
            return path
    raise FileNotFoundError(f"{save_folder} has no tokenizer of {hparams['vocab_size']} tokens")


def _entries(run_yaml):
    """Key -> its lines in a run's YAML, without comment lines."""
    lines = re.sub(r"^\s*(#.*)?\n", "", run_yaml, flags=re.MULTILINE)
    found = re.findall(r"^((\w+):.*\n(?:[ -].*\n)*)", lines, re.MULTILINE)
    return {key: entry for entry, key in found}


def _build(entries, key, **arguments):
    """Let an entry build the object whose class, or `build`, it names for the recipe."""
    is_function = re.match(r"\w+: *!name:[\w.]+\.build\b", entries[key])
    entries[key] = entries[key].replace("!name:", "!apply:" if is_function else "!new:", 1)
    for name, reference in arguments.items():
        entries[key] += f"  {name}: !ref <{reference}>\n"


def _add_language_model(inference, entries):
    _build(entries, "lm_model")
    _build(entries, "rnnlm_scorer", language_model="lm_model")
    language_model = TaggedScalar("<lm_model>", tag="!ref")
    inference["scorer"]["full_scorers"].append(TaggedScalar("<rnnlm_scorer>", tag="!ref"))
    inference["scorer"]["weights"]["rnnlm"] = TaggedScalar("<lm_weight>", tag="!ref")
    inference["modules"]["lm"] = language_model
    inference["pretrainer"]["loadables"]["lm"] = language_model
    hooks = inference["pretrainer"]["custom_hooks"]
    hooks["lm"] = hooks["model"]


def _needed(entries, inference):
    """The lines of all keys that the inference YAML refers to, directly or by others.

    And of the function by which SpeechBrain's EncoderASR decodes.
    """
    needed, missing = set(), [inference, "<decoding_function>"]
    while missing:
        keys = set(re.findall(r"<(\w+)>", missing.pop())) & entries.keys()
        missing += [entries[key] for key in keys - needed]
        needed |= keys
    return "".join(lines for key, lines in entries.items() if key in needed)
