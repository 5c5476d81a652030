"""Loads the compiled libraries once and remembers, in words, why one is missing."""

import json
import os
import re
import sys

import torch

from ._sources import digest

_HERE = os.path.dirname(os.path.abspath(__file__))
# pip keeps the wheel that it built from an archive, whatever the environment variables were.
BUILD_COMMAND = "pip install --no-build-isolation --no-cache-dir ."


def _path(folder, name):
    return os.path.join(folder, f"{name}.abi3.so")


def _read_build_info(folder):
    """What setup.py wrote beside the libraries, and what is wrong with it.

    Returns
    -------
    info : dict
        torch, CUDA version and architectures built for; empty if it cannot be read.
    error : str or None
    """
    path = os.path.join(folder, "_build_info.json")
    try:
        with open(path, encoding="utf-8") as file:
            info = json.load(file)
        if not isinstance(info, dict) or not {"torch", "cuda", "archs", "sources"} <= info.keys():
            raise ValueError("keys are missing")
    except (OSError, ValueError) as error:
        return {}, f"{path} cannot be read: {error} (run: {BUILD_COMMAND})"
    return info, None


def _find(here, search):
    """The folder of the libraries: `here` or, where that is a checkout, an installed package.

    A checkout hides the package that was installed from it wherever Python starts in its folder.

    Arguments
    ---------
    here : str
        The folder of this package.
    search : list of str
        Python's path.

    Returns
    -------
    folder : str
    error : str or None
        Why there are no libraries in it.
    """
    if os.path.exists(_path(here, "_C")):
        return here, None
    error = f"_C is not built (run: {BUILD_COMMAND})"
    sources = os.path.join(os.path.dirname(here), "cuda_ops")
    if os.path.isdir(sources):
        for entry in search:
            folder = os.path.join(os.path.abspath(entry), os.path.basename(here))
            if os.path.realpath(folder) == os.path.realpath(here):
                continue
            if os.path.exists(_path(folder, "_C")):
                if _read_build_info(folder)[0].get("sources") == digest(sources):
                    return folder, None
                error = (
                    f"{here} hides {folder}, which was built from other sources "
                    f"(run in {os.path.dirname(here)}: {BUILD_COMMAND})"
                )
                break
    return here, error


def _refuse_a_second_copy():
    """The operators of a process are registered once; the second time torch ends the process."""
    if hasattr(torch.ops.sb_fast_sligru, "light_gru"):
        paths = [path for path in torch.ops.loaded_libraries if path.endswith("_C.abi3.so")]
        raise ImportError(
            f"sb_fast_sligru in {_HERE} is the second copy in this process, after "
            f"{' or '.join(sorted(paths))}: restart Python with one of them on its path"
        )


def _load(name):
    """Load one library; return None on success, else the reason why not."""
    path = _path(library_folder, name)
    if not os.path.exists(path):
        return f"{name} is not built (run: {BUILD_COMMAND})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = error.__cause__ or error  # the linker's words are in the cause
        return f"{name} does not load under torch {torch.__version__}: {cause}"
    return None


def _load_cuda():
    if cpu_error is not None:
        return cpu_error
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if _info_error is not None:
        return _info_error
    built = build_info["cuda"]
    if built is None:
        why = build_info.get("without_cuda", "its reason is not known")
        return f"built without CUDA: {why} (run: FORCE_CUDA=1 {BUILD_COMMAND})"
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"built for CUDA {built}, but this torch for CUDA {torch.version.cuda}: the major "
            f"versions must agree (run: {BUILD_COMMAND})"
        )
    return _load("_C_cuda")


def gpu_code(capability):
    """What of the CUDA library a GPU would run.

    Arguments
    ---------
    capability : int
        Its compute capability, 90 for 9.0.

    Returns
    -------
    code : str or None
        "sm_90a": code for GPUs. "compute_80": PTX, which the driver compiles at the first call.
        None if there is neither, "unknown" if the build did not note what it made.
    """
    if "code" not in build_info:
        return "unknown"
    runs = []
    for code in build_info["code"]:
        kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
        target, same_major = int(number), int(number) // 10 == capability // 10
        if suffix == "a":  # of this architecture alone
            fits = target == capability
        elif suffix == "f" or kind == "sm":  # of this architecture and later ones of its family
            fits = same_major and target <= capability
        else:
            fits = target <= capability
        if fits:
            runs.append((kind == "sm", target, code))
    return max(runs)[2] if runs else None


_refuse_a_second_copy()
library_folder, _find_error = _find(_HERE, sys.path)
build_info, _info_error = _read_build_info(library_folder)
cpu_error = _find_error or _load("_C")
cuda_error = _load_cuda()
