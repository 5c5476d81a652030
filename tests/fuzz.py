"""Random cases: how many, from which seed, and how that is told."""

import os
import random

import torch


def draw_cases(capsys, name, count):
    """Yield a random.Random for each case, with torch seeded likewise.

    Environment variables: SB_FAST_SLIGRU_FUZZ_CASES is how many instead of `count`,
    SB_FAST_SLIGRU_FUZZ_SEED the seed of the first. Each case prints its own, which pytest shows
    beside a failure: the last line is that of the case that failed.
    """
    count = int(os.environ.get("SB_FAST_SLIGRU_FUZZ_CASES", count))
    first = int(os.environ.get("SB_FAST_SLIGRU_FUZZ_SEED", random.SystemRandom().randrange(2**31)))
    for seed in range(first, first + count):
        print(f"SB_FAST_SLIGRU_FUZZ_SEED={seed}")
        torch.manual_seed(seed)
        yield random.Random(seed)
    with capsys.disabled():
        print(f"\n{name}: {count} cases, seeds from {first} on ", end="")
