"""What every program shares at its border: a parser and an exit that speak in one line.

    parser = Parser(description=__doc__)
    if __name__ == "__main__":
        run(main)

Imports the standard library only (torch where a device is picked), so `--help` stays fast.
"""

import argparse
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
    """torch.device of a --device flag: auto is CUDA/ROCm if there, else CPU; what this machine lacks is an error."""
    import torch  # slow to import

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no such card; use --device cpu")
    return device


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
