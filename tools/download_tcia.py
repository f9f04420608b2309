"""Download the CT series of one TCIA collection into OUT/<collection>/<SeriesInstanceUID>/.

Speaks the public NBIA REST service (getSeries, getSeriesSize, getImageWithMD5Hash, getImage). The same command again
skips what is finished and resumes what is partial; OUT/<collection>/_download.json says which series failed and why.
Exit code 0: all there, 1: some failed, 2: nothing there, or bad input.

    python tools/download_tcia.py --collection LIDC-IDRI --out data/raw --workers 4
"""

import csv
import errno
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import struct
import sys
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import fsync_folder
from tools.lib.cli import Parser, above_zero, natural, not_negative, positive, run, shown
from tools.lib.files import write_json
from tools.lib.progress import progress

VERSION = 1
BASE_URL = "https://services.cancerimagingarchive.net/nbia-api/services/v4"  # public, no token
IMAGE_BYTES = 530_000  # a 512x512 16-bit slice and its header, where the service tells no size
MD5_FILE = "md5hashes.csv"  # columns Filename, MD5Hash; in the zip of getImageWithMD5Hash
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # another try cannot help
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OSError)  # zipfile's


class Series(NamedTuple):
    uid: str
    images: int
    size: int  # bytes of the unpacked files, 0 if unknown


class Service(NamedTuple):
    base_url: str
    retries: int
    backoff_s: float
    timeout_s: float
    stop: threading.Event  # set on Ctrl+C: threads leave at their next piece
    no_md5: threading.Event  # set when getImage answers where getImageWithMD5Hash does not exist


class Failed(Exception):
    """This series cannot be had; the text says why."""


def get(service, verb, headers=None, **params):
    request = Request(f"{service.base_url}/{verb}?{urlencode(params)}", headers=headers or {})
    return urlopen(request, timeout=service.timeout_s)


def retry_after_s(headers):
    """Seconds that a 429 or 503 asks us to wait (a number or a date), 0 if it does not say."""
    text = (headers.get("Retry-After") or "").strip()
    try:
        wait = float(text) if text[:1].isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait, 0.0), 600.0)


def wait(service, seconds, what, sign):
    """Sleep before the next try, and say so: on a terminal as a count-down where nothing else is drawn, else once."""
    if sign or not sys.stderr.isatty():
        tqdm.write(f"{what} in {seconds:.0f} s", file=sys.stderr)
        return service.stop.wait(seconds)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not service.stop.is_set():
        print(f"\r{what} in {math.ceil(left)} s ", end="", file=sys.stderr, flush=True)
        service.stop.wait(min(left, 1))
    print(file=sys.stderr)
    return service.stop.is_set()


def retried(service, attempt, sign=""):
    """attempt(), again after network errors with exponential back-off, or after as long as the server asks for.

    sign: the series this is about; several are tried at once, below a progress bar.
    """
    for n in range(service.retries + 1):
        asked = 0.0
        try:
            return attempt()
        except HTTPError as error:
            reason, asked = f"HTTP {error.code} {shown(error.reason)}", retry_after_s(error.headers)
            if error.code not in TRANSIENT:
                raise Failed(reason) from None
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut off, damaged
            if getattr(error, "errno", None) in OUR_DISK:
                service.stop.set()
                raise
            reason = shown(getattr(error, "reason", "") or error, 200) or type(error).__name__
            if isinstance(error, URLError):
                reason = f"no connection to {service.base_url} ({reason}), is there a network?"
        # random, so that threads do not retry at the same moment
        backoff = min(60.0, service.backoff_s * 2**n * random.uniform(0.5, 1))
        what = f"{sign}{reason}; Ctrl+C stops; try {n + 2} of {service.retries + 1}"
        if n < service.retries and wait(service, asked or backoff, what, sign):
            raise Failed("stopped")
    raise Failed(f"{reason} ({service.retries + 1} tries)")


def ask(service, verb, **params):
    """The list of objects that the service answers; nothing found is an empty body."""

    def attempt():
        with get(service, verb, **params) as response:
            body = response.read()
        try:
            return [dict(row) for row in json.loads(body or "[]")]
        except (ValueError, TypeError):
            raise http.client.HTTPException(f"{verb} answered no list of objects but {body[:60]!r}") from None

    return retried(service, attempt)


def list_series(service, collection):
    """All CT series of a collection, by uid."""
    found = {}
    for row in ask(service, "getSeries", Collection=collection, Modality="CT", format="json"):
        uid = str(row.get("SeriesInstanceUID"))
        if not re.fullmatch(r"[0-9][0-9.]{0,63}", uid):  # it becomes a folder name
            raise ValueError(f"{service.base_url} lists a series without a proper SeriesInstanceUID: {shown(uid)!r}")
        found[uid] = Series(uid, int(float(row.get("ImageCount") or 0)), int(float(row.get("FileSize") or 0)))
    return [found[uid] for uid in sorted(found)]


def with_size(service, series):
    """The series with its size: as listed, else as getSeriesSize says (one try), else estimated."""
    if series.size or service.stop.is_set():
        return series
    try:
        rows = ask(service._replace(retries=0), "getSeriesSize", SeriesInstanceUID=series.uid)
        return series._replace(size=int(float(rows[0]["TotalSizeInBytes"])))
    except (Failed, LookupError, TypeError, ValueError):
        return series._replace(size=series.images * IMAGE_BYTES)


def open_zip(service, uid, headers):
    """The zip with MD5s, or the plain one where the service has no such verb."""
    if not service.no_md5.is_set():
        try:
            return get(service, "getImageWithMD5Hash", headers, SeriesInstanceUID=uid)
        except HTTPError as error:
            if error.code not in (404, 405, 501):
                raise
    response = get(service, "getImage", headers, SeriesInstanceUID=uid)
    service.no_md5.set()
    return response


def transfer(service, uid, part, bar):
    """Add to the partial zip what it lacks; a server without ranges sends everything again."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = open_zip(service, uid, {"Range": f"bytes={have}-"} if have else {})
    except HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # longer than the zip: not a part of it
        raise http.client.HTTPException("the partial file does not fit") from None
    with response:
        if not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            have = 0
        with open(part, "ab" if have else "wb") as f:
            while piece := response.read1(1 << 16):
                if service.stop.is_set():
                    raise Failed("stopped")
                f.write(piece)
                bar.update(len(piece))
    whole = have + int(response.headers.get("Content-Length") or part.stat().st_size - have)
    if part.stat().st_size != whole:  # read1 ends quietly when the connection drops
        raise http.client.HTTPException(f"cut off at {part.stat().st_size} of {whole} bytes")


def inside(folder, name):
    """The path of a zip entry below folder; a name that leads out of it fails the series."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in name or "\0" in name:
        raise zipfile.BadZipFile(f"unsafe file name {name[:80]!r}")
    return folder.joinpath(*parts)


def unpack(part, folder, series):
    """Unpack and check CRC, MD5 (where offered) and number of images; True if MD5s were checked."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with zipfile.ZipFile(part) as archive:
        entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        table = archive.read(entries.pop(MD5_FILE)).decode() if MD5_FILE in entries else ""
        rows = list(csv.DictReader(table.splitlines()))
        md5s = {row.get("Filename"): row["MD5Hash"].strip().lower() for row in rows if row.get("MD5Hash")}
        images = [name for name in entries if not PurePosixPath(name).name.upper().startswith("LICENSE")]
        if len(images) < series.images or not set(md5s) <= set(entries):
            # the service ends its zip properly even if it failed in the middle
            raise zipfile.BadZipFile(f"{len(images)} of {max(series.images, len(md5s))} images")
        for name, info in entries.items():
            target, digest = inside(folder, name), hashlib.md5(usedforsecurity=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, open(target, "xb") as f:  # reading to the end checks the CRC
                while piece := source.read(1 << 20):
                    digest.update(piece)
                    f.write(piece)
                f.flush()
                os.fsync(f.fileno())
            if md5s.get(name, digest.hexdigest()) != digest.hexdigest():
                raise zipfile.BadZipFile(f"the MD5 of {name} is not {md5s[name]}")
    return bool(md5s)


def fetch(service, series, folder, bar):
    """Bring one series to folder/<uid>, which appears whole or not at all. (bytes of the zip, MD5s checked)."""
    part, files = folder / ".partial" / f"{series.uid}.zip", folder / ".partial" / series.uid

    def attempt():
        if service.stop.is_set():
            raise Failed("stopped")
        if not (part.exists() and zipfile.is_zipfile(part)):  # whole already if only unpacking was interrupted
            transfer(service, series.uid, part, bar)
        try:
            return part.stat().st_size, unpack(part, files, series)
        except DAMAGED as error:
            if getattr(error, "errno", None) in OUR_DISK:
                raise
            part.unlink()  # or every further try would stop at the same place
            raise http.client.HTTPException(f"damaged zip: {error}") from None

    answer = retried(service, attempt, f"{series.uid}: ")
    os.replace(files, folder / series.uid)
    fsync_folder(folder)
    part.unlink()
    return answer


@contextmanager
def threads(service, workers):
    """A pool whose threads leave early if the block ends in an error or in Ctrl+C."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool
        except BaseException:
            service.stop.set()
            raise


def fetch_all(service, todo, folder, workers, failed):
    """Fetch several series at once; fills `failed` {uid: reason}, returns in how many MD5s were checked."""
    zipped = unpacked = checked = 0
    left = sum(series.size for series in todo)
    bar = progress(total=left, unit="B", unit_scale=True, smoothing=0.05)
    with bar, threads(service, workers) as pool:
        jobs = {pool.submit(fetch, service, series, folder, bar): series for series in todo}
        for job in as_completed(jobs):
            series = jobs[job]
            left -= series.size
            try:
                n, with_md5 = job.result()
                zipped, unpacked, checked = zipped + n, unpacked + series.size, checked + with_md5
            except Failed as error:
                failed[series.uid] = str(error)
                bar.write(f"failed {series.uid}: {error}", file=sys.stderr)
            # a zip is smaller than what it holds: scale what is left, so that the ETA is honest
            bar.total = bar.n + left * (zipped / unpacked if unpacked else 1)
    return checked


def not_yet(wanted, folder, failed):
    """The series that have no folder yet; one whose folder lost files goes to `failed`: it is not ours to delete."""
    todo = [series for series in wanted if not (folder / series.uid).exists()]
    for series in set(wanted) - set(todo):
        n = sum(path.is_file() for path in (folder / series.uid).rglob("*"))
        if n < series.images:
            failed[series.uid] = f"its folder has {n} of {series.images} files; delete it to download it again"
    return todo


def check_space(todo, folder, free_gb):
    """Refuse to start what cannot end: the files, and as much again for zips and for what is made of the files."""
    need_gb, have_gb = 2 * sum(series.size for series in todo) / 1e9, shutil.disk_usage(folder).free / 1e9
    if todo and need_gb + free_gb > have_gb:
        raise ValueError(
            f"{folder} has {have_gb:.1f} GB free; the download needs {need_gb:.1f} GB and --free-gb {free_gb:g}: "
            "make room, or take fewer with --max-series"
        )


def build_parser():
    p = Parser(__doc__)
    p.add_argument("--collection", required=True, help="name as TCIA writes it, such as LIDC-IDRI")
    p.add_argument("--out", type=Path, required=True, help="folder for collections, such as data/raw")
    p.add_argument("--base-url", default=BASE_URL, help="NBIA REST service")
    p.add_argument("--min-images", type=positive, default=8, help="leave out series with fewer images (scouts)")
    p.add_argument("--max-series", type=natural, default=0, help="only the first N by SeriesInstanceUID; 0 = all")
    p.add_argument("--workers", type=positive, default=4, help="series at once")
    p.add_argument("--retries", type=natural, default=6, help="further tries of a request after a network error")
    p.add_argument("--backoff", type=not_negative, default=2.0, help="seconds before the first retry; doubles up to 60")
    p.add_argument("--timeout", type=above_zero, default=60.0, help="seconds without a byte until another try")
    p.add_argument("--free-gb", type=not_negative, default=10.0, help="disk space that must stay free, in GB")
    return p


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url {args.base_url}: begins with http:// or https://")
    if not re.fullmatch(r"[^/\\.][^/\\]*", args.collection):
        parser.error(f"--collection {args.collection!r}: a name, not a path")
    url, stop, no_md5 = args.base_url.rstrip("/"), threading.Event(), threading.Event()
    service = Service(url, args.retries, args.backoff, args.timeout, stop, no_md5)
    print(f"asking {url} for the series of {args.collection}", file=sys.stderr)
    try:
        listed = list_series(service, args.collection)
    except Failed as error:
        raise ValueError(f"cannot list {args.collection}: {error}") from None
    wanted = [series for series in listed if series.images >= args.min_images][: args.max_series or None]
    if not wanted:
        few = f"{len(listed)} CT series, none of {args.min_images} images"
        raise ValueError(f"{args.collection}: {few}; check the name")

    folder, failed = args.out / args.collection, {}
    (folder / ".partial").mkdir(parents=True, exist_ok=True)
    todo = not_yet(wanted, folder, failed)
    with threads(service, args.workers) as pool:
        sized = pool.map(with_size, [service] * len(todo), todo)
        todo = list(progress(sized, total=len(todo), desc="sizes", unit="series"))
    size_gb = sum(series.size for series in todo) / 1e9
    print(f"{len(listed)} CT series, {len(wanted)} wanted, {len(todo)} to download ({size_gb:.2f} GB)")
    check_space(todo, folder, args.free_gb)
    try:
        checked = fetch_all(service, todo, folder, args.workers, failed)
    finally:
        done = [series.uid for series in wanted if (folder / series.uid).exists() and series.uid not in failed]
        counts = {"wanted": len(wanted), "done": len(done), "failed": dict(sorted(failed.items()))}
        record = {"version": VERSION, "base_url": url, "collection": args.collection, **counts}
        write_json(folder / "_download.json", record)
    print(f"{len(done)} of {len(wanted)} series are in {folder}; MD5s were offered and right in {checked} new ones")
    if failed:
        print(f"{len(failed)} failed, see {folder / '_download.json'}; the same command tries them again")
    return 0 if not failed else 1 if done else 2


if __name__ == "__main__":
    run(main)
