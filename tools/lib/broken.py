"""Images that cannot be read: all are listed at once, and left out only where the user said how many.

with broken.named(source):                              # around what reads
    ...
source = broken.leave_out(source, args.skip_bad)        # before, where nothing stands in for them
"""

import contextlib
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data import Unreadable, read_view
from tools.lib.cli import natural, shown
from tools.lib.progress import progress

SECONDS = 60  # to look for more of them, once one was met
LISTED = 50


def add_flag(parser):
    parser.add_argument("--skip-bad", type=natural, default=0, help="files that cannot be read and may be left out")


def find(source, seconds=math.inf):
    """({path: why}, files looked at, files): each file once, until the time is over."""
    files, first = np.unique(source.rows.columns["path"], return_index=True)
    end, bad, done = time.monotonic() + seconds, {}, 0

    def look(i):
        try:
            read_view(source, i, None, 8)  # a photograph is decoded at an eighth of its size
        except Unreadable as error:
            return str(source.path(i)), str(error)
        return None

    bar = progress(total=len(files), desc="look for broken files", unit="file")
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(files), 64):
            if time.monotonic() > end:
                break
            some = first[start : start + 64].tolist()
            bad |= dict(filter(None, pool.map(look, some)))
            done += len(some)
            bar.update(len(some))
    return bad, done, len(files)


def check(bad, looked, files, skip_bad):
    """List broken files {path: why}; more than `skip_bad` of them are an error."""
    if not bad:
        return
    refused, whys = len(bad) > skip_bad, [shown(why, 400) for why in list(bad.values())[:LISTED]]
    print(*whys, sep="\n", file=sys.stderr if refused else sys.stdout)
    if refused:
        part = "" if looked == files else f" of the first {looked:,}"
        raise Unreadable(
            f"{len(bad)}{part} of {files:,} files cannot be read (listed above), first {whys[0]}; mend "
            f"or remove them, or go on with --skip-bad {len(bad)} or more"
        )
    print(f"{len(bad)} of at most {skip_bad} broken files left out")


def leave_out(source, skip_bad):
    """The source without what cannot be read; looks at all files only where some may be left out."""
    if not skip_bad:
        return source
    bad, looked, files = find(source)
    check(bad, looked, files, skip_bad)
    names = [os.path.relpath(path, source.root).replace(os.sep, "/").encode() for path in bad]
    return source.take(np.flatnonzero(~np.isin(source.rows.columns["path"], names))) if bad else source


@contextlib.contextmanager
def named(*sources):
    """One broken file ends the program; then it names all of them."""
    try:
        yield
    except Unreadable:
        bad, looked, files = {}, 0, 0
        for source in sources:
            more = find(source, SECONDS)
            bad, looked, files = bad | more[0], looked + more[1], files + more[2]
        if bad:
            check(bad, looked, files, 0)
        raise
