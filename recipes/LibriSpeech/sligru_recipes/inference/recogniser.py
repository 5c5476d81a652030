"""Recognisers from inference folders, whose YAML is checked before it is loaded."""

import pickle
from pathlib import Path

from hyperpyyaml import resolve_references
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR

from ..device import check_device

# What export.py's YAML files build, and what a recipe's keys put in the place of it.
KNOWN = {
    "sb_fast_sligru.AttentionalRNNDecoder",
    "sb_fast_sligru.CRDNN",
    "sb_fast_sligru.CTCScorer",
    "sb_fast_sligru.LiGRU",
    "sb_fast_sligru.S2SRNNBeamSearcher",
    "sb_fast_sligru.SLiGRU",
    "sb_fast_sligru.StreamingFbank",
    "sentencepiece.SentencePieceProcessor",
    "speechbrain.dataio.preprocess.AudioNormalizer",
    "speechbrain.decoders.S2SRNNBeamSearcher",
    "speechbrain.decoders.ctc_greedy_decode",
    "speechbrain.decoders.scorer.CTCScorer",
    "speechbrain.decoders.scorer.CoverageScorer",
    "speechbrain.decoders.scorer.RNNLMScorer",
    "speechbrain.decoders.scorer.ScorerBuilder",
    "speechbrain.lobes.features.Fbank",
    "speechbrain.lobes.models.CRDNN.CRDNN",
    "speechbrain.lobes.models.RNNLM.RNNLM",
    "speechbrain.nnet.RNN.AttentionalRNNDecoder",
    "speechbrain.nnet.RNN.GRU",
    "speechbrain.nnet.RNN.LSTM",
    "speechbrain.nnet.RNN.LiGRU",
    "speechbrain.nnet.RNN.QuasiRNN",
    "speechbrain.nnet.RNN.RNN",
    "speechbrain.nnet.RNN.SLiGRU",
    "speechbrain.nnet.activations.Softmax",
    "speechbrain.nnet.activations.Swish",
    "speechbrain.nnet.containers.LengthsCapableSequential",
    "speechbrain.nnet.embedding.Embedding",
    "speechbrain.nnet.linear.Linear",
    "speechbrain.processing.features.InputNormalization",
    "speechbrain.utils.checkpoints.torch_recovery",
    "speechbrain.utils.parameter_transfer.Pretrainer",
    "torch.nn.ModuleList",
    *(
        f"torch.nn.{activation}"
        for activation in "ELU GELU Hardtanh LeakyReLU Mish PReLU ReLU SELU SiLU Tanh".split()
    ),
}
# Which take no other class than a module's or a scorer's.
CALLED = {
    f"!apply:sb_fast_sligru.{module}.build"
    for module in ("crdnn", "ctc_scorer", "decoder", "search")
}
PLAIN = {"map", "seq", "str", "int", "float", "bool", "null"}  # of the YAML standard


def load_recogniser(folder, device=None, trust=False):
    """Load an inference folder of a CTC or seq2seq recogniser.

    Arguments
    ---------
    folder : str or Path
    device : str, optional
        Such as "cpu" or "cuda:0"; a GPU if there is one by default.
    trust : bool
        Load it whatever its YAML names; that can run any code.

    Returns
    -------
    speechbrain.inference.ASR.EncoderASR or EncoderDecoderASR

    Raises
    ------
    FileNotFoundError
        If the folder has no inference YAML.
    ValueError
        If its YAML names what the recipes do not use, or its files cannot be loaded, or the device
        cannot be used.
    """
    if device is not None:
        check_device(device)
    folder = Path(folder).resolve()
    path = folder / "hyperparams.yaml"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        keys = YAML().load(text)
    except (UnicodeDecodeError, YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {_line(error)}") from error
    if not isinstance(keys, dict) or not {"modules", "pretrainer"} <= keys.keys():
        raise FileNotFoundError(
            f"{folder} has no inference YAML; make such a folder with export_inference.py"
        )
    if not trust:
        check_tags(path)
    inference = EncoderDecoderASR if "decoder" in keys["modules"] else EncoderASR
    try:
        return inference.from_hparams(
            source=str(folder), run_opts={"device": device} if device is not None else None
        )
    except (
        *(AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError),
        *(TypeError, ValueError, pickle.UnpicklingError),
    ) as error:
        raise ValueError(f"{folder} cannot be loaded: {_line(error)}") from error


def check_tags(path):
    """Check that an inference YAML builds and calls nothing but what the recipes use.

    Arguments
    ---------
    path : Path

    Raises
    ------
    ValueError
        If it has another tag; names the file, the line and the tag.
    """
    text = path.read_text(encoding="utf-8")
    _check_tags(path, text)  # before references are resolved, which can read files and call
    try:
        resolved = resolve_references(text)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_line(error)}") from error
    _check_tags(path, resolved.getvalue())  # what references put together


def _check_tags(path, text):
    for node in _nodes(YAML().compose(text)):
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        kind, _, name = tag.partition(":")
        # HyperPyYAML makes tuples of strings in parentheses, by YAML that can have tags again.
        is_tuple = tag == "!tuple" or (tag == "str" and node.value.startswith("("))
        if is_tuple and "!" in node.value:
            tag = node.value[node.value.index("!") :].split()[0]
        elif (
            is_tuple
            or tag in PLAIN | CALLED | {"!ref"}
            or (kind in ("!new", "!name") and name in KNOWN)
        ):
            continue
        raise ValueError(
            f"{path} has the tag {tag} in line {node.start_mark.line + 1}, which the recipes do "
            "not use and which could run any code; if you trust that folder, add --trust"
        )


def _nodes(node):
    """All nodes of a YAML tree, keys of mappings included."""
    yield node
    if isinstance(node.value, list):
        for item in node.value:
            for child in item if isinstance(item, tuple) else (item,):
                yield from _nodes(child)


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
