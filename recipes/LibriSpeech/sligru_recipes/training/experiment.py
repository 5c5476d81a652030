"""A recipe's command line, its YAML and its output folder."""

import contextlib
import copy
import dataclasses
import filecmp
import importlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from datetime import date
from pathlib import Path

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import (
    ddp_init_group,
    if_main_process,
    infer_device,
    run_on_main,
)
from speechbrain.utils.logger import get_environment_description, get_logger
from speechbrain.utils.run_opts import RunOptions
from torch.utils.data import DataLoader

from ..device import check_device
from ..files import make_folder, write_text
from ..lock import lock_folder
from .data import find_given_manifests
from .resume import (
    FITTED_SIZE,
    check_resume,
    describe,
    find_references,
    resolve,
    with_overrides,
)
from .tokenizer import check_tokenizer

logger = get_logger(__name__)

GZIP = b"\x1f\x8b"
LARGEST_SEED = 2**32 - 1  # NumPy's
# Keys of paths, and what a shell would have replaced in them: YAML does not, nor does a shell
# within quotes or after `--KEY=`.
PATH_KEY = re.compile(r"_(folder|file|csv|log)$|^train_log$")
UNEXPANDED = re.compile(r"\$\w+|\$\{\w+\}|^~")
# What numbers must be -> whether one is, and which keys are meant.
RANGES = {
    "a whole number, at least 1": (
        lambda value: _is_whole(value) and value >= 1,
        {
            *("batch_size", "test_batch_size", "num_buckets", "avg_checkpoints"),
            *("sample_rate", "n_fft", "n_mels"),
            *("time_pooling_size", "rnn_layers", "rnn_neurons", "dnn_neurons", "vocab_size"),
            *("emb_size", "dec_neurons", "attn_dim", "attn_channels", "attn_kernel_size"),
            *("lm_emb_size", "lm_rnn_layers", "lm_rnn_neurons", "lm_dnn_neurons"),
            *("test_beam_size", "grad_accumulation_factor", "debug_batches", "debug_epochs"),
        },
    ),
    "a whole number, at least 0": (
        lambda value: _is_whole(value) and value >= 0,
        {
            *("num_workers", "number_of_epochs", "number_of_ctc_epochs", "max_attn_shift"),
            *("cnn_blocks", "dnn_blocks", "lm_dnn_blocks"),
        },
    ),
    f"a whole number from 0 to {LARGEST_SEED}": (
        lambda value: _is_whole(value) and 0 <= value <= LARGEST_SEED,
        {"seed"},
    ),
    "above 0": (
        lambda value: 0 < value < math.inf,
        {"max_batch_length", "hop_length", "max_decode_ratio", "temperature", "temperature_lm"},
    ),
    "at least 0": (
        lambda value: 0 <= value < math.inf,
        {"lr", "ckpt_interval_minutes", "ckpt_interval_steps", "log_interval_minutes"},
    ),
    "from 0 to 1": (lambda value: 0 <= value <= 1, {"ctc_weight", "ctc_weight_decode"}),
    "above 0 and at most 1": (
        lambda value: 0 < value <= 1,
        {"annealing_factor", "character_coverage"},
    ),
}
CHOICES = {
    "token_type": ("unigram", "bpe", "char"),
    "sorting": ("ascending", "descending", "random"),
}
# Paths without which nothing goes, though YAML reads an empty value as null.
NEEDED_PATHS = (
    *("output_folder", "output_wer_folder", "save_folder", "train_log", "data_folder"),
    *("train_csv", "noise_csv"),
)
# Folders that hold weights -> who makes them.
MADE_BY = {
    "lm_folder": "run train_lm.py",
    "pretrained_folder": "take the inference folder of a run of this recipe, or of train_lm.py",
}


def parse_arguments(argv=None):
    """Parse SpeechBrain's command line, `--overrides=FILE.yaml` included.

    Returns
    -------
    hparams_file : str
    run_opts : speechbrain.utils.run_opts.RunOptions
    overrides : dict
        For `load_hparams`: the keys of the file, then those of the command line.
    overrides_file : str or None

    Raises
    ------
    ValueError
        If a key is given twice, or its value is not YAML, or the device or a number is impossible.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    if run_opts["device"] is not None:
        check_device(run_opts["device"])
    check_numbers(run_opts.as_dict())
    yaml = ruamel.yaml.YAML()  # keeps tags such as !name: as they are
    try:
        overrides = yaml.load(overrides) or {}
    except ruamel.yaml.error.MarkedYAMLError as error:
        raise ValueError(f"keys on the command line: {error.problem}") from error
    overrides_file = overrides.pop("overrides", None)
    if overrides_file is not None:
        overrides = {**_load_keys(overrides_file), **overrides}
    return hparams_file, run_opts, overrides, overrides_file


def _load_keys(path):
    """The keys of a YAML file, as ruamel.yaml's round trip has them."""
    try:
        keys = ruamel.yaml.YAML().load(Path(path).read_text(encoding="utf-8"))
    except ruamel.yaml.error.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ValueError(f"{path}, line {line}: {error.problem}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} has no keys: it must be a YAML file of KEY: VALUE")
    return keys


def load_hparams(hparams_file, overrides):
    """Load a YAML and build what it describes.

    Raises
    ------
    FileNotFoundError
        If a file that it names is missing.
    ValueError
        If an override names no key of the YAML, is no number or truth value where the YAML has one,
        or would keep another class than it names, or a path has something that a shell would have
        replaced, or is of another kind of file, or a class is missing or takes no such arguments.
    """
    keys = _load_keys(hparams_file)
    for key, value in overrides.items():
        if key not in keys:
            if key in RunOptions().as_dict():
                raise ValueError(f"{key} is a run option: give it on the command line, as --{key}")
            raise ValueError(f"{key} is neither a key of {hparams_file} nor a run option")
        for kind, name in ((bool, "True or False"), (int | float, "a number")):
            if isinstance(keys[key], kind):
                fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
                if not (fits or _tag(value)) or value != value:  # NaN is not equal to itself
                    raise ValueError(f"{key} must be {name}, got {value!r}")
                break
        if _builds(keys[key]) and not (isinstance(value, dict) or _tag(value)):
            raise ValueError(f"{key} must be a class such as {_tag(keys[key])}, got {value!r}")
        if isinstance(value, dict):
            if not isinstance(keys[key], dict):
                raise ValueError(f"{key} has no arguments in {hparams_file}: change that file")
            own, other = _tag(keys[key]), _tag(value)
            if other and other != own:
                raise ValueError(
                    f"{key}: an override that has arguments keeps the class of {hparams_file}, "
                    f"{own}; give {other} without arguments, or change that file"
                )
    values = ruamel.yaml.YAML().load(resolve(hparams_file, copy.deepcopy(overrides)))
    check_values(values)
    make_folder(values["save_folder"], "save_folder")  # else the checkpointer does, without a name
    try:
        with open(hparams_file, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, copy.deepcopy(overrides))
    # A TypeError has the class as first argument.
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{hparams_file}: {', '.join(map(str, error.args))}") from error
    except (
        ArithmeticError,
        AssertionError,
        IndexError,
        RuntimeError,
    ) as error:  # such as too few cnn_channels
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{hparams_file}: the model cannot be built: {error} "
            f"({os.path.basename(place.filename)}: {place.line})"
        ) from error
    check_arguments(hparams)
    return hparams


def check_arguments(hparams):
    """Check what is called with arguments of the YAML later on.

    Raises
    ------
    ValueError
        Names the key whose class does not take them, or is impossible at `sample_rate`.
    """
    stft = getattr(hparams.get("compute_features"), "compute_STFT", None)
    if stft and stft.n_fft < stft.win_length:
        raise ValueError(
            f"n_fft is {stft.n_fft} samples, but a window has {stft.win_length} at a sample_rate "
            f"of {hparams['sample_rate']} Hz: n_fft must be at least that"
        )
    try:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = hparams["opt_class"]([parameter], lr=hparams["lr"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"opt_class: {one_line(error)}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"opt_class: {type(optimizer).__name__} is no torch.optim.Optimizer")
    if "closure" in _required(optimizer.step):
        raise ValueError(f"opt_class: {type(optimizer).__name__} needs a closure, which none has")
    if "lr" in getattr(hparams["opt_class"], "keywords", {}):
        raise ValueError("opt_class has lr, which is a key of its own: --lr")
    ctc_cost = hparams.get("ctc_cost")
    if ctc_cost is not None:
        with _naming("ctc_cost"):
            blank, one = hparams["blank_index"], torch.ones(1)
            log_probs, tokens = torch.zeros(1, 1, blank + 2), torch.tensor([[blank + 1]])
            ctc_cost(log_probs, tokens, one, one, blank_index=blank)
    search = hparams.get("test_search")  # gets its scorers after the preparation
    if search is not None:
        with _naming("test_search_class"):
            search()
    for key in ("train_dataloader_opts", "valid_dataloader_opts", "test_dataloader_opts"):
        with _naming(key):
            DataLoader([0], **hparams[key])
    if hparams.get("dynamic_batching"):
        with _naming("dynamic_batch_sampler"):
            options = hparams["dynamic_batch_sampler"]
            DynamicBatchSampler(range(2), lengths_list=[1.0, 2.0], **options)
    wavs, lengths = torch.zeros(1, 16000), torch.ones(1)
    for key, inputs in (
        ("speed_perturb", [wavs]),
        ("drop_freq", [wavs]),
        ("drop_chunk", [wavs, lengths]),
    ):
        if hparams.get(f"enable_{key}"):
            # What is drawn here changes no run.
            with _naming(key), torch.random.fork_rng(devices=[]):
                hparams[key](*inputs)
    if hparams["use_tensorboard"]:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ValueError(
                f"use_tensorboard needs a package: pip install tensorboard ({error})"
            ) from error


@contextlib.contextmanager
def _naming(key):
    """What goes wrong ends as a ValueError that names `key`; SpeechBrain raises of every kind."""
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).strip() or f"{place.name} refuses its arguments"
        raise ValueError(f"{key}: {one_line(reason)}") from error


def _required(function):
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def _builds(node):
    return (_tag(node) or "").startswith(("!new:", "!name:"))


def _tag(node):
    return getattr(getattr(node, "tag", None), "value", None)


def check_values(values):
    """Check a resolved YAML, before anything is made of it.

    Raises
    ------
    FileNotFoundError, ValueError
        See `load_hparams`.
    """
    for key, value in values.items():
        if not PATH_KEY.search(key):
            continue
        for path in value if isinstance(value, list) else [value]:
            found = UNEXPANDED.search(path) if isinstance(path, str) else None
            if found:
                start, _, _ = path[found.end() :].partition("/")
                if not os.path.exists(path[: found.end()] + start):  # it may be called so
                    raise ValueError(f"{key} {path}: {found[0]} is not expanded here; write it out")
    for key in NEEDED_PATHS:
        if key in values and not values[key]:
            raise ValueError(f"{key} is empty")
    check_numbers(values)
    for key, choices in CHOICES.items():
        if key in values and values[key] not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {values[key]!r}")
    for key in ("tokenizer_file", "text_file"):
        path = values.get(key)
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f"{key} {path} does not exist or is no file")
    given = values["tokenizer_file"]
    if given:
        check_tokenizer(given, values, f"tokenizer_file {given}")
    text_file = values.get("text_file")
    if text_file:
        with open(text_file, "rb") as file:
            if file.read(len(GZIP)) == GZIP:
                raise ValueError(f"text_file {text_file} is compressed: unpack it by gunzip")
    find_given_manifests(values)
    folders = {"lm_folder": ("lm", "tokenizer"), "noise_folder": ()}
    pretrained = values.get("pretrained_folder")
    if pretrained:
        folders["pretrained_folder"] = (*values["initial_weights"]["loadables"], "tokenizer")
    for key, names in folders.items():
        folder = values.get(key)
        if folder and not os.path.isdir(folder):
            raise FileNotFoundError(f"{key} {folder} does not exist or is no folder")
        for name in names if folder else ():
            if not os.path.isfile(os.path.join(folder, f"{name}.ckpt")):
                raise FileNotFoundError(f"{key} {folder} has no {name}.ckpt: {MADE_BY[key]}")
    if pretrained:
        theirs = os.path.join(pretrained, "tokenizer.ckpt")
        if not given or not filecmp.cmp(given, theirs, shallow=False):
            raise ValueError(
                f"pretrained_folder {pretrained} needs its own tokenizer: "
                f"set tokenizer_file to {theirs}"
            )


def check_numbers(values):
    """Raise ValueError if a number is impossible; `values` are keys or run options."""
    for key, value in values.items():
        for name, (is_fit, keys) in RANGES.items():
            if key in keys and isinstance(value, int | float) and not is_fit(value):
                raise ValueError(f"{key} must be {name}, got {value}")


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass
class Experiment:
    """What a command line asks for.

    Attributes
    ----------
    hparams : dict
        What the YAML describes.
    run_opts : speechbrain.utils.run_opts.RunOptions
    hparams_file : str
    overrides : dict
    sources : tuple
        Arguments of `save_sources` after the folder.
    """

    hparams: dict
    run_opts: RunOptions
    hparams_file: str
    overrides: dict
    sources: tuple

    def fit_to_tokenizer(self, tokenizer):
        """Load the YAML anew, if its `vocab_size` is not the tokenizer's.

        The model then has the tokenizer's size, and hyperparams.yaml says so.
        """
        size = tokenizer.sp.vocab_size()
        settings = self.hparams["checkpointer"].settings | {FITTED_SIZE: json.dumps(size)}
        if size != self.hparams["vocab_size"]:
            self.overrides = {**self.overrides, "vocab_size": size}
            self.hparams = load_hparams(self.hparams_file, self.overrides)
        self.hparams["checkpointer"].settings = settings

    def save(self):
        """Write what is run to the output folder; for all processes to call.

        That is hyperparams.yaml, env.log, and the Python files. Called when nothing can refuse the
        run any more, so that they are always those of the run whose checkpoints lie beside them.
        """
        run_on_main(self._save)

    def _save(self):
        folder = Path(self.hparams["output_folder"])
        header = (
            f"# Generated {date.today()} from:\n# {os.path.abspath(self.hparams_file)}\n"
            "# yamllint disable\n"
        )
        text = header + with_overrides(self.hparams_file, copy.deepcopy(self.overrides))
        for name, content in (
            ("hyperparams.yaml", text),
            ("env.log", get_environment_description()),
        ):
            write_text(folder / name, content)
        save_sources(folder, *self.sources)


@contextlib.contextmanager
def start_experiment(argv, script):
    """Load the YAML of a command line; hold its output folder until the context ends.

    Arguments
    ---------
    argv : list of str or None
        Command line; None: that of the process.
    script : str
        The file of the command.

    Yields
    ------
    Experiment

    Raises
    ------
    ValueError
        If another run has the folder, or the run that is there cannot go on like this.
    """
    hparams_file, run_opts, overrides, overrides_file = parse_arguments(argv)
    ddp_init_group(run_opts)
    overrides.update(run_options_of_the_yaml(hparams_file, run_opts))
    hparams = load_hparams(hparams_file, overrides)
    check_precision(run_opts, hparams["precision"])
    experiment = Experiment(hparams, run_opts, hparams_file, overrides, (script, overrides_file))
    hparams["checkpointer"].settings = describe(hparams_file, overrides)
    folder = hparams["output_folder"]
    with contextlib.ExitStack() as stack:
        changed = ""
        if if_main_process():
            stack.enter_context(lock_folder(folder))
            changed = _check_checkpoint(experiment)
            _make_folders(hparams)
        sb.create_experiment_directory(folder, save_env_desc=False)
        if changed:
            logger.info(f"The run that is here goes on with other settings: {changed}")
        # It saves the file that calls it: this one, which `save_sources` puts in its place.
        run_on_main(os.remove, [os.path.join(folder, os.path.basename(__file__))])
        yield experiment


def check_precision(run_opts, precision):
    """Raise ValueError if the device cannot compute in it, in training or in validation."""
    device = run_opts.device or infer_device()
    for name in (precision, run_opts.eval_precision):
        if name == "fp16" and torch.device(device).type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA device, got {device}")


def run_options_of_the_yaml(hparams_file, run_opts):
    """Run options of the command line that are keys too: hyperparams.yaml should have them.

    Raises
    ------
    ValueError
        If checkpoints within an epoch are asked for by steps and by minutes.
    """
    keys, given = _load_keys(hparams_file), run_opts.overridden_args
    found = {key: run_opts[key] for key in given if key in keys}
    if "ckpt_interval_steps" in given and run_opts["ckpt_interval_steps"] > 0:
        if found.get("ckpt_interval_minutes", 0) > 0:
            raise ValueError(
                "ckpt_interval_steps and ckpt_interval_minutes exclude each other: give one"
            )
        found["ckpt_interval_minutes"] = 0  # not that of the YAML
    return found


def _make_folders(hparams):
    """For what is written later, some of it after the last epoch."""
    for key, folder in (
        ("output_wer_folder", hparams.get("output_wer_folder")),
        ("shard_folder", hparams.get("shard_folder")),
        ("train_log", os.path.dirname(hparams["train_log"])),
        ("noise_csv", os.path.dirname(hparams.get("noise_csv", ""))),
    ):
        if folder:
            make_folder(folder, key)


def _check_checkpoint(experiment):
    """Refuse what the newest checkpoint does not fit; tells the settings that are others now."""
    hparams, overrides = experiment.hparams, experiment.overrides
    checkpoint = hparams["checkpointer"].find_checkpoint()
    if checkpoint is None:
        if experiment.run_opts.test_only:
            raise FileNotFoundError(f"--test_only: {hparams['save_folder']} has no checkpoint")
        return ""
    if experiment.run_opts.debug and not experiment.run_opts.debug_persistently:
        raise ValueError(
            f"--debug: output_folder {hparams['output_folder']} has a run, whose results it would "
            "replace: choose another output_folder"
        )

    def load_model(vocab_size):
        if vocab_size == hparams["vocab_size"]:
            return hparams["model"]
        return load_hparams(experiment.hparams_file, {**overrides, "vocab_size": vocab_size})[
            "model"
        ]

    return check_resume(
        checkpoint,
        hparams["checkpointer"].settings,
        find_references(experiment.hparams_file, overrides),
        hparams,
        load_model,
        hparams["output_folder"],
    )


def save_sources(folder, script, overrides_file=None):
    """Save a run's Python files, and its YAML of overrides as overrides.yaml.

    Those of this package, as far as they are imported, lie beside the script as they do here.

    Arguments
    ---------
    folder : str or Path
    script : str or Path
    overrides_file : str or Path, optional
    """
    package, _, _ = __name__.partition(".")
    beside = Path(sys.modules[package].__file__).parents[1]
    files = {Path(script).name: script}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            files[Path(module.__file__).relative_to(beside)] = module.__file__
    if overrides_file is not None:
        files["overrides.yaml"] = overrides_file
    for name, source in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Path(source).read_bytes())


def run_script(main):
    """Run a script's `main`; what is wrong with its arguments or files ends it in one line.

    Its traceback is in log.txt. A process of torchrun leaves the group at a good end; at a bad one
    it does not wait for the others, which may wait for it.
    """
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        logger.debug("Stopped by:", exc_info=True)
        sys.exit(f"{os.path.basename(sys.argv[0])}: {one_line(error)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def one_line(error):
    """The message of an error; one from a loader's process has that process's traceback first."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        return text.splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__
