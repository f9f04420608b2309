"""Files that programs write and read: JSON, CSV, JSON lines, dates, walking a folder.

    value = read_json_file(path, {"steps": int, "note": (str, type(None))}, "run X again", version=1)
    rows, skipped = read_lines(run / "metrics.jsonl", {"step": int})
    losses = last_per_step(rows, "loss")

What lies on disk may be damaged, or made by others: each reader here ends in a value of the promised types, or in one
sentence that names the file, the field, what was found and what to do.
"""

import csv
import io
import json
import math
import os
import re
from datetime import datetime, timezone
from pathlib import Path

from checkpoint import atomic_write
from data import regular
from tools.lib.cli import shown

VERSION = 1
RISKY = frozenset("=+-@\t\r\n＝＋－＠")  # with which spreadsheets begin a formula
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but the line feed, which csv quotes
LARGEST_INT = 2**63  # longer numbers are damage: they make neither a float nor a column


def plain(value):
    """A value as JSON holds it: numpy's numbers are numbers, NaN and infinity, which JSON does not know, None."""
    text = json.dumps(value, default=lambda number: number.item())
    return json.loads(text, parse_constant=lambda name: None)


def json_text(value, indent=1):
    return json.dumps(plain(value), indent=indent)


def write_json(path, value, indent=1):
    """The one way to write a JSON file; indent=None: of one line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path, lambda f: f.write(json_text(value, indent).encode() + b"\n"))


def is_a(value, kinds):
    """Whether a JSON value is of one of these types: true is no int, an int is a float too, ints have 64 bits."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return -LARGEST_INT <= value < LARGEST_INT and (int in kinds or float in kinds)
    return isinstance(value, kinds)


def in_short(value):
    """A JSON value for an error of one line."""
    names = {list: "a list", dict: "an object"}
    return names.get(type(value)) or shown(json.dumps(value), 60)


def wrong_field(value, fields):
    """What is wrong with a dict, as words, or None. fields: {name: type or types}; type(None) allows null."""
    for name, kinds in fields.items():
        if name not in value:
            return f"has no field {name!r}"
        if not is_a(value[name], kinds):
            names = {type(None): "null", str: "text", dict: "object"}
            kinds = kinds if isinstance(kinds, tuple) else (kinds,)
            wanted = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
            return f"field {name!r} is {in_short(value[name])}, expected {wanted}"
    return None


def parse(text):
    """json.loads that says of any text why it is not JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_file(path, fields, remedy, version=None):
    """A JSON file that we wrote -> dict, whose fields {name: type or tuple of types} are there and of these types.

    Anything else is a ValueError (no file: FileNotFoundError) that names file, field, what was found and the remedy.
    Other fields pass as they are; version: of the file, where it has one. A byte order mark is accepted.
    """
    name = shown(path, 400)
    try:
        value = parse(Path(regular(path)).read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist; {remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (byte {error.start}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{name} is damaged, or no JSON ({shown(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds {in_short(value)}, expected an object; {remedy}")
    if version is not None and not (is_a(value.get("version"), int) and value["version"] == version):
        raise ValueError(f"{name}: version is {in_short(value.get('version'))}, this code reads {version}; {remedy}")
    if wrong := wrong_field(value, fields):
        raise ValueError(f"{name} {wrong}; {remedy}")
    return value


def read_lines(path, fields=()):
    """Rows of a .jsonl file -> (dicts, number of lines that were skipped); without a file ([], 0).

    A line is skipped that is no JSON object (a full disk cut it) or whose fields are not of the types that are named,
    as in read_json_file. Whoever reads prints the number once.
    """
    rows, skipped = [], 0
    data = Path(regular(path)).read_bytes() if Path(path).exists() else b""
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):  # not splitlines: a text may hold a \x85
        if not line.strip():
            continue
        try:
            row = parse(line.decode())
            if isinstance(row, dict) and not wrong_field(row, dict(fields)):
                rows.append(row)
                continue
        except ValueError:
            pass
        skipped += 1
    return rows, skipped


def last_per_step(rows, key):
    """Rows of metrics.jsonl with this key; what a resume did again replaces the row of its step and all beyond it."""
    kept = []
    for row in rows:
        if key in row:
            while kept and kept[-1]["step"] >= row["step"]:
                kept.pop()
            kept.append(row)
    return kept


def csv_cell(cell):
    """A cell that no spreadsheet runs as a formula and no terminal obeys; all but texts stay as they are.

    A text that begins with = + - @ or a control character and is no plain number gets a leading apostrophe, control
    characters become their Python escapes (\\x1b). The same text always becomes the same cell, so ids still join from
    table to table; to join a cell with a text from elsewhere, write the text through csv_cell first.
    """
    if not isinstance(cell, str):
        return cell
    risky = cell[:1] in RISKY and not NUMBER.fullmatch(cell)
    if not cell.isprintable():
        cell = CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), cell)
    return f"'{cell}" if risky else cell


def csv_text(rows, exact=0):
    """Rows of cells as CSV, each through csv_cell but the first `exact` ones: paths by which programs find files."""
    text = io.StringIO()
    plain, quoted = (csv.writer(text, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    for row in rows:
        cells = [*row[:exact], *map(csv_cell, row[exact:])]
        # before Python 3.13 the writer leaves a lone \r unquoted, and readers take it for a new line
        (quoted if any("\r" in str(cell) for cell in cells[:exact]) else plain).writerow(cells)
    return text.getvalue()


def to_number(text):
    """A cell as a number; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


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
