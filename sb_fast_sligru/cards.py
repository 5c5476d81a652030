"""`python -m sb_fast_sligru.cards`: the page docs/dispatch.md, which kernel runs where.

The choice is the library's own, for GPUs that are pretended: none is needed.
"""

import torch

from . import ops

# Shared memory of a block in KiB, by compute capability: NVIDIA's CUDA programming guide,
# "Technical Specifications per Compute Capability".
SHARED_KB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
CLUSTERS = 32, 15, 7  # of 4, 8 and 16 blocks, that run at once on an H200


def _card(capability, multiprocessors, clusters=(0, 0, 0)):
    return ops.Gpu(
        capability=capability,
        has_tensor_code=capability >= 80,
        has_cluster_code=capability >= 90,
        has_warpgroup_code=capability == 90,
        shared_bytes=1024 * SHARED_KB[capability],
        multiprocessors=multiprocessors,
        clusters_of_4=clusters[0],
        clusters_of_8=clusters[1],
        clusters_of_16=clusters[2],
    )


# With a library that holds code for each. Multiprocessors: NVIDIA's data sheets and white papers on
# the architectures (Turing, A100, GA102, Ada, H100, Blackwell).
CARDS = {
    "T4": _card(75, 40),
    "RTX 2080 Ti": _card(75, 68),
    "A100": _card(80, 108),
    "RTX 3090": _card(86, 82),
    "RTX A6000": _card(86, 84),
    "RTX 4090": _card(89, 128),
    "L40S": _card(89, 142),
    "H100 SXM": _card(90, 132, CLUSTERS),
    "H200": _card(90, 132, CLUSTERS),
    "B200": _card(100, 148, CLUSTERS),
    "RTX 5090": _card(120, 170, (*CLUSTERS[:2], 0)),  # has no clusters of 16
}
HIDDEN_SIZES = 256, 512, 1024, 2048
ROWS = 16, 48

HEAD = """# Which kernel runs where

What `sb_fast_sligru.ops.choose_kernel` answers for these cards. `python -m sb_fast_sligru.cards`
prints this page; `python -m sb_fast_sligru.info --hidden 512 --rows 16` tells the same of the GPU
at hand, for any H and rows. The rules are in `cuda_ops/light_gru/choice.h`, the kernels in
[`cuda_ops/README.md`](../cuda_ops/README.md).

Rows are the sequences of a batch, times two if bidirectional. "`l2` 3 x 128, 16 rows, 3 waves": the
kernels `forward_l2.cu` and `backward_l2.cu`, with three groups of 128 blocks; a group holds U and
serves up to 16 rows; the GPU has room for one group at a time, so there are three waves. Where the
passes differ, a cell tells of both. `stepwise`: one product and one kernel for each time step,
because H is above 1024 in float32, or U needs more blocks than there are multiprocessors.

Nothing here was measured: the project has run on H100 and H200 alone. The clusters that run at once
were asked of an H200's driver. Those of H100, B200 and RTX 5090 are pretended to be the same, but
that the RTX 5090 has no clusters of 16 blocks.
"""


def _pass(gpu, hidden, rows, dtype, direction):
    choice = ops.choose_kernel(gpu, hidden, rows, dtype, direction)
    if choice.kernel == "stepwise":
        return "`stepwise`"
    waves = choice.waves(gpu, rows)
    return (
        f"`{choice.kernel}` {choice.groups(rows)} x {choice.group}, {choice.rows} "
        f"row{'s' if choice.rows > 1 else ''}{f', {waves} waves' if waves > 1 else ''}"
    )


def _cell(*layer):
    forward, backward = (_pass(*layer, direction) for direction in ("forward", "backward"))
    return forward if forward == backward else f"forward {forward}; backward {backward}"


def _table(gpu):
    dtypes = torch.bfloat16 if gpu.has_tensor_code else torch.float16, torch.float32
    columns = [(dtype, rows) for dtype in dtypes for rows in ROWS]
    titles = [f"{str(dtype)[6:]}, {rows} rows" for dtype, rows in columns]
    yield f"| H | {' | '.join(titles)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for hidden in HIDDEN_SIZES:
        cells = [_cell(gpu, hidden, rows, dtype) for dtype, rows in columns]
        yield f"| {hidden} | {' | '.join(cells)} |"


def page():
    """The page: a table for each card, those that are alike together.

    Returns
    -------
    lines : list of str

    Example
    -------
    >>> page()[0]
    '# Which kernel runs where'
    """
    lines = HEAD.splitlines()
    alike = {}
    for name, gpu in CARDS.items():
        alike.setdefault(gpu, []).append(name)
    for gpu, names in alike.items():
        major, minor = divmod(gpu.capability, 10)
        lines += [
            "",
            f"## {', '.join(names)}",
            "",
            f"Compute capability {major}.{minor}, {gpu.multiprocessors} multiprocessors, "
            f"{gpu.shared_bytes // 1024} KB of shared memory a block.",
            "",
            *_table(gpu),
        ]
    return lines


if __name__ == "__main__":
    print("\n".join(page()))
