"""Shards: the same audio in a few tar files, packed once, and training that cannot tell."""

import csv
import os
import re
import shutil
import subprocess
import sys
import tarfile
import types

import pytest
import soundfile
import torch
from speechbrain.dataio.dataio import read_audio
from tiny_corpora import make_noise

from sligru_recipes.corpora import shards
from sligru_recipes.corpora.embedded import make_corpus
from sligru_recipes.corpora.librispeech import prepare_librispeech
from sligru_recipes.lock import lock_folder

SPLIT = "train-clean-100"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    make_corpus(folder / "corpus", {SPLIT: (2, 4)})
    prepare_librispeech(folder / "corpus", folder / "save", [SPLIT], num_workers=0)
    return folder / "save" / f"{SPLIT}.csv"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """About three utterances in each."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 150_000)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_shards_hold_the_same_audio(manifest, tmp_path):
    folder = tmp_path / "with spaces: and a colon"
    shards.pack(manifest, folder)
    packed = rows(shards.packed_manifest(manifest, folder))
    assert len(packed) == 8
    for row, original in zip(packed, rows(manifest), strict=True):
        assert row | {"wav": ""} == original | {"wav": ""}
        assert torch.equal(shards.read_audio(row["wav"]), read_audio(original["wav"]))


def test_shards_have_the_layout_of_webdataset(manifest, tmp_path):
    shards.pack(manifest, tmp_path)
    paths = sorted(tmp_path.glob("*.tar"))
    assert len(paths) > 1 and re.fullmatch(f"{SPLIT}-[0-9a-f]{{12}}-00000.tar", paths[0].name)
    words = {row["ID"]: row["wrd"] for row in rows(manifest)}
    durations = {row["ID"]: float(row["duration"]) for row in rows(manifest)}
    lengths = []
    for path in paths:
        with tarfile.open(path) as shard:
            members = shard.getmembers()
            for audio, text in zip(members[::2], members[1::2], strict=True):
                key = audio.name.removesuffix(".flac")
                assert text.name == f"{key}.txt"
                lengths.append(durations[key])
                assert shard.extractfile(text).read().decode() == words.pop(key)
    assert words == {}
    assert lengths == sorted(lengths)


def test_finished_shards_are_kept_and_missing_ones_packed(manifest, tmp_path):
    shards.pack(manifest, tmp_path)
    first, *_, last = sorted(tmp_path.glob("*.tar"))
    packed = shards.packed_manifest(manifest, tmp_path)
    content, written = last.read_bytes(), packed.read_text()
    for path in (first, last):
        os.utime(path, (1, 1))
    shards.pack(manifest, tmp_path)
    assert first.stat().st_mtime == last.stat().st_mtime == 1
    # Stopped before the last shard was complete:
    last.rename(f"{last}.partial")
    packed.unlink()
    shards.pack(manifest, tmp_path)
    assert first.stat().st_mtime == 1
    assert last.read_bytes() == content
    assert packed.read_text() == written
    assert not list(tmp_path.glob("*.partial"))
    last.unlink()  # by someone who cleans up
    shards.pack(manifest, tmp_path)
    assert last.read_bytes() == content


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_another_manifest_leaves_the_shards_of_the_first(manifest, tmp_path):
    """A run that trains on the first goes on reading the same audio."""
    folder = tmp_path / "shards"
    shards.pack(manifest, folder)
    before = contents(folder)
    shorter = tmp_path / manifest.name
    shorter.write_text("".join(manifest.read_text().splitlines(keepends=True)[:3]))
    shards.pack(shorter, folder)
    after = contents(folder)
    assert {name: after[name] for name in before if name.endswith((".tar", ".csv"))} == {
        name: content for name, content in before.items() if name.endswith((".tar", ".csv"))
    }
    packed = rows(shards.packed_manifest(shorter, folder))
    assert [row["ID"] for row in packed] == [row["ID"] for row in rows(shorter)]
    first = rows(shards.packed_manifest(manifest, folder))[0]
    assert torch.equal(shards.read_audio(first["wav"]), read_audio(rows(manifest)[0]["wav"]))


def test_shards_are_packed_again_if_the_audio_changed(tmp_path):
    """Not if it was only touched or copied; also if the size of a file stayed as it was."""
    corpus, folder = make_noise(tmp_path / "noise", [0.5, 0.5]), tmp_path / "shards"
    first, second = sorted((corpus / "train-clean-100/1/10").glob("*.flac"))
    for path in (first, second):
        soundfile.write(path.with_suffix(".wav"), *soundfile.read(path))
        path.unlink()
    first, second = first.with_suffix(".wav"), second.with_suffix(".wav")

    def packed():
        prepare_librispeech(corpus, tmp_path, "train-clean-100", num_workers=0)
        shards.pack(tmp_path / "train.csv", folder)
        return shards.packed_manifest(tmp_path / "train.csv", folder)

    before = packed()
    os.utime(first, (1, 1))
    assert packed() == before
    shutil.copyfile(second, first)
    assert packed() != before
    assert torch.equal(shards.read_audio(rows(packed())[0]["wav"]), read_audio(str(second)))


def test_files_of_others_are_left_alone(manifest, tmp_path):
    """Whatever they are called: backups, and what looks like a shard."""
    names = (
        f"{SPLIT}.tar",
        f"{SPLIT}-backup.tar",
        f"{SPLIT}-00000.tar",
        f"{SPLIT}.csv",
        f"{SPLIT}.sha256",
        f"{SPLIT}.partial",
        f"{SPLIT}-0123456789ab-00000.tar",
    )
    for name in names:
        (tmp_path / name).write_text("precious")
    shards.pack(manifest, tmp_path)
    assert all((tmp_path / name).read_text() == "precious" for name in names)


def test_links_are_followed(manifest, tmp_path):
    row = rows(manifest)[0]
    (tmp_path / "link.flac").symlink_to(row["wav"])
    linked = tmp_path / "linked.csv"
    linked.write_text(f"ID,duration,wav,wrd\nu,1.0,{tmp_path}/link.flac,HELLO\n")
    shards.pack(linked, tmp_path / "shards")
    (packed,) = rows(shards.packed_manifest(linked, tmp_path / "shards"))
    assert torch.equal(shards.read_audio(packed["wav"]), read_audio(row["wav"]))


def test_moved_shards_are_found_where_they_are(manifest, tmp_path):
    shards.pack(manifest, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    shards.pack(manifest, tmp_path / "b")
    for row in rows(shards.packed_manifest(manifest, tmp_path / "b")):
        assert len(shards.read_audio(row["wav"])) > 0


def test_second_process_waits_for_the_shards_of_the_first(manifest, tmp_path):
    code = (
        "import sys\n"
        "from sligru_recipes.corpora import shards\n"
        "shards.SHARD_BYTES = 150_000\n"
        f"shards.pack({str(manifest)!r}, {str(tmp_path)!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with lock_folder(tmp_path, name=shards.LOCK_FILE):
        other = subprocess.Popen([sys.executable, "-c", code], env=environment)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=5)
        assert not list(tmp_path.glob("*.tar"))
    assert other.wait(timeout=60) == 0
    assert shards.packed_manifest(manifest, tmp_path).is_file()


def test_manifest_without_utterances_is_named(tmp_path):
    (tmp_path / "empty.csv").write_text("ID,duration,wav,spk_id,wrd\n")
    with pytest.raises(ValueError, match="empty.csv has no utterance"):
        shards.pack(tmp_path / "empty.csv", tmp_path)


def test_damaged_shard_is_named(manifest, tmp_path):
    shards.pack(manifest, tmp_path)
    place = rows(shards.packed_manifest(manifest, tmp_path))[0]["wav"]
    path, offset, size = place.rsplit(":", 2)
    with open(path, "r+b") as shard:
        shard.truncate(int(offset) + 10)
    with pytest.raises(OSError, match=f"no audio at {place}"):
        shards.read_audio(place)


def test_a_full_disk_is_found_before_packing(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=f"shard_folder {tmp_path} has 0 MiB free"):
        shards.pack(manifest, tmp_path)
    assert not list(tmp_path.glob("*.tar"))
