"""The report of a comparison in words: headline, conditions, tables, verdict."""

import html
import json
import statistics

from tabulate import tabulate

from .phases import PHASES

TITLE = "Epoch times, SpeechBrain's and ours"


MOST_WAIT = 0.02  # of a step, for its batch


def is_ours(implementation):
    """Whether a part of that variant is ours."""
    return implementation.startswith("ours")


def duration(seconds):
    """For people: 7h19, 2 min 05 s, 10.4 s."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours}h{minutes:02d}"
    if seconds >= 100:
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes} min {seconds:02d} s"
    return f"{seconds:.3g} s"


def headline(report):
    """One sentence: an epoch of SpeechBrain's, and with one part after the other ours.

    Raises
    ------
    ValueError
        If the report has no ratio: refused, or stopped too early.
    """
    if report["refused"] or not report["ratios"]:
        raise ValueError(f"the report has no ratio ({report['refused'] or 'nothing compared'})")
    settings, data = report["settings"], report["data"]
    pairs = []
    for group, ratios in report["ratios"].items():
        variants = variants_of(report, group)
        steps = []
        for name, ratio in ratios.items():
            seconds = variants[name]["epoch_seconds"]
            part = name.removeprefix("ours: ")
            steps.append(f"{duration(seconds)} ({part}, {ratio:.1f}x)")
        pairs.append(f"{group} {duration(ratio * seconds)} -> {' -> '.join(steps)}")
    sampled = data["batches"] < data["batches_in_epoch"]
    extent = f", from {data['batches']} of {data['batches_in_epoch']} batches" if sampled else ""
    return (
        f"SpeechBrain's -> ours for one epoch of {data['source']} "
        f"({data['audio_seconds_in_epoch'] / 3600:.1f} h) on {device_name(report)}: "
        f"{', '.join(pairs)}; {settings['recipe']} recipe, batches of {settings['batch']}, "
        f"{_augmentations(report)}{extent}."
    )


def device_name(report):
    """For people: the GPU, or the CPU and its threads."""
    machine = report["machine"]
    if machine["gpu"]:
        return f"one {machine['gpu']}"
    return f"{machine['cpu']} ({machine['threads']} thread{'s' if machine['threads'] > 1 else ''})"


def _augmentations(report):
    names = report["settings"]["augmentations"]
    return f"augmented by {', '.join(names)}" if names else "no augmentation"


def variants_of(report, group):
    """Implementation -> variant, of a group "CELL PRECISION"."""
    return {
        variant["implementation"]: variant
        for variant in report["variants"]
        if f"{variant['cell']} {variant['precision']}" == group
    }


def as_text(report):
    """The report for a terminal."""
    return "\n\n".join(paragraphs(report, "simple"))


def as_html(report, picture):
    """One page that needs nothing but itself."""
    body = [
        part if part.startswith("<table") else f"<p>{html.escape(part)}</p>"
        for part in paragraphs(report, "html")
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>\n'
        "<style>body{font-family:sans-serif;margin:2em;max-width:90em}img{max-width:100%}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc}"
        f"</style></head>\n<body><h1>{TITLE}</h1>\n" + "\n".join(body) + f"\n{picture}\n"
        f"<details><summary>report.json</summary><pre>{html.escape(json.dumps(report, indent=1))}"
        "</pre></details></body></html>\n"
    )


def paragraphs(report, style):
    """Paragraphs and tables (of `tabulate`'s style)."""
    parts = [conditions(report)]
    if report["ratios"] and not report["refused"]:
        parts.insert(0, headline(report))
    if report["variants"]:
        parts += [_times_table(report, style), *_new_shapes_text(report)]
        parts += [_phases_text(report), _phases_table(report, style), *_late_loaders(report)]
    if report["interrupted"]:
        parts.append("Stopped before all RNNs and precisions were done; --resume goes on.")
    return [*parts, verdict(report)]


def _late_loaders(report):
    """Paragraphs about the variants whose batches came late, or would in a whole epoch."""
    if not report["loader"]["processes"]:
        return
    for key, most, text in (
        (
            "loader_utilisation",
            1,
            "More loader processes are needed for {}: batches were loaded in advance, but these "
            "processes cannot keep it up, so a whole epoch would take longer.",
        ),
        (
            "loader_wait",
            MOST_WAIT,
            f"More than {100 * MOST_WAIT:.0f} % of the time went into waiting for batches in {{}}.",
        ),
    ):
        late = [v for v in report["variants"] if v[key] > most]
        if late:
            yield text.format(", ".join(map(_full_name, late)))


def conditions(report):
    """One paragraph: what was measured on what."""
    settings, data, loader = report["settings"], report["data"], report["loader"]
    versions = ", ".join(
        f"{name} {version}" for name, version in report["versions"].items() if version
    )
    extent = f"all {data['batches']} batches of an epoch"
    if data["batches"] < data["batches_in_epoch"]:
        extent = (
            f"{data['batches']} of an epoch's {data['batches_in_epoch']} batches, short to long"
        )
    passes = f"{data['passes']} pass{'es' if data['passes'] > 1 else ''}"
    loading = ""
    if loader:
        loading = (
            f", by {loader['processes'] or 'the training'} process(es); one loads a batch in "
            f"{1000 * loader['seconds_per_batch']:.0f} ms"
        )
    driver = f" (driver {report['machine']['driver']})" if report["machine"]["driver"] else ""
    turns = (
        "each variant alone in a process"
        if settings["options"]["isolate"]
        else ("variants in turn")
    )
    return (
        f"{device_name(report)}{driver}; {settings['recipe']} recipe, "
        f"batches of {settings['batch']}, {_augmentations(report)}, "
        f"seed {settings['seed']}. Data: {data['source']}, {extent} "
        f"({data['audio_seconds'] / 60:.1f} min of audio, {data['padded_seconds'] / 60:.1f} min "
        f"with padding), {passes}, {turns}; {data['io']}{loading}. fp32 is without TF32. "
        f"{versions}; commit {report['commit'] or 'unknown'}; {report['date']}."
    )


def timed_variants(report):
    """The variants to show times of: stock's second seed is there for its losses."""
    return [v for v in report["variants"] if v["implementation"] != "stock, other seed"]


def _full_name(variant):
    """RNN, precision and implementation."""
    return f"{variant['cell']} {variant['precision']} {variant['implementation']}"


def name_of(variant):
    """Implementation and, of ours, backends."""
    backends = ", ".join(dict.fromkeys(variant["backends"].values()))
    return f"{variant['implementation']} ({backends})" if backends else variant["implementation"]


def _fastest_stock(report, group):
    """Seconds of an epoch of a group's fastest stock variant; None where nothing is compared."""
    ratios = report["ratios"].get(group)
    if not ratios or report["refused"]:
        return None
    name, ratio = next(iter(ratios.items()))
    return ratio * variants_of(report, group)[name]["epoch_seconds"]


def _times_table(report, style):
    data = report["data"]
    sampled = data["batches"] < data["batches_in_epoch"]
    rows = []
    for variant in timed_variants(report):
        seconds, steps = variant["epoch_seconds"], len(variant["step_seconds"])
        peak, joules, losses = (variant[key] for key in ("peak_memory_bytes", "joules", "losses"))
        reference = _fastest_stock(report, f"{variant['cell']} {variant['precision']}")
        rows.append(
            [
                variant["cell"],
                variant["precision"],
                name_of(variant),
                duration(seconds),
                " to ".join(map(duration, variant["interval"])),
                f"{reference / seconds:.2f}x" if reference else "-",
                f"{1000 * statistics.median(variant['step_seconds']):.0f}",
                f"{data['batches_in_epoch'] / seconds:.2f}",
                f"{data['audio_seconds_in_epoch'] / seconds:.0f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
                "-" if joules is None else f"{joules / steps:.0f}",
                f"{100 * variant['loader_wait']:.1f}",
                f"{100 * variant['loader_utilisation']:.0f}",
                f"{statistics.fmean(variant['warm_up_seconds']):.2f}",
                f"{statistics.fmean(losses[-max(1, len(losses) // 8) :]):.3f}",
            ]
        )
    headers = [
        *("RNN", "precision", "implementation", "epoch"),
        "95 % interval" if sampled else "fastest to slowest",
        *("speed-up", "ms/step (median)", "steps/s", "audio h/h", "peak MiB", "J/step"),
        *("loader wait, %", "loader busy, %", "warm-up s/step", "last losses"),
    ]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def _new_shapes_text(report):
    """A paragraph about the first batch of each shape, where its cost was measured."""
    found = {
        _full_name(v): v["new_shape_seconds"]
        for v in timed_variants(report)
        if v["new_shape_seconds"] is not None
    }
    if found:
        longer = ", ".join(f"{1000 * value:.0f} ms ({name})" for name, value in found.items())
        yield (
            "A batch whose number of utterances or frames is new takes longer, as PyTorch's "
            f"libraries choose their kernels: {longer}. The estimates have that "
            f"{report['data']['shapes_in_epoch']} times, once for each such shape of the epoch."
        )


def _phases_text(report):
    overheads = [100 * variant["breakdown_overhead"] for variant in timed_variants(report)]
    return (
        "Where a step's time goes: ms (share), in steps taken after the timed ones with marks "
        f"between the phases, which made them {min(overheads):+.1f} to {max(overheads):+.1f} % "
        "slower than the same steps without."
    )


def _phases_table(report, style):
    timed = timed_variants(report)
    totals = [sum(variant["breakdown_ms"].values()) for variant in timed]
    rows = []
    for phase in PHASES:
        values = [variant["breakdown_ms"].get(phase) for variant in timed]
        if any(value is not None for value in values):
            rows.append(
                [phase]
                + [
                    "-" if value is None else f"{value:.1f} ({100 * value / total:.1f} %)"
                    for value, total in zip(values, totals, strict=True)
                ]
            )
    rows.append(["step", *(f"{total:.1f}" for total in totals)])
    headers = ["phase", *map(_full_name, timed)]
    return tabulate(rows, headers, tablefmt=style, disable_numparse=True)


def verdict(report):
    """What was checked, or why there is no ratio."""
    if report["refused"]:
        return f"No ratio: {report['refused']}."
    checks = report["checks"]
    texts = ["Same batches for all." if checks["same_batches"] else "Nothing was timed."]
    for cell, entry in checks["agreement"].items():
        texts.append(
            f"{cell}: without dropout the first {len(entry['losses']['ours'])} fp32 losses, of "
            "stock and with every part ours, agree within "
            f"{entry['largest_relative_difference']:.1g} relative (bound {entry['bound']:g}; stock "
            f"itself, from weights moved by 1e-7, and stock: "
            f"{entry['stock_moved_difference']:.1g})."
        )
    for group, entry in checks["seed_spread"].items():
        found = ", ".join(
            f"{value:.3g} ({name})" for name, value in entry["ours_and_stock"].items()
        )
        texts.append(
            f"{group}: in the timed steps the losses differ from stock's by {found} on average "
            f"(two stock seeds: {entry['stock_and_other_seed']:.3g})."
        )
    return " ".join(texts)
