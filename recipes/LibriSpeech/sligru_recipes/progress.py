"""How far a long task is: a bar on a terminal, lines elsewhere."""

import sys
import time

from tqdm import tqdm

MINUTES = 10  # where no YAML has log_interval_minutes


class Progress:
    """A bar on a terminal; where stderr is a file or a pipe, a line now and then.

    Arguments
    ---------
    title : str
    total : int
    unit : str
        What is counted.
    minutes : float
        Between two lines.
    say : callable
        Takes a line.
    initial : int
        How many are done already.
    bar : bool
        False: no bar on a terminal.
    quiet : bool
        True: neither bar nor lines.
    """

    def __init__(self, title, total, unit, minutes, say, initial=0, bar=True, quiet=False):
        self.title, self.total, self.unit, self.done = title, total, unit, initial
        self.minutes, self.say = minutes, say
        terminal = sys.stderr.isatty()
        self.by_lines = not terminal and not quiet
        self.last_line = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=initial,
            desc=title,
            unit=unit,
            dynamic_ncols=True,
            smoothing=0.02,
            disable=not (bar and terminal) or quiet,
        )

    def set_title(self, title):
        """What is done from here on."""
        self.title = title
        self.bar.set_description(title)

    def update(self, count=1, postfix=""):
        """Count some more; `postfix` tells more about them."""
        self.done += count
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(count)
        if self.by_lines and time.monotonic() - self.last_line >= 60 * self.minutes:
            self.last_line = time.monotonic()
            line = f"{self.title}: {self.unit} {self.done} of {self.total}"
            self.say(f"{line}, {postfix}" if postfix else line)

    def close(self):
        """Leave the bar as it is."""
        self.bar.close()
