"""Shards: the same audio in a few tar files, packed once, and training that cannot tell."""

import csv
import os
import shutil
import tarfile
import types

import pytest
import torch
from speechbrain.dataio.dataio import read_audio

from sligru_recipes.corpora import shards
from sligru_recipes.corpora.embedded import make_corpus
from sligru_recipes.corpora.librispeech import prepare_librispeech

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
    packed = rows(folder / manifest.name)
    assert len(packed) == 8
    for row, original in zip(packed, rows(manifest), strict=True):
        assert row | {"wav": ""} == original | {"wav": ""}
        assert torch.equal(shards.read_audio(row["wav"]), read_audio(original["wav"]))


def test_shards_have_the_layout_of_webdataset(manifest, tmp_path):
    shards.pack(manifest, tmp_path)
    paths = sorted(tmp_path.glob("*.tar"))
    assert len(paths) > 1 and paths[0].name == f"{SPLIT}-00000.tar"
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
    content, written = last.read_bytes(), (tmp_path / manifest.name).read_text()
    for path in (first, last):
        os.utime(path, (1, 1))
    shards.pack(manifest, tmp_path)
    assert first.stat().st_mtime == last.stat().st_mtime == 1
    # Stopped before the last shard was complete:
    last.rename(last.with_suffix(".partial"))
    (tmp_path / manifest.name).unlink()
    shards.pack(manifest, tmp_path)
    assert first.stat().st_mtime == 1
    assert last.read_bytes() == content
    assert (tmp_path / manifest.name).read_text() == written
    assert not list(tmp_path.glob("*.partial"))


def test_another_manifest_is_packed_anew(manifest, tmp_path):
    shards.pack(manifest, tmp_path / "shards")
    before = len(list((tmp_path / "shards").glob("*.tar")))
    shorter = tmp_path / manifest.name
    shorter.write_text("".join(manifest.read_text().splitlines(keepends=True)[:3]))
    shards.pack(shorter, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.tar"))) < before
    packed = rows(tmp_path / "shards" / manifest.name)
    assert [row["ID"] for row in packed] == [row["ID"] for row in rows(shorter)]


def test_damaged_shard_is_named(manifest, tmp_path):
    shards.pack(manifest, tmp_path)
    place = rows(tmp_path / manifest.name)[0]["wav"]
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
