"""Loaders that keep up with the GPU, within the machine's CPUs."""

import os

from ..processes import available_cpus

PREFETCHED = 4  # batches a process: some hold the GPU's next second while one takes its time


def limit_processes(count):
    """`count`, or as many as each process of this machine that trains has CPUs for, if less."""
    return min(count, max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def loader_options(options, device):
    """Options of a loader, with those added that a GPU wants and are not given.

    What is loaded does not depend on them.

    Arguments
    ---------
    options : dict
        For `speechbrain.dataio.dataloader.make_dataloader`.
    device : str
        Where the batches go.

    Returns
    -------
    dict
        A new one.
    """
    processes = limit_processes(options.get("num_workers", 0))
    if processes == 0:
        return {**options, "num_workers": 0}
    defaults = {"prefetch_factor": PREFETCHED, "pin_memory": "cuda" in device}
    return {**defaults, **options, "num_workers": processes}
