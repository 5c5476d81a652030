"""What is subclassed of SpeechBrain, or an ImportError that says what to install."""

import importlib.metadata
import re
import traceback

import torch

NEEDED = "speechbrain>=1.1"
# SpeechBrain imports torchaudio, which checks that it has torch's CUDA version. docs/install.md
# tells which pairs were tried.
PAIRS = "torch 2.10 with torchaudio 2.10, torch 2.11 or 2.14 with torchaudio 2.11"


def version():
    """SpeechBrain's version, a str, or None if it is not installed."""
    try:
        return importlib.metadata.version("speechbrain")
    except importlib.metadata.PackageNotFoundError:
        return None


def explain(error):
    """What is wrong with the installed SpeechBrain, and what to type, in one line.

    Arguments
    ---------
    error : Exception
        What importing it raised.

    Returns
    -------
    line : str
    """
    found = version()
    if isinstance(error, ModuleNotFoundError) and error.name == "speechbrain":
        return f"SpeechBrain is not installed (run: pip install '{NEEDED}')"
    if found and tuple(map(int, re.findall(r"\d+", found)[:2])) < (1, 1):
        return f"SpeechBrain {found} is too old (run: pip install '{NEEDED}')"
    cause = str(error)
    if error.__cause__ is not None:  # the linker's words, where torch names the file alone
        cause += f": {error.__cause__}"
    cause = " ".join(cause.split())
    line = f"SpeechBrain {found} does not import: {type(error).__name__}: {cause}"
    frames = traceback.extract_tb(error.__traceback__)
    if "torchaudio" in cause.lower() or any("torchaudio" in frame.filename for frame in frames):
        line += f" (torch here is {torch.__version__}; pairs that work: {PAIRS})"
    return line


try:
    from speechbrain.nnet import RNN

    RNN.SLiGRU_Layer  # noqa: B018  not in SpeechBrain 1.0
    from speechbrain.decoders import scorer, seq2seq  # noqa: F401
    from speechbrain.lobes import features  # noqa: F401
    from speechbrain.lobes.models import CRDNN  # noqa: F401
    from speechbrain.nnet import (  # noqa: F401
        CNN,
        activations,
        containers,
        dropout,
        embedding,
        linear,
        normalization,
        pooling,
    )
    from speechbrain.processing.features import InputNormalization  # noqa: F401
except Exception as error:  # torchaudio raises OSError, RuntimeError and others
    raise ImportError(explain(error)) from error
