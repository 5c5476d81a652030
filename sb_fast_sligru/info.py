"""`python -m sb_fast_sligru.info`: what is installed and built, and which kernels would run."""

import argparse
import os
import platform

import torch

from . import __version__, _library, ops

DECODER = 10, 201  # channels and taps of SpeechBrain's recipes
CNN_FRAME = 40, 128  # frequencies and channels of the recipes' first block
ATTENTION = 1024, 16, 201  # units, channels and taps of the seq2seq recipe's search


def _speechbrain():
    try:
        from . import _stock
    except ImportError as error:
        return str(error)
    return f"{_stock.version()}, imports"


def _code(device, properties):
    code = _library.gpu_code(10 * properties.major + properties.minor)
    if code is None:
        return "none in the library"
    if _library.cuda_error:
        return f"{code}, in the library that does not load"
    clusters = ops.gpu(torch.device(device).index).has_cluster_code
    return (
        f"{code}{', compiled at the first call' if code.startswith('compute') else ''}, "
        f"with{'' if clusters else 'out'} the kernels of clusters"
    )


def _kernel(device, hidden, rows, dtype, direction):
    gpu = ops.gpu(device.index)
    choice = ops.choose_kernel(gpu, hidden, rows, dtype, direction)
    waves = choice.waves(gpu, rows)
    return (
        f"    {direction:<8} {choice.kernel}, {choice.groups(rows)} x {choice.group} blocks of "
        f"{choice.units} units, up to {choice.rows} rows each"
        f"{f', in {waves} waves' if waves > 1 else ''} ({choice.reason})"
    )


def report(hidden=512, rows=16):
    """Describe the installation and what runs layers of `hidden` units.

    Arguments
    ---------
    hidden : int
        Hidden units H.
    rows : int
        Sequences of the batch, times 2 if bidirectional.

    Returns
    -------
    lines : list of str

    Example
    -------
    >>> report()[0].startswith("sb_fast_sligru")
    True
    """
    built = _library.build_info
    lines = [
        f"sb_fast_sligru  {__version__}, Python {platform.python_version()}",
        f"torch           {torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        f"speechbrain     {_speechbrain()}",
        f"package         {os.path.dirname(os.path.abspath(__file__))}",
        f"libraries       {_library.library_folder}",
        f"built with      torch {built.get('torch', '?')}, CUDA {built.get('cuda') or 'none'}"
        + (f", architectures {built['archs']}" if built.get("cuda") else ""),
        f"CPU library     {_library.cpu_error or 'loaded'}",
        f"CUDA library    {_library.cuda_error or 'loaded'}",
    ]
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        properties = torch.cuda.get_device_properties(device)
        lines.append(
            f"{device:<15} {properties.name}, compute capability "
            f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
        if built.get("cuda"):
            lines.append(f"  its code      {_code(device, properties)}")
    if len(devices) == 1:
        lines.append("GPU             none is visible")
    lines.append(f"Backend for H = {hidden}, {rows} rows:")
    for device in map(torch.device, devices):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name, reason = ops.choose_backend(device, hidden, dtype)
            lines.append(f"  {str(device):<8} {str(dtype)[6:]:<9} {name} ({reason})")
            if name == "persistent":
                passes = ("forward", "backward")
                lines += [_kernel(device, hidden, rows, dtype, direction) for direction in passes]
    for title, choose, arguments in (
        # Of the dtypes only float64 makes a difference here.
        ("the attention decoder", ops.choose_decoder_backend, (torch.float32, *DECODER)),
        ("the CNN", ops.choose_norm_pool_backend, (torch.float32, *CNN_FRAME)),
        ("the CTC loss", ops.choose_ctc_loss_backend, ()),
        ("CTC prefix scores", ops.choose_ctc_prefix_backend, ()),
        (
            "attention energies of a search",
            ops.choose_location_energies_backend,
            (torch.float32, *ATTENTION),
        ),
        ("Adadelta", ops.choose_adadelta_backend, ()),
    ):
        lines.append(f"Backend for {title}:")
        for device in map(torch.device, devices):
            choice = choose(device, *arguments)
            lines.append("  {:<18} {} ({})".format(str(device), *choice))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m sb_fast_sligru.info", description=__doc__)
    parser.add_argument("--hidden", type=int, default=512, help="hidden units H (default 512)")
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="sequences of the batch, times 2 if bidirectional (default 16)",
    )
    arguments = parser.parse_args()
    print("\n".join(report(arguments.hidden, arguments.rows)))
