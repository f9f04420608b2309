"""Work through a list in several processes: none outlives its parent, and one that is killed is an error, no hang.

for result in parallel(function, jobs, workers=8):
"""

import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def follow_parent(start=None):
    """A worker leaves Ctrl+C to the parent, and ends when the parent was killed instead of waiting for ever.

    data.py, which is copied alone, holds the same watch; imported from there it would bring torch into make_phantom.py.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start:
        start()


def parallel(function, jobs, workers, start=None, chunk=1):
    """Yield function(job) in the order of the jobs, from `workers` processes (1: from this one).

    start: called first in each process, which then is always another one; chunk: jobs that travel together.
    """
    if workers == 1 and start is None:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=follow_parent, initargs=(start,)) as pool:
        try:
            yield from pool.map(function, jobs, chunksize=chunk)
        except BrokenProcessPool:
            raise OSError("a worker was killed, out of memory? run again with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)
