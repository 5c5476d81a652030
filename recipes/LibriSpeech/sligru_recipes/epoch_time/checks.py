"""Whether the variants of a comparison did the same: else there is no ratio."""

import math
import statistics

AGREEMENT_BOUND = 1e-3  # relative
# Of three runs of one distribution, how much farther may one be from another than the third is?
# Over a dozen steps, chance alone gives up to four times; it averages out over more of them.
SEED_CHANCE = 10  # the factor is 1 + SEED_CHANCE / sqrt(steps)


class Refused(Exception):
    """The variants were not comparable: there is no ratio to report."""


def check_same_batches(runs):
    """Refuse if any run saw other batches, or in another order, than the first."""
    for run in runs[1:]:
        if run.batches != runs[0].batches:
            step = next(
                (
                    index
                    for index, pair in enumerate(zip(runs[0].batches, run.batches, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(run.batches), len(runs[0].batches)),
            )
            raise Refused(
                f"{run.variant.name} did not see the batches of {runs[0].variant.name} "
                f"(from step {step + 1} on)"
            )


def largest_relative_difference(ours, stock):
    """Of two loss curves; infinite where one is not finite, or stock's is 0: it learns nothing."""
    differences = [abs(a - b) / abs(b) if b else math.inf for a, b in zip(ours, stock, strict=True)]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=math.inf)


def check_agreement(cell, ours, stock, stock_moved):
    """Refuse unless the losses without dropout agree; returns the entry of report.json."""
    difference = largest_relative_difference(ours, stock)
    if not difference <= AGREEMENT_BOUND:
        raise Refused(
            f"{cell}: without dropout our first {len(ours)} losses differ from stock's by up to "
            f"{difference:.2g} relative (bound {AGREEMENT_BOUND:g})"
        )
    return {
        "largest_relative_difference": difference,
        "bound": AGREEMENT_BOUND,
        "stock_moved_difference": largest_relative_difference(stock_moved, stock),
        "losses": {"ours": ours, "stock": stock, "stock_moved": stock_moved},
    }


def check_seed_spread(group, ours, stock, other_seed):
    """Refuse unless ours are about as near to stock as stock of another seed; returns the entry.

    `ours` is a dict, implementation -> losses.
    """

    def distance(losses):
        return statistics.fmean(abs(a - b) for a, b in zip(losses, stock, strict=True))

    spread = distance(other_seed)
    bound = (1 + SEED_CHANCE / math.sqrt(len(stock))) * spread
    found = {name: distance(losses) for name, losses in ours.items()}
    for name, value in found.items():
        if not value <= bound:
            raise Refused(
                f"{group}: the losses of {name} differ from stock's by {value:.3g} on average, "
                f"those of stock with another seed by {spread:.3g} (bound over {len(stock)} steps: "
                f"{bound:.3g})"
            )
    return {"ours_and_stock": found, "stock_and_other_seed": spread, "bound": bound}
