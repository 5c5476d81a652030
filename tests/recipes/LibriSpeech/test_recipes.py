"""The recipe: it learns, resumes, and says clearly what is wrong."""

import csv
import gzip
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ruamel.yaml
import soundfile
import speechbrain as sb
import torch
from helpers import ROOT
from speechbrain.dataio.dataset import DynamicItemDataset
from tiny_corpora import make_speech

import train_ctc
import train_lm
from sligru_recipes.training.ctc import CTC
from sligru_recipes.training.data import batching, prepare_noise, prepare_noises
from sligru_recipes.training.experiment import load_hparams, parse_arguments
from sligru_recipes.training.language_model import LanguageModel, Sentences
from sligru_recipes.training.seq2seq import make_test_search
from sligru_recipes.training.tokenizer import check_alignable, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

YAML = ROOT / "hparams/librispeech_ctc.yaml"
MINI = ROOT / "hparams/librispeech_ctc_mini.yaml"
# Smaller and without anything random: a run is then a function of its command line.
TINY = (
    "--device=cpu",
    "--noprogressbar",
    "--token_type=char",
    "--dropout=0.0",
    "--max_batch_length=12",
    "--rnn_layers=1",
    "--rnn_neurons=48",
    "--dnn_neurons=48",
)
# The model is built with the YAML; where it is not used it should take no time.
NO_MODEL = ("--rnn_layers=1", "--rnn_neurons=8")


# One set of utterances is train, dev and test set at once: what is tested is the machinery.
@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_speech(tmp_path_factory.mktemp("corpus with spaces"), utterances=6)


def command_line(corpus, output_folder, *arguments):
    return [
        str(YAML),
        f"--overrides={MINI}",
        f"--data_folder={corpus}",
        f"--output_folder={output_folder}",
        *TINY,
        *arguments,
    ]


def load(argv):
    hparams_file, _, overrides, _ = parse_arguments(argv)
    return load_hparams(hparams_file, overrides)


def epochs(output_folder):
    """The lines of train_log.txt about epochs, as {name: value}; seconds left out."""
    return [
        {
            name: float(value)
            for name, value in re.findall(r"(\w[\w ]*): ([\d.e+-]+)", line)
            if name != "seconds"
        }
        for line in (Path(output_folder) / "train_log.txt").read_text().splitlines()
        if line.startswith("epoch:")
    ]


def write_manifest(folder, transcripts, seconds=3.0):
    folder.mkdir(exist_ok=True)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(f"u{n}", seconds, "x.flac", "s", text) for n, text in enumerate(transcripts)]
        csv.writer(file).writerows([("ID", "duration", "wav", "spk_id", "wrd"), *rows])


# The YAML


def test_default_model_is_the_published_one():
    hparams = load([str(YAML), "--data_folder=/data/LibriSpeech"])
    rnn = hparams["enc"].RNN
    assert type(rnn).__module__ + "." + type(rnn).__name__ == "sb_fast_sligru.rnn.SLiGRU"
    # Measured on the encoder of SpeechBrain's train_BPE_1000_sligru.yaml.
    parameters = sum(parameter.numel() for parameter in hparams["enc"].parameters())
    assert round(parameters / 1e5) == 286


def test_command_line_wins_over_the_override_file():
    arguments = [str(YAML), f"--overrides={MINI}", "--data_folder=x", "--number_of_epochs=77"]
    hparams = load(arguments)
    assert hparams["number_of_epochs"] == 77
    assert hparams["rnn_neurons"] == ruamel.yaml.YAML().load(MINI.read_text())["rnn_neurons"]


@pytest.mark.parametrize(
    "name", ["sb_fast_sligru.LiGRU", "speechbrain.nnet.RNN.SLiGRU", "speechbrain.nnet.RNN.LiGRU"]
)
def test_rnn_class_is_one_key(name):
    arguments = [str(YAML), f"--overrides={MINI}", "--data_folder=x", f"--rnn_class=!name:{name}"]
    rnn = type(load(arguments)["enc"].RNN)
    package, _, class_name = name.rpartition(".")
    assert rnn.__module__.startswith(package) and rnn.__name__ == class_name


# Runs


def test_resumes_where_it_was_stopped(corpus, tmp_path, monkeypatch):
    """Stopped in its second epoch, then run again: the log is that of an uninterrupted run."""
    arguments = ("--number_of_epochs=3",)
    train_ctc.main(command_line(corpus, tmp_path / "at once", *arguments))

    def stop(self, stage, epoch=None):
        if stage == sb.Stage.TRAIN and epoch == 2:
            raise KeyboardInterrupt
        return original(self, stage, epoch)

    original = CTC.on_stage_start
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CTC, "on_stage_start", stop)
        train_ctc.main(command_line(corpus, tmp_path / "stopped", *arguments))
    assert [line["epoch"] for line in epochs(tmp_path / "stopped")] == [1]
    train_ctc.main(command_line(corpus, tmp_path / "stopped", *arguments))
    assert [line["epoch"] for line in epochs(tmp_path / "stopped")] == [1, 2, 3]
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "at once")


def test_stock_rnn_trains_alike(corpus, tmp_path):
    """The other RNN is one override away; from the same seed it has the same losses."""
    losses = {}
    for name in ("sb_fast_sligru.SLiGRU", "speechbrain.nnet.RNN.SLiGRU"):
        arguments = ("--number_of_epochs=2", f"--rnn_class=!name:{name}")
        train_ctc.main(command_line(corpus, tmp_path / name, *arguments))
        losses[name] = [line["train loss"] for line in epochs(tmp_path / name)]
    ours, stock = losses.values()
    assert ours == pytest.approx(stock, rel=0.01)
    assert ours[1] < ours[0]


def test_training_from_shards_is_the_same(corpus, tmp_path):
    for name, arguments in (("files", []), ("shards", [f"--shard_folder={tmp_path / 'tars'}"])):
        arguments = ("--number_of_epochs=1", "--export_inference=False", *arguments)
        train_ctc.main(command_line(corpus, tmp_path / name, *arguments))
    assert epochs(tmp_path / "shards") == epochs(tmp_path / "files")
    names = {re.sub("-[0-9a-f]{12}-", "-", path.name) for path in (tmp_path / "tars").glob("*.tar")}
    assert names == {"train-00000.tar", "dev-clean-00000.tar", "test-clean-00000.tar"}


def test_loss_is_in_fp32_under_bf16(corpus, tmp_path, monkeypatch):
    seen = []

    def record(self, predictions, batch, stage):
        seen.append((stage, predictions[0].dtype, torch.is_autocast_enabled("cpu")))
        return original(self, predictions, batch, stage)

    original = CTC.compute_objectives
    monkeypatch.setattr(CTC, "compute_objectives", record)
    arguments = ("--number_of_epochs=2", "--precision=bf16")
    train_ctc.main(command_line(corpus, tmp_path, *arguments))
    assert {dtype for _, dtype, _ in seen} == {torch.float32}
    assert {autocast for stage, _, autocast in seen if stage == sb.Stage.TRAIN} == {True}
    first, second = epochs(tmp_path)
    assert second["train loss"] < first["train loss"]


# Batches


@pytest.fixture
def train_data():
    rows = {f"u{n}": {"duration": float(seconds)} for n, seconds in enumerate((5, 3, 9, 3, 7, 1))}
    return DynamicItemDataset(rows, output_keys=["id", "duration"])


def load_batching(*arguments):
    return load([str(YAML), "--data_folder=x", *NO_MODEL, *arguments])


@pytest.mark.parametrize("sorting", ["ascending", "descending"])
def test_fixed_batches_are_sorted(train_data, sorting):
    hparams = load_batching(f"--sorting={sorting}")
    data, options = batching(hparams, train_data)
    durations = [data[index]["duration"] for index in range(len(data))]
    assert durations == sorted(durations, reverse=sorting == "descending")
    assert options == hparams["train_dataloader_opts"]


def test_dynamic_batches_keep_the_limit_and_change_with_the_epoch(train_data):
    hparams = load_batching("--dynamic_batching=True", "--max_batch_length=12", "--num_buckets=3")
    _, options = batching(hparams, train_data)
    sampler = options["batch_sampler"]
    plans = []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        plans.append([tuple(batch) for batch in sampler])
        assert sorted(index for batch in plans[-1] for index in batch) == list(range(6))
        assert max(sum(sampler.get_durations(batch)) for batch in plans[-1]) <= 12
    assert plans[0] == plans[2] != plans[1]


# Augmentation


def test_noise_of_a_folder_is_added(tmp_path):
    """At 0 to 15 dB; SpeechBrain's AddNoise reads our manifest."""
    (tmp_path / "noises" / "a.b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.b/long.flac", "short.wav"):
        soundfile.write(tmp_path / "noises" / name, 0.1 * rng.standard_normal(32000), 16000)
    left_out = [f"--enable_{name}=False" for name in ("speed_perturb", "drop_freq", "drop_chunk")]
    arguments = [f"--noise_folder={tmp_path / 'noises'}", f"--output_folder={tmp_path}"]
    hparams = load_batching(*arguments, *left_out)
    prepare_noises(hparams)
    waves = torch.sin(torch.arange(16000) / 10).repeat(2, 1)
    noisy, lengths = hparams["wav_augment"](waves, torch.ones(2))
    assert noisy.shape == waves.shape and lengths.tolist() == [1, 1]
    for wave, sum in zip(waves, noisy, strict=True):
        scale = (wave @ sum) / (wave @ wave)
        snr = 20 * torch.log10(scale * wave.norm() / (sum - scale * wave).norm())
        assert -1 < snr < 16
    assert not load_batching()["enable_add_noise"]


@pytest.mark.parametrize(
    ("samples", "keep", "reason"),
    [
        ([], 1, "it has no samples"),
        ([0.1] * 800 + [np.nan], 1, "samples that are not finite"),
        ([0.1] * 800, 0.5, "truncated: "),
    ],
)
def test_bad_noise_is_named(tmp_path, samples, keep, reason):
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.array(samples), 16000, subtype="FLOAT")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"noise_folder: {path}: .*{reason}"):
        prepare_noise(tmp_path, tmp_path / "noise.csv", 16000, num_workers=0)
    assert not (tmp_path / "noise.csv").exists()


@pytest.mark.parametrize(
    ("rate", "channels", "message"),
    [(8000, 1, "noise.wav: 8000 Hz, expected 16000 Hz"), (16000, 2, "noise.wav: 2 channels")],
)
def test_unfit_noise_is_named(tmp_path, rate, channels, message):
    soundfile.write(tmp_path / "noise.wav", np.zeros((100, channels)), rate)
    with pytest.raises(ValueError, match=message):
        prepare_noise(tmp_path, tmp_path / "noise.csv", 16000)
    (tmp_path / "noise.wav").unlink()
    with pytest.raises(FileNotFoundError, match="noise_folder .* holds no .wav or .flac file"):
        prepare_noise(tmp_path, tmp_path / "noise.csv", 16000)


# Language model and tokenizer


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Output folder of train_lm.py, trained on one sentence again and again."""
    folder = tmp_path_factory.mktemp("language model")
    sentences = ["THE KING FOUND A LANTERN", "", "THE SAILOR FOUND THE KING"]
    (folder / "text.txt").write_text("\n".join(20 * sentences))
    write_manifest(folder / "save", sentences[:1])
    shutil.copy(folder / "save/train.csv", folder / "save/dev-clean.csv")
    shutil.copy(folder / "save/train.csv", folder / "save/test-clean.csv")
    results = train_lm.main(
        [
            str(ROOT / "hparams/librispeech_lm.yaml"),
            "--data_folder=x",
            "--skip_prep=True",
            f"--text_file={folder / 'text.txt'}",
            f"--test_csv=[{folder / 'save/test-clean.csv'}]",
            f"--output_folder={folder}",
            *("--device=cpu", "--num_workers=0", "--vocab_size=30", "--noprogressbar"),
            *("--number_of_epochs=8", "--batch_size=2", *LM_SIZES),
        ]
    )
    return folder, results


LM_SIZES = ("--lm_rnn_layers=1", "--lm_rnn_neurons=32", "--lm_dnn_neurons=32")


def seq2seq_hparams(output_folder, *arguments, vocab_size=30):
    yaml = str(ROOT / "hparams/librispeech_seq2seq.yaml")
    folders = ["--data_folder=x", f"--output_folder={output_folder}"]
    small = (*NO_MODEL, "--dec_neurons=8", "--attn_dim=8", f"--vocab_size={vocab_size}")
    return load([yaml, *folders, *small, *arguments])


def test_language_model_learns_its_text(language_model):
    folder, results = language_model
    # There is a choice only of the first noun, and at the end: two bits in ten tokens or more.
    assert 1 < results["test-clean"]["perplexity"] < 2
    lines = epochs(folder)
    assert len(lines) == 8 and lines[-1]["valid loss"] < lines[0]["valid loss"]


def test_perplexity_of_a_diverging_model_is_infinite():
    assert LanguageModel.collect_stats(None, 1000.0) == {"perplexity": float("inf")}
    assert LanguageModel.collect_stats(None, 2.0) == {"perplexity": pytest.approx(7.389056)}


def lm_arguments(folder, *more):
    own = ("--data_folder=x", "--skip_prep=True", "--device=cpu", "--noprogressbar")
    yaml = str(ROOT / "hparams/librispeech_lm.yaml")
    return [yaml, *own, f"--output_folder={folder}", *LM_SIZES, *more]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "text.txt does not exist"),
        (gzip.compress(b"THE KING\n"), "text.txt is compressed: unpack it"),
    ],
)
def test_unfit_text_is_named_before_any_work(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises((OSError, ValueError), match=f"text_file .*{message}"):
        train_lm.main(lm_arguments(tmp_path, f"--text_file={tmp_path}/text.txt"))


def test_language_model_starts_from_another_s_weights(language_model, tmp_path):
    folder, results = language_model
    shutil.copytree(folder / "save", tmp_path / "save", ignore=lambda *_: ["CKPT*"])
    given = [
        f"--{key}={folder / name}"
        for key, name in (
            ("text_file", "text.txt"),
            ("pretrained_folder", ""),
            ("tokenizer_file", "tokenizer.ckpt"),
        )
    ]
    more = ("--number_of_epochs=1", "--lr=0.0", "--num_workers=0", "--vocab_size=30")
    test = f"--test_csv=[{folder / 'save/test-clean.csv'}]"
    assert (
        train_lm.main(
            lm_arguments(
                tmp_path / "new",
                *given,
                *more,
                test,
                f"--train_csv={folder / 'save/train.csv'}",
                f"--valid_csv={folder / 'save/dev-clean.csv'}",
            )
        )
        == results
    )  # nothing was learnt, so it is as good


def test_sentences_are_the_lines_of_a_file(language_model):
    folder, _ = language_model
    tokenizer = load_tokenizer(
        seq2seq_hparams(folder, f"--tokenizer_file={folder / 'tokenizer.ckpt'}")
    )
    sentences = Sentences(folder / "text.txt", tokenizer, 1, 2)
    assert len(sentences) == 40  # empty lines are none
    item = sentences[3]
    assert item["tokens_bos"][0] == 1 and item["tokens_eos"][-1] == 2
    assert item["tokens_bos"][1:].tolist() == item["tokens_eos"][:-1].tolist()
    words = tokenizer.sp.decode_ids(item["tokens_eos"][:-1].tolist())
    assert words == "THE SAILOR FOUND THE KING"
    (folder / "odd.txt").write_text("THE KING\nTHE QUEEN\n")
    with pytest.raises(ValueError, match="odd.txt: line 2 has the character 'Q'"):
        Sentences(folder / "odd.txt", tokenizer, 1, 2)
    (folder / "odd.txt").write_bytes(b"THE KING\nTHE \xff\n")
    with pytest.raises(ValueError, match="odd.txt: line 2 is not UTF-8"):
        Sentences(folder / "odd.txt", tokenizer, 1, 2)
    (folder / "odd.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="odd.txt has no sentence"):
        Sentences(folder / "odd.txt", tokenizer, 1, 2)


def test_language_model_joins_the_beam_search(language_model, tmp_path):
    folder, _ = language_model
    (tmp_path / "save").mkdir()
    given = (f"--lm_folder={folder}", f"--tokenizer_file={folder / 'tokenizer.ckpt'}")
    tokenizer = load_tokenizer(seq2seq_hparams(tmp_path, *given))
    size = tokenizer.sp.vocab_size()
    hparams = seq2seq_hparams(tmp_path, *given, *LM_SIZES, vocab_size=size)
    search = make_test_search(SimpleNamespace(**hparams), tokenizer, "cpu")
    assert set(search.scorer.full_scorers) == {"coverage", "rnnlm"}
    assert set(search.scorer.partial_scorers) == {"ctc"}
    weights = {name: weight for name, weight in search.scorer.weights.items() if weight}
    assert weights == {"coverage": 1.5, "rnnlm": 0.5, "ctc": 0.4}
    loaded = search.scorer.full_scorers["rnnlm"].lm.state_dict()
    trained = torch.load(folder / "lm.ckpt")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)

    hparams = seq2seq_hparams(tmp_path, *given, vocab_size=size)  # the YAML's own sizes of the LM
    with pytest.raises(ValueError, match="lm.ckpt is damaged, or does not fit lm_model"):
        make_test_search(SimpleNamespace(**hparams), tokenizer, "cpu")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(folder / "tokenizer.ckpt", damaged)
    for content in (b"", (folder / "lm.ckpt").read_bytes()[:-100], b"no weights"):
        (damaged / "lm.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="lm.ckpt is damaged, or does not fit lm_model"):
            make_test_search(
                SimpleNamespace(**hparams | {"lm_folder": str(damaged)}), tokenizer, "cpu"
            )
    with pytest.raises(FileNotFoundError, match="lm_folder .* has no lm.ckpt"):
        seq2seq_hparams(tmp_path, f"--lm_folder={tmp_path}")


def test_other_tokenizer_than_the_language_model_s_is_refused(language_model, tmp_path):
    folder, _ = language_model
    write_manifest(tmp_path / "save", ["A QUIET DOCTOR WATCHED THE BRIDGE"])
    hparams = seq2seq_hparams(tmp_path, f"--lm_folder={folder}", *LM_SIZES, "--token_type=char")
    tokenizer = load_tokenizer(hparams)
    message = f"another tokenizer: set tokenizer_file to {folder / 'tokenizer.ckpt'}"
    with pytest.raises(ValueError, match=message):
        make_test_search(SimpleNamespace(**hparams), tokenizer, "cpu")


def test_tokenizer_without_bos_and_eos_is_refused_for_attention(tmp_path):
    write_manifest(tmp_path / "save", ["THE KING FOUND A LANTERN"])
    argv = [str(YAML), "--data_folder=x", f"--output_folder={tmp_path}", *NO_MODEL]
    tokenizer = load_tokenizer(load([*argv, "--token_type=char"]))
    file = f"{tokenizer.prefix_model_file}.model"
    with pytest.raises(ValueError, match="tokenizer_file .* has bos_index -1, the YAML .* 1"):
        seq2seq_hparams(tmp_path, f"--tokenizer_file={file}")
    # CTC takes the tokenizer of either.
    own = load_tokenizer(load([*argv, f"--tokenizer_file={file}"]))
    assert own.sp.vocab_size() == tokenizer.sp.vocab_size()


# What can be wrong


@pytest.mark.parametrize("token_type", ["unigram", "bpe"])
def test_vocabulary_is_sized_down_on_a_small_corpus(tmp_path, caplog, token_type):
    write_manifest(tmp_path / "save", ["THE KING FOUND A LANTERN", "THE SAILOR FOUND THE KING"])
    argv = [str(YAML), "--data_folder=x", f"--output_folder={tmp_path}", *NO_MODEL]
    hparams = load([*argv, f"--token_type={token_type}"])
    for _ in range(2):  # the second time it is loaded
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sligru_recipes"):
            tokenizer = load_tokenizer(hparams)
        size = tokenizer.sp.vocab_size()
        assert "vocab_size 1000 is more than the train transcripts can fill" in caplog.text
        assert f"the most they can, {size}" in caplog.text
        words = "THE KING FOUND THE LANTERN"
        assert tokenizer.sp.decode_ids(tokenizer.sp.encode_as_ids(words)) == words
    hparams["vocab_size"] = 5
    with pytest.raises(ValueError, match="vocab_size 5 is impossible"):
        load_tokenizer(hparams)


def test_more_tokens_than_frames_are_refused(tmp_path, caplog):
    write_manifest(tmp_path / "save", ["THE KING FOUND A LANTERN"] * 4, seconds=1.0)
    argv = [str(YAML), "--data_folder=x", f"--output_folder={tmp_path}", *NO_MODEL]
    hparams = load([*argv, "--token_type=char"])
    tokenizer = load_tokenizer(hparams)
    data = DynamicItemDataset.from_csv(hparams["train_csv"])
    # 25 characters with the word boundary before the first; no two neighbours are equal.
    check_alignable(data, tokenizer, frames_per_second=25)
    with pytest.raises(ValueError, match=r"4 of 4 train utterances \(such as u0\).*24 per second"):
        check_alignable(data, tokenizer, frames_per_second=24)
    # One in a thousand is bad data: logged, and training goes on.
    for number in range(1000):
        data.data[f"v{number}"] = {"duration": 5.0, "wrd": "THE KING"}
    data.data_ids = list(data.data)
    for utterance in ("u1", "u2", "u3"):
        data.data[utterance]["duration"] = 5.0
    with caplog.at_level(logging.WARNING, logger="sligru_recipes"):
        check_alignable(data, tokenizer, frames_per_second=24)
    assert "1 of 1004 train utterances (such as u0)" in caplog.text


def test_wrong_data_folder_is_named(tmp_path):
    argv = command_line(tmp_path / "nowhere", tmp_path / "output")
    with pytest.raises(FileNotFoundError, match="data_folder .*nowhere does not exist"):
        train_ctc.main(argv)


def test_missing_data_folder_is_named():
    with pytest.raises(ValueError, match="'data_folder' is a !PLACEHOLDER"):
        train_ctc.main([str(YAML)])
