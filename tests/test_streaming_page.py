"""docs/streaming.md: its keys are the recipe's, its figures the models'."""

import re

import pytest
import torch
from helpers import ROOT
from speechbrain.nnet.containers import Sequential

from sb_fast_sligru import StreamingEncoder, StreamingFbank
from sligru_recipes.training.experiment import load_hparams, parse_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (ROOT / "docs/streaming.md").read_text(encoding="utf-8")
STREAMING = "hparams/librispeech_ctc_streaming.yaml"
MINI = "hparams/librispeech_ctc_mini.yaml"


def test_keys_are_the_recipe_s():
    def lines(name):
        text = (ROOT / "hparams" / name).read_text(encoding="utf-8")
        return set(re.findall(r"^(\w+: .*?)(?: +#.*)?$", text, re.MULTILINE))

    streaming, other = map(lines, ("librispeech_ctc_streaming.yaml", "librispeech_ctc.yaml"))
    rows = re.findall(r"^\| (`\w+: .*`) \|", PAGE, re.MULTILINE)
    named = set(re.findall(r"`(\w+: [^`]*)`", " ".join(rows)))
    folders = {"output_folder: !ref results/librispeech_ctc_streaming/<seed>"}
    assert named | folders == streaming - other
    assert "norm_type: global" in streaming & other and "`norm_type: global`" in PAGE
    assert f"{StreamingFbank().compute_fbanks.floor:g} dB" in PAGE


def test_lookahead_is_the_models(tmp_path):
    said = re.search(r"`lookahead_ms` \| ([\d.]+) ms \| ([\d.]+) ms \|", PAGE).groups()
    folders = (f"--data_folder={tmp_path}", f"--output_folder={tmp_path}")
    for overrides, lookahead in zip(([], [f"--overrides={ROOT / MINI}"]), said, strict=True):
        file, _, keys, _ = parse_arguments([str(ROOT / STREAMING), *folders, *overrides])
        hparams = load_hparams(file, keys)
        stream = StreamingEncoder(Sequential(hparams["compute_features"], hparams["enc"]).eval())
        assert f"{stream.lookahead_ms:g}" == lookahead
        assert stream.stride / hparams["sample_rate"] == 0.040 and "stands for 40 ms" in PAGE
        with torch.no_grad():
            assert stream.encoder(torch.zeros(1, 16000)).shape[1] == 25
