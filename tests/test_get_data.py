"""tools/get_data.py: a wheel becomes a data folder; nothing else of it is written. No network is used."""

import csv
import functools
import http.server
import io
import subprocess
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import open_source
from tools import get_data

ROWS = [("cell0001", "1.0", "mono"), ("cell0002", "0.3333333333333333", "poly"),
        ("cell0003", "0.6666666666666666", "poly"), ("cell0004", "0.0", "mono")]  # fmt: skip


def wheel(path, rows=ROWS, extra=(), drop=()):
    """Like the published one: images, a table with spaces between its columns, code that nobody runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"images/{name}.png  {probability:20} {cell}" for name, probability, cell in rows]
        archive.writestr("elpv_dataset/data/labels.csv", "\n".join(lines) + "\n")
        archive.writestr("elpv_dataset/__init__.py", "raise SystemExit")
        for k, (name, *_) in enumerate(ROWS):
            if name not in drop:
                buffer = io.BytesIO()
                Image.fromarray(np.full((30, 30), 60 * k, np.uint8)).save(buffer, "PNG")
                archive.writestr(f"elpv_dataset/data/images/{name}.png", buffer.getvalue())
        for name in extra:
            archive.writestr(name, b"x")
    return path


def fetch(out, *flags):
    return get_data.main(["elpv", "--out", str(out), *map(str, flags)])


def test_a_wheel_becomes_a_data_folder(tmp_path, capsys):
    extra = ["../outside.png", "elpv_dataset/data/images/../../../../outside.png", "/outside.png"]
    assert fetch(tmp_path / "out", "--wheel", wheel(tmp_path / "a.whl", extra=extra)) == 0
    with open(tmp_path / "out" / "labels.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert rows == [
        ["path", "label", "probability", "cell"],
        ["images/cell0001.png", "1", "1.0", "mono"],
        ["images/cell0002.png", "0", "0.3333333333333333", "poly"],
        ["images/cell0003.png", "1", "0.6666666666666666", "poly"],
        ["images/cell0004.png", "0", "0.0", "mono"],
    ]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "a.whl",
        *(f"{r[0]}.png" for r in ROWS),
        "labels.csv",
    ]
    (tmp_path / "out" / "labels.csv").rename(tmp_path / "labels.csv")
    pictures = open_source(tmp_path / "out")
    assert [int(pictures.read(k).max()) for k in range(4)] == [0, 60, 120, 180]
    said = capsys.readouterr().out
    assert "probability 0.33 poly: 1" in said and "4 pictures, 2 with label 1" in said


def test_pip_downloads_the_wheel_and_installs_nothing(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(command)
        wheel(get_data.Path(command[command.index("--dest") + 1]) / "elpv_dataset-1-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    assert fetch(tmp_path / "out") == 0 and (tmp_path / "out" / "labels.csv").exists()
    (command,) = asked
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"] and command[-1] == "elpv-dataset"
    assert not get_data.Path(command[command.index("--dest") + 1]).exists()
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(OSError, match=r"pip could not download elpv-dataset \(exit code 1\).*--wheel FILE"):
        fetch(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_wheel_leaves_no_labels(tmp_path):
    good = wheel(tmp_path / "good.whl").read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"IDAT") + 6] ^= 255
    cases = (
        (wheel(tmp_path / "1.whl", [*ROWS, ("cell0005", "1.0", "mono")]), "1 pictures without a label.*cell0005"),
        (wheel(tmp_path / "2.whl", drop=["cell0002"]), "cell0002"),
        (wheel(tmp_path / "3.whl", [("cell0001", "often", "mono"), *ROWS[1:]]), "often.*expected path, probability"),
        (wheel(tmp_path / "4.whl", [("../../x", "1.0", "mono"), *ROWS]), "without one: images/../../x"),
        (tmp_path / "5.whl", "is not whole .*CRC"),
        (tmp_path / "6.whl", "is no wheel"),
    )
    (tmp_path / "5.whl").write_bytes(flipped)
    (tmp_path / "6.whl").write_bytes(good[:200])
    for k, (path, words) in enumerate(cases):
        with pytest.raises(ValueError, match=words):
            fetch(tmp_path / f"out{k}", "--wheel", path)
        assert not (tmp_path / f"out{k}" / "labels.csv").exists() and not list(tmp_path.rglob("x.png"))
    with pytest.raises(FileExistsError, match="not empty: name a new folder"):
        fetch(tmp_path, "--wheel", tmp_path / "good.whl")


# volumes from an archive of sources, whose setup.py is never run


def archive(path, drop=()):
    names = {**get_data.VOLUMES, get_data.LICENCE: ""}
    with tarfile.open(path, "w:gz") as tar:
        for name in [*names, "pyradiomics-3.0.1/setup.py", "../outside.nrrd", "pyradiomics-3.0.1/data/../../x.nrrd"]:
            if name not in drop:
                member = tarfile.TarInfo(name)
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    return path


def serve(folder, page):
    """Address of an index on this machine: `page` for the package, files beside it. No network."""
    (folder / "simple" / "pyradiomics").mkdir(parents=True)
    (folder / "simple" / "pyradiomics" / "index.html").write_text(page)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/simple"


@pytest.mark.slow
def test_volumes_come_from_the_index_that_pip_is_set_to(tmp_path, monkeypatch):
    path = archive(tmp_path / get_data.SOURCES)
    page = f'<a href="x">other-1.tar.gz</a><a data-x="1" href="../../{path.name}#sha256=1">{path.name}</a>'
    server, address = serve(tmp_path, page)
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(get_data, "SOURCES_SHA256", get_data.file_sha256(path))
    try:
        assert get_data.main(["ct-samples", "--out", str(tmp_path / "out")]) == 0
    finally:
        server.shutdown()
        server.server_close()
    found = {p.relative_to(tmp_path / "out").as_posix(): p.read_text() for p in (tmp_path / "out").rglob("*.*")}
    assert found == {**{target: name for name, target in get_data.VOLUMES.items()}, "LICENSE.txt": get_data.LICENCE}
    assert not list(tmp_path.rglob("outside.nrrd")) and not list(tmp_path.rglob("setup.py"))
    with pytest.raises(OSError, match="has no pyradiomics-3.0.1.tar.gz.*--archive FILE"):  # the index is gone
        get_data.main(["ct-samples", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_another_archive_is_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar.gz", drop=["pyradiomics-3.0.1/data/lung2_label.nrrd"])
    with pytest.raises(ValueError, match="is not pyradiomics-3.0.1.tar.gz as published"):
        get_data.main(["ct-samples", "--out", str(tmp_path / "out"), "--archive", str(path)])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(get_data, "SOURCES_SHA256", get_data.file_sha256(path))
    with pytest.raises(ValueError, match="lacks .*lung2_label"):
        get_data.main(["ct-samples", "--out", str(tmp_path / "out"), "--archive", str(path)])
    with pytest.raises(SystemExit):
        get_data.main(["ct-samples", "--wheel", str(path)])


def test_dicom_files_of_a_wheel_become_a_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel_file:
        for name in ("data_store/data/a.dcm", "data_store/data/../../b.dcm", "data_store/x.py", "/c.dcm"):
            wheel_file.writestr(name, name)
    assert get_data.main(["dicom-samples", "--out", str(tmp_path / "out"), "--wheel", str(tmp_path / "a.whl")]) == 0
    assert [p.name for p in tmp_path.rglob("*.dcm")] == ["a.dcm"]
