"""From a run to transcripts: the exported folder, SpeechBrain's inference, transcribe.py."""

import re
import shutil
import socket

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from helpers import ROOT
from speechbrain.inference.ASR import EncoderASR, EncoderDecoderASR
from speechbrain.utils.metric_stats import ErrorRateStats
from tiny_corpora import make_speech

import export_inference
import train_ctc
import train_lm
import train_seq2seq
from sligru_recipes.inference import transcribe
from sligru_recipes.inference.export import _entries, _needed, export
from sligru_recipes.training import brain
from transcribe import main as transcribe_files

pytestmark = pytest.mark.usefixtures("one_thread")

STOCK = "!name:speechbrain.nnet.RNN.SLiGRU"
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
    return transcribe.load_recogniser(exported, "cpu")


def hypotheses(run):
    """Utterance -> what the run's own test recognised."""
    report = (run / "wer_test-clean.txt").read_text(encoding="utf-8")
    found = re.findall(r"^(\d+-\d+-\d+), %WER.*\n.*\n.*\n(.*)$", report, re.MULTILINE)
    return {
        name: " ".join(re.findall(r"[^\s;]+", line.replace("<eps>", ""))) for name, line in found
    }


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


def test_references_of_the_run_s_yaml_are_restored():
    yaml = """
a: 1  # a comment
block: &id001
- 2
- 3

######## A section

rnn: &id010 !name:x.Y
    size: 4
net: !new:x.Z
  # and another
    block: *id001
    rnns: [*id010, *id010]
"""
    entries = _entries(yaml)
    assert entries == {
        "a": "a: 1  # a comment\n",
        "block": "block:\n- 2\n- 3\n",
        "rnn": "rnn: !name:x.Y\n    size: 4\n",
        "net": "net: !new:x.Z\n    block: !ref <block>\n    rnns: [!ref <rnn>, !ref <rnn>]\n",
    }
    assert _needed(entries, "x: !ref <net>") == entries["block"] + entries["rnn"] + entries["net"]


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
        transcribe.EncoderASR.from_hparams(source=str(exported), overrides={"cnn_channels": [8]})


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


# Seq2seq


@pytest.fixture(scope="module")
def seq2seq_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seq2seq")
    return train(train_seq2seq, "librispeech_seq2seq.yaml", corpus, folder, *SEQ2SEQ)


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
    recogniser = transcribe.load_recogniser(folder, "cpu")
    assert type(recogniser) is EncoderDecoderASR
    texts, errors = transcribe.transcribe(recogniser, audio)
    assert errors == {}
    expected = hypotheses(run)
    # Of so few epochs a model may hear two utterances alike: that depends on the CPU's rounding.
    assert len(expected) == len(audio) and len(set(expected.values())) >= 3
    assert {path.stem: " ".join(text.split()) for path, text in texts.items()} == expected


def test_language_model_changes_the_transcripts(seq2seq_run, seq2seq_run_with_language_model):
    assert hypotheses(seq2seq_run) != hypotheses(seq2seq_run_with_language_model)


# transcribe.py


def test_command_line_prints_a_line_for_each_file(exported, recogniser, audio, capsys):
    transcribe_files([str(exported), str(audio[3]), str(audio[0].parent), "--device=cpu"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [str(path) for path in (audio[3], *audio)]
    assert lines[0] == lines[4]
    for name, text in lines:
        assert text == recogniser.transcribe_file(name)


def test_batches_do_not_change_the_transcripts(recogniser, audio, tmp_path):
    samples = [soundfile.read(path, dtype="int16")[0] for path in audio]
    cut = [tmp_path / path.name for path in audio]
    for step, limit in ((0, 0), (160, 2)):  # without padding, and with a little
        for number, (path, signal) in enumerate(zip(cut, samples, strict=True)):
            soundfile.write(path, signal[: min(map(len, samples)) - step * number], 16000)
        single, _ = transcribe.transcribe(recogniser, cut)
        batched, errors = transcribe.transcribe(recogniser, cut, max_batch_length=1000)
        assert errors == {} and list(batched) == cut
        characters = ErrorRateStats(split_tokens=True)
        characters.append(
            cut, *([texts[path].split() for path in cut] for texts in (batched, single))
        )
        assert characters.summarize("error_rate") <= limit


def test_batches_hold_like_lengths_up_to_a_limit():
    seconds = {"a": 3.0, "b": 10.0, "c": 9.9, "d": 9.8, "e": 2.95, "f": 40.0, "g": 9.6}
    batches = list(transcribe._batches(seconds, max_batch_length=30))
    assert batches == [["f"], ["b", "c", "d"], ["g"], ["a", "e"]]
    assert list(transcribe._batches(seconds, max_batch_length=20))[1:3] == [["b", "c"], ["d", "g"]]


def resampled(samples, rate):
    return torchaudio.functional.resample(torch.from_numpy(samples), 16000, rate).numpy()


@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("extension", ["wav", "flac", "WAV"])
def test_any_sample_rate(recogniser, audio, tmp_path, rate, extension):
    samples, _ = soundfile.read(audio[0], dtype="float32")
    path = tmp_path / f"speech.{extension}"
    soundfile.write(path, resampled(samples, rate), rate)
    (found,) = transcribe.find_audio([tmp_path])
    signal = transcribe._read(found, recogniser.audio_normalizer)
    # All of it is there, and what 8 kHz can hold is as it was.
    assert abs(len(signal) - len(samples)) <= 2
    low = torch.fft.rfft(signal[: len(samples) - 2])[: len(samples) * 3 // 16]
    expected = torch.fft.rfft(torch.from_numpy(samples[:-2]))[: len(samples) * 3 // 16]
    assert (low - expected).norm() < 0.02 * expected.norm()
    texts, errors = transcribe.transcribe(recogniser, [found])
    assert errors == {} and texts == {path: recogniser.transcribe_file(str(path))}


def test_channels_are_mixed(recogniser, audio, tmp_path):
    samples, _ = soundfile.read(audio[0], dtype="float32")
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([2 * samples, np.zeros_like(samples)], axis=1), 16000, "FLOAT")
    texts, errors = transcribe.transcribe(recogniser, [path])
    assert errors == {}
    assert texts[path] == recogniser.transcribe_file(str(audio[0]))


@pytest.mark.parametrize("samples", [1, 100, 400])
def test_a_moment_of_audio_is_no_error(recogniser, tmp_path, samples):
    soundfile.write(tmp_path / "click.wav", np.full(samples, 0.1), 16000)
    texts, errors = transcribe.transcribe(recogniser, [tmp_path / "click.wav"])
    assert len(texts) == 1 and errors == {}


def test_unreadable_files_are_named_and_the_rest_is_transcribed(exported, audio, tmp_path, capsys):
    bad = {
        "cut.flac": (audio[1].read_bytes()[:-1], "lost sync"),
        "empty.wav": (b"", "not recognised"),
        "text.wav": (b"no audio" * 99, "not recognised"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    bad["none.wav"] = (None, "it has no samples")
    shutil.copy(audio[0], tmp_path / "good.flac")
    with pytest.raises(SystemExit) as stopped:
        transcribe_files([str(exported), str(tmp_path), "--device=cpu"])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert re.fullmatch(f"{tmp_path / 'good.flac'}\t.+\n", captured.out)
    for name, (_, reason) in bad.items():
        assert re.search(f"^transcribe: {tmp_path / name}: .*{reason}", captured.err, re.MULTILINE)


def test_wrong_folders_end_in_one_line(exported, run, audio, tmp_path):
    for folder in (tmp_path, run, tmp_path / "nowhere"):  # a run's own YAML is not for inference
        with pytest.raises(SystemExit, match=f"^transcribe: {folder} has no inference YAML"):
            transcribe_files([str(folder), str(audio[0])])
    with pytest.raises(SystemExit, match="^transcribe: .*nowhere.wav does not exist$"):
        transcribe_files([str(exported), str(tmp_path / "nowhere.wav")])
    with pytest.raises(SystemExit, match="^transcribe: .* holds no WAV or FLAC file$"):
        transcribe_files([str(exported), str(tmp_path)])
