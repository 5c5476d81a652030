"""Compares two builds of bench_step: whether a change of the kernels changes their time.

    python benchmarks/compare_step.py BEFORE AFTER > TABLE.md

BEFORE and AFTER are executables, `make build/bench_step` at two commits. They run in turn, first
one, then the other first, since the clock of a GPU moves by some percent; of each case the least
time of each counts.
"""

import argparse
import re
import subprocess

from tabulate import tabulate

ROUNDS = 6


def read(executable):
    """Run bench_step; return {case: (forward, backward)} in us a step."""
    done = subprocess.run([executable], capture_output=True, text=True, check=True)
    rows = re.findall(
        r"^(.{26}) +(\d+) +(\d+) +(\d+) +(\d+) +([\d.]+) +([\d.]+)", done.stdout, re.MULTILINE
    )
    return done.stdout.splitlines()[0], {
        (name.strip(), *sizes): (float(forward), float(backward))
        for name, *sizes, forward, backward in rows
    }


def least(results):
    """The least forward and the least backward time of each case."""
    return {
        case: [min(result[case][i] for result in results) for i in (0, 1)] for case in results[0]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    arguments = parser.parse_args()
    pair = [arguments.before, arguments.after]
    results = {executable: [] for executable in pair}
    for turn in range(ROUNDS):
        for executable in pair if turn % 2 == 0 else pair[::-1]:
            device, times = read(executable)
            results[executable].append(times)
    before, after = (least(results[executable]) for executable in pair)
    table = [
        (
            *case,
            *(f"{x:.3f}" for x in (before[case][0], after[case][0])),
            f"{100 * (after[case][0] / before[case][0] - 1):+.1f} %",
            *(f"{x:.3f}" for x in (before[case][1], after[case][1])),
            f"{100 * (after[case][1] / before[case][1] - 1):+.1f} %",
        )
        for case in before
    ]
    head = ["", "rows", "H", "T", "chunk", "forward", "after", "", "backward", "after", ""]
    print(f"{device}; the least of {ROUNDS}\n")
    print(tabulate(table, head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
