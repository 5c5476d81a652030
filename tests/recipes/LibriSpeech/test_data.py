"""From a corpus to the batches of a run: splits, rates, bad files, letters, tokenizer."""

import logging
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from helpers import ROOT, small_disk
from recorded_run import then
from speechbrain.lobes.models.CRDNN import CRDNN
from tiny_corpora import SPLITS, make_noise
from tiny_runs import TINY, complaint

import train_ctc
import train_lm
import transcribe
from sligru_recipes.corpora.librispeech import prepare_librispeech
from sligru_recipes.corpora.shards import pack
from sligru_recipes.inference.recogniser import load_recogniser
from sligru_recipes.training import tokenizer
from sligru_recipes.training.data import find_manifests, load_manifest, prepare_data
from sligru_recipes.training.recogniser import ASR

pytestmark = pytest.mark.usefixtures("environment_described_once", "one_thread")

TRAIN, DEV, TEST = SPLITS


@pytest.fixture
def noise(tmp_path):
    """A corpus that a test may change: two train, two dev, one test utterance."""
    return make_noise(tmp_path / "noise", [0.8, 0.9])


def arguments(corpus, tmp_path, *more):
    given = [f"--data_folder={corpus}", f"--output_folder={tmp_path}/run", "--number_of_epochs=1"]
    keys = {argument.partition("=")[0] for argument in more}
    tiny = [argument for argument in map(str, TINY) if argument.partition("=")[0] not in keys]
    return [*tiny, *given, *more]


def run(*args):
    return train_ctc.main(arguments(*args))


def said(tmp_path):
    return (tmp_path / "run/log.txt").read_text()


def copy_split(corpus, split, copy, speaker):
    """Copy a split as one of another speaker."""
    (own,) = (corpus / split).iterdir()
    target = shutil.copytree(own, corpus / copy / speaker)
    for path in [*target.rglob("*.flac"), *target.rglob("*.trans.txt")]:
        renamed = path.rename(path.with_name(path.name.replace(own.name, speaker, 1)))
        if renamed.suffix == ".txt":
            renamed.write_text(re.sub(f"^{own.name}", speaker, renamed.read_text(), flags=re.M))


def change_words(corpus, split, words):
    (path,) = (corpus / split).rglob("*.trans.txt")
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([f"{first.split()[0]} {words}", *others]) + "\n")


# Splits


@pytest.mark.parametrize("splits", ["[test-clean,test-other]", "[test-other,test-clean]"])
def test_all_splits_are_tested(noise, tmp_path, splits):
    copy_split(noise, TEST, "test-other", "7")
    results = run(noise, tmp_path, f"--test_splits={splits}")
    assert list(results) == splits[1:-1].split(",")
    for split, name in (("test-clean", "3-10-0000"), ("test-other", "7-10-0000")):
        assert name in (tmp_path / f"run/wer_{split}.txt").read_text()
    assert (tmp_path / "run/train_log.txt").read_text().count("split: ") == 2


def test_a_split_is_any_folder(noise, tmp_path):
    """Also one of several for validation, whose utterances are all validated with."""
    for split, name in ((TRAIN, "train"), (DEV, "words of 2026"), (TEST, "noise")):
        (noise / split).rename(noise / name)
    copy_split(noise, "words of 2026", "more", "8")
    splits = ("--train_splits=train", "--dev_splits=[words of 2026,more]", "--test_splits=noise")
    validated = []

    def note(self, batch, *rest):
        validated.append(batch.id)
        return original(self, batch, *rest)

    original = ASR.count_errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ASR, "count_errors", note)
        assert list(run(noise, tmp_path, *splits)) == ["noise"]
    *valid, test = validated
    assert sorted(sum(valid, [])) == ["2-10-0000", "2-10-0001", "8-10-0000", "8-10-0001"]
    assert test == ["3-10-0000"]
    assert (tmp_path / "run/wer_noise.txt").is_file()


def test_no_split_to_test(noise, tmp_path):
    assert run(noise, tmp_path, "--test_splits=[]") == {}
    message = complaint(arguments(noise, tmp_path / "none", "--dev_splits=[]"))
    assert "dev_splits is empty" in message
    assert not list((tmp_path / "none/run/save").glob("*.csv"))


def test_manifests_of_the_yaml_win(tmp_path):
    keys = {"save_folder": "save", "train_csv": "t.csv", "dev_splits": "d", "test_splits": ["a"]}
    own = find_manifests(keys | {"valid_csv": None, "test_csv": None})
    assert own == ("t.csv", ["save/d.csv"], {"a": "save/a.csv"})
    given = find_manifests(keys | {"valid_csv": "x/v.csv", "test_csv": ["x/b.csv", "c.csv"]})
    assert given == ("t.csv", ["x/v.csv"], {"b": "x/b.csv", "c": "c.csv"})
    with pytest.raises(ValueError, match="two manifests of the name b"):
        find_manifests(keys | {"valid_csv": "v.csv", "test_csv": ["x/b.csv", "y/b.csv"]})


def lm_arguments(corpus, tmp_path, *more):
    sizes = ("--lm_rnn_layers=1", "--lm_rnn_neurons=8", "--lm_dnn_neurons=8", "--vocab_size=8")
    own = ("--device=cpu", "--noprogressbar", "--num_workers=0", "--token_type=char")
    folders = (f"--data_folder={corpus}", f"--output_folder={tmp_path}/run")
    splits = (f"--train_splits={TRAIN}", "--number_of_epochs=1")
    return [str(ROOT / "hparams/librispeech_lm.yaml"), *folders, *own, *sizes, *splits, *more]


def test_language_model_tests_all_splits_and_writes_beside_no_manifest(noise, tmp_path):
    copy_split(noise, TEST, "test-other", "7")
    own = tmp_path / "own"
    prepare_librispeech(noise, own, TRAIN, DEV, num_workers=0)
    (own / f"{DEV}.txt").write_text("precious")
    results = train_lm.main(lm_arguments(noise, tmp_path, f"--valid_csv={own}/{DEV}.csv"))
    assert list(results) == ["test-clean", "test-other"]
    assert (own / f"{DEV}.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "content", ["", "ID,duration,wav,wrd\n", "wav\nx.flac\n", "ID,duration,wav\nu,1.0,x\n", "\xff"]
)
def test_damaged_manifest_is_named(noise, tmp_path, content):
    prepare_librispeech(noise, tmp_path / "save", TRAIN, DEV, TEST, num_workers=0)
    path = tmp_path / "save/damaged.csv"
    path.write_bytes(content.encode("latin-1"))
    for shards in ((), (f"--shard_folder={tmp_path}/shards",)):
        message = complaint(arguments(noise, tmp_path, f"--test_csv={path}", *shards))
        assert str(path) in message


@pytest.mark.parametrize("key", ["train_csv", "valid_csv", "test_csv"])
def test_missing_files_of_own_manifests_are_named_before_any_work(noise, tmp_path, key):
    """Unless bad files may be left out, or shards have them."""
    split = dict(zip(("train_csv", "valid_csv", "test_csv"), SPLITS, strict=True))[key]
    elsewhere = shutil.copytree(noise, tmp_path / "elsewhere")
    copy_split(elsewhere, split, split, "7")
    prepare_librispeech(elsewhere, tmp_path / "own", split, num_workers=0)
    manifest = tmp_path / f"own/{split}.csv"
    pack(manifest, tmp_path / "shards")
    path = min((elsewhere / split).rglob("7-*.flac"))
    path.unlink()
    argv = arguments(noise, tmp_path, f"--{key}={manifest}")
    message = complaint(argv)
    assert f"{key} {manifest}: 1 utterances (such as 7-10-0000, {path}) have no aud" in message
    assert not list((tmp_path / "run").rglob("*.csv"))  # nothing was prepared
    train_ctc.main([*argv, "--skip_bad_files=True"])
    assert f"{manifest}: 1 utterances" in said(tmp_path) and "left out" in said(tmp_path)
    shutil.rmtree(tmp_path / "run")
    train_ctc.main([*argv, f"--shard_folder={tmp_path}/shards"])


# Rates


def test_corpus_of_another_rate(tmp_path):
    """With its key, training and inference hear as many frames; without, it is refused."""
    corpus = make_noise(tmp_path / "noise", [0.8, 0.9], rate=8000)
    assert "8000 Hz, expected 16000 Hz (sample_rate)" in complaint(arguments(corpus, tmp_path))
    frames = []

    def note(module, args, output):
        if isinstance(module, CRDNN) and isinstance(output, torch.Tensor):
            frames.append(output.shape[1])

    more = ("--sample_rate=8000", "--export_inference=True", "--enable_speed_perturb=True")
    more += (f"--noise_folder={corpus / TRAIN}", "--speed_perturb={speeds: [100]}")
    with torch.nn.modules.module.register_module_forward_hook(note):
        run(corpus, tmp_path, *more)
        tested = frames[-1]  # the one utterance of the test split, 0.8 s
        recogniser = load_recogniser(tmp_path / "run/inference", "cpu")
        recogniser.transcribe_file(str(corpus / TEST / "3/10/3-10-0000.flac"))
        heard = frames[-1]
    assert heard == tested == pytest.approx(0.8 * 25, abs=1)


def test_window_of_a_high_rate_needs_a_larger_transform(tmp_path):
    corpus = make_noise(tmp_path / "noise", [0.8, 0.9], rate=44100)
    message = complaint(arguments(corpus, tmp_path, "--sample_rate=44100"))
    assert "n_fft is 400 samples, but a window has 1102 at a sample_rate of 44100 Hz" in message
    results = run(corpus, tmp_path, "--sample_rate=44100", "--n_fft=2048")
    assert np.isfinite(results[TEST]["loss"])


def test_command_line_transcribes_a_corpus_of_another_rate(tmp_path, capsys):
    corpus = make_noise(tmp_path / "noise", [0.8, 0.9], rate=8000)
    run(corpus, tmp_path, "--sample_rate=8000", "--export_inference=True")
    files = corpus / TEST
    transcribe.main([str(tmp_path / "run/inference"), str(files), "--device=cpu"])
    assert "3-10-0000.flac\t" in capsys.readouterr().out


def test_language_model_of_a_corpus_of_any_rate(tmp_path):
    corpus = make_noise(tmp_path / "noise", [0.8, 0.9], rate=8000)
    results = train_lm.main(lm_arguments(corpus, tmp_path, f"--test_splits={TEST}"))
    assert np.isfinite(results[TEST]["perplexity"])


def test_manifests_of_another_rate_are_refused(noise, tmp_path):
    """Those that were there already."""
    prepare_librispeech(noise, tmp_path / "run/save", TRAIN, DEV, TEST, num_workers=0)
    argv = arguments(noise, tmp_path, "--skip_prep=True", f"--test_splits={TEST}")
    message = complaint([*argv, "--sample_rate=8000"])
    assert ".flac has samples [12800]" in message or ".flac has samples [14400]" in message
    assert "sample_rate of 8000 Hz" in message


# Bad files


@pytest.mark.parametrize(
    ("split", "samples"), [(TRAIN, 1), (TRAIN, 1279), (DEV, 240), (TEST, 1), (TEST, 480)]
)
def test_an_utterance_too_short_for_the_encoder(noise, tmp_path, split, samples):
    path = min((noise / split).rglob("*.flac"))
    soundfile.write(path, np.full(samples, 0.1), 16000)
    message = complaint(arguments(noise, tmp_path))
    assert f"{path.stem}, {samples / 16000:g} s) are shorter than 2 encoder frames" in message
    assert "skip_bad_files" in message
    copy_split(noise, TRAIN if split == TEST else TEST, split, "9")
    run(noise, tmp_path, "--skip_bad_files=True")
    assert "1 utterances" in said(tmp_path) and "left out" in said(tmp_path)


def test_the_shortest_utterances_train_alone(noise, tmp_path):
    for path in (noise / TRAIN).rglob("*.flac"):
        soundfile.write(path, np.full(1280, 0.1), 16000)
    change_words(noise, TRAIN, "N")
    augmentations = [f"--enable_{name}=True" for name in ("speed_perturb", "drop_chunk")]
    more = ("--dynamic_batching=False", "--batch_size=1", *augmentations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_UNALIGNABLE", 1)
        run(noise, tmp_path, *more)
    assert "skipped updates: 0" in (tmp_path / "run/train_log.txt").read_text()


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:9000] + bytes(500) + content[9500:])


def test_damage_in_the_middle_is_found_before_training(noise, tmp_path):
    path = min((noise / TEST).rglob("*.flac"))
    damage(path)
    assert f"{path}: damaged: its audio cannot be" in complaint(arguments(noise, tmp_path))


@pytest.mark.parametrize("harm", ["damaged", "deleted in training", "shard cut off"])
def test_a_test_file_damaged_since_costs_itself_alone(noise, tmp_path, harm):
    copy_split(noise, TEST, TEST, "7")
    shards = harm == "shard cut off"
    more = [f"--shard_folder={tmp_path}/shards"] if shards else []
    argv = arguments(noise, tmp_path, "--export_inference=True", *more)
    hparams = {
        "skip_prep": False,
        "skip_bad_files": False,
        "num_workers": 0,
        "data_folder": str(noise),
        "save_folder": str(tmp_path / "run/save"),
        "train_splits": TRAIN,
        "dev_splits": DEV,
        "test_splits": TEST,
        "sample_rate": 16000,
        "train_csv": str(tmp_path / "run/save/train.csv"),
        "valid_csv": None,
        "test_csv": None,
        "shard_folder": str(tmp_path / "shards") if shards else None,
    }
    prepare_data(hparams)
    if shards:
        (path,) = (tmp_path / "shards").glob(f"{TEST}-*.tar")
        with open(path, "r+b") as file:
            file.truncate(30_000)  # within the second file
    else:
        path = min((noise / TEST).rglob("7-*.flac"))
        if harm == "damaged":
            damage(path)

    def delete(brain):
        if harm == "deleted in training":
            path.unlink()

    with then(ASR, "_ready", delete):
        results = train_ctc.main([*argv, "--skip_prep=True"])
    assert f"{path}" in said(tmp_path) and "its words count as errors" in said(tmp_path)
    errors = (tmp_path / f"run/wer_{TEST}.txt").read_text()
    assert "3-10-0000" in errors and "7-10-0000, %WER 100.00 [ 2 / 2, 0 ins, 2 del" in errors
    assert results[TEST]["WER"] >= 50
    assert (tmp_path / "run/inference/model.ckpt").is_file()


def test_no_test_file_can_be_read(noise, tmp_path):
    prepare_librispeech(noise, tmp_path / "run/save", TRAIN, DEV, TEST, num_workers=0)
    min((noise / TEST).rglob("*.flac")).write_bytes(b"")
    results = run(noise, tmp_path, "--skip_prep=True", f"--test_splits={TEST}")
    assert results[TEST]["WER"] == results[TEST]["CER"] == 100


# Letters and tokenizer


@pytest.mark.parametrize("words", ["NODE QUIZ", "Q", "Q Q"])
@pytest.mark.parametrize("split", [DEV, TEST])
def test_letters_that_training_lacks_are_errors(noise, tmp_path, split, words):
    change_words(noise, split, words)
    results = run(noise, tmp_path)
    manifest = tmp_path / f"run/save/{split}.csv"
    assert f"{manifest}: 1 transcripts (such as " in said(tmp_path)
    assert "'Q'" in said(tmp_path) and "counts as an error" in said(tmp_path)
    assert np.isfinite(results[TEST]["loss"])
    if split == TEST:
        last = words.split()[-1]
        text = (tmp_path / f"run/wer_{TEST}.txt").read_text()
        assert last in text and results[TEST]["WER"] > 0


@pytest.mark.parametrize("token_type", ["char", "unigram", "bpe"])
def test_character_coverage_is_honoured(noise, tmp_path, token_type):
    """A rare letter of training is left out of the tokens, not of the words to recognise."""
    change_words(noise, TRAIN, "Q " + 40 * "NODE DONE ")
    for path in (noise / TRAIN).rglob("*.flac"):
        soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(400_000), 16000)
    more = (f"--token_type={token_type}", "--vocab_size=10")
    results = run(noise, tmp_path, "--character_coverage=0.99", *more)
    assert "train.csv: 1 transcripts (such as 1-10-0000) have 'Q'" in said(tmp_path)
    assert np.isfinite(results[TEST]["loss"])
    log = (tmp_path / "run/train_log.txt").read_text()
    assert np.isfinite(float(re.search(r"train loss: (\S+?),", log)[1]))
    assert "skipped updates: 0" in log


def test_language_model_of_letters_that_its_tokens_lack(noise, tmp_path):
    change_words(noise, TRAIN, "Q " + 40 * "NODE DONE ")
    change_words(noise, TEST, "X")
    more = ("--character_coverage=0.99", f"--test_splits={TEST}")
    results = train_lm.main(lm_arguments(noise, tmp_path, *more))
    assert np.isfinite(results[TEST]["perplexity"])
    assert "line 1) have 'Q', which" in said(tmp_path)
    assert "line 1) have 'X', which" in said(tmp_path)


@pytest.mark.parametrize("coverage", [0, -1, 1.5])
def test_impossible_coverage_is_named(noise, tmp_path, coverage):
    message = complaint(arguments(noise, tmp_path, f"--character_coverage={coverage}"))
    assert "character_coverage must be above 0 and at most 1" in message


def test_full_disk_leaves_no_tokenizer(noise, tmp_path, monkeypatch):
    """Rather than an empty one, with which every later run would fail."""
    copyfile = shutil.copyfile

    def on_a_full_disk(source, target, **options):
        with small_disk(100 if ".model" in str(source) else 10**9):
            return copyfile(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", on_a_full_disk)
        with pytest.raises(OSError):
            run(noise, tmp_path)
    assert not [path for path in (tmp_path / "run/save").iterdir() if "char" in path.name]
    run(noise, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_damaged_tokenizer_is_named(noise, tmp_path, content):
    (tmp_path / "run/save").mkdir(parents=True)
    path = tmp_path / "run/save/6_char.model"
    path.write_bytes(content)
    message = complaint(arguments(noise, tmp_path))
    assert f"the run's tokenizer {path} is damaged" in message
    given = tmp_path / "given.model"
    path.rename(given)
    message = complaint(arguments(noise, tmp_path, f"--tokenizer_file={given}"))
    assert f"tokenizer_file {given} is damaged, or no SentencePiece model" in message
    assert not path.exists()


def test_training_a_tokenizer_is_quiet(noise, tmp_path, capfd, caplog):
    """Else 140 lines hide the one that matters."""
    with caplog.at_level(logging.INFO):
        run(noise, tmp_path)
    printed = "".join(capfd.readouterr())
    assert "trainer_interface" not in printed and "LOG(INFO)" not in printed
    assert (tmp_path / "run/save/6_char.model").is_file()


def test_manifest_is_read_with_numbers(noise, tmp_path):
    prepare_librispeech(noise, tmp_path, TRAIN, num_workers=0)
    rows = load_manifest(tmp_path / "train.csv")
    assert [row["duration"] for row in rows.values()] == [0.8, 0.9]
