"""What every program shares at its border: a parser and an exit that speak in one line.

    parser = Parser(description=__doc__)
    if __name__ == "__main__":
        run(main)

Imports the standard library only (torch where a device is picked), so `--help` stays fast.
"""

import argparse
import contextlib
import ctypes
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviated flags, and errors of one line (exit code 2)."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text):
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no such card; use --device cpu")
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Let glibc reuse large blocks instead of giving them back: faults on fresh pages slow a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps them


def run(main):
    """Exit with main()'s code. A mistake of the user's is one line and code 2; a mistake of ours keeps its traceback.

    Ours and theirs are told apart by who raised: a ValueError from one of our own lines carries a remedy,
    one from inside torch or numpy is a bug.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, ValueError) and not raised_in.is_relative_to(ROOT):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
