"""The report of a comparison as a picture."""

from matplotlib.figure import Figure

from .phases import FORWARD, PHASES
from .texts import device_name, duration, name_of, timed_variants, variants_of

COLOURS = {
    "stock": "#e69f00",
    "ours: RNN only": "#8ecae6",
    "ours: RNN + decoder": "#219ebc",
    "ours: all": "#023e8a",
    "stock, other seed": "#bbbbbb",
    "stock, jit": "#d55e00",
    "stock, compile": "#cc79a7",
    "torch": "#009e73",
}
OTHERS = {"data wait": "#999999", "augmentation": "#ddcc77", "optimiser": "#555555"}
PHASE_COLOURS = dict(zip(FORWARD, ("C1", "C2", "C0", "C4", "C3", "C5"), strict=True)) | OTHERS


def draw(report, path):
    """Epoch times, where a step's time goes, losses, and step time against utterance length."""
    timed = timed_variants(report)
    groups = list(report["checks"]["seed_spread"])  # those with losses to compare
    height = 1.5 + 0.35 * len(timed)
    figure = Figure(figsize=(14, height + 4), layout="constrained")
    figure.suptitle(f"{device_name(report)}; {report['data']['source']}", fontsize="medium")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 4])
    epochs, steps = upper.subplots(1, 2, sharey=True)
    _draw_epochs(report, epochs, timed)
    _draw_phases(steps, timed)
    *curves, lengths = lower.subplots(1, len(groups) + 1, squeeze=False)[0]
    for axes, group in zip(curves, groups, strict=True):
        _draw_losses(axes, group, variants_of(report, group))
    for variant in timed:
        seconds = report["data"]["longest_utterances"] * report["data"]["passes"]
        lengths.plot(
            seconds,
            [1000 * value for value in variant["step_seconds"]],
            {"SLi-GRU": "o", "Li-GRU": "s"}.get(variant["cell"], "^"),
            color=COLOURS[variant["implementation"]],
            markersize=4,
            fillstyle="full" if variant["precision"] == timed[0]["precision"] else "none",
            label=f"{variant['cell']} {variant['precision']} {variant['implementation']}",
        )
    lengths.set_title("Step time", fontsize="medium")
    lengths.set_xlabel("longest utterance of the batch, s")
    lengths.set_ylabel("ms")
    lengths.set_ylim(bottom=0)
    lengths.legend(frameon=False, fontsize="x-small")
    for axes in (epochs, steps, *curves, lengths):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=110)


def _draw_epochs(report, axes, timed):
    hours = any(variant["epoch_seconds"] >= 3600 for variant in timed)
    unit = 3600 if hours else 1
    for position, variant in enumerate(timed):
        seconds = variant["epoch_seconds"]
        low, high = variant["interval"]
        axes.barh(
            position,
            seconds / unit,
            color=COLOURS[variant["implementation"]],
            xerr=[[max(0, seconds - low) / unit], [max(0, high - seconds) / unit]],
            error_kw={"elinewidth": 1, "capsize": 3},
        )
        label = f" {duration(seconds)}"
        ratios = report["ratios"].get(f"{variant['cell']} {variant['precision']}", {})
        if variant["implementation"] in ratios and not report["refused"]:
            label += f", {ratios[variant['implementation']]:.1f}x faster"
        where = (max(seconds, high) / unit, position)
        axes.annotate(label, where, (4, 0), textcoords="offset points", va="center")
    names = [f"{v['cell']} {v['precision']}, {name_of(v)}" for v in timed]
    axes.set_yticks(range(len(timed)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(v["interval"][1] for v in timed) / unit)
    axes.set_xlabel("hours" if hours else "seconds")
    axes.set_title("One epoch", fontsize="medium")


def _draw_phases(axes, timed):
    for phase in PHASES:
        backward = phase.endswith(" backward")
        starts = [
            sum(v["breakdown_ms"].get(earlier, 0) for earlier in PHASES[: PHASES.index(phase)])
            for v in timed
        ]
        axes.barh(
            range(len(timed)),
            [variant["breakdown_ms"].get(phase, 0) for variant in timed],
            left=starts,
            color=PHASE_COLOURS[phase.removesuffix(" backward")],
            alpha=0.6 if backward else 1,
            hatch="///" if backward else None,
            label=None if backward else phase,
        )
    axes.set_xlabel("ms (hatched: backward)")
    axes.set_title("Where a step's time goes", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_losses(axes, group, variants):
    for name, variant in reversed(variants.items()):
        axes.plot(
            range(1, len(variant["losses"]) + 1),
            variant["losses"],
            color=COLOURS[name],
            linewidth=3.5 if name == "stock" else 1.2,
            label=name,
        )
    axes.set_xlabel("step")
    axes.set_title(f"Training loss, {group}", fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
