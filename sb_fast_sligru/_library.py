"""Loads the compiled libraries once and remembers, in words, why one is missing."""

import json
import os
import re

import torch

_HERE = os.path.dirname(__file__)
BUILD_COMMAND = "pip install --no-build-isolation ."


def _read_build_info():
    """What setup.py wrote beside the libraries: torch, CUDA version and architectures built for."""
    try:
        with open(os.path.join(_HERE, "_build_info.json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


def _load(name):
    """Load one library; return None on success, else the reason why not."""
    path = os.path.join(_HERE, f"{name}.abi3.so")
    if not os.path.exists(path):
        return f"{name} is not built (run: {BUILD_COMMAND})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} does not load: {error}"
    return None


def _load_cuda():
    if cpu_error is not None:
        return cpu_error
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    built = build_info.get("cuda")
    if built is None:
        return f"built without CUDA: nvcc was not found, or NO_CUDA=1 (run: {BUILD_COMMAND})"
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


build_info = _read_build_info()
cpu_error = _load("_C")
cuda_error = _load_cuda()
