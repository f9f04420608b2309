"""Files that programs write and read: JSON, CSV, JSON lines, dates, walking a folder."""

import csv
import io
import json
import os
from datetime import datetime, timezone
from pathlib import Path

from checkpoint import atomic_write

VERSION = 1


def write_json(path, value, indent=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda f: f.write(json.dumps(value, indent=indent, sort_keys=True).encode() + b"\n"))


def read_json(path):
    """A manifest or record; None where there is none that we can read."""
    try:
        value = json.loads(Path(path).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("version") == VERSION else None


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def walk_files(root):
    """Everything below `root` that is no folder, in sorted order: [(path, bytes)]. Linked folders are entered once.

    A folder that cannot be listed and a broken link are in it too, with 0 bytes: whoever opens them learns why.
    """
    found, seen, folders = [], set(), [os.fspath(root)]
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:
            continue
        seen.add(os.path.realpath(folder))
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            found.append((folder, 0))
            continue
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            else:
                found.append((entry.path, entry.stat().st_size if entry.is_file() else 0))
    return sorted(found)


def created_utc():
    """Now, or SOURCE_DATE_EPOCH (reproducible-builds.org) if it is set; comparisons leave it out."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(int(seconds), timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
