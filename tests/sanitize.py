"""One small case of every kernel, to be run under compute-sanitizer: `make sanitize`.

The values count too. racecheck slows some warps down by far, which has shown a race that it does
not see itself: between blocks of a cluster.
"""

import argparse
import os
import sys

# Every tensor gets its own allocation, so that memcheck and initcheck see where it ends.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from conftest import relative_error
from test_ops import TOLERANCE, make_inputs, run, upstream_for

# Name -> backend, dtype, (B, T, H), bidirectional. Several clusters each, the last partly filled.
FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "stepwise": ("stepwise", BFLOAT16, (5, 6, 136), True),
    "cluster4": ("persistent", FLOAT16, (5, 6, 72), False),
    "cluster8": ("persistent", BFLOAT16, (5, 6, 200), True),
    "cluster16": ("persistent", BFLOAT16, (5, 6, 512), False),
    "wide": ("persistent", BFLOAT16, (9, 5, 1024), False),
    "many": ("persistent", BFLOAT16, (86, 4, 1016), True),
    "float32-cluster4": ("persistent", FLOAT32, (5, 6, 72), True),
    "float32-cluster8": ("persistent", FLOAT32, (5, 6, 200), False),
    "float32-cluster16": ("persistent", FLOAT32, (5, 6, 512), False),
    "float32-wide": ("persistent", FLOAT32, (9, 5, 1024), False),
}
OPTIONS = {"sligru": "sligru-affine-h0", "ligru": "ligru-mask"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    cases = parser.parse_args().cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"CASE: got {', '.join(unknown)}, expected one of {', '.join(CASES)}")
    torch.set_num_threads(1)
    failed = False
    for case in cases:
        name, dtype, shape, bidirectional = CASES[case]
        for cell, option in OPTIONS.items():
            torch.manual_seed(20231)
            arguments = make_inputs(shape, option, bidirectional) | {"activation": "tanh"}
            upstream = upstream_for(arguments)
            exact = run("reference", arguments, upstream)
            results = run(name, arguments, upstream, "cuda", dtype)
            again = run(name, arguments, upstream, "cuda", dtype)
            bound = TOLERANCE.get(dtype, TOLERANCE[BFLOAT16])
            errors = {key: relative_error(value, exact[key]) for key, value in results.items()}
            same_bits = all(torch.equal(value, again[key]) for key, value in results.items())
            good = same_bits and all(error <= bound for error in errors.values())
            failed |= not good
            print(
                f"{case} {cell}: {'good' if good else 'WRONG'}; relative errors",
                ", ".join(f"{key} {error:.1e}" for key, error in errors.items()),
                "" if same_bits else "; other bits in a second run",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
