"""What every program shares at its border: a parser and an exit that speak in one line.

    parser = Parser(__doc__)
    if __name__ == "__main__":
        run(main)

Imports the standard library only (torch where a device is picked), so `--help` stays fast.
"""

import argparse
import contextlib
import ctypes
import difflib
import dis
import errno
import inspect
import json
import math
import operator
import os
import re
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        silent = action.required or action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Flags(argparse.Namespace):
    """Parsed flags. given {name: default} of those that were typed; it is none of vars(), so no file keeps it."""

    __slots__ = ("given",)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviated flags, and errors of one line (exit code 2).

    description: the module's docstring, of which --help shows the first paragraph.
    """

    def __init__(self, description):
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False, formatter_class=Help)

    def parse_known_args(self, args=None, namespace=None):
        self.given = list(sys.argv[1:] if args is None else args)
        words, flags = {word.split("=")[0] for word in self.given}, namespace or Flags()
        flags.given = {a.dest: a.default for a in self._actions if words.intersection(a.option_strings)}
        return super().parse_known_args(args, flags)

    def error(self, message):
        """A flag that does not exist comes first: `--dat x` also lacks --data."""
        known = self._option_string_actions
        for flag in (word.split("=")[0] for word in self.given if re.match("--?[A-Za-z][^ ]*$", word)):
            if flag not in known:
                near = difflib.get_close_matches(flag.replace("_", "-"), known, 1)
                message = f"there is no {shown(flag)}; " + (f"did you mean {near[0]}?" if near else "--help lists all")
                break
        self.exit(2, f"{self.prog}: error: {message}\n")


TESTS = {
    "[": ("at least", operator.ge),
    "(": ("above", operator.gt),
    "]": ("at most", operator.le),
    ")": ("below", operator.lt),
}


def within(interval, kind=float):
    """argparse type: a finite number in an interval such as "[0, 1)", which 0 is in and 1 is not."""
    ends = [(*TESTS[mark], float(end)) for mark, end in zip(interval[0] + interval[-1], interval[1:-1].split(","))]

    def parse(text):
        value = kind(text)
        if broken := [f"{words} {end:g}" for words, test, end in ends if not test(value, end)]:
            raise argparse.ArgumentTypeError(f"must be {' and '.join(broken)}, got {shown(text)}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid float value"
    return parse


positive = within("[1, 1e18]", int)
natural = within("[0, 1e18]", int)
share = within("[0, 1]")  # also a probability
not_negative = within("[0, inf)")
above_zero = within("(0, inf)")
finite = within("(-inf, inf)")


def read_value(text):
    """A number, list or truth value as JSON writes it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_options(text):
    """focal:gamma=2,weights=[1,2] -> ("focal", {"gamma": 2, "weights": [1, 2]})."""
    name, _, rest = text.partition(":")
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", rest) if part.strip()]
    return name.strip(), {key.strip(): read_value(value.strip()) for key, _, value in pairs}


def same_kind(value, default):
    """Whether an option may replace its default: finite numbers for numbers, as many of them for several."""
    if isinstance(default, (tuple, list)):
        return isinstance(value, list) and len(value) == len(default) and all(map(same_kind, value, default))
    if isinstance(default, (bool, str)):
        return type(value) is type(default)
    if isinstance(default, (int, float)):
        return type(value) in (int, float) and math.isfinite(value)
    return True


def technique(text, table):
    """A value such as muon:lr=0.02 -> ("muon", {"lr": 0.02}), by a table {name: function or class}.

    An option is a parameter that has a default in the row's signature (not behind its *), and of the default's kind.
    """
    name, options = read_options(text)
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]}? known" if near else "known"
        raise ValueError(f"there is no {shown(name) or 'empty name'}; {hint} are {', '.join(table)}")
    parameters = inspect.signature(table[name]).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            choice = ", ".join(f"{k}={v}" for k, v in known.items()) or "none"
            raise ValueError(f"{name} has no option {shown(key)}; its options are {choice}")
        if not same_kind(value, known[key]):
            raise ValueError(f"{name}:{key} is {shown(value)}, expected a value like {shown(known[key])}")
    return name, options


def millimetres(text):
    """argparse type: sides such as 32,48,64 -> (32.0, 48.0, 64.0)"""
    try:
        return tuple(above_zero(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r}: sides of the crops in mm, above 0, like 32,48,64") from None


def pick_device(name):
    """torch.device of a --device flag: auto is CUDA/ROCm if there, else CPU; what this machine lacks is an error.

    A program that will compute on the CPU keeps its freed memory from here on.
    """
    import torch  # slow to import

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no such card; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (cards := torch.cuda.device_count()):
        raise ValueError(f"--device {name}: there are {cards} cards, counted from 0")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc reuse large blocks instead of giving them back: faults on fresh pages slow a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps them


# bytes that a terminal obeys, and marks that turn the direction of text
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text, limit=80):
    """A text from a file, safe for a terminal and of at most `limit` characters: control characters as escapes."""
    text = str(text)
    cut = text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text)} characters)"
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], cut)


def is_ours(error):
    """Whether a `raise` in one of our files made it: then it carries a remedy.

    C code of torch or numpy has no frame of its own: what it raises seems to come from our line that called it.
    """
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    path = Path(code.co_filename)
    inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts  # a .venv may lie inside the repository
    return inside and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


REMEDIES = {  # in the words of the leaves, which know no program, and the program that does it
    "preprocess": "tools/preprocess_dicom.py",
    "make the split": "tools/make_splits.py",
    "look for duplicates": "tools/check_duplicates.py",
}


def named(text):
    """An error's text with the programs of its remedy."""
    programs = [name for words, name in REMEDIES.items() if words in text and name not in text]
    return f"{text} ({', '.join(programs)})" if programs else text


WHAT_TO_DO = {
    errno.ENOSPC: "make room on that disk, then type the same command again",
    errno.EDQUOT: "make room, then type the same command again",
    errno.EFBIG: "a limit of this shell (ulimit -f) is in the way",
    errno.EEXIST: "choose another name, or delete it",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another name",
    errno.EACCES: "change its rights, or choose another place",
    errno.ENOENT: "check the name",
}


def in_words(error):
    """The text of an error; of one that the system made: its path, what is wrong and what to do."""
    if isinstance(error, OSError) and error.strerror:
        about = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{about}; {WHAT_TO_DO[error.errno]}" if error.errno in WHAT_TO_DO else about
    return named(" ".join(str(error).split()))


def unforeseen(kind, error, trace):
    """sys.excepthook of looks: a crash ends with exit code 3, where Python's own 1 would read as a warning."""
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(3)


def run(main):
    """Exit with main()'s code. A mistake of the user's is one line and code 2; a mistake of ours keeps its traceback.

    Ours and theirs are told apart by who raised: a ValueError that our code raises carries a remedy, one from inside
    torch or numpy is a bug. An OSError names its path.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not is_ours(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {shown(in_words(error), 2000)}", file=sys.stderr)
        code = 2
    sys.exit(code)
