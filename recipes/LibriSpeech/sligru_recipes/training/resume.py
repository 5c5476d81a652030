"""Whether a run can go on from its checkpoint with the keys that it is given now.

A checkpoint's metadata has the `settings` of the run that saved it: for each key of the YAML its
value as text, overrides and references included, long ones as a digest. `check_resume` compares
them before anything is prepared or written.
"""

import filecmp
import hashlib
import io
import json
import re
from pathlib import Path

import ruamel.yaml
import torch
from hyperpyyaml import resolve_references
from hyperpyyaml.core import recursive_update

from .checkpoints import LOAD_ERRORS, reason_of

LONGEST_VALUE = 200  # characters
# A checkpoint would go on to mean the old ones, whatever is written in the YAML.
FIXED = (
    "token_type",
    "vocab_size",
    "character_coverage",
    "blank_index",
    "bos_index",
    "eos_index",
    "pretrained_folder",
)
# Classes whose checkpoints are each other's, the numbers included.
SAME_OPTIMISER = {"!name:sb_fast_sligru.Adadelta": "!name:torch.optim.Adadelta"}
FITTED_SIZE = "fitted vocab_size"  # of the tokenizer, where the text could not fill vocab_size


def with_overrides(hparams_file, overrides):
    """A YAML with its overrides in their places, as text; references stay, for later overrides."""
    yaml, text = ruamel.yaml.YAML(), io.StringIO()
    with open(hparams_file, encoding="utf-8") as file:
        keys = yaml.load(file)
    recursive_update(keys, overrides)
    yaml.dump(keys, text)
    return text.getvalue()


def resolve(hparams_file, overrides):
    """A YAML with its overrides and references filled in, as text; objects are not built.

    Raises
    ------
    ValueError
        If a !PLACEHOLDER is left.
    """
    with open(hparams_file, encoding="utf-8") as file:
        return resolve_references(file, overrides).getvalue()


def describe(hparams_file, overrides):
    """The settings that a checkpoint notes: key -> value as text, or the digest of a long one."""
    settings = {}
    for key, value in ruamel.yaml.YAML().load(resolve(hparams_file, overrides)).items():
        text = json.dumps(_plain(value))
        if len(text) > LONGEST_VALUE:
            text = hashlib.sha256(text.encode()).hexdigest()
        settings[key] = text
    return settings


def _plain(node):
    """A YAML node without comments and ways of writing it, but with its tag."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if isinstance(node, dict):
        value = {str(key): _plain(item) for key, item in node.items()}
    elif isinstance(node, list):
        value = [_plain(item) for item in node]
    elif isinstance(node, ruamel.yaml.comments.TaggedScalar):
        value = node.value
    elif node is None or isinstance(node, bool | int | float):
        value = node
    else:
        value = str(node)
    return {tag: value} if tag else value


def changed_keys(before, now, references=None):
    """Keys of other values than before, where both have them; only those that were set.

    Arguments
    ---------
    before, now : dict
        Settings as `describe` returns them.
    references : dict, optional
        Key -> keys that its value refers to, as `find_references` returns them: a key that is
        other because one that it refers to is, is left out.
    """
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    if references is None:
        return changed
    return {key for key in changed if not references.get(key, set()) & changed}


def find_references(hparams_file, overrides):
    """Key -> the keys of the YAML that its value refers to."""
    yaml, found = ruamel.yaml.YAML(), {}
    with open(hparams_file, encoding="utf-8") as file:
        entries = yaml.load(file)
    for key, value in {**entries, **overrides}.items():
        text = io.StringIO()
        yaml.dump({key: value}, text)
        found[key] = set(re.findall(r"<(\w+)>", text.getvalue())) & entries.keys()
    return found


def check_resume(checkpoint, settings, references, hparams, load_model, folder):
    """Refuse settings that the checkpoint does not fit.

    Arguments
    ---------
    checkpoint : speechbrain.utils.checkpoints.Checkpoint
        The newest of the run.
    settings, references : dict
        Of the command line.
    hparams : dict
    load_model : callable
        Takes a vocab_size and returns the model of the YAML with it, a torch.nn.Module.
    folder : str
        Output folder, for messages.

    Returns
    -------
    str
        The settings that are others than the checkpoint's, "" if there are none.

    Raises
    ------
    ValueError
        Names the keys, what they were and what they are.
    """
    before = checkpoint.meta.get("settings", {})
    changed = changed_keys(before, settings, references)

    def tell(keys):
        return ", ".join(
            f"{key} was {_short(before[key])}, now {_short(settings[key])}" for key in sorted(keys)
        )

    if settings["vocab_size"] == before.get(FITTED_SIZE):
        changed.discard("vocab_size")  # its hyperparams.yaml has that size
    refused = {key for key in FIXED if key in changed}
    if "opt_class" in changed and _optimiser(before) != _optimiser(settings):
        refused.add("opt_class")
    in_model = changed & _reachable("model", references)
    if in_model:
        size = json.loads(before.get(FITTED_SIZE, settings["vocab_size"]))
        if not _fits(load_model(size), checkpoint.paramfiles["model"]):
            refused |= in_model
    if refused:
        raise ValueError(
            f"output_folder {folder} has a run with other settings, which its checkpoint cannot "
            f"go on with ({tell(refused)}): set them back, or choose another output_folder"
        )
    given = hparams["tokenizer_file"]
    models = list(Path(hparams["save_folder"]).glob(f"*_{hparams['token_type']}.model"))
    if given and models and not any(filecmp.cmp(given, path, shallow=False) for path in models):
        raise ValueError(
            f"tokenizer_file {given} is not the tokenizer that the run in output_folder {folder} "
            "was trained with: choose another output_folder"
        )
    return tell(changed)


def _load(text):
    """A value that `describe` returned, with {tag: arguments} for an object."""
    try:
        return json.loads(text)
    except ValueError:
        return "another"  # a digest


def _optimiser(settings):
    value = _load(settings["opt_class"])
    name = next(iter(value)) if isinstance(value, dict) else value
    return SAME_OPTIMISER.get(name, name)


def _short(text):
    value = _load(text)
    if isinstance(value, dict) and not any(value.values()):
        return next(iter(value))  # a class without arguments
    return value if isinstance(value, str) else text


def _reachable(key, references):
    found, ahead = set(), [key]
    while ahead:
        key = ahead.pop()
        if key not in found:
            found.add(key)
            ahead += references.get(key, ())
    return found


def _fits(model, file):
    try:
        saved = torch.load(file, map_location="meta")
    except LOAD_ERRORS as error:
        raise ValueError(f"{file} is damaged: {reason_of(error)}") from error
    own = model.state_dict()
    return own.keys() == saved.keys() and all(own[key].shape == saved[key].shape for key in own)
