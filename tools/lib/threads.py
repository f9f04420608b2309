"""Import before torch: what it reads from the environment once, when it is loaded.

    import tools.lib.threads  # isort: split

Threads of OpenMP that wait for each other soon give their core away. By default they spin, which is fast alone and
stops training beside a busy neighbour (numbers in tools/recipes/LOG.md). libgomp reads the variable when torch loads
it, so this cannot be done later.
"""

import os

# what is compiled outlives the run and /tmp: a resumed run, or another of the same sizes, starts in seconds
cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
if not cache.startswith("~"):  # a user without a home, as in some containers: then where torch puts it
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(cache, "torchinductor"))
if "OMP_WAIT_POLICY" not in os.environ:  # else the user has decided, as with GOMP_SPINCOUNT itself
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
