"""Ours in place of SpeechBrain's, inside a model that exists already.

An object of one of SpeechBrain's classes becomes one of our subclass, where it stands: parameters,
buffers, hooks and references to it stay, so that optimisers, checkpoints and wrappers see nothing.
"""

import inspect
from typing import NamedTuple

import torch

from . import rnn
from ._stock import CRDNN, RNN, scorer, seq2seq
from .crdnn import CRDNN as OurCRDNN
from .ctc_scorer import CTCScorer
from .decoder import AttentionalRNNDecoder
from .search import S2SRNNBeamSearcher, S2SRNNGreedySearcher

__all__ = ["Part", "accelerate", "restore"]

_OURS = {
    RNN.SLiGRU: rnn.SLiGRU,
    RNN.SLiGRU_Layer: rnn.SLiGRU_Layer,
    RNN.LiGRU: rnn.LiGRU,
    RNN.LiGRU_Layer: rnn.LiGRU_Layer,
    RNN.AttentionalRNNDecoder: AttentionalRNNDecoder,
    CRDNN.CRDNN: OurCRDNN,
    scorer.CTCScorer: CTCScorer,
    seq2seq.S2SRNNBeamSearcher: S2SRNNBeamSearcher,
    seq2seq.S2SRNNGreedySearcher: S2SRNNGreedySearcher,
}
_CLASSES = tuple(_OURS.values())
_MARK = "_sb_fast_sligru_replaces"  # attribute of what `accelerate` changed: the class before


class Part(NamedTuple):
    """A part of a model that is, or could have been, one of ours."""

    name: str
    """As of ``named_modules``: the first, if it is in several places."""
    kind: str
    """Name of its class."""
    is_ours: bool
    reason: str
    """Why it is not, or why it runs SpeechBrain's code all the same; "" if neither."""

    def __str__(self):
        is_ours = "ours" if self.is_ours else "SpeechBrain's"
        return f"{self.name or '(the model)'}: {self.kind}, {is_ours}" + (
            f" ({self.reason})" if self.reason else ""
        )


def accelerate(module):
    """Make SpeechBrain's SLi-GRUs, Li-GRUs, CRDNNs, decoders, CTC scorers and searches ours.

    In place, in any model: built, loaded, trained, pretrained (`EncoderASR`, `EncoderDecoderASR`).
    Left alone are subclasses of SpeechBrain's classes, objects with a method of their own, and what
    torch.jit has compiled. A second call changes nothing. `fully_shard` comes after it.

    Arguments
    ---------
    module : torch.nn.Module

    Returns
    -------
    parts : list of Part
        All parts of those kinds.

    Raises
    ------
    ValueError
        If `module` is no module.

    Example
    -------
    >>> net = RNN.SLiGRU(hidden_size=5, input_shape=[None, None, 20])
    >>> for part in accelerate(net):
    ...     print(part)
    (the model): SLiGRU, ours
    rnn.0: SLiGRU_Layer, ours
    """
    parts = []
    for name, part in _parts(module):
        kind = type(part)
        kind_name, reason = kind.__name__, ""
        if isinstance(part, torch.jit.ScriptModule):
            kind_name, reason = part.original_name, "torch.jit has compiled it: accelerate before"
        elif kind in _OURS:
            reason = _take_over(part, _OURS[kind])
        elif not isinstance(part, _CLASSES):
            reason = f"{kind.__module__}.{kind.__qualname__} is a class of its own"
        is_ours = isinstance(part, _CLASSES)
        if is_ours and hasattr(part, "_obstacle"):
            reason = part._obstacle()
        parts.append(Part(name, kind_name, is_ours, reason))
    return parts


def restore(module):
    """Undo `accelerate`.

    Arguments
    ---------
    module : torch.nn.Module
        What was built as ours stays so, and so does what has another class since, such as that of
        ``fully_shard``.

    Returns
    -------
    names : list of str
        Of the parts that are SpeechBrain's again.

    Raises
    ------
    ValueError
        If `module` is no module.
    """
    names = []
    for name, part in _parts(module):
        if _MARK in vars(part) and type(part) in _CLASSES:
            part.__class__ = vars(part).pop(_MARK)
            vars(part).pop("activation", None)  # of a layer of ours
            names.append(name)
    return names


def _parts(module):
    """Name and object of all parts that are, or could be, ours."""
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module must be a torch.nn.Module, but is {type(module).__name__}")
    scorers = set()  # which searches may share
    for name, part in module.named_modules():
        if isinstance(part, tuple(_OURS)) or _is_compiled(part):
            yield name, part
        builder = getattr(part, "scorer", None)  # of a search; it and its scorers are no modules
        if isinstance(builder, scorer.ScorerBuilder):
            for key in ("full_scorers", "partial_scorers"):
                for its_name, its_scorer in getattr(builder, key).items():
                    if isinstance(its_scorer, tuple(_OURS)) and its_scorer not in scorers:
                        scorers.add(its_scorer)
                        yield f"{name}.scorer.{key}.{its_name}".lstrip("."), its_scorer


def _is_compiled(part):
    """Tell whether it is what torch.jit has made of an object of one of SpeechBrain's classes."""
    if not isinstance(part, torch.jit.ScriptModule):
        return False
    compiled_name = part._c._type().qualified_name()  # original_name is the same for ours
    is_speechbrains = compiled_name.startswith("__torch__.speechbrain.")
    return is_speechbrains and part.original_name in {kind.__name__ for kind in _OURS}


def _take_over(part, ours):
    """Make it ours; returns why it cannot be, "" if it is."""
    for name in vars(part):
        if inspect.isfunction(getattr(type(part), name, None)):
            return f"{name} of it was replaced"
    if issubclass(ours, rnn._LightGRULayer):
        try:
            part.activation = rnn._activation_name(part.act)
        except ValueError as error:
            return str(error)
    vars(part)[_MARK] = type(part)
    part.__class__ = ours
    return ""
