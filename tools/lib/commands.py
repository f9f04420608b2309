"""Commands of ours as other programs type them: found, with other flags, compared."""

import re
import shlex
import shutil
import sys
from pathlib import Path

from tools.lib.cli import ROOT, shown

NAME = re.compile(r"([A-Za-z0-9][\w.+-]*):\s+(\S.*)")


def named(where, text):
    """'focal: --loss focal:gamma=2' -> ("focal", ["--loss", "focal:gamma=2"]); where: it stands, for the error."""
    match = NAME.fullmatch(text)
    try:
        flags = shlex.split(match[2]) if match else []
    except ValueError:  # a quote that is not closed
        flags = []
    if not flags or not flags[0].startswith("--"):
        raise ValueError(f"{where}: {shown(text)!r}: write a name and flags like 'focal: --loss focal:gamma=2'")
    return match[1], flags


def program(words):
    """The command with our Python before a .py file, which may be one of ours named from elsewhere."""
    first = Path(words[0])
    if first.suffix == ".py":
        place = first if first.exists() else ROOT / first
        if not place.exists():
            raise FileNotFoundError(f"there is no program {shown(first)}, neither here nor in {ROOT}")
        return [sys.executable, str(place), *words[1:]]
    if not shutil.which(words[0]):
        raise ValueError(f"{shown(words[0])} is no program; write -- train_probe.py and its flags")
    return words


def replaced(words, flags):
    """The command with flags of an arm in the place of its own."""
    names, kept, dropping = {word for word in flags if word.startswith("--")}, [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in names
        kept += [] if dropping else [word]
    return [*kept, *flags]


def changed(before, now):
    """Which flag of two commands differs, as words."""

    def flags(words):
        found = {"": []}
        for word in words:
            if word.startswith("--"):
                name, _, value = word.partition("=")
                found[name] = [value] if value else []
            else:
                found[[*found][-1]].append(word)
        return {name: " ".join(values) for name, values in found.items()}

    a, b = flags(before), flags(now)
    for name in [*a, *b]:
        if a.get(name) != b.get(name):
            was, is_now = (shown(f"{name} {x[name]}".strip(), 200) if name in x else f"no {name}" for x in (a, b))
            return f"it was made with {was}, now {is_now}"
    return "the order of its flags is another"
