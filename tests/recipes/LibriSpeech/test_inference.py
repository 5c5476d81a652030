"""From a run to transcripts: the exported folder, SpeechBrain's inference, transcribe.py."""

import os
import re
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
import torchaudio
from helpers import ROOT
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from tiny_corpora import make_speech

import export_inference
import export_onnx
import sb_fast_sligru
import train_ctc
import train_lm
import train_seq2seq
from sligru_recipes.inference import audio as audio_files
from sligru_recipes.inference import transcribe as transcribe_module
from sligru_recipes.inference.batches import (
    encode_each,
    encode_together,
    encodes_utterances_alone,
    treats_utterances_alone,
)
from sligru_recipes.inference.export import _entries, _needed, export
from sligru_recipes.inference.frames import count_frames, relative_lengths, strides
from sligru_recipes.inference.recogniser import KNOWN, check_tags, load_recogniser
from sligru_recipes.inference.stream import StreamingTranscriber
from sligru_recipes.inference.transcribe import _batches, transcribe
from sligru_recipes.training import brain
from sligru_recipes.training.data import load_manifest
from sligru_recipes.training.recogniser import ASR
from transcribe import main as transcribe_files

pytestmark = pytest.mark.usefixtures("one_thread")

STOCK = "!name:speechbrain.nnet.RNN.SLiGRU"
STOCK_DECODER = "!name:speechbrain.nnet.RNN.AttentionalRNNDecoder"
TINY = (
    "--dropout=0.0",
    "--max_batch_length=5",
    "--rnn_layers=1",
    "--rnn_neurons=48",
    "--dnn_neurons=48",
    "--lr=0.006",
)
CTC = (f"--overrides={ROOT / 'hparams/librispeech_ctc_mini.yaml'}", *TINY)
SEQ2SEQ = (
    f"--overrides={ROOT / 'hparams/librispeech_seq2seq_mini.yaml'}",
    *TINY,
    "--number_of_epochs=3",  # its letters then differ between most utterances
    "--emb_size=16",
    "--dec_neurons=48",
    "--attn_dim=48",
    "--max_decode_ratio=0.2",
    "--test_beam_size=3",
)
LANGUAGE_MODEL = ("--lm_rnn_layers=1", "--lm_rnn_neurons=32", "--lm_dnn_neurons=16")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_speech(tmp_path_factory.mktemp("corpus"), utterances=5)


@pytest.fixture(scope="module")
def audio(corpus):
    return sorted((corpus / "test-clean").rglob("*.flac"))


def train(recipe, yaml, corpus, folder, *arguments):
    options = ("--device=cpu", "--noprogressbar", "--token_type=char", *arguments)
    folders = (f"--data_folder={corpus}", f"--output_folder={folder}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brain, "draw_progress", lambda *_: None)  # takes longer than the training
        recipe.main([str(ROOT / "hparams" / yaml), *folders, *options])
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Of enough epochs for most words: a model sure of its letters does not mind padding."""
    folder, epochs = tmp_path_factory.mktemp("run"), ["--number_of_epochs=22"]
    return train(train_ctc, "librispeech_ctc.yaml", corpus, folder, *CTC, *epochs)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export(run, tmp_path_factory.mktemp("exported with spaces") / "folder")


@pytest.fixture(scope="module")
def recogniser(exported):
    return load_recogniser(exported, "cpu")


def transcribed(recogniser, files, **options):
    """File -> text; all must be readable."""
    done = list(transcribe(recogniser, files, **options))
    assert [each.error for each in done if each.error is not None] == []
    return {each.file: each.text for each in done}


def hypotheses(run):
    """Utterance -> what the run's own test recognised."""
    report = (run / "wer_test-clean.txt").read_text(encoding="utf-8")
    found = re.findall(r"^(\d+-\d+-\d+), %WER.*\n.*\n.*\n(.*)$", report, re.MULTILINE)
    return {
        name: " ".join(re.findall(r"[^\s;]+", line.replace("<eps>", ""))) for name, line in found
    }


def with_key(folder, copy, key, value):
    """A copy of an inference folder with another value of a key."""
    shutil.copytree(folder, copy)
    yaml = copy / "hyperparams.yaml"
    text, found = re.subn(f"(?m)^{key}: .*$", f"{key}: {value}", yaml.read_text("utf-8"))
    assert found == 1
    yaml.write_text(text, "utf-8")
    return copy


# The folder


def test_transcripts_are_those_of_the_run_s_test(run, exported, audio, tmp_path, monkeypatch):
    """From another current folder, without a network, the folder moved."""
    moved = shutil.copytree(exported, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    assert str(run) not in (moved / "hyperparams.yaml").read_text(encoding="utf-8")
    asr = EncoderASR.from_hparams(source=str(moved), run_opts={"device": "cpu"})
    texts = {path.stem: asr.transcribe_file(str(path)) for path in audio}
    expected = hypotheses(run)
    assert len(expected) == len(set(expected.values())) == len(audio)
    assert {name: " ".join(text.split()) for name, text in texts.items()} == expected
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]  # nothing written beside it


def test_recipe_exports_at_its_end(run, exported):
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert sorted(files) == ["hyperparams.yaml", "model.ckpt", "normalizer.ckpt", "tokenizer.ckpt"]
    assert {path.name: path.read_bytes() for path in (run / "inference").iterdir()} == files


def test_what_an_inference_yaml_needs_of_the_run_s():
    yaml = """
a: 1  # a comment
size: !ref <a>
block:
- 2
- !ref <size>

######## A section

rnn: !name:x.Y
    size: !ref <a>/<size>
unneeded: 3
net: !new:x.Z
  # and another
    block: !ref <block>
    rnns: [!ref <rnn>, !ref <rnn>]
"""
    entries = _entries(yaml)
    assert entries == {
        "a": "a: 1  # a comment\n",
        "size": "size: !ref <a>\n",
        "block": "block:\n- 2\n- !ref <size>\n",
        "rnn": "rnn: !name:x.Y\n    size: !ref <a>/<size>\n",
        "unneeded": "unneeded: 3\n",
        "net": "net: !new:x.Z\n    block: !ref <block>\n    rnns: [!ref <rnn>, !ref <rnn>]\n",
    }
    del entries["unneeded"]
    expected = "".join(entries.values())
    assert _needed(entries | {"unneeded": "unneeded: 3\n"}, "x: !ref <net>") == expected


def test_best_checkpoint_is_taken(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (best,) = (copy / "save").glob("CKPT+*")
    worse = shutil.copytree(best, best.with_name("CKPT+2999-01-01+00-00-00+00"))
    meta = (worse / "CKPT.yaml").read_text()
    meta = re.sub("WER: .*", "WER: 1000.0", re.sub("unixtime: .*", "unixtime: 1.0e+11", meta))
    (worse / "CKPT.yaml").write_text(meta)
    (worse / "model.ckpt").write_bytes(b"of the worse checkpoint")
    folder = export(copy)
    assert folder == copy / "inference"
    assert (folder / "model.ckpt").read_bytes() == (best / "model.ckpt").read_bytes()


def test_rnn_class_can_be_overridden(exported, recogniser, audio):
    asr = EncoderASR.from_hparams(
        source=str(exported), overrides=f"rnn_class: {STOCK}", run_opts={"device": "cpu"}
    )
    assert type(asr.mods.encoder.enc.RNN).__module__ == "speechbrain.nnet.RNN"
    for path in audio:
        assert asr.transcribe_file(str(path)) == recogniser.transcribe_file(str(path))


def test_crdnn_class_can_be_overridden(exported, recogniser, audio):
    asr = EncoderASR.from_hparams(
        source=str(exported),
        overrides="crdnn_class: !name:speechbrain.lobes.models.CRDNN.CRDNN",
        run_opts={"device": "cpu"},
    )
    modules = [type(net.mods.encoder.enc).__module__ for net in (recogniser, asr)]
    assert modules == ["sb_fast_sligru.crdnn", "speechbrain.lobes.models.CRDNN"]
    for path in audio:
        assert asr.transcribe_file(str(path)) == recogniser.transcribe_file(str(path))


def test_stock_checkpoint_gives_the_same_transcripts_with_our_rnn(corpus, audio, tmp_path):
    arguments = (*CTC, "--number_of_epochs=8", f"--rnn_class={STOCK}")
    folder = export(train(train_ctc, "librispeech_ctc.yaml", corpus, tmp_path / "run", *arguments))
    stock = EncoderASR.from_hparams(source=str(folder), run_opts={"device": "cpu"})
    ours = EncoderASR.from_hparams(
        source=str(folder),
        overrides="rnn_class: !name:sb_fast_sligru.SLiGRU",
        run_opts={"device": "cpu"},
    )
    modules = [type(asr.mods.encoder.enc.RNN).__module__ for asr in (stock, ours)]
    assert modules == ["speechbrain.nnet.RNN", "sb_fast_sligru.rnn"]
    ours.mods.load_state_dict(stock.mods.state_dict(), strict=True)
    texts = [stock.transcribe_file(str(path)) for path in audio]
    assert len(set(texts)) == len(texts)
    assert [ours.transcribe_file(str(path)) for path in audio] == texts


def test_weights_that_do_not_fit_are_refused(exported):
    with pytest.raises(RuntimeError, match="size mismatch"):
        EncoderASR.from_hparams(source=str(exported), overrides={"cnn_channels": [8]})


def test_folders_that_are_no_runs(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^export_inference: .* is not the folder of a run"):
        export_inference.main([str(tmp_path)])
    copy = shutil.copytree(run, tmp_path / "run")
    (tokenizer,) = (copy / "save").glob("*.model")
    tokenizer.rename(tmp_path / "tokenizer")
    with pytest.raises(SystemExit, match=r"^export_inference: .* has no tokenizer of \d+ tokens$"):
        export_inference.main([str(copy)])
    (tmp_path / "tokenizer").rename(tokenizer)
    export_inference.main([str(copy), str(tmp_path / "folder")])
    assert capsys.readouterr().out == f"{tmp_path / 'folder'}\n"
    for checkpoint in (copy / "save").glob("CKPT+*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(SystemExit, match=r"^export_inference: .* has no checkpoint of a finished"):
        export_inference.main([str(copy)])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (".", "is the folder of the run itself"),
        ("link", "is the folder of the run itself"),
        ("save", "is for the run's checkpoints"),
        ("save/new/folder", "is for the run's checkpoints"),
        ("train_log.txt", "is not a folder"),
        ("theirs", "has a hyperparams.yaml that no export made"),
        ("weights", "has a model.ckpt that no export made"),
        ("dangling", "has a tokenizer.ckpt that no export made"),
    ],
)
def test_export_overwrites_nothing_but_an_earlier_export(run, tmp_path, target, reason):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "link").symlink_to(copy)
    for name in ("theirs/hyperparams.yaml", "weights/model.ckpt"):
        (copy / name).parent.mkdir()
        (copy / name).write_text("a: 1")
    (copy / "dangling").mkdir()
    (copy / "dangling/tokenizer.ckpt").symlink_to(copy / "nowhere")
    before = contents(copy)
    with pytest.raises(SystemExit, match=f"^export_inference: [^\n]*{target} {reason}[^\n]*$"):
        export_inference.main([str(copy), f"{copy}/{target}"])
    assert contents(copy) == before


def test_export_beside_other_files_and_again(run, exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        export(run, tmp_path)
        (tmp_path / "model.ckpt").write_bytes(b"to be replaced")
    export(run, tmp_path)
    expected = {path.name: text for path, text in contents(exported).items()}
    found = {path.name: text for path, text in contents(tmp_path).items()}
    assert found == expected | {"notes.txt": b"mine"}
    # Also where the earlier one had a language model; a file of that name alone is the user's.
    (tmp_path / "lm.ckpt").write_text("earlier")
    export(run, tmp_path)
    assert not (tmp_path / "lm.ckpt").exists()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/lm.ckpt").write_text("mine")
    export(run, tmp_path / "new")
    assert (tmp_path / "new/lm.ckpt").read_text() == "mine"


def test_full_disk_leaves_the_earlier_export(run, tmp_path, monkeypatch):
    folder = export(run, tmp_path / "folder")
    before = contents(folder)

    def fail(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(SystemExit, match="^export_inference: .*No space left"):
        export_inference.main([str(run), str(folder)])
    assert contents(tmp_path) == before


def test_folders_without_a_run_s_yaml_are_no_runs(exported, tmp_path):
    for yaml in ("", "a: [", "just text", "- 1", "save_folder: !ref <nothing>"):
        (tmp_path / "hyperparams.yaml").write_text(yaml)
        with pytest.raises(SystemExit, match=f"^export_inference: {tmp_path}[^\n]*$"):
            export_inference.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="is not the folder of a run: no key save_folder$"):
        export_inference.main([str(exported)])


def test_export_tells_the_longest_utterance_of_training(run, recogniser, audio, tmp_path, caplog):
    seconds = [soundfile.info(path).duration for path in audio]  # train has the same
    assert recogniser.hparams.longest_train_utterance == max(seconds)
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "save/train.csv").unlink()
    folder = export(copy)
    assert "train.csv" in caplog.text
    assert "longest_train" not in (folder / "hyperparams.yaml").read_text()


# ONNX


@pytest.fixture(scope="module")
def onnx_file(exported, tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "out.onnx"
    export_onnx.main([str(exported), str(file)])
    return file


def onnx_session(file):
    import onnxruntime  # not where GPU tests alone run

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_onnx_file_gives_the_log_probabilities(onnx_file, recogniser, audio):
    """Of each file, and of batches; to 1e-5 of all of them, and each probability to 1e-5."""
    session = onnx_session(onnx_file)
    (wavs,), (log_probs,) = session.get_inputs(), session.get_outputs()
    assert (wavs.name, wavs.type, wavs.shape) == ("wavs", "tensor(float)", ["batch", "samples"])
    assert log_probs.name == "log_probs"
    signals = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in audio]
    shortest = min(map(len, signals))
    batch = torch.stack([signal[:shortest] for signal in signals])
    for inputs in (*(signal[None] for signal in signals), batch):
        (actual,) = session.run(None, {"wavs": inputs.numpy()})
        with torch.no_grad():
            expected = recogniser.encode_batch(inputs, torch.ones(len(inputs)))
        actual = torch.from_numpy(actual)
        assert actual.shape == expected.shape
        assert sb_fast_sligru.reference.relative_error(actual, expected) < 1e-5
        assert (actual.exp() - expected.exp()).abs().max() < 1e-5


def test_onnx_file_has_all_that_a_greedy_decoder_needs(
    onnx_file, recogniser, audio, tmp_path, monkeypatch, capsys
):
    """That of docs/export.md."""
    page = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    (decoder,) = re.findall(r"```python\n([^`]*out\.onnx[^`]*)```", page)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(onnx_file, "out.onnx")
    for path in audio:
        shutil.copyfile(path, "speech.flac")
        exec(decoder, {})
        assert capsys.readouterr().out.strip() == recogniser.transcribe_file(str(path)).strip()


@pytest.mark.parametrize("key", ["rnn_class", "crdnn_class", "use_lengths"])
def test_other_keys_are_exported_as_the_same(exported, audio, onnx_file, tmp_path, key):
    """SpeechBrain's classes become ours, and waveforms of one length need no lengths."""
    values = {
        "rnn_class": STOCK,
        "crdnn_class": "!name:speechbrain.lobes.models.CRDNN.CRDNN",
        "use_lengths": "True",
    }
    folder = with_key(exported, tmp_path / "folder", key, values[key])
    export_onnx.main([str(folder), str(tmp_path / "out.onnx")])
    wavs = {"wavs": soundfile.read(audio[0], dtype="float32")[0][None]}
    expected, actual = (onnx_session(f).run(None, wavs) for f in (onnx_file, tmp_path / "out.onnx"))
    assert np.array_equal(expected[0], actual[0])


def test_what_onnx_files_are_not_made_of(exported, seq2seq_exported, tmp_path):
    from sligru_recipes.inference.onnx import export_onnx as write

    (tmp_path / "earlier.onnx").write_text("earlier")
    (tmp_path / "folder").mkdir()
    for folder, file, message in (
        (seq2seq_exported, "earlier.onnx", "decodes with attention"),
        (tmp_path, "earlier.onnx", "has no inference YAML"),
        (exported, "nowhere/out.onnx", "nowhere/out.onnx is not a file in a folder that exists"),
        (exported, "folder", "folder is not a file"),
    ):
        with pytest.raises(SystemExit, match=f"^export_onnx: [^\n]*{message}[^\n]*$"):
            export_onnx.main([str(folder), str(tmp_path / file)])
    recogniser = load_recogniser(exported, "cpu")
    recogniser.mods.encoder.enc.RNN = sb.nnet.RNN.LSTM(4, input_size=4)
    with pytest.raises(ValueError, match="^rnn_class: the recogniser has LSTM, and ONNX files are"):
        write(recogniser, tmp_path / "earlier.onnx")
    assert (tmp_path / "earlier.onnx").read_text() == "earlier"


# What a folder's YAML may name


def test_yaml_of_the_recipes_is_known(exported, streaming_run, seq2seq_run_with_language_model):
    """Also where another YAML was loaded before: HyperPyYAML then sees tuples at once."""
    yaml = ""
    runs = (streaming_run, seq2seq_run_with_language_model)
    for folder in (exported, *(run / "inference" for run in runs)):
        check_tags(folder / "hyperparams.yaml")
        yaml += (folder / "hyperparams.yaml").read_text()
    named = {name for _, name in re.findall("!(new|name):([\\w.]+)", yaml)}
    assert "sb_fast_sligru.SLiGRU" in named and named < KNOWN


@pytest.mark.parametrize(
    ("line", "tag"),
    [
        ("x: !apply:os.system [touch {}]", "!apply:os.system"),
        ("x: !new:os.system [touch {}]", "!new:os.system"),
        ("x: !new:subprocess.Popen {{args: [touch, {}]}}", "!new:subprocess.Popen"),
        ("x: !name:os.system", "!name:os.system"),
        ("x: !module:os", "!module:os"),
        ("x: !applyref:os.system [touch {}]", "!applyref:os.system"),
        ("x: !include:more.yaml", "!include:more.yaml"),
        ("x: !<!apply:os.system> [touch {}]", "!apply:os.system"),
        ("x: !!python/object/apply:os.system [touch {}]", "python/object/apply:os.system"),
        ("x: (!!python/object/apply:os.system ['touch {}'])", "!!python/object/apply:os.system"),
        ('x: "(!!python/object/apply:os.system [touch {}])"', "!!python/object/apply:os.system"),
        ("x: !tuple '[!!python/name:os.system ]'", "!!python/name:os.system"),
        (
            'a: "(!!python/object/apply:os"\nx: !ref <a>.system [touch {}])',
            "!!python/object/apply:os",
        ),
        (
            'a: "!"\nb: "(" \nx: !ref <b><a><a>python/object/apply:os.system [touch {}])',
            "!!python/object/apply:os.system",
        ),
        ("? !new:os.system [touch {}]\n: 1", "!new:os.system"),
        ("x: !new:torch.nn.os.system [touch {}]", "!new:torch.nn.os.system"),
    ],
)
def test_yaml_that_could_run_code_is_refused(exported, audio, tmp_path, line, tag):
    folder = shutil.copytree(exported, tmp_path / "folder")
    trace = tmp_path / "trace"
    with open(folder / "hyperparams.yaml", "a") as file:
        file.write("\n" + line.format(trace) + "\n")
    message = f"^transcribe: {folder}/hyperparams.yaml has the tag {re.escape(tag)} in line \\d+"
    with pytest.raises(SystemExit, match=message):
        transcribe_files([str(folder), str(audio[0]), "--device=cpu"])
    assert not trace.exists()


def test_trusted_yaml_may_name_anything(exported, audio, tmp_path, capsys):
    """As SpeechBrain's own classes load it: an RNN of the user's, for instance."""
    folder = shutil.copytree(exported, tmp_path / "folder")
    with open(folder / "hyperparams.yaml", "a") as file:
        file.write("x: !apply:operator.add [1, 2]\n")
    transcribe_files([str(folder), str(audio[0]), "--device=cpu", "--trust"])
    assert capsys.readouterr().out.startswith(f"{audio[0]}\t")
    assert load_recogniser(folder, "cpu", trust=True).hparams.x == 3


@pytest.mark.parametrize("damage", ["model.ckpt", "normalizer.ckpt", "tokenizer.ckpt", "YAML"])
def test_damaged_folders_end_in_one_line(exported, audio, tmp_path, damage):
    folder = shutil.copytree(exported, tmp_path / "folder")
    if damage == "YAML":
        (folder / "hyperparams.yaml").write_text("a: [")
    else:
        (folder / damage).write_bytes(b"")
    with pytest.raises(SystemExit, match=f"^transcribe: {folder}[^\n]+$"):
        transcribe_files([str(folder), str(audio[0]), "--device=cpu"])


# Seq2seq


@pytest.fixture(scope="module")
def seq2seq_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    return train(train_seq2seq, "librispeech_seq2seq.yaml", corpus, folder, *SEQ2SEQ)


@pytest.fixture(scope="module")
def seq2seq_exported(seq2seq_run, tmp_path_factory):
    return export(seq2seq_run, tmp_path_factory.mktemp("seq2seq exported"))


@pytest.fixture(scope="module")
def seq2seq_run_with_language_model(corpus, seq2seq_run, tmp_path_factory):
    """The same recogniser, tested once more with a language model of its tokens."""
    lm_folder, folder = (tmp_path_factory.mktemp("with language model") / name for name in "ab")
    (tokenizer,) = (seq2seq_run / "save").glob("*.model")
    options = (*LANGUAGE_MODEL, f"--tokenizer_file={tokenizer}")
    splits = ("--train_splits=[train-clean-100]", "--test_splits=[test-clean]", "--test_csv=[]")
    epochs = ("--number_of_epochs=1", "--num_workers=0")
    train(train_lm, "librispeech_lm.yaml", corpus, lm_folder, *options, *splits, *epochs)
    shutil.copytree(seq2seq_run / "save", folder / "save")
    options = (*SEQ2SEQ, *options, f"--lm_folder={lm_folder}", "--lm_weight=1.0")
    return train(train_seq2seq, "librispeech_seq2seq.yaml", corpus, folder, *options)


@pytest.mark.parametrize("fixture", ["seq2seq_run", "seq2seq_run_with_language_model"])
def test_seq2seq_transcripts_are_those_of_the_run_s_test(fixture, request, audio, tmp_path):
    run = request.getfixturevalue(fixture)
    folder = shutil.move(export(run), tmp_path / "moved")
    assert (folder / "lm.ckpt").exists() == fixture.endswith("language_model")
    recogniser = load_recogniser(folder, "cpu")
    assert type(recogniser) is EncoderDecoderASR
    texts = transcribed(recogniser, audio)
    expected = hypotheses(run)
    # Of so few epochs a model may hear two utterances alike: that depends on the CPU's rounding.
    assert len(expected) == len(audio) and len(set(expected.values())) >= 3
    assert {path.stem: " ".join(text.split()) for path, text in texts.items()} == expected


def test_decoder_class_can_be_overridden(seq2seq_exported, audio):
    ours = load_recogniser(seq2seq_exported, "cpu")
    stock = EncoderDecoderASR.from_hparams(
        source=str(seq2seq_exported),
        overrides=f"decoder_class: {STOCK_DECODER}",
        run_opts={"device": "cpu"},
    )
    modules = [type(asr.mods.decoder.dec).__module__ for asr in (ours, stock)]
    assert modules == ["sb_fast_sligru.decoder", "speechbrain.nnet.RNN"]
    assert transcribed(ours, audio) == transcribed(stock, audio)


def test_ctc_scorer_class_can_be_overridden(seq2seq_exported, audio):
    ours = load_recogniser(seq2seq_exported, "cpu")
    stock = EncoderDecoderASR.from_hparams(
        source=str(seq2seq_exported),
        overrides="ctc_scorer_class: !name:speechbrain.decoders.scorer.CTCScorer",
        run_opts={"device": "cpu"},
    )
    scorers = [asr.mods.decoder.scorer.partial_scorers["ctc"] for asr in (ours, stock)]
    modules = [type(scorer).__module__ for scorer in scorers]
    assert modules == ["sb_fast_sligru.ctc_scorer", "speechbrain.decoders.scorer"]
    assert transcribed(ours, audio) == transcribed(stock, audio)


@pytest.mark.parametrize("fixture", ["seq2seq_run", "seq2seq_run_with_language_model"])
def test_search_class_can_be_overridden(fixture, request, audio, tmp_path):
    """A trained model's hypotheses and scores are those of SpeechBrain's search."""
    folder = export(request.getfixturevalue(fixture), tmp_path)
    ours, stock = (
        EncoderDecoderASR.from_hparams(
            source=str(folder),
            overrides=f"test_search_class: !name:{package}.S2SRNNBeamSearcher",
            run_opts={"device": "cpu"},
        )
        for package in ("sb_fast_sligru", "speechbrain.decoders")
    )
    searches = [asr.mods.decoder for asr in (ours, stock)]
    modules = [type(search).__module__ for search in searches]
    assert modules == ["sb_fast_sligru.search", "speechbrain.decoders.seq2seq"]
    signals = [audio_files.read_audio(file, ours.audio_normalizer) for file in audio]
    for beam in (1, 8):
        for search in searches:
            search.beam_size = beam
        encoded = [ours.encode_batch(signal[None], torch.ones(1)) for signal in signals]
        expected = [searches[1](states, torch.ones(1)) for states in encoded]
        for states, theirs in zip(encoded, expected, strict=True):
            assert_same_hypotheses(searches[0](states, torch.ones(1)), theirs)
        # In a batch, of whose padding the search alone makes nothing.
        states = torch.nn.utils.rnn.pad_sequence([each[0] for each in encoded], True)
        lengths = torch.tensor([each.shape[1] for each in encoded]) / states.shape[1]
        theirs = [[hyp for (hyp,), *_ in expected], None, torch.cat([x[2] for x in expected])]
        assert_same_hypotheses(searches[0](states, lengths), theirs)


def assert_same_hypotheses(ours, theirs):
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4)


def test_keys_of_an_inference_folder_can_be_overridden(seq2seq_exported):
    """Where what is built of them only refers to them."""
    asr = EncoderDecoderASR.from_hparams(
        source=str(seq2seq_exported), overrides={"test_beam_size": 3}, run_opts={"device": "cpu"}
    )
    assert asr.mods.decoder.beam_size == 3


def test_a_run_goes_on_with_either_decoder(corpus, seq2seq_run, tmp_path):
    """One more epoch from the same checkpoint, then beam search."""
    logs = []
    options = [option for option in SEQ2SEQ if "number_of_epochs" not in option]
    for name, tag in (
        ("ours", "!name:sb_fast_sligru.AttentionalRNNDecoder"),
        ("stock", STOCK_DECODER),
    ):
        folder = tmp_path / name
        shutil.copytree(seq2seq_run / "save", folder / "save")
        options_here = (*options, "--number_of_epochs=4", f"--decoder_class={tag}")
        train(train_seq2seq, "librispeech_seq2seq.yaml", corpus, folder, *options_here)
        assert "!apply:sb_fast_sligru.decoder.build" in (folder / "hyperparams.yaml").read_text()
        (line,) = re.findall(r"^epoch: 4,.*$", (folder / "train_log.txt").read_text(), re.M)
        logs.append([float(x) for x in re.findall(r"(?:train|valid) loss: ([\d.e+-]+)", line)])
        assert len(hypotheses(folder)) > 0
        export(folder)
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=0.01)


def test_language_model_changes_the_transcripts(seq2seq_run, seq2seq_run_with_language_model):
    assert hypotheses(seq2seq_run) != hypotheses(seq2seq_run_with_language_model)


# The test of a run


def evaluate(recipe, yaml, corpus, run, folder, *options):
    """What the test of a run, done once more, returns and writes."""
    shutil.copytree(run / "save", folder / "save")
    argv = [str(ROOT / "hparams" / yaml), f"--data_folder={corpus}", f"--output_folder={folder}"]
    options = ("--device=cpu", "--noprogressbar", "--token_type=char", *options)
    results = recipe.main([*argv, *options, "--test_only", "--export_inference=False"])
    files = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("?er_*.txt")}
    assert sorted(files) == ["cer_test-clean.txt", "wer_test-clean.txt"]
    return results["test-clean"], files


@pytest.mark.parametrize(
    "search",
    [
        (),
        (f"--decoder_class={STOCK_DECODER}",),
        ("--test_search_class=!name:speechbrain.decoders.S2SRNNBeamSearcher",),
        ("--ctc_scorer_class=!name:speechbrain.decoders.scorer.CTCScorer",),
    ],
    ids=str,
)
@pytest.mark.usefixtures("environment_described_once")
def test_results_do_not_depend_on_the_batches(corpus, seq2seq_run, tmp_path, search):
    """Those of one by one, which were never padded, are SpeechBrain's."""
    yaml, options = "librispeech_seq2seq.yaml", (*SEQ2SEQ, *search)
    found = {}
    for size in (1, 2, 16) if not search else (1, 16):
        batch_size = f"--test_batch_size={size}"
        folder = tmp_path / str(size)
        found[size] = evaluate(
            train_seq2seq, yaml, corpus, seq2seq_run, folder, *options, batch_size
        )
    assert_same_results(found)
    manifest = load_manifest(tmp_path / "16/save/test-clean.csv")
    assert list(hypotheses(tmp_path / "16")) == list(manifest)
    durations = [row["duration"] for row in manifest.values()]
    assert durations != sorted(durations)  # by which the batches are made


@pytest.mark.usefixtures("environment_described_once")
def test_results_of_ctc_do_not_depend_on_the_batches(corpus, run, tmp_path):
    yaml, found = "librispeech_ctc.yaml", {}
    for size in (1, 16):
        batch_size = f"--test_batch_size={size}"
        folder = tmp_path / str(size)
        found[size] = evaluate(train_ctc, yaml, corpus, run, folder, *CTC, batch_size)
    folder = tmp_path / "use_lengths"  # of the same weights
    options = (*CTC, "--use_lengths=True", "--test_batch_size=16")
    found["use_lengths"] = evaluate(train_ctc, yaml, corpus, run, folder, *options)
    assert_same_results(found)


@pytest.mark.usefixtures("environment_described_once")
def test_training_with_lengths(corpus, tmp_path, monkeypatch):
    """An epoch with augmentation; the export has the key."""
    forward, told = sb_fast_sligru.CRDNN.forward, []

    def spy(net, x, lengths=None):
        told.append((net.training, lengths is not None))
        return forward(net, x, lengths)

    monkeypatch.setattr(sb_fast_sligru.CRDNN, "forward", spy)
    options = ("--use_lengths=True", "--number_of_epochs=1", "--enable_speed_perturb=True")
    run = train(train_ctc, "librispeech_ctc.yaml", corpus, tmp_path, *CTC, *options)
    assert set(told) == {(True, True), (False, True)}
    assert load_recogniser(run / "inference", "cpu").mods.encoder.enc.use_lengths


def assert_same_results(found):
    """Batch size -> statistics and files."""
    stats, files = found.pop(1)
    assert stats["loss"] > 0
    for others, other_files in found.values():
        assert other_files == files
        assert others == pytest.approx(stats, rel=1e-5)


def test_utterances_are_searched_together_where_nothing_depends_on_it(seq2seq_exported):
    search = load_recogniser(seq2seq_exported, "cpu").mods.decoder
    assert treats_utterances_alone(search)
    with sb_fast_sligru.backend("reference"):
        assert not treats_utterances_alone(search)
    search.scorer.partial_scorers["ctc"].ctc_window_size = 5
    assert not treats_utterances_alone(search)


# transcribe.py


def test_command_line_prints_a_line_for_each_file(exported, recogniser, audio, capsys):
    transcribe_files([str(exported), str(audio[3]), str(audio[0].parent), "--device=cpu"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [str(path) for path in (audio[3], *audio)]
    assert lines[0] == lines[4]
    for name, text in lines:
        assert text == recogniser.transcribe_file(name)


def last_line(printed):
    """Its seconds of audio; the rest of the lines."""
    *lines, last = printed.splitlines(keepends=True)
    seconds, took, speed = re.fullmatch(
        r"transcribe: ([\d.]+) s of audio in ([\d.]+) s, ([\d.]+) s a second\n", last
    ).groups()
    assert float(took) >= 0 and float(speed) > 0
    return float(seconds), "".join(lines)


@pytest.mark.parametrize("batch", [(), ("--max_batch_length=20",)])
def test_last_line_tells_the_speed(exported, audio, capsys, batch):
    paths = [str(path) for path in audio[:2]]
    transcribe_files([str(exported), *paths, "--device=cpu", *batch])
    seconds, _ = last_line(capsys.readouterr().err)
    assert seconds == pytest.approx(sum(soundfile.info(path).duration for path in paths), abs=0.1)


@pytest.fixture(scope="module")
def unequal(audio, tmp_path_factory):
    """Files of quite other lengths each."""
    folder = tmp_path_factory.mktemp("unequal")
    files = [folder / path.name for path in audio]
    for number, (path, source) in enumerate(zip(files, audio, strict=True)):
        samples, _ = soundfile.read(source, dtype="int16")
        soundfile.write(path, samples[8000 * number :], 16000)
    return files


@pytest.mark.parametrize("fixture", ["exported", "seq2seq_exported"])
def test_batches_do_not_change_the_transcripts(request, fixture, unequal):
    recogniser, files = load_recogniser(request.getfixturevalue(fixture), "cpu"), unequal
    batched = transcribed(recogniser, files, max_batch_length=1000)
    assert batched == transcribed(recogniser, files)
    assert list(batched) == files  # of one batch, in their order


@pytest.mark.parametrize("fixture", ["exported", "seq2seq_exported"])
def test_use_lengths_encodes_a_batch_at_once(request, fixture, unequal, tmp_path, capsys):
    """To the transcripts of one file at a time, and of recognisers without it."""
    plain = request.getfixturevalue(fixture)
    told = with_key(plain, tmp_path / "told", "use_lengths", "True")
    printed = []
    for folder in (plain, told):
        for options in ((), ("--max_batch_length=1000",)):
            transcribe_files([str(folder), *map(str, unequal), "--device=cpu", *options])
            printed.append(sorted(capsys.readouterr().out.splitlines()))
    assert len(printed[0]) == len(unequal)
    assert printed == printed[:1] * 4
    for folder, expected in ((plain, len(unequal)), (told, 1)):
        recogniser, calls = load_recogniser(folder, "cpu"), []
        recogniser.mods.encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        transcribed(recogniser, unequal, max_batch_length=1000)
        assert len(calls) == expected


def read(recogniser, files):
    return [audio_files.read_audio(file, recogniser.audio_normalizer) for file in files]


@pytest.mark.parametrize("norm_type", ["global", "sentence"])
@pytest.mark.parametrize("fixture", ["exported", "seq2seq_exported"])
def test_use_lengths_makes_the_states_of_single_files(request, fixture, unequal, norm_type):
    recogniser = load_recogniser(request.getfixturevalue(fixture), "cpu")
    encoder, signals = recogniser.mods.encoder, read(recogniser, unequal)
    encoder.normalize.norm_type = norm_type
    with torch.no_grad():
        alone, frames = encode_each(
            lambda wav: recogniser.encode_batch(wav, torch.ones(1)), signals
        )
        errors = []
        for encoder.enc.use_lengths in (True, False):
            states, count = encode_together(recogniser.encode_batch, signals, encoder)
            assert torch.equal(count, frames)
            pairs = zip(states, alone, frames.tolist(), strict=True)
            errors.append(max(float((a[:n] - b[:n]).abs().max()) for a, b, n in pairs))
    assert errors[0] < 1e-3 < 0.1 < errors[1]


def test_a_mean_of_the_whole_batch_needs_files_one_by_one(exported, tmp_path):
    encoder = load_recogniser(exported, "cpu").mods.encoder
    assert not encodes_utterances_alone(encoder)
    encoder.enc.use_lengths = True
    assert encodes_utterances_alone(encoder)
    encoder.normalize.norm_type = "batch"
    assert not encodes_utterances_alone(encoder)


@pytest.mark.parametrize("fixture", ["exported", "seq2seq_exported"])
def test_speechbrains_batches_use_lengths(request, fixture, unequal):
    """`transcribe_batch`, told lengths of features; SpeechBrain rounds those of the states."""
    recogniser = load_recogniser(request.getfixturevalue(fixture), "cpu")
    encoder = recogniser.mods.encoder
    hop, pooling = strides(encoder)
    signals = [  # whose frames fill the windows of the pooling
        signal[: len(signal) // (hop * pooling) * hop * pooling - hop]
        for signal in read(recogniser, unequal)
    ]
    alone = [recogniser.transcribe_batch(signal[None], torch.ones(1))[0][0] for signal in signals]
    encoder.enc.use_lengths = True
    wavs = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
    samples = torch.tensor([len(signal) for signal in signals])
    lengths = relative_lengths(encoder, samples, wavs.shape[1])
    assert recogniser.transcribe_batch(wavs, lengths)[0] == alone


def test_batches_hold_like_lengths_up_to_a_limit():
    seconds = {"a": 3.0, "b": 10.0, "c": 9.9, "d": 9.8, "e": 2.95, "f": 40.0, "g": 9.6}
    batches = list(_batches(seconds, max_batch_length=30))
    assert batches == [["f"], ["b", "c", "d"], ["g", "a", "e"]]
    assert list(_batches(seconds, max_batch_length=20))[1:3] == [["b", "c"], ["d", "g"]]


def resampled(samples, rate):
    return torchaudio.functional.resample(torch.from_numpy(samples), 16000, rate).numpy()


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("extension", ["wav", "flac", "WAV"])
def test_any_sample_rate(recogniser, audio, tmp_path, rate, extension):
    samples, _ = soundfile.read(audio[0], dtype="float32")
    path = tmp_path / f"speech.{extension}"
    soundfile.write(path, resampled(samples, rate), rate)
    ((found,), _) = audio_files.find_audio([tmp_path])
    signal = audio_files.read_audio(found, recogniser.audio_normalizer)
    # All of it is there, and what 8 kHz can hold is as it was.
    assert abs(len(signal) - len(samples)) <= 2
    low = torch.fft.rfft(signal[: len(samples) - 2])[: len(samples) * 3 // 16]
    expected = torch.fft.rfft(torch.from_numpy(samples[:-2]))[: len(samples) * 3 // 16]
    assert (low - expected).norm() < 0.02 * expected.norm()
    assert transcribed(recogniser, [found]) == {path: recogniser.transcribe_file(str(path))}


def test_channels_are_mixed(recogniser, audio, tmp_path):
    samples, _ = soundfile.read(audio[0], dtype="float32")
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([2 * samples, np.zeros_like(samples)], axis=1), 16000, "FLOAT")
    assert transcribed(recogniser, [path])[path] == recogniser.transcribe_file(str(audio[0]))


@pytest.mark.parametrize("samples", [1, 100, 400])
def test_a_moment_of_audio_is_no_error(recogniser, tmp_path, samples):
    soundfile.write(tmp_path / "click.wav", np.full(samples, 0.1), 16000)
    assert len(transcribed(recogniser, [tmp_path / "click.wav"])) == 1


@pytest.mark.parametrize("fixture", ["exported", "seq2seq_exported"])
def test_batches_decode_as_many_frames_as_single_files(request, fixture, monkeypatch):
    recogniser = load_recogniser(request.getfixturevalue(fixture), "cpu")
    encoder = recogniser.mods.encoder
    alone = {n: encoder(torch.rand(1, n), torch.ones(1)).shape[1] for n in range(3190, 3841, 25)}
    assert {n: count_frames(encoder, n)[1] for n in alone} == alone
    signals = [torch.rand(n) for n in range(32319, 31349, -5)]
    expected = [count_frames(encoder, len(signal))[1] for signal in signals]

    def decode(states, lengths, *_):
        found.extend(torch.round(lengths * states.shape[1]).int().tolist())
        return [[]] * len(states), None, None, None

    # As SpeechBrain's class does it.
    found = []
    if fixture == "exported":
        monkeypatch.setattr(recogniser, "decoding_function", lambda *args: decode(*args)[0])
    else:
        monkeypatch.setattr(recogniser.mods.decoder, "forward", decode)
    wavs = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
    lengths = torch.tensor([len(signal) for signal in signals])
    recogniser.transcribe_batch(wavs, lengths / lengths.max())
    assert sum(theirs < ours for theirs, ours in zip(found, expected, strict=True)) > 0
    found.clear()
    transcribe_module._recognise(recogniser, signals)
    assert found == expected
    # The recipes' validation and test.
    names = SimpleNamespace(
        compute_features=encoder.compute_features,
        enc=encoder.enc,
        normalize=encoder.normalize,
        epoch_counter=SimpleNamespace(current=1),
    )
    brain = SimpleNamespace(hparams=names, modules=names, device="cpu")
    batch = SimpleNamespace(sig=(wavs, lengths / lengths.max()))
    for stage in (sb.Stage.VALID, sb.Stage.TEST):
        states, shares = ASR.encode(brain, batch, stage)
        assert torch.round(shares * states.shape[1]).int().tolist() == expected


@pytest.mark.parametrize("stage", sb.Stage)
def test_recipes_tell_the_encoder_lengths(exported, stage):
    """Training, validation and test have the states that each utterance has alone."""
    recogniser = load_recogniser(exported, "cpu")
    encoder = recogniser.mods.encoder
    signals = [torch.rand(n) for n in range(32319, 31349, -45)]
    samples = torch.tensor([len(signal) for signal in signals])
    with torch.no_grad():
        alone = [
            encoder.enc(encoder.normalize(encoder.compute_features(s[None])))[0] for s in signals
        ]
        encoder.enc.use_lengths = True
        names = SimpleNamespace(
            compute_features=encoder.compute_features,
            enc=encoder.enc,
            normalize=encoder.normalize,
            epoch_counter=SimpleNamespace(current=1000),  # statistics of the features are complete
            wav_augment=lambda *batch: batch,
        )
        brain = SimpleNamespace(hparams=names, modules=names, device="cpu")
        wavs = torch.nn.utils.rnn.pad_sequence(signals, batch_first=True)
        batch = SimpleNamespace(sig=(wavs, samples / samples.max()))
        states, shares = ASR.encode(brain, batch, stage)
    frames = (shares * states.shape[1]).round().int().tolist()
    assert frames == [len(each) for each in alone]
    for each, count, expected in zip(states, frames, alone, strict=True):
        torch.testing.assert_close(each[:count], expected, rtol=1e-3, atol=1e-4)
        assert not each[count:].any()


def test_frames_without_time_pooling():
    stft = SimpleNamespace(hop_length=160)
    encoder = SimpleNamespace(
        compute_features=SimpleNamespace(compute_STFT=stft), enc=SimpleNamespace()
    )
    assert count_frames(encoder, 1600) == (11, 11)


# Long recordings


def bursts(seconds, pauses, noise=0.0):
    """Noise at 16 kHz that lasts, and is silent, for so many seconds by turns; the pauses."""
    signal, where = [], []
    for loud, pause in zip(seconds, pauses, strict=True):
        signal.append(0.1 * torch.randn(round(16000 * loud)))
        start = sum(map(len, signal))
        signal.append(torch.zeros(round(16000 * pause)))
        where.append((start, start + len(signal[-1])))
    signal = torch.cat(signal)
    return signal + noise * torch.randn(len(signal)), where


def places(signal, parts):
    """Start and end of each part, by its place in memory."""
    starts = [(part.data_ptr() - signal.data_ptr()) // signal.element_size() for part in parts]
    return [(start, start + len(part)) for start, part in zip(starts, parts, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.003])
@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_long_recordings_are_cut_in_their_pauses(noise, offset):
    signal, pauses = bursts([3, 2, 4, 3, 1, 2, 5], [0.3, 0.4, 0.5, 0.3, 0.6, 0.4, 0.0], noise)
    signal += offset
    parts = audio_files.cut_at_pauses(signal, 16000, 6.0)
    found = places(signal, parts)
    assert found[0][0] == 0 and found[-1][1] == len(signal)
    for (_, end), (start, _) in zip(found, found[1:], strict=False):
        assert end == start and any(first < end < last for first, last in pauses)
    assert max(map(len, parts)) <= 6 * 16000


def test_long_pauses_are_left_out():
    signal, pauses = bursts([3, 2, 4], [20.0, 3.0, 5.0], 0.001)
    found = places(signal, audio_files.cut_at_pauses(signal, 16000, 6.0))
    sounds = [(0, pauses[0][0]), (pauses[0][1], pauses[1][0]), (pauses[1][1], pauses[2][0])]
    assert len(found) == 3
    for (start, end), (first, last) in zip(found, sounds, strict=True):
        assert first - 8000 < start <= first and last <= end < last + 8000


def test_recordings_without_pauses_are_cut_all_the_same():
    for signal in (0.1 * torch.randn(160001), torch.full((160000,), 0.1)):
        parts = audio_files.cut_at_pauses(signal, 16000, 3.0)
        assert max(map(len, parts)) <= 48000 and min(map(len, parts)) > 8000
        assert torch.equal(torch.cat(parts), signal)


def test_recordings_of_the_longest_training_utterance_are_not_cut():
    signal = torch.randn(83841)
    (part,) = audio_files.cut_at_pauses(signal, 16000, 83841 / 16000)
    assert part is signal
    assert len(audio_files.cut_at_pauses(signal, 16000, 83840 / 16000)) == 2


@pytest.mark.parametrize("seconds", [1, 100])
def test_silence_has_no_text(recogniser, tmp_path, seconds):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000 * seconds), 16000)
    files = [tmp_path / "silence.wav"]
    assert transcribed(recogniser, files, max_segment_length=5.0) == {files[0]: ""}


def test_attention_hears_long_recordings_in_parts(
    seq2seq_exported, audio, tmp_path, capsys, caplog
):
    """Cut at the longest utterance of training."""
    folder = seq2seq_exported
    pause = np.zeros(16000)
    samples = [part for path in audio for part in (soundfile.read(path)[0], pause)]
    path = tmp_path / "long.wav"
    soundfile.write(path, np.concatenate(samples), 16000, "FLOAT")
    recogniser = load_recogniser(folder, "cpu")
    longest = recogniser.hparams.longest_train_utterance
    signal = audio_files.read_audio(path, recogniser.audio_normalizer)
    parts = audio_files.cut_at_pauses(signal, 16000, longest)
    assert len(parts) >= len(audio)
    for number, part in enumerate(parts):
        soundfile.write(tmp_path / f"{number}.wav", part.numpy(), 16000, "FLOAT")
    alone = transcribed(recogniser, [tmp_path / f"{n}.wav" for n in range(len(parts))])
    transcribe_files([str(folder), str(path), "--device=cpu"])
    expected = " ".join(filter(None, alone.values()))
    assert capsys.readouterr().out == f"{path}\t{expected}\n"
    assert f"{path}: " in caplog.text and f"into {len(parts)} parts of at most" in caplog.text


def test_ctc_hears_long_recordings_whole(exported, recogniser, audio, tmp_path, capsys, caplog):
    path = tmp_path / "long.wav"
    samples = np.concatenate([soundfile.read(path)[0] for path in audio])
    soundfile.write(path, samples, 16000, "FLOAT")
    transcribe_files([str(exported), str(path), "--device=cpu"])
    assert len(samples) / 16000 > recogniser.hparams.longest_train_utterance
    assert "parts" not in caplog.text
    assert capsys.readouterr().out == f"{path}\t{recogniser.transcribe_file(str(path))}\n"


def test_length_of_the_parts_is_an_option(exported, recogniser, audio, capsys, caplog):
    options = [str(exported), str(audio[0]), "--device=cpu"]
    transcribe_files([*options, "--max_segment_length=1"])
    assert "parts of at most 1 s" in caplog.text
    seconds = soundfile.info(audio[0]).duration
    assert len(transcribed(recogniser, [audio[0]], max_batch_length=9, max_segment_length=1)) == 1
    caplog.clear()
    transcribe_files([*options, f"--max_segment_length={seconds}"])
    assert "parts" not in caplog.text
    *_, text = capsys.readouterr().out.splitlines()
    assert text == f"{audio[0]}\t{recogniser.transcribe_file(str(audio[0]))}"


def test_folders_that_do_not_tell_their_longest_utterance(
    seq2seq_exported, audio, tmp_path, capsys
):
    folder = shutil.copytree(seq2seq_exported, tmp_path / "folder")
    yaml = (folder / "hyperparams.yaml").read_text()
    (folder / "hyperparams.yaml").write_text(re.sub("^longest_train.*\n", "", yaml, flags=re.M))
    transcribe_files([str(folder), str(audio[0]), "--device=cpu"])
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{audio[0]}\t")
    assert "does not tell its longest utterance of training: nothing is cut" in captured.err


# Streams


@pytest.fixture(scope="module")
def streaming_run(corpus, tmp_path_factory):
    folder, epochs = tmp_path_factory.mktemp("streaming"), ["--number_of_epochs=22"]
    return train(train_ctc, "librispeech_ctc_streaming.yaml", corpus, folder, *CTC, *epochs)


@pytest.fixture(scope="module")
def streaming_recogniser(streaming_run):
    return load_recogniser(streaming_run / "inference", "cpu")


def chunks_of(recogniser, file, size):
    return audio_files.read_audio(file, recogniser.audio_normalizer).split(size)


@pytest.mark.parametrize("size", [160, 640, 1000, 10**6])
def test_pieces_make_the_text_of_the_run_s_test(streaming_run, streaming_recogniser, audio, size):
    transcriber = StreamingTranscriber(streaming_recogniser)
    expected = hypotheses(streaming_run)
    assert len(expected) == len(audio) and len(set(expected.values())) >= 3
    for file in audio:
        chunks = chunks_of(streaming_recogniser, file, size)
        pieces = list(transcriber.transcribe(chunks))
        assert len(pieces) == len(chunks) + 1
        assert " ".join("".join(pieces).split()) == expected[file.stem]
        assert "".join(pieces) == streaming_recogniser.transcribe_file(str(file))


def test_pieces_come_while_the_file_is_heard(streaming_recogniser, audio):
    """None says more than what was heard so far does, nor does it come late."""
    transcriber = StreamingTranscriber(streaming_recogniser)
    chunks, heard = chunks_of(streaming_recogniser, audio[0], 640), []
    texts = []
    for piece in transcriber.transcribe(chunk for chunk in chunks if not heard.append(chunk)):
        texts.append((len(heard), piece))
    assert [count for count, _ in texts] == [*range(1, len(chunks) + 1), len(chunks)]
    middle = len(chunks) // 2
    assert (
        2
        <= len("".join(piece for _, piece in texts[:middle]).split())
        < len("".join(piece for _, piece in texts).split())
    )


def test_a_token_across_two_chunks_is_one_and_a_space_stays():
    """By a recogniser that hears a token in each sample, and spells it."""
    letters = ["", "\u2581A", "B", "\u2581"]

    class Tokenizer:
        def decode_ids(self, tokens):
            return "".join(letters[token] for token in tokens).replace("\u2581", " ").lstrip()

    transcriber = StreamingTranscriber.__new__(StreamingTranscriber)
    transcriber.recogniser = SimpleNamespace(
        device="cpu",
        tokenizer=Tokenizer(),
        decoding_function=lambda states, lengths: sb.decoders.ctc_greedy_decode(
            states, lengths, blank_id=0
        ),
        audio_normalizer=SimpleNamespace(sample_rate=0),
        mods=SimpleNamespace(
            encoder=SimpleNamespace(
                compute_features=SimpleNamespace(compute_STFT=SimpleNamespace(hop_length=0)),
                enc=None,
            )
        ),
    )

    class Encoder:
        def make_streaming_context(self):
            return SimpleNamespace(samples=0)

        def __call__(self, chunk, context, is_last):
            context.samples += chunk.shape[1]
            return torch.nn.functional.one_hot(chunk.long(), len(letters)).float()

    transcriber.encoder = Encoder()
    for stream in ([1, 1, 2, 0, 2, 1, 3, 3, 1], [3, 1, 1, 0, 1], [3, 3, 2, 3, 0, 3, 1], [0, 0]):
        tokens = sb.decoders.ctc.filter_ctc_output(stream, blank_id=0)
        expected = Tokenizer().decode_ids(tokens)
        for size in range(1, len(stream) + 1):
            chunks = torch.tensor(stream, dtype=torch.float32).split(size)
            assert "".join(transcriber.transcribe(chunks)) == expected


def test_command_line_prints_streams_as_it_does_files(streaming_run, audio, capsys):
    options = [str(streaming_run / "inference"), *map(str, audio), "--device=cpu"]
    transcribe_files(options)
    expected = capsys.readouterr()
    transcribe_files([*options, "--stream"])
    found = capsys.readouterr()
    assert found.out == expected.out and found.out.count("\t") == len(audio)
    assert last_line(found.err)[0] == last_line(expected.err)[0]


@pytest.mark.parametrize("samples", [np.full(1, 0.1), np.full(400, 0.1), np.zeros(16000)])
def test_a_moment_of_a_stream_is_no_error(streaming_recogniser, tmp_path, samples):
    file = tmp_path / "short.wav"
    soundfile.write(file, samples, 16000)
    (done,) = StreamingTranscriber(streaming_recogniser).transcribe_files([file])
    assert "".join(done.text) == transcribed(streaming_recogniser, [file])[file]


@pytest.mark.parametrize(
    ("fixture", "reason"),
    [
        ("exported", "encoder: compute_features is a .*Fbank, whose floor .* take StreamingFbank"),
        ("seq2seq_exported", "its decoder attends to whole utterances"),
    ],
)
def test_recognisers_that_cannot_hear_a_stream(request, fixture, reason, audio):
    folder = request.getfixturevalue(fixture)
    message = f"^transcribe: this recogniser cannot hear a stream: {reason}$"
    with pytest.raises(SystemExit, match=message):
        transcribe_files([str(folder), str(audio[0]), "--device=cpu", "--stream"])


@pytest.mark.parametrize("option", ["--max_batch_length=9", "--max_segment_length=9"])
def test_a_stream_has_no_lengths(option, capsys):
    with pytest.raises(SystemExit):
        transcribe_files(["folder", "file.wav", "--stream", option])
    assert "--stream hears one file at a time" in capsys.readouterr().err


# Files and names that are not as they should be


def damaged(audio, folder):
    """Write one file of each kind; name -> what is said of it."""
    samples, _ = soundfile.read(audio[0])
    for name, value in (("nan", np.nan), ("inf", -np.inf), ("huge", 1e30), ("integers", 32767)):
        spoilt = samples.copy()
        spoilt[1000] = value
        soundfile.write(folder / f"{name}.wav", spoilt, 16000, "DOUBLE")
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    for extension in ("wav", "w64", "aiff", "au"):
        path = folder / f"half.{extension}"
        soundfile.write(path, samples, 16000, "PCM_16")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    contents = {
        "cut.flac": audio[1].read_bytes()[:-1],
        "empty.wav": b"",
        "text.wav": b"no audio" * 99,
        "samples.raw": bytes(999),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.wav")
    (folder / "folder").mkdir()
    return {
        "nan.wav": "samples of nan",
        "inf.wav": "samples of inf",
        "huge.wav": "samples of 1e",
        "integers.wav": "samples of 3.28e",
        "none.wav": "it has no samples",
        **{f"half.{extension}": "truncated" for extension in ("wav", "w64", "aiff", "au")},
        "cut.flac": "lost sync",
        "empty.wav": "not recognised",
        "text.wav": "not recognised",
        "samples.raw": "samplerate must be specified",
        "pipe.wav": "not a file",
        "folder": "holds no WAV or FLAC file",
        "nowhere.wav": "No such file",
        "x" * 300: "File name too long",
    }


@pytest.mark.parametrize("options", [(), ("--max_batch_length=20",), ("--stream",)])
def test_bad_files_are_named_and_the_rest_is_transcribed(
    streaming_run, audio, tmp_path, capsys, options
):
    bad = damaged(audio, tmp_path)
    paths = [str(tmp_path / name) for name in bad]
    paths[2:2] = [str(audio[0])]
    with pytest.raises(SystemExit) as stopped:
        folder = str(streaming_run / "inference")
        transcribe_files([folder, *paths, str(audio[1]), "--device=cpu", *options])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    names = [line.split("\t")[0] for line in captured.out.splitlines()]
    assert sorted(names) == sorted(map(str, audio[:2]))
    for name, said in bad.items():
        line = f"^transcribe: {re.escape(str(tmp_path / name))}: .*{said}"
        assert len(re.findall(line, captured.err, re.MULTILINE)) == 1, name
    assert last_line(captured.err)[1].count("transcribe: ") == len(bad)


@pytest.mark.parametrize("promised", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF024])
def test_wav_written_to_a_pipe_is_no_truncated_one(recogniser, audio, tmp_path, promised):
    """Its header promises more than any file has, since it was written before the samples."""
    path = tmp_path / "stream.wav"
    soundfile.write(path, soundfile.read(audio[0], dtype="int16")[0], 16000)
    content = bytearray(path.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = content[size : size + 4] = promised.to_bytes(4, "little")
    path.write_bytes(content)
    assert transcribed(recogniser, [path]) == {path: recogniser.transcribe_file(str(audio[0]))}


def test_each_line_comes_as_soon_as_its_file_is_done(recogniser, audio, monkeypatch):
    read, done = [], transcribe(recogniser, audio)
    real = audio_files.read_audio
    monkeypatch.setattr(
        transcribe_module, "read_audio", lambda *args: read.append(args[0]) or real(*args)
    )
    for count, each in enumerate(done, 1):
        assert each.file == audio[count - 1] and len(read) == count


def test_any_name_is_one_line_and_one_field(exported, audio, tmp_path, capsys):
    names = {
        "a\tb.flac": r"a\tb.flac",
        "c\nd\r.flac": r"c\nd\r.flac",
        "e\\t.flac": r"e\\t.flac",
        "f\x1b[2J\u2028.flac": r"f\x1b[2J\u2028.flac",
        "g h é.flac": "g h é.flac",
        os.fsdecode(b"i\xff.flac"): r"i\udcff.flac",
    }
    for name in names:
        (tmp_path / name).symlink_to(audio[0])
    (tmp_path / "._leftover.flac").write_bytes(b"of macOS")
    paths = [str(tmp_path), f"{tmp_path}/no\tfile\n.wav"]
    with pytest.raises(SystemExit):
        transcribe_files([str(exported), *paths, "--device=cpu"])
    captured = capsys.readouterr()
    fields = [line.split("\t") for line in captured.out.split("\n")[:-1]]
    assert [len(line) for line in fields] == [2] * len(names)
    assert sorted(name for name, _ in fields) == sorted(f"{tmp_path}/{n}" for n in names.values())
    _, error = last_line(captured.err)
    assert error == f"transcribe: {tmp_path}/no\\tfile\\n.wav: No such file or directory\n"


def test_wrong_folders_end_in_one_line(run, audio, tmp_path):
    for folder in (tmp_path, run, tmp_path / "nowhere"):  # a run's own YAML is not for inference
        with pytest.raises(SystemExit, match=f"^transcribe: {folder} has no inference YAML"):
            transcribe_files([str(folder), str(audio[0])])


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", ""])
def test_devices_that_cannot_be_used_are_named(exported, audio, device):
    with pytest.raises(SystemExit, match=f"^transcribe: --device={device}: [^\n]+$"):
        transcribe_files([str(exported), str(audio[0]), f"--device={device}"])


@pytest.mark.parametrize("option", ["--max_batch_length", "--max_segment_length"])
@pytest.mark.parametrize("value", ["-1", "0", "nan", "many"])
def test_lengths_are_positive(option, value, capsys):
    with pytest.raises(SystemExit):
        transcribe_files(["folder", "file.wav", f"{option}={value}"])
    assert option in capsys.readouterr().err
