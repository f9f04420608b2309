"""tools/download_tcia.py against a small NBIA service on loopback that drops, truncates, rate-limits and lies."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from tools import download_tcia

ROOT = Path(__file__).resolve().parent.parent


def dicom(uid, i, n=3000):
    return b"\0" * 128 + b"DICM" + hashlib.shake_256(f"{uid}/{i}".encode()).digest(n)  # does not compress


def zipped(files, md5s=None):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
        if md5s is not None:
            z.writestr("md5hashes.csv", "Filename,MD5Hash\n" + "".join(f"{k},{v}\n" for k, v in md5s.items()))
    return out.getvalue()


class Archive:
    """What the service holds and how it misbehaves; `log` keeps the requests."""

    def __init__(self):
        self.series, self.images, self.sizes, self.verbs = {}, {}, {}, {"getImageWithMD5Hash", "getImage"}
        self.bodies, self.log, self.errors = {}, [], {}
        self.cut = {}  # uid -> lengths after which the connection drops, one per request
        self.ranges, self.chunked, self.slow_s = True, False, 0.0

    def add(self, uid, images=3, **change):
        self.images[uid] = images
        self.series[uid] = {f"{i:08d}.dcm": dicom(uid, i) for i in range(1, images + 1)}
        md5s = {name: hashlib.md5(content).hexdigest() for name, content in self.series[uid].items()}
        self.bodies[uid] = zipped({**self.series[uid], **change.get("files", {})}, {**md5s, **change.get("md5s", {})})
        self.sizes[uid] = sum(map(len, self.series[uid].values()))

    def count(self, verb):
        return sum(v == verb for v, _, _ in self.log)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def json(self, rows):
        body = json.dumps(rows).encode() if rows else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        archive, url = self.server.archive, urlparse(self.path)
        verb, query = url.path.rsplit("/", 1)[1], {k: v[0] for k, v in parse_qs(url.query).items()}
        uid = query.get("SeriesInstanceUID")
        archive.log.append((verb, uid, self.headers.get("Range")))
        queue = archive.errors.get(verb) or archive.errors.get(uid) or []
        if queue:
            code, headers = queue.pop(0)
            self.send_response(code)
            for item in headers.items():
                self.send_header(*item)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif verb == "getSeries":
            known = query == {"Collection": "Toy CT", "Modality": "CT", "format": "json"}
            rows = [{"SeriesInstanceUID": u, "ImageCount": n, "Modality": "CT"} for u, n in archive.images.items()]
            self.json(rows[::-1] if known else [])
        elif verb == "getSeriesSize" and uid in archive.sizes:
            self.json([{"TotalSizeInBytes": f"{archive.sizes[uid]}.00", "ObjectCount": archive.images[uid]}])
        elif verb in archive.verbs and uid in archive.bodies:
            self.zip(archive, uid)
        else:
            self.send_error(404)

    def zip(self, archive, uid):
        body, start = archive.bodies[uid], 0
        wanted = self.headers.get("Range")
        if wanted and archive.ranges:
            start = int(wanted[6:-1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        length = ("Content-Length", str(len(body) - start))
        self.send_header(*(("Transfer-Encoding", "chunked") if archive.chunked else length))
        self.end_headers()
        cuts = archive.cut.get(uid) or []
        end = cuts.pop(0) if cuts else len(body)
        for at in range(start, end, 1000):
            piece = body[at : min(at + 1000, end)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if archive.chunked else piece)
            time.sleep(archive.slow_s)
        if end < len(body):
            self.close_connection = True
        elif archive.chunked:
            self.wfile.write(b"0\r\n\r\n")
        return None


@pytest.fixture
def archive():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.archive = Archive()
    server.archive.url = f"http://127.0.0.1:{server.server_port}/nbia-api/services/v4"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.archive
    server.shutdown()
    server.server_close()


def flags(archive, out, *more):
    quick = ["--backoff", "0.01", "--retries", "3", "--min-images", "1", "--free-gb", "0", "--timeout", "5"]
    return ["--base-url", archive.url, "--collection", "Toy CT", "--out", str(out), *quick, *map(str, more)]


def download(archive, out, *more):
    return download_tcia.main(flags(archive, out, *more))


def record(out):
    return json.loads((out / "Toy CT" / "_download.json").read_text())


def assert_whole(archive, out, *uids):
    for uid in uids:
        found = {p.name: p.read_bytes() for p in (out / "Toy CT" / uid).iterdir()}
        assert found == archive.series[uid]


def leftovers(out):
    return sorted(p.name for p in (out / "Toy CT" / ".partial").iterdir())


def test_a_collection_arrives_whole_and_the_second_run_asks_for_nothing(archive, tmp_path, capsys):
    for i in range(1, 7):
        archive.add(f"1.2.{i}")
    assert download(archive, tmp_path, "--workers", 3) == 0
    assert_whole(archive, tmp_path, *archive.series)
    assert leftovers(tmp_path) == [] and record(tmp_path)["done"] == 6 and record(tmp_path)["failed"] == {}
    assert archive.count("getImageWithMD5Hash") == 6 and archive.count("getImage") == 0
    assert "right in 6" in capsys.readouterr().out
    archive.log.clear()
    assert download(archive, tmp_path) == 0
    assert [verb for verb, _, _ in archive.log] == ["getSeries"]


def test_filters_by_image_count_and_takes_the_first_by_uid(archive, tmp_path):
    for uid, images in (("1.1", 2), ("1.2", 5), ("1.3", 4), ("1.4", 5)):
        archive.add(uid, images)
    assert download(archive, tmp_path, "--min-images", 4, "--max-series", 2) == 0
    assert sorted(p.name for p in (tmp_path / "Toy CT").glob("1.*")) == ["1.2", "1.3"]


@pytest.mark.parametrize("chunked", [False, True])
def test_dropped_connections_are_resumed_where_they_ended(archive, tmp_path, chunked):
    archive.add("1.2")
    archive.chunked, archive.cut["1.2"] = chunked, [2000, 5000]
    assert download(archive, tmp_path) == 0
    assert [r for v, _, r in archive.log if v == "getImageWithMD5Hash"] == [None, "bytes=2000-", "bytes=5000-"]
    assert_whole(archive, tmp_path, "1.2")


def test_without_ranges_a_dropped_series_starts_over(archive, tmp_path, monkeypatch):
    archive.add("1.2")
    archive.ranges, archive.cut["1.2"] = False, [2000, 5000]
    zips, unpack = [], download_tcia.unpack
    monkeypatch.setattr(
        download_tcia, "unpack", lambda part, *rest: (zips.append(part.read_bytes()), unpack(part, *rest))[1]
    )
    assert download(archive, tmp_path) == 0
    assert zips == [archive.bodies["1.2"]]  # zipfile itself would forgive leading rubbish
    assert_whole(archive, tmp_path, "1.2")


def test_a_series_that_always_drops_fails_alone_and_is_resumed_by_the_next_run(archive, tmp_path):
    for i in range(1, 4):
        archive.add(f"1.{i}")
    archive.cut["1.2"] = [1000, 2000, 3000, 4000]
    assert download(archive, tmp_path) == 1
    assert_whole(archive, tmp_path, "1.1", "1.3")
    assert not (tmp_path / "Toy CT" / "1.2").exists() and leftovers(tmp_path) == ["1.2.zip"]
    assert list(record(tmp_path)["failed"]) == ["1.2"] and "4 tries" in record(tmp_path)["failed"]["1.2"]
    archive.log.clear()
    assert download(archive, tmp_path) == 0
    assert [r for v, _, r in archive.log if v == "getImageWithMD5Hash"] == ["bytes=4000-"]
    assert_whole(archive, tmp_path, "1.2")
    assert record(tmp_path)["failed"] == {}


def test_a_partial_file_of_another_zip_is_thrown_away(archive, tmp_path):
    """What the service sends differs from run to run (it zips on the fly), so a resumed half may not fit."""
    archive.add("1.2")
    part = tmp_path / "Toy CT" / ".partial" / "1.2.zip"
    part.parent.mkdir(parents=True)
    for rubbish in (b"x" * 2000, b"x" * 50_000, zipped({"other.dcm": b"1"})):
        part.write_bytes(rubbish)
        assert download(archive, tmp_path) == 0
        assert_whole(archive, tmp_path, "1.2")
        (tmp_path / "Toy CT" / "1.2").rename(tmp_path / f"{len(rubbish)}")


def test_any_damage_is_found_and_never_sticks(tmp_path, monkeypatch):
    """200 mutated zips: unpacked right, or an error after which the zip is fetched again; nothing else."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    files = {f"{i:08d}.dcm": dicom("1", i, 300) for i in range(3)}
    whole = zipped(files, {name: hashlib.md5(content).hexdigest() for name, content in files.items()})
    rng, part, outcomes = random.Random(0), tmp_path / "part.zip", Counter()
    for _ in range(200):
        mutated = bytearray(whole)
        at = rng.randrange(len(whole)) if rng.random() < 0.5 else len(whole) - rng.randrange(1, 300)  # the directory
        mutated[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(1, 3)) if rng.random() < 0.8 else b""
        part.write_bytes(mutated)
        try:
            download_tcia.unpack(part, tmp_path / "files", download_tcia.Series("1", 3, 1))
        except download_tcia.DAMAGED:
            outcomes["damaged"] += 1
        else:
            assert {p.name: p.read_bytes() for p in (tmp_path / "files").iterdir()} == files
            outcomes["right"] += 1
    assert outcomes["damaged"] > 140


def test_a_whole_zip_that_was_not_unpacked_is_not_sent_again(archive, tmp_path):
    archive.add("1.2")
    part = tmp_path / "Toy CT" / ".partial" / "1.2.zip"
    part.parent.mkdir(parents=True)
    part.write_bytes(archive.bodies["1.2"])
    (part.parent / "1.2").mkdir()  # a half-unpacked folder beside it
    (part.parent / "1.2" / "half.dcm").touch()
    assert download(archive, tmp_path) == 0
    assert archive.count("getImageWithMD5Hash") == 0
    assert_whole(archive, tmp_path, "1.2")


@pytest.mark.parametrize("date", [False, True])
def test_rate_limits_are_waited_for(archive, tmp_path, date):
    archive.add("1.2")
    until = formatdate(time.time() + 2, usegmt=True) if date else "1"  # dates have whole seconds
    archive.errors = {"getSeries": [(503, {})], "1.2": [(429, {"Retry-After": until})]}
    archive.errors["getSeriesSize"] = [(500, {})]  # asked once: the size is only an estimate
    start = time.monotonic()
    assert download(archive, tmp_path) == 0
    assert 0.9 < time.monotonic() - start < 4 and archive.count("getSeriesSize") == 1
    assert_whole(archive, tmp_path, "1.2")


def test_back_off_doubles(monkeypatch):
    waits = []
    service = download_tcia.Service("", 4, 1.0, 1.0, threading.Event(), threading.Event())
    monkeypatch.setattr(service.stop, "wait", lambda s: waits.append(s))
    with pytest.raises(download_tcia.Failed, match=r"refused \(5 tries\)"):
        download_tcia.retried(service, lambda: (_ for _ in ()).throw(ConnectionRefusedError("refused")))
    assert len(waits) == 4 and all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(waits))


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_network_the_first_attempt_says_so_before_it_waits(tmp_path, monkeypatch, capsys, terminal):
    said, clock = [], [0.0]

    def pass_time(self, seconds):
        clock[0] += seconds
        said.append(capsys.readouterr().err)

    monkeypatch.setattr(threading.Event, "wait", pass_time)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(download_tcia.random, "uniform", lambda *_: 1.0)
    url = "http://127.0.0.1:9/x"  # nobody listens there
    few = ["--base-url", url, "--retries", "2", "--backoff", "2.5"]
    with pytest.raises(ValueError, match=f"cannot list Toy: no connection to {url} .*refused.*, is there a network"):
        download_tcia.main(["--collection", "Toy", "--out", str(tmp_path), *few])
    assert said[0].startswith(f"asking {url} for the series of Toy\n") and "no connection to" in said[0]
    lefts = [int(line.rsplit(" in ", 1)[1].split()[0]) for line in said]
    assert lefts == ([3, 2, 1, 5, 4, 3, 2, 1] if terminal else [2, 5])
    assert "Ctrl+C stops; try 2 of 3 in" in said[0] and "try 3 of 3" in said[-1] and not list(tmp_path.iterdir())


def test_what_the_service_says_reaches_no_terminal_raw(archive, tmp_path, capsys):
    """Names in the zip, MD5s and ids are the service's own words."""
    archive.add("1.2", files={"a\x1b[2J\u202e.dcm": b"1"}, md5s={"a\x1b[2J\u202e.dcm": "\x1b[31m"})
    archive.add("1.3", files={"../\x1b[2J": b"1"})
    assert download(archive, tmp_path, "--retries", 0) == 2
    said = "".join(capsys.readouterr())
    assert "the MD5 of a\\x1b[2J\\u202e.dcm is not \\x1b[31m" in said
    assert "\x1b[2J" not in said and "\x1b[31m" not in said and "\u202e" not in said
    archive.images["\x1b" + "9" * 10**5] = 3
    with pytest.raises(ValueError, match="without a proper SeriesInstanceUID") as caught:
        download(archive, tmp_path)
    assert len(str(caught.value)) < 300 and "\x1b" not in str(caught.value)


def test_a_series_that_is_tried_again_is_named(archive, tmp_path, capsys):
    archive.add("1.2")
    archive.cut["1.2"] = [1000]
    assert download(archive, tmp_path) == 0
    assert "1.2: cut off at 1000 of" in capsys.readouterr().err


def test_what_cannot_succeed_is_not_tried_again(archive, tmp_path):
    archive.add("1.1")
    archive.add("1.2")
    archive.errors["getImageWithMD5Hash"] = [(403, {}), (403, {})]
    assert download(archive, tmp_path, "--workers", 1) == 2
    assert set(record(tmp_path)["failed"].values()) == {"HTTP 403 Forbidden"}
    assert archive.count("getImageWithMD5Hash") == 2


def test_a_wrong_md5_is_tried_again_and_then_fails(archive, tmp_path):
    archive.add("1.1")
    archive.add("1.2", md5s={"00000002.dcm": "0" * 32})
    assert download(archive, tmp_path) == 1
    assert "MD5 of 00000002.dcm" in record(tmp_path)["failed"]["1.2"]
    assert archive.count("getImageWithMD5Hash") == 5 and leftovers(tmp_path) == ["1.2"]
    assert not (tmp_path / "Toy CT" / "1.2").exists()


def test_without_the_md5_verb_plain_zips_are_taken_and_their_crc_checked(archive, tmp_path, capsys):
    archive.verbs = {"getImage"}
    archive.add("1.1")
    body = bytearray(archive.bodies["1.1"])
    archive.bodies["1.2"] = bytes(body[:1500] + bytes([body[1500] ^ 1]) + body[1501:])
    archive.images["1.2"] = 3
    assert download(archive, tmp_path, "--workers", 1) == 1
    assert "damaged zip" in record(tmp_path)["failed"]["1.2"]
    assert archive.count("getImageWithMD5Hash") == 1  # learnt once


def test_a_proper_zip_with_too_few_images_is_not_whole(archive, tmp_path):
    archive.add("1.2", files={"LICENSE": b"CC BY", "sub/LICENSE.txt": b"CC BY"})
    archive.images["1.2"] = 5  # the service closes its zip properly when it fails in the middle
    archive.add("1.3", md5s={"00000009.dcm": "0" * 32})
    assert download(archive, tmp_path) == 2
    assert "3 of 5 images" in record(tmp_path)["failed"]["1.2"] and "3 of 4 images" in record(tmp_path)["failed"]["1.3"]


@pytest.mark.parametrize("name", ["../evil.dcm", "/evil.dcm", "a/../../evil.dcm", "..\\evil.dcm", "C:\\evil.dcm"])
def test_names_that_lead_out_of_the_folder_fail_the_series(archive, tmp_path, name):
    out = tmp_path / "deep" / "out"
    archive.add("1.2", files={name: b"evil"})
    assert download(archive, out) == 2
    assert "unsafe file name" in record(out)["failed"]["1.2"]
    assert not list(tmp_path.rglob("*evil*")) and leftovers(out) == ["1.2"]


def test_folders_inside_the_zip_and_a_licence_are_kept(archive, tmp_path):
    archive.add("1.2", files={"LICENSE": b"CC BY", "sub/": b"", "sub/4.dcm": b"4"})
    assert download(archive, tmp_path) == 0
    found = {p.relative_to(tmp_path / "Toy CT" / "1.2").as_posix() for p in (tmp_path / "Toy CT" / "1.2").rglob("*.*")}
    assert found == {*archive.series["1.2"], "sub/4.dcm"}


def test_no_disk_space_no_start(archive, tmp_path):
    archive.add("1.2")
    with pytest.raises(ValueError, match="make room"):
        download(archive, tmp_path, "--free-gb", 1e9)
    archive.sizes["1.2"] = 10**18
    with pytest.raises(ValueError, match="2000000000.0 GB"):
        download(archive, tmp_path)
    assert archive.count("getImageWithMD5Hash") == 0


def test_unknown_sizes_are_estimated(archive, tmp_path):
    archive.add("1.2", images=4)
    archive.sizes.clear()
    service = download_tcia.Service(archive.url, 0, 0.0, 5.0, threading.Event(), threading.Event())
    listed = download_tcia.list_series(service, "Toy CT")
    assert download_tcia.with_size(service, listed[0]).size == 4 * download_tcia.IMAGE_BYTES
    assert download(archive, tmp_path) == 0


def test_a_full_disk_stops_the_run(archive, tmp_path, monkeypatch):
    for i in range(5):
        archive.add(f"1.{i}")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_tcia, "unpack", full)
    with pytest.raises(OSError, match="No space left"):
        download(archive, tmp_path, "--workers", 1)
    assert archive.count("getImageWithMD5Hash") == 1 and record(tmp_path)["done"] == 0


def test_a_folder_that_lost_files_is_reported_and_not_touched(archive, tmp_path):
    archive.add("1.1")
    archive.add("1.2")
    assert download(archive, tmp_path) == 0
    (tmp_path / "Toy CT" / "1.2" / "00000001.dcm").unlink()
    assert download(archive, tmp_path) == 1
    assert "2 of 3 files" in record(tmp_path)["failed"]["1.2"]
    assert len(list((tmp_path / "Toy CT" / "1.2").iterdir())) == 2


def test_nothing_found_and_bad_answers_are_errors(archive, tmp_path, capsys):
    with pytest.raises(ValueError, match="check the name"):
        download(archive, tmp_path)
    archive.add("1.2", images=2)
    with pytest.raises(ValueError, match="1 CT series, none of 9"):
        download(archive, tmp_path, "--min-images", 9)
    archive.images["../../x"] = 3
    with pytest.raises(ValueError, match="proper SeriesInstanceUID"):
        download(archive, tmp_path)
    archive.errors["getSeries"] = [(500, {})] * 4
    with pytest.raises(ValueError, match="cannot list Toy CT: HTTP 500"):
        download(archive, tmp_path)
    assert not list(tmp_path.iterdir())
    for bad in (["--collection", "a/b"], ["--collection", ".."], ["--base-url", "file:///etc"], ["--retries", "-1"]):
        with pytest.raises(SystemExit) as stop:
            download(archive, tmp_path, *bad)
        assert stop.value.code == 2


@pytest.mark.slow
def test_ctrl_c_leaves_what_the_next_run_resumes(archive, tmp_path):
    for i in range(1, 4):
        archive.add(f"1.{i}", images=8)
    archive.slow_s = 0.05
    command = [sys.executable, str(ROOT / "tools" / "download_tcia.py"), *flags(archive, tmp_path, "--workers", 2)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl+C
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(p.stat().st_size > 2000 for p in tmp_path.rglob("*.zip")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().strip().splitlines()[-1] == "interrupted"
    parts = {p.stem: p.stat().st_size for p in tmp_path.rglob("*.zip")}
    assert parts and not list((tmp_path / "Toy CT").glob("1.*"))
    archive.slow_s, archive.log = 0.0, []
    assert download(archive, tmp_path) == 0
    asked = Counter((uid, wanted) for verb, uid, wanted in archive.log if verb == "getImageWithMD5Hash")
    assert all(asked[uid, f"bytes={size}-"] == 1 for uid, size in parts.items())
    assert_whole(archive, tmp_path, *archive.series)
