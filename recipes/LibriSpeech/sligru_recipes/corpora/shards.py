"""A corpus in a few large tar files, for file systems that are slow with many small ones.

The files have WebDataset's layout: NAME-DIGEST-00000.tar and so on, in each KEY.flac and KEY.txt of
an utterance side by side. They are read at known positions, so a data set of them is one like any
other: random access, sorted or dynamic batches, DDP, and training that resumes within an epoch.

DIGEST is the manifest's, but for the times of its files. Runs of other manifests have other files
in the same folder, and none is ever deleted or replaced.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

from speechbrain.dataio import dataio
from speechbrain.utils.logger import get_logger

from ..files import replacing
from ..lock import lock_folder
from ..progress import MINUTES, Progress

logger = get_logger(__name__)

SHARD_BYTES = 2**30
DIGEST_LENGTH = 12  # hexadecimal digits
TIME = "mtime_ns"  # a column; whether a file's samples changed is told by another
LOCK_FILE = ".packing.lock"  # not that of a run, whose output folder it may be


def packed_manifest(manifest, folder):
    """Path of the manifest of the shards of `manifest`, NAME-DIGEST.csv in `folder`."""
    with open(manifest, newline="", encoding="utf-8") as file:
        rows = [{**row, TIME: None} for row in csv.DictReader(file)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:DIGEST_LENGTH]
    return Path(folder, f"{Path(manifest).stem}-{digest}.csv")


def pack(manifest, folder):
    """Copy the audio of a manifest into shards, or what is still missing of it.

    Utterances lie in the order of their durations: those of a batch are near each other. A second
    process that packs into the folder waits for the first.

    Arguments
    ---------
    manifest : str or Path
        NAME.csv of `prepare_librispeech`.
    folder : str or Path
        Gets NAME-DIGEST-00000.tar, ... and `packed_manifest`, whose `wav` column says where the
        audio is (`read_audio` reads it). What was packed there from an equal manifest is kept.

    Raises
    ------
    OSError
        If `folder` cannot be written or its disk has too little space.
    ValueError
        If the manifest has no utterance.
    """
    if not is_packed(manifest, folder):
        with lock_folder(folder, "shard_folder", LOCK_FILE, wait=True):
            if not is_packed(manifest, folder):
                _pack(manifest, packed_manifest(manifest, folder))


def is_packed(manifest, folder):
    """Whether all shards are where the manifest of them says."""
    packed = packed_manifest(manifest, folder)
    if not packed.is_file():
        return False
    with open(packed, newline="", encoding="utf-8") as file:
        shards = {row.get("wav", "").rsplit(":", 2)[0] for row in csv.DictReader(file)}
    return bool(shards) and all(Path(shard).is_file() for shard in shards)


def _pack(manifest, packed):
    with open(manifest, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{manifest} has no utterance")
    plan = _plan(sorted(rows, key=lambda row: (float(row["duration"]), row["ID"])))
    paths = [packed.with_name(f"{packed.stem}-{number:05d}.tar") for number in range(len(plan))]
    missing = [path for path in paths if not path.is_file()]
    _check_space(packed.parent, [plan[paths.index(path)] for path in missing])
    title = f"packing {Path(manifest).stem}"
    with contextlib.closing(Progress(title, len(rows), "file", MINUTES, logger.info)) as progress:
        for path, utterances in zip(paths, plan, strict=True):
            if path in missing:
                _write_shard(path, utterances)
            with tarfile.open(path) as shard:
                places = {member.name: member for member in shard}
            for row in utterances:
                member = places[_audio_name(row)]
                row["wav"] = f"{path.resolve()}:{member.offset_data}:{member.size}"
            progress.update(len(utterances))
    with (
        replacing(packed) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_audio(place):
    """Read an utterance from a shard, as SpeechBrain's `read_audio` does from a file.

    Arguments
    ---------
    place : str
        "SHARD:OFFSET:SIZE", both numbers in bytes.

    Raises
    ------
    OSError
        If there is no audio; the message has `place`.
    """
    path, offset, size = place.rsplit(":", 2)
    with open(path, "rb") as shard:
        shard.seek(int(offset))
        audio = io.BytesIO(shard.read(int(size)))
    try:
        return dataio.read_audio(audio)
    except RuntimeError as error:
        raise OSError(f"no audio at {place}: {error}") from error


def _audio_name(row):
    return row["ID"] + Path(row["wav"]).suffix


def _plan(rows):
    """Cut the rows into shards of about SHARD_BYTES of audio."""
    plan, size = [[]], 0
    for row in rows:
        if size >= SHARD_BYTES:
            plan.append([])
            size = 0
        plan[-1].append(row)
        size += os.path.getsize(row["wav"])
    return plan


def _check_space(folder, plan):
    # A tar file rounds each member up to 512 bytes and adds a header of 512.
    needed = sum(os.path.getsize(row["wav"]) + 2048 for shard in plan for row in shard)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"shard_folder {folder} has {free / 2**20:.0f} MiB free, "
            f"but the shards take {needed / 2**20:.0f} MiB"
        )


def _write_shard(path, rows):
    with replacing(path) as partial, tarfile.open(partial, "w") as shard:
        for row in rows:
            shard.add(os.path.realpath(row["wav"]), _audio_name(row))
            text = row["wrd"].encode()
            member = tarfile.TarInfo(f"{row['ID']}.txt")
            member.size = len(text)
            shard.addfile(member, io.BytesIO(text))
