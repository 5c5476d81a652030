"""Which C++ and CUDA sources a library was built from. setup.py runs this file too."""

import hashlib
import pathlib


def digest(folder):
    """A digest of the names and contents of all files of `folder`, a str.

    Two checkouts of one commit have the same, wherever they lie.
    """
    folder = pathlib.Path(folder)
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


_SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
