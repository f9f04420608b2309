"""Import before torch: threads of OpenMP that wait for each other soon give their core away.

    import tools.lib.threads  # isort: split

By default they spin, which is fast alone and stops training beside a busy neighbour (numbers in
tools/recipes/LOG.md). libgomp reads the variable when torch loads it, so this cannot be done later.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # else the user has decided, as with GOMP_SPINCOUNT itself
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
