"""A CTC recogniser as one ONNX file: waveforms in, log-probabilities of the tokens out."""

import json
import os
import tempfile
from pathlib import Path

import torch
from speechbrain.inference.ASR import EncoderDecoderASR
from torch.export import Dim

from sb_fast_sligru import LiGRU, SLiGRU, accelerate
from sb_fast_sligru.onnx import TRANSLATIONS

OPSET = 18  # the oldest that the exporter writes: for more runtimes


class Recogniser(torch.nn.Module):
    """The encoder of a CTC recogniser with one argument.

    Arguments
    ---------
    encoder : torch.nn.Module
        Maps waveforms to log-probabilities, those of one length without relative lengths.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, wavs):
        """Map waveforms [B, samples] of one length to log-probabilities [B, T, tokens]."""
        return self.encoder(wavs)


def export_onnx(recogniser, path):
    """Write a CTC recogniser as an ONNX file.

    Its input `wavs` is [B, samples] float32, its output `log_probs` [B, T, tokens]. The metadata
    are what a greedy decoder needs: `sample_rate` (Hz), `blank_index`, and `tokens`, a JSON list
    of pieces in which "▁" begins a word.

    Arguments
    ---------
    recogniser : EncoderASR
        On the CPU. Its SLiGRUs, LiGRUs and CRDNNs of SpeechBrain become ours.
    path : str or Path
        Replaced if it exists.

    Raises
    ------
    FileNotFoundError
        If `path` is a folder, or in one that does not exist.
    ValueError
        If the recogniser decodes with attention, or its RNN is neither an SLiGRU nor a LiGRU.
    """
    path = Path(path)
    if isinstance(recogniser, EncoderDecoderASR):
        raise ValueError("the recogniser decodes with attention, and ONNX files are made of CTC's")
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{path} is not a file in a folder that exists")
    encoder = recogniser.mods.encoder
    accelerate(encoder)  # SpeechBrain's loops over time would keep the length of the example
    if not isinstance(encoder.enc.RNN, (SLiGRU, LiGRU)):
        raise ValueError(
            f"rnn_class: the recogniser has {type(encoder.enc.RNN).__name__}, and ONNX files are "
            "made of those with SLiGRU or LiGRU"
        )
    sample_rate = recogniser.audio_normalizer.sample_rate
    program = torch.onnx.export(
        Recogniser(encoder).eval(),
        (torch.rand(2, sample_rate),),
        input_names=["wavs"],
        output_names=["log_probs"],
        dynamic_shapes=({0: Dim("batch"), 1: Dim("samples")},),
        custom_translation_table=TRANSLATIONS,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    tokenizer = recogniser.tokenizer
    program.model.metadata_props.update(
        sample_rate=str(sample_rate),
        blank_index=str(recogniser.hparams.blank_index),
        tokens=json.dumps(tokenizer.id_to_piece(list(range(tokenizer.vocab_size())))),
    )
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        program.save(Path(folder, path.name), external_data=False)
        os.replace(Path(folder, path.name), path)
