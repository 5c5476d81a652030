"""The README's sentences about reports of the comparison.

    PYTHONPATH=recipes/LibriSpeech python -m sligru_recipes.epoch_time.readme \
        REPORT.json [REPORT.json ...] README.md

renews the sentences between the README's marks, one for each report.
"""

import json
import os
import sys
from pathlib import Path

from .report import replace
from .texts import headline

BEGIN, END = "<!-- epoch times: begin -->", "<!-- epoch times: end -->"


def readme_block(report_paths, folder):
    """What stands between the README's marks.

    Arguments
    ---------
    report_paths : list of str or Path
    folder : Path
        Of the README: the text names the reports from there.
    """
    lines = []
    for path in report_paths:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        name = os.path.relpath(path, folder)
        lines.append(f"- {headline(report)} (`{name}`)")
    return "\n".join([BEGIN, *lines, END])


def renew_readme(report_paths, readme):
    """Replace the text between the marks in `readme`; ValueError if they are not there."""
    readme = Path(readme)
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected one {BEGIN} and one {END}")
    before, _, rest = text.partition(BEGIN)
    block = readme_block(report_paths, readme.parent)
    replace(readme, (before + block + rest.partition(END)[2]).encode())


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        renew_readme(sys.argv[1:-1], sys.argv[-1])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"readme: {error}")
