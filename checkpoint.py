"""Atomic, verified, safe-to-load files. Copyable: imports torch and the standard library only."""

import os
import secrets
from pathlib import Path

FORMAT, VERSION = "dinox", 1


def fsync_folder(folder):
    """Make a rename in `folder` survive a power cut (a no-op where folders cannot be opened, as on Windows)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path, writer):
    """Call `writer(file)` on a binary temporary file beside `path`, then rename it over `path`.

    After a crash at any moment `path` is either the whole old file or the whole new one.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(tmp, "x+b") as f:
            writer(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)  # still there only when something above failed
    fsync_folder(path.parent)
    return path
