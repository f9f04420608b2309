"""Progress for people: a bar where somebody watches, in a file one line a minute.

for item in progress(items, "read", unit="file"):
with progress(total=n, desc="read", unit="file") as bar: bar.update()
"""

import sys

from tqdm import tqdm

EVERY_S = 60
LINE = "{desc} {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} to go"


class Lines:
    """The stream of a bar that stands in a file: each state is a line of its own."""

    def write(self, text):
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(*args, **more):
    """tqdm(*args, **more), or its lines."""
    if sys.stderr.isatty():
        return tqdm(*args, **more)
    often = dict(mininterval=EVERY_S, maxinterval=EVERY_S, delay=EVERY_S)  # what takes less says nothing
    return tqdm(*args, **{**more, **often, "file": Lines(), "bar_format": LINE, "leave": False})
