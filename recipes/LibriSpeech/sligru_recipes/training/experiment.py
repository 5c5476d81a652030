"""A recipe's command line, its YAML and its output folder."""

import copy
import os
import sys
from pathlib import Path

import ruamel.yaml
import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import ddp_init_group, run_on_main
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


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
        If a key is given twice, or its value is not YAML.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    yaml = ruamel.yaml.YAML()  # keeps tags such as !name: as they are
    try:
        overrides = yaml.load(overrides) or {}
    except ruamel.yaml.error.MarkedYAMLError as error:
        raise ValueError(f"keys on the command line: {error.problem}") from error
    overrides_file = overrides.pop("overrides", None)
    if overrides_file is not None:
        with open(overrides_file, encoding="utf-8") as file:
            overrides = {**yaml.load(file), **overrides}
    return hparams_file, run_opts, overrides, overrides_file


def load_hparams(hparams_file, overrides):
    """Load a YAML and build what it describes.

    Raises
    ------
    ValueError
        If an override names no key of the YAML.
    """
    with open(hparams_file, encoding="utf-8") as file:
        keys = ruamel.yaml.YAML().load(file)
        for key in overrides:
            if key not in keys:
                raise ValueError(f"{key} is neither a key of {hparams_file} nor a run option")
        file.seek(0)
        return load_hyperpyyaml(file, copy.deepcopy(overrides))


def start_experiment(argv, script):
    """Load the YAML of a command line; make its output folder, with logs and what is run in it.

    Arguments
    ---------
    argv : list of str or None
        Command line; None: that of the process.
    script : str
        The file of the command.

    Returns
    -------
    hparams : dict
    run_opts : speechbrain.utils.run_opts.RunOptions
    hparams_file : str
    overrides : dict
    """
    hparams_file, run_opts, overrides, overrides_file = parse_arguments(argv)
    ddp_init_group(run_opts)
    hparams = load_hparams(hparams_file, overrides)
    _make_folder(hparams["output_folder"], hparams_file, overrides)
    run_on_main(save_sources, [hparams["output_folder"], script, overrides_file])
    return hparams, run_opts, hparams_file, overrides


def _make_folder(folder, hparams_file, overrides):
    sb.create_experiment_directory(folder, hparams_file, overrides)
    # It saves the file that calls it: this one, which `save_sources` puts in its place.
    run_on_main(os.remove, [os.path.join(folder, os.path.basename(__file__))])


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


def fit_to_tokenizer(hparams, hparams_file, overrides, tokenizer):
    """The YAML loaded anew, if its `vocab_size` is not the tokenizer's.

    The model then has the tokenizer's size, and hyperparams.yaml says so.
    """
    size = tokenizer.sp.vocab_size()
    if size == hparams["vocab_size"]:
        return hparams
    overrides = {**overrides, "vocab_size": size}
    hparams = load_hparams(hparams_file, overrides)
    _make_folder(hparams["output_folder"], hparams_file, overrides)
    return hparams


def run_script(main):
    """Run a script's `main`; what is wrong with its arguments or files ends it in one line.

    Its traceback is in log.txt.
    """
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        logger.debug("Stopped by:", exc_info=True)
        # One from a loader's process has that process's traceback before it.
        sys.exit(f"{os.path.basename(sys.argv[0])}: {str(error).strip().splitlines()[-1]}")
