"""The synthetic corpus and the manifests of LibriSpeech's layout."""

import csv
import ctypes
import functools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import alive, small_disk, wait_until
from speechbrain.dataio.dataio import read_audio
from speechbrain.dataio.dataset import DynamicItemDataset

import mini_librispeech
import prepare
from sligru_recipes.corpora import embedded, librispeech, shards
from sligru_recipes.corpora.embedded import (
    ACCENTS,
    DEFAULT_SPLITS,
    Engine,
    draw_sentences,
    make_corpus,
    plan_speakers,
    speak_known_speakers,
    splits_for_hours,
)
from sligru_recipes.corpora.librispeech import prepare_librispeech
from sligru_recipes.corpora.sentences import LargeGrammar, SmallGrammar, ending

SPLITS = {"train-clean-100": (2, 21), "dev-clean": (1, 2), "test-clean": (1, 2)}


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus with spaces") / "LibriSpeech"
    make_corpus(folder, SPLITS, seed=3, workers=2)
    return folder


@pytest.fixture
def small(corpus, tmp_path):
    """A copy that a test may damage: `small.split` holds one speaker of 21 utterances."""
    folder = tmp_path / "LibriSpeech"
    speaker = min((corpus / "train-clean-100").iterdir())
    shutil.copytree(speaker, folder / "train-clean-100" / speaker.name)
    return folder


def utterances(folder):
    return sorted(folder.rglob("*.flac"))


# The generator


def test_same_settings_give_the_same_bytes(corpus, tmp_path):
    make_corpus(tmp_path / "again", SPLITS, seed=3, workers=1)
    first, second = contents(corpus), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []


def test_layout_is_librispeech_s(corpus):
    names = set()
    for path in utterances(corpus):
        split, speaker, chapter, name = path.relative_to(corpus).parts
        assert re.fullmatch(rf"{speaker}-{chapter}-\d{{4}}\.flac", name)
        assert split in SPLITS
        names.add(path.stem)
    assert len(names) == sum(speakers * each for speakers, each in SPLITS.values())
    transcribed = set()
    for path in corpus.rglob("*.trans.txt"):
        assert re.fullmatch(r"(\d+)-(\d+)\.trans\.txt", path.name)
        for line in path.read_text(encoding="ascii").splitlines():
            identifier, text = line.split(" ", 1)
            assert re.fullmatch(r"[A-Z]+( [A-Z]+)+", text)
            assert identifier.startswith(path.name.removesuffix(".trans.txt"))
            transcribed.add(identifier)
    assert transcribed == names
    # Speakers with more than 20 utterances have a second chapter.
    speaker = min((corpus / "train-clean-100").iterdir())
    assert [len(utterances(chapter)) for chapter in sorted(speaker.iterdir())] == [20, 1]
    table = (corpus / "SPEAKERS.TXT").read_text().splitlines()
    assert len(table) == 1 + 4 and all(line.count("|") == 4 for line in table)


def test_audio_format_and_level(corpus):
    durations = []
    for path in utterances(corpus):
        info = soundfile.info(path)
        assert (info.format, info.subtype) == ("FLAC", "PCM_16")
        assert (info.samplerate, info.channels) == (16000, 1)
        audio = read_audio(str(path)).numpy()
        assert 0.1 < np.abs(audio).max() < 0.99, path
        # Frames of digital silence would put a floor into log filter banks.
        frames = audio[: len(audio) // 400 * 400].reshape(-1, 400)
        assert frames.std(axis=1).min() > 5e-4, path
        durations.append(info.duration)
    words = sum(
        len(line.split()) - 1
        for path in corpus.rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    )
    assert 2.3 < words / sum(durations) < 3.1  # LibriSpeech: 2.7 words/s


def words_of(speakers):
    return [word for speaker in speakers for text in speaker.sentences for word in text.split()]


@pytest.mark.parametrize("vocabulary", ["small", "large"])
def test_splits_share_no_voice_and_no_sentence(vocabulary):
    splits = DEFAULT_SPLITS[vocabulary]
    speakers = plan_speakers(splits, 0, vocabulary)
    for attribute in ("identifier", "voice"):
        groups = {
            split: {getattr(speaker, attribute) for speaker in speakers if speaker.split == split}
            for split in splits
        }
        assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    sentences = [sentence for speaker in speakers for sentence in speaker.sentences]
    assert len(set(sentences)) == len(sentences)
    assert len(sentences) == sum(count * each for count, each in splits.values())
    size = len(set(words_of(speakers)))
    assert 40 <= size <= 60 if vocabulary == "small" else 2600 <= size <= 2800


def test_large_vocabulary_is_learnt_from_train_alone():
    for hours, unknown in ((3, 0.02), (5, 0.01)):
        splits = splits_for_hours(hours, "large")
        speakers = plan_speakers(splits, 0, "large")
        train = set(words_of(speaker for speaker in speakers if speaker.split.startswith("train")))
        assert len(train) > 2500
        for split in ("dev-clean", "test-clean"):
            words = words_of(speaker for speaker in speakers if speaker.split == split)
            assert sum(word not in train for word in words) < unknown * len(words)


def test_large_vocabulary_has_no_two_words_that_sound_alike():
    pytest.importorskip("espeakng_loader")
    grammar = LargeGrammar(random.Random(0))
    words = sorted({word for _ in range(20000) for word in grammar.sentence().split()})
    assert len(words) > 2700 and all(re.fullmatch("[a-z]+('[a-z]+)?", word) for word in words)
    alike = set()
    for accent in ACCENTS:
        engine = Engine(f"gmw/{accent}", pitch=50, pitch_range=50, rate=150, seed=0)
        phonemes = engine._library.espeak_TextToPhonemes
        phonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
        phonemes.restype = ctypes.c_char_p
        spoken = {}
        for word in words:
            sounds = phonemes(
                ctypes.byref(ctypes.c_char_p(word.encode())), Engine._UTF8, 0
            ).decode()
            spoken.setdefault(re.sub("[',_:|]", "", sounds), []).append(word)
        alike |= {tuple(group) for group in spoken.values() if len(group) > 1}
    # One accent drops the h; "is" stands before comparatives alone.
    assert alike == {("his", "is")}


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("try", "tries tried trying"),
        ("annoy", "annoys annoyed annoying"),
        ("wrap", "wraps wrapped wrapping"),
        ("visit", "visits visited visiting"),
        ("boil", "boils boiled boiling"),
        ("fix", "fixes fixed fixing"),
        ("own", "owns owned owning"),
        ("judge", "judges judged judging"),
        ("happy", "happiest happier happily"),
        ("gentle", "gently"),
        ("frantic", "frantically"),
    ],
)
def test_endings(word, forms):
    suffixes = "es ed ing" if len(forms.split()) == 3 and word != "happy" else "est er ly"
    assert [ending(word, suffix) for suffix in suffixes.split()][
        -len(forms.split()) :
    ] == forms.split()


@pytest.mark.parametrize(("vocabulary", "train"), [("small", (180, 25)), ("large", (167, 25))])
def test_more_hours_leave_dev_and_test_as_they_are(vocabulary, train):
    def small_splits(splits):
        speakers = plan_speakers(splits, 0, vocabulary)
        return [speaker for speaker in speakers if not speaker.split.startswith("train")]

    larger = splits_for_hours(5, vocabulary)
    assert larger["train-clean-100"] == train
    assert small_splits(splits_for_hours(1, vocabulary)) == small_splits(larger)
    assert splits_for_hours(50)["train-clean-100"] == (250, 180)


def test_every_voice_exists():
    """The engine takes an unknown variant without a word and speaks with the plain voice."""
    espeakng_loader = pytest.importorskip("espeakng_loader")
    data = Path(espeakng_loader.get_data_path())
    for variant in embedded.VARIANTS:
        assert (data / "voices" / "!v" / variant).is_file()
    for accent in ACCENTS:
        assert (data / "lang" / "gmw" / accent).is_file()


def test_complete_corpus_is_reused_and_a_damaged_one_repaired(corpus, tmp_path, monkeypatch):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    expected = contents(folder)
    (folder / "dev-clean").rename(tmp_path / "gone")
    seconds = make_corpus(folder, SPLITS, seed=3)
    assert contents(folder) == expected
    total = sum(soundfile.info(path).duration for path in utterances(folder))
    assert sum(seconds.values()) == pytest.approx(total)
    # Speech complete: nothing may be spoken again.
    (folder / "SPEAKERS.TXT").unlink()
    monkeypatch.setattr(embedded, "ThreadPoolExecutor", None)
    assert make_corpus(folder, SPLITS, seed=3) == seconds
    assert contents(folder) == expected


def test_other_settings_or_a_foreign_folder_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"other settings: seed 3 \(asked for: 4\)"):
        make_corpus(corpus, SPLITS, seed=4)
    (tmp_path / "precious.txt").touch()
    with pytest.raises(ValueError, match="is not empty and was not written by this script"):
        make_corpus(tmp_path, SPLITS)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("content", ["", "[]", '{"seed": 3', "\xff"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content.encode("latin-1"))
    message = f"{tmp_path}/settings.json is damaged"
    with pytest.raises(ValueError, match=message):
        make_corpus(tmp_path, SPLITS, seed=3)
    with pytest.raises(ValueError, match=message):
        speak_known_speakers(tmp_path / "known", tmp_path, "test-other", 1)


def test_full_disk_leaves_no_settings(tmp_path):
    """Rather than empty ones, which no later run could read."""
    with small_disk(0), pytest.raises(OSError):
        make_corpus(tmp_path / "corpus", SPLITS, seed=3)
    assert list((tmp_path / "corpus").iterdir()) == []


def test_kill_before_the_settings_are_there_is_made_up_for(tmp_path):
    (tmp_path / "settings.json.partial").write_text("{")
    make_corpus(tmp_path, {"dev-clean": (1, 1)}, seed=3, workers=1)
    assert not (tmp_path / "settings.json.partial").exists()
    assert len(utterances(tmp_path)) == 1


def test_known_speakers_say_new_sentences(corpus, tmp_path):
    speak_known_speakers(tmp_path, corpus, "test-other", 3)

    def said(split):
        return [line.split(" ", 1)[1] for path in split.rglob("*.txt") for line in path.open()]

    speakers = {path.name for path in (tmp_path / "test-other").iterdir()}
    assert speakers == {path.name for path in (corpus / "train-clean-100").iterdir()}
    assert len(utterances(tmp_path)) == len(set(said(tmp_path))) == 6
    assert not set(said(tmp_path)) & {text for split in SPLITS for text in said(corpus / split)}


def test_known_speakers_of_a_corpus_by_another_engine_are_refused(tmp_path):
    settings = {"generator": embedded.GENERATOR_VERSION, "espeakng_loader": "0.0"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="espeakng_loader 0.0, here"):
        speak_known_speakers(tmp_path / "known", tmp_path, "test-other", 1)
    with pytest.raises(ValueError, match="no settings.json"):
        speak_known_speakers(tmp_path / "known", tmp_path / "none", "test-other", 1)


def test_missing_engine_names_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install espeakng-loader, .* \[corpus\]"):
        mini_librispeech.main([str(tmp_path / "corpus")])
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("hours", [0, -1, 1e6, float("nan")])
def test_bad_hours(hours):
    with pytest.raises(ValueError, match="hours must be above 0"):
        splits_for_hours(hours)


def test_bad_sizes(tmp_path):
    with pytest.raises(ValueError, match=r"splits\['dev-clean'\]: sizes must be positive"):
        make_corpus(tmp_path / "corpus", {"dev-clean": (0, 3)})
    with pytest.raises(ValueError, match="grammar is too small for 3 different sentences"):
        draw_sentences(3, SmallGrammar(random.Random(0), slots=(("a", "b"), ("c",))))


# The manifests


def test_manifests_agree_with_the_corpus(corpus, tmp_path):
    prepare_librispeech(corpus, tmp_path, ["train-clean-100"], ["dev-clean"], ["test-clean"])
    words = dict(
        line.split(" ", 1)
        for path in corpus.rglob("*.trans.txt")
        for line in path.read_text().splitlines()
    )
    for split, (speakers, each) in SPLITS.items():
        data = DynamicItemDataset.from_csv(tmp_path / f"{split}.csv").data
        assert list(data) == [path.stem for path in utterances(corpus / split)]
        assert len(data) == speakers * each
        for identifier, row in data.items():
            assert row["wrd"] == words[identifier]
            assert identifier.startswith(row["spk_id"] + "-")
            assert len(read_audio(row["wav"])) == pytest.approx(row["duration"] * 16000)
    with (tmp_path / "dev-clean.csv").open(newline="") as file:
        speechbrain_s = ["ID", "duration", "wav", "spk_id", "wrd"]
        assert next(csv.reader(file)) == [
            *speechbrain_s,
            "sample_rate",
            "crc32",
            "size",
            "mtime_ns",
        ]


def test_train_splits_are_merged(small, tmp_path):
    shutil.copytree(small / "train-clean-100", small / "train-other-500")
    rename_utterances(small / "train-other-500", "9")
    prepare_librispeech(small, tmp_path, ["train-clean-100", "train-other-500"])
    merged = DynamicItemDataset.from_csv(tmp_path / "train.csv")
    assert len(merged) == 2 * 21
    assert sum("train-other-500" in row["wav"] for row in merged.data.values()) == 21


@pytest.fixture
def checked(monkeypatch):
    """Names of the files that a preparation checks, if it does so in this process."""
    names = []

    def check(path):
        names.append(Path(path).name)
        return check_audio(path)

    check_audio = librispeech.check_audio
    monkeypatch.setattr(librispeech, "check_audio", check)
    return names


def test_files_are_checked_again_when_they_change(small, tmp_path, checked):
    """One that is repaired comes in, one that is deleted or replaced is noticed."""
    prepare_it = functools.partial(
        prepare_librispeech, small, tmp_path, ["train-clean-100"], num_workers=0
    )
    paths = utterances(small)
    good = paths[4].read_bytes()
    cut(paths[4])
    prepare_it(skip_bad_files=True)
    assert checked == [path.name for path in paths]
    manifest = (tmp_path / "train-clean-100.csv").read_text()
    assert manifest == (tmp_path / "train.csv").read_text() and paths[4].stem not in manifest

    def recheck(**options):
        checked.clear()
        prepare_it(**options)
        assert (tmp_path / "train-clean-100.csv").read_text() == (
            tmp_path / "train.csv"
        ).read_text()
        return DynamicItemDataset.from_csv(tmp_path / "train.csv").data

    assert len(recheck(skip_bad_files=True)) == 20 and checked == [paths[4].name]
    with pytest.raises(ValueError, match=f"{paths[4]}: truncated"):
        recheck()
    paths[4].write_bytes(good)
    assert len(recheck()) == 21 and checked == [paths[4].name]
    assert len(recheck()) == 21 and checked == []
    soundfile.write(paths[5], np.zeros(1600, np.int16), 16000)
    assert recheck()[paths[5].stem]["duration"] == 0.1 and checked == [paths[5].name]
    paths[6].write_bytes(paths[6].read_bytes()[:-100])  # damaged since
    with pytest.raises(ValueError, match=f"{paths[6]}: truncated"):
        recheck()
    paths[6].unlink()
    with pytest.raises(ValueError, match=f"{paths[6]}: .* no such file"):
        recheck()
    assert paths[6].stem not in recheck(skip_bad_files=True)
    transcript = min(small.rglob("*.trans.txt"))
    transcript.write_text(transcript.read_text().replace(" THE ", " SOME "))
    rows = recheck(skip_bad_files=True)
    assert checked == [] and any(" SOME " in row["wrd"] for row in rows.values())


def test_same_size_at_another_time_is_checked(small, tmp_path, checked):
    prepare_librispeech(small, tmp_path, ["train-clean-100"], num_workers=0)
    path = utterances(small)[7]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{path}: damaged: its audio cannot be decoded after"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"], num_workers=0)


@pytest.mark.parametrize("content", ["", "ID,duration,wav\nu,1.0\n", "\0\0", 'ID\n"', "{"])
@pytest.mark.parametrize("name", ["train-clean-100.csv", "train.csv", "prepare.json"])
def test_damaged_manifests_are_written_anew(small, tmp_path, name, content):
    prepare_librispeech(small, tmp_path, ["train-clean-100"], num_workers=0)
    before = contents(tmp_path)
    (tmp_path / name).write_text(content)
    prepare_librispeech(small, tmp_path, ["train-clean-100"], num_workers=0)
    assert contents(tmp_path) == before


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_words(path):
    transcript = next(path.parent.glob("*.trans.txt"))
    lines = transcript.read_text().splitlines()
    transcript.write_text("\n".join(line for line in lines if not line.startswith(path.stem)))


def empty_words(path):
    transcript = next(path.parent.glob("*.trans.txt"))
    transcript.write_text(re.sub(rf"{path.stem} .*", path.stem, transcript.read_text()))


def change_words(path, old, new):
    transcript = next(path.parent.glob("*.trans.txt"))
    identifier, text = re.search(rf"({path.stem} )(.*)", transcript.read_text()).groups()
    changed = transcript.read_text().replace(
        identifier + text, identifier + text.replace(old, new, 1)
    )
    transcript.write_text(changed, encoding="utf-8")


DAMAGE = {
    "truncated": (cut, "truncated: its header promises"),
    "end cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "empty file": (lambda path: path.write_bytes(b""), "unreadable, 0 bytes"),
    "no samples": (
        lambda path: soundfile.write(path, np.zeros(0, np.int16), 16000),
        "unreadable",
    ),
    "not audio": (lambda path: path.write_text("Not audio at all. " * 99), "unreadable"),
    "wrong rate": (
        lambda path: soundfile.write(path, np.zeros(800, np.int16), 8000),
        "8000 Hz, expected 16000 Hz",
    ),
    "damaged in its middle": (
        lambda path: path.write_bytes(path.read_bytes()[:9000] + path.read_bytes()[9500:]),
        "damaged: its audio cannot be decoded after",
    ),
    "stereo": (
        lambda path: soundfile.write(path, np.zeros((800, 2), np.int16), 16000),
        "2 channels, expected 1",
    ),
    "missing audio": (lambda path: path.unlink(), "there is no such file"),
    "missing words": (drop_words, "no words for it"),
    "empty words": (empty_words, "no words for it"),
    "accent": (
        lambda path: change_words(path, "E", "É"),
        "its transcript has 'É', expected A to Z",
    ),
    "digit": (
        lambda path: change_words(path, " ", " 2 "),
        "its transcript has '2', expected A to Z",
    ),
    "lower case": (lambda path: change_words(path, "T", "t"), "its transcript has 't', expected A"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_named_or_skipped_and_counted(small, tmp_path, caplog, damage):
    change, reason = DAMAGE[damage]
    bad = utterances(small)[4]
    change(bad)
    with pytest.raises(ValueError) as caught:
        prepare_librispeech(small, tmp_path, ["train-clean-100"])
    message = str(caught.value)
    assert message.startswith(f"train-clean-100: {bad}: ") and reason in message
    assert "\n" not in message
    assert not (tmp_path / "train-clean-100.csv").exists()

    with caplog.at_level("WARNING", logger=librispeech.__name__):
        prepare_librispeech(small, tmp_path, ["train-clean-100"], skip_bad_files=True)
    assert "train-clean-100: 1 bad files left out" in caplog.text
    data = DynamicItemDataset.from_csv(tmp_path / "train.csv").data
    assert len(data) == 20 and bad.stem not in data
    record = json.loads((tmp_path / "prepare.json").read_text())["train-clean-100"]
    assert record["utterances"] == 20
    assert list(record["left_out"]) == [str(bad)] and reason in record["left_out"][str(bad)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_the_manifests(small, tmp_path, workers):
    cut(utterances(small)[4])
    options = {"train_splits": ["train-clean-100"], "skip_bad_files": True}
    prepare_librispeech(small, tmp_path / "default", **options)
    prepare_librispeech(small, tmp_path / "workers", num_workers=workers, **options)
    assert contents(tmp_path / "workers") == contents(tmp_path / "default")


def test_several_bad_files_are_counted(small, tmp_path):
    for path in utterances(small)[:3]:
        cut(path)
    with pytest.raises(ValueError, match=r"\(and 2 more bad files\)"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("999-1-0000 ANOTHER CHAPTER", "expected an utterance ID of this chapter"),
        ("HELLO", "expected an utterance ID of this chapter"),
        ("twice", "occurs twice"),
    ],
)
def test_malformed_transcript_is_named(small, tmp_path, line, reason):
    transcript = min(small.rglob("*.trans.txt"))
    text = transcript.read_text()
    transcript.write_text(text + (text.splitlines()[0] if line == "twice" else line) + "\n")
    with pytest.raises(ValueError, match=f"trans.txt, line 21: .*{reason}"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"])


def test_transcript_in_another_encoding_is_named(small, tmp_path):
    transcript = min(small.rglob("*.trans.txt"))
    transcript.write_bytes(transcript.read_bytes() + "É".encode("latin-1"))
    with pytest.raises(ValueError, match=f"train-clean-100: {transcript} is not UTF-8 text"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"])


def test_save_folder_that_cannot_be_written(small, tmp_path, monkeypatch):
    prepare_it = functools.partial(prepare_librispeech, small, train_splits=["train-clean-100"])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to save_folder: .*file/save'$"):
        prepare_it(save_folder=tmp_path / "file" / "save")
    # Noticed before the work, ...
    with monkeypatch.context() as patch, small_disk(1000):
        patch.setattr(librispeech, "_check_split", None)
        with pytest.raises(OSError, match=f"cannot write to save_folder: .*'{tmp_path / 'save'}'$"):
            prepare_it(save_folder=tmp_path / "save")
    # ... and if space runs out later: for the split's manifest, for the merged one.
    monkeypatch.setattr(librispeech, "_check_writable", lambda folder: folder.mkdir(exist_ok=True))
    for prepared in (False, True):
        if prepared:
            prepare_it(save_folder=tmp_path / "save")
            (tmp_path / "save/train.csv").unlink()
        with small_disk(1000), pytest.raises(OSError, match="cannot write to save_folder: "):
            prepare_it(save_folder=tmp_path / "save", num_workers=0)


def test_wrong_folders_and_splits(small, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_folder .*nowhere does not exist"):
        prepare_librispeech(tmp_path / "nowhere", tmp_path, ["train-clean-100"])
    with pytest.raises(FileNotFoundError, match="no folder 'dev-other'.*holds: train-clean-100"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"], ["dev-other"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="it holds: none"):
        prepare_librispeech(tmp_path / "empty", tmp_path, ["train-clean-100"])
    with pytest.raises(FileNotFoundError, match="no folder 'train-clean'; it holds: train-clean"):
        prepare_librispeech(small, tmp_path, ["train-clean"])
    for split in ("../LibriSpeech", "train-clean-100/", "..", ".", ""):
        with pytest.raises(ValueError, match=f"name of a folder in data_folder, got '{split}'"):
            prepare_librispeech(small, tmp_path, [split])
    with pytest.raises(ValueError, match="given more than once"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"], ["train-clean-100"])
    with pytest.raises(ValueError, match="train_splits is empty"):
        prepare_librispeech(small, tmp_path, [])
    (small / "dev-clean").mkdir()
    with pytest.raises(ValueError, match="dev-clean: no usable utterance in"):
        prepare_librispeech(small, tmp_path, ["train-clean-100"], ["dev-clean"])


def rename_utterances(split, prefix):
    """Give a split other utterance IDs."""
    for path in [*split.rglob("*.flac"), *split.rglob("*.trans.txt")]:
        renamed = path.with_name(prefix + path.name)
        path.rename(renamed)
        if renamed.name.endswith(".trans.txt"):
            renamed.write_text(re.sub("^", prefix, renamed.read_text().strip(), flags=re.M))


@pytest.mark.parametrize("name", ["train-clean-5", "my words", "train", "noise", "2023", "prepare"])
def test_any_folder_is_a_split(small, tmp_path, name):
    """Whatever its name, also where other files of the save folder have it."""
    for folder, prefix in ((name, ""), ("more", "9"), ("dev", "8")):
        shutil.copytree(small / "train-clean-100", small / folder)
        rename_utterances(small / folder, prefix)
    save = tmp_path / "save"
    for _ in range(2):
        prepare_librispeech(small, save, [name, "more"], "dev", num_workers=0)
        for split, count in ((name, 21), ("more", 21), ("dev", 21)):
            data = DynamicItemDataset.from_csv(librispeech.manifest_path(save, split)).data
            assert len(data) == count
            assert {f"/{split}/" in row["wav"] for row in data.values()} == {True}
        assert len(DynamicItemDataset.from_csv(save / "train.csv").data) == 42


def test_a_name_alone_is_one_split(small, tmp_path):
    prepare_librispeech(small, tmp_path, "train-clean-100", num_workers=0)
    assert len(DynamicItemDataset.from_csv(tmp_path / "train.csv").data) == 21
    with pytest.raises(FileNotFoundError, match="no folder 'train-clean-100,dev-clean'"):
        prepare_librispeech(small, tmp_path, "train-clean-100,dev-clean")


def test_a_split_may_be_validated_and_tested_with(small, tmp_path):
    """As Mini LibriSpeech has only two."""
    shutil.copytree(small / "train-clean-100", small / "dev-clean-2")
    splits = ("train-clean-100", "dev-clean-2", "dev-clean-2")
    prepare_librispeech(small, tmp_path, *splits, num_workers=0)
    assert len(DynamicItemDataset.from_csv(tmp_path / "dev-clean-2.csv").data) == 21
    for splits in (("a", "a"), ("a", [], "a"), (["a", "a"],), ("b", ["a", "a"])):
        with pytest.raises(ValueError, match="split 'a' is given more than once"):
            prepare_librispeech(small, tmp_path, *splits)


def test_utterances_of_one_name_are_refused(small, tmp_path):
    """In one split or several that are read together, not in train and test."""
    shutil.copytree(small / "train-clean-100", small / "copy")
    prepare_librispeech(small, tmp_path / "a", "train-clean-100", [], "copy", num_workers=0)
    with pytest.raises(ValueError, match=f"copy: {small}/copy/.* the utterance ID of {small}/tra"):
        prepare_librispeech(small, tmp_path / "b", ["train-clean-100", "copy"], num_workers=0)
    (speaker,) = (small / "copy").iterdir()
    shutil.copytree(speaker, small / "copy/other")
    with pytest.raises(ValueError, match="has the utterance ID of"):
        prepare_librispeech(small, tmp_path / "c", "copy", num_workers=0)


def test_leftovers_of_macos_are_ignored(small, tmp_path):
    prepare_librispeech(small, tmp_path / "clean", "train-clean-100", num_workers=0)
    for path in [small / "train-clean-100", *(small / "train-clean-100").rglob("*")]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07\xff")
    (small / "train-clean-100/.DS_Store").touch()
    hidden = shutil.copytree(min((small / "train-clean-100").glob("1*")), small / "hidden")
    hidden.rename(small / "train-clean-100/.Trash")
    prepare_librispeech(small, tmp_path / "left", "train-clean-100", num_workers=0)
    assert contents(tmp_path / "left") == contents(tmp_path / "clean")
    with pytest.raises(FileNotFoundError, match="it holds: train-clean-100$"):
        prepare_librispeech(small, tmp_path / "none", "none")


def as_wav(folder, keep=False, extension=".wav", **options):
    for path in utterances(folder):
        samples, rate = soundfile.read(path)
        soundfile.write(path.with_suffix(extension), samples, rate, **options)
        if not keep:
            path.unlink()


def test_wav_files_are_read(small, tmp_path):
    options = {"train_splits": "train-clean-100", "num_workers": 0}
    prepare_librispeech(small, tmp_path / "flac", **options)
    as_wav(small, keep=True)
    prepare_librispeech(small, tmp_path / "both", **options)
    assert contents(tmp_path / "both") == contents(tmp_path / "flac")
    for path in utterances(small):
        path.unlink()
        path.with_suffix(".wav").rename(path.with_suffix(".WAV"))
    prepare_librispeech(small, tmp_path / "wav", **options)
    flac, wav = (
        DynamicItemDataset.from_csv(tmp_path / name / "train.csv").data for name in ("flac", "wav")
    )
    changed = ("wav", "size", "mtime_ns")
    assert {name: {**row, **dict.fromkeys(changed)} for name, row in wav.items()} == {
        name: {**row, **dict.fromkeys(changed)} for name, row in flac.items()
    }
    assert all(row["wav"].endswith(".WAV") for row in wav.values())


@pytest.mark.parametrize(
    ("samples", "keep", "reason"),
    [
        ([0.1] * 800, 0.5, "truncated: its header promises 3200 bytes of audio, it has "),
        ([0.1] * 800 + [np.nan], 1, "samples that are not finite"),
        ([0.1] * 800 + [np.inf], 1, "samples that are not finite"),
        ([0.1] * 800 + [1e30], 1, "samples that are not finite, or far too large"),
        ([], 1, "it has no samples"),
    ],
)
def test_bad_wav_files_are_named(small, tmp_path, samples, keep, reason):
    as_wav(small)
    path = min(small.rglob("*.wav"))
    soundfile.write(path, np.array(samples), 16000, subtype="FLOAT")
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path}: .*{reason}"):
        prepare_librispeech(small, tmp_path, "train-clean-100", num_workers=0)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_wav_files_from_a_pipe_are_whole(tmp_path, size):
    """Their headers say what sox and ffmpeg write where they cannot go back."""
    soundfile.write(tmp_path / "a.wav", np.full(800, 0.1), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    seconds, rate, _, reason = librispeech.check_audio(tmp_path / "a.wav")
    assert (seconds, rate, reason) == (0.05, 16000, None)


def test_sample_rate_is_that_of_the_corpus(small, tmp_path):
    split = "train-clean-100"
    prepare_it = functools.partial(prepare_librispeech, small, tmp_path, split, num_workers=0)
    with pytest.raises(ValueError, match=r"16000 Hz, expected 8000 Hz \(sample_rate\)"):
        prepare_it(sample_rate=8000)
    prepare_it()
    with pytest.raises(ValueError, match=r"16000 Hz, expected 8000 Hz \(sample_rate\)"):
        prepare_it(sample_rate=8000)  # also of what was checked before
    with pytest.raises(ValueError, match=r"expected 8000 Hz .*\(and 20 more .*no usable utterance"):
        prepare_it(sample_rate=8000, skip_bad_files=True)
    for path in utterances(small):
        soundfile.write(path, soundfile.read(path)[0][::2], 8000)
    with pytest.raises(ValueError, match=r"8000 Hz, expected 16000 Hz \(sample_rate\)"):
        prepare_it()
    arguments = [str(small), str(tmp_path), "--train", split, "--workers", "0"]
    with pytest.raises(SystemExit, match="8000 Hz, expected 16000 Hz"):
        prepare.main(arguments)
    prepare.main([*arguments, "--sample-rate", "8000"])
    data = DynamicItemDataset.from_csv(tmp_path / "train.csv").data
    for row in data.values():
        assert len(read_audio(row["wav"])) == pytest.approx(row["duration"] * 8000)
    prepare_it(sample_rate=None)  # of no interest to a language model


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", ["prepare", "mini_librispeech"])
def test_workers_end_with_a_command(small, tmp_path, command, stop):
    """However it is stopped, while they work."""
    pids = tmp_path / "pids"
    pids.mkdir()
    work = (
        "import os, pathlib, time\n"
        "def work(*arguments):\n"
        f"    (pathlib.Path({str(pids)!r}) / str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "endless.py").write_text(work)
    code = {
        "prepare": "import endless, prepare\n"
        "from sligru_recipes.corpora import librispeech\n"
        "librispeech.check_audio = endless.work\n"
        f"prepare.main([{str(small)!r}, {str(tmp_path)!r}, '--train', 'train-clean-100', "
        "'--workers', '2'])\n",
        "mini_librispeech": "import endless, mini_librispeech\n"
        "from sligru_recipes.corpora import embedded\n"
        "embedded.speak = endless.work\n"
        f"mini_librispeech.main([{str(tmp_path / 'corpus')!r}, '--workers', '2'])\n",
    }[command]
    # A worker that is spawned imports this script, too.
    script = tmp_path / "script.py"
    lines = code.splitlines()
    script.write_text("\n".join(["if __name__ == '__main__':", *(f"    {line}" for line in lines)]))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    wait_until(lambda: any(pids.iterdir()), 60)
    parent.send_signal(stop)
    parent.wait(timeout=20)
    wait_until(lambda: not any(alive(int(path.name)) for path in pids.iterdir()), 20)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--workers=-1", "workers must be at least 0, got -1"),
        ("--sample-rate=0", "sample_rate must be above 0, got 0"),
    ],
)
def test_impossible_numbers_are_named(small, tmp_path, option, message):
    with pytest.raises(SystemExit, match=f"^prepare: .*{message}$"):
        prepare.main([str(small), str(tmp_path / "new"), "--train", "train-clean-100", option])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_progress_is_lines_without_a_terminal(small, tmp_path, caplog, monkeypatch, workers):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(librispeech, "MINUTES", 0)
    prepare_librispeech(small, tmp_path, "train-clean-100", num_workers=workers)
    assert "checking train-clean-100: file 21 of 21" in caplog.messages
    monkeypatch.setattr(shards, "MINUTES", 0)
    shards.pack(tmp_path / "train.csv", tmp_path)
    assert "packing train: file 21 of 21" in caplog.text


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_corpus_needs_a_worker(tmp_path, workers):
    with pytest.raises(SystemExit, match="mini_librispeech: workers must be at least 1, got"):
        mini_librispeech.main([str(tmp_path / "new"), "--workers", workers])
    assert not (tmp_path / "new").exists()


def test_command_line_ends_in_one_line(tmp_path):
    with pytest.raises(
        SystemExit, match="^prepare: data_folder .* does not exist or is no folder$"
    ):
        prepare.main([str(tmp_path / "nowhere"), str(tmp_path), "--train", "train-clean-100"])
