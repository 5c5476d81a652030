"""Files that are there as a whole or not at all."""

import contextlib
import os
from pathlib import Path


def partial_path(path):
    """Where `path` is written; a kill may leave it behind."""
    return Path(path).with_name(f"{Path(path).name}.partial")


@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` to write to; it takes the place of `path` when the context ends.

    What a kill or a full disk interrupts leaves `path` as it was. An error removes what was
    written.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(path, key):
    """Make a folder if it is absent; an OSError names `key`."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{key} cannot be made: {error.strerror}", str(path)) from error


def write_text(path, text):
    """Write UTF-8 text with the line ends that it has, as a whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")
